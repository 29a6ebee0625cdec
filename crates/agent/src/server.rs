//! The local PostgreSQL as the agent holds it: process, newest sample, configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use craton_core::health::{CRASH_WINDOW, Host};
use craton_core::observe::{DataView, Origin, Server, ServerView};
use craton_core::records::Seal;
use craton_core::sync::{StandbyView, SyncSet, parse_application_name};
use craton_core::{BootTime, Lsn, MemberId, Term};
use craton_pg::{
    Control, DataDir, HbaRule, Instance, ManagedConfig, PgTls, Postmaster, ServerSample, SyncNames,
    Upstream,
};
use tokio::sync::Notify;

use crate::clock;
use crate::libraries::LibrariesHere;
use crate::logical::LogicalHere;
use crate::parameters::Parameters;

/// A look at the server that takes longer counts as no answer.
const SAMPLE_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a server is looked at when nothing is going on.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);
/// How often while it changes its role.
const SAMPLE_INTERVAL_BUSY: Duration = Duration::from_millis(10);
/// Looks at a server that was told to end: its exit is noticed without them.
const SAMPLE_INTERVAL_ENDING: Duration = Duration::from_millis(50);
/// A reading of the data directory that takes longer is not waited for.
const DATA_TIMEOUT: Duration = Duration::from_secs(2);
/// A sample older than this says nothing any more.
const SAMPLE_AGE_MAX: Duration = Duration::from_millis(1500);

/// What is known of the local server. All of it is volatile: a restarted agent finds it again.
#[derive(Default)]
struct Known {
    process: Option<Postmaster>,
    sample: Option<(ServerSample, BootTime)>,
    data: Option<DataView>,
    /// See [`LocalServer::carried`].
    carried: BTreeMap<String, String>,
    maybe_primary: bool,
    /// PostgreSQL's configuration refuses clients.
    closed: bool,
    upstream: Option<(MemberId, Term)>,
    in_force: Option<SyncSet>,
    /// When `in_force` was proven.
    in_force_at: BootTime,
    /// When the look that brought `sample` began.
    sample_begun: BootTime,
    sealed: Option<Seal>,
    active_transactions: Option<u32>,
    busy: bool,
    count_transactions: bool,
    /// Look more often until then.
    lively_until: BootTime,
    /// The WAL senders that were seen to stream.
    streaming: BTreeSet<i32>,
    /// Grows when what a look in progress will say is out of date.
    epoch: u64,
    /// When a new session was last let in (or refused in words).
    answered_at: Option<BootTime>,
    /// What `data` was when it was last read.
    data_before: Option<(DataView, u64)>,
    /// The data directory is being read, since then.
    data_look_since: Option<BootTime>,
    /// Grows when something was done to the data directory.
    data_epoch: u64,
    /// PostgreSQL is being stopped by this agent: its end is no crash.
    ending: bool,
    /// The physical slots of all members.
    member_slots: BTreeSet<String>,
    /// When the flush position of a primary was last seen to move.
    wal_moved_at: Option<BootTime>,
    /// Since when processes wait for WAL to be written while it does not move.
    wal_waits_since: Option<BootTime>,
}

/// How often a new session is tried on a primary: an old one goes on working when the postmaster is stuck.
const KNOCK_INTERVAL: Duration = Duration::from_millis(500);
/// A new session that takes longer counts as none.
const KNOCK_TIMEOUT: Duration = Duration::from_millis(1500);
/// A primary that has let nobody in for this long does not answer.
const KNOCK_AGE_MAX: Duration = Duration::from_millis(2500);

/// More crashes than this in a window are not told apart.
const CRASHES_KEPT: usize = 100;

impl Known {
    /// Compares a new sample with the last one: does WAL move?
    fn note_wal(&mut self, sample: &ServerSample) {
        let last = self.sample.as_ref().map(|(s, _)| s);
        let moved = last.and_then(|s| s.flush_lsn) != sample.flush_lsn;
        if sample.in_recovery || sample.flush_lsn.is_none() {
            self.wal_waits_since = None;
            return;
        }
        let now = clock::now();
        if moved {
            self.wal_moved_at = Some(now);
        }
        self.wal_waits_since = match self.wal_waits_since {
            _ if moved || !sample.wal_waits => None,
            Some(since) => Some(since),
            None => Some(now),
        };
    }
}

