//! Looks into WAL for the times at which transactions ended.
//!
//! A restore to a time needs to know whether any transaction ended after it: PostgreSQL refuses a
//! `recovery_target_time` that lies behind the last one. Layouts from `xlog_internal.h`,
//! `xlogrecord.h` and `xact.h`; they have been the same from version 9.5 on, in little-endian order.

/// Page header flags (`XLP_FIRST_IS_CONTRECORD`, `XLP_LONG_HEADER`).
pub(crate) const CONTINUES: u16 = 0x0001;
pub(crate) const LONG_HEADER: u16 = 0x0002;
pub(crate) const SHORT_HEADER_BYTES: usize = 24;
pub(crate) const LONG_HEADER_BYTES: usize = 40;
pub(crate) const RECORD_HEADER_BYTES: usize = 24;
/// The resource manager of transactions (`RM_XACT_ID`), and the part of `xl_info` that says what happened.
const TRANSACTION: u8 = 1;
const OPERATION: u8 = 0x70;
/// Commit, abort, and both of prepared transactions.
const ENDS: [u8; 4] = [0x00, 0x20, 0x30, 0x40];
/// Microseconds from 1970 to 2000, PostgreSQL's epoch.
const EPOCH_US: i64 = 946_684_800_000_000;

/// When the last transaction ended of those whose record lies wholly in this segment (or in the part
/// of it that is held), in microseconds since 1970.
pub fn last_transaction_end_us(segment: &[u8]) -> Option<i64> {
    let records = Records::new(payload(segment)?);
    records.filter_map(|record| ended_at(&record)).max()
}

/// The content of the pages one after the other, without their headers, from the first record on.
fn payload(segment: &[u8]) -> Option<Vec<u8>> {
    let page_size = u32_at(segment, 36).and_then(|n| usize::try_from(n).ok())?;
    if !page_size.is_power_of_two() || !(1024..=65_536).contains(&page_size) {
        return None;
    }
    let first_info = u16_at(segment, 2)?;
    let mut out = Vec::with_capacity(segment.len());
    let mut expected = u64_at(segment, 8)?;
    for page in segment.chunks(page_size) {
        // A page that was not written yet, or one of a recycled file.
        if u64_at(page, 8) != Some(expected) {
            break;
        }
        expected += page_size as u64;
        let long = u16_at(page, 2)? & LONG_HEADER != 0;
        out.extend_from_slice(
            page.get(
                if long {
                    LONG_HEADER_BYTES
                } else {
                    SHORT_HEADER_BYTES
                }..,
            )
            .unwrap_or_default(),
        );
    }
    if first_info & CONTINUES != 0 {
        let rest = u32_at(segment, 16).and_then(|n| usize::try_from(n).ok())?;
        out.drain(..aligned(rest).min(out.len()));
    }
    Some(out)
}

/// Records begin at multiples of eight; headers of pages are such multiples as well.
pub(crate) fn aligned(n: usize) -> usize {
    n.checked_next_multiple_of(8).unwrap_or(usize::MAX)
}

struct Records {
    bytes: Vec<u8>,
    at: usize,
}

impl Records {
    fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, at: 0 }
    }
}

impl Iterator for Records {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let rest = self.bytes.get(self.at..)?;
            let length = usize::try_from(u32_at(rest, 0)?)
                .ok()
                .filter(|n| *n >= RECORD_HEADER_BYTES)?;
            let record = rest.get(..length)?;
            self.at = self.at.checked_add(aligned(length))?;
            if record.get(17) == Some(&TRANSACTION) {
                return Some(record.to_vec());
            }
        }
    }
}

