//! Processes of a local cluster: who runs, since when, under which lock. A pid alone proves nothing (it
//! is reused), so a process is its pid and its start time, and signals go through a pidfd.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use crate::layout::{Daemon, Layout};

/// How long a starting daemon tries to get its lock: someone who only looks holds it for an instant.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// A process for certain.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: i32,
    /// When it started, in clock ticks since boot.
    pub started: u64,
}

impl ProcessId {
    /// This process.
    pub fn current() -> Option<Self> {
        Self::of(i32::try_from(std::process::id()).ok()?)
    }

    /// Whoever has this pid now.
    pub fn of(pid: i32) -> Option<Self> {
        Stat::read(pid).map(|stat| Self {
            pid,
            started: stat.started,
        })
    }

    /// True while it runs; a zombie does not.
    pub fn alive(self) -> bool {
        Stat::read(self.pid).is_some_and(|stat| {
            stat.started == self.started && stat.state != b'Z' && stat.state != b'X'
        })
    }

    /// A handle that can mean no other process; `None` when it is gone.
    fn open(self) -> Option<OwnedFd> {
        let fd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        // Checked after opening: from here on the pid cannot pass to another process unnoticed.
        self.alive().then_some(fd)
    }

    /// Sends a signal; false when it is gone already.
    pub fn signal(self, signal: Signal) -> bool {
        self.open()
            .is_some_and(|fd| pidfd_send_signal(fd, signal).is_ok())
    }

    /// Completes when the process is gone.
    pub async fn gone(self) {
        let Some(fd) = self.open() else { return };
        #[allow(
            deprecated,
            reason = "an OwnedFd stays what it is; the newer constructor is unsafe"
        )]
        if let Ok(fd) = AsyncFd::with_interest(fd, tokio::io::Interest::READABLE) {
            // A pidfd turns readable when its process ends.
            let _ = fd.readable().await;
        }
    }
}

/// The fields of `/proc/PID/stat` that matter here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stat {
    state: u8,
    parent: i32,
    started: u64,
}

impl Stat {
    fn read(pid: i32) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// The name in the second field may hold anything, so fields are counted from its last parenthesis.
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        let mut fields = rest.split_ascii_whitespace();
        let state = fields.next()?.bytes().next()?;
        let parent = fields.next()?.parse().ok()?;
        let started = fields.nth(17)?.parse().ok()?;
        Some(Self {
            state,
            parent,
            started,
        })
    }
}

/// A process in the process table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Process {
    /// Which.
    pub id: ProcessId,
    /// Its parent.
    pub parent: i32,
    /// Its command line, words separated by blanks.
    pub command: String,
}

/// The whole process table. Those that end meanwhile are missing.
pub fn all() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(|pid| {
        let stat = Stat::read(pid)?;
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        Some(Process {
            id: ProcessId {
                pid,
                started: stat.started,
            },
            parent: stat.parent,
            command,
        })
    })
    .collect()
}

/// `roots` and everything that descends from them.
pub fn with_descendants(table: &[Process], roots: &[ProcessId]) -> BTreeSet<ProcessId> {
    let mut found: BTreeSet<ProcessId> = table
        .iter()
        .map(|p| p.id)
        .filter(|id| roots.contains(id))
        .collect();
    loop {
        let parents: BTreeSet<i32> = found.iter().map(|id| id.pid).collect();
        let before = found.len();
        found.extend(
            table
                .iter()
                .filter(|p| parents.contains(&p.parent))
                .map(|p| p.id),
        );
        if found.len() == before {
            return found;
        }
    }
}

/// The postmaster of a data directory, if it runs.
pub fn postmaster(data: &Path) -> Option<ProcessId> {
    let text = std::fs::read_to_string(data.join("postmaster.pid")).ok()?;
    let pid = text.lines().next()?.trim().parse().ok()?;
    // A pid file can outlive its server: the process must also work in this data directory.
    let works_in = std::fs::read_link(format!("/proc/{pid}/cwd")).ok()?;
    (works_in == data.canonicalize().ok()?)
        .then(|| ProcessId::of(pid))
        .flatten()
}

/// Everything that belongs to a member: its agent, fence, postmaster, backends and helpers. Found by
/// parentage and, for orphans, by the member's directory on the command line.
pub fn of_member(layout: &Layout, member: &craton_core::MemberId) -> BTreeSet<ProcessId> {
    let table = all();
    let dir = layout.member(member);
    let in_dir = format!("{}/", dir.display());
    let board = craton_fence::board_path(&dir).display().to_string();
    let conf = layout
        .conf_of(&Daemon::Node(member.clone()))
        .display()
        .to_string();
    let mut roots: Vec<ProcessId> = table
        .iter()
        .filter(|p| is_ours(&p.command))
        .filter(|p| {
            p.command.contains(&in_dir) || p.command.contains(&conf) || p.command.contains(&board)
        })
        .map(|p| p.id)
        .collect();
    roots.extend(postmaster(&dir.join("data")));
    roots.extend(running(layout, &Daemon::Node(member.clone()).name()));
    let own = ProcessId::current();
    with_descendants(&table, &roots)
        .into_iter()
        .filter(|id| Some(*id) != own)
        .collect()
}

