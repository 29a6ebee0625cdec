//! `craton container health`: whether this container is alive, which the images' HEALTHCHECK asks, or with `--ready`
//! whether it serves.
//!
//! Alive is not ready: a node that is cloned, rewound or recovers serves nobody, for hours if need be, and so does a
//! proxy whose cluster has no leader. A restart would only begin that anew, and there are platforms that restart what is
//! not healthy. What has died is started again by the first process; what is looked for here is a daemon that hangs.

use std::time::Duration;

use craton_console::{Client, ClientError};
use craton_trust::{Guest, authority::BUNDLE_FILE};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::entry::Facts;
use super::environment::Kind;
use super::{daemon, plan, settings, side};
use crate::{exit, output, processes};

/// How long the daemon may take; the images give the whole command 5 s.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// How long the proxy may take to say whether it speaks TLS.
const ACCEPT_MAX: Duration = Duration::from_secs(1);

/// What a client of PostgreSQL asks first (`SSLRequest`): it costs nothing and needs no user.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// Docker knows 0 and 1 only.
fn told(outcome: Result<String, String>) -> u8 {
    match outcome {
        Ok(text) => {
            output::line(text);
            exit::OK
        }
        Err(why) => {
            output::note(why);
            exit::FAILURE
        }
    }
}

/// Whether it serves: what `/health` on the port in the clear says.
pub async fn ready() -> u8 {
    let at = format!("127.0.0.1:{}", plan::FRONT_PORT);
    let answer = Client::new(None).get_text(&at, "/health").await;
    told(answer.map_err(|e| e.to_string()))
}

/// Whether it is alive.
pub async fn alive() -> u8 {
    told(look().await)
}

async fn look() -> Result<String, String> {
    match stage(processes::all().into_iter().map(|p| p.command)) {
        Stage::Nothing => Err(
            "nothing of Craton runs here: the container was started with another command"
                .to_owned(),
        ),
        Stage::Starting => Ok("alive: it starts".to_owned()),
        Stage::WithoutDaemon => {
            Ok("alive: no daemon runs now; the first process decides about it".to_owned())
        }
        Stage::Daemon => match Facts::load() {
            Ok(Some(facts)) => daemon_is_alive(&facts).await,
            Ok(None) => Err("the daemon runs, but its container's start left no notes".to_owned()),
            Err(error) => Err(format!("{error:#}")),
        },
    }
}

async fn daemon_is_alive(facts: &Facts) -> Result<String, String> {
    let kind = facts.kind;
    // A node that is not taken in yet has no port: it asks the others, until one of them answers.
    if kind == Kind::Node && daemon::is_fresh() {
        return Ok("alive: it has no data yet and waits for the others".to_owned());
    }
    let guest = Guest::of_authorities(&Facts::secrets().join(BUNDLE_FILE));
    let guest = guest.map_err(|e| e.to_string())?;
    let client = Client::guest(guest, side::role(kind), None).with_timeout(ANSWER_MAX);
    let path = if kind == Kind::Node {
        "/live"
    } else {
        "/health"
    };
    let answer = client.get_text(&side::daemon_address(kind), path).await;
    let text = judge(kind, answer)?;
    if kind == Kind::Proxy {
        let listens = settings::proxy_address().map_err(|e| format!("{e:#}"))?;
        accepts(&listens).await?;
    }
    Ok(text)
}

/// A proxy or a backup daemon that answers at all is alive; an agent says by itself whether it gets on.
fn judge(kind: Kind, answer: Result<String, ClientError>) -> Result<String, String> {
    match answer {
        Ok(text) => Ok(text),
        Err(ClientError::Refused { error, .. }) if kind == Kind::Node => Err(error),
        Err(ClientError::Refused { error, .. }) => Ok(format!("alive, not serving: {error}")),
        // Certificates that do not fit are a fault of another kind: somebody answers.
        Err(error @ ClientError::Untrusted { .. }) => Ok(format!("alive: {error}")),
        Err(error) => Err(error.to_string()),
    }
}

/// Whether clients are taken: not only by the kernel, but by somebody who answers.
async fn accepts(address: &str) -> Result<(), String> {
    let ask = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(&SSL_REQUEST).await?;
        stream.read_u8().await
    };
    match timeout(ACCEPT_MAX, ask).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(format!("the proxy takes no clients at {address}: {error}")),
        Err(_) => Err(format!(
            "the proxy did not answer a client at {address} within {} ms",
            ACCEPT_MAX.as_millis()
        )),
    }
}

