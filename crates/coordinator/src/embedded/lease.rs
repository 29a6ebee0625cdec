//! The lease: this process's voter, and asking all voters at once.
//!
//! Nothing here goes through Raft, its queue or its disk. A renewal is one round trip to memory; the disk
//! is touched only by the first renewal of a longer ttl, by "free", and by changes of the voters.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use craton_core::{BootTime, MemberId, Term};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use super::disk::Disk;
use super::format::LeaseState;
use super::links::Links;
use super::members::Members;
use super::peer::Asker;
use super::stats::Stats;
use super::wire::{LeaseAsk, LeaseTold};
use crate::api::{CALL_TIMEOUT, CoordinatorError, LeaseHint, Renewal};
use crate::clock::Clock;
use crate::promise::{Answer, LeaseNote, Voter};
use crate::raft::{Configuration, Standing, Status};

/// A voter that lost its disk keeps silent for this long after its start: every question that its former
/// self may have answered has been given up by then.
pub(super) const SILENCE_AFTER_LOSS: Duration = Duration::from_secs(4);

/// How often a voter that lost its disk asks the others for their notes.
const SETTLE_INTERVAL: Duration = Duration::from_millis(500);

/// A note by which a voter settles may take so long to come to the disk.
const SETTLE_NOTE_MAX: Duration = Duration::from_secs(60);

/// So many notes that are late are remembered; each holds all that those before it do.
const LATE_MAX: usize = 16;

/// How often a voter tries to settle after a change of the voters.
const SETTLE_INTERVAL_SHORT: Duration = Duration::from_millis(50);

pub(super) type LeaseAsker = Asker<LeaseAsk, LeaseTold>;

struct VoterAndQueue {
    voter: Voter,
    /// The join of all notes ever queued for the disk, so that a later one never undoes an earlier one.
    queued: LeaseNote,
}

/// This process's voter.
pub(super) struct Desk {
    voter: Mutex<VoterAndQueue>,
    /// Nothing that this voter said is forgotten.
    settled: AtomicBool,
    /// It has never said anything.
    fresh: AtomicBool,
    /// Notes that were on their way to the disk for longer than a call may take.
    late: Mutex<Vec<(LeaseNote, oneshot::Receiver<()>)>>,
    status: watch::Receiver<Status>,
    disk: Disk,
    clock: Clock,
}

impl Desk {
    pub(super) fn new(
        state: LeaseState,
        status: watch::Receiver<Status>,
        disk: Disk,
        clock: Clock,
    ) -> Self {
        Self {
            voter: Mutex::new(VoterAndQueue {
                voter: Voter::new(clock.now(), state.note),
                queued: state.note,
            }),
            settled: AtomicBool::new(state.settled),
            fresh: AtomicBool::new(state.fresh),
            late: Mutex::default(),
            status,
            disk,
            clock,
        }
    }

    fn voter(&self) -> MutexGuard<'_, VoterAndQueue> {
        // Nothing panics half-way through a change of it.
        self.voter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_say(&self) -> Result<(), String> {
        if self.status.borrow().standing != Standing::Voter || !self.settled.load(Ordering::SeqCst)
        {
            return Err(
                "this voter lost its disk, or has never been part of the cluster".to_owned(),
            );
        }
        Ok(())
    }

