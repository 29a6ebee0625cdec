//! PostgreSQL servers that Craton has nothing to do with.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::harness::{directory, free_base_port, text};

/// A command as the user that PostgreSQL runs as: this one, or `postgres` where this is root.
pub fn as_owner(program: impl AsRef<std::ffi::OsStr>) -> Command {
    if !craton::owner::is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid=postgres",
        "--regid=postgres",
        "--init-groups",
        "--",
    ]);
    command.arg(program);
    command.env("HOME", "/tmp");
    command
}

pub fn ok(command: &mut Command) -> String {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", text(&out));
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

pub fn postgres_bin() -> PathBuf {
    craton_pg::Binaries::find(None).unwrap().dir().to_owned()
}

/// A PostgreSQL that Craton has nothing to do with.
pub struct Foreign {
    pub root: PathBuf,
    pub port: u16,
}

impl Foreign {
    /// With `superuser` as the one that initdb makes.
    pub fn new(name: &str, superuser: &str) -> Self {
        let foreign = Self::empty(name);
        let mut initdb = as_owner(postgres_bin().join("initdb"));
        initdb.arg("-D").arg(foreign.data());
        ok(initdb.args(["-U", superuser, "--auth=trust", "--locale=C.UTF-8"]));
        foreign
    }

    /// Its place, and nothing in it.
    pub fn empty(name: &str) -> Self {
        let root = directory(name);
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir(&root).unwrap();
        if craton::owner::is_root() {
            let account = craton::owner::account("postgres").unwrap();
            std::os::unix::fs::chown(&root, Some(account.uid), Some(account.gid)).unwrap();
        }
        let port = free_base_port();
        Self { root, port }
    }

    pub fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.data().join(name)
    }

    /// Lines at the end of its postgresql.conf.
    pub fn configure(&self, lines: &str) {
        let path = self.path("postgresql.conf");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{text}\n{lines}\n")).unwrap();
    }

    fn ctl(&self, args: &[&str]) {
        let options = format!("-p {} -k {}", self.port, self.root.display());
        let mut ctl = as_owner(postgres_bin().join("pg_ctl"));
        ctl.arg("-D")
            .arg(self.data())
            .arg("-w")
            .arg("-o")
            .arg(options);
        ctl.arg("-l").arg(self.root.join("log")).args(args);
        let status = ctl.stdout(Stdio::null()).status().unwrap();
        assert!(status.success(), "{args:?}");
    }

    pub fn start(&self) {
        self.ctl(&["start"]);
    }

    pub fn stop(&self, mode: &str) {
        self.ctl(&["-m", mode, "stop"]);
    }

    pub fn sql(&self, user: &str, database: &str, commands: &[&str]) -> String {
        let mut psql = Command::new("psql");
        psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-U", user, "-d", database]);
        psql.arg("-h")
            .arg(&self.root)
            .args(["-p", &self.port.to_string()]);
        for command in commands {
            psql.args(["-c", command]);
        }
        ok(&mut psql)
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if self.path("postmaster.pid").exists() {
            let mut ctl = as_owner(postgres_bin().join("pg_ctl"));
            ctl.arg("-D")
                .arg(self.data())
                .args(["-m", "immediate", "stop"]);
            let _ = ctl.output();
        }
        let _ = std::fs::remove_dir_all(&self.root);
    }
}
