//! WAL that the cluster does not have: kept aside, with a summary, before a rewind throws it away.

mod names;
mod summary;

use std::collections::BTreeMap;
use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use craton_core::{Lsn, TimelineId};

use crate::disk;
use crate::error::{PgError, Result};
use crate::files::{self, blocking};
use crate::history::parse_segment_name;
use crate::instance::{Instance, segment_of};

pub use summary::{DivergenceSummary, DivergentTransaction, RowChanges};

/// Names of relations by their `tablespace/database/filenode`.
pub type RelationNames = BTreeMap<String, String>;

impl Instance {
    /// Where divergent WAL is kept.
    pub fn divergence_dir(&self) -> PathBuf {
        self.member_dir().join("divergence")
    }

    /// Copies the WAL of `timeline` from the segment of `from` to its end, durably, and summarises what it did.
    /// The server must be down. `id` names the directory; kept again under the same id, it is replaced. `names`
    /// are those of relations as this server knew them, as far as it could be asked.
    pub async fn keep_divergent_wal(
        &self,
        id: &str,
        timeline: TimelineId,
        from: Lsn,
        names: RelationNames,
    ) -> Result<DivergenceSummary> {
        let fits = !id.is_empty()
            && id.len() <= 100
            && id
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if !fits {
            return Err(PgError::Invalid {
                what: "divergence id",
                reason: format!("{id:?}"),
            });
        }
        let (this, id) = (self.clone(), id.to_owned());
        blocking(move || this.keep_blocking(&id, timeline, from, &names)).await
    }

    fn keep_blocking(
        &self,
        id: &str,
        timeline: TimelineId,
        from: Lsn,
        names: &RelationNames,
    ) -> Result<DivergenceSummary> {
        let control = self.read_control_data()?;
        let root = self.divergence_dir();
        files::private_dir(&root)?;
        let mut summary = DivergenceSummary {
            id: id.to_owned(),
            timeline,
            from,
            last_record: from,
            kept_at_ms: now_ms(),
            ..Default::default()
        };
        self.summarise(&self.wal_dir(), &mut summary)?;
        // What lies beyond the end was made for WAL to come; the page headers in a record are less than a segment.
        let last = if summary.truncated || summary.records == 0 {
            u64::MAX
        } else {
            segment_of(summary.end, control.segment_size).saturating_add(1)
        };
        // Not part of what is written down.
        summary.end = Lsn::ZERO;
        let segments = self.segments_between(timeline, (from, last), control.segment_size)?;
        let bytes = segments.iter().map(|(_, size)| size).sum::<u64>();
        (summary.segments, summary.bytes) = (segments.len() as u64, bytes);
        let available = disk::space(&root)?.available;
        if available < bytes {
            return Err(PgError::DiskFull {
                path: root,
                needed: bytes,
                available,
            });
        }
        let making = root.join(format!("{id}.new"));
        files::remove_tree(&making)?;
        files::private_dir(&making)?;
        for (source, _) in &segments {
            copy_durably(source, &making)?;
        }
        let history = self.wal_dir().join(format!("{:08X}.history", timeline.0));
        if history.exists() {
            copy_durably(&history, &making)?;
        }
        summary.name_relations(names);
        let json = serde_json::to_vec_pretty(&summary).map_err(|e| PgError::Unintelligible {
            what: "divergence summary",
            detail: e.to_string(),
        })?;
        files::write_durably(&making.join("summary.json"), &json)?;
        let kept = root.join(id);
        files::remove_tree(&kept)?;
        files::rename_durably(&making, &kept)?;
        Ok(summary)
    }

    /// The segments of a timeline from a position on, up to one of that number, with their sizes, in order.
    fn segments_between(
        &self,
        timeline: TimelineId,
        (from, last): (Lsn, u64),
        segment_size: u64,
    ) -> Result<Vec<(PathBuf, u64)>> {
        let wal_dir = self.wal_dir();
        let first = segment_of(from, segment_size);
        let mut found = Vec::new();
        for entry in fs::read_dir(&wal_dir)
            .map_err(PgError::io("cannot list", &wal_dir))?
            .flatten()
        {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let Some((of, number)) = parse_segment_name(name, segment_size) else {
                continue;
            };
            if of == timeline && (first..=last).contains(&number) {
                let size = entry
                    .metadata()
                    .map_err(PgError::io("cannot look at", &entry.path()))?
                    .len();
                found.push((entry.path(), size));
            }
        }
        found.sort();
        Ok(found)
    }

    /// Lets pg_waldump read them. It ends with an error where the WAL ends; that is its way.
    fn summarise(&self, dir: &Path, summary: &mut DivergenceSummary) -> Result<()> {
        let mut child = self
            .tool("pg_waldump")
            .arg("-p")
            .arg(dir)
            .args([
                "-t",
                &summary.timeline.to_string(),
                "-s",
                &summary.from.to_string(),
            ])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(PgError::io("cannot run", Path::new("pg_waldump")))?;
        if let Some(stdout) = child.stdout.take() {
            summary::read_records(BufReader::new(stdout), summary);
        }
        // Ended by its end of WAL, or here when a bound was reached.
        let _ = child.kill();
        child
            .wait()
            .map(|_| ())
            .map_err(PgError::io("cannot wait for", Path::new("pg_waldump")))
    }

    /// What was kept so far, by id.
    pub async fn divergences(&self) -> Result<Vec<DivergenceSummary>> {
        let root = self.divergence_dir();
        blocking(move || {
            let Ok(entries) = fs::read_dir(&root) else {
                return Ok(Vec::new());
            };
            let mut all = Vec::new();
            for entry in entries.flatten() {
                let Some(text) = files::read_text(&entry.path().join("summary.json"))? else {
                    continue;
                };
                // An unreadable summary must not hide the others.
                if let Ok(summary) = serde_json::from_str::<DivergenceSummary>(&text) {
                    all.push(summary);
                }
            }
            all.sort_by(|a, b| (a.kept_at_ms, &a.id).cmp(&(b.kept_at_ms, &b.id)));
            Ok(all)
        })
        .await
    }
}

/// The wall clock, for people.
fn now_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

fn copy_durably(source: &Path, directory: &Path) -> Result<()> {
    let Some(name) = source.file_name() else {
        return Ok(());
    };
    let target = directory.join(name);
    fs::copy(source, &target).map_err(PgError::io("cannot copy", source))?;
    fs::File::open(&target)
        .and_then(|f| f.sync_all())
        .map_err(PgError::io("cannot flush", &target))
}
