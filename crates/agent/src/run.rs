//! Wires one agent together and runs it.

use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use craton_console::Token;
use craton_console::client::Client;
use craton_console::metrics::Metrics;
use craton_console::server::{Health, Service, serve};
use craton_console::views::JoinRequest;
use craton_coordinator::api::{Coordinator, Membership as _, PresenceMap};
use craton_coordinator::embedded::{Embedded, EmbeddedConfig};
use craton_core::Term;
use craton_core::promise::Book;
use craton_core::topology::Topology;
use craton_pg::{Binaries, CloneProgress, Instance, InstanceConfig, Postmaster, StopMode};
use craton_trust::{Role, Trust};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::act::Actor;
use crate::agent::{Agent, Parts, Seen};
use crate::api::{self, Api};
use crate::config::{AgentConfig, Secrets};
use crate::enrol::{self, Enrolment};
use crate::fencing::Fencing;
use crate::hooks::{self, Hooks};
use crate::lease::{DeadlineSink, LeaseKeeper, LeaseTiming};
use crate::members;
use crate::metrics::AgentMetrics;
use crate::promises::OverHttp;
use crate::receivers::{self, Receivers};
use crate::server::LocalServer;
use crate::state::{StateFile, StateKeeper};
use crate::storage::Storage;
use crate::{libraries, live, logical, parameters, places, slots, trust};

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
    /// The others have removed this member.
    #[error("this member was removed from the cluster: its agent and its PostgreSQL stop; the files in {} stay", .0.display())]
    Removed(PathBuf),
    /// The coordinator could not start.
    #[error("the coordinator cannot start: {0}")]
    Coordinator(String),
}

pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> AgentError {
    let what = what.into();
    move |source| AgentError::Io { what, source }
}

/// Runs the agent until `shutdown` turns true, with the records where they are. Then PostgreSQL is stopped
/// cleanly and the lease given up; an agent that is killed leaves PostgreSQL running, for the next one to
/// take over.
pub async fn run(config: AgentConfig, shutdown: watch::Receiver<bool>) -> Result<(), AgentError> {
    config.validate().map_err(AgentError::Config)?;
    let secrets = Secrets::read(&config.secrets).map_err(AgentError::Config)?;
    let trust = trust::open(&config)?;
    make_dir(&config.dir)?;
    let runtime = lease_runtime()?;
    let mut told = shutdown.clone();
    // Asking to be taken in goes on until somebody does.
    let started = tokio::select! {
        started = start_coordinator(&config, &secrets, trust.clone(), &runtime) => started,
        _ = told.wait_for(|on| *on) => {
            runtime.shutdown_background();
            return Ok(());
        }
    };
    let outcome = match started {
        Ok(embedded) => {
            let dir = config.dir.clone();
            let removed = embedded.removed();
            let stop = either(shutdown, removed.clone());
            let outcome = match places::follow(&config, &embedded, runtime.handle()) {
                Ok(placed) => {
                    let coordinator = Arc::clone(&placed) as Arc<dyn Coordinator>;
                    let ran = run_with(config, coordinator, trust, runtime.handle(), stop).await;
                    placed.stop().await;
                    ran
                }
                Err(why) => Err(AgentError::Coordinator(why)),
            };
            embedded.stop().await;
            let removed = *removed.borrow();
            match outcome {
                Ok(()) if removed => Err(AgentError::Removed(dir)),
                outcome => outcome,
            }
        }
        Err(error) => Err(error),
    };
    runtime.shutdown_background();
    outcome
}

/// What carries the lease and the coordinator.
pub(crate) fn lease_runtime() -> Result<tokio::runtime::Runtime, AgentError> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(LEASE_THREADS)
        .thread_name("craton-lease")
        .enable_all()
        .build()
        .map_err(io("cannot start the lease's runtime"))
}

