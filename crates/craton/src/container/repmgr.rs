//! `repmgr` as people type it and scripts parse it, over what the agents say; and the old node image's scripts.

mod changes;
mod commands;
mod major;
pub mod scripts;

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use craton_console::Client;
use craton_console::front::AboutView;
use craton_console::views::{MemberView, StatusView};
use craton_core::MemberId;
use craton_core::topology::MemberRole;
use tokio::time::Instant;

use super::entry::Facts;
use super::first_start;
use super::known_nodes::{KnownNodes, Said};
use super::plan::{FRONT_PORT, NODE_DIR};
use crate::access::Access;
use crate::cli::wait_for;
use crate::exit::{self, Problem};
use crate::output;
use commands::{Asked, HELP, understand};
pub use major::is_major;

/// repmgr's exit code for "something is not as it should be" (`ERR_NODE_STATUS`).
const NODE_STATUS: u8 = 25;
/// How long a container may take to say who it is.
const ABOUT_TIMEOUT: Duration = Duration::from_secs(1);
/// `wait_local_postgres` gives up after this.
const WAIT_MAX: Duration = Duration::from_secs(600);
/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// A member with its names in the old stack.
pub struct Node {
    /// What the agents say of it.
    pub view: MemberView,
    /// Its number.
    pub id: Option<u32>,
    /// Its name.
    pub name: String,
}

/// The node that another one streams from, or is to stream from.
pub fn upstream_of<'n>(
    node: &Node,
    nodes: &'n [Node],
    leader: Option<&'n Node>,
) -> Option<&'n Node> {
    let leader = leader.filter(|l| l.view.id != node.view.id)?;
    let named = node.view.upstream.as_ref();
    let found = nodes.iter().find(|n| Some(&n.view.id) == named);
    Some(found.unwrap_or(leader))
}

/// The access of a command inside a container.
pub fn access() -> anyhow::Result<Access> {
    let facts = Facts::require()?;
    Access::open(
        &facts.agents(),
        Some(&Facts::secrets()),
        None,
        &Facts::secrets(),
    )
}

/// The members, with their names: as they say now, else as they said last.
pub async fn nodes(status: &StatusView) -> Vec<Node> {
    let client = Client::new(None).with_timeout(ABOUT_TIMEOUT);
    let mut asked = tokio::task::JoinSet::new();
    for view in status.members.clone() {
        let client = client.clone();
        asked.spawn(async move {
            let at = format!("{}:{FRONT_PORT}", view.host);
            let about: Option<AboutView> = client.get_json(&at, "/about").await.ok();
            let said = about.and_then(|a| said_by(&view, a));
            (view, said)
        });
    }
    let volume = Path::new(NODE_DIR);
    let mut known = KnownNodes::load(volume, &status.cluster);
    let (nodes, news) = named(asked.join_all().await, &mut known);
    if news && let Err(error) = known.store(volume) {
        tracing::warn!("the numbers and names of the nodes are not kept: {error:#}");
    }
    nodes
}

/// What a member's container says of its names; none where another one answers at its address.
fn said_by(view: &MemberView, about: AboutView) -> Option<Said> {
    let same = about.member.as_deref() == Some(view.id.as_str());
    same.then_some(Said {
        node_id: about.node_id,
        node_name: about.node_name,
    })
}

/// The nodes in the order of their numbers, and whether something that was said is new.
fn named(said: Vec<(MemberView, Option<Said>)>, known: &mut KnownNodes) -> (Vec<Node>, bool) {
    let heard = said.iter().map(|(v, s)| (v.id.clone(), s.clone()));
    let news = known.learn(heard.collect());
    let node = |(view, _): (MemberView, Option<Said>)| {
        let said = known.of(&view.id).cloned().unwrap_or_default();
        Node {
            id: said.node_id,
            name: said.node_name.unwrap_or_else(|| view.id.to_string()),
            view,
        }
    };
    let mut nodes: Vec<Node> = said.into_iter().map(node).collect();
    nodes.sort_by_key(|n| (n.id.unwrap_or(u32::MAX), n.view.id.clone()));
    (nodes, news)
}

