//! Pause, schedule, orders, rolling restarts.

use super::*;
use crate::observe::PendingChange;
use crate::records::{Order, OrderKind, Pause, RestartPlan, Schedule};
use crate::settings::Durability;

fn paused(mut s: Scene) -> Scene {
    s.view().pause = at(Pause {
        since_ms: 0,
        until_ms: None,
        reason: Some("new switches".into()),
        by: "op".into(),
    });
    s
}

fn ordered(mut s: Scene, name: &str, kind: OrderKind) -> Scene {
    let order = Order {
        id: 7,
        kind,
        process: Some(1),
        incarnation: Some(life(name)),
        by: "op".into(),
    };
    s.view().orders.insert(
        id(name),
        At {
            revision: 12,
            value: order,
        },
    );
    s
}

fn planned(mut s: Scene, names: &[&str]) -> Scene {
    s.view().restart = at(RestartPlan {
        id: 7,
        members: names.iter().map(|n| (id(n), Some(1))).collect(),
        by: "op".into(),
    });
    s
}

fn scheduled(mut s: Scene, at_ms: u64, to: Option<&str>) -> Scene {
    s.view().schedule = at(Schedule {
        id: 9,
        at_ms,
        to: to.map(id),
        by: "op".into(),
    });
    s
}

fn decided(s: &Scene) -> Decision {
    decide(&s.o, &s.memory)
}

fn says(d: &Decision, code: &str) -> bool {
    d.reasons.iter().any(|r| r.code == code)
}

fn task(d: &Decision) -> Option<TaskKind> {
    d.task.as_ref().map(Task::kind)
}

/// The keys that a decision writes, and those that it removes.
fn writes(d: &Decision) -> (Vec<String>, Vec<String>) {
    let puts = d.changes.iter().flat_map(|c| &c.puts);
    let deletes = d.changes.iter().flat_map(|c| &c.deletes);
    (
        puts.map(|p| p.key().path()).collect(),
        deletes.map(Key::path).collect(),
    )
}

fn restarted(mut s: Scene, name: &str) -> Scene {
    s.o.peers.get_mut(&id(name)).unwrap().status.process = Some(2);
    s
}

#[test]
fn nobody_takes_over_in_a_pause_unless_asked() {
    let lapsed = Scene::standby()
        .with(|o| o.lease_seen = LeaseSeen::Lapsed)
        .after(3000);
    assert!(decided(&lapsed).open.is_some(), "the rule of every day");
    let mut quiet = paused(lapsed);
    let d = decided(&quiet);
    assert!(d.open.is_none() && says(&d, "no_failover_in_pause") && says(&d, "paused"));
    quiet = quiet.asked(None, RequestPhase::Asked);
    assert!(
        decided(&quiet).open.is_none(),
        "a switchover is the leader's to do"
    );
    if let Some(r) = &mut quiet.view().request {
        r.value.kind = RequestKind::Failover;
    }
    assert!(decided(&quiet).open.is_some());
    // Its time is over.
    let mut over = paused(Scene::standby().with(|o| o.lease_seen = LeaseSeen::Lapsed)).after(3000);
    over.view().pause.as_mut().unwrap().value.until_ms = Some(5);
    over.o.wall_ms = 5;
    assert!(decided(&over).open.is_some());
}

#[test]
fn a_pause_does_not_hold_back_the_fence() {
    let mut s = paused(Scene::leader());
    s.o.lease = None;
    let d = decided(&s);
    assert!(d.kill.is_some(), "a primary without a lease");
    assert!(
        d.open.is_none() && says(&d, "stopped_by_fence"),
        "{}",
        line(&d)
    );
    // It stays down, without the lease, for as long as the pause lasts.
    s.o.server = ServerView::Down;
    let d = decided(&s.clone().after(5000));
    assert_eq!(line(&d), " : paused stopped_by_fence");
    s.view().pause = None;
    assert!(
        decided(&s.after(5000)).open.is_some(),
        "then an election decides"
    );
}

#[test]
fn a_stopped_postgresql_stays_stopped_in_a_pause() {
    let mut leader = paused(Scene::leader());
    leader.o.server = ServerView::Down;
    leader.o.process = None;
    let d = decided(&leader);
    assert_eq!(
        line(&d),
        "hold 1 : paused stopped_in_pause",
        "the lease goes on"
    );
    // Asked for, it is started in place although another could take over.
    let asked = planned(leader, &["a"]);
    assert_eq!(
        writes(&decided(&asked)).0,
        ["leadership", "history"],
        "closed first"
    );
    let closed = asked.leadership(|l| l.open = false);
    assert_eq!(task(&decided(&closed)), Some(TaskKind::StartPrimary));

    let mut standby = paused(Scene::standby());
    standby.o.server = ServerView::Down;
    standby.o.process = None;
    let d = decided(&standby);
    assert!(d.task.is_none() && says(&d, "suspended"), "{}", line(&d));
    standby.memory.stopped_to_start = true;
    assert_eq!(
        task(&decided(&standby)),
        Some(TaskKind::StartStandby),
        "it was stopped for a switchover"
    );

    let mut empty = paused(Scene::cluster("b"));
    empty.o.data = DataView::Empty;
    let d = decided(&empty);
    assert!(
        d.task.is_none() && says(&d, "suspended"),
        "no copies either"
    );
}

