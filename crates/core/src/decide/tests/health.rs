//! Faults inside a host: full disks, hung storage, crash loops, a missing fence.

use super::*;
use crate::health::{Disk, Health, StuckWrite};

const MIB: u64 = 1 << 20;

/// The disk has this much room; the reserve is 128 MiB.
fn room(mib: u64) -> impl Fn(&mut Observation) {
    move |o| {
        o.host.disks = vec![Disk {
            path: "/d".into(),
            total: 100_000 * MIB,
            available: mib * MIB,
        }];
    }
}

fn unfit(s: Scene, names: &[&str]) -> Scene {
    s.with(|o| {
        for name in names {
            let health = &mut o.peers.get_mut(&id(name)).unwrap().status.health;
            *health = Health {
                unfit: vec!["its disk is full".into()],
                ..Health::default()
            };
        }
    })
}

/// A write in the WAL's file system that began `ms` ago.
fn stuck(ms: u64) -> impl Fn(&mut Observation) {
    move |o| {
        o.host.writes = vec![StuckWrite {
            path: "/d".into(),
            since: BootTime(o.now.0 - ms * SECOND / 1000),
            wal: true,
        }];
    }
}

#[test]
fn a_full_disk_on_the_leader() {
    let leader = || Scene::leader();
    check("room", leader().with(room(300)), "hold 1 : leading");
    check(
        "a warning below twice the reserve",
        leader().with(room(200)),
        "hold 1 : disk_low leading",
    );
    check(
        "below the reserve it asks for a switchover",
        leader().with(room(100)),
        "hold 1, write request : unfit leading hands_over",
    );
    let asked = decide(&leader().with(room(100)).o, &Memory::default());
    let Some(Record::Request(request)) = asked.changes.last().and_then(|c| c.puts.first()) else {
        panic!("{asked:?}");
    };
    assert_eq!(request.to, Some(id("b")));
    assert_eq!(request.by, "craton");
    assert!(request.why.as_ref().unwrap().contains("100 MiB left in /d"));
    check(
        "to the member that is better off",
        unfit(leader().with(room(100)), &["b"]),
        "hold 1, write request : unfit leading hands_over",
    );
    check(
        "to nobody if nobody is",
        unfit(leader().with(room(100)), &["b", "c"]),
        "hold 1 : unfit leading nobody_fitter",
    );
    check(
        "again at once where that was not written",
        leader().with(room(100)).after(50),
        "hold 1, write request : unfit leading hands_over",
    );
    check(
        "not again at once where it was in vain",
        in_vain(),
        "hold 1 : unfit leading hands_over_later",
    );
    check(
        "but some time later",
        in_vain().after(30_000),
        "hold 1, write request : unfit leading hands_over",
    );
    let closed = leader().with(room(100)).leadership(|l| l.open = false);
    check(
        "opens first",
        closed,
        "hold 1, write leadership+history : unfit leading",
    );
}

/// A member that handed over, and leads again soon, is free to hand over once more: somebody else has led since.
#[test]
fn a_disk_that_fills_again_soon() {
    let asked = in_vain();
    let back = |memory: Memory| {
        let mut s = Scene::leader().with(room(100));
        s.memory = memory;
        s
    };
    check(
        "in vain: nobody else took over",
        back(asked.memory.clone()),
        "hold 1 : unfit leading hands_over_later",
    );
    let mut other = Scene::cluster("a").leads("b", 2).leadership(|l| {
        l.term = Term(2);
        l.leader.as_mut().unwrap().member = id("b");
    });
    other.o.server = ServerView::Running(running(true));
    other.memory = asked.memory.clone();
    let later = |ms, memory| {
        let mut s = back(memory);
        s.o.now = s.o.now.after(Duration::from_millis(ms));
        for peer in s.o.peers.values_mut() {
            peer.heard_at = s.o.now;
        }
        s
    };
    let led = other.clone().after(50).memory;
    check(
        "b led meanwhile, a moment ago",
        later(4000, led.clone()),
        "hold 1 : unfit leading hands_over_later",
    );
    check(
        "and some seconds ago",
        later(5100, led),
        "hold 1, write request : unfit leading hands_over",
    );
    other.view().leadership.as_mut().unwrap().value.open = false;
    check(
        "b was elected and never opened",
        later(5100, other.after(50).memory),
        "hold 1 : unfit leading hands_over_later",
    );
}

