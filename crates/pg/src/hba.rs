//! Who may log in: `pg_hba.conf` and `pg_ident.conf`.

use std::fmt::Write as _;

use crate::config::Place;
use crate::error::{PgError, Result};
use crate::roles::{PROXY_ROLE, REPLICATION_ROLE, REWIND_ROLE};

/// A line of `pg_hba.conf` for TCP.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HbaRule {
    /// Database list, `all` or `replication`.
    pub database: String,
    /// Role list or `all`.
    pub user: String,
    /// CIDR network, or `all`, `samehost`, `samenet`.
    pub address: String,
    /// `scram-sha-256`, `reject`, …
    pub method: String,
    /// Only with TLS (`hostssl`).
    pub tls: bool,
    /// Only with a certificate of the cluster's authority, besides what the method asks for.
    pub certificate: bool,
}

impl HbaRule {
    /// What each of the cluster's own roles may reach, and nothing else; then SCRAM for everybody else from these
    /// networks. With `tls` the own roles need TLS and a certificate of the authority besides their password: a
    /// stolen password alone replicates nothing. Nor does any other role's: those with `REPLICATION` need the
    /// certificate, too.
    pub fn standard(networks: &[&str], tls: bool) -> Vec<Self> {
        let rule = |database: &str, user: &str, address: &str, own: bool| Self {
            database: database.to_owned(),
            user: user.to_owned(),
            address: address.to_owned(),
            method: "scram-sha-256".to_owned(),
            tls: tls && own,
            certificate: tls && own,
        };
        let own = [
            ("replication", REPLICATION_ROLE),
            ("postgres", REWIND_ROLE),
            ("postgres", PROXY_ROLE),
        ];
        let mut rules: Vec<Self> = networks
            .iter()
            .flat_map(|n| own.map(|(database, role)| rule(database, role, n, true)))
            .collect();
        // The first line that fits counts: past this one nothing matches the own roles.
        rules.push(Self {
            method: "reject".to_owned(),
            ..rule("all", &own.map(|(_, role)| role).join(","), "all", false)
        });
        // Below, `all` is every database, and replication is none.
        rules.extend(networks.iter().map(|n| rule("replication", "all", n, true)));
        rules.extend(networks.iter().map(|n| rule("all", "all", n, false)));
        rules
    }

    /// Lets everybody else in by MD5, too. Roles with a SCRAM verifier are asked for SCRAM all the same (`CheckPWChallengeAuth`).
    #[must_use]
    pub fn with_md5(mut rules: Vec<Self>) -> Vec<Self> {
        for rule in &mut rules {
            if rule.user == "all" && rule.method == "scram-sha-256" {
                "md5".clone_into(&mut rule.method);
            }
        }
        rules
    }
}

/// Its name.
pub(crate) const FILE: &str = "pg_hba.conf";
/// In the file while clients are refused.
const CLOSED: &str = "# Closed: what this primary recovered is not on enough standbys yet. Only the cluster itself is let in.\n";

/// True if the file refuses clients.
pub(crate) fn is_closed(text: &str) -> bool {
    text.contains(CLOSED)
}

/// The text of `pg_hba.conf`. While it is `closed`, the cluster's own roles are let in, and the superuser on this host.
pub(crate) fn hba(place: &Place<'_>, rules: &[HbaRule], closed: bool) -> Result<String> {
    let mut text = String::from("# Written by the craton agent: changes are overwritten.\n");
    if closed {
        text.push_str(CLOSED);
    }
    let _ = writeln!(
        text,
        "local all {} peer map=craton",
        hba_token(place.superuser)?
    );
    let others = if closed { "reject" } else { "scram-sha-256" };
    let _ = writeln!(text, "local all all {others}");
    // Nothing below that names no role matches any more.
    let rules = rules.iter().filter(|r| !closed || r.user != "all");
    for rule in rules {
        let [database, user, address, method] =
            [&rule.database, &rule.user, &rule.address, &rule.method].map(|t| hba_token(t));
        let kind = if rule.tls { "hostssl" } else { "host" };
        let certificate = if rule.certificate {
            " clientcert=verify-ca"
        } else {
            ""
        };
        let _ = writeln!(
            text,
            "{kind} {} {} {} {}{certificate}",
            database?, user?, address?, method?
        );
    }
    Ok(text)
}

/// The text of `pg_ident.conf`.
pub(crate) fn ident(place: &Place<'_>) -> Result<String> {
    let superuser = hba_token(place.superuser)?;
    Ok(format!(
        "# Written by the craton agent: the owner of the server's processes is its superuser, and so is root, who can\n\
         # become any user.\n\
         craton {} {superuser}\n\
         craton root {superuser}\n",
        hba_token(place.os_user)?,
    ))
}

/// One column of `pg_hba.conf` or `pg_ident.conf`: no white space, no quotes, no comment.
fn hba_token(token: &str) -> Result<&str> {
    let fits = !token.is_empty()
        && !token
            .chars()
            .any(|c| c.is_whitespace() || c.is_control() || c == '"' || c == '#');
    if fits {
        Ok(token)
    } else {
        Err(PgError::Invalid {
            what: "pg_hba.conf",
            reason: format!("{token:?} cannot be a column"),
        })
    }
}
