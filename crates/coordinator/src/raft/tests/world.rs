//! Nodes, disks and a network in one thread, from a seed, with an oracle that watches all of it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use craton_core::{BootTime, MemberId};

use crate::raft::node::Role;
use crate::raft::*;

pub(super) const STEP_MS: u64 = 5;

/// splitmix64.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.draw() % n
    }

    pub(super) fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }
}

/// A register: each command is `id expected new`.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub(super) struct Register {
    pub(super) value: u64,
    pub(super) applied: Index,
}

pub(super) struct Node {
    pub(super) raft: Option<Raft>,
    pub(super) disk: Durable,
    writing: VecDeque<(u64, u64, Write)>,
    pub(super) register: Register,
    /// Disk stalls until then, in ms.
    pub(super) stalled_until: u64,
    /// Operations that wait: where they are in the log, and what had completed when they began.
    ops: BTreeMap<(RaftTerm, Index), Index>,
    reads: BTreeMap<u64, Index>,
    reads_ready: Vec<(Index, Index)>,
}

/// Chances per step or message, in 1/1000.
#[derive(Clone, Copy, Default)]
pub(super) struct Faults {
    pub(super) drop: u64,
    pub(super) duplicate: u64,
    pub(super) delay_ms_max: u64,
    pub(super) crash: u64,
    pub(super) restart: u64,
    pub(super) cut: u64,
    pub(super) stall: u64,
    pub(super) wipe: u64,
    pub(super) change: u64,
}

/// A rule of [`crate::raft::membership`] that this world breaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Flaw {
    /// The next change does not wait for the one before.
    Impatient,
    /// Two voters at once.
    Jump,
}

pub(super) struct World {
    pub(super) flaw: Option<Flaw>,
    /// Who was there at the beginning; the others were taken in.
    founders: BTreeSet<MemberId>,
    /// The newest configuration that anybody applied, with its index.
    pub(super) config: (Index, Configuration),
    pub(super) changes: u64,
    pub(super) dice: Dice,
    pub(super) now_ms: u64,
    pub(super) nodes: BTreeMap<MemberId, Node>,
    pub(super) faults: Faults,
    flying: BTreeMap<(u64, u64), Message>,
    sent: u64,
    pub(super) cut: BTreeSet<(MemberId, MemberId)>,
    // the oracle
    committed: BTreeMap<Index, Entry>,
    leaders: BTreeMap<RaftTerm, MemberId>,
    completed_through: Index,
    pub(super) completed: u64,
    pub(super) reads_done: u64,
    pub(super) wipes: u64,
    next_read: u64,
}

pub(super) fn id(i: usize) -> MemberId {
    MemberId::new(format!("n{i}")).unwrap()
}

impl World {
    pub(super) fn new(seed: u64, n: usize) -> Self {
        let mut world = Self {
            flaw: None,
            founders: (0..n).map(id).collect(),
            config: (0, Configuration::default()),
            changes: 0,
            dice: Dice(seed),
            now_ms: 1000,
            nodes: BTreeMap::new(),
            faults: Faults {
                delay_ms_max: 2,
                ..Faults::default()
            },
            flying: BTreeMap::new(),
            sent: 0,
            cut: BTreeSet::new(),
            committed: BTreeMap::new(),
            leaders: BTreeMap::new(),
            completed_through: 0,
            completed: 0,
            reads_done: 0,
            wipes: 0,
            next_read: 0,
        };
        for i in 0..n {
            world.add_node(&id(i));
        }
        for i in 0..n {
            world.start(&id(i));
        }
        world
    }

    /// A host with an empty disk; not started.
    pub(super) fn add_node(&mut self, who: &MemberId) {
        let node = Node {
            raft: None,
            disk: Durable::default(),
            writing: VecDeque::new(),
            register: Register::default(),
            stalled_until: 0,
            ops: BTreeMap::new(),
            reads: BTreeMap::new(),
            reads_ready: Vec::new(),
        };
        self.nodes.insert(who.clone(), node);
        self.wipe_disk(who);
    }

    /// Asks a node to change the members.
    pub(super) fn change(&mut self, who: &MemberId, change: &Change) -> Result<(), ChangeRefused> {
        let (now, flaw) = (self.now(), self.flaw);
        let voters = self.voters();
        let lost = |v: &MemberId| self.nodes[v].disk.hard.standing != Standing::Voter;
        if self.faults.wipe > 0 && voters.iter().any(lost) {
            // Fewer voters, one of them without its disk: no operator does that.
            return Err(ChangeRefused::Pending);
        }
        let births = self.births();
        let node = self.nodes.get_mut(who).unwrap();
        let Some(raft) = &mut node.raft else {
            return Err(ChangeRefused::Pending);
        };
        let made = match (raft.change(now, change), flaw) {
            (Err(ChangeRefused::Pending), Some(Flaw::Impatient)) => {
                let next = raft.latest.flawed(&[change], &births)?;
                raft.append_own(Payload::Configure(next));
                Ok(())
            }
            (made, _) => made.map(drop),
        };
        self.drain(who);
        made
    }

