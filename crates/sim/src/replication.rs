//! Streaming replication, commits, and the life of a simulated PostgreSQL.

use craton_core::sync::SyncSet;

use crate::event::Event;
use crate::flaw::Flaw;
use crate::postgres::{Conn, Postgres, Receiver, Sender, WalMsg, nobody};
use crate::wal::{Kind, Rec};
use crate::world::{MS, SECOND, US, World};

/// `wal_receiver_timeout` and `wal_sender_timeout`.
const SILENCE_MAX: u64 = 2 * SECOND;
/// `wal_retrieve_retry_interval`.
const RETRY: u64 = 300 * MS;
/// How long a clean shutdown waits for the standbys.
const STOP_MAX: u64 = 3 * SECOND;
/// The run of a side of a connection that is closed.
pub(crate) const CLOSED: u64 = 0;
/// PostgreSQL's housekeeping.
const PG_TICK: u64 = 100 * MS;

impl World {
    /// The PostgreSQL of that run, if it still lives.
    pub fn pg(&mut self, m: usize, run: u64) -> Option<&mut Postgres> {
        self.members[m].pg.as_mut().filter(|p| p.run == run)
    }

    /// Starts PostgreSQL. Recovery reads what a crash has left and makes it durable.
    pub fn pg_start(&mut self, m: usize, primary: Option<&SyncSet>, upstream: Option<usize>) {
        let run = self.id();
        let incarnation = self.members[m].incarnation.unwrap_or_default();
        let Some(db) = self.members[m].data.database_mut() else {
            return;
        };
        let recovered: Vec<(usize, Rec)> = (db.flushed..db.wal.len())
            .map(|i| (i + 1, db.wal[i]))
            .collect();
        db.flushed = db.wal.len();
        for (at, rec) in recovered {
            self.check.flushed(m, at, rec);
        }
        let configured = primary.cloned().unwrap_or_else(nobody);
        // An empty database hides nothing: its door is left out.
        let written = db.wal.iter().any(|r| matches!(r.kind, Kind::Commit));
        self.members[m].pg = Some(Postgres {
            run,
            ready: false,
            start_primary: primary.is_some(),
            primary: false,
            closed: primary.is_some() && written,
            maybe_primary: primary.is_some(),
            exact: false,
            stopping: false,
            stop_by: 0,
            upstream,
            incarnation,
            receiver: None,
            receiver_retry_at: 0,
            defined: configured.k > 0,
            configured,
            senders: Vec::new(),
            waiting: std::collections::BTreeSet::new(),
        });
        let start = self.rng.between(50 * MS, 250 * MS) * self.members[m].disk_factor.min(8);
        self.after(start, Event::Ready { m, run });
        self.after(start + PG_TICK, Event::PgTick { m, run });
        self.after(MS, Event::Fence { m });
        self.log(|w| {
            format!(
                "{} postgres starts, primary={}",
                w.name(m),
                primary.is_some()
            )
        });
    }

    /// It answers.
    pub fn pg_ready(&mut self, m: usize, run: u64) {
        if self.members[m].disk_full && self.pg(m, run).is_some() {
            // It starts by writing.
            return self.pg_exit(m, false);
        }
        let Some(pg) = self.pg(m, run) else { return };
        pg.ready = true;
        if pg.start_primary {
            pg.primary = true;
            pg.exact = true;
            self.append(m, Kind::Other);
            self.flush_now(m);
            self.primary_starts_in_place(m);
        } else {
            let delay = self.rng.between(MS, 100 * MS);
            self.after(delay, Event::Exact { m, run });
        }
        self.wake(m);
    }

    fn primary_starts_in_place(&mut self, m: usize) {
        let view = self.store.view();
        let term = view.leadership.as_ref().map_or(0, |l| l.value.term.0);
        let Some(db) = self.members[m].data.database() else {
            return;
        };
        let wal = db.wal.clone();
        let timeline = db.timeline();
        let name = self.name(m);
        if term <= 1 && timeline.0 == 1 {
            self.check
                .promotion(craton_core::Term(1), m, timeline, &wal);
        } else if self.keeps_commits() && view.leader().is_some_and(|l| l.member == name) {
            self.check
                .holds_everything(&format!("{name}, restarted in place,"), &wal);
        }
        self.check_alone(m);
    }

