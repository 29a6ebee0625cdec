//! `craton restore`: a backup and its WAL become a directory that PostgreSQL starts from.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use craton_backup::restore::{Divergence, Options, Progress, RestoredView, Target, restore};
use craton_core::Lsn;
use craton_repo::manifest::BackupId;
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use crate::backup::RepositoryArgs;
use crate::exit::{self, Problem};
use crate::layout::Layout;
use crate::output::{self, Colour, paint};
use crate::owner;

/// Progress is said every so many percent.
const PROGRESS_STEP_PERCENT: u64 = 20;

/// What PostgreSQL says where WAL ends before the target.
const NOT_REACHED: &str = "recovery ended before configured recovery target was reached";

/// `craton restore`
#[derive(Args, Debug)]
pub struct RestoreArgs {
    /// The directory to restore into: new, or empty
    #[arg(value_name = "TARGET")]
    pub target: PathBuf,
    /// Replay up to this time: '2026-01-31 12:00' (local time) or with an offset, '2026-01-31T12:00:00Z'
    #[arg(long, value_name = "TIME", conflicts_with_all = ["lsn", "immediate"])]
    pub to: Option<String>,
    /// Replay up to this position
    #[arg(long, value_name = "LSN", conflicts_with = "immediate")]
    pub lsn: Option<Lsn>,
    /// Replay no more than the backup needs
    #[arg(long)]
    pub immediate: bool,
    /// From this backup [default: the newest that fits]
    #[arg(long, value_name = "BACKUP")]
    pub backup: Option<String>,
    /// Put a tablespace elsewhere; can be given several times
    #[arg(long, value_name = "OLD=NEW")]
    pub tablespace: Vec<String>,
    /// Replay this divergent WAL on top, which a member kept (see `craton divergence show`): the
    /// rows that only a former leader had
    #[arg(long, value_name = "DIRECTORY", conflicts_with_all = ["to", "lsn", "immediate"])]
    pub divergence: Option<PathBuf>,
    /// Let PostgreSQL recover to the target here and stop it again: what a new cluster can begin with
    /// (`node.initial_data`)
    #[arg(long, conflicts_with_all = ["divergence", "standby"])]
    pub finish: bool,
    /// Make a member's data directory; its agent calls this, and starts it as a standby
    #[arg(long, hide = true)]
    pub standby: bool,
    /// Refuse a backup that ended more hours ago
    #[arg(long, value_name = "HOURS")]
    pub age_max_h: Option<u32>,
    #[command(flatten)]
    repository: RepositoryArgs,
}

/// Runs the command.
pub fn run(dir: &Path, args: &RestoreArgs, json: bool) -> anyhow::Result<u8> {
    let directory =
        std::path::absolute(&args.target).context("the target cannot be made absolute")?;
    if let Some(account) = owner::successor(dir)?.filter(|_| args.repository.repo.is_none()) {
        return as_owner(dir, args, &directory, &account);
    }
    let options = Options {
        backup: args
            .backup
            .clone()
            .map(BackupId::new)
            .transpose()
            .map_err(|e| usage(format!("--backup: {e}")))?,
        tablespaces: tablespaces(&args.tablespace)?,
        program: program(dir)?,
        divergence: args.divergence.as_deref().map(divergence).transpose()?,
        standby: args.standby,
        age_max: args
            .age_max_h
            .map(|h| std::time::Duration::from_secs(u64::from(h) * 3600)),
    };
    let target = target(args)?;
    let repository = args.repository.open(dir)?;
    let mut progress = teller(args.standby);
    if args.finish && owner::is_root() {
        return Err(usage(
            "--finish starts PostgreSQL, which refuses to run as root: run this as its user",
        ));
    }
    let view = restore(&repository, &directory, target, &options, &mut progress)?;
    if args.finish {
        finish(&directory, &view, json)?;
    } else if json {
        output::json(&view)?;
    } else {
        if let Some(note) = &view.note {
            output::note(note);
        }
        output::line(how_to_start(dir, &view));
    }
    Ok(exit::OK)
}

/// Says how far it is.
fn teller(for_agent: bool) -> impl FnMut(Progress) {
    let mut said = 0;
    move |p: Progress| {
        let percent = (p.done_bytes * 100)
            .checked_div(p.total_bytes)
            .unwrap_or(100);
        if for_agent {
            // As pg_basebackup tells it: an agent reads this.
            if percent > said || p.done_bytes == p.total_bytes {
                said = percent;
                output::note(format!(
                    "{}/{} kB",
                    p.done_bytes / 1024,
                    p.total_bytes / 1024
                ));
            }
        } else if percent >= said + PROGRESS_STEP_PERCENT {
            said = percent - percent % PROGRESS_STEP_PERCENT;
            output::note(format!(
                "  {} of {} ({percent} %)",
                output::bytes(p.done_bytes),
                output::bytes(p.total_bytes)
            ));
        }
    }
}

/// Recovers to the target, so that what is there is a stopped database and nothing else.
fn finish(directory: &Path, view: &RestoredView, json: bool) -> anyhow::Result<()> {
    output::note(format!(
        "restored {} files ({}) of {}; replaying WAL …",
        output::count(view.files),
        output::bytes(view.bytes),
        view.backup
    ));
    let binaries = craton_pg::Binaries::find(None)?;
    let recovered = match craton_pg::finish_recovery(&binaries, directory) {
        // PostgreSQL wants to see a transaction after the time (xlogrecovery.c).
        Err(error) if error.to_string().contains(NOT_REACHED) => {
            output::note(
                "the repository has no transaction after that time: all that it has is replayed",
            );
            craton_backup::restore::forget_target_time(directory)?;
            craton_pg::finish_recovery(&binaries, directory)?
        }
        recovered => recovered?,
    };
    craton_backup::restore::forget_recovery(directory)?;
    if json {
        return output::json(&serde_json::json!({
            "restored": view, "timeline": recovered.control.timeline, "lsn": recovered.control.checkpoint_lsn,
            "last_transaction": recovered.last_transaction,
        }));
    }
    let last = recovered
        .last_transaction
        .unwrap_or_else(|| "one of the backup itself".to_owned());
    output::line(format!(
        "the database in {} is whole and stopped: timeline {}, up to {}; its last transaction: {last}",
        directory.display(),
        recovered.control.timeline,
        recovered.control.checkpoint_lsn,
    ));
    Ok(())
}

