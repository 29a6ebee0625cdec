//! What is said on connections other than Raft's.

use craton_core::{MemberId, Term};
use serde::{Deserialize, Serialize};

use super::format::LeaseState;
use crate::kv::{Applied, Request};
use crate::raft::{Change, Index};

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
        /// By which set of voters the answers are counted.
        #[serde(default)]
        epoch: u64,
    },
    Release {
        term: Term,
    },
    Free {
        term: Term,
        #[serde(default)]
        epoch: u64,
    },
    /// What do you remember?
    State,
    /// Answer for no epoch below this one, and tell what you remember.
    Leave {
        epoch: u64,
    },
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
    /// Change the members; `epoch` is the one that was seen to be settled.
    Change {
        change: Change,
        epoch: u64,
    },
    /// From a member that has not heard a leader for long. Anybody answers.
    AmIMember,
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
    /// The members are as asked for.
    Changed,
    /// The members are not changed, and will not be.
    Refused(String),
    /// The asker was removed from the cluster.
    Removed,
    /// The asker is not known to be removed.
    NotRemoved,
    /// Appended, but leadership was lost: it may happen yet.
    InDoubt,
}

/// A member's announcement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Announcement {
    pub(super) value: String,
}
