//! The leader's duties: hold the lease, promote, open, hand over.

use super::health::{gave_up, give_up, gives_up as gives_up_serving, hand_over_rule, is_guarded};
use super::request::{cause, request_rule, schedule_rule};
use super::rolling::rolling_rule;
use super::sync_set::{is_settled_for, names_of, promise_needs, settle_early, sync_rule};
use super::{Mind, Task, TaskKind, receivers};
use crate::observe::{DataView, Server, ServerView};
use crate::records::{Change, ClusterRecord, ClusterView, Key, Leadership, Record, RequestPhase};
use crate::settings::Durability;
use crate::types::MemberId;

/// This member leads the present term.
pub(super) fn leader_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, fenced: bool) {
    if mind.is_below_floor(l) {
        // The lease is not renewed: a primary that there may be ends with it.
        return mind.only_starts();
    }
    let data_timeline = match &mind.o.data {
        DataView::Present { timeline, .. } => *timeline,
        _ => return,
    };
    if l.recovered {
        // By these records it leads, and may have been the last one that did, or not: others may have elected somebody
        // by voters that are gone. So it gives way as anybody would, whether it was promoted in that term or not.
        mind.because(
            "demoted",
            "an operator recovered the records, in which this member leads: another may have led since, so an election decides",
        );
        let cause = "the records were recovered by an operator";
        return step_aside(mind, view, l, cause);
    }
    // pg_control names the timeline of the last checkpoint, which comes some time after a promotion; who was
    // open for clients in this term was primary in it.
    let was_primary = l.open || data_timeline == l.timeline;
    let served =
        l.open || (was_primary && view.cluster.as_ref().is_some_and(|c| c.value.bootstrapped));
    let lapsed = matches!(mind.o.server, ServerView::Down) && !mind.lease_runs(l.term) && served;
    // A switchover gave the lease up itself, and goes on.
    let handing_over = lapsed
        && view
            .request
            .as_ref()
            .is_some_and(|r| r.value.term == l.term && r.value.phase == RequestPhase::Hold);
    if mind.is_paused() && (fenced || lapsed) && !handing_over {
        // A primary without a lease is stopped, paused or not: nobody can know who else writes by now. What a
        // pause suspends is what would come next, and nobody else begins it either.
        let text = "the lease was lost, so PostgreSQL was stopped; it stays down until `craton resume`, or `craton failover` promotes somebody";
        return mind.because("stopped_by_fence", text);
    }
    if !fenced && !mind.is_paused() && gives_up_serving(mind, view, l) {
        return;
    }
    match &mind.o.server {
        _ if fenced => {
            let cause = gave_up(mind, l).unwrap_or_else(|| "the lease ran out".into());
            step_aside(mind, view, l, &cause);
        }
        ServerView::Down if !mind.lease_runs(l.term) && served => {
            // It lapsed: whoever is first opens the next election; the start is one as a standby.
            let cause = gave_up(mind, l)
                .unwrap_or_else(|| "the lease lapsed while PostgreSQL was down".into());
            mind.because("lapsed", "the lease lapsed while PostgreSQL was down");
            step_aside(mind, view, l, &cause);
            mind.start(Task::StartStandby);
        }
        ServerView::Down => down_rule(mind, view, l, was_primary),
        ServerView::Silent { .. } => silent_rule(mind, view, l),
        ServerView::Running(s) if s.in_recovery => recovery_rule(mind, view, l, s),
        ServerView::Running(s) => primary_rule(mind, view, l, s),
    }
    if mind.out.lease == super::LeaseWish::Hold(l.term) {
        // After the changes of this decision: from here on they may be written.
        mind.out.promises = promise_needs(mind, view, l);
    }
}

/// PostgreSQL runs and does not answer: starting, or stuck. A leader
/// that is silent for longer than `crash_grace_ms` is worth replacing, if somebody can take over now.
fn silent_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership) {
    mind.out.lease = super::LeaseWish::Hold(l.term);
    let now = mind.o.now;
    let since = *mind.out.memory.silent_since.get_or_insert(now);
    if mind.o.task.is_none()
        && !mind.is_paused()
        && now.since(since) >= mind.settings.crash_grace()
        && can_hand_over(mind, view, l)
    {
        let why = format!(
            "PostgreSQL has not answered for {:.1} s",
            now.since(since).as_secs_f64()
        );
        return give_up(mind, l, why);
    }
    mind.because("silent", "PostgreSQL does not answer yet");
}

