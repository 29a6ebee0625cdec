//! Three voters in one process, on real sockets and real files.

mod cluster;
mod disks;
mod faults;
mod hostile;
mod members;

use self::cluster::Cluster;
use crate::conformance;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_voters_conform() {
    let cluster = Cluster::start(3).await;
    conformance::run(&cluster.handles()).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_voters_with_certificates_conform() {
    let cluster = Cluster::start_trusted(3).await;
    conformance::run(&cluster.handles()).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_voter_conforms() {
    let cluster = Cluster::start(1).await;
    conformance::run(&cluster.handles()).await;
    cluster.stop().await;
}
