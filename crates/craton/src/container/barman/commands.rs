//! What `barman` understands: its commands, and what becomes of the options of each.

use crate::container::options::{Accepted, Line, Opt, Takes, long, short};
use crate::exit::{Problem, USAGE};

/// Options of Barman 2 and 3 that people type.
const KNOWN: &[Opt] = &[
    short('h', "help", Takes::Nothing),
    short('v', "version", Takes::Nothing),
    short('c', "config", Takes::Value),
    short('q', "quiet", Takes::Nothing),
    short('d', "debug", Takes::Nothing),
    short('f', "format", Takes::Value),
    long("color", Takes::Value),
    long("colour", Takes::Value),
    long("log-level", Takes::Value),
    short('j', "jobs", Takes::Value),
    long("retry-times", Takes::Value),
    long("retry-sleep", Takes::Value),
    long("no-retry", Takes::Nothing),
    long("bwlimit", Takes::Value),
    long("network-compression", Takes::Nothing),
    long("no-network-compression", Takes::Nothing),
    long("immediate-checkpoint", Takes::Nothing),
    long("no-immediate-checkpoint", Takes::Nothing),
    long("reuse-backup", Takes::Maybe),
    short('w', "wait", Takes::Nothing),
    long("wait-timeout", Takes::Value),
    long("name", Takes::Value),
    long("incremental", Takes::Value),
    long("minimal", Takes::Nothing),
    long("nagios", Takes::Nothing),
    long("target-time", Takes::Value),
    long("target-xid", Takes::Value),
    long("target-lsn", Takes::Value),
    long("target-name", Takes::Value),
    long("target-tli", Takes::Value),
    long("target-immediate", Takes::Nothing),
    long("target-action", Takes::Value),
    long("exclusive", Takes::Nothing),
    long("tablespace", Takes::Value),
    long("standby-mode", Takes::Nothing),
    long("get-wal", Takes::Nothing),
    long("no-get-wal", Takes::Nothing),
    long("remote-ssh-command", Takes::Value),
    long("recovery-conf-filename", Takes::Value),
    long("force", Takes::Nothing),
    long("archive", Takes::Nothing),
    long("archive-timeout", Takes::Value),
    long("create-slot", Takes::Nothing),
    long("drop-slot", Takes::Nothing),
    long("if-not-exists", Takes::Nothing),
    long("reset", Takes::Nothing),
    long("stop", Takes::Nothing),
    long("keep-descriptors", Takes::Nothing),
];

/// Where the old configuration is, and how much is said.
const EVERYWHERE: &[&str] = &[
    "config",
    "quiet",
    "debug",
    "color",
    "colour",
    "log-level",
    "format",
];

/// What a command line asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asked {
    /// `--help`
    Help,
    /// `--version`
    Version,
    /// `list-backup`
    List,
    /// `show-backup`
    Show,
    /// `backup`
    Backup,
    /// `check`
    Check,
    /// `status`
    Status,
    /// `list-server`
    ListServer,
    /// `diagnose`
    Diagnose,
    /// `recover`
    Recover,
    /// `switch-wal`
    SwitchWal,
    /// `delete`
    Delete,
    /// What the daemon does by itself.
    Nothing,
}

/// The command, and what becomes of its options.
fn command(name: &str) -> Option<(Asked, Accepted)> {
    // How fast something is copied, and how often that is tried: the daemon tries on by itself.
    const COPYING: &[&str] = &[
        "jobs",
        "retry-times",
        "retry-sleep",
        "no-retry",
        "bwlimit",
        "network-compression",
        "no-network-compression",
    ];
    const BACKUP: &[&str] = &[
        "jobs",
        "retry-times",
        "retry-sleep",
        "no-retry",
        "bwlimit",
        "network-compression",
        "no-network-compression",
        "immediate-checkpoint",
        "no-immediate-checkpoint",
        "reuse-backup",
        "wait",
        "wait-timeout",
    ];
    let accepted = |done, needless, words| Accepted {
        done,
        needless,
        words,
    };
    Some(match name {
        "list-backup" | "list-backups" => (Asked::List, accepted(&["minimal"], &[], 1)),
        "show-backup" | "show-backups" => (Asked::Show, accepted(&[], &[], 2)),
        "backup" => (Asked::Backup, accepted(&[], BACKUP, 1)),
        "check" => (Asked::Check, accepted(&[], &[], 1)),
        "status" => (Asked::Status, accepted(&[], &[], 1)),
        "list-server" | "list-servers" => (Asked::ListServer, accepted(&["minimal"], &[], 0)),
        "diagnose" => (Asked::Diagnose, accepted(&[], &[], 1)),
        "recover" | "restore" => {
            let done = &[
                "target-time",
                "target-lsn",
                "target-immediate",
                "target-tli",
                "target-action",
                "tablespace",
                "get-wal",
            ];
            (Asked::Recover, accepted(done, COPYING, 3))
        }
        "switch-wal" | "switch-xlog" => {
            let done = &["archive", "archive-timeout"];
            (Asked::SwitchWal, accepted(done, &["force"], 1))
        }
        "delete" => (Asked::Delete, accepted(&[], &[], 2)),
        "cron" => (Asked::Nothing, accepted(&[], &["keep-descriptors"], 0)),
        "receive-wal" => {
            let needless = &["create-slot", "if-not-exists"];
            (Asked::Nothing, accepted(&[], needless, 1))
        }
        "archive-wal" => (Asked::Nothing, accepted(&[], &[], 1)),
        _ => return None,
    })
}

