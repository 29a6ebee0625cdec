//! `craton switchover` and `craton failover`: changes of leadership that somebody asks for.

use std::time::Duration;

use clap::Args;
use craton_console::views::{
    ChangeView, DoneView, FailoverRequest, MemberView, StatusView, SwitchoverRequest,
};
use craton_core::{Lsn, MemberId};
use jiff::civil::{DateTime, Time};
use jiff::{SignedDuration, Timestamp, Zoned};
use serde::Serialize;

use crate::access::Access;
use crate::ask::{self, who};
use crate::exit::{self, Problem};
use crate::maintenance;
use crate::output::{self, Colour, paint};

/// The longest a change may take before the command stops waiting (the cluster goes on by itself): a little longer than
/// the agent waits, which knows why it takes so long.
pub const CHANGE_TIMEOUT: Duration = Duration::from_secs(75);

/// `craton switchover`
#[derive(Args, Debug)]
pub struct SwitchoverArgs {
    /// The member that is to lead [default: the one that is furthest]
    #[arg(long, value_name = "MEMBER")]
    pub to: Option<MemberId>,
    /// Not now but then: 23:30, "2026-12-01 02:00" (local time), 2026-12-01T02:00:00Z, +10min
    #[arg(long, value_name = "TIME")]
    pub at: Option<String>,
    /// Take back the switchover that is scheduled
    #[arg(long, conflicts_with_all = ["to", "at"])]
    pub cancel: bool,
}

