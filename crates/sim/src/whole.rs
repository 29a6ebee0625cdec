//! Is the cluster whole, and does it come back?

use craton_core::decide::LeaseWish;

use crate::event::Event;
use crate::world::{MS, SECOND, World};

/// The cluster must be whole again this long after the last fault.
const SETTLED_MAX: u64 = 60 * SECOND;
/// How often that is looked at.
pub const SETTLED_LOOK: u64 = 100 * MS;

impl World {
    /// A leader is open, every other member streams from it and is in the sync set.
    pub fn is_whole(&self) -> bool {
        let view = self.store.view();
        let Some(l) = view.leadership.as_ref().map(|l| &l.value) else {
            return false;
        };
        let Some(m) = l.leader.as_ref().and_then(|r| self.number(&r.member)) else {
            return false;
        };
        let held = self.members[m]
            .agent
            .as_ref()
            .is_some_and(|a| a.wish == LeaseWish::Hold(l.term) && a.running.is_none());
        let Some(pg) = self.members[m].pg.as_ref().filter(|p| p.primary) else {
            return false;
        };
        let others = || (0..self.members.len()).filter(|o| *o != m);
        let streams = others().all(|o| {
            let member = &self.members[o];
            let standby = member.pg.as_ref().is_some_and(|p| !p.primary && p.ready);
            let counted = member
                .incarnation
                .is_some_and(|i| l.sync.holds(&member.id, i));
            member.up
                && !member.frozen
                && standby
                && counted
                && pg.senders.iter().any(|s| s.member == o)
        });
        let wish = view.settings();
        let all = others().count() + self.backups.len();
        let k = u64::from(wish.sync_standbys).min(all as u64);
        let k = if l.durability.keeps_commits() { k } else { 0 };
        let full = u64::from(l.sync.k) == k && l.durability == wish.durability;
        let backups = self.backups_are_whole(m);
        l.open && held && streams && backups && full && view.request.is_none()
    }

    /// Has the cluster come back, and does it hold everything?
    pub fn settled(&mut self) {
        if self.is_whole() && self.acknowledged_calm > 0 {
            self.settled_after = Some(self.now - self.faults.calm_since);
            if self.keeps_commits() {
                let view = self.store.view();
                let leader = view.leader().and_then(|l| self.number(&l.member));
                let db = leader
                    .and_then(|m| self.members[m].data.database())
                    .cloned();
                if let Some(db) = db {
                    self.check.holds_everything("the last leader", &db.wal);
                }
                for h in self.members.len()..self.hosts() {
                    if let Some(m) = leader {
                        self.compare_with_backup(m, h);
                    }
                }
            }
            self.over = true;
            return;
        }
        if self.now > self.faults.calm_since + SETTLED_MAX {
            let text = self.describe();
            self.check.broken(format!("no progress: {text}"));
            return;
        }
        self.after(SETTLED_LOOK, Event::Settled);
    }

    /// The state of the cluster, for a failed run.
    pub fn describe(&self) -> String {
        use std::fmt::Write as _;
        let view = self.store.view();
        let mut text = format!("{:?}", view.leadership.as_ref().map(|l| &l.value));
        for (i, m) in self.members.iter().enumerate() {
            let reasons = m.agent.as_ref().map(|a| {
                let d = craton_core::decide::decide(&a.obs, &a.memory);
                d.reasons.iter().map(|r| r.text.clone()).collect::<Vec<_>>()
            });
            let _ = write!(
                text,
                "\n  {} up={} incarnation={:?} floor={} lease={:?} now={:?} server={} reasons={reasons:?}",
                m.id,
                m.up,
                m.incarnation,
                m.floor,
                m.agent.as_ref().and_then(|a| a.obs.lease),
                self.clock(i),
                m.pg.as_ref().map_or("down".into(), |p| format!(
                    "ready={} primary={}",
                    p.ready, p.primary
                )),
            );
        }
        for b in &self.backups {
            let d = b.daemon.as_ref();
            let _ = write!(
                text,
                "\n  {} up={} frozen={} noted={:?} standing={:?} topology={:?} stream={:?} end={:?} noting={:?}",
                b.id,
                b.up,
                b.frozen,
                b.noted,
                d.map(|d| &d.standing),
                d.map(|d| &d.topology),
                d.map(|d| &d.stream),
                b.repository.end(),
                d.map(|d| &d.noting),
            );
        }
        text
    }
}
