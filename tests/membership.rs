//! Members come and go while clients write: the finished binary, real PostgreSQL.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;

#[path = "harness/mod.rs"]
mod harness;

use harness::{Cluster, text};

const PATIENCE: Duration = Duration::from_secs(120);

fn streaming(status: &Value, members: usize) -> bool {
    let all = status["members"].as_array().map_or(&[][..], Vec::as_slice);
    status["writable"] == true
        && all.len() == members
        && all
            .iter()
            .all(|m| m["role"] == "leader" || m["streaming"] == true)
        && status["sync"]["members"]
            .as_array()
            .is_some_and(|v| v.len() + 1 == members)
}

/// How many have a say; none while that cannot be asked.
fn voters(c: &Cluster) -> Option<usize> {
    let out = c.craton(&["--json", "member", "list"]);
    let members: Value = serde_json::from_slice(&out.stdout).ok()?;
    let all = members["members"].as_array()?;
    Some(all.iter().filter(|m| m["voter"] == true).count())
}

fn wait_voters(c: &Cluster, wanted: usize) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while voters(c) != Some(wanted) {
        assert!(
            std::time::Instant::now() < deadline,
            "never {wanted} voters: {}\n{}",
            text(&c.craton(&["member", "list"])),
            c.logs()
        );
    }
}

/// Writes one row after the other through the proxy until told to stop; how many were acknowledged, or the first
/// error.
fn write(c: &Cluster, stop: &AtomicBool) -> Result<u64, String> {
    let mut n = 0;
    while !stop.load(Ordering::SeqCst) {
        let insert = format!("INSERT INTO marks VALUES ({n})");
        let out = c.craton(&["psql", "-d", "postgres", "-c", &insert]);
        if !out.status.success() {
            return Err(format!("row {n}: {}", text(&out)));
        }
        n += 1;
    }
    Ok(n)
}

/// Ends the writer however the test ends: the cluster is purged only then.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn from_two_to_three_to_five_and_back_while_clients_write() {
    let c = Cluster::up("members", &["--members", "2", "--no-sample"]);
    c.wait_status("two members", PATIENCE, |s| streaming(s, 2));
    c.sql(&[
        "-d",
        "postgres",
        "-c",
        "CREATE TABLE marks (n bigint PRIMARY KEY)",
    ]);
    let stop = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let writing = scope.spawn(|| write(&c, &stop));
        let stopper = Stop(&stop);
        grow_and_shrink(&c);
        drop(stopper);
        writing.join().unwrap()
    });
    let written = written.unwrap_or_else(|error| {
        panic!("a client saw an error: {error}\n{}", c.logs());
    });
    let count = "SELECT count(*) FROM marks";
    assert_eq!(
        c.sql(&["-d", "postgres", "-Atc", count]),
        written.to_string()
    );
    assert!(written > 20, "only {written} rows were written");

    // What is left is a cluster as any other.
    let over = c.craton(&["switchover"]);
    c.expect_ok(&over, "craton switchover");
    assert_eq!(
        c.sql(&["-d", "postgres", "-Atc", count]),
        written.to_string()
    );
}

fn grow_and_shrink(c: &Cluster) {
    for (members, votes) in [("3", 3), ("5", 5)] {
        let up = c.craton(&["up", "--members", members]);
        c.expect_ok(&up, "craton up --members");
        c.wait_status("all of them", PATIENCE, |s| streaming(s, votes));
        wait_voters(c, votes);
    }
    // The leader is not removed.
    let status = c.json(&["status"]);
    let leader = status["leader"].as_str().unwrap().to_owned();
    let refused = c.craton(&["member", "remove", &leader, "--yes"]);
    assert_eq!(refused.status.code(), Some(4), "{}", text(&refused));
    assert!(text(&refused).contains("switchover"), "{}", text(&refused));

    let others: Vec<String> = status["members"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].as_str().unwrap().to_owned())
        .filter(|m| *m != leader)
        .collect();
    for (gone, left) in others.iter().take(2).zip([4, 3]) {
        let out = c.craton(&["member", "remove", gone, "--yes"]);
        c.expect_ok(&out, "craton member remove");
        c.wait_status("the others", PATIENCE, |s| streaming(s, left));
    }
    wait_voters(c, 3);
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name ~ '^craton_.$'";
    let deadline = std::time::Instant::now() + PATIENCE;
    while c.sql(&["-d", "postgres", "-Atc", slots]) != "2" {
        assert!(
            std::time::Instant::now() < deadline,
            "slots of removed members stay"
        );
    }
}
