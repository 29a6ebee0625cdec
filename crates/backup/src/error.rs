//! What can go wrong with backups, said so that an operator can act on it.

use std::io;
use std::path::{Path, PathBuf};

use craton_pg::replication::ReplicationError;
use craton_repo::FormatError;

/// Everything this crate reports.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// A file operation failed.
    #[error("cannot {what} {}: {source}{}", path.display(), space_hint(source))]
    Io {
        /// What was tried, as "write".
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file of the repository cannot be believed.
    #[error("{}: {source}", path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: FormatError,
    },
    /// The replication connection failed.
    #[error(transparent)]
    Replication(#[from] ReplicationError),
    /// The agents' feed or the HTTP side cannot start.
    #[error("{0}")]
    Config(String),
    /// A request that cannot be fulfilled, and what to do instead.
    #[error("{0}")]
    Refused(String),
    /// A base backup or restore that was given up.
    #[error("{0}")]
    Interrupted(String),
}

/// This crate's results.
pub type Result<T> = std::result::Result<T, BackupError>;

impl BackupError {
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }

    pub(crate) fn format(path: &Path) -> impl FnOnce(FormatError) -> Self {
        let path = path.to_owned();
        move |source| Self::Format { path, source }
    }

    /// True when a server said that it has removed the WAL that was asked for.
    pub(crate) fn is_wal_removed(&self) -> bool {
        matches!(self, Self::Replication(e) if e.is_wal_removed())
    }

    /// True when a file simply is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

fn space_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space there, it goes on by itself"
        }
        io::ErrorKind::PermissionDenied => "; check who owns it and who runs this",
        _ => "",
    }
}
