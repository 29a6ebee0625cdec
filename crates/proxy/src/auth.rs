//! Who a client is: verifiers from the servers, remembered; and what slows guessing down.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use craton_trust::{Expect, Role, Trust};
use craton_wire::scram::{self, Verifier};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::backend::{Address, ConnectError, Dialog, Login, dial};
use crate::config::ProxyConfig;
use crate::routes::{Routes, Target};

/// Look-ups that may wait for the one connection that makes them.
const LOOKUPS_WAITING_MAX: usize = 256;

/// Addresses whose failures are remembered.
const GUESSERS_MAX: usize = 4096;

/// What a first failure costs; every further one doubles it.
const PENALTY_MIN: Duration = Duration::from_millis(100);

/// The most that a failure costs.
const PENALTY_MAX: Duration = Duration::from_secs(3);

/// After this long without a failure an address is as good as new.
const PENALTY_FORGOTTEN: Duration = Duration::from_secs(60);

/// How a user's password is checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Secret {
    /// By SCRAM.
    Scram(Verifier),
    /// By MD5: the text as `pg_authid` has it.
    Md5(String),
    /// There is no such user, or it has no password.
    Unknown,
}

impl Secret {
    fn parse(text: &str) -> Self {
        if let Some(verifier) = Verifier::parse(text) {
            return Self::Scram(verifier);
        }
        if text.starts_with("md5") && text.len() == 35 {
            return Self::Md5(text.to_owned());
        }
        Self::Unknown
    }
}

/// Why a verifier is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// No server could be asked.
    #[error("no server could be asked for the password's verifier: {0}")]
    NoServer(String),
    /// The server did not like the question.
    #[error(
        "the proxy cannot look up verifiers: {0}; check auth_user, auth_password_file and auth_query"
    )]
    Refused(String),
    /// Too many look-ups wait.
    #[error("too many logins at once")]
    Busy,
}

struct Request {
    user: String,
    answer: oneshot::Sender<Result<Secret, LookupError>>,
}

#[derive(Clone)]
struct Remembered {
    secret: Secret,
    at: Instant,
}

/// Verifiers, asked for once and remembered. Unknown users are not remembered: anybody can invent names.
pub struct Verifiers {
    config: Arc<ProxyConfig>,
    known: Mutex<BTreeMap<String, Remembered>>,
    requests: mpsc::Sender<Request>,
    mock_secret: scram::Key,
}

impl Verifiers {
    /// Starts the task that asks; it ends with the last handle.
    pub fn start(asker: Arc<Asker>, routes: watch::Receiver<Arc<Routes>>) -> Arc<Self> {
        let (requests, waiting) = mpsc::channel(LOOKUPS_WAITING_MAX);
        let config = Arc::clone(&asker.config);
        tokio::spawn(answer_lookups(asker, routes, waiting));
        let known = Mutex::new(BTreeMap::new());
        Arc::new(Self {
            config,
            known,
            requests,
            mock_secret: rand::random(),
        })
    }

    /// A user's secret: a fresh one if possible, else the one remembered.
    pub async fn get(&self, user: &str) -> Result<Secret, LookupError> {
        let remembered = self.lock().get(user).cloned();
        let ttl = Duration::from_millis(self.config.auth_cache_ttl_ms);
        if let Some(fresh) = remembered.as_ref().filter(|r| r.at.elapsed() < ttl) {
            return Ok(fresh.secret.clone());
        }
        match (self.ask(user).await, remembered) {
            (Ok(secret), _) => {
                self.remember(user, &secret);
                Ok(secret)
            }
            (Err(_), Some(old)) => Ok(old.secret),
            (Err(error), None) => Err(error),
        }
    }

    /// The password may have been changed: the next login asks again.
    pub fn doubt(&self, user: &str) {
        let ttl = Duration::from_millis(self.config.auth_cache_ttl_ms);
        if let Some(remembered) = self.lock().get_mut(user)
            && remembered.at.elapsed() > PENALTY_MIN
            && let Some(stale) = Instant::now().checked_sub(ttl)
        {
            remembered.at = stale;
        }
    }

