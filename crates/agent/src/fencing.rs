//! Keeps the fence process alive and tells it whom to guard and until when.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use craton_core::BootTime;
use craton_fence::{Board, Order, Target, board_path, boottime_ns};
use craton_pg::Postmaster;
use rustix::process::{Pid, Signal, kill_process};

use crate::config::AgentConfig;

/// How often the fence's sign of life is looked at.
const CHECK: Duration = Duration::from_millis(250);
/// A fence that was just started gets this long for its first sign of life.
const START_MAX: Duration = Duration::from_secs(2);

/// The fence, as the agent holds it. A fence outlives its agent: the next one finds it at work.
pub struct Fencing {
    program: PathBuf,
    path: PathBuf,
    board: Board,
    order: Mutex<Order>,
    child: Mutex<Option<Child>>,
}

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
        };
        if !fencing.is_alive() {
            fencing.spawn()?;
        }
        Ok(Arc::new(fencing))
    }

    fn is_alive(&self) -> bool {
        self.board
            .report()
            .ok()
            .flatten()
            .is_some_and(|r| r.is_alive(boottime_ns()))
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
        let started = Command::new(&self.program)
            .arg("fence")
            .arg(&self.path)
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
            // It looks at the board at least every PERIOD; the next agent starts another.
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

    /// A frozen fence holds the board's lock: it must go before another can serve.
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