fn ended_at(record: &[u8]) -> Option<i64> {
    let (header, data) = (record.get(..20)?, record.get(RECORD_HEADER_BYTES..)?);
    let whole = crc32c::crc32c_append(crc32c::crc32c(data), header) == u32_at(record, 20)?;
    if !whole || !ENDS.contains(&(record.get(16)? & OPERATION)) {
        return None;
    }
    let mut at = 0;
    let main = loop {
        match *data.get(at)? {
            // The main data, with a short and a long length.
            255 => break usize::from(*data.get(at + 1)?),
            254 => break usize::try_from(u32_at(data, at + 1)?).ok()?,
            // The replication origin; the top-level transaction.
            253 => at += 3,
            252 => at += 5,
            _ => return None,
        }
    };
    let main = data.get(data.len().checked_sub(main)?..)?;
    main.first_chunk()
        .map(|b| i64::from_le_bytes(*b))?
        .checked_add(EPOCH_US)
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|b| u16::from_le_bytes(*b))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|b| u32::from_le_bytes(*b))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|b| u64::from_le_bytes(*b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: usize = 8192;

    /// A record of resource manager `rmid` with this main data.
    fn record(rmid: u8, info: u8, main: &[u8]) -> Vec<u8> {
        let mut data = vec![253, 1, 0, 254];
        data.extend_from_slice(&u32::try_from(main.len()).unwrap().to_le_bytes());
        data.extend_from_slice(main);
        let mut header = u32::try_from(RECORD_HEADER_BYTES + data.len())
            .unwrap()
            .to_le_bytes()
            .to_vec();
        header.extend_from_slice(&[0; 12]);
        header.extend_from_slice(&[info, rmid, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&data), &header);
        header.extend_from_slice(&crc.to_le_bytes());
        header.extend_from_slice(&data);
        header.resize(aligned(header.len()), 0);
        header
    }

    /// Lays a stream of records out in pages; the first `continued` bytes belong to an older record.
    fn segment(stream: &[u8], continued: u32) -> Vec<u8> {
        let (mut out, mut rest, mut address) = (Vec::new(), stream, 0x100_0000_u64);
        while !rest.is_empty() {
            let first = out.is_empty();
            let info = u16::from(first && continued > 0) | if first { LONG_HEADER } else { 0 };
            out.extend_from_slice(&0xD110_u16.to_le_bytes());
            out.extend_from_slice(&info.to_le_bytes());
            out.extend_from_slice(&1_u32.to_le_bytes());
            out.extend_from_slice(&address.to_le_bytes());
            out.extend_from_slice(&continued.to_le_bytes());
            out.extend_from_slice(&[0; 4]);
            if first {
                out.extend_from_slice(&7_u64.to_le_bytes());
                out.extend_from_slice(&(1_u32 << 20).to_le_bytes());
                out.extend_from_slice(&u32::try_from(PAGE).unwrap().to_le_bytes());
            }
            let room = PAGE - out.len() % PAGE;
            let (now, later) = rest.split_at(room.min(rest.len()));
            out.extend_from_slice(now);
            rest = later;
            address += PAGE as u64;
        }
        out.resize(1 << 20, 0);
        out
    }

    #[test]
    fn finds_the_newest_end_across_pages() {
        let mut stream = vec![9; 16];
        stream.extend(record(TRANSACTION, 0x80, &5_i64.to_le_bytes()));
        stream.extend(record(10, 0, &vec![1; 20_000]));
        stream.extend(record(TRANSACTION, 0x20, &7_i64.to_le_bytes()));
        stream.extend(record(TRANSACTION, 0x50, &99_i64.to_le_bytes()));
        assert_eq!(
            last_transaction_end_us(&segment(&stream, 16)),
            Some(EPOCH_US + 7)
        );
        assert_eq!(
            last_transaction_end_us(&segment(&record(10, 0, &[1; 9]), 0)),
            None
        );
        assert_eq!(last_transaction_end_us(&[]), None);
    }

    #[test]
    fn a_damaged_record_does_not_count() {
        let mut commit = record(TRANSACTION, 0, &7_i64.to_le_bytes());
        let last = commit.len() - 1;
        commit[last] ^= 1;
        assert_eq!(last_transaction_end_us(&segment(&commit, 0)), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_stumble(mut bytes in proptest::collection::vec(any::<u8>(), 0..4000)) {
            let _ = last_transaction_end_us(&bytes);
            if bytes.len() > 40 {
                bytes[36..40].copy_from_slice(&1024_u32.to_le_bytes());
                let _ = last_transaction_end_us(&bytes);
            }
        }
    }
}
