//! Standby promises (failover protocol, 2.7): what a leader that cannot renew may rest on.
//!
//! Clocks enter by one rule only: a promise runs out after the right that rests on it. (The leader counts
//! from before it asked, the member from when it was asked, and clock rates agree within the margin.)

use super::Broken;
use super::action::Action;
use super::real::PromiseQuestion;
use super::state::{Kind, Lead, MEMBERS_MAX, Right, Role, Set, State};
use super::world::{Next, World, end_postgres, remember, small};

/// May a leader with these promises go on? In every sync set that the coordinator may hold, the promises must
/// leave too few for an election: k of V are needed.
fn enough(world: &World, lead: &Lead) -> bool {
    if lead.earlier_life {
        return false;
    }
    let known_only = world.config.broken == Some(Broken::PromisesForKnownSet);
    let others = lead.proposed.iter().flatten().filter(|_| !known_only);
    let fewer = world.config.broken == Some(Broken::FewerPromises);
    std::iter::once(&lead.known)
        .chain(others)
        .all(|set| world.rules.suffices(*set, lead.promises, fewer))
}

/// May a leader propose `set`? One that goes on by promises only if they cover that set, too: it may be written
/// without the leader hearing of it, and the next election counts by it.
pub fn cover(world: &World, lead: &Lead, set: Set) -> bool {
    let mut after = *lead;
    remember(&mut after, set);
    lead.right != Right::Promises
        || world.config.broken == Some(Broken::ProposesBeyondPromises)
        || enough(world, &after)
}

/// An election of a higher term is won by `winner`: nobody may still lead by promises.
pub fn still_led(s: &State, winner: usize) -> Option<String> {
    let other = (0..MEMBERS_MAX).any(|m| {
        m != winner
            && s.members[m].lead.right == Right::Promises
            && s.members[m].role == Role::Primary
    });
    other.then(|| {
        format!(
            "the election of term {} was won while a promised leader may still acknowledge",
            s.term
        )
    })
}

/// What can happen to leases and promises.
pub fn events(world: &World, s: &State, out: &mut Vec<Next>) {
    for p in 0..world.config.members {
        let me = &s.members[p];
        if me.lead.term != 0 {
            leader(world, s, p, out);
        }
        if me.promised {
            member(world, s, p, out);
        }
    }
}

fn leader(world: &World, s: &State, p: usize, out: &mut Vec<Next>) {
    let lead = s.members[p].lead;
    if s.members[p].role == Role::Primary {
        for m in 0..world.config.members {
            promise(world, s, p, m, out);
        }
    }
    match lead.right {
        Right::Lease => {
            let mut next = *s;
            if enough(world, &lead) && s.members[p].role == Role::Primary {
                next.members[p].lead.right = Right::Promises;
            } else {
                next.members[p].lead.right = Right::None;
                end_postgres(&mut next, p);
            }
            out.push((Action::LeaseEnds(p), next, None));
        }
        Right::Promises => {
            let mut next = *s;
            next.members[p].lead.right = Right::None;
            end_postgres(&mut next, p);
            out.push((Action::Stopped(p), next, None));
            if s.term == lead.term {
                let mut next = *s;
                next.members[p].lead.right = Right::Lease;
                out.push((Action::Renews(p), next, None));
            }
        }
        Right::None => {}
    }
}

/// A member that streams from `p` promises; `p` hears of it later, if at all.
fn promise(world: &World, s: &State, p: usize, m: usize, out: &mut Vec<Next>) {
    let (leader, me) = (&s.members[p], &s.members[m]);
    let after_seal = world.config.broken == Some(Broken::PromiseAfterSeal);
    let asked = PromiseQuestion {
        leader: small(p),
        term: leader.lead.term,
        listed: leader.lead.known.incarnation(m),
        floor: me.floor,
        incarnation: me.incarnation,
        upstream: me.upstream,
    };
    let sealed = me.role == Role::Standby && me.floor > leader.lead.term;
    let listed = leader.lead.known.holds(m, me.incarnation);
    let may = world.rules.promises(asked) || (after_seal && sealed && listed);
    // A receiver is in no election, and gives no promises.
    let member = m != p && me.kind != Kind::Receiver;
    if member && me.role == Role::Standby && may && !me.promised {
        let mut next = *s;
        next.members[m].promised = true;
        out.push((Action::Promise(m, p), next, None));
    }
    let heard = leader.lead.promises[m] == me.incarnation;
    let word = me.kind == Kind::Receiver && world.config.broken == Some(Broken::ReceiverPromises);
    if word && me.role == Role::Standby && listed && !heard {
        let mut next = *s;
        next.members[p].lead.promises[m] = me.incarnation;
        out.push((Action::Promised(p, m), next, None));
    }
    let to_this_leader = me.floor == leader.lead.term || after_seal;
    if me.promised && to_this_leader && !heard && me.role != Role::Empty {
        let mut next = *s;
        next.members[p].lead.promises[m] = me.incarnation;
        out.push((Action::Promised(p, m), next, None));
    }
}

fn member(world: &World, s: &State, m: usize, out: &mut Vec<Next>) {
    let mut next = *s;
    next.members[m].promised = false;
    if world.config.broken == Some(Broken::PromiseForgotten) {
        out.push((Action::RestartPromiser(m), next, None));
    }
    // What has run out counts no more, and it does not run out under a right that needs it.
    let mut needed = false;
    for lead in next.members.iter_mut().map(|p| &mut p.lead) {
        lead.promises[m] = 0;
        needed |= lead.right == Right::Promises && !enough(world, lead);
    }
    if !needed {
        out.push((Action::RunsOut(m), next, None));
    }
}
