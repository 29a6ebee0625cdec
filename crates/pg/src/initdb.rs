//! A new cluster: what initdb is called with, of which an operator may choose a part.
//!
//! What Craton rests on is not open to choice: checksums (pg_rewind), SCRAM and files of log-in of its own, WAL in the
//! data directory, segments of 16 MB.

use std::path::Path;
use std::process::Stdio;

use crate::control_data::ControlData;
use crate::error::{PgError, Result};
use crate::files::{self, blocking};
use crate::instance::{Instance, succeeded};

/// The locale of a cluster for which nobody has chosen one: the same on every system, whatever its C library.
const LOCALE: &str = "C.UTF-8";

/// Arguments with a value that may be chosen.
const CHOICES: [&str; 12] = [
    "locale",
    "lc-collate",
    "lc-ctype",
    "lc-monetary",
    "lc-numeric",
    "lc-time",
    "encoding",
    "locale-provider",
    "icu-locale",
    "icu-rules",
    "builtin-locale",
    "text-search-config",
];

/// Why some that initdb has may not be chosen.
const REFUSED: [(&[&str], &str); 10] = [
    (
        &["wal-segsize"],
        "what keeps logical slots whole through a failover, and the room that is kept for a full disk, count on segments of 16 MB",
    ),
    (
        &["no-data-checksums"],
        "checksums are always on: pg_rewind rests on them",
    ),
    (
        &["allow-group-access"],
        "the directory above the data is its owner's alone, so that a group would gain nothing",
    ),
    (
        &["waldir", "pgdata"],
        "data and WAL stand in \"data\" of the member's directory; mount or link that directory elsewhere",
    ),
    (
        &["username", "pwprompt", "pwfile"],
        "the superuser is postgres, and its password is in the directory of the secrets",
    ),
    (
        &["lc-messages"],
        "the agent reads PostgreSQL's log, so that its messages are English; a role may be given another language",
    ),
    (
        &["auth", "auth-host", "auth-local"],
        "who may log in is said by node.networks, and passwords are SCRAM",
    ),
    (
        &["set"],
        "PostgreSQL's settings have places of their own: [node.postgresql], in containers CONFIGS",
    ),
    (
        &[
            "no-sync",
            "sync-only",
            "sync-method",
            "no-clean",
            "show",
            "debug",
        ],
        "it is no property of the cluster",
    ),
    (
        &["no-instructions", "version", "help"],
        "it is only for people at a terminal",
    ),
];

/// Arguments of initdb that an operator has chosen, checked.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct InitArgs {
    /// `--name=value` each.
    args: Vec<String>,
}

impl InitArgs {
    /// Checks them. `-E UTF8`, `--encoding UTF8` and `--encoding=UTF8` are the same.
    pub fn parse<S: AsRef<str>>(words: &[S]) -> std::result::Result<Self, String> {
        let mut args = Vec::new();
        let mut words = words.iter().map(AsRef::as_ref);
        while let Some(word) = words.next() {
            let (name, value) = named(word)?;
            match (name, value) {
                // They are on in any case.
                ("data-checksums", None) => continue,
                ("no-locale", None) => {
                    args.push("--locale=C".to_owned());
                    continue;
                }
                _ => {}
            }
            let is_auth = matches!(name, "auth" | "auth-host" | "auth-local");
            if is_auth || CHOICES.contains(&name) {
                let value = value.or_else(|| words.next()).filter(|v| !v.is_empty());
                let value = value.ok_or_else(|| {
                    format!("the argument {word} of initdb needs a value: write --{name}=…")
                })?;
                if !is_auth {
                    args.push(format!("--{name}={value}"));
                    continue;
                }
                // As it is in any case.
                if value == "scram-sha-256" {
                    continue;
                }
            }
            let why = REFUSED.iter().find(|(names, _)| names.contains(&name));
            let why = why.map_or_else(String::new, |(_, why)| format!(": {why}"));
            return Err(format!(
                "the argument {word} of initdb cannot be chosen{why}. These can: --{}, --no-locale, --data-checksums",
                CHOICES.join(", --")
            ));
        }
        Ok(Self { args })
    }

