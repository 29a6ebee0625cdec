//! How a container starts: as root (or as who it is told to be) it reads its environment, puts its directories and
//! keys in order, gives everything away that it does not need, and becomes the first process, [`super::init`].

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use craton_console::front::AboutView;
use craton_console::{Client, ClientError};
use craton_core::MemberId;
use craton_trust::{Guest, Role};
use serde::{Deserialize, Serialize};

use super::environment::{Environment, Kind, is_secret};
use super::keys::{self, Holder};
use super::plan::{self, CLUSTER_DEFAULT, FRONT_PORT, Here, NODE_DIR, NodeNames};
use super::{adopt, daemon, recover, shown, stop};
use crate::cli::wait_for;
use crate::exit::{Problem, USAGE};
use crate::owner::{self, Account};

/// Files of this life of the container.
pub const RUN_DIR: &str = "/run/craton";

/// How long a node is waited for that tells the cluster's name.
const NAME_PATIENCE: Duration = Duration::from_secs(600);

/// Between two rounds of asking for it.
const NAME_PAUSE: Duration = Duration::from_millis(500);

/// What the processes of a container know of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Facts {
    /// Which image.
    pub kind: Kind,
    /// The cluster.
    pub cluster: String,
    /// The host's name.
    pub hostname: String,
    /// A node's names.
    pub node: Option<NodeNames>,
    /// The variables, files read.
    pub env: Environment,
}

impl Facts {
    fn path() -> PathBuf {
        Path::new(RUN_DIR).join("container.json")
    }

    /// Reads what the entry found out; `None` outside of a container.
    pub fn load() -> anyhow::Result<Option<Self>> {
        let path = Self::path();
        match std::fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text)
                .map(Some)
                .with_context(|| format!("{} cannot be read", path.display())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// As [`Self::load`], where there must be some.
    pub fn require() -> anyhow::Result<Self> {
        Self::load()?.ok_or_else(|| {
            let what = format!("there is no {}", Self::path().display());
            Problem::new(
                USAGE,
                what,
                "this command works inside Craton's containers, once they have started",
            )
            .into()
        })
    }

    fn store(&self) -> anyhow::Result<()> {
        craton_trust::files::write_secret(&Self::path(), &serde_json::to_string(self)?)?;
        Ok(())
    }

    /// The directory of the secrets.
    pub fn secrets() -> PathBuf {
        Path::new(RUN_DIR).join("secrets")
    }

    /// The agents that commands ask: this node's first.
    pub fn agents(&self) -> Vec<String> {
        let hosts: Vec<String> = match self.kind {
            Kind::Node => {
                let others = self
                    .node
                    .as_ref()
                    .map(|n| plan::others(&self.env, &n.host))
                    .unwrap_or_default();
                std::iter::once("127.0.0.1".to_owned())
                    .chain(others)
                    .collect()
            }
            Kind::Proxy => {
                let nodes = plan::backends(&self.env).unwrap_or_default();
                nodes.into_iter().map(|b| b.host).collect()
            }
            Kind::Backup => self.env.list("REPLICATION_HOST"),
        };
        hosts
            .into_iter()
            .map(|h| format!("{h}:{}", plan::API_PORT))
            .collect()
    }

    /// What this container says about itself.
    pub fn about(&self, fresh: bool) -> AboutView {
        let node = self.node.as_ref();
        AboutView {
            cluster: self.cluster.clone(),
            kind: self.kind.as_str().to_owned(),
            fresh,
            member: node.map(|n| n.member.as_str().to_owned()),
            node_name: node.map(|n| n.node_name.clone()),
            node_id: node.map(|n| n.node_id),
            priority: node.map(|n| n.priority),
            follows: node
                .and_then(|n| plan::told_to_follow(&self.env, &n.host))
                .map(ToOwned::to_owned),
        }
    }
}

fn usage(what: String) -> anyhow::Error {
    let hint = "docs/reference/environment.md lists the variables of the images";
    Problem::new(USAGE, what, hint).into()
}

fn read_file(path: &str) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|e| format!("cannot read {path}: {e}"))
}

