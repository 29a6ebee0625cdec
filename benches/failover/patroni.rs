//! Patroni with etcd and HAProxy on the same hosts, from PyPI and Debian's packages. Settings are Patroni's own
//! defaults, or the fastest that its documentation allows.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use craton_console::Client as Web;
use serde_json::Value;

use crate::hosts::net::{NETWORK, Net, Rules, run};
use crate::hosts::system::{
    CLIENT, Client, Daemons, Entry, MEMBERS, POSTGRES_PORT, PROXY, Pace, State, System, hosts,
    tails,
};

const API_PORT: u16 = 8008;
const WRITE_PORT: u16 = 5000;
const READ_PORT: u16 = 5001;

/// How long an agent may take to answer: one that is frozen must not hold up the others.
const LOOK_TIMEOUT: Duration = Duration::from_millis(1500);

/// Which settings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Variant {
    /// What Patroni, etcd and the HAProxy file of Patroni's repository come with.
    Default,
    /// The least ttl and loop_wait that the documentation allows, synchronous and failsafe mode, etcd with
    /// pre-vote, HAProxy that checks every second.
    Fastest,
}

impl Variant {
    fn dynamic(self) -> &'static str {
        match self {
            Self::Default => "    ttl: 30\n    loop_wait: 10\n    retry_timeout: 10\n",
            Self::Fastest => {
                "    ttl: 20\n    loop_wait: 1\n    retry_timeout: 3\n    synchronous_mode: true\n    failsafe_mode: true\n"
            }
        }
    }

    fn checks(self) -> &'static str {
        match self {
            Self::Default => "inter 3s fall 3 rise 2",
            Self::Fastest => "inter 1s fall 2 rise 1",
        }
    }
}

/// The cluster.
pub struct Patroni {
    client: Client,
    daemons: Daemons,
    name: String,
    variant: Variant,
    /// The virtual environment with Patroni.
    venv: PathBuf,
    postgres_bin: PathBuf,
    password: String,
    net: Net,
}