    /// Answers one question.
    pub(super) async fn answer(&self, holder: &MemberId, ask: LeaseAsk) -> LeaseTold {
        // What was once said by this voter stays said, whether or not it has a say now.
        match ask {
            LeaseAsk::State => return LeaseTold::State(self.state()),
            LeaseAsk::Leave { epoch } => return self.leave(epoch).await,
            LeaseAsk::Renew { .. } | LeaseAsk::Release { .. } | LeaseAsk::Free { .. } => {}
        }
        if let Err(why) = self.has_say() {
            return LeaseTold::Silent(why);
        }
        self.take_late();
        let now = self.clock.now();
        if let LeaseAsk::Renew { epoch, .. } | LeaseAsk::Free { epoch, .. } = ask
            && let Err(why) = self.voter().voter.answers_for(epoch)
        {
            return LeaseTold::Silent(why);
        }
        match ask {
            LeaseAsk::Renew {
                term,
                ttl_ms,
                epoch,
            } => {
                let ttl = Duration::from_millis(ttl_ms);
                let answer = self.voter().voter.renew(now, holder, term, ttl);
                let Answer::AfterNote(note) = answer else {
                    return told(answer);
                };
                if !self.note(note).await {
                    return LeaseTold::Silent("the disk does not take notes".to_owned());
                }
                let mut voter = self.voter();
                // It may have left the epoch meanwhile.
                if let Err(why) = voter.voter.answers_for(epoch) {
                    return LeaseTold::Silent(why);
                }
                // The promise counts from now, not from before the disk.
                told(voter.voter.renew(self.clock.now(), holder, term, ttl))
            }
            LeaseAsk::Release { term } => told(self.voter().voter.release(now, holder, term)),
            LeaseAsk::Free { term, .. } => {
                let answer = self.voter().voter.free(now, term);
                let Answer::AfterNote(note) = answer else {
                    return told(answer);
                };
                if self.note(note).await {
                    LeaseTold::Yes
                } else {
                    LeaseTold::Silent("the disk does not take notes".to_owned())
                }
            }
            LeaseAsk::State | LeaseAsk::Leave { .. } => LeaseTold::State(self.state()),
        }
    }

    fn state(&self) -> LeaseState {
        LeaseState {
            note: self.voter().voter.note(),
            settled: self.settled.load(Ordering::SeqCst),
            fresh: self.fresh.load(Ordering::SeqCst),
        }
    }

    /// Answers for no epoch below this one any more, and tells what it remembers.
    async fn leave(&self, epoch: u64) -> LeaseTold {
        if !self.settled.load(Ordering::SeqCst) {
            return LeaseTold::Silent("this voter has nothing to tell, or forgot it".to_owned());
        }
        let answer = self.voter().voter.leave(epoch);
        if let Answer::AfterNote(note) = answer
            && !self.note(note).await
        {
            return LeaseTold::Silent("the disk does not take notes".to_owned());
        }
        LeaseTold::State(self.state())
    }

    /// Puts a note on disk, and only then into force. One that comes there later than a call may take is in force
    /// from the next question on: on a disk that is slow all the time none would ever be otherwise.
    async fn note(&self, note: LeaseNote) -> bool {
        self.note_within(note, CALL_TIMEOUT).await
    }

    async fn note_within(&self, note: LeaseNote, limit: Duration) -> bool {
        let (note, mut on_disk) = {
            let mut voter = self.voter();
            voter.queued = voter.queued.join(note);
            let note = voter.queued;
            (
                note,
                self.disk.note(LeaseState {
                    note,
                    settled: true,
                    fresh: false,
                }),
            )
        };
        let done = timeout(limit, &mut on_disk).await;
        match done {
            Ok(Ok(())) => self.voter().voter.noted(note),
            // Dropped by the disk: it never will be there.
            Ok(Err(_)) => {}
            Err(_) => {
                let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
                if late.len() < LATE_MAX {
                    late.push((note, on_disk));
                }
            }
        }
        matches!(done, Ok(Ok(())))
    }

    /// Notes that have come to the disk meanwhile are in force.
    fn take_late(&self) {
        let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        late.retain_mut(|(note, on_disk)| match on_disk.try_recv() {
            Ok(()) => {
                self.voter().voter.noted(*note);
                false
            }
            Err(oneshot::error::TryRecvError::Empty) => true,
            Err(oneshot::error::TryRecvError::Closed) => false,
        });
    }

    /// Ends the disk thread.
    pub(super) fn close_disk(&self) {
        self.disk.close();
    }

