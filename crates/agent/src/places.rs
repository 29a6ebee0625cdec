//! Where the cluster's records are: opens stores, and begins in the one that this member used last.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use craton_coordinator::api::Coordinator;
use craton_coordinator::embedded::Embedded;
use craton_coordinator::etcd::Etcd;
use craton_coordinator::place::{Backend, Place};
use craton_coordinator::placed::{Opener, Placed, remembered};
use craton_core::MemberId;
use tokio::runtime::Handle;

use crate::config::AgentConfig;

/// So many stores in etcd are kept open beside those in use: a move needs two, and whoever asks for one again soon
/// must get the same.
const KEPT_MAX: usize = 4;

/// The file in a member's directory that says where the records were last.
fn memory(dir: &Path) -> PathBuf {
    dir.join("coordinator").join("place.json")
}

/// Where the member of this directory found the records last; none: in the members themselves.
pub fn last_place(member_dir: &Path) -> Result<Option<Place>, String> {
    Ok(remembered(&memory(member_dir))?.map(|note| note.place))
}

/// The stores in etcd that are open.
#[derive(Default)]
struct Open {
    all: Vec<(Place, Weak<Etcd>)>,
    kept: VecDeque<Arc<Etcd>>,
}

/// Opens stores for one member.
struct Stores {
    embedded: Arc<Embedded>,
    cluster: String,
    me: MemberId,
    /// This host's own way to etcd: its certificate may lie elsewhere than on the others.
    settings: Place,
    /// Carries what keeps the lease.
    runtime: Handle,
    open: Mutex<Open>,
}

impl Stores {
    fn open(&self, place: &Place) -> Result<Arc<dyn Coordinator>, String> {
        if place.backend == Backend::Embedded {
            return Ok(Arc::clone(&self.embedded) as Arc<dyn Coordinator>);
        }
        let place = if place.is_same_store(&self.settings) {
            &self.settings
        } else {
            place
        };
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.all.retain(|(_, store)| store.strong_count() > 0);
        let known = open.all.iter().find(|(p, _)| p == place);
        if let Some(store) = known.and_then(|(_, store)| store.upgrade()) {
            return Ok(store);
        }
        let _inside = self.runtime.enter();
        let presence = Arc::clone(&self.embedded) as Arc<dyn Coordinator>;
        let store = Etcd::start(place, &self.cluster, self.me.clone(), presence)?;
        open.all.push((place.clone(), Arc::downgrade(&store)));
        open.kept.push_back(Arc::clone(&store));
        if open.kept.len() > KEPT_MAX {
            open.kept.pop_front();
        }
        Ok(store)
    }
}

/// Begins where the records were last. `runtime` carries the lease.
pub fn follow(
    config: &AgentConfig,
    embedded: &Arc<Embedded>,
    runtime: &Handle,
) -> Result<Arc<Placed>, String> {
    let stores = Stores {
        embedded: Arc::clone(embedded),
        cluster: config.cluster.clone(),
        me: config.member.clone(),
        settings: config.coordinator.clone(),
        runtime: runtime.clone(),
        open: Mutex::default(),
    };
    let open: Opener = Arc::new(move |place| stores.open(place));
    let _inside = runtime.enter();
    let presence = Arc::clone(embedded) as Arc<dyn Coordinator>;
    Placed::start(
        config.member.clone(),
        config.coordinator.clone(),
        memory(&config.dir),
        open,
        presence,
    )
}
