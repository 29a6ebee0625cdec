//! The coordinator in an etcd that is there already (v3, 3.4 or newer), through its JSON gateway.
//!
//! # Layout
//! * `wire`: the messages. `http`: one endpoint. `client`: all of them; what a failure means; login.
//! * `lease`: the lease's keys and rules, pure. `mirror`: the local copy and the watch.
//!
//! # The lease, and why it is not one of etcd's leases
//! What must hold: **when `free(t)` says true, the holder of t has stopped believing that it holds it, and no
//! renewal of t (or of a lower term) can succeed ever after.** etcd's own leases cannot carry that: a leader
//! of etcd that was paused revokes, when it goes on, leases that its successor has renewed meanwhile (etcd issue
//! 15247, in 3.4.23 as Debian ships it). The key is gone while its owner counts on it. So nothing here rests on
//! a clock of etcd's, nor on a key that vanishes. Time is taken at both ends, order by etcd's transactions:
//!
//! 1. A renewal is one transaction: *if* `lease/holder` is still the entry that this member made for t, *and*
//!    `lease/free` is unchanged, write `lease/beat`. The holder counts its lease from **before** it sent it, for
//!    ttl less a margin.
//! 2. `free(t)` reads all three keys linearizably. A lease that runs is over only once this process has **seen**
//!    one and the same beat for a whole ttl, on its own boot-time clock, from **after** it first saw it. Then one
//!    transaction: *if* holder, beat and free are still those entries, write `lease/free` = t.
//! 3. If 2 succeeds, the newest renewal of t was the beat that was compared. It was sent before it was seen, so
//!    the holder's deadline, which counts from the sending, lies before the end of the ttl that was waited (clock
//!    rates may differ by the margin). And every later renewal of t fails: 1 compares `lease/free`.
//! 4. So `free(t)` is for ever: `lease/free` only grows (it is written by comparing what was read, and only with
//!    a greater term).
//! 5. A term is taken by one transaction that compares all three keys, and only when no lease runs: no holder,
//!    released, or free. Taking t notes t - 1 as free. The same term is never taken twice: its entry is there, or
//!    it is free.
//! 6. A release rewrites `lease/holder`, so that renewals still on their way fail; its caller has stopped
//!    believing before.
//!
//! A process that is frozen between waiting and writing does no harm: the comparison of 2 is made by etcd when the
//! write is applied. A repeated or late renewal does none either: at worst it is a beat that nobody counts on, and
//! others wait longer. Every step of the lease may therefore be sent again when its answer is lost. Losing the
//! leader's host costs one ttl from its last renewal, whatever etcd's election timeout and lease granularity are.
//!
//! The price is one small write to etcd for each renewal, from the leader alone. Presence costs etcd nothing: the
//! members tell each other directly.

mod client;
mod http;
mod lease;
mod mirror;
mod outside;
#[cfg(test)]
mod tests;
mod wire;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use craton_core::{MemberId, Term};
use tokio::sync::watch;
use tokio::task::JoinSet;

pub use self::outside::{purge, vacant};

use self::client::{Client, Repeat};
use self::lease::{Held, LEASE, LeaseKeys, Step, Writer, step, ttl_ms};
use self::mirror::{DATA, Mirror};
use self::wire::{Bytes, CompareMod, Delete, Range, RangeTold, RequestOp, TxnAsk, TxnTold};
use crate::api::{
    Answer, Coordinator, CoordinatorError, EndpointState, LeaseHint, Op, PresenceMap, Renewal,
    Snapshot, Txn, TxnOutcome,
};
use crate::clock::Clock;
use crate::kv;
use crate::place::{Backend, Place};

/// The largest state, in bytes of keys and values; the same as the embedded backend's.
const STATE_LEN_MAX: usize = crate::embedded::STATE_LEN_MAX;

/// Rounds of "read, decide, write" of one lease call, when others write in between.
const ROUNDS_MAX: usize = 4;

/// One member's way to the cluster's records in etcd.
pub struct Etcd {
    me: MemberId,
    clock: Clock,
    client: Arc<Client>,
    mirror: Arc<Mirror>,
    writer: Writer,
    held: Mutex<Option<Held>>,
    presence: Arc<dyn Coordinator>,
    tasks: Mutex<JoinSet<()>>,
    stopped: watch::Sender<bool>,
}

/// What one lease transaction came to.
enum Round {
    Done(u64),
    /// Somebody wrote in between: what the keys are now.
    Changed(LeaseKeys),
}

