//! Logical replication slots that survive a failover (before PostgreSQL 17, which does it by itself, with some help:
//! [`own_sync`]): what this member tells of them, its copies of the leader's, and what becomes of them at a promotion.
//! The rules are [`craton_core::slots`]'s.

mod own_sync;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use craton_console::server::failure;
use craton_console::views::SlotView;
use craton_core::decide::StopHow;
use craton_core::observe::{MemberStatus, Observation, PeerView, ServerView};
use craton_core::slots::{
    LogicalSlot, Look, Notes, OWN_SYNC_FROM, SLOTS_MAX, Step, Told, first_position, is_kept, look,
};
use craton_core::topology::MemberRole;
use craton_core::{BootTime, Lsn, MemberId, Term};
use craton_pg::{ServerSample, Slot, SlotFile};

use crate::act::{ActError, Actor, Members};
use crate::server::LocalServer;
use crate::state::MemberState;

/// A query of the agent's own.
const QUERY_MAX: Duration = Duration::from_secs(5);
/// Moving a slot reads all WAL in between.
const ADVANCE_MAX: Duration = Duration::from_secs(30);
/// A slot's file may take so long to come.
const FETCH_MAX: Duration = Duration::from_secs(5);
/// A standby has so long to replay up to where a slot's consumer is.
const REPLAY_MAX: Duration = Duration::from_secs(5);
/// What hinders a promotion is not waited for longer.
const HURRY: Duration = Duration::from_secs(1);
/// Positions that the former leader's WAL may have reached since it was last heard, bytes.
const UNHEARD_BYTES: u64 = 16 << 20;
/// New segments of WAL that a promotion begins at most.
const SEGMENTS_MAX: u32 = 8;
/// Before this version no client makes a logical slot on a standby.
const CLIENTS_MAKE_THEM_FROM: u32 = 16;

/// What is known of logical slots here; volatile.
#[derive(Default)]
pub struct Known {
    missing: BTreeSet<String>,
    lost: BTreeSet<String>,
    /// The leader's slots when it last told of them.
    of_leader: BTreeSet<String>,
    held: BTreeSet<String>,
    /// In which term, and from what the leader told when, `held` is.
    held_as_of: Option<(Term, BootTime)>,
}

/// [`Known`], shared.
#[derive(Default)]
pub struct LogicalHere(Mutex<Known>);

