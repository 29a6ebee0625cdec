//! The checks: pure functions of the facts, each with its own name.

use std::collections::{BTreeMap, BTreeSet};

use craton_console::views::{MemberView, ReceiverView};
use craton_core::MemberId;
use craton_core::libraries::differences;
use craton_core::topology::MemberRole;

use super::facts::Facts;
use super::{Finding, Severity, guarantees, slots, store};
use crate::output;

/// A check.
pub struct Check {
    /// Its name, for machines.
    pub id: &'static str,
    /// What it looks for.
    pub about: &'static str,
    /// Looks for it.
    pub run: fn(&Facts) -> Vec<Finding>,
}

const fn check(id: &'static str, about: &'static str, run: fn(&Facts) -> Vec<Finding>) -> Check {
    Check { id, about, run }
}

/// All of them.
pub const CHECKS: &[Check] = &[
    check(
        "leader",
        "a leader that is open for clients, or why there is none",
        leader,
    ),
    check(
        "election",
        "an election that cannot be won, and whose seal it needs",
        election,
    ),
    check("agents", "agents that do not answer from here", agents),
    check(
        "voters",
        "how many voters can be lost before nobody can lead",
        voters,
    ),
    check("witnesses", "witnesses that are silent", witnesses),
    check(
        "coordinator",
        "a store of the records that cannot be reached, or is not the same for all",
        store::coordinator,
    ),
    check("members", "members that are down or do not stream", members),
    check("lag", "standbys that are far behind", lag),
    check(
        "redundancy",
        "acknowledged commits that are on fewer copies than they could be",
        redundancy,
    ),
    check(
        "receivers",
        "backup daemons that are synchronous copies and do not count",
        receivers,
    ),
    check(
        "slots",
        "logical replication slots that would not survive a failover, or did not",
        slots::slots,
    ),
    check("hosts", "members that would be lost together", hosts),
    check(
        "pending_restart",
        "parameters that wait for a restart",
        pending_restart,
    ),
    check(
        "maintenance",
        "a pause, a restart or an order in progress",
        maintenance,
    ),
    check("versions", "members of different versions", versions),
    check(
        "libraries",
        "members whose libraries sort text or compute geometry differently",
        libraries,
    ),
    check("settings", "settings that differ between members", settings),
    check(
        "guarantees",
        "settings of servers, roles and databases that give up what is promised of commits",
        guarantees::guarantees,
    ),
    check(
        "release",
        "minor releases of PostgreSQL with a hole in synchronous replication",
        guarantees::release,
    ),
    check(
        "fence",
        "fences that may be late on a busy host",
        guarantees::fence,
    ),
    check(
        "clocks",
        "wall clocks that differ: history, schedules and restores to a time go by them",
        clocks,
    ),
    check("failovers", "leaderships that do not last", failovers),
    check(
        "ports",
        "PostgreSQL servers that cannot be reached from here",
        ports,
    ),
    check("proxy", "the local cluster's proxy", proxy),
    check("backup", "backups: none, old, or WAL missing", backup),
    check("secrets", "secrets that others can read", secrets),
    check("disk", "a file system that fills up", disk),
];

/// A standby further behind than this is worth a word, bytes.
const LAG_MAX: u64 = 64 << 20;
/// Clocks may differ by so much, milliseconds.
const CLOCK_MAX_MS: i64 = 500;
/// More elections than this within [`FLAPPING_MS`] are too many.
const FLAPPING: usize = 3;
/// See [`FLAPPING`], milliseconds.
const FLAPPING_MS: u64 = 3_600_000;
/// A backup older than this is old, milliseconds.
const BACKUP_AGE_MAX_MS: i64 = 2 * 86_400_000;
/// The backup may be so far behind the leader, bytes.
const BACKUP_LAG_MAX: u64 = 64 << 20;

pub(super) fn found(
    id: &'static str,
    severity: Severity,
    place: impl Into<String>,
    what: impl Into<String>,
    todo: impl Into<String>,
) -> Finding {
    Finding {
        id,
        severity,
        place: place.into(),
        what: what.into(),
        todo: todo.into(),
    }
}

fn leads(f: &Facts, m: &MemberView) -> bool {
    f.status.leader.as_ref() == Some(&m.id)
}

fn leader(f: &Facts) -> Vec<Finding> {
    let s = &f.status;
    if s.writable && s.leader.is_some() {
        return vec![];
    }
    let what = match &s.leader {
        Some(leader) => format!(
            "{leader} leads term {} and is not open for clients yet",
            s.term
        ),
        None => format!("nobody leads term {}: clients cannot write", s.term),
    };
    vec![found(
        "leader",
        Severity::Critical,
        "cluster",
        what,
        "craton explain of each member says what it waits for",
    )]
}

