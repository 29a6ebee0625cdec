//! Where everything of a local cluster is: one directory, one file that says it is ours.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use craton_agent::Place;
use craton_core::MemberId;
use serde::{Deserialize, Serialize};

use crate::exit::{Problem, UNREACHABLE};

/// The file that marks a directory as ours and describes the cluster in it.
pub const CLUSTER_FILE: &str = "craton-cluster.toml";

/// The format of [`ClusterFile`] that this version writes.
pub const FORMAT: u32 = 1;

/// How many members a local cluster can have: one digit of the port numbers.
pub const MEMBERS_MAX: u8 = 9;

/// Everything `craton up` may create in a cluster's directory; `--purge` removes nothing else.
pub const OWN_ENTRIES: [&str; 9] = [
    "members",
    "witness",
    "backup",
    "bin",
    "conf",
    "log",
    "run",
    "secrets",
    CLUSTER_FILE,
];

/// The name of a local cluster's witness.
pub const WITNESS_NAME: &str = "w";

/// The address that everything of a local cluster listens on.
pub const HOST: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// What a local cluster is made of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterFile {
    /// Format of this file.
    pub format: u32,
    /// Cluster name.
    pub name: String,
    /// The first of its ports.
    pub base_port: u16,
    /// Its members.
    pub members: Vec<MemberId>,
    /// Those of them that joined the running cluster.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub joined: Vec<MemberId>,
    /// `async`, `quorum` or `strict`.
    pub durability: String,
    /// Commits may wait for the backup daemon as for a standby.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub synchronous_backup: bool,
    /// There is a witness.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub witness: bool,
    /// Its database was there before it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub adopted: bool,
    /// Whether the sample map is (to be) loaded.
    pub sample: bool,
    /// PostgreSQL's programs.
    pub postgres_bin: PathBuf,
    /// Where its records are; where they began, if somebody moved them from elsewhere.
    #[serde(default, skip_serializing_if = "is_embedded")]
    pub coordinator: Place,
}

fn is_embedded(place: &Place) -> bool {
    *place == Place::default()
}

/// A local cluster's directory and description.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    /// The directory, absolute.
    pub root: PathBuf,
    /// The description.
    pub cluster: ClusterFile,
}

impl Layout {
    /// Reads the description of the cluster in `root`; `None` where there is none.
    pub fn load(root: &Path) -> anyhow::Result<Option<Self>> {
        let path = root.join(CLUSTER_FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
        };
        let cluster: ClusterFile = toml::from_str(&text)
            .with_context(|| format!("{} is not a cluster description", path.display()))?;
        anyhow::ensure!(
            cluster.format == FORMAT,
            "{} has format {}, this craton reads format {FORMAT}; use the version that made it",
            path.display(),
            cluster.format
        );
        Ok(Some(Self {
            root: root.to_owned(),
            cluster,
        }))
    }

    /// Writes the description.
    pub fn write(&self) -> anyhow::Result<()> {
        let text = toml::to_string(&self.cluster)?;
        crate::secrets::write_private(&self.root.join(CLUSTER_FILE), &text)
    }

    /// Adds members until there are `count`, under names that have not been used here.
    pub fn grow(&mut self, count: u8) -> anyhow::Result<Vec<MemberId>> {
        let mut added = Vec::new();
        for name in member_names(MEMBERS_MAX)? {
            if self.cluster.members.len() >= usize::from(count) {
                break;
            }
            if !self.cluster.members.contains(&name) && !self.member(&name).exists() {
                self.cluster.members.push(name.clone());
                self.cluster.joined.push(name.clone());
                added.push(name);
            }
        }
        Ok(added)
    }

    /// Reads the description, or says that there is no cluster.
    pub fn require(root: &Path) -> anyhow::Result<Self> {
        Self::load(root)?.ok_or_else(|| {
            let what = format!("there is no cluster in {}", root.display());
            let hint = "`craton up` starts one there; --dir or CRATON_DIR names another directory";
            Problem::new(UNREACHABLE, what, hint).into()
        })
    }

    /// Settings files of the daemons.
    pub fn conf(&self) -> PathBuf {
        self.root.join("conf")
    }

    /// The settings file of one daemon.
    pub fn conf_of(&self, daemon: &Daemon) -> PathBuf {
        self.conf().join(format!("{}.toml", daemon.name()))
    }

