//! The images under the compose file that everybody begins with: from nothing, and through the faults that the stack
//! before was tested with.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

#[path = "containers/mod.rs"]
mod containers;
#[path = "containers/monitoring.rs"]
mod monitoring;
#[path = "containers/old_hands.rs"]
mod old_hands;
#[path = "containers/old_interface.rs"]
mod old_interface;
#[path = "containers/package.rs"]
mod package;
#[path = "containers/recovery.rs"]
mod recovery;
#[path = "containers/secrets.rs"]
mod secrets;
#[path = "containers/signals.rs"]
mod signals;
#[path = "containers/slots.rs"]
mod slots;
#[path = "containers/two_hosts.rs"]
mod two_hosts;
#[path = "containers/upgrade.rs"]
mod upgrade;
#[path = "containers/writer.rs"]
mod writer;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use containers::{Stack, impossible};

/// One cluster at a time: the machine is small.
static TURN: Mutex<()> = Mutex::new(());

const NODES: [&str; 4] = ["pgmaster", "pgslave1", "pgslave2", "pgslave3"];
const ALL: [&str; 6] = [
    "pgmaster", "pgslave1", "pgslave2", "pgslave3", "pgpool", "backup",
];

/// The right to run now; none where no engine answers, which is said loudly.
fn turn() -> Option<MutexGuard<'static, ()>> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(why) = impossible() {
        eprintln!("SKIPPED, AND NOTHING IS SHOWN BY THIS: no containers can be run: {why}");
        return None;
    }
    Some(turn)
}

fn start(name: &str) -> Stack {
    let stack = Stack::new(name);
    let begun = Instant::now();
    stack.up(&ALL);
    let leader = stack.whole("pgmaster", &NODES, Duration::from_secs(240));
    if leader != "pgmaster" {
        // It made the cluster; where the machine was too slow for its lease meanwhile, another took over, rightly.
        stack.sh(&leader, "craton switchover --to pgmaster");
        let leader = stack.whole("pgmaster", &NODES, Duration::from_secs(60));
        assert_eq!(leader, "pgmaster");
    }
    stack.sh("pgmaster", "wait_local_postgres");
    stack.wait(
        "the proxy lets the application in",
        Duration::from_secs(60),
        || stack.sql("SELECT 1"),
    );
    eprintln!("from nothing to a whole cluster: {:?}", begun.elapsed());
    stack
}

/// Rows in the test's table, through the proxy.
fn rows(stack: &Stack) -> usize {
    let count = stack.wait("rows are counted", Duration::from_secs(60), || {
        stack.sql("SELECT count(*) FROM t")
    });
    count.parse().unwrap()
}

fn insert(stack: &Stack) {
    stack.wait("a row is written", Duration::from_secs(60), || {
        stack.sql("INSERT INTO t DEFAULT VALUES")
    });
}

/// What the old project's tests asked of a cluster that was just started, and what they did not ask.
#[test]
fn from_nothing() {
    let Some(_turn) = turn() else { return };
    let stack = start("first");
    // Who leads stays the same on a slow machine, too: how long an outage is, other tests say.
    stack.sh(
        "pgmaster",
        "craton config set ttl_ms=20000 heartbeat_ms=500 crash_grace_ms=20000 stall_after_ms=30000",
    );
    replication_within_a_second(&stack);
    what_is_in_the_images(&stack);
    settings_and_names(&stack);
    extensions(&stack);
    old_commands_of_a_node(&stack);
    old_hands::typed_as_before(&stack);
    old_hands::wrong_variables();
    old_commands_of_the_balancer(&stack);
    backups(&stack);
    what_alerts_ask_for(&stack);
    nothing_secret_is_shown(&stack);
    processes(&stack);
    restart_of_the_leader(&stack);
}

