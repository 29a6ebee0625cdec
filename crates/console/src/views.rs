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
    /// True when the leader is open for clients' writes.
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
    /// What would happen next, as a sentence ("if a fails, b or c takes over within 2.7 s").
    pub next: String,
    /// Why the answering agent does, or does not do, something; newest decision first.
    #[serde(default)]
    pub reasons: Vec<String>,
    /// What an operator should look at.
    #[serde(default)]
    pub warnings: Vec<String>,
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