/// Turns true with the first of two.
fn either(mut a: watch::Receiver<bool>, mut b: watch::Receiver<bool>) -> watch::Receiver<bool> {
    let (tx, rx) = watch::channel(false);
    tokio::spawn(async move {
        // A sender that is gone says nothing more.
        tokio::select! {
            Ok(_) = a.wait_for(|on| *on) => {}
            Ok(_) = b.wait_for(|on| *on) => {}
            else => return,
        }
        tx.send_replace(true);
    });
    rx
}

/// As [`run`], with a coordinator and certificates that are there already. `lease_runtime` carries the lease, and should carry
/// nothing that waits for a disk.
pub async fn run_with(
    config: AgentConfig,
    coordinator: Arc<dyn Coordinator>,
    trust: Option<Arc<Trust>>,
    lease_runtime: &tokio::runtime::Handle,
    shutdown: watch::Receiver<bool>,
) -> Result<(), AgentError> {
    config.validate().map_err(AgentError::Config)?;
    let secrets = Secrets::read(&config.secrets).map_err(AgentError::Config)?;
    let admission = admission(&config, trust.as_ref())?;
    let others = admission.others.clone();
    make_dir(&config.dir)?;
    let server = local_server(&config, &secrets, trust.as_deref())?;
    refuse_strange_server(&config, &server).await?;
    let fencing = Fencing::start(&config).map_err(io("cannot start the fence"))?;
    let adopted = adopt(&server).await?;
    let lease = start_lease(&config, &coordinator, &fencing, lease_runtime, &others);
    if let Some(process) = adopted.filter(|_| server.is_maybe_primary()) {
        // The former agent may have been killed between the start and the order. After the lease: the
        // deadline must stand on the board before it is armed.
        fencing.guard(&process);
    }
    let receivers = client_of(&config, trust.as_ref(), Role::Backup)?;
    let receivers = Receivers::new(receivers, Arc::clone(&server));
    let presence = coordinator.presence();
    let reached = (presence, others.clone());
    let actor = actor(&config, &server, &fencing, secrets, reached, &receivers)?;
    actor.end_strays_soon().await;
    let (seen_tx, seen) = watch::channel(None);
    let (topology_tx, topology) = watch::channel(Arc::new(empty_topology(&config)));
    let metrics = serve_http(
        &config,
        &coordinator,
        seen.clone(),
        topology,
        admission,
        &actor,
        &shutdown,
    )
    .await?;
    let mut background = tokio::task::JoinSet::new();
    trust::keep(trust, &config, &server, &mut background);
    keep_looking(&server, &mut background);
    background.spawn(members::keep_say(
        Arc::clone(&coordinator),
        config.member.clone(),
        config.voter,
    ));
    background.spawn(slots::keep(
        Arc::clone(&actor),
        seen.clone(),
        Arc::clone(&coordinator),
    ));
    background.spawn(Arc::clone(&receivers).keep(seen.clone()));
    let hooks = Hooks::new(&config.hooks, &config.member, &config.cluster);
    background.spawn(hooks::keep(hooks.clone(), seen.clone()));
    let telling = keep_metrics(metrics, seen, lease.clone(), Arc::clone(&coordinator));
    background.spawn(telling);
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
        receivers,
        seen: seen_tx,
        topology: topology_tx,
    });
    agent.run(shutdown).await;
    background.shutdown().await;
    stop(&server, &lease, &coordinator, &fencing).await;
    say_stopped(hooks, &coordinator).await;
    Ok(())
}

/// A PostgreSQL that runs here and that no agent has started is somebody else's: it is neither taken over nor stopped.
async fn refuse_strange_server(
    config: &AgentConfig,
    server: &LocalServer,
) -> Result<(), AgentError> {
    let state = StateFile::open(&config.dir).map_err(io("cannot read the member's state"))?;
    if state.get().incarnation.is_some() || server.instance.is_marked().await {
        return Ok(());
    }
    let Some(process) = server.instance.adopt().await? else {
        return Ok(());
    };
    Err(AgentError::Config(format!(
        "a PostgreSQL that Craton did not start runs in {} (pid {}): stop it first, with pg_ctl stop -m fast or its service, and see that nothing starts it again",
        server.instance.data_dir().display(),
        process.pid()
    )))
}

