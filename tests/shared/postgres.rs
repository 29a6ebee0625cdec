//! What tests of several crates need to run a PostgreSQL of their own.
#![allow(dead_code, reason = "each test file uses its part")]

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

/// PostgreSQL refuses to run as root. Started by root, this runs the calling test again, alone, as the user
/// `postgres`, and returns true: then the caller is done.
pub fn ran_as_postgres(test: &str) -> bool {
    /// A process that another test starts just now has the copy open for writing until it runs its own program, and so
    /// long nobody can run the copy.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    if !rustix::process::geteuid().is_root() {
        return false;
    }
    // The build directory may be one that only root can enter.
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let copy = dir.path().join("test");
    let one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    let mut child = Command::new("setpriv")
        .args(["--reuid=postgres", "--regid=postgres", "--init-groups"])
        .arg(&copy)
        .args(["--exact", test, "--nocapture"])
        .current_dir("/")
        .spawn()
        .unwrap();
    drop(one);
    let status = child.wait().unwrap();
    assert!(
        status.success(),
        "{test} failed as user postgres, see above"
    );
    true
}

/// A port that no other caller in this process is given, and that no connection is made from: one that the system
/// gives out may be another's when its server starts, seconds later.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let begin = std::process::id() * 97;
    loop {
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = u16::try_from(10_000 + (begin + next) % 10_000).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
        assert!(next < 20_000, "no port is free on this machine");
    }
}
