//! Settings of the backup daemon: the table `[backup]` of `craton.toml`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use craton_core::MemberId;
use craton_core::topology::TopologyMember;
use craton_pg::replication::{ReplicationLogin, ServerAddress};
use craton_trust::{Expect, Role, TlsSettings, Trust};
use serde::{Deserialize, Serialize};

use crate::error::{BackupError, Result};

/// How long connecting to a server may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Where `retention_days` is not set.
pub const RETENTION_DAYS: u32 = 30;
/// Where `retention_backups` is not set.
pub const RETENTION_BACKUPS: usize = 2;

/// What the daemon is told.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The directory of the repository.
    pub repository: PathBuf,
    /// Where `/metrics`, `/health` and the API are served.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// The agents' APIs, `host:port`; one is enough, all are better.
    pub agents: Vec<String>,
    /// The file of a token that opens this daemon's API beside certificates. Without TLS it is needed, and opens the
    /// agents' APIs as well.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
    /// The role that replicates.
    #[serde(default = "default_user")]
    pub user: String,
    /// The file whose first line is that role's password; none where the server asks for none.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// The physical slot that keeps WAL for this daemon.
    #[serde(default = "default_name")]
    pub slot: String,
    /// The name in `pg_stat_replication`, where it is not a synchronous copy.
    #[serde(default = "default_name")]
    pub application_name: String,
    /// Be a synchronous copy: commits may wait for this daemon as for a standby, it seals in elections, and what only
    /// it has received is not lost. Everything that is received is synced and reported at once.
    #[serde(default)]
    pub synchronous: bool,
    /// Its name as a synchronous copy, `backup` if not given; no member has the same.
    #[serde(default)]
    pub name: Option<MemberId>,
    /// Under which `host:port` the agents reach this daemon's API; the listen address if not given.
    #[serde(default)]
    pub advertise: Option<String>,
    /// Take a base backup as soon as there is a leader, when the repository has none.
    #[serde(default = "default_true")]
    pub backup_on_start: bool,
    /// Take a base backup when the newest is older than so many seconds; 0: only when asked.
    #[serde(default = "default_interval")]
    pub backup_interval_s: u64,
    /// Every time within the last so many days can be restored to; backups and WAL that only older times need are
    /// removed. 0: everything is kept.
    #[serde(default = "default_retention_days")]
    pub retention_days: u32,
    /// At least so many backups are kept, however old they are.
    #[serde(default = "default_retention_backups")]
    pub retention_backups: usize,
    /// Read base backups from a streaming standby where there is one, to spare the leader.
    #[serde(default)]
    pub prefer_standby: bool,
    /// Read base backups at no more than so many kB a second (32 to 1048576).
    #[serde(default)]
    pub max_rate_kb: Option<u32>,
    /// This daemon's certificate (role `backup`): `dir`, or the files one by one.
    #[serde(default)]
    pub tls: TlsSettings,
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 6472))
}

fn default_user() -> String {
    "craton_replication".into()
}

fn default_name() -> String {
    "craton_backup".into()
}

fn default_true() -> bool {
    true
}

fn default_interval() -> u64 {
    86_400
}

fn default_retention_days() -> u32 {
    RETENTION_DAYS
}

fn default_retention_backups() -> usize {
    RETENTION_BACKUPS
}

impl Config {
    /// Its name as a synchronous copy.
    pub(crate) fn copy_name(&self) -> Result<MemberId> {
        let name = self
            .name
            .clone()
            .map_or_else(|| MemberId::new("backup"), Ok);
        name.map_err(BackupError::Config)
    }

    /// Where the agents reach the API.
    pub fn api_address(&self) -> String {
        self.advertise
            .clone()
            .unwrap_or_else(|| self.listen.to_string())
    }

    /// How to log in to a server.
    pub(crate) fn login(
        &self,
        trust: Option<&Arc<Trust>>,
        member: &TopologyMember,
        application_name: &str,
    ) -> Result<ReplicationLogin> {
        let (host, port) = (member.host.as_str(), member.port);
        // A host that is a path names the directory of a Unix socket, as in libpq.
        let address = if host.starts_with('/') {
            ServerAddress::Unix(PathBuf::from(host), port)
        } else {
            ServerAddress::Tcp(host.to_owned(), port)
        };
        Ok(ReplicationLogin {
            address,
            user: self.user.clone(),
            password: self
                .password_file
                .as_deref()
                .map(read_password)
                .transpose()?,
            application_name: application_name.to_owned(),
            timeout: CONNECT_TIMEOUT,
            tls: trust.map(|trust| {
                let expect = Expect::Exactly(Role::Node, member.id.as_str().to_owned());
                (Arc::clone(trust), expect)
            }),
        })
    }
}

/// Read at each log-in, so that a changed password is taken up without a restart.
fn read_password(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).map_err(BackupError::io("read", path))?;
    match text
        .lines()
        .next()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
    {
        Some(line) => Ok(line.to_owned()),
        None => Err(BackupError::Config(format!(
            "{} holds no password in its first line",
            path.display()
        ))),
    }
}
