//! Faults inside the leader's host: hand over while it can, give up where it cannot any more
//! (failover protocol, section 4).
//!
//! Two ways out of a leadership. **Handing over** is a switchover that the member asks of itself: a disk that
//! fills, a PostgreSQL that crashes again and again. **Giving up** is for a PostgreSQL that serves nobody:
//! storage that hangs, a postmaster that lets nobody in. It is killed, and because processes that wait in
//! a dead disk do not die, the lease is left to run out; if they do die, the next election is opened at once.

use std::collections::BTreeSet;
use std::time::Duration;

use super::leader::can_hand_over;
use super::sync_set::opening;
use super::{LeaseWish, Mind};
use crate::health::{Health, Room, assess, crash_loop, disk_full, disk_is_urgent, storage_stalled};
use crate::libraries::differences;
use crate::observe::{Server, ServerView};
use crate::records::{
    Change, ClusterView, Key, Leadership, Record, Request, RequestKind, RequestPhase,
};
use crate::types::MemberId;

/// Who asks, in a member's own request.
pub(super) const BY_CRATON: &str = "craton";

/// A member that asked to hand over in vain asks again only after this long.
const ASK_AGAIN: Duration = Duration::from_secs(30);
/// One that handed over, and leads again, only so long after it saw another open.
pub(super) const ASK_SOON: Duration = Duration::from_secs(5);

impl Mind<'_> {
    /// This member's own health.
    pub(super) fn own_health(&self) -> Health {
        assess(&self.o.host, &self.settings, self.o.now)
    }

    /// True unless the member says itself that it had better not lead.
    pub(super) fn is_fit(&self, member: &MemberId) -> bool {
        if *member == self.o.me.id {
            return self.own_health().is_fit();
        }
        self.o
            .peers
            .get(member)
            .is_none_or(|p| p.status.health.is_fit())
    }

    /// The members that had better not lead.
    pub(super) fn unfit(&self, view: &ClusterView) -> BTreeSet<MemberId> {
        view.members
            .keys()
            .filter(|m| !self.is_fit(m))
            .cloned()
            .collect()
    }
}

/// What is worth knowing of this host, whoever leads.
pub(super) fn report(mind: &mut Mind<'_>) {
    let health = mind.own_health();
    if health.room == Room::Low {
        mind.because("disk_low", health.warnings.join("; "));
    }
    if !health.is_fit() {
        mind.because("unfit", health.unfit.join("; "));
    }
    let leader = mind.o.view.as_ref().and_then(ClusterView::leader);
    let leader = leader.and_then(|l| Some((&l.member, mind.o.peers.get(&l.member)?)));
    let differs = leader.map(|(id, peer)| {
        let list = differences(&mind.o.libraries, &peer.status.libraries);
        (id.clone(), list)
    });
    if let Some((leader, list)) = differs.filter(|(_, list)| !list.is_empty()) {
        let text = format!("differs from {leader}: {}", list.join("; "));
        mind.because("libraries_differ", text);
    }
}

/// A leader that serves nobody gives up. True if it does: nothing else is to be decided then.
pub(super) fn gives_up(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership) -> bool {
    let running = !matches!(mind.o.server, ServerView::Down);
    let before = mind
        .out
        .memory
        .giving_up
        .clone()
        .filter(|(term, _)| *term == l.term)
        .map(|(_, why)| why);
    if let (true, Some(why)) = (running, &before) {
        give_up(mind, l, why.clone());
        return true;
    }
    if !running {
        return false;
    }
    let Some(why) = storage_stalled(&mind.o.host, &mind.settings, mind.o.now) else {
        return false;
    };
    if mind.is_paused() {
        mind.because("stalled", format!("{why}; nobody takes over in a pause"));
        return false;
    }
    if !can_hand_over(mind, view, l) {
        mind.because("stalled", format!("{why}; nobody else can be promoted now"));
        return false;
    }
    give_up(mind, l, why);
    true
}

/// Kills PostgreSQL without renewing the lease any more.
pub(super) fn give_up(mind: &mut Mind<'_>, l: &Leadership, why: String) {
    mind.because(
        "gives_up",
        format!("this member gives its leadership up: {why}"),
    );
    mind.out.lease = LeaseWish::Leave;
    mind.out.kill = Some(why.clone());
    mind.out.memory.giving_up = Some((l.term, why));
}

