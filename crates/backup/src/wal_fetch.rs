//! PostgreSQL's `restore_command`: one WAL or history file from the repository.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use craton_repo::layout;
use craton_repo::segment::SegmentId;

use crate::copy;
use crate::error::{BackupError, Result};
use crate::store::Repository;

/// What came of a fetch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fetched {
    /// The file was delivered.
    Delivered,
    /// The repository does not have it: recovery takes this for the end of the WAL.
    NotThere,
}

/// The exit status for a file that is not there: recovery goes on without it.
pub const EXIT_NOT_THERE: u8 = 1;
/// The exit status when the repository cannot be read. PostgreSQL takes anything above 125 for a
/// reason to stop, which is right: ending recovery here would silently drop what comes after.
pub const EXIT_UNREACHABLE: u8 = 200;

/// Delivers the file that PostgreSQL calls `name` as `target`.
///
/// A segment that is still being received is delivered as far as it came and filled with zeros, so
/// that a restore to the latest state loses nothing that was received.
pub fn wal_fetch(repository: &Repository, name: &str, target: &Path) -> Result<Fetched> {
    let found = match raw(repository, name)? {
        None => passed_over(repository, name)?,
        found => found,
    };
    let Some(mut bytes) = found else {
        return Ok(Fetched::NotThere);
    };
    if layout::parse_history_name(name).is_none() {
        bytes.resize(
            usize::try_from(repository.segment_size()).unwrap_or(bytes.len()),
            0,
        );
    }
    // PostgreSQL reads the target only after success, but never leave half a file behind.
    let temporary = target.with_extension("fetch");
    let written = File::create(&temporary)
        .and_then(|mut f| f.write_all(&bytes).and_then(|()| f.sync_all()))
        .and_then(|()| fs::rename(&temporary, target));
    written.map_err(|e| {
        let _ = fs::remove_file(&temporary);
        BackupError::io("write", target)(e)
    })?;
    Ok(Fetched::Delivered)
}

/// For a timeline that never was, or that nobody archived, below one that is held: PostgreSQL looks for the newest number
/// by number, and would stop before it (timeline.c, `findNewestTimeLine`).
fn passed_over(repository: &Repository, name: &str) -> Result<Option<Vec<u8>>> {
    let Some(timeline) = layout::parse_history_name(name) else {
        return Ok(None);
    };
    let newest = repository.timelines()?.last().copied();
    Ok(newest
        .is_some_and(|n| timeline < n)
        .then(|| b"# not held; a later timeline is\n".to_vec()))
}

/// A segment, as far as it came, or a history file.
pub(crate) fn raw(repository: &Repository, name: &str) -> Result<Option<Vec<u8>>> {
    if let Some(timeline) = layout::parse_history_name(name) {
        return match repository.read(&layout::history(timeline)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e),
        };
    }
    let Some(id) = SegmentId::parse(name, repository.segment_size()) else {
        return Ok(None);
    };
    copy::bytes(repository, id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal_sink::WalSink;
    use craton_core::{Lsn, TimelineId};

    #[test]
    fn whole_partial_history_and_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let repo = Repository::open_or_create(dir.path(), 1, 1 << 20).unwrap();
        let mut sink = WalSink::new(repo.clone(), TimelineId(2), Lsn(0));
        sink.write(Lsn(0), &vec![9; (1 << 20) + 5]).unwrap();
        sink.flush().unwrap();
        repo.put_history(TimelineId(2), "1\t0/0\tno reason\n")
            .unwrap();
        repo.put_history(TimelineId(5), "2\t0/0\tno reason\n")
            .unwrap();
        let target = dir.path().join("RECOVERYXLOG");
        let fetch = |name: &str| {
            let _ = fs::remove_file(&target);
            let outcome = wal_fetch(&repo, name, &target).unwrap();
            (outcome, fs::read(&target).unwrap_or_default())
        };
        assert_eq!(
            fetch("000000020000000000000000"),
            (Fetched::Delivered, vec![9; 1 << 20])
        );
        let (outcome, partial) = fetch("000000020000000000000001");
        assert_eq!(
            (outcome, partial.len(), partial[4], partial[5]),
            (Fetched::Delivered, 1 << 20, 9, 0)
        );
        assert_eq!(fetch("00000002.history").0, Fetched::Delivered);
        let (outcome, text) = fetch("00000004.history");
        assert_eq!((outcome, text.first()), (Fetched::Delivered, Some(&b'#')));
        for absent in [
            "00000006.history",
            "000000010000000000000000",
            "000000020000000000000002",
            "nonsense",
        ] {
            assert_eq!(fetch(absent), (Fetched::NotThere, vec![]), "{absent}");
        }
    }

    /// A member that was cloned has no history of an ancestor but a reservation of its number.
    #[test]
    fn a_number_that_is_only_taken_is_no_history() {
        let dir = tempfile::tempdir().unwrap();
        let repo = Repository::open_or_create(dir.path(), 1, 1 << 20).unwrap();
        let (two, real) = (TimelineId(2), "1\t0/0\tno reason\n");
        let held = || repo.read(&layout::history(two)).ok();
        repo.put_history(two, "# reserved\n").unwrap();
        assert_eq!(held(), None);
        // As earlier versions kept it.
        repo.write(&layout::history(two), b"# reserved\n").unwrap();
        for text in [real, "# reserved\n", real] {
            repo.put_history(two, text).unwrap();
            assert_eq!(held().as_deref(), Some(real.as_bytes()));
        }
        assert!(repo.put_history(two, "1\t0/8\tanother\n").is_err());
    }

    #[test]
    fn damage_is_an_error_not_an_absence() {
        let dir = tempfile::tempdir().unwrap();
        let repo = Repository::open_or_create(dir.path(), 1, 1 << 20).unwrap();
        let id = SegmentId {
            timeline: TimelineId(1),
            number: 0,
        };
        let mut sink = WalSink::new(repo.clone(), TimelineId(1), Lsn(0));
        sink.write(Lsn(0), &vec![9; 1 << 20]).unwrap();
        repo.compress_segment(id).unwrap();
        let path = dir.path().join("wal/00000001/000000010000000000000000.zst");
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() - 3;
        bytes[middle] ^= 0xff;
        fs::write(&path, bytes).unwrap();
        assert!(wal_fetch(&repo, "000000010000000000000000", &dir.path().join("x")).is_err());
        assert!(!dir.path().join("x").exists());
    }
}
