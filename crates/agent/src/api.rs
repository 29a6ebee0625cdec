//! The control API: `/v1/…` on the agent's port, for holders of certificates with a fitting role, or of the token.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use craton_console::Client;
use craton_console::server::{failure, stream_topology};
use craton_console::views::{ChangeView, DoneView, FailoverRequest, SwitchoverRequest};
use craton_coordinator::api::{Coordinator, CoordinatorError, TxnOutcome};
use craton_core::decide::refusal_of;
use craton_core::promise::{Ask, known_term};
use craton_core::records::{
    Change, ClusterView, Event, Key, Record, Request, RequestKind, RequestPhase,
};
use craton_core::topology::Topology;
use craton_core::{MemberId, Term};
use tokio::sync::watch;

use crate::act::Actor;
use crate::agent::Seen;
use crate::clock;
use crate::members;
use crate::server::LocalServer;
use crate::store;
use crate::views;

mod config;
pub mod coordinator;
mod guarantees;
mod operate;

/// A change of leadership that takes longer is reported as still going on.
const CHANGE_MAX: Duration = Duration::from_secs(60);

/// What the handlers work with.
#[derive(Clone)]
pub struct Api {
    /// The newest observation.
    pub seen: watch::Receiver<Option<Seen>>,
    /// The topology.
    pub topology: watch::Receiver<Arc<Topology>>,
    /// The coordinator.
    pub coordinator: Arc<dyn Coordinator>,
    /// PostgreSQL.
    pub server: Arc<LocalServer>,
    /// Where the settings of `craton.toml` were written, by their names in `[node]`.
    pub origins: Arc<BTreeMap<String, String>>,
    /// Who promises.
    pub actor: Arc<Actor>,
    /// A client for the other members' control APIs.
    pub others: Client,
}

/// The routes.
pub fn routes(api: Api) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/explain", get(explain))
        .route("/v1/history", get(history))
        .route("/v1/divergence", get(divergence))
        .route("/v1/topology", get(topology))
        .route("/v1/topology/stream", get(stream))
        .route("/v1/switchover", post(switchover))
        .route("/v1/failover", post(failover))
        .route("/v1/config", get(config::show).post(config::change))
        .route("/v1/pause", post(operate::pause))
        .route("/v1/resume", post(operate::resume))
        .route("/v1/switchover/cancel", post(operate::cancel_switchover))
        .route("/v1/restart", post(operate::restart))
        .route("/v1/restart/cancel", post(operate::cancel_restart))
        .route("/v1/reinit", post(operate::reinit))
        .route("/v1/reload", post(operate::reload))
        .route("/v1/guarantees", get(guarantees::show))
        .route("/v1/promise", post(promise))
        .route("/v1/coordinator", get(coordinator::show))
        .route("/v1/coordinator/probe", post(coordinator::probe))
        .route("/v1/coordinator/move", post(coordinator::relocate))
        .route("/v1/coordinator/rebuild", post(coordinator::rebuild))
        .with_state(api)
}

fn starting() -> Response {
    failure(
        StatusCode::SERVICE_UNAVAILABLE,
        "the agent is starting",
        Some("ask again in a second"),
    )
}

impl Api {
    fn answer<T: serde::Serialize>(&self, make: impl FnOnce(&Seen) -> T) -> Response {
        match self.seen.borrow().as_ref() {
            Some(seen) => Json(make(seen)).into_response(),
            None => starting(),
        }
    }
}

async fn status(State(api): State<Api>) -> Response {
    let place = api.coordinator.place();
    let warning = coordinator::warning(&api);
    api.answer(|seen| {
        let mut status = views::status(&seen.0, &seen.1);
        if let Some(view) = &seen.0.view {
            status.witnesses = members::witnesses(api.coordinator.as_ref(), view);
        }
        status.voters = members::voters(&api.coordinator);
        views::count_voters(&mut status);
        let silent = status.witnesses.iter().filter(|w| !w.alive);
        let silent = silent.map(|w| format!("the witness {} has not been heard of", w.name));
        status.warnings.extend(silent);
        status.coordinator = place.to_string();
        status.warnings.extend(warning);
        status
    })
}

