//! Everything that reaches the terminal goes through here.
#![allow(clippy::print_stdout, reason = "the one place that prints")]

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use comfy_table::{Attribute, Cell, ContentArrangement, Table, presets};
use serde::Serialize;

use crate::exit;

/// Writes to standard output; a reader that went away (`| head`) is no error.
pub fn line(text: impl AsRef<str>) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{}", text.as_ref());
    let _ = out.flush();
}

/// Writes a value as pretty JSON.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(serde_json::to_string_pretty(value)?);
    Ok(())
}

/// A note on standard error: progress and warnings, which must not mix with results.
pub fn note(text: impl AsRef<str>) {
    let _ = writeln!(std::io::stderr().lock(), "{}", text.as_ref());
}

/// An error with its causes and what to do; as JSON where results are JSON.
pub fn print_error(error: &anyhow::Error, json: bool) {
    let hint = exit::hint_of(error);
    if json {
        let view = craton_console::views::ErrorView {
            error: format!("{error:#}"),
            hint,
        };
        note(serde_json::to_string(&view).unwrap_or_else(|_| format!("{error:#}")));
        return;
    }
    note(format!("{} {error:#}", paint_err(Colour::Red, "error:")));
    if let Some(hint) = hint {
        note(format!(" {} {hint}", paint_err(Colour::Cyan, "hint:")));
    }
}

/// What a piece of text says by its colour.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Colour {
    /// Good.
    Green,
    /// Look at this.
    Yellow,
    /// Wrong.
    Red,
    /// Names.
    Cyan,
    /// Less important.
    Dim,
    /// More important.
    Bold,
}

impl Colour {
    fn code(self) -> &'static str {
        match self {
            Self::Green => "32",
            Self::Yellow => "33",
            Self::Red => "31",
            Self::Cyan => "36",
            Self::Dim => "2",
            Self::Bold => "1",
        }
    }
}

fn wanted(terminal: bool) -> bool {
    terminal
        && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
        && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
}

/// Colours text for standard output, where that is a terminal that likes it.
pub fn paint(colour: Colour, text: &str) -> String {
    painted(colour, text, wanted(std::io::stdout().is_terminal()))
}

fn paint_err(colour: Colour, text: &str) -> String {
    painted(colour, text, wanted(std::io::stderr().is_terminal()))
}

fn painted(colour: Colour, text: &str, on: bool) -> String {
    if on {
        format!("\x1b[{}m{text}\x1b[0m", colour.code())
    } else {
        text.to_owned()
    }
}

/// A coloured cell. Tables must know which characters take room, so cells are not painted with [`paint`].
pub fn cell(colour: Colour, text: impl Into<String>) -> Cell {
    let cell = Cell::new(text.into());
    match colour {
        Colour::Green => cell.fg(comfy_table::Color::DarkGreen),
        Colour::Yellow => cell.fg(comfy_table::Color::DarkYellow),
        Colour::Red => cell.fg(comfy_table::Color::DarkRed),
        Colour::Cyan => cell.fg(comfy_table::Color::DarkCyan),
        Colour::Dim => cell.add_attribute(Attribute::Dim),
        Colour::Bold => cell.add_attribute(Attribute::Bold),
    }
}

/// A cell as it is.
pub fn plain(text: impl Into<String>) -> Cell {
    Cell::new(text.into())
}

/// A table without lines between the rows, as wide as its contents.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header.iter().map(|h| cell(Colour::Dim, *h)));
    if !wanted(std::io::stdout().is_terminal()) {
        table.force_no_tty();
    }
    table
}

/// The table as text, without the blanks around its lines.
pub fn table_text(table: &Table) -> String {
    let lines: Vec<String> = table
        .to_string()
        .lines()
        .map(|l| l.strip_prefix(' ').unwrap_or(l).trim_end().to_owned())
        .collect();
    lines.join("\n")
}

/// A duration for people: `830 µs`, `412 ms`, `2.31 s`, `3 min 5 s`.
pub fn duration(d: Duration) -> String {
    let ms = d.as_millis();
    if ms == 0 {
        return format!("{} µs", d.as_micros());
    }
    if ms < 1000 {
        return format!("{ms} ms");
    }
    if ms < 60_000 {
        return format!("{:.2} s", d.as_secs_f64());
    }
    format!("{} min {} s", d.as_secs() / 60, d.as_secs() % 60)
}

/// A number of bytes for people: `0 B`, `712 B`, `16.0 MiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    #[allow(clippy::cast_precision_loss, reason = "one decimal is shown")]
    let mut value = n as f64 / 1024.0;
    let mut unit = UNITS.iter();
    let mut name = unit.next().copied().unwrap_or_default();
    for next in unit {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        name = next;
    }
    format!("{value:.1} {name}")
}

/// A number with its thousands apart.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_for_people() {
        assert_eq!(duration(Duration::from_micros(830)), "830 µs");
        assert_eq!(duration(Duration::from_millis(412)), "412 ms");
        assert_eq!(duration(Duration::from_millis(2310)), "2.31 s");
        assert_eq!(duration(Duration::from_secs(185)), "3 min 5 s");
        assert_eq!(
            (
                bytes(0).as_str(),
                bytes(1023).as_str(),
                bytes(16 << 20).as_str()
            ),
            ("0 B", "1023 B", "16.0 MiB")
        );
        assert_eq!(
            (
                count(7).as_str(),
                count(1000).as_str(),
                count(1_234_567).as_str()
            ),
            ("7", "1,000", "1,234,567")
        );
    }
}
