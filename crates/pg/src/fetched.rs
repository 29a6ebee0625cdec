//! WAL that came another way than by streaming: put into `pg_wal` of a server that is down, which reads it when
//! it starts.
//!
//! What is fetched lies beside the segments under names that PostgreSQL does not look at, and takes their places only
//! when all of it is there. It never replaces other bytes: what a segment holds already must be its beginning.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use craton_core::{Lsn, TimelineId};

use crate::error::{PgError, Result};
use crate::files::blocking;
use crate::instance::Instance;

/// In front of the names of files that are not in their places yet.
const FETCHED: &str = "craton-fetched.";

/// A segment's name, as in `pg_wal`. `segment_size` in bytes.
pub fn segment_name(timeline: TimelineId, number: u64, segment_size: u64) -> String {
    let per_id = 0x1_0000_0000_u64
        .checked_div(segment_size)
        .unwrap_or(1)
        .max(1);
    format!(
        "{:08X}{:08X}{:08X}",
        timeline.0,
        number / per_id,
        number % per_id
    )
}

/// A history file's name.
pub fn history_name(timeline: TimelineId) -> String {
    format!("{:08X}.history", timeline.0)
}

impl Instance {
    /// Removes what an earlier try left.
    pub async fn forget_fetched(&self) -> Result<()> {
        let dir = self.wal_dir();
        blocking(move || {
            for path in fetched(&dir)? {
                fs::remove_file(&path).map_err(PgError::io("cannot remove", &path))?;
            }
            Ok(())
        })
        .await
    }

    /// Adds to a file that is being fetched.
    pub async fn add_fetched(&self, name: &str, bytes: Vec<u8>) -> Result<()> {
        let path = self.wal_dir().join(format!("{FETCHED}{name}"));
        blocking(move || {
            File::options()
                .create(true)
                .append(true)
                .mode(0o600)
                .open(&path)
                .and_then(|mut f| f.write_all(&bytes))
                .map_err(PgError::io("cannot write", &path))
        })
        .await
    }

    /// True if a fetched segment begins as the one that is here up to `end`, which lies in it; also where none is here.
    pub async fn fits(&self, fetched: &str, own: TimelineId, end: Lsn, size: u64) -> Result<bool> {
        let dir = self.wal_dir();
        let fetched = dir.join(format!("{FETCHED}{fetched}"));
        let number = end.0.checked_div(size).unwrap_or(0);
        let here = dir.join(segment_name(own, number, size));
        let length = end.0.checked_rem(size).unwrap_or(0);
        blocking(move || {
            if !here.exists() {
                return Ok(true);
            }
            Ok(beginning(&fetched, length)? == beginning(&here, length)?)
        })
        .await
    }

    /// Puts everything that was fetched into its place; segments are filled up to their size. To be called only while
    /// PostgreSQL is down.
    pub async fn place_fetched(&self, segment_size: u64) -> Result<()> {
        let dir = self.wal_dir();
        blocking(move || {
            for path in fetched(&dir)? {
                place(&dir, &path, segment_size)?;
            }
            File::open(&dir)
                .and_then(|d| d.sync_all())
                .map_err(PgError::io("cannot sync", &dir))
        })
        .await
    }
}

fn fetched(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).map_err(PgError::io("cannot list", dir))?;
    let ours = |p: &PathBuf| {
        let name = p.file_name().and_then(|n| n.to_str());
        name.is_some_and(|n| n.starts_with(FETCHED))
    };
    Ok(entries.flatten().map(|e| e.path()).filter(ours).collect())
}

/// The first bytes of a file; fewer where it is shorter.
fn beginning(path: &Path, length: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|f| f.take(length).read_to_end(&mut bytes))
        .map_err(PgError::io("cannot read", path))?;
    Ok(bytes)
}

fn place(dir: &Path, path: &Path, segment_size: u64) -> Result<()> {
    let name = path.file_name().and_then(|n| n.to_str());
    let Some(name) = name.and_then(|n| n.strip_prefix(FETCHED)) else {
        return Ok(());
    };
    let file = File::options()
        .write(true)
        .open(path)
        .map_err(PgError::io("cannot open", path))?;
    if !name.ends_with(".history") {
        file.set_len(segment_size)
            .map_err(PgError::io("cannot extend", path))?;
    }
    file.sync_all().map_err(PgError::io("cannot sync", path))?;
    fs::rename(path, dir.join(name)).map_err(PgError::io("cannot rename", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let size = 16 << 20;
        assert_eq!(
            segment_name(TimelineId(2), 256, size),
            "000000020000000100000000"
        );
        assert_eq!(
            segment_name(TimelineId(0x1F), 5, size),
            "0000001F0000000000000005"
        );
        assert_eq!(history_name(TimelineId(10)), "0000000A.history");
    }

    #[test]
    fn what_was_fetched_takes_its_place_whole() {
        let dir = tempfile::tempdir().unwrap();
        let name = segment_name(TimelineId(1), 3, 1 << 20);
        let path = dir.path().join(format!("{FETCHED}{name}"));
        fs::write(&path, b"wal").unwrap();
        assert_eq!(fetched(dir.path()).unwrap(), std::slice::from_ref(&path));
        assert_eq!(beginning(&path, 2).unwrap(), b"wa");
        place(dir.path(), &path, 1 << 20).unwrap();
        let bytes = fs::read(dir.path().join(name)).unwrap();
        assert_eq!((bytes.len(), &bytes[..4]), (1 << 20, &b"wal\0"[..]));
        assert!(fetched(dir.path()).unwrap().is_empty());
    }
}