/// `craton container node|proxy|backup`, the image's command. Does not return where all goes well.
pub fn run(kind: Kind) -> anyhow::Result<u8> {
    crate::daemons::log_to_stderr("info", false);
    stop::ends_the_start()?;
    let all = std::env::vars_os()
        .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
    let env = Environment::gather(kind, all, read_file).map_err(usage)?;
    plan::check::check(kind, &env).map_err(usage)?;
    for note in env.notes(kind) {
        tracing::info!("{note}");
    }
    let account = owner::is_root().then(owner::service_account).transpose()?;
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .context("cannot read the host's name")?
        .trim()
        .to_owned();
    let founds = plan::may_found(&env, env.or("CLUSTER_NODE_NETWORK_NAME", &hostname));
    directories(kind, &env, founds, account.as_ref())?;
    let node = (kind == Kind::Node)
        .then(|| node_names(&env, &hostname))
        .transpose()?;
    if kind == Kind::Proxy {
        if env.get("BACKENDS").is_none() {
            tracing::warn!(
                "BACKENDS is not set: {} is asked for the cluster",
                plan::BACKENDS_DEFAULT
            );
        }
        // Before anything is waited for: people look here when nothing comes up. What is wrong in the settings themselves
        // was found before; where the file cannot be written (another user, a read-only image), only it is missing.
        if let Err(error) = shown::write_pool_conf(&env) {
            tracing::warn!("{error:#}: it is only for people who look there, nothing reads it");
        }
    }
    let cluster = cluster_name(kind, &env, &hostname)?;
    let facts = Facts {
        kind,
        cluster,
        hostname: hostname.clone(),
        node,
        env,
    };
    let host = facts.node.as_ref().map_or(&hostname, |n| &n.host);
    let name = facts
        .node
        .as_ref()
        .map_or(hostname.as_str(), |n| n.member.as_str());
    let holder = Holder {
        kind,
        cluster: &facts.cluster,
        name,
        host,
    };
    let judge = |pem: &str| wait_for(is_authority_of(&facts.agents(), pem));
    for note in keys::prepare(&facts.env, &holder, &Facts::secrets(), &judge)? {
        if let Some(warning) = note.strip_prefix("WARNING: ") {
            tracing::warn!("{warning}");
        } else {
            tracing::info!("{note}");
        }
    }
    facts.store()?;
    if facts.env.is_on("SSH_ENABLE") {
        super::ssh::start(account.as_ref())?;
    }
    become_init(kind, &facts.env, account.as_ref())
}

fn node_names(env: &Environment, hostname: &str) -> anyhow::Result<NodeNames> {
    let record = Path::new(NODE_DIR).join("craton-member");
    let recorded = match std::fs::read_to_string(&record) {
        Ok(text) => Some(
            MemberId::new(text.trim()).map_err(|e| usage(format!("{}: {e}", record.display())))?,
        ),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(e) => return Err(e).with_context(|| format!("cannot read {}", record.display())),
    };
    let names = NodeNames::of(env, hostname, recorded.clone()).map_err(usage)?;
    if recorded.is_none() {
        craton_trust::files::write_secret(&record, &format!("{}\n", names.member))?;
    }
    Ok(names)
}

/// Makes the directories, for the user that everything runs as.
fn directories(
    kind: Kind,
    env: &Environment,
    founds: bool,
    account: Option<&Account>,
) -> anyhow::Result<()> {
    let major = std::env::var("PG_MAJOR").unwrap_or_default();
    if kind == Kind::Node {
        let volume = Path::new(NODE_DIR);
        let pgdata = std::env::var_os("PGDATA").map(PathBuf::from);
        if let Some(other) = pgdata.as_deref().filter(|p| **p != volume.join("data")) {
            tracing::info!(
                "PGDATA is {}; the data are in {}",
                other.display(),
                volume.join("data").display()
            );
        }
        // Before a file changes its owner.
        let found = adopt::look(volume, pgdata.as_deref(), volume.parent(), &major, founds)?;
        // Before everything gets its owner: what is made on the way is root's.
        if let Some(found) = found {
            adopt::take_over(volume, &found)?;
        }
    }
    let volume = match kind {
        Kind::Node => Some(PathBuf::from(NODE_DIR)),
        Kind::Backup => Some(PathBuf::from(env.or("BACKUP_DIR", "/var/backups"))),
        Kind::Proxy => None,
    };
    let own = [PathBuf::from(RUN_DIR), Facts::secrets()];
    for dir in volume.iter().cloned().chain(own) {
        std::fs::create_dir_all(&dir).map_err(|e| {
            let what = format!("cannot make {}: {e}", dir.display());
            Problem::machine(what, "where the container's own files cannot be written (read_only, user), mount a volume or a tmpfs there that its user owns")
        })?;
        if let Some(account) = account {
            // A volume of a former image or a mounted directory: its owner may be anybody.
            give(&dir, account)?;
            std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700))
                .with_context(|| format!("cannot make {} private", dir.display()))?;
        }
    }
    Ok(())
}

