//! One look at a running server, in one query.

use std::time::Duration;

use craton_core::{Lsn, TimelineId};
use serde::{Deserialize, Serialize};

use crate::control::{Control, TIMELINE_OF_PRIMARY};
use crate::error::{PgError, Result};
use crate::history;

/// The WAL receiver of a standby (`pg_stat_wal_receiver`).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Receiver {
    /// Its process.
    pub pid: i32,
    /// `streaming`, `waiting`, `starting`, …
    pub status: Option<String>,
    /// Where it streams from.
    pub sender_host: Option<String>,
    /// The port there.
    pub sender_port: Option<u16>,
    /// The slot it uses there.
    pub slot_name: Option<String>,
    /// The timeline it receives.
    pub timeline: Option<TimelineId>,
    /// WAL flushed here.
    pub flushed_lsn: Option<Lsn>,
    /// The end of WAL there, as last reported.
    pub latest_end_lsn: Option<Lsn>,
}

/// One WAL sender (`pg_stat_replication`).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReplicationRow {
    /// Its process.
    pub pid: i32,
    /// `<member>@<incarnation>` for members.
    pub application_name: String,
    /// `startup`, `catchup`, `streaming`, `backup` or `stopping`.
    pub state: Option<String>,
    /// Sent to it.
    pub sent_lsn: Option<Lsn>,
    /// Written there.
    pub write_lsn: Option<Lsn>,
    /// Flushed there.
    pub flush_lsn: Option<Lsn>,
    /// Replayed there.
    pub replay_lsn: Option<Lsn>,
    /// Its place in synchronous_standby_names as the WAL sender itself last read it; 0 if not listed.
    pub sync_priority: i32,
    /// `async`, `potential`, `sync` or `quorum`, as the asking session sees it.
    pub sync_state: Option<String>,
    /// Microseconds since it last replied.
    pub reply_age_us: Option<i64>,
}

/// One replication slot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// `physical` or `logical`.
    pub kind: String,
    /// In use by a WAL sender.
    pub active: bool,
    /// WAL is kept from here on.
    pub restart_lsn: Option<Lsn>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// The catalog's rows that were dead before this transaction are not kept for it.
    #[serde(default, with = "xid")]
    pub catalog_xmin: Option<u32>,
    /// What a logical slot has besides.
    #[serde(default)]
    pub logical: Option<Logical>,
}

/// The rest of a logical slot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Logical {
    /// The database that it decodes.
    pub database: String,
    /// The output plugin.
    pub plugin: String,
    /// Ends with its session.
    pub temporary: bool,
    /// The consumer has everything before; none while the slot is being made.
    pub confirmed: Option<Lsn>,
    /// From PostgreSQL 14: decodes prepared transactions.
    pub two_phase: Option<bool>,
    /// From PostgreSQL 16: the rows that it needs are gone.
    pub conflicting: Option<bool>,
    /// From PostgreSQL 17: made to survive a failover.
    pub failover: Option<bool>,
    /// From PostgreSQL 17: a copy that PostgreSQL keeps.
    pub synced: Option<bool>,
}

/// PostgreSQL writes transaction numbers as text.
mod xid {
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    #[allow(
        clippy::ref_option,
        clippy::trivially_copy_pass_by_ref,
        reason = "serde calls it so"
    )]
    pub(super) fn serialize<S: Serializer>(xid: &Option<u32>, to: S) -> Result<S::Ok, S::Error> {
        xid.map(|x| x.to_string()).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
        let text: Option<String> = Option::deserialize(from)?;
        text.map(|t| t.parse().map_err(serde::de::Error::custom))
            .transpose()
    }
}

/// One look at a running server.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ServerSample {
    /// True for a standby.
    pub in_recovery: bool,
    /// The timeline of [`Self::end_of_wal`].
    pub timeline: TimelineId,
    /// The timeline of the last checkpoint, from the control file.
    pub checkpoint_timeline: TimelineId,
    /// Flushed, on a primary.
    pub flush_lsn: Option<Lsn>,
    /// Received and flushed since its start, on a standby. After a start of streaming it begins at a segment's
    /// start, which can be before `replay_lsn`.
    pub receive_lsn: Option<Lsn>,
    /// Replayed, on a standby.
    pub replay_lsn: Option<Lsn>,
    /// Where the startup process waits, on a standby.
    pub startup_wait_event: Option<String>,
    /// The WAL receiver, if one is connected.
    pub receiver: Option<Receiver>,
    /// All WAL senders.
    pub replication: Vec<ReplicationRow>,
    /// All slots.
    pub slots: Vec<Slot>,
    /// As this session reads it.
    pub synchronous_standby_names: String,
    /// As this session reads it.
    pub primary_conninfo: String,
    /// The cluster's.
    pub system_identifier: u64,
    /// Some process waits for a write or a flush of WAL at this moment.
    #[serde(default)]
    pub wal_waits: bool,
}