    /// No second primary runs where nothing was paused.
    pub fn check_alone(&mut self, m: usize) {
        let other = (0..self.members.len()).find(|o| {
            let x = &self.members[*o];
            let just_thawed = x.frozen || self.now.saturating_sub(x.thawed_at) < 50 * MS;
            *o != m && x.up && !just_thawed && x.pg.as_ref().is_some_and(|p| p.primary)
        });
        let own = &self.members[m];
        let late = self.now.saturating_sub(own.thawed_at) < 50 * MS;
        if let Some(other) = other.filter(|_| !late && !self.options.lying_clocks) {
            let (a, b) = (self.name(m), self.name(other));
            self.check
                .broken(format!("two primaries at once: {a} and {b}"));
        }
    }

    /// All local WAL has been read.
    pub fn pg_exact(&mut self, m: usize, run: u64) {
        if let Some(pg) = self.pg(m, run) {
            pg.exact = true;
            self.wake(m);
        }
    }

    /// PostgreSQL is gone. What was written and not flushed may or may not have reached the disk;
    /// with the host it has not.
    pub fn pg_exit(&mut self, m: usize, host_lost: bool) {
        let Some(pg) = self.members[m].pg.take() else {
            return;
        };
        let unflushed = self.members[m]
            .data
            .database()
            .map_or(0, |d| d.wal.len() - d.flushed);
        let spare = self.rng.below(unflushed + 1);
        if let Some(db) = self.members[m].data.database_mut() {
            let keep = if host_lost { 0 } else { spare };
            db.wal.truncate(db.flushed + keep);
        }
        // What is under way still arrives.
        for c in self.conns.values_mut() {
            if c.up == (m, pg.run) {
                c.up.1 = CLOSED;
            }
            if c.down == (m, pg.run) {
                c.down.1 = CLOSED;
            }
        }
        self.conns
            .retain(|_, c| c.up.1 != CLOSED || c.down.1 != CLOSED);
        if let Some(agent) = &mut self.members[m].agent {
            agent.upstream = None;
            agent.sealed = None;
            agent.in_force = false;
        }
        self.log(|w| format!("{} postgres is gone", w.name(m)));
        self.wake(m);
    }

    /// Appends a record; returns the position behind it.
    pub fn append(&mut self, m: usize, kind: Kind) -> usize {
        let id = self.id();
        self.members[m].data.database_mut().map_or(0, |db| {
            let timeline = db.wal.last().map_or(db.checkpoint, |r| r.timeline);
            db.wal.push(Rec { id, timeline, kind });
            db.wal.len()
        })
    }

    /// Flushes everything at once.
    pub fn flush_now(&mut self, m: usize) {
        let Some(run) = self.members[m].pg.as_ref().map(|p| p.run) else {
            return;
        };
        let upto = self.members[m].data.database().map_or(0, |d| d.wal.len());
        self.pg_flushed(m, run, upto);
    }

    /// The disk has flushed up to `upto`.
    pub fn pg_flushed(&mut self, m: usize, run: u64, upto: usize) {
        let Some(pg) = self.pg(m, run) else { return };
        let (primary, defined) = (pg.primary, pg.defined);
        let receiver = pg.receiver.as_ref().filter(|r| r.streaming).map(|r| r.conn);
        let Some(db) = self.members[m].data.database_mut() else {
            return;
        };
        let upto = upto.min(db.wal.len());
        let from = db.flushed;
        db.flushed = db.flushed.max(upto);
        let fresh: Vec<(usize, Rec)> = (from..db.flushed).map(|i| (i + 1, db.wal[i])).collect();
        let flushed = db.flushed;
        for (at, rec) in fresh.into_iter().filter(|_| primary) {
            self.check.flushed(m, at, rec);
            if rec.kind == Kind::Commit {
                if let Some(pg) = self.pg(m, run) {
                    pg.waiting.insert(at);
                }
                if !defined {
                    self.release(m, at);
                }
            }
        }
        if let Some(conn) = receiver {
            self.conn_send(conn, true, WalMsg::Ack(flushed));
        }
        self.push(m);
    }

