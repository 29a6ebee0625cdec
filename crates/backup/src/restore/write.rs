//! Writes a backup's files where they belong, and takes them away again when that fails.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use craton_repo::manifest::{Entry, EntryKind, Manifest};

use super::Progress;
use crate::error::{BackupError, Result};
use crate::store::{ChunkReader, Repository};

/// Files that belong to the old server's role, not to its data.
const LEFT_OUT: [&str; 5] = [
    // A restored directory may found a cluster of its own; a member's agent marks it anew.
    "craton.mark",
    "standby.signal",
    "recovery.signal",
    "postmaster.pid",
    "postmaster.opts",
];

/// Where the data directory and the tablespaces go; the data directory has no number.
pub(super) type Places = BTreeMap<Option<u32>, PathBuf>;

/// Finds the places and makes sure that nothing is overwritten and everything fits.
pub(super) fn places(
    directory: &Path,
    manifest: &Manifest,
    mapping: &BTreeMap<String, PathBuf>,
) -> Result<Places> {
    let mut places = Places::from([(None, directory.to_owned())]);
    for tablespace in &manifest.tablespaces {
        let place = mapping.get(&tablespace.location).cloned();
        places.insert(
            Some(tablespace.oid),
            place.unwrap_or_else(|| PathBuf::from(&tablespace.location)),
        );
    }
    if let Some(unknown) = mapping
        .keys()
        .find(|k| manifest.tablespaces.iter().all(|t| &t.location != *k))
    {
        let known: Vec<_> = manifest
            .tablespaces
            .iter()
            .map(|t| t.location.as_str())
            .collect();
        return Err(BackupError::Refused(format!(
            "the backup has no tablespace at {unknown}; it has: {}",
            if known.is_empty() {
                "none".to_owned()
            } else {
                known.join(", ")
            }
        )));
    }
    for (oid, place) in &places {
        if !place.is_absolute() {
            return Err(BackupError::Refused(format!(
                "{} is not an absolute path",
                place.display()
            )));
        }
        if !is_absent_or_empty(place)? {
            return Err(BackupError::Refused(match oid {
                None => format!(
                    "{} is not empty; restore into a new directory",
                    place.display()
                ),
                Some(oid) => format!(
                    "tablespace {oid} would go to {}, which is not empty; name another place: --tablespace {}=/new/place",
                    place.display(),
                    manifest
                        .tablespaces
                        .iter()
                        .find(|t| t.oid == *oid)
                        .map_or("", |t| t.location.as_str())
                ),
            }));
        }
    }
    check_space(directory, manifest.summary.data_bytes)?;
    Ok(places)
}

fn is_absent_or_empty(dir: &Path) -> Result<bool> {
    match fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => Ok(false),
        Err(e) => Err(BackupError::io("read", dir)(e)),
    }
}

/// Better to say it now than after an hour.
fn check_space(directory: &Path, needed: u64) -> Result<()> {
    let existing = directory
        .ancestors()
        .find(|p| p.exists())
        .unwrap_or(Path::new("/"));
    let stat = rustix::fs::statvfs(existing)
        .map_err(|e| BackupError::io("look at", existing)(e.into()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < needed {
        return Err(BackupError::Refused(format!(
            "{} has {} MB free, the backup has {} MB; choose another place",
            existing.display(),
            free >> 20,
            needed >> 20
        )));
    }
    Ok(())
}

/// What was created, to be taken away again unless it is kept.
#[derive(Debug, Default)]
pub(super) struct Undo {
    /// Directories that did not exist before, and directories that were empty before.
    created: Vec<PathBuf>,
    filled: Vec<PathBuf>,
}

impl Undo {
    /// The restore is complete.
    pub(super) fn keep(&mut self) {
        self.created.clear();
        self.filled.clear();
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        for dir in &self.filled {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
                let removed = if is_dir {
                    fs::remove_dir_all(entry.path())
                } else {
                    fs::remove_file(entry.path())
                };
                report(removed, &entry.path());
            }
        }
        for dir in &self.created {
            report(fs::remove_dir_all(dir), dir);
        }
    }
}

fn report(removed: io::Result<()>, path: &Path) {
    if let Err(error) = removed {
        tracing::warn!(path = %path.display(), %error, "cannot take away a half-restored file");
    }
}

/// How much was written.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Written {
    pub(super) files: u64,
    pub(super) bytes: u64,
}