/// Takes over a PostgreSQL that runs.
async fn adopt(server: &LocalServer) -> Result<Option<Postmaster>, AgentError> {
    let adopted = server.instance.adopt().await?;
    if let Some(process) = adopted.clone() {
        tracing::info!(pid = process.pid(), "took over the running PostgreSQL");
        // PostgreSQL removes standby.signal before it accepts its first write (xlog.c, StartupXLOG).
        let standby = server.instance.data_dir().join("standby.signal").exists();
        server.hold(process, !standby);
    }
    Ok(adopted)
}

/// What is asked of PostgreSQL again and again.
fn keep_looking(server: &Arc<LocalServer>, background: &mut tokio::task::JoinSet<()>) {
    background.spawn(Arc::clone(server).watch());
    background.spawn(Arc::clone(server).knock());
    background.spawn(parameters::keep(Arc::clone(server)));
    background.spawn(libraries::keep(Arc::clone(server)));
    background.spawn(bound_log(Arc::clone(server)));
}

/// The operator's program hears of the end, too.
async fn say_stopped(hooks: Option<Hooks>, coordinator: &Arc<dyn Coordinator>) {
    if let Some(hooks) = hooks {
        let term = lease_term(coordinator);
        hooks
            .call(hooks::Change {
                role: hooks::Role::Stopped,
                term,
            })
            .await;
    }
}

/// The hands, with what the member noted in an earlier life.
fn actor(
    config: &AgentConfig,
    server: &Arc<LocalServer>,
    fencing: &Arc<Fencing>,
    secrets: Secrets,
    (presence, others): (watch::Receiver<PresenceMap>, Client),
    receivers: &Arc<Receivers>,
) -> Result<Arc<Actor>, AgentError> {
    let (progress, _) = watch::channel(CloneProgress::default());
    let state = StateFile::open(&config.dir).map_err(io("cannot read the member's state"))?;
    let noted = Duration::from_millis(state.get().promised_ms);
    Ok(Arc::new(Actor {
        book: Mutex::new(Book::new(crate::clock::now(), noted)),
        me: config.member.clone(),
        server: Arc::clone(server),
        secrets,
        state: StateKeeper::new(state),
        noting: Arc::default(),
        presence,
        others,
        strays_ended: tokio::sync::OnceCell::new(),
        clone: config.clone.clone(),
        initial_data: config.initial_data.clone(),
        initdb_args: config.initdb_args().map_err(AgentError::Config)?,
        program: match &config.fence_program {
            Some(program) => program.clone(),
            None => std::env::current_exe().map_err(io("cannot find this program's own path"))?,
        },
        fencing: Arc::clone(fencing),
        receivers: Arc::clone(receivers),
        progress,
    }))
}

/// A client for the other members' control APIs.
fn client(config: &AgentConfig, trust: Option<&Arc<Trust>>) -> Result<Client, AgentError> {
    client_of(config, trust, Role::Node)
}

/// A client for the APIs of holders of a role.
fn client_of(
    config: &AgentConfig,
    trust: Option<&Arc<Trust>>,
    role: Role,
) -> Result<Client, AgentError> {
    Ok(match trust {
        Some(trust) => Client::trusted(Arc::clone(trust), role),
        None => Client::new(trust::token(config, None)?),
    })
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
    others: &Client,
) -> LeaseKeeper {
    let timing = LeaseTiming {
        ttl: config.initial.ttl(),
        margin: config.initial.margin(),
        heartbeat: config.initial.heartbeat(),
    };
    let fencing = Arc::clone(fencing);
    let sink: DeadlineSink = Arc::new(move |until| fencing.deadline(until));
    let _inside = runtime.enter();
    let asker = Arc::new(OverHttp(others.clone()));
    LeaseKeeper::start(
        config.member.clone(),
        (Arc::clone(coordinator), asker),
        &config.dir,
        timing,
        sink,
    )
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
        system_id: None,
        term: Term(0),
        revision: 0,
        writable: None,
        hold: false,
        members: Vec::new(),
    }
}

