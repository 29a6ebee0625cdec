//! Who is at the other end. First mutual TLS: each side shows a certificate of a member's agent or of a witness, the dialer sees that
//! it is the member that it wanted, the acceptor that the member named in the certificate is the one that speaks.
//!
//! Inside of that both prove that they know the cluster's secret, without sending it:
//!
//! ```text
//! dialer   ──▶ Hello   { version, cluster, from, to, purpose, nonce }
//! acceptor ──▶ Proof   { nonce, HMAC(secret, "acceptor", all of the above) }
//! dialer   ──▶ Finish  { HMAC(secret, "dialer", all of the above) }
//! ```
//!
//! The frames after that carry a tag under a key that both nonces and the secret give, one key a direction,
//! and a counter, so that nothing can be altered, replayed or slipped in. TLS gives the same, and more. This stays
//! because it costs microseconds, because it is what isolated tests without TLS have, and because whoever steals the
//! authority's key (say from a backup of one host's disk) then still has no say in elections without the secret.

use std::sync::Arc;
use std::time::Duration;

use craton_core::MemberId;
use craton_trust::{Expect, Stream, Trust};
use serde::{Deserialize, Serialize};
use tokio::io::{ReadHalf, WriteHalf, split};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::frame::{FrameError, FrameReader, FrameWriter, Key, mac};

/// The protocol's version. Both sides must speak the same.
const VERSION: u32 = 1;

/// How long a peer has to prove itself.
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);

/// What a connection is for. Each has its own, so that nothing queues behind something else.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Purpose {
    /// Raft messages, one way.
    Raft,
    /// Presence, one way.
    Presence,
    /// Lease questions and their answers.
    Lease,
    /// Transactions and reads for the Raft leader.
    Call,
}

/// What both sides must know.
#[derive(Clone)]
pub(super) struct Identity {
    pub(super) cluster: String,
    pub(super) me: MemberId,
    pub(super) secret: Vec<u8>,
    /// None in isolated tests alone.
    pub(super) trust: Option<Arc<Trust>>,
}

#[derive(Serialize, Deserialize)]
struct Hello {
    version: u32,
    cluster: String,
    from: MemberId,
    to: MemberId,
    purpose: Purpose,
    nonce: [u8; 32],
}

#[derive(Serialize, Deserialize)]
struct Proof {
    nonce: [u8; 32],
    proof: [u8; 32],
}

#[derive(Serialize, Deserialize)]
struct Finish {
    proof: [u8; 32],
}

/// A connection whose other end is known.
pub(super) struct Session {
    pub(super) reader: FrameReader<ReadHalf<Stream<TcpStream>>>,
    pub(super) writer: FrameWriter<WriteHalf<Stream<TcpStream>>>,
    pub(super) peer: MemberId,
    pub(super) purpose: Purpose,
}

/// Why the other end is not trusted.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("no handshake within {} ms", HANDSHAKE_TIMEOUT.as_millis())]
    TimedOut,
    #[error("the peer speaks version {0} of the coordinator's protocol, this is {VERSION}")]
    Version(u32),
    #[error("the peer belongs to cluster \"{0}\"")]
    Cluster(String),
    #[error("the peer {from} wanted to reach {to}")]
    Stranger { from: MemberId, to: MemberId },
    #[error("the peer does not know the cluster's secret")]
    Secret,
    #[error("TLS: {0}")]
    Tls(std::io::Error),
    #[error("the peer shows no certificate of a member's agent or a witness, but {0}")]
    NoMember(String),
    #[error("the peer says that it is {claimed}, and its certificate names {certified}")]
    Impostor {
        claimed: MemberId,
        certified: String,
    },
}

fn transcript(hello: &Hello, nonce: &[u8; 32], label: &str, secret: &[u8]) -> [u8; 32] {
    let purpose = format!("{:?}", hello.purpose);
    let parts: [&[u8]; 8] = [
        b"craton coordinator 1",
        label.as_bytes(),
        hello.cluster.as_bytes(),
        hello.from.as_str().as_bytes(),
        hello.to.as_str().as_bytes(),
        purpose.as_bytes(),
        &hello.nonce,
        nonce,
    ];
    mac(secret, &parts)
}

fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    subtle::ConstantTimeEq::ct_eq(&a[..], &b[..]).into()
}