/// Nothing of the build is left in an image: caches, sources, keys; and it says what it is.
fn what_is_in_the_images(stack: &Stack) {
    for service in ["pgmaster", "pgpool", "backup"] {
        let left = stack.sh(
            service,
            "ls -d /src /out /var/cache/apt/archives/*.deb /var/lib/apt/lists/* /var/log/apt /etc/ssh/ssh_host_* /root/.cargo 2>/dev/null; find / -xdev -not -path '/proc/*' \\( -name '*.rs' -o -name Cargo.lock -o -name .git -o -name core \\) -print; true",
        );
        assert_eq!(left, "", "{service}");
        let id = stack.container(service);
        let image = stack.docker(&["inspect", "--format", "{{.Image}}", &id]);
        let shown = stack.docker(&["image", "inspect", &image]);
        for name in ["title", "description", "licenses", "source", "revision"] {
            let label = format!("\"org.opencontainers.image.{name}\": \"");
            assert!(shown.contains(&label), "{service}: {name}");
        }
        assert!(shown.contains("\"StopSignal\": \"SIGTERM\"") && shown.contains("\"Healthcheck\""));
        let history = stack.docker(&[
            "history",
            "--no-trunc",
            "--format",
            "{{.CreatedBy}}",
            &image,
        ]);
        for word in ["PASSWORD", "SECRET", "/home/", "/root/"] {
            assert!(!history.contains(word), "{service}: {word}: {history}");
        }
    }
}

fn on_standby(stack: &Stack, what: &str, sql: &str, expected: &str) {
    stack.wait(what, Duration::from_secs(30), || {
        match stack.sql_on("pgslave1", "monkey_db", sql)? {
            found if found == expected => Ok(()),
            other => Err(other),
        }
    });
}

/// A row is on a standby within a second: the best of a few, for one of them may meet a busy disk.
fn replication_within_a_second(stack: &Stack) {
    stack
        .sql("CREATE TABLE t (id bigserial primary key, at timestamptz NOT NULL DEFAULT clock_timestamp())")
        .unwrap();
    on_standby(stack, "the table is there", "SELECT count(*) FROM t", "0");
    let mut all = Vec::new();
    for round in 0..5 {
        let took = seconds_to_a_standby(stack, round);
        assert!(took >= 0.0, "{took} s");
        if took < 1.0 {
            return;
        }
        all.push(took);
    }
    panic!("{all:?} s");
}

/// How long the next row takes. Both clocks are the same one, and PostgreSQL looks at it: how long commands in containers
/// take on a busy machine is not in this.
fn seconds_to_a_standby(stack: &Stack, round: usize) -> f64 {
    let newest = stack.sql("SELECT coalesce(max(id), 0) FROM t").unwrap();
    let watch = format!(
        "DO $$ BEGIN LOOP PERFORM FROM t WHERE id > {newest}; EXIT WHEN FOUND; PERFORM pg_sleep(0.01); END LOOP; \
         PERFORM set_config('watch.seen', clock_timestamp()::text, false); END $$"
    );
    let took = "SELECT extract(epoch FROM current_setting('watch.seen')::timestamptz - at) FROM t ORDER BY id DESC LIMIT 1";
    // Names of its own: the one before may still be there.
    let name = format!("SET application_name = 'watch{round}'");
    let file = format!("/tmp/took{round}");
    let id = stack.container("pgslave1");
    let psql = [
        "exec",
        "-d",
        &id,
        "gosu",
        "postgres",
        "psql",
        "-d",
        "monkey_db",
        "-XAtq",
        "-o",
        &file,
    ];
    let commands = ["-c", &name, "-c", &watch, "-c", took];
    stack.docker(&[&psql[..], &commands[..]].concat());
    let watching =
        format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'watch{round}'");
    on_standby(stack, "somebody watches the table", &watching, "1");
    stack.sql("INSERT INTO t DEFAULT VALUES").unwrap();
    stack.wait("the row is on a standby", Duration::from_secs(30), || {
        let text = stack.try_sh("pgslave1", &format!("cat {file}"))?;
        text.parse().map_err(|_| text)
    })
}

