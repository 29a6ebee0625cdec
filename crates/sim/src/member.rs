//! A host: clock, disk, agent, fence, PostgreSQL.

use std::collections::{BTreeMap, BTreeSet};

use craton_core::decide::{LeaseWish, Memory, OpenElection, Task, TaskKind};
use craton_core::observe::{Lease, Observation, TaskFailure};
use craton_core::promise::{Book, Ledger, PromiseNeed};
use craton_core::records::{Change, Seal};
use craton_core::{BootTime, Incarnation, MemberId, Term};

use crate::event::Event;
use crate::postgres::Postgres;
use crate::voter::Voter;
use crate::wal::Data;

/// A clock that starts anywhere and runs a little too fast or too slow.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// What it showed at the beginning, nanoseconds.
    pub base: u64,
    /// How much too fast it runs, millionths.
    pub ppm: i64,
}

impl Clock {
    /// What it shows at true time `t`.
    pub fn at(self, t: u64) -> BootTime {
        let drift = i128::from(t) * i128::from(self.ppm) / 1_000_000;
        let now = i128::from(self.base) + i128::from(t) + drift;
        BootTime(u64::try_from(now).unwrap_or(0))
    }

    /// The first true time at which it shows at least `local` (or a moment later).
    pub fn when(self, local: BootTime) -> u64 {
        let run = i128::from(local.0) - i128::from(self.base);
        let t = run * 1_000_000 / (1_000_000 + i128::from(self.ppm));
        u64::try_from(t).unwrap_or(0).saturating_add(2)
    }
}

/// A long task in progress.
#[derive(Clone, Debug)]
pub struct Running {
    /// Tells it from all others.
    pub id: u64,
    /// What.
    pub task: Task,
    /// How far it is.
    pub stage: u8,
    /// True time of its start.
    pub since: u64,
}

/// A renewal or a question to the voters that is under way.
#[derive(Clone, Debug)]
pub struct Poll {
    /// The term it is about.
    pub term: Term,
    /// The instant before it was sent, on the asking host's clock.
    pub sent_at: BootTime,
    /// True time at which it is given up.
    pub expires: u64,
    /// Who said yes.
    pub yes: BTreeSet<usize>,
    /// Who said no.
    pub no: BTreeSet<usize>,
}

/// The agent's memory: gone when the process is.
#[derive(Clone, Debug)]
pub struct Agent {
    /// Tells this life from all others in the whole simulation.
    pub life: u64,
    /// What it knows; the server's part is renewed before every decision.
    pub obs: Observation,
    /// What the decision remembers.
    pub memory: Memory,
    /// The lease keeper's order.
    pub wish: LeaseWish,
    /// Renewals under way.
    pub renewals: BTreeMap<u64, Poll>,
    /// "Is the lease free?" under way, and what to submit then.
    pub free: Option<(u64, Poll, OpenElection)>,
    /// Given up up to this term.
    pub released: Term,
    /// Changes to submit, the first of them under way under this number.
    pub submission: Option<(u64, Vec<Change>)>,
    /// Whom the server follows, as far as this life knows.
    pub upstream: Option<(MemberId, Term)>,
    /// What was sealed.
    pub sealed: Option<Seal>,
    /// The sync set has been proven in force.
    pub in_force: bool,
    /// A long task.
    pub running: Option<Running>,
    /// Failed tasks.
    pub failures: BTreeMap<TaskKind, TaskFailure>,
    /// A decision is scheduled already.
    pub woken: bool,
    /// Promises given.
    pub book: Book,
    /// Promises received.
    pub ledger: Ledger,
    /// Whose promises would do.
    pub needs: Vec<PromiseNeed>,
    /// The deadline by renewals alone, and when the last of them was sent.
    pub renewed: Option<(Lease, BootTime)>,
    /// Backups that are being asked for their seals, in which term, and until when.
    pub asking: BTreeMap<(MemberId, Term), u64>,
    /// A majority has refused the lease of this term.
    pub refused: Term,
}

/// A member.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its name.
    pub id: MemberId,
    /// Its clock.
    pub clock: Clock,
    /// The host runs.
    pub up: bool,
    /// The host is paused: nothing on it runs, its clock goes on.
    pub frozen: bool,
    /// The agent alone is paused.
    pub agent_frozen: bool,
    /// When the host was last thawed.
    pub thawed_at: u64,
    /// What happened to it while it was paused.
    pub held: Vec<Event>,
    /// Its disk is this many times slower than usual.
    pub disk_factor: u64,
    /// Its disk answers to nothing.
    pub disk_hung: bool,
    /// Since when.
    pub hung_since: u64,
    /// Its disk is filling up: less than the reserve is left.
    pub disk_low: bool,
    /// Its disk takes nothing more.
    pub disk_full: bool,
    /// When PostgreSQL was killed by somebody else than its agent.
    pub crashes: Vec<u64>,
    /// Durable: the data directory.
    pub data: Data,
    /// Durable: the life of the data directory.
    pub incarnation: Option<Incarnation>,
    /// Durable: nothing below this term may reach the data directory.
    pub floor: Term,
    /// Preference in elections; 0 never leads.
    pub priority: u32,
    /// Durable: the longest standby promise that may run.
    pub promise_note: std::time::Duration,
    /// The coordinator's part on this host.
    pub voter: Voter,
    /// Survives the agent, not the host.
    pub lease_file: Option<Lease>,
    /// The deadline that the fence process watches; survives the agent.
    pub fence: Option<BootTime>,
    /// The agent.
    pub agent: Option<Agent>,
    /// PostgreSQL.
    pub pg: Option<Postgres>,
}
