//! Keeps the fence process alive and tells it whom to guard and until when.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use craton_core::BootTime;
use craton_fence::{Board, Order, Report, Target, WatchdogState, board_path, boottime_ns};
use craton_pg::Postmaster;
use rustix::process::{Pid, Signal, kill_process};

use crate::config::{AgentConfig, WatchdogMode};

/// How often the fence's sign of life is looked at.
const CHECK: Duration = Duration::from_millis(250);
/// A fence that was told to end gets this long, in nanoseconds.
const END_NS_MAX: u64 = 1_000_000_000;
/// A fence that was just started gets this long for its first sign of life.
const START_MAX: Duration = Duration::from_secs(2);

/// The fence, as the agent holds it. A fence outlives its agent: the next one finds it at work.
pub struct Fencing {
    program: PathBuf,
    path: PathBuf,
    board: Board,
    order: Mutex<Order>,
    child: Mutex<Option<Child>>,
    watchdog: WatchdogMode,
    device: PathBuf,
}

/// The watchdog device counts in whole seconds, and the fence must be able to feed it this often before it
/// would fire.
const FEEDS_MIN: u32 = 2;
/// The device is opened with the first round after a primary is guarded.
const ARMED_MAX: Duration = Duration::from_secs(1);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fencing {
    /// Opens the member's board, with the standing order of an earlier agent if there is one.
    pub fn start(config: &AgentConfig) -> io::Result<Arc<Self>> {
        let program = match &config.fence_program {
            Some(program) => program.clone(),
            None => std::env::current_exe()?,
        };
        let path = board_path(&config.dir);
        let board = Board::open(&path)?;
        let mut order = board.order().ok().flatten().unwrap_or_default();
        order.quit = false;
        board.give(&order)?;
        let fencing = Self {
            program,
            path,
            board,
            order: Mutex::new(order),
            child: Mutex::new(None),
            watchdog: config.watchdog,
            device: config.watchdog_device.clone(),
        };
        fencing.end_if_changed();
        if !fencing.is_alive() {
            fencing.spawn()?;
        }
        Ok(Arc::new(fencing))
    }

    /// Why the fence could not stop a primary now; none if it could.
    pub fn trouble(&self) -> Option<String> {
        let Some(report) = self.report().filter(|r| r.is_alive(boottime_ns())) else {
            return Some("the fence gives no sign of life, and is being started again".to_owned());
        };
        self.watchdog_trouble(&report)
    }

    /// Why a watchdog that is required does not serve.
    fn watchdog_trouble(&self, report: &Report) -> Option<String> {
        if self.watchdog != WatchdogMode::Required {
            return None;
        }
        let device = self.device.display();
        let why = match report.watchdog {
            WatchdogState::Armed | WatchdogState::Ready if lock(&self.order).watchdog_s == 0 => {
                "ttl_ms is too short for a device that counts in seconds: use 2000 or more"
                    .to_owned()
            }
            WatchdogState::Armed | WatchdogState::Ready => return None,
            WatchdogState::Missing => format!(
                "{device} does not exist, or this user may not write to it (a udev rule can allow that)"
            ),
            WatchdogState::Unusable => format!(
                "{device} is in use by another process, or its timeout cannot be made short enough"
            ),
            WatchdogState::Off => {
                "the fence that runs was started without it; it is replaced when PostgreSQL is down"
                    .to_owned()
            }
        };
        Some(format!("node.watchdog = \"required\", but {why}"))
    }

    /// How the watchdog device stands.
    pub fn watchdog_state(&self) -> WatchdogState {
        self.report().map(|r| r.watchdog).unwrap_or_default()
    }

    /// The lease's times as the settings have them: the device must fire within the margin.
    pub fn set_timing(&self, ttl: Duration, margin: Duration, heartbeat: Duration) {
        let lease = ttl.saturating_sub(margin);
        let slack = margin / 2;
        let timeout = Duration::from_secs((lease / 2).as_secs().max(1));
        let long_enough = lease + slack >= timeout + heartbeat * FEEDS_MIN;
        let used = self.watchdog != WatchdogMode::Off && long_enough;
        self.give(|o| {
            o.watchdog_s = if used { timeout.as_secs() } else { 0 };
            o.slack_ns = u64::try_from(slack.as_nanos()).unwrap_or(0);
        });
    }

    /// Waits until a watchdog that is required guards the primary, before the primary may write.
    pub async fn wait_armed(&self) -> Result<(), String> {
        if self.watchdog != WatchdogMode::Required {
            return Ok(());
        }
        let armed = async {
            while self.watchdog_state() != WatchdogState::Armed {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(ARMED_MAX, armed).await.is_ok() {
            return Ok(());
        }
        Err(self
            .trouble()
            .unwrap_or_else(|| format!("the watchdog {} was not opened", self.device.display())))
    }

    /// A fence that an agent with another configuration started knows another device (or none).
    fn end_if_changed(&self) {
        let wanted = self.watchdog != WatchdogMode::Off;
        let has = self.watchdog_state() != WatchdogState::Off;
        let idle = !lock(&self.order).armed;
        if self.is_alive() && wanted != has && idle {
            self.end_frozen();
        }
    }

    /// What the fence said last.
    pub fn report(&self) -> Option<Report> {
        self.board.report().ok().flatten()
    }

    fn is_alive(&self) -> bool {
        self.report().is_some_and(|r| r.is_alive(boottime_ns()))
    }

    /// Times that it killed PostgreSQL, as it says itself.
    pub fn fired_count(&self) -> u64 {
        self.board
            .report()
            .ok()
            .flatten()
            .map_or(0, |r| r.fired_count)
    }

    fn spawn(&self) -> io::Result<()> {
        let mut child = lock(&self.child);
        if let Some(mut old) = child.take() {
            let _ = old.kill();
            let _ = old.wait();
        }
        // A group of its own, so that a signal to the agent's group does not reach it.
        let mut command = Command::new(&self.program);
        command.arg("fence").arg(&self.path);
        if self.watchdog != WatchdogMode::Off {
            command.arg("--watchdog").arg(&self.device);
        }
        let started = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()?;
        *child = Some(started);
        Ok(())
    }

    fn give(&self, change: impl FnOnce(&mut Order)) {
        let mut order = lock(&self.order);
        let before = *order;
        change(&mut order);
        if *order != before
            && let Err(error) = self.board.give(&order)
        {
            tracing::error!(%error, path = %self.path.display(), "cannot tell the fence; its last order stands");
        }
    }

    /// From now on this postmaster may run only until the deadline.
    pub fn guard(&self, process: &Postmaster) {
        let target = Target {
            pid: process.pid(),
            start_ticks: process.start_ticks(),
        };
        self.give(|o| {
            o.target = Some(target);
            o.armed = true;
        });
    }

    /// True while the last deadline that was given has not passed.
    pub fn is_before_deadline(&self) -> bool {
        lock(&self.order).deadline_ns > boottime_ns()
    }

    /// The deadline; none means that it has passed.
    pub fn deadline(&self, until: Option<BootTime>) {
        self.give(|o| o.deadline_ns = until.map_or(0, |t| t.0));
    }

    /// Nothing here may be killed: PostgreSQL is down, or a standby.
    pub fn rest(&self) {
        self.give(|o| {
            o.armed = false;
            o.target = None;
        });
    }

    /// The agent ends in order, with PostgreSQL stopped: the fence is not needed.
    pub fn end(&self) {
        self.give(|o| {
            *o = Order {
                quit: true,
                ..Order::default()
            }
        });
        let child = lock(&self.child).take();
        if let Some(mut child) = child {
            // It looks at the board at least every PERIOD, and stops the watchdog device before it ends.
            let deadline = boottime_ns().saturating_add(END_NS_MAX);
            while matches!(child.try_wait(), Ok(None)) && boottime_ns() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_file(&self.path);
    }

    /// Replaces a fence that was killed, or that is frozen, for as long as the agent lives.
    pub async fn keep_alive(self: Arc<Self>) {
        loop {
            tokio::time::sleep(CHECK).await;
            if self.is_alive() {
                continue;
            }
            tracing::warn!("the fence gives no sign of life; replacing it");
            self.end_frozen();
            if let Err(error) = self.spawn() {
                tracing::error!(%error, "cannot start the fence");
            }
            let _ = tokio::time::timeout(START_MAX, async {
                while !self.is_alive() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            })
            .await;
        }
    }

    /// A fence that is frozen, or out of date, holds the board's lock: it must go before another can serve.
    fn end_frozen(&self) {
        let Some(pid) = self
            .board
            .report()
            .ok()
            .flatten()
            .and_then(|r| i32::try_from(r.pid).ok())
        else {
            return;
        };
        let title = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let ours = title
            .split(|b| *b == 0)
            .any(|word| word == self.path.as_os_str().as_encoded_bytes());
        if let Some(pid) = Pid::from_raw(pid).filter(|_| ours) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}
