//! The agent's configuration: the `[node]` table of `craton.toml`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use craton_core::MemberId;
use craton_core::settings::Settings;
use serde::{Deserialize, Serialize};

use crate::hooks::HooksConfig;

/// A voter of the coordinator.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// The member.
    pub member: MemberId,
    /// Where its coordinator listens, `host:port`.
    pub address: String,
}

/// The `[node]` table.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// The cluster's name; the same for every member.
    pub cluster: String,
    /// This member's name; it never changes.
    pub member: MemberId,
    /// The member's directory: PostgreSQL's data, sockets, configuration, and the agent's own files.
    pub dir: PathBuf,
    /// The host name or address under which others reach this member's PostgreSQL.
    pub host: String,
    /// PostgreSQL's `listen_addresses`.
    #[serde(default = "loopback")]
    pub listen_addresses: String,
    /// PostgreSQL's TCP port.
    pub port: u16,
    /// Where the control API listens, `address:port`.
    pub api_listen: String,
    /// Under which `host:port` others reach the control API; the listen address if not given.
    #[serde(default)]
    pub api_advertise: Option<String>,
    /// Where the coordinator listens, `address:port`.
    pub peer_listen: String,
    /// All voters, this member included.
    pub peers: Vec<Peer>,
    /// Preference in elections, greater is better; 0: never the leader.
    #[serde(default = "priority")]
    pub priority: u32,
    /// The directory of PostgreSQL's programs; the newest installed version if not given.
    #[serde(default)]
    pub bin_dir: Option<PathBuf>,
    /// The directory of the secrets, see [`Secrets`].
    pub secrets: PathBuf,
    /// Networks from which password logins are taken, CIDR.
    #[serde(default = "networks")]
    pub networks: Vec<String>,
    /// Further settings for `postgresql.conf`.
    #[serde(default)]
    pub postgresql: BTreeMap<String, String>,
    /// The cluster-wide settings that a new cluster starts with.
    #[serde(default, deserialize_with = "craton_core::settings::strict")]
    pub initial: Settings,
    /// A program that is told of changes of the role, see `[node.hooks]`.
    #[serde(default)]
    pub hooks: HooksConfig,
    /// Where each of these was written (`craton.toml:12`), by its dotted name; for people.
    #[serde(skip)]
    pub origins: BTreeMap<String, String>,
    /// The program that is started as the fence (`<program> fence …`); the running one if not given.
    #[serde(default)]
    pub fence_program: Option<PathBuf>,
    /// `off`, `automatic` or `required`: whether the fence feeds the host's watchdog device, which restarts
    /// the host if PostgreSQL could outlive its lease. One member a host may use it.
    #[serde(default)]
    pub watchdog: WatchdogMode,
    /// The watchdog device.
    #[serde(default = "watchdog_device")]
    pub watchdog_device: PathBuf,
}

/// Whether a watchdog device is to restart the host when nothing else stops PostgreSQL.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WatchdogMode {
    /// None is used.
    #[default]
    Off,
    /// One is used if it is there.
    Automatic,
    /// Without one the member does not lead.
    Required,
}

fn watchdog_device() -> PathBuf {
    "/dev/watchdog".into()
}

fn loopback() -> String {
    "127.0.0.1".into()
}

fn priority() -> u32 {
    100
}

fn networks() -> Vec<String> {
    vec!["127.0.0.1/32".into(), "::1/128".into()]
}

impl AgentConfig {
    /// Where others reach the control API.
    pub fn api_address(&self) -> String {
        self.api_advertise
            .clone()
            .unwrap_or_else(|| self.api_listen.clone())
    }

    /// Says what is wrong, if anything.
    pub fn validate(&self) -> Result<(), String> {
        if !self.peers.iter().any(|p| p.member == self.member) {
            return Err(format!(
                "node.peers does not list this member ({}): list every voter, this one included",
                self.member
            ));
        }
        let mut names: Vec<&MemberId> = self.peers.iter().map(|p| &p.member).collect();
        names.sort();
        if names.windows(2).any(|w| matches!(w, [a, b] if a == b)) {
            return Err("node.peers lists a member twice".into());
        }
        self.hooks.validate()?;
        self.initial
            .validate()
            .map_err(|e| format!("node.initial.{e}"))
    }
}

/// The files in the secrets directory; each holds one secret in its first line and is readable by its
/// owner alone.
#[derive(Clone, Debug)]
pub struct Secrets {
    /// Password of the superuser `postgres`.
    pub superuser: String,
    /// Password of `craton_replication`.
    pub replication: String,
    /// Password of `craton_proxy`.
    pub proxy: String,
    /// Password of `craton_rewind`.
    pub rewind: String,
    /// What the coordinators of the cluster know each other by.
    pub peers: String,
    /// The bearer token of the control API.
    pub api_token: String,
}

impl Secrets {
    /// The files' names, in the order of the fields.
    pub const FILES: [&'static str; 6] = [
        "superuser",
        "replication",
        "proxy",
        "rewind",
        "peers",
        "api-token",
    ];

    /// Reads all of them.
    pub fn read(dir: &Path) -> Result<Self, String> {
        let read = |name: &str| {
            let path = dir.join(name);
            let text = std::fs::read_to_string(&path)
                .map_err(|e| format!("cannot read the secret {}: {e}", path.display()))?;
            let secret = text.lines().next().unwrap_or_default().trim().to_owned();
            if secret.len() < 8 {
                return Err(format!(
                    "the secret in {} is shorter than 8 characters",
                    path.display()
                ));
            }
            Ok(secret)
        };
        let [superuser, replication, proxy, rewind, peers, api_token] = Self::FILES;
        Ok(Self {
            superuser: read(superuser)?,
            replication: read(replication)?,
            proxy: read(proxy)?,
            rewind: read(rewind)?,
            peers: read(peers)?,
            api_token: read(api_token)?,
        })
    }
}
