//! A backup daemon that counts as a copy: its host, its repository, its process. What it does is in
//! [`crate::backup_daemon`].

use std::collections::{BTreeMap, VecDeque};

use craton_core::receiver::{SealRequest, Standing};
use craton_core::{Incarnation, Lsn, MemberId, Term, TimelineId};
use craton_repo::continuity::{self, Held, Inventory};
use craton_repo::history::{Ancestor, History};
use craton_repo::segment::SegmentId;
use craton_repo::wal_end::{NewestEnd, newest_end};

use crate::event::Event;
use crate::wal::{RECORD_BYTES, Rec, lsn, records};

/// Records of a segment: few, so that timelines fork inside of segments and at their ends.
pub const SEGMENT_RECORDS: usize = 8;
/// The same in bytes, as the product's rules count.
const SEGMENT_BYTES: u64 = SEGMENT_RECORDS as u64 * RECORD_BYTES;

/// A host with a backup daemon.
#[derive(Clone, Debug)]
pub struct Backup {
    /// Its name in V.
    pub id: MemberId,
    /// The host runs.
    pub up: bool,
    /// The host is paused.
    pub frozen: bool,
    /// What happened to it while it was paused, or its disk hung.
    pub held: Vec<Event>,
    /// Its disk is this many times slower than usual.
    pub disk_factor: u64,
    /// Its disk answers to nothing.
    pub disk_hung: bool,
    /// The leader that it finds next has removed WAL that it lacks.
    pub gap: bool,
    /// Durable: the life of the repository and its floor.
    pub noted: Option<(Incarnation, Term)>,
    /// The WAL.
    pub repository: Repository,
    /// The process.
    pub daemon: Option<Daemon>,
}

impl Backup {
    /// An empty one.
    pub fn new(id: MemberId) -> Self {
        Self {
            id,
            up: true,
            frozen: false,
            held: Vec::new(),
            disk_factor: 1,
            disk_hung: false,
            gap: false,
            noted: None,
            repository: Repository::default(),
            daemon: None,
        }
    }

    /// The host runs and is not paused.
    pub fn runs(&self) -> bool {
        self.up && !self.frozen
    }
}

/// The daemon's memory: gone when the process is.
#[derive(Clone, Debug)]
pub struct Daemon {
    /// Tells this process from all others in the whole simulation.
    pub run: u64,
    /// None until the cluster has heard of this life.
    pub standing: Option<Standing>,
    /// A life that was reported and is not known yet.
    pub reported: Option<Incarnation>,
    /// When it reports again.
    pub report_at: u64,
    /// The greatest (term, revision) that an agent told, and who leads in it.
    pub topology: Option<(Term, u64, Option<usize>)>,
    /// What is being noted on disk, under this number.
    pub noting: Option<(u64, Note)>,
    /// Who asks for a seal, and waits until that can be noted.
    pub asked: VecDeque<(usize, SealRequest)>,
    /// Noted: answered once nothing is received any more.
    pub sealing: Vec<(usize, SealRequest)>,
    /// The connection to the leader.
    pub stream: Option<Stream>,
    /// When it is tried again.
    pub retry_at: u64,
}

/// Something to be on disk before anything rests on it.
#[derive(Clone, Debug)]
pub enum Note {
    /// A life that the cluster knows.
    Born(Incarnation, Term),
    /// The floor, before the leader of a term is followed.
    Follow(Term, usize),
    /// The floor, before a seal.
    Seal(usize, SealRequest),
}

/// A connection that brings WAL.
#[derive(Clone, Debug)]
pub struct Stream {
    /// Its number.
    pub conn: u64,
    /// Whom it comes from.
    pub leader: usize,
    /// The term that it is followed in.
    pub term: Term,
    /// The other end has agreed to stream.
    pub streaming: bool,
    /// The timeline that is streamed.
    pub timeline: TimelineId,
    /// Written up to this record.
    pub written: usize,
    /// Of that, on stable storage.
    pub flushed: usize,
    /// When the other end was last heard.
    pub heard: u64,
}

/// The records of a segment, as far as they have come.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
struct Part {
    records: Vec<Rec>,
    flushed: usize,
}

/// WAL in segments, of every timeline.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Repository {
    segments: BTreeMap<SegmentId, Part>,
    histories: BTreeMap<TimelineId, History>,
}

