use std::sync::Arc;

use craton_core::Term;
use tokio::time::{Instant, sleep};

use super::server::{Members, PATIENCE, Servers, ctl, done, members, place, soon, stop, write};
use crate::api::{Coordinator, CoordinatorError, Renewal};
use crate::conformance::put;
use crate::contest::{Contest, TTL};
use crate::etcd::Etcd;

async fn contest(servers: &Servers) -> (Contest, Members) {
    let members = members(&place(servers), 3).await;
    let contest = Contest::default();
    for (id, etcd) in &members.0 {
        contest.join(id.clone(), Arc::clone(etcd) as Arc<dyn Coordinator>);
    }
    contest.led_again("the start").await;
    (contest, members)
}

/// Leaders of etcd are paused for longer than the lease, and go on: what revokes etcd's own leases early.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_etcd_leader_that_goes_on_takes_no_lease_away() {
    let servers = Servers::start(3);
    let (contest, members) = contest(&servers).await;
    for _ in 0..3 {
        let leader = servers.leader();
        servers.pause(leader);
        sleep(TTL * 3).await;
        contest.led_again("an etcd leader was paused").await;
        servers.resume(leader);
        sleep(TTL).await;
        contest.led_again("it went on").await;
    }
    contest.end();
    stop(members).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_servers_and_a_lost_majority() {
    let mut servers = Servers::start(3);
    let (contest, members) = contest(&servers).await;
    for i in 0..3 {
        servers.kill(i);
        contest.led_again("one server was killed").await;
        servers.restart(i);
    }
    servers.kill(0);
    servers.kill(1);
    sleep(TTL * 2).await;
    let unreachable = members.nth(0).read().await;
    assert!(
        matches!(unreachable, Err(CoordinatorError::Unavailable(_))),
        "{unreachable:?}"
    );
    servers.restart(0);
    servers.restart(1);
    contest.led_again("the majority came back").await;
    contest.end();
    stop(members).await;
}

/// The endpoint that a watch hangs on falls silent without closing anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_leaves_an_endpoint_that_hangs() {
    let servers = Servers::start(3);
    let members = members(&place(&servers), 1).await;
    let etcd = members.nth(0);
    for round in 0..3 {
        servers.pause(round);
        let key = format!("round/{round}");
        let written = write(&etcd, &key).await;
        let mut watch = etcd.watch();
        let seen = watch.wait_for(|s| s.get(&key).is_some() && s.revision >= written);
        tokio::time::timeout(PATIENCE, seen).await.unwrap().unwrap();
        servers.resume(round);
    }
    stop(members).await;
}

/// Whoever was away while etcd compacted reads everything again, and deletions are seen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compaction_while_away() {
    let mut servers = Servers::start(1);
    let members = members(&place(&servers), 2).await;
    let (writer, watcher) = (members.nth(0), members.nth(1));
    let gone = write(&writer, "gone").await;
    let mut watch = watcher.watch();
    let seen = watch.wait_for(|s| s.get("gone").is_some());
    tokio::time::timeout(PATIENCE, seen).await.unwrap().unwrap();
    drop(watch);
    // The connections break; the server comes back with a history that begins later.
    servers.kill(0);
    servers.restart(0);
    let prefix = "/craton/test/data/";
    ctl(&servers, &["del", &format!("{prefix}gone")]).await;
    ctl(&servers, &["put", &format!("{prefix}new"), "2"]).await;
    ctl(&servers, &["compaction", &(gone + 2).to_string()]).await;
    let mut watch = watcher.watch();
    let seen = watch.wait_for(|s| s.get("gone").is_none() && s.get("new").is_some());
    tokio::time::timeout(PATIENCE, seen).await.unwrap().unwrap();
    stop(members).await;
}

/// A transaction that was sent and not answered is "unknown", one that could not be sent "unavailable".
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_and_unavailable_are_told_apart() {
    let mut servers = Servers::start(1);
    let members = members(&place(&servers), 1).await;
    let etcd = members.nth(0);
    servers.pause(0);
    let unanswered = etcd.txn(put("a", 0, "1")).await;
    assert!(
        matches!(unanswered, Err(CoordinatorError::Unknown(_))),
        "{unanswered:?}"
    );
    servers.resume(0);
    servers.kill(0);
    let due = Instant::now() + PATIENCE;
    loop {
        // The first try may still meet a connection that has not heard of the end.
        match etcd.txn(put("b", 0, "1")).await {
            Err(CoordinatorError::Unavailable(_)) => break,
            other => assert!(Instant::now() < due, "{other:?}"),
        }
    }
    servers.restart(0);
    let due = Instant::now() + PATIENCE;
    let seen = loop {
        match etcd.read().await {
            Ok(seen) => break seen,
            Err(e) => assert!(Instant::now() < due, "{e}"),
        }
    };
    assert!(
        seen.get("b").is_none(),
        "what is unavailable has not happened"
    );
    stop(members).await;
}

async fn renewed(etcd: &Etcd, term: Term) {
    let ask = async || etcd.renew(term, TTL).await;
    done("a renewal", ask).await;
}

/// Neither renewed, nor refused: etcd is not what it was.
async fn gone(holder: &Etcd) {
    let ask = async || holder.renew(Term(2), TTL).await;
    let good = |told: &Result<Renewal, CoordinatorError>| match told {
        Err(CoordinatorError::Unavailable(why)) => why.contains("old copy"),
        Err(CoordinatorError::Unknown(_)) => false,
        other => panic!("{other:?}"),
    };
    soon("the lease is gone", ask, good).await;
}

/// etcd restored from a copy says so by its revision: what it holds is shown, and a lease that was held is neither taken
/// again nor refused. The same where its keys are gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_copy_and_no_keys_at_all() {
    let mut servers = Servers::start(1);
    let members = members(&place(&servers), 2).await;
    let (holder, other) = (members.nth(0), members.nth(1));
    renewed(&other, Term(1)).await;
    write(&other, "then").await;
    let copy = servers.snapshot("copy");
    done("its end", async || other.release(Term(1)).await).await;
    // Taken, and renewed.
    renewed(&holder, Term(2)).await;
    renewed(&holder, Term(2)).await;
    write(&holder, "since").await;
    let mut watch = holder.watch();
    let seen = watch.wait_for(|s| s.get("since").is_some());
    tokio::time::timeout(PATIENCE, seen).await.unwrap().unwrap();

    servers.restore(&copy);
    let seen = watch.wait_for(|s| s.get("since").is_none() && s.get("then").is_some());
    tokio::time::timeout(PATIENCE, seen).await.unwrap().unwrap();
    gone(&holder).await;
    // What was seen of a later beat says nothing about this one: the term that the copy names ends like any other.
    let due = Instant::now() + PATIENCE;
    while holder.free(Term(1)).await != Ok(true) {
        assert!(Instant::now() < due, "never free");
        sleep(TTL / 10).await;
    }
    holder.forget();
    // By order.
    renewed(&holder, Term(2)).await;
    renewed(&holder, Term(2)).await;

    ctl(&servers, &["del", "--prefix", "/craton/test/"]).await;
    let seen = watch.wait_for(|s| s.entries.is_empty());
    tokio::time::timeout(PATIENCE, seen).await.unwrap().unwrap();
    gone(&holder).await;
    let all = ["get", "--prefix", "/craton/test/", "--keys-only"];
    let out = ctl(&servers, &all).await;
    assert_eq!(out.trim(), "", "nothing was taken again");
    stop(members).await;
}
