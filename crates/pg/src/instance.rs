//! A member's directory, and everything that is done to the PostgreSQL in it.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use craton_core::{Lsn, TimelineId};
use tokio::time::Instant;

use crate::Binaries;
use crate::adopt;
use crate::config::{self, ConfigChange, ManagedConfig, Upstream};
use crate::control::Control;
use crate::control_data::ControlData;
use crate::data_dir::DataDir;
use crate::disk::{self, DiskSpace};
use crate::error::{PgError, Result};
use crate::files::{self, blocking};
use crate::history::{self, HistoryEntry};
use crate::postmaster::{Postmaster, StartMode};
use crate::processes;
use crate::sync::{Proven, SyncNames};

/// How long pg_basebackup and pg_rewind may take to connect, in seconds.
const SIDE_CONNECT_LIMIT_S: u8 = 10;

/// How often a start is looked at.
const READY_POLL: Duration = Duration::from_millis(10);
/// How much of the log goes into an error message.
const LOG_TAIL_BYTES: u64 = 2048;
/// How long leftovers of a dead postmaster may take to die before a start gives up.
const LEFTOVERS_LIMIT: Duration = Duration::from_secs(10);

/// The fixed facts of one instance.
#[derive(Clone, Debug)]
pub struct InstanceConfig {
    /// Which PostgreSQL.
    pub binaries: Binaries,
    /// The member's directory.
    pub member_dir: PathBuf,
    /// `listen_addresses`.
    pub listen_addresses: String,
    /// The TCP port, which also names the Unix socket.
    pub port: u16,
    /// The bootstrap superuser, `postgres`.
    pub superuser: String,
    /// Shown in process titles.
    pub cluster_name: String,
}

#[derive(Debug)]
struct Inner {
    config: InstanceConfig,
    data_dir: PathBuf,
    socket_dir: PathBuf,
    conf_dir: PathBuf,
    os_user: String,
    /// Held while what was here before a clone is removed, see [`crate::former`].
    removal: Mutex<()>,
    /// See [`crate::sync`].
    sync_proven: Mutex<Option<Proven>>,
}

/// One PostgreSQL instance. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct Instance {
    inner: Arc<Inner>,
}

