//! A witness: a voter of the coordinator without a PostgreSQL, so that two hosts with data still have a majority when one
//! of them is lost. It keeps the log of decisions and promises leases, and neither holds data nor leads.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use craton_console::client::Client;
use craton_console::metrics::Metrics;
use craton_console::server::{Health, Service, serve};
use craton_console::views::JoinRequest;
use craton_coordinator::api::{Coordinator, Membership as _};
use craton_coordinator::embedded::{Embedded, EmbeddedConfig};
use craton_core::MemberId;
use craton_trust::authority::{Authority, KEY_FILE, ensure_certificate};
use craton_trust::{Identity, Role, TlsSettings, Trust};
use prometheus_client::metrics::gauge::Gauge;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::{Peer, VoterWish, read_secret};
use crate::members;
use crate::run::{AgentError, io, lease_runtime, make_dir};

/// How often it says that it is there, and looks at itself.
const INTERVAL: Duration = Duration::from_millis(500);

/// The `[witness]` table; also `[proxy.witness]` and `[backup.witness]`, where that daemon is a witness too.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WitnessConfig {
    /// The cluster's name.
    pub cluster: String,
    /// The witness's name; no member has the same.
    pub name: MemberId,
    /// Where it keeps the coordinator's log. A disk of its own host: it is a third copy of every decision.
    pub dir: PathBuf,
    /// Where the coordinator listens, `address:port`.
    pub listen: String,
    /// Under which `host:port` the members reach the coordinator; as `peers` says, else the listen address, if not given.
    #[serde(default)]
    pub advertise: Option<String>,
    /// Where `/metrics` and `/health` are served, `address:port`; nowhere if not given.
    #[serde(default)]
    pub http: Option<String>,
    /// The members' control APIs, `host:port`: one of them is asked to take the witness in, and for new certificates.
    #[serde(default)]
    pub agents: Vec<String>,
    /// The voters that a new cluster begins with, the witness included. Left out where it joins a cluster that runs.
    #[serde(default)]
    pub peers: Vec<Peer>,
    /// Whether it has a say in the coordinator: `auto` while that makes the number of voters odd, `always`, `never`.
    #[serde(default)]
    pub voter: VoterWish,
    /// The directory with its certificate (`witness-NAME.pem`), `authority.pem`, and the secret `peers`.
    pub secrets: PathBuf,
    /// The certificate, where it lies elsewhere.
    #[serde(default)]
    pub tls: TlsSettings,
}

impl WitnessConfig {
    fn address(&self) -> String {
        let listed = self.peers.iter().find(|p| p.member == self.name);
        self.advertise
            .clone()
            .or_else(|| listed.map(|p| p.address.clone()))
            .unwrap_or_else(|| self.listen.clone())
    }

    /// Says what is wrong, if anything.
    pub fn validate(&self) -> Result<(), String> {
        let founds = self.peers.iter().any(|p| p.member == self.name);
        if !founds && self.agents.is_empty() {
            return Err(format!(
                "witness.agents is empty, and witness.peers does not list {}: name the members' APIs, which take it in",
                self.name
            ));
        }
        Ok(())
    }
}

/// What is measured of a witness.
struct WitnessMetrics {
    voter: Gauge,
    voters: Gauge,
    leader_known: Gauge,
}

impl WitnessMetrics {
    fn register(m: &mut Metrics) -> Self {
        Self {
            voter: m.gauge(
                "craton_witness_is_voter",
                "1 while the witness has a say in the coordinator",
            ),
            voters: m.gauge(
                "craton_witness_voters",
                "Voters of the coordinator, as the witness knows them",
            ),
            leader_known: m.gauge(
                "craton_witness_cluster_known",
                "1 once the witness has read the cluster's records",
            ),
        }
    }
}

/// The metrics of a witness, for the reference.
pub fn metrics_catalogue() -> Metrics {
    let mut metrics = Metrics::new();
    WitnessMetrics::register(&mut metrics);
    metrics
}

fn open_trust(config: &WitnessConfig) -> Result<Option<Arc<Trust>>, AgentError> {
    let refused = |e: &dyn std::fmt::Display| {
        AgentError::Config(format!(
            "{e}; `craton ca token --role witness --name {}` on a member's host makes a token for `craton join`",
            config.name
        ))
    };
    let stem = format!("witness-{}", config.name);
    let files = config
        .tls
        .files("witness.tls", Some(&config.secrets), &stem)
        .map_err(|e| refused(&e))?;
    let Some(files) = files else {
        tracing::warn!("TLS is off (witness.tls.mode): for isolated tests alone");
        return Ok(None);
    };
    let identity = Identity::new(&config.cluster, Role::Witness, config.name.as_str())
        .map_err(|e| AgentError::Config(e.to_string()))?;
    let key = config.secrets.join(KEY_FILE);
    if config.tls.certificate.is_none() && key.exists() {
        Authority::load(&key)
            .and_then(|authority| ensure_certificate(&authority, &files, &identity, &[]))
            .map_err(|e| refused(&e))?;
    }
    let trust = Trust::open(files).map_err(|e| refused(&e))?;
    if trust.identity() != identity {
        return Err(refused(&format!(
            "the certificate is for {}, and this is {identity}",
            trust.identity()
        )));
    }
    Ok(Some(trust))
}

