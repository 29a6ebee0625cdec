use std::path::{Path, PathBuf};

use super::server::{Certificates, Servers, id, members, place, stop};
use crate::api::CoordinatorError;
use crate::conformance;
use crate::place::Place;

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

/// TLS both ways, user and password on top; strangers are refused with words that help.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_and_a_user_conform() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Certificates::make(dir.path(), "ours");
    let theirs = Certificates::make(dir.path(), "theirs");
    let password = write(dir.path(), "password", "open sesame\n");
    let wrong = write(dir.path(), "wrong", "guess\n");
    // Tokens that run out while the suite runs.
    let mut servers = Servers::start_in(dir, 3, &["--auth-token-ttl", "5"], Some(&ours));
    servers.ask_for_users("/craton/test/");
    let place = Place {
        username: Some("craton".into()),
        password_file: Some(password),
        ca_file: Some(ours.ca.clone()),
        cert_file: Some(ours.cert.clone()),
        key_file: Some(ours.key.clone()),
        ..place(&servers)
    };
    refused_strangers(&place, &wrong, &theirs).await;
    let members = members(&place, 3).await;
    conformance::run(&members.handles()).await;
    // Every token is void at once, in the middle of work.
    let etcd = members.nth(0);
    let (out, ok) = servers.ctl(&["role", "add", "another"]);
    assert!(ok, "{out}");
    assert!(etcd.read().await.is_ok(), "a new login is made by itself");
    stop(members).await;
}

async fn refused_strangers(place: &Place, wrong: &Path, theirs: &Certificates) {
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
        ca_file: Some(theirs.ca.clone()),
        ..place.clone()
    })
    .await;
    assert!(
        matches!(&impostor, Err(CoordinatorError::Unavailable(why)) if why.contains("TLS")),
        "{impostor:?}"
    );
    let stranger = ask(Place {
        cert_file: Some(theirs.cert.clone()),
        key_file: Some(theirs.key.clone()),
        ..place.clone()
    })
    .await;
    assert!(stranger.is_err(), "{stranger:?}");
}
