//! Chunks: what files are cut into, named by the hash of their plain bytes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::FormatError;

/// The size of a chunk in bytes: sixteen PostgreSQL pages. Cutting at fixed, page-aligned places
/// fits data files, whose pages are changed in place and never shift; content-defined cutting would not.
pub const CHUNK_BYTES: usize = 128 * 1024;

/// zstd's level for chunks and segments: the knee of its curve for database pages.
pub const COMPRESSION_LEVEL: i32 = 3;

/// The blake3 hash of a chunk's plain bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub [u8; 32]);

impl ChunkId {
    /// Names plain bytes.
    pub fn of(plain: &[u8]) -> Self {
        Self(*blake3::hash(plain).as_bytes())
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ChunkId {
    type Err = FormatError;

    fn from_str(s: &str) -> Result<Self, FormatError> {
        blake3::Hash::from_hex(s)
            .map(|h| Self(*h.as_bytes()))
            .map_err(|_| {
                FormatError::corrupt("hash", format!("\"{s}\" is not 64 hexadecimal digits"))
            })
    }
}

impl Serialize for ChunkId {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ChunkId {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// Compresses plain bytes with zstd at [`COMPRESSION_LEVEL`].
pub fn compress(plain: &[u8]) -> Result<Vec<u8>, FormatError> {
    zstd::bulk::compress(plain, COMPRESSION_LEVEL)
        .map_err(|e| FormatError::Limit(format!("zstd cannot compress: {e}")))
}

/// Undoes [`compress`]; the result must be exactly `plain_len` bytes long.
pub fn decompress(
    what: &'static str,
    stored: &[u8],
    plain_len: usize,
) -> Result<Vec<u8>, FormatError> {
    let plain = zstd::bulk::decompress(stored, plain_len)
        .map_err(|e| FormatError::corrupt(what, format!("zstd cannot decompress: {e}")))?;
    if plain.len() == plain_len {
        Ok(plain)
    } else {
        Err(FormatError::corrupt(
            what,
            format!(
                "{} bytes after decompression instead of {plain_len}",
                plain.len()
            ),
        ))
    }
}
