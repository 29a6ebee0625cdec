//! What the API says in JSON and the command line prints. Fields are only ever added.

use craton_core::{Lsn, TimelineId};
use craton_repo::continuity::Missing;
use craton_repo::manifest::{BackupId, Manifest, Summary, Tablespace};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// One backup in a list.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BackupView {
    /// Its name.
    pub id: BackupId,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended: a restore can stop at any time after this.
    pub ended_at: Timestamp,
    /// Which member it was read from.
    pub source: String,
    /// The timeline it ended on.
    pub timeline: TimelineId,
    /// Recovery starts here.
    pub start_lsn: Lsn,
    /// Recovery is consistent from here on.
    pub stop_lsn: Lsn,
    /// The size of its files in bytes.
    pub data_bytes: u64,
    /// What it added to the repository, in bytes.
    pub stored_bytes: u64,
    /// The server's version, as in `server_version_num`.
    pub server_version: u32,
}

impl From<&Summary> for BackupView {
    fn from(s: &Summary) -> Self {
        Self {
            id: s.id.clone(),
            started_at: timestamp(s.started_at_ms),
            ended_at: timestamp(s.ended_at_ms),
            source: s.source.clone(),
            timeline: s.stop_timeline,
            start_lsn: s.start_lsn,
            stop_lsn: s.stop_lsn,
            data_bytes: s.data_bytes,
            stored_bytes: s.stored_bytes,
            server_version: s.server_version,
        }
    }
}

/// All backups, oldest first.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BackupListView {
    /// The backups.
    pub backups: Vec<BackupView>,
    /// Manifests that cannot be read, and why.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// One backup and what can be restored from it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BackupDetailView {
    /// The backup.
    #[serde(flatten)]
    pub backup: BackupView,
    /// The server's `system_identifier`.
    pub system_id: u64,
    /// Files, directories and links.
    pub entries: u64,
    /// Different chunks.
    pub chunks: u64,
    /// Packs it reads from.
    pub packs: u64,
    /// Tablespaces outside the data directory.
    pub tablespaces: Vec<Tablespace>,
    /// A restore to the latest state ends on this timeline …
    pub latest_timeline: TimelineId,
    /// … at this position.
    pub restorable_to: Lsn,
    /// When WAL last came in for it.
    pub restorable_until: Option<Timestamp>,
    /// WAL that is missing after it; empty when everything up to the newest can be restored.
    pub missing_wal: Vec<Missing>,
}

impl BackupDetailView {
    pub(crate) fn counts(manifest: &Manifest) -> (u64, u64, u64) {
        (
            manifest.entries.len() as u64,
            manifest.chunks.len() as u64,
            manifest.packs.len() as u64,
        )
    }
}

/// A base backup that runs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ProgressView {
    /// The backup's name.
    pub id: BackupId,
    /// What it does now.
    pub phase: Phase,
    /// Which member it is read from.
    pub source: String,
    /// Bytes read so far.
    pub done_bytes: u64,
    /// Bytes in all, as the server estimated.
    pub total_bytes: u64,
    /// The part that is done, in percent.
    pub percent: u8,
}

/// What a base backup does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Waits for the server's checkpoint.
    Checkpoint,
    /// Reads files.
    Reading,
    /// Waits until the WAL that it needs is in the repository.
    WaitingForWal,
    /// Writes its manifest: from here on it is in the catalog, and its run ends at once.
    Ending,
}

/// How a base backup ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RunResultView {
    /// Which run, see [`RunsView::requested`].
    pub run: u64,
    /// The backup, when it succeeded.
    #[serde(default)]
    pub backup: Option<BackupView>,
    /// Why it failed, when it did.
    #[serde(default)]
    pub error: Option<String>,
}

/// The base backups that were asked for, by schedule or by hand.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RunsView {
    /// The number of the run begun last; runs are counted from 1 since the daemon started.
    pub requested: u64,
    /// When that was, milliseconds since 1970: another start counts anew.
    #[serde(default)]
    pub since_ms: u64,
    /// The one that runs.
    pub running: Option<ProgressView>,
    /// The one that ended last.
    pub last: Option<RunResultView>,
}

impl RunsView {
    /// A run has begun, if only to connect to its server, and has not ended.
    pub fn is_under_way(&self) -> bool {
        self.requested > self.last.as_ref().map_or(0, |l| l.run)
    }
}

/// The answer to a request for a backup.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RunAcceptedView {
    /// Its number; [`RunsView::last`] tells when it has ended.
    pub run: u64,
    /// See [`RunsView::since_ms`].
    #[serde(default)]
    pub since_ms: u64,
}

/// The answer to `GET /v1/backup/status`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BackupStatusView {
    /// The member that WAL is streamed from; none while it is not.
    pub streaming_from: Option<String>,
    /// Why it is not streamed.
    pub error: Option<String>,
    /// The timeline received.
    pub timeline: TimelineId,
    /// On stable storage up to here.
    pub flushed_lsn: Lsn,
    /// WAL that the leader has and the repository has not, in bytes.
    pub lag_bytes: u64,
    /// Base backups.
    pub runs: RunsView,
    /// How many backups there are.
    pub backups: u64,
    /// When the newest ended.
    pub newest_ended_at: Option<Timestamp>,
    /// WAL missing since the oldest backup.
    pub missing_wal: Vec<Missing>,
    /// The size of the repository in bytes.
    pub repository_bytes: u64,
    /// Every time within this many days can be restored to; 0: everything is kept.
    #[serde(default)]
    pub retention_days: u32,
}

/// What was removed from the repository.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SweptView {
    /// These backups.
    pub backups: Vec<BackupId>,
    /// WAL segments from before the oldest backup that is left.
    pub segments: u64,
    /// So much room is free again, in bytes.
    pub bytes: u64,
}

/// What a check of the whole repository found.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct VerifyView {
    /// Backups whose every chunk is there and unchanged.
    pub backups_good: u64,
    /// Chunks read and checked.
    pub chunks: u64,
    /// WAL segments read and checked.
    pub segments: u64,
    /// Everything that is wrong.
    pub problems: Vec<String>,
}

/// Milliseconds since 1970 as a time.
pub(crate) fn timestamp(ms: u64) -> Timestamp {
    i64::try_from(ms)
        .ok()
        .and_then(|ms| Timestamp::from_millisecond(ms).ok())
        .unwrap_or(Timestamp::UNIX_EPOCH)
}
