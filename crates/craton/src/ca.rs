//! `craton ca`: the cluster's authority, and tokens for hosts that are to join.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand, ValueEnum};
use craton_console::join::{TokenRequest, TokenView};
use craton_trust::authority::{self, Authority, BUNDLE_FILE, Facts, KEY_FILE};
use craton_trust::files::{authorities, write_secret};
use craton_trust::join::{JoinToken, hex, unhex};
use craton_trust::{Role, TlsFiles};
use serde::Serialize;

use crate::access::Access;
use crate::exit::{self, Problem, USAGE};
use crate::output::{self, Colour, paint};
use crate::secrets;

/// How long keeping a token may take.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(10);

/// The authority that is to sign next, between `begin` and `switch`.
const NEXT_KEY_FILE: &str = "authority-next.key";

/// The sub-commands of `craton ca`.
#[derive(Subcommand, Debug)]
pub enum CaCommand {
    /// Make a new cluster's authority and its other secrets, in a directory; what is there stays
    Init {
        /// The cluster's name, as in node.cluster
        #[arg(long, value_name = "NAME")]
        cluster: String,
        /// The directory of the secrets, as in node.secrets
        #[arg(long, value_name = "DIR")]
        secrets: PathBuf,
    },
    /// Make a token with which one new host joins
    Token(TokenArgs),
    /// What the certificates in a directory say
    Show {
        /// The directory [default: the local cluster's secrets]
        #[arg(long, value_name = "DIR")]
        secrets: Option<PathBuf>,
    },
    /// Replace the authority, in three steps with time between them
    Rotate {
        /// The step
        step: RotateStep,
        /// The directory with the authority's key [default: the local cluster's secrets]
        #[arg(long, value_name = "DIR")]
        secrets: Option<PathBuf>,
    },
}

/// The steps of `craton ca rotate`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum RotateStep {
    /// Make the next authority; both are trusted from now on
    Begin,
    /// The next one signs; every part gets a new certificate
    Switch,
    /// The former one is trusted no longer
    Finish,
}

/// `craton ca token`
#[derive(Args, Debug)]
pub struct TokenArgs {
    /// What the new host will be: node, proxy, backup, witness or operator
    #[arg(long, default_value = "node", value_name = "ROLE")]
    pub role: Role,
    /// Its name: the member's for a node, the witness's for a witness
    #[arg(long, value_name = "NAME")]
    pub name: String,
    /// For how long it is good: seconds, or with m, h or d behind
    #[arg(long, default_value = "1h", value_name = "TIME", value_parser = duration)]
    pub ttl: Duration,
    /// Host name or address for its certificate: for a node that under which the others reach its PostgreSQL. May be given
    /// more than once
    #[arg(long = "host", value_name = "HOST")]
    pub hosts: Vec<String>,
}

/// Reads `90`, `90s`, `15m`, `2h`, `1d`.
fn duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit());
    let (digits, unit) = text.split_at(split.unwrap_or(text.len()));
    let factor = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(format!("\"{unit}\" is no unit of time: use s, m, h or d")),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(factor))
        .filter(|s| *s > 0)
        .map(Duration::from_secs)
        .ok_or_else(|| format!("\"{text}\" is no time like 90s, 15m, 2h or 1d"))
}

/// Makes the secrets and the authority of a new cluster.
pub fn init(cluster: &str, dir: &Path, json: bool) -> anyhow::Result<u8> {
    secrets::ensure_common(dir)?;
    let made = !dir.join(KEY_FILE).exists();
    let authority = authority::ensure(dir, cluster)?;
    let sha256 = hex(&authority.sha256()?);
    if json {
        output::json(&serde_json::json!({
            "cluster": cluster, "secrets": dir, "made": made, "authority_sha256": sha256,
        }))?;
    } else {
        let verb = if made { "made" } else { "there is already" };
        output::line(format!(
            "{verb}: the authority of cluster \"{cluster}\" in {}\n  sha256 {sha256}\n\
             {KEY_FILE} signs certificates: it belongs on members' hosts alone, and into a safe place",
            dir.display()
        ));
    }
    Ok(exit::OK)
}

/// Keeps a token's hash in the cluster and prints the token.
pub async fn token(access: &Access, args: TokenArgs, json: bool) -> anyhow::Result<u8> {
    let secret: [u8; 32] = rand::random();
    // The id depends on the secret alone; whom to trust is told by the answer.
    let mut token = JoinToken {
        authority_sha256: [0; 32],
        secret,
    };
    let request = TokenRequest {
        id: token.id(),
        role: args.role,
        name: args.name.clone(),
        hosts: args.hosts,
        ttl_s: args.ttl.as_secs(),
    };
    let kept: TokenView = access
        .post(None, "/v1/join-tokens", &request, TOKEN_TIMEOUT)
        .await?;
    token.authority_sha256 = unhex(&kept.signer_sha256)
        .ok_or_else(|| anyhow::anyhow!("the agent's answer names no authority"))?;
    let agent = access.agents.first().map_or("HOST:PORT", String::as_str);
    if json {
        output::json(&serde_json::json!({
            "token": token.to_string(), "expires_at_ms": kept.expires_at_ms, "agent": agent,
        }))?;
    } else {
        output::line(token.to_string());
        output::note(format!(
            "good once, for {}, for {} \"{}\". On the new host:\n  craton join {agent} --token - --into /etc/craton/secrets",
            output::duration(args.ttl),
            args.role,
            args.name
        ));
    }
    Ok(exit::OK)
}

