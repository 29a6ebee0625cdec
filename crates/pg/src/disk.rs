//! Free space, and a reserve file that gives recovery room on a disk that ran full.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use serde::{Deserialize, Serialize};

use crate::error::{PgError, Result};
use crate::files;

/// Space on the file system of the data directory, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskSpace {
    /// All of it.
    pub total: u64,
    /// What an ordinary user may still take.
    pub available: u64,
}

/// Asks the file system that holds `path`.
pub(crate) fn space(path: &Path) -> Result<DiskSpace> {
    let stat =
        statvfs(path).map_err(|e| PgError::io("cannot ask for free space of", path)(e.into()))?;
    Ok(DiskSpace {
        total: stat.f_frsize.saturating_mul(stat.f_blocks),
        available: stat.f_frsize.saturating_mul(stat.f_bavail),
    })
}

/// Makes the reserve file exactly this large, really allocated; 0 removes it.
pub(crate) fn set_reserve(path: &Path, bytes: u64) -> Result<()> {
    if bytes == 0 {
        return files::remove_durably(path).map(|_| ());
    }
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(PgError::io("cannot create", path))?;
    match fallocate(&file, FallocateFlags::empty(), 0, bytes) {
        Ok(()) => file
            .set_len(bytes)
            .map_err(PgError::io("cannot size", path)),
        Err(rustix::io::Errno::NOSPC) => {
            files::remove_durably(path)?;
            let available = space(files::parent_of(path)?)?.available;
            Err(PgError::DiskFull {
                path: path.to_owned(),
                needed: bytes,
                available,
            })
        }
        Err(e) => Err(PgError::io("cannot reserve space in", path)(e.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_allocated_and_goes_away() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reserve");
        set_reserve(&path, 1 << 20).unwrap();
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 >= 1 << 20);
        set_reserve(&path, 0).unwrap();
        assert!(!path.exists());
        assert!(space(dir.path()).unwrap().total > 0);
    }
}