/// Programs that a member consists of. (Somebody's `tail -f` of a log is none of them.)
fn is_ours(command: &str) -> bool {
    const PROGRAMS: [&str; 6] = [
        "craton",
        "postgres",
        "initdb",
        "pg_basebackup",
        "pg_rewind",
        "pg_ctl",
    ];
    let program = command.split(' ').next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or_default();
    PROGRAMS.contains(&name) || program == "postgres:"
}

fn lock_path(layout: &Layout, name: &str) -> PathBuf {
    layout.run().join(format!("{name}.lock"))
}

fn pid_path(layout: &Layout, name: &str) -> PathBuf {
    layout.run().join(format!("{name}.pid"))
}

/// The right to be the one running daemon of a name; ends with the process.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

impl RunLock {
    /// Takes the lock `NAME.lock` in the directory of `pid_file` and writes `pid_file`. `None` when
    /// another process holds it.
    pub fn take(pid_file: &Path) -> anyhow::Result<Option<Self>> {
        let path = pid_file.with_extension("lock");
        let file = open_lock(&path)?;
        // This runs before any runtime or thread exists, and at most LOCK_PATIENCE.
        let mut left = LOCK_PATIENCE;
        let pause = Duration::from_millis(10);
        while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            if left.is_zero() {
                return Ok(None);
            }
            std::thread::sleep(pause);
            left = left.saturating_sub(pause);
        }
        let me =
            ProcessId::current().context("cannot read this process's start time from /proc")?;
        crate::secrets::write_private(pid_file, &serde_json::to_string(&me)?)?;
        Ok(Some(Self { _file: file }))
    }

    /// Takes the lock of a part of a local cluster.
    pub fn take_named(layout: &Layout, name: &str) -> anyhow::Result<Option<Self>> {
        Self::take(&pid_path(layout, name))
    }
}

fn open_lock(path: &Path) -> anyhow::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// The process that holds the lock of `name`, if one does.
pub fn running(layout: &Layout, name: &str) -> Option<ProcessId> {
    let file = File::open(lock_path(layout, name)).ok()?;
    if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
        return None;
    }
    let text = std::fs::read_to_string(pid_path(layout, name)).ok()?;
    serde_json::from_str::<ProcessId>(&text)
        .ok()
        .filter(|id| id.alive())
}

/// The pid file that a daemon started by the supervisor writes.
pub fn pid_file(layout: &Layout, daemon: &Daemon) -> PathBuf {
    pid_path(layout, &daemon.name())
}

/// Waits until all are gone; false when the deadline passed first.
pub async fn all_gone(ids: impl IntoIterator<Item = ProcessId>, deadline: Instant) -> bool {
    for id in ids {
        if tokio::time::timeout_at(deadline, id.gone()).await.is_err() {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_an_odd_name() {
        let text = "42 (a b) c)) S 7 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 98765 1 2 3";
        assert_eq!(
            Stat::parse(text),
            Some(Stat {
                state: b'S',
                parent: 7,
                started: 98765
            })
        );
        assert_eq!(Stat::parse("nonsense"), None);
    }

    #[test]
    fn descendants_are_found_through_generations() {
        let process = |pid, parent| Process {
            id: ProcessId { pid, started: 1 },
            parent,
            command: String::new(),
        };
        let table = [
            process(1, 0),
            process(2, 1),
            process(3, 2),
            process(4, 1),
            process(5, 3),
        ];
        let found = with_descendants(&table, &[ProcessId { pid: 2, started: 1 }]);
        assert_eq!(found.iter().map(|id| id.pid).collect::<Vec<_>>(), [2, 3, 5]);
        assert!(with_descendants(&table, &[ProcessId { pid: 2, started: 9 }]).is_empty());
    }

    #[tokio::test]
    async fn a_child_is_seen_signalled_and_gone() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let id = ProcessId::of(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(id.alive());
        assert!(
            !ProcessId {
                started: id.started + 1,
                ..id
            }
            .signal(Signal::KILL),
            "another process was meant"
        );
        assert!(id.signal(Signal::KILL));
        assert!(all_gone([id], Instant::now() + Duration::from_secs(30)).await);
        assert!(!id.alive());
        child.wait().unwrap();
    }

    #[test]
    fn a_lock_is_held_once() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("x.pid");
        let held = RunLock::take(&pid_file).unwrap();
        assert!(held.is_some());
        assert!(RunLock::take(&pid_file).unwrap().is_none());
        drop(held);
        // A child that another test starts keeps it until it runs its own program.
        let mut tries = 0;
        while RunLock::take(&pid_file).unwrap().is_none() {
            tries += 1;
            assert!(tries < 20, "it is still held");
        }
    }
}
