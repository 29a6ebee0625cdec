//! PostgreSQL's processes as `/proc` shows them, and how to kill all of them.
//!
//! Every backend calls `setsid` (postmaster.c, `InitPostmasterChild`), so a process group does not hold
//! them together; and a backend whose postmaster was killed goes on until it next looks, in which time it
//! can still acknowledge a commit. So the children are found by parent, and orphans by where they live.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use tokio::time::Instant;

use crate::error::{PgError, Result};
use crate::files::blocking;

/// In the environment of every tool that writes into a member's directory (and so of the tool's children): whose
/// it is. A tool outlives an agent that was killed, and the next agent finds it by this. `PR_SET_PDEATHSIG` would
/// go by the thread that forked, and a thread may end while its process lives.
pub(crate) const TOOL_OF: &str = "CRATON_TOOL_OF";

/// How often a wait looks again.
const POLL: Duration = Duration::from_millis(1);
/// And how often where a look goes through every process of the machine.
const TOOLS_POLL: Duration = Duration::from_millis(20);
/// How long a SIGSTOP may take to be seen; a process that sleeps in the kernel cannot fork either.
const STOP_SEEN_MAX: Duration = Duration::from_millis(50);

/// One line of `/proc/<pid>/stat`, the fields that matter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stat {
    /// The process.
    pub pid: i32,
    /// `R`, `S`, `D`, `T`, `Z`, …
    pub state: char,
    /// Its parent.
    pub ppid: i32,
    /// Clock ticks from boot to its start; with the pid it names a process for good.
    pub start_ticks: u64,
}

impl Stat {
    /// Reads `/proc/<pid>/stat`; none if there is no such process.
    pub fn read(pid: i32) -> Option<Self> {
        Self::parse(pid, &fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// The command stands in parentheses and may hold any character, so the last `)` ends it.
    fn parse(pid: i32, text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        let mut fields = rest.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        let ppid = fields.next()?.parse().ok()?;
        let start_ticks = fields.nth(17)?.parse().ok()?;
        Some(Self {
            pid,
            state,
            ppid,
            start_ticks,
        })
    }

    /// True if it still can run: neither a zombie nor gone.
    pub fn is_alive(&self) -> bool {
        !matches!(self.state, 'Z' | 'X')
    }
}

/// All processes that can be seen.
fn all_pids() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
        })
}

/// The living children of a process.
pub fn children_of(parent: i32) -> Vec<Stat> {
    all_pids()
        .filter_map(Stat::read)
        .filter(|s| s.ppid == parent && s.is_alive())
        .collect()
}

/// The living PostgreSQL processes whose working directory is this data directory. The postmaster and all
/// its children live there (`ChangeToDataDir`), whoever their parent is by now.
pub fn living_in(data_dir: &Path) -> Vec<Stat> {
    all_pids()
        .filter(|pid| lives_in(*pid, data_dir))
        .filter_map(Stat::read)
        .filter(Stat::is_alive)
        .collect()
}

/// The living tools that work for this member, and what they have started.
fn tools_of(member_dir: &Path) -> Vec<Stat> {
    let mut mark = format!("{TOOL_OF}=").into_bytes();
    mark.extend_from_slice(member_dir.as_os_str().as_encoded_bytes());
    let own = std::process::id();
    all_pids()
        .filter(|pid| u32::try_from(*pid).is_ok_and(|pid| pid != own))
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/environ"))
                .is_ok_and(|e| e.split(|byte| *byte == 0).any(|v| v == mark))
        })
        .filter_map(Stat::read)
        .filter(Stat::is_alive)
        .collect()
}

/// True if the process is a `postgres` that lives in this data directory.
pub(crate) fn lives_in(pid: i32, data_dir: &Path) -> bool {
    let link = |name: &str| fs::read_link(format!("/proc/{pid}/{name}")).ok();
    let Some(cwd) = link("cwd") else { return false };
    cwd == data_dir && link("exe").is_some_and(|exe| is_postgres(&exe))
}

/// The executable's name; an upgraded package leaves "postgres (deleted)" behind.
fn is_postgres(exe: &Path) -> bool {
    exe.file_name()
        .and_then(|n| n.to_str())
        .is_some_and(|n| n == "postgres" || n == "postgres (deleted)")
}

/// True for a postmaster: it keeps the arguments that it was started with, its children replace them by
/// "postgres: …".
pub(crate) fn has_postmaster_arguments(pid: i32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|c| !c.is_empty() && !c.starts_with(b"postgres: ") && c.contains(&0))
}

/// The living children of the postmaster that carry this word in their title ("postgres: a: walreceiver …").
fn children_titled(postmaster: i32, word: &str) -> impl Iterator<Item = Stat> {
    children_of(postmaster).into_iter().filter(move |child| {
        fs::read(format!("/proc/{}/cmdline", child.pid))
            .is_ok_and(|title| String::from_utf8_lossy(&title).contains(word))
    })
}

/// True if there is one.
pub(crate) fn has_child_titled(postmaster: i32, word: &str) -> bool {
    children_titled(postmaster, word).next().is_some()
}

/// SIGHUP for such a child, which makes it read its configuration again, and ends its sleep. False if there is none.
pub(crate) fn hang_up_child(postmaster: i32, word: &str) -> bool {
    let reached = children_titled(postmaster, word).filter(|c| signal_checked(c, Signal::HUP));
    reached.count() > 0
}

