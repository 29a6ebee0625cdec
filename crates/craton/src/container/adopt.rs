//! A volume of the official image, of the old node image, or of a server of one's own. Its data directory stands at the
//! volume's top, or below in a directory of its own (`PGDATA=/var/lib/postgresql/data/pgdata`, usual where the top of a
//! volume has a `lost+found`); Craton's stands in `data`. It is moved, within the file system, and nothing is copied.
//! Whether a server of another container still runs on it cannot be seen from here.
//!
//! No empty database is made beside anything that is not known: whoever looks for his data must not find none.

use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::exit::{Problem, USAGE};

/// What is Craton's own at the top of a volume, and what file systems keep there.
const OURS: [&str; 27] = [
    "data",
    "data.init",
    "data.clone",
    "data.discarded",
    "data.former",
    "data.former.old",
    "run",
    "conf",
    "coordinator",
    "craton-member",
    "craton-upstream",
    "adopting",
    "pgpass",
    "follow.pgpass",
    "pg.log",
    "pg.log.1",
    "divergence",
    "state.json",
    "agent.json",
    "reserve",
    "lease",
    "first-start",
    "rewind.incomplete",
    "restored",
    "lost+found",
    ".snapshot",
    ".zfs",
];

/// How other names of Craton's own begin: what was set aside, what is being restored, the fence's board.
const OURS_BEGIN: [&str; 4] = ["before-", "restored.", "fence.", "craton-"];
/// How files end that were being written when their writer ended.
const UNFINISHED: [&str; 2] = [".new", ".tmp"];

/// Files of the old node image's scripts, which mean nothing any more.
const LEFTOVERS: [&str; 4] = [
    "master.lock",
    "standby.lock",
    "recovery.conf",
    "postmaster.pid",
];

/// So many names are listed in a message.
const NAMES_MAX: usize = 8;

/// A database in a volume that is to become this member's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Found {
    /// Its files stand at the volume's top.
    AtTop,
    /// They stand in this directory of the volume.
    Below(PathBuf),
}

impl Found {
    fn path<'a>(&'a self, volume: &'a Path) -> &'a Path {
        match self {
            Self::AtTop => volume,
            Self::Below(path) => path,
        }
    }

    /// What is to be removed when nobody needs it: never what is this member's own beside it.
    fn files(&self) -> &'static str {
        match self {
            Self::AtTop => {
                "its own files and no others: PG_VERSION, base, global, pg_*, current_logfiles, postgresql*.conf, postmaster.* and *.signal at the volume's top"
            }
            Self::Below(_) => "that directory",
        }
    }
}

fn is_ours(name: &str) -> bool {
    let unfinished = || {
        let whole = UNFINISHED.iter().find_map(|end| name.strip_suffix(end))?;
        let ours = |own: &&str| {
            whole
                .strip_prefix(own)
                .is_some_and(|r| r.is_empty() || r.starts_with('.'))
        };
        OURS.iter().find(|own| ours(own))
    };
    OURS.contains(&name)
        || OURS_BEGIN.iter().any(|begin| name.starts_with(begin))
        || unfinished().is_some()
}

/// Each database in a data directory has a `PG_VERSION`, too.
fn is_database(dir: &Path) -> bool {
    dir.join("PG_VERSION").is_file() && dir.join("global").is_dir()
}

/// Databases in this directory, down to two directories below (`17/docker`). What cannot be looked into holds none.
fn databases_below(dir: &Path, levels: u8, skip: &dyn Fn(&str) -> bool, all: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if skip(&entry.file_name().to_string_lossy()) || !path.is_dir() {
            continue;
        }
        if is_database(&path) {
            all.push(path);
        } else if levels > 1 {
            databases_below(&path, levels.saturating_sub(1), &|_| false, all);
        }
    }
}