/// What one look brought.
struct Looked {
    begun: BootTime,
    epoch: u64,
    sample: Option<ServerSample>,
    active: Option<u64>,
    count: bool,
}

/// The local PostgreSQL.
pub struct LocalServer {
    /// Its files and programs.
    pub instance: Instance,
    /// The control connection.
    pub control: Control,
    /// libpq's password file of the agent's roles.
    pub passfile: PathBuf,
    /// The operator's settings for PostgreSQL.
    pub parameters: Parameters,
    /// What PostgreSQL sorts and computes with.
    pub libraries: LibrariesHere,
    /// Logical replication slots.
    pub logical: LogicalHere,
    /// Who may log in from where.
    pub networks: Vec<String>,
    /// Logins by MD5 are taken, too.
    pub md5: bool,
    /// PostgreSQL's certificate: the agent's own.
    pub tls: Option<PgTls>,
    /// Wakes the agent's loop.
    pub changed: Notify,
    look: Notify,
    data_seen: Notify,
    known: Mutex<Known>,
    /// When PostgreSQL crashed, within the last [`CRASH_WINDOW`].
    crashes: Mutex<Vec<BootTime>>,
}

impl LocalServer {
    /// Wraps an instance; nothing is started.
    pub fn new(
        instance: Instance,
        passfile: PathBuf,
        settings: BTreeMap<String, String>,
        (networks, md5): (Vec<String>, bool),
        tls: Option<PgTls>,
    ) -> Arc<Self> {
        // An agent that ended may have left it so. A file that cannot be read refuses everybody.
        let closed = instance.is_closed().unwrap_or(true);
        Arc::new(Self {
            control: instance.control(),
            instance,
            passfile,
            parameters: Parameters::new(settings),
            libraries: LibrariesHere::default(),
            logical: LogicalHere::default(),
            networks,
            md5,
            tls,
            changed: Notify::new(),
            look: Notify::new(),
            data_seen: Notify::new(),
            known: Mutex::new(Known {
                closed,
                ..Known::default()
            }),
            crashes: Mutex::new(Vec::new()),
        })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The postmaster, if one is held.
    pub fn process(&self) -> Option<Postmaster> {
        self.known().process.clone()
    }

    /// A postmaster was started or adopted.
    pub fn hold(&self, process: Postmaster, maybe_primary: bool) {
        let mut k = self.known();
        k.process = Some(process);
        k.ending = false;
        k.maybe_primary = maybe_primary;
        k.sample = None;
        k.active_transactions = None;
        drop(k);
        self.parameters.new_life();
        self.libraries.new_life();
        self.poke();
    }

    /// The postmaster ended, and nothing of it is left.
    pub fn gone(&self) {
        let mut k = self.known();
        *k = Known {
            busy: k.busy,
            data_before: k.data_before.take(),
            data_look_since: k.data_look_since,
            data_epoch: k.data_epoch,
            // What the files say outlives the process.
            closed: k.closed,
            ..Known::default()
        };
        drop(k);
        self.changed.notify_one();
    }

    /// PostgreSQL is about to be stopped or killed on purpose.
    pub fn expect_end(&self) {
        self.known().ending = true;
    }

    fn note_crash(&self) {
        let now = clock::now();
        let mut crashes = self.crashes.lock().unwrap_or_else(PoisonError::into_inner);
        crashes.retain(|at| now.since(*at) < CRASH_WINDOW);
        if crashes.len() < CRASHES_KEPT {
            crashes.push(now);
        }
    }

    /// What of the host's state PostgreSQL itself shows.
    pub fn observe_host(&self, host: &mut Host) {
        let now = clock::now();
        let crashes = self.crashes.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = crashes.iter().filter(|at| now.since(**at) < CRASH_WINDOW);
        host.crashes = u32::try_from(recent.count()).unwrap_or(u32::MAX);
        drop(crashes);
        let k = self.known();
        host.wal_moved_at = k.wal_moved_at;
        // Only while looks succeed: between two that are far apart it may have moved.
        let fresh = k
            .sample
            .as_ref()
            .is_some_and(|(_, at)| now.since(*at) <= SAMPLE_AGE_MAX);
        host.wal_waits_since = k.wal_waits_since.filter(|_| fresh);
    }

    /// What was seen before says nothing any more: the role has changed.
    pub fn forget_sample(&self) {
        let mut k = self.known();
        k.sample = None;
        k.epoch = k.epoch.wrapping_add(1);
        drop(k);
        self.poke();
    }

    /// A look that begins now; what an earlier one still brings is dropped. A sync set is in force from the end
    /// of its proof on, so the flush position that goes with it must have been read after that: commits
    /// up to then may have been acknowledged under the former set (failover protocol, 3.2).
    pub async fn look_again(&self) -> Result<(), craton_pg::PgError> {
        let epoch = {
            let mut k = self.known();
            k.epoch = k.epoch.wrapping_add(1);
            k.epoch
        };
        let sample = self.control.sample(SAMPLE_TIMEOUT).await?;
        let mut k = self.known();
        if k.epoch == epoch {
            k.epoch = k.epoch.wrapping_add(1);
            k.sample = Some((sample, clock::now()));
        }
        Ok(())
    }

    /// It may accept writes from now on.
    pub fn set_maybe_primary(&self) {
        self.known().maybe_primary = true;
    }

    /// See [`Self::set_maybe_primary`].
    pub fn is_maybe_primary(&self) -> bool {
        self.known().maybe_primary
    }

    /// Names this life of PostgreSQL: pid and start time, as one number.
    pub fn process_name(&self) -> Option<u64> {
        let process = self.process()?;
        let pid = u64::from(process.pid().unsigned_abs());
        // Linux has at most 2^22 pids; the ticks since boot fit above them for thousands of years.
        Some((process.start_ticks() << 22) | pid)
    }

    /// What PostgreSQL is known to enforce.
    pub fn set_in_force(&self, set: Option<SyncSet>) {
        let mut k = self.known();
        k.in_force = set;
        k.in_force_at = clock::now();
        drop(k);
        self.poke();
    }

    /// Whether PostgreSQL is to refuse clients, from the next [`Self::managed`] on.
    pub fn set_closed(&self, closed: bool) {
        self.known().closed = closed;
        self.poke();
    }

    /// Whom it follows.
    pub fn set_upstream(&self, upstream: Option<(MemberId, Term)>) {
        let mut k = self.known();
        k.sealed = if upstream.is_some() {
            None
        } else {
            k.sealed.take()
        };
        k.upstream = upstream;
        drop(k);
        self.poke();
    }

    /// Whom it streams from, and in which term that was configured; none while it does not stream.
    pub fn streams_from(&self) -> Option<(MemberId, Term)> {
        let streams = self.sample().is_some_and(|s| s.is_streaming());
        self.known().upstream.clone().filter(|_| streams)
    }

    /// What it sealed.
    pub fn set_sealed(&self, seal: Option<Seal>) {
        self.known().sealed = seal;
        self.changed.notify_one();
    }

    /// See [`Self::set_sealed`].
    pub fn sealed(&self) -> Option<Seal> {
        self.known().sealed.clone()
    }

    /// The members that there are.
    pub fn set_members<'a>(&self, members: impl Iterator<Item = &'a MemberId>) {
        self.known().member_slots = members.map(MemberId::slot_name).collect();
    }

