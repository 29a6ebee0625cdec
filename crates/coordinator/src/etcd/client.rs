//! Calls: which endpoint, how long, what a failure means, and who we are.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};

use super::http::{Endpoint, Failure, Lines, connector};
use super::wire::{AuthAsk, AuthTold, ErrorTold};
use crate::api::{CALL_TIMEOUT, CoordinatorError, EndpointState};
use crate::place::Place;

/// One try of a call that may be repeated. A paused endpoint costs this much, once.
const TRY_TIMEOUT: Duration = Duration::from_millis(400);

/// The one try of a call that may not.
const ONCE_TIMEOUT: Duration = Duration::from_millis(1500);

/// One login: etcd hashes the password slowly, on purpose.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(2);

/// Between two rounds through endpoints of which none could be reached.
const ROUND_PAUSE: Duration = Duration::from_millis(50);

/// Logins within one call: a token may be revoked between login and use, but not for ever.
const LOGINS_MAX: usize = 2;

/// May a call be sent again when nobody knows whether it was done?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Repeat {
    /// Done twice is as good as done once.
    Freely,
    /// Only when it was certainly not done.
    IfNotDone,
}

/// What etcd's own refusals mean. gRPC's codes are too coarse: 14 (unavailable) covers both "there is no
/// leader, nothing was proposed" and "proposed, but not seen applied in time".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Refusal {
    /// Nothing was done; another endpoint, or a little later, may do it.
    Later,
    /// Nothing was done; log in again.
    Login,
    /// Nothing was done, and trying again does not help.
    Final,
    /// It may have been done.
    Doubt,
}

fn refusal(status: u16, told: &ErrorTold) -> Refusal {
    const LOGIN: [&str; 3] = [
        "invalid auth token",
        "revision in header is old",
        "auth revision",
    ];
    const LATER: [&str; 4] = ["no leader", "too many requests", "not capable", "learner"];
    let says = |texts: &[&str]| texts.iter().any(|t| told.message.contains(t));
    if told.code == 16 || says(&LOGIN) {
        return Refusal::Login;
    }
    if says(&LATER) {
        return Refusal::Later;
    }
    match told.code {
        // Invalid argument, not found, permission denied, resource exhausted, failed precondition, unimplemented:
        // etcd checks these before it proposes, or when it applies without any effect.
        3 | 5 | 7 | 8 | 9 | 12 => Refusal::Final,
        _ if status == 404 => Refusal::Final,
        _ => Refusal::Doubt,
    }
}

/// What the operator can do about it.
fn advice(told: &ErrorTold) -> &'static str {
    if told.message.contains("database space exceeded") {
        "; etcd is full: compact and defragment it, disarm its alarm (`etcdctl alarm disarm`), and run it with --auto-compaction-retention"
    } else if told.message.contains("permission denied") {
        "; set coordinator.username if there is none, and grant the user's role readwrite on the prefix (`etcdctl role grant-permission ROLE readwrite --prefix=true PREFIX`)"
    } else if told.message.contains("user name is empty") {
        "; etcd asks for a user: set coordinator.username and coordinator.password_file"
    } else if told.message.contains("authentication failed") {
        "; check coordinator.username and the password in coordinator.password_file"
    } else if told.message.contains("CommonName of client") {
        "; with users and client certificates both, etcd's gateway takes only certificates without a common name: make coordinator.cert_file one (names belong into its subject alternative names)"
    } else {
        ""
    }
}

/// What the last login gave.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Token {
    None,
    Valid(Arc<str>),
    /// And whether another try is of no use.
    Refused(String, bool),
}

/// Logs in once for all calls that wait, and to the end even if they stop waiting: etcd takes its time on purpose.
struct Login {
    username: String,
    password_file: PathBuf,
    token: watch::Sender<Token>,
    turn: Arc<Semaphore>,
}

