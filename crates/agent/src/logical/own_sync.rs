//! From PostgreSQL 17 on a worker of a standby copies the leader's slots by itself. What it takes to have that done in
//! seconds:
//!
//! * The worker gives up on all slots when this server has one of the same name that is not a copy, as a former leader
//!   has (slotsync.c, `synchronize_one_slot`). Such slots are dropped, where possible before it starts.
//! * It sleeps up to 30 s when it found nothing to do, and is not told when there is (`wait_for_slot_activity`). After an
//!   error it may start again after 10 s, but the postmaster looks at that only when something else wakes it. So it is
//!   woken while a copy is missing or behind.
//! * A copy counts once the leader's slot has gone past what this standby still could keep for it
//!   (`update_and_persist_local_synced_slot`), and a consumer moves a slot's `catalog_xmin` and `restart_lsn` only at a
//!   list of running transactions in the WAL, of which there is one every 15 s, and only while something is written. So
//!   the leader writes one while a standby has no copy that counts.

use std::collections::BTreeSet;

use craton_core::MemberId;
use craton_core::observe::{MemberStatus, Observation, PeerView};
use craton_core::slots::{LogicalSlot, OWN_SYNC_FROM, SLOTS_MAX, Told, is_kept};
use craton_core::topology::MemberRole;
use craton_pg::ServerSample;

use super::{QUERY_MAX, major};
use crate::act::{ActError, Actor};
use crate::server::LocalServer;

impl Actor {
    /// Before a former leader starts as a standby: its own slots that the next leader has taken over make way. (Once it
    /// runs the worker gives up at the first of them, and PostgreSQL starts another 10 s later.)
    pub(crate) async fn make_way_for_copies(&self, from: &MemberId) -> Result<(), ActError> {
        if major(&self.server) < OWN_SYNC_FROM {
            return Ok(());
        }
        let presence = self.presence.borrow().clone();
        let told = presence.get(from);
        let told = told.and_then(|p| serde_json::from_str::<MemberStatus>(&p.value).ok());
        let names = told.map(|s| taken_over(&s.logical)).unwrap_or_default();
        let instance = &self.server.instance;
        for slot in instance.discard_own_failover_slots(names).await? {
            tracing::info!(slot, by = %from, "a logical slot that the next leader has taken over makes way for a copy");
        }
        Ok(())
    }
}

/// What a member has of its predecessor's slots: as the leader that it is, or as the standby that it was when it last told.
fn taken_over(told: &Told) -> BTreeSet<String> {
    let leads = told.slots.iter().flatten();
    let leads = leads.filter(|s| s.failover == Some(true));
    leads
        .map(|s| s.name.clone())
        .chain(told.ready.iter().cloned())
        .collect()
}

/// A standby that streams from the leader.
pub(super) async fn follow(
    server: &LocalServer,
    leader: &Told,
    here: &[LogicalSlot],
) -> Result<(), ActError> {
    for slot in in_the_way(leader, here) {
        tracing::info!(
            slot,
            "dropping a former leader's logical slot: this member is to have a copy of the present leader's"
        );
        server.control.drop_slot(slot, QUERY_MAX).await?;
    }
    let Some(process) = server.process() else {
        return Ok(());
    };
    if is_behind(leader, here) && !process.wake_slot_sync() {
        // There is no worker now. A connection makes the postmaster look whether it is time for another.
        server.control.greet(QUERY_MAX).await?;
    }
    Ok(())
}

/// The leader.
pub(super) async fn lead(
    server: &LocalServer,
    o: &Observation,
    sample: &ServerSample,
    here: &[LogicalSlot],
) -> Result<(), ActError> {
    let streams = |p: &&PeerView| {
        p.status.role == MemberRole::Standby && p.status.streaming && is_direct(o, p)
    };
    let standbys = o.peers.values().filter(streams);
    let told: Vec<&Told> = standbys.map(|p| &p.status.logical).collect();
    let consumed: BTreeSet<&str> = sample
        .slots
        .iter()
        .filter(|s| s.active)
        .map(|s| s.name.as_str())
        .collect();
    if lacks_copies(here, &consumed, &told) {
        server.control.log_running_transactions(QUERY_MAX).await?;
    }
    Ok(())
}

/// PostgreSQL copies no slots from a standby.
fn is_direct(o: &Observation, peer: &PeerView) -> bool {
    peer.status.upstream.as_ref().is_none_or(|u| *u == o.me.id)
}

fn survives(slot: &LogicalSlot) -> bool {
    slot.failover == Some(true) && is_kept(&slot.name)
}

