//! Real PostgreSQL servers, a proxy in front of them, and an agent that says what the test wants.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    missing_docs,
    reason = "a test that cannot go on must say where"
)]

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use craton_console::{Metrics, Service, Token};
use craton_core::topology::{MemberRole, Topology, TopologyMember};
use craton_core::{MemberId, Term};
use craton_proxy::{ProxyConfig, ProxyError, StaticBackend};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_postgres::{Client, NoTls};

#[path = "../../../../tests/shared/postgres.rs"]
mod postgres;
pub use postgres::free_port;

/// A bound for everything that takes a moment.
pub const LIMIT: Duration = Duration::from_secs(90);
/// The password of every role.
pub const PASSWORD: &str = "it's a secret";
const TOKEN: &str = "0123456789abcdef0123456789abcdef";

const ROLES: &str = "
    CREATE SCHEMA craton;
    CREATE FUNCTION craton.user_lookup(name text) RETURNS TABLE (usename text, passwd text)
        LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog
        AS $$ SELECT s.usename::text, s.passwd FROM pg_catalog.pg_shadow s WHERE s.usename = name $$;
    REVOKE ALL ON FUNCTION craton.user_lookup(text) FROM PUBLIC;
    CREATE ROLE craton_proxy LOGIN PASSWORD 'it''s a secret';
    GRANT USAGE ON SCHEMA craton TO craton_proxy;
    GRANT EXECUTE ON FUNCTION craton.user_lookup(text) TO craton_proxy;
    CREATE FUNCTION craton.waits_for_standbys(pid integer) RETURNS boolean
        LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog
        AS $$ SELECT EXISTS (SELECT FROM pg_catalog.pg_stat_activity a WHERE a.pid = $1 AND a.wait_event = 'SyncRep') $$;
    REVOKE ALL ON FUNCTION craton.waits_for_standbys(integer) FROM PUBLIC;
    GRANT EXECUTE ON FUNCTION craton.waits_for_standbys(integer) TO craton_proxy;
    CREATE ROLE ann LOGIN PASSWORD 'it''s a secret';
    CREATE ROLE bob LOGIN;
    SET password_encryption = 'md5';
    CREATE ROLE old LOGIN PASSWORD 'it''s a secret';
    GRANT ALL ON SCHEMA public TO PUBLIC;
    CREATE TABLE notes (id bigint GENERATED ALWAYS AS IDENTITY, note text);
    GRANT ALL ON notes TO PUBLIC;
";

fn programs() -> PathBuf {
    let mut found: Vec<_> = std::fs::read_dir("/usr/lib/postgresql")
        .unwrap()
        .filter_map(|d| Some((d.ok()?.file_name().to_str()?.parse::<u32>().ok()?, ())))
        .collect();
    found.sort_unstable();
    PathBuf::from(format!(
        "/usr/lib/postgresql/{}/bin",
        found.last().unwrap().0
    ))
}

/// The account that PostgreSQL runs under: ours, or `postgres` when we are root.
fn account() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd.lines().find(|l| l.starts_with("postgres:")).unwrap();
    let mut numbers = line.split(':').skip(2).map(|n| n.parse().unwrap_or(0));
    Some((numbers.next().unwrap(), numbers.next().unwrap()))
}

fn program(name: &str) -> Command {
    let mut command = Command::new(programs().join(name));
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("PGPASSWORD", PASSWORD)
        .current_dir("/");
    if let Some((uid, gid)) = account() {
        command.uid(uid).gid(gid);
    }
    command
}

/// pgbench as user ann; its output.
pub fn pgbench(port: u16, arguments: &[&str]) -> String {
    let port = port.to_string();
    let connection = ["-h", "127.0.0.1", "-p", &port, "-U", "ann"];
    let out = program("pgbench")
        .args(connection)
        .args(arguments)
        .arg("postgres")
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(out.status.success(), "pgbench {arguments:?}: {text}");
    text
}

