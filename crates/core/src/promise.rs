//! Standby promises: how a healthy leader goes on while the coordinator is away (failover protocol, 2.7).
//!
//! A leader that cannot renew its lease asks the members of V directly. Each that still streams from it may
//! promise, in memory, "I do not seal for a term above yours before T". An election needs |V| - k + 1 seals of
//! V; with the promises of k of V there are at most |V| - k members left to seal. So nobody else can lead
//! before the k-th of them runs out, and the leader may go on until then. Where the coordinator may hold
//! one of several sync sets (the answer to a change was lost), the promises must suffice for each of them.
//!
//! Sealing and promising exclude each other: the agent asks the [`Book`] under one lock, and a seal waits for
//! the end of a promise. The promise is forgotten with the process, so the longest one is noted on disk
//! before it is given, and a book that starts with a note lets nobody seal before that long has passed.
//!
//! The deadline counts as a lease's: on the leader from before the question was sent, less the margin; on the
//! member from when it arrived.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::records::{ClusterView, RequestKind};
use crate::settings::Durability;
use crate::sync::SyncSet;
use crate::types::{BootTime, Incarnation, MemberId, Term};

/// The longest promise that is given.
pub const PROMISE_MAX: Duration = Duration::from_secs(600);

/// Whose promises keep every other member from leading: so many of these.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PromiseNeed {
    /// V.
    pub members: BTreeMap<MemberId, Incarnation>,
    /// How many; zero means that no number is enough.
    pub needed: usize,
}

impl PromiseNeed {
    /// For one sync set that the coordinator may hold. In `async` anybody in V may win alone, so all of V must
    /// promise. With nobody in V there is nobody to ask: the leader goes by its lease alone.
    pub fn of(set: &SyncSet, durability: Durability) -> Self {
        Self {
            members: set.members.clone(),
            needed: if durability.keeps_commits() {
                set.k as usize
            } else {
                set.members.len()
            },
        }
    }
}

/// What the leader was promised in one term.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    term: Term,
    until: BTreeMap<MemberId, (Incarnation, BootTime)>,
}

impl Ledger {
    /// A member promised. `until` is the leader's own deadline: from before it asked, less the margin.
    pub fn promised(
        &mut self,
        term: Term,
        member: &MemberId,
        incarnation: Incarnation,
        until: BootTime,
    ) {
        if term > self.term {
            *self = Self {
                term,
                until: BTreeMap::new(),
            };
        }
        if term < self.term {
            return;
        }
        let known = self
            .until
            .entry(member.clone())
            .or_insert((incarnation, until));
        if known.0 == incarnation {
            known.1 = known.1.max(until);
        } else {
            *known = (incarnation, until);
        }
    }

    /// Until when nobody else can lead, as far as the promises tell; none if they are too few.
    pub fn deadline(&self, term: Term, needs: &[PromiseNeed]) -> Option<BootTime> {
        if term != self.term {
            return None;
        }
        let each: Option<Vec<BootTime>> = needs.iter().map(|n| self.deadline_of(n)).collect();
        each?.into_iter().min()
    }

    fn deadline_of(&self, need: &PromiseNeed) -> Option<BootTime> {
        let mut until: Vec<BootTime> = need
            .members
            .iter()
            .filter_map(|(m, i)| self.until.get(m).filter(|(known, _)| known == i))
            .map(|(_, until)| *until)
            .collect();
        until.sort_unstable_by(|a, b| b.cmp(a));
        until.get(need.needed.checked_sub(1)?).copied()
    }

    /// Who promised, and whose promise still runs.
    pub fn running(&self, now: BootTime) -> impl Iterator<Item = &MemberId> {
        self.until
            .iter()
            .filter(move |(_, (_, until))| *until > now)
            .map(|(m, _)| m)
    }
}

/// The leader's question.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ask {
    /// Who asks.
    pub leader: MemberId,
    /// The term it leads.
    pub term: Term,
    /// The incarnation in which V lists the member that is asked.
    pub incarnation: Incarnation,
    /// For how long, milliseconds.
    pub ttl_ms: u64,
}

/// What the member knows of itself when it is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    /// Durable: nothing below this term may reach it any more.
    pub floor: Term,
    /// Its data directory's life.
    pub incarnation: Option<Incarnation>,
    /// Whom it streams from and in which term; none while it does not stream.
    pub streams_from: Option<(MemberId, Term)>,
    /// The highest term that it has heard of, see [`known_term`].
    pub known_term: Term,
}