impl Instance {
    pub(crate) fn removal(&self) -> MutexGuard<'_, ()> {
        let removal = &self.inner.removal;
        removal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prepares the member's directory. The directory becomes private to the calling user.
    pub fn new(config: InstanceConfig) -> Result<Self> {
        files::private_dir(&config.member_dir)?;
        // PostgreSQL's working directory is compared with this one, so links must be resolved.
        let root = config
            .member_dir
            .canonicalize()
            .map_err(PgError::io("cannot resolve", &config.member_dir))?;
        let inner = Inner {
            data_dir: root.join("data"),
            socket_dir: root.join("run"),
            conf_dir: root.join("conf"),
            os_user: os_user()?,
            removal: Mutex::new(()),
            sync_proven: Mutex::new(None),
            config: InstanceConfig {
                member_dir: root,
                ..config
            },
        };
        files::private_dir(&inner.socket_dir)?;
        files::private_dir(&inner.conf_dir)?;
        check_socket_path(&inner.socket_dir, inner.config.port)?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The fixed facts.
    pub fn config(&self) -> &InstanceConfig {
        &self.inner.config
    }

    /// The member's directory, links resolved.
    pub fn member_dir(&self) -> &Path {
        &self.inner.config.member_dir
    }

    /// PGDATA.
    pub fn data_dir(&self) -> &Path {
        &self.inner.data_dir
    }

    /// Where the Unix socket is.
    pub fn socket_dir(&self) -> &Path {
        &self.inner.socket_dir
    }

    /// The server's log.
    pub fn log_path(&self) -> PathBuf {
        self.member_dir().join("pg.log")
    }

    pub(crate) fn conf_dir(&self) -> &Path {
        &self.inner.conf_dir
    }

    pub(crate) fn wal_dir(&self) -> PathBuf {
        self.data_dir().join("pg_wal")
    }

    /// Set while pg_rewind writes.
    pub(crate) fn rewind_marker(&self) -> PathBuf {
        self.member_dir().join("rewind.incomplete")
    }

    /// Our own copy of the replication password: see [`Instance::cut_upstream`].
    pub(crate) fn upstream_passfile(&self) -> PathBuf {
        self.conf_dir().join("upstream.pgpass")
    }

    /// A program of this PostgreSQL, with messages in English.
    pub(crate) fn tool(&self, name: &str) -> Command {
        let mut command = Command::new(self.config().binaries.tool(name));
        command
            .env("LC_ALL", "C")
            .env_remove("PGDATA")
            .stdin(Stdio::null());
        command
    }

    /// As [`Instance::tool`], for one that writes here: should this agent be killed, the next one finds it by the
    /// mark, see [`Instance::kill_stray_tools`].
    pub(crate) fn writing_tool(&self, name: &str) -> Command {
        let mut command = self.tool(name);
        self.mark(&mut command);
        command
    }

    pub(crate) fn mark(&self, command: &mut Command) {
        command.env(processes::TOOL_OF, self.member_dir());
    }

    /// Kills the tools (initdb, pg_basebackup, pg_rewind, a restore) that an agent that was killed, or a task that was
    /// cut off, left at work in this member's directory, with all they have started; returns how many processes there
    /// were. Between two tasks of an agent, which must be the only one: its own tools carry the same mark.
    pub async fn kill_stray_tools(&self, limit: Duration) -> Result<usize> {
        processes::kill_tools(self.member_dir().to_owned(), limit).await
    }

    /// A new handle to the server's control connection, not connected yet.
    pub fn control(&self) -> Control {
        Control::new(
            self.socket_dir().to_owned(),
            self.config().port,
            &self.config().superuser,
            self.wal_dir(),
        )
    }

    /// What the data directory holds.
    pub async fn data_dir_state(&self) -> Result<DataDir> {
        let this = self.clone();
        blocking(move || this.look_at_data_dir()).await
    }

    fn look_at_data_dir(&self) -> Result<DataDir> {
        let data = self.data_dir();
        if files::is_empty_dir(data)? {
            let half = ["data.clone", "data.init"]
                .iter()
                .any(|n| self.member_dir().join(n).exists());
            return Ok(if half {
                DataDir::HalfClone
            } else {
                DataDir::Empty
            });
        }
        let owner = fs::metadata(data)
            .map_err(PgError::io("cannot look at", data))?
            .uid();
        if owner != rustix::process::geteuid().as_raw() {
            return Ok(DataDir::Foreign(format!(
                "{} belongs to user id {owner}",
                data.display()
            )));
        }
        if self.rewind_marker().exists() {
            return Ok(DataDir::HalfRewind);
        }
        let Some(version) = files::read_text(&data.join("PG_VERSION"))? else {
            return Ok(DataDir::Foreign(format!(
                "{} is not empty, but holds no PG_VERSION; move its files away",
                data.display()
            )));
        };
        let installed = self.config().binaries.version().major;
        let Some(version) = version
            .trim()
            .parse::<u32>()
            .ok()
            .filter(|v| *v == installed)
        else {
            return Ok(DataDir::Foreign(adopt::other_version(
                data,
                version.trim(),
                installed,
            )));
        };
        match self.read_control_data() {
            Ok(control) => Ok(DataDir::Cluster {
                version,
                control: Box::new(control),
            }),
            Err(e) => Ok(DataDir::Foreign(e.to_string())),
        }
    }

    /// Runs `pg_controldata`.
    pub async fn control_data(&self) -> Result<ControlData> {
        let this = self.clone();
        blocking(move || this.read_control_data()).await
    }

    pub(crate) fn read_control_data(&self) -> Result<ControlData> {
        let mut command = self.tool("pg_controldata");
        command.arg("-D").arg(self.data_dir());
        ControlData::parse(&run_tool("pg_controldata", &mut command)?)
    }

    /// Who may log in to a copy that is started by itself, as a restore is: the agent's own files are not in it. Its
    /// owner is the superuser, whatever the system calls him.
    pub(crate) fn let_owner_in(&self, data: &Path) -> Result<()> {
        let (user, superuser) = (&self.inner.os_user, &self.config().superuser);
        for (name, text) in [
            (
                "pg_hba.conf",
                format!(
                    "# For a copy of this directory that is started by itself; members have their own, outside.\n\
                     local all \"{superuser}\" peer map=craton\nlocal all all scram-sha-256\n\
                     host all all 127.0.0.1/32 scram-sha-256\nhost all all ::1/128 scram-sha-256\n"
                ),
            ),
            (
                "pg_ident.conf",
                format!("craton \"{user}\" \"{superuser}\"\ncraton root \"{superuser}\"\n"),
            ),
        ] {
            let path = data.join(name);
            fs::write(&path, text).map_err(PgError::io("cannot write", &path))?;
        }
        Ok(())
    }

    pub(crate) fn check_data_dir_is_free(&self) -> Result<()> {
        if files::is_empty_dir(self.data_dir())? {
            return Ok(());
        }
        Err(PgError::DataDir {
            path: self.data_dir().to_owned(),
            reason: "is not empty, so no cluster can be made in it".to_owned(),
        })
    }

    /// Renames a finished cluster to `data`; an empty directory of that name is replaced.
    pub(crate) fn move_into_place(&self, made: &Path) -> Result<()> {
        files::rename_durably(made, self.data_dir())?;
        files::remove_durably(&self.rewind_marker()).map(|_| ())
    }

    /// Deletes the data directory. Only after an explicit decision; refused while PostgreSQL runs.
    pub async fn discard_data_dir(&self) -> Result<()> {
        self.refuse_while_running().await?;
        let this = self.clone();
        blocking(move || {
            // Renamed first: a deletion that is cut off must not leave half a cluster under its name.
            let doomed = this.member_dir().join("data.discarded");
            files::remove_tree(&doomed)?;
            if this.data_dir().exists() {
                files::rename_durably(this.data_dir(), &doomed)?;
            }
            files::remove_durably(&this.rewind_marker())?;
            files::remove_tree(&doomed)
        })
        .await
    }

    /// Writes the configuration files where they differ. A running server still needs
    /// [`Postmaster::reload`], or a restart for some keys; the result tells.
    pub async fn write_config(&self, managed: &ManagedConfig) -> Result<ConfigChange> {
        let (this, managed) = (self.clone(), managed.clone());
        blocking(move || this.write_config_blocking(&managed)).await
    }

    fn write_config_blocking(&self, managed: &ManagedConfig) -> Result<ConfigChange> {
        self.mark_data_dir()?;
        self.write_config_unmarked(managed)
    }

    pub(crate) fn write_config_unmarked(&self, managed: &ManagedConfig) -> Result<ConfigChange> {
        let mut managed = managed.clone();
        let passfile = self.upstream_passfile();
        match &mut managed.upstream {
            Some(upstream) => {
                let text =
                    files::read_text(&upstream.passfile)?.ok_or_else(|| PgError::Invalid {
                        what: "replication password file",
                        reason: format!("{} is missing", upstream.passfile.display()),
                    })?;
                if files::read_text(&passfile)?.as_deref() != Some(&text) {
                    files::write_durably(&passfile, text.as_bytes())?;
                }
                upstream.passfile = passfile;
            }
            None => {
                files::remove_durably(&passfile)?;
            }
        }
        self.note_names_written(&managed.sync);
        config::write(&self.place(), &managed)
    }

    pub(crate) fn write_settings_blocking(
        &self,
        settings: &std::collections::BTreeMap<String, String>,
    ) -> Result<()> {
        config::write_settings(&self.place(), settings)
    }

    pub(crate) fn write_access_blocking(&self, managed: &ManagedConfig) -> Result<()> {
        config::write_access(&self.place(), managed).map(drop)
    }

    fn place(&self) -> config::Place<'_> {
        config::Place {
            conf_dir: self.conf_dir(),
            data_dir: self.data_dir(),
            socket_dir: self.socket_dir(),
            listen_addresses: &self.config().listen_addresses,
            port: self.config().port,
            cluster_name: &self.config().cluster_name,
            superuser: &self.config().superuser,
            os_user: &self.inner.os_user,
            version: self.config().binaries.version().major,
        }
    }

