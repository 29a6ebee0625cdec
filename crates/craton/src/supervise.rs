//! `craton supervise`: keeps the daemons of a local cluster running.
//!
//! It owns nothing that matters: every daemon holds its own lock, so a supervisor that was killed leaves
//! a working cluster behind, and the next one adopts what runs. A daemon that dies is started again at
//! once (a killed agent must be back inside its lease), and more slowly the more often it dies.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::Signal;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};

use crate::exit::{self, Problem};
use crate::layout::{Daemon, Layout};
use crate::processes::{self, ProcessId, RunLock};

/// The supervisor's name among locks and logs.
pub const NAME: &str = "supervisor";

/// The pause before a daemon that died is started again.
const RESTART_PAUSE_MIN: Duration = Duration::from_millis(50);

/// The longest such pause.
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(5);

/// A daemon that lived this long starts anew with the shortest pause.
const PROVEN_AFTER: Duration = Duration::from_secs(5);

/// How often the cluster's description is read again: members come and go.
pub const DESCRIPTION_POLL: Duration = Duration::from_secs(1);

/// How often a hold file is looked at.
const HOLD_POLL: Duration = Duration::from_millis(50);

/// How long daemons get to stop by themselves. PostgreSQL writes its shutdown checkpoint in it.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// A log larger than this is moved aside (one old one is kept).
const LOG_BYTES_MAX: u64 = 32 * 1024 * 1024;

/// How often logs are measured.
const LOG_CHECK_EVERY: Duration = Duration::from_secs(60);

/// Runs until it is told to stop, and then stops everything.
pub async fn run(dir: &Path) -> anyhow::Result<u8> {
    let layout = Arc::new(Layout::require(dir)?);
    let Some(_lock) = RunLock::take_named(&layout, NAME)? else {
        return Err(Problem::new(
            exit::RUNNING_ALREADY,
            "a supervisor runs already",
            "`craton status` shows the cluster",
        )
        .into());
    };
    // A session of its own: closing the terminal that typed `craton up` must not end the cluster. An
    // error means that it already has one.
    let _ = rustix::process::setsid();
    crate::daemons::log_to_stderr("info", false);
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for signals")?;
    let (stop, stopped) = watch::channel(false);
    let mut keepers = JoinSet::new();
    keepers.spawn(bound_logs(Arc::clone(&layout), stopped.clone()));
    let mut kept = BTreeSet::new();
    loop {
        for daemon in described(&layout).daemons() {
            if kept.insert(daemon.name()) {
                keepers.spawn(keep(Arc::clone(&layout), daemon, stopped.clone()));
            }
        }
        tokio::select! {
            _ = terminate.recv() => break,
            // One that ended was taken out of the cluster, and may come back some day.
            Some(Ok(Some(name))) = keepers.join_next() => {
                kept.remove(&name);
            }
            () = sleep(DESCRIPTION_POLL) => {}
        }
    }
    tracing::info!("stopping");
    stop.send_replace(true);
    stop_all(&described(&layout)).await?;
    keepers.join_all().await;
    tracing::info!("stopped");
    Ok(exit::OK)
}

/// The cluster as its description has it now; as it was where that cannot be read.
fn described(layout: &Layout) -> Layout {
    match Layout::require(&layout.root) {
        Ok(now) => now,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the cluster's description");
            layout.clone()
        }
    }
}

/// Keeps one daemon running until told to stop, or it is no longer part of the cluster; returns its name when it
/// no longer runs.
async fn keep(
    layout: Arc<Layout>,
    daemon: Daemon,
    stopped: watch::Receiver<bool>,
) -> Option<String> {
    let name = daemon.name();
    let mut pause = RESTART_PAUSE_MIN;
    loop {
        if !held_until_free(&layout, &name, stopped.clone()).await
            || !described(&layout).daemons().contains(&daemon)
        {
            return Some(name);
        }
        let began = Instant::now();
        if let Some(id) = processes::running(&layout, &name) {
            tracing::info!(daemon = name, pid = id.pid, "adopted");
            id.gone().await;
            tracing::warn!(daemon = name, pid = id.pid, "ended");
        } else {
            match spawn(&layout, &daemon) {
                Ok(mut child) => {
                    tracing::info!(daemon = name, pid = child.id(), "started");
                    let status = child.wait().await;
                    let how = status.map_or_else(|e| e.to_string(), |s| s.to_string());
                    tracing::warn!(daemon = name, how, "ended");
                }
                Err(error) => {
                    tracing::error!(daemon = name, error = format!("{error:#}"), "cannot start");
                }
            }
        }
        if *stopped.borrow() {
            return Some(name);
        }
        pause = if began.elapsed() >= PROVEN_AFTER {
            RESTART_PAUSE_MIN
        } else {
            (pause * 2).min(RESTART_PAUSE_MAX)
        };
        let mut told = stopped.clone();
        let _ = tokio::time::timeout(pause, told.wait_for(|stop| *stop)).await;
    }
}

/// Waits while a hold file keeps this daemon down; false when it is time to stop.
async fn held_until_free(layout: &Layout, name: &str, stopped: watch::Receiver<bool>) -> bool {
    while !*stopped.borrow() {
        if !Hold::active(layout, name) {
            return true;
        }
        sleep(HOLD_POLL).await;
    }
    false
}

