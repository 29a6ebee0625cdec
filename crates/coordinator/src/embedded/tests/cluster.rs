use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use craton_core::MemberId;
use craton_trust::authority::{Authority, ensure_certificate};
use craton_trust::files::write_secret;
use craton_trust::{Identity, Role, TlsFiles, Trust};
use tokio::time::{Instant, sleep};

use crate::api::{Coordinator, CoordinatorError, TxnOutcome};
use crate::conformance::{Handle, put};
use crate::embedded::{Embedded, EmbeddedConfig, Faults, OpenError, StartError};
use crate::raft::Timings;

pub(super) const PATIENCE: Duration = Duration::from_secs(60);

pub(super) struct Cluster {
    pub(super) dir: tempfile::TempDir,
    configs: BTreeMap<MemberId, EmbeddedConfig>,
    pub(super) nodes: BTreeMap<MemberId, Arc<Embedded>>,
    pub(super) faults: BTreeMap<MemberId, Faults>,
    /// Signed the voters' certificates, where they have any.
    pub(super) authority: Option<Authority>,
}

/// A certificate of this authority, in a directory of its own below `dir`.
pub(super) fn trust(dir: &Path, authority: &Authority, role: Role, name: &str) -> Arc<Trust> {
    let dir = dir.join(format!(
        "certificates-{role}-{name}-{}",
        rand::random::<u32>()
    ));
    std::fs::create_dir(&dir).unwrap();
    let files = TlsFiles::in_dir(&dir, name);
    write_secret(&files.authority, authority.certificate_pem()).unwrap();
    let identity = Identity::new(authority.cluster(), role, name).unwrap();
    ensure_certificate(authority, &files, &identity, &[]).unwrap();
    Trust::open(files).unwrap()
}

pub(super) fn id(i: usize) -> MemberId {
    MemberId::new(format!("m{i}")).unwrap()
}

/// An address that no other cluster of this process is given, and that no connection is made from: of those that the
/// system gives out, one that is let go before its node starts may be another's by then, or may connect to itself.
fn free_address() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let begin = std::process::id() * 97;
    loop {
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 10_000 + (begin + next) % 10_000;
        let address = format!("127.0.0.1:{port}");
        if std::net::TcpListener::bind(&address).is_ok() {
            return address;
        }
        assert!(next < 20_000, "no port is free on this machine");
    }
}

/// Waits for a condition that another task brings about.
pub(super) async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let due = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < due, "never: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

impl Cluster {
    pub(super) async fn start(n: usize) -> Self {
        let mut cluster = Self::new(n);
        for i in 0..n {
            cluster.start_node(&id(i)).await;
        }
        cluster
    }

    /// With Raft's timings changed.
    pub(super) async fn start_with(n: usize, timings: Timings) -> Self {
        let mut cluster = Self::new(n);
        for config in cluster.configs.values_mut() {
            config.timings = timings;
        }
        for i in 0..n {
            cluster.start_node(&id(i)).await;
        }
        cluster
    }

    /// With certificates, as outside of tests.
    pub(super) async fn start_trusted(n: usize) -> Self {
        let mut cluster = Self::new(n);
        let authority = Authority::create("test").unwrap();
        for (me, config) in &mut cluster.configs {
            config.trust = Some(trust(
                cluster.dir.path(),
                &authority,
                Role::Node,
                me.as_str(),
            ));
        }
        for i in 0..n {
            cluster.start_node(&id(i)).await;
        }
        cluster.authority = Some(authority);
        cluster
    }

    pub(super) fn new(n: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let voters: Vec<_> = (0..n).map(|i| (id(i), free_address())).collect();
        // Its own: nothing that another cluster sends counts here.
        let secret = format!("a secret of some length {}", rand::random::<u64>());
        let mut faults = BTreeMap::new();
        let configs = voters
            .iter()
            .map(|(me, address)| {
                let mut config = EmbeddedConfig::new(
                    "test".to_owned(),
                    me.clone(),
                    voters.clone(),
                    address.clone(),
                    dir.path().join(me.as_str()),
                    secret.clone(),
                );
                config.faults = Faults::default();
                faults.insert(me.clone(), config.faults.clone());
                (me.clone(), config)
            })
            .collect();
        Self {
            dir,
            configs,
            nodes: BTreeMap::new(),
            faults,
            authority: None,
        }
    }

