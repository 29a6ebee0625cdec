//! Members on disks of their own that fill up and hang: ext4 on loop devices, filled for real and frozen with
//! `fsfreeze`, which holds every write and flush in the kernel. Needs root, and says so where it is not.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::manual_assert,
    clippy::indexing_slicing,
    clippy::format_push_string,
    clippy::disallowed_types,
    clippy::cast_possible_truncation,
    clippy::print_stderr,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use craton::layout::Layout;
use craton::sessions::{self, Login};
use serde_json::Value;

#[path = "harness/mod.rs"]
mod harness;

use harness::{Cluster, text, whole};

const MIB: u64 = 1 << 20;
/// The size of each member's disk.
const DISK_MIB: u64 = 1024;

/// How long anything may take that has to happen.
const LIMIT: Duration = Duration::from_secs(60);

/// One cluster at a time: what is waited for here is disks, which both would share.
static TURN: Mutex<()> = Mutex::new(());

/// Runs a command, or says what went wrong.
fn run(program: &str, args: &[&str]) -> Result<(), String> {
    let out = Command::new(program)
        .args(args)
        .output()
        .map_err(|e| format!("{program}: {e}"))?;
    if out.status.success() {
        return Ok(());
    }
    Err(format!("{program} {args:?}: {}", text(&out)))
}

/// A cluster each of whose members has a disk of its own.
struct OnDisks {
    cluster: Cluster,
    mounts: Vec<PathBuf>,
    frozen: Vec<PathBuf>,
    ballast: Option<PathBuf>,
}

