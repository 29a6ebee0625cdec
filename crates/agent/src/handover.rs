//! What a leader does around a planned handover, so that it is short: before it, while clients still write, and after.

use std::sync::Arc;
use std::time::Duration;

use craton_pg::PgError;
use tokio::time::{Instant, sleep};

use crate::act::{Actor, QUERY_MAX};

/// A checkpoint under load.
const CHECKPOINT_MAX: Duration = Duration::from_secs(300);
/// A WAL segment with no more than this in it is not worth ending, in bytes.
const SEGMENT_USED_MIN: u32 = 1024 * 1024;
/// Nor is one that has more left than PostgreSQL's usual segment holds: the standbys would have to receive that first.
const SEGMENT_LEFT_MAX: u32 = 16 * 1024 * 1024;
/// The standbys get the rest of an ended segment for so long before clients are held.
const SEGMENT_MAX: Duration = Duration::from_secs(2);
/// Between two looks at how far the standbys are.
const SEGMENT_LOOK: Duration = Duration::from_millis(10);
/// A new leader's first commits have the disk for themselves for so long.
const FIRST_COMMITS: Duration = Duration::from_millis(400);

impl Actor {
    /// Before clients are held: what would otherwise be done while they wait.
    ///
    /// A checkpoint leaves little for the one of the shutdown. A WAL segment that has just begun leaves little to what
    /// follows: standbys get the segment in which a timeline begins from its start (`RequestXLogStreaming` rounds
    /// down), and a promotion beyond three quarters of one makes the next (`PreallocXlogFiles`), 16 MiB each.
    pub(crate) async fn prepare_handover(&self) -> Result<(), PgError> {
        let control = &self.server.control;
        control.checkpoint(CHECKPOINT_MAX).await?;
        // Only for speed: whatever goes wrong here, the handover goes on.
        if let Err(error) = self.begin_segment().await {
            tracing::info!(%error, "a new WAL segment could not be prepared: the handover takes a moment longer");
        }
        Ok(())
    }

    async fn begin_segment(&self) -> Result<(), PgError> {
        let control = &self.server.control;
        let ended = control.end_wal_segment(SEGMENT_USED_MIN, SEGMENT_LEFT_MAX, QUERY_MAX);
        if !ended.await? {
            return Ok(());
        }
        // The rest of the segment goes to the standbys as it is; commits wait behind it.
        let begins = control.current_flush_lsn(QUERY_MAX).await?;
        let due = Instant::now() + SEGMENT_MAX;
        while control.standbys_behind(begins, QUERY_MAX).await? > 0 && Instant::now() < due {
            sleep(SEGMENT_LOOK).await;
        }
        Ok(())
    }

    /// The first checkpoint on a new timeline: until then pg_rewind on the others sees the old one. Clients that have
    /// waited for this leader come first: their commits need the same disk.
    pub(crate) fn checkpoint_soon(&self) {
        let server = Arc::clone(&self.server);
        tokio::spawn(async move {
            sleep(FIRST_COMMITS).await;
            match server.control.checkpoint(CHECKPOINT_MAX).await {
                Ok(()) => server.data_changed(),
                Err(error) => {
                    tracing::warn!(%error, "the first checkpoint on the new timeline failed");
                }
            }
            server.poke();
        });
    }
}
