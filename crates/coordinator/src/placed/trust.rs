//! Whether what the store shows is believed, and the way back where it is not.
//!
//! A store outside the members can be emptied, or restored from an old copy, under running agents. What it says then is
//! over: a leader that it names was deposed, timelines that it does not know are in use. Such a store counts as
//! unavailable, as one that does not answer: nothing is read, written or renewed through it, and the leader goes on
//! while its standbys promise. It is believed again once it shows records that are not older than those that this member
//! knows ([`super::seen`]): by a newer copy, or because an operator has them written anew ([`Shared::rebuild`]).
//!
//! The members' own store is believed as it is: Raft does not go back, and where an operator recovers it from a minority,
//! that is meant.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use craton_core::Term;
use tokio::time::{Instant, sleep};

use super::note::Note;
use super::record::{Placement, parse, shown};
use super::seen::{self, Shift, leadership_term, not_older};
use super::steps::{replaced, system_id};
use super::{Current, MOVE_MAX, STEP_PAUSE, Shared};
use crate::api::{Coordinator, CoordinatorError, Snapshot, Txn, TxnOutcome};
use crate::place::{Backend, Place};

/// Between two looks at a store that is not believed.
const DOUBT_PAUSE: Duration = Duration::from_secs(1);

/// Changes of the records reach the disk together within this.
const SAVE_PAUSE: Duration = Duration::from_millis(200);

/// What this process makes of the current store.
#[derive(Default)]
pub(super) struct Trust {
    /// The newest records that were believed, as they are in the store.
    pub(super) known: Option<Arc<Snapshot>>,
    /// The newest revision that the store has shown, believed or not.
    heard: u64,
    /// Counts how often the store's revision went back.
    epoch: u64,
    shift: Shift,
    /// The store shows something older than was heard already: only a read can tell whether it went back.
    doubtful: bool,
    /// Why the store is not believed.
    pub(super) older: Option<String>,
}

impl Trust {
    /// Of a store of which this is known.
    pub(super) fn with(saved: Option<(Snapshot, Shift)>) -> Self {
        let (known, shift) = saved.unzip();
        Self {
            known: known.map(Arc::new),
            shift: shift.unwrap_or_default(),
            ..Self::default()
        }
    }
}

/// How a snapshot came here.
#[derive(Clone, Copy)]
pub(super) enum Source {
    /// The store's own copy, which lags behind.
    Watch,
    /// A linearizable read that was sent when this had been heard.
    Read { heard: u64, epoch: u64 },
}

impl Shared {
    pub(super) fn trust(&self) -> MutexGuard<'_, Trust> {
        self.trust.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the current store is not believed, if it is not.
    pub(super) fn older(&self) -> Option<String> {
        self.trust().older.clone()
    }

    /// To be called before a read is sent.
    pub(super) fn about_to_read(&self) -> Source {
        let trust = self.trust();
        Source::Read {
            heard: trust.heard,
            epoch: trust.epoch,
        }
    }

    /// What is added to the revisions of the current store.
    pub(super) fn offset(&self, placement: &Placement) -> u64 {
        placement.offset.saturating_add(self.trust().shift.extra)
    }

    /// Takes in what `store` shows, if it is still the current one. `Err`: it is not believed, and why.
    pub(super) fn learn(
        &self,
        store: &Arc<dyn Coordinator>,
        snapshot: &Arc<Snapshot>,
        source: Source,
    ) -> Result<(), String> {
        let mut trust = self.trust();
        let (place, verified) = {
            let current = self.current.borrow();
            if !Arc::ptr_eq(&current.store, store) {
                return Ok(());
            }
            (current.place.clone(), current.verified)
        };
        let outside = place.backend != Backend::Embedded;
        let (linearizable, went_back) = match source {
            Source::Watch => (false, false),
            Source::Read { heard, epoch } => (
                true,
                outside && epoch == trust.epoch && snapshot.revision < heard,
            ),
        };
        if outside && !linearizable && !verified {
            // Whether it is the one that this member knew is looked at first.
            return Ok(());
        }
        if snapshot.revision < trust.heard && !went_back {
            // Overtaken, or the store went back: a read tells.
            if outside && !linearizable {
                let first = !std::mem::replace(&mut trust.doubtful, true);
                drop(trust);
                if first {
                    self.current.send_modify(|_| {});
                }
                return Ok(());
            }
            return trust.older.clone().map_or(Ok(()), Err);
        }
        trust.heard = snapshot.revision;
        trust.epoch += u64::from(went_back);
        trust.doubtful &= !linearizable;
        let (placement, revision) = parse(snapshot).inspect_err(|why| {
            tracing::error!(why, "the record of the records' place");
        })?;
        if let Some(known) = trust.known.as_ref().filter(|_| outside)
            && let Err(why) = not_older(&place, known, snapshot)
        {
            self.doubt(&mut trust, &why);
            return Err(why);
        }
        let returned = trust.older.take().is_some();
        if returned {
            tracing::info!(records = %place, "the records are whole again");
        }
        if returned || went_back {
            // The lease's keys may be others than those that were seen.
            store.forget();
        }
        if returned || went_back || placement.offset != trust.shift.offset {
            let newest = self.out.borrow().revision;
            trust.shift = Shift {
                extra: newest.saturating_sub(placement.offset),
                offset: placement.offset,
            };
        }
        trust.known = Some(Arc::clone(snapshot));
        self.saving.send_replace(());
        let offset = placement.offset.saturating_add(trust.shift.extra);
        self.show(snapshot, (placement, revision), offset, linearizable);
        Ok(())
    }

