//! A small HTTP/1.0 client over TLS: one request a connection, a deadline on every step, bounded answers.

use std::sync::Arc;
use std::time::Duration;

use craton_trust::{Expect, Guest, Role, Stream, Trust};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

use crate::token::Token;
use crate::views::ErrorView;

/// The largest answer that is read, in bytes.
pub const ANSWER_BODY_MAX: u64 = 16 * 1024 * 1024;

/// The largest head (status line and headers) of an answer, in bytes.
const HEAD_MAX: u64 = 16 * 1024;

/// The longest line of a stream, in bytes.
const LINE_MAX: u64 = 1024 * 1024;

/// How long a request may take where the caller does not say.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a request failed. Every text says which address was meant.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing answers at the address.
    #[error("cannot reach {address}: {source}")]
    Unreachable {
        /// `host:port`.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The two ends do not trust each other. No request was looked at.
    #[error("no trusted connection to {address}: {source}")]
    Untrusted {
        /// `host:port`.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// The deadline passed.
    #[error("{address}{path} did not answer within {} ms", timeout.as_millis())]
    TimedOut {
        /// `host:port`.
        address: String,
        /// The request's path.
        path: String,
        /// How long was waited.
        timeout: Duration,
    },
    /// The connection broke in the middle.
    #[error("the connection to {address} broke: {source}")]
    Broken {
        /// `host:port`.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The server answered with an error of its own.
    #[error("{error}")]
    Refused {
        /// `host:port`.
        address: String,
        /// The HTTP status.
        status: u16,
        /// What the server said.
        error: String,
        /// What the server thinks one should do.
        hint: Option<String>,
    },
    /// The answer is not what was expected there: another service, or another version.
    #[error(
        "{address}{path} gave an answer that cannot be read: {reason}; is it the API port of the same version?"
    )]
    Malformed {
        /// `host:port`.
        address: String,
        /// The request's path.
        path: String,
        /// What was wrong with it.
        reason: String,
    },
}

impl ClientError {
    /// What the server said one should do, if it did.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Refused { hint, .. } => hint.as_deref(),
            Self::Untrusted { .. } => Some(
                "compare the certificates on both sides (`craton ca show`); `craton join` gets a new one",
            ),
            _ => None,
        }
    }

    /// True when the request never reached a server, so that asking another one is safe.
    pub fn never_sent(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Untrusted { .. })
    }

    /// True when nothing was done for certain, and another server may be able to: it was not reached, or said itself that
    /// it has what it needs neither now nor soon (503).
    pub fn was_not_done(&self) -> bool {
        self.never_sent() || matches!(self, Self::Refused { status: 503, .. })
    }
}

/// Asks one server at a time; cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    token: Option<Token>,
    way: Way,
    timeout: Duration,
}

/// How a server is reached, and who it has to be.
#[derive(Clone, Debug)]
enum Way {
    /// Without TLS: for isolated tests.
    Plain,
    /// With a certificate on both sides.
    Trusted(Arc<Trust>, Expect),
    /// Only the server has one.
    Guest(Arc<Guest>, Role),
}

type Connection = Stream<TcpStream>;

struct Answer {
    status: u16,
    reader: BufReader<Connection>,
}

/// Names the request in errors.
struct Target<'a> {
    address: &'a str,
    path: &'a str,
    timeout: Duration,
}

impl Target<'_> {
    fn timed_out(&self) -> ClientError {
        ClientError::TimedOut {
            address: self.address.to_owned(),
            path: self.path.to_owned(),
            timeout: self.timeout,
        }
    }

    fn unreachable(&self, source: std::io::Error) -> ClientError {
        ClientError::Unreachable {
            address: self.address.to_owned(),
            source,
        }
    }

    fn broken(&self, source: std::io::Error) -> ClientError {
        // In TLS 1.3 a client hears only after its first request that its certificate is refused.
        if source.kind() == std::io::ErrorKind::PermissionDenied {
            return ClientError::Untrusted {
                address: self.address.to_owned(),
                source,
            };
        }
        ClientError::Broken {
            address: self.address.to_owned(),
            source,
        }
    }

    fn malformed(&self, reason: impl Into<String>) -> ClientError {
        ClientError::Malformed {
            address: self.address.to_owned(),
            path: self.path.to_owned(),
            reason: reason.into(),
        }
    }
}

impl Client {
    /// A client without TLS, for isolated tests, that shows `token` with every request and waits
    /// [`REQUEST_TIMEOUT`].
    pub fn new(token: Option<Token>) -> Self {
        Self {
            token,
            way: Way::Plain,
            timeout: REQUEST_TIMEOUT,
        }
    }

    /// A client that shows its certificate and talks to holders of this role alone.
    pub fn trusted(trust: Arc<Trust>, role: Role) -> Self {
        Self {
            way: Way::Trusted(trust, Expect::Role(role)),
            ..Self::new(None)
        }
    }

