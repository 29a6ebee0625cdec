//! What each durability mode keeps when the leader is lost, and what it costs: the finished binary, real PostgreSQL,
//! clients that write all the while, and a look at every member afterwards.
//!
//! Before the leader is killed its WAL senders are stopped, so that for a moment its WAL goes nowhere. That is the
//! moment in which the modes differ: `async` goes on saying "committed", and loses those rows; the others wait.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

use std::time::{Duration, Instant};

use craton::drill::recorder::longest_gap;
use craton::processes;
use craton::sessions::value;
use rustix::process::Signal;

#[path = "harness/mod.rs"]
mod harness;
#[path = "harness/rig.rs"]
mod rig;

use harness::text;
use rig::{Clients, Frozen, LIMIT, Rig, turn};

/// The default of `max_lag_bytes`.
const MAX_LAG_BYTES: usize = 16 << 20;

/// What a row of the recorder takes in WAL at least: heap, index and commit records.
const ROW_WAL_BYTES: usize = 200;

#[test]
fn each_mode_keeps_what_it_says() {
    let _turn = turn();
    let rig = Rig::up("modes", &["--durability", "async"]);

    // From mode to mode under load: no client sees anything of it.
    let clients = rig.record(1);
    for (mode, acks) in [("quorum", 1), ("strict", 1), ("async", 0)] {
        rig.durability(&[&format!("durability={mode}")], mode, acks);
        clients.wait_acknowledged(mode, 50);
    }
    clients.no_error("from mode to mode");
    let (_, verdict) = clients.finish("from mode to mode");
    assert_eq!(verdict.lost, Vec::<u64>::new());

    // `async`: what was not sent is lost, and that is no more than the bound.
    let clients = rig.record(2);
    let unsent = kill_while_nothing_is_sent(&rig, &clients, true);
    let (_, verdict) = clients.finish("async");
    assert!(
        unsent >= 20 && !verdict.lost.is_empty(),
        "{unsent} rows were acknowledged while no WAL was sent, and none is lost: the fault had no effect"
    );
    let most = MAX_LAG_BYTES / ROW_WAL_BYTES;
    assert!(verdict.lost.len() <= most, "{} lost", verdict.lost.len());

    for (run, mode) in [(3, "quorum"), (4, "strict")] {
        // A standby that is frozen counts until the leader is lost, however long the machine takes for that.
        let settings = [&format!("durability={mode}"), "standby_grace_ms=30000"];
        rig.durability(&settings, mode, 1);
        rig.wait_whole();
        let clients = rig.record(run);
        let unsent = kill_while_nothing_is_sent(&rig, &clients, false);
        assert_eq!(unsent, 0, "{mode}: acknowledged without a standby");
        let (_, verdict) = clients.finish(mode);
        assert_eq!(verdict.lost, Vec::<u64>::new(), "{mode}");
    }
    let out = rig
        .cluster
        .craton(&["config", "set", "standby_grace_ms=2000"]);
    rig.cluster.expect_ok(&out, "config set");
    a_standby_is_gone(&rig);
    a_session_crashes(&rig);
}

/// A session that crashes ends all of PostgreSQL, and another member takes over: it does not start again by itself, with
/// commits that nobody has. Where the machine was too slow for another, the same member starts it anew: not every time.
fn a_session_crashes(rig: &Rig) {
    rig.durability(&["durability=quorum", "sync_standbys=1"], "quorum", 1);
    let another_leads = (6..10).any(|run| {
        rig.wait_whole();
        is_handed_over_by_a_crash(rig, run)
    });
    assert!(another_leads, "{}", rig.cluster.logs());
}

fn is_handed_over_by_a_crash(rig: &Rig, run: i64) -> bool {
    let leader = rig.leader();
    let port = rig.layout.postgres_port(&leader.parse().unwrap());
    assert_eq!(rig.ask(port, "SHOW restart_after_crash"), "off");
    let clients = rig.record(run);
    let life = rig.postmaster(&leader);
    let client = rig.session(port);
    let pid = value(&client, "SELECT pg_backend_pid()::text");
    let pid = rig.runtime.block_on(pid).unwrap().parse().unwrap();
    let victim = processes::ProcessId::of(pid).expect("the session's process");
    assert!(victim.signal(Signal::KILL));
    let status = rig.wait_served_again(&leader, life);
    let after = status["leader"].as_str().unwrap();
    eprintln!("{victim:?} on {leader} crashed: {after} leads");
    let (_, verdict) = clients.finish("a session crashed");
    assert_eq!(verdict.lost, Vec::<u64>::new());
    after != leader
}

