//! Work on a cluster that stays up, as an operator does it: one cluster, many steps.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use craton::layout::Layout;
use craton::processes;
use serde_json::Value;

#[path = "harness/mod.rs"]
mod harness;
#[path = "harness/rig.rs"]
mod rig;

use harness::{Cluster, signal, text, whole};
use rig::Frozen;

const LIMIT: Duration = Duration::from_secs(90);

/// A client that writes a row after the other through the proxy, and ends at its first error.
struct Writer(Child);

impl Writer {
    fn start(c: &Cluster) -> Self {
        c.sql(&[
            "-c",
            "CREATE TABLE IF NOT EXISTS ticks (n serial, at timestamptz DEFAULT now())",
        ]);
        let mut child = Command::new(env!("CARGO_BIN_EXE_craton"))
            .arg("--dir")
            .arg(&c.dir)
            .args(["psql", "-qv", "ON_ERROR_STOP=1"])
            .env_remove("CRATON_DIR")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let script = b"INSERT INTO ticks DEFAULT VALUES \\watch 0.05\n";
        child.stdin.take().unwrap().write_all(script).unwrap();
        c.wait("a first row", LIMIT, || {
            let rows = c.sql(&["-Atc", "SELECT count(*) FROM ticks"]);
            (rows != "0").then_some(()).ok_or(rows)
        });
        Self(child)
    }

    /// It saw no error until now, and rows have come in.
    fn unharmed(mut self, c: &Cluster, what: &str) {
        if let Some(status) = self.0.try_wait().unwrap() {
            let out = self.0.wait_with_output().unwrap();
            panic!(
                "{what}: a client saw an error ({status}): {}\n{}",
                String::from_utf8_lossy(&out.stderr),
                c.logs()
            );
        }
        self.0.kill().unwrap();
        self.0.wait().unwrap();
        let rows: u64 = c
            .sql(&["-Atc", "SELECT count(*) FROM ticks"])
            .parse()
            .unwrap();
        assert!(rows > 0, "{what}: the writer wrote nothing");
        c.sql(&["-c", "TRUNCATE ticks"]);
    }
}

fn leader(status: &Value) -> String {
    status["leader"].as_str().unwrap_or_default().to_owned()
}

fn member<'a>(status: &'a Value, name: &str) -> &'a Value {
    let members = status["members"].as_array().unwrap();
    members.iter().find(|m| m["id"] == name).unwrap()
}

fn pending(status: &Value) -> usize {
    let members = status["members"].as_array().unwrap();
    members
        .iter()
        .filter(|m| {
            m["pending_restart"]
                .as_array()
                .is_some_and(|p| !p.is_empty())
        })
        .count()
}

fn history(c: &Cluster, kind: &str) -> Vec<String> {
    let events = c.json(&["history"]);
    let events = events["events"].as_array().unwrap().clone();
    events
        .iter()
        .filter(|e| e["kind"] == kind)
        .map(|e| e["text"].as_str().unwrap().to_owned())
        .collect()
}

fn refused(c: &Cluster, args: &[&str], code: i32, says: &str) {
    let out = c.craton(args);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {}", text(&out));
    assert!(text(&out).contains(says), "{args:?}: {}", text(&out));
}

#[test]
fn an_operators_day() {
    let c = Cluster::up("ops", &["--no-sample"]);
    c.wait_status("a whole cluster", LIMIT, whole);
    settings(&c);
    rolling_restart_raises(&c);
    rolling_restart_lowers(&c);
    reload_and_restart_one(&c);
    restart_cancelled(&c);
    pause_and_resume(&c);
    scheduled_switchover(&c);
    reinit(&c);
    doctor(&c);
    stuck_election(&c);
}