    fn births(&self) -> Births {
        let birth = |(who, n): (&MemberId, &Node)| (who.clone(), n.disk.hard.birth);
        self.nodes.iter().map(birth).collect()
    }

    /// Several changes in one step.
    pub(super) fn jump(&mut self, who: &MemberId, changes: &[&Change]) {
        let births = self.births();
        let node = self.nodes.get_mut(who).unwrap();
        if let Some(raft) = node
            .raft
            .as_mut()
            .filter(|r| r.is_leader() && !r.change_pending())
            && let Ok(next) = raft.latest.flawed(changes, &births)
        {
            raft.append_own(Payload::Configure(next));
        }
        self.drain(who);
    }

    pub(super) fn now(&self) -> BootTime {
        BootTime(self.now_ms * 1_000_000)
    }

    fn wipe_disk(&mut self, who: &MemberId) {
        let birth = self.dice.draw() | 1;
        let node = self.nodes.get_mut(who).unwrap();
        node.disk = Durable {
            hard: HardState {
                birth,
                ..HardState::default()
            },
            ..Durable::default()
        };
    }

    pub(super) fn start(&mut self, who: &MemberId) {
        let founder = self.founders.contains(who);
        let config = Config {
            me: who.clone(),
            voters: if founder {
                self.founders.clone()
            } else {
                self.nodes.keys().cloned().collect()
            },
            joining: !founder,
            address: None,
            addresses: BTreeMap::new(),
            timings: Timings::default(),
            seed: self.dice.draw(),
        };
        let now = self.now();
        let node = self.nodes.get_mut(who).unwrap();
        node.register = Register::default();
        node.raft = Some(Raft::new(config, node.disk.clone(), now));
        self.drain(who);
    }

    /// Power is cut: of what was being written, any number of first writes survive.
    pub(super) fn crash(&mut self, who: &MemberId) {
        let survive = self.dice.below(4);
        let node = self.nodes.get_mut(who).unwrap();
        node.raft = None;
        for _ in 0..survive {
            if let Some((_, _, write)) = node.writing.pop_front() {
                node.disk.apply(write).unwrap();
            }
        }
        node.writing.clear();
        node.ops.clear();
        node.reads.clear();
        node.reads_ready.clear();
    }

    /// A new disk, if fewer than a minority are without a say already. Not with one or two voters either: they do
    /// not survive the loss of a disk, nor that of a member at the very moment in which it becomes the second.
    pub(super) fn wipe(&mut self, who: &MemberId) -> bool {
        let pending = |n: &Node| n.raft.as_ref().is_some_and(Raft::change_pending);
        let voters = self.voters();
        let without = voters
            .iter()
            .filter(|v| self.nodes[*v].disk.hard.standing != Standing::Voter)
            .count();
        let changing = self.nodes.values().any(pending);
        if changing || voters.len() < 3 || voters.contains(who) && without >= (voters.len() - 1) / 2
        {
            return false;
        }
        self.crash(who);
        self.wipe_disk(who);
        self.wipes += 1;
        true
    }

    pub(super) fn leader(&self) -> Option<MemberId> {
        let leads = |n: &&MemberId| self.nodes[*n].raft.as_ref().is_some_and(Raft::is_leader);
        self.nodes
            .keys()
            .filter(leads)
            .max_by_key(|n| self.nodes[*n].raft.as_ref().map(|r| r.hard.term))
            .cloned()
    }

    /// Proposes a compare-and-set at a node; it need not be the leader.
    pub(super) fn propose(&mut self, who: &MemberId) -> bool {
        let new = self.dice.draw();
        let now = self.now();
        let floor = self.completed_through;
        let node = self.nodes.get_mut(who).unwrap();
        let expected = node.register.value;
        let Some(raft) = &mut node.raft else {
            return false;
        };
        let Ok(at) = raft.propose(now, format!("{expected} {new}")) else {
            return false;
        };
        node.ops.insert(at, floor);
        self.drain(who);
        true
    }

    pub(super) fn read(&mut self, who: &MemberId) {
        self.next_read += 1;
        let (now, read, floor) = (self.now(), self.next_read, self.completed_through);
        let node = self.nodes.get_mut(who).unwrap();
        let Some(raft) = &mut node.raft else { return };
        if raft.read(now, read).is_ok() {
            node.reads.insert(read, floor);
            self.drain(who);
        }
    }

