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
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A cluster that is purged when the test ends, however it ends.
struct Cluster {
    dir: PathBuf,
    base_port: u16,
}

impl Cluster {
    /// Starts one. `extra` goes to `craton up`.
    fn up(name: &str, extra: &[&str]) -> Self {
        let cluster = Self {
            dir: directory(name),
            base_port: free_base_port(),
        };
        let base = cluster.base_port.to_string();
        let out = cluster.craton(&[&["up", "--base-port", &base], extra].concat());
        cluster.expect_ok(&out, "craton up");
        cluster
    }

    fn craton(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_craton"))
            .arg("--dir")
            .arg(&self.dir)
            .args(args)
            .env_remove("CRATON_DIR")
            .output()
            .expect("the binary runs")
    }

    fn json(&self, args: &[&str]) -> Value {
        let out = self.craton(&[&["--json"], args].concat());
        self.expect_ok(&out, &args.join(" "));
        serde_json::from_slice(&out.stdout)
            .unwrap_or_else(|e| panic!("{args:?}: {e}: {}", text(&out)))
    }

    fn sql(&self, args: &[&str]) -> String {
        let out = self.craton(&[&["psql"], args].concat());
        self.expect_ok(&out, "craton psql");
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    }

    /// Fails with what is needed to understand it.
    fn expect_ok(&self, out: &Output, what: &str) {
        if !out.status.success() {
            panic!("{what}: {}\n{}\n{}", out.status, text(out), self.logs());
        }
    }

    /// The end of every log.
    fn logs(&self) -> String {
        let mut all = String::new();
        let mut places = vec![self.dir.join("log")];
        if let Ok(members) = std::fs::read_dir(self.dir.join("members")) {
            places.extend(members.flatten().map(|m| m.path()));
        }
        for place in places {
            let Ok(files) = std::fs::read_dir(&place) else {
                continue;
            };
            for path in files
                .flatten()
                .map(|f| f.path())
                .filter(|p| p.extension().is_some_and(|e| e == "log"))
            {
                let log = std::fs::read_to_string(&path).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(60).collect();
                all.push_str(&format!("== {}\n", path.display()));
                for line in tail.iter().rev() {
                    all.push_str(line);
                    all.push('\n');
                }
            }
        }
        all
    }

    /// Waits for a condition of `craton status`.
    fn wait_status(&self, what: &str, limit: Duration, met: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + limit;
        loop {
            let out = self.craton(&["--json", "status"]);
            if let Ok(status) = serde_json::from_slice::<Value>(&out.stdout)
                && met(&status)
            {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "{what} not within {limit:?}: {}\n{}",
                text(&out),
                self.logs()
            );
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let out = self.craton(&["down", "--purge"]);
        if !out.status.success() && !std::thread::panicking() {
            panic!("craton down --purge: {}", text(&out));
        }
    }
}

fn text(out: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    )
}

/// A path that does not exist yet, in a place that another user can reach, short enough for a socket.
fn directory(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("craton-test-{name}-{}", std::process::id()))
}

/// Finds a base port whose whole range is free at this moment.
fn free_base_port() -> u16 {
    // The tests of this process look at ranges of their own: two that look at once would find the same one.
    static TAKEN: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let own = TAKEN.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 4;
    for base in (20_000..60_000_u16)
        .step_by(100)
        .skip(own)
        .step_by(4)
        .skip(usize::from(std::process::id() as u16 % 50))
    {
        let free = (0..60).all(|offset| TcpListener::bind(("127.0.0.1", base + offset)).is_ok());
        if free {
            return base;
        }
    }
    panic!("no free range of ports on this machine");
}

fn whole(status: &Value) -> bool {
    let members = status["members"].as_array().map_or(&[][..], Vec::as_slice);
    status["writable"] == true
        && members.len() == 3
        && members
            .iter()
            .all(|m| m["role"] == "leader" || m["streaming"] == true)
        && status["sync"]["members"]
            .as_array()
            .is_some_and(|v| v.len() == 2)
}

fn files_below(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files_below(&path, found);
        } else {
            found.push(path);
        }
    }
}

#[test]
fn a_first_try() {
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
    assert_eq!(c.sql(&["--read", "-d", "map", "-Atc", question]), answer);
    assert_eq!(
        c.sql(&["--read", "-d", "map", "-Atc", "SELECT pg_is_in_recovery()"]),
        "t"
    );
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
    }
    assert!(secrets.len() >= 5);
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
    }
    for secret in secrets {
        assert!(
            seen.iter().all(|s| !s.contains(&secret)),
            "a secret stands in a log or a process title"
        );
    }
}

/// Random bytes and requests without the token cost their sender the connection, and nobody anything else.
fn strangers_are_refused(c: &Cluster) {
    let before = c.json(&["status"]);
    let api = before["members"][0]["api"].as_str().unwrap().to_owned();
    let mut web = TcpStream::connect(&api).unwrap();
    web.write_all(b"GET /v1/status HTTP/1.0\r\nAuthorization: Bearer guess\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    web.read_to_string(&mut answer).unwrap();
    assert!(
        answer.starts_with("HTTP/1.0 401") || answer.starts_with("HTTP/1.1 401"),
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
    let out = c.craton(&["backup", "run"]);
    c.expect_ok(&out, "craton backup run");
    let list = text(&c.craton(&["backup", "list"]));
    assert!(list.lines().count() >= 2, "{list}");
    c.sql(&["-d", "map", "-c", "INSERT INTO marks VALUES (2)"]);
    let before = c.sql(&["-d", "map", "-Atc", "SELECT clock_timestamp()"]);
    c.sql(&["-d", "map", "-c", "DELETE FROM marks"]);
    let target = c.dir.with_extension("restored");
    let out = c.craton(&["restore", "--to", &before, target.to_str().unwrap()]);
    c.expect_ok(&out, "craton restore");
    assert!(
        target.join("PG_VERSION").exists() || target.join("data/PG_VERSION").exists(),
        "{}",
        text(&out)
    );
    let _ = std::fs::remove_dir_all(&target);
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
    let c = Cluster::up("drills", &["--no-sample"]);
    c.wait_status("a whole cluster", Duration::from_secs(60), whole);
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
        let out = c.craton(&["--json", "drill", drill, "--down-for", "4"]);
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