fn settings(c: &Cluster) {
    let before = c.json(&["config", "show"]);
    for (args, says) in [
        (&["config", "set", "ttl_ms=1"][..], "500 to 600000 ms"),
        (&["config", "set", "heartbeat_ms=1s"], "a third of the ttl"),
        (&["config", "set", "postgresql.port=1"], "craton.toml"),
        (
            &["config", "set", "postgresql.synchronous_standby_names="],
            "set durability",
        ),
        (&["config", "set", "postgresql.work_mem=1"], "out of range"),
        (
            &["config", "set", "postgresql.log_timezone=Mars"],
            "invalid value",
        ),
        (
            &["config", "set", "postgresql.wrok_mem=8MB"],
            "no parameter of that name",
        ),
        (
            &[
                "config",
                "set",
                "postgresql.shared_preload_libraries=nosuch",
            ],
            "there is no library nosuch",
        ),
        (
            &["config", "set", "ttl_ms=3s", "--revision", "999999"],
            "were changed since",
        ),
    ] {
        refused(c, args, 4, says);
    }
    assert_eq!(
        c.json(&["config", "show"]),
        before,
        "something was written all the same"
    );
    // In force everywhere without a restart.
    let out = c.craton(&["config", "set", "postgresql.work_mem=7MB", "ttl_ms=3s"]);
    c.expect_ok(&out, "config set");
    c.wait_status("the new ttl", LIMIT, |s| {
        s["lease"]["ttl_ms"] == 3000 && whole(s)
    });
    for read in [
        &["-Atc", "SHOW work_mem"][..],
        &["--read", "-Atc", "SHOW work_mem"],
    ] {
        let deadline = Instant::now() + LIMIT;
        while c.sql(read) != "7MB" {
            assert!(
                Instant::now() < deadline,
                "work_mem does not arrive: {read:?}\n{}",
                c.logs()
            );
        }
    }
    let out = c.craton(&["config", "unset", "ttl_ms", "postgresql.work_mem"]);
    c.expect_ok(&out, "config unset");
    c.wait_status("the old ttl", LIMIT, |s| s["lease"]["ttl_ms"] == 2000);
    let shown = text(&c.craton(&["config", "show", "--origin"]));
    assert!(
        shown.contains("coordinator (revision") && shown.contains("default"),
        "{shown}"
    );
    assert!(
        history(c, "config")
            .iter()
            .any(|t| t.contains("ttl_ms: 2000 -> 3000") && t.contains('@'))
    );
}

fn rolling_restart_raises(c: &Cluster) {
    let out = c.craton(&["config", "set", "postgresql.max_connections=120"]);
    c.expect_ok(&out, "config set max_connections");
    assert!(text(&out).contains("after a restart"), "{}", text(&out));
    let before = c.wait_status("three members that wait for a restart", LIMIT, |s| {
        pending(s) == 3
    });
    let writer = Writer::start(c);
    let out = c.craton(&["restart", "--all", "--pending"]);
    c.expect_ok(&out, "restart --all --pending");
    println!("{}", text(&out));
    writer.unharmed(c, "rolling restart");
    let after = c.wait_status("nobody waits any more", LIMIT, |s| {
        pending(s) == 0 && whole(s)
    });
    assert_ne!(
        leader(&after),
        leader(&before),
        "the leader comes last, after a switchover"
    );
    assert_eq!(c.sql(&["-Atc", "SHOW max_connections"]), "120");
    assert_eq!(c.sql(&["--read", "-Atc", "SHOW max_connections"]), "120");
    let out = c.craton(&["restart", "--all", "--pending"]);
    assert!(text(&out).contains("nothing waits"), "{}", text(&out));
    refused(c, &["restart", "--cancel"], 4, "no restart is in progress");
}

/// A standby does not start with less than its primary has: the leader goes first, and in place.
fn rolling_restart_lowers(c: &Cluster) {
    let out = c.craton(&["config", "set", "postgresql.max_connections=90"]);
    c.expect_ok(&out, "config set max_connections");
    let before = c.wait_status("three members that wait for a restart", LIMIT, |s| {
        pending(s) == 3
    });
    let writer = Writer::start(c);
    let out = c.craton(&["restart", "--all"]);
    c.expect_ok(&out, "restart --all");
    println!("{}", text(&out));
    writer.unharmed(c, "rolling restart with less");
    let after = c.wait_status("nobody waits any more", LIMIT, |s| {
        pending(s) == 0 && whole(s)
    });
    assert_eq!(after["term"], before["term"], "in place: the term goes on");
    assert_eq!(c.sql(&["-Atc", "SHOW max_connections"]), "90");
    assert_eq!(c.sql(&["--read", "-Atc", "SHOW max_connections"]), "90");
}

fn postmaster(c: &Cluster, name: &str) -> String {
    let file = c.dir.join("members").join(name).join("data/postmaster.pid");
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}

