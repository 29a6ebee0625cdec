//! What the members agree upon through the coordinator: one struct per key, JSON on the wire.
//!
//! Every record may gain fields with defaults; none may change the meaning of one it has.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::observe::FirstStart;
use crate::settings::{Durability, Settings};
use crate::sync::SyncSet;
use crate::types::{Incarnation, Lsn, MemberId, Term, TimelineId};

/// A key of the coordinator's store.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Key {
    /// [`ClusterRecord`].
    Cluster,
    /// [`Settings`].
    Settings,
    /// [`Leadership`].
    Leadership,
    /// [`Timelines`].
    Timelines,
    /// [`Request`]: the operator's wish that is being worked on.
    Request,
    /// [`History`].
    History,
    /// [`Pause`]: nothing is done automatically for now.
    Pause,
    /// [`Schedule`]: a switchover at a later time.
    Schedule,
    /// [`RestartPlan`]: a rolling restart in progress.
    Restart,
    /// [`Order`] to a member.
    Order(MemberId),
    /// [`MemberRecord`] of a member.
    Member(MemberId),
    /// [`Seal`] of a member.
    Seal(MemberId),
    /// [`ReceiverRecord`] of a backup receiver.
    Receiver(MemberId),
}

impl Key {
    /// The key as the store spells it.
    pub fn path(&self) -> String {
        match self {
            Self::Cluster => "cluster".into(),
            Self::Settings => "settings".into(),
            Self::Leadership => "leadership".into(),
            Self::Timelines => "timelines".into(),
            Self::Request => "request".into(),
            Self::History => "history".into(),
            Self::Pause => "pause".into(),
            Self::Schedule => "schedule".into(),
            Self::Restart => "restart".into(),
            Self::Order(m) => format!("order/{m}"),
            Self::Member(m) => format!("member/{m}"),
            Self::Seal(m) => format!("seal/{m}"),
            Self::Receiver(m) => format!("receiver/{m}"),
        }
    }
}

/// The cluster itself: which database it is, and who makes it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// Its name.
    pub name: String,
    /// The one member that may run initdb.
    pub initializer: MemberId,
    /// PostgreSQL's system identifier, once initdb is done. Never changes.
    pub system_id: Option<String>,
    /// True once roles and functions exist, so that other members and proxies can log in.
    #[serde(default)]
    pub bootstrapped: bool,
    /// How the initializer comes to the database. Only for an empty one may another member take its place.
    #[serde(default)]
    pub founding: FirstStart,
}

/// A member in one of its incarnations.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MemberRef {
    /// The member.
    pub member: MemberId,
    /// The life of its data directory.
    pub incarnation: Incarnation,
}

/// Who leads, under which durability. Changed by compare-and-set only.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Leadership {
    /// The term of `leader`; with `leader` none, the term whose election is open.
    pub term: Term,
    /// The leader, none while an election is open.
    pub leader: Option<MemberRef>,
    /// Who led before this term: while the election is open, its seal alone proves that nothing
    /// acknowledged is missed.
    pub previous: Option<MemberRef>,
    /// The sync set in force.
    pub sync: SyncSet,
    /// The durability mode in force.
    pub durability: Durability,
    /// The timeline that the leader runs, or will when it has promoted; reserved with the win.
    pub timeline: TimelineId,
    /// True once the leader has promoted and what it holds is safe: clients may be sent to it.
    pub open: bool,
    /// The leader's PostgreSQL is started in place, after it was open in this term: it opens again once what it
    /// recovered is safe.
    #[serde(default)]
    pub restarted: bool,
    /// During an election: the member that a planned switchover wants, or an operator named.
    #[serde(default)]
    pub preferred: Option<MemberId>,
    /// During an election: the operator accepts the loss of acknowledged commits.
    #[serde(default)]
    pub allow_data_loss: bool,
    /// An operator made one voter's disk all there is (`craton recover`): whoever led since, and what was acknowledged
    /// then, may be unknown here. Nobody leads by such a record without [`Self::allow_data_loss`]; the next leader's
    /// own record is a whole one again.
    #[serde(default)]
    pub recovered: bool,
    /// Why this term began, in words.
    pub cause: String,
}

/// Terms that a recovery leaps at least: more than the voters that are gone can have agreed on unseen.
const RECOVERY_LEAP: u64 = 1000;

