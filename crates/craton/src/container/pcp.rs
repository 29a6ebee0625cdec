//! `pcp_*` and the old balancer's probes, over what the proxy of this container shows.

use std::time::Duration;

use anyhow::Context as _;
use tokio_postgres::{NoTls, SimpleQueryMessage};

use super::entry::Facts;
use super::options::{Accepted, Line, Opt, Takes, short};
use super::repmgr::access;
use crate::change::{self, SwitchoverArgs};
use crate::cli::wait_for;
use crate::exit::{self, Problem, USAGE};
use crate::output;

/// How long the proxy may take to answer.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);

/// A row of `SHOW pool_nodes`.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Row {
    id: String,
    host: String,
    port: String,
    up: bool,
    weight: String,
    primary: bool,
}

async fn rows(facts: &Facts) -> anyhow::Result<Vec<Row>> {
    let listens = super::settings::proxy_address()?;
    let (host, port) = listens
        .rsplit_once(':')
        .and_then(|(host, port)| Some((host, port.parse().ok()?)))
        .context("the proxy's port is not known")?;
    let (user, password) = facts.env.check_login();
    let (client, connection) = tokio_postgres::Config::new()
        .host(host)
        .port(port)
        .user(user)
        .password(password)
        .dbname("postgres")
        .connect_timeout(ASK_TIMEOUT)
        .connect(NoTls)
        .await
        .context("cannot log in to the proxy as CHECK_USER")?;
    tokio::spawn(connection);
    let found = client.simple_query("SHOW pool_nodes").await?;
    let row = |message: SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => {
            let text = |n: &str| row.get(n).unwrap_or_default().to_owned();
            Some(Row {
                id: text("node_id"),
                host: text("hostname"),
                port: text("port"),
                up: text("status") == "up",
                weight: text("lb_weight"),
                primary: text("role") == "primary",
            })
        }
        _ => None,
    };
    Ok(found.into_iter().filter_map(row).collect())
}

async fn asked(facts: &Facts) -> anyhow::Result<Vec<Row>> {
    tokio::time::timeout(ASK_TIMEOUT, rows(facts))
        .await
        .context("the proxy does not answer")?
}

/// `has_write_node.sh`: 0 if there is a primary.
pub async fn has_write_node() -> anyhow::Result<u8> {
    let rows = asked(&Facts::require()?).await?;
    let there = rows.iter().any(|r| r.up && r.primary);
    Ok(if there { exit::OK } else { exit::FAILURE })
}

/// `has_enough_backends.sh [N]`: 0 if at least N nodes are up.
pub async fn has_enough(args: &[String]) -> anyhow::Result<u8> {
    let facts = Facts::require()?;
    let least: usize = match args.first() {
        Some(text) => text.parse().context("the number of nodes is no number")?,
        None => facts
            .env
            .number("REQUIRE_MIN_BACKENDS")
            .map_err(anyhow::Error::msg)?
            .unwrap_or(0),
    };
    if least == 0 {
        return Ok(exit::OK);
    }
    let up = asked(&facts).await?.iter().filter(|r| r.up).count();
    Ok(if up >= least { exit::OK } else { exit::FAILURE })
}

/// Options of the `pcp_*` programs.
const KNOWN: &[Opt] = &[
    short('?', "help", Takes::Nothing),
    short('V', "version", Takes::Nothing),
    short('h', "host", Takes::Value),
    short('p', "port", Takes::Value),
    short('U', "username", Takes::Value),
    short('t', "timeout", Takes::Value),
    short('w', "no-password", Takes::Nothing),
    short('W', "password", Takes::Nothing),
    short('d', "debug", Takes::Nothing),
    short('v', "verbose", Takes::Nothing),
    short('n', "node-id", Takes::Value),
    short('g', "gracefully", Takes::Nothing),
    short('s', "switchover", Takes::Nothing),
    short('a', "all", Takes::Nothing),
];

/// How to connect, which nobody needs to say in the proxy's own container; and how much is said.
const EVERYWHERE: &[&str] = &[
    "host",
    "port",
    "username",
    "timeout",
    "no-password",
    "password",
    "debug",
];

/// Words of the old form, `pcp_NAME TIMEOUT HOST PORT USER PASSWORD NODE`.
const OLD_WORDS: usize = 6;

/// What becomes of the other options.
fn accepted(name: &str) -> Accepted {
    let (done, needless): (&'static [&'static str], &'static [&'static str]) = match name {
        // Verbose is another form of the output.
        "pcp_node_info" => (&["node-id"], &[]),
        // The leader always hands over, and waits for what runs.
        "pcp_promote_node" => (&["node-id"], &["gracefully", "switchover", "verbose"]),
        "pcp_node_count" => (&[], &["verbose"]),
        _ => (&["node-id"], &["gracefully", "verbose"]),
    };
    Accepted {
        done,
        needless,
        words: OLD_WORDS,
    }
}

fn understand(name: &str, args: &[String]) -> anyhow::Result<Line> {
    let line = Line::of(name, KNOWN, args)?;
    if !line.has("help") && !line.has("version") {
        line.check(name, EVERYWHERE, &accepted(name), |_| {
            let asks = ["pcp_node_info", "pcp_node_count"].contains(&name);
            asks.then_some("SHOW pool_nodes in any session of the proxy has all of it")
        })?;
    }
    Ok(line)
}

