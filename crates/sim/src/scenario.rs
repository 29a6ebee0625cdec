//! Scenarios as text: commands to a simulated cluster, and under each what follows, as a reader may check it.
//!
//! A command is a line that begins at its start; what followed is indented by two blanks. Comments begin with
//! `#`. [`play`] gives the whole text back with what follows now: a test compares, `CRATON_WRITE_SCENARIOS=1`
//! writes. Times are left out on purpose: they are checked by `within`, and hold for any speed inside it.

mod command;
mod watch;

use craton_core::settings::Durability;

use crate::world::World;
use crate::{Options, scenario::command::Condition};

use watch::Watch;

/// A scenario that cannot be played, or in which something did not come to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The line of the command, from 1.
    pub line: usize,
    /// What was wrong.
    pub what: String,
    /// The text so far, with what happened.
    pub played: String,
}

/// Plays a scenario and gives it back with what follows each command.
pub fn play(text: &str) -> Result<String, Failure> {
    let mut played = String::new();
    let mut stage: Option<Stage> = None;
    for (number, line) in text.lines().enumerate() {
        if line.starts_with("  ") {
            continue;
        }
        played.push_str(line.trim_end());
        played.push('\n');
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let mut notes = Vec::new();
        let done = perform(&mut stage, line, &mut notes);
        for note in notes {
            played.push_str("  ");
            played.push_str(&note);
            played.push('\n');
        }
        if let Err(what) = done {
            return Err(Failure {
                line: number + 1,
                what,
                played,
            });
        }
    }
    Ok(played)
}

fn perform(stage: &mut Option<Stage>, line: &str, notes: &mut Vec<String>) -> Result<(), String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    if let ["cluster", settings @ ..] = words.as_slice() {
        *stage = Some(Stage::new(settings)?);
        return Ok(());
    }
    let stage = stage.as_mut().ok_or("a scenario begins with \"cluster\"")?;
    let done = stage.command(&words, notes);
    match stage.world.check.violations.first() {
        Some(broken) => Err(format!("an invariant broke: {broken}")),
        None => done,
    }
}

/// A cluster on the stage.
pub(crate) struct Stage {
    pub(crate) world: World,
    watch: Watch,
}

impl Stage {
    /// `cluster members=3 sync=1 durability=quorum seed=1`.
    fn new(settings: &[&str]) -> Result<Self, String> {
        let mut options = Options::default();
        let mut seed = 1;
        for setting in settings {
            let (name, value) = setting
                .split_once('=')
                .ok_or_else(|| format!("\"{setting}\" is not name=value"))?;
            let number = || {
                value
                    .parse::<u64>()
                    .map_err(|_| format!("{name}: \"{value}\" is not a number"))
            };
            match name {
                "members" => options.members = usize::try_from(number()?).unwrap_or(0),
                "sync" => options.sync_standbys = u32::try_from(number()?).unwrap_or(0),
                "receivers" => options.receivers = usize::try_from(number()?).unwrap_or(0),
                "seed" => seed = number()?,
                "durability" if value == "async" => options.durability = Durability::Async,
                "durability" if value == "quorum" => options.durability = Durability::Quorum,
                _ => return Err(format!("\"{setting}\" is not a setting of a cluster")),
            }
        }
        if !(2..=26).contains(&options.members) {
            return Err("members: 2 to 26".into());
        }
        let world = World::at_rest(seed, &options);
        let watch = Watch::new(&world);
        Ok(Self { world, watch })
    }

    /// Time passes until then, or until the condition holds; true if it does.
    fn run(&mut self, until: u64, notes: &mut Vec<String>, condition: Option<&Condition>) -> bool {
        loop {
            if condition.is_some_and(|c| c.holds(&self.world).is_ok()) {
                return true;
            }
            let broken = !self.world.check.violations.is_empty();
            match self.world.next_at() {
                Some(at) if at <= until && !broken => {
                    self.world.step();
                    self.watch.look(&self.world, notes);
                }
                _ => break,
            }
        }
        self.world.now = self.world.now.max(until);
        condition.is_some_and(|c| c.holds(&self.world).is_ok())
    }
}
