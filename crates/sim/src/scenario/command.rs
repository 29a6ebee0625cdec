//! The commands of a scenario, and what can be waited for and expected.

use craton_core::MemberId;
use craton_core::decide::decide;
use craton_core::records::{Change, Key, OrderKind, Record, RequestKind};

use super::Stage;
use crate::event::Event;
use crate::faults::Repair;
use crate::wal::Data;
use crate::world::{MS, SECOND, World};

/// A write is waited for so long, unless the command says otherwise.
const WRITE_MAX: u64 = 2 * SECOND;

/// The first member initialises a cluster within so long.
const START_MAX: u64 = 20 * SECOND;

impl Stage {
    /// One command.
    pub(super) fn command(
        &mut self,
        words: &[&str],
        notes: &mut Vec<String>,
    ) -> Result<(), String> {
        match words {
            ["start"] => self.start(notes),
            ["write", n] => self.write(n, None, notes),
            ["write", n, "every", time] => self.write_every(n, time, notes),
            ["write", n, "to", m] => self.write(n, Some(m), notes),
            ["wait", "until", condition @ .., "within", time] => self.wait(condition, time, notes),
            ["wait", time] => {
                let until = self.world.now + duration(time)?;
                self.run(until, notes, None);
                Ok(())
            }
            ["expect", condition @ ..] => Condition::parse(condition, &self.world)?
                .holds(&self.world)
                .map_err(|found| format!("expected {}, but {found}", condition.join(" "))),
            ["explain", m] => self.explain(m, notes),
            ["switchover"] => self.request(RequestKind::Switchover, None),
            ["switchover", m] => self.request(RequestKind::Switchover, Some(m)),
            ["failover", m, "accepting", "loss"] => self.request(RequestKind::Failover, Some(m)),
            ["priority", m, number] => self.priority(m, number),
            ["restart", m] => self.order(m, OrderKind::Restart),
            ["reinit", m] => self.order(m, OrderKind::Reinit),
            ["pause"] => {
                self.world.pause();
                Ok(())
            }
            ["resume"] => {
                self.world.repair(Repair::Resume);
                Ok(())
            }
            _ => self.fault(words),
        }?;
        self.watch.look(&self.world, notes);
        Ok(())
    }

    fn order(&mut self, name: &str, kind: OrderKind) -> Result<(), String> {
        let m = self.member(name)?;
        self.world.order(m, kind);
        Ok(())
    }

    /// All agents start; the first member initialises the cluster, and the others hear of it then.
    fn start(&mut self, notes: &mut Vec<String>) -> Result<(), String> {
        let all = self.world.members.len();
        for m in 0..all {
            self.world.net.away[m] = m > 0;
            let at = self.world.now + 20 * MS * m as u64;
            self.world.at(at, Event::Repair(Repair::StartAgent(m)));
        }
        for h in all..self.world.hosts() {
            self.world.repair(Repair::StartBackup(h));
        }
        let open = self.run(self.world.now + START_MAX, notes, Some(&Condition::Open));
        self.world.net.away.fill(false);
        open.then_some(())
            .ok_or("the first member did not open for clients".into())
    }

    fn member(&self, name: &str) -> Result<usize, String> {
        let known = self
            .world
            .members
            .iter()
            .position(|m| m.id.as_str() == name);
        known.ok_or_else(|| format!("there is no member \"{name}\""))
    }

    /// A member, or a backup.
    fn host(&self, name: &str) -> Result<usize, String> {
        let known = (0..self.world.hosts()).find(|h| self.world.name(*h).as_str() == name);
        known.ok_or_else(|| format!("there is no host \"{name}\""))
    }

    /// What befalls a backup; none if the words are of something else.
    fn backup(&mut self, words: &[&str]) -> Option<Result<(), String>> {
        let h = self.host(words.last()?).ok()?;
        self.world.backup(h)?;
        match *words {
            ["crash", _] => self.world.crash_backup(h),
            ["kill", _] => self.world.backup_exit(h, false),
            ["start", _] => self.world.repair(Repair::StartBackup(h)),
            ["freeze", _] => self.world.backup_mut(h)?.frozen = true,
            ["thaw", _] => self.world.repair(Repair::ThawBackup(h)),
            ["empty", "disk", _] => {
                self.world.crash_backup(h);
                let b = self.world.backup_mut(h)?;
                b.repository = crate::backup::Repository::default();
                b.noted = None;
                self.world.repair(Repair::StartBackup(h));
            }
            _ => return None,
        }
        Some(Ok(()))
    }

