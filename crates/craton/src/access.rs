//! How a command finds a cluster's agents: by address and certificate (or token), or as the local cluster of a
//! directory.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use craton_console::client::REQUEST_TIMEOUT;
use craton_console::views::{HistoryView, StatusView};
use craton_console::{Client, ClientError, Token};
use craton_trust::authority::{BUNDLE_FILE, KEY_FILE};
use craton_trust::{Guest, Role};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;

use crate::certificates;
use crate::container::entry::Facts;
use crate::exit::{Problem, UNREACHABLE, USAGE};
use crate::layout::Layout;

/// How long a question about the state may take: a frozen agent must not hold up the others' answers.
const LOOK_TIMEOUT: Duration = Duration::from_millis(1500);

/// The agents' API addresses and a client that may use them.
#[derive(Clone, Debug)]
pub struct Access {
    /// `host:port` of every known agent.
    pub agents: Vec<String>,
    client: Client,
}

impl Access {
    /// The agents of a local cluster.
    pub fn local(layout: &Layout) -> anyhow::Result<Self> {
        let trust = certificates::operator(&layout.secrets())?;
        Ok(Self {
            agents: layout.api_addresses(),
            client: Client::trusted(trust, Role::Node),
        })
    }

    /// The agents named on the command line, else those of the local cluster in `dir`.
    pub fn open(
        agents: &[String],
        certificates: Option<&Path>,
        token_file: Option<&PathBuf>,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        if agents.is_empty() {
            // Inside a container of Craton's nothing has to be said.
            return match (Layout::load(dir)?, Facts::load()?) {
                (None, Some(facts)) => {
                    let secrets = Facts::secrets();
                    Self::open(&facts.agents(), Some(&secrets), None, dir)
                }
                _ => Self::local(&Layout::require(dir)?),
            };
        }
        let token = token_file.map(|path| Token::from_file(path)).transpose()?;
        let client = match (certificates, token) {
            (Some(dir), None) => {
                let trust = certificates::operator(dir)?;
                certificates::renew_if_due(&trust, agents);
                Client::trusted(trust, Role::Node)
            }
            (Some(dir), token) => {
                let guest = Guest::of_authorities(&dir.join(BUNDLE_FILE))?;
                Client::guest(guest, Role::Node, token)
            }
            // Plain HTTP, for isolated tests: agents with TLS refuse it and say so.
            (None, Some(token)) => Client::new(Some(token)),
            (None, None) => {
                return Err(Problem::new(
                    USAGE,
                    "--api needs --certs: the directory with the operator's certificate",
                    format!("`craton join` makes one; on a member's host it is the directory of the secrets, with {KEY_FILE}"),
                )
                .into());
            }
        };
        Ok(Self {
            agents: agents.to_vec(),
            client,
        })
    }

    /// The client, for requests to one address.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// What every agent says that answers in time.
    pub async fn statuses(&self) -> Vec<Result<StatusView, ClientError>> {
        self.statuses_of(&self.agents).await
    }

    /// What the agents at these addresses say that answer in time, in any order.
    pub async fn statuses_of(&self, agents: &[String]) -> Vec<Result<StatusView, ClientError>> {
        self.ask_for_status(agents, LOOK_TIMEOUT).await
    }

    async fn ask_for_status(
        &self,
        agents: &[String],
        limit: Duration,
    ) -> Vec<Result<StatusView, ClientError>> {
        let client = self.client.clone().with_timeout(limit);
        let mut asked = JoinSet::new();
        for agent in agents {
            let (client, agent) = (client.clone(), agent.clone());
            asked.spawn(async move { client.get_json::<StatusView>(&agent, "/v1/status").await });
        }
        asked.join_all().await
    }

    /// The newest view of the cluster; among equals that of the leader's own agent.
    pub async fn status(&self) -> anyhow::Result<StatusView> {
        self.newest(|v| usize::from(v.leader.as_ref() == Some(&v.answered_by)))
            .await
    }

    /// The newest view of the cluster; among equals that of the agent which hears the most members: a leader that is cut
    /// off from them knows as much, and believes itself in charge.
    pub async fn widest_status(&self) -> anyhow::Result<StatusView> {
        self.newest(|v| v.members.iter().filter(|m| m.agent_alive).count())
            .await
    }

