//! What goes wrong, when it ends, and whether the cluster comes back.

use craton_core::records::{
    Change, Key, Order, OrderKind, Pause, Record, Request, RequestKind, RequestPhase, RestartPlan,
};
use craton_core::settings::{Durability, Settings};

use crate::backup_faults::BackupFault;
use crate::event::Event;
use crate::wal::Data;
use crate::whole::SETTLED_LOOK;
use crate::world::{MS, SECOND, World};

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The host loses power.
    CrashHost(usize),
    /// Every process of PostgreSQL is killed.
    KillPostgres(usize),
    /// The agent is killed; PostgreSQL goes on.
    KillAgent(usize),
    /// The host is paused; its clock runs on.
    FreezeHost(usize),
    /// The agent is stopped (SIGSTOP).
    FreezeAgent(usize),
    /// Nothing passes to or from the host.
    Isolate(usize),
    /// Nothing passes from the first to the second.
    CutOneWay(usize, usize),
    /// Nothing passes between the two.
    CutPair(usize, usize),
    /// The disk answers slowly.
    SlowDisk(usize),
    /// The disk answers to nothing.
    HungDisk(usize),
    /// The disk fills up, and after a while takes nothing more.
    FullDisk(usize),
    /// Nothing more fits on it.
    NoSpace(usize),
    /// Messages get lost.
    Loss,
    /// Messages take long.
    SlowNet,
    /// The host loses power and comes back with an empty data directory.
    LoseDisk(usize),
    /// An operator asks for another leader.
    Switchover(Option<usize>),
    /// WAL reaches the standby late.
    LagWal(usize),
    /// Nobody hears the leader's renewals but itself and one other, whose agent restarts.
    DeafVoters,
    /// The leader dies, whoever it is.
    CrashLeader,
    /// The member's agent does not reach the coordinator.
    Away(usize),
    /// Nobody reaches the coordinator.
    AllAway,
    /// The leader does not reach the coordinator and lives on the promise of one standby; another one, which
    /// cannot promise, opens an election; the agent of the first restarts.
    BrokenPromise,
    /// The operator pauses automatic actions.
    Pause,
    /// The operator orders a restart of one member's PostgreSQL.
    Restart(usize),
    /// The operator orders all of them restarted in turn.
    RollingRestart,
    /// The operator orders a new life of a member's data directory.
    Reinit(usize),
    /// The operator wants another durability and k.
    Mode(Durability, u32),
    /// A standby lags; another one loses its disk, or goes away; then the leader dies, and perhaps the next one.
    Ambush,
    /// Something befalls a backup.
    Backup(BackupFault, usize),
}

/// What ends it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Repair {
    /// The host starts.
    StartHost(usize),
    /// The agent starts.
    StartAgent(usize),
    /// The host goes on.
    ThawHost(usize),
    /// The agent goes on.
    ThawAgent(usize),
    /// The host is connected again.
    Join(usize),
    /// The link is whole again.
    Link(usize, usize),
    /// The disk is itself again.
    Disk(usize),
    /// What waited for the disk goes on.
    DiskAnswers(usize),
    /// There is room on the disk again.
    Room(usize),
    /// The network is itself again.
    Net,
    /// WAL comes in time again.
    Wal(usize),
    /// The member's agent reaches the coordinator again.
    Back(usize),
    /// Everybody does.
    AllBack,
    /// The operator ends the pause.
    Resume,
    /// The host of a backup starts, or the daemon.
    StartBackup(usize),
    /// The host of a backup goes on.
    ThawBackup(usize),
    /// The disk of a backup is itself again.
    BackupDisk(usize),
}

/// The state of the faults.
#[derive(Debug, Default)]
pub struct Faults {
    /// No more of them.
    pub calm: bool,
    /// When they ended.
    pub calm_since: u64,
    /// A disk was lost and the cluster has not been whole since.
    disk_lost: bool,
    /// Numbers of operators' requests.
    requests: u64,
    /// All faults so far, those that were left out among them.
    pub drawn: Vec<(u64, Fault)>,
}

