//! The fence rule, the end of a lease, elections.

use super::*;

#[test]
fn the_fence_rule() {
    let primary = |s: Scene| s.with(|o| o.server = ServerView::Running(running(false)));
    check(
        "somebody else leads",
        primary(Scene::cluster("b")),
        "kill : fenced",
    );
    check(
        "an election is open",
        primary(Scene::election("a")),
        "kill : fenced election",
    );
    let lapsed = Scene::leader().with(|o| o.lease = None);
    check(
        "the lease ran out",
        lapsed,
        "kill, release 1, elect-after 1 : fenced",
    );
    let other_term = Scene::leader().lease(7);
    check(
        "the lease is of another term",
        other_term,
        "kill, release 1, elect-after 1 : fenced",
    );
    let starting = Scene::leader().with(|o| {
        o.lease = None;
        o.server = ServerView::Silent {
            maybe_primary: true,
        };
    });
    check(
        "it may be a primary",
        starting,
        "kill, release 1, elect-after 1 : fenced",
    );
    let blind = Scene::leader().with(|o| o.view = None);
    check(
        "no coordinator, a lease",
        blind.clone(),
        "hold 1 : no_coordinator",
    );
    check(
        "no coordinator, no lease",
        blind.with(|o| o.lease = None),
        "kill : fenced no_coordinator",
    );
}

#[test]
fn the_leader_is_gone() {
    let lapsed = || Scene::standby().with(|o| o.lease_seen = LeaseSeen::Lapsed);
    check("a moment after its election", lapsed(), " : standby");
    check(
        "settled",
        lapsed().after(2100),
        "elect-after 1 : lease_over standby",
    );
    let held = lapsed().with(|o| o.lease_seen = LeaseSeen::Held(Term(1)));
    check("a promise runs", held.after(2100), " : standby");
    let outside = lapsed().leadership(|l| l.sync = set(1, &["c"]));
    check(
        "outside V",
        outside.after(2100),
        " : leader_was_alone standby",
    );
    let reborn = lapsed().leadership(|l| {
        l.sync.members.insert(id("b"), Incarnation(99));
    });
    check(
        "in V as another incarnation",
        reborn.after(2100),
        " : leader_was_alone standby",
    );
    let alone = lapsed().leadership(|l| l.sync = SyncSet::default());
    check(
        "the leader was alone",
        alone.after(2100),
        " : leader_was_alone standby",
    );
}

#[test]
fn an_election() {
    check("seals", Scene::election("b"), "Seal : election");
    let down = Scene::election("b").with(|o| o.server = ServerView::Down);
    check("starts first", down, "StartStandby : election starting");
    let told = Scene::election("b").with(|o| {
        o.sealed = Some(Seal {
            term: Term(2),
            incarnation: life("b"),
            timeline: TimelineId(1),
            lsn: Lsn(1000),
        });
    });
    check(
        "tells the coordinator",
        told,
        "write seal/b : election sealing",
    );
    check(
        "one seal is too few",
        Scene::election("b").sealed(&[("b", 1, 1000)]),
        " : election no_winner",
    );
    let both = |c| Scene::election("b").sealed(&[("b", 1, 1000), ("c", 1, c)]);
    check(
        "wins a tie by name",
        both(1000),
        "write leadership+timelines+history : election won",
    );
    check("yields to more WAL", both(1001), " : election yields");
    let old = Scene::election("b").sealed(&[("a", 1, 900), ("b", 1, 1000)]);
    check(
        "the old leader's seal is proof enough",
        old,
        "write leadership+timelines+history : election won",
    );
    let back = Scene::election("a").sealed(&[("a", 1, 1000)]);
    check(
        "the old leader alone",
        back,
        "write leadership+timelines+history : election won",
    );
    let older = Scene::election("b")
        .sealed(&[("b", 1, 1000), ("c", 1, 5)])
        .leadership(|l| l.term = Term(3));
    check("seals of another term", older, "Seal : election");
}

