//! What must be true of this machine before a cluster starts; each failure says what to do.

use std::fs::OpenOptions;
use std::net::{SocketAddrV4, TcpListener};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use craton_agent::{Backend, Place};
use craton_pg::Binaries;

use crate::exit::Problem;
use crate::layout::{HOST, Layout};
use crate::owner;

/// Free space that a new cluster needs, in bytes: members, WAL, backups and room to work.
pub const FREE_BYTES_MIN: u64 = 1 << 30;

/// The longest path of a Unix socket that the kernel takes, in bytes (108 with the final zero).
const SOCKET_PATH_MAX: usize = 107;

/// The length of PostgreSQL's socket name with the largest port.
const SOCKET_NAME: &str = ".s.PGSQL.65535.lock";

/// Finds PostgreSQL and the programs and extension that a cluster needs.
pub fn postgres(sample: bool) -> anyhow::Result<PathBuf> {
    let explicit = std::env::var_os("CRATON_PG_BIN").map(PathBuf::from);
    let binaries = Binaries::find(explicit.as_deref())
        .map_err(|e| Problem::machine(e.to_string(), "install it (Debian, Ubuntu: apt install postgresql), or name its bin directory in CRATON_PG_BIN"))?;
    let bin = binaries.dir().to_owned();
    let major = binaries.version().major;
    for program in [
        "initdb",
        "postgres",
        "pg_basebackup",
        "pg_controldata",
        "pg_rewind",
        "pg_waldump",
    ] {
        if !bin.join(program).exists() {
            let what = format!("{} is missing from {}", program, bin.display());
            return Err(Problem::machine(
                what,
                format!("install the packages postgresql-{major} and postgresql-client-{major}"),
            )
            .into());
        }
    }
    if sample && !postgis_installed(&bin, major) {
        let what =
            format!("PostGIS for PostgreSQL {major} is not installed, and the sample map needs it");
        let hint = format!(
            "install the package postgresql-{major}-postgis-3, or leave the map out with --no-sample"
        );
        return Err(Problem::machine(what, hint).into());
    }
    Ok(bin)
}

fn postgis_installed(bin: &Path, major: u32) -> bool {
    let asked = Command::new(bin.join("pg_config"))
        .arg("--sharedir")
        .output();
    let share = asked
        .ok()
        .filter(|o| o.status.success())
        .map(|o| PathBuf::from(String::from_utf8_lossy(&o.stdout).trim()));
    let share = share.unwrap_or_else(|| format!("/usr/share/postgresql/{major}").into());
    share.join("extension/postgis.control").exists()
}

/// Makes the directory if need be; checks that it is ours to use, and the length of socket paths.
pub fn directory(dir: &Path) -> anyhow::Result<()> {
    let deepest = dir.join("members").join("m").join("run").join(SOCKET_NAME);
    let length = deepest.as_os_str().len();
    if length > SOCKET_PATH_MAX {
        let what = format!(
            "the path {} is too long: a Unix socket in it would have {length} characters, the system allows {SOCKET_PATH_MAX}",
            dir.display()
        );
        return Err(Problem::machine(what, "choose a shorter directory with --dir").into());
    }
    if dir.is_dir() {
        let entries = std::fs::read_dir(dir).map_err(|e| owner::cannot_create(dir, &e))?;
        if let Some(stranger) = entries.flatten().next() {
            let what = format!(
                "{} is not empty (it has {}) and is not a cluster of ours",
                dir.display(),
                stranger.file_name().display()
            );
            return Err(Problem::machine(
                what,
                "choose another directory with --dir, or empty this one",
            )
            .into());
        }
    } else {
        std::fs::create_dir_all(dir).map_err(|e| owner::cannot_create(dir, &e))?;
    }
    std::fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o700))
        .map_err(|e| owner::cannot_create(dir, &e))?;
    // Permission bits do not tell everything (read-only mounts, quotas): write something.
    let probe = dir.join(".probe");
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&probe);
    written.map_err(|e| owner::cannot_create(dir, &e))?;
    std::fs::remove_file(&probe).with_context(|| format!("cannot remove {}", probe.display()))
}

