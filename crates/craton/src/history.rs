//! `craton history`: changes of leadership, oldest first.

use crate::access::Access;
use crate::exit;
use crate::output::{self, Colour, cell, plain};

/// Runs the command.
pub async fn run(access: &Access, json: bool) -> anyhow::Result<u8> {
    let view = access.history().await?;
    if json {
        output::json(&view)?;
        return Ok(exit::OK);
    }
    if view.events.is_empty() {
        output::line("nothing has happened yet");
        return Ok(exit::OK);
    }
    let mut table = output::table(&[
        "WHEN",
        "TERM",
        "EVENT",
        "MEMBER",
        "TIMELINE",
        "FROM",
        "WHAT HAPPENED",
    ]);
    for event in &view.events {
        let or_dash = |text: Option<String>| plain(text.unwrap_or_else(|| "-".to_owned()));
        table.add_row(vec![
            cell(Colour::Dim, &event.at),
            plain(event.term.to_string()),
            plain(&event.kind),
            event
                .member
                .as_ref()
                .map_or_else(|| plain("-"), |m| cell(Colour::Cyan, m.as_str())),
            or_dash(event.timeline.map(|t| t.to_string())),
            or_dash(event.lsn.map(|l| l.to_string())),
            plain(&event.text),
        ]);
    }
    output::line(output::table_text(&table));
    Ok(exit::OK)
}
