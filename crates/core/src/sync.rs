//! The sync set (V, k): who must have flushed a commit before a client hears of it, and how to change
//! it while commits go on (failover protocol, 3.2).
//!
//! Two copies of it exist: the one in force in PostgreSQL, (Vp, kp), which decides what is acknowledged,
//! and the one in the coordinator, (V, k), which decides how many seals an election needs. At every moment
//!
//! > kp - |Vp \ V| >= k
//!
//! must hold: then every acknowledged commit is on at least k members of V. [`next_step`] makes one change
//! at a time, in the order that keeps it; [`mode::next_step`] does so across the durability modes.

pub mod mode;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::types::{Incarnation, Lsn, MemberId};

/// V, by member and incarnation, and k.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SyncSet {
    /// V.
    pub members: BTreeMap<MemberId, Incarnation>,
    /// k: how many of V must have flushed a commit.
    pub k: u32,
}

impl SyncSet {
    /// Waits for a name that nobody has: no commit is acknowledged. Only ever in PostgreSQL.
    pub fn closed() -> Self {
        Self {
            members: BTreeMap::new(),
            k: u32::MAX,
        }
    }

    /// True if no commit can be acknowledged under it: it wants more flushes than it has members.
    pub fn is_closed(&self) -> bool {
        self.k as usize > self.members.len()
    }

    /// How many seals of V an election needs: any k of V meets any |V| - k + 1 of V. With k = 0 it is more
    /// than there are members: nobody but the former leader may lead.
    pub fn seals_needed(&self) -> usize {
        (self.members.len() + 1).saturating_sub(self.k as usize)
    }

    /// True if this member in this incarnation belongs to V.
    pub fn holds(&self, member: &MemberId, incarnation: Incarnation) -> bool {
        self.members.get(member) == Some(&incarnation)
    }

    /// The value of `synchronous_standby_names`: `ANY k ("a@incarnation", …)`, empty when k is 0.
    pub fn standby_names(&self) -> String {
        if self.k == 0 || self.members.is_empty() {
            return String::new();
        }
        let names: Vec<String> = self
            .members
            .iter()
            .map(|(m, i)| format!("\"{}\"", application_name(m, *i)))
            .collect();
        format!("ANY {} ({})", self.k, names.join(", "))
    }

    /// Reads back what [`Self::standby_names`] wrote; none for anything else.
    pub fn from_standby_names(text: &str) -> Option<Self> {
        let text = text.trim();
        if text.is_empty() {
            return Some(Self::default());
        }
        let rest = text.strip_prefix("ANY ")?;
        let (k, list) = rest.split_once('(')?;
        let k = k.trim().parse().ok()?;
        let mut members = BTreeMap::new();
        for name in list.strip_suffix(')')?.split(',') {
            let (member, incarnation) = parse_application_name(name.trim().trim_matches('"'))?;
            members.insert(member, incarnation);
        }
        Some(Self { members, k })
    }

    /// The invariant of the module's head, with `self` in force in PostgreSQL. One under which nothing is
    /// acknowledged covers everything.
    pub fn covers(&self, coordinator: &Self) -> bool {
        if self.is_closed() {
            return true;
        }
        let strangers = self
            .members
            .iter()
            .filter(|(m, i)| !coordinator.holds(m, **i))
            .count();
        (self.k as usize).saturating_sub(strangers) >= coordinator.k as usize
    }
}

impl fmt::Display for SyncSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_closed() {
            return f.write_str("nobody that exists (commits wait)");
        }
        if self.members.is_empty() {
            return f.write_str("nobody (the leader is alone)");
        }
        let names: Vec<&str> = self.members.keys().map(MemberId::as_str).collect();
        if self.k == 0 {
            return write!(f, "nobody ({} may take over)", names.join(" or "));
        }
        write!(f, "{} of {}", self.k, names.join(", "))
    }
}

/// A standby's `application_name`: `<member>@<incarnation>`.
pub fn application_name(member: &MemberId, incarnation: Incarnation) -> String {
    format!("{member}@{incarnation}")
}

/// Reads an `application_name` back.
pub fn parse_application_name(name: &str) -> Option<(MemberId, Incarnation)> {
    let (m, i) = name.split_once('@')?;
    Some((m.parse().ok()?, i.parse().ok()?))
}

