//! `BASE_BACKUP`: a stream of tar archives, one for the data directory and one per tablespace.

use std::time::Duration;

use bytes::Bytes;
use craton_core::{Lsn, TimelineId};
use craton_wire::replication::{BackupMessage, BaseBackupOptions, parse_report};
use tokio::time::timeout;

use super::connection::unexpected;
use super::{ReplicationConnection, ReplicationError, Row, number, position};

/// How long the server may take for the checkpoint at the start (a spread one takes most of
/// `checkpoint_timeout`, whose maximum is a day; nobody waits for that).
pub const CHECKPOINT_TIMEOUT: Duration = Duration::from_secs(3600);
/// How long the server may send nothing while a backup runs (a throttled one sends every second).
pub const STALL_TIMEOUT: Duration = Duration::from_secs(300);

/// A tablespace as the server announces it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TablespaceInfo {
    /// Its number; none for the data directory.
    pub oid: Option<u32>,
    /// Where it lies on the server; empty for the data directory.
    pub location: String,
    /// Its approximate size in bytes, as the server estimates it.
    pub size_bytes: u64,
}

/// What a base backup brings, in this order: an archive and its data, the next one, …, the manifest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BackupEvent {
    /// The archive of this tablespace begins.
    Archive(TablespaceInfo),
    /// The backup manifest begins.
    Manifest,
    /// Bytes of what began last.
    Data(Bytes),
    /// So many bytes of the archive have been read by the server.
    Progress(u64),
    /// Everything was sent: recovery must reach this position of this timeline.
    End(Lsn, TimelineId),
}

/// A running base backup.
#[derive(Debug)]
pub struct BaseBackup {
    connection: ReplicationConnection,
    /// Where recovery starts.
    pub start: Lsn,
    /// The timeline of the start.
    pub timeline: TimelineId,
    /// All tablespaces, the data directory (without a number) among them.
    pub tablespaces: Vec<TablespaceInfo>,
    /// Version 15 and later: one stream in which messages say what begins.
    one_stream: bool,
    streams_begun: usize,
}

impl ReplicationConnection {
    /// Starts a base backup.
    pub async fn base_backup(
        mut self,
        options: &BaseBackupOptions,
        server_version: u32,
    ) -> Result<BaseBackup, ReplicationError> {
        self.send_query(&options.command(server_version)).await?;
        let start = timeout(CHECKPOINT_TIMEOUT, self.result())
            .await
            .map_err(|_| ReplicationError::Timeout {
                what: "checkpoint",
                limit: CHECKPOINT_TIMEOUT,
            })??;
        let row = start
            .first()
            .ok_or_else(|| ReplicationError::protocol("BASE_BACKUP gave no start"))?;
        let (start, timeline) = (position(row, 0)?, TimelineId(number(row, 1, "timeline")?));
        let tablespaces = self
            .result()
            .await?
            .iter()
            .map(tablespace)
            .collect::<Result<_, _>>()?;
        let one_stream = server_version >= 150_000;
        Ok(BaseBackup {
            connection: self,
            start,
            timeline,
            tablespaces,
            one_stream,
            streams_begun: 0,
        })
    }
}

fn tablespace(row: &Row) -> Result<TablespaceInfo, ReplicationError> {
    let oid = match row.first() {
        Some(Some(_)) => Some(number(row, 0, "tablespace")?),
        _ => None,
    };
    let location = row.get(1).cloned().flatten().unwrap_or_default();
    // In kB; null unless PROGRESS was asked for.
    let size_kb: u64 = match row.get(2) {
        Some(Some(_)) => number(row, 2, "size")?,
        _ => 0,
    };
    Ok(TablespaceInfo {
        oid,
        location,
        size_bytes: size_kb.saturating_mul(1024),
    })
}

impl BaseBackup {
    /// The next event.
    pub async fn next(&mut self) -> Result<BackupEvent, ReplicationError> {
        timeout(STALL_TIMEOUT, self.next_unbounded())
            .await
            .unwrap_or(Err(ReplicationError::Timeout {
                what: "data of the base backup",
                limit: STALL_TIMEOUT,
            }))
    }

    async fn next_unbounded(&mut self) -> Result<BackupEvent, ReplicationError> {
        loop {
            let frame = self.connection.frame().await?;
            match frame.tag {
                b'H' if self.one_stream => {}
                b'H' => return Ok(self.next_stream()),
                b'd' if self.one_stream => return self.message(&frame.body),
                b'd' => return Ok(BackupEvent::Data(frame.body)),
                b'c' => {}
                b'T' => return self.end().await,
                b'E' => return Err(ReplicationError::Server(parse_report(&frame.body))),
                tag => return Err(unexpected(tag, "a base backup")),
            }
        }
    }

    /// Before version 15: streams come in the order of the announced tablespaces, then the manifest.
    fn next_stream(&mut self) -> BackupEvent {
        let number = self.streams_begun;
        self.streams_begun += 1;
        self.tablespaces
            .get(number)
            .cloned()
            .map_or(BackupEvent::Manifest, BackupEvent::Archive)
    }

    fn message(&self, body: &Bytes) -> Result<BackupEvent, ReplicationError> {
        Ok(match BackupMessage::parse(body)? {
            BackupMessage::Archive { name, .. } => BackupEvent::Archive(self.announced(name)?),
            BackupMessage::Manifest => BackupEvent::Manifest,
            BackupMessage::Data(data) => BackupEvent::Data(body.slice_ref(data)),
            BackupMessage::Progress(bytes) => BackupEvent::Progress(bytes),
        })
    }

    /// The tablespace of an archive named `base.tar` or `<oid>.tar`.
    fn announced(&self, archive: &str) -> Result<TablespaceInfo, ReplicationError> {
        let stem = archive.strip_suffix(".tar").unwrap_or(archive);
        let oid = if stem == "base" {
            None
        } else {
            stem.parse().ok()
        };
        self.tablespaces
            .iter()
            .find(|t| t.oid == oid && (oid.is_some() || stem == "base"))
            .cloned()
            .ok_or_else(|| {
                ReplicationError::Protocol(format!("an archive that was not announced: {archive}"))
            })
    }

    async fn end(&mut self) -> Result<BackupEvent, ReplicationError> {
        let rows = self.connection.until_ready(STALL_TIMEOUT).await?;
        let row = rows
            .first()
            .ok_or_else(|| ReplicationError::protocol("BASE_BACKUP gave no end"))?;
        Ok(BackupEvent::End(
            position(row, 0)?,
            TimelineId(number(row, 1, "timeline")?),
        ))
    }
}
