//! The product's own rules, asked by the model. Their answers are kept: they are pure functions.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::time::Duration;

use craton_core::decide::next_sync;
use craton_core::election::{Ballot, Tally};
use craton_core::promise::{Answer, Ask, Book, Facts, Ledger, PromiseNeed};
use craton_core::records::{At, Leadership, MemberRecord, MemberRef, Seal as SealRecord};
use craton_core::settings::Durability;
use craton_core::sync::mode::{Modes, names, next_step};
use craton_core::sync::{StandbyView, SyncInput, SyncSet, SyncStep};
use craton_core::{BootTime, Incarnation, Lsn, MemberId, Term, TimelineId};

use super::fingerprint::Fingerprint;
use super::state::{Kind, MEMBERS_MAX, Mode, Seal, Set};

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
    /// The mode that is wished.
    pub wish: Mode,
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
    /// What the members can be.
    pub kinds: [Kind; MEMBERS_MAX],
}

/// A leader asks a member for a promise.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PromiseQuestion {
    /// The leader.
    pub leader: u8,
    /// The term it leads.
    pub term: u8,
    /// The incarnation in which its V lists the member; 0: not at all.
    pub listed: u8,
    /// The member's floor.
    pub floor: u8,
    /// The member's incarnation.
    pub incarnation: u8,
    /// Whom the member streams from, counted from 1; 0: nobody.
    pub upstream: u8,
}

/// What the coordinator holds, who promised in which incarnation, and whether one less is to do.
type Given = (Set, [u8; MEMBERS_MAX], bool);

/// How long promises last. There are no clocks in the model: all that counts is whether one runs.
const TTL: Duration = Duration::from_secs(1);
/// Now, in a model without clocks.
const NOW: BootTime = BootTime(1_000_000_000);

/// The rules with what they have answered.
#[derive(Debug)]
pub struct Rules {
    ids: Vec<MemberId>,
    steps: Kept<Question, Step>,
    wins: Kept<Election, bool>,
    catches_up: Kept<(Election, usize), bool>,
    next: Kept<(Set, (u8, u8), u8), Set>,
    begins: Kept<(Set, u32), Set>,
    covers: Kept<(Set, Set), bool>,
    suffices: RefCell<Kept<Given, bool>>,
    promises: RefCell<Kept<PromiseQuestion, bool>>,
}

impl Default for Rules {
    fn default() -> Self {
        #[allow(clippy::expect_used, reason = "a letter is a member name")]
        let ids = ["a", "b", "c", "d"].map(|n| MemberId::new(n).expect("a letter"));
        Self {
            ids: ids.into(),
            steps: Kept::default(),
            wins: Kept::default(),
            catches_up: Kept::default(),
            next: Kept::default(),
            begins: Kept::default(),
            covers: Kept::default(),
            suffices: RefCell::default(),
            promises: RefCell::default(),
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
        let k = match set.k() {
            Set::CLOSED => u32::MAX,
            k => k,
        };
        SyncSet { members, k }
    }

    fn packed(&self, set: &SyncSet) -> Set {
        let mut out = Set::default();
        for (m, id) in self.ids.iter().enumerate() {
            if let Some(i) = set.members.get(id) {
                out = out.with(m, u8::try_from(i.0).unwrap_or(0xF));
            }
        }
        out.with_k(set.k.min(Set::CLOSED))
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
            durability: durability(sync.mode()),
            timeline: TimelineId(1),
            open: false,
            restarted: false,
            preferred: None,
            allow_data_loss: false,
            recovered: false,
            cause: String::new(),
        }
    }

    /// What PostgreSQL waits for from its first write on, as `decide` has it.
    pub fn begins(&mut self, known: Set, wanted_k: u32) -> Set {
        if let Some(set) = self.begins.get(&(known, wanted_k)) {
            return *set;
        }
        let sync = self.unpacked(known);
        let set = self.packed(&names(&sync, durability(known.mode()), wanted_k));
        self.begins.insert((known, wanted_k), set);
        set
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
        let modes = Modes {
            in_force: durability(q.coordinator.mode()),
            wish: durability(q.wish),
        };
        let input = SyncInput {
            coordinator: &self.unpacked(q.coordinator),
            postgres: &self.unpacked(q.postgres),
            wanted: &self.unpacked(q.wanted).members,
            wanted_k: q.wanted.k(),
            barrier: Lsn(u64::from(q.barrier)),
            standbys: &standbys,
        };
        let (step, mode) = next_step(modes, &input);
        let step = match step {
            SyncStep::Done | SyncStep::WaitFlushed(_) => Step::Nothing,
            SyncStep::SetPostgres(set) => Step::SetPostgres(self.packed(&set)),
            SyncStep::SetCoordinator(set) => {
                Step::SetCoordinator(self.packed(&set).with_mode(packed_mode(mode)))
            }
        };
        self.steps.insert(*q, step);
        step
    }

    /// [`Ballot::tally`]: could the candidate win, if it alone were known to be alive?
    pub fn wins(&mut self, e: &Election) -> bool {
        if let Some(known) = self.wins.get(e) {
            return *known;
        }
        let candidate = &self.ids[usize::from(e.candidate)];
        let won = self.tally(e, &[candidate]).winner.as_ref() == Some(candidate);
        self.wins.insert(*e, won);
        won
    }

