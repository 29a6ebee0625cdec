//! The proxy: clients that survive a failover, transaction and session pooling, topology by push.
//!
//! # Layout
//! * [`config`]: the `[proxy]` table
//! * `routes`: where transactions go, from the agents' topology or from `probe`
//! * `worker`: a thread with its event loop, its clients and its server connections; `pool` shares these fairly
//! * `login`, `auth`, `cancel`: who a client is, and what its key is good for
//! * `session`: the relay, and what becomes of it when a server is lost
//! * `buffer`, `sql`, `statements`, `server`: what the relay is made of
//!
//! Invariants: nothing is sent to a server that the newest topology does not name; a statement whose outcome is
//! not known is never reported as done, nor repeated; memory per client does not depend on what it asks for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use craton_console::renewal;
use craton_console::{Client, Health, Metrics, Service, Token, TopologyFeed};
use craton_core::topology::Topology;
use craton_trust::{Role, Trust};
use craton_wire::scram::ClientIdentity;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

mod auth;
mod backend;
mod buffer;
mod cancel;
pub mod config;
mod login;
mod metrics;
mod pool;
mod pool_nodes;
mod probe;
mod routes;
mod server;
mod session;
mod sql;
mod statements;
mod worker;

pub use config::{ConfigError, PoolMode, PoolNode, PoolOverride, ProxyConfig, StaticBackend};

use auth::{Asker, Verifiers};
use backend::Login;
use metrics::ProxyMetrics;
use routes::{Endpoint, Routes};
use worker::{Arrival, Shared, WorkerHandle};

/// How long an accept that failed is waited out, so that a lack of descriptors does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a worker may take to end after its drain time.
const WORKER_END: Duration = Duration::from_secs(10);

/// The largest password file that is read, in bytes.
const PASSWORD_BYTES_MAX: u64 = 4096;

/// Why the proxy cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// Settings that cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A port that cannot be had.
    #[error("cannot listen on {address} ({setting}): {source}; is another proxy running there?")]
    Listen {
        /// The setting.
        setting: &'static str,
        /// Its value.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// The proxy's certificate cannot be used.
    #[error(transparent)]
    Trust(#[from] craton_trust::TrustError),
    /// The agents' token cannot be read.
    #[error(transparent)]
    Token(#[from] craton_console::token::TokenError),
    /// The password file cannot be read.
    #[error(
        "cannot read auth_password_file {path}: {source}; check the path and that this user may read it"
    )]
    Password {
        /// The file.
        path: std::path::PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A thread or an event loop cannot be started, or ended badly.
    #[error("cannot run the proxy's workers: {0}")]
    Workers(#[source] io::Error),
}

/// Runs the proxy until `shutdown` turns true or its sender is gone. Clients between transactions are then asked to go;
/// the others may finish their transaction within `drain_ms`.
pub async fn run(
    config: ProxyConfig,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), ProxyError> {
    config.check()?;
    let files = config.tls.files("proxy.tls", None, "proxy")?;
    let trust = files.map(Trust::open).transpose()?;
    let config = Arc::new(config);
    let mut listeners = vec![(listen("listen", &config.listen).await?, Endpoint::Write)];
    if let Some(address) = &config.listen_read {
        listeners.push((listen("listen_read", address).await?, Endpoint::Read));
    }
    let http = listen("http", &config.http).await?;
    let auth_login = auth_login(&config)?;
    let mut registry = Metrics::new();
    let metrics = Arc::new(ProxyMetrics::register(&mut registry));

    // Tasks end with this set, on every way out.
    let mut tasks = JoinSet::new();
    if let Some(trust) = &trust {
        renewal::keep(trust, &config.tls, &config.agents, &mut tasks);
    }
    let (_feed, topologies) =
        topology_source(&config, trust.as_ref(), auth_login.clone(), &mut tasks)?;
    let (publish, routes) = watch::channel(Arc::new(Routes::default()));
    tasks.spawn(routes::follow(topologies, publish));
    tasks.spawn(show_routes(routes.clone(), Arc::clone(&metrics)));

    let asker = Arc::new(Asker {
        config: Arc::clone(&config),
        login: auth_login,
        // A set without agents has no certificates that we could know.
        trust: trust.clone().filter(|_| !config.agents.is_empty()),
    });
    let verifiers = Verifiers::start(Arc::clone(&asker), routes.clone());
    let count = worker_count(&config);
    let shared = Arc::new(Shared::new(
        Arc::clone(&config),
        Arc::clone(&metrics),
        verifiers,
        asker,
        count,
    ));
    let (stop, stopping) = watch::channel(false);
    let workers: Vec<WorkerHandle> = (0..count)
        .map(|i| worker::start(i, Arc::clone(&shared), routes.clone(), stopping.clone()))
        .collect::<io::Result<_>>()
        .map_err(ProxyError::Workers)?;

    let health = {
        let routes = routes.clone();
        move || health(&routes.borrow())
    };
    let router = Service::new(Arc::new(registry), health).router();
    let (end_http, http_ended) = watch::channel(false);
    tasks.spawn(async move {
        if let Err(error) = craton_console::serve(http, router, trust, http_ended).await {
            tracing::warn!(%error, "metrics and health are not served any more");
        }
    });

    tracing::info!(
        listen = config.listen,
        listen_read = config.listen_read,
        workers = count,
        "the proxy is up"
    );
    tokio::select! {
        () = accept_all(&listeners, &workers, &shared) => {}
        // An error means that the sender is gone, which is a shutdown as well.
        _ = shutdown.wait_for(|stop| *stop) => {}
    }
    drop(listeners);
    stop.send_replace(true);
    end(workers, &config).await?;
    end_http.send_replace(true);
    tracing::info!("the proxy has stopped");
    Ok(())
}

/// The metrics that a proxy serves, for the reference.
pub fn metrics_catalogue() -> Vec<craton_console::metrics::MetricDoc> {
    let mut registry = Metrics::new();
    ProxyMetrics::register(&mut registry);
    registry.catalogue().to_vec()
}

async fn listen(setting: &'static str, address: &str) -> Result<TcpListener, ProxyError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| ProxyError::Listen {
            setting,
            address: address.to_owned(),
            source,
        })
}

