//! One connection to a walsender: frames, log in, simple queries.

use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use craton_wire::replication::{parse_report, parse_row};
use craton_wire::{md5, scram};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::{
    COMMAND_TIMEOUT, MESSAGE_BYTES_MAX, ReplicationError, ReplicationLogin, Row, ServerAddress,
};

/// What bytes go through.
trait Transport: AsyncRead + AsyncWrite + Unpin + Send + Sync {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send + Sync> Transport for T {}

/// Protocol 3.0.
const PROTOCOL_VERSION: u32 = 196_608;
const READ_BYTES: usize = 256 * 1024;

/// A message of the server: its tag and its content.
pub(crate) struct Frame {
    pub(crate) tag: u8,
    pub(crate) body: Bytes,
}

/// A connection in replication mode, logged in and idle.
pub struct ReplicationConnection {
    transport: Box<dyn Transport>,
    received: BytesMut,
}

impl std::fmt::Debug for ReplicationConnection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReplicationConnection")
    }
}

impl ReplicationConnection {
    /// Connects and logs in.
    pub async fn connect(login: &ReplicationLogin) -> Result<Self, ReplicationError> {
        timeout(login.timeout, async {
            let mut connection = Self::open(login).await?;
            connection.start(login).await?;
            Ok(connection)
        })
        .await
        .unwrap_or(Err(ReplicationError::Timeout {
            what: "connecting",
            limit: login.timeout,
        }))
    }

    async fn open(login: &ReplicationLogin) -> Result<Self, ReplicationError> {
        let address = &login.address;
        let failed = |source| ReplicationError::Connect {
            address: address.to_string(),
            source,
        };
        let transport: Box<dyn Transport> = match address {
            ServerAddress::Tcp(host, port) => {
                let stream = TcpStream::connect((host.as_str(), *port))
                    .await
                    .map_err(failed)?;
                stream.set_nodelay(true).map_err(failed)?;
                match &login.tls {
                    None => Box::new(stream),
                    Some((trust, expect)) => {
                        let trusted = trust.connect_postgres(stream, expect).await;
                        Box::new(trusted.map_err(|source| ReplicationError::Untrusted {
                            address: address.to_string(),
                            source,
                        })?)
                    }
                }
            }
            ServerAddress::Unix(dir, port) => Box::new(
                UnixStream::connect(dir.join(format!(".s.PGSQL.{port}")))
                    .await
                    .map_err(failed)?,
            ),
        };
        Ok(Self {
            transport,
            received: BytesMut::with_capacity(READ_BYTES),
        })
    }

    async fn start(&mut self, login: &ReplicationLogin) -> Result<(), ReplicationError> {
        let mut body = PROTOCOL_VERSION.to_be_bytes().to_vec();
        let parameters = [
            ("user", login.user.as_str()),
            ("replication", "true"),
            ("application_name", login.application_name.as_str()),
            ("client_encoding", "UTF8"),
        ];
        for (name, value) in parameters {
            if value.contains('\0') {
                return Err(ReplicationError::Login(format!(
                    "the {name} contains a zero byte"
                )));
            }
            for text in [name, value] {
                body.extend_from_slice(text.as_bytes());
                body.push(0);
            }
        }
        body.push(0);
        let mut message = length_of(body.len())?.to_vec();
        message.extend_from_slice(&body);
        self.transport.write_all(&message).await?;
        self.authenticate(login).await?;
        loop {
            let frame = self.frame().await?;
            match frame.tag {
                b'Z' => return Ok(()),
                b'E' => return Err(ReplicationError::Server(parse_report(&frame.body))),
                _ => {}
            }
        }
    }

