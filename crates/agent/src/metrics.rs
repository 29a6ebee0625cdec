//! The agent's metrics: drawn from the newest observation when they are asked for.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use craton_console::metrics::Metrics;
use craton_core::libraries::differences;
use craton_core::observe::ServerView;
use craton_core::records::ClusterView;
use craton_core::topology::MemberRole;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;

use crate::agent::Seen;
use crate::lease::LeaseCounts;
use crate::views;

/// All of them.
pub struct AgentMetrics {
    role: Gauge,
    leader: Gauge,
    term: Gauge,
    timeline: Gauge,
    wal: Gauge,
    lag: Gauge,
    streaming: Gauge,
    lease_remaining: Gauge<f64, AtomicU64>,
    renewals: Counter,
    renewal_failures: Counter,
    promises: Counter,
    living: Gauge<f64, AtomicU64>,
    sync_members: Gauge,
    sync_acks: Gauge,
    members_alive: Gauge,
    coordinator_known: Gauge,
    coordinator_answers: Gauge,
    elections: Gauge,
    fence_kills: Counter,
    paused: Gauge,
    pending_restart: Gauge,
    library_differences: Gauge,
    last: std::sync::Mutex<LeaseCounts>,
}

fn coordinator(m: &mut Metrics) -> [Gauge; 2] {
    [
        m.gauge(
            "craton_coordinator_known",
            "1 when the coordinator's state is known to this agent",
        ),
        m.gauge(
            "craton_coordinator_answers",
            "0 while this agent cannot use the store of the cluster's records: etcd does not answer or refuses, or a move waits",
        ),
    ]
}

impl AgentMetrics {
    /// Registers them.
    pub fn register(m: &mut Metrics) -> Self {
        let [coordinator_known, coordinator_answers] = coordinator(m);
        Self {
            role: m.gauge(
                "craton_member_role",
                "Role of this member: 0 down, 1 in transition, 2 standby, 3 leader",
            ),
            leader: m.gauge(
                "craton_leader",
                "1 when this member holds the leadership and is open for clients",
            ),
            term: m.gauge(
                "craton_term",
                "The term of the leader, or of the election in progress",
            ),
            timeline: m.gauge("craton_timeline", "PostgreSQL's timeline on this member"),
            wal: m.gauge(
                "craton_wal_position_bytes",
                "End of this member's WAL: flushed on the leader, received on a standby",
            ),
            lag: m.gauge(
                "craton_lag_bytes",
                "WAL that the leader has flushed and this member has not received, in bytes",
            ),
            streaming: m.gauge("craton_streaming", "1 while this member streams WAL"),
            lease_remaining: m.gauge_f64(
                "craton_lease_remaining_seconds",
                "What is left of the lease held by this member; 0 when it holds none",
            ),
            renewals: m.counter(
                "craton_lease_renewals",
                "Lease renewals that a majority accepted",
            ),
            renewal_failures: m.counter(
                "craton_lease_renewal_failures",
                "Lease renewals that failed or came too late",
            ),
            promises: m.counter(
                "craton_standby_promises",
                "Promises of standbys to this leader while it could not renew its lease",
            ),
            living: m.gauge_f64(
                "craton_living_on_promises_seconds",
                "For how long this leader has lived on the promises of standbys; 0 when it renews its lease",
            ),
            sync_members: m.gauge("craton_sync_members", "Members of the sync set (V)"),
            sync_acks: m.gauge(
                "craton_sync_acknowledgements",
                "How many of the sync set must flush a commit (k)",
            ),
            members_alive: m.gauge(
                "craton_members_alive",
                "Members whose agent was heard lately, this one included",
            ),
            coordinator_known,
            coordinator_answers,
            elections: m.gauge(
                "craton_failovers",
                "Leaderships that began after the first: elections won in this cluster's life",
            ),
            fence_kills: m.counter(
                "craton_fence_kills",
                "Times that PostgreSQL was killed because the lease ended or was lost",
            ),
            paused: m.gauge(
                "craton_paused",
                "1 during a pause: no automatic failover, start, rewind or clone",
            ),
            pending_restart: m.gauge(
                "craton_pending_restart",
                "Parameters of this member's PostgreSQL that wait for a restart",
            ),
            library_differences: m.gauge(
                "craton_library_differences",
                "Libraries (and PostgreSQL itself) whose version here is not the leader's",
            ),
            last: std::sync::Mutex::new(LeaseCounts::default()),
        }
    }

