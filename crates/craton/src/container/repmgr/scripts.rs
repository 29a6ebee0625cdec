//! The old node image's scripts on `PATH` besides those of [`super`]: what they printed, or why there is nothing to do.

use std::path::Path;

use craton_console::views::StatusView;

use super::{Node, access, nodes, own_member, upstream_of};
use crate::container::plan::NODE_DIR;
use crate::exit::{self, Problem, USAGE};
use crate::output;

/// `get_upstream_node_id`: the number of the node that this one streams from. The primary has none, and says nothing.
pub async fn upstream_id() -> anyhow::Result<u8> {
    let status = access()?.status().await?;
    let me = own_member()?;
    let nodes = nodes(&status).await;
    let leader = nodes
        .iter()
        .find(|n| Some(&n.view.id) == status.leader.as_ref());
    let own = nodes.iter().find(|n| n.view.id == me);
    if let Some(id) = own.map_or(Ok(None), |own| number_of_upstream(own, &nodes, leader))? {
        output::line(id.to_string());
    }
    Ok(exit::OK)
}

fn number_of_upstream(
    own: &Node,
    nodes: &[Node],
    leader: Option<&Node>,
) -> anyhow::Result<Option<u32>> {
    let Some(upstream) = upstream_of(own, nodes, leader) else {
        return Ok(None);
    };
    let id = upstream.id.ok_or_else(|| {
        let what = format!("{} has not said its number yet", upstream.view.id);
        Problem::new(exit::FAILURE, what, "see repmgr cluster show")
    })?;
    Ok(Some(id))
}

/// `has_pg_cluster`: 0 if there is a database in this node's volume.
pub fn has_pg_cluster() -> u8 {
    has_database(Path::new(NODE_DIR))
}

fn has_database(volume: &Path) -> u8 {
    if volume.join("data/PG_VERSION").exists() {
        exit::OK
    } else {
        exit::FAILURE
    }
}

/// `cluster_master`: the host of the primary; 1 while there is none.
pub async fn cluster_master() -> anyhow::Result<u8> {
    let status = access()?.status().await?;
    let Some(host) = primary(&status) else {
        return Ok(exit::FAILURE);
    };
    output::line(host);
    Ok(exit::OK)
}

fn primary(status: &StatusView) -> Option<&str> {
    let leader = status.leader.as_ref().filter(|_| status.writable)?;
    let member = status.members.iter().find(|m| m.id == *leader)?;
    Some(&member.host)
}

/// A script that did what the agent does now: nothing, or a refusal where whoever called it would believe in vain that
/// something was done.
pub fn replaced(name: &str) -> anyhow::Result<u8> {
    let hint = match name {
        "node_unregister" => "repmgr standby unregister takes this node out of the cluster",
        "system_stop" | "system_exit" => {
            "stop the container (docker stop): the agent stops PostgreSQL in order"
        }
        "wait_db_schema" => {
            "wait_local_postgres waits until this node serves; psql in a loop waits for anything else"
        }
        _ => {
            output::line(format!(
                "{name}: nothing to do, the agent of each node does this by itself (craton status, craton explain)"
            ));
            return Ok(exit::OK);
        }
    };
    let what = format!("{name}: this script is not here any more; nothing was done");
    Err(Problem::new(USAGE, what, hint).into())
}

#[cfg(test)]
mod tests {
    use super::super::tests::view;
    use super::*;

    fn node(member: &str, id: Option<u32>, leads: bool) -> Node {
        Node {
            view: view(member, leads, true),
            id,
            name: member.to_owned(),
        }
    }

    #[test]
    fn whom_a_node_streams_from_by_number() {
        let mut nodes = vec![
            node("a", Some(1), true),
            node("b", Some(2), false),
            node("c", Some(3), false),
        ];
        nodes[2].view.upstream = Some(nodes[1].view.id.clone());
        let of = |n: usize| number_of_upstream(&nodes[n], &nodes, Some(&nodes[0]));
        assert_eq!(of(0).unwrap(), None);
        assert_eq!(of(1).unwrap(), Some(1));
        assert_eq!(of(2).unwrap(), Some(2));
        nodes[0].id = None;
        assert!(number_of_upstream(&nodes[1], &nodes, Some(&nodes[0])).is_err());
    }

    #[test]
    fn the_primary_is_one_that_serves() {
        let mut status: StatusView = serde_json::from_value(serde_json::json!({
            "cluster": "t", "answered_by": "a", "term": 5, "revision": 1, "leader": "a", "writable": true,
            "durability": "quorum", "sync": {"members": [], "acks": 0, "in_force": true},
            "lease": {"holder": "a", "remaining_ms": 900, "ttl_ms": 2000, "heartbeat_ms": 300},
            "hold": false, "next": "", "election": null, "members": []
        }))
        .unwrap();
        status.members.push(view("a", true, true));
        assert_eq!(primary(&status), Some("a"));
        status.writable = false;
        assert_eq!(primary(&status), None);
    }

    #[test]
    fn a_database_is_there_or_not() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(has_database(dir.path()), exit::FAILURE);
        std::fs::create_dir(dir.path().join("data")).unwrap();
        assert_eq!(has_database(dir.path()), exit::FAILURE);
        std::fs::write(dir.path().join("data/PG_VERSION"), "17\n").unwrap();
        assert_eq!(has_database(dir.path()), exit::OK);
    }

    #[test]
    fn what_the_agent_does_is_nothing_to_do_and_the_rest_is_refused() {
        assert_eq!(replaced("standby_register").unwrap(), exit::OK);
        assert_eq!(replaced("postgres_configure").unwrap(), exit::OK);
        for name in ["node_unregister", "system_stop", "wait_db_schema"] {
            let error = replaced(name).unwrap_err();
            assert_eq!(exit::code_of(&error), USAGE, "{name}");
            assert!(error.to_string().starts_with(name), "{error}");
        }
    }
}
