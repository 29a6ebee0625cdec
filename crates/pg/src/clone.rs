//! A new data directory from a running server, by pg_basebackup.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::watch;

use crate::config::Upstream;
use crate::control_data::ControlData;
use crate::error::{PgError, Result};
use crate::files::{self, blocking};
use crate::instance::{Instance, last_lines};

/// How the clone's sessions are called on the upstream; never a member's name, see `side_connection`.
pub const APPLICATION_NAME: &str = "craton_clone";
/// The most of a tool's messages that is kept, in bytes.
const OUTPUT_BYTES_MAX: usize = 64 << 10;
/// pg_basebackup reports about once a second; this long without a word means that it hangs.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// How long what an earlier clone left at work may take to die.
const STRAYS_LIMIT: Duration = Duration::from_secs(10);
/// How often a removal is tried: for ten seconds.
const REMOVALS_MAX: u32 = 200;
/// How long until it is tried again.
const REMOVAL_PAUSE: Duration = Duration::from_millis(50);

/// How far a clone is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct CloneProgress {
    /// Bytes copied.
    pub done_bytes: u64,
    /// Bytes to copy, as the source estimated; 0 until known.
    pub total_bytes: u64,
}

impl CloneProgress {
    /// Reads pg_basebackup's `12345/67890 kB (18%), 0/1 tablespace`.
    fn parse(line: &str) -> Option<Self> {
        let (numbers, _) = line.split_once(" kB")?;
        let (done, total) = numbers.trim().split_once('/')?;
        let bytes = |s: &str| s.parse::<u64>().ok().map(|k| k.saturating_mul(1024));
        Some(Self {
            done_bytes: bytes(done)?,
            total_bytes: bytes(total)?,
        })
    }
}

impl Instance {
    /// Clones the upstream, a primary or a standby, into the empty data directory. The clone is made beside,
    /// flushed, and renamed into place when complete. Dropping the future ends it; what it
    /// left is removed by the next try. `max_rate_kb`: kilobytes a second at most, 32 to 1048576.
    pub async fn clone_from(
        &self,
        upstream: &Upstream,
        max_rate_kb: Option<u32>,
        progress: watch::Sender<CloneProgress>,
    ) -> Result<ControlData> {
        let making = self.place_for_clone().await?;
        let mut command = self.base_backup(upstream, &making);
        if let Some(rate) = max_rate_kb {
            command.arg(format!("--max-rate={rate}k"));
        }
        self.clone_with(command, "pg_basebackup", making, progress)
            .await
    }

