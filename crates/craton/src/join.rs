//! `craton join`: a new host gets its certificate, and the secrets of its role.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use craton_console::Client;
use craton_console::join::{JoinRequest, JoinView};
use craton_trust::authority::{self, BUNDLE_FILE};
use craton_trust::files::write_secret;
use craton_trust::join::JoinToken;
use craton_trust::{Guest, Identity, Role, TlsFiles, Trust};

use crate::exit::{self, Problem, USAGE};
use crate::output;

/// How long joining may take.
const JOIN_TIMEOUT: Duration = Duration::from_secs(20);

/// `craton join`
#[derive(Args, Debug)]
pub struct JoinArgs {
    /// The API of any member's agent
    #[arg(value_name = "HOST:PORT")]
    pub agent: String,
    /// The token that `craton ca token` made; `-` reads it from standard input, where no list of processes shows it
    #[arg(
        long,
        value_name = "TOKEN",
        hide_env_values = true,
        env = "CRATON_JOIN_TOKEN"
    )]
    pub token: String,
    /// The directory for certificate and secrets
    #[arg(long, value_name = "DIR", default_value = "/etc/craton/secrets")]
    pub into: PathBuf,
}

/// Runs the command.
pub async fn run(args: JoinArgs, json: bool) -> anyhow::Result<u8> {
    let text = if args.token == "-" {
        std::io::read_to_string(std::io::stdin()).context("cannot read the token")?
    } else {
        args.token
    };
    let token: JoinToken = text
        .parse()
        .map_err(|e: String| Problem::new(USAGE, e, "copy it whole"))?;
    let (key, request) = authority::request()?;
    // Before the token is used up: what is missing here is said first.
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&args.into)
        .with_context(|| format!("cannot create {}", args.into.display()))?;
    write_secret(&args.into.join(".craton-join"), "")?;
    std::fs::remove_file(args.into.join(".craton-join"))?;
    let guest = Guest::pinned(token.authority_sha256)?;
    let client = Client::guest(guest, Role::Node, None).with_timeout(JOIN_TIMEOUT);
    let request = JoinRequest {
        secret: token.secret_text(),
        request,
    };
    let joined: JoinView = client.post_json(&args.agent, "/join", &request).await?;
    let identity: Identity = joined.certificate.identity.parse()?;
    let files = TlsFiles::in_dir(&args.into, &stem(&identity));
    write_secret(&args.into.join(BUNDLE_FILE), &joined.certificate.authority)?;
    write_secret(
        &files.certificate,
        &format!("{}{key}", joined.certificate.certificate),
    )?;
    let mut written = vec![BUNDLE_FILE.to_owned(), format!("{}.pem", stem(&identity))];
    for (name, content) in &joined.secrets {
        // The names come from the cluster; they must stay in the directory all the same.
        if name.contains('/') || name.starts_with('.') {
            anyhow::bail!(
                "the cluster sent a secret with the name \"{name}\", which is no file name"
            );
        }
        write_secret(&args.into.join(name), content)?;
        written.push(name.clone());
    }
    // What was handed out works here, or this says why not.
    let trust = Trust::open(files)?;
    if json {
        output::json(&serde_json::json!({
            "identity": trust.identity().to_string(), "into": args.into, "written": written,
        }))?;
    } else {
        output::line(format!(
            "joined as {}: wrote {} in {}",
            trust.identity(),
            written.join(", "),
            args.into.display()
        ));
        output::note(settings_for(
            &trust.identity(),
            &args.into.display().to_string(),
        ));
    }
    Ok(exit::OK)
}

fn stem(identity: &Identity) -> String {
    match identity.role {
        Role::Node | Role::Witness => format!("{}-{}", identity.role, identity.name),
        other => other.to_string(),
    }
}

/// What goes into the settings next.
fn settings_for(identity: &Identity, dir: &str) -> String {
    match identity.role {
        Role::Node => format!(
            "in craton.toml: [node] cluster = \"{}\", member = \"{}\", secrets = \"{dir}\"",
            identity.cluster, identity.name
        ),
        Role::Proxy => format!(
            "in craton.toml: [proxy] auth_password_file = \"{dir}/proxy\", tls = {{ dir = \"{dir}\" }}"
        ),
        Role::Backup => format!(
            "in craton.toml: [backup] password_file = \"{dir}/replication\", tls = {{ dir = \"{dir}\" }}"
        ),
        Role::Witness => format!(
            "in craton.toml: [witness] cluster = \"{}\", name = \"{}\", secrets = \"{dir}\"",
            identity.cluster, identity.name
        ),
        Role::Operator => format!("use it with: craton --api HOST:PORT,… --certs {dir} status"),
    }
}
