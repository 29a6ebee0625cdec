//! `craton pause`, `resume`, `restart`, `reload`, `reinit`: work on a cluster that stays up.

use std::time::Duration;

use clap::Args;
use craton_console::views::{
    AskRequest, DoneView, HistoryView, PauseRequest, ReinitRequest, RestartRequest, RestartView,
    StatusView,
};
use craton_core::MemberId;
use serde::Serialize;
use tokio::time::Instant;

use crate::access::Access;
use crate::ask;
use crate::exit::{self, Problem};
use crate::output;

/// How long an agent may take to write a wish down.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
/// An agent that runs and reaches the coordinator hears of a pause within a fraction of this.
const PAUSE_KNOWN_MAX: Duration = Duration::from_secs(5);
/// How often something that goes on is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(300);
/// A restart is followed for this long for each member; the cluster itself gives up before.
const RESTART_MEMBER_MAX: Duration = Duration::from_secs(240);
/// A copy is followed for this long; it goes on by itself.
const REINIT_MAX: Duration = Duration::from_secs(24 * 3600);

/// `craton pause`
#[derive(Args, Debug)]
pub struct PauseArgs {
    /// End by itself after this time (90s, 30min, 2h) [default: when somebody runs craton resume]
    #[arg(long = "for", value_name = "TIME")]
    pub time: Option<String>,
    /// Why; shown in status and history
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

/// `craton restart`
#[derive(Args, Debug)]
pub struct RestartArgs {
    /// Whom to restart
    #[arg(value_name = "MEMBER")]
    pub members: Vec<MemberId>,
    /// Every member: standbys one at a time, then the leader after a switchover
    #[arg(long, conflicts_with = "members")]
    pub all: bool,
    /// Only those that have parameters waiting for a restart
    #[arg(long)]
    pub pending: bool,
    /// Stop the restart that is in progress: nobody further is restarted
    #[arg(long, conflicts_with_all = ["members", "all", "pending"])]
    pub cancel: bool,
    /// Do not wait for its end; it goes on by itself, and craton status shows how far it is
    #[arg(long)]
    pub no_wait: bool,
}

/// `craton reload`
#[derive(Args, Debug)]
pub struct ReloadArgs {
    /// Whom
    #[arg(value_name = "MEMBER", required_unless_present = "all")]
    pub members: Vec<MemberId>,
    /// Every member
    #[arg(long, conflicts_with = "members")]
    pub all: bool,
}

/// `craton reinit`
#[derive(Args, Debug)]
pub struct ReinitArgs {
    /// Whose data directory is thrown away and cloned anew
    pub member: MemberId,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    /// Do not wait for the copy
    #[arg(long)]
    pub no_wait: bool,
}

/// A length of time as people write it: `90s`, `30min`, `2h`, `1d 6h`.
fn length(text: &str) -> anyhow::Result<Duration> {
    let wrong = || {
        Problem::new(
            exit::USAGE,
            format!("\"{text}\" is not a length of time"),
            "write 90s, 30min, 2h or the like",
        )
    };
    let days = text
        .trim()
        .strip_suffix('d')
        .and_then(|d| d.trim().parse::<u32>().ok());
    if let Some(days) = days {
        return Ok(Duration::from_secs(u64::from(days) * 86_400));
    }
    let parsed: jiff::SignedDuration = text.parse().map_err(|_| wrong())?;
    Ok(Duration::try_from(parsed).map_err(|_| wrong())?)
}

/// Writes a wish down through the leader's agent, or any other's.
async fn tell(access: &Access, path: &str, body: &impl Serialize) -> anyhow::Result<DoneView> {
    let status = access.status().await?;
    let first = ask::leader_api(&status);
    access.post(first.as_deref(), path, body, ASK_TIMEOUT).await
}

fn report(done: &DoneView, json: bool) -> anyhow::Result<u8> {
    if json {
        output::json(done)?;
    } else {
        output::line(&done.text);
    }
    Ok(exit::OK)
}

fn asked() -> AskRequest {
    AskRequest {
        by: Some(ask::who()),
    }
}

/// Runs `craton pause`.
pub async fn pause(access: &Access, args: PauseArgs, json: bool) -> anyhow::Result<u8> {
    let length = args.time.as_deref().map(length).transpose()?;
    let request = PauseRequest {
        for_ms: length.map(|l| u64::try_from(l.as_millis()).unwrap_or(u64::MAX)),
        reason: args.reason,
        by: Some(ask::who()),
    };
    let done = tell(access, "/v1/pause", &request).await?;
    for member in not_yet_paused(access).await {
        output::note(format!(
            "the agent of {member} has not said that it knows of the pause: until it hears of it, it acts as before"
        ));
    }
    report(&done, json)
}

/// Waits until the agent of every member knows of the pause, for what is done by hand right after the command must
/// find it in force: an agent that has not heard of it would still take over from a PostgreSQL that is stopped then.
/// Returns the members whose agents did not say so in time. Those that are known to be down are not waited for.
async fn not_yet_paused(access: &Access) -> Vec<MemberId> {
    let deadline = Instant::now() + PAUSE_KNOWN_MAX;
    loop {
        let Ok(status) = access.status().await else {
            if Instant::now() >= deadline {
                return Vec::new();
            }
            tokio::time::sleep(LOOK_EVERY).await;
            continue;
        };
        let agents: Vec<String> = status.members.iter().map(|m| m.api.clone()).collect();
        let answers = access.statuses_of(&agents).await;
        let know: Vec<MemberId> = answers
            .into_iter()
            .flatten()
            .filter(|s| s.paused.is_some())
            .map(|s| s.answered_by)
            .collect();
        let left = || status.members.iter().filter(|m| !know.contains(&m.id));
        if !left().any(|m| m.agent_alive) || Instant::now() >= deadline {
            return left().map(|m| m.id.clone()).collect();
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Runs `craton resume`.
pub async fn resume(access: &Access, json: bool) -> anyhow::Result<u8> {
    report(&tell(access, "/v1/resume", &asked()).await?, json)
}

/// Runs `craton switchover --cancel`.
pub async fn cancel_switchover(access: &Access, json: bool) -> anyhow::Result<u8> {
    report(
        &tell(access, "/v1/switchover/cancel", &asked()).await?,
        json,
    )
}

/// Runs `craton restart`.
pub async fn restart(access: &Access, args: RestartArgs, json: bool) -> anyhow::Result<u8> {
    if args.cancel {
        return report(&tell(access, "/v1/restart/cancel", &asked()).await?, json);
    }
    if args.members.is_empty() && !args.all {
        return Err(Problem::new(
            exit::USAGE,
            "whom to restart is not said",
            "name members, or --all for every one of them",
        )
        .into());
    }
    let request = RestartRequest {
        members: args.members,
        pending: args.pending,
        by: Some(ask::who()),
    };
    let done = tell(access, "/v1/restart", &request).await?;
    let Some(id) = done.id.filter(|_| !args.no_wait) else {
        return report(&done, json);
    };
    output::note(&done.text);
    tokio::select! {
        end = follow_restart(access, id) => report_end(&end?, json),
        _ = tokio::signal::ctrl_c() => {
            output::note("the restart goes on by itself; craton restart --cancel stops it");
            Ok(exit::OK)
        }
    }
}

/// How a restart ended: the kind of its last event, and what it says.
#[derive(Debug, Serialize)]
struct RestartEnd {
    kind: String,
    text: String,
}

fn report_end(end: &RestartEnd, json: bool) -> anyhow::Result<u8> {
    if json {
        output::json(end)?;
    } else {
        output::line(&end.text);
    }
    Ok(match end.kind.as_str() {
        "restart_done" => exit::OK,
        "cancelled" => exit::REFUSED,
        _ => exit::NOT_IN_TIME,
    })
}

async fn follow_restart(access: &Access, id: u64) -> anyhow::Result<RestartEnd> {
    let mut deadline = Instant::now() + RESTART_MEMBER_MAX;
    let mut shown = None;
    let mut left = usize::MAX;
    loop {
        // In the middle of a switchover nobody may answer: that is no reason to stop looking.
        let status = access.status().await.ok();
        let view = status
            .as_ref()
            .map(|s| s.restart.as_ref().filter(|r| r.id == id));
        if let Some(Some(view)) = view {
            if view.left.len() < left {
                left = view.left.len();
                deadline = Instant::now() + RESTART_MEMBER_MAX;
            }
            let line = progress(view);
            if shown.as_ref() != Some(&line) {
                output::note(&line);
                shown = Some(line);
            }
        }
        if let (Some(None), Some(status)) = (view, &status)
            && let Some(end) = end_of(access, status, id).await
        {
            return Ok(end);
        }
        if Instant::now() >= deadline {
            return Err(Problem::new(
                exit::NOT_IN_TIME,
                format!("restart {id} makes no progress"),
                "craton explain says what it waits for; craton restart --cancel stops it",
            )
            .into());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn names(members: &[MemberId]) -> String {
    let names: Vec<&str> = members.iter().map(MemberId::as_str).collect();
    names.join(", ")
}

fn progress(view: &RestartView) -> String {
    match (view.under_way.is_empty(), view.left.is_empty()) {
        (false, _) => format!(
            "restarting {} (left: {})",
            names(&view.under_way),
            names(&view.left)
        ),
        (true, false) => format!("left: {}", names(&view.left)),
        (true, true) => "all are restarted".to_owned(),
    }
}

/// What the history says of a restart's end. None if the answering agent has not heard of its beginning yet.
async fn end_of(access: &Access, status: &StatusView, id: u64) -> Option<RestartEnd> {
    let api = ask::leader_api(status)?;
    let history: HistoryView = access.client().get_json(&api, "/v1/history").await.ok()?;
    let begins = format!("restart {id} ");
    let event = history.events.into_iter().rev().find(|e| {
        ["restart_done", "restart_stopped", "cancelled"].contains(&e.kind.as_str())
            && e.text.starts_with(&begins)
    })?;
    Some(RestartEnd {
        kind: event.kind,
        text: event.text,
    })
}

/// Runs `craton reload`.
pub async fn reload(access: &Access, args: ReloadArgs, json: bool) -> anyhow::Result<u8> {
    let status = access.status().await?;
    let mut answers = Vec::new();
    let mut failed = false;
    for name in &args.members {
        known(&status, name)?;
    }
    let chosen = status
        .members
        .iter()
        .filter(|m| args.all || args.members.contains(&m.id));
    for member in chosen {
        let client = access.client().clone().with_timeout(ASK_TIMEOUT);
        let answer = client
            .post_json::<_, DoneView>(&member.api, "/v1/reload", &asked())
            .await;
        match answer {
            Ok(done) => answers.push(done),
            Err(error) => {
                failed = true;
                answers.push(DoneView {
                    text: format!("{} was not told: {error}", member.id),
                    id: None,
                });
            }
        }
    }
    if json {
        output::json(&answers)?;
    } else {
        for answer in &answers {
            output::line(&answer.text);
        }
    }
    Ok(if failed { exit::FAILURE } else { exit::OK })
}

fn known(status: &StatusView, member: &MemberId) -> anyhow::Result<()> {
    if status.members.iter().any(|m| m.id == *member) {
        return Ok(());
    }
    let ids: Vec<&str> = status.members.iter().map(|m| m.id.as_str()).collect();
    Err(Problem::new(
        exit::USAGE,
        format!("there is no member \"{member}\" in this cluster"),
        format!("its members are {}", ids.join(", ")),
    )
    .into())
}

/// Runs `craton reinit`.
pub async fn reinit(access: &Access, args: ReinitArgs, json: bool) -> anyhow::Result<u8> {
    let status = access.status().await?;
    known(&status, &args.member)?;
    let before = life(&status, &args.member);
    ask::must_be_meant(
        args.yes,
        &format!(
            "the data directory of {} is deleted, and copied anew from another member",
            args.member
        ),
    )?;
    let request = ReinitRequest {
        member: args.member.clone(),
        by: Some(ask::who()),
    };
    let done = tell(access, "/v1/reinit", &request).await?;
    if args.no_wait {
        return report(&done, json);
    }
    output::note(&done.text);
    tokio::select! {
        end = follow_reinit(access, &args.member, before.as_deref()) => report(&end?, json),
        _ = tokio::signal::ctrl_c() => {
            output::note("the copy goes on by itself; see craton status");
            Ok(exit::OK)
        }
    }
}

fn life(status: &StatusView, member: &MemberId) -> Option<String> {
    let view = status.members.iter().find(|m| m.id == *member)?;
    view.incarnation.map(|i| i.to_string())
}

async fn follow_reinit(
    access: &Access,
    member: &MemberId,
    before: Option<&str>,
) -> anyhow::Result<DoneView> {
    let deadline = Instant::now() + REINIT_MAX;
    let mut shown = String::new();
    while Instant::now() < deadline {
        if let Ok(status) = access.status().await {
            let view = status.members.iter().find(|m| m.id == *member);
            let born = life(&status, member);
            if let Some(view) = view {
                if view.order.is_none() && view.streaming && born.as_deref() != before {
                    let text = format!("{member} is cloned anew and streams");
                    return Ok(DoneView { text, id: None });
                }
                if view.state != shown {
                    output::note(format!("{member}: {}", view.state));
                    shown.clone_from(&view.state);
                }
                refused(
                    access,
                    &status,
                    member,
                    view.order.is_some() || born.as_deref() != before,
                )
                .await?;
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Err(Problem::new(
        exit::NOT_IN_TIME,
        format!(
            "{member} is not cloned after {} h",
            REINIT_MAX.as_secs() / 3600
        ),
        "craton explain says what it waits for",
    )
    .into())
}

/// The member refused after all (it leads by now): the order is gone, and it has the life it had.
async fn refused(
    access: &Access,
    status: &StatusView,
    member: &MemberId,
    going_on: bool,
) -> anyhow::Result<()> {
    let Some(api) = ask::leader_api(status).filter(|_| !going_on) else {
        return Ok(());
    };
    let history: HistoryView = access.client().get_json(&api, "/v1/history").await?;
    let begins = format!("reinit of {member}");
    let last = history
        .events
        .into_iter()
        .rev()
        .find(|e| e.text.starts_with(&begins));
    match last {
        Some(event) if event.kind == "refused" => Err(Problem::new(
            exit::REFUSED,
            event.text,
            "nothing was deleted; see craton status",
        )
        .into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time() {
        for (text, seconds) in [("90s", 90), ("30min", 1800), ("2h", 7200), ("1d", 86_400)] {
            assert_eq!(
                length(text).unwrap(),
                Duration::from_secs(seconds),
                "{text}"
            );
        }
        for wrong in ["", "2", "soon", "-3h"] {
            assert!(length(wrong).is_err(), "{wrong}");
        }
    }
}