fn election(f: &Facts) -> Vec<Finding> {
    let Some(e) = &f.status.election else {
        return vec![];
    };
    if e.recovered {
        let what = format!(
            "the election of term {} stands on records that an operator recovered: they may be older than what the lost members acknowledged, so nobody is promoted by itself",
            e.term
        );
        return vec![found(
            "election",
            Severity::Critical,
            "cluster",
            what,
            "craton failover --allow-data-loss says what is known, and goes on with what is here",
        )];
    }
    if e.sealed.len() >= e.seals_needed as usize {
        return vec![];
    }
    let missing: Vec<&str> = e.missing.iter().map(MemberId::as_str).collect();
    let what = format!(
        "the election of term {} has {} of {} seals; missing: {}",
        e.term,
        e.sealed.len(),
        e.seals_needed,
        missing.join(", ")
    );
    vec![found(
        "election",
        Severity::Critical,
        "cluster",
        what,
        "bring one of the missing members back; only if they are lost for good: craton failover --allow-data-loss",
    )]
}

fn agents(f: &Facts) -> Vec<Finding> {
    f.agents
        .iter()
        .filter_map(|a| {
            let error = a.status.as_ref().err()?;
            Some(found("agents", Severity::Warning, &a.api, format!("its agent does not answer: {error}"), "start it: the service of craton node on that host, or craton up for a local cluster"))
        })
        .collect()
}

/// A voter lives if its agent answers here; a witness if the others have heard it.
fn voters(f: &Facts) -> Vec<Finding> {
    let voters = &f.status.voters;
    if voters.is_empty() {
        return vec![];
    }
    let answers = |voter: &&MemberId| {
        let mut asked = f.agents.iter().filter_map(|a| a.status.as_ref().ok());
        let mut witnesses = f.status.witnesses.iter();
        asked.any(|s| s.answered_by == **voter) || witnesses.any(|w| w.name == **voter && w.alive)
    };
    let all = voters.len();
    let alive = voters.iter().filter(answers).count();
    let majority = all / 2 + 1;
    let todo = "three voters survive the loss of one, five of two; a witness can be the third";
    if store::is_etcd(f) {
        return store::voters(alive, majority, all);
    }
    if alive < majority {
        let what = format!(
            "{alive} of {all} voters answer, and a majority needs {majority}: nobody can become or stay leader for long"
        );
        return vec![found(
            "voters",
            Severity::Critical,
            "cluster",
            what,
            "bring voters back until a majority answers",
        )];
    }
    if alive == majority && all > 1 {
        let what = format!("{alive} of {all} voters answer: if one more is lost, nobody can lead");
        let todo = if alive < all {
            "bring the silent ones back"
        } else {
            todo
        };
        return vec![found("voters", Severity::Warning, "cluster", what, todo)];
    }
    if all == 1 {
        return vec![found(
            "voters",
            Severity::Warning,
            "cluster",
            "there is one voter: if its host is lost, so is the cluster",
            todo,
        )];
    }
    vec![]
}

fn witnesses(f: &Facts) -> Vec<Finding> {
    f.status
        .witnesses
        .iter()
        .filter(|w| !w.alive)
        .map(|w| {
            let (what, todo) = (
                "the members have not heard this witness: one loss less is survived",
                "start it: craton witness on its host; or take it out: craton member remove",
            );
            found("witnesses", Severity::Warning, w.name.as_str(), what, todo)
        })
        .collect()
}

/// One that is gone costs nothing but the copy.
fn receivers(f: &Facts) -> Vec<Finding> {
    let what = |r: &ReceiverView| match (r.alive, r.sync) {
        (false, _) => Some("it does not answer, so no commit waits for it"),
        (true, false) if f.status.durability != "async" => {
            Some("it is not in the sync set: no commit waits for it")
        }
        _ => None,
    };
    let todo = "see the backup daemon's log; to do without it: backup.synchronous = false, then craton member remove";
    f.status
        .receivers
        .iter()
        .filter_map(|r| Some((r, what(r)?)))
        .map(|(r, what)| found("receivers", Severity::Warning, r.name.as_str(), what, todo))
        .collect()
}

