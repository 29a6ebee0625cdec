use proptest::prelude::*;

use super::*;

const SALT: &str = "W22ZaJ0SNY7soEsUEjb6gQ==";

fn rfc_verifier() -> Verifier {
    Verifier::from_password("pencil", &BASE64.decode(SALT).unwrap(), 4096)
}

/// RFC 7677, section 3.
#[test]
fn rfc_7677_example() {
    let mut client = Client::with_nonce(
        ClientIdentity::Password("pencil".into()),
        "user",
        "rOprNGfwEbeRWgbNEkqO",
    );
    assert_eq!(client.first_message(), "n,,n=user,r=rOprNGfwEbeRWgbNEkqO");
    let server = Server::with_nonce(
        rfc_verifier(),
        client.first_message().as_bytes(),
        "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0",
    )
    .unwrap();
    assert_eq!(
        server.first_message(),
        "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
    );
    let proof = client
        .final_message(server.first_message().as_bytes())
        .unwrap();
    assert_eq!(
        proof,
        "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
    );
    let ServerOutcome::Proven {
        server_final,
        client_key,
    } = server.finish(proof.as_bytes()).unwrap()
    else {
        panic!("the proof of the RFC was refused");
    };
    assert_eq!(
        server_final,
        "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
    );
    client.verify(server_final.as_bytes()).unwrap();
    assert_eq!(sha256(&client_key), rfc_verifier().stored_key);
}

#[test]
fn a_recovered_key_logs_in_elsewhere() {
    let verifier = rfc_verifier();
    let client_key = hmac(
        &salted_password("pencil", &verifier.salt, 4096),
        &[b"Client Key"],
    );
    let identity = ClientIdentity::Keys {
        client_key,
        server_key: verifier.server_key,
    };
    let mut client = Client::new(identity, &[7; NONCE_BYTES]);
    let server = Server::new(
        verifier,
        client.first_message().as_bytes(),
        &[9; NONCE_BYTES],
    )
    .unwrap();
    let proof = client
        .final_message(server.first_message().as_bytes())
        .unwrap();
    let ServerOutcome::Proven { server_final, .. } = server.finish(proof.as_bytes()).unwrap()
    else {
        panic!()
    };
    client.verify(server_final.as_bytes()).unwrap();
    assert_eq!(client.verify(b"v=AAAA"), Err(ScramError::ServerSignature));
}

#[test]
fn wrong_passwords_and_unknown_users_look_the_same() {
    for verifier in [rfc_verifier(), Verifier::mock("nobody", &[1; KEY_LEN])] {
        let mut client = Client::new(ClientIdentity::Password("wrong".into()), &[7; NONCE_BYTES]);
        let server = Server::new(
            verifier,
            client.first_message().as_bytes(),
            &[9; NONCE_BYTES],
        )
        .unwrap();
        let proof = client
            .final_message(server.first_message().as_bytes())
            .unwrap();
        assert_eq!(server.finish(proof.as_bytes()), Ok(ServerOutcome::Wrong));
    }
    assert_eq!(
        Verifier::mock("a", &[1; KEY_LEN]),
        Verifier::mock("a", &[1; KEY_LEN])
    );
    assert_ne!(
        Verifier::mock("a", &[1; KEY_LEN]).salt,
        Verifier::mock("b", &[1; KEY_LEN]).salt
    );
    assert_eq!(Verifier::mock("a", &[1; KEY_LEN]).salt.len(), SALT_LEN);
}

#[test]
fn verifiers_round_trip() {
    let text = rfc_verifier().to_text();
    assert_eq!(Verifier::parse(&text), Some(rfc_verifier()));
    for bad in [
        "",
        "SCRAM-SHA-256$",
        "SCRAM-SHA-256$0:AA==$AA==:AA==",
        "md5abc",
        "SCRAM-SHA-256$4096:AA==$AA==:AA==",
    ] {
        assert_eq!(Verifier::parse(bad), None, "{bad}");
    }
    assert!(
        !format!("{:?}", rfc_verifier()).contains("stored"),
        "secrets stay out of Debug"
    );
}

#[test]
fn passwords_are_prepared() {
    assert_eq!(normalize("I\u{AD}X"), b"IX");
    assert_eq!(normalize("\u{2168}"), b"IX");
    assert_eq!(
        normalize("\u{7}"),
        b"\x07",
        "what SASLprep prohibits is used as it is"
    );
}

#[test]
fn replayed_nonces_and_greedy_servers_are_refused() {
    let mut client = Client::new(ClientIdentity::Password("x".into()), &[7; NONCE_BYTES]);
    assert_eq!(
        client.final_message(b"r=other,s=AAAA,i=1"),
        Err(ScramError::Nonce)
    );
    let nonce = nonce_text(&[7; NONCE_BYTES]);
    assert_eq!(
        client.final_message(format!("r={nonce},s=AAAA,i=1").as_bytes()),
        Err(ScramError::Nonce)
    );
    let greedy = format!("r={nonce}x,s=AAAA,i=4000000000");
    assert_eq!(
        client.final_message(greedy.as_bytes()),
        Err(ScramError::Iterations(4_000_000_000))
    );
    assert_eq!(
        Server::new(rfc_verifier(), b"p=tls-unique,,n=,r=x", &[9; NONCE_BYTES]).err(),
        Some(ScramError::ChannelBinding)
    );
}

proptest! {
    #[test]
    fn arbitrary_messages_never_panic(first in ".{0,60}", last in proptest::collection::vec(any::<u8>(), 0..80)) {
        if let Ok(server) = Server::new(rfc_verifier(), first.as_bytes(), &[1; NONCE_BYTES]) {
            prop_assert!(server.finish(&last).ok() != Some(ServerOutcome::Wrong) || !last.is_empty());
        }
        let mut client = Client::new(
            ClientIdentity::Keys { client_key: [0; KEY_LEN], server_key: [0; KEY_LEN] },
            &[1; NONCE_BYTES],
        );
        let _ = client.final_message(&last);
        let _ = client.verify(&last);
        let _ = Verifier::parse(&first);
    }
}
