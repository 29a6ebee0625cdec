//! What a backup daemon does that counts as a copy: reports, follows the leader, receives, seals.
//!
//! Its rules are the product's: [`craton_core::receiver::Standing`] says from whom it may receive and when it is
//! sealed, [`craton_repo::continuity`] where it goes on, [`craton_repo::wal_end`] where its WAL ends.

use craton_core::receiver::{Known, ReceiverStatus, SealRequest, Standing};
use craton_core::records::Seal;
use craton_core::{Incarnation, Term, TimelineId};

use crate::backup::{Backup, Daemon, Note, Stream, history_of, timeline_at};
use crate::event::{Chore, Event, Msg};
use crate::flaw::Flaw;
use crate::postgres::{Conn, WalMsg};
use crate::replication::CLOSED;
use crate::wal::{Rec, lsn};
use crate::world::{MS, SECOND, World};

/// How often it looks after itself.
const TICK: u64 = 40 * MS;
/// A server that says nothing for so long is gone.
const SILENCE_MAX: u64 = 10 * SECOND;
/// Between two attempts to connect.
const RETRY: u64 = 200 * MS;
/// Between two reports: while there is no answer, and afterwards.
const REPORT_RETRY: u64 = SECOND;
const REPORT_INTERVAL: u64 = 10 * SECOND;

impl World {
    /// The backup on that host.
    pub fn backup(&self, h: usize) -> Option<&Backup> {
        self.backups.get(h.checked_sub(self.members.len())?)
    }

    pub(crate) fn backup_mut(&mut self, h: usize) -> Option<&mut Backup> {
        let n = self.members.len();
        self.backups.get_mut(h.checked_sub(n)?)
    }

    /// The process of that run, if it still lives.
    fn daemon(&mut self, h: usize, run: u64) -> Option<&mut Daemon> {
        let daemon = self.backup_mut(h)?.daemon.as_mut();
        daemon.filter(|d| d.run == run)
    }

    /// The daemon starts with what it has noted.
    pub fn backup_start(&mut self, h: usize) {
        let run = self.id();
        let Some(b) = self.backup_mut(h).filter(|b| b.up && b.daemon.is_none()) else {
            return;
        };
        let noted = b.noted.map(|(life, floor)| Standing::new(life, floor));
        b.daemon = Some(Daemon {
            run,
            standing: noted,
            reported: None,
            report_at: 0,
            topology: None,
            noting: None,
            asked: std::collections::VecDeque::new(),
            sealing: Vec::new(),
            stream: None,
            retry_at: 0,
        });
        self.log(|w| format!("{} starts", w.name(h)));
        let chore = Chore::Tick;
        self.after(MS, Event::Backup { h, run, chore });
    }

    /// The process is gone; with the host, what was not flushed may be.
    pub fn backup_exit(&mut self, h: usize, host_lost: bool) {
        let coin = self.rng.chance(50);
        let luck = self.rng.next();
        let Some(b) = self.backup_mut(h) else { return };
        let Some(daemon) = b.daemon.take() else {
            return;
        };
        // What was being noted may be on disk or not.
        if let Some((_, note)) = daemon.noting.filter(|_| coin) {
            let standing = daemon.standing.as_ref().map(Standing::incarnation);
            b.noted = noted_by(&note, standing).or(b.noted);
        }
        if host_lost {
            let share =
                |unflushed: usize| usize::try_from(luck % (unflushed as u64 + 1)).unwrap_or(0);
            b.repository.crash(share);
        }
        self.close(h, daemon.run);
        self.log(|w| format!("{} is gone", w.name(h)));
    }

    /// The host loses power.
    pub fn crash_backup(&mut self, h: usize) {
        self.backup_exit(h, true);
        if let Some(b) = self.backup_mut(h) {
            b.up = false;
            b.frozen = false;
            b.held.clear();
        }
    }

    /// This side of its connections; what is under way still arrives.
    fn close(&mut self, h: usize, run: u64) {
        for c in self.conns.values_mut().filter(|c| c.down == (h, run)) {
            c.down.1 = CLOSED;
        }
        self.conns
            .retain(|_, c| c.up.1 != CLOSED || c.down.1 != CLOSED);
    }

