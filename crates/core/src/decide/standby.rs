//! A member that does not lead: clone, follow, rewind, and notice that the leader is gone.

use std::time::Duration;

use super::health::ASK_SOON;
use super::order;
use super::{
    Mind, NOT_STREAMING_MAX, SILENT_MAX, STARTS_MAX, StopHow, Task, TaskKind, UPSTREAM_AGAIN,
    UPSTREAM_MAX, UPSTREAM_PATIENCE, receivers, request, slots,
};
use crate::observe::{LeaseSeen, Server, ServerView};
use crate::records::{ClusterView, Leadership, MemberRef, Request, RequestKind, RequestPhase};
use crate::settings::Durability;
use crate::timeline::Relation;
use crate::topology::MemberRole;
use crate::types::MemberId;

/// A standby whose slot on the leader is lost streams from what WAL there still is, if it does so within this.
const LOST_SLOT_MAX: Duration = Duration::from_secs(1);

/// An empty data directory in a cluster that has a database: copy it from somebody.
pub(super) fn clone_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership) {
    let ready = view.cluster.as_ref().is_some_and(|c| c.value.bootstrapped);
    let Some(leader) = l.leader.as_ref().filter(|_| l.was_open() && ready) else {
        return mind.because(
            "waiting_for_leader",
            "the data directory is empty; waiting for a leader to clone from",
        );
    };
    if leader.member == mind.o.me.id {
        return mind.because(
            "leader_without_data",
            "this member leads on paper but its data directory is empty; the others elect a new leader when the lease is over",
        );
    }
    let failed = mind
        .o
        .failures
        .iter()
        .find(|f| f.kind == TaskKind::Clone)
        .map_or(0, |f| f.count);
    // A standby spares the leader; after a failure the leader itself is asked.
    let standby = mind.o.peers.iter().find(|(m, p)| {
        **m != leader.member
            && p.status.streaming
            && p.status.timeline == Some(l.timeline)
            && mind.is_alive(m)
    });
    // First out of the backup repository, which loads nobody; then in turn, so that no broken source is for ever.
    let turn = if mind.o.clone_repository {
        failed % 3
    } else {
        1 + failed % 2
    };
    let repository = turn == 0;
    let from = match standby {
        Some((m, _)) if turn < 2 => m.clone(),
        _ => leader.member.clone(),
    };
    let source = if repository {
        "out of the backup repository".to_owned()
    } else {
        format!("from {from}")
    };
    mind.because(
        "cloning",
        format!("the data directory is empty: cloning {source}"),
    );
    mind.start(Task::Clone {
        from,
        repository,
        term: l.term,
    });
}

/// Somebody else leads.
pub(super) fn standby_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, fenced: bool) {
    let Some(leader) = l.leader.as_ref() else {
        return;
    };
    if l.open {
        // What this member asked for as a leader has come about: should it lead again, it need not wait as long.
        let soon = mind.o.now.after(ASK_SOON);
        let at = &mut mind.out.memory.ask_not_before;
        *at = at.map(|at| at.min(soon));
    }
    watch_lease(mind, view, l, leader);
    // A copy looks after its PostgreSQL by itself until it is one of this cluster's standbys.
    if let Some(running) = mind
        .o
        .task
        .as_ref()
        .filter(|t| t.task.kind() == TaskKind::Clone)
    {
        let text = format!("{:?} is in progress", running.task.kind());
        return mind.because("busy", text);
    }
    match &mind.o.server {
        _ if fenced => {}
        ServerView::Down => down_rule(mind, l, leader),
        ServerView::Silent { .. } => silent_rule(mind, l, leader),
        ServerView::Running(s) => follow_rule(mind, view, l, leader, s),
    }
}

