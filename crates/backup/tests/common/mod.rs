//! Servers and daemons for tests on real PostgreSQL.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    missing_docs,
    reason = "a test that cannot go on must say where"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use craton_backup::restore::{self, Options, RestoredView, Target};
use craton_backup::views::BackupStatusView;
use craton_backup::wal_fetch::{EXIT_NOT_THERE, EXIT_UNREACHABLE, Fetched, wal_fetch};
use craton_backup::{Config, Repository};
use craton_console::{Client, Token};
use craton_core::topology::{MemberRole, Topology, TopologyMember};
use craton_core::{Lsn, MemberId, Term};
use craton_pg::Binaries;
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

#[path = "../../../../tests/shared/postgres.rs"]
mod postgres;
pub use postgres::{free_port, ran_as_postgres};

/// A bound for everything that takes a moment.
pub const LIMIT: Duration = Duration::from_secs(90);
pub const PASSWORD: &str = "a secret";
pub const TOKEN: &str = "0123456789abcdef0123456789abcdef";
const POLL: Duration = Duration::from_millis(50);

fn program(name: &str) -> PathBuf {
    Binaries::find(None).unwrap().tool(name)
}

fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// A PostgreSQL server; it dies with this value.
pub struct Server {
    pub id: MemberId,
    pub data: PathBuf,
    pub port: u16,
    root: PathBuf,
    child: Option<Child>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Server {
    fn at(root: &Path, name: &str) -> Self {
        let root = root.to_owned();
        Self {
            id: MemberId::new(name).unwrap(),
            data: root.join(name),
            port: free_port(),
            root,
            child: None,
        }
    }

    /// A new cluster, running, with the replication role.
    pub fn new(root: &Path, name: &str) -> Self {
        let mut server = Self::at(root, name);
        let password = root.join("superuser");
        fs::write(&password, PASSWORD).unwrap();
        run(Command::new(program("initdb"))
            .args([
                "--username=postgres",
                "--auth-local=trust",
                "--auth-host=scram-sha-256",
                "--data-checksums",
                "--no-sync",
            ])
            .arg(format!("--pwfile={}", password.display()))
            .arg("-D")
            .arg(&server.data));
        let settings = "wal_keep_size = 0\nshared_buffers = 16MB\nmax_connections = 137\nautovacuum = off\n\
                        max_wal_size = 64MB\nmin_wal_size = 32MB\nfsync = off\n";
        fs::write(server.data.join("postgresql.auto.conf"), settings).unwrap();
        server.start();
        server.sql(&format!(
            "create role craton_replication login replication password '{PASSWORD}'"
        ));
        server
    }

    /// A standby of `primary`, running.
    pub fn standby(root: &Path, name: &str, primary: &Self) -> Self {
        let mut server = Self::at(root, name);
        run(Command::new(program("pg_basebackup"))
            .args([
                "-X",
                "stream",
                "-c",
                "fast",
                "--no-sync",
                "-R",
                "-U",
                "postgres",
                "-h",
            ])
            .arg(root)
            .args(["-p", &primary.port.to_string(), "-D"])
            .arg(&server.data));
        server.start();
        server
    }

    /// Takes a restored directory as it is.
    pub fn restored(root: &Path, name: &str) -> Self {
        let mut server = Self::at(root, name);
        server.start();
        server
    }

    pub fn start(&mut self) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.log())
            .unwrap();
        let child = Command::new(program("postgres"))
            .arg("-D")
            .arg(&self.data)
            .args([
                "-p",
                &self.port.to_string(),
                "-c",
                "listen_addresses=127.0.0.1",
                "-k",
            ])
            .arg(&self.root)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        self.until("select 1", "1");
    }

    fn log(&self) -> PathBuf {
        self.root.join(format!("{}.log", self.id))
    }

    /// `kill -9` of the postmaster and all its children.
    pub fn kill(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        let pid = Pid::from_child(&child);
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id()))
            .unwrap_or_default();
        let _ = kill_process(pid, Signal::KILL);
        for other in children
            .split_whitespace()
            .filter_map(|p| p.parse().ok())
            .filter_map(Pid::from_raw)
        {
            let _ = kill_process(other, Signal::KILL);
        }
        let _ = child.wait();
        let _ = fs::remove_file(self.data.join("postmaster.pid"));
    }

    fn psql(&self, sql: &str) -> Command {
        let mut command = Command::new("psql");
        command.args([
            "-X",
            "-q",
            "-A",
            "-t",
            "-v",
            "ON_ERROR_STOP=1",
            "-U",
            "postgres",
            "-d",
            "postgres",
            "-h",
        ]);
        command
            .arg(&self.root)
            .args(["-p", &self.port.to_string(), "-c", sql]);
        command
    }

    pub fn sql(&self, sql: &str) -> String {
        run(&mut self.psql(sql)).trim().to_owned()
    }

    /// Waits until a query gives this.
    pub fn until(&self, sql: &str, expected: &str) {
        let deadline = std::time::SystemTime::now() + LIMIT;
        loop {
            let output = self.psql(sql).stdin(Stdio::null()).output().unwrap();
            if output.status.success() && String::from_utf8_lossy(&output.stdout).trim() == expected
            {
                return;
            }
            if std::time::SystemTime::now() > deadline {
                let log = fs::read_to_string(self.log()).unwrap_or_default();
                panic!(
                    "{} never answered {expected} to {sql}: {output:?}\n{log}",
                    self.id
                );
            }
            std::thread::sleep(POLL);
        }
    }

    pub fn wal_end(&self) -> Lsn {
        self.sql("select pg_current_wal_flush_lsn()")
            .parse()
            .unwrap()
    }

    pub fn member(&self, role: MemberRole) -> TopologyMember {
        TopologyMember {
            id: self.id.clone(),
            host: "127.0.0.1".into(),
            port: self.port,
            api: String::new(),
            role,
            timeline: None,
            lsn: None,
            replay_lsn: None,
            streaming: role == MemberRole::Standby,
            noload: false,
        }
    }
}

