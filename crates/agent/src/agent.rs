//! The loop: observe, decide, act.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use craton_coordinator::api::{Coordinator, CoordinatorError, LeaseHint, Txn, TxnOutcome};
use craton_core::decide::{Decision, LeaseWish, Memory, OpenElection, Task, TaskKind, decide};
use craton_core::health::Host;
use craton_core::observe::{
    LeaseSeen, Me, MemberStatus, Observation, PeerView, PromiseView, ServerView, TaskFailure,
    TaskView,
};
use craton_core::records::ClusterView;
use craton_core::settings::Settings;
use craton_core::topology::{MemberRole, Topology};
use craton_core::{BootTime, MemberId};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};

use crate::act::{ActError, Actor};
use crate::clock;
use crate::cloning;
use crate::config::AgentConfig;
use crate::fencing::Fencing;
use crate::lease::{LeaseKeeper, LeaseTiming};
use crate::logical;
use crate::members;
use crate::promises::Plan;
use crate::receivers::Receivers;
use crate::server::LocalServer;
use crate::storage::Storage;
use crate::store;
use crate::views;

/// Running transactions are counted often for so long after clients are held.
const HOLD_LOOKS: Duration = Duration::from_secs(5);
/// The loop runs at least this often.
const TICK: Duration = Duration::from_millis(50);
/// Processes that do not die within this are tried again with the next decision.
const KILL_ROUND: Duration = Duration::from_secs(1);
/// First pause after a failed task; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(200);
/// Longest pause after a failed task.
const RETRY_MAX: Duration = Duration::from_secs(10);
/// At the agent's end a task gets this long.
const TASK_END_MAX: Duration = Duration::from_secs(20);
/// After a committed transaction the local copy of the store is waited for this long at most.
const ECHO_MAX: Duration = Duration::from_millis(500);

/// While the leader lives on promises, a submission that came to nothing is not repeated sooner.
const SUBMIT_PAUSE: Duration = Duration::from_millis(250);
/// A submission that failed is not repeated sooner: voters that are not connected fail it at once.
const FAILED_PAUSE: Duration = Duration::from_millis(50);

/// One observation with what was decided on it; published for the API and the metrics.
pub type Seen = Arc<(Observation, Decision)>;

type TaskEnd = (Task, Result<(), ActError>);

/// Something asked of the coordinator.
struct Submission {
    handle: JoinHandle<Submitted>,
    first_read: bool,
}

/// What woke the loop.
enum Ended {
    /// Nothing that it had begun.
    Nothing,
    Task(Result<TaskEnd, JoinError>),
    Submission(Result<Submitted, JoinError>),
}

/// Waits for the end of what was begun, for ever if nothing was.
async fn end_of<T>(handle: Option<&mut JoinHandle<T>>) -> Result<T, JoinError> {
    match handle {
        Some(handle) => handle.await,
        None => std::future::pending().await,
    }
}

