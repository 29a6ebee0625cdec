use super::*;

const TTL: Duration = Duration::from_secs(3);

fn at(ms: u64) -> BootTime {
    BootTime(ms * 1_000_000)
}

fn member(name: &str) -> MemberId {
    MemberId::new(name).unwrap()
}

/// Does what the disk does: notes, and asks again.
fn renew(v: &mut Voter, now: BootTime, holder: &str, term: u64) -> bool {
    match v.renew(now, &member(holder), Term(term), TTL) {
        Answer::Yes => true,
        Answer::AfterNote(note) => {
            v.noted(note);
            v.renew(now, &member(holder), Term(term), TTL) == Answer::Yes
        }
        Answer::No(_) => false,
    }
}

fn free(v: &mut Voter, now: BootTime, term: u64) -> bool {
    match v.free(now, Term(term)) {
        Answer::Yes => true,
        Answer::AfterNote(note) => {
            v.noted(note);
            true
        }
        Answer::No(_) => false,
    }
}

#[test]
fn a_running_promise_is_not_free_and_a_lapsed_one_is() {
    let mut v = Voter::new(at(0), LeaseNote::default());
    assert!(renew(&mut v, at(0), "a", 1));
    assert!(!free(&mut v, at(2999), 1));
    assert!(renew(&mut v, at(2999), "a", 1));
    assert!(!free(&mut v, at(5998), 1));
    assert!(free(&mut v, at(5999), 1));
}

#[test]
fn what_is_free_is_never_promised_again() {
    let mut v = Voter::new(at(0), LeaseNote::default());
    assert!(free(&mut v, at(0), 4));
    for term in 1..=4 {
        assert!(!renew(&mut v, at(1), "a", term));
    }
    assert!(renew(&mut v, at(1), "a", 5));
    assert!(free(&mut v, at(1), 4), "once true, always true");
    let mut restarted = Voter::new(at(2), v.note());
    assert!(!renew(&mut restarted, at(2), "a", 4));
}

#[test]
fn the_first_promise_is_given_only_after_its_length_is_noted() {
    let mut v = Voter::new(at(0), LeaseNote::default());
    let Answer::AfterNote(note) = v.renew(at(0), &member("a"), Term(1), TTL) else {
        panic!("promised at once")
    };
    assert_eq!(note.ttl_max_ms, 3000);
    assert!(free(&mut v, at(0), 0), "nothing is promised yet");
    v.noted(note);
    assert_eq!(v.renew(at(1), &member("a"), Term(1), TTL), Answer::Yes);
    assert_eq!(
        v.renew(at(2), &member("a"), Term(1), TTL),
        Answer::Yes,
        "renewals need no disk"
    );
}

#[test]
fn a_restarted_voter_waits_for_the_longest_promise_it_may_have_given() {
    let mut before = Voter::new(at(0), LeaseNote::default());
    assert!(renew(&mut before, at(10_000), "a", 1));
    let mut v = Voter::new(at(10_001), before.note());
    assert_eq!(v.hint(at(10_001)), LeaseHint::Unknown);
    assert!(!free(&mut v, at(13_000), 1));
    assert!(free(&mut v, at(13_001), 1));
}

#[test]
fn a_release_frees_at_once_even_after_a_restart() {
    let mut v = Voter::new(at(0), LeaseNote::default());
    assert!(renew(&mut v, at(0), "a", 1));
    assert!(matches!(
        v.release(at(1), &member("b"), Term(1)),
        Answer::No(_)
    ));
    assert_eq!(v.release(at(1), &member("a"), Term(1)), Answer::Yes);
    assert!(
        !renew(&mut v, at(2), "a", 1),
        "a delayed renewal does not undo a release"
    );
    assert!(free(&mut v, at(2), 1));
    let mut restarted = Voter::new(
        at(10),
        LeaseNote {
            ttl_max_ms: 3000,
            ..LeaseNote::default()
        },
    );
    assert_eq!(
        restarted.release(at(11), &member("a"), Term(1)),
        Answer::Yes
    );
    assert!(free(&mut restarted, at(11), 1));
}