    /// One of the things that the daemon does.
    pub fn backup_works(&mut self, h: usize, run: u64, chore: Chore) {
        if self.daemon(h, run).is_none() {
            return;
        }
        match chore {
            Chore::Tick => {
                self.backup_looks(h, run);
                let chore = Chore::Tick;
                self.after(TICK, Event::Backup { h, run, chore });
            }
            Chore::Look => self.backup_looks(h, run),
            Chore::Noted(id) => self.backup_noted(h, run, id),
            Chore::Flushed { conn, upto } => self.backup_flushed(h, run, conn, upto),
            Chore::Answer { to, request } => self.backup_answers(h, run, to, request),
        }
    }

    fn backup_looks(&mut self, h: usize, run: u64) {
        self.backup_leaves(h, run);
        self.backup_notes_next(h, run);
        self.backup_seals(h, run);
        self.backup_reports(h, run);
        self.backup_follows(h, run);
    }

    /// Looks after itself once more, soon.
    fn rouse(&mut self, h: usize, run: u64) {
        let delay = self.rng.between(MS / 10, 3 * MS);
        let chore = Chore::Look;
        self.after(delay, Event::Backup { h, run, chore });
    }

    /// Ends a connection that may not or cannot go on: sealed for a later term, another leader, silence.
    fn backup_leaves(&mut self, h: usize, run: u64) {
        let (now, keeps) = (
            self.now,
            self.options.flaw == Some(Flaw::ReceiverKeepsReceiving),
        );
        let conns = std::mem::take(&mut self.conns);
        let ends = self.daemon(h, run).and_then(|d| {
            let (stream, standing) = (d.stream.as_ref()?, d.standing.as_ref()?);
            let superseded = standing.floor() > stream.term && !keeps;
            let leader = d.topology.and_then(|(.., leader)| leader);
            let other = leader.is_some_and(|l| l != stream.leader);
            let dead = conns
                .get(&stream.conn)
                .is_none_or(|c| c.up.1 == CLOSED && c.to_down.is_empty());
            let lost = dead || now.saturating_sub(stream.heard) > SILENCE_MAX;
            (superseded || other || lost).then_some(superseded)
        });
        self.conns = conns;
        if let Some(superseded) = ends {
            // Of a leader that has changed everything that came is flushed and reported.
            if !superseded && let Some(b) = self.backup_mut(h) {
                b.repository.sync();
            }
            self.detach(h, run);
        }
    }

    fn detach(&mut self, h: usize, run: u64) {
        let retry_at = self.now + RETRY / 2;
        let Some(d) = self.daemon(h, run) else { return };
        d.retry_at = retry_at;
        if let Some(standing) = d.standing.as_mut() {
            standing.left();
        }
        if d.stream.take().is_some() {
            self.close(h, run);
            self.rouse(h, run);
        }
    }

    // --- notes

    fn note(&mut self, h: usize, run: u64, note: Note) {
        let (id, delay) = (self.id(), self.backup_disk(h));
        if let Some(d) = self.daemon(h, run) {
            d.noting = Some((id, note));
            let chore = Chore::Noted(id);
            self.after(delay, Event::Backup { h, run, chore });
        }
    }

    fn backup_disk(&mut self, h: usize) -> u64 {
        let factor = self.backup(h).map_or(1, |b| b.disk_factor);
        self.rng.between(MS / 10, 3 * MS) * factor
    }

    /// One note at a time: the next seal that was asked for.
    fn backup_notes_next(&mut self, h: usize, run: u64) {
        let Some(d) = self.daemon(h, run).filter(|d| d.noting.is_none()) else {
            return;
        };
        let Some((to, request)) = d.asked.pop_front() else {
            return;
        };
        let begun = d.standing.clone().map(|mut s| s.begin_seal(&request));
        if begun == Some(Ok(())) {
            self.note(h, run, Note::Seal(to, request));
        }
    }

