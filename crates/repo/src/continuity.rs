//! Proof that the WAL held is whole: segment by segment, across timelines.

use std::collections::BTreeMap;

use craton_core::{Lsn, TimelineId};
use serde::{Deserialize, Serialize};

use crate::history::History;
use crate::segment::SegmentId;

/// How much of a segment is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Held {
    /// All of it.
    Whole,
    /// Its beginning, up to this position.
    Until(Lsn),
}

/// The segments held.
pub type Inventory = BTreeMap<SegmentId, Held>;

/// Segments that are not held.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Missing {
    /// Their timeline.
    pub timeline: TimelineId,
    /// The position where the first one begins.
    pub from: Lsn,
    /// The position where the last one ends.
    pub to: Lsn,
    /// How many.
    pub segments: u64,
}

/// What recovery along a history finds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Coverage {
    /// Recovery can go this far without a gap.
    pub reached: Lsn,
    /// Everything that is missing between the start and the end asked for, or the newest WAL held.
    pub missing: Vec<Missing>,
}

/// The newest segment held of each timeline, the newest timeline first.
pub fn newest_of_each(inventory: &Inventory) -> Vec<SegmentId> {
    let mut newest: Vec<SegmentId> = Vec::new();
    for id in inventory.keys() {
        match newest.last_mut().filter(|n| n.timeline == id.timeline) {
            Some(last) => last.number = last.number.max(id.number),
            None => newest.push(*id),
        }
    }
    newest.reverse();
    newest
}

/// Walks from `from` along `history` to `to`, or to the newest WAL held.
pub fn prove(
    inventory: &Inventory,
    history: &History,
    segment_size: u64,
    from: Lsn,
    to: Option<Lsn>,
) -> Coverage {
    let mut walk = Walk {
        size: segment_size.max(1),
        reached: None,
        missing: Vec::new(),
    };
    let first = from.0 / walk.size;
    // The segment that holds the last byte wanted; a position on a boundary wants none of the next.
    let last = to
        .map(|to| to.0.saturating_sub(1) / walk.size)
        .or_else(|| newest(inventory, history, segment_size));
    let Some(last) = last.filter(|last| *last >= first) else {
        return Coverage {
            reached: from,
            missing: Vec::new(),
        };
    };
    for (timeline, begin, end) in history.spans(walk.size) {
        let (begin, end) = (begin.max(first), end.min(last.saturating_add(1)));
        if begin < end {
            walk.span(inventory, timeline, begin, end, to);
        }
    }
    let end = walk
        .reached
        .unwrap_or(Lsn((last + 1).saturating_mul(walk.size)));
    Coverage {
        reached: end.max(from),
        missing: walk.missing,
    }
}

/// The number of the newest segment held on the way along `history`.
fn newest(inventory: &Inventory, history: &History, segment_size: u64) -> Option<u64> {
    history
        .spans(segment_size)
        .into_iter()
        .rev()
        .find_map(|(timeline, begin, end)| {
            held_in(inventory, timeline, begin, end)
                .next_back()
                .map(|(id, _)| id.number)
        })
}

fn held_in(
    inventory: &Inventory,
    timeline: TimelineId,
    begin: u64,
    end: u64,
) -> std::collections::btree_map::Range<'_, SegmentId, Held> {
    inventory.range(
        SegmentId {
            timeline,
            number: begin,
        }..SegmentId {
            timeline,
            number: end.max(begin),
        },
    )
}

struct Walk {
    size: u64,
    reached: Option<Lsn>,
    missing: Vec<Missing>,
}

impl Walk {
    fn span(
        &mut self,
        inventory: &Inventory,
        timeline: TimelineId,
        begin: u64,
        end: u64,
        to: Option<Lsn>,
    ) {
        let mut next = begin;
        for (id, held) in held_in(inventory, timeline, begin, end) {
            self.absent(timeline, next, id.number);
            next = id.number + 1;
            if let Held::Until(until) = *held {
                // The newest segment may be held in part: to its end, or as far as was asked for.
                let newest = id.number + 1 == end;
                if newest && to.is_none_or(|to| until >= to) {
                    self.reached.get_or_insert(until);
                } else {
                    self.absent(timeline, id.number, next);
                    self.reached = self.reached.map(|r| {
                        if r.0 == id.number * self.size {
                            until
                        } else {
                            r
                        }
                    });
                }
            }
        }
        self.absent(timeline, next, end);
    }

    fn absent(&mut self, timeline: TimelineId, begin: u64, end: u64) {
        if begin >= end {
            return;
        }
        let from = Lsn(begin.saturating_mul(self.size));
        let to = Lsn(end.saturating_mul(self.size));
        self.reached.get_or_insert(from);
        match self.missing.last_mut() {
            Some(m) if m.timeline == timeline && m.to == from => {
                m.to = to;
                m.segments += end - begin;
            }
            _ => self.missing.push(Missing {
                timeline,
                from,
                to,
                segments: end - begin,
            }),
        }
    }
}

