//! The rules of 3.1, one by one, and the intersection argument on random histories.

use proptest::prelude::*;

use super::*;
use crate::records::MemberRef;
use crate::sync::SyncSet;
use crate::types::{Incarnation, Term};

fn id(n: usize) -> MemberId {
    MemberId::new(format!("m{n}")).unwrap()
}

struct Case {
    leadership: Leadership,
    seals: BTreeMap<MemberId, At<Seal>>,
    members: BTreeMap<MemberId, At<MemberRecord>>,
    alive: BTreeSet<MemberId>,
    unfit: BTreeSet<MemberId>,
    leader_lsn: Option<Lsn>,
}

/// m0 led; V is m1..=v.
fn case(v: usize, k: u32) -> Case {
    let members = (0..=v)
        .map(|n| {
            let value = MemberRecord {
                host: "h".into(),
                port: 1,
                api: "h:2".into(),
                priority: 100,
                incarnation: Some(Incarnation(1)),
                leaving: false,
            };
            (id(n), At { revision: 1, value })
        })
        .collect();
    Case {
        leadership: Leadership {
            term: Term(2),
            leader: None,
            previous: Some(MemberRef {
                member: id(0),
                incarnation: Incarnation(1),
            }),
            sync: SyncSet {
                members: (1..=v).map(|n| (id(n), Incarnation(1))).collect(),
                k,
            },
            durability: Durability::Quorum,
            timeline: TimelineId(1),
            open: false,
            restarted: false,
            preferred: None,
            allow_data_loss: false,
            recovered: false,
            cause: String::new(),
        },
        seals: BTreeMap::new(),
        members,
        alive: (0..=v).map(id).collect(),
        unfit: BTreeSet::new(),
        leader_lsn: Some(Lsn(1000)),
    }
}

impl Case {
    fn seal(mut self, n: usize, lsn: u64) -> Self {
        let value = Seal {
            term: self.leadership.term,
            incarnation: Incarnation(1),
            timeline: TimelineId(1),
            lsn: Lsn(lsn),
        };
        self.seals.insert(id(n), At { revision: 1, value });
        self
    }

    fn tally(&self) -> Tally {
        Ballot {
            leadership: &self.leadership,
            seals: &self.seals,
            members: &self.members,
            alive: &self.alive,
            unfit: &self.unfit,
            leader_lsn: self.leader_lsn,
            max_lag_bytes: 10,
        }
        .tally()
    }
}

#[test]
fn two_standbys_and_k_1_need_both_seals() {
    let c = case(2, 1).seal(1, 50);
    let t = c.tally();
    assert_eq!((t.needed, t.have, t.winner.clone()), (2, 1, None));
    assert!(t.why.contains("m2 must come back"), "{}", t.why);
    assert_eq!(c.seal(2, 60).tally().winner, Some(id(2)));
}

#[test]
fn ties_go_to_the_wish_then_priority_then_id() {
    let mut c = case(2, 1).seal(1, 50).seal(2, 50);
    assert_eq!(c.tally().winner, Some(id(1)));
    c.members.get_mut(&id(2)).unwrap().value.priority = 200;
    assert_eq!(c.tally().winner, Some(id(2)));
    c.leadership.preferred = Some(id(1));
    assert_eq!(c.tally().winner, Some(id(1)));
}

#[test]
fn who_is_unfit_leads_only_if_nobody_else_can() {
    let mut c = case(2, 1).seal(1, 60).seal(2, 50);
    // m2 holds all that was acknowledged only once the former leader's seal says so.
    c.unfit.insert(id(1));
    assert_eq!(c.tally().winner, Some(id(1)), "nobody else is safe");
    let mut c = c.seal(0, 50);
    assert_eq!(
        c.tally().winner,
        Some(id(2)),
        "fit, safe, and not the former leader"
    );
    c.unfit.insert(id(2));
    assert_eq!(c.tally().winner, Some(id(0)));
    c.unfit.insert(id(0));
    assert_eq!(c.tally().winner, Some(id(1)), "all are unfit: the most WAL");
    // In async the WAL counts first: a byte more may be a commit more.
    let mut c = case(2, 1).seal(1, 1000).seal(2, 995);
    c.leadership.durability = Durability::Async;
    c.unfit.insert(id(1));
    assert_eq!(c.tally().winner, Some(id(1)));
    assert_eq!(c.seal(2, 1000).tally().winner, Some(id(2)));
}

/// Its seal may be there first in a switchover, and its name or priority be the better one: it would succeed itself.
#[test]
fn a_former_leader_comes_after_who_is_as_good() {
    let mut c = case(2, 1).seal(0, 50).seal(1, 50);
    assert_eq!(c.tally().winner, Some(id(1)));
    c.members.get_mut(&id(0)).unwrap().value.priority = 200;
    assert_eq!(c.tally().winner, Some(id(1)));
    c.leadership.preferred = Some(id(0));
    assert_eq!(c.tally().winner, Some(id(0)), "unless it is wished for");
    c.leadership.preferred = None;
    c.alive.remove(&id(1));
    assert_eq!(c.tally().winner, Some(id(0)), "or there is nobody else");
    let c = case(2, 1).seal(0, 60).seal(1, 50);
    assert_eq!(c.tally().winner, Some(id(0)), "or holds more");
}