/// How far the container is, by the processes that run in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// None of ours.
    Nothing,
    /// The environment is read, or the daemon waits for what must be there before it.
    Starting,
    /// The first process runs, and no daemon: one has just died, or the node was removed.
    WithoutDaemon,
    /// The daemon runs.
    Daemon,
}

/// `lines` are the command lines of all processes.
fn stage(lines: impl IntoIterator<Item = String>) -> Stage {
    let mut found = Stage::Nothing;
    for line in lines {
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some((program, rest)) = words.split_first() else {
            continue;
        };
        let name = program.rsplit('/').next().unwrap_or(program);
        match (name, rest) {
            // By the names of the old images.
            ("entrypoint.sh", _)
            | ("craton", ["container", "node" | "proxy" | "backup" | "daemon", ..]) => {
                return Stage::Starting;
            }
            ("craton", ["node" | "proxy", "--config", ..] | ["backup", "daemon", ..]) => {
                found = Stage::Daemon;
            }
            ("craton", ["container", "init", ..]) if found == Stage::Nothing => {
                found = Stage::WithoutDaemon;
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|t| (*t).to_owned()).collect()
    }

    #[test]
    fn how_far_a_container_is() {
        for (expected, running) in [
            (Stage::Nothing, vec![]),
            (
                Stage::Nothing,
                vec!["sleep infinity", "craton container health"],
            ),
            (Stage::Starting, vec!["craton container node"]),
            (
                Stage::Starting,
                vec![
                    "/usr/local/bin/pgpool/entrypoint.sh",
                    "craton container health",
                ],
            ),
            (
                Stage::Starting,
                vec![
                    "craton container init proxy",
                    "craton container side",
                    "craton container daemon proxy",
                ],
            ),
            (
                Stage::WithoutDaemon,
                vec!["craton container init node", "craton container side"],
            ),
            (
                Stage::Daemon,
                vec![
                    "craton container init node",
                    "craton container side",
                    "craton node --config /run/craton/craton.toml",
                    "craton fence 7",
                    "postgres: checkpointer",
                ],
            ),
            (
                Stage::Daemon,
                vec![
                    "/sbin/docker-init -- craton container backup",
                    "craton backup daemon --config x",
                    "craton container init backup",
                ],
            ),
            // A person's command is no daemon.
            (
                Stage::WithoutDaemon,
                vec!["craton container init backup", "craton backup list"],
            ),
        ] {
            assert_eq!(stage(lines(&running)), expected, "{running:?}");
        }
    }

    fn refused() -> ClientError {
        ClientError::Refused {
            address: "127.0.0.1:9898".to_owned(),
            status: 503,
            error: "there is no primary".to_owned(),
            hint: None,
        }
    }

    #[test]
    fn who_answers_is_alive_and_an_agent_says_so_itself() {
        for kind in [Kind::Proxy, Kind::Backup] {
            let alive = judge(kind, Err(refused())).unwrap();
            assert_eq!(alive, "alive, not serving: there is no primary");
        }
        assert!(judge(Kind::Node, Err(refused())).is_err());
        assert_eq!(judge(Kind::Node, Ok("x".to_owned())).unwrap(), "x");
        let silent = || ClientError::TimedOut {
            address: "a:1".to_owned(),
            path: "/live".to_owned(),
            timeout: ANSWER_MAX,
        };
        for kind in [Kind::Node, Kind::Proxy, Kind::Backup] {
            assert!(judge(kind, Err(silent())).is_err());
        }
    }

    #[tokio::test]
    async fn a_port_behind_which_nobody_answers_takes_no_clients() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap().to_string();
        // The kernel accepts; nobody reads.
        assert!(accepts(&at).await.unwrap_err().contains("did not answer"));
        let answering = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut asked = [0; 8];
                if stream.read_exact(&mut asked).await.is_ok() && asked == SSL_REQUEST {
                    let _ = stream.write_all(b"S").await;
                }
            }
        });
        let due = tokio::time::Instant::now() + Duration::from_secs(30);
        while let Err(why) = accepts(&at).await {
            assert!(tokio::time::Instant::now() < due, "{why}");
        }
        answering.abort();
        let _ = answering.await;
        assert!(accepts(&at).await.unwrap_err().contains("takes no clients"));
    }
}
