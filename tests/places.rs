//! Members with a special place (no reads, behind another standby), programs that hear of roles, and what each member
//! works with: one cluster, real PostgreSQL.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use serde_json::Value;

#[path = "harness/mod.rs"]
mod harness;

use harness::{Cluster, processes_of, running, signal, whole};

const LIMIT: Duration = Duration::from_secs(90);

fn member<'a>(status: &'a Value, name: &str) -> &'a Value {
    let members = status["members"].as_array().unwrap();
    members.iter().find(|m| m["id"] == name).unwrap()
}

/// Who is waited for, in the order of names.
fn waited_for(status: &Value) -> Vec<&str> {
    let members = status["sync"]["members"].as_array().unwrap();
    members.iter().map(|m| m.as_str().unwrap()).collect()
}

/// Changes a member's settings file, and has another agent read it: PostgreSQL goes on.
fn configure(c: &Cluster, name: &str, changes: &[(&str, String)]) {
    let path = c.dir.join(format!("conf/node-{name}.toml"));
    let mut text = std::fs::read_to_string(&path).unwrap();
    for (from, to) in changes {
        assert!(text.contains(from), "{from} is not in {text}");
        text = text.replacen(from, to, 1);
    }
    std::fs::write(&path, text).unwrap();
    let agent = || running(&[" node ", path.to_str().unwrap()]);
    let before = agent();
    assert_eq!(before.len(), 1, "{before:?}");
    signal(before[0], "KILL");
    // The others take the one that was killed for alive for some seconds: the new one answers itself.
    c.wait("another agent answers", LIMIT, || {
        let there = !agent().is_empty() && agent() != before;
        let out = c.craton(&["explain", name]);
        let answers = there && out.status.success();
        answers.then_some(()).ok_or_else(|| harness::text(&out))
    });
    c.wait_status("a whole cluster with the other agent", LIMIT, |s| {
        s["writable"] == true && member(s, name)["agent_alive"] == true
    });
}

fn streams_from(status: &Value, name: &str, upstream: &str) -> bool {
    let m = member(status, name);
    m["streaming"] == true && m["upstream"] == upstream
}

#[test]
fn special_places() {
    let c = Cluster::up("places", &["--no-sample"]);
    let status = c.wait_status("a whole cluster", LIMIT, whole);
    let leader = status["leader"].as_str().unwrap().to_owned();
    let mut standbys = status["members"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].as_str().unwrap().to_owned())
        .filter(|m| *m != leader);
    let (mid, end) = (standbys.next().unwrap(), standbys.next().unwrap());
    assert_eq!(status["voters"], serde_json::json!(["a", "b", "c"]));
    libraries(&c);
    slots_keep_a_part_of_the_disk(&c);
    let program = listener(&c);
    let hears = |m: &str| {
        let on = (
            "[node.hooks]\n",
            format!("[node.hooks]\non_role_change = \"{program}\"\n"),
        );
        configure(&c, m, &[on]);
    };
    // The leader's agent is killed below: that is to be no failover, nor is anything else here.
    c.steady();
    hears(&leader);
    hears(&mid);
    let last = [
        (
            "[node.hooks]\n",
            format!("[node.hooks]\non_role_change = \"{program}\"\n"),
        ),
        ("noload = false", "noload = true".to_owned()),
        ("[node]\n", format!("[node]\nupstream = \"{mid}\"\n")),
    ];
    configure(&c, &end, &last);

    behind_a_standby(&c, &leader, &mid, &end);
    reads_go_elsewhere(&c, &mid, &end);
    let out = c.craton(&["switchover", "--to", &mid]);
    c.expect_ok(&out, "craton switchover");
    let after = c.wait_status("a whole cluster under another leader", LIMIT, |s| {
        whole(s) && s["leader"] == mid.as_str()
    });
    assert!(streams_from(&after, &end, &mid), "{after}");
    heard(&c, (&leader, &mid, &end), after["term"].as_u64().unwrap());
}

/// Every member says what it works with, and PostgreSQL itself agrees.
fn libraries(c: &Cluster) {
    let known = |s: &Value| {
        let members = s["members"].as_array().unwrap();
        members
            .iter()
            .all(|m| m["libraries"]["postgresql"].is_string())
    };
    // An agent that was silent for a moment is a warning, too.
    let status = c.wait_status("the libraries of all, without a warning", LIMIT, |s| {
        known(s) && s["warnings"] == serde_json::json!([])
    });
    let version = c.sql(&["-Atc", "SHOW server_version"]);
    let first = &status["members"][0]["libraries"];
    assert_eq!(first["postgresql"], version.split(' ').next().unwrap());
    for m in status["members"].as_array().unwrap() {
        assert_eq!(m["libraries"], *first, "{status}");
    }
    let icu =
        "SELECT pg_collation_actual_version(oid) FROM pg_collation WHERE collname = 'und-x-icu'";
    let icu = c.sql(&["-Atc", icu]);
    assert_eq!(first["icu"].as_str().unwrap_or_default(), icu);
    let postgis = "SELECT count(*) FROM pg_available_extensions WHERE name = 'postgis'";
    if c.sql(&["-Atc", postgis]) == "1" {
        c.sql(&["-qc", "CREATE EXTENSION postgis"]);
        let geos = c.sql(&["-Atc", "SELECT split_part(postgis_geos_version(), '-', 1)"]);
        assert_eq!(first["geos"], geos.as_str(), "{status}");
        let proj = c.sql(&["-Atc", "SELECT split_part(postgis_proj_version(), ' ', 1)"]);
        let file = first["proj"].as_str().unwrap();
        assert!(file.ends_with(&proj), "{file} {proj}");
        c.sql(&["-qc", "DROP EXTENSION postgis"]);
    }
}

