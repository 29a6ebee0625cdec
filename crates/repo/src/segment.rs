//! WAL segments at rest: one compressed, checksummed file a segment.
//!
//! ```text
//! "CRATWAL1" u32 version u32 timeline u64 number u64 received_at_ms u32 plain_len
//! blake3(plain)[32] u32 crc32c(all of the above)   header, 72 bytes
//! zstd(plain)
//! ```

use craton_core::{Lsn, TimelineId};

use crate::chunk::{self, ChunkId};
use crate::{Fields, FormatError};

const MAGIC: &[u8; 8] = b"CRATWAL1";
const VERSION: u32 = 1;
const WHAT: &str = "WAL segment";
/// The length of the header in bytes.
pub const HEADER_BYTES: usize = 72;
/// PostgreSQL's limits of `wal_segment_size`, in bytes.
pub const SEGMENT_BYTES_MIN: u64 = 1 << 20;
/// See [`SEGMENT_BYTES_MIN`].
pub const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// True for a size that PostgreSQL accepts: a power of two from 1 MiB to 1 GiB.
pub fn is_segment_size(bytes: u64) -> bool {
    bytes.is_power_of_two() && (SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&bytes)
}

/// One WAL segment: a timeline and the position divided by the segment size.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SegmentId {
    /// The timeline it was written on.
    pub timeline: TimelineId,
    /// Its number: the position of its first byte divided by the segment size.
    pub number: u64,
}

impl SegmentId {
    /// The segment that holds `lsn`.
    pub fn at(timeline: TimelineId, lsn: Lsn, segment_size: u64) -> Self {
        Self {
            timeline,
            number: lsn.0.checked_div(segment_size).unwrap_or(0),
        }
    }

    /// The position of its first byte.
    pub fn start(self, segment_size: u64) -> Lsn {
        Lsn(self.number.saturating_mul(segment_size))
    }

    /// PostgreSQL's name for it (`XLogFileName`): 24 hexadecimal digits.
    pub fn file_name(self, segment_size: u64) -> String {
        let per_id = 0x1_0000_0000_u64
            .checked_div(segment_size)
            .unwrap_or(1)
            .max(1);
        format!(
            "{:08X}{:08X}{:08X}",
            self.timeline.0,
            self.number / per_id,
            self.number % per_id
        )
    }

    /// Reads a name as PostgreSQL writes it.
    pub fn parse(name: &str, segment_size: u64) -> Option<Self> {
        if name.len() != 24
            || !name
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b))
        {
            return None;
        }
        let field = |from: usize| {
            name.get(from..from + 8)
                .and_then(|h| u64::from_str_radix(h, 16).ok())
        };
        let (timeline, log, low) = (field(0)?, field(8)?, field(16)?);
        let per_id = 0x1_0000_0000_u64.checked_div(segment_size)?;
        (low < per_id).then_some(())?;
        Some(Self {
            timeline: TimelineId(u32::try_from(timeline).ok()?),
            number: log * per_id + low,
        })
    }
}

/// What a stored segment says about itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentHeader {
    /// Which segment.
    pub id: SegmentId,
    /// When its last byte was received, in milliseconds since 1970.
    pub received_at_ms: u64,
    /// The segment size in bytes.
    pub plain_len: u32,
    hash: ChunkId,
}

/// Compresses a whole segment into the bytes of its file.
pub fn encode(id: SegmentId, received_at_ms: u64, plain: &[u8]) -> Result<Vec<u8>, FormatError> {
    let plain_len = u32::try_from(plain.len())
        .ok()
        .filter(|n| is_segment_size(u64::from(*n)))
        .ok_or_else(|| {
            FormatError::Limit(format!("{} bytes are not a WAL segment", plain.len()))
        })?;
    let mut out = Vec::with_capacity(plain.len() / 3);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&id.timeline.0.to_le_bytes());
    out.extend_from_slice(&id.number.to_le_bytes());
    out.extend_from_slice(&received_at_ms.to_le_bytes());
    out.extend_from_slice(&plain_len.to_le_bytes());
    out.extend_from_slice(&ChunkId::of(plain).0);
    out.extend_from_slice(&crc32c::crc32c(&out).to_le_bytes());
    out.extend_from_slice(&chunk::compress(plain)?);
    Ok(out)
}

