//! One test for each rule of `membership.rs`.

use std::collections::BTreeMap;
use std::time::Duration;

use craton_core::MemberId;

use super::world::{World, id};
use crate::raft::*;

fn settled(seed: u64, n: usize) -> (World, MemberId) {
    let mut world = World::new(seed, n);
    world.until("a leader", 20, |w| w.leader().is_some());
    world.run(Duration::from_secs(1));
    let leader = world.leader().unwrap();
    (world, leader)
}

fn raft<'a>(world: &'a mut World, who: &MemberId) -> &'a mut Raft {
    world.nodes.get_mut(who).unwrap().raft.as_mut().unwrap()
}

fn isolate(world: &mut World, who: &MemberId) {
    for other in world.nodes.keys().filter(|n| *n != who) {
        world.cut.insert((who.clone(), other.clone()));
        world.cut.insert((other.clone(), who.clone()));
    }
}

fn admit(member: &MemberId) -> Change {
    Change::Admit {
        member: member.clone(),
        address: format!("{member}:1"),
    }
}

/// Changes through whoever leads, until it is committed.
fn change(world: &mut World, change: &Change) {
    let before = world.config.0;
    for _ in 0..2000 {
        let leader = world.leader();
        if leader.is_some_and(|leader| world.change(&leader, change).is_ok()) {
            world.until("it is committed", 20, |w| w.config.0 > before);
            world.run(Duration::from_millis(300));
            return;
        }
        world.step();
    }
    panic!("never: {change:?}");
}

fn add(world: &mut World, who: &MemberId) {
    world.add_node(who);
    world.start(who);
    change(world, &admit(who));
    let member = who.clone();
    change(
        world,
        &Change::Promote {
            member,
            below: None,
        },
    );
}

