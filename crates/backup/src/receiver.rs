//! The WAL receiver: follows the leader, across failovers and timelines, without a gap.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use craton_core::topology::{MemberRole, Topology, TopologyMember};
use craton_core::{Lsn, Term, TimelineId};
use craton_pg::replication::{
    ReplicationConnection, ReplicationError, Started, SystemIdentity, WalEvent, WalStream,
};
use craton_repo::continuity::{self, Missing};
use craton_repo::history::History;
use craton_wire::replication::StandbyStatus;
use tokio::sync::watch;
use tokio::time::{Instant, interval};

use crate::error::{BackupError, Result};
use crate::metrics::whole;
use crate::shared::{Shared, stopped};
use crate::store::{Gap, Repository, now_ms};
use crate::wal_sink::WalSink;

/// A status is sent at least this often.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// What was received is synced at least this often, also when not synchronous.
const FLUSH_INTERVAL: Duration = Duration::from_millis(200);
/// A server that is asked for a sign of life once a second and gives none for this long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// The first and the longest pause before a server is tried again.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// So long WAL that the leader has removed is asked for again where a member could not say whether it has it.
const UNCLEAR_MAX: Duration = Duration::from_secs(60);
/// At most so much WAL is gathered before it is written.
const BATCH_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Follows whoever leads.
pub(crate) struct Receiver {
    pub(crate) shared: Arc<Shared>,
    pub(crate) topology: watch::Receiver<Option<Arc<Topology>>>,
    pub(crate) shutdown: watch::Receiver<bool>,
    /// Which WAL that the leader has removed is looked for at members that cannot say whether they have it, and since when.
    pub(crate) unclear: Option<Unclear>,
}

/// What is looked for, since when, and when it was looked for last.
#[derive(Clone, Copy)]
pub(crate) struct Unclear {
    what: (TimelineId, Lsn),
    since: Instant,
    last: Instant,
}

/// Why a stream ended without an error.
enum StreamEnd {
    /// The timeline ended on this server.
    Timeline(WalStream),
    /// Another member leads now.
    LeaderChanged,
    /// The daemon stops.
    Shutdown,
    /// The position asked for was reached.
    Reached,
}

/// A stream that failed.
enum StreamFailure {
    /// The server no longer has the WAL that is due.
    WalRemoved(BackupError),
    Other(BackupError),
}

impl From<BackupError> for StreamFailure {
    fn from(e: BackupError) -> Self {
        match e {
            BackupError::Replication(e) if e.is_wal_removed() => Self::WalRemoved(e.into()),
            other => Self::Other(other),
        }
    }
}

impl From<ReplicationError> for StreamFailure {
    fn from(e: ReplicationError) -> Self {
        BackupError::from(e).into()
    }
}

impl From<StreamFailure> for BackupError {
    fn from(f: StreamFailure) -> Self {
        match f {
            StreamFailure::WalRemoved(e) | StreamFailure::Other(e) => e,
        }
    }
}

/// A server whose history is known, and where to go on with it.
struct Prepared {
    repository: Repository,
    identity: SystemIdentity,
    history: History,
    resume: Option<(TimelineId, Lsn)>,
}

