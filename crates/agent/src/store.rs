//! The coordinator's texts as typed records, and back.

use craton_coordinator::api::{Compare, Op, Snapshot, Txn, Versioned};
use craton_core::MemberId;
use craton_core::records::{At, Change, ClusterView, Key, Record};
use serde::de::DeserializeOwned;

/// A value in the coordinator that this version cannot read.
#[derive(Debug, thiserror::Error)]
#[error("the coordinator's key \"{key}\" cannot be read by this version: {reason}")]
pub struct StoreError {
    key: String,
    reason: String,
}

fn parse<T: DeserializeOwned>(key: &str, at: &Versioned) -> Result<At<T>, StoreError> {
    let value = serde_json::from_str(&at.value).map_err(|e| StoreError {
        key: key.to_owned(),
        reason: e.to_string(),
    })?;
    Ok(At {
        revision: at.mod_revision,
        value,
    })
}

/// The typed view of a snapshot. Unknown keys are left alone: a newer version may have written them.
pub fn view(snapshot: &Snapshot) -> Result<ClusterView, StoreError> {
    let mut view = ClusterView {
        revision: snapshot.revision,
        ..ClusterView::default()
    };
    for (key, at) in &snapshot.entries {
        let member = |name: &str| {
            MemberId::new(name).map_err(|reason| StoreError {
                key: key.clone(),
                reason,
            })
        };
        match key.as_str() {
            "cluster" => view.cluster = Some(parse(key, at)?),
            "settings" => view.settings = Some(parse(key, at)?),
            "leadership" => view.leadership = Some(parse(key, at)?),
            "timelines" => view.timelines = Some(parse(key, at)?),
            "request" => view.request = Some(parse(key, at)?),
            "history" => view.history = Some(parse(key, at)?),
            other => match other.split_once('/') {
                None if other == "pause" => view.pause = Some(parse(key, at)?),
                None if other == "schedule" => view.schedule = Some(parse(key, at)?),
                None if other == "restart" => view.restart = Some(parse(key, at)?),
                Some(("order", name)) => {
                    view.orders.insert(member(name)?, parse(key, at)?);
                }
                Some(("member", name)) => {
                    view.members.insert(member(name)?, parse(key, at)?);
                }
                Some(("receiver", name)) => {
                    view.receivers.insert(member(name)?, parse(key, at)?);
                }
                Some(("seal", name)) => {
                    view.seals.insert(member(name)?, parse(key, at)?);
                }
                _ => {}
            },
        }
    }
    Ok(view)
}

fn text(record: &Record) -> Result<String, serde_json::Error> {
    match record {
        Record::Cluster(v) => serde_json::to_string(v),
        Record::Settings(v) => serde_json::to_string(v),
        Record::Leadership(v) => serde_json::to_string(v),
        Record::Timelines(v) => serde_json::to_string(v),
        Record::Request(v) => serde_json::to_string(v),
        Record::History(v) => serde_json::to_string(v),
        Record::Pause(v) => serde_json::to_string(v),
        Record::Schedule(v) => serde_json::to_string(v),
        Record::Restart(v) => serde_json::to_string(v),
        Record::Order(_, v) => serde_json::to_string(v),
        Record::Member(_, v) => serde_json::to_string(v),
        Record::Seal(_, v) => serde_json::to_string(v),
        Record::Receiver(_, v) => serde_json::to_string(v),
    }
}

/// The transaction that a change stands for.
pub fn txn(change: &Change) -> Result<Txn, StoreError> {
    let mut ops = Vec::with_capacity(change.puts.len() + change.deletes.len());
    for record in &change.puts {
        let key = record.key().path();
        let value = text(record).map_err(|e| StoreError {
            key: key.clone(),
            reason: e.to_string(),
        })?;
        ops.push(Op::Put { key, value });
    }
    ops.extend(change.deletes.iter().map(|key| Op::Delete {
        key: Key::path(key),
    }));
    let compares = change
        .expect
        .iter()
        .map(|(key, revision)| Compare {
            key: key.path(),
            mod_revision: *revision,
        })
        .collect();
    Ok(Txn { compares, ops })
}

#[cfg(test)]
mod tests {
    use craton_core::observe::FirstStart;
    use craton_core::records::ClusterRecord;

    use super::*;

    #[test]
    fn records_survive_the_store() {
        let record = ClusterRecord {
            name: "c".into(),
            initializer: MemberId::new("a").unwrap(),
            system_id: None,
            bootstrapped: false,
            founding: FirstStart::Make,
        };
        let change = Change {
            expect: vec![(Key::Cluster, 0)],
            puts: vec![Record::Cluster(record.clone())],
            deletes: vec![],
        };
        let txn = txn(&change).unwrap();
        let [Op::Put { key, value }] = txn.ops.as_slice() else {
            unreachable!()
        };
        let mut snapshot = Snapshot {
            revision: 3,
            ..Snapshot::default()
        };
        snapshot.entries.insert(
            key.clone(),
            Versioned {
                mod_revision: 3,
                value: value.clone(),
            },
        );
        snapshot.entries.insert(
            "future/x".into(),
            Versioned {
                mod_revision: 3,
                value: "?".into(),
            },
        );
        let view = view(&snapshot).unwrap();
        assert_eq!(
            view.cluster,
            Some(At {
                revision: 3,
                value: record
            })
        );
    }
}
