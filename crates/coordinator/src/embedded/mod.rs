//! The coordinator inside the agents: Raft for decisions, diskless promises for the lease.
//!
//! # Layout
//! * `format`, `disk`: the log file and the thread that writes it.
//! * `frame`, `handshake`, `wire`: what is said on a connection, and to whom.
//! * `peer`, `accept`: connections to and from the other members, one for each purpose; `links`: to whom.
//! * `members`: changing who takes part; `recover`: when the majority is lost for good.
//! * `driver`: the task that owns the Raft core and the state machine.
//! * `lease`: this process's lease voter, and asking all of them.
//!
//! # Architecture invariants
//! * A lease renewal touches neither Raft, nor its queue, nor the disk (but for the first of a longer ttl).
//! * No task waits for the disk but the ones whose answer rests on it.
//! * Every queue has a bound; what does not fit is dropped (Raft, presence) or refused (calls).

mod accept;
mod disk;
mod driver;
mod format;
mod frame;
mod handshake;
mod lease;
mod links;
mod members;
mod peer;
mod recover;
mod stats;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use craton_core::{MemberId, Term};
use craton_trust::Trust;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use self::accept::{ANNOUNCEMENT_LEN_MAX, Acceptor, note_presence, put_call};
use self::disk::{Disk, Faults, Store};
use self::driver::{Driver, Event, INBOX_MAX, State, View};
use self::handshake::Identity;
use self::lease::{Desk, LeaseRound};
use self::links::Links;
use self::stats::Stats;
use self::wire::{Call, CallTold};
use crate::api::{
    Answer, CALL_TIMEOUT, Coordinator, CoordinatorError, LeaseHint, Membership, PresenceMap,
    Renewal, Snapshot, Txn, TxnOutcome,
};
use crate::clock::Clock;
use crate::kv::{self, Applied, Request};
use crate::raft::{Config, Index, Raft, Status, Timings};

pub use self::disk::{LOG_FILE, OpenError};
pub use self::members::CHANGE_MAX;
pub use self::recover::{RecoverError, Survey, stand_alone, survey};
pub use self::stats::Counters;

/// The shortest secret, in bytes.
pub const SECRET_LEN_MIN: usize = 16;

/// The largest state, in bytes of keys and values.
pub const STATE_LEN_MAX: usize = 4 * 1024 * 1024;

/// Between two tries of a call, while there is no leader to ask.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// How long a start waits for a former process to let go of the directory, and a stop for the disk.
const HANDOVER_MAX: Duration = Duration::from_secs(2);

/// What a voter needs to know.
#[derive(Clone)]
pub struct EmbeddedConfig {
    /// The cluster's name; voters of another cluster are refused.
    pub cluster: String,
    /// This member.
    pub me: MemberId,
    /// Where to look for the others first, with their `host:port`. A new cluster begins with these voters, this one
    /// among them; a member that is not among them joins a cluster that has taken it in.
    pub voters: BTreeMap<MemberId, String>,
    /// Where to listen, `host:port`.
    pub listen: String,
    /// Where the others reach this one, `host:port`; taken from `voters` if not given.
    pub advertise: Option<String>,
    /// Where the log is kept.
    pub dir: PathBuf,
    /// What all voters share and nobody else knows.
    pub secret: String,
    /// Raft's timings.
    pub timings: Timings,
    /// Certificates for the connections between voters; without them nothing is encrypted (isolated tests).
    pub trust: Option<Arc<Trust>>,
    faults: Faults,
}

impl EmbeddedConfig {
    /// With the default timings.
    pub fn new(
        cluster: String,
        me: MemberId,
        voters: Vec<(MemberId, String)>,
        listen: String,
        dir: PathBuf,
        secret: String,
    ) -> Self {
        let voters = voters.into_iter().collect();
        let (timings, faults) = (Timings::default(), Faults::default());
        Self {
            cluster,
            me,
            voters,
            listen,
            advertise: None,
            dir,
            secret,
            timings,
            trust: None,
            faults,
        }
    }

    /// With certificates.
    #[must_use]
    pub fn with_trust(mut self, trust: Option<Arc<Trust>>) -> Self {
        self.trust = trust;
        self
    }

    fn raft(&self) -> Config {
        Config {
            me: self.me.clone(),
            voters: self.voters.keys().cloned().collect::<BTreeSet<_>>(),
            joining: !self.voters.contains_key(&self.me),
            address: self.address(),
            addresses: self.voters.clone(),
            timings: self.timings,
            seed: rand::random(),
        }
    }

