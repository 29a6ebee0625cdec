//! What the operator asked the leader for: checked, prepared, handed over, or refused with the reason.

use std::time::Duration;

use super::leader::can_hand_over;
use super::{Mind, StopHow, Task, standby};
use crate::observe::Server;
use crate::records::{Change, ClusterView, Key, Leadership, Record, Request, RequestPhase};
use crate::types::MemberId;

/// Works on what the operator asked for.
pub(super) fn request_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, s: &Server) {
    let Some(request) = view.request.as_ref().map(|r| &r.value) else {
        mind.out.memory.holding = None;
        return;
    };
    if request.term != l.term {
        return refuse(mind, view, l, request, "it was asked in another term");
    }
    if let Some(why) = obstacle(mind, view, l, s, request) {
        return refuse(mind, view, l, request, &why);
    }
    mind.because(
        "switching",
        format!(
            "a {:?} asked by {} is in progress",
            request.kind, request.by
        )
        .to_lowercase(),
    );
    match request.phase {
        RequestPhase::Asked if mind.out.memory.checkpointed != Some(request.id) => {
            if mind.o.task.is_none() {
                mind.out.memory.checkpointed = Some(request.id);
            }
            mind.start(Task::Checkpoint);
        }
        RequestPhase::Asked if mind.o.task.is_none() => {
            let next = Request {
                phase: RequestPhase::Hold,
                ..request.clone()
            };
            mind.submit(Change {
                expect: vec![
                    (Key::Request, view.revision_of(&Key::Request)),
                    (Key::Leadership, view.revision_of(&Key::Leadership)),
                ],
                puts: vec![Record::Request(next)],
                deletes: vec![],
            });
        }
        RequestPhase::Asked => {}
        RequestPhase::Hold => hold_rule(mind, s, request),
    }
}

/// Proxies hold; PostgreSQL stops cleanly when the running transactions are done, or the time is up.
fn hold_rule(mind: &mut Mind<'_>, s: &Server, request: &Request) {
    let now = mind.o.now;
    let since = match mind.out.memory.holding {
        Some((id, at)) if id == request.id => at,
        _ => {
            mind.out.memory.holding = Some((request.id, now));
            now
        }
    };
    let limit = Duration::from_millis(mind.settings.switchover_wait_ms);
    // The first count may be older than the hold.
    let idle = s.active_transactions == Some(0) && now.since(since) >= HOLD_MIN;
    if idle || now.since(since) >= limit {
        standby::stop(mind, StopHow::Fast, "switchover");
    } else {
        mind.because("holding", "waiting for running transactions to end");
    }
}

/// Proxies need a moment to hear of the hold.
const HOLD_MIN: Duration = Duration::from_millis(30);

/// Why a request cannot be done; checked before PostgreSQL is touched.
fn obstacle(
    mind: &Mind<'_>,
    view: &ClusterView,
    l: &Leadership,
    s: &Server,
    request: &Request,
) -> Option<String> {
    let streams = |m: &MemberId| s.standbys.iter().any(|b| b.member == *m && b.streaming);
    if let Some(to) = &request.to {
        if *to == mind.o.me.id {
            return Some(format!("{to} leads already"));
        }
        let Some(record) = view.members.get(to) else {
            return Some(format!("there is no member {to}"));
        };
        if record.value.priority == 0 {
            return Some(format!("{to} has priority 0: it never leads"));
        }
        if !streams(to) {
            return Some(format!("{to} does not stream from {}", mind.o.me.id));
        }
    }
    if request.phase == RequestPhase::Asked && !can_hand_over(mind, view, l) {
        return Some(format!(
            "too few standbys are there to elect a new leader safely (sync set: {}); see craton status",
            l.sync
        ));
    }
    None
}

fn refuse(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, request: &Request, why: &str) {
    let text = format!("request {} of {} refused: {why}", request.id, request.by);
    mind.because("refused", text.clone());
    let history = mind.event(view, l.term, "refused", text);
    mind.submit(Change {
        expect: vec![(Key::Request, view.revision_of(&Key::Request))],
        puts: vec![history],
        deletes: vec![Key::Request],
    });
}
