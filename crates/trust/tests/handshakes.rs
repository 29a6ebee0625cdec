//! Who gets through a handshake, and what the others are told.
#![allow(clippy::unwrap_used, reason = "helpers of a test may fail it")]

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use craton_trust::authority::{self, Authority, KEY_FILE, ensure_certificate};
use craton_trust::files::write_secret;
use craton_trust::{Expect, Identity, Role, TlsFiles, TlsSettings, Trust};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

fn identity(role: Role, name: &str) -> Identity {
    Identity::new("c", role, name).unwrap()
}

/// A part with a certificate of this authority.
fn part(dir: &Path, authority: &Authority, role: Role, name: &str) -> Arc<Trust> {
    let files = TlsFiles::in_dir(dir, name);
    ensure_certificate(authority, &files, &identity(role, name), &[]).unwrap();
    Trust::open(files).unwrap()
}

struct Place {
    dir: tempfile::TempDir,
    authority: Authority,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority::ensure(dir.path(), "c").unwrap();
    Place { dir, authority }
}

/// What both sides make of a connection: the client after it has read what the server sent, the server's peer.
async fn meet(
    server: &Arc<Trust>,
    client: &Trust,
    expect: &Expect,
) -> (io::Result<String>, io::Result<Option<Identity>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Arc::clone(server);
    let accepting = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let (mut stream, peer) = server.accept(stream).await?;
        stream.write_all(b"hello").await?;
        stream.shutdown().await?;
        Ok(peer)
    });
    let said = async {
        let stream = TcpStream::connect(address).await?;
        let mut stream = client.connect(stream, expect).await?;
        let mut said = String::new();
        stream.read_to_string(&mut said).await?;
        Ok(said)
    };
    let said = said.await;
    (said, accepting.await.unwrap())
}

#[tokio::test]
async fn each_knows_the_other() {
    let p = place();
    let node = part(p.dir.path(), &p.authority, Role::Node, "a");
    let proxy = part(p.dir.path(), &p.authority, Role::Proxy, "p");
    let (said, peer) = meet(&node, &proxy, &Expect::Role(Role::Node)).await;
    assert_eq!(said.unwrap(), "hello");
    assert_eq!(peer.unwrap(), Some(identity(Role::Proxy, "p")));
    let exactly = Expect::Exactly(Role::Node, "a".into());
    assert_eq!(meet(&node, &proxy, &exactly).await.0.unwrap(), "hello");
    // A voter is a member or a witness of that name.
    let witness = part(p.dir.path(), &p.authority, Role::Witness, "w");
    for (server, name) in [(&node, "a"), (&witness, "w")] {
        let voter = Expect::Voter(name.into());
        assert_eq!(meet(server, &node, &voter).await.0.unwrap(), "hello");
    }
    for (server, name) in [(&proxy, "p"), (&witness, "a")] {
        let voter = Expect::Voter(name.into());
        assert!(meet(server, &node, &voter).await.0.is_err(), "{name}");
    }
}

