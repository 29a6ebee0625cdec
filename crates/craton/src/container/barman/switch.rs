//! `barman switch-wal`: closes the leader's WAL segment; with `--archive` it waits until the repository has it.

use std::time::Duration;

use anyhow::Context as _;
use craton_backup::views::BackupStatusView;
use craton_console::Client;
use craton_core::topology::{Topology, TopologyMember};
use craton_core::{Lsn, TimelineId};
use craton_trust::Role;
use tokio::time::Instant;

use super::{server, view};
use crate::cli::wait_for;
use crate::container::entry::Facts;
use crate::container::options::Line;
use crate::exit::{self, NOT_IN_TIME, Problem, USAGE};
use crate::{certificates, output};

/// How often the daemon is asked how far it is.
const WATCH_EVERY: Duration = Duration::from_millis(300);
/// barman's `--archive-timeout` where nobody chose.
const ARCHIVE_DEFAULT: Duration = Duration::from_secs(30);

/// One row: the name of the segment that was closed, the position behind its last record, the size of segments.
const SWITCH: &str = "\
WITH s AS MATERIALIZED (SELECT pg_switch_wal() AS l) \
SELECT pg_walfile_name(l), l::text, pg_size_bytes(current_setting('wal_segment_size')) FROM s";

/// What the repository is to have.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Goal {
    /// In words.
    what: String,
    lsn: Lsn,
    timeline: Option<TimelineId>,
}

impl Goal {
    fn is_reached(&self, status: &BackupStatusView) -> bool {
        status.flushed_lsn >= self.lsn && self.timeline.is_none_or(|t| status.timeline >= t)
    }
}

/// Runs it.
pub fn run(facts: &Facts, line: &Line) -> anyhow::Result<u8> {
    let limit = limit(line)?;
    wait_for(async {
        let leader = leader(facts).await?;
        let goal = switch(facts, &leader).await?;
        match limit {
            Some(limit) => received(&goal, limit).await,
            None => Ok(exit::OK),
        }
    })
}

/// How long is waited; not at all without `--archive`.
fn limit(line: &Line) -> anyhow::Result<Option<Duration>> {
    let seconds = |text: &str| {
        let seconds: Option<u32> = text.parse().ok();
        let limit = seconds.map(|s| Duration::from_secs(u64::from(s)));
        limit.ok_or_else(|| {
            let what = format!("--archive-timeout={text}: a whole number of seconds is expected");
            Problem::new(USAGE, what, "nothing was done; 30 is the default")
        })
    };
    let said = line.option("archive-timeout").map(seconds).transpose()?;
    Ok(line.has("archive").then(|| said.unwrap_or(ARCHIVE_DEFAULT)))
}

