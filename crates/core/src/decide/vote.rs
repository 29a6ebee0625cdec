//! Opening an election, sealing in it, winning it (failover protocol, 2.3 and 3.1).

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Mind, OpenElection, Task, receivers};
use crate::election::{Ballot, CatchUp};
use crate::observe::ServerView;
use crate::records::{
    Change, ClusterView, Key, Leadership, MemberRef, Record, RequestKind, Seal, TimelineRecord,
};
use crate::settings::Durability;
use crate::sync::SyncSet;
use crate::timeline::Relation;
use crate::types::{Lsn, MemberId, TimelineId};

impl Mind<'_> {
    /// Proposes the election after `l`; the agent submits it once the old lease is free for good.
    pub(super) fn open_election(
        &mut self,
        view: &ClusterView,
        l: &Leadership,
        preferred: Option<MemberId>,
        allow_data_loss: bool,
        cause: &str,
    ) {
        if self.is_below_floor(l) {
            return;
        }
        let term = l.term.next();
        let next = Leadership {
            term,
            leader: None,
            previous: l.leader.clone(),
            open: false,
            restarted: false,
            preferred,
            allow_data_loss,
            cause: cause.to_owned(),
            ..l.clone()
        };
        let history = self.event(view, term, "election", format!("election opened: {cause}"));
        // A pause and a request that came meanwhile would have decided otherwise.
        let rests_on = [Key::Leadership, Key::Pause, Key::Request];
        let expect = rests_on.map(|key| (key.clone(), view.revision_of(&key)));
        let change = Change {
            expect: expect.into(),
            puts: vec![Record::Leadership(next), history],
            deletes: vec![],
        };
        self.out.open = Some(OpenElection {
            after: l.term,
            change: change.keeping_history(view),
        });
    }

    /// This member has followed or sealed a later term than the records speak of, so they are older than what it knows: a
    /// store that was restored from an old copy. Who votes, wins or leads by them would use terms and timeline numbers
    /// twice, and a leader that was deposed would win by its own seal.
    pub(super) fn is_below_floor(&mut self, l: &Leadership) -> bool {
        let floor = self.o.me.floor;
        if l.term >= floor {
            return false;
        }
        let text = format!(
            "the cluster's records speak of term {}, and this member has sealed or followed term {floor}: they are an old copy, and it neither votes nor leads by them; restore the newest copy, or (in etcd) `craton coordinator rebuild`",
            l.term
        );
        self.because("records_are_old", text);
        true
    }

    /// By such records PostgreSQL is started as a standby that streams from nobody, at most.
    pub(super) fn only_starts(&mut self) {
        if matches!(self.o.server, ServerView::Down) {
            self.start(Task::StartStandby);
        }
    }
}

/// An election is open: seal, be counted, win.
pub(super) fn election_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership) {
    if mind.is_below_floor(l) {
        return mind.only_starts();
    }
    let now = mind.o.now;
    if mind
        .out
        .memory
        .election_since
        .is_none_or(|(term, _)| term != l.term)
    {
        mind.out.memory.election_since = Some((l.term, now));
    }
    let opened = format!("the election of term {} is open: {}", l.term, l.cause);
    mind.because("election", opened);
    receivers::seal_rule(mind, view, l);
    match &mind.o.server {
        ServerView::Down => {
            mind.because(
                "starting",
                "starting as a standby to find the end of the WAL",
            );
            mind.start(Task::StartStandby);
        }
        ServerView::Silent { .. } => mind.because("silent", "PostgreSQL does not answer yet"),
        // The fence rule has already stopped it.
        ServerView::Running(s) if !s.in_recovery => {}
        ServerView::Running(_) => match mind.o.sealed.clone().filter(|s| s.term == l.term) {
            None if mind.o.promises.held_until.is_some_and(|t| t > now) => mind.because(
                "promised",
                "this member has promised the former leader not to seal yet: waiting for the end of that promise",
            ),
            None => mind.start(Task::Seal { term: l.term }),
            Some(seal) => sealed_rule(mind, view, l, seal),
        },
    }
}

