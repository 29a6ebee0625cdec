//! `craton backup`: asks the daemon, or reads the repository itself where the daemon is away.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use craton_backup::views::{
    BackupDetailView, BackupListView, BackupStatusView, BackupView, Phase, ProgressView,
    RunAcceptedView, RunResultView, RunsView, SweptView,
};
use craton_backup::wal_fetch::{EXIT_NOT_THERE, EXIT_UNREACHABLE, Fetched, wal_fetch};
use craton_backup::{Repository, catalog};
use craton_console::{Client, ClientError};
use craton_repo::manifest::BackupId;
use craton_trust::Role;
use tokio::time::Instant;

use crate::ask::must_be_meant;
use crate::cli::{DaemonArgs, wait_for};
use crate::container::barman;
use crate::container::entry::Facts;
use crate::container::side::daemon_address;
use crate::exit::{self, Problem};
use crate::layout::{Layout, address};
use crate::output::{self, Colour, cell, paint, plain};
use crate::{certificates, daemons};

/// How often a running backup is looked at.
const WATCH_EVERY: Duration = Duration::from_millis(300);
/// A daemon that does not answer for so long while its backup is followed has gone.
const SILENT_MAX: Duration = Duration::from_secs(60);
/// How long the daemon may take to begin a backup, or to remove one.
pub const CHANGE_TIMEOUT: Duration = Duration::from_secs(90);

/// The sub-commands of `craton backup`.
#[derive(Subcommand, Debug)]
pub enum BackupCommand {
    /// Run the daemon that receives WAL and takes backups
    Daemon(DaemonArgs),
    /// Take a base backup now, and wait for its end
    Run(DaemonAt),
    /// Backups, oldest first
    List {
        /// Which daemon
        #[command(flatten)]
        daemon: DaemonAt,
        /// Which repository
        #[command(flatten)]
        repository: RepositoryArgs,
    },
    /// One backup, and up to where it can be restored
    Show {
        /// The backup's name
        id: String,
        /// Which daemon
        #[command(flatten)]
        daemon: DaemonAt,
        /// Which repository
        #[command(flatten)]
        repository: RepositoryArgs,
    },
    /// What the daemon is doing: WAL received, lag, backups
    Status(DaemonAt),
    /// Remove a backup, with the WAL and the data that only it needed
    Delete {
        /// The backup's name
        id: String,
        /// Which daemon
        #[command(flatten)]
        daemon: DaemonAt,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Read every backup and all WAL, and compare with their checksums
    Verify(RepositoryArgs),
    /// PostgreSQL's restore_command: exit status 1 says "not there", 200 "cannot tell"
    WalFetch {
        /// Which repository
        #[command(flatten)]
        repository: RepositoryArgs,
        /// The file's name (%f)
        name: String,
        /// Where to put it (%p)
        target: PathBuf,
    },
}

/// Which daemon.
#[derive(Args, Debug)]
pub struct DaemonAt {
    /// The backup daemon's API (its listen address), with --certs [default: the local cluster's, or this container's]
    #[arg(
        long = "daemon",
        value_name = "HOST:PORT",
        env = "CRATON_BACKUP_API",
        hide_env_values = true
    )]
    pub address: Option<String>,
}

/// What the command line says for all commands.
#[derive(Clone, Copy)]
pub struct Here<'a> {
    /// The local cluster's directory.
    pub dir: &'a Path,
    /// The directory with the operator's certificate.
    pub certificates: Option<&'a Path>,
}

/// Which repository.
#[derive(Args, Debug)]
pub struct RepositoryArgs {
    /// The repository's directory [default: the local cluster's]
    #[arg(long = "repo", value_name = "DIR")]
    pub repo: Option<PathBuf>,
}

impl RepositoryArgs {
    /// Opens the repository on disk.
    pub fn open(&self, dir: &Path) -> anyhow::Result<Repository> {
        let root = match &self.repo {
            Some(root) => root.clone(),
            None => match (Layout::load(dir)?, Facts::load()?) {
                (None, Some(facts)) => barman::root(&facts),
                _ => Layout::require(dir)?.repository(),
            },
        };
        Ok(Repository::open(&root)?)
    }
}

