//! What the agent's API says in JSON and the command line prints. Fields are only ever added.

use craton_core::topology::MemberRole;
use craton_core::{Incarnation, Lsn, MemberId, Term, TimelineId};
use serde::{Deserialize, Serialize};

/// The answer to `GET /v1/status`: the cluster as the answering agent sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StatusView {
    /// Cluster name.
    pub cluster: String,
    /// The agent that answers.
    pub answered_by: MemberId,
    /// The term of the leader, or of the election in progress.
    pub term: Term,
    /// Revision of the coordinator's state that this is drawn from.
    pub revision: u64,
    /// Who holds the leadership of `term`.
    pub leader: Option<MemberId>,
    /// True when the leader is open for clients' writes, as far as is known: false at once when its own agent says that
    /// it does not serve, and only with the next election when nothing is heard of it.
    pub writable: bool,
    /// `async`, `quorum` or `strict`.
    pub durability: String,
    /// Which copies a commit waits for.
    pub sync: SyncView,
    /// The leader's lease.
    pub lease: LeaseView,
    /// True while a planned switchover holds new transactions.
    pub hold: bool,
    /// The election in progress, if there is one.
    pub election: Option<ElectionView>,
    /// All members, ordered by id.
    pub members: Vec<MemberView>,
    /// Backup daemons that are synchronous copies, ordered by name.
    #[serde(default)]
    pub receivers: Vec<ReceiverView>,
    /// Voters without a database, ordered by name.
    #[serde(default)]
    pub witnesses: Vec<WitnessView>,
    /// The leader's logical replication slots, and those that did not survive the last failover; ordered by name.
    #[serde(default)]
    pub slots: Vec<SlotView>,
    /// What would happen next, as a sentence ("if a fails, b or c takes over within 2.7 s").
    pub next: String,
    /// Why the answering agent does, or does not do, something; newest decision first.
    #[serde(default)]
    pub reasons: Vec<String>,
    /// What an operator should look at.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Nothing is done automatically for now.
    #[serde(default)]
    pub paused: Option<PauseView>,
    /// A switchover at a later time.
    #[serde(default)]
    pub scheduled: Option<ScheduleView>,
    /// A rolling restart in progress.
    #[serde(default)]
    pub restart: Option<RestartView>,
    /// The members that have a say in the coordinator; empty where it is not the embedded one.
    #[serde(default)]
    pub voters: Vec<MemberId>,
    /// The answering agent's wall clock, milliseconds since 1970.
    #[serde(default)]
    pub at_ms: u64,
    /// The answering agent's version.
    #[serde(default)]
    pub version: String,
    /// Where the cluster's records are: `embedded`, or `etcd at …`.
    #[serde(default)]
    pub coordinator: String,
}

/// The answer to `GET /v1/coordinator`: the records' store as one member sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CoordinatorView {
    /// The member whose agent answers.
    pub member: MemberId,
    /// `embedded` or `etcd`.
    pub backend: String,
    /// Where that is, for people.
    pub place: String,
    /// What the keys in etcd begin with.
    pub prefix: Option<String>,
    /// What is under way with a move of the records.
    pub progress: Option<String>,
    /// Why the store cannot be used just now.
    pub trouble: Option<String>,
    /// etcd's endpoints, each asked on its own.
    pub endpoints: Vec<EndpointView>,
}

/// One endpoint of etcd.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EndpointView {
    /// `host:port`.
    pub endpoint: String,
    /// How long a linearizable read through it took, milliseconds.
    pub ms: Option<u64>,
    /// Why there was none.
    pub error: Option<String>,
}

/// The answer to `GET /v1/guarantees`: what limits the guarantees on one member.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GuaranteesView {
    /// The member whose agent answers.
    pub member: MemberId,
    /// Settings of its PostgreSQL with which sessions are promised less of their commits.
    pub settings: Vec<WeakSettingView>,
    /// Why the settings could not be asked for.
    pub error: Option<String>,
    /// Its fence.
    pub fence: FenceView,
}

/// A setting with which sessions are promised less of their commits.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WeakSettingView {
    /// `client_min_messages` or `synchronous_commit`.
    pub name: String,
    /// What it is set to.
    pub value: String,
    /// For whom: `role x`, `database y`, `role x in database y`; or the line of a file.
    pub place: String,
    /// True in the database, the same on every member; false in a file of this one.
    pub shared: bool,
}

/// How the fence runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct FenceView {
    /// It gave a sign of life just now.
    pub alive: bool,
    /// Its memory cannot be swapped out.
    pub memory_locked: bool,
    /// It has the highest priority (nice -20).
    pub hurried: bool,
}

