//! `craton drill`: breaks the local cluster on purpose while clients write and read through the proxy,
//! and measures outage, errors, lost rows and the time until full redundancy.

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use craton_console::views::StatusView;
use craton_core::MemberId;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::time::{Instant, sleep};

use crate::access::Access;
use crate::cli::wait_for;
use crate::exit::{self, Problem};
use crate::layout::{Daemon, Layout};
use crate::processes::{self, ProcessId};
use crate::sessions::{Login, describe};
use crate::{output, owner};

pub mod faults;
pub mod recorder;
pub mod report;
pub mod verify;

use faults::{Fault, Times};
use recorder::{Patience, Plan, Recorder};
use report::{DrillResult, Summary};

/// How often the cluster's state is looked at while it heals.
const HEAL_POLL: Duration = Duration::from_millis(100);

/// The cluster counts as healed when it has looked so for this long without a break.
const HEALED_FOR: Duration = Duration::from_millis(500);

/// Acknowledged writes before the first fault.
const WARM_UP_WRITES: usize = 100;

/// How long the warm-up may take.
const WARM_UP_TIMEOUT: Duration = Duration::from_secs(30);

/// A write that takes longer is given up; its outcome is unknown.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// Writes that a recording keeps in memory at most.
const WRITES_MAX: u64 = 5_000_000;

/// The table that recordings write to.
pub const SCHEMA: &str = "
CREATE SCHEMA IF NOT EXISTS craton_drill;
CREATE TABLE IF NOT EXISTS craton_drill.writes (
  run bigint, id bigint, at timestamptz NOT NULL DEFAULT clock_timestamp(), PRIMARY KEY (run, id))";

/// What to run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Choice {
    /// Show what there is.
    List,
    /// Faults chosen at random.
    Mixed,
    /// This one.
    One(Fault),
}

impl ValueEnum for Choice {
    fn value_variants<'a>() -> &'a [Self] {
        &[
            Self::List,
            Self::One(Fault::KillPrimary),
            Self::One(Fault::KillHost),
            Self::One(Fault::FreezePrimary),
            Self::One(Fault::KillAgent),
            Self::One(Fault::FreezeAgent),
            Self::One(Fault::KillFence),
            Self::One(Fault::KillStandby),
            Self::One(Fault::FreezeStandby),
            Self::One(Fault::KillProxy),
            Self::One(Fault::Switchover),
            Self::Mixed,
        ]
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        match self {
            Self::List => Some(clap::builder::PossibleValue::new("list").help("Show the drills")),
            Self::Mixed => Some(
                clap::builder::PossibleValue::new("mixed")
                    .help("Any of these, at random, --count times"),
            ),
            Self::One(fault) => fault.to_possible_value(),
        }
    }
}

/// `craton drill`
#[derive(Args, Debug)]
pub struct DrillArgs {
    /// Which drill
    #[arg(value_enum, default_value = "list")]
    pub drill: Choice,
    /// How many times, one after the other
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,
    /// Clients that write at the same time
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=200))]
    pub writers: u32,
    /// Pause of each client between two writes, in milliseconds
    #[arg(long, default_value_t = 5, value_name = "MS")]
    pub pause_ms: u64,
    /// How long a killed member stays down, in seconds
    #[arg(long, default_value_t = 5, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=600))]
    pub down_for: u64,
    /// How long something stays frozen, in seconds [default: three times the lease]
    #[arg(long = "for", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=600))]
    pub freeze_for: Option<u64>,
    /// How long healing may take after the fault is over, in seconds
    #[arg(long, default_value_t = 90, value_name = "SECONDS")]
    pub heal_within: u64,
    /// Repeats the choices of an earlier `mixed`
    #[arg(long)]
    pub seed: Option<u64>,
}

/// Runs the command.
pub fn run(dir: &Path, args: DrillArgs, json: bool) -> anyhow::Result<u8> {
    if args.drill == Choice::List {
        report::list(json)?;
        return Ok(exit::OK);
    }
    let layout = Layout::require(dir)?;
    if let Some(account) = owner::successor(dir)? {
        let typed: Vec<_> = std::env::args_os().collect();
        let error = owner::again_as(&account, dir, &typed).exec();
        return Err(error).with_context(|| format!("cannot run as {}", account.name));
    }
    wait_for(break_and_measure(layout, args, json))
}

async fn break_and_measure(layout: Layout, args: DrillArgs, json: bool) -> anyhow::Result<u8> {
    let access = Access::local(&layout)?;
    let status = access.status().await?;
    require_redundancy(&status)?;
    let login = Login::superuser(&layout)?.application("craton drill");
    prepare(&layout, &login).await?;
    let seed = args
        .seed
        .unwrap_or_else(|| rand::random_range(0..1_000_000));
    let run = i64::try_from(
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_millis(),
    )
    .unwrap_or(i64::MAX);
    let plan = Plan {
        write: login.at(layout.proxy_port()),
        read: Some(login.at(layout.proxy_read_port())),
        patience: Patience::Drop(STATEMENT_TIMEOUT),
        writers: args.writers,
        pause: Duration::from_millis(args.pause_ms),
        fresh: false,
        run,
        first_id: 1,
        writes_max: WRITES_MAX,
    };
    let freeze = args.freeze_for.map_or(
        Duration::from_millis(status.lease.ttl_ms.max(500) * 3),
        Duration::from_secs,
    );
    let drills = Drills {
        times: Times {
            down_for: Duration::from_secs(args.down_for),
            freeze_for: freeze,
        },
        heal_within: Duration::from_secs(args.heal_within),
        layout,
        access,
        login,
        run,
        recorder: Recorder::start(&plan),
        random: StdRng::seed_from_u64(seed),
    };
    let summary = drills.run_all(&args, seed, &status.durability).await?;
    summary.print(json)?;
    Ok(summary.exit_code())
}

