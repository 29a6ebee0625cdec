//! What may be typed. The reference page `docs/reference/commands.md` is rendered from here.

use std::ffi::OsString;
use std::future::Future;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use craton_core::MemberId;

use crate::access::Access;
use crate::{
    adopt, backup, ca, change, configure, container, coordinator, daemons, divergence, doctor,
    down, drill, explain, history, join, layout, maintenance, member, psql, recover, restore,
    status, supervise, up,
};

/// High availability for PostgreSQL and PostGIS: failover, pooling proxy and backup in one program.
#[derive(Parser, Debug)]
#[command(
    name = "craton",
    version,
    max_term_width = 100,
    disable_help_subcommand = true
)]
pub struct Cli {
    /// Directory of the local cluster [default: /var/lib/craton for root, else ~/.local/share/craton]
    #[arg(
        long,
        global = true,
        env = "CRATON_DIR",
        value_name = "DIR",
        hide_env_values = true
    )]
    pub dir: Option<PathBuf>,
    /// Results as JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// API addresses of the agents, instead of those of a local cluster
    #[arg(
        long,
        global = true,
        env = "CRATON_API",
        value_name = "HOST:PORT,…",
        value_delimiter = ',',
        hide_env_values = true
    )]
    pub api: Vec<String>,
    /// Directory with authority.pem and operator.pem for the agents named by --api or the backup daemon named by
    /// --daemon, as `craton join` makes it
    #[arg(
        long,
        global = true,
        env = "CRATON_CERTS",
        value_name = "DIR",
        hide_env_values = true
    )]
    pub certs: Option<PathBuf>,
    /// File with a token that opens the API of the agents named by --api, instead of a certificate
    #[arg(
        long,
        global = true,
        env = "CRATON_TOKEN_FILE",
        value_name = "FILE",
        hide_env_values = true
    )]
    pub token_file: Option<PathBuf>,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The sub-commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Start a local cluster: members, proxy and backup on loopback, with a sample map
    Up(UpArgs),
    /// Stop the local cluster
    Down(DownArgs),
    /// Members, roles, timelines, lag, lease, sync set, and what would happen next
    Status(StatusArgs),
    /// Why the cluster does, or does not do, something
    Explain {
        /// Ask this member's agent [default: the leader's]
        member: Option<MemberId>,
    },
    /// Hand the leadership over as planned: clients of the proxy see a pause, no error
    Switchover(change::SwitchoverArgs),
    /// Replace a leader that is gone, where the cluster may not do so by itself
    Failover(change::FailoverArgs),
    /// Maintenance: no automatic failover, start, rewind or clone until craton resume
    ///
    /// The lease and the fence go on: a leader that loses its lease is stopped all the same, and stays so. What is
    /// asked for (switchover, failover, restart, reinit) is done in a pause too.
    Pause(maintenance::PauseArgs),
    /// End the pause
    Resume,
    /// Restart PostgreSQL: standbys one at a time, the leader last, without an error for clients of the proxy
    ///
    /// The next one begins when the last one streams, has caught up, and counts for durability again. The cluster
    /// works on it by itself, also if this command is interrupted; it stops by itself if a member does not
    /// come back. Where parameters are lowered that a standby needs as much of as its primary, the leader
    /// comes first, in place.
    Restart(maintenance::RestartArgs),
    /// Have PostgreSQL read its configuration anew
    Reload(maintenance::ReloadArgs),
    /// Throw a standby's data directory away and clone it anew
    ///
    /// Refused for the leader, and while acknowledged commits may rest on that copy.
    Reinit(maintenance::ReinitArgs),
    /// Everything that is or will be wrong, and what to do about it
    ///
    /// Exit code 0: nothing (or notes only); 9: warnings; 10: clients are stopped, or will be by the next failure.
    Doctor(doctor::DoctorArgs),
    /// Cluster-wide settings and PostgreSQL's parameters for all members: show, set, unset, edit
    #[command(subcommand)]
    Config(configure::ConfigCommand),
    /// Changes of leadership and what was asked for, oldest first
    History,
    /// Who takes part: list, take out, give and take a say
    #[command(subcommand)]
    Member(member::MemberCommand),
    /// Where the cluster's records are (in the members, or in an etcd), and moving them
    #[command(subcommand)]
    Coordinator(coordinator::CoordinatorCommand),
    /// Data directories that were there before the cluster
    #[command(subcommand)]
    Adopt(adopt::AdoptCommand),
    /// On a surviving member whose agent is stopped: go on alone when the majority of the voters is lost for good
    Recover(recover::RecoverArgs),
    /// WAL that members kept because the cluster does not have it
    #[command(subcommand)]
    Divergence(divergence::DivergenceCommand),
    /// psql through the proxy, with the password taken from the cluster's secrets
    Psql(PsqlArgs),
    /// Backups, the WAL archive, and the daemon that makes them
    #[command(subcommand)]
    Backup(backup::BackupCommand),
    /// The cluster's authority, and tokens for hosts that are to join
    #[command(subcommand)]
    Ca(ca::CaCommand),
    /// Get the certificate and the secrets of this host's role, with a token of `craton ca token`
    Join(join::JoinArgs),
    /// Restore a backup into a new directory that PostgreSQL starts from
    Restore(restore::RestoreArgs),
    /// Break the local cluster on purpose, and measure outage, errors, lost rows and healing
    Drill(drill::DrillArgs),
    /// Run the agent beside one PostgreSQL
    Node(DaemonArgs),
    /// Run the proxy
    Proxy(DaemonArgs),
    /// Run a witness: a voter without a PostgreSQL, so that two members have a majority when one is lost
    Witness(DaemonArgs),
    /// What Craton's images run: the environment of a container says what
    #[command(subcommand)]
    Container(container::ContainerCommand),
    /// Run the fence of one PostgreSQL (the agent does)
    #[command(hide = true)]
    Fence {
        /// The board on which the agent says whom to guard and until when
        board: PathBuf,
        /// The watchdog device to feed while PostgreSQL may run
        #[arg(long)]
        watchdog: Option<PathBuf>,
    },
    /// Run the supervisor of a local cluster (`craton up` does)
    #[command(hide = true)]
    Supervise,
}

