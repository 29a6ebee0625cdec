//! Timeline history files.
//!
//! A promotion takes the first number for which no history file exists (timeline.c, `findNewestTimeLine`).
//! A timeline that was begun on a member which is gone now is known to the coordinator only, or after an operator's
//! recovery to nobody. So before a promotion every number below the one that it is to get is *reserved* here: by a
//! history file that holds nothing but a comment. Such a file names no ancestor, so no standby ever follows it ("is not a child of …"); it only takes the number.
//!
//! Reserved numbers below a real timeline must stay: a WAL receiver asks its upstream for the history of
//! every timeline between its own and the upstream's (walreceiver.c, `WalRcvFetchTimeLineHistoryFiles`) and
//! fails where one is missing. Reserved numbers above every real one must go before a start: with
//! `recovery_target_timeline = latest` the server would take the newest for its target, and refuse to start.

use std::fs;
use std::path::{Path, PathBuf};

use craton_core::{Lsn, TimelineId};
use serde::{Deserialize, Serialize};

use crate::error::{PgError, Result};
use crate::files;

/// What a reservation says to whoever opens it.
const MARK: &str = "# reserved by craton";

/// One line of a history file: this timeline was left at that position.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// The ancestor.
    pub timeline: TimelineId,
    /// Where it was left.
    pub switch: Lsn,
    /// Why, in PostgreSQL's words.
    pub reason: String,
}

fn file_of(wal_dir: &Path, timeline: TimelineId) -> PathBuf {
    wal_dir.join(format!("{:08X}.history", timeline.0))
}

/// Reads a history file's text: `parent switchpoint reason`, `#` begins a comment line.
pub fn parse(text: &str) -> Result<Vec<HistoryEntry>> {
    text.lines()
        .map(str::trim_start)
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .map(|line| {
            let mut fields = line.splitn(3, ['\t', ' ']);
            let timeline = fields.next().and_then(|t| t.parse().ok());
            let switch = fields.next().and_then(|s| s.trim().parse().ok());
            match (timeline, switch) {
                (Some(timeline), Some(switch)) => Ok(HistoryEntry {
                    timeline: TimelineId(timeline),
                    switch,
                    reason: fields.next().unwrap_or_default().trim().to_owned(),
                }),
                _ => Err(PgError::Unintelligible {
                    what: "timeline history file",
                    detail: line.to_owned(),
                }),
            }
        })
        .collect()
}

/// The ancestors of a timeline, oldest first; empty for timeline 1 and for one whose file is not here.
pub(crate) fn read(wal_dir: &Path, timeline: TimelineId) -> Result<Vec<HistoryEntry>> {
    files::read_text(&file_of(wal_dir, timeline))?
        .map_or_else(|| Ok(Vec::new()), |text| parse(&text))
}

/// A file without an entry takes a number, and nothing more: PostgreSQL's own have one at least. (What was written and
/// not flushed when the host went down is such a file as well.)
pub(crate) fn is_reservation(text: &str) -> bool {
    parse(text).is_ok_and(|entries| entries.is_empty())
}

/// The history file of an ancestor, as it stands at the head of its descendant's: a promotion copies the parent's whole
/// file, and adds an empty line and its own (timeline.c, `writeTimeLineHistory`).
fn ancestor(descendant: &str, timeline: TimelineId) -> Option<&str> {
    let at = descendant.match_indices('\n').find(|(at, _)| {
        let line = descendant.get(at + 1..).unwrap_or_default();
        line.split(['\t', ' ']).next().and_then(|t| t.parse().ok()) == Some(timeline.0)
    });
    let text = descendant.get(..at?.0)?;
    (!is_reservation(text)).then_some(text)
}

/// Gives every number below `next` a history file, where there is none: the ancestors of `own` theirs, others a
/// reservation. `own` itself is left alone. Returns the reserved numbers.
///
/// The names are durable when it returns, contents of reservations need not be.
pub(crate) fn reserve_below(
    wal_dir: &Path,
    own: TimelineId,
    next: TimelineId,
) -> Result<Vec<TimelineId>> {
    let lineage = files::read_text(&file_of(wal_dir, own))?.unwrap_or_default();
    let mut reserved = Vec::new();
    for timeline in (2..next.0).map(TimelineId).filter(|t| *t != own) {
        let path = file_of(wal_dir, timeline);
        if path.exists() {
            continue;
        }
        if let Some(text) = ancestor(&lineage, timeline) {
            files::write_durably(&path, text.as_bytes())?;
            continue;
        }
        let text = format!("{MARK}: timeline {timeline} may be in use on another member\n");
        fs::write(&path, text).map_err(PgError::io("cannot write", &path))?;
        reserved.push(timeline);
    }
    if !reserved.is_empty() {
        fs::File::open(wal_dir)
            .and_then(|d| d.sync_all())
            .map_err(PgError::io("cannot sync", wal_dir))?;
    }
    Ok(reserved)
}

/// Removes reserved numbers above the newest real timeline: the given one, or one with a real file here.
pub(crate) fn remove_reserved(wal_dir: &Path, newest_known: TimelineId) -> Result<Vec<TimelineId>> {
    let mut reserved = Vec::new();
    let mut newest_real = newest_known;
    for (timeline, path) in list(wal_dir)? {
        if files::read_text(&path)?.is_some_and(|t| is_reservation(&t)) {
            reserved.push((timeline, path));
        } else {
            newest_real = newest_real.max(timeline);
        }
    }
    reserved.retain(|(timeline, _)| *timeline > newest_real);
    for (_, path) in &reserved {
        files::remove_durably(path)?;
        // The archiver may have been told of it.
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
            continue;
        };
        for suffix in ["ready", "done"] {
            files::remove_durably(
                &wal_dir
                    .join("archive_status")
                    .join(format!("{name}.{suffix}")),
            )?;
        }
    }
    Ok(reserved.into_iter().map(|(timeline, _)| timeline).collect())
}

