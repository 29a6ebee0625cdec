//! When base backups are taken: at the start when there is none, on schedule, when WAL was lost,
//! and when asked. One at a time; and between them, when old ones go.

use std::sync::Arc;
use std::time::Duration;

use craton_core::topology::{MemberRole, Topology, TopologyMember};
use craton_repo::manifest::{BackupId, Summary};
use craton_repo::retention::Policy;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use crate::base_backup;
use crate::error::{BackupError, Result};
use crate::expire;
use crate::metrics::whole;
use crate::receiver::blocking;
use crate::shared::{Shared, stopped};
use crate::store::now_ms;
use crate::views::{BackupView, RunResultView, SweptView};

/// The first and the longest pause before a failed backup of the schedule is tried again.
const RETRY_MIN: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(300);
/// How often the schedule is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How many requests may wait.
pub(crate) const REQUESTS_MAX: usize = 4;

/// How often the policy is looked at, besides after each backup.
const EXPIRE_INTERVAL: Duration = Duration::from_secs(3600);

/// What is asked of the scheduler.
#[derive(Debug)]
pub(crate) enum Request {
    /// A backup; the answer is the run's number.
    Run(oneshot::Sender<u64>),
    /// The end of a backup.
    Delete(BackupId, oneshot::Sender<Result<SweptView>>),
}

pub(crate) struct Scheduler {
    pub(crate) shared: Arc<Shared>,
    pub(crate) topology: watch::Receiver<Option<Arc<Topology>>>,
    pub(crate) requests: mpsc::Receiver<Request>,
    pub(crate) shutdown: watch::Receiver<bool>,
}

impl Scheduler {
    /// Runs until shutdown.
    pub(crate) async fn run(mut self) {
        let mut pause = RETRY_MIN;
        let mut not_before = Instant::now();
        let mut needed = false;
        let mut expire_at = Instant::now();
        loop {
            let mut shutdown = self.shutdown.clone();
            let asked = tokio::select! {
                request = self.requests.recv() => match request {
                    // Whoever asked was told meanwhile that it does not run.
                    Some(Request::Run(answer)) if answer.is_closed() => continue,
                    Some(Request::Run(answer)) => Some(answer),
                    Some(Request::Delete(id, answer)) => {
                        self.delete(id, answer).await;
                        continue;
                    }
                    None => return,
                },
                () = self.shared.backup_needed.notified() => { needed = true; None }
                () = sleep_until(not_before.max(Instant::now() + LOOK_INTERVAL)) => None,
                () = stopped(&mut shutdown) => return,
            };
            // Whoever asks is told soon that it begins; what goes, goes after it.
            if asked.is_none() && Instant::now() >= expire_at {
                self.expire().await;
                expire_at = Instant::now() + EXPIRE_INTERVAL;
            }
            let due = asked.is_some()
                || (Instant::now() >= not_before && (needed || self.is_due().await));
            if !due || (asked.is_none() && self.shared.streaming.borrow().from.is_none()) {
                continue;
            }
            let run = self.begin(asked);
            let outcome = tokio::select! {
                outcome = self.take() => outcome,
                () = stopped(&mut shutdown) => return,
            };
            if outcome.is_ok() {
                (needed, pause, not_before) = (false, RETRY_MIN, Instant::now());
                expire_at = Instant::now();
            } else {
                not_before = Instant::now() + pause;
                pause = (pause * 2).min(RETRY_MAX);
            }
            self.end(run, outcome);
        }
    }

    /// True when the schedule wants a backup.
    async fn is_due(&self) -> bool {
        let config = &self.shared.config;
        let Some(repository) = self.shared.repository.get().cloned() else {
            return false;
        };
        let newest =
            blocking(move || Ok(repository.summaries()?.0.last().map(|s| s.ended_at_ms))).await;
        match newest {
            Ok(None) => config.backup_on_start || config.backup_interval_s > 0,
            Ok(Some(ended)) => {
                config.backup_interval_s > 0
                    && now_ms().saturating_sub(ended) / 1000 >= config.backup_interval_s
            }
            Err(error) => {
                tracing::warn!(%error, "cannot see which backups there are");
                false
            }
        }
    }

