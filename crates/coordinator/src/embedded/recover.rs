//! Going on alone when the majority of the voters is lost for good: done offline, on one survivor, by an operator
//! who knows that the others are gone.
//!
//! The survivor becomes the only voter. All that is in its log counts as committed, also what the lost majority
//! never agreed to; what only the lost ones had is lost. The other members are noted as removed: one that
//! comes back is told so, and another survivor joins anew with an empty coordinator directory (its PostgreSQL
//! keeps its data). What this cannot prevent is that the lost ones, if enough of them come back, find each other
//! and go on as the former cluster: they must be destroyed, or their coordinator directories emptied.
//!
//! The log may be an old one: cut off first, its owner knows neither who led since nor what became of the sync set.
//! So the leadership is marked (`Leadership::recovered`): nobody leads by it before the operator accepts the loss of
//! what others may have acknowledged. What was accepted or asked for before is taken back; it was another loss.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use craton_core::MemberId;
use craton_core::records::{Event, History, Key, Leadership, Timelines};

use super::disk::{Faults, LOG_FILE, OpenError, Store};
use crate::api::{Op, Snapshot, Txn};
use crate::kv;
use crate::placed::moved_to;
use crate::raft::{Configuration, Entry, Index, Payload, RaftTerm, Standing};

/// Epochs that a recovery leaps, so that no voter of the former cluster has ever settled in the new one.
const EPOCH_LEAP: u64 = 1000;

/// What a voter's disk holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Survey {
    /// Who takes part, by the newest entry.
    pub config: Configuration,
    /// Raft's term.
    pub term: RaftTerm,
    /// The last entry.
    pub last_index: Index,
    /// The store, with every entry applied.
    pub snapshot: Arc<Snapshot>,
}

/// Why it is not done.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The directory.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// There is nothing to go on from.
    #[error("{0}")]
    Refused(String),
}

fn survey_of(store: &Store) -> Result<Survey, RecoverError> {
    let raft = &store.contents().raft;
    let mut config = raft.image.as_ref().map_or_else(
        || Configuration::begun(raft.hard.births.clone()),
        crate::raft::Image::configuration,
    );
    let mut state = match &raft.image {
        Some(image) => serde_json::from_str::<kv::Store>(&image.data)
            .map_err(|e| RecoverError::Refused(format!("the image cannot be read: {e}")))?,
        None => kv::Store::default(),
    };
    let mut last_index = raft.image.as_ref().map_or(0, |i| i.last_index);
    for entry in &raft.entries {
        last_index = entry.index;
        match &entry.payload {
            Payload::Noop => {}
            Payload::Command(text) => {
                // As every member does: what is not understood is left out.
                if let Ok(request) = serde_json::from_str(text) {
                    state.apply(&request);
                }
            }
            Payload::Readmit { member, birth } => {
                if let Some(b) = config.voters.get_mut(member) {
                    *b = *birth;
                }
            }
            Payload::Configure(next) => config.clone_from(next),
        }
    }
    Ok(Survey {
        config,
        term: raft.hard.term,
        last_index,
        snapshot: state.snapshot(),
    })
}

fn open(dir: &Path) -> Result<Store, RecoverError> {
    if !dir.join(LOG_FILE).exists() {
        return Err(RecoverError::Refused(format!(
            "there is no coordinator in {}",
            dir.display()
        )));
    }
    Ok(Store::open(dir, 1, Faults::default())?)
}

/// What this disk holds. The agent must not run.
pub fn survey(dir: &Path) -> Result<Survey, RecoverError> {
    survey_of(&open(dir)?)
}

/// A record as it stands; none if there is none.
fn record<T: serde::de::DeserializeOwned>(
    snapshot: &Snapshot,
    key: &Key,
) -> Result<Option<T>, RecoverError> {
    let path = key.path();
    let Some(at) = snapshot.get(&path) else {
        return Ok(None);
    };
    serde_json::from_str(&at.value)
        .map(Some)
        .map_err(|e| RecoverError::Refused(format!("the record \"{path}\" cannot be read: {e}")))
}