    /// Takes a line apart as a shell does: blanks between words, quotes and backslashes.
    pub fn split(line: &str) -> std::result::Result<Vec<String>, String> {
        let mut words = Vec::new();
        let mut word: Option<String> = None;
        let mut quote = None;
        let mut chars = line.chars();
        while let Some(c) = chars.next() {
            match (quote, c) {
                (Some(q), _) if c == q => quote = None,
                (None, '\'' | '"') => {
                    quote = Some(c);
                    word.get_or_insert_default();
                }
                (None | Some('"'), '\\') => match chars.next() {
                    Some(next) => word.get_or_insert_default().push(next),
                    None => return Err(format!("a lone backslash ends {line}")),
                },
                (None, c) if c.is_whitespace() => words.extend(word.take()),
                (_, c) => word.get_or_insert_default().push(c),
            }
        }
        if let Some(quote) = quote {
            return Err(format!("a quote {quote} is not closed in {line}"));
        }
        words.extend(word);
        Ok(words)
    }

    /// True where the locale as a whole is chosen.
    pub fn has_locale(&self) -> bool {
        self.has("locale")
    }

    /// Each as `--name=value`.
    pub fn words(&self) -> &[String] {
        &self.args
    }

    fn has(&self, name: &str) -> bool {
        let is = |arg: &String| {
            let rest = arg.strip_prefix("--").and_then(|a| a.strip_prefix(name));
            rest.is_some_and(|r| r.starts_with('='))
        };
        self.args.iter().any(is)
    }

    /// What initdb gets: a default for what was not chosen.
    fn complete(&self) -> Vec<String> {
        let mut all = vec!["--data-checksums".to_owned()];
        if !self.has("encoding") {
            all.push("--encoding=UTF8".to_owned());
        }
        if !self.has_locale() {
            all.push(format!("--locale={LOCALE}"));
        }
        all.extend(self.args.iter().cloned());
        all
    }
}

/// The long name of an argument, and the value where it is in the same word.
fn named(word: &str) -> std::result::Result<(&str, Option<&str>), String> {
    if let Some(long) = word.strip_prefix("--") {
        return Ok(match long.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (long, None),
        });
    }
    let mut chars = word.chars();
    let (Some('-'), Some(short)) = (chars.next(), chars.next()) else {
        return Err(format!(
            "\"{word}\" is no argument of initdb: write --name=value"
        ));
    };
    let name = match short {
        'E' => "encoding",
        'T' => "text-search-config",
        'k' => "data-checksums",
        'g' => "allow-group-access",
        'A' => "auth",
        'X' => "waldir",
        'D' => "pgdata",
        'U' => "username",
        'W' => "pwprompt",
        'c' => "set",
        'N' => "no-sync",
        'S' => "sync-only",
        'n' => "no-clean",
        's' => "show",
        'd' => "debug",
        _ => word,
    };
    let rest = chars.as_str();
    Ok((name, Some(rest).filter(|r| !r.is_empty())))
}

/// For a new cluster. The password does not show in `Debug`.
#[derive(Clone)]
pub struct InitOptions {
    /// The superuser's password for TCP connections.
    pub superuser_password: String,
    /// What the operator has chosen.
    pub args: InitArgs,
}

impl std::fmt::Debug for InitOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InitOptions(…)")
    }
}

impl Instance {
    /// Makes a new cluster: checksums on, SCRAM, UTF-8 where nothing else was chosen. It is made beside and renamed
    /// into place.
    pub async fn initdb(&self, options: &InitOptions) -> Result<ControlData> {
        let (this, options) = (self.clone(), options.clone());
        blocking(move || this.initdb_blocking(&options)).await
    }