/// The lease of the leader has run out: open the next election (rule 2.3). Only members that may win do.
fn watch_lease(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, leader: &MemberRef) {
    let asked = view
        .request
        .as_ref()
        .map(|r| &r.value)
        .filter(|r| r.term == l.term);
    let forced = asked.filter(|r| r.kind == RequestKind::Failover && r.allow_data_loss);
    let counted = mind
        .o
        .me
        .reference()
        .is_some_and(|me| l.sync.holds(&me.member, me.incarnation));
    let may_win = counted && (l.durability == Durability::Async || l.sync.k > 0)
        || forced.is_some()
        // Nobody wins it before an operator says so; whoever looks sees an election, and what it needs.
        || l.recovered
        || receivers::only_receivers(view, l);
    let settled = mind.is_settled();
    let wished = asked.is_some_and(|r| r.kind == RequestKind::Failover);
    if mind.is_paused() && !wished {
        if mind.o.lease_seen == LeaseSeen::Lapsed && settled {
            let text = format!(
                "the lease of {} seems over, and nobody takes over until `craton resume` (or `craton failover`)",
                leader.member
            );
            mind.because("no_failover_in_pause", text);
        }
        return;
    }
    let now = mind.o.now;
    if mind.o.lease_seen == LeaseSeen::Lapsed
        && settled
        && mind.o.promises.held_until.is_some_and(|t| t > now)
    {
        let text = format!(
            "the lease of {} cannot be renewed, and this member has promised it not to elect anybody yet",
            leader.member
        );
        return mind.because("promised", text);
    }
    match mind.o.lease_seen {
        LeaseSeen::Lapsed if may_win && settled => {
            mind.because(
                "lease_over",
                format!(
                    "the lease of {} (term {}) seems over",
                    leader.member, l.term
                ),
            );
            let preferred = asked.and_then(|r| r.to.clone());
            let cause = why_over(mind, leader, asked);
            mind.open_election(view, l, preferred, forced.is_some(), &cause);
        }
        LeaseSeen::Lapsed if !may_win && settled => {
            let why = if l.sync.members.is_empty() {
                "it was alone: only it has every acknowledged commit"
            } else {
                "this member is not one of those that may take over"
            };
            let text = format!(
                "the lease of {} seems over, but {why} ({})",
                leader.member, l.sync
            );
            mind.because("leader_was_alone", text);
        }
        _ => {}
    }
}

/// Why the lease ended, as far as can be known here: the leader may have said what ails it, or be handing over.
fn why_over(mind: &Mind<'_>, leader: &MemberRef, asked: Option<&Request>) -> String {
    let over = format!("the lease of {} ran out", leader.member);
    if let Some(request) = asked.filter(|r| r.phase == RequestPhase::Hold) {
        return format!("{over}: {}", request::cause(request, &leader.member));
    }
    let health = mind.o.peers.get(&leader.member).map(|p| &p.status.health);
    match health.filter(|h| !h.is_fit()) {
        Some(h) => format!("{over}: {}", h.unfit.join("; ")),
        None => over,
    }
}

/// What PostgreSQL says when the end of its WAL is not part of the newest timeline it knows of
/// (xlogrecovery.c).
const OTHER_HISTORY: [&str; 3] = [
    "is not a child of this server's history",
    "does not contain minimum recovery point",
    "forked off current database system timeline",
];

/// Down: start; where PostgreSQL refuses to start again and again, its data directory is at odds with a
/// history that it has seen, and only the leader can help.
fn down_rule(mind: &mut Mind<'_>, l: &Leadership, leader: &MemberRef) {
    let failure = mind
        .o
        .failures
        .iter()
        .find(|f| f.kind == TaskKind::StartStandby);
    // Only a data directory that is at odds with a history that it has seen: a busy port or a full disk is no
    // reason to touch it.
    let at_odds = failure
        .filter(|f| f.count >= STARTS_MAX && OTHER_HISTORY.iter().any(|w| f.error.contains(w)));
    let leads = l.was_open() && serves(mind, l, &leader.member);
    if let Some(f) = at_odds.filter(|_| leads && l.term >= mind.o.me.floor) {
        let text = format!(
            "PostgreSQL did not start {} times ({}): rewinding to {}, or cloning anew",
            f.count, f.error, leader.member
        );
        mind.because("cannot_start", text);
        return mind.start(Task::Rewind {
            from: leader.member.clone(),
            fork: None,
            term: l.term,
        });
    }
    mind.because("starting", "starting as a standby");
    mind.start(Task::StartStandby);
}

/// Started, and not answering yet: reading WAL, or in need of the leader's to become consistent. Following
/// is harmless even if the histories have parted: PostgreSQL refuses to stream then.
fn silent_rule(mind: &mut Mind<'_>, l: &Leadership, leader: &MemberRef) {
    mind.because("silent", "PostgreSQL does not answer yet");
    let now = mind.o.now;
    let since = *mind.out.memory.silent_since.get_or_insert(now);
    if l.open && l.term >= mind.o.me.floor && now.since(since) >= SILENT_MAX {
        mind.out.memory.silent_since = Some(now);
        mind.start(Task::Follow {
            from: leader.member.clone(),
            term: l.term,
        });
    }
}

