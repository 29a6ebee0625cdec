//! What goes wrong with backups, and when they are whole.

use crate::event::Event;
use crate::faults::{Fault, Repair};
use crate::world::{MS, SECOND, World};

/// What befalls a backup.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackupFault {
    /// The host loses power.
    Crash,
    /// The daemon is killed.
    Kill,
    /// The host is paused.
    Freeze,
    /// Nothing passes to or from the host.
    Isolate,
    /// Nothing passes between it and the leader.
    CutFromLeader,
    /// The disk answers slowly.
    SlowDisk,
    /// The disk answers to nothing.
    HungDisk,
    /// The host comes back with an empty repository.
    LoseDisk,
    /// The leader has removed WAL that it lacks.
    Gap,
    /// WAL reaches it late.
    Lag,
    /// WAL reaches all standbys late, so that the backup holds the most; then the leader dies, and perhaps something
    /// befalls the backup as well.
    Ahead,
    /// The leader reaches the backup alone: neither the coordinator nor a standby.
    LeftWithLeader,
}

impl World {
    /// Something for one of the backups, now and then.
    pub fn draw_backup_fault(&mut self) -> Option<Fault> {
        let often = if self.options.ambushes { 60 } else { 35 };
        if self.backups.is_empty() || !self.rng.chance(often) {
            return None;
        }
        let h = self.members.len() + self.rng.below(self.backups.len());
        let ahead = if self.options.ambushes { 100 } else { 35 };
        if self.rng.chance(ahead) {
            return Some(Fault::Backup(BackupFault::Ahead, h));
        }
        if self.options.away && self.rng.chance(30) {
            return Some(Fault::Backup(BackupFault::LeftWithLeader, h));
        }
        let what = match self.rng.below(12) {
            0 | 1 => BackupFault::Crash,
            2 => BackupFault::Kill,
            3 | 4 => BackupFault::Freeze,
            5 => BackupFault::Isolate,
            6 => BackupFault::CutFromLeader,
            7 => BackupFault::SlowDisk,
            8 => BackupFault::HungDisk,
            9 => BackupFault::LoseDisk,
            10 => BackupFault::Gap,
            _ => BackupFault::Lag,
        };
        Some(Fault::Backup(what, h))
    }

    /// It begins.
    pub fn strike_backup(&mut self, what: BackupFault, h: usize) -> Option<Repair> {
        let leader = self.leader();
        match what {
            BackupFault::Crash => self.crash_backup(h),
            BackupFault::Kill => self.backup_exit(h, false),
            BackupFault::Freeze => {
                self.backup_mut(h)?.frozen = true;
                return Some(Repair::ThawBackup(h));
            }
            BackupFault::Isolate => return self.cut(Fault::Isolate(h)),
            BackupFault::CutFromLeader => return self.cut(Fault::CutPair(leader?, h)),
            BackupFault::SlowDisk => {
                let factor = self.rng.between(5, 200);
                self.backup_mut(h)?.disk_factor = factor;
                return Some(Repair::BackupDisk(h));
            }
            BackupFault::HungDisk => {
                self.backup_mut(h)?.disk_hung = true;
                return Some(Repair::BackupDisk(h));
            }
            BackupFault::LoseDisk => {
                let lost = self.may_lose_a_disk();
                self.crash_backup(h);
                let b = self.backup_mut(h).filter(|_| lost);
                if let Some(b) = b {
                    b.repository = crate::backup::Repository::default();
                    b.noted = None;
                }
            }
            BackupFault::Gap => {
                self.backup_mut(h)?.gap = true;
                return None;
            }
            BackupFault::Lag => {
                self.net.wal_lag[h] = self.rng.between(200 * MS, 6 * SECOND);
                return Some(Repair::Wal(h));
            }
            BackupFault::Ahead => {
                self.backup_ahead(h, leader?);
                return None;
            }
            BackupFault::LeftWithLeader => {
                self.left_with_leader(leader?);
                return None;
            }
        }
        Some(Repair::StartBackup(h))
    }

    fn backup_ahead(&mut self, h: usize, leader: usize) {
        let until = self.now + self.rng.between(4 * SECOND, 12 * SECOND);
        for m in (0..self.members.len()).filter(|m| *m != leader) {
            self.net.wal_lag[m] = self.rng.between(SECOND, 10 * SECOND);
            self.at(until, Event::Repair(Repair::Wal(m)));
        }
        let mut at = self.now + self.rng.between(100 * MS, 4 * SECOND);
        self.at(at, Event::Fault(Fault::CrashLeader));
        if self.rng.chance(40) {
            at += self.rng.between(0, 3 * SECOND);
            let what = match self.rng.below(5) {
                0 => BackupFault::Crash,
                1 => BackupFault::Kill,
                2 => BackupFault::Freeze,
                3 => BackupFault::Isolate,
                _ => BackupFault::SlowDisk,
            };
            self.at(at, Event::Fault(Fault::Backup(what, h)));
        }
    }

    /// Commits go on being acknowledged by the backup; its word is no promise, and the leader must end.
    fn left_with_leader(&mut self, leader: usize) {
        let until = self.now + self.rng.between(3 * SECOND, 8 * SECOND);
        self.net.away[leader] = true;
        self.at(until, Event::Repair(Repair::Back(leader)));
        for other in (0..self.members.len()).filter(|o| *o != leader) {
            self.fault(Fault::CutPair(leader, other));
            self.at(until, Event::Repair(Repair::Link(leader, other)));
        }
    }

    /// A fault of a backup ends.
    pub fn mend_backup(&mut self, repair: Repair) {
        match repair {
            Repair::StartBackup(h) => {
                if let Some(b) = self.backup_mut(h) {
                    b.up = true;
                }
                self.backup_start(h);
            }
            Repair::ThawBackup(h) => {
                if let Some(b) = self.backup_mut(h) {
                    b.frozen = false;
                }
                self.go_on(h);
            }
            Repair::BackupDisk(h) => {
                if let Some(b) = self.backup_mut(h) {
                    b.disk_factor = 1;
                    b.disk_hung = false;
                }
                self.go_on(h);
            }
            _ => {}
        }
    }

    /// Nothing is wrong with any of them any more.
    pub fn mend_backups(&mut self) {
        for h in self.members.len()..self.hosts() {
            self.repair(Repair::Join(h));
            self.repair(Repair::Wal(h));
            self.mend_backup(Repair::BackupDisk(h));
            self.mend_backup(Repair::ThawBackup(h));
            self.mend_backup(Repair::StartBackup(h));
        }
    }

    /// Each streams from the leader, and counts where commits are kept.
    pub fn backups_are_whole(&self, leader: usize) -> bool {
        let view = self.store.view();
        let Some(l) = view.leadership.as_ref().map(|l| &l.value) else {
            return false;
        };
        let senders = self.members[leader].pg.as_ref().map(|p| &p.senders);
        (self.members.len()..self.hosts()).all(|h| {
            let Some(b) = self.backup(h).filter(|b| b.runs()) else {
                return false;
            };
            let life = b.daemon.as_ref().and_then(|d| d.standing.as_ref());
            let counted = life.is_some_and(|s| l.sync.holds(&b.id, s.incarnation()));
            let streams = senders.is_some_and(|s| s.iter().any(|s| s.member == h));
            streams && (counted || !l.durability.keeps_commits())
        })
    }
}
