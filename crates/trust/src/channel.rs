//! TLS connections whose other end is known, and the files behind them, looked at again and again.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    AlertDescription, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig,
    SignatureScheme,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::authority::Facts;
use crate::files::{Loaded, Stamp, TlsFiles};
use crate::identity::{Identity, Role};
use crate::{Result, TrustError};

/// How often the files are looked at.
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(2);

/// How long a handshake may take on the accepting side.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Length and code of the message that asks a PostgreSQL server for TLS.
const POSTGRES_TLS_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xD2, 0x16, 0x2F];

/// Whom a connection is meant to reach.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Expect {
    /// Any holder of this role in the own cluster.
    Role(Role),
    /// This one.
    Exactly(Role, String),
    /// The voter of this name: a member or a witness.
    Voter(String),
}

impl Expect {
    fn admits(&self, identity: &Identity) -> bool {
        match self {
            Self::Role(role) => identity.role == *role,
            Self::Exactly(role, name) => identity.role == *role && identity.name == *name,
            Self::Voter(name) => identity.role.votes() && identity.name == *name,
        }
    }
}

impl std::fmt::Display for Expect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Role(role) => write!(f, "a {role}"),
            Self::Exactly(role, name) => write!(f, "{role} {name}"),
            Self::Voter(name) => write!(f, "the voter {name}"),
        }
    }
}

/// One state of the files.
struct Current {
    identity: Identity,
    facts: Facts,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    stamp: Stamp,
    signer: Option<Vec<u8>>,
    generation: u64,
}

/// What one part trusts, and shows. Cheap to share; reloads what changed on disk.
pub struct Trust {
    files: TlsFiles,
    current: RwLock<Arc<Current>>,
}

impl std::fmt::Debug for Trust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Trust({})", self.identity())
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn refused(e: impl std::fmt::Display) -> TrustError {
    TrustError::Certificate(e.to_string())
}

fn roots(authorities: &[CertificateDer<'static>]) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(authority.clone()).map_err(refused)?;
    }
    Ok(roots)
}

impl Loaded {
    /// True if its certificate comes from this authority and is valid now.
    pub fn is_signed_by(&self, authority_pem: &str) -> bool {
        use rustls::pki_types::pem::PemObject as _;
        let Ok(der) = CertificateDer::from_pem_slice(authority_pem.as_bytes()) else {
            return false;
        };
        let Ok(roots) = roots(&[der]) else {
            return false;
        };
        let chain = Chain {
            roots,
            algorithms: provider().signature_verification_algorithms,
        };
        let (Some(own), rest) = (self.chain.first(), self.chain.get(1..).unwrap_or_default())
        else {
            return false;
        };
        chain.check(own, rest, UnixTime::now()).is_ok()
    }
}

impl Current {
    fn load(files: &TlsFiles) -> Result<Self> {
        // Before the content: what is written between the two is then loaded once more.
        let stamp = files.stamp();
        let loaded = files.load()?;
        let content = |e: &dyn std::fmt::Display| TrustError::Content {
            path: files.certificate.clone(),
            reason: e.to_string(),
        };
        let roots = roots(&loaded.authorities)?;
        let provider = provider();
        let chain = Chain {
            roots: roots.clone(),
            algorithms: provider.signature_verification_algorithms,
        };
        let (own, rest) = loaded
            .chain
            .split_first()
            .map(|(own, rest)| (own, rest.to_vec()))
            .ok_or_else(|| content(&"holds no certificate"))?;
        // What the others would refuse does not replace what works.
        chain.check(own, &rest, UnixTime::now()).map_err(|e| {
            content(&format!(
                "is not accepted by {}: {e}",
                files.authority.display()
            ))
        })?;
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                .allow_unauthenticated()
                .build()
                .map_err(refused)?;
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(refused)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(loaded.chain.clone(), loaded.key.clone_key())
            .map_err(|e| content(&e))?;
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(refused)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(chain))
            .with_client_auth_cert(loaded.chain, loaded.key)
            .map_err(|e| content(&e))?;
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        Ok(Self {
            identity: loaded.identity,
            facts: loaded.facts,
            server: Arc::new(server),
            client: Arc::new(client),
            stamp,
            signer: rest.first().map(|der| der.as_ref().to_vec()),
            generation: 0,
        })
    }
}

