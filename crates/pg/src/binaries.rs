//! Which PostgreSQL is installed.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{PgError, Result};

/// Where Debian and Ubuntu keep servers, one directory per major version.
const DEBIAN_ROOT: &str = "/usr/lib/postgresql";
/// The oldest major version that this crate drives (`primary_conninfo` is reloadable since 13).
pub const MAJOR_MIN: u32 = 13;

/// The programs that this crate runs beside the server.
const TOOLS: [&str; 5] = [
    "initdb",
    "pg_controldata",
    "pg_basebackup",
    "pg_rewind",
    "pg_waldump",
];

/// A server's version.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct PgVersion {
    /// 13, 14, …
    pub major: u32,
    /// The minor release; 0 for betas and development versions.
    pub minor: u32,
}

impl fmt::Display for PgVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl PgVersion {
    /// Reads what `postgres --version` prints: `postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)`.
    fn parse(text: &str) -> Option<Self> {
        let number = text
            .split("(PostgreSQL)")
            .nth(1)?
            .split_whitespace()
            .next()?;
        let digits = |s: &str| {
            s.chars()
                .take_while(char::is_ascii_digit)
                .collect::<String>()
        };
        let mut parts = number.split('.');
        let major = digits(parts.next()?).parse().ok()?;
        let minor = parts
            .next()
            .and_then(|m| digits(m).parse().ok())
            .unwrap_or(0);
        Some(Self { major, minor })
    }
}

/// The directory of one server's programs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Binaries {
    dir: PathBuf,
    version: PgVersion,
}

impl Binaries {
    /// Takes the given directory, or the newest server of `/usr/lib/postgresql/*/bin` and `PATH`.
    pub fn find(explicit: Option<&Path>) -> Result<Self> {
        let candidates = explicit.map_or_else(installed, |dir| vec![dir.to_owned()]);
        let newest = candidates
            .into_iter()
            .filter_map(Self::at)
            .max_by_key(|b| b.version);
        match newest {
            Some(found) if found.version.major < MAJOR_MIN => Err(PgError::TooOld {
                found: found.version.to_string(),
                dir: found.dir,
            }),
            Some(found) => Ok(found),
            None => Err(PgError::NoBinaries {
                searched: explicit.map_or_else(
                    || format!("{DEBIAN_ROOT}/*/bin and PATH"),
                    |d| d.display().to_string(),
                ),
            }),
        }
    }

    /// The server in this directory, if there is one that runs.
    fn at(dir: PathBuf) -> Option<Self> {
        let output = Command::new(dir.join("postgres"))
            .arg("--version")
            .env("LC_ALL", "C")
            .output()
            .ok()?;
        let version = PgVersion::parse(&String::from_utf8_lossy(&output.stdout))?;
        Some(Self { dir, version })
    }

    /// The server's version.
    pub fn version(&self) -> PgVersion {
        self.version
    }

    /// The directory of the programs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The path of one program, as `pg_basebackup`.
    pub fn tool(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

/// The directories that hold a `postgres`.
fn installed() -> Vec<PathBuf> {
    let debian = std::fs::read_dir(DEBIAN_ROOT)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"));
    let path = std::env::var_os("PATH");
    let on_path = std::env::split_paths(path.as_deref().unwrap_or(OsStr::new("")));
    // A link to the server alone (/usr/local/bin/postgres) leads to where its other programs are.
    debian
        .chain(on_path)
        .filter_map(|dir| {
            Some(
                dir.join("postgres")
                    .canonicalize()
                    .ok()?
                    .parent()?
                    .to_owned(),
            )
        })
        .filter(|dir| TOOLS.iter().all(|tool| dir.join(tool).is_file()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let parse = |s| PgVersion::parse(s).map(|v| (v.major, v.minor));
        assert_eq!(
            parse("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)"),
            Some((15, 14))
        );
        assert_eq!(parse("postgres (PostgreSQL) 18beta1"), Some((18, 0)));
        assert_eq!(parse("postgres (PostgreSQL) 12.3\n"), Some((12, 3)));
        assert_eq!(parse("bash: postgres: not found"), None);
    }

    #[test]
    fn a_missing_server_names_the_package() {
        let dir = tempfile::tempdir().unwrap();
        let error = Binaries::find(Some(dir.path())).unwrap_err().to_string();
        assert!(error.contains("apt-get install postgresql"), "{error}");
    }
}