fn run(command: &mut Command) {
    let out = command.output().unwrap();
    assert!(
        out.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

/// A directory that PostgreSQL's account owns.
pub fn directory() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    if let Some((uid, gid)) = account() {
        chown(dir.path(), Some(uid), Some(gid)).unwrap();
    }
    dir
}

/// One server. It dies with the value.
pub struct Postgres {
    pub port: u16,
    data: PathBuf,
    child: Option<Child>,
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Postgres {
    /// A new primary with the roles.
    pub async fn primary(root: &Path) -> Self {
        let mut server = Self {
            port: free_port(),
            data: root.join("a"),
            child: None,
        };
        let password = root.join("password");
        std::fs::write(&password, PASSWORD).unwrap();
        let options = [
            "-U",
            "postgres",
            "-A",
            "scram-sha-256",
            "--no-sync",
            "-E",
            "UTF8",
            "--locale=C",
        ];
        run(program("initdb")
            .args(options)
            .arg("--pwfile")
            .arg(&password)
            .arg("-D")
            .arg(&server.data));
        let hba = "host all old all md5\nhost all all all scram-sha-256\nhost replication all all scram-sha-256\n";
        std::fs::write(server.data.join("pg_hba.conf"), hba).unwrap();
        server.start().await;
        let client = server.superuser().await;
        client.batch_execute(ROLES).await.unwrap();
        server
    }

    /// A standby of this server.
    pub async fn standby(&self, root: &Path, name: &str) -> Self {
        let mut server = Self {
            port: free_port(),
            data: root.join(name),
            child: None,
        };
        let from = format!("host=127.0.0.1 port={} user=postgres", self.port);
        run(program("pg_basebackup")
            .args([
                "-R",
                "-X",
                "stream",
                "-c",
                "fast",
                "--no-sync",
                "-d",
                &from,
                "-D",
            ])
            .arg(&server.data));
        server.start().await;
        server
    }

    /// Starts it and waits until it takes connections.
    pub async fn start(&mut self) {
        let settings = [
            format!("port={}", self.port),
            "listen_addresses=127.0.0.1".into(),
            "unix_socket_directories=".into(),
            "shared_buffers=16MB".into(),
            "fsync=off".into(),
            "log_min_messages=fatal".into(),
        ];
        let mut command = program("postgres");
        for setting in &settings {
            command.arg("-c").arg(setting);
        }
        command
            .arg("-D")
            .arg(&self.data)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        self.child = Some(command.spawn().unwrap());
        until("PostgreSQL is up", || async {
            connect(self.port, "postgres", "postgres").await.is_ok()
        })
        .await;
    }

    /// As if it had lost power: all of its processes at once.
    pub fn kill(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        let parent = i32::try_from(child.id()).unwrap();
        let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))
            .unwrap_or_default();
        let pids = children.split_whitespace().filter_map(|p| p.parse().ok());
        for pid in std::iter::once(parent).chain(pids) {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
        child.wait().unwrap();
    }

    /// Only the postmaster, as in the brief that every backend then follows.
    pub fn kill_postmaster(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// An orderly end that ends all sessions (`pg_ctl stop -m fast`).
    pub fn stop(&mut self) {
        let mut child = self.child.take().unwrap();
        kill_process(
            Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap(),
            Signal::INT,
        )
        .unwrap();
        child.wait().unwrap();
    }

    /// Makes a standby a primary.
    pub async fn promote(&self) {
        self.superuser()
            .await
            .query_one("SELECT pg_promote(true)", &[])
            .await
            .unwrap();
    }

    pub async fn superuser(&self) -> Client {
        connect(self.port, "postgres", "postgres").await.unwrap()
    }
}

/// A connection whose other half runs by itself.
pub async fn connect(
    port: u16,
    user: &str,
    database: &str,
) -> Result<Client, tokio_postgres::Error> {
    connect_with(port, user, database, PASSWORD, "").await
}

pub async fn connect_with(
    port: u16,
    user: &str,
    database: &str,
    password: &str,
    more: &str,
) -> Result<Client, tokio_postgres::Error> {
    let password = password.replace('\'', "\\'");
    let to = format!(
        "host=127.0.0.1 port={port} user={user} dbname={database} password='{password}' {more}"
    );
    let (client, connection) = tokio_postgres::connect(&to, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Waits for a condition; panics when it does not come true.
pub async fn until<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) {
    let coming_true = async {
        while !is_so().await {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(LIMIT, coming_true)
        .await
        .unwrap_or_else(|_| panic!("in vain: {what}"));
}

/// Something that must not take for ever.
pub async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    timeout(LIMIT, work)
        .await
        .unwrap_or_else(|_| panic!("in vain: {what}"))
}

/// SQLSTATE of a result that must be an error.
pub fn code<T: std::fmt::Debug>(result: Result<T, tokio_postgres::Error>) -> String {
    let error = result.expect_err("an error was expected");
    error
        .code()
        .unwrap_or_else(|| panic!("no SQLSTATE: {error:?}"))
        .code()
        .to_owned()
}

/// A proxy that runs in this process.
pub struct Proxy {
    pub port: u16,
    pub read_port: u16,
    pub http: u16,
    stop: watch::Sender<bool>,
    running: JoinHandle<Result<(), ProxyError>>,
    _secrets: tempfile::TempDir,
}

impl Proxy {
    /// A proxy in front of static servers.
    pub async fn of(servers: &[&Postgres], adjust: impl FnOnce(&mut ProxyConfig)) -> Self {
        let backends = servers
            .iter()
            .map(|s| StaticBackend {
                host: "127.0.0.1".into(),
                port: s.port,
            })
            .collect();
        Self::start(
            ProxyConfig {
                backends,
                probe_interval_ms: 200,
                ..ProxyConfig::default()
            },
            adjust,
        )
        .await
    }

    /// A proxy that listens to an agent.
    pub async fn with(agent: &Agent, adjust: impl FnOnce(&mut ProxyConfig)) -> Self {
        let agents = vec![agent.address.clone()];
        Self::start(
            ProxyConfig {
                agents,
                ..ProxyConfig::default()
            },
            adjust,
        )
        .await
    }

    async fn start(config: ProxyConfig, adjust: impl FnOnce(&mut ProxyConfig)) -> Self {
        let secrets = tempfile::tempdir().unwrap();
        let (password, token) = (
            secrets.path().join("password"),
            secrets.path().join("token"),
        );
        std::fs::write(&password, format!("{PASSWORD}\n")).unwrap();
        std::fs::write(&token, TOKEN).unwrap();
        let (port, read_port, http) = (free_port(), free_port(), free_port());
        let mut config = ProxyConfig {
            listen: format!("127.0.0.1:{port}"),
            listen_read: Some(format!("127.0.0.1:{read_port}")),
            http: format!("127.0.0.1:{http}"),
            agent_token_file: Some(token),
            tls: craton_trust::TlsSettings::off(),
            auth_password_file: Some(password),
            drain_ms: 500,
            // A server may take this long to stop or to be promoted.
            failover_wait_ms: 120_000,
            ..config
        };
        adjust(&mut config);
        let (stop, stopped) = watch::channel(false);
        let running = tokio::spawn(craton_proxy::run(config, stopped));
        until("the proxy listens", || async move {
            tokio::net::TcpStream::connect(("127.0.0.1", http))
                .await
                .is_ok()
        })
        .await;
        Self {
            port,
            read_port,
            http,
            stop,
            running,
            _secrets: secrets,
        }
    }

    /// A client of the proxy.
    pub async fn ann(&self) -> Client {
        soon("a login", connect(self.port, "ann", "postgres"))
            .await
            .unwrap()
    }

    /// The value of a metric.
    pub async fn metric(&self, name: &str) -> i64 {
        let client = craton_console::Client::new(None).with_timeout(LIMIT);
        let page = client
            .get_text(&format!("127.0.0.1:{}", self.http), "/metrics")
            .await
            .unwrap();
        let line = page.lines().find(|l| l.split(' ').next() == Some(name));
        line.and_then(|l| l.split(' ').nth(1))
            .and_then(|v| v.parse().ok())
            .unwrap_or_else(|| panic!("{name}: {page}"))
    }

    /// Stops it and says how it ended.
    pub async fn end(self) -> Result<(), ProxyError> {
        self.stop.send_replace(true);
        soon("the proxy ends", self.running).await.unwrap()
    }
}

/// An agent that says what the test wants.
pub struct Agent {
    pub address: String,
    topology: watch::Sender<Arc<Topology>>,
    _stop: watch::Sender<bool>,
}

impl Agent {
    pub async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let empty = Topology {
            cluster: "test".into(),
            system_id: None,
            term: Term(0),
            revision: 0,
            writable: None,
            hold: false,
            members: Vec::new(),
        };
        let (topology, said) = watch::channel(Arc::new(empty));
        let routes = Router::new().route(
            "/v1/topology/stream",
            get(move || std::future::ready(craton_console::server::stream_topology(said.clone()))),
        );
        let service = Service::new(Arc::new(Metrics::new()), || {
            craton_console::Health::ok("test")
        });
        let router = service.with_api(routes, Token::new(TOKEN)).router();
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(craton_console::serve(listener, router, None, stopped));
        Self {
            address,
            topology,
            _stop: stop,
        }
    }

    /// Says who may be written to, and who follows.
    pub fn say(&self, term: u64, writable: Option<&Postgres>, standbys: &[&Postgres], hold: bool) {
        let member = |server: &Postgres, role, streaming| TopologyMember {
            id: MemberId::new(format!("m{}", server.port)).unwrap(),
            host: "127.0.0.1".into(),
            port: server.port,
            api: String::new(),
            role,
            timeline: None,
            lsn: None,
            replay_lsn: None,
            streaming,
            noload: false,
        };
        let leader = writable.map(|w| member(w, MemberRole::Leader, false));
        let members = leader.iter().cloned().chain(
            standbys
                .iter()
                .map(|s| member(s, MemberRole::Standby, true)),
        );
        let revision = self.topology.borrow().revision + 1;
        self.topology.send_replace(Arc::new(Topology {
            cluster: "test".into(),
            system_id: None,
            term: Term(term),
            revision,
            writable: leader.as_ref().map(|l| l.id.clone()),
            hold,
            members: members.collect(),
        }));
    }
}

/// Runs the calling test again in a process of its own, where no other test takes memory, and returns true: then the
/// caller is done.
pub fn ran_alone(test: &str) -> bool {
    const ALONE: &str = "RUNS_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return false;
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(ALONE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{test} failed alone, see above");
    true
}

/// Bytes that this process has allocated and that are in memory.
pub fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    let kilobytes = line.and_then(|l| l.trim().strip_suffix(" kB")).unwrap();
    kilobytes.parse::<u64>().unwrap() * 1024
}

/// Who owns a file: used to see that directories are PostgreSQL's.
pub fn owner(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().uid()
}
