//! Counting seals: may somebody lead, who, and if not, why not (failover protocol, 3.1).
//!
//! Every commit that a client saw acknowledged is on the former leader and on at least k members of V.
//! Any k of V meets any |V| - k + 1 of V. So a member that holds at least as much as |V| - k + 1 sealed
//! members of V each (itself counted) holds every acknowledged commit; and so does the former leader.
//! Positions compare by (timeline, LSN): a timeline number is used once, and a later one of this cluster
//! contains what was acknowledged on an earlier.
//!
//! All of that rests on V being the one in force. In records that an operator recovered from one voter's disk it may
//! be an old one: there no seal is proof of anything, and only the operator's word goes on.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use crate::records::{At, Leadership, MemberRecord, Seal};
use crate::settings::Durability;
use crate::types::{Lsn, MemberId, TimelineId};

/// Why no seal proves anything in records that an operator recovered: the sync set itself may be an old one.
const MAY_BE_OLD: &str = "an operator recovered the records from one member's disk, and they may be old: the lost members may have gone on, and acknowledged commits that nobody here has; if they are lost for good, run \"craton failover --allow-data-loss\"";

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
    /// Before anybody does: a member that never leads holds the most, and another gets the rest from it.
    pub catch_up: Option<CatchUp>,
    /// In words: why this winner, or why none.
    pub why: String,
}