impl OnDisks {
    /// None where this machine does not let the caller mount anything.
    fn up(name: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting a disk needs root");
            return None;
        }
        let cluster = Cluster::up(name, &["--no-sample"]);
        cluster.wait_status("a whole cluster", Duration::from_secs(90), whole);
        let down = cluster.craton(&["down"]);
        cluster.expect_ok(&down, "craton down");
        let mut disks = Self {
            cluster,
            mounts: Vec::new(),
            frozen: Vec::new(),
            ballast: None,
        };
        for member in ["a", "b", "c"] {
            if let Err(error) = disks.move_to_disk(member) {
                // A container without loop devices: nothing can be shown there.
                assert!(disks.mounts.is_empty(), "{error}");
                eprintln!("skipped: no disk of its own can be mounted here: {error}");
                return None;
            }
        }
        let up = disks.cluster.craton(&["up"]);
        disks.cluster.expect_ok(&up, "craton up on disks");
        disks
            .cluster
            .wait_status("a whole cluster", Duration::from_secs(90), whole);
        Some(disks)
    }

    fn path(&self, member: &str) -> PathBuf {
        self.cluster.dir.join("members").join(member)
    }

    fn move_to_disk(&mut self, member: &str) -> Result<(), String> {
        let place = self.path(member);
        let image = self.cluster.dir.with_extension(format!("{member}.disk"));
        let aside = self.cluster.dir.with_extension(format!("{member}.aside"));
        let s = |p: &Path| p.to_str().unwrap().to_owned();
        let size = format!("{DISK_MIB}M");
        run("truncate", &["-s", &size, &s(&image)])?;
        let made = run("mkfs.ext4", &["-q", "-m", "0", &s(&image)])
            .and_then(|()| run("mv", &[&s(&place), &s(&aside)]))
            .and_then(|()| run("mkdir", &[&s(&place)]))
            .and_then(|()| run("mount", &["-o", "loop", &s(&image), &s(&place)]));
        // The mount holds the file: nothing is left of it when it is unmounted.
        let _ = std::fs::remove_file(&image);
        if let Err(error) = made {
            if aside.exists() {
                let _ = std::fs::remove_dir(&place);
                let _ = std::fs::rename(&aside, &place);
            }
            return Err(error);
        }
        self.mounts.push(place.clone());
        run("cp", &["-a", &format!("{}/.", s(&aside)), &s(&place)])?;
        run("rm", &["-rf", &s(&aside)])
    }

    fn freeze(&mut self, member: &str) {
        let place = self.path(member);
        run("fsfreeze", &["-f", place.to_str().unwrap()]).unwrap();
        self.frozen.push(place);
    }

    fn thaw(&mut self) {
        for place in std::mem::take(&mut self.frozen) {
            run("fsfreeze", &["-u", place.to_str().unwrap()]).unwrap();
        }
    }

    /// Takes all of a member's disk but this much.
    fn leave_free(&mut self, member: &str, mib: u64) {
        let place = self.path(member);
        let free = free_bytes(&place);
        let path = place.join("ballast");
        let file = std::fs::File::create(&path).unwrap();
        let size = free.saturating_sub(mib * MIB);
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size).unwrap();
        self.ballast = Some(path);
    }

    /// Fills what is left, about this much a second, until nothing is.
    fn fill(&self, mib_per_second: u64) -> Arc<AtomicBool> {
        let (stop, path) = (
            Arc::new(AtomicBool::new(false)),
            self.ballast.clone().unwrap(),
        );
        let stopped = Arc::clone(&stop);
        std::thread::spawn(move || {
            let Ok(file) = std::fs::OpenOptions::new().write(true).open(&path) else {
                return;
            };
            while !stopped.load(Ordering::SeqCst) {
                let end = file.metadata().map_or(0, |m| m.len());
                let flags = rustix::fs::FallocateFlags::empty();
                let _ = rustix::fs::fallocate(&file, flags, end, mib_per_second * MIB / 10);
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        stop
    }

    fn wait_new_leader(&self, old: &str, limit: Duration) -> (Value, Duration) {
        let began = Instant::now();
        let status = self.cluster.wait_status("another leader", limit, |s| {
            s["writable"] == true && s["leader"].as_str().is_some_and(|l| l != old)
        });
        (status, began.elapsed())
    }
}

impl Drop for OnDisks {
    fn drop(&mut self) {
        for place in &self.frozen {
            let _ = run("fsfreeze", &["-u", place.to_str().unwrap()]);
        }
        if let Some(ballast) = &self.ballast {
            let _ = std::fs::remove_file(ballast);
        }
        let _ = self.cluster.craton(&["down"]);
        for place in &self.mounts {
            let path = place.to_str().unwrap();
            if let Err(error) = run("umount", &[path]).or_else(|_| run("umount", &["-l", path])) {
                eprintln!("{error}");
            }
        }
    }
}

fn free_bytes(path: &Path) -> u64 {
    let stat = rustix::fs::statvfs(path).unwrap();
    stat.f_frsize * stat.f_bavail
}

/// What became of the writes.
#[derive(Default)]
struct Fates {
    /// Ids with the time of the acknowledgement.
    acknowledged: Vec<(u64, Instant)>,
    /// Everything else, in words.
    failed: Vec<String>,
}

/// Writers through the proxy, and one straight on the leader's port.
struct Writers {
    runtime: tokio::runtime::Runtime,
    fates: Arc<Mutex<Fates>>,
    direct: Arc<Mutex<Fates>>,
    stop: Arc<AtomicBool>,
    login: Login,
}

impl Writers {
    /// With `direct_port` one of them writes straight to that member. The proxies cannot hold it: a planned
    /// switchover waits for it as long as it may.
    fn start(cluster: &Cluster, direct_port: Option<u16>, row_bytes: u64) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let layout = Layout::require(&cluster.dir).unwrap();
        let login = Login::superuser(&layout).unwrap();
        let port = layout.proxy_port();
        let client = cluster.wait("a session", LIMIT, || runtime.block_on(login.connect(port)));
        let sql = "CREATE TABLE writes (id bigint PRIMARY KEY, load bytea);
            ALTER TABLE writes ALTER load SET STORAGE EXTERNAL";
        runtime.block_on(client.batch_execute(sql)).unwrap();
        let this = Self {
            runtime,
            fates: Arc::default(),
            direct: Arc::default(),
            stop: Arc::default(),
            login,
        };
        let next = Arc::new(AtomicU64::new(1));
        for writer in 0..4 {
            let (port, fates) = match direct_port {
                Some(direct) if writer == 0 => (direct, &this.direct),
                _ => (port, &this.fates),
            };
            let work = write_on(
                this.login.clone(),
                port,
                row_bytes,
                Arc::clone(&next),
                Arc::clone(fates),
                Arc::clone(&this.stop),
            );
            this.runtime.spawn(work);
        }
        this
    }

    fn wait_acknowledged(&self, rows: usize) {
        let deadline = Instant::now() + LIMIT;
        let base = self.fates.lock().unwrap().acknowledged.len();
        while self.fates.lock().unwrap().acknowledged.len() < base + rows {
            assert!(Instant::now() < deadline, "writes do not go on");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The longest time without an acknowledgement through the proxy.
    fn longest_gap(&self, since: Instant) -> Duration {
        let fates = self.fates.lock().unwrap();
        let mut last = since;
        let mut longest = Duration::ZERO;
        for (_, at) in fates.acknowledged.iter().filter(|(_, at)| *at > since) {
            longest = longest.max(at.duration_since(last));
            last = *at;
        }
        longest
    }

    fn failures(&self) -> Vec<String> {
        self.fates.lock().unwrap().failed.clone()
    }

    /// Stops, and checks that every member holds every row that was acknowledged.
    fn check_nothing_lost(self, status: &Value) {
        self.stop.store(true, Ordering::SeqCst);
        let mut acknowledged = BTreeSet::new();
        for fates in [&self.fates, &self.direct] {
            let fates = fates.lock().unwrap();
            acknowledged.extend(fates.acknowledged.iter().map(|(id, _)| *id));
        }
        for member in status["members"].as_array().unwrap() {
            let port = member["port"].as_u64().unwrap() as u16;
            let deadline = Instant::now() + LIMIT;
            loop {
                let rows = self.runtime.block_on(async {
                    let client = self.login.connect(port).await?;
                    sessions::column(&client, "SELECT id FROM writes").await
                });
                let why = match rows {
                    Ok(rows) => {
                        let there: BTreeSet<u64> =
                            rows.iter().map(|id| id.parse().unwrap()).collect();
                        let lost = acknowledged.difference(&there).count();
                        if lost == 0 {
                            break;
                        }
                        let all = acknowledged.len();
                        format!("{lost} of {all} acknowledged rows are not there")
                    }
                    Err(error) => error.to_string(),
                };
                // A standby replays a moment later.
                assert!(Instant::now() < deadline, "{}: {why}", member["id"]);
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        eprintln!(
            "{} acknowledged rows are on every member",
            acknowledged.len()
        );
    }
}

async fn write_on(
    login: Login,
    port: u16,
    row_bytes: u64,
    next: Arc<AtomicU64>,
    fates: Arc<Mutex<Fates>>,
    stop: Arc<AtomicBool>,
) {
    while !stop.load(Ordering::SeqCst) {
        let Ok(client) = login.connect(port).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        while !stop.load(Ordering::SeqCst) {
            let id = next.fetch_add(1, Ordering::SeqCst);
            let sql = format!(
                "INSERT INTO writes SELECT {id}, string_agg(decode(md5({id}::text || n), 'hex'), '')
                 FROM generate_series(1, {}) n",
                row_bytes / 16
            );
            let answer = tokio::time::timeout(Duration::from_secs(60), client.batch_execute(&sql));
            let outcome = answer.await;
            let mut fates = fates.lock().unwrap();
            match outcome {
                Ok(Ok(())) => fates.acknowledged.push((id, Instant::now())),
                Ok(Err(error)) => {
                    fates.failed.push(sessions::describe(&error));
                    if client.is_closed() {
                        break;
                    }
                }
                Err(_) => {
                    fates.failed.push("no answer within 60 s".to_owned());
                    break;
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn leader_of(status: &Value) -> (String, u16) {
    let leader = status["leader"].as_str().unwrap().to_owned();
    let members = status["members"].as_array().unwrap();
    let member = members.iter().find(|m| m["id"] == leader.as_str()).unwrap();
    (leader, member["port"].as_u64().unwrap() as u16)
}

fn member<'a>(status: &'a Value, id: &str) -> &'a Value {
    let members = status["members"].as_array().unwrap();
    members.iter().find(|m| m["id"] == id).unwrap()
}

fn trouble(status: &Value, id: &str) -> String {
    member(status, id)["trouble"].to_string()
}

#[test]
fn a_leader_whose_disk_fills_hands_over_in_time() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut disks) = OnDisks::up("full") else {
        return;
    };
    let status = disks.cluster.json(&["status"]);
    let (old, _) = leader_of(&status);
    let writers = Writers::start(&disks.cluster, None, 8192);
    writers.wait_acknowledged(100);
    let reserve = DISK_MIB / 8;
    let held = disks.path(&old).join("reserve");
    assert!(
        held.metadata().unwrap().len() > (reserve - 16) * MIB,
        "the reserve is there"
    );

    let began = Instant::now();
    disks.leave_free(&old, reserve + 60);
    disks.cluster.wait_status("a warning", LIMIT, |s| {
        trouble(s, &old).contains("MiB left")
    });
    // Slowly: with less than half of its reserve it does not wait for transactions any more, and clients see errors.
    let slowly = disks.fill(5);
    let (status, _) = disks.wait_new_leader(&old, Duration::from_secs(90));
    slowly.store(true, Ordering::SeqCst);
    let filling = disks.fill(20);
    writers.wait_acknowledged(200);
    let gap = writers.longest_gap(began);
    eprintln!(
        "full disk: {old} handed over to {}, longest gap between acknowledged writes {} ms, failed {:?}",
        status["leader"],
        gap.as_millis(),
        writers.failures()
    );
    // A pause of some 0.3 s; most of what is beyond it is other work on the same machine.
    assert!(
        gap < Duration::from_secs(30),
        "writes stood still for {gap:?}"
    );
    assert_eq!(
        writers.failures(),
        Vec::<String>::new(),
        "clients see no error"
    );
    let history = disks.cluster.json(&["history"]).to_string();
    assert!(
        history.contains("hands over: the disk is nearly full"),
        "{history}"
    );

    // It is really full now, and stays a member that nobody elects.
    let full = |s: &Value| trouble(s, &old).contains("nearly full");
    disks
        .cluster
        .wait_status("a full disk", Duration::from_secs(60), |s| {
            full(s) && free_bytes(&disks.path(&old)) < 8 * MIB && !held.exists()
        });
    writers.wait_acknowledged(200);
    assert_ne!(disks.cluster.json(&["status"])["leader"], old.as_str());

    filling.store(true, Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(300));
    std::fs::remove_file(disks.ballast.take().unwrap()).unwrap();
    let status = disks
        .cluster
        .wait_status("healed", Duration::from_secs(90), |s| whole(s) && !full(s));
    assert!(held.exists(), "the reserve is there again");
    writers.check_nothing_lost(&status);
}

#[test]
fn a_leader_whose_disk_hangs_is_replaced() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut disks) = OnDisks::up("hung") else {
        return;
    };
    let status = disks.cluster.json(&["status"]);
    let (old, port) = leader_of(&status);
    let writers = Writers::start(&disks.cluster, Some(port), 256);
    writers.wait_acknowledged(100);

    let began = Instant::now();
    disks.freeze(&old);
    // stall_after_ms (4 s) + ttl_ms (2 s); the rest is for a busy machine.
    let (status, took) = disks.wait_new_leader(&old, LIMIT);
    writers.wait_acknowledged(100);
    eprintln!(
        "hung disk: {} leads {} ms after the freeze, longest gap between acknowledged writes {} ms",
        status["leader"],
        took.as_millis(),
        writers.longest_gap(began).as_millis()
    );
    disks.cluster.wait_status("it says why", LIMIT, |s| {
        let told = trouble(s, &old);
        told.contains("has not returned") || told.contains("waited for the disk")
    });
    let history = disks.cluster.json(&["history"]).to_string();
    // By whoever was first to open the election: one of the others, or the old leader itself.
    let why = ["a write in", "commits have waited for the disk"];
    assert!(
        why.iter()
            .any(|w| history.contains(&format!("ran out: {w}"))
                || history.contains(&format!("gave up: {w}"))),
        "{history}"
    );

    disks.thaw();
    let status = disks
        .cluster
        .wait_status("healed", Duration::from_secs(90), whole);
    writers.check_nothing_lost(&status);
}
