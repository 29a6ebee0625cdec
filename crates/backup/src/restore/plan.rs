//! Which backup serves a target, and whether the WAL to it is all there.

use craton_core::{Lsn, TimelineId};
use craton_repo::continuity::{self, Missing};
use craton_repo::manifest::{BackupId, Manifest, Summary};
use craton_repo::segment::SegmentId;

use super::{Divergence, Target};
use crate::catalog::{self, Reach};
use crate::error::{BackupError, Result};
use crate::store::{Repository, now_ms};
use crate::views::timestamp;

/// What a restore will do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// The backup.
    pub manifest: Manifest,
    /// What recovery is told; the latest state when nothing happened after the time asked for.
    pub target: Target,
    /// The timeline that recovery follows.
    pub timeline: TimelineId,
    /// WAL is held up to here.
    pub wal_until: Lsn,
    /// What the operator should know.
    pub note: Option<String>,
}

impl Plan {
    /// Refuses a backup that is older than it may be.
    pub(super) fn check_age(&self, age_max: Option<std::time::Duration>) -> Result<()> {
        let summary = &self.manifest.summary;
        let age_ms = now_ms().saturating_sub(summary.ended_at_ms);
        match age_max {
            Some(max) if u128::from(age_ms) > max.as_millis() => {
                Err(BackupError::Refused(format!(
                    "the newest backup that fits, {}, ended {} hours ago, more than the {} that are allowed",
                    summary.id,
                    age_ms / 3_600_000,
                    max.as_secs() / 3600
                )))
            }
            _ => Ok(()),
        }
    }
}

/// Chooses a backup for a target and proves that the target can be reached from it.
pub fn plan(repository: &Repository, target: Target, backup: Option<&BackupId>) -> Result<Plan> {
    if let Target::Time(time) = target
        && time > timestamp(now_ms())
    {
        return Err(BackupError::Refused(format!(
            "{time} is in the future; choose a time that has passed"
        )));
    }
    let manifest = match backup {
        Some(id) => {
            let manifest = repository.manifest(id)?;
            fits(&manifest.summary, target)?;
            manifest
        }
        None => choose(repository, target)?,
    };
    let reach = catalog::reach(repository, &manifest.summary)?;
    check_wal(repository, &manifest, target, &reach)?;
    let (target, note) = reachable(repository, &manifest.summary, target, &reach)?;
    Ok(Plan {
        manifest,
        target,
        timeline: reach.history.timeline,
        wal_until: reach.coverage.reached,
        note,
    })
}

/// Chooses a backup from before the fork, and proves that WAL leads from it to the divergent segments.
pub(super) fn diverged(
    repository: &Repository,
    divergence: &Divergence,
    backup: Option<&BackupId>,
) -> Result<Plan> {
    let history = repository.history(divergence.timeline)?;
    let before = |s: &Summary| {
        let end = history.end_of(s.stop_timeline);
        let on_the_way =
            s.stop_timeline == divergence.timeline || end.is_some_and(|end| end >= s.stop_lsn);
        on_the_way && s.stop_lsn <= divergence.from
    };
    let (summaries, _) = repository.summaries()?;
    let named = |s: &&Summary| backup.is_none_or(|id| *id == s.id);
    let Some(chosen) = summaries.iter().rev().filter(named).find(|s| before(s)) else {
        return Err(BackupError::Refused(format!(
            "no backup{} ended before the histories parted on timeline {} at {}: the divergent WAL cannot be replayed on any",
            backup.map_or(String::new(), |id| format!(" {id}")),
            divergence.timeline,
            divergence.from
        )));
    };
    // The segment of the fork is among those that were kept, from its beginning.
    let size = repository.segment_size();
    let end = divergence.from.segment_start(size).max(chosen.start_lsn);
    let coverage = continuity::prove(
        &repository.inventory()?,
        &history,
        size,
        chosen.start_lsn,
        Some(end),
    );
    if let Some(gap) = coverage.missing.first().filter(|_| end > chosen.start_lsn) {
        return Err(BackupError::Refused(format!(
            "WAL is missing: timeline {} from {} to {} ({} segments), which the way from backup {} to the divergent WAL needs",
            gap.timeline, gap.from, gap.to, gap.segments, chosen.id
        )));
    }
    Ok(Plan {
        manifest: repository.manifest(&chosen.id)?,
        target: Target::Latest,
        timeline: divergence.timeline,
        wal_until: divergence.until,
        note: Some(format!(
            "the divergent WAL in {} is replayed; it must stay there until the server has started",
            divergence.directory.display()
        )),
    })
}

