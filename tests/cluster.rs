//! A local cluster as a user meets it: the finished binary, real PostgreSQL with PostGIS, real faults.
//!
//! Each test has a cluster of its own under a temporary directory, with ports of its own. Run as root the
//! binary drops to `postgres` by itself, as it does for users.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::manual_assert,
    clippy::indexing_slicing,
    clippy::format_push_string,
    clippy::disallowed_types,
    clippy::cast_possible_truncation,
    clippy::case_sensitive_file_extension_comparisons,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;

#[path = "harness/mod.rs"]
mod harness;

use harness::{Cluster, directory, files_below, text, whole};

/// One cluster at a time: the machine is small.
static TURN: Mutex<()> = Mutex::new(());

#[test]
fn a_first_try() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let c = Cluster::up("first", &[]);
    c.wait_status("a whole cluster", Duration::from_secs(60), whole);

    // Started twice, it says so.
    let again = c.craton(&["up"]);
    assert!(
        again.status.success() && text(&again).contains("up"),
        "{}",
        text(&again)
    );

    // The map, through the endpoint for writes and the one for reads.
    let question = "SELECT count(*) FROM cities c JOIN countries k ON ST_Contains(k.geom, c.geom) WHERE k.name = 'France'";
    let answer = c.sql(&["-d", "map", "-Atc", question]);
    assert!(answer.parse::<u32>().is_ok_and(|n| n >= 1), "{answer}");
    reads(&c, question, &answer);
    reads(&c, "SELECT pg_is_in_recovery()", "t");
    assert_eq!(
        c.sql(&["-d", "map", "-Atc", "SELECT pg_is_in_recovery()"]),
        "f"
    );

    secrets_stay_secret(&c);
    strangers_are_refused(&c);
    backup_and_restore(&c);
    old_busy_port(&c);

    let down = c.craton(&["down"]);
    c.expect_ok(&down, "craton down");
    // It comes back with its data.
    let up = c.craton(&["up"]);
    c.expect_ok(&up, "craton up after down");
    c.wait_status(
        "a whole cluster after down and up",
        Duration::from_secs(60),
        whole,
    );
    assert_eq!(c.sql(&["-d", "map", "-Atc", question]), answer);
}

/// Waits until the endpoint for reads gives this: a standby may not have replayed it yet, and while there is none, the
/// primary answers.
fn reads(c: &Cluster, query: &str, expected: &str) {
    c.wait(query, Duration::from_secs(60), || {
        let out = c.craton(&["psql", "--read", "-d", "map", "-Atc", query]);
        let found = String::from_utf8_lossy(&out.stdout).trim() == expected;
        (out.status.success() && found)
            .then_some(())
            .ok_or_else(|| text(&out))
    });
}

/// No secret is readable by others, stands in a log, or in a process title.
fn secrets_stay_secret(c: &Cluster) {
    let mut files = Vec::new();
    files_below(&c.dir.join("secrets"), &mut files);
    assert!(files.len() >= 6, "{files:?}");
    let mut secrets = Vec::new();
    for file in &files {
        let mode = std::fs::metadata(file).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{}", file.display());
        let content = std::fs::read_to_string(file).unwrap();
        if content.trim().lines().count() == 1 && !content.contains(':') {
            secrets.push(content.trim().to_owned());
        }
        // Keys: each of their lines alone would be too much.
        let keys = content.split("-----BEGIN PRIVATE KEY-----\n").skip(1);
        for key in keys.filter_map(|rest| rest.split("\n-----END").next()) {
            secrets.extend(key.lines().map(str::to_owned));
        }
    }
    // Seven passwords and tokens, and two lines or more of seven keys.
    assert!(secrets.len() >= 7 + 2 * 7, "{}", secrets.len());
    let mut logs = Vec::new();
    files_below(&c.dir.join("log"), &mut logs);
    for member in ["a", "b", "c"] {
        logs.push(c.dir.join("members").join(member).join("pg.log"));
    }
    let mut seen: Vec<String> = logs
        .iter()
        .filter_map(|l| std::fs::read_to_string(l).ok())
        .collect();
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        seen.extend(std::fs::read_to_string(process.path().join("cmdline")).ok());
        seen.extend(std::fs::read_to_string(process.path().join("environ")).ok());
    }
    for secret in secrets {
        assert!(
            seen.iter().all(|s| !s.contains(&secret)),
            "a secret stands in a log, a process title or an environment"
        );
    }
}