    /// Everything that waits up to here is acknowledged to its clients.
    fn release(&mut self, m: usize, upto: usize) {
        let Some(pg) = &mut self.members[m].pg else {
            return;
        };
        let later = pg.waiting.split_off(&(upto + 1));
        let done = std::mem::replace(&mut pg.waiting, later);
        for at in done {
            let rec = self.members[m]
                .data
                .database()
                .and_then(|d| d.wal.get(at - 1).copied());
            if let Some(rec) = rec {
                self.check.acknowledged(m, at, rec);
                if self.faults.calm {
                    self.acknowledged_calm += 1;
                }
            }
        }
    }

    /// Sends new WAL to every standby that streams from here.
    fn push(&mut self, m: usize) {
        let member = &mut self.members[m];
        let (Some(pg), Some(db)) = (&mut member.pg, member.data.database()) else {
            return;
        };
        let mut out = Vec::new();
        let mut ended = Vec::new();
        for s in &mut pg.senders {
            let left = |t: craton_core::TimelineId| db.wal.partition_point(|r| r.timeline <= t);
            let end = s.timeline.map_or(db.flushed, left).min(db.flushed);
            if s.sent < end {
                let (from, records) = (s.sent, db.wal[s.sent..end].to_vec());
                out.push((s.conn, WalMsg::Data { from, records }));
                s.sent = end;
            }
            if end < db.flushed {
                ended.push(s.conn);
                out.push((s.conn, WalMsg::TimelineEnd));
            }
        }
        pg.senders.retain(|s| !ended.contains(&s.conn));
        for (conn, msg) in out {
            self.conn_send(conn, false, msg);
        }
    }

    /// Puts a message into a connection.
    pub fn conn_send(&mut self, conn: u64, up: bool, msg: WalMsg) {
        let delay = self.latency();
        let now = self.now;
        let Some(c) = self.conns.get_mut(&conn) else {
            return;
        };
        let (m, run) = if up { c.up } else { c.down };
        if run == CLOSED {
            return;
        }
        let lag = if up { 0 } else { self.net.wal_lag[m] };
        let queue = if up { &mut c.to_up } else { &mut c.to_down };
        let ready = queue.back().map_or(0, |(t, _)| *t).max(now + delay + lag);
        queue.push_back((ready, msg));
        self.at(ready, Event::Pump { m, conn, up });
    }

    /// Delivers what has arrived, in order. A cut link holds it up; TCP sends again.
    pub fn pump(&mut self, m: usize, conn: u64, up: bool) {
        let now = self.now;
        let Some(c) = self.conns.get_mut(&conn) else {
            return;
        };
        let (from, to) = if up {
            (c.down.0, c.up.0)
        } else {
            (c.up.0, c.down.0)
        };
        let queue = if up { &mut c.to_up } else { &mut c.to_down };
        let Some((ready, _)) = queue.front() else {
            return;
        };
        if *ready > now || self.net.cut[from][to] {
            let again = (*ready).max(now + 50 * MS);
            return self.at(again, Event::Pump { m, conn, up });
        }
        let Some((_, msg)) = queue.pop_front() else {
            return;
        };
        if up {
            self.at_upstream(conn, &msg);
        } else if m < self.members.len() {
            self.at_standby(conn, msg);
        } else if let Some(run) = self.conns.get(&conn).map(|c| c.down.1) {
            self.at_backup(conn, m, run, msg);
        }
    }

    fn at_upstream(&mut self, conn: u64, msg: &WalMsg) {
        let Some(c) = self.conns.get(&conn) else {
            return;
        };
        let (m, run) = c.up;
        let now = self.now;
        if self.pg(m, run).is_none() {
            return;
        }
        match msg {
            WalMsg::Start {
                from,
                timeline,
                incarnation,
            } => self.accept(conn, *from, *timeline, *incarnation),
            WalMsg::Ack(flush) => {
                let name = |i: usize| self.name(i);
                let Some(pg) = &self.members[m].pg else {
                    return;
                };
                let mut pg = pg.clone();
                for s in pg.senders.iter_mut().filter(|s| s.conn == conn) {
                    s.flush = s.flush.max(*flush);
                    s.heard = now;
                }
                let released = pg.released_by(conn, name);
                let primary = pg.primary;
                self.members[m].pg = Some(pg);
                if let Some(upto) = released.filter(|_| primary) {
                    self.release(m, upto);
                }
            }
            _ => {}
        }
    }

