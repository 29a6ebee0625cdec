//! The whole cluster back to a point in time, as docs/guide/docker.md has it.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail at any line"
)]

use std::process::Command;
use std::time::Duration;

use crate::containers::{self, Stack, tag};
use crate::{ALL, NODES, start, turn};

/// A time at which all that was written before is committed, and nothing of what comes after.
fn now(stack: &Stack) -> String {
    let at = stack.sql(
        "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || 'Z'",
    );
    at.unwrap()
}

fn words(stack: &Stack, node: &str) -> String {
    let sql = "SELECT string_agg(word, ' ' ORDER BY id) FROM words";
    stack.sql_on(node, "monkey_db", sql).unwrap()
}

fn insert(stack: &Stack, word: &str) {
    stack.wait(
        &format!("\"{word}\" is written"),
        Duration::from_secs(60),
        || stack.sql(&format!("INSERT INTO words (word) VALUES ('{word}')")),
    );
}

#[test]
#[ignore = "three minutes; make test-containers runs it"]
fn point_in_time() {
    let Some(_turn) = turn() else { return };
    let stack = start("recovery");
    stack
        .sql("CREATE TABLE words (id bigserial primary key, word text)")
        .unwrap();
    insert(&stack, "before");
    stack.wait("a backup is made", Duration::from_secs(60), || {
        stack.try_sh("backup", "barman backup all")
    });
    insert(&stack, "wanted");
    // The history goes on on another timeline, and the WAL in the repository with it.
    stack.sh("pgslave2", "gosu postgres repmgr standby switchover");
    insert(&stack, "wanted-too");
    let point = now(&stack);
    insert(&stack, "mistake");
    stack
        .sql("DELETE FROM words WHERE word LIKE 'wanted%'")
        .unwrap();
    stack.wait(
        "the mistake is in the repository",
        Duration::from_secs(60),
        || stack.try_sh("backup", "barman switch-wal pg_cluster && barman check all"),
    );
    assert_eq!(words(&stack, "pgslave2"), "before mistake");

    look_at_it(&stack, &point);
    stack.compose_ok(&["stop"]);
    for node in ["pgslave1", "pgslave2", "pgslave3"] {
        let said = alone(&stack, node, &[], &["set-aside"]);
        assert!(
            said.contains("what was there is in /var/lib/postgresql/data/before-"),
            "{said}"
        );
    }
    let repository = format!("{}:/var/backups:ro", stack.volume("backup"));
    let said = alone(
        &stack,
        "pgmaster",
        &["-v", &repository],
        &["recover", "--to", &point],
    );
    eprintln!("{said}");
    assert!(said.contains("is whole and stopped"), "{said}");
    stack.compose_ok(&["up", "-d"]);
    let leader = stack.whole("pgslave1", &NODES, Duration::from_secs(240));
    assert_eq!(
        leader, "pgmaster",
        "who was given the database makes the cluster of it"
    );
    for node in NODES {
        assert_eq!(words(&stack, node), "before wanted wanted-too", "{node}");
    }
    goes_on(&stack);
    only_the_repository_is_left(&stack);
}

/// A command of the image, for a service whose container does not run.
fn alone(stack: &Stack, service: &str, more: &[&str], command: &[&str]) -> String {
    let args = [
        &["run", "--rm", "--no-deps"][..],
        more,
        &[service, "craton", "container"],
        command,
    ];
    stack.compose_ok(&args.concat())
}

