//! The agent's decision: a pure function of what it knows.
//!
//! `decide(observation, memory) -> Decision`: what to do with the lease, which changes to submit to the
//! coordinator, which long task to start, and why. The same function runs in the agent, in the simulator
//! and in the tests. The rules are the failover protocol's; each is cited where it is applied.

mod first_start;
mod health;
mod leader;
mod order;
mod receivers;
mod request;
mod rolling;
mod slots;
mod standby;
mod sync_set;
mod vote;

pub use receivers::AskSeal;
pub use request::refusal_of;
pub use vote::next_sync;

use std::collections::BTreeMap;
use std::time::Duration;

use crate::observe::{DataView, Observation, Origin, ServerView};
use crate::promise::PromiseNeed;
use crate::records::{
    Change, ClusterView, Event, Key, Leadership, MemberRecord, MemberRef, Record,
};
use crate::settings::{Durability, Settings};
use crate::sync::SyncSet;
use crate::topology::MemberRole;
use crate::types::{BootTime, Incarnation, Lsn, MemberId, Term, TimelineId};

/// How PostgreSQL is stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopHow {
    /// A clean shutdown: all WAL reaches the standbys.
    Fast,
    /// At once, every process.
    Kill,
}

/// A long action; one at a time. Each may be started again after a crash in the middle.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Task {
    /// Make the cluster's one database.
    InitDb,
    /// Prepare the data directory that stands here to be the cluster's one database.
    Adopt,
    /// Start PostgreSQL as a standby that streams from nobody, so that its end of WAL can be known.
    StartStandby,
    /// Start PostgreSQL in place as the primary it was, with this sync set.
    StartPrimary {
        /// In force before the first write.
        sync: SyncSet,
    },
    /// Stop PostgreSQL.
    Stop {
        /// How.
        how: StopHow,
        /// Why, in words.
        why: String,
    },
    /// Stream from the leader of `term`, or from a standby of that leader.
    Follow {
        /// Whom.
        from: MemberId,
        /// In which term: noted durably as the floor before it is done.
        term: Term,
    },
    /// Note "nothing below `term`" durably, drop the WAL receiver, find the end of WAL.
    Seal {
        /// The open election's term.
        term: Term,
    },
    /// Promote onto `timeline`, with `sync` in force before the first write.
    Promote {
        /// The term it was elected in.
        term: Term,
        /// The reserved timeline; every number below it is taken.
        timeline: TimelineId,
        /// The sync set.
        sync: SyncSet,
    },
    /// Create the roles and functions that other parts log in with.
    Bootstrap,
    /// Copy the database from another member into an empty data directory.
    Clone {
        /// From whom.
        from: MemberId,
        /// Out of the backup repository instead, if it has a fresh backup.
        repository: bool,
        /// The term at its birth: the new incarnation's floor.
        term: Term,
    },
    /// Keep the WAL that the cluster does not have, then rewind to the leader's history (or clone).
    Rewind {
        /// The leader.
        from: MemberId,
        /// Where the histories parted, where that is known.
        fork: Option<(TimelineId, Lsn)>,
        /// The new incarnation's floor.
        term: Term,
    },
    /// While sealed for `term`: stream from a sealed member that holds more up to there, then seal anew.
    CatchUp {
        /// From whom.
        from: MemberId,
        /// It is a backup receiver: its API, which gives WAL as files.
        receiver: Option<String>,
        /// The open election's term.
        term: Term,
        /// The timeline of the end that is wanted.
        timeline: TimelineId,
        /// That end.
        lsn: Lsn,
    },
    /// As a standby: get the leader's logical slots that have no copy here, and restart PostgreSQL with them.
    TakeSlots {
        /// The leader.
        from: MemberId,
        /// Its term.
        term: Term,
    },
    /// Put a sync set in force.
    SetSync(SyncSet),
    /// Let clients in, who were refused since PostgreSQL was started as a primary.
    Admit,
    /// Write a checkpoint and begin a WAL segment, so that the shutdown of a switchover and the promotion have little to
    /// do.
    Checkpoint,
    /// Write the operator's settings into the configuration, and let PostgreSQL read it. The role stays.
    Configure,
    /// Stop PostgreSQL and throw the data directory away: the life of it that is named here is over.
    Reinit {
        /// The life that ends.
        incarnation: Option<Incarnation>,
        /// The next life's floor.
        term: Term,
    },
}

