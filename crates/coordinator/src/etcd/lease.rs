//! The lease as three keys, and the rules for changing them. Pure: what to ask etcd, and what its answer means.
//!
//! | key | value | written |
//! |---|---|---|
//! | `lease/holder` | who took which term | once a term, and at its release |
//! | `lease/beat` | the longest ttl of this term | at every renewal |
//! | `lease/free` | the greatest term that is over | once a term |
//!
//! The argument for them stands at the head of the parent module.

use std::time::Duration;

use craton_core::{BootTime, MemberId, Term};
use serde::{Deserialize, Serialize};

use super::wire::{CompareMod, KeyValue, RequestOp, TxnAsk};
use crate::promise::TTL_MAX;

/// `lease/holder`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Holder {
    pub(super) term: Term,
    pub(super) member: MemberId,
    #[serde(default)]
    pub(super) released: bool,
}

/// `lease/beat`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Beat {
    pub(super) ttl_ms: u64,
}

/// `lease/free`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Free {
    pub(super) through: Term,
}

/// A value with the revision that wrote it; no value at revision 0.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct At<T> {
    pub(super) revision: u64,
    pub(super) value: Option<T>,
}

impl<T> Default for At<T> {
    fn default() -> Self {
        Self {
            revision: 0,
            value: None,
        }
    }
}

/// The three keys at one revision of etcd.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct LeaseKeys {
    pub(super) holder: At<Holder>,
    pub(super) beat: At<Beat>,
    pub(super) free: At<Free>,
}

/// Names below the cluster's prefix.
pub(super) const LEASE: &str = "lease/";
const HOLDER: &str = "lease/holder";
const BEAT: &str = "lease/beat";
const FREE: &str = "lease/free";

fn value<T: serde::de::DeserializeOwned>(kv: &KeyValue) -> Result<At<T>, String> {
    let value = serde_json::from_str(&kv.value.0).map_err(|e| {
        format!(
            "etcd's key \"{}\" cannot be read by this version: {e}",
            kv.key.0
        )
    })?;
    Ok(At {
        revision: kv.mod_revision.0,
        value: Some(value),
    })
}

impl LeaseKeys {
    /// Takes one key in, if it is one of the lease's; `None` removes it.
    pub(super) fn note(&mut self, name: &str, kv: Option<&KeyValue>) -> Result<(), String> {
        match name {
            HOLDER => self.holder = kv.map(value).transpose()?.unwrap_or_default(),
            BEAT => self.beat = kv.map(value).transpose()?.unwrap_or_default(),
            FREE => self.free = kv.map(value).transpose()?.unwrap_or_default(),
            _ => {}
        }
        Ok(())
    }

    /// All terms up to this one are over.
    pub(super) fn free_through(&self) -> Term {
        self.free.value.map_or(Term(0), |f| f.through)
    }

    /// The lease that may still run, if there is one.
    pub(super) fn running(&self) -> Option<&Holder> {
        self.holder
            .value
            .as_ref()
            .filter(|h| h.term > self.free_through() && !h.released)
    }

    /// True if these are of before `held` was: its holder is not there, and no later one, and its term is not over.
    pub(super) fn precede(&self, held: &Held) -> bool {
        let holder = self.holder.value.as_ref().map_or(Term(0), |h| h.term);
        holder < held.term && self.free_through() < held.term
    }

    /// How long the beat must be seen unchanged before its term is over.
    pub(super) fn silence(&self) -> Duration {
        self.beat
            .value
            .map_or(TTL_MAX, |b| Duration::from_millis(b.ttl_ms))
    }
}

/// What a member that renews remembers of its lease.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Held {
    pub(super) term: Term,
    holder_revision: u64,
    free_revision: u64,
    ttl_ms: u64,
}

impl Held {
    /// With a ttl that is never shorter than what others were told.
    pub(super) fn at_least(self, ttl_ms: u64) -> Self {
        Self {
            ttl_ms: self.ttl_ms.max(ttl_ms),
            ..self
        }
    }
}

/// What to do about a wish.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// It is ours: renew it by these revisions.
    Renew(Held),
    /// Nobody's: take it.
    Take { ttl_ms: u64 },
    /// No, for good or for now.
    Refuse(String),
}