fn members(f: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for m in &f.status.members {
        if !m.agent_alive {
            let since = m.heard_ms_ago.map(|ms| {
                format!(
                    " for {}",
                    output::duration(std::time::Duration::from_millis(ms))
                )
            });
            let what = format!("the others have not heard it{}", since.unwrap_or_default());
            findings.push(found(
                "members",
                Severity::Warning,
                m.id.as_str(),
                what,
                "look at its host and network",
            ));
        } else if m.role == MemberRole::Down {
            findings.push(found(
                "members",
                Severity::Warning,
                m.id.as_str(),
                format!("its PostgreSQL is down: {}", m.state),
                format!("craton explain {}", m.id),
            ));
        } else if !leads(f, m) && !m.streaming {
            findings.push(found(
                "members",
                Severity::Warning,
                m.id.as_str(),
                format!("it does not stream: {}", m.state),
                format!("craton explain {}", m.id),
            ));
        }
    }
    findings
}

fn lag(f: &Facts) -> Vec<Finding> {
    let behind = f
        .status
        .members
        .iter()
        .filter_map(|m| Some((m, m.lag_bytes.filter(|l| *l > LAG_MAX)?)));
    behind
        .map(|(m, lag)| {
            let what = format!("it is {} behind the leader", output::bytes(lag));
            found(
                "lag",
                Severity::Warning,
                m.id.as_str(),
                what,
                "look at its disk and network; reads there are old by as much",
            )
        })
        .collect()
}

fn redundancy(f: &Facts) -> Vec<Finding> {
    let s = &f.status;
    let standbys = s.members.iter().filter(|m| !leads(f, m)).count();
    if s.durability == "async" {
        return vec![found(
            "redundancy",
            Severity::Note,
            "cluster",
            "durability is async: a failover may lose what no standby has received yet",
            "craton config set durability=quorum, if that must not be",
        )];
    }
    if !s.writable {
        return vec![];
    }
    if standbys == 0 {
        return vec![found(
            "redundancy",
            Severity::Warning,
            "cluster",
            "there is one member: its disk holds the only copy",
            "add members",
        )];
    }
    if s.sync.acks == 0 || s.sync.members.is_empty() {
        return vec![found(
            "redundancy",
            Severity::Critical,
            "cluster",
            "the leader is alone: commits are on no other member, and if it fails nobody is promoted",
            "bring a standby back; craton status shows what each one does",
        )];
    }
    let streaming = s
        .members
        .iter()
        .filter(|m| m.streaming && !leads(f, m))
        .count();
    let copies = s.receivers.iter().filter(|r| r.sync).count();
    let counted = s.sync.members.len().saturating_sub(copies);
    if counted < streaming {
        let what = format!("{streaming} standbys stream and {counted} are in the sync set");
        return vec![found(
            "redundancy",
            Severity::Note,
            "cluster",
            what,
            "a standby enters when it has caught up; if it stays out, craton explain says why",
        )];
    }
    if counted < standbys {
        let what = format!("{counted} of {standbys} standbys are in the sync set");
        return vec![found(
            "redundancy",
            Severity::Warning,
            "cluster",
            what,
            "bring the others back: the next failure may leave the leader alone",
        )];
    }
    vec![]
}

fn hosts(f: &Facts) -> Vec<Finding> {
    let hosts: BTreeSet<&str> = f.status.members.iter().map(|m| m.host.as_str()).collect();
    let only = hosts
        .first()
        .filter(|_| hosts.len() == 1 && f.status.members.len() > 1);
    match only {
        Some(host) => {
            let what = format!("all members run on {host}: they are lost together");
            vec![found(
                "hosts",
                Severity::Note,
                "cluster",
                what,
                "good for a try; put members on hosts of their own for anything that matters",
            )]
        }
        None => vec![],
    }
}

fn pending_restart(f: &Facts) -> Vec<Finding> {
    let waiting = f
        .status
        .members
        .iter()
        .filter(|m| !m.pending_restart.is_empty());
    waiting
        .map(|m| {
            let what = format!("waits for a restart: {}", m.pending_restart.join(", "));
            found(
                "pending_restart",
                Severity::Warning,
                m.id.as_str(),
                what,
                "craton restart --all --pending",
            )
        })
        .collect()
}

