//! Keeps a stream to every agent and publishes the newest topology any of them knows.
//!
//! Agents push, nobody polls: a proxy learns of a new leader one network hop after the agents do. An
//! agent that is cut off keeps saying what it last knew; its news are older by (term, revision) and
//! change nothing.
//!
//! The agents named at the start are enough to find the others: members that the topology names are followed too,
//! for as long as it names them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use craton_core::Term;
use craton_core::topology::Topology;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::sleep;

use crate::client::{Client, ClientError};

/// An agent that says nothing for this long is taken for gone (it speaks once a second).
pub const STREAM_IDLE_MAX: Duration = Duration::from_secs(3);

/// The first pause before an agent is asked again.
pub const RECONNECT_MIN: Duration = Duration::from_millis(50);

/// The longest pause before an agent is asked again: it bounds how late a returning agent is heard.
pub const RECONNECT_MAX: Duration = Duration::from_secs(1);

/// Time to connect and get the head of the answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Agents beyond those that were named at the start.
const LEARNT_MAX: usize = 64;

const STREAM_PATH: &str = "/v1/topology/stream";

/// Streams from several agents, merged. Dropping it ends the streams.
#[derive(Debug)]
pub struct TopologyFeed {
    newest: watch::Receiver<Option<Arc<Topology>>>,
    shared: Arc<Shared>,
    _streams: JoinSet<()>,
}

impl TopologyFeed {
    /// Starts one stream per agent (`host:port` of its API). Must run inside a tokio runtime.
    pub fn start(agents: Vec<String>, client: &Client) -> Self {
        let (publish, newest) = watch::channel(None);
        let shared = Arc::new(Shared {
            views: Mutex::new(Views::new(agents.len())),
            publish,
        });
        let client = client.clone().with_timeout(CONNECT_TIMEOUT);
        let mut streams = JoinSet::new();
        for (index, agent) in agents.iter().enumerate() {
            let agent = agent.clone();
            streams.spawn(follow(index, agent, client.clone(), Arc::clone(&shared)));
        }
        streams.spawn(learn(agents, newest.clone(), client, Arc::clone(&shared)));
        Self {
            newest,
            shared,
            _streams: streams,
        }
    }

    /// The newest topology; `None` until the first agent answered.
    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<Topology>>> {
        self.newest.clone()
    }

    /// How many agents are being heard now.
    pub fn agents_connected(&self) -> usize {
        self.shared
            .views
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .connected()
    }
}

#[derive(Debug)]
struct Shared {
    views: Mutex<Views>,
    publish: watch::Sender<Option<Arc<Topology>>>,
}

impl Shared {
    fn add(&self) -> usize {
        self.views
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .add()
    }

    fn update(&self, index: usize, view: Option<Heard>) {
        let mut views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(next) = views.update(index, view) {
            // Sent under the lock, so that two streams cannot publish in the wrong order.
            self.publish.send_replace(Some(next));
        }
    }
}

/// What one agent said last.
#[derive(Clone, Debug)]
struct Heard {
    agent: String,
    topology: Arc<Topology>,
}

/// The last word of every agent, and the newest of all. Pure: what to publish is decided here.
#[derive(Debug)]
struct Views {
    heard: Vec<Option<Heard>>,
    published: Option<Arc<Topology>>,
    /// The system identifier of the cluster that is followed: the first that was heard of.
    system_id: Option<String>,
    /// Agents of another cluster: what is said of them is said once.
    strangers: BTreeSet<String>,
}

impl Views {
    fn new(agents: usize) -> Self {
        Self {
            heard: vec![None; agents],
            published: None,
            system_id: None,
            strangers: BTreeSet::new(),
        }
    }

    /// Room for one more agent.
    fn add(&mut self) -> usize {
        self.heard.push(None);
        self.heard.len() - 1
    }

    fn connected(&self) -> usize {
        self.heard.iter().flatten().count()
    }

