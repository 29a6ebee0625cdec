//! Where things lie in a repository, as paths relative to its root.
//!
//! ```text
//! craton-repository.json                        what this is, and whose
//! backups/<id>.json                             a manifest; the backup exists when this does
//! packs/<2 hex>/<64 hex>.pack                   chunks
//! wal/<timeline>/<segment>.zst                  a whole segment
//! wal/<timeline>/<segment>.full                 a whole segment that waits to be compressed
//! wal/<timeline>/<segment>.partial              the segment being received, as far as it came
//! wal/<timeline>.history                        how a timeline came to be
//! wal/gaps.json                                 WAL that no member could give any more
//! ```

use craton_core::TimelineId;
use serde::{Deserialize, Serialize};

use crate::FormatError;
use crate::manifest::BackupId;
use crate::pack::PackId;
use crate::segment::SegmentId;

/// The file that makes a directory a repository.
pub const DESCRIPTOR: &str = "craton-repository.json";
/// The directory of the manifests.
pub const BACKUPS: &str = "backups";
/// The directory of the packs.
pub const PACKS: &str = "packs";
/// The directory of the WAL.
pub const WAL: &str = "wal";
/// The record of the gaps.
pub const GAPS: &str = "wal/gaps.json";
/// The version of the layout that this program writes, and the newest it reads.
pub const LAYOUT_VERSION: u32 = 1;

/// What a repository says about itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Descriptor {
    /// Always `craton-repository`.
    pub kind: String,
    /// The version of the layout.
    pub version: u32,
    /// The database cluster whose WAL and backups it holds (`system_identifier`); a repository
    /// serves one cluster, because segment names of two would collide.
    pub system_id: u64,
    /// `wal_segment_size` in bytes.
    pub wal_segment_size: u64,
}

impl Descriptor {
    /// A new one.
    pub fn new(system_id: u64, wal_segment_size: u64) -> Self {
        Self {
            kind: "craton-repository".into(),
            version: LAYOUT_VERSION,
            system_id,
            wal_segment_size,
        }
    }

    /// Reads [`DESCRIPTOR`].
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "repository descriptor";
        let d: Self =
            serde_json::from_slice(bytes).map_err(|e| FormatError::corrupt(WHAT, e.to_string()))?;
        if d.kind != "craton-repository" {
            return Err(FormatError::Magic(WHAT));
        }
        if d.version > LAYOUT_VERSION {
            return Err(FormatError::Version {
                what: WHAT,
                found: d.version,
                known: LAYOUT_VERSION,
            });
        }
        if !crate::segment::is_segment_size(d.wal_segment_size) {
            return Err(FormatError::corrupt(
                WHAT,
                format!("{} is not a WAL segment size", d.wal_segment_size),
            ));
        }
        Ok(d)
    }

    /// The bytes of [`DESCRIPTOR`].
    pub fn encode(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        text
    }
}

/// How a WAL segment is held.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum SegmentForm {
    /// As far as it was received.
    Partial,
    /// Whole, not yet compressed.
    Full,
    /// Whole, compressed and checksummed.
    Compressed,
}

impl SegmentForm {
    /// The file name's ending.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Partial => ".partial",
            Self::Full => ".full",
            Self::Compressed => ".zst",
        }
    }
}

/// The path of a manifest.
pub fn manifest(id: &BackupId) -> String {
    format!("{BACKUPS}/{id}.json")
}

/// The path of a pack.
pub fn pack(id: PackId) -> String {
    let name = id.to_string();
    format!("{PACKS}/{}/{name}.pack", name.get(..2).unwrap_or("00"))
}

/// The directory of a timeline's segments.
pub fn timeline_dir(timeline: TimelineId) -> String {
    format!("{WAL}/{:08X}", timeline.0)
}

/// The path of a segment.
pub fn segment(id: SegmentId, form: SegmentForm, segment_size: u64) -> String {
    format!(
        "{}/{}{}",
        timeline_dir(id.timeline),
        id.file_name(segment_size),
        form.suffix()
    )
}

/// The path of a timeline's history file.
pub fn history(timeline: TimelineId) -> String {
    format!("{WAL}/{}", history_name(timeline))
}

/// PostgreSQL's name of a timeline's history file.
pub fn history_name(timeline: TimelineId) -> String {
    format!("{:08X}.history", timeline.0)
}

/// Reads a history file's name.
pub fn parse_history_name(name: &str) -> Option<TimelineId> {
    let digits = name.strip_suffix(".history").filter(|d| d.len() == 8)?;
    let upper = digits
        .bytes()
        .all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
    upper
        .then(|| u32::from_str_radix(digits, 16).ok().map(TimelineId))
        .flatten()
}

/// Reads the name of a file in a timeline's directory.
pub fn parse_segment_name(name: &str, segment_size: u64) -> Option<(SegmentId, SegmentForm)> {
    [
        SegmentForm::Partial,
        SegmentForm::Full,
        SegmentForm::Compressed,
    ]
    .into_iter()
    .find_map(|form| {
        let base = name.strip_suffix(form.suffix())?;
        Some((SegmentId::parse(base, segment_size)?, form))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        let id = SegmentId {
            timeline: TimelineId(2),
            number: 3,
        };
        let path = segment(id, SegmentForm::Partial, 16 << 20);
        assert_eq!(path, "wal/00000002/000000020000000000000003.partial");
        let name = path.rsplit('/').next().unwrap();
        assert_eq!(
            parse_segment_name(name, 16 << 20),
            Some((id, SegmentForm::Partial))
        );
        assert_eq!(
            parse_segment_name("000000020000000000000003.tmp", 16 << 20),
            None
        );
        assert_eq!(parse_history_name("0000000A.history"), Some(TimelineId(10)));
        assert_eq!(parse_history_name("A.history"), None);
    }

    #[test]
    fn descriptors_of_the_future_are_refused() {
        let mut d = Descriptor::new(7, 16 << 20);
        assert_eq!(Descriptor::parse(&d.encode()).unwrap(), d);
        d.version = 2;
        assert!(matches!(
            Descriptor::parse(&d.encode()),
            Err(FormatError::Version { .. })
        ));
    }
}