fn spawn(layout: &Layout, daemon: &Daemon) -> anyhow::Result<Child> {
    let name = daemon.name();
    let log = open_log(layout, &name)?;
    let errors = log.try_clone().context("cannot share the log")?;
    let binary = layout.binary();
    let mut command = Command::new(&binary);
    command
        .args(daemon.arguments())
        .arg("--config")
        .arg(layout.conf_of(daemon))
        .arg("--pid-file")
        .arg(processes::pid_file(layout, daemon))
        .current_dir(&layout.root)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        // A group of its own, so that a signal to the supervisor's group does not reach it.
        .process_group(0)
        .kill_on_drop(false);
    command
        .spawn()
        .with_context(|| format!("cannot run {}", binary.display()))
}

/// Opens a log for appending.
pub fn open_log(layout: &Layout, name: &str) -> anyhow::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let path = layout.log_of(name);
    let opened = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&path);
    opened.with_context(|| format!("cannot open the log {}", path.display()))
}

/// Keeps every log below its bound: what is there is copied aside, then the file is emptied. Writers
/// append, so they go on at its new end.
async fn bound_logs(layout: Arc<Layout>, mut stopped: watch::Receiver<bool>) -> Option<String> {
    while tokio::time::timeout(LOG_CHECK_EVERY, stopped.wait_for(|stop| *stop))
        .await
        .is_err()
    {
        let daemons = described(&layout).daemons();
        let mut names: Vec<String> = daemons.iter().map(Daemon::name).collect();
        names.push(NAME.to_owned());
        for path in names.iter().map(|name| layout.log_of(name)) {
            let too_long = std::fs::metadata(&path).is_ok_and(|m| m.len() > LOG_BYTES_MAX);
            if too_long && std::fs::copy(&path, path.with_extension("log.1")).is_ok() {
                let _ = std::fs::OpenOptions::new()
                    .write(true)
                    .truncate(true)
                    .open(&path);
            }
        }
    }
    None
}

/// Stops every daemon: those that clients and archives hang on first, then all members together (so
/// that none of them takes the others' stopping for a failure). Used by the supervisor, and by
/// `craton down` where no supervisor is left.
pub async fn stop_all(layout: &Layout) -> anyhow::Result<()> {
    let (members, others): (Vec<_>, Vec<_>) = layout
        .daemons()
        .into_iter()
        .partition(|d| matches!(d, Daemon::Node(_) | Daemon::Witness));
    let mut stubborn = Vec::new();
    for group in [others, members] {
        let deadline = Instant::now() + STOP_TIMEOUT;
        let running: Vec<(Daemon, ProcessId)> = group
            .into_iter()
            .filter_map(|d| processes::running(layout, &d.name()).map(|id| (d, id)))
            .collect();
        for (_, id) in &running {
            // A stopped process acts on nothing but SIGKILL and SIGCONT.
            id.signal(Signal::TERM);
            id.signal(Signal::CONT);
        }
        for (daemon, id) in running {
            if timeout_at(deadline, id.gone()).await.is_err() {
                id.signal(Signal::KILL);
                stubborn.push(daemon.name());
            }
        }
    }
    // Whatever is left: a PostgreSQL without an agent, a fence, a daemon that did not listen.
    let mut left = Vec::new();
    for member in &layout.cluster.members {
        left.extend(processes::of_member(layout, member));
    }
    let polite = Instant::now() + STOP_TIMEOUT;
    for member in &layout.cluster.members {
        if let Some(postmaster) = processes::postmaster(&layout.member(member).join("data")) {
            postmaster.signal(Signal::INT);
            postmaster.signal(Signal::CONT);
            let _ = timeout_at(polite, postmaster.gone()).await;
        }
    }
    for id in &left {
        id.signal(Signal::KILL);
    }
    let deadline = Instant::now() + STOP_TIMEOUT;
    if !processes::all_gone(left, deadline).await {
        return Err(Problem::new(
            exit::NOT_IN_TIME,
            "some processes do not end",
            "look for hung disks: dmesg, ps -eo pid,state,cmd",
        )
        .into());
    }
    if !stubborn.is_empty() {
        tracing::warn!(daemons = stubborn.join(", "), "had to be killed");
    }
    Ok(())
}

/// A file that asks the supervisor not to start a daemon until an instant of the boot-time clock. It
/// ends by itself, so that a drill that was interrupted leaves nothing down for ever.
pub struct Hold;

/// The longest hold.
const HOLD_MAX: Duration = Duration::from_secs(3600);

impl Hold {
    fn path(layout: &Layout, name: &str) -> std::path::PathBuf {
        layout.run().join(format!("{name}.hold"))
    }

    fn now() -> Duration {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Duration::new(
            u64::try_from(now.tv_sec).unwrap_or(0),
            u32::try_from(now.tv_nsec).unwrap_or(0),
        )
    }

    /// Holds a daemon down for `time`.
    pub fn set(layout: &Layout, name: &str, time: Duration) -> anyhow::Result<()> {
        let until = Self::now() + time.min(HOLD_MAX);
        crate::secrets::write_private(&Self::path(layout, name), &until.as_millis().to_string())
    }

    /// Lets it start again.
    pub fn release(layout: &Layout, name: &str) {
        // It is gone already when it ran out and was cleared.
        let _ = std::fs::remove_file(Self::path(layout, name));
    }

    fn active(layout: &Layout, name: &str) -> bool {
        let path = Self::path(layout, name);
        let Ok(text) = std::fs::read_to_string(&path) else {
            return false;
        };
        let now = Self::now();
        let until = text
            .trim()
            .parse()
            .map_or(Duration::ZERO, Duration::from_millis);
        if now < until && until < now + HOLD_MAX {
            return true;
        }
        let _ = std::fs::remove_file(path);
        false
    }
}
