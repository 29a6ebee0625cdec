use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use craton_core::Term;
use tokio::time::{Instant, sleep};

use super::cluster::{Cluster, PATIENCE, id, until};
use crate::api::{CALL_TIMEOUT, Coordinator, CoordinatorError, LeaseHint, TxnOutcome};
use crate::conformance::put;
use crate::embedded::Embedded;
use crate::raft::Timings;

const TTL: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn losing_the_leader_loses_nothing() {
    let mut cluster = Cluster::start(3).await;
    cluster.write(&id(0), "a", "1").await;
    let leader = cluster.leader().await;
    let other = (0..3).map(id).find(|n| *n != leader).unwrap();
    cluster.kill(&leader);
    cluster.sees(&other, "a", "1").await;
    cluster.write(&other, "b", "2").await;
    cluster.start_node(&leader).await;
    cluster.sees(&leader, "b", "2").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_and_restart_in_any_order() {
    let mut cluster = Cluster::start(3).await;
    for round in 0..4 {
        let (first, second) = (id(round % 3), id((round + 1) % 3));
        let key = format!("round-{round}");
        cluster.write(&id((round + 2) % 3), &key, "x").await;
        cluster.kill(&first);
        cluster.kill(&second);
        let left = &cluster.nodes[&id((round + 2) % 3)];
        let alone = left.txn(put("alone", 0, "x")).await;
        assert!(
            matches!(
                alone,
                Err(CoordinatorError::Unavailable(_) | CoordinatorError::Unknown(_))
            ),
            "{alone:?}"
        );
        cluster.start_node(&second).await;
        cluster.sees(&second, &key, "x").await;
        cluster.start_node(&first).await;
        cluster.sees(&first, &key, "x").await;
    }
    cluster.stop().await;
}

/// Every flush takes longer than a call may: what comes to the disk late is there all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_note_that_comes_late_to_the_disk_counts() {
    let cluster = Cluster::start(3).await;
    cluster.write(&id(0), "a", "1").await;
    let (me, holder) = (id(0), Arc::clone(&cluster.nodes[&id(0)]));
    // The log grows by other things too.
    let noted = || {
        let log = std::fs::read(cluster.file(&me)).unwrap();
        String::from_utf8_lossy(&log).contains("\"ttl_max_ms\":1000")
    };
    let renews = || async { holder.renew(Term(1), TTL).await.is_ok() };
    let stall = |on| cluster.faults[&me].stalled.store(on, SeqCst);
    stall(true);
    // The other two promise, once both are there; the first promise of this voter waits for its note until the call gives up.
    until("the first renewal", renews).await;
    let began = Instant::now();
    while began.elapsed() < CALL_TIMEOUT + Duration::from_millis(500) {
        until("a renewal", renews).await;
        sleep(Duration::from_millis(50)).await;
    }
    assert!(!matches!(holder.lease_hint(), LeaseHint::Held { .. }));
    stall(false);
    until("the note is on disk", || async { noted() }).await;
    // From here on no further note gets there.
    stall(true);
    until("its own promise", || async {
        renews().await && matches!(holder.lease_hint(), LeaseHint::Held { term: Term(1), .. })
    })
    .await;
    stall(false);
    cluster.stop().await;
}

/// The acceptance condition: renewals do not wait for the disk of the Raft leader, nor does Raft.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_disk_of_the_leader_stops_neither_renewals_nor_commits() {
    // A machine that is busy elsewhere for half a second has no say in who leads here.
    let timings = Timings {
        election_timeout: Duration::from_secs(3),
        ..Timings::default()
    };
    let cluster = Cluster::start_with(3, timings).await;
    cluster.write(&id(0), "a", "1").await;
    for attempt in 1_u64.. {
        match five_seconds_stalled(&cluster, attempt).await {
            Ok(()) => break,
            // A machine that stands still spoils one try; a dependence on the disk spoils all.
            Err(why) => assert!(attempt < 5, "{why}"),
        }
    }
    cluster.stop().await;
}

async fn five_seconds_stalled(cluster: &Cluster, attempt: u64) -> Result<(), String> {
    let leader = cluster.leader().await;
    let holder = &cluster.nodes[&leader];
    let term = holder.status().term;
    until("the first renewal", || async {
        holder.renew(Term(attempt), TTL).await.is_ok()
    })
    .await;
    let failed = holder.counters().renewals_failed;
    cluster.faults[&leader].stalled.store(true, SeqCst);
    let done = renews_and_commits(holder, attempt).await;
    cluster.faults[&leader].stalled.store(false, SeqCst);
    let (renewals, commits) = done?;
    let status = holder.status();
    if (status.leader.as_ref(), status.term) != (Some(&leader), term) {
        return Err(format!(
            "leadership moved: {:?}, term {} after {term}",
            status.leader, status.term
        ));
    }
    let late = holder.counters().renewals_failed - failed;
    if late > 0 {
        return Err(format!("{late} renewals failed"));
    }
    eprintln!("5 s stall: {renewals} renewals, {commits} commits");
    Ok(())
}

