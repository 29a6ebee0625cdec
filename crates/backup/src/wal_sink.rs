//! Where received WAL goes: the partial segment on disk, which becomes a whole one.
//!
//! Bytes that were reported as flushed are never overwritten by others: after a restart the segment
//! is received anew from its start, and where the new bytes differ (they never should, on one
//! timeline) the old file is kept beside under another name.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use craton_core::{Lsn, TimelineId};
use craton_repo::layout::{self, SegmentForm};
use craton_repo::segment::SegmentId;

use crate::error::{BackupError, Result};
use crate::store::{FILE_MODE, Repository, create_dir_synced, sync_dir};

/// Writes one timeline's WAL into the repository, in order.
#[derive(Debug)]
pub struct WalSink {
    repository: Repository,
    timeline: TimelineId,
    open: Option<OpenSegment>,
    written: Lsn,
    flushed: Lsn,
    completed: u64,
    conflicts: u64,
}

#[derive(Debug)]
struct OpenSegment {
    id: SegmentId,
    /// None when the segment is held whole already and what comes is dropped.
    file: Option<File>,
    /// How much of the file was there before it was opened.
    held_before: u64,
    dirty: bool,
}

impl WalSink {
    /// Starts at the beginning of a segment.
    pub fn new(repository: Repository, timeline: TimelineId, start: Lsn) -> Self {
        let start = start.segment_start(repository.segment_size());
        Self {
            repository,
            timeline,
            open: None,
            written: start,
            flushed: start,
            completed: 0,
            conflicts: 0,
        }
    }

    /// The timeline it writes.
    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// Received up to here.
    pub fn written(&self) -> Lsn {
        self.written
    }

    /// On stable storage up to here.
    pub fn flushed(&self) -> Lsn {
        self.flushed
    }

    /// How many segments have become whole.
    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// How many segments were kept aside because other bytes came for them.
    pub fn conflicts(&self) -> u64 {
        self.conflicts
    }

    /// Takes WAL that begins at `start`, which must be where the last ended.
    pub fn write(&mut self, start: Lsn, mut data: &[u8]) -> Result<()> {
        if start != self.written {
            return Err(BackupError::Interrupted(format!(
                "the server sent WAL from {start} where {} was due; connecting anew",
                self.written
            )));
        }
        let size = self.repository.segment_size();
        while !data.is_empty() {
            let id = SegmentId::at(self.timeline, self.written, size);
            let offset = self.written.0 - id.start(size).0;
            let room = usize::try_from(size - offset).unwrap_or(usize::MAX);
            let (now, later) = data.split_at(room.min(data.len()));
            self.segment(id)?;
            self.put(offset, now)?;
            self.written = Lsn(self.written.0 + now.len() as u64);
            data = later;
            if self.written.0.is_multiple_of(size) {
                self.complete()?;
            }
        }
        Ok(())
    }

    /// Makes everything written durable and says how far that is.
    pub fn flush(&mut self) -> Result<Lsn> {
        if let Some(OpenSegment {
            id,
            file: Some(file),
            dirty: dirty @ true,
            ..
        }) = &mut self.open
        {
            file.sync_data().map_err(|e| {
                let name =
                    layout::segment(*id, SegmentForm::Partial, self.repository.segment_size());
                BackupError::io("sync", &self.repository.path(&name))(e)
            })?;
            *dirty = false;
        }
        self.flushed = self.written;
        Ok(self.flushed)
    }

    fn segment(&mut self, id: SegmentId) -> Result<()> {
        if self.open.as_ref().is_some_and(|o| o.id == id) {
            return Ok(());
        }
        let size = self.repository.segment_size();
        let exists = |form| {
            self.repository
                .path(&layout::segment(id, form, size))
                .exists()
        };
        if exists(SegmentForm::Full) || exists(SegmentForm::Compressed) {
            self.open = Some(OpenSegment {
                id,
                file: None,
                held_before: 0,
                dirty: false,
            });
            return Ok(());
        }
        create_dir_synced(&self.repository.path(&layout::timeline_dir(id.timeline)))?;
        let path = self
            .repository
            .path(&layout::segment(id, SegmentForm::Partial, size));
        let is_new = !path.exists();
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(FILE_MODE)
            .open(&path)
            .map_err(BackupError::io("open", &path))?;
        if is_new {
            path.parent().map_or(Ok(()), sync_dir)?;
        }
        let held_before = file
            .metadata()
            .map_err(BackupError::io("read", &path))?
            .len();
        self.open = Some(OpenSegment {
            id,
            file: Some(file),
            held_before,
            dirty: false,
        });
        Ok(())
    }

    fn put(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let size = self.repository.segment_size();
        let Some(open) = &mut self.open else {
            return Ok(());
        };
        let Some(file) = &open.file else {
            return Ok(());
        };
        let path = self
            .repository
            .path(&layout::segment(open.id, SegmentForm::Partial, size));
        let overlap = usize::try_from(open.held_before.saturating_sub(offset))
            .unwrap_or(usize::MAX)
            .min(data.len());
        if overlap > 0 {
            let mut held = vec![0; overlap];
            file.read_exact_at(&mut held, offset)
                .map_err(BackupError::io("read", &path))?;
            if Some(held.as_slice()) == data.get(..overlap) {
                // Nothing to write for this part; the rest goes behind it.
                let rest = data.get(overlap..).unwrap_or_default();
                file.write_all_at(rest, offset + overlap as u64)
                    .map_err(BackupError::io("write", &path))?;
                open.dirty = true;
                return Ok(());
            }
            keep_aside(&path)?;
            self.conflicts += 1;
            file.set_len(offset)
                .map_err(BackupError::io("truncate", &path))?;
            open.held_before = 0;
        }
        file.write_all_at(data, offset)
            .map_err(BackupError::io("write", &path))?;
        open.dirty = true;
        Ok(())
    }

