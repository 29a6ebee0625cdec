//! The book of a member, the leader's ledger, and the intersection argument.

use proptest::prelude::*;

use super::*;
use crate::records::{At, Leadership, Request, RequestPhase};
use crate::types::TimelineId;

const TTL: Duration = Duration::from_secs(2);

fn at(ms: u64) -> BootTime {
    BootTime(ms * 1_000_000)
}

fn id(n: usize) -> MemberId {
    MemberId::new(format!("m{n}")).unwrap()
}

fn ask(term: u64) -> Ask {
    Ask {
        leader: id(0),
        term: Term(term),
        incarnation: Incarnation(1),
        ttl_ms: 2000,
    }
}

/// A member that streams from `m0` in term 4.
fn facts() -> Facts {
    Facts {
        floor: Term(4),
        incarnation: Some(Incarnation(1)),
        streams_from: Some((id(0), Term(4))),
        known_term: Term(4),
    }
}

/// A book that has noted a ttl long ago.
fn book() -> Book {
    Book::new(at(0), TTL)
}

#[test]
fn only_a_healthy_standby_of_that_very_term_promises() {
    let said = |ask: Ask, facts: Facts| book().ask(at(9000), &ask, &facts);
    assert_eq!(said(ask(4), facts()), Answer::Yes);
    let no = |ask: Ask, facts: Facts, why: &str| match said(ask, facts) {
        Answer::No(text) => assert!(text.contains(why), "{text}"),
        other => panic!("{other:?}"),
    };
    let with = |change: fn(&mut Facts)| {
        let mut f = facts();
        change(&mut f);
        f
    };
    no(ask(3), facts(), "term 4 is known");
    no(ask(5), facts(), "follows term 4");
    no(ask(4), with(|f| f.known_term = Term(5)), "term 5 is known");
    no(ask(4), with(|f| f.floor = Term(5)), "follows term 5");
    no(ask(4), with(|f| f.streams_from = None), "does not stream");
    no(
        ask(4),
        with(|f| f.streams_from = Some((id(1), Term(4)))),
        "does not stream",
    );
    no(
        ask(4),
        with(|f| f.incarnation = Some(Incarnation(2))),
        "another one",
    );
    no(ask(4), with(|f| f.incarnation = None), "another one");
    let long = |ttl_ms| Ask { ttl_ms, ..ask(4) };
    no(long(0), facts(), "at most");
    no(long(600_001), facts(), "at most");
}

#[test]
fn a_promise_and_a_seal_exclude_each_other() {
    let mut b = book();
    assert_eq!(b.ask(at(9000), &ask(4), &facts()), Answer::Yes);
    assert_eq!(b.begin_seal(at(9001), Term(5)), Err(at(11_000)));
    assert_eq!(b.ask(at(10_000), &ask(4), &facts()), Answer::Yes);
    assert_eq!(b.begin_seal(at(11_999), Term(5)), Err(at(12_000)));
    assert_eq!(b.begin_seal(at(12_000), Term(5)), Ok(()));
    let Answer::No(why) = b.ask(at(12_001), &ask(4), &facts()) else {
        unreachable!()
    };
    assert!(why.contains("seals for term 5"), "{why}");
}

#[test]
fn a_promise_for_a_term_does_not_hold_up_its_own_seal() {
    let mut b = book();
    assert_eq!(b.ask(at(9000), &ask(4), &facts()), Answer::Yes);
    assert_eq!(b.begin_seal(at(9001), Term(4)), Ok(()));
}

#[test]
fn a_longer_promise_is_noted_first_and_an_older_life_is_respected() {
    let mut b = Book::new(at(5000), Duration::ZERO);
    assert_eq!(
        b.begin_seal(at(5001), Term(1)),
        Ok(()),
        "nothing was ever promised"
    );
    assert_eq!(b.ask(at(6000), &ask(4), &facts()), Answer::AfterNote(TTL));
    assert_eq!(b.held_until(at(8000)), None, "not given yet");
    b.noted(TTL);
    assert_eq!(b.ask(at(6000), &ask(4), &facts()), Answer::Yes);
    // The agent restarts: it has forgotten, and the note says for how long it may matter.
    let mut b = Book::new(at(6100), TTL);
    assert_eq!(b.begin_seal(at(8099), Term(5)), Err(at(8100)));
    assert_eq!(b.begin_seal(at(8100), Term(5)), Ok(()));
    assert!(b.is_idle(at(8100)));
    assert!(!Book::new(at(6100), TTL).is_idle(at(8099)));
}

