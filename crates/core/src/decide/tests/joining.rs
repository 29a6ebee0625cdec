//! First start, cloning, following, coming back.

use super::*;
use crate::records::{Order, OrderKind};

#[test]
fn first_start() {
    check(
        "nobody has begun",
        Scene::blank("a"),
        "write cluster+settings : claiming",
    );
    let claimed = |me: &str| {
        let mut s = Scene::blank(me);
        s.view().cluster = at(ClusterRecord {
            name: "test".into(),
            initializer: id("a"),
            system_id: None,
            bootstrapped: false,
            founding: FirstStart::Make,
        });
        s
    };
    check(
        "the winner of the race",
        claimed("a"),
        "write member/a, InitDb : initializing",
    );
    check(
        "a loser waits",
        claimed("b").with(|o| {
            o.peers.insert(
                id("a"),
                PeerView {
                    heard_at: o.now,
                    status: status("a"),
                },
            );
        }),
        "write member/b : waiting_for_initdb",
    );
    check(
        "the initializer is silent for a while",
        claimed("b").after(19_000),
        "write member/b : initializer_silent",
    );
    check(
        "and for long",
        claimed("b").after(21_000),
        "write cluster, write member/b : initializer_silent",
    );
    let made = claimed("a").with(|o| {
        o.me.incarnation = Some(life("a"));
        o.data = DataView::Present {
            system_id: "77".into(),
            timeline: TimelineId(1),
            origin: Origin::Own,
        };
    });
    check(
        "the database is made",
        made,
        "write cluster+leadership+timelines+history, write member/a : initialized",
    );
    let stranger = Scene::blank("a").with(|o| {
        o.data = DataView::Present {
            system_id: "77".into(),
            timeline: TimelineId(1),
            origin: Origin::Own,
        };
    });
    check("a database, but no cluster", stranger, " : unknown_data");
}

/// A member whose data directory Craton did not make.
fn stranger(me: &str, wish: FirstStart, refused: Option<&str>) -> Scene {
    Scene::blank(me).with(|o| {
        o.me.first_start = wish;
        o.data = DataView::Present {
            system_id: "77".into(),
            timeline: TimelineId(5),
            origin: Origin::Strange {
                refused: refused.map(ToOwned::to_owned),
            },
        };
    })
}

/// The cluster as `a` claimed it for its data directory.
fn for_adoption(mut s: Scene) -> Scene {
    s.view().cluster = at(ClusterRecord {
        name: "test".into(),
        initializer: id("a"),
        system_id: None,
        bootstrapped: false,
        founding: FirstStart::Adopt,
    });
    s
}

#[test]
fn a_data_directory_that_was_there_before() {
    let wished = || stranger("a", FirstStart::Adopt, None);
    check("on demand", wished(), "write cluster+settings : claiming");
    for wish in [FirstStart::Make, FirstStart::Wait] {
        let s = stranger("a", wish, None);
        check("never without being asked", s, " : strange_data");
    }
    let refused = stranger("a", FirstStart::Adopt, Some("it is a standby"));
    check("not every one", refused.clone(), " : cannot_adopt");
    check(
        "nor after the claim",
        for_adoption(refused),
        "write member/a : cannot_adopt",
    );
    check(
        "the claim comes first",
        for_adoption(wished()),
        "write member/a, Adopt : adopting",
    );
    let prepared = for_adoption(wished()).with(|o| o.me.incarnation = Some(life("a")));
    let d = decide(&prepared.o, &prepared.memory);
    assert_eq!(
        line(&d),
        "write cluster+leadership+timelines+history, write member/a : initialized"
    );
    let Some(Record::Leadership(l)) = d.changes[0].puts.get(1) else {
        panic!("{d:?}")
    };
    assert_eq!(
        (l.timeline, l.open),
        (TimelineId(5), false),
        "it goes on with the timeline that it has"
    );
}