    /// A client that has no certificate, shows `token` if it has one, and talks to holders of this role alone.
    pub fn guest(guest: Arc<Guest>, role: Role, token: Option<Token>) -> Self {
        Self {
            way: Way::Guest(guest, role),
            ..Self::new(token)
        }
    }

    /// With a certificate where there is one, else without TLS and with the token.
    pub fn either(trust: Option<&Arc<Trust>>, role: Role, token: Option<Token>) -> Self {
        match trust {
            Some(trust) => Self::trusted(Arc::clone(trust), role),
            None => Self::new(token),
        }
    }

    /// The same for one server: it has to be this one.
    #[must_use]
    pub fn expecting(mut self, expect: Expect) -> Self {
        if let Way::Trusted(_, whom) = &mut self.way {
            *whom = expect;
        }
        self
    }

    /// The same with another deadline for a whole request (for a stream: for its head).
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// GET, JSON answer. `address` is `host:port`, `path` begins with `/`.
    pub async fn get_json<T: DeserializeOwned>(
        &self,
        address: &str,
        path: &str,
    ) -> Result<T, ClientError> {
        let text = self.request("GET", address, path, None).await?;
        parse(address, path, &text)
    }

    /// GET, the body as text (for example `/metrics`).
    pub async fn get_text(&self, address: &str, path: &str) -> Result<String, ClientError> {
        self.request("GET", address, path, None).await
    }

    /// GET, the body as it is; at most [`ANSWER_BODY_MAX`].
    pub async fn get_bytes(&self, address: &str, path: &str) -> Result<Vec<u8>, ClientError> {
        let target = self.target(address, path);
        let deadline = Instant::now() + self.timeout;
        let mut answer = timeout_at(deadline, self.send("GET", &target, None))
            .await
            .map_err(|_| target.timed_out())??;
        let body = read_bytes(&mut answer, &target, deadline).await?;
        if answer.status == 200 {
            return Ok(body);
        }
        Err(refused(
            &target,
            answer.status,
            &String::from_utf8_lossy(&body),
        ))
    }

    /// POST of a JSON body, JSON answer.
    pub async fn post_json<B: Serialize, T: DeserializeOwned>(
        &self,
        address: &str,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        let target = self.target(address, path);
        let body =
            serde_json::to_string(body).map_err(|e| target.malformed(format!("request: {e}")))?;
        let text = self.request("POST", address, path, Some(&body)).await?;
        parse(address, path, &text)
    }

    /// GET of a stream of lines. The time-out covers connecting and the head; each line has its own,
    /// see [`LineStream::next`].
    pub async fn stream_lines(&self, address: &str, path: &str) -> Result<LineStream, ClientError> {
        let target = self.target(address, path);
        let deadline = Instant::now() + self.timeout;
        let mut answer = timeout_at(deadline, self.send("GET", &target, None))
            .await
            .map_err(|_| target.timed_out())??;
        if answer.status != 200 {
            let text = read_body(&mut answer, &target, deadline).await?;
            return Err(refused(&target, answer.status, &text));
        }
        Ok(LineStream {
            reader: answer.reader,
            line: Vec::new(),
            address: address.to_owned(),
            path: path.to_owned(),
        })
    }

    fn target<'a>(&self, address: &'a str, path: &'a str) -> Target<'a> {
        Target {
            address,
            path,
            timeout: self.timeout,
        }
    }

    async fn request(
        &self,
        method: &str,
        address: &str,
        path: &str,
        body: Option<&str>,
    ) -> Result<String, ClientError> {
        let target = self.target(address, path);
        let deadline = Instant::now() + self.timeout;
        let mut answer = timeout_at(deadline, self.send(method, &target, body))
            .await
            .map_err(|_| target.timed_out())??;
        let text = read_body(&mut answer, &target, deadline).await?;
        if (200..300).contains(&answer.status) {
            Ok(text)
        } else {
            Err(refused(&target, answer.status, &text))
        }
    }

    async fn send(
        &self,
        method: &str,
        target: &Target<'_>,
        body: Option<&str>,
    ) -> Result<Answer, ClientError> {
        let stream = TcpStream::connect(target.address)
            .await
            .map_err(|e| target.unreachable(e))?;
        stream
            .set_nodelay(true)
            .map_err(|e| target.unreachable(e))?;
        let untrusted = |source| ClientError::Untrusted {
            address: target.address.to_owned(),
            source,
        };
        let mut stream = match &self.way {
            Way::Plain => Stream::Plain(stream),
            Way::Trusted(trust, expect) => {
                trust.connect(stream, expect).await.map_err(untrusted)?
            }
            Way::Guest(guest, role) => guest.connect(stream, *role).await.map_err(untrusted)?.0,
        };
        let mut head = format!(
            "{method} {} HTTP/1.0\r\nHost: {}\r\n",
            target.path, target.address
        );
        if let Some(token) = &self.token {
            head.push_str("Authorization: ");
            head.push_str(&token.header());
            head.push_str("\r\n");
        }
        if let Some(body) = body {
            head.push_str("Content-Type: application/json\r\nContent-Length: ");
            head.push_str(&body.len().to_string());
            head.push_str("\r\n");
        }
        head.push_str("\r\n");
        head.push_str(body.unwrap_or_default());
        stream
            .write_all(head.as_bytes())
            .await
            .map_err(|e| target.broken(e))?;
        stream.flush().await.map_err(|e| target.broken(e))?;
        read_head(stream, target).await
    }
}

