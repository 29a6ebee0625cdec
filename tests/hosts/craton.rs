//! Craton on hosts of its own, from the finished binary.

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use craton::access::Access;
use craton::drill::missing_redundancy;
use craton::sessions::value;

use super::net::{NETWORK, Net, Rules, run};
use super::system::{
    CLIENT, Client, Daemons, Entry, MEMBERS, POSTGRES_PORT, PROXY, Pace, State, System, hosts,
    tails,
};

const API_PORT: u16 = 8008;
const PEER_PORT: u16 = 7400;
const WRITE_PORT: u16 = 6432;
const READ_PORT: u16 = 6433;

const SECRETS: [&str; 6] = [
    "superuser",
    "replication",
    "proxy",
    "rewind",
    "peers",
    "api-token",
];

/// What differs from the defaults.
#[derive(Default)]
pub struct Options {
    /// `async`, `quorum`, …; the default if empty.
    pub durability: &'static str,
    /// Members whose cable can delay.
    pub slow: &'static [&'static str],
    /// The name in reports; `craton` if empty.
    pub name: &'static str,
    /// Gives member `a` a wall clock of its own, see [`Craton::set_clock`].
    pub own_clock: bool,
}

/// Where Debian's package libfaketime has its library.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// The cluster.
pub struct Craton {
    // Dropped in this order: who asks, who runs, the ground under both.
    client: Client,
    daemons: Daemons,
    access: Access,
    name: String,
    program: PathBuf,
    options: Options,
    password: String,
    net: Net,
}

impl Craton {
    /// A whole cluster.
    pub fn start(options: Options) -> Self {
        let net = hosts(options.slow);
        let program = install(&net.dir);
        let secrets = make_secrets(&net.dir);
        let password = std::fs::read_to_string(secrets.join("superuser")).expect("the secret");
        let agents: Vec<String> = MEMBERS
            .iter()
            .map(|(name, _)| format!("{}:{API_PORT}", net.host(name).ip))
            .collect();
        let access = Access::open(&agents, Some(&secrets), None, &net.dir)
            .expect("the operator's certificate is there");
        let cluster = Self {
            client: Client::on(net.host(CLIENT.0)),
            daemons: Daemons::default(),
            access,
            name: if options.name.is_empty() {
                "craton"
            } else {
                options.name
            }
            .into(),
            program,
            options,
            password: password.trim().to_owned(),
            net,
        };
        cluster.set_clock("+0");
        for (name, _) in MEMBERS {
            cluster.write_settings(name, &cluster.node_settings(name));
            cluster.power_on(name);
        }
        cluster.write_settings(PROXY.0, &cluster.proxy_settings());
        cluster.start_proxy();
        cluster.wait_whole(Duration::from_secs(90));
        cluster
    }

    /// Starts the proxy.
    pub fn start_proxy(&self) {
        self.keep(PROXY.0, "proxy", &[]);
    }

    /// Moves the wall clock of `a`, by seconds from the true time: `+3600`.
    pub fn set_clock(&self, offset: &str) {
        let file = self.net.dir.join("clock");
        std::fs::write(file, offset).expect("the clock's file");
    }

    /// How far the wall clock of PostgreSQL on `a` is from the true time, in seconds.
    pub fn wall_clock_of_a(&self) -> i64 {
        let endpoint = self.direct("a");
        let theirs = self.client.run(async move {
            let session = endpoint.connect().await.expect("a session on a");
            let asked = value(
                &session,
                "SELECT extract(epoch FROM clock_timestamp())::bigint",
            );
            asked
                .await
                .expect("an answer")
                .parse::<i64>()
                .expect("a number")
        });
        let ours = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("after 1970");
        theirs - i64::try_from(ours.as_secs()).expect("seconds")
    }

    fn keep(&self, host: &str, daemon: &str, before: &[String]) {
        let config = self.net.dir.join(format!("{host}.toml"));
        let log = self.net.dir.join(format!("{host}.log"));
        let mut command: Vec<&str> = before.iter().map(String::as_str).collect();
        command.extend([path(&self.program), daemon, "--config", path(&config)]);
        self.daemons
            .keep(self.net.host(host), daemon, &log, &command);
    }

    fn write_settings(&self, host: &str, text: &str) {
        let file = self.net.dir.join(format!("{host}.toml"));
        std::fs::write(file, text).expect("a settings file");
    }

    fn node_settings(&self, name: &str) -> String {
        let host = self.net.host(name);
        let (ip, dir) = (&host.ip, host.dir.join("member"));
        let mut peers = String::new();
        for (member, _) in MEMBERS {
            let ip = &self.net.host(member).ip;
            let _ = writeln!(
                peers,
                "  {{ member = \"{member}\", address = \"{ip}:{PEER_PORT}\" }},"
            );
        }
        let initial = match self.options.durability {
            "" => String::new(),
            mode => format!("[node.initial]\ndurability = \"{mode}\"\n"),
        };
        format!(
            "[node]\ncluster = \"hosts\"\nmember = \"{name}\"\ndir = \"{}\"\nhost = \"{ip}\"\n\
             listen_addresses = \"{ip}\"\nport = {POSTGRES_PORT}\napi_listen = \"{ip}:{API_PORT}\"\n\
             peer_listen = \"{ip}:{PEER_PORT}\"\nsecrets = \"{}\"\nnetworks = [\"{NETWORK}\"]\n\
             peers = [\n{peers}]\n[node.postgresql]\nmax_wal_size = \"256MB\"\n{initial}",
            dir.display(),
            self.net.dir.join("secrets").display(),
        )
    }

