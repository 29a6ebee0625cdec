//! `craton container`: what the images run, and the old stack's commands inside them.
//!
//! # Layout
//! * [`environment`]: the variables, their meaning, their `_FILE` forms; [`plan`]: from them to a daemon's settings. Pure.
//! * [`entry`]: the image's command: environment, directories, [`keys`], [`adopt`], [`ssh`]; then away with root. [`stop`]: signals until then.
//! * [`init`]: the first process: children, signals, the dead. [`leave`]: the handover before a stop.
//! * [`daemon`]: waits for what must be there and becomes the daemon. [`health`]: whether it is alive, whether it serves.
//! * [`recover`]: a whole cluster back to a point in time.
//! * [`settings`]: which variable each setting comes from.
//! * [`side`]: metrics and health in the clear, [`first_start`], [`nodes_table`] and [`known_nodes`], the backups' [`schedule`].
//! * [`names`]: links to the program; [`repmgr`], [`pcp`], [`barman`]: what they do, with their [`options`]; [`shown`]: files that are looked at.

use clap::Subcommand;

use crate::cli::wait_for;

pub mod adopt;
pub mod barman;
pub mod daemon;
pub mod entry;
pub mod environment;
pub mod first_start;
pub mod health;
pub mod init;
pub mod keys;
pub mod known_nodes;
pub mod leave;
pub mod names;
pub mod nodes_table;
pub mod options;
pub mod pcp;
pub mod plan;
pub mod recover;
pub mod repmgr;
pub mod schedule;
pub mod settings;
pub mod shown;
pub mod side;
pub mod ssh;
pub mod stop;

use environment::Kind;

/// The sub-commands of `craton container`.
#[derive(Subcommand, Debug)]
pub enum ContainerCommand {
    /// Run a database node, as its environment says
    Node,
    /// Run the proxy, as its environment says
    Proxy,
    /// Run the backup daemon, as its environment says
    Backup,
    /// Whether this container is alive, also while it serves nobody because it is cloned, recovers, or waits for a leader:
    /// exit code 0 or 1
    Health {
        /// Whether it serves
        #[arg(long)]
        ready: bool,
    },
    /// Make this node's volume begin a new cluster with the database as it was at a point in time. In a container of
    /// its own, with the repository mounted, while the cluster is stopped
    Recover(recover::RecoverArgs),
    /// Set aside what this node's volume holds, so that the node is cloned anew. While it is stopped, or in its container
    /// where that only waits because the node was removed from the cluster
    SetAside,
    /// The first process of a container (the commands above become it)
    #[command(hide = true)]
    Init {
        /// Which image
        kind: Kind,
    },
    /// The daemon of a container (its first process starts it)
    #[command(hide = true)]
    Daemon {
        /// Which image
        kind: Kind,
    },
    /// What helps the daemon of a container (its first process starts it)
    #[command(hide = true)]
    Side,
    /// Hand over before a stop (the first process does)
    #[command(hide = true)]
    Leave,
    /// Make the links to the program (the images' build does)
    #[command(hide = true)]
    Links {
        /// Which image
        kind: Kind,
    },
}

/// Runs the command.
pub fn run(command: &ContainerCommand) -> anyhow::Result<u8> {
    match command {
        ContainerCommand::Node => entry::run(Kind::Node),
        ContainerCommand::Proxy => entry::run(Kind::Proxy),
        ContainerCommand::Backup => entry::run(Kind::Backup),
        ContainerCommand::Health { ready: false } => wait_for(async { Ok(health::alive().await) }),
        ContainerCommand::Health { ready: true } => wait_for(async { Ok(health::ready().await) }),
        ContainerCommand::Recover(args) => recover::run(args),
        ContainerCommand::SetAside => recover::set_aside(),
        ContainerCommand::Init { kind } => init::run(*kind),
        ContainerCommand::Daemon { kind } => daemon::run(*kind),
        ContainerCommand::Side => side::run(),
        ContainerCommand::Leave => {
            crate::daemons::log_to_stderr("info", false);
            wait_for(leave::run())
        }
        ContainerCommand::Links { kind } => names::make_links(*kind),
    }
}
