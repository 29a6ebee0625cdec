//! `craton adopt`, and `craton up --adopt`: a data directory that was there before the cluster founds it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use clap::Subcommand;
use craton_pg::{Adoptable, Binaries, ClusterState, Inspected, adopt};
use serde::Serialize;
use tokio::time::{Instant, sleep};
use tokio_postgres::NoTls;

mod follow;

pub use follow::{FollowArgs, TakeoverArgs};

use crate::access::Access;
use crate::exit::{self, NOT_IN_TIME, Problem, REFUSED};
use crate::layout::Layout;
use crate::{output, preflight, secrets};

/// How long the adopted database may take to be open; what is then missing the start itself says.
const OPEN_TIMEOUT: Duration = Duration::from_secs(120);

/// How often is looked.
const LOOK: Duration = Duration::from_millis(100);

/// `craton adopt`
#[derive(Subcommand, Debug)]
pub enum AdoptCommand {
    /// Say whether a data directory can found a cluster, and what would become of it; changes nothing
    ///
    /// Exit code 0: it can; 4: not as it is, and why. Run it as the directory's owner or as root.
    Check {
        /// The data directory
        #[arg(value_name = "DIRECTORY")]
        directory: PathBuf,
        /// Its configuration, where that stands elsewhere (Debian: /etc/postgresql/15/main/postgresql.conf)
        #[arg(long, value_name = "FILE")]
        config_file: Option<PathBuf>,
    },
    /// Copy a running primary of another system into the member's directory, and follow it as a standby
    ///
    /// The settings are those of the member that is to found the cluster ([node], first_start = "adopt"), whose agent
    /// does not run yet. PostgreSQL goes on following when the command has ended; the command may be repeated.
    Follow(FollowArgs),
    /// Wait until the followed primary has been shut down in order, and promote what has all of its WAL
    ///
    /// Then start the member's agent (--then does it): it founds the cluster with this database. Whoever has not seen
    /// the primary's shutdown is not promoted.
    Takeover(TakeoverArgs),
}

/// What was found, for `--json`.
#[derive(Serialize)]
struct View<'a> {
    adoptable: bool,
    refused: Option<&'a str>,
    system_identifier: Option<String>,
    timeline: Option<u32>,
    carried: Option<&'a BTreeMap<String, String>>,
    notes: &'a [String],
}

/// Runs the command.
pub fn run(command: &AdoptCommand, json: bool) -> anyhow::Result<u8> {
    let (directory, config_file) = match command {
        AdoptCommand::Check {
            directory,
            config_file,
        } => (directory, config_file),
        AdoptCommand::Follow(args) => return follow::follow(args),
        AdoptCommand::Takeover(args) => return follow::takeover(args),
    };
    let binaries = binaries_for(directory)?;
    let config_file = config_file.clone();
    let config_file = config_file.unwrap_or_else(|| directory.join("postgresql.conf"));
    let found = adopt::inspect_with(directory, &config_file, &binaries)?;
    if json {
        output::json(&view(&found))?;
    } else {
        output::line(render(directory, &found));
    }
    Ok(if found.is_ok() { exit::OK } else { REFUSED })
}

fn view(found: &Inspected) -> View<'_> {
    let good = found.as_ref().ok();
    View {
        adoptable: good.is_some(),
        refused: found.as_ref().err().map(String::as_str),
        system_identifier: good.map(|a| a.control.system_identifier.to_string()),
        timeline: good.map(|a| a.control.timeline.0),
        carried: good.map(|a| &a.carried),
        notes: good.map_or(&[], |a| &a.notes),
    }
}

fn render(directory: &Path, found: &Inspected) -> String {
    let at = directory.display();
    match found {
        Err(why) => format!("{at} cannot found a cluster as it is; nothing was changed:\n  {why}"),
        Ok(found) => {
            let mut lines = vec![format!("{at} can found a cluster: {}", in_short(found))];
            lines.extend(found.notes.iter().map(|n| format!("  - {n}")));
            if !found.carried.is_empty() {
                lines.push("  - these settings of it become the cluster's:".to_owned());
                lines.extend(
                    found
                        .carried
                        .iter()
                        .map(|(k, v)| format!("      {k} = {v}")),
                );
            }
            lines.join("\n")
        }
    }
}