    /// Starts the server and returns at once; see [`Instance::wait_ready`]. Whatever a dead postmaster left
    /// is killed first. The server outlives the calling process. As `Primary`, releases before 13.21, 14.18,
    /// 15.13, 16.9 and 17.5 may let a commit of the very first moment pass unreplicated; see [`crate::sync`].
    pub async fn start(&self, mode: StartMode) -> Result<Postmaster> {
        self.refuse_while_running().await?;
        self.kill_leftovers(LEFTOVERS_LIMIT).await?;
        let this = self.clone();
        let pid = blocking(move || {
            this.prepare_start(mode)?;
            this.spawn_postmaster()
        })
        .await?;
        let postmaster = Postmaster::hold(pid, self.data_dir()).map_err(PgError::io(
            "cannot watch the postmaster of",
            self.data_dir(),
        ))?;
        // Whoever lives in it was born with the configuration as it is now.
        if let Some(names) = config::sync_names(self.conf_dir())? {
            self.set_proven(&postmaster, names);
        }
        Ok(postmaster)
    }

    /// Takes, and so forgets, what is proven to be in force in this postmaster.
    pub(crate) fn take_proven(&self, postmaster: &Postmaster) -> Option<SyncNames> {
        let proven = self
            .inner
            .sync_proven
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()?;
        let same = proven.pid == postmaster.pid() && proven.start_ticks == postmaster.start_ticks();
        same.then_some(proven.names)
    }

