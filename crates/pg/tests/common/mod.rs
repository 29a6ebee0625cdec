//! Instances for tests on real PostgreSQL.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a test that cannot go on must say where"
)]

use std::collections::BTreeMap;
use std::future::Future;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use craton_pg::{
    Binaries, Control, HbaRule, InitOptions, Instance, InstanceConfig, ManagedConfig, Postmaster,
    StartMode, StopMode, SyncNames, Upstream,
};

#[path = "../../../../tests/shared/postgres.rs"]
mod postgres;
pub use postgres::{free_port, ran_as_postgres};

/// A bound for everything that takes a moment.
pub const LIMIT: Duration = Duration::from_secs(90);
/// The password of every role.
pub const PASSWORD: &str = "it's a \\ secret";

/// One member of a test's cluster. Its server dies with it.
pub struct Member {
    pub name: &'static str,
    pub instance: Instance,
    pub control: Control,
    pub postmaster: Option<Postmaster>,
    pub managed: ManagedConfig,
    passfile: PathBuf,
}

impl Drop for Member {
    fn drop(&mut self) {
        let data = self.instance.data_dir();
        for process in craton_pg::processes::living_in(data) {
            if let Some(pid) = rustix::process::Pid::from_raw(process.pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

impl Member {
    pub fn new(root: &Path, name: &'static str) -> Self {
        let instance = Instance::new(InstanceConfig {
            binaries: Binaries::find(None).unwrap(),
            member_dir: root.join(name),
            listen_addresses: "127.0.0.1".into(),
            port: free_port(),
            superuser: "postgres".into(),
            cluster_name: "test".into(),
        })
        .unwrap();
        let passfile = root.join("passfile");
        std::fs::write(&passfile, "*:*:*:*:it's a \\\\ secret\n").unwrap();
        std::fs::set_permissions(&passfile, std::fs::Permissions::from_mode(0o600)).unwrap();
        let settings = BTreeMap::from([("shared_buffers".to_owned(), "16MB".to_owned())]);
        let managed = ManagedConfig {
            settings,
            hba: HbaRule::standard(&["127.0.0.1/32"], false),
            ..ManagedConfig::default()
        };
        let control = instance.control();
        Self {
            name,
            instance,
            control,
            postmaster: None,
            managed,
            passfile,
        }
    }

    /// A new cluster, running as primary that waits for nobody, with the roles.
    pub async fn new_primary(root: &Path, name: &'static str) -> Self {
        let mut member = Self::new(root, name);
        member
            .instance
            .initdb(&InitOptions {
                superuser_password: PASSWORD.into(),
                args: craton_pg::InitArgs::default(),
            })
            .await
            .unwrap();
        member.managed.sync = SyncNames::Off;
        member.start(StartMode::Primary).await;
        let password = || PASSWORD.to_owned();
        let passwords = craton_pg::RolePasswords {
            replication: password(),
            proxy: password(),
            rewind: password(),
        };
        member
            .control
            .bootstrap_roles(&passwords, LIMIT)
            .await
            .unwrap();
        member
    }

    /// How others reach it as `user`.
    pub fn as_upstream(&self, user: &str, application_name: &str, slot: Option<&str>) -> Upstream {
        Upstream {
            host: "127.0.0.1".into(),
            port: self.instance.config().port,
            user: user.into(),
            passfile: self.passfile.clone(),
            application_name: application_name.into(),
            slot: slot.map(str::to_owned),
            tls: None,
        }
    }

    pub async fn start(&mut self, mode: StartMode) {
        self.instance.write_config(&self.managed).await.unwrap();
        let postmaster = self.instance.start(mode).await.unwrap();
        self.instance.wait_ready(&postmaster, LIMIT).await.unwrap();
        self.postmaster = Some(postmaster);
    }

    /// A running standby of `upstream`.
    pub async fn new_standby(root: &Path, name: &'static str, upstream: &Self) -> Self {
        let mut member = Self::new(root, name);
        let source = upstream.as_upstream("craton_replication", name, None);
        let (progress, _) = tokio::sync::watch::channel(craton_pg::CloneProgress::default());
        member
            .instance
            .clone_from(&source, None, progress)
            .await
            .unwrap();
        member.managed.upstream = Some(source);
        member.start(StartMode::Standby).await;
        member
    }

    pub fn postmaster(&self) -> &Postmaster {
        self.postmaster.as_ref().unwrap()
    }

    pub async fn stop(&mut self, mode: StopMode) {
        self.control.disconnect().await;
        self.postmaster
            .take()
            .unwrap()
            .stop(mode, LIMIT)
            .await
            .unwrap();
    }

    pub async fn sql(&self, sql: &str) -> String {
        self.control.query_one("test", sql, LIMIT).await.unwrap()
    }

    pub async fn run(&self, sql: &str) {
        self.control.query("test", sql, LIMIT).await.unwrap();
    }
}

/// Looks again and again until it is true.
pub async fn until<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) {
    let looks = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(
        tokio::time::timeout(LIMIT, looks).await.is_ok(),
        "not in time: {what}"
    );
}
