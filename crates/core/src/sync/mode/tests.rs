//! The orders of [`super`], one by one, and what they are for under random changes of mode, members and k.

use proptest::prelude::*;

use super::*;
use crate::sync::StandbyView;
use crate::types::Lsn;

const B: u8 = 1;
const C: u8 = 2;

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

/// The next step with these standbys wanted, at these flush positions; the barrier is 100.
fn step(
    (in_force, wish): (Durability, Durability),
    c: &SyncSet,
    p: &SyncSet,
    k: u32,
    standbys: &[(u8, u64)],
) -> (SyncStep, Durability) {
    let wanted: Vec<u8> = standbys.iter().map(|(n, _)| *n).collect();
    let views: Vec<StandbyView> = standbys.iter().map(|(n, f)| standby(*n, *f)).collect();
    next_step(
        Modes { in_force, wish },
        &SyncInput {
            coordinator: c,
            postgres: p,
            wanted: &set(&wanted, k).members,
            wanted_k: k,
            barrier: Lsn(100),
            standbys: &views,
        },
    )
}

use Durability::{Async, Quorum, Strict};
use SyncStep::{Done, SetCoordinator, SetPostgres, WaitFlushed};

#[test]
fn async_lists_the_standbys_and_waits_for_nobody() {
    let none = set(&[], 0);
    let next = |c: &SyncSet| step((Async, Async), c, &none, 1, &[(B, 5), (C, 5)]);
    assert_eq!(next(&none), (SetCoordinator(set(&[B, C], 0)), Async));
    assert_eq!(next(&set(&[B, C], 0)), (Done, Async));
}

#[test]
fn from_async_postgresql_comes_first() {
    let (none, listed) = (set(&[], 0), set(&[B], 0));
    let one = set(&[B], 1);
    for wish in [Quorum, Strict] {
        let next = |p: &SyncSet, flushed| step((Async, wish), &listed, p, 1, &[(B, flushed)]).0;
        assert_eq!(next(&none, 100), SetPostgres(one.clone()));
        assert_eq!(next(&one, 99), WaitFlushed(one.clone()));
        assert_eq!(next(&one, 100), SetCoordinator(one.clone()));
    }
    assert_eq!(
        step((Async, Quorum), &none, &none, 1, &[]),
        (SetCoordinator(none.clone()), Quorum),
        "alone"
    );
    assert_eq!(
        step((Async, Strict), &none, &none, 1, &[]).0,
        SetPostgres(SyncSet::closed()),
        "strict fails closed before it is on record"
    );
    assert_eq!(
        step((Async, Strict), &none, &SyncSet::closed(), 1, &[]),
        (SetCoordinator(none), Strict)
    );
}

#[test]
fn towards_async_the_coordinator_comes_first() {
    let one = set(&[B, C], 1);
    let next =
        |in_force, c: &SyncSet, p: &SyncSet| step((in_force, Async), c, p, 1, &[(B, 5), (C, 5)]);
    let listed = set(&[B, C], 0);
    for from in [Quorum, Strict] {
        let first = next(from, &one, &one);
        assert_eq!(first, (SetCoordinator(listed.clone()), Async));
    }
    let then = next(Async, &listed, &one);
    assert_eq!(then, (SetPostgres(set(&[], 0)), Async));
}

#[test]
fn strict_never_goes_on_with_fewer() {
    let two = set(&[B, C], 1);
    let strict = (Strict, Strict);
    // One of two gone: the rest has k.
    assert_eq!(
        step(strict, &two, &two, 1, &[(B, 5)]).0,
        SetPostgres(set(&[B], 1))
    );
    // Both gone: nobody leaves.
    assert_eq!(step(strict, &two, &two, 1, &[]), (Done, Strict));
    // k = 2 and one gone.
    let both = set(&[B, C], 2);
    assert_eq!(step(strict, &both, &both, 2, &[(B, 5)]), (Done, Strict));
    // The operator lowers k: the coordinator first.
    let lower = SetCoordinator(set(&[B, C], 1));
    assert_eq!(step(strict, &both, &both, 1, &[(B, 5)]), (lower, Strict));
    // The operator raises it with one standby there.
    let one = set(&[B], 1);
    let next = |p: &SyncSet| step(strict, &one, p, 2, &[(B, 5)]).0;
    assert_eq!(next(&one), SetPostgres(SyncSet::closed()));
    assert_eq!(next(&SyncSet::closed()), Done);
}

