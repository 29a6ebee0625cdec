//! The Debian package on hosts with systemd, each a container: the section of the guide that says how, step by step; then
//! another installation under a running cluster, removal, and purge.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail at any line"
)]

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::containers::{self, ok, root, tag};
use crate::turn;

const DATABASES: [&str; 3] = ["db1", "db2", "db3"];
/// The hosts, and the last number of each address, as the guide has them.
const HOSTS: [(&str, u8); 5] = [
    ("db1", 1),
    ("db2", 2),
    ("db3", 3),
    ("proxy1", 9),
    ("backup", 10),
];
/// The guide's network, and the one here. Docker's gateway has the last address.
const GUIDE_NET: &str = "10.0.0.";
const NET: &str = "10.213.87.";

/// A Debian with systemd, and PostgreSQL's packages at hand but not installed. Units that would meddle with the machine
/// under the containers are masked.
const IMAGE: &str = r#"
RUN rm -f /usr/sbin/policy-rc.d /etc/dpkg/dpkg.cfg.d/* /etc/apt/apt.conf.d/docker-clean \
 && echo force-unsafe-io >/etc/dpkg/dpkg.cfg.d/fast \
 && apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends systemd systemd-sysv dbus procps \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --download-only postgresql postgresql-common \
 && for unit in systemd-udevd.service systemd-sysctl.service systemd-modules-load.service systemd-remount-fs.service \
      systemd-timesyncd.service systemd-random-seed.service systemd-logind.service systemd-oomd.service systemd-binfmt.service \
      proc-sys-fs-binfmt_misc.automount dev-hugepages.mount dev-mqueue.mount sys-kernel-config.mount sys-kernel-debug.mount \
      sys-kernel-tracing.mount sys-fs-fuse-connections.mount getty.target console-getty.service fstrim.timer \
      apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer; do ln -sf /dev/null /etc/systemd/system/$unit; done
ENV container=docker
STOPSIGNAL SIGRTMIN+3
CMD ["/sbin/init", "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"]
"#;

/// What the other images are built on.
fn base() -> String {
    let own = "craton/base:trixie";
    let there = containers::run(Command::new("docker").args(["image", "inspect", own]));
    if there.status.success() {
        return own.to_owned();
    }
    "debian:trixie-slim".to_owned()
}

struct Hosts {
    name: String,
    guide: String,
    files: tempfile::TempDir,
}

impl Hosts {
    fn new() -> Self {
        let guide = std::fs::read_to_string(root().join("docs/guide/hosts.md")).unwrap();
        let hosts = Self {
            // One name for all runs: the subnet is one as well, and a killed run left it.
            name: "craton-test-package".to_owned(),
            guide,
            files: tempfile::tempdir().unwrap(),
        };
        let image = format!("craton/test-host:{}", tag());
        let dir = hosts.files.path();
        std::fs::write(dir.join("Dockerfile"), format!("FROM {}\n{IMAGE}", base())).unwrap();
        ok(Command::new("docker")
            .args(["build", "--quiet", "--tag", &image])
            .arg(dir));
        hosts.clear();
        let subnet = format!("{NET}0/24");
        let gateway = format!("{NET}254");
        ok(Command::new("docker").args([
            "network",
            "create",
            "--subnet",
            &subnet,
            "--gateway",
            &gateway,
            &hosts.name,
        ]));
        for (host, number) in HOSTS {
            let (name, ip) = (hosts.container(host), format!("{NET}{number}"));
            ok(Command::new("docker").args([
                "run",
                "-d",
                // What systemd needs, and no more: an engine may refuse privileged containers.
                "--cap-add=SYS_ADMIN",
                "--security-opt=seccomp=unconfined",
                "--security-opt=apparmor=unconfined",
                "--cgroupns=host",
                "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw",
                "--tmpfs=/run",
                "--tmpfs=/run/lock",
                "--name",
                &name,
                "--hostname",
                host,
                "--network",
                &hosts.name,
                "--ip",
                &ip,
                "--shm-size",
                "256m",
                &image,
            ]));
        }
        hosts
    }

    fn container(&self, host: &str) -> String {
        format!("{}-{host}", self.name)
    }

    fn clear(&self) {
        for (host, _) in HOSTS {
            let name = self.container(host);
            containers::run(Command::new("docker").args(["rm", "-f", "-v", &name]));
        }
        containers::run(Command::new("docker").args(["network", "rm", &self.name]));
    }

    fn try_sh(&self, host: &str, script: &str) -> Result<String, String> {
        let name = self.container(host);
        let out = containers::run(
            Command::new("timeout")
                .args([
                    "300",
                    "docker",
                    "exec",
                    "-e",
                    "DEBIAN_FRONTEND=noninteractive",
                    &name,
                ])
                .args(["bash", "-c", script]),
        );
        if out.status.success() {
            Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
        } else {
            Err(containers::text(&out))
        }
    }

    fn sh(&self, host: &str, script: &str) -> String {
        self.try_sh(host, script)
            .unwrap_or_else(|e| panic!("{host}: {script}: {e}\n{}", self.logs()))
    }

    /// A command line of the guide's, on a host. It must be there word for word.
    fn as_written(&self, host: &str, line: &str) -> String {
        let there = self
            .guide
            .lines()
            .any(|l| l.strip_prefix("# ") == Some(line));
        assert!(there, "the guide does not say: {line}");
        self.sh(host, &here(line).replace("./craton_", "/root/craton_"))
    }

    /// A settings file of the guide's, by its first line.
    fn settings(&self, title: &str) -> String {
        let begun = format!("```toml\n# {title}\n");
        let (_, rest) = self.guide.split_once(&begun).unwrap();
        here(rest.split_once("```").unwrap().0)
    }

    fn put(&self, host: &str, path: &str, content: &str) {
        let name = self.container(host);
        let mut command = Command::new("docker");
        command.args(["exec", "-i", &name, "bash", "-c", &format!("cat >{path}")]);
        containers::feed(&mut command, content);
    }

    fn logs(&self) -> String {
        let mut all = String::new();
        for (host, _) in HOSTS {
            let script =
                "systemctl --no-pager --failed; journalctl --no-pager -n 40 -u 'craton-*' 2>&1";
            let log = self.try_sh(host, script).unwrap_or_else(|e| e);
            all = format!("{all}\n{host}:\n{log}");
        }
        all
    }

    fn wait<T>(&self, what: &str, limit: Duration, look: impl FnMut() -> Result<T, String>) -> T {
        containers::wait(what, limit, || self.logs(), look)
    }

    fn status(&self, host: &str) -> Result<Value, String> {
        let script = format!(
            "{} && runuser -u postgres -- craton --json status",
            self.environment()
        );
        let text = self.try_sh(host, &script)?;
        serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))
    }

    /// What the host's own agent says, and nobody else.
    fn status_of(&self, host: &str) -> Result<Value, String> {
        let (_, number) = HOSTS.iter().find(|(h, _)| *h == host).unwrap();
        let script = format!(
            "runuser -u postgres -- craton --api {NET}{number}:8008 --certs /etc/craton/secrets --json status"
        );
        let text = self.try_sh(host, &script)?;
        serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))
    }

    /// It is a standby, by its own word.
    fn streams(&self, host: &str) {
        self.wait(&format!("{host} streams"), Duration::from_secs(120), || {
            let status = self.status_of(host)?;
            let members = status["members"].as_array().cloned().unwrap_or_default();
            let own = members.iter().find(|m| m["id"] == host);
            if own.is_some_and(|m| m["streaming"] == true) && status["leader"] != host {
                Ok(())
            } else {
                Err(format!("{own:?}"))
            }
        });
    }

    fn another_leads(&self, than: &str) {
        let asked = DATABASES.into_iter().find(|h| *h != than).unwrap();
        self.wait(
            &format!("another leads than {than}"),
            Duration::from_secs(30),
            || {
                let status = self.status_of(asked)?;
                match status["leader"].as_str() {
                    Some(l) if l != than && status["writable"] == true => Ok(()),
                    _ => Err(status["leader"].to_string()),
                }
            },
        );
    }

    /// The guide's line that names the agents.
    fn environment(&self) -> String {
        let line = self
            .guide
            .lines()
            .find(|l| l.starts_with("# export CRATON_API="));
        here(line.unwrap().strip_prefix("# ").unwrap())
    }

    /// One leads, the two others stream; returns the leader.
    fn whole(&self, asked: &str) -> String {
        self.wait("the cluster is whole", Duration::from_secs(120), || {
            let status = self.status(asked)?;
            let members = status["members"].as_array().cloned().unwrap_or_default();
            let streaming = members.iter().filter(|m| m["streaming"] == true).count();
            match status["leader"].as_str() {
                Some(leader) if status["writable"] == true && streaming == 2 => {
                    Ok(leader.to_owned())
                }
                _ => Err(status.to_string()),
            }
        })
    }

    /// SQL through the proxy, as the guide says.
    fn sql(&self, sql: &str) -> Result<String, String> {
        let script = format!(
            "PGCONNECT_TIMEOUT=30 PGPASSWORD=$(cat /etc/craton/secrets/superuser) psql -h {NET}9 -U postgres -XAtq -v ON_ERROR_STOP=1 -c \"{sql}\""
        );
        self.try_sh("db2", &script)
    }

    /// The pid of a service, and on a database's host that of PostgreSQL as well.
    fn pids(&self, host: &str, service: &str) -> String {
        let script = format!(
            "systemctl show -p MainPID --value {service}; head -1 /var/lib/craton/{host}/data/postmaster.pid 2>/dev/null; true"
        );
        self.sh(host, &script)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.clear();
    }
}

fn here(text: &str) -> String {
    text.replace(GUIDE_NET, NET)
}

/// The package of the program under test.
fn package(into: &std::path::Path) -> PathBuf {
    let made = ok(Command::new(root().join("scripts/deb.sh"))
        .arg(env!("CARGO_BIN_EXE_craton"))
        .arg(into));
    PathBuf::from(made)
}

fn service_of(host: &str) -> &'static str {
    match host {
        "proxy1" => "craton-proxy",
        "backup" => "craton-backup",
        _ => "craton-node",
    }
}

#[test]
#[ignore = "two to three minutes; make test-containers runs it"]
fn debian_package() {
    let Some(_turn) = turn() else { return };
    containers::images();
    let hosts = Hosts::new();
    let package = package(hosts.files.path());
    for (host, _) in HOSTS {
        let to = format!("{}:/root/craton_0.1.0_amd64.deb", hosts.container(host));
        ok(Command::new("docker").arg("cp").arg(&package).arg(to));
        hosts.wait("systemd is up", Duration::from_secs(60), || {
            let state = hosts.try_sh(host, "systemctl is-system-running || true")?;
            if ["running", "degraded"].contains(&state.as_str()) {
                Ok(())
            } else {
                Err(state)
            }
        });
    }
    std::thread::scope(|s| {
        for (host, _) in HOSTS {
            let hosts = &hosts;
            s.spawn(move || installed(hosts, host));
        }
    });
    what_is_there(&hosts);
    databases(&hosts);
    proxy_and_backup(&hosts);
    a_dead_agent(&hosts);
    again_while_it_runs(&hosts);
    removed_and_purged(&hosts);
}

fn installed(hosts: &Hosts, host: &str) {
    let begun = Instant::now();
    if DATABASES.contains(&host) {
        for line in [
            "apt-get install postgresql-common",
            "sed -i 's/^#\\? *create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf",
            "apt-get install postgresql ./craton_0.1.0_amd64.deb",
        ] {
            // Asked whether to go on, a person says yes.
            let there = hosts
                .guide
                .lines()
                .any(|l| l.strip_prefix("# ") == Some(line));
            assert!(there, "the guide does not say: {line}");
            let line = line.replace("./craton_", "/root/craton_");
            hosts.sh(host, &line.replace("apt-get install", "apt-get install -y"));
        }
        // Nothing of PostgreSQL's own was started.
        assert_eq!(
            hosts.sh(host, "pgrep -c -x postgres || true"),
            "0",
            "{host}"
        );
        assert_eq!(hosts.sh(host, "pg_lsclusters -h"), "", "{host}");
    } else {
        let line = "apt-get install --no-install-recommends ./craton_0.1.0_amd64.deb";
        assert!(hosts.guide.contains(line));
        let line = line.replace("./craton_", "/root/craton_");
        hosts.sh(host, &line.replace("apt-get install", "apt-get install -y"));
        assert!(
            hosts
                .try_sh(host, "ls /usr/lib/postgresql/*/bin/postgres")
                .is_err()
        );
    }
    eprintln!("{host}: installed after {:?}", begun.elapsed());
}

