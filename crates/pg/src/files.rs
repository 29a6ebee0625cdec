//! Durable file operations: a file is either the old or the new one, also after a power cut.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{PgError, Result};

/// The longest text file that is read whole, in bytes: configuration and state files are far below.
const TEXT_BYTES_MAX: u64 = 4 << 20;

/// Creates a directory that only the owner may enter; an existing one is fine.
pub(crate) fn private_dir(path: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).recursive(true).create(path) {
        Ok(()) => Ok(()),
        Err(e) => Err(PgError::io("cannot create directory", path)(e)),
    }
}

/// Flushes a directory, so that a rename or removal in it survives a power cut.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|d| d.sync_all())
        .map_err(PgError::io("cannot flush directory", path))
}

/// Writes a file (mode 0600) beside its place, flushes it and renames it into place.
pub(crate) fn write_durably(path: &Path, content: &[u8]) -> Result<()> {
    let parent = parent_of(path)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = parent.join(name);
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(PgError::io("cannot write", path))?;
    sync_dir(parent)
}

/// True if one call flushes a whole file system and tells of every error (Linux 5.8 and later). PostgreSQL's tools
/// flush each file on its own instead, a thousand in an empty cluster: seconds on most disks, even if nothing is
/// dirty.
pub(crate) fn can_flush_file_systems() -> bool {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version >= (5, 8)
}

/// Flushes the file systems that hold a data directory: its own, that of its WAL, those of its tablespaces.
pub(crate) fn flush_data_dir(data_dir: &Path) -> Result<()> {
    let mut places = vec![data_dir.to_owned(), data_dir.join("pg_wal")];
    let links = fs::read_dir(data_dir.join("pg_tblspc"));
    places.extend(links.into_iter().flatten().flatten().map(|e| e.path()));
    let mut flushed = std::collections::BTreeSet::new();
    for place in places {
        let mut flush = || -> io::Result<()> {
            let dir = File::open(&place)?;
            if flushed.insert(dir.metadata()?.dev()) {
                rustix::fs::syncfs(&dir)?;
            }
            Ok(())
        };
        flush().or_else(|e| match e.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(PgError::io("cannot flush the file system of", &place)(e)),
        })?;
    }
    Ok(())
}

/// Renames durably.
pub(crate) fn rename_durably(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(PgError::io("cannot move into place", to))?;
    sync_dir(parent_of(to)?)
}

/// Removes a file durably; tells whether it was there.
pub(crate) fn remove_durably(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => {
            sync_dir(parent_of(path)?)?;
            Ok(true)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(PgError::io("cannot remove", path)(e)),
    }
}

/// Removes a directory with all it holds; a missing one is fine.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Ok(()) => sync_dir(parent_of(path)?),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(PgError::io("cannot remove directory", path)(e)),
    }
}

/// Reads a text file, none if it is missing. Bytes that are not UTF-8 are replaced.
pub(crate) fn read_text(path: &Path) -> Result<Option<String>> {
    let size = match fs::metadata(path) {
        Ok(m) => m.len(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(PgError::io("cannot read", path)(e)),
    };
    if size > TEXT_BYTES_MAX {
        return Err(PgError::Unintelligible {
            what: "a configuration or state file",
            detail: format!(
                "{} has {size} bytes, at most {TEXT_BYTES_MAX} are expected",
                path.display()
            ),
        });
    }
    let bytes = fs::read(path).map_err(PgError::io("cannot read", path))?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// True for a missing or an empty directory.
pub(crate) fn is_empty_dir(path: &Path) -> Result<bool> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(e) => Err(PgError::io("cannot list", path)(e)),
    }
}

/// The directory that holds `path`.
pub(crate) fn parent_of(path: &Path) -> Result<&Path> {
    path.parent().ok_or_else(|| PgError::Invalid {
        what: "path",
        reason: format!("{} has no parent directory", path.display()),
    })
}

/// The last `bytes_max` bytes of a file as text; empty when it cannot be read (used in error messages).
pub(crate) fn tail(path: &Path, bytes_max: u64) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(bytes_max)))?;
        let mut bytes = Vec::new();
        file.take(bytes_max).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read()
        .map(|b| String::from_utf8_lossy(&b).trim_end().to_owned())
        .unwrap_or_default()
}

/// Runs blocking work off the async threads: fsync may take seconds under a checkpoint storm.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(PgError::Io {
            what: "a background file task ended early",
            path: PathBuf::new(),
            source: io::Error::other(e),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_a_file_whole_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.conf");
        write_durably(&path, b"one").unwrap();
        write_durably(&path, b"two").unwrap();
        assert_eq!(read_text(&path).unwrap().as_deref(), Some("two"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(remove_durably(&path).unwrap());
        assert!(!remove_durably(&path).unwrap());
        assert!(is_empty_dir(dir.path()).unwrap());
    }

    #[test]
    fn a_data_directory_is_flushed_whole() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("pg_tblspc")).unwrap();
        std::os::unix::fs::symlink("/dev/shm", dir.path().join("pg_tblspc/16384")).unwrap();
        flush_data_dir(dir.path()).unwrap();
        flush_data_dir(&dir.path().join("missing")).unwrap();
    }

    #[test]
    fn tail_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, "0123456789\n").unwrap();
        assert_eq!(tail(&path, 4), "789");
        assert_eq!(tail(&dir.path().join("none"), 4), "");
    }
}
