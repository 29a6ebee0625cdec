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

use std::time::Duration;

use containers::{Stack, impossible};

/// As the old node image and the official one leave a volume: the data directory at its top, another owner.
const PRIMARY: &str = "set -e; D=/var/lib/postgresql/data; B=/usr/lib/postgresql/$PG_MAJOR/bin; \
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

#[test]
fn old_volumes_under_new_images() {
    if let Some(why) = impossible() {
        eprintln!("SKIPPED, AND NOTHING IS SHOWN BY THIS: no containers can be run: {why}");
        return;
    }
    let stack = Stack::new("volumes");
    let (first, second) = (stack.volume("pgmaster"), stack.volume("pgslave1"));
    let image = "craton/postgis:test";
    let at = |volume: &str, place: &str| format!("{volume}:{place}");
    let data = "/var/lib/postgresql/data";
    let prepare = |mounts: &[String], script: &str| {
        let mut args = vec!["run", "--rm", "--user", "root", "--entrypoint", "bash"];
        for mount in mounts {
            args.extend(["-v", mount]);
        }
        args.extend([image, "-c", script]);
        stack.docker(&args);
    };
    prepare(&[at(&first, data)], PRIMARY);
    prepare(&[at(&second, data), at(&first, "/from")], STANDBY);

    let services = ["pgmaster", "pgslave1", "pgslave2", "pgpool"];
    stack.up(&services);
    let nodes = ["pgmaster", "pgslave1", "pgslave2"];
    let leader = stack.whole("pgmaster", &nodes, Duration::from_secs(240));
    assert_eq!(leader, "pgmaster");
    for node in nodes {
        let count = stack.sql_on(node, "monkey_db", "SELECT count(*) FROM t");
        assert_eq!(count.as_deref(), Ok("500"), "{node}");
    }
    // The application logs in as before, and what the environment names and was missing is there.
    let count = stack.wait("the application reads", Duration::from_secs(60), || {
        stack.sql("SELECT count(*) FROM t")
    });
    assert_eq!(count, "500");
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
