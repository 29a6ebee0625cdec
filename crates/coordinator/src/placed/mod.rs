//! A coordinator whose records can move, while the cluster runs, from one backend to another and back.
//!
//! # What is written
//! One record, `placement`, in each store. Its `generation` grows with every move; in a store that was never
//! moved to or from it is absent, which means generation 0. Every transaction through here compares its revision:
//! whoever changes `placement` stops all others at that instant.
//!
//! # A move, step by step
//! | step | who | written where | if it stops here |
//! |---|---|---|---|
//! | 1. ask | whoever is told to | old: `next` = where to | nothing has changed; asking for the old place takes it back |
//! | 2. seal | the member whose lease runs, once it has read the new store | old: `next.sealed` | the leader goes on under its old lease; everybody tries 3 |
//! | 3. copy | everybody, one wins | new: all keys, `generation` + 1, `former` = old store and its term, **one** transaction that compares the `placement` that was read | as before; the next one does it |
//! | 4. switch | everybody, each for itself | a file of its own | a member that starts again reads the old store, finds it sealed, and follows |
//! | 5. settle | the leader, once it has renewed in the new store | new: `former` is removed | elections ask both stores, which is only slower |
//!
//! # A cluster that begins elsewhere
//! Every cluster begins in the embedded store. Where the settings of a new cluster ask for another, a member seals the
//! store while it is empty (by comparing that it is), and steps 3 and 4 follow. So a member that joins, or whose
//! settings say something else, reads the embedded store first and is led to the right one.
//!
//! # Why there are never two leaders
//! * A sealed store never changes again: every transaction compares `placement`. So no election is opened or won
//!   there, and what 3 copies is final. 3 happens once: it compares the new store's `placement`.
//! * The leader's term goes on in the new store, with the same leader. Until it settles, its lease may rest on either
//!   store: so `free(t)` first asks the old store, and only then the new one. Both say what is for ever.
//! * It settles after a renewal in the new store. All its renewals in the old one were sent before that, so by the
//!   time the new store calls the term free, they are over too.
//! * A member notes the new place on disk before it switches. So one that starts and renews in the old store has never
//!   renewed in the new one, and has not settled: the new store still asks the old one. (Renewals wait for no read:
//!   an agent that is back inside its lease must not need Raft to have a leader.)
//!
//! Revisions never go back: those of the new store are shown with the old one's last revision added (`offset`).
//!
//! # A store that was emptied, or restored from an old copy
//! It counts as unavailable: see the head of `trust`.

mod note;
mod record;
mod seen;
mod steps;
#[cfg(test)]
mod tests;
mod trust;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use craton_core::{BootTime, MemberId, Term};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

pub use self::note::{Note, remembered};
use self::record::{Next, PLACEMENT, Placement, parse, shown, to_raw};
use self::steps::fits;
use self::trust::{Source, Trust};
use crate::api::{
    Answer, CALL_TIMEOUT, Compare, Coordinator, CoordinatorError, EndpointState, LeaseHint,
    Membership, PresenceMap, Renewal, Snapshot, Txn, TxnOutcome,
};
use crate::clock::Clock;
use crate::place::{Backend, Place};

/// Between two tries of a step of a move.
const STEP_PAUSE: Duration = Duration::from_millis(100);

/// How long a request to move waits for its end.
const MOVE_MAX: Duration = Duration::from_secs(30);

/// Opens a store. The same place gives the same store again.
pub type Opener = Arc<dyn Fn(&Place) -> Result<Arc<dyn Coordinator>, String> + Send + Sync>;

/// The store that is used now.
#[derive(Clone)]
struct Current {
    place: Place,
    store: Arc<dyn Coordinator>,
    placement: Placement,
    /// The revision of the placement's record in this store, 0 if there is none.
    revision: u64,
    /// It was read since this process started, or since the switch to it.
    verified: bool,
    /// It is not believed, see the head of `trust`.
    older: bool,
}

