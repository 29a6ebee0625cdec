//! Names under which the program is called in the images, and what each does.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;

use super::environment::Kind;
use super::{barman, entry, pcp, repmgr};
use crate::cli::wait_for;
use crate::exit::{self, Problem, USAGE};
use crate::{output, owner};

/// A link in an image.
struct Link {
    path: &'static str,
    kinds: &'static [Kind],
    called: Called,
}

/// What a name stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Called {
    Gosu,
    Start,
    Repmgr,
    NodeId,
    WaitLocal,
    IsMajor,
    Schema,
    Barman,
    WalReceiver,
    HasWriteNode,
    HasEnough,
    Pcp,
    Sshd,
    UpstreamId,
    HasPgCluster,
    ClusterMaster,
    Replaced,
}

const NODE: &[Kind] = &[Kind::Node];
const PROXY: &[Kind] = &[Kind::Proxy];
const BACKUP: &[Kind] = &[Kind::Backup];
const ALL: &[Kind] = &[Kind::Node, Kind::Proxy, Kind::Backup];

const fn link(path: &'static str, kinds: &'static [Kind], called: Called) -> Link {
    Link {
        path,
        kinds,
        called,
    }
}

const LINKS: &[Link] = &[
    link("/usr/local/bin/gosu", ALL, Called::Gosu),
    link("/usr/local/bin/sshd_start", ALL, Called::Sshd),
    link("/usr/local/bin/cluster/entrypoint.sh", NODE, Called::Start),
    link("/usr/local/bin/repmgr", NODE, Called::Repmgr),
    link("/usr/local/bin/get_node_id", NODE, Called::NodeId),
    link("/usr/local/bin/get_repmgr_schema", NODE, Called::Schema),
    link(
        "/usr/local/bin/wait_local_postgres",
        NODE,
        Called::WaitLocal,
    ),
    link(
        "/usr/local/bin/get_upstream_node_id",
        NODE,
        Called::UpstreamId,
    ),
    link("/usr/local/bin/has_pg_cluster", NODE, Called::HasPgCluster),
    link("/usr/local/bin/cluster_master", NODE, Called::ClusterMaster),
    // What they waited for is so before this node serves.
    link("/usr/local/bin/wait_recovery", NODE, Called::WaitLocal),
    link("/usr/local/bin/wait_master_clone", NODE, Called::WaitLocal),
    link(
        "/usr/local/bin/wait_upstream_node_id",
        NODE,
        Called::WaitLocal,
    ),
    link(
        "/usr/local/bin/wait_upstream_postgres",
        NODE,
        Called::WaitLocal,
    ),
    link("/usr/local/bin/master_register", NODE, Called::Replaced),
    link("/usr/local/bin/standby_register", NODE, Called::Replaced),
    link("/usr/local/bin/standby_reregister", NODE, Called::Replaced),
    link("/usr/local/bin/node_unregister", NODE, Called::Replaced),
    link("/usr/local/bin/do_master_clone", NODE, Called::Replaced),
    link("/usr/local/bin/do_rewind", NODE, Called::Replaced),
    link(
        "/usr/local/bin/close_partners_slots",
        NODE,
        Called::Replaced,
    ),
    link("/usr/local/bin/postgres_configure", NODE, Called::Replaced),
    link(
        "/usr/local/bin/postdock_polymorphic",
        NODE,
        Called::Replaced,
    ),
    link("/usr/local/bin/wait_db_schema", NODE, Called::Replaced),
    link("/usr/local/bin/system_stop", NODE, Called::Replaced),
    link("/usr/local/bin/system_exit", NODE, Called::Replaced),
    link(
        "/usr/local/bin/cluster/healthcheck/is_major_master.sh",
        NODE,
        Called::IsMajor,
    ),
    link("/usr/local/bin/pgpool/entrypoint.sh", PROXY, Called::Start),
    link(
        "/usr/local/bin/pgpool/has_write_node.sh",
        PROXY,
        Called::HasWriteNode,
    ),
    link(
        "/usr/local/bin/pgpool/has_enough_backends.sh",
        PROXY,
        Called::HasEnough,
    ),
    link("/usr/local/bin/pcp_attach_node", PROXY, Called::Pcp),
    link("/usr/local/bin/pcp_detach_node", PROXY, Called::Pcp),
    link("/usr/local/bin/pcp_node_info", PROXY, Called::Pcp),
    link("/usr/local/bin/pcp_node_count", PROXY, Called::Pcp),
    link("/usr/local/bin/pcp_promote_node", PROXY, Called::Pcp),
    link(
        "/usr/local/bin/barman_docker/entrypoint.sh",
        BACKUP,
        Called::Start,
    ),
    link("/usr/local/bin/barman", BACKUP, Called::Barman),
    link(
        "/usr/local/bin/barman_docker/wal-receiver.sh",
        BACKUP,
        Called::WalReceiver,
    ),
];

/// Makes the links of an image; part of its build.
pub fn make_links(kind: Kind) -> anyhow::Result<u8> {
    for link in LINKS.iter().filter(|l| l.kinds.contains(&kind)) {
        let path = Path::new(link.path);
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)
                .with_context(|| format!("cannot make {}", dir.display()))?;
        }
        std::os::unix::fs::symlink("/usr/local/bin/craton", path)
            .with_context(|| format!("cannot make {}", path.display()))?;
    }
    Ok(exit::OK)
}