/// `craton failover`
#[derive(Args, Debug)]
pub struct FailoverArgs {
    /// The member that is to lead [default: the one that is furthest]
    #[arg(long, value_name = "MEMBER")]
    pub to: Option<MemberId>,
    /// Go on even where acknowledged commits may be lost; says first what is known of them, and asks
    #[arg(long)]
    pub allow_data_loss: bool,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

/// Runs `craton switchover`.
pub async fn switchover(access: &Access, args: SwitchoverArgs, json: bool) -> anyhow::Result<u8> {
    if args.cancel {
        return maintenance::cancel_switchover(access, json).await;
    }
    let Some(at) = &args.at else {
        return report(&ask_switchover(access, args.to).await?, json);
    };
    let at = instant(at, &Zoned::now())?;
    let request = SwitchoverRequest {
        to: args.to,
        by: Some(who()),
        at_ms: u64::try_from(at.as_millisecond()).ok(),
    };
    let done: DoneView = ask(access, "/v1/switchover", &request).await?;
    if json {
        output::json(&done)?;
    } else {
        output::line(&done.text);
    }
    Ok(exit::OK)
}

/// A time to come, as people write it; without a date the next time that the clock shows it.
fn instant(text: &str, now: &Zoned) -> anyhow::Result<Timestamp> {
    let text = text.trim();
    let wrong = || {
        Problem::new(
            exit::USAGE,
            format!("\"{text}\" is not a time"),
            "write 23:30, \"2026-12-01 02:00\", 2026-12-01T02:00:00Z or +10min",
        )
    };
    if let Some(length) = text.strip_prefix('+') {
        let length: SignedDuration = length.trim().parse().map_err(|_| wrong())?;
        return Ok(now.timestamp().checked_add(length).map_err(|_| wrong())?);
    }
    if let Ok(at) = text.parse::<Timestamp>() {
        return Ok(at);
    }
    let zone = now.time_zone().clone();
    if text.len() <= "23:30:00".len()
        && let Ok(time) = text.parse::<Time>()
    {
        let today = now.date().to_datetime(time).to_zoned(zone.clone())?;
        if today > *now {
            return Ok(today.timestamp());
        }
        let tomorrow = now.date().tomorrow()?.to_datetime(time);
        return Ok(tomorrow.to_zoned(zone)?.timestamp());
    }
    let at = text.parse::<DateTime>().map_err(|_| wrong())?;
    Ok(at.to_zoned(zone)?.timestamp())
}

/// Asks the leader to hand over, and waits until it has.
pub async fn ask_switchover(access: &Access, to: Option<MemberId>) -> anyhow::Result<ChangeView> {
    let request = SwitchoverRequest {
        to,
        by: Some(who()),
        at_ms: None,
    };
    ask(access, "/v1/switchover", &request).await
}

/// Runs `craton failover`.
pub async fn failover(access: &Access, args: FailoverArgs, json: bool) -> anyhow::Result<u8> {
    if args.allow_data_loss {
        let status = access.widest_status().await?;
        for line in at_stake(&status) {
            output::note(line);
        }
        let mut what =
            "acknowledged commits that only missing members have are given up for good".to_owned();
        if goes_on(&status) {
            what.push_str(
                ", and so is what a former leader that is only cut off may acknowledge from now on",
            );
        }
        ask::must_be_meant(args.yes, &what)?;
    }
    let request = FailoverRequest {
        to: args.to,
        allow_data_loss: args.allow_data_loss,
        by: Some(who()),
    };
    report(&ask(access, "/v1/failover", &request).await?, json)
}

/// What would be lost, as far as it is known: who is missing, and what each was last heard to have.
fn at_stake(status: &StatusView) -> Vec<String> {
    let mut lines = Vec::new();
    match (&status.leader, &status.election) {
        (Some(leader), _) if status.writable => {
            lines.push(format!("{leader} leads term {}", status.term));
        }
        (Some(leader), _) => lines.push(format!(
            "{leader} leads term {} and is not open",
            status.term
        )),
        (None, Some(e)) => lines.push(format!(
            "nobody leads; the election of term {} has {} of {} seals",
            e.term,
            e.sealed.len(),
            e.seals_needed
        )),
        (None, None) => lines.push(format!("nobody leads term {}", status.term)),
    }
    if status.election.as_ref().is_some_and(|e| e.recovered) {
        lines.push("the records were recovered from one member's disk: what others acknowledged since they were written is not known here, and may be lost".into());
    }
    lines.extend(unconfirmed(status));
    let here: Vec<&MemberView> = status.members.iter().filter(|m| m.agent_alive).collect();
    let best = here
        .iter()
        .filter_map(|m| Some((m.lsn?, m)))
        .max_by_key(|(lsn, _)| *lsn);
    match best {
        Some((lsn, m)) => lines.push(format!(
            "{} has the most of what is here: WAL up to {lsn}",
            m.id
        )),
        None => lines.push("nothing is known of the WAL of any member that is here".into()),
    }
    let best = best.map_or(Lsn::ZERO, |(lsn, _)| lsn);
    for m in status.members.iter().filter(|m| !m.agent_alive) {
        lines.push(missing(m, best));
    }
    lines
}

fn leader_is_here(status: &StatusView) -> bool {
    let mut here = status.members.iter().filter(|m| m.agent_alive);
    here.any(|m| status.leader.as_ref() == Some(&m.id))
}

/// The members of the synchronous set that have not confirmed that they follow no earlier leader any more.
fn without_seal(status: &StatusView) -> &[MemberId] {
    match &status.election {
        // Among the others that have sealed is the former leader: it takes no more writes.
        Some(e)
            if status.durability != "async"
                && e.sealed.iter().any(|m| !status.sync.members.contains(m)) =>
        {
            &[]
        }
        Some(e) => &e.missing,
        // It is here, and will hear of it.
        None if leader_is_here(status) => &[],
        None => &status.sync.members,
    }
}

/// True where a former leader that is cut off could go on: with those that have not sealed it has as many copies and
/// promises as it needs. One that was alone goes by its lease, which is over soon.
fn goes_on(status: &StatusView) -> bool {
    let needed = match status.sync.acks as usize {
        0 => status.sync.members.len(),
        acks => acks,
    };
    let left = without_seal(status).len();
    left > 0 && left >= needed
}

fn unconfirmed(status: &StatusView) -> Vec<String> {
    let left: Vec<&str> = without_seal(status).iter().map(MemberId::as_str).collect();
    if left.is_empty() {
        return Vec::new();
    }
    let next = match &status.election {
        Some(e) => e.term.0,
        None => status.term.0.saturating_add(1),
    };
    let names = left.join(", ");
    let mut lines = vec![format!(
        "not confirmed, of the synchronous set, to follow no leader before term {next}: {names}"
    )];
    if goes_on(status) {
        lines.push(format!(
            "a leader before term {next} that is cut off together with {names} may go on and acknowledge writes until it or they hear of term {next}: two servers would take writes. Switch it off first, if you can"
        ));
    }
    lines
}

fn missing(m: &MemberView, best: Lsn) -> String {
    let ago = m
        .heard_ms_ago
        .map(|ms| output::duration(Duration::from_millis(ms)));
    match (m.last_heard_lsn, ago) {
        (Some(lsn), Some(ago)) if lsn > best => format!(
            "{} is missing: last heard {ago} ago, with WAL up to {lsn}: {} that nobody here has, and whatever came after",
            m.id,
            output::bytes(lsn.bytes_since(best))
        ),
        (Some(lsn), Some(ago)) => format!(
            "{} is missing: last heard {ago} ago, with WAL up to {lsn}, which is here too; what came after is not known",
            m.id
        ),
        _ => format!("{} is missing, and nothing is known of its WAL", m.id),
    }
}

/// Asks the leader's agent first: it need not pass the request on.
async fn ask<T: serde::de::DeserializeOwned>(
    access: &Access,
    path: &str,
    request: &impl Serialize,
) -> anyhow::Result<T> {
    let status = access.status().await?;
    let first = ask::leader_api(&status);
    access
        .post(first.as_deref(), path, request, CHANGE_TIMEOUT)
        .await
}

fn report(view: &ChangeView, json: bool) -> anyhow::Result<u8> {
    if json {
        output::json(view)?;
    } else {
        let took = output::duration(Duration::from_millis(view.took_ms));
        let leader = paint(Colour::Cyan, view.leader.as_str());
        output::line(format!(
            "{leader} leads in term {} (took {took})",
            view.term
        ));
        if !view.text.is_empty() {
            output::line(&view.text);
        }
    }
    Ok(exit::OK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_people_write_them() {
        let now: Zoned = "2026-11-26T22:00:00+00:00[UTC]".parse().unwrap();
        for (text, expected) in [
            ("23:30", "2026-11-26T23:30:00Z"),
            ("21:59", "2026-11-27T21:59:00Z"),
            ("22:00:30", "2026-11-26T22:00:30Z"),
            ("2026-12-01 02:00", "2026-12-01T02:00:00Z"),
            ("2026-12-01T02:00:00+02:00", "2026-12-01T00:00:00Z"),
            ("+10min", "2026-11-26T22:10:00Z"),
        ] {
            let at = instant(text, &now).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(at, expected.parse::<Timestamp>().unwrap(), "{text}");
        }
        for wrong in ["", "tonight", "+", "25:00"] {
            assert!(instant(wrong, &now).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_at_stake_is_said() {
        let member = |name: &str, alive: bool, lsn: Option<&str>| {
            serde_json::json!({
                "id": name, "role": "standby", "state": "", "host": "h", "port": 1, "api": "h:2",
                "agent_alive": alive, "heard_ms_ago": 34_000, "timeline": null,
                "lsn": if alive { lsn } else { None }, "last_heard_lsn": lsn, "replay_lsn": null,
                "lag_bytes": null, "streaming": false, "sync": true, "priority": 100, "incarnation": null
            })
        };
        let status: StatusView = serde_json::from_value(serde_json::json!({
            "cluster": "t", "answered_by": "b", "term": 5, "revision": 1, "leader": null, "writable": false,
            "durability": "quorum", "sync": {"members": ["b", "c"], "acks": 1, "in_force": false},
            "lease": {"holder": null, "remaining_ms": null, "ttl_ms": 2000, "heartbeat_ms": 300},
            "hold": false, "next": "",
            "election": {"term": 5, "opened_by": null, "sealed": ["b"], "seals_needed": 2, "missing": ["c"]},
            "members": [member("a", false, Some("0/7000000")), member("b", true, Some("0/6000000")),
                        member("c", false, Some("0/5000000")), member("d", false, None)]
        }))
        .unwrap();
        assert_eq!(
            at_stake(&status),
            [
                "nobody leads; the election of term 5 has 1 of 2 seals",
                "not confirmed, of the synchronous set, to follow no leader before term 5: c",
                "a leader before term 5 that is cut off together with c may go on and acknowledge writes until it or they hear of term 5: two servers would take writes. Switch it off first, if you can",
                "b has the most of what is here: WAL up to 0/6000000",
                "a is missing: last heard 34.00 s ago, with WAL up to 0/7000000: 16.0 MiB that nobody here has, and whatever came after",
                "c is missing: last heard 34.00 s ago, with WAL up to 0/5000000, which is here too; what came after is not known",
                "d is missing, and nothing is known of its WAL",
            ]
        );
        let mut recovered = status.clone();
        recovered.election.as_mut().unwrap().recovered = true;
        let said = at_stake(&recovered);
        assert!(
            said[1].contains("recovered from one member's disk"),
            "{said:?}"
        );
        a_former_leader_that_may_go_on(status);
    }

    fn a_former_leader_that_may_go_on(mut status: StatusView) {
        let id = |m| MemberId::new(m).unwrap();
        assert!(goes_on(&status));
        // It waits for two, and one has sealed.
        status.sync.acks = 2;
        assert!(!goes_on(&status));
        assert_eq!(unconfirmed(&status).len(), 1, "c is named all the same");
        status.sync.acks = 1;
        // In `async` it would need the promise of everybody.
        (status.sync.acks, status.durability) = (0, "async".into());
        assert!(!goes_on(&status));
        (status.sync.acks, status.durability) = (1, "quorum".into());
        // The former leader itself has sealed.
        status.election.as_mut().unwrap().sealed.push(id("a"));
        assert!(!goes_on(&status) && unconfirmed(&status).is_empty());
        // No election is open yet: nobody has confirmed anything.
        (status.election, status.leader) = (None, Some(id("a")));
        assert!(goes_on(&status));
        assert!(unconfirmed(&status)[0].ends_with("term 6: b, c"));
        status.leader = Some(id("b"));
        assert!(
            !goes_on(&status) && unconfirmed(&status).is_empty(),
            "it hears"
        );
        status.leader = Some(id("a"));
        // It was alone.
        (status.sync.acks, status.sync.members) = (0, vec![]);
        assert!(!goes_on(&status) && unconfirmed(&status).is_empty());
    }
}