impl World {
    /// Schedules the first fault and the last moment of them.
    pub fn start_faults(&mut self) {
        // Most runs have a whole cluster when the first fault strikes; some do not.
        let first = if self.rng.chance(20) {
            self.rng.between(0, 4 * SECOND)
        } else {
            self.rng.between(5 * SECOND, 8 * SECOND)
        };
        self.at(first, Event::NextFault);
        self.at(first + self.options.fault_seconds * SECOND, Event::Calm);
    }

    /// Draws a fault and the time of the next one.
    pub fn next_fault(&mut self) {
        if self.faults.calm {
            return;
        }
        if self.options.ambushes {
            let fault = self.draw_backup_fault();
            self.fault(fault.unwrap_or(Fault::Ambush));
            let pause = self.rng.between(6 * SECOND, 12 * SECOND);
            return self.after(pause, Event::NextFault);
        }
        let special = self.draw_backup_fault().or_else(|| self.draw_special());
        let fault = special.unwrap_or_else(|| self.draw_fault());
        self.fault(fault);
        let pause = if self.rng.chance(30) {
            self.rng.between(10 * MS, 400 * MS)
        } else {
            self.rng.between(400 * MS, 4 * SECOND)
        };
        self.after(pause, Event::NextFault);
    }

    /// Mostly the leader is struck: that is where it hurts.
    fn victim(&mut self) -> usize {
        let n = self.members.len();
        let any = self.rng.below(n);
        match self.leader() {
            Some(m) if self.rng.chance(50) => m,
            _ => any,
        }
    }

    /// What the options ask for more of.
    fn draw_special(&mut self) -> Option<Fault> {
        if self.options.modes && self.rng.chance(35) {
            let mode = match self.rng.below(3) {
                0 => Durability::Async,
                1 => Durability::Quorum,
                _ => Durability::Strict,
            };
            let k_max = self.members.len().saturating_sub(1).clamp(1, 2);
            let k = u32::try_from(1 + self.rng.below(k_max)).unwrap_or(1);
            return Some(Fault::Mode(mode, k));
        }
        if self.options.operators && self.rng.chance(40) {
            let m = self.victim();
            return Some(match self.rng.below(5) {
                0 => Fault::Pause,
                1 => Fault::RollingRestart,
                2 => Fault::Reinit(m),
                _ => Fault::Restart(m),
            });
        }
        if self.options.away && self.rng.chance(60) {
            return Some(match self.rng.below(4) {
                0 => Fault::AllAway,
                1 => Fault::Away(self.victim()),
                _ => Fault::BrokenPromise,
            });
        }
        None
    }

    fn draw_fault(&mut self) -> Fault {
        let m = self.victim();
        let n = self.members.len();
        let other = (m + 1 + self.rng.below(n.saturating_sub(1).max(1))) % n;
        match self.rng.below(21) {
            0 | 1 => Fault::CrashHost(m),
            2 => Fault::KillPostgres(m),
            3 => Fault::KillAgent(m),
            4 | 5 => Fault::FreezeHost(m),
            6 => Fault::FreezeAgent(m),
            7 | 8 => Fault::Isolate(m),
            9 if self.rng.chance(50) => Fault::CutOneWay(m, other),
            9 => Fault::CutPair(m, other),
            10 => Fault::SlowDisk(m),
            11 => Fault::Loss,
            12 => Fault::SlowNet,
            // Out of a cluster that is not whole it is a crash.
            13 => Fault::LoseDisk(m),
            14 => Fault::LagWal(m),
            15 => Fault::DeafVoters,
            16 | 17 => Fault::Ambush,
            18 => Fault::HungDisk(m),
            19 => Fault::FullDisk(m),
            _ if self.rng.chance(50) => Fault::Switchover(Some(other)),
            _ => Fault::Switchover(None),
        }
    }

