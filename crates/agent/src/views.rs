//! What the agent tells others: announcements, topology, status.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use craton_console::views::{
    ElectionView, ExplainView, HistoryEvent, HistoryView, LeaseView, MemberView, PauseView,
    ReceiverView, RestartView, ScheduleView, StatusView, SyncView,
};
use craton_core::decide::Decision;
use craton_core::health::{Health, assess};
use craton_core::libraries::differences;
use craton_core::observe::{DataView, MemberStatus, Observation, PendingChange, ServerView};
use craton_core::records::{At, ClusterView, OrderKind, ReceiverRecord, RequestPhase};
use craton_core::topology::{MemberRole, Topology, TopologyMember};
use craton_core::{Lsn, MemberId};
use craton_pg::DivergenceSummary;
use serde::{Deserialize, Serialize};

use crate::logical;

/// A member is taken for away when it was not heard for this many heartbeats.
const SILENT_HEARTBEATS: u64 = 7;

/// A member's health without the numbers that move all the time: a change of this is told at once.
pub fn in_substance(health: &Health) -> Health {
    let unfit = if health.is_fit() {
        Vec::new()
    } else {
        vec![String::new()]
    };
    Health {
        room: health.room,
        unfit,
        ..Health::default()
    }
}

/// What this member announces of itself.
pub fn own_status(o: &Observation, decision: &Decision) -> MemberStatus {
    let leads = o.view.as_ref().and_then(ClusterView::leader) == o.me.reference().as_ref();
    let term = o
        .view
        .as_ref()
        .and_then(|v| v.leadership.as_ref())
        .map(|l| l.value.term)
        .unwrap_or_default();
    let settings = o
        .view
        .as_ref()
        .map_or_else(|| o.initial_settings.clone(), ClusterView::settings);
    let mut status = MemberStatus {
        incarnation: o.me.incarnation,
        role: MemberRole::Down,
        term,
        timeline: None,
        lsn: None,
        replay_lsn: None,
        streaming: false,
        doing: decision
            .reasons
            .last()
            .map(|r| r.text.clone())
            .unwrap_or_default(),
        checkpoint_timeline: match &o.data {
            DataView::Present { timeline, .. } => Some(*timeline),
            _ => None,
        },
        slots: BTreeMap::new(),
        process: o.process,
        pending_restart: o.pending.clone(),
        lost_slots: BTreeSet::new(),
        health: assess(&o.host, &settings, o.now),
        libraries: o.libraries.clone(),
        noload: o.me.noload,
        upstream: None,
        logical: o.logical.clone(),
    };
    match &o.server {
        ServerView::Down => {}
        ServerView::Silent { .. } => status.role = MemberRole::Transition,
        ServerView::Running(s) => {
            status.role = match (s.in_recovery, leads) {
                (false, true) => MemberRole::Leader,
                (true, false) if s.upstream.is_some() => MemberRole::Standby,
                _ => MemberRole::Transition,
            };
            status.timeline = Some(s.timeline);
            status.lsn = Some(s.end);
            status.replay_lsn = s.replay.filter(|_| s.in_recovery);
            status.streaming = s.streaming;
            status.upstream = s
                .upstream
                .as_ref()
                .filter(|_| s.in_recovery)
                .map(|(m, _)| m.clone());
        }
    }
    status
}

/// The members as everybody should see them: the coordinator's records with the newest announcements.
fn statuses(
    o: &Observation,
    own: &MemberStatus,
) -> BTreeMap<MemberId, (Option<MemberStatus>, Option<u64>)> {
    let Some(view) = &o.view else {
        return BTreeMap::new();
    };
    view.members
        .keys()
        .map(|m| {
            if *m == o.me.id {
                return (m.clone(), (Some(own.clone()), Some(0)));
            }
            let peer = o.peers.get(m);
            let age = peer
                .map(|p| u64::try_from(o.now.since(p.heard_at).as_millis()).unwrap_or(u64::MAX));
            (m.clone(), (peer.map(|p| p.status.clone()), age))
        })
        .collect()
}

