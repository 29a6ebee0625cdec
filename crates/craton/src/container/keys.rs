//! Secrets and certificates of a container: handed in as a directory, or computed from the cluster's password.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use craton_agent::config::Secrets;
use craton_trust::authority::{BUNDLE_FILE, KEY_FILE, ensure_certificate};
use craton_trust::files::write_secret;
use craton_trust::seed::Seed;
use craton_trust::{Identity, Role, TlsFiles};

use super::environment::{Environment, Kind, REPLICATION_DEFAULT};
use super::plan;
use crate::certificates::OPERATOR;
use crate::exit::{Problem, USAGE};

/// Where a directory of secrets is mounted if it is not said.
pub const PREPARED_DEFAULT: &str = "/etc/craton/secrets";

/// libpq's password file in the containers of the proxy and of nodes. Their images name it in PGPASSFILE, so that psql needs
/// no password there: the old nodes let in whoever was in the container, and at the proxy `$CHECK_PASSWORD` is nothing in
/// a shell where it came from a file.
const PGPASS: &str = "pgpass";

/// Passwords that are tried as the cluster's at most: each costs some tenths of a second and a question to a node.
const CANDIDATES_MAX: usize = 16;

/// What a container is called, as far as its certificate is concerned.
pub struct Holder<'a> {
    /// Which image.
    pub kind: Kind,
    /// The cluster.
    pub cluster: &'a str,
    /// The member's name, or the host's.
    pub name: &'a str,
    /// How others reach it.
    pub host: &'a str,
}

/// Says whether an authority, by its certificate (PEM), is the nodes' own.
pub type Judge<'a> = &'a dyn Fn(&str) -> anyhow::Result<bool>;

/// Makes `into` hold what this kind of container needs, and nothing else. Returns what the log should say. `judge` is
/// asked where the environment leaves more than one password that could be the cluster's.
pub fn prepare(
    env: &Environment,
    holder: &Holder<'_>,
    into: &Path,
    judge: Judge<'_>,
) -> anyhow::Result<Vec<String>> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(into)
        .with_context(|| format!("cannot make {}", into.display()))?;
    if holder.kind != Kind::Backup {
        write_secret(&into.join(PGPASS), &pgpass(env, holder))?;
    }
    let prepared = PathBuf::from(env.or("CRATON_SECRETS_DIR", PREPARED_DEFAULT));
    if prepared.join(BUNDLE_FILE).exists() {
        copy(&prepared, into)?;
        return Ok(vec![format!(
            "secrets and certificates are those in {}",
            prepared.display()
        )]);
    }
    if env.get("CRATON_SECRETS_DIR").is_some() {
        let what = format!(
            "CRATON_SECRETS_DIR={0}: there is no {BUNDLE_FILE} in {0}",
            prepared.display()
        );
        let hint = "`craton ca init` makes the directory for the first node, `craton join` for whoever comes later";
        return Err(Problem::new(USAGE, what, hint).into());
    }
    compute(env, holder, into, judge)
}

/// Copies files as ours: what is mounted is often readable by root alone.
fn copy(from: &Path, into: &Path) -> anyhow::Result<()> {
    let entries =
        std::fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))?;
    for entry in entries {
        let path = entry?.path();
        let Some(name) = path.file_name().filter(|_| path.is_file()) else {
            continue;
        };
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let target = into.join(name);
        // A certificate that was renewed here is newer than the one that was handed in.
        if std::fs::read_to_string(&target).is_ok_and(|there| there == text) {
            continue;
        }
        write_secret(&target, &text)?;
    }
    Ok(())
}

/// Lines for the check user's sessions with this proxy and with the nodes behind it, or for the roles that a node was
/// given, with that node; and for no other host's eyes.
fn pgpass(env: &Environment, holder: &Holder<'_>) -> String {
    let own = ["localhost", "127.0.0.1", holder.host].map(ToOwned::to_owned);
    let mut hosts = own.to_vec();
    let mut logins = Vec::new();
    if holder.kind == Kind::Proxy {
        logins.push(env.check_login());
        let nodes = plan::backends(env).unwrap_or_default();
        hosts.extend(nodes.into_iter().map(|b| b.host));
    } else {
        for (user, default, password) in [
            ("POSTGRES_USER", "postgres", "POSTGRES_PASSWORD"),
            (
                "REPLICATION_USER",
                "replication_user",
                "REPLICATION_PASSWORD",
            ),
        ] {
            logins.extend(env.get(password).map(|p| (env.or(user, default), p)));
        }
    }
    // The file has no way to write such a name.
    logins.retain(|(user, password)| ![user, password].iter().any(|t| t.contains(['\n', '\r'])));
    hosts.dedup();
    let escaped = |t: &str| t.replace('\\', "\\\\").replace(':', "\\:");
    let login =
        |(user, password): &(&str, &str)| format!("{}:{}", escaped(user), escaped(password));
    let lines = |host: &String| {
        let all = logins
            .iter()
            .map(|l| format!("{}:*:*:{}\n", escaped(host), login(l)));
        all.collect::<String>()
    };
    hosts.iter().map(lines).collect()
}