fn reload_and_restart_one(c: &Cluster) {
    let loaded = || c.sql(&["-Atc", "SELECT pg_conf_load_time()"]);
    let before = loaded();
    let out = c.craton(&["reload", "--all"]);
    c.expect_ok(&out, "reload --all");
    let deadline = Instant::now() + LIMIT;
    while loaded() == before {
        assert!(Instant::now() < deadline, "nothing was read anew");
    }
    refused(c, &["reload", "zz"], 2, "there is no member");

    let status = c.wait_status("a whole cluster", LIMIT, whole);
    let old = leader(&status);
    let members = ["a", "b", "c"];
    let lives = members.map(|m| postmaster(c, m));
    let one = *members.iter().find(|m| **m != old).unwrap();
    let writer = Writer::start(c);
    let out = c.craton(&["restart", one]);
    c.expect_ok(&out, "restart of one");
    println!("{}", text(&out));
    writer.unharmed(c, "restart of a standby");
    for (m, life) in members.iter().zip(&lives) {
        assert_eq!(postmaster(c, m) != *life, *m == one, "{m}");
    }
}

/// The leader comes last: what is cancelled while a standby is waited for does not come to it.
fn restart_cancelled(c: &Cluster) {
    let status = c.wait_status("a whole cluster", LIMIT, whole);
    let old = leader(&status);
    let life = postmaster(c, &old);
    // Standbys go in the order of their names.
    let last = ["c", "b", "a"].into_iter().find(|m| *m != old).unwrap();
    let layout = Layout::require(&c.dir).unwrap();
    let agent = processes::running(&layout, &format!("node-{last}")).expect("an agent");
    let out = c.craton(&["restart", "--all", "--no-wait"]);
    let frozen = Frozen::new(vec![agent]);
    c.expect_ok(&out, "restart --all --no-wait");
    refused(c, &["restart", "--all"], 4, "restart --cancel");
    let out = c.craton(&["restart", "--cancel"]);
    drop(frozen);
    c.expect_ok(&out, "restart --cancel");
    println!("{}", text(&out));
    let after = c.wait_status("a whole cluster after a cancelled restart", LIMIT, |s| {
        let members = s["members"].as_array().map_or(&[][..], Vec::as_slice);
        whole(s) && s["restart"].is_null() && members.iter().all(|m| m["order"].is_null())
    });
    assert_eq!(leader(&after), old);
    assert_eq!(postmaster(c, &old), life);
    let told = history(c, "cancelled");
    assert!(told.iter().any(|t| t.contains("restart")), "{told:?}");
}

fn kill_postgres(c: &Cluster, name: &str) {
    let pid = std::fs::read_to_string(c.dir.join("members").join(name).join("data/postmaster.pid"))
        .unwrap();
    let pid = pid.lines().next().unwrap().to_owned();
    assert!(
        Command::new("kill")
            .args(["-9", &pid])
            .status()
            .unwrap()
            .success()
    );
}

fn pause_and_resume(c: &Cluster) {
    let before = c.json(&["status"]);
    let out = c.craton(&["pause", "--for", "1h", "--reason", "new switches"]);
    c.expect_ok(&out, "pause");
    // Every agent knows of it when the command returns, or is named by it: one that did not would take over from a
    // PostgreSQL that is stopped right after it.
    let told = text(&out);
    for name in ["a", "b", "c"] {
        let named = told.contains(&format!("the agent of {name} has not said"));
        let explained = c.wait("what it knows of the pause", LIMIT, || {
            let out = c.craton(&["explain", name]);
            let explained = text(&out);
            let there = out.status.success();
            let there = there && (!named || explained.contains("maintenance since"));
            if there { Ok(explained) } else { Err(explained) }
        });
        assert!(explained.contains("maintenance since"), "{explained}");
    }
    let paused = c.json(&["status"]);
    assert_eq!(paused["paused"]["reason"], "new switches", "{paused}");
    assert!(
        paused["next"]
            .as_str()
            .unwrap()
            .contains("nobody takes over"),
        "{paused}"
    );
    let old = leader(&before);
    kill_postgres(c, &old);
    c.wait_status("PostgreSQL stays down", LIMIT, |s| {
        member(s, &old)["role"] == "down"
    });
    // Far longer than it takes without a pause; the condition must hold all the time.
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        let s = c.json(&["status"]);
        assert_eq!(s["term"], before["term"], "somebody took over: {s}");
        assert_eq!(member(&s, &old)["role"], "down", "it was started: {s}");
    }
    let explained = text(&c.craton(&["explain", &old]));
    assert!(explained.contains("craton resume"), "{explained}");
    let out = c.craton(&["resume"]);
    c.expect_ok(&out, "resume");
    c.wait_status("a whole cluster after the pause", LIMIT, whole);
    refused(c, &["resume"], 4, "not paused");
    // A switchover that is asked for goes on in a pause, and the former leader comes back.
    let out = c.craton(&["pause"]);
    c.expect_ok(&out, "pause");
    let out = c.craton(&["switchover"]);
    c.expect_ok(&out, "switchover in a pause");
    c.wait_status("a whole cluster in a pause", LIMIT, |s| {
        whole(s) && s["paused"].is_object()
    });
    let out = c.craton(&["resume"]);
    c.expect_ok(&out, "resume");
}