impl Patroni {
    /// A whole cluster.
    pub fn start(variant: Variant, venv: &Path) -> Self {
        let net = hosts(&[]);
        let client = Client::on(net.host(CLIENT.0));
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH);
        let cluster = Self {
            client,
            daemons: Daemons::default(),
            name: match variant {
                Variant::Default => "patroni default".into(),
                Variant::Fastest => "patroni fastest".into(),
            },
            variant,
            venv: venv.to_owned(),
            postgres_bin: newest_postgres(),
            password: format!("secret{}", seconds.map_or(0, |s| s.as_secs())),
            net,
        };
        for (name, _) in MEMBERS {
            let settings = cluster.settings(name);
            std::fs::write(cluster.file(name, "yml"), settings).expect("a settings file");
            cluster.power_on(name);
        }
        std::fs::write(cluster.file(PROXY.0, "cfg"), cluster.haproxy()).expect("a settings file");
        let config = cluster.file(PROXY.0, "cfg");
        cluster.keep(PROXY.0, "haproxy", &["haproxy", "-db", "-f", path(&config)]);
        cluster.wait_whole(Duration::from_secs(180));
        cluster
    }

    fn file(&self, host: &str, ending: &str) -> PathBuf {
        self.net.dir.join(format!("{host}.{ending}"))
    }

    fn keep(&self, host: &str, daemon: &str, command: &[&str]) {
        let log = self.net.dir.join(format!("{host}-{daemon}.log"));
        self.daemons
            .keep(self.net.host(host), daemon, &log, command);
    }

    fn ip(&self, member: &str) -> &str {
        &self.net.host(member).ip
    }

    fn settings(&self, name: &str) -> String {
        let ip = self.ip(name);
        let etcd: Vec<String> = MEMBERS
            .iter()
            .map(|(m, _)| format!("\"{}:2379\"", self.ip(m)))
            .collect();
        format!(
            "scope: bench\nname: {name}\nrestapi:\n  listen: {ip}:{API_PORT}\n  connect_address: {ip}:{API_PORT}\n\
             etcd3:\n  hosts: [{etcd}]\n\
             bootstrap:\n  dcs:\n{dynamic}    maximum_lag_on_failover: 1048576\n    postgresql:\n\
             \x20     use_pg_rewind: true\n      use_slots: true\n      parameters:\n        max_wal_size: 256MB\n\
             \x20 initdb:\n  - encoding: UTF8\n  - data-checksums\n\
             postgresql:\n  listen: {ip}:{POSTGRES_PORT}\n  connect_address: {ip}:{POSTGRES_PORT}\n\
             \x20 data_dir: {data}\n  bin_dir: {bin}\n  pgpass: {pgpass}\n\
             \x20 pg_hba:\n  - local all all trust\n  - host replication replicator {NETWORK} scram-sha-256\n  - host all all {NETWORK} scram-sha-256\n\
             \x20 authentication:\n    superuser: {{username: postgres, password: {password}}}\n\
             \x20   replication: {{username: replicator, password: {password}}}\n    rewind: {{username: rewind, password: {password}}}\n\
             \x20 parameters:\n    unix_socket_directories: {dir}\n",
            etcd = etcd.join(", "),
            dynamic = self.variant.dynamic(),
            data = self.data(name).display(),
            bin = self.postgres_bin.display(),
            pgpass = self.net.host(name).dir.join("pgpass").display(),
            dir = self.net.host(name).dir.display(),
            password = self.password,
        )
    }

    /// `haproxy.cfg` of Patroni's repository, for our addresses.
    fn haproxy(&self) -> String {
        let mut text = String::from(
            "global\n  maxconn 100\ndefaults\n  mode tcp\n  retries 2\n  timeout client 30m\n  timeout connect 4s\n  timeout server 30m\n  timeout check 5s\n",
        );
        for (name, port, check) in [
            ("write", WRITE_PORT, "/primary"),
            ("read", READ_PORT, "/replica"),
        ] {
            text.push_str(&format!(
                "listen {name}\n  bind {}:{port}\n  option httpchk GET {check}\n  http-check expect status 200\n  default-server {} on-marked-down shutdown-sessions\n",
                self.ip(PROXY.0),
                self.variant.checks(),
            ));
            for (member, _) in MEMBERS {
                let ip = self.ip(member);
                text.push_str(&format!(
                    "  server {member} {ip}:{POSTGRES_PORT} maxconn 100 check port {API_PORT}\n"
                ));
            }
        }
        text
    }

    /// What every agent says that answers in time.
    fn answers(&self) -> Vec<(String, Value)> {
        let addresses: Vec<(String, String)> = MEMBERS
            .iter()
            .map(|(m, _)| ((*m).to_owned(), format!("{}:{API_PORT}", self.ip(m))))
            .collect();
        self.client.run(async move {
            let web = Web::new(None).with_timeout(LOOK_TIMEOUT);
            let asked = addresses.into_iter().map(|(member, address)| {
                let web = web.clone();
                tokio::spawn(async move {
                    let answer = web.get_json::<Value>(&address, "/patroni").await;
                    answer.ok().map(|a| (member, a))
                })
            });
            let mut all = Vec::new();
            for one in asked.collect::<Vec<_>>() {
                all.extend(one.await.ok().flatten());
            }
            all
        })
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// The newest installed PostgreSQL.
fn newest_postgres() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    let newest = versions
        .filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok())
        .max()
        .expect("PostgreSQL is installed");
    PathBuf::from(format!("/usr/lib/postgresql/{newest}/bin"))
}

/// What keeps a cluster from being whole.
fn missing(answers: &[(String, Value)], synchronous: bool) -> Option<String> {
    if answers.len() < MEMBERS.len() {
        return Some(format!("only {} agents answer", answers.len()));
    }
    let primaries: Vec<_> = answers.iter().filter(|(_, a)| is_primary(a)).collect();
    let [(_, primary)] = primaries.as_slice() else {
        return Some(format!("{} primaries", primaries.len()));
    };
    for (member, answer) in answers.iter().filter(|(_, a)| !is_primary(a)) {
        if answer["state"] != "running" || answer["replication_state"] != "streaming" {
            return Some(format!(
                "{member} is {}, {}",
                answer["state"], answer["replication_state"]
            ));
        }
        if answer["timeline"] != primary["timeline"] {
            return Some(format!("{member} is on timeline {}", answer["timeline"]));
        }
    }
    let protected = answers.iter().any(|(_, a)| a["sync_standby"] == true);
    (synchronous && !protected).then(|| "there is no synchronous standby".to_owned())
}

fn is_primary(answer: &Value) -> bool {
    (answer["role"] == "primary" || answer["role"] == "master") && answer["state"] == "running"
}

impl System for Patroni {
    fn name(&self) -> &str {
        &self.name
    }

    fn net(&self) -> &Net {
        &self.net
    }

    fn client(&self) -> &Client {
        &self.client
    }

    fn password(&self) -> &str {
        &self.password
    }

    fn entries(&self) -> Vec<Entry> {
        vec![
            self.by_proxy("proxy", WRITE_PORT, READ_PORT),
            self.multi_host(),
        ]
    }

