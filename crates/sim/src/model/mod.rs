//! Explicit-state check of the failover protocol: every order of events up to a bound, not a sample of them.
//!
//! The simulator draws long random runs of everything; this explores *all* short runs of the rules that
//! durability rests on (promotion by seals, changes of (V, k), standby promises). There are no clocks:
//! that a lease is over is an event that may happen at any time, and a deposed leader may go on for ever
//! without hearing of it. The rules themselves are the product's: [`craton_core::sync::next_step`],
//! [`craton_core::sync::SyncSet::covers`], [`craton_core::election::Ballot::tally`],
//! [`craton_core::decide::next_sync`].
//!
//! See `docs/design/model.md`.

mod action;
mod explore;
mod fingerprint;
mod promises;
mod real;
mod state;
mod world;

pub use explore::{Report, Seen, explore};

/// A rule to break on purpose: the check must find the harm.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    /// 3.2: a member leaves V in the coordinator without the wait for the others' flush.
    NoWaitOnRemoval,
    /// 3.2: k is raised in the coordinator without that wait.
    NoWaitOnRaise,
    /// 3.2: the coordinator hears of a removal before PostgreSQL follows it.
    CoordinatorFirst,
    /// 3.2: a reload passes for the proof that every WAL sender follows the new set.
    NotProven,
    /// 3.2: PostgreSQL is told to wait for less while an earlier change may still be done.
    Unsettled,
    /// 3.1.3: an election is content with one seal less.
    OneSealTooFew,
    /// 3.1.2: a sealed member goes on receiving.
    SealKeepsStreaming,
    /// 3.1.5: V' does not contain the old leader.
    OldLeaderLeftOut,
    /// 3.2: a cloned directory passes for the old one.
    IncarnationForgotten,
    /// 2.7: the leader is content with promises from k - 1.
    FewerPromises,
    /// 2.7: a member promises after it has sealed.
    PromiseAfterSeal,
    /// 2.7: a member seals in spite of its promise.
    SealWhilePromised,
    /// 2.7: a restarted agent does not know of its promise.
    PromiseForgotten,
    /// 2.7: promises are counted for the sync set that is known, not for those that may have been written.
    PromisesForKnownSet,
    /// 2.7: a leader that goes on by promises proposes a sync set that they do not cover.
    ProposesBeyondPromises,
}

impl Broken {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::NoWaitOnRemoval,
        Self::NoWaitOnRaise,
        Self::CoordinatorFirst,
        Self::NotProven,
        Self::Unsettled,
        Self::OneSealTooFew,
        Self::SealKeepsStreaming,
        Self::OldLeaderLeftOut,
        Self::IncarnationForgotten,
        Self::FewerPromises,
        Self::PromiseAfterSeal,
        Self::SealWhilePromised,
        Self::PromiseForgotten,
        Self::PromisesForKnownSet,
        Self::ProposesBeyondPromises,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoWaitOnRemoval => "no-wait-on-removal",
            Self::NoWaitOnRaise => "no-wait-on-raise",
            Self::CoordinatorFirst => "coordinator-first",
            Self::NotProven => "not-proven",
            Self::Unsettled => "unsettled",
            Self::OneSealTooFew => "one-seal-too-few",
            Self::SealKeepsStreaming => "seal-keeps-streaming",
            Self::OldLeaderLeftOut => "old-leader-left-out",
            Self::IncarnationForgotten => "incarnation-forgotten",
            Self::FewerPromises => "fewer-promises",
            Self::PromiseAfterSeal => "promise-after-seal",
            Self::SealWhilePromised => "seal-while-promised",
            Self::PromiseForgotten => "promise-forgotten",
            Self::PromisesForKnownSet => "promises-for-known-set",
            Self::ProposesBeyondPromises => "proposes-beyond-promises",
        }
    }
}

/// What is explored, and how far.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Members, 2 to 4.
    pub members: usize,
    /// k at the beginning.
    pub k: u32,
    /// The k that may be wanted, from 0 to this.
    pub wanted_k_max: u32,
    /// Standby promises and leases are in the model; a leader without a right to go on is stopped.
    pub promises: bool,
    /// Events in a run at most.
    pub depth: usize,
    /// Terms at most.
    pub terms: u8,
    /// Writes of clients at most.
    pub writes: u8,
    /// Ends of PostgreSQL at most.
    pub crashes: u8,
    /// Lost disks at most.
    pub losses: u8,
    /// Restarts of agents at most.
    pub restarts: u8,
    /// Changes of a sync set that are begun, at most.
    pub changes: u8,
    /// States at most, at most 2^32 - 2; more end the exploration, which then says that it is not complete.
    pub states: usize,
    /// A rule to break.
    pub broken: Option<Broken>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            members: 3,
            k: 1,
            wanted_k_max: 1,
            promises: false,
            depth: 100,
            terms: 3,
            writes: 1,
            crashes: 1,
            losses: 0,
            restarts: 0,
            changes: 0,
            states: 30_000_000,
            broken: None,
        }
    }
}

impl Config {
    /// The correct rules, within bounds that grow with the level. Level 1 is what the tests explore to the end;
    /// above it some end at [`Config::states`].
    pub fn suite(level: u8) -> Vec<Self> {
        let more = level.saturating_sub(1);
        let three = Self {
            terms: 2,
            writes: level,
            ..Self::default()
        };
        vec![
            Self {
                changes: 1 + level,
                crashes: level,
                ..three.clone()
            },
            Self {
                wanted_k_max: 2,
                changes: 1 + level,
                restarts: level,
                crashes: more,
                ..three.clone()
            },
            Self {
                terms: 3,
                crashes: 1,
                losses: 1,
                changes: more,
                ..Self::default()
            },
            Self {
                members: 4,
                k: 2,
                wanted_k_max: 2,
                terms: 3,
                crashes: 0,
                changes: more,
                losses: more,
                ..Self::default()
            },
            Self {
                promises: true,
                changes: 1 + level,
                crashes: more,
                losses: more,
                restarts: more,
                ..three
            },
        ]
    }

    /// The smallest bounds, or nearly, in which a broken rule does harm.
    pub fn for_broken(rule: Broken) -> Self {
        let promises = matches!(
            rule,
            Broken::FewerPromises
                | Broken::PromiseAfterSeal
                | Broken::SealWhilePromised
                | Broken::PromiseForgotten
                | Broken::PromisesForKnownSet
                | Broken::ProposesBeyondPromises
        );
        let twice = rule == Broken::OldLeaderLeftOut;
        Self {
            terms: if twice { 3 } else { 2 },
            crashes: u8::from(rule == Broken::Unsettled),
            changes: if twice { 0 } else { 2 },
            losses: u8::from(rule == Broken::IncarnationForgotten),
            wanted_k_max: if rule == Broken::NoWaitOnRaise { 2 } else { 1 },
            promises,
            broken: Some(rule),
            ..Self::default()
        }
    }

    /// A sentence on the bounds.
    pub fn bounds(&self) -> String {
        format!(
            "{} members, k {} (wanted up to {}), {} terms, {} writes, {} crashes, {} lost disks, {} agent restarts, {} changes{}",
            self.members,
            self.k,
            self.wanted_k_max,
            self.terms,
            self.writes,
            self.crashes,
            self.losses,
            self.restarts,
            self.changes,
            if self.promises { ", promises" } else { "" }
        )
    }
}
