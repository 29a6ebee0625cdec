//! One test for each rule.

use std::collections::BTreeMap;
use std::time::Duration;

use super::world::{World, id};
use crate::raft::*;

fn settled(seed: u64) -> (World, craton_core::MemberId) {
    let mut world = World::new(seed, 3);
    world.until("a leader", 20, |w| w.leader().is_some());
    world.run(Duration::from_secs(1));
    let leader = world.leader().unwrap();
    (world, leader)
}

fn others(of: &craton_core::MemberId) -> Vec<craton_core::MemberId> {
    (0..3).map(id).filter(|n| n != of).collect()
}

fn isolate(world: &mut World, who: &craton_core::MemberId) {
    for other in others(who) {
        world.cut.insert((who.clone(), other.clone()));
        world.cut.insert((other, who.clone()));
    }
}

fn raft<'a>(world: &'a mut World, who: &craton_core::MemberId) -> &'a mut Raft {
    world.nodes.get_mut(who).unwrap().raft.as_mut().unwrap()
}

fn message(from: usize, to: usize, term: RaftTerm, body: Body) -> Message {
    Message {
        from: id(from),
        to: id(to),
        birth: 9,
        voter: true,
        term,
        address: None,
        body,
    }
}

/// A voter `n0` of three in term 1, without a leader.
fn voter(entries: Vec<Entry>) -> Raft {
    let births = (0..3).map(|i| (id(i), i as u64 + 1)).collect();
    let hard = HardState {
        term: 1,
        vote: None,
        birth: 1,
        standing: Standing::Voter,
        births,
    };
    let config = Config {
        me: id(0),
        voters: (0..3).map(id).collect(),
        joining: false,
        address: None,
        addresses: BTreeMap::new(),
        timings: Timings::default(),
        seed: 1,
    };
    Raft::new(
        config,
        Durable {
            hard,
            image: None,
            entries,
        },
        at(0),
    )
}

fn at(ms: u64) -> craton_core::BootTime {
    craton_core::BootTime(ms * 1_000_000)
}

fn entry(index: Index, term: RaftTerm) -> Entry {
    Entry {
        index,
        term,
        payload: Payload::Command(format!("{index} {term}")),
    }
}

/// Writes everything; hands out what was said before and after.
fn flush(raft: &mut Raft) -> (Vec<Body>, Vec<Body>) {
    let ready = raft.ready();
    if let Some((token, _)) = ready.writes.last() {
        raft.persisted(at(0), *token);
    }
    let bodies = |m: Vec<Message>| m.into_iter().map(|m| m.body).collect();
    (bodies(ready.messages), bodies(raft.ready().messages))
}

#[test]
fn a_vote_is_given_once_a_term_and_only_after_it_is_on_disk() {
    let mut n = voter(vec![]);
    n.step(
        at(1),
        message(
            1,
            0,
            2,
            Body::Vote {
                last_index: 0,
                last_term: 0,
            },
        ),
    );
    let (before, after) = flush(&mut n);
    assert_eq!(before, vec![]);
    assert_eq!(
        after,
        vec![Body::VoteReply {
            granted: true,
            candidate: 9
        }]
    );
    n.step(
        at(2),
        message(
            2,
            0,
            2,
            Body::Vote {
                last_index: 0,
                last_term: 0,
            },
        ),
    );
    assert_eq!(
        flush(&mut n).0,
        vec![Body::VoteReply {
            granted: false,
            candidate: 9
        }]
    );
    n.step(
        at(3),
        message(
            1,
            0,
            2,
            Body::Vote {
                last_index: 0,
                last_term: 0,
            },
        ),
    );
    assert_eq!(
        flush(&mut n).0,
        vec![Body::VoteReply {
            granted: true,
            candidate: 9
        }],
        "the same again is harmless"
    );
}

#[test]
fn no_vote_for_a_log_that_is_behind() {
    for (last_index, last_term, granted) in [
        (2, 1, false),
        (3, 1, false),
        (1, 2, false),
        (2, 2, true),
        (1, 3, true),
    ] {
        let mut n = voter(vec![entry(1, 1), entry(2, 2)]);
        n.step(
            at(1),
            message(
                1,
                0,
                5,
                Body::Vote {
                    last_index,
                    last_term,
                },
            ),
        );
        let (before, after) = flush(&mut n);
        let all = [before, after].concat();
        assert_eq!(
            all,
            vec![Body::VoteReply {
                granted,
                candidate: 9
            }],
            "{last_index} {last_term}"
        );
    }
}

