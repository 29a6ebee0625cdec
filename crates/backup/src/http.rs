//! The daemon's API under `/v1/backup`.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use craton_console::Health;
use craton_console::server::failure;
use craton_core::receiver::{SealRequest, WAL_PART_MAX};
use craton_repo::manifest::BackupId;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::catalog;
use crate::error::{BackupError, Result};
use crate::receiver::blocking;
use crate::scheduler::Request;
use crate::shared::Shared;
use crate::store::Repository;
use crate::views::{BackupStatusView, Phase, RunAcceptedView, RunsView};

/// How long a request for a backup may take to be accepted.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long removing a backup may take; it goes on to its end in any case.
const DELETE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a request waits for a run that is about to end.
const ENDING_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone)]
struct Api {
    shared: Arc<Shared>,
    requests: mpsc::Sender<Request>,
}

pub(crate) fn routes(shared: Arc<Shared>, requests: mpsc::Sender<Request>) -> Router {
    Router::new()
        .route("/v1/backup/run", post(run))
        .route("/v1/backup/delete", post(delete))
        .route("/v1/backup/list", get(list))
        .route("/v1/backup/show/{id}", get(show))
        .route("/v1/backup/runs", get(runs))
        .route("/v1/backup/status", get(status))
        .route("/v1/receiver", get(receiver))
        .route("/v1/receiver/seal", post(seal))
        .route("/v1/receiver/wal/{name}", get(wal))
        .with_state(Api { shared, requests })
}

pub(crate) fn health(shared: &Shared) -> Health {
    let streaming = shared.streaming.borrow();
    match (&streaming.from, &streaming.error) {
        (Some(_), _) => Health::ok("streaming"),
        (None, Some(error)) => Health::failing("disconnected", error.clone()),
        (None, None) => Health::failing("waiting", "no leader is known yet"),
    }
}

/// True while a base backup runs. One that writes its manifest is waited for: who sees a backup in
/// the catalog may ask for the next thing, and is not told that it runs.
async fn is_running(runs: &watch::Sender<RunsView>) -> bool {
    let mut runs = runs.subscribe();
    let settled = runs.wait_for(|runs| {
        runs.running
            .as_ref()
            .is_none_or(|r| r.phase != Phase::Ending)
    });
    match timeout(ENDING_TIMEOUT, settled).await {
        Ok(Ok(runs)) => runs.is_under_way(),
        _ => true,
    }
}

async fn run(State(api): State<Api>) -> Response {
    if is_running(&api.shared.runs).await {
        return failure(
            StatusCode::CONFLICT,
            "a backup runs already",
            Some("watch it: craton backup list"),
        );
    }
    if api.shared.repository.get().is_none() {
        return failure(
            StatusCode::SERVICE_UNAVAILABLE,
            "no leader has been reached yet; a backup needs one",
            Some("see which member leads: craton status"),
        );
    }
    let (answer, accepted) = oneshot::channel();
    if api.requests.try_send(Request::Run(answer)).is_err() {
        return failure(
            StatusCode::CONFLICT,
            "other requests wait already",
            Some("try again later"),
        );
    }
    match timeout(ACCEPT_TIMEOUT, accepted).await {
        Ok(Ok(run)) => {
            let since_ms = api.shared.runs.borrow().since_ms;
            let accepted = RunAcceptedView { run, since_ms };
            (StatusCode::ACCEPTED, Json(accepted)).into_response()
        }
        _ => failure(
            StatusCode::CONFLICT,
            "the daemon is busy with another backup",
            Some("try again later"),
        ),
    }
}

/// The body of a request to remove a backup.
#[derive(Deserialize)]
struct DeleteRequest {
    id: BackupId,
}

async fn delete(
    State(api): State<Api>,
    Json(DeleteRequest { id }): Json<DeleteRequest>,
) -> Response {
    let busy = || {
        failure(
            StatusCode::CONFLICT,
            "a backup runs at this moment, and nothing is removed beside it",
            Some("ask again when it has ended: craton backup status"),
        )
    };
    if is_running(&api.shared.runs).await {
        return busy();
    }
    let (answer, done) = oneshot::channel();
    if api.requests.try_send(Request::Delete(id, answer)).is_err() {
        return busy();
    }
    match timeout(DELETE_TIMEOUT, done).await {
        Ok(Ok(Ok(swept))) => Json(swept).into_response(),
        Ok(Ok(Err(error @ BackupError::Refused(_)))) => {
            failure(StatusCode::CONFLICT, &error.to_string(), None)
        }
        Ok(Ok(Err(error))) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string(), None),
        // The daemon ends.
        Ok(Err(_)) => busy(),
        // A backup began before the scheduler came to the removal: it drops what nobody waits for any more.
        Err(_) if api.shared.runs.borrow().is_under_way() => busy(),
        Err(_) => failure(
            StatusCode::GATEWAY_TIMEOUT,
            &format!(
                "the backup is not removed after {} s; the removal goes on",
                DELETE_TIMEOUT.as_secs()
            ),
            Some("craton backup list says when it is gone"),
        ),
    }
}

async fn list(State(api): State<Api>) -> Response {
    answer(read(&api, catalog::list).await)
}

async fn show(State(api): State<Api>, Path(id): Path<String>) -> Response {
    let Ok(id) = BackupId::new(id) else {
        return failure(
            StatusCode::NOT_FOUND,
            "that is not the name of a backup",
            Some("see craton backup list"),
        );
    };
    answer(read(&api, move |r| catalog::show(r, &id)).await)
}