/// Gives the lease up and opens the next election, in which this member's own seal is proof enough.
fn step_aside(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, cause: &str) {
    mind.out.lease = super::LeaseWish::Release(l.term);
    // The first reason counts: the lease, for one, is gone because it was given up.
    let cause = match &mind.out.memory.stepping_aside {
        Some((term, first)) if *term == l.term => first.clone(),
        _ => cause.to_owned(),
    };
    mind.out.memory.stepping_aside = Some((l.term, cause.clone()));
    let request = view
        .request
        .as_ref()
        .map(|r| &r.value)
        .filter(|r| r.term == l.term);
    let preferred = request.and_then(|r| r.to.clone());
    mind.open_election(view, l, preferred, false, &cause);
}

/// PostgreSQL is down on the leader: hand over if another can be promoted now, else restart in place.
fn down_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, was_primary: bool) {
    mind.out.lease = super::LeaseWish::Hold(l.term);
    if mind.o.task.is_some() {
        return mind.because("busy", "PostgreSQL is being started or stopped");
    }
    let request = view
        .request
        .as_ref()
        .map(|r| &r.value)
        .filter(|r| r.term == l.term);
    if let Some(r) = request.filter(|r| r.phase == RequestPhase::Hold) {
        let cause = cause(r, &mind.o.me.id);
        mind.because("handing_over", cause.clone());
        return step_aside(mind, view, l, &cause);
    }
    if !was_primary {
        if gives_up(mind, TaskKind::StartStandby) {
            return step_aside(
                mind,
                view,
                l,
                "PostgreSQL does not start on the elected leader",
            );
        }
        mind.because(
            "starting",
            "elected, but PostgreSQL is down: starting it as a standby to promote it",
        );
        return mind.start(Task::StartStandby);
    }
    // With a plan alone this is so only in a pause: there the switchover comes before, if there is one.
    let ordered =
        view.orders.contains_key(&mind.o.me.id) || mind.is_paused() && mind.is_asked_for(view);
    if mind.is_paused() && !ordered {
        let text = "PostgreSQL is down, and nobody starts it or takes over until `craton resume`";
        return mind.because("stopped_in_pause", text);
    }
    // Also when it is closed: PostgreSQL may fail to start in place for good, and others come back.
    if !ordered && can_hand_over(mind, view, l) {
        let cause = gave_up(mind, l).unwrap_or_else(|| "PostgreSQL died on the leader".into());
        mind.because(
            "handing_over",
            "PostgreSQL died here and another member can be promoted now",
        );
        return step_aside(mind, view, l, &cause);
    }
    mind.because(
        "restarting",
        "nobody else can be promoted now: starting PostgreSQL in place",
    );
    mind.out.memory.giving_up = None;
    if !mind.lease_runs(l.term) {
        return lease_rule(mind, view, l);
    }
    if !is_guarded(mind) {
        return;
    }
    let sync = names_of(mind, l);
    if !is_settled_for(mind, view, l, &sync) {
        return;
    }
    if l.open {
        // Clients come back only when what was recovered is safe, and that is on record before there is a
        // primary: a record that is lost on its way would leave the proxies' door open.
        return submit_open(
            mind,
            view,
            l,
            false,
            "closed",
            "PostgreSQL restarts in place",
        );
    }
    mind.start(Task::StartPrimary { sync });
}

/// So many failures in a row are enough for an elected leader to let another try.
const FAILURES_MAX: u32 = 3;

/// Elected, and what has to be done fails again and again: a new election, in which it may well have a seal
/// too, is better than a term that never opens. At most once a ttl.
fn gives_up(mind: &mut Mind<'_>, kind: TaskKind) -> bool {
    let failed = |f: &crate::observe::TaskFailure| f.kind == kind && f.count >= FAILURES_MAX;
    let hopeless = mind.o.task.is_none() && mind.o.failures.iter().any(failed) && mind.is_settled();
    if hopeless {
        let text = format!("{kind:?} failed {FAILURES_MAX} times or more: a new election decides");
        mind.because("gives_up", text);
    }
    hopeless
}

/// Enough of V is alive to give the seals, and one of them may lead and is fit to.
pub(super) fn can_hand_over(mind: &Mind<'_>, view: &ClusterView, l: &Leadership) -> bool {
    let ready = |m: &MemberId| {
        mind.is_alive(m)
            && mind
                .o
                .peers
                .get(m)
                .is_some_and(|p| p.status.timeline == Some(l.timeline))
    };
    let may_lead =
        |m: &MemberId| view.members.get(m).is_some_and(|r| r.value.priority > 0) && mind.is_fit(m);
    let needed = if l.durability == Durability::Async {
        1
    } else {
        l.sync.seals_needed()
    };
    let alive: Vec<&MemberId> = l
        .sync
        .members
        .iter()
        .filter(|(m, i)| {
            ready(m)
                && mind
                    .o
                    .peers
                    .get(m)
                    .is_some_and(|p| p.status.incarnation == Some(**i))
        })
        .map(|(m, _)| m)
        .collect();
    let copies = receivers::in_v(view, l).filter(|(m, r)| {
        mind.receiver(m, r)
            .is_some_and(|seen| seen.timeline == l.timeline)
    });
    alive.len() + copies.count() >= needed && alive.iter().any(|m| may_lead(m))
}

