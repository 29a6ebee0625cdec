//! From what the entry found out to the running daemon: waits for what has to be there, writes the settings file,
//! and becomes the daemon.

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use craton_console::front::AboutView;
use craton_console::{Client, ClientError};
use craton_trust::files::write_secret;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::entry::{Facts, RUN_DIR};
use super::environment::{Environment, Kind};
use super::plan::initdb::{self, Makes};
use super::plan::{self, API_PORT, FRONT_PORT, Here, NODE_DIR, NodeNames, Plan};
use super::{recover, stop};
use crate::cli::wait_for;
use crate::exit::{Problem, REFUSED, UNREACHABLE, USAGE};

/// A node that may make the cluster waits so long for partners that neither answer nor are known not to run.
const PARTNERS_PATIENCE: Duration = Duration::from_secs(10);
/// Between two rounds of asking.
const ASK_PAUSE: Duration = Duration::from_millis(250);
/// How long one answer may take.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);

/// Present from when a node makes the cluster until the roles and databases of its environment are made.
pub fn first_start_marker() -> PathBuf {
    Path::new(NODE_DIR).join("first-start")
}

/// Present while the node has no data.
pub fn is_fresh() -> bool {
    !Path::new(NODE_DIR).join("coordinator").exists()
}

/// In the marker where the database was there before the cluster.
pub const BROUGHT: &str = "adopted\n";

/// A database that Craton has never run.
fn has_strange_data() -> bool {
    let data = Path::new(NODE_DIR).join("data");
    data.join("PG_VERSION").exists() && !data.join(craton_pg::adopt::MARK).exists()
}

/// Hosts of the cluster that a backup daemon has met.
pub fn known_hosts(facts: &Facts) -> PathBuf {
    Path::new(facts.env.or("BACKUP_DIR", "/var/backups")).join(".craton-nodes")
}

/// `craton container daemon KIND`. Does not return where all goes well.
pub fn run(kind: Kind) -> anyhow::Result<u8> {
    crate::daemons::log_to_stderr("info", false);
    stop::ends_the_start()?;
    let facts = Facts::require()?;
    let secrets = Facts::secrets().display().to_string();
    let here = Here {
        secrets: &secrets,
        hostname: &facts.hostname,
        cluster: &facts.cluster,
    };
    let plan = match kind {
        Kind::Node => node(&facts, &secrets)?,
        Kind::Proxy => {
            wait_for(enough_backends(&facts))?;
            plan::proxy(&facts.env, &here).map_err(wrong)?
        }
        Kind::Backup => {
            let known = std::fs::read_to_string(known_hosts(&facts)).unwrap_or_default();
            let known: Vec<String> = known.lines().map(ToOwned::to_owned).collect();
            plan::backup(&facts.env, &here, &known).map_err(wrong)?
        }
    };
    let file = Path::new(RUN_DIR).join("craton.toml");
    write_secret(&file, &plan.text())?;
    say_once(&plan)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("craton");
    match kind {
        Kind::Node => command.arg("node"),
        Kind::Proxy => command.arg("proxy"),
        Kind::Backup => command.args(["backup", "daemon"]),
    };
    let error = command.arg("--config").arg(&file).exec();
    Err(error).context("cannot become the daemon")
}

fn wrong(what: String) -> anyhow::Error {
    Problem::new(
        USAGE,
        what,
        "docs/reference/environment.md lists the variables of the images",
    )
    .into()
}

/// A daemon that was killed is started again; what there is to say about the environment was said before.
fn say_once(plan: &Plan) -> anyhow::Result<()> {
    let said = Path::new(RUN_DIR).join("notes");
    let notes = plan.notes.join("\n");
    if std::fs::read_to_string(&said).is_ok_and(|before| before == notes) {
        return Ok(());
    }
    for note in &plan.notes {
        tracing::info!("{note}");
    }
    write_secret(&said, &notes)?;
    Ok(())
}

fn node(facts: &Facts, secrets: &str) -> anyhow::Result<Plan> {
    let names = facts.node.as_ref().context("this is no node")?;
    let known = parameters();
    let mut plan =
        plan::node(&facts.env, names, &facts.cluster, secrets, known.as_ref()).map_err(wrong)?;
    if let Some(upstream) = wait_for(second_level(&facts.env, names))? {
        plan.set("upstream", upstream, Some("REPLICATION_PRIMARY_HOST"));
    }
    if let Some(database) = recover::restored() {
        return begin_with(&database, &facts.env, names, plan);
    }
    let may_found = plan::may_found(&facts.env, &names.host);
    let brings = may_found && has_strange_data();
    if brings {
        plan.set("first_start", "adopt", None);
    }
    if is_fresh() && may_found {
        let partners = plan::others(&facts.env, &names.host);
        if wait_for(cluster_is_known(&partners))? {
            tracing::info!("a partner knows the cluster: this node joins it");
        } else {
            tracing::info!("no partner knows a cluster: this node makes one");
            plan.settings.retain(|s| s.key != "join");
            write_secret(&first_start_marker(), if brings { BROUGHT } else { "" })?;
        }
    }
    if may_found {
        initdb::set(&facts.env, &mut plan, makes()).map_err(wrong)?;
    }
    Ok(plan)
}

/// Also where an agent died between its first file and initdb.
fn makes() -> Makes {
    let data = Path::new(NODE_DIR).join("data/PG_VERSION");
    if first_start_marker().exists() && !data.exists() {
        Makes::Now
    } else {
        Makes::NotNow
    }
}