impl LogicalHere {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_broken(slot: &Slot) -> bool {
    let conflicting = slot.logical.as_ref().and_then(|l| l.conflicting);
    slot.wal_status.as_deref() == Some("lost") || conflicting == Some(true)
}

/// The logical slots of a server that last and are finished.
fn logical_slots(sample: &ServerSample) -> Vec<LogicalSlot> {
    let read = |s: &Slot| {
        let l = s.logical.as_ref().filter(|l| !l.temporary)?;
        Some(LogicalSlot {
            name: s.name.clone(),
            database: l.database.clone(),
            plugin: l.plugin.clone(),
            two_phase: l.two_phase.unwrap_or_default(),
            restart: s.restart_lsn?,
            confirmed: l.confirmed?,
            catalog_xmin: s.catalog_xmin?,
            failover: l.failover,
            synced: l.synced,
        })
    };
    let mut slots: Vec<LogicalSlot> = sample.slots.iter().filter_map(read).collect();
    slots.sort_by(|a, b| a.name.cmp(&b.name));
    slots
}

fn broken(sample: &ServerSample) -> BTreeSet<String> {
    let names = sample.slots.iter().filter(|s| is_broken(s));
    names.map(|s| s.name.clone()).collect()
}

fn major(server: &LocalServer) -> u32 {
    server.instance.config().binaries.version().major
}

fn all_are_copies(server: &LocalServer) -> bool {
    major(server) < CLIENTS_MAKE_THEM_FROM
}

/// What this member tells of its slots.
pub fn told(server: &LocalServer, notes: &Notes) -> Told {
    let Some(sample) = server.sample() else {
        return Told::default();
    };
    let broken = broken(&sample);
    let mut slots = logical_slots(&sample);
    slots.retain(|s| !broken.contains(&s.name));
    let known = server.logical.known();
    if sample.in_recovery {
        let own = major(server) >= OWN_SYNC_FROM;
        let ready = |s: &&LogicalSlot| {
            if own {
                s.synced == Some(true)
            } else {
                notes.is_whole(&s.name)
            }
        };
        return Told {
            ready: slots.iter().filter(ready).map(|s| s.name.clone()).collect(),
            missing: known.missing.clone(),
            ..Told::default()
        };
    }
    let there: BTreeSet<&String> = slots.iter().map(|s| &s.name).collect();
    let lost = known.lost.iter().filter(|name| !there.contains(name));
    let lost = lost.cloned().collect();
    slots.truncate(SLOTS_MAX);
    let physical = sample.slots.iter().filter(|s| s.logical.is_none());
    Told {
        slots: Some(slots),
        held: physical
            .filter_map(|s| Some((s.name.clone(), s.catalog_xmin?)))
            .collect(),
        lost,
        ..Told::default()
    }
}

/// Looks after the logical slots once; called every few seconds.
pub async fn once(actor: &Actor, o: &Observation) -> Result<(), ActError> {
    let server = &actor.server;
    let (Some(view), ServerView::Running(s)) = (&o.view, &o.server) else {
        return Ok(());
    };
    let Some(l) = view
        .leadership
        .as_ref()
        .map(|l| &l.value)
        .filter(|l| l.open)
    else {
        return Ok(());
    };
    if o.task.is_some() {
        return Ok(());
    }
    let Some(sample) = server.sample().filter(|x| x.in_recovery == s.in_recovery) else {
        return Ok(());
    };
    let here = logical_slots(&sample);
    let leads = l.leader.is_some() && l.leader == o.me.reference();
    let own = major(server) >= OWN_SYNC_FROM;
    if leads && !s.in_recovery {
        return if own {
            own_sync::lead(server, o, &sample, &here).await
        } else {
            lead(actor, l.term, &here).await
        };
    }
    let leader = l.leader.as_ref().and_then(|m| o.peers.get(&m.member));
    let serves = |p: &&PeerView| p.status.role == MemberRole::Leader && p.status.term == l.term;
    let Some(leader) = leader.filter(serves).filter(|_| s.streaming && !leads) else {
        return Ok(());
    };
    if own {
        return own_sync::follow(server, &leader.status.logical, &here).await;
    }
    follow(actor, o, (l.term, leader), (&sample, &here)).await
}

/// The leader's own slots: what is noted of them is for the time after this leadership.
async fn lead(actor: &Actor, term: Term, here: &[LogicalSlot]) -> Result<(), ActError> {
    let before = actor.state().slots;
    note(actor, &before, before.leading(term, here)).await?;
    for slot in before.leading(term, here).not_whole(here, true) {
        // It could not be dropped before the promotion.
        tracing::error!(slot, "dropping a copy of a logical slot that is not whole");
        actor.server.control.drop_slot(slot, QUERY_MAX).await?;
    }
    let mut known = actor.server.logical.known();
    known.missing.clear();
    known.held_as_of = None;
    Ok(())
}

/// A standby's copies of the leader's slots.
async fn follow(
    actor: &Actor,
    o: &Observation,
    (term, leader): (Term, &PeerView),
    (sample, here): (&ServerSample, &[LogicalSlot]),
) -> Result<(), ActError> {
    let server = &actor.server;
    let before = actor.state().slots;
    let held_before = {
        let known = server.logical.known();
        match known.held_as_of {
            // What the leader told must be newer than that.
            Some((t, at)) if t == term && at < leader.heard_at => known.held.clone(),
            Some((t, at)) if t == term && at == leader.heard_at => return Ok(()),
            _ => BTreeSet::new(),
        }
    };
    let outcome = look(&Look {
        term,
        leader: &leader.status.logical,
        own_slot: &o.me.id.slot_name(),
        here,
        broken: &broken(sample),
        notes: &before,
        all_are_copies: all_are_copies(server),
        held_before: &held_before,
    });
    let Some(outcome) = outcome else {
        return Ok(());
    };
    {
        let mut known = server.logical.known();
        known.missing = outcome.missing;
        known.held = outcome.held;
        known.held_as_of = Some((term, leader.heard_at));
        let there = leader.status.logical.slots.iter().flatten();
        known.of_leader = there.map(|s| s.name.clone()).collect();
        known.lost.clear();
    }
    note(actor, &before, outcome.notes).await?;
    for step in outcome.steps {
        match step {
            Step::Advance { name, database, to } => {
                let moved = server
                    .control
                    .advance_logical_slot(&name, &database, to, ADVANCE_MAX)
                    .await;
                if let Err(error) = moved {
                    tracing::warn!(slot = name, %error, "the copy of a logical slot cannot be moved along");
                }
            }
            Step::Drop { name, why } => {
                tracing::info!(slot = name, why, "dropping the copy of a logical slot");
                server.control.drop_slot(&name, QUERY_MAX).await?;
            }
        }
    }
    Ok(())
}

/// Writes the notes down, if nobody else has meanwhile.
async fn note(actor: &Actor, before: &Notes, next: Notes) -> Result<(), ActError> {
    if *before == next {
        return Ok(());
    }
    let before = before.clone();
    let change = move |file: &mut crate::state::StateFile| {
        if file.get().slots != before {
            return Ok(());
        }
        file.set(MemberState {
            slots: next,
            ..file.get().clone()
        })
    };
    Ok(actor.state.change(change).await?)
}

impl Actor {
    /// Gets the leader's slots that are missing here, and restarts PostgreSQL with them.
    pub(crate) async fn take_slots(
        &self,
        from: &MemberId,
        term: Term,
        members: &Members,
    ) -> Result<(), ActError> {
        let missing = self.server.logical.known().missing.clone();
        let room = self
            .server
            .control
            .takes_logical_slots(missing.len(), QUERY_MAX)
            .await?;
        if let Some(why) = room {
            return Err(ActError::Stale(format!(
                "no copies of logical slots are taken: {why}; set it for the cluster, and craton restart --all --pending"
            )));
        }
        let (mut slots, mut refused) = (Vec::new(), Vec::new());
        let there = self.server.control.sample(QUERY_MAX).await?.slots;
        for name in missing
            .iter()
            .filter(|m| there.iter().all(|s| s.name != **m))
        {
            match self.fetch_slot(from, name, members).await {
                Ok(slot) => slots.push(slot),
                Err(error) => refused.push(format!("{name}: {error}")),
            }
        }
        if slots.is_empty() && refused.is_empty() {
            return Ok(());
        }
        if slots.is_empty() {
            return Err(ActError::Stale(refused.join("; ")));
        }
        // Before they are there: whoever finds them must not take them for whole.
        let names: Vec<String> = slots.iter().map(|s| s.name.clone()).collect();
        let change = move |file: &mut crate::state::StateFile| {
            let slots = file
                .get()
                .slots
                .with_copies(names.iter().map(String::as_str));
            file.set(MemberState {
                slots,
                ..file.get().clone()
            })
        };
        self.state.change(change).await?;
        self.stop(StopHow::Fast, "copies of logical slots").await?;
        let left_out = self.server.instance.put_logical_slots(slots).await;
        // What is missing now is for the next look to say.
        self.server.logical.known().missing.clear();
        // Whatever came of that, it goes on.
        let upstream = self.upstream(from, members, "craton_replication")?;
        self.start_following(Some((upstream, from.clone(), term)))
            .await?;
        let left_out = left_out?.into_iter();
        refused.extend(left_out.map(|(name, why)| format!("{name}: {why}")));
        if refused.is_empty() {
            return Ok(());
        }
        Err(ActError::Stale(refused.join("; ")))
    }

