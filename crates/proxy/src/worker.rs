//! One thread with its event loop, its clients and its server connections.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::LocalSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout, timeout_at};

use crate::auth::{Asker, Guessers, Verifiers};
use crate::backend::{Address, ConnectError, Login, connect};
use crate::buffer::Spares;
use crate::cancel::{CancelTarget, Cancels};
use crate::config::ProxyConfig;
use crate::metrics::{ProxyMetrics, Tally};
use crate::pool::{Grant, LocalPool, Place, PoolKey, Reserved, SharedPool};
use crate::routes::{Endpoint, Routes, Target};
use crate::server::{Busy, Counted, Facts, Server, Values, followed_index};
use crate::statements::{OnServer, Registry, StatementIds};

/// Clients that were accepted and that their worker has not taken up yet.
pub const INBOX_MAX: usize = 1024;

/// How often a worker looks after its pools.
const TIDY_INTERVAL: Duration = Duration::from_secs(1);

/// How often counters of a worker become visible.
const TALLY_INTERVAL: Duration = Duration::from_millis(200);

/// Pause before a server that could not be reached is tried again: at first, and at most.
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_millis(100);

/// Logins whose greeting is remembered.
const WELCOMES_MAX: usize = 10_000;

/// What a server reports to a user of a database when it logs in.
pub type Welcome = Arc<Vec<(Vec<u8>, Vec<u8>)>>;

/// A client on its way to a worker.
#[derive(Debug)]
pub struct Arrival {
    /// The socket.
    pub stream: std::net::TcpStream,
    /// Where it comes from.
    pub peer: SocketAddr,
    /// Which port it came to.
    pub endpoint: Endpoint,
}

/// What all workers share.
pub struct Shared {
    /// Settings.
    pub config: Arc<ProxyConfig>,
    /// Metrics.
    pub metrics: Arc<ProxyMetrics>,
    /// Users' verifiers.
    pub verifiers: Arc<Verifiers>,
    /// Asks servers in the proxy's own name.
    pub asker: Arc<Asker>,
    /// Addresses that guess.
    pub guessers: Guessers,
    /// Clients' keys.
    pub cancels: Arc<Cancels>,
    /// Clients that are connected.
    pub clients: AtomicUsize,
    /// Numbers of statements.
    pub statement_ids: StatementIds,
    /// Wakes each worker when another one lacks connections.
    pub wanted: Vec<Arc<Notify>>,
    pools: Mutex<BTreeMap<PoolKey, Arc<SharedPool>>>,
    welcomes: Mutex<BTreeMap<PoolKey, Welcome>>,
}

impl Shared {
    /// For `workers` workers.
    pub fn new(
        config: Arc<ProxyConfig>,
        metrics: Arc<ProxyMetrics>,
        verifiers: Arc<Verifiers>,
        asker: Arc<Asker>,
        workers: usize,
    ) -> Self {
        Self {
            config,
            metrics,
            verifiers,
            asker,
            guessers: Guessers::default(),
            cancels: Arc::default(),
            clients: AtomicUsize::new(0),
            statement_ids: StatementIds::default(),
            wanted: (0..workers).map(|_| Arc::default()).collect(),
            pools: Mutex::default(),
            welcomes: Mutex::default(),
        }
    }

    fn pool(&self, key: &PoolKey) -> Arc<SharedPool> {
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        let size = || self.config.size_of(&key.user, &key.database);
        Arc::clone(
            pools
                .entry(key.clone())
                .or_insert_with(|| SharedPool::new(size())),
        )
    }

    /// Forgets accounts of pools that no worker has any more.
    fn forget_pools(&self) {
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|_, pool| Arc::strong_count(pool) > 1);
    }

    fn remember_welcome(&self, mut key: PoolKey, welcome: &Welcome) {
        key.target = 0;
        let mut welcomes = self.welcomes.lock().unwrap_or_else(PoisonError::into_inner);
        if welcomes.len() >= WELCOMES_MAX && !welcomes.contains_key(&key) {
            welcomes.pop_first();
        }
        welcomes.insert(key, Arc::clone(welcome));
    }

    /// What a server reported last to this user of this database.
    pub fn welcome(&self, who: &Who) -> Option<Welcome> {
        self.welcomes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&who.key(0))
            .cloned()
    }

    fn wake_workers(&self) {
        for worker in &self.wanted {
            worker.notify_one();
        }
    }
}

