//! An order to this member: restart PostgreSQL, or throw the data directory away.

use std::time::Duration;

use super::request::hold_rule;
use super::{Mind, StopHow, Task, standby};
use crate::observe::ServerView;
use crate::records::{Change, ClusterView, Key, Leadership, Order, OrderKind};

/// Works on the order to this member, if there is one. True if nothing else is to be decided now.
pub(super) fn order_rule(
    mind: &mut Mind<'_>,
    view: &ClusterView,
    l: &Leadership,
    fenced: bool,
) -> bool {
    let Some(order) = view.orders.get(&mind.o.me.id).map(|o| &o.value) else {
        mind.out.memory.order_since = None;
        return false;
    };
    if fenced {
        return false;
    }
    let now = mind.o.now;
    if mind
        .out
        .memory
        .order_since
        .is_none_or(|(id, _)| id != order.id)
    {
        mind.out.memory.order_since = Some((order.id, now));
    }
    match order.kind {
        OrderKind::Restart => restart_rule(mind, view, l, order),
        OrderKind::Reinit => reinit_rule(mind, view, l, order),
    }
}

/// Stops the life of PostgreSQL that the order names; the rules of every day start the next one, in the role that
/// this member has.
fn restart_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, order: &Order) -> bool {
    let ended = match (&mind.o.server, mind.o.process) {
        (ServerView::Down, _) | (_, None) => {
            mind.because(
                "restarting_on_order",
                format!("{} asked for a restart", order.by),
            );
            return false;
        }
        (_, process) => process != order.process,
    };
    if ended {
        done(
            mind,
            view,
            l,
            "restarted",
            format!(
                "{} restarted PostgreSQL, asked by {}",
                mind.o.me.id, order.by
            ),
        );
        return false;
    }
    let leads = l.leader.is_some() && l.leader == mind.o.me.reference();
    match &mind.o.server {
        // The leader in place: see `in_place_rule`, which comes after its duties.
        ServerView::Running(s) if leads && !s.in_recovery => false,
        _ if l.leader.is_none() || leads => {
            mind.because(
                "order_waits",
                "the restart waits for the end of the election",
            );
            false
        }
        _ => {
            let in_v = mind
                .o
                .me
                .reference()
                .is_some_and(|me| l.sync.holds(&me.member, me.incarnation));
            if in_v && waited(mind) < patience(mind) {
                mind.because(
                    "order_waits",
                    "waiting to be taken out of the sync set before the restart",
                );
                return false;
            }
            mind.because(
                "restarting_on_order",
                format!("{} asked for a restart", order.by),
            );
            standby::stop(mind, StopHow::Fast, "restart");
            true
        }
    }
}

/// The leader restarts in place: proxies hold, running transactions end, and the same term goes on.
pub(super) fn in_place_rule(mind: &mut Mind<'_>, view: &ClusterView, s: &crate::observe::Server) {
    let order = view.orders.get(&mind.o.me.id).map(|o| &o.value);
    let Some(order) = order.filter(|o| {
        o.kind == OrderKind::Restart && o.process.is_some() && o.process == mind.o.process
    }) else {
        return;
    };
    // One hold at a time: two would start each other's time anew for ever, with all clients held.
    if view.request.is_some() {
        return mind.because(
            "order_waits",
            "the restart waits for the end of the change of leadership",
        );
    }
    mind.because(
        "switching",
        format!("a restart in place asked by {} is in progress", order.by),
    );
    hold_rule(mind, s, order.id, "restart in place");
}

/// The order to throw away data that do not belong to the cluster: no election needs them.
pub(super) fn reinit_of_stranger(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership) {
    let order = view.orders.get(&mind.o.me.id).map(|o| &o.value);
    let Some(order) = order.filter(|o| o.kind == OrderKind::Reinit) else {
        return;
    };
    if order.incarnation != mind.o.me.incarnation {
        // It was given before this agent had said what is here now.
        let text = format!(
            "reinit of {}, asked by {}, refused: it speaks of another life of the data directory than what is here; ask again",
            mind.o.me.id, order.by
        );
        return done(mind, view, l, "refused", text);
    }
    if l.leader.is_none() || !l.open || l.leader == mind.o.me.reference() {
        return mind.because(
            "order_waits",
            "the data directory is kept until a leader is open to clone from",
        );
    }
    mind.because(
        "reinit",
        format!("throwing the data directory away, asked by {}", order.by),
    );
    mind.start(Task::Reinit {
        incarnation: order.incarnation,
        term: l.term,
    });
}

/// Throws the data directory away, once no promise to a client rests on it.
fn reinit_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, order: &Order) -> bool {
    // A data directory that Craton did not make has no life that could be named.
    if order.incarnation.is_none() && mind.o.me.incarnation.is_none() {
        let text = format!(
            "reinit of {}, asked by {}, refused: it does not say which life of the data directory is meant",
            mind.o.me.id, order.by
        );
        done(mind, view, l, "refused", text);
        return false;
    }
    if mind.o.me.incarnation != order.incarnation {
        done(
            mind,
            view,
            l,
            "reinit",
            format!(
                "{} begins a new life of its data directory, asked by {}",
                mind.o.me.id, order.by
            ),
        );
        return false;
    }
    if l.leader.is_some() && l.leader == mind.o.me.reference() {
        done(
            mind,
            view,
            l,
            "refused",
            format!(
                "reinit of {}, asked by {}, refused: it leads by now",
                mind.o.me.id, order.by
            ),
        );
        return false;
    }
    if l.leader.is_none() || !l.open {
        mind.because(
            "order_waits",
            "the data directory is kept until a leader is open: an election may need it",
        );
        return false;
    }
    let needed = mind
        .o
        .me
        .reference()
        .is_some_and(|me| l.sync.holds(&me.member, me.incarnation));
    if needed {
        mind.because("order_waits", "waiting to be taken out of the sync set: until then acknowledged commits may rest on this copy");
        return false;
    }
    mind.because(
        "reinit",
        format!("throwing the data directory away, asked by {}", order.by),
    );
    mind.start(Task::Reinit {
        incarnation: order.incarnation,
        term: l.term,
    });
    true
}

fn waited(mind: &Mind<'_>) -> Duration {
    let since = mind.out.memory.order_since;
    since.map_or(Duration::ZERO, |(_, at)| mind.o.now.since(at))
}

/// A leader that does not take this member out of V for so long will not: then commits wait for a moment.
pub(super) fn patience(mind: &Mind<'_>) -> Duration {
    Duration::from_millis(mind.settings.standby_grace_ms.saturating_mul(2))
}

fn done(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, kind: &str, text: String) {
    let key = Key::Order(mind.o.me.id.clone());
    let history = mind.event(view, l.term, kind, text);
    mind.submit(Change {
        expect: vec![(key.clone(), view.revision_of(&key))],
        puts: vec![history],
        deletes: vec![key],
    });
}