/// Every node is lost with its volume. What was written last is in the repository: WAL is streamed.
fn only_the_repository_is_left(stack: &Stack) {
    insert(stack, "streamed");
    let leader = stack.leader("pgslave1").unwrap();
    let end = stack.sql_on(&leader, "postgres", "SELECT pg_current_wal_flush_lsn()");
    let reached = format!(
        "SELECT flush_lsn >= '{}' FROM pg_stat_replication WHERE application_name = 'craton_backup'",
        end.unwrap()
    );
    stack.wait(
        "it is in the repository",
        Duration::from_secs(60),
        || match stack.sql_on(&leader, "postgres", &reached)?.as_str() {
            "t" => Ok(()),
            other => Err(other.to_owned()),
        },
    );
    let words_then = words(stack, &leader);
    let nodes = [&["rm", "-f", "-s", "-v"][..], &NODES].concat();
    stack.compose_ok(&nodes);
    for node in NODES {
        stack.docker(&["volume", "rm", &stack.volume(node)]);
    }
    stack.compose_ok(&["stop"]);
    let repository = format!("{}:/var/backups:ro", stack.volume("backup"));
    let said = alone(stack, "pgmaster", &["-v", &repository], &["recover"]);
    assert!(said.contains("is whole and stopped"), "{said}");
    stack.compose_ok(&["up", "-d"]);
    stack.whole("pgslave1", &NODES, Duration::from_secs(240));
    for node in NODES {
        assert_eq!(words(stack, node), words_then, "{node}");
    }
    insert(stack, "again");
    stack.wait("WAL comes in again", Duration::from_secs(60), || {
        stack.try_sh("backup", "barman check all")
    });
}

/// The data of that time beside the cluster, in a container that sees the repository.
fn look_at_it(stack: &Stack, point: &str) {
    let volumes = format!("{}:ro", stack.container("backup"));
    let image = format!("craton/postgis:{}", tag());
    let id = stack.docker(&[
        "run",
        "-d",
        "--volumes-from",
        &volumes,
        &image,
        "sleep",
        "infinity",
    ]);
    let looked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let exec =
            |words: &[&str]| stack.docker(&[&["exec", &id, "gosu", "postgres"], words].concat());
        let dir = "/tmp/yesterday";
        let said = exec(&[
            "craton",
            "restore",
            dir,
            "--repo",
            "/var/backups",
            "--to",
            point,
        ]);
        // It says how to start it.
        let mut lines = said.lines().map(str::trim);
        let start = lines.rfind(|l| l.starts_with("pg_ctl -D "));
        let start = start.unwrap_or_else(|| panic!("{said}"));
        exec(&["bash", "-c", start]);
        let sql = "SELECT string_agg(word, ' ' ORDER BY id) FROM words";
        stack.wait(
            "the data of that time are there",
            Duration::from_secs(60),
            || {
                let psql = [
                    "exec",
                    &id,
                    "gosu",
                    "postgres",
                    "psql",
                    "-h",
                    dir,
                    "-p",
                    "5499",
                    "-U",
                    "postgres",
                    "-d",
                    "monkey_db",
                    "-XAtqc",
                    sql,
                ];
                let out = containers::run(Command::new("docker").args(psql));
                let found = containers::text(&out).trim().to_owned();
                if found == "before wanted wanted-too" {
                    Ok(())
                } else {
                    Err(found)
                }
            },
        );
    }));
    stack.docker(&["rm", "-f", "-v", &id]);
    looked.unwrap();
}

/// It is a cluster as any other: it takes writes, has them backed up, and survives its leader.
fn goes_on(stack: &Stack) {
    insert(stack, "after");
    for node in NODES {
        let recovery = stack
            .sql_on(node, "postgres", "SELECT pg_is_in_recovery()")
            .unwrap();
        assert_eq!(recovery, if node == "pgmaster" { "f" } else { "t" });
    }
    stack.wait("WAL comes in again", Duration::from_secs(60), || {
        stack.try_sh("backup", "barman check all")
    });
    stack.sh("backup", "barman backup all");
    let point = now(stack);
    insert(stack, "later");
    stack.sh("backup", "barman switch-wal pg_cluster");
    // The repository holds both histories: this is a point of the new one.
    let look = format!(
        "rm -rf /tmp/look; gosu postgres barman recover pg_cluster latest /tmp/look --target-time '{point}'"
    );
    stack.wait(
        "the new history can be restored",
        Duration::from_secs(60),
        || stack.try_sh("backup", &look),
    );
    let old = stack.container("pgmaster");
    stack.docker(&["kill", &old]);
    crate::new_leader(stack, "pgmaster");
    insert(stack, "last");
    stack.docker(&["start", &old]);
    stack.whole("pgslave1", &NODES, Duration::from_secs(120));
    for service in ALL {
        stack.wait("it is healthy", Duration::from_secs(30), || {
            stack.try_sh(service, "craton container health --ready")
        });
    }
    assert_eq!(
        words(stack, "pgmaster"),
        "before wanted wanted-too after later last"
    );
}
