//! `craton divergence`: what members kept of WAL that the cluster does not have.

use clap::Subcommand;
use craton_agent::views::DivergenceView;
use craton_console::ClientError;
use craton_core::MemberId;
use craton_pg::DivergenceSummary;

use crate::access::Access;
use crate::exit::{self, Problem};
use crate::output::{self, Colour, cell, paint, plain};

/// Transactions that `show` prints; `--json` has all that are listed.
const TRANSACTIONS_SHOWN: usize = 10;

/// The sub-commands of `craton divergence`.
#[derive(Subcommand, Debug)]
pub enum DivergenceCommand {
    /// What every member kept, oldest first
    List,
    /// Transactions, relations and rows of one, and how to get them out
    Show {
        /// Its name, as `craton divergence list` shows it
        id: String,
        /// Only of this member
        #[arg(long, value_name = "MEMBER")]
        member: Option<MemberId>,
    },
}

/// Runs the command.
pub async fn run(access: &Access, command: DivergenceCommand, json: bool) -> anyhow::Result<u8> {
    let (views, silent) = ask(access).await?;
    for (member, error) in &silent {
        output::note(format!("{member} was not asked: {error}"));
    }
    match command {
        DivergenceCommand::List => list(&views, json),
        DivergenceCommand::Show { id, member } => show(&views, &id, member.as_ref(), json),
    }
}

/// What members keep, and who could not be asked.
type Asked = (Vec<DivergenceView>, Vec<(MemberId, ClientError)>);

/// Each member keeps its own.
async fn ask(access: &Access) -> anyhow::Result<Asked> {
    let status = access.status().await?;
    let (mut views, mut silent) = (Vec::new(), Vec::new());
    for member in status.members {
        let answer = access
            .client()
            .get_json::<DivergenceView>(&member.api, "/v1/divergence")
            .await;
        match answer {
            Ok(view) => views.push(view),
            Err(error) => silent.push((member.id, error)),
        }
    }
    Ok((views, silent))
}

fn list(views: &[DivergenceView], json: bool) -> anyhow::Result<u8> {
    if json {
        output::json(&views)?;
        return Ok(exit::OK);
    }
    if views.iter().all(|v| v.kept.is_empty()) {
        output::line("no member has WAL that the cluster does not have");
        return Ok(exit::OK);
    }
    let mut table = output::table(&[
        "MEMBER",
        "DIVERGENCE",
        "KEPT",
        "TIMELINE",
        "FROM",
        "TO",
        "TRANSACTIONS",
        "ROWS",
        "SIZE",
    ]);
    for view in views {
        for kept in &view.kept {
            table.add_row(vec![
                cell(Colour::Cyan, view.member.as_str()),
                plain(&kept.id),
                cell(Colour::Dim, when(kept.kept_at_ms)),
                plain(kept.timeline.to_string()),
                plain(kept.from.to_string()),
                plain(kept.last_record.to_string()),
                plain(output::count(kept.commits)),
                plain(output::count(rows(kept))),
                plain(output::bytes(kept.bytes)),
            ]);
        }
    }
    output::line(output::table_text(&table));
    Ok(exit::OK)
}

/// Rows of users' tables that committed transactions wrote.
fn rows(kept: &DivergenceSummary) -> u64 {
    kept.transactions.iter().map(|t| t.rows.total()).sum()
}

fn when(ms: u64) -> String {
    i64::try_from(ms)
        .ok()
        .filter(|ms| *ms > 0)
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(
            || "-".into(),
            |t| t.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
        )
}

fn show(
    views: &[DivergenceView],
    id: &str,
    member: Option<&MemberId>,
    json: bool,
) -> anyhow::Result<u8> {
    let found: Vec<(&DivergenceView, &DivergenceSummary)> = views
        .iter()
        .filter(|v| member.is_none_or(|m| *m == v.member))
        .flat_map(|v| v.kept.iter().map(move |k| (v, k)))
        .filter(|(_, k)| k.id == id)
        .collect();
    let (view, kept) = match found.as_slice() {
        [one] => *one,
        [] => {
            let what = format!("no member that answers keeps a divergence \"{id}\"");
            let hint = "`craton divergence list` shows what there is";
            return Err(Problem::new(exit::USAGE, what, hint).into());
        }
        several => {
            let names: Vec<_> = several.iter().map(|(v, _)| v.member.as_str()).collect();
            let what = format!("several members keep \"{id}\": {}", names.join(", "));
            return Err(Problem::new(exit::USAGE, what, "name one with --member").into());
        }
    };
    if json {
        output::json(&serde_json::json!({
            "member": view.member,
            "directory": view.directory.join(&kept.id),
            "summary": kept,
        }))?;
        return Ok(exit::OK);
    }
    output::line(text(view, kept));
    Ok(exit::OK)
}