/// The databases of a volume that are not this member's own.
fn databases(volume: &Path, pgdata: Option<&Path>) -> Vec<Found> {
    let mut all = Vec::new();
    databases_below(volume, 2, &is_ours, &mut all);
    let data = volume.join("data");
    if !data.join("PG_VERSION").exists() {
        databases_below(&data, 1, &|_| false, &mut all);
    }
    if let Some(own) = pgdata.filter(|p| p.starts_with(volume) && **p != data && is_database(p))
        && !all.iter().any(|p| p == own)
    {
        all.push(own.to_owned());
    }
    all.sort();
    let top = volume.join("PG_VERSION").exists().then_some(Found::AtTop);
    let below = all.into_iter().map(Found::Below);
    top.into_iter().chain(below).collect()
}

/// Databases that this container sees and that stand in no volume of a node's.
fn elsewhere(volume: &Path, pgdata: Option<&Path>, beside: Option<&Path>) -> Option<PathBuf> {
    let mut all = Vec::new();
    all.extend(
        pgdata
            .filter(|p| !p.starts_with(volume) && is_database(p))
            .map(Path::to_owned),
    );
    if let Some(beside) = beside {
        let own = volume.file_name().map(|n| n.to_string_lossy().into_owned());
        databases_below(beside, 2, &|name| Some(name) == own.as_deref(), &mut all);
    }
    all.into_iter().next()
}

fn refuse(what: &str, hint: impl Into<String>) -> anyhow::Error {
    Problem::new(USAGE, format!("{what}; nothing was changed"), hint).into()
}

fn listed<T: std::fmt::Display>(all: &[T]) -> String {
    let mut names: Vec<String> = all
        .iter()
        .take(NAMES_MAX)
        .map(ToString::to_string)
        .collect();
    if all.len() > NAMES_MAX {
        names.push(format!("and {} more", all.len().saturating_sub(NAMES_MAX)));
    }
    names.join(", ")
}

/// Looks at what there is in `volume` before anything is done there, and changes nothing. The database is returned that
/// is to be moved to where Craton has it: only a node that may found the cluster brings its data. `pgdata` is where the
/// environment says that the data are, `beside` where other images have them.
pub fn look(
    volume: &Path,
    pgdata: Option<&Path>,
    beside: Option<&Path>,
    major: &str,
    founds: bool,
) -> anyhow::Result<Option<Found>> {
    if volume.join("adopting").exists() {
        return Ok(Some(Found::AtTop));
    }
    let all = databases(volume, pgdata);
    // A member that has its own data, or is given some.
    if ["coordinator", "restored"]
        .iter()
        .any(|n| volume.join(n).exists())
    {
        for found in &all {
            warn_of_unused(found, volume);
        }
        return Ok(None);
    }
    if !founds {
        return all
            .iter()
            .try_for_each(|f| look_at_follower(f, volume, major))
            .map(|()| None);
    }
    let own = volume.join("data");
    let has_own = own.join("PG_VERSION").exists();
    match all.as_slice() {
        [] if has_own => Ok(None),
        [] => {
            refuse_to_found_beside(volume, pgdata, beside)?;
            Ok(None)
        }
        [found] if !has_own => {
            look_at(found.path(volume), major)?;
            let is_free =
                std::fs::read_dir(&own).map_or(true, |mut entries| entries.next().is_none());
            if !is_free {
                let what = format!(
                    "the volume holds a database in {}, and {}, where it is to be moved, holds something else",
                    found.path(volume).display(),
                    own.display()
                );
                return Err(refuse(
                    &what,
                    format!(
                        "move what does not belong to the database out of {}, or the database itself to there",
                        own.display()
                    ),
                ));
            }
            Ok(Some(found.clone()))
        }
        several => {
            let mut paths: Vec<_> = several.iter().map(|f| f.path(volume)).collect();
            paths.extend(has_own.then_some(own.as_path()));
            let paths: Vec<_> = paths.iter().map(|p| p.display()).collect();
            let what = format!("the volume holds several databases: {}", listed(&paths));
            Err(refuse(
                &what,
                "which of them the cluster should have cannot be known here: leave that one in the volume, and move the others out of it",
            ))
        }
    }
}

