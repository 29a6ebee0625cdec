//! What people of the old stack type, word for word, and what their files say that means something else now.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail at any line"
)]

use std::process::Command;
use std::time::Duration;

use crate::NODES;
use crate::containers::{self, Stack, tag};

const PROBE: &str = "/usr/local/bin/cluster/healthcheck/is_major_master.sh";

/// One-liners of the old README and of its tests.
pub fn typed_as_before(stack: &Stack) {
    // Whoever is in a node's container is let in, without gosu and without a password.
    let nodes = [("postgres", "postgres"), ("monkey_user", "monkey_db")];
    for (user, database) in nodes {
        let typed = format!("psql -U {user} {database} -XAtc 'SELECT current_user'");
        assert_eq!(stack.sh("pgmaster", &typed), user);
    }
    let table = "gosu postgres psql $REPLICATION_DB -XAtc \"SELECT count(*) FROM $(get_repmgr_schema).$REPMGR_NODES_TABLE\"";
    stack.wait("the nodes' table", Duration::from_secs(30), || {
        let rows = stack.try_sh("pgmaster", table)?;
        if rows == "4" { Ok(()) } else { Err(rows) }
    });
    let pool = "PGCONNECT_TIMEOUT=$CHECK_PGCONNECT_TIMEOUT PGPASSWORD=$CHECK_PASSWORD psql -U $CHECK_USER -h localhost template1 -XAtc 'show pool_nodes'";
    assert_eq!(stack.sh("pgpool", pool).lines().count(), 4);
    let kept = stack.sh("pgpool", "stat -c '%a %U' /run/craton/secrets/pgpass");
    assert_eq!(kept, "600 postgres");
    let locale = "SELECT datcollate || ' ' || pg_encoding_to_char(encoding) FROM pg_database WHERE datname = 'template1'";
    let locale = stack.sql_on("pgslave1", "postgres", locale).unwrap();
    assert_eq!(locale, "en_US.utf8 UTF8");
    let id = stack.container("pgpool");
    let log = containers::text(&containers::run(Command::new("docker").args(["logs", &id])));
    let reads = log.matches("port 5433 spreads reads over the standbys");
    assert_eq!(reads.count(), 1, "{log}");
    let doctor = stack.wait("the doctor is content", Duration::from_secs(60), || {
        stack.try_sh("pgmaster", "craton doctor")
    });
    let twice = NODES.iter().any(|n| {
        let mut lines = doctor.lines().filter(|l| l.starts_with("note fence"));
        lines.any(|l| l.matches(n).count() > 1)
    });
    assert!(!twice, "{doctor}");
    for service in crate::ALL {
        stack.sh(
            service,
            "craton container health && craton container health --ready",
        );
    }
}

/// What is wrong in the environment is said at once, by its name, and nothing is started.
pub fn wrong_variables() {
    for (image, variables, said) in [
        (
            "postgis",
            &["STOPPING_TIMEOUT=5s"][..],
            "STOPPING_TIMEOUT=5s: a whole number of seconds",
        ),
        (
            "postgis",
            &["POSTGRES_INITDB_ARGS=--wal-segsize=64"],
            "POSTGRES_INITDB_ARGS: the argument --wal-segsize=64",
        ),
        (
            "backup",
            &["REPLICATION_HOST=x", "BACKUP_SCHEDULE=0 25 * * *"],
            "BACKUP_SCHEDULE=0 25 * * *: ",
        ),
        (
            "proxy",
            &["CONFIGS=num_init_children:many"],
            "CONFIGS: num_init_children = many: a whole number",
        ),
        (
            "proxy",
            &["WAIT_BACKEND_TIMEOUT=2m"],
            "WAIT_BACKEND_TIMEOUT=2m: ",
        ),
    ] {
        let image = format!("craton/{image}:{}", tag());
        let mut run = Command::new("timeout");
        run.args(["60", "docker", "run", "--rm"]);
        for variable in variables {
            run.args(["-e", variable]);
        }
        let out = containers::run(run.arg(&image));
        let text = containers::text(&out);
        assert_eq!(out.status.code(), Some(2), "{variables:?}: {text}");
        assert!(text.contains(said), "{variables:?}: {text}");
    }
}

