//! The door for clients: closed from the start of a primary in place until what it recovered is safe.
//!
//! A primary that is started after a crash shows every session what it recovered, acknowledged or not. Where that is on
//! no standby yet, the loss of this host would take back what somebody has read. So PostgreSQL is started with a
//! `pg_hba.conf` that lets nobody in but the cluster's own roles, and the superuser on this host.

use std::error::Error as _;
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::NoTls;
use tokio_postgres::error::SqlState;

use crate::config::ManagedConfig;
use crate::control::Control;
use crate::error::{PgError, Result};
use crate::files::{self, blocking};
use crate::hba;
use crate::instance::Instance;
use crate::postmaster::Postmaster;
use crate::roles::PROXY_ROLE;

/// How often it is looked whether the postmaster has read the file.
const POLL: Duration = Duration::from_millis(3);

impl Instance {
    /// True if the files refuse clients: [`ManagedConfig::closed`].
    pub fn is_closed(&self) -> Result<bool> {
        let text = files::read_text(&self.conf_dir().join(hba::FILE))?;
        Ok(text.is_some_and(|t| hba::is_closed(&t)))
    }

    /// Lets in whom `managed` lets in, and returns once the postmaster does: a session of a role that is no superuser is
    /// not turned away at the door any more. (It is asked for a password, and ends.)
    ///
    /// Files of the operator's that PostgreSQL cannot read hold up its other settings, and not this.
    pub async fn admit(
        &self,
        postmaster: &Postmaster,
        control: &Control,
        managed: &ManagedConfig,
        limit: Duration,
    ) -> Result<()> {
        let end = Instant::now() + limit;
        let (this, managed) = (self.clone(), managed.clone());
        blocking(move || this.write_access_blocking(&managed)).await?;
        postmaster.reload()?;
        while control
            .is_shut(end.saturating_duration_since(Instant::now()))
            .await?
        {
            if Instant::now() >= end {
                return Err(PgError::Timeout {
                    what: "PostgreSQL to let clients in",
                    limit,
                });
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }
}

impl Control {
    /// True if a session through the socket is refused by `pg_hba.conf`.
    async fn is_shut(&self, limit: Duration) -> Result<bool> {
        let mut config = self.login();
        config.user(PROXY_ROLE);
        let tried = tokio::time::timeout(limit, config.connect(NoTls)).await;
        let error = match tried {
            Ok(Ok(_)) => return Ok(false),
            Ok(Err(error)) => error,
            Err(_) => {
                return Err(PgError::Timeout {
                    what: "an answer at PostgreSQL's socket",
                    limit,
                });
            }
        };
        match error.code() {
            Some(code) => Ok(*code == SqlState::INVALID_AUTHORIZATION_SPECIFICATION),
            // It was asked for a password, which it does not have; or there is nobody to ask.
            None if error.is_closed()
                || error
                    .source()
                    .is_some_and(<dyn std::error::Error>::is::<std::io::Error>) =>
            {
                Err(self.connect_error(&error))
            }
            None => Ok(false),
        }
    }
}
