//! Seeds. A failing one is replayed with `CRATON_RAFT_SEED=<seed> cargo test -p craton-coordinator raft`;
//! `CRATON_RAFT_SEEDS=<n>` runs that many of each kind.

use std::time::Duration;

use super::world::{Faults, World, id};
use crate::raft::Standing;

/// Faults for a while, then peace, in which everything has to come back.
fn run(seed: u64, nodes: usize, faults: Faults) -> World {
    let mut world = World::new(seed, nodes);
    world.until("the cluster begins", 20, |w| {
        w.nodes
            .values()
            .all(|n| n.disk.hard.standing == Standing::Voter)
    });
    world.faults = faults;
    for _ in 0..1500 {
        world.step();
        let who = id(usize::try_from(world.dice.below(nodes as u64)).unwrap());
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
    for i in 0..nodes {
        world.nodes.get_mut(&id(i)).unwrap().stalled_until = 0;
        if world.nodes[&id(i)].raft.is_none() {
            world.start(&id(i));
        }
    }
    world.until("all have a say again", 30, |w| {
        w.nodes.values().all(|n| {
            n.raft
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
        let applied = |n: &super::world::Node| n.register.clone();
        let first = w.nodes.values().next().map(applied);
        w.nodes.values().all(|n| {
            Some(applied(n)) == first
                && n.raft
                    .as_ref()
                    .is_some_and(|r| r.commit == r.log.last_index())
        })
    });
    world.check_logs();
    world
}

fn seeds(name: &str, count: u64, nodes: usize, faults: Faults) {
    let number = |name| std::env::var(name).ok().and_then(|s| s.parse::<u64>().ok());
    let one = number("CRATON_RAFT_SEED");
    let count = number("CRATON_RAFT_SEEDS").unwrap_or(count);
    let range = one.map_or(0..count, |s| s..s + 1);
    let (mut completed, mut reads, mut wipes) = (0, 0, 0);
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
    }
    eprintln!("{name}: {range:?}: {completed} writes, {reads} reads, {wipes} lost disks");
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