    /// Lets go what the policy does not keep.
    async fn expire(&self) {
        let config = &self.shared.config;
        let Some(policy) = expire::policy(config.retention_days, config.retention_backups) else {
            return;
        };
        let swept = self.sweep(Some(policy), None).await;
        if let Err(error) = swept {
            tracing::warn!(%error, "old backups are kept for now");
        }
    }

    /// Removes one backup, unless whoever asked has gone meanwhile.
    async fn delete(&self, id: BackupId, answer: oneshot::Sender<Result<SweptView>>) {
        if !answer.is_closed() {
            let _ = answer.send(self.sweep(None, Some(id)).await);
        }
    }

    async fn sweep(&self, policy: Option<Policy>, also: Option<BackupId>) -> Result<SweptView> {
        let Some(repository) = self.shared.repository.get().cloned() else {
            return Ok(SweptView::default());
        };
        let swept =
            blocking(move || expire::sweep(&repository, policy, also.as_ref(), now_ms())).await?;
        for id in &swept.backups {
            tracing::info!(backup = %id, "backup removed");
        }
        if !swept.backups.is_empty() {
            let metrics = &self.shared.metrics;
            metrics.removed.inc_by(swept.backups.len() as u64);
            tracing::info!(
                segments = swept.segments,
                bytes = swept.bytes,
                "what only removed backups needed is gone"
            );
        }
        Ok(swept)
    }

    fn begin(&self, asked: Option<oneshot::Sender<u64>>) -> u64 {
        let mut run = 0;
        self.shared.runs.send_modify(|runs| {
            runs.requested += 1;
            run = runs.requested;
        });
        if let Some(answer) = asked {
            // Whoever asked may have gone; the backup is taken all the same.
            let _ = answer.send(run);
        }
        self.shared.metrics.running.set(1);
        run
    }

    async fn take(&self) -> Result<Summary> {
        let source = self.source().ok_or_else(|| {
            BackupError::Refused("there is no leader now; a backup needs one".into())
        })?;
        base_backup::take(&self.shared, &source).await
    }

    /// Who a backup is read from.
    fn source(&self) -> Option<TopologyMember> {
        let topology = self.topology.borrow().clone()?;
        let leader = topology.leader()?;
        let standby = topology
            .members
            .iter()
            .filter(|m| {
                self.shared.config.prefer_standby && m.role == MemberRole::Standby && m.streaming
            })
            .max_by_key(|m| m.replay_lsn);
        Some(standby.unwrap_or(leader).clone())
    }

    fn end(&self, run: u64, outcome: Result<Summary>) {
        let metrics = &self.shared.metrics;
        metrics.running.set(0);
        let result = match outcome {
            Ok(summary) => {
                let duration_s = summary.ended_at_ms.saturating_sub(summary.started_at_ms) / 1000;
                tracing::info!(
                    backup = %summary.id, data_bytes = summary.data_bytes, stored_bytes = summary.stored_bytes, duration_s,
                    "base backup done"
                );
                metrics.last_duration.set(whole(duration_s));
                metrics.last_size.set(whole(summary.data_bytes));
                metrics.last_stored.set(whole(summary.stored_bytes));
                metrics.last_end.set(whole(summary.ended_at_ms / 1000));
                RunResultView {
                    run,
                    backup: Some(BackupView::from(&summary)),
                    error: None,
                }
            }
            Err(error) => {
                tracing::error!(%error, "base backup failed");
                metrics.failures.inc();
                RunResultView {
                    run,
                    backup: None,
                    error: Some(error.to_string()),
                }
            }
        };
        self.shared.runs.send_modify(|runs| {
            runs.running = None;
            runs.last = Some(result);
        });
    }
}
