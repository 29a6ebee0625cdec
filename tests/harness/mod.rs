//! A local cluster for tests of the finished binary: started, asked, purged when the test ends.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::manual_assert,
    clippy::format_push_string,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    clippy::cast_possible_truncation,
    clippy::case_sensitive_file_extension_comparisons,
    reason = "every test file uses a part of it, and a test may fail at any line"
)]

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A cluster that is purged when the test ends, however it ends.
pub struct Cluster {
    pub dir: PathBuf,
    pub base_port: u16,
}

impl Cluster {
    /// Starts one. `extra` goes to `craton up`.
    pub fn up(name: &str, extra: &[&str]) -> Self {
        let cluster = Self {
            dir: directory(name),
            base_port: free_base_port(),
        };
        let base = cluster.base_port.to_string();
        let out = cluster.craton(&[&["up", "--base-port", &base], extra].concat());
        cluster.expect_ok(&out, "craton up");
        cluster
    }

    /// Runs a command, again while it reaches no agent: then nothing was done, and a busy machine is no fault.
    pub fn craton(&self, args: &[&str]) -> Output {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let out = self.craton_once(args);
            let nobody = out.status.code() == Some(3) && text(&out).contains("no agent answers (");
            if !nobody || Instant::now() >= deadline {
                return out;
            }
            pause();
        }
    }

    /// As [`Self::craton`], where nobody may answer.
    pub fn craton_once(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_craton"))
            .arg("--dir")
            .arg(&self.dir)
            .args(args)
            .env_remove("CRATON_DIR")
            .output()
            .expect("the binary runs")
    }

    pub fn json(&self, args: &[&str]) -> Value {
        let out = self.craton(&[&["--json"], args].concat());
        self.expect_ok(&out, &args.join(" "));
        serde_json::from_slice(&out.stdout)
            .unwrap_or_else(|e| panic!("{args:?}: {e}: {}", text(&out)))
    }

    pub fn sql(&self, args: &[&str]) -> String {
        let out = self.craton(&[&["psql"], args].concat());
        self.expect_ok(&out, "craton psql");
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    }

    /// Fails with what is needed to understand it.
    pub fn expect_ok(&self, out: &Output, what: &str) {
        if !out.status.success() {
            panic!("{what}: {}\n{}\n{}", out.status, text(out), self.logs());
        }
    }

    /// The end of every log.
    pub fn logs(&self) -> String {
        self.last_lines(60)
    }

    /// Every log.
    pub fn whole_logs(&self) -> String {
        self.last_lines(usize::MAX)
    }

    fn last_lines(&self, most: usize) -> String {
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
                let tail: Vec<&str> = log.lines().rev().take(most).collect();
                all.push_str(&format!("== {}\n", path.display()));
                for line in tail.iter().rev() {
                    all.push_str(line);
                    all.push('\n');
                }
            }
        }
        all
    }

    /// Who leads stays the same on a slow machine, too: for tests that are not about how soon another takes over.
    pub fn steady(&self) {
        self.steady_for(20_000);
    }

    /// As [`Self::steady`], with a lease of so many milliseconds.
    pub fn steady_for(&self, ttl_ms: u64) {
        let out = self.craton(&[
            "config",
            "set",
            &format!("ttl_ms={ttl_ms}"),
            "heartbeat_ms=500",
            "crash_grace_ms=20000",
            "stall_after_ms=30000",
        ]);
        self.expect_ok(&out, "config set");
        self.wait_status("the long lease", Duration::from_secs(60), |s| {
            s["lease"]["ttl_ms"] == ttl_ms
        });
    }

    /// Ends [`Self::steady`].
    pub fn usual(&self) {
        let out = self.craton(&[
            "config",
            "unset",
            "ttl_ms",
            "heartbeat_ms",
            "crash_grace_ms",
            "stall_after_ms",
        ]);
        self.expect_ok(&out, "config unset");
        self.wait_status("the usual lease", Duration::from_secs(60), |s| {
            s["lease"]["ttl_ms"] == 2000
        });
    }

    /// Waits for a condition of `craton status`.
    pub fn wait_status(&self, what: &str, limit: Duration, met: impl Fn(&Value) -> bool) -> Value {
        self.wait(what, limit, || {
            let out = self.craton_once(&["--json", "status"]);
            let status = serde_json::from_slice::<Value>(&out.stdout);
            status.ok().filter(|s| met(s)).ok_or_else(|| text(&out))
        })
    }

    /// Looks until it finds what it looks for, and fails with the logs when that does not come within the limit.
    pub fn wait<T, W: std::fmt::Display>(
        &self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut() -> Result<T, W>,
    ) -> T {
        let deadline = Instant::now() + limit;
        loop {
            match look() {
                Ok(found) => return found,
                Err(why) => assert!(
                    Instant::now() < deadline,
                    "{what} not within {limit:?}: {why}\n{}",
                    self.logs()
                ),
            }
            pause();
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let out = self.craton(&["down", "--purge"]);
        if !out.status.success() && !std::thread::panicking() {
            panic!("craton down --purge: {}", text(&out));
        }
        if self.dir.exists() && !std::thread::panicking() {
            let mut left = Vec::new();
            files_below(&self.dir, &mut left);
            panic!("craton down --purge left {left:?}");
        }
    }
}

