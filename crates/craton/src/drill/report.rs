//! What a drill found, as a table or as JSON.

use std::collections::BTreeMap;
use std::time::Duration;

use craton_console::views::StatusView;
use craton_core::MemberId;
use serde::Serialize;
use tokio::time::Instant;

use super::faults::{ALL, Fault};
use super::recorder::{Fate, Log, Write, longest_gap};
use super::verify::Verdict;
use crate::exit;
use crate::output::{self, Colour, cell, paint, plain};

/// Everything a result is made from.
pub struct Observed<'a> {
    /// Which drill of the series.
    pub number: u32,
    /// What was done.
    pub fault: Fault,
    /// To whom.
    pub target: MemberId,
    /// When.
    pub began: Instant,
    /// The end of what is looked at.
    pub until: Instant,
    /// Time until full redundancy, or what was missing at the deadline.
    pub healed: Result<Duration, String>,
    /// The recording.
    pub log: &'a Log,
    /// The writes since the fault.
    pub writes: &'a [Write],
    /// What the leader has of them.
    pub verdict: Option<Verdict>,
    /// The cluster before.
    pub before: &'a StatusView,
    /// The cluster after.
    pub after: Option<&'a StatusView>,
}

/// What one drill found. Times in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct DrillResult {
    /// Which drill of the series.
    pub number: u32,
    /// What was done.
    pub drill: Fault,
    /// To which member (of kill-proxy: the leader at the time).
    pub target: MemberId,
    /// The longest time without an acknowledged write.
    pub outage_ms: u64,
    /// The longest time without an answered read.
    pub read_gap_ms: u64,
    /// Acknowledged writes since the fault.
    pub acknowledged: u64,
    /// Writes that certainly failed, and attempts to connect that failed.
    pub errors: u64,
    /// Writes of unknown outcome.
    pub unknown: u64,
    /// Sessions of writers that ended.
    pub sessions_lost: u64,
    /// Reads that failed.
    pub read_errors: u64,
    /// Acknowledged writes that the leader does not have afterwards.
    pub lost: u64,
    /// Writes that the leader has although the client was told that they failed.
    pub ghosts: u64,
    /// Time until full redundancy; none when it was not reached in time.
    pub redundancy_ms: Option<u64>,
    /// What was missing then.
    pub missing: Option<String>,
    /// Who led before and after.
    pub leaders: (Option<MemberId>, Option<MemberId>),
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

fn many(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

impl DrillResult {
    /// Counts what was observed.
    pub fn new(seen: Observed<'_>) -> Self {
        let after =
            |instants: &[Instant]| many(instants.iter().filter(|t| **t > seen.began).count());
        let with_fate = |fate| many(seen.writes.iter().filter(|w| w.fate == fate).count());
        let acks: Vec<Instant> = seen
            .log
            .writes
            .iter()
            .filter(|w| w.fate == Fate::Acknowledged)
            .map(|w| w.ended)
            .collect();
        Self {
            number: seen.number,
            drill: seen.fault,
            outage_ms: millis(longest_gap(&acks, seen.began, seen.until)),
            read_gap_ms: millis(longest_gap(&seen.log.reads, seen.began, seen.until)),
            acknowledged: with_fate(Fate::Acknowledged),
            errors: with_fate(Fate::Failed) + after(&seen.log.connects_failed),
            unknown: with_fate(Fate::Unknown),
            sessions_lost: after(&seen.log.sessions_lost),
            read_errors: after(&seen.log.reads_failed),
            lost: seen.verdict.as_ref().map_or(0, |v| many(v.lost.len())),
            ghosts: seen.verdict.as_ref().map_or(0, |v| many(v.ghosts.len())),
            redundancy_ms: seen.healed.as_ref().ok().map(|d| millis(*d)),
            missing: seen.healed.err(),
            leaders: (
                seen.before.leader.clone(),
                seen.after.and_then(|v| v.leader.clone()),
            ),
            target: seen.target,
        }
    }

    /// A line while the series runs.
    pub fn progress_line(&self) -> String {
        let healed = self.redundancy_ms.map_or_else(
            || format!("NOT healed: {}", self.missing.as_deref().unwrap_or("?")),
            |ms| {
                format!(
                    "whole again after {}",
                    output::duration(Duration::from_millis(ms))
                )
            },
        );
        format!(
            "{:>3}  {:<15} {}  outage {}, {} errors, {} unknown, {} lost, {healed}",
            self.number,
            self.drill.name(),
            self.target,
            output::duration(Duration::from_millis(self.outage_ms)),
            self.errors,
            self.unknown,
            self.lost,
        )
    }
}

/// What one server has of the whole recording.
#[derive(Clone, Debug, Serialize)]
pub struct Holding {
    /// "leader" (through the proxy) or a member.
    pub server: String,
    /// Acknowledged rows that are missing.
    pub lost: u64,
    /// Rows that are there although they were reported as failed.
    pub ghosts: u64,
    /// Rows of unknown outcome that are there.
    pub unknown_there: u64,
    /// Rows of unknown outcome that are not.
    pub unknown_absent: u64,
    /// The first lost rows.
    pub lost_ids: Vec<u64>,
}

/// How many lost rows are named.
const LOST_IDS_SHOWN: usize = 20;

/// A series of drills.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The durability in force.
    pub durability: String,
    /// Repeats the choices of `mixed`.
    pub seed: u64,
    /// Each drill.
    pub drills: Vec<DrillResult>,
    /// Median outage per drill, in milliseconds.
    pub median_outage_ms: BTreeMap<String, u64>,
    /// Acknowledged writes in all.
    pub acknowledged: u64,
    /// What every server has, at the end.
    pub servers: Vec<Holding>,
    /// Errors that clients saw, with how often.
    pub errors: BTreeMap<String, u64>,
}

