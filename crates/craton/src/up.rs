//! `craton up`: a whole cluster on this machine, ready when the command returns.

use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use craton_agent::Place;
use tokio::time::{Instant, sleep};

use crate::access::Access;
use crate::cli::{BASE_PORT_DEFAULT, Durability, MEMBERS_DEFAULT, UpArgs};
use crate::coordinator::Kind;
use crate::exit::{self, NOT_IN_TIME, Problem};
use crate::layout::{CLUSTER_FILE, ClusterFile, FORMAT, Layout, member_names};
use crate::output::{self, Colour, paint};
use crate::{
    adopt, down, owner, preflight, processes, ready, sample, secrets, settings, status, supervise,
};

/// The name of a local cluster.
const CLUSTER_NAME: &str = "local";

/// How long the supervisor may take to appear.
const SUPERVISOR_TIMEOUT: Duration = Duration::from_secs(10);

/// How long members that are added to a running cluster may take to stream.
const JOIN_TIMEOUT: Duration = Duration::from_secs(300);

/// How often is looked.
const JOIN_POLL: Duration = Duration::from_millis(200);

/// How long loading the map may hold up a command that found the cluster up.
const SAMPLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Runs the command.
pub fn run(dir: &Path, args: &UpArgs) -> anyhow::Result<u8> {
    if let Some(account) = owner::successor(dir)? {
        let new = !dir.exists();
        if new {
            // Before anything is made: what is missing is said without leaving a trace.
            match &args.adopt {
                Some(source) => adopt::programs_for(source).map(|_| ())?,
                None => preflight::postgres(!args.no_sample).map(|_| ())?,
            }
        }
        let made = owner::prepare_directory(dir, &account)?;
        let typed: Vec<_> = std::env::args_os().collect();
        let code = owner::run_to_the_end(owner::again_as(&account, dir, &typed))?;
        if made && code != exit::OK {
            // Only root may take the empty directory away again. It stays where something is in it.
            let _ = std::fs::remove_dir(dir);
        }
        return Ok(code);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(start(dir, args));
    runtime.shutdown_background();
    result
}

async fn start(dir: &Path, args: &UpArgs) -> anyhow::Result<u8> {
    let existing = Layout::load(dir)?;
    let is_new = existing.is_none();
    let layout = match existing {
        Some(layout) => {
            if processes::running(&layout, supervise::NAME).is_some() {
                let more = args.members.unwrap_or(0);
                if usize::from(more) > layout.cluster.members.len() {
                    return grow(layout, more).await;
                }
                return already_up(&layout).await;
            }
            again(&layout, args)?;
            layout
        }
        None => new_cluster(dir, args, place_of_new(args).await?)?,
    };
    let outcome = tokio::select! {
        outcome = bring_up(&layout) => outcome,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        () = terminated() => Err(anyhow::anyhow!("told to stop")),
    };
    match outcome {
        Ok(()) => {
            output::line(summary(&layout, &Access::local(&layout)?.status().await?));
            Ok(exit::OK)
        }
        Err(error) => {
            output::note(ready::last_words(&layout));
            down::stop(&layout)
                .await
                .context("and what had been started cannot be stopped")?;
            if is_new {
                down::forget_records(&layout).await;
                down::purge(&layout)?;
                output::note("what had been made is removed again");
            } else {
                output::note("what had been started is stopped again; the data stays");
            }
            Err(error)
        }
    }
}

/// SIGTERM, as from a service manager or `timeout`. Without a handler it would leave half a cluster.
async fn terminated() {
    match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        Ok(mut terminate) => {
            terminate.recv().await;
        }
        Err(_) => std::future::pending().await,
    }
}

async fn already_up(layout: &Layout) -> anyhow::Result<u8> {
    output::line(format!(
        "the cluster in {} is up already",
        layout.root.display()
    ));
    // An earlier start may have been cut off before it came to the map.
    if layout.cluster.sample
        && let Ok(Err(error)) = tokio::time::timeout(SAMPLE_TIMEOUT, sample::load(layout)).await
    {
        output::note(format!("warning: {error:#}"));
    }
    match Access::local(layout)?.status().await {
        Ok(view) => output::line(summary(layout, &view)),
        Err(error) => output::note(format!("but {error:#}")),
    }
    Ok(exit::OK)
}

