//! The agent's configuration: the `[node]` table of `craton.toml`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use craton_coordinator::place::Place;
use craton_core::MemberId;
pub use craton_core::observe::FirstStart;
use craton_core::settings::Settings;
use craton_pg::InitArgs;
use craton_trust::TlsSettings;
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

/// Whether a member that joined gets a say in the coordinator.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VoterWish {
    /// While that makes the number of voters odd: an even number survives no more losses than one less.
    #[default]
    Auto,
    /// In any case.
    Always,
    /// Never.
    Never,
}

/// The `[node.clone]` table: how an empty data directory is filled.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CloneConfig {
    /// Kilobytes a second that a copy from another member may take, 32 to 1048576; as fast as it goes if not
    /// given.
    pub max_rate_kb: Option<u32>,
    /// Where this host sees the backup repository: copies come from there first, so that no member is loaded.
    pub repository: Option<PathBuf>,
    /// A newest backup that is older than this is not used, hours; 48 if not given.
    pub repository_age_max_h: Option<u32>,
    /// A former leader is cloned anew, never rewound. What only it had is kept all the same.
    #[serde(skip_serializing_if = "is_false")]
    pub over_rewind: bool,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_false(on: &bool) -> bool {
    !*on
}

impl CloneConfig {
    /// See [`Self::repository_age_max_h`].
    pub fn age_max_h(&self) -> u32 {
        self.repository_age_max_h.unwrap_or(48)
    }