#[test]
fn an_operator_who_asks_for_a_failover_ends_the_term() {
    let mut view = ClusterView::default();
    assert_eq!(known_term(&view), Term(0));
    let l = Leadership {
        term: Term(4),
        leader: None,
        previous: None,
        sync: SyncSet::default(),
        durability: Durability::Quorum,
        timeline: TimelineId(1),
        open: true,
        restarted: false,
        preferred: None,
        allow_data_loss: false,
        recovered: false,
        cause: String::new(),
    };
    view.leadership = Some(At {
        revision: 1,
        value: l,
    });
    assert_eq!(known_term(&view), Term(4));
    let mut ask = |kind, term| {
        let value = Request {
            id: 1,
            kind,
            term: Term(term),
            to: None,
            allow_data_loss: false,
            phase: RequestPhase::Asked,
            by: "op".into(),
            why: None,
        };
        view.request = Some(At { revision: 2, value });
        known_term(&view)
    };
    assert_eq!(ask(RequestKind::Switchover, 4), Term(4));
    assert_eq!(ask(RequestKind::Failover, 3), Term(4));
    assert_eq!(ask(RequestKind::Failover, 4), Term(5));
}

fn need(members: &[usize], needed: usize) -> PromiseNeed {
    PromiseNeed {
        members: members.iter().map(|n| (id(*n), Incarnation(1))).collect(),
        needed,
    }
}

fn ledger(promises: &[(usize, u64)]) -> Ledger {
    let mut l = Ledger::default();
    for (n, until) in promises {
        l.promised(Term(4), &id(*n), Incarnation(1), at(*until));
    }
    l
}

#[test]
fn the_deadline_is_that_of_the_kth_promise() {
    let l = ledger(&[(1, 10), (2, 30), (3, 20)]);
    let deadline = |needs: &[PromiseNeed]| l.deadline(Term(4), needs);
    assert_eq!(deadline(&[need(&[1, 2, 3], 1)]), Some(at(30)));
    assert_eq!(deadline(&[need(&[1, 2, 3], 2)]), Some(at(20)));
    assert_eq!(deadline(&[need(&[1, 2, 3], 3)]), Some(at(10)));
    assert_eq!(
        deadline(&[need(&[1, 2], 1), need(&[3], 1)]),
        Some(at(20)),
        "for each of the sets"
    );
    assert_eq!(
        deadline(&[need(&[1, 2], 1), need(&[4], 1)]),
        None,
        "nobody of one set"
    );
    assert_eq!(
        deadline(&[need(&[], 0)]),
        None,
        "nobody to ask is not enough"
    );
    assert_eq!(
        deadline(&[]),
        None,
        "and neither is not knowing whom to ask"
    );
    assert_eq!(l.deadline(Term(5), &[need(&[1], 1)]), None, "another term");
}

#[test]
fn a_promise_counts_for_the_incarnation_that_gave_it() {
    let mut l = ledger(&[(1, 10)]);
    l.promised(Term(4), &id(1), Incarnation(2), at(50));
    assert_eq!(l.deadline(Term(4), &[need(&[1], 1)]), None);
    l.promised(Term(4), &id(1), Incarnation(1), at(20));
    l.promised(Term(4), &id(1), Incarnation(1), at(15));
    assert_eq!(
        l.deadline(Term(4), &[need(&[1], 1)]),
        Some(at(20)),
        "never shortened"
    );
    l.promised(Term(3), &id(1), Incarnation(1), at(90));
    assert_eq!(
        l.deadline(Term(4), &[need(&[1], 1)]),
        Some(at(20)),
        "an older term"
    );
    assert_eq!(l.running(at(19)).count(), 1);
    assert_eq!(l.running(at(20)).count(), 0);
}

#[test]
fn in_async_all_of_v_must_promise() {
    let set = |members: &[usize], k| SyncSet {
        members: need(members, 0).members,
        k,
    };
    assert_eq!(
        PromiseNeed::of(&set(&[1, 2], 0), Durability::Async),
        need(&[1, 2], 2)
    );
    assert_eq!(
        PromiseNeed::of(&set(&[1, 2], 1), Durability::Strict),
        need(&[1, 2], 1)
    );
    let l = ledger(&[(1, 10)]);
    let alone = PromiseNeed::of(&SyncSet::default(), Durability::Quorum);
    assert_eq!(l.deadline(Term(4), &[alone]), None);
}

proptest! {
    /// Whoever has not promised may seal: with promises that suffice, the seals never do.
    #[test]
    fn promises_leave_too_few_seals(v in 1usize..6, k in 1u32..6, promised in any::<u8>()) {
        let k = k.min(u32::try_from(v).unwrap());
        let set = SyncSet {
            members: (1..=v).map(|n| (id(n), Incarnation(1))).collect(),
            k,
        };
        let given: Vec<(usize, u64)> =
            (1..=v).filter(|n| promised & (1 << n) != 0).map(|n| (n, 10)).collect();
        let free = v - given.len();
        let goes_on = ledger(&given)
            .deadline(Term(4), &[PromiseNeed::of(&set, Durability::Quorum)])
            .is_some();
        prop_assert!(!(goes_on && free >= set.seals_needed()));
        // And they are not asked for more than that takes.
        prop_assert!(goes_on || free >= set.seals_needed());
    }
}