/// Between two looks, which must not be what keeps the machine busy.
fn pause() {
    std::thread::sleep(Duration::from_millis(50));
}

/// Looks all the while for so long: what must never be can only be watched for.
pub fn watch(length: Duration, mut look: impl FnMut()) {
    let end = Instant::now() + length;
    while Instant::now() < end {
        look();
        pause();
    }
}

pub fn text(out: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    )
}

/// A path that does not exist yet, in a place that another user can reach, short enough for a socket.
pub fn directory(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("craton-test-{name}-{}", std::process::id()))
}

/// Finds a base port whose whole range is free at this moment.
pub fn free_base_port() -> u16 {
    // The tests of this process look at ranges of their own: two that look at once would find the same one.
    static TAKEN: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let own = TAKEN.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 4;
    // Below the ports that the system gives to clients (from 32768): one of those could take a port of ours while the
    // member that has it is down.
    let mut bases: Vec<u16> = (20_000..32_600).step_by(100).skip(own).step_by(4).collect();
    let first = std::process::id() as usize % bases.len();
    bases.rotate_left(first);
    for base in bases {
        let free = (0..60).all(|offset| TcpListener::bind(("127.0.0.1", base + offset)).is_ok());
        if free {
            return base;
        }
    }
    panic!("no free range of ports on this machine");
}

/// A member leads, by the cluster's word and not only by its own, which may be the last one of a dead leader; or it
/// streams.
pub fn serves(status: &Value, member: &Value) -> bool {
    let leads = member["id"] == status["leader"] && member["role"] == "leader";
    leads || member["streaming"] == true
}

pub fn whole(status: &Value) -> bool {
    let members = status["members"].as_array().map_or(&[][..], Vec::as_slice);
    status["writable"] == true
        && members.len() == 3
        && members.iter().all(|m| serves(status, m))
        && status["sync"]["members"]
            .as_array()
            .is_some_and(|v| v.len() == 2)
}

pub fn files_below(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files_below(&path, found);
        } else {
            found.push(path);
        }
    }
}

/// As [`whole`], where nobody is waited for.
pub fn whole_async(status: &Value) -> bool {
    let members = status["members"].as_array().map_or(&[][..], Vec::as_slice);
    status["writable"] == true && members.len() == 3 && members.iter().all(|m| serves(status, m))
}

/// Agent, fence and PostgreSQL of a member: what works in its directory or names it on its command line.
pub fn processes_of(dir: &Path, member: &str) -> Vec<u32> {
    let home = dir.join("members").join(member);
    let settings = format!("/node-{member}.toml");
    let board = craton_fence::board_path(&home);
    let belongs = |proc: &Path| {
        let line = std::fs::read_to_string(proc.join("cmdline")).unwrap_or_default();
        let cwd = std::fs::read_link(proc.join("cwd")).unwrap_or_default();
        cwd.starts_with(&home)
            || (line.contains(dir.to_str().unwrap()) && line.contains(&settings))
            || line.contains(board.to_str().unwrap())
    };
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| Some((e.file_name().to_str()?.parse().ok()?, e.path())))
        .filter(|(_, path)| belongs(path))
        .map(|(pid, _)| pid)
        .collect()
}

/// A process that has ended meanwhile needs none.
pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill")
        .args([&format!("-{name}"), &pid.to_string()])
        .status()
        .unwrap();
    assert!(status.success() || !Path::new(&format!("/proc/{pid}")).exists());
}

/// The processes whose command line holds all of these words.
pub fn running(words: &[&str]) -> Vec<u32> {
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            words.iter().all(|w| line.contains(w))
        })
        .collect()
}