/// Gives a tree to the account; only what is not its own already is touched.
fn give(path: &Path, account: &Account) -> anyhow::Result<()> {
    let failed = || format!("cannot give {} to {}", path.display(), account.name);
    let meta = std::fs::symlink_metadata(path).with_context(failed)?;
    // The file system's own.
    if path.file_name().is_some_and(|n| n == "lost+found") {
        return Ok(());
    }
    if meta.uid() != account.uid {
        match std::os::unix::fs::lchown(path, Some(account.uid), Some(account.gid)) {
            Ok(()) => {}
            // Mounted so by somebody, into a directory of ours: it is not ours to write.
            Err(e) if e.kind() == std::io::ErrorKind::ReadOnlyFilesystem => {
                tracing::warn!("{}: {e}; it stays as it is", failed());
                return Ok(());
            }
            Err(e) => return Err(e).with_context(failed),
        }
    } else if meta.is_dir() && path != Path::new(NODE_DIR) && path != Path::new(RUN_DIR) {
        // Below a directory of its own everything was its own when it was last here.
        return Ok(());
    }
    if meta.is_dir() {
        for entry in std::fs::read_dir(path).with_context(failed)? {
            give(&entry?.path(), account)?;
        }
    }
    Ok(())
}

/// Where a node has its cluster's name from, if nobody says it.
#[derive(Clone, PartialEq, Eq, Debug)]
enum NameOf {
    /// Nobody has another one.
    Default,
    /// It was asked for once.
    Noted(String),
    /// The nodes that it is told of.
    Others,
}

/// A node that is told to follow another has that one's name. It asks while it has no data, and can do nothing without the
/// other anyway; later it must start on its own.
fn name_of(follows: bool, asks: bool, noted: Option<String>) -> NameOf {
    match noted {
        _ if follows && asks => NameOf::Others,
        Some(name) if follows => NameOf::Noted(name),
        _ => NameOf::Default,
    }
}

/// The name of a node's cluster where `CLUSTER_NAME` does not say it.
fn name_for_node(env: &Environment, hostname: &str) -> anyhow::Result<String> {
    let host = env.or("CLUSTER_NODE_NETWORK_NAME", hostname);
    let note = Path::new(NODE_DIR).join(recover::CLUSTER_NOTE);
    let noted = std::fs::read_to_string(&note).ok();
    let noted = noted.map(|n| n.trim().to_owned()).filter(|n| !n.is_empty());
    // Who was given a database makes the cluster.
    let asks = daemon::is_fresh() && recover::restored().is_none();
    let follows = plan::told_to_follow(env, host).is_some();
    match name_of(follows, asks, noted) {
        NameOf::Default => Ok(CLUSTER_DEFAULT.to_owned()),
        NameOf::Noted(name) => Ok(name),
        NameOf::Others => {
            let name = wait_for(ask_name(&plan::others(env, host)))?;
            craton_trust::files::write_secret(&note, &format!("{name}\n"))?;
            Ok(name)
        }
    }
}

/// The cluster's name: said, or a node's, which others ask for.
fn cluster_name(kind: Kind, env: &Environment, hostname: &str) -> anyhow::Result<String> {
    if let Some(name) = env.get("CLUSTER_NAME") {
        return Ok(name.to_owned());
    }
    let hosts: Vec<String> = match kind {
        Kind::Node => return name_for_node(env, hostname),
        Kind::Proxy => {
            let nodes = plan::proxy(env, &Here::default())
                .and_then(|_| plan::backends(env))
                .map_err(usage)?;
            nodes.into_iter().map(|b| b.host).collect()
        }
        Kind::Backup => {
            plan::backup(env, &Here::default(), &[]).map_err(usage)?;
            env.list("REPLICATION_HOST")
        }
    };
    wait_for(ask_name(&hosts))
}

