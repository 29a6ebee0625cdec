//! One thing goes wrong at a time, and its check must find it.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may fail at any line"
)]

use std::path::PathBuf;

use craton_backup::views::BackupStatusView;
use craton_console::views::{
    ConfigRow, ConfigView, CoordinatorView, EndpointView, FenceView, GuaranteesView, HistoryEvent,
    HistoryView, PauseView, ReceiverView, SlotView, StatusView, WeakSettingView, WitnessView,
};
use craton_core::topology::MemberRole;
use craton_core::{MemberId, Term};
use serde_json::json;

use super::facts::{Asked, Door, Facts, Local};
use super::*;

const NOW_MS: u64 = 1_790_000_000_000;

fn member(name: &str, role: &str, host: &str) -> serde_json::Value {
    json!({
        "id": name, "role": role, "state": "fine", "host": host, "port": 5432, "api": format!("{host}:1"),
        "agent_alive": true, "heard_ms_ago": 10, "timeline": 1, "lsn": "0/5000000", "replay_lsn": null,
        "lag_bytes": 0, "streaming": role == "standby", "sync": role == "standby", "priority": 100,
        "incarnation": null
    })
}

fn status() -> StatusView {
    serde_json::from_value(json!({
        "cluster": "test", "answered_by": "a", "term": 1, "revision": 9, "leader": "a", "writable": true,
        "durability": "quorum", "sync": {"members": ["b", "c"], "acks": 1, "in_force": true},
        "lease": {"holder": "a", "remaining_ms": 1000, "ttl_ms": 2000, "heartbeat_ms": 300},
        "hold": false, "election": null, "next": "", "version": "1", "voters": ["a", "b", "c"],
        "members": [member("a", "leader", "h1"), member("b", "standby", "h2"), member("c", "standby", "h3")]
    }))
    .unwrap()
}

fn backup() -> BackupStatusView {
    serde_json::from_value(json!({
        "streaming_from": "a", "error": null, "timeline": 1, "flushed_lsn": "0/5000000", "lag_bytes": 0,
        "runs": {"requested": 1, "running": null, "last": null}, "backups": 2,
        "newest_ended_at": "2026-09-21T12:00:00Z", "missing_wal": [], "repository_bytes": 1
    }))
    .unwrap()
}

fn coordinator(member: &MemberId) -> CoordinatorView {
    CoordinatorView {
        member: member.clone(),
        backend: "embedded".into(),
        place: "embedded".into(),
        prefix: None,
        progress: None,
        trouble: None,
        endpoints: vec![],
    }
}

fn guarantees(member: &MemberId) -> GuaranteesView {
    GuaranteesView {
        member: member.clone(),
        settings: vec![],
        error: None,
        fence: FenceView {
            alive: true,
            memory_locked: true,
            hurried: true,
        },
    }
}

/// Every member answers that this is set: in the database, or in a file of its own.
fn set(f: &mut Facts, name: &str, value: &str, place: &str, shared: bool) {
    for agent in &mut f.agents {
        let view = agent.guarantees.as_mut().unwrap();
        view.settings.push(WeakSettingView {
            name: name.into(),
            value: value.into(),
            place: place.into(),
            shared,
        });
    }
}

/// The records are in an etcd with two endpoints; what each says to member `i`.
fn in_etcd(f: &mut Facts, i: usize, errors: [Option<&str>; 2]) {
    for agent in &mut f.agents {
        let view = agent.coordinator.as_mut().unwrap();
        view.backend = "etcd".into();
        view.place = "etcd at http://e1:1, http://e2:1".into();
    }
    let endpoints = ["e1:1", "e2:1"].iter().zip(errors);
    f.agents[i].coordinator.as_mut().unwrap().endpoints = endpoints
        .map(|(endpoint, error)| EndpointView {
            endpoint: (*endpoint).into(),
            ms: error.is_none().then_some(1),
            error: error.map(Into::into),
        })
        .collect();
}

