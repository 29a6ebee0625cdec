//! A whole cluster of containers back to a point in time: one node's volume gets the database as it was then, all
//! volumes lose what they know of the old cluster, and at the next start there is a new one.
//!
//! Nothing is deleted: what was there stands in a directory of the volume until somebody removes it.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use clap::Args;
use jiff::Timestamp;

use super::entry::Facts;
use super::names::become_account;
use super::plan::{self, NODE_DIR, NodeNames, Plan, own_peer};
use crate::exit::{self, Problem};
use crate::{output, owner};

/// The database that the node's next start makes a cluster of.
pub const RESTORED: &str = "restored";
/// It is made under this name.
const MAKING: &str = "restored.making";
/// What was there before, with the time behind it.
const BEFORE: &str = "before-";
/// What stays where it is.
const KEPT: [&str; 4] = ["craton-member", CLUSTER_NOTE, "lost+found", RESTORED];
/// The name of the cluster, where a node asked for it: what is made of a restored database has the same.
pub const CLUSTER_NOTE: &str = "craton-cluster";

/// `craton container recover`
#[derive(Args, Debug)]
pub struct RecoverArgs {
    /// Up to this time, as for craton restore
    #[arg(long, value_name = "TIME", conflicts_with_all = ["lsn", "immediate"])]
    pub to: Option<String>,
    /// Up to this position
    #[arg(long, value_name = "LSN", conflicts_with = "immediate")]
    pub lsn: Option<String>,
    /// No further than the backup itself
    #[arg(long)]
    pub immediate: bool,
    /// From this backup [default: the newest that fits]
    #[arg(long, value_name = "BACKUP")]
    pub backup: Option<String>,
    /// The repository: the backup container's volume, mounted here
    #[arg(long = "repo", value_name = "DIR", default_value = "/var/backups")]
    pub repo: PathBuf,
}

/// Where the database is that this node's volume was given, if it was.
pub fn restored() -> Option<PathBuf> {
    let dir = Path::new(NODE_DIR).join(RESTORED);
    dir.exists().then_some(dir)
}

/// A node that makes a new cluster out of a database that is there, and joins nobody.
pub fn begin_with(plan: &mut Plan, names: &NodeNames, database: &Path) {
    let others = ["join", "peers", "first_start"];
    plan.settings.retain(|s| !others.contains(&s.key.as_str()));
    plan.set("peers", vec![own_peer(names)], None);
    plan.set("initial_data", database.display().to_string(), None);
}

/// Restores into this node's volume, and sets aside what it holds.
pub fn run(args: &RecoverArgs) -> anyhow::Result<u8> {
    as_service()?;
    let volume = Path::new(NODE_DIR);
    refuse_in_use(volume)?;
    if restored().is_some() {
        let what = format!(
            "{} holds a restored database already",
            volume.join(RESTORED).display()
        );
        return Err(Problem::new(exit::REFUSED, what, "start the node, or remove it").into());
    }
    let making = volume.join(MAKING);
    if making.exists() {
        std::fs::remove_dir_all(&making)
            .with_context(|| format!("cannot remove {}", making.display()))?;
    }
    let (target, repo) = (
        making.display().to_string(),
        args.repo.display().to_string(),
    );
    let mut words = vec!["craton", "restore", &target, "--repo", &repo, "--finish"];
    for (option, value) in [
        ("--to", &args.to),
        ("--lsn", &args.lsn),
        ("--backup", &args.backup),
    ] {
        if let Some(value) = value {
            words.extend([option, value]);
        }
    }
    if args.immediate {
        words.push("--immediate");
    }
    let cli = <crate::cli::Cli as clap::Parser>::try_parse_from(words)?;
    let code = crate::cli::dispatch(cli)?;
    if code != exit::OK {
        return Ok(code);
    }
    // From here on the old cluster is no more in this volume.
    let aside = move_aside(volume, Timestamp::now())?;
    std::fs::rename(&making, volume.join(RESTORED)).context("cannot move it into place")?;
    std::fs::File::open(volume)?.sync_all()?;
    say(aside.as_deref());
    output::line(
        "next: craton container set-aside in every other node's volume, then start all containers: this node makes a cluster of it, the others are cloned",
    );
    Ok(exit::OK)
}