impl Login {
    async fn ask(&self, endpoint: &Endpoint) -> Token {
        let password = match tokio::fs::read_to_string(&self.password_file).await {
            Ok(text) => text,
            Err(e) => {
                let file = self.password_file.display();
                let why = format!("coordinator.password_file: cannot read {file}: {e}");
                return Token::Refused(why, true);
            }
        };
        let ask = AuthAsk {
            name: self.username.clone(),
            password: password
                .lines()
                .next()
                .unwrap_or_default()
                .trim()
                .to_owned(),
        };
        let body = match encode(&ask) {
            Ok(body) => body,
            Err(e) => return Token::Refused(e.to_string(), true),
        };
        let due = Instant::now() + LOGIN_TIMEOUT;
        let (status, body) = match endpoint
            .ask("/v3/auth/authenticate", &body, None, due)
            .await
        {
            Ok(told) => told,
            Err(e) => {
                let why = format!("login at {}: {}", endpoint.name(), e.into_text());
                return Token::Refused(why, false);
            }
        };
        if status != 200 {
            let told = refused(status, &body);
            let why = format!("etcd refuses the login: {}{}", told.message, advice(&told));
            return Token::Refused(why, refusal(status, &told) == Refusal::Final);
        }
        match serde_json::from_slice::<AuthTold>(&body) {
            Ok(told) => Token::Valid(told.token.into()),
            Err(e) => Token::Refused(format!("login at {}: {e}", endpoint.name()), false),
        }
    }
}

/// All endpoints of one etcd.
pub(super) struct Client {
    endpoints: Vec<Arc<Endpoint>>,
    /// The endpoint that answered last; it is asked first.
    preferred: AtomicUsize,
    login: Option<Arc<Login>>,
}

/// How one try went.
enum Tried {
    Told(Bytes),
    Again { why: String, doubt: bool },
    Final(CoordinatorError),
}

