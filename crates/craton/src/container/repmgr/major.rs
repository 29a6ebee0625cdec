//! `is_major_master.sh`: a node that takes itself for the primary and is not says so. Standbys, and the primary at whatever
//! it does with its lease in its hand, answer 0: a liveness probe must not end them.

use std::time::Duration;

use craton_console::views::StatusView;
use craton_core::MemberId;

use super::{access, own_member};
use crate::container::environment::Kind;
use crate::container::{first_start, side};
use crate::{exit, output};

/// How long the agent, and PostgreSQL, may take to answer.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// An agent whose loop hangs for longer renews no lease (its own limit, or two ttls): what it last saw of one counts
/// no more.
const HANGS_MAX_MS: u64 = 5_000;

/// What a node is, and why: `Err` where it takes itself for the primary and is not, or cannot know.
type Verdict = Result<String, String>;

/// `is_major_master.sh`: 1 when this node believes to be the primary and is not, or cannot know.
pub async fn is_major() -> anyhow::Result<u8> {
    let me = own_member()?;
    let client = access()?.client().clone().with_timeout(ASK_TIMEOUT);
    let at = side::daemon_address(Kind::Node);
    let own: Option<StatusView> = client.get_json(&at, "/v1/status").await.ok();
    let now_ms = u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or(0);
    let verdict = judge(own.as_ref(), &me, accepts_writes().await, now_ms);
    Ok(match verdict {
        Ok(text) => {
            output::line(format!(">>> {text}"));
            exit::OK
        }
        Err(text) => {
            output::line(format!(">>> False primary: {text}"));
            exit::FAILURE
        }
    })
}

/// The lease decides, not the record of who leads: a member that is cut off has no newer record than its own leadership.
fn judge(own: Option<&StatusView>, me: &MemberId, writes: bool, now_ms: u64) -> Verdict {
    let Some(status) = own else {
        return if writes {
            Err("PostgreSQL takes writes here, and its agent does not answer".to_owned())
        } else {
            Ok("not the primary: PostgreSQL takes no writes here".to_owned())
        };
    };
    let lease = &status.lease;
    let age_ms = now_ms.saturating_sub(status.at_ms);
    let hangs_ms = HANGS_MAX_MS.max(lease.ttl_ms.saturating_mul(2));
    let fresh = age_ms <= hangs_ms.saturating_add(lease.ttl_ms);
    // An agent that was just started again holds the lease of its former life, and knows no term yet.
    let term = lease.held_term.filter(|term| *term >= status.term);
    let left = lease.remaining_ms.filter(|ms| *ms > 0 && fresh);
    if let (Some(term), Some(left)) = (term, left) {
        let how = match lease.promises_ms {
            Some(_) => " (on the promises of standbys)",
            None => "",
        };
        return Ok(format!(
            "the primary: it leads term {term}, {left} ms of its lease left{how}"
        ));
    }
    if status.leader.as_ref() == Some(me) {
        return Err(format!(
            "as far as it knows it leads term {}, but no lease runs: it is cut off, or another is about to lead",
            status.term
        ));
    }
    match (&status.leader, writes) {
        (Some(leader), true) => Err(format!(
            "PostgreSQL takes writes here, and {leader} leads term {}",
            status.term
        )),
        (None, true) => Err("PostgreSQL takes writes here, and no lease runs".to_owned()),
        (Some(leader), false) => Ok(format!("not the primary: {leader} leads")),
        (None, false) => Ok("not the primary".to_owned()),
    }
}

async fn accepts_writes() -> bool {
    let look = async {
        let client = first_start::session("postgres").await?;
        let row = client.query_one("SELECT pg_is_in_recovery()", &[]).await?;
        anyhow::Ok(!row.try_get::<_, bool>(0)?)
    };
    matches!(tokio::time::timeout(ASK_TIMEOUT, look).await, Ok(Ok(true)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000_000;

    /// What the agent of `a` says: who leads term 5, the term of its own lease and what is left of that.
    fn seen(leader: Option<&str>, lease: Option<(u64, u64)>, open: bool) -> StatusView {
        serde_json::from_value(serde_json::json!({
            "cluster": "t", "answered_by": "a", "term": 5, "revision": 9, "leader": leader, "writable": open,
            "durability": "quorum", "sync": {"members": ["b"], "acks": 1, "in_force": true},
            "lease": {"holder": leader, "remaining_ms": lease.map(|l| l.1), "held_term": lease.map(|l| l.0),
                      "ttl_ms": 2000, "heartbeat_ms": 300},
            "hold": false, "next": "", "election": null, "members": [], "at_ms": NOW - 100
        }))
        .unwrap()
    }

    fn is_fine(status: Option<&StatusView>, writes: bool) -> bool {
        judge(status, &MemberId::new("a").unwrap(), writes, NOW).is_ok()
    }

    #[test]
    fn a_leader_with_its_lease_is_the_primary_whatever_it_is_at() {
        // Open; closed after a start in place; recovering, or stopped for a handover: PostgreSQL takes no writes.
        for (open, writes) in [(true, true), (false, true), (false, false), (true, false)] {
            let status = seen(Some("a"), Some((5, 900)), open);
            assert!(is_fine(Some(&status), writes), "{open} {writes}");
        }
        let mut promised = seen(Some("a"), Some((5, 900)), true);
        promised.lease.promises_ms = Some(30_000);
        assert!(is_fine(Some(&promised), true));
        // The agent was killed and is back: the lease of its former life, and nothing known of the cluster yet.
        let mut back = seen(None, Some((5, 900)), false);
        back.term = craton_core::Term::default();
        assert!(is_fine(Some(&back), true));
    }

    #[test]
    fn a_former_primary_that_is_cut_off_knows_it() {
        // Its last record says that it leads and is open; its PostgreSQL was stopped, or runs as a standby.
        for lease in [None, Some((5, 0))] {
            let status = seen(Some("a"), lease, true);
            assert!(!is_fine(Some(&status), false), "{lease:?}");
            assert!(!is_fine(Some(&status), true), "{lease:?}");
        }
        // Its agent hangs, and would show a lease for ever.
        let hangs = seen(Some("a"), Some((5, 900)), true);
        let me = MemberId::new("a").unwrap();
        assert!(judge(Some(&hangs), &me, false, NOW + 10_000).is_err());
    }

    #[test]
    fn after_that_it_is_a_standby_and_only_writes_would_be_wrong() {
        let status = seen(Some("b"), None, true);
        assert!(is_fine(Some(&status), false));
        assert!(!is_fine(Some(&status), true));
        // A lease of an earlier term is none.
        let old = seen(Some("b"), Some((4, 900)), true);
        assert!(!is_fine(Some(&old), true));
        let electing = seen(None, Some((4, 900)), false);
        assert!(is_fine(Some(&electing), false));
        assert!(!is_fine(Some(&electing), true));
    }

    #[test]
    fn without_an_agent_only_postgresql_tells() {
        assert!(is_fine(None, false));
        assert!(!is_fine(None, true));
    }
}