/// Sets aside what this node's volume holds: at the next start it is a node without data.
pub fn set_aside() -> anyhow::Result<u8> {
    as_service()?;
    let volume = Path::new(NODE_DIR);
    refuse_in_use(volume)?;
    refuse_to_found_again()?;
    let aside = move_aside(volume, Timestamp::now())?;
    say(aside.as_deref());
    Ok(exit::OK)
}

/// In a container that runs: with nothing in its volume, and nobody to ask, it would make a second cluster.
fn refuse_to_found_again() -> anyhow::Result<()> {
    let Some(facts) = Facts::load()? else {
        return Ok(());
    };
    let Some(names) = &facts.node else {
        return Ok(());
    };
    if !plan::may_found(&facts.env, &names.host)
        || !plan::others(&facts.env, &names.host).is_empty()
    {
        return Ok(());
    }
    let what = "this node is told of no other (PARTNER_NODES, REPLICATION_PRIMARY_HOST): with an empty volume it would make a cluster of its own";
    let hint = "set PARTNER_NODES to the cluster's other nodes, make the container anew (`docker-compose up -d`), then set aside";
    Err(Problem::new(exit::REFUSED, what, hint).into())
}

fn say(aside: Option<&Path>) {
    match aside {
        Some(dir) => output::line(format!(
            "what was there is in {} now; remove it when it is not needed any more",
            dir.display()
        )),
        None => output::line("there was nothing to set aside"),
    }
}

/// `docker-compose run` comes as root; what stands in the volume is its user's.
fn as_service() -> anyhow::Result<()> {
    if !owner::is_root() {
        return Ok(());
    }
    let account = owner::service_account()?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("craton").args(std::env::args_os().skip(1));
    let error = become_account(&mut command, &account).exec();
    Err(error).with_context(|| format!("cannot become {}", account.name))
}

/// The coordinator's file is locked for as long as an agent runs, in whatever container.
fn refuse_in_use(volume: &Path) -> anyhow::Result<()> {
    let dir = volume.join("coordinator");
    if !dir.exists() {
        return Ok(());
    }
    if let Err(craton_agent::RecoverError::Open(why)) = craton_agent::survey(&dir) {
        let what = format!("the volume is in use, or cannot be read: {why}");
        return Err(Problem::new(exit::REFUSED, what, "stop the node's container first").into());
    }
    Ok(())
}

/// Moves everything but [`KEPT`] into a directory of its own; returns it, if there was anything.
fn move_aside(volume: &Path, now: Timestamp) -> anyhow::Result<Option<PathBuf>> {
    let failed = || format!("cannot set aside what is in {}", volume.display());
    let aside = volume.join(format!("{BEFORE}{}", now.strftime("%Y%m%dT%H%M%SZ")));
    let mut any = false;
    for entry in std::fs::read_dir(volume).with_context(failed)? {
        let entry = entry?;
        let name = entry.file_name();
        let text = name.to_string_lossy();
        if KEPT.contains(&text.as_ref()) || text == MAKING || text.starts_with(BEFORE) {
            continue;
        }
        if !any {
            std::fs::create_dir_all(&aside).with_context(failed)?;
            any = true;
        }
        std::fs::rename(entry.path(), aside.join(&name)).with_context(failed)?;
    }
    if !any {
        return Ok(None);
    }
    std::fs::File::open(&aside)?.sync_all()?;
    std::fs::File::open(volume)?.sync_all()?;
    Ok(Some(aside))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_but_the_name_and_what_was_restored_goes_aside() {
        let dir = tempfile::tempdir().unwrap();
        let at = |n: &str| dir.path().join(n);
        for name in ["data", "coordinator", "restored", "before-1"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        for name in ["craton-member", "craton-cluster", "state.json"] {
            std::fs::write(at(name), "a").unwrap();
        }
        let now: Timestamp = "2026-11-27T05:06:07Z".parse().unwrap();
        let aside = move_aside(dir.path(), now).unwrap().unwrap();
        assert_eq!(aside, at("before-20261127T050607Z"));
        for moved in ["data", "coordinator", "state.json"] {
            assert!(aside.join(moved).exists() && !at(moved).exists(), "{moved}");
        }
        for kept in ["craton-member", "craton-cluster", "restored", "before-1"] {
            assert!(at(kept).exists(), "{kept}");
        }
        assert_eq!(move_aside(dir.path(), now).unwrap(), None);
    }
}
