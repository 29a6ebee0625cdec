//! What can go wrong with one PostgreSQL, said so that an operator can act on it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Everything this crate reports. Each message names the place and, where there is one, the way out.
#[derive(Debug, thiserror::Error)]
pub enum PgError {
    /// No `postgres` binary was found.
    #[error(
        "no PostgreSQL server found in {searched}; install one: apt-get install postgresql-15 (or any of 13 to 18)"
    )]
    NoBinaries {
        /// Where was looked.
        searched: String,
    },
    /// The newest server found is too old.
    #[error("PostgreSQL {found} in {} is too old: 13 or newer is needed; install it: apt-get install postgresql-15", dir.display())]
    TooOld {
        /// Its version.
        found: String,
        /// Its directory.
        dir: PathBuf,
    },
    /// A file operation failed.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried, as "cannot write".
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A PostgreSQL program ended with an error.
    #[error("{tool} failed ({status}): {output}")]
    Tool {
        /// The program.
        tool: &'static str,
        /// Its exit status.
        status: String,
        /// The end of its standard error.
        output: String,
    },
    /// A program or a file said something that cannot be understood.
    #[error("cannot understand {what}: {detail}")]
    Unintelligible {
        /// The source.
        what: &'static str,
        /// What was found.
        detail: String,
    },
    /// A wait reached its bound.
    #[error("{what} took longer than {limit:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// The bound.
        limit: Duration,
    },
    /// The postmaster ended while something was expected of it.
    #[error("PostgreSQL ended ({reason}); the end of its log {}:\n{tail}", log.display())]
    Exited {
        /// How.
        reason: String,
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        tail: String,
    },
    /// A postmaster runs already.
    #[error("PostgreSQL already runs on {} (pid {pid})", data.display())]
    Running {
        /// Its pid.
        pid: i32,
        /// Its data directory.
        data: PathBuf,
    },
    /// The data directory is not in the state that the step needs.
    #[error("data directory {}: {reason}", path.display())]
    DataDir {
        /// Which.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// No connection to the server.
    #[error("cannot connect to PostgreSQL at {at}: {reason}")]
    Connect {
        /// Socket directory or address, with the port.
        at: String,
        /// Why.
        reason: String,
    },
    /// A control query failed.
    #[error("{what}: {message}{}", sqlstate.as_ref().map(|s| format!(" (SQLSTATE {s})")).unwrap_or_default())]
    Query {
        /// What was asked for.
        what: &'static str,
        /// PostgreSQL's words.
        message: String,
        /// PostgreSQL's code, where it came from the server.
        sqlstate: Option<String>,
    },
    /// pg_rewind cannot bring this data directory back; see the kind.
    #[error("pg_rewind: {kind}: {output}")]
    Rewind {
        /// What to do about it.
        kind: RewindFailure,
        /// The end of its output.
        output: String,
    },
    /// Processes outlive SIGKILL: they hang in the kernel, most often on storage.
    #[error(
        "processes {pids:?} of PostgreSQL did not die of SIGKILL within {limit:?}; is the storage hung?"
    )]
    Unkillable {
        /// Which.
        pids: Vec<i32>,
        /// How long was waited.
        limit: Duration,
    },
    /// Not enough free space.
    #[error("{} needs {needed} bytes, {available} are free", path.display())]
    DiskFull {
        /// Where.
        path: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        available: u64,
    },
    /// A value that cannot be used, for example in a configuration file.
    #[error("{what}: {reason}")]
    Invalid {
        /// The value's name.
        what: &'static str,
        /// Why not.
        reason: String,
    },
}

/// Why pg_rewind gave up, and so what may be tried next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RewindFailure {
    /// The WAL back to the fork is gone on the target or on the source: clone instead.
    #[error("WAL back to the fork is missing")]
    MissingWal,
    /// The histories have nothing in common: clone instead.
    #[error("no common ancestor")]
    NoCommonAncestor,
    /// The target was not shut down cleanly, and its crash recovery failed: clone instead.
    #[error("the target's crash recovery failed")]
    TargetNeedsRecovery,
    /// The source cannot be reached or refuses: try again.
    #[error("the source cannot be used now")]
    SourceUnavailable,
    /// Anything else: clone instead.
    #[error("failed")]
    Other,
}

impl RewindFailure {
    /// True when the same rewind may succeed later without a clone.
    pub fn worth_retrying(self) -> bool {
        self == Self::SourceUnavailable
    }
}

impl PgError {
    /// An `Io` with its place.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }

    /// The SQLSTATE of a failed control query.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Query { sqlstate, .. } => sqlstate.as_deref(),
            _ => None,
        }
    }
}

/// Shorthand.
pub type Result<T, E = PgError> = std::result::Result<T, E>;
