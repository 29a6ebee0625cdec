//! What `repmgr` changes: who leads, and who is a member. With `--dry-run` it says what would be done, and does nothing.

use craton_console::views::{MemberView, StatusView};
use craton_core::MemberId;

use super::{Node, access, nodes, own_member};
use crate::change::{self, FailoverArgs, SwitchoverArgs};
use crate::container::entry::Facts;
use crate::container::options::Line;
use crate::exit::{self, Problem, REFUSED, USAGE};
use crate::{member, output};

/// Why something would be refused, and what to do about it.
type Obstacle = (String, &'static str);

fn refused((what, hint): Obstacle) -> anyhow::Error {
    Problem::new(REFUSED, what, hint).into()
}

/// `repmgr standby switchover`: this node leads next.
pub(super) async fn switchover(dry: bool) -> anyhow::Result<u8> {
    let me = own_member()?;
    let access = access()?;
    if dry {
        let from = may_switch(&access.status().await?, &me).map_err(refused)?;
        output::line(format!(
            "INFO: prerequisites for executing STANDBY SWITCHOVER are met\n\
             INFO: {from} would hand over to {me} (craton switchover --to {me}); nothing was done"
        ));
        return Ok(exit::OK);
    }
    let args = SwitchoverArgs {
        to: Some(me),
        at: None,
        cancel: false,
    };
    change::switchover(&access, args, false).await
}

/// `repmgr standby promote`: this node leads next, also where nobody hands over.
pub(super) async fn promote(dry: bool) -> anyhow::Result<u8> {
    let me = own_member()?;
    let access = access()?;
    if dry {
        may_promote(&access.status().await?, &me).map_err(refused)?;
        output::line(format!(
            "INFO: prerequisites for executing STANDBY PROMOTE are met\n\
             INFO: {me} would be made the leader (craton failover --to {me}), unless acknowledged commits could be lost; nothing was done"
        ));
        return Ok(exit::OK);
    }
    let args = FailoverArgs {
        to: Some(me),
        allow_data_loss: false,
        yes: false,
    };
    change::failover(&access, args, false).await
}

/// Who would hand over to `me`; what the leader checks before it does.
fn may_switch(status: &StatusView, me: &MemberId) -> Result<MemberId, Obstacle> {
    let Some(leader) = &status.leader else {
        return Err((
            "there is no leader to hand over".to_owned(),
            "an election is open; see craton explain",
        ));
    };
    let own = own_view(status, me)?;
    if leader == me {
        return Err((
            format!("{me} leads already"),
            "type it on the node that is to lead",
        ));
    }
    if !status.writable {
        return Err((
            format!("{leader} leads and is not open for clients yet"),
            "see craton explain",
        ));
    }
    if status.hold {
        return Err((
            "another change of leadership, or a restart of the leader, is in progress".to_owned(),
            "wait for it to end; see craton status",
        ));
    }
    if !own.streaming || own.upstream.as_ref().is_some_and(|u| u != leader) {
        return Err((
            format!("{me} does not stream from {leader}"),
            "see craton explain on this node",
        ));
    }
    if !can_elect(status, leader) {
        return Err((
            "too few standbys are there to elect a new leader safely".to_owned(),
            "see craton status",
        ));
    }
    Ok(leader.clone())
}

fn may_promote(status: &StatusView, me: &MemberId) -> Result<(), Obstacle> {
    own_view(status, me)?;
    if status.leader.as_ref() == Some(me) {
        return Err((format!("{me} leads already"), "there is nothing to do"));
    }
    if status.hold {
        return Err((
            "another change of leadership, or a restart of the leader, is in progress".to_owned(),
            "wait for it to end; see craton status",
        ));
    }
    Ok(())
}

/// The member's row, if it may lead.
fn own_view<'s>(status: &'s StatusView, me: &MemberId) -> Result<&'s MemberView, Obstacle> {
    let Some(own) = status.members.iter().find(|m| m.id == *me) else {
        return Err((
            format!("{me} is not a member yet"),
            "craton explain says what it waits for",
        ));
    };
    if own.priority == 0 {
        return Err((
            format!("{me} has priority 0: it never leads"),
            "NODE_PRIORITY above 0 lets it",
        ));
    }
    if !own.agent_alive {
        return Err((
            format!("the agent of {me} is not heard"),
            "see craton status",
        ));
    }
    Ok(own)
}

