//! `craton switchover` and `craton failover`: changes of leadership that somebody asks for.

use std::time::Duration;

use craton_console::views::{ChangeView, FailoverRequest, SwitchoverRequest};
use craton_core::MemberId;
use serde::Serialize;

use crate::access::Access;
use crate::exit;
use crate::output::{self, Colour, paint};

/// The longest a change may take before the command stops waiting (the cluster goes on by itself).
pub const CHANGE_TIMEOUT: Duration = Duration::from_secs(60);

/// Runs `craton switchover`.
pub async fn switchover(access: &Access, to: Option<MemberId>, json: bool) -> anyhow::Result<u8> {
    report(&ask_switchover(access, to).await?, json)
}

/// Asks the leader to hand over, and waits until it has.
pub async fn ask_switchover(access: &Access, to: Option<MemberId>) -> anyhow::Result<ChangeView> {
    let request = SwitchoverRequest {
        to,
        by: Some(crate::ask::who()),
        at_ms: None,
    };
    ask(access, "/v1/switchover", &request).await
}

/// Runs `craton failover`.
pub async fn failover(
    access: &Access,
    to: Option<MemberId>,
    allow_data_loss: bool,
    json: bool,
) -> anyhow::Result<u8> {
    report(
        &ask(
            access,
            "/v1/failover",
            &FailoverRequest {
                to,
                allow_data_loss,
                by: Some(crate::ask::who()),
            },
        )
        .await?,
        json,
    )
}

/// Asks the leader's agent first: it need not pass the request on.
async fn ask(access: &Access, path: &str, request: &impl Serialize) -> anyhow::Result<ChangeView> {
    let status = access.status().await?;
    let leader = status
        .leader
        .and_then(|leader| status.members.into_iter().find(|m| m.id == leader));
    let first = leader.filter(|m| m.agent_alive).map(|m| m.api);
    access
        .post(first.as_deref(), path, request, CHANGE_TIMEOUT)
        .await
}

fn report(view: &ChangeView, json: bool) -> anyhow::Result<u8> {
    if json {
        output::json(view)?;
    } else {
        let took = output::duration(Duration::from_millis(view.took_ms));
        let leader = paint(Colour::Cyan, view.leader.as_str());
        output::line(format!(
            "{leader} leads in term {} (took {took})",
            view.term
        ));
        if !view.text.is_empty() {
            output::line(&view.text);
        }
    }
    Ok(exit::OK)
}
