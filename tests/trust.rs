//! Trust between the parts of a real cluster: certificates, roles, tokens to join with, PostgreSQL's own TLS, and the
//! least rights of the cluster's database roles.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    clippy::format_push_string,
    reason = "a test may fail at any line, and waits on the clock of the outside world"
)]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use craton::layout::{Layout, address};
use craton_console::views::{StatusView, SwitchoverRequest};
use craton_console::{Client, ClientError, Token};
use craton_trust::authority::{Authority, KEY_FILE};
use craton_trust::files::write_secret;
use craton_trust::join::JoinToken;
use craton_trust::{Guest, Identity, Role, TlsFiles, Trust};
use serde_json::Value;

#[path = "harness/mod.rs"]
mod harness;

use harness::{Cluster, text, whole};

/// How long a request of this test may take.
const PATIENCE: Duration = Duration::from_secs(20);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

#[test]
fn only_the_trusted_get_in() {
    let c = Cluster::up("trust", &["--no-sample"]);
    c.wait_status("a whole cluster", Duration::from_secs(90), whole);
    c.steady();
    roles_open_what_they_need(&c);
    bad_certificates_are_refused_and_it_is_said_why(&c);
    each_role_gets_what_it_needs(&c);
    tokens_work_once(&c);
    replication_is_encrypted_and_mutual(&c);
    database_roles_have_the_least_rights(&c);
    a_new_certificate_needs_no_restart(&c);
    the_authority_is_replaced_while_the_cluster_runs(&c);
}

/// A directory with a certificate made for this test, and the cluster's bundle.
fn certificate(
    dir: &Path,
    authority: &Authority,
    role: Role,
    until: SystemTime,
    bundle: &str,
) -> Arc<Trust> {
    let identity = Identity::new(authority.cluster(), role, "test").unwrap();
    let files = TlsFiles::in_dir(dir, role.as_str());
    write_secret(&files.authority, bundle).unwrap();
    write_secret(
        &files.certificate,
        &authority.issue_until(&identity, &[], until).unwrap(),
    )
    .unwrap();
    Trust::open(files).unwrap()
}

/// 0 where no HTTP status came.
fn status_of<T>(outcome: Result<T, ClientError>) -> (u16, String) {
    match outcome {
        Ok(_) => (200, String::new()),
        Err(ClientError::Refused { status, error, .. }) => (status, error),
        Err(error) => (0, error.to_string()),
    }
}

/// What the checks of the API need.
struct Place {
    secrets: std::path::PathBuf,
    authority: Authority,
    bundle: String,
    /// An agent's.
    api: String,
}

impl Place {
    fn of(c: &Cluster) -> Self {
        let secrets = c.dir.join("secrets");
        Self {
            authority: Authority::load(&secrets.join(KEY_FILE)).unwrap(),
            bundle: std::fs::read_to_string(secrets.join("authority.pem")).unwrap(),
            api: c.json(&["status"])["members"][0]["api"]
                .as_str()
                .unwrap()
                .to_owned(),
            secrets,
        }
    }

    /// 0 where no HTTP status came.
    async fn get(&self, client: &Client, path: &str) -> (u16, String) {
        let client = client.clone().with_timeout(PATIENCE);
        status_of(client.get_text(&self.api, path).await)
    }
}

fn tomorrow() -> SystemTime {
    SystemTime::now() + Duration::from_secs(86_400)
}

