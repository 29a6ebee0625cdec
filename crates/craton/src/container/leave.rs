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

/// How long a handover may take.
pub fn limit() -> anyhow::Result<Duration> {
    let seconds = Facts::require()?.env.number::<u64>("STOPPING_TIMEOUT");
    let seconds = seconds.map_err(anyhow::Error::msg)?.unwrap_or(5);
    Ok(Duration::from_secs(seconds.min(600)))
}

/// Hands over if this member leads and another can. Whatever goes wrong, the node stops all the same.
pub async fn run() -> anyhow::Result<u8> {
    let limit = limit()?;
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
