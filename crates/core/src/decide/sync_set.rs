//! The leader keeps the sync set: one step of 3.2 at a time, towards the standbys that are there.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Mind, PROOF_SEEN_MAX, Task, TaskKind};
use crate::observe::Server;
use crate::promise::PromiseNeed;
use crate::records::{Change, ClusterView, Key, Leadership, OrderKind, Record};
use crate::settings::Durability;
use crate::sync::mode::{self, Modes};
use crate::sync::{SyncInput, SyncSet, SyncStep};
use crate::types::{Incarnation, Lsn, MemberId};

/// One step of 3.2 towards the mode that is wished and the standbys that are there.
pub(super) fn sync_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, s: &Server) {
    if l.durability == Durability::Strict {
        say_if_writes_wait(mind, l, s);
    }
    if mind.o.promises.living_since.is_some() {
        // A change whose outcome is unknown would have to be covered by promises too.
        return mind.because(
            "on_promises",
            "the coordinator is away and standbys promise not to elect anybody: the sync set stays as it is",
        );
    }
    let wanted = wanted_members(mind, view, l, s);
    // What was seen in force is not to be relied on while PostgreSQL is told something else.
    let told = mind
        .o
        .task
        .as_ref()
        .is_some_and(|t| t.task.kind() == TaskKind::SetSync)
        || matches!(mind.out.task, Some(Task::SetSync(_)));
    if !s.sync_in_force || told {
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
    let modes = Modes {
        in_force: l.durability,
        wish: mind.settings.durability,
    };
    let (step, durability) = mode::next_step(
        modes,
        &SyncInput {
            coordinator: &l.sync,
            postgres: &s.sync_configured,
            wanted: &wanted,
            wanted_k: mind.settings.sync_standbys,
            barrier,
            standbys: &s.standbys,
        },
    );
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
            write_sync(mind, view, l, set, durability);
        }
        SyncStep::Done | SyncStep::SetCoordinator(_) => {}
    }
}

/// Tells the coordinator the new sync set, and with it the mode.
fn write_sync(
    mind: &mut Mind<'_>,
    view: &ClusterView,
    l: &Leadership,
    sync: SyncSet,
    durability: Durability,
) {
    let (kind, text) = if durability == l.durability {
        ("sync_set", format!("sync set: {sync}"))
    } else {
        (
            "durability",
            format!(
                "durability {} becomes {durability}; sync set: {sync}",
                l.durability
            ),
        )
    };
    mind.because("sync_change", text.clone());
    let history = mind.event(view, l.term, kind, text);
    propose(mind, view, &sync, durability);
    mind.submit(Change {
        expect: vec![(Key::Leadership, view.revision_of(&Key::Leadership))],
        puts: vec![
            Record::Leadership(Leadership {
                sync,
                durability,
                ..l.clone()
            }),
            history,
        ],
        deletes: vec![],
    });
}

/// `strict` with too few standbys: the operator sees why writes wait.
fn say_if_writes_wait(mind: &mut Mind<'_>, l: &Leadership, s: &Server) {
    let k = mind.settings.sync_standbys;
    let there = s
        .standbys
        .iter()
        .filter(|b| b.streaming && l.sync.holds(&b.member, b.incarnation))
        .count();
    if there < k as usize {
        let text = format!(
            "durability strict: writes wait until {k} standbys of the sync set stream (now {there}); start them, or set durability to quorum"
        );
        mind.because("writes_wait", text);
    }
}

/// What PostgreSQL is to wait for from its first write on, with this record in the coordinator.
pub(super) fn names_of(mind: &Mind<'_>, l: &Leadership) -> SyncSet {
    names_in(mind, &l.sync, l.durability)
}

fn names_in(mind: &Mind<'_>, set: &SyncSet, durability: Durability) -> SyncSet {
    mode::names(set, durability, mind.settings.sync_standbys)
}

/// Every sync set that the coordinator may hold, with its mode; none if an earlier life of this agent may have
/// proposed anything.
pub(super) fn promise_needs(
    mind: &Mind<'_>,
    view: &ClusterView,
    l: &Leadership,
) -> Vec<PromiseNeed> {
    let revision = view.revision_of(&Key::Leadership);
    let memory = &mind.out.memory;
    if memory.first_revision == Some(revision) {
        return vec![];
    }
    let proposed = memory.proposed.as_ref().filter(|(on, _)| *on == revision);
    let mut needs = vec![PromiseNeed::of(&l.sync, l.durability)];
    for (set, durability) in proposed.into_iter().flat_map(|(_, sets)| sets) {
        needs.push(PromiseNeed::of(set, *durability));
    }
    needs.dedup();
    needs
}

/// A leader whose agent restarted does not know what its earlier life proposed, and no promise counts until that
/// is settled: it is settled while the coordinator is there.
pub(super) fn settle_early(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership) {
    let revision = view.revision_of(&Key::Leadership);
    if mind.out.memory.first_revision == Some(revision) && !opening(mind) {
        mind.because(
            "settling",
            "what this agent's earlier life proposed is settled, so that standby promises count",
        );
        settle(mind, l, revision);
    }
}

