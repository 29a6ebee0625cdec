//! Who a local cluster belongs to. PostgreSQL refuses to run as root, so root hands over to `postgres`.

use std::ffi::OsString;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::exit::Problem;
use crate::processes::ProcessId;

/// The user that root hands over to.
pub const SERVICE_USER: &str = "postgres";

/// A line of `/etc/passwd`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Account {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Home directory.
    pub home: PathBuf,
}

/// Finds an account among the lines of `/etc/passwd`.
fn find_account(passwd: &str, wanted: impl Fn(&Account) -> bool) -> Option<Account> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = PathBuf::from(fields.nth(1)?);
        Some(Account {
            name,
            uid,
            gid,
            home,
        })
        .filter(&wanted)
    })
}

fn passwd() -> anyhow::Result<String> {
    std::fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")
}

/// The account of this name.
pub fn account(name: &str) -> anyhow::Result<Account> {
    find_account(&passwd()?, |a| a.name == name).ok_or_else(|| {
        Problem::machine(
            format!("there is no user \"{name}\""),
            "/etc/passwd lists them",
        )
        .into()
    })
}

/// The account `postgres`, which the package creates.
pub fn service_account() -> anyhow::Result<Account> {
    find_account(&passwd()?, |a| a.name == SERVICE_USER).ok_or_else(|| {
        let what = format!("PostgreSQL refuses to run as root, and there is no user \"{SERVICE_USER}\" to hand over to");
        Problem::machine(what, "install the package \"postgresql\" (it creates the user), or run this as an ordinary user").into()
    })
}

/// True when this process runs as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// As root: the account that a command on `dir` should run as instead. `None`: go on as you are.
pub fn successor(dir: &Path) -> anyhow::Result<Option<Account>> {
    if !is_root() {
        return Ok(None);
    }
    let owner = std::fs::metadata(dir)
        .map(|m| m.uid())
        .ok()
        .filter(|uid| *uid != 0);
    match owner {
        Some(uid) => find_account(&passwd()?, |a| a.uid == uid)
            .map_or_else(|| service_account().map(Some), |a| Ok(Some(a))),
        None => service_account().map(Some),
    }
}

/// As root: makes `dir` for `account`, having checked that `account` can get there. True when it was made.
pub fn prepare_directory(dir: &Path, account: &Account) -> anyhow::Result<bool> {
    for parent in dir.ancestors().skip(1) {
        // Those that do not exist yet will be made for everybody to pass.
        let Ok(meta) = std::fs::metadata(parent) else {
            continue;
        };
        let shift = if meta.uid() == account.uid {
            6
        } else if meta.gid() == account.gid {
            3
        } else {
            0
        };
        if (meta.mode() >> shift) & 0o1 == 0 {
            let what = format!(
                "the user \"{}\" cannot enter {}, and so cannot use {}",
                account.name,
                parent.display(),
                dir.display()
            );
            let hint =
                "choose a directory that everybody can reach, for example --dir /var/lib/craton";
            return Err(Problem::machine(what, hint).into());
        }
    }
    let new = !dir.exists();
    if new {
        std::fs::create_dir_all(dir).map_err(|e| cannot_create(dir, &e))?;
    }
    let meta =
        std::fs::metadata(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    let empty = std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
    if meta.uid() != account.uid && empty {
        std::os::unix::fs::chown(dir, Some(account.uid), Some(account.gid))
            .with_context(|| format!("cannot give {} to {}", dir.display(), account.name))?;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
            .with_context(|| format!("cannot make {} private", dir.display()))?;
    }
    Ok(new)
}

/// Runs a command to its end and returns its exit code. What is sent to us goes to it: it has to clean up
/// first.
pub fn run_to_the_end(command: Command) -> anyhow::Result<u8> {
    crate::cli::wait_for(to_the_end(command))
}

/// As [`run_to_the_end`], for a command that waits already.
pub async fn to_the_end(command: Command) -> anyhow::Result<u8> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for signals")?;
    let mut child = tokio::process::Command::from(command)
        .spawn()
        .context("cannot run as another user")?;
    let pid = child
        .id()
        .and_then(|pid| ProcessId::of(i32::try_from(pid).ok()?));
    loop {
        tokio::select! {
            status = child.wait() => {
                let code = status.context("cannot wait for the command")?.code();
                return Ok(code.and_then(|c| u8::try_from(c).ok()).unwrap_or(crate::exit::FAILURE));
            }
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        pid.map(|pid| pid.signal(rustix::process::Signal::INT));
    }
}

/// The error for a directory that cannot be made.
pub fn cannot_create(dir: &Path, error: &std::io::Error) -> anyhow::Error {
    let what = format!("cannot create the directory {}: {error}", dir.display());
    Problem::machine(
        what,
        "choose a directory that you can write to with --dir, or make this one writable",
    )
    .into()
}

/// This very program again as `account`, with no other groups. `/proc/self/exe` works even where the
/// account could not reach the program by its path, as in a checkout in a private home.
pub fn again_as(account: &Account, dir: &Path, args: &[OsString]) -> Command {
    let mut command = Command::new("/proc/self/exe");
    let mut args = args.iter();
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    // std clears the supplementary groups when root sets another uid.
    command.uid(account.uid).gid(account.gid);
    command.args(without_dir(args)).arg("--dir").arg(dir);
    command
        .env("HOME", &account.home)
        .env("USER", &account.name)
        .env("LOGNAME", &account.name);
    for foreign in [
        "XDG_DATA_HOME",
        "XDG_CONFIG_HOME",
        "XDG_RUNTIME_DIR",
        "CRATON_DIR",
    ] {
        command.env_remove(foreign);
    }
    command
}

/// The arguments without `--dir`, which is given anew as an absolute path.
fn without_dir<'a>(args: impl Iterator<Item = &'a OsString>) -> Vec<&'a OsString> {
    let mut kept = Vec::new();
    let mut skip = false;
    for arg in args {
        let text = arg.to_string_lossy();
        if std::mem::take(&mut skip) || text.starts_with("--dir=") {
            continue;
        }
        if text == "--dir" {
            skip = true;
            continue;
        }
        kept.push(arg);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_found_among_odd_lines() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\n\nbroken\npostgres:x:101:104:PG,,,:/var/lib/postgresql:/bin/bash\n";
        let found = find_account(passwd, |a| a.name == "postgres").unwrap();
        assert_eq!(
            (found.uid, found.gid, found.home),
            (101, 104, "/var/lib/postgresql".into())
        );
        assert!(find_account(passwd, |a| a.name == "broken").is_none());
    }

    #[test]
    fn dir_is_taken_out_of_the_arguments() {
        let args: Vec<OsString> = ["up", "--dir", "x", "--members", "3", "--dir=y"]
            .into_iter()
            .map(Into::into)
            .collect();
        let kept: Vec<_> = without_dir(args.iter())
            .into_iter()
            .map(|a| a.to_string_lossy().into_owned())
            .collect();
        assert_eq!(kept, ["up", "--members", "3"]);
    }
}
