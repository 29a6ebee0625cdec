//! What every backend has to do, as one suite. It panics at the first difference, so it belongs into tests.
//!
//! The suite is given the handles of all members of one new, empty cluster. Terms are used in ascending
//! order, since what is free stays free.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use craton_core::Term;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::api::{
    Compare, Coordinator, CoordinatorError, LeaseHint, Op, Snapshot, Txn, TxnOutcome,
};

/// One member's handle, with its name.
pub type Handle = (craton_core::MemberId, Arc<dyn Coordinator>);

/// How long anything may take to become true.
const PATIENCE: Duration = Duration::from_secs(60);

/// The lease that the suite takes. Long enough that a busy machine does not lose it between two steps.
const TTL: Duration = Duration::from_millis(1500);

/// One whose end nobody waits for: what is free before it was released.
const LONG_TTL: Duration = Duration::from_secs(60);

/// How long until something is tried again.
const PAUSE: Duration = Duration::from_millis(20);

/// Runs all of it, in order.
///
/// # Panics
/// At the first difference.
pub async fn run(members: &[Handle]) {
    settle(members).await;
    transactions(members).await;
    concurrent_increments(members).await;
    watches(members).await;
    let last = leases(members).await;
    releases(members, last).await;
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

/// What an operation may have met by chance, so that it is tried again: a leader that changes, a machine that is busy.
fn passes(error: &CoordinatorError) -> bool {
    matches!(
        error,
        CoordinatorError::Unavailable(_) | CoordinatorError::Unknown(_)
    )
}

async fn read(member: &Arc<dyn Coordinator>) -> Arc<Snapshot> {
    let due = Instant::now() + PATIENCE;
    loop {
        match member.read().await {
            Ok(seen) => return seen,
            Err(e) if passes(&e) && Instant::now() < due => sleep(PAUSE).await,
            Err(e) => return fail("read", &e),
        }
    }
}

/// Tries until the outcome is known. `done` finds the revision at which the store holds what the transaction makes,
/// and nobody else does: after an unknown outcome a conflict may be one with itself.
async fn apply(
    member: &Arc<dyn Coordinator>,
    txn: &Txn,
    done: impl Fn(&Snapshot) -> Option<u64>,
) -> Result<TxnOutcome, CoordinatorError> {
    let due = Instant::now() + PATIENCE;
    let mut unsure = false;
    loop {
        match member.txn(txn.clone()).await {
            Ok(TxnOutcome::Conflict) if unsure => {
                let seen = read(member).await;
                return Ok(done(&seen).map_or(TxnOutcome::Conflict, TxnOutcome::Committed));
            }
            Err(e) if passes(&e) && Instant::now() < due => {
                unsure |= matches!(e, CoordinatorError::Unknown(_));
                sleep(PAUSE).await;
            }
            outcome => return outcome,
        }
    }
}

/// Where a key has this value.
fn holds<'a>(key: &'a str, value: &'a str) -> impl Fn(&Snapshot) -> Option<u64> + 'a {
    move |seen| {
        let found = seen.get(key).filter(|v| v.value == value);
        found.map(|v| v.mod_revision)
    }
}

async fn transactions(members: &[Handle]) {
    const KEY: &str = "conformance/one";
    let a = first(members);
    let before = read(a).await.revision;
    // Revisions grow; by how much is the backend's (etcd counts every key of everybody).
    let one = committed(
        apply(a, &put(KEY, 0, "1"), holds(KEY, "1")).await,
        "a key that does not exist compares as 0",
    );
    assert!(one > before, "revision {one} after {before}");
    assert_eq!(
        apply(a, &put(KEY, 0, "2"), holds(KEY, "2")).await,
        Ok(TxnOutcome::Conflict)
    );
    for (name, member) in members {
        let seen = read(member).await;
        let read = seen.get(KEY).map(|v| (v.mod_revision, v.value.as_str()));
        assert_eq!(
            read,
            Some((one, "1")),
            "{name} must read what was committed"
        );
    }
    // All or nothing.
    let mut both = put(KEY, one, "3");
    both.compares.push(Compare {
        key: "conformance/absent".to_owned(),
        mod_revision: 9,
    });
    assert_eq!(
        apply(a, &both, holds(KEY, "3")).await,
        Ok(TxnOutcome::Conflict)
    );
    let delete = Txn {
        compares: vec![Compare {
            key: KEY.to_owned(),
            mod_revision: one,
        }],
        ops: vec![Op::Delete {
            key: KEY.to_owned(),
        }],
    };
    let absent = |seen: &Snapshot| seen.get(KEY).is_none().then_some(seen.revision);
    let two = committed(apply(&nth(members, 1).1, &delete, absent).await, "a delete");
    assert!(two > one, "revision {two} after {one}");
    assert!(read(a).await.get(KEY).is_none());
    // Nothing changed: no new revision.
    assert_eq!(
        committed(
            apply(a, &Txn::default(), |_| None).await,
            "a transaction without changes"
        ),
        two
    );
    let refused = apply(a, &put("", 0, ""), |_| None).await;
    assert!(
        matches!(refused, Err(CoordinatorError::Refused(_))),
        "an empty key: {refused:?}"
    );
}

/// How often each member added, as the counter says it.
type Counts = BTreeMap<String, u64>;

const COUNTER: &str = "conformance/counter";

/// The counter as it is, and the revision to compare it with.
async fn counted(member: &Arc<dyn Coordinator>) -> (u64, Counts) {
    let seen = read(member).await;
    let Some(found) = seen.get(COUNTER) else {
        return (0, Counts::new());
    };
    let counts = serde_json::from_str(&found.value).unwrap_or_else(|e| fail(&found.value, &e));
    (found.mod_revision, counts)
}

/// Each member adds to one counter with compare-and-set: nothing is lost, nothing counts twice.
async fn concurrent_increments(members: &[Handle]) {
    const EACH: u64 = 10;
    let mut adders = JoinSet::new();
    for (name, member) in members {
        adders.spawn(add(Arc::clone(member), name.to_string(), EACH));
    }
    while let Some(done) = adders.join_next().await {
        assert!(done.is_ok(), "an adder failed");
    }
    let (_, total) = counted(first(members)).await;
    let all = members.iter().map(|(name, _)| (name.to_string(), EACH));
    assert_eq!(total, all.collect());
}

async fn add(member: Arc<dyn Coordinator>, me: String, times: u64) {
    // Of an addition whose outcome is unknown the counter tells it.
    let (mut added, mut unsure) = (0, false);
    let mut due = Instant::now() + PATIENCE;
    loop {
        let (revision, mut counts) = counted(&member).await;
        let own = counts.entry(me.clone()).or_default();
        assert!(
            *own == added || (unsure && *own == added + 1),
            "{me} added {added} times, the counter says {own}"
        );
        if *own > added {
            (added, unsure) = (*own, false);
        }
        if added == times {
            return;
        }
        *own += 1;
        let next = serde_json::to_string(&counts).unwrap_or_else(|e| fail(COUNTER, &e));
        match member.txn(put(COUNTER, revision, &next)).await {
            Ok(TxnOutcome::Committed(_)) => {
                (added, unsure) = (added + 1, false);
                due = Instant::now() + PATIENCE;
            }
            Ok(TxnOutcome::Conflict) => {}
            Err(e) if passes(&e) && Instant::now() < due => {
                unsure |= matches!(e, CoordinatorError::Unknown(_));
                sleep(PAUSE).await;
            }
            Err(e) => fail("txn", &e),
        }
    }
}

async fn watches(members: &[Handle]) {
    const KEY: &str = "conformance/watched";
    let made = apply(first(members), &put(KEY, 0, "now"), holds(KEY, "now")).await;
    let revision = committed(made, "a key to watch");
    for (name, member) in members {
        let mut watch = member.watch();
        let seen = tokio::time::timeout(PATIENCE, watch.wait_for(|s| s.revision >= revision)).await;
        assert!(
            seen.is_ok_and(|s| s.is_ok()),
            "{name} must be shown revision {revision}"
        );
    }
}

/// Returns the newest term that was used.
async fn leases(members: &[Handle]) -> Term {
    // A machine that stands still for a whole lease has lost it, rightly: the next term shows the same.
    for term in (1..=5).map(Term) {
        if kept_then_over(members, term).await {
            return term;
        }
    }
    fail("leases", &"lost in every try")
}

/// False if the lease ran out before it was meant to, for want of a renewal.
async fn kept_then_over(members: &[Handle], one: Term) -> bool {
    let (holder, other) = (&nth(members, 0).1, &nth(members, 1).1);
    let began = Instant::now();
    let mut last = began;
    renewed(holder, one, TTL).await;
    if free(other, one).await {
        assert!(last.elapsed() >= TTL, "a running lease is not free");
        return false;
    }
    // Kept for twice its length.
    while began.elapsed() < TTL * 2 {
        last = Instant::now();
        renewed(holder, one, TTL).await;
        sleep(TTL / 5).await;
    }
    if free(other, one).await {
        assert!(last.elapsed() >= TTL, "a lease that is kept is not free");
        return false;
    }
    until_held(holder, one).await;
    let last = Instant::now();
    renewed(holder, one, TTL).await;
    until_free(other, one).await;
    assert!(
        last.elapsed() + Duration::from_millis(50) >= TTL,
        "free after {:?} of {TTL:?}",
        last.elapsed()
    );
    for (name, member) in members {
        assert!(free(member, one).await, "free stays free, for {name} too");
        is_refused(member, one, "a lease that is over").await;
    }
    true
}

async fn releases(members: &[Handle], last: Term) {
    let (holder, other) = (&nth(members, 1).1, &nth(members, 0).1);
    let (two, three) = (Term(last.0 + 1), Term(last.0 + 2));
    renewed(holder, two, LONG_TTL).await;
    assert!(!free(other, two).await);
    let began = Instant::now();
    released(holder, two).await;
    until_free(other, two).await;
    assert!(
        began.elapsed() < LONG_TTL,
        "a released lease is free at once, not after {:?}",
        began.elapsed()
    );
    renewed(other, three, LONG_TTL).await;
    assert!(
        free(other, two).await,
        "free stays free under a later lease"
    );
    assert!(!free(other, three).await);
    if members.len() > 1 {
        is_refused(holder, three, "one term, one holder").await;
    }
    released(other, three).await;
    until_free(holder, three).await;
}

async fn free(asker: &Arc<dyn Coordinator>, term: Term) -> bool {
    let due = Instant::now() + PATIENCE;
    loop {
        match asker.free(term).await {
            Ok(free) => return free,
            Err(e) if passes(&e) && Instant::now() < due => sleep(PAUSE).await,
            Err(e) => return fail("free", &e),
        }
    }
}

async fn released(holder: &Arc<dyn Coordinator>, term: Term) {
    let due = Instant::now() + PATIENCE;
    while let Err(e) = holder.release(term).await {
        assert!(passes(&e) && Instant::now() < due, "release: {e}");
        sleep(PAUSE).await;
    }
}

async fn is_refused(member: &Arc<dyn Coordinator>, term: Term, why: &str) {
    let due = Instant::now() + PATIENCE;
    loop {
        match member.renew(term, TTL).await {
            Err(CoordinatorError::Refused(_)) => return,
            Err(e) if passes(&e) && Instant::now() < due => sleep(PAUSE).await,
            other => return fail(why, &other),
        }
    }
}

async fn renewed(holder: &Arc<dyn Coordinator>, term: Term, ttl: Duration) {
    let due = Instant::now() + PATIENCE;
    // A voter whose disk is slow may not have noted its first promise in time.
    while let Err(e) = holder.renew(term, ttl).await {
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
        renewed(holder, term, TTL).await;
        sleep(Duration::from_millis(10)).await;
    }
}

async fn until_free(asker: &Arc<dyn Coordinator>, term: Term) {
    let due = Instant::now() + PATIENCE;
    while !free(asker, term).await {
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