#[test]
fn strict_replaces_one_that_left_by_another() {
    let one = set(&[B], 1);
    let next = |c: &SyncSet, p: &SyncSet| step((Strict, Strict), c, p, 1, &[(C, 100)]).0;
    let both = set(&[B, C], 1);
    assert_eq!(
        next(&one, &one),
        SetCoordinator(both.clone()),
        "added first"
    );
    assert_eq!(next(&both, &one), SetPostgres(set(&[C], 1)));
    assert_eq!(next(&both, &set(&[C], 1)), SetCoordinator(set(&[C], 1)));
}

#[test]
fn strict_takes_a_new_copy_for_the_old_one_only_with_everything_on_it() {
    let old = set(&[B], 1);
    let wanted = BTreeMap::from([(id(B), Incarnation(2))]);
    let new = SyncSet {
        members: wanted.clone(),
        k: 1,
    };
    let next = |c: &SyncSet, p: &SyncSet, flushed| {
        let copy = [StandbyView {
            incarnation: Incarnation(2),
            ..standby(B, flushed)
        }];
        let modes = Modes {
            in_force: Strict,
            wish: Strict,
        };
        next_step(
            modes,
            &SyncInput {
                coordinator: c,
                postgres: p,
                wanted: &wanted,
                wanted_k: 1,
                barrier: Lsn(100),
                standbys: &copy,
            },
        )
        .0
    };
    let closed = SyncSet::closed();
    assert_eq!(next(&old, &old, 100), SetPostgres(closed.clone()));
    assert_eq!(next(&old, &closed, 99), WaitFlushed(new.clone()));
    assert_eq!(next(&old, &closed, 100), SetCoordinator(new.clone()));
    assert_eq!(next(&new, &closed, 100), SetPostgres(new.clone()));
    assert_eq!(next(&new, &new, 100), Done);
}

/// A leader, its standbys, and what its clients were told.
struct Play {
    in_force: Durability,
    c: SyncSet,
    p: SyncSet,
    head: u64,
    barrier: u64,
    acknowledged: u64,
    lives: [u64; 3],
    /// What each copy has flushed; one that is gone is kept as it was: it cannot seal, but it held.
    flushed: BTreeMap<(MemberId, Incarnation), u64>,
}

impl Play {
    fn new() -> Self {
        Self {
            in_force: Async,
            c: SyncSet::default(),
            p: SyncSet::default(),
            head: 1,
            barrier: 1,
            acknowledged: 0,
            lives: [1; 3],
            flushed: BTreeMap::new(),
        }
    }

    fn copy(&self, n: u8) -> (MemberId, Incarnation) {
        (id(n), Incarnation(self.lives[usize::from(n)]))
    }

    fn count(&self, set: &SyncSet, lsn: u64) -> usize {
        let holds = |(m, i): (&MemberId, &Incarnation)| {
            self.flushed.get(&(m.clone(), *i)).copied().unwrap_or(0) >= lsn
        };
        set.members.iter().filter(|x| holds(*x)).count()
    }

    /// A commit is written; the standbys of `mask` flush everything; clients hear what may be heard.
    fn commit(&mut self, mask: u8) {
        self.head += 1;
        for n in (0..3).filter(|n| mask & (1 << n) != 0) {
            self.flushed.insert(self.copy(n), self.head);
        }
        while self.acknowledged < self.head
            && (self.p.k == 0 || self.count(&self.p, self.acknowledged + 1) >= self.p.k as usize)
        {
            self.acknowledged += 1;
        }
    }

