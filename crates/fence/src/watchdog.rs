//! The kernel's watchdog device, fed while a primary may run: if nobody is left to feed it, the host restarts.
//!
//! It covers what the fence cannot: a kernel that does not let the fence run, and processes that do not die. It does
//! not cover a virtual machine that is paused: `softdog` is a timer of the paused guest, and the clock of an emulated
//! device may stop with it. Its clock counts whole seconds, so it is not fed up to the deadline but up to `timeout` before
//! it (and a slack after, in which the fence kills PostgreSQL first): it never fires while the lease is
//! renewed, and at the latest when nobody else may lead yet. Protocol: Documentation/watchdog/watchdog-api.rst.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, Mode, OFlags, access, open};
use rustix::io::{Errno, write};
use rustix::ioctl::{Getter, Opcode, Updater, ioctl, opcode};

/// `WDIOC_GETSUPPORT`, `WDIOC_SETTIMEOUT` (linux/watchdog.h).
const GET_SUPPORT: Opcode = opcode::read::<Support>(b'W', 0);
const SET_TIMEOUT: Opcode = opcode::read_write::<i32>(b'W', 6);
/// The device stops when this byte is the last before it is closed.
const MAGIC_CLOSE: &[u8] = b"V";
const WDIOF_MAGICCLOSE: u32 = 0x0100;
/// A device that could not be used is tried again after this long.
const RETRY_NS: u64 = 1_000_000_000;

/// `struct watchdog_info`.
#[repr(C)]
struct Support {
    options: u32,
    firmware: u32,
    identity: [u8; 32],
}

/// How the device stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum WatchdogState {
    /// None is asked for.
    #[default]
    Off,
    /// It is there, and will be opened when a primary is guarded.
    Ready,
    /// It runs, and is fed.
    Armed,
    /// There is none, or this user may not open it.
    Missing,
    /// It is no watchdog, another process has it, or its timeout cannot be made short enough.
    Unusable,
}

impl WatchdogState {
    const ALL: [Self; 5] = [
        Self::Off,
        Self::Ready,
        Self::Armed,
        Self::Missing,
        Self::Unusable,
    ];

    pub(crate) fn word(self) -> u64 {
        Self::ALL.iter().position(|s| *s == self).unwrap_or(0) as u64
    }

    pub(crate) fn of_word(word: u64) -> Self {
        let at = usize::try_from(word).unwrap_or(0);
        Self::ALL.get(at).copied().unwrap_or_default()
    }
}

/// An open device.
struct Device {
    fd: OwnedFd,
    /// It stops when it is closed with the magic byte; otherwise it must be fed for good.
    closes: bool,
}

impl Device {
    /// Opening starts it. What cannot be given the timeout is stopped again at once.
    fn open(path: &Path, timeout_s: u64) -> Result<Self, WatchdogState> {
        let fd =
            open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|e| match e {
                Errno::NOENT | Errno::ACCESS | Errno::PERM => WatchdogState::Missing,
                _ => WatchdogState::Unusable,
            })?;
        let closes = supports_magic_close(&fd);
        let device = Self { fd, closes };
        let mut timeout = i32::try_from(timeout_s).unwrap_or(i32::MAX);
        match set_timeout(&device.fd, &mut timeout) {
            // The driver answers with what it really took.
            Ok(()) if u64::try_from(timeout).is_ok_and(|t| t <= timeout_s) => Ok(device),
            _ => {
                device.stop();
                Err(WatchdogState::Unusable)
            }
        }
    }

    fn feed(&self) {
        // A failed feeding is what the device is there for.
        let _ = write(&self.fd, b"\0");
    }

    fn stop(self) {
        let _ = write(&self.fd, MAGIC_CLOSE);
    }
}

#[allow(
    unsafe_code,
    reason = "rustix leaves it to the caller to name the right type"
)]
fn supports_magic_close(fd: &OwnedFd) -> bool {
    // SAFETY: WDIOC_GETSUPPORT fills a struct watchdog_info, which Support is; any other file answers ENOTTY.
    let info = unsafe { ioctl(fd, Getter::<GET_SUPPORT, Support>::new()) };
    info.is_ok_and(|i| i.options & WDIOF_MAGICCLOSE != 0)
}

#[allow(
    unsafe_code,
    reason = "rustix leaves it to the caller to name the right type"
)]
fn set_timeout(fd: &OwnedFd, seconds: &mut i32) -> rustix::io::Result<()> {
    // SAFETY: WDIOC_SETTIMEOUT reads and writes one int; any other file answers ENOTTY.
    unsafe { ioctl(fd, Updater::<SET_TIMEOUT, i32>::new(seconds)) }
}

/// The device as the fence holds it.
pub(crate) struct Watchdog {
    path: Option<PathBuf>,
    device: Option<Device>,
    refused: Option<(WatchdogState, u64)>,
}

