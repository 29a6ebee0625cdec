//! `SSH_ENABLE=1`: sshd for the user postgres alone, with keys alone. Nothing of Craton needs it.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use craton_trust::files::write_secret;

use crate::exit::{Problem, USAGE};
use crate::owner::Account;

/// Where keys may be mounted.
const KEY_DIRS: [&str; 2] = ["/var/lib/postgresql/.ssh/keys", "/tmp/.ssh/keys"];

fn keys() -> anyhow::Result<PathBuf> {
    let found = KEY_DIRS
        .iter()
        .map(Path::new)
        .find(|dir| dir.join("id_rsa").exists() && dir.join("id_rsa.pub").exists());
    found.map(Path::to_owned).ok_or_else(|| {
        let what = format!(
            "SSH_ENABLE=1, and neither {} nor {} holds id_rsa and id_rsa.pub",
            KEY_DIRS[0], KEY_DIRS[1]
        );
        Problem::new(
            USAGE,
            what,
            "mount the keys, or leave SSH_ENABLE out: Craton does not need it",
        )
        .into()
    })
}

/// Puts the keys in place and starts sshd, which stays a child of the container.
pub fn start(account: Option<&Account>) -> anyhow::Result<()> {
    let Some(account) = account else {
        return Err(Problem::new(
            USAGE,
            "SSH_ENABLE=1 needs a container that starts as root",
            "leave `user:` out, or SSH_ENABLE",
        )
        .into());
    };
    let from = keys()?;
    let home = account.home.join(".ssh");
    std::fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
    std::os::unix::fs::chown(&home, Some(account.uid), Some(account.gid))?;
    std::fs::set_permissions(&home, std::fs::Permissions::from_mode(0o700))?;
    let public = std::fs::read_to_string(from.join("id_rsa.pub"))?;
    write_secret(
        &home.join("id_rsa"),
        &std::fs::read_to_string(from.join("id_rsa"))?,
    )?;
    write_secret(&home.join("id_rsa.pub"), &public)?;
    write_secret(&home.join("authorized_keys"), &public)?;
    // The containers of a cluster come and go with new host keys.
    let client =
        "Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n";
    write_secret(&home.join("config"), client)?;
    for (program, args) in [
        ("/usr/bin/ssh-keygen", &["-A"][..]),
        (
            "/usr/sbin/sshd",
            &[
                "-o",
                "PermitRootLogin=no",
                "-o",
                "PasswordAuthentication=no",
                "-o",
                "KbdInteractiveAuthentication=no",
                "-o",
                "AllowUsers=postgres",
            ],
        ),
    ] {
        std::fs::create_dir_all("/run/sshd")?;
        let done = Command::new(program)
            .args(args)
            .output()
            .with_context(|| format!("cannot run {program}"))?;
        anyhow::ensure!(
            done.status.success(),
            "{program} failed: {}",
            String::from_utf8_lossy(&done.stderr).trim()
        );
    }
    Ok(())
}