impl Receiver {
    /// Runs until shutdown.
    pub(crate) async fn run(mut self) {
        let mut pause = RETRY_MIN;
        while !*self.shutdown.borrow() {
            let Some((leader, term)) = self.wait_for_leader().await else {
                return;
            };
            let began = Instant::now();
            let outcome = self.follow_as_copy(&leader, term).await;
            self.disconnected(outcome.as_ref().err());
            if let Err(error) = outcome {
                tracing::warn!(member = %leader.id, %error, "WAL stream interrupted");
                self.shared.metrics.reconnects.inc();
                pause = if began.elapsed() > SILENCE_MAX {
                    RETRY_MIN
                } else {
                    (pause * 2).min(RETRY_MAX)
                };
                let mut shutdown = self.shutdown.clone();
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = leader_other_than(&mut self.topology, &leader) => pause = RETRY_MIN,
                    () = stopped(&mut shutdown) => {}
                }
            } else {
                pause = RETRY_MIN;
            }
        }
    }

    /// The leader, and its term. A copy waits for one that it may receive from.
    async fn wait_for_leader(&mut self) -> Option<(TopologyMember, Term)> {
        let mut shutdown = self.shutdown.clone();
        let copy = self.shared.copy.clone();
        if let Some(copy) = &copy {
            tokio::select! {
                () = copy.wait_known() => {}
                () = stopped(&mut shutdown) => return None,
            }
        }
        // A seal that comes meanwhile only raises it, and is looked at again before anything is received.
        let floor = copy.map_or(Term(0), |c| c.floor());
        let fits = |t: &Option<Arc<Topology>>| {
            t.as_ref()
                .is_some_and(|t| t.leader().is_some() && t.term >= floor)
        };
        tokio::select! {
            found = self.topology.wait_for(fits) => {
                let found = found.ok()?;
                let topology = found.as_ref()?;
                Some((topology.leader()?.clone(), topology.term))
            }
            () = stopped(&mut shutdown) => None,
        }
    }

    /// [`Self::follow`]; as a copy only for as long as that term may be received from.
    async fn follow_as_copy(&mut self, leader: &TopologyMember, term: Term) -> Result<()> {
        let Some(copy) = self.shared.copy.clone() else {
            return self.follow(leader, term).await;
        };
        if !copy.follow(term).await? {
            return Ok(());
        }
        let outcome = tokio::select! {
            outcome = self.follow(leader, term) => outcome,
            // Dropping it ends the connection: nothing more is received, nor acknowledged.
            () = copy.superseded(term) => Ok(()),
        };
        copy.left();
        outcome
    }

    /// The name in the leader's `pg_stat_replication`.
    fn application_name(&self) -> String {
        let copy = self.shared.copy.as_ref();
        copy.and_then(|c| c.application_name())
            .unwrap_or_else(|| self.shared.config.application_name.clone())
    }

    fn disconnected(&self, error: Option<&BackupError>) {
        self.shared.metrics.streaming.set(0);
        self.shared.streaming.send_modify(|s| {
            s.from = None;
            s.error = error.map(ToString::to_string);
        });
    }

    /// Streams from a leader for as long as it leads, timeline after timeline.
    async fn follow(&mut self, leader: &TopologyMember, term: Term) -> Result<()> {
        let config = &self.shared.config;
        let trust = self.shared.trust.as_ref();
        let login = config.login(trust, leader, &self.application_name())?;
        let mut connection = ReplicationConnection::connect(&login).await?;
        let slot = config.slot.clone();
        if connection.ensure_physical_slot(&slot).await? {
            tracing::info!(member = %leader.id, slot, "created the replication slot");
        }
        loop {
            let prepared = self.prepare(&mut connection).await?;
            let start = match prepared.resume {
                Some(start) => start,
                None => first_start(&mut connection, &slot, &prepared).await?,
            };
            match self
                .stream_from(
                    connection,
                    leader,
                    Some(&slot),
                    &prepared.repository,
                    start,
                    None,
                )
                .await
            {
                Ok(StreamEnd::Timeline(stream)) => {
                    let (idle, next) = stream.finish().await?;
                    tracing::info!(ended = %start.0, ?next, "the timeline has ended");
                    connection = idle;
                }
                Ok(_) => return Ok(()),
                Err(StreamFailure::WalRemoved(error)) => {
                    tracing::warn!(member = %leader.id, timeline = %start.0, from = %start.1, %error, "the leader no longer has the WAL that is due");
                    return self
                        .recover_removed((leader, term), &slot, &prepared, start)
                        .await;
                }
                Err(StreamFailure::Other(error)) => return Err(error),
            }
        }
    }

    /// Learns who the server is, keeps its history, and finds where to go on.
    async fn prepare(&self, connection: &mut ReplicationConnection) -> Result<Prepared> {
        let identity = connection.identify_system().await?;
        let segment_size = connection.wal_segment_size().await?;
        let repository = if let Some(known) = self.shared.repository.get() {
            known.clone()
        } else {
            let root = self.shared.config.repository.clone();
            let opened = blocking(move || {
                Repository::open_or_create(&root, identity.system_id, segment_size)
            })
            .await?;
            self.shared.repository.get_or_init(|| opened).clone()
        };
        // A server of another cluster at the same address must not get its WAL mixed in.
        if repository.descriptor().system_id != identity.system_id
            || repository.segment_size() != segment_size
        {
            return Err(BackupError::Refused(format!(
                "the leader is database cluster {}, but {} belongs to {}; nothing is received",
                identity.system_id,
                repository.root().display(),
                repository.descriptor().system_id
            )));
        }
        let mut texts = Vec::new();
        if identity.timeline > TimelineId(1) {
            let text = connection.timeline_history(identity.timeline).await?;
            let newest = History::parse(identity.timeline, &text)
                .map_err(|e| BackupError::Interrupted(e.to_string()))?;
            texts.push((identity.timeline, text));
            for ancestor in newest
                .ancestors
                .iter()
                .map(|a| a.timeline)
                .filter(|t| *t > TimelineId(1))
            {
                // Nice to have, for restores to an older timeline; servers may have removed them.
                if let Ok(text) = connection.timeline_history(ancestor).await {
                    texts.push((ancestor, text));
                }
            }
        }
        blocking(move || {
            for (timeline, text) in &texts {
                repository.put_history(*timeline, text)?;
            }
            let history = repository.history(identity.timeline)?;
            let resume = continuity::resume(
                &repository.inventory()?,
                &history,
                repository.segment_size(),
            );
            Ok(Prepared {
                repository,
                identity,
                history,
                resume,
            })
        })
        .await
    }

    async fn stream_from(
        &mut self,
        connection: ReplicationConnection,
        member: &TopologyMember,
        slot: Option<&str>,
        repository: &Repository,
        (timeline, start): (TimelineId, Lsn),
        until: Option<Lsn>,
    ) -> std::result::Result<StreamEnd, StreamFailure> {
        let stream = match connection.start_physical(slot, start, timeline).await? {
            Started::Streaming(stream) => stream,
            Started::AtTimelineEnd(..) => {
                let text =
                    format!("timeline {timeline} ends where its WAL should have begun, at {start}");
                return Err(StreamFailure::Other(BackupError::Interrupted(text)));
            }
        };
        tracing::info!(member = %member.id, %timeline, %start, "receiving WAL");
        let sink = WalSink::new(repository.clone(), timeline, start);
        let mut pump = Pump::new(Arc::clone(&self.shared), stream, sink);
        if until.is_none() {
            self.shared.metrics.streaming.set(1);
            self.shared.metrics.timeline.set(i64::from(timeline.0));
            self.shared.streaming.send_modify(|s| {
                s.from = Some(member.id.clone());
                s.error = None;
            });
        }
        let mut ticks = interval(FLUSH_INTERVAL);
        let mut shutdown = self.shutdown.clone();
        loop {
            tokio::select! {
                event = pump.stream.next() => {
                    if pump.take(event?).await? {
                        return Ok(StreamEnd::Timeline(pump.stream));
                    }
                }
                _ = ticks.tick() => pump.tick().await?,
                () = leader_other_than(&mut self.topology, member), if until.is_none() => {
                    pump.flush_and_report(false).await?;
                    return Ok(StreamEnd::LeaderChanged);
                }
                () = stopped(&mut shutdown) => {
                    pump.flush_and_report(false).await?;
                    return Ok(StreamEnd::Shutdown);
                }
            }
            if until.is_some_and(|until| pump.flushed >= until) {
                return Ok(StreamEnd::Reached);
            }
        }
    }

    /// The leader has removed WAL that is due: asks every other member for it, and only when none
    /// has it gives it up, says so, and goes on from what the leader keeps.
    async fn recover_removed(
        &mut self,
        (leader, term): (&TopologyMember, Term),
        slot: &str,
        prepared: &Prepared,
        start: (TimelineId, Lsn),
    ) -> Result<()> {
        let size = prepared.repository.segment_size();
        let until = prepared.identity.flushed.segment_start(size);
        if self.recover_from_others(leader, start, until).await? {
            return Ok(());
        }
        let config = &self.shared.config;
        let trust = self.shared.trust.as_ref();
        let name = format!("{}_look", config.application_name);
        let login = config.login(trust, leader, &name)?;
        let mut connection = ReplicationConnection::connect(&login).await?;
        let kept = connection
            .read_slot(slot)
            .await?
            .and_then(|s| s.restart)
            .map(|(lsn, _)| lsn.segment_start(size));
        let go_on = kept.filter(|lsn| *lsn > start.1).unwrap_or(until);
        let timeline = prepared
            .history
            .timeline_of(go_on.0.checked_div(size).unwrap_or(0), size);
        if go_on > start.1 {
            self.give_up(&prepared.repository, start, go_on).await?;
            // What this copy acknowledged until now says nothing any more of what it holds.
            if let Some(copy) = self.shared.copy.clone() {
                copy.reborn().await?;
                copy.wait_known().await;
                if !copy.follow(term).await? {
                    return Ok(());
                }
            }
        }
        let config = &self.shared.config;
        let trust = self.shared.trust.as_ref();
        let login = config.login(trust, leader, &self.application_name())?;
        let connection = ReplicationConnection::connect(&login).await?;
        let end = self
            .stream_from(
                connection,
                leader,
                Some(slot),
                &prepared.repository,
                (timeline, go_on),
                None,
            )
            .await?;
        match end {
            // Reconnecting finds the new timeline.
            StreamEnd::Timeline(_)
            | StreamEnd::LeaderChanged
            | StreamEnd::Shutdown
            | StreamEnd::Reached => Ok(()),
        }
    }

    /// True when another member had it, false when nobody has it any more. Who is starting, or silent for a moment, may
    /// have it: then an error says so, for some time, for what is given up is missing for good.
    async fn recover_from_others(
        &mut self,
        leader: &TopologyMember,
        start: (TimelineId, Lsn),
        until: Lsn,
    ) -> Result<bool> {
        let others: Vec<TopologyMember> = self
            .topology
            .borrow()
            .iter()
            .flat_map(|t| t.members.clone())
            .filter(|m| m.id != leader.id)
            .collect();
        let mut unclear = None;
        for member in others {
            if member.role == MemberRole::Down {
                let text = format!("{} is down, and may have the missing WAL", member.id);
                unclear = Some(BackupError::Interrupted(text));
                continue;
            }
            match self.catch_up(&member, until).await {
                Ok(()) => {
                    self.unclear = None;
                    return Ok(true);
                }
                Err(error) => {
                    tracing::warn!(member = %member.id, %error, "this member cannot give the missing WAL");
                    if !error.is_wal_removed() {
                        unclear = Some(error);
                    }
                }
            }
        }
        if let Some(error) = unclear {
            let now = Instant::now();
            let before = self.unclear.filter(|u| {
                // Where nobody led for a while, nobody was asked either.
                u.what == start && now.duration_since(u.last) < UNCLEAR_MAX / 2
            });
            let since = before.map_or(now, |u| u.since);
            self.unclear = Some(Unclear {
                what: start,
                since,
                last: now,
            });
            if now.duration_since(since) < UNCLEAR_MAX {
                return Err(error);
            }
        }
        Ok(false)
    }

    async fn catch_up(&mut self, member: &TopologyMember, until: Lsn) -> Result<()> {
        let config = &self.shared.config;
        let name = format!("{}_catch_up", config.application_name);
        let login = config.login(self.shared.trust.as_ref(), member, &name)?;
        let mut connection = ReplicationConnection::connect(&login).await?;
        let prepared = self.prepare(&mut connection).await?;
        let start = prepared
            .resume
            .ok_or_else(|| BackupError::Interrupted("nothing to go on from".into()))?;
        match self
            .stream_from(
                connection,
                member,
                None,
                &prepared.repository,
                start,
                Some(until),
            )
            .await?
        {
            StreamEnd::Timeline(_)
            | StreamEnd::Reached
            | StreamEnd::LeaderChanged
            | StreamEnd::Shutdown => Ok(()),
        }
    }

    async fn give_up(
        &self,
        repository: &Repository,
        start: (TimelineId, Lsn),
        go_on: Lsn,
    ) -> Result<()> {
        let size = repository.segment_size();
        let segments = go_on.bytes_since(start.1).checked_div(size).unwrap_or(0);
        let missing = Missing {
            timeline: start.0,
            from: start.1,
            to: go_on,
            segments,
        };
        tracing::error!(timeline = %missing.timeline, from = %missing.from, to = %missing.to, "WAL is lost: no member has it; a new base backup is due");
        let gap = Gap {
            missing,
            found_at_ms: now_ms(),
        };
        let repository = repository.clone();
        blocking(move || repository.record_gap(gap)).await?;
        self.shared.backup_needed.notify_one();
        Ok(())
    }
}