#[test]
fn an_append_is_acknowledged_only_after_it_is_on_disk_and_a_heartbeat_at_once() {
    let mut n = voter(vec![]);
    n.step(
        at(1),
        message(
            1,
            0,
            2,
            Body::Append {
                prev_index: 0,
                prev_term: 0,
                entries: vec![entry(1, 2)],
                commit: 0,
            },
        ),
    );
    n.step(
        at(1),
        message(
            1,
            0,
            2,
            Body::Heartbeat {
                commit: 0,
                round: 3,
            },
        ),
    );
    let (before, after) = flush(&mut n);
    assert_eq!(
        before,
        vec![Body::HeartbeatReply {
            round: 3,
            verified: 1
        }]
    );
    assert_eq!(after, vec![Body::Appended { matched: 1 }]);
}

#[test]
fn a_conflicting_suffix_is_replaced_and_a_gap_refused() {
    let mut n = voter(vec![entry(1, 1), entry(2, 1), entry(3, 1)]);
    n.step(
        at(1),
        message(
            1,
            0,
            3,
            Body::Append {
                prev_index: 5,
                prev_term: 2,
                entries: vec![],
                commit: 0,
            },
        ),
    );
    assert_eq!(
        flush(&mut n).0,
        vec![Body::Conflict {
            prev_index: 5,
            hint_index: 4,
            hint_term: 0
        }]
    );
    n.step(
        at(1),
        message(
            1,
            0,
            3,
            Body::Append {
                prev_index: 3,
                prev_term: 2,
                entries: vec![],
                commit: 0,
            },
        ),
    );
    assert_eq!(
        flush(&mut n).0,
        vec![Body::Conflict {
            prev_index: 3,
            hint_index: 1,
            hint_term: 1
        }]
    );
    let entries = vec![entry(2, 2), entry(3, 3)];
    n.step(
        at(1),
        message(
            1,
            0,
            3,
            Body::Append {
                prev_index: 1,
                prev_term: 1,
                entries,
                commit: 2,
            },
        ),
    );
    assert_eq!(flush(&mut n).1, vec![Body::Appended { matched: 3 }]);
    assert_eq!(
        (n.log.term(2), n.log.term(3), n.commit),
        (Some(2), Some(3), 2)
    );
}

#[test]
fn a_late_duplicate_of_a_short_append_does_not_truncate() {
    let mut n = voter(vec![]);
    let entries = vec![entry(1, 2), entry(2, 2)];
    n.step(
        at(1),
        message(
            1,
            0,
            2,
            Body::Append {
                prev_index: 0,
                prev_term: 0,
                entries,
                commit: 0,
            },
        ),
    );
    n.step(
        at(1),
        message(
            1,
            0,
            2,
            Body::Append {
                prev_index: 0,
                prev_term: 0,
                entries: vec![entry(1, 2)],
                commit: 0,
            },
        ),
    );
    assert_eq!(n.log.last_index(), 2);
}

#[test]
fn a_follower_commits_only_what_the_leader_has_verified() {
    let mut n = voter(vec![entry(1, 1), entry(2, 1)]);
    n.step(
        at(1),
        message(
            1,
            0,
            3,
            Body::Heartbeat {
                commit: 2,
                round: 0,
            },
        ),
    );
    assert_eq!(n.commit, 0, "entry 2 may not be the leader's");
    n.step(
        at(1),
        message(
            1,
            0,
            3,
            Body::Append {
                prev_index: 1,
                prev_term: 1,
                entries: vec![],
                commit: 2,
            },
        ),
    );
    assert_eq!(n.commit, 1);
}

