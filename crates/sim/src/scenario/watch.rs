//! What a reader of a scenario wants to see of what happens: the coordinator's decisions, who accepts writes,
//! whose data is replaced.

use std::collections::BTreeMap;

use craton_core::decide::Task;
use craton_core::records::{Leadership, Seal};
use craton_core::{Incarnation, MemberId};

use crate::world::World;

/// What was seen last.
pub struct Watch {
    leadership: Option<Leadership>,
    seals: BTreeMap<MemberId, Seal>,
    members: Vec<Seen>,
    backups: Vec<Option<MemberId>>,
}

/// Of one member.
#[derive(Clone, Default, PartialEq, Eq)]
struct Seen {
    writable: bool,
    follows: Option<MemberId>,
    copying: Option<String>,
    incarnation: Option<Incarnation>,
}

impl Watch {
    /// Begins to watch.
    pub fn new(world: &World) -> Self {
        Self {
            leadership: None,
            seals: BTreeMap::new(),
            members: vec![Seen::default(); world.members.len()],
            backups: vec![None; world.backups.len()],
        }
    }

    /// Notes what has changed.
    pub fn look(&mut self, world: &World, notes: &mut Vec<String>) {
        let view = world.store.view();
        if let Some(l) = view.leadership.as_ref().map(|l| &l.value)
            && self.leadership.as_ref() != Some(l)
        {
            self.led(l, notes);
            self.leadership = Some(l.clone());
        }
        for (member, seal) in &view.seals {
            if self.seals.get(member) != Some(&seal.value) {
                let s = &seal.value;
                notes.push(format!(
                    "{member} seals for term {}: timeline {}, {} records",
                    s.term,
                    s.timeline,
                    s.lsn.0 / 64
                ));
                self.seals.insert(member.clone(), s.clone());
            }
        }
        for m in 0..world.members.len() {
            let now = Seen::of(world, m);
            let before = std::mem::replace(&mut self.members[m], now.clone());
            now.differs(&before, world.members[m].id.as_str(), notes);
        }
        for (b, before) in world.backups.iter().zip(&mut self.backups) {
            let stream = b.daemon.as_ref().and_then(|d| d.stream.as_ref());
            let from = stream.filter(|s| s.streaming).map(|s| world.name(s.leader));
            if let Some(leader) = from.as_ref().filter(|_| from != *before) {
                notes.push(format!("{} streams from {leader}", b.id));
            }
            *before = from;
        }
    }

    fn led(&self, l: &Leadership, notes: &mut Vec<String>) {
        let before = self.leadership.as_ref();
        let led = before.and_then(|b| b.leader.as_ref());
        match &l.leader {
            None => notes.push(format!(
                "term {}: the election is open: {}",
                l.term, l.cause
            )),
            Some(leader) if led != Some(leader) || before.map(|b| b.term) != Some(l.term) => {
                notes.push(format!(
                    "term {}: {} is elected onto timeline {}; commits wait for {}",
                    l.term, leader.member, l.timeline, l.sync
                ));
            }
            Some(leader) => {
                if before.is_some_and(|b| b.sync != l.sync) {
                    notes.push(format!("commits wait for {}", l.sync));
                }
                if before.is_some_and(|b| b.open != l.open) {
                    let state = if l.open { "open" } else { "closed" };
                    notes.push(format!("{} is {state} for clients", leader.member));
                }
            }
        }
        if l.allow_data_loss && before.is_some_and(|b| !b.allow_data_loss) {
            notes.push("the operator accepts the loss of acknowledged commits".into());
        }
    }
}

impl Seen {
    fn of(world: &World, m: usize) -> Self {
        let member = &world.members[m];
        let pg = member.pg.as_ref();
        let receives = pg.is_some_and(|p| p.receiver.as_ref().is_some_and(|r| r.streaming));
        let upstream = pg.and_then(|p| p.upstream).filter(|_| receives);
        let task = member.agent.as_ref().and_then(|a| a.running.as_ref());
        let copying = match task.map(|r| &r.task) {
            Some(Task::Clone { from, .. }) => Some(format!("is cloned from {from}")),
            Some(Task::Rewind { from, .. }) => Some(format!(
                "keeps its divergent WAL aside, is rewound from {from}"
            )),
            _ => None,
        };
        Self {
            writable: pg.is_some_and(|p| p.primary),
            follows: upstream.map(|u| world.members[u].id.clone()),
            copying,
            incarnation: member.incarnation,
        }
    }

    fn differs(&self, before: &Self, name: &str, notes: &mut Vec<String>) {
        if self.writable && !before.writable {
            notes.push(format!("{name} is a primary"));
        }
        if before.writable && !self.writable {
            notes.push(format!("{name} is no primary any more"));
        }
        if let Some(copying) = self
            .copying
            .as_ref()
            .filter(|c| before.copying.as_ref() != Some(*c))
        {
            notes.push(format!("{name} {copying}"));
        }
        if let Some(upstream) = self
            .follows
            .as_ref()
            .filter(|u| before.follows.as_ref() != Some(*u))
        {
            notes.push(format!("{name} streams from {upstream}"));
        }
    }
}