/// Where a repository without WAL begins: with what the slot keeps, or at the server's end.
async fn first_start(
    connection: &mut ReplicationConnection,
    slot: &str,
    prepared: &Prepared,
) -> Result<(TimelineId, Lsn)> {
    let size = prepared.repository.segment_size();
    let kept = connection
        .read_slot(slot)
        .await?
        .and_then(|s| s.restart)
        .map(|(lsn, _)| lsn);
    let start = kept
        .unwrap_or(prepared.identity.flushed)
        .segment_start(size);
    Ok((
        prepared
            .history
            .timeline_of(start.0.checked_div(size).unwrap_or(0), size),
        start,
    ))
}

/// Moves WAL from a stream to the disk and reports back.
struct Pump {
    shared: Arc<Shared>,
    stream: WalStream,
    /// Away only while a blocking thread writes.
    sink: Option<WalSink>,
    timeline: TimelineId,
    flushed: Lsn,
    server_end: Lsn,
    dirty: bool,
    reported_at: Instant,
    heard_at: Instant,
    completed: u64,
    conflicts: u64,
}

impl Pump {
    fn new(shared: Arc<Shared>, stream: WalStream, sink: WalSink) -> Self {
        Self {
            shared,
            stream,
            timeline: sink.timeline(),
            flushed: sink.flushed(),
            server_end: sink.flushed(),
            sink: Some(sink),
            dirty: false,
            reported_at: Instant::now(),
            heard_at: Instant::now(),
            completed: 0,
            conflicts: 0,
        }
    }

