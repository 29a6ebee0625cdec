//! `craton member`: who takes part, taking members out, and who has a say.

use std::path::Path;
use std::time::Duration;

use clap::Subcommand;
use craton_console::views::{MemberRequest, MembersView};
use craton_core::MemberId;
use tokio::time::Instant;

use crate::access::Access;
use crate::exit::{self, NOT_IN_TIME, Problem, USAGE};
use crate::layout::{Daemon, Layout};
use crate::output::{self, Colour, cell, paint, plain};
use crate::{owner, processes, settings, supervise};

/// How long a change of the members may take before the command stops waiting.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(90);

/// How long a removed member of a local cluster may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// A member that was not heard for this long is shown as silent, in milliseconds.
const SILENT_MS: u64 = 3000;

/// `craton member`
#[derive(Subcommand, Debug)]
pub enum MemberCommand {
    /// Members, their coordinators' addresses, and who has a say
    List,
    /// Take a member out: no commit waits for it any more, then it has no say, then it is forgotten
    Remove {
        /// Which
        member: MemberId,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Give a member that joined a say in the coordinator
    Promote {
        /// Which
        member: MemberId,
    },
    /// Take a member's say in the coordinator away; it stays a member
    Demote {
        /// Which
        member: MemberId,
    },
}

/// Runs the command.
pub async fn run(
    access: &Access,
    dir: &Path,
    command: MemberCommand,
    json: bool,
) -> anyhow::Result<u8> {
    let view = match command {
        MemberCommand::List => access.get::<MembersView>("/v1/members").await?,
        MemberCommand::Promote { member } => ask(access, "promote", member).await?,
        MemberCommand::Demote { member } => ask(access, "demote", member).await?,
        MemberCommand::Remove { member, yes } => {
            if !yes && !confirmed(&member)? {
                return Ok(exit::FAILURE);
            }
            if let Some(account) = local_owner(dir)? {
                // The description of a local cluster belongs to its user.
                let mut typed: Vec<_> = std::env::args_os().collect();
                if !yes {
                    typed.push("--yes".into());
                }
                return owner::to_the_end(owner::again_as(&account, dir, &typed)).await;
            }
            let view = ask(access, "remove", member.clone()).await?;
            forget_local(dir, &member).await?;
            view
        }
    };
    if json {
        output::json(&view)?;
    } else {
        output::line(render(&view));
    }
    Ok(exit::OK)
}

/// Asks a member that stays: the one that is removed would be cut off from the answer.
async fn ask(access: &Access, what: &str, member: MemberId) -> anyhow::Result<MembersView> {
    let status = access.status().await?;
    let stays = status
        .members
        .iter()
        .filter(|m| m.agent_alive && m.id != member);
    let first = stays
        .max_by_key(|m| status.leader.as_ref() == Some(&m.id))
        .map(|m| m.api.clone());
    let path = format!("/v1/members/{what}");
    let request = MemberRequest { member };
    access
        .post(first.as_deref(), &path, &request, CHANGE_TIMEOUT)
        .await
}

fn confirmed(member: &MemberId) -> anyhow::Result<bool> {
    use std::io::IsTerminal as _;
    if !std::io::stdin().is_terminal() {
        return Err(Problem::new(
            USAGE,
            format!("{member} is removed only when that is confirmed"),
            "type --yes where nobody can be asked",
        )
        .into());
    }
    output::note(format!(
        "{member} will be taken out of the cluster and its PostgreSQL stopped; its files stay. Type its name to go on:"
    ));
    let mut typed = String::new();
    std::io::stdin().read_line(&mut typed)?;
    let same = typed.trim() == member.as_str();
    if !same {
        output::note("that is another name; nothing was done");
    }
    Ok(same)
}

/// The account that a local cluster belongs to, where that is not the one that runs this.
pub fn local_owner(dir: &Path) -> anyhow::Result<Option<owner::Account>> {
    if Layout::load(dir)?.is_none() {
        return Ok(None);
    }
    owner::successor(dir)
}

/// A member of the local cluster is taken out of its description too, and its files put aside.
async fn forget_local(dir: &Path, member: &MemberId) -> anyhow::Result<()> {
    let Some(mut layout) = Layout::load(dir)? else {
        return Ok(());
    };
    if !layout.cluster.members.contains(member) {
        return Ok(());
    }
    layout.cluster.members.retain(|m| m != member);
    layout.write()?;
    settings::write_all(&layout)?;
    let name = Daemon::Node(member.clone()).name();
    // A start that was under way when the description changed is the last one.
    tokio::time::sleep(supervise::DESCRIPTION_POLL).await;
    let deadline = Instant::now() + STOP_TIMEOUT;
    if let Some(agent) = processes::running(&layout, &name) {
        output::note(format!("{member} stops …"));
        if !processes::all_gone([agent], deadline).await {
            return Err(Problem::new(
                NOT_IN_TIME,
                format!(
                    "{member} is removed, but its agent runs still after {} s",
                    STOP_TIMEOUT.as_secs()
                ),
                format!("see {}", layout.log_of(&name).display()),
            )
            .into());
        }
    }
    output::note(format!(
        "the files of {member} stay in {}",
        layout.member(member).display()
    ));
    Ok(())
}

/// The table of members.
pub fn render(view: &MembersView) -> String {
    let voters = view.members.iter().filter(|m| m.voter).count();
    let mut table = output::table(&["MEMBER", "ROLE", "SAY", "COORDINATOR", "HEARD"]);
    for member in &view.members {
        let heard = match member.heard_ms_ago {
            None => cell(Colour::Red, "never"),
            Some(ms) if ms > SILENT_MS => cell(
                Colour::Red,
                format!("{} ago", output::duration(Duration::from_millis(ms))),
            ),
            Some(_) => plain("yes"),
        };
        table.add_row(vec![
            cell(Colour::Cyan, member.member.as_str()),
            plain(if member.data { "data" } else { "witness" }),
            plain(if member.voter { "voter" } else { "-" }),
            plain(member.address.as_deref().unwrap_or("-")),
            heard,
        ]);
    }
    let mut lines = vec![
        format!(
            "{} {}  {voters} voters, {} needed  {} changes of the voters so far",
            paint(Colour::Dim, "cluster"),
            paint(Colour::Bold, &view.cluster),
            view.majority,
            view.epoch,
        ),
        String::new(),
        output::table_text(&table),
    ];
    if !view.removed.is_empty() {
        let names: Vec<&str> = view.removed.iter().map(MemberId::as_str).collect();
        lines.push(format!("removed: {}", names.join(", ")));
    }
    lines.join("\n")
}