async fn read_head(stream: Connection, target: &Target<'_>) -> Result<Answer, ClientError> {
    let mut reader = BufReader::new(stream);
    let mut status = None;
    let mut left = HEAD_MAX;
    loop {
        let mut line = String::new();
        let read = (&mut reader)
            .take(left)
            .read_line(&mut line)
            .await
            .map_err(|e| target.broken(e))?;
        left = left.saturating_sub(u64::try_from(read).unwrap_or(u64::MAX));
        if !line.ends_with('\n') {
            return Err(target.malformed("the head of the answer ends early or is too long"));
        }
        match status {
            None => {
                let code = parse_status(&line).ok_or_else(|| target.malformed("it is not HTTP"))?;
                status = Some(code);
            }
            // Headers carry nothing that matters here: the body ends where the connection ends.
            Some(status) if line.trim_end().is_empty() => return Ok(Answer { status, reader }),
            Some(_) => {}
        }
    }
}

fn parse_status(line: &str) -> Option<u16> {
    let mut words = line.split_ascii_whitespace();
    words
        .next()
        .filter(|version| version.starts_with("HTTP/1."))?;
    words.next()?.parse().ok()
}

async fn read_body(
    answer: &mut Answer,
    target: &Target<'_>,
    deadline: Instant,
) -> Result<String, ClientError> {
    let body = read_bytes(answer, target, deadline).await?;
    String::from_utf8(body).map_err(|_| target.malformed("not UTF-8"))
}

async fn read_bytes(
    answer: &mut Answer,
    target: &Target<'_>,
    deadline: Instant,
) -> Result<Vec<u8>, ClientError> {
    let mut body = Vec::new();
    let mut limited = (&mut answer.reader).take(ANSWER_BODY_MAX + 1);
    let read = timeout_at(deadline, limited.read_to_end(&mut body))
        .await
        .map_err(|_| target.timed_out())?;
    read.map_err(|e| target.broken(e))?;
    if u64::try_from(body.len()).unwrap_or(u64::MAX) > ANSWER_BODY_MAX {
        return Err(target.malformed(format!("more than {ANSWER_BODY_MAX} bytes")));
    }
    Ok(body)
}

fn parse<T: DeserializeOwned>(address: &str, path: &str, text: &str) -> Result<T, ClientError> {
    serde_json::from_str(text).map_err(|e| ClientError::Malformed {
        address: address.to_owned(),
        path: path.to_owned(),
        reason: e.to_string(),
    })
}

fn refused(target: &Target<'_>, status: u16, text: &str) -> ClientError {
    let view = serde_json::from_str::<ErrorView>(text).unwrap_or_else(|_| ErrorView {
        error: format!(
            "{}{} answered with status {status}",
            target.address, target.path
        ),
        hint: None,
    });
    ClientError::Refused {
        address: target.address.to_owned(),
        status,
        error: view.error,
        hint: view.hint,
    }
}

/// An answer that goes on, line by line.
#[derive(Debug)]
pub struct LineStream {
    reader: BufReader<Connection>,
    line: Vec<u8>,
    address: String,
    path: String,
}

impl LineStream {
    /// The next line, without its end; `None` when the server closed the stream. A server that says
    /// nothing for `idle_max` is taken for gone. Dropping the future loses nothing that was received.
    pub async fn next(&mut self, idle_max: Duration) -> Result<Option<String>, ClientError> {
        let target = Target {
            address: &self.address,
            path: &self.path,
            timeout: idle_max,
        };
        let room = LINE_MAX.saturating_sub(u64::try_from(self.line.len()).unwrap_or(u64::MAX));
        let mut limited = (&mut self.reader).take(room);
        let read = timeout(idle_max, limited.read_until(b'\n', &mut self.line)).await;
        read.map_err(|_| target.timed_out())?
            .map_err(|e| target.broken(e))?;
        if self.line.last() != Some(&b'\n') {
            return if self.line.is_empty() {
                Ok(None)
            } else {
                Err(target.malformed("a line ends early or is too long"))
            };
        }
        self.line.pop();
        let line = std::mem::take(&mut self.line);
        String::from_utf8(line)
            .map(Some)
            .map_err(|_| target.malformed("not UTF-8"))
    }
}
