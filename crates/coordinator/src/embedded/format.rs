//! The file: a header, then records, each with its length and checksums. Pure.
//!
//! ```text
//! file    = "CRATONRL" version:u32 crc32c(of the 12 bytes):u32 record*
//! record  = length:u32 crc32c(length):u32 crc32c(payload):u32 payload      all numbers little-endian
//! payload = JSON of `Record`
//! ```
//!
//! The file is append-only between rewrites, so what a power failure leaves is a record that is too short
//! or that ends in zeros (JSON never holds a zero byte): that tail was never acknowledged and is cut. Any
//! other damage is **corruption** of something that may have been acknowledged, and must not be cut.

use serde::{Deserialize, Serialize};

use crate::promise::LeaseNote;
use crate::raft::{Durable, Entry, HardState, Image, Write};

const MAGIC: &[u8; 8] = b"CRATONRL";
const VERSION: u32 = 1;
const FILE_HEADER_LEN: usize = 16;
const RECORD_HEADER_LEN: usize = 12;

/// The largest record, in bytes.
pub(super) const RECORD_LEN_MAX: usize = 64 * 1024 * 1024;

/// The lease voter's part of the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct LeaseState {
    pub(super) note: LeaseNote,
    /// False after a lost disk, until the others' notes were taken over.
    pub(super) settled: bool,
    /// Never had a say under this disk's birth: there is nothing that it could have forgotten.
    #[serde(default)]
    pub(super) fresh: bool,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Record {
    Hard(HardState),
    Append(Vec<Entry>),
    Snapshot(Image),
    Lease(LeaseState),
}

impl From<Write> for Record {
    fn from(write: Write) -> Self {
        match write {
            Write::Hard(hard) => Self::Hard(hard),
            Write::Append(entries) => Self::Append(entries),
            Write::Snapshot(image) => Self::Snapshot(image),
        }
    }
}

/// Everything in the file.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Contents {
    pub(super) raft: Durable,
    pub(super) lease: LeaseState,
}

impl Contents {
    pub(super) fn apply(&mut self, record: Record) -> Result<(), String> {
        match record {
            Record::Hard(hard) => self.raft.apply(Write::Hard(hard)),
            Record::Append(entries) => self.raft.apply(Write::Append(entries)),
            Record::Snapshot(image) => self.raft.apply(Write::Snapshot(image)),
            Record::Lease(lease) => {
                self.lease = lease;
                Ok(())
            }
        }
    }

    /// A whole file that says just this.
    pub(super) fn encode(&self) -> Result<Vec<u8>, String> {
        let mut out = Vec::new();
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&crc32c::crc32c(&out).to_le_bytes());
        encode_record(&Record::Hard(self.raft.hard.clone()), &mut out)?;
        encode_record(&Record::Lease(self.lease), &mut out)?;
        if let Some(image) = &self.raft.image {
            encode_record(&Record::Snapshot(image.clone()), &mut out)?;
        }
        for entries in self.raft.entries.chunks(64) {
            encode_record(&Record::Append(entries.to_vec()), &mut out)?;
        }
        Ok(out)
    }
}

pub(super) fn encode_record(record: &Record, out: &mut Vec<u8>) -> Result<(), String> {
    let payload = serde_json::to_vec(record).map_err(|e| e.to_string())?;
    let too_long = || {
        format!(
            "a record of {} bytes is longer than {RECORD_LEN_MAX}",
            payload.len()
        )
    };
    if payload.len() > RECORD_LEN_MAX {
        return Err(too_long());
    }
    let len = u32::try_from(payload.len())
        .map_err(|_| too_long())?
        .to_le_bytes();
    out.extend_from_slice(&len);
    out.extend_from_slice(&crc32c::crc32c(&len).to_le_bytes());
    out.extend_from_slice(&crc32c::crc32c(&payload).to_le_bytes());
    out.extend_from_slice(&payload);
    Ok(())
}

/// What a file turned out to be.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Decoded {
    /// Whole, or with a torn tail that begins at `good_len`.
    Good {
        contents: Box<Contents>,
        good_len: usize,
    },
    /// Damaged where it may have been acknowledged.
    Corrupt { at: usize, why: String },
    /// Written by a later version of this program.
    TooNew { version: u32 },
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(four.try_into().ok()?))
}