impl Summary {
    /// Adds up.
    pub fn new(
        durability: &str,
        seed: u64,
        drills: Vec<DrillResult>,
        log: &Log,
        verdicts: Vec<(String, Verdict)>,
    ) -> Self {
        let mut outages: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        for drill in &drills {
            outages
                .entry(drill.drill.name())
                .or_default()
                .push(drill.outage_ms);
        }
        let servers = verdicts.into_iter().map(|(server, v)| Holding {
            server,
            lost: many(v.lost.len()),
            ghosts: many(v.ghosts.len()),
            unknown_there: v.unknown_there,
            unknown_absent: v.unknown_absent,
            lost_ids: v.lost.into_iter().take(LOST_IDS_SHOWN).collect(),
        });
        Self {
            durability: durability.to_owned(),
            seed,
            median_outage_ms: outages
                .into_iter()
                .map(|(drill, times)| (drill, median(times)))
                .collect(),
            acknowledged: many(
                log.writes
                    .iter()
                    .filter(|w| w.fate == Fate::Acknowledged)
                    .count(),
            ),
            servers: servers.collect(),
            errors: log.errors.clone(),
            drills,
        }
    }

    /// Acknowledged rows that some server lacks, or that a drill found missing.
    pub fn lost(&self) -> u64 {
        let at_the_end = self.servers.iter().map(|s| s.lost).max().unwrap_or(0);
        at_the_end.max(self.drills.iter().map(|d| d.lost).sum())
    }

    /// Non-zero when something promised was not kept.
    pub fn exit_code(&self) -> u8 {
        let ghosts =
            self.servers.iter().any(|s| s.ghosts > 0) || self.drills.iter().any(|d| d.ghosts > 0);
        if ghosts || (self.lost() > 0 && self.durability != "async") {
            exit::ROWS_LOST
        } else if self.drills.iter().any(|d| d.redundancy_ms.is_none()) {
            exit::NOT_IN_TIME
        } else {
            exit::OK
        }
    }