fn warn_of_unused(found: &Found, volume: &Path) {
    tracing::warn!(
        "the volume holds a database in {}, which is not used: this member has its own in \"data\". If nobody needs it, remove {}",
        found.path(volume).display(),
        found.files()
    );
}

fn version(database: &Path) -> anyhow::Result<String> {
    let path = database.join("PG_VERSION");
    let text = std::fs::read_to_string(&path);
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.trim().to_owned())
}

fn refuse_other_version(database: &Path, major: &str) -> anyhow::Result<()> {
    let found = version(database)?;
    if found == major {
        return Ok(());
    }
    let what = format!(
        "the volume holds a database of PostgreSQL {found} in {}, this image runs {major}; nothing was changed",
        database.display()
    );
    let hint = format!(
        "run pg_upgrade, or dump it with its own version ({found}) and restore the dump into a new cluster; an image for another version is built with --build-arg PG_MAJOR={found}, where Debian has it"
    );
    Err(Problem::machine(what, hint).into())
}

/// On a node that is to follow another.
fn look_at_follower(found: &Found, volume: &Path, major: &str) -> anyhow::Result<()> {
    let database = found.path(volume);
    refuse_other_version(database, major)?;
    let was_standby = ["standby.signal", "recovery.conf"]
        .iter()
        .any(|name| database.join(name).exists());
    if was_standby {
        tracing::warn!(
            "the volume holds a standby's data directory of before in {}, which is not used: this node clones into \"data\". Once the cluster is whole, remove {}",
            database.display(),
            found.files()
        );
        return Ok(());
    }
    let what = format!(
        "the volume holds a primary's data directory in {}, and this node is to follow another (REPLICATION_PRIMARY_HOST); nothing was changed",
        database.display()
    );
    let hint = "if it is the database that the cluster should have, unset REPLICATION_PRIMARY_HOST on this node, set it on the others, and start this one first; else move the files out of the volume";
    Err(Problem::machine(what, hint).into())
}

/// On a node that may found the cluster with it.
fn look_at(database: &Path, major: &str) -> anyhow::Result<()> {
    refuse_other_version(database, major)?;
    let programs = format!("/usr/lib/postgresql/{major}/bin");
    let binaries = craton_pg::Binaries::find(Some(Path::new(&programs)))?;
    match craton_pg::adopt::inspect(database, &binaries)? {
        Ok(_) => Ok(()),
        Err(why) => {
            let hint =
                "nothing was changed; docs/guide/adoption.md says which volume founds the cluster";
            Err(Problem::machine(why, hint).into())
        }
    }
}

/// Before an empty database is made: beside another one, or beside what is not known, none is.
fn refuse_to_found_beside(
    volume: &Path,
    pgdata: Option<&Path>,
    beside: Option<&Path>,
) -> anyhow::Result<()> {
    if let Some(found) = elsewhere(volume, pgdata, beside) {
        let what = format!(
            "there is a database in {}, and none in {}, where this image has it: an empty one would be made",
            found.display(),
            volume.display()
        );
        let hint = format!(
            "mount the volume that holds it at {} (its directory of data may stand below the volume's top); PGDATA may be left out",
            volume.display()
        );
        return Err(refuse(&what, hint));
    }
    let entries = match std::fs::read_dir(volume) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => {
            return Err(e).with_context(|| format!("cannot look into {}", volume.display()));
        }
    };
    let names = entries
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned());
    let mut strange: Vec<String> = names.filter(|n| !is_ours(n)).collect();
    strange.sort();
    if strange.is_empty() {
        return Ok(());
    }
    let what = format!(
        "no database is found in {} (PG_VERSION at its top, or in a directory up to two below), but it is not empty: it holds {}. No empty database is made beside what is not known",
        volume.display(),
        listed(&strange)
    );
    Err(refuse(
        &what,
        "if your database is in it, move its data directory to the volume's top; if this is to be a new cluster, move these files out of the volume, or take an empty one",
    ))
}

