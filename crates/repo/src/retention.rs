//! Which backups are kept, and what may then be deleted. Plans only: nothing is deleted here.

use std::collections::BTreeSet;

use craton_core::Lsn;

use crate::manifest::{BackupId, Manifest, Summary};
use crate::pack::PackId;
use crate::segment::SegmentId;

/// What to keep. Whatever one rule keeps is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Policy {
    /// Every time within this many milliseconds before now can be restored to: the backups in the
    /// window are kept, and the newest one before it.
    pub window_ms: u64,
    /// At least so many backups are kept, however old; never less than one.
    pub backups_min: usize,
}

/// The backups that the policy lets go, oldest first. `leads_here` says whether the cluster's present history goes
/// through the end of a backup: one of a history that was given up (a recovery to a time before it) cannot stand in for
/// an older one that it does go through.
pub fn expired(
    backups: &[Summary],
    policy: Policy,
    now_ms: u64,
    leads_here: impl Fn(&Summary) -> bool,
) -> Vec<BackupId> {
    let mut newest_first: Vec<&Summary> = backups.iter().collect();
    newest_first.sort_by(|a, b| (b.ended_at_ms, &b.id).cmp(&(a.ended_at_ms, &a.id)));
    let window_start = now_ms.saturating_sub(policy.window_ms);
    // The newest backup that had ended when the window began is what the window's first moment is restored from.
    let anchor = newest_first
        .iter()
        .position(|b| b.ended_at_ms <= window_start && leads_here(b))
        .unwrap_or(usize::MAX);
    let mut gone: Vec<BackupId> = newest_first
        .into_iter()
        .enumerate()
        .filter(|(n, _)| *n > anchor && *n >= policy.backups_min.max(1))
        .map(|(_, b)| b.id.clone())
        .collect();
    gone.reverse();
    gone
}

/// What nothing that is kept needs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Garbage {
    /// Packs without a chunk of any backup.
    pub packs: Vec<PackId>,
    /// WAL from before the oldest backup.
    pub segments: Vec<SegmentId>,
}

/// Finds garbage. A pack that a running backup has just written is not in any manifest yet:
/// the caller must not run this beside a backup. With no backup at all, no WAL is garbage.
pub fn garbage(
    kept: &[Manifest],
    packs: &[PackId],
    segments: &[SegmentId],
    segment_size: u64,
) -> Garbage {
    let used: BTreeSet<PackId> = kept.iter().flat_map(|m| m.packs.iter().copied()).collect();
    let oldest: Option<Lsn> = kept.iter().map(|m| m.summary.start_lsn).min();
    Garbage {
        packs: packs
            .iter()
            .copied()
            .filter(|p| !used.contains(p))
            .collect(),
        segments: segments
            .iter()
            .copied()
            .filter(|s| {
                oldest.is_some_and(|lsn| {
                    s.start(segment_size).0.saturating_add(segment_size) <= lsn.0
                })
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use craton_core::TimelineId;

    const DAY: u64 = 86_400_000;

    fn backup(day: u64) -> Summary {
        Summary {
            id: BackupId::new(format!("day{day:03}")).unwrap(),
            system_id: 1,
            server_version: 150_000,
            wal_segment_size: 16 << 20,
            source: "m1".into(),
            started_at_ms: day * DAY,
            ended_at_ms: day * DAY + 1,
            start_lsn: Lsn(day * (16 << 20)),
            start_timeline: TimelineId(1),
            stop_lsn: Lsn(day * (16 << 20) + 100),
            stop_timeline: TimelineId(1),
            data_bytes: 0,
            new_bytes: 0,
            stored_bytes: 0,
            minimum_settings: std::collections::BTreeMap::new(),
        }
    }

    fn names(ids: &[BackupId]) -> Vec<String> {
        ids.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_windows_first_moment_stays_restorable() {
        let all: Vec<Summary> = [1, 2, 3, 4, 5].map(backup).into();
        let policy = Policy {
            window_ms: 2 * DAY,
            backups_min: 1,
        };
        // The window begins at day 3.5: day 3 is what its first moment is restored from.
        assert_eq!(
            names(&expired(&all, policy, 5 * DAY + DAY / 2, |_| true)),
            ["day001", "day002"]
        );
        // Nothing is old enough to stand in for day 1.
        assert!(expired(&all, policy, 2 * DAY, |_| true).is_empty());
        // Day 3 was given up by a recovery to a time before it: what day 2 leads to is not restored from it.
        let given_up = |b: &Summary| b.id.to_string() != "day003";
        assert_eq!(
            names(&expired(&all, policy, 5 * DAY + DAY / 2, given_up)),
            ["day001"]
        );
        assert!(expired(&all, policy, 5 * DAY + DAY / 2, |_| false).is_empty());
    }

    #[test]
    fn a_number_of_backups_is_always_kept() {
        let all: Vec<Summary> = [1, 2, 3].map(backup).into();
        let old = 400 * DAY;
        assert_eq!(
            names(&expired(
                &all,
                Policy {
                    window_ms: DAY,
                    backups_min: 2
                },
                old,
                |_| true
            )),
            ["day001"]
        );
        assert_eq!(
            names(&expired(
                &all,
                Policy {
                    window_ms: 0,
                    backups_min: 0
                },
                old,
                |_| true
            )),
            ["day001", "day002"]
        );
    }

    #[test]
    fn garbage_is_what_no_backup_needs() {
        let manifest = Manifest {
            summary: backup(3),
            tablespaces: vec![],
            packs: vec![PackId::of(b"used")],
            chunks: vec![],
            entries: vec![],
        };
        let packs = [PackId::of(b"used"), PackId::of(b"left over")];
        let segments: Vec<SegmentId> = (1..=4)
            .map(|number| SegmentId {
                timeline: TimelineId(1),
                number,
            })
            .collect();
        let found = garbage(&[manifest], &packs, &segments, 16 << 20);
        assert_eq!(found.packs, [PackId::of(b"left over")]);
        assert_eq!(
            found.segments.iter().map(|s| s.number).collect::<Vec<_>>(),
            [1, 2]
        );
        assert!(garbage(&[], &[], &segments, 16 << 20).segments.is_empty());
    }
}