    /// A fault begins; its end is scheduled with it.
    pub fn fault(&mut self, fault: Fault) {
        self.log(|_| format!("FAULT {fault:?}"));
        if self.faults.calm {
            return;
        }
        let number = self.faults.drawn.len();
        self.faults.drawn.push((self.now, fault));
        if self.options.skip.contains(&number) {
            return self.log(|_| "      left out".into());
        }
        let long = if self.rng.chance(25) {
            8 * SECOND
        } else {
            2 * SECOND
        };
        let lasts = self.rng.between(20 * MS, long);
        let repair = match fault {
            Fault::Backup(what, h) => self.strike_backup(what, h),
            _ => self.strike(fault),
        };
        if let Some(repair) = repair {
            self.after(lasts, Event::Repair(repair));
        }
    }

    /// What an operator does, and faults that are made of others: nothing of their own has to be repaired.
    fn ask_or_arrange(&mut self, fault: Fault) {
        match fault {
            Fault::Switchover(to) => self.ask(RequestKind::Switchover, to),
            Fault::Mode(mode, k) => self.ask_mode(mode, k),
            Fault::Restart(m) => self.order(m, OrderKind::Restart),
            Fault::Reinit(m) => self.order(m, OrderKind::Reinit),
            Fault::RollingRestart => self.rolling_restart(),
            Fault::BrokenPromise => self.broken_promise(),
            Fault::DeafVoters => self.deaf_voters(),
            Fault::Ambush => self.ambush(),
            _ => {}
        }
    }

    fn strike(&mut self, fault: Fault) -> Option<Repair> {
        let repair = match fault {
            Fault::Switchover(_)
            | Fault::Mode(..)
            | Fault::Restart(_)
            | Fault::Reinit(_)
            | Fault::RollingRestart
            | Fault::BrokenPromise
            | Fault::DeafVoters
            | Fault::Ambush
            | Fault::Backup(..) => {
                self.ask_or_arrange(fault);
                return None;
            }
            Fault::CrashHost(m) => {
                self.crash_host(m);
                Repair::StartHost(m)
            }
            Fault::LoseDisk(m)
            | Fault::SlowDisk(m)
            | Fault::HungDisk(m)
            | Fault::FullDisk(m)
            | Fault::NoSpace(m)
            | Fault::LagWal(m) => self.strike_disk(fault, m),
            Fault::Pause => {
                self.pause();
                Repair::Resume
            }
            Fault::KillPostgres(m) => {
                if self.members[m].pg.is_some() {
                    let now = self.now;
                    self.members[m].crashes.push(now);
                }
                self.pg_exit(m, false);
                return None;
            }
            Fault::KillAgent(m) => {
                self.members[m].agent = None;
                Repair::StartAgent(m)
            }
            Fault::FreezeHost(m) => {
                self.members[m].frozen = true;
                Repair::ThawHost(m)
            }
            Fault::FreezeAgent(m) => {
                self.members[m].agent_frozen = true;
                Repair::ThawAgent(m)
            }
            Fault::Isolate(_) | Fault::CutOneWay(..) | Fault::CutPair(..) => self.cut(fault)?,
            Fault::Loss | Fault::SlowNet => self.strike_net(fault),
            Fault::CrashLeader => {
                let m = self.leader()?;
                self.crash_host(m);
                Repair::StartHost(m)
            }
            Fault::Away(m) => {
                self.net.away[m] = true;
                Repair::Back(m)
            }
            Fault::AllAway => {
                self.net.away.fill(true);
                Repair::AllBack
            }
        };
        Some(repair)
    }

    /// All of the network.
    fn strike_net(&mut self, fault: Fault) -> Repair {
        if fault == Fault::Loss {
            self.net.loss = self.rng.between(5, 40);
        } else {
            self.net.delay_factor = self.rng.between(5, 200);
        }
        Repair::Net
    }

    /// Parts of the network.
    pub(crate) fn cut(&mut self, fault: Fault) -> Option<Repair> {
        let repair = match fault {
            Fault::Isolate(m) => {
                for o in (0..self.hosts()).filter(|o| *o != m) {
                    self.net.cut[m][o] = true;
                    self.net.cut[o][m] = true;
                }
                Repair::Join(m)
            }
            Fault::CutOneWay(a, b) => {
                self.net.cut[a][b] = a != b;
                Repair::Link(a, b)
            }
            Fault::CutPair(a, b) => {
                self.net.cut[a][b] = a != b;
                self.net.cut[b][a] = a != b;
                Repair::Link(a, b)
            }
            _ => return None,
        };
        Some(repair)
    }

