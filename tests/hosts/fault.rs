//! What is done to a cluster on purpose, and how it is undone.

use std::time::Duration;

use rustix::process::Signal;

use super::net::{Rules, signal};
use super::system::{MEMBERS, State, System};

/// A fault of one host, or of all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// SIGKILL to the leader's postmaster.
    KillPostmaster,
    /// The leader's postmaster stops (SIGSTOP): old sessions work, new ones hang.
    FreezePostmaster,
    /// Every process of the leader's host dies at once, and starts again later.
    KillHost,
    /// Every process of the leader's host stops at once, and goes on later.
    FreezeHost,
    /// The leader reaches nobody, and nobody reaches it.
    Isolate,
    /// The leader is cut from the other members; clients and proxy still reach it.
    CutFromPeers,
    /// What the other members send does not reach the leader.
    OneWayIn,
    /// What the leader sends does not reach the other members.
    OneWayOut,
    /// The leader's agent is killed and does not come back until later.
    KillAgent,
    /// The leader's agent is killed and started again at once.
    RestartAgent,
    /// The leader's agent stops (SIGSTOP).
    FreezeAgent,
    /// The leader's agent runs, but gets a thousandth of a core: what a loop at real-time priority leaves it.
    StarveAgent,
    /// The host of a standby dies that commits wait for.
    LoseStandby,
    /// No member reaches the coordinator.
    LoseCoordinator,
    /// Each frame to and from the leader takes 200 ms.
    Delay,
    /// One packet of ten to and from the leader is lost.
    Loss,
    /// The leader's disk is full.
    FullDisk,
    /// Every write to the leader's disk hangs.
    HungDisk,
    /// The leadership is handed over as planned.
    Switchover,
}

/// Every fault.
pub const ALL: [Fault; 19] = [
    Fault::KillPostmaster,
    Fault::FreezePostmaster,
    Fault::KillHost,
    Fault::FreezeHost,
    Fault::Isolate,
    Fault::CutFromPeers,
    Fault::OneWayIn,
    Fault::OneWayOut,
    Fault::KillAgent,
    Fault::RestartAgent,
    Fault::FreezeAgent,
    Fault::StarveAgent,
    Fault::LoseStandby,
    Fault::LoseCoordinator,
    Fault::Delay,
    Fault::Loss,
    Fault::FullDisk,
    Fault::HungDisk,
    Fault::Switchover,
];

/// The delay of [`Fault::Delay`], in each direction.
const DELAY: Duration = Duration::from_millis(200);

impl Fault {
    /// Its name in reports and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::KillPostmaster => "kill-postmaster",
            Self::FreezePostmaster => "freeze-postmaster",
            Self::KillHost => "kill-host",
            Self::FreezeHost => "freeze-host",
            Self::Isolate => "isolate",
            Self::CutFromPeers => "cut-from-peers",
            Self::OneWayIn => "one-way-in",
            Self::OneWayOut => "one-way-out",
            Self::KillAgent => "kill-agent",
            Self::RestartAgent => "restart-agent",
            Self::FreezeAgent => "freeze-agent",
            Self::StarveAgent => "starve-agent",
            Self::LoseStandby => "lose-standby",
            Self::LoseCoordinator => "lose-coordinator",
            Self::Delay => "delay",
            Self::Loss => "loss",
            Self::FullDisk => "full-disk",
            Self::HungDisk => "hung-disk",
            Self::Switchover => "switchover",
        }
    }

    /// The member that it strikes: the leader, or a standby, rather one that commits wait for.
    pub fn target(self, state: &State) -> String {
        let leader = state.leader.clone().unwrap_or_default();
        if self != Self::LoseStandby {
            return leader;
        }
        let other = MEMBERS.iter().map(|(name, _)| (*name).to_owned());
        state
            .synchronous
            .clone()
            .or_else(|| other.rev().find(|name| *name != leader))
            .unwrap_or(leader)
    }

    /// True for what is over at once: there is nothing to undo.
    pub fn at_once(self) -> bool {
        matches!(
            self,
            Self::KillPostmaster | Self::RestartAgent | Self::Switchover
        )
    }

    /// True where the leader's host goes on and only what manages it does not.
    pub fn of_agent(self) -> bool {
        matches!(
            self,
            Self::KillAgent | Self::RestartAgent | Self::FreezeAgent | Self::StarveAgent
        )
    }
}

/// A fault that was inflicted.
pub struct Inflicted {
    fault: Fault,
    member: String,
    pids: Vec<i32>,
}