impl Trust {
    /// Reads the files. They must hold a certificate that the authorities among them accept now.
    pub fn open(files: TlsFiles) -> Result<Arc<Self>> {
        let current = Current::load(&files)?;
        Ok(Arc::new(Self {
            files,
            current: RwLock::new(Arc::new(current)),
        }))
    }

    fn current(&self) -> Arc<Current> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Who this is.
    pub fn identity(&self) -> Identity {
        self.current().identity.clone()
    }

    /// What else the certificate in use says.
    pub fn facts(&self) -> Facts {
        self.current().facts.clone()
    }

    /// The certificate of the authority that signed, in DER, if it stands behind the certificate.
    pub fn signer(&self) -> Option<Vec<u8>> {
        self.current().signer.clone()
    }

    /// Grows whenever files were taken again: certificate, key or authorities.
    pub fn generation(&self) -> u64 {
        self.current().generation
    }

    /// The files.
    pub fn files(&self) -> &TlsFiles {
        &self.files
    }

    /// How long the certificate in use is still valid.
    pub fn valid_for(&self) -> Duration {
        self.current()
            .facts
            .not_after
            .duration_since(SystemTime::now())
            .unwrap_or_default()
    }

    /// Takes the files again if one of them was replaced; true if that changed something. What cannot be used
    /// changes nothing, nor does a certificate of somebody else.
    pub fn reload(&self) -> Result<bool> {
        let before = self.current();
        if self.files.stamp() == before.stamp {
            return Ok(false);
        }
        let mut next = Current::load(&self.files)?;
        if next.identity != before.identity {
            return Err(TrustError::Content {
                path: self.files.certificate.clone(),
                reason: format!(
                    "names {}, this part is {}; restart it if that is meant",
                    next.identity, before.identity
                ),
            });
        }
        next.generation = before.generation + 1;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        Ok(true)
    }

    /// Looks at the files for as long as the process lives. Says what is wrong with them when that changes.
    pub async fn keep_fresh(self: Arc<Self>) {
        let mut last = String::new();
        loop {
            tokio::time::sleep(RELOAD_INTERVAL).await;
            let this = Arc::clone(&self);
            let outcome = tokio::task::spawn_blocking(move || this.reload()).await;
            match outcome {
                Ok(Ok(true)) => {
                    last.clear();
                    tracing::info!(identity = %self.identity(), valid_days = self.valid_for().as_secs() / 86_400, "took up a new certificate");
                }
                Ok(Ok(false)) | Err(_) => {}
                Ok(Err(error)) => {
                    let text = error.to_string();
                    if text != last {
                        tracing::warn!(%error, "the certificate on disk is of no use; the one that was loaded before stays");
                        last = text;
                    }
                }
            }
        }
    }

    /// Shakes hands on a connection that was made, and sees that the other end is who was meant. The caller sets the
    /// deadline.
    pub async fn connect<S>(&self, stream: S, expect: &Expect) -> io::Result<Stream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let current = self.current();
        let (stream, peer) = shake_hands(&current.client, stream).await?;
        if peer.cluster != current.identity.cluster || !expect.admits(&peer) {
            let text = format!(
                "{expect} of cluster \"{}\" was expected, and {peer} answers",
                current.identity.cluster
            );
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        Ok(stream)
    }

    /// As [`Self::connect`], on a connection to a PostgreSQL server: asks it for TLS first (protocol, "SSLRequest").
    pub async fn connect_postgres<S>(&self, mut stream: S, expect: &Expect) -> io::Result<Stream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        stream.write_all(&POSTGRES_TLS_REQUEST).await?;
        let mut answer = [0];
        // One byte and no more: what came behind it in the clear would pass for the server's word (CVE-2021-23222).
        stream.read_exact(&mut answer).await?;
        if answer != *b"S" {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "the server offers no TLS, and every member turns it on: see its log",
            ));
        }
        self.connect(stream, expect).await
    }

    /// Shakes hands on an accepted connection within [`HANDSHAKE_TIMEOUT`]; who it is, if it showed a certificate.
    /// A certificate of another authority or cluster ends the connection.
    pub async fn accept(
        &self,
        mut stream: TcpStream,
    ) -> io::Result<(Stream<TcpStream>, Option<Identity>)> {
        let handshake = async {
            let mut first = [0];
            if stream.peek(&mut first).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // A TLS record begins with its kind, 22; what begins with a letter is HTTP, or nothing we know.
            if first.first().is_some_and(u8::is_ascii_alphabetic) {
                // What came is read once: unread bytes would make a reset of the end, and the answer get lost.
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(PLAIN_HTTP_ANSWER).await;
                let _ = stream.shutdown().await;
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "it speaks no TLS",
                ));
            }
            let current = self.current();
            let acceptor = TlsAcceptor::from(Arc::clone(&current.server));
            let stream = acceptor.accept(stream).await.map_err(explained)?;
            let peer = peer_of(stream.get_ref().1.peer_certificates())
                .map_err(|e| io::Error::new(io::ErrorKind::PermissionDenied, e))?;
            if let Some(peer) = peer
                .as_ref()
                .filter(|p| p.cluster != current.identity.cluster)
            {
                let text = format!("it belongs to another cluster ({peer})");
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
            }
            Ok((Stream::Tls(Box::new(stream.into())), peer))
        };
        timeout(HANDSHAKE_TIMEOUT, handshake)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no handshake in time"))?
    }
}

