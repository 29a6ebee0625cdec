//! The store of the cluster's records: how it is, and moving the records of a running cluster.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use craton_console::server::failure;
use craton_console::views::{CoordinatorView, DoneView, EndpointView};
use craton_coordinator::api::CoordinatorError;
use craton_coordinator::place::{Backend, Place};
use craton_core::observe::Lease;
use craton_core::records::Change;
use craton_core::topology::MemberRole;
use craton_core::{MemberId, Term};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::{Api, Refusal, starting, who};
use crate::clock;

/// How long another member may take to look at a place.
const PROBE_TIMEOUT: Duration = Duration::from_secs(8);

/// A member that was heard to lead within this leads still, as far as an order by hand goes.
const LEADER_HEARD: Duration = Duration::from_secs(30);

/// For so long a line of the history is tried to be written.
const NOTE_MAX: Duration = Duration::from_secs(10);
/// Between two tries.
const NOTE_PAUSE: Duration = Duration::from_millis(200);

/// `POST /v1/coordinator/probe`: whether this member can use a store there.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeRequest {
    /// Where.
    pub place: Place,
}

/// `POST /v1/coordinator/move`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveRequest {
    /// Where to.
    pub place: Place,
    /// Also where a member does not answer, or cannot reach the place: it follows when it can.
    #[serde(default)]
    pub force: bool,
    /// Who asks, `user@host`.
    #[serde(default)]
    pub by: Option<String>,
}

/// `POST /v1/coordinator/rebuild`: this member writes the records that it knows into a store that was emptied, or
/// restored from an old copy.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RebuildRequest {
    /// Nobody leads, and the operator says that no other member knows anything newer.
    #[serde(default)]
    pub force: bool,
    /// Who asks, `user@host`.
    #[serde(default)]
    pub by: Option<String>,
}

/// What the operator should know of the store.
pub(super) fn warning(api: &Api) -> Option<String> {
    let place = api.coordinator.place();
    let progress = api.coordinator.progress();
    match (api.coordinator.trouble(), progress) {
        (Some(why), _) => Some(format!("the cluster's records ({place}): {why}")),
        (None, Some(progress)) => Some(format!("the cluster's records ({place}): {progress}")),
        (None, None) => None,
    }
}

fn me(api: &Api) -> Option<(MemberId, String)> {
    let seen = api.seen.borrow();
    let observed = &seen.as_ref()?.0;
    Some((observed.me.id.clone(), observed.cluster_name.clone()))
}

pub(super) async fn show(State(api): State<Api>) -> Response {
    let Some((member, cluster)) = me(&api) else {
        return starting();
    };
    let endpoints = api.coordinator.endpoints().await.unwrap_or_default();
    let endpoints = endpoints.into_iter().map(|e| {
        let (ms, error) = match e.answered {
            Ok(took) => (
                Some(u64::try_from(took.as_millis()).unwrap_or(u64::MAX)),
                None,
            ),
            Err(why) => (None, Some(why)),
        };
        EndpointView {
            endpoint: e.endpoint,
            ms,
            error,
        }
    });
    let place = api.coordinator.place();
    Json(CoordinatorView {
        member,
        backend: place.backend.to_string(),
        place: place.to_string(),
        prefix: (place.backend == Backend::Etcd).then(|| place.prefix_of(&cluster)),
        progress: api.coordinator.progress(),
        trouble: api.coordinator.trouble(),
        endpoints: endpoints.collect(),
    })
    .into_response()
}

fn said(text: String) -> DoneView {
    DoneView { text, id: None }
}

/// Why the records could not be moved or written anew.
fn not_done(place: &Place, error: CoordinatorError) -> Refusal {
    match error {
        CoordinatorError::Refused(why) => {
            Refusal::conflict(why, "nothing was changed; see craton coordinator status")
        }
        other => Refusal(
            StatusCode::GATEWAY_TIMEOUT,
            cannot(place, &other),
            "see craton coordinator status; asking again is harmless",
        ),
    }
}

fn cannot(place: &Place, error: &CoordinatorError) -> String {
    match error {
        CoordinatorError::Refused(why) | CoordinatorError::Unavailable(why) => why.clone(),
        other => format!("{place}: {other}"),
    }
}

pub(super) async fn probe(State(api): State<Api>, Json(body): Json<ProbeRequest>) -> Response {
    match api.coordinator.probe(body.place.clone()).await {
        Ok(()) => Json(said(format!("{} can be used", body.place))).into_response(),
        Err(error) => failure(StatusCode::CONFLICT, &cannot(&body.place, &error), None),
    }
}

pub(super) async fn relocate(State(api): State<Api>, Json(body): Json<MoveRequest>) -> Response {
    // Not cut off by an operator who hangs up.
    let done = tokio::spawn(async move { api.relocate(body).await }).await;
    match done {
        Ok(Ok(view)) => Json(view).into_response(),
        Ok(Err(refusal)) => refusal.answer(),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string(), None),
    }
}

pub(super) async fn rebuild(State(api): State<Api>, Json(body): Json<RebuildRequest>) -> Response {
    // Not cut off by an operator who hangs up.
    let done = tokio::spawn(async move { api.write_anew(body).await }).await;
    match done {
        Ok(Ok(view)) => Json(view).into_response(),
        Ok(Err(refusal)) => refusal.answer(),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string(), None),
    }
}

