//! Real etcd servers on loopback, started by the test and killed when it ends.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

struct Server {
    arguments: Vec<String>,
    url: String,
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
            .env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("etcd is installed: `make setup-tests`, or the package etcd-server");
        self.child = Some(child);
    }
}

/// One etcd.
pub struct Etcd {
    _dir: tempfile::TempDir,
    servers: Vec<Server>,
}

impl Etcd {
    /// Starts one of `n` servers, and waits until it has a leader.
    pub fn start(n: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let held: Vec<_> = (0..n * 2)
            .map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let url = |i: usize| {
            let port = held[i].local_addr().unwrap().port();
            format!("http://127.0.0.1:{port}")
        };
        let cluster: Vec<_> = (0..n).map(|i| format!("s{i}={}", url(n + i))).collect();
        let servers = (0..n).map(|i| {
            let data = dir.path().join(format!("s{i}")).display().to_string();
            let arguments = [
                ("--name", format!("s{i}")),
                ("--data-dir", data),
                ("--listen-client-urls", url(i)),
                ("--advertise-client-urls", url(i)),
                ("--listen-peer-urls", url(n + i)),
                ("--initial-advertise-peer-urls", url(n + i)),
                ("--initial-cluster", cluster.join(",")),
                ("--auto-compaction-retention", "1".to_owned()),
            ];
            Server {
                arguments: arguments
                    .into_iter()
                    .flat_map(|(k, v)| [k.to_owned(), v])
                    .collect(),
                url: url(i),
                log: dir.path().join(format!("s{i}.log")),
                child: None,
            }
        });
        let mut servers: Vec<_> = servers.collect();
        drop(held);
        for server in &mut servers {
            server.start();
        }
        let etcd = Self { _dir: dir, servers };
        etcd.leader();
        etcd
    }

    /// The client addresses as `--endpoints` takes them.
    pub fn endpoints(&self) -> String {
        let urls: Vec<_> = self.servers.iter().map(|s| s.url.as_str()).collect();
        urls.join(",")
    }

    /// `etcdctl` at all endpoints: what it printed, and whether it was content.
    pub fn ctl(&self, arguments: &[&str]) -> (String, bool) {
        let out = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.endpoints()])
            .args(arguments)
            .output()
            .expect("etcdctl is installed: `make setup-tests`, or the package etcd-client");
        let text = [out.stdout, out.stderr].concat();
        (
            String::from_utf8_lossy(&text).into_owned(),
            out.status.success(),
        )
    }

    /// Which server leads, by etcd's own word.
    pub fn leader(&self) -> usize {
        let due = Instant::now() + PATIENCE;
        loop {
            let (out, _) = self.ctl(&["endpoint", "status"]);
            // endpoint, id, version, size, is leader, …
            let leads = |line: &str| line.split(", ").nth(4) == Some("true");
            let found = out.lines().find(|l| leads(l)).and_then(|line| {
                let url = line.split(", ").next()?;
                self.servers.iter().position(|s| s.url == url)
            });
            if let Some(found) = found {
                return found;
            }
            assert!(Instant::now() < due, "etcd has no leader: {out}");
        }
    }

    pub fn kill(&mut self, i: usize) {
        if let Some(mut child) = self.servers[i].child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub fn restart(&mut self, i: usize) {
        self.servers[i].start();
    }

    /// Sends a signal to every server.
    pub fn signal(&self, name: &str) {
        for child in self.servers.iter().filter_map(|s| s.child.as_ref()) {
            super::harness::signal(child.id(), name);
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for i in 0..self.servers.len() {
            if let Some(mut child) = self.servers[i].child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}
