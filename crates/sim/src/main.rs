//! `craton-sim`: runs seeds, and replays one with its trace.

use std::io::{self, Write as _};
use std::process::ExitCode;

mod model_command;

use craton_core::settings::Durability;
use craton_sim::shrink::shrink;
use craton_sim::{Flaw, Options, Outcome, run};

/// How it is called.
const USAGE: &str = "usage: craton-sim [--seed N [--trace]] [--seeds FIRST..LAST] [--members N] [--sync K] [--async] [--lying-clocks] [--ambushes] [--modes] [--away] [--operators] [--never-leading N] [--receivers N] [--strict] [--fault-seconds S] [--flaw NAME] [--shrink] [--skip N,N,…] [--keep-going]
  --seed N         run one seed and print what broke; with --trace also everything that happened
  --seeds A..B     run the seeds from A to B - 1 (default 0..1000)
  --members N      2 to 26 members (default 3)
  --sync K         k, the number of synchronous standbys (default 1)
  --async          durability async (default quorum)
  --strict         durability strict
  --modes          the operator changes durability and k at any moment
  --operators      the operator pauses, restarts and reinitialises members at any moment
  --away           above all the coordinator is away, from the leader or from everybody
  --never-leading N  so many members have priority 0
  --receivers N    so many backup daemons count as copies
  --lying-clocks   clocks run at any rate, and there is no fence
  --ambushes       only rare orders of events, made to order
  --flaw NAME      break a rule on purpose: one-seal-too-few, no-wait, old-leader-left-out, incarnation-forgotten, seal-keeps-streaming, no-fence, promises-forgotten, standby-promise-forgotten, one-promise-too-few, seal-despite-promise, mode-before-postgres, receiver-keeps-receiving, receiver-reports-written, receiver-promises, catch-up-claimed
  --shrink         leave out the faults that a failing seed does not need, and print those that matter
  --skip N,N,…     faults that do not strike, by number, as --shrink prints them
  --keep-going     do not stop at the first seed that fails
";

struct Args {
    options: Options,
    first: u64,
    last: u64,
    keep_going: bool,
    shrink: bool,
}

/// Runs that shrinking a failing seed may take.
const SHRINK_RUNS_MAX: usize = 2000;

fn parse(mut args: impl Iterator<Item = String>) -> Result<Args, String> {
    let mut parsed = Args {
        options: Options::default(),
        first: 0,
        last: 1000,
        keep_going: false,
        shrink: false,
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        let number = |text: String| {
            text.parse::<u64>()
                .map_err(|_| format!("\"{text}\" is not a number"))
        };
        match arg.as_str() {
            "--seed" => {
                parsed.first = number(value()?)?;
                parsed.last = parsed.first.saturating_add(1);
            }
            "--seeds" => {
                let text = value()?;
                let (a, b) = text
                    .split_once("..")
                    .ok_or_else(|| format!("\"{text}\" is not a range like 0..1000"))?;
                (parsed.first, parsed.last) = (number(a.into())?, number(b.into())?);
            }
            "--members" => {
                parsed.options.members = usize::try_from(number(value()?)?).unwrap_or(0);
                if !(2..=26).contains(&parsed.options.members) {
                    return Err("--members: 2 to 26".into());
                }
            }
            "--sync" => {
                parsed.options.sync_standbys = u32::try_from(number(value()?)?.max(1)).unwrap_or(1);
            }
            "--fault-seconds" => parsed.options.fault_seconds = number(value()?)?,
            "--async" => parsed.options.durability = Durability::Async,
            "--strict" => parsed.options.durability = Durability::Strict,
            "--modes" => parsed.options.modes = true,
            "--operators" => parsed.options.operators = true,
            "--away" => parsed.options.away = true,
            "--never-leading" => {
                parsed.options.never_leading = usize::try_from(number(value()?)?).unwrap_or(0);
            }
            "--receivers" => {
                parsed.options.receivers = usize::try_from(number(value()?)?).unwrap_or(0).min(8);
            }
            "--lying-clocks" => parsed.options.lying_clocks = true,
            "--ambushes" => parsed.options.ambushes = true,
            "--trace" => parsed.options.trace = true,
            "--shrink" => parsed.shrink = true,
            "--skip" => {
                for text in value()?.split(',') {
                    let fault = usize::try_from(number(text.into())?).unwrap_or(usize::MAX);
                    parsed.options.skip.insert(fault);
                }
            }
            "--keep-going" => parsed.keep_going = true,
            "--flaw" => {
                let name = value()?;
                let flaw = Flaw::ALL.into_iter().find(|f| f.name() == name);
                parsed.options.flaw =
                    Some(flaw.ok_or_else(|| format!("there is no flaw \"{name}\""))?);
            }
            _ => return Err(format!("unknown argument \"{arg}\"")),
        }
    }
    Ok(parsed)
}

