//! A cluster with what is needed to reach into it: clients that write all the while, hosts that die, processes that stand
//! still, and a look at every member afterwards.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "every test file uses a part of it, and a test may fail at any line"
)]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use craton::drill::recorder::{Fate, Log, Patience, Plan, Recorder, Write};
use craton::drill::verify::{self, Verdict};
use craton::layout::Layout;
use craton::processes::{self, ProcessId};
use craton::sessions::{Login, value};
use craton::supervise::Hold;
use rustix::process::Signal;
use serde_json::Value;

use super::harness::Cluster;

/// How long anything may take that has to happen.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A client waits this long for an answer: longer than anything that is waited for here.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// One cluster at a time: the machine is small.
static TURN: Mutex<()> = Mutex::new(());

pub fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A cluster with what is needed to reach into it.
pub struct Rig {
    pub cluster: Cluster,
    pub layout: Layout,
    pub login: Login,
    pub runtime: tokio::runtime::Runtime,
}

impl Rig {
    pub fn up(name: &str, extra: &[&str]) -> Self {
        let cluster = Cluster::up(name, &[&["--no-sample"], extra].concat());
        let layout = Layout::require(&cluster.dir).unwrap();
        let login = Login::superuser(&layout).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let rig = Self {
            cluster,
            layout,
            login,
            runtime,
        };
        rig.wait_whole();
        let client = rig.session(rig.layout.proxy_port());
        let made = rig
            .runtime
            .block_on(client.batch_execute(craton::drill::SCHEMA));
        made.unwrap();
        rig
    }

    /// A session at a port, which a busy machine may refuse or leave without an answer at first.
    pub fn session(&self, port: u16) -> tokio_postgres::Client {
        self.cluster.wait("a session", LIMIT, || {
            self.runtime.block_on(self.login.connect(port))
        })
    }

    /// The only value of a query at a port.
    pub fn ask(&self, port: u16, query: &str) -> String {
        let client = self.session(port);
        self.runtime.block_on(value(&client, query)).unwrap()
    }

    /// Every member streams, and protects commits where the mode has them protected.
    pub fn wait_whole(&self) -> Value {
        let members = self.layout.cluster.members.len();
        self.cluster.wait_status("a whole cluster", LIMIT, |s| {
            let all = s["members"].as_array().map_or(&[][..], Vec::as_slice);
            let ready = |m: &Value| {
                // A former leader calls itself one until it is heard again.
                let leads = m["id"] == s["leader"] && m["role"] == "leader";
                let counts = leads || m["streaming"] == true && m["sync"] == true;
                m["agent_alive"] == true && counts
            };
            let receivers = s["receivers"].as_array().map_or(&[][..], Vec::as_slice);
            s["writable"] == true
                && all.len() == members
                && all.iter().all(ready)
                && receivers.len() == usize::from(self.layout.cluster.synchronous_backup)
                && receivers.iter().all(|r| r["sync"] == true)
                && (s["durability"] == "async" || s["sync"]["in_force"] == true)
        })
    }

    pub fn leader(&self) -> String {
        let status = self.wait_whole();
        status["leader"].as_str().unwrap().to_owned()
    }

    pub fn standbys(&self, leader: &str) -> Vec<String> {
        let all = self.layout.cluster.members.iter().map(ToString::to_string);
        all.filter(|m| m != leader).collect()
    }

    /// Asks for a mode and waits until it is in force.
    pub fn durability(&self, settings: &[&str], mode: &str, acks: u64) {
        let out = self
            .cluster
            .craton(&[&["config", "set"], settings].concat());
        self.cluster.expect_ok(&out, "config set");
        self.cluster.wait_status(mode, LIMIT, |s| {
            s["durability"] == mode
                && s["sync"]["acks"] == acks
                && (mode == "async" || s["sync"]["in_force"] == true)
        });
    }