fn scheduled_switchover(c: &Cluster) {
    refused(
        c,
        &["switchover", "--at", "2001-01-01 00:00"],
        4,
        "not within the next 60 days",
    );
    refused(
        c,
        &["switchover", "--cancel"],
        4,
        "no switchover is scheduled",
    );
    let out = c.craton(&["switchover", "--at", "+1h"]);
    c.expect_ok(&out, "switchover --at");
    assert!(c.json(&["status"])["scheduled"].is_object());
    let out = c.craton(&["switchover", "--cancel"]);
    c.expect_ok(&out, "switchover --cancel");
    let before = c.wait_status("nothing scheduled", LIMIT, |s| {
        s["scheduled"].is_null() && whole(s)
    });
    let to = before["members"]
        .as_array()
        .unwrap()
        .iter()
        .find(|m| m["id"] != before["leader"])
        .unwrap();
    let to = to["id"].as_str().unwrap();
    let writer = Writer::start(c);
    // It is refused when it comes to the cluster after its time.
    let out = c.craton(&["switchover", "--to", to, "--at", "+10s"]);
    c.expect_ok(&out, "switchover --at +10s");
    c.wait_status("the scheduled leader", LIMIT, |s| {
        leader(s) == to && whole(s)
    });
    writer.unharmed(c, "scheduled switchover");
    assert!(
        history(c, "election")
            .iter()
            .any(|t| t.contains("(scheduled)"))
    );
}

fn reinit(c: &Cluster) {
    let before = c.wait_status("a whole cluster", LIMIT, whole);
    refused(
        c,
        &["reinit", &leader(&before), "--yes"],
        4,
        "hand over first",
    );
    refused(c, &["reinit", "zz", "--yes"], 2, "there is no member");
    let members = before["members"].as_array().unwrap();
    let standby = members
        .iter()
        .find(|m| m["id"] != before["leader"])
        .unwrap();
    let name = standby["id"].as_str().unwrap();
    refused(c, &["reinit", name], 2, "--yes");
    // Both are needed for k = 2: neither copy may go.
    let out = c.craton(&["config", "set", "sync_standbys=2"]);
    c.expect_ok(&out, "config set sync_standbys=2");
    c.wait_status("two copies", LIMIT, |s| s["sync"]["acks"] == 2);
    refused(c, &["reinit", name, "--yes"], 4, "is needed");
    let out = c.craton(&["config", "unset", "sync_standbys"]);
    c.expect_ok(&out, "config unset sync_standbys");
    c.wait_status("one copy", LIMIT, |s| s["sync"]["acks"] == 1 && whole(s));
    let writer = Writer::start(c);
    let out = c.craton(&["reinit", name, "--yes"]);
    c.expect_ok(&out, "reinit");
    println!("{}", text(&out));
    writer.unharmed(c, "reinit");
    let after = c.wait_status("a whole cluster after reinit", LIMIT, whole);
    assert_ne!(
        member(&after, name)["incarnation"],
        standby["incarnation"],
        "it is another life"
    );
}

/// Waits until the doctor ends with this code, and with such findings: to a busy machine an agent may look silent.
fn wait_report(c: &Cluster, code: i32, met: impl Fn(&[&str]) -> bool) {
    c.wait("the doctor's report", LIMIT, || {
        let out = c.craton(&["--json", "doctor"]);
        let report: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
        let findings = report["findings"].as_array();
        let findings = findings.map_or(&[][..], Vec::as_slice);
        let ids: Vec<&str> = findings.iter().filter_map(|f| f["id"].as_str()).collect();
        let there = out.status.code() == Some(code) && met(&ids);
        there.then_some(()).ok_or_else(|| text(&out))
    });
}

