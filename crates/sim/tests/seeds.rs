//! Hundreds of clusters, each from a seed: no invariant breaks, and a rule broken on purpose is found out.

use craton_core::settings::Durability;
use craton_sim::shrink::shrink;
use craton_sim::{Flaw, Options, run};

/// What the runs came to.
#[derive(Default)]
struct Totals {
    /// Elections that got WAL out of a backup.
    from_backups: u64,
    /// Deadlines that rested on promises while V listed a backup.
    carried_beside_backups: u64,
}

/// Runs the seeds; the first that fails names the command that replays it.
fn check(seeds: std::ops::Range<u64>, options: &Options) -> Totals {
    let (mut acknowledged, mut totals) = (0, Totals::default());
    for seed in seeds {
        let outcome = run(seed, options);
        acknowledged += outcome.acknowledged;
        totals.from_backups += outcome.from_backups;
        totals.carried_beside_backups += outcome.carried_beside_backups;
        assert_eq!(
            run(seed, options).digest,
            outcome.digest,
            "seed {seed} does not give the same trace twice: {options:?}"
        );
        assert!(
            outcome.violations.is_empty(),
            "seed {seed} failed: {:#?}\noptions: {options:?}\nreplay: make sim SEED={seed} ARGS=\"--members {} --sync {} --trace\" (and the other options)",
            outcome.violations,
            options.members,
            options.sync_standbys,
        );
    }
    assert!(acknowledged > 0, "no client was served: nothing was tested");
    totals
}

/// Looks for a seed in which the broken rule does harm.
fn found_out(flaw: Flaw, harm: &str, options: &Options) {
    let broken = Options {
        flaw: Some(flaw),
        ..options.clone()
    };
    let seed = (0..SEEDS_FOR_A_FLAW).find(|seed| {
        let violations = run(*seed, &broken).violations;
        violations.iter().any(|v| v.contains(harm))
    });
    assert!(
        seed.is_some(),
        "{flaw:?} was not found out in {SEEDS_FOR_A_FLAW} seeds: the simulator has lost its sight"
    );
    let seed = seed.unwrap_or_default();
    let outcome = run(seed, options);
    assert!(
        outcome.violations.is_empty(),
        "seed {seed}: {:?}",
        outcome.violations
    );
}

/// A broken rule does harm in one of some ten to some two hundred seeds.
const SEEDS_FOR_A_FLAW: u64 = 3000;

fn ambushes() -> Options {
    Options {
        ambushes: true,
        ..Options::default()
    }
}

fn modes() -> Options {
    Options {
        modes: true,
        ..Options::default()
    }
}

fn operators() -> Options {
    Options {
        operators: true,
        ..Options::default()
    }
}

fn away() -> Options {
    Options {
        away: true,
        ..Options::default()
    }
}

/// One backup counts as a copy.
fn receivers() -> Options {
    Options {
        receivers: 1,
        ..Options::default()
    }
}

/// k = 2: the leader needs the promises of two.
fn two_promises() -> Options {
    Options {
        members: 4,
        sync_standbys: 2,
        ..away()
    }
}

#[test]
fn three_members() {
    check(0..500, &Options::default());
}

#[test]
fn two_members() {
    let options = Options {
        members: 2,
        ..Options::default()
    };
    check(0..150, &options);
}

#[test]
fn four_members_two_synchronous() {
    let options = Options {
        members: 4,
        sync_standbys: 2,
        ..Options::default()
    };
    check(0..150, &options);
}

#[test]
fn five_members_two_synchronous() {
    let options = Options {
        members: 5,
        sync_standbys: 2,
        ..Options::default()
    };
    check(0..100, &options);
}

#[test]
fn asynchronous() {
    let options = Options {
        durability: Durability::Async,
        ..Options::default()
    };
    check(0..150, &options);
}

#[test]
fn strict() {
    let options = Options {
        durability: Durability::Strict,
        ..Options::default()
    };
    check(0..100, &options);
    let two = Options {
        members: 4,
        sync_standbys: 2,
        ..options
    };
    check(0..50, &two);
}

#[test]
fn durability_changes_at_any_moment() {
    check(0..150, &modes());
    let two = Options {
        members: 4,
        sync_standbys: 2,
        ..modes()
    };
    check(0..75, &two);
}

#[test]
fn operators_pause_restart_and_reinitialise() {
    check(0..150, &operators());
    let all = Options {
        modes: true,
        away: true,
        members: 4,
        ..operators()
    };
    check(0..75, &all);
    let two = Options {
        members: 2,
        ..operators()
    };
    check(0..75, &two);
}

#[test]
fn the_coordinator_is_away() {
    check(0..150, &away());
    for durability in [Durability::Async, Durability::Strict] {
        let options = Options {
            durability,
            ..away()
        };
        check(0..60, &options);
    }
    check(0..75, &two_promises());
}

#[test]
fn a_member_that_never_leads_holds_the_most() {
    let options = Options {
        never_leading: 1,
        ..Options::default()
    };
    check(0..150, &options);
    let all = Options {
        modes: true,
        away: true,
        members: 4,
        ..options
    };
    check(0..75, &all);
}

#[test]
fn a_backup_counts_as_a_copy() {
    let totals = check(0..150, &receivers());
    assert!(totals.from_backups > 0, "no election needed its WAL");
    let ahead = Options {
        ambushes: true,
        ..receivers()
    };
    assert!(check(0..75, &ahead).from_backups > 0);
    let two = Options {
        receivers: 2,
        members: 2,
        ..receivers()
    };
    assert!(check(0..75, &two).from_backups > 0);
}

