//! Wires one agent together and runs it.

use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use craton_console::Token;
use craton_console::metrics::Metrics;
use craton_console::server::{Health, Service, serve};
use craton_coordinator::api::Coordinator;
use craton_coordinator::embedded::{Embedded, EmbeddedConfig};
use craton_core::Term;
use craton_core::topology::Topology;
use craton_pg::{Binaries, CloneProgress, Instance, InstanceConfig, StopMode};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::act::Actor;
use crate::agent::{Agent, Parts, Seen};
use crate::api::{self, Api};
use crate::config::{AgentConfig, Secrets};
use crate::fencing::Fencing;
use crate::hooks::{self, Hooks};
use crate::lease::{DeadlineSink, LeaseKeeper, LeaseTiming};
use crate::metrics::AgentMetrics;
use crate::server::LocalServer;
use crate::state::{StateFile, StateKeeper};
use crate::storage::Storage;
use crate::{parameters, slots};

/// How often the metrics are brought up to date.
const METRICS_INTERVAL: Duration = Duration::from_secs(1);
/// A clean stop of PostgreSQL at the agent's own end.
const STOP_MAX: Duration = Duration::from_secs(30);
/// PostgreSQL's log is cut at this size.
const LOG_BYTES_MAX: u64 = 64 << 20;
/// Threads of the runtime that carries the lease and the coordinator, and nothing else.
const LEASE_THREADS: usize = 2;