async fn leader(facts: &Facts) -> anyhow::Result<TopologyMember> {
    let trust = certificates::operator(&Facts::secrets())?;
    let agents = Client::trusted(trust, Role::Node);
    let mut last = anyhow::anyhow!("no node is known");
    for agent in facts.agents() {
        match agents.get_json::<Topology>(&agent, "/v1/topology").await {
            Ok(topology) => match topology.leader() {
                Some(leader) => return Ok(leader.clone()),
                None => last = anyhow::anyhow!("there is no leader now"),
            },
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

/// Asks the leader for a new segment, as the application's superuser. Without one the goal is what the leader has now.
async fn switch(facts: &Facts, leader: &TopologyMember) -> anyhow::Result<Goal> {
    let (Some(user), Some(password)) = (
        facts.env.get("POSTGRES_USER"),
        facts.env.get("POSTGRES_PASSWORD"),
    ) else {
        output::line("nothing to do: WAL is received as it is written, not a segment at a time");
        return Ok(Goal {
            what: "WAL up to now".to_owned(),
            lsn: leader.lsn.unwrap_or_default(),
            timeline: leader.timeline,
        });
    };
    let (client, connection) = tokio_postgres::Config::new()
        .host(&leader.host)
        .port(leader.port)
        .user(user)
        .password(password)
        .dbname(facts.env.or("POSTGRES_DB", user))
        .connect_timeout(Duration::from_secs(5))
        .connect(tokio_postgres::NoTls)
        .await?;
    tokio::spawn(connection);
    let row = client.query_one(SWITCH, &[]).await?;
    let name: String = row.try_get(0)?;
    let (end, size): (String, i64) = (row.try_get(1)?, row.try_get(2)?);
    output::line(format!(
        "The WAL file {name} has been closed on server '{}'",
        server(facts)
    ));
    let end = end.parse().ok().context("PostgreSQL names no position")?;
    Ok(Goal {
        what: format!("the WAL file {name}"),
        lsn: segment_end(end, u64::try_from(size)?),
        timeline: leader.timeline,
    })
}

/// The end of the segment that was closed behind `end`; what follows in it is empty, and sent all the same.
fn segment_end(end: Lsn, size: u64) -> Lsn {
    let start = end.segment_start(size);
    if start == end {
        return end;
    }
    Lsn(start.0.saturating_add(size))
}

async fn received(goal: &Goal, limit: Duration) -> anyhow::Result<u8> {
    let until = Instant::now() + limit;
    output::line(format!(
        "Waiting for {} (max: {} seconds)",
        goal.what,
        limit.as_secs()
    ));
    loop {
        let why = match view().await {
            Ok(status) if goal.is_reached(&status) => {
                output::line(format!("{} is in the repository", goal.what));
                return Ok(exit::OK);
            }
            Ok(status) => status
                .error
                .unwrap_or_else(|| format!("it has WAL up to {}", status.flushed_lsn)),
            Err(error) => format!("{error:#}"),
        };
        if Instant::now() >= until {
            let what = format!(
                "{} is not in the repository after {} s (it ends at {}): {why}",
                goal.what,
                limit.as_secs(),
                goal.lsn
            );
            let hint = "barman status says from whom WAL is received; --archive-timeout SECONDS waits longer";
            return Err(Problem::new(NOT_IN_TIME, what, hint).into());
        }
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::super::commands::understand;
    use super::*;

    #[test]
    fn only_with_archive_is_it_waited_for() {
        let limit = |text: &str| {
            let line = understand(&crate::container::options::typed(text))
                .unwrap()
                .1;
            limit(&line).map(|l| l.map(|l| l.as_secs()))
        };
        assert_eq!(limit("switch-wal pg_cluster").unwrap(), None);
        assert_eq!(
            limit("switch-xlog --force --archive all").unwrap(),
            Some(30)
        );
        let chosen = "switch-wal --archive --archive-timeout 60 pg_cluster";
        assert_eq!(limit(chosen).unwrap(), Some(60));
        for wrong in ["1m", "-1", ""] {
            let text = format!("switch-wal --archive --archive-timeout={wrong} all");
            let error = limit(&text).unwrap_err();
            assert_eq!(exit::code_of(&error), USAGE, "{wrong}");
        }
    }

    #[test]
    fn the_whole_segment_is_waited_for() {
        let size = 16 << 20;
        assert_eq!(segment_end(Lsn(size + 1), size), Lsn(2 * size));
        // Nothing had been written since the last switch.
        assert_eq!(segment_end(Lsn(size), size), Lsn(size));
        let goal = Goal {
            what: String::new(),
            lsn: Lsn(2 * size),
            timeline: Some(TimelineId(2)),
        };
        let status = |flushed: u64, timeline: u32| -> BackupStatusView {
            serde_json::from_value(serde_json::json!({
                "streaming_from": "a", "error": null, "timeline": timeline, "flushed_lsn": Lsn(flushed), "lag_bytes": 0,
                "runs": {"requested": 0, "running": null, "last": null}, "backups": 0, "newest_ended_at": null,
                "missing_wal": [], "repository_bytes": 0
            }))
            .unwrap()
        };
        assert!(goal.is_reached(&status(2 * size, 2)));
        assert!(!goal.is_reached(&status(2 * size - 1, 2)));
        // Of the history that the leader has left.
        assert!(!goal.is_reached(&status(3 * size, 1)));
    }
}