fn slots_keep_a_part_of_the_disk(c: &Cluster) {
    let space = rustix::fs::statvfs(&c.dir).unwrap();
    let part = ((space.f_frsize * space.f_blocks / 8) >> 20).clamp(64, 16 << 10);
    let sql = "SELECT setting FROM pg_settings WHERE name = 'max_slot_wal_keep_size'";
    assert_eq!(c.sql(&["-Atc", sql]), part.to_string());
}

/// A program that writes down what it is told. In a directory that a purge takes along.
fn listener(c: &Cluster) -> String {
    let path = c.dir.join("run/listener");
    let log = c.dir.join("run/heard");
    std::fs::write(
        &path,
        format!(
            "#!/bin/sh\necho \"$1 $2 $3 $4 $CRATON_ROLE\" >> {}\n",
            log.display()
        ),
    )
    .unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

fn behind_a_standby(c: &Cluster, leader: &str, mid: &str, end: &str) {
    c.wait_status("the last behind the other standby", LIMIT, |s| {
        streams_from(s, end, mid) && streams_from(s, mid, leader) && waited_for(s) == [mid]
    });
    c.sql(&[
        "-qc",
        "CREATE TABLE passed_on AS SELECT generate_series(1, 50000) AS i",
    ]);
    c.wait_status("the end of the line has it all", LIMIT, |s| {
        member(s, end)["lag_bytes"] == 0
    });
    // The leader keeps its slot where it is, so that it can come back at any time, and keeps no more.
    let slot = format!(
        "SELECT NOT active AND pg_wal_lsn_diff(pg_current_wal_flush_lsn(), restart_lsn) < 65536
           FROM pg_replication_slots WHERE slot_name = 'craton_{end}'"
    );
    let deadline = Instant::now() + LIMIT;
    while c.sql(&["-Atc", &slot]) != "t" {
        assert!(
            Instant::now() < deadline,
            "the slot stays behind\n{}",
            c.logs()
        );
    }

    // Whether a member is there is told by the lease's length.
    c.usual();
    let frozen = processes_of(&c.dir, mid);
    assert!(frozen.len() > 5, "{frozen:?}");
    for pid in &frozen {
        signal(*pid, "STOP");
    }
    c.wait_status("the last behind the leader", LIMIT, |s| {
        streams_from(s, end, leader) && waited_for(s) == [end]
    });
    for pid in &frozen {
        signal(*pid, "CONT");
    }
    // What it does not manage at the first try it tries again after a minute.
    c.wait_status(
        "the last behind the other standby again",
        Duration::from_secs(240),
        |s| streams_from(s, end, mid) && waited_for(s) == [mid],
    );
    c.steady();
}

fn reads_go_elsewhere(c: &Cluster, mid: &str, end: &str) {
    let status = c.json(&["status"]);
    assert_eq!(member(&status, end)["noload"], true, "{status}");
    let port = |name: &str| member(&status, name)["port"].to_string();
    let read = || c.sql(&["--read", "-Atc", "SELECT inet_server_port()"]);
    c.wait("reads go to the other standby", LIMIT, || {
        let answer = read();
        (answer == port(mid)).then_some(()).ok_or(answer)
    });
    // While a standby is slow to let clients in, the primary takes their reads.
    for _ in 0..5 {
        assert_ne!(read(), port(end));
    }
}

/// Each member's program heard of what became of it, with the term.
fn heard(c: &Cluster, (old, new, end): (&str, &str, &str), term: u64) {
    let lines = || std::fs::read_to_string(c.dir.join("run/heard")).unwrap_or_default();
    let expected = [
        format!("leader {} {old} local leader", term - 1),
        format!("standby {} {new} local standby", term - 1),
        format!("leader {term} {new} local leader"),
        format!("standby {term} {old} local standby"),
        // A standby that follows another leader has not changed its role.
        format!("standby {} {end} local standby", term - 1),
    ];
    let deadline = Instant::now() + LIMIT;
    for line in &expected {
        while !lines().lines().any(|l| l == line) {
            assert!(
                Instant::now() < deadline,
                "{line} is not in\n{}\n{}",
                lines(),
                c.logs()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