/// How a server's WAL came to be: where it went from one timeline to the next.
pub fn history_of(wal: &[Rec]) -> Option<History> {
    let ancestors = wal.windows(2).enumerate().filter_map(|(i, pair)| {
        let (a, b) = (pair.first()?, pair.last()?);
        (a.timeline != b.timeline).then(|| Ancestor {
            timeline: a.timeline,
            end: lsn(i + 1),
        })
    });
    Some(History {
        ancestors: ancestors.collect(),
        timeline: wal.last()?.timeline,
    })
}

/// The timeline whose segment holds this record.
pub fn timeline_at(history: &History, record: usize) -> TimelineId {
    history.timeline_of((record / SEGMENT_RECORDS) as u64, SEGMENT_BYTES)
}

fn number(segment: u64) -> usize {
    usize::try_from(segment).unwrap_or(usize::MAX)
}

impl Repository {
    /// As the product's rules look at it.
    fn inventory(&self) -> Inventory {
        let held = |(id, part): (&SegmentId, &Part)| {
            let held = if part.records.len() == SEGMENT_RECORDS {
                Held::Whole
            } else {
                let start = number(id.number) * SEGMENT_RECORDS;
                Held::Until(lsn(start + part.records.len()))
            };
            (*id, held)
        };
        self.segments.iter().map(held).collect()
    }

    /// Keeps a server's history.
    pub fn put_history(&mut self, history: &History) {
        self.histories.insert(history.timeline, history.clone());
    }

    /// Where receiving goes on along a history; none when nothing of it is held.
    pub fn resume(&self, history: &History) -> Option<(TimelineId, usize)> {
        let (timeline, at) = continuity::resume(&self.inventory(), history, SEGMENT_BYTES)?;
        Some((timeline, records(at)))
    }

    /// Writes records, the first of them behind `from`. False if others had been received there.
    pub fn put(&mut self, timeline: TimelineId, from: usize, wal: &[Rec]) -> bool {
        let mut same = true;
        for (at, rec) in (from..).zip(wal) {
            let id = SegmentId {
                timeline,
                number: (at / SEGMENT_RECORDS) as u64,
            };
            let part = self.segments.entry(id).or_default();
            let offset = at % SEGMENT_RECORDS;
            match part.records.get(offset) {
                Some(held) => same &= held == rec,
                None if offset == part.records.len() => part.records.push(*rec),
                None => same = false,
            }
            // A segment that has become whole is flushed and renamed.
            if part.records.len() == SEGMENT_RECORDS {
                part.flushed = SEGMENT_RECORDS;
            }
        }
        same
    }

    /// Everything that was written is on stable storage.
    pub fn sync(&mut self) {
        for part in self.segments.values_mut() {
            part.flushed = part.records.len();
        }
    }

    /// The host is lost; of what was not flushed `keep` says how much had reached the disk.
    pub fn crash(&mut self, mut keep: impl FnMut(usize) -> usize) {
        self.segments.retain(|_, part| {
            let unflushed = part.records.len() - part.flushed;
            if unflushed > 0 {
                part.records
                    .truncate(part.flushed + keep(unflushed).min(unflushed));
            }
            part.flushed = part.records.len();
            !part.records.is_empty()
        });
    }

    /// Where all that is held ends, as a seal says it.
    pub fn end(&self) -> Option<(TimelineId, Lsn)> {
        for id in continuity::newest_of_each(&self.inventory()) {
            let fork = self.histories.get(&id.timeline)?.ancestors.last();
            let held = self.segments.get(&id).map_or(0, |part| part.records.len());
            let end = Some(lsn(number(id.number) * SEGMENT_RECORDS + held)).filter(|_| held > 0);
            match newest_end(fork.map(|a| a.end), end) {
                NewestEnd::Here(end) => return Some((id.timeline, end)),
                NewestEnd::Before => {}
                NewestEnd::Nowhere => break,
            }
        }
        None
    }