/// Whom a server connection is for.
#[derive(Clone, Debug)]
pub struct Who {
    /// The user.
    pub user: Arc<str>,
    /// The database.
    pub database: Arc<str>,
    /// Startup parameters that cannot be changed later.
    pub options: Arc<[(String, String)]>,
    /// What proves the user.
    pub login: Login,
}

impl Who {
    fn key(&self, target: u64) -> PoolKey {
        PoolKey {
            target,
            user: Arc::clone(&self.user),
            database: Arc::clone(&self.database),
            options: Arc::clone(&self.options),
        }
    }
}

/// Why a transaction has no server.
#[derive(Debug, thiserror::Error)]
pub enum AcquireError {
    /// There was none for too long.
    #[error("{0}")]
    NoTarget(String),
    /// All connections of the pool were in use for too long.
    #[error("all {size} server connections of the pool were in use for {waited_ms} ms")]
    PoolBusy {
        /// The pool's size.
        size: usize,
        /// How long the client waited.
        waited_ms: u64,
    },
    /// The server refuses, and will go on refusing.
    #[error(transparent)]
    Refused(#[from] ConnectError),
}

/// One worker.
pub struct Worker {
    /// What all share.
    pub shared: Arc<Shared>,
    /// Where transactions go.
    pub routes: watch::Receiver<Arc<Routes>>,
    /// True when the proxy stops.
    pub stopping: watch::Receiver<bool>,
    /// Read buffers.
    pub spares: Spares,
    /// Prepared statements.
    pub statements: RefCell<Registry>,
    /// Counters.
    pub tally: Tally,
    pools: RefCell<BTreeMap<PoolKey, Rc<LocalPool>>>,
}

impl Worker {
    /// A worker without clients.
    pub fn new(
        shared: Arc<Shared>,
        routes: watch::Receiver<Arc<Routes>>,
        stopping: watch::Receiver<bool>,
    ) -> Rc<Self> {
        Rc::new(Self {
            statements: RefCell::new(Registry::new(shared.statement_ids.clone())),
            shared,
            routes,
            stopping,
            spares: Spares::default(),
            tally: Tally::default(),
            pools: RefCell::default(),
        })
    }

    fn config(&self) -> &ProxyConfig {
        &self.shared.config
    }

    fn pool(&self, target: &Target, who: &Who) -> Rc<LocalPool> {
        let key = who.key(target.id);
        let mut pools = self.pools.borrow_mut();
        let lifetime = Duration::from_millis(self.config().server_lifetime_ms);
        let new = || Rc::new(LocalPool::new(self.shared.pool(&key), lifetime));
        if let Some(known) = pools.get(&key) {
            return Rc::clone(known);
        }
        let pool = new();
        pools.insert(key, Rc::clone(&pool));
        pool
    }

    /// A server connection, if one is at hand: the usual case.
    pub fn acquire_now(&self, who: &Who, endpoint: Endpoint) -> Option<(Server, Rc<LocalPool>)> {
        let routes = self.routes.borrow();
        let target = routes.choose(endpoint, None)?;
        let pool = self.pool(target, who);
        let server = pool.take()?;
        Some((server, pool))
    }

    /// A server connection, as soon as there is one. Nothing has been sent on it.
    pub async fn acquire(
        &self,
        who: &Who,
        endpoint: Endpoint,
    ) -> Result<(Server, Rc<LocalPool>), AcquireError> {
        let metrics = &self.shared.metrics;
        let started = Instant::now();
        let waiting = WaitingClient::new(metrics);
        let result = self
            .acquire_before(who, endpoint, started + self.config().failover_wait())
            .await;
        drop(waiting);
        metrics
            .wait_seconds
            .observe(started.elapsed().as_secs_f64());
        result
    }

