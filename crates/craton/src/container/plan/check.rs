//! What can be wrong with values of the environment, found before anything is started. What is found only when it is
//! needed is found too late: a limit of a stop at the stop, a schedule in the night.

use super::super::environment::{Environment, Kind, configs};
use super::super::schedule::Schedule;
use super::{Here, ID_MAX, backup, proxy};

/// A variable that is a number.
struct Number {
    name: &'static str,
    least: i64,
    most: i64,
    /// What it counts, for the message.
    of: &'static str,
}

const fn number(name: &'static str, of: &'static str) -> Number {
    Number {
        name,
        least: 0,
        most: 4_294_967_295,
        of,
    }
}

/// Every variable that is read as a number.
const NUMBERS: &[Number] = &[
    Number {
        name: "NODE_ID",
        least: 0,
        // repmgr.nodes has them as integers.
        most: ID_MAX,
        of: "",
    },
    Number {
        name: "NODE_PRIORITY",
        least: -2_147_483_648,
        most: 2_147_483_647,
        of: "",
    },
    number("RECONNECT_ATTEMPTS", ""),
    number("RECONNECT_INTERVAL", "of seconds, without a unit,"),
    number("MASTER_RESPONSE_TIMEOUT", "of seconds, without a unit,"),
    number("STOPPING_TIMEOUT", "of seconds, without a unit,"),
    number("REQUIRE_MIN_BACKENDS", "of nodes"),
    number("WAIT_BACKEND_TIMEOUT", "of seconds, without a unit,"),
    number("BACKUP_RETENTION_DAYS", "of days, without a unit,"),
];

/// Says what is wrong: the variable, its value, what is expected.
pub fn check(kind: Kind, env: &Environment) -> Result<(), String> {
    for Number {
        name,
        least,
        most,
        of,
    } in NUMBERS
    {
        let Some(text) = env.get(name) else { continue };
        let number = text.trim().parse::<i64>().ok();
        let fits = number.filter(|n| (*least..=*most).contains(n));
        if fits.is_none() {
            let of = format!("{of} ").trim_start().to_owned();
            return Err(format!(
                "{name}={text}: a whole number {of}from {least} to {most} is expected"
            ));
        }
    }
    let here = Here::default();
    match kind {
        Kind::Node => configs(env).map(|_| ()),
        Kind::Proxy => proxy(env, &here).map(|_| ()),
        Kind::Backup => {
            if let Some(text) = env.get("BACKUP_SCHEDULE") {
                Schedule::parse(text).map_err(|why| {
                    format!(
                        "BACKUP_SCHEDULE={text}: {why}; five fields are expected, as in \"30 2 * * *\" for half past two each day (UTC)"
                    )
                })?;
            }
            backup(env, &here, &[]).map(|_| ())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::environment::{VARIABLES, tests::env};
    use super::*;

    #[test]
    fn a_wrong_value_is_said_with_its_variable_and_what_is_expected() {
        for (kind, name, wrong) in [
            (Kind::Node, "STOPPING_TIMEOUT", "5s"),
            (Kind::Node, "STOPPING_TIMEOUT", "-1"),
            (Kind::Node, "NODE_ID", "one"),
            (Kind::Node, "NODE_ID", "2147483648"),
            (Kind::Node, "NODE_PRIORITY", "high"),
            (Kind::Node, "RECONNECT_ATTEMPTS", "3.5"),
            (Kind::Node, "RECONNECT_INTERVAL", "5s"),
            (Kind::Node, "MASTER_RESPONSE_TIMEOUT", "20s"),
            (Kind::Proxy, "REQUIRE_MIN_BACKENDS", "two"),
            (Kind::Proxy, "WAIT_BACKEND_TIMEOUT", "2m"),
            (Kind::Backup, "BACKUP_RETENTION_DAYS", "4294967296"),
            (Kind::Backup, "BACKUP_SCHEDULE", "0 25 * * *"),
            (Kind::Backup, "BACKUP_SCHEDULE", "daily"),
        ] {
            let set = [(name, wrong), ("REPLICATION_HOST", "pgmaster")];
            let error = check(kind, &env(kind, &set)).unwrap_err();
            assert!(error.starts_with(&format!("{name}={wrong}: ")), "{error}");
            assert!(error.contains("expected"), "{error}");
        }
        let error = check(Kind::Node, &env(Kind::Node, &[("STOPPING_TIMEOUT", "5s")]));
        assert_eq!(
            error.unwrap_err(),
            "STOPPING_TIMEOUT=5s: a whole number of seconds, without a unit, from 0 to 4294967295 is expected"
        );
        let error = check(Kind::Node, &env(Kind::Node, &[("NODE_ID", "x")]));
        let expected = "NODE_ID=x: a whole number from 0 to 2147483647 is expected";
        assert_eq!(error.unwrap_err(), expected);
    }

    #[test]
    fn what_a_plan_refuses_is_refused_before_anything_starts() {
        for (kind, name, wrong) in [
            (Kind::Node, "CONFIGS", "work_mem=8MB"),
            (Kind::Proxy, "CONFIGS", "num_init_children:many"),
            (Kind::Proxy, "BACKENDS", "pgmaster"),
            (Kind::Backup, "CRATON_WITNESS", "W_"),
        ] {
            let set = [(name, wrong), ("REPLICATION_HOST", "pgmaster")];
            let error = check(kind, &env(kind, &set)).unwrap_err();
            assert!(error.contains(name), "{error}");
        }
        let none = check(Kind::Backup, &env(Kind::Backup, &[])).unwrap_err();
        assert!(none.contains("REPLICATION_HOST is not set"), "{none}");
    }

    #[test]
    fn right_values_pass() {
        for (kind, set) in [
            (Kind::Node, vec![]),
            (Kind::Proxy, vec![]),
            (
                Kind::Node,
                vec![
                    ("NODE_PRIORITY", "-1"),
                    ("STOPPING_TIMEOUT", " 60 "),
                    ("NODE_ID", "1"),
                ],
            ),
            (
                Kind::Backup,
                vec![
                    ("REPLICATION_HOST", "a"),
                    ("BACKUP_SCHEDULE", "*/30 */5 * * *"),
                    ("BACKUP_RETENTION_DAYS", "0"),
                ],
            ),
        ] {
            check(kind, &env(kind, &set)).unwrap();
        }
    }

    #[test]
    fn every_number_is_a_variable() {
        for number in NUMBERS {
            assert!(
                VARIABLES.iter().any(|v| v.name == number.name),
                "{}",
                number.name
            );
        }
    }
}
