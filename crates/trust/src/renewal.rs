//! A certificate is replaced in the last half of its life, without a restart.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::authority::{Authority, KEY_FILE, ensure_certificate};
use crate::channel::Trust;

/// How often an agent is asked whom to trust, and whether a new certificate is due.
pub const ASK_INTERVAL: Duration = Duration::from_secs(60);

/// How often the authority's key is compared with the certificate, where it lies on the same host.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// For a part on a host that has the authority's key (in `dir`): issues the part's certificate anew in time, and
/// after the authority was replaced. [`Trust::keep_fresh`] takes it up.
pub async fn renew_by_key(trust: Arc<Trust>, dir: PathBuf, hosts: Vec<String>) {
    let mut last = String::new();
    loop {
        let (this, from, hosts) = (Arc::clone(&trust), dir.clone(), hosts.clone());
        let outcome = tokio::task::spawn_blocking(move || renew_once(&this, &from, &hosts)).await;
        match outcome {
            Ok(Ok(true)) => tracing::info!("issued a new certificate for this part"),
            Ok(Ok(false)) | Err(_) => last.clear(),
            Ok(Err(error)) => {
                let text = error.to_string();
                if text != last {
                    tracing::warn!(%error, "cannot issue a new certificate; the present one is used until it ends");
                    last = text;
                }
            }
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

fn renew_once(trust: &Trust, dir: &Path, hosts: &[String]) -> crate::Result<bool> {
    let key = dir.join(KEY_FILE);
    if !key.exists() {
        return Ok(false);
    }
    let authority = Authority::load(&key)?;
    ensure_certificate(&authority, trust.files(), &trust.identity(), hosts)
}

/// True if the part that has this certificate should ask for a new one.
pub fn is_due(trust: &Trust) -> bool {
    trust.facts().is_due(SystemTime::now())
}