    async fn acquire_before(
        &self,
        who: &Who,
        endpoint: Endpoint,
        give_up: Instant,
    ) -> Result<(Server, Rc<LocalPool>), AcquireError> {
        let mut changes = self.routes.clone();
        let (mut counted, mut pause, mut avoid) = (false, RETRY_MIN, None);
        let mut why = None;
        loop {
            let routes = Arc::clone(&changes.borrow_and_update());
            let Some(target) = routes.choose(endpoint, avoid.take()) else {
                if !std::mem::replace(&mut counted, true) {
                    self.shared.metrics.failover_waits.inc();
                }
                // The sender lives as long as the proxy.
                if timeout_at(give_up, changes.changed()).await.is_err() {
                    return Err(self.gave_up(&routes, why));
                }
                continue;
            };
            let pool = self.pool(target, who);
            let attempt = tokio::select! {
                attempt = self.take_or_connect(&pool, target, who) => attempt,
                _ = changes.changed() => continue,
            };
            match attempt {
                Ok(server)
                    if target.is_revoked() || (target.is_primary() && changes.borrow().hold) =>
                {
                    pool.give(server);
                }
                Ok(server) => return Ok((server, pool)),
                Err(AcquireError::Refused(error)) if error.is_passing() => {
                    self.shared.metrics.servers_failed.inc();
                    tracing::debug!(%error, "no connection yet");
                    why = Some(error.to_string());
                    avoid = Some(target.id);
                    if Instant::now() + pause >= give_up {
                        return Err(self.gave_up(&routes, why));
                    }
                    // New routes may come sooner.
                    let _ = timeout(pause, changes.changed()).await;
                    pause = (pause * 2).min(RETRY_MAX);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn gave_up(&self, routes: &Routes, why: Option<String>) -> AcquireError {
        self.shared.metrics.failover_wait_timeouts.inc();
        let waited = self.config().failover_wait_ms;
        let what = if let Some(why) = why {
            why
        } else if !routes.known {
            "no agent or backend has told the proxy yet where the primary is".to_owned()
        } else if routes.hold {
            "a planned switchover holds new transactions".to_owned()
        } else {
            "there is no primary".to_owned()
        };
        AcquireError::NoTarget(format!(
            "no server took the transaction within {waited} ms: {what}"
        ))
    }

    async fn take_or_connect(
        &self,
        pool: &Rc<LocalPool>,
        target: &Arc<Target>,
        who: &Who,
    ) -> Result<Server, AcquireError> {
        if let Some(server) = pool.take() {
            return Ok(server);
        }
        let granted = match pool.shared.reserve() {
            Reserved::Place(place) => Grant::Place(place),
            Reserved::Wait(granted) => {
                self.shared.wake_workers();
                let waited_ms = self.config().pool_wait_ms;
                let busy = || AcquireError::PoolBusy {
                    size: self.config().size_of(&who.user, &who.database),
                    waited_ms,
                };
                match timeout(self.config().pool_wait(), granted).await {
                    Ok(Ok(grant)) => grant,
                    _ => return Err(busy()),
                }
            }
        };
        match granted {
            Grant::Place(place) => Ok(self.open(place, target, who).await?),
            Grant::Server(parked) => {
                let gone = |source| ConnectError::Unreachable {
                    address: target.to_string(),
                    source,
                };
                let mut server = Server::unpark(*parked).map_err(gone)?;
                server.facts.busy = Some(Busy::on(target));
                if server.is_alive() {
                    Ok(server)
                } else {
                    Err(gone(io::ErrorKind::ConnectionReset.into()).into())
                }
            }
        }
    }

    async fn open(
        &self,
        place: Place,
        target: &Arc<Target>,
        who: &Who,
    ) -> Result<Server, ConnectError> {
        let mut parameters = vec![
            ("user", &*who.user),
            ("database", &*who.database),
            ("application_name", "craton proxy"),
        ];
        parameters.extend(who.options.iter().map(|(n, v)| (n.as_str(), v.as_str())));
        let to = Address {
            host: &target.host,
            port: target.port,
            parameters: &parameters,
            login: &who.login,
            tls: None,
        };
        let connected = connect(to, self.config().connect_timeout()).await?;
        let mut values = Values::default();
        for (name, value) in &connected.parameters {
            if let Some(place) = followed_index(name).and_then(|i| values.get_mut(i)) {
                place.clone_from(value);
            }
        }
        self.shared
            .remember_welcome(who.key(target.id), &Arc::new(connected.parameters));
        let cancel = CancelTarget {
            target: Arc::clone(target),
            process: connected.process,
            key: connected.key.into(),
        };
        let now = Instant::now();
        let facts = Facts {
            _place: place,
            target: Arc::clone(target),
            cancel,
            values,
            made: Arc::default(),
            statements: OnServer::default(),
            unnamed: 0,
            tainted: false,
            opened: now,
            idle_since: now,
            busy: Some(Busy::on(target)),
            _counted: Counted::new(&self.shared.metrics),
        };
        Ok(Server {
            stream: connected.stream,
            facts,
        })
    }

    /// Looks after the pools until the worker stops.
    async fn keep_house(self: Rc<Self>, wanted: Arc<Notify>) {
        let mut routes = self.routes.clone();
        let mut tidy = interval(TIDY_INTERVAL);
        let mut tally = interval(TALLY_INTERVAL);
        tidy.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tally.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = wanted.notified() => {
                    let pools: Vec<_> = self.pools.borrow().values().cloned().collect();
                    for pool in pools {
                        pool.share();
                    }
                }
                changed = routes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.tidy();
                }
                _ = tidy.tick() => self.tidy(),
                _ = tally.tick() => self.tally.flush(&self.shared.metrics),
            }
        }
    }

    fn tidy(&self) {
        let idle_max = Duration::from_millis(self.config().server_idle_ms);
        let alive: Vec<u64> = self.routes.borrow().targets().map(|t| t.id).collect();
        self.pools.borrow_mut().retain(|key, pool| {
            let empty = pool.tidy(idle_max);
            let used = Rc::strong_count(pool) > 1;
            used || !empty || alive.contains(&key.target)
        });
        self.shared.forget_pools();
    }
}

/// Counts a client as waiting.
struct WaitingClient<'a>(&'a ProxyMetrics);

impl<'a> WaitingClient<'a> {
    fn new(metrics: &'a ProxyMetrics) -> Self {
        metrics.waiting.inc();
        Self(metrics)
    }
}

impl Drop for WaitingClient<'_> {
    fn drop(&mut self) {
        self.0.waiting.dec();
    }
}

