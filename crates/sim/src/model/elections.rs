//! Elections: opened, sealed in, won; the winner promotes (failover protocol, 3.1).

use super::action::Action;
use super::real::Election;
use super::state::{Lead, MEMBERS_MAX, Right, Role, Seal, State};
use super::world::{Next, World, continues, end_receiver, in_force_from_the_start, small, stale};
use super::{Broken, promises};

impl World {
    /// Opening, sealing, getting WAL, winning, promoting.
    pub(super) fn election(&mut self, s: &State, out: &mut Vec<Next>) {
        if s.leader != 0 {
            let held = s
                .members
                .iter()
                .any(|m| m.lead.right == Right::Lease && m.lead.term == s.term);
            if s.term < self.config.terms && !held {
                let mut next = *s;
                next.term += 1;
                next.previous = s.leader;
                next.previous_incarnation = s.leader_incarnation;
                next.leader = 0;
                next.leader_incarnation = 0;
                next.seals = [Seal::default(); MEMBERS_MAX];
                stale(&mut next);
                out.push((Action::Open, next, None));
            }
            for m in self.members().filter(|m| s.leader == small(m + 1)) {
                self.promote(s, m, out);
            }
            return;
        }
        for m in self.members() {
            let me = &s.members[m];
            if me.role != Role::Standby || me.floor > s.term {
                continue;
            }
            let position = me.log.position();
            let seal = Seal {
                incarnation: me.incarnation,
                position,
            };
            if s.seals[m] != seal {
                let free = !me.promised || self.rules.may_seal(me.floor, s.term);
                if free || self.is_broken(Broken::SealWhilePromised) {
                    let mut next = *s;
                    next.members[m].floor = s.term;
                    if !self.is_broken(Broken::SealKeepsStreaming) {
                        end_receiver(&mut next, m);
                    }
                    next.seals[m] = seal;
                    out.push((Action::Seal(m), next, None));
                }
            }
            if s.seals[m].incarnation == me.incarnation {
                self.win(s, m, out);
                self.catch_up(s, m, out);
            }
        }
    }

    /// A sealed member that may lead gets what a sealed one holds that may not, a record at a time: what it gets in
    /// the end is for its next seal to say.
    fn catch_up(&mut self, s: &State, m: usize, out: &mut Vec<Next>) {
        let me = s.members[m];
        let election = Election {
            sync: s.sync,
            previous: (s.previous, s.previous_incarnation),
            seals: s.seals,
            candidate: small(m),
            kinds: s.members.map(|m| m.kind),
        };
        for from in self.members().filter(|from| *from != m) {
            let holder = &s.members[from];
            let sealed = s.seals[from].incarnation == holder.incarnation
                && holder.floor == s.term
                && holder.role == Role::Standby;
            let record = holder.log.at(me.log.len());
            if !sealed || record == 0 || !continues(me.log, holder.log) {
                continue;
            }
            if !self.rules.catches_up(&election, from) {
                continue;
            }
            let mut next = *s;
            if self.is_broken(Broken::CatchUpClaimed) {
                next.seals[m].position = s.seals[from].position;
            } else {
                next.members[m].log = me.log.push(record);
            }
            out.push((Action::CatchUp(m, from), next, None));
        }
    }

    fn win(&mut self, s: &State, m: usize, out: &mut Vec<Next>) {
        let previous = (s.previous, s.previous_incarnation);
        let mut sync = s.sync;
        if self.is_broken(Broken::OneSealTooFew) && sync.k() > 0 {
            sync = sync.with_k(sync.k() + 1);
        }
        let election = Election {
            sync,
            previous,
            seals: s.seals,
            candidate: small(m),
            kinds: s.members.map(|m| m.kind),
        };
        if !self.rules.wins(&election) {
            return;
        }
        let me = s.members[m];
        let left_out = self.is_broken(Broken::OldLeaderLeftOut);
        let before = if left_out { (0, 0) } else { previous };
        let winner = (small(m + 1), me.incarnation);
        let mut next = *s;
        next.sync = self.rules.next_sync(s.sync, before, winner);
        (next.leader, next.leader_incarnation) = winner;
        (next.previous, next.previous_incarnation) = (0, 0);
        next.seals = [Seal::default(); MEMBERS_MAX];
        next.line = me.log;
        stale(&mut next);
        next.members[m].lead = Lead {
            term: s.term,
            known: next.sync,
            fresh: true,
            ..Lead::default()
        };
        let keeps = s.sync.mode().keeps();
        if keeps {
            next.kept |= 1 << s.term;
        } else {
            // What this loses `async` may lose.
            next.acknowledged = s.acknowledged.common(me.log);
        }
        let lost = (keeps && !s.acknowledged.begins(me.log)).then(|| {
            format!(
                "LOST: the leader of term {} does not have all that was acknowledged",
                s.term
            )
        });
        let broken = lost.or_else(|| promises::still_led(s, m));
        out.push((Action::Win(m), next, broken));
    }

    /// The sync set is in force before the first write.
    fn promote(&mut self, s: &State, m: usize, out: &mut Vec<Next>) {
        let me = &s.members[m];
        let ready = me.role == Role::Standby
            && me.lead.term == s.term
            && me.floor == s.term
            && me.incarnation == s.leader_incarnation
            && me.log.last() < s.term
            && me.log.has_room();
        if !ready {
            return;
        }
        let mut next = *s;
        end_receiver(&mut next, m);
        let begins = self.begins(me.lead.known);
        let me = &mut next.members[m];
        me.role = Role::Primary;
        me.log = me.log.push(s.term);
        if self.config.promises {
            me.lead.right = Right::Lease;
        }
        in_force_from_the_start(me, begins);
        let other = (self.members())
            .any(|o| o != m && self.config.promises && s.members[o].lead.right != Right::None);
        let broken = other.then(|| format!("two leaders may acknowledge in term {}", s.term));
        out.push((Action::Promote(m), next, broken));
    }
}
