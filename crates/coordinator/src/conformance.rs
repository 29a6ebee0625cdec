//! What every backend has to do, as one suite. It panics at the first difference, so it belongs into tests.
//!
//! The suite is given the handles of all members of one new, empty cluster. Terms are used in ascending
//! order, since what is free stays free.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use craton_core::Term;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::api::{
    CALL_TIMEOUT, Compare, Coordinator, CoordinatorError, LeaseHint, Op, Txn, TxnOutcome,
};

/// One member's handle, with its name.
pub type Handle = (craton_core::MemberId, Arc<dyn Coordinator>);

/// How long anything may take to become true.
const PATIENCE: Duration = Duration::from_secs(20);

/// The lease that the suite takes. Long enough that a busy machine does not lose it between two steps.
const TTL: Duration = Duration::from_millis(1500);

/// Runs all of it, in order.
///
/// # Panics
/// At the first difference.
pub async fn run(members: &[Handle]) {
    settle(members).await;
    transactions(members).await;
    concurrent_increments(members).await;
    watches(members).await;
    leases(members).await;
    releases(members).await;
    presence(members).await;
}

fn first(members: &[Handle]) -> &Arc<dyn Coordinator> {
    &nth(members, 0).1
}

fn nth(members: &[Handle], n: usize) -> &Handle {
    assert!(!members.is_empty(), "a cluster has members");
    members
        .iter()
        .cycle()
        .nth(n)
        .unwrap_or_else(|| unreachable!("a cycle of something never ends"))
}

/// A transaction that writes one key.
pub fn put(key: &str, mod_revision: u64, value: &str) -> Txn {
    let compare = Compare {
        key: key.to_owned(),
        mod_revision,
    };
    Txn {
        compares: vec![compare],
        ops: vec![Op::Put {
            key: key.to_owned(),
            value: value.to_owned(),
        }],
    }
}

