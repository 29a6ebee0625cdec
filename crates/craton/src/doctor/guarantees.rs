//! The checks of what limits the guarantees: settings of PostgreSQL, its release, and how the fence runs.

use std::collections::{BTreeMap, BTreeSet};

use craton_console::views::{GuaranteesView, MemberView, WeakSettingView};

use super::checks::found;
use super::facts::Facts;
use super::{Finding, Severity};

/// The first minor release of each major one in which a server that starts as a primary lets no commit pass before its
/// standbys count; see `craton_pg::sync`. Later majors never had the fault.
const STARTS_CLOSED_FROM: [(u32, u32); 5] = [(13, 21), (14, 18), (15, 13), (16, 9), (17, 5)];

fn answers(f: &Facts) -> impl Iterator<Item = &GuaranteesView> {
    f.agents.iter().filter_map(|a| a.guarantees.as_ref())
}

fn means(s: &WeakSettingView) -> &'static str {
    if s.name == "client_min_messages" {
        "PostgreSQL's warning that a commit was cancelled while it waited for the standbys does not come out: such a commit looks like one that lasts"
    } else {
        "commits are acknowledged that no standby has flushed: a failover may lose them"
    }
}

/// What is set for a role or a database is the same on every member, and told once.
pub(super) fn guarantees(f: &Facts) -> Vec<Finding> {
    let no_standbys = f.status.durability == "async";
    let off = |s: &WeakSettingView| {
        s.name == "synchronous_commit"
            && ["off", "false", "no", "0"].contains(&s.value.to_ascii_lowercase().as_str())
    };
    let mut told = BTreeSet::new();
    let mut findings = Vec::new();
    for view in answers(f) {
        for s in &view.settings {
            // In `async` commits wait for the own disk alone.
            if no_standbys && !off(s) {
                continue;
            }
            let place = match (s.shared, s.place.is_empty()) {
                (true, true) => "every role".to_owned(),
                (true, false) => s.place.clone(),
                (false, _) => format!("{}: {}", view.member, s.place),
            };
            if !told.insert((place.clone(), s.name.clone())) {
                continue;
            }
            let todo = match (s.shared, s.name.as_str()) {
                (true, "client_min_messages") => {
                    "ALTER … RESET client_min_messages; warning is quiet enough".to_owned()
                }
                (true, name) => format!("ALTER … RESET {name}, unless its commits may be lost so"),
                (false, name) => format!("take {name} out of it"),
            };
            let what = format!("{} = {}: {}", s.name, s.value, means(s));
            findings.push(found("guarantees", Severity::Warning, place, what, todo));
        }
    }
    findings
}

/// One word for all members that run alike, as those of a try do.
pub(super) fn fence(f: &Facts) -> Vec<Finding> {
    let mut alike: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for view in answers(f).filter(|view| view.fence.alive) {
        let missing = [
            (!view.fence.memory_locked).then_some("its memory may be swapped out"),
            (!view.fence.hurried).then_some("it runs at the priority of everything else"),
        ];
        let missing: Vec<&str> = missing.into_iter().flatten().collect();
        if !missing.is_empty() {
            let members = alike.entry(missing.join(", and ")).or_default();
            members.push(view.member.as_str());
        }
    }
    let todo = "the service needs LimitMEMLOCK=infinity and LimitNICE=-20, as in packaging/craton-node.service, a container `ulimits: {memlock: -1, nice: 40}`, and then a restart; a cluster for a try does without";
    alike
        .into_iter()
        .map(|(missing, members)| {
            let what = format!(
                "the fence may be late on a host that is short of memory or of processors: {missing}"
            );
            found("fence", Severity::Note, members.join(", "), what, todo)
        })
        .collect()
}

/// `15.12` if this release has the fault.
fn starts_open(version: &str) -> bool {
    let mut numbers = version.split('.').map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return false;
    };
    STARTS_CLOSED_FROM
        .iter()
        .any(|(m, fixed)| *m == major && minor < *fixed)
}

pub(super) fn release(f: &Facts) -> Vec<Finding> {
    let old = |m: &MemberView| {
        let version = m.libraries.get("postgresql").filter(|v| starts_open(v))?;
        Some(found(
            "release",
            Severity::Warning,
            m.id.as_str(),
            format!(
                "PostgreSQL {version} may acknowledge a commit without its standbys in the first moment after a leader was started in place"
            ),
            "upgrade PostgreSQL to its newest minor release, member by member (13.21, 14.18, 15.13, 16.9 and 17.5 do not do that)",
        ))
    };
    f.status.members.iter().filter_map(old).collect()
}