fn sealed_rule(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, seal: Seal) {
    let me = mind.o.me.id.clone();
    if view.seals.get(&me).map(|s| &s.value) != Some(&seal) {
        let key = Key::Seal(me.clone());
        mind.submit(Change {
            // Only while this very election is open.
            expect: vec![
                (Key::Leadership, view.revision_of(&Key::Leadership)),
                (key.clone(), view.revision_of(&key)),
            ],
            puts: vec![Record::Seal(me, seal)],
            deletes: vec![],
        });
        return mind.because("sealing", "telling the coordinator what this member holds");
    }
    let mut alive: BTreeSet<MemberId> = view
        .members
        .keys()
        .filter(|m| mind.is_alive(m))
        .cloned()
        .collect();
    // Who gave its seal a moment ago can give WAL.
    alive.extend(
        receivers::in_v(view, l)
            .filter(|(m, r)| mind.receiver(m, r).is_some())
            .map(|(m, _)| m.clone()),
    );
    let unfit = mind.unfit(view);
    let tally = Ballot {
        leadership: l,
        seals: &view.seals,
        members: &view.members,
        alive: &alive,
        unfit: &unfit,
        leader_lsn: leader_lsn(mind, view, l),
        max_lag_bytes: mind.settings.max_lag_bytes,
    }
    .tally();
    if (l.durability == Durability::Async || l.allow_data_loss) && !all_heard(mind, view, l) {
        return mind.because(
            "collecting",
            "waiting a moment for the other members' seals",
        );
    }
    if let Some(wanted) = awaited(mind, view, l, &alive) {
        return mind.because(
            "collecting",
            format!("waiting a moment for the seal of {wanted}, which a switchover wants"),
        );
    }
    if let Some(catch_up) = &tally.catch_up {
        return catch_up_rule(mind, view, l, catch_up, &seal, &tally.why);
    }
    if tally.winner.as_ref() == Some(&me) && unfit.contains(&me) && others_may_come(mind, view, l) {
        return mind.because(
            "collecting",
            "this member is not fit to lead: waiting a moment for the others' seals",
        );
    }
    if tally.winner.as_ref() == Some(&me) {
        mind.because(
            "won",
            format!("this member takes the leadership: {}", tally.why),
        );
        win(mind, view, l, &seal, &tally.why);
    } else if let Some(winner) = &tally.winner {
        mind.because(
            "yields",
            format!("waiting for {winner} to take the leadership: {}", tally.why),
        );
    } else {
        mind.because(
            "no_winner",
            format!("nobody can be promoted: {}", tally.why),
        );
        if all_heard(mind, view, l) {
            operator_override(mind, view, l);
        }
    }
}

/// How long one member may try to get the missing WAL before the next one may.
const CATCH_UP_TURN: Duration = Duration::from_secs(15);

/// 3.1.4: a member that never leads holds the most. One of the others gets the rest from it, seals anew and wins
/// as usual; the others take their turn if it does not.
fn catch_up_rule(
    mind: &mut Mind<'_>,
    view: &ClusterView,
    l: &Leadership,
    c: &CatchUp,
    seal: &Seal,
    why: &str,
) {
    let timelines = view
        .timelines
        .as_ref()
        .map(|t| t.value.clone())
        .unwrap_or_default();
    let able: Vec<&MemberId> = c
        .followers
        .iter()
        .filter(|m| {
            view.seals.get(*m).is_some_and(|s| {
                let s = &s.value;
                timelines.relation(s.timeline, s.lsn, c.timeline) == Relation::Prefix
            })
        })
        .collect();
    let since = mind.out.memory.election_since;
    let waited = since.map_or(Duration::ZERO, |(_, at)| mind.o.now.since(at));
    let turn = usize::try_from(waited.as_secs() / CATCH_UP_TURN.as_secs()).unwrap_or(usize::MAX);
    if let Some(safe) = c.or_else.as_ref().filter(|_| turn >= able.len()) {
        if *safe == mind.o.me.id {
            let why = format!(
                "{} could not be had; {safe} holds every acknowledged commit",
                c.lsn
            );
            mind.because("won", format!("this member takes the leadership: {why}"));
            return win(mind, view, l, seal, &why);
        }
        return mind.because(
            "yields",
            format!("waiting for {safe} to take the leadership"),
        );
    }
    match turn.checked_rem(able.len()).and_then(|i| able.get(i)) {
        Some(turns) if **turns == mind.o.me.id => {
            mind.because("catching_up", why);
            mind.start(Task::CatchUp {
                from: c.from.clone(),
                receiver: view.receivers.get(&c.from).map(|r| r.value.api.clone()),
                term: l.term,
                timeline: c.timeline,
                lsn: c.lsn,
            });
        }
        Some(turns) => mind.because(
            "yields",
            format!("waiting for {turns} to get the missing WAL from {}: {why}", c.from),
        ),
        None => mind.because(
            "no_winner",
            format!(
                "nobody can be promoted: {} holds the most WAL and never leads, and the WAL of the others is no part of its history; give it a priority above 0",
                c.from
            ),
        ),
    }
}

