//! The agent's long tasks: each takes time, and may break off at any point.

use craton_core::decide::{StopHow, Task};
use craton_core::observe::TaskFailure;
use craton_core::records::Seal;
use craton_core::{Lsn, MemberId, Term, TimelineId};

use crate::event::Event;
use crate::flaw::Flaw;
use crate::member::Running;
use crate::wal::{Data, Database, Kind, Rec};
use crate::world::{MS, SECOND, World};

/// First pause after a failure; doubles up to [`RETRY_MAX`].
const RETRY_MIN: u64 = 200 * MS;
/// Longest pause after a failure.
const RETRY_MAX: u64 = 10 * SECOND;
/// One attempt to prove a sync set.
const SYNC_MAX: u64 = 5 * SECOND;
/// Until a started server answers, or a seal is made.
const READY_MAX: u64 = 30 * SECOND;
/// How long missing WAL is waited for.
const CATCH_UP_MAX: u64 = 10 * SECOND;
/// The pause between two looks.
pub(crate) const LOOK: u64 = 5 * MS;

/// What a step of a task comes to.
pub(crate) enum Step {
    /// Look again after so long, at this stage.
    Again(u8, u64),
    Done,
    Failed(&'static str),
}

impl World {
    /// Starts a long task.
    pub fn start_task(&mut self, m: usize, life: u64, task: Task) {
        let id = self.id();
        let since = self.now;
        self.log(|w| format!("{} starts {task:?}", w.name(m)));
        let Some(agent) = self.agent(m, life) else {
            return;
        };
        if agent.running.is_some() {
            return;
        }
        agent.running = Some(Running {
            id,
            task,
            stage: 0,
            since,
        });
        let delay = self.disk(m);
        self.after(delay, Event::Step { m, life, task: id });
        self.wake(m);
    }

    /// One step.
    pub fn step_task(&mut self, m: usize, life: u64, id: u64) {
        let Some(agent) = self.agent(m, life) else {
            return;
        };
        let Some(running) = agent.running.clone().filter(|r| r.id == id) else {
            return;
        };
        let step = self.do_step(m, &running);
        match step {
            Step::Again(stage, delay) => {
                if let Some(r) = self.agent(m, life).and_then(|a| a.running.as_mut()) {
                    r.stage = stage;
                }
                self.after(delay, Event::Step { m, life, task: id });
            }
            Step::Done => self.end_task(m, life, &running.task, None),
            Step::Failed(why) => self.end_task(m, life, &running.task, Some(why)),
        }
    }

    fn end_task(&mut self, m: usize, life: u64, task: &Task, error: Option<&'static str>) {
        let now = self.clock(m);
        let kind = task.kind();
        self.log(|w| format!("{} ends {kind:?}: {}", w.name(m), error.unwrap_or("done")));
        let Some(agent) = self.agent(m, life) else {
            return;
        };
        agent.running = None;
        if let Some(why) = error {
            let count = agent.failures.get(&kind).map_or(1, |f| f.count + 1);
            let pause = (RETRY_MIN << count.min(10).saturating_sub(1)).min(RETRY_MAX);
            let retry_at = now.after(std::time::Duration::from_nanos(pause));
            let failure = TaskFailure {
                kind,
                error: why.into(),
                count,
                retry_at,
            };
            agent.failures.insert(kind, failure);
        } else {
            agent.failures.remove(&kind);
            agent.obs.bootstrap_done |= *task == Task::Bootstrap;
        }
        self.wake(m);
    }