fn settings_and_names(stack: &Stack) {
    let show = |node: &str, name: &str| {
        stack
            .sql_on(node, "postgres", &format!("SHOW {name}"))
            .unwrap()
    };
    for node in NODES {
        assert_eq!(show(node, "max_connections"), "200");
        assert_eq!(show(node, "listen_addresses"), "*");
    }
    let origin = stack.sh("pgslave3", "craton config show --origin");
    let line = |name: &str| {
        origin
            .lines()
            .find(|l| l.starts_with(name))
            .unwrap_or_default()
            .to_owned()
    };
    assert!(
        line("postgresql.max_connections").contains("the variable CONFIGS"),
        "{origin}"
    );
    for (name, variable) in [
        ("node.cluster ", "CLUSTER_NAME"),
        ("node.host ", "CLUSTER_NODE_NETWORK_NAME"),
        ("node.join ", "PARTNER_NODES"),
        ("node.priority ", "NODE_PRIORITY"),
        ("node.postgresql.shared_buffers ", "CONFIGS"),
    ] {
        let end = format!("the variable {variable}");
        assert!(line(name).trim_end().ends_with(&end), "{name}: {origin}");
    }
    assert!(line("node.port ").ends_with("the image"), "{origin}");
    for (service, name, variable) in [
        ("pgpool", "proxy.pool_size ", "CONFIGS"),
        ("backup", "backup.agents ", "REPLICATION_HOST"),
    ] {
        let origin = stack.sh(service, "craton config show --origin");
        let end = format!("the variable {variable}");
        let found = origin.lines().find(|l| l.starts_with(name));
        assert!(
            found.is_some_and(|l| l.trim_end().ends_with(&end)),
            "{origin}"
        );
    }
    for (node, id) in NODES.iter().zip(["1", "2", "3", "4"]) {
        assert_eq!(stack.sh(node, "get_node_id"), id);
    }
    let databases = stack.sql_on(
        "pgmaster",
        "postgres",
        "SELECT string_agg(datname, ' ' ORDER BY datname) FROM pg_database WHERE NOT datistemplate",
    );
    assert_eq!(databases.unwrap(), "monkey_db postgres replication_db");
    let roles = "SELECT string_agg(rolname || rolsuper || rolreplication, ' ' ORDER BY rolname) FROM pg_roles WHERE rolname IN ('monkey_user', 'replication_user')";
    assert_eq!(
        stack.sql_on("pgslave2", "postgres", roles).unwrap(),
        "monkey_usertruefalse replication_userfalsetrue"
    );
}

fn extensions(stack: &Stack) {
    for name in ["postgis", "pg_repack", "pglogical", "pgrouting"] {
        let there = stack.sql(&format!(
            "SELECT count(*) FROM pg_available_extensions WHERE name = '{name}'"
        ));
        assert_eq!(there.unwrap(), "1", "{name}");
    }
    stack.sql("CREATE EXTENSION postgis").unwrap();
    let inside =
        "SELECT ST_Contains('POLYGON((0 0,2 0,2 2,0 2,0 0))'::geometry, 'POINT(1 1)'::geometry)";
    assert_eq!(stack.sql(inside).unwrap(), "t");
}

