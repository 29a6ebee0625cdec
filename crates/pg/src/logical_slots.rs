//! Logical replication slots: copies of them on standbys, which before PostgreSQL 17 are kept by agents.
//!
//! A server reads its slots when it starts, from `pg_replslot/NAME/state` (slot.c, `RestoreSlotFromDisk`); no standby
//! before 16 makes a logical one in any other way. The file is replaced by renaming, so whoever reads it has a whole
//! one, and what it says is never ahead of what the consumer has confirmed. Where decoding once was in a consistent
//! state it starts from a snapshot on disk, `pg_logical/snapshots` (snapbuild.c): without the snapshot of its
//! restart position a slot might come to a consistent state later than where its consumer is, and skip what lies
//! between. So the two belong together.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use craton_core::Lsn;

use crate::control::{Control, literal};
use crate::error::{PgError, Result};
use crate::files::{self, blocking};
use crate::history;
use crate::instance::Instance;

/// A slot and its snapshot are no larger; the snapshot lists transactions.
pub const SLOT_FILE_MAX: usize = 4 << 20;

/// slot.c, `SLOT_MAGIC`.
const MAGIC: u32 = 0x0105_1CA1;
/// The checksum covers what follows it.
const CHECKED_FROM: usize = 8;
const NAME_AT: usize = 16;
const NAME_BYTES: usize = 64;
const DATABASE_AT: usize = 80;
const PERSISTENCY_AT: usize = 84;
const RESTART_AT: usize = 96;
/// After an invalidation's position, or since 16 its cause.
const CONFIRMED_AT: usize = 112;

/// slot.c, `SLOT_VERSION`, from PostgreSQL 17 on.
const VERSION_OWN_SYNC: u32 = 5;
const VERSION_AT: usize = 8;
/// In files of that version.
const SYNCED_AT: usize = 193;
const FAILOVER_AT: usize = 194;

/// A logical slot as it lies on disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlotFile {
    /// Its name.
    pub name: String,
    /// Decoding begins here.
    pub restart: Lsn,
    /// The consumer has everything before.
    pub confirmed: Lsn,
    state: Vec<u8>,
    snapshot: Option<Vec<u8>>,
}

fn not_a_slot(detail: &str) -> PgError {
    PgError::Unintelligible {
        what: "replication slot's file",
        detail: detail.to_owned(),
    }
}

fn bytes_at<const N: usize>(state: &[u8], at: usize) -> Result<[u8; N]> {
    state
        .get(at..at + N)
        .and_then(|b| b.try_into().ok())
        .ok_or_else(|| not_a_slot("it is too short"))
}

/// CRC-32C, as `pg_crc32c.h` computes it.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| {
            (c >> 1) ^ if c & 1 == 1 { 0x82F6_3B78 } else { 0 }
        })
    })
}

/// True for what PostgreSQL takes as a slot's name (slot.c, `ReplicationSlotValidateName`).
fn is_name(name: &str) -> bool {
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    !name.is_empty() && name.len() < NAME_BYTES && name.bytes().all(fits)
}

/// True if this is the file of a slot that decodes a database.
fn is_logical(state: &[u8]) -> bool {
    bytes_at::<4>(state, DATABASE_AT).is_ok_and(|b| u32::from_le_bytes(b) != 0)
}

/// True if this server made it itself, as a leader, to survive a failover.
fn is_own_with_failover(state: &[u8]) -> bool {
    let version = bytes_at::<4>(state, VERSION_AT).map(u32::from_le_bytes);
    is_logical(state)
        && version.is_ok_and(|v| v == VERSION_OWN_SYNC)
        && state.get(SYNCED_AT) == Some(&0)
        && state.get(FAILOVER_AT) == Some(&1)
}

