//! Connections to servers: making one, and the few questions that the proxy asks for itself.

use std::io;
use std::time::Duration;

use craton_trust::{Expect, Stream, Trust};
use craton_wire::backend::{Authentication, Fields, data_row, key_data, parameter_status};
use craton_wire::frame::frame;
use craton_wire::scram::{self, ClientIdentity};
use craton_wire::{frontend, md5, startup};
use tokio::io::AsyncReadExt as _;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The largest message that a server may send while it is not relayed, in bytes.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// The most messages that answer one question.
const ANSWER_MESSAGES_MAX: usize = 10_000;

/// After how long an unacknowledged segment breaks a connection, in milliseconds: the end of a host that
/// vanished without a word. Topology is usually faster.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(15);

/// What the proxy can prove to a server in a user's name.
#[derive(Clone, Debug, Default)]
pub enum Login {
    /// Nothing: the server has to trust the proxy.
    #[default]
    Nothing,
    /// SCRAM, by password or by keys.
    Scram(ClientIdentity),
    /// MD5, by the verifier.
    Md5(String),
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The server cannot be reached, or not in time.
    #[error("cannot connect to {address}: {source}")]
    Unreachable {
        /// Where it should be.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// The server refused, in its own words.
    #[error("{address} refused the connection: {message} (SQLSTATE {code})")]
    Refused {
        /// The server.
        address: String,
        /// SQLSTATE.
        code: String,
        /// Its message.
        message: String,
    },
    /// The server asks for something that the proxy does not have.
    #[error("{address} asks for {wants}, which the proxy cannot give for this user: {hint}")]
    Credentials {
        /// The server.
        address: String,
        /// What it asks for.
        wants: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// The server does not follow the protocol, or could not prove itself.
    #[error("{address} broke the protocol: {what}")]
    Protocol {
        /// The server.
        address: String,
        /// How.
        what: String,
    },
}

impl ConnectError {
    /// True when the next attempt may well succeed: the server is down, starting, stopping or full.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Refused { code, .. } => {
                matches!(code.as_str(), "57P01" | "57P02" | "57P03" | "53300")
            }
            Self::Credentials { .. } | Self::Protocol { .. } => false,
        }
    }
}

/// A connection that is logged in, with nothing left to read.
#[derive(Debug)]
pub struct Connected {
    /// The socket.
    pub stream: TcpStream,
    /// What the server reported: names and values.
    pub parameters: Vec<(Vec<u8>, Vec<u8>)>,
    /// The process that serves it.
    pub process: i32,
    /// The key to cancel what it runs.
    pub key: Vec<u8>,
}

/// Where to connect, and as whom.
#[derive(Clone, Copy, Debug)]
pub struct Address<'a> {
    /// Host name or address.
    pub host: &'a str,
    /// TCP port.
    pub port: u16,
    /// The parameters of the startup message.
    pub parameters: &'a [(&'a str, &'a str)],
    /// What proves it.
    pub login: &'a Login,
    /// The certificate that is shown, and whom the server's must name; without, nothing is encrypted.
    pub tls: Option<(&'a Trust, &'a Expect)>,
}

/// A connection before it is handed to the relay: reads and writes whole messages.
#[derive(Debug)]
pub struct Dialog {
    stream: Stream<TcpStream>,
    address: String,
    buffer: Vec<u8>,
}

/// Connects and logs in, within `limit`.
pub async fn connect(to: Address<'_>, limit: Duration) -> Result<Connected, ConnectError> {
    let (dialog, (parameters, process, key)) = dial(to, limit).await?;
    if !dialog.buffer.is_empty() {
        return Err(dialog.broken("it talks before it was asked"));
    }
    let Dialog {
        stream, address, ..
    } = dialog;
    let Stream::Plain(stream) = stream else {
        let what = "the relay reads and writes sockets as they are".to_owned();
        return Err(ConnectError::Protocol { address, what });
    };
    Ok(Connected {
        stream,
        parameters,
        process,
        key,
    })
}

type Greeting = (Vec<(Vec<u8>, Vec<u8>)>, i32, Vec<u8>);

