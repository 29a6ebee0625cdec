//! The cluster's records in a real etcd: failovers, an etcd that is away, and moving the records while clients write.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    clippy::print_stdout,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Output;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use craton::drill::recorder::{Fate, Log, Patience, Plan, Recorder, longest_gap};
use craton::drill::verify::{judge, present};
use craton::layout::Layout;
use craton::sessions::Login;
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::time::Instant;

#[path = "harness/mod.rs"]
mod harness;
#[path = "etcd/servers.rs"]
mod servers;

use harness::{Cluster, directory, text, whole};
use servers::{Certificates, Etcd};

const PATIENCE: Duration = Duration::from_secs(60);

/// What a client may wait for while nothing happens to the leader, on a busy machine with a busy disk. That nobody else
/// led meanwhile, the term says.
const STILL: Duration = Duration::from_secs(20);

/// Longer than three leases: by then somebody would lead who may.
const LONG: Duration = Duration::from_secs(7);

/// One cluster at a time: what is measured here is how long clients wait.
static TURN: Mutex<()> = Mutex::new(());

/// Clients that write through the proxy all the time.
struct Writers {
    runtime: Runtime,
    recorder: Recorder,
    layout: Layout,
    login: Login,
    run: i64,
    /// Connects that a busy machine did not answer in time before anything was done, with how often.
    before: BTreeMap<String, u64>,
}

impl Writers {
    /// Starts them, and waits until they write.
    fn start(c: &Cluster) -> Self {
        static RUNS: AtomicI64 = AtomicI64::new(1);
        let run = RUNS.fetch_add(1, Ordering::SeqCst);
        let runtime = Runtime::new().unwrap();
        let layout = Layout::require(&c.dir).unwrap();
        let login = Login::superuser(&layout).unwrap();
        let plan = Plan {
            write: login.at(layout.proxy_port()),
            read: None,
            patience: Patience::Drop(Duration::from_secs(30)),
            writers: 2,
            pause: Duration::from_millis(10),
            fresh: false,
            run,
            first_id: 1,
            writes_max: 1_000_000,
        };
        let client = c.wait("a session", PATIENCE, || {
            runtime.block_on(login.connect(layout.proxy_port()))
        });
        let recorder = runtime.block_on(async {
            client.batch_execute(craton::drill::SCHEMA).await.unwrap();
            Recorder::start(&plan)
        });
        let mut writers = Self {
            runtime,
            recorder,
            layout,
            login,
            run,
            before: BTreeMap::new(),
        };
        writers.go_on(c, "before anything is done");
        let seen = writers.recorder.log().errors.into_iter();
        writers.before = seen.filter(|(e, _)| e.starts_with("connect: ")).collect();
        writers
    }

