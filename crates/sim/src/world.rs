//! The whole simulated world: time, hosts, network, store; and the loop that drives it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use craton_core::settings::Settings;
use craton_core::{BootTime, MemberId};

use crate::Options;
use crate::backup::Backup;
use crate::check::Checker;
use crate::event::{Event, Msg};
use crate::faults::Faults;
use crate::member::{Clock, Member};
use crate::postgres::Conn;
use crate::rng::Rng;
use crate::store::Store;
use crate::voter::Voter;
use crate::wal::Data;

/// A microsecond in nanoseconds, the unit of simulated time.
pub const US: u64 = 1_000;
/// A millisecond.
pub const MS: u64 = 1_000_000;
/// A second.
pub const SECOND: u64 = 1_000_000_000;
/// How much too fast or slow a clock may run, millionths: two of them differ by less than the margin, a tenth.
const DRIFT_MAX_PPM: u64 = 45_000;

/// A clock that is not to be trusted at all.
const LYING_MAX_PPM: u64 = 600_000;

/// The network between the hosts.
#[derive(Debug)]
pub struct Net {
    /// `cut[from][to]`: nothing passes.
    pub cut: Vec<Vec<bool>>,
    /// Messages lost, of a hundred.
    pub loss: u64,
    /// Delays are this many times longer than usual.
    pub delay_factor: u64,
    /// `away[m]`: the member reaches neither the store nor the voters, its own among them.
    pub away: Vec<bool>,
    /// WAL takes this much longer to a member, nanoseconds.
    pub wal_lag: Vec<u64>,
    /// A member's transactions take this much longer to the store, nanoseconds.
    pub store_lag: Vec<u64>,
}

/// Everything there is.
pub struct World {
    /// What was asked for.
    pub options: Options,
    /// Cluster settings.
    pub settings: Settings,
    /// True time, nanoseconds.
    pub now: u64,
    /// Numbers for lives, runs, records, connections, questions: never the same twice.
    next_id: u64,
    queue: BTreeMap<(u64, u64), Event>,
    /// Chance.
    pub rng: Rng,
    /// The hosts.
    pub members: Vec<Member>,
    /// The hosts of backup daemons, numbered on behind the members.
    pub backups: Vec<Backup>,
    /// Elections that got WAL out of a backup.
    pub from_backups: u64,
    /// Deadlines that rested on promises while V listed a backup.
    pub carried_beside_backups: u64,
    /// The coordinator's store.
    pub store: Store,
    /// The network.
    pub net: Net,
    /// Replication connections.
    pub conns: BTreeMap<u64, Conn>,
    /// The invariants.
    pub check: Checker,
    /// Faults that run.
    pub faults: Faults,
    /// Transactions on their way to the store.
    pub submitted: usize,
    /// Client writes acknowledged since the faults ended.
    pub acknowledged_calm: u64,
    /// What happened, in words.
    pub trace: String,
    /// The run is over.
    pub over: bool,
    /// How long the cluster took to come back after the last fault, nanoseconds.
    pub settled_after: Option<u64>,
    /// Events handled.
    pub steps: u64,
    /// Decisions made.
    pub decisions: u64,
    /// Of every event, its time and its number: two runs that differ anywhere differ here.
    pub digest: u64,
}

impl World {
    /// A world with agents about to start, clients, and faults to come.
    pub fn new(seed: u64, options: &Options) -> Self {
        let mut world = Self::at_rest(seed, options);
        for m in 0..options.members {
            let at = world.rng.between(0, 500 * MS);
            world.at(at, Event::Repair(crate::faults::Repair::StartAgent(m)));
        }
        for h in options.members..world.hosts() {
            let at = world.rng.between(0, 500 * MS);
            world.at(at, Event::Repair(crate::faults::Repair::StartBackup(h)));
        }
        world.at(100 * MS, Event::Client);
        world.start_faults();
        world
    }