/// An option that a command does not know is refused by its name, and `--dry-run` changes nothing.
pub fn options(stack: &Stack) {
    let leader = stack.whole("pgmaster", &NODES, Duration::from_secs(120));
    let term = || stack.status("pgmaster").unwrap()["term"].clone();
    let before = term();
    let standby = NODES.into_iter().find(|n| **n != *leader).unwrap();
    let exits = |node: &str, command: &str, code: i32, said: &str| {
        let out = stack.exec(node, &["bash", "-c", command]);
        let text = containers::text(&out);
        assert_eq!(out.status.code(), Some(code), "{node}: {command}: {text}");
        assert!(text.contains(said), "{node}: {command}: {text}");
    };
    let repmgr = |words: &str| format!("gosu postgres repmgr {words}");
    let met = "prerequisites for executing STANDBY SWITCHOVER are met";
    exits(standby, &repmgr("standby switchover --dry-run"), 0, met);
    let leads = "leads already";
    exits(&leader, &repmgr("standby switchover --dry-run"), 4, leads);
    exits(standby, &repmgr("standby switchover --help"), 0, "");
    for option in ["--node-id 3 --dry-run", "--node-id=3 --dry-run"] {
        // It asks every node for its number at this moment.
        let command = repmgr(&format!("primary unregister {option}"));
        stack.wait(&command, Duration::from_secs(30), || {
            let said = stack.try_sh(standby, &command)?;
            let good = said.contains("would be taken out");
            if good { Ok(()) } else { Err(said) }
        });
    }
    let always = "standby switchover --always-promote";
    exits(standby, &repmgr(always), 2, "--always-promote");
    let service = "node service --action=stop";
    exits(standby, &repmgr(service), 2, "--action");
    let harmless = "-f /etc/repmgr.conf cluster show -v";
    exits(standby, &repmgr(harmless), 0, "node4");
    exits("pgpool", "pcp_promote_node --help", 0, "");
    assert_eq!(term(), before, "something was changed");
    let listed = stack.sh(standby, "craton member list");
    assert!(listed.contains("pgslave2"), "{listed}");
    exits(&leader, PROBE, 0, "the primary: it leads");
    exits(standby, PROBE, 0, "not the primary");

    stack.wait("a backup is taken", Duration::from_secs(120), || {
        stack.try_sh("backup", "barman backup all")
    });
    for refused in [
        "--target-xid 1",
        "--target-name x",
        "--target-time '2030-01-01 00:00' --exclusive",
        "--remote-ssh-command 'ssh pgmaster'",
    ] {
        let option = refused.split(' ').rfind(|w| w.starts_with("--")).unwrap();
        let command = format!("barman recover {refused} pg_cluster latest /tmp/r2");
        exits("backup", &command, 2, option);
    }
    assert!(stack.try_sh("backup", "ls /tmp/r2").is_err());
    stack.sh("backup", "barman recover -j 4 pg_cluster latest /tmp/r1");
    stack.sh("backup", "test -e /tmp/r1/PG_VERSION && rm -r /tmp/r1");
    let told = stack.sh("backup", "barman diagnose");
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    let backups = told["servers"]["pg_cluster"]["backups"]
        .as_object()
        .unwrap();
    assert!(!backups.is_empty(), "{told}");
    for (id, backup) in backups {
        assert_eq!(backup["status"], "DONE", "{told}");
        assert_eq!(backup["backup_id"], id.as_str(), "{told}");
        assert!(backup["size"].as_u64().unwrap() > 0, "{told}");
        assert!(backup["copy_stats"]["total_time"].is_number(), "{told}");
    }
}

/// A node that is taken out stays up without PostgreSQL, is not started again and again, and comes back when it is told to.
pub fn taken_out(stack: &Stack) {
    let node = "pgslave3";
    if stack.whole("pgmaster", &NODES, Duration::from_secs(120)) != "pgmaster" {
        stack.sh("pgmaster", "craton switchover --to pgmaster");
        stack.whole("pgmaster", &NODES, Duration::from_secs(120));
    }
    let id = stack.container(node);
    let started = || {
        stack.docker(&[
            "inspect",
            "-f",
            "{{.State.StartedAt}} {{.RestartCount}}",
            &id,
        ])
    };
    let before = started();
    stack.sh(node, "gosu postgres repmgr standby unregister");
    let said = "this node was removed from the cluster: PostgreSQL is stopped";
    let log = || {
        let out = containers::run(Command::new("docker").args(["logs", &id]));
        containers::text(&out)
    };
    stack.wait(
        "it says that it was removed",
        Duration::from_secs(60),
        || {
            if log().contains(said) {
                Ok(())
            } else {
                Err("not yet".to_owned())
            }
        },
    );
    let daemons = "pgrep -x postgres || pgrep -f '^craton node '";
    stack.wait("nothing runs", Duration::from_secs(30), || {
        match stack.try_sh(node, daemons) {
            Err(_) => Ok(()),
            Ok(running) => Err(running),
        }
    });
    // Longer than a daemon that ended is waited for.
    let until = std::time::Instant::now() + Duration::from_secs(12);
    while std::time::Instant::now() < until {
        assert!(stack.try_sh(node, daemons).is_err(), "{}", log());
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(started(), before);
    assert_eq!(log().matches(said).count(), 1, "{}", log());
    stack.sh(node, "craton container health");
    assert!(
        stack
            .try_sh(node, "craton container health --ready")
            .is_err()
    );
    let aside = stack.sh(node, "craton container set-aside");
    assert!(aside.contains("before"), "{aside}");
    stack.compose_ok(&["restart", node]);
    stack.whole("pgmaster", &NODES, Duration::from_secs(180));
}