/// Adds members to a running cluster.
async fn grow(mut layout: Layout, count: u8) -> anyhow::Result<u8> {
    let before = layout.clone();
    let added = layout.grow(count)?;
    if added.is_empty() {
        return Err(Problem::new(
            exit::FAILURE,
            "there is no name left for another member",
            "directories of removed members keep their names: remove them below members/",
        )
        .into());
    }
    preflight::disk(&layout.root)?;
    preflight::ports_of(&layout, &before)?;
    write_files(&layout)?;
    // Last: the supervisor starts what is in it.
    layout.write()?;
    let names: Vec<&str> = added.iter().map(craton_core::MemberId::as_str).collect();
    output::note(format!("adding {} …", names.join(", ")));
    let view = joined(&layout).await?;
    output::line(summary(&layout, &view));
    Ok(exit::OK)
}

/// Waits until every member of the description streams, or leads.
async fn joined(layout: &Layout) -> anyhow::Result<craton_console::views::StatusView> {
    let access = Access::local(layout)?;
    let deadline = Instant::now() + JOIN_TIMEOUT;
    loop {
        // Agents may be too busy to answer at this moment.
        let view = match access.status().await {
            Ok(view) => view,
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => {
                sleep(JOIN_POLL).await;
                continue;
            }
        };
        let there = |m: &craton_console::views::MemberView| {
            m.streaming || view.leader.as_ref() == Some(&m.id)
        };
        let missing: Vec<&str> = layout
            .cluster
            .members
            .iter()
            .filter(|id| !view.members.iter().any(|m| m.id == **id && there(m)))
            .map(craton_core::MemberId::as_str)
            .collect();
        if missing.is_empty() {
            return Ok(view);
        }
        if Instant::now() > deadline {
            let what = format!(
                "{} did not join within {} s; it goes on trying",
                missing.join(", "),
                JOIN_TIMEOUT.as_secs()
            );
            return Err(Problem::new(NOT_IN_TIME, what, "see craton status, and its log").into());
        }
        sleep(JOIN_POLL).await;
    }
}

/// Checks before a cluster that exists is started again.
fn again(layout: &Layout, args: &UpArgs) -> anyhow::Result<()> {
    let cluster = &layout.cluster;
    // What was not typed has its default, and says nothing.
    let other = [
        args.members
            .is_some_and(|n| usize::from(n) != cluster.members.len()),
        args.durability != Durability::Quorum && args.durability.as_str() != cluster.durability,
        args.base_port != BASE_PORT_DEFAULT && args.base_port != cluster.base_port,
        args.synchronous_backup && !cluster.synchronous_backup,
        args.witness && !cluster.witness,
        args.adopt.is_some(),
        args.coordinator != Kind::Embedded
            && !args
                .etcd
                .place(args.coordinator)?
                .is_same_store(&cluster.coordinator),
    ];
    if other.contains(&true) {
        output::note(format!(
            "the cluster in {} has {} members, durability {}, base port {} and its records in {}; it is started as it is",
            layout.root.display(),
            cluster.members.len(),
            cluster.durability,
            cluster.base_port,
            cluster.coordinator
        ));
    }
    if !cluster.postgres_bin.join("postgres").exists() {
        let what = format!(
            "this cluster was made with the PostgreSQL in {}, which is gone",
            cluster.postgres_bin.display()
        );
        return Err(Problem::machine(what, "install that version again").into());
    }
    preflight::disk(&layout.root)?;
    // Daemons that outlived their supervisor hold their own ports, and are adopted.
    let alive = layout
        .daemons()
        .iter()
        .any(|d| processes::running(layout, &d.name()).is_some());
    if !alive {
        preflight::ports(layout)?;
    }
    write_files(layout)
}

