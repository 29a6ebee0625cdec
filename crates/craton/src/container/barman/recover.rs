//! `barman recover SERVER BACKUP DIRECTORY`: the same as `craton restore`.

use craton_backup::catalog;
use craton_backup::views::BackupDetailView;

use super::{Facts, find, repository, root};
use crate::container::options::Line;
use crate::exit::{Problem, USAGE};

fn usage(what: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Problem::new(USAGE, what, hint).into()
}

pub(super) fn run(facts: &Facts, line: &Line) -> anyhow::Result<u8> {
    let (Some(id), Some(directory)) = (line.word(2), line.word(3)) else {
        return Err(usage(
            "barman recover needs a server, a backup and a directory",
            "barman recover SERVER BACKUP DIRECTORY [--target-time TIME]",
        ));
    };
    let repository = repository(facts)?;
    let backups = catalog::list(&repository)?.backups;
    let at = find(facts, &backups, id)?;
    let Some(backup) = backups.get(at) else {
        return Ok(crate::exit::FAILURE);
    };
    let detail = catalog::show(&repository, &backup.id)?;
    let mut words: Vec<String> = ["craton", "restore", directory, "--backup"]
        .map(ToOwned::to_owned)
        .into();
    words.push(backup.id.to_string());
    words.push("--repo".to_owned());
    words.push(root(facts).display().to_string());
    words.extend(wishes(line, &detail)?);
    let cli = <crate::cli::Cli as clap::Parser>::try_parse_from(words).map_err(|error| {
        let said = error.to_string();
        let first = said.lines().next().unwrap_or_default();
        usage(
            format!("barman recover: {}", first.trim_start_matches("error: ")),
            "a time: '2026-01-31 12:00' or 2026-01-31T12:00:00Z; a position: 0/7000028",
        )
    })?;
    crate::cli::dispatch(cli)
}

/// What is said of the target and of the tablespaces, as `craton restore` has it.
fn wishes(line: &Line, detail: &BackupDetailView) -> anyhow::Result<Vec<String>> {
    let mut words = Vec::new();
    let mut targets = Vec::new();
    for (option, ours) in [("target-time", "--to"), ("target-lsn", "--lsn")] {
        if let Some(value) = line.option(option) {
            targets.push(option);
            words.push(format!("{ours}={value}"));
        }
    }
    if line.has("target-immediate") {
        targets.push("target-immediate");
        words.push("--immediate".to_owned());
    }
    if targets.len() > 1 {
        let what = format!(
            "barman recover: --{} are both given",
            targets.join(" and --")
        );
        return Err(usage(what, "one of them says where recovery stops"));
    }
    if let Some(timeline) = line.option("target-tli") {
        is_followed(timeline, detail)?;
    }
    if let Some(action) = line.option("target-action").filter(|a| *a != "promote") {
        return Err(usage(
            format!(
                "barman recover: --target-action={action} cannot be done here; nothing was done"
            ),
            "the restored server promotes itself at the target, to a timeline of its own: look into it before clients do",
        ));
    }
    for rule in line.all("tablespace") {
        words.push(format!("--tablespace={}", moved(rule, detail)?));
    }
    Ok(words)
}

/// Recovery follows the newest timeline that comes from the backup, and no other.
fn is_followed(wanted: &str, detail: &BackupDetailView) -> anyhow::Result<()> {
    let newest = detail.latest_timeline;
    let asked = match wanted {
        "latest" => return Ok(()),
        "current" => Some(detail.backup.timeline.0),
        text => text.parse().ok(),
    };
    if asked == Some(newest.0) {
        return Ok(());
    }
    Err(usage(
        format!(
            "barman recover: --target-tli={wanted} cannot be done here: recovery of this backup follows timeline {newest}; nothing was done"
        ),
        "a --target-time or --target-lsn before the switch of timelines stops on the older one",
    ))
}