async fn explain(State(api): State<Api>) -> Response {
    let warning = coordinator::warning(&api);
    api.answer(|seen| {
        let mut view = views::explain(&seen.0, &seen.1);
        view.waiting_for.extend(warning);
        view
    })
}

async fn history(State(api): State<Api>) -> Response {
    api.answer(|seen| views::history(&seen.0))
}

/// What this member kept of WAL that the cluster does not have.
async fn divergence(State(api): State<Api>) -> Response {
    let member = api.seen.borrow().as_ref().map(|seen| seen.0.me.id.clone());
    let Some(member) = member else {
        return starting();
    };
    match api.server.instance.divergences().await {
        Ok(kept) => Json(views::DivergenceView {
            member,
            directory: api.server.instance.divergence_dir(),
            kept,
        })
        .into_response(),
        Err(error) => failure(
            StatusCode::INTERNAL_SERVER_ERROR,
            &error.to_string(),
            Some("look at the member's directory divergence/"),
        ),
    }
}

async fn topology(State(api): State<Api>) -> Response {
    let newest = Arc::clone(&api.topology.borrow());
    Json(newest.as_ref()).into_response()
}

async fn stream(State(api): State<Api>) -> Response {
    stream_topology(api.topology.clone())
}

/// The leader cannot renew its lease and asks this member not to elect anybody (2.7). Answered from what is known
/// here: the coordinator may be away.
async fn promise(State(api): State<Api>, Json(ask): Json<Ask>) -> Response {
    let snapshot = Arc::clone(&api.coordinator.watch().borrow());
    let known = match store::view(&snapshot) {
        Ok(view) => known_term(&view),
        Err(error) => return failure(StatusCode::CONFLICT, &error.to_string(), None),
    };
    // Not cut off by a leader that hangs up.
    let told = tokio::spawn(async move { api.actor.promise(&ask, known).await }).await;
    match told {
        Ok(told) => Json(told).into_response(),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string(), None),
    }
}

async fn switchover(State(api): State<Api>, Json(body): Json<SwitchoverRequest>) -> Response {
    if let Some(at_ms) = body.at_ms {
        return operate::schedule(&api, at_ms, body.to, who(body.by)).await;
    }
    let wish = Wish {
        kind: RequestKind::Switchover,
        to: body.to,
        allow_data_loss: false,
        by: who(body.by),
    };
    change(&api, wish).await
}

async fn failover(State(api): State<Api>, Json(body): Json<FailoverRequest>) -> Response {
    let wish = Wish {
        kind: RequestKind::Failover,
        to: body.to,
        allow_data_loss: body.allow_data_loss,
        by: who(body.by),
    };
    change(&api, wish).await
}

/// The longest name of somebody who asks, in characters: it goes into the history.
const WHO_MAX: usize = 100;

fn who(by: Option<String>) -> String {
    let name: String = by
        .unwrap_or_default()
        .chars()
        .filter(|c| !c.is_control())
        .take(WHO_MAX)
        .collect();
    if name.is_empty() {
        "the operator".into()
    } else {
        name
    }
}