/// Leads on paper without the lease. Voters that have called the term over refuse it for good; with an even
/// number of them half may refuse while half go on promising, and then nobody could ever open the next
/// election: the leader gives way itself.
fn lease_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership) {
    if mind.is_settled() {
        mind.because(
            "lease_refused",
            "the lease could not be had for a whole ttl: a new election decides",
        );
        return step_aside(mind, view, l, "the elected leader could not get the lease");
    }
    mind.because("waiting_for_lease", "waiting for the lease");
}

/// Elected, and still a standby.
fn recovery_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, s: &Server) {
    let promoting = mind
        .o
        .task
        .as_ref()
        .is_some_and(|t| t.task.kind() == TaskKind::Promote);
    if promoting {
        // PostgreSQL makes the new timeline's files a moment before it says that recovery is over.
        mind.out.lease = super::LeaseWish::Hold(l.term);
        return mind.because("promoting", format!("promoting to timeline {}", l.timeline));
    }
    if l.open || s.timeline >= l.timeline {
        // It was primary in this term once; the lease lapsed since. A new term decides.
        mind.because(
            "demoted",
            "this member led the term and came back as a standby: a new election decides",
        );
        return step_aside(mind, view, l, "the leader came back as a standby");
    }
    mind.out.lease = super::LeaseWish::Hold(l.term);
    if !mind.lease_runs(l.term) {
        return lease_rule(mind, view, l);
    }
    if gives_up(mind, TaskKind::Promote) {
        return step_aside(mind, view, l, "the elected leader cannot be promoted");
    }
    if !is_guarded(mind) {
        if mind.is_settled() {
            return step_aside(mind, view, l, "the elected leader has no fence");
        }
        return;
    }
    mind.because("promoting", format!("promoting to timeline {}", l.timeline));
    let sync = names_of(mind, l);
    mind.start(Task::Promote {
        term: l.term,
        timeline: l.timeline,
        sync,
    });
}

/// Leads, and PostgreSQL is a primary with a running lease (the fence rule has seen to that).
fn primary_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, s: &Server) {
    mind.out.lease = super::LeaseWish::Hold(l.term);
    if s.timeline != l.timeline {
        let text = format!(
            "PostgreSQL took timeline {}, but {} was reserved: it is stopped, so that no timeline number has two contents",
            s.timeline, l.timeline
        );
        mind.because("wrong_timeline", text.clone());
        mind.out.kill = Some(text);
        return;
    }
    let now = mind.o.now;
    if mind
        .out
        .memory
        .leading_since
        .is_none_or(|(t, _)| t != l.term)
    {
        mind.out.memory.leading_since = Some((l.term, now));
        mind.out.memory.healthy.clear();
        mind.out.memory.barrier = None;
    }
    // Another set may have been in force in between, if only for a moment.
    if !s.sync_in_force
        || mind.out.memory.barrier.as_ref().map(|(set, _)| set) != Some(&s.sync_configured)
    {
        mind.out.memory.barrier = None;
    }
    if s.sync_in_force && mind.out.memory.barrier.is_none() {
        // Taken after it was seen in force: every commit acknowledged under the older set is below it.
        mind.out.memory.barrier = Some((s.sync_configured.clone(), s.end));
    }
    if let Some(cluster) = view.cluster.as_ref().filter(|c| !c.value.bootstrapped) {
        return bootstrap_rule(mind, cluster.revision, &cluster.value);
    }
    mind.because(
        "leading",
        format!("leads term {}; commits are flushed on {}", l.term, l.sync),
    );
    if !l.open {
        open_rule(mind, view, l, s);
    } else if s.closed {
        shut_rule(mind, view, l, s);
    }
    sync_rule(mind, view, l, s);
    hand_over_rule(mind, view, l, s);
    request_rule(mind, view, l, s);
    pause_rule(mind, view, l);
    if l.open {
        schedule_rule(mind, view, l, s);
        rolling_rule(mind, view, l, s);
    }
    settle_early(mind, view, l);
}