/// A cluster in which nothing is wrong.
fn healthy() -> Facts {
    let status = status();
    let agents = status.members.iter().map(|m| Asked {
        api: m.api.clone(),
        status: Ok(StatusView {
            answered_by: m.id.clone(),
            ..status.clone()
        }),
        config: Some(ConfigView {
            revision: 1,
            member: Some(m.id.clone()),
            settings: vec![],
        }),
        coordinator: Some(coordinator(&m.id)),
        guarantees: Some(guarantees(&m.id)),
        ahead_ms: 20,
    });
    Facts {
        now_ms: NOW_MS,
        agents: agents.collect(),
        doors: status
            .members
            .iter()
            .map(|m| Door {
                member: m.id.clone(),
                address: "x:1".into(),
                open: true,
            })
            .collect(),
        history: HistoryView::default(),
        local: Some(Local {
            proxy: Some(("127.0.0.1:1".into(), true)),
            backup: Some(Ok(backup())),
            secrets: vec![(PathBuf::from("/s/token"), 0o600)],
            disk: Some((PathBuf::from("/d"), 50, 100)),
        }),
        status,
    }
}

fn witness(alive: bool) -> WitnessView {
    serde_json::from_value(json!({
        "name": "w", "address": "h4:1", "voter": true, "alive": alive, "heard_ms_ago": 10
    }))
    .unwrap()
}

fn receiver(alive: bool, sync: bool) -> ReceiverView {
    serde_json::from_value(json!({
        "name": "backup", "api": "h4:2", "heard_ms_ago": 10, "alive": alive, "timeline": 1, "lsn": "0/5000000",
        "lag_bytes": 0, "streams_from": "a", "sync": sync
    }))
    .unwrap()
}

#[test]
fn two_members_and_a_witness_are_three_voters() {
    let mut f = healthy();
    f.agents.truncate(2);
    f.status.voters[2] = witness(true).name;
    f.status.witnesses = vec![witness(true)];
    f.status.receivers = vec![receiver(true, true)];
    f.status.sync.members.push(MemberId::new("backup").unwrap());
    assert_eq!(examine(&f), []);
}

fn local(f: &mut Facts) -> &mut Local {
    f.local.as_mut().unwrap()
}

fn row(value: &str) -> ConfigRow {
    ConfigRow {
        name: "postgresql.work_mem".into(),
        value: value.into(),
        shared: false,
        ..ConfigRow::default()
    }
}

#[test]
fn nothing_is_wrong_with_a_healthy_cluster() {
    assert_eq!(examine(&healthy()), []);
    let mut decoding = healthy();
    decoding.status.slots = vec![slot(|_| ())];
    assert_eq!(examine(&decoding), []);
    assert_eq!(code(&[]), exit::OK);
}

/// One thing goes wrong: what is found, how bad it is, and a word that the text must say.
type Case = (&'static str, Severity, &'static str, fn(&mut Facts));

/// A logical slot that survives a failover to both standbys.
fn slot(change: fn(&mut SlotView)) -> SlotView {
    let id = |name| MemberId::new(name).unwrap();
    let mut slot = SlotView {
        name: "dbz".into(),
        database: "shop".into(),
        plugin: "pgoutput".into(),
        survives_on: vec![id("b"), id("c")],
        failover: None,
        lost: false,
    };
    change(&mut slot);
    slot
}

