//! `craton-sim model`: the explicit-state check, deeper than the tests go.

use std::io;

use craton_sim::model::{Broken, Config, explore};

/// How it is called.
pub const USAGE: &str = "usage: craton-sim model [--level N] [--only N] [--states N] [--broken RULE]
  --level N        how far: 1 is what the tests explore, each further one allows for more of everything (default 2)
  --only N         the N-th of the bounds of that level, from 1
  --states N       states at most for each of the bounds (default 30000000, some 400 bytes each while they wait)
  --broken RULE    break a rule and tell the shortest way to the harm; \"all\" breaks one after the other
";

/// What was asked for: the explorations, and whether harm is what is wanted.
fn parse(mut args: impl Iterator<Item = String>) -> Result<(Vec<Config>, bool), String> {
    let (mut level, mut only, mut states, mut broken) = (2u8, None, None, Vec::new());
    while let Some(arg) = args.next() {
        let value = args.next().ok_or_else(|| format!("{arg} needs a value"))?;
        match arg.as_str() {
            "--level" => {
                level = value
                    .parse()
                    .ok()
                    .filter(|n| (1..=3).contains(n))
                    .ok_or_else(|| format!("--level: \"{value}\" is not a number from 1 to 3"))?;
            }
            "--only" => {
                let number = value.parse::<usize>().ok().filter(|n| *n > 0);
                let wrong = || format!("--only: \"{value}\" is not a number from 1 on");
                only = Some(number.ok_or_else(wrong)?);
            }
            "--states" => {
                let number = value
                    .parse::<usize>()
                    .map_err(|_| format!("--states: \"{value}\" is not a number"))?;
                states = Some(number.min(4_000_000_000));
            }
            "--broken" if value == "all" => broken = Broken::ALL.to_vec(),
            "--broken" => {
                let rule = Broken::ALL.into_iter().find(|b| b.name() == value);
                let names = Broken::ALL.map(Broken::name).join(", ");
                let unknown =
                    || format!("--broken: there is no rule \"{value}\"; there are {names}");
                broken = vec![rule.ok_or_else(unknown)?];
            }
            _ => return Err(format!("unknown argument \"{arg}\"")),
        }
    }
    let wants_harm = !broken.is_empty();
    let mut configs: Vec<Config> = if wants_harm {
        broken.into_iter().map(Config::for_broken).collect()
    } else {
        Config::suite(level)
    };
    if let Some(number) = only {
        configs = configs.into_iter().skip(number - 1).take(1).collect();
        if configs.is_empty() {
            return Err(format!("--only: there are no {number} bounds"));
        }
    }
    for config in &mut configs {
        config.states = states.unwrap_or(config.states);
    }
    Ok((configs, wants_harm))
}

/// Explores; false if a correct rule did harm, or a broken one did none.
pub fn run(
    out: &mut impl io::Write,
    args: impl Iterator<Item = String>,
) -> io::Result<Result<bool, String>> {
    let (configs, wants_harm) = match parse(args) {
        Ok(parsed) => parsed,
        Err(error) => return Ok(Err(error)),
    };
    let mut good = true;
    for config in configs {
        let report = explore(&config);
        if let Some(rule) = config.broken {
            writeln!(out, "{}:", rule.name())?;
        }
        if let Some(trace) = &report.harm {
            write!(out, "{trace}")?;
        }
        let end = match (&report.harm, report.complete) {
            (Some(_), _) => "HARM",
            (None, true) => "complete",
            (None, false) => "not complete",
        };
        writeln!(
            out,
            "{}: {} states, {} events tried, depth {}, {end}\n",
            config.bounds(),
            report.states,
            report.transitions,
            report.depth,
        )?;
        out.flush()?;
        good &= report.harm.is_some() == wants_harm;
    }
    Ok(Ok(good))
}