/// A slot with `failover` is made on a leader only: on a standby it is a copy, or a former leader's own.
fn in_the_way<'a>(leader: &Told, here: &'a [LogicalSlot]) -> Vec<&'a str> {
    let Some(there) = &leader.slots else {
        return Vec::new();
    };
    let copied: BTreeSet<&str> = there
        .iter()
        .filter(|s| s.failover == Some(true))
        .map(|s| s.name.as_str())
        .collect();
    // What the leader does not have any more would keep WAL here for ever.
    let all_told = there.len() < SLOTS_MAX;
    let known: BTreeSet<&str> = there.iter().map(|s| s.name.as_str()).collect();
    here.iter()
        .filter(|s| s.synced == Some(false))
        .filter(|s| {
            let name = s.name.as_str();
            let gone = s.failover == Some(true) && all_told && !known.contains(name);
            copied.contains(name) || gone
        })
        .map(|s| s.name.as_str())
        .collect()
}

/// A copy is missing here, or its consumer has gone on.
fn is_behind(leader: &Told, here: &[LogicalSlot]) -> bool {
    let there = leader.slots.iter().flatten();
    there.filter(|s| survives(s)).any(|slot| {
        let copy = here.iter().find(|s| s.name == slot.name);
        !copy.is_some_and(|c| c.synced == Some(true) && c.confirmed >= slot.confirmed)
    })
}

/// A standby has no copy that counts of a slot that somebody consumes now: without a consumer it does not move.
fn lacks_copies(here: &[LogicalSlot], consumed: &BTreeSet<&str>, standbys: &[&Told]) -> bool {
    here.iter()
        .filter(|s| survives(s))
        .filter(|s| consumed.contains(s.name.as_str()))
        .any(|s| standbys.iter().any(|told| !told.ready.contains(&s.name)))
}

#[cfg(test)]
mod tests {
    use craton_core::Lsn;

    use super::*;

    fn slot(name: &str, failover: bool, synced: bool) -> LogicalSlot {
        LogicalSlot {
            name: name.into(),
            confirmed: Lsn(7),
            failover: Some(failover),
            synced: Some(synced),
            ..LogicalSlot::default()
        }
    }

    fn told(slots: Vec<LogicalSlot>) -> Told {
        Told {
            slots: Some(slots),
            ..Told::default()
        }
    }

    #[test]
    fn a_former_leaders_slots_make_way_for_the_servers_own_copies() {
        let leader = told(vec![
            slot("a", true, true),
            slot("b", true, true),
            slot("c", false, false),
        ]);
        let here = [
            slot("a", true, false),
            slot("b", true, true),
            slot("c", false, false),
            slot("mine", false, false),
            slot("gone", true, false),
            slot("going", true, true),
        ];
        assert_eq!(in_the_way(&leader, &here), ["a", "gone"]);
        // Before the leader has told of its slots, and where it may have more than it tells.
        assert!(in_the_way(&Told::default(), &here).is_empty());
        let many = (0..SLOTS_MAX).map(|n| slot(&format!("s{n}"), true, true));
        assert!(in_the_way(&told(many.collect()), &here).is_empty());
    }

    #[test]
    fn a_next_leaders_word_from_before_its_promotion_counts() {
        let standby = Told {
            ready: ["a".to_owned()].into(),
            ..Told::default()
        };
        assert_eq!(taken_over(&standby), ["a".to_owned()].into());
        let leader = told(vec![slot("a", true, true), slot("c", false, false)]);
        assert_eq!(taken_over(&leader), ["a".to_owned()].into());
    }

    #[test]
    fn the_worker_is_woken_while_a_copy_is_missing_or_behind() {
        let leader = told(vec![
            slot("a", true, false),
            slot("c", false, false),
            slot("pg_1_sync_2_3", true, false),
        ]);
        let copy = slot("a", true, true);
        assert!(is_behind(&leader, &[]));
        assert!(is_behind(&leader, &[slot("a", true, false)]));
        assert!(!is_behind(&leader, std::slice::from_ref(&copy)));
        let behind = LogicalSlot {
            confirmed: Lsn(6),
            ..copy
        };
        assert!(is_behind(&leader, &[behind]));
        assert!(!is_behind(&Told::default(), &[]));
    }

    #[test]
    fn the_leader_helps_while_a_consumed_slot_has_no_copy_somewhere() {
        let here = [slot("a", true, false), slot("c", false, false)];
        let consumed: BTreeSet<&str> = ["a", "c"].into();
        let ready = Told {
            ready: ["a".to_owned()].into(),
            ..Told::default()
        };
        let not = Told::default();
        assert!(lacks_copies(&here, &consumed, &[&ready, &not]));
        assert!(!lacks_copies(&here, &consumed, &[&ready]));
        assert!(!lacks_copies(&here, &consumed, &[]));
        assert!(!lacks_copies(&here, &BTreeSet::new(), &[&not]));
    }
}
