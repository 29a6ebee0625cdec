//! The first process of a container: starts the daemon and what helps it, passes signals on, takes the dead away.
//!
//! A daemon that dies is started again at once, and inside its lease: PostgreSQL outlives its agent, so that is no
//! failover. What ends in order ends the container. A node that was removed from the cluster stays as it is, without its
//! daemon, until somebody decides: the container's restart policy would only start it to be told the same again.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until};

use super::environment::Kind;
use crate::cli::wait_for;
use crate::exit;

/// The pause before something that died is started again, at first …
const RESTART_MIN: Duration = Duration::from_millis(50);
/// … and at most, where it dies again and again.
const RESTART_MAX: Duration = Duration::from_secs(5);
/// Something that ran for so long did not die of its start.
const RAN_LONG: Duration = Duration::from_secs(30);
/// A helper that hands over may take so long beyond its own limit.
const LEAVE_SLACK: Duration = Duration::from_secs(1);

/// A child that is kept running.
struct Kept {
    args: Vec<&'static str>,
    pid: Option<Pid>,
    started: Instant,
    pause: Duration,
    again_at: Option<Instant>,
}

impl Kept {
    fn new(args: &[&'static str]) -> Self {
        Self {
            args: args.to_vec(),
            pid: None,
            started: Instant::now(),
            pause: RESTART_MIN,
            again_at: None,
        }
    }

    fn start(&mut self) -> anyhow::Result<()> {
        self.started = Instant::now();
        self.pid = Some(spawn(&self.args)?);
        self.again_at = None;
        Ok(())
    }

    /// As [`Self::start`], later: PostgreSQL must not be killed because a process cannot be started just now.
    fn start_again(&mut self) {
        if let Err(error) = self.start() {
            tracing::error!("{error:#}; it is tried again");
            self.died();
        }
    }

    /// Says when it is started again.
    fn died(&mut self) {
        self.pid = None;
        if self.started.elapsed() >= RAN_LONG {
            self.pause = RESTART_MIN;
        }
        self.again_at = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(RESTART_MAX);
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid {
            // It may have died just now.
            let _ = kill_process(pid, signal);
        }
    }
}

fn spawn(args: &[impl AsRef<OsStr>]) -> anyhow::Result<Pid> {
    let child = Command::new("/proc/self/exe")
        .arg0("craton")
        .args(args)
        .spawn()
        .context("cannot start a process of this container")?;
    // It is waited for together with everything else.
    i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .context("a process without an id")
}

/// How the container was told to stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stop {
    /// SIGTERM: a leader hands over first, then as [`Self::Fast`].
    Smart,
    /// SIGINT: PostgreSQL is stopped in order.
    Fast,
    /// SIGQUIT: PostgreSQL is killed and recovers when it is started.
    Immediate,
}

/// Runs until the daemon ends in order, or after a signal. Returns the daemon's exit code.
pub fn run(kind: Kind) -> anyhow::Result<u8> {
    crate::daemons::log_to_stderr("info", false);
    wait_for(async move {
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for signals")?;
        let mut quit = signal(SignalKind::quit()).context("cannot wait for signals")?;
        let mut children = signal(SignalKind::child()).context("cannot wait for signals")?;
        let mut init = Init {
            kind,
            daemon: Kept::new(&["container", "daemon", kind.as_str()]),
            side: Kept::new(&["container", "side"]),
            leaving: None,
            stop: None,
        };
        init.side.start()?;
        init.daemon.start()?;
        loop {
            if let Some(code) = init.reap() {
                return Ok(code);
            }
            let next = init.next_start();
            let stop = tokio::select! {
                _ = terminate.recv() => Stop::Smart,
                _ = interrupt.recv() => Stop::Fast,
                _ = quit.recv() => Stop::Immediate,
                _ = children.recv() => continue,
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                    init.start_due();
                    continue;
                }
            };
            if let Some(code) = init.told(stop) {
                return Ok(code);
            }
        }
    })
}

struct Init {
    kind: Kind,
    daemon: Kept,
    side: Kept,
    /// The helper that hands the leadership over, and until when it is waited for.
    leaving: Option<(Pid, Instant)>,
    stop: Option<Stop>,
}

impl Init {
    /// Takes all dead children away; the daemon's exit code where that is the end.
    fn reap(&mut self) -> Option<u8> {
        loop {
            let (pid, status) = match wait(WaitOptions::NOHANG) {
                Ok(Some(dead)) => dead,
                Ok(None) | Err(rustix::io::Errno::CHILD) => return None,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => {
                    tracing::error!("cannot wait for children: {error}");
                    return None;
                }
            };
            if self.daemon.pid == Some(pid) {
                if let Some(code) = self.daemon_ended(status) {
                    self.side.signal(Signal::TERM);
                    return Some(code);
                }
            } else if self.side.pid == Some(pid) {
                if self.stop.is_none() {
                    tracing::warn!(
                        status = status_text(status),
                        "the helper of this container ended; it is started again"
                    );
                }
                self.side.died();
            } else if self.leaving.is_some_and(|(leaving, _)| leaving == pid) {
                self.leaving = None;
                self.daemon.signal(Signal::TERM);
            }
            // Everything else was somebody's orphan.
        }
    }

