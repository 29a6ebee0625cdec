//! The agent around the decision: observes, decides, keeps the lease, talks to the store.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use craton_core::decide::{Decision, LeaseWish, Memory, decide};
use craton_core::health::{CRASH_WINDOW, Disk, Host, StuckWrite, assess};
use craton_core::observe::{
    DataView, FirstStart, Lease, LeaseSeen, Me, MemberStatus, Observation, Origin, PeerView,
    PromiseView, Server, ServerView, TaskView,
};
use craton_core::promise::{Book, Ledger};
use craton_core::records::{Change, ClusterView};
use craton_core::sync::StandbyView;
use craton_core::topology::MemberRole;
use craton_core::{Lsn, Term};

use crate::event::{Event, Msg};
use crate::flaw::Flaw;
use crate::member::{Agent, Poll};
use crate::wal::lsn;
use crate::world::{MS, SECOND, US, World};

/// The agent decides at least this often.
const TICK: u64 = 100 * MS;
/// The longest that an answer of the coordinator is waited for.
const ANSWER_MAX: u64 = 2 * SECOND;

impl World {
    /// Starts an agent: it knows nothing but what is on its disk.
    pub fn agent_start(&mut self, m: usize) {
        if self.members[m].agent.is_some() || !self.members[m].up {
            return;
        }
        let (life, now, id) = (self.id(), self.clock(m), self.name(m));
        let forgets = self.options.flaw == Some(Flaw::StandbyPromiseForgotten);
        let member = &mut self.members[m];
        member.voter.restart(now);
        let lease = member.lease_file.filter(|l| l.until > now);
        let note = if forgets {
            Duration::ZERO
        } else {
            member.promise_note
        };
        let obs = Observation {
            now,
            wall_ms: 0,
            cluster_name: "sim".into(),
            initial_settings: self.settings.clone(),
            me: Me {
                host: "127.0.0.1".into(),
                port: u16::try_from(m).unwrap_or(0),
                api: format!("{id}:1"),
                id,
                incarnation: member.incarnation,
                floor: member.floor,
                priority: member.priority,
                noload: false,
                upstream: None,
                first_start: FirstStart::Make,
            },
            view: None,
            lease,
            lease_seen: LeaseSeen::Unknown,
            // A lease that was taken over may rest on promises that this life knows nothing of.
            promises: PromiseView {
                living_since: lease.map(|_| now),
                ..PromiseView::default()
            },
            peers: BTreeMap::new(),
            receivers: BTreeMap::new(),
            data: DataView::Empty,
            server: ServerView::Down,
            host: Host::default(),
            libraries: BTreeMap::new(),
            process: None,
            config_stale: false,
            pending: Vec::new(),
            bootstrap_done: false,
            logical: craton_core::slots::Told::default(),
            clone_repository: false,
            sealed: None,
            task: None,
            failures: Vec::new(),
        };
        member.agent = Some(Agent {
            life,
            obs,
            memory: Memory::default(),
            wish: LeaseWish::Leave,
            renewals: BTreeMap::new(),
            free: None,
            released: Term(0),
            submission: None,
            upstream: None,
            sealed: None,
            in_force: false,
            running: None,
            failures: BTreeMap::new(),
            woken: false,
            book: Book::new(now, note),
            ledger: Ledger::default(),
            needs: Vec::new(),
            renewed: None,
            asking: BTreeMap::new(),
            refused: Term(0),
        });
        self.log(|w| format!("{} agent starts", w.name(m)));
        self.after(MS, Event::Tick { m, life });
        self.after(MS, Event::Keep { m, life });
    }

    /// The agent of that life, if it still lives.
    pub fn agent(&mut self, m: usize, life: u64) -> Option<&mut Agent> {
        self.members[m].agent.as_mut().filter(|a| a.life == life)
    }

    /// Lets the agent decide soon: something has happened.
    pub fn wake(&mut self, m: usize) {
        let Some(agent) = &mut self.members[m].agent else {
            return;
        };
        if !agent.woken {
            agent.woken = true;
            let life = agent.life;
            let delay = self.rng.between(100 * US, 5 * MS);
            self.after(delay, Event::Decide { m, life });
        }
    }