/// What the agents would say: the first one leads.
#[allow(
    clippy::unnecessary_wraps,
    reason = "what the daemon's channel carries"
)]
pub fn topology(term: u64, members: &[&Server]) -> Option<Arc<Topology>> {
    let role = |n| {
        if n == 0 {
            MemberRole::Leader
        } else {
            MemberRole::Standby
        }
    };
    Some(Arc::new(Topology {
        cluster: "test".into(),
        system_id: None,
        term: Term(term),
        revision: term,
        writable: members.first().map(|m| m.id.clone()),
        hold: false,
        members: members
            .iter()
            .enumerate()
            .map(|(n, m)| m.member(role(n)))
            .collect(),
    }))
}

pub fn config(root: &Path) -> Config {
    let (password, token) = (root.join("replication"), root.join("token"));
    fs::write(&password, format!("{PASSWORD}\n")).unwrap();
    fs::write(&token, format!("{TOKEN}\n")).unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
    Config {
        repository: root.join("it's a repository"),
        listen: format!("127.0.0.1:{}", free_port()).parse().unwrap(),
        agents: Vec::new(),
        token_file: Some(token),
        user: "craton_replication".into(),
        password_file: Some(password),
        slot: "craton_backup".into(),
        application_name: "craton_backup".into(),
        synchronous: false,
        name: None,
        advertise: None,
        backup_on_start: true,
        backup_interval_s: 0,
        retention_days: 0,
        retention_backups: 2,
        prefer_standby: false,
        max_rate_kb: None,
        tls: craton_trust::TlsSettings::off(),
    }
}

/// A backup daemon inside the test's process.
pub struct Daemon {
    pub config: Config,
    pub topology: watch::Sender<Option<Arc<Topology>>>,
    shutdown: watch::Sender<bool>,
    task: JoinHandle<craton_backup::Result<()>>,
}