/// Whether the certificates of the nodes come from this authority. Waits for a node that answers.
async fn is_authority_of(agents: &[String], pem: &str) -> anyhow::Result<bool> {
    let bundle = Facts::secrets().join("candidate.pem");
    craton_trust::files::write_secret(&bundle, pem)?;
    let guest = Guest::of_authorities(&bundle);
    std::fs::remove_file(&bundle)?;
    let client = Client::guest(guest?, Role::Node, None).with_timeout(Duration::from_secs(2));
    let until = tokio::time::Instant::now() + NAME_PATIENCE;
    loop {
        for agent in agents {
            match client.get_text(agent, "/health").await {
                Err(ClientError::Untrusted { .. }) => return Ok(false),
                Ok(_) | Err(ClientError::Refused { .. }) => return Ok(true),
                Err(_) => {}
            }
        }
        if tokio::time::Instant::now() >= until {
            let what = format!("none of {} answers", agents.join(", "));
            let hint = "start a node, or set CRATON_CLUSTER_SECRET";
            return Err(Problem::new(crate::exit::UNREACHABLE, what, hint).into());
        }
        tokio::time::sleep(NAME_PAUSE).await;
    }
}

async fn ask_name(hosts: &[String]) -> anyhow::Result<String> {
    let client = Client::new(None).with_timeout(Duration::from_secs(2));
    let until = tokio::time::Instant::now() + NAME_PATIENCE;
    let mut said = String::new();
    loop {
        for host in hosts {
            let at = format!("{host}:{FRONT_PORT}");
            match client.get_json::<AboutView>(&at, "/about").await {
                Ok(about) => return Ok(about.cluster),
                Err(error) if error.to_string() != said && said.is_empty() => {
                    said = error.to_string();
                    tracing::info!(
                        "waiting for a node that tells the cluster's name (CLUSTER_NAME is not set): {said}"
                    );
                }
                Err(_) => {}
            }
        }
        if tokio::time::Instant::now() >= until {
            let what = format!("none of {} answers on port {FRONT_PORT}", hosts.join(", "));
            return Err(Problem::new(
                crate::exit::UNREACHABLE,
                what,
                "start a node, or set CLUSTER_NAME",
            )
            .into());
        }
        tokio::time::sleep(NAME_PAUSE).await;
    }
}

/// This very process goes on as the first one, as the account, without what only the start needed to know.
fn become_init(kind: Kind, env: &Environment, account: Option<&Account>) -> anyhow::Result<u8> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("craton")
        .args(["container", "init", kind.as_str()]);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(is_secret) {
            command.env_remove(name);
        }
    }
    if let Some(level) = env.get("LOG_LEVEL")
        && std::env::var_os("CRATON_LOG").is_none()
    {
        command.env("CRATON_LOG", log_level(level));
    }
    if let Some(account) = account {
        // std clears the supplementary groups when root sets another uid.
        command
            .uid(account.uid)
            .gid(account.gid)
            .env("HOME", &account.home)
            .env("USER", &account.name)
            .env("LOGNAME", &account.name);
    }
    let error = command.exec();
    Err(error).context("cannot become the container's first process")
}

/// The old stack's word for a level.
fn log_level(word: &str) -> &'static str {
    match word.to_ascii_uppercase().as_str() {
        "DEBUG" => "debug",
        "WARNING" | "WARN" => "warn",
        "ERROR" | "ALERT" | "CRIT" | "EMERG" => "error",
        _ => "info",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_follows_another_has_its_clusters_name() {
        let noted = || Some("theirs".to_owned());
        let known = NameOf::Noted("theirs".to_owned());
        for (follows, asks, note, expected) in [
            (true, true, None, NameOf::Others),
            (true, true, noted(), NameOf::Others),
            // With data it starts also while nobody else runs.
            (true, false, noted(), known),
            // From before names were noted: it had the default.
            (true, false, None, NameOf::Default),
            (false, true, None, NameOf::Default),
            (false, false, noted(), NameOf::Default),
        ] {
            assert_eq!(
                name_of(follows, asks, note.clone()),
                expected,
                "{follows} {asks} {note:?}"
            );
        }
    }
}
