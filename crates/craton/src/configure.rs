//! `craton config`: the cluster-wide settings, and PostgreSQL's parameters for all members.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::process::Command;
use std::time::Duration;

use clap::Subcommand;
use craton_console::ClientError;
use craton_console::views::{ConfigChangeView, ConfigRequest, ConfigRow, ConfigView, MemberView};
use craton_core::settings::POSTGRESQL;
use craton_core::topology::MemberRole;
use tokio::time::Instant;
use toml::de::{DeTable, DeValue};

use crate::access::Access;
use crate::ask;
use crate::container;
use crate::container::environment::Kind;
use crate::container::settings::Own;
use crate::exit::{self, Problem};
use crate::output::{self, Colour, cell, paint, plain};

/// PostgreSQL is asked about new parameters, which takes a moment.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(20);
/// A member that runs says within a fraction of this what waits for a restart.
const PENDING_KNOWN_MAX: Duration = Duration::from_secs(5);
/// How often it is asked.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// The sub-commands of `craton config`.
#[derive(Subcommand, Debug)]
pub enum ConfigCommand {
    /// Every setting with its value
    Show {
        /// Also where each value comes from
        #[arg(long)]
        origin: bool,
        /// Only these
        #[arg(value_name = "NAME")]
        names: Vec<String>,
    },
    /// Change settings: checked first, then in force on every member without a restart where that is possible
    ///
    /// Times and sizes take units (ttl_ms=3s, max_lag_bytes=64MB). A parameter of PostgreSQL is written
    /// postgresql.NAME=VALUE and goes to every member. Several at once are checked, and changed, together.
    Set {
        /// What to what
        #[arg(value_name = "NAME=VALUE", required = true)]
        values: Vec<String>,
        /// Only if the settings are still of this revision (craton config show --json)
        #[arg(long)]
        revision: Option<u64>,
    },
    /// Set back to the default; a parameter of PostgreSQL is taken out
    Unset {
        /// What
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
        /// Only if the settings are still of this revision
        #[arg(long)]
        revision: Option<u64>,
    },
    /// Change settings in $VISUAL or $EDITOR, as TOML
    Edit,
}

/// What the daemon of this container was told, where that is all that is asked for: a proxy or a backup daemon shows it
/// without asking the cluster.
pub fn show_own(command: &ConfigCommand) -> anyhow::Result<bool> {
    let ConfigCommand::Show {
        origin: true,
        names,
    } = command
    else {
        return Ok(false);
    };
    match container::settings::own()? {
        Some((kind, own)) if kind != Kind::Node && names.is_empty() => {
            output::line(own_table(&own));
            Ok(true)
        }
        _ => Ok(false),
    }
}

fn own_table(own: &[Own]) -> String {
    let mut table = output::table(&["HERE", "VALUE", "ORIGIN"]);
    for row in own {
        table.add_row(vec![
            cell(Colour::Cyan, &row.name),
            plain(&row.value),
            plain(&row.origin),
        ]);
    }
    output::table_text(&table)
}

/// Runs the command.
pub async fn run(access: &Access, command: ConfigCommand, json: bool) -> anyhow::Result<u8> {
    match command {
        ConfigCommand::Show { origin, names } => show(access, origin, &names, json).await,
        ConfigCommand::Set { values, revision } => {
            let set = values
                .iter()
                .map(|v| pair(v))
                .collect::<anyhow::Result<BTreeMap<_, _>>>()?;
            let request = ConfigRequest {
                revision,
                set,
                ..ConfigRequest::default()
            };
            report(&change(access, request).await?, json)
        }
        ConfigCommand::Unset { names, revision } => {
            let request = ConfigRequest {
                revision,
                unset: names,
                ..ConfigRequest::default()
            };
            report(&change(access, request).await?, json)
        }
        ConfigCommand::Edit => edit(access, json).await,
    }
}

