//! `craton psql`: psql through the proxy; the password comes from the cluster's secrets, not from the
//! command line.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use crate::cli::PsqlArgs;
use crate::exit::Problem;
use crate::layout::{HOST, Layout};
use crate::secrets::names;

/// Replaces this process by psql.
pub fn run(dir: &Path, args: PsqlArgs) -> anyhow::Result<u8> {
    let layout = Layout::require(dir)?;
    let (user, database) = default_session(&layout);
    let port = if args.read {
        layout.proxy_read_port()
    } else {
        layout.proxy_port()
    };
    let mut command = Command::new("psql");
    command
        .args(args.args)
        .env("PGHOST", HOST.to_string())
        .env("PGPORT", port.to_string())
        .env("PGUSER", user)
        .env("PGDATABASE", database)
        .env("PGPASSFILE", layout.secret(names::PGPASS))
        .env_remove("PGPASSWORD")
        .env_remove("PGSERVICE");
    let error = command.exec();
    Err(Problem::machine(
        format!("cannot run psql: {error}"),
        "install the package \"postgresql-client\"",
    )
    .into())
}

/// The user and database that a newcomer wants: the map, where it was loaded.
pub fn default_session(layout: &Layout) -> (&'static str, &'static str) {
    if layout.cluster.sample {
        ("map", "map")
    } else {
        ("postgres", "postgres")
    }
}
