//! The invariants, checked at every step that could break them.

use std::collections::BTreeMap;

use craton_core::records::{ClusterView, MemberRef};
use craton_core::settings::Durability;
use craton_core::{Term, TimelineId};

use crate::wal::Rec;

/// What has been promised to clients, and what has been done.
#[derive(Debug, Default)]
pub struct Checker {
    /// An operator has accepted that the next leader may lack acknowledged commits.
    pub loss_accepted: bool,
    /// What was broken, in words; empty is good.
    pub violations: Vec<String>,
    /// Commits that a client heard of: position behind the record, identity.
    acknowledged: BTreeMap<usize, u64>,
    /// How many were acknowledged in all.
    pub acknowledged_total: u64,
    /// How many of them a failover lost, in `async` or by an operator's word.
    pub lost_in_async: u64,
    /// What was flushed on each timeline.
    content: BTreeMap<TimelineId, BTreeMap<usize, u64>>,
    /// The durability of each term, as last written in it.
    modes: BTreeMap<Term, Durability>,
    /// Who led each term.
    leaders: BTreeMap<Term, MemberRef>,
    /// Who promoted in each term.
    promoted: BTreeMap<Term, usize>,
    /// The flushed WAL of the leader that promoted in the highest term.
    line: Vec<u64>,
    /// That leader and its term.
    line_of: Option<(Term, usize)>,
    /// How often a database was made by initdb and became the cluster's.
    system_id: Option<String>,
}

impl Checker {
    /// Notes a broken invariant.
    pub fn broken(&mut self, what: impl Into<String>) {
        // One is enough to fail the run; a few more help to understand it.
        if self.violations.len() < 8 {
            self.violations.push(what.into());
        }
    }

    /// After every transaction of the store.
    pub fn store(&mut self, view: &ClusterView) {
        if let Some(l) = view.leadership.as_ref().map(|l| &l.value) {
            self.modes.insert(l.term, l.durability);
        }
        if let Some(l) = view.leadership.as_ref().map(|l| &l.value)
            && let Some(leader) = &l.leader
        {
            let first = self
                .leaders
                .entry(l.term)
                .or_insert_with(|| leader.clone())
                .clone();
            if first != *leader {
                self.broken(format!(
                    "two leaders in term {}: {} and {}",
                    l.term, first.member, leader.member
                ));
            }
            let behind = self.leaders.keys().next_back().copied();
            if behind > Some(l.term) {
                self.broken(format!("the term went back to {}", l.term));
            }
        }
        let id = view
            .cluster
            .as_ref()
            .and_then(|c| c.value.system_id.clone());
        if let Some(known) = &self.system_id
            && id.as_ref() != Some(known)
        {
            self.broken("the cluster's system identifier changed");
        }
        self.system_id = self.system_id.take().or(id);
    }

    /// True if commits of this term may be lost with its leader: that is what its record said last.
    fn is_async(&self, term: Term) -> bool {
        self.modes.get(&term) == Some(&Durability::Async)
    }

    /// A member promoted: it must hold every acknowledged commit.
    pub fn promotion(&mut self, term: Term, member: usize, timeline: TimelineId, wal: &[Rec]) {
        if let Some(other) = self.promoted.insert(term, member)
            && other != member
        {
            self.broken(format!(
                "members {other} and {member} both promoted in term {term}"
            ));
        }
        if self.line_of.is_some_and(|(t, _)| t > term) {
            // Late: it can acknowledge nothing, which is checked where it would.
            return;
        }
        let missing = self.missing(wal);
        if let Some(first) = missing.first().copied() {
            if self.is_async(term) || self.loss_accepted {
                self.loss_accepted = false;
                self.lost_in_async += missing.len() as u64;
                let tail = self.acknowledged.range(first..).count();
                if tail != missing.len() {
                    self.broken(format!("more than the tail was lost in term {term}"));
                }
                self.acknowledged.split_off(&first);
            } else {
                self.broken(format!(
                    "LOST: the leader of term {term} (member {member}, timeline {timeline}) lacks {} acknowledged commits, the first at record {first}",
                    missing.len()
                ));
            }
        }
        self.line = wal.iter().map(|r| r.id).collect();
        self.line_of = Some((term, member));
    }