    async fn newest(&self, among_equals: fn(&StatusView) -> usize) -> anyhow::Result<StatusView> {
        let mut last_error = None;
        for limit in [LOOK_TIMEOUT, REQUEST_TIMEOUT] {
            last_error = None;
            let mut views = Vec::new();
            for answer in self.ask_for_status(&self.agents, limit).await {
                match answer {
                    Ok(view) => views.push(view),
                    Err(error) => last_error = Some(error),
                }
            }
            let newest = views
                .into_iter()
                .max_by_key(|v| (v.term, v.revision, among_equals(v)));
            if let Some(newest) = newest {
                return Ok(newest);
            }
            // Nobody in time is a busy host rather than an absent cluster: then, and only then, it is worth waiting longer.
            if !matches!(last_error, Some(ClientError::TimedOut { .. })) {
                break;
            }
        }
        Err(self.nobody(last_error))
    }

    fn nobody(&self, last: Option<ClientError>) -> anyhow::Error {
        match last {
            // A wrong token or certificate is not an unreachable cluster.
            Some(error @ (ClientError::Refused { .. } | ClientError::Untrusted { .. })) => {
                error.into()
            }
            Some(error) => {
                let what = format!(
                    "no agent answers ({}); the last one: {error}",
                    self.agents.join(", ")
                );
                Problem::new(
                    UNREACHABLE,
                    what,
                    "is the cluster up? `craton up` starts a local one",
                )
                .into()
            }
            None => Problem::new(
                UNREACHABLE,
                "no agent is known",
                "name agents with --api host:port,…",
            )
            .into(),
        }
    }

    /// Asks one agent after the other until one answers.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let mut last = None;
        for agent in &self.agents {
            match self.client.get_json(agent, path).await {
                Ok(answer) => return Ok(answer),
                Err(error @ ClientError::Refused { .. }) if !error.was_not_done() => {
                    return Err(error.into());
                }
                Err(error) => last = Some(error),
            }
        }
        Err(self.nobody(last))
    }

    /// What the agent says that `is` is true of, by whatever address it answers first: the one that others know it by is
    /// none of its own where it is cut off.
    pub async fn get_of<T>(
        &self,
        api: &str,
        path: &'static str,
        is: impl Fn(&T) -> bool,
    ) -> anyhow::Result<T>
    where
        T: DeserializeOwned + Send + 'static,
    {
        let mut asked = JoinSet::new();
        let known = self.agents.iter().map(String::as_str);
        for agent in known.chain([api]).collect::<BTreeSet<_>>() {
            let (client, agent) = (self.client.clone(), agent.to_owned());
            let its_own = agent == api;
            asked.spawn(async move { (its_own, client.get_json::<T>(&agent, path).await) });
        }
        let mut silent = None;
        while let Some(answer) = asked.join_next().await {
            match answer {
                Ok((_, Ok(view))) if is(&view) => return Ok(view),
                Ok((true, Err(error))) => silent = Some(error),
                _ => {}
            }
        }
        Err(silent.map_or_else(|| self.nobody(None), Into::into))
    }

    /// What happened, by the agent that knows the newest state of the cluster: one that is cut off, or whose disk
    /// hangs, would tell an old story.
    pub async fn history(&self) -> anyhow::Result<HistoryView> {
        const PATH: &str = "/v1/history";
        if let Ok(status) = self.status().await
            && let Some(newest) = status.members.iter().find(|m| m.id == status.answered_by)
            && let Ok(view) = self.client.get_json(&newest.api, PATH).await
        {
            return Ok(view);
        }
        self.get(PATH).await
    }

    /// Sends a command: to `first` if given, else to any agent that can be reached. Another agent is asked only where
    /// nothing was done for certain: one that is cut off from the others says so.
    pub async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        first: Option<&str>,
        path: &str,
        body: &B,
        timeout: Duration,
    ) -> anyhow::Result<T> {
        let client = self.client.clone().with_timeout(timeout);
        let mut last = None;
        let others = self
            .agents
            .iter()
            .map(String::as_str)
            .filter(|a| Some(*a) != first);
        for agent in first.into_iter().chain(others) {
            match client.post_json(agent, path, body).await {
                Ok(answer) => return Ok(answer),
                Err(error) if error.was_not_done() => last = Some(error),
                Err(error) => return Err(error.into()),
            }
        }
        Err(self.nobody(last))
    }
}