    /// A verifier that nothing satisfies, for names that do not exist.
    pub fn mock(&self, user: &str) -> Verifier {
        Verifier::mock(user, &self.mock_secret)
    }

    async fn ask(&self, user: &str) -> Result<Secret, LookupError> {
        let (answer, answered) = oneshot::channel();
        let request = Request {
            user: user.to_owned(),
            answer,
        };
        self.requests
            .try_send(request)
            .map_err(|_| LookupError::Busy)?;
        answered.await.unwrap_or(Err(LookupError::Busy))
    }

    fn remember(&self, user: &str, secret: &Secret) {
        let mut known = self.lock();
        if *secret == Secret::Unknown {
            known.remove(user);
            return;
        }
        if known.len() >= self.config.auth_cache_users_max && !known.contains_key(user) {
            known.pop_first();
        }
        known.insert(
            user.to_owned(),
            Remembered {
                secret: secret.clone(),
                at: Instant::now(),
            },
        );
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Remembered>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who asks the servers. Verifiers are worth stealing: they travel through TLS.
#[derive(Debug)]
pub(crate) struct Asker {
    pub(crate) config: Arc<ProxyConfig>,
    pub(crate) login: Login,
    /// None for a set without agents, and where TLS is off.
    pub(crate) trust: Option<Arc<Trust>>,
}

async fn answer_lookups(
    asker: Arc<Asker>,
    routes: watch::Receiver<Arc<Routes>>,
    mut requests: mpsc::Receiver<Request>,
) {
    let mut open: Option<Open> = None;
    while let Some(request) = requests.recv().await {
        if request.answer.is_closed() {
            continue;
        }
        let current = Arc::clone(&routes.borrow());
        let answer = look_up(&asker, &current, &mut open, &request.user).await;
        // The client may have left meanwhile.
        let _ = request.answer.send(answer);
    }
}

/// So long a standby is asked before the primary, which could not be, is tried again.
const STANDBY_FOR: Duration = Duration::from_secs(1);

/// The connection that is asked.
struct Open {
    target: Arc<Target>,
    dialog: Dialog,
    since: Instant,
}

impl Open {
    /// A standby may not have the newest roles and passwords yet: where there is a primary it is not asked for long.
    fn is_good(&self, routes: &Routes) -> bool {
        let is_primary = routes
            .primary
            .as_ref()
            .is_none_or(|p| p.id == self.target.id);
        !self.target.is_revoked() && (is_primary || self.since.elapsed() < STANDBY_FOR)
    }
}

/// Asks on the open connection, or on a new one: of the primary if there is one, else of any standby.
async fn look_up(
    asker: &Asker,
    routes: &Routes,
    open: &mut Option<Open>,
    user: &str,
) -> Result<Secret, LookupError> {
    let config = asker.config.as_ref();
    if let Some(mut known) = open.take().filter(|known| known.is_good(routes))
        && let Ok(Ok(secret)) = tokio::time::timeout(
            config.connect_timeout(),
            question(config, &mut known.dialog, user),
        )
        .await
    {
        *open = Some(known);
        return Ok(secret);
    }
    let mut last = "there is none".to_owned();
    for target in routes.targets() {
        let asked = tokio::time::timeout(config.connect_timeout(), async {
            let mut dialog = introduce(asker, target).await?;
            let secret = question(config, &mut dialog, user).await?;
            Ok::<_, ConnectError>((dialog, secret))
        });
        match asked.await {
            Ok(Ok((dialog, secret))) => {
                *open = Some(Open {
                    target: Arc::clone(target),
                    dialog,
                    since: Instant::now(),
                });
                return Ok(secret);
            }
            Ok(Err(error)) if error.is_passing() => last = error.to_string(),
            Ok(Err(error)) => {
                tracing::warn!(%error, "cannot look up a verifier");
                return Err(LookupError::Refused(error.to_string()));
            }
            Err(_) => last = format!("{target} does not answer"),
        }
    }
    Err(LookupError::NoServer(last))
}

/// Whether a server process waits for standbys to confirm what it has committed already. Where the server cannot
/// be asked, or does not have the function, the answer is no.
pub(crate) async fn waits_for_standbys(asker: &Asker, target: &Target, process: i32) -> bool {
    let asked = async {
        let mut dialog = introduce(asker, target).await?;
        let sql = "SELECT craton.waits_for_standbys($1::integer)::text";
        dialog.ask(sql, &[&process.to_string()]).await
    };
    match tokio::time::timeout(asker.config.connect_timeout(), asked).await {
        Ok(Ok(rows)) => rows
            .first()
            .and_then(|r| r.first())
            .is_some_and(|w| w == "true"),
        Ok(Err(error)) => {
            tracing::debug!(%error, "cannot ask whether a commit waits for standbys");
            false
        }
        Err(_) => false,
    }
}

async fn introduce(asker: &Asker, target: &Target) -> Result<Dialog, ConnectError> {
    let config = asker.config.as_ref();
    let expect = Expect::Exactly(Role::Node, target.member.as_str().to_owned());
    let to = Address {
        host: &target.host,
        port: target.port,
        parameters: &[
            ("user", &config.auth_user),
            ("database", &config.auth_database),
            ("application_name", "craton proxy auth"),
        ],
        login: &asker.login,
        tls: asker.trust.as_deref().map(|trust| (trust, &expect)),
    };
    Ok(dial(to, config.connect_timeout()).await?.0)
}

async fn question(
    config: &ProxyConfig,
    dialog: &mut Dialog,
    user: &str,
) -> Result<Secret, ConnectError> {
    let rows = dialog.ask(&config.auth_query, &[user]).await?;
    let verifier = rows
        .first()
        .filter(|row| row.first().is_some_and(|name| name == user))
        .and_then(|row| row.get(1));
    Ok(verifier.map_or(Secret::Unknown, |text| Secret::parse(text)))
}

/// Slows down addresses that fail to log in.
#[derive(Debug, Default)]
pub struct Guessers(Mutex<BTreeMap<IpAddr, (u32, Instant)>>);

impl Guessers {
    /// Notes a failure; how long its answer has to wait.
    pub fn failed(&self, address: IpAddr) -> Duration {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if known.len() >= GUESSERS_MAX {
            known.retain(|_, (_, at)| now.duration_since(*at) < PENALTY_FORGOTTEN);
            if known.len() >= GUESSERS_MAX {
                return PENALTY_MAX;
            }
        }
        let (count, at) = known.entry(address).or_insert((0, now));
        if now.duration_since(*at) >= PENALTY_FORGOTTEN {
            *count = 0;
        }
        *count = count.saturating_add(1);
        *at = now;
        PENALTY_MIN
            .saturating_mul(2_u32.saturating_pow(*count - 1))
            .min(PENALTY_MAX)
    }

    /// Notes a success.
    pub fn succeeded(&self, address: IpAddr) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guessing_gets_slower() {
        let guessers = Guessers::default();
        let address = IpAddr::from([127, 0, 0, 1]);
        assert_eq!(guessers.failed(address), PENALTY_MIN);
        assert_eq!(guessers.failed(address), PENALTY_MIN * 2);
        for _ in 0..40 {
            guessers.failed(address);
        }
        assert_eq!(guessers.failed(address), PENALTY_MAX);
        guessers.succeeded(address);
        assert_eq!(guessers.failed(address), PENALTY_MIN);
    }

    #[test]
    fn kinds_of_secrets() {
        let scram = Verifier::from_password("x", &[1; 16], 1).to_text();
        assert!(matches!(Secret::parse(&scram), Secret::Scram(_)));
        assert!(matches!(
            Secret::parse("md5aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"),
            Secret::Md5(_)
        ));
        assert_eq!(Secret::parse(""), Secret::Unknown);
        assert_eq!(Secret::parse("plain"), Secret::Unknown);
    }
}
