//! A client of the streaming replication protocol: physical WAL streams and base backups.
//!
//! tokio-postgres has neither CopyBoth nor `replication=true`, and the flush position that is
//! reported here is what the promise of a backup rests on, so this is ours. What the bytes mean is
//! [`craton_wire::replication`]; this module moves them.

mod base_backup;
mod connection;
mod wal_stream;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use craton_core::{Lsn, TimelineId};
use craton_trust::{Expect, Trust};
use craton_wire::replication::{MalformedMessage, ServerReport, quote_identifier};

pub use base_backup::{BackupEvent, BaseBackup, TablespaceInfo};
pub use connection::ReplicationConnection;
pub use wal_stream::{Started, WalEvent, WalStream};

/// The longest message that is believed, in bytes. WAL comes in messages of at most 128 KiB.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;
/// How long a command may take to be answered. The checkpoint of a base backup has its own bound.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// Where a server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ServerAddress {
    /// Host name or address, and port.
    Tcp(String, u16),
    /// The directory of the Unix socket, and the port in its name.
    Unix(PathBuf, u16),
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
            Self::Unix(dir, port) => write!(f, "{}/.s.PGSQL.{port}", dir.display()),
        }
    }
}

/// How to log in.
#[derive(Clone)]
pub struct ReplicationLogin {
    /// Where to.
    pub address: ServerAddress,
    /// The role; it needs the attribute REPLICATION.
    pub user: String,
    /// Its password; none where the server asks for none.
    pub password: Option<String>,
    /// Shown in `pg_stat_replication`, and matched by `synchronous_standby_names`.
    pub application_name: String,
    /// How long connecting and logging in may take together.
    pub timeout: Duration,
    /// Over TCP: the certificate that is shown, and whom the server's must name. Without, nothing is encrypted
    /// (isolated tests).
    pub tls: Option<(Arc<Trust>, Expect)>,
}

/// The password stays out of logs.
impl fmt::Debug for ReplicationLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplicationLogin")
            .field("address", &self.address)
            .field("user", &self.user)
            .field("application_name", &self.application_name)
            .finish_non_exhaustive()
    }
}

/// Why replication failed.
#[derive(Debug, thiserror::Error)]
pub enum ReplicationError {
    /// No connection.
    #[error("cannot connect to PostgreSQL at {address}: {source}")]
    Connect {
        /// Where.
        address: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The two ends do not trust each other.
    #[error("no trusted connection to PostgreSQL at {address}: {source}")]
    Untrusted {
        /// Where.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// A broken connection.
    #[error("the connection to PostgreSQL broke: {0}")]
    Io(#[from] std::io::Error),
    /// The server hung up.
    #[error("PostgreSQL closed the connection")]
    Closed,
    /// An answer did not come.
    #[error("PostgreSQL did not answer within {limit:?} ({what})")]
    Timeout {
        /// What was asked.
        what: &'static str,
        /// The bound.
        limit: Duration,
    },
    /// The server refused.
    #[error("{}", describe(.0))]
    Server(ServerReport),
    /// The server wants a login that is not possible.
    #[error("cannot log in: {0}")]
    Login(String),
    /// Bytes that are not the protocol.
    #[error("{0}")]
    Protocol(String),
}

impl From<MalformedMessage> for ReplicationError {
    fn from(e: MalformedMessage) -> Self {
        Self::Protocol(e.to_string())
    }
}

impl ReplicationError {
    /// The server's SQLSTATE, when it was the server that refused.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Server(report) => Some(&report.code),
            _ => None,
        }
    }

    /// True when the WAL asked for has been removed from that server (`undefined_file`).
    pub fn is_wal_removed(&self) -> bool {
        self.sqlstate() == Some("58P01")
    }

    pub(crate) fn protocol(text: impl Into<String>) -> Self {
        Self::Protocol(text.into())
    }
}

fn describe(report: &ServerReport) -> String {
    let mut text = format!("PostgreSQL: {} ({})", report.message, report.code);
    for (name, extra) in [("detail", &report.detail), ("hint", &report.hint)] {
        if let Some(extra) = extra {
            text.push_str("; ");
            text.push_str(name);
            text.push_str(": ");
            text.push_str(extra);
        }
    }
    text
}

/// The answer to `IDENTIFY_SYSTEM`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SystemIdentity {
    /// `system_identifier`.
    pub system_id: u64,
    /// The server's timeline.
    pub timeline: TimelineId,
    /// The end of its flushed (on a standby: received) WAL.
    pub flushed: Lsn,
}

/// A physical slot as `READ_REPLICATION_SLOT` tells it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PhysicalSlot {
    /// WAL from here on is kept; none before its first use.
    pub restart: Option<(Lsn, TimelineId)>,
}