    async fn authenticate(&mut self, login: &ReplicationLogin) -> Result<(), ReplicationError> {
        let password = || {
            login.password.as_deref().ok_or_else(|| {
                ReplicationError::Login(format!(
                    "the server asks for the password of {} and none is given",
                    login.user
                ))
            })
        };
        let (kind, body) = self.authentication_request().await?;
        match kind {
            0 => Ok(()),
            5 => {
                let salt = body
                    .first_chunk::<4>()
                    .ok_or_else(|| ReplicationError::protocol("an MD5 request without a salt"))?;
                let verifier = md5::verifier(&login.user, password()?);
                let mut answer = md5::answer(&verifier, *salt)
                    .unwrap_or_default()
                    .into_bytes();
                answer.push(0);
                self.send(b'p', &answer).await?;
                self.expect_authenticated().await
            }
            10 => self.scram(&body, password()?).await,
            other => Err(ReplicationError::Login(format!(
                "the server asks for authentication method {other}; use scram-sha-256 in pg_hba.conf"
            ))),
        }
    }

    async fn authentication_request(&mut self) -> Result<(u32, Bytes), ReplicationError> {
        let frame = self.frame().await?;
        match frame.tag {
            b'R' => {
                let mut body = frame.body;
                let kind = body
                    .try_get_u32()
                    .map_err(|_| ReplicationError::protocol("a short log-in request"))?;
                Ok((kind, body))
            }
            b'E' => Err(ReplicationError::Server(parse_report(&frame.body))),
            tag => Err(unexpected(tag, "log in")),
        }
    }

    async fn expect_authenticated(&mut self) -> Result<(), ReplicationError> {
        match self.authentication_request().await? {
            (0, _) => Ok(()),
            (kind, _) => Err(ReplicationError::Protocol(format!(
                "log-in request {kind} after the password"
            ))),
        }
    }

    async fn scram(&mut self, mechanisms: &[u8], password: &str) -> Result<(), ReplicationError> {
        if !mechanisms
            .split(|b| *b == 0)
            .any(|m| m == scram::MECHANISM.as_bytes())
        {
            return Err(ReplicationError::Login(
                "the server offers no SCRAM-SHA-256".into(),
            ));
        }
        let failed = |e: scram::ScramError| ReplicationError::Login(e.to_string());
        let identity = scram::ClientIdentity::Password(password.to_owned());
        let mut client = scram::Client::new(identity, &rand::random());
        let first = client.first_message();
        let mut message = format!("{}\0", scram::MECHANISM).into_bytes();
        message.extend_from_slice(&length_of_text(&first)?);
        message.extend_from_slice(first.as_bytes());
        self.send(b'p', &message).await?;
        let challenge = self.sasl_answer(11).await?;
        let proof = client.final_message(&challenge).map_err(failed)?;
        self.send(b'p', proof.as_bytes()).await?;
        let signature = self.sasl_answer(12).await?;
        client.verify(&signature).map_err(failed)?;
        self.expect_authenticated().await
    }

    async fn sasl_answer(&mut self, expected: u32) -> Result<Bytes, ReplicationError> {
        match self.authentication_request().await? {
            (kind, body) if kind == expected => Ok(body),
            (kind, _) => Err(ReplicationError::Protocol(format!(
                "log-in request {kind} instead of {expected}"
            ))),
        }
    }

    /// Sends a command and returns the rows of its first result. Leaves the connection idle.
    pub(crate) async fn query(&mut self, command: &str) -> Result<Vec<Row>, ReplicationError> {
        self.send_query(command).await?;
        self.until_ready(COMMAND_TIMEOUT).await
    }

    pub(crate) async fn send_query(&mut self, command: &str) -> Result<(), ReplicationError> {
        let mut body = command.as_bytes().to_vec();
        body.push(0);
        self.send(b'Q', &body).await
    }