    /// pg_basebackup from there into the directory `making`, for [`Self::clone_with`].
    pub(crate) fn base_backup(
        &self,
        upstream: &Upstream,
        making: &Path,
    ) -> tokio::process::Command {
        let conninfo = Self::side_connection(upstream, APPLICATION_NAME, None);
        let mut command = tokio::process::Command::from(self.writing_tool("pg_basebackup"));
        command
            .arg("-D")
            .arg(making)
            .args(["-d", &conninfo])
            .args(["-X", "stream", "-c", "fast", "--progress", "--no-password"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        if files::can_flush_file_systems() {
            command.arg("--no-sync");
        }
        command
    }

    /// Copies a data directory with another program, for example out of a backup repository: `command` gets the
    /// directory to make as its last argument, and tells its progress on standard error as pg_basebackup does.
    pub async fn clone_by(
        &self,
        mut command: std::process::Command,
        tool: &'static str,
        progress: watch::Sender<CloneProgress>,
    ) -> Result<ControlData> {
        let making = self.place_for_clone().await?;
        command.arg(&making);
        self.mark(&mut command);
        let mut command = tokio::process::Command::from(command);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        self.clone_with(command, tool, making, progress).await
    }

    /// The directory in which a clone is made, empty. The process in which the pg_basebackup of a clone that was cut off
    /// received WAL outlives it for a moment: in the next one's directory it would be at odds with that one's own.
    pub(crate) async fn place_for_clone(&self) -> Result<PathBuf> {
        self.kill_stray_tools(STRAYS_LIMIT).await?;
        let making = self.member_dir().join("data.clone");
        let (this, place) = (self.clone(), making.clone());
        blocking(move || {
            this.check_data_dir_is_free()?;
            remove_unfinished(&place)
        })
        .await?;
        Ok(making)
    }

    pub(crate) async fn clone_with(
        &self,
        command: tokio::process::Command,
        tool: &'static str,
        making: PathBuf,
        progress: watch::Sender<CloneProgress>,
    ) -> Result<ControlData> {
        progress.send_replace(CloneProgress::default());
        let result = run_watched(command, tool, |line| {
            if let Some(now) = CloneProgress::parse(line) {
                progress.send_replace(now);
                return true;
            }
            false
        })
        .await;
        let this = self.clone();
        blocking(move || {
            if let Err(e) = result {
                remove_unfinished(&making)?;
                return Err(e);
            }
            if files::can_flush_file_systems() {
                files::flush_data_dir(&making)?;
            }
            this.move_into_place(&making)?;
            this.read_control_data()
        })
        .await
    }
}

/// Removes what a clone left. The process in which a killed pg_basebackup received WAL outlives it for a moment, and may
/// put another file into a directory that has just been emptied.
fn remove_unfinished(place: &Path) -> Result<()> {
    for _ in 1..REMOVALS_MAX {
        match files::remove_tree(place) {
            Err(PgError::Io { source, .. })
                if source.kind() == io::ErrorKind::DirectoryNotEmpty =>
            {
                std::thread::sleep(REMOVAL_PAUSE);
            }
            done => return done,
        }
    }
    files::remove_tree(place)
}

/// Runs a tool to its end, handing each line of its standard error to `is_progress`, and keeps those that
/// are not progress, for the error message and as the result.
pub(crate) async fn run_watched(
    mut command: tokio::process::Command,
    tool: &'static str,
    mut is_progress: impl FnMut(&str) -> bool,
) -> Result<String> {
    let mut child = command
        .spawn()
        .map_err(PgError::io("cannot run", Path::new(tool)))?;
    let mut kept = String::new();
    if let Some(stderr) = child.stderr.take() {
        each_line(stderr, |line| {
            if !is_progress(line) && kept.len() + line.len() < OUTPUT_BYTES_MAX {
                kept.push_str(line);
                kept.push('\n');
            }
        })
        .await?;
    }
    let status = tokio::time::timeout(SILENCE_MAX, child.wait())
        .await
        .map_err(|_| PgError::Timeout {
            what: "the end of a PostgreSQL tool",
            limit: SILENCE_MAX,
        })?
        .map_err(PgError::io("cannot wait for", Path::new(tool)))?;
    if status.success() {
        return Ok(kept);
    }
    Err(PgError::Tool {
        tool,
        status: status.to_string(),
        output: last_lines(&kept),
    })
}

/// Splits at newlines and carriage returns.
async fn each_line(mut from: impl AsyncRead + Unpin, mut handle: impl FnMut(&str)) -> Result<()> {
    const LINE_BYTES_MAX: usize = 8 << 10;
    let mut line = Vec::new();
    let mut buffer = vec![0_u8; 8 << 10];
    loop {
        let read = tokio::time::timeout(SILENCE_MAX, from.read(&mut buffer))
            .await
            .map_err(|_| PgError::Timeout {
                what: "a word from a PostgreSQL tool",
                limit: SILENCE_MAX,
            })?
            .map_err(PgError::io(
                "cannot read the output of",
                Path::new("a tool"),
            ))?;
        for byte in buffer.get(..read).unwrap_or_default() {
            if matches!(byte, b'\n' | b'\r') || line.len() >= LINE_BYTES_MAX {
                if !line.is_empty() {
                    handle(&String::from_utf8_lossy(&line));
                    line.clear();
                }
            } else {
                line.push(*byte);
            }
        }
        if read == 0 {
            if !line.is_empty() {
                handle(&String::from_utf8_lossy(&line));
            }
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_lines() {
        let parse = |s| CloneProgress::parse(s).map(|p| (p.done_bytes, p.total_bytes));
        assert_eq!(
            parse("  100/2000 kB (5%), 0/1 tablespace"),
            Some((102_400, 2_048_000))
        );
        assert_eq!(parse("waiting for checkpoint"), None);
    }

    #[test]
    fn a_directory_that_is_still_written_to_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("data.clone");
        std::fs::create_dir(&place).unwrap();
        let writes_to = place.clone();
        let writer = std::thread::spawn(move || {
            // Until the directory is gone.
            (0..10_000).all(|n| std::fs::write(writes_to.join(format!("{n}")), "").is_ok());
        });
        while files::is_empty_dir(&place).unwrap() && !writer.is_finished() {
            std::thread::yield_now();
        }
        remove_unfinished(&place).unwrap();
        writer.join().unwrap();
        assert!(!place.exists());
    }
}
