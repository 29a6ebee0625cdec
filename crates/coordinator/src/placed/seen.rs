//! What a member has seen of the records in a store that it does not keep itself: whoever empties such a store, or
//! restores it from an old copy, brings back what is over. The comparison is pure; the copy on disk is for a restart.

use std::path::{Path, PathBuf};

use craton_core::Term;
use craton_core::records::{Leadership, Timelines};
use serde::{Deserialize, Serialize};

use super::record::parse;
use super::steps::system_id;
use crate::api::Snapshot;
use crate::place::Place;

/// The format that this version writes.
const FORMAT: u32 = 1;

/// The newest records that were believed, as they are in the store.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    format: u32,
    place: Place,
    records: Snapshot,
    #[serde(default)]
    shift: Shift,
}

/// By how much revisions are shown higher than the store has them, so that they never go back: another process of this
/// member goes on with it, and with it the proxies that it has told.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Shift {
    /// Beside the placement's offset.
    pub(super) extra: u64,
    /// The offset of the placement that `extra` was made for.
    pub(super) offset: u64,
}

/// How new records are.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Age {
    generation: u64,
    system_id: Option<String>,
    term: Term,
    /// The leadership's revision, with the offset of its store.
    revision: u64,
    leadership: Option<String>,
    timelines: Timelines,
}

fn age(records: &Snapshot) -> Result<Age, String> {
    let (placement, _) = parse(records)?;
    let leadership = records.get("leadership");
    let timelines = match records.get("timelines") {
        None => Timelines::default(),
        Some(at) => serde_json::from_str(&at.value)
            .map_err(|e| format!("the record \"timelines\" cannot be read: {e}"))?,
    };
    Ok(Age {
        generation: placement.generation,
        system_id: system_id(records),
        term: leadership_term(records)?,
        revision: leadership.map_or(0, |at| at.mod_revision.saturating_add(placement.offset)),
        leadership: leadership.map(|at| at.value.clone()),
        timelines,
    })
}

/// The term of the leadership, 0 if there is none.
pub(super) fn leadership_term(records: &Snapshot) -> Result<Term, String> {
    match records.get("leadership") {
        None => Ok(Term(0)),
        Some(at) => serde_json::from_str::<Leadership>(&at.value)
            .map(|l| l.term)
            .map_err(|e| format!("the record \"leadership\" cannot be read: {e}")),
    }
}

/// Whether `found` can be what `known` has become. Terms and the revisions of the leadership only grow, and no timeline
/// is ever forgotten: where one is missing, its number would be used twice. `Err` says what is missing.
pub(super) fn not_older(place: &Place, known: &Snapshot, found: &Snapshot) -> Result<(), String> {
    let (before, now) = (age(known)?, age(found)?);
    if let (Some(known), Some(other)) = (&before.system_id, &now.system_id)
        && known != other
    {
        return Err(format!(
            "{place} holds the records of another cluster (system id {other}, this one has {known})"
        ));
    }
    let missing = if now.generation < before.generation {
        format!(
            "records of generation {}, this member knew generation {}",
            now.generation, before.generation
        )
    } else if before.system_id.is_some() && now.system_id.is_none() {
        "no record of which cluster this is".to_owned()
    } else if (now.term, now.revision) < (before.term, before.revision)
        || (now.revision == before.revision && now.leadership != before.leadership)
    {
        format!(
            "a leadership of term {} (revision {}), which is an earlier one",
            now.term, now.revision
        )
    } else if now.generation > before.generation {
        // A move copies all there is. An operator's order may have left out what this member knew: that is decided, and
        // this member follows nothing below its floor.
        return Ok(());
    } else if !now.timelines.0.starts_with(&before.timelines.0) {
        format!(
            "{} timelines that are not those that this member knew ({}, the last of term {})",
            now.timelines.0.len(),
            before.timelines.0.len(),
            before.timelines.0.last().map_or(Term(0), |t| t.term)
        )
    } else {
        return Ok(());
    };
    Err(format!(
        "{place} holds {missing}: that store was emptied, or restored from an old copy. It counts as unavailable, and nothing is changed through it: restore the newest copy, or `craton coordinator rebuild` (this member knows term {} at revision {})",
        before.term, before.revision
    ))
}

/// Where it is kept, beside the note of the place.
pub(super) fn file(memory: &Path) -> PathBuf {
    memory.with_file_name("records.json")
}

/// What was kept of the records at `place`, if anything. What cannot be read is as good as nothing: the floor and the
/// note of the place remain.
pub(super) fn load(path: &Path, place: &Place) -> Option<(Snapshot, Shift)> {
    let text = std::fs::read_to_string(path).ok()?;
    match serde_json::from_str::<Saved>(&text) {
        Ok(saved) if saved.format == FORMAT => {
            let same = saved.place.is_same_store(place);
            same.then_some((saved.records, saved.shift))
        }
        Ok(saved) => {
            tracing::warn!(format = saved.format, path = %path.display(), "the copy of the records is of another version");
            None
        }
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "the copy of the records cannot be read");
            None
        }
    }
}

/// Keeps it, durably.
pub(super) fn save(
    path: &Path,
    place: &Place,
    records: &Snapshot,
    shift: Shift,
) -> std::io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let saved = Saved {
        format: FORMAT,
        place: place.clone(),
        records: records.clone(),
        shift,
    };
    let text = serde_json::to_string(&saved).map_err(std::io::Error::other)?;
    let tmp = path.with_extension("tmp");
    let mut options = std::fs::File::options();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(&tmp)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&tmp, path)?;
    match path.parent() {
        Some(dir) => std::fs::File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}
