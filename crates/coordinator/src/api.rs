//! The trait that every backend implements, and the plain data it speaks.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use craton_core::{BootTime, MemberId, Term};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::place::Place;
use crate::raft::{Change, Configuration};

/// A value with the revision that last changed it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Versioned {
    /// The store's revision when this key was last written (etcd: `mod_revision`).
    pub mod_revision: u64,
    /// The value, JSON text.
    pub value: String,
}

/// The whole store at one revision. It is small (tens of keys), so it is always handed out whole.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Snapshot {
    /// Grows with every transaction that changed something.
    pub revision: u64,
    /// All keys.
    pub entries: BTreeMap<String, Versioned>,
}

impl Snapshot {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Versioned> {
        self.entries.get(key)
    }
}

/// A condition of a transaction: the key's `mod_revision`, 0 meaning "does not exist".
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Compare {
    /// The key.
    pub key: String,
    /// What its `mod_revision` must be.
    pub mod_revision: u64,
}

/// A change in a transaction.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// Write a key.
    Put {
        /// The key.
        key: String,
        /// The new value.
        value: String,
    },
    /// Remove a key.
    Delete {
        /// The key.
        key: String,
    },
}

/// Compare-and-set: all `compares` hold, then all `ops` are done, else nothing is.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Txn {
    /// Conditions, all of which must hold.
    pub compares: Vec<Compare>,
    /// Changes.
    pub ops: Vec<Op>,
}

/// What became of a transaction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TxnOutcome {
    /// Done, durable, at this revision.
    Committed(u64),
    /// A comparison failed; nothing changed.
    Conflict,
}

/// A lease renewal that a majority accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Renewal {
    /// The instant **before** the renewal was sent: the lease runs until this plus ttl.
    pub sent_at: BootTime,
}

/// What this process knows of the lease without asking anyone. A hint: only
/// [`Coordinator::free`] may be acted upon.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeaseHint {
    /// The local voter holds a running promise for this term.
    Held {
        /// The promised term.
        term: Term,
        /// When the promise runs out on this host's clock.
        until: BootTime,
    },
    /// No promise is running here: worth asking [`Coordinator::free`].
    Lapsed,
    /// This process cannot know (no voter here, or just started).
    Unknown,
}

/// A member's volatile announcement (role, positions), best effort, never durable.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Presence {
    /// When it was last heard here.
    pub heard_at: BootTime,
    /// What it said, JSON text.
    pub value: String,
}

/// Why a call failed. After [`CoordinatorError::Unknown`] a transaction may or may not have happened.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum CoordinatorError {
    /// No majority could be reached in time; nothing was sent that could still happen later.
    #[error("the coordinator does not answer: {0}")]
    Unavailable(String),
    /// Sent, but no answer came in time: it may or may not have happened.
    #[error("the coordinator did not answer in time; the outcome is unknown: {0}")]
    Unknown(String),
    /// A majority refused (a lease renewal for a term that is over).
    #[error("refused: {0}")]
    Refused(String),
    /// Shutting down, or broken for good.
    #[error("the coordinator is stopped: {0}")]
    Stopped(String),
}

impl CoordinatorError {
    /// The reason alone.
    pub fn why(&self) -> &str {
        match self {
            Self::Unavailable(why)
            | Self::Unknown(why)
            | Self::Refused(why)
            | Self::Stopped(why) => why,
        }
    }
}

/// A boxed future, so that the trait can be used as `dyn`.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, CoordinatorError>> + Send + 'a>>;

/// All presences by member.
pub type PresenceMap = Arc<BTreeMap<MemberId, Presence>>;

