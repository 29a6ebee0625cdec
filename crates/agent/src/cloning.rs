//! Filling an empty data directory: from a member, or out of the backup repository, which loads nobody.
//!
//! Out of the repository: `craton restore` as a child process makes the directory; then PostgreSQL reads WAL from
//! the archive until there is no more, as a standby that follows nobody; then it is stopped, and starts
//! without the archive. It becomes a member only after that: a standby that could still read WAL from an
//! archive could not seal (failover protocol, 3.1).

use std::path::Path;
use std::time::Duration;

use craton_core::observe::MemberStatus;
use craton_core::{Lsn, MemberId, Term};
use craton_pg::{CloneProgress, DataDir, PgError, StartMode, StopMode, SyncNames};
use tokio::time::Instant;

use crate::act::{ActError, Actor, Members};

/// The archive is read to its end when nothing new was replayed for so long: PostgreSQL asks for the next
/// segment every 200 ms. While somebody writes and the archive follows at once, it has no end.
const ARCHIVE_QUIET: Duration = Duration::from_secs(3);
/// Reading the archive may take so long without a step forward; fetching one segment is a step.
const ARCHIVE_STALL_MAX: Duration = Duration::from_secs(300);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// A look.
const LOOK_MAX: Duration = Duration::from_secs(2);
/// Processes that survive SIGKILL for longer hang in the kernel; then it is sent again.
const KILL_MAX: Duration = Duration::from_secs(5);
/// Its end.
const STOP_MAX: Duration = Duration::from_secs(60);

/// What `craton status` shows of a copy.
pub(crate) fn in_words(doing: &str, progress: CloneProgress) -> String {
    let mib = |bytes: u64| bytes >> 20;
    match (progress.done_bytes * 100).checked_div(progress.total_bytes) {
        Some(percent) => format!(
            "{doing}: {} of {} MiB ({} %)",
            mib(progress.done_bytes),
            mib(progress.total_bytes),
            percent.min(100)
        ),
        None => doing.to_owned(),
    }
}

impl Actor {
    /// The new life begins before its first byte: nothing of the old one can be taken for it.
    async fn begin_life(&self, term: Term) -> Result<(), ActError> {
        self.reborn(term).await?;
        if matches!(
            self.server.instance.data_dir_state().await?,
            DataDir::HalfRewind
        ) {
            // Its divergent WAL was kept before pg_rewind began.
            self.server.instance.discard_data_dir().await?;
        }
        Ok(())
    }

    /// Copies another member.
    pub(crate) async fn clone_from(
        &self,
        from: &MemberId,
        term: Term,
        members: &Members,
    ) -> Result<(), ActError> {
        self.begin_life(term).await?;
        let mut source = self.upstream(from, members, "craton_replication")?;
        source.slot = None;
        tracing::info!(%from, "cloning");
        let made = self
            .server
            .instance
            .clone_from(&source, self.clone.max_rate_kb, self.progress.clone())
            .await;
        if let Err(error) = made {
            // The next try finds room for one. What the server says of its own disk is marked ERROR.
            let text = error.to_string();
            if text.contains("No space left on device") && !text.contains("ERROR:") {
                former_is_removed(self.server.instance.discard_former().await);
            }
            return Err(error.into());
        }
        self.server.data_changed();
        self.start_standby().await
    }

    /// The former copy goes when another has proven itself.
    pub(crate) async fn retire_former(&self) {
        former_is_removed(self.server.instance.retire_former().await);
    }

    /// Restores the newest backup, and replays the WAL that the archive has.
    pub(crate) async fn clone_from_repository(&self, term: Term) -> Result<(), ActError> {
        let Some(repository) = &self.clone.repository else {
            return Err(ActError::Stale("no repository is configured".into()));
        };
        self.begin_life(term).await?;
        let mut command = std::process::Command::new(&self.program);
        command
            .args(["restore", "--standby", "--repo"])
            .arg(repository)
            .args(["--age-max-h", &self.clone.age_max_h().to_string()]);
        tracing::info!(repository = %repository.display(), "cloning out of the backup repository");
        self.server
            .instance
            .clone_by(command, "craton restore", self.progress.clone())
            .await?;
        self.server.data_changed();
        let caught_up = self.read_archive(repository).await;
        if let Err(error) = caught_up {
            // Half of a copy would pass for a whole one; the next try takes another source.
            while !self.kill(KILL_MAX).await {}
            self.server.instance.discard_data_dir().await?;
            self.server.data_changed();
            return Err(error);
        }
        self.start_standby().await
    }

