//! What helps the daemon of a container: the page of metrics and health, what is made at the first start, the schedule
//! of the backups. Nothing here decides anything about the cluster; it may die and is started again.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use craton_backup::views::RunAcceptedView;
use craton_console::Client;
use craton_console::front::Front;
use craton_core::topology::Topology;
use craton_trust::files::write_secret;
use craton_trust::{Guest, Role, authority::BUNDLE_FILE};
use jiff::Timestamp;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::entry::Facts;
use super::environment::Kind;
use super::plan::{API_PORT, FRONT_PORT, PROXY_HTTP};
use super::schedule::Schedule;
use super::{barman, daemon, first_start, nodes_table, recover, shown};
use crate::backup::CHANGE_TIMEOUT;
use crate::certificates;
use crate::cli::wait_for;

/// How often a backup daemon's container looks who belongs to the cluster.
const HOSTS_INTERVAL: Duration = Duration::from_secs(10);
/// A clock that is set is noticed after this.
const SCHEDULE_LOOK: Duration = Duration::from_secs(30);

/// Runs until it is told to stop.
pub fn run() -> anyhow::Result<u8> {
    crate::daemons::log_to_stderr("info", false);
    let facts = Arc::new(Facts::require()?);
    wait_for(async move {
        let (stop, stopped) = watch::channel(false);
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::spawn(async move {
            terminate.recv().await;
            stop.send_replace(true);
        });
        let mut tasks = JoinSet::new();
        match facts.kind {
            Kind::Node => {
                tasks.spawn(first_start::run(Arc::clone(&facts)));
                tasks.spawn(shown::keep_postgresql_conf(Arc::clone(&facts)));
                tasks.spawn(nodes_table::keep(Arc::clone(&facts)));
            }
            Kind::Proxy => {}
            Kind::Backup => {
                tasks.spawn(backups(Arc::clone(&facts)));
                tasks.spawn(remember_hosts(Arc::clone(&facts)));
            }
        }
        front(&facts, stopped).await?;
        Ok(crate::exit::OK)
    })
}

/// The daemon's own address inside the container.
pub fn daemon_address(kind: Kind) -> String {
    match kind {
        Kind::Node | Kind::Backup => format!("127.0.0.1:{API_PORT}"),
        Kind::Proxy => PROXY_HTTP.to_owned(),
    }
}

/// What the daemon's certificate says that it is.
pub fn role(kind: Kind) -> Role {
    match kind {
        Kind::Node => Role::Node,
        Kind::Proxy => Role::Proxy,
        Kind::Backup => Role::Backup,
    }
}

async fn front(facts: &Arc<Facts>, stopped: watch::Receiver<bool>) -> anyhow::Result<()> {
    let guest = Guest::of_authorities(&Facts::secrets().join(BUNDLE_FILE))?;
    let about = Arc::clone(facts);
    let kind = facts.kind;
    let front = Front {
        client: Client::guest(guest, role(kind), None),
        daemon: daemon_address(kind),
        // Who was given a database makes the cluster: others wait for it and make none.
        about: Arc::new(move || {
            let fresh = daemon::is_fresh() && recover::restored().is_none();
            about.about(kind == Kind::Node && fresh)
        }),
        more: {
            let facts = Arc::clone(facts);
            Arc::new(move || -> Pin<Box<dyn Future<Output = String> + Send>> {
                let facts = Arc::clone(&facts);
                Box::pin(async move {
                    match facts.kind {
                        Kind::Backup => barman::metrics(&facts).await,
                        Kind::Node | Kind::Proxy => String::new(),
                    }
                })
            })
        },
    };
    let listener = TcpListener::bind(("0.0.0.0", FRONT_PORT))
        .await
        .with_context(|| format!("cannot listen on port {FRONT_PORT}"))?;
    craton_console::serve(listener, front.router(), None, stopped).await?;
    Ok(())
}

/// Asks for base backups when the schedule says so.
async fn backups(facts: Arc<Facts>) {
    let text = facts.env.or("BACKUP_SCHEDULE", "0 0 * * *").to_owned();
    let schedule = match Schedule::parse(&text) {
        Ok(schedule) => schedule,
        Err(error) => {
            tracing::error!("BACKUP_SCHEDULE: {error}; no backups are taken by schedule");
            return;
        }
    };
    let mut due = schedule.next(Timestamp::now());
    loop {
        let Some(at) = due else { return };
        let left = at.duration_since(Timestamp::now());
        if left.is_positive() {
            let left = Duration::try_from(left).unwrap_or_default();
            tokio::time::sleep(left.min(SCHEDULE_LOOK)).await;
            continue;
        }
        match ask_for_backup().await {
            Ok(accepted) => {
                tracing::info!(run = accepted.run, "the schedule's backup was asked for");
            }
            Err(error) => {
                tracing::error!("the schedule's backup could not be asked for: {error:#}");
            }
        }
        due = schedule.next(Timestamp::now());
    }
}

/// Asks the daemon of this container for a base backup.
pub async fn ask_for_backup() -> anyhow::Result<RunAcceptedView> {
    let trust = certificates::operator(&Facts::secrets())?;
    let client = Client::trusted(trust, Role::Backup).with_timeout(CHANGE_TIMEOUT);
    let at = daemon_address(Kind::Backup);
    Ok(client
        .post_json(&at, "/v1/backup/run", &serde_json::json!({}))
        .await?)
}

/// Keeps the hosts of the cluster on the disk: after a restart any of them is enough, also one that was not there when the
/// environment was written.
async fn remember_hosts(facts: Arc<Facts>) {
    let path = daemon::known_hosts(&facts);
    let mut last = String::new();
    loop {
        tokio::time::sleep(HOSTS_INTERVAL).await;
        let Ok(trust) = certificates::operator(&Facts::secrets()) else {
            continue;
        };
        let client = Client::trusted(trust, Role::Node);
        let known = last.lines().map(|h| format!("{h}:{API_PORT}"));
        for agent in facts.agents().into_iter().chain(known.collect::<Vec<_>>()) {
            let Ok(topology) = client.get_json::<Topology>(&agent, "/v1/topology").await else {
                continue;
            };
            let hosts: Vec<&str> = topology.members.iter().map(|m| m.host.as_str()).collect();
            // An agent that is just starting knows nobody yet.
            if hosts.is_empty() {
                continue;
            }
            let hosts = hosts.join("\n");
            if hosts != last && write_secret(&path, &hosts).is_ok() {
                last = hosts;
            }
            break;
        }
    }
}
