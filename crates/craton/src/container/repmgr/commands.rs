//! What `repmgr` understands: its commands, and what becomes of the options of each.

use crate::container::options::{Accepted, Line, Opt, Takes, long, short};
use crate::exit::{Problem, USAGE};

/// Every option of repmgr 3 to 5 that people type. What is not here is refused by name, too; here it is known whether the
/// word behind it is its value.
const KNOWN: &[Opt] = &[
    short('?', "help", Takes::Nothing),
    short('V', "version", Takes::Nothing),
    short('f', "config-file", Takes::Value),
    short('b', "pg_bindir", Takes::Value),
    short('d', "dbname", Takes::Value),
    short('h', "host", Takes::Value),
    short('p', "port", Takes::Value),
    short('U', "username", Takes::Value),
    short('S', "superuser", Takes::Value),
    short('L', "log-level", Takes::Value),
    long("log-to-file", Takes::Nothing),
    short('t', "terse", Takes::Nothing),
    short('v', "verbose", Takes::Nothing),
    short('q', "quiet", Takes::Nothing),
    short('F', "force", Takes::Nothing),
    short('W', "wait", Takes::Nothing),
    long("no-wait", Takes::Nothing),
    long("wait-sync", Takes::Maybe),
    long("wait-start", Takes::Value),
    short('D', "pgdata", Takes::Value),
    short('R', "remote-user", Takes::Value),
    short('c', "fast-checkpoint", Takes::Nothing),
    short('m', "mode", Takes::Value),
    short('C', "remote-config-file", Takes::Value),
    long("node-id", Takes::Value),
    long("node-name", Takes::Value),
    long("upstream-node-id", Takes::Value),
    long("upstream-conninfo", Takes::Value),
    long("replication-user", Takes::Value),
    long("dry-run", Takes::Nothing),
    long("always-promote", Takes::Nothing),
    long("force-rewind", Takes::Maybe),
    long("siblings-follow", Takes::Nothing),
    long("repmgrd-no-pause", Takes::Nothing),
    long("repmgrd-force-unpause", Takes::Nothing),
    long("config-files", Takes::Value),
    long("config-archive-dir", Takes::Value),
    long("action", Takes::Value),
    long("list-actions", Takes::Nothing),
    long("checkpoint", Takes::Nothing),
    long("csv", Takes::Nothing),
    long("compact", Takes::Nothing),
    long("nagios", Takes::Nothing),
    long("all", Takes::Nothing),
    long("limit", Takes::Value),
    long("event", Takes::Value),
    long("role", Takes::Nothing),
    long("replication-lag", Takes::Nothing),
    long("slots", Takes::Nothing),
    long("missing-slots", Takes::Nothing),
    long("archive-ready", Takes::Nothing),
    long("downstream", Takes::Nothing),
    long("upstream", Takes::Nothing),
    long("is-shutdown-cleanly", Takes::Nothing),
];

/// How to connect and where the old configuration is, which nobody needs to say any more; and how much is said.
const EVERYWHERE: &[&str] = &[
    "config-file",
    "pg_bindir",
    "dbname",
    "host",
    "port",
    "username",
    "superuser",
    "log-level",
    "log-to-file",
    "terse",
    "verbose",
    "quiet",
];

/// What a command line asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asked {
    /// `--help`
    Help,
    /// `--version`
    Version,
    /// `cluster show`
    Show,
    /// `cluster crosscheck`, `cluster matrix`
    Crosscheck,
    /// `cluster event`
    Events,
    /// `node status`, `node check`
    NodeStatus,
    /// `standby switchover`
    Switchover,
    /// `standby promote`
    Promote,
    /// `standby unregister`, `primary unregister`
    Unregister,
    /// What the agents do by themselves.
    Nothing,
}

const fn accepted(done: &'static [&'static str], needless: &'static [&'static str]) -> Accepted {
    Accepted {
        done,
        needless,
        words: 0,
    }
}

/// The command, and what becomes of its options.
fn command(words: &[&str]) -> Option<(Asked, Accepted)> {
    // Where nothing is done, trying it is the same; a wait is for what is so already.
    const NOTHING: &[&str] = &["dry-run", "force", "wait", "wait-sync", "wait-start"];
    Some(match words {
        ["cluster", "show", ..] => (Asked::Show, accepted(&["csv"], &[])),
        ["cluster", "crosscheck" | "matrix", ..] => (Asked::Crosscheck, accepted(&["csv"], &[])),
        ["cluster", "event" | "events", ..] => (Asked::Events, accepted(&[], &["all"])),
        ["node", "status" | "check", ..] => (Asked::NodeStatus, accepted(&[], &[])),
        ["standby", "switchover", ..] => {
            // Nothing is forced here that is not safe, the others always follow, and a former leader is always rewound.
            let needless = &[
                "force",
                "force-rewind",
                "siblings-follow",
                "remote-user",
                "remote-config-file",
                "mode",
                "repmgrd-no-pause",
                "repmgrd-force-unpause",
                "wait",
            ];
            (Asked::Switchover, accepted(&["dry-run"], needless))
        }
        ["standby", "promote", ..] => {
            let needless = &["force", "siblings-follow", "wait"];
            (Asked::Promote, accepted(&["dry-run"], needless))
        }
        ["standby" | "primary" | "master", "unregister", ..] => {
            let done = &["dry-run", "node-id", "node-name"];
            (Asked::Unregister, accepted(done, &["force"]))
        }
        ["standby", "follow" | "register", ..] | ["primary" | "master", "register", ..] => {
            (Asked::Nothing, accepted(&[], NOTHING))
        }
        ["standby", "clone", ..] => {
            let needless = &["dry-run", "fast-checkpoint", "replication-user"];
            (Asked::Nothing, accepted(&[], needless))
        }
        ["node", "rejoin", ..] => {
            let needless = &[
                "dry-run",
                "force",
                "force-rewind",
                "config-files",
                "config-archive-dir",
                "wait",
                "no-wait",
            ];
            (Asked::Nothing, accepted(&[], needless))
        }
        ["node", "service", ..] => (Asked::Nothing, accepted(&[], &["list-actions"])),
        _ => return None,
    })
}

