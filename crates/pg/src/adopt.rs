//! A data directory that Craton did not make: looked at without changing a byte, and prepared to be a member's.
//!
//! What it is may be told by its files alone, before anything is started: what would be dangerous to go on with is
//! refused with words that say what to do. What Craton needs in it (the superuser `postgres`, a database of that name)
//! is made by PostgreSQL's single-user mode, in which nobody can log in, and only if it is not there.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::Binaries;
use crate::binaries::MAJOR_MIN;
use crate::conf_file::{self, ConfFile};
use crate::config;
use crate::control::literal;
use crate::control_data::{ClusterState, ControlData};
use crate::error::{PgError, Result};
use crate::files::{self, blocking};
use crate::instance::{Instance, last_lines, run_tool};
use crate::processes;

/// The file in a data directory that says that Craton has run it. Copies carry it: pg_basebackup and pg_rewind take
/// every file along.
pub const MARK: &str = "craton.mark";

/// Libraries of other systems for high availability, which have no meaning under Craton.
const NEEDLESS_LIBRARIES: [&str; 1] = ["repmgr"];

/// A file that was changed is kept beside under this ending.
const KEPT: &str = "before-craton";

/// A data directory that can be adopted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Adoptable {
    /// Its control file.
    pub control: ControlData,
    /// Parameters that its own configuration has and that Craton's defaults would go over.
    pub carried: BTreeMap<String, String>,
    /// What the operator should know.
    pub notes: Vec<String>,
}

/// What became of a look.
pub type Inspected = std::result::Result<Box<Adoptable>, String>;

/// Why a data directory of another major version cannot be used, and the way from there.
pub fn other_version(data: &Path, found: &str, installed: u32) -> String {
    let at = data.display();
    let newer = found.parse::<u32>().is_ok_and(|v| v > installed);
    if newer {
        return format!(
            "the database in {at} is of PostgreSQL {found}, and {installed} is used here: install PostgreSQL {found}, and name its programs in node.bin_dir"
        );
    }
    let or = if found.parse::<u32>().is_ok_and(|v| v >= MAJOR_MIN) {
        format!(", or install PostgreSQL {found} and name its programs in node.bin_dir")
    } else {
        String::new()
    };
    format!(
        "the database in {at} is of PostgreSQL {found}, and {installed} is used here: bring it to {installed} with pg_upgrade (its --link takes seconds), or dump it with the programs of {found} (pg_dumpall) and load the dump into a new cluster{or}"
    )
}

/// Looks at a data directory and changes nothing. The outer error: it could not be looked at.
pub fn inspect(data: &Path, binaries: &Binaries) -> Result<Inspected> {
    inspect_with(data, &data.join("postgresql.conf"), binaries)
}

/// As [`inspect`], with a configuration that stands elsewhere (Debian keeps it in `/etc/postgresql`).
pub fn inspect_with(data: &Path, config_file: &Path, binaries: &Binaries) -> Result<Inspected> {
    let installed = binaries.version().major;
    if let Err(why) = look_at_files(data, installed)? {
        return Ok(Err(why));
    }
    let control = read_control(data, binaries)?;
    if let Err(why) = look_at_state(data, &control) {
        return Ok(Err(why));
    }
    let conf = ConfFile::read(config_file)?.and(&data.join("postgresql.auto.conf"))?;
    if let Err(why) = look_at_conf(&conf, data, binaries) {
        return Ok(Err(why));
    }
    let slots = slots(data);
    let found = Adoptable {
        carried: carried(&conf, slots.iter().any(|s| s.logical)),
        notes: notes(data, config_file, &control, &conf, &slots),
        control,
    };
    Ok(Ok(Box::new(found)))
}

fn read_control(data: &Path, binaries: &Binaries) -> Result<ControlData> {
    let mut command = std::process::Command::new(binaries.tool("pg_controldata"));
    command
        .env("LC_ALL", "C")
        .env_remove("PGDATA")
        .arg("-D")
        .arg(data);
    ControlData::parse(&run_tool("pg_controldata", &mut command)?)
}