/// The files, units that systemd understands, and nothing started.
fn what_is_there(hosts: &Hosts) {
    let version = hosts.sh("db1", "craton --version");
    assert_eq!(
        version.split(' ').nth(1),
        Some(env!("CARGO_PKG_VERSION")),
        "{version}"
    );
    assert_eq!(hosts.sh("db1", "dpkg --verify craton; dpkg --audit"), "");
    let files = hosts.sh("db1", "dpkg -L craton");
    for file in [
        "/usr/bin/craton",
        "/usr/lib/systemd/system/craton-node.service",
        "/usr/share/man/man1/craton.1.gz",
        "/usr/share/doc/craton/copyright",
        "/usr/share/doc/craton/changelog.gz",
        "/usr/share/doc/craton/guide/hosts.md",
        "/usr/share/doc/craton/reference/settings.md",
        "/etc/craton",
    ] {
        assert!(files.lines().any(|l| l == file), "{file}: {files}");
        hosts.sh("db1", &format!("test -e {file}"));
    }
    assert_eq!(
        hosts.sh("db1", "stat -c '%U %a' /etc/craton"),
        "postgres 750"
    );
    assert_eq!(
        hosts.sh("db1", "systemd-analyze verify /usr/lib/systemd/system/craton-*.service 2>&1 | grep -i craton || true"),
        ""
    );
    for name in ["node", "proxy", "backup", "witness"] {
        let state =
            format!("systemctl is-enabled craton-{name}; systemctl is-active craton-{name}; true");
        assert_eq!(hosts.sh("db1", &state), "disabled\ninactive", "{name}");
        // Without its settings it is not started, and that is no failure.
        hosts.sh("db1", &format!("systemctl start craton-{name}"));
        assert_eq!(
            hosts.sh("db1", &format!("systemctl is-active craton-{name} || true")),
            "inactive"
        );
    }
}

