//! `barman diagnose`: JSON with a backup's fields under barman's names, for those who read them (the old exporter did).

use craton_repo::manifest::Summary;
use craton_repo::segment::SegmentId;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{Facts, clock, repository, retention, root, server, view};
use crate::{exit, output};

pub(super) async fn run(facts: &Facts) -> anyhow::Result<u8> {
    let (summaries, _) = repository(facts)?.summaries()?;
    let backups: Map<String, Value> = summaries
        .iter()
        .map(|s| (s.id.to_string(), backup(s, server(facts))))
        .collect();
    // What is on the disk is told without the daemon, too.
    let status = match view().await {
        Ok(view) => serde_json::to_value(view)?,
        Err(error) => json!({ "error": format!("{error:#}") }),
    };
    let directory = root(facts).display().to_string();
    output::json(&json!({
        "global": {
            "config": { "barman_home": directory },
            "system_info": { "craton_ver": env!("CARGO_PKG_VERSION") },
        },
        "servers": {
            (server(facts)): {
                "backups": backups,
                "config": {
                    "name": server(facts),
                    "active": true,
                    "backup_directory": directory,
                    "backup_method": "postgres",
                    "retention_policy": retention(facts),
                },
                "status": status,
            },
        },
    }))?;
    Ok(exit::OK)
}

fn time(ms: u64) -> Timestamp {
    i64::try_from(ms)
        .ok()
        .and_then(|ms| Timestamp::from_millisecond(ms).ok())
        .unwrap_or_default()
}

/// Times as ctime(3) writes them, in UTC; numbers as numbers.
fn backup(s: &Summary, server: &str) -> Value {
    let size = s.wal_segment_size;
    let name = |timeline, lsn| SegmentId::at(timeline, lsn, size).file_name(size);
    let ms = u32::try_from(s.ended_at_ms.saturating_sub(s.started_at_ms)).unwrap_or(u32::MAX);
    let took = f64::from(ms) / 1000.0;
    json!({
        "backup_id": s.id,
        "server_name": server,
        "status": "DONE",
        "mode": "postgres",
        "error": null,
        "begin_time": clock(time(s.started_at_ms)),
        "end_time": clock(time(s.ended_at_ms)),
        "begin_wal": name(s.start_timeline, s.start_lsn),
        "end_wal": name(s.stop_timeline, s.stop_lsn),
        "begin_xlog": s.start_lsn,
        "end_xlog": s.stop_lsn,
        "timeline": s.stop_timeline,
        "size": s.data_bytes,
        "deduplicated_size": s.stored_bytes,
        "copy_stats": { "total_time": took, "copy_time": took },
        "systemid": s.system_id.to_string(),
        "version": s.server_version,
        "xlog_segment_size": size,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_as_its_readers_expect_it() {
        let summary: Summary = serde_json::from_value(json!({
            "id": "20261124T001632Z", "system_id": 7_000_000_000_000_000_001_u64, "server_version": 170_004,
            "wal_segment_size": 16_777_216, "source": "a", "started_at_ms": 1_795_479_385_250_u64,
            "ended_at_ms": 1_795_479_392_750_u64, "start_lsn": "0/3000028", "start_timeline": 1,
            "stop_lsn": "0/4000100", "stop_timeline": 1, "data_bytes": 100, "new_bytes": 50, "stored_bytes": 10
        }))
        .unwrap();
        let value = backup(&summary, "pg_cluster");
        for (field, expected) in [
            ("backup_id", json!("20261124T001632Z")),
            ("status", json!("DONE")),
            // The old exporter parses "Mon Jan 2 15:04:05 2006".
            ("begin_time", json!("Tue Nov 24 00:16:25 2026")),
            ("end_time", json!("Tue Nov 24 00:16:32 2026")),
            ("size", json!(100)),
            ("copy_stats", json!({"total_time": 7.5, "copy_time": 7.5})),
            ("begin_wal", json!("000000010000000000000003")),
            ("end_wal", json!("000000010000000000000004")),
            ("begin_xlog", json!("0/3000028")),
            ("timeline", json!(1)),
            ("systemid", json!("7000000000000000001")),
        ] {
            assert_eq!(value[field], expected, "{field}");
        }
    }
}
