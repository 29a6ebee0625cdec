//! `/live`: whether the agent makes progress, whatever its PostgreSQL is at. `/health` says whether it serves.
//!
//! Who restarts what is not well (a container platform) must look here: a clone, a recovery or a rewind would begin
//! anew with every restart.

use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use craton_console::server::Health;
use craton_core::BootTime;
use tokio::sync::watch;

use crate::agent::Seen;
use crate::clock;

/// The agent's loop takes a step many times a second; what it waits for in between has bounds far below this.
const STEP_MAX: Duration = Duration::from_secs(60);

#[derive(Clone)]
struct Looked {
    seen: watch::Receiver<Option<Seen>>,
    born: BootTime,
}

/// The route, for anybody.
pub(crate) fn routes(seen: watch::Receiver<Option<Seen>>) -> Router {
    let born = clock::now();
    Router::new()
        .route("/live", get(live))
        .with_state(Looked { seen, born })
}

async fn live(State(looked): State<Looked>) -> Response {
    let newest = looked.seen.borrow().clone();
    let (last, doing) = match &newest {
        Some(seen) => (seen.0.now, crate::views::own_status(&seen.0, &seen.1).doing),
        None => (looked.born, "starting".to_owned()),
    };
    let health = judge(clock::now().since(last), doing);
    let status = if health.ok {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(health)).into_response()
}

fn judge(since: Duration, doing: String) -> Health {
    if since <= STEP_MAX {
        return Health::ok(doing);
    }
    let problem = format!(
        "the agent has taken no step for {} s; it was at: {doing}",
        since.as_secs()
    );
    Health::failing("stuck", problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_is_alive_and_a_stuck_loop_is_not() {
        let alive = judge(Duration::from_secs(1), "cloning from a: 3 %".to_owned());
        assert!(alive.ok && alive.problems.is_empty(), "{alive:?}");
        assert_eq!(alive.state, "cloning from a: 3 %");
        assert!(judge(STEP_MAX, String::new()).ok);
        let stuck = judge(Duration::from_secs(61), "rewinding".to_owned());
        assert!(!stuck.ok && stuck.problems[0].contains("61 s"), "{stuck:?}");
    }

    #[tokio::test]
    async fn an_agent_that_has_just_started_is_alive() {
        let (_tx, seen) = watch::channel(None);
        let now = clock::now();
        let look = |born| Looked {
            seen: seen.clone(),
            born,
        };
        let young = live(State(look(now))).await;
        assert_eq!(young.status(), StatusCode::OK);
        let old = live(State(look(BootTime(0)))).await;
        let up_long = now.since(BootTime(0)) > STEP_MAX;
        let expected = if up_long {
            StatusCode::SERVICE_UNAVAILABLE
        } else {
            StatusCode::OK
        };
        assert_eq!(old.status(), expected);
    }
}
