//! Physical replication slots: one per member, on every member, so that a promotion loses no WAL that
//! anyone still needs. All three operations work on a primary and on a standby.

use std::path::Path;
use std::time::Duration;

use craton_core::Lsn;

use crate::control::{Control, literal};
use crate::disk;
use crate::error::Result;

/// The most WAL that slots keep, where the operator does not say: an eighth of its file system, in these bounds.
const WAL_PART: u64 = 8;
/// See [`WAL_PART`], MiB. Below a few segments every standby would be cloned anew for a moment's absence.
const WAL_MIB_MIN: u64 = 64;
/// See [`WAL_PART`], MiB. A clone is faster than the replay of more.
const WAL_MIB_MAX: u64 = 16 << 10;

/// `max_slot_wal_keep_size`: a member that is away for long is cloned anew; it must not fill the others' disks.
/// Before there is a data directory, `beside` tells its file system.
pub(crate) fn wal_bound(data_dir: &Path, beside: &Path) -> String {
    let space = disk::space(&data_dir.join("pg_wal")).or_else(|_| disk::space(beside));
    bound_on(space.ok().map(|s| s.total))
}

fn bound_on(disk_bytes: Option<u64>) -> String {
    let mib = disk_bytes.map_or(WAL_MIB_MAX, |bytes| (bytes / WAL_PART) >> 20);
    format!("{}MB", mib.clamp(WAL_MIB_MIN, WAL_MIB_MAX))
}

impl Control {
    /// Makes the slots that are not there yet, each holding WAL from now on.
    pub async fn ensure_slots(&self, names: &[String], limit: Duration) -> Result<()> {
        for name in names {
            let name = literal(name);
            let sql = format!(
                "SELECT pg_create_physical_replication_slot({name}, true) \
                 WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = {name})"
            );
            match self.query("create replication slot", &sql, limit).await {
                // Made by somebody else meanwhile.
                Err(e) if e.sqlstate() == Some("42710") => {}
                other => {
                    other?;
                }
            }
        }
        Ok(())
    }

    /// Moves an unused slot forward to `lsn`; never back, and never past what this server has.
    pub async fn advance_slot(&self, name: &str, lsn: Lsn, limit: Duration) -> Result<()> {
        let sql = format!(
            "SELECT pg_replication_slot_advance(slot_name, least({}::pg_lsn, CASE WHEN pg_is_in_recovery() \
             THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END)) FROM pg_replication_slots \
             WHERE slot_name = {} AND NOT active AND restart_lsn < {0}::pg_lsn \
             AND restart_lsn < CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() \
             ELSE pg_current_wal_flush_lsn() END",
            literal(&lsn.to_string()),
            literal(name)
        );
        match self.query("advance replication slot", &sql, limit).await {
            // Taken by its member between the look and the move: then it advances by itself.
            Err(e) if e.sqlstate() == Some("55006") => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// Drops a slot that is not in use; a missing one is fine.
    pub async fn drop_slot(&self, name: &str, limit: Duration) -> Result<()> {
        let sql = format!(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = {}",
            literal(name)
        );
        self.query("drop replication slot", &sql, limit)
            .await
            .map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_keep_a_part_of_the_disk() {
        let gib = |n: u64| Some(n << 30);
        assert_eq!(bound_on(gib(20)), "2560MB");
        assert_eq!(bound_on(gib(1000)), "16384MB");
        assert_eq!(bound_on(Some(100 << 20)), "64MB");
        assert_eq!(bound_on(None), "16384MB");
        let here = Path::new("/");
        assert_eq!(
            wal_bound(Path::new("/no/such/place"), here),
            bound_on(disk::space(here).ok().map(|s| s.total))
        );
    }
}
