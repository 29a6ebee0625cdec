//! The client against the server, over loopback.
#![allow(clippy::unwrap_used, reason = "helpers of a test may fail it")]

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::{get, post};
use craton_console::client::ClientError;
use craton_console::server::{failure, stream_topology};
use craton_console::views::SwitchoverRequest;
use craton_console::{Client, Health, Metrics, Service, Token, TopologyFeed, serve};
use craton_core::Term;
use craton_core::topology::Topology;
use tokio::net::TcpListener;
use tokio::sync::watch;

const TOKEN: &str = "0123456789abcdef0123";

fn topology(revision: u64) -> Arc<Topology> {
    Arc::new(Topology {
        cluster: "test".into(),
        system_id: None,
        term: Term(1),
        revision,
        writable: None,
        hold: false,
        members: Vec::new(),
    })
}

struct Running {
    address: String,
    stop: watch::Sender<bool>,
    topology: watch::Sender<Arc<Topology>>,
    served: tokio::task::JoinHandle<std::io::Result<()>>,
}

async fn start() -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut metrics = Metrics::new();
    metrics.counter("craton_test", "A test").inc();
    let (topology, seen) = watch::channel(topology(1));
    let routes = Router::new()
        .route(
            "/v1/echo",
            post(async |body: axum::Json<SwitchoverRequest>| body),
        )
        .route(
            "/v1/no",
            get(async || {
                failure(
                    axum::http::StatusCode::CONFLICT,
                    "it cannot be",
                    Some("wait"),
                )
            }),
        )
        .route(
            "/v1/topology/stream",
            get(async move || stream_topology(seen)),
        );
    let service = Service::new(Arc::new(metrics), || {
        Health::failing("down", "no PostgreSQL")
    })
    .with_api(routes, Token::new(TOKEN));
    let (stop, stopped) = watch::channel(false);
    let served = tokio::spawn(serve(listener, service.router(), None, stopped));
    Running {
        address,
        stop,
        topology,
        served,
    }
}

#[tokio::test]
async fn open_pages_need_no_token_and_the_api_does() {
    let server = start().await;
    let stranger = Client::new(None);
    let text = stranger
        .get_text(&server.address, "/metrics")
        .await
        .unwrap();
    assert!(text.contains("craton_test_total 1"), "{text}");
    let health = stranger
        .get_text(&server.address, "/health")
        .await
        .unwrap_err();
    assert!(
        matches!(health, ClientError::Refused { status: 503, .. }),
        "{health}"
    );

    let request = SwitchoverRequest::default();
    for client in [stranger, Client::new(Token::new("another-token-entirely"))] {
        let error = client
            .post_json::<_, SwitchoverRequest>(&server.address, "/v1/echo", &request)
            .await
            .unwrap_err();
        assert!(
            matches!(error, ClientError::Refused { status: 401, .. }),
            "{error}"
        );
        assert!(
            client
                .stream_lines(&server.address, "/v1/topology/stream")
                .await
                .is_err()
        );
    }
    let friend = Client::new(Token::new(TOKEN));
    let echoed: SwitchoverRequest = friend
        .post_json(&server.address, "/v1/echo", &request)
        .await
        .unwrap();
    assert_eq!(echoed, request);
    let error = friend
        .get_text(&server.address, "/v1/no")
        .await
        .unwrap_err();
    assert_eq!(
        (error.to_string().as_str(), error.hint()),
        ("it cannot be", Some("wait"))
    );
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused() {
    let server = start().await;
    let friend = Client::new(Token::new(TOKEN));
    let big = "x".repeat(craton_console::server::REQUEST_BODY_MAX + 1);
    let error = friend
        .post_json::<_, SwitchoverRequest>(&server.address, "/v1/echo", &big)
        .await
        .unwrap_err();
    // The server may close before it read everything: then the connection breaks instead.
    assert!(
        matches!(
            error,
            ClientError::Refused { status: 413, .. } | ClientError::Broken { .. }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn errors_name_the_address() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let client = Client::new(None).with_timeout(Duration::from_millis(50));
    let error = client.get_text(&address, "/health").await.unwrap_err();
    assert!(
        error.to_string().contains(&address) && matches!(error, ClientError::TimedOut { .. }),
        "{error}"
    );
    drop(listener);
    let patient = Client::new(None).with_timeout(Duration::from_secs(30));
    let error = patient.get_text(&address, "/health").await.unwrap_err();
    assert!(
        error.to_string().contains(&address) && error.never_sent(),
        "{error}"
    );
}

#[tokio::test]
async fn the_feed_follows_changes_and_keeps_what_it_knew() {
    let server = start().await;
    let client = Client::new(Token::new(TOKEN));
    let feed = TopologyFeed::start(vec![server.address.clone()], &client);
    let mut newest = feed.subscribe();
    let limit = Duration::from_secs(30);
    let wait = async |newest: &mut watch::Receiver<Option<Arc<Topology>>>, revision: u64| {
        let seen = newest.wait_for(|t| t.as_ref().is_some_and(|t| t.revision == revision));
        tokio::time::timeout(limit, seen).await.unwrap().unwrap();
    };
    wait(&mut newest, 1).await;
    // An agent that is not heard for some seconds does not count until it is heard again.
    let connected = async {
        while feed.agents_connected() != 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(limit, connected).await.unwrap();
    server.topology.send_replace(topology(2));
    wait(&mut newest, 2).await;

    // A shutdown ends although a stream is open, and what was known stays.
    server.stop.send_replace(true);
    tokio::time::timeout(limit, server.served)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(newest.borrow().as_ref().map(|t| t.revision), Some(2));
}
