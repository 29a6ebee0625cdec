//! Whether a member's WAL is a prefix of the leader's history, or went its own way.

use crate::records::{TimelineRecord, Timelines};
use crate::types::{Lsn, MemberId, Term, TimelineId};

/// Timeline numbers that a recovery passes over at least, and at most as many again: members that are gone may have
/// promoted unseen, and two recoveries of one log must not meet.
const RECOVERY_TIMELINES: u64 = 32;

/// How a member's WAL relates to the leader's timeline.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Relation {
    /// Everything it holds is part of the leader's history: it can follow.
    Prefix,
    /// It holds WAL that the leader does not have; the histories parted here.
    Diverged {
        /// The last timeline that both share.
        timeline: TimelineId,
        /// Where they parted.
        fork: Lsn,
    },
    /// Its timeline is not one of the cluster's.
    Unknown,
}

impl Timelines {
    /// The record of a timeline.
    pub fn get(&self, timeline: TimelineId) -> Option<&TimelineRecord> {
        self.0.iter().find(|t| t.timeline == timeline)
    }

    /// The lowest number that has never been used.
    pub fn next_free(&self) -> TimelineId {
        TimelineId(
            self.0
                .iter()
                .map(|t| t.timeline.0)
                .max()
                .map_or(1, |m| m.saturating_add(1)),
        )
    }

    /// What is left when an operator recovers the records from one voter's disk: numbers that others may have taken
    /// since are passed over. The last of them stands for all.
    #[must_use]
    pub fn into_recovered(mut self, term: Term, member: MemberId, at_ms: u64) -> Self {
        let passed = RECOVERY_TIMELINES + at_ms % RECOVERY_TIMELINES;
        let last = u64::from(self.next_free().0).saturating_add(passed);
        self.0.push(TimelineRecord {
            timeline: TimelineId(u32::try_from(last).unwrap_or(u32::MAX)),
            term,
            parent: None,
            fork: Lsn::ZERO,
            member,
        });
        self
    }

    /// The ancestors of `timeline` with the position where each was left, nearest first.
    fn ancestors(&self, timeline: TimelineId) -> Vec<(TimelineId, Lsn)> {
        let mut found = Vec::new();
        let mut at = timeline;
        // A child's number is greater than its parent's, so this ends.
        while let Some(record) = self.get(at) {
            let Some(parent) = record.parent.filter(|p| *p < at) else {
                break;
            };
            found.push((parent, record.fork));
            at = parent;
        }
        found
    }

    /// Compares a member whose WAL ends at (`timeline`, `end`) with a leader on `leader`.
    pub fn relation(&self, timeline: TimelineId, end: Lsn, leader: TimelineId) -> Relation {
        if timeline == leader {
            return Relation::Prefix;
        }
        let ancestors = self.ancestors(leader);
        if let Some((_, fork)) = ancestors.iter().find(|(t, _)| *t == timeline) {
            return if end <= *fork {
                Relation::Prefix
            } else {
                Relation::Diverged {
                    timeline,
                    fork: *fork,
                }
            };
        }
        // On a branch of its own: the parting is where its branch left the leader's line.
        for (parent, fork) in self.ancestors(timeline) {
            if parent == leader {
                return Relation::Diverged {
                    timeline: parent,
                    fork,
                };
            }
            if let Some((_, left)) = ancestors.iter().find(|(t, _)| *t == parent) {
                return Relation::Diverged {
                    timeline: parent,
                    fork: fork.min(*left),
                };
            }
        }
        Relation::Unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1 ─100─ 2 ─200─ 4
    ///          └─150─ 3
    fn tree() -> Timelines {
        let t = |timeline, parent, fork| TimelineRecord {
            timeline: TimelineId(timeline),
            term: Term(u64::from(timeline)),
            parent,
            fork: Lsn(fork),
            member: MemberId::new("a").unwrap(),
        };
        Timelines(vec![
            t(1, None, 0),
            t(2, Some(TimelineId(1)), 100),
            t(3, Some(TimelineId(2)), 150),
            t(4, Some(TimelineId(2)), 200),
        ])
    }

    #[test]
    fn relations() {
        let tree = tree();
        let rel = |t, end| tree.relation(TimelineId(t), Lsn(end), TimelineId(4));
        assert_eq!(rel(4, 999), Relation::Prefix);
        assert_eq!(rel(2, 200), Relation::Prefix);
        assert_eq!(rel(1, 100), Relation::Prefix);
        assert_eq!(
            rel(2, 201),
            Relation::Diverged {
                timeline: TimelineId(2),
                fork: Lsn(200)
            }
        );
        assert_eq!(
            rel(1, 101),
            Relation::Diverged {
                timeline: TimelineId(1),
                fork: Lsn(100)
            }
        );
        assert_eq!(
            rel(3, 160),
            Relation::Diverged {
                timeline: TimelineId(2),
                fork: Lsn(150)
            }
        );
        assert_eq!(rel(9, 1), Relation::Unknown);
        assert_eq!(tree.next_free(), TimelineId(5));
    }

    /// Somebody else may have promoted to 5, or to some more, after the log that is recovered was cut off.
    #[test]
    fn a_recovery_passes_over_the_numbers_that_others_may_have_taken() {
        let recovered = |at_ms| {
            let member = MemberId::new("a").unwrap();
            let mut t = tree().into_recovered(Term(9), member.clone(), at_ms);
            let (parent, timeline) = (Some(TimelineId(4)), t.next_free());
            t.0.push(TimelineRecord {
                timeline,
                term: Term(10),
                parent,
                fork: Lsn(300),
                member,
            });
            (t, timeline)
        };
        let (t, now) = recovered(0);
        assert!(now.0 > 5 + 30, "{now}");
        assert_eq!(t.relation(TimelineId(5), Lsn(250), now), Relation::Unknown);
        assert_eq!(t.relation(TimelineId(4), Lsn(300), now), Relation::Prefix);
        assert_ne!(recovered(1).1, now, "two recoveries of one log");
    }
}
