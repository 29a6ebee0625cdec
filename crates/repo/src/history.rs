//! Timeline history files, and which timeline a WAL segment is to be read from.

use craton_core::{Lsn, TimelineId};

use crate::FormatError;

/// The longest history that is believed, in lines.
pub const HISTORY_LINES_MAX: usize = 100_000;

/// A timeline that was left for the next one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ancestor {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where it was left: WAL from here on belongs to the next one.
    pub end: Lsn,
}

/// How a timeline came to be: its ancestors, oldest first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct History {
    /// The timeline itself.
    pub timeline: TimelineId,
    /// Its ancestors, oldest first.
    pub ancestors: Vec<Ancestor>,
}

impl History {
    /// The history of a timeline that has no ancestors (timeline 1 has no history file).
    pub fn root(timeline: TimelineId) -> Self {
        Self {
            timeline,
            ancestors: Vec::new(),
        }
    }

    /// Reads a history file as PostgreSQL writes it (`timeline.c`): a timeline number, the
    /// switch point and a reason on each line; `#` begins a comment.
    pub fn parse(timeline: TimelineId, text: &str) -> Result<Self, FormatError> {
        let bad = |line: &str| {
            FormatError::corrupt(
                "timeline history",
                format!("cannot read the line \"{line}\""),
            )
        };
        let mut ancestors: Vec<Ancestor> = Vec::new();
        for line in text
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty() && !l.starts_with('#'))
        {
            let mut fields = line.split_whitespace();
            let number = fields
                .next()
                .and_then(|f| f.parse().ok())
                .ok_or_else(|| bad(line))?;
            let end: Lsn = fields
                .next()
                .and_then(|f| f.parse().ok())
                .ok_or_else(|| bad(line))?;
            let ordered = ancestors
                .last()
                .is_none_or(|a| a.timeline < TimelineId(number) && a.end <= end);
            if !ordered || TimelineId(number) >= timeline || ancestors.len() >= HISTORY_LINES_MAX {
                return Err(bad(line));
            }
            ancestors.push(Ancestor {
                timeline: TimelineId(number),
                end,
            });
        }
        Ok(Self {
            timeline,
            ancestors,
        })
    }

    /// Where `timeline` was left, when it is an ancestor.
    pub fn end_of(&self, timeline: TimelineId) -> Option<Lsn> {
        self.ancestors
            .iter()
            .find(|a| a.timeline == timeline)
            .map(|a| a.end)
    }

    /// True when `timeline` is this one or one of its ancestors.
    pub fn contains(&self, timeline: TimelineId) -> bool {
        self.timeline == timeline || self.end_of(timeline).is_some()
    }

    /// The timeline whose file of segment `number` recovery reads. The segment in which a fork lies
    /// belongs to the newer timeline: its file begins with a copy of what came before the fork.
    pub fn timeline_of(&self, number: u64, segment_size: u64) -> TimelineId {
        self.ancestors
            .iter()
            .find(|a| number < a.end.0.checked_div(segment_size).unwrap_or(0))
            .map_or(self.timeline, |a| a.timeline)
    }

    /// The segments that each timeline contributes: `(timeline, first, end)`, `end` not included;
    /// the newest has no end.
    pub fn spans(&self, segment_size: u64) -> Vec<(TimelineId, u64, u64)> {
        let mut first = 0;
        let mut spans = Vec::with_capacity(self.ancestors.len() + 1);
        for a in &self.ancestors {
            let end = a.end.0.checked_div(segment_size).unwrap_or(0);
            if end > first {
                spans.push((a.timeline, first, end));
                first = end;
            }
        }
        spans.push((self.timeline, first, u64::MAX));
        spans
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB16: u64 = 16 << 20;

    #[test]
    fn reads_what_postgresql_writes() {
        let h = History::parse(
            TimelineId(3),
            "1\t0/5000148\tno recovery target specified\n\n2\t0/7000000\tbefore 2000-01-01 01:00:00+01\n",
        )
        .unwrap();
        assert_eq!(h.end_of(TimelineId(1)), Some(Lsn(0x500_0148)));
        assert!(h.contains(TimelineId(3)) && !h.contains(TimelineId(4)));
        // The fork of 1 lies inside segment 5, so that segment is read from 2; that of 2 on a boundary.
        let read_from: Vec<u32> = (4..=7).map(|n| h.timeline_of(n, MIB16).0).collect();
        assert_eq!(read_from, [1, 2, 2, 3]);
        assert_eq!(
            h.spans(MIB16),
            [
                (TimelineId(1), 0, 5),
                (TimelineId(2), 5, 7),
                (TimelineId(3), 7, u64::MAX)
            ]
        );
    }

    #[test]
    fn refuses_nonsense() {
        for bad in [
            "x 0/1 r",
            "1",
            "1 0/g r",
            "3 0/1 r",
            "2 0/1 r\n1 0/2 r",
            "1 0/2 r\n2 0/1 r",
        ] {
            assert!(
                History::parse(TimelineId(3), bad).is_err(),
                "{bad} was accepted"
            );
        }
    }
}
