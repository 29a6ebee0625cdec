//! One base backup: read from a server, stored, proved to have its WAL, and only then made to exist.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use craton_core::topology::TopologyMember;
use craton_core::{Lsn, TimelineId};
use craton_pg::replication::{BackupEvent, BaseBackup, ReplicationConnection, TablespaceInfo};
use craton_repo::continuity;
use craton_repo::layout;
use craton_repo::manifest::{BackupId, Manifest, Summary, Tablespace};
use craton_wire::replication::BaseBackupOptions;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use crate::error::{BackupError, Result};
use crate::ingest::{Contents, FEED_MESSAGES_MAX, Feed, ingest};
use crate::receiver::blocking;
use crate::restore::MINIMUM_SETTINGS;
use crate::shared::Shared;
use crate::store::{Repository, now_ms};
use crate::views::{Phase, ProgressView};

/// How long the WAL of a finished backup may take to arrive.
const WAL_WAIT_MAX: Duration = Duration::from_secs(600);
/// How often it is looked at while no news comes.
const WAL_LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Takes a base backup from `source`.
pub(crate) async fn take(shared: &Arc<Shared>, source: &TopologyMember) -> Result<Summary> {
    let repository = shared.repository.get().cloned().ok_or_else(|| {
        BackupError::Refused("no leader has been reached yet; a backup needs one".into())
    })?;
    let started_at_ms = now_ms();
    let id = free_id(&repository, started_at_ms)?;
    let config = &shared.config;
    let name = format!("{}_base", config.application_name);
    let login = config.login(shared.trust.as_ref(), source, &name)?;
    let mut connection = ReplicationConnection::connect(&login).await?;
    let identity = connection.identify_system().await?;
    if identity.system_id != repository.descriptor().system_id {
        return Err(BackupError::Refused(format!(
            "{} is database cluster {}, the repository belongs to {}",
            source.id,
            identity.system_id,
            repository.descriptor().system_id
        )));
    }
    let server_version = connection.server_version().await?;
    let mut minimum_settings = BTreeMap::new();
    for setting in MINIMUM_SETTINGS {
        minimum_settings.insert(setting.to_owned(), connection.show(setting).await?);
    }
    shared
        .runs
        .send_modify(|runs| runs.running = Some(progress(&id, source)));
    let options = BaseBackupOptions {
        label: format!("craton {id}"),
        fast_checkpoint: true,
        max_rate_kb: config.max_rate_kb,
        manifest: true,
    };
    tracing::info!(backup = %id, source = %source.id, "base backup begins");
    let backup = connection.base_backup(&options, server_version).await?;
    let (start_lsn, start_timeline) = (backup.start, backup.timeline);
    let tablespaces = backup.tablespaces.clone();
    let (contents, stop_lsn, stop_timeline) = read(shared, repository.clone(), backup).await?;
    let ended_at_ms = now_ms();
    publish(shared, |p| p.phase = Phase::WaitingForWal);
    wait_for_wal(shared, &repository, start_lsn, (stop_lsn, stop_timeline)).await?;
    let summary = Summary {
        id,
        system_id: identity.system_id,
        server_version,
        wal_segment_size: repository.segment_size(),
        source: source.id.to_string(),
        started_at_ms,
        ended_at_ms,
        start_lsn,
        start_timeline,
        stop_lsn,
        stop_timeline,
        data_bytes: contents.data_bytes,
        new_bytes: contents.new_bytes,
        stored_bytes: contents.stored_bytes,
        minimum_settings,
    };
    publish(shared, |p| p.phase = Phase::Ending);
    commit(repository, summary.clone(), contents, &tablespaces).await?;
    Ok(summary)
}

/// The name of a backup that begins now.
fn free_id(repository: &Repository, now_ms: u64) -> Result<BackupId> {
    let stamp = crate::views::timestamp(now_ms)
        .strftime("%Y%m%dT%H%M%SZ")
        .to_string();
    let taken = repository.backup_ids()?;
    (1..=1000_u32)
        .map(|n| {
            if n == 1 {
                stamp.clone()
            } else {
                format!("{stamp}-{n}")
            }
        })
        .filter_map(|name| BackupId::new(name).ok())
        .find(|id| !taken.contains(id))
        .ok_or_else(|| BackupError::Refused("a thousand backups began in this second".into()))
}

