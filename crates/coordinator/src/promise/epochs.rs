//! Voters that change while leases are held, renewed late, and asked to be over: seeds, with an oracle.
//!
//! The sets of voters are committed by an oracle, as Raft would, each one voter away from the one before.
//! Everything else is the real [`Voter`]: messages are late, lost and repeated, voters learn of a new set at any
//! time or never, stop and start again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use craton_core::{BootTime, MemberId, Term};

use super::{Answer, LeaseNote, Voter};

const TTL_MS: u64 = 100;
const HOSTS: usize = 6;
const STEPS: u64 = 3000;

/// A rule of the four that is broken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flaw {
    AnyEpoch,
    NobodyLeaves,
    NoWait,
    NoGate,
}

struct Dice(u64);

impl Dice {
    /// splitmix64.
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n
    }

    fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }
}

#[derive(Clone, Copy, Debug)]
enum Ask {
    Renew(Term),
    Free(Term),
    Leave,
}

/// A question to all voters of an epoch, counted by them.
#[derive(Clone, Debug)]
struct Round {
    by: usize,
    ask: Ask,
    epoch: u64,
    sent: u64,
    yes: BTreeSet<usize>,
    known: LeaseNote,
    done: bool,
}

struct Host {
    voter: Voter,
    /// The newest epoch that it knows to be committed.
    knows: u64,
    /// What it holds: the term, and until when by its own count.
    lease: Option<(Term, u64)>,
}

struct World {
    dice: Dice,
    flaw: Option<Flaw>,
    now: u64,
    epochs: Vec<BTreeSet<usize>>,
    hosts: Vec<Host>,
    rounds: Vec<Round>,
    /// When, which round, and the host asked or (answered) the host that says yes with its note.
    flying: BTreeMap<(u64, u64), (usize, usize, Option<LeaseNote>)>,
    sent: u64,
    /// The term that may be held, and by whom.
    term: (Term, usize),
    elections: u64,
    renewals: u64,
}

fn at(ms: u64) -> BootTime {
    BootTime(ms * 1_000_000)
}

fn name(host: usize) -> MemberId {
    MemberId::new(format!("h{host}")).unwrap()
}

impl World {
    fn new(seed: u64, flaw: Option<Flaw>) -> Self {
        let host = |_| Host {
            voter: Voter::new(at(1000), LeaseNote::default()),
            knows: 0,
            lease: None,
        };
        Self {
            dice: Dice(seed),
            flaw,
            now: 1000,
            epochs: vec![(0..3).collect()],
            hosts: (0..HOSTS).map(host).collect(),
            rounds: Vec::new(),
            flying: BTreeMap::new(),
            sent: 0,
            term: (Term(1), 0),
            elections: 0,
            renewals: 0,
        }
    }

    fn epoch(&self) -> u64 {
        self.epochs.len() as u64 - 1
    }

    fn voters(&self, epoch: u64) -> BTreeSet<usize> {
        self.epochs[usize::try_from(epoch).unwrap()].clone()
    }

    fn any_host(&mut self) -> usize {
        usize::try_from(self.dice.below(HOSTS as u64)).unwrap()
    }

    fn fly(&mut self, round: usize, host: usize, answer: Option<LeaseNote>) {
        for _ in 0..=u64::from(self.dice.chance(50)) {
            if self.dice.chance(100) {
                continue;
            }
            let late = if self.dice.chance(30) { 400 } else { 12 };
            let when = self.now + self.dice.below(late);
            self.sent += 1;
            self.flying.insert((when, self.sent), (round, host, answer));
        }
    }

    fn ask(&mut self, by: usize, ask: Ask, epoch: u64) {
        // To leave an epoch is asked of the voters of the one before.
        let asked = match ask {
            Ask::Leave => self.voters(epoch - 1),
            Ask::Renew(_) | Ask::Free(_) => self.voters(epoch),
        };
        self.rounds.push(Round {
            by,
            ask,
            epoch,
            sent: self.now,
            yes: BTreeSet::new(),
            known: LeaseNote::default(),
            done: false,
        });
        for host in asked {
            self.fly(self.rounds.len() - 1, host, None);
        }
    }

    /// The disk is fast here: what has to be noted is noted at once.
    fn answer(&mut self, round: usize, host: usize) {
        let Round { by, ask, epoch, .. } = self.rounds[round].clone();
        let (now, any) = (at(self.now), self.flaw == Some(Flaw::AnyEpoch));
        let voter = &mut self.hosts[host].voter;
        if !any && !matches!(ask, Ask::Leave) && voter.answers_for(epoch).is_err() {
            return;
        }
        let ttl = Duration::from_millis(TTL_MS);
        let yes = loop {
            let answer = match ask {
                Ask::Renew(term) => voter.renew(now, &name(by), term, ttl),
                Ask::Free(term) => voter.free(now, term),
                Ask::Leave if self.flaw == Some(Flaw::NobodyLeaves) => Answer::Yes,
                Ask::Leave => voter.leave(epoch),
            };
            match answer {
                Answer::Yes => break true,
                Answer::No(_) => break false,
                Answer::AfterNote(note) => voter.noted(note),
            }
        };
        if yes {
            let note = voter.note();
            self.fly(round, host, Some(note));
        }
    }

    fn count(&mut self, round: usize, host: usize, note: LeaseNote) {
        let of = match self.rounds[round].ask {
            Ask::Leave => self.rounds[round].epoch - 1,
            Ask::Renew(_) | Ask::Free(_) => self.rounds[round].epoch,
        };
        let majority = self.voters(of).len() / 2 + 1;
        let r = &mut self.rounds[round];
        r.yes.insert(host);
        r.known = r.known.join(note);
        if r.done || r.yes.len() < majority {
            return;
        }
        r.done = true;
        let r = r.clone();
        match r.ask {
            Ask::Renew(term) => self.renewed(r.by, term, r.sent),
            Ask::Free(term) => self.freed(r.by, term),
            Ask::Leave => self.settle(r.by, r.epoch, r.known),
        }
    }