struct Shared {
    me: MemberId,
    clock: Clock,
    open: Opener,
    presence: Arc<dyn Coordinator>,
    memory: PathBuf,
    /// Where the settings want a new cluster's records.
    wish: Place,
    /// What `memory` says.
    note: Mutex<Option<Note>>,
    current: watch::Sender<Current>,
    out: watch::Sender<Arc<Snapshot>>,
    /// The last renewal in the current store: its term, and until when it counts.
    renewed: Mutex<Option<(Term, BootTime)>>,
    /// What stands in the way of the next step.
    trouble: Mutex<Option<String>>,
    /// What is made of the current store. Locked before `current` and `out` are changed together.
    trust: Mutex<Trust>,
    /// Wakes whoever keeps the records on disk.
    saving: watch::Sender<()>,
}

/// One member's way to the cluster's records, wherever they are.
pub struct Placed {
    shared: Arc<Shared>,
    tasks: Mutex<JoinSet<()>>,
}

impl Placed {
    /// Begins where the file `memory` says that the records were last, and follows them from there. Without it they
    /// are where every cluster begins, in the embedded store; a new cluster whose settings ask for another place,
    /// `wish`, moves there before its first record. `presence` carries the members' announcements. To be called
    /// inside a tokio runtime.
    pub fn start(
        me: MemberId,
        wish: Place,
        memory: PathBuf,
        open: Opener,
        presence: Arc<dyn Coordinator>,
    ) -> Result<Arc<Self>, String> {
        let note = remembered(&memory)?;
        let place = match &note {
            // The settings may know better how it is reached.
            Some(note) if note.place.is_same_store(&wish) => wish.clone(),
            Some(note) => {
                tracing::warn!(records = %note.place, settings = %wish, "the records are where they were last, not where the settings say");
                note.place.clone()
            }
            None => Place::default(),
        };
        let known = seen::load(&seen::file(&memory), &place);
        let current = Current {
            store: open(&place)?,
            place,
            placement: Placement::default(),
            revision: 0,
            verified: false,
            older: false,
        };
        let shared = Arc::new(Shared {
            me,
            clock: Clock::system(),
            open,
            presence,
            memory,
            wish,
            note: Mutex::new(note),
            current: watch::Sender::new(current),
            out: watch::Sender::new(Arc::default()),
            renewed: Mutex::default(),
            trouble: Mutex::default(),
            trust: Mutex::new(Trust::with(known)),
            saving: watch::Sender::new(()),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(Arc::clone(&shared).keep());
        tasks.spawn(Arc::clone(&shared).follow());
        tasks.spawn(Arc::clone(&shared).steps());
        Ok(Arc::new(Self {
            shared,
            tasks: Mutex::new(tasks),
        }))
    }

    /// Ends the tasks. The stores are the caller's to stop.
    pub async fn stop(&self) {
        let mut tasks =
            std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
    }
}

/// Where the records of a store were moved to, by what is in it.
pub fn moved_to(snapshot: &Snapshot) -> Option<Place> {
    let (placement, _) = parse(snapshot).ok()?;
    placement.next.filter(|n| n.sealed).map(|n| n.place)
}

fn moving() -> CoordinatorError {
    CoordinatorError::Unavailable("the records are on their way to another store".to_owned())
}

impl Shared {
    fn current(&self) -> Current {
        self.current.borrow().clone()
    }

    /// Shows the current store's changes for ever.
    async fn follow(self: Arc<Self>) {
        let mut changes = self.current.subscribe();
        loop {
            let store = Arc::clone(&changes.borrow_and_update().store);
            let mut watch = store.watch();
            loop {
                let snapshot = Arc::clone(&watch.borrow_and_update());
                // What is not believed is said where it matters.
                let _ = self.learn(&store, &snapshot, Source::Watch);
                tokio::select! {
                    changed = watch.changed() => if changed.is_err() {
                        // The store ended: wait for another.
                        let _ = changes.wait_for(|c| !Arc::ptr_eq(&c.store, &store)).await;
                        break;
                    },
                    _ = changes.changed() => if !Arc::ptr_eq(&changes.borrow().store, &store) {
                        break;
                    },
                }
            }
        }
    }
}

impl Shared {
    /// The current store, once it is certain that it was the right one to begin with.
    async fn verified(&self) -> Result<Current, CoordinatorError> {
        let mut changes = self.current.subscribe();
        let certain = changes.wait_for(|c| c.older || c.verified && !c.placement.sealed());
        let found = match timeout(CALL_TIMEOUT, certain).await {
            Ok(Ok(current)) => Ok(current.clone()),
            _ => Err(moving()),
        };
        self.believable()?;
        found
    }

    /// What is asked of a store that is not believed fails, as where it does not answer.
    fn believable(&self) -> Result<(), CoordinatorError> {
        match self.older() {
            Some(why) => Err(CoordinatorError::Unavailable(why)),
            None => Ok(()),
        }
    }

    async fn read(&self) -> Result<Arc<Snapshot>, CoordinatorError> {
        let due = Instant::now() + CALL_TIMEOUT;
        loop {
            let current = self.verified().await?;
            let source = self.about_to_read();
            let snapshot = current.store.read().await?;
            let (placement, _) = parse(&snapshot).map_err(CoordinatorError::Refused)?;
            self.learn(&current.store, &snapshot, source)
                .map_err(CoordinatorError::Unavailable)?;
            if !placement.sealed() {
                return Ok(shown(&snapshot, self.offset(&placement)));
            }
            // It was the truth once; by now the new store may know better. This member follows in a moment.
            if Instant::now() >= due {
                return Err(moving());
            }
        }
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, CoordinatorError> {
        let current = self.verified().await?;
        let offset = self.offset(&current.placement);
        let mut raw = to_raw(txn, offset)?;
        raw.compares.push(Compare {
            key: PLACEMENT.to_owned(),
            mod_revision: current.revision,
        });
        Ok(match current.store.txn(raw).await? {
            TxnOutcome::Committed(revision) => TxnOutcome::Committed(revision + offset),
            TxnOutcome::Conflict => TxnOutcome::Conflict,
        })
    }

    async fn renew(&self, term: Term, ttl: Duration) -> Result<Renewal, CoordinatorError> {
        let current = self.renewable().await?;
        let renewal = current.store.renew(term, ttl).await?;
        // Only what was renewed in the store that is current counts for a seal or a settling.
        if Arc::ptr_eq(&self.current.borrow().store, &current.store) {
            let until = renewal.sent_at.after(ttl.saturating_sub(ttl / 10));
            *self.renewed.lock().unwrap_or_else(PoisonError::into_inner) = Some((term, until));
        }
        let waits = current.placement.former.is_some() || current.placement.next.is_some();
        if waits {
            self.current.send_modify(|_| {});
        }
        Ok(renewal)
    }

    /// The store to renew in. That of the members waits for no read (see the head of this module). One outside must
    /// be known to be the one it was: in one that was emptied the same lease could be taken again.
    async fn renewable(&self) -> Result<Current, CoordinatorError> {
        let mut changes = self.current.subscribe();
        let ready =
            changes.wait_for(|c| c.older || c.verified || c.place.backend == Backend::Embedded);
        let found = match timeout(CALL_TIMEOUT, ready).await {
            Ok(Ok(current)) => Ok(current.clone()),
            _ => Err(CoordinatorError::Unavailable(
                "the records could not be read yet".to_owned(),
            )),
        };
        self.believable()?;
        found
    }

    async fn free(&self, term: Term) -> Result<bool, CoordinatorError> {
        let current = self.verified().await?;
        if let Some(former) = &current.placement.former {
            let old = (self.open)(&former.place).map_err(CoordinatorError::Unavailable)?;
            // First: the new store must not call a term over that still runs in the old one.
            if !old.free(term.min(former.term)).await? {
                return Ok(false);
            }
        }
        current.store.free(term).await
    }

    async fn release(&self, term: Term) -> Result<(), CoordinatorError> {
        self.believable()?;
        let current = self.current();
        if let Some(former) = &current.placement.former
            && term <= former.term
        {
            let old = (self.open)(&former.place).map_err(CoordinatorError::Unavailable)?;
            old.release(term).await?;
        }
        current.store.release(term).await
    }

    async fn move_to(&self, place: Place) -> Result<(), CoordinatorError> {
        place.validate().map_err(CoordinatorError::Refused)?;
        // The newest placement, so that only what happens from here on is a conflict.
        self.read().await?;
        let current = self.verified().await?;
        let next = if place.is_same_store(&current.place) {
            None
        } else {
            let (_, found) = self
                .target(&place)
                .await
                .map_err(CoordinatorError::Refused)?;
            let own = self
                .believed(&current)
                .await
                .map_err(CoordinatorError::Unavailable)?;
            fits(&own, &found, &current.placement).map_err(CoordinatorError::Refused)?;
            Some(Next {
                place: place.clone(),
                sealed: false,
            })
        };
        let asked = Placement {
            next,
            ..current.placement.clone()
        };
        let written = self
            .write(&current, &asked)
            .await
            .map_err(CoordinatorError::Unavailable)?;
        if !written {
            return Err(CoordinatorError::Refused(
                "another move began at this moment; look at the status and ask again".to_owned(),
            ));
        }
        self.moved(&place).await
    }

    async fn moved(&self, place: &Place) -> Result<(), CoordinatorError> {
        let mut changes = self.current.subscribe();
        let there = changes.wait_for(|c| {
            c.place.is_same_store(place)
                && c.placement.former.is_none()
                && c.placement.next.is_none()
        });
        match timeout(MOVE_MAX, there).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(CoordinatorError::Unavailable(format!(
                "the records are not in {place} after {} s; the move goes on by itself once there is a leader and both stores answer. Moving to where they are now takes it back, as long as the old store is not sealed",
                MOVE_MAX.as_secs()
            ))),
        }
    }

    async fn probe(&self, place: &Place) -> Result<(), CoordinatorError> {
        place.validate().map_err(CoordinatorError::Refused)?;
        let due = Instant::now() + CALL_TIMEOUT * 2;
        loop {
            match self.target(place).await {
                Ok(_) => return Ok(()),
                Err(why) if Instant::now() >= due => {
                    return Err(CoordinatorError::Unavailable(why));
                }
                Err(_) => sleep(STEP_PAUSE).await,
            }
        }
    }
}

impl Coordinator for Placed {
    fn read(&self) -> Answer<'_, Arc<Snapshot>> {
        Box::pin(self.shared.read())
    }

    fn txn(&self, txn: Txn) -> Answer<'_, TxnOutcome> {
        Box::pin(self.shared.txn(txn))
    }

    fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.shared.out.subscribe()
    }

    fn renew(&self, term: Term, ttl: Duration) -> Answer<'_, Renewal> {
        Box::pin(self.shared.renew(term, ttl))
    }

    fn release(&self, term: Term) -> Answer<'_, ()> {
        Box::pin(self.shared.release(term))
    }

    fn free(&self, term: Term) -> Answer<'_, bool> {
        Box::pin(self.shared.free(term))
    }

    fn lease_hint(&self) -> LeaseHint {
        if self.shared.older().is_some() {
            // It speaks of leases that are over.
            return LeaseHint::Unknown;
        }
        self.shared.current.borrow().store.lease_hint()
    }

    fn announce(&self, value: String) {
        self.shared.presence.announce(value);
    }

    fn presence(&self) -> watch::Receiver<PresenceMap> {
        self.shared.presence.presence()
    }

    fn membership(&self) -> Option<&dyn Membership> {
        self.shared.presence.membership()
    }

    fn trouble(&self) -> Option<String> {
        if let Some(why) = self.shared.older() {
            return Some(why);
        }
        let own = self.shared.trouble.lock();
        let own = own.unwrap_or_else(PoisonError::into_inner).clone();
        own.or_else(|| self.shared.current.borrow().store.trouble())
    }

    fn progress(&self) -> Option<String> {
        let current = self.shared.current();
        match (current.placement.next, current.placement.former) {
            (Some(next), _) if next.sealed => Some(format!("on the way to {}", next.place)),
            (Some(next), _) => Some(format!(
                "to be moved to {}, as soon as there is a leader",
                next.place
            )),
            (None, Some(former)) => Some(format!(
                "moved from {}, whose last lease still counts",
                former.place
            )),
            (None, None) => None,
        }
    }

    fn endpoints(&self) -> Answer<'_, Vec<EndpointState>> {
        let store = self.shared.current().store;
        Box::pin(async move { store.endpoints().await })
    }

    fn place(&self) -> Place {
        self.shared.current.borrow().place.clone()
    }

    fn move_to(&self, place: Place) -> Answer<'_, ()> {
        Box::pin(self.shared.move_to(place))
    }

    fn rebuild(&self, lease: Option<(Term, Duration)>) -> Answer<'_, ()> {
        Box::pin(self.shared.rebuild(lease))
    }

    fn probe(&self, place: Place) -> Answer<'_, ()> {
        Box::pin(async move { self.shared.probe(&place).await })
    }
}
