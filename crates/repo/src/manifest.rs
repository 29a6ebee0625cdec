//! Manifests: what a backup consists of. The backup exists exactly when its manifest does.
//!
//! The file is one line of JSON that names the format, its version and the hash of the rest, then
//! the manifest itself in JSON. It is readable with any tool, and damage is noticed.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use craton_core::{Lsn, TimelineId};
use serde::{Deserialize, Serialize};

use crate::FormatError;
use crate::chunk::{CHUNK_BYTES, ChunkId};
use crate::pack::PackId;

const KIND: &str = "craton-backup-manifest";
/// The version that this program writes, and the newest it reads.
pub const MANIFEST_VERSION: u32 = 1;
const WHAT: &str = "manifest";

/// Names a backup: the time it began, `20260131T120000Z`, and a number when there are several.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BackupId(String);

impl BackupId {
    /// Checks a name: 1 to 64 letters, digits and `-`, so that it is a harmless file name.
    pub fn new(name: impl Into<String>) -> Result<Self, FormatError> {
        let name = name.into();
        let fits = (1..=64).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if fits {
            Ok(Self(name))
        } else {
            Err(FormatError::Limit(format!(
                "\"{name}\" is not the name of a backup"
            )))
        }
    }
}

impl TryFrom<String> for BackupId {
    type Error = FormatError;
    fn try_from(s: String) -> Result<Self, FormatError> {
        Self::new(s)
    }
}

impl From<BackupId> for String {
    fn from(id: BackupId) -> Self {
        id.0
    }
}

impl FromStr for BackupId {
    type Err = FormatError;
    fn from_str(s: &str) -> Result<Self, FormatError> {
        Self::new(s)
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A tablespace outside the data directory.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Tablespace {
    /// Its number, the name of its link in `pg_tblspc`.
    pub oid: u32,
    /// Where it lay on the server.
    pub location: String,
}

/// What a path in a backup is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum EntryKind {
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink {
        /// What it points to.
        target: String,
    },
    /// A file.
    File {
        /// Its length in bytes.
        size: u64,
        /// Its chunks in order, as places in [`Manifest::chunks`].
        chunks: Vec<u32>,
    },
}

/// A path in a backup.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// Relative to the data directory, or to the tablespace's location.
    pub path: String,
    /// The tablespace it lies in; none is the data directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tablespace: Option<u32>,
    /// Permission bits.
    pub mode: u32,
    /// Last change, in seconds since 1970.
    pub mtime_s: u64,
    /// What it is.
    #[serde(flatten)]
    pub kind: EntryKind,
}

/// A chunk and where it lies.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ChunkRef {
    /// Its name.
    pub id: ChunkId,
    /// Its pack, as a place in [`Manifest::packs`].
    pub pack: u32,
    /// Where its compressed bytes begin in the pack.
    pub offset: u64,
    /// Their length in bytes.
    pub stored: u32,
    /// Its plain length in bytes.
    pub plain: u32,
}

/// Everything that is known about a backup except its files.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Summary {
    /// Its name.
    pub id: BackupId,
    /// The server's `system_identifier`.
    pub system_id: u64,
    /// The server's version, as in `server_version_num`.
    pub server_version: u32,
    /// `wal_segment_size` in bytes.
    pub wal_segment_size: u64,
    /// Which member it was read from.
    pub source: String,
    /// When it began, in milliseconds since 1970.
    pub started_at_ms: u64,
    /// When the server had sent its last byte: a restore can stop at any time after this.
    pub ended_at_ms: u64,
    /// Recovery starts here.
    pub start_lsn: Lsn,
    /// The timeline of `start_lsn`.
    pub start_timeline: TimelineId,
    /// Recovery is consistent from here on.
    pub stop_lsn: Lsn,
    /// The timeline of `stop_lsn`.
    pub stop_timeline: TimelineId,
    /// The size of its files in bytes.
    pub data_bytes: u64,
    /// How many bytes of them no earlier backup had.
    pub new_bytes: u64,
    /// How many bytes the repository grew by.
    pub stored_bytes: u64,
    /// Settings that a server must have at least as high to recover from this backup.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub minimum_settings: BTreeMap<String, String>,
}

/// A whole backup.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// What it is.
    #[serde(flatten)]
    pub summary: Summary,
    /// Its tablespaces.
    pub tablespaces: Vec<Tablespace>,
    /// The packs that hold its chunks.
    pub packs: Vec<PackId>,
    /// Its chunks.
    pub chunks: Vec<ChunkRef>,
    /// Its files.
    pub entries: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
struct Head {
    format: String,
    version: u32,
    blake3: ChunkId,
}