    /// Look more often: a change of role is under way.
    pub fn set_busy(&self, busy: bool) {
        self.known().busy = busy;
        self.poke();
    }

    /// Look more often for a while.
    pub fn look_often_for(&self, time: Duration) {
        self.known().lively_until = clock::now().after(time);
        self.poke();
    }

    /// Makes the standbys reply now. PostgreSQL releases commits that wait for a standby when that standby
    /// replies *while it streams* (syncrep.c, `SyncRepReleaseWaiters`); one that flushed them while it caught
    /// up, or before a change of the sync set, replies again only to new WAL or after
    /// `wal_receiver_status_interval` (a second), and with every writer waiting there is no new WAL.
    pub async fn nudge(&self) {
        let sql = "SELECT pg_logical_emit_message(true, 'craton', 'reply')";
        if let Err(error) = self
            .control
            .query("nudge to the standbys", sql, SAMPLE_TIMEOUT)
            .await
        {
            tracing::debug!(%error, "the standbys were not nudged; they reply within a second");
        }
    }

    /// Count clients' transactions with every sample.
    pub fn count_transactions(&self, on: bool) {
        let mut k = self.known();
        k.count_transactions = on;
        if !on {
            k.active_transactions = None;
        }
    }

    /// Look now.
    pub fn poke(&self) {
        self.look.notify_one();
        self.changed.notify_one();
    }

