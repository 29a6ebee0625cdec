//! Kills PostgreSQL when the lease's deadline passes. Small enough to be read in ten minutes.
//!
//! The agent fences itself; this covers an agent that hangs, is stopped, or was killed. It runs as a process
//! of its own and knows three things, which the agent writes to a [`Board`]: which postmaster to guard, until
//! when it may run, and whether it is armed at all (a standby needs no fence). Rules:
//!
//! * The deadline is an instant on `CLOCK_BOOTTIME`, which no operator can set and which counts in suspend.
//! * A process is named by pid *and* start time, so a pid that came to mean another process is left alone.
//! * Nothing is killed while unarmed, and nothing is forgiven: past the deadline the guarded server dies,
//!   all its backends with it, even if the agent comes back a moment later.
//! * If a write of the agent cannot be read, the last order that could be read stands; its deadline passes.
//!
//! The board is a file of 128 bytes, best on tmpfs ([`board_path`]): reading it must not wait for a disk.

mod kill;
mod watchdog;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{Timespec, poll};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, ftruncate, open};
use rustix::io::{Errno, pread, pwrite};
use rustix::time::{ClockId, clock_gettime};

use watchdog::Watchdog;

pub use kill::Target;
pub use watchdog::WatchdogState;

/// The longest time until an order is read again, and between two signs of life.
pub const PERIOD: Duration = Duration::from_millis(50);

/// A fence without a sign of life for this long is taken for dead.
const ALIVE_NS_MAX: u64 = 500_000_000;
const MAGIC: u64 = u64::from_le_bytes(*b"CRTNFNC1");
const WORDS: usize = 8;
const RECORD_BYTES: usize = WORDS * 8;
const ORDER_AT: u64 = 0;
const REPORT_AT: u64 = RECORD_BYTES as u64;
/// The highest priority without a real-time class.
const NICE: i32 = -20;
/// How often a record that is being written right now is read again.
const READ_TRIES: usize = 100;

/// What the agent wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Order {
    /// Kill when the deadline passes. Off while PostgreSQL is a standby.
    pub armed: bool,
    /// End the fence, if unarmed.
    pub quit: bool,
    /// Nanoseconds on `CLOCK_BOOTTIME`.
    pub deadline_ns: u64,
    /// The postmaster to guard.
    pub target: Option<Target>,
    /// The watchdog device's timeout, seconds; 0: none is wanted.
    pub watchdog_s: u64,
    /// How long after the deadline the device may fire, nanoseconds: within the margin, and late enough for
    /// the fence to kill PostgreSQL first.
    pub slack_ns: u64,
}

/// What the fence says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// Its pid.
    pub pid: u64,
    /// When it last looked, in nanoseconds on `CLOCK_BOOTTIME`.
    pub alive_ns: u64,
    /// When it last killed; 0 if never.
    pub fired_ns: u64,
    /// How often it killed.
    pub fired_count: u64,
    /// Its memory is locked, so that it cannot be swapped out.
    pub locked: bool,
    /// Its priority is the highest that needs no real-time class (nice -20).
    pub hurried: bool,
    /// The watchdog device.
    pub watchdog: WatchdogState,
}

impl Report {
    /// True if it looked within the last ten periods; an agent should lead only with a living fence.
    pub fn is_alive(&self, now_ns: u64) -> bool {
        self.alive_ns != 0 && now_ns.saturating_sub(self.alive_ns) < ALIVE_NS_MAX
    }
}

/// Now, in nanoseconds on `CLOCK_BOOTTIME`.
pub fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Where the board of a member belongs: on tmpfs if there is one, else in the member's directory.
pub fn board_path(member_dir: &Path) -> PathBuf {
    let shm = Path::new("/dev/shm");
    if !shm.is_dir() {
        return member_dir.join("fence.board");
    }
    let words = member_dir.as_os_str().as_bytes();
    let hash = words.iter().fold(FNV_BASIS, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(FNV_PRIME)
    });
    shm.join(format!(
        "craton-fence-{}-{hash:016x}",
        rustix::process::geteuid().as_raw()
    ))
}