    fn backup_noted(&mut self, h: usize, run: u64, id: u64) {
        let Some(b) = self.backup_mut(h) else { return };
        let Some(d) = b.daemon.as_mut().filter(|d| d.run == run) else {
            return;
        };
        let Some((_, note)) = d.noting.take_if(|(n, _)| *n == id) else {
            return;
        };
        let standing = d.standing.as_ref().map(Standing::incarnation);
        b.noted = noted_by(&note, standing).or(b.noted);
        match note {
            Note::Born(incarnation, floor) => {
                d.standing = Some(Standing::new(incarnation, floor));
            }
            Note::Follow(term, leader) => {
                let may = d.standing.as_mut().is_some_and(|s| s.follow(term));
                if may {
                    self.attach(h, run, term, leader);
                }
            }
            Note::Seal(to, request) => {
                let begun = d.standing.as_mut().map(|s| s.begin_seal(&request));
                if begun == Some(Ok(())) {
                    d.sealing.push((to, request));
                }
            }
        }
        self.rouse(h, run);
    }

    // --- seals

    /// An agent asks for a seal.
    fn backup_asked(&mut self, h: usize, from: usize, request: SealRequest) {
        let Some(d) = self.backup_mut(h).and_then(|b| b.daemon.as_mut()) else {
            return;
        };
        let run = d.run;
        d.asked.push_back((from, request));
        self.rouse(h, run);
    }

    /// Those that are noted are answered once the connection is gone, and the WAL has been read.
    fn backup_seals(&mut self, h: usize, run: u64) {
        let keeps = self.options.flaw == Some(Flaw::ReceiverKeepsReceiving);
        let Some(d) = self.daemon(h, run) else { return };
        let Some(standing) = d.standing.clone() else {
            return;
        };
        let (ready, later): (Vec<_>, Vec<_>) = std::mem::take(&mut d.sealing)
            .into_iter()
            .filter(|(_, r)| standing.floor() == r.term)
            .partition(|(_, r)| standing.is_sealed(r.term) || keeps);
        d.sealing = later;
        for (to, request) in ready {
            let delay = self.backup_disk(h);
            let chore = Chore::Answer { to, request };
            self.after(delay, Event::Backup { h, run, chore });
        }
    }

    fn backup_answers(&mut self, h: usize, run: u64, to: usize, request: SealRequest) {
        let Some(b) = self.backup_mut(h) else { return };
        b.repository.sync();
        let end = b.repository.end();
        let standing = self.daemon(h, run).and_then(|d| d.standing.as_ref());
        let lives = standing.is_some_and(|s| s.incarnation() == request.incarnation);
        let Some((timeline, lsn)) = end.filter(|_| lives) else {
            return;
        };
        let seal = Seal {
            term: request.term,
            incarnation: request.incarnation,
            timeline,
            lsn,
        };
        self.log(|w| {
            format!(
                "{} seals for term {}: {timeline} {lsn}",
                w.name(h),
                seal.term
            )
        });
        self.send(h, to, Msg::Sealed(Box::new(seal)));
    }

    // --- reports, and what agents tell

    fn backup_reports(&mut self, h: usize, run: u64) {
        let (now, fresh) = (self.now, self.id());
        let to = self.rng.below(self.members.len());
        let Some(d) = self.daemon(h, run).filter(|d| d.report_at <= now) else {
            return;
        };
        let known = d.standing.as_ref().map(Standing::incarnation);
        let incarnation = known.unwrap_or(Incarnation(fresh));
        d.report_at = now
            + if known.is_some() {
                REPORT_INTERVAL
            } else {
                REPORT_RETRY
            };
        d.reported = Some(incarnation).filter(|_| known.is_none());
        self.send(h, to, Msg::Report { incarnation });
    }

