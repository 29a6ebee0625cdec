//! `craton doctor`: everything that is or will be wrong with the cluster, and what to do about it.
//!
//! [`facts`] gathers what is known; [`checks`] are pure functions of it.

mod checks;
mod facts;
mod guarantees;
mod slots;
mod store;

use clap::Args;
use serde::Serialize;

use crate::access::Access;
use crate::exit;
use crate::output::{self, Colour, cell, paint, plain};
use std::path::Path;

pub use checks::CHECKS;

/// How bad a finding is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Worth knowing; nothing has to be done.
    Note,
    /// Something is, or will be, less safe than it could be.
    Warning,
    /// Clients cannot write, or the next failure stops them or loses data.
    Critical,
}

/// Something that is wrong.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    /// The check that found it, for machines.
    pub id: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// Where: a member, a daemon, a file, or the cluster.
    pub place: String,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub todo: String,
}

/// `craton doctor`
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// List the checks instead of making them
    #[arg(long)]
    pub list: bool,
}

/// The answer as JSON.
#[derive(Serialize)]
struct Report<'a> {
    findings: &'a [Finding],
    checks: usize,
}

/// Makes every check; the worst comes first.
pub fn examine(facts: &facts::Facts) -> Vec<Finding> {
    let mut findings: Vec<Finding> = CHECKS.iter().flat_map(|c| (c.run)(facts)).collect();
    findings.sort_by(|a, b| (b.severity, a.id, &a.place).cmp(&(a.severity, b.id, &b.place)));
    findings
}

/// Runs the command.
pub async fn run(access: &Access, dir: &Path, args: &DoctorArgs, json: bool) -> anyhow::Result<u8> {
    if args.list {
        let mut table = output::table(&["CHECK", "WHAT IT LOOKS FOR"]);
        for check in CHECKS {
            table.add_row(vec![cell(Colour::Cyan, check.id), plain(check.about)]);
        }
        output::line(output::table_text(&table));
        return Ok(exit::OK);
    }
    let facts = facts::gather(access, dir).await?;
    let findings = examine(&facts);
    if json {
        output::json(&Report {
            findings: &findings,
            checks: CHECKS.len(),
        })?;
    } else {
        show(&findings);
    }
    Ok(code(&findings))
}

fn show(findings: &[Finding]) {
    for f in findings {
        let severity = match f.severity {
            Severity::Critical => paint(Colour::Red, "critical"),
            Severity::Warning => paint(Colour::Yellow, "warning"),
            Severity::Note => paint(Colour::Dim, "note"),
        };
        output::line(format!(
            "{severity} {} {}: {}",
            paint(Colour::Bold, f.id),
            paint(Colour::Cyan, &f.place),
            f.what
        ));
        if !f.todo.is_empty() {
            output::line(format!("    {}", f.todo));
        }
    }
    let bad = findings
        .iter()
        .filter(|f| f.severity > Severity::Note)
        .count();
    output::line(match bad {
        0 => format!("{} checks made, nothing is wrong", CHECKS.len()),
        1 => format!("{} checks made, 1 thing is wrong", CHECKS.len()),
        n => format!("{} checks made, {n} things are wrong", CHECKS.len()),
    });
}

fn code(findings: &[Finding]) -> u8 {
    match findings.iter().map(|f| f.severity).max() {
        None | Some(Severity::Note) => exit::OK,
        Some(Severity::Warning) => exit::DOCTOR_WARNING,
        Some(Severity::Critical) => exit::DOCTOR_CRITICAL,
    }
}

#[cfg(test)]
mod tests;
