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

#[path = "harness/mod.rs"]
mod harness;

use harness::{Cluster, processes_of, signal, whole};

#[test]
fn a_lost_disk_is_filled_out_of_the_repository() {
    let c = Cluster::up("cloning", &["--no-sample"]);
    let status = c.wait_status("a whole cluster", Duration::from_secs(60), whole);
    c.sql(&[
        "-c",
        "CREATE TABLE t AS SELECT generate_series(1, 1000) AS i",
    ]);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !c.craton(&["backup", "run"]).status.success() {
        assert!(Instant::now() < deadline, "no backup\n{}", c.logs());
    }
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
    let incarnation = |status: &serde_json::Value| {
        let members = status["members"].as_array().unwrap();
        let member = members.iter().find(|m| m["id"] == standby.as_str());
        member.map(|m| m["incarnation"].clone())
    };
    let before = incarnation(&status);

    let processes = processes_of(&c.dir, &standby);
    for pid in &processes {
        signal(*pid, "STOP");
    }
    std::fs::remove_dir_all(c.dir.join("members").join(&standby).join("data")).unwrap();
    for pid in &processes {
        signal(*pid, "KILL");
    }
    let healed = c.wait_status("a whole cluster", Duration::from_secs(120), |s| {
        whole(s) && incarnation(s) != before
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
}