    fn pair(&self, text: &str, between: char) -> Result<(usize, usize), String> {
        let (a, b) = text
            .split_once(between)
            .ok_or_else(|| format!("\"{text}\" is not a pair like a{between}b"))?;
        Ok((self.host(a)?, self.host(b)?))
    }

    fn fault(&mut self, words: &[&str]) -> Result<(), String> {
        if let Some(done) = self.backup(words) {
            return done;
        }
        let repair = match *words {
            ["crash", m] => {
                let m = self.member(m)?;
                self.world.crash_host(m);
                return Ok(());
            }
            ["kill", "postgres", m] => {
                let m = self.member(m)?;
                self.world.pg_exit(m, false);
                return Ok(());
            }
            ["kill", "agent", m] => {
                let m = self.member(m)?;
                self.world.members[m].agent = None;
                return Ok(());
            }
            ["start", m] => Repair::StartHost(self.member(m)?),
            ["freeze", m] => return self.set(m, |w, m| w.members[m].frozen = true),
            ["freeze", "agent", m] => return self.set(m, |w, m| w.members[m].agent_frozen = true),
            [.., "disk", _] if words.first() != Some(&"mend") => return self.disk(words),
            ["thaw", m] => Repair::ThawHost(self.member(m)?),
            ["thaw", "agent", m] => Repair::ThawAgent(self.member(m)?),
            ["mend", "disk", m] => {
                let m = self.member(m)?;
                self.world.repair(Repair::Disk(m));
                self.world.repair(Repair::Room(m));
                Repair::DiskAnswers(m)
            }
            ["lag", m, time] => {
                let h = self.host(m)?;
                self.world.net.wal_lag[h] = duration(time)?;
                return Ok(());
            }
            ["delay", "transactions", m, time] => {
                let time = duration(time)?;
                return self.set(m, |w, m| w.net.store_lag[m] = time);
            }
            ["isolate", m] => {
                let m = self.host(m)?;
                for o in (0..self.world.hosts()).filter(|o| *o != m) {
                    self.cut(m, o);
                    self.cut(o, m);
                }
                return Ok(());
            }
            ["cut", pair] if pair.contains('>') => {
                let (a, b) = self.pair(pair, '>')?;
                self.cut(a, b);
                return Ok(());
            }
            ["cut", pair] => {
                let (a, b) = self.pair(pair, '-')?;
                self.cut(a, b);
                self.cut(b, a);
                return Ok(());
            }
            ["heal"] => {
                for m in 0..self.world.hosts() {
                    self.world.repair(Repair::Join(m));
                }
                return Ok(());
            }
            ["coordinator", "away"] => {
                self.world.net.away.fill(true);
                return Ok(());
            }
            ["coordinator", "back"] => {
                self.world.net.away.fill(false);
                return Ok(());
            }
            _ => return Err(format!("\"{}\" is no command", words.join(" "))),
        };
        self.world.repair(repair);
        Ok(())
    }

    /// What befalls a disk.
    fn disk(&mut self, words: &[&str]) -> Result<(), String> {
        match *words {
            ["hang", _, m] => self.set(m, |w, m| {
                w.members[m].disk_hung = true;
                w.members[m].hung_since = w.now;
            }),
            ["fill", _, m] => self.set(m, |w, m| w.members[m].disk_full = true),
            ["nearly", "fill", _, m] => self.set(m, |w, m| w.members[m].disk_low = true),
            ["slow", _, m] => self.set(m, |w, m| w.members[m].disk_factor = 200),
            ["empty", _, m] => self.set(m, |w, m| w.members[m].data = Data::Empty),
            _ => Err(format!("\"{}\" is no command", words.join(" "))),
        }
    }

    fn set(&mut self, name: &str, change: impl FnOnce(&mut World, usize)) -> Result<(), String> {
        let m = self.member(name)?;
        change(&mut self.world, m);
        Ok(())
    }

    fn cut(&mut self, from: usize, to: usize) {
        self.world.net.cut[from][to] = from != to;
    }

    /// Clients commit on the open leader, or on a member by name, one after the other.
    fn write(&mut self, n: &str, to: Option<&str>, notes: &mut Vec<String>) -> Result<(), String> {
        let n: u64 = n.parse().map_err(|_| format!("\"{n}\" is not a number"))?;
        let to = match to {
            Some(name) => Some(self.member(name)?),
            None => open_leader(&self.world),
        };
        let before = self.world.check.acknowledged_total;
        let until = self.world.now + WRITE_MAX;
        let mut taken = 0;
        for _ in 0..n {
            taken += u64::from(to.is_some_and(|m| self.world.write(m)));
            let all = Condition::Acknowledged(before + taken);
            self.run(until, notes, Some(&all));
        }
        let done = self.world.check.acknowledged_total - before;
        notes.push(match to {
            None => "nobody is open for clients".into(),
            Some(_) if taken == 0 => "refused: it accepts no writes".into(),
            Some(_) if done == n => format!("{n} acknowledged"),
            Some(_) if done > n => format!("{done} acknowledged, {} of them had waited", done - n),
            Some(_) => format!("{done} of {n} acknowledged"),
        });
        Ok(())
    }

