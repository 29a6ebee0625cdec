//! Whether a member's WAL is a prefix of the leader's history, or went its own way.

use crate::records::{TimelineRecord, Timelines};
use crate::types::{Lsn, TimelineId};

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
    use crate::types::{MemberId, Term};

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
}
