//! What the agent must not forget: its data directory's incarnation and its floor.
//!
//! One small file, replaced atomically and flushed before anything is done that rests on it.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use craton_core::slots::Notes;
use craton_core::{Incarnation, Term};
use serde::{Deserialize, Serialize};

/// The file's contents.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct MemberState {
    /// Format version; 1.
    pub version: u32,
    /// The life of the data directory.
    pub incarnation: Option<Incarnation>,
    /// Nothing below this term may reach the data directory.
    pub floor: Term,
    /// The longest standby promise that may have been given and not run out, milliseconds; 0 for none. A member
    /// whose agent restarts seals for nobody before that long has passed.
    #[serde(default)]
    pub promised_ms: u64,
    /// Copies of logical slots.
    #[serde(default)]
    pub slots: Notes,
}

/// The file, as the agent's loop and its tasks share it: what is known is read without waiting for what is
/// being written, and writes happen on a thread that may wait for a disk.
#[derive(Clone, Debug)]
pub struct StateKeeper {
    file: Arc<Mutex<StateFile>>,
    known: Arc<Mutex<MemberState>>,
}

impl StateKeeper {
    /// Wraps the opened file.
    pub fn new(file: StateFile) -> Self {
        Self {
            known: Arc::new(Mutex::new(file.get().clone())),
            file: Arc::new(Mutex::new(file)),
        }
    }

    /// What is on disk.
    pub fn get(&self) -> MemberState {
        lock(&self.known).clone()
    }

    /// Changes the file; durable when it returns.
    pub async fn change(
        &self,
        change: impl FnOnce(&mut StateFile) -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let this = self.clone();
        let work = move || {
            let mut file = lock(&this.file);
            change(&mut file)?;
            lock(&this.known).clone_from(file.get());
            Ok(())
        };
        tokio::task::spawn_blocking(work)
            .await
            .unwrap_or_else(|e| Err(io::Error::other(e)))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The file.
#[derive(Debug)]
pub struct StateFile {
    path: PathBuf,
    now: MemberState,
}

impl StateFile {
    /// Reads `agent.json` in the member's directory, or starts anew where there is none.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let path = dir.join("agent.json");
        let now = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!(
                        "{} cannot be read ({e}); it holds what this member promised: restore it, or move the whole member directory away to have the member cloned anew",
                        path.display()
                    ),
                )
            })?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => MemberState { version: 1, ..MemberState::default() },
            Err(e) => return Err(e),
        };
        Ok(Self { path, now })
    }

    /// The present state.
    pub fn get(&self) -> &MemberState {
        &self.now
    }

    /// Replaces the state; durable when it returns.
    pub fn set(&mut self, next: MemberState) -> io::Result<()> {
        if next == self.now {
            return Ok(());
        }
        let bytes = serde_json::to_vec_pretty(&next)?;
        let tmp = self.path.with_extension("json.tmp");
        let mut file = File::create(&tmp)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&tmp, &self.path)?;
        if let Some(dir) = self.path.parent() {
            File::open(dir)?.sync_all()?;
        }
        self.now = next;
        Ok(())
    }

    /// For the first member of a new cluster: what was promised in another one's terms does not count.
    pub fn forget_floor(&mut self) -> io::Result<()> {
        self.set(MemberState {
            floor: Term(0),
            ..self.get().clone()
        })
    }

    /// Raises the floor; never lowers it.
    pub fn raise_floor(&mut self, term: Term) -> io::Result<()> {
        if term <= self.now.floor {
            return Ok(());
        }
        self.set(MemberState {
            floor: term,
            ..self.now.clone()
        })
    }

    /// As [`Self::raise_floor`], before WAL comes from the leader of that term.
    pub fn follow(&mut self, term: Term) -> io::Result<()> {
        self.set(MemberState {
            floor: self.now.floor.max(term),
            slots: self.now.slots.following(term),
            ..self.now.clone()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_floor_survives_and_never_sinks() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = StateFile::open(dir.path()).unwrap();
        file.raise_floor(Term(7)).unwrap();
        file.raise_floor(Term(3)).unwrap();
        assert_eq!(StateFile::open(dir.path()).unwrap().get().floor, Term(7));
    }

    #[test]
    fn a_file_of_an_earlier_version_has_promised_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let old = r#"{"version":1,"incarnation":"00000000000000aa","floor":3}"#;
        fs::write(dir.path().join("agent.json"), old).unwrap();
        let file = StateFile::open(dir.path()).unwrap();
        assert_eq!((file.get().floor, file.get().promised_ms), (Term(3), 0));
    }

    #[test]
    fn who_follows_a_leader_knows_nothing_of_its_copies() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = StateFile::open(dir.path()).unwrap();
        file.follow(Term(7)).unwrap();
        file.follow(Term(3)).unwrap();
        let read = StateFile::open(dir.path()).unwrap();
        assert_eq!(read.get().floor, Term(7));
        assert_eq!(read.get().slots.followed, Term(7));
    }

    #[test]
    fn a_broken_file_is_not_taken_for_a_new_member() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("agent.json"), "{").unwrap();
        let error = StateFile::open(dir.path()).unwrap_err();
        assert!(
            error.to_string().contains("what this member promised"),
            "{error}"
        );
    }
}
