//! When a standby restarts to take copies of the leader's logical slots (see [`crate::slots`]).

use std::time::Duration;

use super::{Mind, Task, standby};
use crate::observe::Server;
use crate::records::{ClusterView, Leadership, MemberRef};
use crate::types::MemberId;

/// Slots are seldom made alone: a restart waits until no new one has come for so long.
const SETTLE: Duration = Duration::from_secs(3);
/// One standby after the other, in the order of their names: each later one waits so much longer.
const TURN: Duration = Duration::from_secs(10);

/// A standby that streams from the leader itself, while nothing else is going on.
pub(super) fn take_rule(
    mind: &mut Mind<'_>,
    view: &ClusterView,
    l: &Leadership,
    (leader, source): (&MemberRef, &MemberId),
    s: &Server,
) {
    if mind.o.logical.missing.is_empty() {
        mind.out.memory.slots_missing_since = None;
        return;
    }
    let missing: Vec<&str> = mind.o.logical.missing.iter().map(String::as_str).collect();
    let missing = missing.join(", ");
    // Behind another standby nothing holds the leader's vacuum back for the copies.
    if *source != leader.member {
        let text = format!(
            "no copies of the logical slots {missing}: this member does not stream from the leader itself"
        );
        return mind.because("slots_missing", text);
    }
    let now = mind.o.now;
    let since = *mind.out.memory.slots_missing_since.get_or_insert(now);
    let is_before = |m: &MemberId| {
        let peer = mind.o.peers.get(m);
        *m < mind.o.me.id
            && mind.is_alive(m)
            && peer.is_some_and(|p| !p.status.logical.missing.is_empty())
    };
    let before = view.members.keys().filter(|m| is_before(m)).count();
    let wait = TURN
        .saturating_mul(u32::try_from(before).unwrap_or(u32::MAX))
        .saturating_add(SETTLE);
    let ready = s.streaming && l.open && standby::serves(mind, l, &leader.member);
    let changing = view.request.is_some() || view.restart.is_some() || !view.orders.is_empty();
    if !ready || changing || now.since(since) < wait {
        let text = format!("there is no copy of the logical slots {missing} yet");
        return mind.because("slots_missing", text);
    }
    let text = format!("restarting to take copies of the logical slots {missing}");
    mind.because("taking_slots", text);
    mind.start(Task::TakeSlots {
        from: leader.member.clone(),
        term: l.term,
    });
}
