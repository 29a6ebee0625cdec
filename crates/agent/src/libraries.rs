//! The versions that PostgreSQL works with here, kept up to date for the others to compare.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use craton_core::libraries::Libraries;
use tokio::sync::Notify;

use crate::server::LocalServer;

/// A package may be upgraded under a running server: new sessions load the new PostGIS.
const INTERVAL: Duration = Duration::from_secs(600);
/// A server that has just been started does not answer yet.
const AGAIN: Duration = Duration::from_secs(1);
/// A query of the agent's own; it reads the control files of all extensions.
const QUERY_MAX: Duration = Duration::from_secs(10);

/// What was found last.
#[derive(Default)]
pub struct LibrariesHere {
    found: Mutex<Libraries>,
    look: Notify,
}

impl LibrariesHere {
    fn found(&self) -> MutexGuard<'_, Libraries> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Versions by name; empty until they have been asked for.
    pub fn get(&self) -> Libraries {
        self.found().clone()
    }

    /// PostgreSQL has started: it may have been upgraded.
    pub fn new_life(&self) {
        self.look.notify_one();
    }
}

/// Looks for as long as the agent lives.
pub async fn keep(server: Arc<LocalServer>) {
    loop {
        let known = match server.sample() {
            Some(_) => server.control.libraries(QUERY_MAX).await.map(Some),
            None => Ok(None),
        };
        let pause = match known {
            Ok(Some(found)) => {
                *server.libraries.found() = found;
                INTERVAL
            }
            Ok(None) => AGAIN,
            Err(error) => {
                tracing::debug!(%error, "the versions of the libraries cannot be asked for");
                QUERY_MAX
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = server.libraries.look.notified() => {}
        }
    }
}
