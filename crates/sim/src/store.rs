//! The coordinator's store: one linearizable copy; who can reach it is the network's business.

use std::collections::BTreeMap;
use std::rc::Rc;

use craton_core::records::{At, Change, ClusterView, Key, Record};

/// The store.
#[derive(Debug, Default)]
pub struct Store {
    view: Rc<ClusterView>,
}

impl Store {
    /// The newest state.
    pub fn view(&self) -> Rc<ClusterView> {
        Rc::clone(&self.view)
    }

    /// All conditions hold: all is written, under the next revision. Else nothing is.
    pub fn apply(&mut self, change: &Change) -> bool {
        let holds = change
            .expect
            .iter()
            .all(|(key, revision)| self.view.revision_of(key) == *revision);
        if !holds {
            return false;
        }
        let mut next = (*self.view).clone();
        next.revision += 1;
        let revision = next.revision;
        for record in &change.puts {
            put(&mut next, record.clone(), revision);
        }
        for key in &change.deletes {
            delete(&mut next, key);
        }
        self.view = Rc::new(next);
        true
    }
}

fn put(view: &mut ClusterView, record: Record, revision: u64) {
    fn at<T>(revision: u64, value: T) -> At<T> {
        At { revision, value }
    }
    fn insert<K: Ord, T>(map: &mut BTreeMap<K, At<T>>, key: K, revision: u64, value: T) {
        map.insert(key, at(revision, value));
    }
    match record {
        Record::Cluster(r) => view.cluster = Some(at(revision, r)),
        Record::Settings(r) => view.settings = Some(at(revision, r)),
        Record::Leadership(r) => view.leadership = Some(at(revision, r)),
        Record::Timelines(r) => view.timelines = Some(at(revision, r)),
        Record::Request(r) => view.request = Some(at(revision, r)),
        Record::History(r) => view.history = Some(at(revision, r)),
        Record::Pause(r) => view.pause = Some(at(revision, r)),
        Record::Schedule(r) => view.schedule = Some(at(revision, r)),
        Record::Restart(r) => view.restart = Some(at(revision, r)),
        Record::Order(m, r) => insert(&mut view.orders, m, revision, r),
        Record::Member(m, r) => insert(&mut view.members, m, revision, r),
        Record::Seal(m, r) => insert(&mut view.seals, m, revision, r),
        Record::Receiver(m, r) => insert(&mut view.receivers, m, revision, r),
    }
}

fn delete(view: &mut ClusterView, key: &Key) {
    match key {
        Key::Cluster => view.cluster = None,
        Key::Settings => view.settings = None,
        Key::Leadership => view.leadership = None,
        Key::Timelines => view.timelines = None,
        Key::Request => view.request = None,
        Key::History => view.history = None,
        Key::Pause => view.pause = None,
        Key::Schedule => view.schedule = None,
        Key::Restart => view.restart = None,
        Key::Order(m) => {
            view.orders.remove(m);
        }
        Key::Member(m) => {
            view.members.remove(m);
        }
        Key::Seal(m) => {
            view.seals.remove(m);
        }
        Key::Receiver(m) => {
            view.receivers.remove(m);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use craton_core::records::History;

    #[test]
    fn a_compare_that_fails_changes_nothing() {
        let mut store = Store::default();
        let change = |revision| Change {
            expect: vec![(Key::History, revision)],
            puts: vec![Record::History(History::default())],
            deletes: vec![],
        };
        assert!(store.apply(&change(0)));
        assert!(!store.apply(&change(0)));
        assert_eq!(store.view().revision, 1);
        assert!(store.apply(&change(1)));
        assert_eq!(store.view().revision_of(&Key::History), 2);
    }
}