impl Leadership {
    /// The leader was open in this term, if only before its PostgreSQL was started in place: then what is acknowledged
    /// is there, and it may be waiting for members that are to be brought back from it.
    pub fn was_open(&self) -> bool {
        self.open || self.restarted
    }

    /// Recovered by an operator who has not said yet that what others may have acknowledged is given up.
    pub fn may_be_old(&self) -> bool {
        self.recovered && !self.allow_data_loss
    }

    /// What is left of it when an operator recovers it from one voter's disk: nobody leads by it, and what was asked
    /// for or accepted before does not count. Its term leaps past all that a survivor may have sealed or followed: to
    /// the second since 1970, so that what is recovered later, from whichever disk, is above what was recovered before.
    #[must_use]
    pub fn into_recovered(self, at_ms: u64) -> Self {
        let leapt = self.term.0.saturating_add(RECOVERY_LEAP);
        Self {
            term: Term(leapt.max(at_ms / 1000)),
            recovered: true,
            open: false,
            restarted: false,
            preferred: None,
            allow_data_loss: false,
            ..self
        }
    }
}

/// One timeline of the cluster. A number is written here before it is used, and never used twice.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TimelineRecord {
    /// Its number.
    pub timeline: TimelineId,
    /// The term in which it was reserved.
    pub term: Term,
    /// Where it came from; none for the first.
    pub parent: Option<TimelineId>,
    /// The end of the parent's WAL on the member that promoted, as it sealed. The switch point that
    /// PostgreSQL writes into the history file is this, or less by a part of one record.
    pub fork: Lsn,
    /// The member that promoted onto it.
    pub member: MemberId,
}

/// All timelines, oldest first.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Timelines(pub Vec<TimelineRecord>);

/// A member's promise that nothing below `term` can reach it any more, and what it holds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Seal {
    /// The term of the election.
    pub term: Term,
    /// The data directory that was sealed.
    pub incarnation: Incarnation,
    /// The timeline of the end of its WAL.
    pub timeline: TimelineId,
    /// The end of its flushed WAL.
    pub lsn: Lsn,
}

/// What others need to know of a member; written by its own agent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MemberRecord {
    /// Where its PostgreSQL listens.
    pub host: String,
    /// PostgreSQL's TCP port.
    pub port: u16,
    /// Its control API, `host:port`.
    pub api: String,
    /// Preference in elections; 0 means never the leader.
    pub priority: u32,
    /// Its data directory's present life; none before the first.
    pub incarnation: Option<Incarnation>,
    /// It is being taken out of the cluster: no commit is to wait for it any more.
    #[serde(default)]
    pub leaving: bool,
}

/// A backup daemon that can be a member of V, see [`crate::receiver`]; written by an agent when it reports.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReceiverRecord {
    /// Its API, `host:port`.
    pub api: String,
    /// The present life of its repository.
    pub incarnation: Incarnation,
    /// It is being taken out of the cluster: no commit is to wait for it any more.
    #[serde(default)]
    pub leaving: bool,
}

/// What the operator asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestKind {
    /// A planned change of the leader.
    Switchover,
    /// Promote somebody although the leader is not there, or does not answer.
    Failover,
}

/// How far a request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestPhase {
    /// Written, not yet begun.
    Asked,
    /// Proxies hold new transactions; running ones end.
    Hold,
}

/// An operator's request; at most one at a time. Ends with the next term, or by being refused.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Request {
    /// Names it in the history.
    pub id: u64,
    /// What is asked.
    pub kind: RequestKind,
    /// The term in which it was asked; it dies with it.
    pub term: Term,
    /// The wanted leader; none leaves the choice to Craton.
    pub to: Option<MemberId>,
    /// Failover only: acknowledged commits may be lost.
    #[serde(default)]
    pub allow_data_loss: bool,
    /// How far it is.
    pub phase: RequestPhase,
    /// Who asked.
    pub by: String,
    /// Why, where a member asked for itself.
    #[serde(default)]
    pub why: Option<String>,
}

/// Maintenance: no failover, no start of a stopped PostgreSQL, no rewind and no clone but what is asked for. The
/// lease, the fence and the sync set go on as ever.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pause {
    /// Since when, milliseconds since 1970.
    pub since_ms: u64,
    /// Ends by itself then, by each member's own clock; none: when somebody resumes.
    #[serde(default)]
    pub until_ms: Option<u64>,
    /// Why, in the operator's words.
    #[serde(default)]
    pub reason: Option<String>,
    /// Who asked.
    pub by: String,
}