/// Where a receiver goes on: the start of the first segment after the newest whole one on the way
/// along `history`. None when nothing on that way is held.
pub fn resume(
    inventory: &Inventory,
    history: &History,
    segment_size: u64,
) -> Option<(TimelineId, Lsn)> {
    let number =
        history
            .spans(segment_size)
            .into_iter()
            .rev()
            .find_map(|(timeline, begin, end)| {
                let (id, held) = held_in(inventory, timeline, begin, end).next_back()?;
                Some(if *held == Held::Whole {
                    id.number + 1
                } else {
                    id.number
                })
            })?;
    Some((
        history.timeline_of(number, segment_size),
        Lsn(number.saturating_mul(segment_size)),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Ancestor;

    const SIZE: u64 = 1 << 20;

    fn inventory(held: &[(u32, u64)]) -> Inventory {
        held.iter()
            .map(|(t, number)| {
                (
                    SegmentId {
                        timeline: TimelineId(*t),
                        number: *number,
                    },
                    Held::Whole,
                )
            })
            .collect()
    }

    /// Timeline 2, forked from 1 in the middle of segment 5.
    fn forked() -> History {
        History {
            timeline: TimelineId(2),
            ancestors: vec![Ancestor {
                timeline: TimelineId(1),
                end: Lsn(5 * SIZE + 9),
            }],
        }
    }

    fn missing(timeline: u32, from: u64, to: u64) -> Missing {
        Missing {
            timeline: TimelineId(timeline),
            from: Lsn(from * SIZE),
            to: Lsn(to * SIZE),
            segments: to - from,
        }
    }

    #[test]
    fn whole_across_a_fork() {
        let held = inventory(&[(1, 3), (1, 4), (2, 5), (2, 6)]);
        let c = prove(&held, &forked(), SIZE, Lsn(3 * SIZE + 40), None);
        assert_eq!(
            c,
            Coverage {
                reached: Lsn(7 * SIZE),
                missing: vec![]
            }
        );
        assert_eq!(
            resume(&held, &forked(), SIZE),
            Some((TimelineId(2), Lsn(7 * SIZE)))
        );
    }

    #[test]
    fn the_segment_of_the_fork_is_needed_from_the_newer_timeline() {
        // Timeline 1's own segment 5 and what it wrote after the fork do not count.
        let held = inventory(&[(1, 3), (1, 4), (1, 5), (1, 6), (2, 6)]);
        let c = prove(&held, &forked(), SIZE, Lsn(3 * SIZE), None);
        assert_eq!(
            c,
            Coverage {
                reached: Lsn(5 * SIZE),
                missing: vec![missing(2, 5, 6)]
            }
        );
        let old_only = inventory(&[(1, 3), (1, 4), (1, 5), (1, 6)]);
        assert_eq!(
            resume(&old_only, &forked(), SIZE),
            Some((TimelineId(2), Lsn(5 * SIZE)))
        );
    }

    #[test]
    fn says_exactly_what_is_missing() {
        let held = inventory(&[(1, 2), (2, 7)]);
        let c = prove(&held, &forked(), SIZE, Lsn(SIZE), Some(Lsn(9 * SIZE)));
        assert_eq!(c.reached, Lsn(SIZE));
        assert_eq!(
            c.missing,
            [
                missing(1, 1, 2),
                missing(1, 3, 5),
                missing(2, 5, 7),
                missing(2, 8, 9)
            ]
        );
    }

    #[test]
    fn a_partial_segment_counts_only_at_the_end() {
        let mut held = inventory(&[(1, 3)]);
        let one = History::root(TimelineId(1));
        held.insert(
            SegmentId {
                timeline: TimelineId(1),
                number: 4,
            },
            Held::Until(Lsn(4 * SIZE + 500)),
        );
        let latest = prove(&held, &one, SIZE, Lsn(3 * SIZE), None);
        assert_eq!(
            latest,
            Coverage {
                reached: Lsn(4 * SIZE + 500),
                missing: vec![]
            }
        );
        assert!(
            prove(&held, &one, SIZE, Lsn(3 * SIZE), Some(Lsn(4 * SIZE + 500)))
                .missing
                .is_empty()
        );
        let beyond = prove(&held, &one, SIZE, Lsn(3 * SIZE), Some(Lsn(4 * SIZE + 501)));
        assert_eq!(beyond.missing, [missing(1, 4, 5)]);
        assert_eq!(beyond.reached, Lsn(4 * SIZE + 500));
        assert_eq!(
            resume(&held, &one, SIZE),
            Some((TimelineId(1), Lsn(4 * SIZE)))
        );
        held.insert(
            SegmentId {
                timeline: TimelineId(1),
                number: 5,
            },
            Held::Whole,
        );
        assert_eq!(
            prove(&held, &one, SIZE, Lsn(3 * SIZE), None).missing,
            [missing(1, 4, 5)]
        );
    }

    #[test]
    fn a_position_on_a_boundary_needs_nothing_after_it() {
        let held = inventory(&[(1, 3)]);
        let c = prove(
            &held,
            &History::root(TimelineId(1)),
            SIZE,
            Lsn(3 * SIZE),
            Some(Lsn(4 * SIZE)),
        );
        assert_eq!(
            c,
            Coverage {
                reached: Lsn(4 * SIZE),
                missing: vec![]
            }
        );
    }

    #[test]
    fn nothing_held_nothing_resumed() {
        assert_eq!(resume(&Inventory::new(), &forked(), SIZE), None);
        let c = prove(&Inventory::new(), &forked(), SIZE, Lsn(SIZE), None);
        assert_eq!(
            c,
            Coverage {
                reached: Lsn(SIZE),
                missing: vec![]
            }
        );
    }
}