#[test]
fn nothing_empty_comes_in_the_place_of_an_adopted_one() {
    let empty = |wish| Scene::blank("a").with(|o| o.me.first_start = wish);
    check(
        "nothing is there to adopt",
        empty(FirstStart::Adopt),
        " : nothing_to_adopt",
    );
    check(
        "another is to found it",
        empty(FirstStart::Wait),
        " : waiting_for_founder",
    );
    check(
        "it was claimed, and is gone",
        for_adoption(empty(FirstStart::Adopt)),
        "write member/a : adopted_data_missing",
    );
    check(
        "the adopter is silent for long",
        for_adoption(Scene::blank("b")).after(60_000),
        "write member/b : adopter_silent",
    );
    check(
        "a second adopter waits",
        for_adoption(stranger("b", FirstStart::Adopt, None)).after(60_000),
        "write member/b : adopter_silent",
    );
    let mut wait = Scene::blank("b").with(|o| o.me.first_start = FirstStart::Wait);
    wait.view().cluster = for_adoption(Scene::blank("b")).view().cluster.clone();
    wait.view().cluster.as_mut().unwrap().value.founding = FirstStart::Make;
    check(
        "who waits takes no initializer's place",
        wait.after(60_000),
        "write member/b : initializer_silent",
    );
}

/// Losing the coordinator must not let any member claim to have the newest copy.
#[test]
fn what_craton_made_is_never_adopted() {
    let own = |life: Option<Incarnation>, origin| {
        Scene::blank("a").with(|o| {
            o.me.first_start = FirstStart::Adopt;
            o.me.incarnation = life;
            o.data = DataView::Present {
                system_id: "77".into(),
                timeline: TimelineId(1),
                origin,
            };
        })
    };
    let strange = || Origin::Strange { refused: None };
    check("marked", own(None, Origin::Own), " : unknown_data");
    check(
        "remembered",
        own(Some(life("a")), strange()),
        " : unknown_data",
    );
    check(
        "marked, and claimed meanwhile",
        for_adoption(own(None, Origin::Own)),
        "write member/a : unknown_data",
    );
}

#[test]
fn a_copy_that_craton_did_not_make_does_not_join() {
    let strange = |system: &str| {
        Scene::cluster("b").with(|o| {
            o.me.incarnation = None;
            o.data = DataView::Present {
                system_id: system.into(),
                timeline: TimelineId(1),
                origin: Origin::Strange { refused: None },
            };
        })
    };
    let ordered = |mut s: Scene| {
        let order = Order {
            id: 1,
            kind: OrderKind::Reinit,
            process: None,
            incarnation: None,
            by: "op".into(),
        };
        let value = at(order).unwrap();
        s.view().orders.insert(id("b"), value);
        s
    };
    for (system, code) in [("77", "strange_copy"), ("78", "wrong_system_id")] {
        check(
            "is left alone",
            strange(system),
            &format!("write member/b : {code}"),
        );
        check(
            "until it is asked for",
            ordered(strange(system)),
            &format!("write member/b, Reinit : {code} reinit"),
        );
        check(
            "and a leader is open",
            ordered(strange(system)).leadership(|l| l.open = false),
            &format!("write member/b : {code} order_waits"),
        );
        let mut stale = ordered(strange(system));
        let order = stale.view().orders.get_mut(&id("b")).unwrap();
        order.value.incarnation = Some(life("b"));
        check(
            "an order for what was there before it is none for this",
            stale,
            &format!("write history, delete order/b, write member/b : {code}"),
        );
    }
}

#[test]
fn the_first_leader() {
    let first = || {
        let mut s = Scene::cluster("a").leadership(|l| {
            l.open = false;
            l.sync = SyncSet::default();
        });
        s.view().cluster.as_mut().unwrap().value.bootstrapped = false;
        s
    };
    check(
        "takes the lease first",
        first(),
        "hold 1 : restarting waiting_for_lease",
    );
    check(
        "then starts",
        first().lease(1),
        "hold 1, StartPrimary (nobody (the leader is alone)) : restarting",
    );
    let runs = |done| {
        first().lease(1).with(|o| {
            o.server = ServerView::Running(running(false));
            o.bootstrap_done = done;
        })
    };
    check(
        "makes the roles",
        runs(false),
        "hold 1, Bootstrap : bootstrapping",
    );
    check("and says so", runs(true), "hold 1, write cluster : ");
    let mut ready = runs(true);
    ready.view().cluster.as_mut().unwrap().value.bootstrapped = true;
    check(
        "and opens",
        ready,
        "hold 1, write leadership+history : leading",
    );
}

