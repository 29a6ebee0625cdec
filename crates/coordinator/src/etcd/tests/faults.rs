use std::sync::Arc;

use craton_core::Term;
use tokio::time::{Instant, sleep};

use super::server::{Members, PATIENCE, Servers, members, place, stop};
use crate::api::{Coordinator, CoordinatorError, Renewal, TxnOutcome};
use crate::conformance::put;
use crate::contest::{Contest, TTL};

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
        let due = Instant::now() + PATIENCE;
        let key = format!("round/{round}");
        let written = loop {
            match etcd.txn(put(&key, 0, "1")).await {
                Ok(TxnOutcome::Committed(revision)) => break revision,
                Ok(TxnOutcome::Conflict) => break 0,
                Err(e) => assert!(Instant::now() < due, "{e}"),
            }
        };
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
    let Ok(TxnOutcome::Committed(gone)) = writer.txn(put("gone", 0, "1")).await else {
        panic!("no write")
    };
    let mut watch = watcher.watch();
    let seen = watch.wait_for(|s| s.get("gone").is_some());
    tokio::time::timeout(PATIENCE, seen).await.unwrap().unwrap();
    drop(watch);
    // The connections break; the server comes back with a history that begins later.
    servers.kill(0);
    servers.restart(0);
    let prefix = "/craton/test/data/";
    let (out, ok) = servers.ctl(&["del", &format!("{prefix}gone")]);
    assert!(ok, "{out}");
    let (out, ok) = servers.ctl(&["put", &format!("{prefix}new"), "2"]);
    assert!(ok, "{out}");
    let (out, ok) = servers.ctl(&["compaction", &(gone + 2).to_string()]);
    assert!(ok, "{out}");
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

/// etcd restored from a copy says so by its revision: what it holds is shown, and a lease that was held is neither taken
/// again nor refused. The same where its keys are gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_copy_and_no_keys_at_all() {
    let mut servers = Servers::start(1);
    let members = members(&place(&servers), 2).await;
    let (holder, other) = (members.nth(0), members.nth(1));
    assert!(other.renew(Term(1), TTL).await.is_ok());
    assert!(other.txn(put("then", 0, "1")).await.is_ok());
    let copy = servers.snapshot("copy");
    assert!(other.release(Term(1)).await.is_ok());
    assert!(holder.renew(Term(2), TTL).await.is_ok(), "taken");
    assert!(holder.renew(Term(2), TTL).await.is_ok(), "renewed");
    assert!(holder.txn(put("since", 0, "2")).await.is_ok());
    let mut watch = holder.watch();
    let seen = watch.wait_for(|s| s.get("since").is_some());
    tokio::time::timeout(PATIENCE, seen).await.unwrap().unwrap();
    let gone = |renewal: Result<Renewal, CoordinatorError>| match renewal {
        Err(CoordinatorError::Unavailable(why)) => why.contains("old copy"),
        _ => false,
    };

    servers.restore(&copy);
    let seen = watch.wait_for(|s| s.get("since").is_none() && s.get("then").is_some());
    tokio::time::timeout(PATIENCE, seen).await.unwrap().unwrap();
    assert!(gone(holder.renew(Term(2), TTL).await));
    // What was seen of a later beat says nothing about this one: the term that the copy names ends like any other.
    let due = Instant::now() + PATIENCE;
    while holder.free(Term(1)).await != Ok(true) {
        assert!(Instant::now() < due, "never free");
        sleep(TTL / 10).await;
    }
    holder.forget();
    assert!(holder.renew(Term(2), TTL).await.is_ok(), "by order");
    assert!(holder.renew(Term(2), TTL).await.is_ok());

    let (out, ok) = servers.ctl(&["del", "--prefix", "/craton/test/"]);
    assert!(ok, "{out}");
    let seen = watch.wait_for(|s| s.entries.is_empty());
    tokio::time::timeout(PATIENCE, seen).await.unwrap().unwrap();
    assert!(gone(holder.renew(Term(2), TTL).await));
    let (out, _) = servers.ctl(&["get", "--prefix", "/craton/test/", "--keys-only"]);
    assert_eq!(out.trim(), "", "nothing was taken again");
    stop(members).await;
}
