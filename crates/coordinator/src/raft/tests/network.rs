//! Seeds. A failing one is replayed with `CRATON_RAFT_SEED=<seed> cargo test -p craton-coordinator raft`;
//! `CRATON_RAFT_SEEDS=<n>` runs that many of each kind.

use std::time::Duration;

use craton_core::MemberId;

use super::world::{Faults, Flaw, Node, World, id};
use crate::raft::{Change, Raft, Standing};

/// Faults for a while, then peace, in which everything has to come back.
fn run(seed: u64, nodes: usize, faults: Faults) -> World {
    run_flawed(seed, nodes, faults, None)
}

fn run_flawed(seed: u64, nodes: usize, faults: Faults, flaw: Option<Flaw>) -> World {
    let mut world = World::new(seed, nodes);
    world.flaw = flaw;
    world.until("the cluster begins", 20, |w| {
        w.nodes
            .values()
            .all(|n| n.disk.hard.standing == Standing::Voter)
    });
    world.faults = faults;
    for _ in 0..1500 {
        world.step();
        let who = any(&mut world);
        if faults.change > 0 && world.dice.chance(faults.change) {
            change_something(&mut world);
        }
        if world.dice.chance(200) {
            world.propose(&who);
        }
        if world.dice.chance(100) {
            world.read(&who);
        }
        if world.dice.chance(20) {
            world.check_logs();
        }
    }
    world.faults = Faults {
        delay_ms_max: 2,
        ..Faults::default()
    };
    world.cut.clear();
    let all: Vec<MemberId> = world.nodes.keys().cloned().collect();
    for who in &all {
        world.nodes.get_mut(who).unwrap().stalled_until = 0;
        if world.nodes[who].raft.is_none() {
            world.start(who);
        }
    }
    world.until("all have a say again", 30, |w| {
        let quiet = |n: &Node| !n.raft.as_ref().is_some_and(Raft::change_pending);
        let voters = w.voters();
        let mut here = w.nodes.iter().filter(|(who, _)| voters.contains(*who));
        here.all(|(_, n)| {
            quiet(n)
                && n.raft
                    .as_ref()
                    .is_some_and(|r| r.status().standing == Standing::Voter)
        })
    });
    // What is very late has arrived by then.
    world.run(Duration::from_secs(3));
    world.until("a leader", 10, |w| w.leader().is_some());
    let leader = world.leader().unwrap();
    assert!(world.propose(&leader), "the leader takes a proposal");
    world.until("everybody applied everything", 10, |w| {
        let applied = |n: &Node| n.register.clone();
        let first = Some(applied(&w.nodes[&leader]));
        let mut here = w.nodes.iter().filter(|(who, _)| w.belongs(who));
        here.all(|(_, n)| {
            Some(applied(n)) == first
                && n.raft
                    .as_ref()
                    .is_some_and(|r| r.commit == r.log.last_index())
        })
    });
    world.check_logs();
    world
}

fn any(world: &mut World) -> MemberId {
    let all: Vec<MemberId> = world.nodes.keys().cloned().collect();
    let nth = world.dice.below(all.len() as u64);
    all[usize::try_from(nth).unwrap()].clone()
}

/// Hosts that come and go, at most this many.
const HOSTS_MAX: u64 = 6;

/// An operator's wish, of a host that may or may not be there.
fn change_something(world: &mut World) {
    let member = id(usize::try_from(world.dice.below(HOSTS_MAX)).unwrap());
    if !world.nodes.contains_key(&member) {
        world.add_node(&member);
        world.start(&member);
    }
    let other = any(world);
    let change = match world.dice.below(5) {
        0 => Change::Remove { member },
        1 => Change::Demote { member },
        2 => Change::Admit {
            address: format!("{member}:1"),
            member,
        },
        _ => Change::Promote {
            member,
            below: None,
        },
    };
    let leaders: Vec<MemberId> = world
        .nodes
        .iter()
        .filter(|(_, n)| n.raft.as_ref().is_some_and(Raft::is_leader))
        .map(|(who, _)| who.clone())
        .collect();
    for leader in leaders {
        if world.flaw == Some(Flaw::Jump) {
            let and = Change::Remove {
                member: other.clone(),
            };
            world.jump(&leader, &[&change, &and]);
        } else {
            let _ = world.change(&leader, &change);
        }
    }
}

