//! What a leader does from its election to its end.

use super::*;

/// `b` has won term 2 and is still a standby.
fn elected() -> Scene {
    let mut s = Scene::election("b").leadership(|l| {
        l.leader = Some(member("b"));
        l.previous = None;
        l.sync = set(1, &["a", "c"]);
        l.timeline = TimelineId(2);
    });
    s.view().timelines = at(Timelines(vec![
        timeline(1, None, 0),
        timeline(2, Some(1), 1000),
    ]));
    s.view().history = event("elected", 2);
    s
}

/// The history's last event about how the leader came to be.
pub(super) fn event(kind: &str, term: u64) -> Option<At<crate::records::History>> {
    at(crate::records::History(vec![Event {
        at_ms: 0,
        term: Term(term),
        member: id("a"),
        kind: kind.into(),
        text: String::new(),
    }]))
}

#[test]
fn the_elected() {
    check("takes the lease", elected(), "hold 2 : waiting_for_lease");
    check(
        "promotes",
        elected().lease(2),
        "hold 2, Promote 2 (1 of a, c) : promoting",
    );
    check(
        "not with an older lease",
        elected().lease(1),
        "hold 2 : waiting_for_lease",
    );
    let down = elected().lease(2).with(|o| o.server = ServerView::Down);
    check("starts first", down, "hold 2, StartStandby : starting");
    // With an even number of voters half may refuse and half go on promising: found by the simulator.
    check(
        "is refused the lease",
        elected().after(2100),
        "release 2, elect-after 2 : lease_refused",
    );
    let primary = elected().lease(2).with(|o| {
        o.data = DataView::Present {
            system_id: "77".into(),
            timeline: TimelineId(2),
            origin: Origin::Own,
        };
        o.server = ServerView::Running(Server {
            timeline: TimelineId(2),
            sync_configured: set(1, &["a", "c"]),
            ..running(false)
        });
    });
    check(
        "opens",
        primary.clone(),
        "hold 2, write leadership+history : leading",
    );
    let unset = primary
        .clone()
        .server(|s| s.sync_configured = set(1, &["b", "c"]));
    check(
        "not before its sync set",
        unset,
        "hold 2, SetSync (1 of a, c) : leading opening sync_pending",
    );
    let wrong = primary.server(|s| s.timeline = TimelineId(3));
    check(
        "on a number that was not reserved",
        wrong,
        "kill, hold 2 : wrong_timeline",
    );
    let back = elected().lease(2).server(|s| s.timeline = TimelineId(2));
    check(
        "came back from its own timeline",
        back,
        "release 2, elect-after 2 : demoted",
    );
}

#[test]
fn postgresql_dies_on_the_leader() {
    let down = || Scene::leader().with(|o| o.server = ServerView::Down);
    check(
        "others can take over",
        down(),
        "release 1, elect-after 1 : handing_over",
    );
    let nobody = down().with(|o| o.peers.clear());
    check(
        "nobody can",
        nobody,
        "hold 1, write leadership+history : restarting",
    );
    let closed = down()
        .with(|o| o.peers.clear())
        .leadership(|l| l.open = false);
    check(
        "it starts once that is on record",
        closed,
        "hold 1, StartPrimary (1 of b, c) : restarting",
    );
    let one = down().with(|o| {
        o.peers.remove(&id("c"));
    });
    check(
        "too few can",
        one,
        "hold 1, write leadership+history : restarting",
    );
    let reborn = down().with(|o| {
        o.peers.get_mut(&id("c")).unwrap().status.incarnation = Some(Incarnation(9));
    });
    check(
        "a reborn one does not count",
        reborn,
        "hold 1, write leadership+history : restarting",
    );
    let back = down().leadership(|l| l.open = false);
    check(
        "others are back while it fails to start in place",
        back,
        "release 1, elect-after 1 : handing_over",
    );
    let hopeless = elected().lease(2).with(|o| {
        o.server = ServerView::Down;
        o.failures = vec![TaskFailure {
            kind: TaskKind::StartStandby,
            error: "disk".into(),
            count: 3,
            retry_at: START,
        }];
    });
    check(
        "elected, and it does not start: tried for a ttl",
        hopeless.clone(),
        "hold 2, StartStandby : starting",
    );
    check(
        "then another may",
        hopeless.after(2050),
        "release 2, elect-after 2 : gives_up",
    );
    let lapsed = down().with(|o| o.lease = None);
    check(
        "the lease ran out",
        lapsed,
        "release 1, elect-after 1, StartStandby : lapsed",
    );
    let standby = Scene::leader().server(|s| s.in_recovery = true);
    check(
        "it came back as a standby",
        standby,
        "release 1, elect-after 1 : demoted",
    );
}