    /// The agent's clock ticks.
    pub fn tick(&mut self, m: usize, life: u64) {
        if self.agent(m, life).is_none() {
            return;
        }
        self.wake(m);
        if self.has_majority(m) {
            let view = self.store.view();
            let delay = self.latency();
            self.after(delay, Event::View { m, life, view });
        }
        let status = self.status(m);
        for to in (0..self.members.len()).filter(|to| *to != m) {
            self.send(m, to, Msg::Status(Box::new(status.clone())));
        }
        self.tell_backups(m);
        self.after(TICK, Event::Tick { m, life });
    }

    fn status(&self, m: usize) -> MemberStatus {
        let member = &self.members[m];
        let db = member.data.database();
        let pg = member.pg.as_ref().filter(|p| p.ready);
        let streaming = pg.is_some_and(|p| p.receiver.as_ref().is_some_and(|r| r.streaming));
        let role = match pg {
            None => MemberRole::Down,
            Some(p) if p.primary => MemberRole::Leader,
            Some(_) if streaming => MemberRole::Standby,
            Some(_) => MemberRole::Transition,
        };
        let term = member
            .agent
            .as_ref()
            .and_then(|a| a.obs.view.as_ref()?.leadership.as_ref())
            .map_or(Term(0), |l| l.value.term);
        crate::status::announcement(crate::status::Own {
            incarnation: member.incarnation,
            role,
            term,
            timeline: pg.and(db).map(crate::wal::Database::timeline),
            lsn: pg.and(db).map(crate::wal::Database::end),
            streaming,
            checkpoint: db.map(|d| d.checkpoint),
            health: assess(&self.host(m), &self.settings, self.clock(m)),
            process: member.pg.as_ref().map(|p| p.run),
        })
    }

    /// The host as its agent sees it.
    fn host(&self, m: usize) -> Host {
        let member = &self.members[m];
        let total = 100 << 30;
        let reserve = self.settings.disk_reserve(total);
        let disk = Disk {
            path: "/data".into(),
            total,
            available: if member.disk_full {
                0
            } else if member.disk_low {
                reserve / 4
            } else {
                total / 2
            },
        };
        let stuck = member.disk_hung.then(|| StuckWrite {
            path: "/data".into(),
            since: member.clock.at(member.hung_since),
            wal: true,
        });
        let window = u64::try_from(CRASH_WINDOW.as_nanos()).unwrap_or(u64::MAX);
        let recent = |at: &&u64| self.now.saturating_sub(**at) < window;
        Host {
            disks: vec![disk],
            writes: stuck.into_iter().collect(),
            crashes: u32::try_from(member.crashes.iter().filter(recent).count())
                .unwrap_or(u32::MAX),
            ..Host::default()
        }
    }

    /// A state of the store arrives; it never goes back.
    pub fn learn(&mut self, m: usize, life: u64, view: &Rc<ClusterView>) {
        let Some(agent) = self.agent(m, life) else {
            return;
        };
        let newer = agent
            .obs
            .view
            .as_ref()
            .is_none_or(|v| v.revision < view.revision);
        if newer {
            agent.obs.view = Some((**view).clone());
            self.wake(m);
        }
    }

