//! Standby promises, as the agents ask for them and give them (failover protocol, 2.7).

use std::time::Duration;

use craton_core::decide::LeaseWish;
use craton_core::observe::Lease;
use craton_core::promise::{Answer, Ask, Facts, PromiseNeed, known_term};
use craton_core::{BootTime, Incarnation, MemberId, Term};

use crate::event::Msg;
use crate::flaw::Flaw;
use crate::world::World;

impl World {
    /// The leader's renewals fail: it asks the members of V.
    pub fn ask_promises(&mut self, m: usize, life: u64) {
        let (now, ttl, leader) = (self.clock(m), self.settings.ttl(), self.name(m));
        let Some(agent) = self.agent(m, life) else {
            return;
        };
        let LeaseWish::Hold(term) = agent.wish else {
            return;
        };
        let fresh = agent
            .renewed
            .is_some_and(|(l, sent)| l.term == term && now.since(sent) < ttl / 3);
        if fresh || agent.refused >= term || agent.obs.lease.is_none_or(|l| l.term != term) {
            return;
        }
        let mut asked: Vec<(MemberId, Incarnation)> = agent
            .needs
            .iter()
            .flat_map(|n| n.members.iter().map(|(m, i)| (m.clone(), *i)))
            .collect();
        asked.sort();
        asked.dedup();
        for (member, incarnation) in asked {
            let ask = Ask {
                leader: leader.clone(),
                term,
                incarnation,
                ttl_ms: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX),
            };
            if let Some(to) = self.number(&member) {
                self.send(m, to, Msg::AskPromise { ask, sent_at: now });
            } else if let Some(h) = self.backup_host(&member)
                && self.options.flaw == Some(Flaw::ReceiverPromises)
            {
                // It has no API to promise with; the broken rule takes its being there for a promise.
                self.standby_promised(m, h, term, incarnation, now);
            }
        }
    }

    /// A standby is asked.
    pub fn asked_promise(&mut self, m: usize, from: usize, ask: &Ask, sent_at: BootTime) {
        let now = self.clock(m);
        let member = &mut self.members[m];
        let streams = member
            .pg
            .as_ref()
            .is_some_and(|p| p.receiver.as_ref().is_some_and(|r| r.streaming));
        let Some(agent) = &mut member.agent else {
            return;
        };
        let facts = Facts {
            floor: member.floor,
            incarnation: member.incarnation,
            streams_from: agent.upstream.clone().filter(|_| streams),
            known_term: agent.obs.view.as_ref().map_or(Term(0), known_term),
        };
        let answer = match agent.book.ask(now, ask, &facts) {
            Answer::AfterNote(longest) => {
                member.promise_note = longest;
                agent.book.noted(longest);
                agent.book.ask(now, ask, &facts)
            }
            answer => answer,
        };
        if answer == Answer::Yes {
            let (term, incarnation) = (ask.term, ask.incarnation);
            self.log(|w| format!("{} promises {} in term {term}", w.name(m), w.name(from)));
            let given = Msg::StandbyPromised {
                term,
                incarnation,
                sent_at,
            };
            self.send(m, from, given);
        }
    }

    /// The leader hears a promise.
    pub fn standby_promised(
        &mut self,
        m: usize,
        from: usize,
        term: Term,
        incarnation: Incarnation,
        sent_at: BootTime,
    ) {
        let now = self.clock(m);
        let keeps = self.settings.ttl().saturating_sub(self.settings.margin());
        let name = self.name(from);
        let flaw = self.options.flaw;
        let Some(agent) = &mut self.members[m].agent else {
            return;
        };
        if agent.wish != LeaseWish::Hold(term) {
            return;
        }
        agent
            .ledger
            .promised(term, &name, incarnation, sent_at.after(keeps));
        let needs = bent(flaw, &agent.needs);
        let Some(until) = agent.ledger.deadline(term, &needs) else {
            return;
        };
        let renewed = agent.renewed.map_or(BootTime(0), |(l, _)| l.until);
        if until > renewed {
            agent.obs.promises.living_since.get_or_insert(now);
            let listed = needs.iter().flat_map(|n| n.members.keys());
            let beside = self
                .backups
                .iter()
                .any(|b| listed.clone().any(|m| *m == b.id));
            self.carried_beside_backups += u64::from(beside);
            self.hold(m, Lease { term, until });
        }
    }
}

/// With the flaw one promise less is enough; of one, any member's at all.
fn bent(flaw: Option<Flaw>, needs: &[PromiseNeed]) -> Vec<PromiseNeed> {
    let mut needs = needs.to_vec();
    if flaw == Some(Flaw::OnePromiseTooFew) {
        for need in &mut needs {
            need.needed = need.needed.saturating_sub(1).max(1);
        }
    }
    needs
}

/// A promise keeps a seal waiting: how long still, nanoseconds on the member's clock.
pub fn wait(now: BootTime, until: BootTime) -> u64 {
    u64::try_from((until.since(now) + Duration::from_millis(1)).as_nanos()).unwrap_or(u64::MAX)
}
