//! Physical replication slots: one per member, on every member, so that a promotion loses no WAL that
//! anyone still needs. All three operations work on a primary and on a standby.

use std::time::Duration;

use craton_core::Lsn;

use crate::control::{Control, literal};
use crate::error::Result;

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
