//! What the doctor knows: gathered from every agent, from the daemons, and from this machine.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use craton_backup::views::BackupStatusView;
use craton_console::Client;
use craton_console::views::{ConfigView, CoordinatorView, GuaranteesView, HistoryView, StatusView};
use craton_core::MemberId;
use craton_trust::{Expect, Role};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::access::Access;
use crate::layout::{Layout, address};

/// How long one answer is waited for.
const LOOK_TIMEOUT: Duration = Duration::from_millis(1500);

/// How long the backup daemon may take: it looks through its repository.
const REPOSITORY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an agent may take to ask every endpoint of the records' store.
const STORE_TIMEOUT: Duration = Duration::from_secs(5);

/// An agent's answer.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Its API address.
    pub api: String,
    /// Its status, or why there is none.
    pub status: Result<StatusView, String>,
    /// Its settings, where it answered.
    pub config: Option<ConfigView>,
    /// How it reaches the cluster's records, where it answered.
    pub coordinator: Option<CoordinatorView>,
    /// What limits the guarantees there, where it answered.
    pub guarantees: Option<GuaranteesView>,
    /// How far its wall clock is ahead of this machine's, milliseconds, at least.
    pub ahead_ms: i64,
}

impl Asked {
    /// Whose agent answered.
    fn member(&self) -> Option<&MemberId> {
        self.status.as_ref().ok().map(|s| &s.answered_by)
    }
}

/// A member's PostgreSQL as seen from here.
#[derive(Clone, Debug)]
pub struct Door {
    /// The member.
    pub member: MemberId,
    /// `host:port`.
    pub address: String,
    /// A connection was accepted.
    pub open: bool,
}

/// What only the host of a local cluster can see.
#[derive(Clone, Debug, Default)]
pub struct Local {
    /// Whether the proxy answers, with its address.
    pub proxy: Option<(String, bool)>,
    /// The backup daemon's state, or why it does not tell.
    pub backup: Option<Result<BackupStatusView, String>>,
    /// Secrets with their permission bits.
    pub secrets: Vec<(PathBuf, u32)>,
    /// The file system under the cluster: path, bytes free, bytes in all.
    pub disk: Option<(PathBuf, u64, u64)>,
}

/// Everything.
#[derive(Clone, Debug)]
pub struct Facts {
    /// This machine's wall clock, milliseconds since 1970.
    pub now_ms: u64,
    /// Every agent that is known by address.
    pub agents: Vec<Asked>,
    /// The newest view of the cluster.
    pub status: StatusView,
    /// The cluster's history, where it could be had.
    pub history: HistoryView,
    /// The members' PostgreSQL servers.
    pub doors: Vec<Door>,
    /// None where the cluster is not one of this machine's.
    pub local: Option<Local>,
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// Asks everybody.
pub async fn gather(access: &Access, dir: &Path) -> anyhow::Result<Facts> {
    let status = access.status().await?;
    let mut addresses = access.agents.clone();
    for member in &status.members {
        if !addresses.contains(&member.api) {
            addresses.push(member.api.clone());
        }
    }
    let client = access.client().clone().with_timeout(LOOK_TIMEOUT);
    let mut agents: Vec<Asked> = Vec::new();
    for api in addresses {
        let asked = ask(&client, api).await;
        // One agent may be known by two addresses, as in a container by its own loopback and by its name.
        let again = |other: &Asked| asked.member().is_some_and(|m| other.member() == Some(m));
        if !agents.iter().any(again) {
            agents.push(asked);
        }
    }
    let mut doors = Vec::new();
    for m in &status.members {
        let address = format!("{}:{}", m.host, m.port);
        let open = timeout(LOOK_TIMEOUT, TcpStream::connect(&address)).await;
        doors.push(Door {
            member: m.id.clone(),
            open: matches!(open, Ok(Ok(_))),
            address,
        });
    }
    let own = Layout::load(dir).ok().flatten();
    let local = match own.filter(|l| access.agents == l.api_addresses()) {
        Some(layout) => Some(look_around(&client, &layout).await),
        None => None,
    };
    Ok(Facts {
        now_ms: now_ms(),
        agents,
        history: access.history().await.unwrap_or_default(),
        status,
        doors,
        local,
    })
}

async fn ask(client: &Client, api: String) -> Asked {
    let before = now_ms();
    let status = client.get_json::<StatusView>(&api, "/v1/status").await;
    let after = now_ms();
    // Its clock was read somewhere between: only what cannot be the way's doing counts. The answer is drawn
    // from a state that is up to a tick old.
    let ahead_ms = status.as_ref().map_or(0, |s| {
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let theirs = signed(s.at_ms);
        match theirs {
            0 => 0,
            t if t > signed(after) => t.saturating_sub(signed(after)),
            t if t < signed(before) => t.saturating_sub(signed(before)),
            _ => 0,
        }
    });
    let (config, coordinator, guarantees) = match &status {
        Ok(_) => {
            let patient = client.clone().with_timeout(STORE_TIMEOUT);
            (
                client.get_json(&api, "/v1/config").await.ok(),
                patient.get_json(&api, "/v1/coordinator").await.ok(),
                client.get_json(&api, "/v1/guarantees").await.ok(),
            )
        }
        Err(_) => (None, None, None),
    };
    Asked {
        status: status.map_err(|e| e.to_string()),
        api,
        config,
        coordinator,
        guarantees,
        ahead_ms,
    }
}

/// True for certificates that stand without a key: they are shown to everybody anyway.
fn is_public(path: &Path) -> bool {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.contains("-----BEGIN CERTIFICATE-----") && !text.contains("PRIVATE KEY")
}

async fn look_around(client: &Client, layout: &Layout) -> Local {
    let proxy = address(layout.proxy_port());
    let answers = timeout(LOOK_TIMEOUT, TcpStream::connect(&proxy)).await;
    let backup = address(layout.backup_http_port());
    let backup = client
        .clone()
        .expecting(Expect::Role(Role::Backup))
        .with_timeout(REPOSITORY_TIMEOUT)
        .get_json::<BackupStatusView>(&backup, "/v1/backup/status")
        .await;
    let secrets = std::fs::read_dir(layout.secrets()).into_iter().flatten();
    let secrets = secrets
        .flatten()
        .filter(|f| !is_public(&f.path()))
        .filter_map(|f| Some((f.path(), f.metadata().ok()?.permissions().mode() & 0o777)))
        .collect();
    let disk = rustix::fs::statvfs(layout.run()).ok().map(|s| {
        let free = s.f_bavail.saturating_mul(s.f_frsize);
        (layout.run(), free, s.f_blocks.saturating_mul(s.f_frsize))
    });
    Local {
        proxy: Some((proxy, matches!(answers, Ok(Ok(_))))),
        backup: Some(backup.map_err(|e| e.to_string())),
        secrets,
        disk,
    }
}
