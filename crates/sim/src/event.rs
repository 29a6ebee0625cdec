//! What can happen, and on whose host.

use std::rc::Rc;
use std::time::Duration;

use craton_core::observe::MemberStatus;
use craton_core::promise::Ask;
use craton_core::receiver::{Known, ReceiverStatus, SealRequest};
use craton_core::records::{Change, ClusterView, Seal};
use craton_core::{BootTime, Incarnation, Term};

use crate::faults::{Fault, Repair};

/// A message between agents. May be lost.
#[derive(Clone, Debug)]
pub enum Msg {
    /// Renew the lease.
    Renew {
        /// Answered under this number.
        id: u64,
        /// For this term.
        term: Term,
        /// For so long.
        ttl: Duration,
    },
    /// Promised.
    Promised {
        /// The renewal.
        id: u64,
    },
    /// Not promised.
    Refused {
        /// The renewal.
        id: u64,
    },
    /// The leader asks for a standby promise.
    AskPromise {
        /// The question.
        ask: Ask,
        /// Before it was sent, on the leader's clock.
        sent_at: BootTime,
    },
    /// A standby has promised.
    StandbyPromised {
        /// In this term.
        term: Term,
        /// In this life of its data directory.
        incarnation: Incarnation,
        /// As in the question.
        sent_at: BootTime,
    },
    /// The lease is given up.
    Release {
        /// Of this term.
        term: Term,
    },
    /// Is the lease over for good?
    AskFree {
        /// Answered under this number.
        id: u64,
        /// Of this term.
        term: Term,
        /// The ttl in force.
        ttl: Duration,
    },
    /// It is, here.
    Free {
        /// The question.
        id: u64,
    },
    /// A member's announcement.
    Status(Box<MemberStatus>),
    /// A backup reports its present life to an agent.
    Report {
        /// That life.
        incarnation: Incarnation,
    },
    /// It is on record.
    Known {
        /// The life that was reported.
        incarnation: Incarnation,
        /// The answer.
        known: Known,
    },
    /// An agent asks a backup how it is.
    Look {
        /// On the agent's clock.
        asked_at: BootTime,
    },
    /// The backup's answer.
    Looked {
        /// As in the question.
        asked_at: BootTime,
        /// How it is.
        status: Box<ReceiverStatus>,
    },
    /// An agent asks a backup for its seal.
    AskSeal(SealRequest),
    /// The seal.
    Sealed(Box<Seal>),
    /// An agent tells a backup who leads and is open.
    Topology {
        /// The term.
        term: Term,
        /// Of the coordinator's state.
        revision: u64,
        /// The leader, if there is one.
        leader: Option<usize>,
    },
}

/// What a backup daemon does.
#[derive(Clone, Copy, Debug)]
pub enum Chore {
    /// It looks after itself, as often as its clock ticks.
    Tick,
    /// It looks after itself: something has happened.
    Look,
    /// This note is on disk.
    Noted(u64),
    /// What came over this connection is flushed up to this record.
    Flushed {
        /// The connection.
        conn: u64,
        /// The record.
        upto: usize,
    },
    /// It has read where its WAL ends, and answers with its seal.
    Answer {
        /// The agent that asked.
        to: usize,
        /// What it asked for.
        request: SealRequest,
    },
}

/// An event. `life` and `run` name the process it is meant for: one that has ended gets nothing.
#[derive(Clone, Debug)]
#[allow(
    missing_docs,
    reason = "the fields are what every variant's comment says"
)]
pub enum Event {
    /// The agent decides.
    Decide { m: usize, life: u64 },
    /// The agent's clock ticks: it decides, announces itself, reads the store.
    Tick { m: usize, life: u64 },
    /// The lease keeper's clock ticks.
    Keep { m: usize, life: u64 },
    /// A long task takes its next step.
    Step { m: usize, life: u64, task: u64 },
    /// A message arrives.
    Deliver { from: usize, to: usize, msg: Msg },
    /// A transaction arrives at the store.
    Submit {
        m: usize,
        life: u64,
        id: u64,
        change: Box<Change>,
    },
    /// Its answer arrives, or the time for it is over.
    Answered {
        m: usize,
        life: u64,
        id: u64,
        ok: bool,
    },
    /// A state of the store arrives at a member.
    View {
        m: usize,
        life: u64,
        view: Rc<ClusterView>,
    },
    /// PostgreSQL answers from now on.
    Ready { m: usize, run: u64 },
    /// PostgreSQL has read all local WAL.
    Exact { m: usize, run: u64 },
    /// PostgreSQL's housekeeping.
    PgTick { m: usize, run: u64 },
    /// A clean shutdown looks whether it is done.
    Stopping { m: usize, run: u64 },
    /// The disk has flushed up to here.
    Flushed { m: usize, run: u64, upto: usize },
    /// A process of PostgreSQL reads the configuration again: a WAL sender, or the checkpointer.
    Reread {
        m: usize,
        run: u64,
        conn: Option<u64>,
    },
    /// The head of a replication connection's queue may have arrived.
    Pump { m: usize, conn: u64, up: bool },
    /// The fence looks at the deadline.
    Fence { m: usize },
    /// A backup daemon does something.
    Backup { h: usize, run: u64, chore: Chore },
    /// An agent writes down that a backup has reported.
    OnRecord {
        m: usize,
        life: u64,
        h: usize,
        incarnation: Incarnation,
        term: Term,
    },
    /// A client writes.
    Client,
    /// The next fault is due.
    NextFault,
    /// A fault ends.
    Repair(Repair),
    /// A fault begins at a moment of its own.
    Fault(Fault),
    /// All faults end.
    Calm,
    /// Has the cluster come back?
    Settled,
}

impl Event {
    /// The host it happens on, if it is one's.
    pub fn host(&self) -> Option<usize> {
        match self {
            Self::Decide { m, .. }
            | Self::Tick { m, .. }
            | Self::Keep { m, .. }
            | Self::Step { m, .. }
            | Self::Answered { m, .. }
            | Self::View { m, .. }
            | Self::Ready { m, .. }
            | Self::Exact { m, .. }
            | Self::PgTick { m, .. }
            | Self::Stopping { m, .. }
            | Self::Flushed { m, .. }
            | Self::Reread { m, .. }
            | Self::Pump { m, .. }
            | Self::OnRecord { m, .. }
            | Self::Fence { m } => Some(*m),
            Self::Backup { h, .. } => Some(*h),
            Self::Deliver { to, .. } => Some(*to),
            Self::Submit { .. }
            | Self::Client
            | Self::NextFault
            | Self::Repair(_)
            | Self::Fault(_)
            | Self::Calm
            | Self::Settled => None,
        }
    }

    /// True if it cannot happen while the disk answers to nothing.
    pub fn needs_disk(&self) -> bool {
        matches!(
            self,
            Self::Flushed { .. }
                | Self::Step { .. }
                | Self::Ready { .. }
                | Self::Exact { .. }
                | Self::Stopping { .. }
                | Self::Backup {
                    chore: Chore::Noted(_) | Chore::Flushed { .. } | Chore::Answer { .. },
                    ..
                }
        )
    }

    /// True if it happens inside the agent process.
    pub fn is_agents(&self) -> bool {
        matches!(
            self,
            Self::Decide { .. }
                | Self::Tick { .. }
                | Self::Keep { .. }
                | Self::Step { .. }
                | Self::Deliver { .. }
                | Self::Answered { .. }
                | Self::View { .. }
                | Self::OnRecord { .. }
        )
    }
}