#[test]
fn one_term_one_holder_and_never_backwards() {
    let mut v = Voter::new(at(0), LeaseNote::default());
    assert!(renew(&mut v, at(0), "a", 2));
    assert!(!renew(&mut v, at(1), "b", 2));
    assert!(!renew(&mut v, at(1), "a", 1));
    assert!(renew(&mut v, at(1), "b", 3));
    assert!(!renew(&mut v, at(1), "a", 2));
}

#[test]
fn a_shorter_ttl_does_not_shorten_a_promise() {
    let mut v = Voter::new(at(0), LeaseNote::default());
    assert!(renew(&mut v, at(0), "a", 1));
    assert_eq!(
        v.renew(at(1), &member("a"), Term(1), Duration::from_millis(10)),
        Answer::Yes
    );
    assert!(!free(&mut v, at(2999), 1));
}

#[test]
fn absurd_leases_are_refused() {
    let mut v = Voter::new(at(0), LeaseNote::default());
    assert!(matches!(
        v.renew(at(0), &member("a"), Term(1), Duration::ZERO),
        Answer::No(_)
    ));
    assert!(matches!(
        v.renew(at(0), &member("a"), Term(1), Duration::MAX),
        Answer::No(_)
    ));
}

#[test]
fn while_free_is_being_noted_nothing_is_promised_and_nothing_called_free() {
    let mut v = Voter::new(
        at(0),
        LeaseNote {
            ttl_max_ms: 3000,
            ..LeaseNote::default()
        },
    );
    let Answer::AfterNote(note) = v.free(at(3000), Term(1)) else {
        panic!("free before it is noted")
    };
    assert!(!renew(&mut v, at(3001), "a", 1));
    assert!(matches!(v.free(at(3001), Term(1)), Answer::AfterNote(_)));
    v.noted(note);
    assert_eq!(v.free(at(3002), Term(1)), Answer::Yes);
}

#[test]
fn a_voter_answers_for_the_epoch_it_has_settled_in_and_no_other() {
    let mut v = Voter::new(at(0), LeaseNote::default());
    assert!(v.answers_for(0).is_ok() && v.answers_for(1).is_err());
    let Answer::AfterNote(left) = v.leave(1) else {
        panic!("left before it is noted")
    };
    assert!(v.answers_for(0).is_err(), "refused before it is on disk");
    v.noted(left);
    assert_eq!(v.leave(1), Answer::Yes);
    let restarted = Voter::new(at(1), v.note());
    assert!(
        restarted.answers_for(0).is_err(),
        "a restart does not bring it back"
    );
    let known = LeaseNote {
        free_through: Term(7),
        ttl_max_ms: 3000,
        epoch: 9,
        left: 9,
        ..LeaseNote::default()
    };
    let Answer::AfterNote(settled) = v.settle(at(2), 1, known) else {
        panic!("settled before it is noted")
    };
    assert!(v.answers_for(1).is_err(), "not before it is on disk");
    v.noted(settled);
    assert!(
        v.answers_for(1).is_ok(),
        "others' epochs are not taken over"
    );
    assert!(!renew(&mut v, at(3), "a", 7), "others' notes are");
}

#[test]
fn a_voter_that_has_just_settled_calls_nothing_free_for_a_ttl() {
    let mut v = Voter::new(at(0), LeaseNote::default());
    let known = LeaseNote {
        ttl_max_ms: 3000,
        ..LeaseNote::default()
    };
    let Answer::AfterNote(note) = v.settle(at(10_000), 1, known) else {
        panic!("settled before it is noted")
    };
    v.noted(note);
    assert!(!free(&mut v, at(12_999), 5));
    assert!(free(&mut v, at(13_000), 5));
}

#[test]
fn what_another_called_free_is_refused_but_not_called_free() {
    let other = LeaseNote {
        free_through: Term(2),
        ttl_max_ms: 3000,
        ..LeaseNote::default()
    };
    let mut v = Voter::new(at(0), LeaseNote::default());
    assert!(renew(&mut v, at(10_000), "a", 2));
    let Answer::AfterNote(note) = v.settle(at(10_001), 1, other) else {
        panic!("settled before it is noted")
    };
    v.noted(note);
    assert!(!renew(&mut v, at(10_002), "a", 2));
    assert!(!free(&mut v, at(12_000), 2), "its own promise runs");
    assert!(free(&mut v, at(13_001), 2));
}
