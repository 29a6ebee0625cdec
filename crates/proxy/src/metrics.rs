//! What the proxy counts.

use std::cell::Cell;

use craton_console::Metrics;
use craton_console::metrics::SECONDS_BUCKETS;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

/// Handles of all metrics.
#[derive(Debug)]
pub struct ProxyMetrics {
    /// Clients that are connected.
    pub clients: Gauge,
    /// Clients ever accepted.
    pub clients_accepted: Counter,
    /// Clients refused because there were too many.
    pub clients_refused: Counter,
    /// Server connections that are open.
    pub servers: Gauge,
    /// Server connections ever made.
    pub servers_opened: Counter,
    /// Attempts to connect to a server that failed.
    pub servers_failed: Counter,
    /// Clients that wait for a server connection or for a primary.
    pub waiting: Gauge,
    /// How long they waited.
    pub wait_seconds: Histogram,
    /// Transactions that ended.
    pub transactions: Counter,
    /// Queries and executions.
    pub queries: Counter,
    /// Bytes passed on to servers.
    pub bytes_to_servers: Counter,
    /// Bytes passed on to clients.
    pub bytes_to_clients: Counter,
    /// Transactions that had to wait for a primary.
    pub failover_waits: Counter,
    /// Of these, the ones that waited in vain.
    pub failover_wait_timeouts: Counter,
    /// Statements answered with 08007.
    pub unknown_outcomes: Counter,
    /// Sessions whose state was lost with its server.
    pub states_lost: Counter,
    /// Sessions that are pinned to their server.
    pub pinned: Gauge,
    /// Logins that failed.
    pub auth_failures: Counter,
    /// Cancel requests passed on.
    pub cancels: Counter,
    /// Cancel requests that would have ended a wait for standbys.
    pub cancels_withheld: Counter,
    /// 1 while there is a primary.
    pub primary_known: Gauge,
    /// Standbys that take reads.
    pub standbys: Gauge,
}

impl ProxyMetrics {
    /// Registers all of them.
    pub fn register(m: &mut Metrics) -> Self {
        Self {
            clients: m.gauge("craton_proxy_clients", "Clients that are connected."),
            clients_accepted: m.counter("craton_proxy_clients_accepted", "Clients accepted since the start."),
            clients_refused: m.counter("craton_proxy_clients_refused", "Clients refused because of `clients_max`."),
            servers: m.gauge("craton_proxy_servers", "Server connections that are open."),
            servers_opened: m.counter("craton_proxy_servers_opened", "Server connections made since the start."),
            servers_failed: m.counter("craton_proxy_servers_failed", "Attempts to connect to a server that failed."),
            waiting: m.gauge("craton_proxy_waiting", "Clients that wait for a server connection or for a primary."),
            wait_seconds: m.histogram(
                "craton_proxy_wait_seconds",
                "How long transactions waited before they began, in seconds; those that did not wait are not in it.",
                &SECONDS_BUCKETS,
            ),
            transactions: m.counter("craton_proxy_transactions", "Transactions that ended."),
            queries: m.counter("craton_proxy_queries", "Simple queries and executions of prepared ones."),
            bytes_to_servers: m.counter("craton_proxy_bytes_to_servers", "Bytes passed on from clients to servers."),
            bytes_to_clients: m.counter("craton_proxy_bytes_to_clients", "Bytes passed on from servers to clients."),
            failover_waits: m.counter(
                "craton_proxy_failover_waits",
                "Transactions that waited because there was no target, or because a switchover held them.",
            ),
            failover_wait_timeouts: m.counter(
                "craton_proxy_failover_wait_timeouts",
                "Transactions that waited for `failover_wait_ms` in vain and failed with 57P03.",
            ),
            unknown_outcomes: m.counter(
                "craton_proxy_unknown_outcomes",
                "Statements answered with 08007, because the server was lost or the commit was not confirmed.",
            ),
            states_lost: m.counter(
                "craton_proxy_session_states_lost",
                "Pinned sessions whose state (LISTEN, temporary tables, settings, locks) was lost with its server.",
            ),
            pinned: m.gauge("craton_proxy_pinned", "Sessions that are pinned to their server connection."),
            auth_failures: m.counter("craton_proxy_auth_failures", "Logins of clients that failed."),
            cancels: m.counter("craton_proxy_cancels", "Cancel requests passed on to servers."),
            cancels_withheld: m.counter("craton_proxy_cancels_withheld", "Cancel requests not passed on: what runs is committed and waits for standbys."),
            primary_known: m.gauge("craton_proxy_primary_known", "1 while there is a primary for writes, else 0."),
            standbys: m.gauge("craton_proxy_standbys", "Standbys that take new read transactions."),
        }
    }
}

/// What is counted for every query, kept by one worker and added up from time to time: counters that all cores write
/// would travel between them with every query.
#[derive(Debug, Default)]
pub struct Tally {
    /// Transactions that ended.
    pub transactions: Cell<u64>,
    /// Queries and executions.
    pub queries: Cell<u64>,
    /// Bytes passed on to servers.
    pub bytes_to_servers: Cell<u64>,
    /// Bytes passed on to clients.
    pub bytes_to_clients: Cell<u64>,
}

impl Tally {
    /// Adds `n` to a cell.
    pub fn add(cell: &Cell<u64>, n: u64) {
        cell.set(cell.get().wrapping_add(n));
    }

    /// Moves everything into the metrics.
    pub fn flush(&self, metrics: &ProxyMetrics) {
        metrics.transactions.inc_by(self.transactions.take());
        metrics.queries.inc_by(self.queries.take());
        metrics
            .bytes_to_servers
            .inc_by(self.bytes_to_servers.take());
        metrics
            .bytes_to_clients
            .inc_by(self.bytes_to_clients.take());
    }
}
