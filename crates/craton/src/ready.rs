//! When a local cluster is up: leader, standbys, proxy and backup, in the order in which they come.

use std::time::Duration;

use craton_console::ClientError;
use tokio::time::{Instant, sleep};

use crate::access::Access;
use crate::drill::missing_redundancy;
use crate::exit::{NOT_IN_TIME, Problem};
use crate::layout::{Daemon, Layout};
use crate::output;
use crate::sessions::{Login, value};

/// How long a whole start may take: initdb, clones and the first backup, on a slow disk.
const READY_TIMEOUT: Duration = Duration::from_secs(300);

/// How often is looked.
const POLL: Duration = Duration::from_millis(100);

/// How long one look at the proxy may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// After this long without progress it is said what is waited for.
const QUIET_FOR: Duration = Duration::from_secs(10);

/// Lines of a log that are shown when a start failed.
const LAST_LINES: usize = 12;

/// The stages in the order in which they are reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Leader,
    Standbys,
    Proxy,
    Backup,
}

/// Waits until everything is there, and says so step by step.
pub async fn wait(layout: &Layout) -> anyhow::Result<()> {
    let access = Access::local(layout)?;
    let login = Login::superuser(layout)?;
    let began = Instant::now();
    let mut last_news = began;
    for stage in [Stage::Leader, Stage::Standbys, Stage::Proxy, Stage::Backup] {
        loop {
            let (reached, text) = look(stage, layout, &access, &login).await;
            if reached {
                output::note(format!("  {text} ({})", output::duration(began.elapsed())));
                last_news = Instant::now();
                break;
            }
            if began.elapsed() > READY_TIMEOUT {
                let what = format!(
                    "the cluster is not up after {} s: {text}",
                    READY_TIMEOUT.as_secs()
                );
                return Err(Problem::new(
                    NOT_IN_TIME,
                    what,
                    "the last lines of the logs are above",
                )
                .into());
            }
            if last_news.elapsed() > QUIET_FOR {
                output::note(format!("  still waiting: {text}"));
                last_news = Instant::now();
            }
            sleep(POLL).await;
        }
    }
    Ok(())
}

/// Whether a stage is reached, and the news or what is missing.
async fn look(stage: Stage, layout: &Layout, access: &Access, login: &Login) -> (bool, String) {
    match stage {
        Stage::Leader => match access.status().await {
            Ok(view) if view.writable => {
                let leader = view.leader.map(|l| l.to_string()).unwrap_or_default();
                (true, format!("{leader} leads and accepts writes"))
            }
            Ok(view) => (
                false,
                view.reasons
                    .into_iter()
                    .next()
                    .unwrap_or_else(|| "no leader accepts writes".to_owned()),
            ),
            Err(error) => (false, format!("{error:#}")),
        },
        Stage::Standbys => match access.status().await {
            Ok(view) => match missing_redundancy(&view) {
                None => (
                    true,
                    format!(
                        "{} standbys stream, commits wait for {} of them",
                        view.members.len().saturating_sub(1),
                        view.sync.acks
                    ),
                ),
                Some(why) => (false, why),
            },
            Err(error) => (false, format!("{error:#}")),
        },
        Stage::Proxy => {
            for port in [layout.proxy_port(), layout.proxy_read_port()] {
                let asked = async { value(&login.connect(port).await?, "SELECT 1").await };
                let late = |_| Err(anyhow::anyhow!("no answer in time"));
                let answer = async {
                    tokio::time::timeout(LOOK_TIMEOUT, asked)
                        .await
                        .unwrap_or_else(late)
                };
                if let Err(error) = answer.await {
                    return (
                        false,
                        format!("the proxy does not answer on port {port}: {error:#}"),
                    );
                }
            }
            (
                true,
                "the proxy answers for writes and for reads".to_owned(),
            )
        }
        Stage::Backup => {
            let daemon = match crate::backup::Daemon::local(layout) {
                Ok(daemon) => daemon,
                Err(error) => return (false, format!("{error:#}")),
            };
            match daemon.health().await {
                Ok(_) => (true, "the backup daemon is at work".to_owned()),
                Err(ClientError::Refused { error, .. }) => {
                    (false, format!("the backup daemon is not ready: {error}"))
                }
                Err(error) => (false, format!("the backup daemon does not answer: {error}")),
            }
        }
    }
}

/// The ends of the logs, for someone whose cluster did not start.
pub fn last_words(layout: &Layout) -> String {
    let mut names = vec![crate::supervise::NAME.to_owned()];
    names.extend(layout.daemons().iter().map(Daemon::name));
    let mut text = String::new();
    for name in names {
        let path = layout.log_of(&name);
        let Ok(log) = std::fs::read(&path) else {
            continue;
        };
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().rev().take(LAST_LINES).collect();
        if !lines.is_empty() {
            text.push_str("--- ");
            text.push_str(&path.display().to_string());
            text.push('\n');
            for line in lines.into_iter().rev() {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}
