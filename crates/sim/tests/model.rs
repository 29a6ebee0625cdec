//! The explicit-state check: the product's rules hold in every order of events within the bounds, and a rule that is
//! broken on purpose is found out, with a trace.

use craton_sim::model::{Broken, Config, Report, explore};

/// Explores one of the suites of the correct rules to its end.
fn holds(which: usize) -> Report {
    let config = Config::suite(1).swap_remove(which);
    let report = explore(&config);
    assert_eq!(report.harm, None, "{}", config.bounds());
    assert!(
        report.complete,
        "{}: stopped after {} states",
        config.bounds(),
        report.states
    );
    // What was never tried was not checked.
    assert!(report.seen.wins > 0 && report.seen.acknowledged > 0 && report.seen.deposed_writes > 0);
    report
}

#[test]
fn three_members_that_come_and_go() {
    let seen = holds(0).seen;
    assert!(seen.changes > 0 && seen.alone > 0);
}

#[test]
fn k_is_raised_and_lowered_and_agents_restart() {
    assert!(holds(1).seen.changes > 0);
}

#[test]
fn three_terms_and_a_lost_disk() {
    assert!(holds(2).seen.clones > 0);
}

#[test]
fn four_members_two_synchronous() {
    holds(3);
}

#[test]
fn leaders_that_go_on_by_promises() {
    let seen = holds(4).seen;
    assert!(seen.promised > 0 && seen.changes > 0);
}

#[test]
fn a_backup_receiver_in_v() {
    let seen = holds(5).seen;
    assert!(seen.catch_ups > 0 && seen.changes > 0);
}

#[test]
fn a_member_that_never_leads() {
    let seen = holds(6).seen;
    assert!(seen.catch_ups > 0 && seen.changes > 0);
}

#[test]
fn between_async_and_quorum() {
    let seen = holds(7).seen;
    assert!(seen.modes > 0 && seen.async_losses > 0);
}

#[test]
fn between_strict_and_quorum() {
    assert!(holds(8).seen.modes > 0);
}

#[test]
fn promises_in_every_mode() {
    let seen = holds(9).seen;
    assert!(seen.promised > 0 && seen.modes > 0);
}

/// The broken rule does this harm; with the rule whole, nothing happens within the same bounds.
fn found_out(rule: Broken, harm: &str, events: usize) {
    let config = Config::for_broken(rule);
    let report = explore(&config);
    let trace = report.harm.unwrap_or_default();
    assert!(
        trace.contains(harm),
        "{rule:?} was not found out in {} states:\n{trace}",
        report.states
    );
    assert_eq!(
        report.depth, events,
        "not the shortest way any more:\n{trace}"
    );
    let told = trace
        .lines()
        .filter(|l| l.trim_start().starts_with(|c: char| c.is_ascii_digit()))
        .count();
    assert_eq!(told, events, "every event is told:\n{trace}");
}

const LOST: &str = "LOST: the leader of term";
const STILL_LED: &str = "was won while a promised leader may still acknowledge";

#[test]
fn no_wait_before_a_removal() {
    found_out(Broken::NoWaitOnRemoval, LOST, 10);
}

#[test]
fn no_wait_before_a_raise() {
    found_out(Broken::NoWaitOnRaise, LOST, 10);
}

#[test]
fn the_coordinator_hears_of_a_removal_first() {
    found_out(Broken::CoordinatorFirst, LOST, 7);
}

#[test]
fn a_reload_is_no_proof() {
    found_out(Broken::NotProven, LOST, 8);
}

#[test]
fn an_earlier_change_may_still_be_done() {
    found_out(Broken::Unsettled, LOST, 10);
}

#[test]
fn a_change_of_the_mode_may_still_be_done() {
    found_out(Broken::UnsettledMode, "strict: a commit was", 15);
}

#[test]
fn one_seal_too_few() {
    found_out(Broken::OneSealTooFew, LOST, 6);
}

#[test]
fn a_sealed_member_goes_on_receiving() {
    found_out(Broken::SealKeepsStreaming, LOST, 7);
}

#[test]
fn the_old_leader_is_left_out() {
    found_out(Broken::OldLeaderLeftOut, LOST, 10);
}

#[test]
fn an_incarnation_is_forgotten() {
    found_out(Broken::IncarnationForgotten, LOST, 9);
}

#[test]
fn promises_from_fewer_than_k() {
    found_out(Broken::FewerPromises, STILL_LED, 5);
}

#[test]
fn a_promise_after_a_seal() {
    found_out(Broken::PromiseAfterSeal, STILL_LED, 10);
}

#[test]
fn a_seal_in_spite_of_a_promise() {
    found_out(Broken::SealWhilePromised, STILL_LED, 7);
}

#[test]
fn a_promise_is_forgotten_at_a_restart() {
    found_out(Broken::PromiseForgotten, STILL_LED, 8);
}

#[test]
fn promises_for_the_known_set_alone() {
    found_out(Broken::PromisesForKnownSet, STILL_LED, 10);
}

#[test]
fn a_proposal_that_promises_do_not_cover() {
    found_out(Broken::ProposesBeyondPromises, STILL_LED, 10);
}

#[test]
fn the_mode_is_written_before_v_has_flushed() {
    found_out(Broken::ModeBeforeFlush, LOST, 9);
}

#[test]
fn postgres_goes_async_first() {
    found_out(Broken::AsyncPostgresFirst, LOST, 7);
}

#[test]
fn strict_with_fewer_than_k() {
    found_out(Broken::StrictGoesAlone, "strict: a commit was", 5);
}

#[test]
fn a_catch_up_that_is_only_claimed() {
    found_out(Broken::CatchUpClaimed, LOST, 8);
}

#[test]
fn a_receiver_that_forgets_what_it_sealed_for() {
    found_out(Broken::ReceiverForgetsFloor, LOST, 9);
}

#[test]
fn a_receiver_that_is_taken_for_one_that_promises() {
    found_out(Broken::ReceiverPromises, STILL_LED, 6);
}

#[test]
fn bounds_end_an_exploration_and_it_says_so() {
    let config = Config {
        depth: 3,
        ..Config::default()
    };
    let report = explore(&config);
    assert!(!report.complete && report.depth == 3 && report.harm.is_none());
}