#[test]
fn who_hears_a_leader_ignores_candidates() {
    let mut n = voter(vec![]);
    n.step(
        at(1),
        message(
            1,
            0,
            2,
            Body::Heartbeat {
                commit: 0,
                round: 0,
            },
        ),
    );
    flush(&mut n);
    n.step(
        at(100),
        message(
            2,
            0,
            9,
            Body::Vote {
                last_index: 9,
                last_term: 9,
            },
        ),
    );
    assert_eq!((flush(&mut n).0, n.hard.term), (vec![], 2));
    n.step(
        at(100),
        message(
            2,
            0,
            9,
            Body::PreVote {
                last_index: 9,
                last_term: 9,
            },
        ),
    );
    assert_eq!(flush(&mut n).0, vec![Body::PreVoteReply { granted: false }]);
    n.step(
        at(700),
        message(
            2,
            0,
            9,
            Body::PreVote {
                last_index: 9,
                last_term: 9,
            },
        ),
    );
    assert_eq!(
        (flush(&mut n).0, n.hard.term),
        (vec![Body::PreVoteReply { granted: true }], 2),
        "a pre-vote changes nothing"
    );
}

#[test]
fn an_isolated_node_does_not_disturb_when_it_comes_back() {
    let (mut world, leader) = settled(1);
    let term = raft(&mut world, &leader).hard.term;
    let apart = others(&leader)[0].clone();
    isolate(&mut world, &apart);
    world.run(Duration::from_secs(20));
    world.cut.clear();
    world.run(Duration::from_secs(5));
    assert_eq!(world.leader(), Some(leader.clone()));
    assert_eq!(raft(&mut world, &leader).hard.term, term);
}

#[test]
fn a_leader_without_a_majority_steps_down_and_serves_no_reads() {
    let (mut world, leader) = settled(2);
    isolate(&mut world, &leader);
    let now = world.now();
    raft(&mut world, &leader).read(now, 77).unwrap();
    world.run(Duration::from_secs(2));
    assert!(!raft(&mut world, &leader).is_leader());
    let successor = world.leader().unwrap();
    assert_ne!(successor, leader);
    assert_eq!(world.reads_done, 0);
}

#[test]
fn a_leader_with_a_stalled_disk_leads_on_and_commits_through_the_others() {
    let (mut world, leader) = settled(3);
    let term = raft(&mut world, &leader).hard.term;
    world.nodes.get_mut(&leader).unwrap().stalled_until = world.now_ms + 5000;
    let before = world.completed;
    for _ in 0..100 {
        assert!(world.propose(&leader));
        world.run(Duration::from_millis(40));
    }
    assert!(
        world.completed - before > 95,
        "{} of 100",
        world.completed - before
    );
    let status = raft(&mut world, &leader).status();
    assert_eq!((status.role, status.term), (RoleName::Leader, term));
}

#[test]
fn entries_of_former_terms_are_not_committed_by_counting() {
    // Paper, figure 8: n0 leads in term 3 with an entry of term 1 that n1 has too.
    let mut n = voter(vec![entry(1, 1)]);
    n.hard.term = 2;
    n.tick(at(5000));
    n.step(
        at(5000),
        message(1, 0, 3, Body::PreVoteReply { granted: true }),
    );
    flush(&mut n);
    n.step(
        at(5000),
        message(
            1,
            0,
            3,
            Body::VoteReply {
                granted: true,
                candidate: 1,
            },
        ),
    );
    assert!(n.is_leader());
    flush(&mut n);
    n.step(at(5001), message(1, 0, 3, Body::Appended { matched: 1 }));
    assert_eq!(n.commit, 0, "entry 1 is on two disks, but it is of term 1");
    n.step(at(5002), message(1, 0, 3, Body::Appended { matched: 2 }));
    assert_eq!(n.commit, 2);
}

#[test]
fn the_leader_counts_its_own_copy_only_once_it_is_on_its_disk() {
    let mut n = voter(vec![]);
    n.tick(at(5000));
    n.step(
        at(5000),
        message(1, 0, 2, Body::PreVoteReply { granted: true }),
    );
    flush(&mut n);
    n.step(
        at(5000),
        message(
            1,
            0,
            2,
            Body::VoteReply {
                granted: true,
                candidate: 1,
            },
        ),
    );
    assert!(n.is_leader());
    n.step(at(5001), message(1, 0, 2, Body::Appended { matched: 1 }));
    assert_eq!(n.commit, 0, "only one copy is known to be on a disk");
    flush(&mut n);
    assert_eq!(n.commit, 1);
}

