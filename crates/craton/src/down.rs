//! `craton down`: stops the local cluster; with `--purge` removes what is ours and nothing else.

use std::path::Path;

use anyhow::Context as _;
use craton_agent::{Backend, Place};
use rustix::process::Signal;
use tokio::time::Instant;

use crate::cli::DownArgs;
use crate::exit::{self, Problem};
use crate::layout::{CLUSTER_FILE, Layout, OWN_ENTRIES};
use crate::processes::{self, RunLock};
use crate::supervise::{self, STOP_TIMEOUT};
use crate::{output, owner};

/// Runs the command.
pub fn run(dir: &Path, args: &DownArgs) -> anyhow::Result<u8> {
    let Some(layout) = Layout::load(dir)? else {
        output::line(format!("there is no cluster in {}", dir.display()));
        return Ok(exit::OK);
    };
    if let Some(account) = owner::successor(dir)? {
        let typed: Vec<_> = std::env::args_os().collect();
        let code = owner::run_to_the_end(owner::again_as(&account, dir, &typed))?;
        if args.purge && code == exit::OK {
            // Only root may take the empty directory out of its parent. It stays where it is not empty.
            let _ = std::fs::remove_dir(dir);
        }
        return Ok(code);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(stop(&layout))?;
    if args.purge {
        runtime.block_on(forget_records(&layout));
        purge(&layout)?;
        output::line(format!("removed the cluster in {}", dir.display()));
    } else {
        output::line(format!(
            "stopped; the data stays in {} (`craton up` starts it again)",
            dir.display()
        ));
    }
    Ok(exit::OK)
}

/// Stops the supervisor, which stops the rest; or the rest directly, where no supervisor is left.
pub async fn stop(layout: &Layout) -> anyhow::Result<()> {
    if let Some(supervisor) = processes::running(layout, supervise::NAME) {
        output::note("stopping proxy, backup and members …");
        supervisor.signal(Signal::TERM);
        supervisor.signal(Signal::CONT);
        // It waits for two groups of daemons, then for what is left.
        if processes::all_gone([supervisor], Instant::now() + 3 * STOP_TIMEOUT).await {
            return verify_stopped(layout).await;
        }
        supervisor.signal(Signal::KILL);
    }
    verify_stopped(layout).await
}

async fn verify_stopped(layout: &Layout) -> anyhow::Result<()> {
    let Some(_lock) = RunLock::take_named(layout, supervise::NAME)? else {
        return Err(Problem::new(
            exit::FAILURE,
            "another command starts or stops this cluster just now",
            "try again in a moment",
        )
        .into());
    };
    supervise::stop_all(layout).await
}

/// Removes the records that the cluster has in an etcd. What cannot be removed is said.
pub async fn forget_records(layout: &Layout) {
    let noted = layout
        .cluster
        .members
        .iter()
        .filter_map(|m| craton_agent::places::last_place(&layout.member(m)).ok()?);
    let mut places: Vec<Place> = Vec::new();
    for place in noted.chain([layout.cluster.coordinator.clone()]) {
        if place.backend == Backend::Etcd && !places.iter().any(|p| p.is_same_store(&place)) {
            places.push(place);
        }
    }
    for place in places {
        if let Err(why) = craton_agent::etcd::purge(&place, &layout.cluster.name).await {
            output::note(format!(
                "the cluster's records stay in {place}: {why}; remove them with `etcdctl del --prefix {}`",
                place.prefix_of(&layout.cluster.name)
            ));
        }
    }
}

/// Removes everything that `craton up` made.
pub fn purge(layout: &Layout) -> anyhow::Result<()> {
    for member in &layout.cluster.members {
        // The fence's board is on tmpfs, outside of the directory; the agent may have removed it.
        let board = craton_fence::board_path(&layout.member(member));
        let _ = std::fs::remove_file(board.with_extension("lease"));
        let _ = std::fs::remove_file(board);
    }
    // The description goes last: until then the directory can be recognised and purged again.
    for entry in OWN_ENTRIES
        .iter()
        .filter(|e| **e != CLUSTER_FILE)
        .chain([&CLUSTER_FILE])
    {
        let path = layout.root.join(entry);
        let removed = if path.is_dir() {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        };
        match removed {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("cannot remove {}", path.display()));
            }
            _ => {}
        }
    }
    if let Err(error) = std::fs::remove_dir(&layout.root)
        && error.kind() == std::io::ErrorKind::DirectoryNotEmpty
    {
        output::note(format!(
            "{} has files that are not Craton's; they stay",
            layout.root.display()
        ));
    }
    Ok(())
}
