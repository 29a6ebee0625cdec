//! Breadth-first search through the states: the first harm that is found is one with the fewest events.

use std::fmt::Write as _;

use super::Config;
use super::action::{Action, Names, set_in_words};
use super::fingerprint::Fingerprint;
use super::state::{Order, Right, Role, State};
use super::world::{Next, World};

/// What an exploration has come to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// Different states, renamings counted once where they were recognised.
    pub states: usize,
    /// Events that were tried.
    pub transitions: usize,
    /// Events of the longest run that was looked at.
    pub depth: usize,
    /// No state within the bounds was left out.
    pub complete: bool,
    /// How often each kind of event was tried: a rule that is never used is not checked.
    pub seen: Seen,
    /// A broken property, and how it comes to be, a line for each event.
    pub harm: Option<String>,
}

/// Events that a check must have seen to mean anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// Elections that were won.
    pub wins: usize,
    /// Commits acknowledged.
    pub acknowledged: usize,
    /// Changes of the coordinator's sync set.
    pub changes: usize,
    /// Leaders that went alone.
    pub alone: usize,
    /// Copies that became complete.
    pub clones: usize,
    /// Leaders that went on by promises.
    pub promised: usize,
    /// Deposed leaders that wrote.
    pub deposed_writes: usize,
    /// Records that were got from a sealed member that cannot lead.
    pub catch_ups: usize,
    /// Changes of the mode in force.
    pub modes: usize,
    /// Elections that were won and lost something in `async`.
    pub async_losses: usize,
}

impl Seen {
    fn count(&mut self, before: &State, (action, after, _): &Next) {
        let one = |condition: bool| usize::from(condition);
        self.wins += one(matches!(action, Action::Win(_)));
        self.acknowledged += one(before.acknowledged != after.acknowledged);
        self.changes += one(before.leader == after.leader && before.sync != after.sync);
        self.alone +=
            one(before.leader == after.leader && before.sync.k() > 0 && after.sync.k() == 0);
        self.clones += one(matches!(action, Action::EndClone(..)));
        self.promised += one(matches!(action, Action::LeaseEnds(p)
            if after.members[*p].lead.right == Right::Promises));
        self.catch_ups += one(matches!(action, Action::CatchUp(..)));
        self.modes += one(before.sync.mode() != after.sync.mode());
        self.async_losses += one(before.acknowledged.len() > after.acknowledged.len());
        self.deposed_writes += one(matches!(action, Action::Write(p)
            if before.members[*p].lead.term < before.term));
    }
}

/// The states that are known: by fingerprint, each with the one that it was reached from.
struct Known {
    /// Open addressing: 1 + the number of a state, 0 for an empty place. Its length is a power of two.
    table: Vec<u32>,
    /// By number: fingerprint and predecessor.
    states: Vec<(u64, u32)>,
}

impl Known {
    fn new() -> Self {
        Self {
            table: vec![0; 1 << 16],
            states: Vec::new(),
        }
    }

    fn place(&self, fingerprint: u64) -> usize {
        let mask = self.table.len() - 1;
        let mut at = usize::try_from(fingerprint & mask as u64).unwrap_or(0);
        loop {
            match self.table[at] {
                0 => return at,
                n if self.states[n as usize - 1].0 == fingerprint => return at,
                _ => at = (at + 1) & mask,
            }
        }
    }

    /// The number of a state that was not known.
    fn insert(&mut self, fingerprint: u64, from: u32) -> Option<u32> {
        let at = self.place(fingerprint);
        if self.table[at] != 0 {
            return None;
        }
        let number = u32::try_from(self.states.len()).ok()?;
        self.states.push((fingerprint, from));
        self.table[at] = number + 1;
        if self.states.len() * 2 > self.table.len() {
            self.table = vec![0; self.table.len() * 2];
            for n in 0..self.states.len() {
                let at = self.place(self.states[n].0);
                self.table[at] = u32::try_from(n + 1).unwrap_or(0);
            }
        }
        Some(number)
    }