/// PostgreSQL is down after this member gave up: the reason that the next election is opened with.
pub(super) fn gave_up(mind: &Mind<'_>, l: &Leadership) -> Option<String> {
    mind.out
        .memory
        .giving_up
        .as_ref()
        .filter(|(term, _)| *term == l.term)
        .map(|(_, why)| format!("{} gave up: {why}", mind.o.me.id))
}

/// The leader's PostgreSQL serves clients, and its host is about to fail it: it asks for a switchover.
pub(super) fn hand_over_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, s: &Server) {
    let now = mind.o.now;
    let is_own = |r: &Request| r.by == BY_CRATON && r.term == l.term;
    // From when it was seen: one that did not come to be written is made again at once.
    if view.request.as_ref().is_some_and(|r| is_own(&r.value)) {
        let at = &mut mind.out.memory.ask_not_before;
        if at.is_none_or(|at| at <= now) {
            *at = Some(now.after(ASK_AGAIN));
        }
    }
    let why = disk_full(&mind.o.host, &mind.settings).or_else(|| crash_loop(&mind.o.host));
    let Some(why) = why.filter(|_| l.open && view.request.is_none() && !mind.is_paused()) else {
        return;
    };
    // The request would lose its race against this member's own change, and be made again much later.
    if opening(mind) {
        return;
    }
    if mind.out.memory.ask_not_before.is_some_and(|at| now < at) {
        return mind.because(
            "hands_over_later",
            "this member tried to hand over a moment ago: it tries again later",
        );
    }
    let Some(heir) = heir(mind, view, l, s) else {
        return mind.because(
            "nobody_fitter",
            "no other member could take over and is better off",
        );
    };
    mind.because("hands_over", format!("handing over to {heir}: {why}"));
    let request = Request {
        id: view.revision,
        kind: RequestKind::Switchover,
        term: l.term,
        to: Some(heir),
        allow_data_loss: false,
        phase: RequestPhase::Asked,
        by: BY_CRATON.into(),
        why: Some(why),
    };
    mind.submit(Change {
        expect: vec![
            (Key::Request, 0),
            (Key::Pause, view.revision_of(&Key::Pause)),
            (Key::Leadership, view.revision_of(&Key::Leadership)),
        ],
        puts: vec![Record::Request(request)],
        deletes: vec![],
    });
}

/// The fit standby to hand over to: by priority, then the one with the most room.
fn heir(mind: &Mind<'_>, view: &ClusterView, l: &Leadership, s: &Server) -> Option<MemberId> {
    if !can_hand_over(mind, view, l) {
        return None;
    }
    let room = |m: &MemberId| {
        let health = mind.o.peers.get(m).map(|p| &p.status.health);
        health.and_then(|h| h.available).unwrap_or(u64::MAX)
    };
    s.standbys
        .iter()
        .filter(|b| b.streaming && mind.is_alive(&b.member) && mind.is_fit(&b.member))
        .filter(|b| l.sync.members.is_empty() || l.sync.holds(&b.member, b.incarnation))
        .filter_map(|b| {
            let priority = view.members.get(&b.member)?.value.priority;
            (priority > 0).then_some((priority, room(&b.member), &b.member))
        })
        .max_by(|a, b| a.0.cmp(&b.0).then(a.1.cmp(&b.1)).then(b.2.cmp(a.2)))
        .map(|(_, _, m)| m.clone())
}

/// True when a switchover cannot wait for running transactions: they fill what is left of the disk.
pub(super) fn is_urgent(mind: &Mind<'_>) -> bool {
    let request = mind.o.view.as_ref().and_then(|v| v.request.as_ref());
    request.is_some_and(|r| r.value.by == BY_CRATON) && disk_is_urgent(&mind.o.host, &mind.settings)
}

/// May PostgreSQL become writable here? Not without a fence that would stop it (rule 2.5).
pub(super) fn is_guarded(mind: &mut Mind<'_>) -> bool {
    let Some(why) = mind.o.host.no_fence.clone() else {
        return true;
    };
    mind.because(
        "no_fence",
        format!("PostgreSQL does not become writable here: {why}"),
    );
    false
}