fn id_text(id: Option<u32>) -> String {
    id.map_or_else(|| "?".to_owned(), |id| id.to_string())
}

/// A table as repmgr draws it.
fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = (0..header.len())
        .map(|c| {
            let cells = rows
                .iter()
                .filter_map(|r| r.get(c))
                .map(|t| t.chars().count());
            cells
                .chain(header.get(c).map(|h| h.chars().count()))
                .max()
                .unwrap_or(0)
        })
        .collect();
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells
            .iter()
            .zip(&widths)
            .map(|(t, w)| format!("{t:<w$}"))
            .collect();
        format!(" {}", padded.join(" | ").trim_end())
    };
    let rule: Vec<String> = widths.iter().map(|w| "-".repeat(w + 2)).collect();
    let mut text = vec![line(header.to_vec()), rule.join("+")];
    text.extend(
        rows.iter()
            .map(|r| line(r.iter().map(String::as_str).collect())),
    );
    text.join("\n")
}

/// Runs `repmgr ARGS`.
pub fn run(args: &[String]) -> anyhow::Result<u8> {
    let (asked, line) = understand(args)?;
    let (csv, dry) = (line.has("csv"), line.has("dry-run"));
    match asked {
        Asked::Help => {
            output::line(format!("repmgr, as Craton has it; {HELP}"));
            Ok(exit::OK)
        }
        Asked::Version => {
            output::line(format!("repmgr (craton {})", env!("CARGO_PKG_VERSION")));
            Ok(exit::OK)
        }
        Asked::Show => wait_for(show(csv)),
        Asked::Crosscheck => wait_for(crosscheck(csv)),
        Asked::Events => wait_for(async { crate::history::run(&access()?, false).await }),
        Asked::NodeStatus => wait_for(node_status()),
        Asked::Switchover => wait_for(changes::switchover(dry)),
        Asked::Promote => wait_for(changes::promote(dry)),
        Asked::Unregister => wait_for(changes::unregister(&line)),
        Asked::Nothing => {
            output::line(
                "nothing to do: the agent of each node does this by itself (craton status, craton explain)",
            );
            Ok(exit::OK)
        }
    }
}

fn own_member() -> anyhow::Result<MemberId> {
    let facts = Facts::require()?;
    Ok(facts.node.context("this is no node")?.member)
}

fn role_word(view: &MemberView) -> &'static str {
    match view.role {
        MemberRole::Leader => "primary",
        _ => "standby",
    }
}

fn status_word(view: &MemberView) -> &'static str {
    match view.role {
        MemberRole::Leader => "* running",
        _ if !view.agent_alive || view.role == MemberRole::Down => "- failed",
        MemberRole::Standby if view.streaming => "  running",
        _ => "! running",
    }
}

async fn show(csv: bool) -> anyhow::Result<u8> {
    let status = access()?.status().await?;
    let nodes = nodes(&status).await;
    let (text, good) = shown(&nodes, status.leader.as_ref(), csv);
    output::line(text);
    Ok(if good { exit::OK } else { NODE_STATUS })
}

/// What `cluster show` says, and whether all is as it should be.
fn shown(nodes: &[Node], leads: Option<&MemberId>, csv: bool) -> (String, bool) {
    let leader = nodes.iter().find(|n| Some(&n.view.id) == leads);
    let mut good = true;
    let (mut lines, mut rows) = (Vec::new(), Vec::new());
    for node in nodes {
        let word = status_word(&node.view);
        let up = !word.starts_with('-');
        good &= word.starts_with(['*', ' ']);
        let recovery = match (up, node.view.role) {
            (false, _) => -1,
            (true, MemberRole::Leader) => 0,
            (true, _) => 1,
        };
        let available = if up { 0 } else { -1 };
        lines.push(format!("{},{available},{recovery}", id_text(node.id)));
        let upstream =
            upstream_of(node, nodes, leader).map_or_else(String::new, |n| n.name.clone());
        rows.push(vec![
            id_text(node.id),
            node.name.clone(),
            role_word(&node.view).to_owned(),
            word.to_owned(),
            upstream,
            "default".to_owned(),
            format!("host={} port={}", node.view.host, node.view.port),
        ]);
    }
    if csv {
        return (lines.join("\n"), good);
    }
    let header = [
        "ID",
        "Name",
        "Role",
        "Status",
        "Upstream",
        "Location",
        "Connection string",
    ];
    (table(&header, &rows), good)
}

