//! `craton adopt follow` and `craton adopt takeover`: from a running cluster of another system with a switchover.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use craton_agent::{AgentConfig, FirstStart};
use craton_core::Lsn;
use craton_pg::{
    Binaries, CloneProgress, Control, DataDir, Instance, InstanceConfig, PgError, Postmaster,
    ServerSample, StopMode, Upstream,
};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::cli::{DaemonArgs, wait_for};
use crate::config;
use crate::exit::{self, NOT_IN_TIME, Problem, REFUSED, USAGE};
use crate::output;

/// A started standby reads its WAL before it answers.
const READY_MAX: Duration = Duration::from_secs(300);
/// Until it streams.
const STREAM_MAX: Duration = Duration::from_secs(60);
/// How often is looked.
const LOOK: Duration = Duration::from_millis(20);
/// A look that takes longer counts as none.
const LOOK_MAX: Duration = Duration::from_secs(2);
/// Between two lines of news.
const NEWS: Duration = Duration::from_secs(5);
/// A promotion, with the end of recovery.
const PROMOTE_MAX: Duration = Duration::from_secs(60);
/// A stop, with its checkpoint.
const STOP_MAX: Duration = Duration::from_secs(120);
/// WAL is looked through from a position that is no further back than this.
const LOOK_BACK_BYTES: u64 = 64 << 20;

/// `craton adopt follow`
#[derive(Args, Debug)]
pub struct FollowArgs {
    /// Settings of the member
    #[command(flatten)]
    pub daemon: DaemonArgs,
    /// The primary that is followed
    #[arg(long, value_name = "HOST:PORT")]
    pub from: String,
    /// A role there that may replicate; pg_hba.conf there must let it in from this host
    #[arg(long, value_name = "ROLE")]
    pub user: String,
    /// A file with its password in the first line
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
}

/// `craton adopt takeover`
#[derive(Args, Debug)]
pub struct TakeoverArgs {
    /// Settings of the member
    #[command(flatten)]
    pub daemon: DaemonArgs,
    /// How long the shutdown of the primary is waited for, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub wait: u64,
    /// Run this with sh, as this user, once the database may be adopted, for example "sudo systemctl start craton-node"
    #[arg(long, value_name = "COMMAND")]
    pub then: Option<String>,
}

/// Runs `craton adopt follow`.
pub(super) fn follow(args: &FollowArgs) -> anyhow::Result<u8> {
    let settings = settings(&args.daemon)?;
    let (host, port) = args
        .from
        .rsplit_once(':')
        .and_then(|(host, port)| Some((host.to_owned(), port.parse().ok()?)))
        .ok_or_else(|| {
            Problem::new(
                USAGE,
                format!("--from {} is not HOST:PORT", args.from),
                "for example --from db-old:5432",
            )
        })?;
    let instance = instance(&settings)?;
    let upstream = Upstream {
        host,
        port,
        user: args.user.clone(),
        passfile: passfile(&settings.dir, args)?,
        application_name: settings.member.to_string(),
        slot: Some(settings.member.slot_name()),
        tls: None,
    };
    wait_for(copy_and_start(&instance, upstream, &args.from))
}

fn settings(args: &DaemonArgs) -> anyhow::Result<AgentConfig> {
    let settings: AgentConfig = config::load(args, "node")?;
    if settings.first_start != FirstStart::Adopt {
        return Err(Problem::new(
            USAGE,
            format!(
                "{} does not say first_start = \"adopt\" in [node]",
                args.config.display()
            ),
            "without it the member's agent would not found the cluster with this database",
        )
        .into());
    }
    Ok(settings)
}

fn instance(settings: &AgentConfig) -> anyhow::Result<Instance> {
    Ok(Instance::new(InstanceConfig {
        binaries: Binaries::find(settings.bin_dir.as_deref())?,
        member_dir: settings.dir.clone(),
        // Nobody but its owner talks to it before it is the cluster's.
        listen_addresses: String::new(),
        port: settings.port,
        superuser: "postgres".into(),
        cluster_name: settings.cluster.clone(),
    })?)
}

