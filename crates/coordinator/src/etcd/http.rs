//! One endpoint: connections to it, and one request on one of them. What matters here is the difference
//! between "never left this process" and "left, and was not answered".

use std::io::BufReader;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;

use crate::place::{EndpointAddress, Place};

/// Connecting, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(700);

/// Connections kept open beyond the ones in use.
const IDLE_MAX: usize = 8;

/// The largest answer, in bytes: the whole store in base64, twice over.
const ANSWER_LEN_MAX: usize = 16 * 1024 * 1024;

/// An endpoint that does not acknowledge at the TCP level for this long is gone.
const TCP_SILENCE_MAX: Duration = Duration::from_secs(4);

/// The authorities of the system, where none are named.
const SYSTEM_CA: &str = "/etc/ssl/certs/ca-certificates.crt";

type Sender = SendRequest<Full<Bytes>>;

/// Why a request brought no answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Failure {
    /// It never left this process.
    NotSent(String),
    /// It may have arrived.
    Doubt(String),
}

impl Failure {
    pub(super) fn into_text(self) -> String {
        match self {
            Self::NotSent(why) | Self::Doubt(why) => why,
        }
    }
}

/// One endpoint.
pub(super) struct Endpoint {
    address: EndpointAddress,
    host: HeaderValue,
    tls: Option<TlsConnector>,
    /// Carries all connections, whichever runtime the callers are on: a renewal must not wait for a busy one.
    runtime: Handle,
    idle: Mutex<Vec<Sender>>,
}

fn tune(stream: &TcpStream) {
    let silence = u32::try_from(TCP_SILENCE_MAX.as_millis()).unwrap_or(u32::MAX);
    // Best effort: without these, a vanished endpoint is noticed later.
    let _ = stream.set_nodelay(true);
    let _ = rustix::net::sockopt::set_tcp_user_timeout(stream, silence);
    let _ = rustix::net::sockopt::set_socket_keepalive(stream, true);
    let _ = rustix::net::sockopt::set_tcp_keepidle(stream, Duration::from_secs(2));
    let _ = rustix::net::sockopt::set_tcp_keepintvl(stream, Duration::from_secs(1));
    let _ = rustix::net::sockopt::set_tcp_keepcnt(stream, 3);
}

impl Endpoint {
    pub(super) fn new(text: &str, tls: Option<&TlsConnector>) -> Result<Self, String> {
        let address = EndpointAddress::parse(text)?;
        let host = HeaderValue::from_str(&address.authority).map_err(|e| format!("{text}: {e}"))?;
        let tls = tls.filter(|_| address.tls).cloned();
        Ok(Self {
            address,
            host,
            tls,
            runtime: Handle::current(),
            idle: Mutex::default(),
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.address.authority
    }

    /// What carries the connections.
    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    fn idle(&self) -> Option<Sender> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(sender) = idle.pop() {
            if !sender.is_closed() && sender.is_ready() {
                return Some(sender);
            }
        }
        None
    }

    fn keep(&self, sender: Sender) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_MAX {
            idle.push(sender);
        }
    }