    /// Waits for more acknowledged writes from here on.
    fn go_on(&self, c: &Cluster, what: &str) {
        let (from, due) = (Instant::now(), Instant::now() + PATIENCE);
        while self.recorder.acknowledged_since(from) < 20 {
            assert!(Instant::now() < due, "{what}: no writes\n{}", c.logs());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends them. No client saw an error, and what was acknowledged is there.
    fn finish(self, c: &Cluster) -> Log {
        let log = self.runtime.block_on(self.recorder.finish());
        let mut errors = log.errors.clone();
        errors.retain(|e, times| self.before.get(e) != Some(&*times));
        let seen = (errors, log.sessions_lost.len());
        assert_eq!(seen.0.len() + seen.1, 0, "{seen:?}\n{}", c.logs());
        let port = self.layout.proxy_port();
        let client = c.wait("a session", PATIENCE, || {
            self.runtime.block_on(self.login.connect(port))
        });
        let there = present(&client, self.run, 1, u64::MAX >> 1);
        let there = self.runtime.block_on(there).unwrap();
        let verdict = judge(&log.writes, &there);
        assert!(
            verdict.lost.is_empty() && verdict.ghosts.is_empty(),
            "{verdict:?}"
        );
        log
    }
}

/// The longest time without an acknowledged write.
fn gap(log: &Log, from: Instant, to: Instant) -> Duration {
    let acknowledged = log.writes.iter().filter(|w| w.fate == Fate::Acknowledged);
    let instants: Vec<_> = acknowledged.map(|w| w.ended).collect();
    longest_gap(&instants, from, to)
}

fn ok(c: &Cluster, args: &[&str]) -> String {
    let out = c.craton(args);
    c.expect_ok(&out, &args.join(" "));
    text(&out)
}

/// Every member's records are there, and every endpoint answers it.
fn all_in(c: &Cluster, backend: &str, endpoints: usize) -> bool {
    let members = c.json(&["status"])["members"]
        .as_array()
        .map_or(0, Vec::len);
    let seen = c.json(&["coordinator", "status"]);
    let seen = seen.as_array().map_or(&[][..], Vec::as_slice);
    members > 0
        && seen.len() == members
        && seen.iter().all(|m| {
            let answers = m["endpoints"].as_array().map_or(&[][..], Vec::as_slice);
            m["backend"] == backend
                && m["progress"].is_null()
                && m["trouble"].is_null()
                && answers.iter().filter(|e| e["ms"].is_u64()).count() == endpoints
        })
}

fn wait_all_in(c: &Cluster, backend: &str, endpoints: usize) {
    let what = format!("everybody is in {backend}");
    c.wait(&what, PATIENCE, || {
        let there = all_in(c, backend, endpoints);
        let seen = || text(&c.craton(&["coordinator", "status"]));
        there.then_some(()).ok_or_else(seen)
    });
}

fn a_purge_takes_its_keys_along(c: Cluster, etcd: &Etcd) {
    let keys = ["get", "--prefix", "/craton/local/", "--keys-only"];
    assert!(etcd.ctl(&keys).0.contains("/craton/local/data/leadership"));
    drop(c);
    assert_eq!(etcd.ctl(&keys).0.trim(), "");
}

/// A cluster on this etcd becomes whole, and goes through every fault.
fn whole_through_faults(c: &Cluster, etcd: &mut Etcd, scheme: &str) {
    c.wait_status("a whole cluster", PATIENCE, whole);
    wait_all_in(c, "etcd", 3);
    let status = ok(c, &["status"]);
    let place = format!("records in etcd at {scheme}://");
    assert!(status.contains(&place), "{status}");
    drills(c);
    one_server_is_lost(c, etcd);
    etcd_is_away(c, etcd);
}

/// Options of `craton up` for a cluster whose records are there.
fn there(endpoints: &str) -> [&str; 5] {
    [
        "--no-sample",
        "--coordinator",
        "etcd",
        "--endpoints",
        endpoints,
    ]
}

fn up_on(name: &str, options: &[&str]) -> Cluster {
    let c = Cluster::up(name, options);
    c.wait_status("a whole cluster", PATIENCE, whole);
    c
}

#[test]
fn a_cluster_on_etcd() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut etcd = Etcd::start(3);
    let endpoints = etcd.endpoints();
    let there = there(&endpoints);
    let c = up_on("etcd", &there);
    another_does_not_begin_over_it(&there);
    whole_through_faults(&c, &mut etcd, "http");

    ok(&c, &["down"]);
    ok(&c, &["up"]);
    c.wait_status("a whole cluster after down and up", PATIENCE, whole);
    wait_all_in(&c, "etcd", 3);

    a_purge_takes_its_keys_along(c, &etcd);
}

/// TLS with client certificates, and a user who may read and write the cluster's keys alone: the same failovers.
#[test]
fn a_cluster_on_an_etcd_that_asks_who_it_is() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let ours = Certificates::make(dir.path(), "ours");
    std::fs::write(dir.path().join("password"), "open sesame\n").unwrap();
    // The cluster's user must be able to read them.
    let open = |path: &Path, mode| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(path, mode).unwrap();
    };
    open(dir.path(), 0o755);
    for file in std::fs::read_dir(dir.path()).unwrap().flatten() {
        open(&file.path(), 0o644);
    }
    let file = |name: &str| dir.path().join(name).display().to_string();
    let (ca, cert, key) = (file("ours-ca.pem"), file("ours.pem"), file("ours.key"));
    let password = file("password");
    let mut etcd = Etcd::start_in(dir, 3, &["--auth-token-ttl", "30"], Some(&ours));
    etcd.ask_for_users("/craton/local/");
    let endpoints = etcd.endpoints();
    let there = [
        "--no-sample",
        "--coordinator",
        "etcd",
        "--endpoints",
        &endpoints,
        "--etcd-user",
        "craton",
        "--etcd-password-file",
        &password,
        "--etcd-ca",
        &ca,
        "--etcd-cert",
        &cert,
        "--etcd-key",
        &key,
    ];
    let c = Cluster::up("etcd-tls", &there);
    whole_through_faults(&c, &mut etcd, "https");
    // Longer than a token lasts.
    c.wait_status("a whole cluster", PATIENCE, whole);
    a_purge_takes_its_keys_along(c, &etcd);
}