/// What to do instead of an option that is refused.
fn instead(option: &str) -> Option<&'static str> {
    Some(match option {
        "target-xid" | "target-name" => {
            "name a time or a position: --target-time, --target-lsn (pg_waldump finds the position of a transaction or of a restore point); --target-immediate stops at the end of the backup"
        }
        "exclusive" => {
            "choose a --target-time before the transaction, or the --target-lsn where the one before it ended"
        }
        "remote-ssh-command" => {
            "nothing is recovered through ssh: mount the repository's volume where the data shall be and run `craton restore`; docs/guide/docker.md shows it for a whole cluster"
        }
        "standby-mode" => {
            "a standby is made by its own container: craton reinit MEMBER, which reads the repository where it can"
        }
        "no-get-wal" => {
            "the restored server reads its WAL from the repository: keep that mounted until it has recovered"
        }
        "nagios" => {
            "the exit code of barman check says it: 0, or 1; /health and /metrics are on port 8080"
        }
        "name" => "backups are named by their time; barman list-backup shows them",
        "stop" | "reset" | "drop-slot" => {
            "the daemon of this container receives WAL as long as it runs: stop the container"
        }
        _ => return None,
    })
}

/// The hint where a command is not understood, and the help.
pub const HELP: &str = "known are: list-backup [--minimal], show-backup, backup, check, recover SERVER BACKUP DIRECTORY [--target-time|--target-lsn|--target-immediate] [--target-tli] [--tablespace OLD:NEW], delete, status, list-server, diagnose, cron, switch-wal [--archive [--archive-timeout SECONDS]], receive-wal";

/// Understands a command line, or refuses it.
pub fn understand(args: &[String]) -> anyhow::Result<(Asked, Line)> {
    let line = Line::of("barman", KNOWN, args)?;
    if line.has("help") {
        return Ok((Asked::Help, line));
    }
    if line.has("version") {
        return Ok((Asked::Version, line));
    }
    let Some(name) = line.word(0) else {
        return Err(Problem::new(USAGE, "barman needs a command", HELP).into());
    };
    let Some((asked, accepted)) = command(name) else {
        let what = format!("there is no barman command \"{name}\" here");
        return Err(Problem::new(USAGE, what, HELP).into());
    };
    line.check(&format!("barman {name}"), EVERYWHERE, &accepted, instead)?;
    if let Some(format) = line.option("format").filter(|f| *f != "console") {
        let what = format!("barman {name}: there is no output as \"{format}\" here");
        let hint = "barman diagnose is JSON; so is craton backup list --json, with --repo";
        return Err(Problem::new(USAGE, what, hint).into());
    }
    Ok((asked, line))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::{code_of, hint_of};

    fn typed(text: &str) -> anyhow::Result<(Asked, Line)> {
        understand(&crate::container::options::typed(text))
    }

    #[test]
    fn commands_as_they_are_typed() {
        for (text, expected) in [
            ("recover -j 4 pg_cluster latest /x", Asked::Recover),
            (
                "recover --jobs=4 pg_cluster latest /x --get-wal",
                Asked::Recover,
            ),
            ("-c /etc/barman.conf list-backup all --minimal", Asked::List),
            ("backup all --reuse-backup=link -j 2 --wait", Asked::Backup),
            ("switch-xlog --force --archive all", Asked::SwitchWal),
            (
                "switch-wal --archive --archive-timeout 60 pg_cluster",
                Asked::SwitchWal,
            ),
            ("receive-wal --create-slot pg_cluster", Asked::Nothing),
            ("-q cron", Asked::Nothing),
            ("-f console diagnose", Asked::Diagnose),
            ("recover --help", Asked::Help),
            ("-v", Asked::Version),
        ] {
            let (asked, _) = typed(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(asked, expected, "{text}");
        }
        let (_, line) = typed("recover -j 4 pg_cluster latest /x").unwrap();
        assert_eq!(line.words, ["recover", "pg_cluster", "latest", "/x"]);
    }

    #[test]
    fn what_would_be_left_out_is_refused_by_name() {
        for (text, option, hint) in [
            (
                "recover pg_cluster latest /x --target-xid 735",
                "--target-xid",
                "--target-time",
            ),
            (
                "recover pg_cluster latest /x --target-name=before",
                "--target-name",
                "--target-lsn",
            ),
            (
                "recover pg_cluster latest /x --target-time t --exclusive",
                "--exclusive",
                "before",
            ),
            (
                "recover --standby-mode pg_cluster latest /x",
                "--standby-mode",
                "reinit",
            ),
            (
                "recover --no-get-wal pg_cluster latest /x",
                "--no-get-wal",
                "mounted",
            ),
            (
                "recover pg_cluster latest /x --remote-ssh-command ssh",
                "--remote-ssh-command",
                "craton restore",
            ),
            (
                "recover pg_cluster latest /x --snapshot-zone z",
                "--snapshot-zone",
                "--help",
            ),
            ("receive-wal --stop pg_cluster", "--stop", "container"),
            ("check --nagios all", "--nagios", "exit code"),
            (
                "list-backup --target-time t all",
                "--target-time",
                "leave it out",
            ),
        ] {
            let error = typed(text).unwrap_err();
            assert!(error.to_string().contains(option), "{text}: {error}");
            assert_eq!(code_of(&error), USAGE, "{text}");
            let said = hint_of(&error).unwrap_or_default();
            assert!(said.contains(hint), "{text}: {said}");
        }
        for text in [
            "",
            "keep",
            "delete pg_cluster a b",
            "-f json list-backup all",
        ] {
            assert_eq!(code_of(&typed(text).unwrap_err()), USAGE, "{text}");
        }
    }
}