    fn accept(
        &mut self,
        conn: u64,
        from: usize,
        timeline: craton_core::TimelineId,
        incarnation: craton_core::Incarnation,
    ) {
        let Some(c) = self.conns.get(&conn) else {
            return;
        };
        let ((m, run), (standby, standby_run)) = (c.up, c.down);
        let (now, is_backup) = (self.now, self.backup(standby).is_some());
        let serves = self.members[m]
            .data
            .database()
            .is_some_and(|d| d.can_serve(timeline, from));
        let Some(pg) = self.pg(m, run) else { return };
        // The slot of a member belongs to one connection at a time.
        let slot_free = pg.senders.iter().all(|s| s.member != standby);
        if !serves || !slot_free || !pg.ready || pg.stopping {
            return self.conn_send(conn, false, WalMsg::Refuse);
        }
        let config = pg.configured.clone();
        pg.senders.push(Sender {
            conn,
            member: standby,
            incarnation,
            timeline: is_backup.then_some(timeline),
            sent: from,
            flush: 0,
            config,
            heard: now,
        });
        if is_backup {
            self.compare_with_backup(m, standby);
        } else {
            self.compare_with_standby(m, (standby, standby_run), timeline, from);
        }
        self.conn_send(conn, false, WalMsg::Accept);
        self.push(m);
        self.wake(m);
    }

    /// All that a backup holds along its upstream's history is what the upstream has.
    pub fn compare_with_backup(&mut self, m: usize, h: usize) {
        let (Some(b), Some(db)) = (self.backup(h), self.members[m].data.database()) else {
            return;
        };
        if !b.repository.agrees(&db.wal, db.flushed) {
            let (a, b) = (self.name(m), self.name(h));
            self.check.broken(format!(
                "{b} streams from {a} as if healthy, but its WAL is another"
            ));
        }
    }

    /// A standby's WAL is the beginning of its upstream's.
    fn compare_with_standby(
        &mut self,
        m: usize,
        (standby, standby_run): (usize, u64),
        timeline: craton_core::TimelineId,
        from: usize,
    ) {
        // A request that arrives after its sender has ended speaks of a data directory that may be another now.
        let asks_still = self.pg(standby, standby_run).is_some();
        let theirs = self.members[standby].data.database();
        let ours = self.members[m].data.database();
        if let (Some(a), Some(b)) = (ours, theirs)
            && asks_still
            && b.wal.len() >= from
            && a.wal.get(..from) != b.wal.get(..from)
        {
            let (a, b) = (self.name(m), self.name(standby));
            self.check.broken(format!(
                "{b} streams from {a} as if healthy, but its WAL is another (timeline {timeline}, record {from})"
            ));
        }
    }

    fn at_standby(&mut self, conn: u64, msg: WalMsg) {
        let Some(c) = self.conns.get(&conn) else {
            return;
        };
        let (m, run) = c.down;
        let now = self.now;
        let Some(pg) = self.pg(m, run) else { return };
        let Some(r) = pg.receiver.as_mut().filter(|r| r.conn == conn) else {
            return;
        };
        r.heard = now;
        match msg {
            WalMsg::Accept => {
                r.streaming = true;
                let flushed = self.members[m].data.database().map_or(0, |d| d.flushed);
                self.conn_send(conn, true, WalMsg::Ack(flushed));
                self.wake(m);
            }
            WalMsg::Refuse => {
                pg.receiver = None;
                pg.receiver_retry_at = now + RETRY;
                self.conns.remove(&conn);
            }
            // "could not write to file": PANIC, and the server ends.
            WalMsg::Data { .. } if self.members[m].disk_full => self.pg_exit(m, false),
            WalMsg::Data { from, records } => {
                let Some(db) = self.members[m].data.database_mut() else {
                    return;
                };
                if from != db.wal.len() {
                    return;
                }
                db.wal.extend_from_slice(&records);
                let upto = db.wal.len();
                let delay = self.disk(m);
                self.after(delay, Event::Flushed { m, run, upto });
            }
            WalMsg::Keepalive => {
                let flushed = self.members[m].data.database().map_or(0, |d| d.flushed);
                self.conn_send(conn, true, WalMsg::Ack(flushed));
            }
            _ => {}
        }
    }