/// Moves a database to where Craton has it. What an earlier try has not finished is finished.
pub fn take_over(volume: &Path, found: &Found) -> anyhow::Result<()> {
    tracing::info!(
        "the volume holds a data directory in {}: it becomes this member's",
        found.path(volume).display()
    );
    match found {
        Found::AtTop => take_from_top(volume),
        Found::Below(path) => take_from_below(volume, path),
    }
}

/// One rename: there is no half of it.
fn take_from_below(volume: &Path, path: &Path) -> anyhow::Result<()> {
    let failed = || format!("cannot move the data directory {}", path.display());
    for name in LEFTOVERS {
        match std::fs::remove_file(path.join(name)) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(failed),
        }
    }
    // Volumes that are shared by a group (fsGroup) have other bits, with which PostgreSQL does not start.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).with_context(failed)?;
    let data = volume.join("data");
    std::fs::rename(path, &data).map_err(|e| {
        let what = format!("cannot move the data directory {} to {}: {e}", path.display(), data.display());
        let hint = "both must be on one file system: if the directory is a mount of its own, mount that at /var/lib/postgresql/data";
        Problem::new(USAGE, what, hint)
    })?;
    // What held it and is empty now, as `17` of `17/docker`.
    let held = path
        .parent()
        .filter(|p| *p != volume && p.starts_with(volume));
    if let Some(held) = held
        && let Err(error) = std::fs::remove_dir(held)
    {
        tracing::info!("{} stays: {error}", held.display());
    }
    std::fs::File::open(volume)?.sync_all()?;
    Ok(())
}

