//! The table `repmgr.nodes` in `REPLICATION_DB`, which scripts of the old stack read. The leader's container writes it when
//! something in it changes; nothing reads it here, and nothing rests on it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use craton_console::Client;
use craton_console::views::StatusView;
use craton_core::topology::MemberRole;
use craton_trust::Role;

use super::entry::Facts;
use super::environment::Kind;
use super::first_start::{self, literal};
use super::repmgr::{self, Node};
use super::side::daemon_address;
use crate::certificates;

/// How often is looked whether it is still right.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// A write that takes longer is given up; the next look tries again.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Something by that name that is not the superuser's: its triggers would run as the superuser.
const STRANGE: &str = "\
SELECT FROM pg_namespace WHERE nspname = 'repmgr' AND nspowner <> current_user::regrole \
UNION ALL SELECT FROM pg_class WHERE relnamespace = to_regnamespace('repmgr') AND relname IN ('nodes', 'show_nodes') AND relowner <> current_user::regrole";

/// As repmgr 4 has it, and the view beside it.
const TABLE: &str = "\
CREATE SCHEMA IF NOT EXISTS repmgr;
CREATE TABLE IF NOT EXISTS repmgr.nodes (node_id integer PRIMARY KEY, upstream_node_id integer, active boolean NOT NULL, node_name text NOT NULL, type text NOT NULL, location text NOT NULL, priority integer NOT NULL, conninfo text NOT NULL, repluser text NOT NULL, slot_name text, config_file text NOT NULL);
CREATE OR REPLACE VIEW repmgr.show_nodes AS SELECT n.node_id, n.node_name, n.active, n.upstream_node_id, u.node_name AS upstream_node_name, n.type, n.priority, n.conninfo FROM repmgr.nodes n LEFT JOIN repmgr.nodes u ON u.node_id = n.upstream_node_id;
GRANT USAGE ON SCHEMA repmgr TO PUBLIC;
GRANT SELECT ON repmgr.nodes, repmgr.show_nodes TO PUBLIC;
DELETE FROM repmgr.nodes;
";

/// Keeps the table for as long as this node leads; on every node, what the members say of their names.
pub async fn keep(facts: Arc<Facts>) {
    let mut written = String::new();
    let mut warned: Vec<String> = Vec::new();
    let mut said = String::new();
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        if first_start::pending() {
            continue;
        }
        let Some((rows, warnings)) = wanted(&facts).await else {
            // Whoever leads next begins anew.
            written.clear();
            continue;
        };
        for warning in warnings.iter().filter(|w| !warned.contains(w)) {
            tracing::warn!("{warning}");
        }
        warned = warnings;
        if rows == written {
            continue;
        }
        let done = tokio::time::timeout(WRITE_TIMEOUT, write(&facts, &rows)).await;
        match done {
            Ok(Ok(())) => written = rows,
            Ok(Err(error)) => {
                // What is there now is not known.
                written.clear();
                let text = format!("{error:#}");
                if text != said {
                    tracing::info!("the table repmgr.nodes is not written: {text}");
                    said = text;
                }
            }
            Err(_) => written.clear(),
        }
    }
}

/// The rows, as SQL, and the nodes that are not among them; none where this node does not lead.
async fn wanted(facts: &Facts) -> Option<(String, Vec<String>)> {
    let trust = certificates::operator(&Facts::secrets()).ok()?;
    let client = Client::trusted(trust, Role::Node);
    let at = daemon_address(Kind::Node);
    let status: StatusView = client.get_json(&at, "/v1/status").await.ok()?;
    // On every node: each remembers the others' numbers and names, for when they do not run.
    let nodes = repmgr::nodes(&status).await;
    if !status.writable || status.leader.as_ref() != Some(&status.answered_by) {
        return None;
    }
    let user = facts.env.or("REPLICATION_USER", "replication_user");
    let database = facts.env.or("REPLICATION_DB", "replication_db");
    Some(rows(&nodes, user, database))
}

/// The node of each number, which is the table's key, and what there is to say about others of the same number. One that
/// runs goes before one that does not.
fn by_number(nodes: &[Node]) -> (BTreeMap<i32, &Node>, Vec<String>) {
    let mut chosen: BTreeMap<i32, &Node> = BTreeMap::new();
    let mut warnings = Vec::new();
    // Whoever never said a number has none.
    let numbered = nodes
        .iter()
        .filter_map(|n| Some((i32::try_from(n.id?).ok()?, n)));
    for (id, node) in numbered {
        let Some(other) = chosen.get(&id).copied() else {
            chosen.insert(id, node);
            continue;
        };
        let newer = node.view.agent_alive && !other.view.agent_alive;
        let (shown, left) = if newer { (node, other) } else { (other, node) };
        chosen.insert(id, shown);
        warnings.push(format!(
            "{} (member {}) and {} (member {}) both have the number {id}: the latter is left out of repmgr.nodes; set NODE_ID, another one at each node",
            shown.name, shown.view.id, left.name, left.view.id
        ));
    }
    (chosen, warnings)
}