    /// Takes an event and all that came with it; true when the timeline has ended.
    async fn take(&mut self, first: WalEvent) -> Result<bool> {
        self.heard_at = Instant::now();
        let (mut wal, mut bytes, mut reply, mut ended) = (Vec::new(), 0, false, false);
        let mut next = Some(first);
        while let Some(event) = next {
            match event {
                WalEvent::Data {
                    start,
                    server_end,
                    data,
                } => {
                    bytes += data.len();
                    self.server_end = self.server_end.max(server_end);
                    wal.push((start, data));
                }
                WalEvent::Keepalive {
                    server_end,
                    reply_requested,
                } => {
                    self.server_end = self.server_end.max(server_end);
                    reply |= reply_requested;
                }
                WalEvent::TimelineEnd => ended = true,
            }
            next = if ended || bytes >= BATCH_BYTES_MAX {
                None
            } else {
                self.stream.buffered()?
            };
        }
        self.shared.metrics.wal_received_bytes.inc_by(bytes as u64);
        self.dirty |= !wal.is_empty();
        let flush = ended || reply || (self.shared.config.synchronous && self.dirty);
        if !wal.is_empty() || flush {
            self.write(wal, flush).await?;
        }
        if flush && !ended {
            self.report(false).await?;
        }
        self.publish();
        Ok(ended)
    }

