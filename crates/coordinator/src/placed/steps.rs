//! The steps of a move: who does what when, and what is looked at before. See the table at the head of [`super`].

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use craton_core::Term;
use tokio::time::{sleep, timeout};

use super::note::{Note, remember};
use super::record::{Former, Next, PLACEMENT, Placement, parse, record};
use super::seen::{leadership_term, not_older};
use super::{Current, STEP_PAUSE, Shared};
use crate::api::{Compare, Coordinator, Op, Snapshot, Txn, TxnOutcome};
use crate::kv::TXN_STEPS_MAX;
use crate::place::{Backend, Place};

/// What one transaction of the new store must be able to carry, in bytes; etcd takes 1.5 MiB by default.
const MOVE_BYTES_MAX: usize = 1024 * 1024;

/// So many failures to read a store in a row are not worth a line in the log.
const QUIET_FAILURES: u32 = 30;

impl Shared {
    /// Does what the records ask for, for ever.
    pub(super) async fn steps(self: Arc<Self>) {
        let mut changes = self.current.subscribe();
        let mut last = String::new();
        let mut failures = 0_u32;
        loop {
            changes.mark_unchanged();
            match self.step().await {
                Ok(more) => {
                    failures = 0;
                    self.note_trouble(None);
                    if !more {
                        let _ = timeout(Duration::from_secs(1), changes.changed()).await;
                    }
                }
                Err(why) => {
                    failures = failures.saturating_add(1);
                    // At a start of the whole cluster nobody answers at first.
                    let patient = !self.current().verified && failures < QUIET_FAILURES;
                    if !patient && why != last {
                        tracing::warn!(why, "the records cannot be used, or moved, for now");
                        last.clone_from(&why);
                    }
                    self.note_trouble(Some(why));
                    sleep(STEP_PAUSE).await;
                }
            }
        }
    }

