//! Two members and a witness: a voter without a database, as a daemon of its own and inside the proxy.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use craton::drill::recorder::longest_gap;
use craton::layout::address;
use craton::processes;
use craton::sessions::value;
use rustix::process::Signal;
use serde_json::Value;

#[path = "harness/mod.rs"]
mod harness;
#[path = "harness/rig.rs"]
mod rig;

use harness::text;
use rig::{Frozen, LIMIT, Rig, turn};

/// A witness of this name votes, and was heard just now.
fn votes(status: &Value, name: &str) -> bool {
    let all = status["witnesses"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    all.iter()
        .any(|w| w["name"] == name && w["voter"] == true && w["alive"] == true)
}

/// The leader's host dies under load: the other member leads, and nothing is lost.
fn lose_the_leader(rig: &Rig, run: i64) {
    let clients = rig.record(run);
    let leader = rig.leader();
    rig.lose_leader(&leader, || ());
    let (_, verdict) = clients.finish("the leader was lost");
    assert_eq!(verdict.lost, Vec::<u64>::new());
}

#[test]
fn two_members_lose_one_and_the_witness() {
    let _turn = turn();
    let rig = Rig::up("witness", &["--members", "2", "--witness"]);
    rig.cluster
        .wait_status("a witness", LIMIT, |s| votes(s, "w"));
    let members = text(&rig.cluster.craton(&["member", "list"]));
    assert!(members.contains("3 voters, 2 needed"), "{members}");
    assert!(members.contains("witness"), "{members}");
    lose_the_leader(&rig, 1);

    // Without the witness: no outage.
    let clients = rig.record(2);
    let leader = rig.leader();
    let term = rig.cluster.json(&["status"])["term"].clone();
    let life = rig.postmaster(&leader);
    let began = tokio::time::Instant::now();
    rig.hold_down("witness", LIMIT * 2);
    let witness = processes::running(&rig.layout, "witness").expect("a witness");
    assert!(witness.signal(Signal::KILL));
    let status = rig.cluster.wait_status("a silent witness", LIMIT, |s| {
        let warnings = s["warnings"].as_array().map_or(&[][..], Vec::as_slice);
        let silent = |w: &Value| w.as_str().is_some_and(|w| w.contains("the witness w"));
        warnings.iter().any(silent)
    });
    assert_eq!(status["leader"], leader.as_str());
    clients.wait_acknowledged("without the witness", 50);
    clients.no_error("without the witness");
    assert_eq!(status["term"], term, "no outage");
    assert_eq!(rig.postmaster(&leader), life, "PostgreSQL went on");
    let log = clients.recorder.log();
    let acknowledged: Vec<_> = log.writes.iter().map(|w| w.ended).collect();
    let gap = longest_gap(&acknowledged, began, tokio::time::Instant::now());
    eprintln!("without the witness: longest time without a commit {gap:?}");
    assert!(
        gap < Duration::from_secs(20),
        "writes stood still for {gap:?}"
    );
    rig.let_up("witness");
    rig.cluster
        .wait_status("the witness is back", LIMIT, |s| votes(s, "w"));
    let (_, verdict) = clients.finish("the witness was lost");
    assert_eq!(verdict.lost, Vec::<u64>::new());
    a_leader_started_in_place_lets_nobody_in(&rig);
}

/// A commit waits for a standby that is away when PostgreSQL crashes. Recovered, it would be seen by whoever logs in, and
/// be gone with this host's disk: nobody is let in before the standby has it.
fn a_leader_started_in_place_lets_nobody_in(rig: &Rig) {
    rig.durability(&["durability=strict"], "strict", 1);
    let leader = rig.leader();
    let away = rig.standbys(&leader).pop().unwrap();
    let port = rig.layout.postgres_port(&leader.parse().unwrap());
    let ask = |query: &str| rig.ask(port, query);
    ask("CREATE TABLE seen (); SELECT 'made'");
    rig.kill_host_for(&away, LIMIT * 2);
    rig.cluster.wait_status("the standby is away", LIMIT, |s| {
        let members = s["members"].as_array().map_or(&[][..], Vec::as_slice);
        members
            .iter()
            .any(|m| m["id"] == away.as_str() && m["agent_alive"] == false)
    });
    let writer = rig.session(port);
    let commit = rig.runtime.spawn(async move {
        writer
            .batch_execute("INSERT INTO seen DEFAULT VALUES")
            .await
    });
    let waiting = "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    rig.cluster.wait("a commit that waits", LIMIT, || {
        let waiting = ask(waiting);
        (waiting == "1").then_some(()).ok_or(waiting)
    });
    let client = rig.session(port);
    let pid = value(&client, "SELECT pg_backend_pid()::text");
    let pid = rig.runtime.block_on(pid).unwrap().parse().unwrap();
    let victim = processes::ProcessId::of(pid).expect("a session");
    assert!(victim.signal(Signal::KILL));
    assert!(rig.runtime.block_on(commit).unwrap().is_err());
    drop(client);
    rig.cluster
        .wait("it waits with what it recovered", LIMIT, || {
            let explained = text(&rig.cluster.craton(&["explain", &leader]));
            let waits = explained.contains("opens when the standbys have flushed");
            waits.then_some(()).ok_or(explained)
        });
    let refusal = || {
        let refused = rig.runtime.block_on(rig.login.connect(port)).map(drop);
        format!("{:?}", refused.expect_err("somebody was let in"))
    };
    let is_plain = |why: &str| why.contains("28000") || why.contains("pg_hba.conf");
    harness::watch(Duration::from_secs(1), || {
        let why = refusal();
        // A busy machine may not answer in time: then nobody was let in either.
        assert!(is_plain(&why) || why.starts_with("TimedOut"), "{why}");
    });
    rig.cluster.wait("a refusal in plain words", LIMIT, || {
        let why = refusal();
        is_plain(&why).then_some(()).ok_or(why)
    });
    assert_eq!(rig.cluster.json(&["status"])["writable"], false);
    rig.power_on(&away);
    let status = rig.wait_whole();
    assert_eq!(status["leader"], leader.as_str());
    assert_eq!(ask("SELECT count(*)::text FROM seen"), "1");
}

