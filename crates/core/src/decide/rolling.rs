//! A rolling restart: the leader works through the plan, one member at a time.
//!
//! All that is remembered is in the coordinator: whom to restart, each with the life of its PostgreSQL that is to
//! end. So a plan goes on under the next leader, and whoever asked for it may go away.

use std::time::Duration;

use super::Mind;
use super::leader::can_hand_over;
use super::order::in_place_rule;
use crate::observe::{PendingChange, Server};
use crate::records::{
    Change, ClusterView, Key, Leadership, Order, OrderKind, Record, Request, RequestKind,
    RequestPhase, RestartPlan,
};
use crate::settings::{Durability, STANDBY_AT_LEAST};
use crate::types::{Lsn, MemberId};

/// A member that is not of use again after this long ends the plan: the rest is left as it is.
const STEP_MAX: Duration = Duration::from_secs(180);
/// Standbys that have just restarted are given so long to say that they could take over, before the leader
/// restarts in place.
const HAND_OVER_WAIT: Duration = Duration::from_secs(3);
/// A standby that is nearer to the leader than this is of use again. Bytes.
const CAUGHT_UP_BYTES: u64 = 1 << 20;

/// Works on the plan, and on a restart of this very leader in place.
pub(super) fn rolling_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, s: &Server) {
    in_place_rule(mind, view, s);
    let Some(plan) = view.restart.as_ref().map(|r| &r.value) else {
        mind.out.memory.restart_step = None;
        return;
    };
    let left: Vec<MemberId> = plan
        .members
        .iter()
        .filter(|(m, life)| !is_done(mind, view, l, s, m, **life))
        .map(|(m, _)| m.clone())
        .collect();
    if left.is_empty() {
        let names: Vec<&str> = plan.members.keys().map(MemberId::as_str).collect();
        let text = format!(
            "restart {} asked by {} is done: {}",
            plan.id,
            plan.by,
            names.join(", ")
        );
        return end(mind, view, l, plan, "restart_done", text);
    }
    let now = mind.o.now;
    let (since, end_then) = match mind.out.memory.restart_step {
        Some((id, n, at, end)) if id == plan.id && n == left.len() => (at, end),
        _ => {
            mind.out.memory.restart_step = Some((plan.id, left.len(), now, s.end));
            (now, s.end)
        }
    };
    if now.since(since) >= STEP_MAX {
        let text = format!(
            "restart {} asked by {} stopped: within {} s none of {} was restarted and of use again; see craton explain of each",
            plan.id,
            plan.by,
            STEP_MAX.as_secs(),
            names(&left)
        );
        return end(mind, view, l, plan, "restart_stopped", text);
    }
    mind.because(
        "rolling_restart",
        format!(
            "rolling restart asked by {}: left are {}",
            plan.by,
            names(&left)
        ),
    );
    let under_way = left.iter().any(|m| {
        view.orders.contains_key(m) || life_of(mind, m) != plan.members.get(m).copied().flatten()
    });
    if !under_way && view.request.is_none() {
        next_step(mind, view, l, plan, &left, (now.since(since), end_then));
    }
}

fn names(members: &[MemberId]) -> String {
    let names: Vec<&str> = members.iter().map(MemberId::as_str).collect();
    names.join(", ")
}

/// The life of a member's PostgreSQL, as last heard of it.
fn life_of(mind: &Mind<'_>, member: &MemberId) -> Option<u64> {
    if *member == mind.o.me.id {
        return mind.o.process;
    }
    mind.o.peers.get(member)?.status.process
}

/// Restarted, and of use again: the leader is open, a standby streams, has caught up, and counts where it can.
fn is_done(
    mind: &Mind<'_>,
    view: &ClusterView,
    l: &Leadership,
    s: &Server,
    member: &MemberId,
    ended: Option<u64>,
) -> bool {
    let life = life_of(mind, member);
    if life.is_none() || life == ended || view.orders.contains_key(member) {
        return false;
    }
    if *member == mind.o.me.id {
        return l.open;
    }
    // One that streams from a standby is not among the leader's, and counts for no commit.
    let elsewhere = mind.o.peers.get(member).is_some_and(|p| {
        let end = p.status.lsn.unwrap_or(Lsn::ZERO);
        p.status.streaming
            && p.status
                .upstream
                .as_ref()
                .is_some_and(|u| *u != mind.o.me.id)
            && end > Lsn::ZERO
            && s.end.bytes_since(end) <= CAUGHT_UP_BYTES
    });
    if elsewhere && mind.is_alive(member) {
        return true;
    }
    let counts = l.durability == Durability::Async || l.sync.members.contains_key(member);
    mind.is_alive(member)
        && counts
        && s.standbys.iter().any(|b| {
            b.member == *member
                && b.streaming
                && b.flush_lsn > Lsn::ZERO
                && s.end.bytes_since(b.flush_lsn) <= CAUGHT_UP_BYTES
        })
}