/// Version, owner, other servers, and the files of a backup or a standby.
fn look_at_files(data: &Path, installed: u32) -> Result<std::result::Result<(), String>> {
    let at = data.display();
    let meta = fs::symlink_metadata(data).map_err(PgError::io("cannot look at", data))?;
    if meta.is_symlink() {
        return Ok(Err(format!(
            "{at} is a symbolic link: move the directory itself there (mv within a file system takes no time)"
        )));
    }
    let Some(version) = files::read_text(&data.join("PG_VERSION"))? else {
        return Ok(Err(format!(
            "{at} is no data directory of PostgreSQL: it holds no PG_VERSION"
        )));
    };
    if version.trim().parse() != Ok(installed) {
        return Ok(Err(other_version(data, version.trim(), installed)));
    }
    if data.join(MARK).exists() {
        return Ok(Err(format!(
            "{at} is of a Craton cluster, or a copy of one: whether it is the newest copy cannot be known here. If it is to found a new cluster, and no other copy is in use, remove {MARK} in it"
        )));
    }
    let (owner, me) = (meta.uid(), rustix::process::geteuid().as_raw());
    if owner != me && me != 0 {
        return Ok(Err(format!(
            "{at} belongs to user id {owner}: give it to the user that runs the agent, with chown -R"
        )));
    }
    let real = data
        .canonicalize()
        .map_err(PgError::io("cannot resolve", data))?;
    if let Some(process) = processes::living_in(&real).first() {
        return Ok(Err(format!(
            "a PostgreSQL runs in {at} (pid {}): stop it first, with pg_ctl stop -m fast or its service, and see that nothing starts it again",
            process.pid
        )));
    }
    for (name, what) in [
        (
            "standby.signal",
            "it is a standby of another server: bring the primary's directory instead, or promote this one there first (pg_ctl promote) and then stop it; to follow a running primary there is `craton adopt follow`",
        ),
        (
            "recovery.signal",
            "its recovery to a point in time is not finished: let it end with its own settings, then stop it",
        ),
        (
            "backup_label",
            "it is a base backup that was never started: start it with its own settings, so that it becomes consistent, then stop it",
        ),
    ] {
        if data.join(name).exists() {
            return Ok(Err(format!("{at} holds {name}: {what}")));
        }
    }
    Ok(Ok(()))
}

fn look_at_state(data: &Path, control: &ControlData) -> std::result::Result<(), String> {
    let at = data.display();
    match control.state {
        ClusterState::ShutDown
        | ClusterState::ShuttingDown
        | ClusterState::InCrashRecovery
        | ClusterState::InProduction => {}
        ClusterState::ShutDownInRecovery | ClusterState::InArchiveRecovery => {
            return Err(format!(
                "{at} was last run as a standby, or in a recovery that did not end: bring the primary's directory instead, or start it with its own settings and promote it"
            ));
        }
        ClusterState::StartingUp | ClusterState::Unknown => {
            return Err(format!(
                "{at} is in a state that is not known here: start it once with its own PostgreSQL, then stop it"
            ));
        }
    }
    // A promotion whose first checkpoint was cut off: the control file names the old timeline.
    if control
        .min_recovery_timeline
        .is_some_and(|t| t > control.timeline)
    {
        return Err(format!(
            "{at} was promoted and has not written its first checkpoint since: start it once with its own PostgreSQL, then stop it"
        ));
    }
    Ok(())
}

fn look_at_conf(
    conf: &ConfFile,
    data: &Path,
    binaries: &Binaries,
) -> std::result::Result<(), String> {
    if let Some(path) = conf.missing.first() {
        return Err(format!(
            "its configuration includes {}, which cannot be read: take that line out, or bring the file",
            path.display()
        ));
    }
    for line in conf
        .lines
        .iter()
        .filter(|l| l.key == "shared_preload_libraries")
    {
        let needless = conf_file::names(&line.value).into_iter().any(is_needless);
        if needless && !line.file.starts_with(data) {
            return Err(format!(
                "{} loads {}, which has no meaning under Craton: take it out of shared_preload_libraries there",
                line.file.display(),
                NEEDLESS_LIBRARIES.join(", ")
            ));
        }
    }
    let list = conf.values();
    let list = list
        .get("shared_preload_libraries")
        .copied()
        .unwrap_or_default();
    let Some(libraries) = library_dir(binaries) else {
        return Ok(());
    };
    for name in conf_file::names(list) {
        // A path is PostgreSQL's own to find.
        let there = name.contains('/') || libraries.join(format!("{name}.so")).exists();
        if !there && !is_needless(&name) {
            return Err(format!(
                "its configuration loads the library {name} (shared_preload_libraries), which is not in {}: install its package, or take it out",
                libraries.display()
            ));
        }
    }
    Ok(())
}

