//! `barman` as people type it and scripts parse it, over Craton's repository; and the old exporter's metrics.

mod commands;
mod diagnose;
mod recover;
mod switch;

use std::fmt::Write as _;
use std::path::PathBuf;

use craton_backup::views::{BackupStatusView, BackupView};
use craton_backup::{Repository, catalog};
use craton_console::Client;
use craton_console::metrics::MetricDoc;
use craton_repo::segment::SegmentId;
use craton_trust::Role;
use jiff::Timestamp;

use super::entry::Facts;
use super::environment::Kind;
use super::side::{ask_for_backup, daemon_address};
use crate::backup::{Daemon, follow, report_removed};
use crate::cli::wait_for;
use crate::exit::{self, Problem};
use crate::{certificates, output};
use commands::{Asked, HELP, understand};

/// The repository.
pub fn root(facts: &Facts) -> PathBuf {
    PathBuf::from(facts.env.or("BACKUP_DIR", "/var/backups"))
}

fn server(facts: &Facts) -> &str {
    facts.env.or("UPSTREAM_NAME", "pg_cluster")
}

/// The retention policy as barman words it; its word for none is `NONE`.
fn retention(facts: &Facts) -> String {
    match facts.env.or("BACKUP_RETENTION_DAYS", "30").trim() {
        "0" => "NONE".to_owned(),
        days => format!("RECOVERY WINDOW OF {days} DAYS"),
    }
}

/// Runs `barman ARGS`.
pub fn run(args: &[String]) -> anyhow::Result<u8> {
    let (asked, line) = understand(args)?;
    match asked {
        Asked::Help => {
            output::line(format!("barman, as Craton has it; {HELP}"));
            return Ok(exit::OK);
        }
        Asked::Version => {
            output::line(format!("{} (craton)", env!("CARGO_PKG_VERSION")));
            return Ok(exit::OK);
        }
        _ => {}
    }
    let facts = Facts::require()?;
    if let Some(named) = line.word(1).filter(|n| *n != "all" && *n != server(&facts)) {
        let what = format!("Unknown server '{named}'");
        return Err(Problem::new(
            exit::FAILURE,
            what,
            format!("the server is \"{}\" (UPSTREAM_NAME)", server(&facts)),
        )
        .into());
    }
    match asked {
        Asked::List => list(&facts, line.has("minimal")),
        Asked::Show => show(&facts, line.word(2).unwrap_or("latest")),
        Asked::Backup => wait_for(backup(&facts)),
        Asked::Check => wait_for(check(&facts)),
        Asked::Status => wait_for(status(&facts)),
        Asked::ListServer => {
            if line.has("minimal") {
                output::line(server(&facts));
            } else {
                output::line(format!("{} - {} (Active)", server(&facts), facts.cluster));
            }
            Ok(exit::OK)
        }
        Asked::Diagnose => wait_for(diagnose::run(&facts)),
        Asked::Recover => recover::run(&facts, &line),
        Asked::SwitchWal => switch::run(&facts, &line),
        Asked::Delete => delete(&facts, line.word(2).unwrap_or_default()),
        Asked::Nothing | Asked::Help | Asked::Version => {
            output::line(
                "nothing to do: the daemon of this container receives WAL all the time, from whoever leads",
            );
            Ok(exit::OK)
        }
    }
}

fn repository(facts: &Facts) -> anyhow::Result<Repository> {
    Ok(Repository::open(&root(facts))?)
}

fn clock(at: Timestamp) -> String {
    at.strftime("%a %b %e %H:%M:%S %Y").to_string()
}

/// Bytes of stored WAL between a backup and the next one.
fn wal_bytes(
    repository: &Repository,
    backup: &BackupView,
    next: Option<&BackupView>,
) -> anyhow::Result<(usize, u64)> {
    let size = repository.segment_size();
    let from = SegmentId::at(backup.timeline, backup.start_lsn, size).number;
    let to = next.map_or(u64::MAX, |n| {
        SegmentId::at(n.timeline, n.start_lsn, size).number
    });
    let segments = repository.segments()?;
    let ours = segments
        .iter()
        .filter(|(id, _)| (from..to).contains(&id.number));
    Ok(ours.fold((0, 0), |(n, sum), (_, (_, bytes))| (n + 1, sum + bytes)))
}

fn list(facts: &Facts, minimal: bool) -> anyhow::Result<u8> {
    let repository = repository(facts)?;
    let backups = catalog::list(&repository)?.backups;
    // Newest first.
    for (i, b) in backups.iter().enumerate().rev() {
        if minimal {
            output::line(b.id.to_string());
            continue;
        }
        let (_, wal) = wal_bytes(&repository, b, backups.get(i + 1))?;
        output::line(format!(
            "{} {} - {} - Size: {} - WAL Size: {}",
            server(facts),
            b.id,
            clock(b.ended_at),
            output::bytes(b.data_bytes),
            output::bytes(wal)
        ));
    }
    Ok(exit::OK)
}

