//! What PostgreSQL must be told to recover: `postgresql.auto.conf` and `recovery.signal`.

use std::fs;
use std::io;
use std::path::Path;

use super::{Options, Plan, Target};
use crate::error::{BackupError, Result};
use crate::store::Repository;

/// Settings of the old cluster that would harm the restored one, or that recovery sets itself.
const REPLACED: [&str; 22] = [
    "restore_command",
    "recovery_target",
    "recovery_target_time",
    "recovery_target_lsn",
    "recovery_target_xid",
    "recovery_target_name",
    "recovery_target_inclusive",
    "recovery_target_timeline",
    "recovery_target_action",
    "recovery_end_command",
    "archive_cleanup_command",
    "promote_trigger_file",
    // It must not follow the old leader, nor wait for the old standbys, nor archive over the old WAL.
    "primary_conninfo",
    "primary_slot_name",
    "synchronous_standby_names",
    "archive_mode",
    "archive_command",
    "archive_library",
    // They name places of the old server.
    "hba_file",
    "ident_file",
    "external_pid_file",
    "unix_socket_directories",
];

/// What follows in `postgresql.auto.conf` is for the recovery alone.
const MARK: &str = "# Recovery from backup ";

/// Takes the recovery's settings out again, once it is over.
pub fn forget_recovery(directory: &Path) -> Result<()> {
    let auto = directory.join("postgresql.auto.conf");
    let text = fs::read_to_string(&auto).map_err(BackupError::io("read", &auto))?;
    let Some((before, _)) = text.split_once(MARK) else {
        return Ok(());
    };
    fs::write(&auto, before).map_err(BackupError::io("write", &auto))
}

/// Has all WAL replayed that there is, where a time was the target.
pub fn forget_target_time(directory: &Path) -> Result<()> {
    let auto = directory.join("postgresql.auto.conf");
    let text = fs::read_to_string(&auto).map_err(BackupError::io("read", &auto))?;
    let is_other = |l: &&str| !l.starts_with("recovery_target_time ");
    let lines: Vec<&str> = text.lines().filter(is_other).collect();
    fs::write(&auto, lines.join("\n") + "\n").map_err(BackupError::io("write", &auto))
}

pub(super) fn write(
    repository: &Repository,
    directory: &Path,
    plan: &Plan,
    options: &Options,
) -> Result<()> {
    let auto = directory.join("postgresql.auto.conf");
    let old = match fs::read_to_string(&auto) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(BackupError::io("read", &auto)(e)),
    };
    let mut lines: Vec<String> = old
        .lines()
        .filter(|l| !is_replaced(l))
        .map(ToOwned::to_owned)
        .collect();
    lines.push(format!(
        "{MARK}{}, written by craton restore.",
        plan.manifest.summary.id
    ));
    if options.standby {
        lines.pop();
    } else {
        for (name, value) in recovery(repository, plan, options)? {
            lines.push(format!("{name} = {}", quote(&value)));
        }
    }
    let text = lines.join("\n") + "\n";
    fs::write(&auto, text).map_err(BackupError::io("write", &auto))?;
    if options.standby {
        // The agent has its own, outside of the data directory.
        return Ok(());
    }
    for (name, content) in [
        ("postgresql.conf", ""),
        ("pg_hba.conf", HBA),
        ("pg_ident.conf", ""),
        ("recovery.signal", ""),
    ] {
        let path = directory.join(name);
        // A member keeps its configuration outside of the data directory; the copy needs some of its own.
        if !path.exists() {
            fs::write(&path, content).map_err(BackupError::io("write", &path))?;
        }
    }
    Ok(())
}

const HBA: &str = "# Written by craton restore, because the backup had none.\n\
                   local all all peer\nhost all all 127.0.0.1/32 scram-sha-256\nhost all all ::1/128 scram-sha-256\n";