impl Pause {
    /// True at `wall_ms`, milliseconds since 1970.
    pub fn holds_at(&self, wall_ms: u64) -> bool {
        self.until_ms.is_none_or(|until| wall_ms < until)
    }
}

/// A planned switchover at a later time. The leader's own clock says when it begins, and nothing else.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Schedule {
    /// Names it in the history.
    pub id: u64,
    /// When, milliseconds since 1970.
    pub at_ms: u64,
    /// The wanted leader; none leaves the choice to Craton.
    #[serde(default)]
    pub to: Option<MemberId>,
    /// Who asked.
    pub by: String,
}

/// A rolling restart: standbys one by one, then the leader. Whoever leads works on it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RestartPlan {
    /// Names it in the history.
    pub id: u64,
    /// Whom, each with the life of its PostgreSQL that is to end (none: it was down). A member is done once it
    /// runs in another life and is of use again.
    pub members: BTreeMap<MemberId, Option<u64>>,
    /// Who asked.
    pub by: String,
}

/// What one member is told to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OrderKind {
    /// Stop PostgreSQL cleanly and start it again in the role it has.
    Restart,
    /// Throw the data directory away and clone it anew.
    Reinit,
}

/// An order to one member, which removes it when it is done.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Order {
    /// Names it in the history.
    pub id: u64,
    /// What to do.
    pub kind: OrderKind,
    /// Restart: the life of PostgreSQL that is to end; any other (or, with none, any) is the proof that it did.
    #[serde(default)]
    pub process: Option<u64>,
    /// Reinit: the life of the data directory that is to end.
    #[serde(default)]
    pub incarnation: Option<Incarnation>,
    /// Who asked.
    pub by: String,
}

/// One line of the cluster's history.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Event {
    /// When, by the writer's wall clock, milliseconds since 1970. For people only.
    pub at_ms: u64,
    /// The term it belongs to.
    pub term: Term,
    /// Who wrote it.
    pub member: MemberId,
    /// A short word for machines: `initialized`, `elected`, `opened`, …
    pub kind: String,
    /// What happened, in words.
    pub text: String,
}

/// The newest events, oldest first, at most [`History::LEN_MAX`].
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct History(pub Vec<Event>);

impl History {
    /// How many events are kept.
    pub const LEN_MAX: usize = 200;

    /// Kinds that a busy cluster writes by the dozen. They go first; at least this many of the newest stay.
    const ROUTINE: [&str; 1] = ["sync_set"];
    /// How many routine events are kept at least.
    const ROUTINE_MIN: usize = 50;

    /// Adds an event. Beyond the limit the oldest goes: a routine one, as long as there are many of those.
    #[must_use]
    pub fn with(&self, event: Event) -> Self {
        let is_routine = |e: &Event| Self::ROUTINE.contains(&e.kind.as_str());
        let mut events = self.0.clone();
        events.push(event);
        while events.len() > Self::LEN_MAX {
            let routine = events.iter().filter(|e| is_routine(e)).count();
            let oldest = if routine > Self::ROUTINE_MIN {
                events.iter().position(is_routine).unwrap_or(0)
            } else {
                0
            };
            events.remove(oldest);
        }
        Self(events)
    }
}

/// A typed value to write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Record {
    /// To [`Key::Cluster`].
    Cluster(ClusterRecord),
    /// To [`Key::Settings`].
    Settings(Settings),
    /// To [`Key::Leadership`].
    Leadership(Leadership),
    /// To [`Key::Timelines`].
    Timelines(Timelines),
    /// To [`Key::Request`].
    Request(Request),
    /// To [`Key::History`].
    History(History),
    /// To [`Key::Pause`].
    Pause(Pause),
    /// To [`Key::Schedule`].
    Schedule(Schedule),
    /// To [`Key::Restart`].
    Restart(RestartPlan),
    /// To [`Key::Order`].
    Order(MemberId, Order),
    /// To [`Key::Member`].
    Member(MemberId, MemberRecord),
    /// To [`Key::Seal`].
    Seal(MemberId, Seal),
    /// To [`Key::Receiver`].
    Receiver(MemberId, ReceiverRecord),
}

