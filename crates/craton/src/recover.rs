//! `craton recover`: going on when the majority of the voters is lost for good.

use std::io::IsTerminal as _;

use clap::Args;
use craton_agent::{RecoverError, Survey, moved_to, stand_alone, survey};
use craton_core::MemberId;
use craton_core::records::{History, Leadership};
use jiff::Timestamp;

use crate::cli::DaemonArgs;
use crate::config;
use crate::exit::{self, Problem, REFUSED, USAGE};
use crate::output;

/// `craton recover`
#[derive(Args, Debug)]
pub struct RecoverArgs {
    /// Settings of the surviving member
    #[command(flatten)]
    pub daemon: DaemonArgs,
    /// Do not ask: the other voters are lost, and will never run again
    #[arg(long)]
    pub yes: bool,
}

/// Runs the command.
pub fn run(args: &RecoverArgs) -> anyhow::Result<u8> {
    let settings: craton_agent::AgentConfig = config::load(&args.daemon, "node")?;
    let dir = settings.dir.join("coordinator");
    let me = settings.member;
    let before = survey(&dir).map_err(|e| problem(&e))?;
    let others: Vec<&MemberId> = before.config.members().filter(|m| **m != me).collect();
    output::line(known(&before, &me));
    if others.is_empty() {
        output::line(format!(
            "{me} is the only member already; nothing is to be done"
        ));
        return Ok(exit::OK);
    }
    if !args.yes && !confirmed(&me)? {
        return Ok(exit::FAILURE);
    }
    let now_ms = u64::try_from(Timestamp::now().as_millisecond()).unwrap_or(0);
    let after = stand_alone(&dir, &me, now_ms).map_err(|e| problem(&e))?;
    let removed: Vec<&str> = after.config.removed.iter().map(MemberId::as_str).collect();
    let next = if moved_to(&after.snapshot).is_some() {
        "Next: start its agent."
    } else {
        "Next: start its agent. It is not promoted by itself: this disk may be older than what the lost members\n\
         acknowledged, and cannot tell. `craton failover --allow-data-loss` says what is known, asks, and goes on."
    };
    output::line(format!(
        "{me} is the only voter now (epoch {}); removed: {}\n\
         {next}\n\
         Bring other members back by emptying their coordinator directory (not their data) and setting node.join.",
        after.config.epoch,
        removed.join(", "),
    ));
    Ok(exit::OK)
}

fn problem(error: &RecoverError) -> anyhow::Error {
    let hint = match error {
        RecoverError::Open(_) => "stop this member's agent first, and run this as its user",
        RecoverError::Refused(_) => "nothing was changed",
    };
    Problem::new(REFUSED, error.to_string(), hint).into()
}

/// What is known here: the operator compares it between the survivors, and takes the one that knows most.
fn known(survey: &Survey, me: &MemberId) -> String {
    let names = |all: Vec<&MemberId>| {
        let all: Vec<&str> = all.into_iter().map(MemberId::as_str).collect();
        if all.is_empty() {
            "none".to_owned()
        } else {
            all.join(", ")
        }
    };
    let leadership = survey.snapshot.get("leadership");
    let leadership = leadership.and_then(|v| serde_json::from_str::<Leadership>(&v.value).ok());
    let led = leadership.map_or_else(
        || "no leadership is known".to_owned(),
        |l| {
            let leader = l
                .leader
                .map_or_else(|| "nobody yet".to_owned(), |l| l.member.to_string());
            format!(
                "term {} led by {leader}, commits wait for {}",
                l.term, l.sync
            )
        },
    );
    let history = survey.snapshot.get("history");
    let history = history.and_then(|v| serde_json::from_str::<History>(&v.value).ok());
    let newest = history.and_then(|h| h.0.last().cloned());
    let newest = newest.map_or_else(String::new, |e| {
        let at = i64::try_from(e.at_ms).ok();
        let at = at.and_then(|ms| Timestamp::from_millisecond(ms).ok());
        let at = at.map_or_else(|| "an unknown time".to_owned(), |at| at.to_string());
        format!("\nthe newest line of its history is of {at}: {}", e.text)
    });
    let elsewhere = moved_to(&survey.snapshot).map_or_else(String::new, |place| {
        format!(
            "The records were moved to {place}, and do not need these voters: a leader is elected there. Recover only to add or remove members again, or to move the records back.\n"
        )
    });
    format!(
        "{elsewhere}on {me}'s disk: entry {} in Raft term {}; voters {} ({} needed); without a say: {}\n\
         {led}{newest}\n\
         Of several survivors, go on with the one whose Raft term, then entry, is greatest.",
        survey.last_index,
        survey.term,
        names(survey.config.voters.keys().collect()),
        survey.config.majority(),
        names(survey.config.learners.iter().collect()),
    )
}

fn confirmed(me: &MemberId) -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Err(Problem::new(
            USAGE,
            "the other voters are given up only when that is confirmed",
            "type --yes where nobody can be asked",
        )
        .into());
    }
    output::note(format!(
        "All others are given up. If they are not destroyed and find each other again, there are two clusters.\n\
         Type the name of the member that goes on ({me}):"
    ));
    let mut typed = String::new();
    std::io::stdin().read_line(&mut typed)?;
    let same = typed.trim() == me.as_str();
    if !same {
        output::note("that is another name; nothing was done");
    }
    Ok(same)
}
