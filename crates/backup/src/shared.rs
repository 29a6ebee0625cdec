//! What the daemon's tasks tell each other.

use std::sync::{Arc, OnceLock};

use craton_core::{Lsn, MemberId, TimelineId};
use craton_trust::Trust;
use tokio::sync::{Notify, watch};

use crate::config::Config;
use crate::copy::Copy;
use crate::metrics::BackupMetrics;
use crate::store::{Repository, now_ms};
use crate::views::RunsView;

/// Where the WAL receiver is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Streaming {
    /// Streams from this member now.
    pub(crate) from: Option<MemberId>,
    /// The timeline received last.
    pub(crate) timeline: TimelineId,
    /// On stable storage up to here.
    pub(crate) flushed: Lsn,
    /// The end of the WAL on the server, as last heard.
    pub(crate) server_end: Lsn,
    /// Why it does not stream.
    pub(crate) error: Option<String>,
}

/// Shared by receiver, scheduler and HTTP.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: Config,
    /// The certificate; none where TLS is off.
    pub(crate) trust: Option<Arc<Trust>>,
    pub(crate) metrics: BackupMetrics,
    /// The daemon as a synchronous copy; none where it is none.
    pub(crate) copy: Option<Arc<Copy>>,
    /// Set once the first leader has told whose WAL it is.
    pub(crate) repository: OnceLock<Repository>,
    pub(crate) streaming: watch::Sender<Streaming>,
    pub(crate) runs: watch::Sender<RunsView>,
    /// A whole segment waits to be compressed.
    pub(crate) segment_done: Notify,
    /// WAL is lost: only a new base backup makes the time after that restorable.
    pub(crate) backup_needed: Notify,
}

impl Shared {
    pub(crate) fn new(
        config: Config,
        trust: Option<Arc<Trust>>,
        metrics: BackupMetrics,
        copy: Option<Arc<Copy>>,
    ) -> Self {
        Self {
            config,
            trust,
            metrics,
            copy,
            repository: OnceLock::new(),
            streaming: watch::Sender::new(Streaming::default()),
            runs: watch::Sender::new(RunsView {
                since_ms: now_ms(),
                ..RunsView::default()
            }),
            segment_done: Notify::new(),
            backup_needed: Notify::new(),
        }
    }
}

/// Returns when the daemon is to stop.
pub(crate) async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone, which is a shutdown as well.
    let _ = shutdown.wait_for(|stop| *stop).await;
}