    fn observe(&mut self, m: usize) {
        let now = self.clock(m);
        let server = self.server_view(m);
        let host = self.host(m);
        let ttl = self.settings.ttl();
        let amnesia = self.options.flaw == Some(Flaw::PromisesForgotten);
        let member = &mut self.members[m];
        let hint = member.voter.hint(ttl, now, amnesia);
        let data = member
            .data
            .database()
            .map_or(DataView::Empty, |d| DataView::Present {
                system_id: d.system_id.to_string(),
                timeline: d.checkpoint,
                origin: Origin::Own,
            });
        let clock = member.clock;
        let Some(agent) = &mut member.agent else {
            return;
        };
        let o = &mut agent.obs;
        o.now = now;
        o.wall_ms = self.now / MS;
        o.me.incarnation = member.incarnation;
        o.me.floor = member.floor;
        o.lease_seen = hint;
        o.promises.held_until = agent.book.held_until(now);
        o.promises.living_since = o.promises.living_since.filter(|_| {
            let renewed = agent.renewed.map(|(l, _)| (l.term, l.until));
            o.lease.map(|l| (l.term, l.until)) > renewed
        });
        if agent.book.is_idle(now) {
            member.promise_note = Duration::ZERO;
            agent.book.noted(Duration::ZERO);
        }
        o.data = data;
        o.server = server;
        o.host = host;
        o.process = member.pg.as_ref().map(|p| p.run);
        o.sealed.clone_from(&agent.sealed);
        o.task = agent.running.as_ref().map(|r| TaskView {
            task: r.task.clone(),
            since: clock.at(r.since),
        });
        o.failures = agent.failures.values().cloned().collect();
    }

    fn server_view(&self, m: usize) -> ServerView {
        let member = &self.members[m];
        let (Some(pg), Some(agent)) = (&member.pg, &member.agent) else {
            return ServerView::Down;
        };
        let Some(db) = member.data.database().filter(|_| pg.ready) else {
            return ServerView::Silent {
                maybe_primary: pg.maybe_primary,
            };
        };
        let standbys = pg
            .senders
            .iter()
            .map(|s| StandbyView {
                member: self.name(s.member),
                incarnation: s.incarnation,
                streaming: true,
                flush_lsn: if s.flush == 0 {
                    Lsn::ZERO
                } else {
                    lsn(s.flush)
                },
            })
            .collect();
        ServerView::Running(Server {
            in_recovery: !pg.primary,
            timeline: db.timeline(),
            end: db.end(),
            replay: None,
            end_is_exact: pg.exact,
            upstream: agent.upstream.clone(),
            streaming: pg.receiver.as_ref().is_some_and(|r| r.streaming),
            sync_configured: pg.configured.clone(),
            sync_in_force: agent.in_force,
            standbys,
            active_transactions: Some(u32::try_from(pg.waiting.len()).unwrap_or(u32::MAX)),
            closed: pg.closed,
        })
    }

    /// Observes, decides, acts.
    pub fn decide(&mut self, m: usize, life: u64) {
        if self.agent(m, life).is_none() {
            return;
        }
        self.observe(m);
        self.decisions += 1;
        let flaw = self.options.flaw;
        let Some(agent) = self.agent(m, life) else {
            return;
        };
        agent.woken = false;
        let mut decision = if let Some(flaw) = flaw {
            let mut bent = agent.obs.clone();
            flaw.bend(&mut bent);
            let mut decision = decide(&bent, &agent.memory);
            flaw.spoil(&agent.obs, &mut decision);
            decision
        } else {
            decide(&agent.obs, &agent.memory)
        };
        agent.memory = std::mem::take(&mut decision.memory);
        agent.needs.clone_from(&decision.promises);
        self.log(|w| {
            let reasons: Vec<&str> = decision.reasons.iter().map(|r| r.code).collect();
            let task = decision.task.as_ref().map(craton_core::decide::Task::kind);
            let a = w.members[m].agent.as_ref();
            let rev = a.and_then(|a| Some(a.obs.view.as_ref()?.revision));
            format!(
                "{} decides at revision {rev:?}: {reasons:?} task={task:?} lease={:?} open={} changes={}",
                w.name(m),
                decision.lease,
                decision.open.is_some(),
                decision.changes.len()
            )
        });
        self.check_decision(m, &decision);
        self.act(m, life, decision);
    }

    /// What holds for every decision.
    fn check_decision(&mut self, m: usize, d: &Decision) {
        let Some(agent) = &self.members[m].agent else {
            return;
        };
        if d.task.is_some() && agent.running.is_some() {
            self.check.broken("a task was started while one runs");
        }
    }