fn pair(text: &str) -> anyhow::Result<(String, String)> {
    let split = text.split_once('=').filter(|(name, _)| !name.is_empty());
    let (name, value) = split.ok_or_else(|| {
        Problem::new(
            exit::USAGE,
            format!("\"{text}\" cannot be understood"),
            "write NAME=VALUE, for example ttl_ms=3s or postgresql.work_mem=8MB",
        )
    })?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

/// The settings as the leader's agent has them, or any other's.
pub async fn settings(access: &Access) -> anyhow::Result<ConfigView> {
    let status = access.status().await?;
    match ask::leader_api(&status) {
        Some(api) => Ok(access.client().get_json(&api, "/v1/config").await?),
        None => access.get("/v1/config").await,
    }
}

async fn change(access: &Access, request: ConfigRequest) -> anyhow::Result<ConfigChangeView> {
    let request = ConfigRequest {
        by: Some(ask::who()),
        ..request
    };
    let status = access.status().await?;
    let first = ask::leader_api(&status);
    let changed: ConfigChangeView = access
        .post(first.as_deref(), "/v1/config", &request, CHANGE_TIMEOUT)
        .await?;
    if !changed.changed.is_empty() && !changed.restart.is_empty() {
        until_pending(access, &changed.restart).await;
    }
    Ok(changed)
}

/// Waits until the members say of these parameters that they wait for a restart: `craton restart --all --pending` right
/// after the command must find them. A member with a value of its own, or that runs with the new one, never says so.
async fn until_pending(access: &Access, names: &[String]) {
    let deadline = Instant::now() + PENDING_KNOWN_MAX;
    let waits_for = |m: &MemberView, name: &String| {
        m.pending_restart.iter().any(|p| {
            p.split_once(':')
                .is_some_and(|(n, _)| n.eq_ignore_ascii_case(name))
        })
    };
    while Instant::now() < deadline {
        if let Ok(status) = access.status().await
            && status
                .members
                .iter()
                .filter(|m| m.agent_alive && m.role != MemberRole::Down)
                .all(|m| names.iter().all(|name| waits_for(m, name)))
        {
            return;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn show(access: &Access, origin: bool, names: &[String], json: bool) -> anyhow::Result<u8> {
    let mut view = settings(access).await?;
    if !names.is_empty() {
        if let Some(name) = names
            .iter()
            .find(|n| !view.settings.iter().any(|row| row.name == **n))
        {
            let what = format!("there is no setting \"{name}\", or it is not set");
            return Err(Problem::new(exit::USAGE, what, "craton config show lists all").into());
        }
        view.settings.retain(|row| names.contains(&row.name));
    }
    if json {
        output::json(&view)?;
        return Ok(exit::OK);
    }
    let mut header = vec!["SETTING", "VALUE", "DEFAULT"];
    if origin {
        header.push("ORIGIN");
    }
    let mut table = output::table(&header);
    for row in &view.settings {
        let value = format!("{} {}", row.value, row.unit).trim_end().to_owned();
        let changed = row.default.as_ref().is_some_and(|d| *d != row.value);
        let mut cells = vec![
            cell(Colour::Cyan, &row.name),
            if changed {
                cell(Colour::Bold, value)
            } else {
                plain(value)
            },
            cell(Colour::Dim, row.default.as_deref().unwrap_or("-")),
        ];
        if origin {
            let whose = match (&view.member, row.shared) {
                (Some(member), false) => format!("{} ({member} alone)", row.origin),
                _ => row.origin.clone(),
            };
            cells.push(plain(whose));
        }
        table.add_row(cells);
    }
    output::line(output::table_text(&table));
    if origin
        && names.is_empty()
        && let Some((_, own)) = container::settings::own()?
    {
        output::line(format!("\n{}", own_table(&own)));
    }
    Ok(exit::OK)
}

fn report(view: &ConfigChangeView, json: bool) -> anyhow::Result<u8> {
    if json {
        output::json(view)?;
        return Ok(exit::OK);
    }
    if view.changed.is_empty() {
        output::line("nothing to change: the settings are so already");
    }
    for change in &view.changed {
        output::line(change);
    }
    for note in &view.notes {
        output::note(format!("{} {note}", paint(Colour::Yellow, "note:")));
    }
    if !view.restart.is_empty() {
        output::line(format!(
            "{} {} in force after a restart: craton restart --all --pending",
            view.restart.join(", "),
            if view.restart.len() == 1 { "is" } else { "are" }
        ));
    }
    Ok(exit::OK)
}

async fn edit(access: &Access, json: bool) -> anyhow::Result<u8> {
    let view = settings(access).await?;
    let before = as_toml(&view);
    let directory = std::env::temp_dir();
    let path = directory.join(format!("craton-config-{}.toml", std::process::id()));
    crate::secrets::write_private(&path, &before)?;
    let outcome = edit_until_right(access, &view, &path).await;
    let keep = outcome.is_err();
    if !keep {
        let _ = std::fs::remove_file(&path);
    }
    match outcome {
        Ok(Some(changed)) => report(&changed, json),
        Ok(None) => {
            output::line("nothing was changed");
            Ok(exit::OK)
        }
        Err(error) => Err(error.context(format!("your text is kept in {}", path.display()))),
    }
}

/// Opens the editor, again if what comes back is wrong and somebody sits there.
async fn edit_until_right(
    access: &Access,
    view: &ConfigView,
    path: &std::path::Path,
) -> anyhow::Result<Option<ConfigChangeView>> {
    loop {
        open_editor(path)?;
        let text = std::fs::read_to_string(path)?;
        let attempt = match difference(view, &text) {
            Ok(request) if request.set.is_empty() && request.unset.is_empty() => return Ok(None),
            Ok(request) => change(access, request).await.map_err(|e| locate(&text, e)),
            Err(why) => {
                Err(Problem::new(exit::USAGE, why, "craton config show lists the settings").into())
            }
        };
        match attempt {
            Ok(changed) => return Ok(Some(changed)),
            Err(error) if std::io::stdin().is_terminal() => {
                output::print_error(&error, false);
                if !ask::confirm("edit again?")? {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

fn open_editor(path: &std::path::Path) -> anyhow::Result<()> {
    let named = ["VISUAL", "EDITOR"]
        .iter()
        .find_map(|v| std::env::var(v).ok().filter(|e| !e.trim().is_empty()));
    let editor = named.unwrap_or_else(|| "vi".to_owned());
    // As git does: the variable may hold arguments.
    let status = Command::new("sh")
        .arg("-c")
        .arg(format!("{editor} \"$1\""))
        .arg("sh")
        .arg(path)
        .status();
    let status = status.map_err(|e| {
        Problem::machine(
            format!("cannot run the editor \"{editor}\": {e}"),
            "set EDITOR, or use craton config set",
        )
    })?;
    if status.success() {
        return Ok(());
    }
    Err(Problem::new(
        exit::FAILURE,
        format!("the editor \"{editor}\" ended with {status}"),
        "nothing was changed; set EDITOR to one that works here",
    )
    .into())
}

/// The settings as a file to edit.
fn as_toml(view: &ConfigView) -> String {
    let mut text = format!(
        "# Settings of the cluster, revision {}. Save and leave the editor to change them.\n",
        view.revision
    );
    let shared: Vec<&ConfigRow> = view.settings.iter().filter(|r| r.shared).collect();
    let (parameters, fields): (Vec<_>, Vec<_>) = shared
        .into_iter()
        .partition(|r| r.name.starts_with(POSTGRESQL));
    for row in fields {
        let default = row.default.as_deref().unwrap_or("none");
        let value = if row.value.parse::<u64>().is_ok() || row.value.parse::<bool>().is_ok() {
            row.value.clone()
        } else {
            toml::Value::from(row.value.as_str()).to_string()
        };
        text.push_str(&format_lines(&row.doc));
        let _ = write!(
            text,
            "# {}; default {default}\n{} = {value}\n",
            row.range, row.name
        );
    }
    text.push_str("\n# PostgreSQL's parameters for every member.\n[postgresql]\n");
    for row in parameters {
        let name = row.name.strip_prefix(POSTGRESQL).unwrap_or(&row.name);
        let name = toml::Value::from(name).to_string();
        let bare = name.trim_matches('"');
        let key = if bare.contains('.') { &name } else { bare };
        let value = toml::Value::from(row.value.as_str());
        let _ = writeln!(text, "{key} = {value}");
    }
    text
}

fn format_lines(doc: &str) -> String {
    format!("\n# {doc}\n")
}

/// What an edited file asks to change; an error names the line.
fn difference(view: &ConfigView, text: &str) -> Result<ConfigRequest, String> {
    let at = |offset: usize| {
        let before = text.get(..offset).unwrap_or(text);
        before.matches('\n').count() + 1
    };
    let parsed = DeTable::parse(text).map_err(|e| {
        let line = e.span().map_or(1, |s| at(s.start));
        format!("line {line}: {}", e.message())
    })?;
    let mut wanted = BTreeMap::new();
    for (key, value) in parsed.get_ref() {
        let line = at(key.span().start);
        match (key.get_ref().as_ref(), value.get_ref()) {
            ("postgresql", DeValue::Table(table)) => {
                for (name, value) in table {
                    let line = at(name.span().start);
                    let text = scalar(value.get_ref()).ok_or_else(|| {
                        format!("line {line}: {} is not a plain value", name.get_ref())
                    })?;
                    wanted.insert(format!("{POSTGRESQL}{}", name.get_ref()), text);
                }
            }
            (name, value) => {
                if craton_core::settings::field(name).is_none() {
                    return Err(format!("line {line}: there is no setting \"{name}\""));
                }
                let text = scalar(value)
                    .ok_or_else(|| format!("line {line}: {name} is not a plain value"))?;
                craton_core::settings::Settings::default()
                    .with(name, &text)
                    .map_err(|why| format!("line {line}: {why}"))?;
                wanted.insert(name.to_owned(), text);
            }
        }
    }
    let shared: BTreeMap<&str, &str> = view
        .settings
        .iter()
        .filter(|r| r.shared)
        .map(|r| (r.name.as_str(), r.value.as_str()))
        .collect();
    let unset = shared
        .keys()
        .filter(|name| !wanted.contains_key(**name))
        .map(|name| (*name).to_owned())
        .collect();
    wanted.retain(|name, value| shared.get(name.as_str()) != Some(&value.as_str()));
    Ok(ConfigRequest {
        revision: Some(view.revision),
        set: wanted,
        unset,
        by: None,
    })
}

fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.as_str().to_owned()),
        DeValue::Float(number) => Some(number.as_str().to_owned()),
        DeValue::Boolean(yes) => Some(yes.to_string()),
        _ => None,
    }
}

/// A refusal names a setting: where in the text is it?
fn locate(text: &str, error: anyhow::Error) -> anyhow::Error {
    let Some(ClientError::Refused { error: why, .. }) = error.downcast_ref::<ClientError>() else {
        return error;
    };
    let line = text.lines().position(|l| {
        let key = l
            .split('=')
            .next()
            .unwrap_or_default()
            .trim()
            .trim_matches('"');
        !key.is_empty() && !key.starts_with(['#', '[']) && l.contains('=') && why.contains(key)
    });
    match line {
        Some(line) => error.context(format!("line {}", line + 1)),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, value: &str, default: Option<&str>) -> ConfigRow {
        ConfigRow {
            name: name.into(),
            value: value.into(),
            default: default.map(Into::into),
            range: "some".into(),
            doc: "What it does.".into(),
            shared: true,
            ..ConfigRow::default()
        }
    }

    fn view() -> ConfigView {
        ConfigView {
            revision: 7,
            member: None,
            settings: vec![
                row("ttl_ms", "2000", Some("2000")),
                row("durability", "quorum", Some("quorum")),
                row("postgresql.work_mem", "8MB", None),
                row("postgresql.my.thing", "it's \"x\"", None),
            ],
        }
    }

    #[test]
    fn an_unchanged_file_changes_nothing() {
        let request = difference(&view(), &as_toml(&view())).unwrap();
        assert_eq!(
            (request.set.len(), request.unset.len()),
            (0, 0),
            "{request:?}"
        );
        assert_eq!(request.revision, Some(7));
    }

    #[test]
    fn what_is_changed_added_and_removed() {
        let text = as_toml(&view())
            .replace("ttl_ms = 2000", "ttl_ms = \"3s\"")
            .replace("work_mem = \"8MB\"", "max_connections = 200");
        let request = difference(&view(), &text).unwrap();
        let set: Vec<_> = request
            .set
            .iter()
            .map(|(k, v)| format!("{k}={v}"))
            .collect();
        assert_eq!(set, ["postgresql.max_connections=200", "ttl_ms=3s"]);
        assert_eq!(request.unset, ["postgresql.work_mem"]);
    }

    #[test]
    fn mistakes_name_their_line() {
        let wrong = |from: &str, to: &str| {
            difference(&view(), &as_toml(&view()).replace(from, to)).unwrap_err()
        };
        let text = as_toml(&view());
        let line = 1 + text.lines().position(|l| l.starts_with("ttl_ms")).unwrap();
        for (to, says) in [
            ("ttl_ms = 1", "out of range"),
            ("ttl_ms = [1]", "plain value"),
            ("tll_ms = 2000", "no setting"),
            ("ttl_ms = ", ""),
        ] {
            let error = wrong("ttl_ms = 2000", to);
            assert!(
                error.starts_with(&format!("line {line}: ")),
                "{to}: {error}"
            );
            assert!(error.contains(says), "{error}");
        }
        let refused = ClientError::Refused {
            address: "a".into(),
            status: 422,
            error: "ttl_ms = 3 is out of range".into(),
            hint: None,
        };
        assert_eq!(
            locate(&text, refused.into()).to_string(),
            format!("line {line}")
        );
    }
}