/// Whom to stream from: the standby that the operator named, while it streams from the leader itself, so that no
/// two can wait for each other; else the leader.
fn source(mind: &mut Mind<'_>, l: &Leadership, leader: &MemberRef, s: &Server) -> MemberId {
    let Some(named) = mind.o.me.upstream.clone() else {
        return leader.member.clone();
    };
    if named == leader.member || named == mind.o.me.id {
        return leader.member.clone();
    }
    let status = mind.o.peers.get(&named).map(|p| &p.status);
    let streams = mind.is_alive(&named)
        && status.is_some_and(|s| {
            s.streaming
                && s.term == l.term
                && s.timeline == Some(l.timeline)
                && s.upstream.as_ref() == Some(&leader.member)
        });
    let now = mind.o.now;
    let failed = mind.out.memory.upstream_failed_at;
    let fit = streams && failed.is_none_or(|at| now.since(at) >= UPSTREAM_AGAIN);
    if fit {
        mind.out.memory.upstream_away_since = None;
        return named;
    }
    let away = *mind.out.memory.upstream_away_since.get_or_insert(now);
    let follows = s.streaming && s.upstream.as_ref() == Some(&(named.clone(), l.term));
    if follows && now.since(away) < UPSTREAM_PATIENCE {
        return named;
    }
    mind.because(
        "upstream_away",
        format!(
            "{named}, which this member should stream from, does not stream from {} itself (or did not stream to here): following {0} meanwhile",
            leader.member
        ),
    );
    leader.member.clone()
}

fn follow_rule(
    mind: &mut Mind<'_>,
    view: &ClusterView,
    l: &Leadership,
    leader: &MemberRef,
    s: &Server,
) {
    // By recovered records nobody leads who could be followed.
    if !s.in_recovery || l.recovered {
        return;
    }
    if l.term < mind.o.me.floor {
        let text = format!(
            "sealed for term {}: nothing below it is followed",
            mind.o.me.floor
        );
        return mind.because("sealed", text);
    }
    let source = source(mind, l, leader, s);
    if s.upstream.as_ref() == Some(&(source.clone(), l.term)) {
        return streaming_rule(mind, view, l, (leader, &source), s);
    }
    if !s.end_is_exact {
        return mind.because("reading_wal", "reading local WAL to its end");
    }
    let timelines = view
        .timelines
        .as_ref()
        .map(|t| t.value.clone())
        .unwrap_or_default();
    match timelines.relation(s.timeline, s.end, l.timeline) {
        Relation::Prefix => {
            mind.out.memory.not_streaming_since = None;
            mind.because("following", format!("following {source} (term {})", l.term));
            mind.start(Task::Follow {
                from: source,
                term: l.term,
            });
        }
        relation => rewind(mind, l, &leader.member, s, relation),
    }
}

/// True if the leader itself said just now that it is one. Rewinding ends this incarnation, and with it a seal
/// that an election may need: not for a leader on paper, whose PostgreSQL is down or whose disk is gone.
pub(super) fn serves(mind: &Mind<'_>, l: &Leadership, leader: &MemberId) -> bool {
    let status = mind.o.peers.get(leader).map(|p| &p.status);
    mind.is_alive(leader)
        && status.is_some_and(|s| s.role == MemberRole::Leader && s.term == l.term)
}

fn rewind(mind: &mut Mind<'_>, l: &Leadership, leader: &MemberId, s: &Server, relation: Relation) {
    if relation == Relation::Unknown && s.timeline > l.timeline {
        // Every number is reserved in the coordinator before it is used: what is known here of the cluster is
        // older than the WAL (an agent that was paused while PostgreSQL went on). A rewind on the strength
        // of that would throw away a healthy copy, and with it a seal that an election may need.
        let now = mind.o.now;
        let since = *mind.out.memory.not_streaming_since.get_or_insert(now);
        if now.since(since) < NOT_STREAMING_MAX {
            let text = format!(
                "the WAL here is on timeline {}, which is newer than all that is known of the cluster: waiting for news",
                s.timeline
            );
            return mind.because("behind", text);
        }
    }
    let fork = match relation {
        Relation::Diverged { timeline, fork } => Some((timeline, fork)),
        _ => None,
    };
    let parted = fork.map_or(
        "a timeline that the cluster does not know".to_owned(),
        |(t, at)| format!("timeline {t} at {at}"),
    );
    let text = format!(
        "the WAL here ends at {} on timeline {}; the histories parted on {parted}: keeping what differs, then rewinding",
        s.end, s.timeline
    );
    mind.because("diverged", text);
    if !l.was_open() || !serves(mind, l, leader) {
        return mind.because(
            "waiting_for_leader",
            format!("waiting for {leader} to lead"),
        );
    }
    // Until its first checkpoint the leader's control file still names the old timeline, and pg_rewind would
    // see nothing to do.
    let checkpointed = mind
        .o
        .peers
        .get(leader)
        .and_then(|p| p.status.checkpoint_timeline);
    if checkpointed != Some(l.timeline) {
        return mind.because(
            "waiting_for_checkpoint",
            format!(
                "waiting for {leader}'s first checkpoint on timeline {}",
                l.timeline
            ),
        );
    }
    mind.start(Task::Rewind {
        from: leader.clone(),
        fork,
        term: l.term,
    });
}

