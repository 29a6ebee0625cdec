//! The craton binary: one file per sub-command.
//!
//! # Layout
//! * [`cli`]: what may be typed; [`exit`]: what the process ends with.
//! * [`access`]: how a command finds the agents; [`ask`]: who asks, and is it meant; [`output`]: the only place that prints.
//! * [`layout`], [`secrets`], [`owner`], [`preflight`], [`processes`], [`sessions`]: one local cluster on this machine.
//! * [`up`], [`down`], [`supervise`], [`ready`], [`sample`]: its life. [`drill`]: breaking it on purpose.
//! * [`certificates`]: who may talk to whom.
//! * [`daemons`], [`config`], [`settings`]: the long-running parts and their `craton.toml`.
//! * [`container`]: the same in Docker: environment, first process, names of the stack before.
//! * the rest: one command a file.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser as _;

pub mod access;
pub mod adopt;
pub mod ask;
pub mod backup;
pub mod ca;
pub mod certificates;
pub mod change;
pub mod cli;
pub mod config;
pub mod configure;
pub mod container;
pub mod coordinator;
pub mod daemons;
pub mod divergence;
pub mod doctor;
pub mod down;
pub mod drill;
pub mod exit;
pub mod explain;
pub mod history;
pub mod join;
pub mod layout;
pub mod maintenance;
pub mod member;
pub mod output;
pub mod owner;
pub mod preflight;
pub mod processes;
pub mod psql;
pub mod ready;
pub mod recover;
pub mod restore;
pub mod sample;
pub mod secrets;
pub mod sessions;
pub mod settings;
pub mod status;
pub mod supervise;
pub mod up;

/// Parses the command line, runs the command, prints what went wrong.
pub fn run(args: &[OsString]) -> ExitCode {
    if let Some(done) = container::names::run(args) {
        return ended(done, false);
    }
    let cli = match cli::Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // clap knows whether this is help (stdout, 0) or a mistake (stderr, 2).
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(exit::USAGE));
        }
    };
    let json = cli.json;
    ended(cli::dispatch(cli), json)
}

fn ended(done: anyhow::Result<u8>, json: bool) -> ExitCode {
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            output::print_error(&error, json);
            ExitCode::from(exit::code_of(&error))
        }
    }
}