impl SlotFile {
    /// Checks what a server would check when it starts: one that finds anything else there does not start.
    fn of(state: Vec<u8>, snapshot: Option<Vec<u8>>) -> Result<Self> {
        let number = |at| bytes_at::<4>(&state, at).map(u32::from_le_bytes);
        let lsn = |at| bytes_at::<8>(&state, at).map(|b| Lsn(u64::from_le_bytes(b)));
        let checked = state.get(CHECKED_FROM..).unwrap_or_default();
        if number(0)? != MAGIC || number(4)? != crc32c(checked) {
            return Err(not_a_slot("its checksum is wrong"));
        }
        let name: [u8; NAME_BYTES] = bytes_at(&state, NAME_AT)?;
        let name = String::from_utf8_lossy(&name);
        let name = name.trim_end_matches('\0').to_owned();
        if !is_name(&name) {
            return Err(not_a_slot("it names no slot"));
        }
        if !is_logical(&state) || number(PERSISTENCY_AT)? != 0 {
            return Err(not_a_slot("it is not a logical slot that lasts"));
        }
        Ok(Self {
            restart: lsn(RESTART_AT)?,
            confirmed: lsn(CONFIRMED_AT)?,
            name,
            state,
            snapshot,
        })
    }

    /// For the way to another member: the length of the state, the state, the snapshot.
    pub fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.state.len()).unwrap_or(u32::MAX);
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(&self.state);
        bytes.extend(self.snapshot.iter().flatten());
        bytes
    }

    /// Reads it back.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let length = u32::from_le_bytes(bytes_at(bytes, 0)?) as usize;
        let rest = bytes.get(4..).unwrap_or_default();
        let (state, snapshot) = rest
            .split_at_checked(length)
            .ok_or_else(|| not_a_slot("it is cut off"))?;
        let snapshot = (!snapshot.is_empty()).then(|| snapshot.to_vec());
        Self::of(state.to_vec(), snapshot)
    }
}

/// snapbuild.c, `SnapBuildSerialize`.
fn snapshot_path(data: &Path, at: Lsn) -> PathBuf {
    let name = format!("{:X}-{:X}.snap", at.0 >> 32, at.0 & 0xFFFF_FFFF);
    data.join("pg_logical/snapshots").join(name)
}