    fn renewed(&mut self, by: usize, term: Term, sent: u64) {
        self.renewals += 1;
        let until = sent + TTL_MS;
        assert!(
            term == self.term.0 || until <= self.now,
            "a lease of term {term} is renewed although {} is the term",
            self.term.0
        );
        if term == self.term.0 {
            let before = self.hosts[by].lease.filter(|l| l.0 == term);
            self.hosts[by].lease = Some((term, until.max(before.map_or(0, |l| l.1))));
        }
    }

    fn freed(&mut self, by: usize, term: Term) {
        if term != self.term.0 {
            return;
        }
        let held = self.hosts.iter().filter_map(|h| h.lease);
        for (held, until) in held {
            assert!(
                held > term || until <= self.now,
                "term {term} is called free while it is held"
            );
        }
        self.term = (Term(term.0 + 1), by);
        self.elections += 1;
    }

    fn settle(&mut self, by: usize, epoch: u64, known: LeaseNote) {
        let (now, no_wait) = (at(self.now), self.flaw == Some(Flaw::NoWait));
        let voter = &mut self.hosts[by].voter;
        if let Answer::AfterNote(note) = voter.settle(now, epoch, known) {
            voter.noted(note);
        }
        if no_wait {
            voter.knows_since = at(0);
        }
    }

    /// Commits the next set of voters, if the present one has settled.
    fn change(&mut self) {
        let epoch = self.epoch();
        let voters = self.voters(epoch);
        let settled = |h: &&usize| self.hosts[**h].voter.note().epoch >= epoch;
        let gate = voters.iter().filter(settled).count() > voters.len() / 2;
        if !gate && self.flaw != Some(Flaw::NoGate) {
            return;
        }
        let mut next = voters.clone();
        let host = self.any_host();
        if !next.remove(&host) {
            next.insert(host);
        }
        if !next.is_empty() {
            self.epochs.push(next);
        }
    }

    fn step(&mut self) {
        self.now += 1;
        if self.dice.chance(40) {
            self.change();
        }
        let host = self.any_host();
        if self.dice.chance(60) {
            // Some learn of all that is committed, some of the next set only.
            let all = self.dice.chance(500);
            let newest = self.epoch();
            let knows = &mut self.hosts[host].knows;
            *knows = if all { newest } else { newest.min(*knows + 1) };
        }
        if self.dice.chance(4) {
            let note = self.hosts[host].voter.note();
            self.hosts[host].voter = Voter::new(at(self.now), note);
        }
        let (knows, settled) = (self.hosts[host].knows, self.hosts[host].voter.note().epoch);
        if knows > settled && self.voters(knows).contains(&host) && self.dice.chance(200) {
            self.ask(host, Ask::Leave, knows);
        }
        if self.dice.chance(200) {
            let (term, holder) = self.term;
            let knows = self.hosts[holder].knows;
            self.ask(holder, Ask::Renew(term), knows);
        }
        // A holder that was deposed does not know, and goes on.
        if let Some((term, _)) = self.hosts[host].lease
            && self.dice.chance(100)
        {
            self.ask(host, Ask::Renew(term), knows);
        }
        if self.dice.chance(30) {
            self.ask(host, Ask::Free(self.term.0), knows);
        }
        while let Some(entry) = self.flying.first_entry() {
            if entry.key().0 > self.now {
                break;
            }
            let (round, host, answer) = entry.remove();
            match answer {
                None => self.answer(round, host),
                Some(note) => self.count(round, host, note),
            }
        }
    }
}

fn run(seed: u64, flaw: Option<Flaw>) -> World {
    let mut world = World::new(seed, flaw);
    for _ in 0..STEPS {
        world.step();
    }
    world
}

#[test]
fn no_two_majorities_disagree_while_voters_change() {
    let count = std::env::var("CRATON_RAFT_SEEDS").ok();
    let count = count.and_then(|s| s.parse().ok()).unwrap_or(300);
    let (mut epochs, mut elections, mut renewals) = (0, 0, 0);
    for seed in 0..count {
        let world = std::panic::catch_unwind(|| run(seed, None));
        let world = world.unwrap_or_else(|e| {
            eprintln!("seed {seed} fails");
            std::panic::resume_unwind(e)
        });
        epochs += world.epoch();
        elections += world.elections;
        renewals += world.renewals;
    }
    eprintln!(
        "{count} seeds: {epochs} changes of voters, {elections} elections, {renewals} renewals"
    );
    assert!(
        epochs > count * 5 && elections > count && renewals > count * 50,
        "too little happened to check anything"
    );
}

fn is_noticed(flaw: Flaw) {
    let noticed =
        (0..2000).find(|seed| std::panic::catch_unwind(|| run(*seed, Some(flaw))).is_err());
    let seed = noticed.unwrap_or_else(|| panic!("{flaw:?} was not noticed"));
    eprintln!("{flaw:?}: noticed in seed {seed}");
}

#[test]
fn answers_for_any_epoch_are_noticed() {
    is_noticed(Flaw::AnyEpoch);
}

#[test]
fn epochs_that_nobody_leaves_are_noticed() {
    is_noticed(Flaw::NobodyLeaves);
}

#[test]
fn calling_free_right_after_settling_is_noticed() {
    is_noticed(Flaw::NoWait);
}

#[test]
fn changes_before_the_last_one_has_settled_are_noticed() {
    is_noticed(Flaw::NoGate);
}