/// What runs, without a look at the repository: for those who ask again and again.
async fn runs(State(api): State<Api>) -> Response {
    let runs = api.shared.runs.borrow().clone();
    Json(runs).into_response()
}

async fn status(State(api): State<Api>) -> Response {
    let streaming = api.shared.streaming.borrow().clone();
    let runs = api.shared.runs.borrow().clone();
    let mut view = BackupStatusView {
        streaming_from: streaming.from.map(Into::into),
        error: streaming.error,
        timeline: streaming.timeline,
        flushed_lsn: streaming.flushed,
        lag_bytes: streaming.server_end.bytes_since(streaming.flushed),
        runs,
        backups: 0,
        newest_ended_at: None,
        missing_wal: Vec::new(),
        repository_bytes: 0,
        retention_days: api.shared.config.retention_days,
    };
    if api.shared.repository.get().is_none() {
        return answer(Ok(view));
    }
    let stored = read(&api, |r| {
        Ok((catalog::list(r)?, catalog::missing_wal(r)?, r.size_bytes()?))
    })
    .await;
    answer(stored.map(|(list, missing_wal, repository_bytes)| {
        view.backups = list.backups.len() as u64;
        view.newest_ended_at = list.backups.last().map(|b| b.ended_at);
        view.missing_wal = missing_wal;
        view.repository_bytes = repository_bytes;
        view
    }))
}

fn no_copy() -> Response {
    failure(
        StatusCode::NOT_FOUND,
        "this daemon is no synchronous copy, or the cluster does not know it yet",
        Some("backup.synchronous makes it one"),
    )
}

/// What this daemon is as a synchronous copy.
async fn receiver(State(api): State<Api>) -> Response {
    let streaming = api.shared.streaming.borrow().clone();
    let copy = api.shared.copy.as_ref();
    let status =
        copy.and_then(|c| c.status((streaming.timeline, streaming.flushed), streaming.from));
    status.map_or_else(no_copy, |status| Json(status).into_response())
}

async fn seal(State(api): State<Api>, Json(request): Json<SealRequest>) -> Response {
    let (Some(copy), Some(repository)) = (&api.shared.copy, api.shared.repository.get()) else {
        return no_copy();
    };
    match copy.seal(&request, repository.clone()).await {
        Ok(seal) => Json(seal).into_response(),
        Err(error) => failure(StatusCode::CONFLICT, &error.to_string(), None),
    }
}

/// A part of a WAL or history file, from `offset` on; fewer bytes than [`WAL_PART_MAX`] are the end of it.
async fn wal(
    State(api): State<Api>,
    Path(name): Path<String>,
    Query(Part { offset }): Query<Part>,
) -> Response {
    let found = read(&api, move |r| crate::wal_fetch::raw(r, &name)).await;
    match found {
        Ok(Some(bytes)) => {
            let rest = bytes.get(offset..).unwrap_or_default();
            let part = rest.get(..WAL_PART_MAX.min(rest.len())).unwrap_or_default();
            part.to_vec().into_response()
        }
        Ok(None) => failure(StatusCode::NOT_FOUND, "that has not been received", None),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string(), None),
    }
}

#[derive(Deserialize)]
struct Part {
    #[serde(default)]
    offset: usize,
}

async fn read<T: Send + 'static>(
    api: &Api,
    work: impl FnOnce(&Repository) -> Result<T> + Send + 'static,
) -> Result<T> {
    let repository = api
        .shared
        .repository
        .get()
        .cloned()
        .map_or_else(|| Repository::open(&api.shared.config.repository), Ok)?;
    blocking(move || work(&repository)).await
}

fn answer<T: Serialize>(outcome: Result<T>) -> Response {
    match outcome {
        Ok(view) => Json(view).into_response(),
        Err(error @ BackupError::Refused(_)) => {
            failure(StatusCode::NOT_FOUND, &error.to_string(), None)
        }
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string(), None),
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use super::*;
    use crate::views::ProgressView;

    fn in_phase(phase: Phase) -> Option<ProgressView> {
        Some(ProgressView {
            id: BackupId::new("one").ok()?,
            phase,
            source: "m1".into(),
            done_bytes: 1,
            total_bytes: 1,
            percent: 99,
        })
    }

    #[tokio::test]
    async fn a_run_that_is_about_to_end_is_waited_for_and_no_other() {
        let runs = watch::Sender::new(RunsView::default());
        assert!(!is_running(&runs).await);
        runs.send_modify(|r| r.requested = 1);
        assert!(is_running(&runs).await, "begun, and not yet at the server");
        for phase in [Phase::Checkpoint, Phase::Reading, Phase::WaitingForWal] {
            runs.send_modify(|r| r.running = in_phase(phase));
            assert!(is_running(&runs).await, "{phase:?}");
        }
        runs.send_modify(|r| r.running = in_phase(Phase::Ending));
        let mut asked = std::pin::pin!(is_running(&runs));
        assert_eq!(poll_once(&mut asked).await, Poll::Pending);
        runs.send_modify(|r| {
            r.running = None;
            r.last = Some(crate::views::RunResultView {
                run: 1,
                backup: None,
                error: None,
            });
        });
        assert!(!asked.await);
    }

    async fn poll_once<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
        std::future::poll_fn(|cx| Poll::Ready(std::pin::Pin::new(&mut *future).poll(cx))).await
    }
}