impl Api {
    /// The lease that this member holds as the leader, and how long one lasts.
    fn own_lease(&self) -> Option<(Term, Duration)> {
        let seen = self.seen.borrow().clone()?;
        let o = &seen.0;
        let view = o.view.as_ref()?;
        let leads = view.leader().is_some() && view.leader() == o.me.reference().as_ref();
        let term = view.leadership.as_ref()?.value.term;
        let runs = |l: &Lease| l.term == term && l.until > clock::now();
        (leads && o.lease.as_ref().is_some_and(runs)).then(|| (term, view.settings().ttl()))
    }

    /// Another member that says it leads.
    fn other_leader(&self) -> Option<MemberId> {
        let seen = self.seen.borrow().clone()?;
        let alive = seen.0.peers.iter().filter(|(_, p)| {
            p.status.role == MemberRole::Leader && clock::now().since(p.heard_at) < LEADER_HEARD
        });
        alive.map(|(member, _)| member.clone()).next()
    }

    async fn write_anew(&self, request: RebuildRequest) -> Result<DoneView, Refusal> {
        let by = who(request.by);
        let place = self.coordinator.place();
        let lease = self.own_lease();
        if lease.is_none() {
            if let Some(leader) = self.other_leader() {
                return Err(Refusal::conflict(
                    format!(
                        "{leader} leads: only what the leader knows is certain to be the newest"
                    ),
                    "ask the leader: craton coordinator rebuild without --from",
                ));
            }
            if !request.force {
                return Err(Refusal::conflict(
                    "nobody leads, so no member is certain to know the newest records",
                    "restore the store's newest copy; or, where there is none, name the member that knows the newest by craton coordinator status, with all members running: craton coordinator rebuild --from MEMBER",
                ));
            }
        }
        self.coordinator
            .rebuild(lease)
            .await
            .map_err(|error| not_done(&place, error))?;
        let text = format!("the records in {place} were written anew; asked by {by}");
        self.note_in_history("rebuilt", &text).await;
        Ok(said(text))
    }

    /// What is done is done, whether or not its line in the history can be written. The store has just moved, or was
    /// written anew: it may need a moment.
    async fn note_in_history(&self, kind: &str, text: &str) {
        let deadline = clock::now().after(NOTE_MAX);
        loop {
            let noted = self
                .transact(|view| {
                    let change = Change {
                        expect: vec![],
                        puts: vec![self.noted(view, kind, text.to_owned())],
                        deletes: vec![],
                    };
                    Ok((change, ()))
                })
                .await;
            match noted {
                Ok(_) => return,
                // Not where it may be written already.
                Err(Refusal(StatusCode::SERVICE_UNAVAILABLE | StatusCode::CONFLICT, ..))
                    if clock::now() < deadline =>
                {
                    tokio::time::sleep(NOTE_PAUSE).await;
                }
                Err(Refusal(_, why, _)) => {
                    return tracing::warn!(text, why, "this could not be written to the history");
                }
            }
        }
    }

    async fn relocate(&self, request: MoveRequest) -> Result<DoneView, Refusal> {
        let MoveRequest { place, force, by } = request;
        let by = who(by);
        place.validate().map_err(|why| {
            Refusal(
                StatusCode::UNPROCESSABLE_ENTITY,
                why,
                "docs/reference/settings.md lists what [node.coordinator] may say",
            )
        })?;
        let from = self.coordinator.place();
        if from.is_same_store(&place) && self.coordinator.progress().is_none() {
            return Ok(said(format!("the records are in {place} already")));
        }
        let takes_back = from.is_same_store(&place);
        if !takes_back {
            self.check_leader().await?;
            let missing = self.cannot_use(&place).await?;
            if !missing.is_empty() && !force {
                return Err(Refusal::conflict(
                    format!("not every member can use {place}: {}", missing.join("; ")),
                    "nothing was changed; mend that, or leave those members behind with --force: they follow when they can",
                ));
            }
        }
        self.coordinator
            .move_to(place.clone())
            .await
            .map_err(|error| not_done(&place, error))?;
        let text = if takes_back {
            format!("the records stay in {place}; asked by {by}")
        } else {
            format!("the records moved from {from} to {place}; asked by {by}")
        };
        self.note_in_history("moved", &text).await;
        Ok(said(text))
    }

    /// A move needs a leader: its lease is what goes over to the new store.
    async fn check_leader(&self) -> Result<(), Refusal> {
        if self.read().await?.leader().is_some() {
            return Ok(());
        }
        Err(Refusal::conflict(
            "there is no leader, and a move needs one",
            "wait for the election, see craton explain; then ask again",
        ))
    }

    /// Which members cannot use `place`, and why.
    async fn cannot_use(&self, place: &Place) -> Result<Vec<String>, Refusal> {
        let view = self.read().await?;
        let own = me(self).map(|(member, _)| member);
        let mut asked = JoinSet::new();
        for (member, record) in &view.members {
            let (api, place, member) = (self.clone(), place.clone(), member.clone());
            let (address, is_own) = (record.value.api.clone(), own.as_ref() == Some(&member));
            asked.spawn(async move {
                let told = if is_own {
                    let probed = api.coordinator.probe(place.clone()).await;
                    probed.map_err(|e| cannot(&place, &e))
                } else {
                    let client = api.others.with_timeout(PROBE_TIMEOUT);
                    let request = ProbeRequest { place };
                    client
                        .post_json::<_, DoneView>(&address, "/v1/coordinator/probe", &request)
                        .await
                        .map(|_| ())
                        .map_err(|e| e.to_string())
                };
                told.err().map(|why| format!("{member}: {why}"))
            });
        }
        let mut missing: Vec<String> = asked.join_all().await.into_iter().flatten().collect();
        missing.sort();
        Ok(missing)
    }
}