fn maintenance(f: &Facts) -> Vec<Finding> {
    let s = &f.status;
    let mut findings = Vec::new();
    if let Some(p) = &s.paused {
        let until = p
            .until
            .as_ref()
            .map_or_else(|| "somebody resumes".to_owned(), Clone::clone);
        let what = format!(
            "paused by {} since {} until {until}: nobody takes over if the leader fails",
            p.by, p.since
        );
        findings.push(found(
            "maintenance",
            Severity::Warning,
            "cluster",
            what,
            "craton resume",
        ));
    }
    if let Some(r) = &s.restart {
        let left: Vec<&str> = r.left.iter().map(MemberId::as_str).collect();
        let what = format!(
            "a restart asked by {} is in progress; left: {}",
            r.by,
            left.join(", ")
        );
        findings.push(found(
            "maintenance",
            Severity::Note,
            "cluster",
            what,
            "craton restart --cancel stops it",
        ));
    }
    if let Some(at) = &s.scheduled {
        findings.push(found(
            "maintenance",
            Severity::Note,
            "cluster",
            format!("a switchover is scheduled for {} by {}", at.at, at.by),
            "craton switchover --cancel takes it back",
        ));
    }
    for m in &s.members {
        if let Some(order) = &m.order {
            findings.push(found(
                "maintenance",
                Severity::Note,
                m.id.as_str(),
                format!("a {order} is in progress: {}", m.state),
                format!("craton explain {}", m.id),
            ));
        }
    }
    findings
}

fn versions(f: &Facts) -> Vec<Finding> {
    let mut by_version: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for s in f.agents.iter().filter_map(|a| a.status.as_ref().ok()) {
        by_version
            .entry(&s.version)
            .or_default()
            .push(s.answered_by.as_str());
    }
    if by_version.len() < 2 {
        return vec![];
    }
    let list: Vec<String> = by_version
        .iter()
        .map(|(v, m)| format!("{v} on {}", m.join(", ")))
        .collect();
    vec![found(
        "versions",
        Severity::Warning,
        "cluster",
        format!("agents of different versions: {}", list.join("; ")),
        "finish the upgrade: restart the agents that are behind",
    )]
}

/// PostgreSQL's own minor version changes member by member in every upgrade; that alone is worth a note.
fn libraries(f: &Facts) -> Vec<Finding> {
    let Some(leader) = f.status.members.iter().find(|m| leads(f, m)) else {
        return vec![];
    };
    let mut findings = Vec::new();
    for m in &f.status.members {
        let list = differences(&m.libraries, &leader.libraries);
        if list.is_empty() {
            continue;
        }
        let what = format!("differs from {}: {}", leader.id, list.join("; "));
        let only_postgresql =
            list.len() == 1 && m.libraries.get("postgresql") != leader.libraries.get("postgresql");
        let (severity, todo) = if only_postgresql {
            (Severity::Note, "finish the upgrade, member by member")
        } else {
            (
                Severity::Warning,
                "an index on text or geometry that one wrote may be read wrongly by the other: bring the packages to the same versions, craton restart the member, and REINDEX where collations changed",
            )
        };
        findings.push(found("libraries", severity, m.id.as_str(), what, todo));
    }
    findings
}

fn settings(f: &Facts) -> Vec<Finding> {
    let mut values: BTreeMap<&str, BTreeMap<&str, Vec<&str>>> = BTreeMap::new();
    let configs: Vec<_> = f.agents.iter().filter_map(|a| a.config.as_ref()).collect();
    for config in &configs {
        let member = config.member.as_ref().map_or("?", MemberId::as_str);
        for row in config.settings.iter().filter(|r| !r.shared) {
            values
                .entry(&row.name)
                .or_default()
                .entry(&row.value)
                .or_default()
                .push(member);
        }
    }
    let differ = values
        .iter()
        .filter(|(_, by)| by.len() > 1 || by.values().map(Vec::len).sum::<usize>() < configs.len());
    differ
        .map(|(name, by)| {
            let list: Vec<String> = by.iter().map(|(v, m)| format!("{v} on {}", m.join(", "))).collect();
            let what = format!("{name} differs between members: {}", list.join("; "));
            found("settings", Severity::Warning, "cluster", what, format!("after a failover the new leader has its own: take it out of [node.postgresql] and craton config set {name}=…"))
        })
        .collect()
}

fn clocks(f: &Facts) -> Vec<Finding> {
    let off = f.agents.iter().filter(|a| a.ahead_ms.abs() > CLOCK_MAX_MS);
    off.map(|a| {
        let way = if a.ahead_ms > 0 { "ahead of" } else { "behind" };
        let by = output::duration(std::time::Duration::from_millis(a.ahead_ms.unsigned_abs()));
        found("clocks", Severity::Warning, &a.api, format!("its wall clock is {by} {way} this machine's"), "run an NTP client there; leases do not depend on it, the history and restores to a time do")
    })
    .collect()
}

