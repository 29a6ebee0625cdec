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