fn databases(hosts: &Hosts) {
    hosts.as_written(
        "db1",
        "runuser -u postgres -- craton ca init --cluster prod --secrets /etc/craton/secrets",
    );
    for host in ["db2", "db3"] {
        // The guide's line, with docker in the place of ssh.
        let line =
            format!("# tar -C /etc/craton -c secrets | ssh root@{host} tar -C /etc/craton -xp");
        assert!(hosts.guide.contains(&line));
        let copy = format!(
            "docker exec {} tar -C /etc/craton -c secrets | docker exec -i {} tar -C /etc/craton -xp",
            hosts.container("db1"),
            hosts.container(host)
        );
        ok(Command::new("bash").args(["-o", "pipefail", "-c", &copy]));
    }
    let settings = hosts.settings("/etc/craton/node.toml on db1");
    for (host, number) in &HOSTS[..3] {
        // With its own name and addresses; the list of peers is the same.
        let (own, peers) = settings.split_once("peers = [").unwrap();
        let own = own
            .replace("db1", host)
            .replace(&format!("{NET}1\""), &format!("{NET}{number}\""))
            .replace(&format!("{NET}1:"), &format!("{NET}{number}:"));
        hosts.put(
            host,
            "/etc/craton/node.toml",
            &format!("{own}peers = [{peers}"),
        );
    }
    for host in DATABASES {
        hosts.as_written(host, "systemctl enable --now craton-node");
    }
    hosts.whole("db1");
    let shown = hosts.sh(
        "db1",
        &format!(
            "{} && runuser -u postgres -- craton status",
            hosts.environment()
        ),
    );
    assert!(
        hosts
            .guide
            .contains("# runuser -u postgres -- craton status")
    );
    eprintln!("{shown}");
}