/// A [`Task`] without its particulars.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[allow(missing_docs, reason = "each is named after its task")]
pub enum TaskKind {
    InitDb,
    Adopt,
    StartStandby,
    StartPrimary,
    Stop,
    Follow,
    Seal,
    Promote,
    Bootstrap,
    Clone,
    Rewind,
    CatchUp,
    TakeSlots,
    SetSync,
    Admit,
    Checkpoint,
    Configure,
    Reinit,
}

impl Task {
    /// Its kind.
    pub fn kind(&self) -> TaskKind {
        match self {
            Self::InitDb => TaskKind::InitDb,
            Self::Adopt => TaskKind::Adopt,
            Self::StartStandby => TaskKind::StartStandby,
            Self::StartPrimary { .. } => TaskKind::StartPrimary,
            Self::Stop { .. } => TaskKind::Stop,
            Self::Follow { .. } => TaskKind::Follow,
            Self::Seal { .. } => TaskKind::Seal,
            Self::Promote { .. } => TaskKind::Promote,
            Self::Bootstrap => TaskKind::Bootstrap,
            Self::Clone { .. } => TaskKind::Clone,
            Self::Rewind { .. } => TaskKind::Rewind,
            Self::CatchUp { .. } => TaskKind::CatchUp,
            Self::TakeSlots { .. } => TaskKind::TakeSlots,
            Self::SetSync(_) => TaskKind::SetSync,
            Self::Admit => TaskKind::Admit,
            Self::Checkpoint => TaskKind::Checkpoint,
            Self::Configure => TaskKind::Configure,
            Self::Reinit { .. } => TaskKind::Reinit,
        }
    }
}

/// What should happen with the lease.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeaseWish {
    /// Nothing.
    Leave,
    /// Keep renewing it for this term.
    Hold(Term),
    /// Give it up now.
    Release(Term),
}

/// Ask the coordinator whether the lease of `after` is free for good, and if so open the next election.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OpenElection {
    /// The term that is over.
    pub after: Term,
    /// The change to submit once `free(after)` is true.
    pub change: Change,
}

/// Why, as data: `craton explain` prints it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reason {
    /// A short word for machines and tests.
    pub code: &'static str,
    /// For people.
    pub text: String,
}