    /// The names are about to be written, perhaps without a proof.
    fn note_names_written(&self, names: &SyncNames) {
        let mut proven = self
            .inner
            .sync_proven
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *proven = proven.take().and_then(|p| {
            let names = p.names.known_after_writing(names)?;
            Some(Proven { names, ..p })
        });
    }

    /// Remembers what is proven to be in force in this postmaster.
    pub(crate) fn set_proven(&self, postmaster: &Postmaster, names: SyncNames) {
        let proven = Proven {
            pid: postmaster.pid(),
            start_ticks: postmaster.start_ticks(),
            names,
        };
        *self
            .inner
            .sync_proven
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(proven);
    }

    fn prepare_start(&self, mode: StartMode) -> Result<()> {
        let data = self.data_dir();
        // Nobody lives here any more, so these locks are stale; their pids may be somebody else's by now.
        files::remove_durably(&data.join("postmaster.pid"))?;
        let socket = format!(".s.PGSQL.{}", self.config().port);
        files::remove_durably(&self.socket_dir().join(format!("{socket}.lock")))?;
        files::remove_durably(&self.socket_dir().join(socket))?;
        files::remove_durably(&data.join("recovery.signal"))?;
        let signal = data.join("standby.signal");
        match mode {
            StartMode::Standby if !signal.exists() => files::write_durably(&signal, b"")?,
            StartMode::Standby => {}
            StartMode::Primary => {
                files::remove_durably(&signal)?;
            }
        }
        let control = self.read_control_data()?;
        let newest = control
            .timeline
            .max(control.min_recovery_timeline.unwrap_or_default());
        history::remove_reserved(&self.wal_dir(), newest).map(|_| ())
    }

    fn spawn_postmaster(&self) -> Result<i32> {
        let path = self.log_path();
        let open = || {
            OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .open(&path)
        };
        let log = open().map_err(PgError::io("cannot open", &path))?;
        let errors = log.try_clone().map_err(PgError::io("cannot open", &path))?;
        let mut command = Command::new(self.config().binaries.tool("postgres"));
        command
            .arg("-D")
            .arg(self.data_dir())
            .arg("-c")
            .arg(format!(
                "config_file={}",
                self.conf_dir().join("postgresql.conf").display()
            ))
            .env_remove("PGDATA")
            .envs(name_lookups())
            .current_dir(self.data_dir())
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            // A process group of its own: Ctrl-C in the agent's terminal must not reach PostgreSQL.
            .process_group(0);
        let child = command.spawn().map_err(PgError::io(
            "cannot start",
            &self.config().binaries.tool("postgres"),
        ))?;
        i32::try_from(child.id()).map_err(|_| PgError::Unintelligible {
            what: "pid",
            detail: child.id().to_string(),
        })
    }

    /// Takes hold of a postmaster that runs already, for example one that a former agent started.
    pub async fn adopt(&self) -> Result<Option<Postmaster>> {
        let path = self.data_dir().join("postmaster.pid");
        let Some(text) = blocking(move || files::read_text(&path)).await? else {
            return Ok(None);
        };
        let Some(pid) = text
            .lines()
            .next()
            .and_then(|l| l.trim().parse::<i32>().ok())
        else {
            return Ok(None);
        };
        // The pidfd comes first; if it still lives after the checks, they were about this very process.
        let Ok(postmaster) = Postmaster::hold(pid, self.data_dir()) else {
            return Ok(None);
        };
        let ours =
            processes::lives_in(pid, self.data_dir()) && processes::has_postmaster_arguments(pid);
        Ok((ours && postmaster.is_running()).then_some(postmaster))
    }

