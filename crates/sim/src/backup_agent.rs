//! What agents do with backup daemons: put them on record, look at them, ask for seals, get WAL from them.

use craton_core::decide::AskSeal;
use craton_core::receiver::{Known, Report, on_record, seen, seen_sealed};
use craton_core::records::Seal;
use craton_core::{Incarnation, Lsn, MemberId, Term, TimelineId};

use crate::event::{Event, Msg};
use crate::flaw::Flaw;
use crate::member::Running;
use crate::tasks::{LOOK, Step};
use crate::wal::Database;
use crate::world::{MS, SECOND, World};

/// How long a seal is waited for before it is asked for again.
const SEAL_MAX: u64 = 2 * SECOND;

impl World {
    /// The host of the backup of that name.
    pub fn backup_host(&self, name: &MemberId) -> Option<usize> {
        let i = self.backups.iter().position(|b| b.id == *name)?;
        Some(self.members.len() + i)
    }

    fn backup_hosts(&self) -> std::ops::Range<usize> {
        self.members.len()..self.hosts()
    }

    /// The agent looks at those on record.
    pub fn look_at_backups(&mut self, m: usize, life: u64) {
        let asked_at = self.clock(m);
        let Some(agent) = self.agent(m, life) else {
            return;
        };
        let on_record: Vec<MemberId> = agent
            .obs
            .view
            .iter()
            .flat_map(|v| v.receivers.keys().cloned())
            .collect();
        agent
            .obs
            .receivers
            .retain(|name, _| on_record.contains(name));
        for name in on_record {
            if let Some(h) = self.backup_host(&name) {
                self.send(m, h, Msg::Look { asked_at });
            }
        }
    }

    /// The agent tells the backups who leads.
    pub fn tell_backups(&mut self, m: usize) {
        let view = self.members[m].agent.as_ref();
        let Some(view) = view.and_then(|a| a.obs.view.as_ref()) else {
            return;
        };
        let Some(l) = view.leadership.as_ref().map(|l| &l.value) else {
            return;
        };
        let leader = l.leader.as_ref().filter(|_| l.open);
        let (term, revision) = (l.term, view.revision);
        let leader = leader.and_then(|r| self.number(&r.member));
        for h in self.backup_hosts() {
            let told = Msg::Topology {
                term,
                revision,
                leader,
            };
            self.send(m, h, told);
        }
    }

    /// Asks for seals, unless that is being done.
    pub fn ask_seals(&mut self, m: usize, life: u64, asks: Vec<AskSeal>) {
        let now = self.now;
        for ask in asks {
            let Some(agent) = self.agent(m, life) else {
                return;
            };
            let key = (ask.receiver.clone(), ask.term);
            if agent.asking.get(&key).is_some_and(|until| *until > now) {
                continue;
            }
            agent.asking.insert(key, now + SEAL_MAX);
            if let Some(h) = self.backup_host(&ask.receiver) {
                let request = craton_core::receiver::SealRequest {
                    term: ask.term,
                    incarnation: ask.record.incarnation,
                };
                self.send(m, h, Msg::AskSeal(request));
            }
        }
    }

    /// A backup reports, or answers.
    pub fn hear_backup(&mut self, m: usize, h: usize, msg: Msg) {
        let (now, name) = (self.clock(m), self.name(h));
        let reaches = self.has_majority(m);
        let view = self.store.view();
        let Some(agent) = &mut self.members[m].agent else {
            return;
        };
        let life = agent.life;
        match msg {
            Msg::Report { incarnation } => {
                // Read linearizably, and written a moment later.
                let term = view.leadership.as_ref().map(|l| l.value.term);
                if let Some(term) = term.filter(|_| reaches) {
                    let delay = self.latency() + self.latency();
                    let event = Event::OnRecord {
                        m,
                        life,
                        h,
                        incarnation,
                        term,
                    };
                    self.after(delay, event);
                }
            }
            Msg::Looked { asked_at, status } => {
                let former = agent.obs.receivers.remove(&name);
                let view = seen(asked_at, &status, former);
                agent.obs.receivers.insert(name, view);
            }
            Msg::Sealed(seal) => {
                let key = (name.clone(), seal.term);
                if agent.asking.remove(&key).is_none() {
                    return;
                }
                let view = seen_sealed(now, *seal);
                agent.obs.receivers.insert(name, view);
                self.wake(m);
            }
            _ => {}
        }
    }

