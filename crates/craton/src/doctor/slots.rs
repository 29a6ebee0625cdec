//! The check of logical replication slots.

use craton_console::views::SlotView;

use super::checks::found;
use super::facts::Facts;
use super::{Finding, Severity};

/// Slots that a failover would end, or has ended.
pub(super) fn slots(f: &Facts) -> Vec<Finding> {
    let leader = f.status.leader.as_ref();
    let standbys = f.status.members.iter().filter(|m| Some(&m.id) != leader);
    let heirs: Vec<_> = standbys.filter(|m| m.priority > 0).map(|m| &m.id).collect();
    let judge = |s: &SlotView| {
        let without: Vec<&str> = heirs
            .iter()
            .filter(|m| !s.survives_on.contains(m))
            .map(|m| m.as_str())
            .collect();
        let (severity, what, todo) = if s.lost {
            (
                Severity::Critical,
                "it did not survive the last failover".to_owned(),
                "make it anew, and let its consumer begin with a new snapshot",
            )
        } else if s.failover == Some(false) {
            (
                Severity::Warning,
                "it was made without failover, so that it ends with this leader".to_owned(),
                "make it with failover => true (a subscription: WITH (failover = true))",
            )
        } else if without.is_empty() {
            return None;
        } else {
            (
                Severity::Warning,
                format!(
                    "it would not survive a failover to {}",
                    without.join(" or ")
                ),
                "a copy is made within a minute, and counts once its consumer has gone on; the agent's log there says what it waits for",
            )
        };
        let place = format!("slot {}", s.name);
        Some(found("slots", severity, place, what, todo))
    };
    f.status.slots.iter().filter_map(judge).collect()
}