/// A daemon gets a table for a witness, named x, and is started again.
fn becomes_a_witness(rig: &Rig, daemon: &str) {
    let file = rig.layout.conf().join(format!("{daemon}.toml"));
    let mut settings = std::fs::read_to_string(&file).unwrap();
    let dir = rig.layout.witness();
    std::fs::create_dir(&dir).unwrap();
    let owner = std::fs::metadata(&file).unwrap();
    std::os::unix::fs::chown(&dir, Some(owner.uid()), Some(owner.gid())).unwrap();
    write!(
        settings,
        "\n[{daemon}.witness]\ncluster = \"local\"\nname = \"x\"\ndir = \"{}\"\nlisten = \"{}\"\n\
         agents = {:?}\nsecrets = \"{}\"\n",
        dir.display(),
        address(rig.layout.witness_port()),
        rig.layout.api_addresses(),
        rig.layout.secrets().display(),
    )
    .unwrap();
    std::fs::write(&file, settings).unwrap();
    let running = processes::running(&rig.layout, daemon).expect("the daemon");
    assert!(running.signal(Signal::TERM));
    rig.cluster
        .wait_status("a witness in it", LIMIT, |s| votes(s, "x"));
}

#[test]
fn the_proxy_is_a_witness_too() {
    let _turn = turn();
    let rig = Rig::up("witness-in-proxy", &["--members", "2"]);
    becomes_a_witness(&rig, "proxy");
    lose_the_leader(&rig, 1);
    // Taken out as any member; the proxy goes on.
    let out = rig.cluster.craton(&["member", "remove", "x", "--yes"]);
    rig.cluster.expect_ok(&out, "member remove x");
    assert_eq!(
        rig.cluster.sql(&["-d", "postgres", "-Atc", "SELECT 1"]),
        "1"
    );
}

/// Two hosts with data; the third has the backup, which is a synchronous copy and a witness.
#[test]
fn the_third_host_votes_and_holds_what_is_acknowledged() {
    let _turn = turn();
    let rig = Rig::up("third", &["--members", "2", "--synchronous-backup"]);
    becomes_a_witness(&rig, "backup");

    // The leader is lost when the backup alone has the newest rows.
    let clients = rig.record(1);
    let leader = rig.leader();
    let standby = rig.standbys(&leader).pop().unwrap();
    let frozen = Frozen::new(rig.senders(&leader, Some(&standby)));
    clients.watch(Duration::from_millis(100));
    clients.wait_acknowledged("on the backup alone", 20);
    rig.lose_leader(&leader, || drop(frozen));
    let (_, verdict) = clients.finish("the backup alone had the newest rows");
    assert_eq!(verdict.lost, Vec::<u64>::new());

    // The standby is away for so long that the backup is all of V; then the leader is lost, and the standby, which
    // missed everything, is all there is.
    let clients = rig.record(2);
    let leader = rig.leader();
    let standby = rig.standbys(&leader).pop().unwrap();
    rig.kill_host_for(&standby, LIMIT * 2);
    rig.cluster
        .wait_status("the backup is all of V", LIMIT, |s| {
            s["sync"]["members"] == serde_json::json!(["backup"])
        });
    clients.wait_acknowledged("without the standby", 50);
    rig.kill_host_for(&leader, LIMIT * 2);
    rig.power_on(&standby);
    rig.cluster
        .wait_status("who missed everything leads", LIMIT, |s| {
            s["writable"] == true && s["leader"] == standby.as_str()
        });
    rig.power_on(&leader);
    let (_, verdict) = clients.finish("the standby missed everything");
    assert_eq!(verdict.lost, Vec::<u64>::new());
}
