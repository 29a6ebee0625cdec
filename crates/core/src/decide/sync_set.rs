//! The leader keeps the sync set: one step of 3.2 at a time, towards the standbys that are there.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Mind, PROOF_SEEN_MAX, Task};
use crate::observe::Server;
use crate::records::{Change, ClusterView, Key, Leadership, OrderKind, Record};
use crate::settings::Durability;
use crate::sync::{SyncInput, SyncSet, SyncStep, next_step};
use crate::types::{Incarnation, Lsn, MemberId};

/// One step of 3.2 towards the sync set that fits the standbys that are there.
pub(super) fn sync_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, s: &Server) {
    let wanted = wanted_members(mind, view, l, s);
    let wanted_k = if l.durability == Durability::Async {
        0
    } else {
        mind.settings.sync_standbys
    };
    let wanted = if wanted_k == 0 {
        BTreeMap::new()
    } else {
        wanted
    };
    if !s.sync_in_force {
        mind.because(
            "sync_pending",
            "waiting for every WAL sender to follow the new sync set",
        );
        return prove_again(mind, view, l, s);
    }
    mind.out.memory.unproven_since = None;
    let barrier = mind
        .out
        .memory
        .barrier
        .as_ref()
        .map_or(Lsn(u64::MAX), |(_, lsn)| *lsn);
    let step = next_step(&SyncInput {
        coordinator: &l.sync,
        postgres: &s.sync_configured,
        wanted: &wanted,
        wanted_k,
        barrier,
        standbys: &s.standbys,
    });
    match step {
        SyncStep::WaitFlushed(set) => mind.because(
            "sync_waiting",
            format!("waiting for {set} to flush before it counts"),
        ),
        SyncStep::SetPostgres(set) => {
            if !is_settled_for(mind, view, l, &set) {
                return;
            }
            mind.because("sync_change", format!("asking PostgreSQL for {set}"));
            mind.start(Task::SetSync(set));
        }
        SyncStep::SetCoordinator(set) if !opening(mind) => {
            let text = format!("sync set: {set}");
            mind.because("sync_change", text.clone());
            let history = mind.event(view, l.term, "sync_set", text);
            propose(mind, view, &set);
            mind.submit(Change {
                expect: vec![(Key::Leadership, view.revision_of(&Key::Leadership))],
                puts: vec![
                    Record::Leadership(Leadership {
                        sync: set,
                        ..l.clone()
                    }),
                    history,
                ],
                deletes: vec![],
            });
        }
        SyncStep::Done | SyncStep::SetCoordinator(_) => {}
    }
}

/// The proof failed, or was lost with the agent that made it: it is made again, for what is configured where
/// that is known to keep the invariant.
fn prove_again(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, s: &Server) {
    if mind.o.task.is_some() {
        mind.out.memory.unproven_since = None;
        return;
    }
    let now = mind.o.now;
    let since = *mind.out.memory.unproven_since.get_or_insert(now);
    if now.since(since) < PROOF_SEEN_MAX {
        return;
    }
    let known =
        s.sync_configured.k <= u32::try_from(s.sync_configured.members.len()).unwrap_or(u32::MAX);
    let set = if known && s.sync_configured.covers(&l.sync) {
        &s.sync_configured
    } else {
        &l.sync
    };
    if !is_settled_for(mind, view, l, set) {
        return;
    }
    mind.start(Task::SetSync(set.clone()));
}

/// More proposals without an answer than this are not told apart.
const PROPOSED_MAX: usize = 16;

/// Remembers what is proposed to the coordinator: it may be written at any time from now on.
fn propose(mind: &mut Mind<'_>, view: &ClusterView, set: &SyncSet) {
    let revision = view.revision_of(&Key::Leadership);
    let proposed = mind.out.memory.proposed.take_if(|(on, _)| *on == revision);
    let mut sets = proposed.map(|(_, sets)| sets).unwrap_or_default();
    if !sets.contains(set) {
        sets.push(set.clone());
    }
    if sets.len() > PROPOSED_MAX {
        // As after a restart: anything may have been proposed.
        mind.out.memory.first_revision = Some(revision);
        sets.clear();
    }
    mind.out.memory.proposed = Some((revision, sets));
}