impl Record {
    /// Where it goes.
    pub fn key(&self) -> Key {
        match self {
            Self::Cluster(_) => Key::Cluster,
            Self::Settings(_) => Key::Settings,
            Self::Leadership(_) => Key::Leadership,
            Self::Timelines(_) => Key::Timelines,
            Self::Request(_) => Key::Request,
            Self::History(_) => Key::History,
            Self::Pause(_) => Key::Pause,
            Self::Schedule(_) => Key::Schedule,
            Self::Restart(_) => Key::Restart,
            Self::Order(m, _) => Key::Order(m.clone()),
            Self::Member(m, _) => Key::Member(m.clone()),
            Self::Seal(m, _) => Key::Seal(m.clone()),
            Self::Receiver(m, _) => Key::Receiver(m.clone()),
        }
    }
}

/// A compare-and-set in typed form: every key in `expect` has that revision (0: does not exist).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Change {
    /// Conditions.
    pub expect: Vec<(Key, u64)>,
    /// Values to write.
    pub puts: Vec<Record>,
    /// Keys to remove.
    pub deletes: Vec<Key>,
}

impl Change {
    /// The same; if it writes the history, only as long as that is the one in `view`: somebody else's line that came
    /// meanwhile would be overwritten.
    #[must_use]
    pub fn keeping_history(mut self, view: &ClusterView) -> Self {
        let writes = self.puts.iter().any(|r| matches!(r, Record::History(_)));
        if writes && self.expect.iter().all(|(key, _)| *key != Key::History) {
            let revision = view.revision_of(&Key::History);
            self.expect.push((Key::History, revision));
        }
        self
    }
}

/// A record with the revision of its last change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct At<T> {
    /// Its `mod_revision`.
    pub revision: u64,
    /// The record.
    pub value: T,
}

/// The whole store, typed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ClusterView {
    /// The store's revision.
    pub revision: u64,
    /// See [`Key::Cluster`].
    pub cluster: Option<At<ClusterRecord>>,
    /// See [`Key::Settings`].
    pub settings: Option<At<Settings>>,
    /// See [`Key::Leadership`].
    pub leadership: Option<At<Leadership>>,
    /// See [`Key::Timelines`].
    pub timelines: Option<At<Timelines>>,
    /// See [`Key::Request`].
    pub request: Option<At<Request>>,
    /// See [`Key::History`].
    pub history: Option<At<History>>,
    /// See [`Key::Pause`].
    pub pause: Option<At<Pause>>,
    /// See [`Key::Schedule`].
    pub schedule: Option<At<Schedule>>,
    /// See [`Key::Restart`].
    pub restart: Option<At<RestartPlan>>,
    /// See [`Key::Order`].
    pub orders: BTreeMap<MemberId, At<Order>>,
    /// See [`Key::Member`].
    pub members: BTreeMap<MemberId, At<MemberRecord>>,
    /// See [`Key::Seal`].
    pub seals: BTreeMap<MemberId, At<Seal>>,
    /// See [`Key::Receiver`].
    pub receivers: BTreeMap<MemberId, At<ReceiverRecord>>,
}

impl ClusterView {
    /// The revision of a key, 0 if it does not exist: what a [`Change`] should expect.
    pub fn revision_of(&self, key: &Key) -> u64 {
        fn r<T>(at: Option<&At<T>>) -> u64 {
            at.map_or(0, |a| a.revision)
        }
        match key {
            Key::Cluster => r(self.cluster.as_ref()),
            Key::Settings => r(self.settings.as_ref()),
            Key::Leadership => r(self.leadership.as_ref()),
            Key::Timelines => r(self.timelines.as_ref()),
            Key::Request => r(self.request.as_ref()),
            Key::History => r(self.history.as_ref()),
            Key::Pause => r(self.pause.as_ref()),
            Key::Schedule => r(self.schedule.as_ref()),
            Key::Restart => r(self.restart.as_ref()),
            Key::Order(m) => r(self.orders.get(m)),
            Key::Member(m) => r(self.members.get(m)),
            Key::Seal(m) => r(self.seals.get(m)),
            Key::Receiver(m) => r(self.receivers.get(m)),
        }
    }

    /// The settings in force: the stored ones, or the defaults before there are any.
    pub fn settings(&self) -> Settings {
        self.settings
            .as_ref()
            .map(|s| s.value.clone())
            .unwrap_or_default()
    }

    /// The leader of the present term, none during an election.
    pub fn leader(&self) -> Option<&MemberRef> {
        self.leadership.as_ref()?.value.leader.as_ref()
    }
}