/// The highest term that the coordinator's state speaks of. An operator who asked for a failover has ended the
/// present one: nobody helps its leader any more.
pub fn known_term(view: &ClusterView) -> Term {
    let Some(l) = view.leadership.as_ref().map(|l| &l.value) else {
        return Term(0);
    };
    let deposed = view
        .request
        .as_ref()
        .is_some_and(|r| r.value.kind == RequestKind::Failover && r.value.term == l.term);
    if deposed { l.term.next() } else { l.term }
}

/// What the book says to a question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Promised.
    Yes,
    /// Ask again once [`Book::noted`] was called with this, which must be on disk by then.
    AfterNote(Duration),
    /// No, and why.
    No(String),
}

/// A member's promises.
#[derive(Clone, Debug)]
pub struct Book {
    started_at: BootTime,
    /// On disk: the longest promise that may have been given and not run out.
    noted: Duration,
    promise: Option<(Term, BootTime)>,
    /// It seals, or has sealed, for this term.
    sealing: Term,
}

impl Book {
    /// A book that is opened now, with the note of an earlier life.
    pub fn new(started_at: BootTime, noted: Duration) -> Self {
        Self {
            started_at,
            noted,
            promise: None,
            sealing: Term(0),
        }
    }

    /// A leader asks.
    pub fn ask(&mut self, now: BootTime, ask: &Ask, facts: &Facts) -> Answer {
        if let Some(why) = self.refusal(ask, facts) {
            return Answer::No(why);
        }
        let ttl = Duration::from_millis(ask.ttl_ms);
        if ttl > self.noted {
            return Answer::AfterNote(ttl);
        }
        let until = match self.promise {
            Some((term, until)) if term == ask.term => until.max(now.after(ttl)),
            Some((term, until)) if term > ask.term && until > now => {
                return Answer::No(format!("term {term} is promised"));
            }
            _ => now.after(ttl),
        };
        self.promise = Some((ask.term, until));
        Answer::Yes
    }

    fn refusal(&self, ask: &Ask, facts: &Facts) -> Option<String> {
        let ttl = Duration::from_millis(ask.ttl_ms);
        if ttl.is_zero() || ttl > PROMISE_MAX {
            return Some(format!(
                "a promise lasts at most {} s",
                PROMISE_MAX.as_secs()
            ));
        }
        if ask.term < self.sealing {
            return Some(format!("this member seals for term {}", self.sealing));
        }
        if facts.known_term > ask.term {
            return Some(format!(
                "term {} is over: term {} is known here",
                ask.term, facts.known_term
            ));
        }
        if facts.floor != ask.term {
            return Some(format!("this member follows term {}", facts.floor));
        }
        if facts.incarnation != Some(ask.incarnation) {
            return Some("the data directory here is another one".into());
        }
        if facts.streams_from.as_ref() != Some(&(ask.leader.clone(), ask.term)) {
            return Some(format!("this member does not stream from {}", ask.leader));
        }
        None
    }

    /// This is on disk now.
    pub fn noted(&mut self, longest: Duration) {
        self.noted = longest;
    }

    /// Until when no seal for a higher term may be made; none if one may.
    pub fn held_until(&self, now: BootTime) -> Option<BootTime> {
        let given = self.promise.map(|(_, until)| until);
        let forgotten = Some(self.started_at.after(self.noted)).filter(|_| !self.noted.is_zero());
        given.max(forgotten).filter(|until| *until > now)
    }

    /// A seal for `term` begins: from here on nothing below it is promised. With a promise that runs, or one
    /// that may have been forgotten, the answer is when to try again.
    pub fn begin_seal(&mut self, now: BootTime, term: Term) -> Result<(), BootTime> {
        let own = self
            .promise
            .is_some_and(|(t, until)| t >= term && until > now);
        match self.held_until(now) {
            Some(until) if !own => Err(until),
            _ => {
                self.sealing = self.sealing.max(term);
                Ok(())
            }
        }
    }

    /// The note on disk is of no use any more: nothing that was promised runs.
    pub fn is_idle(&self, now: BootTime) -> bool {
        !self.noted.is_zero() && self.held_until(now).is_none()
    }
}

#[cfg(test)]
mod tests;
