//! Before a node stops on SIGTERM: a leader hands over, so that clients of the proxy see a pause and no error.

use std::time::Duration;

use craton_console::views::{StatusView, SwitchoverRequest};
use craton_console::{Client, ClientError};
use craton_trust::Role;

use super::entry::Facts;
use super::plan::API_PORT;
use crate::{certificates, exit};

/// How long asking the own agent may take.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a handover may take where nobody says, seconds.
const LIMIT_DEFAULT: u64 = 5;

/// The longest handover, seconds.
const LIMIT_MAX: u64 = 600;

/// How long a handover may take. On the way to a stop nothing may fail: what cannot be read is the default.
pub fn limit() -> Duration {
    let said = Facts::require()
        .and_then(|facts| {
            let said = facts.env.number::<u64>("STOPPING_TIMEOUT");
            said.map_err(anyhow::Error::msg)
        })
        .map_err(|e| format!("{e:#}"));
    limit_of(said)
}

fn limit_of(said: Result<Option<u64>, String>) -> Duration {
    let seconds = match said {
        Ok(said) => said.unwrap_or(LIMIT_DEFAULT),
        Err(why) => {
            tracing::warn!("{why}: a handover may take {LIMIT_DEFAULT} s");
            LIMIT_DEFAULT
        }
    };
    Duration::from_secs(seconds.min(LIMIT_MAX))
}

/// Hands over if this member leads and another can. Whatever goes wrong, the node stops all the same.
pub async fn run() -> anyhow::Result<u8> {
    let limit = limit();
    let trust = certificates::operator(&Facts::secrets())?;
    let client = Client::trusted(trust, Role::Node);
    let at = format!("127.0.0.1:{API_PORT}");
    let quick = client.clone().with_timeout(ASK_TIMEOUT);
    let status: StatusView = quick.get_json(&at, "/v1/status").await?;
    let me = &status.answered_by;
    let able = |m: &&craton_console::views::MemberView| {
        m.id != *me && m.agent_alive && m.streaming && m.priority > 0 && m.trouble.is_empty()
    };
    if status.leader.as_ref() != Some(me)
        || limit.is_zero()
        || !status.members.iter().any(|m| able(&m))
    {
        return Ok(exit::OK);
    }
    let request = SwitchoverRequest {
        to: None,
        by: Some("the container's stop".to_owned()),
        at_ms: None,
    };
    let asked: Result<serde_json::Value, ClientError> = client
        .with_timeout(limit)
        .post_json(&at, "/v1/switchover", &request)
        .await;
    match asked {
        Ok(_) => tracing::info!("handed the leadership over"),
        Err(error) => tracing::warn!(%error, "the leadership was not handed over before the stop"),
    }
    Ok(exit::OK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_has_a_limit_whatever_is_said() {
        let seconds = |said| limit_of(said).as_secs();
        assert_eq!(seconds(Ok(None)), 5);
        assert_eq!(seconds(Ok(Some(0))), 0);
        assert_eq!(seconds(Ok(Some(60))), 60);
        assert_eq!(seconds(Ok(Some(u64::MAX))), 600);
        assert_eq!(seconds(Err("10s is no number".to_owned())), 5);
        // Outside of a container there are no notes of its start.
        assert_eq!(limit().as_secs(), 5);
    }
}