enum Next<'a> {
    Payload(&'a [u8]),
    Torn,
    Corrupt(&'static str),
}

fn next_record(rest: &[u8]) -> Next<'_> {
    let header = (u32_at(rest, 0), u32_at(rest, 4), u32_at(rest, 8));
    let (Some(len), Some(len_crc), Some(payload_crc)) = header else {
        return Next::Torn;
    };
    if crc32c::crc32c(&len.to_le_bytes()) != len_crc {
        // A header that was cut off, and zeros where the rest was to come.
        let zeros = rest.iter().skip(RECORD_HEADER_LEN).all(|b| *b == 0);
        return if zeros {
            Next::Torn
        } else {
            Next::Corrupt("the length of a record is damaged")
        };
    }
    let end = RECORD_HEADER_LEN.saturating_add(len as usize);
    let Some(payload) = rest.get(RECORD_HEADER_LEN..end) else {
        return Next::Torn;
    };
    if crc32c::crc32c(payload) == payload_crc {
        return Next::Payload(payload);
    }
    let is_last = rest
        .get(end..)
        .is_none_or(|after| after.iter().all(|b| *b == 0));
    if is_last && payload.last() == Some(&0) {
        return Next::Torn;
    }
    Next::Corrupt("a record is damaged")
}

pub(super) fn decode(bytes: &[u8]) -> Decoded {
    let corrupt = |at, why: &str| Decoded::Corrupt {
        at,
        why: why.to_owned(),
    };
    let head = bytes.get(..FILE_HEADER_LEN).unwrap_or_default();
    let sound = head.starts_with(MAGIC) && u32_at(head, 12) == head.get(..12).map(crc32c::crc32c);
    let Some(version) = u32_at(head, 8).filter(|_| sound) else {
        return corrupt(0, "the header is damaged");
    };
    if version != VERSION {
        return Decoded::TooNew { version };
    }
    let mut contents = Contents::default();
    let mut at = FILE_HEADER_LEN;
    while let Some(rest) = bytes.get(at..).filter(|r| !r.is_empty()) {
        let payload = match next_record(rest) {
            Next::Payload(payload) => payload,
            Next::Torn => break,
            Next::Corrupt(why) => return corrupt(at, why),
        };
        let done = serde_json::from_slice(payload)
            .map_err(|e| e.to_string())
            .and_then(|r| contents.apply(r));
        if let Err(why) = done {
            return corrupt(at, &why);
        }
        at += RECORD_HEADER_LEN + payload.len();
    }
    if contents.raft.hard.birth == 0 {
        return corrupt(at, "the file has no hard state");
    }
    Decoded::Good {
        contents: Box::new(contents),
        good_len: at,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::Payload;

    fn file() -> (Contents, Vec<u8>, Vec<usize>) {
        let mut contents = Contents::default();
        contents.raft.hard.birth = 5;
        let mut bytes = contents.encode().unwrap();
        let mut ends = vec![bytes.len()];
        for index in 1..=3 {
            let record = Record::Append(vec![Entry {
                index,
                term: 1,
                payload: Payload::Command("x".into()),
            }]);
            encode_record(&record, &mut bytes).unwrap();
            contents.apply(record).unwrap();
            ends.push(bytes.len());
        }
        (contents, bytes, ends)
    }

    #[test]
    fn a_torn_tail_is_cut_at_every_length() {
        let (contents, bytes, ends) = file();
        for cut in ends[0]..=bytes.len() {
            let Decoded::Good {
                contents: got,
                good_len,
            } = decode(&bytes[..cut])
            else {
                panic!("cut at {cut}")
            };
            assert_eq!(
                good_len,
                ends.iter().copied().filter(|e| *e <= cut).max().unwrap()
            );
            let mut padded = bytes[..cut].to_vec();
            padded.resize(cut + 4096, 0);
            assert_eq!(
                decode(&padded),
                Decoded::Good {
                    contents: got.clone(),
                    good_len
                },
                "cut at {cut}, zeros after"
            );
            assert!(cut < bytes.len() || *got == contents);
        }
    }

    #[test]
    fn a_flipped_bit_anywhere_is_never_taken_for_a_torn_tail() {
        let (_, bytes, _) = file();
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert!(matches!(decode(&bad), Decoded::Corrupt { .. }), "byte {at}");
        }
    }

    #[test]
    fn a_rewritten_file_says_the_same() {
        let (mut contents, _, _) = file();
        contents.raft.image = Some(Image {
            last_index: 1,
            last_term: 1,
            ..Image::default()
        });
        contents.raft.entries.remove(0);
        contents.lease.settled = true;
        let bytes = contents.encode().unwrap();
        assert_eq!(
            decode(&bytes),
            Decoded::Good {
                contents: Box::new(contents),
                good_len: bytes.len()
            }
        );
    }

    #[test]
    fn garbage_is_corrupt() {
        for bytes in [&b""[..], b"CRATON", &[0; 64], &[255; 64]] {
            assert!(matches!(decode(bytes), Decoded::Corrupt { .. }));
        }
    }
}
