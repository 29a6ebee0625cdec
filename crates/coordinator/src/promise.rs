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
}

impl LeaseNote {
    /// The greater of both, field by field.
    #[must_use]
    pub fn join(self, other: Self) -> Self {
        Self {
            free_through: self.free_through.max(other.free_through),
            ttl_max_ms: self.ttl_max_ms.max(other.ttl_max_ms),
        }
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
    started_at: BootTime,
    note: LeaseNote,
    /// Decided to be free, perhaps not on disk yet: refused already, but not called free yet.
    closing: Term,
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
            started_at,
            note,
            closing: note.free_through,
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
        self.closing = self.closing.max(self.note.free_through);
    }

    /// A renewal (or first taking) of `term` by `holder`.
    pub fn renew(&mut self, now: BootTime, holder: &MemberId, term: Term, ttl: Duration) -> Answer {
        if ttl.is_zero() || ttl > TTL_MAX {
            return Answer::No(format!("a lease lasts at most {} s", TTL_MAX.as_secs()));
        }
        if term <= self.closing {
            return Answer::No(format!(
                "term {term} is over: free through {}",
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
                "this voter started less than a lease ago and may have promised".to_owned(),
            );
        }
        self.closing = self.closing.max(term);
        Answer::AfterNote(LeaseNote {
            free_through: term,
            ..self.note
        })
    }

    /// False while a promise that was given before the start, and is forgotten, could still run.
    fn remembers(&self, now: BootTime) -> bool {
        now >= self
            .started_at
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
mod tests;