/// A line of `craton ca show`.
#[derive(Serialize)]
struct Shown {
    file: String,
    holder: String,
    hosts: Vec<String>,
    valid_hours: u64,
    problem: Option<String>,
}

fn hours_left(facts: &Facts) -> u64 {
    let left = facts.not_after.duration_since(SystemTime::now());
    left.unwrap_or_default().as_secs() / 3600
}

/// Prints what the certificates in a directory say.
pub fn show(dir: &Path, json: bool) -> anyhow::Result<u8> {
    let mut shown = Vec::new();
    for der in authorities(&dir.join(BUNDLE_FILE))? {
        let facts = Facts::of_certificate(&der)?;
        shown.push(Shown {
            file: BUNDLE_FILE.to_owned(),
            holder: format!("authority, sha256 {}", hex(&authority::sha256(&der))),
            hosts: Vec::new(),
            valid_hours: hours_left(&facts),
            problem: None,
        });
    }
    let mut stems: Vec<String> = std::fs::read_dir(dir)?
        .flatten()
        .filter_map(|e| Some(e.file_name().to_str()?.strip_suffix(".pem")?.to_owned()))
        .filter(|stem| format!("{stem}.pem") != BUNDLE_FILE)
        .collect();
    stems.sort();
    for stem in stems {
        let files = TlsFiles::in_dir(dir, &stem);
        let mut line = Shown {
            file: format!("{stem}.pem"),
            holder: String::new(),
            hosts: Vec::new(),
            valid_hours: 0,
            problem: craton_trust::Trust::open(files.clone())
                .err()
                .map(|e| e.to_string()),
        };
        if let Ok(loaded) = files.load() {
            line.holder = loaded.identity.to_string();
            line.valid_hours = hours_left(&loaded.facts);
            line.hosts = loaded.facts.hosts;
        }
        shown.push(line);
    }
    let good = shown.iter().all(|s| s.problem.is_none());
    if json {
        output::json(&shown)?;
    } else {
        for s in shown {
            let valid = format!(
                "valid for {} days {} h",
                s.valid_hours / 24,
                s.valid_hours % 24
            );
            let hosts = if s.hosts.is_empty() {
                String::new()
            } else {
                format!("; hosts {}", s.hosts.join(", "))
            };
            output::line(format!(
                "{}: {}; {valid}{hosts}",
                paint(Colour::Cyan, &s.file),
                s.holder
            ));
            if let Some(problem) = s.problem {
                output::line(format!("  {} {problem}", paint(Colour::Red, "of no use:")));
            }
        }
    }
    Ok(if good { exit::OK } else { exit::FAILURE })
}

/// One step of a change of the authority. Each may be repeated.
pub fn rotate(step: RotateStep, dir: &Path) -> anyhow::Result<u8> {
    let (key, next, bundle) = (
        dir.join(KEY_FILE),
        dir.join(NEXT_KEY_FILE),
        dir.join(BUNDLE_FILE),
    );
    let present = Authority::load(&key)?;
    let said = match step {
        RotateStep::Begin => {
            if !next.exists() {
                Authority::create(present.cluster())?.store_key(&next)?;
            }
            let coming = Authority::load(&next)?;
            let both = format!("{}{}", present.certificate_pem(), coming.certificate_pem());
            write_secret(&bundle, &both)?;
            "both authorities are trusted; copy authority.pem and authority-next.key to the other members' hosts, wait until every part has taken the bundle up (two minutes), then: craton ca rotate switch (with the same --secrets, where there is one)"
        }
        RotateStep::Switch => {
            if !next.exists() {
                return Err(Problem::new(
                    USAGE,
                    format!("there is no {}", next.display()),
                    "`craton ca rotate begin` comes first",
                )
                .into());
            }
            std::fs::rename(&next, &key)?;
            "the new authority signs; every part gets a new certificate within two minutes. Do the same on the other members' hosts; when `craton ca show` shows new certificates everywhere: craton ca rotate finish (with the same --secrets)"
        }
        RotateStep::Finish => {
            if next.exists() {
                return Err(Problem::new(
                    USAGE,
                    format!("{} does not sign yet", next.display()),
                    "`craton ca rotate switch` comes first",
                )
                .into());
            }
            write_secret(&bundle, present.certificate_pem())?;
            "the former authority is trusted no longer; do the same on the other members' hosts"
        }
    };
    output::line(said);
    Ok(exit::OK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("15m"), Ok(Duration::from_secs(900)));
        assert_eq!(duration("2h"), Ok(Duration::from_secs(7200)));
        for wrong in ["", "h", "0", "-1", "1w", "99999999999999999999h"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_authority_changes_in_three_steps_that_may_be_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let first = authority::ensure(dir, "c").unwrap().sha256().unwrap();
        let trusted = || authorities(&dir.join(BUNDLE_FILE)).unwrap().len();
        let signs = || {
            Authority::load(&dir.join(KEY_FILE))
                .unwrap()
                .sha256()
                .unwrap()
        };
        assert!(rotate(RotateStep::Switch, dir).is_err());
        for _ in 0..2 {
            rotate(RotateStep::Begin, dir).unwrap();
            assert_eq!((trusted(), signs() == first), (2, true));
        }
        assert!(rotate(RotateStep::Finish, dir).is_err());
        rotate(RotateStep::Switch, dir).unwrap();
        assert_eq!((trusted(), signs() == first), (2, false));
        for _ in 0..2 {
            rotate(RotateStep::Finish, dir).unwrap();
            assert_eq!((trusted(), signs() == first), (1, false));
        }
    }
}
