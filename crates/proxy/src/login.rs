//! From a client's first byte to its first ReadyForQuery.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use craton_wire::backend::{self as msg, Report, TransactionStatus};
use craton_wire::frame::frame;
use craton_wire::frontend::SaslInitial;
use craton_wire::md5;
use craton_wire::scram::{self, ClientIdentity, ServerOutcome, Verifier};
use craton_wire::startup::{FirstPacket, STARTUP_LEN_MAX, Startup, first_packet};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::auth::{Secret, waits_for_standbys};
use crate::backend::{ConnectError, Login, tune};
use crate::cancel::{CancelTarget, Outcome};
use crate::config::PoolMode;
use crate::routes::Endpoint;
use crate::server::{Values, followed_index};
use crate::session::{Session, Settings};
use crate::sql::FOLLOWED;
use crate::worker::{AcquireError, Welcome, Who, Worker};

/// The largest message of a login, in bytes: more than any password or proof.
const MESSAGE_BYTES_MAX: usize = 8 * 1024;

/// How often a client may ask for encryption before it gets to the point.
const ENCRYPTION_REQUESTS_MAX: usize = 4;

/// Connections beyond `clients_max` that may log in or cancel before they are counted.
pub const LOGINS_MAX: usize = 256;

/// How long a last word to a client may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// Why a login ended.
enum Failed {
    /// The client is told.
    Told {
        code: &'static str,
        message: String,
        hint: String,
    },
    /// The client is told in a server's words.
    Server { code: String, message: String },
    /// There is nobody to tell, or nothing to say.
    Gone,
}

impl From<io::Error> for Failed {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

fn told(code: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Failed {
    Failed::Told {
        code,
        message: message.into(),
        hint: hint.into(),
    }
}

/// A client's socket during the login.
struct Door<'a> {
    worker: &'a Rc<Worker>,
    stream: TcpStream,
    peer: SocketAddr,
    buffer: Vec<u8>,
    out: Vec<u8>,
}

/// Serves a client from its first byte to its last.
pub async fn attend(worker: &Rc<Worker>, stream: TcpStream, peer: SocketAddr, endpoint: Endpoint) {
    if tune(&stream).is_err() {
        return;
    }
    let mut door = Door {
        worker,
        stream,
        peer,
        buffer: Vec::new(),
        out: Vec::new(),
    };
    let limit = Duration::from_millis(worker.shared.config.login_timeout_ms);
    let outcome = timeout(limit, door.log_in(endpoint))
        .await
        .unwrap_or_else(|_| {
            Err(told(
                "08P01",
                "the login took too long",
                "login_timeout_ms of the proxy is the limit",
            ))
        });
    let settings = match outcome {
        Ok(settings) => settings,
        Err(failed) => {
            door.say_goodbye(failed).await;
            return;
        }
    };
    let Door { stream, out, .. } = door;
    let process = settings.process;
    Session::new(Rc::clone(worker), stream, settings, out)
        .run()
        .await;
    worker.shared.cancels.remove(process);
}

impl Door<'_> {
    async fn say_goodbye(&mut self, failed: Failed) {
        self.out.clear();
        match &failed {
            Failed::Told {
                code,
                message,
                hint,
            } => {
                tracing::info!(peer = %self.peer, code, message, "a client was turned away");
                let report = Report {
                    severity: "FATAL",
                    code,
                    message,
                    detail: "",
                    hint,
                };
                msg::put_error(&mut self.out, report);
            }
            Failed::Server { code, message } => {
                let report = Report {
                    severity: "FATAL",
                    code,
                    message,
                    detail: "",
                    hint: "",
                };
                msg::put_error(&mut self.out, report);
            }
            Failed::Gone => return,
        }
        // The client may be gone, or not read: then it misses the reason.
        let _ = timeout(FAREWELL, self.send()).await;
    }

