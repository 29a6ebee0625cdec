//! When a standby restarts for copies of logical slots.

use super::leading::event;
use super::*;

fn missing(names: &[&str]) -> crate::slots::Told {
    crate::slots::Told {
        missing: names.iter().map(|n| (*n).to_owned()).collect(),
        ..crate::slots::Told::default()
    }
}

/// `b`, streaming, without copies.
fn without() -> Scene {
    Scene::standby().with(|o| o.logical = missing(&["dbz"]))
}

#[test]
fn a_standby_restarts_for_slots_once_no_more_come() {
    check("just made", without(), " : standby slots_missing");
    check(
        "for a while",
        without().after(3050),
        "TakeSlots : standby taking_slots",
    );
    let mut had = without().after(3050);
    had.o.logical = missing(&[]);
    had = had.after(100);
    had.o.logical = missing(&["dbz"]);
    check("another", had, " : standby slots_missing");
}

/// A client's first write must come behind what a consumer may have confirmed of the former leader's WAL.
#[test]
fn a_leader_with_slots_opens_when_its_promotion_is_done() {
    let promoting = |slots: usize| {
        Scene::leader().leadership(|l| l.open = false).with(|o| {
            o.logical.slots = Some(vec![crate::slots::LogicalSlot::default(); slots]);
            o.task = Some(TaskView {
                task: Task::Promote {
                    term: Term(1),
                    timeline: TimelineId(1),
                    sync: set(1, &["b", "c"]),
                },
                since: START,
            });
        })
    };
    let mut elected = promoting(0);
    elected.view().history = event("elected", 1);
    check(
        "nobody decodes",
        elected,
        "hold 1, write leadership+history : leading",
    );
    let mut elected = promoting(1);
    elected.view().history = event("elected", 1);
    check("one decodes", elected, "hold 1 : leading leaving_room");
}

#[test]
fn one_standby_after_the_other() {
    let c = |lacks: bool| {
        let mut s = Scene::cluster("c").leads("a", 1);
        s.o.server = ServerView::Running(Server {
            upstream: Some((id("a"), Term(1))),
            streaming: true,
            ..running(true)
        });
        s.o.me.floor = Term(1);
        s.o.logical = missing(&["dbz"]);
        if lacks {
            s.o.peers.get_mut(&id("b")).unwrap().status.logical = missing(&["dbz"]);
        }
        s
    };
    check("b first", c(true).after(3050), " : standby slots_missing");
    check(
        "b does not get on",
        c(true).after(13_050),
        "TakeSlots : standby taking_slots",
    );
    check(
        "b has them",
        c(false).after(3050),
        "TakeSlots : standby taking_slots",
    );
}

#[test]
fn not_while_something_else_goes_on() {
    check(
        "not streaming",
        without()
            .after(3050)
            .leadership(|l| l.open = false)
            .server(|s| s.streaming = false),
        " : standby slots_missing",
    );
    check(
        "a switchover",
        without().after(3050).asked(None, RequestPhase::Asked),
        " : standby slots_missing",
    );
    check(
        "behind another standby nothing holds vacuum back",
        without().after(3050).with(|o| {
            o.me.upstream = Some(id("c"));
            let c = &mut o.peers.get_mut(&id("c")).unwrap().status;
            c.upstream = Some(id("a"));
            if let ServerView::Running(s) = &mut o.server {
                s.upstream = Some((id("c"), Term(1)));
            }
        }),
        " : standby slots_missing",
    );
}
