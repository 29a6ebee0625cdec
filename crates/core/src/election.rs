//! Counting seals: may somebody lead, who, and if not, why not (failover protocol, 3.1).
//!
//! Every commit that a client saw acknowledged is on the former leader and on at least k members of V.
//! Any k of V meets any |V| - k + 1 of V. So a member that holds at least as much as |V| - k + 1 sealed
//! members of V each (itself counted) holds every acknowledged commit; and so does the former leader.
//! Positions compare by (timeline, LSN): a timeline number is used once, and a later one of this cluster
//! contains what was acknowledged on an earlier.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use crate::records::{At, Leadership, MemberRecord, Seal};
use crate::settings::Durability;
use crate::types::{Lsn, MemberId, TimelineId};

/// The outcome of a count.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tally {
    /// Seals of V that are needed.
    pub needed: usize,
    /// Seals of V that are there.
    pub have: usize,
    /// Members of V whose seal is missing.
    pub missing: Vec<MemberId>,
    /// Who should take the leadership.
    pub winner: Option<MemberId>,
    /// In words: why this winner, or why none.
    pub why: String,
}

/// A member that could win.
struct Candidate<'a> {
    member: &'a MemberId,
    position: (TimelineId, Lsn),
    priority: u32,
}

/// What a count looks at.
pub struct Ballot<'a> {
    /// The election: `leader` is none in it.
    pub leadership: &'a Leadership,
    /// All seals in the coordinator, of whatever term.
    pub seals: &'a BTreeMap<MemberId, At<Seal>>,
    /// The members' records, for their priority.
    pub members: &'a BTreeMap<MemberId, At<MemberRecord>>,
    /// Members whose agent was heard of just now; only they are worth electing.
    pub alive: &'a BTreeSet<MemberId>,
    /// Members that had better not lead: their disk is full, their storage hangs, they crash again and again.
    /// One of them leads only if no other can.
    pub unfit: &'a BTreeSet<MemberId>,
    /// In `async`: the last known flush position of the former leader.
    pub leader_lsn: Option<Lsn>,
    /// In `async`: how far behind it a winner may be, bytes.
    pub max_lag_bytes: u64,
}

impl<'a> Ballot<'a> {
    fn valid(&self) -> impl Iterator<Item = (&'a MemberId, &'a Seal)> {
        let term = self.leadership.term;
        self.seals
            .iter()
            .map(|(m, s)| (m, &s.value))
            .filter(move |(_, s)| s.term == term)
    }

    fn is_previous(&self, member: &MemberId, seal: &Seal) -> bool {
        self.leadership
            .previous
            .as_ref()
            .is_some_and(|p| p.member == *member && p.incarnation == seal.incarnation)
    }

    /// True if somebody at `position` (or this very member) holds every acknowledged commit.
    fn is_safe(&self, member: &MemberId, seal: &Seal) -> bool {
        let l = self.leadership;
        let position = (seal.timeline, seal.lsn);
        if l.allow_data_loss || self.is_previous(member, seal) {
            return true;
        }
        if self
            .valid()
            .any(|(m, s)| self.is_previous(m, s) && (s.timeline, s.lsn) <= position)
        {
            return true;
        }
        match l.durability {
            Durability::Quorum => {
                let covered = self
                    .valid()
                    .filter(|(m, s)| {
                        l.sync.holds(m, s.incarnation) && (s.timeline, s.lsn) <= position
                    })
                    .count();
                covered >= l.sync.seals_needed()
            }
            Durability::Async => self
                .leader_lsn
                .is_none_or(|lsn| lsn.bytes_since(seal.lsn) <= self.max_lag_bytes),
        }
    }

    fn may_stand(&self, member: &MemberId, seal: &Seal) -> bool {
        let l = self.leadership;
        l.allow_data_loss
            || l.durability == Durability::Async
            || l.sync.holds(member, seal.incarnation)
            || self.is_previous(member, seal)
    }

    /// Counts.
    pub fn tally(&self) -> Tally {
        let l = self.leadership;
        let missing: Vec<MemberId> = l
            .sync
            .members
            .iter()
            .filter(|(m, i)| {
                !self
                    .valid()
                    .any(|(sealed, s)| sealed == *m && s.incarnation == **i)
            })
            .map(|(m, _)| m.clone())
            .collect();
        let have = l.sync.members.len() - missing.len();
        let needed = if l.durability == Durability::Async {
            1
        } else {
            l.sync.seals_needed()
        };
        let mut candidates: Vec<Candidate<'_>> = self
            .valid()
            .filter(|(m, s)| self.alive.contains(*m) && self.may_stand(m, s) && self.is_safe(m, s))
            .map(|(member, s)| Candidate {
                member,
                position: (s.timeline, s.lsn),
                priority: self.members.get(member).map_or(0, |r| r.value.priority),
            })
            .filter(|c| c.priority > 0)
            .collect();
        let preferred = l.preferred.as_ref();
        candidates.sort_by(|a, b| {
            let forced = |c: &Candidate<'_>| l.allow_data_loss && preferred == Some(c.member);
            let wished = |c: &Candidate<'_>| preferred == Some(c.member);
            let fit = |c: &Candidate<'_>| !self.unfit.contains(c.member);
            // Every candidate holds what was acknowledged, so in `quorum` nothing is lost with a fit one; in
            // `async` each byte of WAL may be an acknowledged commit.
            let fitter = fit(b).cmp(&fit(a));
            let lossless = l.durability == Durability::Quorum && !l.allow_data_loss;
            forced(b)
                .cmp(&forced(a))
                .then(if lossless { fitter } else { Ordering::Equal })
                .then(b.position.cmp(&a.position))
                .then(fitter)
                .then(wished(b).cmp(&wished(a)))
                .then(b.priority.cmp(&a.priority))
                .then(a.member.cmp(b.member))
        });
        let winner = candidates.first().map(|c| c.member.clone());
        let why = self.explain(candidates.first(), needed, have, &missing);
        Tally {
            needed,
            have,
            missing,
            winner,
            why,
        }
    }

    fn explain(
        &self,
        best: Option<&Candidate<'_>>,
        needed: usize,
        have: usize,
        missing: &[MemberId],
    ) -> String {
        let names = |list: &[MemberId]| {
            list.iter()
                .map(MemberId::as_str)
                .collect::<Vec<_>>()
                .join(", ")
        };
        let l = self.leadership;
        if let Some(c) = best {
            return format!(
                "{} holds the most WAL ({} on timeline {}) of those that can be promoted",
                c.member, c.position.1, c.position.0
            );
        }
        let previous = l
            .previous
            .as_ref()
            .map_or("the former leader", |p| p.member.as_str());
        if l.durability == Durability::Async {
            return "no sealed member is near enough to the former leader's last known position"
                .into();
        }
        if l.sync.members.is_empty() || l.sync.k == 0 {
            return format!(
                "{previous} was alone when its term ended: only it has every acknowledged commit; start it again, or run \"craton failover --allow-data-loss\""
            );
        }
        if have < needed {
            return format!(
                "{have} of {needed} needed seals are there; {} must come back (or {previous}); or run \"craton failover --allow-data-loss\"",
                names(missing)
            );
        }
        "the sealed members that hold every acknowledged commit are away or have priority 0".into()
    }
}

#[cfg(test)]
mod tests;