/// The leader has asked for a switchover by itself.
fn asked_itself(phase: RequestPhase, mib: u64) -> Scene {
    let mut s = Scene::leader().asked(Some("b"), phase).with(room(mib));
    let request = &mut s.view().request.as_mut().unwrap().value;
    request.by = "craton".into();
    request.why = Some("the disk is nearly full".into());
    s
}

/// It asked a moment ago, and the request is gone again.
fn in_vain() -> Scene {
    let mut s = asked_itself(RequestPhase::Asked, 100).after(50);
    s.view().request = None;
    s
}

#[test]
fn a_hand_over_for_a_full_disk_is_in_a_hurry() {
    check(
        "as any switchover while there is room",
        asked_itself(RequestPhase::Asked, 100),
        "hold 1, Checkpoint : unfit leading switching",
    );
    check(
        "without a checkpoint when there is little",
        asked_itself(RequestPhase::Asked, 60),
        "hold 1, write request : unfit leading switching",
    );
    check(
        "running transactions are not waited for",
        asked_itself(RequestPhase::Hold, 60).server(|s| s.active_transactions = Some(5)),
        "hold 1, Stop : unfit leading switching",
    );
    check(
        "an operator's switchover waits all the same",
        Scene::leader()
            .asked(Some("b"), RequestPhase::Hold)
            .with(room(60))
            .server(|s| s.active_transactions = Some(5)),
        "hold 1 : unfit leading switching holding",
    );
    let down = asked_itself(RequestPhase::Hold, 60).with(|o| o.server = ServerView::Down);
    let d = decide(&down.o, &down.memory);
    let Some(Record::Leadership(l)) = d.open.as_ref().and_then(|o| o.change.puts.first()) else {
        panic!("{d:?}");
    };
    assert_eq!(l.cause, "a hands over: the disk is nearly full");
    assert_eq!(l.preferred, Some(id("b")));
}

#[test]
fn hung_storage_on_the_leader() {
    let leader = || Scene::leader();
    check("slow", leader().with(stuck(3900)), "hold 1 : leading");
    check(
        "hung: killed, and the lease is left to run out",
        leader().with(stuck(4000)),
        "kill : unfit gives_up",
    );
    check(
        "not if nobody can take over",
        unfit(leader().with(stuck(4000)), &["b", "c"]),
        "hold 1 : unfit stalled leading",
    );
    let moving = leader().with(stuck(4000)).with(|o| {
        o.host.wal_moved_at = Some(BootTime(o.now.0 - SECOND));
    });
    check("commits go on", moving, "hold 1 : leading");
    let waits = leader().with(|o| o.host.wal_waits_since = Some(BootTime(o.now.0 - 4 * SECOND)));
    check("commits wait for the disk", waits, "kill : unfit gives_up");
    // Its processes hang in the kernel: it goes on trying, and the lease is not renewed whatever else happens.
    let mut dying = leader().with(stuck(4000)).after(50);
    dying.o.host.writes.clear();
    check("the decision stands", dying.clone(), "kill : gives_up");
    let silent = dying.clone().with(|o| {
        o.server = ServerView::Silent {
            maybe_primary: true,
        }
    });
    check("while they do not die", silent, "kill : gives_up");
    let lapsed = dying.clone().with(|o| o.lease = None);
    check(
        "past the deadline the fence rule says so too",
        lapsed,
        "kill, release 1, elect-after 1 : fenced",
    );
    let gone = dying.with(|o| o.server = ServerView::Down);
    check(
        "they died: the election is opened at once",
        gone.clone(),
        "release 1, elect-after 1 : handing_over",
    );
    // Also when they died only after the lease had run out.
    let late = gone.clone().with(|o| o.lease = None);
    for scene in [gone, late] {
        let d = decide(&scene.o, &scene.memory);
        let Some(Record::Leadership(l)) = d.open.as_ref().and_then(|o| o.change.puts.first())
        else {
            panic!("{d:?}");
        };
        assert!(
            l.cause.starts_with("a gave up: a write in /d"),
            "{}",
            l.cause
        );
    }
}