fn leader_of_three(entries: Vec<Entry>) -> Raft {
    let births: Births = (0..3).map(|i| (id(i), i as u64 + 1)).collect();
    let hard = HardState {
        term: 1,
        birth: 1,
        standing: Standing::Voter,
        births,
        ..HardState::default()
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
    let durable = Durable {
        hard,
        image: None,
        entries,
    };
    let mut n = Raft::new(config, durable, at(0));
    n.tick(at(5000));
    n.step(at(5000), said(1, 2, Body::PreVoteReply { granted: true }));
    flush(&mut n);
    let candidate = 1;
    let granted = true;
    n.step(at(5000), said(1, 2, Body::VoteReply { granted, candidate }));
    assert!(n.is_leader());
    flush(&mut n);
    n
}

fn at(ms: u64) -> craton_core::BootTime {
    craton_core::BootTime(ms * 1_000_000)
}

fn said(from: usize, term: RaftTerm, body: Body) -> Message {
    Message {
        from: id(from),
        to: id(0),
        birth: from as u64 + 1,
        voter: true,
        term,
        address: None,
        body,
    }
}

fn flush(raft: &mut Raft) {
    let ready = raft.ready();
    if let Some((token, _)) = ready.writes.last() {
        raft.persisted(at(5000), *token);
    }
    raft.ready();
}

fn remove(i: usize) -> Change {
    Change::Remove { member: id(i) }
}

#[test]
fn a_leader_changes_nothing_before_an_entry_of_its_own_is_committed() {
    let mut n = leader_of_three(vec![]);
    assert_eq!(n.change(at(5001), &remove(2)), Err(ChangeRefused::Pending));
    n.step(at(5002), said(1, 2, Body::Appended { matched: 1 }));
    flush(&mut n);
    assert_eq!(n.change(at(5003), &remove(2)), Ok((2, 2)));
}

#[test]
fn one_change_waits_for_the_other() {
    let mut n = leader_of_three(vec![]);
    n.step(at(5002), said(1, 2, Body::Appended { matched: 1 }));
    n.step(at(5002), said(2, 2, Body::Appended { matched: 1 }));
    flush(&mut n);
    n.change(at(5003), &admit(&id(7))).unwrap();
    flush(&mut n);
    assert_eq!(n.change(at(5004), &remove(2)), Err(ChangeRefused::Pending));
    n.step(at(5005), said(1, 2, Body::Appended { matched: 2 }));
    flush(&mut n);
    n.change(at(5006), &remove(2)).unwrap();
}

#[test]
fn a_configuration_is_in_force_once_it_is_in_the_log_and_undone_with_it() {
    let births: Births = (0..3).map(|i| (id(i), i as u64 + 1)).collect();
    let mut two = births.clone();
    two.remove(&id(2));
    let entry = |index, term, payload| Entry {
        index,
        term,
        payload,
    };
    let config = Configuration {
        epoch: 1,
        voters: two,
        ..Configuration::default()
    };
    let mut n = leader_of_three(vec![entry(1, 1, Payload::Configure(config))]);
    assert_eq!(n.latest().epoch, 1, "read from the disk");
    assert_eq!(n.settled().epoch, 0, "not known to be committed");
    n.step(
        at(5100),
        said(
            1,
            9,
            Body::Append {
                prev_index: 0,
                prev_term: 0,
                entries: vec![entry(1, 9, Payload::Noop)],
                commit: 0,
            },
        ),
    );
    assert_eq!(n.latest().voters, births);
}

#[test]
fn a_voter_removed_by_an_entry_counts_no_more_for_that_entry() {
    // n0 and n2 have the entry that removes n1; that is one voter of the two that are left besides n0.
    let mut n = leader_of_three(vec![]);
    n.step(at(5002), said(1, 2, Body::Appended { matched: 1 }));
    n.step(at(5002), said(2, 2, Body::Appended { matched: 1 }));
    flush(&mut n);
    n.change(at(5003), &remove(1)).unwrap();
    flush(&mut n);
    n.step(at(5004), said(1, 2, Body::Appended { matched: 2 }));
    flush(&mut n);
    assert_eq!(n.commit, 1);
    n.step(at(5005), said(2, 2, Body::Appended { matched: 2 }));
    flush(&mut n);
    assert_eq!(n.commit, 2);
}

#[test]
fn a_learner_gets_entries_and_has_no_say() {
    let (mut world, leader) = settled(1, 3);
    world.add_node(&id(3));
    world.start(&id(3));
    change(&mut world, &admit(&id(3)));
    assert!(world.propose(&leader));
    world.run(Duration::from_secs(1));
    assert_eq!(world.nodes[&id(3)].register, world.nodes[&leader].register);
    assert_eq!(
        raft(&mut world, &id(3)).status().standing,
        Standing::Learner
    );
    // With one voter of three left, a learner does not make a majority.
    let others: Vec<_> = (0..3).map(id).filter(|n| *n != leader).collect();
    for other in &others {
        world.crash(other);
    }
    let before = world.completed;
    world.propose(&leader);
    world.run(Duration::from_secs(10));
    assert_eq!((world.completed, world.leader()), (before, None));
    assert_eq!(raft(&mut world, &id(3)).status().elections, 0);
}

#[test]
fn nobody_is_promoted_before_it_has_caught_up() {
    let (mut world, leader) = settled(2, 3);
    world.add_node(&id(3));
    change(&mut world, &admit(&id(3)));
    let promote = Change::Promote {
        member: id(3),
        below: None,
    };
    assert_eq!(
        world.change(&leader, &promote),
        Err(ChangeRefused::Behind(id(3)))
    );
    world.start(&id(3));
    change(&mut world, &promote);
    assert_eq!(raft(&mut world, &id(3)).status().standing, Standing::Voter);
}

#[test]
fn a_leader_sees_its_own_removal_through_and_steps_down() {
    let (mut world, leader) = settled(3, 3);
    let member = leader.clone();
    change(&mut world, &Change::Remove { member });
    assert!(!raft(&mut world, &leader).is_leader());
    world.until("a leader of the two", 10, |w| {
        w.leader().is_some_and(|l| l != leader)
    });
    let successor = world.leader().unwrap();
    assert!(world.propose(&successor));
    let before = world.completed;
    world.until("it is done", 10, |w| w.completed > before);
}

#[test]
fn who_was_removed_does_not_disturb() {
    let (mut world, leader) = settled(4, 3);
    let removed = (0..3).map(id).find(|n| *n != leader).unwrap();
    isolate(&mut world, &removed);
    let member = removed.clone();
    change(&mut world, &Change::Remove { member });
    world.cut.clear();
    let term = raft(&mut world, &leader).status().term;
    // It does not know, hears nobody, and campaigns as well as it can.
    world.run(Duration::from_secs(20));
    assert_eq!(world.leader(), Some(leader.clone()));
    assert_eq!(raft(&mut world, &leader).status().term, term);
}

#[test]
fn a_voter_that_lags_behind_elects_a_leader_that_it_does_not_know_to_be_a_voter() {
    let (mut world, leader) = settled(5, 2);
    let other = if leader == id(0) { id(1) } else { id(0) };
    world.add_node(&id(2));
    world.start(&id(2));
    change(&mut world, &admit(&id(2)));
    world.cut.insert((leader.clone(), other.clone()));
    world.cut.insert((other.clone(), leader.clone()));
    world
        .change(
            &leader,
            &Change::Promote {
                member: id(2),
                below: None,
            },
        )
        .unwrap();
    world.until("two of the three have it", 1, |w| w.config.1.epoch == 1);
    world.crash(&leader);
    world.cut.clear();
    assert_eq!(raft(&mut world, &other).latest().voters.len(), 2);
    world.until("n2 leads", 20, |w| w.leader() == Some(id(2)));
    let before = world.completed;
    assert!(world.propose(&id(2)));
    world.until("it is done", 10, |w| w.completed > before);
}

/// Both asked while there was room for one; the leader counts.
#[test]
fn of_two_that_ask_for_the_last_say_one_gets_it() {
    let (mut world, leader) = settled(4, 2);
    for new in [id(2), id(3)] {
        world.add_node(&new);
        world.start(&new);
        change(&mut world, &admit(&new));
    }
    let ask = |member| Change::Promote {
        member,
        below: Some(3),
    };
    change(&mut world, &ask(id(2)));
    let refused = world.change(&leader, &ask(id(3))).unwrap_err();
    assert_eq!(refused, ChangeRefused::Enough(3));
    change(
        &mut world,
        &Change::Promote {
            member: id(3),
            below: None,
        },
    );
    assert_eq!(raft(&mut world, &leader).latest().voters.len(), 4);
}

#[test]
fn from_one_to_five_and_back() {
    let (mut world, _) = settled(6, 1);
    for i in 1..5 {
        add(&mut world, &id(i));
    }
    assert_eq!(world.voters().len(), 5);
    for i in 0..4 {
        change(&mut world, &remove(i));
    }
    assert_eq!(world.config.1.voters.keys().collect::<Vec<_>>(), [&id(4)]);
    assert_eq!(world.config.1.epoch, 8);
    let before = world.completed;
    assert!(world.propose(&id(4)));
    world.until("it is done", 10, |w| w.completed > before);
}

#[test]
fn what_earlier_versions_wrote_is_read() {
    let image: Image =
        serde_json::from_str(r#"{"last_index":7,"last_term":2,"births":{"a":1,"b":2},"data":"x"}"#)
            .unwrap();
    let config = image.configuration();
    assert_eq!((config.voters.len(), config.epoch), (2, 0));
}