    pub(super) fn hint(&self) -> LeaseHint {
        match self.has_say() {
            Ok(()) => self.voter().voter.hint(self.clock.now()),
            Err(_) => LeaseHint::Unknown,
        }
    }

    /// A node that was there at the beginning: there has never been a lease it could have forgotten.
    pub(super) fn settle_at_birth(&self) {
        if !self.settled.swap(true, Ordering::SeqCst) {
            self.note_standing(true, false);
        }
    }

    /// A node that has never had a say: there is nothing it could have forgotten, and nothing to tell.
    pub(super) fn is_new(&self) {
        self.settled.store(false, Ordering::SeqCst);
        self.fresh.store(true, Ordering::SeqCst);
        self.note_standing(false, true);
    }

    /// A node whose former disk had a say.
    pub(super) fn has_lost(&self) {
        self.settled.store(false, Ordering::SeqCst);
        self.fresh.store(false, Ordering::SeqCst);
        self.note_standing(false, false);
    }

    /// Queued before the standing is, so that no standing without it can be found on disk.
    fn note_standing(&self, settled: bool, fresh: bool) {
        let note = self.voter().queued;
        drop(self.disk.note(LeaseState {
            note,
            settled,
            fresh,
        }));
    }

    /// Gets, and keeps, this voter's say in the lease, for as long as the process runs.
    pub(super) async fn settle(
        self: Arc<Self>,
        links: Arc<Links>,
        mut members: watch::Receiver<Arc<Members>>,
        me: MemberId,
    ) {
        let started = Instant::now();
        let mut status = self.status.clone();
        loop {
            let config = members.borrow_and_update().settled.clone();
            let votes = status.borrow_and_update().standing == Standing::Voter
                && config.voters.contains_key(&me);
            let whole = self.settled.load(Ordering::SeqCst) || self.fresh.load(Ordering::SeqCst);
            let behind = self.voter().voter.note().epoch < config.epoch;
            let patience = if votes && whole && behind {
                self.settle_in(&links, &config, &me).await;
                SETTLE_INTERVAL_SHORT
            } else if votes && !whole && started.elapsed() >= SILENCE_AFTER_LOSS {
                self.settle_after_loss(&links, &config, &me).await;
                SETTLE_INTERVAL
            } else {
                SETTLE_INTERVAL
            };
            tokio::select! {
                changed = members.changed() => if changed.is_err() { return },
                changed = status.changed() => if changed.is_err() { return },
                () = sleep(patience) => {}
            }
        }
    }

    /// Rule 2 of the promises: a majority of the voters of the epoch before leaves it.
    async fn settle_in(&self, links: &Links, config: &Configuration, me: &MemberId) {
        let before = if config.previous.is_empty() {
            config.voters.keys().cloned().collect()
        } else {
            config.previous.clone()
        };
        let epoch = config.epoch;
        let mut states = ask_all(links, &before, me, LeaseAsk::Leave { epoch }).await;
        if before.contains(me)
            && let LeaseTold::State(own) = self.leave(epoch).await
        {
            states.push(own);
        }
        if states.len() <= before.len() / 2 {
            return;
        }
        let known = states.iter().fold(LeaseNote::default(), |known, s| {
            known.join(s.note.knowledge())
        });
        let now = self.clock.now();
        let answer = self.voter().voter.settle(now, epoch, known);
        // Nobody waits for this answer.
        if let Answer::AfterNote(note) = answer
            && self.note_within(note, SETTLE_NOTE_MAX).await
        {
            self.settled.store(true, Ordering::SeqCst);
            self.fresh.store(false, Ordering::SeqCst);
            tracing::info!(
                epoch,
                "this voter has its say in leases by the new set of voters"
            );
        }
    }

