//! The state machine: keys with revisions, and what became of each client's last requests. Pure.
//!
//! A request carries `(client, seq)`. Its outcome is remembered, so that a caller whose answer got lost
//! can send the very same request again and learn what happened, instead of doing it twice.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::api::{Compare, Op, Snapshot, Txn, TxnOutcome, Versioned};

/// Outcomes remembered for each client. A client never has more requests under way than this.
pub const OUTCOMES_MAX: usize = 64;

/// Clients remembered; the one unused for longest goes first. A client is one start of one process, so
/// a request could be done twice only if this many processes started within one call's two seconds.
pub const SESSIONS_MAX: usize = 256;

/// The longest key, in bytes.
pub const KEY_LEN_MAX: usize = 256;

/// The longest value, in bytes.
pub const VALUE_LEN_MAX: usize = 256 * 1024;

/// Comparisons and changes in one transaction, together.
pub const TXN_STEPS_MAX: usize = 128;

/// A transaction with the identity that makes repeating it harmless.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Request {
    /// One start of one process; drawn at random.
    pub client: u64,
    /// Counts the client's requests from 1.
    pub seq: u64,
    /// What is to be done.
    pub txn: Txn,
}

/// What applying a request gave.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Applied {
    /// Done now, or earlier by the same request.
    Outcome(TxnOutcome),
    /// So old that its outcome is no longer remembered; not done now.
    Forgotten,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
struct Session {
    used: u64,
    outcomes: BTreeMap<u64, TxnOutcome>,
    /// Requests up to this one are no longer remembered.
    forgotten_through: u64,
}

/// The whole replicated state.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Store {
    #[serde(with = "by_value")]
    snapshot: Arc<Snapshot>,
    sessions: BTreeMap<u64, Session>,
    /// Counts requests, for "unused for longest".
    requests: u64,
}

impl Store {
    /// The keys, at the newest revision.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshot)
    }

    /// Applies a request once, however often it comes.
    pub fn apply(&mut self, request: &Request) -> Applied {
        self.requests += 1;
        let used = self.requests;
        let session = self.sessions.entry(request.client).or_default();
        session.used = used;
        if let Some(&outcome) = session.outcomes.get(&request.seq) {
            return Applied::Outcome(outcome);
        }
        if request.seq <= session.forgotten_through {
            return Applied::Forgotten;
        }
        let outcome = apply_txn(&mut self.snapshot, &request.txn);
        session.outcomes.insert(request.seq, outcome);
        while session.outcomes.len() > OUTCOMES_MAX {
            if let Some((seq, _)) = session.outcomes.pop_first() {
                session.forgotten_through = seq;
            }
        }
        self.forget_sessions();
        Applied::Outcome(outcome)
    }

    fn forget_sessions(&mut self) {
        while self.sessions.len() > SESSIONS_MAX {
            let oldest = self
                .sessions
                .iter()
                .min_by_key(|(_, s)| s.used)
                .map(|(&client, _)| client);
            match oldest {
                Some(client) => self.sessions.remove(&client),
                None => return,
            };
        }
    }
}

/// Writes what an `Arc` points to.
mod by_value {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::api::Snapshot;