async fn prepare(layout: &Layout, login: &Login) -> anyhow::Result<()> {
    let client = login.connect(layout.proxy_port()).await?;
    client
        .batch_execute(SCHEMA)
        .await
        .map_err(|e| anyhow::anyhow!("cannot make the drill's table: {}", describe(&e)))
}

fn require_redundancy(status: &StatusView) -> anyhow::Result<()> {
    match missing_redundancy(status) {
        None => Ok(()),
        Some(why) => Err(Problem::new(
            exit::REFUSED,
            format!("the cluster is not whole before the drill: {why}"),
            "wait until `craton status` shows every member streaming",
        )
        .into()),
    }
}

/// What keeps the cluster from being fully redundant; `None` when it is.
pub fn missing_redundancy(status: &StatusView) -> Option<String> {
    if !status.writable {
        return Some("no leader accepts writes".to_owned());
    }
    if status.hold || status.election.is_some() {
        return Some("a change of leadership is going on".to_owned());
    }
    for member in &status.members {
        if !member.agent_alive {
            return Some(format!("the agent of {} is silent", member.id));
        }
        if status.leader.as_ref() != Some(&member.id) && !member.streaming {
            return Some(format!("{} does not stream ({})", member.id, member.state));
        }
    }
    if status.durability != "async" && status.members.len() > 1 {
        if status.sync.members.len() + 1 < status.members.len() {
            return Some(format!(
                "only {} of {} standbys protect commits",
                status.sync.members.len(),
                status.members.len() - 1
            ));
        }
        if !status.sync.in_force {
            return Some("the synchronous set is not in force yet".to_owned());
        }
    }
    None
}

/// Everything that a series of drills works with.
struct Drills {
    times: Times,
    heal_within: Duration,
    layout: Layout,
    access: Access,
    login: Login,
    run: i64,
    recorder: Recorder,
    random: StdRng,
}

impl Drills {
    async fn run_all(
        mut self,
        args: &DrillArgs,
        seed: u64,
        durability: &str,
    ) -> anyhow::Result<Summary> {
        self.warm_up().await?;
        let mut results = Vec::new();
        for number in 1..=args.count {
            let fault = match args.drill {
                Choice::One(fault) => fault,
                Choice::Mixed | Choice::List => *faults::ALL
                    .choose(&mut self.random)
                    .unwrap_or(&Fault::KillPrimary),
            };
            let result = tokio::select! {
                result = self.one(number, fault) => result?,
                _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted; what was frozen goes on, what was killed is started again"),
            };
            output::note(result.progress_line());
            let healed = result.redundancy_ms.is_some();
            results.push(result);
            if !healed {
                break;
            }
        }
        let log = self.recorder.finish().await;
        let verdicts = if results.iter().all(|r| r.redundancy_ms.is_some()) {
            verify::everywhere(&self.layout, &self.login, self.run, &log.writes).await?
        } else {
            // A cluster that did not heal cannot be asked everywhere; each drill says what it saw.
            Vec::new()
        };
        Ok(Summary::new(durability, seed, results, &log, verdicts))
    }

    async fn warm_up(&self) -> anyhow::Result<()> {
        let began = Instant::now();
        while self.recorder.acknowledged_since(began) < WARM_UP_WRITES {
            if began.elapsed() > WARM_UP_TIMEOUT {
                let log = self.recorder.log();
                let seen: Vec<_> = log.errors.keys().take(3).cloned().collect();
                let what = format!(
                    "no writes get through the proxy before the drill ({})",
                    seen.join("; ")
                );
                return Err(Problem::new(
                    exit::UNREACHABLE,
                    what,
                    "see `craton status` and log/proxy.log",
                )
                .into());
            }
            sleep(HEAL_POLL).await;
        }
        Ok(())
    }

    /// One drill, from the fault to full redundancy.
    async fn one(&mut self, number: u32, fault: Fault) -> anyhow::Result<DrillResult> {
        let before = self.access.status().await?;
        let target = self.target(fault, &before)?;
        let replaced = self.replaced_by(fault, &target);
        let began = Instant::now();
        faults::inflict(fault, &self.layout, &self.access, &target, self.times).await?;
        let healed = self.healed(began, &replaced).await;
        let until = Instant::now();
        let log = self.recorder.log();
        let after = self.access.status().await.ok();
        let writes: Vec<_> = log
            .writes
            .iter()
            .copied()
            .filter(|w| w.ended >= began)
            .collect();
        let verdict = match (&healed, writes.is_empty()) {
            (Ok(_), false) => Some(self.verdict_on_leader(&writes).await?),
            _ => None,
        };
        Ok(DrillResult::new(report::Observed {
            number,
            fault,
            target,
            began,
            until,
            healed,
            log: &log,
            writes: &writes,
            verdict,
            before: &before,
            after: after.as_ref(),
        }))
    }