/// As [`connect`], for questions.
pub async fn dial(to: Address<'_>, limit: Duration) -> Result<(Dialog, Greeting), ConnectError> {
    let address = format!("{}:{}", to.host, to.port);
    let unreachable = |source| ConnectError::Unreachable {
        address: address.clone(),
        source,
    };
    let work = async {
        let stream = TcpStream::connect((to.host, to.port))
            .await
            .map_err(unreachable)?;
        tune(&stream).map_err(unreachable)?;
        let stream = match to.tls {
            None => Stream::Plain(stream),
            Some((trust, expect)) => trust
                .connect_postgres(stream, expect)
                .await
                .map_err(unreachable)?,
        };
        let mut dialog = Dialog {
            stream,
            address: address.clone(),
            buffer: Vec::new(),
        };
        let mut out = Vec::new();
        startup::put_startup(&mut out, to.parameters.iter().copied());
        dialog.send(&out).await?;
        dialog.authenticate(to.login).await?;
        let greeting = dialog.greeting().await?;
        Ok((dialog, greeting))
    };
    timeout(limit, work).await.unwrap_or_else(|_| {
        let why = format!("no answer within {} ms", limit.as_millis());
        Err(unreachable(io::Error::new(io::ErrorKind::TimedOut, why)))
    })
}

/// Sets what every socket of the proxy has.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT))?;
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(10))
        .with_interval(Duration::from_secs(3))
        .with_retries(3);
    socket.set_tcp_keepalive(&keepalive)
}

impl Dialog {
    fn broken(&self, what: impl std::fmt::Display) -> ConnectError {
        ConnectError::Protocol {
            address: self.address.clone(),
            what: what.to_string(),
        }
    }

