use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use craton_core::records::{History, Leadership, Timelines};
use craton_core::{MemberId, Term};
use tokio::sync::oneshot::error::TryRecvError;
use tokio::time::{Instant, sleep};

use super::cluster::{Cluster, PATIENCE, id, until};
use crate::api::{Coordinator, CoordinatorError, MembersError, Membership};
use crate::conformance::{put, settle};
use crate::embedded::{Embedded, RecoverError, Survey, stand_alone, survey};
use crate::raft::{Change, Timings};

const TTL: Duration = Duration::from_millis(1500);
/// Of a lease that must not lapse, however busy the machine is.
const HOLD_TTL: Duration = Duration::from_secs(60);

async fn change(through: &Embedded, change: Change) {
    let due = Instant::now() + PATIENCE;
    loop {
        match through.change(change.clone()).await {
            Ok(()) => return,
            Err(MembersError::Coordinator(e)) if Instant::now() < due => {
                eprintln!("again: {change:?}: {e}");
            }
            // A leader that has just won, or stood still for a moment, has not heard enough of them yet.
            Err(MembersError::Refused(why))
                if why.contains("too few answer now") && Instant::now() < due =>
            {
                sleep(Duration::from_millis(50)).await;
            }
            Err(e) => panic!("{change:?}: {e}"),
        }
    }
}

async fn take_in(cluster: &mut Cluster, through: &MemberId, who: &MemberId) {
    let address = cluster.add(who);
    let node = Arc::clone(&cluster.nodes[through]);
    let member = who.clone();
    change(&node, Change::Admit { member, address }).await;
    cluster.start_node(who).await;
    let member = who.clone();
    change(
        &node,
        Change::Promote {
            member,
            below: None,
        },
    )
    .await;
}