/// What came of it.
#[derive(Default)]
struct Submitted {
    /// The newest revision that it made or saw.
    revision: Option<u64>,
    /// What could not be done, and why.
    failed: Option<(&'static str, CoordinatorError)>,
}

impl Submitted {
    fn at(revision: u64) -> Self {
        Self {
            revision: Some(revision),
            failed: None,
        }
    }
}

/// The agent of one member.
pub struct Agent {
    config: AgentConfig,
    coordinator: Arc<dyn Coordinator>,
    server: Arc<LocalServer>,
    actor: Arc<Actor>,
    lease: LeaseKeeper,
    fencing: Arc<Fencing>,
    storage: Arc<Storage>,
    receivers: Arc<Receivers>,
    memory: Memory,
    task: Option<(TaskView, JoinHandle<TaskEnd>)>,
    failures: BTreeMap<TaskKind, TaskFailure>,
    submission: Option<Submission>,
    /// Clients are held for a handover, and running transactions are waited for.
    holding: bool,
    /// The revision that our last transaction made, and until when it is waited for.
    echo: Option<(u64, BootTime)>,
    /// The revision of the first linearizable read since the start: the local copy is believed from there on.
    known_from: Option<u64>,
    /// The store as last parsed, with its revision.
    parsed: Option<ClusterView>,
    bootstrap_done: bool,
    /// Nothing is submitted before.
    submit_after: BootTime,
    announced_at: Option<BootTime>,
    announced: Option<MemberStatus>,
    last_reasons: String,
    /// The life of PostgreSQL that has streamed or led: nothing that was here before it is needed.
    proven: Option<u64>,
    /// The last failure of a submission that was logged.
    last_failure: Option<CoordinatorError>,
    seen: watch::Sender<Option<Seen>>,
    topology: watch::Sender<Arc<Topology>>,
    topology_sent_at: BootTime,
}

/// The parts that an agent is made of.
pub struct Parts {
    /// Its configuration.
    pub config: AgentConfig,
    /// The coordinator.
    pub coordinator: Arc<dyn Coordinator>,
    /// PostgreSQL.
    pub server: Arc<LocalServer>,
    /// The hands.
    pub actor: Arc<Actor>,
    /// The lease.
    pub lease: LeaseKeeper,
    /// The fence.
    pub fencing: Arc<Fencing>,
    /// The disks.
    pub storage: Arc<Storage>,
    /// The backup receivers.
    pub receivers: Arc<Receivers>,
    /// Where observations go.
    pub seen: watch::Sender<Option<Seen>>,
    /// Where the topology goes.
    pub topology: watch::Sender<Arc<Topology>>,
}

impl Agent {
    /// Puts the parts together.
    pub fn new(parts: Parts) -> Self {
        Self {
            config: parts.config,
            coordinator: parts.coordinator,
            server: parts.server,
            actor: parts.actor,
            lease: parts.lease,
            fencing: parts.fencing,
            storage: parts.storage,
            receivers: parts.receivers,
            memory: Memory::default(),
            task: None,
            failures: BTreeMap::new(),
            submission: None,
            holding: false,
            echo: None,
            known_from: None,
            parsed: None,
            bootstrap_done: false,
            submit_after: BootTime(0),
            announced_at: None,
            announced: None,
            last_reasons: String::new(),
            proven: None,
            last_failure: None,
            seen: parts.seen,
            topology: parts.topology,
            topology_sent_at: BootTime(0),
        }
    }

    /// Runs until `shutdown` turns true. PostgreSQL is left running: a restarted agent takes it over. No task
    /// outlives this: one that did could start a primary that nobody guards.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let mut store = self.coordinator.watch();
        let mut presence = self.coordinator.presence();
        let mut lease = self.lease.subscribe();
        let server = Arc::clone(&self.server);
        while !*shutdown.borrow() {
            self.step().await;
            let task = self.task.as_mut().map(|(_, handle)| handle);
            let submission = self.submission.as_mut().map(|s| &mut s.handle);
            let ended = tokio::select! {
                _ = shutdown.changed() => Ended::Nothing,
                _ = store.changed() => Ended::Nothing,
                _ = presence.changed() => Ended::Nothing,
                _ = lease.changed() => Ended::Nothing,
                () = server.changed.notified() => Ended::Nothing,
                // Their own ends wake the loop: whatever they announce before, they have not ended yet.
                result = end_of(task) => Ended::Task(result),
                result = end_of(submission) => Ended::Submission(result),
                () = tokio::time::sleep(TICK) => Ended::Nothing,
            };
            match ended {
                Ended::Nothing => {}
                Ended::Task(result) => self.task_ended(result),
                Ended::Submission(result) => self.submission_ended(result.unwrap_or_default()),
            }
        }
        self.end_task().await;
    }

    /// A start or a promotion is waited for; a copy is cut off, and made again some day.
    async fn end_task(&mut self) {
        let Some((view, mut handle)) = self.task.take() else {
            return;
        };
        let kind = view.task.kind();
        if kind == TaskKind::Clone {
            handle.abort();
        }
        if tokio::time::timeout(TASK_END_MAX, &mut handle)
            .await
            .is_err()
        {
            tracing::warn!(?kind, "a task does not end; it is cut off");
            handle.abort();
            let _ = handle.await;
        }
    }

