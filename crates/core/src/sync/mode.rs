//! The sync set across the durability modes: how `async`, `quorum` and `strict` become one another while
//! commits go on (failover protocol, 3).
//!
//! The mode in the coordinator says what an election asks for, so it may never promise more than PostgreSQL
//! has kept:
//!
//! * towards `quorum` or `strict`: PostgreSQL first; when k of V have flushed all that was acknowledged
//!   before, one write puts mode, V and k into the coordinator;
//! * towards `async`: the coordinator first, then PostgreSQL.
//!
//! In `async` the coordinator's V lists the standbys that stream, with k = 0: only they (and the former
//! leader) may stand in an election, so the leader knows everybody who could follow it. In `strict`
//! PostgreSQL keeps waiting for the k that is wished, and the coordinator's k never sinks by itself.

use std::collections::BTreeMap;

use super::{SyncInput, SyncSet, SyncStep};
use crate::settings::Durability;
use crate::types::{Incarnation, MemberId};

/// The mode that is in force, and the one that is wished.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Modes {
    /// In the coordinator's leadership record.
    pub in_force: Durability,
    /// In the settings.
    pub wish: Durability,
}

/// One change, and the mode to write with it where it is one of the coordinator's. Every step keeps the
/// invariant of [`super`].
pub fn next_step(modes: Modes, input: &SyncInput<'_>) -> (SyncStep, Durability) {
    match (modes.in_force, modes.wish) {
        (in_force, Durability::Async) => (towards_async(in_force, input), Durability::Async),
        (Durability::Async, wish) => (from_async(wish, input), wish),
        // Promises less, so it may be written at any time; what PostgreSQL enforces is loosened afterwards.
        (Durability::Strict, Durability::Quorum) => (
            SyncStep::SetCoordinator(input.coordinator.clone()),
            Durability::Quorum,
        ),
        (Durability::Quorum, Durability::Quorum) => (super::next_step(input), Durability::Quorum),
        (in_force, Durability::Strict) => strict(in_force, input),
    }
}

/// What PostgreSQL is to wait for in `strict` when this is the coordinator's set: with fewer members than
/// wished, for nobody that exists.
pub fn strict_names(members: &BTreeMap<MemberId, Incarnation>, wanted_k: u32) -> SyncSet {
    if members.len() < wanted_k as usize {
        return SyncSet::closed();
    }
    SyncSet {
        members: members.clone(),
        k: wanted_k,
    }
}

/// What PostgreSQL is to wait for when the coordinator has this set and mode.
pub fn names(coordinator: &SyncSet, durability: Durability, wanted_k: u32) -> SyncSet {
    match durability {
        Durability::Quorum => coordinator.clone(),
        Durability::Strict => strict_names(&coordinator.members, wanted_k.max(coordinator.k)),
        Durability::Async => SyncSet::default(),
    }
}

fn towards_async(in_force: Durability, input: &SyncInput<'_>) -> SyncStep {
    let goal = SyncSet {
        members: input.wanted.clone(),
        k: 0,
    };
    if in_force != Durability::Async || *input.coordinator != goal {
        return SyncStep::SetCoordinator(goal);
    }
    if *input.postgres != SyncSet::default() {
        return SyncStep::SetPostgres(SyncSet::default());
    }
    SyncStep::Done
}

fn from_async(wish: Durability, input: &SyncInput<'_>) -> SyncStep {
    let there = u32::try_from(input.wanted.len()).unwrap_or(u32::MAX);
    let k = input.wanted_k.min(there);
    let goal = if k == 0 {
        SyncSet::default()
    } else {
        SyncSet {
            members: input.wanted.clone(),
            k,
        }
    };
    let names = if wish == Durability::Strict {
        strict_names(&goal.members, input.wanted_k)
    } else {
        goal.clone()
    };
    if *input.postgres != names {
        SyncStep::SetPostgres(names)
    } else if input.flushed(&goal) {
        SyncStep::SetCoordinator(goal)
    } else {
        SyncStep::WaitFlushed(goal)
    }
}

/// The coordinator's set that `strict` aims at. Members leave only while the rest has k; k never sinks
/// below what is on record unless the operator wishes it.
fn strict_goal(input: &SyncInput<'_>) -> SyncSet {
    let (c, wanted) = (input.coordinator, input.wanted);
    let there = u32::try_from(wanted.len()).unwrap_or(u32::MAX);
    let k = c.k.max(input.wanted_k.min(there)).min(input.wanted_k);
    // A member that came back with another data directory leaves V as what it was before it enters as what it
    // is, unless the rest of V would be too few.
    let known: BTreeMap<MemberId, Incarnation> = wanted
        .iter()
        .filter(|(m, i)| c.members.get(*m).is_none_or(|known| known == *i))
        .map(|(m, i)| (m.clone(), *i))
        .collect();
    if known.len() >= k as usize {
        return SyncSet { members: known, k };
    }
    let mut members = c.members.clone();
    members.extend(wanted.iter().map(|(m, i)| (m.clone(), *i)));
    SyncSet { members, k }
}

fn strict(in_force: Durability, input: &SyncInput<'_>) -> (SyncStep, Durability) {
    let (c, p) = (input.coordinator, input.postgres);
    if input.wanted_k < c.k {
        let lower = SyncSet {
            members: c.members.clone(),
            k: input.wanted_k,
        };
        return (SyncStep::SetCoordinator(lower), in_force);
    }
    let goal = strict_goal(input);
    let mut grown = c.members.clone();
    grown.extend(
        goal.members
            .iter()
            .filter(|(m, _)| !c.members.contains_key(*m))
            .map(|(m, i)| (m.clone(), *i)),
    );
    if c.k > 0 && grown.len() > c.members.len() {
        let grown = SyncSet {
            members: grown,
            k: c.k,
        };
        return (SyncStep::SetCoordinator(grown), in_force);
    }
    let names = strict_names(&goal.members, input.wanted_k);
    // A copy that was replaced cannot stand for what it was: nothing is acknowledged until the new one has all.
    let names = if names.covers(c) {
        names
    } else {
        SyncSet::closed()
    };
    if *p != names {
        return (SyncStep::SetPostgres(names), in_force);
    }
    // From here on PostgreSQL keeps what `strict` promises.
    if *c == goal {
        let step = if in_force == Durability::Strict {
            SyncStep::Done
        } else {
            SyncStep::SetCoordinator(goal)
        };
        return (step, Durability::Strict);
    }
    if input.flushed(&goal) {
        (SyncStep::SetCoordinator(goal), Durability::Strict)
    } else if in_force == Durability::Strict {
        (SyncStep::WaitFlushed(goal), in_force)
    } else {
        (SyncStep::SetCoordinator(c.clone()), Durability::Strict)
    }
}

#[cfg(test)]
mod tests;