    /// Passwords and keys.
    pub fn secrets(&self) -> PathBuf {
        self.root.join("secrets")
    }

    /// One secret.
    pub fn secret(&self, name: &str) -> PathBuf {
        self.secrets().join(name)
    }

    /// Logs.
    pub fn log(&self) -> PathBuf {
        self.root.join("log")
    }

    /// The log of one daemon (or of the supervisor).
    pub fn log_of(&self, name: &str) -> PathBuf {
        self.log().join(format!("{name}.log"))
    }

    /// Locks, pid files and hold files.
    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// Our copy of the binary, which daemons run from.
    pub fn binary(&self) -> PathBuf {
        self.root.join("bin").join("craton")
    }

    /// A member's directory.
    pub fn member(&self, id: &MemberId) -> PathBuf {
        self.root.join("members").join(id.as_str())
    }

    /// The witness's directory.
    pub fn witness(&self) -> PathBuf {
        self.root.join("witness")
    }

    /// The backup repository.
    pub fn repository(&self) -> PathBuf {
        self.root.join("backup")
    }

    /// All daemons of this cluster.
    pub fn daemons(&self) -> Vec<Daemon> {
        let mut daemons: Vec<Daemon> = self
            .cluster
            .members
            .iter()
            .cloned()
            .map(Daemon::Node)
            .collect();
        if self.cluster.witness {
            daemons.push(Daemon::Witness);
        }
        daemons.extend([Daemon::Proxy, Daemon::Backup]);
        daemons
    }

    fn port(&self, offset: u16) -> u16 {
        self.cluster.base_port.saturating_add(offset)
    }

    /// By its name, so that it stays the same while others come and go.
    fn member_number(id: &MemberId) -> u16 {
        let letter = id.as_str().bytes().next().unwrap_or(b'a');
        u16::from(letter.saturating_sub(b'a')) + 1
    }

    /// The proxy's port for writes.
    pub fn proxy_port(&self) -> u16 {
        self.port(2)
    }

    /// The proxy's port for reads.
    pub fn proxy_read_port(&self) -> u16 {
        self.port(3)
    }

    /// A member's PostgreSQL port.
    pub fn postgres_port(&self, id: &MemberId) -> u16 {
        self.port(10) + Self::member_number(id)
    }

    /// A member's agent API port.
    pub fn api_port(&self, id: &MemberId) -> u16 {
        self.port(20) + Self::member_number(id)
    }

    /// A member's coordinator port.
    pub fn coordinator_port(&self, id: &MemberId) -> u16 {
        self.port(30) + Self::member_number(id)
    }

    /// The proxy's HTTP port.
    pub fn proxy_http_port(&self) -> u16 {
        self.port(41)
    }

    /// The backup daemon's HTTP port.
    pub fn backup_http_port(&self) -> u16 {
        self.port(42)
    }

    /// The witness's HTTP port.
    pub fn witness_http_port(&self) -> u16 {
        self.port(43)
    }

    /// The witness's coordinator port.
    pub fn witness_port(&self) -> u16 {
        self.port(40)
    }

    /// All agents' API addresses.
    pub fn api_addresses(&self) -> Vec<String> {
        self.cluster
            .members
            .iter()
            .map(|m| address(self.api_port(m)))
            .collect()
    }

    /// Every port with what it is for.
    pub fn ports(&self) -> Vec<(u16, String)> {
        let mut ports = vec![
            (self.proxy_port(), "proxy, writes".to_owned()),
            (self.proxy_read_port(), "proxy, reads".to_owned()),
            (self.proxy_http_port(), "proxy, metrics".to_owned()),
            (
                self.backup_http_port(),
                "backup, metrics and API".to_owned(),
            ),
        ];
        if self.cluster.witness {
            ports.push((self.witness_http_port(), "witness, metrics".to_owned()));
            ports.push((self.witness_port(), "coordinator of the witness".to_owned()));
        }
        for member in &self.cluster.members {
            ports.push((
                self.postgres_port(member),
                format!("PostgreSQL of member {member}"),
            ));
            ports.push((self.api_port(member), format!("agent of member {member}")));
            ports.push((
                self.coordinator_port(member),
                format!("coordinator of member {member}"),
            ));
        }
        ports
    }
}

/// `host:port` on loopback.
pub fn address(port: u16) -> String {
    format!("{HOST}:{port}")
}

