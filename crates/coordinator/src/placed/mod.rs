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

mod record;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use craton_core::records::Leadership;
use craton_core::{BootTime, MemberId, Term};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use self::record::{Former, Next, PLACEMENT, Placement, parse, record, shown, to_raw};
use crate::api::{
    Answer, CALL_TIMEOUT, Compare, Coordinator, CoordinatorError, LeaseHint, Membership, Op,
    PresenceMap, Renewal, Snapshot, Txn, TxnOutcome,
};
use crate::clock::Clock;
use crate::kv::TXN_STEPS_MAX;
use crate::place::Place;

/// Between two tries of a step of a move.
const STEP_PAUSE: Duration = Duration::from_millis(100);

/// How long a request to move waits for its end.
const MOVE_MAX: Duration = Duration::from_secs(30);

/// What one transaction of the new store must be able to carry, in bytes; etcd takes 1.5 MiB by default.
const MOVE_BYTES_MAX: usize = 1024 * 1024;

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
}

struct Shared {
    me: MemberId,
    clock: Clock,
    open: Opener,
    presence: Arc<dyn Coordinator>,
    memory: PathBuf,
    current: watch::Sender<Current>,
    out: watch::Sender<Arc<Snapshot>>,
    /// The last renewal in the current store: its term, and until when it counts.
    renewed: Mutex<Option<(Term, BootTime)>>,
}

/// One member's way to the cluster's records, wherever they are.
pub struct Placed {
    shared: Arc<Shared>,
    tasks: Mutex<JoinSet<()>>,
}

/// The place that a member of this directory used last, if it is noted.
pub fn remembered(memory: &Path) -> Result<Option<Place>, String> {
    let text = match std::fs::read_to_string(memory) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(format!("cannot read {}: {e}", memory.display())),
    };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|e| format!("{} cannot be understood: {e}", memory.display()))
}