    async fn step(&mut self) {
        self.learn_store();
        let observation = self.observe().await;
        let decision = decide(&observation, &self.memory);
        self.memory = decision.memory.clone();
        self.log(&decision);
        self.act(&observation, &decision).await;
        self.tell(&observation, &decision);
        self.seen
            .send_replace(Some(Arc::new((observation, decision))));
    }

    /// The local copy may be old just after a start: the store is believed once it was read linearizably.
    fn learn_store(&mut self) {
        if self.known_from.is_some()
            || self.submission.is_some()
            || clock::now() < self.submit_after
        {
            return;
        }
        let coordinator = Arc::clone(&self.coordinator);
        let handle = tokio::spawn(async move {
            match coordinator.read().await {
                Ok(snapshot) => Submitted::at(snapshot.revision),
                Err(error) => {
                    tracing::debug!(%error, "the coordinator cannot be read yet");
                    Submitted::default()
                }
            }
        });
        self.submission = Some(Submission {
            handle,
            first_read: true,
        });
    }

    fn submission_ended(&mut self, Submitted { revision, failed }: Submitted) {
        let Some(s) = self.submission.take() else {
            return;
        };
        let pause = match (&failed, revision) {
            (_, None) if self.lease.promises().0.is_some() => SUBMIT_PAUSE,
            (Some(_), _) => FAILED_PAUSE,
            // The store could not be read yet.
            (None, None) if s.first_read => FAILED_PAUSE,
            (None, _) => Duration::ZERO,
        };
        self.submit_after = clock::now().after(pause);
        if let Some((what, error)) = &failed
            && self.last_failure.as_ref() != Some(error)
        {
            tracing::warn!(%error, "{what}");
        }
        self.last_failure = failed.map(|(_, error)| error);
        if let Some(revision) = revision {
            if s.first_read {
                self.known_from = Some(revision);
            } else {
                self.echo = Some((revision, clock::now().after(ECHO_MAX)));
            }
        }
    }

    fn task_ended(&mut self, result: Result<TaskEnd, JoinError>) {
        let Some((view, _)) = self.task.take() else {
            return;
        };
        let kind = view.task.kind();
        self.server.set_busy(false);
        match result {
            Ok((task, Ok(()))) => {
                self.failures.remove(&kind);
                self.bootstrap_done |= task == Task::Bootstrap;
            }
            Ok((_, Err(error))) => {
                tracing::warn!(?kind, %error, "a task failed");
                // The data directory may be the reason, or be gone: it is looked at anew.
                self.server.data_changed();
                self.note_failure(kind, &error.to_string());
            }
            Err(join) if join.is_cancelled() => {}
            Err(join) => {
                tracing::error!(?kind, error = %join, "a task broke off");
                self.note_failure(kind, &join.to_string());
            }
        }
    }

    fn note_failure(&mut self, kind: TaskKind, error: &str) {
        let count = self
            .failures
            .get(&kind)
            .map_or(1, |f| f.count.saturating_add(1));
        let pause = RETRY_MIN
            .saturating_mul(1 << count.saturating_sub(1).min(10))
            .min(RETRY_MAX);
        let error = in_short(error);
        let failure = TaskFailure {
            kind,
            error,
            count,
            retry_at: clock::now().after(pause),
        };
        self.failures.insert(kind, failure);
    }

