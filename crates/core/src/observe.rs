//! What an agent knows at one instant: the whole input of [`crate::decide::decide`].

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::health::{Health, Host};
use crate::libraries::Libraries;
use crate::records::{ClusterView, MemberRecord, MemberRef, Seal};
use crate::settings::Settings;
use crate::slots::Told;
use crate::sync::{StandbyView, SyncSet};
use crate::types::{BootTime, Incarnation, Lsn, MemberId, Term, TimelineId};

/// The member itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Me {
    /// Its name.
    pub id: MemberId,
    /// The life of its data directory; none while there is no data.
    pub incarnation: Option<Incarnation>,
    /// Durable: nothing below this term may reach it any more.
    pub floor: Term,
    /// Where others reach it, and its priority.
    pub host: String,
    /// PostgreSQL's port.
    pub port: u16,
    /// Its control API, `host:port`.
    pub api: String,
    /// Preference in elections; 0: never.
    pub priority: u32,
    /// Proxies send no reads here.
    pub noload: bool,
    /// The standby that it streams from while that one streams from the leader itself; none: from the leader.
    pub upstream: Option<MemberId>,
    /// What it does while there is no cluster.
    pub first_start: FirstStart,
}

/// What a member does while there is no cluster yet, or how a cluster came to its database.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FirstStart {
    /// One of the members makes an empty database.
    #[default]
    Make,
    /// The data directory that stands here already becomes the cluster's database.
    Adopt,
    /// Nothing: another member founds the cluster.
    Wait,
}

impl Me {
    /// The record that the coordinator should hold of it.
    pub fn record(&self) -> MemberRecord {
        MemberRecord {
            host: self.host.clone(),
            port: self.port,
            api: self.api.clone(),
            priority: self.priority,
            incarnation: self.incarnation,
            leaving: false,
        }
    }

    /// Name and incarnation, once there is one.
    pub fn reference(&self) -> Option<MemberRef> {
        Some(MemberRef {
            member: self.id.clone(),
            incarnation: self.incarnation?,
        })
    }
}

/// The lease as this member holds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lease {
    /// For which term.
    pub term: Term,
    /// Its own deadline: the instant before the last accepted renewal was sent, plus ttl, less margin; or
    /// that of the standby promises, where it is later.
    pub until: BootTime,
}

/// The state of the data directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DataView {
    /// Nothing there, or only a half-made clone of our own.
    Empty,
    /// Something that is not ours, in words.
    Foreign(String),
    /// A database.
    Present {
        /// Its system identifier.
        system_id: String,
        /// The timeline of its last checkpoint.
        timeline: TimelineId,
        /// Whose it is.
        origin: Origin,
    },
}

/// Who made a data directory, as far as its files tell.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origin {
    /// Craton made it or has run it. Without its records nobody can know whether it is the newest copy.
    Own,
    /// Craton has never touched it.
    Strange {
        /// Why it cannot be taken over as it is, and what to do about that.
        refused: Option<String>,
    },
}

/// A running PostgreSQL.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Server {
    /// `pg_is_in_recovery()`.
    pub in_recovery: bool,
    /// The timeline of the end of its WAL.
    pub timeline: TimelineId,
    /// The end of its flushed WAL.
    pub end: Lsn,
    /// How far a standby has replayed; for people, it decides nothing.
    pub replay: Option<Lsn>,
    /// False while `end` may still grow out of local WAL that has not been read (just after a start).
    pub end_is_exact: bool,
    /// Whose WAL it is configured to stream, and in which term that was written.
    pub upstream: Option<(MemberId, Term)>,
    /// True while its WAL receiver streams.
    pub streaming: bool,
    /// `synchronous_standby_names` as configured.
    pub sync_configured: SyncSet,
    /// True once every WAL sender has been seen to follow it.
    pub sync_in_force: bool,
    /// The standbys connected to it.
    pub standbys: Vec<StandbyView>,
    /// Client transactions in progress, counted while a switchover waits for them.
    pub active_transactions: Option<u32>,
    /// Started in place as a primary, and clients are refused until what it recovered is safe.
    pub closed: bool,
}

/// The PostgreSQL process.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ServerView {
    /// Not running, and no process of it is left.
    Down,
    /// Running, but it does not answer yet (or any more).
    Silent {
        /// True if it was started as, or last seen as, a primary: it may accept writes.
        maybe_primary: bool,
    },
    /// Running and answering.
    Running(Server),
}

/// What another member announced of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerView {
    /// When it was last heard, on this host's clock.
    pub heard_at: BootTime,
    /// What it said.
    pub status: MemberStatus,
}