fn progress(id: &BackupId, source: &TopologyMember) -> ProgressView {
    ProgressView {
        id: id.clone(),
        phase: Phase::Checkpoint,
        source: source.id.to_string(),
        done_bytes: 0,
        total_bytes: 0,
        percent: 0,
    }
}

fn publish(shared: &Shared, change: impl FnOnce(&mut ProgressView)) {
    shared.runs.send_modify(|runs| {
        if let Some(running) = &mut runs.running {
            change(running);
        }
    });
}

async fn read(
    shared: &Arc<Shared>,
    repository: Repository,
    mut backup: BaseBackup,
) -> Result<(Contents, Lsn, TimelineId)> {
    let total: u64 = backup.tablespaces.iter().map(|t| t.size_bytes).sum();
    publish(shared, |p| {
        (p.phase, p.total_bytes) = (Phase::Reading, total);
    });
    let (feed, receive) = mpsc::channel(FEED_MESSAGES_MAX);
    let writer = tokio::task::spawn_blocking(move || ingest(repository, receive));
    let mut done: u64 = 0;
    // When the writer has given up, sending fails, and the writer's own error is the one that counts.
    let end = loop {
        let part = match backup.next().await? {
            BackupEvent::Archive(tablespace) => Feed::Archive(tablespace),
            BackupEvent::Manifest => Feed::Manifest,
            BackupEvent::Data(data) => {
                done += data.len() as u64;
                let percent = done
                    .saturating_mul(100)
                    .checked_div(total)
                    .unwrap_or(0)
                    .min(99);
                publish(shared, |p| {
                    p.done_bytes = done;
                    p.percent = u8::try_from(percent).unwrap_or(99);
                });
                Feed::Data(data)
            }
            BackupEvent::Progress(_) => continue,
            BackupEvent::End(lsn, timeline) => {
                break feed
                    .send(Feed::End)
                    .await
                    .is_ok()
                    .then_some((lsn, timeline));
            }
        };
        if feed.send(part).await.is_err() {
            break None;
        }
    };
    drop(feed);
    let contents = writer.await.unwrap_or_else(|e| {
        Err(BackupError::Interrupted(format!(
            "storing the backup was broken off: {e}"
        )))
    })?;
    let (lsn, timeline) =
        end.ok_or_else(|| BackupError::Interrupted("the base backup did not end".into()))?;
    Ok((contents, lsn, timeline))
}

/// Waits until everything that recovery from this backup must replay is in the repository.
async fn wait_for_wal(
    shared: &Arc<Shared>,
    repository: &Repository,
    start: Lsn,
    (stop, timeline): (Lsn, TimelineId),
) -> Result<()> {
    let deadline = Instant::now() + WAL_WAIT_MAX;
    let mut news = shared.streaming.subscribe();
    loop {
        let look = repository.clone();
        let coverage = blocking(move || {
            let history = look.history(timeline)?;
            Ok(continuity::prove(
                &look.inventory()?,
                &history,
                look.segment_size(),
                start,
                Some(stop),
            ))
        })
        .await?;
        let Some(missing) = coverage.missing.first() else {
            return Ok(());
        };
        if Instant::now() >= deadline {
            return Err(BackupError::Interrupted(format!(
                "the backup needs WAL from {start} to {stop}, but from {} to {} it did not arrive within {} s; \
                 see whether the WAL stream runs (`craton backup list`), then run the backup again",
                missing.from,
                missing.to,
                WAL_WAIT_MAX.as_secs()
            )));
        }
        // Either is a reason to look again.
        let _ = timeout(WAL_LOOK_INTERVAL, news.changed()).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn commit(
    repository: Repository,
    summary: Summary,
    contents: Contents,
    tablespaces: &[TablespaceInfo],
) -> Result<()> {
    let tablespaces = tablespaces
        .iter()
        .filter_map(|t| {
            t.oid.map(|oid| Tablespace {
                oid,
                location: t.location.clone(),
            })
        })
        .collect();
    blocking(move || {
        let relative = layout::manifest(&summary.id);
        let manifest = Manifest {
            summary,
            tablespaces,
            packs: contents.packs,
            chunks: contents.chunks,
            entries: contents.entries,
        };
        let bytes = manifest
            .encode()
            .map_err(BackupError::format(&repository.path(&relative)))?;
        // What a restore would refuse must not become a backup.
        Manifest::decode(&bytes).map_err(BackupError::format(&repository.path(&relative)))?;
        repository.write(&relative, &bytes)
    })
    .await
}
