//! A backup daemon as a synchronous copy: a member of V that seals and never leads (failover protocol, 3).
//!
//! It takes no part in the coordinator. An agent writes its [`ReceiverRecord`](crate::records::ReceiverRecord) when it
//! reports, and in an election the agents ask it to seal and write the answer down. What it must keep is what a
//! member keeps: below its floor it receives nothing any more, and sealing and receiving exclude each other.

use serde::{Deserialize, Serialize};

use crate::observe::ReceiverView;
use crate::records::{Change, ClusterView, Key, ReceiverRecord, Record, Seal};
use crate::types::{BootTime, Incarnation, Lsn, MemberId, Term, TimelineId};

/// The daemon reports to an agent: `POST /v1/receivers`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Its name in V; no member may have the same.
    pub name: MemberId,
    /// The present life of its repository.
    pub incarnation: Incarnation,
    /// Where its API is reached, `host:port`.
    pub api: String,
}

/// The answer: it is on record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Known {
    /// The term, read linearizably: the floor of a new life.
    pub term: Term,
}

/// What the agent writes that is reported to; none where it is on record already. Who is being taken out stays so.
pub fn on_record(view: &ClusterView, report: &Report) -> Option<Change> {
    let known = view.receivers.get(&report.name).map(|r| &r.value);
    let record = ReceiverRecord {
        api: report.api.clone(),
        incarnation: report.incarnation,
        leaving: known.is_some_and(|k| k.leaving),
    };
    let key = Key::Receiver(report.name.clone());
    (known != Some(&record)).then(|| Change {
        expect: vec![(key.clone(), view.revision_of(&key))],
        puts: vec![Record::Receiver(report.name.clone(), record)],
        deletes: vec![],
    })
}

/// What an agent knows of a receiver that answered; it was asked at `at`. A seal that it gave before stays known.
pub fn seen(at: BootTime, status: &ReceiverStatus, former: Option<ReceiverView>) -> ReceiverView {
    ReceiverView {
        heard_at: at,
        incarnation: status.incarnation,
        timeline: status.timeline,
        lsn: status.lsn,
        streams_from: status.streams_from.clone(),
        seal: former.and_then(|f| f.seal),
    }
}

/// What an agent knows of a receiver that sealed.
pub fn seen_sealed(at: BootTime, seal: Seal) -> ReceiverView {
    ReceiverView {
        heard_at: at,
        incarnation: seal.incarnation,
        timeline: seal.timeline,
        lsn: seal.lsn,
        streams_from: None,
        seal: Some(seal),
    }
}

/// What a receiver says of itself: `GET /v1/receiver`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReceiverStatus {
    /// Its name.
    pub name: MemberId,
    /// The present life of its repository.
    pub incarnation: Incarnation,
    /// Nothing below this term reaches it any more.
    pub floor: Term,
    /// The timeline received last.
    pub timeline: TimelineId,
    /// Received and flushed up to here.
    pub lsn: Lsn,
    /// Whom it streams from.
    pub streams_from: Option<MemberId>,
}

/// An agent asks for a seal: `POST /v1/receiver/seal`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SealRequest {
    /// The term of the open election.
    pub term: Term,
    /// The life that V lists.
    pub incarnation: Incarnation,
}

/// WAL is given in parts of so many bytes: `GET /v1/receiver/wal/NAME?offset=N`. A smaller one is the last.
pub const WAL_PART_MAX: usize = 4 << 20;

/// The answer: the seal.
pub type SealAnswer = Seal;

/// Where a receiver stands: which life, and from whom it may still receive.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Standing {
    incarnation: Incarnation,
    floor: Term,
    follows: Option<Term>,
}

impl Standing {
    /// As noted on disk.
    pub fn new(incarnation: Incarnation, floor: Term) -> Self {
        Self {
            incarnation,
            floor,
            follows: None,
        }
    }

    /// The present life.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Nothing below this term may reach it any more. To be on disk before anything rests on it.
    pub fn floor(&self) -> Term {
        self.floor
    }

    /// The term whose leader it receives from, or is about to.
    pub fn follows(&self) -> Option<Term> {
        self.follows
    }

    /// May it receive from the leader of `term`? If so the floor is that term, and no seal is made for one that is
    /// not above it until [`Self::left`].
    pub fn follow(&mut self, term: Term) -> bool {
        if term < self.floor {
            return false;
        }
        self.floor = term;
        self.follows = Some(term);
        true
    }

    /// It receives from nobody: the connection is gone.
    pub fn left(&mut self) {
        self.follows = None;
    }

    /// Raises the floor to the term of an election. The seal may be told once [`Self::is_sealed`].
    pub fn begin_seal(&mut self, request: &SealRequest) -> Result<(), String> {
        if request.incarnation != self.incarnation {
            return Err(format!(
                "this is the life {} of the repository, and {} was asked",
                self.incarnation, request.incarnation
            ));
        }
        if request.term < self.floor {
            return Err(format!("sealed for term {}", self.floor));
        }
        if self.follows == Some(request.term) {
            return Err(format!("term {} has a leader already", request.term));
        }
        self.floor = request.term;
        Ok(())
    }

    /// Nothing below `term` is received any more, and nothing above it yet.
    pub fn is_sealed(&self, term: Term) -> bool {
        self.floor == term && self.follows.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(term: u64) -> SealRequest {
        SealRequest {
            term: Term(term),
            incarnation: Incarnation(7),
        }
    }

    #[test]
    fn sealing_and_receiving_exclude_each_other() {
        let mut s = Standing::new(Incarnation(7), Term(2));
        assert!(!s.follow(Term(1)), "below the floor");
        assert!(s.follow(Term(2)));
        assert!(s.begin_seal(&ask(2)).is_err(), "it receives in that term");
        s.begin_seal(&ask(3)).unwrap();
        assert!(!s.is_sealed(Term(3)), "the connection is still there");
        s.left();
        assert!(s.is_sealed(Term(3)));
        assert!(!s.follow(Term(2)), "a sealed one never goes back");
        s.begin_seal(&ask(3)).unwrap();
        assert!(s.begin_seal(&ask(2)).is_err());
        assert!(s.follow(Term(3)), "the winner of that election");
        assert!(!s.is_sealed(Term(3)));
    }

    #[test]
    fn another_life_does_not_seal_for_the_one_that_was_asked() {
        let mut s = Standing::new(Incarnation(8), Term(1));
        assert!(s.begin_seal(&ask(3)).is_err());
        assert_eq!(s.floor(), Term(1));
    }
}
