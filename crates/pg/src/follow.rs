//! A standby of a primary that is not Craton's, until that one has been shut down: the way into a cluster with a
//! switchover instead of an outage.
//!
//! The directory is not marked as Craton's meanwhile: once promoted and stopped it is adopted as any other.

use std::collections::BTreeMap;
use std::path::Path;

use craton_core::{Lsn, TimelineId};
use tokio::sync::watch;

use crate::clone::CloneProgress;
use crate::config::{ManagedConfig, Upstream};
use crate::control_data::ControlData;
use crate::error::{PgError, Result};
use crate::files::{self, blocking};
use crate::instance::Instance;
use crate::postmaster::{Postmaster, StartMode};

/// What the last record of a primary is that was shut down in order (pg_waldump's word).
const SHUTDOWN: &str = "CHECKPOINT_SHUTDOWN";

impl Instance {
    /// Copies a foreign primary, and makes a slot there that keeps its WAL for this standby.
    pub async fn clone_foreign(
        &self,
        upstream: &Upstream,
        progress: watch::Sender<CloneProgress>,
    ) -> Result<ControlData> {
        let first = self.copy_foreign(upstream, true, progress.clone()).await;
        match first {
            // Of an earlier try.
            Err(PgError::Tool { output, .. }) if output.contains("already exists") => {
                self.copy_foreign(upstream, false, progress).await
            }
            other => other,
        }
    }

    async fn copy_foreign(
        &self,
        upstream: &Upstream,
        make_slot: bool,
        progress: watch::Sender<CloneProgress>,
    ) -> Result<ControlData> {
        let making = self.place_for_clone().await?;
        let mut command = self.base_backup(upstream, &making);
        if let Some(slot) = &upstream.slot {
            command.args(["--slot", slot]);
            if make_slot {
                command.arg("--create-slot");
            }
        }
        self.clone_with(command, "pg_basebackup", making, progress)
            .await
    }

    /// Starts it as a standby of the foreign primary, reachable through its Unix socket alone.
    pub async fn start_foreign_standby(&self, upstream: Upstream) -> Result<Postmaster> {
        let needs = self.control_data().await?.standby_needs;
        let mut settings: BTreeMap<String, String> =
            needs.into_iter().map(|(k, v)| (k, v.to_string())).collect();
        // Libraries of the other system are not here.
        settings.insert("shared_preload_libraries".to_owned(), String::new());
        // The primary itself says when it is gone.
        settings.insert("wal_receiver_timeout".to_owned(), "60s".to_owned());
        let managed = ManagedConfig {
            upstream: Some(upstream),
            settings,
            ..ManagedConfig::default()
        };
        let this = self.clone();
        blocking(move || this.write_config_unmarked(&managed)).await?;
        self.start(StartMode::Standby).await
    }

    /// True if the WAL here ends with the record that a primary writes last when it is shut down in order. `from` is
    /// a position before it, from which WAL is read.
    pub async fn ends_with_shutdown(&self, timeline: TimelineId, from: Lsn) -> Result<bool> {
        let this = self.clone();
        blocking(move || {
            if let Some(last) = this.last_record(timeline, from)? {
                return Ok(last.contains(SHUTDOWN));
            }
            // Nothing beyond: the position was the end already.
            let redo = this.read_control_data()?.redo_lsn;
            let last = this.last_record(timeline, redo)?;
            Ok(last.is_some_and(|l| l.contains(SHUTDOWN)))
        })
        .await
    }

    fn last_record(&self, timeline: TimelineId, from: Lsn) -> Result<Option<String>> {
        // It ends with an error where the WAL ends; that is its way.
        let output = self
            .tool("pg_waldump")
            .arg("-p")
            .arg(self.wal_dir())
            .args(["-t", &timeline.to_string(), "-s", &from.to_string()])
            .output()
            .map_err(PgError::io("cannot run", Path::new("pg_waldump")))?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text
            .lines()
            .rev()
            .find(|l| l.starts_with("rmgr:"))
            .map(str::to_owned))
    }

    /// Takes away what only following needed.
    pub async fn forget_foreign(&self) -> Result<()> {
        let passfile = self.upstream_passfile();
        blocking(move || files::remove_durably(&passfile).map(|_| ())).await
    }
}
