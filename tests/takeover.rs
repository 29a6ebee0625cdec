//! From a running cluster of another system with a switchover instead of an outage: a plain primary, repmgr's with its
//! daemons at work, Patroni's with its etcd. Their own commands, as the guide has them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

#[path = "etcd/servers.rs"]
mod etcd;
#[path = "harness/foreign.rs"]
mod foreign;
#[path = "harness/mod.rs"]
mod harness;
#[path = "harness/member.rs"]
mod member;
#[path = "harness/rig.rs"]
mod rig;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use etcd::Etcd;
use foreign::{Foreign, as_owner, ok, postgres_bin};
use harness::text;
use member::Member;
use rig::turn;

const LIMIT: Duration = Duration::from_secs(90);
/// The password of every old superuser.
const PASSWORD: &str = "super-password";

/// `psql` as the superuser by TCP, for one command.
fn psql(port: u16, database: &str, command: &str) -> Command {
    let mut psql = Command::new("psql");
    psql.args(["-XAtq", "-U", "postgres", "-h", "127.0.0.1"]);
    psql.args(["-p", &port.to_string(), "-d", database, "-c", command]);
    psql.env("PGCONNECT_TIMEOUT", "20")
        .env("PGPASSWORD", PASSWORD);
    psql
}

fn select(port: u16, database: &str, query: &str) -> String {
    ok(&mut psql(port, database, query))
}

fn insert(port: u16, n: u64) -> bool {
    // A try before may have done it without an answer.
    let command = format!("INSERT INTO marks VALUES ({n}) ON CONFLICT DO NOTHING");
    psql(port, "postgres", &command)
        .output()
        .unwrap()
        .status
        .success()
}

/// Until `met` says so.
fn wait(what: &str, mut met: impl FnMut() -> Result<(), String>) {
    let deadline = Instant::now() + LIMIT;
    while let Err(why) = met() {
        assert!(Instant::now() < deadline, "{what}: {why}");
        rig::pause();
    }
}

/// Makes the copy, and follows.
fn follow(member: &Member, old: &Old<'_>, again: bool) {
    let password = member.root.join("password");
    std::fs::write(&password, format!("{}\n", old.password)).unwrap();
    std::fs::set_permissions(&password, std::fs::Permissions::from_mode(0o644)).unwrap();
    let from = format!("127.0.0.1:{}", old.port);
    let mut follow = member.craton(&["adopt", "follow", "--from", &from, "--config"]);
    follow.arg(member.settings()).args(["--user", old.user]);
    let out = follow
        .arg("--password-file")
        .arg(&password)
        .output()
        .unwrap();
    assert!(out.status.success(), "again: {again}: {}", text(&out));
    eprintln!("{}", text(&out));
}

/// What is to be moved: where its primary is, and who may replicate from there.
struct Old<'a> {
    port: u16,
    user: &'a str,
    password: &'a str,
    /// Keeps the old system from promoting another one.
    pause: &'a dyn Fn(),
    /// Stops the primary in order.
    stop: &'a dyn Fn(),
}

/// Follows the old primary, and takes over while clients write; how many rows there are then.
fn moves(member: &mut Member, old: &Old<'_>) -> u64 {
    // Clients write all the while: each row is a new session, as from an application without a pool.
    let mut written = 0;
    while written < 20 {
        assert!(insert(old.port, written));
        written += 1;
    }
    (old.pause)();
    let mut takeover = member.craton(&["adopt", "takeover", "--config"]);
    takeover
        .arg(member.settings())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped());
    let takeover = takeover.spawn().unwrap();
    while written < 40 {
        assert!(insert(old.port, written));
        written += 1;
    }
    let gone = Instant::now();
    (old.stop)();
    let out = takeover.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    eprintln!(
        "{}taken over {:?} after the stop was asked for",
        text(&out),
        gone.elapsed()
    );
    member.node();
    while !insert(member.port, written) {
        assert!(gone.elapsed() < LIMIT, "{}", member.log());
    }
    eprintln!("clients write again after {:?}", gone.elapsed());
    written += 1;
    let count = select(member.port, "postgres", "SELECT count(*) FROM marks");
    assert_eq!(count, written.to_string(), "rows are missing");
    written
}

/// What follows is taken over neither too early nor by an agent.
fn not_before_its_time(member: &mut Member, old: &Old<'_>) {
    // Nothing is taken over that does not follow.
    let mut early = member.craton(&["adopt", "takeover", "--wait", "1", "--config"]);
    let early = early.arg(member.settings()).output().unwrap();
    assert_eq!(early.status.code(), Some(4), "{}", text(&early));

    follow(member, old, false);
    follow(member, old, true);
    // Neither does it take over while the primary runs, nor does an agent touch what follows.
    let mut early = member.craton(&["adopt", "takeover", "--wait", "2", "--config"]);
    let early = early.arg(member.settings()).output().unwrap();
    assert_eq!(early.status.code(), Some(6), "{}", text(&early));
    member.node();
    let refused = member.agent.take().unwrap().wait().unwrap();
    assert!(
        !refused.success() && member.log().contains("did not start"),
        "{}",
        member.log()
    );
}