fn roles_open_what_they_need(c: &Cluster) {
    let p = Place::of(c);
    let dir = tempfile::tempdir().unwrap();
    let part = |role| certificate(dir.path(), &p.authority, role, tomorrow(), &p.bundle);
    let guest = Guest::of_authorities(&p.secrets.join("authority.pem")).unwrap();
    let token = Token::from_file(&p.secrets.join("api-token")).unwrap();
    runtime().block_on(async {
        let client = |role| Client::trusted(part(role), Role::Node);
        for (role, path, expected) in [
            (Role::Proxy, "/v1/topology", 200),
            (Role::Proxy, "/v1/status", 403),
            (Role::Backup, "/v1/status", 200),
            (Role::Operator, "/v1/status", 200),
            (Role::Node, "/v1/status", 200),
        ] {
            let (status, error) = p.get(&client(role), path).await;
            assert_eq!(status, expected, "{role} {path}: {error}");
        }
        for role in [Role::Proxy, Role::Backup] {
            let asked: Result<Value, _> = client(role)
                .with_timeout(PATIENCE)
                .post_json(&p.api, "/v1/switchover", &SwitchoverRequest::default())
                .await;
            let (status, error) = status_of(asked);
            assert_eq!(status, 403, "{role}: {error}");
            assert!(error.contains(role.as_str()), "{error}");
        }
        // No certificate: what is open is open, the rest says what is missing; the token is a second way.
        let nobody = Client::guest(Arc::clone(&guest), Role::Node, None);
        for (path, expected) in [("/health", 200), ("/metrics", 200), ("/v1/status", 401)] {
            assert_eq!(p.get(&nobody, path).await.0, expected, "{path}");
        }
        let script = Client::guest(Arc::clone(&guest), Role::Node, Some(token));
        assert_eq!(p.get(&script, "/v1/status").await.0, 200);
        let guess = Client::guest(guest, Role::Node, Token::new("a-guess-of-some-length"));
        assert_eq!(p.get(&guess, "/v1/status").await.0, 401);
        // The right authority, another role at the other end.
        let client = Client::trusted(part(Role::Operator), Role::Backup);
        let (status, error) = p.get(&client, "/health").await;
        assert!(status == 0 && error.contains("was expected"), "{error}");
    });
}

