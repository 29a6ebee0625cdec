//! What a stretch of WAL did, read from the lines of pg_waldump.

use std::collections::BTreeMap;
use std::io::{BufRead, Read};

use craton_core::{Lsn, TimelineId};
use serde::{Deserialize, Serialize};

use super::RelationNames;

/// At most this many WAL records are read for a summary.
const RECORDS_MAX: u64 = 5_000_000;
/// At most this many relations are listed in it.
const RELATIONS_MAX: usize = 1000;
/// At most this many committed transactions are listed in it, the first ones.
const TRANSACTIONS_MAX: usize = 1000;
/// At most this many transactions are followed at once.
const OPEN_MAX: usize = 100_000;
/// A line of pg_waldump is cut here, in bytes.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// Rows that were written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RowChanges {
    /// Inserted, by INSERT or COPY.
    pub inserted: u64,
    /// Updated.
    pub updated: u64,
    /// Deleted.
    pub deleted: u64,
}

impl RowChanges {
    fn add(&mut self, other: Self) {
        self.inserted += other.inserted;
        self.updated += other.updated;
        self.deleted += other.deleted;
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.inserted + self.updated + self.deleted
    }
}

/// A transaction that was committed after the fork.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DivergentTransaction {
    /// Its number.
    pub xid: u32,
    /// Where its commit record begins.
    pub lsn: Lsn,
    /// When it was committed, in PostgreSQL's words.
    pub committed: String,
    /// Rows it wrote, without those of system catalogs and TOAST tables.
    pub rows: RowChanges,
}

/// What the WAL after the fork did. Kept as `summary.json` beside the segments.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DivergenceSummary {
    /// The directory's name under `divergence/`.
    pub id: String,
    /// When it was kept, by the member's wall clock, milliseconds since 1970; 0 if not known.
    #[serde(default)]
    pub kept_at_ms: u64,
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
    /// Rows that committed transactions wrote, by the relation's name, or by `tablespace/database/filenode`
    /// where that is not known.
    #[serde(default)]
    pub rows: BTreeMap<String, RowChanges>,
    /// The committed transactions that wrote rows, the first of them.
    #[serde(default)]
    pub transactions: Vec<DivergentTransaction>,
    /// True if a bound cut the summary short; the segments are complete all the same.
    pub truncated: bool,
    /// Where the last record ends at the least, without the page headers in it.
    #[serde(skip)]
    pub(super) end: Lsn,
}

impl DivergenceSummary {
    /// Puts names where there were numbers.
    pub(super) fn name_relations(&mut self, names: &RelationNames) {
        let rows = std::mem::take(&mut self.rows);
        for (number, changes) in rows {
            let name = names.get(&number).cloned().unwrap_or(number);
            self.rows.entry(name).or_default().add(changes);
        }
    }
}

/// What transactions did that have not ended yet.
#[derive(Default)]
struct Open(BTreeMap<u32, BTreeMap<String, RowChanges>>);

/// Reads until the end or a bound.
pub(super) fn read_records(mut from: impl BufRead, summary: &mut DivergenceSummary) {
    let mut line = Vec::new();
    let mut open = Open::default();
    loop {
        line.clear();
        match from
            .by_ref()
            .take(LINE_BYTES_MAX)
            .read_until(b'\n', &mut line)
        {
            Ok(0) | Err(_) => return,
            Ok(_) => note_record(&String::from_utf8_lossy(&line), &mut open, summary),
        }
        if summary.records >= RECORDS_MAX {
            summary.truncated = true;
            return;
        }
    }
}

/// One line: `rmgr: Heap len (rec/tot): 54/ 150, tx: 735, lsn: 0/01534128, prev …, desc: INSERT …, blkref #0: rel 1663/5/16384 blk 0`.
fn note_record(line: &str, open: &mut Open, summary: &mut DivergenceSummary) {
    let field = |name: &str| line.split(name).nth(1).map(str::trim_start);
    let word = |name: &str| field(name).and_then(|l| l.split(',').next());
    let Some(lsn) = word("lsn: ").and_then(|l| l.parse().ok()) else {
        return;
    };
    if lsn < summary.from {
        return;
    }
    summary.records += 1;
    summary.last_record = lsn;
    let length = word("len (rec/tot): ").and_then(|w| w.split('/').nth(1)?.trim().parse().ok());
    summary.end = Lsn(lsn.0.saturating_add(length.unwrap_or(0)));
    let description = field("desc: ").unwrap_or_default();
    let xid = word("tx: ")
        .and_then(|x| x.trim().parse().ok())
        .unwrap_or(0);
    if line.starts_with("rmgr: Transaction") {
        note_end(xid, lsn, description, open, summary);
    }
    for (number, relation) in relations(line).enumerate() {
        if summary.relations.len() < RELATIONS_MAX || summary.relations.contains_key(relation) {
            *summary.relations.entry(relation.to_owned()).or_default() += 1;
        } else {
            summary.truncated = true;
        }
        let rows = if number == 0 && line.starts_with("rmgr: Heap") {
            rows_of(description)
        } else {
            RowChanges::default()
        };
        if rows.total() > 0 {
            note_rows(xid, relation, rows, open, summary);
        }
    }
}