    /// The newest sample that still says something.
    pub fn sample(&self) -> Option<ServerSample> {
        let k = self.known();
        let (sample, at) = k.sample.as_ref()?;
        (clock::now().since(*at) <= SAMPLE_AGE_MAX).then(|| sample.clone())
    }

    /// Forgets what was known of the data directory: it has changed.
    pub fn data_changed(&self) {
        let mut k = self.known();
        k.data = None;
        k.data_epoch = k.data_epoch.wrapping_add(1);
    }

    /// The data directory. While the server runs this is what was read before; and so it is while a disk
    /// does not answer.
    pub async fn data(self: &Arc<Self>) -> DataView {
        loop {
            let since = {
                let mut k = self.known();
                if let Some(data) = k.data.clone() {
                    return data;
                }
                let now = clock::now();
                if let Some(since) = k.data_look_since {
                    now.since(since)
                } else {
                    k.data_look_since = Some(now);
                    let this = Arc::clone(self);
                    tokio::spawn(async move { this.look_at_data().await });
                    Duration::ZERO
                }
            };
            if since >= DATA_TIMEOUT {
                return self.data_before();
            }
            let seen = tokio::time::timeout(
                DATA_TIMEOUT.saturating_sub(since),
                self.data_seen.notified(),
            );
            if seen.await.is_ok() && self.known().data_look_since.is_none() {
                return self.data_before();
            }
        }
    }

    /// What was read last, if nothing was done there since.
    fn data_before(&self) -> DataView {
        let k = self.known();
        match &k.data_before {
            Some((view, epoch)) if *epoch == k.data_epoch => view.clone(),
            _ => DataView::Foreign("it cannot be read: the storage does not answer".to_owned()),
        }
    }

    async fn look_at_data(&self) {
        loop {
            let epoch = self.known().data_epoch;
            let (view, lasting) = self.read_data().await;
            let mut k = self.known();
            if k.data_epoch != epoch {
                continue;
            }
            k.data_look_since = None;
            k.data_before = Some((view.clone(), epoch));
            if lasting {
                k.data = Some(view);
            }
            break;
        }
        self.data_seen.notify_one();
    }

    /// Reads the data directory; true if the answer holds until something is done there.
    async fn read_data(&self) -> (DataView, bool) {
        let view = match self.instance.data_dir_state().await {
            Ok(DataDir::Empty | DataDir::HalfClone | DataDir::HalfRewind) => DataView::Empty,
            Ok(DataDir::Foreign(what)) => DataView::Foreign(what),
            Ok(DataDir::Cluster { control, .. }) => DataView::Present {
                system_id: control.system_identifier.to_string(),
                timeline: control.timeline,
                origin: self.origin().await,
            },
            Err(error) => return (DataView::Foreign(error.to_string()), false),
        };
        (view, true)
    }

    /// Whose the data directory is.
    async fn origin(&self) -> Origin {
        if self.process().is_some() || self.instance.is_marked().await {
            return Origin::Own;
        }
        let (refused, carried) = match self.instance.inspect().await {
            Ok(Ok(found)) => {
                for note in &found.notes {
                    tracing::debug!("the data directory is not Craton's: {note}");
                }
                (None, found.carried)
            }
            Ok(Err(why)) => (Some(why), BTreeMap::new()),
            Err(error) => (Some(error.to_string()), BTreeMap::new()),
        };
        self.known().carried = carried;
        Origin::Strange { refused }
    }

    /// Parameters of a data directory that may be adopted, which a cluster founded with it goes on with.
    pub fn carried(&self) -> BTreeMap<String, String> {
        self.known().carried.clone()
    }