    /// Kills what a dead postmaster left running in the data directory; returns how many processes.
    pub async fn kill_leftovers(&self, limit: Duration) -> Result<usize> {
        if self.adopt().await?.is_some() {
            return Ok(0);
        }
        processes::kill_leftovers(self.data_dir().to_owned(), limit).await
    }

    pub(crate) async fn refuse_while_running(&self) -> Result<()> {
        match self.adopt().await? {
            Some(p) => Err(PgError::Running {
                pid: p.pid(),
                data: self.data_dir().to_owned(),
            }),
            None => Ok(()),
        }
    }

    /// Waits until the server accepts connections. Fails early, with the end of the log, when it exits.
    pub async fn wait_ready(&self, postmaster: &Postmaster, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        let control = self.control();
        loop {
            if !postmaster.is_running() {
                let reason = postmaster.exited().await.to_string();
                let log = self.log_path();
                let tail = files::tail(&log, LOG_TAIL_BYTES);
                return Err(PgError::Exited { reason, log, tail });
            }
            // The file's last line says "ready" once connections are accepted; asking before would only
            // make the postmaster fork for a refusal.
            let lock =
                fs::read_to_string(self.data_dir().join("postmaster.pid")).unwrap_or_default();
            if lock.lines().nth(7).is_some_and(|l| l.trim() == "ready")
                && control.query("readiness", "SELECT 1", limit).await.is_ok()
            {
                return Ok(());
            }
            if Instant::now() >= end {
                return Err(PgError::Timeout {
                    what: "the start of PostgreSQL",
                    limit,
                });
            }
            tokio::time::sleep(READY_POLL).await;
        }
    }

