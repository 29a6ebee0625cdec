//! Data directories that were made elsewhere: a restore that is brought to its end, and a database that a new cluster
//! begins with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::time::Instant;

use crate::binaries::Binaries;
use crate::control_data::{ClusterState, ControlData};
use crate::error::{PgError, Result};
use crate::files::{self, blocking};
use crate::instance::{Instance, last_lines, run_tool};
use crate::processes;

/// How often a recovery is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// A server that is alive has written its postmaster.pid by then.
const START_MAX: Duration = Duration::from_secs(15);
/// A server that recovered may write so much at its stop that this is needed.
const STOP_SECONDS: &str = "3600";
/// Present until recovery has ended (xlogrecovery.c).
const RECOVERY_SIGNAL: &str = "recovery.signal";

impl Instance {
    /// Takes a data directory that was stopped in order as this member's, which must be empty. It is moved.
    pub async fn take_data_dir(&self, made: PathBuf) -> Result<ControlData> {
        let this = self.clone();
        blocking(move || {
            this.check_data_dir_is_free()?;
            let control = control_data(&this.config().binaries, &made)?;
            if !control.shut_down_cleanly() || made.join(RECOVERY_SIGNAL).exists() {
                return Err(PgError::DataDir {
                    path: made,
                    reason: "is not the database of a server that was stopped in order: finish its recovery first (craton restore --finish)".to_owned(),
                });
            }
            files::flush_data_dir(&made)?;
            this.move_into_place(&made)?;
            this.read_control_data()
        })
        .await
    }
}

fn tool(binaries: &Binaries, name: &str) -> Command {
    let mut command = Command::new(binaries.tool(name));
    command
        .env("LC_ALL", "C")
        .env_remove("PGDATA")
        .stdin(Stdio::null());
    command
}

fn control_data(binaries: &Binaries, dir: &Path) -> Result<ControlData> {
    let mut command = tool(binaries, "pg_controldata");
    command.arg("-D").arg(dir);
    ControlData::parse(&run_tool("pg_controldata", &mut command)?)
}

/// What a recovery came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recovered {
    /// The stopped server.
    pub control: ControlData,
    /// When the last transaction that is in it was committed, as the server's log has it.
    pub last_transaction: Option<String>,
}

/// Lets PostgreSQL recover a restored directory to its target and promote itself, reachable by nobody, and stops it in
/// order. As the directory's owner. Takes as long as there is WAL to replay.
pub fn finish_recovery(binaries: &Binaries, dir: &Path) -> Result<Recovered> {
    let log = dir.join("recovery.log");
    start(binaries, dir, &log)?;
    let ended = wait_for_end(binaries, dir, &log, START_MAX);
    // Whatever came out, nothing of it goes on running.
    let stopped = run_tool(
        "pg_ctl",
        tool(binaries, "pg_ctl").arg("-D").arg(dir).args([
            "-s",
            "-w",
            "-t",
            STOP_SECONDS,
            "-m",
            "fast",
            "stop",
        ]),
    );
    ended?;
    stopped?;
    let control = control_data(binaries, dir)?;
    if !control.shut_down_cleanly() {
        return Err(failed(dir, "did not stop in order", &log));
    }
    let said = fs::read_to_string(&log).unwrap_or_default();
    fs::remove_file(&log).map_err(PgError::io("cannot remove", &log))?;
    Ok(Recovered {
        control,
        last_transaction: last_transaction(&said),
    })
}

fn start(binaries: &Binaries, dir: &Path, log: &Path) -> Result<()> {
    let options = format!(
        "-c listen_addresses='' -c unix_socket_directories='{}' -c logging_collector=off -c log_destination=stderr -c log_min_messages=log -c lc_messages=C",
        dir.display()
    );
    run_tool(
        "pg_ctl",
        tool(binaries, "pg_ctl")
            .arg("-D")
            .arg(dir)
            .arg("-l")
            .arg(log)
            .args(["-s", "-W", "-o", &options, "start"]),
    )
    .map(|_| ())
}

/// True while a postmaster runs there. The file alone says nothing: one that was killed leaves it behind.
fn is_running(dir: &Path) -> bool {
    let text = fs::read_to_string(dir.join("postmaster.pid")).unwrap_or_default();
    let pid = text.lines().next().and_then(|l| l.trim().parse().ok());
    pid.is_some_and(|pid| processes::lives_in(pid, dir))
}

/// Replaying may take as long as it likes, while the server is alive.
fn wait_for_end(binaries: &Binaries, dir: &Path, log: &Path, start_max: Duration) -> Result<()> {
    let begun = Instant::now();
    loop {
        let recovering = dir.join(RECOVERY_SIGNAL).exists();
        // A backup's control file says "in production" as well, but then the signal is still there.
        if !recovering && control_data(binaries, dir)?.state == ClusterState::InProduction {
            return Ok(());
        }
        if begun.elapsed() > start_max && !is_running(dir) {
            return Err(failed(dir, "recovery failed", log));
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

fn failed(dir: &Path, what: &str, log: &Path) -> PgError {
    let said = fs::read_to_string(log).unwrap_or_default();
    PgError::DataDir {
        path: dir.to_owned(),
        reason: format!("{what}: {}", last_lines(&said)),
    }
}

/// `last completed transaction was at log time 2026-01-31 12:00:00.1+00`
fn last_transaction(log: &str) -> Option<String> {
    let mark = "last completed transaction was at log time ";
    let (_, rest) = log.rsplit_once(mark)?;
    rest.lines().next().map(|l| l.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_was_killed_is_not_waited_for() {
        let mut dead = Command::new("true").spawn().unwrap();
        let pid = dead.id();
        dead.wait().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let at = |n: &str| dir.path().join(n);
        fs::write(at(RECOVERY_SIGNAL), "").unwrap();
        fs::write(at("postmaster.pid"), format!("{pid}\n")).unwrap();
        fs::write(at("log"), "LOG:  redo starts at 0/7000110\n").unwrap();
        let binaries = Binaries::find(None).unwrap();
        let error = wait_for_end(&binaries, dir.path(), &at("log"), Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("redo starts at"), "{error}");
    }

    #[test]
    fn the_last_transaction_is_in_the_log() {
        let log = "LOG:  redo done at 0/7000110\nLOG:  last completed transaction was at log time 2026-11-27 05:10:11.9+00\nLOG:  selected new timeline ID: 3\n";
        assert_eq!(
            last_transaction(log).as_deref(),
            Some("2026-11-27 05:10:11.9+00")
        );
        assert_eq!(last_transaction(""), None);
    }
}