fn another_does_not_begin_over_it(there: &[&str]) {
    let dir = directory("etcd-over");
    let other = Cluster {
        dir: dir.clone(),
        base_port: harness::free_base_port(),
    };
    let base = other.base_port.to_string();
    let out = other.craton(&[&["up", "--base-port", &base], there].concat());
    let said = text(&out);
    assert!(!out.status.success(), "{said}");
    assert!(
        said.contains("records") && said.contains("already") && said.contains("--etcd-prefix"),
        "{said}"
    );
    assert!(!dir.exists(), "and leaves nothing behind");
}

/// Runs a drill, once the cluster is as whole as the drill wants it.
fn drilled(c: &Cluster, drill: &str) -> Value {
    let out: Output = c.wait("a drill that begins", PATIENCE, || {
        let out = c.craton_once(&["--json", "drill", drill, "--down-for", "3"]);
        let said = text(&out);
        let early = out.status.code() == Some(4) && said.contains("not whole before the drill");
        if early { Err(said) } else { Ok(out) }
    });
    c.expect_ok(&out, drill);
    serde_json::from_slice(&out.stdout).unwrap()
}

/// The leader's member is killed, and the leadership handed over: as with records of the cluster's own.
fn drills(c: &Cluster) {
    // On a busy machine the switchover waits for a slow transaction, or a client sees an error.
    ok(c, &["config", "set", "switchover_wait_ms=20s"]);
    for drill in ["switchover", "kill-host", "kill-agent"] {
        let report = drilled(c, drill);
        let result = &report["drills"][0];
        println!("{drill}: {result}");
        for none in ["lost", "ghosts", "sessions_lost"] {
            assert_eq!(result[none], 0, "{drill}: {report}");
        }
        if drill == "switchover" {
            assert_eq!(result["errors"], 0, "{drill}: {report}");
        }
        c.wait_status("a whole cluster", PATIENCE, whole);
    }
}

fn term(c: &Cluster) -> u64 {
    c.json(&["status"])["term"].as_u64().unwrap()
}

/// etcd's own leader is killed: it elects another, and no client notices.
fn one_server_is_lost(c: &Cluster, etcd: &mut Etcd) {
    let (before, writers) = (term(c), Writers::start(c));
    let (from, lost) = (Instant::now(), etcd.leader());
    etcd.kill(lost);
    etcd.leader();
    doctor(c, "a server of etcd is lost", |said| {
        said.contains("warning coordinator") && said.contains("2 of 3 endpoints")
    });
    writers.go_on(c, "with two servers");
    let to = Instant::now();
    let log = writers.finish(c);
    assert!(gap(&log, from, to) < STILL, "{:?}", gap(&log, from, to));
    assert_eq!(term(c), before, "nobody else was elected");
    etcd.restart(lost);
    wait_all_in(c, "etcd", 3);
}

/// Waits until the doctor says this.
fn doctor(c: &Cluster, what: &str, says: impl Fn(&str) -> bool) {
    c.wait(what, PATIENCE, || {
        let said = text(&c.craton(&["doctor"]));
        if says(&said) { Ok(()) } else { Err(said) }
    });
}

/// For how long the leader has lived on promises, seconds, by its own word: the others do not know.
fn on_promises(said: &str) -> Option<u64> {
    let (_, rest) = said.split_once("leads on the promise of")?;
    let (_, since) = rest.split_once(" since ")?;
    since.split(' ').next()?.parse().ok()
}

fn wait_promises(c: &Cluster, met: impl Fn(Option<u64>) -> bool) {
    c.wait("promises", PATIENCE, || {
        let out = c.craton(&["explain"]);
        let said = text(&out);
        let met = out.status.success() && met(on_promises(&said));
        met.then_some(()).ok_or(said)
    });
}