    /// Makes a running standby stop receiving WAL for good, and returns once that is certain: the seal of
    /// the failover protocol rests on it. `managed.upstream` is ignored. What follows from each step:
    ///
    /// 1. The password file is removed, and then the connection string. A receiver reads the password
    ///    when it starts, so one that starts from now on is refused by the upstream, even if the startup
    ///    process has not yet read the new configuration and asks for it with the old string.
    /// 2. So only a receiver that started before can still write, and that one is a child of the
    ///    postmaster with "walreceiver" in its title. When there is none, nothing more arrives.
    pub async fn cut_upstream(
        &self,
        postmaster: &Postmaster,
        managed: &ManagedConfig,
        limit: Duration,
    ) -> Result<()> {
        let managed = ManagedConfig {
            upstream: None,
            ..managed.clone()
        };
        self.write_config(&managed).await?;
        postmaster.reload()?;
        let end = Instant::now() + limit;
        while processes::has_child_titled(postmaster.pid(), "walreceiver") {
            if Instant::now() >= end {
                return Err(PgError::Timeout {
                    what: "the end of the WAL receiver",
                    limit,
                });
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    /// The ancestors of a timeline as its history file here tells, oldest first.
    pub async fn local_history(&self, timeline: TimelineId) -> Result<Vec<HistoryEntry>> {
        let wal_dir = self.wal_dir();
        blocking(move || history::read(&wal_dir, timeline)).await
    }

    /// Makes PostgreSQL, whose WAL is on timeline `own`, take `next` at its next promotion, or find `next` when it looks
    /// for the newest: every number below has a history file then. See [`crate::history`].
    pub async fn reserve_timelines_below(
        &self,
        own: TimelineId,
        next: TimelineId,
    ) -> Result<Vec<TimelineId>> {
        let wal_dir = self.wal_dir();
        blocking(move || history::reserve_below(&wal_dir, own, next)).await
    }

    /// Takes back reservations above the newest real timeline, after a promotion that did not happen;
    /// [`Instance::start`] does so too.
    pub async fn remove_reserved_history_files(
        &self,
        newest_real: TimelineId,
    ) -> Result<Vec<TimelineId>> {
        let wal_dir = self.wal_dir();
        blocking(move || history::remove_reserved(&wal_dir, newest_real)).await
    }

    /// Space on the data directory's file system.
    pub async fn disk_free(&self) -> Result<DiskSpace> {
        let path = self.member_dir().to_owned();
        blocking(move || disk::space(&path)).await
    }

    /// Makes the reserve file this large, 0 removes it.
    pub async fn set_reserve(&self, bytes: u64) -> Result<()> {
        let path = self.member_dir().join("reserve");
        blocking(move || disk::set_reserve(&path, bytes)).await
    }

    /// As [`Instance::set_reserve`], on the calling thread: a full or hung disk may hold it for long.
    pub fn set_reserve_blocking(&self, bytes: u64) -> Result<()> {
        disk::set_reserve(&self.member_dir().join("reserve"), bytes)
    }

    /// Keeps the server's log below `bytes_max`: a longer one becomes `pg.log.1`, and the log is emptied.
    /// The server writes in append mode, so it goes on at the new end. Lines written in between are lost.
    pub async fn bound_log(&self, bytes_max: u64) -> Result<()> {
        let path = self.log_path();
        blocking(move || {
            if !fs::metadata(&path).is_ok_and(|m| m.len() > bytes_max) {
                return Ok(());
            }
            fs::copy(&path, path.with_extension("log.1"))
                .map_err(PgError::io("cannot copy", &path))?;
            let file = OpenOptions::new()
                .write(true)
                .open(&path)
                .map_err(PgError::io("cannot open", &path))?;
            file.set_len(0).map_err(PgError::io("cannot empty", &path))
        })
        .await
    }

    /// What other roles of this crate need to reach an upstream: the same, under another name. A walsender
    /// that feeds a clone must not carry the name that synchronous_standby_names lists: its flushes would
    /// count as the member's.
    pub(crate) fn side_connection(
        upstream: &Upstream,
        application_name: &str,
        dbname: Option<&str>,
    ) -> String {
        Upstream {
            application_name: application_name.to_owned(),
            ..upstream.clone()
        }
        .conninfo_within(SIDE_CONNECT_LIMIT_S, dbname)
    }
}

/// The name that peer authentication sees.
fn os_user() -> Result<String> {
    let mut command = Command::new("id");
    command.arg("-un").env("LC_ALL", "C");
    Ok(run_tool("id", &mut command)?.trim().to_owned())
}

/// A Unix socket's path has at most 107 bytes (unix(7)); PostgreSQL's own message comes too late.
fn check_socket_path(socket_dir: &Path, port: u16) -> Result<()> {
    const BYTES_MAX: usize = 107;
    let length = socket_dir.as_os_str().len() + format!("/.s.PGSQL.{port}").len();
    if length <= BYTES_MAX {
        return Ok(());
    }
    Err(PgError::Invalid {
        what: "member directory",
        reason: format!(
            "{} is too long for a Unix socket ({length} bytes, at most {BYTES_MAX}); use a shorter path",
            socket_dir.display()
        ),
    })
}

/// A WAL receiver that looks up its primary's name cannot be ended meanwhile, and a standby that seals has to wait for it:
/// one answer of a name server that is lost costs the C library 5 s (resolv.conf(5)). What an operator has set stays.
fn name_lookups() -> Option<(&'static str, &'static str)> {
    let set = std::env::var_os("RES_OPTIONS").is_some();
    (!set).then_some(("RES_OPTIONS", "timeout:1"))
}

/// Runs a program to its end and returns its output.
pub(crate) fn run_tool(tool: &'static str, command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .map_err(PgError::io("cannot run", Path::new(tool)))?;
    succeeded(tool, &output)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub(crate) fn succeeded(tool: &'static str, output: &std::process::Output) -> Result<()> {
    if output.status.success() {
        return Ok(());
    }
    Err(PgError::Tool {
        tool,
        status: output.status.to_string(),
        output: last_lines(&String::from_utf8_lossy(&output.stderr)),
    })
}

/// The end of a program's output, for an error message.
pub(crate) fn last_lines(text: &str) -> String {
    const LINES_MAX: usize = 12;
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    lines
        .iter()
        .skip(lines.len().saturating_sub(LINES_MAX))
        .copied()
        .collect::<Vec<_>>()
        .join("\n")
}

/// A segment's first byte, for callers that compare positions with files.
pub(crate) fn segment_of(lsn: Lsn, segment_size: u64) -> u64 {
    lsn.0.checked_div(segment_size).unwrap_or(0)
}