#[test]
fn a_wish_never_beats_a_longer_log() {
    let mut c = case(2, 1).seal(1, 51).seal(2, 50);
    c.leadership.preferred = Some(id(2));
    assert_eq!(c.tally().winner, Some(id(1)));
}

#[test]
fn the_former_leader_alone_is_enough() {
    assert_eq!(case(2, 1).seal(0, 99).tally().winner, Some(id(0)));
    assert_eq!(case(0, 0).seal(0, 99).tally().winner, Some(id(0)));
}

#[test]
fn nobody_follows_a_leader_that_was_alone() {
    let mut c = case(2, 1).seal(1, 99).seal(2, 99);
    c.leadership.sync = SyncSet::default();
    let t = c.tally();
    assert_eq!(t.winner, None);
    assert!(t.why.contains("was alone"), "{}", t.why);
}

#[test]
fn another_incarnation_does_not_count() {
    let mut c = case(2, 1).seal(1, 50).seal(2, 60);
    c.seals.get_mut(&id(2)).unwrap().value.incarnation = Incarnation(7);
    assert_eq!(c.tally().winner, None);
    let mut c = case(1, 1).seal(0, 50);
    c.seals.get_mut(&id(0)).unwrap().value.incarnation = Incarnation(7);
    assert_eq!(c.tally().winner, None);
}

#[test]
fn old_seals_do_not_count() {
    let mut c = case(1, 1).seal(1, 50);
    c.seals.get_mut(&id(1)).unwrap().value.term = Term(1);
    assert_eq!(c.tally().winner, None);
}

#[test]
fn a_dead_member_with_the_most_wal_is_waited_for_only_if_it_must_be() {
    // k = 1 of 2: m2 may hold an acknowledged commit alone.
    let mut c = case(2, 1).seal(1, 50).seal(2, 60);
    c.alive.remove(&id(2));
    assert_eq!(c.tally().winner, None);
    // k = 2 of 3: needs two seals, and m1 and m3 are two.
    let mut c = case(3, 2).seal(1, 50).seal(2, 60).seal(3, 40);
    c.alive.remove(&id(2));
    assert_eq!(c.tally().winner, Some(id(1)));
}

#[test]
fn async_takes_the_longest_within_the_limit() {
    let mut c = case(2, 1).seal(1, 995).seal(2, 980);
    c.leadership.durability = Durability::Async;
    c.leadership.sync.k = 0;
    assert_eq!(c.tally().winner, Some(id(1)));
    c.leader_lsn = None;
    assert_eq!(
        c.tally().winner,
        Some(id(1)),
        "it was near when the leader listed it"
    );
    c.leader_lsn = Some(Lsn(1000));
    c.alive.remove(&id(1));
    assert_eq!(c.tally().winner, None);
}

#[test]
fn in_async_only_those_that_the_leader_had_listed_stand() {
    let mut c = case(2, 0).seal(1, 999).seal(2, 995);
    c.leadership.durability = Durability::Async;
    c.leadership.sync.members.remove(&id(1));
    assert_eq!(c.tally().winner, Some(id(2)));
    c.leadership.sync.members.clear();
    let t = c.tally();
    assert_eq!(t.winner, None);
    assert!(t.why.contains("streamed from m0"), "{}", t.why);
    // Anybody may who holds what the former leader sealed: it leads no longer.
    let c = c.seal(1, 800).seal(2, 800).seal(0, 900);
    assert_eq!(c.tally().winner, Some(id(0)));
    assert_eq!(
        c.seal(1, 900).tally().winner,
        Some(id(1)),
        "a tie goes to who did not lead before"
    );
}

#[test]
fn strict_counts_as_quorum_does() {
    let mut c = case(2, 1).seal(1, 50);
    c.leadership.durability = Durability::Strict;
    assert_eq!(c.tally().winner, None);
    assert_eq!(c.seal(2, 60).tally().winner, Some(id(2)));
}