    fn act(&mut self, m: usize, life: u64, d: Decision) {
        if let Some(why) = &d.kill {
            self.log(|w| format!("{} kills postgres: {why}", w.name(m)));
            if let Some(a) = self.agent(m, life) {
                a.running = None;
            }
            self.pg_exit(m, false);
        }
        self.keep_wish(m, life, d.lease);
        self.ask_seals(m, life, d.ask_seals);
        let Some(agent) = self.agent(m, life) else {
            return;
        };
        if agent.submission.is_none() && agent.free.is_none() {
            if !d.changes.is_empty() {
                self.submit(m, life, d.changes);
            } else if let Some(open) = d.open {
                self.ask_free(m, life, open);
            }
        }
        if let Some(task) = d.task {
            self.start_task(m, life, task);
        }
    }

    // --- the lease keeper

    fn keep_wish(&mut self, m: usize, life: u64, wish: LeaseWish) {
        let Some(agent) = self.agent(m, life) else {
            return;
        };
        let differs = agent.wish != wish;
        agent.wish = wish;
        match wish {
            LeaseWish::Release(term) if term > agent.released => {
                agent.released = term;
                agent.renewals.clear();
                agent.needs.clear();
                agent.renewed = agent.renewed.filter(|(l, _)| l.term > term);
                if agent.obs.lease.is_some_and(|l| l.term <= term) {
                    agent.obs.lease = None;
                    self.members[m].lease_file = None;
                    self.members[m].fence = None;
                }
                let voters = if self.net.away[m] {
                    0
                } else {
                    self.members.len()
                };
                for v in 0..voters {
                    self.send(m, v, Msg::Release { term });
                }
            }
            LeaseWish::Hold(_) if differs => self.renew(m, life),
            _ => {}
        }
    }

    /// The keeper's clock ticks.
    pub fn keep(&mut self, m: usize, life: u64) {
        let now = self.now;
        let Some(agent) = self.agent(m, life) else {
            return;
        };
        agent.renewals.retain(|_, p| p.expires > now);
        if agent
            .free
            .as_ref()
            .is_some_and(|(_, p, _)| p.expires <= now)
        {
            agent.free = None;
        }
        self.renew(m, life);
        self.ask_promises(m, life);
        self.look_at_backups(m, life);
        let pause = u64::try_from(self.settings.heartbeat().as_nanos()).unwrap_or(MS);
        self.after(pause, Event::Keep { m, life });
    }

    fn renew(&mut self, m: usize, life: u64) {
        let id = self.id();
        let (sent_at, expires, ttl) = (self.clock(m), self.now + ANSWER_MAX, self.settings.ttl());
        let Some(agent) = self.agent(m, life) else {
            return;
        };
        let LeaseWish::Hold(term) = agent.wish else {
            return;
        };
        if term <= agent.released {
            return;
        }
        let poll = Poll {
            term,
            sent_at,
            expires,
            yes: BTreeSet::new(),
            no: BTreeSet::new(),
        };
        agent.renewals.insert(id, poll);
        if self.net.away[m] {
            return;
        }
        for v in 0..self.members.len() {
            self.send(m, v, Msg::Renew { id, term, ttl });
        }
    }

    fn promised(&mut self, m: usize, voter: usize, id: u64) {
        let majority = self.members.len() / 2 + 1;
        let (ttl, margin) = (self.settings.ttl(), self.settings.margin());
        let Some(agent) = &mut self.members[m].agent else {
            return;
        };
        let Some(poll) = agent.renewals.get_mut(&id) else {
            return;
        };
        poll.yes.insert(voter);
        if poll.yes.len() < majority {
            return;
        }
        let sent_at = poll.sent_at;
        let lease = Lease {
            term: poll.term,
            until: sent_at.after(ttl.saturating_sub(margin)),
        };
        agent.renewals.remove(&id);
        let newest = agent
            .renewed
            .is_none_or(|(l, _)| (l.term, l.until) < (lease.term, lease.until));
        if newest {
            agent.renewed = Some((lease, sent_at));
        }
        self.hold(m, lease);
    }