/// Checks the free space below `dir`.
pub fn disk(dir: &Path) -> anyhow::Result<()> {
    let stat = rustix::fs::statvfs(dir)
        .with_context(|| format!("cannot look at the disk of {}", dir.display()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < FREE_BYTES_MIN {
        let what = format!(
            "{} has {} free, a cluster needs {}",
            dir.display(),
            crate::output::bytes(free),
            crate::output::bytes(FREE_BYTES_MIN)
        );
        return Err(Problem::machine(
            what,
            "make room, or choose a directory on another disk with --dir",
        )
        .into());
    }
    Ok(())
}

/// Checks that a new cluster can keep its records where it is to.
pub async fn coordinator(place: &Place, cluster: &str) -> anyhow::Result<()> {
    if place.backend == Backend::Embedded {
        return Ok(());
    }
    let prefix = place.prefix_of(cluster);
    craton_agent::etcd::vacant(place, cluster)
        .await
        .map_err(|why| {
            let hint = format!(
                "check that every endpoint is of one etcd that runs; another cluster's records stay where they are: choose another --etcd-prefix, or, if that cluster is no more, `etcdctl del --prefix {prefix}`"
            );
            Problem::machine(why, hint).into()
        })
}

/// Checks that nobody listens on the cluster's ports.
pub fn ports(layout: &Layout) -> anyhow::Result<()> {
    are_free(layout, layout.ports())
}

/// The ports that this cluster has and an earlier description had not.
pub fn ports_of(layout: &Layout, before: &Layout) -> anyhow::Result<()> {
    let had = before.ports();
    let new = layout.ports().into_iter().filter(|p| !had.contains(p));
    are_free(layout, new.collect())
}

fn are_free(layout: &Layout, ports: Vec<(u16, String)>) -> anyhow::Result<()> {
    for (port, purpose) in ports {
        if let Err(error) = TcpListener::bind(SocketAddrV4::new(HOST, port)) {
            let who = listener_of(port)
                .map(|who| format!(" by {who}"))
                .unwrap_or_default();
            let what = format!("port {port} ({purpose}) on {HOST} is taken{who}: {error}");
            let hint = format!(
                "stop what uses it, or choose other ports with --base-port (a cluster uses ports {} to {})",
                layout.proxy_port(),
                layout.backup_http_port()
            );
            return Err(Problem::machine(what, hint).into());
        }
    }
    Ok(())
}

/// The process that listens on a loopback or wildcard port, as far as this user may see.
fn listener_of(port: u16) -> Option<String> {
    let inode = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .find_map(|table| {
            let text = std::fs::read_to_string(table).ok()?;
            text.lines().find_map(|line| listening_inode(line, port))
        })?;
    let socket = format!("socket:[{inode}]");
    crate::processes::all().into_iter().find_map(|process| {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", process.id.pid)).ok()?;
        let holds = fds.flatten().any(|fd| {
            std::fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == socket.as_str())
        });
        let name = process
            .command
            .split(' ')
            .next()
            .unwrap_or_default()
            .to_owned();
        holds.then(|| format!("process {} ({name})", process.id.pid))
    })
}

/// The inode of a line of `/proc/net/tcp` that is a listener (state 0A) on `port`.
fn listening_inode(line: &str, port: u16) -> Option<String> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let (_, local) = fields.get(1)?.rsplit_once(':')?;
    let listens = u16::from_str_radix(local, 16).ok()? == port && *fields.get(3)? == "0A";
    listens
        .then(|| fields.get(9).map(|inode| (*inode).to_owned()))
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_told_from_connections() {
        let line = "   0: 0100007F:1920 00000000:0000 0A 00000000:00000000 00:00000000 00000000   101        0 70707 1";
        assert_eq!(listening_inode(line, 6432).as_deref(), Some("70707"));
        assert_eq!(listening_inode(line, 6433), None);
        assert_eq!(listening_inode(&line.replace(" 0A ", " 01 "), 6432), None);
        assert_eq!(
            listening_inode("  sl  local_address rem_address", 6432),
            None
        );
    }

    #[test]
    fn a_directory_of_others_is_refused_and_a_long_one_too() {
        let dir = tempfile::tempdir().unwrap();
        let ours = dir.path().join("ours");
        directory(&ours).unwrap();
        std::fs::write(ours.join("diary"), "x").unwrap();
        let error = directory(&ours).unwrap_err();
        assert!(error.to_string().contains("diary"), "{error}");
        let error = directory(&dir.path().join("x".repeat(100))).unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
    }

    #[test]
    fn a_busy_port_is_named_with_its_owner() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let me = std::process::id().to_string();
        // A child that another test starts holds it too, until it runs its own program.
        let mut tries = 0;
        while !listener_of(port).unwrap().contains(&me) {
            tries += 1;
            assert!(tries < 100, "{:?}", listener_of(port));
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }
}
