//! Stores that were emptied, or restored from an old copy, under running members and between two of their lives.

use craton_core::records::{TimelineRecord, Timelines};
use craton_core::{Lsn, TimelineId};

use super::super::seen::not_older;
use super::*;
use crate::api::{Op, Versioned};

const TTL: Duration = Duration::from_secs(60);

fn leadership(term: u64, leader: &str) -> String {
    crate::contest::leadership(Term(term), &MemberId::new(leader).unwrap())
}

fn timelines(terms: &[u64]) -> String {
    let all = terms.iter().zip(1..).map(|(term, number)| TimelineRecord {
        timeline: TimelineId(number),
        term: Term(*term),
        parent: None,
        fork: Lsn(0),
        member: MemberId::new("a").unwrap(),
    });
    serde_json::to_string(&Timelines(all.collect())).unwrap()
}

/// Records with the leadership at `revision`.
fn records(revision: u64, term: u64, leader: &str, reserved: &[u64]) -> Snapshot {
    let at = |value: String| Versioned {
        mod_revision: revision,
        value,
    };
    let placement = at("{\"generation\":1,\"offset\":10}".to_owned());
    Snapshot {
        revision,
        entries: [
            ("placement".to_owned(), placement),
            ("cluster".to_owned(), at("{\"system_id\":\"7\"}".to_owned())),
            ("leadership".to_owned(), at(leadership(term, leader))),
            ("timelines".to_owned(), at(timelines(reserved))),
        ]
        .into(),
    }
}

#[test]
fn what_is_older_is_told_from_what_is_newer() {
    let known = records(20, 2, "b", &[1, 2]);
    let place = elsewhere();
    let told = |found: &Snapshot| not_older(&place, &known, found);
    assert_eq!(told(&known), Ok(()));
    assert_eq!(told(&records(21, 2, "b", &[1, 2])), Ok(()), "another set");
    assert_eq!(told(&records(30, 3, "a", &[1, 2, 3])), Ok(()), "later");
    let older = |what: &str, found: &Snapshot| {
        let why = told(found).expect_err(what);
        assert!(
            why.contains("emptied, or restored from an old copy"),
            "{why}"
        );
    };
    older("emptied", &Snapshot::default());
    older("an earlier term", &records(30, 1, "a", &[1]));
    older("an earlier set", &records(19, 2, "b", &[1, 2]));
    older("another history", &records(20, 2, "c", &[1, 2]));
    older("a term again", &records(30, 3, "a", &[1, 3]));
    older("a timeline is forgotten", &records(30, 3, "a", &[1]));
    for key in ["placement", "cluster", "leadership", "timelines"] {
        let mut without = known.clone();
        without.entries.remove(key);
        older(key, &without);
    }
    let mut moved = records(3, 2, "b", &[1, 2]);
    let placement = moved.entries.get_mut("placement").unwrap();
    placement.value = "{\"generation\":2,\"offset\":40}".to_owned();
    assert_eq!(told(&moved), Ok(()), "the same records in another store");
    let mut other = known.clone();
    other.entries.get_mut("cluster").unwrap().value = "{\"system_id\":\"8\"}".to_owned();
    assert!(told(&other).unwrap_err().contains("another cluster"));
}

/// Puts and deletes behind everybody's back.
async fn meddle(store: &Model, ops: Vec<Op>) {
    let txn = Txn {
        compares: vec![],
        ops,
    };
    assert!(matches!(store.txn(txn).await, Ok(TxnOutcome::Committed(_))));
}

fn all_of(snapshot: &Snapshot) -> Vec<Op> {
    let put = |(key, at): (&String, &Versioned)| Op::Put {
        key: key.clone(),
        value: at.value.clone(),
    };
    snapshot.entries.iter().map(put).collect()
}

async fn empty(store: &Model) {
    let found = store.read().await.unwrap();
    let gone = found
        .entries
        .keys()
        .map(|key| Op::Delete { key: key.clone() });
    meddle(store, gone.collect()).await;
}

/// A leader of term 2, `a`, with its records elsewhere.
async fn led() -> (World, Vec<Arc<Placed>>) {
    let world = World::new();
    let members: Vec<_> = (0..3)
        .map(|i| world.start_at(i, elsewhere(), &Fuse::never()))
        .collect();
    for member in &members {
        until("it is there", || member.place() == elsewhere()).await;
    }
    for (key, value) in [
        ("cluster", "{\"system_id\":\"7\"}".to_owned()),
        ("leadership", leadership(2, "a")),
        ("timelines", timelines(&[1, 2])),
    ] {
        let put = put(key, 0, &value);
        assert!(matches!(
            members[0].txn(put).await,
            Ok(TxnOutcome::Committed(_))
        ));
    }
    assert!(members[0].renew(Term(2), TTL).await.is_ok());
    for member in &members {
        let mut seen = member.watch();
        let all = |s: &Arc<Snapshot>| s.get("timelines").is_some();
        seen.wait_for(all).await.unwrap();
    }
    (world, members)
}