impl ServerSample {
    /// The end of the WAL that this server has on disk: flushed on a primary, the greater of received and
    /// replayed on a standby. On a standby it is a lower bound until [`Self::has_replayed_local_wal`].
    pub fn end_of_wal(&self) -> Lsn {
        if self.in_recovery {
            self.receive_lsn.max(self.replay_lsn).unwrap_or(Lsn::ZERO)
        } else {
            self.flush_lsn.unwrap_or(Lsn::ZERO)
        }
    }

    /// True once a standby has replayed what its own `pg_wal` held and waits for more to arrive
    /// (xlogrecovery.c, `WaitForWALToBecomeAvailable`: it looks there before it streams or sleeps).
    pub fn has_replayed_local_wal(&self) -> bool {
        !self.in_recovery
            || matches!(
                self.startup_wait_event.as_deref(),
                Some("RecoveryWalStream" | "RecoveryRetrieveRetryInterval" | "RecoveryWalAll")
            )
    }

    /// True if a receiver is connected and streams.
    pub fn is_streaming(&self) -> bool {
        self.receiver
            .as_ref()
            .is_some_and(|r| r.status.as_deref() == Some("streaming"))
    }
}

/// What the query returns; `timeline` is settled afterwards.
#[derive(Deserialize)]
struct Raw {
    primary_timeline: Option<u32>,
    checkpoint_timeline: u32,
    min_recovery_timeline: Option<u32>,
    segment_size: u64,
    #[serde(flatten)]
    rest: RawRest,
}

#[derive(Deserialize)]
struct RawRest {
    in_recovery: bool,
    flush_lsn: Option<Lsn>,
    receive_lsn: Option<Lsn>,
    replay_lsn: Option<Lsn>,
    startup_wait_event: Option<String>,
    receiver: Option<Receiver>,
    replication: Vec<ReplicationRow>,
    slots: Vec<Slot>,
    synchronous_standby_names: String,
    primary_conninfo: String,
    system_identifier: u64,
    wal_waits: bool,
}