const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0100_0000_01b3;

type Words = [u64; WORDS];

/// The file that agent and fence share.
#[derive(Debug)]
pub struct Board {
    file: OwnedFd,
}

impl Board {
    /// Opens the board, or makes one. A file of another user, or a link, is refused.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = open(path, flags, Mode::RUSR | Mode::WUSR)?;
        if fstat(&file)?.st_uid != rustix::process::geteuid().as_raw() {
            return Err(io::Error::other("the fence's board is another user's"));
        }
        ftruncate(&file, 2 * RECORD_BYTES as u64)?;
        Ok(Self { file })
    }

    /// The standing order; none before the first one.
    pub fn order(&self) -> io::Result<Option<Order>> {
        let Some(
            [
                _,
                flags,
                deadline_ns,
                pid,
                start_ticks,
                watchdog_s,
                slack_ns,
                _,
            ],
        ) = self.read(ORDER_AT)?
        else {
            return Ok(None);
        };
        let pid = i32::try_from(pid).ok().filter(|p| *p > 0);
        Ok(Some(Order {
            armed: flags & 1 != 0,
            quit: flags & 2 != 0,
            deadline_ns,
            target: pid.map(|pid| Target { pid, start_ticks }),
            watchdog_s,
            slack_ns,
        }))
    }

    /// Gives an order. Only one process may do so at a time.
    pub fn give(&self, order: &Order) -> io::Result<()> {
        let flags = u64::from(order.armed) | u64::from(order.quit) << 1;
        let pid = order
            .target
            .and_then(|t| u64::try_from(t.pid).ok())
            .unwrap_or(0);
        let ticks = order.target.map_or(0, |t| t.start_ticks);
        let (dog, slack) = (order.watchdog_s, order.slack_ns);
        let words = [MAGIC, flags, order.deadline_ns, pid, ticks, dog, slack, 0];
        self.write(ORDER_AT, words)
    }

    /// What the fence says; none before it first ran.
    pub fn report(&self) -> io::Result<Option<Report>> {
        Ok(self.read(REPORT_AT)?.map(|words| {
            let [_, pid, alive_ns, fired_ns, fired_count, awake, watchdog, _] = words;
            Report {
                pid,
                alive_ns,
                fired_ns,
                fired_count,
                locked: awake & 1 != 0,
                hurried: awake & 2 != 0,
                watchdog: WatchdogState::of_word(watchdog),
            }
        }))
    }

    fn say(&self, r: &Report) -> io::Result<()> {
        let awake = u64::from(r.locked) | u64::from(r.hurried) << 1;
        let words = [
            MAGIC,
            r.pid,
            r.alive_ns,
            r.fired_ns,
            r.fired_count,
            awake,
            r.watchdog.word(),
            0,
        ];
        self.write(REPORT_AT, words)
    }

    /// A record whose check sum fits; a half-written one is read again.
    fn read(&self, at: u64) -> io::Result<Option<Words>> {
        for _ in 0..READ_TRIES {
            let mut bytes = [0_u8; RECORD_BYTES];
            if pread(&self.file, &mut bytes, at)? != RECORD_BYTES || bytes == [0; RECORD_BYTES] {
                return Ok(None);
            }
            let mut words = [0; WORDS];
            for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
                *word = chunk.try_into().map_or(0, u64::from_le_bytes);
            }
            if words.first() == Some(&MAGIC) && words.last() == Some(&check_sum(&words)) {
                return Ok(Some(words));
            }
            rustix::thread::sched_yield();
        }
        Err(io::Error::other("a record on the fence's board is damaged"))
    }

    fn write(&self, at: u64, mut words: Words) -> io::Result<()> {
        let sum = check_sum(&words);
        if let Some(last) = words.last_mut() {
            *last = sum;
        }
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        match pwrite(&self.file, &bytes, at)? {
            RECORD_BYTES => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }
}