/// The topology that proxies and backups are sent.
pub fn topology(o: &Observation, own: &MemberStatus) -> Option<Topology> {
    let view = o.view.as_ref()?;
    let leadership = view.leadership.as_ref().map(|l| &l.value);
    let switching = match (&view.request, leadership) {
        (Some(r), Some(l)) => r.value.phase == RequestPhase::Hold && r.value.term == l.term,
        _ => false,
    };
    // A leader that is to restart in place has its order until it runs again.
    let restarting = leadership
        .and_then(|l| view.orders.get(&l.leader.as_ref()?.member))
        .is_some_and(|o| o.value.kind == OrderKind::Restart);
    let hold = switching || restarting;
    let silent = view
        .settings()
        .heartbeat_ms
        .saturating_mul(SILENT_HEARTBEATS);
    let known = statuses(o, own);
    let members = view
        .members
        .iter()
        .map(|(id, record)| {
            let (status, age) = known.get(id).cloned().unwrap_or_default();
            let alive = age.is_some_and(|a| a <= silent);
            let status = status.filter(|_| alive);
            TopologyMember {
                id: id.clone(),
                host: record.value.host.clone(),
                port: record.value.port,
                api: record.value.api.clone(),
                role: status.as_ref().map_or(MemberRole::Down, |s| s.role),
                timeline: status.as_ref().and_then(|s| s.timeline),
                lsn: status.as_ref().and_then(|s| s.lsn),
                replay_lsn: status.as_ref().and_then(|s| s.replay_lsn),
                streaming: status
                    .as_ref()
                    .is_some_and(|s| s.streaming && s.role == MemberRole::Standby),
                noload: status.as_ref().is_some_and(|s| s.noload),
            }
        })
        .collect();
    Some(Topology {
        cluster: view
            .cluster
            .as_ref()
            .map_or_else(|| o.cluster_name.clone(), |c| c.value.name.clone()),
        system_id: view
            .cluster
            .as_ref()
            .and_then(|c| c.value.system_id.clone()),
        term: leadership.map(|l| l.term).unwrap_or_default(),
        revision: view.revision,
        writable: leadership
            .filter(|l| l.open)
            .and_then(|l| l.leader.as_ref())
            .map(|l| l.member.clone()),
        hold,
        members,
    })
}

/// True if a proxy must hear of the difference at once. Positions alone change all the time.
pub fn differs_in_substance(a: &Topology, b: &Topology) -> bool {
    let strip = |t: &Topology| {
        let mut t = t.clone();
        for m in &mut t.members {
            m.lsn = None;
            m.replay_lsn = None;
        }
        t
    };
    strip(a) != strip(b)
}

/// The leader's own agent says, by the records that are shown, that it serves nobody.
fn is_known_closed(leader: Option<&MemberId>, members: &[MemberView]) -> bool {
    members
        .iter()
        .any(|m| Some(&m.id) == leader && m.agent_alive && m.role != MemberRole::Leader)
}

/// `GET /v1/status`.
pub fn status(o: &Observation, decision: &Decision) -> StatusView {
    let own = own_status(o, decision);
    let empty = ClusterView::default();
    let view = o.view.as_ref().unwrap_or(&empty);
    let settings = view.settings();
    let leadership = view.leadership.as_ref().map(|l| &l.value);
    let topology = topology(o, &own);
    let leader = leadership
        .and_then(|l| l.leader.as_ref())
        .map(|l| l.member.clone());
    let members = members(o, view, &own, leader.as_ref());
    let receivers = receivers(o, view, &members, leader.as_ref());
    let mut warnings = warnings(o, view, &members);
    warnings.extend(logical::warnings(&logical::shown(o, &own)));
    let silent = receivers.iter().filter(|r| !r.alive);
    warnings
        .extend(silent.map(|r| format!("the backup receiver {} has not been heard of", r.name)));
    StatusView {
        cluster: o.cluster_name.clone(),
        answered_by: o.me.id.clone(),
        term: leadership.map(|l| l.term).unwrap_or_default(),
        revision: view.revision,
        writable: leadership.is_some_and(|l| l.open) && !is_known_closed(leader.as_ref(), &members),
        durability: leadership
            .map_or(settings.durability, |l| l.durability)
            .to_string(),
        sync: SyncView {
            members: leadership
                .map(|l| l.sync.members.keys().cloned().collect())
                .unwrap_or_default(),
            acks: leadership.map_or(0, |l| l.sync.k),
            in_force: match &o.server {
                ServerView::Running(s) if !s.in_recovery => s.sync_in_force,
                _ => leadership.is_some_and(|l| l.open),
            },
        },
        lease: lease(o, view, leader.clone()),
        hold: topology.is_some_and(|t| t.hold),
        election: leadership
            .filter(|l| l.leader.is_none())
            .map(|l| election(view, l)),
        next: next(
            paused(o, view).as_ref(),
            view,
            &members,
            &receivers,
            leader.as_ref(),
        ),
        leader,
        members,
        receivers,
        witnesses: Vec::new(),
        slots: logical::shown(o, &own),
        reasons: decision.reasons.iter().map(|r| r.text.clone()).collect(),
        warnings,
        paused: paused(o, view),
        scheduled: view.schedule.as_ref().map(|s| ScheduleView {
            at: rfc3339(s.value.at_ms),
            to: s.value.to.clone(),
            by: s.value.by.clone(),
        }),
        restart: restart(o, view, &own),
        voters: Vec::new(),
        at_ms: o.wall_ms,
        version: env!("CARGO_PKG_VERSION").into(),
        coordinator: String::new(),
    }
}