fn sql() -> String {
    format!(
        "SELECT json_build_object(
  'in_recovery', r.standby,
  'primary_timeline', CASE WHEN NOT r.standby THEN {TIMELINE_OF_PRIMARY} END,
  'checkpoint_timeline', (SELECT timeline_id FROM pg_control_checkpoint()),
  'min_recovery_timeline', (SELECT nullif(min_recovery_end_timeline, 0) FROM pg_control_recovery()),
  'segment_size', (SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size'),
  'flush_lsn', CASE WHEN NOT r.standby THEN pg_current_wal_flush_lsn() END,
  'receive_lsn', CASE WHEN r.standby THEN pg_last_wal_receive_lsn() END,
  'replay_lsn', CASE WHEN r.standby THEN pg_last_wal_replay_lsn() END,
  'startup_wait_event', (SELECT wait_event FROM pg_stat_activity WHERE backend_type = 'startup' LIMIT 1),
  'receiver', (SELECT json_build_object('pid', pid, 'status', status, 'sender_host', sender_host,
      'sender_port', sender_port, 'slot_name', slot_name, 'timeline', received_tli,
      'flushed_lsn', flushed_lsn, 'latest_end_lsn', latest_end_lsn) FROM pg_stat_wal_receiver LIMIT 1),
  'replication', (SELECT coalesce(json_agg(json_build_object('pid', pid,
      'application_name', coalesce(application_name, ''), 'state', state, 'sent_lsn', sent_lsn,
      'write_lsn', write_lsn, 'flush_lsn', flush_lsn, 'replay_lsn', replay_lsn,
      'sync_priority', coalesce(sync_priority, 0), 'sync_state', sync_state,
      'reply_age_us', (extract(epoch FROM clock_timestamp() - reply_time) * 1000000)::bigint)), '[]')
      FROM pg_stat_replication),
  'slots', (SELECT coalesce(json_agg(json_build_object('name', slot_name, 'kind', slot_type,
      'active', active, 'restart_lsn', restart_lsn, 'wal_status', wal_status,
      'catalog_xmin', catalog_xmin::text, 'logical', CASE WHEN slot_type = 'logical' THEN
        json_build_object('database', database, 'plugin', plugin, 'temporary', temporary,
          'confirmed', confirmed_flush_lsn, 'two_phase', to_jsonb(s) -> 'two_phase',
          'conflicting', to_jsonb(s) -> 'conflicting', 'failover', to_jsonb(s) -> 'failover',
          'synced', to_jsonb(s) -> 'synced') END) ORDER BY slot_name), '[]')
      FROM pg_replication_slots AS s),
  'synchronous_standby_names', current_setting('synchronous_standby_names'),
  'primary_conninfo', current_setting('primary_conninfo'),
  'system_identifier', (SELECT system_identifier FROM pg_control_system()),
  'wal_waits', EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'IO'
      AND lower(wait_event COLLATE \"C\") IN ('walsync', 'walwrite', 'walinitsync', 'walinitwrite'))
) FROM (SELECT pg_is_in_recovery() AS standby) AS r"
    )
}

impl Control {
    /// One look at the server.
    pub async fn sample(&self, limit: Duration) -> Result<ServerSample> {
        let what = "state of the server";
        let text = self.query_one(what, &sql(), limit).await?;
        let raw: Raw = serde_json::from_str(&text).map_err(|e| PgError::Unintelligible {
            what,
            detail: format!("{e} in {text}"),
        })?;
        let timeline = TimelineId(self.timeline(&raw));
        let rest = raw.rest;
        Ok(ServerSample {
            in_recovery: rest.in_recovery,
            timeline,
            checkpoint_timeline: TimelineId(raw.checkpoint_timeline),
            flush_lsn: rest.flush_lsn,
            receive_lsn: rest.receive_lsn,
            replay_lsn: rest.replay_lsn,
            startup_wait_event: rest.startup_wait_event,
            receiver: rest.receiver,
            replication: rest.replication,
            slots: rest.slots,
            synchronous_standby_names: rest.synchronous_standby_names,
            primary_conninfo: rest.primary_conninfo,
            system_identifier: rest.system_identifier,
            wal_waits: rest.wal_waits,
        })
    }

    /// The timeline of the end of the WAL. A standby without a receiver does not tell it, and its control
    /// file may lag behind by a restartpoint; but the WAL file that holds the last byte carries it in its name.
    fn timeline(&self, raw: &Raw) -> u32 {
        if let Some(timeline) = raw.primary_timeline {
            return timeline;
        }
        let floor = raw
            .checkpoint_timeline
            .max(raw.min_recovery_timeline.unwrap_or(0));
        if let Some(TimelineId(received)) = raw.rest.receiver.as_ref().and_then(|r| r.timeline) {
            return received.max(floor);
        }
        let end = raw
            .rest
            .receive_lsn
            .max(raw.rest.replay_lsn)
            .unwrap_or(Lsn::ZERO);
        let in_files = history::newest_timeline_of_segment(self.wal_dir(), end, raw.segment_size);
        in_files.map_or(floor, |TimelineId(t)| t.max(floor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standby(receive: Option<u64>, replay: u64, wait: &str) -> ServerSample {
        ServerSample {
            in_recovery: true,
            timeline: TimelineId(1),
            checkpoint_timeline: TimelineId(1),
            flush_lsn: None,
            receive_lsn: receive.map(Lsn),
            replay_lsn: Some(Lsn(replay)),
            startup_wait_event: Some(wait.into()),
            receiver: None,
            replication: vec![],
            slots: vec![],
            synchronous_standby_names: String::new(),
            primary_conninfo: String::new(),
            system_identifier: 1,
            wal_waits: false,
        }
    }

    #[test]
    fn end_of_wal_is_never_less_than_what_was_replayed() {
        assert_eq!(
            standby(Some(0x100_0000), 0x100_0300, "RecoveryWalStream").end_of_wal(),
            Lsn(0x100_0300)
        );
        assert_eq!(standby(None, 5, "").end_of_wal(), Lsn(5));
        assert!(standby(None, 5, "RecoveryRetrieveRetryInterval").has_replayed_local_wal());
        assert!(!standby(None, 5, "WALRead").has_replayed_local_wal());
    }
}
