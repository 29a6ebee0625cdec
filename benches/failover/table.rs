//! The table of what was measured, from the file of outcomes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

/// How the names of ways end whose clients make a session for every write.
const FRESH: &str = ", new sessions";

/// All runs of one fault on one system.
#[derive(Default)]
struct Cell {
    /// Outages by way, in milliseconds.
    outages: BTreeMap<String, Vec<u64>>,
    lost: Vec<u64>,
    ghosts: u64,
    /// Statements and connections that failed, of the clients that go through the proxy.
    errors: Vec<u64>,
    /// Runs after which another member led.
    moved: usize,
    two_ms: Vec<u64>,
    whole_ms: Vec<u64>,
    not_whole: usize,
}

impl Cell {
    fn add(&mut self, outcome: &Value) {
        let seen = outcome["seen"].as_array().map_or(&[][..], Vec::as_slice);
        let sum = |field: &str| seen.iter().filter_map(|s| s[field].as_u64()).sum();
        for way in seen {
            let name = way["entry"].as_str().unwrap_or_default().to_owned();
            let outage = way["outage_ms"].as_u64().unwrap_or_default();
            self.outages.entry(name).or_default().push(outage);
        }
        self.lost.push(sum("lost"));
        self.ghosts += sum("ghosts");
        let of_proxy = |s: &&Value| s["entry"].as_str().is_some_and(|e| e.starts_with("proxy"));
        let through = seen.iter().filter(of_proxy);
        self.errors
            .push(through.filter_map(|s| s["errors"].as_u64()).sum());
        let leader = |at: usize| outcome["leaders"][at].as_str();
        let known = |at: usize| leader(at).filter(|l| !l.is_empty());
        self.moved += usize::from(known(1).is_some() && known(0) != known(1));
        self.two_ms
            .push(outcome["two_acknowledging_ms"].as_u64().unwrap_or_default());
        match outcome["whole_ms"].as_u64() {
            Some(ms) => self.whole_ms.push(ms),
            None => self.not_whole += 1,
        }
    }

    fn runs(&self) -> usize {
        self.lost.len()
    }

    fn outage(&self, way: &str) -> String {
        let of = |way: &str| self.outages.get(way).map_or(&[][..], Vec::as_slice);
        match of(&format!("{way}{FRESH}")) {
            [] => spread(of(way)),
            fresh => format!("{}; new sessions {}", spread(of(way)), spread(fresh)),
        }
    }

    /// The median outage of the way that is shortest; of those for new sessions, where there are any.
    fn best(&self) -> Option<f64> {
        let fresh = self.outages.keys().any(|way| way.ends_with(FRESH));
        let ways = self
            .outages
            .iter()
            .filter(|(way, _)| way.ends_with(FRESH) == fresh);
        ways.filter_map(|(_, all)| median(all))
            .min_by(f64::total_cmp)
    }
}

fn median(values: &[u64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    let lower = if sorted.len().is_multiple_of(2) {
        *sorted.get(middle - 1)?
    } else {
        upper
    };
    // Milliseconds of one run are far below 2^53.
    #[allow(clippy::cast_precision_loss, reason = "small numbers")]
    Some((lower + upper) as f64 / 2.0)
}

fn seconds(ms: u64) -> String {
    format!("{}.{:02}", ms / 1000, ms % 1000 / 10)
}

/// Median and, in parentheses, the greatest, in seconds.
fn spread(all: &[u64]) -> String {
    match (median(all), all.iter().max()) {
        (Some(median), Some(most)) => format!("{:.2} ({})", median / 1000.0, seconds(*most)),
        _ => "-".into(),
    }
}

/// One outcome in a line, while the bench runs.
pub fn line(outcome: &Value) -> String {
    let mut text = format!("{}, {}:", outcome["system"], outcome["fault"]);
    for way in outcome["seen"].as_array().map_or(&[][..], Vec::as_slice) {
        let outage = way["outage_ms"].as_u64().unwrap_or_default();
        let _ = write!(
            text,
            " {} {} s, lost {};",
            way["entry"],
            seconds(outage),
            way["lost"]
        );
    }
    let two = outcome["two_acknowledging_ms"].as_u64().unwrap_or_default();
    let _ = write!(text, " two acknowledging {} s;", seconds(two));
    match outcome["whole_ms"].as_u64() {
        Some(ms) => {
            let _ = write!(text, " whole after {} s", seconds(ms));
        }
        None => {
            let _ = write!(text, " NOT WHOLE: {}", outcome["missing"]);
        }
    }
    text
}

/// The table of everything in the file.
pub fn render(file: &Path) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let mut order: Vec<(String, String)> = Vec::new();
    let mut cells: BTreeMap<(String, String), Cell> = BTreeMap::new();
    for outcome in text
        .lines()
        .filter_map(|l| serde_json::from_str::<Value>(l).ok())
    {
        let name = |field: &str| outcome[field].as_str().unwrap_or_default().to_owned();
        let key = (name("fault"), name("system"));
        if !order.contains(&key) {
            order.push(key.clone());
        }
        cells.entry(key).or_default().add(&outcome);
    }
    let mut faults: Vec<&str> = Vec::new();
    for (fault, _) in &order {
        if !faults.contains(&fault.as_str()) {
            faults.push(fault);
        }
    }
    let mut table = String::from(
        "| fault | system | runs | outage by proxy, s: median (max) | outage by multi-host, s: median (max) | errors by proxy: median (max) | another leads after | acknowledged and lost, per run | two acknowledging, s | whole again, s: median (max) | longer than craton |\n|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for fault in faults {
        let ours = cells
            .get(&(fault.to_owned(), "craton".to_owned()))
            .and_then(Cell::best);
        for (_, system) in order.iter().filter(|(f, _)| f == fault) {
            let Some(cell) = cells.get(&(fault.to_owned(), system.clone())) else {
                continue;
            };
            row(&mut table, fault, system, cell, ours);
        }
    }
    table
}

fn row(table: &mut String, fault: &str, system: &str, cell: &Cell, ours: Option<f64>) {
    let lost: Vec<String> = cell.lost.iter().map(ToString::to_string).collect();
    let whole = if cell.not_whole == 0 {
        spread(&cell.whole_ms)
    } else {
        format!("{} of {} not in time", cell.not_whole, cell.runs())
    };
    let ratio = match (cell.best(), ours) {
        (Some(theirs), Some(ours)) if system != "craton" => {
            format!("{:.1} times", theirs / ours.max(1.0))
        }
        _ => String::new(),
    };
    let errors = match (median(&cell.errors), cell.errors.iter().max()) {
        (Some(median), Some(most)) => format!("{median:.0} ({most})"),
        _ => "-".into(),
    };
    let two = cell.two_ms.iter().max().copied().unwrap_or_default();
    let ghosts = if cell.ghosts > 0 {
        format!(" (and {} there that failed)", cell.ghosts)
    } else {
        String::new()
    };
    let _ = writeln!(
        table,
        "| {fault} | {system} | {} | {} | {} | {errors} | {} | {}{ghosts} | {} | {whole} | {ratio} |",
        cell.runs(),
        cell.outage("proxy"),
        cell.outage("multi-host"),
        cell.moved,
        lost.join(", "),
        seconds(two),
    );
}