/// Tries until every member serves reads.
///
/// # Panics
/// When one does not in time.
pub async fn settle(members: &[Handle]) {
    let due = Instant::now() + PATIENCE;
    for (name, member) in members {
        while let Err(e) = member.read().await {
            assert!(Instant::now() < due, "{name} serves no reads: {e}");
            sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn transactions(members: &[Handle]) {
    let a = first(members);
    let before = a.read().await.unwrap_or_else(|e| fail("read", &e)).revision;
    // Revisions grow; by how much is the backend's (etcd counts every key of everybody).
    let one = committed(
        a.txn(put("conformance/one", 0, "1")).await,
        "a key that does not exist compares as 0",
    );
    assert!(one > before, "revision {one} after {before}");
    assert_eq!(
        a.txn(put("conformance/one", 0, "2")).await,
        Ok(TxnOutcome::Conflict)
    );
    for (name, member) in members {
        let seen = member.read().await.unwrap_or_else(|e| fail("read", &e));
        let read = seen
            .get("conformance/one")
            .map(|v| (v.mod_revision, v.value.as_str()));
        assert_eq!(
            read,
            Some((one, "1")),
            "{name} must read what was committed"
        );
    }
    // All or nothing.
    let mut both = put("conformance/one", one, "3");
    both.compares.push(Compare {
        key: "conformance/absent".to_owned(),
        mod_revision: 9,
    });
    assert_eq!(a.txn(both).await, Ok(TxnOutcome::Conflict));
    let delete = Txn {
        compares: vec![Compare {
            key: "conformance/one".to_owned(),
            mod_revision: one,
        }],
        ops: vec![Op::Delete {
            key: "conformance/one".to_owned(),
        }],
    };
    let two = committed(nth(members, 1).1.txn(delete).await, "a delete");
    assert!(two > one, "revision {two} after {one}");
    let seen = a.read().await.unwrap_or_else(|e| fail("read", &e));
    assert!(seen.get("conformance/one").is_none());
    // Nothing changed: no new revision.
    assert_eq!(
        committed(a.txn(Txn::default()).await, "a transaction without changes"),
        two
    );
    let refused = a.txn(put("", 0, "")).await;
    assert!(
        matches!(refused, Err(CoordinatorError::Refused(_))),
        "an empty key: {refused:?}"
    );
}

/// Each member adds to one counter with compare-and-set: nothing is lost, nothing counts twice.
async fn concurrent_increments(members: &[Handle]) {
    const EACH: u64 = 10;
    let mut adders = JoinSet::new();
    for (_, member) in members {
        let member = Arc::clone(member);
        adders.spawn(async move {
            let mut added = 0;
            while added < EACH {
                let seen = member.read().await.unwrap_or_else(|e| fail("read", &e));
                let (revision, value) = seen.get("conformance/counter").map_or((0, 0), |v| {
                    (v.mod_revision, v.value.parse::<u64>().unwrap_or(0))
                });
                let next = (value + 1).to_string();
                match member
                    .txn(put("conformance/counter", revision, &next))
                    .await
                {
                    Ok(TxnOutcome::Committed(_)) => added += 1,
                    Ok(TxnOutcome::Conflict) => {}
                    Err(e) => fail("txn", &e),
                }
            }
        });
    }
    while let Some(done) = adders.join_next().await {
        assert!(done.is_ok(), "an adder failed");
    }
    let seen = first(members)
        .read()
        .await
        .unwrap_or_else(|e| fail("read", &e));
    let total = seen.get("conformance/counter").map(|v| v.value.clone());
    assert_eq!(total, Some((EACH * members.len() as u64).to_string()));
}

async fn watches(members: &[Handle]) {
    let made = first(members)
        .txn(put("conformance/watched", 0, "now"))
        .await;
    let Ok(TxnOutcome::Committed(revision)) = made else {
        return fail("txn", &made);
    };
    for (name, member) in members {
        let mut watch = member.watch();
        let seen = tokio::time::timeout(PATIENCE, watch.wait_for(|s| s.revision >= revision)).await;
        assert!(
            seen.is_ok_and(|s| s.is_ok()),
            "{name} must be shown revision {revision}"
        );
    }
}

async fn leases(members: &[Handle]) {
    let (holder, other) = (&nth(members, 0).1, &nth(members, 1).1);
    let one = Term(1);
    let began = Instant::now();
    renewed(holder, one).await;
    assert_eq!(
        other.free(one).await,
        Ok(false),
        "a running lease is not free"
    );
    // Kept for twice its length.
    while began.elapsed() < TTL * 2 {
        renewed(holder, one).await;
        sleep(TTL / 5).await;
    }
    assert_eq!(other.free(one).await, Ok(false));
    until_held(holder, one).await;
    let last = Instant::now();
    renewed(holder, one).await;
    until_free(other, one).await;
    assert!(
        last.elapsed() + Duration::from_millis(50) >= TTL,
        "free after {:?} of {TTL:?}",
        last.elapsed()
    );
    for (name, member) in members {
        assert_eq!(
            member.free(one).await,
            Ok(true),
            "free stays free, for {name} too"
        );
        let late = member.renew(one, TTL).await;
        assert!(
            matches!(late, Err(CoordinatorError::Refused(_))),
            "a lease that is over: {late:?}"
        );
    }
}

async fn releases(members: &[Handle]) {
    let (holder, other) = (&nth(members, 1).1, &nth(members, 0).1);
    let (two, three) = (Term(2), Term(3));
    renewed(holder, two).await;
    assert_eq!(other.free(two).await, Ok(false));
    let began = Instant::now();
    assert_eq!(holder.release(two).await, Ok(()));
    until_free(other, two).await;
    assert!(
        began.elapsed() < TTL,
        "a released lease is free at once, not after {:?}",
        began.elapsed()
    );
    renewed(other, three).await;
    assert_eq!(
        other.free(two).await,
        Ok(true),
        "free stays free under a later lease"
    );
    assert_eq!(other.free(three).await, Ok(false));
    if members.len() > 1 {
        let second = holder.renew(three, TTL).await;
        assert!(
            matches!(second, Err(CoordinatorError::Refused(_))),
            "one term, one holder: {second:?}"
        );
    }
    assert_eq!(other.release(three).await, Ok(()));
    until_free(holder, three).await;
}

async fn renewed(holder: &Arc<dyn Coordinator>, term: Term) {
    let due = Instant::now() + CALL_TIMEOUT * 2;
    // A voter whose disk is slow may not have noted its first promise in time.
    while let Err(e) = holder.renew(term, TTL).await {
        assert!(Instant::now() < due, "renew: {e}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// A majority may have answered before the local voter did: the hint follows.
async fn until_held(holder: &Arc<dyn Coordinator>, term: Term) {
    let due = Instant::now() + PATIENCE;
    while !matches!(holder.lease_hint(), LeaseHint::Held { term: t, .. } if t == term) {
        assert!(
            Instant::now() < due,
            "no hint of the lease of term {term}: {:?}",
            holder.lease_hint()
        );
        renewed(holder, term).await;
        sleep(Duration::from_millis(10)).await;
    }
}

async fn until_free(asker: &Arc<dyn Coordinator>, term: Term) {
    let due = Instant::now() + PATIENCE;
    while asker.free(term).await != Ok(true) {
        assert!(Instant::now() < due, "term {term} never becomes free");
        sleep(Duration::from_millis(10)).await;
    }
}

async fn presence(members: &[Handle]) {
    for (name, member) in members {
        member.announce(format!("\"{name}\""));
    }
    let all: BTreeSet<_> = members.iter().map(|(name, _)| name.clone()).collect();
    for (name, member) in members {
        let mut heard = member.presence();
        let complete = heard.wait_for(|map| {
            map.keys().cloned().collect::<BTreeSet<_>>() == all
                && map.iter().all(|(who, p)| p.value == format!("\"{who}\""))
        });
        let complete = tokio::time::timeout(PATIENCE, complete)
            .await
            .is_ok_and(|r| r.is_ok());
        assert!(complete, "{name} must hear of everybody");
    }
}

fn committed(outcome: Result<TxnOutcome, CoordinatorError>, what: &str) -> u64 {
    match outcome {
        Ok(TxnOutcome::Committed(revision)) => revision,
        other => fail(what, &other),
    }
}

/// Ends the test that called.
#[allow(clippy::panic, reason = "a conformance suite fails by panicking")]
fn fail<T>(what: &str, why: &dyn std::fmt::Debug) -> T {
    panic!("{what}: {why:?}")
}
