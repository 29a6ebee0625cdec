//! The checks of where the cluster's records are.

use std::collections::BTreeSet;

use craton_console::views::CoordinatorView;

use super::checks::found;
use super::facts::Facts;
use super::{Finding, Severity};

const ID: &str = "coordinator";

fn views(f: &Facts) -> impl Iterator<Item = &CoordinatorView> {
    f.agents.iter().filter_map(|a| a.coordinator.as_ref())
}

/// Whether the records are in an etcd, so that the members' votes do not elect anybody.
pub(super) fn is_etcd(f: &Facts) -> bool {
    let mut views = views(f).peekable();
    views.peek().is_some() && views.all(|v| v.backend == "etcd")
}

/// What members that do not answer mean where the records are in etcd.
pub(super) fn voters(alive: usize, majority: usize, all: usize) -> Vec<Finding> {
    if alive >= majority {
        return vec![];
    }
    let what = format!(
        "{alive} of {all} members answer, and {majority} are needed to add or remove members, and before the records can be moved back into them; leaders are elected through etcd all the same"
    );
    vec![found(
        "voters",
        Severity::Warning,
        "cluster",
        what,
        "bring the silent ones back",
    )]
}

/// Reached by everybody, whole, the same, and not in between.
pub(super) fn coordinator(f: &Facts) -> Vec<Finding> {
    let mut findings: Vec<Finding> = views(f).flat_map(one).collect();
    let places: BTreeSet<&str> = views(f).map(|v| v.backend.as_str()).collect();
    if places.len() > 1 {
        let each: Vec<String> = views(f)
            .map(|v| format!("{}: {}", v.member, v.place))
            .collect();
        findings.push(found(
            ID,
            Severity::Warning,
            "cluster",
            format!("not everybody uses the same store: {}", each.join("; ")),
            "a move is under way, or a member cannot follow it: craton coordinator status",
        ));
    }
    findings
}

fn one(view: &CoordinatorView) -> Vec<Finding> {
    let member = view.member.as_str();
    let bad: Vec<&str> = view
        .endpoints
        .iter()
        .filter_map(|e| e.error.as_deref())
        .collect();
    let all = view.endpoints.len();
    if let Some(why) = &view.trouble {
        return vec![found(
            ID,
            Severity::Critical,
            member,
            format!(
                "it cannot use the cluster's records in {}: {why}",
                view.place
            ),
            "a leader goes on while standbys promise (durability quorum), and nobody else can lead: see to the store",
        )];
    }
    if all > 0 && bad.len() == all {
        return vec![found(
            ID,
            Severity::Critical,
            member,
            format!("no endpoint of etcd answers it: {}", bad.join("; ")),
            "see to etcd, the network between them, and this host's certificate and password for it",
        )];
    }
    if !bad.is_empty() {
        let good = all - bad.len();
        return vec![found(
            ID,
            Severity::Warning,
            member,
            format!(
                "{good} of {all} endpoints of etcd answer it: {}",
                bad.join("; ")
            ),
            "bring it back before another is lost, or take it out of node.coordinator.endpoints",
        )];
    }
    match &view.progress {
        Some(progress) => vec![found(
            ID,
            Severity::Warning,
            member,
            format!("the records are {progress}"),
            "a move goes on by itself; craton coordinator status says what it waits for",
        )],
        None => vec![],
    }
}
