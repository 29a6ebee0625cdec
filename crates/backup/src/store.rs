//! The repository on a disk: atomic writes, and scans of what is there.
//!
//! Every file is written under a temporary name, synced, renamed and its directory synced, so a
//! crash leaves the old state or the new one. Only the segment being received grows in place.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use craton_core::{Lsn, TimelineId};
use craton_repo::chunk::ChunkId;
use craton_repo::continuity::{Held, Inventory, Missing};
use craton_repo::history::History;
use craton_repo::layout::{self, Descriptor, SegmentForm};
use craton_repo::manifest::{BackupId, ChunkRef, Manifest, Summary};
use craton_repo::pack::{self, FOOTER_BYTES, PackEntry, PackId};
use craton_repo::segment::{self, SegmentId};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::error::{BackupError, Result};

const LOCK: &str = ".lock";
const READING: &str = ".reading";
const TEMPORARY: &str = ".tmp";
/// What is in here is all of the database, password hashes included.
pub(crate) const FILE_MODE: u32 = 0o600;
const DIRECTORY_MODE: u32 = 0o700;
/// How often the names in a directory are read again because it changed meanwhile.
const LISTINGS_MAX: usize = 8;
/// In the order in which a segment takes them. It has the next one before it loses the one before.
const FORMS: [SegmentForm; 3] = [
    SegmentForm::Partial,
    SegmentForm::Full,
    SegmentForm::Compressed,
];

/// A repository in a directory. Cheap to clone; holds no open files.
#[derive(Clone, Debug)]
pub struct Repository {
    root: PathBuf,
    descriptor: Descriptor,
    /// Manifests name every chunk and can be large; what is asked for every second is their summary.
    summaries: Arc<Mutex<BTreeMap<BackupId, (SystemTime, Summary)>>>,
    /// Held while a whole segment takes its next form, and while one is removed: what was removed must not come back
    /// compressed.
    forms: Arc<Mutex<()>>,
}

/// Held by the one daemon that writes. Ends with the process, however that ends.
#[derive(Debug)]
pub struct WriterLock {
    _file: File,
}

/// While it is held nothing is removed from the repository. Ends with the process, however that ends.
#[derive(Debug)]
pub struct ReadLock {
    _file: File,
}

/// WAL that no member could give any more.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Gap {
    /// What is missing.
    #[serde(flatten)]
    pub missing: Missing,
    /// When that was found, in milliseconds since 1970.
    pub found_at_ms: u64,
}

impl Repository {
    /// Opens what is there.
    pub fn open(root: &Path) -> Result<Self> {
        let path = root.join(layout::DESCRIPTOR);
        let bytes = fs::read(&path).map_err(|e| {
            if e.kind() == io::ErrorKind::NotFound {
                BackupError::Refused(format!(
                    "{} is not a backup repository (yet): the backup daemon makes it once it has reached the leader",
                    root.display()
                ))
            } else {
                BackupError::io("read", &path)(e)
            }
        })?;
        let descriptor = Descriptor::parse(&bytes).map_err(BackupError::format(&path))?;
        Ok(Self {
            root: root.to_owned(),
            descriptor,
            summaries: Arc::default(),
            forms: Arc::default(),
        })
    }

    /// Opens what is there, or makes a repository for this database cluster.
    pub fn open_or_create(root: &Path, system_id: u64, wal_segment_size: u64) -> Result<Self> {
        if !root.join(layout::DESCRIPTOR).exists() {
            let new = Self {
                root: root.to_owned(),
                descriptor: Descriptor::new(system_id, wal_segment_size),
                summaries: Arc::default(),
                forms: Arc::default(),
            };
            for dir in [layout::BACKUPS, layout::PACKS, layout::WAL] {
                create_dir_synced(&root.join(dir))?;
            }
            new.write(layout::DESCRIPTOR, &new.descriptor.encode())?;
        }
        let repository = Self::open(root)?;
        let known = &repository.descriptor;
        if known.system_id != system_id || known.wal_segment_size != wal_segment_size {
            return Err(BackupError::Refused(format!(
                "{} belongs to database cluster {} (WAL segments of {} bytes), but the leader is {system_id} ({wal_segment_size} bytes); \
                 use another repository, or move this one away",
                root.display(),
                known.system_id,
                known.wal_segment_size,
            )));
        }
        Ok(repository)
    }