    fn state(&self) -> Result<State, String> {
        let answers = self.answers();
        let timeline = |a: &Value| a["timeline"].as_u64().unwrap_or(0);
        let leader = answers
            .iter()
            .filter(|(_, a)| is_primary(a))
            .max_by_key(|(_, a)| timeline(a));
        Ok(State {
            leader: leader.map(|(member, _)| member.clone()),
            term: leader.map_or(0, |(_, a)| timeline(a)),
            synchronous: answers
                .iter()
                .find(|(_, a)| a["sync_standby"] == true)
                .map(|(member, _)| member.clone()),
            missing: missing(&answers, self.variant == Variant::Fastest),
        })
    }

    fn power_on(&self, member: &str) {
        let ip = self.ip(member);
        let all: Vec<String> = MEMBERS
            .iter()
            .map(|(m, _)| format!("{m}=http://{}:2380", self.ip(m)))
            .collect();
        let all = all.join(",");
        let dir = self.net.host(member).dir.join("etcd");
        let (clients, peers) = (format!("http://{ip}:2379"), format!("http://{ip}:2380"));
        let mut etcd = vec![
            "etcd",
            "--name",
            member,
            "--data-dir",
            path(&dir),
            "--listen-client-urls",
            &clients,
            "--advertise-client-urls",
            &clients,
            "--listen-peer-urls",
            &peers,
            "--initial-advertise-peer-urls",
            &peers,
            "--initial-cluster",
            &all,
            "--initial-cluster-state",
            "new",
        ];
        if self.variant == Variant::Fastest {
            etcd.push("--pre-vote");
        }
        self.keep(member, "etcd", &etcd);
        let (python, patroni) = (self.venv.join("bin/python"), self.venv.join("bin/patroni"));
        let settings = self.file(member, "yml");
        self.keep(
            member,
            "patroni",
            &[path(&python), path(&patroni), path(&settings)],
        );
    }

    fn manager(&self) -> &'static str {
        "patroni"
    }

    fn managers(&self, member: &str) -> Vec<i32> {
        let host = self.net.host(member);
        let shells = host.processes("keep-running:");
        let mut agents = host.processes("bin/patroni");
        agents.retain(|pid| !shells.contains(pid));
        agents
    }

    fn data(&self, member: &str) -> PathBuf {
        self.net.host(member).dir.join("data")
    }

    fn no_coordinator(&self, _member: &str) -> Rules {
        let both = || {
            vec![
                "tcp dport { 2379, 2380 }".into(),
                "tcp sport { 2379, 2380 }".into(),
            ]
        };
        Rules {
            input: both(),
            output: both(),
        }
    }

    fn switchover(&self) -> Result<(), String> {
        let leader = self.state()?.leader.ok_or("nobody leads")?;
        let (python, ctl) = (
            self.venv.join("bin/python"),
            self.venv.join("bin/patronictl"),
        );
        let settings = self.file("a", "yml");
        let args = [
            path(&ctl),
            "-c",
            path(&settings),
            "switchover",
            "bench",
            "--leader",
            &leader,
            "--force",
        ];
        let out = self
            .net
            .host(CLIENT.0)
            .command(path(&python), &args)
            .output()
            .map_err(|e| e.to_string())?;
        let said = String::from_utf8_lossy(&out.stdout);
        if out.status.success() && said.contains("Successfully") {
            return Ok(());
        }
        Err(format!("{said}{}", String::from_utf8_lossy(&out.stderr)))
    }

    fn pace(&self) -> Pace {
        let (least, most) = match self.variant {
            Variant::Default => (45, 75),
            Variant::Fastest => (32, 60),
        };
        Pace {
            hold_min: Duration::from_secs(least),
            hold_max: Duration::from_secs(most),
            heal_within: Duration::from_secs(120),
        }
    }

    fn logs(&self) -> String {
        tails(&self.net.dir, 40)
    }
}

/// Why Patroni cannot be run here, if it cannot.
pub fn impossible(venv: &Path) -> Option<String> {
    for program in ["etcd", "haproxy"] {
        if run("which", &[program]).is_err() {
            return Some(format!(
                "{program} is not installed: run benches/failover/install.sh"
            ));
        }
    }
    let patroni = venv.join("bin/patroni");
    let reachable = run(
        "setpriv",
        &[
            "--reuid",
            "postgres",
            "--regid",
            "postgres",
            "--clear-groups",
            path(&patroni),
            "--version",
        ],
    );
    reachable.err().map(|e| {
        format!("the user postgres cannot run {}: {e}; run benches/failover/install.sh, or set PATRONI_VENV", patroni.display())
    })
}
