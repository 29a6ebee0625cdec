//! The record that says where the records are, and revisions that never go back. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use craton_core::Term;
use serde::{Deserialize, Serialize};

use crate::api::{Compare, CoordinatorError, Op, Snapshot, Txn, Versioned};
use crate::place::Place;

/// Its key.
pub(super) const PLACEMENT: &str = "placement";

/// No key has it: etcd's revisions are signed.
const NO_REVISION: u64 = i64::MAX.cast_unsigned();

/// `placement`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Placement {
    /// Grows by one with every move.
    pub(super) generation: u64,
    /// What is added to this store's revisions.
    pub(super) offset: u64,
    /// Where the records were before, until the lease there is known to be over.
    pub(super) former: Option<Former>,
    /// Where they go.
    pub(super) next: Option<Next>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Former {
    pub(super) place: Place,
    /// The highest term that can have a lease there.
    pub(super) term: Term,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Next {
    pub(super) place: Place,
    pub(super) sealed: bool,
}

impl Placement {
    pub(super) fn sealed(&self) -> bool {
        self.next.as_ref().is_some_and(|n| n.sealed)
    }
}

/// The placement in a store, with its record's revision there.
pub(super) fn parse(snapshot: &Snapshot) -> Result<(Placement, u64), String> {
    match snapshot.get(PLACEMENT) {
        None => Ok((Placement::default(), 0)),
        Some(at) => serde_json::from_str(&at.value)
            .map(|p| (p, at.mod_revision))
            .map_err(|e| format!("the record \"{PLACEMENT}\" cannot be read: {e}")),
    }
}

pub(super) fn record(placement: &Placement) -> Result<Op, String> {
    Ok(Op::Put {
        key: PLACEMENT.to_owned(),
        value: serde_json::to_string(placement).map_err(|e| e.to_string())?,
    })
}

/// A store's snapshot as it is shown: later than anything that was shown of the store before.
pub(super) fn shown(raw: &Arc<Snapshot>, offset: u64) -> Arc<Snapshot> {
    if offset == 0 {
        return Arc::clone(raw);
    }
    let entries: BTreeMap<_, _> = raw
        .entries
        .iter()
        .map(|(key, at)| {
            let at = Versioned {
                mod_revision: at.mod_revision + offset,
                value: at.value.clone(),
            };
            (key.clone(), at)
        })
        .collect();
    Arc::new(Snapshot {
        revision: raw.revision + offset,
        entries,
    })
}

/// A transaction made on what was shown, as the store must hear it.
pub(super) fn to_raw(txn: Txn, offset: u64) -> Result<Txn, CoordinatorError> {
    if txn.compares.iter().any(|c| c.key == PLACEMENT)
        || txn
            .ops
            .iter()
            .any(|op| matches!(op, Op::Put { key, .. } | Op::Delete { key } if key == PLACEMENT))
    {
        return Err(CoordinatorError::Refused(format!(
            "the key \"{PLACEMENT}\" is the coordinator's own"
        )));
    }
    let compares = txn
        .compares
        .into_iter()
        .map(|c| Compare {
            mod_revision: match c.mod_revision {
                0 => 0,
                // Read in the store before: certainly changed since.
                r if r <= offset => NO_REVISION,
                r => r - offset,
            },
            key: c.key,
        })
        .collect();
    Ok(Txn {
        compares,
        ops: txn.ops,
    })
}