fn is_needless(name: impl AsRef<str>) -> bool {
    NEEDLESS_LIBRARIES.contains(&name.as_ref())
}

/// `$libdir`: beside the programs in Debian's packages, else as pg_config says.
fn library_dir(binaries: &Binaries) -> Option<PathBuf> {
    let debian = binaries.dir().parent()?.join("lib");
    if debian.join("plpgsql.so").exists() {
        return Some(debian);
    }
    let output = std::process::Command::new(binaries.tool("pg_config"))
        .arg("--pkglibdir")
        .output()
        .ok()?;
    let dir = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    dir.join("plpgsql.so").exists().then_some(dir)
}

/// Parameters whose value of before counts more than Craton's default.
fn carried(conf: &ConfFile, logical_slots: bool) -> BTreeMap<String, String> {
    let values = conf.values();
    let mut carried = BTreeMap::new();
    for (key, default) in config::DEFAULTS {
        let Some(value) = values.get(key) else {
            continue;
        };
        let keep = match *key {
            // Without these there is no way back for a former leader, no look at a standby.
            "wal_log_hints" | "hot_standby" => false,
            "wal_level" => *value == "logical",
            "max_wal_senders" | "max_replication_slots" => {
                let number = |text: &str| text.parse::<u32>().ok();
                number(value) > number(default)
            }
            _ => value != default,
        };
        if keep {
            carried.insert((*key).to_owned(), (*value).to_owned());
        }
    }
    if logical_slots {
        // PostgreSQL does not start with them and less.
        carried.insert("wal_level".to_owned(), "logical".to_owned());
    }
    carried
}

struct SlotFile {
    name: String,
    logical: bool,
}

/// The replication slots on disk (slot.c, `ReplicationSlotOnDisk`: four numbers, the name in 64 bytes, then the
/// database, which a physical slot has none of).
fn slots(data: &Path) -> Vec<SlotFile> {
    const DATABASE_AT: usize = 16 + 64;
    let dir = data.join("pg_replslot");
    let Ok(entries) = fs::read_dir(&dir) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path().join("state");
        let Ok(bytes) = fs::read(&path) else { continue };
        let database = bytes.get(DATABASE_AT..DATABASE_AT + 4);
        found.push(SlotFile {
            name: entry.file_name().to_string_lossy().into_owned(),
            logical: database.is_some_and(|d| d.iter().any(|byte| *byte != 0)),
        });
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

fn notes(
    data: &Path,
    config_file: &Path,
    control: &ControlData,
    conf: &ConfFile,
    slots: &[SlotFile],
) -> Vec<String> {
    let mut notes = Vec::new();
    let values = conf.values();
    if !control.shut_down_cleanly() {
        notes.push("it was not shut down cleanly: PostgreSQL recovers it at the start".to_owned());
    }
    if !control.checksums {
        notes.push("it has no data checksums: pg_rewind will rest on wal_log_hints, which is switched on; pg_checksums --enable makes them, while it is stopped".to_owned());
    }
    if !config_file.exists() {
        notes.push("it has no postgresql.conf: settings that stand elsewhere (Debian: /etc/postgresql) are not read; put those that are still wanted into [node.postgresql]".to_owned());
    }
    let preload = values.get("shared_preload_libraries").copied();
    if conf_file::names(preload.unwrap_or_default())
        .iter()
        .any(is_needless)
    {
        notes.push(format!("the library repmgr is taken out of shared_preload_libraries (the file of before stays as *.{KEPT}); DROP EXTENSION repmgr CASCADE removes what it left in the database"));
    }
    let archives = values.get("archive_mode").is_some_and(|v| *v != "off");
    if let Some(command) = values
        .get("archive_command")
        .filter(|c| archives && !c.is_empty())
    {
        notes.push(format!("archive_command goes on being called ({command}): WAL stays while it fails; Craton's backup does not need it"));
    }
    let physical: Vec<&str> = slots
        .iter()
        .filter(|s| !s.logical)
        .map(|s| s.name.as_str())
        .collect();
    if !physical.is_empty() {
        notes.push(format!("it has physical replication slots ({}): drop those that nobody uses any more, they keep WAL: SELECT pg_drop_replication_slot('…')", physical.join(", ")));
    }
    let links = fs::read_dir(data.join("pg_tblspc"));
    let places: Vec<String> = links
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| Some(fs::read_link(e.path()).ok()?.display().to_string()))
        .collect();
    if !places.is_empty() {
        notes.push(format!("it has tablespaces ({}): hosts that clone it need the same paths, empty and writable for their agents", places.join(", ")));
    }
    notes.push("pg_hba.conf and pg_ident.conf in it are not used any more: who may log in is said by [node] networks, passwords by md5_passwords".to_owned());
    notes
}

