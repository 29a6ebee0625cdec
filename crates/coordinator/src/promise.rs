//! One voter's part in the lease: promises in memory, "that term is over" on disk. Pure.
//!
//! A promise for term t says "until its end I help nobody above t". It lives in memory only, so that
//! renewing never waits for a disk. What must survive a restart is little and rarely changes:
//!
//! * `free_through`: the greatest term this voter has called free. It never promises for that term or a
//!   lower one again. Noted **before** it says so.
//! * `ttl_max`: the longest promise it ever gave. A voter that starts has forgotten its promises, so it
//!   calls nothing free before it has been up for that long. Noted before the first promise that long.
//!
//! Why a majority is enough: a lease renewal and a "free" both need a majority, any two majorities share a
//! voter, and that voter does not do both: once it called t free it refuses t, and while it promises t it
//! refuses to call t free.
//!
//! # When the voters change
//!
//! Majorities of sets of voters that are several changes apart need not share a voter. So every set has a number,
//! its **epoch**, and every question says by which epoch its answers will be counted. Write V(e) for the voters of
//! epoch e.
//!
//! 1. A voter answers for one epoch only: the one it has *settled* in, and no more once it has *left* it.
//! 2. To settle in e, after V(e) is committed, it asks V(e-1) to leave: whoever is asked notes on disk that it
//!    answers for no epoch below e, and only then hands out its notes. A majority of V(e-1) is needed; the voter
//!    joins their notes with its own, and notes that with e on disk.
//! 3. In the first ttl after settling it calls nothing free, as after a start.
//! 4. V(e+1) is proposed only once a majority of V(e) has settled in e (or later).
//!
//! Why that is enough. Let a renewal of t be counted by V(i) and "t is free" by V(j).
//! * *j = i, or one apart:* the majorities share a voter, and what it promised and noted goes with it.
//! * *j > i + 1:* by 4, before V(i+2) was proposed a majority of V(i+1) had settled there. It shares a voter with the
//!   majority that promised, which had promised before it settled. All that call t free settled in j
//!   later than that, and wait for the longest ttl from there on (3): the lease is over. They know how long that is, by
//!   the next point.
//! * *i > j + 1:* "t is free for ever" must be known to whoever promises. Say a note *covers* j if it includes
//!   all that a majority of V(j) ever called free, and the length of every lease that it promised. A voter that
//!   settled in e covers e-1: a majority of V(e-1) has left, one of each majority of V(e-1) is among them,
//!   and nothing is added any more. By 4 one of those that it asked had settled in e-1, so covers
//!   e-2; and so on down. Thus whoever has settled in i covers j, and refuses t.
//!
//! What is taken over from others only ever makes a voter refuse ([`LeaseNote::closed_through`]): one that called a
//! term free may have been the only one.

use std::time::Duration;

use craton_core::{BootTime, MemberId, Term};
use serde::{Deserialize, Serialize};

use crate::api::LeaseHint;

/// The longest lease that is granted.
pub const TTL_MAX: Duration = Duration::from_secs(600);

/// What a voter keeps on disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LeaseNote {
    /// No promise for this term or a lower one, ever again.
    pub free_through: Term,
    /// The longest promise ever given, in milliseconds, rounded up.
    pub ttl_max_ms: u64,
    /// No promise either for these terms, because another voter called them free. This one does not, before it
    /// knows by itself: the other may be the only one, and the lease held.
    #[serde(default)]
    pub closed_through: Term,
    /// The epoch of voters that it has settled in.
    #[serde(default)]
    pub epoch: u64,
    /// It answers for no epoch below this one.
    #[serde(default)]
    pub left: u64,
}

impl LeaseNote {
    /// The greater of both, field by field.
    #[must_use]
    pub fn join(self, other: Self) -> Self {
        Self {
            free_through: self.free_through.max(other.free_through),
            ttl_max_ms: self.ttl_max_ms.max(other.ttl_max_ms),
            closed_through: self.closed_through.max(other.closed_through),
            epoch: self.epoch.max(other.epoch),
            left: self.left.max(other.left),
        }
    }

    /// What another voter may take over: what not to promise, and how long to wait.
    #[must_use]
    pub fn knowledge(self) -> Self {
        Self {
            closed_through: self.closed(),
            ttl_max_ms: self.ttl_max_ms,
            ..Self::default()
        }
    }

    /// Nothing is promised for this term or a lower one.
    fn closed(self) -> Term {
        self.free_through.max(self.closed_through)
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Promise {
    term: Term,
    holder: MemberId,
    until: BootTime,
    released: bool,
}

/// One voter.
#[derive(Clone, Debug)]
pub struct Voter {
    /// Since when it knows of all promises that may count: its start, or when it settled in its epoch.
    knows_since: BootTime,
    note: LeaseNote,
    /// Decided to be free, perhaps not on disk yet: refused already, but not called free yet.
    closing: Term,
    /// Decided to leave the epochs below, perhaps not on disk yet: answered for no more.
    leaving: u64,
    promise: Option<Promise>,
}

/// What the voter says to a renewal or to "is it free?".
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Yes, and nothing has to be noted first.
    Yes,
    /// Ask again once [`Voter::noted`] was called with this, which must be on disk by then.
    AfterNote(LeaseNote),
    /// No, and why.
    No(String),
}

impl Voter {
    /// A voter that starts now, with what it found on its disk.
    pub fn new(started_at: BootTime, note: LeaseNote) -> Self {
        Self {
            knows_since: started_at,
            note,
            closing: note.closed(),
            leaving: note.left,
            promise: None,
        }
    }

    /// What is known to be on disk.
    pub fn note(&self) -> LeaseNote {
        self.note
    }