    /// What befalls a disk, or the WAL on its way to it.
    fn strike_disk(&mut self, fault: Fault, m: usize) -> Repair {
        match fault {
            Fault::LoseDisk(_) => {
                if self.may_lose_a_disk() {
                    self.members[m].data = Data::Empty;
                }
                self.crash_host(m);
                Repair::StartHost(m)
            }
            Fault::SlowDisk(_) => {
                self.members[m].disk_factor = self.rng.between(5, 200);
                Repair::Disk(m)
            }
            Fault::HungDisk(_) => {
                if !self.members[m].disk_hung {
                    self.members[m].hung_since = self.now;
                }
                self.members[m].disk_hung = true;
                Repair::DiskAnswers(m)
            }
            Fault::FullDisk(_) => {
                self.members[m].disk_low = true;
                let at = self.now + self.rng.between(0, 3 * SECOND);
                self.at(at, Event::Fault(Fault::NoSpace(m)));
                Repair::Room(m)
            }
            Fault::NoSpace(_) => {
                self.members[m].disk_full = self.members[m].disk_low;
                Repair::Room(m)
            }
            _ => {
                self.net.wal_lag[m] = self.rng.between(200 * MS, 6 * SECOND);
                Repair::Wal(m)
            }
        }
    }

    /// Two copies at once are more than k = 1 promises to survive: only out of a whole cluster.
    /// A leader on its way to going alone may be thought alone whether it was or not.
    pub(crate) fn may_lose_a_disk(&mut self) -> bool {
        let may = !self.faults.disk_lost && self.is_whole() && self.submitted == 0;
        self.faults.disk_lost |= may;
        may
    }

    /// The leader by the coordinator's word.
    pub fn leader(&self) -> Option<usize> {
        let view = self.store.view();
        self.number(&view.leader()?.member)
    }

    /// The leader's renewals do not reach a standby for longer than a ttl, and then another one's agent
    /// restarts: will the two call a lease over that still runs?
    fn deaf_voters(&mut self) {
        let Some(leader) = self.leader() else { return };
        let n = self.members.len();
        let (x, y) = ((leader + 1) % n, (leader + 2) % n);
        self.fault(Fault::CutOneWay(leader, x));
        let ttl = 2 * SECOND;
        let restart = self.now + ttl + self.rng.between(500 * MS, 1500 * MS);
        self.at(restart, Event::Fault(Fault::KillAgent(y)));
        self.at(restart + 20 * MS, Event::Repair(Repair::StartAgent(y)));
    }

    /// The leader is kept from the coordinator, and from all standbys but one. The others see its lease end and
    /// open an election; the one has promised, and its agent restarts about then.
    fn broken_promise(&mut self) {
        let Some(leader) = self.leader() else { return };
        let n = self.members.len();
        let one = (leader + 1 + self.rng.below(n - 1)) % n;
        let lasts = self.rng.between(3 * SECOND, 8 * SECOND);
        let until = self.now + lasts;
        self.net.away[leader] = true;
        self.at(until, Event::Repair(Repair::Back(leader)));
        for other in (0..n).filter(|o| *o != leader && *o != one) {
            self.fault(Fault::CutPair(leader, other));
            self.at(until, Event::Repair(Repair::Link(leader, other)));
        }
        let at = self.now + self.rng.between(SECOND, 5 * SECOND);
        match self.rng.below(3) {
            0 => {
                self.at(at, Event::Fault(Fault::KillAgent(one)));
                self.at(at + 20 * MS, Event::Repair(Repair::StartAgent(one)));
            }
            1 => self.at(at, Event::Fault(Fault::CutPair(leader, one))),
            _ => {}
        }
    }