fn doctor(c: &Cluster) {
    c.wait_status("a whole cluster", LIMIT, whole);
    c.wait("the doctor reaches everybody", LIMIT, || {
        let said = text(&c.craton(&["doctor"]));
        let all = !said.contains("does not answer");
        all.then_some(()).ok_or(said)
    });
    let token = c.dir.join("secrets/api-token");
    let mode = |m: u32| {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(&token, std::fs::Permissions::from_mode(m)).unwrap();
    };
    mode(0o644);
    wait_report(c, 10, |ids| ids.first().is_some_and(|id| *id == "secrets"));
    mode(0o600);
    let out = c.craton(&["pause"]);
    c.expect_ok(&out, "pause");
    c.sql(&[
        "-c",
        "ALTER ROLE CURRENT_USER SET synchronous_commit = local",
    ]);
    wait_report(c, 9, |ids| {
        let all = ["maintenance", "hosts", "guarantees"];
        all.iter().all(|id| ids.contains(id))
    });
    c.sql(&["-c", "ALTER ROLE CURRENT_USER RESET synchronous_commit"]);
    let out = c.craton(&["resume"]);
    c.expect_ok(&out, "resume");
}

/// Two of three members are gone at once: nobody may be promoted, and there is one way out.
fn stuck_election(c: &Cluster) {
    // A standby that stands still for a moment stays in the sync set: the other one must not win alone.
    let out = c.craton(&["config", "set", "standby_grace_ms=30000"]);
    c.expect_ok(&out, "config set standby_grace_ms=30000");
    let before = c.wait_status("a whole cluster", LIMIT, whole);
    let members = before["members"].as_array().unwrap();
    let mut standbys = members
        .iter()
        .filter(|m| m["id"] != before["leader"])
        .map(|m| m["id"].as_str().unwrap());
    let (kept, lost) = (standbys.next().unwrap(), standbys.next().unwrap());
    let out = c.craton(&["--json", "failover", "--allow-data-loss"]);
    assert_eq!(
        out.status.code(),
        Some(2),
        "without a terminal it must be meant: {}",
        text(&out)
    );
    // Both data directories are lost for good; the agents live, so that there is a majority of voters. The leader
    // goes first: nobody is left to take the other one out of the sync set.
    let old = leader(&before);
    let out = c.craton(&["pause"]);
    c.expect_ok(&out, "pause");
    for name in [&old, lost] {
        // Before it dies: a standby would be started again at once.
        let pid = postmaster(c, name);
        std::fs::rename(
            c.dir.join("members").join(name).join("data"),
            c.dir.with_extension(format!("lost-{name}")),
        )
        .unwrap();
        signal(pid.parse().unwrap(), "KILL");
        c.wait_status("it is down", LIMIT, |s| member(s, name)["role"] == "down");
    }
    let out = c.craton(&["resume"]);
    c.expect_ok(&out, "resume");
    let asked = Instant::now();
    let stuck = c.wait_status("an election that nobody wins", LIMIT, |s| {
        s["leader"].is_null()
            && s["election"]["sealed"]
                .as_array()
                .is_some_and(|v| v.len() == 1)
    });
    assert!(stuck["election"]["seals_needed"] == 2, "{stuck}");
    while asked.elapsed() < Duration::from_secs(6) {
        assert!(
            c.json(&["status"])["leader"].is_null(),
            "somebody was promoted without the others' seals"
        );
    }
    let explained = text(&c.craton(&["explain", kept]));
    println!("{explained}");
    assert!(explained.contains("no_winner"), "{explained}");
    let out = c.craton(&["doctor"]);
    println!("{}", text(&out));
    assert_eq!(out.status.code(), Some(10), "{}", text(&out));
    assert!(text(&out).contains("--allow-data-loss"), "{}", text(&out));
    let out = c.craton(&["failover", "--allow-data-loss", "--yes"]);
    c.expect_ok(&out, "failover --allow-data-loss");
    println!("{}", text(&out));
    assert!(text(&out).contains("1 of 2 seals"), "{}", text(&out));
    let after = c.wait_status("a whole cluster after a forced failover", LIMIT, whole);
    assert_eq!(leader(&after), kept);
    let told = history(c, "override");
    assert!(
        told.iter()
            .any(|t| t.contains('@') && t.contains("accepted the loss")),
        "{told:?}"
    );
    for name in [lost, &old] {
        let _ = std::fs::remove_dir_all(c.dir.with_extension(format!("lost-{name}")));
    }
}