/// True if enough of those that commits waited for are there: what one of them acknowledged, one of these has. And one
/// of these may lead and is fit to. The leader itself looks again before it hands over (`can_hand_over`).
fn can_elect(status: &StatusView, leader: &MemberId) -> bool {
    let timeline = |id: &MemberId| {
        let member = status.members.iter().find(|m| m.id == *id);
        member.and_then(|m| m.timeline)
    };
    let there = |m: &MemberView| {
        m.sync && m.agent_alive && m.id != *leader && m.timeline == timeline(leader)
    };
    let heir = |m: &MemberView| there(m) && m.priority > 0 && m.trouble.is_empty();
    if !status.members.iter().any(heir) && !status.receivers.iter().any(|r| r.sync && r.alive) {
        return false;
    }
    let alive = |id: &MemberId| {
        let member = status.members.iter().find(|m| m.id == *id);
        let receiver = status.receivers.iter().find(|r| r.name == *id);
        member.is_some_and(there) || receiver.is_some_and(|r| r.sync && r.alive)
    };
    let set = &status.sync.members;
    let there = set.iter().filter(|id| alive(id)).count();
    let needed = if status.durability == "async" {
        1
    } else {
        let acks = usize::try_from(status.sync.acks).unwrap_or(usize::MAX);
        set.len().saturating_sub(acks) + 1
    };
    there >= needed
}

/// `repmgr standby|primary unregister`
pub(super) async fn unregister(line: &Line) -> anyhow::Result<u8> {
    let access = access()?;
    let member = match wanted(line)? {
        Wanted::Own => own_member()?,
        wanted => {
            let status = access.status().await?;
            found(&nodes(&status).await, &wanted)?
        }
    };
    if line.has("dry-run") {
        may_leave(&access.status().await?, &member).map_err(refused)?;
        output::line(format!(
            "INFO: {member} would be taken out of the cluster and its PostgreSQL stopped (craton member remove {member}); nothing was done"
        ));
        return Ok(exit::OK);
    }
    let command = member::MemberCommand::Remove { member, yes: true };
    member::run(&access, &Facts::secrets(), command, false).await
}

/// Which node is meant.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Wanted {
    Own,
    Id(u32),
    Name(String),
}

fn wanted(line: &Line) -> anyhow::Result<Wanted> {
    Ok(match (line.option("node-id"), line.option("node-name")) {
        (None, None) => Wanted::Own,
        (Some(id), None) => Wanted::Id(id.parse().map_err(|_| {
            Problem::new(
                USAGE,
                format!("--node-id: \"{id}\" is no number"),
                "repmgr cluster show has the numbers of the nodes",
            )
        })?),
        (None, Some(name)) => Wanted::Name(name.to_owned()),
        (Some(_), Some(_)) => {
            let what = "--node-id and --node-name are both given";
            return Err(Problem::new(USAGE, what, "one of them says which node").into());
        }
    })
}