    /// Clients begin a write at each such interval, and do not wait for it.
    fn write_every(&mut self, n: &str, time: &str, notes: &mut Vec<String>) -> Result<(), String> {
        let n: u64 = n.parse().map_err(|_| format!("\"{n}\" is not a number"))?;
        let (pause, before) = (duration(time)?, self.world.check.acknowledged_total);
        for _ in 0..n {
            if let Some(m) = open_leader(&self.world) {
                self.world.write(m);
            }
            self.run(self.world.now + pause, notes, None);
        }
        let done = self.world.check.acknowledged_total - before;
        notes.push(format!("{done} of {n} acknowledged"));
        Ok(())
    }

    fn wait(
        &mut self,
        condition: &[&str],
        time: &str,
        notes: &mut Vec<String>,
    ) -> Result<(), String> {
        let wanted = Condition::parse(condition, &self.world)?;
        let until = self.world.now + duration(time)?;
        if self.run(until, notes, Some(&wanted)) {
            return Ok(());
        }
        let found = wanted.holds(&self.world).err().unwrap_or_default();
        Err(format!("waited for {}, but {found}", condition.join(" ")))
    }

    /// What the member's agent would say now.
    fn explain(&self, name: &str, notes: &mut Vec<String>) -> Result<(), String> {
        let m = self.member(name)?;
        match &self.world.members[m].agent {
            None => notes.push(format!("{name} has no agent")),
            Some(a) => {
                let decision = decide(&a.obs, &a.memory);
                notes.extend(
                    decision
                        .reasons
                        .iter()
                        .map(|r| format!("{name}: {}", r.text)),
                );
            }
        }
        Ok(())
    }

    fn request(&mut self, kind: RequestKind, to: Option<&str>) -> Result<(), String> {
        let to = to.map(|m| self.member(m)).transpose()?;
        self.world.check.loss_accepted |= kind == RequestKind::Failover;
        self.world.ask(kind, to);
        Ok(())
    }

    /// A member's preference, as its agent would write it.
    fn priority(&mut self, name: &str, number: &str) -> Result<(), String> {
        let m = self.member(name)?;
        let priority = number
            .parse()
            .map_err(|_| format!("\"{number}\" is not a number"))?;
        self.world.members[m].priority = priority;
        if let Some(a) = &mut self.world.members[m].agent {
            a.obs.me.priority = priority;
        }
        let id = self.world.name(m);
        let view = self.world.store.view();
        let Some(record) = view.members.get(&id) else {
            return Err(format!("{name} is not known to the coordinator yet"));
        };
        let mut value = record.value.clone();
        value.priority = priority;
        let change = Change {
            expect: vec![(Key::Member(id.clone()), record.revision)],
            puts: vec![Record::Member(id, value)],
            deletes: vec![],
        };
        self.world.store.apply(&change);
        let view = self.world.store.view();
        self.world.tell_store(&view);
        Ok(())
    }
}

/// `200ms` or `3s`, nanoseconds.
fn duration(text: &str) -> Result<u64, String> {
    let wrong = || format!("\"{text}\" is not a time like 200ms or 3s");
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, MS),
        None => (text.strip_suffix('s').ok_or_else(wrong)?, SECOND),
    };
    Ok(number.parse::<u64>().map_err(|_| wrong())? * unit)
}

/// The leader that proxies send clients to.
fn open_leader(world: &World) -> Option<usize> {
    let view = world.store.view();
    let l = view.leadership.as_ref().map(|l| &l.value)?;
    let leader = l.leader.as_ref().filter(|_| l.open)?;
    world.number(&leader.member)
}

/// What can be waited for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Condition {
    /// This member leads; nobody does.
    Leader(Option<MemberId>),
    /// Another one leads, and is open.
    LeaderNot(MemberId),
    /// The leader is open for clients.
    Open,
    /// A leader is open, everybody streams from it and is in the sync set.
    Whole,
    /// Exactly these run as primaries on hosts that are not frozen.
    Primaries(Vec<String>),
    /// The coordinator's sync set, in words.
    Sync(String),
    /// Commits acknowledged in all.
    Acknowledged(u64),
    /// Of them, in `async`, lost.
    Lost(u64),
    /// The member gives this reason for what it does.
    Reason(usize, String),
    /// The member streams.
    Streams(usize),
    /// The member holds so many records.
    Records(usize, usize),
}