pub(super) fn ttl_ms(ttl: Duration) -> Result<u64, String> {
    if ttl.is_zero() || ttl > TTL_MAX {
        return Err(format!("a lease lasts at most {} s", TTL_MAX.as_secs()));
    }
    // Rounded up: others wait for at least what the holder counts on.
    u64::try_from(ttl.as_nanos().div_ceil(1_000_000)).map_err(|e| e.to_string())
}

/// What `me`, who wishes to hold `term`, may do.
pub(super) fn step(keys: &LeaseKeys, me: &MemberId, term: Term, ttl_ms: u64) -> Step {
    if term <= keys.free_through() {
        return Step::Refuse(format!(
            "term {term} is over: free through {}",
            keys.free_through()
        ));
    }
    match &keys.holder.value {
        Some(h) if h.term > term => {
            Step::Refuse(format!("term {term} is over: term {} was taken", h.term))
        }
        Some(h) if h.term == term && h.member != *me => {
            Step::Refuse(format!("term {term} is held by {}", h.member))
        }
        Some(h) if h.term == term && h.released => {
            Step::Refuse(format!("term {term} was released by its holder"))
        }
        Some(h) if h.term == term => Step::Renew(Held {
            term,
            holder_revision: keys.holder.revision,
            free_revision: keys.free.revision,
            ttl_ms: ttl_ms.max(keys.beat.value.map_or(0, |b| b.ttl_ms)),
        }),
        _ => match keys.running() {
            Some(h) => Step::Refuse(format!(
                "term {} is held by {} and may still run",
                h.term, h.member
            )),
            None => Step::Take { ttl_ms },
        },
    }
}

/// Makes the transactions of one cluster.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    pub(super) prefix: String,
}

impl Writer {
    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn put(&self, name: &str, value: &impl Serialize) -> Result<RequestOp, String> {
        let text = serde_json::to_string(value).map_err(|e| e.to_string())?;
        Ok(RequestOp::put(self.key(name), text))
    }

    fn txn(&self, compare: &[(&str, u64)], success: Vec<RequestOp>) -> TxnAsk {
        TxnAsk {
            compare: compare
                .iter()
                .map(|(name, revision)| CompareMod::new(self.key(name), *revision))
                .collect(),
            success,
            failure: vec![RequestOp::all_below(&self.key(LEASE))],
        }
    }

    /// Only while the same holder has it and its term is not over.
    pub(super) fn renew(&self, held: &Held) -> Result<TxnAsk, String> {
        let beat = Beat {
            ttl_ms: held.ttl_ms,
        };
        Ok(self.txn(
            &[(HOLDER, held.holder_revision), (FREE, held.free_revision)],
            vec![self.put(BEAT, &beat)?],
        ))
    }

    /// Only while nothing has changed since `keys`. All lower terms are over from here on.
    pub(super) fn take(
        &self,
        keys: &LeaseKeys,
        me: &MemberId,
        term: Term,
        ttl_ms: u64,
    ) -> Result<TxnAsk, String> {
        let holder = Holder {
            term,
            member: me.clone(),
            released: false,
        };
        let below = Term(term.0.saturating_sub(1));
        let mut puts = vec![
            self.put(HOLDER, &holder)?,
            self.put(BEAT, &Beat { ttl_ms })?,
        ];
        if keys.free_through() < below {
            puts.push(self.put(FREE, &Free { through: below })?);
        }
        Ok(self.txn(
            &[
                (HOLDER, keys.holder.revision),
                (BEAT, keys.beat.revision),
                (FREE, keys.free.revision),
            ],
            puts,
        ))
    }

    /// Only if nobody has renewed, taken or freed since `keys`.
    pub(super) fn free(&self, keys: &LeaseKeys, term: Term) -> Result<TxnAsk, String> {
        Ok(self.txn(
            &[
                (HOLDER, keys.holder.revision),
                (BEAT, keys.beat.revision),
                (FREE, keys.free.revision),
            ],
            vec![self.put(FREE, &Free { through: term })?],
        ))
    }

