//! What a member notes on its disk of where the records are, so that a restart begins there.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::place::Place;

/// The format that this version writes.
const FORMAT: u32 = 1;

/// The place that was used last.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Note {
    format: u32,
    /// Where the records were.
    pub place: Place,
    /// How often they had moved by then.
    pub generation: u64,
    /// The cluster's system id, where there was one then.
    pub system_id: Option<String>,
}

impl Note {
    /// A note of the present format.
    pub fn new(place: Place, generation: u64, system_id: Option<String>) -> Self {
        Self {
            format: FORMAT,
            place,
            generation,
            system_id,
        }
    }
}

/// What a member of this directory noted last, if anything.
pub fn remembered(memory: &Path) -> Result<Option<Note>, String> {
    let text = match std::fs::read_to_string(memory) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(format!("cannot read {}: {e}", memory.display())),
    };
    let wrong = |why: &dyn std::fmt::Display| {
        format!(
            "{}, which says where the cluster's records are, cannot be understood: {why}; copy it from another member",
            memory.display()
        )
    };
    let note: Note = serde_json::from_str(&text).map_err(|e| wrong(&e))?;
    if note.format != FORMAT {
        return Err(wrong(&format!(
            "it has format {}, this version reads {FORMAT}",
            note.format
        )));
    }
    Ok(Some(note))
}

/// Notes it, durably.
pub fn remember(memory: &Path, note: &Note) -> std::io::Result<()> {
    use std::io::Write as _;
    let text = serde_json::to_string(note).map_err(std::io::Error::other)?;
    let tmp = memory.with_extension("tmp");
    let mut file = std::fs::File::create(&tmp)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&tmp, memory)?;
    match memory.parent() {
        Some(dir) => std::fs::File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}
