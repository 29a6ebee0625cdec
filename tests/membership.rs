//! Members come and go while clients write: the finished binary, real PostgreSQL.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

use std::sync::Arc;
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

fn voters(c: &Cluster) -> usize {
    let members = c.json(&["member", "list"]);
    let all = members["members"].as_array().unwrap();
    all.iter().filter(|m| m["voter"] == true).count()
}

fn wait_voters(c: &Cluster, wanted: usize) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while voters(c) != wanted {
        assert!(
            std::time::Instant::now() < deadline,
            "never {wanted} voters: {}\n{}",
            text(&c.craton(&["member", "list"])),
            c.logs()
        );
    }
}

/// Writes one row after the other through the proxy until told to stop; how many were acknowledged, and the first
/// error.
fn writer(
    c: &Arc<Cluster>,
    stop: &Arc<AtomicBool>,
) -> std::thread::JoinHandle<Result<u64, String>> {
    let (c, stop) = (Arc::clone(c), Arc::clone(stop));
    std::thread::spawn(move || {
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
    })
}

#[test]
fn from_two_to_three_to_five_and_back_while_clients_write() {
    let c = Arc::new(Cluster::up("members", &["--members", "2", "--no-sample"]));
    c.wait_status("two members", PATIENCE, |s| streaming(s, 2));
    c.sql(&[
        "-d",
        "postgres",
        "-c",
        "CREATE TABLE marks (n bigint PRIMARY KEY)",
    ]);
    let stop = Arc::new(AtomicBool::new(false));
    let writing = writer(&c, &stop);

    for (members, votes) in [("3", 3), ("5", 5)] {
        let up = c.craton(&["up", "--members", members]);
        c.expect_ok(&up, "craton up --members");
        c.wait_status("all of them", PATIENCE, |s| streaming(s, votes));
        wait_voters(&c, votes);
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
    assert_eq!(voters(&c), 3);
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name ~ '^craton_.$'";
    let deadline = std::time::Instant::now() + PATIENCE;
    while c.sql(&["-d", "postgres", "-Atc", slots]) != "2" {
        assert!(
            std::time::Instant::now() < deadline,
            "slots of removed members stay"
        );
    }

    stop.store(true, Ordering::SeqCst);
    let written = writing.join().unwrap().unwrap_or_else(|error| {
        panic!("a client saw an error: {error}\n{}", c.logs());
    });
    let count = c.sql(&["-d", "postgres", "-Atc", "SELECT count(*) FROM marks"]);
    assert_eq!(count, written.to_string());
    assert!(written > 20, "only {written} rows were written");

    // What is left is a cluster as any other.
    let over = c.craton(&["switchover"]);
    c.expect_ok(&over, "craton switchover");
    let count = c.sql(&["-d", "postgres", "-Atc", "SELECT count(*) FROM marks"]);
    assert_eq!(count, written.to_string());
}
