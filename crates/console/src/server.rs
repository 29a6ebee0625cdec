//! The HTTP side of a daemon: `/metrics` and `/health` for anyone who reaches the port, `/v1/` for the
//! bearer of the token alone.
//!
//! Transport security is the next step: a TLS acceptor goes between the listener and [`serve`], and
//! nothing here changes.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use craton_core::topology::Topology;
use futures_util::stream;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::metrics::Metrics;
use crate::token::Token;
use crate::views::ErrorView;

/// The largest request body that is read, in bytes.
pub const REQUEST_BODY_MAX: usize = 64 * 1024;

/// How often a topology stream says something even when nothing changed.
pub const TOPOLOGY_KEEP_ALIVE: Duration = Duration::from_secs(1);

/// How long open requests may go on after a shutdown was asked for. Streams never end by themselves.
pub const SHUTDOWN_GRACE: Duration = Duration::from_millis(500);

/// The answer of `/health`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Health {
    /// Decides the status code: 200 or 503.
    pub ok: bool,
    /// The role or state in a word, for people and probes.
    pub state: String,
    /// What is wrong, when something is.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

impl Health {
    /// Healthy, in this state.
    pub fn ok(state: impl Into<String>) -> Self {
        Self {
            ok: true,
            state: state.into(),
            problems: Vec::new(),
        }
    }

    /// Not healthy, for this reason.
    pub fn failing(state: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            ok: false,
            state: state.into(),
            problems: vec![problem.into()],
        }
    }
}

type HealthProbe = Arc<dyn Fn() -> Health + Send + Sync>;

/// What a daemon serves; build the router with [`Service::router`].
pub struct Service {
    metrics: Arc<Metrics>,
    health: HealthProbe,
    api: Option<(Router, Token)>,
}

impl Service {
    /// Metrics and health only.
    pub fn new(metrics: Arc<Metrics>, health: impl Fn() -> Health + Send + Sync + 'static) -> Self {
        Self {
            metrics,
            health: Arc::new(health),
            api: None,
        }
    }

    /// Adds routes (written with their full path, `/v1/…`) that only the bearer of `token` reaches.
    #[must_use]
    pub fn with_api(mut self, routes: Router, token: Token) -> Self {
        self.api = Some((routes, token));
        self
    }

    /// The routes of this service.
    pub fn router(self) -> Router {
        let open = Router::new()
            .route("/metrics", get(metrics_page))
            .with_state(self.metrics)
            .merge(
                Router::new()
                    .route("/health", get(health_page))
                    .with_state(self.health),
            );
        let guarded = match self.api {
            Some((routes, token)) => {
                routes.layer(middleware::from_fn_with_state(token, require_token))
            }
            None => Router::new(),
        };
        open.merge(guarded)
            .fallback(not_found)
            .layer(DefaultBodyLimit::max(REQUEST_BODY_MAX))
    }
}

async fn metrics_page(State(metrics): State<Arc<Metrics>>) -> Response {
    match metrics.text() {
        Ok(text) => {
            let kind = HeaderValue::from_static(
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
            );
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => failure(
            StatusCode::INTERNAL_SERVER_ERROR,
            &format!("cannot write the metrics: {error}"),
            None,
        ),
    }
}

async fn health_page(State(probe): State<HealthProbe>) -> Response {
    let health = probe();
    let status = if health.ok {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(health)).into_response()
}

async fn not_found(request: Request) -> Response {
    failure(
        StatusCode::NOT_FOUND,
        &format!("there is no {} here", request.uri().path()),
        None,
    )
}

async fn require_token(State(token): State<Token>, request: Request, next: Next) -> Response {
    let given = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|v| v.to_str().ok());
    if given.is_some_and(|given| token.admits(given)) {
        return next.run(request).await;
    }
    let mut answer = failure(
        StatusCode::UNAUTHORIZED,
        "this needs the cluster's API token",
        Some("send it as \"Authorization: Bearer …\"; `craton up` keeps it in secrets/api-token"),
    );
    answer
        .headers_mut()
        .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    answer
}

/// A JSON error answer: what went wrong, and what to do about it.
pub fn failure(status: StatusCode, error: &str, hint: Option<&str>) -> Response {
    let view = ErrorView {
        error: error.to_owned(),
        hint: hint.map(ToOwned::to_owned),
    };
    (status, Json(view)).into_response()
}

/// Newline-delimited JSON of a topology: one line at once, one per change, and one at least every
/// [`TOPOLOGY_KEEP_ALIVE`]. Ends when the sender is gone.
pub fn stream_topology(mut topology: watch::Receiver<Arc<Topology>>) -> Response {
    topology.mark_changed();
    let lines = stream::unfold(topology, async |mut topology| {
        // A time-out here is the keep-alive; only a closed channel ends the stream.
        if let Ok(Err(_)) = tokio::time::timeout(TOPOLOGY_KEEP_ALIVE, topology.changed()).await {
            return None;
        }
        let current = Arc::clone(&topology.borrow_and_update());
        let line = serde_json::to_string(current.as_ref()).map(|mut line| {
            line.push('\n');
            line
        });
        Some((line, topology))
    });
    (
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(lines),
    )
        .into_response()
}

/// Serves until `shutdown` turns true (or its sender is gone), and lets open requests finish within
/// [`SHUTDOWN_GRACE`].
pub async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: watch::Receiver<bool>,
) -> io::Result<()> {
    let mut ended = shutdown.clone();
    let server = axum::serve(listener, router).with_graceful_shutdown(stopped(shutdown));
    let grace = async {
        let _ = ended.wait_for(|stop| *stop).await;
        tokio::time::sleep(SHUTDOWN_GRACE).await;
    };
    tokio::select! {
        done = server => done,
        () = grace => Ok(()),
    }
}

async fn stopped(mut shutdown: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is a shutdown as well.
    let _ = shutdown.wait_for(|stop| *stop).await;
}