    fn missing(&self, wal: &[Rec]) -> Vec<usize> {
        self.acknowledged
            .iter()
            .filter(|(at, id)| {
                at.checked_sub(1).and_then(|i| wal.get(i)).map(|r| r.id) != Some(**id)
            })
            .map(|(at, _)| *at)
            .collect()
    }

    /// A member that is part of the cluster for good must hold what was acknowledged.
    pub fn holds_everything(&mut self, who: &str, wal: &[Rec]) {
        let missing = self.missing(wal);
        if let Some(first) = missing.first() {
            self.broken(format!(
                "LOST: {who} lacks {} acknowledged commits, the first at record {first}",
                missing.len()
            ));
        }
    }

    /// A primary has flushed a record as the `at`-th.
    pub fn flushed(&mut self, member: usize, at: usize, rec: Rec) {
        let known = *self
            .content
            .entry(rec.timeline)
            .or_default()
            .entry(at)
            .or_insert(rec.id);
        if known != rec.id {
            self.broken(format!(
                "timeline {} has two contents at record {at}",
                rec.timeline
            ));
        }
        if self.line_of.is_some_and(|(_, m)| m == member) {
            match self.line.get(at - 1) {
                None if self.line.len() + 1 == at => self.line.push(rec.id),
                Some(id) if *id == rec.id => {}
                // A deposed leader's own branch, before it was rewound.
                _ => {}
            }
        }
    }

    /// A client was told that the commit at record `at` is done.
    pub fn acknowledged(&mut self, member: usize, at: usize, rec: Rec) {
        self.acknowledged_total += 1;
        let present = self.line.get(at - 1) == Some(&rec.id);
        let led = self.promoted.iter().rev().find(|(_, m)| **m == member);
        if led.is_some_and(|(term, _)| self.is_async(*term)) {
            // A deposed leader that has not heard of it yet acknowledges what will be lost.
            if present {
                self.acknowledged.insert(at, rec.id);
            } else {
                self.lost_in_async += 1;
            }
            return;
        }
        if !present {
            let (term, leader) = self.line_of.unwrap_or_default();
            self.broken(format!(
                "LOST: member {member} acknowledged record {at} (timeline {}), which the leader of term {term} (member {leader}) does not have",
                rec.timeline
            ));
        }
        if self
            .acknowledged
            .insert(at, rec.id)
            .is_some_and(|id| id != rec.id)
        {
            self.broken(format!("record {at} was acknowledged with two contents"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::Kind;

    fn rec(id: u64) -> Rec {
        Rec {
            id,
            timeline: TimelineId(1),
            kind: Kind::Commit,
        }
    }

    #[test]
    fn the_checker_sees_a_loss() {
        let mut c = Checker::default();
        c.promotion(Term(1), 0, TimelineId(1), &[]);
        for (at, id) in [(1, 10), (2, 20)] {
            c.flushed(0, at, rec(id));
            c.acknowledged(0, at, rec(id));
        }
        assert_eq!(c.violations, Vec::<String>::new());
        c.promotion(Term(2), 1, TimelineId(2), &[rec(10)]);
        assert!(c.violations.concat().contains("LOST"), "{:?}", c.violations);
    }

    #[test]
    fn the_checker_sees_a_deposed_leader_acknowledge() {
        let mut c = Checker::default();
        c.promotion(Term(1), 0, TimelineId(1), &[]);
        c.promotion(Term(2), 1, TimelineId(2), &[]);
        c.flushed(0, 1, rec(7));
        c.acknowledged(0, 1, rec(7));
        assert_eq!(c.violations.len(), 1);
    }

    #[test]
    fn the_checker_sees_one_timeline_with_two_contents() {
        let mut c = Checker::default();
        c.flushed(0, 1, rec(7));
        c.flushed(1, 1, rec(8));
        assert_eq!(c.violations.len(), 1);
    }
}