    fn initdb_blocking(&self, options: &InitOptions) -> Result<ControlData> {
        self.check_data_dir_is_free()?;
        let making = self.member_dir().join("data.init");
        files::remove_tree(&making)?;
        let mut command = self.writing_tool("initdb");
        command
            .arg("-D")
            .arg(&making)
            .args(["-U", &self.config().superuser])
            .args(options.args.complete())
            .args([
                "--auth-local=peer",
                "--auth-host=scram-sha-256",
                "--pwfile=/dev/stdin",
            ])
            .args(files::can_flush_file_systems().then_some("--no-sync"))
            .env("LC_ALL", LOCALE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .map_err(PgError::io("cannot run", Path::new("initdb")))?;
        if let Some(mut stdin) = child.stdin.take() {
            use std::io::Write;
            // If initdb ended before it read the password, its own message is the better one.
            let _ = writeln!(stdin, "{}", options.superuser_password);
        }
        let output = child
            .wait_with_output()
            .map_err(PgError::io("cannot run", Path::new("initdb")))?;
        if let Err(e) = succeeded("initdb", &output) {
            files::remove_tree(&making)?;
            return Err(e);
        }
        self.let_owner_in(&making)?;
        files::flush_data_dir(&making)?;
        self.move_into_place(&making)?;
        self.read_control_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> std::result::Result<Vec<String>, String> {
        InitArgs::parse(&InitArgs::split(line)?).map(|a| a.complete())
    }

    #[test]
    fn what_is_not_chosen_has_a_default() {
        assert_eq!(
            parse("").unwrap(),
            ["--data-checksums", "--encoding=UTF8", "--locale=C.UTF-8"]
        );
        assert_eq!(
            parse("-E LATIN1 --locale de_DE --data-checksums -k --lc-time=C").unwrap(),
            [
                "--data-checksums",
                "--encoding=LATIN1",
                "--locale=de_DE",
                "--lc-time=C"
            ]
        );
        assert_eq!(
            parse("--no-locale -EUTF8").unwrap(),
            ["--data-checksums", "--locale=C", "--encoding=UTF8"]
        );
        // The ICU locale has its own word, and the C library's stays the default.
        assert_eq!(
            parse("--locale-provider=icu --icu-locale='de-u-co-phonebk' --icu-rules=\"&a < g\"")
                .unwrap(),
            [
                "--data-checksums",
                "--encoding=UTF8",
                "--locale=C.UTF-8",
                "--locale-provider=icu",
                "--icu-locale=de-u-co-phonebk",
                "--icu-rules=&a < g"
            ]
        );
    }

    #[test]
    fn what_craton_has_in_any_case_is_taken() {
        for line in [
            "--auth-host=scram-sha-256",
            "-A scram-sha-256",
            "--auth=scram-sha-256 --auth-local=scram-sha-256",
            "--data-checksums",
            "-k",
        ] {
            assert_eq!(parse(line).unwrap(), parse("").unwrap(), "{line}");
        }
    }

    #[test]
    fn what_craton_rests_on_cannot_be_chosen() {
        for (line, why) in [
            ("--wal-segsize=64", "16 MB"),
            ("--no-data-checksums", "pg_rewind"),
            ("-g", "its owner's alone"),
            ("--allow-group-access", "its owner's alone"),
            ("-X /wal", "WAL stand in"),
            ("--waldir=/wal", "WAL stand in"),
            ("-U me", "secrets"),
            ("--auth-host=md5", "node.networks"),
            ("--auth=trust", "node.networks"),
            ("-c shared_buffers=1GB", "CONFIGS"),
            ("--frobnicate", "cannot be chosen. These can: --locale,"),
            ("-q", "cannot be chosen"),
            ("UTF8", "no argument of initdb"),
            ("--locale", "needs a value"),
            ("--locale=", "needs a value"),
            ("--locale='x", "not closed"),
            ("--locale=x\\", "backslash"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(why), "{line}: {error}");
        }
    }

    #[test]
    fn words_of_a_line() {
        let split = |line: &str| InitArgs::split(line).unwrap();
        assert_eq!(split("  a\t b\n"), ["a", "b"]);
        assert_eq!(
            split("a='b c'd \"e\\\"f\" '' g\\ h"),
            ["a=b cd", "e\"f", "", "g h"]
        );
        assert!(split(" ").is_empty());
    }
}
