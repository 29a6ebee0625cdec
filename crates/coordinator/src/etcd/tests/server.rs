use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use craton_core::MemberId;
use tokio::time::{Instant, sleep};

use crate::api::{
    Answer, Coordinator, LeaseHint, Presence, PresenceMap, Renewal, Snapshot, Txn, TxnOutcome,
};
use crate::clock::Clock;
use crate::conformance::Handle;
use crate::etcd::Etcd;
use crate::place::{Backend, Place};
use craton_core::Term;
use tokio::sync::watch;

pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Real etcd servers, killed when the test ends.
pub(super) struct Servers {
    _dir: tempfile::TempDir,
    servers: Vec<Server>,
}

struct Server {
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    client: String,
    log: PathBuf,
    child: Option<Child>,
}

impl Server {
    fn start(&mut self) {
        let log = std::fs::File::options()
            .append(true)
            .create(true)
            .open(&self.log)
            .unwrap();
        let child = Command::new("etcd")
            .args(&self.arguments)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("etcd is installed: `make setup`, or the package etcd-server");
        self.child = Some(child);
    }

    fn signal(&self, signal: rustix::process::Signal) {
        if let Some(child) = &self.child {
            let pid = rustix::process::Pid::from_child(child);
            rustix::process::kill_process(pid, signal).unwrap();
        }
    }
}

fn ports(n: usize) -> Vec<u16> {
    let held: Vec<_> = (0..n)
        .map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap())
        .collect();
    held.iter()
        .map(|l| l.local_addr().unwrap().port())
        .collect()
}

impl Servers {
    /// Starts `n` of them as one cluster; `extra` goes to each, `https` makes their client addresses TLS.
    pub(super) async fn start(n: usize, extra: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::start_in(dir, n, extra, "http").await
    }

    pub(super) async fn start_in(
        dir: tempfile::TempDir,
        n: usize,
        extra: &[&str],
        scheme: &str,
    ) -> Self {
        let ports = ports(n * 2);
        let peer = |i: usize| format!("http://127.0.0.1:{}", ports[n + i]);
        let cluster: Vec<_> = (0..n).map(|i| format!("s{i}={}", peer(i))).collect();
        let mut servers = Vec::new();
        for (i, port) in ports.iter().take(n).enumerate() {
            let client = format!("{scheme}://127.0.0.1:{port}");
            let pairs = [
                ("--name", format!("s{i}")),
                (
                    "--data-dir",
                    dir.path().join(format!("s{i}")).display().to_string(),
                ),
                ("--listen-client-urls", client.clone()),
                ("--advertise-client-urls", client.clone()),
                ("--listen-peer-urls", peer(i)),
                ("--initial-advertise-peer-urls", peer(i)),
                ("--initial-cluster", cluster.join(",")),
            ];
            let mut arguments: Vec<String> = pairs
                .into_iter()
                .flat_map(|(k, v)| [k.to_owned(), v])
                .collect();
            arguments.extend(extra.iter().map(|s| (*s).to_owned()));
            let mut server = Server {
                arguments,
                environment: vec![(
                    "ETCD_UNSUPPORTED_ARCH".into(),
                    std::env::consts::ARCH.into(),
                )],
                client,
                log: dir.path().join(format!("s{i}.log")),
                child: None,
            };
            server.start();
            servers.push(server);
        }
        let servers = Self { _dir: dir, servers };
        for i in 0..n {
            servers.wait_port(i).await;
        }
        servers
    }

    async fn wait_port(&self, i: usize) {
        let address = self.servers[i]
            .client
            .rsplit('/')
            .next()
            .unwrap()
            .to_owned();
        let due = Instant::now() + PATIENCE;
        while tokio::net::TcpStream::connect(&address).await.is_err() {
            assert!(
                Instant::now() < due,
                "etcd does not listen: {}",
                self.log(i)
            );
            sleep(Duration::from_millis(20)).await;
        }
    }

    fn log(&self, i: usize) -> String {
        std::fs::read_to_string(&self.servers[i].log).unwrap_or_default()
    }

    pub(super) fn place(&self) -> Place {
        Place {
            backend: Backend::Etcd,
            endpoints: self.servers.iter().map(|s| s.client.clone()).collect(),
            ..Place::default()
        }
    }

