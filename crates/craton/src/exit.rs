//! Exit codes, and the error that carries one.

use std::fmt;

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

/// Every code with its meaning, for the reference page.
pub const MEANINGS: [(u8, &str); 11] = [
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
