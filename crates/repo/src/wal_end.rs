//! Where the whole records in a stretch of WAL end.
//!
//! What was received may end in the middle of a record, and after a crash in something that was never flushed.
//! PostgreSQL recovers up to the last record that is whole (`xlogreader.c`); nothing behind it can have been
//! acknowledged.

use craton_core::Lsn;

use crate::wal_scan::{
    CONTINUES, LONG_HEADER, LONG_HEADER_BYTES, RECORD_HEADER_BYTES, SHORT_HEADER_BYTES, aligned,
    u16_at, u32_at, u64_at,
};

/// What the newest WAL of one timeline says of where all that is held ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NewestEnd {
    /// Here.
    Here(Lsn),
    /// On an older timeline: of this one less has come than was held of the one before.
    Before,
    /// Nothing whole is held.
    Nowhere,
}

/// `end` is that of the last whole record held of a timeline, and `fork` where the timeline began, if another one
/// came before it. Asked of one timeline after the other, the newest first.
pub fn newest_end(fork: Option<Lsn>, end: Option<Lsn>) -> NewestEnd {
    match end.filter(|end| fork.is_none_or(|fork| *end > fork)) {
        Some(end) => NewestEnd::Here(end),
        None if fork.is_some() => NewestEnd::Before,
        None => NewestEnd::Nowhere,
    }
}

/// `XLP_FIRST_IS_OVERWRITE_CONTRECORD` and a page without `XLP_FIRST_IS_CONTRECORD` both end a record that began
/// before: its rest was never written.
struct Walk<'a> {
    wal: &'a [u8],
    /// The position of the first byte.
    start: u64,
    page_size: usize,
    /// The beginning of a record that goes on in the next page, and its whole length.
    open: Option<(Vec<u8>, usize)>,
    /// The end of the last whole record.
    end: Option<u64>,
}

/// The end of the last whole record in `wal`, which begins at the position `start`, the beginning of a segment of
/// `segment_size` bytes. None where no record ends in it.
pub fn last_record_end(wal: &[u8], start: u64, segment_size: u64) -> Option<u64> {
    let page_size = u32_at(wal, 36).and_then(|n| usize::try_from(n).ok())?;
    if !page_size.is_power_of_two() || !(1024..=65_536).contains(&page_size) || segment_size == 0 {
        return None;
    }
    let mut walk = Walk {
        wal,
        start,
        page_size,
        open: None,
        end: None,
    };
    let (mut page, mut skip_to) = (0, 0);
    while let Some(at) = start.checked_add(page as u64) {
        if at >= skip_to {
            match walk.page(page, at) {
                Page::Whole => {}
                // The rest of the segment is empty after a switch.
                Page::Switch => skip_to = (at / segment_size + 1).saturating_mul(segment_size),
                Page::Last => break,
            }
        }
        page += page_size;
    }
    walk.end
}

/// What a page came to.
enum Page {
    /// The next one may go on.
    Whole,
    /// WAL goes on in the next segment.
    Switch,
    /// The end of what is whole is in this page, or before it.
    Last,
}

impl Walk<'_> {
    fn page(&mut self, offset: usize, at: u64) -> Page {
        let end = self.wal.len().min(offset.saturating_add(self.page_size));
        let Some(page) = self.wal.get(offset..end).filter(|p| !p.is_empty()) else {
            return Page::Last;
        };
        let (Some(info), Some(address)) = (u16_at(page, 2), u64_at(page, 8)) else {
            return Page::Last;
        };
        // A page that was not written yet, or one of a recycled file.
        if address != at {
            return Page::Last;
        }
        let header = if info & LONG_HEADER == 0 {
            SHORT_HEADER_BYTES
        } else {
            LONG_HEADER_BYTES
        };
        let mut next = header;
        if info & CONTINUES == 0 {
            self.open = None;
        } else {
            let rest = u32_at(page, 16).and_then(|n| usize::try_from(n).ok());
            let Some(rest) = rest else { return Page::Last };
            match self.go_on(page, header, rest) {
                Some(after) => next = after,
                None => return Page::Last,
            }
        }
        self.records(page, next, at)
    }

    /// The rest of a record that began before: where the next one begins. None where it is damaged.
    fn go_on(&mut self, page: &[u8], header: usize, rest: usize) -> Option<usize> {
        let room = page.len().saturating_sub(header);
        let after = header.saturating_add(aligned(rest));
        let Some((mut record, length)) = self.open.take() else {
            // It began before this stretch: nothing is known of it but its length.
            return Some(after);
        };
        if record.len().checked_add(rest) != Some(length) {
            return None;
        }
        record.extend_from_slice(page.get(header..header + rest.min(room))?);
        if rest > room {
            self.open = Some((record, length));
            return Some(after);
        }
        is_whole(&record).then(|| {
            self.end = self.position(page).map(|p| p + after as u64);
            after
        })
    }

    fn position(&self, page: &[u8]) -> Option<u64> {
        u64_at(page, 8).filter(|p| *p >= self.start)
    }

    fn records(&mut self, page: &[u8], mut next: usize, at: u64) -> Page {
        while next < page.len() {
            let length = u32_at(page, next).and_then(|n| usize::try_from(n).ok());
            let Some(length) = length.filter(|n| *n >= RECORD_HEADER_BYTES) else {
                return Page::Last;
            };
            let there = page.get(next..).unwrap_or_default();
            let Some(record) = there.get(..length) else {
                self.open = Some((there.to_vec(), length));
                return Page::Whole;
            };
            if !is_whole(record) {
                return Page::Last;
            }
            next = next.saturating_add(aligned(length));
            self.end = Some(at + next as u64);
            // XLOG_SWITCH of the resource manager RM_XLOG_ID.
            if record.get(17) == Some(&0) && record.get(16).is_some_and(|i| i & 0xF0 == 0x40) {
                return Page::Switch;
            }
        }
        Page::Whole
    }
}