#[tokio::test]
async fn another_name_or_role_at_the_other_end_is_refused_before_anything_is_sent() {
    let p = place();
    let node = part(p.dir.path(), &p.authority, Role::Node, "a");
    let other = part(p.dir.path(), &p.authority, Role::Node, "b");
    for expect in [
        Expect::Exactly(Role::Node, "c".into()),
        Expect::Role(Role::Backup),
    ] {
        let error = meet(&node, &other, &expect)
            .await
            .0
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("was expected") && error.contains("craton://c/node/a"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn another_authority_is_refused_by_both_sides() {
    let (p, q) = (place(), place());
    let node = part(p.dir.path(), &p.authority, Role::Node, "a");
    let stranger = part(q.dir.path(), &q.authority, Role::Node, "a");
    let (said, peer) = meet(&node, &stranger, &Expect::Role(Role::Node)).await;
    let said = said.unwrap_err().to_string();
    assert!(said.contains("not trusted here"), "{said}");
    assert!(peer.is_err());
    // One that trusts the node's authority, but whose own certificate comes from elsewhere.
    let mixed = q.dir.path().join("mixed.pem");
    write_secret(
        &mixed,
        &q.authority.issue(&identity(Role::Node, "a"), &[]).unwrap(),
    )
    .unwrap();
    let bundle = format!(
        "{}{}",
        p.authority.certificate_pem(),
        q.authority.certificate_pem()
    );
    write_secret(&q.dir.path().join("authority.pem"), &bundle).unwrap();
    let mixed = Trust::open(TlsFiles::in_dir(q.dir.path(), "mixed")).unwrap();
    let (said, peer) = meet(&node, &mixed, &Expect::Role(Role::Node)).await;
    let (said, peer) = (said.unwrap_err().to_string(), peer.unwrap_err().to_string());
    assert!(said.contains("refused our certificate"), "{said}");
    assert!(peer.contains("not trusted here"), "{peer}");
}

#[tokio::test]
async fn an_expired_certificate_is_refused_and_both_sides_say_so() {
    let p = place();
    let node = part(p.dir.path(), &p.authority, Role::Node, "a");
    let files = TlsFiles::in_dir(p.dir.path(), "late");
    let expect = Expect::Role(Role::Node);
    let mut valid_s = 6;
    let late = loop {
        let soon = SystemTime::now() + Duration::from_secs(valid_s);
        let late = p
            .authority
            .issue_until(&identity(Role::Operator, "late"), &[], soon)
            .unwrap();
        write_secret(&files.certificate, &late).unwrap();
        if let Ok(late) = Trust::open(files.clone())
            && meet(&node, &late, &expect).await.0.is_ok()
        {
            break late;
        }
        // A machine that stands still lets it expire first.
        valid_s *= 2;
        assert!(valid_s < 100, "it is never taken");
    };
    while late.valid_for() > Duration::ZERO {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // X.509 counts in seconds, and the last one belongs to it.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let (said, peer) = meet(&node, &late, &expect).await;
    let (said, peer) = (said.unwrap_err().to_string(), peer.unwrap_err().to_string());
    assert!(said.contains("it has expired"), "{said}");
    assert!(peer.contains("it has expired"), "{peer}");
    // And it is not even opened any more.
    let error = Trust::open(files).unwrap_err().to_string();
    assert!(
        error.contains("late.pem") && error.contains("expired"),
        "{error}"
    );
}

#[tokio::test]
async fn another_clusters_certificate_of_the_same_authority_is_refused() {
    let p = place();
    let node = part(p.dir.path(), &p.authority, Role::Node, "a");
    // A company's authority may sign for several clusters: the bundle is then the same.
    let other = Authority::create("d").unwrap();
    let q = tempfile::tempdir().unwrap();
    let bundle = format!(
        "{}{}",
        p.authority.certificate_pem(),
        other.certificate_pem()
    );
    for dir in [p.dir.path(), q.path()] {
        write_secret(&dir.join("authority.pem"), &bundle).unwrap();
    }
    let files = TlsFiles::in_dir(q.path(), "x");
    let theirs = Identity::new("d", Role::Node, "a").unwrap();
    ensure_certificate(&other, &files, &theirs, &[]).unwrap();
    assert!(node.reload().unwrap());
    let stranger = Trust::open(files).unwrap();
    let (said, _) = meet(&node, &stranger, &Expect::Role(Role::Node)).await;
    assert!(said.unwrap_err().to_string().contains("was expected"));
    let (said, _) = meet(&stranger, &node, &Expect::Role(Role::Node)).await;
    assert!(said.unwrap_err().to_string().contains("was expected"));
}

#[tokio::test]
async fn plain_http_gets_an_answer_that_it_understands() {
    let p = place();
    let node = part(p.dir.path(), &p.authority, Role::Node, "a");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let accepting = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        node.accept(stream).await.map(|_| ())
    });
    let mut plain = TcpStream::connect(address).await.unwrap();
    plain
        .write_all(b"GET /health HTTP/1.0\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    // The server may close before it read the request: then a reset follows the answer.
    let _ = plain.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).unwrap();
    assert!(
        answer.starts_with("HTTP/1.0 400") && answer.contains("speaks TLS"),
        "{answer}"
    );
    assert!(accepting.await.unwrap().is_err());
}

#[tokio::test]
async fn a_new_certificate_is_taken_up_and_a_broken_one_is_not() {
    let p = place();
    let node = part(p.dir.path(), &p.authority, Role::Node, "a");
    let operator = part(p.dir.path(), &p.authority, Role::Operator, "o");
    let works = async || {
        meet(&node, &operator, &Expect::Role(Role::Node))
            .await
            .0
            .is_ok()
    };
    assert!(!node.reload().unwrap(), "nothing has changed");
    let first = node.facts();
    let place = node.files().certificate.clone();
    for broken in ["", "-----BEGIN CERTIFICATE-----\nAAAA\n", "nonsense"] {
        write_secret(&place, broken).unwrap();
        assert!(node.reload().is_err(), "{broken:?}");
        assert_eq!(node.facts(), first);
        assert!(works().await);
    }
    // Somebody else's does not replace it either.
    let other = p.authority.issue(&identity(Role::Node, "b"), &[]).unwrap();
    write_secret(&place, &other).unwrap();
    assert!(node.reload().unwrap_err().to_string().contains("restart"));
    let until = SystemTime::now() + Duration::from_secs(86_400);
    let next = p
        .authority
        .issue_until(
            &identity(Role::Node, "a"),
            &["10.0.0.1".into(), "db1".into()],
            until,
        )
        .unwrap();
    write_secret(&place, &next).unwrap();
    assert!(node.reload().unwrap());
    assert_eq!(node.facts().hosts, ["10.0.0.1", "db1"]);
    assert!(node.facts().is_due(SystemTime::now()));
    assert!(works().await);
}

/// The order of a change of authorities: trust both, sign with the new one, forget the old one.
#[tokio::test]
async fn an_authority_is_replaced_without_a_moment_without_trust() {
    let p = place();
    let a = part(p.dir.path(), &p.authority, Role::Node, "a");
    let b = part(p.dir.path(), &p.authority, Role::Node, "b");
    let expect = Expect::Role(Role::Node);
    let all_reach_all = async |when: &str| {
        for (x, y) in [(&a, &b), (&b, &a)] {
            let (said, peer) = meet(x, y, &expect).await;
            assert!(said.is_ok() && peer.is_ok(), "{when}: {said:?} {peer:?}");
        }
    };
    let next = Authority::create("c").unwrap();
    let bundle = p.dir.path().join("authority.pem");
    let both = format!(
        "{}{}",
        p.authority.certificate_pem(),
        next.certificate_pem()
    );
    write_secret(&bundle, &both).unwrap();
    assert!(a.reload().unwrap());
    all_reach_all("one trusts both").await;
    assert!(b.reload().unwrap());
    next.store_key(&p.dir.path().join(KEY_FILE)).unwrap();
    let next = Authority::load(&p.dir.path().join(KEY_FILE)).unwrap();
    assert!(ensure_certificate(&next, a.files(), &a.identity(), &[]).unwrap());
    assert!(a.reload().unwrap());
    all_reach_all("one has a new certificate").await;
    assert!(ensure_certificate(&next, b.files(), &b.identity(), &[]).unwrap());
    assert!(!ensure_certificate(&next, b.files(), &b.identity(), &[]).unwrap());
    assert!(b.reload().unwrap());
    write_secret(&bundle, next.certificate_pem()).unwrap();
    assert!(a.reload().unwrap());
    all_reach_all("one has forgotten the old authority").await;
}

#[test]
fn requests_are_signed_for_whom_the_authority_says() {
    let p = place();
    let (key, request) = authority::request().unwrap();
    let who = identity(Role::Proxy, "p1");
    let certificate = p
        .authority
        .sign_request(&who, &["p1.example".into()], &request)
        .unwrap();
    let path = p.dir.path().join("p1.pem");
    write_secret(&path, &format!("{certificate}{key}")).unwrap();
    let trust = Trust::open(TlsFiles::in_dir(p.dir.path(), "p1")).unwrap();
    assert_eq!(trust.identity(), who);
    assert_eq!(trust.facts().hosts, ["p1.example"]);
    let damaged = request.replacen('A', "B", 3);
    for wrong in ["", "nonsense", damaged.as_str(), &"x".repeat(9000)] {
        assert!(
            p.authority.sign_request(&who, &[], wrong).is_err(),
            "{wrong}"
        );
    }
    assert!(
        p.authority
            .sign_request(
                &Identity::new("d", Role::Proxy, "p1").unwrap(),
                &[],
                &request
            )
            .is_err()
    );
}

#[test]
fn keys_that_others_can_read_are_refused_and_settings_say_what_is_missing() {
    use std::os::unix::fs::PermissionsExt as _;
    let p = place();
    let trust = part(p.dir.path(), &p.authority, Role::Node, "a");
    let key = &trust.files().key;
    std::fs::set_permissions(key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = Trust::open(trust.files().clone()).unwrap_err().to_string();
    assert!(
        error.contains("a.pem") && error.contains("chmod 600"),
        "{error}"
    );

    let files = TlsSettings::default()
        .files("node.tls", Some(p.dir.path()), "node-a")
        .unwrap();
    assert_eq!(files, Some(TlsFiles::in_dir(p.dir.path(), "node-a")));
    let error = TlsSettings::default()
        .files("proxy.tls", None, "proxy")
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("proxy.tls.certificate is missing"),
        "{error}"
    );
    assert_eq!(
        TlsSettings::off().files("node.tls", None, "x").unwrap(),
        None
    );
    // A bundle without its key is a host that joined: nothing may be made up there.
    std::fs::remove_file(p.dir.path().join(KEY_FILE)).unwrap();
    assert!(authority::ensure(p.dir.path(), "c").is_err());
}