fn lease(o: &Observation, view: &ClusterView, holder: Option<MemberId>) -> LeaseView {
    let settings = view.settings();
    LeaseView {
        holder,
        remaining_ms: o
            .lease
            .map(|l| u64::try_from(l.until.since(o.now).as_millis()).unwrap_or(0)),
        ttl_ms: settings.ttl_ms,
        heartbeat_ms: settings.heartbeat_ms,
        promises_ms: o
            .promises
            .living_since
            .map(|t| u64::try_from(o.now.since(t).as_millis()).unwrap_or(u64::MAX)),
        held_term: o.lease.map(|l| l.term),
    }
}

/// What an operator should look at.
fn warnings(o: &Observation, view: &ClusterView, members: &[MemberView]) -> Vec<String> {
    let mut warnings: Vec<String> = members
        .iter()
        .filter(|m| !m.agent_alive)
        .map(|m| format!("{} has not been heard of", m.id))
        .collect();
    for m in members.iter().filter(|m| !m.pending_restart.is_empty()) {
        let what = m.pending_restart.join(", ");
        warnings.push(format!(
            "{} waits for a restart ({what}): craton restart --all --pending",
            m.id
        ));
    }
    for m in members.iter().filter(|m| m.agent_alive) {
        warnings.extend(m.trouble.iter().map(|t| format!("{}: {t}", m.id)));
    }
    warnings.extend(libraries(view, members));
    warnings.extend(on_promises(o));
    let wish = view.settings().durability;
    let leadership = view.leadership.as_ref().map(|l| &l.value);
    if let Some(l) = leadership.filter(|l| l.durability != wish) {
        warnings.push(format!(
            "durability {wish} is wished and {} is in force; craton explain says what is missing",
            l.durability
        ));
    }
    if o.view.is_none() {
        warnings.push("the coordinator has no majority (or has not answered yet): this is what this agent knows alone".into());
    }
    warnings
}

/// Members whose libraries are not the leader's.
fn libraries(view: &ClusterView, members: &[MemberView]) -> Vec<String> {
    let leader = view.leader().map(|l| &l.member);
    let Some(leader) = members.iter().find(|m| Some(&m.id) == leader) else {
        return Vec::new();
    };
    members
        .iter()
        .map(|m| (m, differences(&m.libraries, &leader.libraries)))
        .filter(|(_, list)| !list.is_empty())
        .map(|(m, list)| {
            format!(
                "{} differs from {} in its libraries: {}; craton doctor says what may come of it",
                m.id,
                leader.id,
                list.join("; ")
            )
        })
        .collect()
}

fn paused(o: &Observation, view: &ClusterView) -> Option<PauseView> {
    let pause = view.pause.as_ref().map(|p| &p.value)?;
    pause.holds_at(o.wall_ms).then(|| PauseView {
        since: rfc3339(pause.since_ms),
        until: pause.until_ms.map(rfc3339),
        reason: pause.reason.clone(),
        by: pause.by.clone(),
    })
}