/// A worker seen from outside.
#[derive(Debug)]
pub struct WorkerHandle {
    /// Its inbox.
    pub inbox: mpsc::Sender<Arrival>,
    /// Its clients.
    pub load: Arc<AtomicUsize>,
    /// Its thread.
    pub thread: std::thread::JoinHandle<()>,
}

/// Starts a worker's thread.
pub fn start(
    index: usize,
    shared: Arc<Shared>,
    routes: watch::Receiver<Arc<Routes>>,
    stopping: watch::Receiver<bool>,
) -> io::Result<WorkerHandle> {
    let (inbox, arrivals) = mpsc::channel(INBOX_MAX);
    let load = Arc::new(AtomicUsize::new(0));
    let clients = Arc::clone(&load);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let thread = std::thread::Builder::new()
        .name(format!("proxy-{index}"))
        .spawn(move || {
            let wanted = shared.wanted.get(index).cloned().unwrap_or_default();
            let worker = Worker::new(shared, routes, stopping);
            LocalSet::new().block_on(&runtime, serve(worker, wanted, arrivals, clients));
        })?;
    Ok(WorkerHandle {
        inbox,
        load,
        thread,
    })
}

async fn serve(
    worker: Rc<Worker>,
    wanted: Arc<Notify>,
    mut arrivals: mpsc::Receiver<Arrival>,
    load: Arc<AtomicUsize>,
) {
    let house = tokio::task::spawn_local(Rc::clone(&worker).keep_house(wanted));
    // Ends when the listeners are gone.
    while let Some(arrival) = arrivals.recv().await {
        load.fetch_add(1, Ordering::Relaxed);
        let (worker, load) = (Rc::clone(&worker), Arc::clone(&load));
        tokio::task::spawn_local(async move {
            attend(worker, arrival).await;
            load.fetch_sub(1, Ordering::Relaxed);
        });
    }
    let drain = Instant::now() + Duration::from_millis(worker.config().drain_ms);
    while load.load(Ordering::Relaxed) > 0 && Instant::now() < drain {
        sleep(Duration::from_millis(10)).await;
    }
    house.abort();
    worker.tally.flush(&worker.shared.metrics);
}

async fn attend(worker: Rc<Worker>, arrival: Arrival) {
    let metrics = Arc::clone(&worker.shared.metrics);
    let stream = match TcpStream::from_std(arrival.stream) {
        Ok(stream) => stream,
        Err(error) => {
            tracing::warn!(%error, "a client's socket cannot be used");
            return;
        }
    };
    metrics.clients.inc();
    worker.shared.clients.fetch_add(1, Ordering::Relaxed);
    Box::pin(crate::login::attend(
        &worker,
        stream,
        arrival.peer,
        arrival.endpoint,
    ))
    .await;
    worker.shared.clients.fetch_sub(1, Ordering::Relaxed);
    metrics.clients.dec();
}
