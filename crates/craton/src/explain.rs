//! `craton explain`: an agent's own reasons.

use craton_console::views::ExplainView;
use craton_core::MemberId;

use crate::access::Access;
use crate::exit::{self, Problem};
use crate::output::{self, Colour, paint};

/// Runs the command.
pub async fn run(access: &Access, member: Option<MemberId>, json: bool) -> anyhow::Result<u8> {
    let status = access.status().await?;
    let asked = member
        .clone()
        .or(status.leader)
        .unwrap_or(status.answered_by);
    let Some(about) = status.members.iter().find(|m| m.id == asked) else {
        let known: Vec<_> = status.members.iter().map(|m| m.id.as_str()).collect();
        let what = format!("there is no member \"{asked}\" in this cluster");
        return Err(Problem::new(
            exit::USAGE,
            what,
            format!("its members are {}", known.join(", ")),
        )
        .into());
    };
    let own = |view: &ExplainView| view.member == asked;
    let view = access.get_of(&about.api, "/v1/explain", own).await?;
    if json {
        output::json(&view)?;
        return Ok(exit::OK);
    }
    output::line(format!(
        "{} {}",
        paint(Colour::Cyan, view.member.as_str()),
        view.summary
    ));
    for reason in &view.reasons {
        output::line(format!("  because {reason}"));
    }
    for hint in &view.hints {
        let (code, means) = hint.split_once(": ").unwrap_or(("", hint));
        output::line(format!(
            "  {} {means}",
            paint(Colour::Dim, &format!("{code}:"))
        ));
    }
    for wait in &view.waiting_for {
        output::line(format!("  {} {wait}", paint(Colour::Yellow, "waits for")));
    }
    Ok(exit::OK)
}
