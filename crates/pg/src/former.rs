//! The copy that was here, while another is made: `data.former`.
//!
//! A member whose slot is lost is cloned anew, and so may be all standbys at once. Until its clone streams from a leader,
//! what a member had stays on its disk where there is room for both: if the leader's disk dies meanwhile, it is all there
//! is.
//!
//! So while there is a former copy, the data directory is one that has proven nothing yet. If it is to be cloned once
//! more, it goes, and the former copy stays.

use std::fs;
use std::path::{Path, PathBuf};

use crate::disk;
use crate::error::Result;
use crate::files::{self, blocking};
use crate::instance::Instance;

/// What a clone may need beyond the size of the former copy: the leader has grown meanwhile. A part of it.
const GROWTH: u64 = 4;

impl Instance {
    /// The directory of the former copy.
    pub fn former_dir(&self) -> PathBuf {
        self.member_dir().join("data.former")
    }

    /// On its way out.
    fn doomed_dir(&self) -> PathBuf {
        self.member_dir().join("data.former.old")
    }

    /// Makes room under the data directory's name, and keeps what was there until [`Self::retire_former`], where the
    /// file system has room for another of the kind. Returns where it is, if it was kept. Refused while PostgreSQL runs.
    pub async fn set_aside_data_dir(&self) -> Result<Option<PathBuf>> {
        self.refuse_while_running().await?;
        let this = self.clone();
        let keep = blocking(move || {
            let _one = this.removal();
            files::remove_tree(&this.doomed_dir())?;
            // Their directories are outside, and the clone needs them.
            let tablespaces = this.data_dir().join("pg_tblspc");
            if this.former_dir().exists()
                || !files::is_empty_dir(&tablespaces)?
                || this.rewind_marker().exists()
            {
                return Ok(false);
            }
            let needed = tree_bytes(this.data_dir());
            let free = disk::space(this.member_dir())?.available;
            Ok(free >= needed + needed / GROWTH)
        })
        .await?;
        if !keep {
            self.discard_data_dir().await?;
            return Ok(None);
        }
        let this = self.clone();
        blocking(move || {
            let _one = this.removal();
            let former = this.former_dir();
            files::rename_durably(this.data_dir(), &former)?;
            Ok(Some(former))
        })
        .await
    }

    /// Puts the former copy away, once PostgreSQL runs here and there is nothing in the former that another would miss:
    /// out of the way at once, from the disk in the background. True if there was one. What an agent that was killed had
    /// not removed yet goes as well.
    pub async fn retire_former(&self) -> Result<bool> {
        let this = self.clone();
        blocking(move || {
            let one = this.removal();
            // Said a moment ago, and by now what runs may have become the former one itself.
            if !this.data_dir().join("postmaster.pid").exists() {
                return Ok(false);
            }
            let (former, doomed) = (this.former_dir(), this.doomed_dir());
            let there = former.exists();
            if !there && !doomed.exists() {
                return Ok(false);
            }
            if there {
                files::remove_tree(&doomed)?;
                files::rename_durably(&former, &doomed)?;
            }
            drop(one);
            std::thread::spawn(move || {
                let _one = this.removal();
                if let Err(error) = files::remove_tree(&doomed) {
                    tracing::warn!(%error, "what was here before the clone takes room still");
                }
            });
            Ok(there)
        })
        .await
    }

    /// Deletes the former copy, if there is one, and is done when its room is free. True if there was.
    pub async fn discard_former(&self) -> Result<bool> {
        let this = self.clone();
        blocking(move || {
            let _one = this.removal();
            let former = this.former_dir();
            let there = former.exists();
            files::remove_tree(&former)?;
            files::remove_tree(&this.doomed_dir())?;
            Ok(there)
        })
        .await
    }
}

/// What the files of a directory take, without following links. What cannot be read counts for nothing.
fn tree_bytes(dir: &Path) -> u64 {
    let mut bytes = 0;
    let mut left = vec![dir.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(m) if m.is_dir() => left.push(entry.path()),
                Ok(m) => bytes += m.len(),
                Err(_) => {}
            }
        }
    }
    bytes
}