/// May `set` be put in force in PostgreSQL? Not while a change of the coordinator's sync set is under way that
/// it would not cover: a transaction whose answer was lost may still be done, long after the decision that
/// led to it. Writing the leadership anew, unchanged, settles it: every such transaction expects the old
/// revision.
pub(super) fn is_settled_for(
    mind: &mut Mind<'_>,
    view: &ClusterView,
    l: &Leadership,
    set: &SyncSet,
) -> bool {
    let revision = view.revision_of(&Key::Leadership);
    let memory = &mind.out.memory;
    let earlier_life = memory.first_revision == Some(revision);
    let uncovered = memory
        .proposed
        .as_ref()
        .is_some_and(|(on, sets)| *on == revision && sets.iter().any(|s| !set.covers(s)));
    if !earlier_life && !uncovered {
        return true;
    }
    mind.because(
        "sync_unsettled",
        "an earlier change of the sync set may still be under way: settling that first",
    );
    if !opening(mind) {
        mind.submit(Change {
            expect: vec![(Key::Leadership, revision)],
            puts: vec![Record::Leadership(l.clone())],
            deletes: vec![],
        });
    }
    false
}

/// A change of the leadership is already among this decision's changes.
pub(super) fn opening(mind: &Mind<'_>) -> bool {
    mind.out
        .changes
        .iter()
        .any(|c| c.expect.iter().any(|(k, _)| *k == Key::Leadership))
}

/// A standby that is nearer to the leader than this has caught up, and may enter V.
const CAUGHT_UP_BYTES: u64 = 1 << 20;

/// Members of V stay while they are healthy or within their grace; others enter when they have caught up.
fn wanted_members(
    mind: &mut Mind<'_>,
    view: &ClusterView,
    l: &Leadership,
    s: &Server,
) -> BTreeMap<MemberId, Incarnation> {
    let grace = Duration::from_millis(mind.settings.standby_grace_ms);
    let now = mind.o.now;
    let led_for = mind
        .out
        .memory
        .leading_since
        .map_or(Duration::ZERO, |(_, at)| now.since(at));
    let mut wanted = BTreeMap::new();
    let stays = |m: &MemberId| view.members.get(m).is_some_and(|r| !r.value.leaving);
    for b in s
        .standbys
        .iter()
        .filter(|b| b.streaming && stays(&b.member))
    {
        let (flushed, at) = mind
            .out
            .memory
            .healthy
            .get(&b.member)
            .copied()
            .unwrap_or((Lsn::ZERO, now));
        // Healthy: flushed something new, or had nothing to flush.
        let moves = b.flush_lsn > flushed || b.flush_lsn >= s.end;
        let seen = if moves { now } else { at };
        mind.out
            .memory
            .healthy
            .insert(b.member.clone(), (b.flush_lsn.max(flushed), seen));
        let in_v = l.sync.holds(&b.member, b.incarnation);
        let caught_up =
            b.flush_lsn > Lsn::ZERO && s.end.bytes_since(b.flush_lsn) <= CAUGHT_UP_BYTES;
        if now.since(seen) < grace && (in_v || caught_up) && !leaves(view, l, &b.member) {
            wanted.insert(b.member.clone(), b.incarnation);
        }
    }
    for (member, incarnation) in &l.sync.members {
        let connected = s
            .standbys
            .iter()
            .any(|b| b.member == *member && b.streaming);
        let seen = mind.out.memory.healthy.get(member).map(|(_, at)| *at);
        let recently = seen.map_or(led_for < grace, |at| now.since(at) < grace);
        if !connected && recently && stays(member) && !leaves(view, l, member) {
            wanted.entry(member.clone()).or_insert(*incarnation);
        }
    }
    wanted
}

/// An order will take this member away: it leaves V before, so that no commit waits for it, and (a data
/// directory that is thrown away) so that it is not needed. For a restart only where enough of V is left.
fn leaves(view: &ClusterView, l: &Leadership, member: &MemberId) -> bool {
    let ordered = |m: &MemberId| view.orders.get(m).map(|o| o.value.kind);
    match ordered(member) {
        None => false,
        Some(OrderKind::Reinit) => true,
        Some(OrderKind::Restart) => {
            let left = l.sync.members.keys().filter(|m| ordered(m).is_none());
            left.count() >= l.sync.k.max(1) as usize
        }
    }
}