#[test]
fn a_pause_ends_by_itself() {
    let mut s = paused(Scene::leader());
    s.view().pause.as_mut().unwrap().value.until_ms = Some(100);
    s.o.wall_ms = 99;
    assert!(says(&decided(&s), "paused"));
    s.o.wall_ms = 100;
    let d = decided(&s);
    assert!(!says(&d, "paused"));
    assert_eq!(writes(&d), (vec!["history".into()], vec!["pause".into()]));
}

#[test]
fn a_scheduled_switchover_begins_when_its_time_has_come() {
    let early = scheduled(Scene::leader().with(|o| o.wall_ms = 999), 1000, Some("b"));
    assert!(says(&decided(&early), "scheduled"));
    assert_eq!(writes(&decided(&early)), (vec![], vec![]));
    let due = early.with(|o| o.wall_ms = 1000);
    assert_eq!(
        writes(&decided(&due)),
        (vec!["request".into()], vec!["schedule".into()])
    );
    // Somebody who does not stream cannot take over: it waits a minute, then it is dropped with the reason.
    let unfit = due.server(|s| s.standbys.retain(|b| b.member != id("b")));
    let d = decided(&unfit);
    assert!(
        says(&d, "schedule_waits") && writes(&d).1.is_empty(),
        "{}",
        line(&d)
    );
    let late = unfit.with(|o| o.wall_ms = 62_000);
    let d = decided(&late);
    assert_eq!(writes(&d).1, ["schedule"]);
    let why = d
        .reasons
        .iter()
        .find(|r| r.code == "schedule_dropped")
        .unwrap();
    assert!(
        why.text.contains("b does not stream from a"),
        "{}",
        why.text
    );
    // Nobody led at that time: what is long over is not begun.
    let missed = scheduled(Scene::leader().with(|o| o.wall_ms = 99_000), 1000, None);
    let d = decided(&missed);
    assert!(says(&d, "schedule_dropped") && !writes(&d).0.contains(&"request".into()));
}

#[test]
fn a_standby_restarts_on_order() {
    let s = ordered(Scene::standby(), "b", OrderKind::Restart);
    let d = decided(&s);
    assert!(
        d.task.is_none() && says(&d, "order_waits"),
        "in V: {}",
        line(&d)
    );
    let patient = s.clone().after(5000);
    assert_eq!(
        task(&decided(&patient)),
        Some(TaskKind::Stop),
        "it does not wait for ever"
    );
    let out = s.leadership(|l| l.sync = set(1, &["c"]));
    assert_eq!(task(&decided(&out)), Some(TaskKind::Stop));
    let mut down = out.clone();
    (down.o.server, down.o.process) = (ServerView::Down, None);
    assert_eq!(task(&decided(&down)), Some(TaskKind::StartStandby));
    let again = out.with(|o| o.process = Some(2));
    let d = decided(&again);
    assert!(d.task.is_none());
    assert_eq!(writes(&d), (vec!["history".into()], vec!["order/b".into()]));
}

#[test]
fn whoever_is_ordered_away_leaves_the_sync_set_first() {
    let s = ordered(Scene::leader(), "b", OrderKind::Restart);
    check(
        "PostgreSQL first, then the coordinator",
        s,
        "hold 1, SetSync (1 of c) : leading sync_change",
    );
    // A restart does not leave the leader alone; a directory that is thrown away must.
    let only = |kind| {
        let s = Scene::leader()
            .leadership(|l| l.sync = set(1, &["b"]))
            .server(|s| {
                s.sync_configured = set(1, &["b"]);
                s.standbys.retain(|b| b.member == id("b"));
            });
        ordered(s, "b", kind)
    };
    assert_eq!(decided(&only(OrderKind::Restart)).task, None);
    let alone = decided(&only(OrderKind::Reinit));
    assert!(says(&alone, "sync_change"), "{}", line(&alone));
}