/// The former leader's last known flush position: what it sealed, or announced last as the leader.
fn leader_lsn(mind: &Mind<'_>, view: &ClusterView, l: &Leadership) -> Option<Lsn> {
    let previous = l.previous.as_ref()?;
    let seal = view.seals.get(&previous.member).map(|s| &s.value);
    let sealed = seal.filter(|s| s.term == l.term && s.incarnation == previous.incarnation);
    let told = mind.out.memory.leader_at.as_ref();
    let told = told.filter(|(leader, _)| leader == previous);
    sealed.map(|s| s.lsn).or(told.map(|(_, lsn)| *lsn))
}

/// The member that a switchover wants, while it lives and has not sealed: where fewer seals are needed than
/// there are members, another could win before it is heard. Waited for at most a ttl.
fn awaited(
    mind: &Mind<'_>,
    view: &ClusterView,
    l: &Leadership,
    alive: &BTreeSet<MemberId>,
) -> Option<MemberId> {
    let wanted = l.preferred.as_ref().filter(|p| alive.contains(*p))?;
    let sealed = view
        .seals
        .get(wanted)
        .is_some_and(|s| s.value.term == l.term);
    let (_, since) = mind.out.memory.election_since?;
    let in_time = mind.o.now.since(since) < mind.settings.ttl();
    (in_time && !sealed).then(|| wanted.clone())
}

/// Within a ttl of the election's opening, while a member that is fit to lead has not sealed.
fn others_may_come(mind: &Mind<'_>, view: &ClusterView, l: &Leadership) -> bool {
    let in_time = mind
        .out
        .memory
        .election_since
        .is_some_and(|(_, at)| mind.o.now.since(at) < mind.settings.ttl());
    let pending = |m: &MemberId| {
        *m != mind.o.me.id
            && mind.is_alive(m)
            && mind.is_fit(m)
            && view.seals.get(m).is_none_or(|s| s.value.term != l.term)
    };
    in_time && view.members.keys().any(pending)
}

/// In `async`, or when the operator accepts a loss, any seal may win: all that are alive get a moment to give
/// theirs, so that no more is lost than must be.
fn all_heard(mind: &Mind<'_>, view: &ClusterView, l: &Leadership) -> bool {
    let all = view
        .members
        .keys()
        .filter(|m| mind.is_alive(m))
        .all(|m| view.seals.get(m).is_some_and(|s| s.value.term == l.term));
    let patience = if l.durability == Durability::Async && !l.allow_data_loss {
        mind.settings.heartbeat()
    } else {
        mind.settings.ttl()
    };
    let waited = mind
        .out
        .memory
        .election_since
        .is_some_and(|(_, t)| mind.o.now.since(t) >= patience);
    all || waited
}