    async fn write(&mut self, wal: Vec<(Lsn, Bytes)>, flush: bool) -> Result<()> {
        let Some(mut sink) = self.sink.take() else {
            return Err(BackupError::Interrupted(
                "an earlier write of WAL failed".into(),
            ));
        };
        let sink = blocking(move || {
            for (start, data) in &wal {
                sink.write(*start, data)?;
            }
            if flush {
                sink.flush()?;
            }
            Ok(sink)
        })
        .await?;
        self.flushed = sink.flushed();
        self.dirty = sink.written() > sink.flushed();
        if sink.completed() > self.completed {
            self.shared
                .metrics
                .segments_archived
                .inc_by(sink.completed() - self.completed);
            self.completed = sink.completed();
            self.shared.segment_done.notify_one();
        }
        self.shared
            .metrics
            .wal_conflicts
            .inc_by(sink.conflicts() - self.conflicts);
        self.conflicts = sink.conflicts();
        self.sink = Some(sink);
        Ok(())
    }

    async fn tick(&mut self) -> Result<()> {
        if self.heard_at.elapsed() > SILENCE_MAX {
            return Err(ReplicationError::Timeout {
                what: "a sign of life",
                limit: SILENCE_MAX,
            }
            .into());
        }
        if self.dirty {
            self.flush_and_report(false).await?;
        } else if self.reported_at.elapsed() >= STATUS_INTERVAL {
            // Asking for an answer tells a silent server from a dead one.
            self.report(true).await?;
        }
        self.publish();
        Ok(())
    }

