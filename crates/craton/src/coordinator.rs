//! `craton coordinator`: where the cluster's records are, and moving them while the cluster runs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use craton_agent::{Backend, MoveRequest, Place, RebuildRequest};
use craton_console::views::{CoordinatorView, DoneView, StatusView};
use craton_core::MemberId;
use tokio::task::JoinSet;

use crate::access::Access;
use crate::ask::{self, who};
use crate::exit::{self, Problem, USAGE};
use crate::layout::Layout;
use crate::output::{self, Colour, cell, paint, plain};
use crate::{member, owner, settings};

/// The longest a move may take before the command stops waiting; it goes on by itself.
const MOVE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long one agent may take to ask every endpoint.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// Where records can be kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum Kind {
    /// In the members themselves; nothing else to install
    #[default]
    Embedded,
    /// In an etcd that is there already, version 3.4 or newer
    Etcd,
}

/// How etcd is reached.
#[derive(Args, Clone, Debug, Default)]
pub struct EtcdArgs {
    /// etcd's client addresses, all of one etcd cluster
    #[arg(long, value_name = "URL,…", value_delimiter = ',')]
    pub endpoints: Vec<String>,
    /// What the cluster's keys in etcd begin with [default: /craton/CLUSTER/]
    #[arg(long, value_name = "PREFIX")]
    pub etcd_prefix: Option<String>,
    /// etcd user
    #[arg(long, value_name = "NAME")]
    pub etcd_user: Option<String>,
    /// File with the user's password, on every member's host
    #[arg(long, value_name = "FILE")]
    pub etcd_password_file: Option<PathBuf>,
    /// File with the authorities of etcd's certificate, on every member's host [default: the system's]
    #[arg(long, value_name = "FILE")]
    pub etcd_ca: Option<PathBuf>,
    /// File with the client certificate for etcd, on every member's host
    #[arg(long, value_name = "FILE")]
    pub etcd_cert: Option<PathBuf>,
    /// File with that certificate's key, on every member's host
    #[arg(long, value_name = "FILE")]
    pub etcd_key: Option<PathBuf>,
}

impl EtcdArgs {
    /// The place that was typed.
    pub fn place(&self, kind: Kind) -> anyhow::Result<Place> {
        let absolute = |path: &Option<PathBuf>| path.as_ref().map(std::path::absolute).transpose();
        let place = Place {
            backend: match kind {
                Kind::Embedded => Backend::Embedded,
                Kind::Etcd => Backend::Etcd,
            },
            endpoints: self.endpoints.clone(),
            prefix: self.etcd_prefix.clone(),
            username: self.etcd_user.clone(),
            password_file: absolute(&self.etcd_password_file)?,
            ca_file: absolute(&self.etcd_ca)?,
            cert_file: absolute(&self.etcd_cert)?,
            key_file: absolute(&self.etcd_key)?,
        };
        let hint = match kind {
            Kind::Embedded => "--endpoints and --etcd-… go with etcd alone",
            Kind::Etcd => {
                "for example --endpoints http://10.0.0.1:2379,http://10.0.0.2:2379,http://10.0.0.3:2379"
            }
        };
        place
            .validate()
            .map_err(|why| Problem::new(USAGE, why, hint))?;
        Ok(place)
    }
}

/// `craton coordinator`
#[derive(Subcommand, Debug)]
pub enum CoordinatorCommand {
    /// Where the cluster's records are, and how each member reaches them
    Status,
    /// Move the records of the running cluster: no outage, no new leader
    ///
    /// Refused where a member cannot use the new place. A move that is cut off anywhere goes on by itself; asking
    /// for the same again is harmless, and asking for the former place takes back what has not begun.
    Move(MoveArgs),
    /// Write the records anew into an etcd that was emptied, or restored from an old copy
    ///
    /// The leader writes what it knows. Restoring etcd's newest snapshot is the other way; where it is not older than the
    /// last change of the leadership, nothing else is needed.
    Rebuild(RebuildArgs),
}

