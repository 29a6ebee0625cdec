//! What the agents push to proxies and backup daemons: who leads, and who may serve reads.

use serde::{Deserialize, Serialize};

use crate::types::{Lsn, MemberId, Term, TimelineId};

/// The state of a member as its own agent sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemberRole {
    /// Holds the lease and accepts writes.
    Leader,
    /// Follows the leader.
    Standby,
    /// PostgreSQL runs, but neither leads nor follows yet (sealed, promoting, recovering).
    Transition,
    /// PostgreSQL does not run or cannot be reached.
    Down,
}

/// One member in a [`Topology`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TopologyMember {
    /// Its name.
    pub id: MemberId,
    /// Where its PostgreSQL listens: host name or address.
    pub host: String,
    /// PostgreSQL's TCP port.
    pub port: u16,
    /// Where its agent's control API listens, `host:port`.
    pub api: String,
    /// Its role as last heard.
    pub role: MemberRole,
    /// Its timeline, where known.
    pub timeline: Option<TimelineId>,
    /// The end of its WAL, where known: flushed on the leader, received on a standby.
    pub lsn: Option<Lsn>,
    /// Replay position of a standby.
    pub replay_lsn: Option<Lsn>,
    /// True when a standby streams from the leader (or a cascade source) and so may serve reads.
    pub streaming: bool,
    /// No reads are to be sent there. An older agent does not say.
    #[serde(default)]
    pub noload: bool,
}

/// What a proxy needs to know. Only a topology with a greater `(term, revision)` replaces another;
/// a receiver that has several agents to listen to keeps the greatest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Topology {
    /// Cluster name.
    pub cluster: String,
    /// PostgreSQL's system identifier of the cluster's data, once there are any: two clusters may have one name. An
    /// older agent does not say.
    #[serde(default)]
    pub system_id: Option<String>,
    /// The term of `leader`, or of the election in progress.
    pub term: Term,
    /// Grows with every change of the coordinator's state.
    pub revision: u64,
    /// The member that may be sent writes: elected for `term`, promoted, and open for clients.
    /// None during an election and until the promotion is done.
    pub writable: Option<MemberId>,
    /// A planned switchover runs: hold new transactions, let running ones end.
    pub hold: bool,
    /// All known members.
    pub members: Vec<TopologyMember>,
}

impl Topology {
    /// The member that may be sent writes.
    pub fn leader(&self) -> Option<&TopologyMember> {
        let id = self.writable.as_ref()?;
        self.members.iter().find(|m| &m.id == id)
    }
}
