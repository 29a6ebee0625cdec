//! Volumes that other images filled, under the compose file: the first node's database founds the cluster.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

#[path = "containers/mod.rs"]
mod containers;

use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use containers::{Stack, impossible, run, tag, text};

/// One cluster at a time: the machine is small.
static TURN: Mutex<()> = Mutex::new(());

/// Where a volume is mounted.
const VOLUME: &str = "/var/lib/postgresql/data";

/// As the old node image and the official one leave a volume: the data directory in `$D`, another owner.
const PRIMARY: &str = "set -e; B=/usr/lib/postgresql/$PG_MAJOR/bin; mkdir -p $D; \
    chown postgres $D; chmod 700 $D; run() { setpriv --reuid postgres --regid postgres --clear-groups \"$@\"; }; \
    run $B/initdb -D $D -U monkey_user --auth=trust --locale=C.UTF-8 >/dev/null; \
    run $B/pg_ctl -D $D -w -o '-k /tmp' -l /tmp/log start >/dev/null; \
    run psql -h /tmp -U monkey_user -d postgres -v ON_ERROR_STOP=1 -q \
      -c \"ALTER ROLE monkey_user PASSWORD 'monkey_pass'\" -c 'CREATE DATABASE monkey_db' \
      -c 'CREATE SCHEMA repmgr' -c 'CREATE TABLE repmgr.nodes (node_id int)'; \
    run psql -h /tmp -U monkey_user -d monkey_db -q -c 'CREATE TABLE t AS SELECT n AS id FROM generate_series(1, 500) AS n'; \
    run $B/pg_ctl -D $D -m fast stop >/dev/null; \
    echo \"shared_preload_libraries = 'repmgr'\" >> $D/postgresql.conf; touch $D/master.lock; chown -R 999:999 $D";

/// What an old standby's volume looks like to the entry.
const STANDBY: &str = "set -e; cp -a /from/. /var/lib/postgresql/data/; rm /var/lib/postgresql/data/master.lock; \
    touch /var/lib/postgresql/data/standby.signal /var/lib/postgresql/data/standby.lock";

fn image() -> String {
    format!("craton/postgis:{}", tag())
}

fn at(volume: &str, place: &str) -> String {
    format!("{volume}:{place}")
}

/// Runs a script of root's over volumes.
fn prepare(stack: &Stack, mounts: &[String], script: &str) {
    let image = image();
    let mut args = vec!["run", "--rm", "--user", "root", "--entrypoint", "bash"];
    for mount in mounts {
        args.extend(["-v", mount]);
    }
    args.extend([image.as_str(), "-c", script]);
    stack.docker(&args);
}

/// A node that may found a cluster ends with code 2 on this volume; what it says.
fn refused(volume: &str) -> String {
    let mount = at(volume, VOLUME);
    let image = image();
    let mut command = Command::new("timeout");
    command.args(["120", "docker", "run", "--rm", "--network", "none", "-v"]);
    let out = run(command.args([&mount, &image]));
    assert_eq!(out.status.code(), Some(2), "{}", text(&out));
    text(&out)
}

/// Containers can be run; where not, that is said loudly.
fn possible() -> bool {
    let why = impossible();
    if let Some(why) = &why {
        eprintln!("SKIPPED, AND NOTHING IS SHOWN BY THIS: no containers can be run: {why}");
    }
    why.is_none()
}

/// A cluster of these nodes and a proxy in which the database that was in the first one's volume is everybody's.
fn has_the_old_database(stack: &Stack, nodes: &[&str]) {
    stack.up(&[nodes, &["pgpool"]].concat());
    // Whoever leads: where the machine is too slow for the lease of the one that made it, another takes over, rightly.
    stack.whole("pgmaster", nodes, Duration::from_secs(240));
    for node in nodes {
        let count = stack.sql_on(node, "monkey_db", "SELECT count(*) FROM t");
        assert_eq!(count.as_deref(), Ok("500"), "{node}");
    }
    // The application logs in as before.
    let count = stack.wait("the application reads", Duration::from_secs(60), || {
        stack.sql("SELECT count(*) FROM t")
    });
    assert_eq!(count, "500");
}

#[test]
fn old_volumes_under_new_images() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if !possible() {
        return;
    }
    let stack = Stack::new("volumes");
    let (first, second) = (stack.volume("pgmaster"), stack.volume("pgslave1"));
    prepare(
        &stack,
        &[at(&first, VOLUME)],
        &format!("D={VOLUME}; {PRIMARY}"),
    );
    prepare(&stack, &[at(&second, VOLUME), at(&first, "/from")], STANDBY);

    has_the_old_database(&stack, &["pgmaster", "pgslave1", "pgslave2"]);
    // What the environment names and was missing is there.
    let made = "SELECT count(*) FROM pg_roles WHERE rolname IN ('postgres', 'replication_user')";
    stack.wait(
        "the roles are made",
        Duration::from_secs(60),
        || match stack.sql_on("pgmaster", "postgres", made)?.as_str() {
            "2" => Ok(()),
            other => Err(other.to_owned()),
        },
    );
    // The leader's directory moved down; the standby's of before is left where it was.
    stack.sh("pgmaster", "test ! -e /var/lib/postgresql/data/PG_VERSION && test ! -e /var/lib/postgresql/data/data/master.lock");
    stack.sh("pgslave1", "test -e /var/lib/postgresql/data/PG_VERSION && test -e /var/lib/postgresql/data/standby.lock && test -e /var/lib/postgresql/data/data/craton.mark");
    assert!(
        stack.logs().contains("brought the database")
            || stack
                .sh("pgmaster", "craton history")
                .contains("brought the database")
    );
}

#[test]
fn a_database_below_the_top_of_a_volume() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if !possible() {
        return;
    }
    let stack = Stack::new("volumes-below");
    let (first, other) = (stack.volume("pgmaster"), stack.volume("pgslave3"));
    // Where it cannot be known what belongs to whom, no empty database is made.
    prepare(
        &stack,
        &[at(&other, VOLUME)],
        &format!("mkdir -p {VOLUME}/lost+found; echo x > {VOLUME}/dump.sql"),
    );
    let said = refused(&other);
    for words in [
        "it holds dump.sql",
        "No empty database is made beside what is not known",
        "nothing was changed",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    prepare(
        &stack,
        &[at(&other, VOLUME)],
        &format!(
            "set -e; cd {VOLUME}; rm dump.sql; for d in a b; do mkdir -p $d/global; echo $PG_MAJOR > $d/PG_VERSION; done"
        ),
    );
    let said = refused(&other);
    let both = format!("several databases: {VOLUME}/a, {VOLUME}/b");
    assert!(said.contains(&both), "{said}");
    prepare(
        &stack,
        &[at(&other, VOLUME)],
        &format!("cd {VOLUME}; test -e a/PG_VERSION -a -e b/PG_VERSION -a ! -e data"),
    );

    // As PGDATA=/var/lib/postgresql/data/pgdata leaves it, with the bits of a volume that a group shares.
    prepare(
        &stack,
        &[at(&first, VOLUME)],
        &format!("D={VOLUME}/pgdata; mkdir -p {VOLUME}/lost+found; {PRIMARY}; chmod 2770 $D"),
    );
    has_the_old_database(&stack, &["pgmaster", "pgslave1"]);
    stack.sh(
        "pgmaster",
        "cd /var/lib/postgresql/data && test -e data/PG_VERSION -a ! -e pgdata -a -d lost+found -a \"$(stat -c %a data)\" = 700",
    );
    assert!(
        stack
            .sh("pgmaster", "craton history")
            .contains("brought the database")
    );
}