    /// A deadline, if it is a later one.
    pub fn hold(&mut self, m: usize, lease: Lease) {
        let Some(agent) = &mut self.members[m].agent else {
            return;
        };
        let newer = agent
            .obs
            .lease
            .is_none_or(|l| (l.term, l.until) < (lease.term, lease.until));
        if newer {
            agent.obs.lease = Some(lease);
            self.members[m].lease_file = Some(lease);
            self.members[m].fence = Some(lease.until);
            let at = self.members[m].clock.when(lease.until);
            self.at(at, Event::Fence { m });
            self.check_lease(m, lease);
            self.wake(m);
        }
    }

    fn refused(&mut self, m: usize, voter: usize, id: u64) {
        let voters = self.members.len();
        let majority = voters / 2 + 1;
        let Some(agent) = &mut self.members[m].agent else {
            return;
        };
        let Some(poll) = agent.renewals.get_mut(&id) else {
            return;
        };
        poll.no.insert(voter);
        if poll.no.len() > voters - majority {
            agent.refused = agent.refused.max(poll.term);
        }
    }

    /// Of two terms' leases one is over before the other begins.
    fn check_lease(&mut self, m: usize, lease: Lease) {
        if lease.until <= self.clock(m) || self.options.lying_clocks {
            return;
        }
        for o in (0..self.members.len()).filter(|o| *o != m) {
            let other = &self.members[o];
            let held = other.agent.as_ref().and_then(|a| a.obs.lease);
            let renewed = other.agent.as_ref().and_then(|a| a.renewed);
            // One that lived on promises and has sealed gave up more than the lease.
            let acts = other.pg.as_ref().is_some_and(|p| p.maybe_primary);
            let held = held.or(other.lease_file).filter(|_| acts);
            let other = held.or(renewed.map(|(l, _)| l));
            if let Some(l) = other.filter(|l| l.until > self.clock(o)) {
                let text = format!(
                    "two leases at once: {} holds term {}, {} term {}",
                    self.members[m].id, lease.term, self.members[o].id, l.term
                );
                self.check.broken(text);
            }
        }
    }

    // --- messages between agents

    /// A message has arrived.
    pub fn receive(&mut self, from: usize, to: usize, msg: Msg) {
        if self.members[to].agent.is_none() {
            return;
        }
        let now = self.clock(to);
        let amnesia = self.options.flaw == Some(Flaw::PromisesForgotten);
        match msg {
            Msg::Renew { id, term, ttl } => {
                if self.members[to].voter.renew(term, ttl, now) {
                    self.send(to, from, Msg::Promised { id });
                } else {
                    self.send(to, from, Msg::Refused { id });
                }
            }
            Msg::Refused { id } => self.refused(to, from, id),
            Msg::AskPromise { ask, sent_at } => self.asked_promise(to, from, &ask, sent_at),
            Msg::StandbyPromised {
                term,
                incarnation,
                sent_at,
            } => self.standby_promised(to, from, term, incarnation, sent_at),
            Msg::Promised { id } => self.promised(to, from, id),
            Msg::Release { term } => {
                self.members[to].voter.release(term);
                self.wake(to);
            }
            Msg::AskFree { id, term, ttl } => {
                // It is noted on disk before it is said.
                let hung = self.members[to].disk_hung || self.members[to].disk_full;
                if !hung && self.members[to].voter.free(term, ttl, now, amnesia) {
                    self.send(to, from, Msg::Free { id });
                }
            }
            Msg::Free { id } => self.freed(to, from, id),
            Msg::Status(status) => {
                let name = self.name(from);
                if let Some(agent) = &mut self.members[to].agent {
                    let peer = PeerView {
                        heard_at: now,
                        status: *status,
                    };
                    agent.obs.peers.insert(name, peer);
                }
            }
            other => self.hear_backup(to, from, other),
        }
    }

    fn ask_free(&mut self, m: usize, life: u64, open: craton_core::decide::OpenElection) {
        let id = self.id();
        let (sent_at, expires, ttl) = (
            self.clock(m),
            self.now + ANSWER_MAX / 4,
            self.settings.ttl(),
        );
        let term = open.after;
        let Some(agent) = self.agent(m, life) else {
            return;
        };
        let poll = Poll {
            term,
            sent_at,
            expires,
            yes: BTreeSet::new(),
            no: BTreeSet::new(),
        };
        agent.free = Some((id, poll, open));
        if self.net.away[m] {
            return;
        }
        for v in 0..self.members.len() {
            self.send(m, v, Msg::AskFree { id, term, ttl });
        }
    }