    pub fn record(&self, run: i64) -> Clients<'_> {
        self.record_by(4, Duration::from_millis(5), run)
    }

    /// So many writers, each with this pause between two writes.
    pub fn record_by(&self, writers: u32, pause: Duration, run: i64) -> Clients<'_> {
        let plan = Plan {
            write: self.login.at(self.layout.proxy_port()),
            read: None,
            patience: Patience::Drop(PATIENCE),
            writers,
            pause,
            fresh: false,
            run,
            first_id: 1,
            writes_max: 1_000_000,
        };
        let recorder = self.runtime.block_on(async { Recorder::start(&plan) });
        let mut clients = Clients {
            rig: self,
            run,
            recorder,
            before: BTreeMap::new(),
        };
        clients.wait_acknowledged("before anything is done", 50);
        let seen = clients.recorder.log().errors.into_iter();
        clients.before = seen.filter(|(e, _)| e.starts_with("connect: ")).collect();
        clients
    }

    /// The processes of PostgreSQL on a member that send WAL; those to `to` only, or all.
    pub fn senders(&self, member: &str, to: Option<&str>) -> Vec<ProcessId> {
        let filter = to.map_or("true".to_owned(), |m| {
            format!("application_name LIKE '{m}@%'")
        });
        let port = self.layout.postgres_port(&member.parse().unwrap());
        let pids = format!(
            "SELECT coalesce(string_agg(pid::text, ','), '') FROM pg_stat_replication WHERE {filter}"
        );
        let pids = self.ask(port, &pids);
        let pids = pids.split(',').map(|p| p.parse().expect("a sender"));
        pids.filter_map(ProcessId::of).collect()
    }

    /// The leader's host is lost, `after` happens, and another one leads; only then it may come back: in time it could
    /// win the election of its own loss.
    pub fn lose_leader(&self, leader: &str, after: impl FnOnce()) -> Value {
        self.kill_host_for(leader, LIMIT * 2);
        after();
        let status = self.cluster.wait_status("another leader", LIMIT, |s| {
            s["writable"] == true && s["leader"].as_str().is_some_and(|l| l != leader)
        });
        self.power_on(leader);
        status
    }

    /// PostgreSQL of a member, if it runs.
    pub fn postmaster(&self, member: &str) -> Option<ProcessId> {
        let home = self.layout.member(&member.parse().unwrap());
        processes::postmaster(&home.join("data"))
    }

    /// After the leader's PostgreSQL, which was `life`, has died: another member leads, or the same with a PostgreSQL
    /// that was started since. It may win the election of its own loss, and while nobody can be promoted it starts in
    /// place.
    pub fn wait_served_again(&self, leader: &str, life: Option<ProcessId>) -> Value {
        self.cluster
            .wait_status("somebody serves again", LIMIT, |s| {
                let now = self.postmaster(leader);
                let another = s["leader"].as_str().is_some_and(|l| l != leader);
                s["writable"] == true && (another || now.is_some() && now != life)
            })
    }

    /// SIGKILL to everything of a member at once; its agent is not started again for so long, or until
    /// [`Self::power_on`].
    pub fn kill_host_for(&self, member: &str, time: Duration) {
        self.hold_down(&format!("node-{member}"), time);
        let id = member.parse().unwrap();
        let found = processes::of_member(&self.layout, &id);
        for process in &found {
            process.signal(Signal::STOP);
        }
        // Some may have been born before their parent was stopped.
        let late = processes::of_member(&self.layout, &id);
        for process in found.into_iter().chain(late) {
            process.signal(Signal::KILL);
        }
    }

    /// PostgreSQL of a member is there, and no standby.
    pub fn is_writable(&self, member: &str) -> bool {
        let port = self.layout.postgres_port(&member.parse().unwrap());
        self.runtime.block_on(async {
            let Ok(client) = self.login.connect(port).await else {
                return false;
            };
            let asked = value(&client, "SELECT pg_is_in_recovery()").await;
            asked.is_ok_and(|recovering| recovering == "f")
        })
    }

    /// A member that was killed may start now.
    pub fn power_on(&self, member: &str) {
        self.let_up(&format!("node-{member}"));
    }

    /// The supervisor may start this daemon now.
    pub fn let_up(&self, daemon: &str) {
        Hold::release(&self.layout, daemon);
    }

    /// The supervisor does not start this daemon for so long.
    pub fn hold_down(&self, daemon: &str, time: Duration) {
        Hold::set(&self.layout, daemon, time).unwrap();
        let hold = self.layout.run().join(format!("{daemon}.hold"));
        // The supervisor is another user where this runs as root.
        std::fs::set_permissions(hold, std::fs::Permissions::from_mode(0o644)).unwrap();
    }

    pub fn agent(&self, member: &str) -> ProcessId {
        processes::running(&self.layout, &format!("node-{member}")).expect("an agent")
    }

    pub fn history(&self, kind: &str) -> Vec<String> {
        let events = self.cluster.json(&["history"]);
        let events = events["events"].as_array().unwrap().clone();
        events
            .iter()
            .filter(|e| e["kind"] == kind)
            .map(|e| e["text"].as_str().unwrap().to_owned())
            .collect()
    }
}