/// What the decision remembers between two calls. Lost at a restart, which must cost nothing but time.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Memory {
    /// The leadership's revision and when it was first seen.
    leadership_seen: Option<(u64, BootTime)>,
    /// The leadership's revision when this agent first saw it: an earlier life may have proposed anything on it.
    first_revision: Option<u64>,
    /// Sync sets that were proposed to the coordinator on this revision of the leadership: their outcome is
    /// not known until the revision changes.
    proposed: Option<(u64, Vec<(SyncSet, Durability)>)>,
    /// The sync set in force in PostgreSQL, and the flush position when that was first seen.
    barrier: Option<(SyncSet, Lsn)>,
    /// Since when no sync set is proven in force.
    unproven_since: Option<BootTime>,
    /// Where a leader was when it said last that it led. What it says afterwards, its PostgreSQL being down, has no position.
    leader_at: Option<(MemberRef, Lsn)>,
    /// When each standby was last seen healthy by the leader, with its flush position then.
    healthy: BTreeMap<MemberId, (Lsn, BootTime)>,
    /// Since when this member leads and is a primary.
    leading_since: Option<(Term, BootTime)>,
    /// The request whose checkpoint is done.
    checkpointed: Option<u64>,
    /// The request that holds transactions, and since when.
    holding: Option<(u64, BootTime)>,
    /// Since when a configured upstream has not streamed.
    not_streaming_since: Option<BootTime>,
    /// Since when the leader has logical slots of which there is no copy here.
    slots_missing_since: Option<BootTime>,
    /// When the standby that this member should stream from was last given up.
    upstream_failed_at: Option<BootTime>,
    /// Since when that standby has not streamed from the leader.
    upstream_away_since: Option<BootTime>,
    /// The term whose leadership this member gives up, and why.
    stepping_aside: Option<(Term, String)>,
    /// Since when PostgreSQL runs without answering.
    silent_since: Option<BootTime>,
    /// The term whose PostgreSQL is killed because it serves nobody, and why.
    giving_up: Option<(Term, String)>,
    /// Until when this member, which asked to hand over, does not ask again.
    ask_not_before: Option<BootTime>,
    /// Since when the initializer is silent.
    initializer_silent_since: Option<BootTime>,
    /// Since when this member waits in an election that nobody has won.
    election_since: Option<(Term, BootTime)>,
    /// PostgreSQL is down because this agent stopped it to start it again: a pause does not keep it down.
    stopped_to_start: bool,
    /// The order that this member works on, and since when.
    order_since: Option<(u64, BootTime)>,
    /// The rolling restart that this leader works on: its id, how many are left, since when, and the end of WAL then.
    restart_step: Option<(u64, usize, BootTime, Lsn)>,
}

/// The outcome.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision {
    /// PostgreSQL must not be writable a moment longer: stop every process of it, before anything else.
    pub kill: Option<String>,
    /// What to do with the lease.
    pub lease: LeaseWish,
    /// Compare-and-set changes to submit, in order.
    pub changes: Vec<Change>,
    /// An election to open.
    pub open: Option<OpenElection>,
    /// Backup receivers to be asked for their seals.
    pub ask_seals: Vec<AskSeal>,
    /// A long task to start.
    pub task: Option<Task>,
    /// Whose promises keep everybody else from leading, for as long as the lease cannot be renewed: so many
    /// of each of these sets. Empty: no promise would do.
    pub promises: Vec<PromiseNeed>,
    /// Why.
    pub reasons: Vec<Reason>,
    /// To be handed to the next call.
    pub memory: Memory,
}

/// How long the initializer may be silent before another member takes over the first start.
const INITIALIZER_SILENT_MAX: Duration = Duration::from_secs(20);
/// How long a standby may try to stream in vain from a leader that is open before it is cloned anew.
const NOT_STREAMING_MAX: Duration = Duration::from_secs(20);
/// A standby that should be streamed from, and does not stream, is given up after this for the leader.
const UPSTREAM_MAX: Duration = Duration::from_secs(3);
/// One that streams to here is not left for the short while in which its agent is another one.
const UPSTREAM_PATIENCE: Duration = Duration::from_secs(1);
/// It is tried again after this.
const UPSTREAM_AGAIN: Duration = Duration::from_secs(60);
/// How long a proof of the sync set may take to be seen before it is made again.
const PROOF_SEEN_MAX: Duration = Duration::from_secs(1);
/// How often a start as a standby may fail before the leader's history is asked for help.
const STARTS_MAX: u32 = 3;
/// How long a standby may read local WAL without answering before it is given an upstream: a rewound data
/// directory becomes consistent only with WAL from the leader.
const SILENT_MAX: Duration = Duration::from_secs(5);

/// What every rule works on.
struct Mind<'a> {
    o: &'a Observation,
    settings: Settings,
    out: Decision,
}