/// Runs until `shutdown` turns true, or until the members have taken the witness out.
pub async fn run(config: WitnessConfig, shutdown: watch::Receiver<bool>) -> Result<(), AgentError> {
    config.validate().map_err(AgentError::Config)?;
    let secret = read_secret(&config.secrets, "peers").map_err(AgentError::Config)?;
    let trust = open_trust(&config)?;
    make_dir(&config.dir)?;
    // Of its own: whatever else this process does must not hold up a lease.
    let runtime = lease_runtime()?;
    let outcome = run_on(config, secret, trust, runtime.handle(), shutdown).await;
    runtime.shutdown_background();
    outcome
}

async fn run_on(
    config: WitnessConfig,
    secret: String,
    trust: Option<Arc<Trust>>,
    runtime: &tokio::runtime::Handle,
    shutdown: watch::Receiver<bool>,
) -> Result<(), AgentError> {
    let mut told = shutdown.clone();
    let started = tokio::select! {
        started = start(&config, secret, trust.clone(), runtime) => started?,
        _ = told.wait_for(|on| *on) => return Ok(()),
    };
    let (mut metrics, mut background) = (Metrics::new(), JoinSet::new());
    let handles = WitnessMetrics::register(&mut metrics);
    if let Some(trust) = trust.clone() {
        let tls = TlsSettings {
            dir: config.tls.dir.clone().or(Some(config.secrets.clone())),
            ..config.tls.clone()
        };
        craton_console::renewal::keep(&trust, &tls, &config.agents, &mut background);
    }
    let coordinator: Arc<dyn Coordinator> = started.clone();
    background.spawn(members::keep_say(
        Arc::clone(&coordinator),
        config.name.clone(),
        config.voter,
    ));
    background.spawn(watch_itself(
        Arc::clone(&coordinator),
        config.name.clone(),
        handles,
    ));
    if let Some(http) = &config.http {
        let listener = TcpListener::bind(http).await.map_err(io(format!(
            "cannot listen on {http} for metrics and health (witness.http)"
        )))?;
        let (asked, me) = (Arc::clone(&coordinator), config.name.clone());
        let service = Service::new(Arc::new(metrics), move || health(&asked, &me));
        let (router, shutdown) = (service.router(), shutdown.clone());
        background.spawn(async move {
            if let Err(error) = serve(listener, router, trust, shutdown).await {
                tracing::error!(%error, "metrics and health ended");
            }
        });
    }
    let mut removed = started.removed();
    let removed = tokio::select! {
        _ = told.wait_for(|on| *on) => false,
        Ok(_) = removed.wait_for(|on| *on) => true,
    };
    background.shutdown().await;
    started.stop().await;
    if removed {
        return Err(AgentError::Config(format!(
            "the witness {} was taken out of the cluster: it ends. To bring it back, empty {}",
            config.name,
            config.dir.display()
        )));
    }
    Ok(())
}

async fn start(
    config: &WitnessConfig,
    secret: String,
    trust: Option<Arc<Trust>>,
    runtime: &tokio::runtime::Handle,
) -> Result<Arc<Embedded>, AgentError> {
    let dir = config.dir.join("coordinator");
    let listed = config.peers.iter();
    let mut peers: Vec<_> = listed
        .map(|p| (p.member.clone(), p.address.clone()))
        .collect();
    let founds = peers.iter().any(|(m, _)| *m == config.name);
    if !founds && crate::run::is_new(&dir) {
        let request = JoinRequest {
            member: config.name.clone(),
            address: config.address(),
        };
        let client = match &trust {
            Some(trust) => Client::trusted(Arc::clone(trust), Role::Node),
            None => {
                Client::new(craton_console::Token::from_file(&token_file(&config.secrets)).ok())
            }
        };
        peers = members::join(&config.agents, client, &request, &config.cluster)
            .await
            .map_err(AgentError::Config)?;
    }
    let mut settings = EmbeddedConfig::new(
        config.cluster.clone(),
        config.name.clone(),
        peers,
        config.listen.clone(),
        dir,
        secret,
    )
    .with_trust(trust);
    settings.advertise = Some(config.address());
    runtime
        .spawn(async move { Embedded::start(settings).await })
        .await
        .map_err(|e| AgentError::Coordinator(e.to_string()))?
        .map_err(|e| AgentError::Coordinator(e.to_string()))
}

fn token_file(secrets: &Path) -> PathBuf {
    secrets.join("api-token")
}

/// Announces nothing but itself, so that the members see when it was heard last.
async fn watch_itself(coordinator: Arc<dyn Coordinator>, me: MemberId, metrics: WitnessMetrics) {
    loop {
        coordinator.announce("{}".into());
        if let Some(members) = coordinator.membership() {
            let config = members.members();
            metrics
                .voter
                .set(i64::from(config.voters.contains_key(&me)));
            metrics
                .voters
                .set(i64::try_from(config.voters.len()).unwrap_or(i64::MAX));
        }
        let known = coordinator.watch().borrow().get("leadership").is_some();
        metrics.leader_known.set(i64::from(known));
        tokio::time::sleep(INTERVAL).await;
    }
}

fn health(coordinator: &Arc<dyn Coordinator>, me: &MemberId) -> Health {
    let votes = coordinator
        .membership()
        .is_some_and(|m| m.members().voters.contains_key(me));
    let known = coordinator.watch().borrow().get("leadership").is_some();
    match (votes, known) {
        (true, true) => Health::ok("voter"),
        (false, _) => Health::failing("no voter", "the members have not given it a say yet"),
        (true, false) => Health::failing("waiting", "the cluster's records have not come yet"),
    }
}