/// All of etcd hangs for three leases: the leader goes on, because its standbys promise not to elect another.
fn etcd_is_away(c: &Cluster, etcd: &Etcd) {
    let (before, writers) = (term(c), Writers::start(c));
    let from = Instant::now();
    etcd.signal("STOP");
    wait_promises(c, |seconds| seconds > Some(6));
    doctor(c, "etcd is away", |said| {
        said.contains("critical coordinator")
    });
    let why = ok(c, &["explain"]);
    assert!(why.contains("the cluster's records (etcd at"), "{why}");
    writers.go_on(c, "while etcd is away");
    etcd.signal("CONT");
    wait_promises(c, |seconds| seconds.is_none());
    wait_all_in(c, "etcd", 3);
    writers.go_on(c, "with etcd back");
    let to = Instant::now();
    let log = writers.finish(c);
    assert!(gap(&log, from, to) < STILL, "{:?}", gap(&log, from, to));
    assert_eq!(term(c), before, "nobody else was elected");
}

#[test]
fn there_and_back_while_clients_write() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut etcd = Etcd::start(1);
    let c = Cluster::up("etcd-move", &["--no-sample"]);
    c.wait_status("a whole cluster", PATIENCE, whole);
    let (before, writers) = (term(&c), Writers::start(&c));
    let from = Instant::now();

    // Where nobody answers, nothing is changed.
    let nowhere = [
        "coordinator",
        "move",
        "--to",
        "etcd",
        "--endpoints",
        "http://127.0.0.1:1",
    ];
    let refused = c.craton(&nowhere);
    let said = text(&refused);
    assert_eq!(refused.status.code(), Some(4), "{said}");
    assert!(
        ["a: ", "b: ", "c: "].iter().all(|m| said.contains(m)),
        "{said}"
    );
    wait_all_in(&c, "embedded", 0);

    let endpoints = etcd.endpoints();
    let to_etcd = [
        "coordinator",
        "move",
        "--to",
        "etcd",
        "--endpoints",
        &endpoints,
    ];
    let said = ok(&c, &to_etcd);
    assert!(said.contains("moved from embedded to etcd"), "{said}");
    let said = ok(&c, &to_etcd);
    assert!(said.contains("already"), "{said}");
    wait_all_in(&c, "etcd", 1);
    writers.go_on(&c, "with the records in etcd");
    let moved = Instant::now();
    assert_eq!(term(&c), before, "a move elects nobody");
    ok(&c, &["switchover"]);
    c.wait_status("a whole cluster", PATIENCE, whole);

    one_comes_and_goes(&c);

    let said = ok(&c, &["coordinator", "move", "--to", "embedded"]);
    assert!(said.contains("to embedded"), "{said}");
    wait_all_in(&c, "embedded", 0);
    etcd.kill(0);
    writers.go_on(&c, "with the records back");
    ok(&c, &["switchover"]);
    c.wait_status("a whole cluster", PATIENCE, whole);
    writers.go_on(&c, "at the end");
    let log = writers.finish(&c);
    assert!(
        gap(&log, from, moved) < STILL,
        "{:?}",
        gap(&log, from, moved)
    );
    let history = c.json(&["history"]);
    let events = history["events"].as_array().unwrap();
    let moves = events.iter().filter(|e| e["kind"] == "moved");
    assert_eq!(moves.count(), 2, "{history}");
    let health: Value = c.json(&["status"]);
    assert_eq!(health["coordinator"], "embedded");
}

/// The records are lost under a cluster that writes: the leader goes on for more than three leases, as where etcd does not
/// answer, and nobody touches what etcd holds instead.
fn goes_on_without(c: &Cluster, writers: &Writers, what: &str) {
    wait_promises(c, |seconds| seconds > Some(6));
    doctor(c, what, |said| {
        said.contains("critical coordinator") && said.contains("old copy")
    });
    for command in [&["explain"][..], &["coordinator", "status"]] {
        let said = ok(c, command);
        assert!(said.contains("counts as unavailable"), "{what}: {said}");
    }
    writers.go_on(c, what);
}

fn whole_again(c: &Cluster, writers: &Writers, what: &str) {
    wait_promises(c, |seconds| seconds.is_none());
    wait_all_in(c, "etcd", 1);
    c.wait_status(what, PATIENCE, whole);
    writers.go_on(c, what);
}

fn leader(c: &Cluster) -> String {
    c.json(&["status"])["leader"].as_str().unwrap().to_owned()
}