#[test]
fn a_leader_that_restarted_in_place_opens_when_its_wal_is_safe() {
    let closed = |flushed| {
        let mut s = Scene::leader().leadership(|l| l.open = false).server(|s| {
            s.standbys = vec![standby_of("b", flushed), standby_of("c", flushed)];
        });
        s.view().history = event("closed", 1);
        s
    };
    check("not yet", closed(999), "hold 1 : leading recovering");
    let mut overwritten = closed(999).leadership(|l| l.restarted = true);
    overwritten.view().history = event("elected", 1);
    check(
        "nor when the history has lost the line that says so",
        overwritten.clone(),
        "hold 1 : leading recovering",
    );
    check(
        "an elected one that did not restart need not wait",
        overwritten.leadership(|l| l.restarted = false),
        "hold 1, write leadership+history : leading",
    );
    check(
        "safe",
        closed(1000),
        "hold 1, write leadership+history : leading",
    );
    let refuses = |s: Scene| s.server(|s| s.closed = true);
    check(
        "clients are refused until then",
        refuses(closed(999)),
        "hold 1 : leading recovering",
    );
    check(
        "and let in before proxies hear of it",
        refuses(closed(1000)),
        "hold 1, Admit : leading admitting",
    );
    let late =
        |flushed| refuses(closed(flushed)).leadership(|l| (l.open, l.restarted) = (true, false));
    check(
        "the record came late, and PostgreSQL was started once more meanwhile",
        late(1000),
        "hold 1, Admit : leading admitting",
    );
    check(
        "clients are sent elsewhere where that is not safe",
        late(999),
        "hold 1, write leadership+history : leading",
    );
    let mut first = refuses(closed(999));
    first.view().history = event("elected", 1);
    check(
        "started in place before it was open for the first time",
        first,
        "hold 1 : leading recovering",
    );
}

/// A transaction whose answer was lost may be done later: found by the simulator, seed 23263.
#[test]
fn a_change_of_unknown_outcome_is_settled_before_postgresql_waits_for_less() {
    // Alone; `b` has caught up, counts in PostgreSQL, and is proposed to the coordinator.
    let proposed = Scene::leader()
        .leadership(|l| l.sync = SyncSet::default())
        .server(|s| {
            s.standbys.truncate(1);
            s.sync_configured = set(1, &["b"]);
        });
    check(
        "proposed",
        proposed.clone().after(50),
        "hold 1, write leadership+history : leading sync_change",
    );
    let gone = proposed
        .after(50)
        .server(|s| s.standbys.clear())
        .after(2200);
    let unsettled = "hold 1, write leadership : leading sync_unsettled";
    check("it goes away, the answer is lost", gone.clone(), unsettled);
    check(
        "settled",
        gone.leadership(|_| {}),
        "hold 1, SetSync (nobody (the leader is alone)) : leading sync_change",
    );
    // A restarted agent does not know what it proposed before.
    let mut restarted = Scene::leader().with(|o| o.server = ServerView::Down);
    restarted.o.peers.clear();
    restarted.memory.first_revision = None;
    check(
        "a restarted agent",
        restarted,
        "hold 1, write leadership : restarting sync_unsettled",
    );
}

/// What was flushed when the set came into force says nothing of what the next PostgreSQL recovers, in the same term or in
/// another.
#[test]
fn a_barrier_does_not_outlive_its_postgresql() {
    let lived = Scene::leader().after(50).memory;
    let mut down = Scene::leader().with(|o| o.server = ServerView::Down);
    down.memory = lived.clone();
    let ended = down.after(50).memory;
    let recovered = |memory: &Memory, term: u64| {
        let mut s = Scene::leader().lease(term).leadership(|l| {
            l.term = Term(term);
            l.open = false;
            l.restarted = true;
        });
        s.memory = memory.clone();
        s.server(|s| {
            s.end = Lsn(2000);
            s.standbys = vec![standby_of("b", 1500), standby_of("c", 1500)];
        })
    };
    check(
        "in place: not what was flushed long ago",
        recovered(&ended, 1),
        "hold 1 : leading recovering",
    );
    check(
        "another term, and nothing was seen in between",
        recovered(&lived, 2),
        "hold 2 : leading recovering",
    );
    let safe = recovered(&ended, 1).server(|s| s.standbys[0].flush_lsn = Lsn(2000));
    check(
        "what was recovered is on k",
        safe,
        "hold 1, write leadership+history : leading",
    );
}