/// For five seconds; how many of each.
async fn renews_and_commits(holder: &Embedded, attempt: u64) -> Result<(u32, u32), String> {
    let began = Instant::now();
    let (mut renewals, mut commits) = (0, 0);
    while began.elapsed() < Duration::from_secs(5) {
        let renewed = holder.renew(Term(attempt), TTL).await;
        renewed.map_err(|e| format!("renewal {renewals}: {e}"))?;
        renewals += 1;
        let key = format!("stalled-{attempt}-{commits}");
        let outcome = holder.txn(put(&key, 0, "x")).await;
        if !matches!(outcome, Ok(TxnOutcome::Committed(_))) {
            return Err(format!("{key}: {outcome:?}"));
        }
        commits += 1;
        sleep(Duration::from_millis(50)).await;
    }
    Ok((renewals, commits))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_disk_silences_its_voter_and_the_others_go_on() {
    let cluster = Cluster::start(3).await;
    cluster.write(&id(0), "a", "1").await;
    let leader = cluster.leader().await;
    cluster.faults[&leader].failing.store(true, SeqCst);
    // One that is silenced hears of no other leader either: its host asks in vain until it is started again.
    let other = (0..3).map(id).find(|n| *n != leader).unwrap();
    cluster.write(&other, "b", "2").await;
    for i in 0..3 {
        if id(i) != leader {
            cluster.write(&id(i), &format!("c{i}"), "3").await;
        }
    }
    until("the fault shows", || async {
        cluster.nodes[&leader].status().fault.is_some()
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minority_says_unavailable_or_unknown_but_never_committed() {
    let mut cluster = Cluster::start(3).await;
    cluster.write(&id(0), "a", "1").await;
    let leader = cluster.leader().await;
    let others: Vec<_> = (0..3).map(id).filter(|n| *n != leader).collect();
    for other in &others {
        cluster.kill(other);
    }
    let node = Arc::clone(&cluster.nodes[&leader]);
    // Still leader in its own eyes: appended, so the outcome is open. One that stood still may have stepped down.
    let first = node.txn(put("b", 0, "2")).await;
    assert!(
        matches!(
            first,
            Err(CoordinatorError::Unknown(_) | CoordinatorError::Unavailable(_))
        ),
        "{first:?}"
    );
    until("it steps down", || async { node.status().leader.is_none() }).await;
    let second = node.txn(put("c", 0, "3")).await;
    assert!(
        matches!(second, Err(CoordinatorError::Unavailable(_))),
        "{second:?}"
    );
    let read = node.read().await;
    assert!(
        matches!(read, Err(CoordinatorError::Unavailable(_))),
        "{read:?}"
    );
    let renewed = node.renew(Term(1), TTL).await;
    assert!(
        matches!(renewed, Err(CoordinatorError::Unavailable(_))),
        "{renewed:?}"
    );
    for other in &others {
        cluster.start_node(other).await;
    }
    let open = matches!(first, Err(CoordinatorError::Unknown(_)));
    until("what is unavailable has not happened", || async {
        let Ok(seen) = node.read().await else {
            return false;
        };
        assert!(open || seen.get("b").is_none(), "{first:?}");
        assert!(seen.get("c").is_none(), "{second:?}");
        true
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarted_voters_call_nothing_free_within_a_ttl() {
    let long = Duration::from_secs(3);
    let mut cluster = Cluster::start(3).await;
    crate::conformance::settle(&cluster.handles()).await;
    let holder = Arc::clone(&cluster.nodes[&id(0)]);
    until("the first renewal", || async {
        holder.renew(Term(1), long).await.is_ok()
    })
    .await;
    let promised = Cell::new(Instant::now());
    until("another renewal", || async {
        promised.set(Instant::now());
        holder.renew(Term(1), long).await.is_ok()
    })
    .await;
    drop(holder);
    // All forget their promises.
    for i in 0..3 {
        cluster.kill(&id(i));
    }
    for i in 0..3 {
        cluster.start_node(&id(i)).await;
    }
    let asker = Arc::clone(&cluster.nodes[&id(1)]);
    until("free at last", || async {
        let free = asker.free(Term(1)).await == Ok(true);
        let since = promised.get().elapsed();
        assert!(!free || since >= long, "free after {since:?}");
        free
    })
    .await;
    until("it is refused", || async {
        let late = asker.renew(Term(1), TTL).await;
        assert!(late.is_err(), "term 1 is over");
        matches!(late, Err(CoordinatorError::Refused(_)))
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_entries_are_compacted_and_survive_restarts() {
    let mut cluster = Cluster::start(1).await;
    crate::conformance::settle(&cluster.handles()).await;
    let node = Arc::clone(&cluster.nodes[&id(0)]);
    let (mut revision, mut i, mut unsure) = (0, 0_u32, false);
    let mut due = Instant::now() + PATIENCE;
    while i < 2500 {
        match node.txn(put("k", revision, &i.to_string())).await {
            Ok(TxnOutcome::Committed(r)) => {
                (revision, i, unsure) = (r, i + 1, false);
                due = Instant::now() + PATIENCE;
            }
            // Done or not: a read tells.
            other => {
                unsure |= matches!(other, Err(CoordinatorError::Unknown(_)));
                let passes = unsure || matches!(other, Err(CoordinatorError::Unavailable(_)));
                assert!(passes && Instant::now() < due, "{i}: {other:?}");
                if let Ok(seen) = node.read().await
                    && let Some(at) = seen.get("k").filter(|v| v.value == i.to_string())
                {
                    (revision, i, unsure) = (at.mod_revision, i + 1, false);
                    due = Instant::now() + PATIENCE;
                }
            }
        }
    }
    assert!(
        std::fs::metadata(cluster.file(&id(0))).unwrap().len() < 1024 * 1024,
        "the log is bounded"
    );
    drop(node);
    cluster.kill(&id(0));
    cluster.start_node(&id(0)).await;
    cluster.sees(&id(0), "k", "2499").await;
    assert_eq!(cluster.nodes[&id(0)].watch().borrow().revision, 2500);
    cluster.stop().await;
}