/// Runs the command.
pub fn run(here: Here<'_>, command: BackupCommand, json: bool) -> anyhow::Result<u8> {
    let dir = here.dir;
    match command {
        BackupCommand::Daemon(args) => daemons::backup(&args),
        BackupCommand::Run(daemon) => wait_for(take(Daemon::find(here, &daemon)?, json)),
        BackupCommand::List { daemon, repository } => {
            let read = |r: &Repository| catalog::list(r);
            let whom = (here, &daemon);
            show_list(
                &ask_or_read(whom, &repository, "/v1/backup/list", read)?,
                json,
            )
        }
        BackupCommand::Show {
            id,
            daemon,
            repository,
        } => {
            let id = named(&id)?;
            let path = format!("/v1/backup/show/{id}");
            let read = |r: &Repository| catalog::show(r, &id);
            show_one(
                &ask_or_read((here, &daemon), &repository, &path, read)?,
                json,
            )
        }
        BackupCommand::Status(daemon) => wait_for(status(Daemon::find(here, &daemon)?, json)),
        BackupCommand::Delete { id, daemon, yes } => {
            let id = named(&id)?;
            must_be_meant(
                yes,
                &format!(
                    "backup {id} is removed, and no time can be restored any more that only it reaches"
                ),
            )?;
            report_removed(
                &wait_for(async { Daemon::find(here, &daemon)?.delete(&id).await })?,
                json,
            )
        }
        BackupCommand::Verify(repository) => verify(&repository.open(dir)?, json),
        BackupCommand::WalFetch {
            repository,
            name,
            target,
        } => Ok(fetch(dir, &repository, &name, &target)),
    }
}

fn named(id: &str) -> anyhow::Result<BackupId> {
    BackupId::new(id).map_err(|_| {
        let what = format!("\"{id}\" is not the name of a backup");
        Problem::new(exit::USAGE, what, "`craton backup list` shows them").into()
    })
}

/// Says what was removed.
pub fn report_removed(swept: &SweptView, json: bool) -> anyhow::Result<u8> {
    if json {
        output::json(swept)?;
        return Ok(exit::OK);
    }
    for id in &swept.backups {
        output::line(format!(
            "{id} is removed, with {} WAL segments from before the oldest backup; {} are free again",
            swept.segments,
            output::bytes(swept.bytes)
        ));
    }
    Ok(exit::OK)
}

/// A backup daemon.
pub struct Daemon {
    address: String,
    client: Client,
}

impl Daemon {
    /// That of the container which this is in.
    pub fn container(facts: &Facts) -> anyhow::Result<Self> {
        Ok(Self {
            address: daemon_address(facts.kind),
            client: Client::trusted(certificates::operator(&Facts::secrets())?, Role::Backup),
        })
    }

    /// The one that is named, else that of the container which this is in, else that of the local cluster.
    fn find(here: Here<'_>, at: &DaemonAt) -> anyhow::Result<Self> {
        if let Some(address) = &at.address {
            let Some(certificates) = here.certificates else {
                return Err(Problem::new(
                    exit::USAGE,
                    "--daemon needs --certs: the directory with the operator's certificate",
                    "`craton join` makes one; on a member's host it is the directory of the secrets",
                )
                .into());
            };
            return Ok(Self {
                address: address.clone(),
                client: Client::trusted(certificates::operator(certificates)?, Role::Backup),
            });
        }
        match (Layout::load(here.dir)?, Facts::load()?) {
            (None, Some(facts)) => Self::container(&facts),
            (None, None) => Err(Problem::new(
                exit::UNREACHABLE,
                format!("there is no cluster in {}", here.dir.display()),
                "for a daemon elsewhere: --daemon HOST:PORT --certs DIR; for its repository on this host: --repo DIR",
            )
            .into()),
            _ => Self::local(&Layout::require(here.dir)?),
        }
    }

    /// Where it is, and a certificate that it takes.
    pub fn local(layout: &Layout) -> anyhow::Result<Self> {
        let trust = certificates::operator(&layout.secrets())?;
        Ok(Self {
            address: address(layout.backup_http_port()),
            client: Client::trusted(trust, Role::Backup),
        })
    }

    /// What its health page says.
    pub async fn health(&self) -> Result<String, ClientError> {
        self.client.get_text(&self.address, "/health").await
    }

    /// Removes a backup.
    pub async fn delete(&self, id: &BackupId) -> anyhow::Result<SweptView> {
        let client = self.client.clone().with_timeout(CHANGE_TIMEOUT);
        let body = serde_json::json!({ "id": id });
        Ok(client
            .post_json(&self.address, "/v1/backup/delete", &body)
            .await?)
    }

    async fn status(&self) -> Result<BackupStatusView, ClientError> {
        self.client
            .get_json(&self.address, "/v1/backup/status")
            .await
    }
}