/// Whoever has no certificate (yet): it knows whom it trusts, and shows nothing. Such a connection opens what is open
/// to all, what the token opens, and the way to a first certificate.
pub struct Guest {
    client: Arc<ClientConfig>,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Guest")
    }
}

impl Guest {
    /// Trusts the authorities in a file.
    pub fn of_authorities(path: &std::path::Path) -> Result<Arc<Self>> {
        let roots = roots(&crate::files::authorities(path)?)?;
        Self::with(Chain {
            roots,
            algorithms: provider().signature_verification_algorithms,
        })
    }

    /// Trusts the one authority whose certificate has this SHA-256: the other side sends it along.
    pub fn pinned(authority_sha256: [u8; 32]) -> Result<Arc<Self>> {
        Self::with(Pinned {
            authority_sha256,
            algorithms: provider().signature_verification_algorithms,
        })
    }

    fn with(verifier: impl ServerCertVerifier + 'static) -> Result<Arc<Self>> {
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(refused)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        Ok(Arc::new(Self {
            client: Arc::new(client),
        }))
    }

    /// Shakes hands, and sees that the other end has this role in whatever cluster it is. The caller sets the deadline.
    pub async fn connect<S>(&self, stream: S, role: Role) -> io::Result<(Stream<S>, Identity)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (stream, peer) = shake_hands(&self.client, stream).await?;
        if peer.role == role {
            return Ok((stream, peer));
        }
        let text = format!("a {role} was expected, and {peer} answers");
        Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
    }
}

/// Who is at the other end stands in its certificate, which the verifier has accepted by then.
async fn shake_hands<S>(client: &Arc<ClientConfig>, stream: S) -> io::Result<(Stream<S>, Identity)>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let connector = TlsConnector::from(Arc::clone(client));
    // The name is only a part of the handshake.
    let name = ServerName::try_from("craton.internal").map_err(io::Error::other)?;
    let stream = connector.connect(name, stream).await.map_err(explained)?;
    let peer = peer_of(stream.get_ref().1.peer_certificates())
        .map_err(|e| io::Error::new(io::ErrorKind::PermissionDenied, e))?
        .ok_or_else(|| io::Error::other("the other side showed no certificate"))?;
    Ok((Stream::Tls(Box::new(stream.into())), peer))
}

/// What whoever speaks plain HTTP to a port with TLS gets.
const PLAIN_HTTP_ANSWER: &[u8] = b"HTTP/1.0 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n\
{\"error\":\"this port speaks TLS\",\"hint\":\"use https; /health and /metrics need no certificate, /v1/ needs one of the cluster's authority\"}\n";

