//! The long-running parts: settings in, shutdown on SIGTERM or SIGINT, log on standard error.

use std::future::Future;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use craton_agent::witness::WitnessConfig;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::cli::DaemonArgs;
use crate::config;
use crate::exit::{self, Problem};
use crate::processes::RunLock;

/// Begins logging to standard error. `CRATON_LOG` overrides the level (`debug`, `craton_proxy=trace`, …);
/// `CRATON_LOG_FORMAT=json` makes one JSON object a line.
pub fn log_to_stderr(level: &str, loud: bool) {
    use tracing_subscriber::EnvFilter;
    let chosen = std::env::var("CRATON_LOG")
        .ok()
        .and_then(|text| EnvFilter::try_new(text).ok());
    let filter = chosen.unwrap_or_else(|| EnvFilter::new(level));
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(loud);
    // An error means that logging is set up already.
    let _ = if std::env::var("CRATON_LOG_FORMAT").is_ok_and(|f| f == "json") {
        lines.json().try_init()
    } else {
        lines.try_init()
    };
}

/// Takes the daemon's lock where one is asked for; held until the process ends.
fn lock(args: &DaemonArgs) -> anyhow::Result<Option<RunLock>> {
    let Some(pid_file) = &args.pid_file else {
        return Ok(None);
    };
    let taken = RunLock::take(pid_file)?;
    if taken.is_none() {
        let what = format!(
            "this daemon runs already (the lock beside {} is held)",
            pid_file.display()
        );
        return Err(Problem::new(
            exit::RUNNING_ALREADY,
            what,
            "stop the other one first: `craton down`",
        )
        .into());
    }
    Ok(taken)
}

/// Passwords and keys are in this process's memory: no core file may hold them, and no other process of the same user
/// may read them. What it starts (PostgreSQL, the fence) begins anew with the system's setting (prctl(2)).
fn keep_memory_private() {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "this process may leave core files, with passwords and keys in them");
    }
}

/// Runs a daemon until it ends or is told to; `work` gets the shutdown signal.
fn run<F, E>(work: impl FnOnce(watch::Receiver<bool>) -> F) -> anyhow::Result<u8>
where
    F: Future<Output = Result<(), E>>,
    E: Into<anyhow::Error>,
{
    log_to_stderr("info", true);
    keep_memory_private();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    let result = runtime.block_on(async {
        let (stop, stopped) = watch::channel(false);
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for signals")?;
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("told to stop");
            stop.send_replace(true);
        });
        work(stopped).await.map_err(Into::into)
    });
    // Nothing that hangs may keep a daemon from ending once its work is done.
    runtime.shutdown_background();
    result.map(|()| exit::OK)
}

/// `craton node`
pub fn node(args: &DaemonArgs) -> anyhow::Result<u8> {
    let _lock = lock(args)?;
    let sources = config::Sources::gather(args)?;
    let mut settings: craton_agent::AgentConfig = sources.table("node")?;
    settings.origins = sources.origins("node")?;
    run(|stopped| craton_agent::run(settings, stopped))
}

/// `craton backup daemon`
pub fn backup(args: &DaemonArgs) -> anyhow::Result<u8> {
    let _lock = lock(args)?;
    let sources = config::Sources::gather(args)?;
    let (settings, witness): (craton_backup::Config, _) = sources.table_and_witness("backup")?;
    run(|stopped| {
        beside(
            witness,
            stopped.clone(),
            craton_backup::run(settings, stopped),
        )
    })
}

/// `craton witness`
pub fn witness(args: &DaemonArgs) -> anyhow::Result<u8> {
    let _lock = lock(args)?;
    let settings: WitnessConfig = config::load(args, config::WITNESS)?;
    run(|stopped| craton_agent::witness::run(settings, stopped))
}

/// A daemon that is a witness too. What becomes of the witness is no reason for the daemon to end.
async fn beside<E>(
    witness: Option<WitnessConfig>,
    stopped: watch::Receiver<bool>,
    daemon: impl Future<Output = Result<(), E>>,
) -> Result<(), E> {
    let voting = async {
        let Some(settings) = witness else { return };
        if let Err(error) = craton_agent::witness::run(settings, stopped).await {
            tracing::error!(%error, "the witness in this daemon ended; the daemon goes on");
        }
    };
    let (daemon, ()) = tokio::join!(daemon, voting);
    daemon
}

/// `craton fence`: no runtime, no log file, nothing that could wait.
pub fn fence(board: &Path, watchdog: Option<PathBuf>) -> anyhow::Result<u8> {
    craton_fence::run(board, watchdog)
        .with_context(|| format!("the fence of {} failed", board.display()))?;
    Ok(exit::OK)
}

/// `craton proxy`
pub fn proxy(args: &DaemonArgs) -> anyhow::Result<u8> {
    let _lock = lock(args)?;
    let sources = config::Sources::gather(args)?;
    let (settings, witness): (craton_proxy::ProxyConfig, _) = sources.table_and_witness("proxy")?;
    run(|stopped| {
        beside(
            witness,
            stopped.clone(),
            craton_proxy::run(settings, stopped),
        )
    })
}