    async fn observe(&mut self) -> Observation {
        let state = self.actor.state();
        let view = self.view();
        if let Some(view) = &view {
            self.server
                .parameters
                .set_cluster(view.settings().postgresql);
            self.server.set_members(view.members.keys());
        }
        Observation {
            now: clock::now(),
            wall_ms: clock::wall_ms(),
            cluster_name: self.config.cluster.clone(),
            initial_settings: self.initial_settings(),
            me: Me {
                id: self.config.member.clone(),
                incarnation: state.incarnation,
                floor: state.floor,
                host: self.config.host.clone(),
                port: self.config.port,
                api: self.config.api_address(),
                priority: self.config.effective_priority(),
                noload: self.config.noload,
                upstream: self.config.upstream.clone(),
                first_start: self.config.effective_first_start(),
            },
            view,
            lease: self.lease.get(),
            promises: {
                let (living_since, from) = self.lease.promises();
                PromiseView {
                    held_until: self.actor.promised_until(),
                    living_since,
                    from,
                }
            },
            lease_seen: match self.coordinator.lease_hint() {
                LeaseHint::Held { term, .. } => LeaseSeen::Held(term),
                LeaseHint::Lapsed => LeaseSeen::Lapsed,
                LeaseHint::Unknown => LeaseSeen::Unknown,
            },
            peers: self.peers(),
            receivers: self.receivers.view(),
            data: self.server.data().await,
            server: self.server.view(),
            process: self.server.process_name(),
            config_stale: self.server.parameters.is_stale(),
            pending: self.server.parameters.pending(),
            host: self.host(),
            libraries: self.server.libraries.get(),
            bootstrap_done: self.bootstrap_done,
            logical: logical::told(&self.server, &state.slots),
            clone_repository: self.config.clone.repository.is_some(),
            sealed: self.server.sealed(),
            task: self.task.as_ref().map(|(view, _)| view.clone()),
            failures: self.failures.values().cloned().collect(),
        }
    }

    /// What a new cluster starts with; the operator's word goes over what a database brings along.
    fn initial_settings(&self) -> Settings {
        let mut settings = self.config.initial.clone();
        for (key, value) in self.server.carried() {
            settings.postgresql.entry(key).or_insert(value);
        }
        settings
    }

    fn host(&self) -> Host {
        let mut host = Host {
            disks: self.storage.disks(),
            writes: self.storage.writes(),
            no_fence: self.fencing.trouble(),
            ..Host::default()
        };
        self.server.observe_host(&mut host);
        host
    }

    fn view(&mut self) -> Option<ClusterView> {
        let snapshot = Arc::clone(&self.coordinator.watch().borrow());
        if snapshot.revision < self.known_from? {
            return None;
        }
        if self.parsed.as_ref().map(|v| v.revision) != Some(snapshot.revision) {
            self.parsed = match store::view(&snapshot) {
                Ok(view) => Some(view),
                Err(error) => {
                    tracing::error!(%error, "the coordinator holds something that this version cannot read");
                    None
                }
            };
        }
        let mut view = self.parsed.clone()?;
        members::leave_out_removed(self.coordinator.as_ref(), &mut view);
        Some(view)
    }

    fn peers(&self) -> BTreeMap<MemberId, PeerView> {
        let presence = Arc::clone(&self.coordinator.presence().borrow());
        presence
            .iter()
            .filter(|(m, _)| **m != self.config.member)
            .filter_map(|(m, p)| {
                let status: MemberStatus = serde_json::from_str(&p.value).ok()?;
                Some((
                    m.clone(),
                    PeerView {
                        heard_at: p.heard_at,
                        status,
                    },
                ))
            })
            .collect()
    }

