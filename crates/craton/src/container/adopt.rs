//! A volume of the official image, of the old node image, or of a server of one's own: its data directory stood at the
//! volume's top, Craton's stands one below. It is moved, within the file system, and nothing is copied. Whether a server
//! of another container still runs on it cannot be seen from here.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use anyhow::Context as _;

use crate::exit::Problem;

/// What is Craton's own at the top of a volume.
const OURS: [&str; 12] = [
    "data",
    "run",
    "conf",
    "coordinator",
    "craton-member",
    "adopting",
    "pgpass",
    "pg.log",
    "lost+found",
    "divergence",
    "state.json",
    "first-start",
];

/// Files of the old node image's scripts, which mean nothing any more.
const LEFTOVERS: [&str; 4] = [
    "master.lock",
    "standby.lock",
    "recovery.conf",
    "postmaster.pid",
];

/// Looks at a data directory at the top of `volume` before anything is done there, and changes nothing. True if it is
/// to be moved to where Craton has it: only a node that may found the cluster brings its data.
pub fn look(volume: &Path, major: &str, founds: bool) -> anyhow::Result<bool> {
    if volume.join("adopting").exists() {
        return Ok(true);
    }
    let Ok(found) = std::fs::read_to_string(volume.join("PG_VERSION")) else {
        return Ok(false);
    };
    let found = found.trim();
    if found != major {
        let what = format!(
            "the volume holds a database of PostgreSQL {found}, this image runs {major}; nothing was changed"
        );
        let hint = format!(
            "run pg_upgrade, or dump it with its own version ({found}) and restore the dump into a new cluster; an image for another version is built with --build-arg PG_MAJOR={found}, where Debian has it"
        );
        return Err(Problem::machine(what, hint).into());
    }
    let was_standby = ["standby.signal", "recovery.conf"]
        .iter()
        .any(|name| volume.join(name).exists());
    if !founds && was_standby {
        tracing::warn!(
            "the volume holds a standby's data directory of before, which is not used: this node clones into \"data\" beside it. Once the cluster is whole, remove the old one from the top of the volume: everything but data, run, conf, coordinator, craton-member, agent.json and reserve"
        );
        return Ok(false);
    }
    if !founds {
        let what = "the volume holds a primary's data directory, and this node is to follow another (REPLICATION_PRIMARY_HOST); nothing was changed";
        let hint = "if it is the database that the cluster should have, unset REPLICATION_PRIMARY_HOST on this node, set it on the others, and start this one first; else move the files out of the volume";
        return Err(Problem::machine(what, hint).into());
    }
    let programs = format!("/usr/lib/postgresql/{major}/bin");
    let binaries = craton_pg::Binaries::find(Some(Path::new(&programs)))?;
    match craton_pg::adopt::inspect(volume, &binaries)? {
        Ok(_) => Ok(true),
        Err(why) => {
            let hint =
                "nothing was changed; docs/guide/adoption.md says which volume founds the cluster";
            Err(Problem::machine(why, hint).into())
        }
    }
}

/// Moves a data directory at the top of `volume` to where Craton has it. What an earlier try has not finished is
/// finished.
pub fn take_over(volume: &Path) -> anyhow::Result<()> {
    let marker = volume.join("adopting");
    let version = volume.join("PG_VERSION");
    if !marker.exists() {
        tracing::info!("the volume holds a data directory: it becomes this member's");
        std::fs::write(&marker, "")?;
    }
    let data = volume.join("data");
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&data)
        .with_context(|| format!("cannot make {}", data.display()))?;
    let failed = || format!("cannot move the data directory in {}", volume.display());
    for entry in std::fs::read_dir(volume).with_context(failed)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if OURS.contains(&name.as_ref()) || name == "PG_VERSION" {
            continue;
        }
        if LEFTOVERS.contains(&name.as_ref()) {
            std::fs::remove_file(entry.path()).with_context(failed)?;
            continue;
        }
        std::fs::rename(entry.path(), data.join(entry.file_name())).with_context(failed)?;
    }
    // Last: with it the directory is whole.
    if version.exists() {
        std::fs::rename(&version, data.join("PG_VERSION")).with_context(failed)?;
    }
    std::fs::File::open(&data)?.sync_all()?;
    std::fs::remove_file(&marker).with_context(failed)?;
    std::fs::File::open(volume)?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(version: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let at = |n: &str| dir.path().join(n);
        std::fs::write(at("PG_VERSION"), format!("{version}\n")).unwrap();
        std::fs::write(at("postgresql.conf"), "").unwrap();
        std::fs::write(at("master.lock"), "").unwrap();
        std::fs::create_dir_all(at("base/1")).unwrap();
        std::fs::write(at("craton-member"), "a\n").unwrap();
        dir
    }

    #[test]
    fn a_data_directory_at_the_top_moves_down_also_in_two_tries() {
        let dir = volume("17");
        let at = |n: &str| dir.path().join(n);
        // As if the first try had been cut off.
        std::fs::create_dir(at("data")).unwrap();
        std::fs::write(at("adopting"), "").unwrap();
        std::fs::rename(at("postgresql.conf"), at("data/postgresql.conf")).unwrap();
        assert!(look(dir.path(), "17", true).unwrap());
        take_over(dir.path()).unwrap();
        for there in [
            "data/PG_VERSION",
            "data/postgresql.conf",
            "data/base/1",
            "craton-member",
        ] {
            assert!(at(there).exists(), "{there}");
        }
        for gone in [
            "PG_VERSION",
            "base",
            "master.lock",
            "adopting",
            "data/master.lock",
        ] {
            assert!(!at(gone).exists(), "{gone}");
        }
        // Nothing more to do.
        assert!(!look(dir.path(), "17", true).unwrap());
    }

    #[test]
    fn another_version_is_refused_and_left_alone() {
        let dir = volume("10");
        let error = look(dir.path(), "17", true).unwrap_err().to_string();
        assert!(
            error.contains("PostgreSQL 10") && error.contains("17"),
            "{error}"
        );
        assert!(dir.path().join("base/1").exists());
        assert!(!dir.path().join("data").exists());
    }

    #[test]
    fn a_node_that_follows_brings_nothing() {
        let dir = volume("17");
        let error = look(dir.path(), "17", false).unwrap_err().to_string();
        assert!(error.contains("a primary's data directory"), "{error}");
        std::fs::write(dir.path().join("standby.signal"), "").unwrap();
        assert!(!look(dir.path(), "17", false).unwrap());
        assert!(dir.path().join("base/1").exists());
    }
}