    fn do_step(&mut self, m: usize, r: &Running) -> Step {
        match &r.task {
            Task::InitDb => self.init_db(m, r.stage),
            // Every simulated database is Craton's.
            Task::Adopt => Step::Failed("there is nothing to adopt"),
            Task::StartStandby => self.start_standby(m, r, None),
            Task::StartPrimary { sync } => {
                if r.stage == 0 {
                    self.pg_start(m, Some(sync), None);
                    if let Some(a) = &mut self.members[m].agent {
                        a.in_force = true;
                    }
                    return Step::Again(1, LOOK);
                }
                self.until_ready(m, r)
            }
            Task::Stop { how, .. } => self.stop(m, r, *how),
            Task::Follow { from, term } => self.follow(m, from, *term),
            Task::Seal { term } => self.seal(m, r, *term),
            Task::Promote {
                term,
                timeline,
                sync,
            } => {
                let taken = TimelineId(timeline.0.saturating_sub(1));
                self.promote(m, r, *term, sync, taken)
            }
            Task::Bootstrap => {
                if !self.members[m]
                    .pg
                    .as_ref()
                    .is_some_and(|p| p.ready && p.primary)
                {
                    return Step::Failed("not a primary");
                }
                self.append(m, Kind::Other);
                self.flush_now(m);
                Step::Done
            }
            Task::Clone { from, term, .. } => self.clone_from(m, r, from, *term),
            Task::Rewind { from, term, .. } => self.rewind(m, r, from, *term),
            Task::CatchUp {
                from,
                term,
                lsn,
                timeline,
                receiver: Some(_),
            } => self.catch_up_by_files(m, r, from, *term, (*timeline, *lsn)),
            Task::CatchUp {
                from, term, lsn, ..
            } => self.catch_up(m, r, from, *term, *lsn),
            Task::SetSync(set) => self.set_sync(m, r, set),
            Task::Admit => {
                if let Some(pg) = &mut self.members[m].pg {
                    pg.closed = false;
                }
                Step::Done
            }
            Task::Checkpoint => {
                if r.stage == 0 {
                    return Step::Again(1, 100 * MS);
                }
                if let Some(db) = self.members[m].data.database_mut() {
                    db.checkpoint = db.timeline();
                }
                Step::Done
            }
            // No logical slots are simulated.
            Task::Configure | Task::TakeSlots { .. } => Step::Done,
            Task::Reinit { term, .. } => {
                if self.members[m].pg.is_some() {
                    self.pg_exit(m, false);
                }
                self.members[m].data = Data::Empty;
                self.reborn(m, *term);
                Step::Done
            }
        }
    }

    fn raise_floor(&mut self, m: usize, term: Term) {
        let floor = &mut self.members[m].floor;
        *floor = (*floor).max(term);
    }

    /// A new life of the data directory; its floor is the term at its birth.
    fn reborn(&mut self, m: usize, term: Term) {
        let fresh = self.id() + 1;
        let incarnation = Flaw::incarnation(self.options.flaw, fresh);
        self.members[m].incarnation = Some(incarnation);
        self.raise_floor(m, term);
        if let Some(a) = &mut self.members[m].agent {
            a.sealed = None;
        }
    }

    fn init_db(&mut self, m: usize, stage: u8) -> Step {
        if stage == 0 {
            return Step::Again(1, 400 * MS);
        }
        if self.members[m].data != Data::Empty {
            self.check
                .broken("initdb over a data directory that is not empty");
        }
        let (system_id, id) = (self.id(), self.id());
        let timeline = TimelineId(1);
        let rec = Rec {
            id,
            timeline,
            kind: Kind::Other,
        };
        self.members[m].data = Data::Present(Database {
            system_id,
            wal: vec![rec],
            flushed: 1,
            checkpoint: timeline,
        });
        self.reborn(m, Term(0));
        Step::Done
    }

    fn start_standby(&mut self, m: usize, r: &Running, upstream: Option<(MemberId, Term)>) -> Step {
        if r.stage > 0 {
            return self.until_ready(m, r);
        }
        if self.members[m].pg.is_some() {
            return Step::Failed("PostgreSQL runs already");
        }
        self.spawn_standby(m, upstream);
        Step::Again(1, LOOK)
    }

    pub(crate) fn spawn_standby(&mut self, m: usize, upstream: Option<(MemberId, Term)>) {
        let up = upstream.as_ref().and_then(|(l, _)| self.number(l));
        self.pg_start(m, None, up);
        if let Some(a) = &mut self.members[m].agent {
            if upstream.is_some() {
                a.sealed = None;
            }
            a.upstream = upstream;
        }
    }

    pub(crate) fn until_ready(&mut self, m: usize, r: &Running) -> Step {
        match &self.members[m].pg {
            None => Step::Failed("PostgreSQL ended"),
            Some(p) if p.ready => Step::Done,
            Some(_) if self.now > r.since + READY_MAX => Step::Failed("no answer"),
            Some(_) => Step::Again(r.stage, LOOK),
        }
    }

