//! The door for clients: closed from the start of a primary in place until what it recovered is safe.
//!
//! A primary that is started after a crash shows every session what it recovered, acknowledged or not. Where that is on
//! no standby yet, the loss of this host would take back what somebody has read. So PostgreSQL is started with a
//! `pg_hba.conf` that lets nobody in but the cluster's own roles, and the superuser on this host.

use std::time::Duration;

use tokio::time::Instant;

use crate::config::ManagedConfig;
use crate::control::{Control, one};
use crate::error::{PgError, Result};
use crate::files::{self, blocking};
use crate::hba;
use crate::instance::Instance;
use crate::postmaster::Postmaster;

/// How often it is looked whether the postmaster has read its files.
const POLL: Duration = Duration::from_millis(3);

impl Instance {
    /// True if the files refuse clients: [`ManagedConfig::closed`].
    pub fn is_closed(&self) -> Result<bool> {
        let text = files::read_text(&self.conf_dir().join(hba::FILE))?;
        Ok(text.is_some_and(|t| hba::is_closed(&t)))
    }

    /// Lets in whom `managed` lets in, and returns once the postmaster knows.
    ///
    /// The postmaster reads all files at a reload before it forks again (`process_pm_reload_request`), and a session
    /// inherits the time of that: one that shows another time than before was forked by a postmaster that has read them.
    pub async fn admit(
        &self,
        postmaster: &Postmaster,
        control: &Control,
        managed: &ManagedConfig,
        limit: Duration,
    ) -> Result<()> {
        let end = Instant::now() + limit;
        let before = control.loaded_at(limit).await?;
        let (this, managed) = (self.clone(), managed.clone());
        blocking(move || this.write_access_blocking(&managed)).await?;
        postmaster.reload()?;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(PgError::Timeout {
                    what: "proof that PostgreSQL has read who is let in",
                    limit,
                });
            }
            if control.loaded_at(left).await? != before {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

impl Control {
    /// When the postmaster last read its files, as a session that starts now knows it.
    async fn loaded_at(&self, limit: Duration) -> Result<String> {
        let what = "time of the last reload";
        let sql = "SELECT pg_conf_load_time()::text";
        one(what, self.query_apart(what, None, sql, limit).await?)
    }
}