/// etcd is emptied, and restored from an old copy, under a cluster that writes, and while it is down.
#[test]
fn an_etcd_that_forgets() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut etcd = Etcd::start(1);
    let endpoints = etcd.endpoints();
    let c = up_on("etcd-forgets", &there(&endpoints));
    let first = term(&c);
    let (of_old, old) = (etcd.snapshot("old"), leader(&c));
    ok(&c, &["switchover"]);
    c.wait_status("a whole cluster after a switchover", PATIENCE, whole);
    let newest = etcd.snapshot("newest");
    assert_ne!(old, leader(&c));
    what_was_kept_is_lost_too(&c, &mut etcd, (&of_old, first), &newest);
    let (newest, present, before) = (etcd.snapshot("newer"), leader(&c), term(&c));
    let writers = Writers::start(&c);
    let from = Instant::now();

    let (said, done) = etcd.ctl(&["del", "--prefix", "/craton/local/"]);
    assert!(done, "{said}");
    goes_on_without(&c, &writers, "etcd was emptied");
    let (left, _) = etcd.ctl(&["get", "--prefix", "/craton/local/", "--keys-only"]);
    assert_eq!(left.trim(), "", "nothing is written, nor a lease taken");
    etcd.restore(&newest);
    whole_again(&c, &writers, "the newest copy is back");

    etcd.restore(&of_old);
    goes_on_without(&c, &writers, "etcd was restored from an old copy");
    assert_eq!((leader(&c), term(&c)), (present.clone(), before));
    let said = ok(&c, &["coordinator", "rebuild", "--yes"]);
    assert!(said.contains("written anew"), "{said}");
    whole_again(&c, &writers, "the records were written anew");
    let refused = c.craton(&["coordinator", "rebuild", "--yes"]);
    assert!(text(&refused).contains("whole"), "{}", text(&refused));

    let to = Instant::now();
    let log = writers.finish(&c);
    assert!(gap(&log, from, to) < STILL, "{:?}", gap(&log, from, to));
    assert_eq!((leader(&c), term(&c)), (present, before), "nobody else led");
    let history = c.json(&["history"]);
    let events = history["events"].as_array().unwrap();
    assert!(events.iter().any(|e| e["kind"] == "rebuilt"), "{history}");
    ok(&c, &["switchover"]);
    c.wait_status("a whole cluster at the end", PATIENCE, whole);
    an_old_copy_while_it_is_down(&c, &mut etcd, &of_old);
}

/// Nobody is open for clients, for longer than an election takes. Who cannot read records answers nothing.
fn nobody_leads(c: &Cluster) {
    harness::watch(LONG, || {
        let out = c.craton_once(&["--json", "status"]);
        let status: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
        assert_ne!(status["writable"], true, "{status}");
    });
}

/// Without what the members kept of the records their floors are left, and nobody votes or leads below those. The old
/// copy is from that term.
fn what_was_kept_is_lost_too(
    c: &Cluster,
    etcd: &mut Etcd,
    (of_old, first): (&Path, u64),
    newest: &Path,
) {
    ok(c, &["down"]);
    for member in ["a", "b", "c"] {
        let kept = format!("members/{member}/coordinator/records.json");
        std::fs::remove_file(c.dir.join(kept)).unwrap();
    }
    etcd.restore(of_old);
    std::thread::scope(|threads| {
        let up = threads.spawn(|| c.craton(&["up"]));
        let due = Instant::now() + PATIENCE;
        let why = |member| text(&c.craton_once(&["explain", member]));
        // A former leader that was brought back since is another one than the copy names.
        let old = ["records_are_old", "nothing below it is followed"];
        while !["a", "b", "c"]
            .map(why)
            .iter()
            .all(|w| old.iter().any(|o| w.contains(o)))
        {
            if Instant::now() >= due {
                etcd.restore(newest);
                panic!(
                    "not everybody says so: {:?}\n{}",
                    ["a", "b", "c"].map(why),
                    c.logs()
                );
            }
        }
        nobody_leads(c);
        println!("by an old copy: {:?}", ["a", "b", "c"].map(why));
        let history = c.json(&["history"]);
        let events = history["events"].as_array().unwrap();
        let newest_term = events.iter().filter_map(|e| e["term"].as_u64()).max();
        assert_eq!(
            newest_term,
            Some(first),
            "an election by the old copy: {history}"
        );
        let status = c.json(&["status"]);
        let members = status["members"].as_array().unwrap();
        assert!(members.iter().all(|m| m["role"] != "leader"), "{status}");
        etcd.restore(newest);
        println!("up: {}", text(&up.join().unwrap()));
    });
    c.wait_status("a whole cluster with the newest copy", PATIENCE, whole);
    wait_all_in(c, "etcd", 1);
}

