//! The backup daemon: WAL receiver that follows the leader, base backups, restore.
//!
//! # Layout
//! * [`config`]: the daemon's settings. [`run`] is the daemon.
//! * `copy`: the daemon as a synchronous copy that seals; see [`craton_core::receiver`].
//! * `receiver`, [`wal_sink`]: WAL from whoever leads, onto the disk, then reported as flushed.
//! * `scheduler`, `base_backup`, `ingest`: when and how base backups are taken.
//! * `expire`: what is kept how long, and what goes.
//! * [`store`]: the repository on a disk. Its format is the crate `craton-repo`.
//! * [`catalog`], [`restore`], [`wal_fetch`]: reading; they need no daemon, only the repository.
//! * [`views`]: what the API and the command line say.
//!
//! # What holds
//! * A position is reported as flushed only after it has been synced.
//! * A backup exists exactly when its manifest does, and that is written only once the WAL that the
//!   backup needs has been proved to be in the repository.
//! * WAL of another timeline, or other bytes for a position received before, never replace what is held.
//! * What is missing is said exactly (timeline, from, to), never passed over.

mod base_backup;
pub mod catalog;
pub mod config;
mod copy;
mod error;
mod expire;
mod http;
mod ingest;
pub mod metrics;
mod receiver;
pub mod restore;
mod scheduler;
mod shared;
pub mod store;
pub mod views;
pub mod wal_fetch;
pub mod wal_sink;

use std::sync::Arc;
use std::time::Duration;

use craton_console::renewal;
use craton_console::{Client, Metrics, Service, Token, TopologyFeed, serve};
use craton_core::topology::Topology;
use craton_repo::layout::SegmentForm;
use craton_trust::{Role, TlsMode, Trust};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

pub use config::Config;
pub use error::{BackupError, Result};
pub use store::Repository;

use copy::Copy;
use metrics::{BackupMetrics, whole};
use receiver::{Receiver, blocking};
use scheduler::{REQUESTS_MAX, Scheduler};
use shared::{Shared, stopped};

/// How often waiting segments are looked for, besides being told of them.
const COMPRESS_INTERVAL: Duration = Duration::from_secs(10);
/// How often the metrics that need a look at the disk are renewed.
const GAUGES_INTERVAL: Duration = Duration::from_secs(10);

/// Runs the daemon until `shutdown` turns true: follows the leader that the agents tell of.
pub async fn run(config: Config, shutdown: watch::Receiver<bool>) -> Result<()> {
    let (trust, token) = (open_trust(&config)?, open_token(&config)?);
    if config.agents.is_empty() {
        return Err(BackupError::Config(
            "no agents are named, so no leader can be found; set backup.agents to their API addresses".into(),
        ));
    }
    let client = Client::either(trust.as_ref(), Role::Node, token);
    let feed = TopologyFeed::start(config.agents.clone(), &client);
    let topology = feed.subscribe();
    run_with(config, trust, topology, shutdown).await
}

/// The certificate; `None` where TLS is off.
fn open_trust(config: &Config) -> Result<Option<Arc<Trust>>> {
    let settings = |e: craton_trust::TrustError| BackupError::Config(e.to_string());
    let files = config
        .tls
        .files("backup.tls", None, "backup")
        .map_err(settings)?;
    files.map(Trust::open).transpose().map_err(settings)
}

/// The token, if there is one; without TLS there must be.
fn open_token(config: &Config) -> Result<Option<Token>> {
    match &config.token_file {
        Some(path) => Token::from_file(path)
            .map(Some)
            .map_err(|e| BackupError::Config(e.to_string())),
        None if config.tls.mode == TlsMode::Off => Err(BackupError::Config(
            "backup.token_file is missing: without TLS a token is all that protects the API".into(),
        )),
        None => Ok(None),
    }
}

/// Like [`run`], with the leader told by the caller.
pub async fn run_with_topology(
    config: Config,
    topology: watch::Receiver<Option<Arc<Topology>>>,
    shutdown: watch::Receiver<bool>,
) -> Result<()> {
    let trust = open_trust(&config)?;
    run_with(config, trust, topology, shutdown).await
}