const CASES: &[Case] = &[
    ("slots", Severity::Warning, "failover to c", |f| {
        f.status.slots = vec![slot(|s| s.survives_on.truncate(1))];
    }),
    ("slots", Severity::Warning, "without failover", |f| {
        f.status.slots = vec![slot(|s| s.failover = Some(false))];
    }),
    ("slots", Severity::Critical, "did not survive", |f| {
        f.status.slots = vec![slot(|s| s.lost = true)];
    }),
    ("coordinator", Severity::Warning, "1 of 2 endpoints", |f| {
        in_etcd(f, 1, [None, Some("e2:1: refused")]);
    }),
    (
        "coordinator",
        Severity::Critical,
        "TLS: unknown issuer",
        |f| {
            in_etcd(f, 2, [Some("TLS: unknown issuer"); 2]);
        },
    ),
    ("coordinator", Severity::Critical, "the login", |f| {
        let view = f.agents[0].coordinator.as_mut().unwrap();
        view.trouble = Some("etcd refuses the login".into());
    }),
    ("coordinator", Severity::Warning, "on the way", |f| {
        f.agents[0].coordinator.as_mut().unwrap().progress = Some("on the way to x".into());
    }),
    ("coordinator", Severity::Warning, "embedded", |f| {
        in_etcd(f, 0, [None, None]);
        f.agents[1].coordinator = Some(coordinator(&MemberId::new("b").unwrap()));
    }),
    ("voters", Severity::Warning, "moved back", |f| {
        in_etcd(f, 0, [None, None]);
        for i in [1, 2] {
            f.agents[i].status = Err("away".into());
        }
    }),
    ("leader", Severity::Critical, "nobody leads", |f| {
        (f.status.leader, f.status.writable) = (None, false);
    }),
    ("leader", Severity::Critical, "not open", |f| {
        f.status.writable = false;
    }),
    ("election", Severity::Critical, "missing: c", |f| {
        f.status.election = serde_json::from_value(
            json!({"term": 2, "opened_by": null, "sealed": ["b"], "seals_needed": 2, "missing": ["c"]}),
        )
        .unwrap();
    }),
    ("election", Severity::Critical, "recovered", |f| {
        f.status.election = serde_json::from_value(
            json!({"term": 2, "opened_by": null, "sealed": ["b"], "seals_needed": 1, "missing": [], "recovered": true}),
        )
        .unwrap();
    }),
    ("agents", Severity::Warning, "does not answer", |f| {
        f.agents[2].status = Err("refused".into());
    }),
    ("voters", Severity::Warning, "if one more is lost", |f| {
        f.agents[2].status = Err("refused".into());
    }),
    ("voters", Severity::Critical, "1 of 3", |f| {
        f.agents[1].status = Err("refused".into());
        f.agents[2].status = Err("refused".into());
    }),
    ("voters", Severity::Warning, "2 of 2", |f| {
        f.status.voters.truncate(2);
    }),
    ("voters", Severity::Warning, "one voter", |f| {
        f.status.voters.truncate(1);
    }),
    (
        "witnesses",
        Severity::Warning,
        "not heard this witness",
        |f| {
            f.status.witnesses = vec![witness(false)];
        },
    ),
    ("voters", Severity::Warning, "2 of 3", |f| {
        f.status.voters[2] = witness(false).name;
        f.status.witnesses = vec![witness(false)];
    }),
    ("receivers", Severity::Warning, "does not answer", |f| {
        f.status.receivers = vec![receiver(false, false)];
    }),
    ("receivers", Severity::Warning, "not in the sync set", |f| {
        f.status.receivers = vec![receiver(true, false)];
    }),
    ("redundancy", Severity::Warning, "1 of 2 standbys", |f| {
        f.status.sync.members[1] = MemberId::new("backup").unwrap();
        f.status.members[2].streaming = false;
        f.status.receivers = vec![receiver(true, true)];
    }),
    (
        "libraries",
        Severity::Warning,
        "GEOS 3.12 (3.11 there)",
        |f| {
            for (m, version) in f.status.members.iter_mut().zip(["3.11", "3.12", "3.11"]) {
                m.libraries = [("geos".to_owned(), version.to_owned())].into();
            }
        },
    ),
    (
        "libraries",
        Severity::Note,
        "PostgreSQL 15.14 (15.13 there)",
        |f| {
            for (m, version) in f.status.members.iter_mut().zip(["15.13", "15.14", "15.13"]) {
                m.libraries = [("postgresql".to_owned(), version.to_owned())].into();
            }
        },
    ),
    ("members", Severity::Warning, "not heard", |f| {
        f.status.members[1].agent_alive = false;
    }),
    ("members", Severity::Warning, "is down", |f| {
        f.status.members[1].role = MemberRole::Down;
    }),
    ("members", Severity::Warning, "does not stream", |f| {
        f.status.members[1].streaming = false;
    }),
    ("lag", Severity::Warning, "100.0 MiB behind", |f| {
        f.status.members[1].lag_bytes = Some(100 << 20);
    }),
    ("redundancy", Severity::Critical, "alone", |f| {
        f.status.sync.members.clear();
        f.status.sync.acks = 0;
    }),
    ("redundancy", Severity::Warning, "1 of 2 standbys", |f| {
        drop(f.status.sync.members.pop());
        f.status.members[2].streaming = false;
    }),
    ("redundancy", Severity::Note, "2 standbys stream", |f| {
        drop(f.status.sync.members.pop());
    }),
    ("redundancy", Severity::Note, "async", |f| {
        f.status.durability = "async".into();
    }),
    ("redundancy", Severity::Warning, "one member", |f| {
        f.status.members.truncate(1);
    }),
    ("hosts", Severity::Note, "lost together", |f| {
        for m in &mut f.status.members {
            m.host = "h1".into();
        }
    }),
    (
        "pending_restart",
        Severity::Warning,
        "max_connections: 100 -> 200",
        |f| {
            f.status.members[0].pending_restart = vec!["max_connections: 100 -> 200".into()];
        },
    ),
    ("maintenance", Severity::Warning, "nobody takes over", |f| {
        f.status.paused = Some(PauseView {
            since: "then".into(),
            until: None,
            reason: None,
            by: "op".into(),
        });
    }),
    (
        "maintenance",
        Severity::Note,
        "a reinit is in progress",
        |f| {
            f.status.members[1].order = Some("reinit".into());
        },
    ),
    ("maintenance", Severity::Note, "left: b", |f| {
        f.status.restart =
            serde_json::from_value(json!({"id": 1, "by": "op", "left": ["b"], "under_way": []}))
                .unwrap();
    }),
    ("maintenance", Severity::Note, "scheduled", |f| {
        f.status.scheduled =
            serde_json::from_value(json!({"at": "then", "to": null, "by": "op"})).unwrap();
    }),
    ("versions", Severity::Warning, "2 on b", |f| {
        f.agents[1].status.as_mut().unwrap().version = "2".into();
    }),
    ("settings", Severity::Warning, "8MB on a", |f| {
        f.agents[0]
            .config
            .as_mut()
            .unwrap()
            .settings
            .push(row("8MB"));
    }),
    ("settings", Severity::Warning, "9MB on b", |f| {
        for (agent, value) in f.agents.iter_mut().zip(["8MB", "9MB", "8MB"]) {
            agent.config.as_mut().unwrap().settings.push(row(value));
        }
    }),
    (
        "guarantees",
        Severity::Warning,
        "looks like one that lasts",
        |f| set(f, "client_min_messages", "error", "role app", true),
    ),
    (
        "guarantees",
        Severity::Warning,
        "synchronous_commit = local",
        |f| set(f, "synchronous_commit", "local", "conf line 3", false),
    ),
    ("release", Severity::Warning, "PostgreSQL 15.12", |f| {
        for m in &mut f.status.members {
            m.libraries = [("postgresql".to_owned(), "15.12".to_owned())].into();
        }
    }),
    ("fence", Severity::Note, "swapped out", |f| {
        f.agents[0].guarantees.as_mut().unwrap().fence.memory_locked = false;
    }),
    ("fence", Severity::Note, "priority", |f| {
        f.agents[0].guarantees.as_mut().unwrap().fence.hurried = false;
    }),
    ("clocks", Severity::Warning, "3.00 s behind", |f| {
        f.agents[1].ahead_ms = -3000;
    }),
    ("failovers", Severity::Warning, "4 elections", |f| {
        let at = jiff::Timestamp::from_millisecond(i64::try_from(NOW_MS).unwrap() - 1000);
        f.history.events = (0..4)
            .map(|_| HistoryEvent {
                at: at.clone().unwrap().to_string(),
                term: Term(1),
                kind: "elected".into(),
                member: None,
                timeline: None,
                lsn: None,
                text: String::new(),
            })
            .collect();
    }),
    ("ports", Severity::Warning, "no connection", |f| {
        f.doors[1].open = false;
    }),
    ("proxy", Severity::Critical, "no connection", |f| {
        local(f).proxy.as_mut().unwrap().1 = false;
    }),
    ("backup", Severity::Warning, "does not answer", |f| {
        local(f).backup = Some(Err("refused".into()));
    }),
    ("backup", Severity::Warning, "no backup yet", |f| {
        let view = local(f).backup.as_mut().unwrap().as_mut().unwrap();
        (view.backups, view.newest_ended_at) = (0, None);
    }),
    ("backup", Severity::Warning, "h old", |f| {
        f.now_ms += 4 * 86_400_000;
    }),
    ("backup", Severity::Warning, "not received", |f| {
        let view = local(f).backup.as_mut().unwrap().as_mut().unwrap();
        (view.streaming_from, view.error) = (None, Some("no leader".into()));
    }),
    ("backup", Severity::Warning, "of WAL behind", |f| {
        local(f)
            .backup
            .as_mut()
            .unwrap()
            .as_mut()
            .unwrap()
            .lag_bytes = 1 << 30;
    }),
    ("secrets", Severity::Critical, "mode 644", |f| {
        local(f).secrets[0].1 = 0o644;
    }),
    ("disk", Severity::Warning, "are free", |f| {
        local(f).disk.as_mut().unwrap().1 = 10;
    }),
    ("disk", Severity::Critical, "are free", |f| {
        local(f).disk.as_mut().unwrap().1 = 4;
    }),
];