/// Renews, with [`HOLD_TTL`], until told to stop; the longest time without a renewal.
fn hold(
    node: Arc<Embedded>,
    term: u64,
) -> (
    tokio::sync::oneshot::Sender<()>,
    tokio::task::JoinHandle<Duration>,
) {
    let (stop, mut stopped) = tokio::sync::oneshot::channel();
    let task = tokio::spawn(async move {
        let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
        while stopped.try_recv() == Err(TryRecvError::Empty) {
            let sent = Instant::now();
            match node.renew(Term(term), HOLD_TTL).await {
                Ok(_) => {
                    longest = longest.max(sent - last);
                    last = sent;
                }
                Err(CoordinatorError::Unavailable(_)) => {}
                Err(e) => panic!("the lease of term {term} is lost: {e}"),
            }
            sleep(Duration::from_millis(50)).await;
        }
        longest.max(last.elapsed())
    });
    (stop, task)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_one_voter_to_five_and_back_with_the_lease_held() {
    let mut cluster = Cluster::start(1).await;
    settle(&cluster.handles()).await;
    cluster.write(&id(0), "a", "1").await;
    until("the lease", || async {
        cluster.nodes[&id(0)].renew(Term(1), HOLD_TTL).await.is_ok()
    })
    .await;
    let (stop, held) = hold(Arc::clone(&cluster.nodes[&id(0)]), 1);
    for i in 1..5 {
        // Through another one each time: it is passed on to the leader.
        take_in(&mut cluster, &id(i - 1), &id(i)).await;
        cluster.sees(&id(i), "a", "1").await;
    }
    let members = cluster.nodes[&id(4)].members();
    assert_eq!((members.voters.len(), members.epoch), (5, 4));
    // The new ones count: two of the five may go.
    cluster.kill(&id(1));
    cluster.kill(&id(2));
    cluster.write(&id(4), "b", "2").await;
    cluster.start_node(&id(1)).await;
    cluster.start_node(&id(2)).await;
    settle(&cluster.handles()).await;
    for i in [3, 4, 1, 2] {
        let member = id(i);
        change(&cluster.nodes[&id(0)], Change::Remove { member }).await;
        let removed = cluster.nodes[&id(i)].removed();
        until("it is told that it was removed", || async {
            *removed.borrow()
        })
        .await;
        cluster.nodes.remove(&id(i)).unwrap().stop().await;
    }
    cluster.write(&id(0), "c", "3").await;
    drop(stop);
    let longest = held.await.unwrap();
    assert!(longest < HOLD_TTL, "{longest:?} without a renewal");
    let members = cluster.nodes[&id(0)].members();
    assert_eq!((members.voters.len(), members.epoch), (1, 8));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_without_a_say_reads_writes_and_holds_the_lease() {
    let mut cluster = Cluster::start(3).await;
    settle(&cluster.handles()).await;
    let address = cluster.add(&id(3));
    let member = id(3);
    change(&cluster.nodes[&id(0)], Change::Admit { member, address }).await;
    cluster.start_node(&id(3)).await;
    cluster.write(&id(3), "a", "1").await;
    let late = Arc::clone(&cluster.nodes[&id(3)]);
    let sent = Cell::new(Instant::now());
    until("the lease", || async {
        sent.set(Instant::now());
        late.renew(Term(3), TTL).await.is_ok()
    })
    .await;
    until("it is asked for", || async {
        let Ok(free) = cluster.nodes[&id(0)].free(Term(3)).await else {
            return false;
        };
        assert!(
            !free || sent.get().elapsed() >= TTL,
            "free while it is held"
        );
        true
    })
    .await;
    until("it runs out", || async {
        cluster.nodes[&id(0)].free(Term(3)).await == Ok(true)
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_called_free_before_the_voters_changed_stays_free() {
    let mut cluster = Cluster::start(1).await;
    settle(&cluster.handles()).await;
    until("free", || async {
        cluster.nodes[&id(0)].free(Term(7)).await == Ok(true)
    })
    .await;
    take_in(&mut cluster, &id(0), &id(1)).await;
    take_in(&mut cluster, &id(1), &id(2)).await;
    let member = id(0);
    change(&cluster.nodes[&id(1)], Change::Remove { member }).await;
    until("it is refused", || async {
        let late = cluster.nodes[&id(2)].renew(Term(7), TTL).await;
        assert!(late.is_err(), "term 7 is over");
        matches!(late, Err(CoordinatorError::Refused(_)))
    })
    .await;
    until("term 8", || async {
        cluster.nodes[&id(2)].renew(Term(8), TTL).await.is_ok()
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_voter_and_too_few_are_refused() {
    let mut cluster = Cluster::start(1).await;
    settle(&cluster.handles()).await;
    let one = Arc::clone(&cluster.nodes[&id(0)]);
    let refused = one.change(Change::Remove { member: id(0) }).await;
    assert!(
        matches!(refused, Err(MembersError::Refused(_))),
        "{refused:?}"
    );
    take_in(&mut cluster, &id(0), &id(1)).await;
    take_in(&mut cluster, &id(0), &id(2)).await;
    cluster.kill(&id(2));
    cluster.write(&id(0), "a", "1").await;
    // Of the two that would be left, the one that is down would be needed.
    // Silence for an election timeout is what is waited for.
    sleep(Timings::default().election_timeout * 3).await;
    let removed = cluster.nodes[&id(0)]
        .change(Change::Remove { member: id(1) })
        .await;
    assert!(
        matches!(removed, Err(MembersError::Refused(_))),
        "{removed:?}"
    );
    let member = id(2);
    change(&cluster.nodes[&id(1)], Change::Remove { member }).await;
    cluster.write(&id(1), "b", "2").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_moves_is_found_at_its_new_address() {
    let mut cluster = Cluster::start(3).await;
    settle(&cluster.handles()).await;
    cluster.nodes.remove(&id(1)).unwrap().stop().await;
    let address = cluster.move_to_new_address(&id(1));
    cluster.start_node(&id(1)).await;
    cluster.write(&id(1), "a", "1").await;
    until("the log says where it is", || async {
        let members = cluster.nodes[&id(2)].members();
        members.addresses.get(&id(1)) == Some(&address)
    })
    .await;
    // Restarted, the others find it by the log.
    cluster.kill(&id(2));
    cluster.start_node(&id(2)).await;
    cluster.kill(&id(0));
    cluster.write(&id(2), "b", "2").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_comes_back_with_an_empty_disk_is_readmitted_by_itself() {
    let mut cluster = Cluster::start(1).await;
    settle(&cluster.handles()).await;
    take_in(&mut cluster, &id(0), &id(1)).await;
    take_in(&mut cluster, &id(0), &id(2)).await;
    cluster.write(&id(2), "a", "1").await;
    cluster.nodes.remove(&id(2)).unwrap().stop().await;
    std::fs::remove_dir_all(cluster.file(&id(2)).parent().unwrap()).unwrap();
    cluster.start_node(&id(2)).await;
    cluster.sees(&id(2), "a", "1").await;
    let back = Arc::clone(&cluster.nodes[&id(2)]);
    until("its say in the lease", || async {
        back.lease_hint() != crate::api::LeaseHint::Unknown
    })
    .await;
    cluster.kill(&id(1));
    cluster.write(&id(2), "b", "2").await;
    until("a lease", || async {
        back.renew(Term(1), TTL).await.is_ok()
    })
    .await;
    until("it writes", || async {
        back.txn(put("b", 0, "3")).await.is_ok()
    })
    .await;
    cluster.stop().await;
}

/// As a version wrote it that knew no recovered records.
const LED: &str = r#"{"term":4,"leader":{"member":"m0","incarnation":"1"},"previous":null,
    "sync":{"members":{"m1":"1"},"k":1},"durability":"quorum","timeline":1,"open":true,"cause":"first start"}"#;
const ASKED: &str = r#"{"id":1,"kind":"failover","term":4,"to":null,"allow_data_loss":true,"phase":"asked","by":"x"}"#;

/// The records of an old log: nobody leads by them without an operator's word that comes after the recovery.
fn says_that_it_may_be_old(after: &Survey) {
    let old: Leadership = serde_json::from_str(LED).unwrap();
    assert!(!old.recovered, "older records read as before");
    let text = |key: &str| after.snapshot.get(key).map(|v| v.value.clone());
    let l: Leadership = serde_json::from_str(&text("leadership").unwrap()).unwrap();
    assert_eq!(l, old.into_recovered(7));
    assert!(l.may_be_old() && !l.open);
    for asked in ["request", "order/m2", "restart"] {
        assert_eq!(text(asked), None, "what was asked for before is taken back");
    }
    let timelines: Timelines = serde_json::from_str(&text("timelines").unwrap()).unwrap();
    assert!(timelines.next_free().0 > 32, "others may have promoted");
    let history: History = serde_json::from_str(&text("history").unwrap()).unwrap();
    let told = history.0.last().unwrap();
    assert_eq!((told.kind.as_str(), told.at_ms), ("recovered", 7));
    assert!(told.text.contains("may be old"), "{}", told.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_without_a_leadership_is_nothing_to_go_on_from() {
    let mut cluster = Cluster::start(2).await;
    settle(&cluster.handles()).await;
    cluster.write(&id(0), "a", "1").await;
    let dir = cluster.file(&id(1)).parent().unwrap().to_owned();
    for i in [0, 1] {
        cluster.nodes.remove(&id(i)).unwrap().stop().await;
    }
    let before = survey(&dir).unwrap();
    let refused = stand_alone(&dir, &id(1), 7).unwrap_err().to_string();
    assert!(refused.contains("nobody has ever led"), "{refused}");
    assert_eq!(survey(&dir).unwrap(), before);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_survivor_goes_on_when_the_majority_is_lost_for_good() {
    let mut cluster = Cluster::start(3).await;
    settle(&cluster.handles()).await;
    cluster.write(&id(0), "leadership", LED).await;
    for asked in ["request", "order/m2", "restart"] {
        cluster.write(&id(0), asked, ASKED).await;
    }
    cluster.write(&id(0), "a", "1").await;
    cluster.sees(&id(1), "a", "1").await;
    until("the lease", || async {
        cluster.nodes[&id(0)].renew(Term(4), TTL).await.is_ok()
    })
    .await;
    let dir = cluster.file(&id(1)).parent().unwrap().to_owned();
    assert!(
        survey(&dir).is_err(),
        "not while the voter runs: it has the directory"
    );
    for i in [0, 2, 1] {
        cluster.nodes.remove(&id(i)).unwrap().stop().await;
    }
    let known = survey(&dir).unwrap();
    assert_eq!(known.snapshot.get("a").map(|v| v.value.as_str()), Some("1"));
    assert!(matches!(
        stand_alone(&dir, &id(9), 7),
        Err(RecoverError::Refused(_))
    ));
    let after = stand_alone(&dir, &id(1), 7).unwrap();
    assert_eq!(after.config.removed, [id(0), id(2)].into());
    says_that_it_may_be_old(&after);
    cluster.start_node(&id(1)).await;
    cluster.sees(&id(1), "a", "1").await;
    cluster.write(&id(1), "b", "2").await;
    until("the lost leader's term is over", || async {
        cluster.nodes[&id(1)].free(Term(4)).await == Ok(true)
    })
    .await;
    // One that comes back is told, and another host is taken in.
    cluster.start_node(&id(2)).await;
    let told = cluster.nodes[&id(2)].removed();
    until("it is told that it was removed", || async {
        *told.borrow()
    })
    .await;
    take_in(&mut cluster, &id(1), &id(3)).await;
    cluster.sees(&id(3), "b", "2").await;
    cluster.stop().await;
}