fn failovers(f: &Facts) -> Vec<Finding> {
    let since = f.now_ms.saturating_sub(FLAPPING_MS);
    let recent = f
        .history
        .events
        .iter()
        .filter(|e| e.kind == "elected")
        .filter_map(|e| e.at.parse::<jiff::Timestamp>().ok())
        .filter(|at| u64::try_from(at.as_millisecond()).is_ok_and(|ms| ms >= since))
        .count();
    if recent <= FLAPPING {
        return vec![];
    }
    vec![found(
        "failovers",
        Severity::Warning,
        "cluster",
        format!("{recent} elections within the last hour"),
        "craton history says why each began; a slow network wants a longer ttl_ms",
    )]
}

fn ports(f: &Facts) -> Vec<Finding> {
    let closed = f.doors.iter().filter(|d| !d.open);
    closed
        .filter(|d| {
            // One that is down is another check's.
            let member = f.status.members.iter().find(|m| m.id == d.member);
            member.is_some_and(|m| m.agent_alive && m.role != MemberRole::Down)
        })
        .map(|d| {
            found(
                "ports",
                Severity::Warning,
                d.member.as_str(),
                format!(
                    "its PostgreSQL runs, but {} takes no connection from here",
                    d.address
                ),
                "look at firewalls, node.listen_addresses and node.host",
            )
        })
        .collect()
}

fn proxy(f: &Facts) -> Vec<Finding> {
    match f.local.as_ref().and_then(|l| l.proxy.as_ref()) {
        Some((address, false)) => vec![found(
            "proxy",
            Severity::Critical,
            address,
            "the proxy takes no connection: clients cannot reach the cluster through it",
            "craton up starts it again; its log is in log/proxy.log",
        )],
        _ => vec![],
    }
}

fn backup(f: &Facts) -> Vec<Finding> {
    let Some(backup) = f.local.as_ref().and_then(|l| l.backup.as_ref()) else {
        return vec![];
    };
    let say = |severity, what: String, todo: &str| found("backup", severity, "backup", what, todo);
    let view = match backup {
        Err(error) => {
            return vec![say(
                Severity::Warning,
                format!("the backup daemon does not answer: {error}"),
                "craton up starts it again; its log is in log/backup.log",
            )];
        }
        Ok(view) => view,
    };
    let mut findings = Vec::new();
    if view.backups == 0 {
        findings.push(say(
            Severity::Warning,
            "there is no backup yet".into(),
            "craton backup run",
        ));
    }
    if let Some(ended) = view.newest_ended_at {
        let now = i64::try_from(f.now_ms).unwrap_or(i64::MAX);
        let age = now.saturating_sub(ended.as_millisecond());
        if age > BACKUP_AGE_MAX_MS {
            findings.push(say(
                Severity::Warning,
                format!("the newest backup is {} h old", age / 3_600_000),
                "craton backup run; a restore replays all WAL since it",
            ));
        }
    }
    if let Some(error) = view
        .error
        .as_ref()
        .filter(|_| view.streaming_from.is_none())
    {
        findings.push(say(
            Severity::Warning,
            format!("WAL is not received: {error}"),
            "craton backup status",
        ));
    } else if view.lag_bytes > BACKUP_LAG_MAX {
        findings.push(say(
            Severity::Warning,
            format!(
                "the backup is {} of WAL behind",
                output::bytes(view.lag_bytes)
            ),
            "look at its disk and network",
        ));
    }
    if !view.missing_wal.is_empty() {
        findings.push(say(
            Severity::Critical,
            format!(
                "WAL is missing in {} places since the oldest backup",
                view.missing_wal.len()
            ),
            "take a new base backup: craton backup run",
        ));
    }
    findings
}

fn secrets(f: &Facts) -> Vec<Finding> {
    let files = f.local.iter().flat_map(|l| &l.secrets);
    files
        .filter(|(_, mode)| mode & 0o077 != 0)
        .map(|(path, mode)| {
            let path = path.display().to_string();
            found(
                "secrets",
                Severity::Critical,
                path.clone(),
                format!("others can read or write this secret (mode {mode:03o})"),
                format!("chmod 600 {path}, and make a new one if strangers had access"),
            )
        })
        .collect()
}

fn disk(f: &Facts) -> Vec<Finding> {
    let Some((path, free, all)) = f.local.as_ref().and_then(|l| l.disk.as_ref()) else {
        return vec![];
    };
    let severity = match free.saturating_mul(100).checked_div(*all) {
        Some(0..5) => Severity::Critical,
        Some(5..15) => Severity::Warning,
        _ => return vec![],
    };
    let what = format!(
        "{} of {} are free",
        output::bytes(*free),
        output::bytes(*all)
    );
    vec![found(
        "disk",
        severity,
        path.display().to_string(),
        what,
        "make room: a full disk stops PostgreSQL",
    )]
}
