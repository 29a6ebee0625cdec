//! The product's own rules, asked by the model. Their answers are kept: they are pure functions.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use craton_core::decide::next_sync;
use craton_core::election::Ballot;
use craton_core::records::{At, Leadership, MemberRecord, MemberRef, Seal as SealRecord};
use craton_core::settings::Durability;
use craton_core::sync::{StandbyView, SyncInput, SyncSet, SyncStep, next_step};
use craton_core::{Incarnation, Lsn, MemberId, Term, TimelineId};

use super::fingerprint::Fingerprint;
use super::state::{MEMBERS_MAX, Seal, Set};

/// Keeps answers without a random seed: the same run explores in the same order.
type Kept<K, V> = HashMap<K, V, BuildHasherDefault<Fingerprint>>;

/// What the leader's rule answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Nothing to do now: done, or waiting for the others' flush.
    Nothing,
    /// PostgreSQL is to wait for this set.
    SetPostgres(Set),
    /// The coordinator is to be told this set.
    SetCoordinator(Set),
}

/// What [`next_step`] is asked about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Question {
    /// (V, k) as the leader knows it from the coordinator.
    pub coordinator: Set,
    /// (Vp, kp), proven in force.
    pub postgres: Set,
    /// The members that should be in V, and k.
    pub wanted: Set,
    /// The flush position at which the proof was made.
    pub barrier: u8,
    /// The senders: incarnation and flush position.
    pub senders: [(u8, u8); MEMBERS_MAX],
}

/// An election, and who asks whether it could win.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Election {
    /// (V, k).
    pub sync: Set,
    /// The former leader, counted from 1, and its incarnation.
    pub previous: (u8, u8),
    /// The seals.
    pub seals: [Seal; MEMBERS_MAX],
    /// The candidate.
    pub candidate: u8,
}

/// The rules with what they have answered.
#[derive(Debug)]
pub struct Rules {
    ids: Vec<MemberId>,
    steps: Kept<Question, Step>,
    wins: Kept<Election, bool>,
    next: Kept<(Set, (u8, u8), u8), Set>,
    covers: Kept<(Set, Set), bool>,
}

impl Default for Rules {
    fn default() -> Self {
        #[allow(clippy::expect_used, reason = "a letter is a member name")]
        let ids = ["a", "b", "c", "d"].map(|n| MemberId::new(n).expect("a letter"));
        Self {
            ids: ids.into(),
            steps: Kept::default(),
            wins: Kept::default(),
            next: Kept::default(),
            covers: Kept::default(),
        }
    }
}

impl Rules {
    fn unpacked(&self, set: Set) -> SyncSet {
        let members = self
            .ids
            .iter()
            .enumerate()
            .map(|(m, id)| (id, set.incarnation(m)))
            .filter(|(_, i)| *i != 0)
            .map(|(id, i)| (id.clone(), Incarnation(u64::from(i))))
            .collect();
        SyncSet {
            members,
            k: set.k(),
        }
    }

    fn packed(&self, set: &SyncSet) -> Set {
        let mut out = Set::default();
        for (m, id) in self.ids.iter().enumerate() {
            if let Some(i) = set.members.get(id) {
                out = out.with(m, u8::try_from(i.0).unwrap_or(0xF));
            }
        }
        out.with_k(set.k)
    }

    fn reference(&self, number: u8, incarnation: u8) -> Option<MemberRef> {
        let member = self.ids.get(usize::from(number).checked_sub(1)?)?.clone();
        Some(MemberRef {
            member,
            incarnation: Incarnation(u64::from(incarnation)),
        })
    }

    fn election(&self, sync: Set, previous: (u8, u8)) -> Leadership {
        Leadership {
            term: Term(1),
            leader: None,
            previous: self.reference(previous.0, previous.1),
            sync: self.unpacked(sync),
            durability: Durability::Quorum,
            timeline: TimelineId(1),
            open: false,
            preferred: None,
            allow_data_loss: false,
            cause: String::new(),
        }
    }