/// `craton coordinator rebuild`
#[derive(Args, Debug)]
pub struct RebuildArgs {
    /// Where nobody leads: the member that knows the newest records by `craton coordinator status`, with all members running. What it does not know is lost
    #[arg(long, value_name = "MEMBER")]
    pub from: Option<MemberId>,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

/// `craton coordinator move`
#[derive(Args, Debug)]
pub struct MoveArgs {
    /// Where to
    #[arg(long, value_enum)]
    pub to: Kind,
    /// How etcd is reached
    #[command(flatten)]
    pub etcd: EtcdArgs,
    /// Also where a member does not answer, or cannot use the new place: it follows when it can
    #[arg(long)]
    pub force: bool,
}

/// Runs the command.
pub async fn run(
    access: &Access,
    dir: &Path,
    command: CoordinatorCommand,
    json: bool,
) -> anyhow::Result<u8> {
    match command {
        CoordinatorCommand::Status => show(access, json).await,
        CoordinatorCommand::Move(args) => relocate(access, dir, args, json).await,
        CoordinatorCommand::Rebuild(args) => rebuild(access, args, json).await,
    }
}

async fn rebuild(access: &Access, args: RebuildArgs, json: bool) -> anyhow::Result<u8> {
    ask::must_be_meant(
        args.yes,
        "whatever the etcd holds under this cluster's prefix is replaced by the records that a member knows",
    )?;
    let status = access.status().await?;
    let request = RebuildRequest {
        force: args.from.is_some(),
        by: Some(who()),
    };
    let path = "/v1/coordinator/rebuild";
    let done: DoneView = if let Some(from) = &args.from {
        // No other member's records are meant.
        let seen = views(access, &status).await;
        let named = seen
            .iter()
            .find(|s| s.answer.as_ref().is_ok_and(|v| v.member == *from));
        let Some(named) = named else {
            return Err(Problem::new(
                exit::FAILURE,
                format!("no member {from} answers"),
                "see craton coordinator status for the members that do",
            )
            .into());
        };
        let client = access.client().clone().with_timeout(MOVE_TIMEOUT);
        client.post_json(&named.api, path, &request).await?
    } else {
        let first = ask::leader_api(&status);
        access
            .post(first.as_deref(), path, &request, MOVE_TIMEOUT)
            .await?
    };
    if json {
        output::json(&done)?;
    } else {
        output::line(&done.text);
    }
    Ok(exit::OK)
}

/// What one agent says of the records' store.
struct Looked {
    name: String,
    api: String,
    answer: Result<CoordinatorView, String>,
}

/// Every member's word. Where the records cannot be read nobody knows the members: then that of every agent whose address
/// is known here.
async fn views(access: &Access, status: &StatusView) -> Vec<Looked> {
    let members = status
        .members
        .iter()
        .map(|m| (m.id.to_string(), m.api.clone()));
    let mut targets: Vec<_> = members.collect();
    if targets.len() <= 1 {
        targets = access
            .agents
            .iter()
            .map(|a| (a.clone(), a.clone()))
            .collect();
    }
    let client = access.client().clone().with_timeout(LOOK_TIMEOUT);
    let mut asked = JoinSet::new();
    for (i, (name, api)) in targets.into_iter().enumerate() {
        let client = client.clone();
        asked.spawn(async move {
            let answer = client.get_json::<CoordinatorView>(&api, "/v1/coordinator");
            let answer = answer.await.map_err(|e| e.to_string());
            let name = answer.as_ref().map_or(name, |v| v.member.to_string());
            (i, Looked { name, api, answer })
        });
    }
    let mut answers = asked.join_all().await;
    answers.sort_by_key(|(i, _)| *i);
    answers.into_iter().map(|(_, looked)| looked).collect()
}

async fn relocate(access: &Access, dir: &Path, args: MoveArgs, json: bool) -> anyhow::Result<u8> {
    let place = args.etcd.place(args.to)?;
    let local = Layout::load(dir)?.filter(|l| access.agents == l.api_addresses());
    if local.is_some()
        && let Some(account) = member::local_owner(dir)?
    {
        // The description of a local cluster belongs to its user.
        let typed: Vec<_> = std::env::args_os().collect();
        return owner::to_the_end(owner::again_as(&account, dir, &typed)).await;
    }
    let request = MoveRequest {
        place: place.clone(),
        force: args.force,
        by: Some(who()),
    };
    let status = access.status().await?;
    let first = ask::leader_api(&status);
    let done: DoneView = access
        .post(
            first.as_deref(),
            "/v1/coordinator/move",
            &request,
            MOVE_TIMEOUT,
        )
        .await?;
    // Read anew: a member may have come or gone while the records moved.
    if local.is_some()
        && let Some(mut layout) = Layout::load(dir)?
    {
        layout.cluster.coordinator = place;
        layout.write()?;
        settings::write_all(&layout)?;
    }
    if json {
        output::json(&done)?;
    } else {
        output::line(&done.text);
    }
    Ok(exit::OK)
}

async fn show(access: &Access, json: bool) -> anyhow::Result<u8> {
    let status = access.status().await?;
    let answers = views(access, &status).await;
    if json {
        let views: Vec<_> = answers
            .iter()
            .filter_map(|looked| looked.answer.as_ref().ok())
            .collect();
        output::json(&views)?;
        return Ok(exit::OK);
    }
    output::line(format!(
        "{} {}  records in {}\n",
        paint(Colour::Dim, "cluster"),
        paint(Colour::Bold, &status.cluster),
        status.coordinator
    ));
    let mut table = output::table(&["MEMBER", "RECORDS IN", "PREFIX", "STATE"]);
    for looked in &answers {
        let mut row = vec![cell(Colour::Cyan, &looked.name)];
        match &looked.answer {
            Ok(view) => {
                row.push(plain(&view.backend));
                row.push(plain(view.prefix.as_deref().unwrap_or("-")));
                let (colour, state) = state(view);
                row.push(cell(colour, state));
            }
            Err(why) => {
                row.extend([plain("?"), plain("-")]);
                row.push(cell(Colour::Red, why));
            }
        }
        table.add_row(row);
    }
    output::line(output::table_text(&table));
    Ok(exit::OK)
}

/// What is to be said of a member's way to the records.
fn state(view: &CoordinatorView) -> (Colour, String) {
    let mut lines = Vec::new();
    let answered: Vec<u64> = view.endpoints.iter().filter_map(|e| e.ms).collect();
    let mut colour = Colour::Green;
    if !view.endpoints.is_empty() {
        let slowest = answered.iter().max();
        let slowest = slowest.map_or_else(String::new, |ms| format!(", {ms} ms at most"));
        lines.push(format!(
            "{} of {} endpoints answer{slowest}",
            answered.len(),
            view.endpoints.len()
        ));
    }
    for e in &view.endpoints {
        if let Some(error) = &e.error {
            colour = Colour::Yellow;
            lines.push(error.clone());
        }
    }
    lines.extend(view.progress.clone().inspect(|_| colour = Colour::Yellow));
    lines.extend(view.trouble.clone().inspect(|_| colour = Colour::Red));
    if lines.is_empty() {
        lines.push("in use".to_owned());
    }
    (colour, lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_together_is_refused_with_an_example() {
        let none = EtcdArgs::default().place(Kind::Etcd).unwrap_err();
        assert!(none.to_string().contains("endpoints"), "{none}");
        let both = EtcdArgs {
            endpoints: vec!["http://a:1".into()],
            ..EtcdArgs::default()
        };
        assert!(both.place(Kind::Embedded).is_err());
        let place = both.place(Kind::Etcd).unwrap();
        assert_eq!(place.endpoints, ["http://a:1"]);
        assert_eq!(
            EtcdArgs::default().place(Kind::Embedded).unwrap(),
            Place::default()
        );
    }
}