#[test]
fn a_follower_that_was_away_for_long_gets_an_image() {
    let (mut world, leader) = settled(4);
    let away = others(&leader)[0].clone();
    world.crash(&away);
    for _ in 0..100 {
        assert!(world.propose(&leader));
        world.run(Duration::from_millis(20));
    }
    assert!(
        raft(&mut world, &leader).log.base() > 50,
        "the log is bounded"
    );
    world.start(&away);
    world.run(Duration::from_secs(2));
    assert_eq!(world.nodes[&away].register, world.nodes[&leader].register);
}

#[test]
fn a_lost_disk_has_no_say_until_the_others_agree() {
    let (mut world, leader) = settled(5);
    let lost = others(&leader)[0].clone();
    let other = others(&leader)[1].clone();
    assert!(world.propose(&leader));
    world.run(Duration::from_secs(1));
    // The other is away: nobody may readmit the one that lost its disk, and nothing is committed.
    world.crash(&other);
    assert!(world.wipe(&lost));
    world.start(&lost);
    let before = world.completed;
    world.propose(&leader);
    world.run(Duration::from_secs(10));
    assert_eq!(
        raft(&mut world, &lost).status().standing,
        Standing::Recovering
    );
    assert_eq!(
        world.completed, before,
        "a copy on the lost disk does not count"
    );
    assert_eq!(world.leader(), None);
    world.start(&other);
    world.until("readmitted", 10, |w| {
        w.nodes[&lost]
            .raft
            .as_ref()
            .is_some_and(|r| r.status().standing == Standing::Voter)
    });
}

#[test]
fn a_node_that_is_not_a_voter_votes_for_nobody() {
    for standing in [Standing::Fresh, Standing::Recovering] {
        let mut n = voter(vec![]);
        n.hard.standing = standing;
        let (last_index, last_term) = (9, 9);
        n.step(
            at(5000),
            message(
                1,
                0,
                2,
                Body::PreVote {
                    last_index,
                    last_term,
                },
            ),
        );
        assert_eq!(flush(&mut n).0, vec![Body::PreVoteReply { granted: false }]);
        n.step(
            at(5000),
            message(
                1,
                0,
                2,
                Body::Vote {
                    last_index,
                    last_term,
                },
            ),
        );
        let (before, after) = flush(&mut n);
        assert_eq!(
            [before, after].concat(),
            vec![Body::VoteReply {
                granted: false,
                candidate: 9
            }]
        );
        n.tick(at(60_000));
        assert_eq!(n.elections, 0, "nor does it campaign");
    }
}

#[test]
fn an_empty_disk_that_the_others_know_otherwise_is_a_lost_one() {
    let mut n = voter(vec![]);
    (n.hard.standing, n.hard.birth) = (Standing::Fresh, 77);
    n.settled.voters.clear();
    let births: Births = (0..3).map(|i| (id(i), i as u64 + 1)).collect();
    n.step(
        at(1),
        message(
            1,
            0,
            1,
            Body::Census {
                standing: Standing::Voter,
                births,
                ask: false,
            },
        ),
    );
    assert_eq!(n.status().standing, Standing::Recovering);
}

#[test]
fn a_majority_of_lost_disks_stops_everything() {
    let (mut world, leader) = settled(6);
    assert!(world.propose(&leader));
    world.run(Duration::from_secs(1));
    for who in others(&leader) {
        world.crash(&who);
        let birth = world.dice.draw() | 1;
        let hard = HardState {
            birth,
            ..HardState::default()
        };
        world.nodes.get_mut(&who).unwrap().disk = Durable {
            hard,
            ..Durable::default()
        };
        world.start(&who);
    }
    let before = world.completed;
    world.run(Duration::from_secs(20));
    assert_eq!((world.leader(), world.completed), (None, before));
}

#[test]
fn one_voter_alone_is_a_majority() {
    let mut world = World::new(8, 1);
    world.until("a leader", 5, |w| w.leader().is_some());
    assert!(world.propose(&id(0)));
    world.read(&id(0));
    world.run(Duration::from_secs(1));
    assert_eq!((world.completed, world.reads_done), (1, 1));
}

#[test]
fn a_new_cluster_begins_only_when_all_are_there() {
    let mut world = World::new(9, 3);
    world.crash(&id(2));
    world.run(Duration::from_secs(5));
    assert_eq!(world.leader(), None);
    world.start(&id(2));
    world.until("a leader", 10, |w| w.leader().is_some());
}