    /// Makes this process the only writer.
    pub fn lock(root: &Path) -> Result<WriterLock> {
        create_dir_synced(root)?;
        let path = root.join(LOCK);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(FILE_MODE)
            .open(&path)
            .map_err(BackupError::io("open", &path))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|e| {
            if e == rustix::io::Errno::WOULDBLOCK {
                BackupError::Refused(format!(
                    "another backup daemon already writes to {}",
                    root.display()
                ))
            } else {
                BackupError::io("lock", &path)(e.into())
            }
        })?;
        Ok(WriterLock { _file: file })
    }

    fn reading_file(&self) -> Result<File> {
        let path = self.path(READING);
        let open = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(FILE_MODE)
            .open(&path);
        open.map_err(BackupError::io("open", &path))
    }

    /// Keeps what is there for as long as the lock is held. `None` where this user cannot lock: a copy that is read
    /// only has nobody who removes from it.
    pub fn reading(&self) -> Option<ReadLock> {
        let file = self.reading_file().ok()?;
        flock(&file, FlockOperation::LockShared).ok()?;
        Some(ReadLock { _file: file })
    }

    /// The right to remove; `None` while somebody reads.
    pub(crate) fn removing(&self) -> Result<Option<ReadLock>> {
        let file = self.reading_file()?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(ReadLock { _file: file })),
            Err(e) if e == rustix::io::Errno::WOULDBLOCK => Ok(None),
            Err(e) => Err(BackupError::io("lock", &self.path(READING))(e.into())),
        }
    }

    /// Ends a backup; returns how many bytes are free again, as the others do.
    pub(crate) fn remove_manifest(&self, id: &BackupId) -> Result<u64> {
        let bytes = self.remove(&layout::manifest(id))?;
        sync_dir(&self.path(layout::BACKUPS))?;
        Ok(bytes)
    }

    pub(crate) fn remove_pack(&self, id: PackId) -> Result<u64> {
        self.remove(&layout::pack(id))
    }

    /// Removes a segment in all of its forms.
    pub(crate) fn remove_segment(&self, id: SegmentId) -> Result<u64> {
        let _alone = self.forms.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = 0;
        for form in FORMS {
            bytes += self.remove(&layout::segment(id, form, self.segment_size()))?;
        }
        Ok(bytes)
    }

    fn remove(&self, relative: &str) -> Result<u64> {
        let path = self.path(relative);
        let bytes = fs::metadata(&path).map_or(0, |m| m.len());
        match fs::remove_file(&path) {
            Ok(()) => Ok(bytes),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(e) => Err(BackupError::io("remove", &path)(e)),
        }
    }

    /// Its directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whose it is.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// `wal_segment_size` in bytes.
    pub fn segment_size(&self) -> u64 {
        self.descriptor.wal_segment_size
    }

    pub(crate) fn path(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    /// Writes a file so that it exists whole or not at all, even after a crash.
    pub(crate) fn write(&self, relative: &str, bytes: &[u8]) -> Result<()> {
        write_synced(&self.path(relative), bytes)
    }

    pub(crate) fn read(&self, relative: &str) -> Result<Vec<u8>> {
        let path = self.path(relative);
        fs::read(&path).map_err(BackupError::io("read", &path))
    }

    /// All segments held and their forms; of one in two forms (a crash between two steps) the better.
    pub fn segments(&self) -> Result<BTreeMap<SegmentId, (SegmentForm, u64)>> {
        let mut found = BTreeMap::new();
        for dir in subdirectories(&self.path(layout::WAL))? {
            for name in names(&dir)? {
                let Some((id, listed)) = layout::parse_segment_name(&name, self.segment_size())
                else {
                    continue;
                };
                let Some(held) = self.held(id, listed)? else {
                    continue;
                };
                let best = found.entry(id).or_insert(held);
                *best = (*best).max(held);
            }
        }
        Ok(found)
    }

    /// A segment that was listed in this form, and its length. It may have taken its next form since, under a name that
    /// was not there then; `None` when it was removed.
    fn held(&self, id: SegmentId, listed: SegmentForm) -> Result<Option<(SegmentForm, u64)>> {
        for form in FORMS.into_iter().filter(|f| *f >= listed) {
            let path = self.path(&layout::segment(id, form, self.segment_size()));
            match fs::metadata(&path) {
                Ok(metadata) => return Ok(Some((form, metadata.len()))),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(BackupError::io("read", &path)(e)),
            }
        }
        Ok(None)
    }

    /// What continuity is proved from.
    pub fn inventory(&self) -> Result<Inventory> {
        let size = self.segment_size();
        Ok(self
            .segments()?
            .into_iter()
            .map(|(id, (form, length))| {
                let until = Lsn(id.start(size).0.saturating_add(length.min(size)));
                (
                    id,
                    if form == SegmentForm::Partial {
                        Held::Until(until)
                    } else {
                        Held::Whole
                    },
                )
            })
            .collect())
    }

    /// A whole segment's bytes, checked; `None` when it is not held whole.
    pub fn whole_segment(&self, id: SegmentId) -> Result<Option<Vec<u8>>> {
        let relative = |form| layout::segment(id, form, self.segment_size());
        // It may be compressed between the first look and the second.
        for form in [
            SegmentForm::Compressed,
            SegmentForm::Full,
            SegmentForm::Compressed,
        ] {
            match self.read(&relative(form)) {
                Ok(plain) if form == SegmentForm::Full => return Ok(Some(plain)),
                Ok(stored) => {
                    return segment::decode(id, &stored)
                        .map(Some)
                        .map_err(BackupError::format(&self.path(&relative(form))));
                }
                Err(e) if e.is_not_found() => {}
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }

    /// The beginning of a segment that is still being received, as far as it came.
    pub fn partial_segment(&self, id: SegmentId) -> Result<Option<Vec<u8>>> {
        match self.read(&layout::segment(
            id,
            SegmentForm::Partial,
            self.segment_size(),
        )) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Compresses one whole segment that waits for it; the plain file goes when the other is safe. One that was removed
    /// meanwhile is let go.
    pub(crate) fn compress_segment(&self, id: SegmentId) -> Result<()> {
        let _alone = self.forms.lock().unwrap_or_else(PoisonError::into_inner);
        let plain_name = layout::segment(id, SegmentForm::Full, self.segment_size());
        let path = self.path(&plain_name);
        let plain = match self.read(&plain_name) {
            Ok(plain) => plain,
            Err(e) if e.is_not_found() => return Ok(()),
            Err(e) => return Err(e),
        };
        let received_at_ms = fs::metadata(&path)
            .and_then(|m| m.modified())
            .map_or(0, unix_ms);
        let stored =
            segment::encode(id, received_at_ms, &plain).map_err(BackupError::format(&path))?;
        self.write(
            &layout::segment(id, SegmentForm::Compressed, self.segment_size()),
            &stored,
        )?;
        fs::remove_file(&path).map_err(BackupError::io("remove", &path))
    }

    /// When a segment's last byte was received, in milliseconds since 1970.
    pub fn segment_received_at_ms(&self, id: SegmentId) -> Result<Option<u64>> {
        let compressed = self.path(&layout::segment(
            id,
            SegmentForm::Compressed,
            self.segment_size(),
        ));
        if let Ok(mut file) = File::open(&compressed) {
            let mut header = vec![0; segment::HEADER_BYTES];
            file.read_exact(&mut header)
                .map_err(BackupError::io("read", &compressed))?;
            let header =
                segment::decode_header(&header).map_err(BackupError::format(&compressed))?;
            return Ok(Some(header.received_at_ms));
        }
        let modified = [SegmentForm::Full, SegmentForm::Partial]
            .into_iter()
            .find_map(|form| {
                fs::metadata(self.path(&layout::segment(id, form, self.segment_size())))
                    .and_then(|m| m.modified())
                    .ok()
            });
        Ok(modified.map(unix_ms))
    }

    /// The timelines whose history files are held.
    pub fn timelines(&self) -> Result<Vec<TimelineId>> {
        let dir = self.path(layout::WAL);
        let mut found = Vec::new();
        for entry in read_dir(&dir)? {
            let entry = entry.map_err(BackupError::io("read", &dir))?;
            found.extend(
                entry
                    .file_name()
                    .to_str()
                    .and_then(layout::parse_history_name),
            );
        }
        found.sort();
        Ok(found)
    }

    /// A timeline's history; that of one without ancestors when no file is held.
    pub fn history(&self, timeline: TimelineId) -> Result<History> {
        let relative = layout::history(timeline);
        match self.read(&relative) {
            Ok(bytes) => History::parse(timeline, &String::from_utf8_lossy(&bytes))
                .map_err(BackupError::format(&self.path(&relative))),
            Err(e) if e.is_not_found() => Ok(History::root(timeline)),
            Err(e) => Err(e),
        }
    }

    /// Keeps a timeline's history file. One that names no ancestor only takes a number where it is, and is not kept: some
    /// members have the real one.
    pub(crate) fn put_history(&self, timeline: TimelineId, text: &str) -> Result<()> {
        let relative = layout::history(timeline);
        let parsed =
            History::parse(timeline, text).map_err(BackupError::format(&self.path(&relative)))?;
        if parsed.ancestors.is_empty() {
            return Ok(());
        }
        match self.read(&relative) {
            Ok(held) if held == text.as_bytes() => Ok(()),
            // Earlier versions kept them.
            Ok(_) if self.history(timeline)?.ancestors.is_empty() => {
                self.write(&relative, text.as_bytes())
            }
            Ok(_) => Err(BackupError::Refused(format!(
                "the server's history of timeline {timeline} is another than the one held in {}: two servers took the \
                 same timeline number, or this repository belongs to another past of the cluster; nothing was overwritten",
                self.path(&relative).display()
            ))),
            Err(e) if e.is_not_found() => self.write(&relative, text.as_bytes()),
            Err(e) => Err(e),
        }
    }

    /// The names of all backups, oldest first.
    pub fn backup_ids(&self) -> Result<Vec<BackupId>> {
        let dir = self.path(layout::BACKUPS);
        let mut ids = Vec::new();
        for entry in read_dir(&dir)? {
            let entry = entry.map_err(BackupError::io("read", &dir))?;
            let name = entry.file_name();
            ids.extend(
                name.to_str()
                    .and_then(|n| n.strip_suffix(".json"))
                    .and_then(|n| BackupId::new(n).ok()),
            );
        }
        ids.sort();
        Ok(ids)
    }

    /// A backup's manifest.
    pub fn manifest(&self, id: &BackupId) -> Result<Manifest> {
        let relative = layout::manifest(id);
        let bytes = self.read(&relative).map_err(|e| {
            if e.is_not_found() {
                BackupError::Refused(format!(
                    "there is no backup {id}; `craton backup list` shows all"
                ))
            } else {
                e
            }
        })?;
        Manifest::decode(&bytes).map_err(BackupError::format(&self.path(&relative)))
    }

    /// The summaries of all backups that can be read, oldest first, and what is wrong with the others.
    pub fn summaries(&self) -> Result<(Vec<Summary>, Vec<BackupError>)> {
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        let mut known = self
            .summaries
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let ids = self.backup_ids()?;
        known.retain(|id, _| ids.contains(id));
        for id in ids {
            let path = self.path(&layout::manifest(&id));
            let changed_at = fs::metadata(&path)
                .and_then(|m| m.modified())
                .map_err(BackupError::io("look at", &path));
            let summary = changed_at.and_then(|changed_at| match known.get(&id) {
                Some((at, summary)) if *at == changed_at => Ok(summary.clone()),
                _ => {
                    let summary = self.manifest(&id)?.summary;
                    known.insert(id, (changed_at, summary.clone()));
                    Ok(summary)
                }
            });
            match summary {
                Ok(summary) => good.push(summary),
                // Removed since the names were read.
                Err(error) if error.is_not_found() => {}
                Err(error) => bad.push(error),
            }
        }
        good.sort_by(|a, b| (a.ended_at_ms, &a.id).cmp(&(b.ended_at_ms, &b.id)));
        Ok((good, bad))
    }

    /// All packs.
    pub fn packs(&self) -> Result<Vec<PackId>> {
        let mut found = Vec::new();
        for dir in subdirectories(&self.path(layout::PACKS))? {
            for entry in read_dir(&dir)? {
                let entry = entry.map_err(BackupError::io("read", &dir))?;
                let name = entry.file_name();
                found.extend(
                    name.to_str()
                        .and_then(|n| n.strip_suffix(".pack"))
                        .and_then(|n| n.parse::<PackId>().ok()),
                );
            }
        }
        Ok(found)
    }

    /// A pack's index.
    pub fn pack_index(&self, id: PackId) -> Result<Vec<PackEntry>> {
        let path = self.path(&layout::pack(id));
        let io = |e| BackupError::io("read", &path)(e);
        let mut file = File::open(&path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let cut = || BackupError::format(&path)(craton_repo::FormatError::Truncated("pack"));
        let footer_at = length.checked_sub(FOOTER_BYTES as u64).ok_or_else(cut)?;
        file.seek(SeekFrom::Start(footer_at)).map_err(io)?;
        let mut tail = [0; FOOTER_BYTES];
        file.read_exact(&mut tail).map_err(io)?;
        let footer = pack::parse_footer(&tail).map_err(BackupError::format(&path))?;
        let index_at = footer_at
            .checked_sub(footer.index_bytes as u64)
            .ok_or_else(cut)?;
        file.seek(SeekFrom::Start(index_at)).map_err(io)?;
        let mut index = vec![0; footer.index_bytes];
        file.read_exact(&mut index).map_err(io)?;
        pack::parse_index(&index, footer, Some(id)).map_err(BackupError::format(&path))
    }

    /// Gaps found so far.
    pub fn gaps(&self) -> Result<Vec<Gap>> {
        match self.read(layout::GAPS) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| {
                let source = craton_repo::FormatError::Corrupt {
                    what: "gaps",
                    detail: e.to_string(),
                };
                BackupError::format(&self.path(layout::GAPS))(source)
            }),
            Err(e) if e.is_not_found() => Ok(Vec::new()),
            Err(e) => Err(e),
        }
    }

    pub(crate) fn record_gap(&self, gap: Gap) -> Result<()> {
        let mut gaps = self.gaps()?;
        gaps.push(gap);
        self.write(
            layout::GAPS,
            &serde_json::to_vec_pretty(&gaps).unwrap_or_default(),
        )
    }

    /// The size of everything in it, in bytes.
    pub fn size_bytes(&self) -> Result<u64> {
        let mut total = 0;
        let mut todo = vec![self.root.clone()];
        while let Some(dir) = todo.pop() {
            for entry in read_dir(&dir)? {
                let entry = entry.map_err(BackupError::io("read", &dir))?;
                // Files come and go while this runs.
                let Ok(metadata) = entry.metadata() else {
                    continue;
                };
                if metadata.is_dir() {
                    todo.push(entry.path());
                } else {
                    total += metadata.len();
                }
            }
        }
        Ok(total)
    }
}

/// Reads chunks, keeping the pack read last open: a file's chunks mostly lie one after the other.
#[derive(Debug)]
pub struct ChunkReader<'a> {
    repository: &'a Repository,
    open: Option<(PackId, File)>,
}

impl<'a> ChunkReader<'a> {
    /// A reader of this repository.
    pub fn new(repository: &'a Repository) -> Self {
        Self {
            repository,
            open: None,
        }
    }

    /// A chunk's plain bytes, checked against its name.
    pub fn read(&mut self, pack: PackId, chunk: &ChunkRef) -> Result<Vec<u8>> {
        let path = self.repository.path(&layout::pack(pack));
        if self.open.as_ref().is_none_or(|(id, _)| *id != pack) {
            self.open = Some((
                pack,
                File::open(&path).map_err(BackupError::io("open", &path))?,
            ));
        }
        let Some((_, file)) = &mut self.open else {
            return Err(lost(&path, chunk.id));
        };
        let mut stored = vec![
            0;
            usize::try_from(chunk.stored)
                .unwrap_or(usize::MAX)
                .min(pack::PACK_BYTES_MAX)
        ];
        file.seek(SeekFrom::Start(chunk.offset))
            .and_then(|_| file.read_exact(&mut stored))
            .map_err(BackupError::io("read", &path))?;
        pack::open_chunk(chunk.id, chunk.plain, &stored).map_err(BackupError::format(&path))
    }
}

fn lost(path: &Path, id: ChunkId) -> BackupError {
    let detail = format!("chunk {id} is not there");
    BackupError::format(path)(craton_repo::FormatError::Corrupt {
        what: "pack",
        detail,
    })
}

/// Writes a file so that it exists whole or not at all, even after a crash.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    create_dir_synced(dir)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(TEMPORARY);
    let temporary = dir.join(name);
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(FILE_MODE)
        .open(&temporary)
        .map_err(BackupError::io("create", &temporary))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(BackupError::io("write", &temporary))?;
    fs::rename(&temporary, path).map_err(BackupError::io("rename", &temporary))?;
    sync_dir(dir)
}