pub(crate) fn make_dir(dir: &Path) -> Result<(), AgentError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(io(format!("cannot create {}", dir.display())))
}

fn local_server(
    config: &AgentConfig,
    secrets: &Secrets,
    trust: Option<&Trust>,
) -> Result<Arc<LocalServer>, AgentError> {
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
        (config.networks.clone(), config.md5_passwords),
        trust.map(trust::for_postgres),
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

/// No coordinator has ever run here.
pub(crate) fn is_new(dir: &Path) -> bool {
    !dir.join(craton_coordinator::embedded::LOG_FILE).exists()
}

async fn start_coordinator(
    config: &AgentConfig,
    secrets: &Secrets,
    trust: Option<Arc<Trust>>,
    runtime: &tokio::runtime::Runtime,
) -> Result<Arc<Embedded>, AgentError> {
    let listed = config.peers.iter();
    let mut peers: Vec<_> = listed
        .map(|p| (p.member.clone(), p.address.clone()))
        .collect();
    let dir = config.dir.join("coordinator");
    if !config.join.is_empty() && is_new(&dir) {
        let request = JoinRequest {
            member: config.member.clone(),
            address: config.peer_address(),
        };
        let client = client(config, trust.as_ref())?;
        peers = members::join(&config.join, client, &request, &config.cluster)
            .await
            .map_err(AgentError::Config)?;
    }
    let mut settings = EmbeddedConfig::new(
        config.cluster.clone(),
        config.member.clone(),
        peers,
        config.peer_listen.clone(),
        dir,
        secrets.peers.clone(),
    )
    .with_trust(trust);
    settings.advertise = Some(config.peer_address());
    runtime
        .spawn(async move { Embedded::start(settings).await })
        .await
        .map_err(|e| AgentError::Coordinator(e.to_string()))?
        .map_err(|e| AgentError::Coordinator(e.to_string()))
}

/// What opens the control API, and those of the others.
struct Admission {
    token: Option<Token>,
    trust: Option<Arc<Trust>>,
    others: Client,
}

fn admission(config: &AgentConfig, trust: Option<&Arc<Trust>>) -> Result<Admission, AgentError> {
    Ok(Admission {
        token: trust::token(config, trust.map(Arc::as_ref))?,
        trust: trust.cloned(),
        others: client(config, trust)?,
    })
}

async fn serve_http(
    config: &AgentConfig,
    coordinator: &Arc<dyn Coordinator>,
    seen: watch::Receiver<Option<Seen>>,
    topology: watch::Receiver<Arc<Topology>>,
    admission: Admission,
    actor: &Arc<Actor>,
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
        server: Arc::clone(&actor.server),
        origins: Arc::new(config.origins.clone()),
        actor: Arc::clone(actor),
        others: admission.others,
    });
    let routes = routes
        .merge(members::routes(Arc::clone(coordinator)))
        .merge(receivers::routes(Arc::clone(coordinator)))
        .merge(logical::routes(Arc::clone(&actor.server)));
    let enrolment = Enrolment {
        cluster: config.cluster.clone(),
        secrets: config.secrets.clone(),
        coordinator: Arc::clone(coordinator),
    };
    let alive = live::routes(seen.clone());
    let mut service = Service::new(Arc::new(metrics), move || health(&seen)).with_open(alive);
    // Keys and passwords are handed out through TLS alone.
    let routes = if admission.trust.is_some() {
        service = service.with_open(enrol::open_routes(enrolment.clone()));
        routes.merge(enrol::routes(enrolment))
    } else {
        routes
    };
    let router = service.with_api(routes, admission.token).router();
    let shutdown = shutdown.clone();
    tokio::spawn(async move {
        if let Err(error) = serve(listener, router, admission.trust, shutdown).await {
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
    coordinator: Arc<dyn Coordinator>,
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
            metrics.update(&newest, lease.counts(), coordinator.trouble().is_none());
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