/// Proves to the acceptor who this is, and sees that the acceptor is `to`.
pub(super) async fn dial(
    stream: TcpStream,
    identity: &Identity,
    to: &MemberId,
    purpose: Purpose,
) -> Result<Session, HandshakeError> {
    timeout(
        HANDSHAKE_TIMEOUT,
        dial_unbounded(stream, identity, to, purpose),
    )
    .await
    .map_err(|_| HandshakeError::TimedOut)?
}

async fn dial_unbounded(
    stream: TcpStream,
    identity: &Identity,
    to: &MemberId,
    purpose: Purpose,
) -> Result<Session, HandshakeError> {
    let stream = match &identity.trust {
        None => Stream::Plain(stream),
        Some(trust) => {
            let expect = Expect::Voter(to.as_str().to_owned());
            trust
                .connect(stream, &expect)
                .await
                .map_err(HandshakeError::Tls)?
        }
    };
    let (read, write) = split(stream);
    let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
    let hello = Hello {
        version: VERSION,
        cluster: identity.cluster.clone(),
        from: identity.me.clone(),
        to: to.clone(),
        purpose,
        nonce: rand::random(),
    };
    writer.send(&hello).await?;
    let proof: Proof = reader.next().await?;
    let seal = |label| transcript(&hello, &proof.nonce, label, &identity.secret);
    if !same(&proof.proof, &seal("acceptor")) {
        return Err(HandshakeError::Secret);
    }
    writer
        .send(&Finish {
            proof: seal("dialer"),
        })
        .await?;
    writer.authenticated(Key(seal("dialer to acceptor")));
    reader.authenticated(Key(seal("acceptor to dialer")));
    Ok(Session {
        reader,
        writer,
        peer: to.clone(),
        purpose,
    })
}

/// Sees who has connected, and proves to it who this is.
pub(super) async fn accept(
    stream: TcpStream,
    identity: &Identity,
    is_voter: impl Fn(&MemberId) -> bool,
) -> Result<Session, HandshakeError> {
    timeout(
        HANDSHAKE_TIMEOUT,
        accept_unbounded(stream, identity, is_voter),
    )
    .await
    .map_err(|_| HandshakeError::TimedOut)?
}

/// The name in the certificate of a member's agent, or of a witness.
fn member_of(peer: Option<craton_trust::Identity>) -> Result<String, HandshakeError> {
    match peer {
        Some(peer) if peer.role.votes() => Ok(peer.name),
        Some(peer) => Err(HandshakeError::NoMember(peer.to_string())),
        None => Err(HandshakeError::NoMember("none at all".to_owned())),
    }
}

async fn accept_unbounded(
    stream: TcpStream,
    identity: &Identity,
    is_voter: impl Fn(&MemberId) -> bool,
) -> Result<Session, HandshakeError> {
    let (stream, certified) = match &identity.trust {
        None => (Stream::Plain(stream), None),
        Some(trust) => {
            let (stream, peer) = trust.accept(stream).await.map_err(HandshakeError::Tls)?;
            (stream, Some(member_of(peer)?))
        }
    };
    let (read, write) = split(stream);
    let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
    let hello: Hello = reader.next().await?;
    if let Some(certified) = certified.filter(|name| *name != hello.from.as_str()) {
        return Err(HandshakeError::Impostor {
            claimed: hello.from,
            certified,
        });
    }
    if hello.version != VERSION {
        return Err(HandshakeError::Version(hello.version));
    }
    if hello.cluster != identity.cluster {
        return Err(HandshakeError::Cluster(hello.cluster));
    }
    if hello.to != identity.me || hello.from == identity.me || !is_voter(&hello.from) {
        return Err(HandshakeError::Stranger {
            from: hello.from,
            to: hello.to,
        });
    }
    let nonce: [u8; 32] = rand::random();
    let seal = |label| transcript(&hello, &nonce, label, &identity.secret);
    writer
        .send(&Proof {
            nonce,
            proof: seal("acceptor"),
        })
        .await?;
    let finish: Finish = reader.next().await?;
    if !same(&finish.proof, &seal("dialer")) {
        return Err(HandshakeError::Secret);
    }
    writer.authenticated(Key(seal("acceptor to dialer")));
    reader.authenticated(Key(seal("dialer to acceptor")));
    Ok(Session {
        reader,
        writer,
        peer: hello.from,
        purpose: hello.purpose,
    })
}
