//! Passwords that are given through files are in none of the places in which one would look for them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may fail at any line"
)]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::containers::{self, Stack, root, tag};
use crate::{ALL, NODES, turn};

/// What is looked for. With characters that shells, SQL and URLs have a meaning for.
const SECRETS: [(&str, &str); 3] = [
    (
        "cluster_secret",
        "cluster-Zz7 $HOME 'q' \"d\" %41 0123456789",
    ),
    ("postgres_password", "appl:Xx8,'\"$(id)\\n&=@/?pw"),
    ("replication_password", "repl;Yy9 | \"'`id`` #pw"),
];
/// What is searched for: a part that no quoting changes, unlikely to be there by chance.
fn marks() -> [&'static str; 3] {
    ["cluster-Zz7", "appl:Xx8", "repl;Yy9"]
}

fn found(text: &str) -> Vec<&'static str> {
    marks().into_iter().filter(|m| text.contains(m)).collect()
}

/// A compose file that puts other secrets into the place of the examples.
fn over(dir: &Path) -> PathBuf {
    let mut text = "version: '3.8'\nsecrets:\n".to_owned();
    for (name, secret) in SECRETS {
        let path = dir.join(name);
        std::fs::write(&path, format!("{secret}\n")).unwrap();
        let _ = writeln!(text, "  {name}: {{ file: {} }}", path.display());
    }
    let path = dir.join("secrets.yml");
    std::fs::write(&path, text).unwrap();
    path
}