/// Passwords never stand on a command line or in a connection string.
fn passfile(dir: &Path, args: &FollowArgs) -> anyhow::Result<PathBuf> {
    let password = match &args.password_file {
        Some(path) => std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?,
        None => String::new(),
    };
    let password = password.lines().next().unwrap_or_default().trim();
    let escape = |s: &str| s.replace('\\', "\\\\").replace(':', "\\:");
    let path = dir.join("follow.pgpass");
    let line = format!("*:*:*:{}:{}\n", escape(&args.user), escape(password));
    craton_trust::files::write_secret(&path, &line)?;
    Ok(path)
}

async fn copy_and_start(instance: &Instance, upstream: Upstream, from: &str) -> anyhow::Result<u8> {
    let empty = match instance.data_dir_state().await? {
        DataDir::Empty | DataDir::HalfClone => true,
        DataDir::Cluster { .. } if instance.is_marked().await => {
            return Err(not_here(
                instance,
                "holds a database that Craton has run already",
            ));
        }
        DataDir::Cluster { .. } => false,
        other => return Err(not_here(instance, &format!("cannot be used: {other}"))),
    };
    if empty {
        output::note(format!("copying {from} …"));
        let (progress, seen) = watch::channel(CloneProgress::default());
        let told = tokio::spawn(tell(seen));
        let copied = instance.clone_foreign(&upstream, progress).await;
        told.abort();
        copied?;
    }
    let process = match instance.adopt().await? {
        Some(process) => process,
        None if !empty && !instance.data_dir().join("standby.signal").exists() => {
            return Err(not_here(instance, "holds a database that is no standby"));
        }
        None => instance.start_foreign_standby(upstream).await?,
    };
    let ready = instance.wait_ready(&process, READY_MAX).await;
    ready.context("the copy does not answer; the superuser postgres must exist on the primary")?;
    let sample = streams(instance).await?;
    output::line(format!(
        "following {from}: received up to {} on timeline {}\n\
         Next: craton adopt takeover, and when it says so shut the primary down",
        sample.end_of_wal(),
        sample.timeline
    ));
    Ok(exit::OK)
}

fn not_here(instance: &Instance, why: &str) -> anyhow::Error {
    Problem::new(
        REFUSED,
        format!("{} {why}", instance.data_dir().display()),
        "nothing was changed; use a directory of its own for the member (node.dir)",
    )
    .into()
}

async fn tell(mut seen: watch::Receiver<CloneProgress>) {
    while seen.changed().await.is_ok() {
        let now = *seen.borrow_and_update();
        if let Some(percent) = (now.done_bytes * 100).checked_div(now.total_bytes) {
            output::note(format!(
                "  {} of {} ({percent} %)",
                output::bytes(now.done_bytes),
                output::bytes(now.total_bytes)
            ));
        }
        sleep(NEWS).await;
    }
}

async fn streams(instance: &Instance) -> anyhow::Result<ServerSample> {
    let control = instance.control();
    let until = Instant::now() + STREAM_MAX;
    loop {
        let sample = look(&control, until).await?;
        if sample.is_streaming() {
            return Ok(sample);
        }
        if Instant::now() > until {
            let what = "the copy does not stream from the primary";
            let hint = format!("{} says why", instance.log_path().display());
            return Err(Problem::new(NOT_IN_TIME, what, hint).into());
        }
        sleep(LOOK).await;
    }
}

/// Runs `craton adopt takeover`.
pub(super) fn takeover(args: &TakeoverArgs) -> anyhow::Result<u8> {
    let settings = settings(&args.daemon)?;
    let instance = instance(&settings)?;
    wait_for(take_over(&instance, Duration::from_secs(args.wait)))?;
    let _ = std::fs::remove_file(settings.dir.join("follow.pgpass"));
    let Some(then) = &args.then else {
        output::line("Next: start this member's agent; it founds the cluster with this database");
        return Ok(exit::OK);
    };
    let status = Command::new("sh").args(["-c", then]).status();
    let status = status.with_context(|| format!("cannot run {then}"))?;
    anyhow::ensure!(
        status.success(),
        "{then} failed ({status}); the database may be adopted"
    );
    Ok(exit::OK)
}