    fn note_trouble(&self, why: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    /// Writes it down durably if the note that stands asks for it.
    pub(super) fn note_place(
        &self,
        note: Note,
        asked: impl FnOnce(Option<&Note>) -> bool,
    ) -> Result<(), String> {
        let mut noted = self.note.lock().unwrap_or_else(PoisonError::into_inner);
        if asked(noted.as_ref()) {
            remember(&self.memory, &note)
                .map_err(|e| format!("cannot write {}: {e}", self.memory.display()))?;
            *noted = Some(note);
        }
        Ok(())
    }

    fn noted(&self) -> Option<Note> {
        self.note
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// One step; true if there may be another at once.
    async fn step(&self) -> Result<bool, String> {
        let current = self.current();
        if !current.verified {
            return self.verify(&current).await.map(|()| true);
        }
        if self.look_again(&current).await? {
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

    /// The first read of a store: is it the one that this member knew?
    async fn verify(&self, current: &Current) -> Result<(), String> {
        let source = self.about_to_read();
        let snapshot = match current.store.read().await {
            Ok(snapshot) => snapshot,
            Err(error) => {
                if self.look_elsewhere(current).await {
                    return Ok(());
                }
                return Err(error.to_string());
            }
        };
        let (placement, revision) = parse(&snapshot)?;
        match self.noted() {
            Some(note) => self
                .check_kept(&current.place, &snapshot)
                .and_then(|()| check_note(&note, &current.place, &placement, &snapshot))
                .inspect_err(|why| {
                    // The members' own log is no copy that somebody could have put in its place.
                    if current.place.backend != Backend::Embedded {
                        self.disbelieve(why);
                    }
                })?,
            None if self.wish == current.place => {}
            None if revision == 0 && snapshot.entries.is_empty() => {
                return self.found(current).await;
            }
            None if placement.sealed() => {}
            None => tracing::warn!(
                records = %current.place, settings = %self.wish,
                "the records are not where the settings say; `craton coordinator move` moves them"
            ),
        }
        self.learn(&current.store, &snapshot, source)
    }

    /// What is kept of the records tells more than the note, where there is something.
    fn check_kept(&self, place: &Place, found: &Snapshot) -> Result<(), String> {
        let known = self.trust().known.clone();
        match known.filter(|_| place.backend != Backend::Embedded) {
            Some(known) => not_older(place, &known, found),
            None => Ok(()),
        }
    }

    /// A new cluster goes where its settings say before its first record: the store in which every cluster begins
    /// is sealed while it is empty. So members whose settings differ find one another, and never two clusters.
    async fn found(&self, current: &Current) -> Result<(), String> {
        let (_, found) = self.target(&self.wish).await?;
        if !found.entries.is_empty() {
            return Err(format!(
                "{} keeps records of a cluster under this prefix already, and a new cluster does not begin over them: set another node.coordinator.prefix, or remove them (etcdctl del --prefix PREFIX)",
                self.wish
            ));
        }
        let sealed = Placement {
            next: Some(Next {
                place: self.wish.clone(),
                sealed: true,
            }),
            ..Placement::default()
        };
        let compares = [PLACEMENT, "cluster"].map(|key| Compare {
            key: key.to_owned(),
            mod_revision: 0,
        });
        let txn = Txn {
            compares: compares.into(),
            ops: vec![record(&sealed)?],
        };
        // Whoever wins: the next look tells.
        current.store.txn(txn).await.map_err(|e| e.to_string())?;
        Ok(())
    }

    /// The store of the note does not answer: perhaps the records moved on while this member was away, and it was
    /// switched off since. A store that was left is sealed for good, so a later generation is no mistake.
    async fn look_elsewhere(&self, current: &Current) -> bool {
        let Some(note) = self.noted() else {
            return false;
        };
        for place in [Place::default(), self.wish.clone()] {
            if place.is_same_store(&current.place) {
                continue;
            }
            let Ok((store, found)) = self.target(&place).await else {
                continue;
            };
            let Ok((placement, _)) = parse(&found) else {
                continue;
            };
            let newer = placement.generation > note.generation;
            if newer
                && check_note(&note, &place, &placement, &found).is_ok()
                && self.enter(&place, &store, &found).is_ok()
            {
                return true;
            }
        }
        false
    }

    /// This member has renewed `term`, or a later one, in the current store, and the renewal still counts.
    fn leads(&self, term: Term) -> bool {
        let renewed = *self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        renewed.is_some_and(|(t, until)| t >= term && self.clock.now() < until)
    }

    /// Compare-and-set of the placement's record in the current store.
    pub(super) async fn write(
        &self,
        current: &Current,
        placement: &Placement,
    ) -> Result<bool, String> {
        let txn = Txn {
            compares: vec![Compare {
                key: PLACEMENT.to_owned(),
                mod_revision: current.revision,
            }],
            ops: vec![record(placement)?],
        };
        let written = current.store.txn(txn).await.map_err(|e| e.to_string())?;
        self.believed(current).await?;
        Ok(matches!(written, TxnOutcome::Committed(_)))
    }

    pub(super) async fn target(
        &self,
        place: &Place,
    ) -> Result<(Arc<dyn Coordinator>, Arc<Snapshot>), String> {
        let store = (self.open)(place)?;
        let found = store
            .read()
            .await
            .map_err(|e| format!("{place} cannot be read: {}", e.why()))?;
        Ok((store, found))
    }

    async fn seal(&self, current: &Current, next: &Next) -> Result<(), String> {
        // After the seal there is no way back: what can go wrong is looked at before.
        let (_, found) = self.target(&next.place).await?;
        let own = self.believed(current).await?;
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
            let own = self.believed(current).await?;
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
        self.enter(&next.place, &store, &found)
    }

    /// Uses the store at `place` from now on.
    fn enter(
        &self,
        place: &Place,
        store: &Arc<dyn Coordinator>,
        found: &Arc<Snapshot>,
    ) -> Result<(), String> {
        let (placement, revision) = parse(found)?;
        let from = self.current().place;
        self.check_kept(place, found)?;
        // First, and for certain: see "never two leaders" at the head of this module.
        let note = Note::new(place.clone(), placement.generation, system_id(found));
        self.note_place(note, |_| true)?;
        *self.renewed.lock().unwrap_or_else(PoisonError::into_inner) = None;
        // Whole at once: who waits for the end of the move must not see a placement that is only begun.
        let next = Current {
            place: place.clone(),
            store: Arc::clone(store),
            placement,
            revision,
            verified: true,
            older: false,
        };
        // What it held of a lease there was before the records were elsewhere.
        store.forget();
        self.begin_anew(next, Some(Arc::clone(found)));
        let source = self.about_to_read();
        self.learn(store, found, source)?;
        tracing::info!(member = %self.me, %from, to = %place, "the records have moved");
        Ok(())
    }
}

/// The system id of the cluster whose records these are.
pub(super) fn system_id(snapshot: &Snapshot) -> Option<String> {
    let record = snapshot.get("cluster")?;
    let record: serde_json::Value = serde_json::from_str(&record.value).ok()?;
    record.get("system_id")?.as_str().map(ToOwned::to_owned)
}

/// Whether these can be the records that a member saw before.
fn check_note(
    note: &Note,
    place: &Place,
    placement: &Placement,
    found: &Snapshot,
) -> Result<(), String> {
    if placement.generation < note.generation {
        return Err(format!(
            "{place} holds records of generation {}, this member knew generation {}: that store was emptied, or restored from an old copy. Nothing is changed through it; restore the newest copy",
            placement.generation, note.generation
        ));
    }
    match (&note.system_id, system_id(found)) {
        (Some(known), Some(other)) if *known != other => Err(format!(
            "{place} holds the records of another cluster (system id {other}, this one has {known})"
        )),
        _ => Ok(()),
    }
}

/// Whether the records can go there.
pub(super) fn fits(own: &Snapshot, found: &Snapshot, placement: &Placement) -> Result<(), String> {
    let (theirs, _) = parse(found)?;
    if theirs.generation > placement.generation {
        return Err(format!(
            "the records there are of generation {}, these are of {}: those are newer",
            theirs.generation, placement.generation
        ));
    }
    if !own.entries.is_empty() && own.entries == found.entries {
        return Err(
            "that is where the records are already, under another address: to change how it is reached, change [node.coordinator] and restart the agents one by one".into(),
        );
    }
    if let (Some(ours), Some(other)) = (system_id(own), system_id(found))
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
    let placement = Placement {
        generation: current.placement.generation + 1,
        offset: own.revision + current.placement.offset,
        former: if own.entries.keys().any(|k| k != PLACEMENT) {
            Some(Former {
                place: current.place.clone(),
                term: leadership_term(own)?,
            })
        } else {
            // A store without a record never had a lease.
            None
        },
        next: None,
    };
    replaced(own, found, &placement)
}

/// The transaction that makes a store of which this was `found` hold `records`, with this placement; unless its
/// placement has changed since.
pub(super) fn replaced(
    records: &Snapshot,
    found: &Snapshot,
    placement: &Placement,
) -> Result<Txn, String> {
    let gone = found
        .entries
        .keys()
        .filter(|k| *k != PLACEMENT && !records.entries.contains_key(*k))
        .map(|key| Op::Delete { key: key.clone() });
    let put = records
        .entries
        .iter()
        .filter(|(key, _)| *key != PLACEMENT)
        .map(|(key, at)| Op::Put {
            key: key.clone(),
            value: at.value.clone(),
        });
    Ok(Txn {
        compares: vec![Compare {
            key: PLACEMENT.to_owned(),
            mod_revision: parse(found)?.1,
        }],
        ops: gone.chain(put).chain([record(placement)?]).collect(),
    })
}