/// What each node says of each: `*` it hears it, `x` it does not, `?` it does not answer itself.
async fn crosscheck(csv: bool) -> anyhow::Result<u8> {
    let access = access()?;
    let status = access.status().await?;
    let nodes = nodes(&status).await;
    let mut rows = Vec::new();
    let mut good = true;
    for from in &nodes {
        let client = access.client().clone().with_timeout(Duration::from_secs(2));
        let view: Option<StatusView> = client.get_json(&from.view.api, "/v1/status").await.ok();
        let mut row = vec![from.name.clone(), id_text(from.id)];
        for to in &nodes {
            let cell = match &view {
                None => "?",
                Some(_) if from.view.id == to.view.id => "*",
                Some(view) => {
                    let heard = view.members.iter().find(|m| m.id == to.view.id);
                    if heard.is_some_and(|m| m.agent_alive) {
                        "*"
                    } else {
                        "x"
                    }
                }
            };
            good &= cell == "*";
            if csv {
                let code = match cell {
                    "*" => 0,
                    "x" => -1,
                    _ => -2,
                };
                output::line(format!("{},{},{code}", id_text(from.id), id_text(to.id)));
            }
            row.push(cell.to_owned());
        }
        rows.push(row);
    }
    if !csv {
        let ids: Vec<String> = nodes.iter().map(|n| id_text(n.id)).collect();
        let mut header = vec!["Name", "Id"];
        header.extend(ids.iter().map(String::as_str));
        output::line(table(&header, &rows));
    }
    Ok(if good { exit::OK } else { NODE_STATUS })
}

async fn node_status() -> anyhow::Result<u8> {
    let status = access()?.status().await?;
    let me = own_member()?;
    let nodes = nodes(&status).await;
    let Some(node) = nodes.iter().find(|n| n.view.id == me) else {
        return Err(Problem::new(
            exit::FAILURE,
            format!("{me} is not a member yet"),
            "craton explain says what it waits for",
        )
        .into());
    };
    let lsn = node
        .view
        .lsn
        .map_or_else(|| "-".to_owned(), |l| l.to_string());
    output::line(format!(
        "Node \"{}\":\n\tMember: {me}\n\tRole: {}\n\tState: {}\n\tTotal data end: {lsn}\n\tReplication lag: {} bytes\n\tSynchronous: {}",
        node.name,
        role_word(&node.view),
        node.view.state,
        node.view.lag_bytes.unwrap_or(0),
        if node.view.sync { "yes" } else { "no" }
    ));
    Ok(if status_word(&node.view).starts_with(['*', ' ']) {
        exit::OK
    } else {
        NODE_STATUS
    })
}

/// `get_node_id`
pub fn node_id() -> anyhow::Result<u8> {
    let id = if let Some(node) = Facts::load()?.and_then(|f| f.node) {
        node.node_id
    } else {
        // Before the container's command has run, or instead of it.
        let text = |name: &str| std::env::var(name).unwrap_or_default();
        let from_name = super::plan::id_from_name(&text("NODE_NAME")).unwrap_or(1000);
        text("NODE_ID").parse().unwrap_or(from_name)
    };
    output::line(id.to_string());
    Ok(exit::OK)
}