    fn freed(&mut self, m: usize, voter: usize, id: u64) {
        let majority = self.members.len() / 2 + 1;
        let Some(agent) = &mut self.members[m].agent else {
            return;
        };
        let life = agent.life;
        let Some((_, poll, _)) = agent.free.as_mut().filter(|(f, _, _)| *f == id) else {
            return;
        };
        poll.yes.insert(voter);
        if poll.yes.len() >= majority
            && let Some((_, _, open)) = agent.free.take()
            && agent.submission.is_none()
        {
            self.submit(m, life, vec![open.change]);
        }
    }

    // --- the store

    fn submit(&mut self, m: usize, life: u64, changes: Vec<Change>) {
        let id = self.id();
        let Some(change) = changes.first().cloned() else {
            return;
        };
        let Some(agent) = self.agent(m, life) else {
            return;
        };
        agent.submission = Some((id, changes));
        let odd = if self.rng.chance(4) {
            self.rng.between(0, 3 * SECOND)
        } else {
            0
        };
        let delay = self.latency() + odd + self.net.store_lag[m];
        let change = Box::new(change);
        self.submitted += 1;
        self.after(
            delay,
            Event::Submit {
                m,
                life,
                id,
                change,
            },
        );
        self.after(
            ANSWER_MAX,
            Event::Answered {
                m,
                life,
                id,
                ok: false,
            },
        );
    }

    /// A transaction arrives at the store, if a majority can be reached.
    pub fn submit_arrives(&mut self, m: usize, life: u64, id: u64, change: &Change) {
        self.submitted = self.submitted.saturating_sub(1);
        if !self.has_majority(m) {
            return;
        }
        let done = self.store.apply(change);
        if done {
            let view = self.store.view();
            self.check.store(&view);
            self.log(|w| {
                let l = view.leadership.as_ref().map(|l| &l.value);
                let keys: Vec<String> = change.puts.iter().map(|p| p.key().path()).collect();
                format!(
                    "{} wrote {keys:?} at revision {}: {}",
                    w.name(m),
                    view.revision,
                    l.map_or(String::new(), |l| format!(
                        "term {} leader {:?} timeline {} sync [{}] open={}",
                        l.term,
                        l.leader.as_ref().map(|r| r.member.as_str()),
                        l.timeline,
                        l.sync,
                        l.open
                    ))
                )
            });
            self.tell_store(&view);
        }
        // An answer may get lost on its way: the outcome is unknown then.
        if !self.rng.chance(self.net.loss / 4) {
            let delay = self.latency();
            self.after(
                delay,
                Event::Answered {
                    m,
                    life,
                    id,
                    ok: done,
                },
            );
        }
    }

    /// Every member with a majority hears of a change, in its own time.
    pub fn tell_store(&mut self, view: &Rc<ClusterView>) {
        for m in 0..self.members.len() {
            let life = self.members[m].agent.as_ref().map(|a| a.life);
            if let Some(life) = life.filter(|_| self.has_majority(m)) {
                let odd = if self.rng.chance(3) { 200 * MS } else { 0 };
                let delay = self.latency() + odd + self.net.store_lag[m];
                let view = Rc::clone(view);
                self.after(delay, Event::View { m, life, view });
            }
        }
    }

    /// The answer, or the end of the wait for it: the next change, or a new decision.
    pub fn submit_answered(&mut self, m: usize, life: u64, id: u64, ok: bool) {
        let Some(agent) = self.agent(m, life) else {
            return;
        };
        let Some((_, mut changes)) = agent.submission.take_if(|(s, _)| *s == id) else {
            return;
        };
        changes.remove(0);
        if ok && !changes.is_empty() {
            self.submit(m, life, changes);
        } else {
            self.wake(m);
        }
    }
}
