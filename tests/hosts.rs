//! Members as hosts of their own, with real faults. Root only: see `hosts::net`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_types,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

#[path = "hosts/mod.rs"]
mod hosts;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};

use hosts::craton::{Craton, Options};
use hosts::fault::{self, Fault};
use hosts::system::System;
use hosts::trial::{self, Outcome, Terms};

/// One cluster at a time: the machine is small, and the faults are timed.
static TURN: Mutex<()> = Mutex::new(());

/// What every trial of a cluster that loses nothing is run with.
const QUORUM: Terms = Terms {
    cancel: false,
    fresh: false,
    sample: true,
    lost_max: 0,
};

/// The default of the setting.
const MAX_LAG_BYTES: usize = 16 << 20;

/// What a row of the recorder takes in WAL at least: heap, index and commit records.
const ROW_WAL_BYTES: usize = 200;

/// The right to run now; none where hosts cannot be made, which is said loudly.
fn turn() -> Option<MutexGuard<'static, ()>> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(why) = hosts::net::impossible() {
        assert!(
            std::env::var_os("CI").is_none(),
            "tests on hosts of their own must run here, and cannot: {why}"
        );
        eprintln!("SKIPPED, AND NOTHING IS SHOWN BY THIS: no hosts can be made: {why}");
        return None;
    }
    Some(turn)
}

/// Prints an outcome and checks it.
fn check(
    system: &dyn System,
    what: &str,
    outcome: Result<Outcome, String>,
    terms: Terms,
) -> Outcome {
    let outcome = outcome.unwrap_or_else(|e| panic!("{what}: {e}\n{}", system.logs()));
    eprintln!("{}", serde_json::to_string(&outcome).unwrap());
    if let Some(broken) = outcome.broken(terms) {
        panic!("{what}: {broken}: {outcome:#?}\n{}", system.logs());
    }
    outcome
}

/// Inflicts one fault after the other and checks each.
fn series(system: &dyn System, faults: &[Fault], terms: Terms) {
    for fault in faults {
        check(
            system,
            fault.name(),
            trial::run(system, *fault, terms),
            terms,
        );
    }
}

/// The leader's agent is stopped, killed for good, starved; its whole host stands still for longer than the
/// lease and goes on. At no instant do two members acknowledge.
#[test]
fn whoever_manages_the_leader_is_gone() {
    let Some(_turn) = turn() else { return };
    let cluster = Craton::start(Options::default());
    let faults = [
        Fault::FreezeAgent,
        Fault::KillAgent,
        Fault::StarveAgent,
        Fault::FreezeHost,
    ];
    series(&cluster, &faults, QUORUM);
}

/// The leader is cut from the other members while clients still reach it, and cancel what takes too long; its
/// disk hangs; a standby goes.
#[test]
fn the_leader_is_cut_off_or_stuck() {
    let Some(_turn) = turn() else { return };
    let cluster = Craton::start(Options::default());
    let cancelling = Terms {
        cancel: true,
        ..QUORUM
    };
    series(
        &cluster,
        &[Fault::CutFromPeers, Fault::OneWayIn],
        cancelling,
    );
    series(&cluster, &[Fault::HungDisk, Fault::LoseStandby], QUORUM);
}

/// One thing after the other dies, for two minutes; `CRATON_TEST_ROLLING_MINUTES=20`, and
/// `CRATON_TEST_ROLLING_SEED` to draw the same again.
#[test]
fn rolling_kills() {
    let Some(_turn) = turn() else { return };
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let minutes = number("CRATON_TEST_ROLLING_MINUTES").unwrap_or(2);
    let seed =
        number("CRATON_TEST_ROLLING_SEED").unwrap_or_else(|| rand::random_range(0..1_000_000));
    eprintln!("CRATON_TEST_ROLLING_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let cluster = Craton::start(Options::default());
    let kinds = [
        Fault::KillHost,
        Fault::KillPostmaster,
        Fault::KillAgent,
        Fault::RestartAgent,
        Fault::LoseStandby,
        Fault::FreezeHost,
        Fault::Isolate,
    ];
    let length = Duration::from_secs(60 * minutes);
    let outcome = trial::rolling(&cluster, length, QUORUM, || {
        let fault = *kinds.choose(&mut random).unwrap();
        (fault, Duration::from_millis(random.random_range(200..5000)))
    });
    check(&cluster, "rolling kills", outcome, QUORUM);
}

/// Every fault there is, in `quorum`.
#[test]
#[ignore = "long: make test-hosts"]
fn every_fault_in_quorum() {
    let Some(_turn) = turn() else { return };
    let cluster = Craton::start(Options {
        slow: &["a", "b", "c"],
        ..Options::default()
    });
    series(&cluster, &fault::ALL, QUORUM);
}

/// Without synchronous standbys a failover may lose the tail, and no more than `max_lag_bytes` of it.
#[test]
#[ignore = "long: make test-hosts"]
fn async_loses_a_bounded_tail() {
    let Some(_turn) = turn() else { return };
    let cluster = Craton::start(Options {
        durability: "async",
        ..Options::default()
    });
    let terms = Terms {
        lost_max: MAX_LAG_BYTES / ROW_WAL_BYTES,
        ..QUORUM
    };
    let faults = [
        Fault::KillHost,
        Fault::CutFromPeers,
        Fault::FreezeHost,
        Fault::FreezeAgent,
        // Nothing but the fence keeps the old leader from acknowledging beside the next one.
        Fault::KillAgent,
        Fault::StarveAgent,
    ];
    series(&cluster, &faults, terms);
}

/// In `strict` nothing acknowledged is lost either, by none of these, also where clients cancel what waits.
#[test]
fn strict_loses_nothing() {
    let Some(_turn) = turn() else { return };
    let cluster = Craton::start(Options {
        durability: "strict",
        ..Options::default()
    });
    let cancelling = Terms {
        cancel: true,
        ..QUORUM
    };
    series(&cluster, &[Fault::CutFromPeers], cancelling);
    let faults = [
        Fault::KillHost,
        Fault::FreezeHost,
        Fault::LoseStandby,
        Fault::KillPostmaster,
    ];
    series(&cluster, &faults, QUORUM);
}

/// The wall clock of the leader jumps by an hour, forward and back: nothing happens, because no wall clock
/// decides anything.
#[test]
#[ignore = "needs the package libfaketime: make test-hosts"]
fn a_wall_clock_that_jumps_changes_nothing() {
    let Some(_turn) = turn() else { return };
    let cluster = Craton::start(Options {
        own_clock: true,
        ..Options::default()
    });
    let limit = Duration::from_secs(60);
    if cluster.leader(limit) != "a" {
        cluster.craton(&["switchover", "--to", "a"]).unwrap();
        cluster.wait_whole(limit);
    }
    let outcome = trial::watch(&cluster, QUORUM, || {
        for offset in ["+3600", "-3600", "+86400", "+0"] {
            cluster.set_clock(offset);
            let seen = cluster.wall_clock_of_a();
            let wanted: i64 = offset.parse().unwrap();
            assert!(
                (seen - wanted).abs() < 60,
                "the clock of a is off by {seen} s, not {wanted}"
            );
            trial::hold(Duration::from_secs(5), Duration::from_secs(5), || true);
        }
    });
    let outcome = check(&cluster, "clock jumps", outcome, QUORUM);
    assert_eq!(
        outcome.leaders.0, outcome.leaders.1,
        "a jump of a wall clock was a failover"
    );
    assert_eq!(
        outcome.terms.0, outcome.terms.1,
        "a jump of a wall clock was a failover"
    );
}