/// Creates a directory and its parents so that they survive a crash.
pub(crate) fn create_dir_synced(dir: &Path) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(DIRECTORY_MODE)
        .create(dir)
        .map_err(BackupError::io("create", dir))?;
    dir.parent().map_or(Ok(()), sync_dir)
}

/// Makes renames in a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(BackupError::io("sync", dir))
}

fn read_dir(dir: &Path) -> Result<Box<dyn Iterator<Item = io::Result<fs::DirEntry>>>> {
    match fs::read_dir(dir) {
        Ok(entries) => Ok(Box::new(entries)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Box::new(std::iter::empty())),
        Err(e) => Err(BackupError::io("read", dir)(e)),
    }
}

/// The names in a directory. What is renamed while a large directory is read may come up under neither name, so it is
/// read again when it has changed meanwhile.
fn names(dir: &Path) -> Result<BTreeSet<String>> {
    let changed = || match fs::metadata(dir).and_then(|m| m.modified()) {
        Ok(at) => Ok(Some(at)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(BackupError::io("read", dir)(e)),
    };
    let mut found = BTreeSet::new();
    for _ in 0..LISTINGS_MAX {
        let before = changed()?;
        for entry in read_dir(dir)? {
            let entry = entry.map_err(BackupError::io("read", dir))?;
            found.extend(entry.file_name().into_string());
        }
        if changed()? == before {
            break;
        }
    }
    Ok(found)
}

fn subdirectories(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in read_dir(dir)? {
        let entry = entry.map_err(BackupError::io("read", dir))?;
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Milliseconds since 1970; zero for times before.
pub(crate) fn unix_ms(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// Now, in milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    unix_ms(SystemTime::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;
    const ID: SegmentId = SegmentId {
        timeline: TimelineId(1),
        number: 1,
    };

    fn with_a_whole_segment(dir: &Path) -> Repository {
        let repository = Repository::open_or_create(dir, 7, SIZE).unwrap();
        let plain = vec![5; usize::try_from(SIZE).unwrap()];
        let name = layout::segment(ID, SegmentForm::Full, SIZE);
        repository.write(&name, &plain).unwrap();
        repository
    }

    #[test]
    fn a_segment_that_changed_its_form_since_it_was_listed_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let repository = with_a_whole_segment(dir.path());
        let held = |listed| repository.held(ID, listed).unwrap();
        assert_eq!(
            held(SegmentForm::Partial),
            Some((SegmentForm::Full, SIZE)),
            "received whole"
        );
        repository.compress_segment(ID).unwrap();
        for listed in FORMS {
            let (form, _) = held(listed).unwrap();
            assert_eq!(form, SegmentForm::Compressed, "listed as {listed:?}");
        }
        repository.remove_segment(ID).unwrap();
        assert_eq!(held(SegmentForm::Partial), None, "removed");
    }

    #[test]
    fn what_is_removed_while_it_waits_for_compression_does_not_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let repository = with_a_whole_segment(dir.path());
        let sweeps = repository.forms.lock().unwrap();
        let other = repository.clone();
        let compression = std::thread::spawn(move || other.compress_segment(ID));
        // Long enough to be done with it, if it did not wait: that it does nothing has no other sign.
        std::thread::sleep(std::time::Duration::from_millis(100));
        for form in FORMS {
            let name = layout::segment(ID, form, SIZE);
            repository.remove(&name).unwrap();
        }
        drop(sweeps);
        compression.join().unwrap().unwrap();
        assert!(repository.segments().unwrap().is_empty());
    }
}