fn old_commands_of_a_node(stack: &Stack) {
    for node in NODES {
        stack.sh(node, "wait_local_postgres");
        stack.sh(
            node,
            "/usr/local/bin/cluster/healthcheck/is_major_master.sh",
        );
    }
    // They ask every node at this moment, and a node may be slow to answer.
    let shows = |node: &str, command: &str, good: &dyn Fn(&str) -> bool| {
        stack.wait(command, Duration::from_secs(30), || {
            let shown = stack.try_sh(node, &format!("gosu postgres {command}"))?;
            if good(&shown) { Ok(()) } else { Err(shown) }
        });
    };
    let row = |shown: &str, name: &str| {
        let found = shown.lines().find(|l| l.contains(name));
        found.unwrap_or_default().to_owned()
    };
    shows("pgslave2", "repmgr cluster show", &|shown| {
        row(shown, "node1").contains("| primary | * running |")
            && row(shown, "node4").starts_with(" 4  | node4 | standby |   running | node1")
    });
    shows("pgslave1", "repmgr cluster crosscheck", &|shown| {
        let whole = shown.lines().filter(|l| l.matches('*').count() == 4);
        whole.count() == 4 && !shown.contains('?')
    });
    assert_eq!(stack.sh("pgmaster", "gosu postgres id -un"), "postgres");
}

fn old_commands_of_the_balancer(stack: &Stack) {
    let nodes = stack.wait("all nodes are up", Duration::from_secs(30), || {
        let nodes = stack.sql("show pool_nodes")?;
        let lines: Vec<&str> = nodes.lines().collect();
        let good = lines.len() == 4
            && lines[0].starts_with("0|pgmaster|5432|up|0.250000|primary|")
            && lines[3].starts_with("3|pgslave3|5432|up|0.250000|standby|");
        if good { Ok(nodes) } else { Err(nodes) }
    });
    // What prepares everything gets the same rows.
    let prepared = "echo 'show pool_nodes \\bind \\g' | PGPASSWORD=monkey_pass psql -h localhost -U monkey_user -d monkey_db -XAtq -v ON_ERROR_STOP=1";
    // But for the last column: WAL may be on its way.
    let still = |rows: &str| {
        let row = |l: &str| l.rsplit_once('|').map(|(row, _)| row.to_owned());
        rows.lines().map(row).collect::<Vec<_>>()
    };
    assert_eq!(still(&stack.sh("pgpool", prepared)), still(&nodes));
    // As the old README has it.
    stack.sh("pgpool", "PGPASSWORD=replication_example psql -U replication_user -h localhost template1 -c 'show pool_nodes'");
    stack.sh("pgpool", "/usr/local/bin/pgpool/has_write_node.sh");
    stack.sh("pgpool", "/usr/local/bin/pgpool/has_enough_backends.sh 4");
    assert!(
        stack
            .try_sh("pgpool", "/usr/local/bin/pgpool/has_enough_backends.sh 5")
            .is_err()
    );
    let info = stack.sh("pgpool", "pcp_node_info -h localhost -U pcp_user -w 1");
    assert_eq!(info, "pgslave1 5432 2 0.250000 up standby");
    stack.sh("pgpool", "pcp_attach_node -h localhost -U pcp_user -w 1");
}

fn backups(stack: &Stack) {
    stack.sh("backup", "/usr/local/bin/barman_docker/wal-receiver.sh");
    stack.wait("barman check passes", Duration::from_secs(60), || {
        stack.try_sh("backup", "barman check pg_cluster")
    });
    stack.sh("backup", "barman switch-xlog --force --archive all");
    // The first one may be on its way by itself.
    stack.wait("a backup is taken", Duration::from_secs(120), || {
        stack.try_sh("backup", "barman backup all")
    });
    let list = stack.sh("backup", "barman list-backup all");
    assert!(
        list.starts_with("pg_cluster 20") && list.contains(" - Size: "),
        "{list}"
    );
    let show = stack.sh("backup", "barman show-backup pg_cluster latest");
    assert!(show.contains("Status                 : DONE"), "{show}");
    let metrics = scraped(stack, "backup");
    for name in [
        "barman_check_is_ok 1",
        "barman_backups_amount ",
        "craton_backup_streaming 1",
        "barman_disk_free_bytes ",
    ] {
        assert!(metrics.contains(name), "{name}: {metrics}");
    }
}