/// Members of a local cluster.
pub const MEMBERS_DEFAULT: u8 = 3;

/// The first port of a local cluster.
pub const BASE_PORT_DEFAULT: u16 = 6430;

/// How many copies a commit waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Durability {
    /// Flushed on the leader only
    Async,
    /// Flushed on the leader and a quorum of standbys; goes on alone when they are gone
    Quorum,
    /// As quorum; when they are gone writes wait
    Strict,
}

impl Durability {
    /// The word in settings files.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Async => "async",
            Self::Quorum => "quorum",
            Self::Strict => "strict",
        }
    }
}

/// `craton up`
#[derive(Args, Debug)]
pub struct UpArgs {
    /// How many members [default: 3]; more than a running cluster has are added to it
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=i64::from(layout::MEMBERS_MAX)))]
    pub members: Option<u8>,
    /// When a commit is acknowledged
    #[arg(long, value_enum, default_value_t = Durability::Quorum)]
    pub durability: Durability,
    /// Let commits wait for the backup daemon as for a standby: what only it has received is not lost
    #[arg(long)]
    pub synchronous_backup: bool,
    /// With a witness: a voter without a database, so that two members can lose one
    #[arg(long)]
    pub witness: bool,
    /// Where the cluster keeps its records
    #[arg(long, value_enum, default_value_t = coordinator::Kind::Embedded)]
    pub coordinator: coordinator::Kind,
    /// How etcd is reached
    #[command(flatten)]
    pub etcd: coordinator::EtcdArgs,
    /// Leave the sample map out
    #[arg(long)]
    pub no_sample: bool,
    /// Found the cluster with a copy of this PostgreSQL data directory, whose server is stopped
    #[arg(long, value_name = "DIRECTORY")]
    pub adopt: Option<PathBuf>,
    /// First of the ports: the proxy gets this + 2 for writes and + 3 for reads
    #[arg(long, default_value_t = BASE_PORT_DEFAULT, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1024..=65000))]
    pub base_port: u16,
}

/// `craton down`
#[derive(Args, Debug)]
pub struct DownArgs {
    /// Remove the cluster with all its data and backups
    #[arg(long)]
    pub purge: bool,
}

/// `craton status`
#[derive(Args, Debug)]
pub struct StatusArgs {
    /// Show it again and again, until interrupted
    #[arg(long)]
    pub watch: bool,
}

/// `craton psql`
#[derive(Args, Debug)]
pub struct PsqlArgs {
    /// Connect to the endpoint for reads, which the standbys serve
    #[arg(long)]
    pub read: bool,
    /// Arguments of psql
    #[arg(
        allow_hyphen_values = true,
        trailing_var_arg = true,
        value_name = "PSQL ARGUMENT"
    )]
    pub args: Vec<OsString>,
}