    async fn send(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.out).await?;
        self.out.clear();
        Ok(())
    }

    async fn read(&mut self, max: usize) -> Result<(), Failed> {
        if self.buffer.len() >= max {
            return Err(told("08P01", "a message of the login is too long", ""));
        }
        if self.stream.read_buf(&mut self.buffer).await? == 0 {
            return Err(Failed::Gone);
        }
        Ok(())
    }

    async fn log_in(&mut self, endpoint: Endpoint) -> Result<Settings, Failed> {
        let greeting = self.first_packet().await?;
        if self.worker.shared.clients.load(Ordering::Relaxed)
            > self.worker.shared.config.clients_max
        {
            self.worker.shared.metrics.clients_refused.inc();
            let hint = "raise clients_max of the proxy, or close connections that are not needed";
            return Err(told("53300", "sorry, too many clients already", hint));
        }
        let login = self.authenticate(&greeting.user).await?;
        let who = Who {
            user: greeting.user.as_str().into(),
            database: greeting.database.as_str().into(),
            options: greeting.options.into(),
            login,
        };
        let welcome = self.welcome(&who, endpoint).await?;
        let values = greet(&mut self.out, &welcome, &greeting.values);
        let (process, secret, cancel) = self.worker.shared.cancels.register();
        msg::put_key_data(&mut self.out, process, &secret.to_be_bytes());
        msg::put_ready(&mut self.out, TransactionStatus::Idle);
        let mode = self.worker.shared.config.mode_of(&who.user, &who.database);
        Ok(Settings {
            who,
            endpoint,
            values,
            session_mode: mode == PoolMode::Session,
            process,
            cancel,
        })
    }

    async fn first_packet(&mut self) -> Result<Greeting, Failed> {
        let mut encryption_requests = 0;
        loop {
            let refused = |e| {
                told(
                    "08P01",
                    format!("{e}"),
                    "this port speaks PostgreSQL's protocol 3",
                )
            };
            let Some((packet, len)) = first_packet(&self.buffer).map_err(refused)? else {
                self.read(STARTUP_LEN_MAX + 1).await?;
                continue;
            };
            match packet {
                FirstPacket::SslRequest | FirstPacket::GssEncRequest => {
                    encryption_requests += 1;
                    // What came along unencrypted must not be taken for something said later.
                    if self.buffer.len() > len || encryption_requests > ENCRYPTION_REQUESTS_MAX {
                        return Err(told(
                            "08P01",
                            "unexpected data after an encryption request",
                            "",
                        ));
                    }
                    self.buffer.clear();
                    self.out.push(b'N');
                    self.send().await?;
                }
                FirstPacket::Cancel { process, key } => {
                    self.cancel(process, key).await;
                    return Err(Failed::Gone);
                }
                FirstPacket::Startup(startup) => {
                    let greeting = Greeting::read(&startup, &mut self.out)?;
                    self.buffer.drain(..len);
                    return Ok(greeting);
                }
            }
        }
    }

    async fn cancel(&self, process: i32, key: &[u8]) {
        let shared = &self.worker.shared;
        let limit = shared.config.connect_timeout();
        let withheld = async |to: CancelTarget| {
            waits_for_standbys(&shared.asker, &to.target, to.process).await
        };
        match shared.cancels.cancel(process, key, limit, withheld).await {
            Outcome::PassedOn => shared.metrics.cancels.inc(),
            Outcome::Withheld => shared.metrics.cancels_withheld.inc(),
            Outcome::Nobody => 0,
        };
    }

    /// The body of the next `p` message.
    async fn password_message(&mut self) -> Result<Vec<u8>, Failed> {
        loop {
            let refused = |e| told("08P01", format!("{e}"), "");
            if let Some((message, len)) = frame(&self.buffer, MESSAGE_BYTES_MAX).map_err(refused)? {
                if message.tag != b'p' {
                    return Err(told("08P01", "expected a password message", ""));
                }
                let body = message.body.to_vec();
                self.buffer.drain(..len);
                return Ok(body);
            }
            self.read(MESSAGE_BYTES_MAX + 8).await?;
        }
    }

    async fn authenticate(&mut self, user: &str) -> Result<Login, Failed> {
        let shared = &Rc::clone(self.worker).shared;
        let login = if shared.config.trusts(self.peer.ip()) {
            Some(Login::Nothing)
        } else {
            match self.secret(user).await? {
                Secret::Scram(verifier) => self.scram(verifier).await?,
                Secret::Md5(verifier) => self.md5(&verifier).await?,
                Secret::Unknown => self.scram(shared.verifiers.mock(user)).await?.and(None),
            }
        };
        if !self.buffer.is_empty() {
            return Err(told("08P01", "unexpected data during the login", ""));
        }
        let Some(login) = login else {
            shared.metrics.auth_failures.inc();
            shared.verifiers.doubt(user);
            sleep(shared.guessers.failed(self.peer.ip())).await;
            return Err(told(
                "28P01",
                format!("password authentication failed for user \"{user}\""),
                "",
            ));
        };
        if !matches!(login, Login::Nothing) {
            shared.guessers.succeeded(self.peer.ip());
        }
        msg::put_auth_ok(&mut self.out);
        Ok(login)
    }

    /// The user's secret. While no server can be asked, a login waits as a transaction would.
    async fn secret(&self, user: &str) -> Result<Secret, Failed> {
        let shared = &self.worker.shared;
        let mut routes = self.worker.routes.clone();
        let limit = shared.config.failover_wait();
        let asking = async {
            loop {
                routes.borrow_and_update();
                match shared.verifiers.get(user).await {
                    Err(crate::auth::LookupError::NoServer(_)) => {
                        // Whatever changes first: the routes, or the server that did not answer.
                        let _ = timeout(Duration::from_millis(200), routes.changed()).await;
                    }
                    known => return known,
                }
            }
        };
        let hint = "see the proxy's log";
        match timeout(limit, asking).await {
            Ok(Ok(secret)) => Ok(secret),
            Ok(Err(error)) => Err(told("08006", error.to_string(), hint)),
            Err(_) => Err(told(
                "57P03",
                "no server could be asked for the password's verifier",
                hint,
            )),
        }
    }

    async fn scram(&mut self, verifier: Verifier) -> Result<Option<Login>, Failed> {
        let malformed = |e: &dyn std::fmt::Display| told("08P01", e.to_string(), "");
        let server_key = verifier.server_key;
        msg::put_auth_sasl(&mut self.out, scram::MECHANISM);
        self.send().await?;
        let body = self.password_message().await?;
        let initial = SaslInitial::parse(&body).map_err(|e| malformed(&e))?;
        let (b"SCRAM-SHA-256", Some(first)) = (initial.mechanism, initial.data) else {
            return Err(told(
                "08P01",
                "the client chose a SASL mechanism that was not offered",
                "",
            ));
        };
        let server =
            scram::Server::new(verifier, first, &rand::random()).map_err(|e| malformed(&e))?;
        msg::put_auth_sasl_continue(&mut self.out, server.first_message().as_bytes());
        self.send().await?;
        let body = self.password_message().await?;
        match server.finish(&body).map_err(|e| malformed(&e))? {
            ServerOutcome::Wrong => Ok(None),
            ServerOutcome::Proven {
                server_final,
                client_key,
            } => {
                msg::put_auth_sasl_final(&mut self.out, server_final.as_bytes());
                Ok(Some(Login::Scram(ClientIdentity::Keys {
                    client_key,
                    server_key,
                })))
            }
        }
    }

    async fn md5(&mut self, verifier: &str) -> Result<Option<Login>, Failed> {
        let salt: [u8; 4] = rand::random();
        msg::put_auth_md5(&mut self.out, salt);
        self.send().await?;
        let body = self.password_message().await?;
        let answer = body.strip_suffix(&[0]).unwrap_or(&body);
        Ok(md5::verify(verifier, salt, answer).then(|| Login::Md5(verifier.to_owned())))
    }

    /// What the server reports at a login: as remembered, or from a server connection that is made now, which also
    /// shows that user and database exist.
    async fn welcome(&self, who: &Who, endpoint: Endpoint) -> Result<Welcome, Failed> {
        let shared = &self.worker.shared;
        if let Some(known) = shared.welcome(who) {
            return Ok(known);
        }
        match self.worker.acquire(who, endpoint).await {
            Ok((server, pool)) => pool.give(server),
            Err(AcquireError::Refused(ConnectError::Refused { code, message, .. })) => {
                return Err(Failed::Server { code, message });
            }
            Err(error @ AcquireError::NoTarget(_)) => {
                return Err(told(
                    "57P03",
                    error.to_string(),
                    "see `craton status`, and try again",
                ));
            }
            Err(error @ AcquireError::PoolBusy { .. }) => {
                return Err(told(
                    "53300",
                    error.to_string(),
                    "raise pool_size of the proxy",
                ));
            }
            Err(error) => return Err(told("08006", error.to_string(), "see the proxy's log")),
        }
        shared
            .welcome(who)
            .ok_or_else(|| told("08006", "the server did not introduce itself", ""))
    }
}