fn scraped(stack: &Stack, service: &str) -> String {
    stack.sh(
        service,
        "exec 3<>/dev/tcp/localhost/8080; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3",
    )
}

/// Every metric of the alert rules is served by one of the targets that are scraped for them.
fn what_alerts_ask_for(stack: &Stack) {
    let monitoring = containers::root().join("docker-compose/monitoring");
    let read = |name: &str| std::fs::read_to_string(monitoring.join(name)).unwrap();
    let targets = read("prometheus.yml");
    let mut served = String::new();
    for service in ALL {
        assert!(
            targets.contains(&format!("\"{service}:8080\"")),
            "{targets}"
        );
        served.push_str(&scraped(stack, service));
    }
    let rules = read("alerts.yml");
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    let asked = rules
        .split(word)
        .filter(|w| w.starts_with("craton_") || w.starts_with("barman_"));
    for metric in asked {
        let line = format!("\n{metric}");
        let there = served
            .match_indices(&line)
            .any(|(at, _)| served[at + line.len()..].starts_with([' ', '{']));
        assert!(there, "{metric} is served by nobody");
    }
}

/// Passwords are in no process title, environment of a daemon, log, or file that others read.
fn nothing_secret_is_shown(stack: &Stack) {
    let secrets = [
        "monkey_pass",
        "replication_example",
        "an example: put the output",
    ];
    for service in ALL {
        let seen = stack.sh(
            service,
            "find / -xdev -type f -perm /044 -newer /usr/local/bin/craton -size -64k -not -path '/proc/*' -not -path '/run/secrets/*' -exec cat {} + 2>/dev/null | tr -d '\\0'",
        );
        let seen = seen + &secrets::environments(&stack.container(service));
        for secret in secrets {
            assert!(!seen.contains(secret), "{service} shows \"{secret}\"");
        }
    }
    let logs = stack.logs();
    for secret in secrets {
        assert!(!logs.contains(secret), "\"{secret}\" is in a log");
    }
}

/// Nobody runs as root, and the first process takes the dead away.
fn processes(stack: &Stack) {
    for service in ALL {
        // A process without a parent came in from outside, as the health check does, which Docker runs as root.
        let roots = stack.sh(service, "for p in /proc/[0-9]*; do s=$(cat $p/status 2>/dev/null); [[ $s =~ ^Name:.craton && $s =~ Uid:.[0-9]+.0[^0-9] && ( $p = /proc/1 || ! $s =~ PPid:.0[^0-9] ) ]] && echo \"$p $s\"; done; true");
        assert_eq!(roots, "", "{service}");
        stack.sh(service, "(sleep 0.1 &) ; true");
        stack.wait("no zombie is left", Duration::from_secs(60), || match stack
            .sh(
                service,
                "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l",
            )
            .as_str()
        {
            "0" => Ok(()),
            other => Err(other.to_owned()),
        });
    }
}

/// `docker-compose restart pgmaster`: another leads meanwhile, nobody is a second primary, nothing is lost.
fn restart_of_the_leader(stack: &Stack) {
    let before = rows(stack);
    let out = containers::run(&mut stack.compose(&["restart", "pgmaster"]));
    assert!(out.status.success(), "{}", containers::text(&out));
    insert(stack);
    stack.whole("pgslave1", &NODES, Duration::from_secs(90));
    assert_eq!(rows(stack), before + 1);
    stack.sh(
        "pgmaster",
        "/usr/local/bin/cluster/healthcheck/is_major_master.sh",
    );
    // What restarts may still be on its way.
    stack.wait("all nodes answer", Duration::from_secs(60), || {
        let look = |n| stack.sql_on(n, "postgres", "SELECT pg_is_in_recovery()");
        let seen = NODES.map(look).into_iter().collect::<Result<Vec<_>, _>>()?;
        let primaries = seen.iter().filter(|s| *s == "f").count();
        assert!(primaries <= 1, "{seen:?}");
        if primaries == 1 {
            Ok(())
        } else {
            Err(format!("{seen:?}"))
        }
    });
}