#[test]
fn an_empty_data_directory() {
    let empty = || Scene::cluster("b").with(|o| o.data = DataView::Empty);
    let c_streams = |o: &mut Observation| {
        o.peers.get_mut(&id("a")).unwrap().status.role = MemberRole::Leader;
    };
    check(
        "is cloned from another standby",
        empty().with(c_streams),
        "Clone c 1 : cloning",
    );
    let no_standby = empty().with(|o| o.peers.get_mut(&id("c")).unwrap().status.streaming = false);
    check("or from the leader", no_standby, "Clone a 1 : cloning");
    let failed = empty().with(|o| {
        o.failures = vec![TaskFailure {
            kind: TaskKind::Clone,
            error: "gone".into(),
            count: 1,
            retry_at: o.now,
        }];
    });
    check(
        "after a failure from the leader",
        failed.clone(),
        "Clone a 1 : cloning",
    );
    let waits = failed.with(|o| o.failures[0].retry_at = o.now.after(Duration::from_secs(1)));
    check("and not at once", waits, " : cloning back_off");
    let closed = empty().leadership(|l| l.open = false);
    check(
        "not while nobody is open",
        closed.clone(),
        " : waiting_for_leader",
    );
    // It may be this member that it waits for.
    let again = closed.leadership(|l| l.restarted = true);
    check(
        "but from one that was, and was started in place",
        again,
        "Clone c 1 : cloning",
    );
    let own = Scene::cluster("a").with(|o| o.data = DataView::Empty);
    check("never over the leadership", own, " : leader_without_data");
}

#[test]
fn what_does_not_belong_here_is_left_alone() {
    let foreign = Scene::cluster("b").with(|o| o.data = DataView::Foreign("photos".into()));
    check("somebody's files", foreign, " : foreign");
    let other = Scene::cluster("b").with(|o| {
        o.data = DataView::Present {
            system_id: "78".into(),
            timeline: TimelineId(1),
            origin: Origin::Own,
        };
    });
    check("another cluster's database", other, " : wrong_system_id");
}

#[test]
fn a_standby_follows() {
    check("streams", Scene::standby(), " : standby");
    check(
        "down",
        Scene::standby().with(|o| o.server = ServerView::Down),
        "StartStandby : starting",
    );
    check(
        "follows nobody yet",
        Scene::standby().server(|s| s.upstream = None),
        "Follow a 1 : following",
    );
    let reading = Scene::standby().server(|s| {
        s.upstream = None;
        s.end_is_exact = false;
    });
    check(
        "not before the end of its WAL is known",
        reading,
        " : reading_wal",
    );
    check(
        "sealed for a later term",
        Scene::standby().with(|o| o.me.floor = Term(2)),
        " : sealed",
    );
    let busy = Scene::standby().server(|s| s.upstream = None).with(|o| {
        o.task = Some(TaskView {
            task: Task::Checkpoint,
            since: o.now,
        });
    });
    check("one task at a time", busy, " : following busy");
    let new_term = Scene::standby().leadership(|l| {
        l.term = Term(2);
        l.leader = Some(member("c"));
    });
    check("a new leader", new_term, "Follow c 2 : following");
    let stuck = Scene::standby().server(|s| s.streaming = false);
    check(
        "not streaming for a moment",
        stuck.clone().after(10_000),
        " : not_streaming",
    );
    check(
        "not streaming for long",
        stuck.clone().after(20_000),
        "Rewind a 1 : not_streaming stuck",
    );
    // Its disk is gone, and this incarnation's seal is needed: found by the simulator, seed 16657.
    let on_paper =
        stuck.with(|o| o.peers.get_mut(&id("a")).unwrap().status.role = MemberRole::Down);
    check(
        "a leader on paper",
        on_paper.after(20_000),
        " : not_streaming",
    );
}

/// `b` is to stream from `c`, and streams from `whom`.
fn cascade(whom: &str) -> Scene {
    Scene::standby()
        .with(|o| o.me.upstream = Some(id("c")))
        .server(|s| s.upstream = Some((id(whom), Term(1))))
}