    /// After a lost disk, once Raft has readmitted this node: takes over what a majority of the others noted.
    ///
    /// Its former self may have called a term free. Whoever counted that "yes" counted one of this majority
    /// too, and did so within one call, which is over after [`SILENCE_AFTER_LOSS`]; so the greatest note of
    /// the majority covers every term that its former self helped to call free. Those that are asked must have
    /// settled in the present epoch, and so cover the earlier ones.
    async fn settle_after_loss(&self, links: &Links, config: &Configuration, me: &MemberId) {
        let voters: BTreeSet<MemberId> = config.voters.keys().cloned().collect();
        let states = ask_all(links, &voters, me, LeaseAsk::State).await;
        let notes: Vec<LeaseNote> = states
            .into_iter()
            .filter(|s| s.settled && s.note.epoch == config.epoch)
            .map(|s| s.note.knowledge())
            .collect();
        if notes.len() < config.majority() {
            return;
        }
        let mut note = notes
            .into_iter()
            .fold(self.voter().voter.note(), LeaseNote::join);
        (note.epoch, note.left) = (config.epoch, config.epoch);
        if self.note_within(note, SETTLE_NOTE_MAX).await {
            self.settled.store(true, Ordering::SeqCst);
            tracing::info!(closed_through = %note.closed_through, "this voter has its say in the lease again");
        }
    }
}

fn told(answer: Answer) -> LeaseTold {
    match answer {
        Answer::Yes => LeaseTold::Yes,
        Answer::No(why) => LeaseTold::No(why),
        Answer::AfterNote(_) => LeaseTold::Silent("the note did not take".to_owned()),
    }
}

/// Asks these voters, and waits for all that are connected, or the deadline.
async fn ask_all(
    links: &Links,
    voters: &BTreeSet<MemberId>,
    me: &MemberId,
    ask: LeaseAsk,
) -> Vec<LeaseState> {
    let due = Instant::now() + CALL_TIMEOUT;
    let askers = voters.iter().filter(|v| *v != me);
    let asked: Vec<_> = askers
        .filter_map(|v| links.lease(v)?.ask(ask).ok())
        .collect();
    let mut out = Vec::new();
    for answer in asked {
        if let Ok(Ok(LeaseTold::State(state))) = timeout_at(due, answer).await {
            out.push(state);
        }
    }
    out
}

/// Asks a majority for the lease.
pub(super) struct LeaseRound {
    pub(super) me: MemberId,
    pub(super) desk: Arc<Desk>,
    pub(super) links: Arc<Links>,
    pub(super) members: watch::Receiver<Arc<Members>>,
    pub(super) clock: Clock,
    pub(super) stats: Arc<Stats>,
}

#[derive(Default)]
struct Count {
    yes: usize,
    no: Vec<String>,
    silent: Vec<String>,
    /// How many voters there are.
    voters: usize,
    /// How many of them are a majority.
    majority: usize,
}

impl LeaseRound {
    /// By which set of voters answers are counted now.
    fn config(&self) -> Configuration {
        self.members.borrow().settled.clone()
    }

    /// How many voters have settled in this epoch, or a later one.
    pub(super) async fn settled_in(&self, epoch: u64) -> usize {
        let voters: BTreeSet<MemberId> = self.config().voters.into_keys().collect();
        let mut states = ask_all(&self.links, &voters, &self.me, LeaseAsk::State).await;
        if voters.contains(&self.me) {
            states.push(self.desk.state());
        }
        let settled = states.iter().filter(|s| s.settled && s.note.epoch >= epoch);
        settled.count()
    }

