//! Restore: a backup and the WAL after it become a directory that PostgreSQL starts from.

mod plan;
mod settings;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use craton_core::{Lsn, TimelineId};
use craton_repo::manifest::BackupId;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::store::Repository;

pub use plan::{Plan, plan};
pub(crate) use settings::MINIMUM_SETTINGS;
pub use settings::{forget_recovery, forget_target_time};

/// Up to where WAL is replayed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// Everything there is.
    Latest,
    /// The last transaction that committed at or before this time.
    Time(Timestamp),
    /// This position.
    Lsn(Lsn),
    /// The end of the backup.
    Immediate,
}

/// WAL that a former leader had and the cluster has not; the member kept it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Divergence {
    /// The segments are here; an absolute path.
    pub directory: PathBuf,
    /// Their timeline.
    pub timeline: TimelineId,
    /// Where the cluster went another way.
    pub from: Lsn,
    /// Where the last record begins.
    pub until: Lsn,
}

/// How to restore.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// This backup; otherwise the newest that ended before the target.
    pub backup: Option<BackupId>,
    /// Where tablespaces go: from the location on the server to a new one. Those that are not named
    /// go where they were, provided that nothing is there.
    pub tablespaces: BTreeMap<String, PathBuf>,
    /// The `craton` program that PostgreSQL is to call for WAL; an absolute path.
    pub program: PathBuf,
    /// Follow this divergent WAL instead of the cluster's.
    pub divergence: Option<Divergence>,
    /// For a member of the cluster: no recovery settings are written, its agent starts it as a standby.
    pub standby: bool,
    /// The newest backup must have ended less than this long ago.
    pub age_max: Option<std::time::Duration>,
}

/// How far a restore is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Bytes written.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

/// What was restored.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RestoredView {
    /// From this backup.
    pub backup: BackupId,
    /// Into this directory.
    pub directory: PathBuf,
    /// Recovery follows this timeline.
    pub timeline: TimelineId,
    /// WAL is held up to here.
    pub wal_until: Lsn,
    /// Files written.
    pub files: u64,
    /// Bytes written.
    pub bytes: u64,
    /// The server's version, as in `server_version_num`: the same major version must start it.
    pub server_version: u32,
    /// What the operator should know besides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Restores into a directory that does not exist or is empty. Every byte is checked against its
/// hash. On failure nothing of it is left behind.
///
/// Started, PostgreSQL replays WAL through `craton backup wal-fetch` to the target and promotes
/// itself to a timeline of its own.
pub fn restore(
    repository: &Repository,
    directory: &Path,
    target: Target,
    options: &Options,
    progress: &mut dyn FnMut(Progress),
) -> Result<RestoredView> {
    // Retention must not take away what is being read.
    let _reading = repository.reading();
    let directory =
        std::path::absolute(directory).map_err(crate::BackupError::io("resolve", directory))?;
    let plan = match &options.divergence {
        Some(divergence) => plan::diverged(repository, divergence, options.backup.as_ref())?,
        None => plan(repository, target, options.backup.as_ref())?,
    };
    plan.check_age(options.age_max)?;
    let places = write::places(&directory, &plan.manifest, &options.tablespaces)?;
    let mut undo = write::Undo::default();
    let written = write::files(repository, &plan.manifest, &places, &mut undo, progress)?;
    settings::write(repository, &directory, &plan, options)?;
    write::sync(&places)?;
    undo.keep();
    Ok(RestoredView {
        backup: plan.manifest.summary.id.clone(),
        directory,
        timeline: plan.timeline,
        wal_until: plan.wal_until,
        files: written.files,
        bytes: written.bytes,
        server_version: plan.manifest.summary.server_version,
        note: plan.note,
    })
}
