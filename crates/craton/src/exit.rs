//! Exit codes, and the error that carries one.

use std::fmt;
use std::path::Path;

use craton_agent::AgentError;

use crate::container::entry::Facts;

/// Done.
pub const OK: u8 = 0;
/// Something went wrong that has no code of its own.
pub const FAILURE: u8 = 1;
/// The command line or a settings file cannot be understood.
pub const USAGE: u8 = 2;
/// No cluster answers: not started, or not reachable from here.
pub const UNREACHABLE: u8 = 3;
/// The cluster understood and refused.
pub const REFUSED: u8 = 4;
/// A drill found an acknowledged row lost although the durability promises otherwise.
pub const ROWS_LOST: u8 = 5;
/// A drill's cluster did not heal in time, or what was to be done did not finish in time.
pub const NOT_IN_TIME: u8 = 6;
/// The machine lacks something: a package, a free port, disk space, permissions.
pub const MACHINE: u8 = 7;
/// The same daemon runs already.
pub const RUNNING_ALREADY: u8 = 8;

/// `craton doctor` found something that is less safe than it could be.
pub const DOCTOR_WARNING: u8 = 9;
/// `craton doctor` found something that stops clients, or will with the next failure.
pub const DOCTOR_CRITICAL: u8 = 10;
/// A member's agent ended because the others have removed the member: another start would change nothing.
pub const REMOVED: u8 = 11;

/// Every code with its meaning, for the reference page.
pub const MEANINGS: [(u8, &str); 12] = [
    (OK, "done"),
    (FAILURE, "something went wrong that has no code of its own"),
    (
        USAGE,
        "the command line or a settings file cannot be understood",
    ),
    (
        UNREACHABLE,
        "no cluster answers: not started, or not reachable from here",
    ),
    (REFUSED, "the cluster understood and refused"),
    (
        ROWS_LOST,
        "a drill found an acknowledged row lost although the durability promises otherwise",
    ),
    (
        NOT_IN_TIME,
        "it did not finish, or the cluster did not heal, within its time",
    ),
    (
        MACHINE,
        "the machine lacks something: a package, a free port, disk space, a permission",
    ),
    (RUNNING_ALREADY, "the same daemon runs already"),
    (
        DOCTOR_WARNING,
        "craton doctor found something that is less safe than it could be",
    ),
    (
        DOCTOR_CRITICAL,
        "craton doctor found something that stops clients, or will with the next failure",
    ),
    (
        REMOVED,
        "craton node: the member was removed from the cluster, and another start would change nothing",
    ),
];

/// An error for the person at the terminal: what, what to do, and the exit code.
#[derive(Debug)]
pub struct Problem {
    /// The exit code.
    pub code: u8,
    /// What is wrong and where.
    pub what: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Problem {
    /// A problem with a hint.
    pub fn new(code: u8, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            code,
            what: what.into(),
            hint: Some(hint.into()),
        }
    }

    /// Something about this machine that stops us.
    pub fn machine(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(MACHINE, what, hint)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Problem {}

/// The exit code of an error: that of the [`Problem`] in it, or of the client's error.
pub fn code_of(error: &anyhow::Error) -> u8 {
    use craton_console::ClientError;
    if let Some(problem) = error.downcast_ref::<Problem>() {
        return problem.code;
    }
    if let Some(AgentError::Removed(_)) = error.downcast_ref() {
        return REMOVED;
    }
    match error.downcast_ref::<ClientError>() {
        Some(
            ClientError::Unreachable { .. }
            | ClientError::TimedOut { .. }
            | ClientError::Broken { .. },
        ) => UNREACHABLE,
        Some(ClientError::Refused { .. } | ClientError::Untrusted { .. }) => REFUSED,
        Some(ClientError::Malformed { .. }) | None => FAILURE,
    }
}

/// What to do about an error, where it says.
pub fn hint_of(error: &anyhow::Error) -> Option<String> {
    use craton_console::ClientError;
    if let Some(problem) = error.downcast_ref::<Problem>() {
        return problem.hint.clone();
    }
    if let Some(AgentError::Removed(dir)) = error.downcast_ref() {
        let in_container = Facts::load().is_ok_and(|facts| facts.is_some());
        return Some(how_to_return(dir, in_container));
    }
    match error.downcast_ref::<ClientError>()? {
        error @ (ClientError::Refused { .. } | ClientError::Untrusted { .. }) => {
            error.hint().map(ToOwned::to_owned)
        }
        ClientError::Unreachable { .. } => {
            Some("is the cluster up? `craton up` starts a local one".to_owned())
        }
        _ => None,
    }
}

fn how_to_return(dir: &Path, in_container: bool) -> String {
    if in_container {
        return SET_ASIDE.to_owned();
    }
    format!(
        "to bring the host back in, empty {} and set node.join",
        dir.display()
    )
}

/// How a removed node's container comes back.
pub const SET_ASIDE: &str = "to bring it back: `craton container set-aside` in this container, then restart it; the node joins anew and is cloned";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_member_has_a_code_and_a_way_back() {
        let error = anyhow::Error::from(AgentError::Removed("/var/lib/craton/d".into()));
        assert_eq!(code_of(&error), REMOVED);
        assert!(error.to_string().contains("removed from the cluster"));
        let hint = hint_of(&error).unwrap();
        assert!(hint.contains("empty /var/lib/craton/d"), "{hint}");
        let hint = how_to_return(Path::new("/x"), true);
        assert!(hint.contains("craton container set-aside"), "{hint}");
    }

    #[test]
    fn every_code_has_one_meaning() {
        for (at, (code, _)) in MEANINGS.iter().enumerate() {
            assert_eq!(usize::from(*code), at);
        }
    }
}
