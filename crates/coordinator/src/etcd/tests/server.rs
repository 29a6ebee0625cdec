//! etcd servers, and members of a cluster whose records are there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use craton_core::MemberId;

use crate::api::{
    Answer, Coordinator, LeaseHint, Presence, PresenceMap, Renewal, Snapshot, Txn, TxnOutcome,
};
use crate::clock::Clock;
use crate::conformance::Handle;
use crate::etcd::Etcd;
use crate::place::{Backend, Place};
use craton_core::Term;
use tokio::sync::watch;

#[path = "../../../../../tests/etcd/servers.rs"]
mod servers;

pub(super) use servers::{Certificates, PATIENCE};

/// Real etcd servers, killed when the test ends.
pub(super) use servers::Etcd as Servers;

/// How they are reached.
pub(super) fn place(servers: &Servers) -> Place {
    Place {
        backend: Backend::Etcd,
        endpoints: servers.urls(),
        ..Place::default()
    }
}

/// Presence among the members of a test; nothing else of it works.
struct Room {
    me: MemberId,
    map: watch::Sender<PresenceMap>,
}

impl Coordinator for Room {
    fn read(&self) -> Answer<'_, Arc<Snapshot>> {
        unreachable!("carries presence only")
    }
    fn txn(&self, _: Txn) -> Answer<'_, TxnOutcome> {
        unreachable!("carries presence only")
    }
    fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        unreachable!("carries presence only")
    }
    fn renew(&self, _: Term, _: Duration) -> Answer<'_, Renewal> {
        unreachable!("carries presence only")
    }
    fn release(&self, _: Term) -> Answer<'_, ()> {
        unreachable!("carries presence only")
    }
    fn free(&self, _: Term) -> Answer<'_, bool> {
        unreachable!("carries presence only")
    }
    fn lease_hint(&self) -> LeaseHint {
        LeaseHint::Unknown
    }
    fn announce(&self, value: String) {
        let heard_at = Clock::system().now();
        self.map.send_modify(|map| {
            Arc::make_mut(map).insert(self.me.clone(), Presence { heard_at, value });
        });
    }
    fn presence(&self) -> watch::Receiver<PresenceMap> {
        self.map.subscribe()
    }
}

pub(super) fn room(i: usize) -> Arc<dyn Coordinator> {
    Arc::new(Room {
        me: id(i),
        map: watch::Sender::default(),
    })
}

/// The members of one cluster.
pub(super) struct Members(pub(super) BTreeMap<MemberId, Arc<Etcd>>);

impl Members {
    pub(super) fn handles(&self) -> Vec<Handle> {
        self.0
            .iter()
            .map(|(id, etcd)| (id.clone(), Arc::clone(etcd) as Arc<dyn Coordinator>))
            .collect()
    }

    pub(super) fn nth(&self, n: usize) -> Arc<Etcd> {
        Arc::clone(self.0.values().nth(n).unwrap())
    }
}

pub(super) fn id(i: usize) -> MemberId {
    MemberId::new(format!("m{i}")).unwrap()
}

pub(super) async fn members(place: &Place, n: usize) -> Members {
    let map = watch::Sender::new(PresenceMap::default());
    let start = |i: usize| {
        let room = Room {
            me: id(i),
            map: map.clone(),
        };
        let etcd = Etcd::start(place, "test", id(i), Arc::new(room)).unwrap();
        (id(i), etcd)
    };
    let members = Members((0..n).map(start).collect());
    crate::conformance::settle(&members.handles()).await;
    members
}

pub(super) async fn stop(members: Members) {
    for etcd in members.0.values() {
        etcd.stop().await;
    }
}