    fn complete(&mut self) -> Result<()> {
        self.flush()?;
        let Some(open) = self.open.take() else {
            return Ok(());
        };
        if open.file.is_none() {
            return Ok(());
        }
        let size = self.repository.segment_size();
        let from = self
            .repository
            .path(&layout::segment(open.id, SegmentForm::Partial, size));
        let to = self
            .repository
            .path(&layout::segment(open.id, SegmentForm::Full, size));
        fs::rename(&from, &to).map_err(BackupError::io("rename", &from))?;
        self.completed += 1;
        to.parent().map_or(Ok(()), sync_dir)
    }
}

/// Copies a partial segment to the first free `<name>.conflict-<n>`.
fn keep_aside(path: &Path) -> Result<()> {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let free = (1..=1000_u32)
        .map(|n| path.with_file_name(format!("{name}.conflict-{n}")))
        .find(|p| !p.exists());
    let Some(copy) = free else {
        return Err(BackupError::Refused(format!(
            "too many conflicting copies beside {}",
            path.display()
        )));
    };
    tracing::error!(kept = %copy.display(), "the server sent other bytes for WAL that was received before; the old ones are kept");
    fs::copy(path, &copy).map_err(BackupError::io("copy", &copy))?;
    File::open(&copy)
        .and_then(|f| f.sync_all())
        .map_err(BackupError::io("sync", &copy))
}

#[cfg(test)]
mod tests {
    use super::*;
    use craton_repo::continuity::Held;
    use std::os::unix::fs::PermissionsExt;

    const SIZE: u64 = 1 << 20;

    fn repository(dir: &Path) -> Repository {
        Repository::open_or_create(dir, 7, SIZE).unwrap()
    }

    #[test]
    fn segments_grow_become_whole_and_are_compressed() {
        let dir = tempfile::tempdir().unwrap();
        let repo = repository(dir.path());
        let mut sink = WalSink::new(repo.clone(), TimelineId(1), Lsn(SIZE));
        let wal = vec![5_u8; usize::try_from(SIZE).unwrap() + 100];
        sink.write(Lsn(SIZE), &wal).unwrap();
        assert_eq!(
            (sink.written(), sink.flushed(), sink.completed()),
            (Lsn(2 * SIZE + 100), Lsn(2 * SIZE), 1)
        );
        assert_eq!(sink.flush().unwrap(), Lsn(2 * SIZE + 100));
        let id = SegmentId {
            timeline: TimelineId(1),
            number: 1,
        };
        repo.compress_segment(id).unwrap();
        let path = dir.path().join("wal/00000001/000000010000000000000001.zst");
        for path in [path.as_path(), path.parent().unwrap()] {
            let mode = fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "others can read {}", path.display());
        }
        assert_eq!(repo.whole_segment(id).unwrap().unwrap().len() as u64, SIZE);
        let inventory = repo.inventory().unwrap();
        assert_eq!(inventory[&id], Held::Whole);
        assert_eq!(
            inventory[&SegmentId { number: 2, ..id }],
            Held::Until(Lsn(2 * SIZE + 100))
        );
        assert!(
            sink.write(Lsn(2 * SIZE), b"again").is_err(),
            "WAL out of order was taken"
        );
    }

    #[test]
    fn receiving_again_changes_nothing_and_other_bytes_are_kept_aside() {
        let dir = tempfile::tempdir().unwrap();
        let repo = repository(dir.path());
        let id = SegmentId {
            timeline: TimelineId(1),
            number: 0,
        };
        let mut sink = WalSink::new(repo.clone(), TimelineId(1), Lsn(0));
        sink.write(Lsn(0), b"abcdef").unwrap();
        sink.flush().unwrap();
        let mut again = WalSink::new(repo.clone(), TimelineId(1), Lsn(3));
        again.write(Lsn(0), b"abc").unwrap();
        assert_eq!(
            repo.partial_segment(id).unwrap().unwrap(),
            b"abcdef",
            "acknowledged bytes were lost"
        );
        again.write(Lsn(3), b"defghi").unwrap();
        assert_eq!(
            (
                again.conflicts(),
                repo.partial_segment(id).unwrap().unwrap()
            ),
            (0, b"abcdefghi".to_vec())
        );

        let mut other = WalSink::new(repo.clone(), TimelineId(1), Lsn(0));
        other.write(Lsn(0), b"abX").unwrap();
        assert_eq!(other.conflicts(), 1);
        assert_eq!(repo.partial_segment(id).unwrap().unwrap(), b"abX");
        let kept = dir
            .path()
            .join("wal/00000001/000000010000000000000000.partial.conflict-1");
        assert_eq!(fs::read(kept).unwrap(), b"abcdefghi");
    }

    #[test]
    fn one_writer_one_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let _held = Repository::lock(dir.path()).unwrap();
        assert!(Repository::lock(dir.path()).is_err());
        repository(dir.path());
        assert!(Repository::open_or_create(dir.path(), 8, SIZE).is_err());
    }
}
