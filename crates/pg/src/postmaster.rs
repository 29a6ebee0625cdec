//! A running postmaster: held by pidfd, so that its pid can never come to mean another process.
//!
//! A postmaster outlives the agent that started it, and a later agent adopts it. Both get the same
//! handle: exit is seen through the pidfd, in milliseconds, whether or not it is our child.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{PgError, Result};
use crate::processes::{self, Stat};

/// How a server starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StartMode {
    /// As a standby (`standby.signal`), writable only after a promotion.
    Standby,
    /// Writable as soon as it accepts connections.
    Primary,
}

/// How a server stops.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopMode {
    /// Waits for clients to leave.
    Smart,
    /// Ends clients' transactions, writes a checkpoint, sends all WAL to connected standbys.
    Fast,
    /// Stops at once; the next start recovers.
    Immediate,
}

/// How a postmaster ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExitReason {
    /// It exited by itself with this status; 0 after an orderly shutdown.
    Status(i32),
    /// It was killed by this signal.
    Signal(i32),
    /// It was no child of ours, so its status went to its parent.
    Unknown,
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status(status) => write!(f, "exit status {status}"),
            Self::Signal(signal) => write!(f, "killed by signal {signal}"),
            Self::Unknown => f.write_str("exit status not known"),
        }
    }
}

#[derive(Debug)]
struct Inner {
    stat: Stat,
    pidfd: AsyncFd<OwnedFd>,
    data_dir: PathBuf,
    exit: OnceLock<ExitReason>,
}

/// A handle to one postmaster. Clones are handles to the same one. Dropping it does nothing to PostgreSQL.
#[derive(Clone, Debug)]
pub struct Postmaster {
    inner: Arc<Inner>,
}

impl Postmaster {
    /// Takes hold of a process. `data_dir` must be its canonical working directory. Must be called inside
    /// a tokio runtime.
    pub(crate) fn hold(pid: i32, data_dir: &Path) -> io::Result<Self> {
        // A server in single-user mode writes its own number with a minus: no postmaster.
        let raw = Some(pid).filter(|pid| *pid > 0).and_then(Pid::from_raw);
        let pidfd = pidfd_open(
            raw.ok_or(io::ErrorKind::InvalidInput)?,
            PidfdFlags::NONBLOCK,
        )?;
        // Read after the pidfd is open: if the pidfd still lives now, both mean the same process.
        let stat = Stat::read(pid).ok_or(io::ErrorKind::NotFound)?;
        // Its successor is unsafe, for types whose descriptor may change; an OwnedFd's does not.
        #[expect(
            deprecated,
            reason = "the replacement is unsafe and buys nothing for an OwnedFd"
        )]
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
        Ok(Self {
            inner: Arc::new(Inner {
                stat,
                pidfd,
                data_dir: data_dir.to_owned(),
                exit: OnceLock::new(),
            }),
        })
    }

    /// The postmaster's pid.
    pub fn pid(&self) -> i32 {
        self.inner.stat.pid
    }

    /// Clock ticks from boot to its start: with the pid, its name for good (the fence wants both).
    pub fn start_ticks(&self) -> u64 {
        self.inner.stat.start_ticks
    }

    /// Waits until it has ended. Any number of callers may wait, and again after the end.
    pub async fn exited(&self) -> ExitReason {
        // A pidfd stays readable once its process has ended. An error here would mean that the descriptor
        // is not a pidfd, which `hold` excludes; then polling still gives the answer.
        while self.is_running() {
            match self.inner.pidfd.readable().await {
                Ok(mut guard) if self.is_running() => guard.clear_ready(),
                Ok(_) => break,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
        self.reap()
    }

    /// True until it has ended.
    pub fn is_running(&self) -> bool {
        let fd = self.inner.pidfd.get_ref();
        let mut fds = [PollFd::new(fd, PollFlags::IN)];
        let zero = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match poll(&mut fds, Some(&zero)) {
            Ok(0) => true,
            Ok(_) => false,
            Err(_) => Stat::read(self.pid())
                .is_some_and(|s| s.start_ticks == self.start_ticks() && s.is_alive()),
        }
    }

    /// Collects the exit status, once, if it is our child.
    fn reap(&self) -> ExitReason {
        *self.inner.exit.get_or_init(|| {
            let id = WaitId::PidFd(self.inner.pidfd.get_ref().as_fd());
            match waitid(id, WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
                Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => ExitReason::Status(code),
                    (None, Some(signal)) => ExitReason::Signal(signal),
                    (None, None) => ExitReason::Unknown,
                },
                Ok(None) | Err(_) => ExitReason::Unknown,
            }
        })
    }

    /// Sends a signal; a process that has ended is no error.
    fn signal(&self, signal: Signal) -> Result<()> {
        match pidfd_send_signal(self.inner.pidfd.get_ref(), signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(PgError::io(
                "cannot signal the postmaster of",
                &self.inner.data_dir,
            )(e.into())),
        }
    }

    /// Makes it read its configuration files again. Returns before it, or anyone of its children, has.
    pub fn reload(&self) -> Result<()> {
        self.signal(Signal::HUP)
    }

    /// From PostgreSQL 17 on: wakes a standby's worker that copies logical slots. False if there is none now.
    pub fn wake_slot_sync(&self) -> bool {
        processes::hang_up_child(self.pid(), "slotsync worker")
    }

    /// Asks it to stop and waits for the end. After a `Timeout` it may still be stopping.
    pub async fn stop(&self, mode: StopMode, limit: Duration) -> Result<ExitReason> {
        self.signal(match mode {
            StopMode::Smart => Signal::TERM,
            StopMode::Fast => Signal::INT,
            StopMode::Immediate => Signal::QUIT,
        })?;
        tokio::time::timeout(limit, self.exited())
            .await
            .map_err(|_| PgError::Timeout {
                what: "stopping PostgreSQL",
                limit,
            })
    }

    /// SIGKILLs the postmaster and every process of the instance, and waits until all are gone: after it
    /// returns `Ok`, nothing of this server can acknowledge a commit.
    pub async fn kill_all(&self, limit: Duration) -> Result<()> {
        processes::kill_all(self.inner.stat, self.inner.data_dir.clone(), limit).await?;
        tokio::time::timeout(limit, self.exited())
            .await
            .map_err(|_| PgError::Unkillable {
                pids: vec![self.pid()],
                limit,
            })?;
        Ok(())
    }
}