/// Open on record, and yet clients are refused: the record was on its way when PostgreSQL ended and was started anew.
fn shut_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, s: &Server) {
    if is_safe(mind, view, l, s) {
        mind.because(
            "admitting",
            "what was recovered is safe: letting clients in",
        );
        return mind.start(Task::Admit);
    }
    let text = "PostgreSQL was started in place, and what it recovered is not safe yet";
    submit_open(mind, view, l, false, "closed", text);
}

/// A pause with an end is over by itself; the leader takes it off the board.
fn pause_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership) {
    if view.pause.is_none() || mind.is_paused() {
        return;
    }
    let history = mind.event(
        view,
        l.term,
        "resumed",
        "the pause is over: its time is up".into(),
    );
    mind.submit(Change {
        expect: vec![(Key::Pause, view.revision_of(&Key::Pause))],
        puts: vec![history],
        deletes: vec![Key::Pause],
    });
}

/// Roles and functions come before the first client. The task may be repeated.
fn bootstrap_rule(mind: &mut Mind<'_>, revision: u64, cluster: &ClusterRecord) {
    if !mind.o.bootstrap_done {
        mind.because("bootstrapping", "creating roles and functions");
        return mind.start(Task::Bootstrap);
    }
    let record = ClusterRecord {
        bootstrapped: true,
        ..cluster.clone()
    };
    mind.submit(Change {
        expect: vec![(Key::Cluster, revision)],
        puts: vec![Record::Cluster(record)],
        deletes: vec![],
    });
}

fn submit_open(
    mind: &mut Mind<'_>,
    view: &ClusterView,
    l: &Leadership,
    open: bool,
    kind: &str,
    text: &str,
) {
    let history = mind.event(view, l.term, kind, format!("{}: {text}", mind.o.me.id));
    mind.submit(Change {
        expect: vec![(Key::Leadership, view.revision_of(&Key::Leadership))],
        puts: vec![
            Record::Leadership(Leadership {
                open,
                restarted: !open,
                ..l.clone()
            }),
            history,
        ],
        deletes: vec![],
    });
}

/// What PostgreSQL recovered when it was started in place, if it was, is on k of V (3.3).
fn is_safe(mind: &Mind<'_>, view: &ClusterView, l: &Leadership, s: &Server) -> bool {
    let told = view.history.as_ref().and_then(|h| {
        h.value
            .0
            .iter()
            .rev()
            .find(|e| ["closed", "elected", "initialized"].contains(&e.kind.as_str()))
    });
    // Only a start in place closes it, also one before the term was open for the first time. Earlier versions said it in
    // the history alone; if nothing is there any more, it may have restarted.
    let in_place = l.restarted || s.closed;
    let restarted = in_place || told.is_none_or(|e| e.kind == "closed" && e.term == l.term);
    let barrier = mind
        .out
        .memory
        .barrier
        .as_ref()
        .map_or(s.end, |(_, lsn)| *lsn);
    let flushed = s.standbys.iter().filter(|b| {
        b.streaming && l.sync.holds(&b.member, b.incarnation) && b.flush_lsn >= barrier.min(s.end)
    });
    !restarted || flushed.count() >= l.sync.k as usize
}

/// Opens for clients once the sync set is configured and what was recovered is on k of V (3.3).
fn open_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, s: &Server) {
    let names = names_of(mind, l);
    if !s.sync_configured.covers(&names) {
        mind.because(
            "opening",
            "putting the sync set in force before the first write",
        );
        if !is_settled_for(mind, view, l, &names) {
            return;
        }
        return mind.start(Task::SetSync(names));
    }
    // What a client writes before new WAL begins behind all that the consumer of a slot may have confirmed, that
    // consumer would never see.
    let slots = mind.o.logical.slots.as_ref().is_some_and(|s| !s.is_empty());
    let promotes = mind.o.task.as_ref().map(|t| t.task.kind()) == Some(TaskKind::Promote);
    if slots && promotes {
        return mind.because(
            "leaving_room",
            "opens once new WAL begins behind all that consumers of logical slots may have seen",
        );
    }
    if is_safe(mind, view, l, s) {
        // Before the record: a proxy that reads it must not be refused.
        if s.closed {
            mind.because(
                "admitting",
                "what was recovered is safe: letting clients in",
            );
            return mind.start(Task::Admit);
        }
        return submit_open(
            mind,
            view,
            l,
            true,
            "opened",
            &format!("open for clients on timeline {}", l.timeline),
        );
    }
    mind.because(
        "recovering",
        "opens when the standbys have flushed what was recovered",
    );
}