    pub(super) fn serialize<S: Serializer>(
        snapshot: &Arc<Snapshot>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        snapshot.as_ref().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Arc<Snapshot>, D::Error> {
        Snapshot::deserialize(from).map(Arc::new)
    }
}

/// Refuses transactions that are larger than the limits; the text names the limit.
pub fn check_txn(txn: &Txn) -> Result<(), String> {
    if txn.compares.len() + txn.ops.len() > TXN_STEPS_MAX {
        return Err(format!(
            "a transaction has at most {TXN_STEPS_MAX} comparisons and changes"
        ));
    }
    let keys = txn
        .compares
        .iter()
        .map(|c| &c.key)
        .chain(txn.ops.iter().map(|op| match op {
            Op::Put { key, .. } | Op::Delete { key } => key,
        }));
    for key in keys {
        if key.is_empty() || key.len() > KEY_LEN_MAX {
            return Err(format!(
                "a key has 1 to {KEY_LEN_MAX} bytes, this one has {}",
                key.len()
            ));
        }
    }
    for op in &txn.ops {
        if let Op::Put { key, value } = op
            && value.len() > VALUE_LEN_MAX
        {
            return Err(format!(
                "a value has at most {VALUE_LEN_MAX} bytes, that of \"{key}\" has {}",
                value.len()
            ));
        }
    }
    Ok(())
}

/// Compare, then change. A transaction that changes nothing leaves the revision alone.
pub fn apply_txn(snapshot: &mut Arc<Snapshot>, txn: &Txn) -> TxnOutcome {
    let holds = |c: &Compare| snapshot.get(&c.key).map_or(0, |v| v.mod_revision) == c.mod_revision;
    if !txn.compares.iter().all(holds) {
        return TxnOutcome::Conflict;
    }
    let changes = txn.ops.iter().any(|op| match op {
        Op::Put { .. } => true,
        Op::Delete { key } => snapshot.entries.contains_key(key),
    });
    if !changes {
        return TxnOutcome::Committed(snapshot.revision);
    }
    let next = Arc::make_mut(snapshot);
    next.revision += 1;
    for op in &txn.ops {
        match op {
            Op::Put { key, value } => {
                next.entries.insert(
                    key.clone(),
                    Versioned {
                        mod_revision: next.revision,
                        value: value.clone(),
                    },
                );
            }
            Op::Delete { key } => {
                next.entries.remove(key);
            }
        }
    }
    TxnOutcome::Committed(next.revision)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, mod_revision: u64, value: &str) -> Txn {
        Txn {
            compares: vec![Compare {
                key: key.into(),
                mod_revision,
            }],
            ops: vec![Op::Put {
                key: key.into(),
                value: value.into(),
            }],
        }
    }

    #[test]
    fn a_request_is_done_once_however_often_it_comes() {
        let mut store = Store::default();
        let request = Request {
            client: 7,
            seq: 1,
            txn: put("a", 0, "1"),
        };
        assert_eq!(
            store.apply(&request),
            Applied::Outcome(TxnOutcome::Committed(1))
        );
        assert_eq!(
            store.apply(&request),
            Applied::Outcome(TxnOutcome::Committed(1))
        );
        let other = Request {
            client: 8,
            ..request
        };
        assert_eq!(store.apply(&other), Applied::Outcome(TxnOutcome::Conflict));
        assert_eq!(store.snapshot().revision, 1);
    }

    #[test]
    fn what_is_forgotten_is_not_done_again() {
        let mut store = Store::default();
        for seq in 1..=OUTCOMES_MAX as u64 + 1 {
            store.apply(&Request {
                client: 7,
                seq,
                txn: put("a", seq - 1, "x"),
            });
        }
        let revision = store.snapshot().revision;
        let unconditional = Txn {
            compares: vec![],
            ops: vec![Op::Put {
                key: "a".into(),
                value: "again".into(),
            }],
        };
        assert_eq!(
            store.apply(&Request {
                client: 7,
                seq: 1,
                txn: unconditional
            }),
            Applied::Forgotten
        );
        assert_eq!(store.snapshot().revision, revision);
    }

    #[test]
    fn sessions_are_bounded() {
        let mut store = Store::default();
        for client in 0..SESSIONS_MAX as u64 * 2 {
            store.apply(&Request {
                client,
                seq: 1,
                txn: Txn::default(),
            });
        }
        assert_eq!(store.sessions.len(), SESSIONS_MAX);
    }

    #[test]
    fn limits_are_named() {
        assert!(
            check_txn(&put("", 0, ""))
                .unwrap_err()
                .contains("256 bytes")
        );
        assert!(
            check_txn(&put("a", 0, &"x".repeat(VALUE_LEN_MAX + 1)))
                .unwrap_err()
                .contains("262144")
        );
        assert!(check_txn(&put("a", 0, "1")).is_ok());
    }
}