/// Reads the header alone.
pub fn decode_header(bytes: &[u8]) -> Result<SegmentHeader, FormatError> {
    let checked = bytes
        .get(..HEADER_BYTES - 4)
        .ok_or(FormatError::Truncated(WHAT))?;
    let mut f = Fields::new(bytes, WHAT);
    if &f.bytes::<8>()? != MAGIC {
        return Err(FormatError::Magic(WHAT));
    }
    let found = f.u32()?;
    if found != VERSION {
        return Err(FormatError::Version {
            what: WHAT,
            found,
            known: VERSION,
        });
    }
    let id = SegmentId {
        timeline: TimelineId(f.u32()?),
        number: f.u64()?,
    };
    let header = SegmentHeader {
        id,
        received_at_ms: f.u64()?,
        plain_len: f.u32()?,
        hash: ChunkId(f.bytes()?),
    };
    if f.u32()? != crc32c::crc32c(checked) || !is_segment_size(u64::from(header.plain_len)) {
        return Err(FormatError::corrupt(
            WHAT,
            "the header does not have its checksum",
        ));
    }
    Ok(header)
}

/// Reads a stored segment and checks that it is `id`, whole and unchanged.
pub fn decode(id: SegmentId, bytes: &[u8]) -> Result<Vec<u8>, FormatError> {
    let header = decode_header(bytes)?;
    if header.id != id {
        return Err(FormatError::corrupt(
            WHAT,
            format!("holds {:?} instead of {id:?}", header.id),
        ));
    }
    let length = usize::try_from(header.plain_len).map_err(|_| FormatError::Truncated(WHAT))?;
    let plain = chunk::decompress(WHAT, bytes.get(HEADER_BYTES..).unwrap_or_default(), length)?;
    if ChunkId::of(&plain) == header.hash {
        Ok(plain)
    } else {
        Err(FormatError::corrupt(
            WHAT,
            "the content does not have its hash",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_postgresqls() {
        let size = 16 << 20;
        let id = SegmentId {
            timeline: TimelineId(0x1A),
            number: 0x1FF,
        };
        assert_eq!(id.file_name(size), "0000001A00000001000000FF");
        assert_eq!(SegmentId::parse("0000001A00000001000000FF", size), Some(id));
        assert_eq!(id.start(size), Lsn(0x1_FF00_0000));
        for bad in [
            "",
            "0000001A0000000100000100",
            "0000001a00000001000000FF",
            "0000001A00000001000000FF.partial",
        ] {
            assert_eq!(SegmentId::parse(bad, size), None, "{bad}");
        }
        let gib = SegmentId {
            timeline: TimelineId(1),
            number: 5,
        };
        assert_eq!(
            SegmentId::parse(&gib.file_name(1 << 30), 1 << 30),
            Some(gib)
        );
    }

    #[test]
    fn stored_segments_are_checked() {
        let id = SegmentId {
            timeline: TimelineId(2),
            number: 9,
        };
        let plain = vec![3_u8; 1 << 20];
        let stored = encode(id, 5, &plain).unwrap();
        assert_eq!(decode(id, &stored).unwrap(), plain);
        assert!(decode(SegmentId { number: 8, ..id }, &stored).is_err());
        for at in 0..stored.len() {
            let mut damaged = stored.clone();
            damaged[at] ^= 1;
            if let Ok(got) = decode(id, &damaged) {
                assert!(got == plain, "byte {at}");
            }
        }
        for len in 0..stored.len() {
            assert!(decode(id, &stored[..len]).is_err(), "cut at {len}");
        }
        assert!(encode(id, 5, &plain[1..]).is_err());
    }
}