    /// What a member that holds `own` gets up to `end`: its own WAL, and behind it what the files of the newest
    /// timelines say, from the segment on in which its own ends.
    pub fn continued(
        &self,
        own: &[Rec],
        (timeline, end): (TimelineId, Lsn),
    ) -> Result<Vec<Rec>, &'static str> {
        let Some(history) = self.histories.get(&timeline) else {
            return Err("the backup has no history of that timeline");
        };
        let last_own = own.last().map_or(TimelineId(0), |r| r.timeline);
        let mut lineage: Vec<TimelineId> = history.ancestors.iter().map(|a| a.timeline).collect();
        lineage.push(timeline);
        lineage.retain(|t| *t >= last_own);
        let first = own.len() / SEGMENT_RECORDS;
        let last = records(end).saturating_sub(1) / SEGMENT_RECORDS;
        let mut wal = own.get(..first * SEGMENT_RECORDS).unwrap_or(own).to_vec();
        for segment in first..=last {
            let id = |t: &TimelineId| SegmentId {
                timeline: *t,
                number: segment as u64,
            };
            let found = lineage.iter().rev().find_map(|t| self.segments.get(&id(t)));
            let Some(part) = found else {
                return Err("the backup has not all of the missing segments");
            };
            // Recovery ends at the first record that does not follow.
            if wal.len() == segment * SEGMENT_RECORDS {
                wal.extend_from_slice(&part.records);
            }
        }
        if wal.get(..own.len()) != Some(own) {
            return Err("the backup's first segment is not what this member has");
        }
        Ok(wal)
    }

    /// True if all that is held along the history of `wal` is what `wal` has there.
    pub fn agrees(&self, wal: &[Rec], upto: usize) -> bool {
        let Some(history) = history_of(wal) else {
            return true;
        };
        self.segments.iter().all(|(id, part)| {
            let start = number(id.number) * SEGMENT_RECORDS;
            if timeline_at(&history, start) != id.timeline {
                return true;
            }
            let end = (start + part.records.len()).min(upto).max(start);
            let held = part.records.get(..end - start);
            // Of a timeline that was left there may be more than became part of the history.
            wal.get(start..end) == held
        })
    }

    /// Nothing is held.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::Kind;

    fn wal(timelines: &[u32]) -> Vec<Rec> {
        let each = timelines.iter().enumerate().map(|(i, t)| Rec {
            id: i as u64,
            timeline: TimelineId(*t),
            kind: Kind::Commit,
        });
        each.collect()
    }

    /// Timeline 1 up to record 10, then timeline 2.
    fn forked() -> Vec<Rec> {
        wal(&[[1; 10].as_slice(), [2; 5].as_slice()].concat())
    }

    #[test]
    fn a_new_timeline_counts_once_more_of_it_has_come_than_was_held_before() {
        let (old, new) = (wal(&[1; 12]), forked());
        let (first, second) = (history_of(&old).unwrap(), history_of(&new).unwrap());
        let mut r = Repository::default();
        assert_eq!(r.end(), None);
        r.put_history(&first);
        assert!(r.put(TimelineId(1), 0, &old));
        assert_eq!(r.end(), Some((TimelineId(1), lsn(12))));
        r.put_history(&second);
        // The segment of the fork is received anew, under the new timeline.
        assert_eq!(r.resume(&second), Some((TimelineId(2), 8)));
        assert!(r.put(TimelineId(2), 8, &new[8..10]));
        assert_eq!(r.end(), Some((TimelineId(1), lsn(12))));
        assert!(r.put(TimelineId(2), 10, &new[10..]));
        assert_eq!(r.end(), Some((TimelineId(2), lsn(15))));
        assert!(r.agrees(&new, new.len()));
        assert!(!r.put(TimelineId(2), 10, &old[..1]), "other records");
    }

    #[test]
    fn a_member_gets_what_it_lacks_where_that_follows_on_what_it_has() {
        let new = forked();
        let mut r = Repository::default();
        r.put_history(&history_of(&new[..10]).unwrap());
        assert!(r.put(TimelineId(1), 0, &new[..10]));
        r.put_history(&history_of(&new).unwrap());
        assert!(r.put(TimelineId(2), 8, &new[8..]));
        let end = r.end().unwrap();
        assert_eq!(r.continued(&new[..4], end), Ok(new.clone()));
        assert_eq!(r.continued(&new[..13], end), Ok(new.clone()));
        assert!(r.continued(&wal(&[1; 12]), end).is_err(), "another branch");
        let mut late = Repository::default();
        late.put_history(&history_of(&new).unwrap());
        assert!(late.put(TimelineId(2), 8, &new[8..]));
        assert!(late.continued(&new[..4], end).is_err(), "it began later");
    }

    #[test]
    fn a_lost_host_keeps_what_was_flushed() {
        let all = wal(&[1; 12]);
        let mut r = Repository::default();
        r.put_history(&history_of(&all).unwrap());
        r.put(TimelineId(1), 0, &all[..10]);
        r.sync();
        r.put(TimelineId(1), 10, &all[10..]);
        r.crash(|unflushed| unflushed - 1);
        assert_eq!(r.end(), Some((TimelineId(1), lsn(11))));
    }
}