/// A pause.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PauseView {
    /// Since when, RFC 3339 in UTC.
    pub since: String,
    /// When it ends by itself; none: when somebody resumes.
    pub until: Option<String>,
    /// Why.
    pub reason: Option<String>,
    /// Who asked.
    pub by: String,
}

/// A scheduled switchover.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ScheduleView {
    /// When, RFC 3339 in UTC.
    pub at: String,
    /// To whom; none: the best one.
    pub to: Option<MemberId>,
    /// Who asked.
    pub by: String,
}

/// A rolling restart.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RestartView {
    /// Names it in the history.
    pub id: u64,
    /// Who asked.
    pub by: String,
    /// Who is still to be restarted, or not yet of use again.
    pub left: Vec<MemberId>,
    /// Who is at it now.
    pub under_way: Vec<MemberId>,
}

/// The synchronous set (V, k).
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SyncView {
    /// V: the members that may acknowledge.
    pub members: Vec<MemberId>,
    /// k: how many of them each commit waits for.
    pub acks: u32,
    /// True when PostgreSQL is known to enforce exactly this.
    pub in_force: bool,
}

/// The lease of the current term.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LeaseView {
    /// Who holds it, as far as the answering agent knows.
    pub holder: Option<MemberId>,
    /// What is left of it, in milliseconds; known to the holder and to voters.
    pub remaining_ms: Option<u64>,
    /// Its full length, in milliseconds.
    pub ttl_ms: u64,
    /// How often it is renewed, in milliseconds.
    pub heartbeat_ms: u64,
    /// For how long the leader has lived on the promises of standbys because the lease cannot be renewed,
    /// milliseconds; known to the leader.
    #[serde(default)]
    pub promises_ms: Option<u64>,
    /// The term for which the answering agent itself holds it; none: it holds none. It may have run out
    /// (`remaining_ms`).
    #[serde(default)]
    pub held_term: Option<Term>,
}

/// An election that is open.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ElectionView {
    /// The term being elected.
    pub term: Term,
    /// Who opened it.
    pub opened_by: Option<MemberId>,
    /// Members that have sealed.
    pub sealed: Vec<MemberId>,
    /// How many seals it needs.
    pub seals_needed: u32,
    /// Members whose seal is missing.
    pub missing: Vec<MemberId>,
    /// An operator recovered the records from one member's disk: they may be old, so no seals suffice, and nobody is
    /// promoted before `craton failover --allow-data-loss`.
    #[serde(default)]
    pub recovered: bool,
}

/// One member.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MemberView {
    /// Its name.
    pub id: MemberId,
    /// Its role as last heard.
    pub role: MemberRole,
    /// What it is doing, in a few words: "streaming", "cloning from b", "rewinding", …
    pub state: String,
    /// Where its PostgreSQL listens.
    pub host: String,
    /// PostgreSQL's port.
    pub port: u16,
    /// Where its agent listens, `host:port`.
    pub api: String,
    /// True when its agent was heard lately.
    pub agent_alive: bool,
    /// How long ago it was heard, in milliseconds.
    pub heard_ms_ago: Option<u64>,
    /// Its timeline.
    pub timeline: Option<TimelineId>,
    /// The end of its WAL: flushed on the leader, received on a standby.
    pub lsn: Option<Lsn>,
    /// The end of its WAL as last heard, also of a member that is gone.
    #[serde(default)]
    pub last_heard_lsn: Option<Lsn>,
    /// What a standby has replayed.
    pub replay_lsn: Option<Lsn>,
    /// Bytes that it has not yet received of what the leader has flushed.
    pub lag_bytes: Option<u64>,
    /// True when it streams from the leader.
    pub streaming: bool,
    /// True when it is in the synchronous set.
    pub sync: bool,
    /// Preference in an election; 0 means never.
    pub priority: u32,
    /// Which life of its data directory this is.
    pub incarnation: Option<Incarnation>,
    /// Parameters of its PostgreSQL that wait for a restart, as `name: 100 -> 200`.
    #[serde(default)]
    pub pending_restart: Vec<String>,
    /// An order that it works on: `restart` or `reinit`.
    #[serde(default)]
    pub order: Option<String>,
    /// What PostgreSQL may still take of its fullest disk, bytes, the reserve apart.
    #[serde(default)]
    pub disk_free_bytes: Option<u64>,
    /// What is wrong with its host, in sentences; a member with a full disk, hung storage or a crashing
    /// PostgreSQL is elected only if no other can be.
    #[serde(default)]
    pub trouble: Vec<String>,
    /// Proxies send no reads there.
    #[serde(default)]
    pub noload: bool,
    /// As a standby: the member that it streams from.
    #[serde(default)]
    pub upstream: Option<MemberId>,
    /// The versions of PostgreSQL and of the libraries that sort text and compute geometry, by name; empty while
    /// they are not known.
    #[serde(default)]
    pub libraries: craton_core::libraries::Libraries,
}