    fn proxy_settings(&self) -> String {
        let ip = &self.net.host(PROXY.0).ip;
        let secrets = self.net.dir.join("secrets");
        format!(
            "[proxy]\nlisten = \"{ip}:{WRITE_PORT}\"\nlisten_read = \"{ip}:{READ_PORT}\"\nhttp = \"{ip}:8080\"\n\
             agents = {:?}\nauth_password_file = \"{}\"\ntls = {{ dir = \"{}\" }}\n",
            self.access.agents,
            secrets.join("proxy").display(),
            secrets.display(),
        )
    }

    /// Runs a command of the binary on the client's host.
    pub fn craton(&self, args: &[&str]) -> Result<String, String> {
        let secrets = self.net.dir.join("secrets");
        let agents = self.access.agents.join(",");
        let common = ["--api", &agents, "--certs", path(&secrets)];
        let all = [&common[..], args].concat();
        let host = self.net.host(CLIENT.0);
        let out = host
            .command(path(&self.program), &all)
            .output()
            .map_err(|e| e.to_string())?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        if out.status.success() {
            return Ok(said);
        }
        Err(format!("{said}{}", String::from_utf8_lossy(&out.stderr)))
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// Puts the program where the user `postgres` can reach it.
fn install(dir: &Path) -> PathBuf {
    let place = dir.join("craton");
    let built = env!("CARGO_BIN_EXE_craton");
    std::fs::copy(built, &place).expect("the program can be copied");
    std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o755)).expect("its mode");
    place
}

fn make_secrets(dir: &Path) -> PathBuf {
    let secrets = dir.join("secrets");
    std::fs::create_dir(&secrets).expect("a directory for secrets");
    for name in SECRETS {
        let secret: [u8; 16] = rand::random();
        let mut text = String::new();
        for byte in secret {
            let _ = write!(text, "{byte:02x}");
        }
        let file = secrets.join(name);
        std::fs::write(&file, text).expect("a secret");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).expect("its mode");
    }
    // The agents issue their own certificates from this.
    let authority = craton_trust::authority::ensure(&secrets, "hosts").expect("an authority");
    for role in [craton_trust::Role::Proxy, craton_trust::Role::Operator] {
        let files = craton_trust::TlsFiles::in_dir(&secrets, role.as_str());
        let identity = craton_trust::Identity::new("hosts", role, "test").expect("a name");
        craton_trust::authority::ensure_certificate(&authority, &files, &identity, &[])
            .expect("a certificate");
    }
    run("chown", &["-R", "postgres:", path(&secrets)]).expect("the secrets get their owner");
    secrets
}

impl System for Craton {
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
        let access = self.access.clone();
        let status = self
            .client
            .run(async move { access.status().await })
            .map_err(|e| format!("{e:#}"))?;
        Ok(State {
            leader: status.leader.as_ref().map(ToString::to_string),
            term: status.term.0,
            synchronous: status.sync.members.first().map(ToString::to_string),
            missing: missing_redundancy(&status).or_else(|| {
                (status.members.len() < MEMBERS.len())
                    .then(|| format!("only {} members are known", status.members.len()))
            }),
        })
    }

    fn power_on(&self, member: &str) {
        let mut before = Vec::new();
        if member == "a" && self.options.own_clock {
            // Only the wall clock: what measures durations goes on as on a real machine.
            before = vec![
                "env".into(),
                format!("LD_PRELOAD={FAKETIME}"),
                format!(
                    "FAKETIME_TIMESTAMP_FILE={}",
                    self.net.dir.join("clock").display()
                ),
                "FAKETIME_NO_CACHE=1".into(),
                "FAKETIME_DONT_FAKE_MONOTONIC=1".into(),
            ];
        }
        self.keep(member, "node", &before);
    }

    fn manager(&self) -> &'static str {
        "node"
    }

    fn managers(&self, member: &str) -> Vec<i32> {
        let host = self.net.host(member);
        let shells = host.processes("keep-running:");
        let mut agents = host.processes("craton node --config");
        agents.retain(|pid| !shells.contains(pid));
        agents
    }

    fn data(&self, member: &str) -> PathBuf {
        self.net.host(member).dir.join("member/data")
    }

    fn no_coordinator(&self, _member: &str) -> Rules {
        let ports = format!("tcp dport {PEER_PORT}");
        let answers = format!("tcp sport {PEER_PORT}");
        Rules {
            input: vec![ports.clone(), answers.clone()],
            output: vec![ports, answers],
        }
    }

    fn switchover(&self) -> Result<(), String> {
        self.craton(&["switchover"]).map(drop)
    }

    fn pace(&self) -> Pace {
        Pace {
            hold_min: Duration::from_secs(4),
            hold_max: Duration::from_secs(15),
            heal_within: Duration::from_secs(90),
        }
    }

    fn logs(&self) -> String {
        tails(&self.net.dir, 60)
    }
}