    fn stop(&mut self, m: usize, r: &Running, how: StopHow) -> Step {
        if how == StopHow::Kill {
            self.pg_exit(m, false);
            return Step::Done;
        }
        if self.members[m].pg.is_none() {
            return Step::Done;
        }
        if r.stage == 0 {
            self.shut_down(m);
        }
        Step::Again(1, LOOK)
    }

    fn follow(&mut self, m: usize, leader: &MemberId, term: Term) -> Step {
        let up = self.number(leader);
        if self.members[m].pg.is_none() {
            return Step::Failed("PostgreSQL is not running");
        }
        self.raise_floor(m, term);
        self.drop_receiver(m);
        if let Some(pg) = &mut self.members[m].pg {
            pg.upstream = up;
        }
        if let Some(a) = &mut self.members[m].agent {
            a.sealed = None;
            a.upstream = Some((leader.clone(), term));
        }
        Step::Done
    }

    pub(crate) fn seal(&mut self, m: usize, r: &Running, term: Term) -> Step {
        let Some(incarnation) = self.members[m].incarnation else {
            return Step::Failed("no incarnation");
        };
        let Some(pg) = &mut self.members[m].pg else {
            return Step::Failed("PostgreSQL is not running");
        };
        if pg.primary {
            return Step::Failed("PostgreSQL is not a standby");
        }
        let keep = self.options.flaw == Some(Flaw::SealKeepsStreaming);
        match r.stage {
            0 => {
                let now = self.clock(m);
                let eager = self.options.flaw == Some(Flaw::SealDespitePromise);
                let agent = self.members[m].agent.as_mut();
                if let Some(Err(until)) = agent.map(|a| a.book.begin_seal(now, term))
                    && !eager
                {
                    return Step::Again(0, crate::promise::wait(now, until));
                }
                self.raise_floor(m, term);
                Step::Again(1, LOOK)
            }
            1 => {
                if !keep {
                    pg.upstream = None;
                    self.drop_receiver(m);
                    if let Some(a) = &mut self.members[m].agent {
                        a.upstream = None;
                    }
                }
                Step::Again(2, LOOK)
            }
            _ if pg.ready && pg.exact && (keep || pg.receiver.is_none()) => {
                let Some(db) = self.members[m].data.database() else {
                    return Step::Failed("no data");
                };
                let seal = Seal {
                    term,
                    incarnation,
                    timeline: db.timeline(),
                    lsn: db.end(),
                };
                if let Some(a) = &mut self.members[m].agent {
                    a.sealed = Some(seal);
                }
                Step::Done
            }
            _ if self.now > r.since + READY_MAX => Step::Failed("no end of WAL"),
            _ => Step::Again(2, LOOK),
        }
    }

    /// Streams from a sealed member up to `to`, then seals anew.
    fn catch_up(&mut self, m: usize, r: &Running, from: &MemberId, term: Term, to: Lsn) -> Step {
        let up = self.number(from);
        let end = self.members[m].data.database().map(Database::end);
        let floor = self.members[m].floor;
        let Some(pg) = &mut self.members[m].pg else {
            return Step::Failed("PostgreSQL is not running");
        };
        match r.stage {
            0 => {
                if floor > term {
                    return Step::Failed("sealed for a later term");
                }
                pg.upstream = up;
                if let Some(a) = &mut self.members[m].agent {
                    a.sealed = None;
                }
                Step::Again(9, LOOK)
            }
            9 if end < Some(to) && self.now < r.since + CATCH_UP_MAX => Step::Again(9, LOOK),
            // In any case the upstream is cut again; the seal says how far it came.
            9 => Step::Again(1, LOOK),
            _ => self.seal(m, r, term),
        }
    }