fn seeds(name: &str, count: u64, nodes: usize, faults: Faults) {
    let number = |name| std::env::var(name).ok().and_then(|s| s.parse::<u64>().ok());
    let one = number("CRATON_RAFT_SEED");
    let count = number("CRATON_RAFT_SEEDS").unwrap_or(count);
    let range = one.map_or(0..count, |s| s..s + 1);
    let (mut completed, mut reads, mut wipes, mut changes) = (0, 0, 0, 0);
    for seed in range.clone() {
        let outcome = std::panic::catch_unwind(|| run(seed, nodes, faults));
        let world = match outcome {
            Ok(world) => world,
            Err(e) => {
                eprintln!("{name}: seed {seed} fails");
                std::panic::resume_unwind(e);
            }
        };
        completed += world.completed;
        reads += world.reads_done;
        wipes += world.wipes;
        changes += world.changes;
    }
    eprintln!(
        "{name}: {range:?}: {completed} writes, {reads} reads, {wipes} lost disks, {changes} changes of the members"
    );
    assert!(
        one.is_some() || faults.change == 0 || changes > count * 2,
        "the members hardly changed"
    );
    assert!(
        one.is_some() || completed > count && reads > count,
        "the faults left nothing to check"
    );
    assert!(
        one.is_some() || faults.wipe == 0 || wipes > count / 4,
        "no disk was lost"
    );
}

const ROUGH: Faults = Faults {
    drop: 50,
    duplicate: 50,
    delay_ms_max: 40,
    crash: 2,
    restart: 20,
    cut: 10,
    stall: 1,
    wipe: 0,
    change: 0,
};

#[test]
fn three_nodes_lossy_network() {
    seeds(
        "lossy",
        100,
        3,
        Faults {
            crash: 0,
            stall: 0,
            cut: 0,
            drop: 200,
            ..ROUGH
        },
    );
}

#[test]
fn three_nodes_crashes_and_partitions() {
    seeds("rough", 400, 3, ROUGH);
}

#[test]
fn five_nodes_crashes_and_partitions() {
    seeds("rough 5", 120, 5, ROUGH);
}

#[test]
fn three_nodes_that_lose_their_disks() {
    seeds(
        "wipes",
        400,
        3,
        Faults {
            wipe: 1,
            crash: 1,
            cut: 5,
            ..ROUGH
        },
    );
}

#[test]
fn five_nodes_that_lose_their_disks() {
    seeds(
        "wipes 5",
        120,
        5,
        Faults {
            wipe: 1,
            crash: 1,
            cut: 5,
            ..ROUGH
        },
    );
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let trace = |seed| {
        let world = run(seed, 3, ROUGH);
        (
            world.now_ms,
            world.completed,
            world.reads_done,
            world.nodes[&id(0)].register.clone(),
        )
    };
    assert_eq!(trace(7), trace(7));
}

const CHANGING: Faults = Faults {
    change: 40,
    crash: 1,
    cut: 10,
    ..ROUGH
};

#[test]
fn members_come_and_go() {
    seeds("members", 300, 3, CHANGING);
}

#[test]
fn a_lonely_voter_gets_company() {
    seeds("members 1", 100, 1, CHANGING);
}

#[test]
fn members_come_and_go_and_lose_their_disks() {
    seeds(
        "members, wipes",
        300,
        3,
        Faults {
            wipe: 1,
            ..CHANGING
        },
    );
}

/// Runs seeds under a broken rule until one of them is noticed.
fn is_noticed(flaw: Flaw, count: u64) {
    let found = (0..count).find_map(|seed| {
        let outcome = std::panic::catch_unwind(|| run_flawed(seed, 4, CHANGING, Some(flaw)));
        let why = outcome.err()?.downcast::<String>().ok()?;
        // A cluster that stops is no loss; what counts here is one that decides twice.
        (!why.starts_with("not within")).then_some((seed, why))
    });
    let (seed, why) = found.unwrap_or_else(|| panic!("{flaw:?} not noticed in {count} seeds"));
    eprintln!("{flaw:?}: noticed in seed {seed}: {why}");
}

#[test]
fn changes_that_do_not_wait_for_each_other_are_noticed() {
    is_noticed(Flaw::Impatient, 1000);
}

#[test]
fn two_voters_at_once_are_noticed() {
    is_noticed(Flaw::Jump, 1000);
}
