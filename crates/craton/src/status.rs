//! `craton status`: the cluster as its agents see it.

use std::time::Duration;

use craton_console::views::{ReceiverView, StatusView, WitnessView};
use craton_core::topology::MemberRole;

use crate::access::Access;
use crate::cli::StatusArgs;
use crate::output::{self, Colour, cell, paint, plain};

/// How often `--watch` looks.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Moves to the top left and clears what is below.
const HOME_AND_CLEAR: &str = "\x1b[H\x1b[J";

/// Under an election in records that an operator recovered.
const RECOVERED: &str = "the records were recovered from one member's disk and may be old: nobody is promoted before `craton failover --allow-data-loss`";

/// Runs the command.
pub async fn run(access: &Access, args: &StatusArgs, json: bool) -> anyhow::Result<u8> {
    if !args.watch {
        let view = access.status().await?;
        if json {
            output::json(&view)?;
        } else {
            output::line(render(&view));
        }
        return Ok(crate::exit::OK);
    }
    loop {
        let looked = access.status().await;
        match (looked, json) {
            (Ok(view), true) => output::line(serde_json::to_string(&view)?),
            (Ok(view), false) => output::line(format!("{HOME_AND_CLEAR}{}", render(&view))),
            (Err(error), true) => return Err(error),
            (Err(error), false) => output::line(format!("{HOME_AND_CLEAR}{error:#}")),
        }
        tokio::select! {
            () = tokio::time::sleep(WATCH_EVERY) => {}
            _ = tokio::signal::ctrl_c() => return Ok(crate::exit::OK),
        }
    }
}

/// The whole page.
pub fn render(view: &StatusView) -> String {
    let mut lines = vec![
        headline(view),
        protection(view),
        String::new(),
        members(view),
    ];
    lines.extend(slots(view));
    lines.extend(records(view));
    lines.extend(maintenance(view));
    if let Some(election) = &view.election {
        let names = |members: &[craton_core::MemberId]| {
            if members.is_empty() {
                "none".to_owned()
            } else {
                join(members)
            }
        };
        lines.push(format!(
            "\n{} for term {}: sealed {} of {} needed ({}); missing: {}",
            paint(Colour::Yellow, "election"),
            election.term,
            election.sealed.len(),
            election.seals_needed,
            names(&election.sealed),
            names(&election.missing),
        ));
        if election.recovered {
            lines.push(RECOVERED.to_owned());
        }
    }
    if !view.next.is_empty() {
        lines.push(format!("\n{} {}", paint(Colour::Dim, "next:"), view.next));
    }
    for warning in &view.warnings {
        lines.push(format!("{} {warning}", paint(Colour::Yellow, "warning:")));
    }
    lines.join("\n")
}

/// Which logical replication slots a failover leaves.
fn slots(view: &StatusView) -> Vec<String> {
    let there = view.slots.iter().filter(|s| !s.lost);
    there
        .map(|s| {
            let to = if s.survives_on.is_empty() {
                paint(Colour::Yellow, "would not survive a failover")
            } else {
                format!("survives a failover to {}", join(&s.survives_on))
            };
            let slot = paint(Colour::Dim, "slot");
            format!("{slot} {} ({}, {})  {to}", s.name, s.database, s.plugin)
        })
        .collect()
}

/// Where the records are, if they are not where they usually are.
fn records(view: &StatusView) -> Option<String> {
    let elsewhere = !view.coordinator.is_empty() && view.coordinator != "embedded";
    elsewhere.then(|| {
        format!(
            "\n{} in {}",
            paint(Colour::Dim, "records"),
            view.coordinator
        )
    })
}

/// Pause, schedule, restart.
fn maintenance(view: &StatusView) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(p) = &view.paused {
        let until = p
            .until
            .as_ref()
            .map_or_else(|| "craton resume".to_owned(), Clone::clone);
        let why = p
            .reason
            .as_ref()
            .map(|r| format!(": {r}"))
            .unwrap_or_default();
        lines.push(format!(
            "\n{} by {} since {} until {until}{why}",
            paint(Colour::Yellow, "paused"),
            p.by,
            p.since
        ));
    }
    if let Some(s) = &view.scheduled {
        let to =
            s.to.as_ref()
                .map(|t| format!(" to {t}"))
                .unwrap_or_default();
        lines.push(format!(
            "\n{} a switchover{to} at {}, asked by {}",
            paint(Colour::Cyan, "scheduled"),
            s.at,
            s.by
        ));
    }
    if let Some(r) = &view.restart {
        lines.push(format!(
            "\n{} asked by {}; left: {}",
            paint(Colour::Yellow, "rolling restart"),
            r.by,
            join(&r.left)
        ));
    }
    lines
}

