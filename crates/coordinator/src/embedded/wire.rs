//! What is said on connections other than Raft's.

use craton_core::{MemberId, Term};
use serde::{Deserialize, Serialize};

use super::format::LeaseState;
use crate::kv::{Applied, Request};
use crate::raft::Index;

/// A question, numbered by the asker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Ask<Q> {
    pub(super) id: u64,
    pub(super) ask: Q,
}

/// The answer with the question's number.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Told<A> {
    pub(super) id: u64,
    pub(super) told: A,
}

/// For a lease voter. The holder is whoever the connection belongs to.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum LeaseAsk {
    Renew {
        term: Term,
        ttl_ms: u64,
    },
    Release {
        term: Term,
    },
    Free {
        term: Term,
    },
    /// From a voter that lost its disk.
    State,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum LeaseTold {
    Yes,
    No(String),
    /// This voter has no say now (lost disk, failing disk).
    Silent(String),
    State(LeaseState),
}

/// For the Raft leader.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Call {
    Txn(Request),
    Read,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum CallTold {
    /// The transaction was applied.
    Applied(Applied),
    /// What is applied through this index is a linearizable read.
    ReadAt(Index),
    /// Nothing was done: ask this one, or wait.
    NotLeader(Option<MemberId>),
    /// Nothing was done, too much is under way.
    Busy,
    /// Nothing was done, and nothing will be.
    NotDone,
    /// Appended, but leadership was lost: it may happen yet.
    InDoubt,
}

/// A member's announcement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Announcement {
    pub(super) value: String,
}
