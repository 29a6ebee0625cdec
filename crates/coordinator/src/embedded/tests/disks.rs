use std::fs;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use craton_core::{MemberId, Term};
use tokio::time::Instant;

use super::cluster::{Cluster, id, until};
use crate::api::{Coordinator, CoordinatorError};
use crate::conformance::settle;
use crate::embedded::lease::SILENCE_AFTER_LOSS;
use crate::embedded::{Embedded, StartError};
use crate::raft::Standing;

async fn has_say(cluster: &Cluster, who: &MemberId) {
    until("it has a say", || async {
        cluster.nodes[who].status().standing == Standing::Voter
    })
    .await;
}

async fn stop_node(cluster: &mut Cluster, who: &MemberId) {
    let node = cluster.nodes.remove(who).unwrap();
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_torn_tail_is_cut() {
    let mut cluster = Cluster::start(3).await;
    cluster.write(&id(0), "a", "1").await;
    stop_node(&mut cluster, &id(1)).await;
    let mut file = fs::OpenOptions::new()
        .append(true)
        .open(cluster.file(&id(1)))
        .unwrap();
    file.write_all(&[200, 0, 0]).unwrap();
    drop(file);
    cluster.start_node(&id(1)).await;
    has_say(&cluster, &id(1)).await;
    cluster.sees(&id(1), "a", "1").await;
    assert_eq!(quarantined(&cluster, &id(1)), 0);
    cluster.stop().await;
}

fn quarantined(cluster: &Cluster, who: &MemberId) -> usize {
    let dir = cluster.file(who).parent().unwrap().to_owned();
    let names = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|n| n.starts_with("raft.log.corrupt-")).count()
}

fn damage(cluster: &Cluster, who: &MemberId) {
    let mut bytes = fs::read(cluster.file(who)).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xFF;
    fs::write(cluster.file(who), bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_log_is_put_aside_and_the_voter_readmitted() {
    let mut cluster = Cluster::start(3).await;
    cluster.write(&id(0), "a", "1").await;
    stop_node(&mut cluster, &id(1)).await;
    damage(&cluster, &id(1));
    // With another voter away, the damaged one may not make up a majority.
    stop_node(&mut cluster, &id(2)).await;
    cluster.start_node(&id(1)).await;
    let alone = cluster.nodes[&id(0)]
        .txn(crate::conformance::put("b", 0, "2"))
        .await;
    assert!(
        matches!(
            alone,
            Err(CoordinatorError::Unavailable(_) | CoordinatorError::Unknown(_))
        ),
        "{alone:?}"
    );
    assert_eq!(
        cluster.nodes[&id(1)].status().standing,
        Standing::Recovering
    );
    assert_eq!(quarantined(&cluster, &id(1)), 1);
    cluster.start_node(&id(2)).await;
    has_say(&cluster, &id(1)).await;
    cluster.sees(&id(1), "a", "1").await;
    // It counts again: the third may go.
    cluster.kill(&id(2));
    cluster.write(&id(1), "c", "3").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_disk_never_revives_a_term_that_it_called_free() {
    let mut cluster = Cluster::start(3).await;
    settle(&cluster.handles()).await;
    until("free", || async {
        cluster.nodes[&id(0)].free(Term(7)).await == Ok(true)
    })
    .await;
    stop_node(&mut cluster, &id(1)).await;
    fs::remove_dir_all(cluster.file(&id(1)).parent().unwrap()).unwrap();
    let began = Instant::now();
    cluster.start_node(&id(1)).await;
    // Until it has learnt what the others know, it has no say in the lease at all.
    let lost = Arc::clone(&cluster.nodes[&id(1)]);
    let hint_is_unknown = lost.lease_hint() == crate::api::LeaseHint::Unknown;
    assert!(hint_is_unknown || began.elapsed() >= SILENCE_AFTER_LOSS);
    has_say(&cluster, &id(1)).await;
    until("its say in the lease", || async {
        lost.lease_hint() != crate::api::LeaseHint::Unknown
    })
    .await;
    until("it is refused", || async {
        let late = lost.renew(Term(7), Duration::from_secs(1)).await;
        assert!(late.is_err(), "term 7 is over");
        matches!(late, Err(CoordinatorError::Refused(_)))
    })
    .await;
    // Its own note says so, not only the others'.
    cluster.kill(&id(2));
    until("term 8", || async {
        lost.renew(Term(8), Duration::from_secs(1)).await.is_ok()
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_directory_has_one_user() {
    let cluster = Cluster::start(1).await;
    let mut config = cluster.config(&id(0));
    config.listen = "127.0.0.1:0".to_owned();
    let second = Embedded::start(config).await;
    assert!(matches!(
        second,
        Err(StartError::Open(crate::embedded::OpenError::InUse(_)))
    ));
    cluster.stop().await;
}