    async fn verdict_on_leader(
        &self,
        writes: &[recorder::Write],
    ) -> anyhow::Result<verify::Verdict> {
        let client = self.login.connect(self.layout.proxy_port()).await?;
        let first = writes.iter().map(|w| w.id).min().unwrap_or(1);
        let last = writes.iter().map(|w| w.id).max().unwrap_or(0);
        Ok(verify::judge(
            writes,
            &verify::present(&client, self.run, first, last).await?,
        ))
    }

    fn target(&mut self, fault: Fault, status: &StatusView) -> anyhow::Result<MemberId> {
        let leader = status
            .leader
            .clone()
            .ok_or_else(|| anyhow::anyhow!("there is no leader"))?;
        if !fault.hits_standby() {
            return Ok(leader);
        }
        let standbys: Vec<_> = status
            .members
            .iter()
            .map(|m| &m.id)
            .filter(|id| **id != leader)
            .collect();
        let index = self.random.random_range(0..standbys.len().max(1));
        let chosen = standbys.get(index).map(|id| (*id).clone());
        chosen.ok_or_else(|| {
            Problem::new(
                exit::REFUSED,
                "there is no standby in this cluster",
                "use a drill for the leader",
            )
            .into()
        })
    }

    /// The processes that must be gone and followed by others before the cluster can count as healed:
    /// without this a look that comes too early takes the stale picture for healing.
    fn replaced_by(&self, fault: Fault, target: &MemberId) -> Replaced {
        let agent = Daemon::Node(target.clone()).name();
        let daemon = match fault {
            Fault::KillHost | Fault::KillStandby | Fault::KillAgent => Some(agent),
            Fault::KillProxy => Some(Daemon::Proxy.name()),
            _ => None,
        };
        let old = daemon
            .as_ref()
            .and_then(|name| processes::running(&self.layout, name));
        let data =
            matches!(fault, Fault::KillPrimary).then(|| self.layout.member(target).join("data"));
        let old_postmaster = data.as_deref().and_then(processes::postmaster);
        Replaced {
            daemon,
            old,
            data,
            old_postmaster,
        }
    }

    /// Waits for full redundancy; returns how long after `began` it was reached, or what is missing.
    async fn healed(&self, began: Instant, replaced: &Replaced) -> Result<Duration, String> {
        let deadline = Instant::now() + self.times.down_for + self.heal_within;
        let mut since: Option<Instant> = None;
        loop {
            match self.wholeness(began, replaced).await {
                None => {
                    let first = *since.get_or_insert_with(Instant::now);
                    if first.elapsed() >= HEALED_FOR && self.recorder.acknowledged_since(first) > 0
                    {
                        return Ok(first.duration_since(began));
                    }
                }
                Some(why) if Instant::now() > deadline => return Err(why),
                Some(_) => since = None,
            }
            if Instant::now() > deadline + HEALED_FOR {
                return Err("writes do not get through".to_owned());
            }
            sleep(HEAL_POLL).await;
        }
    }

    /// What is missing; every agent must answer, and all must say the same.
    async fn wholeness(&self, began: Instant, replaced: &Replaced) -> Option<String> {
        if let Some(why) = replaced.missing(&self.layout) {
            return Some(why);
        }
        let mut views = Vec::new();
        for answer in self.access.statuses().await {
            match answer {
                Ok(view) => views.push(view),
                Err(error) => return Some(error.to_string()),
            }
        }
        let leaders: BTreeSet<_> = views.iter().map(|v| (v.term, v.leader.clone())).collect();
        if leaders.len() != 1 {
            return Some("the agents do not agree on the leader yet".to_owned());
        }
        let by_leader = views
            .iter()
            .find(|v| v.leader.as_ref() == Some(&v.answered_by));
        let Some(view) = by_leader else {
            return Some("there is no leader".to_owned());
        };
        missing_redundancy(view).or_else(|| {
            (self.recorder.acknowledged_since(began) == 0)
                .then(|| "no write was acknowledged since the fault".to_owned())
        })
    }
}

/// See [`Drills::replaced_by`].
struct Replaced {
    daemon: Option<String>,
    old: Option<ProcessId>,
    data: Option<std::path::PathBuf>,
    old_postmaster: Option<ProcessId>,
}

impl Replaced {
    fn missing(&self, layout: &Layout) -> Option<String> {
        if let Some(name) = &self.daemon {
            let now = processes::running(layout, name);
            if now.is_none() || now == self.old {
                return Some(format!("{name} is not back yet"));
            }
        }
        if let Some(data) = &self.data {
            let now = processes::postmaster(data);
            if now.is_none() || now == self.old_postmaster {
                return Some("the killed PostgreSQL is not back yet".to_owned());
            }
        }
        None
    }
}