impl Condition {
    fn parse(words: &[&str], world: &World) -> Result<Self, String> {
        let id = |name: &str| MemberId::new(name);
        let member = |name: &str| {
            let known = world.members.iter().position(|m| m.id.as_str() == name);
            known.ok_or_else(|| format!("there is no member \"{name}\""))
        };
        let number = |n: &str| {
            n.parse::<u64>()
                .map_err(|_| format!("\"{n}\" is not a number"))
        };
        Ok(match words {
            ["leader", "none"] => Self::Leader(None),
            ["leader", "not", m] => Self::LeaderNot(id(m)?),
            ["leader", m] => Self::Leader(Some(id(m)?)),
            ["open"] => Self::Open,
            ["whole"] => Self::Whole,
            ["primaries", names @ ..] => {
                Self::Primaries(names.iter().map(|n| (*n).to_owned()).collect())
            }
            ["sync", words @ ..] => Self::Sync(words.join(" ")),
            ["acknowledged", n] => Self::Acknowledged(number(n)?),
            ["lost", n] => Self::Lost(number(n)?),
            ["reason", m, code] => Self::Reason(member(m)?, (*code).to_owned()),
            ["streams", m] => Self::Streams(member(m)?),
            ["records", m, n] => Self::Records(
                member(m)?,
                usize::try_from(number(n)?).unwrap_or(usize::MAX),
            ),
            _ => return Err(format!("\"{}\" is no condition", words.join(" "))),
        })
    }

    /// Does it hold? If not, what is.
    pub fn holds(&self, world: &World) -> Result<(), String> {
        let view = world.store.view();
        let l = view.leadership.as_ref().map(|l| &l.value);
        let leader = l.and_then(|l| l.leader.as_ref()).map(|r| r.member.clone());
        let open = l.is_some_and(|l| l.open);
        let found = match self {
            Self::Leader(wanted) if *wanted == leader => return Ok(()),
            Self::LeaderNot(other)
                if open && leader.is_some() && leader.as_ref() != Some(other) =>
            {
                return Ok(());
            }
            Self::Leader(_) | Self::LeaderNot(_) => match leader {
                Some(m) => format!("{m} leads{}", if open { "" } else { ", not open" }),
                None => "nobody leads".into(),
            },
            Self::Open if open => return Ok(()),
            Self::Open => "it is not".into(),
            Self::Whole if world.is_whole() => return Ok(()),
            Self::Whole => format!("it is not: {}", world.describe()),
            Self::Primaries(wanted) => {
                let runs = |m: &&crate::member::Member| {
                    m.up && !m.frozen && m.pg.as_ref().is_some_and(|p| p.primary)
                };
                let found: Vec<String> = (world.members.iter().filter(runs))
                    .map(|m| m.id.to_string())
                    .collect();
                if *wanted == found {
                    return Ok(());
                }
                format!("primaries are: {}", found.join(" "))
            }
            Self::Sync(wanted) => {
                let found = l.map(|l| l.sync.to_string()).unwrap_or_default();
                if *wanted == found {
                    return Ok(());
                }
                format!("commits wait for {found}")
            }
            Self::Acknowledged(n) => match world.check.acknowledged_total {
                have if have == *n => return Ok(()),
                have => format!("{have} are"),
            },
            Self::Lost(n) => match world.check.lost_in_async {
                have if have == *n => return Ok(()),
                have => format!("{have} are"),
            },
            Self::Reason(m, code) => match reasons(world, *m) {
                given if given.iter().any(|r| r == code) => return Ok(()),
                given => format!("the reasons are {}", given.join(", ")),
            },
            Self::Streams(m) => {
                let pg = world.members[*m].pg.as_ref();
                if pg.is_some_and(|p| p.receiver.as_ref().is_some_and(|r| r.streaming)) {
                    return Ok(());
                }
                "it does not".into()
            }
            Self::Records(m, n) => {
                let db = world.members[*m].data.database();
                match db.map_or(0, |d| d.flushed) {
                    have if have == *n => return Ok(()),
                    have => format!("it holds {have}"),
                }
            }
        };
        Err(found)
    }
}

fn reasons(world: &World, m: usize) -> Vec<String> {
    world.members[m].agent.as_ref().map_or_else(Vec::new, |a| {
        let decision = decide(&a.obs, &a.memory);
        decision.reasons.iter().map(|r| r.code.to_owned()).collect()
    })
}