    /// A world in which nothing happens by itself: hosts without data, no agents, no clients, no faults.
    pub fn at_rest(seed: u64, options: &Options) -> Self {
        let mut rng = Rng::new(seed);
        let settings = Settings {
            durability: options.durability,
            sync_standbys: options.sync_standbys,
            ..Settings::default()
        };
        let mut members: Vec<Member> = (0..options.members)
            .map(|i| Member::new(i, options.lying_clocks, &mut rng))
            .collect();
        for member in members.iter_mut().rev().take(options.never_leading) {
            member.priority = 0;
        }
        let check = Checker::default();
        let backups: Vec<Backup> = (0..options.receivers).filter_map(backup_named).collect();
        let n = options.members + options.receivers;
        Self {
            options: options.clone(),
            settings,
            now: 0,
            next_id: 0,
            queue: BTreeMap::new(),
            rng,
            members,
            backups,
            from_backups: 0,
            carried_beside_backups: 0,
            store: Store::default(),
            net: Net {
                cut: vec![vec![false; n]; n],
                loss: 0,
                delay_factor: 1,
                away: vec![false; n],
                wal_lag: vec![0; n],
                store_lag: vec![0; n],
            },
            conns: BTreeMap::new(),
            check,
            faults: Faults::default(),
            submitted: 0,
            acknowledged_calm: 0,
            trace: String::new(),
            over: false,
            settled_after: None,
            steps: 0,
            decisions: 0,
            digest: 0,
        }
    }

    /// A number that was not used before.
    pub fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Schedules an event at a true time.
    pub fn at(&mut self, time: u64, event: Event) {
        let id = self.id();
        self.queue.insert((time.max(self.now), id), event);
    }

    /// Schedules an event after a delay.
    pub fn after(&mut self, delay: u64, event: Event) {
        self.at(self.now.saturating_add(delay), event);
    }

    /// Writes a line of the trace, if one is wanted.
    pub fn log(&mut self, line: impl FnOnce(&Self) -> String) {
        if self.options.trace {
            let text = line(self);
            let (s, us) = (self.now / SECOND, self.now % SECOND / US);
            let _ = writeln!(self.trace, "{s:3}.{us:06} {text}");
        }
    }

    /// How many hosts there are, the backups' among them.
    pub fn hosts(&self) -> usize {
        self.members.len() + self.backups.len()
    }

    /// The name of a member, or of a backup.
    pub fn name(&self, h: usize) -> MemberId {
        let backup = self.backup(h).map(|b| b.id.clone());
        backup.unwrap_or_else(|| self.members[h].id.clone())
    }

    /// The number of a member.
    pub fn number(&self, id: &MemberId) -> Option<usize> {
        self.members.iter().position(|m| m.id == *id)
    }

    /// What a member's clock shows.
    pub fn clock(&self, m: usize) -> BootTime {
        self.members[m].clock.at(self.now)
    }

    /// Runs to the end.
    pub fn run(&mut self) {
        while !self.over && self.check.violations.is_empty() {
            if !self.step() {
                break;
            }
        }
    }

    /// When the next event is due.
    pub fn next_at(&self) -> Option<u64> {
        self.queue.first_key_value().map(|((time, _), _)| *time)
    }

    /// The next event happens; false if there is none.
    pub fn step(&mut self) -> bool {
        let Some(((time, id), event)) = self.queue.pop_first() else {
            return false;
        };
        self.now = time;
        self.steps += 1;
        self.digest = Rng::new(self.digest ^ time ^ id.rotate_left(32)).next();
        if let Some(event) = self.admitted(event) {
            self.handle(event);
        }
        true
    }

