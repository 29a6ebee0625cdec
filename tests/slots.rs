//! A logical replication slot that its consumer goes on with after a switchover, a killed postmaster and a lost host:
//! the finished binary, real PostgreSQL, `pg_recvlogical`, a writer all the while. The consumer must see every
//! acknowledged row, in order; some twice, none left out.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use craton::drill::recorder::Fate;
use craton::secrets;
use rustix::process::Signal;
use serde_json::Value;

#[path = "harness/mod.rs"]
mod harness;
#[path = "harness/rig.rs"]
mod rig;

use rig::{Clients, Frozen, LIMIT, Rig, pause, turn};

const SLOT: &str = "dbz";
/// Standbys that get nothing for some seconds stay in the sync set: without them nobody would be promoted.
const GRACE: &str = "standby_grace_ms=30000";
/// A copy may have to wait for what PostgreSQL writes into the WAL every 15 s.
const COPIES: Duration = Duration::from_secs(120);

/// `pg_recvlogical`, started again whenever it ends. As a connector that keeps its own position does, it asks for what
/// comes after the last position that it confirmed.
struct Consumer {
    out: PathBuf,
    position: Arc<Mutex<String>>,
    ended: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Consumer {
    fn start(rig: &Rig, program: PathBuf) -> Self {
        let out = rig.cluster.dir.join("run/consumed");
        let ports: Vec<String> = rig
            .layout
            .cluster
            .members
            .iter()
            .map(|m| rig.layout.postgres_port(m).to_string())
            .collect();
        let hosts = vec!["127.0.0.1"; ports.len()].join(",");
        let conninfo = format!(
            "host={hosts} port={} user=postgres dbname=postgres connect_timeout=2 target_session_attrs=read-write",
            ports.join(",")
        );
        let password = secrets::read(&rig.layout.secret(secrets::names::SUPERUSER)).unwrap();
        let position = Arc::new(Mutex::new("0/0".to_owned()));
        let ended = Arc::new(AtomicBool::new(false));
        let (asks_for, over, file) = (Arc::clone(&position), Arc::clone(&ended), out.clone());
        let run = move || {
            while !over.load(Ordering::Relaxed) {
                let from = asks_for.lock().unwrap().clone();
                let mut child = Command::new(&program)
                    .args(["-d", &conninfo, "--slot", SLOT, "--start", "--no-loop"])
                    .args(["-o", "skip-empty-xacts=1", "-F", "1", "-s", "1"])
                    .args(["--startpos", &from, "-f"])
                    .arg(&file)
                    .env("PGPASSWORD", &password)
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap();
                while !over.load(Ordering::Relaxed) && child.try_wait().unwrap().is_none() {
                    pause();
                }
                end(child);
                pause();
            }
        };
        Self {
            out,
            position,
            ended,
            thread: Some(std::thread::spawn(run)),
        }
    }

    /// The rows of a run in the order in which they were first seen.
    fn seen(&self, run: i64) -> Vec<u64> {
        let text = std::fs::read_to_string(&self.out).unwrap_or_default();
        let mark = format!("table craton_drill.writes: INSERT: run[bigint]:{run} id[bigint]:");
        let mut seen = Vec::new();
        let mut known = std::collections::BTreeSet::new();
        for line in text.lines() {
            let Some(rest) = line.strip_prefix(&mark) else {
                continue;
            };
            // The last line may be half written.
            let Some((id, _)) = rest.split_once(' ') else {
                continue;
            };
            let id = id.parse().unwrap();
            if known.insert(id) {
                seen.push(id);
            }
        }
        seen
    }

    /// From now on it asks for what comes after the last position that the leader knows of it.
    fn keeps_its_position(&self, rig: &Rig, leader: &str) -> String {
        let sql = format!(
            "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{SLOT}'"
        );
        let port = rig.layout.postgres_port(&leader.parse().unwrap());
        let at = rig.ask(port, &sql);
        at.clone_into(&mut self.position.lock().unwrap());
        at
    }
}

fn end(mut child: Child) {
    if child.try_wait().unwrap().is_none() {
        child.kill().unwrap();
    }
    child.wait().unwrap();
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One writer, so that the order of the rows is known.
fn record(rig: &Rig, run: i64) -> Clients<'_> {
    rig.record_by(1, Duration::from_millis(2), run)
}

fn survives_on(status: &Value) -> Vec<String> {
    let slots = status["slots"].as_array().map_or(&[][..], Vec::as_slice);
    let slot = slots.iter().find(|s| s["name"] == SLOT);
    let members = slot.and_then(|s| s["survives_on"].as_array().cloned());
    let members = members.unwrap_or_default();
    members
        .iter()
        .map(|m| m.as_str().unwrap().to_owned())
        .collect()
}

/// Every standby has a copy that would be offered.
fn wait_copies(rig: &Rig, what: &str) {
    rig.cluster.wait_status(what, COPIES, |s| {
        harness::whole(s) && survives_on(s).len() == 2
    });
}

/// The consumer gets everything that was acknowledged, in the order of the one writer.
fn finish(clients: Clients<'_>, consumer: &Consumer, what: &str) {
    let run = clients.run;
    let rig = clients.rig;
    let (log, verdict) = clients.finish(what);
    assert_eq!(verdict.lost, Vec::<u64>::new(), "{what}");
    let acknowledged: Vec<u64> = log
        .writes
        .iter()
        .filter(|w| w.fate == Fate::Acknowledged)
        .map(|w| w.id)
        .collect();
    let deadline = Instant::now() + LIMIT;
    loop {
        let seen = consumer.seen(run);
        assert!(
            seen.windows(2).all(|w| w[0] < w[1]),
            "{what}: the consumer sees rows out of order: {:?}",
            seen.windows(2).find(|w| w[0] >= w[1])
        );
        let known: std::collections::BTreeSet<u64> = seen.iter().copied().collect();
        let missing: Vec<u64> = acknowledged
            .iter()
            .filter(|id| !known.contains(id))
            .copied()
            .collect();
        if missing.is_empty() {
            eprintln!("{what}: the consumer has all of {}", acknowledged.len());
            return;
        }
        // It gets rows in order: one that is missing while later ones are there never comes.
        let last = seen.last().copied().unwrap_or_default();
        let skipped: Vec<&u64> = missing.iter().filter(|id| **id < last).collect();
        assert!(
            skipped.is_empty() && Instant::now() < deadline,
            "{what}: of {} acknowledged rows the consumer skipped {skipped:?}, and lacks {}\n{}",
            acknowledged.len(),
            missing.len(),
            rig.cluster.logs()
        );
        pause();
    }
}

fn another_leader(rig: &Rig, former: &str) -> String {
    let status = rig.cluster.wait_status("another leader", LIMIT, |s| {
        s["writable"] == true && s["leader"].is_string() && s["leader"] != former
    });
    status["leader"].as_str().unwrap().to_owned()
}

#[test]
fn a_consumer_goes_on_after_every_change_of_the_leader() {
    let _turn = turn();
    let rig = Rig::up("slots", &[]);
    let bin = rig.cluster.sql(&[
        "-Atc",
        "SELECT setting FROM pg_config() WHERE name = 'BINDIR'",
    ]);
    let program = PathBuf::from(bin).join("pg_recvlogical");
    let out = rig
        .cluster
        .craton(&["config", "set", "postgresql.wal_level=logical", GRACE]);
    rig.cluster.expect_ok(&out, "config set");
    let out = rig.cluster.craton(&["restart", "--all"]);
    rig.cluster.expect_ok(&out, "restart");
    rig.wait_whole();
    let make = format!("SELECT pg_create_logical_replication_slot('{SLOT}', 'test_decoding')");
    rig.cluster.sql(&["-qAtc", &make]);
    wait_copies(&rig, "copies of a new slot");
    let consumer = Consumer::start(&rig, program);

    let clients = record(&rig, 1);
    let leader = rig.leader();
    let out = rig.cluster.craton(&["switchover"]);
    rig.cluster.expect_ok(&out, "switchover");
    let leader2 = another_leader(&rig, &leader);
    clients.wait_acknowledged("after the switchover", 50);
    wait_copies(&rig, "copies after a switchover");

    let life = rig.postmaster(&leader2);
    eprintln!("killing the postmaster {life:?} of {leader2}");
    assert!(life.expect("a postmaster").signal(Signal::KILL));
    rig.wait_served_again(&leader2, life);
    clients.wait_acknowledged("after a killed postmaster", 50);
    finish(clients, &consumer, "a switchover and a killed postmaster");
    wait_copies(&rig, "copies after a killed postmaster");
    ahead_of_the_standbys(&rig, &consumer, &rig.leader());
    without_a_copy(&rig);
}

/// From now on no standby gets anything of the leader; its consumer does.
fn freeze_standbys(rig: &Rig, leader: &str) -> Frozen {
    let standbys = rig.standbys(leader);
    let senders = standbys.iter().flat_map(|m| rig.senders(leader, Some(m)));
    Frozen::new(senders.collect())
}

/// The consumer has seen what no standby got, and asks the next leader for what comes after that.
fn ahead_of_the_standbys(rig: &Rig, consumer: &Consumer, leader: &str) {
    let clients = record(rig, 2);
    let frozen = freeze_standbys(rig, leader);
    let port = rig.layout.postgres_port(&leader.parse().unwrap());
    // Commits wait, and WAL grows all the same; the consumer gets it.
    let grow = "SELECT pg_logical_emit_message(false, 'test', repeat('x', 1000000))::text";
    let at = rig.ask(port, grow);
    let behind = format!(
        "SELECT coalesce(bool_and(confirmed_flush_lsn >= '{at}'), false)::text FROM pg_replication_slots WHERE slot_name = '{SLOT}'"
    );
    let deadline = Instant::now() + LIMIT;
    while rig.ask(port, &behind) != "true" {
        assert!(
            Instant::now() < deadline,
            "the consumer stays behind\n{}",
            rig.cluster.logs()
        );
        pause();
    }
    let position = consumer.keeps_its_position(rig, leader);
    rig.lose_leader(leader, || drop(frozen));
    let next = another_leader(rig, leader);
    eprintln!("the consumer asks {next} for what comes after {position}");
    clients.wait_acknowledged("after the host was lost", 50);
    finish(clients, consumer, "a consumer that was ahead");
    wait_copies(rig, "copies after a lost host");
}

/// A slot that the next leader cannot offer is gone, and everybody says so.
fn without_a_copy(rig: &Rig) {
    let leader = rig.leader();
    // A standby takes its copy after some seconds, unless it has not replayed what the slot begins with.
    let frozen = freeze_standbys(rig, &leader);
    let make = "SELECT pg_create_logical_replication_slot('late', 'test_decoding')";
    rig.cluster.sql(&["-qAtc", make]);
    rig.cluster.wait_status("the slot is known", LIMIT, |s| {
        let slots = s["slots"].as_array().map_or(&[][..], Vec::as_slice);
        slots.iter().any(|s| s["name"] == "late")
    });
    rig.lose_leader(&leader, || drop(frozen));
    let status = rig.cluster.wait_status("the loss is said", LIMIT, |s| {
        let warnings = s["warnings"].as_array().map_or(&[][..], Vec::as_slice);
        warnings
            .iter()
            .any(|w| w.as_str().unwrap().contains("slot late did not survive"))
    });
    assert!(!survives_on(&status).is_empty() || status["slots"].is_array());
    let count = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'late'";
    assert_eq!(rig.cluster.sql(&["-Atc", count]), "0");
    let out = rig.cluster.craton(&["doctor"]);
    assert!(
        harness::text(&out).contains("slot late"),
        "{}",
        harness::text(&out)
    );
    wait_copies(rig, "copies in the end");
}