#[test]
fn from_a_plain_primary() {
    let _turn = turn();
    let old = Foreign::new("old", "postgres");
    old.start();
    let role = "CREATE ROLE standby REPLICATION LOGIN PASSWORD 'stream-password'";
    make_marks(&old, &[role]);
    let mut member = Member::new("new");
    let plain = Old {
        port: old.port,
        user: "standby",
        password: "stream-password",
        pause: &|| (),
        stop: &|| old.stop("fast"),
    };
    not_before_its_time(&mut member, &plain);
    moves(&mut member, &plain);
}

/// The table that clients write to, and the superuser's password.
fn make_marks(server: &Foreign, more: &[&str]) {
    let password = format!("ALTER ROLE postgres PASSWORD '{PASSWORD}'");
    let mut commands = vec!["CREATE TABLE marks (n bigint PRIMARY KEY)", &password];
    commands.extend_from_slice(more);
    server.sql("postgres", "postgres", &commands);
}

/// What ends with the test.
struct Daemon(Child);

impl Daemon {
    fn start(mut command: Command, log: &Path) -> Self {
        let log = std::fs::File::create(log).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        Self(command.spawn().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        harness::signal(self.0.id(), "TERM");
        let _ = self.0.wait();
    }
}

/// A node of repmgr with its daemon.
struct RepmgrNode {
    server: Foreign,
}

impl RepmgrNode {
    fn new(id: u8, server: Foreign) -> Self {
        let (bin, port) = (postgres_bin(), server.port);
        let node = Self { server };
        let conf = node.conf();
        let (bin, file) = (bin.display(), conf.display());
        let settings = format!(
            "node_id={id}\nnode_name='node{id}'\nconninfo='host=127.0.0.1 port={port} user=repmgr dbname=repmgr connect_timeout=2'\n\
             data_directory='{data}'\npg_bindir='{bin}'\nuse_replication_slots=yes\nlog_level=INFO\n\
             failover=automatic\nmonitor_interval_secs=1\nreconnect_attempts=2\nreconnect_interval=1\n\
             promote_command='{bin}/repmgr standby promote -f {file}'\n\
             follow_command='{bin}/repmgr standby follow -f {file} --upstream-node-id=%n'\n",
            data = node.server.data().display(),
        );
        std::fs::write(&conf, settings).unwrap();
        std::fs::set_permissions(&conf, std::fs::Permissions::from_mode(0o644)).unwrap();
        node
    }

    fn conf(&self) -> PathBuf {
        self.server.root.join("repmgr.conf")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = as_owner(postgres_bin().join("repmgr"));
        command.arg("-f").arg(self.conf()).args(arguments);
        command.current_dir(&self.server.root);
        command
    }

    fn log(&self) -> PathBuf {
        self.server.root.join("repmgrd.log")
    }