impl Watchdog {
    pub(crate) fn new(path: Option<PathBuf>) -> Self {
        Self {
            path,
            device: None,
            refused: None,
        }
    }

    /// The fence ends in order. A device that cannot be stopped restarts the host unless another feeds it.
    pub(crate) fn stop(&mut self) {
        if let Some(device) = self.device.take_if(|d| d.closes) {
            device.stop();
        }
    }

    /// One round: `until_ns` is how long it may be fed, none if no primary is guarded.
    pub(crate) fn tend(
        &mut self,
        timeout_s: u64,
        until_ns: Option<u64>,
        now_ns: u64,
    ) -> WatchdogState {
        let Some(path) = self.path.clone() else {
            return WatchdogState::Off;
        };
        let wanted = until_ns.filter(|_| timeout_s > 0);
        let in_time = wanted.is_some_and(|until| {
            now_ns.saturating_add(timeout_s.saturating_mul(1_000_000_000)) <= until
        });
        if wanted.is_none() {
            self.stop();
        }
        if let Some(device) = &self.device {
            // One that cannot be stopped is fed while no primary is guarded.
            if in_time || wanted.is_none() {
                device.feed();
            }
            return WatchdogState::Armed;
        }
        if let Some((state, at)) = self.refused
            && now_ns.saturating_sub(at) < RETRY_NS
        {
            return state;
        }
        if !in_time {
            self.refused = None;
            return if access(&path, Access::WRITE_OK).is_ok() {
                WatchdogState::Ready
            } else {
                WatchdogState::Missing
            };
        }
        match Device::open(&path, timeout_s) {
            Ok(device) => {
                device.feed();
                self.device = Some(device);
                self.refused = None;
                WatchdogState::Armed
            }
            Err(state) => {
                self.refused = Some((state, now_ns));
                state
            }
        }
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on must say where"
)]
mod tests {
    use super::*;
    use rustix::io::read;
    use rustix::pipe::pipe;

    const SECOND: u64 = 1_000_000_000;

    /// A device that is a pipe: what it is fed can be read.
    fn stand_in(closes: bool) -> (Watchdog, OwnedFd) {
        let (reader, fd) = pipe().unwrap();
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        let dog = Watchdog {
            path: Some("/nowhere".into()),
            device: Some(Device { fd, closes }),
            refused: None,
        };
        (dog, reader)
    }

    fn fed(reader: &OwnedFd) -> Vec<u8> {
        let mut bytes = [0; 64];
        let n = read(reader, &mut bytes).unwrap_or(0);
        bytes[..n].to_vec()
    }

    #[test]
    fn it_is_fed_until_it_would_outlive_the_deadline() {
        let (mut dog, reader) = stand_in(true);
        let until = 10 * SECOND;
        assert_eq!(dog.tend(1, Some(until), 8 * SECOND), WatchdogState::Armed);
        assert_eq!(fed(&reader), b"\0");
        assert_eq!(dog.tend(1, Some(until), 9 * SECOND), WatchdogState::Armed);
        assert_eq!(fed(&reader), b"\0");
        assert_eq!(
            dog.tend(1, Some(until), 9 * SECOND + 1),
            WatchdogState::Armed
        );
        assert_eq!(fed(&reader), b"", "it would fire after the deadline");
        assert_eq!(
            dog.tend(1, Some(until + SECOND), 9 * SECOND + 2),
            WatchdogState::Armed
        );
        assert_eq!(fed(&reader), b"\0", "the lease was renewed");
    }

    #[test]
    fn it_is_stopped_when_no_primary_is_guarded() {
        let (mut dog, reader) = stand_in(true);
        assert_eq!(dog.tend(1, None, SECOND), WatchdogState::Missing);
        assert_eq!(fed(&reader), b"V");
        // A kernel with `nowayout` does not let it be stopped: closing it would restart the host.
        let (mut dog, reader) = stand_in(false);
        assert_eq!(dog.tend(1, None, SECOND), WatchdogState::Armed);
        assert_eq!(fed(&reader), b"\0");
    }

    #[test]
    fn what_is_no_watchdog_is_not_taken_for_one() {
        let open = |path: &str| {
            let mut dog = Watchdog::new(Some(path.into()));
            let before = dog.tend(1, None, SECOND);
            (
                before,
                dog.tend(1, Some(10 * SECOND), SECOND),
                dog.device.is_some(),
            )
        };
        // ENOTTY, as from every file that is no watchdog.
        assert_eq!(
            open("/dev/null"),
            (WatchdogState::Ready, WatchdogState::Unusable, false)
        );
        assert_eq!(
            open("/dev/there-is-none"),
            (WatchdogState::Missing, WatchdogState::Missing, false)
        );
        let mut off = Watchdog::new(None);
        assert_eq!(off.tend(1, Some(10 * SECOND), SECOND), WatchdogState::Off);
    }
}