    /// Reads to ReadyForQuery and returns all rows on the way; an error of the server after that.
    pub(crate) async fn until_ready(
        &mut self,
        limit: Duration,
    ) -> Result<Vec<Row>, ReplicationError> {
        let read = async {
            let (mut rows, mut error) = (Vec::new(), None);
            loop {
                let frame = self.frame().await?;
                match frame.tag {
                    b'D' => rows.push(text_row(&frame.body)?),
                    b'E' => error = Some(parse_report(&frame.body)),
                    b'Z' => return error.map_or(Ok(rows), |e| Err(ReplicationError::Server(e))),
                    _ => {}
                }
            }
        };
        timeout(limit, read)
            .await
            .unwrap_or(Err(ReplicationError::Timeout {
                what: "a replication command",
                limit,
            }))
    }

    /// Reads one result: its rows up to CommandComplete.
    pub(crate) async fn result(&mut self) -> Result<Vec<Row>, ReplicationError> {
        let mut rows = Vec::new();
        loop {
            let frame = self.frame().await?;
            match frame.tag {
                b'D' => rows.push(text_row(&frame.body)?),
                b'C' => return Ok(rows),
                b'E' => return Err(ReplicationError::Server(parse_report(&frame.body))),
                b'T' => {}
                tag => return Err(unexpected(tag, "a result")),
            }
        }
    }

    pub(crate) async fn send(&mut self, tag: u8, body: &[u8]) -> Result<(), ReplicationError> {
        let mut message = Vec::with_capacity(body.len() + 5);
        message.push(tag);
        message.extend_from_slice(&length_of(body.len())?);
        message.extend_from_slice(body);
        Ok(self.transport.write_all(&message).await?)
    }

    /// The next message. Dropping the future loses nothing.
    pub(crate) async fn frame(&mut self) -> Result<Frame, ReplicationError> {
        loop {
            if let Some(frame) = self.buffered_frame()? {
                return Ok(frame);
            }
            self.received.reserve(READ_BYTES);
            if self.transport.read_buf(&mut self.received).await? == 0 {
                return Err(ReplicationError::Closed);
            }
        }
    }

    /// The next message if it is here already; notices and changed settings are skipped.
    pub(crate) fn buffered_frame(&mut self) -> Result<Option<Frame>, ReplicationError> {
        loop {
            let Some((tag, length)) = header(&self.received)? else {
                return Ok(None);
            };
            if self.received.len() < length + 1 {
                return Ok(None);
            }
            let mut message = self.received.split_to(length + 1);
            message.advance(5);
            if !matches!(tag, b'N' | b'S' | b'K') {
                return Ok(Some(Frame {
                    tag,
                    body: message.freeze(),
                }));
            }
        }
    }
}

/// The tag and the length (which counts itself) of the message that begins here.
fn header(bytes: &[u8]) -> Result<Option<(u8, usize)>, ReplicationError> {
    let Some([tag, length @ ..]) = bytes.first_chunk::<5>() else {
        return Ok(None);
    };
    let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
    if (4..=MESSAGE_BYTES_MAX).contains(&length) {
        Ok(Some((*tag, length)))
    } else {
        Err(ReplicationError::Protocol(format!(
            "the server announced a message of {length} bytes"
        )))
    }
}

fn length_of(body: usize) -> Result<[u8; 4], ReplicationError> {
    u32::try_from(body + 4)
        .map(u32::to_be_bytes)
        .map_err(|_| ReplicationError::protocol("a message of ours is too long"))
}

fn length_of_text(text: &str) -> Result<[u8; 4], ReplicationError> {
    u32::try_from(text.len())
        .map(u32::to_be_bytes)
        .map_err(|_| ReplicationError::protocol("a message of ours is too long"))
}

fn text_row(body: &[u8]) -> Result<Row, ReplicationError> {
    let columns = parse_row(body)?;
    Ok(columns
        .into_iter()
        .map(|c| c.map(|c| String::from_utf8_lossy(c).into_owned()))
        .collect())
}

pub(crate) fn unexpected(tag: u8, place: &str) -> ReplicationError {
    ReplicationError::Protocol(format!(
        "an unexpected message '{}' at {place}",
        tag.escape_ascii()
    ))
}
