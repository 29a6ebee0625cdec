//! The copy that was here, while another is made: `data.former`.
//!
//! A member whose slot is lost is cloned anew, and so may be all standbys at once. Until its clone is complete, what a
//! member had stays on its disk where there is room for both: if the leader's disk dies meanwhile, it is all there is.

use std::fs;
use std::path::{Path, PathBuf};

use crate::data_dir::DataDir;
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

    /// Makes room under the data directory's name, and keeps what was there until [`Self::discard_former`], where the
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

    /// At an agent's start: a former copy that was left beside a whole one goes, in the background.
    pub async fn remove_late_former(&self) -> Result<()> {
        if !matches!(self.data_dir_state().await?, DataDir::Cluster { .. }) {
            return Ok(());
        }
        let this = self.clone();
        // Under another name at once: the next clone may keep what is here now.
        let doomed = blocking(move || {
            let (former, doomed) = (this.former_dir(), this.member_dir().join("data.former.old"));
            if former.exists() && !doomed.exists() {
                files::rename_durably(&former, &doomed)?;
            }
            Ok(doomed)
        })
        .await?;
        std::thread::spawn(move || files::remove_tree(&doomed));
        Ok(())
    }

    /// Deletes the former copy, if there is one. True if there was.
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