    /// The event, if its host runs; what a paused one would do is held back.
    fn admitted(&mut self, event: Event) -> Option<Event> {
        let Some(h) = event.host() else {
            return Some(event);
        };
        let (waits, up, held) = if let Some(b) = self.backup_mut(h) {
            let waits = b.frozen || (b.disk_hung && event.needs_disk());
            (waits, b.up, &mut b.held)
        } else {
            let member = &mut self.members[h];
            let waits = member.frozen
                || (member.agent_frozen && event.is_agents())
                || (member.disk_hung && event.needs_disk());
            (waits, member.up, &mut member.held)
        };
        if waits {
            if held.len() < HELD_MAX {
                held.push(event);
            }
            return None;
        }
        up.then_some(event)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Decide { m, life } => self.decide(m, life),
            Event::Tick { m, life } => self.tick(m, life),
            Event::Keep { m, life } => self.keep(m, life),
            Event::Step { m, life, task } => self.step_task(m, life, task),
            Event::Deliver { from, to, .. } if self.net.cut[from][to] => {}
            Event::Deliver { from, to, msg } if to < self.members.len() => {
                self.receive(from, to, msg);
            }
            Event::Deliver { from, to, msg } => self.backup_receives(from, to, &msg),
            Event::Submit {
                m,
                life,
                id,
                change,
            } => self.submit_arrives(m, life, id, &change),
            Event::Answered { m, life, id, ok } => self.submit_answered(m, life, id, ok),
            Event::View { m, life, view } => self.learn(m, life, &view),
            Event::Ready { m, run } => self.pg_ready(m, run),
            Event::Exact { m, run } => self.pg_exact(m, run),
            Event::Stopping { m, run } => self.pg_stopping(m, run),
            Event::PgTick { m, run } => self.pg_tick(m, run),
            Event::Flushed { m, run, upto } => self.pg_flushed(m, run, upto),
            Event::Reread { m, run, conn } => self.pg_reread(m, run, conn),
            Event::Pump { m, conn, up } => self.pump(m, conn, up),
            Event::Fence { m } => self.fence(m),
            Event::Backup { h, run, chore } => self.backup_works(h, run, chore),
            Event::OnRecord {
                m,
                life,
                h,
                incarnation,
                term,
            } => {
                if self.agent(m, life).is_some() {
                    self.put_on_record(m, h, incarnation, term);
                }
            }
            Event::Client => self.client(),
            Event::NextFault => self.next_fault(),
            Event::Repair(repair) => self.repair(repair),
            Event::Fault(fault) => self.fault(fault),
            Event::Calm => self.calm(),
            Event::Settled => self.settled(),
        }
    }

    /// A network delay.
    pub fn latency(&mut self) -> u64 {
        let usual = self.rng.between(100 * US, 2 * MS);
        let odd = if self.rng.chance(1) {
            self.rng.between(1, 20)
        } else {
            1
        };
        usual * self.net.delay_factor * odd
    }

    /// A disk delay on a host.
    pub fn disk(&mut self, m: usize) -> u64 {
        self.rng.between(100 * US, 3 * MS) * self.members[m].disk_factor
    }

    /// Sends a message between agents; it may be lost.
    pub fn send(&mut self, from: usize, to: usize, msg: Msg) {
        let delay = if from == to { 20 * US } else { self.latency() };
        let lost = from != to && self.rng.chance(self.net.loss);
        if !lost && !self.net.cut[from][to] {
            self.after(delay, Event::Deliver { from, to, msg });
        }
    }

    /// True if the member's agent and a majority of voters hear each other.
    pub fn has_majority(&self, m: usize) -> bool {
        let lives = |v: usize| {
            let member = &self.members[v];
            member.up && !member.frozen && !member.agent_frozen && member.agent.is_some()
        };
        let heard = (0..self.members.len())
            .filter(|v| lives(*v) && !self.net.cut[m][*v] && !self.net.cut[*v][m])
            .count();
        lives(m) && !self.net.away[m] && heard > self.members.len() / 2
    }

    /// The durability in force: a failover loses nothing acknowledged.
    pub fn keeps_commits(&self) -> bool {
        let view = self.store.view();
        view.leadership
            .as_ref()
            .map_or(self.options.durability, |l| l.value.durability)
            .keeps_commits()
    }
}

/// The `i`-th backup.
fn backup_named(i: usize) -> Option<Backup> {
    let number = if i == 0 {
        String::new()
    } else {
        (i + 1).to_string()
    };
    MemberId::new(format!("backup{number}"))
        .ok()
        .map(Backup::new)
}

/// A paused host's events beyond this are lost, as a socket's would be.
const HELD_MAX: usize = 5_000;

impl Member {
    fn new(i: usize, lying: bool, rng: &mut Rng) -> Self {
        let letter = char::from(b'a' + u8::try_from(i % 26).unwrap_or(0));
        let drift = if lying { LYING_MAX_PPM } else { DRIFT_MAX_PPM };
        let ppm = i64::try_from(rng.between(0, 2 * drift)).unwrap_or(0)
            - i64::try_from(drift).unwrap_or(0);
        let clock = Clock {
            base: rng.between(10 * SECOND, 1_000_000 * SECOND),
            ppm,
        };
        #[allow(clippy::expect_used, reason = "a letter is a member name")]
        let id = MemberId::new(letter).expect("a letter is a member name");
        Self {
            id,
            clock,
            up: true,
            frozen: false,
            agent_frozen: false,
            thawed_at: 0,
            held: Vec::new(),
            disk_factor: 1,
            disk_hung: false,
            hung_since: 0,
            disk_low: false,
            disk_full: false,
            crashes: Vec::new(),
            data: Data::Empty,
            incarnation: None,
            floor: craton_core::Term(0),
            priority: 100,
            promise_note: std::time::Duration::ZERO,
            voter: Voter::default(),
            lease_file: None,
            fence: None,
            agent: None,
            pg: None,
        }
    }
}
