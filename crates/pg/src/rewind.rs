//! Bringing back a data directory whose WAL went another way, by pg_rewind.

use std::process::Stdio;

use crate::clone::run_watched;
use crate::config::Upstream;
use crate::error::{PgError, Result, RewindFailure};
use crate::files::{self, blocking};
use crate::instance::Instance;

/// How the session is called on the source.
const APPLICATION_NAME: &str = "craton_rewind";
/// pg_rewind says this right before it writes the first file (pg_rewind.c, `main`).
const WRITES_FROM_HERE: &str = "need to copy";

impl Instance {
    /// Rewinds the data directory of a stopped server to the source's history. Afterwards it must start as a
    /// standby. The source is best the leader, and must have written a checkpoint since its promotion
    /// ([`crate::Control::checkpoint`]): before it, pg_rewind of PostgreSQL 13 to 15 reads the old timeline
    /// there and finds nothing to do. A server that crashed is recovered first, by pg_rewind itself.
    ///
    /// If it is cut off while it writes, the directory is [`crate::DataDir::HalfRewind`] and only a clone
    /// helps; [`RewindFailure`] tells the other cases apart.
    /// Returns true if something was rewound, false if pg_rewind saw nothing to do.
    pub async fn rewind_from(&self, source: &Upstream) -> Result<bool> {
        if let Some(running) = self.adopt().await? {
            return Err(PgError::Running {
                pid: running.pid(),
                data: self.data_dir().to_owned(),
            });
        }
        let this = self.clone();
        blocking(move || {
            // The recovery of a crashed target runs in single-user mode, which refuses standby mode.
            files::remove_durably(&this.data_dir().join("standby.signal"))?;
            files::remove_durably(&this.data_dir().join("postmaster.pid"))?;
            files::write_durably(&this.rewind_marker(), b"")
        })
        .await?;
        let conninfo = Self::side_connection(source, APPLICATION_NAME, Some("postgres"));
        let mut command = tokio::process::Command::from(self.writing_tool("pg_rewind"));
        command
            .arg("--target-pgdata")
            .arg(self.data_dir())
            .arg(format!("--source-server={conninfo}"))
            .arg("--progress")
            .current_dir(self.member_dir())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let flushed_here = files::can_flush_file_systems();
        if flushed_here {
            command.arg("--no-sync");
        }
        if self.config().binaries.version().major >= 15 {
            command.arg(format!(
                "--config-file={}",
                self.conf_dir().join("postgresql.conf").display()
            ));
        }
        let mut wrote = false;
        let result = run_watched(command, "pg_rewind", |line| {
            wrote |= line.contains(WRITES_FROM_HERE);
            line.contains(" kB (")
        })
        .await;
        if result.is_ok() || !wrote {
            let this = self.clone();
            blocking(move || {
                if wrote && flushed_here {
                    files::flush_data_dir(this.data_dir())?;
                }
                files::remove_durably(&this.rewind_marker())
            })
            .await?;
        }
        match result {
            Ok(_) => Ok(wrote),
            Err(PgError::Tool { output, .. }) => Err(PgError::Rewind {
                kind: classify(&output, wrote),
                output,
            }),
            Err(e) => Err(e),
        }
    }
}

/// What its words mean. Once it wrote, nothing but a clone helps, whatever they are.
fn classify(output: &str, wrote: bool) -> RewindFailure {
    let says = |words: &[&str]| words.iter().any(|w| output.contains(w));
    if wrote {
        RewindFailure::Other
    } else if says(&["could not find common ancestor"]) {
        RewindFailure::NoCommonAncestor
    } else if says(&[
        "single-user mode in target cluster failed",
        "must be shut down cleanly",
    ]) {
        RewindFailure::TargetNeedsRecovery
    } else if says(&[
        "could not find previous WAL record",
        "could not read WAL record",
        "pg_wal/",
    ]) {
        RewindFailure::MissingWal
    } else if says(&[
        "connection to server",
        "could not connect",
        "server closed the connection",
    ]) {
        RewindFailure::SourceUnavailable
    } else {
        RewindFailure::Other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_told_apart() {
        let kind = |text| classify(text, false);
        assert_eq!(
            kind(
                "pg_rewind: error: could not find common ancestor of the source and target cluster's timelines"
            ),
            RewindFailure::NoCommonAncestor
        );
        assert_eq!(
            kind(
                "pg_rewind: error: could not open file \"/m/data/pg_wal/000000010000000000000003\": No such file or directory"
            ),
            RewindFailure::MissingWal
        );
        let down = "pg_rewind: error: connection to server at \"127.0.0.1\", port 1 failed: Connection refused";
        assert_eq!(kind(down), RewindFailure::SourceUnavailable);
        assert!(kind(down).worth_retrying());
        assert_eq!(
            classify(down, true),
            RewindFailure::Other,
            "a half-written target cannot be tried again"
        );
    }
}