async fn take_over(instance: &Instance, wait: Duration) -> anyhow::Result<()> {
    let Some(process) = instance.adopt().await? else {
        return Err(Problem::new(
            REFUSED,
            format!("no PostgreSQL runs in {}", instance.data_dir().display()),
            "craton adopt follow copies the primary and follows it",
        )
        .into());
    };
    if instance.is_marked().await {
        return Err(not_here(instance, "is run by an agent of Craton already"));
    }
    let control = instance.control();
    let sample = look(&control, Instant::now() + wait).await?;
    // A take-over that was cut off after the promotion goes on there.
    if sample.in_recovery {
        let began = wait_for_shutdown(instance, &process, sample, wait).await?;
        let timeline = control.promote(PROMOTE_MAX).await?;
        output::note(format!(
            "promoted to timeline {timeline}, {} after the primary was gone",
            output::duration(began.elapsed())
        ));
    }
    control.disconnect().await;
    process.stop(StopMode::Fast, STOP_MAX).await?;
    instance.forget_foreign().await?;
    Ok(())
}

/// Returns since when the primary is gone. Everything that it ever acknowledged is here then: it sends its last record
/// to its standbys before it ends (walsender.c, `WalSndDone`).
async fn wait_for_shutdown(
    instance: &Instance,
    process: &Postmaster,
    mut sample: ServerSample,
    wait: Duration,
) -> anyhow::Result<Instant> {
    let control = instance.control();
    // Little is left to be written by the stop.
    if let Err(error) = control.checkpoint(STOP_MAX).await {
        output::note(format!("a checkpoint before the take-over failed: {error}"));
    }
    let until = Instant::now() + wait;
    let (mut from, mut last) = (sample.end_of_wal(), sample.end_of_wal());
    let mut news = Instant::now();
    let mut gone: Option<Instant> = None;
    output::note(
        "following; shut the old primary down now, in order (pg_ctl stop -m fast, or its service): clients wait from then on",
    );
    loop {
        anyhow::ensure!(
            process.is_running(),
            "PostgreSQL ended; {} says why",
            instance.log_path().display()
        );
        let streaming = sample.is_streaming();
        let end = sample.end_of_wal();
        if streaming {
            gone = None;
            if end.0.saturating_sub(from.0) > LOOK_BACK_BYTES {
                from = last;
            }
            last = end;
        } else {
            let since = *gone.get_or_insert_with(Instant::now);
            if has_replayed(&sample, end)
                && instance.ends_with_shutdown(sample.timeline, from).await?
            {
                return Ok(since);
            }
        }
        if news.elapsed() >= NEWS {
            news = Instant::now();
            output::note(if streaming {
                format!("  still streaming, at {end}")
            } else {
                format!(
                    "  the connection to the primary is gone, but its shutdown has not come ({end} is the end here): it was not stopped in order, or the network is away"
                )
            });
        }
        if Instant::now() > until {
            return Err(Problem::new(
                NOT_IN_TIME,
                format!("the primary's shutdown did not come within {} s; nothing was changed", wait.as_secs()),
                "if it died without a shutdown, start it again and stop it in order; what only it has would be lost otherwise",
            )
            .into());
        }
        sleep(LOOK).await;
        sample = look(&control, until).await?;
    }
}

/// One look at the server; again while it takes too long, for a busy host is none that has failed.
async fn look(control: &Control, until: Instant) -> anyhow::Result<ServerSample> {
    loop {
        match control.sample(LOOK_MAX).await {
            Err(PgError::Timeout { .. }) if Instant::now() < until => {}
            sample => return Ok(sample?),
        }
    }
}

fn has_replayed(sample: &ServerSample, end: Lsn) -> bool {
    sample.replay_lsn == Some(end)
}