/// Why an agent could not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The configuration cannot be used.
    #[error("{0}")]
    Config(String),
    /// PostgreSQL, or its files.
    #[error(transparent)]
    Pg(#[from] craton_pg::PgError),
    /// A file or a socket.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The coordinator could not start.
    #[error("the coordinator cannot start: {0}")]
    Coordinator(String),
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> AgentError {
    let what = what.into();
    move |source| AgentError::Io { what, source }
}

/// Runs the agent until `shutdown` turns true, with the embedded coordinator. Then PostgreSQL is stopped
/// cleanly and the lease given up; an agent that is killed leaves PostgreSQL running, for the next one to
/// take over.
pub async fn run(config: AgentConfig, shutdown: watch::Receiver<bool>) -> Result<(), AgentError> {
    config.validate().map_err(AgentError::Config)?;
    let secrets = Secrets::read(&config.secrets).map_err(AgentError::Config)?;
    make_dir(&config.dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(LEASE_THREADS)
        .thread_name("craton-lease")
        .enable_all()
        .build()
        .map_err(io("cannot start the lease's runtime"))?;
    let outcome = match start_coordinator(&config, &secrets, &runtime).await {
        Ok(embedded) => {
            let outcome = run_with(config, embedded.clone(), runtime.handle(), shutdown).await;
            embedded.stop().await;
            outcome
        }
        Err(error) => Err(error),
    };
    runtime.shutdown_background();
    outcome
}

/// As [`run`], with a coordinator that is there already. `lease_runtime` carries the lease, and should carry
/// nothing that waits for a disk.
pub async fn run_with(
    config: AgentConfig,
    coordinator: Arc<dyn Coordinator>,
    lease_runtime: &tokio::runtime::Handle,
    shutdown: watch::Receiver<bool>,
) -> Result<(), AgentError> {
    config.validate().map_err(AgentError::Config)?;
    let secrets = Secrets::read(&config.secrets).map_err(AgentError::Config)?;
    let token = Token::from_file(&config.secrets.join("api-token"))
        .map_err(|e| AgentError::Config(e.to_string()))?;
    make_dir(&config.dir)?;
    let server = local_server(&config, &secrets)?;
    let fencing = Fencing::start(&config).map_err(io("cannot start the fence"))?;
    let adopted = server.instance.adopt().await?;
    if let Some(process) = adopted.clone() {
        tracing::info!(pid = process.pid(), "took over the running PostgreSQL");
        // PostgreSQL removes standby.signal before it accepts its first write (xlog.c, StartupXLOG).
        let standby = server.instance.data_dir().join("standby.signal").exists();
        server.hold(process, !standby);
    }
    let lease = start_lease(&config, &coordinator, &fencing, lease_runtime);
    if let Some(process) = adopted.filter(|_| server.is_maybe_primary()) {
        // The former agent may have been killed between the start and the order. After the lease: the
        // deadline must stand on the board before it is armed.
        fencing.guard(&process);
    }
    let (progress, _) = watch::channel(CloneProgress::default());
    let state = StateFile::open(&config.dir).map_err(io("cannot read the member's state"))?;
    let actor = Arc::new(Actor {
        me: config.member.clone(),
        server: Arc::clone(&server),
        secrets,
        state: StateKeeper::new(state),
        fencing: Arc::clone(&fencing),
        progress,
    });
    let (seen_tx, seen) = watch::channel(None);
    let (topology_tx, topology) = watch::channel(Arc::new(empty_topology(&config)));
    let metrics = serve_http(
        &config,
        (&coordinator, &server),
        seen.clone(),
        topology,
        token,
        &shutdown,
    )
    .await?;
    let mut background = tokio::task::JoinSet::new();
    background.spawn(Arc::clone(&server).watch());
    background.spawn(Arc::clone(&server).knock());
    background.spawn(slots::keep(Arc::clone(&server), seen.clone()));
    background.spawn(parameters::keep(Arc::clone(&server)));
    let hooks = Hooks::new(&config.hooks, &config.member, &config.cluster);
    background.spawn(hooks::keep(hooks.clone(), seen.clone()));
    background.spawn(keep_metrics(metrics, seen, lease.clone()));
    background.spawn(bound_log(Arc::clone(&server)));
    background.spawn(Arc::clone(&fencing).keep_alive());
    let storage = Storage::start(&server.instance, config.initial.clone())
        .map_err(io("cannot watch the disks"))?;
    let agent = Agent::new(Parts {
        config,
        coordinator: Arc::clone(&coordinator),
        server: Arc::clone(&server),
        actor,
        lease: lease.clone(),
        fencing: Arc::clone(&fencing),
        storage,
        seen: seen_tx,
        topology: topology_tx,
    });
    agent.run(shutdown).await;
    background.shutdown().await;
    stop(&server, &lease, &coordinator, &fencing).await;
    if let Some(hooks) = hooks {
        let term = lease_term(&coordinator);
        hooks
            .call(hooks::Change {
                role: hooks::Role::Stopped,
                term,
            })
            .await;
    }
    Ok(())
}

/// The term as last known here.
fn lease_term(coordinator: &Arc<dyn Coordinator>) -> Term {
    let snapshot = Arc::clone(&coordinator.watch().borrow());
    let view = crate::store::view(&snapshot).ok();
    let leadership = view.and_then(|v| v.leadership);
    leadership.map_or(Term(0), |l| l.value.term)
}

fn start_lease(
    config: &AgentConfig,
    coordinator: &Arc<dyn Coordinator>,
    fencing: &Arc<Fencing>,
    runtime: &tokio::runtime::Handle,
) -> LeaseKeeper {
    let timing = LeaseTiming {
        ttl: config.initial.ttl(),
        margin: config.initial.margin(),
        heartbeat: config.initial.heartbeat(),
    };
    let fencing = Arc::clone(fencing);
    let sink: DeadlineSink = Arc::new(move |until| fencing.deadline(until));
    let _inside = runtime.enter();
    LeaseKeeper::start(Arc::clone(coordinator), &config.dir, timing, sink)
}

/// The orderly end: PostgreSQL first, then the lease, so that another may lead at once.
async fn stop(
    server: &LocalServer,
    lease: &LeaseKeeper,
    coordinator: &Arc<dyn Coordinator>,
    fencing: &Fencing,
) {
    let process = match server.process() {
        Some(process) => Some(process),
        // Started by a task that was cut off before it could say so.
        None => server.instance.adopt().await.unwrap_or_else(|error| {
            tracing::error!(%error, "cannot tell whether PostgreSQL runs");
            None
        }),
    };
    if let Some(process) = process {
        tracing::info!("stopping PostgreSQL");
        if let Err(error) = process.stop(StopMode::Fast, STOP_MAX).await {
            tracing::warn!(%error, "PostgreSQL did not stop cleanly; it is killed");
            let _ = process.kill_all(STOP_MAX).await;
        }
    }
    if let Err(error) = server.instance.kill_leftovers(STOP_MAX).await {
        tracing::error!(%error, "processes of PostgreSQL are left");
        return;
    }
    if let Some(held) = lease.get() {
        // First here: an agent that starts in a moment must not take over what others may have by then.
        lease.give_up(held.term);
        let released =
            tokio::time::timeout(Duration::from_secs(1), coordinator.release(held.term)).await;
        if !matches!(released, Ok(Ok(()))) {
            tracing::info!(term = %held.term, "the lease could not be given up; it runs out by itself");
        }
    }
    fencing.end();
}

fn empty_topology(config: &AgentConfig) -> Topology {
    Topology {
        cluster: config.cluster.clone(),
        term: Term(0),
        revision: 0,
        writable: None,
        hold: false,
        members: Vec::new(),
    }
}

fn make_dir(dir: &Path) -> Result<(), AgentError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(io(format!("cannot create {}", dir.display())))
}

fn local_server(config: &AgentConfig, secrets: &Secrets) -> Result<Arc<LocalServer>, AgentError> {
    let binaries = Binaries::find(config.bin_dir.as_deref())?;
    let instance = Instance::new(InstanceConfig {
        binaries,
        member_dir: config.dir.clone(),
        listen_addresses: config.listen_addresses.clone(),
        port: config.port,
        superuser: "postgres".into(),
        cluster_name: config.cluster.clone(),
    })?;
    let passfile = write_passfile(&config.dir, secrets)?;
    Ok(LocalServer::new(
        instance,
        passfile,
        config.postgresql.clone(),
        config.networks.clone(),
    ))
}

/// libpq's password file: passwords never stand on a command line or in a connection string.
fn write_passfile(dir: &Path, secrets: &Secrets) -> Result<PathBuf, AgentError> {
    let path = dir.join("pgpass");
    let tmp = dir.join("pgpass.tmp");
    let escape = |s: &str| s.replace('\\', "\\\\").replace(':', "\\:");
    let lines = format!(
        "*:*:*:craton_replication:{}\n*:*:*:craton_rewind:{}\n",
        escape(&secrets.replication),
        escape(&secrets.rewind)
    );
    let _ = std::fs::remove_file(&tmp);
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&tmp)
        .map_err(io(format!("cannot write {}", tmp.display())))?;
    file.write_all(lines.as_bytes())
        .and_then(|()| std::fs::rename(&tmp, &path))
        .map_err(io(format!("cannot write {}", path.display())))?;
    Ok(path)
}

