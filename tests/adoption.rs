//! Data directories that were there before the cluster: what becomes of them, and what is refused and left as it is.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

#[path = "harness/foreign.rs"]
mod foreign;
#[path = "harness/mod.rs"]
mod harness;
#[path = "harness/member.rs"]
mod member;
#[path = "harness/rig.rs"]
mod rig;

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use foreign::{Foreign, as_owner, ok};
use harness::{directory, files_below, text};
use member::Member;
use rig::{Rig, turn};

const LIMIT: Duration = Duration::from_secs(90);

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
    lead_by_a(&rig);

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

/// It made the cluster; where the machine was too slow for its lease meanwhile, another took over, rightly.
fn lead_by_a(rig: &Rig) {
    if rig.leader() != "a" {
        let out = rig.cluster.craton(&["switchover", "--to", "a"]);
        rig.cluster.expect_ok(&out, "switchover");
        rig.wait_whole();
    }
}

/// Through the proxy, and at the server itself.
fn old_password_works(rig: &Rig) {
    let ports = [
        rig.layout.proxy_port(),
        rig.layout.postgres_port(&"a".parse().unwrap()),
    ];
    for port in ports {
        let mut psql = psql_as_app(port, "shop", "SELECT count(*) FROM orders");
        assert_eq!(ok(&mut psql), "1000");
    }
}

/// `psql` by TCP, as the role that was there before the cluster.
fn psql_as_app(port: u16, database: &str, query: &str) -> Command {
    let mut psql = Command::new("psql");
    psql.args(["-h", "127.0.0.1", "-U", "app", "-d", database]);
    psql.args(["-p", &port.to_string(), "-XAtc", query]);
    psql.env("PGPASSWORD", "old-password");
    psql
}

/// The host of the adopted member is lost and comes back.
fn comes_back(rig: &Rig) {
    rig.lose_leader("a", || ());
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
        // And the others know that it is no life of before: an order to throw that away would not be for this one.
        let status = rig.cluster.json(&["status"]);
        let members = status["members"].as_array().unwrap();
        let without_life =
            |m: &serde_json::Value| m["id"] == other.as_str() && m["incarnation"].is_null();
        if out.contains("that Craton did not make")
            && out.contains(&format!("craton reinit {other}"))
            && members.iter().any(without_life)
        {
            break;
        }
        rig::pause();
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

/// On a host: a directory with a tablespace and an archive, whose member is lost at many moments of its adoption.
#[test]
fn an_adoption_that_is_cut_off_is_finished() {
    let _turn = turn();
    let foreign = Foreign::new("cut-off", "admin");
    let (space, archive) = (foreign.root.join("space"), foreign.root.join("archive"));
    for dir in [&space, &archive] {
        ok(as_owner("mkdir").arg(dir));
    }
    foreign.configure(&format!(
        "archive_mode = on\narchive_command = 'cp %p {}/%f'\nshared_preload_libraries = 'repmgr'",
        archive.display()
    ));
    foreign.start();
    let spot = format!("CREATE TABLESPACE far LOCATION '{}'", space.display());
    let password = "SET password_encryption = 'scram-sha-256'; CREATE ROLE app SUPERUSER LOGIN PASSWORD 'old-password'";
    foreign.sql(
        "admin",
        "postgres",
        &[
            &spot,
            "CREATE TABLE orders TABLESPACE far AS SELECT n FROM generate_series(1, 1000) AS n",
            password,
        ],
    );
    foreign.stop("immediate");

    // The copy of a laboratory would share the tablespace.
    let dir = directory("cut-off-up");
    let (up, source) = (dir.to_str().unwrap(), foreign.data());
    let out = craton(&["--dir", up, "up", "--adopt", source.to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(4), "{}", text(&out));
    assert!(text(&out).contains("tablespace"), "{}", text(&out));
    assert!(!dir.exists());

    let mut member = Member::new("cut-off-host");
    ok(as_owner("mkdir")
        .args(["-m", "700"])
        .arg(member.root.join("a")));
    std::fs::rename(&source, member.root.join("a/data")).unwrap();
    // Powers of two, so that early steps, which are short, are met as well as late ones.
    for milliseconds in [4, 8, 16, 32, 64, 128, 256, 512, 1024] {
        member.node();
        std::thread::sleep(Duration::from_millis(milliseconds));
        member.lose_host();
    }
    member.node();
    let sql = |query: &str| psql_as_app(member.port, "postgres", query);
    let deadline = Instant::now() + LIMIT;
    let open = "INSERT INTO orders VALUES (1001)";
    while !sql(open).output().unwrap().status.success() {
        assert!(Instant::now() < deadline, "{}", member.log());
        rig::pause();
    }
    let read = |query: &str| ok(&mut sql(query));
    assert_eq!(read("SELECT count(*) FROM orders"), "1001");
    assert_eq!(read("SHOW shared_preload_libraries"), "");
    // The file that is closed by this: the agent may have begun the next one.
    let wal = read("SELECT pg_walfile_name(pg_switch_wal())");
    let deadline = Instant::now() + LIMIT;
    while !archive.join(&wal).exists() {
        assert!(
            Instant::now() < deadline,
            "{wal} is not archived: {}",
            member.log()
        );
        rig::pause();
    }
}