/// True if a restart lowers what a standby must have at least as much of as its primary.
fn lowers(pending: &[PendingChange]) -> bool {
    let number = |text: &str| text.parse::<u64>().ok();
    pending
        .iter()
        .filter(|p| STANDBY_AT_LEAST.contains(&p.name.as_str()))
        .any(
            |p| match (number(&p.from), p.to.as_deref().and_then(number)) {
                (Some(from), Some(to)) => to < from,
                // Back to a default that is not known here: the careful order.
                _ => true,
            },
        )
}

/// How long a standby that replays slowly is waited for before it is restarted.
const REPLAY_WAIT: Duration = Duration::from_secs(10);

/// Standbys first, then the leader: by a switchover where somebody can take over, else in place. The leader comes
/// first, and in place, where a restart lowers what its standbys must have as much of: they would not start
/// with less than it has.
fn next_step(
    mind: &mut Mind<'_>,
    view: &ClusterView,
    l: &Leadership,
    plan: &RestartPlan,
    left: &[MemberId],
    (waited, end_then): (Duration, Lsn),
) {
    let me = mind.o.me.id.clone();
    let leader_left = left.contains(&me);
    let lowers = leader_left && lowers(&mind.o.pending);
    let standby = left.iter().find(|m| **m != me).filter(|_| !lowers);
    if let Some(standby) = standby {
        if !mind.is_alive(standby) {
            return mind.because(
                "rolling_waits",
                format!("waiting for {standby}, whose agent is silent"),
            );
        }
        // What a leader began with that has just restarted must be known there: a standby that stops before it has
        // replayed that starts with what it knows instead.
        let status = mind.o.peers.get(standby).map(|p| &p.status);
        let replayed = status.and_then(|s| s.replay_lsn);
        if waited < REPLAY_WAIT && replayed.is_some_and(|at| at < end_then) {
            return mind.because(
                "rolling_waits",
                format!("waiting for {standby} to replay up to {end_then}"),
            );
        }
        return order(mind, view, plan, standby.clone());
    }
    if !leader_left {
        return;
    }
    if !lowers && can_hand_over(mind, view, l) {
        mind.because(
            "rolling_handover",
            "the leader comes last: handing over first",
        );
        let request = Request {
            id: plan.id,
            kind: RequestKind::Switchover,
            term: l.term,
            to: None,
            allow_data_loss: false,
            phase: RequestPhase::Asked,
            by: format!("{} (restart)", plan.by),
            why: None,
        };
        return mind.submit(Change {
            expect: vec![
                (Key::Request, 0),
                (Key::Restart, view.revision_of(&Key::Restart)),
                (Key::Leadership, view.revision_of(&Key::Leadership)),
            ],
            puts: vec![Record::Request(request)],
            deletes: vec![],
        });
    }
    if !lowers && waited < HAND_OVER_WAIT && !l.sync.members.is_empty() {
        return mind.because(
            "rolling_waits",
            "waiting for a standby that can take over from the leader",
        );
    }
    order(mind, view, plan, me);
}

/// A leader that was deposed orders nothing: the member may lead by now.
fn order(mind: &mut Mind<'_>, view: &ClusterView, plan: &RestartPlan, member: MemberId) {
    let order = Order {
        id: plan.id,
        kind: OrderKind::Restart,
        process: plan.members.get(&member).copied().flatten(),
        incarnation: None,
        by: plan.by.clone(),
    };
    mind.because("rolling_order", format!("asking {member} to restart"));
    mind.submit(Change {
        expect: vec![
            (Key::Order(member.clone()), 0),
            (Key::Restart, view.revision_of(&Key::Restart)),
            (Key::Leadership, view.revision_of(&Key::Leadership)),
        ],
        puts: vec![Record::Order(member, order)],
        deletes: vec![],
    });
}

/// Takes the plan off the board, with the orders that it gave.
fn end(
    mind: &mut Mind<'_>,
    view: &ClusterView,
    l: &Leadership,
    plan: &RestartPlan,
    kind: &'static str,
    text: String,
) {
    mind.because("rolling_over", text.clone());
    let history = mind.event(view, l.term, kind, text);
    let orders: Vec<Key> = view
        .orders
        .iter()
        .filter(|(_, o)| o.value.id == plan.id && o.value.kind == OrderKind::Restart)
        .map(|(m, _)| Key::Order(m.clone()))
        .collect();
    let mut expect = vec![(Key::Restart, view.revision_of(&Key::Restart))];
    expect.extend(orders.iter().map(|k| (k.clone(), view.revision_of(k))));
    let mut deletes = vec![Key::Restart];
    deletes.extend(orders);
    mind.submit(Change {
        expect,
        puts: vec![history],
        deletes,
    });
}