fn in_short(found: &Adoptable) -> String {
    let state = match found.control.state {
        ClusterState::ShutDown => "shut down cleanly",
        _ => "not shut down cleanly",
    };
    format!(
        "system identifier {}, timeline {}, {state}",
        found.control.system_identifier, found.control.timeline
    )
}

/// The programs of the directory's own version where they are installed; else the newest, which then say why not.
fn binaries_for(directory: &Path) -> anyhow::Result<Binaries> {
    let explicit = std::env::var_os("CRATON_PG_BIN").map(PathBuf::from);
    let version = std::fs::read_to_string(directory.join("PG_VERSION")).unwrap_or_default();
    let own = Path::new("/usr/lib/postgresql")
        .join(version.trim())
        .join("bin");
    let own = Some(own).filter(|p| explicit.is_none() && p.join("postgres").exists());
    Binaries::find(explicit.or(own).as_deref()).map_err(|e| {
        Problem::machine(
            e.to_string(),
            "install it (Debian, Ubuntu: apt install postgresql), or name its bin directory in CRATON_PG_BIN",
        )
        .into()
    })
}

/// The programs for a directory that is to be copied, after a look at it: nothing has been made yet.
pub fn programs_for(source: &Path) -> anyhow::Result<PathBuf> {
    let binaries = binaries_for(source)?;
    let refused = |why: String| {
        Problem::new(
            REFUSED,
            why,
            "nothing was changed; craton adopt check looks at it once more",
        )
    };
    adopt::inspect(source, &binaries)?.map_err(refused)?;
    let links = std::fs::read_dir(source.join("pg_tblspc"));
    let tablespaces = links.is_ok_and(|mut entries| entries.next().is_some());
    if tablespaces || source.join("pg_wal").is_symlink() {
        let what = format!(
            "{} has tablespaces or its WAL elsewhere: a copy would share them with it",
            source.display()
        );
        return Err(refused(what).into());
    }
    preflight::postgres(false)?;
    Ok(binaries.dir().to_owned())
}

/// Copies the directory to the first member; blocks are shared where the file system can.
pub fn copy(layout: &Layout, source: &Path) -> anyhow::Result<()> {
    let first = layout.cluster.members.first().context("no member")?;
    let target = layout.member(first).join("data");
    output::note(format!("copying {} …", source.display()));
    let copied = Command::new("cp")
        .args(["-a", "--reflink=auto", "--"])
        .arg(source)
        .arg(&target)
        .output()
        .context("cannot run cp")?;
    anyhow::ensure!(
        copied.status.success(),
        "{} cannot be copied: {}",
        source.display(),
        String::from_utf8_lossy(&copied.stderr).trim()
    );
    Ok(())
}

/// The copy is a cluster of its own: its superuser has the password in the cluster's secrets.
pub async fn let_superuser_in(layout: &Layout) -> anyhow::Result<()> {
    let access = Access::local(layout)?;
    let until = Instant::now() + OPEN_TIMEOUT;
    let leader = loop {
        match access.status().await {
            Ok(view) if view.writable => break view.leader,
            _ if Instant::now() > until => {
                let what = "the cluster has not opened in time, so the copy's superuser keeps the password that it had";
                let hint = "craton status says what it waits for; then ALTER ROLE postgres PASSWORD … as in the cluster's secrets";
                return Err(Problem::new(NOT_IN_TIME, what, hint).into());
            }
            _ => sleep(LOOK).await,
        }
    };
    let leader = leader.context("a cluster that is open has a leader")?;
    let (client, connection) = tokio_postgres::Config::new()
        .host_path(layout.member(&leader).join("run"))
        .port(layout.postgres_port(&leader))
        .user("postgres")
        .dbname("postgres")
        .application_name("craton up")
        .connect_timeout(Duration::from_secs(5))
        .connect(NoTls)
        .await
        .context("cannot connect to the adopted database")?;
    tokio::spawn(connection);
    let password = secrets::read(&layout.secret(secrets::names::SUPERUSER))?;
    let verifier = postgres_protocol::password::scram_sha_256(password.as_bytes());
    client
        .batch_execute(&format!(
            "SET log_min_error_statement = panic; SET log_min_duration_statement = -1; SET log_statement = 'none'; \
             ALTER ROLE postgres PASSWORD '{verifier}'"
        ))
        .await
        .context("cannot set the superuser's password in the adopted database")?;
    output::note(
        "  the adopted database is open; its superuser postgres has the password in the cluster's secrets now",
    );
    Ok(())
}
