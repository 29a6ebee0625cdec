//! What the old stack's users have in their compose files and fingers besides what `from_nothing` looks at: SSH, nodes of
//! the second level, `CLEAN_OVER_REWIND`, the rest of the commands; and a program that is told of the role.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail at any line"
)]

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::containers::{self, Stack, root, tag};
use crate::{ALL, NODES, new_leader, turn};

/// Keys, a program, and a compose file that makes the services use them.
fn over(dir: &Path) -> PathBuf {
    let keys = dir.join("keys");
    std::fs::create_dir(&keys).unwrap();
    let mount = format!("{}:/k", keys.display());
    let image = format!("craton/proxy:{}", tag());
    let made = containers::run(Command::new("docker").args([
        "run",
        "--rm",
        "-v",
        &mount,
        &image,
        "ssh-keygen",
        "-q",
        "-t",
        "rsa",
        "-b",
        "2048",
        "-N",
        "",
        "-f",
        "/k/id_rsa",
    ]));
    assert!(made.status.success(), "{}", containers::text(&made));
    let program = dir.join("changed");
    std::fs::write(&program, "#!/bin/sh\necho \"$1 $3 $4\" >>/tmp/roles\n").unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut text = "version: '3.8'\nservices:\n".to_owned();
    for (service, more) in [
        ("pgmaster", "CRATON_NODE_HOOKS__ON_ROLE_CHANGE: /changed"),
        ("pgslave1", "CLEAN_OVER_REWIND: 1"),
        (
            "pgslave2",
            "PARTNER_NODES: ''\n      REPLICATION_PRIMARY_HOST: pgslave1",
        ),
        ("backup", "X: y"),
    ] {
        let _ = write!(
            text,
            "  {service}:\n    environment:\n      SSH_ENABLE: 1\n      {more}\n    volumes:\n      - {}:/var/lib/postgresql/.ssh/keys:ro\n      - {}:/changed:ro\n",
            keys.display(),
            program.display()
        );
    }
    let path = dir.join("old.yml");
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
#[ignore = "two minutes; make test-containers runs it"]
fn old_interface() {
    let Some(_turn) = turn() else { return };
    containers::images();
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let files = [
        root().join("docker-compose/docker-compose.yml"),
        over(dir.path()),
    ];
    let stack = Stack::of_files("old", &files, &[]);
    stack.up(&ALL);
    stack.whole("pgmaster", &NODES, Duration::from_secs(240));
    ssh(&stack);
    second_level(&stack);
    nodes_table(&stack);
    told_of_the_role(&stack);
    clean_over_rewind(&stack);
    commands_of_a_node(&stack);
    crate::old_hands::options(&stack);
    crate::old_hands::taken_out(&stack);
    // Taken down with the files that it was brought up with.
    drop(stack);
}

fn ssh(stack: &Stack) {
    for (from, to) in [
        ("pgmaster", "pgslave1"),
        ("pgslave2", "pgmaster"),
        ("backup", "pgslave2"),
        ("pgslave1", "backup"),
    ] {
        assert_eq!(
            stack.sh(from, &format!("gosu postgres ssh {to} hostname")),
            to
        );
    }
    let refused = |command: &str| stack.try_sh("pgmaster", command).unwrap_err();
    let root = refused("gosu postgres ssh root@pgslave1 hostname");
    assert!(root.contains("Permission denied (publickey)"), "{root}");
    let password = refused("gosu postgres ssh -o PubkeyAuthentication=no pgslave1 hostname");
    assert!(
        password.contains("Permission denied (publickey)"),
        "{password}"
    );
    // Where nobody asked for it nothing listens.
    assert!(
        stack
            .try_sh("pgslave3", "exec 3<>/dev/tcp/localhost/22")
            .is_err()
    );
}

fn upstream(stack: &Stack, member: &str) -> String {
    let status = stack.status("pgmaster").unwrap();
    let members = status["members"].as_array().unwrap();
    let found = members.iter().find(|m| m["id"] == member).unwrap();
    found["state"].as_str().unwrap_or_default().to_owned()
}

fn second_level(stack: &Stack) {
    stack.wait(
        "it streams from another standby",
        Duration::from_secs(60),
        || {
            let state = upstream(stack, "pgslave2");
            if state.starts_with("streaming from pgslave1") {
                Ok(())
            } else {
                Err(state)
            }
        },
    );
    let origin = stack.sh("pgslave2", "craton config show --origin");
    let line = origin
        .lines()
        .find(|l| l.starts_with("node.upstream "))
        .unwrap_or_default();
    assert!(
        line.contains("the variable REPLICATION_PRIMARY_HOST"),
        "{origin}"
    );
    // The compose file's other standbys have partners: for them it is where they ask.
    assert!(upstream(stack, "pgslave3").starts_with("streaming from pgmaster"));
}

fn told_of_the_role(stack: &Stack) {
    stack.wait("the program was called", Duration::from_secs(30), || {
        let told = stack.try_sh("pgmaster", "cat /tmp/roles")?;
        if told.ends_with("leader pgmaster pg_cluster") {
            Ok(())
        } else {
            Err(told)
        }
    });
}

/// A former leader with WAL of its own is cloned, where it would have been rewound.
fn clean_over_rewind(stack: &Stack) {
    stack
        .sql_on(
            "pgmaster",
            "monkey_db",
            "CREATE TABLE t (id bigserial primary key)",
        )
        .unwrap();
    stack.sh("pgslave1", "gosu postgres repmgr standby switchover");
    stack.wait("pgslave1 leads", Duration::from_secs(30), || {
        stack
            .leader("pgmaster")
            .filter(|l| l == "pgslave1")
            .ok_or_else(|| "not yet".to_owned())
    });
    let id = stack.container("pgslave1");
    // Commits that nobody else gets wait until PostgreSQL is stopped.
    let writers = "for i in $(seq 100); do gosu postgres psql -q -d monkey_db -c 'INSERT INTO t DEFAULT VALUES' & sleep 0.05; done";
    stack.docker(&["exec", "-d", &id, "bash", "-c", writers]);
    stack.wait("rows are written", Duration::from_secs(10), || match stack
        .sql_on("pgslave1", "monkey_db", "SELECT count(*) > 3 FROM t")?
        .as_str()
    {
        "t" => Ok(()),
        other => Err(other.to_owned()),
    });
    stack.docker(&["network", "disconnect", &stack.network(), &id]);
    let new = new_leader(stack, "pgslave1");
    stack.docker(&[
        "network",
        "connect",
        "--alias",
        "pgslave1",
        &stack.network(),
        &id,
    ]);
    stack.whole(&new, &NODES, Duration::from_secs(120));
    let out = containers::run(Command::new("docker").args(["logs", &id]));
    let log = containers::text(&out);
    assert!(
        log.contains("node.clone.over_rewind asks for a clone"),
        "{log}"
    );
}

/// The documented way to see the topology in SQL, as the replication user, through the proxy as well.
fn nodes_table(stack: &Stack) {
    let sql = "SELECT string_agg(node_id || ' ' || coalesce(upstream_node_id::text, '-') || ' ' || type || ' ' || active, ', ' ORDER BY node_id) FROM repmgr.nodes";
    stack.wait(
        "the table says who follows whom",
        Duration::from_secs(30),
        || {
            let seen = stack.sql_on("pgslave3", "replication_db", sql)?;
            let expected = "1 - primary true, 2 1 standby true, 3 2 standby true, 4 1 standby true";
            if seen == expected { Ok(()) } else { Err(seen) }
        },
    );
    let slots = "SELECT count(*) FROM repmgr.nodes JOIN pg_replication_slots USING (slot_name)";
    assert_ne!(
        stack.sql_on("pgmaster", "replication_db", slots).unwrap(),
        "0"
    );
    let view = "SET ROLE replication_user; SELECT upstream_node_name FROM repmgr.show_nodes WHERE node_id = 3";
    assert_eq!(
        stack.sql_on("pgmaster", "replication_db", view).unwrap(),
        "node2"
    );
    its_owner_does_not_become_superuser(stack);
}

/// The database belongs to the replication user, and the superuser writes into it: neither operators that come first on
/// a path of the owner's nor triggers of the owner's may run as the superuser.
fn its_owner_does_not_become_superuser(stack: &Stack) {
    let sql = |text: &str| stack.sql_on("pgmaster", "replication_db", text);
    let grab = "BEGIN EXECUTE ''ALTER ROLE replication_user SUPERUSER''; EXCEPTION WHEN OTHERS THEN NULL; END";
    sql(&format!(
        "SET ROLE replication_user; CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO PUBLIC; \
         CREATE FUNCTION evil.eq(name, text) RETURNS bool LANGUAGE plpgsql AS 'BEGIN {grab}; RETURN false; END'; \
         CREATE OPERATOR evil.= (LEFTARG = name, RIGHTARG = text, FUNCTION = evil.eq); \
         CREATE FUNCTION evil.t() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN {grab}; RETURN NULL; END'; \
         ALTER DATABASE replication_db SET search_path = evil, pg_catalog"
    ))
    .unwrap();
    // As on a database that was there before: the schema is the owner's, with a trigger.
    sql("DROP SCHEMA repmgr CASCADE").unwrap();
    sql(
        "SET ROLE replication_user; SET search_path = pg_catalog; CREATE SCHEMA repmgr; \
         CREATE TABLE repmgr.nodes (node_id integer PRIMARY KEY, upstream_node_id integer, active boolean, node_name text, type text, location text, priority integer, conninfo text, repluser text, slot_name text, config_file text); \
         CREATE TRIGGER t BEFORE INSERT OR DELETE ON repmgr.nodes EXECUTE FUNCTION evil.t()",
    )
    .unwrap();
    // A change of the members makes the leader's container write.
    stack.compose_ok(&["stop", "pgslave3"]);
    stack.wait("it is not written", Duration::from_secs(60), || {
        let logs = stack.compose_ok(&["logs", "--no-color", "pgmaster"]);
        if logs.contains("does not belong to postgres, or not all of it") {
            Ok(())
        } else {
            Err("no refusal in the log yet".to_owned())
        }
    });
    let is_super = "SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) 'replication_user'";
    assert_eq!(sql(is_super).unwrap(), "f");
    sql("SET search_path = pg_catalog; DROP SCHEMA repmgr CASCADE").unwrap();
    stack.wait("it is written again", Duration::from_secs(60), || {
        // The one that is stopped keeps its number and its name.
        let rows = sql(
            "SELECT count(*) || ' ' || string_agg(node_id || ' ' || node_name, ',') FILTER (WHERE NOT active) FROM repmgr.nodes",
        )?;
        if rows == "4 4 node4" { Ok(()) } else { Err(rows) }
    });
    // The commands know it, too.
    let shown = stack.exec(
        "pgmaster",
        &["gosu", "postgres", "repmgr", "cluster", "show"],
    );
    assert_eq!(shown.status.code(), Some(25));
    let shown = containers::text(&shown);
    let line = shown.lines().find(|l| l.contains("| node4"));
    let line = line.unwrap_or_else(|| panic!("{shown}"));
    assert!(
        line.starts_with(" 4 ") && line.contains("- failed"),
        "{shown}"
    );
    let dry = stack.sh(
        "pgmaster",
        "gosu postgres repmgr standby unregister --node-id=4 --dry-run",
    );
    assert!(dry.contains("pgslave3 would be taken out"), "{dry}");
    // The owner's operators came first on its path all the time.
    assert_eq!(sql(is_super).unwrap(), "f");
    sql("SET search_path = pg_catalog; ALTER DATABASE replication_db RESET search_path; DROP SCHEMA evil CASCADE").unwrap();
    stack.compose_ok(&["start", "pgslave3"]);
    stack.whole("pgmaster", &NODES, Duration::from_secs(120));
}

fn commands_of_a_node(stack: &Stack) {
    for command in [
        "standby follow",
        "standby clone",
        "standby register",
        "node rejoin",
        "cluster matrix",
        "cluster event",
        "node status",
        "node check",
    ] {
        stack.sh("pgslave3", &format!("gosu postgres repmgr {command}"));
    }
    let leader = stack.whole("pgmaster", &NODES, Duration::from_secs(120));
    assert_eq!(stack.sh("pgslave3", "cluster_master"), leader);
    let standby = NODES.iter().find(|n| **n != leader).unwrap();
    let upstream = stack.sh(standby, "get_upstream_node_id");
    assert_eq!(upstream, stack.sh(&leader, "get_node_id"));
    assert_eq!(stack.sh(&leader, "get_upstream_node_id"), "");
    stack.sh(
        "pgslave3",
        "has_pg_cluster && wait_recovery && standby_register",
    );
    let refused = stack.exec("pgslave3", &["node_unregister"]);
    assert_eq!(
        refused.status.code(),
        Some(2),
        "{}",
        containers::text(&refused)
    );
    let csv = stack.sh("pgslave3", "gosu postgres repmgr cluster show --csv");
    assert_eq!(csv.lines().count(), 4, "{csv}");
    let status = stack.sh("pgslave3", "gosu postgres repmgr node status");
    assert!(status.starts_with("Node \"node4\":"), "{status}");
}
