//! The durability modes, standby promises, and members that never lead.

use super::*;
use crate::promise::PromiseNeed;
use crate::records::History;

/// The operator wishes this mode.
fn wish(mut s: Scene, durability: Durability) -> Scene {
    s.view().settings.as_mut().unwrap().value.durability = durability;
    s
}

/// What is about to be written into the leadership.
fn written(s: &Scene) -> Leadership {
    let d = decide(&s.o, &s.memory);
    let l = d
        .changes
        .iter()
        .flat_map(|c| &c.puts)
        .find_map(|p| match p {
            Record::Leadership(l) => Some(l.clone()),
            _ => None,
        });
    l.unwrap_or_else(|| panic!("nothing is written: {}", line(&d)))
}

/// `a` leads in async and lists its standbys.
fn asynchronous() -> Scene {
    wish(Scene::leader(), Durability::Async)
        .leadership(|l| {
            l.durability = Durability::Async;
            l.sync = set(0, &["b", "c"]);
        })
        .server(|s| s.sync_configured = SyncSet::default())
}

/// `a` leads in strict.
fn strict() -> Scene {
    wish(Scene::leader(), Durability::Strict).leadership(|l| l.durability = Durability::Strict)
}

#[test]
fn towards_quorum_postgresql_comes_first() {
    let s = wish(asynchronous(), Durability::Quorum);
    check(
        "PostgreSQL",
        s.clone(),
        "hold 1, SetSync (1 of b, c) : leading sync_change",
    );
    let set_here = s.server(|s| s.sync_configured = set(1, &["b", "c"]));
    check(
        "one write",
        set_here.clone(),
        "hold 1, write leadership+history : leading sync_change",
    );
    let l = written(&set_here);
    assert_eq!(
        (l.durability, l.sync),
        (Durability::Quorum, set(1, &["b", "c"]))
    );
    let behind = set_here.server(|s| {
        for b in &mut s.standbys {
            b.flush_lsn = Lsn(999);
        }
    });
    check(
        "not before it is flushed",
        behind,
        "hold 1 : leading sync_waiting",
    );
}

#[test]
fn towards_async_the_coordinator_comes_first() {
    let s = wish(Scene::leader(), Durability::Async);
    check(
        "coordinator",
        s.clone(),
        "hold 1, write leadership+history : leading sync_change",
    );
    let l = written(&s);
    assert_eq!(
        (l.durability, l.sync),
        (Durability::Async, set(0, &["b", "c"]))
    );
    let then = asynchronous().server(|s| s.sync_configured = set(1, &["b", "c"]));
    check(
        "then PostgreSQL",
        then,
        "hold 1, SetSync (nobody (the leader is alone)) : leading sync_change",
    );
    check("as it is", asynchronous(), "hold 1 : leading");
}

#[test]
fn async_lists_who_is_near_enough_to_follow() {
    let behind = |bytes: u64| {
        asynchronous()
            .server(|s| {
                s.end = Lsn(1000 + bytes);
                s.standbys.truncate(1);
            })
            .after(2200)
    };
    let l = |s: &Scene| written(s).sync;
    assert_eq!(
        l(&behind(16 << 20)),
        set(0, &["b"]),
        "slow, and within max_lag_bytes"
    );
    assert_eq!(
        l(&behind((16 << 20) + 1)),
        set(0, &[]),
        "too far behind to follow"
    );
}

#[test]
fn strict_waits_and_says_so() {
    check("as it is", strict(), "hold 1 : leading");
    let gone = strict()
        .after(100)
        .server(|s| s.standbys.clear())
        .after(2200);
    check(
        "all are away: nobody leaves",
        gone,
        "hold 1 : leading writes_wait",
    );
    let one = strict()
        .after(100)
        .server(|s| s.standbys.truncate(1))
        .after(2200);
    check(
        "one of two is away: the rest has k",
        one,
        "hold 1, SetSync (1 of b) : leading sync_change",
    );
    // No standby was ever there: nothing may be acknowledged from the first write on.
    let alone = || strict().leadership(|l| l.sync = SyncSet::default());
    let first = alone().server(|s| {
        s.standbys.clear();
        s.sync_configured = SyncSet::default();
    });
    check(
        "fails closed",
        first.clone(),
        "hold 1, SetSync (nobody that exists (commits wait)) : leading writes_wait sync_change",
    );
    let closed = first.leadership(|l| l.open = false).with(|o| {
        o.server = ServerView::Down;
        o.peers.clear();
    });
    check(
        "and starts closed",
        closed,
        "hold 1, StartPrimary (nobody that exists (commits wait)) : restarting",
    );
    // The proof was lost with the agent.
    let unproven = alone()
        .server(|s| {
            s.standbys.clear();
            s.sync_configured = SyncSet::closed();
            s.sync_in_force = false;
        })
        .after(1050);
    check(
        "is proven closed again",
        unproven,
        "hold 1, SetSync (nobody that exists (commits wait)) : leading writes_wait sync_pending",
    );
}

