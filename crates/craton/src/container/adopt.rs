//! A volume of the official image, of the old node image, or of a server of one's own: its data directory stood at the
//! volume's top, Craton's stands one below. It is moved, within the file system, and nothing is copied.

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

/// Moves a data directory at the top of `volume` to where Craton has it, if there is one. What an earlier try has not
/// finished is finished.
pub fn take_over(volume: &Path, major: &str) -> anyhow::Result<()> {
    let marker = volume.join("adopting");
    let version = volume.join("PG_VERSION");
    if !marker.exists() {
        let Ok(found) = std::fs::read_to_string(&version) else {
            return Ok(());
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
        refuse_running(volume)?;
        tracing::info!(
            "the volume holds a data directory of PostgreSQL {found}: it becomes this member's"
        );
        std::fs::write(&marker, "")?;
    }
    let data = volume.join("data");
    std::fs::create_dir_all(&data).with_context(|| format!("cannot make {}", data.display()))?;
    std::os::unix::fs::chown(&data, None, None).ok();
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

/// A postmaster of another container may still have it: its pid means nothing here, so the lock file's age decides.
fn refuse_running(volume: &Path) -> anyhow::Result<()> {
    let Ok(meta) = std::fs::metadata(volume.join("postmaster.pid")) else {
        return Ok(());
    };
    // The postmaster looks at the file and rewrites its status line while it runs; a stopped one removes it.
    let touched = meta.modified().ok().and_then(|t| t.elapsed().ok());
    if touched.is_some_and(|t| t.as_secs() < 5) {
        let what = "the volume's postmaster.pid was written just now: another container may be running on it";
        return Err(Problem::machine(what, "stop that one first").into());
    }
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
        take_over(dir.path(), "17").unwrap();
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
        take_over(dir.path(), "17").unwrap();
    }

    #[test]
    fn another_version_is_refused_and_left_alone() {
        let dir = volume("10");
        let error = take_over(dir.path(), "17").unwrap_err().to_string();
        assert!(
            error.contains("PostgreSQL 10") && error.contains("17"),
            "{error}"
        );
        assert!(dir.path().join("base/1").exists());
        assert!(!dir.path().join("data").exists());
    }
}
