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
mod elections;
mod explore;
mod fingerprint;
mod promises;
mod real;
mod state;
mod world;

pub use explore::{Report, Seen, explore};
pub use state::Mode;

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
    /// 3.2: what has been proposed counts by its set alone, not by its mode.
    UnsettledMode,
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
    /// 3: the coordinator hears that `async` is over before k of V have flushed what was acknowledged in it.
    ModeBeforeFlush,
    /// 3: towards `async`, PostgreSQL waits for nobody before the coordinator has heard of it.
    AsyncPostgresFirst,
    /// 3: in `strict` k sinks with the standbys that are there, as in `quorum`.
    StrictGoesAlone,
    /// 3.1.4: a member that is to get the missing WAL says that it has it before it does.
    CatchUpClaimed,
    /// A backup receiver that has sealed follows the former leader again.
    ReceiverForgetsFloor,
    /// 2.7: a leader goes on as if a backup receiver had promised.
    ReceiverPromises,
}

impl Broken {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::NoWaitOnRemoval,
        Self::NoWaitOnRaise,
        Self::CoordinatorFirst,
        Self::NotProven,
        Self::Unsettled,
        Self::UnsettledMode,
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
        Self::ModeBeforeFlush,
        Self::AsyncPostgresFirst,
        Self::StrictGoesAlone,
        Self::CatchUpClaimed,
        Self::ReceiverForgetsFloor,
        Self::ReceiverPromises,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoWaitOnRemoval => "no-wait-on-removal",
            Self::NoWaitOnRaise => "no-wait-on-raise",
            Self::CoordinatorFirst => "coordinator-first",
            Self::NotProven => "not-proven",
            Self::Unsettled => "unsettled",
            Self::UnsettledMode => "unsettled-mode",
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
            Self::ModeBeforeFlush => "mode-before-flush",
            Self::AsyncPostgresFirst => "async-postgres-first",
            Self::StrictGoesAlone => "strict-goes-alone",
            Self::CatchUpClaimed => "catch-up-claimed",
            Self::ReceiverForgetsFloor => "receiver-forgets-floor",
            Self::ReceiverPromises => "receiver-promises",
        }
    }
}

/// What is explored, and how far.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Members, 2 to 4.
    pub members: usize,
    /// So many of them are backup receivers.
    pub receivers: usize,
    /// So many of them never lead.
    pub never: usize,
    /// The mode at the beginning.
    pub mode: Mode,
    /// The modes that may be wished.
    pub wishes: Vec<Mode>,
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
            receivers: 0,
            never: 0,
            mode: Mode::Quorum,
            wishes: vec![Mode::Quorum],
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
        let mut all = Self::of_quorum(level);
        all.extend(Self::of_modes_and_copies(level));
        if level > 1 {
            all.extend(Self::of_mixtures(level));
        }
        all
    }

    /// What the tests have no time for: members that cannot lead together with promises, modes and each other.
    fn of_mixtures(level: u8) -> Vec<Self> {
        let two_terms = Self {
            terms: 2,
            crashes: level - 2,
            changes: level,
            ..Self::default()
        };
        let every_mode = Self {
            mode: Mode::Async,
            wishes: vec![Mode::Async, Mode::Quorum, Mode::Strict],
            ..two_terms.clone()
        };
        vec![
            Self {
                receivers: 1,
                promises: true,
                ..two_terms.clone()
            },
            Self {
                never: 1,
                promises: true,
                ..two_terms.clone()
            },
            Self {
                receivers: 1,
                ..every_mode.clone()
            },
            Self {
                never: 1,
                promises: true,
                ..every_mode
            },
            Self {
                members: 4,
                receivers: 1,
                never: 1,
                changes: level - 1,
                ..two_terms.clone()
            },
            Self {
                members: 4,
                receivers: 1,
                k: 2,
                wanted_k_max: 2,
                promises: true,
                changes: level - 1,
                ..two_terms
            },
        ]
    }

    fn of_quorum(level: u8) -> Vec<Self> {
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

    /// Members that count and cannot lead, and the other modes.
    fn of_modes_and_copies(level: u8) -> Vec<Self> {
        let more = level.saturating_sub(1);
        let counting = Self {
            terms: 2,
            writes: level,
            changes: 1,
            losses: more,
            ..Self::default()
        };
        let changing = Self {
            changes: 1 + level,
            crashes: more,
            losses: 0,
            ..counting.clone()
        };
        vec![
            Self {
                receivers: 1,
                ..counting.clone()
            },
            Self {
                never: 1,
                ..counting
            },
            Self {
                mode: Mode::Async,
                wishes: vec![Mode::Async, Mode::Quorum],
                ..changing.clone()
            },
            Self {
                mode: Mode::Strict,
                wishes: vec![Mode::Quorum, Mode::Strict],
                ..changing.clone()
            },
            Self {
                mode: Mode::Async,
                wishes: vec![Mode::Async, Mode::Quorum, Mode::Strict],
                promises: true,
                changes: level,
                crashes: 0,
                ..changing
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
                | Broken::ReceiverPromises
        );
        let receives = matches!(
            rule,
            Broken::ReceiverForgetsFloor | Broken::ReceiverPromises
        );
        let twice = rule == Broken::OldLeaderLeftOut;
        let (mode, wishes) = match rule {
            Broken::ModeBeforeFlush => (Mode::Async, vec![Mode::Quorum]),
            Broken::AsyncPostgresFirst => (Mode::Quorum, vec![Mode::Async]),
            Broken::StrictGoesAlone => (Mode::Strict, vec![Mode::Strict]),
            Broken::UnsettledMode => (Mode::Strict, vec![Mode::Quorum, Mode::Strict]),
            _ => (Mode::Quorum, vec![Mode::Quorum]),
        };
        Self {
            mode,
            wishes,
            receivers: usize::from(receives),
            never: usize::from(rule == Broken::CatchUpClaimed),
            terms: if twice { 3 } else { 2 },
            crashes: u8::from(matches!(rule, Broken::Unsettled | Broken::UnsettledMode)),
            changes: match rule {
                Broken::OldLeaderLeftOut => 0,
                Broken::UnsettledMode => 3,
                _ => 2,
            },
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
            "{} members{}{}, {:?} (wished {:?}), k {} (wanted up to {}), {} terms, {} writes, {} crashes, {} lost disks, {} agent restarts, {} changes{}",
            self.members,
            if self.receivers > 0 {
                ", one a receiver"
            } else {
                ""
            },
            if self.never > 0 {
                ", one never leads"
            } else {
                ""
            },
            self.mode,
            self.wishes,
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
