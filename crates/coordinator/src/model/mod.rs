//! The coordinator in memory: what the others must behave like.
//!
//! [`ModelStore`] is pure (time is an argument), for the simulator; [`Model`] wraps it in the trait, for
//! tests. The model has one lease voter, which is one majority.

mod handle;

use std::sync::Arc;
use std::time::Duration;

use craton_core::{BootTime, MemberId, Term};

use crate::api::{CoordinatorError, LeaseHint, Renewal, Snapshot, Txn, TxnOutcome};
use crate::kv;
use crate::promise::{Answer, LeaseNote, Voter};

pub use handle::Model;

/// The store and the lease of one cluster.
#[derive(Clone, Debug)]
pub struct ModelStore {
    snapshot: Arc<Snapshot>,
    voter: Voter,
}

impl Default for ModelStore {
    fn default() -> Self {
        Self::new()
    }
}

impl ModelStore {
    /// An empty store where every term is free.
    pub fn new() -> Self {
        Self {
            snapshot: Arc::default(),
            voter: Voter::new(BootTime(0), LeaseNote::default()),
        }
    }

    /// All keys, at the newest revision.
    pub fn read(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshot)
    }

    /// One compare-and-set transaction.
    pub fn txn(&mut self, txn: &Txn) -> Result<TxnOutcome, CoordinatorError> {
        kv::check_txn(txn).map_err(CoordinatorError::Refused)?;
        Ok(kv::apply_txn(&mut self.snapshot, txn))
    }

    /// Renews the lease of `term`. `now` is the instant of arrival, on the store's clock; `sent_at` the
    /// instant before sending, on the holder's clock, which is handed back.
    pub fn renew(
        &mut self,
        now: BootTime,
        sent_at: BootTime,
        holder: &MemberId,
        term: Term,
        ttl: Duration,
    ) -> Result<Renewal, CoordinatorError> {
        let mut answer = self.voter.renew(now, holder, term, ttl);
        if let Answer::AfterNote(note) = answer {
            self.voter.noted(note);
            answer = self.voter.renew(now, holder, term, ttl);
        }
        match answer {
            Answer::Yes => Ok(Renewal { sent_at }),
            Answer::No(why) => Err(CoordinatorError::Refused(why)),
            Answer::AfterNote(_) => Err(CoordinatorError::Unavailable(
                "the note did not take".to_owned(),
            )),
        }
    }

    /// The holder gives `term` up.
    pub fn release(
        &mut self,
        now: BootTime,
        holder: &MemberId,
        term: Term,
    ) -> Result<(), CoordinatorError> {
        match self.voter.release(now, holder, term) {
            Answer::No(why) => Err(CoordinatorError::Refused(why)),
            Answer::Yes | Answer::AfterNote(_) => Ok(()),
        }
    }

    /// True when `term` is over for good.
    pub fn free(&mut self, now: BootTime, term: Term) -> bool {
        match self.voter.free(now, term) {
            Answer::Yes => true,
            Answer::AfterNote(note) => {
                self.voter.noted(note);
                true
            }
            Answer::No(_) => false,
        }
    }

    /// What the voter knows of the lease.
    pub fn lease_hint(&self, now: BootTime) -> LeaseHint {
        self.voter.hint(now)
    }
}