fn restart(o: &Observation, view: &ClusterView, own: &MemberStatus) -> Option<RestartView> {
    let plan = view.restart.as_ref().map(|r| &r.value)?;
    let known = statuses(o, own);
    let status = |m: &MemberId| known.get(m).and_then(|(s, _)| s.as_ref());
    let is_back = |s: &MemberStatus| s.role == MemberRole::Leader || s.streaming;
    let left: Vec<MemberId> = plan
        .members
        .iter()
        .filter(|(m, ended)| {
            !status(m).is_some_and(|s| s.process.is_some() && s.process != **ended && is_back(s))
        })
        .map(|(m, _)| m.clone())
        .collect();
    let under_way = left
        .iter()
        .filter(|m| {
            view.orders.contains_key(*m)
                || status(m).is_some_and(|s| s.process != plan.members.get(*m).copied().flatten())
        })
        .cloned()
        .collect();
    Some(RestartView {
        id: plan.id,
        by: plan.by.clone(),
        left,
        under_way,
    })
}

/// `name: 100 -> 200`
fn pending(change: &PendingChange) -> String {
    let to = change.to.as_deref().unwrap_or("its default");
    format!("{}: {} -> {to}", change.name, change.from)
}

/// The leader lives on standby promises.
fn on_promises(o: &Observation) -> Option<String> {
    let since = o.promises.living_since?;
    let from: Vec<&str> = o.promises.from.iter().map(MemberId::as_str).collect();
    (!from.is_empty()).then(|| {
        format!(
            "the lease cannot be renewed: {} leads on the promise of {} since {:.0} s; no change of leader or sync set until the coordinator is back",
            o.me.id,
            from.join(", "),
            o.now.since(since).as_secs_f64()
        )
    })
}

fn election(view: &ClusterView, l: &craton_core::records::Leadership) -> ElectionView {
    // The seal of a member that was cloned anew says nothing of what its former life acknowledged.
    let counts = |m: &MemberId, incarnation| {
        let previous = l.previous.as_ref();
        l.sync.holds(m, incarnation)
            || previous.is_some_and(|p| p.member == *m && p.incarnation == incarnation)
            || !l.durability.keeps_commits()
    };
    let sealed: Vec<MemberId> = view
        .seals
        .iter()
        .filter(|(m, s)| s.value.term == l.term && counts(m, s.value.incarnation))
        .map(|(m, _)| m.clone())
        .collect();
    ElectionView {
        term: l.term,
        opened_by: None,
        seals_needed: u32::try_from(seals_needed(l)).unwrap_or(u32::MAX),
        missing: l
            .sync
            .members
            .keys()
            .filter(|m| !sealed.contains(m))
            .cloned()
            .collect(),
        sealed,
        recovered: l.may_be_old(),
    }
}

/// In `async` one seal is enough.
fn seals_needed(l: &craton_core::records::Leadership) -> usize {
    if l.durability.keeps_commits() {
        l.sync.seals_needed()
    } else {
        1
    }
}

