//! Counts for the metrics page.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counters since the start of this process. All are totals unless they say otherwise.
#[derive(Debug, Default)]
pub(super) struct Stats {
    syncs: AtomicU64,
    sync_nanos: AtomicU64,
    sync_nanos_max: AtomicU64,
    pub(super) messages_dropped: AtomicU64,
    pub(super) renewals: AtomicU64,
    pub(super) renewals_failed: AtomicU64,
    pub(super) reconnects: AtomicU64,
    pub(super) connections_refused: AtomicU64,
}

impl Stats {
    pub(super) fn synced(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.syncs.fetch_add(1, Ordering::Relaxed);
        self.sync_nanos.fetch_add(nanos, Ordering::Relaxed);
        self.sync_nanos_max.fetch_max(nanos, Ordering::Relaxed);
    }

    pub(super) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Counters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            syncs: get(&self.syncs),
            sync_time: Duration::from_nanos(get(&self.sync_nanos)),
            sync_time_max: Duration::from_nanos(get(&self.sync_nanos_max)),
            messages_dropped: get(&self.messages_dropped),
            renewals: get(&self.renewals),
            renewals_failed: get(&self.renewals_failed),
            reconnects: get(&self.reconnects),
            connections_refused: get(&self.connections_refused),
        }
    }
}

/// Totals since this process started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Times the log was synced.
    pub syncs: u64,
    /// Time spent in writing and syncing.
    pub sync_time: Duration,
    /// The longest single write and sync.
    pub sync_time_max: Duration,
    /// Raft messages dropped because a peer did not take them fast enough.
    pub messages_dropped: u64,
    /// Lease renewals asked for by this process.
    pub renewals: u64,
    /// Those that no majority accepted in time.
    pub renewals_failed: u64,
    /// Connections to peers that were made, the first ones included.
    pub reconnects: u64,
    /// Incoming connections that failed to prove themselves, or sent nonsense.
    pub connections_refused: u64,
}