impl Client {
    pub(super) fn new(place: &Place) -> Result<Self, String> {
        let tls = connector(place)?;
        let endpoints = place
            .endpoints
            .iter()
            .map(|text| Endpoint::new(text, tls.as_ref()).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        let login = match (&place.username, &place.password_file) {
            (Some(username), Some(password_file)) => Some(Arc::new(Login {
                username: username.clone(),
                password_file: password_file.clone(),
                token: watch::Sender::new(Token::None),
                turn: Arc::new(Semaphore::new(1)),
            })),
            _ => None,
        };
        Ok(Self {
            endpoints,
            preferred: AtomicUsize::new(0),
            login,
        })
    }

    fn current(&self) -> (usize, Option<&Arc<Endpoint>>) {
        let n = self.preferred.load(Ordering::Relaxed);
        (n, self.endpoints.get(n % self.endpoints.len().max(1)))
    }

    /// The endpoint `seen` failed: the next one, unless another call has moved on already.
    fn move_on(&self, seen: usize) {
        if let Some(endpoint) = self.endpoints.get(seen % self.endpoints.len().max(1)) {
            endpoint.forget_connections();
        }
        let next = seen.wrapping_add(1);
        let _ = self
            .preferred
            .compare_exchange(seen, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// `token` was refused: the next call logs in again, unless another has already.
    fn drop_token(&self, token: Option<&Arc<str>>) {
        if let (Some(login), Some(token)) = (&self.login, token) {
            login.token.send_if_modified(|now| {
                let same = matches!(now, Token::Valid(t) if t == token);
                if same {
                    *now = Token::None;
                }
                same
            });
        }
    }

    /// A token, from a new login if there is none. Nothing of the call has been sent yet.
    async fn logged_in(
        &self,
        endpoint: &Arc<Endpoint>,
        due: Instant,
    ) -> Result<Option<Arc<str>>, Tried> {
        let Some(login) = &self.login else {
            return Ok(None);
        };
        let mut tokens = login.token.subscribe();
        if let Token::Valid(token) = &*tokens.borrow_and_update() {
            return Ok(Some(Arc::clone(token)));
        }
        if let Ok(turn) = Arc::clone(&login.turn).try_acquire_owned() {
            let (login, endpoint) = (Arc::clone(login), Arc::clone(endpoint));
            let runtime = endpoint.runtime().clone();
            runtime.spawn(async move {
                let token = login.ask(&endpoint).await;
                drop(turn);
                login.token.send_replace(token);
            });
        }
        let again = |why: String| Tried::Again { why, doubt: false };
        match timeout_at(due, tokens.changed()).await {
            Ok(Ok(())) => {}
            _ => {
                return Err(again(format!(
                    "login at {}: no answer in time",
                    endpoint.name()
                )));
            }
        }
        let told = tokens.borrow().clone();
        match told {
            Token::Valid(token) => Ok(Some(token)),
            Token::Refused(why, true) => Err(Tried::Final(CoordinatorError::Refused(why))),
            Token::Refused(why, false) => Err(again(why)),
            Token::None => Err(again("the login was revoked at once".to_owned())),
        }
    }

    async fn try_once(
        &self,
        endpoint: &Arc<Endpoint>,
        path: &str,
        body: &Bytes,
        patience: Duration,
        call_due: Instant,
    ) -> Result<Bytes, Tried> {
        let mut logins = 0;
        loop {
            let token = self.logged_in(endpoint, call_due).await?;
            let name = endpoint.name();
            let due = call_due.min(Instant::now() + patience);
            let (status, answer) = match endpoint.ask(path, body, token.as_deref(), due).await {
                Ok(told) => told,
                Err(Failure::NotSent(why)) => {
                    return Err(Tried::Again {
                        why: format!("{name}: {why}"),
                        doubt: false,
                    });
                }
                Err(Failure::Doubt(why)) => {
                    return Err(Tried::Again {
                        why: format!("{name}: {why}"),
                        doubt: true,
                    });
                }
            };
            if status == 200 {
                return Ok(answer);
            }
            let told = refused(status, &answer);
            let why = format!("{name}: {}{}", told.message, advice(&told));
            match refusal(status, &told) {
                Refusal::Login if self.login.is_some() && logins < LOGINS_MAX => {
                    logins += 1;
                    self.drop_token(token.as_ref());
                }
                Refusal::Login | Refusal::Final => {
                    return Err(Tried::Final(CoordinatorError::Refused(why)));
                }
                Refusal::Later => return Err(Tried::Again { why, doubt: false }),
                Refusal::Doubt => return Err(Tried::Again { why, doubt: true }),
            }
        }
    }

    /// One call, within [`CALL_TIMEOUT`], at as many endpoints as it takes.
    pub(super) async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        path: &str,
        ask: &Q,
        repeat: Repeat,
    ) -> Result<A, CoordinatorError> {
        let body = encode(ask)?;
        let due = Instant::now() + CALL_TIMEOUT;
        let (mut tries, mut in_doubt) = (0, false);
        loop {
            let (seen, endpoint) = self.current();
            let Some(endpoint) = endpoint else {
                return Err(CoordinatorError::Stopped("no endpoint is named".to_owned()));
            };
            let patience = match repeat {
                Repeat::Freely => TRY_TIMEOUT,
                Repeat::IfNotDone => ONCE_TIMEOUT,
            };
            let tried = self.try_once(endpoint, path, &body, patience, due).await;
            let tried = tried.map_or_else(|e| e, Tried::Told);
            let why = match tried {
                Tried::Told(answer) => {
                    return serde_json::from_slice(&answer).map_err(|e| {
                        CoordinatorError::Unknown(format!(
                            "{}: an answer cannot be understood: {e}",
                            endpoint.name()
                        ))
                    });
                }
                Tried::Final(error) => return Err(error),
                Tried::Again { why, doubt } => {
                    self.move_on(seen);
                    if doubt && repeat == Repeat::IfNotDone {
                        return Err(CoordinatorError::Unknown(why));
                    }
                    in_doubt |= doubt;
                    why
                }
            };
            tries += 1;
            if tries % self.endpoints.len() == 0 {
                sleep(ROUND_PAUSE).await;
            }
            if Instant::now() + ROUND_PAUSE >= due {
                return Err(if in_doubt {
                    CoordinatorError::Unknown(why)
                } else {
                    CoordinatorError::Unavailable(why)
                });
            }
        }
    }

    /// The same question at each endpoint, at once; how each answered. Changes nothing about which is preferred.
    pub(super) async fn ask_each<Q: Serialize>(
        self: &Arc<Self>,
        path: &'static str,
        ask: &Q,
    ) -> Result<Vec<EndpointState>, CoordinatorError> {
        let body = encode(ask)?;
        let mut asked = JoinSet::new();
        for (i, endpoint) in self.endpoints.iter().enumerate() {
            let (client, endpoint) = (Arc::clone(self), Arc::clone(endpoint));
            let body = body.clone();
            asked.spawn(async move {
                let began = Instant::now();
                let due = began + CALL_TIMEOUT;
                let tried = client.try_once(&endpoint, path, &body, ONCE_TIMEOUT, due);
                let answered = match tried.await {
                    Ok(_) => Ok(began.elapsed()),
                    Err(Tried::Final(error)) => Err(error.to_string()),
                    Err(Tried::Again { why, .. }) => Err(why),
                    Err(Tried::Told(_)) => Err("a wrong answer".to_owned()),
                };
                let endpoint = endpoint.name().to_owned();
                (i, EndpointState { endpoint, answered })
            });
        }
        let mut states = asked.join_all().await;
        states.sort_by_key(|(i, _)| *i);
        Ok(states.into_iter().map(|(_, state)| state).collect())
    }

    /// Begins a stream at the endpoint that answered last.
    pub(super) async fn stream<Q: Serialize>(&self, path: &str, ask: &Q) -> Result<Stream, String> {
        let body = encode(ask).map_err(|e| e.to_string())?;
        let (seen, endpoint) = self.current();
        let endpoint = endpoint.ok_or("no endpoint is named")?;
        let due = Instant::now() + CALL_TIMEOUT;
        let mut used = None;
        let begun = match self.logged_in(endpoint, due).await {
            Ok(token) => {
                used = token;
                endpoint.stream(path, &body, used.as_deref(), due).await
            }
            Err(Tried::Again { why, .. }) => Err(why),
            Err(Tried::Final(error)) => Err(error.to_string()),
            Err(Tried::Told(_)) => Err("a wrong answer".to_owned()),
        };
        match begun {
            Ok((lines, sender)) => Ok(Stream {
                lines,
                seen,
                token: used,
                _connection: Box::new(sender),
            }),
            Err(why) => {
                self.move_on(seen);
                Err(format!("{}: {why}", endpoint.name()))
            }
        }
    }

    /// This stream went wrong: the next one goes elsewhere, and with a new login.
    pub(super) fn give_up(&self, stream: &Stream) {
        self.move_on(stream.seen);
        self.drop_token(stream.token.as_ref());
    }
}

/// An open stream; dropping it closes its connection.
pub(super) struct Stream {
    pub(super) lines: Lines,
    seen: usize,
    token: Option<Arc<str>>,
    _connection: Box<dyn Send + Sync>,
}

/// What was said instead of an answer. What is no message of etcd's is shown as it came.
fn refused(status: u16, body: &Bytes) -> ErrorTold {
    const SHOWN_MAX: usize = 200;
    match serde_json::from_slice::<ErrorTold>(body) {
        Ok(told) if !told.message.is_empty() => told,
        _ => {
            let text: String = String::from_utf8_lossy(body)
                .chars()
                .take(SHOWN_MAX)
                .collect();
            ErrorTold {
                message: format!("HTTP {status}: {text}"),
                ..ErrorTold::default()
            }
        }
    }
}

fn encode(ask: &impl Serialize) -> Result<Bytes, CoordinatorError> {
    serde_json::to_vec(ask)
        .map(Bytes::from)
        .map_err(|e| CoordinatorError::Refused(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(code: u32, message: &str) -> ErrorTold {
        ErrorTold {
            code,
            message: message.to_owned(),
        }
    }

    #[test]
    fn what_may_have_happened_is_never_taken_for_not_done() {
        for message in [
            "etcdserver: request timed out",
            "etcdserver: request timed out, possibly due to previous leader failure",
            "etcdserver: request timed out, possibly due to connection lost",
            "etcdserver: server stopped",
            "etcdserver: leader changed",
            "transport is closing",
            "all SubConns are in TransientFailure",
            "",
        ] {
            for code in [0, 1, 2, 4, 13, 14] {
                assert_eq!(
                    refusal(503, &told(code, message)),
                    Refusal::Doubt,
                    "{code} {message}"
                );
            }
        }
    }

    #[test]
    fn what_was_certainly_not_done_may_be_tried_again() {
        assert_eq!(
            refusal(503, &told(14, "etcdserver: no leader")),
            Refusal::Later
        );
        assert_eq!(
            refusal(429, &told(8, "etcdserver: too many requests")),
            Refusal::Later
        );
        assert_eq!(
            refusal(401, &told(16, "etcdserver: invalid auth token")),
            Refusal::Login
        );
        assert_eq!(
            refusal(
                400,
                &told(
                    3,
                    "etcdserver: revision of auth store is old; auth: revision in header is old"
                )
            ),
            Refusal::Login
        );
        assert_eq!(
            refusal(403, &told(7, "etcdserver: permission denied")),
            Refusal::Final
        );
        assert_eq!(
            refusal(429, &told(8, "etcdserver: mvcc: database space exceeded")),
            Refusal::Final
        );
    }
}