/// Found by the simulator (`--away --receivers 1`, seed 74765): the leader was alone on record, PostgreSQL was being told
/// so and still waited for b; b came back and had flushed everything, so the coordinator was told that b counts. Then
/// PostgreSQL stopped waiting for it.
#[test]
fn while_postgresql_is_told_another_set_the_coordinator_is_told_none() {
    let back = Scene::leader()
        .leadership(|l| l.sync = SyncSet::default())
        .server(|s| {
            s.standbys.truncate(1);
            s.sync_configured = set(1, &["b"]);
        })
        .after(100);
    check(
        "nothing is under way",
        back.clone(),
        "hold 1, write leadership+history : leading sync_change",
    );
    let told = back.with(|o| {
        o.task = Some(TaskView {
            task: Task::SetSync(SyncSet::default()),
            since: o.now,
        });
    });
    check("it is told", told, "hold 1 : leading sync_pending");
}

#[test]
fn the_sync_set_follows_the_standbys() {
    check("as it is", Scene::leader(), "hold 1 : leading");
    let unproven = Scene::leader().server(|s| s.sync_in_force = false);
    // The agent was restarted, or the proof failed: found by the simulator, seed 30.
    check(
        "not seen proven yet",
        unproven.clone(),
        "hold 1 : leading sync_pending",
    );
    check(
        "not proven",
        unproven.after(1050),
        "hold 1, SetSync (1 of b, c) : leading sync_pending",
    );
    let gone = Scene::leader()
        .after(100)
        .server(|s| s.standbys.truncate(1));
    check("one is away for a moment", gone.clone(), "hold 1 : leading");
    check(
        "for long: PostgreSQL first",
        gone.clone().after(2200),
        "hold 1, SetSync (1 of b) : leading sync_change",
    );
    let set_here = gone
        .after(2200)
        .server(|s| s.sync_configured = set(1, &["b"]));
    check(
        "then the coordinator",
        set_here.clone(),
        "hold 1, write leadership+history : leading sync_change",
    );
    let behind = set_here.server(|s| s.standbys[0].flush_lsn = Lsn(999));
    check(
        "but not before the rest has flushed",
        behind,
        "hold 1 : leading sync_waiting",
    );
    let alone = Scene::leader()
        .after(100)
        .server(|s| s.standbys.clear())
        .after(2200);
    check(
        "all are away: coordinator first",
        alone,
        "hold 1, write leadership+history : leading sync_change",
    );
    let joins = Scene::leader()
        .leadership(|l| l.sync = set(1, &["b"]))
        .server(|s| s.sync_configured = set(1, &["b"]));
    check(
        "one joins: coordinator first",
        joins,
        "hold 1, write leadership+history : leading sync_change",
    );
}

#[test]
fn a_switchover() {
    let asked = |to| Scene::leader().asked(to, RequestPhase::Asked);
    check(
        "a checkpoint first",
        asked(Some("b")),
        "hold 1, Checkpoint : leading switching",
    );
    check(
        "then the proxies hold",
        asked(None).after(50),
        "hold 1, write request : leading switching",
    );
    let hold = |active| {
        Scene::leader()
            .asked(Some("b"), RequestPhase::Hold)
            .server(|s| s.active_transactions = active)
    };
    check(
        "transactions run",
        hold(Some(2)).after(100),
        "hold 1 : leading switching holding",
    );
    check(
        "none is left",
        hold(Some(0)).after(100),
        "hold 1, Stop : leading switching",
    );
    check(
        "they take too long",
        hold(Some(2)).after(3100),
        "hold 1, Stop : leading switching",
    );
    let stopped = hold(Some(0)).with(|o| o.server = ServerView::Down);
    let d = decide(&stopped.o, &stopped.memory);
    let next = d.open.as_ref().map(|o| &o.change.puts[0]);
    assert!(matches!(next, Some(Record::Leadership(l)) if l.preferred == Some(id("b"))));
    check(
        "stopped",
        stopped,
        "release 1, elect-after 1 : handing_over",
    );
}

#[test]
fn a_request_that_cannot_be_met_is_refused_before_anything_is_touched() {
    let refused = "hold 1, write history, delete request : leading refused";
    let asked = |to| Scene::leader().asked(Some(to), RequestPhase::Asked);
    check("to itself", asked("a"), refused);
    check("to a stranger", asked("x"), refused);
    check(
        "to one that is away",
        asked("b")
            .after(50)
            .server(|s| s.standbys.retain(|b| b.member != id("b"))),
        refused,
    );
    let mut never = asked("b");
    never
        .view()
        .members
        .get_mut(&id("b"))
        .unwrap()
        .value
        .priority = 0;
    check("to one that never leads", never, refused);
    check(
        "too few standbys",
        asked("b").with(|o| o.peers.clear()),
        refused,
    );
    let old = asked("b").leadership(|l| l.term = Term(2)).lease(2);
    check(
        "of another term",
        old,
        "hold 2, write history, delete request : leading refused",
    );
}