#[test]
fn each_check_finds_what_it_looks_for() {
    for (id, severity, word, break_it) in CASES {
        let mut facts = healthy();
        break_it(&mut facts);
        let findings = examine(&facts);
        let hit = findings
            .iter()
            .find(|f| f.id == *id && f.severity == *severity && f.what.contains(word));
        assert!(hit.is_some(), "{id} ({word}): {findings:#?}");
    }
    for check in CHECKS {
        assert!(
            CASES.iter().any(|c| c.0 == check.id),
            "no case for {}",
            check.id
        );
    }
}

#[test]
fn what_a_role_is_given_is_told_once_and_a_members_own_for_each() {
    let places = |f: &Facts| -> Vec<String> {
        let findings = examine(f).into_iter();
        findings
            .filter(|f| f.id == "guarantees")
            .map(|f| f.place)
            .collect()
    };
    let mut f = healthy();
    set(&mut f, "synchronous_commit", "local", "role app", true);
    assert_eq!(places(&f), ["role app"]);
    set(&mut f, "synchronous_commit", "OFF", "x line 1", false);
    assert_eq!(
        places(&f),
        ["a: x line 1", "b: x line 1", "c: x line 1", "role app"]
    );
    // Where no commit waits for a standby, only what does not wait for the own disk either is worth a word.
    f.status.durability = "async".into();
    set(&mut f, "client_min_messages", "error", "role app", true);
    assert_eq!(places(&f), ["a: x line 1", "b: x line 1", "c: x line 1"]);
}

