//! What a trial needs to know of a highly available PostgreSQL on three hosts, whoever manages it.

use std::fs::OpenOptions;
use std::future::Future;
use std::path::Path;
use std::process::Child;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use craton::sessions::Endpoint;
use rustix::process::Signal;
use tokio_postgres::Config;
use tokio_postgres::config::TargetSessionAttrs;

use super::net::{Host, Link, Net, Rules, pause, signal};

/// The members and the last part of each one's address.
pub const MEMBERS: [(&str, u8); 3] = [("a", 11), ("b", 12), ("c", 13)];

/// The host of the proxy, and the last part of its address.
pub const PROXY: (&str, u8) = ("proxy", 20);

/// The host of the clients, and the last part of its address.
pub const CLIENT: (&str, u8) = ("client", 30);

/// PostgreSQL's port on every member.
pub const POSTGRES_PORT: u16 = 5432;

/// How long a client of several hosts gives each: the least that libpq takes.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// How long a client of a proxy gives it: it may hold the client while there is no primary.
const PROXY_CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// A way for clients to the primary.
pub struct Entry {
    /// Its name in reports.
    pub name: &'static str,
    /// For writes.
    pub write: Endpoint,
    /// For reads, where there is a way of their own.
    pub read: Option<Endpoint>,
}

/// What a cluster says of itself.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Who leads.
    pub leader: Option<String>,
    /// A number that grows with every change of leadership.
    pub term: u64,
    /// A standby that commits wait for.
    pub synchronous: Option<String>,
    /// What keeps it from being whole; none when it is.
    pub missing: Option<String>,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// A fault lasts at least this long.
    pub hold_min: Duration,
    /// And at most this long, if writes do not come back before.
    pub hold_max: Duration,
    /// How long healing may take afterwards.
    pub heal_within: Duration,
}

/// A cluster on three hosts.
pub trait System {
    /// Its name in reports.
    fn name(&self) -> &str;
    /// The hosts.
    fn net(&self) -> &Net;
    /// Where clients run.
    fn client(&self) -> &Client;
    /// The password of the superuser `postgres`.
    fn password(&self) -> &str;
    /// The ways to the primary.
    fn entries(&self) -> Vec<Entry>;
    /// What it says of itself.
    fn state(&self) -> Result<State, String>;
    /// Starts everything that a host of a member runs.
    fn power_on(&self, member: &str);
    /// The daemon that manages PostgreSQL, as [`Daemons::keep`] calls it.
    fn manager(&self) -> &'static str;
    /// Its processes on a host.
    fn managers(&self, member: &str) -> Vec<i32>;
    /// The data directory of a member.
    fn data(&self, member: &str) -> std::path::PathBuf;
    /// What cuts a member from the coordinator, and from nothing else.
    fn no_coordinator(&self, member: &str) -> Rules;
    /// Hands the leadership over as planned.
    fn switchover(&self) -> Result<(), String>;
    /// How long things may take.
    fn pace(&self) -> Pace;
    /// What is needed to understand a failure.
    fn logs(&self) -> String;

    /// The host of a member.
    fn host(&self, member: &str) -> &Host {
        self.net().host(member)
    }

    /// The postmaster of a member.
    fn postmaster(&self, member: &str) -> Option<i32> {
        let text = std::fs::read_to_string(self.data(member).join("postmaster.pid")).ok()?;
        let pid = text.lines().next()?.trim().parse().ok()?;
        self.host(member).pids().contains(&pid).then_some(pid)
    }

    /// Kills what manages PostgreSQL on a host, and what would start it again.
    fn keep_managers_away(&self, member: &str) {
        for pid in self.host(member).processes(&keeper(self.manager())) {
            signal(pid, Signal::KILL);
        }
        for pid in self.managers(member) {
            signal(pid, Signal::KILL);
        }
    }

    /// A login of the superuser on one server.
    fn login(&self, host: &str, port: u16) -> Config {
        let mut config = Config::new();
        config
            .host(host)
            .port(port)
            .user("postgres")
            .password(self.password())
            .dbname("postgres")
            .application_name("trial")
            .connect_timeout(CONNECT_LIMIT);
        config
    }

    /// One member, whatever its role.
    fn direct(&self, member: &str) -> Endpoint {
        let config = self.login(&self.host(member).ip, POSTGRES_PORT);
        Endpoint::new(vec![config], CONNECT_LIMIT)
    }