    /// Asks every voter at the same instant; returns as soon as the outcome is settled.
    async fn ask(&self, config: &Configuration, ask: LeaseAsk, patience: Duration) -> Count {
        let (majority, voters) = (config.majority(), config.voters.len());
        let mut answers = JoinSet::new();
        let mut count = Count {
            voters,
            majority,
            ..Count::default()
        };
        for peer in config.voters.keys().filter(|v| **v != self.me) {
            let name = peer.clone();
            match self.links.lease(peer).map(|asker| asker.ask(ask)) {
                Some(Ok(answer)) => {
                    answers.spawn(async move { (name, answer.await.ok()) });
                }
                Some(Err(_)) | None => count.silent.push(format!("{name} is not connected")),
            }
        }
        if config.voters.contains_key(&self.me) {
            let (desk, me) = (Arc::clone(&self.desk), self.me.clone());
            // On its own feet: the local voter promises even when the others were faster.
            let local = tokio::spawn(async move {
                let told = desk.answer(&me, ask).await;
                (me, Some(told))
            });
            let own = self.me.clone();
            answers.spawn(async move { local.await.unwrap_or((own, None)) });
        }
        let due = sleep_until(Instant::now() + patience);
        tokio::pin!(due);
        loop {
            if count.yes >= majority || count.refused() {
                return count;
            }
            let answer = tokio::select! {
                answer = answers.join_next() => answer,
                () = &mut due => return count,
            };
            match answer {
                None => return count,
                Some(Ok((_, Some(LeaseTold::Yes)))) => count.yes += 1,
                Some(Ok((who, Some(LeaseTold::No(why))))) => count.no.push(format!("{who}: {why}")),
                Some(Ok((who, Some(LeaseTold::Silent(why))))) => {
                    count.silent.push(format!("{who}: {why}"));
                }
                Some(Ok((who, Some(LeaseTold::State(_)) | None))) => {
                    count.silent.push(format!("{who}: no answer"));
                }
                Some(Err(_)) => {}
            }
        }
    }

    pub(super) async fn renew(
        &self,
        term: Term,
        ttl: Duration,
    ) -> Result<Renewal, CoordinatorError> {
        Stats::count(&self.stats.renewals);
        // Before anything is sent: the lease may end here before it ends anywhere else, never after.
        let sent_at: BootTime = self.clock.now();
        let ttl_ms = u64::try_from(ttl.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
        let config = self.config();
        let epoch = config.epoch;
        let ask = LeaseAsk::Renew {
            term,
            ttl_ms,
            epoch,
        };
        let count = self.ask(&config, ask, CALL_TIMEOUT.min(ttl)).await;
        if count.is_enough() {
            return Ok(Renewal { sent_at });
        }
        Stats::count(&self.stats.renewals_failed);
        Err(count.failure())
    }

    pub(super) async fn release(&self, term: Term) -> Result<(), CoordinatorError> {
        let ask = LeaseAsk::Release { term };
        let count = self.ask(&self.config(), ask, CALL_TIMEOUT).await;
        if count.is_enough() {
            Ok(())
        } else {
            Err(count.failure())
        }
    }

    pub(super) async fn free(&self, term: Term) -> Result<bool, CoordinatorError> {
        let config = self.config();
        let epoch = config.epoch;
        let ask = LeaseAsk::Free { term, epoch };
        let count = self.ask(&config, ask, CALL_TIMEOUT).await;
        if count.is_enough() {
            return Ok(true);
        }
        if count.no.is_empty() {
            Err(count.failure())
        } else {
            Ok(false)
        }
    }
}

impl Count {
    fn is_enough(&self) -> bool {
        self.voters > 0 && self.yes >= self.majority
    }

    /// No majority can come together any more.
    fn refused(&self) -> bool {
        self.no.len() + self.majority > self.voters
    }

    fn failure(&self) -> CoordinatorError {
        if self.refused() && !self.no.is_empty() {
            return CoordinatorError::Refused(self.no.join("; "));
        }
        if self.voters == 0 {
            return CoordinatorError::Unavailable("the voters are not known yet".to_owned());
        }
        let mut why = vec![format!(
            "{} of {} voters said yes, {} are needed",
            self.yes, self.voters, self.majority
        )];
        why.extend(self.no.iter().chain(&self.silent).cloned());
        CoordinatorError::Unavailable(why.join("; "))
    }
}