#[test]
fn the_winner_writes_v_with_the_old_leader_and_an_unused_timeline() {
    let scene = Scene::election("b").sealed(&[("b", 1, 1000), ("c", 1, 900)]);
    let d = decide(&scene.o, &scene.memory);
    let won = d.changes[0].puts.iter().find_map(|p| match p {
        Record::Leadership(l) => Some(l.clone()),
        _ => None,
    });
    let won = won.unwrap();
    assert_eq!(won.leader, Some(member("b")));
    assert_eq!(won.sync, set(1, &["a", "c"]));
    assert_eq!(won.timeline, TimelineId(2));
    assert!(!won.open);
}

#[test]
fn the_operator_may_accept_a_loss() {
    let mut scene = Scene::election("b").sealed(&[("b", 1, 1000)]);
    scene = scene.asked(Some("b"), RequestPhase::Asked);
    let request = scene.view().request.as_mut().unwrap();
    request.value.kind = RequestKind::Failover;
    check(
        "a failover that may lose nothing",
        scene.clone(),
        " : election no_winner",
    );
    scene.view().request.as_mut().unwrap().value.allow_data_loss = true;
    check(
        "c may still give its seal",
        scene.clone(),
        " : election no_winner",
    );
    check(
        "may lose",
        scene.clone().after(2050),
        "write leadership+history : election no_winner override",
    );
    check(
        "nothing needs to be lost",
        scene.clone().sealed(&[("c", 1, 900)]).after(2050),
        "write leadership+timelines+history, delete request : election won",
    );
    let scene = scene.leadership(|l| {
        l.allow_data_loss = true;
        l.preferred = Some(id("b"));
    });
    check(
        "the rest is waited for",
        scene.clone(),
        " : election collecting",
    );
    check(
        "then wins",
        scene.after(2050),
        "write leadership+timelines+history, delete request : election won",
    );
}

/// An operator made this member's disk all there is.
#[test]
fn nobody_leads_by_recovered_records_before_the_operator_says_so() {
    let recovered = |l: &mut Leadership| *l = l.clone().into_recovered(0);
    let standby = || Scene::standby().with(|o| o.lease_seen = LeaseSeen::Lapsed);
    check(
        "the election is opened",
        standby().leadership(recovered).after(2100),
        "elect-after 1001 : lease_over",
    );
    let alone = standby().leadership(|l| l.sync = SyncSet::default());
    check(
        "also where the leader was alone",
        alone.leadership(recovered).after(2100),
        "elect-after 1001 : lease_over",
    );

    // The leader by these records: another may have led since.
    check(
        "a primary in its lease",
        Scene::leader().leadership(recovered),
        "kill, release 1001, elect-after 1001 : fenced demoted",
    );
    let down = |s: Scene| s.with(|o| o.server = ServerView::Down);
    check(
        "its PostgreSQL was stopped",
        down(Scene::leader()).leadership(recovered),
        "release 1001, elect-after 1001 : demoted",
    );
    let elected = Scene::leader()
        .with(|o| o.server = ServerView::Running(running(true)))
        .leadership(|l| (l.timeline, l.open) = (TimelineId(2), false));
    check(
        "elected, not promoted yet",
        elected.clone(),
        "hold 1, Promote 2 (1 of b, c) : promoting",
    );
    check(
        "and recovered",
        elected.leadership(recovered),
        "release 1001, elect-after 1001 : demoted",
    );

    let mut stuck = Scene::election("b").leadership(recovered).sealed(&[
        ("a", 1, 900),
        ("b", 1, 1000),
        ("c", 1, 900),
    ]);
    check("all have sealed", stuck.clone(), " : election no_winner");
    let reasons = decide(&stuck.o, &stuck.memory).reasons;
    let why = &reasons.iter().find(|r| r.code == "no_winner").unwrap().text;
    assert!(why.contains("recovered the records"), "{why}");
    stuck = stuck.asked(None, RequestPhase::Asked);
    let term = stuck.view().leadership.as_ref().unwrap().value.term;
    let request = &mut stuck.view().request.as_mut().unwrap().value;
    (request.kind, request.term) = (RequestKind::Failover, term);
    check(
        "asked without a word",
        stuck.clone(),
        " : election no_winner",
    );
    stuck.view().request.as_mut().unwrap().value.allow_data_loss = true;
    check(
        "the operator accepts the loss",
        stuck.clone(),
        "write leadership+history : election no_winner override",
    );
    let d = {
        let s = stuck.leadership(|l| l.allow_data_loss = true);
        decide(&s.o, &s.memory)
    };
    let won = d.changes[0].puts.iter().find_map(|p| match p {
        Record::Leadership(l) => Some(l.clone()),
        _ => None,
    });
    let won = won.unwrap();
    assert_eq!(won.leader, Some(member("b")));
    assert!(!won.recovered, "the new leader's records are whole");
    assert_eq!(won.sync, SyncSet::default());
}