    /// One step: faults, disk, messages, clocks.
    pub(super) fn step(&mut self) {
        self.now_ms += STEP_MS;
        self.inject();
        let now = self.now();
        let all: Vec<MemberId> = self.nodes.keys().cloned().collect();
        for who in &all {
            self.finish_writes(who);
        }
        while let Some(entry) = self.flying.first_entry() {
            if entry.key().0 > self.now_ms {
                break;
            }
            let message = entry.remove();
            let to = message.to.clone();
            if let Some(raft) = self.nodes.get_mut(&to).and_then(|n| n.raft.as_mut()) {
                raft.step(now, message);
                self.drain(&to);
            }
        }
        for who in &all {
            if let Some(raft) = self.nodes.get_mut(who).and_then(|n| n.raft.as_mut()) {
                raft.tick(now);
                self.drain(who);
            }
        }
    }

    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now_ms + u64::try_from(time.as_millis()).unwrap();
        while self.now_ms < end {
            self.step();
        }
    }

    /// Steps until it holds, at most `secs` of simulated time.
    pub(super) fn until(&mut self, what: &str, secs: u64, mut holds: impl FnMut(&Self) -> bool) {
        let end = self.now_ms + secs * 1000;
        while !holds(self) {
            assert!(
                self.now_ms < end,
                "not within {secs} s: {what}\n{}",
                if self.flaw.is_some() {
                    String::new()
                } else {
                    self.describe()
                }
            );
            self.step();
        }
    }

    fn describe(&self) -> String {
        let line = |(n, node): (&MemberId, &Node)| {
            let status = node.raft.as_ref().map(Raft::status);
            let role = node.raft.as_ref().map(|r| &r.role);
            let births = node
                .raft
                .as_ref()
                .map(|r| (r.hard.birth, r.unwritten(), r.verified, &r.latest));
            format!("{n}: {status:?} {role:?} {births:?}")
        };
        self.nodes.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    fn inject(&mut self) {
        let faults = self.faults;
        let all: Vec<MemberId> = self.nodes.keys().cloned().collect();
        for who in &all {
            let up = self.nodes[who].raft.is_some();
            if up && self.dice.chance(faults.crash) {
                self.crash(who);
            } else if !up && self.dice.chance(faults.restart) {
                self.start(who);
            }
            if faults.wipe > 0 && self.dice.chance(faults.wipe) {
                self.wipe(who);
            }
            if self.dice.chance(faults.stall) {
                let stall = self.dice.below(5000);
                self.nodes.get_mut(who).unwrap().stalled_until = self.now_ms + stall;
            }
        }
        if self.dice.chance(faults.cut) {
            // One direction of one link, or everything healed.
            let a = all[usize::try_from(self.dice.below(all.len() as u64)).unwrap()].clone();
            let b = all[usize::try_from(self.dice.below(all.len() as u64)).unwrap()].clone();
            if self.dice.chance(300) {
                self.cut.clear();
            } else {
                self.cut.insert((a.clone(), b.clone()));
                if self.dice.chance(500) {
                    self.cut.insert((b, a));
                }
            }
        }
    }

    fn finish_writes(&mut self, who: &MemberId) {
        let (now_ms, now) = (self.now_ms, self.now());
        let node = self.nodes.get_mut(who).unwrap();
        if node.stalled_until > now_ms {
            return;
        }
        let mut done = None;
        while node.writing.front().is_some_and(|(at, _, _)| *at <= now_ms) {
            let (_, token, write) = node.writing.pop_front().unwrap();
            node.disk.apply(write).unwrap();
            done = Some(token);
        }
        if let (Some(token), Some(raft)) = (done, &mut node.raft) {
            raft.persisted(now, token);
            self.drain(who);
        }
    }

    fn drain(&mut self, who: &MemberId) {
        let node = self.nodes.get_mut(who).unwrap();
        let Some(raft) = &mut node.raft else { return };
        let ready = raft.ready();
        assert_eq!(raft.fault, None, "{who}");
        let at = self.now_ms + self.dice.below(10);
        node.writing.extend(
            ready
                .writes
                .into_iter()
                .map(|(token, write)| (at, token, write)),
        );
        if let Some(image) = ready.install {
            let value = image.data.parse().unwrap();
            node.register = Register {
                value,
                applied: image.last_index,
            };
            node.ops.retain(|(_, index), _| *index > image.last_index);
        }
        for entry in ready.committed {
            self.apply(who, &entry);
        }
        self.serve_reads(who, &ready.reads);
        let node = self.nodes.get_mut(who).unwrap();
        if let Some(raft) = &mut node.raft
            && raft.applied_since_image() > 20
        {
            raft.compact(node.register.applied, node.register.value.to_string());
            let ready = raft.ready();
            node.writing.extend(
                ready
                    .writes
                    .into_iter()
                    .map(|(token, write)| (at, token, write)),
            );
        }
        self.watch_leader(who);
        for message in ready.messages {
            self.fly(&message);
        }
    }

    fn fly(&mut self, message: &Message) {
        let faults = self.faults;
        if self
            .cut
            .contains(&(message.from.clone(), message.to.clone()))
            || self.dice.chance(faults.drop)
        {
            return;
        }
        let copies = if self.dice.chance(faults.duplicate) {
            2
        } else {
            1
        };
        for _ in 0..copies {
            self.sent += 1;
            let at = self.now_ms + self.dice.below(faults.delay_ms_max + 1);
            // Some are very late: from another life of the receiver.
            let at = if faults.duplicate > 0 && self.dice.chance(10) {
                at + 2000
            } else {
                at
            };
            self.flying.insert((at, self.sent), message.clone());
        }
    }

    /// State machine safety, and the order of what clients saw.
    fn apply(&mut self, who: &MemberId, entry: &Entry) {
        let before = self
            .committed
            .entry(entry.index)
            .or_insert_with(|| entry.clone());
        assert_eq!(before, entry, "{who} applies another entry {}", entry.index);
        let node = self.nodes.get_mut(who).unwrap();
        assert_eq!(node.register.applied + 1, entry.index, "{who} skips");
        node.register.applied = entry.index;
        if let Payload::Configure(config) = &entry.payload
            && entry.index > self.config.0
        {
            self.config = (entry.index, config.clone());
            self.changes += 1;
        }
        if let Payload::Command(text) = &entry.payload {
            let (expected, new) = text.split_once(' ').unwrap();
            if expected.parse() == Ok(node.register.value) {
                node.register.value = new.parse().unwrap();
            }
        }
        if let Some(floor) = node.ops.remove(&(entry.term, entry.index)) {
            assert!(
                entry.index > floor,
                "an operation took effect before one that had completed earlier"
            );
            self.completed_through = self.completed_through.max(entry.index);
            self.completed += 1;
        }
    }

    fn serve_reads(&mut self, who: &MemberId, confirmed: &[(u64, Option<Index>)]) {
        let node = self.nodes.get_mut(who).unwrap();
        for (read, index) in confirmed {
            let floor = node.reads.remove(read);
            if let (Some(floor), Some(index)) = (floor, index) {
                node.reads_ready.push((*index, floor));
            }
        }
        let applied = node.register.applied;
        let served = node
            .reads_ready
            .extract_if(.., |(index, _)| *index <= applied);
        for (_, floor) in served {
            assert!(
                applied >= floor,
                "a read at {applied} misses what had completed through {floor}"
            );
            self.reads_done += 1;
        }
    }

    /// Election safety and leader completeness.
    /// Whether this host is to take part, by what is committed.
    pub(super) fn belongs(&self, who: &MemberId) -> bool {
        if self.config.0 == 0 {
            self.founders.contains(who)
        } else {
            self.config.1.holds(who)
        }
    }

    /// Who has a say, by what is committed.
    pub(super) fn voters(&self) -> BTreeSet<MemberId> {
        if self.config.0 == 0 {
            self.founders.clone()
        } else {
            self.config.1.voters.keys().cloned().collect()
        }
    }

    fn watch_leader(&mut self, who: &MemberId) {
        let Some(raft) = &self.nodes[who].raft else {
            return;
        };
        let Role::Leader(leading) = &raft.role else {
            return;
        };
        let term = raft.hard.term;
        if let Some(other) = self.leaders.get(&term) {
            assert_eq!(other, who, "two leaders in term {term}");
            return;
        }
        for (index, entry) in self.committed.range(raft.log.base() + 1..) {
            assert_eq!(
                raft.log.term(*index),
                Some(entry.term),
                "leader {who} of {term} lacks committed {index}"
            );
        }
        assert!(leading.first_index > raft.log.base());
        self.leaders.insert(term, who.clone());
    }

    /// Log matching: where two logs have the same term at an index, all before is the same.
    pub(super) fn check_logs(&self) {
        let all: Vec<&Raft> = self
            .nodes
            .values()
            .filter_map(|n| n.raft.as_ref())
            .collect();
        for (i, a) in all.iter().enumerate() {
            for b in all.iter().skip(i + 1) {
                let from = a.log.base().max(b.log.base()) + 1;
                let to = a.log.last_index().min(b.log.last_index());
                let same = |i: &Index| a.log.term(*i) == b.log.term(*i);
                let Some(last) = (from..=to).rev().find(same) else {
                    continue;
                };
                for index in from..=last {
                    assert_eq!(
                        a.log.entry(index),
                        b.log.entry(index),
                        "logs differ before a match"
                    );
                }
            }
        }
    }
}