/// A small linearizable store with a lease per term. Every call has a deadline of its own (a small
/// multiple of the round trip, at most [`CALL_TIMEOUT`]) and may be dropped at any await.
pub trait Coordinator: Send + Sync + 'static {
    /// A linearizable read of the whole store.
    fn read(&self) -> Answer<'_, Arc<Snapshot>>;

    /// One compare-and-set transaction; linearizable and durable when `Committed`.
    fn txn(&self, txn: Txn) -> Answer<'_, TxnOutcome>;

    /// The newest state known here, pushed on every change. May lag behind; never goes back.
    fn watch(&self) -> watch::Receiver<Arc<Snapshot>>;

    /// Renews (or first takes) the lease of `term` for this process's member.
    fn renew(&self, term: Term, ttl: Duration) -> Answer<'_, Renewal>;

    /// Gives the lease of `term` up at once. Best effort: returns when a majority heard it.
    fn release(&self, term: Term) -> Answer<'_, ()>;

    /// True when the lease of `term` (and of every lower term) is over and can never be renewed again.
    /// Once true, always true.
    fn free(&self, term: Term) -> Answer<'_, bool>;

    /// What is known here of the lease, without a round trip.
    fn lease_hint(&self) -> LeaseHint;

    /// Announces this member's volatile status to all others. Never blocks, never fails loudly.
    fn announce(&self, value: String);

    /// The announcements of all members, newest of each, pushed on change.
    fn presence(&self) -> watch::Receiver<PresenceMap>;

    /// Why the store cannot be used just now, as far as this process has noticed.
    fn trouble(&self) -> Option<String> {
        None
    }

    /// What is under way with a move of the records, if one is.
    fn progress(&self) -> Option<String> {
        None
    }

    /// Asks each endpoint of the store, where it has any, on its own.
    fn endpoints(&self) -> Answer<'_, Vec<EndpointState>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    /// Where the records are kept now.
    fn place(&self) -> Place {
        Place::default()
    }

    /// Moves the records of the running cluster to another place; returns when they are there, or says why
    /// not. Moving to where they are takes a move back that has not begun yet. Longer than other calls.
    fn move_to(&self, place: Place) -> Answer<'_, ()> {
        let why = format!("this coordinator cannot be moved to {place}");
        Box::pin(std::future::ready(Err(CoordinatorError::Refused(why))))
    }

    /// Writes the records that this process knows into their store again, which was emptied or restored from an old
    /// copy: the operator's order. Whoever leads names its term and how long its lease lasts, and is held to be the
    /// holder of that term. Longer than other calls.
    fn rebuild(&self, _lease: Option<(Term, Duration)>) -> Answer<'_, ()> {
        let why = "these records are the members' own: nothing is to be written anew".to_owned();
        Box::pin(std::future::ready(Err(CoordinatorError::Refused(why))))
    }

    /// What this process remembers of the lease is of a store that is no more: ask the store again.
    fn forget(&self) {}

    /// Whether this process can read the records' store at `place`.
    fn probe(&self, place: Place) -> Answer<'_, ()> {
        let why = format!("this coordinator knows no other place than its own, so not {place}");
        Box::pin(std::future::ready(Err(CoordinatorError::Refused(why))))
    }

    /// Who takes part, and how that is changed; none where that is somebody else's business.
    fn membership(&self) -> Option<&dyn Membership> {
        None
    }
}

/// How one endpoint of a store answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointState {
    /// `host:port`.
    pub endpoint: String,
    /// How long a linearizable read through it took, or why there was none.
    pub answered: Result<Duration, String>,
}

/// Why a change of the members was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MembersError {
    /// The coordinator.
    #[error(transparent)]
    Coordinator(#[from] CoordinatorError),
    /// The Raft leader refuses; nothing was done.
    #[error("{0}")]
    Refused(String),
}

/// Who takes part in a coordinator that runs inside the members.
pub trait Membership: Send + Sync {
    /// Who takes part, as committed.
    fn members(&self) -> Configuration;

    /// Changes the members: returns once the change is committed, and a majority of the voters that there are
    /// then gives and ends leases by it. The same again is harmless.
    fn change(
        &self,
        change: Change,
    ) -> Pin<Box<dyn Future<Output = Result<(), MembersError>> + Send + '_>>;

    /// Where a member's coordinator is reached, `host:port`.
    fn address_of(&self, member: &MemberId) -> Option<String>;

    /// True once the others have said that this member was removed.
    fn removed(&self) -> watch::Receiver<bool>;
}

/// The longest any call takes.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(2);
