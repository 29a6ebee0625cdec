//! The faults: what is done to which processes, and what is undone afterwards.

use std::time::Duration;

use clap::ValueEnum;
use craton_core::MemberId;
use rustix::process::Signal;
use serde::Serialize;

use crate::access::Access;
use crate::change;
use crate::layout::{Daemon, Layout};
use crate::processes::{self, ProcessId};
use crate::supervise::Hold;

/// Something to do to a local cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// SIGKILL to the leader's postmaster
    KillPrimary,
    /// SIGKILL to every process of the leader's member at once; it is started again after --down-for
    KillHost,
    /// SIGSTOP to every process of the leader's member, SIGCONT after --for
    FreezePrimary,
    /// SIGKILL to the leader's agent
    KillAgent,
    /// SIGSTOP to the leader's agent alone, SIGCONT after --for
    FreezeAgent,
    /// SIGKILL to the leader's fence
    KillFence,
    /// SIGKILL to every process of a standby's member; it is started again after --down-for
    KillStandby,
    /// SIGSTOP to every process of a standby's member, SIGCONT after --for
    FreezeStandby,
    /// SIGKILL to the proxy
    KillProxy,
    /// Hand the leadership over as planned
    Switchover,
}

/// What `mixed` chooses from.
pub const ALL: [Fault; 10] = [
    Fault::KillPrimary,
    Fault::KillHost,
    Fault::FreezePrimary,
    Fault::KillAgent,
    Fault::FreezeAgent,
    Fault::KillFence,
    Fault::KillStandby,
    Fault::FreezeStandby,
    Fault::KillProxy,
    Fault::Switchover,
];

impl Fault {
    /// The name as typed.
    pub fn name(self) -> String {
        self.to_possible_value()
            .map(|v| v.get_name().to_owned())
            .unwrap_or_default()
    }

    /// The help text.
    pub fn about(self) -> String {
        self.to_possible_value()
            .and_then(|v| v.get_help().map(ToString::to_string))
            .unwrap_or_default()
    }

    /// True when it is done to a standby.
    pub fn hits_standby(self) -> bool {
        matches!(self, Self::KillStandby | Self::FreezeStandby)
    }
}

/// How long things stay broken.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// How long a killed member stays down.
    pub down_for: Duration,
    /// How long something stays frozen.
    pub freeze_for: Duration,
}

/// Breaks it; returns when the fault is in place, and for a freeze when it is over.
pub async fn inflict(
    fault: Fault,
    layout: &Layout,
    access: &Access,
    target: &MemberId,
    times: Times,
) -> anyhow::Result<()> {
    let agent = Daemon::Node(target.clone());
    match fault {
        Fault::KillPrimary => kill(
            processes::postmaster(&layout.member(target).join("data")),
            "postmaster",
            target,
        ),
        Fault::KillHost | Fault::KillStandby => kill_host(layout, &agent, target, times.down_for),
        Fault::FreezePrimary | Fault::FreezeStandby => {
            freeze(
                processes::of_member(layout, target).into_iter().collect(),
                times.freeze_for,
            )
            .await
        }
        Fault::KillAgent => kill(processes::running(layout, &agent.name()), "agent", target),
        Fault::FreezeAgent => {
            let agent = processes::running(layout, &agent.name())
                .into_iter()
                .collect();
            freeze(agent, times.freeze_for).await
        }
        Fault::KillFence => kill(fence_of(layout, target), "fence", target),
        Fault::KillProxy => kill(
            processes::running(layout, &Daemon::Proxy.name()),
            "proxy",
            target,
        ),
        Fault::Switchover => change::ask_switchover(access, None).await.map(|_| ()),
    }
}

fn kill(process: Option<ProcessId>, what: &str, member: &MemberId) -> anyhow::Result<()> {
    let killed = process.is_some_and(|id| id.signal(Signal::KILL));
    anyhow::ensure!(
        killed,
        "there is no {what} to kill for member {member}: see `craton status`"
    );
    Ok(())
}

fn fence_of(layout: &Layout, member: &MemberId) -> Option<ProcessId> {
    let ours = processes::of_member(layout, member);
    processes::all()
        .into_iter()
        .find(|p| ours.contains(&p.id) && p.command.split(' ').nth(1) == Some("fence"))
        .map(|p| p.id)
}

/// All at once, as a power cut: everything is stopped first, so that nothing reacts to another's end.
fn kill_host(
    layout: &Layout,
    agent: &Daemon,
    member: &MemberId,
    down_for: Duration,
) -> anyhow::Result<()> {
    Hold::set(layout, &agent.name(), down_for)?;
    let found = processes::of_member(layout, member);
    for id in &found {
        id.signal(Signal::STOP);
    }
    // Some may have been born before their parent was stopped.
    let found: Vec<_> = found
        .into_iter()
        .chain(processes::of_member(layout, member))
        .collect();
    anyhow::ensure!(
        !found.is_empty(),
        "member {member} has no process to kill: see `craton status`"
    );
    for id in found {
        id.signal(Signal::KILL);
    }
    Ok(())
}

async fn freeze(processes: Vec<ProcessId>, time: Duration) -> anyhow::Result<()> {
    anyhow::ensure!(
        !processes.is_empty(),
        "there is no process to freeze: see `craton status`"
    );
    let frozen = Frozen(processes);
    for id in &frozen.0 {
        id.signal(Signal::STOP);
    }
    tokio::time::sleep(time).await;
    drop(frozen);
    Ok(())
}

/// Processes that go on when this is dropped, even if the drill is interrupted meanwhile.
struct Frozen(Vec<ProcessId>);

impl Drop for Frozen {
    fn drop(&mut self) {
        for id in &self.0 {
            id.signal(Signal::CONT);
        }
    }
}