    fn promote(
        &mut self,
        m: usize,
        r: &Running,
        term: Term,
        sync: &craton_core::sync::SyncSet,
        taken: TimelineId,
    ) -> Step {
        let Some(pg) = &mut self.members[m].pg else {
            return Step::Failed("PostgreSQL is not running");
        };
        if pg.primary {
            return Step::Failed("it is a primary already");
        }
        if r.stage == 0 {
            pg.maybe_primary = true;
            pg.upstream = None;
            self.drop_receiver(m);
            self.configure_sync(m, sync.clone());
            self.after(MS, Event::Fence { m });
            let delay = self.rng.between(20 * MS, 120 * MS);
            return Step::Again(1, delay);
        }
        pg.primary = true;
        let Some(db) = self.members[m].data.database_mut() else {
            return Step::Failed("no data");
        };
        // PostgreSQL takes the next number after all whose history files it finds.
        let newest = db.wal.iter().map(|r| r.timeline).max();
        let timeline = TimelineId(newest.map_or(1, |t| t.0).max(taken.0) + 1);
        let mut wal = db.wal.clone();
        let id = self.id();
        wal.push(Rec {
            id,
            timeline,
            kind: Kind::Other,
        });
        self.log(|w| {
            format!(
                "{} promotes in term {term} onto timeline {timeline}",
                w.name(m)
            )
        });
        self.check.promotion(term, m, timeline, &wal);
        self.check_alone(m);
        if let Some(db) = self.members[m].data.database_mut() {
            db.wal = wal;
        }
        self.flush_now(m);
        if let Some(a) = &mut self.members[m].agent {
            a.in_force = true;
        }
        Step::Done
    }

    /// What can be copied from another member now.
    fn source(&self, m: usize, from: &MemberId, primary: bool) -> Option<Database> {
        let s = self.number(from)?;
        let other = &self.members[s];
        let reachable = other.up && !other.frozen && !self.net.cut[m][s] && !self.net.cut[s][m];
        let pg = other.pg.as_ref().filter(|p| reachable && p.ready)?;
        if primary && !pg.primary {
            return None;
        }
        let mut copy = other.data.database()?.clone();
        copy.wal.truncate(copy.flushed);
        copy.checkpoint = copy.timeline();
        Some(copy)
    }

    fn clone_from(&mut self, m: usize, r: &Running, from: &MemberId, term: Term) -> Step {
        match r.stage {
            0 => {
                if self.members[m].data != Data::Empty {
                    self.check
                        .broken("a clone into a data directory that is not empty");
                }
                self.reborn(m, term);
                let delay = self.rng.between(300 * MS, 2 * SECOND);
                Step::Again(1, delay)
            }
            1 if self.members[m].disk_full => Step::Failed("no space left on device"),
            1 => match self.source(m, from, false) {
                Some(copy) => {
                    self.members[m].data = Data::Present(copy);
                    self.spawn_standby(m, None);
                    Step::Again(2, LOOK)
                }
                None => Step::Failed("the source cannot be reached"),
            },
            _ => self.until_ready(m, r),
        }
    }

    fn rewind(&mut self, m: usize, r: &Running, from: &MemberId, term: Term) -> Step {
        match r.stage {
            0 => {
                self.pg_exit(m, false);
                Step::Again(1, 50 * MS)
            }
            1 => {
                self.reborn(m, term);
                if self.source(m, from, true).is_none() {
                    return Step::Failed("the source cannot be reached");
                }
                // From here on the directory is neither the old one nor the new one.
                self.members[m].data = Data::Empty;
                let delay = self.rng.between(100 * MS, SECOND);
                Step::Again(2, delay)
            }
            2 if self.members[m].disk_full => Step::Failed("no space left on device"),
            2 => match self.source(m, from, true) {
                Some(copy) => {
                    self.members[m].data = Data::Present(copy);
                    self.raise_floor(m, term);
                    self.spawn_standby(m, Some((from.clone(), term)));
                    Step::Again(3, LOOK)
                }
                None => Step::Failed("the source went away"),
            },
            _ => self.until_ready(m, r),
        }
    }

    fn set_sync(&mut self, m: usize, r: &Running, set: &craton_core::sync::SyncSet) -> Step {
        if self.members[m].pg.is_none() {
            return Step::Failed("PostgreSQL is not running");
        }
        if r.stage == 0 {
            if let Some(a) = &mut self.members[m].agent {
                a.in_force = false;
            }
            self.configure_sync(m, set.clone());
            return Step::Again(1, LOOK);
        }
        let proven = self.members[m]
            .pg
            .as_ref()
            .is_some_and(|p| p.in_force() && p.configured == *set);
        if proven {
            if let Some(a) = &mut self.members[m].agent {
                a.in_force = true;
            }
            return Step::Done;
        }
        if self.now > r.since + SYNC_MAX {
            return Step::Failed("not proven in force");
        }
        Step::Again(1, LOOK)
    }
}