/// Nobody leads by an old copy that was restored while no agent ran; what a member knows is on its disk.
fn an_old_copy_while_it_is_down(c: &Cluster, etcd: &mut Etcd, of_old: &Path) {
    let (present, before) = (leader(c), term(c));
    ok(c, &["down"]);
    etcd.restore(of_old);
    std::thread::scope(|threads| {
        let up = threads.spawn(|| c.craton(&["up"]));
        let all_say_so = || {
            let out = c.craton_once(&["--json", "coordinator", "status"]);
            let seen: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
            let seen = seen.as_array().map_or(&[][..], Vec::as_slice);
            let says = |m: &Value| {
                m["trouble"]
                    .as_str()
                    .is_some_and(|t| t.contains("old copy"))
            };
            seen.len() == 3 && seen.iter().all(says)
        };
        c.wait("all say so", PATIENCE, || {
            all_say_so().then_some(()).ok_or("not all")
        });
        nobody_leads(c);
        let refused = c.craton(&["coordinator", "rebuild", "--yes"]);
        assert!(text(&refused).contains("--from"), "{}", text(&refused));
        ok(c, &["coordinator", "rebuild", "--from", &present, "--yes"]);
        let up = up.join().unwrap();
        println!("up: {}", text(&up));
    });
    let whole = c.wait_status("a whole cluster after all", PATIENCE, whole);
    assert!(whole["term"].as_u64().unwrap() > before, "{whole}");
    wait_all_in(c, "etcd", 1);
}

/// A member that joins knows nothing of etcd but by the others' word.
fn one_comes_and_goes(c: &Cluster) {
    ok(c, &["up", "--members", "4"]);
    c.wait_status("a fourth member", PATIENCE, |s| {
        let all = s["members"].as_array().map_or(&[][..], Vec::as_slice);
        all.len() == 4 && all.iter().all(|m| harness::serves(s, m))
    });
    wait_all_in(c, "etcd", 1);
    ok(c, &["member", "remove", "d", "--yes"]);
    c.wait_status("three members again", PATIENCE, whole);
}

/// What etcd refuses is said before anything is made, with what to do about it.
#[test]
fn refusals_in_clear_words() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let etcd = Etcd::start(1);
    for command in [
        &["user", "add", "root:r"][..],
        &["user", "grant-role", "root", "root"],
        &["auth", "enable"],
    ] {
        let (said, done) = etcd.ctl(command);
        assert!(done, "{said}");
    }
    let dir = tempfile::tempdir().unwrap();
    // The cluster's user must be able to read it.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(dir.path(), open).unwrap();
    let password = dir.path().join("password");
    std::fs::write(&password, "wrong\n").unwrap();
    let password = password.to_str().unwrap();
    let endpoints = etcd.endpoints();
    let tls = endpoints.replace("http:", "https:");
    for (arguments, words) in [
        (vec!["--endpoints", &endpoints], "set coordinator.username"),
        (
            vec![
                "--endpoints",
                &endpoints,
                "--etcd-user",
                "root",
                "--etcd-password-file",
                password,
            ],
            "check coordinator.username and the password",
        ),
        (vec!["--endpoints", &tls], "TLS"),
        (vec!["--endpoints", "http://127.0.0.1:1"], "refused"),
        (vec!["--endpoints", "127.0.0.1:1"], "write http://host:port"),
        (vec![], "endpoints"),
    ] {
        let c = Cluster {
            dir: directory("etcd-refused"),
            base_port: harness::free_base_port(),
        };
        let base = c.base_port.to_string();
        let fixed = [
            "up",
            "--no-sample",
            "--base-port",
            &base,
            "--coordinator",
            "etcd",
        ];
        let out = c.craton(&[&fixed, &arguments[..]].concat());
        let said = text(&out);
        assert!(
            !out.status.success() && said.contains(words),
            "{words}: {said}"
        );
        assert!(!c.dir.exists(), "nothing is left behind: {said}");
    }
}