    /// This is on disk now.
    pub fn noted(&mut self, note: LeaseNote) {
        self.note = self.note.join(note);
        self.closing = self.closing.max(self.note.closed());
        self.leaving = self.leaving.max(self.note.left);
    }

    /// Whether this voter answers questions that are counted by the voters of `epoch`; if not, why.
    pub fn answers_for(&self, epoch: u64) -> Result<(), String> {
        if epoch == self.note.epoch && epoch >= self.leaving {
            return Ok(());
        }
        Err(format!(
            "this voter has settled in epoch {} of the voters and answers for none below {}, not for {epoch}",
            self.note.epoch, self.leaving
        ))
    }

    /// Asked by a voter of `epoch` to answer for no earlier one. After "yes" its note is final for those.
    pub fn leave(&mut self, epoch: u64) -> Answer {
        if epoch <= self.note.left {
            return Answer::Yes;
        }
        self.leaving = self.leaving.max(epoch);
        Answer::AfterNote(LeaseNote {
            left: epoch,
            ..self.note
        })
    }

    /// A majority of the voters of the epoch before has left; `known` is the join of their notes. Once the result
    /// is on disk, this voter answers for `epoch`.
    pub fn settle(&mut self, now: BootTime, epoch: u64, known: LeaseNote) -> Answer {
        if epoch <= self.note.epoch {
            return Answer::Yes;
        }
        // Promises of others, given in earlier epochs, may run.
        self.knows_since = self.knows_since.max(now);
        let next = LeaseNote {
            epoch,
            left: epoch,
            ..known.knowledge()
        };
        Answer::AfterNote(self.note.join(next))
    }

    /// A renewal (or first taking) of `term` by `holder`.
    pub fn renew(&mut self, now: BootTime, holder: &MemberId, term: Term, ttl: Duration) -> Answer {
        if ttl.is_zero() || ttl > TTL_MAX {
            return Answer::No(format!("a lease lasts at most {} s", TTL_MAX.as_secs()));
        }
        if term <= self.closing {
            return Answer::No(format!(
                "term {term} is over: called free through {}",
                self.closing
            ));
        }
        if let Some(p) = &self.promise {
            if term < p.term {
                return Answer::No(format!("term {term} is over: term {} is promised", p.term));
            }
            if term == p.term && *holder != p.holder {
                return Answer::No(format!("term {term} is promised to {}", p.holder));
            }
            if term == p.term && p.released {
                return Answer::No(format!("term {term} was released by its holder"));
            }
            // A higher term is accepted even while a lower promise runs: nobody gets to ask for it before
            // a majority has noted the lower one as free, so that promise can no longer be part of a lease.
        }
        let ttl_ms = u64::try_from(ttl.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
        if ttl_ms > self.note.ttl_max_ms {
            return Answer::AfterNote(LeaseNote {
                ttl_max_ms: ttl_ms,
                ..self.note
            });
        }
        // A shorter ttl never shortens a promise that was given.
        let until = match &self.promise {
            Some(p) if p.term == term => p.until.max(now.after(ttl)),
            _ => now.after(ttl),
        };
        self.promise = Some(Promise {
            term,
            holder: holder.clone(),
            until,
            released: false,
        });
        Answer::Yes
    }

    /// The holder gives `term` up.
    pub fn release(&mut self, now: BootTime, holder: &MemberId, term: Term) -> Answer {
        if let Some(p) = &mut self.promise {
            if p.term == term && p.holder != *holder {
                return Answer::No(format!("term {term} is promised to {}", p.holder));
            }
            if p.term == term {
                p.released = true;
                return Answer::Yes;
            }
            if p.term > term {
                return Answer::Yes;
            }
            if !p.released && p.until > now {
                return Answer::No(format!(
                    "term {} is promised to {} and still runs",
                    p.term, p.holder
                ));
            }
        }
        if term > self.closing {
            // Nothing is promised here: remember that it must not be promised any more.
            self.promise = Some(Promise {
                term,
                holder: holder.clone(),
                until: BootTime(0),
                released: true,
            });
        }
        Answer::Yes
    }

    /// Whether `term` and all lower ones are over. "Yes" is for ever.
    pub fn free(&mut self, now: BootTime, term: Term) -> Answer {
        if term <= self.note.free_through {
            return Answer::Yes;
        }
        if let Some(p) = &self.promise
            && p.term <= term
            && !p.released
            && p.until > now
        {
            return Answer::No(format!(
                "term {} is promised to {} and still runs",
                p.term, p.holder
            ));
        }
        if !self.released(term) && !self.remembers(now) {
            return Answer::No(
                "this voter started, or got its say, less than a lease ago: a promise may run that it does not know of"
                    .to_owned(),
            );
        }
        self.closing = self.closing.max(term);
        Answer::AfterNote(LeaseNote {
            free_through: term,
            ..self.note
        })
    }

    /// False while a promise that is forgotten, or was given in another epoch, could still run.
    fn remembers(&self, now: BootTime) -> bool {
        now >= self
            .knows_since
            .after(Duration::from_millis(self.note.ttl_max_ms))
    }

    fn released(&self, term: Term) -> bool {
        self.promise
            .as_ref()
            .is_some_and(|p| p.released && p.term == term)
    }

    /// What can be said of the lease without asking anyone.
    pub fn hint(&self, now: BootTime) -> LeaseHint {
        match &self.promise {
            Some(p) if !p.released && p.until > now => LeaseHint::Held {
                term: p.term,
                until: p.until,
            },
            None if !self.remembers(now) => LeaseHint::Unknown,
            Some(_) | None => LeaseHint::Lapsed,
        }
    }
}

#[cfg(test)]
mod epochs;
#[cfg(test)]
mod tests;
