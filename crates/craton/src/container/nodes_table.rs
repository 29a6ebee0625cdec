//! The table `repmgr.nodes` in `REPLICATION_DB`, which scripts of the old stack read. The leader's container writes it when
//! something in it changes; nothing reads it here, and nothing rests on it.

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

/// Keeps the table for as long as this node leads.
pub async fn keep(facts: Arc<Facts>) {
    let mut written = String::new();
    let mut said = String::new();
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        if first_start::pending() {
            continue;
        }
        let Some(rows) = wanted(&facts).await else {
            // Whoever leads next begins anew.
            written.clear();
            continue;
        };
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

/// The rows, as SQL; none where this node does not lead.
async fn wanted(facts: &Facts) -> Option<String> {
    let trust = certificates::operator(&Facts::secrets()).ok()?;
    let client = Client::trusted(trust, Role::Node);
    let at = daemon_address(Kind::Node);
    let status: StatusView = client.get_json(&at, "/v1/status").await.ok()?;
    if !status.writable || status.leader.as_ref() != Some(&status.answered_by) {
        return None;
    }
    let nodes = repmgr::nodes(&status).await;
    let user = facts.env.or("REPLICATION_USER", "replication_user");
    let database = facts.env.or("REPLICATION_DB", "replication_db");
    Some(rows(&nodes, user, database))
}

fn rows(nodes: &[Node], user: &str, database: &str) -> String {
    let leader = nodes.iter().find(|n| n.view.role == MemberRole::Leader);
    let row = |node: &Node| {
        // Who does not run tells no number, and repmgr's key is one.
        let id = node.id?;
        let upstream = repmgr::upstream_of(node, nodes, leader).and_then(|n| n.id);
        let upstream = upstream.map_or_else(|| "NULL".to_owned(), |id| id.to_string());
        let leads = leader.is_some_and(|l| l.view.id == node.view.id);
        let kind = if leads { "primary" } else { "standby" };
        let (host, port) = (&node.view.host, node.view.port);
        let conninfo = format!("user={user} dbname={database} host={host} port={port}");
        let slot = format!("craton_{}", node.view.id);
        Some(format!(
            "({id}, {upstream}, {},{}, '{kind}', 'default', {},{},{},{}, '')",
            node.view.agent_alive,
            literal(&node.name),
            node.view.priority,
            literal(&conninfo),
            literal(user),
            literal(&slot),
        ))
    };
    nodes.iter().filter_map(row).collect::<Vec<_>>().join(",\n")
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