/// One of the processes that the supervisor keeps running.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Daemon {
    /// The agent of a member.
    Node(MemberId),
    /// The proxy.
    Proxy,
    /// The backup daemon.
    Backup,
    /// The witness.
    Witness,
}

impl Daemon {
    /// The name in files and logs.
    pub fn name(&self) -> String {
        match self {
            Self::Node(member) => format!("node-{member}"),
            Self::Proxy => "proxy".to_owned(),
            Self::Backup => "backup".to_owned(),
            Self::Witness => "witness".to_owned(),
        }
    }

    /// The sub-command that runs it.
    pub fn arguments(&self) -> &'static [&'static str] {
        match self {
            Self::Node(_) => &["node"],
            Self::Proxy => &["proxy"],
            Self::Backup => &["backup", "daemon"],
            Self::Witness => &["witness"],
        }
    }
}

/// The directory of the local cluster: as given, else `/var/lib/craton` for root, else under the user's
/// data directory. Always absolute.
pub fn directory(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    let dir = match given {
        Some(dir) => dir.to_owned(),
        None if rustix::process::geteuid().is_root() => PathBuf::from("/var/lib/craton"),
        None => {
            let data = std::env::var_os("XDG_DATA_HOME")
                .map(PathBuf::from)
                .filter(|p| p.is_absolute());
            let data = data.or_else(|| std::env::home_dir().map(|home| home.join(".local/share")));
            data.context(
                "there is no home directory to keep a cluster in; name a directory with --dir",
            )?
            .join("craton")
        }
    };
    std::path::absolute(&dir).with_context(|| format!("cannot make {} absolute", dir.display()))
}

/// The names of the members of a new local cluster: a, b, c, …
pub fn member_names(count: u8) -> anyhow::Result<Vec<MemberId>> {
    if count == 0 || count > MEMBERS_MAX {
        anyhow::bail!(
            "--members {count} is out of range: a local cluster has 1 to {MEMBERS_MAX} members"
        );
    }
    let names = ('a'..='z')
        .take(usize::from(count))
        .map(|c| MemberId::new(c.to_string()));
    names.collect::<Result<_, _>>().map_err(anyhow::Error::msg)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn layout(members: u8) -> Layout {
        let cluster = ClusterFile {
            format: FORMAT,
            name: "local".into(),
            base_port: 6430,
            members: member_names(members).unwrap(),
            joined: Vec::new(),
            durability: "quorum".into(),
            synchronous_backup: false,
            witness: true,
            adopted: false,
            sample: true,
            postgres_bin: "/usr/lib/postgresql/15/bin".into(),
            coordinator: Place::default(),
        };
        Layout {
            root: "/x".into(),
            cluster,
        }
    }

    #[test]
    fn ports_are_distinct_and_where_the_documentation_says() {
        let full = layout(MEMBERS_MAX);
        let ports: BTreeSet<u16> = full.ports().iter().map(|(p, _)| *p).collect();
        assert_eq!(ports.len(), full.ports().len());
        let b = MemberId::new("b").unwrap();
        assert_eq!((full.proxy_port(), full.proxy_read_port()), (6432, 6433));
        assert_eq!(
            (
                full.postgres_port(&b),
                full.api_port(&b),
                full.coordinator_port(&b)
            ),
            (6442, 6452, 6462)
        );
        assert_eq!(
            (full.proxy_http_port(), full.backup_http_port()),
            (6471, 6472)
        );
    }

    #[test]
    fn the_description_round_trips_and_strangers_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Layout::load(dir.path()).unwrap().is_none());
        let written = Layout {
            root: dir.path().to_owned(),
            cluster: layout(3).cluster,
        };
        std::fs::write(
            dir.path().join(CLUSTER_FILE),
            toml::to_string(&written.cluster).unwrap(),
        )
        .unwrap();
        assert_eq!(Layout::load(dir.path()).unwrap(), Some(written));
        std::fs::write(dir.path().join(CLUSTER_FILE), "format = 1\nwhat = 2\n").unwrap();
        assert!(Layout::load(dir.path()).is_err());
    }

    #[test]
    fn member_counts() {
        assert_eq!(member_names(2).unwrap().len(), 2);
        assert!(member_names(0).is_err() && member_names(10).is_err());
    }
}