/// Writes the leadership anew, unchanged: every change under way expects the old revision.
fn settle(mind: &mut Mind<'_>, l: &Leadership, revision: u64) {
    mind.submit(Change {
        expect: vec![(Key::Leadership, revision)],
        puts: vec![Record::Leadership(l.clone())],
        deletes: vec![],
    });
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
    let names = names_of(mind, l);
    let known = !s.sync_configured.is_closed() && s.sync_configured.covers(&names);
    let set = if known {
        s.sync_configured.clone()
    } else {
        names
    };
    if !is_settled_for(mind, view, l, &set) {
        return;
    }
    mind.start(Task::SetSync(set));
}

/// More proposals without an answer than this are not told apart.
const PROPOSED_MAX: usize = 16;

/// Remembers what is proposed to the coordinator: it may be written at any time from now on.
fn propose(mind: &mut Mind<'_>, view: &ClusterView, set: &SyncSet, durability: Durability) {
    let revision = view.revision_of(&Key::Leadership);
    let proposed = mind.out.memory.proposed.take_if(|(on, _)| *on == revision);
    let mut sets = proposed.map(|(_, sets)| sets).unwrap_or_default();
    let new = (set.clone(), durability);
    if !sets.contains(&new) {
        sets.push(new);
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
    // A mode alone may ask for more: `strict` does with an empty set.
    let proposed = memory.proposed.as_ref().filter(|(on, _)| *on == revision);
    let uncovered = proposed
        .into_iter()
        .flat_map(|(_, sets)| sets)
        .any(|(s, durability)| !set.covers(&names_in(mind, s, *durability)));
    if !earlier_life && !uncovered {
        return true;
    }
    mind.because(
        "sync_unsettled",
        "an earlier change of the sync set may still be under way: settling that first",
    );
    if !opening(mind) {
        settle(mind, l, revision);
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

/// Members of V stay while they are healthy or within their grace; others enter when they have caught up. In
/// `async` V lists who streams and is near enough to follow.
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
    let listing =
        l.durability == Durability::Async && mind.settings.durability == Durability::Async;
    let strict = [l.durability, mind.settings.durability].contains(&Durability::Strict);
    let mut wanted = BTreeMap::new();
    // A receiver can neither follow nor promise, so in `async` it has no place in V.
    let waits = mind.settings.durability != Durability::Async;
    let stays = |m: &MemberId| {
        let receiver = view.receivers.get(m).filter(|_| waits);
        view.members.get(m).is_some_and(|r| !r.value.leaving)
            || receiver.is_some_and(|r| !r.value.leaving)
    };
    let is_former = |m: &MemberId, i: Incarnation| {
        view.receivers
            .get(m)
            .is_some_and(|r| r.value.incarnation != i)
    };
    for b in s
        .standbys
        .iter()
        .filter(|b| b.streaming && stays(&b.member) && !is_former(&b.member, b.incarnation))
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
        // In `async` it costs no commit to list one that is slow: who is near enough may follow.
        let near = b.flush_lsn > Lsn::ZERO
            && s.end.bytes_since(b.flush_lsn) <= mind.settings.max_lag_bytes;
        let counts = now.since(seen) < grace && (in_v || caught_up);
        if (counts || (listing && near)) && !leaves(view, l, strict, &b.member, b.incarnation) {
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
        if !connected && recently && stays(member) && !leaves(view, l, strict, member, *incarnation)
        {
            wanted.entry(member.clone()).or_insert(*incarnation);
        }
    }
    wanted
}

/// An order will take this member away: it leaves V before, so that no commit waits for it, and (a data
/// directory that is thrown away) so that it is not needed. For a restart only where enough of V is left; in `strict`,
/// where V never gets smaller than k, so it is with every order, and they take their turns. What is not in V and is to be
/// thrown away never gets into it: it may be gone already.
fn leaves(
    view: &ClusterView,
    l: &Leadership,
    strict: bool,
    member: &MemberId,
    incarnation: Incarnation,
) -> bool {
    let order = |m: &MemberId| view.orders.get(m).map(|o| (o.value.kind, o.value.id));
    let needed = l.sync.k as usize;
    match order(member) {
        None => false,
        Some((OrderKind::Reinit, id)) if strict && l.sync.holds(member, incarnation) => {
            let goes_first = |m: &&MemberId| matches!(order(m), Some((OrderKind::Reinit, other)) if (other, *m) <= (id, member));
            let gone = l.sync.members.keys().filter(goes_first).count();
            l.sync.members.len() >= needed.saturating_add(gone)
        }
        Some((OrderKind::Reinit, _)) => true,
        Some((OrderKind::Restart, _)) => {
            let left = l.sync.members.keys().filter(|m| order(m).is_none());
            left.count() >= needed.max(1)
        }
    }
}