#[test]
fn a_standby_follows_the_standby_that_it_is_told_to() {
    check("goes there", cascade("a"), "Follow c 1 : following");
    check("stays there", cascade("c"), " : standby");
    let away = cascade("c").with(|o| o.peers.get_mut(&id("c")).unwrap().status.streaming = false);
    check("for a moment", away.clone().after(950), " : standby");
    check(
        "which does not stream",
        away.after(1000),
        "Follow a 1 : upstream_away following",
    );
    let silent = cascade("c").with(|o| {
        o.peers.remove(&id("c"));
    });
    check(
        "which is gone",
        silent.after(1000),
        "Follow a 1 : upstream_away following",
    );
    let ring = cascade("a").with(|o| {
        o.peers.get_mut(&id("c")).unwrap().status.upstream = Some(id("b"));
    });
    check("never in a ring", ring, " : upstream_away standby");
    let leads = cascade("c").leadership(|l| {
        l.term = Term(2);
        l.leader = Some(member("c"));
    });
    check("which leads now", leads, "Follow c 2 : following");
    let vain = |ms| cascade("c").server(|s| s.streaming = false).after(ms);
    check("in vain", vain(3000), " : not_streaming");
    check(
        "and then from the leader",
        vain(3050),
        "Follow a 1 : upstream_away following",
    );
    check(
        "until another try",
        vain(63_050).server(|s| s.upstream = Some((id("a"), Term(1)))),
        "Follow c 1 : following",
    );
}

/// `b` led timeline 1 to 1000; `c` leads term 2 on timeline 2, which left timeline 1 at `fork`.
fn former_leader(fork: u64) -> Scene {
    let mut s = Scene::cluster("b").leadership(|l| {
        l.term = Term(2);
        l.leader = Some(member("c"));
        l.timeline = TimelineId(2);
    });
    s.view().timelines = at(Timelines(vec![
        timeline(1, None, 0),
        timeline(2, Some(1), fork),
    ]));
    s.o.server = ServerView::Running(running(true));
    let mut s = s.leads("c", 2);
    s.o.peers
        .get_mut(&id("c"))
        .unwrap()
        .status
        .checkpoint_timeline = Some(TimelineId(2));
    s
}

#[test]
fn a_member_that_comes_back() {
    check(
        "with a prefix",
        former_leader(1000),
        "Follow c 2 : following",
    );
    check(
        "with more than the cluster has",
        former_leader(999),
        "Rewind c 2 : diverged",
    );
    let no_checkpoint = former_leader(999).with(|o| {
        o.peers
            .get_mut(&id("c"))
            .unwrap()
            .status
            .checkpoint_timeline = Some(TimelineId(1));
    });
    check(
        "not before the leader's checkpoint",
        no_checkpoint,
        " : diverged waiting_for_checkpoint",
    );
    // pg_rewind goes by the source's control file, and would see one timeline and nothing to do.
    let early = former_leader(999).with(|o| {
        o.peers
            .get_mut(&id("c"))
            .unwrap()
            .status
            .checkpoint_timeline = Some(TimelineId(1));
    });
    check(
        "not before the leader's first checkpoint",
        early,
        " : diverged waiting_for_checkpoint",
    );
    let closed = former_leader(999).leadership(|l| l.open = false);
    check(
        "not before the leader is open",
        closed.clone(),
        " : diverged waiting_for_leader",
    );
    // Found by the simulator (`--modes --operators`, seed 6092): in `strict` the two waited for each other for ever.
    check(
        "but it may have been, and wait for this member",
        closed.leadership(|l| l.restarted = true),
        "Rewind c 2 : diverged",
    );
    // An agent that was paused knows less than its WAL: found by the simulator, seed 1849.
    let ahead = Scene::standby().server(|s| {
        s.timeline = TimelineId(2);
        s.streaming = false;
    });
    check(
        "with a timeline nobody here has heard of",
        ahead.clone(),
        " : not_streaming behind",
    );
    check(
        "and nobody ever does",
        ahead.after(21_000),
        "Rewind a 1 : not_streaming diverged",
    );
}