async fn nothing_goes_through(member: &Placed) {
    let unavailable = |error: CoordinatorError| match error {
        CoordinatorError::Unavailable(why) => assert!(why.contains("old copy"), "{why}"),
        other => panic!("{other}"),
    };
    unavailable(member.read().await.unwrap_err());
    unavailable(member.txn(put("x", 0, "y")).await.unwrap_err());
    unavailable(member.renew(Term(2), TTL).await.unwrap_err());
    unavailable(member.free(Term(1)).await.unwrap_err());
    unavailable(member.release(Term(2)).await.unwrap_err());
    assert_eq!(member.lease_hint(), LeaseHint::Unknown);
    let shown = Arc::clone(&member.watch().borrow());
    let shown = shown.get("leadership").map(|at| at.value.clone());
    assert_eq!(shown, Some(leadership(2, "a")), "what was known is shown");
}

async fn stop(members: Vec<Arc<Placed>>) {
    for member in members {
        member.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_emptied_under_members_counts_as_unavailable() {
    let (world, members) = led().await;
    let copy = world.new[0].read().await.unwrap();
    empty(&world.new[0]).await;
    for member in &members {
        until("it says so", || {
            member.trouble().is_some_and(|t| t.contains("emptied"))
        })
        .await;
        nothing_goes_through(member).await;
    }
    assert!(world.new[0].read().await.unwrap().entries.is_empty());
    // The newest copy comes back.
    meddle(&world.new[0], all_of(&copy)).await;
    for member in &members {
        until("it is believed again", || member.trouble().is_none()).await;
        assert!(member.read().await.is_ok());
    }
    assert!(members[0].renew(Term(2), TTL).await.is_ok());
    stop(members).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_copy_is_not_believed_and_is_written_over_by_order() {
    let (world, members) = led().await;
    let old = [
        ("leadership", leadership(1, "b")),
        ("timelines", timelines(&[1])),
        ("of-then", "x".to_owned()),
    ];
    let put = old.map(|(key, value)| Op::Put {
        key: key.to_owned(),
        value,
    });
    let whole = members[1].rebuild(None).await;
    assert!(
        matches!(&whole, Err(CoordinatorError::Refused(why)) if why.contains("whole")),
        "{whole:?}"
    );
    let before = Arc::clone(&members[0].watch().borrow());
    meddle(&world.new[0], put.into()).await;
    for member in &members {
        until("it says so", || member.trouble().is_some()).await;
        nothing_goes_through(member).await;
    }
    members[0].rebuild(Some((Term(2), TTL))).await.unwrap();
    for member in &members {
        until("it is believed again", || member.trouble().is_none()).await;
        let read = member.read().await.unwrap();
        assert!(read.revision > before.revision, "revisions never go back");
        let values = |s: &Snapshot| -> Vec<_> {
            let all = s.entries.iter().filter(|(k, _)| *k != "placement");
            all.map(|(k, at)| (k.clone(), at.value.clone())).collect()
        };
        assert_eq!(values(&read), values(&before));
    }
    assert!(members[0].renew(Term(2), TTL).await.is_ok());
    stop(members).await;
}

/// With the note of the place alone an emptied store is not believed either, and nothing of it is shown.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_note_alone_tells_an_emptied_store() {
    let (world, members) = led().await;
    stop(members).await;
    empty(&world.new[0]).await;
    let _ = std::fs::remove_file(super::super::seen::file(&world.memory(0)));
    let again = world.start_at(0, elsewhere(), &Fuse::never());
    until("it says so", || {
        again.trouble().is_some_and(|t| t.contains("emptied"))
    })
    .await;
    assert!(again.read().await.is_err());
    assert!(again.renew(Term(2), TTL).await.is_err());
    assert_eq!(again.watch().borrow().revision, 0);
    let refused = again.rebuild(None).await;
    assert!(
        matches!(&refused, Err(CoordinatorError::Refused(why)) if why.contains("no records")),
        "{refused:?}"
    );
    again.stop().await;
}

/// What was known is on disk: a member that starts again is not fooled, and can write it anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_forgets_nothing() {
    let (world, members) = led().await;
    let saved = || {
        (0..3).all(|i| {
            let path = super::super::seen::file(&world.memory(i));
            super::super::seen::load(&path, &elsewhere())
                .is_some_and(|(s, _)| s.get("timelines").is_some())
        })
    };
    until("the copy is on disk", saved).await;
    stop(members).await;
    let old = [
        ("leadership", leadership(1, "b")),
        ("timelines", timelines(&[1])),
    ];
    let put = old.map(|(key, value)| Op::Put {
        key: key.to_owned(),
        value,
    });
    meddle(&world.new[0], put.into()).await;
    let again = world.start_at(0, elsewhere(), &Fuse::never());
    until("it says so", || {
        again.trouble().is_some_and(|t| t.contains("old copy"))
    })
    .await;
    assert!(again.read().await.is_err());
    assert!(again.renew(Term(1), TTL).await.is_err());
    again.rebuild(None).await.unwrap();
    let read = again.read().await.unwrap();
    let found = read.get("leadership").map(|at| at.value.clone());
    assert_eq!(found, Some(leadership(2, "a")));
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_be_newer_is_not_written_over() {
    let (world, members) = led().await;
    let put = Op::Put {
        key: "leadership".to_owned(),
        value: leadership(3, "b"),
    };
    let gone = Op::Delete {
        key: "timelines".to_owned(),
    };
    meddle(&world.new[0], vec![put, gone]).await;
    until("it says so", || members[0].trouble().is_some()).await;
    let refused = members[0].rebuild(None).await;
    assert!(
        matches!(&refused, Err(CoordinatorError::Refused(why)) if why.contains("term 3")),
        "{refused:?}"
    );
    stop(members).await;
}