/// Writes everything.
pub(super) fn files(
    repository: &Repository,
    manifest: &Manifest,
    places: &Places,
    undo: &mut Undo,
    progress: &mut dyn FnMut(Progress),
) -> Result<Written> {
    for place in places.values() {
        if place.is_dir() {
            undo.filled.push(place.clone());
            // PostgreSQL refuses a data directory that others can read.
            fs::set_permissions(place, Permissions::from_mode(0o700))
                .map_err(BackupError::io("protect", place))?;
        } else {
            undo.created.push(
                place
                    .ancestors()
                    .take_while(|p| !p.exists())
                    .last()
                    .unwrap_or(place)
                    .to_owned(),
            );
            create_dir(place, 0o700)?;
        }
    }
    let mut chunks = ChunkReader::new(repository);
    let mut written = Written::default();
    let total_bytes = manifest.summary.data_bytes;
    for entry in &manifest.entries {
        if entry.tablespace.is_none() && LEFT_OUT.contains(&entry.path.as_str()) {
            continue;
        }
        let Some(place) = places.get(&entry.tablespace) else {
            continue;
        };
        let path = place.join(&entry.path);
        match &entry.kind {
            EntryKind::Directory => create_dir(&path, entry.mode)?,
            EntryKind::Symlink { target } => link(entry, target, &path, places)?,
            EntryKind::File { chunks: list, .. } => {
                let mut file = create_file(&path, entry.mode)?;
                for chunk in manifest.chunks_of(list) {
                    let pack = manifest
                        .packs
                        .get(chunk.pack as usize)
                        .copied()
                        .unwrap_or(chunk.id);
                    let plain = chunks.read(pack, chunk)?;
                    file.write_all(&plain)
                        .map_err(BackupError::io("write", &path))?;
                    written.bytes += plain.len() as u64;
                    progress(Progress {
                        done_bytes: written.bytes,
                        total_bytes,
                    });
                }
                written.files += 1;
            }
        }
    }
    Ok(written)
}

fn create_dir(path: &Path, mode: u32) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode | 0o700)
        .create(path)
        .map_err(BackupError::io("create", path))
}

fn create_file(path: &Path, mode: u32) -> Result<File> {
    // Server and archive list directories before what is in them; be safe with what is not listed.
    if let Some(parent) = path.parent().filter(|p| !p.exists()) {
        create_dir(parent, 0o700)?;
    }
    File::options()
        .write(true)
        .create_new(true)
        .mode(mode & 0o777)
        .open(path)
        .map_err(BackupError::io("create", path))
}

/// Links in `pg_tblspc` lead to where the tablespaces are now.
fn link(entry: &Entry, target: &str, path: &Path, places: &Places) -> Result<()> {
    let oid = entry
        .path
        .strip_prefix("pg_tblspc/")
        .and_then(|o| o.parse::<u32>().ok());
    let now = oid
        .and_then(|oid| places.get(&Some(oid)))
        .cloned()
        .unwrap_or_else(|| PathBuf::from(target));
    symlink(now, path).map_err(BackupError::io("link", path))
}

/// Makes everything durable, once for each file system.
pub(super) fn sync(places: &Places) -> Result<()> {
    for place in places.values() {
        let dir = File::open(place).map_err(BackupError::io("open", place))?;
        rustix::fs::syncfs(&dir).map_err(|e| BackupError::io("sync", place)(e.into()))?;
    }
    Ok(())
}
