//! Certificates of parts whose host has no key of the authority: the agents sign new ones.

use std::sync::Arc;
use std::time::Duration;

use craton_trust::authority::{self, KEY_FILE, sha256};
use craton_trust::files::write_secret;
use craton_trust::join::hex;
use craton_trust::{Role, TlsSettings, Trust, TrustError, renewal};
use tokio::task::JoinSet;

use crate::client::{Client, ClientError};
use crate::join::{AuthorityView, CertificateRequest, CertificateView};

/// How long an agent may take to sign.
const SIGN_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
pub enum RenewalError {
    /// No agent signed one.
    #[error("no agent signed a new certificate; the last one: {0}")]
    Agents(ClientError),
    /// No agent is known.
    #[error("no agent is known that could sign a new certificate")]
    Nobody,
    /// It cannot be made or stored.
    #[error(transparent)]
    Trust(#[from] TrustError),
}

/// Looks after a daemon's certificate: takes up what changed on disk, and gets a new one in time, from the authority's
/// key where that lies beside it (a local cluster), else from an agent. Files of one's own are only watched.
pub fn keep(
    trust: &Arc<Trust>,
    settings: &TlsSettings,
    agents: &[String],
    tasks: &mut JoinSet<()>,
) {
    tasks.spawn(Arc::clone(trust).keep_fresh());
    let (Some(dir), None) = (&settings.dir, &settings.certificate) else {
        return;
    };
    if dir.join(KEY_FILE).exists() {
        let hosts = trust.facts().hosts;
        tasks.spawn(renewal::renew_by_key(Arc::clone(trust), dir.clone(), hosts));
    } else {
        tasks.spawn(renew_over_api(Arc::clone(trust), agents.to_vec()));
    }
}

/// Looks after a certificate for ever: takes up new authorities, and gets a new certificate in the last half of the
/// present one's life or when another authority signs than the one that signed it.
/// [`Trust::keep_fresh`] takes up what is stored.
pub async fn renew_over_api(trust: Arc<Trust>, agents: Vec<String>) {
    let mut last = String::new();
    loop {
        match renew_once(&trust, &agents).await {
            Ok(true) => {
                last.clear();
                tracing::info!("got a new certificate from an agent");
            }
            Ok(false) => {}
            Err(error) => {
                let text = error.to_string();
                if text != last {
                    let valid_hours = trust.valid_for().as_secs() / 3600;
                    tracing::warn!(%error, valid_hours, "cannot renew this part's certificate; trying on");
                    last = text;
                }
            }
        }
        tokio::time::sleep(renewal::ASK_INTERVAL).await;
    }
}

/// One look; true if a new certificate was stored.
pub async fn renew_once(trust: &Arc<Trust>, agents: &[String]) -> Result<bool, RenewalError> {
    let client = Client::trusted(Arc::clone(trust), Role::Node).with_timeout(SIGN_TIMEOUT);
    let mut last = RenewalError::Nobody;
    for agent in agents {
        let told: Result<AuthorityView, _> = client.get_json(agent, "/v1/authority").await;
        match told {
            Ok(authority) => return take_up(trust, &client, agent, &authority).await,
            Err(error) => last = RenewalError::Agents(error),
        }
    }
    Err(last)
}

async fn take_up(
    trust: &Arc<Trust>,
    client: &Client,
    agent: &str,
    told: &AuthorityView,
) -> Result<bool, RenewalError> {
    let files = trust.files();
    let signed_by = trust.signer().map(|der| hex(&sha256(&der)));
    if !renewal::is_due(trust) && signed_by.as_ref() == Some(&told.signer_sha256) {
        store_authority(trust, &told.authority)?;
        return Ok(false);
    }
    let (key, request) = authority::request()?;
    let signed: CertificateView = client
        .post_json(agent, "/v1/certificate", &CertificateRequest { request })
        .await
        .map_err(RenewalError::Agents)?;
    // The authorities first: the new certificate may come from one that was not trusted yet.
    store_authority(trust, &signed.authority)?;
    write_secret(&files.certificate, &format!("{}{key}", signed.certificate))?;
    Ok(true)
}

fn store_authority(trust: &Trust, pem: &str) -> Result<(), TrustError> {
    let path = &trust.files().authority;
    if std::fs::read_to_string(path).is_ok_and(|known| known == pem) {
        return Ok(());
    }
    write_secret(path, pem)
}