fn found(nodes: &[Node], wanted: &Wanted) -> anyhow::Result<MemberId> {
    let fits = |n: &&Node| match wanted {
        Wanted::Own => false,
        Wanted::Id(id) => n.id == Some(*id),
        Wanted::Name(name) => n.name == *name,
    };
    let mut fitting: Vec<&Node> = nodes.iter().filter(fits).collect();
    if let (true, Wanted::Name(name)) = (fitting.is_empty(), wanted) {
        fitting.extend(nodes.iter().find(|n| n.view.id.as_str() == name));
    }
    let called = match wanted {
        Wanted::Id(id) => format!("the number {id}"),
        Wanted::Name(name) => format!("the name \"{name}\""),
        Wanted::Own => "no name".to_owned(),
    };
    match fitting.as_slice() {
        [node] => Ok(node.view.id.clone()),
        [] => {
            let hint = "repmgr cluster show has the numbers and names. A node that has not answered since this one knows it tells neither: craton member list, craton member remove NAME";
            let what = format!("no node is known that has {called}");
            Err(Problem::new(exit::FAILURE, what, hint).into())
        }
        several => {
            let named = |n: &&Node| format!("{} (member {})", n.name, n.view.id);
            let names: Vec<String> = several.iter().map(named).collect();
            let what = format!(
                "{} have {called}: {}; nothing was done",
                several.len(),
                names.join(", ")
            );
            let hint = "craton member remove MEMBER says which is meant; NODE_ID and NODE_NAME give each node its own";
            Err(Problem::new(USAGE, what, hint).into())
        }
    }
}