impl Mind<'_> {
    fn because(&mut self, code: &'static str, text: impl Into<String>) {
        self.out.reasons.push(Reason {
            code,
            text: text.into(),
        });
    }

    /// Nothing is done automatically now.
    fn is_paused(&self) -> bool {
        let pause = self.o.view.as_ref().and_then(|v| v.pause.as_ref());
        pause.is_some_and(|p| p.value.holds_at(self.o.wall_ms))
    }

    /// Somebody asked for this member's PostgreSQL to be restarted, or made anew.
    fn is_asked_for(&self, view: &ClusterView) -> bool {
        let me = &self.o.me.id;
        let planned = view.restart.as_ref().map(|r| &r.value.members);
        view.orders.contains_key(me) || planned.is_some_and(|m| m.contains_key(me))
    }

    /// During a pause: what nobody asked for. A stopped PostgreSQL stays stopped, unless it was stopped to be
    /// started again, or an election needs it; and no data are rewound or copied.
    fn is_suspended(&self, kind: TaskKind) -> bool {
        let Some(view) = self.o.view.as_ref().filter(|_| self.is_paused()) else {
            return false;
        };
        let ordered = self.is_asked_for(view);
        let open = view.leadership.as_ref().is_some_and(|l| l.value.open);
        match kind {
            TaskKind::Clone | TaskKind::Rewind => !ordered,
            TaskKind::TakeSlots => true,
            TaskKind::StartStandby | TaskKind::StartPrimary => {
                open && !ordered && !self.out.memory.stopped_to_start
            }
            _ => false,
        }
    }

    /// Starts a task unless one runs, or this kind failed a moment ago, or a pause forbids it.
    fn start(&mut self, task: Task) {
        if self.is_suspended(task.kind()) {
            let text = format!("{:?} waits for the end of the pause", task.kind());
            return self.because("suspended", text);
        }
        if let Some(running) = &self.o.task {
            let text = format!("{:?} is in progress", running.task.kind());
            return self.because("busy", text);
        }
        let kind = task.kind();
        let waiting = self
            .o
            .failures
            .iter()
            .find(|f| f.kind == kind && f.retry_at > self.o.now);
        if let Some(f) = waiting {
            let text = format!(
                "{kind:?} failed {} times and will be tried again: {}",
                f.count, f.error
            );
            return self.because("back_off", text);
        }
        if self.out.task.is_none() {
            // A restart that ends halfway is one all the same.
            self.out.memory.stopped_to_start |=
                matches!(kind, TaskKind::Stop | TaskKind::TakeSlots);
            self.out.task = Some(task);
        }
    }

    fn submit(&mut self, change: Change) {
        let change = match &self.o.view {
            Some(view) => change.keeping_history(view),
            None => change,
        };
        self.out.changes.push(change);
    }

    fn event(&self, view: &ClusterView, term: Term, kind: &str, text: String) -> Record {
        let event = Event {
            at_ms: self.o.wall_ms,
            term,
            member: self.o.me.id.clone(),
            kind: kind.to_owned(),
            text,
        };
        let history = view
            .history
            .as_ref()
            .map(|h| h.value.clone())
            .unwrap_or_default();
        Record::History(history.with(event))
    }

    /// True if the member's agent was heard within a ttl (or is this one).
    fn is_alive(&self, member: &MemberId) -> bool {
        *member == self.o.me.id
            || self
                .o
                .peers
                .get(member)
                .is_some_and(|p| self.o.now.since(p.heard_at) < self.settings.ttl())
    }

    /// The present leadership is known here for a ttl: one that has just been elected has not renewed yet.
    fn is_settled(&self) -> bool {
        self.out
            .memory
            .leadership_seen
            .is_some_and(|(_, at)| self.o.now.since(at) >= self.settings.ttl())
    }

    fn lease_runs(&self, term: Term) -> bool {
        self.o
            .lease
            .is_some_and(|l| l.term == term && l.until > self.o.now)
    }

    /// Rule 2.4: past its deadline, or deposed, a primary stops at once.
    fn fence_rule(&mut self) -> bool {
        let maybe_primary = match &self.o.server {
            ServerView::Down => false,
            ServerView::Silent { maybe_primary } => *maybe_primary,
            ServerView::Running(s) => !s.in_recovery,
        };
        if !maybe_primary {
            return false;
        }
        let why = match (&self.o.view, self.o.lease) {
            (Some(view), lease) => {
                let Some(l) = view.leadership.as_ref().map(|l| &l.value) else {
                    return false;
                };
                if l.leader.is_none() || l.leader != self.o.me.reference() {
                    Some(format!("term {} is not this member's", l.term))
                } else if l.recovered {
                    Some(format!(
                        "an operator recovered the records of term {}: another may have led since",
                        l.term
                    ))
                } else if !lease.is_some_and(|x| x.term == l.term && x.until > self.o.now) {
                    Some(format!(
                        "the lease of term {} ran out on this member",
                        l.term
                    ))
                } else {
                    None
                }
            }
            (None, Some(lease)) if lease.until > self.o.now => None,
            (None, _) => Some("no lease is held, and the coordinator cannot be reached".to_owned()),
        };
        let Some(why) = why else { return false };
        self.because("fenced", format!("PostgreSQL is stopped: {why}"));
        self.out.kill = Some(why);
        true
    }
}