fn headline(view: &StatusView) -> String {
    let state = match (&view.leader, view.writable, view.hold) {
        (_, true, true) => paint(Colour::Yellow, "switching over"),
        (_, true, false) => paint(Colour::Green, "writable"),
        (Some(_), false, _) => paint(Colour::Yellow, "not writable"),
        (None, false, _) => paint(Colour::Red, "no leader"),
    };
    let leader = view
        .leader
        .as_ref()
        .map_or_else(|| "none".to_owned(), ToString::to_string);
    format!(
        "{} {}  {state}  leader {}  term {}",
        paint(Colour::Dim, "cluster"),
        paint(Colour::Bold, &view.cluster),
        paint(Colour::Cyan, &leader),
        view.term,
    )
}

fn protection(view: &StatusView) -> String {
    let sync = if view.sync.members.is_empty() {
        match view.durability.as_str() {
            "strict" => paint(Colour::Yellow, "no standby is there: writes wait"),
            "async" => "commits wait for no standby".to_owned(),
            _ => paint(Colour::Yellow, "no standby protects commits now"),
        }
    } else if view.sync.acks == 0 {
        "commits wait for no standby".to_owned()
    } else {
        let state = if view.sync.in_force {
            String::new()
        } else {
            paint(Colour::Yellow, " (not in force yet)")
        };
        format!(
            "commits wait for {} of {}{state}",
            view.sync.acks,
            join(&view.sync.members)
        )
    };
    let lease = match (&view.lease.holder, view.lease.remaining_ms) {
        (Some(holder), Some(ms)) => {
            format!("lease {holder}, {ms} of {} ms left", view.lease.ttl_ms)
        }
        (Some(holder), None) => format!("lease {holder}, {} ms", view.lease.ttl_ms),
        (None, _) => paint(Colour::Yellow, "lease free"),
    };
    let voters = match view.voters.as_slice() {
        [] => String::new(),
        voters => format!("  voters {}", join(voters)),
    };
    format!(
        "{} {}  {sync}  {lease}{voters}",
        paint(Colour::Dim, "durability"),
        view.durability
    )
}

fn join(members: &[craton_core::MemberId]) -> String {
    members
        .iter()
        .map(craton_core::MemberId::as_str)
        .collect::<Vec<_>>()
        .join(", ")
}

/// The table of members.
pub fn members(view: &StatusView) -> String {
    let mut table = output::table(&[
        "MEMBER", "ROLE", "STATE", "TIMELINE", "WAL", "LAG", "SYNC", "ADDRESS",
    ]);
    for member in &view.members {
        let role = match member.role {
            MemberRole::Leader => cell(Colour::Green, "leader"),
            MemberRole::Standby => plain("standby"),
            MemberRole::Transition => cell(Colour::Yellow, "changing"),
            MemberRole::Down => cell(Colour::Red, "down"),
        };
        let state = if member.agent_alive {
            plain(&member.state)
        } else {
            let since = member.heard_ms_ago.map(|ms| {
                format!(
                    ", heard {} ago",
                    output::duration(Duration::from_millis(ms))
                )
            });
            cell(
                Colour::Red,
                format!("agent silent{}", since.unwrap_or_default()),
            )
        };
        let or_dash = |text: Option<String>| plain(text.unwrap_or_else(|| "-".to_owned()));
        table.add_row(vec![
            cell(Colour::Cyan, member.id.as_str()),
            role,
            state,
            or_dash(member.timeline.map(|t| t.to_string())),
            or_dash(member.lsn.map(|l| l.to_string())),
            or_dash(member.lag_bytes.map(output::bytes)),
            plain(if member.sync { "yes" } else { "-" }),
            plain(format!("{}:{}", member.host, member.port)),
        ]);
    }
    for receiver in &view.receivers {
        table.add_row(receiver_row(receiver));
    }
    for witness in &view.witnesses {
        table.add_row(witness_row(witness));
    }
    output::table_text(&table)
}

fn witness_row(witness: &WitnessView) -> Vec<comfy_table::Cell> {
    let state = match (witness.alive, witness.voter) {
        (false, _) => cell(Colour::Red, "silent"),
        (true, true) => plain("votes"),
        (true, false) => cell(Colour::Yellow, "has no say"),
    };
    let mut row = vec![
        cell(Colour::Cyan, witness.name.as_str()),
        plain("witness"),
        state,
    ];
    row.extend((0..4).map(|_| plain("-")));
    row.push(plain(witness.address.as_deref().unwrap_or("-")));
    row
}

fn receiver_row(receiver: &ReceiverView) -> Vec<comfy_table::Cell> {
    let or_dash = |text: Option<String>| plain(text.unwrap_or_else(|| "-".to_owned()));
    let state = match (&receiver.streams_from, receiver.alive) {
        (_, false) => cell(Colour::Red, "silent"),
        (Some(from), true) => plain(format!("receives from {from}")),
        (None, true) => cell(Colour::Yellow, "receives from nobody"),
    };
    vec![
        cell(Colour::Cyan, receiver.name.as_str()),
        plain("backup"),
        state,
        or_dash(receiver.timeline.map(|t| t.to_string())),
        or_dash(receiver.lsn.map(|l| l.to_string())),
        or_dash(receiver.lag_bytes.map(output::bytes)),
        plain(if receiver.sync { "yes" } else { "-" }),
        plain(&receiver.api),
    ]
}