    /// All members by one connection string with `target_session_attrs`, as libpq takes it.
    fn multi_host(&self) -> Entry {
        let of = |(name, _): &(&str, u8)| {
            let mut config = self.login(&self.host(name).ip, POSTGRES_PORT);
            config.target_session_attrs(TargetSessionAttrs::ReadWrite);
            config
        };
        Entry {
            name: "multi-host",
            write: Endpoint::new(MEMBERS.iter().map(of).collect(), CONNECT_LIMIT),
            read: None,
        }
    }

    /// A proxy on the proxy's host.
    fn by_proxy(&self, name: &'static str, port: u16, read_port: u16) -> Entry {
        let at = |port| {
            let config = self.login(&self.host(PROXY.0).ip, port);
            Endpoint::new(vec![config], PROXY_CONNECT_LIMIT)
        };
        Entry {
            name,
            write: at(port),
            read: Some(at(read_port)),
        }
    }

    /// Waits until the cluster is whole.
    fn wait_whole(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            let state = self.state();
            match &state {
                Ok(state) if state.missing.is_none() => return,
                _ if Instant::now() > deadline => panic!(
                    "{} is not whole within {limit:?}: {state:?}\n{}",
                    self.name(),
                    self.logs()
                ),
                _ => pause(),
            }
        }
    }

    /// Waits until somebody leads, and says who.
    fn leader(&self, limit: Duration) -> String {
        self.settled(limit).leader.expect("a leader")
    }

    /// Waits until it answers and somebody leads, and returns what it says.
    fn settled(&self, limit: Duration) -> State {
        let deadline = Instant::now() + limit;
        loop {
            match self.state() {
                Ok(state) if state.leader.is_some() => return state,
                other if Instant::now() > deadline => {
                    panic!("nobody leads {}: {other:?}\n{}", self.name(), self.logs())
                }
                _ => pause(),
            }
        }
    }
}

/// What marks the process that starts a daemon again when it ends.
fn keeper(daemon: &str) -> String {
    format!("keep-running:{daemon}:")
}

/// The hosts of a cluster: members with disks, a proxy, a client.
pub fn hosts(slow: &[&str]) -> Net {
    let mut net = Net::new();
    for (name, last) in MEMBERS {
        let link = if slow.contains(&name) {
            Link::Slow
        } else {
            Link::Plain
        };
        net.add(name, last, link, true);
    }
    net.add(PROXY.0, PROXY.1, Link::Plain, false);
    net.add(CLIENT.0, CLIENT.1, Link::Plain, false);
    net
}

/// Daemons that were started, so that none is left unwaited for.
#[derive(Default)]
pub struct Daemons {
    children: Mutex<Vec<Child>>,
}

impl Daemons {
    /// Starts a daemon on a host, and starts it again whenever it ends, as a service manager does. One that is
    /// kept already stays.
    pub fn keep(&self, host: &Host, daemon: &str, log: &Path, command: &[&str]) {
        let keeper = keeper(daemon);
        if !host.processes(&keeper).is_empty() {
            return;
        }
        let again = "while :; do \"$@\"; sleep 0.1; done";
        let mut args = vec!["-c", again, &keeper];
        args.extend(command);
        let out = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .expect("a log file");
        let error = out.try_clone().expect("a second handle");
        let mut shell = host.command("sh", &args);
        shell.stdout(out).stderr(error);
        let child = shell.spawn().expect("a shell");
        let mut children = self.children.lock().unwrap_or_else(PoisonError::into_inner);
        children.retain_mut(|c| c.try_wait().is_ok_and(|ended| ended.is_none()));
        children.push(child);
    }
}

/// The end of every log in a directory.
pub fn tails(dir: &Path, lines: usize) -> String {
    let mut all = String::new();
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "log"))
        .collect();
    files.sort();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let tail: Vec<&str> = text.lines().rev().take(lines).collect();
        all.push_str(&format!("== {}\n", file.display()));
        for line in tail.iter().rev() {
            all.push_str(line);
            all.push('\n');
        }
    }
    all
}

/// An event loop whose threads live in a host's network.
pub struct Client {
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// On this host.
    pub fn on(host: &Host) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .on_thread_start(host.enter())
            .enable_all()
            .build()
            .expect("an event loop");
        Self { runtime }
    }

    /// Runs something there to its end.
    pub fn run<F>(&self, work: F) -> F::Output
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        // Spawned, so that it runs on a thread of the host and not on this one.
        let task = self.runtime.spawn(work);
        self.runtime
            .block_on(task)
            .expect("the task does not panic")
    }
}
