use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use craton_trust::Role;
use craton_trust::authority::Authority;

use super::cluster::{Cluster, id, trust, until};
use crate::conformance::settle;
use crate::embedded::Embedded;
use crate::raft::Standing;

/// The connection ends, and nothing else.
async fn is_cut(mut stream: TcpStream) {
    let mut sink = [0; 256];
    let ended = timeout(Duration::from_secs(30), async {
        while stream.read(&mut sink).await.is_ok_and(|n| n > 0) {}
    });
    assert!(ended.await.is_ok(), "the connection was not cut");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_costs_only_the_connection() {
    shout_at(Cluster::start(3).await).await;
    shout_at(Cluster::start_trusted(3).await).await;
}

async fn shout_at(cluster: Cluster) {
    let address = cluster.config(&id(0)).listen;
    let hello = |version: u32, from: &str| {
        let nonce = vec![7_u8; 32];
        format!(
            r#"{{"version":{version},"cluster":"test","from":"{from}","to":"m0","purpose":"raft","nonce":{nonce:?}}}"#
        )
        .into_bytes()
    };
    let framed = |payload: &[u8]| {
        let mut frame = u32::try_from(payload.len()).unwrap().to_le_bytes().to_vec();
        frame.extend_from_slice(&[0; 16]);
        frame.extend_from_slice(payload);
        frame
    };
    let inputs = [
        b"GET / HTTP/1.0\r\n\r\n".to_vec(),
        vec![0xFF; 4096],
        vec![0; 64],
        framed(b"{}"),
        framed(&hello(1, "m1")),
        framed(&hello(2, "m1")),
        framed(&hello(1, "m9")),
        // Slow: begins and never ends.
        vec![10, 0],
    ];
    for input in inputs {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(&input).await.unwrap();
        is_cut(stream).await;
    }
    // A connection is counted after it was cut.
    until("all are counted", || async {
        cluster.nodes[&id(0)].counters().connections_refused >= 8
    })
    .await;
    settle(&cluster.handles()).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_secret_or_cluster_is_not_let_in() {
    let mut cluster = Cluster::new(2);
    cluster.start_node(&id(0)).await;
    for (name, secret) in [("test", Some("some other secret there")), ("other", None)] {
        let mut config = cluster.config(&id(1));
        config.cluster = name.to_owned();
        if let Some(secret) = secret {
            config.secret = secret.to_owned();
        }
        let stranger = Embedded::start(config).await.unwrap();
        let refused = cluster.nodes[&id(0)].counters().connections_refused;
        until("it is refused", || async {
            cluster.nodes[&id(0)].counters().connections_refused > refused
        })
        .await;
        assert_eq!(stranger.status().standing, Standing::Fresh);
        stranger.stop().await;
    }
    cluster.start_node(&id(1)).await;
    settle(&cluster.handles()).await;
    cluster.stop().await;
}

/// The secret and the cluster's name are right; only the certificate is not the member's own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_opens_the_way_for_its_own_member_alone() {
    let mut cluster = Cluster::start_trusted(3).await;
    settle(&cluster.handles()).await;
    let victim = id(1);
    cluster.nodes[&victim].stop().await;
    cluster.kill(&victim);
    let dir = tempfile::tempdir().unwrap();
    let authority = cluster.authority.take().unwrap();
    let stranger = Authority::create("test").unwrap();
    let wrong = [
        (
            "another member's",
            Some(trust(dir.path(), &authority, Role::Node, "m2")),
        ),
        (
            "a proxy's",
            Some(trust(dir.path(), &authority, Role::Proxy, "m1")),
        ),
        (
            "another authority's",
            Some(trust(dir.path(), &stranger, Role::Node, "m1")),
        ),
        ("none, and no TLS", None),
    ];
    for (what, trust) in wrong {
        let mut config = cluster.config(&victim);
        config.dir = dir.path().join(what);
        config.trust = trust;
        let refused = cluster.nodes[&id(0)].counters().connections_refused;
        let impostor = Embedded::start(config).await.unwrap();
        // The others also refuse to send anything to it: what they dial is not the member that they want.
        until(what, || async {
            cluster.nodes[&id(0)].counters().connections_refused > refused + 4
        })
        .await;
        assert_eq!(impostor.status().standing, Standing::Fresh, "{what}");
        impostor.stop().await;
    }
    cluster.start_node(&victim).await;
    settle(&cluster.handles()).await;
    cluster.stop().await;
}

/// As many connections that say nothing as there is room for do not keep a peer out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_silence_does_not_keep_out_a_peer() {
    let mut cluster = Cluster::start_trusted(3).await;
    settle(&cluster.handles()).await;
    let (flooded, peer) = (id(0), id(1));
    cluster.kill(&peer);
    let address = cluster.config(&flooded).listen;
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(TcpStream::connect(&address).await.unwrap());
    }
    cluster.start_node(&peer).await;
    cluster.kill(&id(2));
    // Only these two are left: nothing goes on unless they reach each other.
    cluster.write(&peer, "flooded", "1").await;
    drop(silent);
    cluster.stop().await;
}