    /// A message has arrived at a backup's host.
    pub fn backup_receives(&mut self, from: usize, h: usize, msg: &Msg) {
        let Some(b) = self.backup_mut(h) else { return };
        let name = b.id.clone();
        let Some(d) = b.daemon.as_mut() else { return };
        let run = d.run;
        match *msg {
            Msg::Known { incarnation, known } => {
                let born = d.standing.is_none() && d.noting.is_none();
                if born && d.reported == Some(incarnation) {
                    d.reported = None;
                    let Known { term } = known;
                    self.note(h, run, Note::Born(incarnation, term));
                }
            }
            Msg::Look { asked_at } => {
                let streams_from = d.stream.as_ref().filter(|s| s.streaming).map(|s| s.leader);
                let Some(standing) = d.standing.clone() else {
                    return;
                };
                let end = b.repository.end();
                let (timeline, lsn) = end.unwrap_or((TimelineId(1), lsn(0)));
                let status = Box::new(ReceiverStatus {
                    name,
                    incarnation: standing.incarnation(),
                    floor: standing.floor(),
                    timeline,
                    lsn,
                    streams_from: streams_from.map(|l| self.name(l)),
                });
                self.send(h, from, Msg::Looked { asked_at, status });
            }
            Msg::AskSeal(request) => self.backup_asked(h, from, request),
            Msg::Topology {
                term,
                revision,
                leader,
            } => {
                let newest = d.topology.map_or((Term(0), 0), |(t, r, _)| (t, r));
                if (term, revision) > newest {
                    d.topology = Some((term, revision, leader));
                    self.rouse(h, run);
                }
            }
            _ => {}
        }
    }

    // --- receiving

    /// Follows whoever leads, if that may be followed.
    fn backup_follows(&mut self, h: usize, run: u64) {
        let now = self.now;
        let Some(d) = self.daemon(h, run) else { return };
        let idle = d.stream.is_none() && d.noting.is_none() && d.retry_at <= now;
        let Some((term, leader)) = d.topology.and_then(|(t, _, l)| Some((t, l?))) else {
            return;
        };
        let Some(standing) = d.standing.as_mut().filter(|_| idle) else {
            return;
        };
        let mut next = standing.clone();
        if !next.follow(term) {
            return;
        }
        if next.floor() > standing.floor() {
            return self.note(h, run, Note::Follow(term, leader));
        }
        *standing = next;
        self.attach(h, run, term, leader);
    }

    /// Connects, learns the server's history, and goes on where its own WAL ends along it.
    fn attach(&mut self, h: usize, run: u64, term: Term, leader: usize) {
        let open = !self.net.cut[h][leader] && !self.net.cut[leader][h];
        let server = &self.members[leader];
        let pg = server.pg.as_ref().filter(|p| open && server.up && p.ready);
        let db = server.data.database().filter(|d| d.flushed > 0);
        let (Some(pg), Some(db)) = (pg, db) else {
            return self.detach(h, run);
        };
        let (up_run, wal) = (pg.run, db.wal[..db.flushed].to_vec());
        let Some(history) = history_of(&wal) else {
            return self.detach(h, run);
        };
        // A slot may have kept WAL for a repository that is lost; a new one keeps it from here on.
        let kept = if self.rng.chance(50) {
            self.rng.below(wal.len() + 1)
        } else {
            wal.len()
        };
        let (now, conn) = (self.now, self.id());
        let Some(b) = self.backup_mut(h) else { return };
        if std::mem::take(&mut b.gap) && !b.repository.is_empty() {
            return self.backup_reborn(h, run);
        }
        b.repository.put_history(&history);
        let start = |at: usize| at - at % crate::backup::SEGMENT_RECORDS;
        let fresh = || (timeline_at(&history, kept), start(kept));
        let (timeline, from) = b.repository.resume(&history).unwrap_or_else(fresh);
        let Some(d) = b.daemon.as_mut() else { return };
        let Some(incarnation) = d.standing.as_ref().map(Standing::incarnation) else {
            return;
        };
        d.stream = Some(Stream {
            conn,
            leader,
            term,
            streaming: false,
            timeline,
            written: from,
            flushed: from,
            heard: now,
        });
        let conn_of = Conn {
            up: (leader, up_run),
            down: (h, run),
            to_up: std::collections::VecDeque::new(),
            to_down: std::collections::VecDeque::new(),
        };
        self.conns.insert(conn, conn_of);
        let ask = WalMsg::Start {
            from,
            timeline,
            incarnation,
        };
        self.conn_send(conn, true, ask);
    }