    fn step(&mut self, wish: Durability, k: u32, mask: u8) {
        let there: Vec<(MemberId, Incarnation)> = (0..3)
            .filter(|n| mask & (1 << n) != 0)
            .map(|n| self.copy(n))
            .collect();
        let standbys: Vec<StandbyView> = there
            .iter()
            .map(|(member, incarnation)| StandbyView {
                member: member.clone(),
                incarnation: *incarnation,
                streaming: true,
                flush_lsn: Lsn(self
                    .flushed
                    .get(&(member.clone(), *incarnation))
                    .copied()
                    .unwrap_or(0)),
            })
            .collect();
        let (step, mode) = next_step(
            Modes {
                in_force: self.in_force,
                wish,
            },
            &SyncInput {
                coordinator: &self.c,
                postgres: &self.p,
                wanted: &there.into_iter().collect(),
                wanted_k: k,
                barrier: Lsn(self.barrier),
                standbys: &standbys,
            },
        );
        match step {
            Done | WaitFlushed(_) => {}
            SetPostgres(set) => {
                self.p = set;
                self.barrier = self.head;
            }
            SetCoordinator(set) => {
                self.c = set;
                self.in_force = mode;
            }
        }
    }

    /// An election that keeps its promise finds every acknowledged commit.
    fn check(&self) -> Result<(), TestCaseError> {
        if self.in_force != Async {
            let have = self.count(&self.c, self.acknowledged);
            prop_assert!(
                have >= self.c.k as usize,
                "{} acknowledged, on {have} of {:?} ({:?})",
                self.acknowledged,
                self.c,
                self.in_force
            );
            prop_assert!(
                self.p.covers(&self.c),
                "{:?} does not cover {:?}",
                self.p,
                self.c
            );
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Modes, k and standbys change at any moment, copies are made anew: every acknowledged commit is on k of V
    /// whenever the record says quorum or strict, and the wish is reached once it stops changing.
    #[test]
    fn every_mode_keeps_its_promise(
        wishes in proptest::collection::vec((0u8..3, 1u32..3, any::<u8>(), any::<u8>(), 0usize..4), 1..25)
    ) {
        let mode = |n| [Async, Quorum, Strict][usize::from(n)];
        let mut play = Play::new();
        for (wish, k, mask, flush, steps) in wishes {
            if mask & 0xC0 == 0 {
                let n = usize::from(mask >> 3 & 3) % 3;
                play.lives[n] += 1;
            }
            for _ in 0..steps {
                play.step(mode(wish), k, mask & 7);
                play.check()?;
                play.commit(flush & mask & 7);
                play.check()?;
            }
        }
        for wish in [Quorum, Strict, Async, Strict, Quorum] {
            for _ in 0..12 {
                play.step(wish, 2, 7);
                play.commit(7);
                play.check()?;
            }
            prop_assert_eq!(play.in_force, wish);
            let k = if wish == Async { 0 } else { 2 };
            prop_assert_eq!((play.c.k, play.p.k), (k, k));
            prop_assert_eq!(play.c.members.len(), 3);
        }
    }

    /// In `strict` nothing is acknowledged on fewer than k standbys.
    #[test]
    fn strict_acknowledges_nothing_on_fewer_than_k(
        k in 1u32..3, masks in proptest::collection::vec((any::<u8>(), any::<u8>()), 1..40)
    ) {
        let mut play = Play::new();
        while play.in_force != Strict {
            play.step(Strict, k, 7);
            play.commit(7);
        }
        for (mask, flush) in masks {
            let before = play.acknowledged;
            play.step(Strict, k, mask & 7);
            play.commit(flush & mask & 7);
            let copies = play.flushed.values().filter(|f| **f >= play.acknowledged).count();
            prop_assert!(play.acknowledged == before || copies >= k as usize);
            prop_assert_eq!(play.in_force, Strict);
        }
    }
}