/// What to do instead of an option that is refused.
fn instead(asked: Asked, option: &str) -> Option<&'static str> {
    Some(match (asked, option) {
        (_, "always-promote") => {
            "craton failover --to MEMBER --allow-data-loss says first what would be lost, and asks"
        }
        (_, "upstream-node-id" | "upstream-conninfo") => {
            "whom a node streams from follows from REPLICATION_PRIMARY_HOST in its environment"
        }
        (Asked::Nothing, "force" | "pgdata") => "craton reinit MEMBER clones a node anew",
        (Asked::Nothing, "action" | "checkpoint") => {
            "craton restart MEMBER, craton reload MEMBER, or stop the node's container"
        }
        (Asked::Switchover | Asked::Promote, "node-id" | "node-name") => {
            "type it in the container of the node that is to lead, or craton switchover --to MEMBER"
        }
        (Asked::NodeStatus, _) => {
            "repmgr node status says all of it, with exit code 25 where something is wrong; craton status --json is for scripts"
        }
        (Asked::Events, _) => "craton history --json has all of it",
        (Asked::Show | Asked::Crosscheck, _) => "--csv is for scripts, and craton status --json",
        _ => return None,
    })
}

/// The hint where a command is not understood, and the help.
pub const HELP: &str = "known are: cluster show|crosscheck|matrix [--csv], cluster event, node status, standby switchover|promote [--dry-run], standby|primary unregister [--node-id=N|--node-name=NAME] [--dry-run]; follow, register, clone and rejoin have nothing to do";

/// Understands a command line, or refuses it.
pub fn understand(args: &[String]) -> anyhow::Result<(Asked, Line)> {
    let line = Line::of("repmgr", KNOWN, args)?;
    if line.has("help") {
        return Ok((Asked::Help, line));
    }
    if line.has("version") {
        return Ok((Asked::Version, line));
    }
    let words: Vec<&str> = line.words.iter().map(String::as_str).collect();
    let Some((asked, accepted)) = command(&words) else {
        let what = match words.as_slice() {
            [] => "repmgr needs a command".to_owned(),
            words => format!("there is no repmgr command \"{}\" here", words.join(" ")),
        };
        return Err(Problem::new(USAGE, what, HELP).into());
    };
    let typed = words.iter().take(2).copied().collect::<Vec<_>>().join(" ");
    line.check(&format!("repmgr {typed}"), EVERYWHERE, &accepted, |o| {
        instead(asked, o)
    })?;
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
            ("cluster show", Asked::Show),
            ("-f /etc/repmgr.conf cluster show --csv -v", Asked::Show),
            ("cluster matrix", Asked::Crosscheck),
            (
                "standby switchover --siblings-follow --force-rewind -R postgres",
                Asked::Switchover,
            ),
            ("standby switchover --dry-run", Asked::Switchover),
            ("standby promote -f /etc/repmgr.conf", Asked::Promote),
            ("primary unregister --node-id 3", Asked::Unregister),
            (
                "standby unregister --node-id=3 --dry-run",
                Asked::Unregister,
            ),
            (
                "-h pgmaster -U repl -d repl standby clone --fast-checkpoint",
                Asked::Nothing,
            ),
            (
                "node rejoin -d 'host=x' --force-rewind --config-files=a,b",
                Asked::Nothing,
            ),
            ("standby switchover --help", Asked::Help),
            ("--version", Asked::Version),
        ] {
            let (asked, _) = typed(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(asked, expected, "{text}");
        }
        let (_, line) = typed("primary unregister --node-id 3").unwrap();
        assert_eq!(line.option("node-id"), Some("3"));
    }

    #[test]
    fn what_would_be_left_out_is_refused_by_name() {
        for (text, option, hint) in [
            (
                "standby switchover --always-promote",
                "--always-promote",
                "failover",
            ),
            (
                "standby switchover --node-id=3",
                "--node-id",
                "craton switchover",
            ),
            (
                "standby follow --upstream-node-id 2",
                "--upstream-node-id",
                "REPLICATION_PRIMARY_HOST",
            ),
            ("standby clone --force", "--force", "reinit"),
            ("node service --action=stop", "--action", "restart"),
            ("node check --role", "--role", "node status"),
            ("cluster event --limit=5", "--limit", "history"),
            ("cluster show --frobnicate", "--frobnicate", "--help"),
        ] {
            let error = typed(text).unwrap_err();
            assert!(error.to_string().contains(option), "{text}: {error}");
            assert_eq!(code_of(&error), USAGE, "{text}");
            let said = hint_of(&error).unwrap_or_default();
            assert!(said.contains(hint), "{text}: {said}");
        }
        for text in ["", "cluster", "cluster cleanup", "standby unregister 3"] {
            assert_eq!(code_of(&typed(text).unwrap_err()), USAGE, "{text}");
        }
    }
}
