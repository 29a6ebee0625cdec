//! What the operator asked the leader for: checked, prepared, handed over, or refused with the reason.

use std::time::Duration;

use super::health::is_urgent;
use super::leader::can_hand_over;
use super::{Mind, StopHow, Task, standby};
use crate::observe::Server;
use crate::records::{
    Change, ClusterView, Key, Leadership, Record, Request, RequestKind, RequestPhase,
};
use crate::types::MemberId;

/// What a new leadership is put down to when a request brings it about.
pub(super) fn cause(request: &Request, leader: &MemberId) -> String {
    match (&request.why, request.kind) {
        (Some(why), _) => format!("{leader} hands over: {why}"),
        (None, RequestKind::Switchover) => format!("switchover asked by {}", request.by),
        (None, RequestKind::Failover) => format!("failover asked by {}", request.by),
    }
}

/// Works on what the operator asked for.
pub(super) fn request_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, s: &Server) {
    let Some(request) = view.request.as_ref().map(|r| &r.value) else {
        if view.orders.is_empty() {
            mind.out.memory.holding = None;
        }
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
        RequestPhase::Asked
            if mind.out.memory.checkpointed != Some(request.id) && !is_urgent(mind) =>
        {
            if mind.o.task.is_none() && mind.out.task.is_none() {
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
        RequestPhase::Hold => hold_rule(mind, s, request.id, "switchover"),
    }
}

/// Proxies hold; PostgreSQL stops cleanly when the running transactions are done, or the time is up.
pub(super) fn hold_rule(mind: &mut Mind<'_>, s: &Server, id: u64, why: &str) {
    let now = mind.o.now;
    let since = match mind.out.memory.holding {
        Some((held, at)) if held == id => at,
        _ => {
            mind.out.memory.holding = Some((id, now));
            now
        }
    };
    let limit = Duration::from_millis(mind.settings.switchover_wait_ms);
    // The first count may be older than the hold.
    let idle = s.active_transactions == Some(0) && now.since(since) >= HOLD_MIN;
    if idle || now.since(since) >= limit || is_urgent(mind) {
        standby::stop(mind, StopHow::Fast, why);
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
    if let Some(why) = unfit(mind, view, s, request.to.as_ref()) {
        return Some(why);
    }
    if request.phase == RequestPhase::Asked && !can_hand_over(mind, view, l) {
        return Some(format!(
            "too few standbys are there to elect a new leader safely (sync set: {}); see craton status",
            l.sync
        ));
    }
    None
}

/// Why the wanted member cannot lead next.
fn unfit(
    mind: &Mind<'_>,
    view: &ClusterView,
    s: &Server,
    wanted: Option<&MemberId>,
) -> Option<String> {
    let to = wanted?;
    if *to == mind.o.me.id {
        return Some(format!("{to} leads already"));
    }
    let Some(record) = view.members.get(to) else {
        return Some(format!("there is no member {to}"));
    };
    if record.value.priority == 0 {
        return Some(format!("{to} has priority 0: it never leads"));
    }
    if !s.standbys.iter().any(|b| b.member == *to && b.streaming) {
        return Some(format!("{to} does not stream from {}", mind.o.me.id));
    }
    None
}

/// A scheduled switchover that cannot begin is tried again for this long.
const SCHEDULE_LATE_MAX: Duration = Duration::from_secs(60);

/// Turns a scheduled switchover into a request when its time has come; drops it, with the reason, when it
/// could not begin in time.
pub(super) fn schedule_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, s: &Server) {
    let Some(schedule) = view.schedule.as_ref().map(|r| &r.value) else {
        return;
    };
    if mind.o.wall_ms < schedule.at_ms {
        return mind.because(
            "scheduled",
            format!("a switchover asked by {} is scheduled", schedule.by),
        );
    }
    let late = Duration::from_millis(mind.o.wall_ms - schedule.at_ms);
    let obstacle = unfit(mind, view, s, schedule.to.as_ref()).or_else(|| {
        if view.request.is_some() {
            Some("another change of leadership is in progress".to_owned())
        } else if view.restart.is_some() {
            Some("a rolling restart is in progress".to_owned())
        } else if !can_hand_over(mind, view, l) {
            Some(format!(
                "too few standbys are there to elect a new leader safely (sync set: {})",
                l.sync
            ))
        } else {
            None
        }
    });
    let key = (Key::Schedule, view.revision_of(&Key::Schedule));
    match obstacle {
        _ if late > SCHEDULE_LATE_MAX => {
            let why = obstacle.unwrap_or_else(|| "nobody led at that time".to_owned());
            let text = format!(
                "the switchover that {} had scheduled did not begin within {} s of its time and is dropped: {why}",
                schedule.by,
                SCHEDULE_LATE_MAX.as_secs()
            );
            mind.because("schedule_dropped", text.clone());
            let history = mind.event(view, l.term, "refused", text);
            mind.submit(Change {
                expect: vec![key],
                puts: vec![history],
                deletes: vec![Key::Schedule],
            });
        }
        Some(why) => mind.because(
            "schedule_waits",
            format!("the scheduled switchover waits: {why}"),
        ),
        None => {
            mind.because(
                "schedule_due",
                "the time of the scheduled switchover has come",
            );
            let request = Request {
                id: schedule.id,
                kind: RequestKind::Switchover,
                term: l.term,
                to: schedule.to.clone(),
                allow_data_loss: false,
                phase: RequestPhase::Asked,
                by: format!("{} (scheduled)", schedule.by),
                why: None,
            };
            mind.submit(Change {
                expect: vec![
                    key,
                    (Key::Request, 0),
                    (Key::Leadership, view.revision_of(&Key::Leadership)),
                ],
                puts: vec![Record::Request(request)],
                deletes: vec![Key::Schedule],
            });
        }
    }
}

/// How the line of the history begins that says why the request with this number was refused.
pub fn refusal_of(request: u64) -> String {
    format!("request {request} of ")
}

fn refuse(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, request: &Request, why: &str) {
    let its = refusal_of(request.id);
    let text = format!("{its}{} refused: {why}", request.by);
    mind.because("refused", text.clone());
    let history = mind.event(view, l.term, "refused", text);
    mind.submit(Change {
        expect: vec![(Key::Request, view.revision_of(&Key::Request))],
        puts: vec![history],
        deletes: vec![Key::Request],
    });
}