    /// A slot's file, once this member can do with it.
    async fn fetch_slot(
        &self,
        from: &MemberId,
        name: &str,
        members: &Members,
    ) -> Result<SlotFile, ActError> {
        let record = members.get(from).map(|m| &m.value);
        let record = record
            .ok_or_else(|| ActError::Stale(format!("the address of {from} is not known yet")))?;
        let client = self.others.clone().with_timeout(FETCH_MAX);
        let bytes = client
            .get_bytes(&record.api, &format!("/v1/slots/{name}"))
            .await
            .map_err(|e| ActError::Stale(format!("{from} does not give it: {e}")))?;
        let slot = SlotFile::decode(&bytes)?;
        if slot.name != name {
            return Err(ActError::Stale(format!(
                "{from} gave {} instead",
                slot.name
            )));
        }
        if !self.server.instance.has_wal_at(slot.restart).await? {
            return Err(ActError::Stale(format!(
                "it needs WAL from {} on, which this member does not have; it is copied once its consumer has gone on",
                slot.restart
            )));
        }
        let deadline = crate::clock::now().after(REPLAY_MAX);
        while self.server.control.replayed(QUERY_MAX).await? < slot.confirmed {
            if crate::clock::now() > deadline {
                return Err(ActError::Stale(format!(
                    "its consumer is at {}, and this member has not replayed that",
                    slot.confirmed
                )));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(slot)
    }

    /// What the former leader last told of its slots: a word or two may have come since this member last looked.
    fn told_by_leaders(&self) -> BTreeSet<String> {
        let presence = self.presence.borrow().clone();
        let told = presence
            .values()
            .filter_map(|p| serde_json::from_str::<MemberStatus>(&p.value).ok());
        told.flat_map(|s| s.logical.slots.unwrap_or_default())
            .map(|s| s.name)
            .collect()
    }

    /// Right before a promotion: copies that are not known to be whole are dropped.
    pub(crate) async fn drop_broken_slots(&self) {
        if major(&self.server) >= OWN_SYNC_FROM {
            return;
        }
        let sample = match self.server.sample() {
            Some(sample) => Some(sample),
            None => self.server.control.sample(HURRY).await.ok(),
        };
        let (here, broken) =
            sample.map_or_else(Default::default, |s| (logical_slots(&s), broken(&s)));
        let notes = self.state().slots;
        let not_whole = notes.not_whole(&here, all_are_copies(&self.server));
        let mut bad: BTreeSet<String> = not_whole.into_iter().map(str::to_owned).collect();
        let names = here.iter().map(|s| s.name.clone());
        bad.extend(names.filter(|name| broken.contains(name)));
        let told = self.told_by_leaders();
        {
            let mut known = self.server.logical.known();
            let whole = |name: &str| here.iter().any(|s| s.name == name) && !bad.contains(name);
            let there = known.of_leader.union(&told).chain(&bad);
            let lost = there.filter(|name| is_kept(name) && !whole(name));
            known.lost = lost.cloned().collect();
            for slot in &known.lost {
                tracing::error!(
                    slot,
                    "this logical replication slot does not survive the change of the leader: its copy here is not whole, or there is none. \
                     Make it anew, and let its consumer begin with a new snapshot"
                );
            }
        }
        self.drop_copies(&notes, bad).await;
    }

    /// Noted first, so that none is taken for whole if it cannot be dropped now.
    async fn drop_copies(&self, notes: &Notes, bad: BTreeSet<String>) {
        if bad.is_empty() {
            return;
        }
        let next = notes.with_copies(bad.iter().map(String::as_str));
        if let Err(error) = note(self, notes, next).await {
            tracing::error!(%error, "cannot note which copies of logical slots are not whole");
        }
        for slot in &bad {
            if let Err(error) = self.server.control.drop_slot(slot, HURRY).await {
                tracing::error!(slot, %error, "the copy cannot be dropped now; it is once this member leads");
            }
        }
    }

    /// Right after a promotion, where there are logical slots: see [`first_position`].
    pub(crate) async fn leave_room_for_consumers(&self) {
        let sample = self.server.sample();
        let confirmed: Vec<Lsn> = sample.map_or_else(Vec::new, |s| {
            logical_slots(&s).iter().map(|s| s.confirmed).collect()
        });
        if confirmed.is_empty() {
            return;
        }
        let presence = self.presence.borrow().clone();
        let others = presence.iter().filter(|(m, _)| **m != self.me);
        let heard = others
            .filter_map(|(_, p)| serde_json::from_str::<MemberStatus>(&p.value).ok()?.lsn)
            .collect::<Vec<_>>();
        let known = heard.into_iter().chain(confirmed);
        let Some(first) = first_position(known, UNHEARD_BYTES) else {
            return;
        };
        match self
            .server
            .control
            .skip_wal_to(first, SEGMENTS_MAX, QUERY_MAX)
            .await
        {
            Ok(end) => {
                tracing::info!(%end, "WAL goes on behind all that a consumer of a logical slot may have seen");
            }
            Err(error) => {
                tracing::warn!(%error, "no new WAL segment could be begun: a consumer that was ahead of this member may miss a change");
            }
        }
    }
}

/// The leader's slots for people, with those that were lost at the last failover.
pub fn shown(o: &Observation, own: &MemberStatus) -> Vec<SlotView> {
    let peers = o.peers.iter().map(|(m, p)| (m, &p.status));
    let all: Vec<(&MemberId, &MemberStatus)> = peers.chain([(&o.me.id, own)]).collect();
    let leader = o.view.as_ref().and_then(|v| v.leader()).map(|l| &l.member);
    let Some((_, leader)) = all.iter().find(|(m, _)| Some(*m) == leader) else {
        return Vec::new();
    };
    let survives_on = |name: &String| {
        let ready = all.iter().filter(|(_, s)| s.logical.ready.contains(name));
        let mut members: Vec<MemberId> = ready.map(|(m, _)| (*m).clone()).collect();
        members.sort();
        members
    };
    let there = leader.logical.slots.iter().flatten();
    let there = there.filter(|s| is_kept(&s.name)).map(|s| SlotView {
        name: s.name.clone(),
        database: s.database.clone(),
        plugin: s.plugin.clone(),
        survives_on: survives_on(&s.name),
        failover: s.failover,
        lost: false,
    });
    let lost = leader.logical.lost.iter().map(|name| SlotView {
        name: name.clone(),
        database: String::new(),
        plugin: String::new(),
        survives_on: Vec::new(),
        failover: None,
        lost: true,
    });
    let mut slots: Vec<SlotView> = there.chain(lost).collect();
    slots.sort_by(|a, b| a.name.cmp(&b.name));
    slots
}

/// What an operator must hear of at once.
pub fn warnings(slots: &[SlotView]) -> Vec<String> {
    slots
        .iter()
        .filter(|s| s.lost)
        .map(|s| {
            format!(
                "the logical replication slot {} did not survive the last failover: make it anew, and let its consumer begin with a new snapshot",
                s.name
            )
        })
        .collect()
}

/// `GET /v1/slots/NAME`: a logical slot of the leader as it lies on disk, for its standbys.
pub fn routes(server: Arc<LocalServer>) -> Router {
    Router::new()
        .route("/v1/slots/{name}", get(give))
        .with_state(server)
}

async fn give(State(server): State<Arc<LocalServer>>, Path(name): Path<String>) -> Response {
    if server.sample().is_none_or(|s| s.in_recovery) {
        return failure(
            StatusCode::CONFLICT,
            "this member does not lead",
            Some("ask the leader"),
        );
    }
    match server.instance.read_logical_slot(&name).await {
        Ok(Some(slot)) => slot.encode().into_response(),
        Ok(None) => failure(
            StatusCode::NOT_FOUND,
            "there is no such logical slot here",
            None,
        ),
        Err(error) => failure(
            StatusCode::INTERNAL_SERVER_ERROR,
            &error.to_string(),
            Some("it is asked for again"),
        ),
    }
}