/// The place of a backup in the list, by its id or by barman's words for it.
fn place(backups: &[BackupView], id: &str) -> Option<usize> {
    match id {
        "latest" | "last" => backups.len().checked_sub(1),
        "oldest" | "first" => (!backups.is_empty()).then_some(0),
        id => backups.iter().position(|b| b.id.to_string() == id),
    }
}

fn find(facts: &Facts, backups: &[BackupView], id: &str) -> anyhow::Result<usize> {
    place(backups, id).ok_or_else(|| {
        let what = format!("Unknown backup '{id}' for server '{}'", server(facts));
        Problem::new(exit::FAILURE, what, "barman list-backup shows them").into()
    })
}

fn delete(facts: &Facts, id: &str) -> anyhow::Result<u8> {
    let backups = catalog::list(&repository(facts)?)?.backups;
    let at = find(facts, &backups, id)?;
    let Some(b) = backups.get(at) else {
        return Ok(exit::FAILURE);
    };
    output::line(format!(
        "Deleting backup {} for server {}",
        b.id,
        server(facts)
    ));
    let swept = wait_for(async { Daemon::container(facts)?.delete(&b.id).await })?;
    report_removed(&swept, false)
}

fn show(facts: &Facts, id: &str) -> anyhow::Result<u8> {
    let repository = repository(facts)?;
    let backups = catalog::list(&repository)?.backups;
    let at = find(facts, &backups, id)?;
    let Some(b) = backups.get(at) else {
        return Ok(exit::FAILURE);
    };
    let detail = catalog::show(&repository, &b.id)?;
    let size = repository.segment_size();
    let (files, wal) = wal_bytes(&repository, b, backups.get(at + 1))?;
    let name = |lsn| SegmentId::at(b.timeline, lsn, size).file_name(size);
    let neighbour = |i: Option<usize>, none: &str| {
        let found = i.and_then(|i| backups.get(i));
        found.map_or_else(|| none.to_owned(), |b| b.id.to_string())
    };
    let mut text = format!("Backup {}:\n", b.id);
    for (key, value) in [
        ("  Server Name", server(facts).to_owned()),
        ("  System Id", detail.system_id.to_string()),
        ("  Status", "DONE".to_owned()),
        ("  PostgreSQL Version", b.server_version.to_string()),
        ("  Read from", b.source.clone()),
        (
            "\n  Base backup information:\n    Disk usage",
            format!(
                "{} ({} stored)",
                output::bytes(b.data_bytes),
                output::bytes(b.stored_bytes)
            ),
        ),
        ("    Timeline", b.timeline.to_string()),
        ("    Begin WAL", name(b.start_lsn)),
        ("    End WAL", name(b.stop_lsn)),
        ("    Begin time", b.started_at.to_string()),
        ("    End time", b.ended_at.to_string()),
        ("    Begin LSN", b.start_lsn.to_string()),
        ("    End LSN", b.stop_lsn.to_string()),
        ("\n  WAL information:\n    No of files", files.to_string()),
        ("    Disk usage", output::bytes(wal)),
        (
            "    Restorable to",
            format!(
                "{} on timeline {}",
                detail.restorable_to, detail.latest_timeline
            ),
        ),
        ("    Missing", detail.missing_wal.len().to_string()),
        (
            "\n  Catalog information:\n    Retention Policy",
            retention(facts),
        ),
        (
            "    Previous Backup",
            neighbour(at.checked_sub(1), "- (this is the oldest base backup)"),
        ),
        (
            "    Next Backup",
            neighbour(Some(at + 1), "- (this is the latest base backup)"),
        ),
    ] {
        let (head, key) = key.rsplit_once('\n').map_or(("", key), |(h, k)| (h, k));
        if !head.is_empty() || text.ends_with("\n\n") {
            let _ = writeln!(text, "{head}");
        }
        let _ = writeln!(text, "{key:<25}: {value}");
    }
    output::line(text.trim_end());
    Ok(exit::OK)
}

fn client() -> anyhow::Result<Client> {
    let trust = certificates::operator(&Facts::secrets())?;
    Ok(Client::trusted(trust, Role::Backup))
}

async fn view() -> anyhow::Result<BackupStatusView> {
    let at = daemon_address(Kind::Backup);
    Ok(client()?.get_json(&at, "/v1/backup/status").await?)
}