fn read_bounded(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::metadata(path) {
        Ok(m) if m.len() > SLOT_FILE_MAX as u64 => Err(not_a_slot("it is too large")),
        Ok(_) => match fs::read(path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(PgError::io("cannot read", path)(e)),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(PgError::io("cannot look at", path)(e)),
    }
}

fn read_slot(data: &Path, name: &str) -> Result<Option<SlotFile>> {
    /// The slot may move on between the two files.
    const TRIES: usize = 5;
    if !is_name(name) {
        return Ok(None);
    }
    let path = data.join("pg_replslot").join(name).join("state");
    let mut tries = 0;
    loop {
        let Some(state) = read_bounded(&path)? else {
            return Ok(None);
        };
        let slot = SlotFile::of(state, None)?;
        let snapshot = read_bounded(&snapshot_path(data, slot.restart))?;
        let again = read_bounded(&path)?;
        tries += 1;
        // A slot that has not moved since it was made has none; its decoding begins as it did then.
        if again.as_ref() == Some(&slot.state) || tries >= TRIES && snapshot.is_some() {
            return Ok(Some(SlotFile { snapshot, ..slot }));
        }
        if tries >= TRIES {
            return Err(not_a_slot("it changes all the time"));
        }
    }
}

fn has_wal(wal: &Path, at: Lsn, segment_size: u64) -> bool {
    let next = Lsn(at.0.saturating_add(1));
    history::newest_timeline_of_segment(wal, next, segment_size).is_some()
}

/// The directories of slots whose file is so.
fn slot_dirs(data: &Path, wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<PathBuf>> {
    let dir = data.join("pg_replslot");
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(PgError::io("cannot look at", &dir)(e)),
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        if read_bounded(&path.join("state"))?.is_some_and(|state| wanted(&state)) {
            found.push(path);
        }
    }
    Ok(found)
}

/// Renamed first, as PostgreSQL does: it removes such leftovers when it starts.
fn discard(dir: &Path) -> Result<()> {
    let doomed = dir.with_extension("tmp");
    files::remove_tree(&doomed)?;
    files::rename_durably(dir, &doomed)?;
    files::remove_tree(&doomed)
}

fn name_of(dir: &Path) -> Option<String> {
    Some(dir.file_name()?.to_string_lossy().into_owned())
}

impl Instance {
    /// A logical slot of this server, for another member; none where there is no such slot.
    pub async fn read_logical_slot(&self, name: &str) -> Result<Option<SlotFile>> {
        let (data, name) = (self.data_dir().to_owned(), name.to_owned());
        blocking(move || read_slot(&data, &name)).await
    }

    /// The segment with this position is in `pg_wal`.
    pub async fn has_wal_at(&self, lsn: Lsn) -> Result<bool> {
        let segment_size = self.control_data().await?.segment_size;
        let wal = self.wal_dir();
        blocking(move || Ok(has_wal(&wal, lsn, segment_size))).await
    }

    /// Puts copies of another server's slots in place, for the next start. Those whose WAL is not here, and those that
    /// are here already, are left out, with the reason. Only while PostgreSQL is down.
    pub async fn put_logical_slots(&self, slots: Vec<SlotFile>) -> Result<Vec<(String, String)>> {
        if let Some(p) = self.adopt().await? {
            return Err(PgError::Running {
                pid: p.pid(),
                data: self.data_dir().to_owned(),
            });
        }
        let segment_size = self.control_data().await?.segment_size;
        let (data, wal) = (self.data_dir().to_owned(), self.wal_dir());
        blocking(move || {
            let mut left_out = Vec::new();
            for slot in slots {
                if !has_wal(&wal, slot.restart, segment_size) {
                    let why = format!(
                        "the WAL that it needs, from {} on, is not here",
                        slot.restart
                    );
                    left_out.push((slot.name, why));
                    continue;
                }
                let dir = data.join("pg_replslot").join(&slot.name);
                if dir.exists() {
                    left_out.push((slot.name, "there is one here already".to_owned()));
                    continue;
                }
                if let Some(snapshot) = &slot.snapshot {
                    files::write_durably(&snapshot_path(&data, slot.restart), snapshot)?;
                }
                // Under its name only when it is whole: a directory without a state keeps PostgreSQL from starting.
                let making = data.join("pg_replslot").join(format!("{}.tmp", slot.name));
                files::remove_tree(&making)?;
                files::private_dir(&making)?;
                files::write_durably(&making.join("state"), &slot.state)?;
                files::rename_durably(&making, &dir)?;
            }
            Ok(left_out)
        })
        .await
    }

    /// A server with `wal_level` below `logical` does not start with logical slots: takes those away, and says which.
    /// For a standby, which has none but copies that could not be decoded.
    pub async fn discard_logical_slots(&self) -> Result<Vec<String>> {
        let data = self.data_dir().to_owned();
        blocking(move || {
            let mut names = Vec::new();
            for dir in slot_dirs(&data, is_logical)? {
                discard(&dir)?;
                names.extend(name_of(&dir));
            }
            Ok(names)
        })
        .await
    }

    /// From PostgreSQL 17 on: takes those of these slots away that this server made as a leader. It copies no slots while
    /// it has one of its own by the same name. Only while PostgreSQL is down.
    pub async fn discard_own_failover_slots(&self, names: BTreeSet<String>) -> Result<Vec<String>> {
        let data = self.data_dir().to_owned();
        blocking(move || {
            let mut gone = Vec::new();
            for dir in slot_dirs(&data, is_own_with_failover)? {
                if let Some(name) = name_of(&dir).filter(|n| names.contains(n)) {
                    discard(&dir)?;
                    gone.push(name);
                }
            }
            Ok(gone)
        })
        .await
    }
}

impl Control {
    /// Moves an unused logical slot forward to `lsn`; never back, and never past what this server has replayed.
    pub async fn advance_logical_slot(
        &self,
        name: &str,
        database: &str,
        lsn: Lsn,
        limit: Duration,
    ) -> Result<()> {
        let sql = format!(
            "SELECT pg_replication_slot_advance(slot_name, least({0}::pg_lsn, pg_last_wal_replay_lsn())) \
             FROM pg_replication_slots WHERE slot_name = {1} AND NOT active AND pg_is_in_recovery() \
             AND confirmed_flush_lsn < least({0}::pg_lsn, pg_last_wal_replay_lsn())",
            literal(&lsn.to_string()),
            literal(name)
        );
        self.query_apart(
            "advance logical replication slot",
            Some(database),
            &sql,
            limit,
        )
        .await
        .map(|_| ())
    }

    /// How far a standby has replayed.
    pub async fn replayed(&self, limit: Duration) -> Result<Lsn> {
        let what = "replayed WAL position";
        let sql = "SELECT coalesce(pg_last_wal_replay_lsn(), '0/0')";
        crate::control::parse_lsn(what, &self.query_one(what, sql, limit).await?)
    }

    /// `wal_level` is `logical`, and there is room for so many more slots.
    pub async fn takes_logical_slots(
        &self,
        more: usize,
        limit: Duration,
    ) -> Result<Option<String>> {
        let sql = format!(
            "SELECT CASE WHEN current_setting('wal_level') <> 'logical' THEN 'wal_level is not logical here' \
             WHEN (SELECT count(*) FROM pg_replication_slots) + {more} > current_setting('max_replication_slots')::int \
             THEN 'max_replication_slots = ' || current_setting('max_replication_slots') || ' leaves no room' \
             ELSE '' END"
        );
        let why = self.query_one("room for slots", &sql, limit).await?;
        Ok((!why.is_empty()).then_some(why))
    }

    /// A connection that asks for nothing: the postmaster looks after its workers when somebody comes.
    pub async fn greet(&self, limit: Duration) -> Result<()> {
        self.query_apart("greeting", None, "SELECT 1", limit)
            .await
            .map(|_| ())
    }

    /// Writes a list of the running transactions into the WAL, at which logical slots move on. From PostgreSQL 16.
    pub async fn log_running_transactions(&self, limit: Duration) -> Result<()> {
        let what = "list of running transactions";
        let sql = "SELECT pg_log_standby_snapshot()";
        self.query(what, sql, limit).await.map(|_| ())
    }

    /// Lets WAL go on at or behind `lsn`, by beginning new segments, at most so many.
    pub async fn skip_wal_to(&self, lsn: Lsn, segments_max: u32, limit: Duration) -> Result<Lsn> {
        let what = "new WAL segment";
        let mut end = self.insert_position(limit).await?;
        for _ in 0..segments_max {
            if end >= lsn {
                break;
            }
            // At a segment's beginning there is nothing to end.
            let sql = "SELECT pg_logical_emit_message(false, 'craton', 'segment'); SELECT pg_switch_wal()";
            self.query(what, sql, limit).await?;
            end = self.insert_position(limit).await?;
        }
        Ok(end)
    }

    async fn insert_position(&self, limit: Duration) -> Result<Lsn> {
        let what = "current WAL position";
        let sql = "SELECT pg_current_wal_insert_lsn()";
        crate::control::parse_lsn(what, &self.query_one(what, sql, limit).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As PostgreSQL 15 writes it.
    fn state(name: &str, database: u32, persistency: u32) -> Vec<u8> {
        let mut s = vec![0_u8; 200];
        s[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        s[8..12].copy_from_slice(&3_u32.to_le_bytes());
        s[12..16].copy_from_slice(&184_u32.to_le_bytes());
        s[NAME_AT..NAME_AT + name.len()].copy_from_slice(name.as_bytes());
        s[DATABASE_AT..DATABASE_AT + 4].copy_from_slice(&database.to_le_bytes());
        s[PERSISTENCY_AT..PERSISTENCY_AT + 4].copy_from_slice(&persistency.to_le_bytes());
        s[RESTART_AT..RESTART_AT + 8].copy_from_slice(&0x1_0000_0020_u64.to_le_bytes());
        s[CONFIRMED_AT..CONFIRMED_AT + 8].copy_from_slice(&0x1_0000_0080_u64.to_le_bytes());
        let crc = crc32c(&s[CHECKED_FROM..]);
        s[4..8].copy_from_slice(&crc.to_le_bytes());
        s
    }

    #[test]
    fn the_checksum_is_castagnolis() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn a_slot_survives_the_way() {
        let slot = SlotFile::of(state("dbz", 5, 0), Some(b"snap".to_vec())).unwrap();
        assert_eq!(
            (slot.name.as_str(), slot.restart),
            ("dbz", Lsn(0x1_0000_0020))
        );
        assert_eq!(slot.confirmed, Lsn(0x1_0000_0080));
        assert_eq!(SlotFile::decode(&slot.encode()).unwrap(), slot);
        let bare = SlotFile {
            snapshot: None,
            ..slot
        };
        assert_eq!(SlotFile::decode(&bare.encode()).unwrap(), bare);
    }

    #[test]
    fn what_would_keep_a_server_from_starting_is_refused() {
        assert!(SlotFile::of(state("dbz", 0, 0), None).is_err(), "physical");
        assert!(
            SlotFile::of(state("dbz", 5, 1), None).is_err(),
            "being made"
        );
        assert!(SlotFile::of(state("../x", 5, 0), None).is_err());
        let mut torn = state("dbz", 5, 0);
        torn[150] ^= 1;
        assert!(SlotFile::of(torn, None).is_err());
        let whole = SlotFile::of(state("dbz", 5, 0), None).unwrap().encode();
        for length in 0..whole.len() {
            assert!(SlotFile::decode(&whole[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn files_are_found_by_the_slots_position() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path();
        for (name, database) in [("dbz", 5), ("craton_b", 0)] {
            fs::create_dir_all(data.join("pg_replslot").join(name)).unwrap();
            fs::write(
                data.join("pg_replslot").join(name).join("state"),
                state(name, database, 0),
            )
            .unwrap();
        }
        fs::create_dir_all(data.join("pg_logical/snapshots")).unwrap();
        let slot = read_slot(data, "dbz").unwrap().unwrap();
        assert_eq!(slot.snapshot, None);
        fs::write(data.join("pg_logical/snapshots/1-20.snap"), b"rows").unwrap();
        let slot = read_slot(data, "dbz").unwrap().unwrap();
        assert_eq!(slot.snapshot.as_deref(), Some(&b"rows"[..]));
        assert_eq!(read_slot(data, "none").unwrap(), None);
        assert_eq!(read_slot(data, "../dbz").unwrap(), None);
        let logical = slot_dirs(data, is_logical).unwrap();
        assert_eq!(logical, [data.join("pg_replslot/dbz")]);
    }

    #[test]
    fn a_leaders_own_slots_are_told_from_copies() {
        // As PostgreSQL 17 writes it.
        let own = |synced: u8, failover: u8| {
            let mut s = state("dbz", 5, 0);
            s[VERSION_AT..VERSION_AT + 4].copy_from_slice(&VERSION_OWN_SYNC.to_le_bytes());
            s[SYNCED_AT] = synced;
            s[FAILOVER_AT] = failover;
            s
        };
        assert!(is_own_with_failover(&own(0, 1)));
        assert!(!is_own_with_failover(&own(1, 1)));
        assert!(!is_own_with_failover(&own(0, 0)));
        let mut physical = own(0, 1);
        physical[DATABASE_AT..DATABASE_AT + 4].fill(0);
        assert!(!is_own_with_failover(&physical));
        let mut older = own(0, 1);
        older[VERSION_AT] = 3;
        assert!(!is_own_with_failover(&older));
        assert!(!is_own_with_failover(&own(0, 1)[..FAILOVER_AT]));
    }
}