/// Where a new cluster keeps its records; it has been looked at.
async fn place_of_new(args: &UpArgs) -> anyhow::Result<Place> {
    let place = args.etcd.place(args.coordinator)?;
    preflight::coordinator(&place, CLUSTER_NAME).await?;
    Ok(place)
}

fn new_cluster(dir: &Path, args: &UpArgs, coordinator: Place) -> anyhow::Result<Layout> {
    let sample = !args.no_sample && args.adopt.is_none();
    let postgres_bin = match &args.adopt {
        Some(source) => adopt::programs_for(source)?,
        None => preflight::postgres(sample)?,
    };
    let existed = dir.exists();
    let checked = (|| {
        preflight::directory(dir)?;
        preflight::disk(dir)?;
        let cluster = ClusterFile {
            format: FORMAT,
            name: CLUSTER_NAME.to_owned(),
            base_port: args.base_port,
            members: member_names(args.members.unwrap_or(MEMBERS_DEFAULT))?,
            joined: Vec::new(),
            durability: args.durability.as_str().to_owned(),
            synchronous_backup: args.synchronous_backup,
            witness: args.witness,
            adopted: args.adopt.is_some(),
            sample,
            postgres_bin,
            coordinator,
        };
        let layout = Layout {
            root: dir.to_owned(),
            cluster,
        };
        preflight::ports(&layout)?;
        anyhow::Ok(layout)
    })();
    let layout = checked.inspect_err(|_| {
        if !existed {
            let _ = std::fs::remove_dir(dir);
        }
    })?;
    let made = (|| {
        // First of all: from here on the directory is known as ours, and can be purged.
        secrets::write_private(&dir.join(CLUSTER_FILE), &toml::to_string(&layout.cluster)?)?;
        write_files(&layout)?;
        let source = args.adopt.as_deref();
        source.map_or(Ok(()), |source| adopt::copy(&layout, source))
    })();
    made.inspect_err(|_| {
        let _ = down::purge(&layout);
    })?;
    Ok(layout)
}

/// Directories, secrets, settings and our copy of the binary; all of it can be written again.
fn write_files(layout: &Layout) -> anyhow::Result<()> {
    let own = [
        layout.conf(),
        layout.log(),
        layout.run(),
        layout.root.join("bin"),
        layout.root.join("members"),
        layout.repository(),
    ];
    let members = layout.cluster.members.iter().map(|m| layout.member(m));
    for dir in own.into_iter().chain(members) {
        let made = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir);
        made.with_context(|| format!("cannot create {}", dir.display()))?;
    }
    secrets::ensure(layout)?;
    settings::write_all(layout)?;
    copy_binary(&layout.binary())
}

/// Daemons run from a copy, so that a new build does not pull the program from under them, and so that
/// the cluster's user can reach it.
fn copy_binary(to: &Path) -> anyhow::Result<()> {
    let temporary = to.with_extension("new");
    let copy = || -> std::io::Result<()> {
        let mut from = std::fs::File::open("/proc/self/exe")?;
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o700)
            .open(&temporary)?;
        std::io::copy(&mut from, &mut file)?;
        file.set_permissions(std::fs::Permissions::from_mode(0o700))?;
        drop(file);
        std::fs::rename(&temporary, to)
    };
    copy().with_context(|| format!("cannot copy this program to {}", to.display()))
}

async fn bring_up(layout: &Layout) -> anyhow::Result<()> {
    let witness = if layout.cluster.witness {
        ", a witness"
    } else {
        ""
    };
    output::note(format!(
        "starting {} members{witness}, proxy and backup in {} …",
        layout.cluster.members.len(),
        layout.root.display()
    ));
    start_supervisor(layout).await?;
    if layout.cluster.adopted {
        adopt::let_superuser_in(layout).await?;
    }
    ready::wait(layout).await?;
    if layout.cluster.sample
        && let Some(loaded) = sample::load(layout).await?
    {
        output::note(format!(
            "  loaded the sample map: {} countries, {} cities",
            loaded.countries, loaded.cities
        ));
    }
    Ok(())
}