    /// WAL is missing in the middle, and no member has it any more: what was acknowledged until now says nothing of
    /// what is held. Another life begins, with what comes behind the gap.
    fn backup_reborn(&mut self, h: usize, run: u64) {
        self.log(|w| format!("{} lacks WAL that is gone: its life ends", w.name(h)));
        self.detach(h, run);
        let Some(b) = self.backup_mut(h) else { return };
        b.noted = None;
        b.repository = crate::backup::Repository::default();
        if let Some(d) = b.daemon.as_mut() {
            d.standing = None;
            d.report_at = 0;
            d.asked.clear();
            d.sealing.clear();
        }
    }

    /// Something has arrived from the leader.
    pub fn at_backup(&mut self, conn: u64, h: usize, run: u64, msg: WalMsg) {
        let now = self.now;
        let Some(d) = self.daemon(h, run) else { return };
        let Some(s) = d.stream.as_mut().filter(|s| s.conn == conn) else {
            return;
        };
        s.heard = now;
        let (timeline, written, flushed) = (s.timeline, s.written, s.flushed);
        match msg {
            WalMsg::Accept => {
                s.streaming = true;
                self.conn_send(conn, true, WalMsg::Ack(flushed));
            }
            WalMsg::Data { from, records } if from == written => {
                self.backup_writes(h, run, timeline, from, &records);
            }
            WalMsg::Keepalive => self.conn_send(conn, true, WalMsg::Ack(flushed)),
            WalMsg::TimelineEnd => {
                if let Some(b) = self.backup_mut(h) {
                    b.repository.sync();
                }
                self.detach(h, run);
                if let Some(d) = self.daemon(h, run) {
                    d.retry_at = now;
                }
            }
            _ => {
                self.conns.remove(&conn);
                self.detach(h, run);
            }
        }
    }

    fn backup_writes(
        &mut self,
        h: usize,
        run: u64,
        timeline: TimelineId,
        from: usize,
        wal: &[Rec],
    ) {
        let delay = self.backup_disk(h);
        let Some(b) = self.backup_mut(h) else { return };
        let same = b.repository.put(timeline, from, wal);
        let upto = from + wal.len();
        let Some(s) = b.daemon.as_mut().and_then(|d| d.stream.as_mut()) else {
            return;
        };
        let conn = s.conn;
        s.written = upto;
        if !same {
            let name = self.name(h);
            self.check.broken(format!(
                "{name} was sent other WAL of timeline {timeline} behind record {from} than it holds"
            ));
        }
        if self.options.flaw == Some(Flaw::ReceiverReportsWritten) {
            self.conn_send(conn, true, WalMsg::Ack(upto));
        }
        let chore = Chore::Flushed { conn, upto };
        self.after(delay, Event::Backup { h, run, chore });
    }

    /// The disk has flushed what was written up to here: that is reported.
    fn backup_flushed(&mut self, h: usize, run: u64, conn: u64, upto: usize) {
        let Some(b) = self.backup_mut(h) else { return };
        let stream = b.daemon.as_mut().filter(|d| d.run == run);
        let stream = stream.and_then(|d| d.stream.as_mut());
        let Some(s) = stream.filter(|s| s.conn == conn) else {
            return;
        };
        s.flushed = s.flushed.max(upto);
        b.repository.sync();
        self.conn_send(conn, true, WalMsg::Ack(upto));
    }
}

/// What a note leaves on disk: the life and its floor.
fn noted_by(note: &Note, life: Option<Incarnation>) -> Option<(Incarnation, Term)> {
    match note {
        Note::Born(incarnation, floor) => Some((*incarnation, *floor)),
        Note::Follow(term, _) => Some((life?, *term)),
        Note::Seal(_, request) => Some((life?, request.term)),
    }
}