    /// Where the others reach this one.
    fn address(&self) -> Option<String> {
        let listed = self.voters.get(&self.me).cloned();
        self.advertise.clone().or(listed)
    }

    fn identity(&self) -> Identity {
        let secret = self.secret.trim().as_bytes().to_vec();
        Identity {
            cluster: self.cluster.clone(),
            me: self.me.clone(),
            secret,
            trust: self.trust.clone(),
        }
    }

    fn check(&self) -> Result<(), StartError> {
        if self.address().is_none() {
            return Err(StartError::Config(format!(
                "{} is not among the peers, and nothing says where the others reach it",
                self.me
            )));
        }
        if self.secret.trim().len() < SECRET_LEN_MIN {
            return Err(StartError::Config(format!(
                "the peers' secret has fewer than {SECRET_LEN_MIN} bytes"
            )));
        }
        if self.timings.heartbeat.is_zero()
            || self.timings.election_timeout < self.timings.heartbeat * 2
        {
            return Err(StartError::Config(
                "the election timeout must be at least two heartbeats".to_owned(),
            ));
        }
        Ok(())
    }
}

/// Why a voter could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration contradicts itself.
    #[error("{0}")]
    Config(String),
    /// The directory cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The address cannot be listened on.
    #[error("cannot listen on {address} for the coordinator's peers: {source}")]
    Listen {
        /// The address.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// No thread for the disk.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

/// One voter, and this process's way to all of them.
pub struct Embedded {
    shared: Arc<Shared>,
    tasks: Mutex<JoinSet<()>>,
    disk_thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

struct Shared {
    me: MemberId,
    client: u64,
    next_seq: AtomicU64,
    inbox: mpsc::Sender<Event>,
    address: Option<String>,
    seeds: BTreeMap<MemberId, String>,
    links: Arc<Links>,
    removed: watch::Sender<bool>,
    view: View,
    lease: LeaseRound,
    presence: watch::Sender<PresenceMap>,
    stopped: watch::Sender<bool>,
    stats: Arc<Stats>,
    clock: Clock,
}

async fn open_store(config: &EmbeddedConfig) -> Result<Store, StartError> {
    let birth = rand::random::<u64>() | 1;
    let due = Instant::now() + HANDOVER_MAX;
    loop {
        let (dir, faults) = (config.dir.clone(), config.faults.clone());
        let opened = tokio::task::spawn_blocking(move || Store::open(&dir, birth, faults))
            .await
            .map_err(|e| StartError::Config(e.to_string()))?;
        match opened {
            // A former life of this process may still be letting go of it.
            Err(OpenError::InUse(_)) if Instant::now() < due => sleep(RETRY_INTERVAL).await,
            Ok(store) => return Ok(store),
            Err(e) => return Err(e.into()),
        }
    }
}

async fn listen(address: &str) -> Result<TcpListener, StartError> {
    let failed = |source| StartError::Listen {
        address: address.to_owned(),
        source,
    };
    TcpListener::bind(address).await.map_err(failed)
}

impl Embedded {
    /// Opens the log, listens, and joins the others. To be called inside a tokio runtime, which should
    /// carry nothing that can keep a thread busy for long.
    pub async fn start(config: EmbeddedConfig) -> Result<Arc<Self>, StartError> {
        config.check()?;
        let store = open_store(&config).await?;
        let listener = listen(&config.listen).await?;
        let (clock, stats) = (Clock::system(), Arc::new(Stats::default()));
        let contents = store.contents().clone();
        let (disk, disk_thread) =
            Disk::start(store, clock, Arc::clone(&stats)).map_err(StartError::Thread)?;
        let standing = contents.raft.hard.standing;
        let raft = Raft::new(config.raft(), contents.raft, clock.now());
        let (out, view) = driver::views(&raft);
        let desk = Arc::new(Desk::new(
            contents.lease,
            view.status.clone(),
            disk.clone(),
            clock,
        ));
        let (inbox, events) = mpsc::channel(INBOX_MAX);
        let identity = Arc::new(config.identity());
        let mut tasks = JoinSet::new();
        let links = Links::new(&identity, &stats, &config.voters);
        links.follow(raft.settled(), raft.latest());
        let presence = watch::Sender::new(PresenceMap::default());
        let acceptor = Acceptor {
            identity,
            members: view.members.clone(),
            inbox: inbox.clone(),
            desk: Arc::clone(&desk),
            presence: presence.clone(),
            clock,
            stats: Arc::clone(&stats),
        };
        tasks.spawn(Arc::new(acceptor).run(listener));
        let (to, of) = (Arc::clone(&links), view.members.clone());
        tasks.spawn(Arc::clone(&desk).settle(to, of, config.me.clone()));
        tasks.spawn(
            Driver {
                raft,
                clock,
                timings: config.timings,
                disk,
                desk: Arc::clone(&desk),
                links: Arc::clone(&links),
                inbox: events,
                out,
                state: State::new(standing),
            }
            .run(),
        );
        let lease = LeaseRound {
            me: config.me.clone(),
            desk,
            links: Arc::clone(&links),
            members: view.members.clone(),
            clock,
            stats: Arc::clone(&stats),
        };
        let shared = Arc::new(Shared {
            address: config.address(),
            me: config.me,
            client: rand::random(),
            next_seq: AtomicU64::new(0),
            inbox,
            seeds: config.voters,
            links,
            removed: watch::Sender::new(false),
            view,
            lease,
            presence,
            stopped: watch::Sender::new(false),
            stats,
            clock,
        });
        tasks.spawn(Arc::clone(&shared).keep_place());
        Ok(Arc::new(Self {
            shared,
            tasks: Mutex::new(tasks),
            disk_thread: Mutex::new(Some(disk_thread)),
        }))
    }

    /// Ends all tasks and connections, writes what is queued, and lets go of the directory. Calls under way
    /// fail. Does not release the lease.
    pub async fn stop(&self) {
        self.shared.stopped.send_replace(true);
        let mut tasks =
            std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
        self.shared.links.close();
        let thread = self
            .disk_thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(thread) = thread else { return };
        self.shared.lease.desk.close_disk();
        let ended = async {
            while !thread.is_finished() {
                sleep(RETRY_INTERVAL).await;
            }
        };
        if timeout(HANDOVER_MAX, ended).await.is_err() {
            tracing::warn!("the coordinator's disk does not finish writing; left behind");
        }
    }

    /// Raft's view of things.
    pub fn status(&self) -> Status {
        self.shared.view.status.borrow().clone()
    }

    /// The last entry that the state here includes.
    pub fn applied_index(&self) -> Index {
        *self.shared.view.applied.borrow()
    }

    /// Totals since the start.
    pub fn counters(&self) -> Counters {
        self.shared.stats.read()
    }

    /// Who this is.
    pub fn member(&self) -> &MemberId {
        &self.shared.me
    }
}

/// How one try of a call went.
enum Try {
    Told(CallTold),
    /// Nothing was done.
    Nothing(String),
    /// Something may have been done.
    Doubt(String),
}

impl Shared {
    fn check_running(&self) -> Result<(), CoordinatorError> {
        if *self.stopped.borrow() {
            return Err(CoordinatorError::Stopped(
                "this process is shutting down".to_owned(),
            ));
        }
        Ok(())
    }

    /// Asks the leader once.
    async fn try_call(&self, call: Call, due: Instant) -> Try {
        let leader = self.view.status.borrow().leader.clone();
        let Some(leader) = leader else {
            return Try::Nothing("there is no Raft leader".to_owned());
        };
        if leader == self.me {
            return match timeout_at(due, put_call(&self.inbox, call)).await {
                Ok(told) => Try::Told(told),
                Err(_) => {
                    Try::Doubt("the Raft leader, this member, got no majority in time".to_owned())
                }
            };
        }
        let Some(asker) = self.links.call(&leader) else {
            return Try::Nothing(format!("it is not known where the Raft leader {leader} is"));
        };
        let Ok(answer) = asker.ask(call) else {
            return Try::Nothing(format!("the Raft leader {leader} is not connected"));
        };
        match timeout_at(due, answer).await {
            Ok(Ok(told)) => Try::Told(told),
            Ok(Err(_)) => Try::Doubt(format!("the connection to the Raft leader {leader} broke")),
            Err(_) => Try::Doubt(format!("the Raft leader {leader} did not answer in time")),
        }
    }

    /// Tries until the deadline. A doubtful try is repeated too: the state machine knows the request.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, CoordinatorError> {
        self.check_running()?;
        kv::check_txn(&txn).map_err(CoordinatorError::Refused)?;
        self.check_room(&txn)?;
        let due = Instant::now() + CALL_TIMEOUT;
        let seq = self.next_seq.fetch_add(1, Ordering::Relaxed) + 1;
        let request = Request {
            client: self.client,
            seq,
            txn,
        };
        let mut doubt: Option<String> = None;
        let mut last;
        loop {
            match self.try_call(Call::Txn(request.clone()), due).await {
                Try::Told(CallTold::Applied(Applied::Outcome(outcome))) => return Ok(outcome),
                Try::Told(CallTold::Applied(Applied::Forgotten)) => {
                    return Err(CoordinatorError::Unknown(
                        "the outcome is no longer remembered".to_owned(),
                    ));
                }
                Try::Told(CallTold::InDoubt) => {
                    last = "the Raft leader lost its leadership".to_owned();
                    doubt = Some(last.clone());
                }
                Try::Doubt(why) => {
                    last = why.clone();
                    doubt = Some(why);
                }
                Try::Told(CallTold::NotLeader(_)) => last = "there is no Raft leader".to_owned(),
                Try::Told(CallTold::Busy) => last = "the Raft leader is busy".to_owned(),
                Try::Told(CallTold::NotDone) => last = "another entry took its place".to_owned(),
                Try::Told(CallTold::Removed) => {
                    last = "this member was removed from the cluster".to_owned();
                }
                Try::Told(_) => last = "a wrong answer".to_owned(),
                Try::Nothing(why) => last = why,
            }
            if Instant::now() + RETRY_INTERVAL >= due {
                return Err(match doubt {
                    Some(why) => CoordinatorError::Unknown(why),
                    None => CoordinatorError::Unavailable(last),
                });
            }
            sleep(RETRY_INTERVAL).await;
        }
    }

    fn check_room(&self, txn: &Txn) -> Result<(), CoordinatorError> {
        let now = self
            .view
            .snapshot
            .borrow()
            .entries
            .iter()
            .map(|(k, v)| k.len() + v.value.len())
            .sum::<usize>();
        let more = txn.ops.iter().map(|op| match op {
            crate::api::Op::Put { key, value } => key.len() + value.len(),
            crate::api::Op::Delete { .. } => 0,
        });
        if now + more.sum::<usize>() > STATE_LEN_MAX {
            return Err(CoordinatorError::Refused(format!(
                "the store holds at most {STATE_LEN_MAX} bytes"
            )));
        }
        Ok(())
    }

    async fn read(&self) -> Result<Arc<Snapshot>, CoordinatorError> {
        self.check_running()?;
        let due = Instant::now() + CALL_TIMEOUT;
        loop {
            let last = match self.try_call(Call::Read, due).await {
                Try::Told(CallTold::ReadAt(index)) => {
                    let mut applied = self.view.applied.clone();
                    match timeout_at(due, applied.wait_for(|a| *a >= index)).await {
                        Ok(Ok(_)) => return Ok(self.view.snapshot.borrow().clone()),
                        Ok(Err(_)) => {
                            return Err(CoordinatorError::Stopped(
                                "the coordinator ended".to_owned(),
                            ));
                        }
                        Err(_) => "this member does not keep up with the Raft leader".to_owned(),
                    }
                }
                Try::Told(told) => format!("no read now: {told:?}"),
                Try::Nothing(why) | Try::Doubt(why) => why,
            };
            if Instant::now() + RETRY_INTERVAL >= due {
                return Err(CoordinatorError::Unavailable(last));
            }
            sleep(RETRY_INTERVAL).await;
        }
    }
}

impl Coordinator for Embedded {
    fn read(&self) -> Answer<'_, Arc<Snapshot>> {
        Box::pin(self.shared.read())
    }

    fn txn(&self, txn: Txn) -> Answer<'_, TxnOutcome> {
        Box::pin(self.shared.txn(txn))
    }

    fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.shared.view.snapshot.clone()
    }

    fn renew(&self, term: Term, ttl: Duration) -> Answer<'_, Renewal> {
        Box::pin(async move {
            self.shared.check_running()?;
            self.shared.lease.renew(term, ttl).await
        })
    }

    fn release(&self, term: Term) -> Answer<'_, ()> {
        Box::pin(async move {
            self.shared.check_running()?;
            self.shared.lease.release(term).await
        })
    }

    fn free(&self, term: Term) -> Answer<'_, bool> {
        Box::pin(async move {
            self.shared.check_running()?;
            self.shared.lease.free(term).await
        })
    }

    fn lease_hint(&self) -> LeaseHint {
        self.shared.lease.desk.hint()
    }

    fn announce(&self, value: String) {
        if value.len() > ANNOUNCEMENT_LEN_MAX {
            tracing::warn!(
                bytes = value.len(),
                "an announcement is too long and is not sent"
            );
            return;
        }
        note_presence(
            &self.shared.presence,
            self.shared.me.clone(),
            value.clone(),
            self.shared.clock,
        );
        self.shared.links.announcement.send_replace(Some(value));
    }

    fn presence(&self) -> watch::Receiver<PresenceMap> {
        self.shared.presence.subscribe()
    }

    fn membership(&self) -> Option<&dyn Membership> {
        Some(self)
    }
}