/// Stops the leader's WAL senders and kills its host a moment later. How many rows that were sent in between were
/// acknowledged.
fn kill_while_nothing_is_sent(rig: &Rig, clients: &Clients<'_>, goes_on: bool) -> usize {
    let leader = rig.leader();
    let frozen = Frozen::new(rig.senders(&leader, None));
    // What was on its way when the senders were stopped is acknowledged still, however late.
    clients.watch(Duration::from_millis(100));
    let since = tokio::time::Instant::now();
    if goes_on {
        // One row of each client may have been on its way.
        clients.wait_acknowledged("async without standbys", 30);
    } else {
        clients.watch(Duration::from_millis(1500));
    }
    let unsent = clients.acknowledged_of(since);
    rig.lose_leader(&leader, || drop(frozen));
    unsent
}

/// `strict` with k = 2 of two standbys: without one of them commits wait, and nobody is told otherwise.
fn a_standby_is_gone(rig: &Rig) {
    rig.durability(&["sync_standbys=2"], "strict", 2);
    let clients = rig.record(5);
    let leader = rig.leader();
    let gone = rig.standbys(&leader).pop().unwrap();
    rig.kill_host_for(&gone, LIMIT * 2);
    // What was on its way may come to an end; nothing that is sent while the standby is away is acknowledged.
    clients.watch(Duration::from_millis(100));
    let since = tokio::time::Instant::now();
    clients.watch(Duration::from_millis(1500));
    let while_away = clients.acknowledged_of(since);
    assert_eq!(while_away, 0, "acknowledged with {gone} away");
    rig.cluster.wait("it says why", LIMIT, || {
        let explained = text(&rig.cluster.craton(&["explain"]));
        let said = explained.contains("writes wait");
        said.then_some(()).ok_or(explained)
    });
    rig.cluster.wait_status("what would come next", LIMIT, |s| {
        let next = s["next"].as_str().unwrap_or_default();
        next.contains("1 of 3 voters would be left, and 2 are needed")
    });
    rig.power_on(&gone);
    clients.wait_acknowledged("the standby is back", 50);
    assert_eq!(rig.leader(), leader, "the leader had no reason to go");
    clients.no_error("a standby was gone");
    let (_, verdict) = clients.finish("strict, a standby gone");
    assert_eq!(verdict.lost, Vec::<u64>::new());
}

/// Commits wait for any one of two standbys and the backup daemon, and the newest are in the backup alone.
#[test]
fn the_backup_alone_has_the_newest_rows() {
    let _turn = turn();
    let rig = Rig::up("receiver", &["--synchronous-backup"]);
    let clients = rig.record(1);
    let leader = rig.leader();
    let standbys = rig.standbys(&leader);
    let both = standbys.iter().flat_map(|m| rig.senders(&leader, Some(m)));
    let frozen = Frozen::new(both.collect());
    clients.watch(Duration::from_millis(100));
    clients.wait_acknowledged("on the backup alone", 20);
    rig.lose_leader(&leader, || drop(frozen));
    let (_, verdict) = clients.finish("the backup alone had the newest rows");
    assert_eq!(verdict.lost, Vec::<u64>::new());
    eprintln!("{}", rig.history("elected").last().unwrap());
    let logs = rig.cluster.whole_logs();
    assert!(
        logs.contains("getting the missing WAL out of the backup"),
        "nobody had to get WAL from the backup: the fault had no effect\n{logs}"
    );

    // A copy that dies costs nobody a commit, and counts again when it is back.
    let clients = rig.record(2);
    let daemon = processes::running(&rig.layout, "backup").expect("the backup daemon");
    assert!(daemon.signal(Signal::KILL));
    clients.wait_acknowledged("without the backup", 50);
    clients.no_error("the backup daemon died");
    let (_, verdict) = clients.finish("the backup daemon died");
    assert_eq!(verdict.lost, Vec::<u64>::new());
    // It is taken out as any member.
    let out = rig.cluster.craton(&["member", "remove", "backup", "--yes"]);
    rig.cluster.expect_ok(&out, "member remove backup");
}

#[test]
fn promises_and_a_member_that_never_leads() {
    let _turn = turn();
    // Four voters: two agents that stand still leave no majority, and a standby that can be asked.
    let rig = Rig::up("holders", &["--members", "4"]);
    the_coordinator_has_no_majority(&rig);
    a_member_that_never_leads_holds_the_most(&rig);
}

