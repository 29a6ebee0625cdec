use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};
use tokio::time::{Instant, sleep};

use super::server::{PATIENCE, Servers, id, members, stop};
use crate::api::CoordinatorError;
use crate::conformance;
use crate::place::Place;

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

/// An authority, and a certificate of it for 127.0.0.1 that serves and asks.
fn certificates(dir: &Path, name: &str) -> (PathBuf, PathBuf, PathBuf) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    // With users as well, etcd's gateway refuses certificates that have a common name.
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &authority).unwrap();
    (
        write(dir, &format!("{name}-ca.pem"), &authority.pem()),
        write(dir, &format!("{name}.pem"), &certificate.pem()),
        write(dir, &format!("{name}.key"), &key.serialize_pem()),
    )
}

/// TLS both ways, user and password on top; strangers are refused with words that help.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_and_a_user_conform() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, cert, key) = certificates(dir.path(), "ours");
    let (other_ca, other_cert, other_key) = certificates(dir.path(), "theirs");
    let password = write(dir.path(), "password", "open sesame\n");
    let wrong = write(dir.path(), "wrong", "guess\n");
    let text = |p: &PathBuf| p.display().to_string();
    let (ca_text, cert_text, key_text) = (text(&ca), text(&cert), text(&key));
    let extra = [
        "--cert-file",
        cert_text.as_str(),
        "--key-file",
        key_text.as_str(),
        "--trusted-ca-file",
        ca_text.as_str(),
        "--client-cert-auth",
        // Tokens that run out while the suite runs.
        "--auth-token-ttl",
        "5",
    ];
    let servers = Servers::start_in(dir, 3, &extra, "https").await;
    let tls = [
        "--cacert", &ca_text, "--cert", &cert_text, "--key", &key_text,
    ];
    let prepare: [&[&str]; 7] = [
        &["user", "add", "root:rootpassword"],
        &["user", "grant-role", "root", "root"],
        &["role", "add", "craton"],
        &[
            "role",
            "grant-permission",
            "--prefix=true",
            "craton",
            "readwrite",
            "/craton/test/",
        ],
        &["user", "add", "craton:open sesame"],
        &["user", "grant-role", "craton", "craton"],
        &["auth", "enable"],
    ];
    for command in prepare {
        let due = Instant::now() + PATIENCE;
        loop {
            let (out, ok) = servers.ctl(&[&tls[..], command].concat());
            if ok || out.contains("already") {
                break;
            }
            assert!(Instant::now() < due, "{command:?}: {out}");
            sleep(std::time::Duration::from_millis(100)).await;
        }
    }
    let place = Place {
        username: Some("craton".into()),
        password_file: Some(password),
        ca_file: Some(ca.clone()),
        cert_file: Some(cert),
        key_file: Some(key),
        ..servers.place()
    };
    refused_strangers(&place, &wrong, &other_ca, (&other_cert, &other_key)).await;
    let members = members(&place, 3).await;
    conformance::run(&members.handles()).await;
    // Every token is void at once, in the middle of work.
    let etcd = members.nth(0);
    let root = [&tls[..], &["--user", "root:rootpassword"]].concat();
    let (out, ok) = servers.ctl(&[&root[..], &["role", "add", "another"]].concat());
    assert!(ok, "{out}");
    assert!(etcd.read().await.is_ok(), "a new login is made by itself");
    stop(members).await;
}

async fn refused_strangers(
    place: &Place,
    wrong: &Path,
    other_ca: &Path,
    other: (&PathBuf, &PathBuf),
) {
    let ask = async |place: Place| {
        let room = super::server::room(0);
        let etcd = crate::etcd::Etcd::start(&place, "test", id(0), room).unwrap();
        let answer = etcd.read().await.map(|_| ());
        etcd.stop().await;
        answer
    };
    let guess = ask(Place {
        password_file: Some(wrong.to_owned()),
        ..place.clone()
    })
    .await;
    assert!(
        matches!(&guess, Err(CoordinatorError::Refused(why)) if why.contains("password_file")),
        "{guess:?}"
    );
    let nobody = ask(Place {
        username: None,
        password_file: None,
        ..place.clone()
    })
    .await;
    assert!(
        matches!(&nobody, Err(CoordinatorError::Refused(why)) if why.contains("coordinator.username")),
        "{nobody:?}"
    );
    let elsewhere = ask(Place {
        prefix: Some("/other/".into()),
        ..place.clone()
    })
    .await;
    assert!(
        matches!(&elsewhere, Err(CoordinatorError::Refused(why)) if why.contains("grant")),
        "{elsewhere:?}"
    );
    let impostor = ask(Place {
        ca_file: Some(other_ca.to_owned()),
        ..place.clone()
    })
    .await;
    assert!(
        matches!(&impostor, Err(CoordinatorError::Unavailable(why)) if why.contains("TLS")),
        "{impostor:?}"
    );
    let stranger = ask(Place {
        cert_file: Some(other.0.clone()),
        key_file: Some(other.1.clone()),
        ..place.clone()
    })
    .await;
    assert!(stranger.is_err(), "{stranger:?}");
}