/// Takes the leadership: one compare-and-set writes leader, sync set and reserved timeline together.
fn win(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership, seal: &Seal, why: &str) {
    let me = MemberRef {
        member: mind.o.me.id.clone(),
        incarnation: seal.incarnation,
    };
    let mut timelines = view
        .timelines
        .as_ref()
        .map(|t| t.value.clone())
        .unwrap_or_default();
    // Recovered records may not know the numbers that have sealed, and none is used twice.
    let sealed = view.seals.values().filter(|s| s.value.term == l.term);
    let sealed = sealed.map(|s| s.value.timeline.0.saturating_add(1)).max();
    let timeline = timelines.next_free().max(TimelineId(sealed.unwrap_or(0)));
    timelines.0.push(TimelineRecord {
        timeline,
        term: l.term,
        parent: Some(seal.timeline),
        fork: seal.lsn,
        member: me.member.clone(),
    });
    let leadership = Leadership {
        leader: Some(me.clone()),
        previous: None,
        sync: next_sync(l, &me),
        timeline,
        open: false,
        restarted: false,
        preferred: None,
        allow_data_loss: false,
        recovered: false,
        ..l.clone()
    };
    let lossy = if l.allow_data_loss {
        " (the operator accepted the loss of data)"
    } else {
        ""
    };
    let text = format!(
        "{} elected, timeline {timeline} from {} at {}: {why}{lossy}",
        me.member, seal.timeline, seal.lsn
    );
    let history = mind.event(view, l.term, "elected", text);
    let deletes = if view.request.is_some() {
        vec![Key::Request]
    } else {
        vec![]
    };
    mind.submit(Change {
        expect: vec![
            (Key::Leadership, view.revision_of(&Key::Leadership)),
            (Key::Timelines, view.revision_of(&Key::Timelines)),
            (Key::Request, view.revision_of(&Key::Request)),
        ],
        puts: vec![
            Record::Leadership(leadership),
            Record::Timelines(timelines),
            history,
        ],
        deletes,
    });
}

/// 3.1, rule 5: V' = V plus the old leader, less the winner, and k' = k. Every acknowledged commit is on
/// k + 1 of the former leader and V, so on k of V' whoever won. In `async` the others of V may follow the winner;
/// the former leader only once it streams again, as its WAL may have a tail of its own.
pub fn next_sync(l: &Leadership, winner: &MemberRef) -> SyncSet {
    if l.allow_data_loss {
        return SyncSet::default();
    }
    let mut members = l.sync.members.clone();
    if l.durability == Durability::Async {
        members.remove(&winner.member);
        return SyncSet { members, k: 0 };
    }
    if let Some(previous) = &l.previous {
        members.insert(previous.member.clone(), previous.incarnation);
    }
    members.remove(&winner.member);
    let k = l
        .sync
        .k
        .min(u32::try_from(members.len()).unwrap_or(u32::MAX));
    if k == 0 {
        SyncSet::default()
    } else {
        SyncSet { members, k }
    }
}

/// `craton failover --allow-data-loss` while an election is stuck: nobody can win otherwise.
fn operator_override(mind: &mut Mind<'_>, view: &ClusterView, l: &Leadership) {
    let Some(request) = view.request.as_ref().map(|r| &r.value) else {
        return;
    };
    if request.kind != RequestKind::Failover || !request.allow_data_loss || l.allow_data_loss {
        return;
    }
    let text = format!(
        "{} asked to fail over and accepted the loss of acknowledged commits",
        request.by
    );
    mind.because("override", text.clone());
    let history = mind.event(view, l.term, "override", text);
    let next = Leadership {
        allow_data_loss: true,
        preferred: request.to.clone(),
        ..l.clone()
    };
    mind.submit(Change {
        expect: vec![(Key::Leadership, view.revision_of(&Key::Leadership))],
        puts: vec![Record::Leadership(next), history],
        deletes: vec![],
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Incarnation, Term, TimelineId};

    #[test]
    fn the_old_leader_stays_in_v() {
        let id = |n: &str| MemberId::new(n).unwrap();
        let l = Leadership {
            term: Term(2),
            leader: None,
            previous: Some(MemberRef {
                member: id("a"),
                incarnation: Incarnation(1),
            }),
            sync: SyncSet {
                members: [(id("b"), Incarnation(1)), (id("c"), Incarnation(1))].into(),
                k: 1,
            },
            durability: Durability::Quorum,
            timeline: TimelineId(1),
            open: false,
            restarted: false,
            preferred: None,
            allow_data_loss: false,
            recovered: false,
            cause: String::new(),
        };
        let winner = MemberRef {
            member: id("b"),
            incarnation: Incarnation(1),
        };
        let next = next_sync(&l, &winner);
        assert_eq!(
            next.members
                .keys()
                .map(MemberId::as_str)
                .collect::<Vec<_>>(),
            ["a", "c"]
        );
        assert_eq!(next.k, 1);
        // The former leader itself comes back and wins: V stays.
        let back = MemberRef {
            member: id("a"),
            incarnation: Incarnation(1),
        };
        assert_eq!(next_sync(&l, &back), l.sync);
    }
}
