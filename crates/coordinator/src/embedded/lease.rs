//! The lease: this process's voter, and asking all voters at once.
//!
//! Nothing here goes through Raft, its queue or its disk. A renewal is one round trip to memory; the disk
//! is touched only by the first renewal of a longer ttl, and by "free".

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use craton_core::{BootTime, MemberId, Term};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use super::disk::Disk;
use super::format::LeaseState;
use super::peer::Asker;
use super::stats::Stats;
use super::wire::{LeaseAsk, LeaseTold};
use crate::api::{CALL_TIMEOUT, CoordinatorError, LeaseHint, Renewal};
use crate::clock::Clock;
use crate::promise::{Answer, LeaseNote, Voter};
use crate::raft::{Standing, Status};

/// A voter that lost its disk keeps silent for this long after its start: every question that its former
/// self may have answered has been given up by then.
const SILENCE_AFTER_LOSS: Duration = Duration::from_secs(4);

/// How often a voter that lost its disk asks the others for their notes.
const SETTLE_INTERVAL: Duration = Duration::from_millis(500);

pub(super) type LeaseAsker = Asker<LeaseAsk, LeaseTold>;

struct VoterAndQueue {
    voter: Voter,
    /// The join of all notes ever queued for the disk, so that a later one never undoes an earlier one.
    queued: LeaseNote,
}

/// This process's voter.
pub(super) struct Desk {
    voter: Mutex<VoterAndQueue>,
    settled: AtomicBool,
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
        if let Err(why) = self.has_say() {
            return LeaseTold::Silent(why);
        }
        let now = self.clock.now();
        match ask {
            LeaseAsk::Renew { term, ttl_ms } => {
                let ttl = Duration::from_millis(ttl_ms);
                let answer = self.voter().voter.renew(now, holder, term, ttl);
                let Answer::AfterNote(note) = answer else {
                    return told(answer);
                };
                if !self.note(note).await {
                    return LeaseTold::Silent("the disk does not take notes".to_owned());
                }
                // The promise counts from now, not from before the disk.
                told(
                    self.voter()
                        .voter
                        .renew(self.clock.now(), holder, term, ttl),
                )
            }
            LeaseAsk::Release { term } => told(self.voter().voter.release(now, holder, term)),
            LeaseAsk::Free { term } => {
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
            LeaseAsk::State => LeaseTold::State(LeaseState {
                note: self.voter().voter.note(),
                settled: true,
            }),
        }
    }

