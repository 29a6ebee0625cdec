//! The agent's certificate: issued here where the authority's key is, kept fresh, checked for the right name.

use std::sync::Arc;

use craton_console::Token;
use craton_pg::PgTls;
use craton_trust::authority::{Authority, KEY_FILE, ensure_certificate};
use craton_trust::channel::RELOAD_INTERVAL;
use craton_trust::{Identity, Role, Trust, renewal};
use tokio::task::JoinSet;

use crate::config::AgentConfig;
use crate::run::AgentError;
use crate::server::LocalServer;

/// Names and addresses under which this member's PostgreSQL is reached.
fn hosts(config: &AgentConfig) -> Vec<String> {
    vec![config.host.clone()]
}

fn refused(e: impl std::fmt::Display) -> AgentError {
    AgentError::Config(format!(
        "{e}; `craton ca init` makes an authority, `craton join` gets a certificate (docs/guide/security.md)"
    ))
}

/// Opens the certificate; `None` where `node.tls.mode` is off. Issues it first where this host has the authority's key
/// and there is none that is good.
pub fn open(config: &AgentConfig) -> Result<Option<Arc<Trust>>, AgentError> {
    let stem = format!("node-{}", config.member);
    let files = config
        .tls
        .files("node.tls", Some(&config.secrets), &stem)
        .map_err(refused)?;
    let Some(files) = files else {
        tracing::warn!(
            "TLS is off (node.tls.mode): passwords and data travel in the clear, and a token alone opens the API"
        );
        return Ok(None);
    };
    let identity = Identity::new(&config.cluster, Role::Node, config.member.as_str())
        .map_err(|e| AgentError::Config(e.to_string()))?;
    let key = config.secrets.join(KEY_FILE);
    if config.tls.certificate.is_none() && key.exists() {
        let issued = Authority::load(&key)
            .and_then(|authority| ensure_certificate(&authority, &files, &identity, &hosts(config)))
            .map_err(refused)?;
        if issued {
            tracing::info!(certificate = %files.certificate.display(), "issued this member's certificate");
        }
    }
    let trust = Trust::open(files).map_err(refused)?;
    if trust.identity() != identity {
        return Err(refused(format!(
            "the certificate {} is for {}, and this is {identity}",
            trust.files().certificate.display(),
            trust.identity()
        )));
    }
    Ok(Some(trust))
}

/// The token that opens the API beside certificates, if there is one; without TLS there must be.
pub fn token(config: &AgentConfig, trust: Option<&Trust>) -> Result<Option<Token>, AgentError> {
    let path = config.secrets.join("api-token");
    if trust.is_some() && !path.exists() {
        return Ok(None);
    }
    Token::from_file(&path)
        .map(Some)
        .map_err(|e| AgentError::Config(e.to_string()))
}

/// The same files for PostgreSQL: it has the agent's name, and is reached by the same parts.
pub fn for_postgres(trust: &Trust) -> PgTls {
    let files = trust.files();
    PgTls {
        authority: files.authority.clone(),
        certificate: files.certificate.clone(),
        key: files.key.clone(),
    }
}

/// PostgreSQL reads its certificate at a reload. One that it cannot use leaves it with the former (be-secure-openssl.c,
/// `be_tls_init`).
async fn tell_postgres(trust: Arc<Trust>, server: Arc<LocalServer>) {
    let mut told = trust.generation();
    loop {
        tokio::time::sleep(RELOAD_INTERVAL).await;
        let now = trust.generation();
        if now == told {
            continue;
        }
        if let Some(process) = server.process()
            && let Err(error) = process.reload()
        {
            tracing::warn!(%error, "PostgreSQL could not be told of its new certificate; trying on");
            continue;
        }
        told = now;
    }
}

/// Looks after the certificate for as long as the agent runs.
pub fn keep(
    trust: Option<Arc<Trust>>,
    config: &AgentConfig,
    server: &Arc<LocalServer>,
    background: &mut JoinSet<()>,
) {
    let Some(trust) = trust else { return };
    background.spawn(Arc::clone(&trust).keep_fresh());
    background.spawn(tell_postgres(Arc::clone(&trust), Arc::clone(server)));
    if config.tls.certificate.is_none() {
        background.spawn(renewal::renew_by_key(
            trust,
            config.secrets.clone(),
            hosts(config),
        ));
    }
}