/// The relations that a record touches, as `tablespace/database/filenode`.
fn relations(line: &str) -> impl Iterator<Item = &str> {
    line.split("blkref #")
        .skip(1)
        .filter_map(|block| block.split("rel ").nth(1)?.split_whitespace().next())
}

/// What a heap record does to rows (heapdesc.c): `INSERT off 3`, `HOT_UPDATE …`, `MULTI_INSERT 4 tuples` up to
/// version 15, `MULTI_INSERT ntuples: 4` since.
fn rows_of(description: &str) -> RowChanges {
    let mut words = description.split_whitespace();
    let operation = words.next().unwrap_or_default();
    let mut rows = RowChanges::default();
    match operation.trim_end_matches("+INIT") {
        "INSERT" => rows.inserted = 1,
        "UPDATE" | "HOT_UPDATE" => rows.updated = 1,
        "DELETE" => rows.deleted = 1,
        "MULTI_INSERT" => {
            rows.inserted = words
                .take(2)
                .find_map(|w| w.trim_end_matches(',').parse().ok())
                .unwrap_or(1);
        }
        _ => {}
    }
    rows
}

fn note_rows(
    xid: u32,
    relation: &str,
    rows: RowChanges,
    open: &mut Open,
    summary: &mut DivergenceSummary,
) {
    if open.0.len() >= OPEN_MAX && !open.0.contains_key(&xid) {
        summary.truncated = true;
        return;
    }
    let of = open.0.entry(xid).or_default();
    of.entry(relation.to_owned()).or_default().add(rows);
}

/// `COMMIT 2026-11-26 21:32:16.439270 UTC; subxacts: 727 728; …`; prepared transactions end with
/// `COMMIT_PREPARED 730: 2026-…`, under the number of another transaction or none.
fn note_end(
    xid: u32,
    lsn: Lsn,
    description: &str,
    open: &mut Open,
    summary: &mut DivergenceSummary,
) {
    let (word, rest) = description.split_once(' ').unwrap_or((description, ""));
    let (xid, rest) = match rest.split_once(':') {
        Some((number, rest)) if word.ends_with("_PREPARED") => {
            (number.trim().parse().unwrap_or(xid), rest)
        }
        _ => (xid, rest),
    };
    let ended = std::iter::once(xid).chain(subtransactions(rest));
    let did: Vec<_> = ended.filter_map(|x| open.0.remove(&x)).collect();
    if word.starts_with("ABORT") {
        summary.aborts += 1;
        return;
    }
    if !word.starts_with("COMMIT") {
        return;
    }
    summary.commits += 1;
    let when = rest.split(';').next().unwrap_or_default().trim().to_owned();
    summary.first_commit.get_or_insert_with(|| when.clone());
    summary.last_commit = Some(when.clone());
    let mut rows = RowChanges::default();
    for (relation, changes) in did.into_iter().flatten() {
        if is_users(&relation) {
            rows.add(changes);
        }
        if summary.rows.len() < RELATIONS_MAX || summary.rows.contains_key(&relation) {
            summary.rows.entry(relation).or_default().add(changes);
        } else {
            summary.truncated = true;
        }
    }
    if rows.total() == 0 {
        return;
    }
    if summary.transactions.len() >= TRANSACTIONS_MAX {
        summary.truncated = true;
        return;
    }
    summary.transactions.push(DivergentTransaction {
        xid,
        lsn,
        committed: when,
        rows,
    });
}

fn subtransactions(rest: &str) -> impl Iterator<Item = u32> {
    let list = rest.split("subxacts:").nth(1).unwrap_or_default();
    let list = list.split(';').next().unwrap_or_default();
    list.split_whitespace().filter_map(|x| x.parse().ok())
}

