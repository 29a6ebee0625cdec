//! One member with an agent of its own, as on a host that adopts a database.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command};

use super::foreign::{as_owner, ok};
use super::harness::{directory, free_base_port, signal};

/// A member's settings for a host of its own, and its agent.
pub struct Member {
    pub root: PathBuf,
    pub port: u16,
    pub agent: Option<Child>,
}

impl Member {
    pub fn new(name: &str) -> Self {
        let root = directory(name);
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir(&root).unwrap();
        // The program in a place that the owner can reach.
        let program = root.join("craton");
        std::fs::copy(env!("CARGO_BIN_EXE_craton"), &program).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        if craton::owner::is_root() {
            let account = craton::owner::account("postgres").unwrap();
            std::os::unix::fs::chown(&root, Some(account.uid), Some(account.gid)).unwrap();
        }
        let member = Self {
            port: free_base_port(),
            root,
            agent: None,
        };
        let secrets = member.root.join("secrets");
        ok(member
            .craton(&["ca", "init", "--cluster", "moved", "--secrets"])
            .arg(&secrets));
        let at = |offset: u16| format!("127.0.0.1:{}", member.port + offset);
        let settings = format!(
            "[node]\ncluster = \"moved\"\nmember = \"a\"\ndir = \"{}\"\nhost = \"127.0.0.1\"\nport = {}\napi_listen = {:?}\npeer_listen = {:?}\nsecrets = \"{}\"\nfirst_start = \"adopt\"\npeers = [{{ member = \"a\", address = {3:?} }}]\n",
            member.root.join("a").display(),
            member.port,
            at(1),
            at(2),
            secrets.display(),
        );
        std::fs::write(member.settings(), settings).unwrap();
        std::fs::set_permissions(member.settings(), std::fs::Permissions::from_mode(0o644))
            .unwrap();
        member
    }

    pub fn settings(&self) -> PathBuf {
        self.root.join("craton.toml")
    }

    pub fn craton(&self, args: &[&str]) -> Command {
        let mut command = as_owner(self.root.join("craton"));
        command.args(args).current_dir(&self.root);
        command
    }

    pub fn node(&mut self) {
        let log = std::fs::File::create(self.root.join("agent.log")).unwrap();
        let mut agent = self.craton(&["node", "--config"]);
        agent.arg(self.settings()).stderr(log);
        self.agent = Some(agent.spawn().unwrap());
    }

    /// Its agent and its PostgreSQL end at once, as with the host.
    pub fn lose_host(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            signal(agent.id(), "KILL");
            let _ = agent.wait();
        }
        if let Some(postmaster) = self.postmaster() {
            signal(postmaster, "KILL");
        }
    }

    fn postmaster(&self) -> Option<u32> {
        let pid = std::fs::read_to_string(self.root.join("a/data/postmaster.pid")).ok()?;
        let pid = pid.lines().next()?.parse().ok()?;
        // What has ended left its file; the number may be another's now.
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
        line.contains(self.root.to_str().unwrap()).then_some(pid)
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.root.join("agent.log")).unwrap_or_default()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            signal(agent.id(), "TERM");
            let _ = agent.wait();
        }
        if let Some(postmaster) = self.postmaster() {
            signal(postmaster, "QUIT");
        }
        let _ = std::fs::remove_dir_all(&self.root);
    }
}