/// A logical replication slot of the leader.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SlotView {
    /// Its name.
    pub name: String,
    /// The database that it decodes.
    pub database: String,
    /// Its output plugin.
    pub plugin: String,
    /// The members whose promotion it would survive.
    pub survives_on: Vec<MemberId>,
    /// From PostgreSQL 17: made with `failover = true`.
    #[serde(default)]
    pub failover: Option<bool>,
    /// The slot of a former leader that could not be offered after a failover.
    #[serde(default)]
    pub lost: bool,
}

/// A voter of the coordinator without a database.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WitnessView {
    /// Its name.
    pub name: MemberId,
    /// Where its coordinator listens, `host:port`.
    pub address: Option<String>,
    /// True when it has a say.
    pub voter: bool,
    /// True when it was heard lately.
    pub alive: bool,
    /// How long ago it was heard, in milliseconds.
    pub heard_ms_ago: Option<u64>,
}

/// A backup daemon as a synchronous copy: it seals in elections and never leads.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReceiverView {
    /// Its name.
    pub name: MemberId,
    /// Its API, `host:port`.
    pub api: String,
    /// How long ago it was heard, in milliseconds.
    pub heard_ms_ago: Option<u64>,
    /// True when it was heard lately.
    pub alive: bool,
    /// The timeline received last.
    pub timeline: Option<TimelineId>,
    /// Received and flushed up to here.
    pub lsn: Option<Lsn>,
    /// Bytes that it has not yet received of what the leader has flushed.
    pub lag_bytes: Option<u64>,
    /// Whom it streams from.
    pub streams_from: Option<MemberId>,
    /// True when it is in the synchronous set.
    pub sync: bool,
}

/// The answer to `GET /v1/explain`: one agent's reasons.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ExplainView {
    /// The member whose agent answers.
    pub member: MemberId,
    /// Its role.
    pub role: MemberRole,
    /// Its state, in a sentence.
    pub summary: String,
    /// Why it does what it does.
    pub reasons: Vec<String>,
    /// What it waits for, and what an operator may do.
    #[serde(default)]
    pub waiting_for: Vec<String>,
    /// What the reasons mean and what to do about them, as `code: meaning`.
    #[serde(default)]
    pub hints: Vec<String>,
}

/// The answer to `GET /v1/history`, oldest first.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HistoryView {
    /// What happened.
    pub events: Vec<HistoryEvent>,
}

/// One change of leadership, or of what protects the data.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HistoryEvent {
    /// When, RFC 3339 in UTC, by the clock of the member that wrote it.
    pub at: String,
    /// The term it belongs to.
    pub term: Term,
    /// A word: `bootstrap`, `elected`, `switchover`, `forced`, `alone`, `restored`, …
    pub kind: String,
    /// The member concerned.
    pub member: Option<MemberId>,
    /// The timeline it began.
    pub timeline: Option<TimelineId>,
    /// Where that timeline began.
    pub lsn: Option<Lsn>,
    /// The event as a sentence, and who asked for it.
    pub text: String,
}

/// The body of `POST /v1/switchover`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwitchoverRequest {
    /// The member to hand over to; `None`: the best one.
    #[serde(default)]
    pub to: Option<MemberId>,
    /// Who asks, `user@host`.
    #[serde(default)]
    pub by: Option<String>,
    /// When, milliseconds since 1970; `None`: now.
    #[serde(default)]
    pub at_ms: Option<u64>,
}

/// The body of `POST /v1/failover`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailoverRequest {
    /// The member to promote; `None`: the best one.
    #[serde(default)]
    pub to: Option<MemberId>,
    /// Promote even where acknowledged commits may be lost.
    #[serde(default)]
    pub allow_data_loss: bool,
    /// Who asks, `user@host`.
    #[serde(default)]
    pub by: Option<String>,
}

/// The answer to `GET /v1/config`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ConfigView {
    /// The revision of the settings: what a change may be made conditional upon.
    pub revision: u64,
    /// The member whose own settings are among these.
    pub member: Option<MemberId>,
    /// Every setting.
    pub settings: Vec<ConfigRow>,
}