    pub(super) fn config(&self, who: &MemberId) -> EmbeddedConfig {
        self.configs[who].clone()
    }

    /// A further member, which finds the others as they are now; returns its address.
    pub(super) fn add(&mut self, who: &MemberId) -> String {
        let seeds = self.configs.values();
        let seeds = seeds.map(|c| (c.me.clone(), c.listen.clone())).collect();
        let address = free_address();
        let secret = self.configs.values().next().unwrap().secret.clone();
        let mut config = EmbeddedConfig::new(
            "test".to_owned(),
            who.clone(),
            seeds,
            address.clone(),
            self.dir.path().join(who.as_str()),
            secret,
        );
        config.advertise = Some(address.clone());
        self.configs.insert(who.clone(), config);
        address
    }

    /// The host gets another address; the others' settings files do not know.
    pub(super) fn move_to_new_address(&mut self, who: &MemberId) -> String {
        let address = free_address();
        let config = self.configs.get_mut(who).unwrap();
        config.listen.clone_from(&address);
        config.advertise = Some(address.clone());
        address
    }

    pub(super) async fn start_node(&mut self, who: &MemberId) {
        let due = Instant::now() + PATIENCE;
        let node = loop {
            match Embedded::start(self.configs[who].clone()).await {
                // A former life of it that was killed may still wait for its disk.
                Err(StartError::Open(OpenError::InUse(_))) if Instant::now() < due => {}
                started => break started.unwrap(),
            }
        };
        self.nodes.insert(who.clone(), node);
    }

    /// No farewell: tasks end wherever they are.
    pub(super) fn kill(&mut self, who: &MemberId) {
        drop(self.nodes.remove(who));
    }

    pub(super) async fn stop(self) {
        for node in self.nodes.values() {
            node.stop().await;
        }
    }

    pub(super) fn handles(&self) -> Vec<Handle> {
        let handle = |(id, node): (&MemberId, &Arc<Embedded>)| {
            (id.clone(), Arc::clone(node) as Arc<dyn Coordinator>)
        };
        self.nodes.iter().map(handle).collect()
    }

    pub(super) fn file(&self, who: &MemberId) -> std::path::PathBuf {
        self.dir.path().join(who.as_str()).join("raft.log")
    }

    /// The leader that a majority agrees on.
    pub(super) async fn leader(&self) -> MemberId {
        let mut found = None;
        until("a leader", || {
            let mut votes: BTreeMap<MemberId, usize> = BTreeMap::new();
            for node in self.nodes.values() {
                if let Some(leader) = node.status().leader.filter(|l| self.nodes.contains_key(l)) {
                    *votes.entry(leader).or_default() += 1;
                }
            }
            found = votes
                .into_iter()
                .find(|(_, n)| *n > self.configs.len() / 2)
                .map(|(l, _)| l);
            let done = found.is_some();
            async move { done }
        })
        .await;
        found.unwrap()
    }

    /// Writes through one member until it works; never twice.
    pub(super) async fn write(&self, through: &MemberId, key: &str, value: &str) {
        let due = Instant::now() + PATIENCE;
        loop {
            match self.nodes[through].txn(put(key, 0, value)).await {
                Ok(TxnOutcome::Committed(_)) => return,
                // An earlier try did it.
                Ok(TxnOutcome::Conflict) => return self.sees(through, key, value).await,
                Err(CoordinatorError::Unavailable(_) | CoordinatorError::Unknown(_))
                    if Instant::now() < due => {}
                Err(e) => panic!("{through} cannot write: {e}"),
            }
        }
    }

    pub(super) async fn sees(&self, through: &MemberId, key: &str, value: &str) {
        let due = Instant::now() + PATIENCE;
        loop {
            match self.nodes[through].read().await {
                Ok(seen) => {
                    assert_eq!(
                        seen.get(key).map(|v| v.value.as_str()),
                        Some(value),
                        "{through} reads {key}"
                    );
                    return;
                }
                Err(e) => assert!(Instant::now() < due, "{through} cannot read: {e}"),
            }
        }
    }
}