    /// What is believed becomes what everybody here goes by. To be called with the lock of `trust`.
    fn show(
        &self,
        snapshot: &Arc<Snapshot>,
        (placement, revision): (Placement, u64),
        offset: u64,
        linearizable: bool,
    ) {
        self.current.send_if_modified(|current| {
            let newer = revision != current.revision
                || placement != current.placement
                || current.older
                || (linearizable && !current.verified);
            current.placement = placement;
            current.revision = revision;
            current.verified |= linearizable;
            current.older = false;
            newer
        });
        self.out.send_if_modified(|out| {
            let newer = snapshot.revision.saturating_add(offset) > out.revision;
            if newer {
                *out = shown(snapshot, offset);
            }
            newer
        });
    }

    fn doubt(&self, trust: &mut Trust, why: &str) {
        if trust.older.as_deref() != Some(why) {
            tracing::error!(why, "the records are not believed");
            trust.older = Some(why.to_owned());
            // Whoever waits for the store hears of it.
            self.current.send_modify(|c| c.older = true);
        }
    }

    /// The store is found wanting by other means.
    pub(super) fn disbelieve(&self, why: &str) {
        self.doubt(&mut self.trust(), why);
    }

    /// Another store is the current one from here on, with what is known of it.
    pub(super) fn begin_anew(&self, next: Current, known: Option<Arc<Snapshot>>) {
        let mut trust = self.trust();
        *trust = Trust {
            known,
            // Revisions that were shown never go back, whatever the placement says.
            shift: Shift {
                extra: self
                    .out
                    .borrow()
                    .revision
                    .saturating_sub(next.placement.offset),
                offset: next.placement.offset,
            },
            ..Trust::default()
        };
        self.current.send_modify(|c| *c = next);
    }

    /// A read of the current store that is believed.
    pub(super) async fn believed(&self, current: &Current) -> Result<Arc<Snapshot>, String> {
        let source = self.about_to_read();
        let snapshot = current.store.read().await.map_err(|e| e.to_string())?;
        self.learn(&current.store, &snapshot, source)?;
        Ok(snapshot)
    }

    /// Looks again at a store that is not believed, or that may have gone back. True if there was a reason to.
    pub(super) async fn look_again(&self, current: &Current) -> Result<bool, String> {
        let (older, doubtful) = {
            let trust = self.trust();
            (trust.older.is_some(), trust.doubtful)
        };
        if !older && !doubtful {
            return Ok(false);
        }
        let seen = self.believed(current).await;
        if older && seen.is_err() {
            sleep(DOUBT_PAUSE).await;
        }
        seen.map(|_| true)
    }

    /// The note of the place learns of a generation that an order by hand made, and of a system id that came later.
    fn note_growth(&self, place: &Place, records: &Snapshot) -> Result<(), String> {
        let generation = parse(records)?.0.generation;
        let note = Note::new(place.clone(), generation, system_id(records));
        let known = note.system_id.clone();
        self.note_place(note, |old| {
            old.is_some_and(|old| {
                old.place.is_same_store(place)
                    && (old.generation < generation
                        || old.generation == generation
                            && old.system_id.is_none()
                            && known.is_some())
            })
        })
    }

