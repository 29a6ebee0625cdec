//! The file on disk, and the one thread that writes it.
//!
//! Everything that waits in the queue is written and synced together (group commit). A rewrite (after a
//! snapshot, or when the file has grown) goes to a new file: write, sync, rename, sync the directory.
//! After a failed write or sync nothing more is written, ever: the kernel may have dropped the pages and a
//! second sync would claim success (PostgreSQL learned that in 2018).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread::JoinHandle;

use tokio::sync::{oneshot, watch};

use super::format::{Contents, Decoded, LeaseState, Record, decode, encode_record};
use super::stats::Stats;
use crate::clock::Clock;
use crate::raft::{HardState, Standing, Write};

/// Jobs that may wait for the disk. Raft bounds its own writes far below this.
const QUEUE_MAX: usize = 8192;

/// Jobs that are synced together.
const GROUP_MAX: usize = 512;

/// The file is rewritten when it has grown to this, in bytes.
const REWRITE_LEN: u64 = 8 * 1024 * 1024;

/// The file's name in the coordinator's directory.
pub const LOG_FILE: &str = "raft.log";
const LOG: &str = LOG_FILE;
const LOG_NEW: &str = "raft.log.new";
const CORRUPT_PREFIX: &str = "raft.log.corrupt-";

/// Why the store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file system said no.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process has it.
    #[error("{} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// A later version wrote it.
    #[error("{} was written by a later version (format {version}); run that version", path.display())]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its format.
        version: u32,
    },
    /// The contents cannot be written.
    #[error("cannot encode the coordinator's state: {0}")]
    Encode(String),
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io { what, path, source }
}

/// The open file. It is locked for as long as this lives.
pub(super) struct Store {
    dir: PathBuf,
    file: File,
    len: u64,
    contents: Contents,
    _lock: File,
    faults: Faults,
}

/// For tests: a disk that stalls or fails.
#[derive(Clone, Default)]
pub(super) struct Faults {
    #[cfg(test)]
    pub(super) stalled: Arc<std::sync::atomic::AtomicBool>,
    #[cfg(test)]
    pub(super) failing: Arc<std::sync::atomic::AtomicBool>,
}

impl Faults {
    #[cfg(not(test))]
    #[allow(clippy::unused_self, clippy::unnecessary_wraps)]
    fn meet(&self) -> io::Result<()> {
        Ok(())
    }

    #[cfg(test)]
    fn meet(&self) -> io::Result<()> {
        use std::sync::atomic::Ordering::SeqCst;
        while self.stalled.load(SeqCst) {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        if self.failing.load(SeqCst) {
            Err(io::Error::other("injected"))
        } else {
            Ok(())
        }
    }
}

impl Store {
    /// Opens or creates. `birth` is used if the disk turns out to be new, or its contents lost.
    pub(super) fn open(dir: &Path, birth: u64, faults: Faults) -> Result<Self, OpenError> {
        fs::create_dir_all(dir).map_err(io_error("cannot create", dir))?;
        let lock = lock(dir)?;
        let path = dir.join(LOG);
        let new = dir.join(LOG_NEW);
        match fs::remove_file(&new) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("cannot remove", &new)(e));
            }
            _ => {}
        }
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let standing = if has_corrupt(dir)? {
                    Standing::Recovering
                } else {
                    Standing::Fresh
                };
                return Self::create(dir, birth, standing, lock, faults);
            }
            Err(e) => return Err(io_error("cannot read", &path)(e)),
        };
        match decode(&bytes) {
            Decoded::Good { contents, good_len } => {
                Self::reuse(dir, *contents, bytes.len(), good_len, lock, faults)
            }
            Decoded::TooNew { version } => Err(OpenError::TooNew { path, version }),
            Decoded::Corrupt { at, why } => {
                let aside = dir.join(format!("{CORRUPT_PREFIX}{birth:016x}"));
                tracing::error!(
                    file = %path.display(), at, why, aside = %aside.display(),
                    "the coordinator's log is damaged; it is put aside, and this voter has no say until the others readmit it"
                );
                fs::rename(&path, &aside).map_err(io_error("cannot put aside", &path))?;
                Self::create(dir, birth, Standing::Recovering, lock, faults)
            }
        }
    }

    fn create(
        dir: &Path,
        birth: u64,
        standing: Standing,
        lock: File,
        faults: Faults,
    ) -> Result<Self, OpenError> {
        let mut contents = Contents::default();
        contents.raft.hard = HardState {
            birth,
            standing,
            ..HardState::default()
        };
        let (file, len) = replace(dir, &contents)?;
        Ok(Self {
            dir: dir.to_owned(),
            file,
            len,
            contents,
            _lock: lock,
            faults,
        })
    }

    fn reuse(
        dir: &Path,
        contents: Contents,
        len: usize,
        good_len: usize,
        lock: File,
        faults: Faults,
    ) -> Result<Self, OpenError> {
        if good_len < len {
            tracing::warn!(
                file = %dir.join(LOG).display(), bytes = len - good_len,
                "the coordinator's log ended in a torn record, which was never acknowledged; it is cut"
            );
        }
        // Always rewritten: it is small, and the cut, the sync and the check that writing works are one.
        let (file, len) = replace(dir, &contents)?;
        Ok(Self {
            dir: dir.to_owned(),
            file,
            len,
            contents,
            _lock: lock,
            faults,
        })
    }

    pub(super) fn contents(&self) -> &Contents {
        &self.contents
    }

    /// Puts other contents in place of all of them.
    pub(super) fn rewrite(&mut self, contents: Contents) -> Result<(), OpenError> {
        (self.file, self.len) = replace(&self.dir, &contents)?;
        self.contents = contents;
        Ok(())
    }

    fn commit(&mut self, records: Vec<Record>) -> Result<(), OpenError> {
        let path = self.dir.join(LOG);
        let snapshot = records.iter().any(|r| matches!(r, Record::Snapshot(_)));
        let mut bytes = Vec::new();
        for record in records {
            if !snapshot {
                encode_record(&record, &mut bytes).map_err(OpenError::Encode)?;
            }
            self.contents.apply(record).map_err(OpenError::Encode)?;
        }
        self.faults
            .meet()
            .map_err(io_error("cannot write", &path))?;
        if snapshot || self.len > REWRITE_LEN {
            (self.file, self.len) = replace(&self.dir, &self.contents)?;
            return Ok(());
        }
        self.file
            .write_all(&bytes)
            .map_err(io_error("cannot write", &path))?;
        self.file
            .sync_data()
            .map_err(io_error("cannot sync", &path))?;
        self.len += bytes.len() as u64;
        Ok(())
    }
}

