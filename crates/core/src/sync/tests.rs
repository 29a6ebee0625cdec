//! The invariant of 3.2 under every change of the wanted set, at any moment.

use proptest::prelude::*;

use super::*;

fn id(n: u8) -> MemberId {
    MemberId::new(format!("m{n}")).unwrap()
}

fn set(members: &[u8], k: u32) -> SyncSet {
    SyncSet {
        members: members.iter().map(|m| (id(*m), Incarnation(1))).collect(),
        k,
    }
}

fn standby(n: u8, flush: u64) -> StandbyView {
    StandbyView {
        member: id(n),
        incarnation: Incarnation(1),
        streaming: true,
        flush_lsn: Lsn(flush),
    }
}

fn step(c: &SyncSet, p: &SyncSet, wanted: &[u8], k: u32, standbys: &[StandbyView]) -> SyncStep {
    next_step(&SyncInput {
        coordinator: c,
        postgres: p,
        wanted: &set(wanted, k).members,
        wanted_k: k,
        barrier: Lsn(100),
        standbys,
    })
}

#[test]
fn names_round_trip() {
    for s in [set(&[], 0), set(&[1], 1), set(&[1, 2, 3], 2)] {
        assert_eq!(SyncSet::from_standby_names(&s.standby_names()), Some(s));
    }
    assert_eq!(SyncSet::from_standby_names("FIRST 1 (x)"), None);
    assert_eq!(SyncSet::from_standby_names("*"), None);
}

#[test]
fn adding_tells_the_coordinator_first() {
    let (c, p) = (set(&[1], 1), set(&[1], 1));
    assert_eq!(
        step(&c, &p, &[1, 2], 1, &[]),
        SyncStep::SetCoordinator(set(&[1, 2], 1))
    );
}

#[test]
fn removing_waits_for_the_others_before_the_coordinator_hears() {
    let c = set(&[1, 2], 1);
    assert_eq!(
        step(&c, &c, &[2], 1, &[]),
        SyncStep::SetPostgres(set(&[2], 1))
    );
    let p = set(&[2], 1);
    assert_eq!(
        step(&c, &p, &[2], 1, &[standby(2, 99)]),
        SyncStep::WaitFlushed(set(&[2], 1))
    );
    assert_eq!(
        step(&c, &p, &[2], 1, &[standby(2, 100)]),
        SyncStep::SetCoordinator(set(&[2], 1))
    );
}

#[test]
fn the_last_standby_leaves_the_coordinator_first() {
    let c = set(&[1], 1);
    assert_eq!(
        step(&c, &c, &[], 1, &[]),
        SyncStep::SetCoordinator(set(&[], 0))
    );
    assert_eq!(
        step(&set(&[], 0), &c, &[], 1, &[]),
        SyncStep::SetPostgres(set(&[], 0))
    );
}

#[test]
fn the_first_standby_is_a_raise() {
    let none = set(&[], 0);
    assert_eq!(
        step(&none, &none, &[1], 1, &[standby(1, 0)]),
        SyncStep::SetPostgres(set(&[1], 1))
    );
    assert_eq!(
        step(&none, &set(&[1], 1), &[1], 1, &[standby(1, 0)]),
        SyncStep::WaitFlushed(set(&[1], 1))
    );
}

#[test]
fn a_member_cloned_anew_never_counts_for_what_it_was() {
    let old = set(&[1], 1);
    let wanted = BTreeMap::from([(id(1), Incarnation(2))]);
    let new = SyncSet {
        members: wanted.clone(),
        k: 1,
    };
    let copy = [StandbyView {
        incarnation: Incarnation(2),
        ..standby(1, 100)
    }];
    let next = |c: &SyncSet, p: &SyncSet| {
        next_step(&SyncInput {
            coordinator: c,
            postgres: p,
            wanted: &wanted,
            wanted_k: 1,
            barrier: Lsn(100),
            standbys: &copy,
        })
    };
    assert!(!new.covers(&old));
    let alone = set(&[], 0);
    assert_eq!(next(&old, &old), SyncStep::SetCoordinator(alone.clone()));
    assert_eq!(next(&alone, &old), SyncStep::SetPostgres(new.clone()));
    assert_eq!(next(&alone, &new), SyncStep::SetCoordinator(new.clone()));
    assert_eq!(next(&new, &new), SyncStep::Done);
}

proptest! {
    /// Whatever is wanted, and however it changes on the way, no step breaks `covers`, and the wanted
    /// set is reached once it stops changing.
    #[test]
    fn every_step_keeps_the_invariant(
        start in 0u8..16, wishes in proptest::collection::vec((0u8..16, 1u32..3, 1usize..4), 1..12)
    ) {
        let pick = |mask: u8| (0..4).filter(|b| mask & (1 << b) != 0).collect::<Vec<u8>>();
        let first = pick(start);
        let k0 = u32::from(!first.is_empty());
        let mut c = set(&first, k0);
        let mut p = c.clone();
        let all: Vec<StandbyView> = (0..4).map(|n| standby(n, 100)).collect();
        for (mask, k, steps) in wishes.iter().chain(std::iter::once(&(7u8, 1u32, 20usize))) {
            for _ in 0..*steps {
                match step(&c, &p, &pick(*mask), *k, &all) {
                    SyncStep::Done | SyncStep::WaitFlushed(_) => {}
                    SyncStep::SetPostgres(s) => p = s,
                    SyncStep::SetCoordinator(s) => c = s,
                }
                prop_assert!(p.covers(&c), "{p:?} does not cover {c:?}");
            }
        }
        prop_assert_eq!(&c, &set(&[0, 1, 2], 1));
        prop_assert_eq!(&p, &c);
    }
}