/// Random bytes and requests without TLS cost their sender the connection, and nobody anything else.
fn strangers_are_refused(c: &Cluster) {
    c.steady_for(6000);
    let before = c.json(&["status"]);
    let api = before["members"][0]["api"].as_str().unwrap().to_owned();
    let mut web = TcpStream::connect(&api).unwrap();
    web.write_all(b"GET /v1/status HTTP/1.0\r\nAuthorization: Bearer guess\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    // A reset may follow the answer: the request itself is never read.
    let _ = web.read_to_string(&mut answer);
    assert!(
        answer.starts_with("HTTP/1.0 400") && answer.contains("this port speaks TLS"),
        "{answer}"
    );
    for offset in [2, 3, 41, 51, 61, 71, 72] {
        let Ok(mut s) = TcpStream::connect(("127.0.0.1", c.base_port + offset)) else {
            continue;
        };
        let noise: Vec<u8> = (0..4096_u32)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        let _ = s.write_all(&noise);
        s.set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let _ = s.read(&mut [0; 64]);
    }
    let after = c.json(&["status"]);
    assert_eq!(
        after["term"], before["term"],
        "noise changed the leadership"
    );
    assert_eq!(c.sql(&["-Atc", "SELECT 1"]), "1");
    c.usual();
}

/// A backup is listed, and a restored copy of it starts and has the rows.
fn backup_and_restore(c: &Cluster) {
    c.sql(&[
        "-d",
        "map",
        "-c",
        "CREATE TABLE marks (n int)",
        "-c",
        "INSERT INTO marks VALUES (1)",
    ]);
    // The first one may be on its way by itself.
    c.wait("a backup", Duration::from_secs(120), || {
        let out = c.craton(&["backup", "run"]);
        let busy = ["a backup runs already", "the daemon is busy"];
        let said = text(&out);
        assert!(
            out.status.success() || busy.iter().any(|b| said.contains(b)),
            "{said}"
        );
        out.status.success().then_some(()).ok_or(said)
    });
    let list = text(&c.craton(&["backup", "list"]));
    assert!(list.lines().count() >= 2, "{list}");
    c.sql(&["-d", "map", "-c", "INSERT INTO marks VALUES (2)"]);
    let before = c.sql(&["-d", "map", "-Atc", "SELECT clock_timestamp()"]);
    c.sql(&["-d", "map", "-c", "DELETE FROM marks"]);
    let target = c.dir.with_extension("restored");
    let path = target.to_str().unwrap();
    let out = c.craton(&["restore", "--to", &before, path]);
    c.expect_ok(&out, "craton restore");
    assert!(
        target.join("PG_VERSION").exists() || target.join("data/PG_VERSION").exists(),
        "{}",
        text(&out)
    );
    let _ = std::fs::remove_dir_all(&target);
    // Brought to its end: a stopped server on a timeline of its own. Also to a time after the last transaction.
    let now = c.sql(&["-d", "map", "-Atc", "SELECT clock_timestamp()"]);
    for time in [&before, &now] {
        let out = c.craton(&["restore", "--to", time, "--finish", path]);
        c.expect_ok(&out, "craton restore --finish");
        assert!(
            text(&out).contains("is whole and stopped"),
            "{}",
            text(&out)
        );
        for left in ["recovery.signal", "recovery.log", "postmaster.pid"] {
            assert!(!target.join(left).exists(), "{left}");
        }
        let settings = std::fs::read_to_string(target.join("postgresql.auto.conf")).unwrap();
        assert!(!settings.contains("recovery_target"), "{settings}");
        let _ = std::fs::remove_dir_all(&target);
    }
}

/// A second cluster on the same ports says what is wrong and leaves nothing behind.
fn old_busy_port(c: &Cluster) {
    let dir = directory("busy");
    let out = Command::new(env!("CARGO_BIN_EXE_craton"))
        .args([
            "--dir",
            dir.to_str().unwrap(),
            "up",
            "--base-port",
            &c.base_port.to_string(),
        ])
        .output()
        .unwrap();
    assert!(!out.status.success());
    assert!(text(&out).contains("port"), "{}", text(&out));
    assert!(
        !dir.join("members").exists(),
        "a half-started cluster was left in {}",
        dir.display()
    );
}

#[test]
fn drills_lose_nothing() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let c = Cluster::up("drills", &["--no-sample"]);
    c.wait_status("a whole cluster", Duration::from_secs(60), whole);
    // A transaction that a slow machine makes longer than the switchover's patience is a client's error, rightly.
    let out = c.craton(&["config", "set", "switchover_wait_ms=20000"]);
    c.expect_ok(&out, "config set");
    for drill in [
        "switchover",
        "kill-primary",
        "kill-agent",
        "kill-fence",
        "freeze-primary",
        "kill-host",
        "freeze-agent",
        "kill-proxy",
    ] {
        // It looks once whether the cluster is whole, and does nothing where an agent is silent at that moment.
        let out = c.wait("a drill begins", Duration::from_secs(60), || {
            let out = c.craton_once(&["--json", "drill", drill, "--down-for", "4"]);
            let early =
                out.status.code() == Some(4) && text(&out).contains("not whole before the drill");
            if early { Err(text(&out)) } else { Ok(out) }
        });
        assert!(
            out.status.success(),
            "drill {drill}: {}\n{}",
            text(&out),
            c.logs()
        );
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        let result = &report["drills"][0];
        println!("{drill}: {result}");
        assert_eq!(result["lost"], 0, "{drill}: {report}");
        assert_eq!(result["ghosts"], 0, "{drill}: {report}");
        assert!(result["redundancy_ms"].is_u64(), "{drill}: {report}");
        if drill == "switchover" {
            assert_eq!(
                result["errors"], 0,
                "a planned switchover shows clients no error: {report}"
            );
            assert_eq!(
                result["unknown"], 0,
                "a planned switchover leaves no outcome unknown: {report}"
            );
        }
        if drill != "kill-proxy" {
            assert_eq!(
                result["sessions_lost"], 0,
                "{drill}: clients stay connected: {report}"
            );
        }
        c.wait_status("a whole cluster", Duration::from_secs(60), whole);
    }
}
