//! What limits the guarantees on this member, for `craton doctor`: settings of PostgreSQL, and how the fence runs.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use craton_console::views::{FenceView, GuaranteesView, WeakSettingView};
use craton_fence::boottime_ns;

use super::{Api, starting};

/// PostgreSQL reads its files for the answer.
const QUERY_MAX: Duration = Duration::from_secs(1);

/// `GET /v1/guarantees`.
pub(super) async fn show(State(api): State<Api>) -> Response {
    let member = api.seen.borrow().as_ref().map(|seen| seen.0.me.id.clone());
    let Some(member) = member else {
        return starting();
    };
    let (settings, error) = match api.server.sample() {
        Some(_) => match api.server.control.weakenings(QUERY_MAX).await {
            Ok(found) => (found, None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        },
        None => (Vec::new(), Some("PostgreSQL does not run".to_owned())),
    };
    let fence = api.actor.fencing.report().map(|r| FenceView {
        alive: r.is_alive(boottime_ns()),
        memory_locked: r.locked,
        hurried: r.hurried,
    });
    let settings = settings.into_iter().map(|w| WeakSettingView {
        name: w.name,
        value: w.value,
        place: w.place,
        shared: w.shared,
    });
    Json(GuaranteesView {
        member,
        settings: settings.collect(),
        error,
        fence: fence.unwrap_or_default(),
    })
    .into_response()
}
