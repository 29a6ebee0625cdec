//! What is asked of an etcd without being a member: before a cluster is made there, and after one is removed.

use super::client::{Client, Repeat};
use super::wire::{DeleteTold, Range, RangeTold};
use crate::place::{Backend, Place};

fn client(place: &Place) -> Result<Client, String> {
    place.validate()?;
    if place.backend != Backend::Etcd {
        return Err("coordinator.backend is not \"etcd\"".to_owned());
    }
    Client::new(place)
}

/// Whether a new cluster of this name can keep its records there. To be called inside a tokio runtime.
pub async fn vacant(place: &Place, cluster: &str) -> Result<(), String> {
    let prefix = place.prefix_of(cluster);
    let ask = Range::of(prefix.clone());
    let told: RangeTold = client(place)?
        .call("/v3/kv/range", &ask, Repeat::Freely)
        .await
        .map_err(|e| e.to_string())?;
    if told.kvs.is_empty() {
        return Ok(());
    }
    Err(format!(
        "a cluster keeps its records in {place} under {prefix} already ({} keys)",
        told.kvs.len()
    ))
}

/// Removes the records of a cluster that is no more; how many keys there were. To be called inside a tokio runtime.
pub async fn purge(place: &Place, cluster: &str) -> Result<u64, String> {
    let ask = Range::of(place.prefix_of(cluster));
    let told: DeleteTold = client(place)?
        .call("/v3/kv/deleterange", &ask, Repeat::Freely)
        .await
        .map_err(|e| e.to_string())?;
    Ok(told.deleted.0)
}
