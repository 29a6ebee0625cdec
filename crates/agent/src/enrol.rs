//! New parts of the cluster: tokens to join with, first certificates, and new ones for old.
//!
//! A token is kept in the coordinator under the hash of its secret, with what it is for: role, name, hosts, and until
//! when. Using it deletes it by compare-and-set, so that it works once, whichever member is asked. The agents sign,
//! because their hosts have the authority's key.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use craton_console::join::{
    AuthorityView, CertificateRequest, CertificateView, JoinRequest, JoinView, TokenRequest,
    TokenView,
};
use craton_console::server::{Visitor, failure};
use craton_coordinator::api::{Compare, Coordinator, CoordinatorError, Op, Txn, TxnOutcome};
use craton_core::MemberId;
use craton_trust::authority::{Authority, BUNDLE_FILE, KEY_FILE};
use craton_trust::join::{hex, id_of_secret, unhex};
use craton_trust::{Identity, Role};
use serde::{Deserialize, Serialize};

/// How long a token may be good.
pub const TOKEN_TTL_MAX: Duration = Duration::from_secs(7 * 86_400);

/// Tokens that wait to be used; expired ones make room.
pub const TOKENS_MAX: usize = 64;

/// The beginning of the coordinator's keys.
const PREFIX: &str = "join/";

/// What the handlers work with.
#[derive(Clone)]
pub struct Enrolment {
    /// The cluster's name.
    pub cluster: String,
    /// The directory of the secrets.
    pub secrets: PathBuf,
    /// Where tokens are kept.
    pub coordinator: Arc<dyn Coordinator>,
}

/// What a token is for, as it is kept.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Ticket {
    role: Role,
    name: String,
    #[serde(default)]
    hosts: Vec<String>,
    /// Milliseconds since 1970.
    expires_at_ms: u64,
}

