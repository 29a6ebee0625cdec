//! Passwords and keys of a local cluster: generated, written to files that only the owner reads, and
//! never shown.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::Context as _;

use crate::certificates;
use crate::layout::{HOST, Layout};

/// Random bytes in a generated secret.
const SECRET_LEN_BYTES: usize = 32;

/// Characters of base64url: 64, so that six random bits make one.
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// File names under `secrets/`.
pub mod names {
    /// Password of the superuser `postgres`.
    pub const SUPERUSER: &str = "superuser";
    /// Password of `craton_replication`.
    pub const REPLICATION: &str = "replication";
    /// Password of `craton_proxy`.
    pub const PROXY: &str = "proxy";
    /// Password of `craton_rewind`.
    pub const REWIND: &str = "rewind";
    /// Password of `map`, the owner of the sample database.
    pub const MAP: &str = "map";
    /// What the coordinators of the members show each other.
    pub const PEERS: &str = "peers";
    /// What opens the control API.
    pub const API_TOKEN: &str = "api-token";
    /// libpq's password file for `craton psql`.
    pub const PGPASS: &str = "pgpass";
}

/// The generated secrets of every cluster.
const GENERATED: [&str; 6] = [
    names::SUPERUSER,
    names::REPLICATION,
    names::PROXY,
    names::REWIND,
    names::PEERS,
    names::API_TOKEN,
];

/// Makes the directory and whatever is missing in it. Existing secrets stay.
pub fn ensure(layout: &Layout) -> anyhow::Result<()> {
    ensure_common(&layout.secrets())?;
    let map = layout.secret(names::MAP);
    if !map.exists() {
        write_private(&map, &format!("{}\n", generate()))?;
    }
    let members = layout
        .cluster
        .members
        .iter()
        .map(|m| layout.postgres_port(m));
    let ports: Vec<u16> = [layout.proxy_port(), layout.proxy_read_port()]
        .into_iter()
        .chain(members)
        .collect();
    let mut pgpass = Vec::new();
    for (user, secret) in [("postgres", names::SUPERUSER), ("map", names::MAP)] {
        let password = read(&layout.secret(secret))?;
        // Generated passwords have neither ':' nor '\\', so nothing has to be escaped.
        pgpass.extend(
            ports
                .iter()
                .map(|port| format!("{HOST}:{port}:*:{user}:{password}\n")),
        );
    }
    let pgpass = pgpass.concat();
    write_private(&layout.secret(names::PGPASS), &pgpass)?;
    certificates::ensure_local(layout)
}

/// Makes the directory and the secrets that every cluster has, where they are missing.
pub fn ensure_common(dir: &Path) -> anyhow::Result<()> {
    if !dir.is_dir() {
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(dir)
            .with_context(|| format!("cannot create {}", dir.display()))?;
    }
    for name in GENERATED {
        let path = dir.join(name);
        if !path.exists() {
            craton_trust::files::write_secret(&path, &format!("{}\n", generate()))?;
        }
    }
    Ok(())
}

/// Reads a secret's one line.
pub fn read(path: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the secret {}", path.display()))?;
    let secret = text.trim();
    anyhow::ensure!(!secret.is_empty(), "the secret {} is empty", path.display());
    Ok(secret.to_owned())
}

/// 256 random bits from the system, as 43 characters of base64url.
fn generate() -> String {
    let random: [u8; SECRET_LEN_BYTES] = rand::random();
    let mut text = String::with_capacity(SECRET_LEN_BYTES * 4 / 3 + 1);
    for group in random.chunks(3) {
        let mut bits = group
            .iter()
            .fold(0_u32, |bits, byte| (bits << 8) | u32::from(*byte));
        bits <<= 8 * (3 - group.len());
        for shift in [18, 12, 6, 0].into_iter().take(group.len() + 1) {
            let index = usize::try_from((bits >> shift) & 63).unwrap_or(0);
            text.push(ALPHABET.get(index).map_or('A', |c| char::from(*c)));
        }
    }
    text
}

/// Replaces a file by one that only its owner can read, durably: a crash leaves the old or the new one.
pub fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    // Two processes that write at once do not write into each other's file.
    let temporary = path.with_extension(format!("{}.new", std::process::id()));
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn secrets_are_long_random_and_private() {
        let (a, b) = (generate(), generate());
        assert_eq!(a.len(), 43);
        assert_ne!(a, b);
        assert!(a.bytes().all(|c| ALPHABET.contains(&c)));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.password");
        write_private(&path, "secret\n").unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(read(&path).unwrap(), "secret");
    }
}