/// The node: what `-n` says, else the last word.
fn node_of(line: &Line) -> Option<&str> {
    let last = line.words.last().map(String::as_str);
    let word = line.option("node-id").or(last)?;
    (!word.is_empty() && word.bytes().all(|b| b.is_ascii_digit())).then_some(word)
}

/// Runs `pcp_NAME ARGS`.
pub fn run(name: &str, args: &[String]) -> anyhow::Result<u8> {
    let line = understand(name, args)?;
    if line.has("help") || line.has("version") {
        output::line(format!(
            "{name} (craton {}) [-n] NODE; SHOW pool_nodes shows the nodes",
            env!("CARGO_PKG_VERSION")
        ));
        return Ok(exit::OK);
    }
    let facts = Facts::require()?;
    let node = || {
        node_of(&line).map(ToOwned::to_owned).ok_or_else(|| {
            anyhow::Error::from(Problem::new(
                USAGE,
                format!("{name} needs the number of a node"),
                "SHOW pool_nodes shows them",
            ))
        })
    };
    match name {
        "pcp_attach_node" => {
            node()?;
            output::line(
                "pcp_attach_node -- Command Successful\nnothing had to be done: nodes are used again as soon as they serve",
            );
            Ok(exit::OK)
        }
        "pcp_detach_node" => {
            node()?;
            let what = "a node that serves is not taken away from the proxy alone";
            let hint = "craton restart or reinit MEMBER for work on it, craton member remove MEMBER to take it out, craton switchover if it leads";
            Err(Problem::new(exit::REFUSED, what, hint).into())
        }
        "pcp_node_count" => wait_for(async {
            output::line(asked(&facts).await?.len().to_string());
            Ok(exit::OK)
        }),
        "pcp_node_info" => {
            let wanted = node()?;
            wait_for(info(&facts, &wanted))
        }
        "pcp_promote_node" => {
            let wanted = node()?;
            wait_for(promote(&facts, &wanted))
        }
        other => Err(Problem::new(
            USAGE,
            format!("there is no {other} here"),
            "pcp_node_info, pcp_node_count, pcp_promote_node, pcp_attach_node are",
        )
        .into()),
    }
}

async fn row_of(facts: &Facts, wanted: &str) -> anyhow::Result<Row> {
    let rows = asked(facts).await?;
    let found = rows.into_iter().find(|r| r.id == wanted);
    found.ok_or_else(|| {
        let what = format!("there is no node {wanted}");
        Problem::new(exit::FAILURE, what, "SHOW pool_nodes shows them").into()
    })
}

async fn info(facts: &Facts, wanted: &str) -> anyhow::Result<u8> {
    let row = row_of(facts, wanted).await?;
    let (status, word) = if row.up { (2, "up") } else { (3, "down") };
    let role = if row.primary { "primary" } else { "standby" };
    output::line(format!(
        "{} {} {status} {} {word} {role}",
        row.host, row.port, row.weight
    ));
    Ok(exit::OK)
}

async fn promote(facts: &Facts, wanted: &str) -> anyhow::Result<u8> {
    let row = row_of(facts, wanted).await?;
    if !Facts::secrets().join("operator.pem").exists() {
        let what = "this container may not operate the cluster";
        let hint = "set PCP_USER for the container, or run craton switchover in a node's";
        return Err(Problem::new(exit::REFUSED, what, hint).into());
    }
    let access = access()?;
    let status = access.status().await?;
    let member = status.members.iter().find(|m| m.host == row.host);
    let member = member.context("the node is no member of the cluster")?;
    let args = SwitchoverArgs {
        to: Some(member.id.clone()),
        at: None,
        cancel: false,
    };
    change::switchover(&access, args, false).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(name: &str, line: &str) -> anyhow::Result<Line> {
        understand(name, &crate::container::options::typed(line))
    }

    #[test]
    fn the_node_among_the_options() {
        let node = |text: &str| {
            let line = typed("pcp_attach_node", text).unwrap();
            node_of(&line).map(ToOwned::to_owned)
        };
        assert_eq!(
            node("-h localhost -p 9898 -U pcp_user -w 2").as_deref(),
            Some("2")
        );
        assert_eq!(node("-h localhost -U u -w -n 3").as_deref(), Some("3"));
        assert_eq!(node("-w -n3").as_deref(), Some("3"));
        assert_eq!(node("--node-id=4").as_deref(), Some("4"));
        assert_eq!(node("--node-id 4").as_deref(), Some("4"));
        assert_eq!(node("10 localhost 9898 u 7 5").as_deref(), Some("5"));
        assert_eq!(node("-p 9898 -w"), None);
        assert_eq!(node("-p 9898 x"), None);
    }

    #[test]
    fn what_would_be_left_out_is_refused_by_name() {
        for (name, text, option) in [
            ("pcp_node_info", "-v 0", "--verbose"),
            ("pcp_node_info", "-a", "--all"),
            ("pcp_promote_node", "--force 1", "--force"),
            ("pcp_node_count", "-n 1", "--node-id"),
        ] {
            let error = typed(name, text).unwrap_err();
            assert!(error.to_string().contains(option), "{name} {text}: {error}");
            assert_eq!(exit::code_of(&error), USAGE, "{name} {text}");
        }
        for (name, text) in [
            ("pcp_promote_node", "-h localhost -U u -w -g -s 1"),
            ("pcp_detach_node", "-v -n 1"),
            ("pcp_node_count", "-U u -w -v"),
        ] {
            typed(name, text).unwrap_or_else(|e| panic!("{name} {text}: {e}"));
        }
    }
}