impl Etcd {
    /// Begins to follow. Connects by itself, again and again: an etcd that is away is no reason not to start.
    /// `presence` carries the members' announcements. To be called inside a tokio runtime.
    pub fn start(
        place: &Place,
        cluster: &str,
        me: MemberId,
        presence: Arc<dyn Coordinator>,
    ) -> Result<Arc<Self>, String> {
        if place.backend != Backend::Etcd {
            return Err("coordinator.backend is not \"etcd\"".to_owned());
        }
        place.validate()?;
        let clock = Clock::system();
        let prefix = place.prefix_of(cluster);
        let client = Arc::new(Client::new(place)?);
        let mirror = Arc::new(Mirror::new(prefix.clone(), clock));
        let mut tasks = JoinSet::new();
        tasks.spawn(Arc::clone(&mirror).run(Arc::clone(&client)));
        Ok(Arc::new(Self {
            me,
            clock,
            client,
            mirror,
            writer: Writer { prefix },
            held: Mutex::default(),
            presence,
            tasks: Mutex::new(tasks),
            stopped: watch::Sender::new(false),
        }))
    }

    /// Ends all tasks; calls fail from now on. Does not release the lease.
    pub async fn stop(&self) {
        self.stopped.send_replace(true);
        let mut tasks =
            std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
    }

    fn check_running(&self) -> Result<(), CoordinatorError> {
        if *self.stopped.borrow() {
            return Err(CoordinatorError::Stopped(
                "this process is shutting down".to_owned(),
            ));
        }
        Ok(())
    }

    async fn read(&self) -> Result<Arc<Snapshot>, CoordinatorError> {
        self.check_running()?;
        match self.mirror.look(&self.client).await {
            Ok(look) => Ok(look.snapshot),
            // A read changes nothing, whatever became of it.
            Err(CoordinatorError::Unknown(why)) => Err(CoordinatorError::Unavailable(why)),
            Err(e) => Err(e),
        }
    }

    fn data_key(&self, key: &str) -> String {
        format!("{}{DATA}{key}", self.writer.prefix)
    }

    fn check_room(&self, txn: &Txn) -> Result<(), CoordinatorError> {
        let snapshot = Arc::clone(&self.mirror.subscribe().borrow());
        let now: usize = snapshot
            .entries
            .iter()
            .map(|(k, v)| k.len() + v.value.len())
            .sum();
        let more = txn.ops.iter().map(|op| match op {
            Op::Put { key, value } => key.len() + value.len(),
            Op::Delete { .. } => 0,
        });
        if now + more.sum::<usize>() > STATE_LEN_MAX {
            return Err(CoordinatorError::Refused(format!(
                "the store holds at most {STATE_LEN_MAX} bytes"
            )));
        }
        Ok(())
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, CoordinatorError> {
        self.check_running()?;
        kv::check_txn(&txn).map_err(CoordinatorError::Refused)?;
        self.check_room(&txn)?;
        let compare = txn
            .compares
            .into_iter()
            .map(|c| CompareMod::new(self.data_key(&c.key), c.mod_revision))
            .collect();
        let success = txn
            .ops
            .into_iter()
            .map(|op| match op {
                Op::Put { key, value } => RequestOp::put(self.data_key(&key), value),
                Op::Delete { key } => RequestOp::Delete(Delete {
                    key: Bytes(self.data_key(&key)),
                }),
            })
            .collect();
        let ask = TxnAsk {
            compare,
            success,
            failure: Vec::new(),
        };
        let told: TxnTold = self
            .client
            .call("/v3/kv/txn", &ask, Repeat::IfNotDone)
            .await?;
        Ok(if told.succeeded {
            TxnOutcome::Committed(told.header.revision.0)
        } else {
            TxnOutcome::Conflict
        })
    }

    async fn lease_keys(&self) -> Result<LeaseKeys, CoordinatorError> {
        let ask = Range::of(format!("{}{LEASE}", self.writer.prefix));
        let told: RangeTold = self
            .client
            .call("/v3/kv/range", &ask, Repeat::Freely)
            .await?;
        self.mirror
            .lease_keys(&told)
            .map_err(CoordinatorError::Refused)
    }

    /// One transaction on the lease's keys. Sent again when its answer is lost: see the module's head.
    async fn lease_txn(&self, ask: Result<TxnAsk, String>) -> Result<Round, CoordinatorError> {
        let ask = ask.map_err(CoordinatorError::Refused)?;
        let told: TxnTold = self.client.call("/v3/kv/txn", &ask, Repeat::Freely).await?;
        if told.succeeded {
            return Ok(Round::Done(told.header.revision.0));
        }
        let found = told.responses.into_iter().find_map(|r| r.response_range);
        let keys = self
            .mirror
            .lease_keys(&found.unwrap_or_default())
            .map_err(CoordinatorError::Refused)?;
        Ok(Round::Changed(keys))
    }

    fn remembered(&self, term: Term, ttl_ms: u64) -> Option<Held> {
        let held = *self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.filter(|h| h.term == term).map(|h| h.at_least(ttl_ms))
    }

    fn remember(&self, held: Held) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = Some(held);
    }

    /// What this process held is in no later state of the same store: it was emptied, or restored from an old copy. Nobody
    /// has refused the term, so it is not taken again, nor given up.
    fn check_still_there(&self, keys: &LeaseKeys) -> Result<(), CoordinatorError> {
        let held = *self.held.lock().unwrap_or_else(PoisonError::into_inner);
        match held {
            Some(held) if keys.precede(&held) => Err(CoordinatorError::Unavailable(format!(
                "the lease of term {}, which this member holds, is not in etcd any more: it was emptied, or restored from an old copy",
                held.term
            ))),
            _ => Ok(()),
        }
    }