/// `OLD:NEW`. Names of tablespaces are in the database, not in a backup: OLD is a place or a number.
fn moved(rule: &str, detail: &BackupDetailView) -> anyhow::Result<String> {
    let known = || {
        let rows = detail.tablespaces.iter();
        let rows: Vec<String> = rows
            .map(|t| format!("{} (number {})", t.location, t.oid))
            .collect();
        if rows.is_empty() {
            "this backup has no tablespaces".to_owned()
        } else {
            format!(
                "write PLACE:NEW or NUMBER:NEW; this backup has {}",
                rows.join(", ")
            )
        }
    };
    let split = rule.split_once(':').filter(|(_, new)| !new.is_empty());
    let Some((old, new)) = split else {
        let what = format!("barman recover: --tablespace {rule} is not OLD:NEW; nothing was done");
        return Err(usage(what, known()));
    };
    let fits = |t: &&craton_repo::manifest::Tablespace| {
        t.location == old || old.parse::<u32>().is_ok_and(|oid| oid == t.oid)
    };
    match detail.tablespaces.iter().find(fits) {
        Some(tablespace) => Ok(format!("{}={new}", tablespace.location)),
        None => Err(usage(
            format!(
                "barman recover: --tablespace {rule}: \"{old}\" is no tablespace's place or number in this backup; nothing was done"
            ),
            known(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::super::commands::understand;
    use super::*;
    use crate::exit::{code_of, hint_of};
    use clap::Parser as _;

    fn detail() -> BackupDetailView {
        serde_json::from_value(serde_json::json!({
            "id": "20261124T001632Z", "started_at": "2026-11-24T00:16:32Z", "ended_at": "2026-11-24T00:17:32Z",
            "source": "a", "timeline": 2, "start_lsn": "0/1000", "stop_lsn": "0/2000", "data_bytes": 1,
            "stored_bytes": 1, "server_version": 170_004, "system_id": 7, "entries": 1, "chunks": 1, "packs": 1,
            "tablespaces": [{"oid": 16_400, "location": "/mnt/fast"}], "latest_timeline": 3,
            "restorable_to": "0/9000", "restorable_until": null, "missing_wal": []
        }))
        .unwrap()
    }

    fn asked(options: &str) -> anyhow::Result<Vec<String>> {
        let args =
            crate::container::options::typed(&format!("recover {options} pg_cluster latest /x"));
        wishes(&understand(&args)?.1, &detail())
    }

    #[test]
    fn what_craton_restore_is_told() {
        for (options, expected) in [
            ("-j 4", vec![]),
            (
                "--target-time 2026-11-25T10:00:00Z",
                vec!["--to=2026-11-25T10:00:00Z"],
            ),
            ("--target-lsn=0/7000 --target-tli 3", vec!["--lsn=0/7000"]),
            (
                "--target-immediate --target-tli latest",
                vec!["--immediate"],
            ),
            ("--target-action promote", vec![]),
            (
                "--tablespace /mnt/fast:/mnt/new",
                vec!["--tablespace=/mnt/fast=/mnt/new"],
            ),
            (
                "--tablespace 16400:/mnt/new",
                vec!["--tablespace=/mnt/fast=/mnt/new"],
            ),
        ] {
            let words = asked(options).unwrap_or_else(|e| panic!("{options}: {e}"));
            assert_eq!(words, expected, "{options}");
            let all = ["craton", "restore", "/x"].map(ToOwned::to_owned);
            crate::cli::Cli::try_parse_from(all.into_iter().chain(words)).unwrap();
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused_before_anything_is() {
        for (options, said) in [
            ("--target-tli 2", "follows timeline 3"),
            ("--target-tli current", "follows timeline 3"),
            ("--target-tli x", "follows timeline 3"),
            (
                "--target-time t --target-lsn 0/1",
                "--target-time and --target-lsn",
            ),
            ("--target-action pause", "--target-action=pause"),
            (
                "--tablespace fast:/mnt/new",
                "\"fast\" is no tablespace's place",
            ),
            ("--tablespace /mnt/fast", "is not OLD:NEW"),
            ("--target-xid 735", "--target-xid"),
        ] {
            let error = asked(options).unwrap_err();
            assert!(error.to_string().contains(said), "{options}: {error}");
            assert_eq!(code_of(&error), USAGE, "{options}");
        }
        let hint = hint_of(&asked("--tablespace fast:/x").unwrap_err()).unwrap();
        assert!(hint.contains("/mnt/fast (number 16400)"), "{hint}");
    }
}
