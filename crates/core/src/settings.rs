//! Cluster-wide settings: what the operator chose, kept in the coordinator, the same for every member.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Which copies must exist before a client hears "committed" (failover protocol, section 3).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Flushed on the leader. A failover may lose the tail not yet received, at most `max_lag_bytes`.
    Async,
    /// Flushed on the leader and on k members of the sync set. A failover loses nothing acknowledged.
    #[default]
    Quorum,
}

impl std::fmt::Display for Durability {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Async => "async",
            Self::Quorum => "quorum",
        })
    }
}

/// Cluster-wide settings. Times are milliseconds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// How long a lease lasts after its renewal was sent.
    pub ttl_ms: u64,
    /// How often the leader renews its lease and every member announces itself.
    pub heartbeat_ms: u64,
    /// Durability mode.
    pub durability: Durability,
    /// How many members of the sync set must have flushed a commit (k). Lowered to the number of
    /// standbys that are there.
    pub sync_standbys: u32,
    /// In `async`: a standby further behind the last known position of the leader is never promoted
    /// automatically. Bytes.
    pub max_lag_bytes: u64,
    /// A standby that has not streamed, or has not flushed anything new while there was something to
    /// flush, for this long leaves the sync set.
    pub standby_grace_ms: u64,
    /// A planned switchover waits at most this long for running transactions to end.
    pub switchover_wait_ms: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ttl_ms: 2000,
            heartbeat_ms: 300,
            durability: Durability::Quorum,
            sync_standbys: 1,
            max_lag_bytes: 16 << 20,
            standby_grace_ms: 2000,
            switchover_wait_ms: 3000,
        }
    }
}

impl Settings {
    /// The lease's length.
    pub fn ttl(&self) -> Duration {
        Duration::from_millis(self.ttl_ms)
    }

    /// What the leader's own deadline keeps away from the lease's end: a tenth of it, so that clock
    /// *rates* may differ by that much (failover protocol, 2.2).
    pub fn margin(&self) -> Duration {
        Duration::from_millis(self.ttl_ms.div_ceil(10))
    }

    /// The renewal interval.
    pub fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms)
    }

    /// Says what is wrong with the settings, if anything.
    pub fn validate(&self) -> Result<(), String> {
        if self.ttl_ms < 500 || self.ttl_ms > 600_000 {
            return Err(format!(
                "ttl_ms = {} is out of range: use 500 to 600000 (milliseconds)",
                self.ttl_ms
            ));
        }
        if self.heartbeat_ms < 50 || self.heartbeat_ms.saturating_mul(3) > self.ttl_ms {
            return Err(format!(
                "heartbeat_ms = {} does not fit ttl_ms = {}: use at least 50 and at most a third of the ttl, so that one lost renewal is not a failover",
                self.heartbeat_ms, self.ttl_ms
            ));
        }
        if self.sync_standbys == 0 {
            return Err("sync_standbys = 0 means no synchronous standby: set durability = \"async\" instead".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_the_margin_is_a_tenth() {
        let s = Settings::default();
        s.validate().unwrap();
        assert_eq!(s.margin(), Duration::from_millis(200));
    }

    #[test]
    fn one_lost_renewal_must_not_cost_the_lease() {
        let s = Settings {
            heartbeat_ms: 900,
            ..Settings::default()
        };
        assert!(s.validate().unwrap_err().contains("a third of the ttl"));
    }
}