    /// The standby's receiver ends; what it has received is flushed.
    pub fn drop_receiver(&mut self, m: usize) {
        let Some(pg) = &mut self.members[m].pg else {
            return;
        };
        if let Some(r) = pg.receiver.take() {
            pg.receiver_retry_at = self.now + 10 * MS;
            self.flush_now(m);
            // Acknowledgements under way still arrive.
            if let Some(c) = self.conns.get_mut(&r.conn) {
                c.down.1 = CLOSED;
            }
        }
    }

    /// Housekeeping: timeouts, a new receiver, keep-alives, checkpoints.
    pub fn pg_tick(&mut self, m: usize, run: u64) {
        let now = self.now;
        // A standby that lags is slow, not silent.
        let lag = self.net.wal_lag.clone();
        let conns = std::mem::take(&mut self.conns);
        let Some(pg) = self.pg(m, run) else {
            self.conns = conns;
            return;
        };
        let sends = |conn: u64| {
            conns
                .get(&conn)
                .is_some_and(|c| c.down.1 != CLOSED || !c.to_up.is_empty())
        };
        let hears = |conn: u64| {
            conns
                .get(&conn)
                .is_some_and(|c| c.up.1 != CLOSED || !c.to_down.is_empty())
        };
        pg.senders.retain(|s| {
            sends(s.conn) && now.saturating_sub(s.heard) < SILENCE_MAX + 2 * lag[s.member]
        });
        let senders: Vec<u64> = pg.senders.iter().map(|s| s.conn).collect();
        let lost = pg.receiver.as_ref().is_some_and(|r| {
            !hears(r.conn) || now.saturating_sub(r.heard) > SILENCE_MAX + 2 * lag[m]
        });
        self.conns = conns;
        let Some(pg) = self.pg(m, run) else { return };
        let standby = pg.ready && !pg.primary && !pg.maybe_primary;
        if lost {
            self.drop_receiver(m);
            self.wake(m);
        }
        for conn in senders {
            self.conn_send(conn, false, WalMsg::Keepalive);
        }
        if standby {
            self.start_receiver(m);
        }
        if self.rng.chance(5)
            && let Some(db) = self.members[m].data.database_mut()
        {
            db.checkpoint = db.timeline();
        }
        self.after(PG_TICK, Event::PgTick { m, run });
    }

    fn start_receiver(&mut self, m: usize) {
        let now = self.now;
        let Some(pg) = &self.members[m].pg else {
            return;
        };
        let due = pg.receiver.is_none() && pg.exact && now >= pg.receiver_retry_at && !pg.stopping;
        let Some(up) = pg.upstream.filter(|u| due && *u != m) else {
            return;
        };
        let (run, incarnation) = (pg.run, pg.incarnation);
        let target = &self.members[up];
        let open = !self.net.cut[m][up] && !self.net.cut[up][m];
        let up_run = target.pg.as_ref().filter(|p| p.ready && open && target.up);
        let Some(up_run) = up_run.map(|p| p.run) else {
            if let Some(pg) = &mut self.members[m].pg {
                pg.receiver_retry_at = now + RETRY;
            }
            return;
        };
        let Some(db) = self.members[m].data.database() else {
            return;
        };
        // Streaming restarts where the WAL here ends; the timeline is that of its last record.
        let (from, timeline) = (
            db.wal.len(),
            db.wal.last().map_or(db.checkpoint, |r| r.timeline),
        );
        let conn = self.id();
        self.conns.insert(
            conn,
            Conn {
                up: (up, up_run),
                down: (m, run),
                to_up: std::collections::VecDeque::new(),
                to_down: std::collections::VecDeque::new(),
            },
        );
        if let Some(pg) = &mut self.members[m].pg {
            pg.receiver = Some(Receiver {
                conn,
                streaming: false,
                heard: now,
            });
        }
        self.conn_send(
            conn,
            true,
            WalMsg::Start {
                from,
                timeline,
                incarnation,
            },
        );
    }

    /// Writes the sync set into the configuration; every process reads it in its own time.
    pub fn configure_sync(&mut self, m: usize, set: SyncSet) {
        let Some(pg) = &mut self.members[m].pg else {
            return;
        };
        pg.configured = set;
        let run = pg.run;
        let mut who: Vec<Option<u64>> = pg.senders.iter().map(|s| Some(s.conn)).collect();
        who.push(None);
        for conn in who {
            let slow = self.rng.chance(10);
            let delay = self
                .rng
                .between(100 * US, if slow { 1500 * MS } else { 20 * MS });
            self.after(delay, Event::Reread { m, run, conn });
        }
    }