#[test]
fn what_a_member_that_never_leads_holds_is_fetched_first() {
    let mut c = case(2, 1).seal(1, 50).seal(2, 60);
    c.members.get_mut(&id(2)).unwrap().value.priority = 0;
    let t = c.tally();
    assert_eq!(t.winner, None);
    let catch_up = t.catch_up.unwrap();
    assert_eq!((catch_up.from, catch_up.lsn), (id(2), Lsn(60)));
    assert_eq!(catch_up.followers, [id(1)]);
    // It has it now.
    let c = c.seal(1, 60);
    assert_eq!((c.tally().winner, c.tally().catch_up), (Some(id(1)), None));
    // The holder is away: it may hold an acknowledged commit alone.
    let mut c = c.seal(1, 50);
    c.alive.remove(&id(2));
    assert_eq!((c.tally().winner, c.tally().catch_up), (None, None));
    // The former leader itself must not lead again, and was alone: whoever gets its WAL may.
    let mut c = case(1, 1).seal(0, 60).seal(1, 50);
    c.leadership.sync = SyncSet::default();
    c.members.get_mut(&id(0)).unwrap().value.priority = 0;
    assert_eq!(c.tally().catch_up.unwrap().followers, [id(1)]);
    assert_eq!(c.seal(1, 60).tally().winner, Some(id(1)));
    // Nobody who could lead has sealed.
    let mut c = case(2, 1).seal(2, 60);
    c.members.get_mut(&id(2)).unwrap().value.priority = 0;
    assert_eq!((c.tally().winner, c.tally().catch_up), (None, None));
}

#[test]
fn the_operator_may_take_the_loss() {
    let mut c = case(2, 1).seal(1, 50);
    c.leadership.allow_data_loss = true;
    assert_eq!(c.tally().winner, Some(id(1)));
    let mut c = c.seal(2, 60);
    c.leadership.preferred = Some(id(1));
    assert_eq!(c.tally().winner, Some(id(1)));
}

/// One voter's disk is all there is, and says V = {m1}: m0 may have gone on alone since, by voters that are gone.
#[test]
fn recovered_records_prove_nothing() {
    let mut c = case(1, 1).seal(1, 50);
    assert_eq!(c.tally().winner, Some(id(1)));
    c.leadership = c.leadership.into_recovered(0);
    assert_eq!(c.tally().have, 0, "what was sealed before is over");
    let c = c.seal(1, 50);
    let tally = c.tally();
    assert_eq!((tally.winner, tally.catch_up), (None, None));
    assert_eq!(
        (tally.needed, tally.have),
        (1, 1),
        "seals are not the matter"
    );
    assert!(
        tally.why.contains("craton failover --allow-data-loss"),
        "{}",
        tally.why
    );
    // The former leader by these records: another may have led after it.
    let c = c.seal(0, 60);
    assert_eq!(c.tally().winner, None);
    // Nor may anybody get its WAL and lead then.
    let mut c = c;
    c.members.get_mut(&id(0)).unwrap().value.priority = 0;
    assert_eq!(c.tally().catch_up, None);
    let mut loose = case(1, 0).seal(1, 1000);
    loose.leadership.durability = Durability::Async;
    assert_eq!(loose.tally().winner, Some(id(1)));
    loose.leadership = loose.leadership.into_recovered(0);
    assert_eq!(loose.seal(1, 1000).tally().winner, None);

    // What was accepted before the recovery was another loss.
    let mut c = case(1, 1).seal(1, 50);
    (c.leadership.allow_data_loss, c.leadership.preferred) = (true, Some(id(1)));
    c.leadership = c.leadership.into_recovered(0);
    let mut c = c.seal(1, 50);
    assert_eq!(c.leadership.preferred, None);
    assert_eq!(c.tally().winner, None);
    c.leadership.allow_data_loss = true;
    assert_eq!(c.tally().winner, Some(id(1)));
}

proptest! {
    /// Commits are flushed on any k of V; members seal at any moment, some never: a winner, if there is
    /// one, holds every acknowledged commit.
    #[test]
    fn a_winner_holds_every_acknowledged_commit(
        v in 1usize..5,
        k in 1u32..4,
        acks in proptest::collection::vec(any::<[u8; 4]>(), 0..30),
        sealed in any::<u8>(),
        alive in any::<u8>(),
    ) {
        let k = k.min(u32::try_from(v).unwrap());
        let mut flushed = vec![0u64; v + 1];
        let mut acknowledged = 0u64;
        for (n, wish) in acks.iter().enumerate() {
            let lsn = n as u64 + 1;
            // WAL is a prefix: whoever flushes this has everything before it.
            let who: BTreeSet<usize> = wish.iter().map(|b| usize::from(*b) % v + 1).collect();
            for w in &who {
                flushed[*w] = lsn;
            }
            if who.len() >= k as usize {
                acknowledged = lsn;
            }
        }
        let mut c = case(v, k);
        for (n, lsn) in flushed.iter().enumerate().skip(1) {
            if sealed & (1 << n) != 0 {
                c = c.seal(n, *lsn);
            }
        }
        c.alive = (0..=v).filter(|n| alive & (1 << n) != 0).map(id).collect();
        if let Some(w) = c.tally().winner {
            let n: usize = w.as_str()[1..].parse().unwrap();
            prop_assert!(flushed[n] >= acknowledged, "{w} holds {} of {acknowledged}", flushed[n]);
        }
    }
}