#[test]
fn crashes_on_the_leader() {
    let silent = |ms| {
        Scene::leader()
            .with(|o| {
                o.server = ServerView::Silent {
                    maybe_primary: true,
                }
            })
            .after(ms)
    };
    check("a crash is recovered from", silent(1900), "hold 1 : silent");
    check("not for ever", silent(2100), "kill : gives_up");
    let looping = Scene::leader().with(|o| o.host.crashes = 3);
    check(
        "again and again",
        looping,
        "hold 1, write request : unfit leading hands_over",
    );
}

#[test]
fn nobody_is_promoted_without_a_fence() {
    let elected = || {
        let mut s = Scene::election("b")
            .leadership(|l| {
                l.leader = Some(member("b"));
                l.previous = None;
                l.sync = set(1, &["a", "c"]);
                l.timeline = TimelineId(2);
            })
            .lease(2);
        s.o.host.no_fence = Some("the fence is away".into());
        s
    };
    check("elected", elected(), "hold 2 : unfit no_fence");
    check(
        "another tries after a ttl",
        elected().after(2100),
        "release 2, elect-after 2 : unfit no_fence",
    );
    let down = unfit(Scene::leader(), &["b", "c"]).with(|o| {
        o.server = ServerView::Down;
        o.host.no_fence = Some("the fence is away".into());
    });
    check(
        "nor started in place",
        down,
        "hold 1 : unfit restarting no_fence",
    );
}

#[test]
fn elections_prefer_members_that_are_fit() {
    let sealed = |mib| {
        Scene::election("a")
            .with(room(mib))
            .sealed(&[("a", 1, 1000)])
    };
    check(
        "the former leader's seal is proof enough",
        sealed(300),
        "write leadership+timelines+history : election won",
    );
    check(
        "an unfit one waits for the others",
        sealed(100),
        " : unfit election collecting",
    );
    check(
        "not for ever",
        sealed(100).after(2100),
        "write leadership+timelines+history : unfit election won",
    );
    check(
        "and yields",
        sealed(100).sealed(&[("b", 1, 1000)]),
        " : unfit election yields",
    );
}

#[test]
fn a_lost_slot_is_no_reason_to_wait() {
    let lost = |ms, in_v: &[&str]| {
        Scene::standby()
            .leadership(|l| l.sync = set(1, in_v))
            .server(|s| s.streaming = false)
            .with(|o| {
                let status = &mut o.peers.get_mut(&id("a")).unwrap().status;
                status.lost_slots.insert(id("b").slot_name());
            })
            .after(ms)
    };
    check("at first", lost(900, &["c"]), " : not_streaming");
    check(
        "cloned soon",
        lost(1000, &["c"]),
        "Rewind a 1 : not_streaming slot_lost",
    );
    check(
        "acknowledged commits may be here alone",
        lost(3900, &["b", "c"]),
        " : not_streaming slot_lost",
    );
    check(
        "in strict it stays in V",
        lost(4000, &["b", "c"]),
        "Rewind a 1 : not_streaming slot_lost",
    );
}

#[test]
fn libraries_that_differ_from_the_leaders_are_told() {
    let icu = |version: &str| [("icu".to_owned(), version.to_owned())].into();
    let scene = |here: &str, there: &str| {
        Scene::standby().with(|o| {
            o.libraries = icu(here);
            o.peers.get_mut(&id("a")).unwrap().status.libraries = icu(there);
        })
    };
    check("the same", scene("153.112", "153.112"), " : standby");
    check(
        "another",
        scene("153.112", "153.14"),
        " : libraries_differ standby",
    );
    let unknown = scene("153.112", "153.14").with(|o| o.libraries.clear());
    check("not known yet", unknown, " : standby");
}