/// What the old project's tests did to a cluster, and more. Slow: `make test-containers`.
#[test]
#[ignore = "about ten minutes; make test-containers runs it"]
fn faults() {
    let Some(_turn) = turn() else { return };
    let stack = start("faults");
    stack
        .sql("CREATE TABLE t (id bigserial primary key)")
        .unwrap();
    lost_primary(&stack);
    lost_standby(&stack);
    isolated_primary(&stack);
    isolated_standby(&stack);
    paused_primary(&stack);
}

/// What becomes of processes, volumes, and the number of nodes.
#[test]
#[ignore = "about five minutes; make test-containers runs it"]
fn lives() {
    let Some(_turn) = turn() else { return };
    let stack = start("lives");
    stack
        .sql("CREATE TABLE t (id bigserial primary key)")
        .unwrap();
    killed_agent(&stack);
    volume_lost(&stack);
    down_and_up(&stack);
    scale_out(&stack);
}

/// Two nodes and a backup daemon that is a witness as well survive the loss of the leader.
#[test]
#[ignore = "two minutes; make test-containers runs it"]
fn two_nodes_and_a_witness() {
    let Some(_turn) = turn() else { return };
    let path = std::env::temp_dir().join(format!("craton-witness-{}.yml", std::process::id()));
    let over = "version: '3.8'\nservices:\n  backup:\n    environment:\n      CRATON_WITNESS: w\n";
    std::fs::write(&path, over).unwrap();
    let stack = Stack::new("two").with_file(path.clone());
    stack.up(&["pgmaster", "pgslave1", "pgpool", "backup"]);
    let two = ["pgmaster", "pgslave1"];
    stack.whole("pgmaster", &two, Duration::from_secs(120));
    stack.wait("three have a say", Duration::from_secs(60), || {
        let list = stack.try_sh("pgslave1", "craton --json member list")?;
        let list: serde_json::Value = serde_json::from_str(&list).map_err(|e| e.to_string())?;
        let voters = list["members"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|m| m["voter"] == true);
        if voters.count() == 3 {
            Ok(())
        } else {
            Err(list.to_string())
        }
    });
    stack.wait("the table is made", Duration::from_secs(60), || {
        stack.sql("CREATE TABLE t (id bigserial primary key)")
    });
    insert(&stack);
    let id = stack.container("pgmaster");
    stack.docker(&["kill", &id]);
    assert_eq!(new_leader(&stack, "pgmaster"), "pgslave1");
    insert(&stack);
    assert_eq!(rows(&stack), 2);
    stack.docker(&["start", &id]);
    stack.whole("pgslave1", &two, Duration::from_secs(120));
    // It is taken down with the files that it was brought up with.
    drop(stack);
    std::fs::remove_file(path).unwrap();
}

/// A service that is not this one.
fn another(than: &str) -> &'static str {
    NODES.iter().find(|n| **n != than).unwrap()
}

fn new_leader(stack: &Stack, old: &str) -> String {
    let asked = another(old);
    stack.wait(
        &format!("another leads than {old}"),
        Duration::from_secs(30),
        || {
            stack
                .leader(asked)
                .filter(|l| l != old)
                .ok_or_else(|| "nobody else leads yet".to_owned())
        },
    )
}

fn lost_primary(stack: &Stack) {
    insert(stack);
    let before = rows(stack);
    let old = stack.leader("pgslave1").unwrap();
    stack.docker(&["kill", &stack.container(&old)]);
    let new = new_leader(stack, &old);
    assert_eq!(rows(stack), before);
    insert(stack);
    let nodes = stack.sql("show pool_nodes").unwrap();
    let row = |host: &str| {
        nodes
            .lines()
            .find(|l| l.contains(host))
            .unwrap_or_default()
            .to_owned()
    };
    assert!(row(&old).contains("|down|"), "{nodes}");
    assert!(
        row(&new).contains("|up|") && row(&new).contains("|primary|"),
        "{nodes}"
    );
    assert_eq!(nodes.matches("|primary|").count(), 1, "{nodes}");
    stack.docker(&["start", &stack.container_of_dead(&old)]);
    stack.whole(another(&old), &NODES, Duration::from_secs(120));
    assert_eq!(rows(stack), before + 1);
}

