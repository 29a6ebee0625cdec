//! The daemon's metrics.

use craton_console::Metrics;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;

/// Handles of everything that is counted.
#[derive(Clone, Debug)]
pub struct BackupMetrics {
    pub(crate) streaming: Gauge,
    pub(crate) received_lsn: Gauge,
    pub(crate) lag_bytes: Gauge,
    pub(crate) timeline: Gauge,
    pub(crate) wal_received_bytes: Counter,
    pub(crate) segments_archived: Counter,
    pub(crate) reconnects: Counter,
    pub(crate) wal_conflicts: Counter,
    pub(crate) gaps: Gauge,
    pub(crate) backups: Gauge,
    pub(crate) last_end: Gauge,
    pub(crate) last_size: Gauge,
    pub(crate) last_stored: Gauge,
    pub(crate) last_duration: Gauge,
    pub(crate) oldest_end: Gauge,
    pub(crate) running: Gauge,
    pub(crate) failures: Counter,
    pub(crate) removed: Counter,
    pub(crate) repository_bytes: Gauge,
}

impl BackupMetrics {
    /// Registers everything.
    pub fn register(m: &mut Metrics) -> Self {
        Self {
            streaming: m.gauge("craton_backup_streaming", "1 while WAL is streamed from the leader, else 0"),
            received_lsn: m.gauge(
                "craton_backup_wal_flushed_bytes",
                "WAL position up to which everything received is on stable storage, in bytes from 0/0",
            ),
            lag_bytes: m.gauge("craton_backup_wal_lag_bytes", "WAL that the leader has and the repository does not yet"),
            timeline: m.gauge("craton_backup_timeline", "Timeline that is received"),
            wal_received_bytes: m.counter("craton_backup_wal_received_bytes", "WAL received since the daemon started"),
            segments_archived: m
                .counter("craton_backup_segments_archived", "Whole WAL segments stored since the daemon started"),
            reconnects: m.counter("craton_backup_reconnects", "Times the WAL stream had to be started anew"),
            wal_conflicts: m.counter(
                "craton_backup_wal_conflicts",
                "Times a server sent other bytes for WAL that was received before; must stay 0",
            ),
            gaps: m.gauge(
                "craton_backup_wal_missing_segments",
                "WAL segments missing since the oldest backup; must be 0, otherwise a new base backup is due",
            ),
            backups: m.gauge("craton_backup_backups", "Backups in the repository"),
            last_end: m.gauge("craton_backup_last_end_timestamp_seconds", "When the newest backup ended, Unix time; 0: never"),
            last_size: m.gauge("craton_backup_last_size_bytes", "Size of the newest backup's files"),
            last_stored: m.gauge("craton_backup_last_stored_bytes", "What the newest backup added to the repository"),
            last_duration: m.gauge("craton_backup_last_duration_seconds", "How long the newest backup took"),
            oldest_end: m.gauge(
                "craton_backup_oldest_end_timestamp_seconds",
                "When the oldest backup ended, Unix time: the earliest time that can be restored; 0: none",
            ),
            running: m.gauge("craton_backup_running", "1 while a base backup runs, else 0"),
            failures: m.counter("craton_backup_failures", "Base backups that failed since the daemon started"),
            removed: m.counter("craton_backup_removed", "Backups removed since the daemon started, by age or by hand"),
            repository_bytes: m.gauge("craton_backup_repository_bytes", "Size of the repository"),
        }
    }
}

/// A gauge's value from an unsigned number.
pub(crate) fn whole(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