/// The passwords that the cluster's secret may be, and the variables that they are from. An old balancer's users are any
/// users: their passwords may, but need not, be the one that the nodes replicate with.
fn passwords(env: &Environment, kind: Kind) -> Vec<(&str, &'static str)> {
    if let Some(secret) = env.get("CRATON_CLUSTER_SECRET") {
        return vec![(secret, "CRATON_CLUSTER_SECRET")];
    }
    let default = (REPLICATION_DEFAULT, "REPLICATION_PASSWORD");
    let said = |name: &'static str| env.get(name).map(|password| (password, name));
    let replication = said("REPLICATION_PASSWORD");
    if kind != Kind::Proxy {
        return vec![replication.unwrap_or(default)];
    }
    let users = env.get("DB_USERS").unwrap_or_default().split(',');
    let users = users.filter_map(|pair| Some((pair.split_once(':')?.1.trim(), "DB_USERS")));
    let mut found: Vec<(&str, &'static str)> = Vec::new();
    // Whoever says the nodes' password does not mean the default.
    let last = replication.is_none().then_some(default);
    let all = replication.into_iter().chain(said("CHECK_PASSWORD"));
    let all = all.chain(users).take(CANDIDATES_MAX).chain(last);
    for candidate in all.filter(|(password, _)| !password.is_empty()) {
        if !found.iter().any(|(known, _)| *known == candidate.0) {
            found.push(candidate);
        }
    }
    found
}

/// Of the passwords the one that the nodes have.
fn choose<'e>(
    env: &'e Environment,
    holder: &Holder<'_>,
    judge: Judge<'_>,
) -> anyhow::Result<(&'e str, &'static str)> {
    let passwords = passwords(env, holder.kind);
    if let [only] = passwords.as_slice() {
        return Ok(*only);
    }
    for (password, from) in &passwords {
        let authority = Seed::from_password(holder.cluster, password)?.authority(holder.cluster)?;
        if judge(authority.certificate_pem())? {
            return Ok((password, from));
        }
    }
    // Only the default's own candidate is last without the variable being set.
    let name = |(password, from): &(&str, &'static str)| match *from {
        "REPLICATION_PASSWORD" if env.get(from) != Some(password) => {
            "the default of REPLICATION_PASSWORD"
        }
        from => from,
    };
    let mut tried: Vec<&str> = passwords.iter().map(name).collect();
    tried.dedup();
    let what = format!(
        "the nodes' secret is none of those that this container knows ({}): they would not trust this proxy",
        tried.join(", ")
    );
    let hint = "add one line to this container's environment, `REPLICATION_PASSWORD: …` (or REPLICATION_PASSWORD_FILE) with the value that the nodes have; where the nodes have CRATON_CLUSTER_SECRET (or CRATON_CLUSTER_SECRET_FILE), add that one instead";
    Err(Problem::new(USAGE, what, hint).into())
}

