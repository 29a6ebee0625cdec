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
    let log = clients.recorder.log();
    let acknowledged: Vec<_> = log.writes.iter().map(|w| w.ended).collect();
    let gap = longest_gap(&acknowledged, began, tokio::time::Instant::now());
    eprintln!("without the witness: longest time without a commit {gap:?}");
    assert!(
        gap < Duration::from_secs(4),
        "writes stood still for {gap:?}"
    );
    rig.let_up("witness");
    rig.cluster
        .wait_status("the witness is back", LIMIT, |s| votes(s, "w"));
    let (_, verdict) = clients.finish("the witness was lost");
    assert_eq!(verdict.lost, Vec::<u64>::new());
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