fn take_from_top(volume: &Path) -> anyhow::Result<()> {
    let marker = volume.join("adopting");
    let version = volume.join("PG_VERSION");
    if !marker.exists() {
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
        if is_ours(&name) || name == "PG_VERSION" {
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

    /// A database in a directory of a volume.
    fn database(at: &Path, version: &str) {
        std::fs::create_dir_all(at.join("global")).unwrap();
        std::fs::create_dir_all(at.join("base/1")).unwrap();
        std::fs::write(at.join("PG_VERSION"), format!("{version}\n")).unwrap();
        std::fs::write(at.join("base/1/PG_VERSION"), format!("{version}\n")).unwrap();
        std::fs::write(at.join("postmaster.pid"), "1\n").unwrap();
    }

    fn empty() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("lost+found")).unwrap();
        dir
    }

    fn look_in(dir: &Path, founds: bool) -> anyhow::Result<Option<Found>> {
        look(dir, None, None, "17", founds)
    }

    fn refusal(outcome: anyhow::Result<Option<Found>>) -> (u8, String) {
        let error = outcome.unwrap_err();
        (crate::exit::code_of(&error), error.to_string())
    }

    #[test]
    fn a_data_directory_at_the_top_moves_down_also_in_two_tries() {
        let dir = volume("17");
        let at = |n: &str| dir.path().join(n);
        // As if the first try had been cut off.
        std::fs::create_dir(at("data")).unwrap();
        std::fs::create_dir(at("conf.d")).unwrap();
        std::fs::write(at("adopting"), "").unwrap();
        std::fs::rename(at("postgresql.conf"), at("data/postgresql.conf")).unwrap();
        let found = look_in(dir.path(), true).unwrap().unwrap();
        assert_eq!(found, Found::AtTop);
        take_over(dir.path(), &found).unwrap();
        for there in [
            "data/PG_VERSION",
            "data/postgresql.conf",
            "data/conf.d",
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
        assert_eq!(look_in(dir.path(), true).unwrap(), None);
    }

    #[test]
    fn another_version_is_refused_and_left_alone() {
        let dir = volume("10");
        let (code, error) = refusal(look_in(dir.path(), true));
        assert_eq!(code, crate::exit::MACHINE);
        assert!(
            error.contains("PostgreSQL 10") && error.contains("17"),
            "{error}"
        );
        assert!(dir.path().join("base/1").exists());
        assert!(!dir.path().join("data").exists());
        // And below the top.
        let dir = empty();
        database(&dir.path().join("pgdata"), "10");
        let (_, error) = refusal(look_in(dir.path(), true));
        assert!(
            error.contains("PostgreSQL 10") && error.contains("pgdata"),
            "{error}"
        );
    }

    #[test]
    fn a_node_that_follows_brings_nothing() {
        let dir = volume("17");
        let (_, error) = refusal(look_in(dir.path(), false));
        assert!(error.contains("a primary's data directory"), "{error}");
        std::fs::write(dir.path().join("standby.signal"), "").unwrap();
        assert_eq!(look_in(dir.path(), false).unwrap(), None);
        assert!(dir.path().join("base/1").exists());
        let dir = empty();
        let below = dir.path().join("pgdata");
        database(&below, "17");
        assert!(look_in(dir.path(), false).is_err());
        std::fs::write(below.join("standby.signal"), "").unwrap();
        assert_eq!(look_in(dir.path(), false).unwrap(), None);
        // It makes no database: whatever else is there does not matter.
        std::fs::write(dir.path().join("notes"), "").unwrap();
        assert_eq!(look_in(dir.path(), false).unwrap(), None);
    }

    #[test]
    fn databases_below_the_top_are_found() {
        let below = |dirs: &[&str], pgdata: Option<&str>| {
            let dir = empty();
            for name in dirs {
                database(&dir.path().join(name), "17");
            }
            let pgdata = pgdata.map(|p| dir.path().join(p));
            let found = databases(dir.path(), pgdata.as_deref());
            let relative = |f: &Found| {
                let path = f.path(dir.path()).strip_prefix(dir.path()).unwrap();
                path.display().to_string()
            };
            found.iter().map(relative).collect::<Vec<_>>()
        };
        assert_eq!(below(&["pgdata"], None), ["pgdata"]);
        assert_eq!(below(&["18/docker"], None), ["18/docker"]);
        assert_eq!(below(&["b", "a"], None), ["a", "b"]);
        // Deeper ones only where PGDATA names them, and that one once.
        assert!(below(&["x/y/z"], None).is_empty());
        assert_eq!(below(&["x/y/z"], Some("x/y/z")), ["x/y/z"]);
        assert_eq!(below(&["pgdata"], Some("pgdata")), ["pgdata"]);
        // Craton's own, and what was set aside, are no strangers; below `data` there may be one.
        for own in [
            "data",
            "data.clone",
            "data.former",
            "restored",
            "before-1/data",
        ] {
            assert!(below(&[own], None).is_empty(), "{own}");
        }
        assert_eq!(below(&["data/pgdata"], None), ["data/pgdata"]);
        // One at the top does not hide another, and is none twice.
        let dir = empty();
        database(dir.path(), "17");
        assert_eq!(databases(dir.path(), None), [Found::AtTop]);
        let own = dir.path().join("pgdata");
        database(&own, "17");
        assert_eq!(
            databases(dir.path(), None),
            [Found::AtTop, Found::Below(own)]
        );
    }

    #[test]
    fn a_database_below_the_top_becomes_the_members_with_one_rename() {
        for place in ["pgdata", "17/docker"] {
            let dir = empty();
            let at = |n: &str| dir.path().join(n);
            database(&at(place), "17");
            // Made by the image's build or by an earlier start, and empty.
            std::fs::create_dir(at("data")).unwrap();
            std::fs::set_permissions(at(place), std::fs::Permissions::from_mode(0o2770)).unwrap();
            take_over(dir.path(), &Found::Below(at(place))).unwrap();
            assert!(at("data/base/1").exists() && at("data/PG_VERSION").exists());
            assert!(!at("data/postmaster.pid").exists());
            let mode = std::fs::metadata(at("data")).unwrap().permissions().mode();
            assert_eq!(mode & 0o7777, 0o700);
            assert!(at("lost+found").exists() && !at("pgdata").exists() && !at("17").exists());
            assert_eq!(look_in(dir.path(), true).unwrap(), None);
        }
    }

    #[test]
    fn several_databases_are_refused_by_their_names() {
        let dir = empty();
        let at = |n: &str| dir.path().join(n);
        database(&at("pgdata"), "17");
        database(&at("old"), "17");
        let (code, error) = refusal(look_in(dir.path(), true));
        assert_eq!(code, USAGE);
        assert!(
            error.contains("several databases")
                && error.contains("/old,")
                && error.contains("/pgdata;"),
            "{error}"
        );
        let dir = empty();
        database(&dir.path().join("pgdata"), "17");
        database(&dir.path().join("data"), "17");
        let (code, error) = refusal(look_in(dir.path(), true));
        assert_eq!(code, USAGE);
        assert!(
            error.contains("/pgdata, ") && error.contains("/data;"),
            "{error}"
        );
    }

    #[test]
    fn no_empty_database_is_made_beside_what_is_not_known() {
        let dir = empty();
        assert_eq!(look_in(dir.path(), true).unwrap(), None);
        for name in [
            "craton-member",
            "state.json.12.new",
            "agent.json.tmp",
            "before-2",
            "data",
        ] {
            std::fs::write(dir.path().join(name), "").unwrap();
            assert_eq!(look_in(dir.path(), true).unwrap(), None, "{name}");
        }
        for name in ["dump.sql", "base", "conf.d", ".hidden"] {
            std::fs::write(dir.path().join(name), "").unwrap();
            let (code, error) = refusal(look_in(dir.path(), true));
            assert_eq!(code, USAGE);
            assert!(error.contains(&format!("it holds {name}")), "{error}");
            std::fs::remove_file(dir.path().join(name)).unwrap();
        }
        let absent = dir.path().join("absent");
        assert_eq!(look_in(&absent, true).unwrap(), None);
    }

    #[test]
    fn a_database_outside_of_the_volume_is_named() {
        let all = tempfile::tempdir().unwrap();
        let volume = all.path().join("data");
        std::fs::create_dir(&volume).unwrap();
        let beside = |pgdata: Option<&Path>| look(&volume, pgdata, Some(all.path()), "17", true);
        assert_eq!(beside(None).unwrap(), None);
        let other = tempfile::tempdir().unwrap();
        assert_eq!(beside(Some(other.path())).unwrap(), None);
        database(other.path(), "17");
        let (code, error) = refusal(beside(Some(other.path())));
        assert_eq!(code, USAGE);
        assert!(
            error.contains(&other.path().display().to_string()),
            "{error}"
        );
        // As the official image has it from PostgreSQL 18 on.
        database(&all.path().join("18/docker"), "18");
        let (code, error) = refusal(beside(None));
        assert_eq!(code, USAGE);
        assert!(error.contains("18/docker"), "{error}");
    }

    #[test]
    fn a_member_with_data_of_its_own_goes_on_whatever_else_is_there() {
        for mark in ["coordinator", "restored"] {
            let dir = volume("17");
            let at = |n: &str| dir.path().join(n);
            std::fs::create_dir(at(mark)).unwrap();
            database(&at("data"), "17");
            std::fs::write(at("dump.sql"), "").unwrap();
            for founds in [true, false] {
                assert_eq!(look_in(dir.path(), founds).unwrap(), None, "{mark}");
            }
            assert!(at("PG_VERSION").exists() && at("base/1").exists());
        }
    }
}