/// The daemon's answer; from the disk where the repository was named, or where no daemon answers.
fn ask_or_read<T: serde::de::DeserializeOwned>(
    (here, at): (Here<'_>, &DaemonAt),
    repository: &RepositoryArgs,
    path: &str,
    read: impl FnOnce(&Repository) -> craton_backup::Result<T>,
) -> anyhow::Result<T> {
    if repository.repo.is_none() {
        let daemon = Daemon::find(here, at)?;
        match wait_for(async { Ok(daemon.client.get_json(&daemon.address, path).await) })? {
            Ok(view) => return Ok(view),
            Err(error @ ClientError::Refused { .. }) => return Err(error.into()),
            Err(error) if at.address.is_some() => return Err(error.into()),
            Err(error) => output::note(format!("{error}; reading the repository itself")),
        }
    }
    Ok(read(&repository.open(here.dir)?)?)
}

async fn take(daemon: Daemon, json: bool) -> anyhow::Result<u8> {
    let client = daemon.client.clone().with_timeout(CHANGE_TIMEOUT);
    let accepted: RunAcceptedView = client
        .post_json(&daemon.address, "/v1/backup/run", &serde_json::json!({}))
        .await?;
    let mut said = None;
    let last = follow(&daemon.client, &daemon.address, &accepted, |running| {
        let text = progress(running);
        if said.as_ref() != Some(&text) {
            output::note(&text);
            said = Some(text);
        }
    })
    .await?;
    match (last.backup, last.error) {
        (Some(backup), _) => {
            if json {
                output::json(&backup)?;
            } else {
                output::line(format!(
                    "{} is complete: {}",
                    paint(Colour::Cyan, &backup.id.to_string()),
                    sizes(&backup)
                ));
            }
            Ok(exit::OK)
        }
        (None, error) => {
            let what = format!(
                "the backup failed: {}",
                error.unwrap_or_else(|| "no reason was given".to_owned())
            );
            Err(Problem::new(
                exit::FAILURE,
                what,
                "see the backup daemon's log; what was stored is used again by the next one",
            )
            .into())
        }
    }
}

/// Follows a run to its end. It goes on without whoever follows it, so a daemon that is busy is asked again for a while.
pub async fn follow(
    client: &Client,
    address: &str,
    accepted: &RunAcceptedView,
    mut say: impl FnMut(&ProgressView),
) -> anyhow::Result<RunResultView> {
    let mut silent = None;
    loop {
        match client
            .get_json::<RunsView>(address, "/v1/backup/runs")
            .await
        {
            Ok(runs) if runs.since_ms != accepted.since_ms => {
                return Err(Problem::new(
                    exit::FAILURE,
                    "the backup daemon was started anew, and the backup broke off",
                    "take another one; what was stored is used again by it",
                )
                .into());
            }
            Ok(runs) => {
                silent = None;
                if let Some(last) = runs.last.filter(|last| last.run >= accepted.run) {
                    return Ok(last);
                }
                if let Some(running) = &runs.running {
                    say(running);
                }
            }
            Err(error @ ClientError::Refused { .. }) => return Err(error.into()),
            Err(error) => {
                let since: Instant = *silent.get_or_insert_with(Instant::now);
                if since.elapsed() >= SILENT_MAX {
                    return Err(error.into());
                }
            }
        }
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

fn progress(running: &ProgressView) -> String {
    match running.phase {
        Phase::Checkpoint => format!("  {}: {} makes a checkpoint", running.id, running.source),
        Phase::Reading => format!(
            "  {}: {} of {} read from {} ({} %)",
            running.id,
            output::bytes(running.done_bytes),
            output::bytes(running.total_bytes),
            running.source,
            running.percent
        ),
        Phase::WaitingForWal => format!("  {}: waiting for its WAL", running.id),
        Phase::Ending => format!("  {}: writing its manifest", running.id),
    }
}

fn sizes(backup: &BackupView) -> String {
    format!(
        "{} from {}, {} added to the repository",
        output::bytes(backup.data_bytes),
        backup.source,
        output::bytes(backup.stored_bytes)
    )
}

fn show_list(view: &BackupListView, json: bool) -> anyhow::Result<u8> {
    if json {
        output::json(view)?;
        return Ok(exit::OK);
    }
    let mut table = output::table(&[
        "BACKUP", "ENDED", "FROM", "TIMELINE", "WAL FROM", "WAL TO", "SIZE", "ADDED",
    ]);
    for b in &view.backups {
        table.add_row(vec![
            cell(Colour::Cyan, b.id.to_string()),
            plain(b.ended_at.strftime("%Y-%m-%d %H:%M:%SZ").to_string()),
            plain(&b.source),
            plain(b.timeline.to_string()),
            plain(b.start_lsn.to_string()),
            plain(b.stop_lsn.to_string()),
            plain(output::bytes(b.data_bytes)),
            plain(output::bytes(b.stored_bytes)),
        ]);
    }
    output::line(output::table_text(&table));
    if view.backups.is_empty() {
        output::line("no backups yet: `craton backup run` takes one");
    }
    for problem in &view.problems {
        output::note(format!("warning: {problem}"));
    }
    Ok(exit::OK)
}

fn show_one(view: &BackupDetailView, json: bool) -> anyhow::Result<u8> {
    if json {
        output::json(view)?;
        return Ok(exit::OK);
    }
    let b = &view.backup;
    let until = view.restorable_until.map_or_else(
        || "-".to_owned(),
        |t| t.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
    );
    let facts = [
        ("backup", b.id.to_string()),
        ("began", b.started_at.to_string()),
        ("ended", b.ended_at.to_string()),
        ("size", sizes(b)),
        (
            "contents",
            format!(
                "{} entries, {} chunks in {} packs",
                view.entries, view.chunks, view.packs
            ),
        ),
        ("WAL it needs", format!("{} to {}", b.start_lsn, b.stop_lsn)),
        (
            "restorable to",
            format!(
                "{} on timeline {}, received {until}",
                view.restorable_to, view.latest_timeline
            ),
        ),
        (
            "server",
            format!("version {}, system {}", b.server_version, view.system_id),
        ),
    ];
    for (name, fact) in facts {
        output::line(format!(
            "{} {fact}",
            paint(Colour::Dim, &format!("{name:>14}"))
        ));
    }
    for missing in &view.missing_wal {
        output::line(format!(
            "{} {}",
            paint(Colour::Red, "   missing WAL"),
            gap(missing)
        ));
    }
    Ok(exit::OK)
}

fn gap(missing: &craton_repo::continuity::Missing) -> String {
    format!(
        "{} segments of timeline {}, {} to {}",
        missing.segments, missing.timeline, missing.from, missing.to
    )
}

async fn status(daemon: Daemon, json: bool) -> anyhow::Result<u8> {
    let view = daemon.status().await?;
    if json {
        output::json(&view)?;
        return Ok(exit::OK);
    }
    let streaming = match (&view.streaming_from, &view.error) {
        (Some(from), _) => format!("WAL comes from {}", paint(Colour::Cyan, from)),
        (None, Some(error)) => format!("{} {error}", paint(Colour::Red, "no WAL comes in:")),
        (None, None) => paint(Colour::Yellow, "no WAL comes in yet"),
    };
    output::line(format!(
        "{streaming}; on disk up to {} of timeline {}, {} behind",
        view.flushed_lsn,
        view.timeline,
        output::bytes(view.lag_bytes)
    ));
    let newest = view
        .newest_ended_at
        .map_or_else(|| "none yet".to_owned(), |t| t.to_string());
    output::line(format!(
        "{} backups, the newest {newest}; the repository holds {}",
        view.backups,
        output::bytes(view.repository_bytes)
    ));
    output::line(match view.retention_days {
        0 => "everything is kept (backup.retention_days)".to_owned(),
        days => format!("every time of the last {days} days is kept (backup.retention_days)"),
    });
    if let Some(running) = &view.runs.running {
        output::line(progress(running).trim_start());
    }
    for missing in &view.missing_wal {
        output::line(format!(
            "{} {}",
            paint(Colour::Red, "missing WAL:"),
            gap(missing)
        ));
    }
    Ok(exit::OK)
}

fn verify(repository: &Repository, json: bool) -> anyhow::Result<u8> {
    let view = catalog::verify(repository)?;
    if json {
        output::json(&view)?;
    } else {
        output::line(format!(
            "{} good backups; {} chunks and {} WAL segments read and compared",
            view.backups_good,
            output::count(view.chunks),
            output::count(view.segments)
        ));
        for problem in &view.problems {
            output::line(format!("{} {problem}", paint(Colour::Red, "damaged:")));
        }
    }
    Ok(if view.problems.is_empty() {
        exit::OK
    } else {
        exit::FAILURE
    })
}

/// The exit status speaks to PostgreSQL, so every failure has to become one here.
fn fetch(dir: &Path, repository: &RepositoryArgs, name: &str, target: &Path) -> u8 {
    let fetched = repository
        .open(dir)
        .and_then(|r| Ok(wal_fetch(&r, name, target)?));
    match fetched {
        Ok(Fetched::Delivered) => exit::OK,
        Ok(Fetched::NotThere) => EXIT_NOT_THERE,
        Err(error) => {
            output::note(format!("cannot fetch {name}: {error:#}"));
            EXIT_UNREACHABLE
        }
    }
}