/// In `strict` k members stay: of two that are to be cloned anew the first goes, and the other waits until it is back.
#[test]
fn in_strict_they_are_cloned_anew_in_turns() {
    let strict = |mut s: Scene| {
        s.view().leadership.as_mut().unwrap().value.durability = Durability::Strict;
        s.view().settings.as_mut().unwrap().value.durability = Durability::Strict;
        ordered(ordered(s, "b", OrderKind::Reinit), "c", OrderKind::Reinit)
    };
    check(
        "b goes first",
        strict(Scene::leader()),
        "hold 1, SetSync (1 of c) : leading sync_change",
    );
    let gone = Scene::leader()
        .leadership(|l| l.sync = set(1, &["c"]))
        .server(|s| {
            s.sync_configured = set(1, &["c"]);
            s.standbys.retain(|b| b.member == id("c"));
        });
    check(
        "c stays while b is away",
        strict(gone.clone()),
        "hold 1 : leading",
    );
    let outside = Scene::leader()
        .leadership(|l| l.sync = set(1, &["c"]))
        .server(|s| s.sync_configured = set(1, &["c"]));
    let mut outside = strict(outside);
    outside.view().orders.get_mut(&id("c")).unwrap().value.id = 5;
    check(
        "b is thrown away at this moment, and does not get in before it is another",
        outside,
        "hold 1 : leading",
    );
    let mut back = strict(Scene::leader());
    back.view().orders.remove(&id("b"));
    check(
        "and goes when b is back",
        back,
        "hold 1, SetSync (1 of b) : leading sync_change",
    );
}

#[test]
fn a_data_directory_is_thrown_away_only_when_nothing_rests_on_it() {
    let s = ordered(Scene::standby(), "b", OrderKind::Reinit);
    let d = decided(&s.clone().after(60_000));
    assert!(
        d.task.is_none() && says(&d, "order_waits"),
        "in V, however long: {}",
        line(&d)
    );
    let out = s.leadership(|l| l.sync = set(1, &["c"]));
    assert_eq!(task(&decided(&out)), Some(TaskKind::Reinit));
    let closed = out.clone().leadership(|l| l.open = false);
    assert!(
        decided(&closed).task.is_none(),
        "the leader may still die and need a seal"
    );
    let election = ordered(Scene::election("b"), "b", OrderKind::Reinit)
        .leadership(|l| l.sync = set(1, &["c"]));
    assert_ne!(task(&decided(&election)), Some(TaskKind::Reinit));
    let born = out.with(|o| o.me.incarnation = Some(Incarnation(99)));
    let d = decided(&born);
    assert_eq!(writes(&d).1, ["order/b"]);
    assert_ne!(task(&d), Some(TaskKind::Reinit));
    let leader = ordered(Scene::leader(), "a", OrderKind::Reinit);
    let d = decided(&leader);
    assert!(writes(&d).1.contains(&"order/a".into()) && task(&d) != Some(TaskKind::Reinit));
}

#[test]
fn a_rolling_restart_takes_one_at_a_time_and_the_leader_last() {
    let s = planned(Scene::leader(), &["a", "b", "c"]);
    assert_eq!(writes(&decided(&s)).0, ["order/b"]);
    let at_it = ordered(s.clone(), "b", OrderKind::Restart);
    assert!(writes(&decided(&at_it)).0.is_empty(), "one at a time");
    let back = restarted(s, "b");
    let gone = back
        .clone()
        .server(|s| s.standbys.retain(|x| x.member != id("b")));
    let keys = writes(&decided(&gone)).0;
    assert!(
        !keys.contains(&"order/c".into()),
        "b does not stream yet: {keys:?}"
    );
    let out = back.clone().leadership(|l| l.sync = set(1, &["c"]));
    let keys = writes(&decided(&out)).0;
    assert!(
        !keys.contains(&"order/c".into()),
        "b does not count yet: {keys:?}"
    );
    assert_eq!(writes(&decided(&back)).0, ["order/c"]);
    let last = restarted(back, "c");
    let d = decided(&last);
    assert!(says(&d, "rolling_handover"));
    assert_eq!(writes(&d).0, ["request"]);
    // Nobody says that it could take over, which those that have just restarted say a moment later; then the
    // leader restarts in place.
    let mut alone = last.clone();
    for p in alone.o.peers.values_mut() {
        p.status.timeline = None;
    }
    let d = decided(&alone);
    assert!(
        writes(&d).0.is_empty() && says(&d, "rolling_waits"),
        "{}",
        line(&d)
    );
    assert_eq!(writes(&decided(&alone.after(3_500))).0, ["order/a"]);
    let done = last.with(|o| o.process = Some(2));
    assert_eq!(
        writes(&decided(&done)),
        (vec!["history".into()], vec!["restart".into()])
    );
}