fn lost_standby(stack: &Stack) {
    let leader = stack.leader("pgslave1").unwrap();
    let lost = another(&leader);
    stack.docker(&["kill", &stack.container(lost)]);
    insert(stack);
    stack.wait(
        "the proxy drops the standby",
        Duration::from_secs(30),
        || {
            let nodes = stack.sql("show pool_nodes")?;
            if nodes
                .lines()
                .any(|l| l.contains(lost) && l.contains("|down|"))
            {
                Ok(())
            } else {
                Err(nodes)
            }
        },
    );
    stack.docker(&["start", &stack.container_of_dead(lost)]);
    stack.whole(&leader, &NODES, Duration::from_secs(120));
    assert_eq!(stack.leader(&leader).unwrap(), leader);
}

fn isolated_primary(stack: &Stack) {
    let before = rows(stack);
    let old = stack.leader("pgslave1").unwrap();
    let id = stack.container(&old);
    stack.docker(&["network", "disconnect", &stack.network(), &id]);
    let new = new_leader(stack, &old);
    insert(stack);
    // It knows: no second server takes writes, and the probe says so.
    let own = stack.sql_on(&old, "postgres", "SELECT pg_is_in_recovery()");
    assert_ne!(own.as_deref(), Ok("f"), "two primaries");
    let probe = "/usr/local/bin/cluster/healthcheck/is_major_master.sh";
    let said = stack.try_sh(&old, probe).unwrap_err();
    assert!(said.contains("False primary"), "{said}");
    // It says so itself, though nobody finds it by its name now.
    let said = stack.sh(&old, "craton explain");
    assert!(said.starts_with(&old), "{said}");
    stack.docker(&["network", "connect", "--alias", &old, &stack.network(), &id]);
    stack.whole(&new, &NODES, Duration::from_secs(120));
    let said = stack.sh(&old, probe);
    assert!(said.contains("not the primary"), "{said}");
    assert_eq!(rows(stack), before + 1);
    assert_eq!(
        stack
            .sql_on(&old, "postgres", "SELECT pg_is_in_recovery()")
            .unwrap(),
        "t"
    );
}

fn isolated_standby(stack: &Stack) {
    let leader = stack.leader("pgslave1").unwrap();
    let cut = another(&leader);
    let id = stack.container(cut);
    stack.docker(&["network", "disconnect", &stack.network(), &id]);
    let until = Instant::now() + Duration::from_secs(15);
    while Instant::now() < until {
        // Far longer than a lease: it never takes itself for the primary.
        let own = stack.sql_on(cut, "postgres", "SELECT pg_is_in_recovery()");
        assert_ne!(
            own.as_deref(),
            Ok("f"),
            "an isolated standby promoted itself"
        );
        insert(stack);
    }
    assert_eq!(stack.leader(&leader).unwrap(), leader);
    stack.docker(&["network", "connect", "--alias", cut, &stack.network(), &id]);
    stack.whole(&leader, &NODES, Duration::from_secs(120));
}

fn paused_primary(stack: &Stack) {
    let before = rows(stack);
    let old = stack.leader("pgslave1").unwrap();
    let id = stack.container(&old);
    stack.docker(&["pause", &id]);
    new_leader(stack, &old);
    insert(stack);
    stack.docker(&["unpause", &id]);
    stack.whole(another(&old), &NODES, Duration::from_secs(120));
    assert_eq!(rows(stack), before + 1);
    assert_eq!(
        stack
            .sql_on(&old, "postgres", "SELECT pg_is_in_recovery()")
            .unwrap(),
        "t"
    );
}

