//! Packs: files that hold many compressed chunks.
//!
//! ```text
//! "CRATPAK1" u32 version          header
//! zstd(chunk) zstd(chunk) …       data
//! { id[32] u64 offset u32 stored u32 plain } …   index, one entry a chunk
//! u32 entries  u32 crc32c(index)  "CRATPEND"     footer, 16 bytes
//! ```
//! The index is at the end so that a pack is written front to back, and a reader fetches the tail
//! first. A pack is named by the blake3 hash of its index, which names every byte it holds.

use crate::chunk::{self, ChunkId};
use crate::{Fields, FormatError};

/// A pack is closed once its data has grown to this many bytes.
pub const PACK_BYTES_MAX: usize = 32 * 1024 * 1024;

/// The length of the footer in bytes.
pub const FOOTER_BYTES: usize = 16;

const HEADER: &[u8; 8] = b"CRATPAK1";
const END: &[u8; 8] = b"CRATPEND";
const VERSION: u32 = 1;
const ENTRY_BYTES: usize = 48;
const WHAT: &str = "pack";

/// Names a pack: the blake3 hash of its index.
pub type PackId = ChunkId;

/// Where a chunk lies in its pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackEntry {
    /// The chunk.
    pub id: ChunkId,
    /// Where its compressed bytes begin.
    pub offset: u64,
    /// Their length in bytes.
    pub stored_len: u32,
    /// The length of the plain chunk in bytes.
    pub plain_len: u32,
}

/// Collects chunks into the bytes of one pack.
#[derive(Debug)]
pub struct PackBuilder {
    bytes: Vec<u8>,
    entries: Vec<PackEntry>,
}

impl Default for PackBuilder {
    fn default() -> Self {
        let mut bytes = HEADER.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        Self {
            bytes,
            entries: Vec::new(),
        }
    }
}

impl PackBuilder {
    /// Adds a chunk and returns where it lies.
    pub fn push(&mut self, id: ChunkId, plain: &[u8]) -> Result<PackEntry, FormatError> {
        let stored = chunk::compress(plain)?;
        let length = |n: usize| {
            u32::try_from(n).map_err(|_| FormatError::Limit(format!("a chunk of {n} bytes")))
        };
        let entry = PackEntry {
            id,
            offset: self.bytes.len() as u64,
            stored_len: length(stored.len())?,
            plain_len: length(plain.len())?,
        };
        self.bytes.extend_from_slice(&stored);
        self.entries.push(entry);
        Ok(entry)
    }

    /// True once it should be finished.
    pub fn is_full(&self) -> bool {
        self.bytes.len() >= PACK_BYTES_MAX
    }

    /// True when it holds no chunk.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The pack's name and bytes.
    pub fn finish(mut self) -> Result<(PackId, Vec<u8>), FormatError> {
        let mut index = Vec::with_capacity(self.entries.len() * ENTRY_BYTES);
        for e in &self.entries {
            index.extend_from_slice(&e.id.0);
            index.extend_from_slice(&e.offset.to_le_bytes());
            index.extend_from_slice(&e.stored_len.to_le_bytes());
            index.extend_from_slice(&e.plain_len.to_le_bytes());
        }
        let count = u32::try_from(self.entries.len())
            .map_err(|_| FormatError::Limit("too many chunks in a pack".into()))?;
        let id = ChunkId::of(&index);
        self.bytes.extend_from_slice(&index);
        self.bytes.extend_from_slice(&count.to_le_bytes());
        self.bytes
            .extend_from_slice(&crc32c::crc32c(&index).to_le_bytes());
        self.bytes.extend_from_slice(END);
        Ok((id, self.bytes))
    }
}

/// What the footer says: how long the index is and its checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Footer {
    /// The length of the index in bytes; it lies right before the footer.
    pub index_bytes: usize,
    crc: u32,
}