fn proxy_and_backup(hosts: &Hosts) {
    for (host, role, name) in [
        ("proxy1", "proxy", "proxy1"),
        ("backup", "backup", "backup"),
    ] {
        let line = format!("runuser -u postgres -- craton ca token --role {role} --name {name}");
        assert!(hosts.guide.contains(&format!("# {line}")));
        let token = hosts.sh("db1", &format!("{} && {line}", hosts.environment()));
        let token = token.lines().last().unwrap();
        let line =
            "runuser -u postgres -- craton join 10.0.0.1:8008 --token - --into /etc/craton/secrets";
        assert!(hosts.guide.contains(&format!("# {line}")));
        let said = hosts.sh(host, &format!("{} <<<'{token}'", here(line)));
        assert!(said.contains("joined as"), "{said}");
        let settings = hosts.settings(&format!("/etc/craton/{role}.toml"));
        hosts.put(host, &format!("/etc/craton/{role}.toml"), &settings);
        hosts.as_written(host, &format!("systemctl enable --now craton-{role}"));
    }
    hosts.wait(
        "the proxy lets the superuser in",
        Duration::from_secs(60),
        || hosts.sql("CREATE TABLE t (id bigserial primary key)"),
    );
    hosts.sql("INSERT INTO t DEFAULT VALUES").unwrap();
    hosts.wait("the backup receives WAL", Duration::from_secs(60), || {
        receives(hosts)
    });
    assert_eq!(
        hosts.sh("backup", "stat -c '%U %a' /var/lib/craton-backup"),
        "postgres 700"
    );
}