/// One setting.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ConfigRow {
    /// Its name; PostgreSQL's parameters begin with `postgresql.`.
    pub name: String,
    /// Its value.
    pub value: String,
    /// What it counts, if anything.
    pub unit: String,
    /// Its default, where it has one.
    pub default: Option<String>,
    /// What it may be.
    pub range: String,
    /// What it does.
    pub doc: String,
    /// Where the value comes from.
    pub origin: String,
    /// False for what a member has of its own: it is changed in the member's `craton.toml`.
    pub shared: bool,
}

/// The body of `POST /v1/config`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigRequest {
    /// Only if the settings are still of this revision.
    #[serde(default)]
    pub revision: Option<u64>,
    /// New values by name.
    #[serde(default)]
    pub set: std::collections::BTreeMap<String, String>,
    /// Back to the default, or (PostgreSQL's parameters) out of the settings.
    #[serde(default)]
    pub unset: Vec<String>,
    /// Who asks, `user@host`.
    #[serde(default)]
    pub by: Option<String>,
}

/// The answer to a change of the settings.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ConfigChangeView {
    /// The revision of the settings now.
    pub revision: u64,
    /// What changed, as `name: from -> to`.
    pub changed: Vec<String>,
    /// Parameters that take effect only when PostgreSQL is restarted.
    pub restart: Vec<String>,
    /// What else there is to know.
    pub notes: Vec<String>,
}

/// The body of `POST /v1/pause`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PauseRequest {
    /// How long, milliseconds; `None`: until somebody resumes.
    #[serde(default)]
    pub for_ms: Option<u64>,
    /// Why.
    #[serde(default)]
    pub reason: Option<String>,
    /// Who asks, `user@host`.
    #[serde(default)]
    pub by: Option<String>,
}

/// The body of requests that need no more than who asks.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AskRequest {
    /// Who asks, `user@host`.
    #[serde(default)]
    pub by: Option<String>,
}

/// The body of `POST /v1/restart`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestartRequest {
    /// Whom; empty: all.
    #[serde(default)]
    pub members: Vec<MemberId>,
    /// Only those of them that have parameters waiting for a restart.
    #[serde(default)]
    pub pending: bool,
    /// Who asks, `user@host`.
    #[serde(default)]
    pub by: Option<String>,
}

/// The body of `POST /v1/reinit`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReinitRequest {
    /// Whose data directory.
    pub member: MemberId,
    /// Who asks, `user@host`.
    #[serde(default)]
    pub by: Option<String>,
}

/// The answer to what was asked for and is done, or begun.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DoneView {
    /// What, as a sentence.
    pub text: String,
    /// Names it in the history, where it goes on by itself.
    #[serde(default)]
    pub id: Option<u64>,
}

/// The answer to a change of leadership that was asked for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ChangeView {
    /// Who leads now.
    pub leader: MemberId,
    /// In which term.
    pub term: Term,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
    /// What happened, as a sentence.
    pub text: String,
}

/// Every error answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ErrorView {
    /// What went wrong.
    pub error: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// `POST /v1/members/join`: a host asks to be taken in.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct JoinRequest {
    /// Its name.
    pub member: MemberId,
    /// Where its coordinator will listen, `host:port`.
    pub address: String,
}

/// The answer: who is there already.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct JoinView {
    /// Cluster name.
    pub cluster: String,
    /// The others' coordinators.
    pub peers: Vec<PlaceView>,
}

/// A member's place in the coordinator.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PlaceView {
    /// Who.
    pub member: MemberId,
    /// Where its coordinator is reached, `host:port`; none if that is not known here.
    pub address: Option<String>,
    /// Whether it has a say.
    pub voter: bool,
    /// True if it has a PostgreSQL that the cluster knows of.
    pub data: bool,
    /// How long ago it was heard, in milliseconds.
    pub heard_ms_ago: Option<u64>,
}

/// The answer to `GET /v1/members`, and to changes of the members.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MembersView {
    /// Cluster name.
    pub cluster: String,
    /// How often the set of voters has changed.
    pub epoch: u64,
    /// How many voters must be there for the cluster to act.
    pub majority: usize,
    /// Members, in order of their names.
    pub members: Vec<PlaceView>,
    /// Who was removed.
    pub removed: Vec<MemberId>,
}

/// `POST /v1/members/{remove,promote,demote}`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MemberRequest {
    /// Who.
    pub member: MemberId,
}