    async fn renew(&self, term: Term, ttl: Duration) -> Result<Renewal, CoordinatorError> {
        self.check_running()?;
        let ttl_ms = ttl_ms(ttl).map_err(CoordinatorError::Refused)?;
        let sent_at = self.clock.now();
        let mut keys = LeaseKeys::default();
        let mut next = if let Some(held) = self.remembered(term, ttl_ms) {
            Step::Renew(held)
        } else {
            keys = self.lease_keys().await?;
            self.check_still_there(&keys)?;
            step(&keys, &self.me, term, ttl_ms)
        };
        for _ in 0..ROUNDS_MAX {
            // A taking is compared with the very keys that it was decided on.
            let ask = match &next {
                Step::Refuse(why) => return Err(CoordinatorError::Refused(why.clone())),
                Step::Renew(held) => self.writer.renew(held),
                Step::Take { ttl_ms } => self.writer.take(&keys, &self.me, term, *ttl_ms),
            };
            match self.lease_txn(ask).await? {
                Round::Done(revision) => {
                    self.mirror.note_beat(revision);
                    if let Step::Renew(held) = next {
                        self.remember(held);
                    }
                    return Ok(Renewal { sent_at });
                }
                Round::Changed(found) => {
                    keys = found;
                    self.check_still_there(&keys)?;
                    next = step(&keys, &self.me, term, ttl_ms);
                }
            }
        }
        Err(CoordinatorError::Unavailable(
            "the lease's keys keep changing".to_owned(),
        ))
    }

    async fn release(&self, term: Term) -> Result<(), CoordinatorError> {
        self.check_running()?;
        let mut keys = self.lease_keys().await?;
        for _ in 0..ROUNDS_MAX {
            if term <= keys.free_through() {
                return Ok(());
            }
            let ask = match &keys.holder.value {
                Some(h) if h.term == term && h.member != self.me => {
                    return Err(CoordinatorError::Refused(format!(
                        "term {term} is held by {}",
                        h.member
                    )));
                }
                Some(h) if h.term == term && h.released => return Ok(()),
                Some(h) if h.term == term => self.writer.release(&keys, h),
                _ => match keys.running() {
                    Some(h) => {
                        return Err(CoordinatorError::Refused(format!(
                            "term {} is held by {} and may still run",
                            h.term, h.member
                        )));
                    }
                    // It was never taken: nobody shall.
                    None => self.writer.free(&keys, term),
                },
            };
            match self.lease_txn(ask).await? {
                Round::Done(_) => return Ok(()),
                Round::Changed(found) => keys = found,
            }
        }
        Err(CoordinatorError::Unavailable(
            "the lease's keys keep changing".to_owned(),
        ))
    }

    async fn free(&self, term: Term) -> Result<bool, CoordinatorError> {
        self.check_running()?;
        let mut keys = self.lease_keys().await?;
        for _ in 0..ROUNDS_MAX {
            if term <= keys.free_through() {
                return Ok(true);
            }
            if keys.running().is_some() {
                let until = self.mirror.silent_since(&keys).after(keys.silence());
                if self.clock.now() < until {
                    return Ok(false);
                }
            }
            match self.lease_txn(self.writer.free(&keys, term)).await? {
                Round::Done(_) => return Ok(true),
                Round::Changed(found) => keys = found,
            }
        }
        Ok(false)
    }
}

impl Coordinator for Etcd {
    fn read(&self) -> Answer<'_, Arc<Snapshot>> {
        Box::pin(self.read())
    }

    fn txn(&self, txn: Txn) -> Answer<'_, TxnOutcome> {
        Box::pin(self.txn(txn))
    }

    fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.mirror.subscribe()
    }

    fn renew(&self, term: Term, ttl: Duration) -> Answer<'_, Renewal> {
        Box::pin(self.renew(term, ttl))
    }

    fn release(&self, term: Term) -> Answer<'_, ()> {
        Box::pin(self.release(term))
    }

    fn free(&self, term: Term) -> Answer<'_, bool> {
        Box::pin(self.free(term))
    }

    fn lease_hint(&self) -> LeaseHint {
        self.mirror.hint()
    }

    fn trouble(&self) -> Option<String> {
        self.mirror.trouble()
    }

    fn forget(&self) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn endpoints(&self) -> Answer<'_, Vec<EndpointState>> {
        let ask = Range::of(format!("{}{LEASE}", self.writer.prefix));
        Box::pin(async move { self.client.ask_each("/v3/kv/range", &ask).await })
    }

    fn announce(&self, value: String) {
        self.presence.announce(value);
    }

    fn presence(&self) -> watch::Receiver<PresenceMap> {
        self.presence.presence()
    }
}