fn worker_count(config: &ProxyConfig) -> usize {
    match config.workers {
        0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        count => count,
    }
}

fn auth_login(config: &ProxyConfig) -> Result<Login, ProxyError> {
    let Some(path) = &config.auth_password_file else {
        return Ok(Login::Nothing);
    };
    let failed = |source| ProxyError::Password {
        path: path.clone(),
        source,
    };
    if std::fs::metadata(path).map_err(failed)?.len() > PASSWORD_BYTES_MAX {
        return Err(failed(io::Error::other(
            "it is too large to hold a password",
        )));
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    let password = text.lines().next().unwrap_or_default().to_owned();
    Ok(Login::Scram(ClientIdentity::Password(password)))
}

type Topologies = watch::Receiver<Option<Arc<Topology>>>;

/// Agents that push, or backends that are asked.
fn topology_source(
    config: &Arc<ProxyConfig>,
    trust: Option<&Arc<Trust>>,
    login: Login,
    tasks: &mut JoinSet<()>,
) -> Result<(Option<TopologyFeed>, Topologies), ProxyError> {
    if config.agents.is_empty() {
        let (publish, topologies) = watch::channel(None);
        tasks.spawn(probe::watch_backends(Arc::clone(config), login, publish));
        return Ok((None, topologies));
    }
    let token = config
        .agent_token_file
        .as_deref()
        .map(Token::from_file)
        .transpose()?;
    let client = Client::either(trust, Role::Node, token);
    let feed = TopologyFeed::start(config.agents.clone(), &client);
    let topologies = feed.subscribe();
    Ok((Some(feed), topologies))
}

async fn show_routes(mut routes: watch::Receiver<Arc<Routes>>, metrics: Arc<ProxyMetrics>) {
    loop {
        {
            let current = routes.borrow_and_update();
            metrics
                .primary_known
                .set(i64::from(current.primary.is_some()));
            metrics
                .standbys
                .set(i64::try_from(current.standbys.len()).unwrap_or(i64::MAX));
        }
        if routes.changed().await.is_err() {
            return;
        }
    }
}

fn health(routes: &Routes) -> Health {
    match &routes.primary {
        Some(primary) if routes.hold => {
            Health::ok(format!("switching over from {}", primary.member))
        }
        Some(primary) => Health::ok(format!("writes go to {}", primary.member)),
        None if routes.known => Health::failing("waiting", "there is no primary: writes wait"),
        None => Health::failing(
            "waiting",
            "no agent or backend has told where the primary is",
        ),
    }
}

/// Accepts clients on all ports and gives each to the worker that has the fewest.
async fn accept_all(
    listeners: &[(TcpListener, Endpoint)],
    workers: &[WorkerHandle],
    shared: &Shared,
) {
    let loops = listeners
        .iter()
        .map(|(listener, endpoint)| accept(listener, *endpoint, workers, shared));
    let mut loops: Vec<_> = loops.map(Box::pin).collect();
    // None of them ends.
    match loops.as_mut_slice() {
        [one] => one.await,
        [one, two] => {
            tokio::join!(one, two);
        }
        _ => {}
    }
}

async fn accept(
    listener: &TcpListener,
    endpoint: Endpoint,
    workers: &[WorkerHandle],
    shared: &Shared,
) {
    let most = shared.config.clients_max.saturating_add(login::LOGINS_MAX);
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a client could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        shared.metrics.clients_accepted.inc();
        let stream = match stream.into_std() {
            Ok(stream) if shared.clients.load(Ordering::Relaxed) < most => stream,
            _ => {
                shared.metrics.clients_refused.inc();
                continue;
            }
        };
        let Some(worker) = workers
            .iter()
            .min_by_key(|w| w.load.load(Ordering::Relaxed))
        else {
            return;
        };
        if worker
            .inbox
            .send(Arrival {
                stream,
                peer,
                endpoint,
            })
            .await
            .is_err()
        {
            tracing::error!("a worker has ended");
            return;
        }
    }
}

/// Waits for the workers: their clients have `drain_ms`.
async fn end(workers: Vec<WorkerHandle>, config: &ProxyConfig) -> Result<(), ProxyError> {
    let limit = Duration::from_millis(config.drain_ms) + WORKER_END;
    let ending = tokio::task::spawn_blocking(move || {
        let threads = workers
            .into_iter()
            .map(|WorkerHandle { inbox, thread, .. }| {
                drop(inbox);
                thread
            });
        // All inboxes are closed before the first thread is waited for.
        let threads: Vec<_> = threads.collect();
        threads.into_iter().all(|thread| thread.join().is_ok())
    });
    match tokio::time::timeout(limit, ending).await {
        Ok(Ok(true)) => Ok(()),
        Ok(_) => Err(ProxyError::Workers(io::Error::other(
            "a worker ended badly",
        ))),
        Err(_) => Err(ProxyError::Workers(io::Error::other(
            "a worker did not end in time",
        ))),
    }
}