#[test]
fn a_switchover_waits_for_the_one_it_wants() {
    let c_first = || {
        Scene::election("c")
            .leadership(|l| {
                l.sync = set(2, &["b", "c"]);
                l.preferred = Some(id("b"));
            })
            .sealed(&[("c", 1, 1000)])
    };
    check("its seal is missing", c_first(), " : election collecting");
    check(
        "for too long",
        c_first().after(2100),
        "write leadership+timelines+history : election won",
    );
    check(
        "it has sealed",
        c_first().sealed(&[("b", 1, 1000)]),
        " : election yields",
    );
    let dead = c_first().with(|o| {
        o.peers.remove(&id("b"));
    });
    check(
        "it is dead",
        dead,
        "write leadership+timelines+history : election won",
    );
}

/// A survivor may have sealed on a timeline that the recovered records do not know: its number is not given again.
#[test]
fn recovered_records_give_no_timeline_that_has_sealed() {
    let mut s = Scene::election("b").leadership(|l| {
        *l = l.clone().into_recovered(0);
        l.allow_data_loss = true;
    });
    let term = s.view().leadership.as_ref().unwrap().value.term;
    assert!(term.0 > 1000, "no survivor has seen it");
    s.o.me.floor = Term(9);
    let s = s.sealed(&[("b", 9, 1000), ("c", 1, 900)]).after(2_500);
    let d = decide(&s.o, &s.memory);
    let won = d
        .changes
        .iter()
        .flat_map(|c| &c.puts)
        .find_map(|p| match p {
            Record::Leadership(l) => Some(l.timeline),
            _ => None,
        });
    assert_eq!(won, Some(TimelineId(10)), "{}", line(&d));
}

/// A store that was restored from an old copy names terms that are over: nobody votes, wins or leads by them.
#[test]
fn records_below_the_floor_decide_nothing() {
    let above = |s: Scene| s.with(|o| o.me.floor = Term(9));
    check("no seal", above(Scene::election("b")), " : records_are_old");
    let won = Scene::election("b").with(|o| {
        o.sealed = Some(Seal {
            term: Term(2),
            incarnation: life("b"),
            timeline: TimelineId(1),
            lsn: Lsn(1000),
        });
    });
    check(
        "no win, though it is sealed",
        above(won),
        " : records_are_old",
    );
    let gone = Scene::standby().with(|o| o.lease_seen = LeaseSeen::Lapsed);
    check(
        "no election",
        above(gone).after(2100),
        " : lease_over records_are_old sealed",
    );
    check(
        "no lease is held",
        above(Scene::leader()),
        " : records_are_old",
    );
    let back = Scene::leader().with(|o| {
        o.lease = None;
        o.server = ServerView::Running(running(true));
    });
    check(
        "the leader of the old copy does not win by its own seal",
        above(back),
        " : records_are_old",
    );
    let down = Scene::leader().with(|o| {
        o.lease = None;
        o.server = ServerView::Down;
    });
    check(
        "it starts as a standby of nobody",
        above(down),
        "StartStandby : records_are_old",
    );
}