/// The agents stand still, their PostgreSQL goes on: with one standby that promises the leader goes on, without any
/// it must not.
fn the_coordinator_has_no_majority(rig: &Rig) {
    let clients = rig.record(1);
    let leader = rig.leader();
    let standbys = rig.standbys(&leader);
    let term = rig.cluster.json(&["status"])["term"].clone();
    let life = rig.postmaster(&leader);
    let began = tokio::time::Instant::now();
    let frozen = Frozen::new(standbys[..2].iter().map(|m| rig.agent(m)).collect());
    let status = rig.cluster.wait_status("life on promises", LIMIT, |s| {
        s["lease"]["promises_ms"]
            .as_u64()
            .is_some_and(|ms| ms >= 5000)
    });
    assert_eq!(status["leader"], leader.as_str());
    assert_eq!(status["writable"], true);
    clients.wait_acknowledged("on promises", 50);
    clients.no_error("on promises");
    assert_eq!(status["term"], term, "no outage");
    assert_eq!(rig.postmaster(&leader), life, "PostgreSQL went on");
    let acknowledged: Vec<tokio::time::Instant> = clients
        .recorder
        .log()
        .writes
        .iter()
        .map(|w| w.ended)
        .collect();
    let gap = longest_gap(&acknowledged, began, tokio::time::Instant::now());
    eprintln!("on promises: longest time without a commit {gap:?}");
    // On a busy machine a flush takes its time. That writes went on while the agents stood still was seen above.
    assert!(
        gap < Duration::from_secs(20),
        "writes stood still for {gap:?}"
    );

    // The last that could promise: the leader cannot know any more whether somebody else leads.
    let last = Frozen::new(vec![rig.agent(&standbys[2])]);
    let deadline = Instant::now() + LIMIT;
    while rig.is_writable(&leader) {
        assert!(
            Instant::now() < deadline,
            "{leader} goes on without lease and promises\n{}",
            rig.cluster.logs()
        );
    }
    drop((frozen, last));
    let (_, verdict) = clients.finish("without a coordinator");
    assert_eq!(verdict.lost, Vec::<u64>::new());
    // What cannot be done is tried at a measured pace, and said once.
    let log = rig.layout.log_of(&format!("node-{leader}"));
    let log = std::fs::read_to_string(log).unwrap();
    let said = log.matches("the voters could not be asked").count();
    assert!(said < 50, "said {said} times");
}

/// The member with priority 0 alone has what was acknowledged last: another gets it from there, and leads.
fn a_member_that_never_leads_holds_the_most(rig: &Rig) {
    let leader = rig.leader();
    let standbys = rig.standbys(&leader);
    let holder = &standbys[0];
    let settings = rig.layout.conf().join(format!("node-{holder}.toml"));
    let text = std::fs::read_to_string(&settings).unwrap();
    assert!(text.contains("priority = 100"), "{text}");
    std::fs::write(&settings, text.replace("priority = 100", "priority = 0")).unwrap();
    rig.agent(holder).signal(Signal::KILL);
    rig.cluster.wait_status("priority 0", LIMIT, |s| {
        let members = s["members"].as_array().map_or(&[][..], Vec::as_slice);
        members
            .iter()
            .any(|m| m["id"] == holder.as_str() && m["priority"] == 0)
    });
    rig.wait_whole();

    // Within the standbys' grace, or the others would be no part of V any more.
    let out = rig
        .cluster
        .craton(&["config", "set", "standby_grace_ms=30000"]);
    rig.cluster.expect_ok(&out, "config set");
    let clients = rig.record(2);
    let others = standbys[1..].iter();
    let senders = others.flat_map(|m| rig.senders(&leader, Some(m))).collect();
    let frozen = Frozen::new(senders);
    clients.watch(Duration::from_millis(100));
    clients.wait_acknowledged("on the holder alone", 20);
    let after = rig.lose_leader(&leader, || drop(frozen));
    assert_ne!(after["leader"], holder.as_str(), "priority 0 leads");
    let (_, verdict) = clients.finish("a member that never leads held the most");
    assert_eq!(verdict.lost, Vec::<u64>::new());
    let elected = rig.history("elected");
    eprintln!("{}", elected.last().unwrap());
    let got = rig.cluster.whole_logs();
    assert!(
        got.contains("getting the missing WAL"),
        "nobody had to get WAL from {holder}: the fault had no effect\n{got}"
    );
}