    /// Keeps the newest records on disk, for ever: in the background, since nothing may wait for a disk here.
    pub(super) async fn keep(self: Arc<Self>) {
        let mut changes = self.saving.subscribe();
        let path = seen::file(&self.memory);
        let mut saved: Option<(Place, Arc<Snapshot>, Shift)> = None;
        loop {
            let (place, known, shift) = {
                // They change together under this lock.
                let trust = self.trust();
                (self.current().place, trust.known.clone(), trust.shift)
            };
            if let Some(records) = known.filter(|_| place.backend != Backend::Embedded)
                && saved.as_ref().is_none_or(|(p, s, by)| {
                    *p != place || *by != shift || s.entries != records.entries
                })
            {
                let (this, to) = (Arc::clone(&self), path.clone());
                let (at, copy) = (place.clone(), Arc::clone(&records));
                let write = move || {
                    seen::save(&to, &at, &copy, shift)?;
                    this.note_growth(&at, &copy).map_err(std::io::Error::other)
                };
                match tokio::task::spawn_blocking(write).await {
                    Ok(Ok(())) => saved = Some((place, records, shift)),
                    Ok(Err(error)) => {
                        tracing::warn!(%error, path = %path.display(), "the copy of the records cannot be kept");
                    }
                    Err(error) => tracing::warn!(%error, "the copy of the records is not kept"),
                }
            }
            sleep(SAVE_PAUSE).await;
            if changes.changed().await.is_err() {
                return;
            }
        }
    }
}

impl Shared {
    /// Writes the records that this member knows into a store that was emptied, or restored from an old copy. With
    /// `lease`, the term that this member leads, whose lease is taken there before.
    pub(super) async fn rebuild(
        &self,
        lease: Option<(Term, Duration)>,
    ) -> Result<(), CoordinatorError> {
        let refused = |why: &str| Err(CoordinatorError::Refused(why.to_owned()));
        let current = self.current();
        let (older, known) = {
            let trust = self.trust();
            (trust.older.is_some(), trust.known.clone())
        };
        if !older {
            return refused("the records are whole here: nothing is to be written anew");
        }
        let Some(known) = known.filter(|k| k.get("leadership").is_some()) else {
            return refused("this member knows no records of this cluster; ask another one");
        };
        let found = current.store.read().await?;
        let txn =
            anew(&known, &found, self.out.borrow().revision).map_err(CoordinatorError::Refused)?;
        if let Some((term, ttl)) = lease {
            take_lease(current.store.as_ref(), term, ttl).await?;
        }
        let written = current.store.txn(txn).await?;
        if written == TxnOutcome::Conflict {
            return refused(
                "the store was changed at this moment; look at the status and ask again",
            );
        }
        tracing::warn!(records = %current.place, "the records were written anew, as the operator asked");
        self.believed(&current)
            .await
            .map(|_| ())
            .map_err(CoordinatorError::Unavailable)
    }
}

/// The lease of `term` in a store that knows nothing of it. Its holder has never stopped holding it, so every lower term is
/// over.
async fn take_lease(
    store: &dyn Coordinator,
    term: Term,
    ttl: Duration,
) -> Result<(), CoordinatorError> {
    store.forget();
    let due = Instant::now() + MOVE_MAX;
    while !store.free(Term(term.0.saturating_sub(1))).await? {
        if Instant::now() >= due {
            return Err(CoordinatorError::Unavailable(
                "the lease that the store names does not end; ask again".to_owned(),
            ));
        }
        sleep(STEP_PAUSE).await;
    }
    store.renew(term, ttl).await.map(|_| ())
}

/// The transaction that makes the store hold `known` again. `newest`: the highest revision that was shown.
fn anew(known: &Snapshot, found: &Snapshot, newest: u64) -> Result<Txn, String> {
    let (before, _) = parse(known)?;
    let (there, _) = parse(found)?;
    if leadership_term(found)? > leadership_term(known)? {
        return Err(format!(
            "the store speaks of term {}, and this member knows none above {}: what it knows may be the older one",
            leadership_term(found)?,
            leadership_term(known)?
        ));
    }
    if before.next.as_ref().is_some_and(|n| n.sealed) {
        return Err("the records had moved on from this store; look at the status".to_owned());
    }
    let placement = Placement {
        // Greater than any that was seen: whoever acts by what was found is stopped by the comparison.
        generation: before.generation.max(there.generation) + 1,
        offset: newest.max(known.revision.saturating_add(before.offset)),
        former: None,
        next: None,
    };
    replaced(known, found, &placement)
}