fn report(out: &mut impl io::Write, args: &Args, o: &Outcome) -> io::Result<()> {
    out.write_all(o.trace.as_bytes())?;
    if o.violations.is_empty() {
        return Ok(());
    }
    writeln!(out, "seed {} FAILED:", o.seed)?;
    for violation in &o.violations {
        writeln!(out, "  {violation}")?;
    }
    let options = &args.options;
    let mut more = format!(
        "--members {} --sync {}",
        options.members, options.sync_standbys
    );
    let flags = [
        (options.durability == Durability::Async, " --async"),
        (options.durability == Durability::Strict, " --strict"),
        (options.lying_clocks, " --lying-clocks"),
        (options.ambushes, " --ambushes"),
        (options.modes, " --modes"),
        (options.operators, " --operators"),
        (options.away, " --away"),
    ];
    for (_, flag) in flags.iter().filter(|(on, _)| *on) {
        more.push_str(flag);
    }
    for (name, number) in [
        (" --never-leading ", options.never_leading),
        (" --receivers ", options.receivers),
    ] {
        if number > 0 {
            more.push_str(name);
            more.push_str(&number.to_string());
        }
    }
    if let Some(flaw) = options.flaw {
        more.push_str(" --flaw ");
        more.push_str(flaw.name());
    }
    writeln!(out, "replay: make sim SEED={} ARGS=\"{more}\"", o.seed)?;
    if args.shrink {
        report_shrunk(out, args, o.seed, &more)?;
    }
    Ok(())
}

fn report_shrunk(out: &mut impl io::Write, args: &Args, seed: u64, more: &str) -> io::Result<()> {
    let Some(shrunk) = shrink(seed, &args.options, SHRINK_RUNS_MAX) else {
        return Ok(());
    };
    writeln!(
        out,
        "after {} runs these faults are left of {}:",
        shrunk.runs,
        shrunk.outcome.faults.len()
    )?;
    for fault in shrunk.faults() {
        writeln!(out, "  {fault}")?;
    }
    for violation in &shrunk.outcome.violations {
        writeln!(out, "  broke: {violation}")?;
    }
    let skip: Vec<String> = shrunk.skip.iter().map(usize::to_string).collect();
    writeln!(
        out,
        "replay: make sim SEED={seed} ARGS=\"{more} --skip {}\"",
        skip.join(",")
    )
}

fn simulate(out: &mut impl io::Write, args: &Args) -> io::Result<bool> {
    let (mut failed, mut runs, mut acknowledged, mut decisions, mut terms) =
        (0u64, 0u64, 0u64, 0u64, 0u64);
    let mut slowest = 0;
    for seed in args.first..args.last {
        let outcome = run(seed, &args.options);
        report(out, args, &outcome)?;
        runs += 1;
        acknowledged += outcome.acknowledged;
        decisions += outcome.decisions;
        terms += outcome.terms;
        slowest = slowest.max(outcome.settled_after_ms.unwrap_or(0));
        if !outcome.violations.is_empty() {
            failed += 1;
            if !args.keep_going {
                break;
            }
        }
    }
    writeln!(
        out,
        "{runs} seeds, {failed} failed: {acknowledged} acknowledged writes, {terms} terms, {decisions} decisions; whole again at most {slowest} ms after the last fault"
    )?;
    Ok(failed == 0)
}

/// The explicit-state check.
fn check_model() -> ExitCode {
    match model_command::run(&mut io::stdout().lock(), std::env::args().skip(2)) {
        Ok(Ok(true)) => ExitCode::SUCCESS,
        Ok(Ok(false)) => ExitCode::FAILURE,
        Ok(Err(error)) => {
            let _ = write!(io::stderr(), "{error}\n{}", model_command::USAGE);
            ExitCode::from(2)
        }
        // The reader went away.
        Err(_) => ExitCode::from(2),
    }
}

fn main() -> ExitCode {
    if std::env::args().skip(1).any(|a| a == "--help" || a == "-h") {
        let _ = write!(io::stdout(), "{USAGE}\n{}", model_command::USAGE);
        return ExitCode::SUCCESS;
    }
    if std::env::args().nth(1).is_some_and(|a| a == "model") {
        return check_model();
    }
    let args = match parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(error) => {
            let _ = write!(io::stderr(), "{error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match simulate(&mut io::stdout().lock(), &args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // The reader went away.
        Err(_) => ExitCode::from(2),
    }
}