/// A look a hundred times a second does not disturb what is looked at.
pub fn pause() {
    std::thread::sleep(Duration::from_millis(10));
}

/// Processes that stand still, and go on when this is dropped.
pub struct Frozen(Vec<ProcessId>);

impl Frozen {
    pub fn new(processes: Vec<ProcessId>) -> Self {
        assert!(!processes.is_empty(), "nothing to stop");
        for process in &processes {
            assert!(process.signal(Signal::STOP), "it has ended");
        }
        Self(processes)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for process in &self.0 {
            process.signal(Signal::CONT);
        }
    }
}

/// Clients at work.
pub struct Clients<'a> {
    pub rig: &'a Rig,
    pub run: i64,
    pub recorder: Recorder,
    /// Connects that a busy machine did not answer in time before anything was done, with how often.
    before: BTreeMap<String, u64>,
}

impl Clients<'_> {
    pub fn acknowledged(&self) -> usize {
        let log = self.recorder.log();
        count(&log.writes, Fate::Acknowledged)
    }

    /// Waits until `more` further rows are acknowledged.
    pub fn wait_acknowledged(&self, what: &str, more: usize) {
        let target = self.acknowledged() + more;
        let deadline = Instant::now() + LIMIT;
        while self.acknowledged() < target {
            assert!(
                Instant::now() < deadline,
                "{what}: writes do not get through: {:?}\n{}",
                self.recorder.log().errors,
                self.rig.cluster.logs()
            );
            pause();
        }
    }

    /// Watches for a while, and says how many rows were acknowledged meanwhile.
    pub fn watch(&self, length: Duration) -> usize {
        let before = self.acknowledged();
        let end = Instant::now() + length;
        while Instant::now() < end {
            pause();
        }
        self.acknowledged() - before
    }

    /// How many rows were acknowledged of those sent since then.
    pub fn acknowledged_of(&self, since: tokio::time::Instant) -> usize {
        let log = self.recorder.log();
        let sent = log.writes.iter().filter(|w| w.began >= since);
        sent.filter(|w| w.fate == Fate::Acknowledged).count()
    }

    pub fn no_error(&self, what: &str) {
        let log = self.recorder.log();
        let known = |e: &str, times: u64| self.before.get(e) == Some(&times);
        let mut errors = log.errors;
        errors.retain(|e, times| !known(e, *times));
        assert!(
            errors.is_empty(),
            "{what}: clients saw {errors:?}\n{}",
            self.rig.cluster.logs()
        );
    }

    /// Lets every client finish, waits for a whole cluster, and compares with every member.
    pub fn finish(self, what: &str) -> (Log, Verdict) {
        self.rig.wait_whole();
        self.wait_acknowledged(what, 20);
        let rig = self.rig;
        let log = rig.runtime.block_on(self.recorder.finish());
        let verdicts = rig.runtime.block_on(verify::everywhere(
            &rig.layout,
            &rig.login,
            self.run,
            &log.writes,
        ));
        let verdicts = verdicts.unwrap_or_else(|e| panic!("{what}: {e:#}\n{}", rig.cluster.logs()));
        let (_, first) = verdicts[0].clone();
        for (server, verdict) in &verdicts {
            assert_eq!(*verdict, first, "{what}: {server} has other rows");
        }
        assert!(first.ghosts.is_empty(), "{what}: {:?}", first.ghosts);
        eprintln!(
            "{what}: {} acknowledged, {} lost, {} unknown, errors {:?}",
            count(&log.writes, Fate::Acknowledged),
            first.lost.len(),
            count(&log.writes, Fate::Unknown),
            log.errors
        );
        (log, first)
    }
}

pub fn count(writes: &[Write], fate: Fate) -> usize {
    writes.iter().filter(|w| w.fate == fate).count()
}