    /// Puts a note on disk, and only then into force.
    async fn note(&self, note: LeaseNote) -> bool {
        let (note, on_disk) = {
            let mut voter = self.voter();
            voter.queued = voter.queued.join(note);
            let note = voter.queued;
            (
                note,
                self.disk.note(LeaseState {
                    note,
                    settled: true,
                }),
            )
        };
        let done = timeout(CALL_TIMEOUT, on_disk)
            .await
            .is_ok_and(|r| r.is_ok());
        if done {
            self.voter().voter.noted(note);
        }
        done
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
            // Queued before the standing is, so that no standing without it can be found on disk.
            drop(self.disk.note(LeaseState {
                note: LeaseNote::default(),
                settled: true,
            }));
        }
    }

    /// After a lost disk, once Raft has readmitted this node: takes over what a majority of the others noted.
    ///
    /// Its former self may have called a term free. Whoever counted that "yes" counted one of this majority
    /// too, and did so within one call, which is over after [`SILENCE_AFTER_LOSS`]; so the greatest note of
    /// the majority covers every term that its former self helped to call free.
    pub(super) async fn settle(
        self: Arc<Self>,
        peers: BTreeMap<MemberId, LeaseAsker>,
        majority: usize,
    ) {
        if self.settled.load(Ordering::SeqCst) {
            return;
        }
        sleep(SILENCE_AFTER_LOSS).await;
        let mut status = self.status.clone();
        if status
            .wait_for(|s| s.standing == Standing::Voter)
            .await
            .is_err()
        {
            return;
        }
        while !self.settled.load(Ordering::SeqCst) {
            let answers = ask_all(&peers, LeaseAsk::State, CALL_TIMEOUT).await;
            let notes: Vec<LeaseNote> = answers
                .into_iter()
                .filter_map(|a| match a {
                    LeaseTold::State(state) if state.settled => Some(state.note),
                    _ => None,
                })
                .collect();
            if notes.len() >= majority {
                let note = notes
                    .into_iter()
                    .fold(LeaseNote::default(), LeaseNote::join);
                if self.note(note).await {
                    self.settled.store(true, Ordering::SeqCst);
                    tracing::info!(free_through = %note.free_through, "this voter has its say in the lease again");
                    return;
                }
            }
            sleep(SETTLE_INTERVAL).await;
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

/// Asks all peers and waits for all, or the deadline.
async fn ask_all(
    peers: &BTreeMap<MemberId, LeaseAsker>,
    ask: LeaseAsk,
    patience: Duration,
) -> Vec<LeaseTold> {
    let due = Instant::now() + patience;
    let asked: Vec<_> = peers.values().filter_map(|p| p.ask(ask).ok()).collect();
    let mut out = Vec::new();
    for answer in asked {
        if let Ok(Ok(told)) = timeout_at(due, answer).await {
            out.push(told);
        }
    }
    out
}

/// Asks a majority for the lease.
pub(super) struct LeaseRound {
    pub(super) me: MemberId,
    pub(super) desk: Arc<Desk>,
    pub(super) peers: BTreeMap<MemberId, LeaseAsker>,
    pub(super) clock: Clock,
    pub(super) stats: Arc<Stats>,
}

#[derive(Default)]
struct Count {
    yes: usize,
    no: Vec<String>,
    silent: Vec<String>,
}

impl LeaseRound {
    fn majority(&self) -> usize {
        usize::midpoint(self.peers.len(), 1) + 1
    }

    /// Asks every voter at the same instant; returns as soon as the outcome is settled.
    async fn ask(&self, ask: LeaseAsk, patience: Duration) -> Count {
        let (majority, voters) = (self.majority(), self.peers.len() + 1);
        let mut answers = JoinSet::new();
        let mut count = Count::default();
        for (peer, asker) in &self.peers {
            let name = peer.clone();
            match asker.ask(ask) {
                Ok(answer) => {
                    answers.spawn(async move { (name, answer.await.ok()) });
                }
                Err(_) => count.silent.push(format!("{name} is not connected")),
            }
        }
        let (desk, me) = (Arc::clone(&self.desk), self.me.clone());
        // On its own feet: the local voter promises even when the others were faster.
        let local = tokio::spawn(async move {
            let told = desk.answer(&me, ask).await;
            (me, Some(told))
        });
        let own = self.me.clone();
        answers.spawn(async move { local.await.unwrap_or((own, None)) });
        let due = sleep_until(Instant::now() + patience);
        tokio::pin!(due);
        loop {
            if count.yes >= majority || count.no.len() > voters - majority {
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
        let count = self
            .ask(LeaseAsk::Renew { term, ttl_ms }, CALL_TIMEOUT.min(ttl))
            .await;
        if count.yes >= self.majority() {
            return Ok(Renewal { sent_at });
        }
        Stats::count(&self.stats.renewals_failed);
        Err(self.failure(&count))
    }

    pub(super) async fn release(&self, term: Term) -> Result<(), CoordinatorError> {
        let count = self.ask(LeaseAsk::Release { term }, CALL_TIMEOUT).await;
        if count.yes >= self.majority() {
            Ok(())
        } else {
            Err(self.failure(&count))
        }
    }

    pub(super) async fn free(&self, term: Term) -> Result<bool, CoordinatorError> {
        let count = self.ask(LeaseAsk::Free { term }, CALL_TIMEOUT).await;
        if count.yes >= self.majority() {
            return Ok(true);
        }
        if count.no.is_empty() {
            Err(self.failure(&count))
        } else {
            Ok(false)
        }
    }

    fn failure(&self, count: &Count) -> CoordinatorError {
        let voters = self.peers.len() + 1;
        if count.no.len() > voters - self.majority() {
            return CoordinatorError::Refused(count.no.join("; "));
        }
        let mut why = vec![format!(
            "{} of {voters} voters said yes, {} are needed",
            count.yes,
            self.majority()
        )];
        why.extend(count.no.iter().chain(&count.silent).cloned());
        CoordinatorError::Unavailable(why.join("; "))
    }
}