    fn ask_mode(&mut self, durability: Durability, sync_standbys: u32) {
        let view = self.store.view();
        let Some(settings) = &view.settings else {
            return;
        };
        let next = Settings {
            durability,
            sync_standbys,
            ..settings.value.clone()
        };
        let change = Change {
            expect: vec![(Key::Settings, settings.revision)],
            puts: vec![Record::Settings(next)],
            deletes: vec![],
        };
        if self.store.apply(&change) {
            let view = self.store.view();
            self.tell_store(&view);
        }
    }

    /// Writes what an operator's command does, unless somebody was faster.
    fn operate(&mut self, expect: &[Key], puts: Vec<Record>, deletes: Vec<Key>) {
        let view = self.store.view();
        let expect = expect
            .iter()
            .map(|k| (k.clone(), view.revision_of(k)))
            .collect();
        let change = Change {
            expect,
            puts,
            deletes,
        };
        if self.store.apply(&change) {
            let view = self.store.view();
            self.tell_store(&view);
        }
    }

    /// Pauses automatic actions.
    pub fn pause(&mut self) {
        let pause = Pause {
            since_ms: self.now / MS,
            until_ms: None,
            reason: None,
            by: "operator".into(),
        };
        self.operate(&[Key::Pause], vec![Record::Pause(pause)], vec![]);
    }

    /// The life of PostgreSQL on a member.
    fn life_of(&self, m: usize) -> Option<u64> {
        self.members[m].pg.as_ref().map(|p| p.run)
    }

    /// Orders a member to restart PostgreSQL, or to begin a new life of its data directory.
    pub fn order(&mut self, m: usize, kind: OrderKind) {
        self.faults.requests += 1;
        let member = self.name(m);
        let order = Order {
            id: self.faults.requests,
            kind,
            process: self.life_of(m),
            incarnation: self.members[m].incarnation,
            by: "operator".into(),
        };
        let key = Key::Order(member.clone());
        self.operate(&[key], vec![Record::Order(member, order)], vec![]);
    }

    fn rolling_restart(&mut self) {
        self.faults.requests += 1;
        let members = (0..self.members.len())
            .map(|m| (self.name(m), self.life_of(m)))
            .collect();
        let plan = RestartPlan {
            id: self.faults.requests,
            members,
            by: "operator".into(),
        };
        self.operate(&[Key::Restart], vec![Record::Restart(plan)], vec![]);
    }

    /// A rare order of events that the rules on sync sets, incarnations and the old leader are there for.
    fn ambush(&mut self) {
        let Some(leader) = self.leader() else { return };
        let n = self.members.len();
        let turn = self.rng.below(2);
        let (x, y) = ((leader + 1 + turn) % n, (leader + 2 - turn) % n);
        let lag = self.rng.between(SECOND, 10 * SECOND);
        self.net.wal_lag[x] = lag;
        let until = self.now + self.rng.between(8 * SECOND, 14 * SECOND);
        self.at(until, Event::Repair(Repair::Wal(x)));
        let mut at = self.now + self.rng.between(200 * MS, SECOND);
        match self.rng.below(3) {
            0 if y != leader && !self.faults.disk_lost && self.is_whole() => {
                self.at(at, Event::Fault(Fault::LoseDisk(y)));
                self.at(at + 100 * MS, Event::Repair(Repair::StartHost(y)));
                self.at(at + 50 * MS, Event::Fault(Fault::LagWal(y)));
            }
            1 if y != leader => self.at(at, Event::Fault(Fault::CrashHost(y))),
            _ => {}
        }
        for _ in 0..self.rng.between(1, 2) {
            at += self.rng.between(500 * MS, 4 * SECOND);
            self.at(at, Event::Fault(Fault::CrashLeader));
        }
    }

    /// The host loses power.
    pub fn crash_host(&mut self, m: usize) {
        self.pg_exit(m, true);
        let member = &mut self.members[m];
        member.up = false;
        member.frozen = false;
        member.agent_frozen = false;
        member.held.clear();
        member.agent = None;
        // Means nothing after a reboot.
        member.lease_file = None;
        member.fence = None;
    }