/// For a directory that is to be adopted.
#[derive(Clone)]
pub struct AdoptOptions {
    /// The superuser's password for TCP connections, where the role has none.
    pub superuser_password: String,
}

impl std::fmt::Debug for AdoptOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AdoptOptions(…)")
    }
}

impl Instance {
    /// Looks at the data directory of this instance, see [`inspect`].
    pub async fn inspect(&self) -> Result<Inspected> {
        let this = self.clone();
        blocking(move || inspect(this.data_dir(), &this.config().binaries)).await
    }

    /// True if Craton has run what is in the data directory.
    pub async fn is_marked(&self) -> bool {
        let mark = self.data_dir().join(MARK);
        tokio::task::spawn_blocking(move || mark.exists())
            .await
            .unwrap_or(true)
    }

    /// Says in the data directory that Craton runs it.
    pub(crate) fn mark_data_dir(&self) -> Result<()> {
        let mark = self.data_dir().join(MARK);
        if mark.exists() || !self.data_dir().join("PG_VERSION").exists() {
            return Ok(());
        }
        let text = format!(
            "Run by Craton, in the cluster {:?}. While this file is here the directory founds no other cluster.\n",
            self.config().cluster_name
        );
        files::write_durably(&mark, text.as_bytes())
    }

    /// Prepares an adoptable data directory. May be repeated after a crash at any point.
    pub async fn prepare_adopted(&self, options: &AdoptOptions) -> Result<ControlData> {
        let (this, options) = (self.clone(), options.clone());
        blocking(move || this.prepare_adopted_blocking(&options)).await
    }

    fn prepare_adopted_blocking(&self, options: &AdoptOptions) -> Result<ControlData> {
        let found = inspect(self.data_dir(), &self.config().binaries)?;
        let found = found.map_err(|reason| PgError::DataDir {
            path: self.data_dir().to_owned(),
            reason,
        })?;
        self.take_out_needless_libraries()?;
        let superuser = &self.config().superuser;
        let answer = self.single_user(
            &found.control,
            "template1",
            &superuser_sql(superuser, &options.superuser_password),
        )?;
        if !answer.contains(DATABASE_THERE) {
            let sql = "CREATE DATABASE postgres TEMPLATE template0";
            self.single_user(&found.control, "template1", sql)?;
        }
        self.read_control_data()
    }

    /// Edits the directory's own files; what includes them stands in them.
    fn take_out_needless_libraries(&self) -> Result<()> {
        for name in ["postgresql.conf", "postgresql.auto.conf"] {
            let conf = ConfFile::read(&self.data_dir().join(name))?;
            for line in conf
                .lines
                .iter()
                .filter(|l| l.key == "shared_preload_libraries")
            {
                let names = conf_file::names(&line.value);
                if names.iter().any(is_needless) {
                    change_line(&line.file, line.number, &names)?;
                }
            }
        }
        Ok(())
    }