fn members(
    o: &Observation,
    view: &ClusterView,
    own: &MemberStatus,
    leader: Option<&MemberId>,
) -> Vec<MemberView> {
    let silent = view
        .settings()
        .heartbeat_ms
        .saturating_mul(SILENT_HEARTBEATS);
    let known = statuses(o, own);
    let leader_lsn = leader
        .and_then(|l| known.get(l))
        .and_then(|(s, _)| s.as_ref())
        .and_then(|s| s.lsn);
    view.members
        .iter()
        .map(|(id, record)| {
            let (status, age) = known.get(id).cloned().unwrap_or_default();
            let alive = age.is_some_and(|a| a <= silent);
            let shown = status.as_ref().filter(|_| alive);
            let lsn = shown.and_then(|s| s.lsn);
            let behind = |own: Lsn| leader_lsn.map(|l| l.bytes_since(own));
            MemberView {
                id: id.clone(),
                role: shown.map_or(MemberRole::Down, |s| s.role),
                state: shown
                    .map_or_else(|| "its agent is not heard".to_owned(), |s| s.doing.clone()),
                host: record.value.host.clone(),
                port: record.value.port,
                api: record.value.api.clone(),
                agent_alive: alive,
                heard_ms_ago: age,
                timeline: shown.and_then(|s| s.timeline),
                lsn,
                last_heard_lsn: status.as_ref().and_then(|s| s.lsn),
                replay_lsn: shown.and_then(|s| s.replay_lsn),
                lag_bytes: if Some(id) == leader {
                    Some(0)
                } else {
                    lsn.and_then(behind)
                },
                streaming: shown.is_some_and(|s| s.streaming),
                sync: view.leadership.as_ref().is_some_and(|l| {
                    record
                        .value
                        .incarnation
                        .is_some_and(|i| l.value.sync.holds(id, i))
                }),
                priority: record.value.priority,
                incarnation: record.value.incarnation,
                pending_restart: shown
                    .map(|s| s.pending_restart.iter().map(pending).collect())
                    .unwrap_or_default(),
                order: view.orders.get(id).map(|o| match o.value.kind {
                    OrderKind::Restart => "restart".into(),
                    OrderKind::Reinit => "reinit".into(),
                }),
                disk_free_bytes: shown.and_then(|s| s.health.available),
                trouble: shown.map(|s| trouble(&s.health)).unwrap_or_default(),
                noload: shown.is_some_and(|s| s.noload),
                upstream: shown.and_then(|s| s.upstream.clone()),
                libraries: shown.map(|s| s.libraries.clone()).unwrap_or_default(),
            }
        })
        .collect()
}

/// Backup daemons that are synchronous copies.
fn receivers(
    o: &Observation,
    view: &ClusterView,
    members: &[MemberView],
    leader: Option<&MemberId>,
) -> Vec<ReceiverView> {
    let leads = |m: &&MemberView| Some(&m.id) == leader;
    let leader_lsn = members.iter().find(leads).and_then(|m| m.lsn);
    let silent = view
        .settings()
        .heartbeat_ms
        .saturating_mul(SILENT_HEARTBEATS);
    let shown = |(name, record): (&MemberId, &At<ReceiverRecord>)| {
        let seen = o.receivers.get(name);
        let age =
            seen.map(|s| u64::try_from(o.now.since(s.heard_at).as_millis()).unwrap_or(u64::MAX));
        let alive = age.is_some_and(|a| a <= silent);
        let seen = seen.filter(|_| alive);
        ReceiverView {
            name: name.clone(),
            api: record.value.api.clone(),
            heard_ms_ago: age,
            alive,
            timeline: seen.map(|s| s.timeline),
            lsn: seen.map(|s| s.lsn),
            lag_bytes: seen.and_then(|s| Some(leader_lsn?.bytes_since(s.lsn))),
            streams_from: seen.and_then(|s| s.streams_from.clone()),
            sync: view
                .leadership
                .as_ref()
                .is_some_and(|l| l.value.sync.holds(name, record.value.incarnation)),
        }
    };
    view.receivers.iter().map(shown).collect()
}

/// Everything that is wrong with a member's host.
fn trouble(health: &Health) -> Vec<String> {
    health
        .unfit
        .iter()
        .chain(&health.warnings)
        .cloned()
        .collect()
}

/// What would happen if the leader were lost now.
fn next(
    paused: Option<&PauseView>,
    view: &ClusterView,
    members: &[MemberView],
    receivers: &[ReceiverView],
    leader: Option<&MemberId>,
) -> String {
    let Some(l) = view.leadership.as_ref().map(|l| &l.value) else {
        return "the cluster is being made".into();
    };
    let Some(leader) = leader else {
        return format!("the election of term {} is open: {}", l.term, l.cause);
    };
    let ttl = view.settings().ttl_ms;
    if let Some(paused) = paused {
        return format!(
            "paused by {}: if {leader} fails, nobody takes over until craton resume (or craton failover)",
            paused.by
        );
    }
    // With what V sealed anybody may lead; where V lists receivers only, somebody else has to.
    let only_receivers =
        members.iter().all(|m| !m.sync) && receivers.iter().any(|r| r.sync && r.alive);
    let heirs: Vec<&str> = members
        .iter()
        .filter(|m| m.id != *leader && m.agent_alive && m.priority > 0)
        .filter(|m| m.sync || only_receivers)
        .map(|m| m.id.as_str())
        .collect();
    let sealing = members
        .iter()
        .filter(|m| m.id != *leader && m.agent_alive && m.sync)
        .count()
        + receivers.iter().filter(|r| r.alive && r.sync).count();
    let needed = seals_needed(l);
    if l.sync.members.is_empty() {
        return format!(
            "{leader} is alone: if it fails, nobody is promoted, and it goes on when it is back"
        );
    }
    if sealing < needed {
        return format!(
            "if {leader} fails now, its successor needs {needed} of {} to seal, and only {sealing} can: it waits for the others",
            l.sync.members.len(),
        );
    }
    if heirs.is_empty() {
        return if only_receivers {
            format!(
                "if {leader} fails now, the next member that is there gets what was acknowledged from the backup, and takes over"
            )
        } else {
            format!("if {leader} fails now, nobody takes over: those that could seal never lead")
        };
    }
    format!(
        "if {leader} fails, {} takes over (lease: {ttl} ms)",
        heirs.join(" or ")
    )
}