fn recovery(
    repository: &Repository,
    plan: &Plan,
    options: &Options,
) -> Result<Vec<(&'static str, String)>> {
    let root = std::path::absolute(repository.root())
        .map_err(BackupError::io("resolve", repository.root()))?;
    let command = format!(
        "{} backup wal-fetch --repo {} %f %p",
        shell(&options.program)?,
        shell(&root)?
    );
    let command = match &options.divergence {
        // What was kept comes first: of the segment in which the histories parted the archive has the cluster's.
        Some(d) => format!("cp {}/%f %p 2>/dev/null || {command}", shell(&d.directory)?),
        None => command,
    };
    let mut settings = vec![
        ("restore_command", command),
        ("recovery_target_timeline", plan.timeline.to_string()),
        ("recovery_target_action", "promote".to_owned()),
        ("primary_conninfo", String::new()),
        ("primary_slot_name", String::new()),
        ("synchronous_standby_names", String::new()),
        ("archive_mode", "off".to_owned()),
    ];
    match plan.target {
        Target::Latest => {}
        Target::Immediate => settings.push(("recovery_target", "immediate".to_owned())),
        Target::Lsn(lsn) => settings.push(("recovery_target_lsn", lsn.to_string())),
        Target::Time(time) => {
            settings.push((
                "recovery_target_time",
                time.strftime("%Y-%m-%d %H:%M:%S.%6f+00").to_string(),
            ));
        }
    }
    settings.extend(
        plan.manifest
            .summary
            .minimum_settings
            .iter()
            .filter_map(|(name, value)| {
                // Recovery refuses to start with less than the leader had.
                MINIMUM_SETTINGS
                    .iter()
                    .find(|known| *known == name)
                    .map(|known| (*known, value.clone()))
            }),
    );
    Ok(settings)
}

/// Settings that a server in recovery must have at least as high as the leader had.
pub(crate) const MINIMUM_SETTINGS: [&str; 5] = [
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
];

fn is_replaced(line: &str) -> bool {
    let name = line
        .trim_start()
        .split(|c: char| c == '=' || c.is_whitespace())
        .next()
        .unwrap_or_default();
    REPLACED
        .iter()
        .chain(&MINIMUM_SETTINGS)
        .any(|r| name.eq_ignore_ascii_case(r))
}

/// Quotes a value for PostgreSQL's configuration files (`guc-file.l`): both quotes and backslashes double.
fn quote(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
}

/// Quotes a path for the shell that runs `restore_command`, in which `%` has a meaning as well.
fn shell(path: &Path) -> Result<String> {
    let text = path
        .to_str()
        .filter(|t| !t.contains(['\n', '\r', '\0']))
        .ok_or_else(|| {
            BackupError::Refused(format!(
                "{} cannot be written into PostgreSQL's configuration",
                path.display()
            ))
        })?;
    Ok(format!(
        "'{}'",
        text.replace('\'', "'\\''").replace('%', "%%")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_survives_both_readers() {
        assert_eq!(
            shell(Path::new("/a b/it's/50%")).unwrap(),
            r"'/a b/it'\''s/50%%'"
        );
        assert_eq!(quote(r"it's\n"), r"'it''s\\n'");
        assert!(shell(Path::new("/a\nb")).is_err());
    }

    #[test]
    fn what_was_for_the_recovery_goes_and_the_rest_stays() {
        let dir = tempfile::tempdir().unwrap();
        let auto = dir.path().join("postgresql.auto.conf");
        let text = format!(
            "work_mem = '4MB'\n{MARK}x, written by craton restore.\nrecovery_target_time = 'x'\nrecovery_target_timeline = '1'\n"
        );
        fs::write(&auto, text).unwrap();
        forget_target_time(dir.path()).unwrap();
        let now = fs::read_to_string(&auto).unwrap();
        assert!(!now.contains("target_time = ") && now.contains("target_timeline"));
        for _ in 0..2 {
            forget_recovery(dir.path()).unwrap();
            assert_eq!(fs::read_to_string(&auto).unwrap(), "work_mem = '4MB'\n");
        }
    }

    #[test]
    fn harmful_settings_go() {
        for line in [
            "primary_conninfo = 'x'",
            " Synchronous_Standby_Names='x'",
            "recovery_target_lsn\t= '0/1'",
        ] {
            assert!(is_replaced(line), "{line}");
        }
        for line in [
            "work_mem = '4MB'",
            "# archive_mode",
            "recovery_target_tim = 1",
            "",
        ] {
            assert!(!is_replaced(line), "{line}");
        }
    }
}