impl ReplicationConnection {
    /// `IDENTIFY_SYSTEM`.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity, ReplicationError> {
        let rows = self.query("IDENTIFY_SYSTEM").await?;
        let row = rows
            .first()
            .ok_or_else(|| ReplicationError::protocol("IDENTIFY_SYSTEM gave no row"))?;
        Ok(SystemIdentity {
            system_id: number(row, 0, "system identifier")?,
            timeline: TimelineId(number(row, 1, "timeline")?),
            flushed: position(row, 2)?,
        })
    }

    /// The value of a setting.
    pub async fn show(&mut self, setting: &'static str) -> Result<String, ReplicationError> {
        let rows = self.query(&format!("SHOW {setting}")).await?;
        rows.into_iter()
            .next()
            .and_then(|row| row.into_iter().next().flatten())
            .ok_or_else(|| ReplicationError::Protocol(format!("SHOW {setting} gave no value")))
    }

    /// `server_version_num`, for example 150010.
    pub async fn server_version(&mut self) -> Result<u32, ReplicationError> {
        let text = self.show("server_version_num").await?;
        text.parse()
            .map_err(|_| ReplicationError::Protocol(format!("\"{text}\" is not a version")))
    }

    /// `wal_segment_size` in bytes.
    pub async fn wal_segment_size(&mut self) -> Result<u64, ReplicationError> {
        let text = self.show("wal_segment_size").await?;
        parse_size(&text)
            .ok_or_else(|| ReplicationError::Protocol(format!("\"{text}\" is not a size")))
    }

    /// The content of a timeline's history file.
    pub async fn timeline_history(
        &mut self,
        timeline: TimelineId,
    ) -> Result<String, ReplicationError> {
        let rows = self.query(&format!("TIMELINE_HISTORY {timeline}")).await?;
        rows.into_iter()
            .next()
            .and_then(|row| row.into_iter().nth(1).flatten())
            .ok_or_else(|| ReplicationError::protocol("TIMELINE_HISTORY gave no content"))
    }

    /// Creates a physical slot that keeps WAL from now on; true when it was not there before.
    pub async fn ensure_physical_slot(&mut self, name: &str) -> Result<bool, ReplicationError> {
        // This form is understood by all versions from 13 to 18.
        let command = format!(
            "CREATE_REPLICATION_SLOT {} PHYSICAL RESERVE_WAL",
            quote_identifier(name)
        );
        match self.query(&command).await {
            Ok(_) => Ok(true),
            Err(e) if e.sqlstate() == Some("42710") => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// A slot's position; none when there is no such slot, or the server (before 15) cannot tell.
    pub async fn read_slot(
        &mut self,
        name: &str,
    ) -> Result<Option<PhysicalSlot>, ReplicationError> {
        let rows = match self
            .query(&format!("READ_REPLICATION_SLOT {}", quote_identifier(name)))
            .await
        {
            Ok(rows) => rows,
            Err(e) if e.sqlstate() == Some("42601") => return Ok(None),
            Err(e) => return Err(e),
        };
        let Some(row) = rows
            .first()
            .filter(|row| matches!(row.first(), Some(Some(_))))
        else {
            return Ok(None);
        };
        if !matches!(row.get(1), Some(Some(_))) {
            return Ok(Some(PhysicalSlot { restart: None }));
        }
        Ok(Some(PhysicalSlot {
            restart: Some((position(row, 1)?, TimelineId(number(row, 2, "timeline")?))),
        }))
    }
}

/// A row of texts.
pub(crate) type Row = Vec<Option<String>>;

pub(crate) fn number<T: std::str::FromStr>(
    row: &Row,
    column: usize,
    what: &'static str,
) -> Result<T, ReplicationError> {
    row.get(column)
        .and_then(|c| c.as_ref())
        .and_then(|c| c.parse().ok())
        .ok_or_else(|| ReplicationError::Protocol(format!("the server gave no usable {what}")))
}

pub(crate) fn position(row: &Row, column: usize) -> Result<Lsn, ReplicationError> {
    number(row, column, "WAL position")
}

/// Reads a size as `SHOW` prints it: a number and `B`, `kB`, `MB`, `GB`.
fn parse_size(text: &str) -> Option<u64> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let factor = match unit {
        "B" | "" => 1,
        "kB" => 1 << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_show_prints_them() {
        assert_eq!(parse_size("16MB"), Some(16 << 20));
        assert_eq!(parse_size("1GB"), Some(1 << 30));
        assert_eq!(parse_size("8192"), Some(8192));
        assert_eq!(parse_size("x"), None);
        assert_eq!(parse_size("5TB"), None);
    }

    #[test]
    fn passwords_are_not_printed() {
        let login = ReplicationLogin {
            address: ServerAddress::Tcp("localhost".into(), 1),
            user: "u".into(),
            password: Some("hidden".into()),
            application_name: "a".into(),
            timeout: COMMAND_TIMEOUT,
            tls: None,
        };
        assert!(!format!("{login:?}").contains("hidden"));
    }
}