/// Looks at the command lines of all processes, from outside, for as long as the other things happen.
fn watch(ids: &[String], stop: &AtomicBool) -> String {
    let mut seen = String::new();
    while !stop.load(Ordering::Relaxed) {
        for id in ids {
            let out = containers::run(Command::new("docker").args(["top", id, "-eo", "args"]));
            for line in containers::text(&out)
                .lines()
                .filter(|l| !found(l).is_empty())
            {
                seen.push_str(line);
                seen.push('\n');
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    seen
}

#[test]
#[ignore = "three minutes; make test-containers runs it"]
fn secrets_stay_in_their_files() {
    let Some(_turn) = turn() else { return };
    let dir = tempfile::tempdir().unwrap();
    let files = [
        root().join("docker-compose/docker-compose.yml"),
        over(dir.path()),
    ];
    let stack = Stack::of_files("secrets", &files, &[]);
    stack.up(&ALL);
    stack.wait("all containers are there", Duration::from_secs(30), || {
        ALL.iter().try_for_each(|s| {
            let id = stack.container_of_dead(s);
            if id.is_empty() {
                Err((*s).to_owned())
            } else {
                Ok(())
            }
        })
    });
    let ids: Vec<String> = ALL.iter().map(|s| stack.container(s)).collect();
    let stop = AtomicBool::new(false);
    let shown = std::thread::scope(|scope| {
        let watching = scope.spawn(|| watch(&ids, &stop));
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| life(&stack)));
        stop.store(true, Ordering::Relaxed);
        let shown = watching.join().unwrap();
        done.unwrap();
        shown
    });
    assert_eq!(shown, "", "command lines");
    outside(&stack, &ids);
    for service in ALL {
        inside(&stack, service);
    }
    passwords_in_variables(&stack);
    // Taken down with the file that it was brought up with.
    drop(stack);
}

/// The passwords are used, and everything that could let one slip happens once.
fn life(stack: &Stack) {
    stack.whole("pgmaster", &NODES, Duration::from_secs(240));
    let login = |port: u16, user: &str, database: &str| {
        let script = format!(
            "PGPASSFILE=/tmp/pgpass psql -h pgpool -p {port} -U {user} -d {database} -XAtqw -c 'SELECT current_user'"
        );
        stack.wait(
            &format!("{user} may log in"),
            Duration::from_secs(60),
            || stack.try_sh("pgmaster", &script),
        )
    };
    // The application's own copy, in a file of its own; taken away before anything is looked for.
    let escaped = |s: &str| s.replace('\\', "\\\\").replace(':', "\\:");
    let lines = [
        ("monkey_user", SECRETS[1].1),
        ("replication_user", SECRETS[2].1),
    ]
    .map(|(user, secret)| format!("*:*:*:{user}:{}\n", escaped(secret)))
    .concat();
    let local = std::env::temp_dir().join(format!("craton-pgpass-{}", std::process::id()));
    std::fs::write(&local, lines).unwrap();
    let target = format!("{}:/tmp/pgpass", stack.container("pgmaster"));
    stack.docker(&["cp", &local.display().to_string(), &target]);
    std::fs::remove_file(&local).unwrap();
    stack.sh("pgmaster", "chmod 600 /tmp/pgpass; chown root /tmp/pgpass");
    assert_eq!(login(5432, "monkey_user", "monkey_db"), "monkey_user");
    assert_eq!(
        login(5433, "replication_user", "postgres"),
        "replication_user"
    );
    stack.sh("pgmaster", "rm /tmp/pgpass");

    stack.sh("backup", "barman backup all; barman switch-wal pg_cluster; barman diagnose; barman status pg_cluster");
    stack.sh(
        "pgpool",
        "/usr/local/bin/pgpool/has_write_node.sh; pcp_promote_node -h localhost -U pcp_user -w 2",
    );
    stack.whole("pgslave1", &NODES, Duration::from_secs(120));
    stack.sh(
        "pgslave1",
        "craton config show --origin; craton doctor; craton reinit pgslave1 --yes",
    );
    stack.whole("pgslave2", &NODES, Duration::from_secs(120));
    // A daemon that dies says its last words, too.
    stack.sh("pgpool", "kill -ABRT $(ps -eo pid=,args= | awk '$2 == \"craton\" && $3 == \"proxy\" {print $1}') || true");
    stack.wait("the proxy is back", Duration::from_secs(60), || {
        stack.try_sh("pgpool", "craton container health --ready")
    });
}

/// What Docker shows of containers, images and logs.
fn outside(stack: &Stack, ids: &[String]) {
    for id in ids {
        let shown = stack.docker(&["inspect", id]);
        assert_eq!(found(&shown), [""; 0], "docker inspect {id}");
        let out = containers::run(Command::new("docker").args(["logs", id]));
        assert_eq!(found(&containers::text(&out)), [""; 0], "docker logs {id}");
        let out = containers::run(Command::new("docker").args(["diff", id]));
        assert!(
            !containers::text(&out).contains("core"),
            "docker diff {id}: {}",
            containers::text(&out)
        );
    }
    for image in ["craton/postgis", "craton/proxy", "craton/backup"] {
        let image = format!("{image}:{}", tag());
        let shown = stack.docker(&["history", "--no-trunc", &image])
            + &stack.docker(&["image", "inspect", &image]);
        assert_eq!(found(&shown), [""; 0], "{image}");
    }
}

/// The command lines of the container's processes, and the environments of those that let their own user look (the daemons
/// let nobody). What looks has Docker's variables itself, and descends from no process of the container.
pub fn environments(id: &str) -> String {
    let script = "ours=$(ps -eo pid=,ppid= | awk '{p[$1]=$2} END {for (i in p) {j=i; while (j>1 && p[j]) j=p[j]; if (j==1) print i}}'); \
                  for p in $ours; do cat /proc/$p/environ /proc/$p/cmdline 2>/dev/null; echo; done | tr '\\0' '\\n'";
    let out = containers::run(
        Command::new("docker").args(["exec", "-u", "postgres", id, "bash", "-c", script]),
    );
    let seen = containers::text(&out);
    assert!(seen.contains("LANG="), "nothing was read: {seen}");
    seen
}

/// Environments of all processes, and every file: whatever holds a password can be read by its owner alone.
fn inside(stack: &Stack, service: &str) {
    assert_eq!(
        found(&environments(&stack.container(service))),
        [""; 0],
        "{service}: an environment or a command line"
    );
    let patterns = marks().map(|m| format!("-e '{m}'")).join(" ");
    let script = format!(
        "for d in / /var/lib/postgresql/data /var/backups /run /tmp; do [ -d $d ] && grep -rlF {patterns} $d --exclude-dir=proc --exclude-dir=sys -s; done | sort -u | xargs -r stat -c '%a %U %n'"
    );
    let holding = stack.sh(service, &script);
    eprintln!("{service}: files with passwords:\n{holding}");
    for line in holding.lines() {
        let (mode, rest) = line.split_once(' ').unwrap();
        let mounted = rest.contains(" /run/secrets/");
        let mode = u32::from_str_radix(mode, 8).unwrap();
        assert!(mounted || mode.trailing_zeros() >= 6, "{service}: {line}");
        assert!(
            mounted || rest.contains(" /run/craton/"),
            "{service}: {line}"
        );
    }
    let ours = stack.sh(
        service,
        "find /run/craton ! -type l \\( -perm /077 -o ! -user postgres \\)",
    );
    assert_eq!(ours, "", "{service}: others may read these");
}

/// Variables are Docker's to show. They go no further.
fn passwords_in_variables(stack: &Stack) {
    let (_, secret) = SECRETS[1];
    let variable = format!("POSTGRES_PASSWORD={secret}");
    let cluster = format!("CRATON_CLUSTER_SECRET={}", SECRETS[0].1);
    let image = format!("craton/postgis:{}", tag());
    let id = stack.docker(&[
        "run",
        "-d",
        "-e",
        &variable,
        "-e",
        &cluster,
        "-e",
        "NODE_NAME=plain-1",
        &image,
    ]);
    let looked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let exec = |script: &str| {
            let out =
                containers::run(Command::new("docker").args(["exec", &id, "bash", "-c", script]));
            if out.status.success() {
                Ok(containers::text(&out))
            } else {
                Err(containers::text(&out))
            }
        };
        stack.wait("a node alone serves", Duration::from_secs(120), || {
            exec("wait_local_postgres")
        });
        let inspected = stack.docker(&["inspect", &id]);
        assert!(inspected.contains("appl:Xx8"), "this is Docker's own");
        assert_eq!(found(&environments(&id)), [""; 0], "processes of postgres");
        let out = containers::run(Command::new("docker").args(["logs", &id]));
        assert_eq!(found(&containers::text(&out)), [""; 0]);
        let held = exec("grep -rlF -e appl:Xx8 -e cluster-Zz7 / --exclude-dir=proc --exclude-dir=sys -s | grep -v '^/run/craton/'; true").unwrap();
        assert_eq!(held, "");
    }));
    stack.docker(&["rm", "-f", "-v", &id]);
    looked.unwrap();
}