    /// PostgreSQL was killed by the fence rule.
    pub fn killed(&self) {
        self.fence_kills.inc();
    }

    /// Brings them up to date. `answers`: the store of the records can be used.
    pub fn update(&self, seen: &Seen, counts: LeaseCounts, answers: bool) {
        let (o, d) = (&seen.0, &seen.1);
        let own = views::own_status(o, d);
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        self.role.set(match own.role {
            MemberRole::Down => 0,
            MemberRole::Transition => 1,
            MemberRole::Standby => 2,
            MemberRole::Leader => 3,
        });
        let view = o.view.as_ref();
        let leadership = view.and_then(|v| v.leadership.as_ref()).map(|l| &l.value);
        let leads = own.role == MemberRole::Leader && leadership.is_some_and(|l| l.open);
        self.leader.set(i64::from(leads));
        self.term.set(leadership.map_or(0, |l| number(l.term.0)));
        self.elections
            .set(leadership.map_or(0, |l| number(l.term.0.saturating_sub(1))));
        self.sync_members
            .set(leadership.map_or(0, |l| number(l.sync.members.len() as u64)));
        self.sync_acks
            .set(leadership.map_or(0, |l| i64::from(l.sync.k)));
        self.coordinator_known.set(i64::from(view.is_some()));
        self.coordinator_answers.set(i64::from(answers));
        if let ServerView::Running(s) = &o.server {
            self.timeline.set(i64::from(s.timeline.0));
            self.wal.set(number(s.end.0));
            self.streaming.set(i64::from(s.streaming));
            let leader = view
                .and_then(ClusterView::leader)
                .and_then(|l| o.peers.get(&l.member));
            let lag = leader
                .and_then(|l| l.status.lsn)
                .map_or(0, |l| l.bytes_since(s.end));
            self.lag.set(if s.in_recovery { number(lag) } else { 0 });
        }
        let paused = view.and_then(|v| v.pause.as_ref());
        self.paused.set(i64::from(
            paused.is_some_and(|p| p.value.holds_at(o.wall_ms)),
        ));
        self.pending_restart.set(number(o.pending.len() as u64));
        let leader = view.and_then(ClusterView::leader);
        let leaders = leader.and_then(|l| o.peers.get(&l.member));
        let differ = leaders.map_or(0, |p| {
            differences(&o.libraries, &p.status.libraries).len() as u64
        });
        self.library_differences.set(number(differ));
        let remaining = o.lease.map_or(0.0, |l| l.until.since(o.now).as_secs_f64());
        self.lease_remaining.set(remaining);
        let ttl = view.map_or_else(|| o.initial_settings.ttl(), |v| v.settings().ttl());
        let alive = o
            .peers
            .values()
            .filter(|p| o.now.since(p.heard_at) < ttl)
            .count() as u64
            + 1;
        self.members_alive.set(number(alive));
        let mut last = self
            .last
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        self.renewals
            .inc_by(counts.renewed.saturating_sub(last.renewed));
        self.renewal_failures
            .inc_by(counts.failed.saturating_sub(last.failed));
        self.promises
            .inc_by(counts.promised.saturating_sub(last.promised));
        let living = o.promises.living_since;
        self.living
            .set(living.map_or(0.0, |t| o.now.since(t).as_secs_f64()));
        *last = counts;
    }
}

/// The catalogue of this daemon's metrics, for the reference page.
pub fn catalogue() -> Metrics {
    let mut metrics = Metrics::new();
    let _ = AgentMetrics::register(&mut metrics);
    metrics
}

/// Shared handle.
pub type SharedMetrics = Arc<AgentMetrics>;
