//! A simulated PostgreSQL process: what it holds in memory. What survives it is in [`crate::wal`].

use std::collections::{BTreeSet, VecDeque};

use craton_core::sync::SyncSet;
use craton_core::{Incarnation, TimelineId};

use crate::wal::Rec;

/// A running postmaster.
#[derive(Clone, Debug)]
pub struct Postgres {
    /// Tells this run from all others in the whole simulation.
    pub run: u64,
    /// It answers.
    pub ready: bool,
    /// Started in place as a primary.
    pub start_primary: bool,
    /// Accepts writes.
    pub primary: bool,
    /// Started in place as a primary, with something to hide: clients are refused.
    pub closed: bool,
    /// It was started as a primary or told to promote: it may accept writes.
    pub maybe_primary: bool,
    /// All local WAL has been read, so the end of it is known.
    pub exact: bool,
    /// A clean shutdown is under way.
    pub stopping: bool,
    /// When it ends even if standbys have not received everything.
    pub stop_by: u64,
    /// Whom `primary_conninfo` names.
    pub upstream: Option<usize>,
    /// The incarnation in `application_name`.
    pub incarnation: Incarnation,
    /// The WAL receiver.
    pub receiver: Option<Receiver>,
    /// When a WAL receiver may be started again.
    pub receiver_retry_at: u64,
    /// `synchronous_standby_names` as configured.
    pub configured: SyncSet,
    /// The shared flag by which backends decide whether to wait at all; written by the checkpointer.
    pub defined: bool,
    /// The WAL senders.
    pub senders: Vec<Sender>,
    /// Positions behind commits that wait for standbys.
    pub waiting: BTreeSet<usize>,
}

/// The WAL receiver of a standby.
#[derive(Clone, Debug)]
pub struct Receiver {
    /// Its connection.
    pub conn: u64,
    /// The upstream has agreed to stream.
    pub streaming: bool,
    /// When the upstream was last heard.
    pub heard: u64,
}

/// A WAL sender.
#[derive(Clone, Debug)]
pub struct Sender {
    /// Its connection.
    pub conn: u64,
    /// The standby.
    pub member: usize,
    /// The incarnation in its `application_name`.
    pub incarnation: Incarnation,
    /// Only this timeline is sent, as to a backup; a standby is sent whatever comes.
    pub timeline: Option<TimelineId>,
    /// What was sent.
    pub sent: usize,
    /// What the standby says it has flushed.
    pub flush: usize,
    /// `synchronous_standby_names` as this process has read it: each re-reads it on its own.
    pub config: SyncSet,
    /// When the standby was last heard.
    pub heard: u64,
}

/// Configured on every standby: waits for nobody that exists, so nothing is ever acknowledged under it.
pub fn nobody() -> SyncSet {
    SyncSet {
        members: std::collections::BTreeMap::new(),
        k: u32::MAX,
    }
}

impl Postgres {
    /// True once no process of it follows an older sync set.
    pub fn in_force(&self) -> bool {
        self.defined == (self.configured.k > 0)
            && self.senders.iter().all(|s| s.config == self.configured)
    }

    /// Up to where this WAL sender may release waiting commits: the position that k of the members in the
    /// sync set it has read have flushed (`SyncRepGetNthLatestSyncRecPtr`).
    pub fn released_by(
        &self,
        conn: u64,
        name: impl Fn(usize) -> craton_core::MemberId,
    ) -> Option<usize> {
        let sender = self.senders.iter().find(|s| s.conn == conn)?;
        let set = &sender.config;
        if !set.holds(&name(sender.member), sender.incarnation) {
            return None;
        }
        let mut flushed: Vec<usize> = self
            .senders
            .iter()
            .filter(|s| set.holds(&name(s.member), s.incarnation))
            .map(|s| s.flush)
            .collect();
        flushed.sort_unstable_by(|a, b| b.cmp(a));
        let k = usize::try_from(set.k).unwrap_or(usize::MAX);
        k.checked_sub(1).and_then(|i| flushed.get(i).copied())
    }
}

/// What goes over a replication connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WalMsg {
    /// From the standby: stream from this position on.
    Start {
        /// Position.
        from: usize,
        /// The timeline of what lies before it.
        timeline: TimelineId,
        /// In `application_name`.
        incarnation: Incarnation,
    },
    /// From the upstream: WAL follows.
    Accept,
    /// From the upstream: not my history.
    Refuse,
    /// WAL.
    Data {
        /// The position before the first record.
        from: usize,
        /// The records.
        records: Vec<Rec>,
    },
    /// From the upstream: the timeline that was asked for ends here.
    TimelineEnd,
    /// Nothing new.
    Keepalive,
    /// From the standby: flushed up to here.
    Ack(usize),
}

/// A replication connection: in order, and reliable for as long as it lives.
#[derive(Clone, Debug)]
pub struct Conn {
    /// The upstream and its run.
    pub up: (usize, u64),
    /// The standby and its run.
    pub down: (usize, u64),
    /// Under way to the upstream, each with the earliest time of its arrival.
    pub to_up: VecDeque<(u64, WalMsg)>,
    /// Under way to the standby.
    pub to_down: VecDeque<(u64, WalMsg)>,
}
