//! Real etcd servers on loopback, started by a test and killed when it ends. Shared by the cluster's tests and those of
//! the coordinator.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "every user takes a part of it, and a test may fail at any line"
)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a server may take to answer.
pub const PATIENCE: Duration = Duration::from_secs(30);

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

    fn wait_port(&self) {
        let address = self.url.rsplit('/').next().unwrap();
        let due = Instant::now() + PATIENCE;
        while std::net::TcpStream::connect(address).is_err() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            assert!(Instant::now() < due, "etcd does not listen: {log}");
            pause();
        }
    }

    fn signal(&self, name: &str) {
        if let Some(child) = &self.child {
            let pid = child.id().to_string();
            let sent = Command::new("kill")
                .args([&format!("-{name}"), &pid])
                .status();
            assert!(sent.unwrap().success(), "{name} to etcd {pid}");
        }
    }
}

/// A look twenty times a second does not disturb what is looked at.
fn pause() {
    std::thread::sleep(Duration::from_millis(50));
}

/// What etcd asks of its clients: TLS with certificates of an authority of its own.
pub struct Certificates {
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
}

impl Certificates {
    /// An authority, and a certificate of it for 127.0.0.1 that serves and asks.
    pub fn make(dir: &Path, name: &str) -> Self {
        let at = |end: &str| dir.join(format!("{name}{end}"));
        let all = Self {
            ca: at("-ca.pem"),
            cert: at(".pem"),
            key: at(".key"),
        };
        let (ca_key, request, extensions) = (at("-ca.key"), at(".csr"), at(".ext"));
        let text = |p: &Path| p.display().to_string();
        // With users as well, etcd's gateway refuses certificates that have a common name.
        let (new, subject) = (["-new", "-nodes", "-newkey", "ec"], ["-subj", "/O=test"]);
        let curve = ["-pkeyopt", "ec_paramgen_curve:prime256v1"];
        openssl(
            &["req", "-x509", "-days", "9"],
            &[&new[..], &curve, &subject].concat(),
            &["-keyout", &text(&ca_key), "-out", &text(&all.ca)],
        );
        openssl(
            &["req"],
            &[&new[..], &curve, &subject].concat(),
            &["-keyout", &text(&all.key), "-out", &text(&request)],
        );
        std::fs::write(
            &extensions,
            "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n",
        )
        .unwrap();
        openssl(
            &["x509", "-req", "-days", "9", "-CAcreateserial"],
            &[],
            &[
                "-in",
                &text(&request),
                "-CA",
                &text(&all.ca),
                "-CAkey",
                &text(&ca_key),
                "-extfile",
                &text(&extensions),
                "-out",
                &text(&all.cert),
            ],
        );
        all
    }

    /// For etcd's own command line.
    fn of_server(&self) -> Vec<String> {
        let text = |p: &Path| p.display().to_string();
        let pairs = [
            ("--cert-file", text(&self.cert)),
            ("--key-file", text(&self.key)),
            ("--trusted-ca-file", text(&self.ca)),
        ];
        let flags = pairs.into_iter().flat_map(|(k, v)| [k.to_owned(), v]);
        flags.chain(["--client-cert-auth".to_owned()]).collect()
    }

    fn of_client(&self) -> Vec<String> {
        let text = |p: &Path| p.display().to_string();
        let pairs = [
            ("--cacert", text(&self.ca)),
            ("--cert", text(&self.cert)),
            ("--key", text(&self.key)),
        ];
        pairs
            .into_iter()
            .flat_map(|(k, v)| [k.to_owned(), v])
            .collect()
    }
}

fn openssl(command: &[&str], key: &[&str], files: &[&str]) {
    let out = Command::new("openssl")
        .args(command)
        .args(key)
        .args(files)
        .output()
        .expect("openssl is installed");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "openssl {command:?}: {said}");
}

/// One etcd.
pub struct Etcd {
    dir: tempfile::TempDir,
    servers: Vec<Server>,
    /// How `etcdctl` shows who it is.
    trusted: Vec<String>,
}