fn peer_of(chain: Option<&[CertificateDer<'_>]>) -> Result<Option<Identity>> {
    chain
        .and_then(<[_]>::first)
        .map(|der| Identity::of_certificate(der))
        .transpose()
}

/// The reason of a failed handshake in words that say what to do.
pub fn explained(error: io::Error) -> io::Error {
    let Some(tls) = error
        .get_ref()
        .and_then(|e| e.downcast_ref::<rustls::Error>())
    else {
        return error;
    };
    let text = match tls {
        rustls::Error::AlertReceived(alert) => match alert {
            AlertDescription::CertificateExpired => {
                "the other side refused our certificate: it has expired".to_owned()
            }
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::DecryptError => {
                "the other side refused our certificate: its authority is not the one trusted there"
                    .to_owned()
            }
            AlertDescription::CertificateRequired => {
                "the other side wants a certificate".to_owned()
            }
            AlertDescription::ProtocolVersion => "the other side does not speak TLS 1.3".to_owned(),
            other => format!("the other side ended the handshake: {other:?}"),
        },
        rustls::Error::InvalidCertificate(why) => {
            format!(
                "the certificate of the other side is refused: {}",
                reason(why)
            )
        }
        rustls::Error::InvalidMessage(_) => "the other side speaks no TLS there".to_owned(),
        other => other.to_string(),
    };
    io::Error::new(io::ErrorKind::PermissionDenied, text)
}

fn reason(error: &rustls::CertificateError) -> String {
    use rustls::CertificateError as E;
    match error {
        E::Expired | E::ExpiredContext { .. } => "it has expired".into(),
        E::NotValidYet | E::NotValidYetContext { .. } => {
            "it is not valid yet; compare the hosts' clocks".into()
        }
        // Authorities of clusters with the same name differ by their key alone.
        E::UnknownIssuer | E::BadSignature => {
            "it comes from an authority that is not trusted here".into()
        }
        other => other.to_string(),
    }
}

/// Accepts what the authorities signed for use by servers. Who it is for is looked at after the handshake, before
/// anything is sent.
#[derive(Debug)]
struct Chain {
    roots: RootCertStore,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Chain {
    fn check(
        &self,
        own: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> std::result::Result<(), rustls::Error> {
        let parsed = ParsedCertificate::try_from(own)?;
        rustls::client::verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            rest,
            now,
            self.algorithms.all,
        )
    }
}

/// Accepts what one authority signed, of which only the hash is known.
#[derive(Debug)]
struct Pinned {
    authority_sha256: [u8; 32],
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    fn check(
        &self,
        own: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> std::result::Result<(), rustls::Error> {
        let meant = rest
            .iter()
            .find(|der| crate::authority::sha256(der) == self.authority_sha256);
        let Some(meant) = meant else {
            return Err(rustls::Error::InvalidCertificate(
                rustls::CertificateError::UnknownIssuer,
            ));
        };
        let mut roots = RootCertStore::empty();
        roots.add(meant.clone().into_owned())?;
        Chain {
            roots,
            algorithms: self.algorithms,
        }
        .check(own, rest, now)
    }
}

/// The signatures of handshakes are checked in the library's way; only whom to believe differs.
macro_rules! verifies {
    ($verifier:ty) => {
        impl ServerCertVerifier for $verifier {
            fn verify_server_cert(
                &self,
                own: &CertificateDer<'_>,
                rest: &[CertificateDer<'_>],
                _: &ServerName<'_>,
                _: &[u8],
                now: UnixTime,
            ) -> std::result::Result<ServerCertVerified, rustls::Error> {
                self.check(own, rest, now)
                    .map(|()| ServerCertVerified::assertion())
            }

            fn verify_tls12_signature(
                &self,
                message: &[u8],
                cert: &CertificateDer<'_>,
                signature: &DigitallySignedStruct,
            ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
                rustls::crypto::verify_tls12_signature(message, cert, signature, &self.algorithms)
            }

            fn verify_tls13_signature(
                &self,
                message: &[u8],
                cert: &CertificateDer<'_>,
                signature: &DigitallySignedStruct,
            ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
                rustls::crypto::verify_tls13_signature(message, cert, signature, &self.algorithms)
            }

            fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
                self.algorithms.supported_schemes()
            }
        }
    };
}

verifies!(Chain);
verifies!(Pinned);

/// A connection, encrypted or (where TLS is off) not.
#[derive(Debug)]
pub enum Stream<S> {
    /// As it is.
    Plain(S),
    /// Through TLS.
    Tls(Box<tokio_rustls::TlsStream<S>>),
}

impl<S> Stream<S> {
    /// The hosts that the certificate of the other end names.
    pub fn peer_hosts(&self) -> Vec<String> {
        let Self::Tls(stream) = self else {
            return Vec::new();
        };
        let own = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(<[_]>::first);
        own.and_then(|der| Facts::of_certificate(der).ok())
            .map(|facts| facts.hosts)
            .unwrap_or_default()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Stream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_read(cx, buf),
            Self::Tls(s) => Pin::new(s).poll_read(cx, buf).map_err(explained),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Stream<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_write(cx, buf),
            Self::Tls(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_flush(cx),
            Self::Tls(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_shutdown(cx),
            Self::Tls(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}