/// Arguments of every daemon.
#[derive(Args, Debug, Clone)]
pub struct DaemonArgs {
    /// Settings file
    #[arg(
        long,
        env = "CRATON_CONFIG",
        default_value = "craton.toml",
        value_name = "FILE",
        hide_env_values = true
    )]
    pub config: PathBuf,
    /// A setting on top of the file and of CRATON_* variables, for example proxy.listen=0.0.0.0:5432
    #[arg(long = "set", value_name = "TABLE.KEY=VALUE")]
    pub set: Vec<String>,
    /// Write the process id here, and refuse to run twice
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
}

/// A runtime for a command: it waits much and computes little.
pub fn wait_for<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.context("cannot start the event loop")?;
    let result = runtime.block_on(work);
    // A name lookup that hangs in the background must not keep the command from ending.
    runtime.shutdown_background();
    result
}

/// Runs a command; the result is the exit code.
pub fn dispatch(cli: Cli) -> anyhow::Result<u8> {
    // First: it must start fast, and on nothing but its board.
    if let Command::Fence { board, watchdog } = &cli.command {
        return daemons::fence(board, watchdog.clone());
    }
    let json = cli.json;
    let dir = layout::directory(cli.dir.as_deref())?;
    let access = || {
        Access::open(
            &cli.api,
            cli.certs.as_deref(),
            cli.token_file.as_ref(),
            &dir,
        )
    };
    match cli.command {
        Command::Up(args) => up::run(&dir, &args),
        Command::Down(args) => down::run(&dir, &args),
        Command::Supervise => wait_for(supervise::run(&dir)),
        Command::Fence { board, watchdog } => daemons::fence(&board, watchdog),
        Command::Container(command) => container::run(&command),
        Command::Node(args) => daemons::node(&args),
        Command::Proxy(args) => daemons::proxy(&args),
        Command::Witness(args) => daemons::witness(&args),
        Command::Status(args) => wait_for(status::run(&access()?, &args, json)),
        Command::Explain { member } => wait_for(explain::run(&access()?, member, json)),
        Command::Switchover(args) => wait_for(change::switchover(&access()?, args, json)),
        Command::Failover(args) => wait_for(change::failover(&access()?, args, json)),
        Command::Pause(args) => wait_for(maintenance::pause(&access()?, args, json)),
        Command::Resume => wait_for(maintenance::resume(&access()?, json)),
        Command::Restart(args) => wait_for(maintenance::restart(&access()?, args, json)),
        Command::Reload(args) => wait_for(maintenance::reload(&access()?, args, json)),
        Command::Reinit(args) => wait_for(maintenance::reinit(&access()?, args, json)),
        Command::Doctor(args) => wait_for(doctor::run(&access()?, &dir, &args, json)),
        Command::Config(command) if !json && configure::show_own(&command)? => Ok(crate::exit::OK),
        Command::Config(command) => wait_for(configure::run(&access()?, command, json)),
        Command::History => wait_for(history::run(&access()?, json)),
        Command::Member(command) => wait_for(member::run(&access()?, &dir, command, json)),
        Command::Coordinator(command) => {
            wait_for(coordinator::run(&access()?, &dir, command, json))
        }
        Command::Divergence(command) => wait_for(divergence::run(&access()?, command, json)),
        Command::Adopt(command) => adopt::run(&command, json),
        Command::Recover(args) => recover::run(&args),
        Command::Psql(args) => psql::run(&dir, args),
        Command::Backup(command) => {
            let certificates = cli.certs.as_deref();
            let here = backup::Here {
                dir: &dir,
                certificates,
            };
            backup::run(here, command, json)
        }
        Command::Ca(command) => run_ca(command, &dir, access, json),
        Command::Join(args) => wait_for(join::run(args, json)),
        Command::Restore(args) => restore::run(&dir, &args, json),
        Command::Drill(args) => drill::run(&dir, args, json),
    }
}

fn run_ca(
    command: ca::CaCommand,
    dir: &Path,
    access: impl Fn() -> anyhow::Result<Access>,
    json: bool,
) -> anyhow::Result<u8> {
    let local = |secrets: Option<PathBuf>| match secrets {
        Some(secrets) => Ok(secrets),
        None => layout::Layout::require(dir).map(|l| l.secrets()),
    };
    match command {
        ca::CaCommand::Init { cluster, secrets } => ca::init(&cluster, &secrets, json),
        ca::CaCommand::Token(args) => wait_for(ca::token(&access()?, args, json)),
        ca::CaCommand::Show { secrets } => ca::show(&local(secrets)?, json),
        ca::CaCommand::Rotate { step, secrets } => ca::rotate(step, &local(secrets)?),
    }
}