/// Sends a signal by pid; a process that is gone is no error.
fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        // The only other error is a process of another user, which the wait that follows reports.
        let _ = kill_process(pid, signal);
    }
}

/// A signal, guarded against a pid that was given to another process meanwhile. True if it was sent.
fn signal_checked(target: &Stat, signal: Signal) -> bool {
    let pidfd = Pid::from_raw(target.pid).and_then(|p| pidfd_open(p, PidfdFlags::empty()).ok());
    // The pidfd names the process that was looked at only if that one still has the number.
    let same = Stat::read(target.pid).is_some_and(|now| now.start_ticks == target.start_ticks);
    pidfd.is_some_and(|fd| same && pidfd_send_signal(&fd, signal).is_ok())
}

/// Kills a postmaster and all its children, and returns only when none of them is left. The order is what
/// makes it complete: a stopped postmaster forks no more, so once its children are dead, all are.
pub(crate) async fn kill_all(postmaster: Stat, data_dir: PathBuf, limit: Duration) -> Result<()> {
    let end = Instant::now() + limit;
    let alive = || {
        Stat::read(postmaster.pid)
            .filter(|s| s.start_ticks == postmaster.start_ticks && s.is_alive())
    };
    if alive().is_some() {
        signal(postmaster.pid, Signal::STOP);
        let seen_end = Instant::now() + STOP_SEEN_MAX;
        while alive().is_some_and(|s| s.state == 'R' || s.state == 'S') && Instant::now() < seen_end
        {
            tokio::time::sleep(POLL).await;
        }
        for child in children_of(postmaster.pid) {
            signal_checked(&child, Signal::KILL);
        }
        signal_checked(&postmaster, Signal::KILL);
    }
    // A child that was between fork and /proc's listing is found here: it lives in the data directory.
    kill_until_gone(|| living_in(&data_dir), limit, end)
        .await
        .map(|_| ())
}

/// Kills what a dead postmaster left behind; returns how many there were.
pub(crate) async fn kill_leftovers(data_dir: PathBuf, limit: Duration) -> Result<usize> {
    let end = Instant::now() + limit;
    kill_until_gone(|| living_in(&data_dir), limit, end).await
}

/// Kills the tools that are at work though nobody waits for them; returns how many processes there were.
pub(crate) async fn kill_tools(member_dir: PathBuf, limit: Duration) -> Result<usize> {
    let end = Instant::now() + limit;
    let mut killed = Killed::default();
    loop {
        let dir = member_dir.clone();
        // Every process of the machine is looked at, and the environment of one that hangs takes its time.
        let left = blocking(move || Ok(tools_of(&dir))).await?;
        if killed.all(&left, limit, end)? {
            return Ok(killed.0.len());
        }
        tokio::time::sleep(TOOLS_POLL).await;
    }
}

async fn kill_until_gone(
    find: impl Fn() -> Vec<Stat>,
    limit: Duration,
    end: Instant,
) -> Result<usize> {
    let mut killed = Killed::default();
    while !killed.all(&find(), limit, end)? {
        tokio::time::sleep(POLL).await;
    }
    Ok(killed.0.len())
}

/// Processes that were told to die, by number and start.
#[derive(Default)]
struct Killed(BTreeSet<(i32, u64)>);

impl Killed {
    /// Kills those of `left` that were not told yet; true if there is none left.
    fn all(&mut self, left: &[Stat], limit: Duration, end: Instant) -> Result<bool> {
        for process in left {
            if self.0.insert((process.pid, process.start_ticks)) {
                signal_checked(process, Signal::KILL);
            }
        }
        if !left.is_empty() && Instant::now() >= end {
            return Err(PgError::Unkillable {
                pids: left.iter().map(|s| s.pid).collect(),
                limit,
            });
        }
        Ok(left.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_spaces_and_parentheses_does_not_confuse() {
        let line = "42 (a ) S 1 (b) S 7 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 9 9";
        let stat = Stat::parse(42, line).unwrap();
        assert_eq!(
            stat,
            Stat {
                pid: 42,
                state: 'S',
                ppid: 7,
                start_ticks: 12345
            }
        );
        assert!(Stat::parse(42, "42 (x").is_none());
    }

    #[test]
    fn a_child_is_found_by_its_title_and_hung_up() {
        use std::os::unix::process::ExitStatusExt as _;
        let me = i32::try_from(std::process::id()).unwrap();
        // Whoever runs the tests may ignore the signal, and what is started inherits that.
        let mut child = std::process::Command::new("env")
            .args(["--default-signal=HUP", "sleep", "61.25"])
            .spawn()
            .unwrap();
        assert!(!hang_up_child(me, "sleep\x0061.5"));
        // Until it has become what it is to be the signal may come to nothing.
        let deadline = Instant::now() + Duration::from_secs(10);
        let ended = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it is not found");
            hang_up_child(me, "sleep\x0061.25");
            std::thread::sleep(POLL);
        };
        assert_eq!(ended.signal(), Some(1));
        assert!(!hang_up_child(me, "sleep\x0061.25"));
    }

    #[test]
    fn this_process_is_not_postgres() {
        let me = i32::try_from(std::process::id()).unwrap();
        assert!(Stat::read(me).unwrap().is_alive());
        assert!(!lives_in(me, &std::env::current_dir().unwrap()));
        assert!(is_postgres(Path::new(
            "/usr/lib/postgresql/15/bin/postgres (deleted)"
        )));
    }
}