    /// The newest end of WAL that a member has told of.
    fn newest_of_peers(&self) -> Option<Lsn> {
        let presence = self.presence.borrow().clone();
        presence
            .iter()
            .filter(|(member, _)| **member != self.me)
            .filter_map(|(_, p)| serde_json::from_str::<MemberStatus>(&p.value).ok()?.lsn)
            .max()
    }

    /// Runs PostgreSQL as a standby that follows nobody and reads the archive, to the archive's end.
    async fn read_archive(&self, repository: &Path) -> Result<(), ActError> {
        let mut config = self.server.managed(None, SyncNames::Nobody);
        config.restore_command = Some(restore_command(&self.program, repository)?);
        self.server.instance.write_config(&config).await?;
        self.fencing.rest();
        let process = self.server.instance.start(StartMode::Standby).await?;
        self.server.hold(process.clone(), false);
        let mut newest = Lsn::ZERO;
        let mut moved = Instant::now();
        // What comes later is streamed: the slots of all members keep it.
        let enough = self.newest_of_peers();
        loop {
            if !process.is_running() {
                return Err(ActError::Stale(
                    "PostgreSQL ended while it read the archive; see pg.log in the member's directory".into(),
                ));
            }
            // Until it is consistent it does not answer.
            if let Ok(sample) = self.server.control.sample(LOOK_MAX).await {
                let replayed = sample.replay_lsn.unwrap_or(Lsn::ZERO);
                if enough.is_some_and(|lsn| replayed >= lsn) {
                    newest = replayed;
                    break;
                }
                if replayed > newest {
                    newest = replayed;
                    moved = Instant::now();
                } else if moved.elapsed() >= ARCHIVE_QUIET {
                    break;
                }
            } else if moved.elapsed() >= ARCHIVE_STALL_MAX {
                return Err(ActError::Stale(format!(
                    "the copy did not become consistent within {} s",
                    ARCHIVE_STALL_MAX.as_secs()
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
        tracing::info!(lsn = %newest, "the archive is read to its end");
        if process.stop(StopMode::Fast, STOP_MAX).await.is_err() {
            while !self.kill(KILL_MAX).await {}
        }
        Ok(())
    }
}

/// `restore_command` for the shell: quotes for it, and `%` doubled for PostgreSQL.
fn restore_command(program: &Path, repository: &Path) -> Result<String, ActError> {
    let quoted = |path: &Path| {
        let text = path.to_str().filter(|t| !t.chars().any(char::is_control));
        let text = text.ok_or_else(|| {
            ActError::Pg(PgError::Invalid {
                what: "path for restore_command",
                reason: format!("{} holds characters that it cannot", path.display()),
            })
        })?;
        Ok::<_, ActError>(format!(
            "'{}'",
            text.replace('\'', "'\\''").replace('%', "%%")
        ))
    };
    Ok(format!(
        "{} backup wal-fetch --repo {} %f %p",
        quoted(program)?,
        quoted(repository)?
    ))
}

/// What cannot be removed now costs room, and no clone.
fn former_is_removed(removed: craton_pg::Result<bool>) {
    match removed {
        Ok(true) => tracing::info!("what was here before the clone is removed"),
        Ok(false) => {}
        Err(error) => {
            tracing::warn!(%error, "what was here before the clone cannot be removed now");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_in_words() {
        let progress = CloneProgress {
            done_bytes: 30 << 20,
            total_bytes: 120 << 20,
        };
        assert_eq!(
            in_words("cloning from b", progress),
            "cloning from b: 30 of 120 MiB (25 %)"
        );
        assert_eq!(
            in_words("cloning from b", CloneProgress::default()),
            "cloning from b"
        );
    }

    #[test]
    fn the_command_survives_both_readers() {
        assert_eq!(
            restore_command(Path::new("/usr/bin/craton"), Path::new("/it's/50%")).unwrap(),
            r"'/usr/bin/craton' backup wal-fetch --repo '/it'\''s/50%%' %f %p"
        );
        assert!(restore_command(Path::new("/a"), Path::new("/a\nb")).is_err());
    }
}