    async fn flush_and_report(&mut self, reply_requested: bool) -> Result<()> {
        self.write(Vec::new(), true).await?;
        self.report(reply_requested).await
    }

    async fn report(&mut self, reply_requested: bool) -> Result<()> {
        let written = self.sink.as_ref().map_or(self.flushed, WalSink::written);
        let now_us = i64::try_from(now_ms()).unwrap_or(0).saturating_mul(1000);
        let status = StandbyStatus {
            written,
            flushed: self.flushed,
            applied: Lsn::ZERO,
            now_us,
            reply_requested,
        };
        self.stream.send_status(&status).await?;
        self.reported_at = Instant::now();
        Ok(())
    }

    fn publish(&self) {
        let metrics = &self.shared.metrics;
        metrics.received_lsn.set(whole(self.flushed.0));
        metrics
            .lag_bytes
            .set(whole(self.server_end.bytes_since(self.flushed)));
        self.shared.streaming.send_if_modified(|s| {
            let changed = s.flushed != self.flushed
                || s.timeline != self.timeline
                || s.server_end != self.server_end;
            s.flushed = self.flushed;
            s.timeline = self.timeline;
            s.server_end = self.server_end;
            changed
        });
    }
}

/// Returns when a member other than `current`, or the same at another address, may be written to.
async fn leader_other_than(
    topology: &mut watch::Receiver<Option<Arc<Topology>>>,
    current: &TopologyMember,
) {
    let other = |t: &Option<Arc<Topology>>| {
        t.as_ref()
            .and_then(|t| t.leader())
            .is_some_and(|l| (&l.id, &l.host, l.port) != (&current.id, &current.host, current.port))
    };
    if topology.wait_for(other).await.is_err() {
        // The feed has ended, which happens only at shutdown; that is noticed elsewhere.
        std::future::pending::<()>().await;
    }
}

/// Runs file work where it may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| {
        Err(BackupError::Interrupted(format!(
            "file work was broken off: {e}"
        )))
    })
}