fn receives(hosts: &Hosts) -> Result<(), String> {
    let sql = "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'craton_backup' AND state = 'streaming'";
    match hosts.sql(sql)?.as_str() {
        "1" => Ok(()),
        other => Err(other.to_owned()),
    }
}

/// systemd starts it again, PostgreSQL ran on, and nobody else leads. The lease is long, so that no slow start of a
/// program decides the test.
fn a_dead_agent(hosts: &Hosts) {
    let config = |lease: &str| {
        let environment = hosts.environment();
        hosts.sh(
            "db1",
            &format!("{environment} && runuser -u postgres -- craton config set {lease}"),
        );
    };
    config("ttl_ms=20000");
    let leader = hosts.whole("db1");
    let term = hosts.status(&leader).unwrap()["term"].clone();
    let pids = |hosts: &Hosts| {
        let both = hosts.pids(&leader, "craton-node");
        let (agent, server) = both.split_once('\n').unwrap();
        (agent.to_owned(), server.to_owned())
    };
    let before = pids(hosts);
    hosts.sh(&leader, &format!("kill -9 {}", before.0));
    hosts.wait("another agent runs", Duration::from_secs(10), || {
        let (agent, _) = pids(hosts);
        if agent != "0" && agent != before.0 {
            Ok(())
        } else {
            Err(agent)
        }
    });
    hosts.sql("INSERT INTO t DEFAULT VALUES").unwrap();
    hosts.wait("it leads on", Duration::from_secs(30), || {
        let status = hosts.status_of(&leader)?;
        if status["writable"] == true && status["leader"] == leader {
            Ok(())
        } else {
            Err(status.to_string())
        }
    });
    assert_eq!(hosts.status(&leader).unwrap()["term"], term);
    assert_eq!(pids(hosts).1, before.1, "PostgreSQL is the same");
    config("ttl_ms=2000");
}