    /// An operator asks; a failover accepts a loss.
    pub fn ask(&mut self, kind: RequestKind, to: Option<usize>) {
        self.faults.requests += 1;
        let view = self.store.view();
        let term = view.leadership.as_ref().map(|l| l.value.term);
        let Some(term) = term.filter(|_| view.request.is_none()) else {
            return;
        };
        let request = Request {
            id: self.faults.requests,
            kind,
            term,
            to: to.map(|m| self.name(m)),
            allow_data_loss: kind == RequestKind::Failover,
            phase: RequestPhase::Asked,
            by: "operator".into(),
            why: None,
        };
        let change = Change {
            expect: vec![(Key::Request, 0)],
            puts: vec![Record::Request(request)],
            deletes: vec![],
        };
        if self.store.apply(&change) {
            let view = self.store.view();
            self.tell_store(&view);
        }
    }

    /// A fault ends.
    pub fn repair(&mut self, repair: Repair) {
        self.log(|_| format!("repaired: {repair:?}"));
        match repair {
            Repair::StartHost(m) => {
                self.members[m].up = true;
                self.agent_start(m);
            }
            Repair::StartAgent(m) => self.agent_start(m),
            Repair::ThawHost(m) => {
                self.members[m].frozen = false;
                self.members[m].thawed_at = self.now;
                self.go_on(m);
            }
            Repair::ThawAgent(m) => {
                self.members[m].agent_frozen = false;
                self.go_on(m);
            }
            Repair::Join(m) => {
                for o in 0..self.hosts() {
                    self.net.cut[m][o] = false;
                    self.net.cut[o][m] = false;
                }
            }
            Repair::Link(a, b) => {
                self.net.cut[a][b] = false;
                self.net.cut[b][a] = false;
            }
            Repair::Disk(m) => self.members[m].disk_factor = 1,
            Repair::DiskAnswers(m) => {
                self.members[m].disk_hung = false;
                self.go_on(m);
            }
            Repair::Room(m) => {
                self.members[m].disk_low = false;
                self.members[m].disk_full = false;
            }
            Repair::Resume => self.operate(&[Key::Pause], vec![], vec![Key::Pause]),
            Repair::Wal(m) => self.net.wal_lag[m] = 0,
            Repair::Back(m) => self.net.away[m] = false,
            Repair::AllBack => self.net.away.fill(false),
            Repair::StartBackup(_) | Repair::ThawBackup(_) | Repair::BackupDisk(_) => {
                self.mend_backup(repair);
            }
            Repair::Net => {
                self.net.loss = 0;
                self.net.delay_factor = 1;
            }
        }
    }

    /// What was held back happens now, in order, a little apart.
    pub(crate) fn go_on(&mut self, h: usize) {
        let held = match self.backup_mut(h) {
            Some(b) => std::mem::take(&mut b.held),
            None => std::mem::take(&mut self.members[h].held),
        };
        let mut at = self.now;
        for event in held {
            at += self.rng.between(1, 20_000);
            self.at(at, event);
        }
    }

    /// All faults end.
    pub fn calm(&mut self) {
        self.log(|_| "CALM: no more faults".into());
        self.faults.calm = true;
        self.faults.calm_since = self.now;
        self.repair(Repair::Net);
        self.repair(Repair::AllBack);
        self.repair(Repair::Resume);
        for m in 0..self.members.len() {
            self.repair(Repair::Join(m));
            self.repair(Repair::Disk(m));
            self.repair(Repair::Wal(m));
            self.repair(Repair::Room(m));
            self.repair(Repair::DiskAnswers(m));
            if self.members[m].frozen {
                self.repair(Repair::ThawHost(m));
            }
            if self.members[m].agent_frozen {
                self.repair(Repair::ThawAgent(m));
            }
            if !self.members[m].up {
                self.repair(Repair::StartHost(m));
            }
            self.agent_start(m);
        }
        self.mend_backups();
        self.after(SETTLED_LOOK, Event::Settled);
    }
}
