//! WAL that the cluster does not have: kept aside, with a summary, before a rewind throws it away.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use craton_core::{Lsn, TimelineId};
use serde::{Deserialize, Serialize};

use crate::disk;
use crate::error::{PgError, Result};
use crate::files::{self, blocking};
use crate::history::parse_segment_name;
use crate::instance::{Instance, segment_of};

/// At most this many WAL records are read for a summary.
const RECORDS_MAX: u64 = 5_000_000;
/// At most this many relations are listed in it.
const RELATIONS_MAX: usize = 1000;
/// A line of pg_waldump is cut here, in bytes.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// What the WAL after the fork did. Kept as `summary.json` beside the segments.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DivergenceSummary {
    /// The directory's name under `divergence/`.
    pub id: String,
    /// The timeline of the WAL.
    pub timeline: TimelineId,
    /// Where the cluster went another way.
    pub from: Lsn,
    /// Where the last readable record begins; `from` if there is none.
    pub last_record: Lsn,
    /// Kept segments.
    pub segments: u64,
    /// Their size in bytes.
    pub bytes: u64,
    /// Records after the fork.
    pub records: u64,
    /// Transactions committed after the fork, on this server.
    pub commits: u64,
    /// Transactions rolled back after the fork.
    pub aborts: u64,
    /// When the first was committed, in PostgreSQL's words.
    pub first_commit: Option<String>,
    /// When the last was committed.
    pub last_commit: Option<String>,
    /// Records per relation, named `tablespace/database/filenode`.
    pub relations: BTreeMap<String, u64>,
    /// True if a bound cut the summary short; the segments are complete all the same.
    pub truncated: bool,
}

impl Instance {
    /// Where divergent WAL is kept.
    pub fn divergence_dir(&self) -> PathBuf {
        self.member_dir().join("divergence")
    }

    /// Copies the WAL of `timeline` from the segment of `from` on, durably, and summarises what it did.
    /// The server must be down. `id` names the directory; kept again under the same id, it is replaced.
    pub async fn keep_divergent_wal(
        &self,
        id: &str,
        timeline: TimelineId,
        from: Lsn,
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
        blocking(move || this.keep_blocking(&id, timeline, from)).await
    }

    fn keep_blocking(
        &self,
        id: &str,
        timeline: TimelineId,
        from: Lsn,
    ) -> Result<DivergenceSummary> {
        let control = self.read_control_data()?;
        let segments = self.segments_from(timeline, from, control.segment_size)?;
        let bytes = segments.iter().map(|(_, size)| size).sum::<u64>();
        let root = self.divergence_dir();
        files::private_dir(&root)?;
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
        let mut summary = DivergenceSummary {
            id: id.to_owned(),
            timeline,
            from,
            last_record: from,
            segments: segments.len() as u64,
            bytes,
            ..Default::default()
        };
        if !segments.is_empty() {
            self.summarise(&making, &mut summary)?;
        }
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

    /// The segments of a timeline from a position on, with their sizes, in order.
    fn segments_from(
        &self,
        timeline: TimelineId,
        from: Lsn,
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
            if of == timeline && number >= first {
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

    /// Lets pg_waldump read the copies. It ends with an error where the WAL ends; that is its way.
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
            read_records(BufReader::new(stdout), summary);
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
            all.sort_by(|a, b| a.id.cmp(&b.id));
            Ok(all)
        })
        .await
    }
}

fn read_records(mut from: impl BufRead, summary: &mut DivergenceSummary) {
    let mut line = Vec::new();
    loop {
        line.clear();
        match from
            .by_ref()
            .take(LINE_BYTES_MAX)
            .read_until(b'\n', &mut line)
        {
            Ok(0) | Err(_) => return,
            Ok(_) => note_record(&String::from_utf8_lossy(&line), summary),
        }
        if summary.records >= RECORDS_MAX {
            summary.truncated = true;
            return;
        }
    }
}

/// One line: `rmgr: Heap len (rec/tot): 54/ 150, tx: 735, lsn: 0/01534128, prev …, desc: INSERT …, blkref #0: rel 1663/5/16384 blk 0`.
fn note_record(line: &str, summary: &mut DivergenceSummary) {
    let field = |name: &str| line.split(name).nth(1).map(str::trim_start);
    let Some(lsn) = field("lsn: ")
        .and_then(|l| l.split(',').next())
        .and_then(|l| l.parse().ok())
    else {
        return;
    };
    if lsn < summary.from {
        return;
    }
    summary.records += 1;
    summary.last_record = lsn;
    let description = field("desc: ").unwrap_or_default();
    if line.starts_with("rmgr: Transaction") {
        if let Some(rest) = description.strip_prefix("COMMIT ") {
            summary.commits += 1;
            let when = rest.split(';').next().unwrap_or_default().trim().to_owned();
            summary.first_commit.get_or_insert_with(|| when.clone());
            summary.last_commit = Some(when);
        } else if description.starts_with("ABORT") {
            summary.aborts += 1;
        }
    }
    for block in line.split("blkref #").skip(1) {
        let Some(relation) = block
            .split("rel ")
            .nth(1)
            .and_then(|r| r.split_whitespace().next())
        else {
            continue;
        };
        if summary.relations.len() < RELATIONS_MAX || summary.relations.contains_key(relation) {
            *summary.relations.entry(relation.to_owned()).or_default() += 1;
        } else {
            summary.truncated = true;
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_commits_and_relations_after_the_fork_only() {
        let text = "\
rmgr: Heap        len (rec/tot):     54/   150, tx:        734, lsn: 0/01534000, prev 0/01533FF0, desc: INSERT off 3 flags 0x00, blkref #0: rel 1663/5/1 blk 0 FPW
rmgr: Heap        len (rec/tot):     54/   150, tx:        735, lsn: 0/01534128, prev 0/015340F0, desc: INSERT off 3 flags 0x00, blkref #0: rel 1663/5/16384 blk 0 FPW
rmgr: Transaction len (rec/tot):     34/    34, tx:        735, lsn: 0/01534200, prev 0/01534128, desc: COMMIT 2026-11-23 10:00:00.000001 UTC
rmgr: Transaction len (rec/tot):     34/    34, tx:        736, lsn: 0/01534228, prev 0/01534200, desc: ABORT 2026-11-23 10:00:01.000001 UTC
nonsense
";
        let mut summary = DivergenceSummary {
            from: Lsn(0x153_4100),
            ..Default::default()
        };
        read_records(text.as_bytes(), &mut summary);
        assert_eq!(
            (summary.records, summary.commits, summary.aborts),
            (3, 1, 1)
        );
        assert_eq!(
            summary.relations.into_iter().collect::<Vec<_>>(),
            [("1663/5/16384".to_owned(), 1)]
        );
        assert_eq!(
            summary.last_commit.as_deref(),
            Some("2026-11-23 10:00:00.000001 UTC")
        );
        assert_eq!(summary.last_record, Lsn(0x153_4228));
    }
}
