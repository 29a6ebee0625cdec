//! Which rows are there after all, compared with what clients were told.

use std::collections::BTreeSet;
use std::time::Duration;

use craton_core::MemberId;
use serde::Serialize;
use tokio::time::{Instant, sleep};
use tokio_postgres::Client;

use super::recorder::{Fate, Write};
use crate::layout::Layout;
use crate::sessions::{Login, column, value};

/// How long a standby may take to replay what the leader has.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(60);

/// How often its position is looked at.
const CATCH_UP_POLL: Duration = Duration::from_millis(100);

/// What one server has of a recording.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Verdict {
    /// Acknowledged rows that are missing. Must be none.
    pub lost: Vec<u64>,
    /// Rows that are there although the client was told that they failed.
    pub ghosts: Vec<u64>,
    /// Rows of unknown outcome that are there.
    pub unknown_there: u64,
    /// Rows of unknown outcome that are not there.
    pub unknown_absent: u64,
}

/// Compares. Pure.
pub fn judge(writes: &[Write], present: &BTreeSet<u64>) -> Verdict {
    let mut verdict = Verdict::default();
    for write in writes {
        match (write.fate, present.contains(&write.id)) {
            (Fate::Acknowledged, false) => verdict.lost.push(write.id),
            (Fate::Failed, true) => verdict.ghosts.push(write.id),
            (Fate::Unknown, true) => verdict.unknown_there += 1,
            (Fate::Unknown, false) => verdict.unknown_absent += 1,
            (Fate::Acknowledged, true) | (Fate::Failed, false) => {}
        }
    }
    verdict
}

/// The rows of a recording from `first` to `last` that a server has.
pub async fn present(
    client: &Client,
    run: i64,
    first: u64,
    last: u64,
) -> anyhow::Result<BTreeSet<u64>> {
    let query = format!(
        "SELECT id FROM craton_drill.writes WHERE run = {run} AND id BETWEEN {first} AND {last}"
    );
    let rows = column(client, &query).await?;
    rows.iter()
        .map(|id| {
            id.parse()
                .map_err(|_| anyhow::anyhow!("\"{id}\" is not a row number"))
        })
        .collect()
}

/// Asks the leader through the proxy and then every member itself, once it has caught up.
pub async fn everywhere(
    layout: &Layout,
    login: &Login,
    run: i64,
    writes: &[Write],
) -> anyhow::Result<Vec<(String, Verdict)>> {
    let first = writes.iter().map(|w| w.id).min().unwrap_or(1);
    let last = writes.iter().map(|w| w.id).max().unwrap_or(0);
    let leader = login.connect(layout.proxy_port()).await?;
    let mut verdicts = vec![(
        "leader".to_owned(),
        judge(writes, &present(&leader, run, first, last).await?),
    )];
    let position = value(&leader, "SELECT pg_current_wal_flush_lsn()").await?;
    for member in &layout.cluster.members {
        let client = caught_up(layout, login, member, &position).await?;
        verdicts.push((
            member.to_string(),
            judge(writes, &present(&client, run, first, last).await?),
        ));
    }
    Ok(verdicts)
}

/// A session on a member that has replayed `position`.
async fn caught_up(
    layout: &Layout,
    login: &Login,
    member: &MemberId,
    position: &str,
) -> anyhow::Result<Client> {
    let deadline = Instant::now() + CATCH_UP_TIMEOUT;
    let query = format!(
        "SELECT CASE WHEN pg_is_in_recovery() THEN coalesce(pg_last_wal_replay_lsn(), '0/0') >= '{position}'::pg_lsn ELSE true END"
    );
    loop {
        let looked = async {
            let client = login.connect(layout.postgres_port(member)).await?;
            anyhow::Ok((value(&client, &query).await? == "t", client))
        };
        match looked.await {
            Ok((true, client)) => return Ok(client),
            Ok((false, _)) if Instant::now() > deadline => {
                anyhow::bail!("member {member} did not replay {position} in time")
            }
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("member {member} cannot be asked for its rows")));
            }
            _ => sleep(CATCH_UP_POLL).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lost_rows_and_ghosts_are_found() {
        let now = Instant::now();
        let write = |id, fate| Write {
            id,
            fate,
            began: now,
            ended: now,
            by: None,
        };
        let writes = [
            write(1, Fate::Acknowledged),
            write(2, Fate::Acknowledged),
            write(3, Fate::Failed),
            write(4, Fate::Failed),
            write(5, Fate::Unknown),
            write(6, Fate::Unknown),
        ];
        let verdict = judge(&writes, &BTreeSet::from([1, 3, 5, 99]));
        assert_eq!(
            verdict,
            Verdict {
                lost: vec![2],
                ghosts: vec![3],
                unknown_there: 1,
                unknown_absent: 1
            }
        );
    }
}
