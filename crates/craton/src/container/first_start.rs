//! What the first start of the first node makes: the roles and databases of the environment, then the scripts of
//! `/docker-entrypoint-initdb.d`. Everything is made only if it is not there, so that a start that was cut off is
//! gone through again.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use craton_console::Client;
use craton_console::views::StatusView;
use craton_trust::Role;
use tokio_postgres::NoTls;

use super::daemon::{BROUGHT, first_start_marker, is_fresh};
use super::entry::Facts;
use super::environment::{Environment, Kind};
use super::plan::{NODE_DIR, POSTGRES_PORT};
use super::side::daemon_address;
use crate::certificates;

/// Between two looks whether this node leads.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// Between two tries of what failed.
const AGAIN_AFTER: Duration = Duration::from_secs(2);
/// Scripts, as in the official image.
const SCRIPTS: &str = "/docker-entrypoint-initdb.d";

/// Waits until it is this node's turn, and makes it.
pub async fn run(facts: Arc<Facts>) {
    let mut said = String::new();
    // Whether it is this node's turn is known once it has or knows a cluster.
    while pending() {
        if !first_start_marker().exists() {
            tokio::time::sleep(LOOK_INTERVAL).await;
            continue;
        }
        match once(&facts).await {
            Ok(true) => return,
            Ok(false) => tokio::time::sleep(LOOK_INTERVAL).await,
            Err(error) => {
                let text = format!("{error:#}");
                if text != said {
                    tracing::warn!(
                        "the first start's roles and databases are not made yet: {text}"
                    );
                    said = text;
                }
                tokio::time::sleep(AGAIN_AFTER).await;
            }
        }
    }
}

/// True until the roles and databases of the environment are there.
pub fn pending() -> bool {
    is_fresh() || first_start_marker().exists()
}

/// True when it is done.
async fn once(facts: &Facts) -> anyhow::Result<bool> {
    if !leads().await {
        return Ok(false);
    }
    let brought = std::fs::read_to_string(first_start_marker()).is_ok_and(|t| t == BROUGHT);
    make(&facts.env, brought).await?;
    // As in the official image: they are for a database that was just made.
    if !brought {
        scripts(&facts.env).await?;
    }
    std::fs::remove_file(first_start_marker())?;
    tracing::info!("the roles and databases of the environment are made");
    Ok(true)
}

/// True if this node is open for writes. An agent that does not answer yet is no news.
async fn leads() -> bool {
    let Ok(trust) = certificates::operator(&Facts::secrets()) else {
        return false;
    };
    let client = Client::trusted(trust, Role::Node);
    let status: Result<StatusView, _> = client
        .get_json(&daemon_address(Kind::Node), "/v1/status")
        .await;
    status.is_ok_and(|s| s.writable && s.leader.as_ref() == Some(&s.answered_by))
}

/// The directory of the server's socket.
pub fn socket_dir() -> PathBuf {
    Path::new(NODE_DIR).join("run")
}

/// A session of the superuser, through the socket.
pub async fn session(database: &str) -> anyhow::Result<tokio_postgres::Client> {
    let (client, connection) = tokio_postgres::Config::new()
        .host_path(socket_dir())
        .port(POSTGRES_PORT)
        .user("postgres")
        .dbname(database)
        .application_name("craton container")
        // The databases belong to others, who may have set a path on which their own operators come first.
        .options("-c search_path=pg_catalog")
        .connect_timeout(Duration::from_secs(5))
        .connect(NoTls)
        .await
        .context("cannot connect to PostgreSQL")?;
    tokio::spawn(connection);
    Ok(client)
}

fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A string for SQL, whatever `standard_conforming_strings` says.
pub fn literal(text: &str) -> String {
    format!(" E'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// A role to make.
struct Wanted<'a> {
    name: &'a str,
    password: Option<&'a str>,
    attributes: &'static str,
}

/// The statement that makes a role. The server sees a verifier, never the password.
fn role_sql(role: &Wanted<'_>) -> String {
    let password = role.password.map(|p| {
        let verifier = postgres_protocol::password::scram_sha_256(p.as_bytes());
        format!(" PASSWORD{}", literal(&verifier))
    });
    let (name, password) = (identifier(role.name), password.unwrap_or_default());
    if role.name == "postgres" {
        return format!("ALTER ROLE {name} LOGIN{password}");
    }
    format!("CREATE ROLE {name} LOGIN {}{password}", role.attributes)
}

/// Makes it if it is not there. The one that initdb made gets its password.
async fn role(
    client: &tokio_postgres::Client,
    role: &Wanted<'_>,
    brought: bool,
) -> anyhow::Result<()> {
    let there = client
        .query_opt(
            "SELECT FROM pg_catalog.pg_roles WHERE rolname = $1",
            &[&role.name],
        )
        .await?;
    // A database that was there before keeps its passwords.
    if there.is_some() && (brought || role.name != "postgres") {
        return Ok(());
    }
    client
        .batch_execute(&role_sql(role))
        .await
        .with_context(|| format!("cannot make the role \"{}\"", role.name))
}

async fn make(env: &Environment, brought: bool) -> anyhow::Result<()> {
    let client = session("postgres").await?;
    // Roles with their verifiers must not stand in a log that somebody made talkative.
    client
        .batch_execute("SET log_min_error_statement = panic; SET log_min_duration_statement = -1; SET log_statement = 'none'")
        .await?;
    let user = env.or("POSTGRES_USER", "postgres");
    if env.get("POSTGRES_USER").is_some() || env.get("POSTGRES_PASSWORD").is_some() {
        if env.get("POSTGRES_PASSWORD").is_none() {
            tracing::warn!(
                "POSTGRES_PASSWORD is not set: \"{user}\" has no password and cannot log in over the network"
            );
        }
        let wanted = Wanted {
            name: user,
            password: env.get("POSTGRES_PASSWORD"),
            attributes: "SUPERUSER",
        };
        role(&client, &wanted, brought).await?;
    }
    database(&client, env.or("POSTGRES_DB", user), user).await?;
    let replication = Wanted {
        name: env.or("REPLICATION_USER", "replication_user"),
        password: Some(env.or("REPLICATION_PASSWORD", "replication_pass")),
        attributes: "REPLICATION NOSUPERUSER",
    };
    role(&client, &replication, brought).await?;
    let grant = format!("GRANT pg_monitor TO {}", identifier(replication.name));
    client.batch_execute(&grant).await?;
    database(
        &client,
        env.or("REPLICATION_DB", "replication_db"),
        replication.name,
    )
    .await
}

async fn database(client: &tokio_postgres::Client, name: &str, owner: &str) -> anyhow::Result<()> {
    let there = client
        .query_opt(
            "SELECT FROM pg_catalog.pg_database WHERE datname = $1",
            &[&name],
        )
        .await?;
    if there.is_some() {
        return Ok(());
    }
    let sql = format!(
        "CREATE DATABASE {} OWNER {}",
        identifier(name),
        identifier(owner)
    );
    client
        .batch_execute(&sql)
        .await
        .with_context(|| format!("cannot make the database \"{name}\""))
}

/// Runs `*.sql`, `*.sql.gz` and `*.sh` in the order of their names.
async fn scripts(env: &Environment) -> anyhow::Result<()> {
    let Ok(entries) = std::fs::read_dir(SCRIPTS) else {
        return Ok(());
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    paths.sort();
    let user = env.or("POSTGRES_USER", "postgres");
    let database = env.or("POSTGRES_DB", user);
    for path in paths {
        let name = path.to_string_lossy().into_owned();
        let psql = "psql -v ON_ERROR_STOP=1 --no-psqlrc -d \"$POSTGRES_DB\"";
        let extension = path.extension().and_then(|e| e.to_str());
        let command = match (extension, name.ends_with(".sql.gz")) {
            (Some("sh"), _) => "exec bash \"$1\"".to_owned(),
            (Some("sql"), _) => format!("exec {psql} -f \"$1\""),
            (_, true) => format!("gunzip -c \"$1\" | {psql}"),
            _ => {
                tracing::info!(
                    script = name,
                    "is left alone: it is neither .sh nor .sql nor .sql.gz"
                );
                continue;
            }
        };
        tracing::info!(script = name, "runs");
        let status = tokio::process::Command::new("bash")
            .args(["-c", &format!("set -eo pipefail; {command}"), "bash", &name])
            .env("POSTGRES_USER", user)
            .env("POSTGRES_DB", database)
            .env("PGUSER", "postgres")
            .env("PGHOST", socket_dir())
            .stdin(Stdio::null())
            .status()
            .await
            .with_context(|| format!("cannot run {name}"))?;
        anyhow::ensure!(status.success(), "{name} failed ({status})");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names_and_passwords_stay_names_and_passwords() {
        let role = Wanted {
            name: "o'ne\"two\\",
            password: Some("p'a$do$ss"),
            attributes: "SUPERUSER",
        };
        let sql = role_sql(&role);
        assert!(
            sql.contains("CREATE ROLE \"o'ne\"\"two\\\" LOGIN SUPERUSER PASSWORD E'SCRAM-SHA-256$")
        );
        assert!(!sql.contains("p'a$do$ss"));
    }
}