fn put<T: serde::Serialize>(key: &Key, value: &T) -> Result<Op, RecoverError> {
    let value = serde_json::to_string(value)
        .map_err(|e| RecoverError::Refused(format!("\"{}\": {e}", key.path())))?;
    Ok(Op::Put {
        key: key.path(),
        value,
    })
}

/// The records say from now on that they may be old. None where they are elsewhere, and none is here.
fn mark(snapshot: &Snapshot, me: &MemberId, at_ms: u64) -> Result<Option<String>, RecoverError> {
    let Some(leadership) = record::<Leadership>(snapshot, &Key::Leadership)? else {
        if moved_to(snapshot).is_some() {
            return Ok(None);
        }
        return Err(RecoverError::Refused(
            "nobody has ever led by what is on this disk, so there is nothing to go on from: use a member that knows more, or empty the directories of all and start a new cluster".into(),
        ));
    };
    let event = Event {
        at_ms,
        term: leadership.term,
        member: me.clone(),
        kind: "recovered".into(),
        text: format!(
            "recovered by an operator on {me}, which is the only voter now: what it knows (term {}, commits flushed on {}) may be old, so nobody leads before craton failover --allow-data-loss",
            leadership.term, leadership.sync
        ),
    };
    let history = record::<History>(snapshot, &Key::History)?.unwrap_or_default();
    let timelines = record::<Timelines>(snapshot, &Key::Timelines)?.unwrap_or_default();
    let recovered = leadership.into_recovered(at_ms);
    let timelines = timelines.into_recovered(recovered.term, me.clone(), at_ms);
    // What was asked for before, of members that may know more than this one, is not done.
    let asked = snapshot.entries.keys().filter(|path| {
        let one = [Key::Request, Key::Restart, Key::Schedule];
        path.starts_with("order/") || one.iter().any(|k| k.path() == **path)
    });
    let mut ops = vec![
        put(&Key::Leadership, &recovered)?,
        put(&Key::Timelines, &timelines)?,
        put(&Key::History, &history.with(event))?,
    ];
    ops.extend(asked.map(|key| Op::Delete { key: key.clone() }));
    let request = kv::Request {
        client: rand::random(),
        seq: 1,
        txn: Txn {
            compares: vec![],
            ops,
        },
    };
    let text = serde_json::to_string(&request)
        .map_err(|e| RecoverError::Refused(format!("the mark cannot be written: {e}")))?;
    Ok(Some(text))
}

/// Makes this voter the only one, and says so in its records. The agent must not run. `at_ms` is the time for the
/// history, milliseconds since 1970.
pub fn stand_alone(dir: &Path, me: &MemberId, at_ms: u64) -> Result<Survey, RecoverError> {
    let mut store = open(dir)?;
    let before = survey_of(&store)?;
    let mut contents = store.contents().clone();
    let hard = &mut contents.raft.hard;
    if hard.standing != Standing::Voter || !before.config.voters.contains_key(me) {
        return Err(RecoverError::Refused(format!(
            "{me} has no say by what is on this disk: it never had one, lost its disk, or was removed; use a member that has"
        )));
    }
    let mark = mark(&before.snapshot, me, at_ms)?;
    hard.term += 1;
    hard.vote = None;
    let (term, birth) = (hard.term, hard.birth);
    let lost: Vec<MemberId> = before
        .config
        .members()
        .filter(|m| *m != me)
        .cloned()
        .collect();
    let mut next = Configuration {
        epoch: before.config.epoch + EPOCH_LEAP,
        voters: [(me.clone(), birth)].into(),
        previous: BTreeSet::from([me.clone()]),
        learners: BTreeSet::new(),
        ..before.config.clone()
    };
    next.removed.extend(lost);
    next.addresses.retain(|member, _| member == me);
    contents.raft.entries.push(Entry {
        index: before.last_index + 1,
        term,
        payload: Payload::Configure(next),
    });
    if let Some(mark) = mark {
        contents.raft.entries.push(Entry {
            index: before.last_index + 2,
            term,
            payload: Payload::Command(mark),
        });
    }
    store.rewrite(contents)?;
    survey_of(&store)
}