/// A refusal with its HTTP status.
struct Refusal(StatusCode, String, &'static str);

impl Refusal {
    fn unavailable(error: &dyn std::fmt::Display) -> Self {
        Self(
            StatusCode::SERVICE_UNAVAILABLE,
            error.to_string(),
            "a majority of the voters must run, or the etcd with the records; see craton status",
        )
    }

    /// A change that was not written, or of which nobody knows: only the first may be asked of another member.
    fn not_written(error: &CoordinatorError) -> Self {
        match error {
            CoordinatorError::Unknown(_) => Self(
                StatusCode::GATEWAY_TIMEOUT,
                error.to_string(),
                "it may be done all the same; see craton status and craton history",
            ),
            other => Self::unavailable(other),
        }
    }

    fn conflict(error: impl Into<String>, hint: &'static str) -> Self {
        Self(StatusCode::CONFLICT, error.into(), hint)
    }

    fn answer(self) -> Response {
        let Self(status, error, hint) = self;
        failure(status, &error, Some(hint))
    }
}

/// What somebody asks of the leadership.
struct Wish {
    kind: RequestKind,
    to: Option<MemberId>,
    allow_data_loss: bool,
    by: String,
}

/// When somebody asked.
#[derive(Clone, Copy)]
struct AskedIn {
    /// The request's own number.
    id: u64,
    /// The revision at which it was written.
    revision: u64,
    term: Term,
    /// An election was open: it is this very term that gets a leader.
    electing: bool,
}

impl AskedIn {
    /// A leader of `term` is what was asked for.
    fn is_answered_by(self, term: Term) -> bool {
        term > self.term || self.electing && term == self.term
    }
}

/// So often a change is tried that loses its race against the agents' own: every event of the history is one.
const RACES_MAX: usize = 20;
/// After a race that was lost. The writer who won it is rarely at once back.
const RACE_PAUSE: Duration = Duration::from_millis(10);
/// For so long the answer to a change waits until this agent has seen the change itself.
const SEEN_MAX: Duration = Duration::from_secs(2);

impl Api {
    async fn read(&self) -> Result<ClusterView, Refusal> {
        let snapshot = self
            .coordinator
            .read()
            .await
            .map_err(|e| Refusal::unavailable(&e))?;
        let mut view = store::view(&snapshot).map_err(|e| Refusal::unavailable(&e))?;
        members::leave_out_removed(self.coordinator.as_ref(), &mut view);
        Ok(view)
    }

    /// Reads the store, makes a change of it, submits that; again if it lost a race. Returns the revision made.
    async fn transact<T>(
        &self,
        make: impl Fn(&ClusterView) -> Result<(Change, T), Refusal>,
    ) -> Result<(u64, T), Refusal> {
        for _ in 0..RACES_MAX {
            let view = self.read().await?;
            let (change, value) = make(&view)?;
            if change.puts.is_empty() && change.deletes.is_empty() {
                return Ok((0, value));
            }
            let txn =
                store::txn(&change.keeping_history(&view)).map_err(|e| Refusal::unavailable(&e))?;
            let outcome = self.coordinator.txn(txn).await;
            match outcome.map_err(|e| Refusal::not_written(&e))? {
                TxnOutcome::Committed(revision) => {
                    self.until_seen(revision).await;
                    return Ok((revision, value));
                }
                TxnOutcome::Conflict => tokio::time::sleep(RACE_PAUSE).await,
            }
        }
        Err(Refusal::conflict(
            "the cluster's state changed again and again at this very moment",
            "look at craton status and ask again",
        ))
    }

    /// Waits until this agent acts by what was written: who is told that it is done finds it so in `craton status`.
    async fn until_seen(&self, revision: u64) {
        let mut seen = self.seen.clone();
        let met = seen.wait_for(|s| {
            let view = s.as_ref().and_then(|s| s.0.view.as_ref());
            view.is_some_and(|v| v.revision >= revision)
        });
        // It is written in any case; an agent that is too slow to see it in time is only late.
        let _ = tokio::time::timeout(SEEN_MAX, met).await;
    }

    /// Waits until this agent shows the leader of `term`, or a later one, as serving: who is told that it leads finds it so
    /// in `craton status`.
    async fn until_shown(&self, term: Term) {
        let mut seen = self.seen.clone();
        let met = seen.wait_for(|s| {
            s.as_ref().is_some_and(|s| {
                let shown = views::status(&s.0, &s.1);
                shown.term >= term && shown.writable
            })
        });
        // It leads in any case; an agent that is too slow to hear so is only late.
        let _ = tokio::time::timeout(SEEN_MAX, met).await;
    }

    /// As [`Self::transact`], for requests that are answered with a sentence.
    async fn done(
        &self,
        make: impl Fn(&ClusterView) -> Result<(Change, DoneView), Refusal>,
    ) -> Response {
        match self.transact(make).await {
            Ok((_, view)) => Json(view).into_response(),
            Err(refusal) => refusal.answer(),
        }
    }

    /// The history with one more line, written by this member.
    fn noted(&self, view: &ClusterView, kind: &str, text: String) -> Record {
        let me = self.seen.borrow().as_ref().map(|s| s.0.me.id.clone());
        let known = view.history.as_ref().map(|h| h.value.clone());
        let known = known.unwrap_or_default();
        let Some(member) = me else {
            return Record::History(known);
        };
        Record::History(known.with(Event {
            at_ms: clock::wall_ms(),
            term: view.leadership.as_ref().map_or(Term(0), |l| l.value.term),
            member,
            kind: kind.to_owned(),
            text,
        }))
    }
}

async fn change(api: &Api, wish: Wish) -> Response {
    let began = clock::now();
    match ask(api, wish).await {
        Ok(asked) => match outcome(api, asked).await {
            Ok((leader, term)) => {
                let took = clock::now().since(began);
                api.until_shown(term).await;
                Json(ChangeView {
                    text: format!("{leader} leads term {term}"),
                    leader,
                    term,
                    took_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
                })
                .into_response()
            }
            Err(refusal) => refusal.answer(),
        },
        Err(refusal) => refusal.answer(),
    }
}

/// Writes the request; returns the term that it is to end. The leader's own changes (who counts for commits) come in
/// between all the time; only another leadership than the one that was meant is none of the operator's wish.
async fn ask(api: &Api, wish: Wish) -> Result<AskedIn, Refusal> {
    let mut meant = None;
    for _ in 0..RACES_MAX {
        let view = api.read().await?;
        let Some(l) = view.leadership.as_ref().map(|l| &l.value) else {
            return Err(Refusal::conflict(
                "the cluster is still being made",
                "wait for the first leader",
            ));
        };
        let seen = (l.term, l.leader.clone());
        if *meant.get_or_insert_with(|| seen.clone()) != seen {
            break;
        }
        check(&view, wish.kind, wish.to.as_ref(), wish.allow_data_loss)?;
        let request = Request {
            id: view.revision,
            kind: wish.kind,
            term: l.term,
            to: wish.to.clone(),
            allow_data_loss: wish.allow_data_loss,
            phase: RequestPhase::Asked,
            by: wish.by.clone(),
            why: None,
        };
        let id = request.id;
        let change = Change {
            expect: vec![
                (Key::Request, view.revision_of(&Key::Request)),
                (Key::Leadership, view.revision_of(&Key::Leadership)),
            ],
            puts: vec![Record::Request(request)],
            deletes: vec![],
        };
        let txn = store::txn(&change).map_err(|e| Refusal::unavailable(&e))?;
        let outcome = api.coordinator.txn(txn).await;
        match outcome.map_err(|e| Refusal::not_written(&e))? {
            TxnOutcome::Committed(revision) => {
                return Ok(AskedIn {
                    id,
                    revision,
                    term: l.term,
                    electing: l.leader.is_none(),
                });
            }
            TxnOutcome::Conflict => tokio::time::sleep(RACE_PAUSE).await,
        }
    }
    Err(Refusal::conflict(
        "the leadership changed at this very moment",
        "look at craton status and ask again",
    ))
}

fn check(
    view: &ClusterView,
    kind: RequestKind,
    to: Option<&MemberId>,
    allow_data_loss: bool,
) -> Result<(), Refusal> {
    if let Some(request) = view.request.as_ref().map(|r| &r.value)
        && view
            .leadership
            .as_ref()
            .is_some_and(|l| l.value.term == request.term)
        // In a stuck election this is the only way out, whatever was asked before.
        && !(allow_data_loss && !request.allow_data_loss && view.leader().is_none())
    {
        return Err(Refusal(
            StatusCode::CONFLICT,
            format!("a {:?} is in progress already", request.kind).to_lowercase(),
            "wait for it to end; see craton status",
        ));
    }
    if let Some(to) = to.filter(|m| !view.members.contains_key(*m)) {
        return Err(Refusal(
            StatusCode::NOT_FOUND,
            format!("there is no member {to}"),
            "see craton status for the members",
        ));
    }
    let leader = view.leader();
    if kind == RequestKind::Switchover && leader.is_none() {
        return Err(Refusal(
            StatusCode::CONFLICT,
            "there is no leader to hand over".into(),
            "an election is open; see craton explain, or use craton failover",
        ));
    }
    if to.is_some() && leader.map(|l| &l.member) == to {
        return Err(Refusal(
            StatusCode::CONFLICT,
            format!("{} leads already", to.map_or("it", MemberId::as_str)),
            "name another member, or none",
        ));
    }
    Ok(())
}

/// Waits until another term is open, or the request was refused.
async fn outcome(api: &Api, asked: AskedIn) -> Result<(MemberId, Term), Refusal> {
    let mut store_watch = api.coordinator.watch();
    let deadline = clock::now().after(CHANGE_MAX);
    loop {
        let snapshot = Arc::clone(&store_watch.borrow_and_update());
        if let Ok(view) = store::view(&snapshot) {
            if let Some(l) = view.leadership.as_ref().map(|l| &l.value)
                && asked.is_answered_by(l.term)
                && l.open
                && let Some(leader) = &l.leader
            {
                return Ok((leader.member.clone(), l.term));
            }
            if let Some(why) = refused(&view, asked) {
                return Err(Refusal(
                    StatusCode::CONFLICT,
                    why,
                    "nothing was changed; see craton status",
                ));
            }
        }
        let left = deadline.since(clock::now());
        if left.is_zero() {
            return Err(Refusal(
                StatusCode::GATEWAY_TIMEOUT,
                format!(
                    "no new leader within {} s; the request stands",
                    CHANGE_MAX.as_secs()
                ),
                "see craton explain for what is missing",
            ));
        }
        let _ =
            tokio::time::timeout(left.min(Duration::from_millis(500)), store_watch.changed()).await;
    }
}

/// Why the leader refused this very request. What is known here may be of before it was asked.
fn refused(view: &ClusterView, asked: AskedIn) -> Option<String> {
    let term = view.leadership.as_ref().map(|l| l.value.term);
    if view.revision < asked.revision
        || view.request.is_some()
        || term.is_some_and(|term| term != asked.term)
    {
        return None;
    }
    let its = refusal_of(asked.id);
    let events = &view.history.as_ref()?.value.0;
    events
        .iter()
        .rev()
        .find(|e| e.kind == "refused" && e.term == asked.term && e.text.starts_with(&its))
        .map(|e| e.text.clone())
}

#[cfg(test)]
mod tests {
    use craton_core::records::{At, History};

    use super::*;

    #[test]
    fn a_stuck_election_is_answered_in_its_own_term() {
        let asked = |electing| AskedIn {
            id: 7,
            revision: 8,
            term: Term(5),
            electing,
        };
        assert!(asked(true).is_answered_by(Term(5)), "it gets its leader");
        assert!(
            !asked(false).is_answered_by(Term(5)),
            "the leader that is to go"
        );
        assert!(asked(true).is_answered_by(Term(6)) && asked(false).is_answered_by(Term(6)));
    }

    #[test]
    fn only_the_refusal_of_this_very_request_counts() {
        let line = |id: u64| Event {
            at_ms: 0,
            term: Term(5),
            member: MemberId::new("a").unwrap(),
            kind: "refused".into(),
            text: format!("{}ann refused: it has no room", refusal_of(id)),
        };
        let view = |revision, lines: &[u64]| ClusterView {
            revision,
            history: Some(At {
                revision,
                value: History(lines.iter().map(|id| line(*id)).collect()),
            }),
            ..ClusterView::default()
        };
        let asked = AskedIn {
            id: 12,
            revision: 13,
            term: Term(5),
            electing: false,
        };
        let before = refused(&view(12, &[12]), asked);
        assert_eq!(before, None, "what is known is of before it was asked");
        assert_eq!(refused(&view(14, &[7, 1]), asked), None, "others");
        let why = refused(&view(14, &[7, 12, 1]), asked);
        assert_eq!(why, Some(line(12).text));
    }
}
