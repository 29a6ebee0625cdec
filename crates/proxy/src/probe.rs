//! A set of servers without agents: roles by asking, at most one primary believed.
//!
//! The one on the highest timeline counts, and once a timeline was seen, a primary of a lower one is not
//! believed any more: it is the old one, come back.

use std::sync::Arc;
use std::time::Duration;

use craton_core::topology::{MemberRole, Topology, TopologyMember};
use craton_core::{MemberId, Term, TimelineId};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::backend::{Address, Login, dial};
use crate::config::ProxyConfig;

/// Whether it is a standby, and a primary's timeline, which is how the name of its WAL file begins.
const QUESTION: &str = "SELECT pg_is_in_recovery()::text, \
     CASE WHEN pg_is_in_recovery() THEN '' ELSE substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END, \
     CASE WHEN pg_is_in_recovery() THEN (EXISTS (SELECT FROM pg_stat_get_wal_receiver() r WHERE r.pid IS NOT NULL))::text ELSE '' END";

/// What a server said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    Primary(TimelineId),
    Standby { streaming: bool },
    Silent,
}

/// Asks all servers for ever and publishes what follows from the answers.
pub async fn watch_backends(
    config: Arc<ProxyConfig>,
    login: Login,
    publish: watch::Sender<Option<Arc<Topology>>>,
) {
    let mut ticks = interval(Duration::from_millis(config.probe_interval_ms.max(10)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut view = View::default();
    loop {
        ticks.tick().await;
        let mut asked = JoinSet::new();
        for index in 0..config.backends.len() {
            let (config, login) = (Arc::clone(&config), login.clone());
            asked.spawn(async move { (index, ask(&config, index, &login).await) });
        }
        let mut answers = vec![Answer::Silent; config.backends.len()];
        while let Some(done) = asked.join_next().await {
            if let Ok((index, answer)) = done
                && let Some(place) = answers.get_mut(index)
            {
                *place = answer;
            }
        }
        publish.send_replace(Some(Arc::new(view.next(&config, &answers))));
    }
}

async fn ask(config: &ProxyConfig, index: usize, login: &Login) -> Answer {
    let Some(server) = config.backends.get(index) else {
        return Answer::Silent;
    };
    let limit = Duration::from_millis(config.probe_timeout_ms);
    let to = Address {
        host: &server.host,
        port: server.port,
        parameters: &[
            ("user", &config.auth_user),
            ("database", &config.auth_database),
            ("application_name", "craton proxy probe"),
        ],
        login,
        tls: None,
    };
    let rows = timeout(limit, async {
        dial(to, limit).await?.0.ask(QUESTION, &[]).await
    })
    .await;
    match rows {
        Ok(Ok(rows)) => read(&rows),
        Ok(Err(error)) => {
            tracing::debug!(%error, "a backend does not answer");
            Answer::Silent
        }
        Err(_) => Answer::Silent,
    }
}

fn read(rows: &[Vec<String>]) -> Answer {
    match rows
        .first()
        .map(|r| r.iter().map(String::as_str).collect::<Vec<_>>())
        .as_deref()
    {
        Some(["true", _, streaming]) => Answer::Standby {
            streaming: *streaming == "true",
        },
        Some(["false", timeline, _]) => u32::from_str_radix(timeline, 16)
            .map_or(Answer::Silent, |t| Answer::Primary(TimelineId(t))),
        _ => Answer::Silent,
    }
}

/// What is believed.
#[derive(Debug, Default)]
struct View {
    revision: u64,
    highest: TimelineId,
    primary: Option<usize>,
}

impl View {
    fn next(&mut self, config: &ProxyConfig, answers: &[Answer]) -> Topology {
        let timeline_of = |index: usize| match answers.get(index) {
            Some(Answer::Primary(timeline)) => Some(*timeline),
            _ => None,
        };
        let best = (0..answers.len()).filter_map(timeline_of).max();
        if let Some(best) = best.filter(|b| *b > self.highest) {
            self.highest = best;
            self.primary = None;
        }
        // Two primaries on the same timeline: the one that was believed stays, and a stranger is not believed.
        let on_highest: Vec<usize> = (0..answers.len())
            .filter(|i| timeline_of(*i) == Some(self.highest))
            .collect();
        let writable = match (self.primary, on_highest.as_slice()) {
            (Some(known), found) if found.contains(&known) => Some(known),
            // A probe that was missed ends nobody's transaction: if it is dead, connections say so themselves.
            (Some(known), []) if answers.get(known) == Some(&Answer::Silent) => Some(known),
            (_, [only]) => Some(*only),
            _ => None,
        };
        if writable.is_some() {
            self.primary = writable;
        }
        self.revision += 1;
        let name = |index: usize| MemberId::new(format!("backend-{}", index + 1)).ok();
        let members = config.backends.iter().zip(answers).enumerate().filter_map(
            |(index, (server, answer))| {
                Some(TopologyMember {
                    id: name(index)?,
                    host: server.host.clone(),
                    port: server.port,
                    api: String::new(),
                    role: match answer {
                        Answer::Standby { .. } => MemberRole::Standby,
                        _ if writable == Some(index) => MemberRole::Leader,
                        _ => MemberRole::Down,
                    },
                    timeline: timeline_of(index),
                    lsn: None,
                    replay_lsn: None,
                    streaming: matches!(answer, Answer::Standby { streaming: true }),
                    noload: false,
                })
            },
        );
        Topology {
            cluster: "static".into(),
            system_id: None,
            term: Term(u64::from(self.highest.0)),
            revision: self.revision,
            writable: writable.and_then(name),
            hold: false,
            members: members.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::StaticBackend;

    #[test]
    fn the_old_primary_is_not_believed_when_it_comes_back() {
        let backend = |port| StaticBackend {
            host: "h".into(),
            port,
        };
        let config = ProxyConfig {
            backends: vec![backend(1), backend(2)],
            ..ProxyConfig::default()
        };
        let mut view = View::default();
        let mut writable =
            |answers: [Answer; 2]| view.next(&config, &answers).writable.map(String::from);
        let (old, new) = (
            Answer::Primary(TimelineId(1)),
            Answer::Primary(TimelineId(2)),
        );
        let standby = Answer::Standby { streaming: true };
        assert_eq!(writable([old, standby]).as_deref(), Some("backend-1"));
        assert_eq!(
            writable([Answer::Silent, standby]).as_deref(),
            Some("backend-1"),
            "one missed probe"
        );
        assert_eq!(writable([standby, standby]), None);
        assert_eq!(
            writable([Answer::Silent, new]).as_deref(),
            Some("backend-2")
        );
        assert_eq!(writable([old, new]).as_deref(), Some("backend-2"));
        let believed = writable([old, Answer::Silent]);
        assert_eq!(
            believed.as_deref(),
            Some("backend-2"),
            "an old primary alone is still an old primary"
        );
        assert_eq!(
            writable([new, new]).as_deref(),
            Some("backend-2"),
            "of two equals the known one"
        );
    }

    #[test]
    fn answers() {
        let row = |a: &str, b: &str, c: &str| vec![vec![a.to_owned(), b.to_owned(), c.to_owned()]];
        assert_eq!(
            read(&row("false", "0000000A", "")),
            Answer::Primary(TimelineId(10))
        );
        assert_eq!(
            read(&row("true", "", "false")),
            Answer::Standby { streaming: false }
        );
        assert_eq!(read(&row("perhaps", "", "")), Answer::Silent);
        assert_eq!(read(&[]), Answer::Silent);
    }
}