impl Daemon {
    pub fn start(config: Config, topology: Option<Arc<Topology>>) -> Self {
        let (topology, told) = watch::channel(topology);
        let (shutdown, stop) = watch::channel(false);
        let task = tokio::spawn(craton_backup::run_with_topology(config.clone(), told, stop));
        Self {
            config,
            topology,
            shutdown,
            task,
        }
    }

    pub async fn stop(self) {
        self.shutdown.send_replace(true);
        self.task.await.unwrap().unwrap();
    }

    pub fn repository(&self) -> Repository {
        Repository::open(&self.config.repository).unwrap()
    }

    pub async fn status(&self) -> Option<BackupStatusView> {
        status(&self.config).await
    }

    pub async fn until(
        &self,
        what: &str,
        done: impl Fn(&BackupStatusView) -> bool,
    ) -> BackupStatusView {
        status_until(&self.config, what, done).await
    }

    /// Waits until the repository has everything that `server` has now.
    pub async fn caught_up(&self, server: &Server) {
        let end = server.wal_end();
        self.until("all WAL", |s| {
            s.flushed_lsn >= end && s.streaming_from.is_some()
        })
        .await;
    }
}

pub fn client() -> Client {
    Client::new(Token::new(TOKEN)).with_timeout(LIMIT)
}

pub async fn status(config: &Config) -> Option<BackupStatusView> {
    client()
        .get_json(&config.listen.to_string(), "/v1/backup/status")
        .await
        .ok()
}

pub async fn status_until(
    config: &Config,
    what: &str,
    done: impl Fn(&BackupStatusView) -> bool,
) -> BackupStatusView {
    let deadline = Instant::now() + LIMIT;
    loop {
        let now = status(config).await;
        match now {
            Some(status) if done(&status) => return status,
            other => assert!(
                Instant::now() < deadline,
                "no {what} within {LIMIT:?}: {other:#?}"
            ),
        }
        tokio::time::sleep(POLL).await;
    }
}

/// A program that does what `craton backup wal-fetch --repo R %f %p` does, by way of this test's
/// own `wal_fetch_process`.
pub fn fetch_program(root: &Path) -> PathBuf {
    let path = root.join("it's craton");
    let script = format!(
        "#!/bin/sh\nFETCH_REPO=\"$4\" FETCH_NAME=\"$5\" FETCH_TARGET=\"$6\" exec '{}' --exact wal_fetch_process --nocapture --quiet\n",
        std::env::current_exe().unwrap().display()
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// The other side of [`fetch_program`].
pub fn fetch_if_asked() {
    let (Some(repo), Ok(name), Some(target)) = (
        std::env::var_os("FETCH_REPO"),
        std::env::var("FETCH_NAME"),
        std::env::var_os("FETCH_TARGET"),
    ) else {
        return;
    };
    let outcome =
        Repository::open(Path::new(&repo)).and_then(|r| wal_fetch(&r, &name, Path::new(&target)));
    std::process::exit(match outcome {
        Ok(Fetched::Delivered) => 0,
        Ok(Fetched::NotThere) => EXIT_NOT_THERE.into(),
        Err(_) => EXIT_UNREACHABLE.into(),
    });
}

pub fn options(root: &Path) -> Options {
    Options {
        backup: None,
        tablespaces: BTreeMap::new(),
        program: fetch_program(root),
        divergence: None,
        standby: false,
        age_max: None,
    }
}

pub fn restore_to(
    repository: &Repository,
    target: &Path,
    to: Target,
    options: &Options,
) -> RestoredView {
    restore::restore(repository, target, to, options, &mut |_| {}).unwrap()
}

pub fn verify_backup(directory: &Path) {
    run(Command::new(program("pg_verifybackup"))
        .args(["--no-parse-wal", "--quiet"])
        .arg(directory));
}