    /// [`Ballot::tally`]: is the candidate to get the WAL of `from` first, if these two are alive?
    pub fn catches_up(&mut self, e: &Election, from: usize) -> bool {
        if let Some(known) = self.catches_up.get(&(*e, from)) {
            return *known;
        }
        let (candidate, holder) = (&self.ids[usize::from(e.candidate)], &self.ids[from]);
        let tally = self.tally(e, &[candidate, holder]);
        let gets = tally
            .catch_up
            .is_some_and(|c| c.from == *holder && c.followers.contains(candidate));
        self.catches_up.insert((*e, from), gets);
        gets
    }

    fn tally(&self, e: &Election, alive: &[&MemberId]) -> Tally {
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
            .zip(e.kinds)
            .filter(|(_, kind)| *kind != Kind::Receiver)
            .map(|(id, kind)| {
                let record = MemberRecord {
                    host: String::new(),
                    port: 0,
                    api: String::new(),
                    priority: u32::from(kind == Kind::Full),
                    incarnation: None,
                    leaving: false,
                };
                (id.clone(), at(record))
            })
            .collect();
        Ballot {
            leadership: &leadership,
            seals: &seals,
            members: &members,
            alive: &alive.iter().map(|m| (*m).clone()).collect(),
            unfit: &[].into(),
            leader_lsn: None,
            max_lag_bytes: 0,
        }
        .tally()
    }

    /// [`next_sync`]: V' and k'.
    pub fn next_sync(&mut self, sync: Set, previous: (u8, u8), winner: (u8, u8)) -> Set {
        if let Some(known) = self.next.get(&(sync, previous, winner.0)) {
            return *known;
        }
        let l = self.election(sync, previous);
        let set = self
            .reference(winner.0, winner.1)
            .map_or(Set::default(), |w| self.packed(&next_sync(&l, &w)))
            .with_mode(sync.mode());
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

impl Rules {
    /// [`PromiseNeed`] and [`Ledger`]: do these promises (by incarnation, 0 for none) keep everybody else from leading
    /// while the coordinator holds `set`? `fewer` is a rule broken on purpose: one less than is needed.
    pub fn suffices(&self, set: Set, promises: [u8; MEMBERS_MAX], fewer: bool) -> bool {
        let key = (set, promises, fewer);
        if let Some(known) = self.suffices.borrow().get(&key) {
            return *known;
        }
        let (term, until) = (Term(1), NOW.after(TTL));
        let mut ledger = Ledger::default();
        for (id, given) in self
            .ids
            .iter()
            .zip(promises)
            .filter(|(_, given)| *given != 0)
        {
            ledger.promised(term, id, Incarnation(u64::from(given)), until);
        }
        let mut need = PromiseNeed::of(&self.unpacked(set), durability(set.mode()));
        let enough = if fewer && need.needed == 1 {
            true
        } else {
            need.needed -= usize::from(fewer && need.needed > 0);
            ledger.deadline(term, &[need]).is_some()
        };
        self.suffices.borrow_mut().insert(key, enough);
        enough
    }

    /// [`Book::ask`]: does the member promise?
    pub fn promises(&self, q: PromiseQuestion) -> bool {
        if let Some(known) = self.promises.borrow().get(&q) {
            return *known;
        }
        let name = |n: u8| self.ids.get(usize::from(n)).cloned();
        let follows = q.upstream.checked_sub(1).and_then(name);
        let answer = name(q.leader).filter(|_| q.listed != 0).map(|leader| {
            let ask = Ask {
                leader,
                term: Term(u64::from(q.term)),
                incarnation: Incarnation(u64::from(q.listed)),
                ttl_ms: u64::try_from(TTL.as_millis()).unwrap_or(u64::MAX),
            };
            let floor = Term(u64::from(q.floor));
            let facts = Facts {
                floor,
                incarnation: Some(Incarnation(u64::from(q.incarnation))),
                // What is streamed in is of the floor's term: following raises it.
                streams_from: follows.map(|m| (m, floor)),
                known_term: floor,
            };
            Book::new(BootTime(0), TTL).ask(NOW, &ask, &facts)
        });
        let yes = answer == Some(Answer::Yes);
        self.promises.borrow_mut().insert(q, yes);
        yes
    }

    /// [`Book::begin_seal`]: may a member whose promise to the leader of `promised_in` runs seal for `term`?
    pub fn may_seal(&self, promised_in: u8, term: u8) -> bool {
        let mut book = Book::new(BootTime(0), TTL);
        let (Some(leader), floor) = (self.ids.first(), Term(u64::from(promised_in))) else {
            return true;
        };
        let ask = Ask {
            leader: leader.clone(),
            term: floor,
            incarnation: Incarnation(1),
            ttl_ms: u64::try_from(TTL.as_millis()).unwrap_or(u64::MAX),
        };
        let facts = Facts {
            floor,
            incarnation: Some(Incarnation(1)),
            streams_from: Some((leader.clone(), floor)),
            known_term: floor,
        };
        let promised = book.ask(NOW, &ask, &facts) == Answer::Yes;
        promised && book.begin_seal(NOW, Term(u64::from(term))).is_ok()
    }
}

fn durability(mode: Mode) -> Durability {
    match mode {
        Mode::Quorum => Durability::Quorum,
        Mode::Strict => Durability::Strict,
        Mode::Async => Durability::Async,
    }
}

fn packed_mode(durability: Durability) -> Mode {
    match durability {
        Durability::Quorum => Mode::Quorum,
        Durability::Strict => Mode::Strict,
        Durability::Async => Mode::Async,
    }
}

fn at<T>(value: T) -> At<T> {
    At { revision: 1, value }
}
