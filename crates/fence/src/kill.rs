//! Killing a postmaster with all its backends.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::{boottime_ns, sleep};

/// The kernel shows start times in ticks of 1/100 s on every architecture (`USER_HZ`).
const NS_PER_TICK: u64 = 10_000_000;
const POLL: Duration = Duration::from_millis(1);
/// How many polls a SIGSTOP may take to show; one that sleeps in the kernel cannot fork either.
const STOP_POLLS: usize = 20;

/// A process, for good: pids are used again, pids with start times are not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// Its pid.
    pub pid: i32,
    /// Clock ticks from boot to its start (`/proc/<pid>/stat`, field 22).
    pub start_ticks: u64,
}

/// State, parent and start of a process.
struct Stat {
    state: char,
    ppid: i32,
    start_ticks: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text);
    // The command stands in parentheses and may hold any character, so the last ")" ends it.
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let ppid = fields.next()?.parse().ok()?;
    let start_ticks = fields.nth(17)?.parse().ok()?;
    let stat = Stat {
        state,
        ppid,
        start_ticks,
    };
    (!matches!(state, 'Z' | 'X')).then_some(stat)
}

impl Target {
    /// The process that has this pid now.
    pub fn of(pid: i32) -> Option<Self> {
        let start_ticks = stat(pid)?.start_ticks;
        Some(Self { pid, start_ticks })
    }

    /// True while this very process lives; a zombie does not.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }

    fn signal(&self, signal: Signal) {
        let fd = Pid::from_raw(self.pid).and_then(|p| pidfd_open(p, PidfdFlags::empty()).ok());
        // Looked at after the pidfd was opened, so both mean the same process.
        if let Some(fd) = fd.filter(|_| self.is_alive()) {
            let _ = pidfd_send_signal(&fd, signal);
        }
    }

    /// Program and working directory: what a postmaster and its backends have in common.
    fn home(&self) -> Option<(PathBuf, PathBuf)> {
        let link = |name: &str| fs::read_link(format!("/proc/{}/{name}", self.pid)).ok();
        Some((link("exe")?, link("cwd")?))
    }
}

fn all() -> impl Iterator<Item = i32> {
    let names = fs::read_dir("/proc").into_iter().flatten().flatten();
    names.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Kills, and returns when nothing of it is left. Backends are sessions of their own, so no process group
/// holds them; and an orphaned backend could still acknowledge a commit. A stopped postmaster forks no
/// more, so its children are complete; any that is missed is found by where it lives.
pub(crate) fn kill(postmaster: Target) {
    let home = postmaster.home();
    postmaster.signal(Signal::STOP);
    for _ in 0..STOP_POLLS {
        if stat(postmaster.pid).is_none_or(|s| !matches!(s.state, 'R' | 'S')) {
            break;
        }
        sleep(POLL);
    }
    let fired_ticks = boottime_ns() / NS_PER_TICK;
    let is_child = |pid: &i32| stat(*pid).is_some_and(|s| s.ppid == postmaster.pid);
    for child in all().filter(is_child).filter_map(Target::of) {
        child.signal(Signal::KILL);
    }
    postmaster.signal(Signal::KILL);
    loop {
        let mut left = postmaster.is_alive();
        // A server that the agent has started meanwhile is none of ours.
        for process in all()
            .filter_map(Target::of)
            .filter(|p| p.start_ticks <= fired_ticks)
        {
            if home.is_some() && process.home() == home {
                process.signal(Signal::KILL);
                left = true;
            }
        }
        if !left {
            return;
        }
        sleep(POLL);
    }
}