/// Notes the place that a member of this directory uses, durably.
pub fn remember(memory: &Path, place: &Place) -> std::io::Result<()> {
    use std::io::Write as _;
    let text = serde_json::to_string(place).map_err(std::io::Error::other)?;
    let tmp = memory.with_extension("tmp");
    let mut file = std::fs::File::create(&tmp)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&tmp, memory)?;
    match memory.parent() {
        Some(dir) => std::fs::File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

impl Placed {
    /// Begins in the place noted in the file `memory`, else in `place`, and follows the records from there.
    /// `presence` carries the members' announcements. To be called inside a tokio runtime.
    pub fn start(
        me: MemberId,
        place: Place,
        memory: PathBuf,
        open: Opener,
        presence: Arc<dyn Coordinator>,
    ) -> Result<Arc<Self>, String> {
        let place = match remembered(&memory)? {
            Some(noted) => {
                if noted != place {
                    tracing::warn!(%noted, settings = %place, "the records are where they were last, not where the settings say; `craton coordinator move` moves them");
                }
                noted
            }
            None => place,
        };
        let store = open(&place)?;
        remember(&memory, &place).map_err(|e| format!("cannot write {}: {e}", memory.display()))?;
        let current = Current {
            place,
            store,
            placement: Placement::default(),
            revision: 0,
            verified: false,
        };
        let shared = Arc::new(Shared {
            me,
            clock: Clock::system(),
            open,
            presence,
            memory,
            current: watch::Sender::new(current),
            out: watch::Sender::new(Arc::default()),
            renewed: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
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

fn moving() -> CoordinatorError {
    CoordinatorError::Unavailable("the records are on their way to another store".to_owned())
}

fn leadership_term(snapshot: &Snapshot) -> Result<Term, String> {
    match snapshot.get("leadership") {
        None => Ok(Term(0)),
        Some(at) => serde_json::from_str::<Leadership>(&at.value)
            .map(|l| l.term)
            .map_err(|e| format!("the record \"leadership\" cannot be read: {e}")),
    }
}

impl Shared {
    fn current(&self) -> Current {
        self.current.borrow().clone()
    }

    /// Takes in what `store` shows, if it is still the current one.
    fn learn(&self, store: &Arc<dyn Coordinator>, snapshot: &Arc<Snapshot>, linearizable: bool) {
        let (placement, revision) = match parse(snapshot) {
            Ok(found) => found,
            Err(why) => {
                tracing::error!(why, "the record of the records' place");
                return;
            }
        };
        let mut offset = None;
        self.current.send_if_modified(|current| {
            if !Arc::ptr_eq(&current.store, store) {
                return false;
            }
            offset = Some(placement.offset);
            let newer = revision > current.revision || (linearizable && !current.verified);
            if newer {
                current.placement = placement;
                current.revision = revision;
                current.verified |= linearizable;
            }
            newer
        });
        let Some(offset) = offset else { return };
        self.out.send_if_modified(|out| {
            let newer = snapshot.revision + offset > out.revision;
            if newer {
                *out = Arc::new(shown(snapshot, offset));
            }
            newer
        });
    }

    /// Shows the current store's changes for ever.
    async fn follow(self: Arc<Self>) {
        let mut changes = self.current.subscribe();
        loop {
            let store = Arc::clone(&changes.borrow_and_update().store);
            let mut watch = store.watch();
            loop {
                let snapshot = Arc::clone(&watch.borrow_and_update());
                self.learn(&store, &snapshot, false);
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

    /// Does what the records ask for, for ever.
    async fn steps(self: Arc<Self>) {
        let mut changes = self.current.subscribe();
        let mut last = String::new();
        loop {
            changes.mark_unchanged();
            match self.step().await {
                Ok(true) => {}
                Ok(false) => {
                    let _ = timeout(Duration::from_secs(1), changes.changed()).await;
                }
                Err(why) => {
                    if !self.current().verified {
                        tracing::debug!(why, "the records cannot be read yet");
                    } else if why != last {
                        tracing::warn!(why, "the records' move waits");
                        last = why;
                    }
                    sleep(STEP_PAUSE).await;
                }
            }
        }
    }

    /// One step; true if there may be another at once.
    async fn step(&self) -> Result<bool, String> {
        let current = self.current();
        if !current.verified {
            let snapshot = current.store.read().await.map_err(|e| e.to_string())?;
            self.learn(&current.store, &snapshot, true);
            return Ok(true);
        }
        match (&current.placement.next, &current.placement.former) {
            (Some(next), _) if next.sealed => self.switch(&current, next).await.map(|()| true),
            (Some(next), _) => {
                if !self.leads(Term(0)) {
                    return Ok(false);
                }
                self.seal(&current, next).await.map(|()| true)
            }
            (None, Some(former)) if self.leads(former.term) => {
                let settled = Placement {
                    former: None,
                    ..current.placement.clone()
                };
                self.write(&current, &settled).await.map(|_| true)
            }
            (None, _) => Ok(false),
        }
    }

    /// This member has renewed `term`, or a later one, in the current store, and the renewal still counts.
    fn leads(&self, term: Term) -> bool {
        let renewed = *self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        renewed.is_some_and(|(t, until)| t >= term && self.clock.now() < until)
    }

    /// Compare-and-set of the placement's record in the current store.
    async fn write(&self, current: &Current, placement: &Placement) -> Result<bool, String> {
        let txn = Txn {
            compares: vec![Compare {
                key: PLACEMENT.to_owned(),
                mod_revision: current.revision,
            }],
            ops: vec![record(placement)?],
        };
        let written = current.store.txn(txn).await.map_err(|e| e.to_string())?;
        let snapshot = current.store.read().await.map_err(|e| e.to_string())?;
        self.learn(&current.store, &snapshot, true);
        Ok(matches!(written, TxnOutcome::Committed(_)))
    }

    async fn target(&self, place: &Place) -> Result<(Arc<dyn Coordinator>, Arc<Snapshot>), String> {
        let store = (self.open)(place)?;
        let found = store
            .read()
            .await
            .map_err(|e| format!("{place} cannot be read: {e}"))?;
        Ok((store, found))
    }

    async fn seal(&self, current: &Current, next: &Next) -> Result<(), String> {
        // After the seal there is no way back: what can go wrong is looked at before.
        let (_, found) = self.target(&next.place).await?;
        let own = current.store.read().await.map_err(|e| e.to_string())?;
        fits(&own, &found, &current.placement)?;
        let sealed = Placement {
            next: Some(Next {
                sealed: true,
                ..next.clone()
            }),
            ..current.placement.clone()
        };
        self.write(current, &sealed).await.map(|_| ())
    }

    /// Steps 3 and 4.
    async fn switch(&self, current: &Current, next: &Next) -> Result<(), String> {
        let (store, mut found) = self.target(&next.place).await?;
        let (mut placement, _) = parse(&found)?;
        if placement.generation <= current.placement.generation {
            // Linearizable, and sealed: final.
            let own = current.store.read().await.map_err(|e| e.to_string())?;
            fits(&own, &found, &current.placement)?;
            store
                .txn(copy(&own, &found, current)?)
                .await
                .map_err(|e| e.to_string())?;
            found = store.read().await.map_err(|e| e.to_string())?;
            placement = parse(&found)?.0;
        }
        if placement.generation <= current.placement.generation {
            return Err(format!("{} does not have the records yet", next.place));
        }
        // First, and for certain: see "never two leaders" above.
        remember(&self.memory, &next.place)
            .map_err(|e| format!("cannot write {}: {e}", self.memory.display()))?;
        *self.renewed.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.current.send_modify(|c| {
            *c = Current {
                place: next.place.clone(),
                store: Arc::clone(&store),
                placement: Placement::default(),
                revision: 0,
                verified: false,
            };
        });
        self.learn(&store, &found, true);
        tracing::info!(member = %self.me, from = %current.place, to = %next.place, "the records have moved");
        Ok(())
    }
}

/// Whether the records can go there.
fn fits(own: &Snapshot, found: &Snapshot, placement: &Placement) -> Result<(), String> {
    let (theirs, _) = parse(found)?;
    if theirs.generation > placement.generation {
        return Err(format!(
            "the records there are of generation {}, these are of {}: those are newer",
            theirs.generation, placement.generation
        ));
    }
    let system = |s: &Snapshot| {
        let record = s.get("cluster")?;
        let record: serde_json::Value = serde_json::from_str(&record.value).ok()?;
        record.get("system_id").cloned()
    };
    if let (Some(ours), Some(other)) = (system(own), system(found))
        && ours != other
    {
        return Err(format!(
            "another cluster (system id {other}, this one has {ours}) keeps its records there: choose another prefix"
        ));
    }
    let steps = own.entries.len() + found.entries.len() + 2;
    let bytes: usize = own
        .entries
        .iter()
        .map(|(k, v)| k.len() + v.value.len())
        .sum();
    if steps > TXN_STEPS_MAX || bytes > MOVE_BYTES_MAX {
        return Err(format!(
            "the records ({} keys, {bytes} bytes) do not fit into one transaction of {TXN_STEPS_MAX} steps and {MOVE_BYTES_MAX} bytes",
            own.entries.len()
        ));
    }
    Ok(())
}

/// The transaction that makes the new store begin where the old one was sealed.
fn copy(own: &Snapshot, found: &Snapshot, current: &Current) -> Result<Txn, String> {
    let gone = found
        .entries
        .keys()
        .filter(|k| *k != PLACEMENT && !own.entries.contains_key(*k))
        .map(|key| Op::Delete { key: key.clone() });
    let put = own
        .entries
        .iter()
        .filter(|(key, _)| *key != PLACEMENT)
        .map(|(key, at)| Op::Put {
            key: key.clone(),
            value: at.value.clone(),
        });
    let placement = Placement {
        generation: current.placement.generation + 1,
        offset: own.revision + current.placement.offset,
        former: Some(Former {
            place: current.place.clone(),
            term: leadership_term(own)?,
        }),
        next: None,
    };
    Ok(Txn {
        compares: vec![Compare {
            key: PLACEMENT.to_owned(),
            mod_revision: parse(found)?.1,
        }],
        ops: gone.chain(put).chain([record(&placement)?]).collect(),
    })
}

impl Shared {
    /// The current store, once it is certain that it was the right one to begin with.
    async fn verified(&self) -> Result<Current, CoordinatorError> {
        let mut changes = self.current.subscribe();
        let certain = changes.wait_for(|c| c.verified && !c.placement.sealed());
        match timeout(CALL_TIMEOUT, certain).await {
            Ok(Ok(current)) => Ok(current.clone()),
            _ => Err(moving()),
        }
    }

    async fn read(&self) -> Result<Arc<Snapshot>, CoordinatorError> {
        let current = self.verified().await?;
        let snapshot = current.store.read().await?;
        let (placement, _) = parse(&snapshot).map_err(CoordinatorError::Refused)?;
        self.learn(&current.store, &snapshot, true);
        if placement.sealed() {
            // It was the truth once; by now the new store may know better.
            return Err(moving());
        }
        Ok(Arc::new(shown(&snapshot, placement.offset)))
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, CoordinatorError> {
        let current = self.verified().await?;
        let offset = current.placement.offset;
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
        let current = self.current();
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
        let next = if place == current.place {
            None
        } else {
            let (_, found) = self
                .target(&place)
                .await
                .map_err(CoordinatorError::Refused)?;
            let own = current.store.read().await?;
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
            c.place == *place && c.placement.former.is_none() && c.placement.next.is_none()
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

    fn place(&self) -> Place {
        self.shared.current.borrow().place.clone()
    }

    fn move_to(&self, place: Place) -> Answer<'_, ()> {
        Box::pin(self.shared.move_to(place))
    }

    fn probe(&self, place: Place) -> Answer<'_, ()> {
        Box::pin(async move { self.shared.probe(&place).await })
    }
}