/// A standby as the leader's `pg_stat_replication` shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StandbyView {
    /// Which member.
    pub member: MemberId,
    /// Which life of its data directory.
    pub incarnation: Incarnation,
    /// True in state `streaming`.
    pub streaming: bool,
    /// What it says it has flushed.
    pub flush_lsn: Lsn,
}

/// The next single change to make.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SyncStep {
    /// Nothing to do.
    Done,
    /// Put this in force in PostgreSQL.
    SetPostgres(SyncSet),
    /// Wait: k of these must have flushed up to the barrier before the coordinator may be told.
    WaitFlushed(SyncSet),
    /// Write this into the coordinator.
    SetCoordinator(SyncSet),
}

/// What [`next_step`] looks at.
pub struct SyncInput<'a> {
    /// (V, k) in the coordinator.
    pub coordinator: &'a SyncSet,
    /// (Vp, kp), proven in force in PostgreSQL.
    pub postgres: &'a SyncSet,
    /// The members that should be in V: streaming and healthy, or within their grace.
    pub wanted: &'a BTreeMap<MemberId, Incarnation>,
    /// The k that is wanted, lowered to the number of members.
    pub wanted_k: u32,
    /// The leader's flush position when `postgres` was first seen in force.
    pub barrier: Lsn,
    /// What each standby has flushed.
    pub standbys: &'a [StandbyView],
}

impl SyncInput<'_> {
    /// At least k members of `set` have flushed the barrier.
    pub(crate) fn flushed(&self, set: &SyncSet) -> bool {
        let have = self
            .standbys
            .iter()
            .filter(|s| {
                s.streaming && set.holds(&s.member, s.incarnation) && s.flush_lsn >= self.barrier
            })
            .map(|s| &s.member)
            .collect::<BTreeSet<_>>();
        have.len() >= set.k as usize
    }
}

/// One change towards the wanted sync set that keeps the invariant at every moment.
///
/// Orders, from 3.2: add: coordinator, then PostgreSQL. Remove: PostgreSQL, wait, coordinator. Raise k:
/// PostgreSQL, wait, coordinator. Lower k: coordinator, PostgreSQL.
pub fn next_step(input: &SyncInput<'_>) -> SyncStep {
    let (c, p) = (input.coordinator, input.postgres);
    // A member that comes back with another data directory leaves V as what it was before it enters as
    // what it is: its new copies must never count for the old ones.
    let members: BTreeMap<MemberId, Incarnation> = input
        .wanted
        .iter()
        .filter(|(m, i)| c.members.get(*m).is_none_or(|known| known == *i))
        .map(|(m, i)| (m.clone(), *i))
        .collect();
    let k = input
        .wanted_k
        .min(u32::try_from(members.len()).unwrap_or(u32::MAX));
    let goal = SyncSet { members, k };
    if *c == goal && *p == goal && goal.members.len() == input.wanted.len() {
        return SyncStep::Done;
    }
    // Nobody left, or a lower k: say so in the coordinator first, or an election could count on copies
    // that are no longer made. Members leave afterwards.
    if goal.k < c.k {
        let members = if goal.k == 0 {
            BTreeMap::new()
        } else {
            c.members.clone()
        };
        return SyncStep::SetCoordinator(SyncSet { members, k: goal.k });
    }
    // New members enter the coordinator's V first: more seals are needed from then on, never fewer copies.
    // From an empty V this is a raise of k, and goes the other way round.
    if c.k > 0 {
        let mut grown = c.members.clone();
        grown.extend(
            goal.members
                .iter()
                .filter(|(m, _)| !c.members.contains_key(*m))
                .map(|(m, i)| (m.clone(), *i)),
        );
        if grown.len() > c.members.len() {
            return SyncStep::SetCoordinator(SyncSet {
                members: grown,
                k: c.k,
            });
        }
    }
    if *p != goal {
        return SyncStep::SetPostgres(goal);
    }
    if input.flushed(&goal) {
        SyncStep::SetCoordinator(goal)
    } else {
        SyncStep::WaitFlushed(goal)
    }
}

#[cfg(test)]
mod tests;