fn lock(dir: &Path) -> Result<File, OpenError> {
    let path = dir.join("lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(io_error("cannot open", &path))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::InUse(dir.to_owned())),
        Err(e) => Err(io_error("cannot lock", &path)(e.into())),
    }
}

fn has_corrupt(dir: &Path) -> Result<bool, OpenError> {
    for entry in fs::read_dir(dir).map_err(io_error("cannot list", dir))? {
        let entry = entry.map_err(io_error("cannot list", dir))?;
        if entry
            .file_name()
            .to_string_lossy()
            .starts_with(CORRUPT_PREFIX)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Puts a new file in place of the old one; the new one is open for appending.
fn replace(dir: &Path, contents: &Contents) -> Result<(File, u64), OpenError> {
    let bytes = contents.encode().map_err(OpenError::Encode)?;
    let (new, path) = (dir.join(LOG_NEW), dir.join(LOG));
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .map_err(io_error("cannot create", &new))?;
    file.write_all(&bytes)
        .map_err(io_error("cannot write", &new))?;
    file.sync_all().map_err(io_error("cannot sync", &new))?;
    fs::rename(&new, &path).map_err(io_error("cannot put in place", &path))?;
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(io_error("cannot sync", dir))?;
    Ok((file, bytes.len() as u64))
}

enum Job {
    Raft {
        token: u64,
        write: Write,
    },
    Lease {
        state: LeaseState,
        done: oneshot::Sender<()>,
    },
    Stop,
}

/// Hands work to the disk thread, and never waits for it.
#[derive(Clone)]
pub(super) struct Disk {
    jobs: SyncSender<Job>,
    /// Everything up to this token is on disk.
    pub(super) persisted: watch::Receiver<u64>,
    /// Why nothing is written any more.
    pub(super) failed: watch::Receiver<Option<String>>,
}

impl Disk {
    /// Starts the thread. It ends when all handles are gone.
    pub(super) fn start(
        store: Store,
        clock: Clock,
        stats: Arc<Stats>,
    ) -> io::Result<(Self, JoinHandle<()>)> {
        let (jobs, queue) = sync_channel(QUEUE_MAX);
        let (persisted_tx, persisted) = watch::channel(0);
        let (failed_tx, failed) = watch::channel(None);
        let thread = std::thread::Builder::new()
            .name("coordinator-disk".to_owned())
            .spawn(move || work(store, &queue, clock, &stats, &persisted_tx, &failed_tx))?;
        Ok((
            Self {
                jobs,
                persisted,
                failed,
            },
            thread,
        ))
    }

    /// Queues a Raft write. False when the disk is gone or hopelessly behind.
    pub(super) fn write(&self, token: u64, write: Write) -> bool {
        self.jobs.try_send(Job::Raft { token, write }).is_ok()
    }

    /// Asks the thread to end once all that is queued is on disk.
    pub(super) fn close(&self) {
        // A full queue means a disk that is stuck: the thread ends with the process.
        let _ = self.jobs.try_send(Job::Stop);
    }

    /// Queues a lease note; the receiver resolves once it is on disk, and fails if it never will be.
    pub(super) fn note(&self, state: LeaseState) -> oneshot::Receiver<()> {
        let (done, on_disk) = oneshot::channel();
        match self.jobs.try_send(Job::Lease { state, done }) {
            // The sender is dropped with the job: the receiver fails.
            Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => on_disk,
        }
    }
}

fn work(
    mut store: Store,
    queue: &Receiver<Job>,
    clock: Clock,
    stats: &Stats,
    persisted: &watch::Sender<u64>,
    failed: &watch::Sender<Option<String>>,
) {
    while let Ok(first) = queue.recv() {
        let mut group = vec![first];
        while group.len() < GROUP_MAX {
            match queue.try_recv() {
                Ok(job) => group.push(job),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
            }
        }
        let (mut records, mut token, mut notes) = (Vec::new(), None, Vec::new());
        let mut stop = false;
        for job in group {
            match job {
                Job::Raft { token: t, write } => {
                    token = Some(t);
                    records.push(Record::from(write));
                }
                Job::Lease { state, done } => {
                    records.push(Record::Lease(state));
                    notes.push(done);
                }
                Job::Stop => stop = true,
            }
        }
        let began = clock.now();
        if let Err(e) = store.commit(records) {
            tracing::error!(error = %e, "the coordinator's disk failed; this voter takes no further part until it is restarted");
            failed.send_replace(Some(e.to_string()));
            return;
        }
        stats.synced(clock.now().since(began));
        if let Some(token) = token {
            persisted.send_replace(token);
        }
        for done in notes {
            // Nobody may be waiting any more.
            let _ = done.send(());
        }
        if stop {
            return;
        }
    }
}
