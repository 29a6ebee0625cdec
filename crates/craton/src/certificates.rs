//! Certificates as the command line uses and makes them.

use std::path::Path;
use std::sync::Arc;

use craton_trust::authority::{self, Authority, KEY_FILE, ensure_certificate};
use craton_trust::{Identity, Role, TlsFiles, Trust, renewal};

use crate::cli::wait_for;
use crate::exit::{Problem, USAGE};
use crate::layout::{HOST, Layout, WITNESS_NAME};
use crate::output;

/// The file of an operator's certificate, in a directory of certificates.
pub const OPERATOR: &str = "operator";

/// Makes what a local cluster lacks: its authority and a certificate for each part.
pub fn ensure_local(layout: &Layout) -> anyhow::Result<()> {
    let dir = layout.secrets();
    let authority = authority::ensure(&dir, &layout.cluster.name)?;
    let hosts = [HOST.to_string(), "localhost".to_owned()];
    let members = layout
        .cluster
        .members
        .iter()
        .map(|m| (format!("node-{m}"), Role::Node, m.as_str()));
    let others = [
        ("proxy".to_owned(), Role::Proxy, "proxy"),
        ("backup".to_owned(), Role::Backup, "backup"),
        (OPERATOR.to_owned(), Role::Operator, "local"),
    ];
    let witness = layout.cluster.witness.then(|| {
        let stem = format!("witness-{WITNESS_NAME}");
        (stem, Role::Witness, WITNESS_NAME)
    });
    for (stem, role, name) in members.chain(others).chain(witness) {
        let identity = Identity::new(&layout.cluster.name, role, name)?;
        let hosts = if role == Role::Operator {
            &[][..]
        } else {
            &hosts
        };
        ensure_certificate(&authority, &TlsFiles::in_dir(&dir, &stem), &identity, hosts)?;
    }
    Ok(())
}

/// The operator's certificate in a directory. Where the authority's key lies beside it, a missing or old one is
/// issued on the way: whoever may read that key is an operator anyway.
pub fn operator(dir: &Path) -> anyhow::Result<Arc<Trust>> {
    let files = TlsFiles::in_dir(dir, OPERATOR);
    let key = dir.join(KEY_FILE);
    if key.exists() {
        let authority = Authority::load(&key)?;
        let identity = match Trust::open(files.clone()) {
            Ok(trust) => trust.identity(),
            Err(_) => Identity::new(authority.cluster(), Role::Operator, "local")?,
        };
        ensure_certificate(&authority, &files, &identity, &[])?;
    }
    if !files.certificate.exists() {
        let what = format!("there is no {}", files.certificate.display());
        let hint = "`craton join HOST:PORT --token … --into DIR` gets an operator's certificate, `craton ca token --role operator` on a member's host makes the token";
        return Err(Problem::new(USAGE, what, hint).into());
    }
    Ok(Trust::open(files)?)
}

/// On a host without the authority's key an agent signs an operator's new certificate, while the present one is good.
pub fn renew_if_due(trust: &Arc<Trust>, agents: &[String]) {
    if !renewal::is_due(trust) {
        return;
    }
    let renewed = wait_for(async {
        craton_console::renewal::renew_once(trust, agents).await?;
        trust.reload()?;
        anyhow::Ok(())
    });
    if let Err(error) = renewed {
        let hours = trust.valid_for().as_secs() / 3600;
        output::note(format!(
            "warning: this operator's certificate is valid for {hours} more hours and could not be renewed: {error:#}"
        ));
    }
}
