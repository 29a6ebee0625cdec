//! What a data directory holds, in a word.

use crate::control_data::ControlData;

/// What a data directory holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DataDir {
    /// Nothing.
    Empty,
    /// Nothing yet; an unfinished clone or initdb of ours lies beside it and may be removed.
    HalfClone,
    /// A rewind of ours was cut off while it wrote: only a clone helps.
    HalfRewind,
    /// Something that is not ours to touch, and why.
    Foreign(String),
    /// A cluster.
    Cluster {
        /// PostgreSQL's major version.
        version: u32,
        /// Its control file.
        control: Box<ControlData>,
    },
}

impl std::fmt::Display for DataDir {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Empty => f.write_str("empty"),
            Self::HalfClone => f.write_str("an unfinished clone"),
            Self::HalfRewind => f.write_str("an unfinished rewind"),
            Self::Foreign(reason) => f.write_str(reason),
            Self::Cluster { version, control } => {
                write!(
                    f,
                    "PostgreSQL {version} cluster {}",
                    control.system_identifier
                )
            }
        }
    }
}