/// Relations whose filenode is below `FirstNormalObjectId` (transam.h) are system catalogs.
fn is_users(relation: &str) -> bool {
    let node = relation.rsplit('/').next().unwrap_or_default();
    node.parse::<u32>().is_ok_and(|n| n >= 16_384)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, from: Lsn) -> DivergenceSummary {
        let mut summary = DivergenceSummary {
            from,
            ..Default::default()
        };
        read_records(text.as_bytes(), &mut summary);
        summary
    }

    fn rows(inserted: u64, updated: u64, deleted: u64) -> RowChanges {
        RowChanges {
            inserted,
            updated,
            deleted,
        }
    }

    #[test]
    fn counts_commits_and_relations_after_the_fork_only() {
        let text = "\
rmgr: Heap        len (rec/tot):     54/   150, tx:        734, lsn: 0/01534000, prev 0/01533FF0, desc: INSERT off 3 flags 0x00, blkref #0: rel 1663/5/1 blk 0 FPW
rmgr: Heap        len (rec/tot):     54/   150, tx:        735, lsn: 0/01534128, prev 0/015340F0, desc: INSERT off 3 flags 0x00, blkref #0: rel 1663/5/16384 blk 0 FPW
rmgr: Transaction len (rec/tot):     34/    34, tx:        735, lsn: 0/01534200, prev 0/01534128, desc: COMMIT 2026-11-23 10:00:00.000001 UTC
rmgr: Transaction len (rec/tot):     34/    34, tx:        736, lsn: 0/01534228, prev 0/01534200, desc: ABORT 2026-11-23 10:00:01.000001 UTC
nonsense
";
        let summary = read(text, Lsn(0x153_4100));
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

    #[test]
    fn counts_rows_of_committed_transactions_and_their_subtransactions() {
        let text = "\
rmgr: Heap len (rec/tot): 59/59, tx: 727, lsn: 0/0151F098, prev 0/0151F070, desc: INSERT off 6 flags 0x00, blkref #0: rel 1663/5/16384 blk 0
rmgr: Heap len (rec/tot): 68/68, tx: 728, lsn: 0/0151F0D8, prev 0/0151F098, desc: HOT_UPDATE off 6 xmax 728 flags 0x20 ; new off 7 xmax 0, blkref #0: rel 1663/5/16384 blk 0
rmgr: Heap len (rec/tot): 54/54, tx: 729, lsn: 0/0151F0E0, prev 0/0151F0D8, desc: DELETE off 1 flags 0x00 KEYS_UPDATED , blkref #0: rel 1663/5/16385 blk 0
rmgr: Transaction len (rec/tot): 34/34, tx: 729, lsn: 0/0151F0F0, prev 0/0151F0E0, desc: ABORT 2026-11-26 21:32:15.911000 UTC
rmgr: Transaction len (rec/tot): 50/50, tx: 726, lsn: 0/0151F120, prev 0/0151F0D8, desc: COMMIT 2026-11-26 21:32:16.439270 UTC; subxacts: 727 728
rmgr: Heap2 len (rec/tot): 484/484, tx: 730, lsn: 0/0151F1F0, prev 0/0151F1C8, desc: MULTI_INSERT+INIT 4 tuples flags 0x02, blkref #0: rel 1663/5/16384 blk 0
rmgr: Heap2 len (rec/tot): 484/484, tx: 730, lsn: 0/0151F2F0, prev 0/0151F1C8, desc: MULTI_INSERT ntuples: 3, flags: 0x02, offsets: [1, 2], blkref #0: rel 1663/5/16385 blk 0
rmgr: Transaction len (rec/tot): 34/34, tx: 0, lsn: 0/0151F3D8, prev 0/0151F1F0, desc: COMMIT_PREPARED 730: 2026-11-26 21:32:16.456213 UTC
";
        let mut summary = read(text, Lsn(0));
        summary.name_relations(&[("1663/5/16384".to_owned(), "app.public.t".to_owned())].into());
        assert_eq!((summary.commits, summary.aborts), (2, 1));
        assert_eq!(
            summary.rows.into_iter().collect::<Vec<_>>(),
            [
                ("1663/5/16385".to_owned(), rows(3, 0, 0)),
                ("app.public.t".to_owned(), rows(5, 1, 0)),
            ]
        );
        let listed: Vec<_> = summary
            .transactions
            .iter()
            .map(|t| (t.xid, t.rows))
            .collect();
        assert_eq!(listed, [(726, rows(1, 1, 0)), (730, rows(7, 0, 0))]);
        assert_eq!(
            summary.transactions.last().map(|t| t.committed.as_str()),
            Some("2026-11-26 21:32:16.456213 UTC")
        );
    }

    #[test]
    fn a_summary_of_an_earlier_version_is_still_read() {
        let text = r#"{"id":"x","timeline":1,"from":"0/1","last_record":"0/1","segments":0,"bytes":0,"records":0,
            "commits":0,"aborts":0,"first_commit":null,"last_commit":null,"relations":{},"truncated":false}"#;
        let summary: DivergenceSummary = serde_json::from_str(text).unwrap();
        assert!(summary.rows.is_empty() && summary.kept_at_ms == 0);
    }
}