fn may_leave(status: &StatusView, member: &MemberId) -> Result<(), Obstacle> {
    if !status.members.iter().any(|m| m.id == *member) {
        return Err((
            format!("there is no member {member}"),
            "see craton member list",
        ));
    }
    if status.leader.as_ref() == Some(member) {
        return Err((
            format!("{member} is the leader"),
            "hand over first: repmgr standby switchover on another node",
        ));
    }
    if status.leader.is_none() && status.sync.members.contains(member) {
        return Err((
            format!("an election is open, and {member} may hold commits that it needs"),
            "wait for a leader: see craton explain",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::commands::understand;
    use super::*;

    fn id(name: &str) -> MemberId {
        MemberId::new(name).unwrap()
    }

    fn status(change: impl Fn(&mut serde_json::Value)) -> StatusView {
        let member = |name: &str, leads: bool| {
            serde_json::json!({
                "id": name, "role": if leads { "leader" } else { "standby" }, "state": "", "host": name, "port": 1,
                "api": "h:2", "agent_alive": true, "heard_ms_ago": 10, "timeline": 1, "lsn": "0/1", "replay_lsn": null,
                "lag_bytes": 0, "streaming": !leads, "sync": !leads, "priority": 100, "incarnation": null,
                "upstream": if leads { None } else { Some("a") }
            })
        };
        let mut value = serde_json::json!({
            "cluster": "t", "answered_by": "a", "term": 5, "revision": 1, "leader": "a", "writable": true,
            "durability": "quorum", "sync": {"members": ["b", "c"], "acks": 1, "in_force": true},
            "lease": {"holder": "a", "remaining_ms": 900, "ttl_ms": 2000, "heartbeat_ms": 300},
            "hold": false, "next": "", "election": null,
            "members": [member("a", true), member("b", false), member("c", false)]
        });
        change(&mut value);
        serde_json::from_value(value).unwrap()
    }

    /// Its members as `node1`, `node2`, …
    fn nodes_of(status: &StatusView) -> Vec<Node> {
        let numbered = status.members.iter().cloned().zip(1..);
        let node = |(view, n)| Node {
            id: Some(n),
            name: format!("node{n}"),
            view,
        };
        numbered.map(node).collect()
    }

    #[test]
    fn a_switchover_that_would_work_and_those_that_would_not() {
        let whole = status(|_| {});
        assert_eq!(may_switch(&whole, &id("b")), Ok(id("a")));
        let why = |s: &StatusView, me: &str| may_switch(s, &id(me)).unwrap_err().0;
        assert_eq!(why(&whole, "a"), "a leads already");
        assert_eq!(why(&whole, "d"), "d is not a member yet");
        let alone = status(|s| s["leader"] = serde_json::Value::Null);
        assert_eq!(why(&alone, "b"), "there is no leader to hand over");
        let holding = status(|s| s["hold"] = true.into());
        assert!(why(&holding, "b").contains("in progress"));
        let closed = status(|s| s["writable"] = false.into());
        assert!(why(&closed, "b").contains("not open"));
        let behind = status(|s| s["members"][1]["streaming"] = false.into());
        assert_eq!(why(&behind, "b"), "b does not stream from a");
        let second = status(|s| s["members"][1]["upstream"] = "c".into());
        assert_eq!(why(&second, "b"), "b does not stream from a");
        let never = status(|s| s["members"][1]["priority"] = 0.into());
        assert_eq!(why(&never, "b"), "b has priority 0: it never leads");
        // One of two is asked for each commit: both must seal.
        let few = status(|s| s["members"][2]["agent_alive"] = false.into());
        assert!(why(&few, "b").contains("too few standbys"));
    }

    #[test]
    fn a_promotion_is_tried_without_a_leader_too() {
        let alone = status(|s| s["leader"] = serde_json::Value::Null);
        assert_eq!(may_promote(&alone, &id("b")), Ok(()));
        let whole = status(|_| {});
        assert_eq!(may_promote(&whole, &id("c")), Ok(()));
        assert_eq!(
            may_promote(&whole, &id("a")).unwrap_err().0,
            "a leads already"
        );
    }

    #[test]
    fn who_may_be_taken_out() {
        let whole = status(|_| {});
        assert_eq!(may_leave(&whole, &id("c")), Ok(()));
        assert_eq!(
            may_leave(&whole, &id("a")).unwrap_err().0,
            "a is the leader"
        );
        assert!(may_leave(&whole, &id("x")).is_err());
        let electing = status(|s| s["leader"] = serde_json::Value::Null);
        assert!(may_leave(&electing, &id("c")).is_err());
    }

    #[test]
    fn which_node_is_meant() {
        let line = |text: &str| {
            understand(&crate::container::options::typed(text))
                .unwrap()
                .1
        };
        for (text, expected) in [
            ("standby unregister", Wanted::Own),
            ("standby unregister --node-id=3", Wanted::Id(3)),
            ("primary unregister --node-id 3 --dry-run", Wanted::Id(3)),
            (
                "standby unregister --node-name node3",
                Wanted::Name("node3".into()),
            ),
        ] {
            assert_eq!(wanted(&line(text)).unwrap(), expected, "{text}");
        }
        for wrong in [
            "standby unregister --node-id=three",
            "standby unregister --node-id=3 --node-name=node3",
        ] {
            let error = wanted(&line(wrong)).unwrap_err();
            assert_eq!(exit::code_of(&error), USAGE, "{wrong}");
        }
        let nodes = nodes_of(&status(|_| {}));
        assert_eq!(found(&nodes, &Wanted::Id(3)).unwrap(), id("c"));
        assert_eq!(
            found(&nodes, &Wanted::Name("node2".into())).unwrap(),
            id("b")
        );
        assert_eq!(found(&nodes, &Wanted::Name("b".into())).unwrap(), id("b"));
        let error = found(&nodes, &Wanted::Id(9)).unwrap_err();
        assert!(error.to_string().contains("the number 9"), "{error}");
    }

    #[test]
    fn a_number_that_two_nodes_have_is_refused() {
        let mut nodes = nodes_of(&status(|_| {}));
        for (node, name) in nodes.iter_mut().zip(["alpha", "beta", "beta"]) {
            node.id = Some(1000);
            name.clone_into(&mut node.name);
        }
        let error = found(&nodes, &Wanted::Id(1000)).unwrap_err();
        assert_eq!(exit::code_of(&error), USAGE);
        for named in ["alpha (member a)", "beta (member b)", "beta (member c)"] {
            assert!(error.to_string().contains(named), "{error}");
        }
        let name = |text: &str| found(&nodes, &Wanted::Name(text.to_owned()));
        assert_eq!(name("alpha").unwrap(), id("a"));
        assert_eq!(exit::code_of(&name("beta").unwrap_err()), USAGE);
        assert_eq!(name("c").unwrap(), id("c"));
    }
}