    /// Runs SQL in single-user mode as the bootstrap superuser, whatever that one's name is.
    fn single_user(&self, control: &ControlData, database: &str, sql: &str) -> Result<String> {
        // Nothing of the directory's own configuration: it may name libraries, files and places of before.
        let conf = self.conf_dir().join("adopt.conf");
        files::write_durably(
            &conf,
            b"# For the preparation of an adopted data directory.\n",
        )?;
        files::remove_durably(&self.data_dir().join("postmaster.pid"))?;
        let mut command = self.writing_tool("postgres");
        command.arg("--single").arg("-D").arg(self.data_dir());
        let mut set = |key: &str, value: &str| {
            command.arg("-c").arg(format!("{key}={value}"));
        };
        set("config_file", &conf.display().to_string());
        set("exit_on_error", "on");
        // A statement with a verifier must not come back in an error.
        set("log_min_error_statement", "panic");
        // Logical slots need it, and it is for this run alone.
        set("wal_level", "logical");
        set("max_replication_slots", "1000");
        // Recovery of prepared transactions needs as many as there were.
        for (key, value) in &control.standby_needs {
            set(key, &value.to_string());
        }
        let mut child = command
            .arg(database)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(PgError::io("cannot run", Path::new("postgres --single")))?;
        if let Some(mut stdin) = child.stdin.take() {
            // If it ended before it read this, its own message is the better one.
            let _ = writeln!(stdin, "{sql}");
        }
        let output = child
            .wait_with_output()
            .map_err(PgError::io("cannot run", Path::new("postgres --single")))?;
        if !output.status.success() {
            return Err(PgError::Tool {
                tool: "postgres --single",
                status: output.status.to_string(),
                output: last_lines(&String::from_utf8_lossy(&output.stderr)),
            });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// In the answer where the database is there.
const DATABASE_THERE: &str = "craton_database_is_there";

/// One statement a line, as single-user mode reads them.
fn superuser_sql(superuser: &str, password: &str) -> String {
    let role = literal(superuser);
    let name = crate::control::identifier(superuser);
    let verifier = literal(&postgres_protocol::password::scram_sha_256(
        password.as_bytes(),
    ));
    let refusal = literal(&format!(
        "the role {superuser} is no superuser that may log in, and Craton does not make it one: run ALTER ROLE {superuser} SUPERUSER LOGIN yourself"
    ));
    format!(
        "DO $craton$ BEGIN \
         IF NOT EXISTS (SELECT FROM pg_catalog.pg_authid WHERE rolname = {role}) THEN CREATE ROLE {name} SUPERUSER LOGIN; \
         ELSIF NOT EXISTS (SELECT FROM pg_catalog.pg_authid WHERE rolname = {role} AND rolsuper AND rolcanlogin) THEN RAISE EXCEPTION '%', {refusal}; END IF; \
         IF EXISTS (SELECT FROM pg_catalog.pg_authid WHERE rolname = {role} AND rolpassword IS NULL) THEN ALTER ROLE {name} PASSWORD {verifier}; END IF; \
         END $craton$\n\
         SELECT 'craton_' || 'database_is_there' AS answer FROM pg_catalog.pg_database WHERE datname = 'postgres'"
    )
}

/// Writes the list anew without what is needless, and keeps the file of before beside.
fn change_line(path: &Path, number: usize, names: &[String]) -> Result<()> {
    let text = files::read_text(path)?.unwrap_or_default();
    let mut kept = path.file_name().unwrap_or_default().to_owned();
    kept.push(format!(".{KEPT}"));
    let kept = path.with_file_name(kept);
    if !kept.exists() {
        files::write_durably(&kept, text.as_bytes())?;
    }
    let left: Vec<&str> = names
        .iter()
        .filter(|n| !is_needless(n))
        .map(String::as_str)
        .collect();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    if let Some(line) = lines.get_mut(number) {
        *line = format!("shared_preload_libraries = '{}'", left.join(", "));
    }
    files::write_durably(path, (lines.join("\n") + "\n").as_bytes())
}