    /// [`next_step`].
    pub fn step(&mut self, q: &Question) -> Step {
        if let Some(known) = self.steps.get(q) {
            return *known;
        }
        let standbys: Vec<StandbyView> = (0..MEMBERS_MAX)
            .filter(|m| q.senders[*m].0 != 0)
            .map(|m| StandbyView {
                member: self.ids[m].clone(),
                incarnation: Incarnation(u64::from(q.senders[m].0)),
                streaming: true,
                flush_lsn: Lsn(u64::from(q.senders[m].1)),
            })
            .collect();
        let step = next_step(&SyncInput {
            coordinator: &self.unpacked(q.coordinator),
            postgres: &self.unpacked(q.postgres),
            wanted: &self.unpacked(q.wanted).members,
            wanted_k: q.wanted.k(),
            barrier: Lsn(u64::from(q.barrier)),
            standbys: &standbys,
        });
        let step = match step {
            SyncStep::Done | SyncStep::WaitFlushed(_) => Step::Nothing,
            SyncStep::SetPostgres(set) => Step::SetPostgres(self.packed(&set)),
            SyncStep::SetCoordinator(set) => Step::SetCoordinator(self.packed(&set)),
        };
        self.steps.insert(*q, step);
        step
    }

    /// [`Ballot::tally`]: could the candidate win, if it alone were known to be alive?
    pub fn wins(&mut self, e: &Election) -> bool {
        if let Some(known) = self.wins.get(e) {
            return *known;
        }
        let leadership = self.election(e.sync, e.previous);
        let seal = |s: &Seal| SealRecord {
            term: leadership.term,
            incarnation: Incarnation(u64::from(s.incarnation)),
            timeline: TimelineId(u32::from(s.position.0)),
            lsn: Lsn(u64::from(s.position.1)),
        };
        let seals: BTreeMap<MemberId, At<SealRecord>> = (0..MEMBERS_MAX)
            .filter(|m| e.seals[*m].incarnation != 0)
            .map(|m| (self.ids[m].clone(), at(seal(&e.seals[m]))))
            .collect();
        let members = self
            .ids
            .iter()
            .map(|id| {
                let record = MemberRecord {
                    host: String::new(),
                    port: 0,
                    api: String::new(),
                    priority: 1,
                    incarnation: None,
                    leaving: false,
                };
                (id.clone(), at(record))
            })
            .collect();
        let candidate = &self.ids[usize::from(e.candidate)];
        let won = Ballot {
            leadership: &leadership,
            seals: &seals,
            members: &members,
            alive: &[candidate.clone()].into(),
            unfit: &[].into(),
            leader_lsn: None,
            max_lag_bytes: 0,
        }
        .tally()
        .winner
        .as_ref()
            == Some(candidate);
        self.wins.insert(*e, won);
        won
    }

    /// [`next_sync`]: V' and k'.
    pub fn next_sync(&mut self, sync: Set, previous: (u8, u8), winner: (u8, u8)) -> Set {
        if let Some(known) = self.next.get(&(sync, previous, winner.0)) {
            return *known;
        }
        let l = self.election(sync, previous);
        let set = self
            .reference(winner.0, winner.1)
            .map_or(Set::default(), |w| self.packed(&next_sync(&l, &w)));
        self.next.insert((sync, previous, winner.0), set);
        set
    }

    /// [`SyncSet::covers`].
    pub fn covers(&mut self, postgres: Set, coordinator: Set) -> bool {
        if let Some(known) = self.covers.get(&(postgres, coordinator)) {
            return *known;
        }
        let covers = self.unpacked(postgres).covers(&self.unpacked(coordinator));
        self.covers.insert((postgres, coordinator), covers);
        covers
    }
}

fn at<T>(value: T) -> At<T> {
    At { revision: 1, value }
}