/// An agent that is killed is back inside its lease: no failover. The lease is long, so that no slow start of a program
/// decides the test.
fn killed_agent(stack: &Stack) {
    stack.sh("pgslave1", "craton config set ttl_ms=20000");
    let leader = stack.leader("pgslave1").unwrap();
    let term = stack.status(&leader).unwrap()["term"].clone();
    let agent = "ps -eo pid=,args= | awk '$2 == \"craton\" && $3 == \"node\" {print $1}'";
    let pid = stack.sh(&leader, agent);
    stack.sh(&leader, &format!("kill -9 {pid}"));
    stack.wait("another agent runs", Duration::from_secs(20), || {
        let now = stack.try_sh(&leader, agent)?;
        if !now.is_empty() && now != pid {
            Ok(())
        } else {
            Err(now)
        }
    });
    insert(stack);
    stack.whole(&leader, &NODES, Duration::from_secs(60));
    assert_eq!(stack.status(&leader).unwrap()["term"], term);
    stack.sh("pgslave1", "craton config set ttl_ms=2000");
}

/// A node that lost its disk comes back under its name, also the one that made the cluster.
fn volume_lost(stack: &Stack) {
    let before = rows(stack);
    let system = "SELECT system_identifier FROM pg_control_system()";
    let identifier = stack.sql_on("pgslave1", "postgres", system).unwrap();
    let out = containers::run(&mut stack.compose(&["rm", "-f", "-s", "-v", "pgmaster"]));
    assert!(out.status.success(), "{}", containers::text(&out));
    stack.docker(&["volume", "rm", &stack.volume("pgmaster")]);
    stack.up(&["pgmaster"]);
    stack.whole("pgslave1", &NODES, Duration::from_secs(180));
    assert_eq!(
        stack.sql_on("pgmaster", "postgres", system).unwrap(),
        identifier
    );
    assert_eq!(rows(stack), before);
}

fn down_and_up(stack: &Stack) {
    let before = rows(stack);
    let out = containers::run(&mut stack.compose(&["down"]));
    assert!(out.status.success(), "{}", containers::text(&out));
    stack.up(&ALL);
    stack.whole("pgslave1", &NODES, Duration::from_secs(180));
    assert_eq!(rows(stack), before);
    insert(stack);
    stack.wait("WAL comes in again", Duration::from_secs(60), || {
        stack.try_sh("backup", "barman check all")
    });
}

/// A fifth node, which no other one's environment names.
fn scale_out(stack: &Stack) {
    let name = format!("{}-pgslave4", stack.network());
    let id = stack.docker(&[
        "run",
        "-d",
        "--name",
        &name,
        "--hostname",
        "pgslave4",
        "--network",
        &stack.network(),
        "--network-alias",
        "pgslave4",
        "-e",
        "CLUSTER_NODE_NETWORK_NAME=pgslave4",
        "-e",
        "NODE_NAME=node-5",
        "-e",
        "REPLICATION_PRIMARY_HOST=pgslave1",
        "-e",
        "CRATON_CLUSTER_SECRET=an example: put the output of \"openssl rand -base64 32\" here",
        &format!("craton/postgis:{}", containers::tag()),
    ]);
    let five = [&NODES[..], &["pgslave4"]].concat();
    let whole = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        stack.whole("pgslave1", &five, Duration::from_secs(180));
        stack.wait("the proxy knows it", Duration::from_secs(30), || {
            let nodes = stack.sql("show pool_nodes")?;
            let there = nodes.lines().any(|l| l.starts_with("4|pgslave4|5432|up|"));
            if there { Ok(()) } else { Err(nodes) }
        });
    }));
    stack.docker(&["rm", "-f", "-v", &id]);
    whole.unwrap();
}