/// WAL that a future leader must get first (failover protocol, 3.1.4).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CatchUp {
    /// The sealed member that holds it.
    pub from: MemberId,
    /// The timeline of its end.
    pub timeline: TimelineId,
    /// Its end.
    pub lsn: Lsn,
    /// Who could get it and win then, the best first.
    pub followers: Vec<MemberId>,
    /// Who may lead without it, if nobody gets it: it holds every acknowledged commit all the same.
    pub or_else: Option<MemberId>,
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
    /// In `async`: where the former leader was when it was heard last, as the leader. None where it was not heard here:
    /// then its record of who streamed from it, and was near, has to do.
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
        if l.allow_data_loss || self.has_what_the_leader_had(member, seal) {
            return true;
        }
        match l.durability {
            Durability::Quorum | Durability::Strict => {
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

    /// True for the former leader, and for whoever holds at least as much as it sealed.
    fn has_what_the_leader_had(&self, member: &MemberId, seal: &Seal) -> bool {
        let position = (seal.timeline, seal.lsn);
        self.is_previous(member, seal)
            || self
                .valid()
                .any(|(m, s)| self.is_previous(m, s) && (s.timeline, s.lsn) <= position)
    }

    /// In `async` too only those whom the leader had listed: it must know everybody who could follow it, or
    /// their promises would not be enough. One that has sealed itself leads no longer.
    fn may_stand(&self, member: &MemberId, seal: &Seal) -> bool {
        let l = self.leadership;
        l.allow_data_loss
            || l.durability.keeps_commits()
            || l.sync.holds(member, seal.incarnation)
            || self.has_what_the_leader_had(member, seal)
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
        if l.may_be_old() {
            return Tally {
                needed,
                have,
                missing,
                winner: None,
                catch_up: None,
                why: MAY_BE_OLD.into(),
            };
        }
        let mut standing: Vec<Candidate<'_>> = self.standing().collect();
        standing.sort_by(|a, b| self.order(a, b));
        let safe = |c: &&Candidate<'_>| {
            let seal = self.seals.get(c.member).map(|s| &s.value);
            seal.is_some_and(|s| self.is_safe(c.member, s))
        };
        let candidates: Vec<&Candidate<'_>> = standing
            .iter()
            .filter(|c| c.priority > 0)
            .filter(safe)
            .collect();
        let catch_up = self.catch_up(
            standing.iter().filter(safe).max_by_key(|c| c.position),
            candidates.first().copied(),
        );
        if let Some(c) = catch_up {
            let why = format!(
                "{} holds the most WAL ({} on timeline {}) and never leads: {} gets the rest from it first",
                c.from,
                c.lsn,
                c.timeline,
                names(&c.followers, " or ")
            );
            return Tally {
                needed,
                have,
                missing,
                winner: None,
                catch_up: Some(c),
                why,
            };
        }
        let winner = candidates.first().map(|c| c.member.clone());
        let why = self.explain(candidates.first().copied(), needed, have, &missing);
        Tally {
            needed,
            have,
            missing,
            winner,
            catch_up: None,
            why,
        }
    }

    /// Sealed, alive, and known to the former leader; whatever their priority.
    fn standing(&self) -> impl Iterator<Item = Candidate<'a>> {
        self.valid()
            .filter(|(m, s)| self.alive.contains(*m) && self.may_stand(m, s))
            .map(|(m, s)| self.candidate(m, s))
    }

    fn candidate(&self, member: &'a MemberId, seal: &Seal) -> Candidate<'a> {
        Candidate {
            member,
            position: (seal.timeline, seal.lsn),
            priority: self.members.get(member).map_or(0, |r| r.value.priority),
        }
    }

    /// The best first: the most WAL, then the wish, then who did not lead before, then priority, then the name: a leader
    /// that hands over, or that has just failed, is not its own successor while another is as good. Where the operator accepts a
    /// loss, the one that was named comes first. Every candidate holds what was acknowledged, so where commits
    /// are kept nothing is lost with one that is fit; in `async` each byte of WAL may be an acknowledged commit.
    fn order(&self, a: &Candidate<'_>, b: &Candidate<'_>) -> Ordering {
        let l = self.leadership;
        let wished = |c: &Candidate<'_>| l.preferred.as_ref() == Some(c.member);
        let forced = |c: &Candidate<'_>| l.allow_data_loss && wished(c);
        let fit = |c: &Candidate<'_>| !self.unfit.contains(c.member);
        let led = |c: &Candidate<'_>| l.previous.as_ref().is_some_and(|p| p.member == *c.member);
        let fitter = fit(b).cmp(&fit(a));
        let lossless = l.durability.keeps_commits() && !l.allow_data_loss;
        forced(b)
            .cmp(&forced(a))
            .then(if lossless { fitter } else { Ordering::Equal })
            .then(b.position.cmp(&a.position))
            .then(fitter)
            .then(wished(b).cmp(&wished(a)))
            .then(led(a).cmp(&led(b)))
            .then(b.priority.cmp(&a.priority))
            .then(a.member.cmp(b.member))
    }

    /// The holder of the most never leads, and somebody who may could have its WAL.
    fn catch_up(
        &self,
        holder: Option<&Candidate<'_>>,
        best: Option<&Candidate<'_>>,
    ) -> Option<CatchUp> {
        let l = self.leadership;
        let holder =
            holder.filter(|h| h.priority == 0 && best.is_none_or(|b| b.position < h.position))?;
        if l.allow_data_loss && l.preferred.is_some() {
            return None;
        }
        // With all that the former leader had anybody may stand.
        let was_leader = self.seals.get(holder.member);
        let was_leader = was_leader.is_some_and(|s| self.is_previous(holder.member, &s.value));
        let mut followers: Vec<Candidate<'_>> = self
            .valid()
            .filter(|(m, s)| {
                // With all that V's holder has, whoever streams it holds every acknowledged commit.
                let may = was_leader || l.durability.keeps_commits() || self.may_stand(m, s);
                self.alive.contains(*m) && may
            })
            .map(|(m, s)| self.candidate(m, s))
            .filter(|c| c.priority > 0 && c.position < holder.position)
            .collect();
        followers.sort_by(|a, b| self.order(a, b));
        let followers: Vec<MemberId> = followers.iter().map(|c| c.member.clone()).collect();
        (!followers.is_empty()).then(|| CatchUp {
            from: holder.member.clone(),
            timeline: holder.position.0,
            lsn: holder.position.1,
            followers,
            or_else: best.map(|b| b.member.clone()),
        })
    }

    fn explain(
        &self,
        best: Option<&Candidate<'_>>,
        needed: usize,
        have: usize,
        missing: &[MemberId],
    ) -> String {
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
            return format!(
                "none of those that streamed from {previous} ({}) has sealed and is near enough to its last known position; start one of them, or run \"craton failover --allow-data-loss\"",
                names(&l.sync.members.keys().cloned().collect::<Vec<_>>(), ", ")
            );
        }
        if l.sync.members.is_empty() || l.sync.k == 0 {
            return format!(
                "{previous} was alone when its term ended: only it has every acknowledged commit; start it again, or run \"craton failover --allow-data-loss\""
            );
        }
        if have < needed {
            return format!(
                "{have} of {needed} needed seals are there; {} must come back (or {previous}); or run \"craton failover --allow-data-loss\"",
                names(missing, ", ")
            );
        }
        "the sealed members that hold every acknowledged commit are away or have priority 0".into()
    }
}

fn names(list: &[MemberId], between: &str) -> String {
    let names: Vec<&str> = list.iter().map(MemberId::as_str).collect();
    if names.is_empty() {
        return "nobody".into();
    }
    names.join(between)
}

#[cfg(test)]
mod tests;