/// Decides. Total and deterministic: the same input gives the same output.
pub fn decide(o: &Observation, memory: &Memory) -> Decision {
    let settings = o
        .view
        .as_ref()
        .map_or_else(|| o.initial_settings.clone(), ClusterView::settings);
    let out = Decision {
        kill: None,
        lease: LeaseWish::Leave,
        changes: Vec::new(),
        open: None,
        ask_seals: Vec::new(),
        task: None,
        promises: Vec::new(),
        reasons: Vec::new(),
        memory: memory.clone(),
    };
    let mut mind = Mind { o, settings, out };
    let fenced = mind.fence_rule();
    let Some(view) = &o.view else {
        mind.because(
            "no_coordinator",
            "the coordinator has no majority, or has not answered yet",
        );
        if let Some(lease) = o.lease.filter(|_| !fenced) {
            // Rule 2.6: a restarted agent takes over inside the lease.
            mind.out.lease = LeaseWish::Hold(lease.term);
        }
        return mind.out;
    };
    remember_leadership(&mut mind, view);
    health::report(&mut mind);
    if !matches!(o.server, ServerView::Silent { .. }) {
        mind.out.memory.silent_since = None;
    }
    if !matches!(&o.server, ServerView::Running(s) if !s.in_recovery) {
        // What comes up next may hold more than was there when the barrier was taken.
        mind.out.memory.barrier = None;
    }
    if matches!(o.server, ServerView::Running(_)) {
        mind.out.memory.stopped_to_start = false;
    }
    pause_reason(&mut mind, view);
    if let Some(l) = view.leadership.as_ref().map(|l| &l.value) {
        with_leadership(&mut mind, view, l, fenced);
        configure_rule(&mut mind, l);
    } else {
        first_start::before_leadership(&mut mind, view);
    }
    register(&mut mind, view);
    mind.out
}

/// Whoever looks must see that nothing is done, and why.
fn pause_reason(mind: &mut Mind<'_>, view: &ClusterView) {
    let Some(pause) = view.pause.as_ref().map(|p| &p.value) else {
        return;
    };
    if mind.is_paused() {
        let why = pause
            .reason
            .as_ref()
            .map(|r| format!(": {r}"))
            .unwrap_or_default();
        let text = format!("maintenance since {} asked for it{why}", pause.by);
        mind.because("paused", text);
    }
}

/// The operator's settings reach PostgreSQL when there is nothing more important to do.
fn configure_rule(mind: &mut Mind<'_>, l: &Leadership) {
    let running = matches!(mind.o.server, ServerView::Running(_));
    let idle = mind.o.task.is_none() && mind.out.task.is_none() && mind.out.kill.is_none();
    if mind.o.config_stale && running && idle && l.leader.is_some() {
        mind.because(
            "configuring",
            "writing changed settings into PostgreSQL's configuration",
        );
        mind.start(Task::Configure);
    }
}