#[test]
fn a_mode_of_unknown_outcome_is_settled_before_postgresql_waits_for_less() {
    // Quorum was proposed, the answer was lost, and the operator wants async after all.
    let proposed = wish(asynchronous(), Durability::Quorum)
        .server(|s| s.sync_configured = set(1, &["b", "c"]))
        .after(50);
    check(
        "settled first",
        wish(proposed, Durability::Async),
        "hold 1, write leadership : leading sync_unsettled",
    );
}

/// Found by the model check: `strict` was proposed, with the set as it is, and the answer is not there yet. A
/// PostgreSQL that starts in place now by the record that is known, `quorum` with nobody, would acknowledge alone.
#[test]
fn a_start_in_place_waits_for_what_becomes_of_a_mode() {
    let alone = wish(Scene::leader(), Durability::Strict)
        .leadership(|l| l.sync = SyncSet::default())
        .server(|s| {
            s.standbys.clear();
            s.sync_configured = SyncSet::closed();
        });
    check(
        "proposed",
        alone.clone(),
        "hold 1, write leadership+history : leading sync_change",
    );
    let died = |s: Scene| {
        s.with(|o| {
            o.server = ServerView::Down;
            o.peers.clear();
        })
    };
    check(
        "PostgreSQL dies, the answer is not known",
        died(alone.after(50)),
        "hold 1, write leadership : restarting sync_unsettled",
    );
    let never = wish(Scene::leader(), Durability::Quorum).leadership(|l| {
        l.sync = SyncSet::default();
        l.open = false;
    });
    check(
        "nothing was proposed",
        died(never),
        "hold 1, StartPrimary (nobody (the leader is alone)) : restarting",
    );
}

/// Whatever the mode, a leader that restarted in place opens when k of V have what it recovered; the agent may
/// have restarted in between, and so remembers nothing.
#[test]
fn a_restarted_leader_opens_when_its_wal_is_safe_in_every_mode() {
    let closed = |s: Scene, flushed| {
        let mut s = s.leadership(|l| l.open = false).server(|s| {
            s.standbys = vec![standby_of("b", flushed), standby_of("c", flushed)];
        });
        s.view().history = at(History(vec![Event {
            at_ms: 0,
            term: Term(1),
            member: id("a"),
            kind: "closed".into(),
            text: String::new(),
        }]));
        s
    };
    let opens = "hold 1, write leadership+history : leading";
    for s in [Scene::leader(), strict()] {
        check(
            "not yet",
            closed(s.clone(), 999),
            "hold 1 : leading recovering",
        );
        check("safe", closed(s.clone(), 1000), opens);
        // Its history has forgotten how the term began.
        let mut s = closed(s, 999);
        s.view().history = at(History::default());
        check("not known to be safe", s, "hold 1 : leading recovering");
    }
    check("async waits for nobody", closed(asynchronous(), 5), opens);
}

fn needs(s: &Scene) -> Vec<PromiseNeed> {
    decide(&s.o, &s.memory).promises
}

fn need(needed: usize, names: &[&str]) -> PromiseNeed {
    PromiseNeed {
        members: set(0, names).members,
        needed,
    }
}

#[test]
fn a_leader_knows_whose_promises_would_do() {
    assert_eq!(needs(&Scene::leader()), [need(1, &["b", "c"])]);
    assert_eq!(needs(&strict()), [need(1, &["b", "c"])]);
    assert_eq!(needs(&asynchronous()), [need(2, &["b", "c"])]);
    assert_eq!(needs(&Scene::standby()), []);
    // A change is under way: the coordinator may hold either set from this decision on.
    let adding = Scene::leader()
        .leadership(|l| l.sync = set(1, &["b"]))
        .server(|s| s.sync_configured = set(1, &["b"]));
    let both = [need(1, &["b"]), need(1, &["b", "c"])];
    assert_eq!(needs(&adding), both);
    assert_eq!(needs(&adding.after(50)), both, "its outcome is unknown");
    // An earlier life may have proposed anything.
    let mut restarted = Scene::leader();
    restarted.memory.first_revision = None;
    assert_eq!(needs(&restarted), []);
    check(
        "which is settled at once",
        restarted,
        "hold 1, write leadership : leading settling",
    );
    let waiting = Scene::leader().with(|o| {
        o.server = ServerView::Silent {
            maybe_primary: true,
        };
    });
    assert_eq!(
        needs(&waiting).len(),
        1,
        "also while PostgreSQL does not answer"
    );
}

#[test]
fn on_promises_the_sync_set_stays() {
    let gone = Scene::leader()
        .after(100)
        .server(|s| s.standbys.truncate(1))
        .with(|o| o.promises.living_since = Some(START));
    check(
        "a standby goes",
        gone.after(2200),
        "hold 1 : leading on_promises",
    );
}