impl Manifest {
    /// The bytes of the manifest's file.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let text =
            |e: serde_json::Error| FormatError::Limit(format!("cannot write a manifest: {e}"));
        let body = serde_json::to_vec(self).map_err(text)?;
        let head = Head {
            format: KIND.into(),
            version: MANIFEST_VERSION,
            blake3: ChunkId::of(&body),
        };
        let mut out = serde_json::to_vec(&head).map_err(text)?;
        out.push(b'\n');
        out.extend_from_slice(&body);
        Ok(out)
    }

    /// Reads and checks a manifest's file.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let json = |e: serde_json::Error| FormatError::corrupt(WHAT, e.to_string());
        let end = bytes
            .iter()
            .position(|b| *b == b'\n')
            .ok_or(FormatError::Truncated(WHAT))?;
        let (head, body) = bytes.split_at(end);
        let body = body.get(1..).unwrap_or_default();
        let head: Head = serde_json::from_slice(head).map_err(json)?;
        if head.format != KIND {
            return Err(FormatError::Magic(WHAT));
        }
        if head.version > MANIFEST_VERSION {
            return Err(FormatError::Version {
                what: WHAT,
                found: head.version,
                known: MANIFEST_VERSION,
            });
        }
        if head.version == 0 || ChunkId::of(body) != head.blake3 {
            return Err(FormatError::corrupt(
                WHAT,
                "the content does not fit its first line",
            ));
        }
        let manifest: Self = serde_json::from_slice(body).map_err(json)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The chunks of a file, in order.
    pub fn chunks_of<'a>(&'a self, chunks: &'a [u32]) -> impl Iterator<Item = &'a ChunkRef> {
        chunks.iter().filter_map(|n| self.chunks.get(*n as usize))
    }

    /// Checks what a restore relies on: all references lead somewhere, sizes add up, and no path
    /// leaves the directory it belongs to.
    fn check(&self) -> Result<(), FormatError> {
        let bad = |detail: String| Err(FormatError::corrupt(WHAT, detail));
        for chunk in &self.chunks {
            if chunk.pack as usize >= self.packs.len() || chunk.plain as usize > CHUNK_BYTES {
                return bad(format!("chunk {} has no pack or is too large", chunk.id));
            }
        }
        for entry in &self.entries {
            if !is_safe_path(&entry.path) {
                return bad(format!("\"{}\" leads out of the backup", entry.path));
            }
            if entry
                .tablespace
                .is_some_and(|oid| self.tablespaces.iter().all(|t| t.oid != oid))
            {
                return bad(format!("\"{}\" lies in an unknown tablespace", entry.path));
            }
            if let EntryKind::File { size, chunks } = &entry.kind {
                let sum: u64 = self.chunks_of(chunks).map(|c| u64::from(c.plain)).sum();
                if sum != *size || self.chunks_of(chunks).count() != chunks.len() {
                    return bad(format!(
                        "the chunks of \"{}\" do not add up to its size",
                        entry.path
                    ));
                }
            }
        }
        Ok(())
    }
}

/// True for a relative path without `..`, empty parts or zero bytes.
pub fn is_safe_path(path: &str) -> bool {
    !path.is_empty()
        && !path.contains('\0')
        && path
            .split('/')
            .all(|part| !part.is_empty() && part != "." && part != "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn sample() -> Manifest {
        let plain = vec![1_u8; 8192];
        Manifest {
            summary: Summary {
                id: BackupId::new("20260131T120000Z").unwrap(),
                system_id: 7_412_345_678_901_234_567,
                server_version: 150_010,
                wal_segment_size: 16 << 20,
                source: "m1".into(),
                started_at_ms: 1_769_860_800_000,
                ended_at_ms: 1_769_860_805_000,
                start_lsn: Lsn(0x200_0028),
                start_timeline: TimelineId(1),
                stop_lsn: Lsn(0x200_0100),
                stop_timeline: TimelineId(1),
                data_bytes: 8192,
                new_bytes: 8192,
                stored_bytes: 20,
                minimum_settings: BTreeMap::new(),
            },
            tablespaces: vec![Tablespace {
                oid: 16_400,
                location: "/srv/ts".into(),
            }],
            packs: vec![ChunkId::of(b"a pack")],
            chunks: vec![ChunkRef {
                id: ChunkId::of(&plain),
                pack: 0,
                offset: 12,
                stored: 20,
                plain: 8192,
            }],
            entries: vec![
                Entry {
                    path: "base".into(),
                    tablespace: None,
                    mode: 0o700,
                    mtime_s: 1,
                    kind: EntryKind::Directory,
                },
                Entry {
                    path: "base/1".into(),
                    tablespace: None,
                    mode: 0o600,
                    mtime_s: 1,
                    kind: EntryKind::File {
                        size: 8192,
                        chunks: vec![0],
                    },
                },
                Entry {
                    path: "PG_15/1".into(),
                    tablespace: Some(16_400),
                    mode: 0o600,
                    mtime_s: 1,
                    kind: EntryKind::File {
                        size: 0,
                        chunks: vec![],
                    },
                },
                Entry {
                    path: "pg_tblspc/16400".into(),
                    tablespace: None,
                    mode: 0o777,
                    mtime_s: 1,
                    kind: EntryKind::Symlink {
                        target: "/srv/ts".into(),
                    },
                },
            ],
        }
    }

    #[test]
    fn round_trips_and_notices_damage() {
        let m = sample();
        let bytes = m.encode().unwrap();
        assert_eq!(Manifest::decode(&bytes).unwrap(), m);
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_ne!(
                Manifest::decode(&damaged).ok().as_ref(),
                Some(&m),
                "byte {at}"
            );
        }
    }

    #[test]
    fn refuses_paths_that_lead_out() {
        for bad in ["../x", "/etc/passwd", "a/../../b", "", "a//b", "a/."] {
            let mut m = sample();
            m.entries[0].path = bad.into();
            assert!(
                Manifest::decode(&m.encode().unwrap()).is_err(),
                "{bad} was accepted"
            );
        }
        let mut m = sample();
        m.chunks[0].plain = 1;
        assert!(
            Manifest::decode(&m.encode().unwrap()).is_err(),
            "sizes that do not add up were accepted"
        );
        assert!(BackupId::new("../x").is_err());
    }
}