fn remember_leadership(mind: &mut Mind<'_>, view: &ClusterView) {
    let revision = view.revision_of(&Key::Leadership);
    mind.out.memory.first_revision.get_or_insert(revision);
    if mind
        .out
        .memory
        .leadership_seen
        .is_none_or(|(seen, _)| seen != revision)
    {
        mind.out.memory.leadership_seen = Some((revision, mind.o.now));
    }
    let leader = view.leader();
    let status = leader.and_then(|l| Some(&mind.o.peers.get(&l.member)?.status));
    if let (Some(leader), Some(s)) = (leader, status)
        && s.role == MemberRole::Leader
        && s.incarnation == Some(leader.incarnation)
        && let Some(lsn) = s.lsn
    {
        mind.out.memory.leader_at = Some((leader.clone(), lsn));
    }
}

/// Keeps this member's own record true.
fn register(mind: &mut Mind<'_>, view: &ClusterView) {
    let me = &mind.o.me;
    let known = view.members.get(&me.id);
    let record = MemberRecord {
        // For others to say.
        leaving: known.is_some_and(|k| k.value.leaving),
        ..me.record()
    };
    if view.cluster.is_some() && known.map(|k| &k.value) != Some(&record) {
        let key = Key::Member(me.id.clone());
        let change = Change {
            expect: vec![(key.clone(), view.revision_of(&key))],
            puts: vec![Record::Member(me.id.clone(), record)],
            deletes: vec![],
        };
        mind.submit(change);
    }
}

fn with_leadership(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, fenced: bool) {
    match &mind.o.data {
        DataView::Foreign(what) => {
            let text = format!("the data directory is not a member of this cluster: {what}");
            return mind.because("foreign", text);
        }
        DataView::Empty => return standby::clone_rule(mind, view, l),
        DataView::Present {
            system_id, origin, ..
        } => {
            if is_stranger(mind, view, l, system_id, origin) {
                return;
            }
        }
    }
    if order::order_rule(mind, view, l, fenced) {
        return;
    }
    if l.leader.is_none() {
        vote::election_rule(mind, view, l);
    } else if l.leader == mind.o.me.reference() {
        leader::leader_rule(mind, view, l, fenced);
    } else {
        standby::standby_rule(mind, view, l, fenced);
    }
}

/// Data that do not belong to this cluster, or that nobody can tell how they came to belong to it. They are not
/// touched unless an operator says so.
fn is_stranger(
    mind: &mut Mind<'_>,
    view: &ClusterView,
    l: &Leadership,
    system_id: &str,
    origin: &Origin,
) -> bool {
    let expected = view.cluster.as_ref();
    let expected = expected.and_then(|c| c.value.system_id.as_deref());
    let me = &mind.o.me.id;
    let way = format!("`craton reinit {me}` throws it away and clones; or move it away");
    if expected != Some(system_id) {
        let text = format!(
            "the data directory has system identifier {system_id}, the cluster {}: this member does not join; {way}",
            expected.unwrap_or("none yet")
        );
        mind.because("wrong_system_id", text);
    } else if mind.o.me.incarnation.is_none() && matches!(origin, Origin::Strange { .. }) {
        // On the leader's timeline it could be ahead of the leader, and PostgreSQL would not notice once the leader
        // has passed that point.
        let text = format!(
            "the data directory is a copy of the cluster's database that Craton did not make: whether it is part of the leader's history cannot be known, so it does not join; {way}"
        );
        mind.because("strange_copy", text);
    } else {
        return false;
    }
    if expected.is_some() && matches!(mind.o.server, ServerView::Down) {
        order::reinit_of_stranger(mind, view, l);
    }
    true
}

#[cfg(test)]
mod tests;