fn others(system: &dyn System, member: &str) -> String {
    let ips: Vec<&str> = MEMBERS
        .iter()
        .filter(|(name, _)| *name != member)
        .map(|(name, _)| system.host(name).ip.as_str())
        .collect();
    ips.join(", ")
}

fn rules(system: &dyn System, fault: Fault, member: &str) -> Rules {
    let peers = others(system, member);
    let from_peers = format!("ip saddr {{ {peers} }}");
    let to_peers = format!("ip daddr {{ {peers} }}");
    let (input, output) = match fault {
        Fault::Isolate => (vec!["iifname eth0".into()], vec!["oifname eth0".into()]),
        Fault::CutFromPeers => (vec![from_peers], vec![to_peers]),
        Fault::OneWayIn => (vec![from_peers], Vec::new()),
        Fault::OneWayOut => (Vec::new(), vec![to_peers]),
        Fault::Loss => {
            let tenth = "eth0 numgen random mod 100 < 10";
            (
                vec![format!("iifname {tenth}")],
                vec![format!("oifname {tenth}")],
            )
        }
        _ => (Vec::new(), Vec::new()),
    };
    Rules { input, output }
}

impl Inflicted {
    /// Does it.
    pub fn on(system: &dyn System, fault: Fault, member: &str) -> Result<Self, String> {
        let host = system.host(member);
        let managers = system.managers(member);
        let mut pids = Vec::new();
        match fault {
            Fault::KillPostmaster | Fault::FreezePostmaster => {
                let pid = system.postmaster(member).ok_or("no postmaster runs")?;
                let stop = fault == Fault::FreezePostmaster;
                signal(pid, if stop { Signal::STOP } else { Signal::KILL });
                pids.push(pid);
            }
            Fault::KillHost | Fault::LoseStandby => host.kill(),
            Fault::FreezeHost => host.freeze(),
            Fault::Isolate
            | Fault::CutFromPeers
            | Fault::OneWayIn
            | Fault::OneWayOut
            | Fault::Loss => {
                host.rules(&rules(system, fault, member));
            }
            Fault::KillAgent => system.keep_managers_away(member),
            Fault::RestartAgent => managers.iter().for_each(|pid| signal(*pid, Signal::KILL)),
            Fault::FreezeAgent => {
                for pid in &managers {
                    signal(*pid, Signal::STOP);
                }
                pids = managers;
            }
            Fault::StarveAgent => {
                for pid in &managers {
                    host.starve(*pid, true)?;
                }
                pids = managers;
            }
            Fault::LoseCoordinator => {
                for (name, _) in MEMBERS {
                    system.host(name).rules(&system.no_coordinator(name));
                }
            }
            Fault::Delay => host
                .cable
                .as_ref()
                .ok_or("the leader's cable cannot delay")?
                .set_delay(DELAY),
            Fault::FullDisk => host.fill_disk(),
            Fault::HungDisk => host.freeze_disk(),
            Fault::Switchover => system.switchover()?,
        }
        Ok(Self {
            fault,
            member: member.to_owned(),
            pids,
        })
    }

    /// Undoes it, as far as the world would: a killed host starts again.
    pub fn undo(self, system: &dyn System) {
        let host = system.host(&self.member);
        match self.fault {
            Fault::KillPostmaster | Fault::RestartAgent | Fault::Switchover => {}
            Fault::FreezePostmaster | Fault::FreezeAgent => {
                self.pids.iter().for_each(|pid| signal(*pid, Signal::CONT));
            }
            Fault::KillHost | Fault::LoseStandby | Fault::KillAgent => {
                system.power_on(&self.member);
            }
            Fault::FreezeHost => host.thaw(),
            Fault::Isolate
            | Fault::CutFromPeers
            | Fault::OneWayIn
            | Fault::OneWayOut
            | Fault::Loss => {
                host.rules(&Rules::default());
            }
            Fault::StarveAgent => {
                for pid in &self.pids {
                    if let Err(error) = host.starve(*pid, false) {
                        eprintln!("{error}");
                    }
                }
            }
            Fault::LoseCoordinator => {
                for (name, _) in MEMBERS {
                    system.host(name).rules(&Rules::default());
                }
            }
            Fault::Delay => {
                if let Some(cable) = &host.cable {
                    cable.set_delay(Duration::ZERO);
                }
            }
            Fault::FullDisk => host.empty_disk(),
            Fault::HungDisk => host.thaw_disk(),
        }
    }
}