    fn lost(&self, source: io::Error) -> ConnectError {
        ConnectError::Unreachable {
            address: self.address.clone(),
            source,
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), ConnectError> {
        let sent = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        sent.await.map_err(|e| self.lost(e))
    }

    /// The next message; an error of the server's is one here too.
    async fn next(&mut self) -> Result<(u8, Vec<u8>), ConnectError> {
        loop {
            let found = frame(&self.buffer, ANSWER_BYTES_MAX).map_err(|e| self.broken(e))?;
            if let Some((message, len)) = found {
                let (tag, body) = (message.tag, message.body.to_vec());
                self.buffer.drain(..len);
                if tag == b'E' {
                    let fields = Fields::new(&body);
                    return Err(ConnectError::Refused {
                        address: self.address.clone(),
                        code: String::from_utf8_lossy(fields.code()).into_owned(),
                        message: fields.message(),
                    });
                }
                return Ok((tag, body));
            }
            let read = self
                .stream
                .read_buf(&mut self.buffer)
                .await
                .map_err(|e| self.lost(e))?;
            if read == 0 {
                return Err(self.lost(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    async fn next_authentication(&mut self) -> Result<Vec<u8>, ConnectError> {
        match self.next().await? {
            (b'R', body) => Ok(body),
            (b'v', _) => Err(self.broken("it does not speak protocol 3.0")),
            (tag, _) => Err(self.broken(format!("message {tag:#04x} during the login"))),
        }
    }

    async fn authenticate(&mut self, login: &Login) -> Result<(), ConnectError> {
        let body = self.next_authentication().await?;
        let lacking = |wants, hint| ConnectError::Credentials {
            address: self.address.clone(),
            wants,
            hint,
        };
        let mut out = Vec::new();
        match (
            Authentication::parse(&body).map_err(|e| self.broken(e))?,
            login,
        ) {
            (Authentication::Ok, _) => return Ok(()),
            (Authentication::Sasl(offered), Login::Scram(identity)) => {
                if !Authentication::offers(offered, scram::MECHANISM) {
                    return Err(lacking(
                        "another SASL mechanism than SCRAM-SHA-256",
                        "offer it in pg_hba.conf",
                    ));
                }
                return self.scram(identity.clone()).await;
            }
            (Authentication::Md5Password(salt), Login::Md5(verifier)) => {
                let answer = md5::answer(verifier, salt)
                    .ok_or_else(|| self.broken("the MD5 verifier is none"))?;
                frontend::put_password(&mut out, answer.as_bytes());
            }
            (Authentication::Sasl(_), _) => {
                return Err(lacking(
                    "SCRAM-SHA-256",
                    "the client has to log in to the proxy by SCRAM, or the server to trust the proxy",
                ));
            }
            (Authentication::Md5Password(_), _) => {
                return Err(lacking(
                    "an MD5 answer",
                    "let pg_hba.conf ask for scram-sha-256",
                ));
            }
            _ => {
                return Err(lacking(
                    "another login",
                    "let pg_hba.conf ask for scram-sha-256",
                ));
            }
        }
        self.send(&out).await?;
        self.authentication_ok().await
    }

    async fn authentication_ok(&mut self) -> Result<(), ConnectError> {
        let body = self.next_authentication().await?;
        match Authentication::parse(&body) {
            Ok(Authentication::Ok) => Ok(()),
            _ => Err(self.broken("the login did not end")),
        }
    }

    async fn scram(&mut self, identity: ClientIdentity) -> Result<(), ConnectError> {
        let mut client = scram::Client::new(identity, &rand::random());
        let mut out = Vec::new();
        frontend::put_sasl_initial(
            &mut out,
            scram::MECHANISM,
            client.first_message().as_bytes(),
        );
        self.send(&out).await?;
        let body = self.next_authentication().await?;
        let Ok(Authentication::SaslContinue(server_first)) = Authentication::parse(&body) else {
            return Err(self.broken("SCRAM did not go on"));
        };
        let proof = client
            .final_message(server_first)
            .map_err(|e| self.broken(e))?;
        out.clear();
        frontend::put_sasl_response(&mut out, proof.as_bytes());
        self.send(&out).await?;
        let body = self.next_authentication().await?;
        let Ok(Authentication::SaslFinal(server_final)) = Authentication::parse(&body) else {
            return Err(self.broken("SCRAM did not end"));
        };
        client.verify(server_final).map_err(|e| self.broken(e))?;
        self.authentication_ok().await
    }

    async fn greeting(&mut self) -> Result<Greeting, ConnectError> {
        let (mut parameters, mut process, mut key) = (Vec::new(), 0, Vec::new());
        for _ in 0..ANSWER_MESSAGES_MAX {
            match self.next().await? {
                (b'S', body) => {
                    let (name, value) = parameter_status(&body).map_err(|e| self.broken(e))?;
                    parameters.push((name.to_vec(), value.to_vec()));
                }
                (b'K', body) => {
                    let (of, secret) = key_data(&body).map_err(|e| self.broken(e))?;
                    process = of;
                    key = secret.to_vec();
                }
                (b'N', _) => {}
                (b'Z', _) => return Ok((parameters, process, key)),
                (tag, _) => return Err(self.broken(format!("message {tag:#04x} after the login"))),
            }
        }
        Err(self.broken("the login does not end"))
    }

    /// Asks one question with text parameters; the answer's rows, as text, NULL as the empty text.
    pub async fn ask(
        &mut self,
        sql: &str,
        parameters: &[&str],
    ) -> Result<Vec<Vec<String>>, ConnectError> {
        let mut out = Vec::new();
        frontend::put_parse(&mut out, "", sql);
        frontend::put_bind_text(&mut out, "", parameters);
        frontend::put_execute(&mut out);
        frontend::put_sync(&mut out);
        self.send(&out).await?;
        let mut rows = Vec::new();
        for _ in 0..ANSWER_MESSAGES_MAX {
            match self.next().await? {
                (b'D', body) => {
                    let columns = data_row(&body).map_err(|e| self.broken(e))?;
                    let text = |c: Option<&[u8]>| {
                        String::from_utf8_lossy(c.unwrap_or_default()).into_owned()
                    };
                    rows.push(columns.into_iter().map(text).collect());
                }
                (b'Z', _) => return Ok(rows),
                _ => {}
            }
        }
        Err(self.broken("the answer does not end"))
    }
}
