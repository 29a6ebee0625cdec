//! The HTTP side of a daemon: `/metrics` and `/health` for anyone who reaches the port, `/v1/` for whoever
//! shows a certificate with a fitting role ([`crate::access`]), or knows the token.
//!
//! One port for both: a certificate of the client is asked for and may be missing, and what needs one refuses then.
//! So Prometheus and load balancers need nothing but https.
//!
//! Strangers cost little: there is room for few of them at once, the newest pushes out the oldest, and each has
//! [`STRANGER_TIME_MAX`] for its request and the answer. One request a connection.

use std::io;
use std::net::SocketAddr;
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
use craton_trust::doorstep::{Doorstep, Known, Refusals, WAITING_MAX};
use craton_trust::{Identity, Role, Stream, Trust};
use futures_util::stream;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::access;
use crate::metrics::Metrics;
use crate::token::Token;
use crate::views::ErrorView;

/// The largest request body that is read, in bytes.
pub const REQUEST_BODY_MAX: usize = 64 * 1024;

/// How often a topology stream says something even when nothing changed.
pub const TOPOLOGY_KEEP_ALIVE: Duration = Duration::from_secs(1);

/// How long the head of a request may take to arrive.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection may last whose other end has shown neither a certificate nor the token.
pub const STRANGER_TIME_MAX: Duration = Duration::from_secs(10);

/// The largest head of a request, in bytes.
pub const REQUEST_HEAD_MAX: usize = 16 * 1024;

/// Connections at once whose other end is known.
pub const KNOWN_MAX: usize = 512;

/// After a failed accept (no file descriptors), this long until the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

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
    api: Option<(Router, Guard)>,
    open: Router,
}

/// What opens `/v1/`.
#[derive(Clone, Debug)]
struct Guard {
    token: Option<Token>,
}

/// Who is at the other end of a connection; among the extensions of its requests.
#[derive(Clone, Debug, Default)]
pub struct Visitor {
    /// From its certificate.
    pub identity: Option<Identity>,
    /// The hosts that its certificate names.
    pub hosts: Vec<String>,
    known: Known,
}

impl Service {
    /// Metrics and health only.
    pub fn new(metrics: Arc<Metrics>, health: impl Fn() -> Health + Send + Sync + 'static) -> Self {
        Self {
            metrics,
            health: Arc::new(health),
            api: None,
            open: Router::new(),
        }
    }

    /// Adds routes (written with their full path, `/v1/…`) for holders of certificates with a fitting role, and for
    /// the bearer of `token`, where there is one: it counts as [`Role::Operator`].
    #[must_use]
    pub fn with_api(mut self, routes: Router, token: Option<Token>) -> Self {
        self.api = Some((routes, Guard { token }));
        self
    }

    /// Adds routes that anybody reaches: they have to check by themselves what they are shown.
    #[must_use]
    pub fn with_open(mut self, routes: Router) -> Self {
        self.open = self.open.merge(routes);
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
            Some((routes, guard)) => routes.layer(middleware::from_fn_with_state(guard, admit)),
            None => Router::new(),
        };
        open.merge(self.open)
            .merge(guarded)
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

/// Lets a request through, or says what is missing. Its body is not looked at before.
async fn admit(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let visitor = request.extensions().get::<Visitor>().cloned();
    let visitor = visitor.unwrap_or_default();
    let given = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|v| v.to_str().ok());
    let by_token = given
        .zip(guard.token.as_ref())
        .is_some_and(|(given, token)| token.admits(given));
    let role = match (&visitor.identity, by_token) {
        (_, true) => Some(Role::Operator),
        (Some(identity), false) => Some(identity.role),
        (None, false) => None,
    };
    match role {
        Some(role) if access::may(role, request.method(), request.uri().path()) => {
            visitor.known.set();
            next.run(request).await
        }
        Some(role) => failure(
            StatusCode::FORBIDDEN,
            &format!(
                "a certificate with the role {role} does not open {} {}",
                request.method(),
                request.uri().path()
            ),
            Some(
                "use an operator's certificate: `craton join` gets one; docs/guide/security.md lists who may do what",
            ),
        ),
        None => {
            let mut answer = failure(
                StatusCode::UNAUTHORIZED,
                "this needs a certificate of the cluster's authority, or the API token",
                Some(
                    "name one with --cert and --authority (`craton join` gets one), or a token with --token-file",
                ),
            );
            answer
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            answer
        }
    }
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
/// [`SHUTDOWN_GRACE`]. Without `trust` everything is plain HTTP: for isolated tests.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    trust: Option<Arc<Trust>>,
    mut shutdown: watch::Receiver<bool>,
) -> io::Result<()> {
    let refusals = Arc::new(Refusals::new("control API"));
    let mut doorstep = Doorstep::new(WAITING_MAX);
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // An error means that the sender is gone, which is a shutdown as well.
            _ = shutdown.wait_for(|stop| *stop) => break,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                refusals.count(None, &error);
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if connections.len() >= KNOWN_MAX + WAITING_MAX {
            refusals.count(Some(from), &"too many connections are open");
            continue;
        }
        let connection = Connection {
            router: router.clone(),
            trust: trust.clone(),
            known: Known::default(),
            from,
            refusals: Arc::clone(&refusals),
        };
        let known = connection.known.clone();
        if trust.is_none() {
            // Nobody can show a certificate; a stream must not end for that.
            known.set();
        }
        let task = connections.spawn(connection.serve(stream));
        if doorstep.arrived(task, known) {
            refusals.count(
                Some(from),
                &"too many strangers at once; the oldest was cut off",
            );
        }
    }
    drop(listener);
    let _ = tokio::time::timeout(SHUTDOWN_GRACE, async {
        while connections.join_next().await.is_some() {}
    })
    .await;
    Ok(())
}

/// One connection and what it needs.
struct Connection {
    router: Router,
    trust: Option<Arc<Trust>>,
    known: Known,
    from: SocketAddr,
    refusals: Arc<Refusals>,
}

impl Connection {
    async fn serve(self, stream: TcpStream) {
        let known = self.known.clone();
        let mut served = std::pin::pin!(self.serve_unbounded(stream));
        if tokio::time::timeout(STRANGER_TIME_MAX, &mut served)
            .await
            .is_err()
            && known.is_set()
        {
            served.await;
        }
    }

    async fn serve_unbounded(self, stream: TcpStream) {
        // Best effort: without it answers are later, not wrong.
        let _ = stream.set_nodelay(true);
        let (stream, identity) = match &self.trust {
            None => (Stream::Plain(stream), None),
            Some(trust) => match trust.accept(stream).await {
                Ok(accepted) => accepted,
                Err(error) => return self.refusals.count(Some(self.from), &error),
            },
        };
        if identity.is_some() {
            self.known.set();
        }
        let visitor = Visitor {
            identity,
            hosts: stream.peer_hosts(),
            known: self.known,
        };
        let router = self.router.layer(axum::Extension(visitor));
        let served = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(REQUEST_HEAD_MAX)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
            .await;
        if let Err(error) = served {
            tracing::debug!(from = %self.from, %error, "a request broke off");
        }
    }
}