async fn start_supervisor(layout: &Layout) -> anyhow::Result<()> {
    let log = supervise::open_log(layout, supervise::NAME)?;
    let errors = log.try_clone().context("cannot share the log")?;
    let mut child = Command::new(layout.binary())
        .arg("supervise")
        .arg("--dir")
        .arg(&layout.root)
        .current_dir(&layout.root)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .spawn()
        .with_context(|| format!("cannot run {}", layout.binary().display()))?;
    let deadline = Instant::now() + SUPERVISOR_TIMEOUT;
    while processes::running(layout, supervise::NAME).is_none() {
        if let Some(status) = child.try_wait().context("cannot watch the supervisor")? {
            let what = format!("the supervisor ended at once ({status})");
            return Err(Problem::new(
                exit::FAILURE,
                what,
                format!("see {}", layout.log_of(supervise::NAME).display()),
            )
            .into());
        }
        if Instant::now() > deadline {
            return Err(Problem::new(
                NOT_IN_TIME,
                "the supervisor does not start",
                format!("see {}", layout.log_of(supervise::NAME).display()),
            )
            .into());
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Members, how to connect, and what to try.
fn summary(layout: &Layout, view: &craton_console::views::StatusView) -> String {
    let me = command_name(layout);
    let (user, database) = crate::psql::default_session(layout);
    let connection = |port| {
        format!(
            "postgresql://{user}@{}/{database}",
            crate::layout::address(port)
        )
    };
    let heading = |text: &str| paint(Colour::Bold, text);
    let mut lines = vec![
        String::new(),
        status::render(view),
        String::new(),
        format!("{}  {}", heading("writes"), connection(layout.proxy_port())),
        format!(
            "{}   {}",
            heading("reads"),
            connection(layout.proxy_read_port())
        ),
        format!(
            "        the password is in {}: PGPASSFILE, or `{me} psql`",
            layout.secret(secrets::names::PGPASS).display()
        ),
        String::new(),
        heading("Three things to try"),
    ];
    let tries = if layout.cluster.sample {
        [
            (
                "the countries with the most cities",
                format!(
                    "{me} psql -c \"SELECT c.name, count(*) AS cities FROM countries c JOIN cities t ON ST_Contains(c.geom, t.geom) GROUP BY c.name ORDER BY 2 DESC LIMIT 5\""
                ),
            ),
            (
                "a read that a standby serves",
                format!(
                    "{me} psql --read -c \"SELECT pg_is_in_recovery() AS on_a_standby, inet_server_port() AS port, count(*) AS countries FROM countries\""
                ),
            ),
            (
                "kill the primary while clients write",
                format!("{me} drill kill-primary"),
            ),
        ]
    } else {
        [
            (
                "a table that every member gets",
                format!("{me} psql -c \"CREATE TABLE hello AS SELECT now() AS said_at\""),
            ),
            (
                "a read that a standby serves",
                format!("{me} psql --read -c \"SELECT pg_is_in_recovery() AS on_a_standby\""),
            ),
            (
                "kill the primary while clients write",
                format!("{me} drill kill-primary"),
            ),
        ]
    };
    for (what, command) in tries {
        lines.push(format!("  {}", paint(Colour::Dim, &format!("# {what}"))));
        lines.push(format!("  {command}"));
    }
    lines.join("\n")
}

/// How this program was called, so that what is printed can be typed; `--dir` where it is needed.
fn command_name(layout: &Layout) -> String {
    let name = std::env::args_os().next().map_or_else(
        || "craton".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    );
    let default = crate::layout::directory(None).is_ok_and(|dir| dir == layout.root);
    let roots = layout.root == Path::new("/var/lib/craton") && !Path::new(&name).is_absolute();
    if default || roots {
        name
    } else {
        format!("{name} --dir {}", layout.root.display())
    }
}