    /// Takes an agent's news (or its silence); returns what is to be published, if that changes.
    ///
    /// Positions change without a new revision. Among views of the same revision the writable member's
    /// own is believed, because it alone knows who streams from it; failing that, the latest word.
    fn update(&mut self, index: usize, view: Option<Heard>) -> Option<Arc<Topology>> {
        let view = view.filter(|v| !self.is_stranger(v));
        *self.heard.get_mut(index)? = view;
        let floor = self.published.as_deref().map(age);
        let best_age = self
            .heard
            .iter()
            .flatten()
            .map(|h| age(&h.topology))
            .max()?;
        if floor.is_some_and(|floor| best_age < floor) {
            return None;
        }
        let newest = || {
            self.heard
                .iter()
                .flatten()
                .filter(|h| age(&h.topology) == best_age)
        };
        let of_leader = newest().find(|h| h.topology.leader().is_some_and(|l| l.api == h.agent));
        let latest = self
            .heard
            .get(index)?
            .as_ref()
            .filter(|h| age(&h.topology) == best_age);
        let chosen = Arc::clone(&of_leader.or(latest).or_else(|| newest().next())?.topology);
        if self.published.as_ref() == Some(&chosen) {
            return None;
        }
        if self.system_id.is_none() {
            self.system_id.clone_from(&chosen.system_id);
        }
        self.published = Some(Arc::clone(&chosen));
        Some(chosen)
    }
}

impl Views {
    /// Of another database cluster, whatever its name and however new: nobody's writes may go from one to the other.
    fn is_stranger(&mut self, heard: &Heard) -> bool {
        let (Some(known), Some(told)) = (&self.system_id, &heard.topology.system_id) else {
            return false;
        };
        if known == told {
            self.strangers.remove(&heard.agent);
            return false;
        }
        if !self.strangers.insert(heard.agent.clone()) {
            return true;
        }
        tracing::error!(
            agent = heard.agent,
            followed = known,
            told,
            "this agent speaks of another database cluster of the same name: it is not listened to. Name the agents of one cluster; \
             if the other one takes the place of the one that is followed, start this process again"
        );
        true
    }
}

fn age(topology: &Topology) -> (Term, u64) {
    (topology.term, topology.revision)
}

/// Follows the members that the newest topology names besides those in `named`.
async fn learn(
    named: Vec<String>,
    mut newest: watch::Receiver<Option<Arc<Topology>>>,
    client: Client,
    shared: Arc<Shared>,
) {
    let mut streams = JoinSet::new();
    // By address: the place among the views, which stays, and the stream while there is one.
    let mut learnt: BTreeMap<String, (usize, Option<AbortHandle>)> = BTreeMap::new();
    while newest.changed().await.is_ok() {
        let Some(topology) = newest.borrow_and_update().clone() else {
            continue;
        };
        let there = |api: &String| topology.members.iter().any(|m| &m.api == api);
        for (agent, (index, stream)) in &mut learnt {
            if !there(agent)
                && let Some(stream) = stream.take()
            {
                stream.abort();
                shared.update(*index, None);
            }
        }
        for member in &topology.members {
            let agent = &member.api;
            let running = learnt.get(agent).is_some_and(|(_, s)| s.is_some());
            if running || named.contains(agent) {
                continue;
            }
            if learnt.len() >= LEARNT_MAX && !learnt.contains_key(agent) {
                continue;
            }
            let (index, stream) = learnt
                .entry(agent.clone())
                .or_insert_with(|| (shared.add(), None));
            let follow = follow(*index, agent.clone(), client.clone(), Arc::clone(&shared));
            *stream = Some(streams.spawn(follow));
            tracing::info!(agent, "learnt of another agent");
        }
    }
}

/// Follows one agent for ever, with growing pauses while it cannot be reached.
async fn follow(index: usize, agent: String, client: Client, shared: Arc<Shared>) {
    let mut pause = RECONNECT_MIN;
    let mut silent = false;
    loop {
        let mut spoke = false;
        let ended = listen(index, &agent, &client, &shared, &mut spoke).await;
        shared.update(index, None);
        if spoke {
            (pause, silent) = (RECONNECT_MIN, false);
        }
        if !silent {
            match ended {
                Ok(()) => tracing::info!(
                    agent,
                    "the agent closed its topology stream; connecting again"
                ),
                Err(error) => {
                    tracing::warn!(agent, %error, "no topology from this agent; trying on");
                }
            }
            silent = true;
        }
        sleep(pause).await;
        pause = (pause * 2).min(RECONNECT_MAX);
    }
}

