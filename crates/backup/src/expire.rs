//! Retention: backups that are let go, and what then nobody needs. Which ones is `craton-repo`'s
//! [`retention`](craton_repo::retention); this removes them.
//!
//! # What holds
//! * The scheduler does this and base backups one after the other: chunks that a backup has just stored are in no
//!   manifest yet, and would be taken for garbage.
//! * A backup's manifest goes first. A crash in between leaves chunks and WAL that nobody needs; the next round finds them.
//! * While one manifest cannot be read nothing goes: what that backup needs is not known.
//! * While somebody restores from the repository nothing goes ([`Repository::reading`]).
//! * The last backup never goes.

use craton_core::TimelineId;
use craton_repo::history::History;
use craton_repo::manifest::{BackupId, Summary};
use craton_repo::retention::{self, Policy};

use crate::error::{BackupError, Result};
use crate::store::Repository;
use crate::views::SweptView;

/// One day, milliseconds.
const DAY_MS: u64 = 86_400_000;

/// The policy of the settings; none where everything is kept.
pub(crate) fn policy(days: u32, backups_min: usize) -> Option<Policy> {
    (days > 0).then(|| Policy {
        window_ms: u64::from(days).saturating_mul(DAY_MS),
        backups_min,
    })
}

/// The history of the newest timeline: what is received now belongs to it.
fn present_history(repository: &Repository) -> Result<History> {
    let timelines = repository.timelines()?;
    // The first timeline has no file.
    let newest = timelines.last().copied().unwrap_or(TimelineId(1));
    repository.history(newest)
}

fn leads_to(backup: &Summary, history: &History) -> bool {
    backup.stop_timeline == history.timeline
        || history
            .end_of(backup.stop_timeline)
            .is_some_and(|end| end >= backup.stop_lsn)
}

/// Removes the backups that the policy lets go, and `also`, with all that only they needed.
pub(crate) fn sweep(
    repository: &Repository,
    policy: Option<Policy>,
    also: Option<&BackupId>,
    now_ms: u64,
) -> Result<SweptView> {
    let (summaries, problems) = repository.summaries()?;
    if let Some(problem) = problems.first() {
        return Err(BackupError::Refused(format!(
            "nothing is removed while a backup cannot be read, for what it needs is not known: {problem}; \
             put its file back, or remove it from the directory \"backups\""
        )));
    }
    let mut gone = match policy {
        Some(policy) => {
            let here = present_history(repository)?;
            retention::expired(&summaries, policy, now_ms, |s| leads_to(s, &here))
        }
        None => Vec::new(),
    };
    if let Some(id) = also.filter(|id| !gone.contains(id)) {
        if !summaries.iter().any(|s| s.id == *id) {
            return Err(BackupError::Refused(format!(
                "there is no backup {id}; `craton backup list` shows all"
            )));
        }
        gone.push(id.clone());
    }
    if gone.len() >= summaries.len() && !gone.is_empty() {
        return Err(BackupError::Refused(
            "it is the last backup: without it nothing can be restored; take another one first (`craton backup run`)"
                .into(),
        ));
    }
    if gone.is_empty() {
        return Ok(SweptView::default());
    }
    let Some(_alone) = repository.removing()? else {
        return Err(BackupError::Refused(
            "somebody restores from the repository at this moment; ask again when that is done"
                .into(),
        ));
    };
    let mut bytes = 0;
    for id in &gone {
        bytes += repository.remove_manifest(id)?;
    }
    let kept = repository
        .backup_ids()?
        .iter()
        .map(|id| repository.manifest(id))
        .collect::<Result<Vec<_>>>()?;
    let segments: Vec<_> = repository.segments()?.into_keys().collect();
    let garbage = retention::garbage(
        &kept,
        &repository.packs()?,
        &segments,
        repository.segment_size(),
    );
    for pack in &garbage.packs {
        bytes += repository.remove_pack(*pack)?;
    }
    for segment in &garbage.segments {
        bytes += repository.remove_segment(*segment)?;
    }
    Ok(SweptView {
        backups: gone,
        segments: garbage.segments.len() as u64,
        bytes,
    })
}