/// The member that a node of the second level streams from: it has no partners, and the one that it is told to follow
/// is told to follow another. What was found out once is noted, for a start without that one.
async fn second_level(env: &Environment, names: &NodeNames) -> anyhow::Result<Option<String>> {
    let told = plan::told_to_follow(env, &names.host);
    let Some(host) = told.filter(|_| env.get("PARTNER_NODES").is_none()) else {
        return Ok(None);
    };
    let note = Path::new(NODE_DIR).join("craton-upstream");
    let client = Client::new(None).with_timeout(ASK_TIMEOUT);
    let until = Instant::now() + PARTNERS_PATIENCE;
    while Instant::now() < until {
        let at = format!("{host}:{FRONT_PORT}");
        let Ok(about) = client.get_json::<AboutView>(&at, "/about").await else {
            tokio::time::sleep(ASK_PAUSE).await;
            continue;
        };
        let upstream = about.member.filter(|_| about.follows.is_some());
        let text = upstream.as_deref().unwrap_or_default();
        if std::fs::read_to_string(&note).ok().as_deref() != Some(text) {
            std::fs::write(&note, text)
                .with_context(|| format!("cannot write {}", note.display()))?;
        }
        return Ok(upstream);
    }
    let noted = std::fs::read_to_string(&note).unwrap_or_default();
    Ok(Some(noted).filter(|n| !n.is_empty()))
}

/// A node that was given a restored database makes a cluster of it, whoever made the former one. Never beside one that
/// is still there.
/// It is there until the agent has taken it, also where an agent was killed in between.
fn begin_with(
    database: &Path,
    env: &Environment,
    names: &NodeNames,
    mut plan: Plan,
) -> anyhow::Result<Plan> {
    let partners = plan::others(env, &names.host);
    if is_fresh() && wait_for(cluster_is_known(&partners))? {
        let what = "this node was given a restored database, and a partner still belongs to the former cluster";
        let hint = "stop the other nodes and run `craton container set-aside` in each one's volume; docs/guide/docker.md shows it";
        return Err(Problem::new(REFUSED, what, hint).into());
    }
    recover::begin_with(&mut plan, names, database);
    Ok(plan)
}

/// The names of PostgreSQL's parameters; `None` where it does not tell.
fn parameters() -> Option<BTreeSet<String>> {
    let major = std::env::var("PG_MAJOR").ok()?;
    let program = format!("/usr/lib/postgresql/{major}/bin/postgres");
    let output = Command::new(program)
        .arg("--describe-config")
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let names: BTreeSet<String> = text
        .lines()
        .filter_map(|line| line.split('\t').next())
        .map(str::to_ascii_lowercase)
        .collect();
    (names.len() > 100).then_some(names)
}

/// What a partner says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Partner {
    /// It belongs to a cluster.
    Member,
    /// It runs and has nothing.
    Fresh,
    /// Its name is known, and it does not answer (yet).
    Silent,
}

async fn ask(client: &Client, host: &str) -> Partner {
    let at = format!("{host}:{FRONT_PORT}");
    match client.get_json::<AboutView>(&at, "/about").await {
        Ok(about) if about.fresh => Partner::Fresh,
        Ok(_) | Err(ClientError::Malformed { .. } | ClientError::Refused { .. }) => Partner::Member,
        Err(_) => Partner::Silent,
    }
}

/// True if one of the partners belongs to a cluster. All that are fresh settle it, too; the silent are waited for.
async fn cluster_is_known(partners: &[String]) -> anyhow::Result<bool> {
    let client = Client::new(None).with_timeout(ASK_TIMEOUT);
    let until = Instant::now() + PARTNERS_PATIENCE;
    loop {
        let mut silent = 0_usize;
        for host in partners {
            match ask(&client, host).await {
                Partner::Member => return Ok(true),
                Partner::Fresh => {}
                Partner::Silent => silent += 1,
            }
        }
        if silent == 0 || Instant::now() >= until {
            return Ok(false);
        }
        tokio::time::sleep(ASK_PAUSE).await;
    }
}

/// Waits for as many nodes as the proxy is to start with.
async fn enough_backends(facts: &Facts) -> anyhow::Result<()> {
    let number = |name: &str| facts.env.number::<u64>(name).map_err(wrong);
    let least = usize::try_from(number("REQUIRE_MIN_BACKENDS")?.unwrap_or(0))?;
    if least == 0 {
        return Ok(());
    }
    let wait = Duration::from_secs(number("WAIT_BACKEND_TIMEOUT")?.unwrap_or(120));
    let hosts = plan::backends(&facts.env).map_err(wrong)?;
    let until = Instant::now() + wait;
    loop {
        let mut reached = 0_usize;
        for backend in &hosts {
            let connect = TcpStream::connect((backend.host.as_str(), API_PORT));
            if matches!(timeout(ASK_TIMEOUT, connect).await, Ok(Ok(_))) {
                reached += 1;
            }
        }
        if reached >= least {
            return Ok(());
        }
        if Instant::now() >= until {
            let what = format!(
                "{reached} of {} BACKENDS can be reached after {} s, REQUIRE_MIN_BACKENDS is {least}",
                hosts.len(),
                wait.as_secs()
            );
            return Err(Problem::new(
                UNREACHABLE,
                what,
                "start the nodes, or lower REQUIRE_MIN_BACKENDS",
            )
            .into());
        }
        tokio::time::sleep(ASK_PAUSE).await;
    }
}
