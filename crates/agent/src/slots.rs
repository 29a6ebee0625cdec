//! One physical replication slot per member, kept on every member and advanced, so that whoever is
//! promoted still has the WAL that the others (and the backup) need.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use craton_coordinator::api::{Coordinator, Membership};
use craton_core::observe::{Observation, ServerView};
use craton_core::{Lsn, MemberId};
use tokio::sync::watch;

use crate::act::Actor;
use crate::agent::Seen;
use crate::logical;
use crate::server::LocalServer;

/// How often slots are looked after.
const INTERVAL: Duration = Duration::from_secs(2);
/// A query of the agent's own.
const QUERY_MAX: Duration = Duration::from_secs(5);
/// The backup daemon's slot.
pub const BACKUP_SLOT: &str = "craton_backup";

/// Runs until the agent ends.
pub async fn keep(
    actor: Arc<Actor>,
    seen: watch::Receiver<Option<Seen>>,
    coordinator: Arc<dyn Coordinator>,
) {
    loop {
        tokio::time::sleep(INTERVAL).await;
        let newest = seen.borrow().clone();
        let members = coordinator.membership().map(Membership::members);
        let removed = members.map(|m| m.removed).unwrap_or_default();
        let Some(seen) = newest else { continue };
        if let Err(error) = once(&actor.server, &seen.0, &removed).await {
            tracing::debug!(%error, "replication slots could not be looked after");
        }
        if let Err(error) = logical::once(&actor, &seen.0).await {
            tracing::debug!(%error, "logical replication slots could not be looked after");
        }
    }
}

/// The slots that a member keeps: one for each other member, and the backup's.
pub fn of_others<'a>(me: &MemberId, members: impl Iterator<Item = &'a MemberId>) -> Vec<String> {
    members
        .filter(|m| *m != me)
        .map(MemberId::slot_name)
        .chain([BACKUP_SLOT.to_owned()])
        .collect()
}

async fn once(
    server: &LocalServer,
    o: &Observation,
    removed: &BTreeSet<MemberId>,
) -> Result<(), craton_pg::PgError> {
    let (Some(view), ServerView::Running(s)) = (&o.view, &o.server) else {
        return Ok(());
    };
    let wanted = of_others(&o.me.id, view.members.keys());
    if s.in_recovery && !s.streaming {
        return Ok(());
    }
    server.control.ensure_slots(&wanted, QUERY_MAX).await?;
    let there = server.sample().map(|s| s.slots).unwrap_or_default();
    let removed = removed.iter().map(MemberId::slot_name);
    for slot in removed.filter(|slot| !wanted.contains(slot)) {
        // It would keep WAL for a member that never comes back, until the disk is full.
        if there.iter().any(|s| s.name == slot && !s.active) {
            tracing::info!(slot, "dropping the slot of a member that was removed");
            server.control.drop_slot(&slot, QUERY_MAX).await?;
        }
    }
    if !s.in_recovery {
        return follow_cascades(server, o).await;
    }
    // On a standby nobody uses the slots: each is moved to where the leader's slot of that name is.
    let Some(sample) = server.sample() else {
        return Ok(());
    };
    let leader = view.leader().and_then(|l| o.peers.get(&l.member));
    for (slot, lsn) in leader.map(|p| &p.status.slots).into_iter().flatten() {
        if *slot != o.me.id.slot_name() && wanted.contains(slot) {
            advance(server, &sample, slot, *lsn).await?;
        }
    }
    Ok(())
}

/// The leader's slot of a member that streams from a standby is used by nobody: it is moved to where that member
/// says it is, and keeps what it needs to come back to the leader.
async fn follow_cascades(server: &LocalServer, o: &Observation) -> Result<(), craton_pg::PgError> {
    let Some(sample) = server.sample() else {
        return Ok(());
    };
    for (member, peer) in &o.peers {
        let elsewhere = peer.status.upstream.as_ref().is_some_and(|u| *u != o.me.id);
        if let Some(lsn) = peer
            .status
            .lsn
            .filter(|_| elsewhere && peer.status.streaming)
        {
            advance(server, &sample, &member.slot_name(), lsn).await?;
        }
    }
    Ok(())
}

async fn advance(
    server: &LocalServer,
    sample: &craton_pg::ServerSample,
    slot: &str,
    lsn: Lsn,
) -> Result<(), craton_pg::PgError> {
    let limit = sample.end_of_wal().min(lsn);
    let known = sample.slots.iter().find(|s| s.name == slot);
    if known.is_some_and(|s| !s.active && s.restart_lsn.is_none_or(|at| at < limit)) {
        server.control.advance_slot(slot, limit, QUERY_MAX).await?;
    }
    Ok(())
}
