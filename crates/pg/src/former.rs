//! The copy that was here, while another is made: `data.former`.
//!
//! A member whose slot is lost is cloned anew, and so may be all standbys at once. Until its clone is complete, what a
//! member had stays on its disk where there is room for both: if the leader's disk dies meanwhile, it is all there is.

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

    /// Makes room under the data directory's name, and keeps what was there until [`Self::retire_former`], where the
    /// file system has room for another of the kind. Returns where it is, if it was kept. Refused while PostgreSQL runs.
    pub async fn set_aside_data_dir(&self) -> Result<Option<PathBuf>> {
        let this = self.clone();
        let keep = blocking(move || {
            // Their directories are outside, and the clone needs them.
            let tablespaces = this.data_dir().join("pg_tblspc");
            if !files::is_empty_dir(&tablespaces)? || this.rewind_marker().exists() {
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
        self.refuse_while_running().await?;
        let this = self.clone();
        blocking(move || {
            let former = this.former_dir();
            files::remove_tree(&former)?;
            files::rename_durably(this.data_dir(), &former)?;
            Ok(Some(former))
        })
        .await
    }

    /// Puts the former copy away once there is another that PostgreSQL runs on: out of the way at once, from the disk
    /// in the background. True if there was one. What an agent that was killed had not removed yet goes as well.
    pub async fn retire_former(&self) -> Result<bool> {
        let this = self.clone();
        blocking(move || {
            let (former, doomed) = (this.former_dir(), this.member_dir().join("data.former.old"));
            let there = former.exists();
            if there {
                // The one before is on its way out, or was when its agent was killed.
                this.remove_doomed(&doomed)?;
                files::rename_durably(&former, &doomed)?;
            } else if !doomed.exists() {
                return Ok(false);
            }
            std::thread::spawn(move || {
                if let Err(error) = this.remove_doomed(&doomed) {
                    tracing::warn!(%error, "what was here before the clone takes room still");
                }
            });
            Ok(there)
        })
        .await
    }

    /// One removal at a time: two would stumble over each other's files.
    fn remove_doomed(&self, doomed: &Path) -> Result<()> {
        let _one = self.removal();
        files::remove_tree(doomed)
    }

    /// Deletes the former copy, if there is one, and is done when its room is free. True if there was.
    pub async fn discard_former(&self) -> Result<bool> {
        let former = self.former_dir();
        blocking(move || {
            let there = former.exists();
            files::remove_tree(&former)?;
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