fn rows(nodes: &[Node], user: &str, database: &str) -> (String, Vec<String>) {
    let leader = nodes.iter().find(|n| n.view.role == MemberRole::Leader);
    let (chosen, warnings) = by_number(nodes);
    let row = |(id, node): (&i32, &&Node)| {
        let upstream = repmgr::upstream_of(node, nodes, leader).and_then(|n| n.id);
        let upstream = upstream.map_or_else(|| "NULL".to_owned(), |id| id.to_string());
        let leads = leader.is_some_and(|l| l.view.id == node.view.id);
        let kind = if leads { "primary" } else { "standby" };
        let (host, port) = (&node.view.host, node.view.port);
        let conninfo = format!("user={user} dbname={database} host={host} port={port}");
        format!(
            "({id}, {upstream}, {},{}, '{kind}', 'default', {},{},{},{}, '')",
            node.view.agent_alive,
            literal(&node.name),
            node.view.priority,
            literal(&conninfo),
            literal(user),
            literal(&node.view.id.slot_name()),
        )
    };
    let rows: Vec<String> = chosen.iter().map(row).collect();
    (rows.join(",\n"), warnings)
}

async fn write(facts: &Facts, rows: &str) -> anyhow::Result<()> {
    let database = facts.env.or("REPLICATION_DB", "replication_db");
    let client = first_start::session(database).await?;
    let theirs = client
        .query_opt(
            "SELECT FROM pg_catalog.pg_extension WHERE extname = 'repmgr'",
            &[],
        )
        .await?;
    anyhow::ensure!(
        theirs.is_none(),
        "the extension repmgr is in {database}: DROP EXTENSION repmgr CASCADE gives its place to Craton's"
    );
    let strange = client.query(STRANGE, &[]).await?;
    anyhow::ensure!(
        strange.is_empty(),
        "the schema repmgr in {database} does not belong to postgres, or not all of it: DROP SCHEMA repmgr CASCADE gives its place to Craton's"
    );
    let insert = if rows.is_empty() {
        String::new()
    } else {
        format!("INSERT INTO repmgr.nodes VALUES {rows};")
    };
    // It is for people and scripts: nobody waits for standbys because of it.
    let sql = format!(
        "BEGIN; SET LOCAL synchronous_commit = local; SET LOCAL client_min_messages = warning; {TABLE}{insert} COMMIT;"
    );
    client.batch_execute(&sql).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(member: &str, id: Option<u32>, name: &str, leads: bool, alive: bool) -> Node {
        let role = if leads { "leader" } else { "down" };
        let view = serde_json::from_value(serde_json::json!({
            "id": member, "role": role, "state": "", "host": member, "port": 5432, "api": "h:2", "agent_alive": alive,
            "heard_ms_ago": 10, "timeline": 1, "lsn": "0/1", "replay_lsn": null, "lag_bytes": 0,
            "streaming": false, "sync": false, "priority": 100, "incarnation": null
        }));
        Node {
            view: view.unwrap(),
            id,
            name: name.to_owned(),
        }
    }

    #[test]
    fn a_node_that_is_stopped_keeps_its_row() {
        let nodes = [
            node("pg-1", Some(1), "node1", true, true),
            node("pg-2", Some(2), "node2", false, false),
            node("pg-3", None, "pg-3", false, false),
        ];
        let (rows, warnings) = rows(&nodes, "u", "d");
        let rows: Vec<&str> = rows.lines().collect();
        assert_eq!(
            rows,
            [
                "(1, NULL, true, E'node1', 'primary', 'default', 100, E'user=u dbname=d host=pg-1 port=5432', E'u', E'craton_pg_1', ''),",
                "(2, 1, false, E'node2', 'standby', 'default', 100, E'user=u dbname=d host=pg-2 port=5432', E'u', E'craton_pg_2', '')"
            ]
        );
        assert_eq!(warnings, [""; 0]);
    }

    #[test]
    fn a_number_that_two_nodes_have_has_one_row() {
        let nodes = [
            node("a", Some(1000), "alpha", false, false),
            node("b", Some(1000), "beta", true, true),
            node("c", Some(3), "gamma", false, true),
            node("d", Some(4_000_000_000), "delta", false, true),
        ];
        let (rows, warnings) = rows(&nodes, "u", "d");
        let starts: Vec<&str> = rows.lines().filter_map(|r| r.get(..20)).collect();
        // Of two that have it, the one that runs; what PostgreSQL's integer does not hold is none.
        assert_eq!(starts, ["(3, 1000, true, E'ga", "(1000, NULL, true, E"]);
        assert!(rows.contains("E'beta'") && !rows.contains("E'alpha'"));
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        for said in ["alpha (member a)", "beta (member b)", "NODE_ID"] {
            assert!(warnings[0].contains(said), "{warnings:?}");
        }
    }
}
