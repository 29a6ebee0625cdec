//! `CONFIGS`, for PostgreSQL.

use std::collections::BTreeSet;

use super::super::environment::{Environment, configs};
use super::Plan;

/// PostgreSQL's default of `max_wal_senders` and `max_replication_slots`. Every member needs some of both, the backups,
/// too, and the old images' 5 are too few from three members on.
const SENDERS_MIN: u32 = 10;

/// Libraries that belong to repmgr: without its package PostgreSQL does not start with them.
const REPMGR_LIBRARIES: [&str; 2] = ["repmgr", "repmgr_funcs"];

/// Sets what `CONFIGS` says, as far as it can be.
pub(super) fn apply(
    env: &Environment,
    plan: &mut Plan,
    known: Option<&BTreeSet<String>>,
) -> Result<(), String> {
    let from = Some("CONFIGS");
    let mut listen = "*".to_owned();
    let mut seen = BTreeSet::new();
    // The last of several counts, as in postgresql.conf.
    for (name, value) in configs(env)?.into_iter().rev() {
        if !seen.insert(name.clone()) {
            continue;
        }
        let (name, value) = renamed(name, value, &mut plan.notes);
        let Some(value) = enough(&name, value, &mut plan.notes) else {
            continue;
        };
        if name == "listen_addresses" {
            listen = value;
        } else if let Some(why) = craton_pg::parameters::refused(&name) {
            plan.notes
                .push(format!("CONFIGS: {name} is left out: {why}"));
        } else if known.is_some_and(|k| !name.contains('.') && !k.contains(&name)) {
            plan.notes.push(format!(
                "CONFIGS: {name} is left out: this PostgreSQL has no such parameter"
            ));
        } else {
            plan.set(&format!("postgresql.\"{name}\""), value, from);
        }
    }
    let chosen = seen.contains("listen_addresses");
    plan.set("listen_addresses", listen, from.filter(|_| chosen));
    Ok(())
}

/// A value that the cluster can live with; none where nothing is left of it.
fn enough(name: &str, value: String, notes: &mut Vec<String>) -> Option<String> {
    match name {
        "max_wal_senders" | "max_replication_slots"
            if value
                .parse::<i64>()
                .is_ok_and(|n| n < i64::from(SENDERS_MIN)) =>
        {
            notes.push(format!(
                "CONFIGS: {name} = {value} is {name} = {SENDERS_MIN} here: each member needs one and backups need some, and less can keep standbys from following"
            ));
            Some(SENDERS_MIN.to_string())
        }
        "shared_preload_libraries" => without_repmgr(value, notes),
        _ => Some(value),
    }
}

/// The list without repmgr's libraries, in whatever way they are written; none where they were all.
fn without_repmgr(value: String, notes: &mut Vec<String>) -> Option<String> {
    let is_repmgrs = |item: &str| {
        let file = item.trim_matches('"').rsplit('/').next();
        let library = file.map(|f| f.strip_suffix(".so").unwrap_or(f).to_ascii_lowercase());
        library.is_some_and(|l| REPMGR_LIBRARIES.contains(&l.as_str()))
    };
    let items: Vec<&str> = value.split(',').map(str::trim).collect();
    let (gone, kept): (Vec<&str>, Vec<&str>) = items.into_iter().partition(|i| is_repmgrs(i));
    if gone.is_empty() {
        return Some(value);
    }
    notes.push(format!(
        "CONFIGS: {} is left out of shared_preload_libraries: it is not in this image, the agent does its work",
        gone.join(", ")
    ));
    let kept: Vec<&str> = kept.into_iter().filter(|i| !i.is_empty()).collect();
    (!kept.is_empty()).then(|| kept.join(","))
}

/// Parameters of older releases under their present names.
fn renamed(name: String, value: String, notes: &mut Vec<String>) -> (String, String) {
    let (new, new_value) = match (name.as_str(), value.as_str()) {
        ("wal_keep_segments", segments) => match segments.parse::<u64>() {
            Ok(n) => ("wal_keep_size", format!("{}MB", n.saturating_mul(16))),
            Err(_) => return (name, value),
        },
        ("wal_level", "hot_standby" | "archive") => ("wal_level", "replica".to_owned()),
        _ => return (name, value),
    };
    notes.push(format!(
        "CONFIGS: {name} = {value} is {new} = {new_value} now"
    ));
    (new.to_owned(), new_value)
}

#[cfg(test)]
mod tests {
    use super::super::super::environment::{Kind, tests::env};
    use super::*;

    /// What becomes of `CONFIGS`: `name=value` each, and the notes.
    fn planned(configs: &str) -> (Vec<String>, Vec<String>) {
        let variables = [("CONFIGS", configs), ("CONFIGS_DELIMITER_SYMBOL", ";")];
        let mut plan = Plan::new("node");
        apply(&env(Kind::Node, &variables), &mut plan, None).unwrap();
        let settings = plan.settings.iter().filter(|s| s.key.contains('.'));
        let text = |s: &super::super::Setting| {
            let name = s.key.trim_start_matches("postgresql.").trim_matches('"');
            format!("{name}={}", s.value.as_str().unwrap_or_default())
        };
        (settings.map(text).collect(), plan.notes)
    }

    #[test]
    fn too_few_senders_and_slots_are_raised_to_the_default() {
        let (set, notes) = planned("max_replication_slots:5;max_wal_senders:5");
        assert_eq!(set, ["max_wal_senders=10", "max_replication_slots=10"]);
        assert_eq!(notes.len(), 2, "{notes:?}");
        assert!(notes[0].contains("max_wal_senders = 5"), "{notes:?}");
        let (set, notes) = planned("max_replication_slots:55;max_wal_senders:10");
        assert_eq!(set, ["max_wal_senders=10", "max_replication_slots=55"]);
        assert_eq!(notes, [""; 0]);
        // What is no number PostgreSQL refuses with its own words.
        assert_eq!(planned("max_wal_senders:many").0, ["max_wal_senders=many"]);
    }

    #[test]
    fn repmgrs_libraries_are_taken_out() {
        for (given, left) in [
            ("repmgr", &[][..]),
            ("repmgr_funcs, \"repmgr\"", &[]),
            (
                "repmgr,pg_stat_statements",
                &["shared_preload_libraries=pg_stat_statements"],
            ),
            (
                "'pg_stat_statements, $libdir/repmgr.so, auto_explain'",
                &["shared_preload_libraries=pg_stat_statements,auto_explain"],
            ),
        ] {
            let (set, notes) = planned(&format!("shared_preload_libraries:{given}"));
            assert_eq!(set, left, "{given}");
            assert!(notes.iter().any(|n| n.contains("left out of")), "{given}");
        }
        let (set, notes) = planned("shared_preload_libraries:pg_repmgr_not, b");
        assert_eq!(set, ["shared_preload_libraries=pg_repmgr_not, b"]);
        assert_eq!(notes, [""; 0]);
    }
}