async fn run_with(
    config: Config,
    trust: Option<Arc<Trust>>,
    topology: watch::Receiver<Option<Arc<Topology>>>,
    shutdown: watch::Receiver<bool>,
) -> Result<()> {
    let token = open_token(&config)?;
    let _lock = Repository::lock(&config.repository)?;
    let listener = TcpListener::bind(config.listen).await.map_err(|e| {
        BackupError::Config(format!(
            "cannot listen on {}: {e}; set backup.listen to a free address, or stop what holds it",
            config.listen
        ))
    })?;
    let mut metrics = Metrics::new();
    let handles = BackupMetrics::register(&mut metrics);
    let copy = Copy::open(&config)?;
    let shared = Arc::new(Shared::new(config, trust.clone(), handles, copy));
    // What is there can be listed and shown before the first leader is found.
    if let Ok(known) = Repository::open(&shared.config.repository) {
        shared.repository.get_or_init(|| known);
    }
    let (ask, requests) = mpsc::channel(REQUESTS_MAX);
    let probed = Arc::clone(&shared);
    let client = Client::either(trust.as_ref(), Role::Node, token.clone());
    let service = Service::new(Arc::new(metrics), move || http::health(&probed))
        .with_api(http::routes(Arc::clone(&shared), ask), token);

    let mut tasks = JoinSet::new();
    let receiver = Receiver {
        shared: Arc::clone(&shared),
        topology: topology.clone(),
        shutdown: shutdown.clone(),
        unclear: None,
    };
    let scheduler = Scheduler {
        shared: Arc::clone(&shared),
        topology,
        requests,
        shutdown: shutdown.clone(),
    };
    let upkeep = trust.clone().map(|trust| {
        let mut upkeep = JoinSet::new();
        renewal::keep(
            &trust,
            &shared.config.tls,
            &shared.config.agents,
            &mut upkeep,
        );
        upkeep
    });
    if let Some(copy) = shared.copy.clone() {
        let told = copy.report(client, shared.config.agents.clone());
        let mut shutdown = shutdown.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = told => {}
                () = stopped(&mut shutdown) => {}
            }
        });
    }
    tasks.spawn(receiver.run());
    tasks.spawn(scheduler.run());
    tasks.spawn(compress_segments(Arc::clone(&shared), shutdown.clone()));
    tasks.spawn(renew_gauges(shared, shutdown.clone()));
    let served = serve(listener, service.router(), trust, shutdown).await;
    drop(upkeep);
    // Each ends by itself at shutdown, the receiver after a last flush.
    while tasks.join_next().await.is_some() {}
    served.map_err(|e| BackupError::Config(format!("the HTTP server failed: {e}")))
}

/// Compresses whole segments beside the stream, which must not wait for that.
async fn compress_segments(shared: Arc<Shared>, mut shutdown: watch::Receiver<bool>) {
    while !*shutdown.borrow() {
        if let Some(repository) = shared.repository.get().cloned() {
            let done = blocking(move || {
                for (id, (form, _)) in repository.segments()? {
                    if form == SegmentForm::Full {
                        repository.compress_segment(id)?;
                    }
                }
                Ok(())
            })
            .await;
            if let Err(error) = done {
                tracing::error!(%error, "cannot compress received WAL; it stays as it is and is tried again");
            }
        }
        tokio::select! {
            () = shared.segment_done.notified() => {}
            () = tokio::time::sleep(COMPRESS_INTERVAL) => {}
            () = stopped(&mut shutdown) => {}
        }
    }
}

async fn renew_gauges(shared: Arc<Shared>, mut shutdown: watch::Receiver<bool>) {
    let mut runs = shared.runs.subscribe();
    while !*shutdown.borrow() {
        if let Some(repository) = shared.repository.get().cloned() {
            let metrics = shared.metrics.clone();
            let looked = blocking(move || {
                let (summaries, _) = repository.summaries()?;
                metrics.backups.set(whole(summaries.len() as u64));
                if let (Some(oldest), Some(newest)) = (summaries.first(), summaries.last()) {
                    metrics.oldest_end.set(whole(oldest.ended_at_ms / 1000));
                    metrics.last_end.set(whole(newest.ended_at_ms / 1000));
                    metrics.last_size.set(whole(newest.data_bytes));
                    metrics.last_stored.set(whole(newest.stored_bytes));
                    metrics.last_duration.set(whole(
                        newest.ended_at_ms.saturating_sub(newest.started_at_ms) / 1000,
                    ));
                }
                let missing = catalog::missing_wal(&repository)?;
                metrics
                    .gaps
                    .set(whole(missing.iter().map(|m| m.segments).sum()));
                metrics
                    .repository_bytes
                    .set(whole(repository.size_bytes()?));
                Ok(())
            })
            .await;
            if let Err(error) = looked {
                tracing::warn!(%error, "cannot look at the repository");
            }
        }
        let ended = runs.borrow_and_update().last.clone();
        tokio::select! {
            _ = runs.wait_for(|r| r.last != ended) => {}
            () = tokio::time::sleep(GAUGES_INTERVAL) => {}
            () = stopped(&mut shutdown) => {}
        }
    }
}