/// A member's volatile announcement.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Its data directory's life.
    pub incarnation: Option<Incarnation>,
    /// Its role.
    pub role: crate::topology::MemberRole,
    /// The term it acts in.
    pub term: Term,
    /// The timeline of the end of its WAL.
    pub timeline: Option<TimelineId>,
    /// The end of its WAL.
    pub lsn: Option<Lsn>,
    /// How far a standby has replayed.
    pub replay_lsn: Option<Lsn>,
    /// True while it streams from its upstream.
    pub streaming: bool,
    /// What it is doing, in words.
    pub doing: String,
    /// The timeline of its last checkpoint: pg_rewind goes by the leader's (PostgreSQL before 16).
    #[serde(default)]
    pub checkpoint_timeline: Option<TimelineId>,
    /// The leader's replication slots and from where each keeps WAL, so that the standbys' copies of
    /// them can follow.
    #[serde(default)]
    pub slots: BTreeMap<String, Lsn>,
    /// The leader's slots that lost the WAL their member needs (`wal_status = lost`).
    #[serde(default)]
    pub lost_slots: BTreeSet<String>,
    /// How fit its host is.
    #[serde(default)]
    pub health: Health,
    /// Names this life of its PostgreSQL: another one after every restart; none while it is down.
    #[serde(default)]
    pub process: Option<u64>,
    /// Its parameters that wait for a restart.
    #[serde(default)]
    pub pending_restart: Vec<PendingChange>,
    /// The libraries that its PostgreSQL works with.
    #[serde(default)]
    pub libraries: Libraries,
    /// Proxies send no reads there.
    #[serde(default)]
    pub noload: bool,
    /// As a standby: the member whose WAL it is configured to stream. An older agent does not say.
    #[serde(default)]
    pub upstream: Option<MemberId>,
    /// Its logical replication slots.
    #[serde(default)]
    pub logical: Told,
}

/// A parameter of PostgreSQL whose value in the file is not yet the one in force.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PendingChange {
    /// Its name.
    pub name: String,
    /// In force.
    pub from: String,
    /// After a restart; none where the file no longer says (the built-in default).
    pub to: Option<String>,
}

/// What the local voter knows of the lease (see the coordinator's `LeaseHint`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeaseSeen {
    /// A promise for this term runs.
    Held(Term),
    /// None runs.
    Lapsed,
    /// Cannot be told here.
    Unknown,
}

/// A long action in progress.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TaskView {
    /// Which.
    pub task: crate::decide::Task,
    /// Since when.
    pub since: BootTime,
}

/// A long action that failed last time and should not be tried again before `retry_at`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TaskFailure {
    /// Which kind.
    pub kind: crate::decide::TaskKind,
    /// What went wrong.
    pub error: String,
    /// How often in a row.
    pub count: u32,
    /// When it may be tried again.
    pub retry_at: BootTime,
}

/// What standby promises come to here (see [`crate::promise`]).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PromiseView {
    /// As a standby: this member has promised (or may have, before its agent restarted) not to seal before.
    pub held_until: Option<BootTime>,
    /// As a leader: since when it goes on by promises alone, because the lease cannot be renewed.
    pub living_since: Option<BootTime>,
    /// As a leader: whose promises run.
    pub from: Vec<MemberId>,
}

/// A backup receiver as last heard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReceiverView {
    /// When, on this host's clock.
    pub heard_at: BootTime,
    /// The life of its repository.
    pub incarnation: Incarnation,
    /// The timeline received last.
    pub timeline: TimelineId,
    /// Received and flushed up to here.
    pub lsn: Lsn,
    /// Whom it streams from.
    pub streams_from: Option<MemberId>,
    /// The seal that it gave last, to this agent.
    pub seal: Option<Seal>,
}

/// Everything an agent knows at one instant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Observation {
    /// Now.
    pub now: BootTime,
    /// The wall clock, milliseconds since 1970; goes into the history. It decides nothing but when a scheduled
    /// switchover begins and a pause ends.
    pub wall_ms: u64,
    /// The cluster's name, for the first start.
    pub cluster_name: String,
    /// The settings that a new cluster starts with.
    pub initial_settings: Settings,
    /// Itself.
    pub me: Me,
    /// The coordinator's state; none until it has been read once since the agent's start.
    pub view: Option<ClusterView>,
    /// The lease it holds.
    pub lease: Option<Lease>,
    /// What is known here of the lease.
    pub lease_seen: LeaseSeen,
    /// Standby promises, given and received.
    pub promises: PromiseView,
    /// The others.
    pub peers: BTreeMap<MemberId, PeerView>,
    /// Backup receivers that are on record.
    pub receivers: BTreeMap<MemberId, ReceiverView>,
    /// The data directory.
    pub data: DataView,
    /// PostgreSQL.
    pub server: ServerView,
    /// Names this life of PostgreSQL: another one after every restart; none while it is down.
    pub process: Option<u64>,
    /// The configuration in the files is not what the settings ask for.
    pub config_stale: bool,
    /// Parameters that wait for a restart of PostgreSQL.
    pub pending: Vec<PendingChange>,
    /// Its host.
    pub host: Host,
    /// The libraries that PostgreSQL works with here; empty until they are known.
    pub libraries: Libraries,
    /// The bootstrap task has succeeded since the agent's start.
    pub bootstrap_done: bool,
    /// The logical replication slots here.
    pub logical: Told,
    /// This host sees the backup repository: an empty data directory can be filled from there.
    pub clone_repository: bool,
    /// What it sealed, since it last followed anybody.
    pub sealed: Option<Seal>,
    /// A long action in progress.
    pub task: Option<TaskView>,
    /// Long actions that failed.
    pub failures: Vec<TaskFailure>,
}
