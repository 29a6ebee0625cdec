//! What is in a repository, read from the disk alone: it needs no daemon.

use std::collections::BTreeSet;

use craton_core::{Lsn, TimelineId};
use craton_repo::chunk::ChunkId;
use craton_repo::continuity::{self, Coverage, Inventory, Missing};
use craton_repo::history::History;
use craton_repo::layout::SegmentForm;
use craton_repo::manifest::{BackupId, Manifest, Summary};
use craton_repo::segment::SegmentId;
use craton_repo::wal_scan;
use jiff::Timestamp;

use crate::error::Result;
use crate::store::{ChunkReader, Repository};
use crate::views::{BackupDetailView, BackupListView, BackupView, VerifyView, timestamp};

/// All backups, oldest first.
pub fn list(repository: &Repository) -> Result<BackupListView> {
    let (summaries, problems) = repository.summaries()?;
    Ok(BackupListView {
        backups: summaries.iter().map(BackupView::from).collect(),
        problems: problems.iter().map(ToString::to_string).collect(),
    })
}

/// One backup, and how far it can be restored.
pub fn show(repository: &Repository, id: &BackupId) -> Result<BackupDetailView> {
    let manifest = repository.manifest(id)?;
    let reach = reach(repository, &manifest.summary)?;
    let (entries, chunks, packs) = BackupDetailView::counts(&manifest);
    let last = SegmentId::at(
        reach.history.timeline_of(
            last_segment(reach.coverage.reached, repository),
            repository.segment_size(),
        ),
        Lsn(reach.coverage.reached.0.saturating_sub(1)),
        repository.segment_size(),
    );
    Ok(BackupDetailView {
        backup: BackupView::from(&manifest.summary),
        system_id: manifest.summary.system_id,
        entries,
        chunks,
        packs,
        tablespaces: manifest.tablespaces,
        latest_timeline: reach.history.timeline,
        restorable_to: reach.coverage.reached,
        restorable_until: repository.segment_received_at_ms(last)?.map(timestamp),
        missing_wal: reach.coverage.missing,
    })
}

fn last_segment(reached: Lsn, repository: &Repository) -> u64 {
    reached
        .0
        .saturating_sub(1)
        .checked_div(repository.segment_size())
        .unwrap_or(0)
}

/// How far a backup can be rolled forward, and along which history.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reach {
    /// The history of the newest timeline that comes from this backup.
    pub history: History,
    /// What the WAL along it covers.
    pub coverage: Coverage,
}

/// Follows the WAL from a backup to the newest timeline that descends from it.
pub fn reach(repository: &Repository, backup: &Summary) -> Result<Reach> {
    let inventory = repository.inventory()?;
    let history = newest_history(repository, &inventory, backup)?;
    let coverage = continuity::prove(
        &inventory,
        &history,
        repository.segment_size(),
        backup.start_lsn,
        None,
    );
    // WAL up to the end of the backup is a must, also when nothing newer is held.
    if coverage.missing.is_empty() && coverage.reached < backup.stop_lsn {
        let stop = Some(backup.stop_lsn);
        let coverage = continuity::prove(
            &inventory,
            &history,
            repository.segment_size(),
            backup.start_lsn,
            stop,
        );
        return Ok(Reach { history, coverage });
    }
    Ok(Reach { history, coverage })
}

/// The newest timeline that went through the end of the backup, and of which WAL is held.
fn newest_history(
    repository: &Repository,
    inventory: &Inventory,
    backup: &Summary,
) -> Result<History> {
    let mut candidates: Vec<TimelineId> = repository.timelines()?;
    candidates.reverse();
    for timeline in candidates.into_iter().filter(|t| *t > backup.stop_timeline) {
        let history = repository.history(timeline)?;
        let through = history
            .end_of(backup.stop_timeline)
            .is_some_and(|end| end >= backup.stop_lsn);
        let held = inventory.keys().any(|s| s.timeline == timeline);
        if through && held {
            return Ok(history);
        }
    }
    repository.history(backup.stop_timeline)
}

/// WAL that is missing since the oldest backup.
pub fn missing_wal(repository: &Repository) -> Result<Vec<Missing>> {
    let (summaries, _) = repository.summaries()?;
    match summaries.first() {
        Some(oldest) => Ok(reach(repository, oldest)?.coverage.missing),
        None => Ok(Vec::new()),
    }
}

/// When the last transaction ended whose end is in the WAL held along a history, looking back no
/// further than `from`.
pub fn last_transaction_end(
    repository: &Repository,
    history: &History,
    from: Lsn,
    reached: Lsn,
) -> Result<Option<Timestamp>> {
    let size = repository.segment_size();
    let first = from.0.checked_div(size).unwrap_or(0);
    for number in (first..=last_segment(reached, repository)).rev() {
        let id = SegmentId {
            timeline: history.timeline_of(number, size),
            number,
        };
        let bytes = match repository.whole_segment(id)? {
            Some(whole) => Some(whole),
            None => repository.partial_segment(id)?,
        };
        let end_us = bytes.as_deref().and_then(wal_scan::last_transaction_end_us);
        if let Some(end) = end_us.and_then(|us| Timestamp::from_microsecond(us).ok()) {
            return Ok(Some(end));
        }
    }
    Ok(None)
}

/// Reads everything and checks every hash.
pub fn verify(repository: &Repository) -> Result<VerifyView> {
    let (summaries, problems) = repository.summaries()?;
    let mut view = VerifyView {
        problems: problems.iter().map(ToString::to_string).collect(),
        ..VerifyView::default()
    };
    let mut good: BTreeSet<ChunkId> = BTreeSet::new();
    for summary in &summaries {
        let manifest = repository.manifest(&summary.id)?;
        let found = verify_chunks(repository, &manifest, &mut good, &mut view);
        view.backups_good += u64::from(found == 0);
    }
    view.chunks = good.len() as u64;
    for (id, (form, _)) in repository.segments()? {
        if form == SegmentForm::Partial {
            continue;
        }
        match repository.whole_segment(id) {
            Ok(_) => view.segments += 1,
            Err(error) => view.problems.push(error.to_string()),
        }
    }
    if let Some(oldest) = summaries.first() {
        for m in reach(repository, oldest)?.coverage.missing {
            view.problems.push(format!(
                "WAL of timeline {} from {} to {} is missing",
                m.timeline, m.from, m.to
            ));
        }
    }
    Ok(view)
}

fn verify_chunks(
    repository: &Repository,
    manifest: &Manifest,
    good: &mut BTreeSet<ChunkId>,
    view: &mut VerifyView,
) -> u64 {
    let mut reader = ChunkReader::new(repository);
    let mut bad = 0;
    for chunk in manifest
        .chunks
        .iter()
        .filter(|c| !good.contains(&c.id))
        .collect::<Vec<_>>()
    {
        let Some(pack) = manifest.packs.get(chunk.pack as usize) else {
            continue;
        };
        match reader.read(*pack, chunk) {
            Ok(_) => {
                good.insert(chunk.id);
            }
            Err(error) => {
                bad += 1;
                view.problems
                    .push(format!("backup {}: {error}", manifest.summary.id));
            }
        }
    }
    bad
}