    /// A report is written down; the backup hears the term that was read before.
    pub fn put_on_record(&mut self, m: usize, h: usize, incarnation: Incarnation, term: Term) {
        if !self.has_majority(m) {
            return;
        }
        let name = self.name(h);
        let report = Report {
            api: format!("{name}:1"),
            name,
            incarnation,
        };
        if let Some(change) = on_record(&self.store.view(), &report)
            && self.store.apply(&change)
        {
            let view = self.store.view();
            self.check.store(&view);
            self.tell_store(&view);
        }
        let known = Known { term };
        self.send(m, h, Msg::Known { incarnation, known });
    }

    /// Gets the files that a backup has and this member lacks, while sealed; puts them beside its own WAL, starts, and
    /// seals anew. Nothing changes before all of it is here.
    pub(crate) fn catch_up_by_files(
        &mut self,
        m: usize,
        r: &Running,
        from: &MemberId,
        term: Term,
        end: (TimelineId, Lsn),
    ) -> Step {
        let sealed = self.members[m].agent.as_ref();
        let sealed = sealed.and_then(|a| a.sealed.as_ref());
        let is_sealed = sealed.is_some_and(|s| s.term == term);
        match r.stage {
            0 | FETCH if !is_sealed => Step::Failed("not sealed for that term"),
            0 | FETCH if self.members[m].floor > term => Step::Failed("sealed for a later term"),
            0 if self.options.flaw == Some(Flaw::CatchUpClaimed) => {
                self.claim(m, term, end);
                Step::Done
            }
            0 => Step::Again(FETCH, self.rng.between(10 * MS, 800 * MS)),
            FETCH => match self.fetched(m, from, end) {
                Err(why) => Step::Failed(why),
                Ok(wal) => {
                    // From here on it holds more than it said.
                    self.pg_exit(m, false);
                    if let Some(db) = self.members[m].data.database_mut() {
                        db.wal = wal;
                    }
                    self.spawn_standby(m, None);
                    Step::Again(STARTED, LOOK)
                }
            },
            STARTED => match self.until_ready(m, r) {
                Step::Done => Step::Again(1, LOOK),
                step => step,
            },
            _ => match self.seal(m, r, term) {
                Step::Done => {
                    let held = self.members[m].data.database().map(Database::end);
                    if held < Some(end.1) {
                        return Step::Failed("the WAL out of the backup does not reach that far");
                    }
                    self.from_backups += 1;
                    Step::Done
                }
                step => step,
            },
        }
    }

    fn fetched(
        &self,
        m: usize,
        from: &MemberId,
        end: (TimelineId, Lsn),
    ) -> Result<Vec<crate::wal::Rec>, &'static str> {
        let away = "the backup cannot be reached";
        let h = self.backup_host(from).ok_or(away)?;
        let cut = self.net.cut[m][h] || self.net.cut[h][m];
        let b = self.backup(h).filter(|b| !cut && b.runs()).ok_or(away)?;
        if b.daemon.is_none() || b.disk_hung {
            return Err(away);
        }
        let db = self.members[m].data.database().ok_or("no data")?;
        b.repository.continued(&db.wal[..db.flushed], end)
    }

    /// The broken rule: it says that it has what it has not.
    fn claim(&mut self, m: usize, term: Term, (timeline, lsn): (TimelineId, Lsn)) {
        let incarnation = self.members[m].incarnation.unwrap_or_default();
        if let Some(a) = &mut self.members[m].agent {
            a.sealed = Some(Seal {
                term,
                incarnation,
                timeline,
                lsn,
            });
        }
    }
}

/// The files are being fetched.
const FETCH: u8 = 21;
/// PostgreSQL starts with them.
const STARTED: u8 = 22;