    /// The server for a decision.
    pub fn view(&self) -> ServerView {
        let k = self.known();
        if k.process.is_none() {
            return ServerView::Down;
        }
        let fresh = k
            .sample
            .as_ref()
            .filter(|(_, at)| clock::now().since(*at) <= SAMPLE_AGE_MAX);
        let stuck = k
            .answered_at
            .is_some_and(|at| clock::now().since(at) > KNOCK_AGE_MAX);
        let Some((s, _)) = fresh.filter(|(s, _)| s.in_recovery || !stuck) else {
            return ServerView::Silent {
                maybe_primary: k.maybe_primary,
            };
        };
        let configured = configured_sync(&s.synchronous_standby_names);
        ServerView::Running(Server {
            in_recovery: s.in_recovery,
            timeline: s.timeline,
            end: s.end_of_wal(),
            replay: s.replay_lsn,
            end_is_exact: end_is_exact(s),
            upstream: k.upstream.clone(),
            streaming: s.is_streaming(),
            // The decision takes the end of WAL in this sample for one that all commits acknowledged under the
            // older set lie below: it must have been read after the newer was proven.
            sync_in_force: k.in_force.as_ref() == Some(&configured)
                && k.sample_begun > k.in_force_at,
            sync_configured: configured,
            standbys: standbys(s),
            active_transactions: k.active_transactions,
            closed: k.closed,
        })
    }

    /// Looks at the server for as long as the agent lives, and clears up after a postmaster that ended.
    pub async fn watch(self: Arc<Self>) {
        loop {
            let Some(process) = self.process() else {
                self.look.notified().await;
                continue;
            };
            let interval = {
                let k = self.known();
                let lively = k.busy || clock::now() < k.lively_until;
                if k.ending {
                    // It lets nobody in any more, and is busy with its end.
                    SAMPLE_INTERVAL_ENDING
                } else if lively {
                    SAMPLE_INTERVAL_BUSY
                } else {
                    SAMPLE_INTERVAL
                }
            };
            tokio::select! {
                reason = process.exited() => self.after_exit(&process, &reason.to_string()).await,
                () = self.look_once(&process) => {
                    tokio::select! {
                        _ = process.exited() => {}
                        () = self.look.notified() => {}
                        () = tokio::time::sleep(interval) => {}
                    }
                }
            }
        }
    }

    /// Knocks at a primary's door with new sessions for as long as the agent lives.
    pub async fn knock(self: Arc<Self>) {
        loop {
            tokio::time::sleep(KNOCK_INTERVAL).await;
            let primary =
                self.sample().is_some_and(|s| !s.in_recovery) || self.known().answered_at.is_some();
            let Some(process) = self.process().filter(|_| primary) else {
                continue;
            };
            let answer = self
                .control
                .query_apart("a new session", None, "SELECT 1", KNOCK_TIMEOUT)
                .await;
            let mut k = self.known();
            let same = k.process.as_ref().map(Postmaster::pid) == Some(process.pid());
            if same && !matches!(answer, Err(craton_pg::PgError::Timeout { .. })) {
                k.answered_at = Some(clock::now());
            }
        }
    }

    async fn after_exit(&self, process: &Postmaster, reason: &str) {
        if !self.known().ending {
            self.note_crash();
        }
        tracing::info!(pid = process.pid(), reason, "PostgreSQL ended");
        // Backends outlive a killed postmaster for a moment, and could still acknowledge a commit.
        while let Err(error) = self.instance.kill_leftovers(Duration::from_secs(5)).await {
            tracing::error!(%error, "processes of PostgreSQL are left; nothing else is done until they are gone");
        }
        // A task may have been faster, and have started the next one.
        let held = self.process().map(|p| p.pid());
        if held.is_none_or(|pid| pid == process.pid()) {
            self.gone();
        }
    }

    /// Keeps what a look brought. True if a standby began to stream since the last one.
    fn take_in(&self, process: &Postmaster, looked: Looked) -> bool {
        let mut k = self.known();
        if k.epoch != looked.epoch || k.process.as_ref().map(Postmaster::pid) != Some(process.pid())
        {
            return false;
        }
        let mut arrived = false;
        if let Some(sample) = looked.sample {
            let streaming: BTreeSet<i32> = sample
                .replication
                .iter()
                .filter(|r| r.state.as_deref() == Some("streaming"))
                .map(|r| r.pid)
                .collect();
            arrived = !sample.in_recovery && !streaming.is_subset(&k.streaming);
            k.streaming = streaming;
            if let Some(DataView::Present { timeline, .. }) = &mut k.data {
                *timeline = sample.checkpoint_timeline;
            }
            k.maybe_primary = !sample.in_recovery || k.maybe_primary && k.busy;
            k.note_wal(&sample);
            k.sample = Some((sample, clock::now()));
            k.sample_begun = looked.begun;
        }
        if looked.count {
            k.active_transactions = looked.active.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        }
        drop(k);
        arrived
    }