#[test]
fn a_backup_beside_everything_else() {
    let all = Options {
        modes: true,
        operators: true,
        never_leading: 1,
        members: 4,
        ..receivers()
    };
    check(0..75, &all);
    let strict = Options {
        durability: Durability::Strict,
        sync_standbys: 2,
        ..receivers()
    };
    check(0..50, &strict);
    let lying = Options {
        lying_clocks: true,
        ..receivers()
    };
    check(0..75, &lying);
}

#[test]
fn a_backup_promises_nothing_and_the_leader_is_carried_by_others() {
    let away = Options {
        away: true,
        ..receivers()
    };
    assert!(check(0..100, &away).carried_beside_backups > 0);
    let two = Options {
        members: 4,
        sync_standbys: 2,
        ..away
    };
    assert!(check(0..50, &two).carried_beside_backups > 0);
}

#[test]
fn nothing_is_lost_even_without_clocks_and_fence() {
    let options = Options {
        lying_clocks: true,
        ..Options::default()
    };
    check(0..200, &options);
}

#[test]
fn rare_orders_of_events() {
    check(0..300, &ambushes());
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let options = Options {
        trace: true,
        ..Options::default()
    };
    let (a, b) = (run(7, &options), run(7, &options));
    assert!(a.trace.len() > 10_000, "there is a trace");
    assert_eq!(a, b);
    assert_ne!(a.trace, run(8, &options).trace);
}

/// Whatever the options: a run depends on nothing but its seed.
#[test]
fn every_kind_of_run_gives_the_same_events_twice() {
    let kinds = [
        Options::default(),
        ambushes(),
        operators(),
        receivers(),
        Options {
            receivers: 2,
            away: true,
            modes: true,
            ..Options::default()
        },
        Options {
            durability: Durability::Async,
            ..Options::default()
        },
        Options {
            members: 5,
            sync_standbys: 2,
            ..Options::default()
        },
        Options {
            lying_clocks: true,
            members: 2,
            ..Options::default()
        },
    ];
    for options in &kinds {
        let mut digests = std::collections::BTreeSet::new();
        for seed in 0..25 {
            let (a, b) = (run(seed, options), run(seed, options));
            assert_eq!(a, b, "seed {seed} of {options:?} ran differently");
            digests.insert(a.digest);
        }
        assert_eq!(digests.len(), 25, "two seeds gave the same run");
    }
}

#[test]
fn a_failing_run_shrinks_to_the_faults_that_matter() {
    let options = Options {
        flaw: Some(Flaw::NoFence),
        ..Options::default()
    };
    let seed = (0..SEEDS_FOR_A_FLAW).find(|seed| !run(*seed, &options).violations.is_empty());
    let seed = seed.unwrap_or_default();
    let before = run(seed, &options);
    let Some(shrunk) = shrink(seed, &options, 150) else {
        unreachable!("it fails");
    };
    assert!(!shrunk.outcome.violations.is_empty());
    let (left, all) = (shrunk.faults().count(), before.faults.len());
    assert!(left > 0 && left <= all, "{left} of {all}");
    let again = Options {
        skip: shrunk.skip.clone(),
        ..options
    };
    assert_eq!(run(seed, &again), shrunk.outcome, "it can be replayed");
    assert_eq!(
        shrink(seed, &Options::default(), 150),
        None,
        "nothing fails"
    );
}

#[test]
fn one_seal_too_few_loses_commits() {
    found_out(Flaw::OneSealTooFew, "LOST", &Options::default());
}

#[test]
fn no_wait_before_a_removal_loses_commits() {
    found_out(Flaw::NoWait, "LOST", &ambushes());
}

#[test]
fn the_old_leader_left_out_loses_commits() {
    found_out(Flaw::OldLeaderLeftOut, "LOST", &ambushes());
}

#[test]
fn a_forgotten_incarnation_loses_commits() {
    found_out(Flaw::IncarnationForgotten, "LOST", &ambushes());
}

#[test]
fn a_seal_that_goes_on_streaming_loses_commits() {
    let options = Options {
        lying_clocks: true,
        ..Options::default()
    };
    found_out(Flaw::SealKeepsStreaming, "LOST", &options);
}

#[test]
fn without_the_fence_two_primaries_run() {
    found_out(Flaw::NoFence, "two primaries", &Options::default());
}

#[test]
fn forgotten_promises_make_two_leases() {
    found_out(Flaw::PromisesForgotten, "two leases", &Options::default());
}

#[test]
fn a_standby_promise_forgotten_at_a_restart_makes_two_primaries() {
    found_out(Flaw::StandbyPromiseForgotten, "two ", &away());
}

#[test]
fn a_seal_in_spite_of_a_promise_makes_two_primaries() {
    found_out(Flaw::SealDespitePromise, "two ", &away());
}

#[test]
fn one_promise_too_few_makes_two_primaries() {
    found_out(Flaw::OnePromiseTooFew, "two ", &two_promises());
}

#[test]
fn a_mode_on_record_before_postgresql_keeps_it_loses_commits() {
    found_out(Flaw::ModeBeforePostgres, "LOST", &modes());
}

#[test]
fn a_backup_that_goes_on_receiving_after_its_seal_loses_commits() {
    let options = Options {
        lying_clocks: true,
        ..receivers()
    };
    found_out(Flaw::ReceiverKeepsReceiving, "LOST", &options);
}

#[test]
fn a_backup_that_reports_what_it_has_not_flushed_loses_commits() {
    found_out(Flaw::ReceiverReportsWritten, "LOST", &receivers());
}

#[test]
fn a_promotion_without_the_wal_of_the_backup_loses_commits() {
    found_out(Flaw::CatchUpClaimed, "LOST", &receivers());
}

#[test]
fn a_backup_taken_for_one_that_promises_makes_two_primaries() {
    let options = Options {
        away: true,
        ..receivers()
    };
    found_out(Flaw::ReceiverPromises, "two ", &options);
}