/// Its checksum is right.
fn is_whole(record: &[u8]) -> bool {
    let (Some(header), Some(data)) = (record.get(..20), record.get(RECORD_HEADER_BYTES..)) else {
        return false;
    };
    u32_at(record, 20) == Some(crc32c::crc32c_append(crc32c::crc32c(data), header))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: usize = 8192;
    const SEGMENT: u64 = 1 << 20;

    /// A record of resource manager `rmid` with this many bytes of data.
    fn record(rmid: u8, info: u8, data: usize) -> Vec<u8> {
        let data = vec![7; data];
        let length = u32::try_from(RECORD_HEADER_BYTES + data.len()).unwrap();
        let mut header = length.to_le_bytes().to_vec();
        header.extend_from_slice(&[0; 12]);
        header.extend_from_slice(&[info, rmid, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&data), &header);
        header.extend_from_slice(&crc.to_le_bytes());
        header.extend_from_slice(&data);
        header
    }

    /// Records in pages from `start` on, and the end of each.
    fn lay_out(start: u64, records: &[Vec<u8>]) -> (Vec<u8>, Vec<u64>) {
        let (mut wal, mut ends) = (Vec::new(), Vec::new());
        let page = |wal: &mut Vec<u8>, rest: usize| {
            let at = start + wal.len() as u64;
            let long = at.is_multiple_of(SEGMENT);
            let info = u16::from(rest > 0) | if long { LONG_HEADER } else { 0 };
            wal.extend_from_slice(&0xD110_u16.to_le_bytes());
            wal.extend_from_slice(&info.to_le_bytes());
            wal.extend_from_slice(&1_u32.to_le_bytes());
            wal.extend_from_slice(&at.to_le_bytes());
            wal.extend_from_slice(&u32::try_from(rest).unwrap().to_le_bytes());
            wal.extend_from_slice(&[0; 4]);
            if long {
                wal.extend_from_slice(&7_u64.to_le_bytes());
                wal.extend_from_slice(&u32::try_from(SEGMENT).unwrap().to_le_bytes());
                wal.extend_from_slice(&u32::try_from(PAGE).unwrap().to_le_bytes());
            }
        };
        for record in records {
            let mut rest: &[u8] = record;
            if wal.len().is_multiple_of(PAGE) {
                page(&mut wal, 0);
            }
            loop {
                let room = PAGE - wal.len() % PAGE;
                let (now, later) = rest.split_at(room.min(rest.len()));
                wal.extend_from_slice(now);
                rest = later;
                if rest.is_empty() {
                    break;
                }
                page(&mut wal, rest.len());
            }
            wal.resize(aligned(wal.len()), 0);
            ends.push(start + wal.len() as u64);
        }
        (wal, ends)
    }

    #[test]
    fn the_end_of_the_last_whole_record() {
        let start = 3 * SEGMENT;
        let records: Vec<_> = [10, 8000, 20_000, 3, 200].map(|n| record(1, 0, n)).into();
        let (wal, ends) = lay_out(start, &records);
        let of = |wal: &[u8]| last_record_end(wal, start, SEGMENT);
        assert_eq!(of(&wal), ends.last().copied());
        // Filled up with zeros, as a segment is.
        let mut filled = wal.clone();
        filled.resize(1 << 20, 0);
        assert_eq!(of(&filled), ends.last().copied());
        // Cut off at every byte: never more than is there, and never less than the whole records of it.
        for cut in 40..wal.len() {
            let whole = ends.iter().rev().find(|e| {
                // The padding behind a record may be missing.
                **e <= start + cut as u64 + 7
            });
            let got = of(&wal[..cut]);
            assert!(got <= whole.copied(), "{cut}: {got:?} {whole:?}");
            let surely = ends.iter().rev().find(|e| **e <= start + cut as u64);
            assert!(got >= surely.copied(), "{cut}: {got:?} {surely:?}");
        }
        // What is damaged ends it.
        let mut torn = wal.clone();
        let at = usize::try_from(ends[2] - start).unwrap() + 26;
        torn[at] ^= 1;
        assert_eq!(of(&torn), Some(ends[2]));
    }

    #[test]
    fn a_record_that_began_before_and_a_switch() {
        let (before, _) = lay_out(0, &[record(1, 0, 1_048_500), record(1, 0, 5000)]);
        let second = before[1 << 20..].to_vec();
        let (_, ends) = lay_out(0, &[record(1, 0, 1_048_500), record(1, 0, 5000)]);
        assert_eq!(
            last_record_end(&second, SEGMENT, SEGMENT),
            ends.last().copied()
        );
        // After a switch WAL goes on in the next segment.
        let (mut first, switched) = lay_out(0, &[record(1, 0, 9), record(0, 0x40, 0)]);
        assert_eq!(
            last_record_end(&first, 0, SEGMENT),
            switched.last().copied()
        );
        first.resize(1 << 20, 0);
        let (next, ends) = lay_out(SEGMENT, &[record(1, 0, 30)]);
        first.extend(next);
        assert_eq!(last_record_end(&first, 0, SEGMENT), ends.last().copied());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_stumble(mut bytes in proptest::collection::vec(any::<u8>(), 0..4000)) {
            let _ = last_record_end(&bytes, 0, SEGMENT);
            if bytes.len() > 40 {
                bytes[36..40].copy_from_slice(&1024_u32.to_le_bytes());
                bytes[8..16].copy_from_slice(&0_u64.to_le_bytes());
                let _ = last_record_end(&bytes, 0, SEGMENT);
            }
        }
    }
}