#[test]
fn what_standbys_need_as_much_of_is_lowered_on_the_leader_first() {
    let pending = |from: &str, to: Option<&str>| PendingChange {
        name: "max_connections".into(),
        from: from.into(),
        to: to.map(Into::into),
    };
    let s = planned(Scene::leader(), &["a", "b"]);
    let first = |p| writes(&decided(&s.clone().with(|o| o.pending = vec![p]))).0;
    assert_eq!(first(pending("100", Some("200"))), ["order/b"]);
    assert_eq!(first(pending("100", Some("50"))), ["order/a"]);
    assert_eq!(first(pending("100", None)), ["order/a"]);
    let other = PendingChange {
        name: "shared_buffers".into(),
        from: "8192".into(),
        to: Some("4096".into()),
    };
    assert_eq!(first(other), ["order/b"]);
}

#[test]
fn a_rolling_restart_that_gets_stuck_ends_and_says_so() {
    let s = ordered(
        planned(Scene::leader(), &["b", "c"]),
        "b",
        OrderKind::Restart,
    )
    .leadership(|l| l.sync = set(1, &["c"]))
    .server(|s| {
        s.sync_configured = set(1, &["c"]);
        s.standbys.retain(|x| x.member == id("c"));
    });
    let stuck = s.after(180_000);
    let d = decided(&stuck);
    assert_eq!(writes(&d).1, ["restart", "order/b"], "{}", line(&d));
    let why = d.reasons.iter().find(|r| r.code == "rolling_over").unwrap();
    assert!(
        why.text.contains("restart 7 asked by op stopped"),
        "{}",
        why.text
    );
}

#[test]
fn a_leader_restarts_in_place_behind_the_proxies() {
    let s = ordered(Scene::leader(), "a", OrderKind::Restart)
        .server(|s| s.active_transactions = Some(1));
    let d = decided(&s);
    assert!(d.task.is_none() && says(&d, "holding"), "{}", line(&d));
    let idle = s.after(100).server(|s| s.active_transactions = Some(0));
    assert_eq!(task(&decided(&idle)), Some(TaskKind::Stop));
    let mut down = idle.leadership(|l| l.open = false);
    (down.o.server, down.o.process) = (ServerView::Down, None);
    let d = decided(&down);
    assert_eq!(
        task(&d),
        Some(TaskKind::StartPrimary),
        "although others could take over: {}",
        line(&d)
    );
    assert!(d.open.is_none());
}

/// Two holds would begin each other's time anew with every decision, and hold all clients for ever.
#[test]
fn a_restart_in_place_waits_for_a_switchover() {
    let mut s = ordered(Scene::leader(), "a", OrderKind::Restart)
        .server(|s| s.active_transactions = Some(1));
    s.view().request = at(Request {
        id: 8,
        kind: RequestKind::Switchover,
        term: Term(3),
        to: None,
        allow_data_loss: false,
        phase: RequestPhase::Hold,
        by: "op".into(),
        why: None,
    });
    let term = s.view().leadership.as_ref().unwrap().value.term;
    s.view().request.as_mut().unwrap().value.term = term;
    let first = decided(&s);
    assert_eq!(first.memory.holding.unwrap().0, 8, "{}", line(&first));
    assert!(says(&first, "order_waits"), "{}", line(&first));
    let later = s.after(25_000);
    assert_eq!(task(&decided(&later)), Some(TaskKind::Stop));
}

#[test]
fn settings_reach_postgresql_when_nothing_else_is_to_be_done() {
    let s = Scene::standby().with(|o| o.config_stale = true);
    assert_eq!(task(&decided(&s)), Some(TaskKind::Configure));
    let election = Scene::election("b").with(|o| o.config_stale = true);
    assert_eq!(
        task(&decided(&election)),
        Some(TaskKind::Seal),
        "an election comes first"
    );
    let busy = s.with(|o| {
        o.task = Some(TaskView {
            task: Task::Checkpoint,
            since: o.now,
        });
    });
    assert_eq!(task(&decided(&busy)), None);
}

#[test]
fn a_standby_that_has_not_replayed_what_the_leader_began_with_is_not_restarted_yet() {
    let s = planned(Scene::leader(), &["b", "c"]).with(|o| {
        for peer in o.peers.values_mut() {
            peer.status.replay_lsn = Some(Lsn(1));
        }
    });
    let d = decided(&s);
    assert!(
        writes(&d).0.is_empty() && says(&d, "rolling_waits"),
        "{}",
        line(&d)
    );
    let ServerView::Running(here) = &s.o.server else {
        panic!("the leader runs");
    };
    let end = here.end;
    let replayed = s.clone().with(|o| {
        for peer in o.peers.values_mut() {
            peer.status.replay_lsn = Some(end);
        }
    });
    assert_eq!(writes(&decided(&replayed)).0, ["order/b"]);
    assert_eq!(
        writes(&decided(&s.after(11_000))).0,
        ["order/b"],
        "one that is far behind is restarted all the same"
    );
}