    /// One process reads the configuration again.
    pub fn pg_reread(&mut self, m: usize, run: u64, conn: Option<u64>) {
        let Some(pg) = self.pg(m, run) else { return };
        let set = pg.configured.clone();
        if let Some(conn) = conn {
            for s in pg.senders.iter_mut().filter(|s| s.conn == conn) {
                s.config = set.clone();
            }
            let name = |i: usize| self.name(i);
            let Some(pg) = &self.members[m].pg else {
                return;
            };
            let released = pg.released_by(conn, name).filter(|_| pg.primary);
            if let Some(upto) = released {
                self.release(m, upto);
            }
        } else {
            pg.defined = set.k > 0;
            if !pg.defined && pg.primary {
                // The checkpointer wakes everybody who waits.
                self.release(m, usize::MAX - 1);
            }
        }
    }

    /// A client commits a write on a member, if that is a primary.
    pub fn write(&mut self, m: usize) -> bool {
        let member = &self.members[m];
        let Some(pg) = &member.pg else { return false };
        let open = pg.ready && pg.primary && !pg.closed && !pg.stopping;
        let open = open && member.up && !member.frozen;
        let run = pg.run;
        if open && member.disk_full {
            self.pg_exit(m, false);
            return false;
        }
        if open {
            let upto = self.append(m, Kind::Commit);
            let delay = self.disk(m);
            self.after(delay, Event::Flushed { m, run, upto });
        }
        open
    }

    /// A client's turn: most go where a proxy sends them, some to any primary they find.
    pub fn client(&mut self) {
        let pause = self.rng.between(5 * MS, 40 * MS);
        self.after(pause, Event::Client);
        let n = self.members.len();
        let asked = self.rng.below(n);
        if self.rng.chance(70) {
            let leader = self.members[asked].agent.as_ref().and_then(|a| {
                let view = a.obs.view.as_ref()?;
                let l = &view.leadership.as_ref()?.value;
                let held = view
                    .request
                    .as_ref()
                    .is_some_and(|r| r.value.phase == craton_core::records::RequestPhase::Hold);
                let leader = l.leader.as_ref().filter(|_| l.open && !held)?;
                self.number(&leader.member)
            });
            if let Some(m) = leader {
                self.write(m);
            }
        } else {
            self.write(asked);
        }
    }

    /// A clean shutdown begins. It goes on by itself, whatever becomes of the agent.
    pub fn shut_down(&mut self, m: usize) {
        let now = self.now;
        let Some(pg) = &mut self.members[m].pg else {
            return;
        };
        // Clients that wait for standbys are cut off, unanswered.
        pg.stopping = true;
        pg.waiting.clear();
        pg.stop_by = now + STOP_MAX;
        let (run, primary) = (pg.run, pg.primary);
        if primary {
            self.append(m, Kind::Other);
            self.flush_now(m);
        }
        self.after(5 * MS, Event::Stopping { m, run });
    }

    /// Gone once every standby has all WAL, or the wait for them is over.
    pub fn pg_stopping(&mut self, m: usize, run: u64) {
        let now = self.now;
        let flushed = self.members[m].data.database().map_or(0, |d| d.flushed);
        let Some(pg) = self.pg(m, run) else { return };
        let sent = !pg.primary || pg.senders.iter().all(|s| s.flush >= flushed);
        if !sent && now < pg.stop_by {
            return self.after(5 * MS, Event::Stopping { m, run });
        }
        if let Some(db) = self.members[m].data.database_mut() {
            db.checkpoint = db.timeline();
        }
        self.pg_exit(m, false);
    }

    /// The fence: past its deadline nothing that may be a primary lives.
    pub fn fence(&mut self, m: usize) {
        let now = self.clock(m);
        let member = &self.members[m];
        let maybe = member.pg.as_ref().is_some_and(|p| p.maybe_primary);
        let late = member.fence.is_none_or(|deadline| deadline <= now);
        let absent = self.options.lying_clocks || self.options.flaw == Some(Flaw::NoFence);
        if maybe && late && !absent {
            self.log(|w| format!("{} fence kills postgres", w.name(m)));
            self.pg_exit(m, false);
        }
    }
}
