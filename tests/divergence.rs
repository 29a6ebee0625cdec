//! What only a former leader had is kept, told, and can be had back.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

#[path = "harness/mod.rs"]
mod harness;

use harness::{Cluster, directory, processes_of, signal, text, whole_async};

/// Rows that no standby is given.
const ROWS: u64 = 41;

#[test]
fn rows_that_only_a_former_leader_had_can_be_had_back() {
    let c = Cluster::up("divergence", &["--no-sample", "--durability", "async"]);
    let status = c.wait_status("a whole cluster", Duration::from_secs(60), whole_async);
    let leader = status["leader"].as_str().unwrap().to_owned();
    c.sql(&["-c", "CREATE TABLE marks (i int)"]);
    wait_until("a backup with the table", || {
        c.craton(&["backup", "run"]).status.success()
    });

    // WAL goes nowhere from here on: the processes that send it stand still.
    for pid in wal_senders(&c.dir.join("members").join(&leader)) {
        signal(pid, "STOP");
    }
    let insert = format!("INSERT INTO marks SELECT generate_series(1, {ROWS})");
    c.sql(&[
        "-c",
        &insert,
        "-c",
        "CREATE TABLE only_here AS SELECT 1 AS x",
    ]);
    // The whole member stands still, as a paused virtual machine, until another leads.
    let frozen = processes_of(&c.dir, &leader);
    assert!(frozen.len() > 5, "{frozen:?}");
    for pid in &frozen {
        signal(*pid, "STOP");
    }
    c.wait_status("another leader", Duration::from_secs(60), |s| {
        s["writable"] == true && s["leader"] != leader.as_str()
    });
    for pid in &frozen {
        signal(*pid, "CONT");
    }
    let thawed = Instant::now();
    c.wait_status("a whole cluster", Duration::from_secs(60), whole_async);
    println!("whole again after {:.1} s", thawed.elapsed().as_secs_f64());

    let listed = c.json(&["divergence", "list"]);
    let kept = listed
        .as_array()
        .unwrap()
        .iter()
        .find(|v| v["member"] == leader.as_str())
        .and_then(|v| v["kept"].as_array()?.last())
        .unwrap_or_else(|| panic!("{leader} kept nothing: {listed}\n{}", c.logs()))
        .clone();
    assert_eq!(inserted(&kept, ".public.marks"), ROWS, "{kept}");
    assert_eq!(inserted(&kept, ".public.only_here"), 1, "{kept}");
    assert!(kept["commits"].as_u64().unwrap() >= 2, "{kept}");
    let id = kept["id"].as_str().unwrap();
    let shown = c.craton(&["divergence", "show", id]);
    c.expect_ok(&shown, "craton divergence show");
    println!(
        "{}\n{}",
        text(&c.craton(&["divergence", "list"])),
        text(&shown)
    );
    let wal = c
        .dir
        .join("members")
        .join(&leader)
        .join("divergence")
        .join(id);
    assert!(
        text(&shown).contains(&format!("--divergence {}", wal.display())),
        "{}",
        text(&shown)
    );
    assert_eq!(c.sql(&["-At", "-c", "SELECT count(*) FROM marks"]), "0");

    have_back(&c, &wal);
    let unknown = c.craton(&["divergence", "show", "nothing"]);
    assert!(
        !unknown.status.success() && text(&unknown).contains("divergence list"),
        "{}",
        text(&unknown)
    );
}

/// Restores, starts what was restored, and counts.
fn have_back(c: &Cluster, wal: &Path) {
    let target = Restored(directory("divergence-back"));
    let path = target.0.to_str().unwrap();
    let out = c.craton(&["restore", path, "--divergence", wal.to_str().unwrap()]);
    c.expect_ok(&out, "craton restore --divergence");
    let started = Restored::postgres(&format!(
        "pg_ctl -D {path} -o '-p 5499 -k {path} -c listen_addresses= ' -l {path}/start.log -w -t 60 start"
    ));
    assert!(
        started.status.success(),
        "{}\n{}",
        text(&started),
        std::fs::read_to_string(target.0.join("start.log")).unwrap_or_default()
    );
    let database = c.sql(&["-At", "-c", "SELECT current_database()"]);
    let count = |sql: &str| {
        let out = Restored::postgres(&format!(
            "psql -h {path} -p 5499 -U postgres -d {database} -At -c \"{sql}\""
        ));
        text(&out).trim().to_owned()
    };
    let log = || std::fs::read_to_string(target.0.join("start.log")).unwrap_or_default();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let answer = count("SELECT pg_is_in_recovery()");
        if answer == "f" {
            break;
        }
        assert!(Instant::now() < deadline, "{answer}\n{}", log());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(
        count("SELECT count(*) FROM marks"),
        ROWS.to_string(),
        "{}",
        log()
    );
    assert_eq!(count("SELECT x FROM only_here"), "1");
}

/// A server beside the cluster; stopped and removed at the end.
struct Restored(PathBuf);

impl Restored {
    /// Runs a command line as the directory's owner.
    fn postgres(line: &str) -> Output {
        let line =
            format!("PATH=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1):$PATH {line}");
        let mut command = if rustix::process::geteuid().is_root() {
            let mut command = Command::new("su");
            command.args(["postgres", "-s", "/bin/sh", "-c", &line]);
            command
        } else {
            let mut command = Command::new("sh");
            command.args(["-c", &line]);
            command
        };
        command.output().expect("a shell runs")
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        let path = self.0.display();
        Self::postgres(&format!("pg_ctl -D {path} -m immediate stop"));
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn inserted(kept: &Value, table: &str) -> u64 {
    let rows = kept["rows"].as_object().unwrap();
    rows.iter()
        .filter(|(name, _)| name.ends_with(table))
        .map(|(_, r)| r["inserted"].as_u64().unwrap())
        .sum()
}

/// The postmaster's children that send WAL, by the titles that PostgreSQL gives them.
fn wal_senders(member: &Path) -> Vec<u32> {
    let pid_file = std::fs::read_to_string(member.join("data/postmaster.pid")).unwrap();
    let postmaster: u32 = pid_file.lines().next().unwrap().parse().unwrap();
    let children =
        std::fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children")).unwrap();
    let senders: Vec<u32> = children
        .split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .filter(|pid: &u32| {
            let title = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            title.contains("walsender")
        })
        .collect();
    assert!(senders.len() >= 2, "{senders:?}");
    senders
}

fn wait_until(what: &str, mut met: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !met() {
        assert!(Instant::now() < deadline, "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(50));
    }
}