/// `wait_local_postgres`: until this node serves, and the databases of the environment are there.
pub async fn wait_local() -> anyhow::Result<u8> {
    let until = Instant::now() + WAIT_MAX;
    loop {
        let why = match serves().await {
            Ok(()) => return Ok(exit::OK),
            Err(why) => why,
        };
        if Instant::now() >= until {
            let what = format!(
                "PostgreSQL here does not serve after {} s: {why:#}",
                WAIT_MAX.as_secs()
            );
            return Err(Problem::new(
                exit::NOT_IN_TIME,
                what,
                "craton explain says what it waits for",
            )
            .into());
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn serves() -> anyhow::Result<()> {
    let facts = Facts::require()?;
    anyhow::ensure!(
        !super::daemon::first_start_marker().exists(),
        "the databases of the environment are not made yet"
    );
    let database = facts.env.or("REPLICATION_DB", "replication_db").to_owned();
    first_start::session(&database)
        .await?
        .simple_query("SELECT 1")
        .await?;
    let me = facts.node.context("this is no node")?.member;
    let status = access()?.status().await?;
    let own = status
        .members
        .iter()
        .find(|m| m.id == me)
        .context("this node is no member yet")?;
    anyhow::ensure!(
        own.streaming || (status.writable && status.leader.as_ref() == Some(&me)),
        "it neither leads nor streams: {}",
        own.state
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_look_like_repmgrs() {
        let rows = vec![
            vec![
                "1001".into(),
                "node1".into(),
                "primary".into(),
                "* running".into(),
            ],
            vec![
                "2".into(),
                "n2".into(),
                "standby".into(),
                "  running".into(),
            ],
        ];
        let text = table(&["ID", "Name", "Role", "Status"], &rows);
        let expected = " ID   | Name  | Role    | Status\n\
                        ------+-------+---------+-----------\n 1001 | node1 | primary | * running\n 2    | n2    | standby |   running";
        assert_eq!(text, expected);
    }

    pub(super) fn view(name: &str, leads: bool, alive: bool) -> MemberView {
        let role = match (leads, alive) {
            (_, false) => "down",
            (true, true) => "leader",
            (false, true) => "standby",
        };
        serde_json::from_value(serde_json::json!({
            "id": name, "role": role, "state": "", "host": name, "port": 5432, "api": "h:2", "agent_alive": alive,
            "heard_ms_ago": 10, "timeline": 1, "lsn": "0/1", "replay_lsn": null, "lag_bytes": 0,
            "streaming": alive && !leads, "sync": false, "priority": 100, "incarnation": null
        }))
        .unwrap()
    }

    fn said(id: u32) -> Said {
        Said {
            node_id: Some(id),
            node_name: Some(format!("node{id}")),
        }
    }

    #[test]
    fn a_stopped_node_keeps_its_number_and_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let mut known = KnownNodes::load(dir.path(), "c");
        let all = vec![
            (view("pgmaster", true, true), Some(said(1))),
            (view("pgslave1", false, true), Some(said(2))),
        ];
        assert!(named(all, &mut known).1);
        let (nodes, news) = named(
            vec![
                (view("pgmaster", false, false), None),
                (view("pgslave1", true, true), Some(said(2))),
                (view("pgslave9", false, false), None),
            ],
            &mut known,
        );
        assert!(!news);
        let leader = MemberId::new("pgslave1").unwrap();
        let (text, good) = shown(&nodes, Some(&leader), false);
        assert!(!good);
        let line = |n: usize| text.lines().nth(n).unwrap_or_default();
        assert!(
            line(2).starts_with(" 1  | node1    | standby | - failed  | node2 "),
            "{text}"
        );
        // Whoever never said a number has none.
        assert!(line(4).starts_with(" ?  | pgslave9 |"), "{text}");
        let (csv, _) = shown(&nodes, Some(&leader), true);
        assert_eq!(csv, "1,-1,-1\n2,0,0\n?,-1,-1");
    }

    #[test]
    fn another_container_at_a_members_address_is_not_believed() {
        let about = |member: &str| AboutView {
            member: Some(member.to_owned()),
            node_id: Some(3),
            ..AboutView::default()
        };
        let at = view("a", false, true);
        assert!(said_by(&at, about("a")).is_some());
        assert_eq!(said_by(&at, about("b")), None);
    }
}