/// The leader no longer has the WAL that this member needs: cloned anew, once acknowledged commits do not rest on it.
fn slot_lost(mind: &mut Mind<'_>, l: &Leadership, leader: &MemberId, waited: Duration) {
    let lost =
        format!("{leader} no longer has the WAL that this member needs (its slot there is lost)");
    let me = mind.o.me.reference();
    let needed = me.is_some_and(|me| l.sync.holds(&me.member, me.incarnation));
    // A leader that does not take it out by then, in `strict`, waits for its new life.
    if needed && waited < order::patience(mind) {
        let text = format!(
            "{lost}; waiting to be taken out of the sync set: until then acknowledged commits may rest on this copy"
        );
        return mind.because("slot_lost", text);
    }
    mind.because("slot_lost", format!("{lost}: cloning anew"));
    mind.out.memory.not_streaming_since = None;
    mind.start(Task::Rewind {
        from: leader.clone(),
        fork: None,
        term: l.term,
    });
}

/// Configured to follow the leader, or a standby of it: does it?
fn streaming_rule(
    mind: &mut Mind<'_>,
    view: &ClusterView,
    l: &Leadership,
    (leader, source): (&MemberRef, &MemberId),
    s: &Server,
) {
    if s.streaming || !l.open {
        mind.out.memory.not_streaming_since = None;
        let what = if s.streaming {
            "streaming from"
        } else {
            "waiting for"
        };
        mind.because("standby", format!("{what} {source} (term {})", l.term));
        return slots::take_rule(mind, view, l, (leader, source), s);
    }
    let now = mind.o.now;
    let since = *mind.out.memory.not_streaming_since.get_or_insert(now);
    mind.because("not_streaming", format!("not streaming from {source} yet"));
    if *source != leader.member {
        // It serves this member alone; what the leader has is judged once the leader is followed.
        if now.since(since) >= UPSTREAM_MAX {
            mind.out.memory.upstream_failed_at = Some(now);
            mind.out.memory.not_streaming_since = None;
        }
        return;
    }
    let timelines = view
        .timelines
        .as_ref()
        .map(|t| t.value.clone())
        .unwrap_or_default();
    let relation = timelines.relation(s.timeline, s.end, l.timeline);
    if relation != Relation::Prefix && s.end_is_exact {
        return rewind(mind, l, &leader.member, s, relation);
    }
    let lost = mind
        .o
        .peers
        .get(&leader.member)
        .is_some_and(|p| p.status.lost_slots.contains(&mind.o.me.id.slot_name()));
    if lost && now.since(since) >= LOST_SLOT_MAX && serves(mind, l, &leader.member) {
        return slot_lost(mind, l, &leader.member, now.since(since));
    }
    if now.since(since) >= NOT_STREAMING_MAX && serves(mind, l, &leader.member) {
        // With its slot intact the leader has all the WAL this member needs: no copy would stream any better.
        let slots = mind.o.peers.get(&leader.member).map(|p| &p.status.slots);
        let kept = slots.and_then(|s| s.get(&mind.o.me.id.slot_name()));
        if kept.is_some_and(|from| *from <= s.end) && relation == Relation::Prefix {
            let text = format!(
                "{} has the WAL and does not stream it; see {} in this member's directory for PostgreSQL's reason",
                leader.member, "pg.log"
            );
            return mind.because("cannot_stream", text);
        }
        let text = format!(
            "could not stream from {} for {} s although it is open: rewinding, or cloning anew",
            leader.member,
            NOT_STREAMING_MAX.as_secs()
        );
        mind.because("stuck", text);
        mind.out.memory.not_streaming_since = None;
        mind.start(Task::Rewind {
            from: leader.member.clone(),
            fork: None,
            term: l.term,
        });
    }
}

/// Stops PostgreSQL cleanly.
pub(super) fn stop(mind: &mut Mind<'_>, how: StopHow, why: &str) {
    mind.start(Task::Stop {
        how,
        why: why.to_owned(),
    });
}