/// Reads a pack's last [`FOOTER_BYTES`] bytes.
pub fn parse_footer(tail: &[u8]) -> Result<Footer, FormatError> {
    let mut f = Fields::new(tail, WHAT);
    let (count, crc, end) = (f.u32()?, f.u32()?, f.bytes::<8>()?);
    if &end != END || !f.rest().is_empty() {
        return Err(FormatError::Magic(WHAT));
    }
    let index_bytes = usize::try_from(count)
        .ok()
        .and_then(|c| c.checked_mul(ENTRY_BYTES));
    Ok(Footer {
        index_bytes: index_bytes.ok_or(FormatError::Truncated(WHAT))?,
        crc,
    })
}

/// Reads the index and checks it against the footer and, where known, the pack's name.
pub fn parse_index(
    index: &[u8],
    footer: Footer,
    id: Option<PackId>,
) -> Result<Vec<PackEntry>, FormatError> {
    if index.len() != footer.index_bytes {
        return Err(FormatError::Truncated(WHAT));
    }
    if crc32c::crc32c(index) != footer.crc || id.is_some_and(|id| ChunkId::of(index) != id) {
        return Err(FormatError::corrupt(
            WHAT,
            "the index does not have the checksum it should have",
        ));
    }
    index.chunks(ENTRY_BYTES).map(parse_entry).collect()
}

fn parse_entry(bytes: &[u8]) -> Result<PackEntry, FormatError> {
    let mut f = Fields::new(bytes, WHAT);
    Ok(PackEntry {
        id: ChunkId(f.bytes()?),
        offset: f.u64()?,
        stored_len: f.u32()?,
        plain_len: f.u32()?,
    })
}

/// Checks the first twelve bytes of a pack.
pub fn check_header(head: &[u8]) -> Result<(), FormatError> {
    let mut f = Fields::new(head, WHAT);
    if &f.bytes::<8>()? != HEADER {
        return Err(FormatError::Magic(WHAT));
    }
    match f.u32()? {
        VERSION => Ok(()),
        found => Err(FormatError::Version {
            what: WHAT,
            found,
            known: VERSION,
        }),
    }
}

/// Decompresses a chunk and checks it against its name.
pub fn open_chunk(id: ChunkId, plain_len: u32, stored: &[u8]) -> Result<Vec<u8>, FormatError> {
    let length = usize::try_from(plain_len).map_err(|_| FormatError::Truncated("chunk"))?;
    let plain = chunk::decompress("chunk", stored, length)?;
    if ChunkId::of(&plain) == id {
        Ok(plain)
    } else {
        Err(FormatError::corrupt(
            "chunk",
            format!("{id} holds other bytes than its name says"),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_back(bytes: &[u8], id: PackId) -> Result<Vec<Vec<u8>>, FormatError> {
        check_header(&bytes[..12])?;
        let tail = bytes.len() - FOOTER_BYTES;
        let footer = parse_footer(&bytes[tail..])?;
        let start = tail
            .checked_sub(footer.index_bytes)
            .ok_or(FormatError::Truncated(WHAT))?;
        parse_index(&bytes[start..tail], footer, Some(id))?
            .iter()
            .map(|e| {
                let at = usize::try_from(e.offset).unwrap();
                open_chunk(e.id, e.plain_len, &bytes[at..at + e.stored_len as usize])
            })
            .collect()
    }

    #[test]
    fn what_goes_in_comes_out() {
        let chunks = [vec![7_u8; 8192], b"short".to_vec(), Vec::new()];
        let mut pack = PackBuilder::default();
        for c in &chunks {
            pack.push(ChunkId::of(c), c).unwrap();
        }
        let (id, bytes) = pack.finish().unwrap();
        assert_eq!(read_back(&bytes, id).unwrap(), chunks);
    }

    #[test]
    fn no_flipped_byte_yields_other_bytes() {
        let mut pack = PackBuilder::default();
        let plain: Vec<u8> = (0..600_u32)
            .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
            .collect();
        pack.push(ChunkId::of(&plain), &plain).unwrap();
        let (id, bytes) = pack.finish().unwrap();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            // A few bits of zstd's frame header mean nothing; all others are noticed.
            if let Ok(chunks) = read_back(&damaged, id) {
                assert!(chunks == [plain.clone()], "byte {at}");
            }
        }
    }
}