    async fn act(&mut self, o: &Observation, d: &Decision) {
        let settings = o
            .view
            .as_ref()
            .map_or_else(|| o.initial_settings.clone(), ClusterView::settings);
        self.storage.set_settings(&settings);
        let timing = LeaseTiming {
            ttl: settings.ttl(),
            margin: settings.margin(),
            heartbeat: settings.heartbeat(),
        };
        let addresses = o
            .view
            .iter()
            .flat_map(|v| &v.members)
            .map(|(m, r)| (m.clone(), r.value.api.clone()))
            .collect();
        let plan = Plan {
            needs: d.promises.clone(),
            addresses,
        };
        self.fencing
            .set_timing(timing.ttl, timing.margin, timing.heartbeat);
        if let Some(why) = &d.kill {
            // Processes in a dead disk do not die: the lease must not live on while they are waited for.
            self.lease.wish(LeaseWish::Leave, timing, Plan::default());
            tracing::warn!(why, "killing PostgreSQL");
            if let Some((_, handle)) = self.task.take() {
                handle.abort();
            }
            self.server.set_busy(false);
            if !self.actor.kill(KILL_ROUND).await {
                return;
            }
        }
        // Before anything is submitted: from then on the coordinator may hold another sync set.
        self.lease.wish(d.lease, timing, plan);
        // Not while a task runs: it may have started a primary since the server was looked at.
        if d.lease == LeaseWish::Leave
            && matches!(o.server, ServerView::Down)
            && self.task.is_none()
        {
            self.fencing.rest();
        }
        self.server
            .count_transactions(d.reasons.iter().any(|r| r.code == "switching"));
        let holding = d.reasons.iter().any(|r| r.code == "holding");
        if holding && !self.holding {
            // Clients wait for the end of the last transaction.
            self.server.look_often_for(HOLD_LOOKS);
        }
        self.holding = holding;
        let echoed = self.echo.is_none_or(|(rev, until)| {
            o.view.as_ref().is_some_and(|v| v.revision >= rev) || o.now > until
        });
        if self.submission.is_none() && echoed && o.now >= self.submit_after {
            self.submit(d);
        }
        for ask in &d.ask_seals {
            self.receivers.ask_seal(ask);
        }
        if let (Some(task), None) = (&d.task, &self.task) {
            self.start(task.clone(), o);
        }
    }

    fn submit(&mut self, d: &Decision) {
        let mut txns = Vec::new();
        for change in &d.changes {
            match store::txn(change) {
                Ok(txn) => txns.push(txn),
                Err(error) => tracing::error!(%error, "a change cannot be written"),
            }
        }
        let open = d
            .open
            .as_ref()
            .and_then(|open| Some((open.clone(), store::txn(&open.change).ok()?)));
        if txns.is_empty() && open.is_none() {
            return;
        }
        let coordinator = Arc::clone(&self.coordinator);
        let server = Arc::clone(&self.server);
        let handle = tokio::spawn(async move {
            let revision = submit(coordinator.as_ref(), txns, open).await;
            server.changed.notify_one();
            revision
        });
        self.submission = Some(Submission {
            handle,
            first_read: false,
        });
    }

    fn start(&mut self, task: Task, o: &Observation) {
        let quiet = matches!(
            task.kind(),
            TaskKind::SetSync | TaskKind::Admit | TaskKind::Checkpoint | TaskKind::Configure
        );
        if quiet {
            tracing::debug!(?task, "starting");
        } else {
            tracing::info!(task = ?task.kind(), "starting");
        }
        self.server.set_busy(!matches!(
            task.kind(),
            TaskKind::Clone | TaskKind::Checkpoint | TaskKind::Configure
        ));
        let actor = Arc::clone(&self.actor);
        let server = Arc::clone(&self.server);
        let members = o
            .view
            .as_ref()
            .map(|v| v.members.clone())
            .unwrap_or_default();
        let view = TaskView {
            task: task.clone(),
            since: o.now,
        };
        let handle = tokio::spawn(async move {
            let result = actor.run(task.clone(), &members).await;
            server.poke();
            (task, result)
        });
        self.task = Some((view, handle));
    }

    /// Announcements and topology: at once when something of substance changed, else with the heartbeat.
    fn tell(&mut self, o: &Observation, d: &Decision) {
        let mut own = views::own_status(o, d);
        if o.task
            .as_ref()
            .is_some_and(|t| t.task.kind() == TaskKind::Clone)
        {
            own.doing = cloning::in_words(&own.doing, *self.actor.progress.borrow());
        }
        if own.role == MemberRole::Leader {
            own.slots = self.server.slots();
            own.lost_slots = self.server.lost_slots();
        }
        self.put_former_away(o, own.role);
        let heartbeat = o.view.as_ref().map_or_else(
            || o.initial_settings.heartbeat(),
            |v| v.settings().heartbeat(),
        );
        let due = self
            .announced_at
            .is_none_or(|at| o.now.since(at) >= heartbeat);
        let bare = |s: &MemberStatus| MemberStatus {
            lsn: None,
            replay_lsn: None,
            slots: BTreeMap::new(),
            logical: s.logical.in_substance(),
            health: views::in_substance(&s.health),
            ..s.clone()
        };
        let changed = self.announced.as_ref().map(bare) != Some(bare(&own));
        if due || changed {
            if let Ok(text) = serde_json::to_string(&own) {
                self.coordinator.announce(text);
            }
            self.announced_at = Some(o.now);
            self.announced = Some(own.clone());
        }
        if let Some(next) = views::topology(o, &own) {
            let substance = views::differs_in_substance(&self.topology.borrow(), &next);
            if substance || o.now.since(self.topology_sent_at) >= heartbeat {
                self.topology_sent_at = o.now;
                self.topology.send_replace(Arc::new(next));
            }
        }
    }

