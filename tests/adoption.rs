//! Data directories that were there before the cluster: what becomes of them, what is refused and left as it is, and
//! the way from a running primary of another system.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

#[path = "harness/mod.rs"]
mod harness;
#[path = "harness/rig.rs"]
mod rig;

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use harness::{directory, files_below, free_base_port, text};
use rig::{Rig, turn};

const LIMIT: Duration = Duration::from_secs(90);

/// A command as the user that PostgreSQL runs as: this one, or `postgres` where this is root.
fn as_owner(program: impl AsRef<std::ffi::OsStr>) -> Command {
    if !craton::owner::is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid=postgres",
        "--regid=postgres",
        "--init-groups",
        "--",
    ]);
    command.arg(program);
    command.env("HOME", "/tmp");
    command
}

fn ok(command: &mut Command) -> String {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", text(&out));
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

fn postgres_bin() -> PathBuf {
    craton_pg::Binaries::find(None).unwrap().dir().to_owned()
}

/// A PostgreSQL that Craton has nothing to do with.
struct Foreign {
    root: PathBuf,
    port: u16,
}

impl Foreign {
    /// With `superuser` as the one that initdb makes.
    fn new(name: &str, superuser: &str) -> Self {
        let root = directory(name);
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir(&root).unwrap();
        if craton::owner::is_root() {
            let account = craton::owner::account("postgres").unwrap();
            std::os::unix::fs::chown(&root, Some(account.uid), Some(account.gid)).unwrap();
        }
        let port = free_base_port();
        let foreign = Self { root, port };
        let mut initdb = as_owner(postgres_bin().join("initdb"));
        initdb.arg("-D").arg(foreign.data());
        ok(initdb.args(["-U", superuser, "--auth=trust", "--locale=C.UTF-8"]));
        foreign
    }

    fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.data().join(name)
    }

    /// Lines at the end of its postgresql.conf.
    fn configure(&self, lines: &str) {
        let path = self.path("postgresql.conf");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{text}\n{lines}\n")).unwrap();
    }

    fn ctl(&self, args: &[&str]) {
        let options = format!("-p {} -k {}", self.port, self.root.display());
        let mut ctl = as_owner(postgres_bin().join("pg_ctl"));
        ctl.arg("-D")
            .arg(self.data())
            .arg("-w")
            .arg("-o")
            .arg(options);
        ctl.arg("-l").arg(self.root.join("log")).args(args);
        let status = ctl.stdout(Stdio::null()).status().unwrap();
        assert!(status.success(), "{args:?}");
    }

    fn start(&self) {
        self.ctl(&["start"]);
    }

    fn stop(&self, mode: &str) {
        self.ctl(&["-m", mode, "stop"]);
    }

    fn sql(&self, user: &str, database: &str, commands: &[&str]) -> String {
        let mut psql = Command::new("psql");
        psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-U", user, "-d", database]);
        psql.arg("-h")
            .arg(&self.root)
            .args(["-p", &self.port.to_string()]);
        for command in commands {
            psql.args(["-c", command]);
        }
        ok(&mut psql)
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if self.path("postmaster.pid").exists() {
            let mut ctl = as_owner(postgres_bin().join("pg_ctl"));
            ctl.arg("-D")
                .arg(self.data())
                .args(["-m", "immediate", "stop"]);
            let _ = ctl.output();
        }
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

/// Every file with its contents.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut paths = Vec::new();
    files_below(dir, &mut paths);
    paths
        .into_iter()
        .map(|p| (p.clone(), std::fs::read(&p).unwrap()))
        .collect()
}

fn craton(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_craton"))
        .args(args)
        .env_remove("CRATON_DIR")
        .output()
        .unwrap()
}

fn check(data: &Path) -> Output {
    craton(&["adopt", "check", data.to_str().unwrap()])
}

#[test]
fn what_is_refused_is_left_as_it_is() {
    let foreign = Foreign::new("refuse", "postgres");
    let data = foreign.data();
    let refused = |why: &str| {
        let before = contents(&data);
        let out = check(&data);
        assert_eq!(out.status.code(), Some(4), "{}", text(&out));
        assert!(text(&out).contains(why), "{why}: {}", text(&out));
        assert!(before == contents(&data), "{why}: something was changed");
    };
    let with_file = |name: &str, content: &str, why: &str| {
        std::fs::write(foreign.path(name), content).unwrap();
        refused(why);
        std::fs::remove_file(foreign.path(name)).unwrap();
    };
    assert_eq!(
        check(&data).status.code(),
        Some(0),
        "{}",
        text(&check(&data))
    );
    with_file("standby.signal", "", "it is a standby of another server");
    with_file("recovery.signal", "", "its recovery to a point in time");
    with_file(
        "backup_label",
        "START WAL",
        "a base backup that was never started",
    );
    with_file("craton.mark", "", "of a Craton cluster");
    let conf = std::fs::read_to_string(foreign.path("postgresql.conf")).unwrap();
    foreign.configure("shared_preload_libraries = 'pg_stat_statements, nobody_has_this'");
    refused("nobody_has_this");
    foreign.configure("include 'gone.conf'");
    refused("gone.conf, which cannot be read");
    std::fs::write(foreign.path("postgresql.conf"), &conf).unwrap();

    // Other versions, with the way from there.
    let version = std::fs::read_to_string(foreign.path("PG_VERSION")).unwrap();
    for (other, way) in [
        ("9.6", "pg_upgrade"),
        ("10", "pg_dumpall"),
        ("99", "install PostgreSQL 99"),
    ] {
        std::fs::write(foreign.path("PG_VERSION"), other).unwrap();
        refused(way);
    }
    std::fs::write(foreign.path("PG_VERSION"), version).unwrap();

    // While a server runs there, and after it was a standby.
    foreign.start();
    let out = check(&data);
    assert!(
        text(&out).contains("a PostgreSQL runs in"),
        "{}",
        text(&out)
    );
    foreign.stop("fast");
    std::fs::write(foreign.path("standby.signal"), "").unwrap();
    foreign.configure("hot_standby = on");
    foreign.start();
    foreign.stop("fast");
    std::fs::remove_file(foreign.path("standby.signal")).unwrap();
    refused("was last run as a standby");

    let link = foreign.root.join("link");
    symlink(&data, &link).unwrap();
    let out = check(&link);
    assert!(text(&out).contains("is a symbolic link"), "{}", text(&out));

    // `craton up` refuses it as well, and leaves nothing behind.
    let dir = directory("refused-up");
    let (dir, source) = (dir.to_str().unwrap(), data.to_str().unwrap());
    let out = craton(&["--dir", dir, "up", "--adopt", source]);
    assert_eq!(out.status.code(), Some(4), "{}", text(&out));
    assert!(!Path::new(dir).exists());
}

/// Made by hand with another superuser, used by repmgr, with MD5 passwords and a logical slot; its server crashed.
#[test]
fn a_directory_of_another_system_founds_the_cluster() {
    let _turn = turn();
    let foreign = Foreign::new("adopt", "admin");
    foreign.configure("wal_level = logical\nmax_wal_senders = 20\nfsync = off\nport = 5432\nhba_file = '/nowhere/pg_hba.conf'");
    // The server itself does not start with that.
    let hba = std::fs::read_to_string(foreign.path("postgresql.conf")).unwrap();
    let plain = hba.replace("hba_file = '/nowhere/pg_hba.conf'", "");
    std::fs::write(foreign.path("postgresql.conf"), plain).unwrap();
    foreign.start();
    foreign.sql(
        "admin",
        "template1",
        &[
            "CREATE DATABASE shop",
            "DROP DATABASE postgres",
            "SET password_encryption = md5; CREATE ROLE app LOGIN PASSWORD 'old-password'",
            "SELECT pg_create_physical_replication_slot('repmgr_slot_2')",
        ],
    );
    foreign.sql(
        "admin",
        "shop",
        &[
            "SELECT pg_create_logical_replication_slot('feed', 'pgoutput')",
            "CREATE SCHEMA repmgr",
            "CREATE TABLE repmgr.nodes (node_id int)",
            "CREATE TABLE orders AS SELECT n FROM generate_series(1, 1000) AS n",
            "GRANT SELECT ON orders TO app",
        ],
    );
    foreign.stop("immediate");
    std::fs::write(foreign.path("postgresql.conf"), hba).unwrap();
    foreign.configure("shared_preload_libraries = 'repmgr, pg_stat_statements'");
    let before = contents(&foreign.data());
    let source = foreign.data();
    let rig = Rig::up("adopted", &["--adopt", source.to_str().unwrap()]);
    assert!(before == contents(&source), "the original was changed");
    assert_eq!(rig.leader(), "a");

    let sql = |database: &str, query: &str| rig.cluster.sql(&["-d", database, "-Atc", query]);
    assert_eq!(sql("shop", "SELECT count(*) FROM orders"), "1000");
    assert_eq!(
        sql(
            "shop",
            "SELECT slot_name FROM pg_replication_slots WHERE slot_type = 'logical'"
        ),
        "feed"
    );
    let show = |name: &str| sql("postgres", &format!("SHOW {name}"));
    assert_eq!(show("wal_level"), "logical");
    assert_eq!(show("max_wal_senders"), "20");
    assert_eq!(show("fsync"), "on");
    assert_eq!(show("shared_preload_libraries"), "pg_stat_statements");
    let kept = rig
        .layout
        .member(&"a".parse().unwrap())
        .join("data/postgresql.conf.before-craton");
    assert!(std::fs::read_to_string(kept).unwrap().contains("repmgr"));
    old_password_works(&rig);
    comes_back(&rig);
    assert_eq!(sql("shop", "SELECT count(*) FROM orders"), "1000");
    a_strange_copy_does_not_join(&rig);
}

/// Through the proxy, and at the server itself.
fn old_password_works(rig: &Rig) {
    let ports = [
        rig.layout.proxy_port(),
        rig.layout.postgres_port(&"a".parse().unwrap()),
    ];
    for port in ports {
        let mut psql = Command::new("psql");
        psql.args([
            "-h",
            "127.0.0.1",
            "-U",
            "app",
            "-d",
            "shop",
            "-XAtc",
            "SELECT count(*) FROM orders",
        ]);
        psql.args(["-p", &port.to_string()])
            .env("PGPASSWORD", "old-password");
        assert_eq!(ok(&mut psql), "1000");
    }
}

/// The host of the adopted member is lost and comes back.
fn comes_back(rig: &Rig) {
    rig.kill_host("a");
    rig.cluster.wait_status("another leads", LIMIT, |s| {
        s["writable"] == true && s["leader"] != "a" && !s["leader"].is_null()
    });
    rig.wait_whole();
    assert_ne!(rig.leader(), "a");
    assert_eq!(
        rig.cluster
            .sql(&["-d", "postgres", "-Atc", "SHOW wal_log_hints"]),
        "on",
        "without it and without checksums nobody could be rewound"
    );
}

/// A copy that nobody vouches for is not joined, and not thrown away either, until somebody says so.
fn a_strange_copy_does_not_join(rig: &Rig) {
    let leader = rig.leader();
    let other = rig.standbys(&leader).remove(0);
    rig.kill_host_for(&other, LIMIT);
    let home = rig.layout.member(&other.parse().unwrap());
    for mark in ["agent.json", "data/craton.mark", "data/standby.signal"] {
        std::fs::remove_file(home.join(mark)).unwrap();
    }
    let version = std::fs::read(home.join("data/PG_VERSION")).unwrap();
    rig.power_on(&other);
    let deadline = Instant::now() + LIMIT;
    loop {
        let out = text(&rig.cluster.craton(&["explain", &other]));
        if out.contains("that Craton did not make")
            && out.contains(&format!("craton reinit {other}"))
        {
            break;
        }
        assert!(Instant::now() < deadline, "{out}\n{}", rig.cluster.logs());
    }
    assert_eq!(
        std::fs::read(home.join("data/PG_VERSION")).unwrap(),
        version
    );
    let out = rig.cluster.craton(&["reinit", &other, "--yes"]);
    rig.cluster.expect_ok(&out, "craton reinit");
    rig.wait_whole();
}

/// A member's settings for a host of its own, and its agent.
struct Member {
    root: PathBuf,
    port: u16,
    agent: Option<Child>,
}

impl Member {
    fn new(name: &str) -> Self {
        let root = directory(name);
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir(&root).unwrap();
        // The program in a place that the owner can reach.
        let program = root.join("craton");
        std::fs::copy(env!("CARGO_BIN_EXE_craton"), &program).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        if craton::owner::is_root() {
            let account = craton::owner::account("postgres").unwrap();
            std::os::unix::fs::chown(&root, Some(account.uid), Some(account.gid)).unwrap();
        }
        let member = Self {
            port: free_base_port(),
            root,
            agent: None,
        };
        let secrets = member.root.join("secrets");
        ok(member
            .craton(&["ca", "init", "--cluster", "moved", "--secrets"])
            .arg(&secrets));
        let at = |offset: u16| format!("127.0.0.1:{}", member.port + offset);
        let settings = format!(
            "[node]\ncluster = \"moved\"\nmember = \"a\"\ndir = \"{}\"\nhost = \"127.0.0.1\"\nport = {}\napi_listen = {:?}\npeer_listen = {:?}\nsecrets = \"{}\"\nfirst_start = \"adopt\"\npeers = [{{ member = \"a\", address = {3:?} }}]\n",
            member.root.join("a").display(),
            member.port,
            at(1),
            at(2),
            secrets.display(),
        );
        std::fs::write(member.settings(), settings).unwrap();
        std::fs::set_permissions(member.settings(), std::fs::Permissions::from_mode(0o644))
            .unwrap();
        member
    }

    fn settings(&self) -> PathBuf {
        self.root.join("craton.toml")
    }

    fn craton(&self, args: &[&str]) -> Command {
        let mut command = as_owner(self.root.join("craton"));
        command.args(args).current_dir(&self.root);
        command
    }

    fn node(&mut self) {
        let log = std::fs::File::create(self.root.join("agent.log")).unwrap();
        let mut agent = self.craton(&["node", "--config"]);
        agent.arg(self.settings()).stderr(log);
        self.agent = Some(agent.spawn().unwrap());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.root.join("agent.log")).unwrap_or_default()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            harness::signal(agent.id(), "TERM");
            let _ = agent.wait();
        }
        let pid = std::fs::read_to_string(self.root.join("a/data/postmaster.pid"));
        if let Some(pid) = pid.ok().and_then(|t| t.lines().next()?.parse().ok()) {
            harness::signal(pid, "QUIT");
        }
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

fn insert(host: &str, port: u16, password: Option<&str>, n: u64) -> bool {
    let mut psql = Command::new("psql");
    psql.args(["-XAtq", "-U", "postgres", "-d", "postgres", "-h", host]);
    psql.args([
        "-p",
        &port.to_string(),
        "-c",
        &format!("INSERT INTO marks VALUES ({n})"),
    ]);
    psql.env("PGCONNECT_TIMEOUT", "2")
        .env("PGPASSWORD", password.unwrap_or_default());
    psql.output().unwrap().status.success()
}

/// What follows is taken over neither too early nor by an agent.
fn not_before_its_time(member: &mut Member, old: &Foreign, password: &Path) {
    // Nothing is taken over that does not follow.
    let mut early = member.craton(&["adopt", "takeover", "--wait", "1", "--config"]);
    let early = early.arg(member.settings()).output().unwrap();
    assert_eq!(early.status.code(), Some(4), "{}", text(&early));

    let from = format!("127.0.0.1:{}", old.port);
    for again in [false, true] {
        let mut follow = member.craton(&[
            "adopt", "follow", "--from", &from, "--user", "standby", "--config",
        ]);
        follow
            .arg(member.settings())
            .arg("--password-file")
            .arg(password);
        let out = follow.output().unwrap();
        assert!(out.status.success(), "again: {again}: {}", text(&out));
        eprintln!("{}", text(&out));
    }
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

/// A plain primary stands for repmgr's and Patroni's: underneath they are one.
#[test]
fn from_a_running_primary_with_a_switchover() {
    let _turn = turn();
    let old = Foreign::new("old", "postgres");
    old.start();
    old.sql(
        "postgres",
        "postgres",
        &[
            "CREATE TABLE marks (n bigint PRIMARY KEY)",
            "CREATE ROLE standby REPLICATION LOGIN PASSWORD 'stream-password'",
            "ALTER ROLE postgres PASSWORD 'super-password'",
        ],
    );
    let mut member = Member::new("new");
    let password = member.root.join("password");
    std::fs::write(&password, "stream-password\n").unwrap();
    std::fs::set_permissions(&password, std::fs::Permissions::from_mode(0o644)).unwrap();

    not_before_its_time(&mut member, &old, &password);

    // Clients write all the while: each row is a new session, as from an application without a pool.
    let mut written = 0;
    while written < 20 {
        assert!(insert("127.0.0.1", old.port, None, written));
        written += 1;
    }
    let mut takeover = member.craton(&["adopt", "takeover", "--config"]);
    takeover
        .arg(member.settings())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped());
    let takeover = takeover.spawn().unwrap();
    while written < 40 {
        assert!(insert("127.0.0.1", old.port, None, written));
        written += 1;
    }
    let gone = Instant::now();
    old.stop("fast");
    let out = takeover.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    eprintln!(
        "{}taken over {:?} after the stop was asked for",
        text(&out),
        gone.elapsed()
    );
    member.node();
    while !insert("127.0.0.1", member.port, Some("super-password"), written) {
        assert!(gone.elapsed() < LIMIT, "{}", member.log());
    }
    eprintln!("clients write again after {:?}", gone.elapsed());
    written += 1;
    let mut count = Command::new("psql");
    count.args([
        "-XAtq",
        "-U",
        "postgres",
        "-d",
        "postgres",
        "-h",
        "127.0.0.1",
        "-c",
        "SELECT count(*) FROM marks",
    ]);
    count
        .args(["-p", &member.port.to_string()])
        .env("PGPASSWORD", "super-password");
    assert_eq!(ok(&mut count), written.to_string(), "rows are missing");
}
