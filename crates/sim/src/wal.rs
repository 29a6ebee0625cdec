//! WAL as a sequence of records, and the data directory that holds it.
//!
//! Every record has the same length, so a position is a count of records: position n lies behind the n-th.
//! A record has an identity; two members hold the same WAL exactly when the identities are the same.

use craton_core::{Lsn, TimelineId};

/// Bytes of a record: positions look like PostgreSQL's.
pub const RECORD_BYTES: u64 = 64;

/// What a record is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The commit of a client's write.
    Commit,
    /// A checkpoint, the end of recovery, a role: nothing that a client waits for.
    Other,
}

/// One record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rec {
    /// Its identity.
    pub id: u64,
    /// The timeline it was written on.
    pub timeline: TimelineId,
    /// What it is.
    pub kind: Kind,
}

/// The LSN behind the first `records` records.
pub fn lsn(records: usize) -> Lsn {
    Lsn(records as u64 * RECORD_BYTES)
}

/// How many records lie before an LSN.
pub fn records(at: Lsn) -> usize {
    usize::try_from(at.0 / RECORD_BYTES).unwrap_or(usize::MAX)
}

/// A data directory with a database in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Database {
    /// PostgreSQL's system identifier.
    pub system_id: u64,
    /// All WAL that was written.
    pub wal: Vec<Rec>,
    /// How much of it survives the loss of the host.
    pub flushed: usize,
    /// The timeline of the last checkpoint (`pg_control`): it may lag behind the WAL's.
    pub checkpoint: TimelineId,
}

impl Database {
    /// The timeline of the end of the flushed WAL.
    pub fn timeline(&self) -> TimelineId {
        self.wal
            .get(..self.flushed)
            .and_then(<[Rec]>::last)
            .map_or(self.checkpoint, |r| r.timeline)
    }

    /// The end of the flushed WAL.
    pub fn end(&self) -> Lsn {
        lsn(self.flushed)
    }

    /// What a WAL sender checks when it is asked to stream `timeline` from `from` on: the timeline is part of
    /// this server's history, it had not been left before `from`, and that much is flushed here. PostgreSQL
    /// compares numbers only, never contents.
    pub fn can_serve(&self, timeline: TimelineId, from: usize) -> bool {
        let left = self.wal.iter().position(|r| r.timeline > timeline);
        let known = self.wal.iter().any(|r| r.timeline == timeline);
        known && from <= self.flushed && left.is_none_or(|at| from <= at)
    }
}

/// A data directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Data {
    /// Nothing, or what a clone or a rewind that broke off has left.
    Empty,
    /// A database.
    Present(Database),
}

impl Data {
    /// The database, if there is one.
    pub fn database(&self) -> Option<&Database> {
        match self {
            Self::Empty => None,
            Self::Present(d) => Some(d),
        }
    }

    /// The database, to change it.
    pub fn database_mut(&mut self) -> Option<&mut Database> {
        match self {
            Self::Empty => None,
            Self::Present(d) => Some(d),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wal(timelines: &[u32]) -> Database {
        let wal: Vec<Rec> = timelines
            .iter()
            .enumerate()
            .map(|(i, t)| Rec {
                id: i as u64,
                timeline: TimelineId(*t),
                kind: Kind::Other,
            })
            .collect();
        Database {
            system_id: 1,
            flushed: wal.len(),
            wal,
            checkpoint: TimelineId(1),
        }
    }

    #[test]
    fn a_sender_serves_its_own_history_only() {
        let d = wal(&[1, 1, 3, 3]);
        assert!(d.can_serve(TimelineId(1), 2), "up to the switch");
        assert!(!d.can_serve(TimelineId(1), 3), "beyond the switch");
        assert!(!d.can_serve(TimelineId(2), 1), "not its history");
        assert!(d.can_serve(TimelineId(3), 4));
        assert!(!d.can_serve(TimelineId(3), 5), "not flushed here");
    }

    #[test]
    fn positions() {
        assert!(lsn(17) > lsn(16));
        assert_eq!(wal(&[1, 2]).timeline(), TimelineId(2));
    }
}