async fn start_coordinator(
    config: &AgentConfig,
    secrets: &Secrets,
    runtime: &tokio::runtime::Runtime,
) -> Result<Arc<Embedded>, AgentError> {
    let settings = EmbeddedConfig::new(
        config.cluster.clone(),
        config.member.clone(),
        config
            .peers
            .iter()
            .map(|p| (p.member.clone(), p.address.clone()))
            .collect(),
        config.peer_listen.clone(),
        config.dir.join("coordinator"),
        secrets.peers.clone(),
    );
    runtime
        .spawn(async move { Embedded::start(settings).await })
        .await
        .map_err(|e| AgentError::Coordinator(e.to_string()))?
        .map_err(|e| AgentError::Coordinator(e.to_string()))
}

async fn serve_http(
    config: &AgentConfig,
    (coordinator, server): (&Arc<dyn Coordinator>, &Arc<LocalServer>),
    seen: watch::Receiver<Option<Seen>>,
    topology: watch::Receiver<Arc<Topology>>,
    token: Token,
    shutdown: &watch::Receiver<bool>,
) -> Result<AgentMetrics, AgentError> {
    let mut metrics = Metrics::new();
    let handles = AgentMetrics::register(&mut metrics);
    let listener = TcpListener::bind(&config.api_listen)
        .await
        .map_err(io(format!(
            "cannot listen on {} for the control API (node.api_listen)",
            config.api_listen
        )))?;
    let routes = api::routes(Api {
        seen: seen.clone(),
        topology,
        coordinator: Arc::clone(coordinator),
        server: Arc::clone(server),
        origins: Arc::new(config.origins.clone()),
    });
    let router = Service::new(Arc::new(metrics), move || health(&seen))
        .with_api(routes, token)
        .router();
    let shutdown = shutdown.clone();
    tokio::spawn(async move {
        if let Err(error) = serve(listener, router, shutdown).await {
            tracing::error!(%error, "the control API ended");
        }
    });
    Ok(handles)
}

fn health(seen: &watch::Receiver<Option<Seen>>) -> Health {
    match seen.borrow().as_ref() {
        None => Health::failing("starting", "the first observation is not made yet"),
        Some(seen) => {
            let own = crate::views::own_status(&seen.0, &seen.1);
            match own.role {
                craton_core::topology::MemberRole::Leader
                | craton_core::topology::MemberRole::Standby => Health::ok(own.doing),
                _ => Health::failing("not serving", own.doing),
            }
        }
    }
}

async fn keep_metrics(
    metrics: AgentMetrics,
    mut seen: watch::Receiver<Option<Seen>>,
    lease: LeaseKeeper,
) {
    let mut next = tokio::time::Instant::now();
    loop {
        if seen.changed().await.is_err() {
            return;
        }
        let newest = seen.borrow_and_update().clone();
        let Some(newest) = newest else { continue };
        if newest.1.kill.is_some() {
            metrics.killed();
        }
        if tokio::time::Instant::now() >= next {
            next = tokio::time::Instant::now() + METRICS_INTERVAL;
            metrics.update(&newest, lease.counts());
        }
    }
}

async fn bound_log(server: Arc<LocalServer>) {
    loop {
        tokio::time::sleep(Duration::from_secs(60)).await;
        if let Err(error) = server.instance.bound_log(LOG_BYTES_MAX).await {
            tracing::debug!(%error, "PostgreSQL's log could not be cut");
        }
    }
}
