use std::path::{Path, PathBuf};

use super::server::{Certificates, Servers, ctl, done, id, members, place, room, soon, stop};
use crate::api::CoordinatorError;
use crate::conformance;
use crate::etcd::Etcd;
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
    ctl(&servers, &["role", "add", "another"]).await;
    let read = async || etcd.read().await;
    done("a new login is made by itself", read).await;
    stop(members).await;
}

async fn refused_strangers(place: &Place, wrong: &Path, theirs: &Certificates) {
    let guess = Place {
        password_file: Some(wrong.to_owned()),
        ..place.clone()
    };
    turned_away(&guess, refused("password_file")).await;
    let nobody = Place {
        username: None,
        password_file: None,
        ..place.clone()
    };
    turned_away(&nobody, refused("coordinator.username")).await;
    let elsewhere = Place {
        prefix: Some("/other/".into()),
        ..place.clone()
    };
    turned_away(&elsewhere, refused("grant")).await;
    let impostor = Place {
        ca_file: Some(theirs.ca.clone()),
        ..place.clone()
    };
    turned_away(
        &impostor,
        |told| matches!(told, CoordinatorError::Unavailable(why) if why.contains("TLS")),
    )
    .await;
    let stranger = Place {
        cert_file: Some(theirs.cert.clone()),
        key_file: Some(theirs.key.clone()),
        ..place.clone()
    };
    turned_away(&stranger, |_| true).await;
}

fn refused(hint: &str) -> impl Fn(&CoordinatorError) -> bool {
    move |told| matches!(told, CoordinatorError::Refused(why) if why.contains(hint))
}

/// Whoever reads so gets nothing, and is told why.
async fn turned_away(place: &Place, good: impl Fn(&CoordinatorError) -> bool) {
    let ask = async || {
        let etcd = Etcd::start(place, "test", id(0), room(0)).unwrap();
        let answer = etcd.read().await;
        etcd.stop().await;
        answer.unwrap_err()
    };
    soon("turned away", ask, good).await;
}