fn text(view: &DivergenceView, kept: &DivergenceSummary) -> String {
    let directory = view.directory.join(&kept.id);
    let mut lines = vec![
        format!(
            "{} of {}: timeline {} from {} to {}, kept {}",
            paint(Colour::Cyan, &kept.id),
            paint(Colour::Cyan, view.member.as_str()),
            kept.timeline,
            kept.from,
            kept.last_record,
            when(kept.kept_at_ms),
        ),
        format!(
            "  {} in {} segments in {} on {}'s host",
            output::bytes(kept.bytes),
            kept.segments,
            directory.display(),
            view.member
        ),
        format!(
            "  {} transactions committed, {} rolled back{}",
            output::count(kept.commits),
            output::count(kept.aborts),
            match (&kept.first_commit, &kept.last_commit) {
                (Some(first), Some(last)) => format!(" ({first} to {last})"),
                _ => String::new(),
            }
        ),
    ];
    if !kept.rows.is_empty() {
        let mut table = output::table(&["RELATION", "INSERTED", "UPDATED", "DELETED"]);
        for (relation, rows) in &kept.rows {
            table.add_row(vec![
                plain(relation),
                plain(output::count(rows.inserted)),
                plain(output::count(rows.updated)),
                plain(output::count(rows.deleted)),
            ]);
        }
        lines.push(format!("\n{}", output::table_text(&table)));
    }
    lines.extend(transactions(kept));
    if kept.truncated {
        lines.push("  there is more than is listed; the WAL itself is complete".into());
    }
    lines.push(how(kept, &directory.display().to_string()));
    lines.join("\n")
}

fn transactions(kept: &DivergenceSummary) -> Vec<String> {
    if kept.transactions.is_empty() {
        return vec!["  no committed transaction wrote a row".into()];
    }
    let mut table = output::table(&[
        "TRANSACTION",
        "COMMITTED",
        "AT",
        "INSERTED",
        "UPDATED",
        "DELETED",
    ]);
    for t in kept.transactions.iter().take(TRANSACTIONS_SHOWN) {
        table.add_row(vec![
            plain(t.xid.to_string()),
            plain(&t.committed),
            plain(t.lsn.to_string()),
            plain(output::count(t.rows.inserted)),
            plain(output::count(t.rows.updated)),
            plain(output::count(t.rows.deleted)),
        ]);
    }
    let mut lines = vec![format!("\n{}", output::table_text(&table))];
    let more = kept.transactions.len().saturating_sub(TRANSACTIONS_SHOWN);
    if more > 0 {
        lines.push(format!("  … and {more} more (--json lists them)"));
    }
    lines
}

/// What became of these rows, and how to look at them.
fn how(kept: &DivergenceSummary, directory: &str) -> String {
    let gone = if kept.commits == 0 {
        "Nothing that was committed is missing from the cluster."
    } else {
        "These rows are not in the cluster. Nobody was told that they were committed in quorum or strict durability; in async they may have been acknowledged."
    };
    format!(
        "\n{gone}\nTo look at them, restore a backup from before the fork and replay this WAL on it, into a directory of its own:\n  craton restore /tmp/{id} --divergence {directory}\n(on hosts with --repo DIR, the backup repository), then start it as the restore says, and copy what is wanted (pg_dump --data-only --table …). Remove {directory} when it is no longer needed.",
        id = kept.id
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_what_is_lost_and_how_to_get_it_out() {
        let kept: DivergenceSummary = serde_json::from_value(serde_json::json!({
            "id": "term-2-timeline-1-0-5", "kept_at_ms": 0, "timeline": 1, "from": "0/5", "last_record": "0/9",
            "segments": 1, "bytes": 16_777_216, "records": 9, "commits": 1, "aborts": 0,
            "first_commit": "2026-01-01 00:00:00 UTC", "last_commit": "2026-01-01 00:00:00 UTC", "relations": {},
            "rows": {"app.public.t": {"inserted": 2, "updated": 0, "deleted": 1}},
            "transactions": [{"xid": 7, "lsn": "0/8", "committed": "2026-01-01 00:00:00 UTC",
                "rows": {"inserted": 2, "updated": 0, "deleted": 1}}],
            "truncated": false,
        }))
        .unwrap();
        assert_eq!(rows(&kept), 3);
        let view = DivergenceView {
            member: "a".parse().unwrap(),
            directory: "/d/divergence".into(),
            kept: vec![kept.clone()],
        };
        let text = text(&view, &kept);
        for part in [
            "app.public.t",
            "not in the cluster",
            "craton restore /tmp/term-2-timeline-1-0-5 --divergence /d/divergence/term-2-timeline-1-0-5",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }
}