    pub(super) fn kill(&mut self, i: usize) {
        if let Some(mut child) = self.servers[i].child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub(super) async fn restart(&mut self, i: usize) {
        self.servers[i].start();
        self.wait_port(i).await;
    }

    pub(super) fn pause(&self, i: usize) {
        self.servers[i].signal(rustix::process::Signal::STOP);
    }

    pub(super) fn resume(&self, i: usize) {
        self.servers[i].signal(rustix::process::Signal::CONT);
    }

    /// Which of them leads, by etcd's own word.
    pub(super) async fn leader(&self) -> usize {
        let due = Instant::now() + PATIENCE;
        loop {
            let all = self.place().endpoints.join(",");
            let (out, _) = self.ctl(&["--endpoints", &all, "endpoint", "status"]);
            // endpoint, id, version, size, is leader, …
            let leads = |line: &str| line.split(", ").nth(4) == Some("true");
            let leader = out.lines().find(|l| leads(l)).and_then(|l| {
                let endpoint = l.split(", ").next()?;
                self.servers.iter().position(|s| s.client == endpoint)
            });
            if let Some(leader) = leader {
                return leader;
            }
            assert!(Instant::now() < due, "no leader of etcd: {out}");
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// `etcdctl`, at the first server unless told otherwise.
    pub(super) fn ctl(&self, arguments: &[&str]) -> (String, bool) {
        let out = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .env("ETCDCTL_DIAL_TIMEOUT", "3s")
            .args(if arguments.contains(&"--endpoints") {
                vec![]
            } else {
                vec!["--endpoints", self.servers[0].client.as_str()]
            })
            .args(arguments)
            .output()
            .expect("etcdctl is installed: `make setup`, or the package etcd-client");
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
        (text, out.status.success())
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for server in &mut self.servers {
            if let Some(mut child) = server.child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

/// Presence among the members of a test; nothing else of it works.
struct Room {
    me: MemberId,
    map: watch::Sender<PresenceMap>,
}

impl Coordinator for Room {
    fn read(&self) -> Answer<'_, Arc<Snapshot>> {
        unreachable!("carries presence only")
    }
    fn txn(&self, _: Txn) -> Answer<'_, TxnOutcome> {
        unreachable!("carries presence only")
    }
    fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        unreachable!("carries presence only")
    }
    fn renew(&self, _: Term, _: Duration) -> Answer<'_, Renewal> {
        unreachable!("carries presence only")
    }
    fn release(&self, _: Term) -> Answer<'_, ()> {
        unreachable!("carries presence only")
    }
    fn free(&self, _: Term) -> Answer<'_, bool> {
        unreachable!("carries presence only")
    }
    fn lease_hint(&self) -> LeaseHint {
        LeaseHint::Unknown
    }
    fn announce(&self, value: String) {
        let heard_at = Clock::system().now();
        self.map.send_modify(|map| {
            Arc::make_mut(map).insert(self.me.clone(), Presence { heard_at, value });
        });
    }
    fn presence(&self) -> watch::Receiver<PresenceMap> {
        self.map.subscribe()
    }
}

pub(super) fn room(i: usize) -> Arc<dyn Coordinator> {
    Arc::new(Room {
        me: id(i),
        map: watch::Sender::default(),
    })
}

/// The members of one cluster.
pub(super) struct Members(pub(super) BTreeMap<MemberId, Arc<Etcd>>);

impl Members {
    pub(super) fn handles(&self) -> Vec<Handle> {
        self.0
            .iter()
            .map(|(id, etcd)| (id.clone(), Arc::clone(etcd) as Arc<dyn Coordinator>))
            .collect()
    }

    pub(super) fn nth(&self, n: usize) -> Arc<Etcd> {
        Arc::clone(self.0.values().nth(n).unwrap())
    }
}

pub(super) fn id(i: usize) -> MemberId {
    MemberId::new(format!("m{i}")).unwrap()
}

pub(super) async fn members(place: &Place, n: usize) -> Members {
    let map = watch::Sender::new(PresenceMap::default());
    let start = |i: usize| {
        let room = Room {
            me: id(i),
            map: map.clone(),
        };
        let etcd = Etcd::start(place, "test", id(i), Arc::new(room)).unwrap();
        (id(i), etcd)
    };
    let members = Members((0..n).map(start).collect());
    crate::conformance::settle(&members.handles()).await;
    members
}

pub(super) async fn stop(members: Members) {
    for etcd in members.0.values() {
        etcd.stop().await;
    }
}