    async fn look_once(&self, process: &Postmaster) {
        let (count, epoch) = {
            let k = self.known();
            (k.count_transactions, k.epoch)
        };
        let begun = clock::now();
        let sample = self.control.sample(SAMPLE_TIMEOUT).await;
        let active = if count {
            self.control
                .active_client_transactions(SAMPLE_TIMEOUT)
                .await
                .ok()
        } else {
            None
        };
        let looked = Looked {
            begun,
            epoch,
            sample: sample.ok(),
            active,
            count,
        };
        let arrived = self.take_in(process, looked);
        self.changed.notify_one();
        if arrived {
            self.nudge().await;
        }
    }

    /// The configuration for a role, to be written.
    pub fn managed(&self, upstream: Option<Upstream>, sync: SyncNames) -> ManagedConfig {
        let closed = self.known().closed;
        ManagedConfig {
            upstream,
            sync,
            settings: self.parameters.to_write(),
            ..self.with_clients(closed)
        }
    }

    /// The configuration as far as it says who may log in.
    pub fn with_clients(&self, closed: bool) -> ManagedConfig {
        let networks: Vec<&str> = self.networks.iter().map(String::as_str).collect();
        let hba = HbaRule::standard(&networks, self.tls.is_some());
        ManagedConfig {
            upstream: None,
            restore_command: None,
            sync: SyncNames::Nobody,
            member_slots: self.known().member_slots.clone(),
            settings: self.parameters.in_file(),
            hba: if self.md5 {
                HbaRule::with_md5(hba)
            } else {
                hba
            },
            closed,
            tls: self.tls.clone(),
        }
    }

    /// The slots here whose WAL is gone: their members need another way back.
    pub fn lost_slots(&self) -> BTreeSet<String> {
        let slots = self.sample().map(|s| s.slots).unwrap_or_default();
        slots
            .into_iter()
            .filter(|s| s.wal_status.as_deref() == Some("lost"))
            .map(|s| s.name)
            .collect()
    }

    /// From where each replication slot here keeps WAL.
    pub fn slots(&self) -> BTreeMap<String, Lsn> {
        let slots = self.sample().map(|s| s.slots).unwrap_or_default();
        slots
            .into_iter()
            .filter_map(|s| Some((s.name, s.restart_lsn?)))
            .collect()
    }
}

/// True if nothing on this disk lies beyond `end_of_wal`. A WAL receiver is started only when all local WAL
/// has been replayed, and what it writes is counted in `receive_lsn`; so once there was one in this
/// postmaster's life, the greater of receive and replay is the end of all there is (xlogrecovery.c,
/// `WaitForWALToBecomeAvailable`).
pub fn end_is_exact(s: &ServerSample) -> bool {
    s.receive_lsn.is_some() || s.has_replayed_local_wal()
}

/// (V, k) as PostgreSQL's setting for it. k = 0 is "nobody is waited for"; more than there are members is "for
/// nobody that exists".
pub fn sync_names(set: &SyncSet) -> SyncNames {
    if set.k == 0 {
        return SyncNames::Off;
    }
    if set.is_closed() {
        return SyncNames::Nobody;
    }
    let names = set
        .members
        .iter()
        .map(|(m, i)| craton_core::sync::application_name(m, *i))
        .collect();
    SyncNames::Any { k: set.k, names }
}

/// Reads the setting back. Anything that is not ours (or waits for nobody that exists) lets no commit
/// through that we know of, which covers every sync set.
fn configured_sync(text: &str) -> SyncSet {
    SyncSet::from_standby_names(text).unwrap_or_else(SyncSet::closed)
}

fn standbys(sample: &ServerSample) -> Vec<StandbyView> {
    sample
        .replication
        .iter()
        .filter_map(|row| {
            let (member, incarnation) = parse_application_name(&row.application_name)?;
            Some(StandbyView {
                member,
                incarnation,
                streaming: row.state.as_deref() == Some("streaming"),
                flush_lsn: row.flush_lsn.unwrap_or(Lsn::ZERO),
            })
        })
        .collect()
}