    fn validate(&self) -> Result<(), String> {
        match self.max_rate_kb {
            Some(rate) if !(32..=1_048_576).contains(&rate) => Err(format!(
                "node.clone.max_rate_kb = {rate} is out of range: use 32 to 1048576 (kilobytes a second)"
            )),
            _ => Ok(()),
        }
    }
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
    /// Under which `host:port` others reach the coordinator; as `peers` says, else the listen address, if not given.
    #[serde(default)]
    pub peer_advertise: Option<String>,
    /// The voters that a new cluster begins with, this member included. Later it is only where the others are
    /// looked for first: who takes part is in the coordinator.
    #[serde(default)]
    pub peers: Vec<Peer>,
    /// Control APIs of members, `host:port`, one of which is asked to take this member in when it starts with an
    /// empty directory. With this, `peers` may be left out.
    #[serde(default)]
    pub join: Vec<String>,
    /// Whether a member that joined gets a say in the coordinator.
    #[serde(default)]
    pub voter: VoterWish,
    /// Where a new cluster keeps its records: in the agents themselves, or in an etcd.
    #[serde(default, skip_serializing_if = "is_embedded")]
    pub coordinator: Place,
    /// Preference in elections, greater is better; 0: never the leader.
    #[serde(default = "priority")]
    pub priority: u32,
    /// Never the leader, whatever `priority` says.
    #[serde(default)]
    pub nofailover: bool,
    /// Proxies send no reads here: a member for reports, backups or a second site. `noloadbalance` is the same.
    #[serde(default, alias = "noloadbalance")]
    pub noload: bool,
    /// The standby that this member streams from, to spare the leader or a long line. While that one does not stream
    /// from the leader, this member does. Such a member is not waited for by commits, and so never elected by itself.
    #[serde(default, alias = "replicatefrom")]
    pub upstream: Option<MemberId>,
    /// What this member does while there is no cluster: `make` (one of the members makes an empty database), `adopt`
    /// (the PostgreSQL data directory that stands in `data` below `dir` becomes the cluster's database), `wait` (nothing:
    /// another member founds the cluster). A member that `peers` does not list waits in any case.
    #[serde(default, skip_serializing_if = "is_make")]
    pub first_start: FirstStart,
    /// Take logins whose passwords are stored as MD5, too (an adopted database may have such). SCRAM is asked for
    /// wherever a role has it. Set it alike on all members.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub md5_passwords: bool,
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
    /// A data directory, stopped in order and on the file system of `dir`, that becomes the database of a new cluster
    /// instead of an empty one: what `craton restore --finish` made. It is moved; looked at only while there is no
    /// cluster.
    #[serde(default)]
    pub initial_data: Option<PathBuf>,
    /// Arguments of initdb, `["--locale=de_DE.UTF-8"]`, for the database that a new cluster begins with; of no meaning
    /// later. Locale and encoding may be chosen (`--locale`, `--lc-*`, `--locale-provider`, `--icu-locale`,
    /// `--icu-rules`, `--builtin-locale`, `--encoding`, `--text-search-config`, `--no-locale`); where none is, they are
    /// `C.UTF-8` and `UTF8`. Any of `peers` may make the database: set it alike on all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub initdb_args: Vec<String>,
    /// How an empty data directory is filled.
    #[serde(default)]
    pub clone: CloneConfig,
    /// A program that is told of changes of the role, see `[node.hooks]`.
    #[serde(default)]
    pub hooks: HooksConfig,
    /// Where each of these was written (`craton.toml:12`), by its dotted name; for people.
    #[serde(skip)]
    pub origins: BTreeMap<String, String>,
    /// The program that is started as the fence (`<program> fence …`); the running one if not given.
    #[serde(default)]
    pub fence_program: Option<PathBuf>,
    /// Certificates, where they are not `authority.pem` and `node-MEMBER.pem` in the directory of the secrets.
    #[serde(default, skip_serializing_if = "is_default")]
    pub tls: TlsSettings,
    /// `off`, `automatic` or `required`: whether the fence feeds the host's watchdog device, which restarts
    /// the host if PostgreSQL could outlive its lease. One member a host may use it.
    #[serde(default)]
    pub watchdog: WatchdogMode,
    /// The watchdog device.
    #[serde(default = "watchdog_device")]
    pub watchdog_device: PathBuf,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_make(first: &FirstStart) -> bool {
    *first == FirstStart::Make
}

fn is_default(tls: &TlsSettings) -> bool {
    *tls == TlsSettings::default()
}

fn is_embedded(place: &Place) -> bool {
    *place == Place::default()
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

    /// What it does while there is no cluster. One that only joins founds none: those that it joins may be at odds with
    /// the data directory that they are to bring, and an empty database must not come in its place.
    pub fn effective_first_start(&self) -> FirstStart {
        let listed = self.peers.iter().any(|p| p.member == self.member);
        match self.first_start {
            FirstStart::Make if !listed => FirstStart::Wait,
            wish => wish,
        }
    }

    /// Preference in elections: 0 with `nofailover`.
    pub fn effective_priority(&self) -> u32 {
        if self.nofailover { 0 } else { self.priority }
    }

    /// Under which address others reach the coordinator.
    pub fn peer_address(&self) -> String {
        let listed = self.peers.iter().find(|p| p.member == self.member);
        self.peer_advertise
            .clone()
            .or_else(|| listed.map(|p| p.address.clone()))
            .unwrap_or_else(|| self.peer_listen.clone())
    }

    /// What a new cluster is made with, or which argument it cannot be.
    pub fn initdb_args(&self) -> Result<InitArgs, String> {
        InitArgs::parse(&self.initdb_args).map_err(|e| format!("node.initdb_args: {e}"))
    }

    /// Says what is wrong, if anything.
    pub fn validate(&self) -> Result<(), String> {
        if self.join.is_empty() && !self.peers.iter().any(|p| p.member == self.member) {
            return Err(format!(
                "node.peers does not list this member ({}): for a new cluster list every voter, this one included; to join one, name its members' APIs in node.join",
                self.member
            ));
        }
        let mut names: Vec<&MemberId> = self.peers.iter().map(|p| &p.member).collect();
        names.sort();
        if names.windows(2).any(|w| matches!(w, [a, b] if a == b)) {
            return Err("node.peers lists a member twice".into());
        }
        self.coordinator
            .validate()
            .map_err(|e| format!("node.{e}"))?;
        if self.upstream.as_ref() == Some(&self.member) {
            return Err("node.upstream is this member itself: name another one, or none".into());
        }
        self.initdb_args()?;
        self.clone.validate()?;
        self.hooks.validate()?;
        self.initial
            .validate()
            .map_err(|e| format!("node.initial.{e}"))
    }
}

/// The files in the secrets directory; each holds one secret in its first line and is readable by its
/// owner alone.
#[derive(Clone)]
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
    /// The bearer token of the control API; without it only certificates open it.
    pub api_token: Option<String>,
}

/// Passwords stay out of logs.
impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secrets(…)")
    }
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
        let read = |name: &str| read_secret(dir, name);
        let [superuser, replication, proxy, rewind, peers, api_token] = Self::FILES;
        let api_token = if dir.join(api_token).exists() {
            Some(read(api_token)?)
        } else {
            None
        };
        Ok(Self {
            superuser: read(superuser)?,
            replication: read(replication)?,
            proxy: read(proxy)?,
            rewind: read(rewind)?,
            peers: read(peers)?,
            api_token,
        })
    }
}

/// One secret of a directory.
pub(crate) fn read_secret(dir: &Path, name: &str) -> Result<String, String> {
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
}
