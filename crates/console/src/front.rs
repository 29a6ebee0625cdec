//! What a container shows in the clear on one port: the daemon's metrics and health, and who it is.
//!
//! The daemon itself speaks TLS to those who have certificates. Dashboards and probes of container platforms have
//! none; what they get here opens nothing.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::{Deserialize, Serialize};

use crate::client::{Client, ClientError};
use crate::server::Health;

/// How long the daemon may take to answer.
const DAEMON_TIMEOUT: Duration = Duration::from_secs(3);

/// What a container says about itself to anybody.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct AboutView {
    /// The cluster's name.
    pub cluster: String,
    /// `node`, `proxy` or `backup`.
    pub kind: String,
    /// True while a node has no data and belongs to no cluster yet.
    #[serde(default)]
    pub fresh: bool,
    /// A node's member name.
    #[serde(default)]
    pub member: Option<String>,
    /// A node's name in the old stack's commands.
    #[serde(default)]
    pub node_name: Option<String>,
    /// A node's number in the old stack's commands.
    #[serde(default)]
    pub node_id: Option<u32>,
    /// A node's preference in elections.
    #[serde(default)]
    pub priority: Option<u32>,
    /// The host that a node is told to follow, by its environment.
    #[serde(default)]
    pub follows: Option<String>,
}

/// Further lines for the page of metrics.
pub type More = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = String> + Send>> + Send + Sync>;

/// What is shown.
#[derive(Clone)]
pub struct Front {
    /// A client that the daemon answers.
    pub client: Client,
    /// The daemon's address in this container.
    pub daemon: String,
    /// Who this is.
    pub about: Arc<dyn Fn() -> AboutView + Send + Sync>,
    /// Metrics under other names.
    pub more: More,
}

impl Front {
    /// The routes.
    pub fn router(self) -> Router {
        Router::new()
            .route("/metrics", get(metrics))
            .route("/health", get(health))
            .route("/about", get(about))
            .with_state(self)
    }
}

async fn about(State(front): State<Front>) -> Response {
    Json((front.about)()).into_response()
}

async fn health(State(front): State<Front>) -> Response {
    let client = front.client.clone().with_timeout(DAEMON_TIMEOUT);
    match client.get_text(&front.daemon, "/health").await {
        Ok(text) => text.into_response(),
        Err(ClientError::Refused { error, .. }) => {
            (StatusCode::SERVICE_UNAVAILABLE, error).into_response()
        }
        Err(error) => {
            let health = Health::failing("unreachable", error.to_string());
            (StatusCode::SERVICE_UNAVAILABLE, Json(health)).into_response()
        }
    }
}

async fn metrics(State(front): State<Front>) -> Response {
    let client = front.client.clone().with_timeout(DAEMON_TIMEOUT);
    let own = match client.get_text(&front.daemon, "/metrics").await {
        Ok(text) => text,
        // What is known without the daemon is shown all the same: that it is down is one of these facts.
        Err(error) => {
            tracing::debug!(%error, "no metrics from the daemon");
            String::new()
        }
    };
    let more = (front.more)().await;
    let end = "# EOF\n";
    let own = own.strip_suffix(end).unwrap_or(&own);
    let kind =
        HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], format!("{own}{more}{end}")).into_response()
}