    fn daemon(&self) -> Daemon {
        let mut daemon = as_owner(postgres_bin().join("repmgrd"));
        daemon.arg("-f").arg(self.conf());
        daemon.args(["--daemonize=false", "--no-pid-file"]);
        Daemon::start(daemon, &self.log())
    }
}

/// A primary and a standby with automatic failover, which the guide's pause keeps from acting.
#[test]
fn from_repmgr() {
    let _turn = turn();
    let server = Foreign::new("repmgr1", "postgres");
    server.configure(
        "shared_preload_libraries = 'repmgr'\nwal_log_hints = on\nmax_replication_slots = 10",
    );
    server.start();
    let roles = [
        "CREATE ROLE repmgr SUPERUSER LOGIN PASSWORD 'repmgr-password'",
        "CREATE DATABASE repmgr OWNER repmgr",
    ];
    make_marks(&server, &roles);
    let first = RepmgrNode::new(1, server);
    ok(&mut first.command(&["primary", "register"]));
    let port = first.server.port.to_string();
    let second = RepmgrNode::new(2, Foreign::empty("repmgr2"));
    let from = [
        "-h",
        "127.0.0.1",
        "-p",
        &port,
        "-U",
        "repmgr",
        "-d",
        "repmgr",
    ];
    ok(second
        .command(&from)
        .args(["standby", "clone", "--fast-checkpoint"]));
    second.server.start();
    ok(&mut second.command(&["standby", "register"]));
    let _daemons = [first.daemon(), second.daemon()];
    wait("both daemons run", || {
        let out = text(&first.command(&["service", "status"]).output().unwrap());
        // "running" with a process number behind it is the daemon's.
        let running = out
            .lines()
            .filter(|l| l.contains("| running | ") && !l.contains("not running"));
        (running.count() == 2).then_some(()).ok_or(out)
    });

    let mut member = Member::new("from-repmgr");
    let old = Old {
        port: first.server.port,
        user: "repmgr",
        password: "repmgr-password",
        pause: &|| {
            ok(&mut first.command(&["service", "pause"]));
        },
        stop: &|| first.server.stop("fast"),
    };
    follow(&member, &old, false);
    moves(&mut member, &old);
    // Its standby has seen that the primary is gone, and leaves it at that.
    wait("the old standby's daemon sees the loss", || {
        let log = std::fs::read_to_string(second.log()).unwrap();
        log.contains("paused").then_some(()).ok_or(log)
    });
    let recovers = "SELECT pg_is_in_recovery()";
    assert_eq!(select(second.server.port, "postgres", recovers), "t");
    let clean = "DROP EXTENSION repmgr CASCADE";
    select(member.port, "repmgr", clean);
}

/// A node of Patroni, with the agent that keeps its PostgreSQL.
struct PatroniNode {
    server: Foreign,
    agent: Option<Daemon>,
}

impl PatroniNode {
    fn new(id: u16, etcd: &Etcd) -> Self {
        let server = Foreign::empty(&format!("patroni{id}"));
        let (root, api) = (server.root.display(), server.port + 1);
        let endpoints: Vec<String> = etcd
            .urls()
            .iter()
            .map(|u| format!("\"{}\"", u.replace("http://", "")))
            .collect();
        let settings = format!(
            "scope: shop\nname: node{id}\n\
             restapi: {{listen: '127.0.0.1:{api}', connect_address: '127.0.0.1:{api}'}}\n\
             etcd3: {{hosts: [{etcd}]}}\n\
             bootstrap:\n  dcs: {{ttl: 20, loop_wait: 1, retry_timeout: 3, postgresql: {{use_pg_rewind: true, use_slots: true}}}}\n\
             \x20 initdb: [{{encoding: UTF8}}, data-checksums]\n\
             postgresql:\n  listen: 127.0.0.1:{port}\n  connect_address: 127.0.0.1:{port}\n  data_dir: {root}/data\n\
             \x20 bin_dir: {bin}\n  pgpass: {root}/pgpass\n\
             \x20 pg_hba: ['local all all trust', 'host replication replicator 127.0.0.1/32 scram-sha-256', 'host all all 127.0.0.1/32 scram-sha-256']\n\
             \x20 authentication:\n    superuser: {{username: postgres, password: {PASSWORD}}}\n\
             \x20   replication: {{username: replicator, password: stream-password}}\n\
             \x20 parameters: {{unix_socket_directories: {root}}}\n",
            etcd = endpoints.join(", "),
            port = server.port,
            bin = postgres_bin().display(),
        );
        let mut node = Self {
            server,
            agent: None,
        };
        std::fs::write(node.conf(), settings).unwrap();
        std::fs::set_permissions(node.conf(), std::fs::Permissions::from_mode(0o644)).unwrap();
        let mut agent = as_owner("patroni");
        agent.arg(node.conf()).current_dir(&node.server.root);
        node.agent = Some(Daemon::start(agent, &node.log()));
        node
    }

    fn conf(&self) -> PathBuf {
        self.server.root.join("patroni.yml")
    }

    fn log(&self) -> PathBuf {
        self.server.root.join("patroni.log")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = as_owner("patronictl");
        command.arg("-c").arg(self.conf()).args(arguments);
        command
    }

    fn patronictl(&self, arguments: &[&str]) -> String {
        ok(&mut self.command(arguments))
    }

    /// Until the list of members has this.
    fn wait_list(&self, what: &str, met: impl Fn(&str) -> bool) {
        wait(what, || {
            let out = self.command(&["list"]).output().unwrap();
            let list = String::from_utf8_lossy(&out.stdout);
            let log = || std::fs::read_to_string(self.log()).unwrap_or_default();
            (out.status.success() && met(&list))
                .then_some(())
                .ok_or_else(|| format!("{}\n{}", text(&out), log()))
        });
    }
}

/// A leader and a replica, whose maintenance mode keeps Patroni from promoting.
#[test]
fn from_patroni() {
    let _turn = turn();
    let etcd = Etcd::start(1);
    let first = PatroniNode::new(1, &etcd);
    first.wait_list("the first leads", |l| {
        l.contains("Leader") && l.contains("running")
    });
    let second = PatroniNode::new(2, &etcd);
    second.wait_list("the second follows", |l| {
        l.lines()
            .any(|l| l.contains("node2") && (l.contains("running") || l.contains("streaming")))
    });
    make_marks(&first.server, &[]);
    let mut member = Member::new("from-patroni");
    first.patronictl(&[
        "edit-config",
        "--force",
        "--set",
        "slots.craton_a.type=physical",
    ]);
    wait("Patroni has made the slot", || {
        let slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'craton_a'";
        let count = select(first.server.port, "postgres", slots);
        (count == "1").then_some(()).ok_or(count)
    });
    let old = Old {
        port: first.server.port,
        user: "replicator",
        password: "stream-password",
        pause: &|| {
            first.patronictl(&["pause", "--wait"]);
        },
        stop: &|| first.server.stop("fast"),
    };
    follow(&member, &old, false);
    moves(&mut member, &old);
    // Patroni has let the leader's key go, and leaves it at that.
    second.wait_list("nobody leads there", |l| {
        !l.contains("Leader") && l.contains("stopped")
    });
    let recovers = "SELECT pg_is_in_recovery()";
    assert_eq!(select(second.server.port, "postgres", recovers), "t");
}