/// PostgreSQL refuses a time behind the last transaction. When none ended after it, the latest state
/// is the state at that time.
fn reachable(
    repository: &Repository,
    backup: &Summary,
    target: Target,
    reach: &Reach,
) -> Result<(Target, Option<String>)> {
    let Target::Time(time) = target else {
        return Ok((target, None));
    };
    if !reach.coverage.missing.is_empty() {
        return Ok((target, None));
    }
    let last = catalog::last_transaction_end(
        repository,
        &reach.history,
        backup.start_lsn,
        reach.coverage.reached,
    )?;
    Ok(match last {
        Some(last) if last > time => (target, None),
        Some(last) => (
            Target::Latest,
            Some(format!(
                "the last transaction in the WAL held ended at {last}, before {time}; everything is restored"
            )),
        ),
        None => (
            Target::Latest,
            Some("no transaction ended after the backup; everything is restored".to_owned()),
        ),
    })
}

fn choose(repository: &Repository, target: Target) -> Result<Manifest> {
    let (summaries, problems) = repository.summaries()?;
    let Some(first) = summaries.first() else {
        let mut text = format!(
            "{} holds no backup yet; take one: craton backup run",
            repository.root().display()
        );
        for problem in problems {
            text.push_str("\n  ");
            text.push_str(&problem.to_string());
        }
        return Err(BackupError::Refused(text));
    };
    let chosen = summaries.iter().rev().find(|s| fits(s, target).is_ok()).ok_or_else(|| {
        BackupError::Refused(match target {
            Target::Time(time) => format!(
                "{time} is before the end of the first backup ({}), so nothing can be restored to it; the earliest time is {}",
                first.id,
                timestamp(first.ended_at_ms)
            ),
            Target::Lsn(lsn) => format!(
                "{lsn} is before the end of the first backup ({}); the earliest position is {}",
                first.id, first.stop_lsn
            ),
            Target::Latest | Target::Immediate => "no backup fits".to_owned(),
        })
    })?;
    repository.manifest(&chosen.id)
}

/// A backup can be rolled forward only: the target must not lie before its end.
fn fits(s: &Summary, target: Target) -> Result<()> {
    match target {
        Target::Time(time) if time < timestamp(s.ended_at_ms) => {
            Err(BackupError::Refused(format!(
                "{time} is before backup {} ended ({}); choose an older backup or a later time",
                s.id,
                timestamp(s.ended_at_ms)
            )))
        }
        Target::Lsn(lsn) if lsn < s.stop_lsn => Err(BackupError::Refused(format!(
            "{lsn} is before the end of backup {} ({}); choose an older backup or a later position",
            s.id, s.stop_lsn
        ))),
        _ => Ok(()),
    }
}

fn check_wal(
    repository: &Repository,
    manifest: &Manifest,
    target: Target,
    reach: &Reach,
) -> Result<()> {
    let s = &manifest.summary;
    let end = match target {
        Target::Immediate => Some(s.stop_lsn),
        Target::Lsn(lsn) => Some(lsn),
        Target::Latest | Target::Time(_) => None,
    };
    let size = repository.segment_size();
    let coverage = match end {
        Some(end) => continuity::prove(
            &repository.inventory()?,
            &reach.history,
            size,
            s.start_lsn,
            Some(end),
        ),
        None => reach.coverage.clone(),
    };
    let Some(gap) = coverage.missing.first() else {
        return Ok(());
    };
    if let Target::Time(time) = target
        && gap.from > s.stop_lsn
        && before_gap(repository, reach, gap)?.is_some_and(|last| time <= last)
    {
        return Ok(());
    }
    let earlier = before_gap(repository, reach, gap)?
        .filter(|_| gap.from > s.stop_lsn)
        .map_or(String::new(), |last| {
            format!("; times up to about {last} can be restored (--to)")
        });
    Err(BackupError::Refused(format!(
        "WAL is missing: timeline {} from {} to {} ({} segments), which the way from backup {} to the target needs{earlier}",
        gap.timeline, gap.from, gap.to, gap.segments, s.id
    )))
}

/// When the last WAL before a gap came in.
fn before_gap(
    repository: &Repository,
    reach: &Reach,
    gap: &Missing,
) -> Result<Option<jiff::Timestamp>> {
    let size = repository.segment_size();
    let Some(number) = gap.from.0.checked_div(size).and_then(|n| n.checked_sub(1)) else {
        return Ok(None);
    };
    let last = SegmentId {
        timeline: reach.history.timeline_of(number, size),
        number,
    };
    Ok(repository.segment_received_at_ms(last)?.map(timestamp))
}