#[test]
fn who_has_promised_neither_elects_nor_seals() {
    let promised = |s: Scene, ms| {
        s.with(|o| o.promises.held_until = Some(START.after(Duration::from_millis(ms))))
    };
    let lapsed = || Scene::standby().with(|o| o.lease_seen = LeaseSeen::Lapsed);
    check(
        "a promise runs",
        promised(lapsed(), 9000).after(2100),
        " : promised standby",
    );
    check(
        "it is over",
        promised(lapsed(), 2000).after(2100),
        "elect-after 1 : lease_over standby",
    );
    check(
        "an election is open",
        promised(Scene::election("b"), 1000),
        " : election promised",
    );
    check(
        "the promise is over",
        promised(Scene::election("b"), 1000).after(1050),
        "Seal : election",
    );
}

#[test]
fn in_async_only_listed_members_follow() {
    let lapsed = |names: &[&str]| {
        let mut s = Scene::standby().leadership(|l| {
            l.durability = Durability::Async;
            l.sync = set(0, names);
        });
        s.o.lease_seen = LeaseSeen::Lapsed;
        s.after(2100)
    };
    check(
        "listed",
        lapsed(&["b"]),
        "elect-after 1 : lease_over standby",
    );
    check("not listed", lapsed(&["c"]), " : leader_was_alone standby");
    let won = Scene::election("b")
        .leadership(|l| {
            l.durability = Durability::Async;
            l.sync = set(0, &["b", "c"]);
        })
        .sealed(&[("b", 1, 1000), ("c", 1, 900), ("a", 1, 900)]);
    let l = written(&won);
    assert_eq!(
        l.sync,
        set(0, &["c"]),
        "the old leader comes in when it streams"
    );
}

/// `b` may lead; `c` has priority 0.
fn never_leading(b: u64, c: u64) -> Scene {
    let mut s = Scene::election("b").sealed(&[("b", 1, b), ("c", 1, c)]);
    s.view().members.get_mut(&id("c")).unwrap().value.priority = 0;
    s
}

#[test]
fn what_a_member_that_never_leads_holds_comes_first() {
    let won = "write leadership+timelines+history : election won";
    check("nothing is missing", never_leading(1000, 1000), won);
    let s = never_leading(900, 1000);
    check(
        "the rest is fetched",
        s.clone(),
        "CatchUp : election catching_up",
    );
    let d = decide(&s.o, &s.memory);
    let task = Task::CatchUp {
        from: id("c"),
        receiver: None,
        term: Term(2),
        timeline: TimelineId(1),
        lsn: Lsn(1000),
    };
    assert_eq!(d.task, Some(task));
    // Another one, nearer to it, has the first turn.
    let mut nearer = s.clone().sealed(&[("a", 1, 950)]);
    nearer.view().leadership.as_mut().unwrap().value.previous = None;
    nearer.view().leadership.as_mut().unwrap().value.sync = set(1, &["a", "b", "c"]);
    check("not its turn", nearer.clone(), " : election yields");
    check(
        "its turn",
        nearer.after(15_050),
        "CatchUp : election catching_up",
    );
    let dead = s.with(|o| {
        o.peers.remove(&id("c"));
    });
    check("the holder is gone", dead, " : election no_winner");
}

#[test]
fn a_member_that_never_leads_makes_no_cluster() {
    let s = Scene::blank("b").with(|o| o.me.priority = 0);
    check("waits", s, " : never_leads");
}

#[test]
fn in_async_a_leader_is_remembered_where_it_was_when_it_led() {
    let listed = |s: Scene| {
        s.leadership(|l| {
            l.durability = Durability::Async;
            l.sync = set(0, &["b", "c"]);
        })
    };
    let at = |lsn| {
        let mut s = listed(Scene::standby());
        let status = &mut s.o.peers.get_mut(&id("a")).unwrap().status;
        (status.timeline, status.lsn) = (Some(TimelineId(1)), Some(Lsn(lsn)));
        status.incarnation = Some(life("a"));
        s
    };
    let far = 1000 + (17 << 20);
    let elected = |before: Scene| {
        let mut s = listed(Scene::election("b")).sealed(&[("b", 1, 1000), ("c", 1, 900)]);
        s.memory = before.after(100).memory;
        // What it says once its PostgreSQL is down.
        let a = &mut s.o.peers.get_mut(&id("a")).unwrap().status;
        (a.role, a.timeline, a.lsn) = (MemberRole::Down, None, None);
        let s = s.after(2_500);
        writes_leadership(&s)
    };
    assert!(elected(at(1000)));
    assert!(
        !elected(at(far)),
        "more than max_lag_bytes behind where it was"
    );
    let unheard = listed(Scene::election("b")).sealed(&[("b", 1, 1000), ("c", 1, 900)]);
    assert!(
        writes_leadership(&unheard.after(2_500)),
        "the leader had listed it, near enough"
    );
}

fn writes_leadership(s: &Scene) -> bool {
    let d = decide(&s.o, &s.memory);
    let mut puts = d.changes.iter().flat_map(|c| &c.puts);
    puts.any(|p| matches!(p, Record::Leadership(_)))
}
