//! Against real etcd servers. Without one on the machine these tests fail: `make setup` installs it.

mod faults;
mod server;
mod trust;

use self::server::{Servers, members, place, stop};
use crate::conformance;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_server_conforms() {
    let servers = Servers::start(1);
    let members = members(&place(&servers), 3).await;
    conformance::run(&members.handles()).await;
    stop(members).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_servers_conform() {
    let servers = Servers::start(3);
    let members = members(&place(&servers), 3).await;
    conformance::run(&members.handles()).await;
    stop(members).await;
}
