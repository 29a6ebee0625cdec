//! Seeded simulator of a whole cluster: the real decisions against simulated PostgreSQL, coordinator, network
//! and clocks.
//!
//! One seed decides a whole run: when hosts crash and come back, freeze, lose their disk, cannot reach each
//! other, how fast their clocks run, what clients write. Every agent runs the very
//! [`craton_core::decide::decide`] that the product runs. After every step that could break one, the
//! invariants of the failover protocol are checked; when the faults are over, the cluster must come back.
//!
//! **Architecture invariant:** nothing here reads a clock, the environment or a random device, and there is
//! one thread: the same seed and options give the same trace, byte for byte.

#![allow(
    clippy::indexing_slicing,
    reason = "members are numbered; an index out of range is a bug that a simulator should die of"
)]

mod agent;
mod backup;
mod backup_agent;
mod backup_daemon;
mod backup_faults;
mod check;
mod event;
mod faults;
mod flaw;
mod member;
pub mod model;
mod postgres;
mod promise;
mod replication;
mod rng;
pub mod scenario;
pub mod shrink;
mod status;
mod store;
mod tasks;
mod voter;
mod wal;
mod whole;
mod world;

use craton_core::settings::Durability;

pub use flaw::Flaw;

/// What to simulate.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// How many members, 2 to 26.
    pub members: usize,
    /// The durability mode.
    pub durability: Durability,
    /// k.
    pub sync_standbys: u32,
    /// For how long faults go on, simulated seconds.
    pub fault_seconds: u64,
    /// Clocks run at any rate and there is no fence: nothing acknowledged may be lost all the same.
    pub lying_clocks: bool,
    /// Only the rare orders of events that the rules on sync sets and incarnations are there for.
    pub ambushes: bool,
    /// The operator changes durability and k at any moment.
    pub modes: bool,
    /// The coordinator is away, from the leader or from everybody, more often than anything else happens.
    pub away: bool,
    /// The operator pauses, restarts and reinitialises at any moment.
    pub operators: bool,
    /// So many members never lead.
    pub never_leading: usize,
    /// So many backup daemons count as copies.
    pub receivers: usize,
    /// A rule to break on purpose.
    pub flaw: Option<Flaw>,
    /// Faults that are drawn and do not strike, by their number: for the search of those that matter.
    pub skip: std::collections::BTreeSet<usize>,
    /// Keep a trace.
    pub trace: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            members: 3,
            durability: Durability::Quorum,
            sync_standbys: 1,
            fault_seconds: 20,
            lying_clocks: false,
            ambushes: false,
            modes: false,
            away: false,
            operators: false,
            never_leading: 0,
            receivers: 0,
            flaw: None,
            skip: std::collections::BTreeSet::new(),
            trace: false,
        }
    }
}

/// What became of a run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// Broken invariants, in words; empty is good.
    pub violations: Vec<String>,
    /// Client writes that were acknowledged.
    pub acknowledged: u64,
    /// In `async`: how many of them failovers lost.
    pub lost_in_async: u64,
    /// Terms that there were.
    pub terms: u64,
    /// Elections in which a member got WAL out of a backup.
    pub from_backups: u64,
    /// Deadlines of leaders that rested on promises while V listed a backup.
    pub carried_beside_backups: u64,
    /// How long the cluster took to be whole again after the last fault, milliseconds.
    pub settled_after_ms: Option<u64>,
    /// Decisions that were made.
    pub decisions: u64,
    /// Events that were handled.
    pub steps: u64,
    /// The times and numbers of all events, hashed: two runs that differ anywhere differ here.
    pub digest: u64,
    /// All faults that were drawn, with their times.
    pub faults: Vec<String>,
    /// What happened, a line each; empty unless asked for.
    pub trace: String,
}

/// Runs one seed to its end.
pub fn run(seed: u64, options: &Options) -> Outcome {
    let mut world = world::World::new(seed, options);
    world.run();
    let view = world.store.view();
    Outcome {
        seed,
        violations: world.check.violations.clone(),
        acknowledged: world.check.acknowledged_total,
        lost_in_async: world.check.lost_in_async,
        terms: view.leadership.as_ref().map_or(0, |l| l.value.term.0),
        from_backups: world.from_backups,
        carried_beside_backups: world.carried_beside_backups,
        settled_after_ms: world.settled_after.map(|t| t / world::MS),
        decisions: world.decisions,
        steps: world.steps,
        digest: world.digest,
        faults: world
            .faults
            .drawn
            .iter()
            .map(|(at, fault)| format!("{:6} ms  {fault:?}", at / world::MS))
            .collect(),
        trace: world.trace,
    }
}