/// All history files.
fn list(wal_dir: &Path) -> Result<Vec<(TimelineId, PathBuf)>> {
    let entries = fs::read_dir(wal_dir).map_err(PgError::io("cannot list", wal_dir))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let number = name.to_str()?.strip_suffix(".history")?;
            Some((
                TimelineId(u32::from_str_radix(number, 16).ok()?),
                entry.path(),
            ))
        })
        .collect())
}

/// A WAL segment's name taken apart.
pub(crate) fn parse_segment_name(name: &str, segment_size: u64) -> Option<(TimelineId, u64)> {
    if name.len() != 24
        || !name
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b))
    {
        return None;
    }
    let part = |range| u64::from_str_radix(name.get(range)?, 16).ok();
    let per_id = 0x1_0000_0000_u64.checked_div(segment_size)?;
    let timeline = u32::try_from(part(0..8)?).ok()?;
    Some((
        TimelineId(timeline),
        part(8..16)?
            .checked_mul(per_id)?
            .checked_add(part(16..24)?)?,
    ))
}

/// The newest timeline among the files that could hold the byte before `end`.
pub(crate) fn newest_timeline_of_segment(
    wal_dir: &Path,
    end: Lsn,
    segment_size: u64,
) -> Option<TimelineId> {
    let segment = end.0.checked_sub(1)?.checked_div(segment_size)?;
    fs::read_dir(wal_dir)
        .ok()?
        .flatten()
        .filter_map(|e| parse_segment_name(e.file_name().to_str()?, segment_size))
        .filter(|(_, number)| *number == segment)
        .map(|(timeline, _)| timeline)
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_postgresql_writes_and_refuses_the_rest() {
        let text =
            "1\t0/3000148\tno recovery target specified\n\n# comment\n2\t0/5000000\tbefore x y\n";
        let entries = parse(text).unwrap();
        assert_eq!(entries.len(), 2);
        assert_eq!(
            (entries[1].timeline, entries[1].switch),
            (TimelineId(2), Lsn(0x500_0000))
        );
        assert_eq!(entries[1].reason, "before x y");
        assert!(parse("1\tx\ty\n").is_err());
    }

    #[test]
    fn reserved_numbers_below_a_real_timeline_stay() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("00000004.history"), "1\t0/3000000\tx\n").unwrap();
        let made = reserve_below(dir.path(), TimelineId(4), TimelineId(6)).unwrap();
        assert_eq!(made, [TimelineId(2), TimelineId(3), TimelineId(5)]);
        assert!(read(dir.path(), TimelineId(2)).unwrap().is_empty());
        assert_eq!(
            remove_reserved(dir.path(), TimelineId(1)).unwrap(),
            [TimelineId(5)]
        );
        assert!(dir.path().join("00000003.history").exists());
        assert!(
            remove_reserved(dir.path(), TimelineId(1))
                .unwrap()
                .is_empty()
        );
    }

    /// What PostgreSQL wrote on the ancestors themselves, to the byte: a backup that has the one and is shown another
    /// takes them for two histories.
    #[test]
    fn ancestors_get_their_own_files() {
        let dir = tempfile::tempdir().unwrap();
        let (two, four) = (
            "1\t0/3000000\tno recovery target specified\n",
            "1\t0/3000000\tno recovery target specified\n\n2\t0/5000000\tx\n",
        );
        let seven = format!("{four}\n4\t0/7000000\tx\n");
        fs::write(dir.path().join("00000007.history"), seven).unwrap();
        let made = reserve_below(dir.path(), TimelineId(7), TimelineId(9)).unwrap();
        assert_eq!(made, [3, 5, 6, 8].map(TimelineId));
        let text =
            |n: u32| fs::read_to_string(dir.path().join(format!("{n:08X}.history"))).unwrap();
        assert_eq!((text(2).as_str(), text(4).as_str()), (two, four));
        assert_eq!(
            remove_reserved(dir.path(), TimelineId(1)).unwrap(),
            [TimelineId(8)]
        );
        // Its own file was lost before Craton came: nothing is put in its place.
        let dir = tempfile::tempdir().unwrap();
        let made = reserve_below(dir.path(), TimelineId(2), TimelineId(4)).unwrap();
        assert_eq!(made, [TimelineId(3)]);
        // A real one is real whatever its parent's began with.
        let path = dir.path().join("00000004.history");
        fs::write(&path, format!("{MARK}: x\n\n2\t0/5000000\tx\n")).unwrap();
        assert_eq!(remove_reserved(dir.path(), TimelineId(1)).unwrap(), []);
        assert!(path.exists());
    }

    #[test]
    fn finds_the_timeline_of_a_position_by_file_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "000000010000000000000003",
            "000000020000000000000003",
            "000000010000000000000004",
        ] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let size = 16 << 20;
        let at = |lsn| newest_timeline_of_segment(dir.path(), Lsn(lsn), size);
        assert_eq!(at(0x300_0001), Some(TimelineId(2)));
        assert_eq!(
            at(0x400_0000),
            Some(TimelineId(2)),
            "the byte before the end counts"
        );
        assert_eq!(at(0x400_0001), Some(TimelineId(1)));
        assert_eq!(at(0), None);
        assert_eq!(
            parse_segment_name("000000010000000200000003", size),
            Some((TimelineId(1), 0x203))
        );
    }
}