/// The link by which the program was called, if it was.
fn called_by(program: &str) -> Option<&'static Link> {
    let mut fits = LINKS.iter().filter(|l| {
        l.path == program || (!program.contains('/') && l.path.rsplit('/').next() == Some(program))
    });
    let first = fits.next()?;
    // `entrypoint.sh` alone could be any of them.
    fits.next().is_none().then_some(first)
}

/// Runs what the name stands for; `None` where the program goes by its own.
pub fn run(args: &[OsString]) -> Option<anyhow::Result<u8>> {
    let text: Vec<String> = args
        .iter()
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    let (program, rest) = text.split_first()?;
    let link = called_by(program)?;
    if let Err(error) = as_service(link.called, args) {
        return Some(Err(error));
    }
    Some(match link.called {
        Called::Gosu => gosu(args.get(1..).unwrap_or_default()),
        Called::Start => link
            .kinds
            .first()
            .map_or(Ok(USAGE), |kind| entry::run(*kind)),
        Called::Repmgr => repmgr::run(rest),
        Called::NodeId => repmgr::node_id(),
        Called::Schema => {
            output::line("repmgr");
            Ok(exit::OK)
        }
        Called::WaitLocal => wait_for(repmgr::wait_local()),
        Called::IsMajor => wait_for(repmgr::is_major()),
        Called::UpstreamId => wait_for(repmgr::scripts::upstream_id()),
        Called::HasPgCluster => Ok(repmgr::scripts::has_pg_cluster()),
        Called::ClusterMaster => wait_for(repmgr::scripts::cluster_master()),
        Called::Replaced => repmgr::scripts::replaced(name_of(program)),
        Called::Barman => barman::run(rest),
        Called::WalReceiver => barman::run(&["cron".to_owned()]),
        Called::HasWriteNode => wait_for(pcp::has_write_node()),
        Called::HasEnough => wait_for(pcp::has_enough(rest)),
        Called::Pcp => pcp::run(name_of(program), rest),
        Called::Sshd => sshd(),
    })
}

/// The last part of a path.
fn name_of(program: &str) -> &str {
    program.rsplit('/').next().unwrap_or(program)
}

fn sshd() -> anyhow::Result<u8> {
    let account = owner::is_root().then(owner::service_account).transpose()?;
    super::ssh::start(account.as_ref())?;
    Ok(exit::OK)
}

/// `docker exec` comes as root; what asks PostgreSQL has to be its user. Returns where that is so already, or where
/// root is meant.
fn as_service(called: Called, args: &[OsString]) -> anyhow::Result<()> {
    if !owner::is_root() || matches!(called, Called::Gosu | Called::Start | Called::Sshd) {
        return Ok(());
    }
    let account = owner::service_account()?;
    let mut command = Command::new("/proc/self/exe");
    if let Some((program, rest)) = args.split_first() {
        command.arg0(program).args(rest);
    }
    let error = become_account(&mut command, &account).exec();
    Err(error).with_context(|| format!("cannot become {}", account.name))
}

/// Sets a command up to run as an account. std clears the supplementary groups when root sets another uid.
pub fn become_account<'c>(command: &'c mut Command, account: &owner::Account) -> &'c mut Command {
    command
        .uid(account.uid)
        .gid(account.gid)
        .env("HOME", &account.home)
        .env("USER", &account.name)
        .env("LOGNAME", &account.name)
}

/// `gosu USER COMMAND…`: the command as the user, in this very process.
fn gosu(args: &[OsString]) -> anyhow::Result<u8> {
    let usage = || {
        Problem::new(
            USAGE,
            "gosu needs a user and a command",
            "gosu postgres COMMAND",
        )
    };
    let (Some(user), Some(program)) = (args.first(), args.get(1)) else {
        return Err(usage().into());
    };
    let user = user.to_string_lossy();
    let account = owner::account(user.split(':').next().unwrap_or_default())?;
    let mut command = Command::new(program);
    command.args(args.get(2..).unwrap_or_default());
    // An ordinary user may become itself.
    if rustix::process::geteuid().as_raw() != account.uid {
        become_account(&mut command, &account);
    }
    let error = command.exec();
    Err(error).with_context(|| format!("cannot run {} as {user}", program.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_link_is_in_an_image_once() {
        for (n, link) in LINKS.iter().enumerate() {
            assert!(link.path.starts_with("/usr/local/bin/"), "{}", link.path);
            let again = LINKS.iter().skip(n + 1).any(|l| l.path == link.path);
            assert!(!again, "{}", link.path);
        }
    }

    #[test]
    fn names_with_and_without_their_path() {
        let called = |program: &str| called_by(program).map(|l| l.called);
        assert_eq!(called("repmgr"), Some(Called::Repmgr));
        assert_eq!(called("/usr/local/bin/repmgr"), Some(Called::Repmgr));
        assert_eq!(called("pcp_node_info"), Some(Called::Pcp));
        assert_eq!(called("get_upstream_node_id"), Some(Called::UpstreamId));
        assert_eq!(called("has_pg_cluster"), Some(Called::HasPgCluster));
        assert_eq!(called("cluster_master"), Some(Called::ClusterMaster));
        assert_eq!(called("wait_recovery"), Some(Called::WaitLocal));
        assert_eq!(called("node_unregister"), Some(Called::Replaced));
        assert_eq!(name_of("/usr/local/bin/do_rewind"), "do_rewind");
        assert_eq!(
            called("/usr/local/bin/pgpool/entrypoint.sh"),
            Some(Called::Start)
        );
        for other in [
            "craton",
            "entrypoint.sh",
            "target/debug/craton",
            "./repmgr",
            "",
        ] {
            assert_eq!(called(other), None, "{other}");
        }
    }
}
