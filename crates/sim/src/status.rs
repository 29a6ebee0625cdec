//! Building a member's announcement.

use craton_core::observe::MemberStatus;
use craton_core::topology::MemberRole;
use craton_core::{Incarnation, Lsn, Term, TimelineId};

/// What a member says of itself.
pub struct Own {
    /// Its data directory's life.
    pub incarnation: Option<Incarnation>,
    /// Its role.
    pub role: MemberRole,
    /// The term it acts in.
    pub term: Term,
    /// The timeline of the end of its WAL.
    pub timeline: Option<TimelineId>,
    /// The end of its WAL.
    pub lsn: Option<Lsn>,
    /// It streams from its upstream.
    pub streaming: bool,
    /// The timeline of its last checkpoint.
    pub checkpoint: Option<TimelineId>,
    /// How fit its host is.
    pub health: craton_core::health::Health,
    /// This life of its PostgreSQL.
    pub process: Option<u64>,
}

/// As the others hear it.
pub fn announcement(own: Own) -> MemberStatus {
    MemberStatus {
        incarnation: own.incarnation,
        role: own.role,
        term: own.term,
        timeline: own.timeline,
        lsn: own.lsn,
        replay_lsn: own.lsn,
        streaming: own.streaming,
        doing: String::new(),
        checkpoint_timeline: own.checkpoint,
        slots: std::collections::BTreeMap::new(),
        lost_slots: std::collections::BTreeSet::new(),
        health: own.health,
        process: own.process,
        pending_restart: Vec::new(),
        libraries: std::collections::BTreeMap::new(),
        noload: false,
        upstream: None,
        logical: craton_core::slots::Told::default(),
    }
}