/// A refusal with its HTTP status and what to do.
struct Refusal(StatusCode, String, &'static str);

type Outcome<T> = Result<T, Refusal>;

fn answer<T: Serialize>(outcome: Outcome<T>) -> Response {
    match outcome {
        Ok(view) => Json(view).into_response(),
        Err(Refusal(status, error, hint)) => failure(status, &error, Some(hint)),
    }
}

/// The routes for holders of certificates.
pub fn routes(enrolment: Enrolment) -> Router {
    Router::new()
        .route("/v1/join-tokens", post(make_token))
        .route("/v1/certificate", post(renew))
        .route("/v1/authority", get(authority))
        .with_state(enrolment)
}

/// The one route for strangers: the secret of a token opens it.
pub fn open_routes(enrolment: Enrolment) -> Router {
    Router::new()
        .route("/join", post(join))
        .with_state(enrolment)
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

fn bad(error: impl Into<String>, hint: &'static str) -> Refusal {
    Refusal(StatusCode::BAD_REQUEST, error.into(), hint)
}

fn unavailable(error: &dyn std::fmt::Display) -> Refusal {
    Refusal(
        StatusCode::SERVICE_UNAVAILABLE,
        error.to_string(),
        "a majority of the voters must run; see craton status",
    )
}

/// What was not written, or of which nobody knows: only the first may be asked of another agent.
fn not_written(error: &CoordinatorError) -> Refusal {
    match error {
        CoordinatorError::Unknown(_) => Refusal(
            StatusCode::GATEWAY_TIMEOUT,
            error.to_string(),
            "it may be done all the same: make another token",
        ),
        other => unavailable(other),
    }
}

impl Enrolment {
    /// Reads a file of the secrets beside the event loop.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Outcome<T> + Send + 'static,
    ) -> Outcome<T> {
        let this = self.clone();
        tokio::task::spawn_blocking(move || work(&this))
            .await
            .map_err(|e| {
                Refusal(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    e.to_string(),
                    "try again",
                )
            })?
    }

    fn signer(&self) -> Outcome<Authority> {
        Authority::load(&self.secrets.join(KEY_FILE)).map_err(|e| {
            Refusal(
                StatusCode::CONFLICT,
                format!("this member cannot sign certificates: {e}"),
                "ask another member, or copy authority.key into its directory of secrets; with your own authority it signs",
            )
        })
    }

    fn bundle(&self) -> Outcome<String> {
        let path = self.secrets.join(BUNDLE_FILE);
        std::fs::read_to_string(&path).map_err(|e| {
            Refusal(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("cannot read {}: {e}", path.display()),
                "see the agent's log",
            )
        })
    }

    fn authority_view(&self) -> Outcome<AuthorityView> {
        let signer = self.signer()?;
        let sha256 = signer
            .sha256()
            .map_err(|e| bad(e.to_string(), "see the agent's log"))?;
        Ok(AuthorityView {
            cluster: self.cluster.clone(),
            authority: self.bundle()?,
            signer_sha256: hex(&sha256),
        })
    }

    fn sign(&self, who: &Identity, hosts: &[String], request: &str) -> Outcome<CertificateView> {
        let certificate = self
            .signer()?
            .sign_request(who, hosts, request)
            .map_err(|e| bad(e.to_string(), "use the craton of the cluster's version"))?;
        Ok(CertificateView {
            identity: who.to_string(),
            certificate,
            authority: self.bundle()?,
        })
    }

    /// The secrets that a role needs, and no others.
    fn secrets_of(&self, role: Role) -> Outcome<Vec<(String, String)>> {
        let names: &[&str] = match role {
            Role::Node => &[
                "superuser",
                "replication",
                "proxy",
                "rewind",
                "peers",
                "api-token",
                KEY_FILE,
            ],
            Role::Proxy => &["proxy"],
            Role::Backup => &["replication"],
            Role::Witness => &["peers"],
            Role::Operator => &[],
        };
        let mut found = Vec::with_capacity(names.len());
        for name in names {
            match std::fs::read_to_string(self.secrets.join(name)) {
                Ok(text) => found.push(((*name).to_owned(), text)),
                // A cluster need not have a token.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && *name == "api-token" => {}
                Err(e) => {
                    return Err(Refusal(
                        StatusCode::INTERNAL_SERVER_ERROR,
                        format!("cannot read the secret \"{name}\" here: {e}"),
                        "see the agent's log, or ask another member",
                    ));
                }
            }
        }
        Ok(found)
    }
}

fn check(request: &TokenRequest) -> Outcome<Ticket> {
    let hint = "see craton ca token --help";
    let id = unhex(&request.id).filter(|_| request.id.bytes().all(|b| !b.is_ascii_uppercase()));
    if id.is_none() {
        return Err(bad("the token's id is no SHA-256", hint));
    }
    if request.ttl_s == 0 || Duration::from_secs(request.ttl_s) > TOKEN_TTL_MAX {
        let days = TOKEN_TTL_MAX.as_secs() / 86_400;
        return Err(bad(
            format!("a token is good for 1 second to {days} days"),
            hint,
        ));
    }
    if request.hosts.len() > craton_trust::authority::HOSTS_MAX {
        return Err(bad("too many hosts in one certificate", hint));
    }
    Identity::new("c", request.role, &request.name).map_err(|e| bad(e.to_string(), hint))?;
    if request.role.votes() {
        MemberId::new(&request.name).map_err(|e| bad(e, hint))?;
    }
    Ok(Ticket {
        role: request.role,
        name: request.name.clone(),
        hosts: request.hosts.clone(),
        expires_at_ms: now_ms() + request.ttl_s * 1000,
    })
}

async fn make_token(State(e): State<Enrolment>, Json(request): Json<TokenRequest>) -> Response {
    answer(keep_token(&e, &request).await)
}

async fn keep_token(e: &Enrolment, request: &TokenRequest) -> Outcome<TokenView> {
    let ticket = check(request)?;
    let authority = e.blocking(Enrolment::authority_view).await?;
    let value = serde_json::to_string(&ticket).map_err(|e| bad(e.to_string(), "try again"))?;
    let snapshot = e.coordinator.read().await.map_err(|e| unavailable(&e))?;
    let kept = || {
        snapshot
            .entries
            .range(PREFIX.to_owned()..)
            .take_while(|(key, _)| key.starts_with(PREFIX))
    };
    let expired: Vec<Op> = kept()
        .filter(|(_, at)| {
            serde_json::from_str::<Ticket>(&at.value).is_ok_and(|t| t.expires_at_ms <= now_ms())
        })
        .map(|(key, _)| Op::Delete { key: key.clone() })
        .collect();
    if kept().count() - expired.len() >= TOKENS_MAX {
        return Err(Refusal(
            StatusCode::CONFLICT,
            format!("{TOKENS_MAX} tokens wait to be used already"),
            "wait until some of them expire",
        ));
    }
    let key = format!("{PREFIX}{}", request.id);
    let mut ops = expired;
    ops.push(Op::Put {
        key: key.clone(),
        value,
    });
    let compares = vec![Compare {
        key,
        mod_revision: 0,
    }];
    match e.coordinator.txn(Txn { compares, ops }).await {
        Ok(TxnOutcome::Committed(_)) => Ok(TokenView {
            signer_sha256: authority.signer_sha256,
            expires_at_ms: ticket.expires_at_ms,
        }),
        Ok(TxnOutcome::Conflict) => Err(bad("that token exists already", "make another one")),
        Err(error) => Err(not_written(&error)),
    }
}

async fn join(State(e): State<Enrolment>, Json(request): Json<JoinRequest>) -> Response {
    answer(use_token(&e, request).await)
}

/// One answer for every token that is of no use: which of the reasons it is concerns nobody who has none.
fn no_use() -> Refusal {
    Refusal(
        StatusCode::FORBIDDEN,
        "this token is unknown here, expired, or used already".into(),
        "make a new one with `craton ca token` on a member's host; each works once",
    )
}

async fn use_token(e: &Enrolment, request: JoinRequest) -> Outcome<JoinView> {
    let id = id_of_secret(&request.secret).ok_or_else(no_use)?;
    let key = format!("{PREFIX}{id}");
    let snapshot = e.coordinator.read().await.map_err(|e| unavailable(&e))?;
    let kept = snapshot.get(&key).ok_or_else(no_use)?;
    let ticket: Ticket = serde_json::from_str(&kept.value).map_err(|_| no_use())?;
    if ticket.expires_at_ms <= now_ms() {
        return Err(no_use());
    }
    // Signed before the token is used up, handed out after: what fails here costs nothing, and nobody gets two.
    let role = ticket.role;
    let (view, secrets) = e
        .blocking(move |e| {
            let who = Identity::new(&e.cluster, ticket.role, &ticket.name)
                .map_err(|e| bad(e.to_string(), "make another token"))?;
            let view = e.sign(&who, &ticket.hosts, &request.request)?;
            Ok((view, e.secrets_of(ticket.role)?))
        })
        .await?;
    let txn = Txn {
        compares: vec![Compare {
            key: key.clone(),
            mod_revision: kept.mod_revision,
        }],
        ops: vec![Op::Delete { key }],
    };
    match e.coordinator.txn(txn).await {
        Ok(TxnOutcome::Committed(_)) => {
            tracing::info!(identity = view.identity, %role, "a new part joined with a token");
            Ok(JoinView {
                certificate: view,
                secrets,
            })
        }
        Ok(TxnOutcome::Conflict) => Err(no_use()),
        Err(error) => Err(not_written(&error)),
    }
}

async fn renew(
    State(e): State<Enrolment>,
    Extension(visitor): Extension<Visitor>,
    Json(request): Json<CertificateRequest>,
) -> Response {
    let Some(who) = visitor.identity else {
        return answer::<CertificateView>(Err(Refusal(
            StatusCode::FORBIDDEN,
            "a new certificate is given for the present one, not for a token of the API".into(),
            "use `craton join` with a token of `craton ca token`",
        )));
    };
    let signed = e
        .blocking(move |e| e.sign(&who, &visitor.hosts, &request.request))
        .await;
    answer(signed)
}

async fn authority(State(e): State<Enrolment>) -> Response {
    answer(e.blocking(Enrolment::authority_view).await)
}