fn compute(
    env: &Environment,
    holder: &Holder<'_>,
    into: &Path,
    judge: Judge<'_>,
) -> anyhow::Result<Vec<String>> {
    let (password, from) = choose(env, holder, judge)?;
    let mut notes = Vec::new();
    if password == REPLICATION_DEFAULT {
        notes.push(format!(
            "WARNING: the cluster's secret is the well-known default of {from}: whoever reaches the containers' ports can do everything. Set CRATON_CLUSTER_SECRET_FILE to a file with a long random text, the same for all containers"
        ));
    } else if from != "CRATON_CLUSTER_SECRET" {
        notes.push(format!(
            "certificates and internal passwords are computed from {from}; CRATON_CLUSTER_SECRET_FILE with a long random text is better"
        ));
    }
    let seed = Seed::from_password(holder.cluster, password)?;
    let authority = seed.authority(holder.cluster)?;
    let names: &[&str] = match holder.kind {
        Kind::Node => &Secrets::FILES,
        Kind::Proxy => &["proxy"],
        Kind::Backup => &["replication"],
    };
    for name in names {
        write_secret(&into.join(name), &format!("{}\n", seed.secret(name)?))?;
    }
    // The bundle first: a certificate is judged by it.
    write_secret(&into.join(BUNDLE_FILE), authority.certificate_pem())?;
    if holder.kind == Kind::Node {
        authority.store_key(&into.join(KEY_FILE))?;
    }
    let hosts = [
        holder.host.to_owned(),
        "localhost".to_owned(),
        "127.0.0.1".to_owned(),
    ];
    let issue = |stem: &str, role: Role, name: &str, hosts: &[String]| {
        let identity = Identity::new(holder.cluster, role, name)?;
        ensure_certificate(&authority, &TlsFiles::in_dir(into, stem), &identity, hosts)
    };
    match holder.kind {
        // The agent issues its own.
        Kind::Node => {}
        Kind::Proxy => {
            issue("proxy", Role::Proxy, holder.name, &hosts)?;
        }
        Kind::Backup => {
            issue("backup", Role::Backup, holder.name, &hosts)?;
        }
    }
    if let Some(name) = env
        .get("CRATON_WITNESS")
        .filter(|_| holder.kind != Kind::Node)
    {
        write_secret(&into.join("peers"), &format!("{}\n", seed.secret("peers")?))?;
        issue(&format!("witness-{name}"), Role::Witness, name, &hosts)?;
    }
    if holder.kind != Kind::Proxy || env.get("PCP_USER").is_some() {
        issue(OPERATOR, Role::Operator, holder.name, &[])?;
    }
    Ok(notes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::super::environment::tests::env as env_of;
    use super::*;
    use craton_trust::Trust;

    fn prepared(
        kind: Kind,
        variables: &[(&str, &str)],
        into: &Path,
    ) -> anyhow::Result<Vec<String>> {
        let env = env_of(kind, variables);
        let holder = Holder {
            kind,
            cluster: "c",
            name: "a",
            host: "pgmaster",
        };
        prepare(&env, &holder, into, &|_| panic!("nobody has to be asked"))
    }

    fn proxy_env(pairs: &[(&str, &str)]) -> Environment {
        env_of(Kind::Proxy, pairs)
    }

    const BALANCER: Holder<'static> = Holder {
        kind: Kind::Proxy,
        cluster: "c",
        name: "a",
        host: "pgpool",
    };

    #[test]
    fn the_balancers_password_need_not_be_the_nodes() {
        let dir = tempfile::tempdir().unwrap();
        let env = proxy_env(&[("CHECK_PASSWORD", "monkey_pass")]);
        for (asked, theirs) in [(1, "monkey_pass"), (2, REPLICATION_DEFAULT)] {
            let count = std::cell::Cell::new(0);
            let judge = |_: &str| {
                count.set(count.get() + 1);
                Ok(count.get() == asked)
            };
            prepare(&env, &BALANCER, dir.path(), &judge).unwrap();
            let secret = std::fs::read_to_string(dir.path().join("proxy")).unwrap();
            let seed = Seed::from_password("c", theirs).unwrap();
            assert_eq!(secret.trim(), seed.secret("proxy").unwrap());
        }
        let refused = prepare(&env, &BALANCER, dir.path(), &|_| Ok(false)).unwrap_err();
        let refused = refused.downcast_ref::<Problem>().unwrap();
        assert_eq!(refused.code, USAGE);
        let tried = "(CHECK_PASSWORD, the default of REPLICATION_PASSWORD)";
        assert!(refused.what.contains(tried), "{}", refused.what);
        let hint = refused.hint.as_deref().unwrap();
        for line in ["`REPLICATION_PASSWORD: …`", "CRATON_CLUSTER_SECRET"] {
            assert!(hint.contains(line), "{hint}");
        }
    }

    #[test]
    fn one_line_makes_a_balancer_of_other_users_trusted() {
        let tried = |pairs: &[(&str, &str)]| -> Vec<String> {
            let env = proxy_env(pairs);
            let found = passwords(&env, Kind::Proxy);
            found.iter().map(|(p, v)| format!("{v}={p}")).collect()
        };
        let stock = [
            ("CHECK_PASSWORD", "monkey_pass"),
            ("DB_USERS", "monkey_user:monkey_pass,other: b"),
        ];
        assert_eq!(
            tried(&stock),
            [
                "CHECK_PASSWORD=monkey_pass",
                "DB_USERS=b",
                "REPLICATION_PASSWORD=replication_pass"
            ]
        );
        let [check, users] = stock;
        assert_eq!(
            tried(&[check, users, ("REPLICATION_PASSWORD", "r")]),
            [
                "REPLICATION_PASSWORD=r",
                "CHECK_PASSWORD=monkey_pass",
                "DB_USERS=b"
            ]
        );
        // Said alone it is sure: nobody has to be asked.
        assert_eq!(
            tried(&[("REPLICATION_PASSWORD", "r")]),
            ["REPLICATION_PASSWORD=r"]
        );
        assert_eq!(
            tried(&[check, ("CRATON_CLUSTER_SECRET", "s")]),
            ["CRATON_CLUSTER_SECRET=s"]
        );
        let many: Vec<String> = (0..100).map(|n| format!("u{n}:p{n}")).collect();
        assert_eq!(tried(&[("DB_USERS", &many.join(","))]).len(), 17);
    }

    #[test]
    fn psql_in_the_containers_finds_passwords() {
        let env = proxy_env(&[
            ("CHECK_USER", "mon:key"),
            ("CHECK_PASSWORD", "p:a\\ss"),
            ("BACKENDS", "0:pgmaster::::,1:pgslave1::::"),
        ]);
        let hosts = ["localhost", "127.0.0.1", "pgpool", "pgmaster", "pgslave1"];
        let lines = hosts.map(|h| format!("{h}:*:*:mon\\:key:p\\:a\\\\ss\n"));
        assert_eq!(pgpass(&env, &BALANCER), lines.concat());
        // What a line cannot hold is left out, and is no other line either.
        let env = proxy_env(&[("CHECK_PASSWORD", "a\n*:*:*:postgres:b")]);
        assert_eq!(pgpass(&env, &BALANCER), "");

        // In a node's container the roles that it was given.
        let node = Holder {
            kind: Kind::Node,
            host: "pgmaster",
            ..BALANCER
        };
        let given = [("POSTGRES_USER", "monkey"), ("POSTGRES_PASSWORD", "mp")];
        let given = env_of(Kind::Node, &given);
        let lines = ["localhost", "127.0.0.1", "pgmaster"].map(|h| format!("{h}:*:*:monkey:mp\n"));
        assert_eq!(pgpass(&given, &node), lines.concat());

        let dir = tempfile::tempdir().unwrap();
        let env = proxy_env(&[("CRATON_CLUSTER_SECRET", "s")]);
        let judge = |_: &str| panic!("nobody has to be asked");
        prepare(&env, &BALANCER, dir.path(), &judge).unwrap();
        let path = dir.path().join(PGPASS);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("localhost:*:*:replication_user:replication_pass\n"));
    }

    fn there(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn each_kind_gets_what_it_needs_and_they_trust_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let [node, proxy, backup] = ["n", "p", "b"].map(|n| dir.path().join(n));
        let secret = [("CRATON_CLUSTER_SECRET", "correct horse battery staple")];
        assert!(prepared(Kind::Node, &secret, &node).unwrap().is_empty());
        prepared(Kind::Proxy, &secret, &proxy).unwrap();
        prepared(Kind::Backup, &secret, &backup).unwrap();
        assert_eq!(
            there(&node),
            [
                "api-token",
                "authority.key",
                "authority.pem",
                "operator.pem",
                "peers",
                "pgpass",
                "proxy",
                "replication",
                "rewind",
                "superuser"
            ]
        );
        assert_eq!(
            there(&proxy),
            ["authority.pem", "pgpass", "proxy", "proxy.pem"]
        );
        assert_eq!(
            there(&backup),
            ["authority.pem", "backup.pem", "operator.pem", "replication"]
        );
        Secrets::read(&node).unwrap();
        assert_eq!(
            std::fs::read(node.join("proxy")).unwrap(),
            std::fs::read(proxy.join("proxy")).unwrap()
        );
        let crossed = TlsFiles {
            authority: node.join(BUNDLE_FILE),
            ..TlsFiles::in_dir(&proxy, "proxy")
        };
        assert_eq!(Trust::open(crossed).unwrap().identity().role, Role::Proxy);
        // A restart changes neither keys nor passwords.
        let before = std::fs::read(node.join("peers")).unwrap();
        prepared(Kind::Node, &secret, &node).unwrap();
        assert_eq!(std::fs::read(node.join("peers")).unwrap(), before);
    }

    #[test]
    fn the_well_known_password_is_warned_of() {
        let dir = tempfile::tempdir().unwrap();
        let notes = prepared(Kind::Backup, &[], dir.path()).unwrap();
        assert!(notes[0].starts_with("WARNING"), "{notes:?}");
    }

    #[test]
    fn a_directory_that_was_handed_in_is_copied_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        let into = dir.path().join("into");
        crate::secrets::ensure_common(&from).unwrap();
        craton_trust::authority::ensure(&from, "c").unwrap();
        let from_text = from.display().to_string();
        prepared(Kind::Node, &[("CRATON_SECRETS_DIR", &from_text)], &into).unwrap();
        let own = there(&into).into_iter().filter(|name| name != PGPASS);
        assert_eq!(there(&from), own.collect::<Vec<_>>());
        let empty = dir.path().join("empty").display().to_string();
        let refused = prepared(Kind::Node, &[("CRATON_SECRETS_DIR", &empty)], &into);
        assert!(refused.unwrap_err().to_string().contains("authority.pem"));
    }
}
