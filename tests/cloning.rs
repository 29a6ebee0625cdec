//! An empty data directory is filled out of the backup repository, and nobody is loaded.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

use std::time::{Duration, Instant};

use serde_json::Value;

#[path = "harness/mod.rs"]
mod harness;

use harness::{Cluster, processes_of, running, signal, whole};

/// The life of a member's data directory; null while it has none.
fn life(status: &Value, member: &str) -> Value {
    let members = status["members"].as_array().unwrap();
    let member = members.iter().find(|m| m["id"] == member).unwrap();
    member["incarnation"].clone()
}

/// Whole with another life of this member: what the lost one said last counts for some seconds.
fn whole_anew(status: &Value, member: &str, before: &Value) -> bool {
    whole(status) && !life(status, member).is_null() && life(status, member) != *before
}

#[test]
fn a_lost_disk_is_filled_out_of_the_repository() {
    let c = Cluster::up("cloning", &["--no-sample"]);
    c.wait_status("a whole cluster", Duration::from_secs(60), whole);
    c.steady();
    let status = c.wait_status("a whole cluster", Duration::from_secs(60), whole);
    c.sql(&[
        "-c",
        "CREATE TABLE t AS SELECT generate_series(1, 1000) AS i",
    ]);
    c.wait("a backup", Duration::from_secs(60), || {
        let out = c.craton(&["backup", "run"]);
        out.status
            .success()
            .then_some(())
            .ok_or_else(|| harness::text(&out))
    });
    // What the backup does not have comes out of the archive.
    c.sql(&["-c", "INSERT INTO t SELECT generate_series(1001, 3000)"]);
    let standby = status["members"]
        .as_array()
        .unwrap()
        .iter()
        .find(|m| m["role"] == "standby")
        .and_then(|m| m["id"].as_str())
        .unwrap()
        .to_owned();
    let before = life(&status, &standby);

    lose_disk(&c, &standby);
    let healed = c.wait_status("a whole cluster", Duration::from_secs(120), |s| {
        whole_anew(s, &standby, &before)
    });
    assert_eq!(healed["leader"], status["leader"]);

    let log = std::fs::read_to_string(c.dir.join(format!("log/node-{standby}.log"))).unwrap();
    let cloned = log.rfind("cloning out of the backup repository");
    assert!(cloned.is_some(), "{log}");
    let after = &log[cloned.unwrap()..];
    assert!(after.contains("the archive is read to its end"), "{after}");
    assert!(!after.contains("cloning from"), "{after}");
    let conf = c
        .dir
        .join("members")
        .join(&standby)
        .join("conf/postgresql.conf");
    let conf = std::fs::read_to_string(conf).unwrap();
    assert!(
        conf.contains("restore_command = ''"),
        "a member that could read an archive could not seal: {conf}"
    );
    assert_eq!(
        c.sql(&["--read", "-At", "-c", "SELECT count(*) FROM t"]),
        "3000"
    );
    a_killed_agents_copy_ends(&c, &standby);
    one_that_was_away_for_too_long(&c, &standby);
}

/// A member stops in an instant, and its data directory is gone.
fn lose_disk(c: &Cluster, member: &str) {
    let processes = processes_of(&c.dir, member);
    for pid in &processes {
        signal(*pid, "STOP");
    }
    std::fs::remove_dir_all(c.dir.join("members").join(member).join("data")).unwrap();
    for pid in &processes {
        signal(*pid, "KILL");
    }
}

/// The agent is killed in the midst of a copy, and its tool stays: the next agent ends it, and makes its own.
fn a_killed_agents_copy_ends(c: &Cluster, standby: &str) {
    let home = c.dir.join("members").join(standby);
    let place = home.join("data.clone");
    // From a member, slowly: a tool that waits for its source says nothing, and so does not find its agent gone.
    let conf = c.dir.join(format!("conf/node-{standby}.toml"));
    let text = std::fs::read_to_string(&conf).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let at = lines
        .iter()
        .position(|l| l.starts_with("repository = "))
        .unwrap();
    let slow = [&lines[..at], &["max_rate_kb = 4096"], &lines[at + 1..]].concat();
    std::fs::write(&conf, slow.join("\n")).unwrap();
    let before = life(&c.json(&["status"]), standby);
    lose_disk(c, standby);
    let deadline = Instant::now() + Duration::from_secs(60);
    let (tools, sender) = loop {
        let tools = running(&["pg_basebackup", place.to_str().unwrap()]);
        let sender = running(&["walsender", "sending backup"])
            .into_iter()
            .find(|pid| {
                let cwd = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
                cwd.starts_with(&c.dir)
            });
        if let Some(sender) = sender.filter(|_| tools.len() == 2) {
            signal(sender, "STOP");
            break (tools, sender);
        }
        assert!(Instant::now() < deadline, "no copy began\n{}", c.logs());
    };
    let settings = format!("/node-{standby}.toml");
    let agents = running(&[" node ", c.dir.to_str().unwrap(), &settings]);
    assert_eq!(agents.len(), 1, "{agents:?}");
    signal(agents[0], "KILL");
    c.wait_status("a whole cluster", Duration::from_secs(120), |s| {
        whole_anew(s, standby, &before)
    });
    signal(sender, "CONT");
    let left = running(&["pg_basebackup", place.to_str().unwrap()]);
    assert!(!left.iter().any(|pid| tools.contains(pid)), "{left:?}");
    let log = std::fs::read_to_string(c.dir.join(format!("log/node-{standby}.log"))).unwrap();
    assert!(
        log.contains("ended what a former agent's tools were still at"),
        "{log}"
    );
    assert_eq!(
        c.sql(&["--read", "-At", "-c", "SELECT count(*) FROM t"]),
        "3000"
    );
}

/// The leader gives up the WAL that a standby still needs rather than its disk: the standby is cloned anew.
fn one_that_was_away_for_too_long(c: &Cluster, standby: &str) {
    let out = c.craton(&[
        "config",
        "set",
        "postgresql.max_slot_wal_keep_size=32MB",
        "postgresql.wal_keep_size=0",
    ]);
    c.expect_ok(&out, "craton config set");
    let frozen = processes_of(&c.dir, standby);
    for pid in &frozen {
        signal(*pid, "STOP");
    }
    let lost =
        format!("SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'craton_{standby}'");
    let deadline = Instant::now() + Duration::from_secs(120);
    while c.sql(&["-Atc", &lost]) != "lost" {
        assert!(Instant::now() < deadline, "never lost\n{}", c.logs());
        c.sql(&[
            "-qc",
            "INSERT INTO t SELECT generate_series(1, 200000)",
            "-c",
            "DELETE FROM t WHERE i > 3000",
            "-c",
            "SELECT pg_switch_wal()",
            "-c",
            "CHECKPOINT",
        ]);
    }
    for pid in &frozen {
        signal(*pid, "CONT");
    }
    // Until then it may count as there, as it was before it stood still.
    let log = c.dir.join(format!("log/node-{standby}.log"));
    c.wait("its slot is lost", Duration::from_secs(120), || {
        let log = std::fs::read_to_string(&log).unwrap();
        let said = log.contains("its slot there is lost");
        said.then_some(()).ok_or("its log does not say so")
    });
    c.wait_status("a whole cluster", Duration::from_secs(120), whole);
}
