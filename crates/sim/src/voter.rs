//! The lease by promises, as each voter keeps it (failover protocol, 2.3).

use std::time::Duration;

use craton_core::observe::LeaseSeen;
use craton_core::{BootTime, Term};

/// One voter. `free_through` is durable; the rest is lost with the process.
#[derive(Clone, Debug, Default)]
pub struct Voter {
    /// Durable: this term and all before it are never promised again.
    pub free_through: Term,
    /// In memory: nothing above this term until then.
    promise: Option<(Term, BootTime)>,
    /// In memory: the holder of this term has given it up.
    released: Term,
    /// When the process started.
    started_at: BootTime,
}

impl Voter {
    /// A restart forgets every promise, so nothing is free before a ttl has passed.
    pub fn restart(&mut self, now: BootTime) {
        *self = Self {
            free_through: self.free_through,
            started_at: now,
            ..Self::default()
        };
    }

    /// A renewal: true if promised.
    pub fn renew(&mut self, term: Term, ttl: Duration, now: BootTime) -> bool {
        let newer = self
            .promise
            .is_some_and(|(t, until)| t > term && until > now);
        if term <= self.free_through || term <= self.released || newer {
            return false;
        }
        self.promise = Some((term, now.after(ttl)));
        true
    }

    /// The holder gives the lease up.
    pub fn release(&mut self, term: Term) {
        self.released = self.released.max(term);
        if self.promise.is_some_and(|(t, _)| t <= term) {
            self.promise = None;
        }
    }

    /// Asked whether `term` is over: notes it durably before saying so.
    pub fn free(&mut self, term: Term, ttl: Duration, now: BootTime, amnesia: bool) -> bool {
        if self.free_through >= term {
            return true;
        }
        let promised = self
            .promise
            .is_some_and(|(t, until)| t <= term && until > now);
        let forgotten = now.since(self.started_at) < ttl && !amnesia;
        if self.released < term && (promised || forgotten) {
            return false;
        }
        self.free_through = term;
        true
    }

    /// What can be told without asking anyone.
    pub fn hint(&self, ttl: Duration, now: BootTime, amnesia: bool) -> LeaseSeen {
        match self.promise {
            Some((term, until)) if until > now => LeaseSeen::Held(term),
            _ if now.since(self.started_at) < ttl && !amnesia => LeaseSeen::Unknown,
            _ => LeaseSeen::Lapsed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(2);
    fn at(ms: u64) -> BootTime {
        BootTime(ms * 1_000_000)
    }

    #[test]
    fn a_promise_is_kept_until_it_runs_out_or_is_given_up() {
        let mut v = Voter::default();
        assert!(v.renew(Term(1), TTL, at(3000)));
        assert!(!v.free(Term(1), TTL, at(4999), false));
        assert!(v.free(Term(1), TTL, at(5000), false));
        assert!(!v.renew(Term(1), TTL, at(5001)), "free is for good");
        assert!(v.renew(Term(2), TTL, at(5001)));
        v.release(Term(2));
        assert!(v.free(Term(2), TTL, at(5002), false));
    }

    #[test]
    fn a_restarted_voter_has_forgotten_and_says_so() {
        let mut v = Voter::default();
        assert!(v.renew(Term(1), TTL, at(3000)));
        v.restart(at(3100));
        assert!(!v.free(Term(1), TTL, at(5000), false));
        assert!(v.free(Term(1), TTL, at(5100), false));
        v.restart(at(6000));
        assert!(!v.renew(Term(1), TTL, at(6001)), "free_through is durable");
    }
}