#[test]
fn a_release_without_the_hole_is_left_alone() {
    for (version, found) in [
        ("13.20", true),
        ("13.21", false),
        ("14.17", true),
        ("15.13", false),
        ("16.8", true),
        ("17.4", true),
        ("17.5", false),
        ("18.0", false),
        ("19beta1", false),
        ("", false),
    ] {
        let mut f = healthy();
        for m in &mut f.status.members {
            m.libraries = [("postgresql".to_owned(), version.to_owned())].into();
        }
        assert_eq!(
            examine(&f).iter().any(|f| f.id == "release"),
            found,
            "{version}"
        );
    }
}

#[test]
fn a_member_that_is_down_is_not_also_unreachable() {
    let mut facts = healthy();
    facts.status.members[1].role = MemberRole::Down;
    facts.doors[1].open = false;
    let findings = examine(&facts);
    assert!(findings.iter().all(|f| f.id != "ports"), "{findings:?}");
}

#[test]
fn the_worst_comes_first_and_decides_the_exit_code() {
    let mut facts = healthy();
    facts.status.members[1].pending_restart = vec!["x: 1 -> 2".into()];
    assert_eq!(code(&examine(&facts)), exit::DOCTOR_WARNING);
    local(&mut facts).secrets[0].1 = 0o666;
    let findings = examine(&facts);
    assert_eq!(findings[0].id, "secrets");
    assert_eq!(code(&findings), exit::DOCTOR_CRITICAL);
    let note = MemberId::new("b").unwrap();
    facts = healthy();
    facts.status.members[1].order = Some("restart".into());
    assert_eq!(facts.status.members[1].id, note);
    assert_eq!(
        code(&examine(&facts)),
        exit::OK,
        "a note is no reason to wake anybody"
    );
}

#[test]
fn only_voters_are_counted_as_such() {
    let mut facts = healthy();
    // A standby without a say does not answer: the three voters do, one of them a witness.
    facts.status.voters[2] = witness(true).name;
    facts.agents[2].status = Err("refused".into());
    facts.status.witnesses.push(witness(true));
    let voters = |f: &Facts| examine(f).into_iter().filter(|f| f.id == "voters").count();
    assert_eq!(voters(&facts), 0);
    facts.status.witnesses[0].alive = false;
    assert_eq!(voters(&facts), 1);
    facts.status.voters.clear();
    assert_eq!(voters(&facts), 0, "there are none with an etcd");
}