/// What would happen next also needs a majority of the voters without the leader: a word on that, where there would be
/// none.
pub(crate) fn count_voters(status: &mut StatusView) {
    let Some(leader) = status.leader.as_ref().filter(|_| status.paused.is_none()) else {
        return;
    };
    let alive = |v: &&MemberId| {
        let member = status.members.iter().any(|m| m.id == **v && m.agent_alive);
        *v != leader && (member || status.witnesses.iter().any(|w| w.name == **v && w.alive))
    };
    let (all, left) = (
        status.voters.len(),
        status.voters.iter().filter(alive).count(),
    );
    let majority = all / 2 + 1;
    if all > 1 && left < majority {
        status.next = format!(
            "if {leader} fails now, nobody takes over: {left} of {all} voters would be left, and {majority} are needed"
        );
    }
}

/// `GET /v1/explain`.
pub fn explain(o: &Observation, decision: &Decision) -> ExplainView {
    let own = own_status(o, decision);
    let mut waiting_for: Vec<String> = o
        .failures
        .iter()
        .map(|f| format!("{:?} failed {} times: {}", f.kind, f.count, f.error))
        .collect();
    waiting_for.extend(on_promises(o));
    if let Some(until) = o.promises.held_until.filter(|t| *t > o.now) {
        waiting_for.push(format!(
            "promised the leader to seal for nobody else within {} ms",
            until.since(o.now).as_millis()
        ));
    }
    if let Some(task) = &o.task {
        let since = o.now.since(task.since);
        waiting_for.push(format!(
            "{:?} in progress for {:.1} s",
            task.task.kind(),
            since.as_secs_f64()
        ));
    }
    ExplainView {
        member: o.me.id.clone(),
        role: own.role,
        summary: own.doing,
        reasons: decision
            .reasons
            .iter()
            .map(|r| format!("{}: {}", r.code, r.text))
            .collect(),
        waiting_for,
        hints: decision
            .reasons
            .iter()
            .filter_map(|r| craton_core::reasons::meaning(r.code))
            .map(|m| {
                format!("{}: {} {}", m.code, m.means, m.todo)
                    .trim_end()
                    .to_owned()
            })
            .collect(),
    }
}

/// `GET /v1/divergence`: what a member kept of WAL that the cluster does not have.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DivergenceView {
    /// The member.
    pub member: MemberId,
    /// The directory on its host; each divergence is a directory in it.
    pub directory: PathBuf,
    /// The divergences, oldest first.
    pub kept: Vec<DivergenceSummary>,
}

/// `GET /v1/history`.
pub fn history(o: &Observation) -> HistoryView {
    let events = o
        .view
        .as_ref()
        .and_then(|v| v.history.as_ref())
        .map(|h| h.value.0.clone())
        .unwrap_or_default();
    HistoryView {
        events: events
            .into_iter()
            .map(|e| HistoryEvent {
                at: rfc3339(e.at_ms),
                term: e.term,
                kind: e.kind,
                member: Some(e.member),
                timeline: None,
                lsn: None,
                text: e.text,
            })
            .collect(),
    }
}

/// Milliseconds since 1970 as RFC 3339 in UTC.
pub fn rfc3339(ms: u64) -> String {
    i64::try_from(ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(|| format!("{ms} ms since 1970"), |t| t.to_string())
}