    fn daemon_ended(&mut self, status: WaitStatus) -> Option<u8> {
        let code = status
            .exit_status()
            .map(|code| u8::try_from(code).unwrap_or(exit::FAILURE));
        match after(code, self.kind, self.stop.is_some()) {
            After::Ends(code) => Some(code),
            After::Killed => {
                // As a shell has it.
                let signal = status.terminating_signal();
                let code = signal.and_then(|s| u8::try_from(s.saturating_add(128)).ok());
                Some(code.unwrap_or(exit::FAILURE))
            }
            After::StaysDown => {
                self.daemon.pid = None;
                tracing::error!(
                    "this node was removed from the cluster: PostgreSQL is stopped, its files stay, and this container only waits; {}",
                    exit::SET_ASIDE
                );
                None
            }
            After::Again => {
                self.daemon.died();
                tracing::warn!(
                    status = status_text(status),
                    "the daemon ended; it is started again"
                );
                None
            }
        }
    }

    fn next_start(&self) -> Option<Instant> {
        let deadline = self.leaving.map(|(_, until)| until);
        let starts = [self.daemon.again_at, self.side.again_at];
        let starts = starts.into_iter().flatten().filter(|_| self.stop.is_none());
        starts.chain(deadline).min()
    }

    fn start_due(&mut self) {
        let now = Instant::now();
        if let Some((pid, until)) = self.leaving
            && now >= until
        {
            let _ = kill_process(pid, Signal::KILL);
        }
        if self.stop.is_some() {
            return;
        }
        for kept in [&mut self.daemon, &mut self.side] {
            if kept.again_at.is_some_and(|at| now >= at) {
                kept.start_again();
            }
        }
    }

    /// A second, harder word goes over a softer one. The exit code where nothing is left to be stopped. No error leaves
    /// from here: with this process everything in the container would be killed.
    fn told(&mut self, stop: Stop) -> Option<u8> {
        tracing::info!(?stop, "told to stop");
        let first = self.stop.replace(stop).is_none();
        if self.daemon.pid.is_none() {
            return Some(exit::OK);
        }
        match stop {
            Stop::Smart if first && self.kind == Kind::Node => {
                let limit = super::leave::limit();
                match spawn(&["container", "leave"]) {
                    Ok(pid) => self.leaving = Some((pid, Instant::now() + limit + LEAVE_SLACK)),
                    Err(error) => {
                        tracing::error!("{error:#}: PostgreSQL is stopped without a handover");
                        self.daemon.signal(Signal::TERM);
                    }
                }
            }
            Stop::Smart | Stop::Fast => self.daemon.signal(Signal::TERM),
            // The agent ends without a word; with the container everything in it is killed.
            Stop::Immediate => self.daemon.signal(Signal::QUIT),
        }
        None
    }
}

/// What becomes of the container when its daemon has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum After {
    /// It ends, too.
    Ends(u8),
    /// It ends: its daemon was killed while it was to stop.
    Killed,
    /// The daemon is started again.
    Again,
    /// It stays, without a daemon.
    StaysDown,
}

/// `code` is none where a signal ended the daemon.
fn after(code: Option<u8>, kind: Kind, stopping: bool) -> After {
    match code {
        Some(exit::REMOVED) if !stopping && kind == Kind::Node => After::StaysDown,
        // What it says itself (of its settings, say) another start would not change.
        Some(code) if stopping || code != exit::FAILURE || kind != Kind::Node => After::Ends(code),
        None if stopping => After::Killed,
        Some(_) | None => After::Again,
    }
}

fn status_text(status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "unknown".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_becomes_of_a_container_whose_daemon_ended() {
        let (node, proxy) = (Kind::Node, Kind::Proxy);
        for (code, kind, stopping, expected) in [
            (Some(exit::REMOVED), node, false, After::StaysDown),
            (Some(exit::REMOVED), node, true, After::Ends(exit::REMOVED)),
            (Some(exit::FAILURE), node, false, After::Again),
            (None, node, false, After::Again),
            (None, proxy, false, After::Again),
            (Some(exit::OK), node, false, After::Ends(exit::OK)),
            (Some(exit::USAGE), node, false, After::Ends(exit::USAGE)),
            (
                Some(exit::FAILURE),
                proxy,
                false,
                After::Ends(exit::FAILURE),
            ),
            (Some(exit::OK), node, true, After::Ends(exit::OK)),
            (None, node, true, After::Killed),
        ] {
            assert_eq!(
                after(code, kind, stopping),
                expected,
                "{code:?} {kind:?} {stopping}"
            );
        }
    }
}