async fn listen(
    index: usize,
    agent: &str,
    client: &Client,
    shared: &Shared,
    spoke: &mut bool,
) -> Result<(), ClientError> {
    let mut lines = client.stream_lines(agent, STREAM_PATH).await?;
    while let Some(line) = lines.next(STREAM_IDLE_MAX).await? {
        let topology: Topology =
            serde_json::from_str(&line).map_err(|e| ClientError::Malformed {
                address: agent.to_owned(),
                path: STREAM_PATH.to_owned(),
                reason: e.to_string(),
            })?;
        *spoke = true;
        shared.update(
            index,
            Some(Heard {
                agent: agent.to_owned(),
                topology: Arc::new(topology),
            }),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use craton_core::MemberId;
    use craton_core::topology::{MemberRole, TopologyMember};

    fn topology(term: u64, revision: u64, writable: Option<&str>, streaming: bool) -> Topology {
        let member = |id: &str| TopologyMember {
            id: MemberId::new(id).unwrap(),
            host: "127.0.0.1".into(),
            port: 1,
            api: format!("api-{id}"),
            role: MemberRole::Standby,
            timeline: None,
            lsn: None,
            replay_lsn: None,
            streaming,
            noload: false,
        };
        Topology {
            cluster: "c".into(),
            system_id: None,
            term: Term(term),
            revision,
            writable: writable.map(|id| MemberId::new(id).unwrap()),
            hold: false,
            members: vec![member("a"), member("b")],
        }
    }

    fn heard(agent: &str, topology: &Topology) -> Heard {
        Heard {
            agent: agent.into(),
            topology: Arc::new(topology.clone()),
        }
    }

    #[test]
    fn only_newer_views_replace() {
        let mut views = Views::new(2);
        let new = topology(2, 5, Some("b"), false);
        assert_eq!(
            views.update(0, Some(heard("api-a", &new))).as_deref(),
            Some(&new)
        );
        assert_eq!(
            views.update(1, Some(heard("api-b", &topology(1, 9, Some("a"), false)))),
            None
        );
        // The one that knew goes away: what it said stays.
        assert_eq!(views.update(0, None), None);
        assert_eq!(views.connected(), 1);
        let newer = topology(2, 6, None, false);
        assert_eq!(
            views.update(1, Some(heard("api-b", &newer))).as_deref(),
            Some(&newer)
        );
    }

    #[test]
    fn another_cluster_of_the_same_name_is_not_followed_however_new() {
        let of = |system: Option<&str>, revision| Topology {
            system_id: system.map(Into::into),
            ..topology(2, revision, Some("a"), false)
        };
        let mut views = Views::new(2);
        // Before there are data nobody knows yet.
        assert!(
            views
                .update(0, Some(heard("api-a", &of(None, 1))))
                .is_some()
        );
        let own = of(Some("1"), 2);
        assert!(views.update(0, Some(heard("api-a", &own))).is_some());
        assert_eq!(
            views.update(1, Some(heard("api-x", &of(Some("2"), 9)))),
            None
        );
        assert_eq!(views.connected(), 1);
        // Also while the one that is followed is silent.
        assert_eq!(views.update(0, None), None);
        assert_eq!(
            views.update(1, Some(heard("api-x", &of(Some("2"), 10)))),
            None
        );
        let back = of(Some("1"), 3);
        assert_eq!(
            views.update(0, Some(heard("api-a", &back))).as_deref(),
            Some(&back)
        );
    }

    #[test]
    fn the_leaders_own_view_wins_a_tie() {
        let mut views = Views::new(2);
        let by_leader = topology(2, 5, Some("b"), true);
        let by_other = topology(2, 5, Some("b"), false);
        assert!(views.update(0, Some(heard("api-a", &by_other))).is_some());
        assert_eq!(
            views.update(1, Some(heard("api-b", &by_leader))).as_deref(),
            Some(&by_leader)
        );
        assert_eq!(views.update(0, Some(heard("api-a", &by_other))), None);
        // With the leader silent, the others' word counts.
        assert_eq!(views.update(1, None).as_deref(), Some(&by_other));
    }
}
