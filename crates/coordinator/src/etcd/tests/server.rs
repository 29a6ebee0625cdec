//! etcd servers, and members of a cluster whose records are there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use craton_core::MemberId;

use crate::api::{
    Answer, Coordinator, CoordinatorError, LeaseHint, Presence, PresenceMap, Renewal, Snapshot,
    Txn, TxnOutcome,
};
use crate::clock::Clock;
use crate::conformance::{Handle, put};
use crate::etcd::Etcd;
use crate::place::{Backend, Place};
use craton_core::Term;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

#[path = "../../../../../tests/etcd/servers.rs"]
mod servers;

pub(super) use servers::{Certificates, PATIENCE};

/// Real etcd servers, killed when the test ends.
pub(super) use servers::Etcd as Servers;

/// Until something is asked again.
const PAUSE: Duration = Duration::from_millis(100);

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

/// Asks until the answer is the one that must come: one call has little time for a login, or for a disk that stalls.
pub(super) async fn soon<T: std::fmt::Debug>(
    what: &str,
    mut ask: impl AsyncFnMut() -> T,
    good: impl Fn(&T) -> bool,
) {
    let due = Instant::now() + PATIENCE;
    loop {
        let told = ask().await;
        if good(&told) {
            return;
        }
        assert!(Instant::now() < due, "{what}: {told:?}");
        sleep(PAUSE).await;
    }
}

/// Asks until it is done.
pub(super) async fn done<T: std::fmt::Debug>(
    what: &str,
    ask: impl AsyncFnMut() -> Result<T, CoordinatorError>,
) {
    soon(what, ask, |told| match told {
        Ok(_) => true,
        Err(CoordinatorError::Unavailable(_) | CoordinatorError::Unknown(_)) => false,
        Err(e) => panic!("{what}: {e}"),
    })
    .await;
}

/// Writes a key that is new; at which revision it is there.
pub(super) async fn write(etcd: &Etcd, key: &str) -> u64 {
    let due = Instant::now() + PATIENCE;
    loop {
        let told = etcd.txn(put(key, 0, "1")).await;
        if let Ok(TxnOutcome::Committed(revision)) = told {
            return revision;
        }
        // An earlier try may have done it.
        if let Ok(seen) = etcd.read().await
            && let Some(at) = seen.get(key)
        {
            return at.mod_revision;
        }
        assert!(Instant::now() < due, "{key}: {told:?}");
        sleep(PAUSE).await;
    }
}

/// `etcdctl`, which gives up sooner than a busy machine; what it printed once it was content.
pub(super) async fn ctl(servers: &Servers, arguments: &[&str]) -> String {
    let due = Instant::now() + PATIENCE;
    loop {
        let (out, ok) = servers.ctl(arguments);
        // What an earlier try did is done.
        if ok || out.contains("already exists") || out.contains("has been compacted") {
            return out;
        }
        assert!(Instant::now() < due, "{arguments:?}: {out}");
        sleep(PAUSE).await;
    }
}

pub(super) async fn stop(members: Members) {
    for etcd in members.0.values() {
        etcd.stop().await;
    }
}