    /// What was here before a clone is kept until PostgreSQL, on what is here now, streams from a leader or leads.
    fn put_former_away(&mut self, o: &Observation, role: MemberRole) {
        let streams = matches!(&o.server, ServerView::Running(s) if s.in_recovery && s.streaming);
        let view = o.view.as_ref().and_then(|v| v.leadership.as_ref());
        let proven = streams || (role == MemberRole::Leader && view.is_some_and(|l| l.value.open));
        if o.task.is_none() && proven && o.process.is_some() && o.process != self.proven {
            self.proven = o.process;
            let actor = Arc::clone(&self.actor);
            tokio::spawn(async move { actor.retire_former().await });
        }
    }

    /// Reasons are logged when they change, not fifty times a second.
    fn log(&mut self, d: &Decision) {
        let reasons: Vec<&str> = d.reasons.iter().map(|r| r.code).collect();
        let line = reasons.join(", ");
        if line != self.last_reasons {
            let texts: Vec<&str> = d.reasons.iter().map(|r| r.text.as_str()).collect();
            tracing::info!(reasons = line, "{}", texts.join("; "));
            self.last_reasons = line;
        }
    }
}

/// Submits in order; stops at the first that fails.
async fn submit(
    coordinator: &dyn Coordinator,
    txns: Vec<Txn>,
    open: Option<(OpenElection, Txn)>,
) -> Submitted {
    let mut done = Submitted::default();
    let mut lost = false;
    for txn in txns {
        match coordinator.txn(txn).await {
            Ok(TxnOutcome::Committed(revision)) => done.revision = Some(revision),
            Ok(TxnOutcome::Conflict) => {
                lost = true;
                tracing::debug!("a change lost its race; deciding anew");
            }
            Err(error) => {
                done.failed = Some(("a change could not be submitted", error));
                return done;
            }
        }
    }
    if let Some((open, txn)) = open {
        match coordinator.free(open.after).await {
            Ok(true) => match coordinator.txn(txn).await {
                Ok(TxnOutcome::Committed(revision)) => done.revision = Some(revision),
                Ok(TxnOutcome::Conflict) => {
                    lost = true;
                    tracing::debug!("somebody else opened the election");
                }
                Err(error) => done.failed = Some(("an election could not be opened", error)),
            },
            Ok(false) => tracing::debug!(term = %open.after, "the lease is not free yet"),
            Err(error) => done.failed = Some(("the voters could not be asked", error)),
        }
    }
    // What won the race may not have come here yet, and the same change would lose again.
    if lost
        && done.failed.is_none()
        && let Ok(Ok(now)) = tokio::time::timeout(ECHO_MAX, coordinator.read()).await
    {
        done.revision = done.revision.max(Some(now.revision));
    }
    done
}

/// Shared by the API: the newest observation.
pub fn newest(seen: &watch::Receiver<Option<Seen>>) -> Option<Seen> {
    seen.borrow().clone()
}

/// The first line, and the last that says what was fatal: the log has the rest.
fn in_short(error: &str) -> String {
    let first = error.lines().next().unwrap_or_default();
    let fatal = error
        .lines()
        .rev()
        .find(|l| (l.contains("FATAL") && !l.contains("starting up")) || l.contains("PANIC"));
    match fatal {
        Some(fatal) if fatal != first => format!("{first} {fatal}"),
        _ => first.to_owned(),
    }
}