async fn backup(facts: &Facts) -> anyhow::Result<u8> {
    output::line(format!("Starting backup for server {}", server(facts)));
    let accepted = ask_for_backup().await?;
    let at = daemon_address(Kind::Backup);
    let last = follow(&client()?, &at, &accepted, |_| {}).await?;
    if let Some(b) = last.backup {
        output::line(format!(
            "Backup size: {}\nBackup completed: {}",
            output::bytes(b.data_bytes),
            b.id
        ));
        return Ok(exit::OK);
    }
    let what = format!(
        "Backup failed: {}",
        last.error
            .unwrap_or_else(|| "no reason was given".to_owned())
    );
    Err(Problem::new(exit::FAILURE, what, "the container's log says more").into())
}

/// What is checked, and what is wrong with it, if anything.
async fn checks(facts: &Facts) -> Vec<(&'static str, Result<String, String>)> {
    let status = view().await.map_err(|e| format!("{e:#}"));
    let repository = repository(facts).map_err(|e| format!("{e:#}"));
    let streaming = status.as_ref().map_err(Clone::clone).and_then(|s| {
        s.streaming_from
            .as_ref()
            .map(|from| format!("from {from}"))
            .ok_or_else(|| {
                s.error
                    .clone()
                    .unwrap_or_else(|| "nobody sends WAL yet".to_owned())
            })
    });
    let gaps = status
        .as_ref()
        .map_err(Clone::clone)
        .and_then(|s| match s.missing_wal.len() {
            0 => Ok(String::new()),
            n => Err(format!("{n} gaps")),
        });
    let backups = repository.as_ref().map_err(Clone::clone).and_then(|r| {
        let list = catalog::list(r).map_err(|e| e.to_string())?;
        match (list.problems.first(), list.backups.len()) {
            (Some(problem), _) => Err(problem.clone()),
            (None, n) => Ok(format!("have {n} backups")),
        }
    });
    let space = free_and_used(facts).map(|_| String::new());
    vec![
        ("craton backup daemon", status.map(|_| String::new())),
        ("receive-wal running", streaming),
        ("WAL without a gap", gaps),
        ("directories", space),
        ("redundancy requirements", backups),
    ]
}

async fn check(facts: &Facts) -> anyhow::Result<u8> {
    output::line(format!("Server {}:", server(facts)));
    let mut failed = false;
    for (name, outcome) in checks(facts).await {
        let (word, more) = match &outcome {
            Ok(more) => ("OK", more),
            Err(why) => ("FAILED", why),
        };
        failed |= outcome.is_err();
        let more = if more.is_empty() {
            String::new()
        } else {
            format!(" ({more})")
        };
        output::line(format!("\t{name}: {word}{more}"));
    }
    Ok(if failed { exit::FAILURE } else { exit::OK })
}

async fn status(facts: &Facts) -> anyhow::Result<u8> {
    let s = view().await?;
    let newest = s.newest_ended_at.map_or_else(|| "None".to_owned(), clock);
    output::line(format!(
        "Server {}:\n\tActive: True\n\tReceives WAL from: {}\n\tLast received LSN: {} (timeline {})\n\tLag: {}\n\tNo. of available backups: {}\n\tLast available backup: {newest}",
        server(facts),
        s.streaming_from.as_deref().unwrap_or("nobody"),
        s.flushed_lsn,
        s.timeline,
        output::bytes(s.lag_bytes),
        s.backups
    ));
    Ok(exit::OK)
}