impl Etcd {
    /// Starts one of `n` servers, and waits until it has a leader.
    pub fn start(n: usize) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), n, &[], None)
    }

    /// The same with files in `dir` that it may need, more for each command line, and TLS.
    pub fn start_in(
        dir: tempfile::TempDir,
        n: usize,
        extra: &[&str],
        tls: Option<&Certificates>,
    ) -> Self {
        let held: Vec<_> = (0..n * 2)
            .map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let port = |i: usize| held[i].local_addr().unwrap().port();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let client = |i: usize| format!("{scheme}://127.0.0.1:{}", port(i));
        let peer = |i: usize| format!("http://127.0.0.1:{}", port(n + i));
        let cluster: Vec<_> = (0..n).map(|i| format!("s{i}={}", peer(i))).collect();
        let servers = (0..n).map(|i| {
            let data = dir.path().join(format!("s{i}")).display().to_string();
            let pairs = [
                ("--name", format!("s{i}")),
                ("--data-dir", data),
                ("--listen-client-urls", client(i)),
                ("--advertise-client-urls", client(i)),
                ("--listen-peer-urls", peer(i)),
                ("--initial-advertise-peer-urls", peer(i)),
                ("--initial-cluster", cluster.join(",")),
            ];
            let pairs = pairs.into_iter().flat_map(|(k, v)| [k.to_owned(), v]);
            let extra = extra.iter().map(|s| (*s).to_owned());
            let tls = tls.map(Certificates::of_server).unwrap_or_default();
            Server {
                arguments: pairs.chain(extra).chain(tls).collect(),
                url: client(i),
                log: dir.path().join(format!("s{i}.log")),
                child: None,
            }
        });
        let mut servers: Vec<_> = servers.collect();
        drop(held);
        for server in &mut servers {
            server.start();
        }
        let trusted = tls.map(Certificates::of_client).unwrap_or_default();
        let etcd = Self {
            dir,
            servers,
            trusted,
        };
        for server in &etcd.servers {
            server.wait_port();
        }
        etcd.leader();
        etcd
    }

    /// Its directory, which goes when it ends.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The client addresses.
    pub fn urls(&self) -> Vec<String> {
        self.servers.iter().map(|s| s.url.clone()).collect()
    }

    /// The client addresses as `--endpoints` takes them.
    pub fn endpoints(&self) -> String {
        self.urls().join(",")
    }

    /// `etcdctl` at all endpoints: what it printed, and whether it was content.
    pub fn ctl(&self, arguments: &[&str]) -> (String, bool) {
        let out = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .env("ETCDCTL_DIAL_TIMEOUT", "3s")
            .args(["--endpoints", &self.endpoints()])
            .args(&self.trusted)
            .args(arguments)
            .output()
            .expect("etcdctl is installed: `make setup-tests`, or the package etcd-client");
        let text = [out.stdout, out.stderr].concat();
        (
            String::from_utf8_lossy(&text).into_owned(),
            out.status.success(),
        )
    }

    /// From now on it asks for a user: root, who is `etcdctl` here, and `craton` with `open sesame`, who may read and write
    /// below that prefix alone.
    pub fn ask_for_users(&mut self, prefix: &str) {
        let may = [
            "role",
            "grant-permission",
            "--prefix=true",
            "craton",
            "readwrite",
        ];
        let commands: [&[&str]; 7] = [
            &["user", "add", "root:rootpassword"],
            &["user", "grant-role", "root", "root"],
            &["role", "add", "craton"],
            &[&may[..], &[prefix]].concat(),
            &["user", "add", "craton:open sesame"],
            &["user", "grant-role", "craton", "craton"],
            &["auth", "enable"],
        ];
        for command in commands {
            let due = Instant::now() + PATIENCE;
            loop {
                let (out, done) = self.ctl(command);
                if done || out.contains("already") {
                    break;
                }
                assert!(Instant::now() < due, "{command:?}: {out}");
                pause();
            }
        }
        let root = ["--user", "root:rootpassword"];
        self.trusted.extend(root.map(str::to_owned));
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
            pause();
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
        self.servers[i].wait_port();
    }

    /// Saves what is there now; the file is good for [`Self::restore`].
    pub fn snapshot(&self, name: &str) -> PathBuf {
        let file = self.dir.path().join(name);
        let due = Instant::now() + PATIENCE;
        loop {
            let out = Command::new("etcdctl")
                .env("ETCDCTL_API", "3")
                .env("ETCDCTL_DIAL_TIMEOUT", "3s")
                .args(["--endpoints", &self.servers[0].url])
                .args(&self.trusted)
                .args(["snapshot", "save"])
                .arg(&file)
                .output()
                .unwrap();
            if out.status.success() {
                return file;
            }
            let said = String::from_utf8_lossy(&out.stderr);
            assert!(Instant::now() < due, "snapshot save: {said}");
            pause();
        }
    }

    /// All servers end, and begin again with what was saved.
    pub fn restore(&mut self, snapshot: &Path) {
        for i in 0..self.servers.len() {
            self.kill(i);
        }
        for server in &self.servers {
            let flag = |name: &str| {
                let at = server.arguments.iter().position(|a| a == name).unwrap();
                server.arguments[at + 1].clone()
            };
            std::fs::remove_dir_all(flag("--data-dir")).unwrap();
            let kept = [
                "--name",
                "--data-dir",
                "--initial-cluster",
                "--initial-advertise-peer-urls",
            ];
            let out = Command::new("etcdctl")
                .env("ETCDCTL_API", "3")
                .args(["snapshot", "restore"])
                .arg(snapshot)
                .args(kept.into_iter().flat_map(|n| [n.to_owned(), flag(n)]))
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success(), "snapshot restore: {said}");
        }
        for server in &mut self.servers {
            server.start();
        }
        for server in &self.servers {
            server.wait_port();
        }
        self.leader();
    }

    pub fn pause(&self, i: usize) {
        self.servers[i].signal("STOP");
    }

    pub fn resume(&self, i: usize) {
        self.servers[i].signal("CONT");
    }

    /// Sends a signal to every server.
    pub fn signal(&self, name: &str) {
        for server in &self.servers {
            server.signal(name);
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for server in &mut self.servers {
            if let Some(mut child) = server.child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}