fn bad_certificates_are_refused_and_it_is_said_why(c: &Cluster) {
    let p = Place::of(c);
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let soon = SystemTime::now() + Duration::from_secs(2);
    let late = certificate(
        dirs[0].path(),
        &p.authority,
        Role::Operator,
        soon,
        &p.bundle,
    );
    let other = Authority::create(p.authority.cluster()).unwrap();
    let both = format!("{}{}", p.bundle, other.certificate_pem());
    let stranger = certificate(dirs[1].path(), &other, Role::Operator, tomorrow(), &both);
    runtime().block_on(async {
        let stranger = Client::trusted(stranger, Role::Node);
        let (status, error) = p.get(&stranger, "/health").await;
        assert!(
            status == 0 && error.contains("refused our certificate"),
            "{error}"
        );
        let deadline = Instant::now() + PATIENCE;
        let late = Client::trusted(late, Role::Node);
        loop {
            let (status, error) = p.get(&late, "/v1/status").await;
            if status == 0 {
                assert!(error.contains("expired"), "{error}");
                break;
            }
            assert!(
                Instant::now() < deadline,
                "an expired certificate is good for ever"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // A port that takes connections and says nothing: the request ends at its deadline.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let silent_address = silent.local_addr().unwrap().to_string();
        let hasty = stranger.clone().with_timeout(Duration::from_millis(200));
        let error = hasty
            .get_text(&silent_address, "/health")
            .await
            .unwrap_err();
        assert!(
            error.to_string().contains("did not answer within 200 ms"),
            "{error}"
        );
        // Without TLS.
        let (status, error) = p.get(&Client::new(None), "/health").await;
        assert!(
            status == 400 && error.contains("speaks TLS"),
            "{status} {error}"
        );
    });
    let token = p.secrets.join("api-token").display().to_string();
    let plain = craton(&["--api", &p.api, "--token-file", &token, "status"], "");
    assert!(
        !plain.status.success() && text(&plain).contains("TLS"),
        "{}",
        text(&plain)
    );
    let certs = p.secrets.display().to_string();
    let out = craton(
        &["--api", &p.api, "--certs", &certs, "--json", "status"],
        "",
    );
    c.expect_ok(&out, "craton --certs status");
    let view: StatusView = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(view.members.len(), 3);
}

fn craton(args: &[&str], input: &str) -> Output {
    use std::io::Write as _;
    let mut child = Command::new(env!("CARGO_BIN_EXE_craton"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    child.wait_with_output().unwrap()
}

fn token_for(c: &Cluster, role: &str, name: &str, ttl: &str) -> String {
    let made = c.json(&[
        "ca",
        "token",
        "--role",
        role,
        "--name",
        name,
        "--ttl",
        ttl,
        "--host",
        "db.example",
    ]);
    made["token"].as_str().unwrap().to_owned()
}

/// `craton join` into a directory.
fn join(c: &Cluster, token: &str, into: &Path) -> Output {
    let status = c.json(&["status"]);
    let api = status["members"][1]["api"].as_str().unwrap();
    let into = into.to_str().unwrap();
    craton(&["join", api, "--token", "-", "--into", into], token)
}

fn each_role_gets_what_it_needs(c: &Cluster) {
    let place = tempfile::tempdir().unwrap();
    for (role, files) in [
        ("proxy", "authority.pem proxy proxy.pem"),
        ("backup", "authority.pem backup.pem replication"),
        ("operator", "authority.pem operator.pem"),
        (
            "node",
            "api-token authority.key authority.pem node-n2.pem peers proxy replication rewind superuser",
        ),
    ] {
        let token = token_for(c, role, "n2", "10m");
        let into = place.path().join(role);
        let out = join(c, &token, &into);
        c.expect_ok(&out, "craton join");
        let mut names: Vec<String> = std::fs::read_dir(&into)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names.join(" "), files, "{role}");
        let again = join(c, &token, &place.path().join("again"));
        assert!(
            !again.status.success() && text(&again).contains("used already"),
            "{}",
            text(&again)
        );
        let stem = if role == "node" { "node-n2" } else { role };
        let trust = Trust::open(TlsFiles::in_dir(&into, stem)).unwrap();
        let identity = Identity::new("local", role.parse().unwrap(), "n2").unwrap();
        assert_eq!(trust.identity(), identity);
        assert_eq!(trust.facts().hosts, ["db.example"]);
    }
    // The operator's works from elsewhere; the proxy's is renewed by an agent, for the same holder and hosts.
    let api = c.json(&["status"])["members"][0]["api"]
        .as_str()
        .unwrap()
        .to_owned();
    let operator = place.path().join("operator");
    let operator = operator.to_str().unwrap();
    let out = craton(&["--api", &api, "--certs", operator, "status"], "");
    c.expect_ok(&out, "an operator that joined");
    let daemon = address(Layout::require(&c.dir).unwrap().backup_http_port());
    let status = ["backup", "status", "--daemon", &daemon];
    let out = craton(&[&["--certs", operator][..], &status].concat(), "");
    c.expect_ok(&out, "the backup daemon from elsewhere");
    assert!(text(&out).contains("WAL"), "{}", text(&out));
    let out = craton(&status, "");
    let refused = out.status.code() == Some(2) && text(&out).contains("--certs");
    assert!(refused, "{}", text(&out));
    renewed_by_an_agent(&place.path().join("proxy"), &api);
}

/// As a proxy does on a host without the authority's key.
fn renewed_by_an_agent(dir: &Path, api: &str) {
    let trust = Trust::open(TlsFiles::in_dir(dir, "proxy")).unwrap();
    let agents = [api.to_owned()];
    runtime().block_on(async {
        let renew = async || {
            craton_console::renewal::renew_once(&trust, &agents)
                .await
                .unwrap()
        };
        assert!(!renew().await, "it is young");
        // Signed by another authority than the one that signs now: as after `craton ca rotate switch`.
        let other = Authority::create("local").unwrap();
        let bundle = std::fs::read_to_string(&trust.files().authority).unwrap();
        let before = std::fs::read_to_string(&trust.files().certificate).unwrap();
        let both = format!("{bundle}{}", other.certificate_pem());
        write_secret(&trust.files().authority, &both).unwrap();
        assert!(trust.reload().unwrap());
        assert!(!renew().await, "the signer is the same");
        assert_eq!(
            std::fs::read_to_string(&trust.files().authority).unwrap(),
            bundle
        );
        let old = SystemTime::now() + Duration::from_secs(3600);
        let authority = Authority::load(&dir.with_file_name("node").join(KEY_FILE)).unwrap();
        let due = authority
            .issue_until(&trust.identity(), &["db.example".to_owned()], old)
            .unwrap();
        write_secret(&trust.files().certificate, &due).unwrap();
        assert!(trust.reload().unwrap());
        assert!(renew().await, "it is due");
        let after = std::fs::read_to_string(&trust.files().certificate).unwrap();
        assert!(after != before && after != due);
        assert!(trust.reload().unwrap());
        assert_eq!(trust.facts().hosts, ["db.example"]);
        assert!(trust.valid_for() > Duration::from_secs(13 * 86_400));
    });
}

fn tokens_work_once(c: &Cluster) {
    let place = tempfile::tempdir().unwrap();
    let join = |token: &str, into: &str| join(c, token, &place.path().join(into));
    // An impostor at the address: the token names the authority, so the secret is never shown to it.
    let mut token: JoinToken = token_for(c, "proxy", "p3", "10m").parse().unwrap();
    token.authority_sha256[0] ^= 1;
    let out = join(&token.to_string(), "impostor");
    assert!(
        !out.status.success() && text(&out).contains("not trusted here"),
        "{}",
        text(&out)
    );
    token.authority_sha256[0] ^= 1;
    let out = join(&token.to_string(), "good");
    c.expect_ok(&out, "the token was not used up");
    let short = token_for(c, "proxy", "p4", "1s");
    std::thread::sleep(Duration::from_millis(1100));
    let out = join(&short, "late");
    assert!(
        !out.status.success() && text(&out).contains("expired"),
        "{}",
        text(&out)
    );
    for wrong in ["", "craton1.AAAA", "nonsense"] {
        let out = join(wrong, "wrong");
        assert_eq!(out.status.code(), Some(2), "{}", text(&out));
    }
}

/// The leader's port.
fn leader_port(c: &Cluster) -> String {
    let status = c.json(&["status"]);
    let leader = status["leader"].as_str().unwrap();
    let members = ["a", "b", "c"];
    let index = members.iter().position(|m| *m == leader).unwrap();
    (c.base_port + 11 + u16::try_from(index).unwrap()).to_string()
}

/// psql straight to the leader, as one of the cluster's own roles, with a password from the secrets.
fn psql_as(c: &Cluster, role: &str, more: &str) -> Output {
    let secrets = c.dir.join("secrets");
    let password =
        std::fs::read_to_string(secrets.join(role.trim_start_matches("craton_"))).unwrap();
    Command::new("psql")
        .args([
            &format!("host=127.0.0.1 port={} user={role} {more}", leader_port(c)),
            "-Atc",
            "SHOW server_version_num",
        ])
        .env("PGPASSWORD", password.trim())
        .env("PGCONNECT_TIMEOUT", "20")
        .output()
        .unwrap()
}

fn replication_is_encrypted_and_mutual(c: &Cluster) {
    // Two standbys and the backup daemon; the proxy's look-ups.
    // Not a base backup, which may be on its way.
    let asked = "SELECT count(*), bool_and(ssl), min(version), count(client_dn) FROM pg_stat_ssl JOIN pg_stat_replication USING (pid) WHERE application_name !~ '_base$'";
    c.wait(
        "all connections are mutual",
        Duration::from_secs(60),
        || {
            let rows = c.sql(&["-d", "postgres", "-U", "postgres", "-Atc", asked]);
            if rows == "3|t|TLSv1.3|3" {
                Ok(())
            } else {
                Err(rows)
            }
        },
    );
    let secrets = c.dir.join("secrets").display().to_string();
    let mutual = format!(
        "sslmode=verify-full sslrootcert={secrets}/authority.pem sslcert={secrets}/node-a.pem sslkey={secrets}/node-a.pem"
    );
    let refused = |out: Output, why: &str| {
        assert!(
            !out.status.success() && text(&out).contains(why),
            "{}",
            text(&out)
        );
    };
    for (role, database) in [
        ("craton_replication", "dbname=postgres replication=true"),
        ("craton_rewind", "dbname=postgres"),
        ("craton_proxy", "dbname=postgres"),
    ] {
        let good = psql_as(c, role, &format!("{database} {mutual}"));
        assert!(good.status.success(), "{role}: {}", text(&good));
        refused(
            psql_as(c, role, &format!("{database} sslmode=disable")),
            "pg_hba.conf",
        );
        refused(
            psql_as(
                c,
                role,
                &format!(
                    "{database} sslmode=verify-full sslrootcert={secrets}/authority.pem sslcert=none"
                ),
            ),
            "connection requires a valid client certificate",
        );
        refused(
            psql_as(c, role, &format!("dbname=template1 {mutual}")),
            "pg_hba.conf rejects connection",
        );
    }
    a_role_of_the_operators_streams(c, &mutual, &refused);
}

/// With its password and a certificate, and not with the password alone.
fn a_role_of_the_operators_streams(c: &Cluster, mutual: &str, refused: &dyn Fn(Output, &str)) {
    c.sql(&[
        "-d",
        "postgres",
        "-U",
        "postgres",
        "-c",
        "CREATE ROLE offsite LOGIN REPLICATION PASSWORD 'elsewhere'",
    ]);
    let offsite = |more: &str| {
        let port = leader_port(c);
        let conninfo = format!(
            "host=127.0.0.1 port={port} user=offsite password=elsewhere dbname=postgres replication=true {more}"
        );
        let mut psql = Command::new("psql");
        psql.args([&conninfo, "-Atc", "IDENTIFY_SYSTEM"])
            .output()
            .unwrap()
    };
    let good = offsite(mutual);
    assert!(good.status.success(), "{}", text(&good));
    refused(offsite("sslmode=disable"), "no pg_hba.conf entry");
    refused(
        offsite("sslmode=require sslcert=none"),
        "connection requires a valid client certificate",
    );
    c.sql(&[
        "-d",
        "postgres",
        "-U",
        "postgres",
        "-c",
        "DROP ROLE offsite",
    ]);
}

/// docs/guide/security.md has this table.
fn database_roles_have_the_least_rights(c: &Cluster) {
    let sql = |sql: &str| c.sql(&["-d", "postgres", "-U", "postgres", "-Atc", sql]);
    assert_eq!(
        sql(
            "SELECT rolname, rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls, rolcanlogin FROM pg_roles WHERE rolname !~ '^pg_' ORDER BY 1"
        ),
        "craton_proxy|f|f|f|f|f|t\ncraton_replication|f|f|f|t|f|t\ncraton_rewind|f|f|f|f|f|t\npostgres|t|t|t|t|t|t"
    );
    assert_eq!(
        sql(
            "SELECT count(*) FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member WHERE r.rolname ~ '^craton_'"
        ),
        "0"
    );
    // Functions that are granted by name: nothing else is.
    assert_eq!(
        sql(
            "SELECT r.rolname || ' ' || p.oid::regprocedure FROM pg_proc p, aclexplode(p.proacl) a JOIN pg_roles r ON r.oid = a.grantee WHERE r.rolname ~ '^craton_' ORDER BY 1"
        ),
        "craton_proxy craton.user_lookup(text)\n\
         craton_proxy craton.waits_for_standbys(integer)\n\
         craton_rewind pg_ls_dir(text,boolean,boolean)\n\
         craton_rewind pg_read_binary_file(text)\n\
         craton_rewind pg_read_binary_file(text,bigint,bigint,boolean)\n\
         craton_rewind pg_stat_file(text,boolean)"
    );
    assert_eq!(
        sql(
            "SELECT count(*) FROM pg_class k, aclexplode(k.relacl) a JOIN pg_roles r ON r.oid = a.grantee WHERE r.rolname ~ '^craton_'"
        ),
        "0"
    );
    assert_eq!(
        sql(
            "SELECT n.nspname, a.privilege_type FROM pg_namespace n, aclexplode(n.nspacl) a JOIN pg_roles r ON r.oid = a.grantee WHERE r.rolname ~ '^craton_'"
        ),
        "craton|USAGE"
    );
    assert_eq!(
        sql(
            "SELECT type, database, user_name, coalesce(address, '-'), auth_method, options FROM pg_hba_file_rules ORDER BY line_number"
        ),
        "local|{all}|{postgres}|-|peer|{map=craton}\n\
         local|{all}|{all}|-|scram-sha-256|\n\
         hostssl|{replication}|{craton_replication}|127.0.0.1|scram-sha-256|{clientcert=verify-ca}\n\
         hostssl|{postgres}|{craton_rewind}|127.0.0.1|scram-sha-256|{clientcert=verify-ca}\n\
         hostssl|{postgres}|{craton_proxy}|127.0.0.1|scram-sha-256|{clientcert=verify-ca}\n\
         host|{all}|{craton_replication,craton_rewind,craton_proxy}|all|reject|\n\
         hostssl|{replication}|{all}|127.0.0.1|scram-sha-256|{clientcert=verify-ca}\n\
         host|{all}|{all}|127.0.0.1|scram-sha-256|"
    );
    assert_eq!(
        sql(
            "SELECT count(*) FROM pg_authid WHERE rolpassword IS NOT NULL AND rolpassword !~ '^SCRAM-SHA-256'"
        ),
        "0"
    );
}

/// A certificate on disk is replaced: agents and PostgreSQL show the new one, in the same processes.
fn a_new_certificate_needs_no_restart(c: &Cluster) {
    let secrets = c.dir.join("secrets");
    let authority = Authority::load(&secrets.join(KEY_FILE)).unwrap();
    let before = c.json(&["status"]);
    let files = TlsFiles::in_dir(&secrets, "node-a");
    let identity = Identity::new("local", Role::Node, "a").unwrap();
    let hosts = ["127.0.0.1".to_owned(), "a.new.example".to_owned()];
    let new = authority.issue(&identity, &hosts).unwrap();
    write_owned_like(&files.certificate, &new);
    let port = (c.base_port + 11).to_string();
    let shown = || {
        let out = Command::new("openssl")
            .args([
                "s_client",
                "-starttls",
                "postgres",
                "-connect",
                &format!("127.0.0.1:{port}"),
            ])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        text(&out)
    };
    let base64: String = new.lines().nth(2).unwrap().to_owned();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !shown().contains(&base64) {
        assert!(
            Instant::now() < deadline,
            "PostgreSQL shows the old certificate: {}",
            shown()
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    let after = c.wait_status("a whole cluster", Duration::from_secs(30), whole);
    assert_eq!(after["term"], before["term"]);
}

/// Waits for a condition of a running cluster.
async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let deadline = Instant::now() + Duration::from_secs(40);
    while !holds().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// `craton ca rotate` in its three steps; nothing is restarted, and at no moment a part is without trust.
fn the_authority_is_replaced_while_the_cluster_runs(c: &Cluster) {
    let p = Place::of(c);
    let before = c.json(&["status"]);
    let at = |offset: u16| format!("127.0.0.1:{}", c.base_port + offset);
    let ports = [
        (at(21), Role::Node),
        (at(22), Role::Node),
        (at(23), Role::Node),
        (at(41), Role::Proxy),
        (at(42), Role::Backup),
    ];
    let former = tempfile::tempdir().unwrap();
    let rotate = |step: &str| c.expect_ok(&c.craton(&["ca", "rotate", step]), step);
    rotate("begin");
    let next = Authority::load(&p.secrets.join("authority-next.key")).unwrap();
    let both = std::fs::read_to_string(p.secrets.join("authority.pem")).unwrap();
    let former = certificate(
        former.path(),
        &p.authority,
        Role::Operator,
        tomorrow(),
        &both,
    );
    let coming = tempfile::tempdir().unwrap();
    let coming = certificate(coming.path(), &next, Role::Operator, tomorrow(), &both);
    let pem = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(pem.path(), next.certificate_pem()).unwrap();
    let reach = async |trust: &Arc<Trust>, port: &str, role: Role| {
        let client = Client::trusted(Arc::clone(trust), role).with_timeout(PATIENCE);
        status_of(client.get_text(port, "/health").await).0 != 0
    };
    runtime().block_on(async {
        for (port, role) in &ports {
            until("both authorities are trusted", || {
                reach(&coming, port, *role)
            })
            .await;
        }
        rotate("switch");
        let guest = Guest::of_authorities(pem.path()).unwrap();
        for (port, role) in &ports {
            until("the new authority's certificate is shown", || async {
                let client = Client::guest(Arc::clone(&guest), *role, None);
                status_of(client.get_text(port, "/health").await).0 != 0
            })
            .await;
        }
        rotate("finish");
        for (port, role) in &ports {
            until("the former authority opens nothing", || async {
                !reach(&former, port, *role).await
            })
            .await;
        }
    });
    let after = c.wait_status("a whole cluster", Duration::from_secs(60), whole);
    assert_eq!(after["term"], before["term"]);
    let shown = c.json(&["ca", "show"]);
    assert!(
        shown
            .as_array()
            .unwrap()
            .iter()
            .all(|s| s["problem"].is_null()),
        "{shown}"
    );
    // A standby that connects anew is trusted by the new authority's word.
    c.sql(&[
        "-d",
        "postgres",
        "-U",
        "postgres",
        "-Atc",
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_replication",
    ]);
    c.wait_status(
        "a whole cluster after new connections",
        Duration::from_secs(60),
        whole,
    );
}

/// As root the cluster belongs to `postgres`: the file must stay readable to it.
fn write_owned_like(path: &Path, content: &str) {
    use std::os::unix::fs::MetadataExt as _;
    let owner = std::fs::metadata(path).unwrap();
    let temporary = path.with_extension("tmp");
    write_secret(&temporary, content).unwrap();
    std::os::unix::fs::chown(&temporary, Some(owner.uid()), Some(owner.gid())).unwrap();
    std::fs::rename(&temporary, path).unwrap();
}