/// FNV-1a over all words but the last: it finds a torn write, not an enemy.
fn check_sum(words: &Words) -> u64 {
    let all = words.iter().take(WORDS - 1);
    all.fold(FNV_BASIS, |sum, word| {
        (sum ^ word).wrapping_mul(FNV_PRIME).rotate_left(29)
    })
}

/// Why a fence ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// The order said so, or the board was removed, while unarmed.
    Told,
    /// Another fence serves this board already.
    AnotherServes,
}

/// Serves a board until told to end. One fence per board: a second one returns at once. `watchdog` is the
/// device to feed, if one is to be used.
pub fn run(path: &Path, watchdog: Option<PathBuf>) -> io::Result<Ended> {
    let board = Board::open(path)?;
    match flock(&board.file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(Ended::AnotherServes),
        Err(e) => return Err(e.into()),
    }
    let earlier = board.report().ok().flatten().unwrap_or_default();
    let (locked, hurried) = stay_awake();
    let mut report = Report {
        pid: u64::from(std::process::id()),
        locked,
        hurried,
        ..earlier
    };
    let mut order = Order::default();
    let mut watchdog = Watchdog::new(watchdog);
    loop {
        if let Ok(Some(now)) = board.order() {
            order = now;
        }
        if !order.armed && (order.quit || fstat(&board.file)?.st_nlink == 0) {
            watchdog.stop();
            return Ok(Ended::Told);
        }
        let now = boottime_ns();
        if order.armed
            && now >= order.deadline_ns
            && let Some(target) = order.target.filter(Target::is_alive)
        {
            kill::kill(target);
            report.fired_ns = boottime_ns();
            report.fired_count += 1;
        }
        let guarded = order.armed && order.target.as_ref().is_some_and(Target::is_alive);
        let until = order.deadline_ns.saturating_add(order.slack_ns);
        report.watchdog = watchdog.tend(order.watchdog_s, guarded.then_some(until), boottime_ns());
        report.alive_ns = boottime_ns();
        // A full tmpfs must not stop the guard; the agent sees the missing sign of life.
        let _ = board.say(&report);
        let left = Duration::from_nanos(order.deadline_ns.saturating_sub(now)).min(PERIOD);
        sleep(if order.armed && !left.is_zero() {
            left
        } else {
            PERIOD
        });
    }
}

/// Asks for what keeps the fence on time; all of it is optional, and the limits of the service decide (`LimitNICE`,
/// `LimitMEMLOCK`). Returns whether the memory is locked and whether the priority is the highest. A real-time class
/// would be better still: rustix has no call for it, and a dependency for one call is not worth it here.
fn stay_awake() -> (bool, bool) {
    let hurried = rustix::process::setpriority_process(None, NICE).is_ok();
    // Where a service's own score is low already, only root may go lower, and that one stays.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    // Only what is there now: under a limit, locking the future would make an allocation fail.
    let locked = rustix::mm::mlockall(rustix::mm::MlockAllFlags::CURRENT).is_ok();
    (locked, hurried)
}

pub(crate) fn sleep(time: Duration) {
    let Ok(time) = Timespec::try_from(time) else {
        return;
    };
    // A signal may cut it short, which only means that the order is read earlier.
    let _ = poll(&mut [], Some(&time));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let board = Board::open(&dir.path().join("board")).unwrap();
        for (locked, hurried) in [(false, false), (true, false), (false, true), (true, true)] {
            let report = Report {
                pid: 7,
                alive_ns: 5,
                fired_ns: 3,
                fired_count: 2,
                locked,
                hurried,
                watchdog: WatchdogState::Armed,
            };
            board.say(&report).unwrap();
            assert_eq!(board.report().unwrap(), Some(report));
        }
    }
}