    /// By the holder itself. The changed key also stops renewals that are still on their way.
    pub(super) fn release(&self, keys: &LeaseKeys, holder: &Holder) -> Result<TxnAsk, String> {
        let released = Holder {
            released: true,
            ..holder.clone()
        };
        Ok(self.txn(
            &[(HOLDER, keys.holder.revision)],
            vec![self.put(HOLDER, &released)?],
        ))
    }
}

/// When this process first saw the newest beat.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Seen {
    revision: u64,
    at: BootTime,
}

impl Seen {
    /// A beat was seen, `now` being read **after** its arrival.
    pub(super) fn note(&mut self, revision: u64, now: BootTime) {
        if revision > self.revision {
            *self = Self { revision, at: now };
        }
    }

    /// Since when the beat of `keys` is known to stand; now, if it is news.
    pub(super) fn since(&mut self, keys: &LeaseKeys, now: BootTime) -> BootTime {
        self.note(keys.beat.revision, now);
        if keys.beat.revision == self.revision {
            self.at
        } else {
            // Older than what was seen already: whatever is decided on it will fail its comparison.
            now
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> MemberId {
        MemberId::new(name).unwrap()
    }

    fn keys(term: u64, who: &str, released: bool, free: u64) -> LeaseKeys {
        LeaseKeys {
            holder: At {
                revision: 5,
                value: Some(Holder {
                    term: Term(term),
                    member: id(who),
                    released,
                }),
            },
            beat: At {
                revision: 9,
                value: Some(Beat { ttl_ms: 3000 }),
            },
            free: At {
                revision: 4,
                value: Some(Free {
                    through: Term(free),
                }),
            },
        }
    }

    fn refused(keys: &LeaseKeys, who: &str, term: u64) -> bool {
        matches!(step(keys, &id(who), Term(term), 2000), Step::Refuse(_))
    }

    #[test]
    fn a_term_has_one_holder_and_ends_for_good() {
        let running = keys(7, "a", false, 6);
        assert!(
            matches!(step(&running, &id("a"), Term(7), 2000), Step::Renew(h) if h.ttl_ms == 3000),
            "a shorter ttl never shortens what others wait for"
        );
        assert!(refused(&running, "b", 7), "one holder");
        assert!(refused(&running, "b", 8), "not before 7 is over");
        assert!(refused(&running, "a", 6), "lower terms are over");
        let released = keys(7, "a", true, 6);
        assert!(refused(&released, "a", 7), "not even by its holder");
        assert_eq!(
            step(&released, &id("b"), Term(8), 2000),
            Step::Take { ttl_ms: 2000 }
        );
        let over = keys(7, "a", false, 7);
        assert!(refused(&over, "a", 7));
        assert_eq!(
            step(&over, &id("b"), Term(8), 2000),
            Step::Take { ttl_ms: 2000 }
        );
        assert_eq!(
            step(&LeaseKeys::default(), &id("a"), Term(1), 2000),
            Step::Take { ttl_ms: 2000 }
        );
    }

    #[test]
    fn what_was_held_is_missed() {
        let Step::Renew(held) = step(&keys(7, "a", false, 6), &id("a"), Term(7), 2000) else {
            unreachable!()
        };
        assert!(LeaseKeys::default().precede(&held), "emptied");
        assert!(keys(5, "b", false, 4).precede(&held), "an old copy");
        assert!(!keys(7, "a", false, 6).precede(&held));
        assert!(!keys(8, "b", false, 7).precede(&held), "the next one");
        assert!(!keys(5, "b", false, 7).precede(&held), "called over");
    }

    #[test]
    fn silence_counts_from_the_newest_beat() {
        let mut seen = Seen::default();
        let mut now = keys(7, "a", false, 6);
        assert_eq!(seen.since(&now, BootTime(100)), BootTime(100));
        assert_eq!(seen.since(&now, BootTime(200)), BootTime(100));
        now.beat.revision = 10;
        assert_eq!(seen.since(&now, BootTime(300)), BootTime(300));
        now.beat.revision = 9;
        assert_eq!(
            seen.since(&now, BootTime(400)),
            BootTime(400),
            "an old answer proves no silence"
        );
    }

    #[test]
    fn without_a_known_ttl_the_longest_is_waited_for() {
        assert_eq!(LeaseKeys::default().silence(), TTL_MAX);
    }
}
