//! [`ModelStore`] behind the trait.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use craton_core::{BootTime, MemberId, Term};
use tokio::sync::watch;

use super::ModelStore;
use crate::api::{
    Answer, Coordinator, CoordinatorError, LeaseHint, Presence, PresenceMap, Renewal, Snapshot,
    Txn, TxnOutcome,
};
use crate::clock::Clock;

/// What all members of one in-memory cluster share.
struct Shared {
    store: Mutex<ModelStore>,
    snapshot: watch::Sender<Arc<Snapshot>>,
    presence: watch::Sender<PresenceMap>,
}

/// One member's view of an in-memory coordinator.
#[derive(Clone)]
pub struct Model {
    me: MemberId,
    clock: Clock,
    shared: Arc<Shared>,
}

impl Model {
    /// One handle per member, all over the same store.
    pub fn cluster(members: &[MemberId]) -> Vec<Self> {
        let shared = Arc::new(Shared {
            store: Mutex::new(ModelStore::new()),
            snapshot: watch::Sender::new(Arc::default()),
            presence: watch::Sender::new(Arc::default()),
        });
        let handle = |me: &MemberId| Self {
            me: me.clone(),
            clock: Clock::system(),
            shared: Arc::clone(&shared),
        };
        members.iter().map(handle).collect()
    }

    fn store(&self) -> MutexGuard<'_, ModelStore> {
        // Nothing in here panics half-way through a change.
        self.shared
            .store
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn ready<'a, T: Send + 'a>(result: Result<T, CoordinatorError>) -> Answer<'a, T> {
    Box::pin(std::future::ready(result))
}

impl Coordinator for Model {
    fn read(&self) -> Answer<'_, Arc<Snapshot>> {
        ready(Ok(self.store().read()))
    }

    fn txn(&self, txn: Txn) -> Answer<'_, TxnOutcome> {
        let mut store = self.store();
        let outcome = store.txn(&txn);
        self.shared.snapshot.send_replace(store.read());
        ready(outcome)
    }

    fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.shared.snapshot.subscribe()
    }

    fn renew(&self, term: Term, ttl: Duration) -> Answer<'_, Renewal> {
        let now = self.clock.now();
        ready(self.store().renew(now, now, &self.me, term, ttl))
    }

    fn release(&self, term: Term) -> Answer<'_, ()> {
        ready(self.store().release(self.clock.now(), &self.me, term))
    }

    fn free(&self, term: Term) -> Answer<'_, bool> {
        ready(Ok(self.store().free(self.clock.now(), term)))
    }

    fn lease_hint(&self) -> LeaseHint {
        self.store().lease_hint(self.clock.now())
    }

    fn announce(&self, value: String) {
        let heard_at: BootTime = self.clock.now();
        self.shared.presence.send_modify(|map| {
            let all: &mut BTreeMap<_, _> = Arc::make_mut(map);
            all.insert(self.me.clone(), Presence { heard_at, value });
        });
    }

    fn presence(&self) -> watch::Receiver<PresenceMap> {
        self.shared.presence.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance;

    #[tokio::test]
    async fn the_model_conforms() {
        let members: Vec<_> = ["a", "b", "c"]
            .into_iter()
            .map(|m| MemberId::new(m).unwrap())
            .collect();
        let handles: Vec<conformance::Handle> = Model::cluster(&members)
            .into_iter()
            .zip(members)
            .map(|(model, id)| (id, Arc::new(model) as Arc<dyn Coordinator>))
            .collect();
        conformance::run(&handles).await;
    }
}