    /// The fingerprints from the first state to this one.
    fn path(&self, mut number: u32) -> Vec<u64> {
        let mut path = Vec::new();
        loop {
            let (fingerprint, from) = self.states[number as usize];
            path.push(fingerprint);
            if from == number {
                path.reverse();
                return path;
            }
            number = from;
        }
    }
}

/// Explores everything within the bounds, or up to the first broken property.
pub fn explore(config: &Config) -> Report {
    let mut world = World::new(config);
    let mut known = Known::new();
    let first = world.initial().canonical(config.members).0;
    known.insert(Fingerprint::of(&first), 0);
    let mut report = Report {
        states: 1,
        transitions: 0,
        depth: 0,
        complete: true,
        seen: Seen::default(),
        harm: None,
    };
    let mut frontier = vec![(0u32, first)];
    let mut next = Vec::new();
    let mut events = Vec::new();
    while !frontier.is_empty() {
        if report.depth >= config.depth || known.states.len() >= config.states {
            report.complete = false;
            break;
        }
        report.depth += 1;
        for (number, state) in frontier.drain(..) {
            world.successors(&state, &mut events);
            for event in &events {
                report.transitions += 1;
                report.seen.count(&state, event);
                if let Some(harm) = &event.2 {
                    report.states = known.states.len();
                    let path = known.path(number);
                    report.harm = Some(trace(&mut world, &path, event.0, harm));
                    return report;
                }
                let reached = event.1.canonical(config.members).0;
                if let Some(n) = known.insert(Fingerprint::of(&reached), number) {
                    next.push((n, reached));
                }
            }
        }
        std::mem::swap(&mut frontier, &mut next);
    }
    report.states = known.states.len();
    report
}

/// Walks the path again, and tells it with the names that the members had at the beginning.
fn trace(world: &mut World, path: &[u64], last: Action, harm: &str) -> String {
    let members = world.config.members;
    let mut names: Names = ['a', 'b', 'c', 'd'];
    let rename = |names: &Names, order: &Order| order.map(|old| names[usize::from(old)]);
    let (mut state, order) = world.initial().canonical(members);
    names = rename(&names, &order);
    let mut text = format!("      {}\n", describe(&state, &names, members));
    let mut events = Vec::new();
    let mut number = 0;
    for fingerprint in &path[1..] {
        world.successors(&state, &mut events);
        let found = events.iter().find_map(|(action, next, _)| {
            let (reached, order) = next.canonical(members);
            (Fingerprint::of(&reached) == *fingerprint).then_some((*action, *next, reached, order))
        });
        let Some((action, next, reached, order)) = found else {
            break;
        };
        number += 1;
        let _ = writeln!(text, "{number:3}   {}", action.in_words(&names, &next));
        names = rename(&names, &order);
        state = reached;
    }
    world.successors(&state, &mut events);
    let _ = writeln!(text, "      {}", describe(&state, &names, members));
    if let Some((action, next, _)) = events.iter().find(|(a, ..)| *a == last) {
        let _ = writeln!(text, "{:3}   {}", number + 1, action.in_words(&names, next));
    }
    let _ = writeln!(text, "      {harm}");
    text
}

/// A state in a line: who holds which records, and what the coordinator says.
fn describe(state: &State, names: &Names, members: usize) -> String {
    let mut parts: Vec<String> = (0..members)
        .map(|m| {
            let member = &state.members[m];
            let log: String = (0..member.log.len())
                .map(|i| member.log.at(i).to_string())
                .collect();
            let role = match member.role {
                Role::Empty => "empty",
                Role::Cloning => "cloning",
                Role::Down => "down",
                Role::Standby => "standby",
                Role::Primary => "primary",
            };
            format!("{} {role} [{log}]", names[m])
        })
        .collect();
    parts.sort();
    let leader = match state.leader {
        0 => "nobody yet".into(),
        n => names[usize::from(n - 1)].to_string(),
    };
    let acknowledged = state.acknowledged.len();
    format!(
        "{}; term {} led by {leader}, sync set {}, {acknowledged} records acknowledged",
        parts.join(", "),
        state.term,
        set_in_words(state.sync, names)
    )
}
