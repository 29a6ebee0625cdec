//! The backup repository's format, pure: chunks, packs, manifests, WAL continuity, retention.
//!
//! Everything here turns bytes into values and back; it never opens a file and never looks at a
//! clock, so that the format can be checked against kept fixtures and damaged at will in tests.
//! Where the files lie is `layout`; who reads and writes them is the `craton-backup` crate.
//!
//! A backup is a [`manifest::Manifest`] that names chunks. Chunks are content-addressed (blake3 of
//! their plain bytes), so every backup is complete in itself, only what changed takes space, and
//! whatever is read can be checked. Chunks lie in packs, many to a file, because object stores (and
//! file systems) are drowned by small files. WAL lies apart, one file a segment, because it is
//! fetched one segment at a time.

pub mod chunk;
pub mod continuity;
pub mod history;
pub mod layout;
pub mod manifest;
pub mod pack;
pub mod retention;
pub mod segment;
pub mod wal_end;
pub mod wal_scan;

/// Why bytes of the repository cannot be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not a file of this kind at all.
    #[error("{0}: wrong magic bytes; this is not such a file")]
    Magic(&'static str),
    /// Written by a later version of the format.
    #[error(
        "{what}: format version {found} is newer than {known}, the newest this program knows; upgrade craton"
    )]
    Version {
        /// Which format.
        what: &'static str,
        /// What the file says.
        found: u32,
        /// What this program can read.
        known: u32,
    },
    /// Shorter than its own header says.
    #[error("{0}: the file is cut short")]
    Truncated(&'static str),
    /// A checksum or hash does not fit.
    #[error("{what}: {detail}")]
    Corrupt {
        /// Which format.
        what: &'static str,
        /// What does not fit.
        detail: String,
    },
    /// Too much for this format.
    #[error("{0}")]
    Limit(String),
}

impl FormatError {
    pub(crate) fn corrupt(what: &'static str, detail: impl Into<String>) -> Self {
        Self::Corrupt {
            what,
            detail: detail.into(),
        }
    }
}

/// Reads little-endian fields one after the other.
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    pub(crate) fn bytes<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let (head, tail) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(FormatError::Truncated(self.what))?;
        self.rest = tail;
        Ok(*head)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FormatError> {
        self.bytes().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FormatError> {
        self.bytes().map(u64::from_le_bytes)
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.rest
    }
}