/// The package is installed again on all hosts: every process is the one that it was.
fn again_while_it_runs(hosts: &Hosts) {
    let leader = hosts.whole("db1");
    let term = hosts.status(&leader).unwrap()["term"].clone();
    for (host, _) in HOSTS {
        let before = hosts.pids(host, service_of(host));
        assert!(
            !before.starts_with('0'),
            "{host} has no {}",
            service_of(host)
        );
        hosts.sh(
            host,
            "chmod 751 /etc/craton; dpkg -i /root/craton_0.1.0_amd64.deb",
        );
        assert_eq!(hosts.pids(host, service_of(host)), before, "{host}");
        assert_eq!(
            hosts.sh(host, "stat -c %a /etc/craton"),
            "751",
            "{host}: what somebody chose stays"
        );
    }
    hosts.sql("INSERT INTO t DEFAULT VALUES").unwrap();
    assert_eq!(hosts.status(&leader).unwrap()["term"], term);
    // Then somebody restarts them, the leader's last.
    let standbys = DATABASES.iter().filter(|h| **h != leader);
    for host in standbys {
        hosts.sh(host, "systemctl restart craton-node");
        hosts.streams(host);
    }
    assert_eq!(hosts.whole("db1"), leader);
    hosts.sh(&leader, "systemctl restart craton-node");
    hosts.another_leads(&leader);
    hosts.streams(&leader);
    for host in ["proxy1", "backup"] {
        hosts.sh(host, &format!("systemctl restart {}", service_of(host)));
    }
    hosts.wait(
        "the backup receives WAL again",
        Duration::from_secs(60),
        || receives(hosts),
    );
    hosts.wait("rows are counted", Duration::from_secs(60), || {
        let rows = hosts.sql("SELECT count(*) FROM t")?;
        if rows == "3" { Ok(()) } else { Err(rows) }
    });
}

/// On the leader's host: another leads; all that is somebody's stays; installed again it goes on.
fn removed_and_purged(hosts: &Hosts) {
    let leader = hosts.whole("db1");
    let data = format!("/var/lib/craton/{leader}/data");
    let files = format!(
        "sha256sum {data}/PG_VERSION {data}/global/pg_control /etc/craton/node.toml /etc/craton/secrets/superuser"
    );
    hosts.sh(&leader, "dpkg -r craton");
    assert_eq!(hosts.sh(&leader, "pgrep -c -x postgres || true"), "0");
    let control = hosts.sh(
        &leader,
        &format!("/usr/lib/postgresql/*/bin/pg_controldata {data}"),
    );
    assert!(
        control
            .lines()
            .any(|l| l.starts_with("Database cluster state:") && l.ends_with(" shut down")),
        "{control}"
    );
    hosts.another_leads(&leader);
    hosts.sql("INSERT INTO t DEFAULT VALUES").unwrap();
    let before = hosts.sh(&leader, &files);
    let said = hosts.sh(&leader, "dpkg -P craton 2>&1");
    eprintln!("{said}");
    assert_eq!(hosts.sh(&leader, &files), before);
    assert!(hosts.try_sh(&leader, "command -v craton").is_err());
    assert_eq!(
        hosts.sh(
            &leader,
            "find /etc/systemd /usr/lib/systemd -name 'craton-*'"
        ),
        ""
    );
    hosts.sh(&leader, "apt-get install -y /root/craton_0.1.0_amd64.deb");
    hosts.as_written(&leader, "systemctl enable --now craton-node");
    hosts.streams(&leader);
    assert_eq!(hosts.sql("SELECT count(*) FROM t").unwrap(), "4");
}