/// PostgreSQL will not start from a directory of root's: the cluster's owner does it, in a directory that
/// root makes for them.
fn as_owner(
    dir: &Path,
    args: &RestoreArgs,
    directory: &Path,
    account: &owner::Account,
) -> anyhow::Result<u8> {
    let made = !directory.exists();
    if made {
        std::fs::create_dir_all(directory).map_err(|e| owner::cannot_create(directory, &e))?;
    }
    let empty = std::fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none());
    if empty {
        std::os::unix::fs::chown(directory, Some(account.uid), Some(account.gid))?;
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o700))?;
    }
    let absolute = |arg: std::ffi::OsString| {
        if arg == args.target.as_os_str() {
            directory.as_os_str().to_owned()
        } else {
            arg
        }
    };
    let typed: Vec<_> = std::env::args_os().map(absolute).collect();
    let code = owner::run_to_the_end(owner::again_as(account, dir, &typed))?;
    if made && code != exit::OK {
        // Nothing of a failed restore stays; it is not removed where something is in it.
        let _ = std::fs::remove_dir(directory);
    }
    Ok(code)
}

fn usage(what: impl Into<String>) -> anyhow::Error {
    Problem::new(
        exit::USAGE,
        what,
        "`craton restore --help` shows what can be given",
    )
    .into()
}

/// What a member kept: its summary says where the histories parted.
fn divergence(directory: &Path) -> anyhow::Result<Divergence> {
    let directory = std::path::absolute(directory).context("--divergence")?;
    let path = directory.join("summary.json");
    let summary: craton_pg::DivergenceSummary = std::fs::read(&path)
        .map_err(anyhow::Error::from)
        .and_then(|text| Ok(serde_json::from_slice(&text)?))
        .map_err(|e| {
            usage(format!(
                "{} is not what a member kept of divergent WAL: {e}",
                directory.display()
            ))
        })?;
    Ok(Divergence {
        directory,
        timeline: summary.timeline,
        from: summary.from,
        until: summary.last_record,
    })
}

/// The program that the restored server calls for WAL: the cluster's copy, else this one.
fn program(dir: &Path) -> anyhow::Result<PathBuf> {
    match Layout::load(dir)?
        .map(|layout| layout.binary())
        .filter(|binary| binary.exists())
    {
        Some(binary) => Ok(binary),
        None => std::env::current_exe().context("cannot find this program's own path"),
    }
}

fn target(args: &RestoreArgs) -> anyhow::Result<Target> {
    Ok(match (&args.to, args.lsn, args.immediate) {
        (Some(time), ..) => Target::Time(time_of(time)?),
        (None, Some(lsn), _) => Target::Lsn(lsn),
        (None, None, true) => Target::Immediate,
        (None, None, false) => Target::Latest,
    })
}

/// A time with an offset, or one of this machine's zone.
fn time_of(text: &str) -> anyhow::Result<Timestamp> {
    let text = text.trim();
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    let civil = text
        .parse::<DateTime>()
        .map_err(|e| usage(format!("--to \"{text}\" is not a time: {e}")))?;
    let zoned = civil
        .to_zoned(TimeZone::system())
        .map_err(|e| usage(format!("--to \"{text}\": {e}")))?;
    Ok(zoned.timestamp())
}

fn tablespaces(given: &[String]) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let pair = |text: &String| {
        let (old, new) = text
            .split_once('=')
            .ok_or_else(|| usage(format!("--tablespace {text} is not OLD=NEW")))?;
        Ok((old.to_owned(), std::path::absolute(new)?))
    };
    given.iter().map(pair).collect()
}

fn how_to_start(dir: &Path, view: &RestoredView) -> String {
    let bin = Layout::load(dir)
        .ok()
        .flatten()
        .map(|l| l.cluster.postgres_bin.display().to_string() + "/")
        .unwrap_or_default();
    let directory = view.directory.display();
    format!(
        "restored {} files ({}) of {} into {}\nWAL is there up to {} of timeline {}. Start it, as the directory's owner, with PostgreSQL {}:\n  {bin}pg_ctl -D {directory} -o '-p 5499 -k {directory}' -l {directory}/start.log start\nand look into it:\n  {bin}psql -h {directory} -p 5499 -U postgres -d DATABASE",
        output::count(view.files),
        output::bytes(view.bytes),
        paint(Colour::Cyan, &view.backup.to_string()),
        directory,
        view.wal_until,
        view.timeline,
        view.server_version / 10_000,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_people_and_postgresql_write_them() {
        let expected: Timestamp = "2026-01-31T12:00:00Z".parse().unwrap();
        for text in [
            "2026-01-31T12:00:00Z",
            "2026-01-31 12:00:00+00",
            "2026-01-31 13:00:00.000+01:00",
            " 2026-01-31 12:00:00Z ",
        ] {
            assert_eq!(time_of(text).unwrap(), expected, "{text}");
        }
        assert!(time_of("2026-01-31 12:00").is_ok());
        assert!(time_of("yesterday").is_err());
    }
}