    /// After a failure nothing older is trusted.
    pub(super) fn forget_connections(&self) {
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    async fn new_connection(&self) -> Result<Sender, Failure> {
        // Dropping the set ends a connecting that nobody waits for any more.
        let mut connecting = JoinSet::new();
        connecting.spawn_on(
            connect(self.address.clone(), self.tls.clone()),
            &self.runtime,
        );
        match timeout(CONNECT_TIMEOUT, connecting.join_next()).await {
            Ok(Some(Ok(Ok(sender)))) => Ok(sender),
            Ok(Some(Ok(Err(why)))) => Err(Failure::NotSent(why)),
            Ok(Some(Err(e))) => Err(Failure::NotSent(e.to_string())),
            Ok(None) => Err(Failure::NotSent("nothing was tried".to_owned())),
            Err(_) => Err(Failure::NotSent(format!(
                "no connection within {} ms",
                CONNECT_TIMEOUT.as_millis()
            ))),
        }
    }

    fn request(
        &self,
        path: &str,
        body: Bytes,
        token: Option<&str>,
    ) -> Option<Request<Full<Bytes>>> {
        let mut builder = Request::post(path)
            .header(HOST, self.host.clone())
            .header(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(token) = token {
            let mut value = HeaderValue::from_str(token).ok()?;
            value.set_sensitive(true);
            builder = builder.header(AUTHORIZATION, value);
        }
        builder.body(Full::new(body)).ok()
    }

    /// Sends one request; the head of the answer, and the connection that it comes on.
    async fn begin(
        &self,
        path: &str,
        body: &Bytes,
        token: Option<&str>,
    ) -> Result<(Response<Incoming>, Sender), Failure> {
        let unusable = || Failure::NotSent("etcd's token is no header value".to_owned());
        // A connection that etcd closed meanwhile hands the request back: then a new one gets it.
        if let Some(mut sender) = self.idle() {
            let request = self
                .request(path, body.clone(), token)
                .ok_or_else(unusable)?;
            match sender.try_send_request(request).await {
                Ok(response) => return Ok((response, sender)),
                Err(mut e) => {
                    if e.take_message().is_none() {
                        return Err(Failure::Doubt(e.into_error().to_string()));
                    }
                }
            }
        }
        let mut sender = self.new_connection().await?;
        let request = self
            .request(path, body.clone(), token)
            .ok_or_else(unusable)?;
        match sender.try_send_request(request).await {
            Ok(response) => Ok((response, sender)),
            Err(mut e) => {
                let unsent = e.take_message().is_some();
                let why = e.into_error().to_string();
                Err(if unsent {
                    Failure::NotSent(why)
                } else {
                    Failure::Doubt(why)
                })
            }
        }
    }

    /// One question and its whole answer: HTTP status and body.
    pub(super) async fn ask(
        &self,
        path: &str,
        body: &Bytes,
        token: Option<&str>,
        due: Instant,
    ) -> Result<(u16, Bytes), Failure> {
        let whole = async {
            let (response, sender) = self.begin(path, body, token).await?;
            let status = response.status().as_u16();
            let body = Limited::new(response.into_body(), ANSWER_LEN_MAX)
                .collect()
                .await
                .map_err(|e| Failure::Doubt(e.to_string()))?
                .to_bytes();
            self.keep(sender);
            Ok((status, body))
        };
        match timeout_at(due, whole).await {
            Ok(result) => result,
            Err(_) => Err(Failure::Doubt("no answer in time".to_owned())),
        }
    }

    /// Begins a stream on a connection of its own, which ends with it.
    pub(super) async fn stream(
        &self,
        path: &str,
        body: &Bytes,
        token: Option<&str>,
        due: Instant,
    ) -> Result<(Lines, Sender), String> {
        let begin = async {
            let mut sender = self.new_connection().await.map_err(Failure::into_text)?;
            let request = self
                .request(path, body.clone(), token)
                .ok_or("etcd's token is no header value")?;
            let response = sender
                .send_request(request)
                .await
                .map_err(|e| e.to_string())?;
            Ok((
                Lines {
                    body: response.into_body(),
                    buffer: Vec::new(),
                },
                sender,
            ))
        };
        timeout_at(due, begin)
            .await
            .map_err(|_| "no answer in time".to_owned())?
    }
}

async fn connect(address: EndpointAddress, tls: Option<TlsConnector>) -> Result<Sender, String> {
    let stream = TcpStream::connect((address.host.as_str(), address.port))
        .await
        .map_err(|e| e.to_string())?;
    tune(&stream);
    let Some(tls) = tls else {
        return speak(TokioIo::new(stream)).await;
    };
    let name = ServerName::try_from(address.host).map_err(|e| e.to_string())?;
    let stream = tls
        .connect(name, stream)
        .await
        .map_err(|e| format!("TLS: {e}"))?;
    speak(TokioIo::new(stream)).await
}

async fn speak<T>(io: TokioIo<T>) -> Result<Sender, String>
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = handshake(io).await.map_err(|e| e.to_string())?;
    // Ends when its sender is dropped, or when the other side closes.
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(sender)
}

/// Lines of a stream that does not end.
pub(super) struct Lines {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Lines {
    /// The next line. May be dropped at any await without losing bytes.
    pub(super) async fn next(&mut self) -> Result<Vec<u8>, String> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
                line.pop();
                return Ok(line);
            }
            if self.buffer.len() > ANSWER_LEN_MAX {
                return Err("a line of the watch is too long".to_owned());
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(e)) => return Err(e.to_string()),
                None => return Err("etcd ended the watch".to_owned()),
            }
        }
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let wrong = |e: &dyn std::fmt::Display| {
        format!("cannot read certificates from {}: {e}", path.display())
    };
    let file = std::fs::File::open(path).map_err(|e| wrong(&e))?;
    let found = CertificateDer::pem_reader_iter(BufReader::new(file))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| wrong(&e))?;
    if found.is_empty() {
        return Err(wrong(&"there is none in it"));
    }
    Ok(found)
}

/// What the endpoints that begin with `https` are spoken to with; `None` where there is none.
pub(super) fn connector(place: &Place) -> Result<Option<TlsConnector>, String> {
    if !place.endpoints.iter().any(|e| e.starts_with("https://")) {
        return Ok(None);
    }
    let system = Path::new(SYSTEM_CA);
    let ca = place.ca_file.as_deref().unwrap_or(system);
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates(ca)?);
    if added == 0 {
        return Err(format!(
            "coordinator.ca_file: {} holds no certificate that can be used",
            ca.display()
        ));
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots);
    let config = match (&place.cert_file, &place.key_file) {
        (Some(cert), Some(key)) => {
            let key = PrivateKeyDer::from_pem_file(key)
                .map_err(|e| format!("coordinator.key_file: cannot read {}: {e}", key.display()))?;
            config
                .with_client_auth_cert(certificates(cert)?, key)
                .map_err(|e| format!("coordinator.cert_file: {e}"))?
        }
        _ => config.with_no_client_auth(),
    };
    Ok(Some(TlsConnector::from(Arc::new(config))))
}