    /// Prints it.
    pub fn print(&self, json: bool) -> anyhow::Result<()> {
        if json {
            return output::json(self);
        }
        let header = [
            "#",
            "DRILL",
            "ON",
            "OUTAGE",
            "READ GAP",
            "ERRORS",
            "UNKNOWN",
            "SESSIONS LOST",
            "LOST",
            "WHOLE AGAIN",
            "LEADER",
        ];
        let mut table = output::table(&header);
        for d in &self.drills {
            let name = |m: &Option<MemberId>| {
                m.as_ref()
                    .map_or_else(|| "-".to_owned(), ToString::to_string)
            };
            let ms = |ms| plain(output::duration(Duration::from_millis(ms)));
            table.add_row(vec![
                plain(d.number.to_string()),
                plain(d.drill.name()),
                plain(d.target.to_string()),
                ms(d.outage_ms),
                ms(d.read_gap_ms),
                plain(output::count(d.errors + d.read_errors)),
                plain(output::count(d.unknown)),
                plain(output::count(d.sessions_lost)),
                verdict_number(d.lost),
                d.redundancy_ms.map_or_else(|| cell(Colour::Red, "no"), ms),
                plain(format!("{} → {}", name(&d.leaders.0), name(&d.leaders.1))),
            ]);
        }
        output::line(format!("\n{}\n", output::table_text(&table)));
        self.print_servers();
        for (error, times) in &self.errors {
            output::line(format!(
                "{} {} × {error}",
                paint(Colour::Dim, "clients saw"),
                output::count(*times)
            ));
        }
        for drill in self.drills.iter().filter(|d| d.missing.is_some()) {
            output::line(format!(
                "{} {}",
                paint(Colour::Red, "not healed:"),
                drill.missing.as_deref().unwrap_or_default()
            ));
        }
        if self.drills.len() > 1 {
            for (drill, ms) in &self.median_outage_ms {
                output::line(format!(
                    "median outage of {drill}: {}",
                    output::duration(Duration::from_millis(*ms))
                ));
            }
            output::line(format!("seed {}", self.seed));
        }
        self.print_verdict();
        Ok(())
    }

    fn print_servers(&self) {
        if self.servers.is_empty() {
            return;
        }
        let mut table = output::table(&[
            "SERVER",
            "ACKNOWLEDGED ROWS LOST",
            "FAILED BUT THERE",
            "UNKNOWN: THERE",
            "NOT THERE",
        ]);
        for s in &self.servers {
            table.add_row(vec![
                plain(s.server.clone()),
                verdict_number(s.lost),
                verdict_number(s.ghosts),
                plain(s.unknown_there.to_string()),
                plain(s.unknown_absent.to_string()),
            ]);
        }
        output::line(format!("{}\n", output::table_text(&table)));
    }

    fn print_verdict(&self) {
        let acknowledged = output::count(self.acknowledged);
        let lost = self.lost();
        let text = if self.servers.is_empty() {
            paint(
                Colour::Red,
                "the cluster did not become whole again, so not every server could be checked",
            )
        } else if lost == 0 {
            paint(
                Colour::Green,
                &format!("{acknowledged} acknowledged rows, none lost, on every member"),
            )
        } else {
            let allowed = if self.durability == "async" {
                " (durability async allows it)"
            } else {
                ""
            };
            paint(
                Colour::Red,
                &format!("{lost} of {acknowledged} acknowledged rows lost{allowed}"),
            )
        };
        output::line(text);
    }
}

fn verdict_number(n: u64) -> comfy_table::Cell {
    if n == 0 {
        cell(Colour::Green, "0")
    } else {
        cell(Colour::Red, output::count(n))
    }
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    let middle = values.len() / 2;
    let at = |i: usize| values.get(i).copied().unwrap_or(0);
    if values.len().is_multiple_of(2) {
        at(middle.saturating_sub(1)).midpoint(at(middle))
    } else {
        at(middle)
    }
}

/// `craton drill list`.
pub fn list(json: bool) -> anyhow::Result<()> {
    let drills: Vec<(String, String)> = ALL.iter().map(|f| (f.name(), f.about())).collect();
    if json {
        return output::json(&drills.into_iter().collect::<BTreeMap<_, _>>());
    }
    let mut table = output::table(&["DRILL", "WHAT IT DOES WHILE CLIENTS WRITE AND READ"]);
    for (name, about) in drills {
        table.add_row(vec![cell(Colour::Cyan, name), plain(about)]);
    }
    table.add_row(vec![
        cell(Colour::Cyan, "mixed"),
        plain("any of these, at random, --count times"),
    ]);
    output::line(output::table_text(&table));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![3, 1, 2]), 2);
        assert_eq!(median(vec![4, 1, 3, 2]), 2);
        assert_eq!(median(vec![]), 0);
    }

    #[test]
    fn loss_is_an_error_except_in_async() {
        let holding = Holding {
            server: "a".into(),
            lost: 1,
            ghosts: 0,
            unknown_there: 0,
            unknown_absent: 0,
            lost_ids: vec![7],
        };
        let mut summary = Summary::new("quorum", 1, Vec::new(), &Log::default(), Vec::new());
        assert_eq!(summary.exit_code(), exit::OK);
        summary.servers.push(holding);
        assert_eq!(summary.exit_code(), exit::ROWS_LOST);
        summary.durability = "async".into();
        assert_eq!(summary.exit_code(), exit::OK);
    }
}