/// What a client's startup packet asks for.
struct Greeting {
    user: String,
    database: String,
    options: Vec<(String, String)>,
    values: [Option<Vec<u8>>; FOLLOWED.len()],
}

impl Greeting {
    fn read(startup: &Startup<'_>, out: &mut Vec<u8>) -> Result<Self, Failed> {
        let text = |bytes: &[u8]| {
            String::from_utf8(bytes.to_vec())
                .map_err(|_| told("08P01", "a startup parameter is not UTF-8", ""))
        };
        let Some(user) = startup.get("user").filter(|u| !u.is_empty()) else {
            return Err(told(
                "28000",
                "no PostgreSQL user name specified in startup packet",
                "",
            ));
        };
        let user = text(user)?;
        let database = match startup.get("database").filter(|d| !d.is_empty()) {
            Some(database) => text(database)?,
            None => user.clone(),
        };
        let mut values: [Option<Vec<u8>>; FOLLOWED.len()] = Default::default();
        let (mut options, mut unknown) = (Vec::new(), Vec::new());
        for (name, value) in &startup.parameters {
            if let Some(place) = followed_index(name).and_then(|i| values.get_mut(i)) {
                *place = Some(value.to_vec());
                continue;
            }
            match *name {
                b"user" | b"database" => {}
                b"replication" if matches!(*value, b"false" | b"off" | b"no" | b"0") => {}
                b"replication" => {
                    let hint =
                        "connect to the member itself; `craton status` shows where it listens";
                    return Err(told(
                        "0A000",
                        "replication connections do not go through the proxy",
                        hint,
                    ));
                }
                name if name.starts_with(b"_pq_.") => unknown.push(name),
                name => options.push((text(name)?, text(value)?)),
            }
        }
        if startup.minor > 0 || !unknown.is_empty() {
            msg::put_negotiate_version(out, &unknown);
        }
        options.sort();
        Ok(Self {
            user,
            database,
            options,
            values,
        })
    }
}

/// Writes the parameters that the client is told, and returns the values that are in force for its session.
fn greet(
    out: &mut Vec<u8>,
    welcome: &Welcome,
    asked: &[Option<Vec<u8>>; FOLLOWED.len()],
) -> Values {
    let mut values = Values::default();
    for (name, value) in welcome.iter() {
        let index = followed_index(name);
        let own = index.and_then(|i| asked.get(i)).and_then(Option::as_ref);
        let value = match (own, name.as_slice()) {
            (Some(own), _) => own.as_slice(),
            // The pool's connections are named for the proxy; the client gave no name.
            (None, b"application_name") => b"",
            (None, _) => value,
        };
        msg::put_parameter_status(out, name, value);
        if let Some(place) = index.and_then(|i| values.get_mut(i)) {
            *place = value.to_vec();
        }
    }
    values
}