/// Free and used bytes of the repository's file system.
fn free_and_used(facts: &Facts) -> Result<(u64, u64), String> {
    let stat =
        rustix::fs::statvfs(root(facts)).map_err(|e| format!("{}: {e}", root(facts).display()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let used = stat
        .f_blocks
        .saturating_sub(stat.f_bfree)
        .saturating_mul(stat.f_frsize);
    Ok((free, used))
}

/// The old exporter's ten gauges.
pub async fn metrics(facts: &Facts) -> String {
    let good = checks(facts)
        .await
        .iter()
        .all(|(_, outcome)| outcome.is_ok());
    let repository = repository(facts).ok();
    let backups = repository
        .as_ref()
        .and_then(|r| catalog::list(r).ok())
        .map(|l| l.backups)
        .unwrap_or_default();
    gauges(good, &backups, free_and_used(facts).ok())
}

/// Names and meanings, for the reference.
const GAUGES: [(&str, &str); 12] = [
    ("barman_check_is_ok", "1 if every check passes, else 0"),
    ("barman_backups_amount", "Backups in the repository"),
    (
        "barman_last_backup_start_time_seconds",
        "When the newest backup began, Unix time",
    ),
    (
        "barman_last_backup_end_time_seconds",
        "When the newest backup ended, Unix time",
    ),
    (
        "barman_last_backup_size_bytes",
        "Size of the newest backup's files",
    ),
    (
        "barman_last_backup_duration_total_seconds",
        "How long the newest backup took",
    ),
    (
        "barman_last_backup_duration_copy_seconds",
        "How long the newest backup took; reading and storing are one step",
    ),
    (
        "barman_oldest_backup_end_time_seconds",
        "When the oldest backup ended, Unix time",
    ),
    (
        "barman_disk_free_bytes",
        "Free, of the repository's file system",
    ),
    ("barman_backup_disk_free_bytes", "The same"),
    (
        "barman_disk_used_bytes",
        "Used, of the repository's file system",
    ),
    ("barman_backup_disk_used_bytes", "The same"),
];

/// The old exporter's metrics, for the reference.
pub fn metrics_catalogue() -> Vec<MetricDoc> {
    let doc = |(name, help): &(&str, &'static str)| MetricDoc {
        name: (*name).to_owned(),
        kind: "gauge",
        help,
    };
    GAUGES.iter().map(doc).collect()
}

/// As [`metrics`], from what is known.
fn gauges(good: bool, backups: &[BackupView], space: Option<(u64, u64)>) -> String {
    let mut values = vec![
        Some(u8::from(good).to_string()),
        Some(backups.len().to_string()),
    ];
    match (backups.last(), backups.first()) {
        (Some(last), Some(oldest)) => {
            let took = last.ended_at.duration_since(last.started_at).as_secs_f64();
            values.extend([
                Some(last.started_at.as_second().to_string()),
                Some(last.ended_at.as_second().to_string()),
                Some(last.data_bytes.to_string()),
                Some(took.to_string()),
                Some(took.to_string()),
                Some(oldest.ended_at.as_second().to_string()),
            ]);
        }
        _ => values.extend(std::iter::repeat_n(None, 6)),
    }
    let [free, used] = [space.map(|s| s.0), space.map(|s| s.1)];
    values.extend([free, free, used, used].map(|v| v.map(|v| v.to_string())));
    let mut text = String::new();
    for ((name, help), value) in GAUGES.iter().zip(values) {
        if let Some(value) = value {
            let _ = writeln!(
                text,
                "# HELP {name} {help}.\n# TYPE {name} gauge\n{name} {value}"
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use craton_core::{Lsn, TimelineId};
    use craton_repo::manifest::BackupId;

    fn backup(id: &str, ended: &str) -> BackupView {
        let ended_at: Timestamp = ended.parse().unwrap();
        BackupView {
            id: BackupId::new(id).unwrap(),
            started_at: ended_at
                .checked_sub(jiff::SignedDuration::from_secs(7))
                .unwrap(),
            ended_at,
            source: "a".into(),
            timeline: TimelineId(1),
            start_lsn: Lsn(1),
            stop_lsn: Lsn(2),
            data_bytes: 100,
            stored_bytes: 10,
            server_version: 170_004,
        }
    }

    #[test]
    fn backups_by_barmans_words() {
        let all = [
            backup("20261124T001632Z", "2026-11-24T00:16:32Z"),
            backup("20261125T001632Z", "2026-11-25T00:16:32Z"),
        ];
        for (word, at) in [
            ("latest", Some(1)),
            ("first", Some(0)),
            ("20261124T001632Z", Some(0)),
            ("x", None),
        ] {
            assert_eq!(place(&all, word), at, "{word}");
        }
        assert_eq!(place(&[], "latest"), None);
    }

    #[test]
    fn the_old_exporters_names() {
        let all = [backup("20261124T001632Z", "2026-11-24T00:16:32Z")];
        let text = gauges(true, &all, Some((5, 6)));
        let lines: Vec<_> = text.lines().filter(|l| !l.starts_with('#')).collect();
        assert_eq!(
            lines,
            [
                "barman_check_is_ok 1",
                "barman_backups_amount 1",
                "barman_last_backup_start_time_seconds 1795479385",
                "barman_last_backup_end_time_seconds 1795479392",
                "barman_last_backup_size_bytes 100",
                "barman_last_backup_duration_total_seconds 7",
                "barman_last_backup_duration_copy_seconds 7",
                "barman_oldest_backup_end_time_seconds 1795479392",
                "barman_disk_free_bytes 5",
                "barman_backup_disk_free_bytes 5",
                "barman_disk_used_bytes 6",
                "barman_backup_disk_used_bytes 6",
            ]
        );
        assert_eq!(gauges(false, &[], None).matches("\nbarman_").count(), 2);
    }
}
