//! The settings files of a local cluster's daemons, made from its description.

use std::collections::BTreeMap;

use craton_agent::witness::WitnessConfig;
use craton_agent::{AgentConfig, CloneConfig, FirstStart, Peer};
use craton_core::MemberId;
use craton_core::settings::{Durability, Settings};
use craton_trust::TlsSettings;

use crate::config;
use crate::layout::{Daemon, HOST, Layout, WITNESS_NAME, address};
use crate::secrets::names;

/// PostgreSQL settings of a local cluster: several servers share one machine's memory.
const POSTGRESQL: [(&str, &str); 2] = [("shared_buffers", "64MB"), ("max_connections", "100")];

/// A base backup a day.
const BACKUP_INTERVAL_S: u64 = 86_400;

/// Writes every daemon's file.
pub fn write_all(layout: &Layout) -> anyhow::Result<()> {
    for member in &layout.cluster.members {
        config::write(
            &layout.conf_of(&Daemon::Node(member.clone())),
            "node",
            &agent(layout, member)?,
        )?;
    }
    if layout.cluster.witness {
        config::write(
            &layout.conf_of(&Daemon::Witness),
            config::WITNESS,
            &witness(layout)?,
        )?;
    }
    config::write(&layout.conf_of(&Daemon::Proxy), "proxy", &proxy(layout))?;
    config::write(&layout.conf_of(&Daemon::Backup), "backup", &backup(layout))?;
    Ok(())
}

/// The `[proxy]` table.
fn proxy(layout: &Layout) -> craton_proxy::ProxyConfig {
    craton_proxy::ProxyConfig {
        listen: address(layout.proxy_port()),
        listen_read: Some(address(layout.proxy_read_port())),
        http: address(layout.proxy_http_port()),
        agents: layout.api_addresses(),
        tls: TlsSettings::in_dir(&layout.secrets()),
        auth_password_file: Some(layout.secret(names::PROXY)),
        ..craton_proxy::ProxyConfig::default()
    }
}

/// The `[backup]` table.
fn backup(layout: &Layout) -> craton_backup::Config {
    craton_backup::Config {
        repository: layout.repository(),
        listen: (HOST, layout.backup_http_port()).into(),
        agents: layout.api_addresses(),
        token_file: None,
        user: "craton_replication".to_owned(),
        password_file: Some(layout.secret(names::REPLICATION)),
        slot: "craton_backup".to_owned(),
        application_name: "craton_backup".to_owned(),
        synchronous: layout.cluster.synchronous_backup,
        name: None,
        advertise: None,
        backup_on_start: true,
        backup_interval_s: BACKUP_INTERVAL_S,
        retention_days: craton_backup::config::RETENTION_DAYS,
        retention_backups: craton_backup::config::RETENTION_BACKUPS,
        prefer_standby: false,
        max_rate_kb: None,
        tls: TlsSettings::in_dir(&layout.secrets()),
    }
}

/// Whom a member that joins asks: those that were there before it.
fn join(layout: &Layout, member: &MemberId) -> Vec<String> {
    if !layout.cluster.joined.contains(member) {
        return Vec::new();
    }
    let others = layout.cluster.members.iter().filter(|m| *m != member);
    others.map(|m| address(layout.api_port(m))).collect()
}

/// Who takes part in the coordinator.
fn voters(layout: &Layout) -> anyhow::Result<Vec<Peer>> {
    let members = layout.cluster.members.iter();
    let mut voters: Vec<Peer> = members
        .map(|m| Peer {
            member: m.clone(),
            address: address(layout.coordinator_port(m)),
        })
        .collect();
    if layout.cluster.witness {
        voters.push(Peer {
            member: witness_name()?,
            address: address(layout.witness_port()),
        });
    }
    Ok(voters)
}

fn witness_name() -> anyhow::Result<MemberId> {
    MemberId::new(WITNESS_NAME).map_err(anyhow::Error::msg)
}

/// The `[witness]` table.
fn witness(layout: &Layout) -> anyhow::Result<WitnessConfig> {
    Ok(WitnessConfig {
        cluster: layout.cluster.name.clone(),
        name: witness_name()?,
        dir: layout.witness(),
        listen: address(layout.witness_port()),
        advertise: None,
        http: Some(address(layout.witness_http_port())),
        agents: layout.api_addresses(),
        peers: voters(layout)?,
        voter: craton_agent::VoterWish::Auto,
        secrets: layout.secrets(),
        tls: TlsSettings::default(),
    })
}

/// An adopted database stands with the first member.
fn first_start(layout: &Layout, member: &MemberId) -> FirstStart {
    match layout.cluster.adopted {
        false => FirstStart::Make,
        true if layout.cluster.members.first() == Some(member) => FirstStart::Adopt,
        true => FirstStart::Wait,
    }
}

/// The `[node]` table of a member.
fn agent(layout: &Layout, member: &MemberId) -> anyhow::Result<AgentConfig> {
    let postgresql: BTreeMap<_, _> = POSTGRESQL
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect();
    Ok(AgentConfig {
        cluster: layout.cluster.name.clone(),
        member: member.clone(),
        dir: layout.member(member),
        host: HOST.to_string(),
        listen_addresses: HOST.to_string(),
        port: layout.postgres_port(member),
        api_listen: address(layout.api_port(member)),
        api_advertise: None,
        peer_listen: address(layout.coordinator_port(member)),
        peer_advertise: None,
        peers: voters(layout)?,
        join: join(layout, member),
        voter: craton_agent::VoterWish::Auto,
        coordinator: layout.cluster.coordinator.clone(),
        priority: 100,
        nofailover: false,
        noload: false,
        upstream: None,
        first_start: first_start(layout, member),
        md5_passwords: layout.cluster.adopted,
        bin_dir: Some(layout.cluster.postgres_bin.clone()),
        secrets: layout.secrets(),
        networks: vec![format!("{HOST}/32")],
        postgresql: BTreeMap::new(),
        initial: Settings {
            durability: durability(&layout.cluster.durability)?,
            postgresql,
            ..Settings::default()
        },
        hooks: craton_agent::hooks::HooksConfig::default(),
        origins: BTreeMap::new(),
        initial_data: None,
        initdb_args: Vec::new(),
        clone: CloneConfig {
            repository: Some(layout.repository()),
            ..CloneConfig::default()
        },
        fence_program: Some(layout.binary()),
        tls: TlsSettings::default(),
        // The members of a local cluster share one host: it must not be restarted for one of them.
        watchdog: craton_agent::WatchdogMode::Off,
        watchdog_device: "/dev/watchdog".into(),
    })
}

fn durability(name: &str) -> anyhow::Result<Durability> {
    match name {
        "async" => Ok(Durability::Async),
        "quorum" => Ok(Durability::Quorum),
        "strict" => Ok(Durability::Strict),
        other => {
            anyhow::bail!("there is no durability \"{other}\": use async, quorum or strict")
        }
    }
}
