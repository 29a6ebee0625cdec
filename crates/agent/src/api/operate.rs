//! What an operator asks for beside a change of leadership: pause, schedule, restart, reinit, reload.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use craton_console::views::{AskRequest, DoneView, PauseRequest, ReinitRequest, RestartRequest};
use craton_core::MemberId;
use craton_core::observe::DataView;
use craton_core::records::{
    Change, ClusterView, Key, Leadership, MemberRef, Order, OrderKind, Pause, Record, RestartPlan,
    Schedule,
};

use super::{Api, Refusal, who};
use crate::clock;
use crate::views::rfc3339;

/// A switchover is scheduled at most this far ahead, milliseconds: 60 days.
const AHEAD_MAX_MS: u64 = 60 * 86_400_000;
/// The longest pause that ends by itself, milliseconds: 30 days.
const PAUSE_MAX_MS: u64 = 30 * 86_400_000;
/// The longest reason, in characters.
const REASON_MAX: usize = 200;

fn said(text: String) -> DoneView {
    DoneView { text, id: None }
}

pub(super) async fn pause(State(api): State<Api>, Json(body): Json<PauseRequest>) -> Response {
    if body.for_ms.is_some_and(|ms| ms == 0 || ms > PAUSE_MAX_MS) {
        return Refusal(
            StatusCode::UNPROCESSABLE_ENTITY,
            "a pause with an end lasts at most 30 days".into(),
            "leave --for out to pause until somebody resumes",
        )
        .answer();
    }
    let by = who(body.by);
    let reason = body.reason.map(|r| {
        let plain = r.chars().filter(|c| !c.is_control());
        plain.take(REASON_MAX).collect::<String>()
    });
    api.done(|view| {
        let now = clock::wall_ms();
        let until_ms = body.for_ms.map(|ms| now.saturating_add(ms));
        let pause = Pause {
            since_ms: now,
            until_ms,
            reason: reason.clone(),
            by: by.clone(),
        };
        let until = until_ms.map_or_else(|| "somebody resumes".to_owned(), rfc3339);
        let why = reason
            .as_ref()
            .map(|r| format!(": {r}"))
            .unwrap_or_default();
        let text = format!("paused by {by} until {until}{why}");
        let change = Change {
            expect: vec![(Key::Pause, view.revision_of(&Key::Pause))],
            puts: vec![
                Record::Pause(pause),
                api.noted(view, "paused", text.clone()),
            ],
            deletes: vec![],
        };
        Ok((change, said(text)))
    })
    .await
}

pub(super) async fn resume(State(api): State<Api>, Json(body): Json<AskRequest>) -> Response {
    let by = who(body.by);
    api.done(|view| {
        if view.pause.is_none() {
            return Err(Refusal::conflict(
                "the cluster is not paused",
                "see craton status",
            ));
        }
        let text = format!("resumed by {by}");
        let change = Change {
            expect: vec![(Key::Pause, view.revision_of(&Key::Pause))],
            puts: vec![api.noted(view, "resumed", text.clone())],
            deletes: vec![Key::Pause],
        };
        Ok((change, said(text)))
    })
    .await
}

pub(super) async fn schedule(api: &Api, at_ms: u64, to: Option<MemberId>, by: String) -> Response {
    api.done(|view| {
        let now = clock::wall_ms();
        if at_ms <= now || at_ms > now.saturating_add(AHEAD_MAX_MS) {
            return Err(Refusal(
                StatusCode::UNPROCESSABLE_ENTITY,
                format!("{} is not within the next 60 days", rfc3339(at_ms)),
                "name a time to come; craton switchover without --at begins at once",
            ));
        }
        if let Some(to) = to.as_ref().filter(|m| !view.members.contains_key(*m)) {
            return Err(no_member(to));
        }
        let schedule = Schedule {
            id: view.revision,
            at_ms,
            to: to.clone(),
            by: by.clone(),
        };
        let target = to.as_ref().map(|t| format!(" to {t}")).unwrap_or_default();
        let replaced = if view.schedule.is_some() {
            ", instead of the one before"
        } else {
            ""
        };
        let text = format!(
            "switchover{target} scheduled for {} by {by}{replaced}",
            rfc3339(at_ms)
        );
        let change = Change {
            expect: vec![(Key::Schedule, view.revision_of(&Key::Schedule))],
            puts: vec![
                Record::Schedule(schedule),
                api.noted(view, "scheduled", text.clone()),
            ],
            deletes: vec![],
        };
        Ok((change, said(text)))
    })
    .await
}

pub(super) async fn cancel_switchover(
    State(api): State<Api>,
    Json(body): Json<AskRequest>,
) -> Response {
    let by = who(body.by);
    api.done(|view| {
        if view.schedule.is_none() {
            return Err(Refusal::conflict(
                "no switchover is scheduled",
                "see craton status",
            ));
        }
        let text = format!("scheduled switchover cancelled by {by}");
        let change = Change {
            expect: vec![(Key::Schedule, view.revision_of(&Key::Schedule))],
            puts: vec![api.noted(view, "cancelled", text.clone())],
            deletes: vec![Key::Schedule],
        };
        Ok((change, said(text)))
    })
    .await
}

fn no_member(member: &MemberId) -> Refusal {
    Refusal(
        StatusCode::NOT_FOUND,
        format!("there is no member {member}"),
        "see craton status for the members",
    )
}

/// The leadership, if somebody leads and is open for clients.
fn open_leadership(view: &ClusterView) -> Result<(&Leadership, &MemberRef), Refusal> {
    let leadership = view.leadership.as_ref().map(|l| &l.value);
    leadership
        .filter(|l| l.open)
        .and_then(|l| Some((l, l.leader.as_ref()?)))
        .ok_or_else(|| {
            Refusal::conflict(
                "nobody is open for clients now",
                "wait for the election to end; see craton explain",
            )
        })
}

/// True if there is a database in the member's data directory, whosever it is.
fn has_database(api: &Api, member: &MemberId) -> bool {
    let Some(seen) = api.seen.borrow().clone() else {
        return false;
    };
    let o = &seen.0;
    if *member == o.me.id {
        return matches!(o.data, DataView::Present { .. });
    }
    let peer = o.peers.get(member);
    peer.is_some_and(|p| p.status.checkpoint_timeline.is_some())
}

/// The member itself says another life of its data directory than the one on record, if it was heard.
fn says_another_life(
    api: &Api,
    member: &MemberId,
    recorded: Option<craton_core::Incarnation>,
) -> bool {
    let Some(seen) = api.seen.borrow().clone() else {
        return false;
    };
    let o = &seen.0;
    if *member == o.me.id {
        return o.me.incarnation != recorded;
    }
    let peer = o.peers.get(member);
    peer.is_some_and(|p| p.status.incarnation != recorded)
}

/// What this agent last heard of a member: the life of its PostgreSQL, and whether anything waits for a restart.
fn heard(api: &Api, member: &MemberId) -> Option<(Option<u64>, bool)> {
    let seen = api.seen.borrow().clone()?;
    let o = &seen.0;
    if *member == o.me.id {
        return Some((o.process, !o.pending.is_empty()));
    }
    let peer = o.peers.get(member)?;
    let ttl = o
        .view
        .as_ref()
        .map_or_else(|| o.initial_settings.ttl(), |v| v.settings().ttl());
    (clock::now().since(peer.heard_at) < ttl.saturating_mul(2))
        .then_some((peer.status.process, !peer.status.pending_restart.is_empty()))
}

pub(super) async fn restart(State(api): State<Api>, Json(body): Json<RestartRequest>) -> Response {
    let by = who(body.by.clone());
    api.done(|view| {
        if let Some(plan) = &view.restart {
            return Err(Refusal::conflict(
                format!("a restart asked by {} is in progress", plan.value.by),
                "wait for it, or stop it with craton restart --cancel",
            ));
        }
        open_leadership(view)?;
        if let Some(stranger) = body.members.iter().find(|m| !view.members.contains_key(*m)) {
            return Err(no_member(stranger));
        }
        let mut plan = RestartPlan {
            id: view.revision,
            members: std::collections::BTreeMap::new(),
            by: by.clone(),
        };
        let named = |m: &&MemberId| body.members.is_empty() || body.members.contains(m);
        for member in view.members.keys().filter(named) {
            let Some((process, pending)) = heard(&api, member) else {
                return Err(Refusal::conflict(
                    format!("the agent of {member} is silent: it cannot be told to restart"),
                    "bring its host back first, or name the other members",
                ));
            };
            if pending || !body.pending {
                plan.members.insert(member.clone(), process);
            }
        }
        if plan.members.is_empty() {
            let nothing = said("nothing waits for a restart".into());
            return Ok((Change::default(), nothing));
        }
        let names: Vec<&str> = plan.members.keys().map(MemberId::as_str).collect();
        let text = format!("restart {} of {} asked by {by}", plan.id, names.join(", "));
        let done = DoneView {
            text: text.clone(),
            id: Some(plan.id),
        };
        let change = Change {
            expect: vec![
                (Key::Restart, 0),
                (Key::Leadership, view.revision_of(&Key::Leadership)),
            ],
            puts: vec![Record::Restart(plan), api.noted(view, "restart", text)],
            deletes: vec![],
        };
        Ok((change, done))
    })
    .await
}

/// Nobody further is restarted; a member that stopped already starts again all the same.
pub(super) async fn cancel_restart(
    State(api): State<Api>,
    Json(body): Json<AskRequest>,
) -> Response {
    let by = who(body.by);
    api.done(|view| {
        let Some(plan) = view.restart.as_ref().map(|r| &r.value) else {
            return Err(Refusal::conflict(
                "no restart is in progress",
                "see craton status",
            ));
        };
        let text = format!("restart {} asked by {} cancelled by {by}", plan.id, plan.by);
        let change = Change {
            expect: vec![(Key::Restart, view.revision_of(&Key::Restart))],
            puts: vec![api.noted(view, "cancelled", text.clone())],
            deletes: vec![Key::Restart],
        };
        Ok((change, said(text)))
    })
    .await
}

pub(super) async fn reinit(State(api): State<Api>, Json(body): Json<ReinitRequest>) -> Response {
    let by = who(body.by);
    let member = body.member;
    api.done(|view| {
        let record = view
            .members
            .get(&member)
            .ok_or_else(|| no_member(&member))?;
        let (l, leader) = open_leadership(view)?;
        if leader.member == member {
            return Err(Refusal::conflict(
                format!("{member} leads: its data directory is the cluster's database"),
                "hand over first: craton switchover",
            ));
        }
        if heard(&api, &member).is_none() {
            return Err(Refusal::conflict(
                format!("the agent of {member} is silent: it cannot be told to begin anew"),
                "bring its host back first",
            ));
        }
        let incarnation = record.value.incarnation;
        if says_another_life(&api, &member, incarnation) {
            return Err(Refusal::conflict(
                format!("{member} begins another life of its data directory at this moment"),
                "see craton status, and ask again",
            ));
        }
        // A database without a life is one that Craton did not make.
        if incarnation.is_none() && !has_database(&api, &member) {
            return Err(Refusal::conflict(
                format!("{member} has no data directory yet"),
                "it is being cloned; see craton explain",
            ));
        }
        if let Some(order) = view.orders.get(&member) {
            return Err(Refusal::conflict(
                format!("{member} has an order from {} already", order.value.by),
                "wait until it is done; see craton status",
            ));
        }
        if let Some(incarnation) = incarnation {
            needed(l, &member, incarnation)?;
        }
        let order = Order {
            id: view.revision,
            kind: OrderKind::Reinit,
            process: None,
            incarnation,
            by: by.clone(),
        };
        let text = format!("reinit of {member} asked by {by}");
        let done = DoneView {
            text: text.clone(),
            id: Some(order.id),
        };
        let key = Key::Order(member.clone());
        let change = Change {
            expect: vec![
                (key, 0),
                (Key::Leadership, view.revision_of(&Key::Leadership)),
            ],
            // The leadership, unchanged: a change of the sync set that the leader decided on without
            // knowing of this order, and that is still on its way, must not come after it.
            puts: vec![
                Record::Order(member.clone(), order),
                Record::Leadership(l.clone()),
                api.noted(view, "reinit", text),
            ],
            deletes: vec![],
        };
        Ok((change, done))
    })
    .await
}

/// Refused if V less this member would be fewer than k: acknowledged commits may have no other copy.
fn needed(
    l: &Leadership,
    member: &MemberId,
    incarnation: craton_core::Incarnation,
) -> Result<(), Refusal> {
    if !l.sync.holds(member, incarnation) {
        return Ok(());
    }
    let left = l.sync.members.len().saturating_sub(1);
    if left >= l.sync.k as usize {
        return Ok(());
    }
    Err(Refusal::conflict(
        format!(
            "the copy on {member} is needed: commits are flushed on {}, and without it only {left} would be left",
            l.sync
        ),
        "bring another standby into the sync set first (see craton status), or lower sync_standbys",
    ))
}

/// This member's PostgreSQL reads its configuration anew.
pub(super) async fn reload(State(api): State<Api>, Json(body): Json<AskRequest>) -> Response {
    let me = api.seen.borrow().as_ref().map(|s| s.0.me.id.clone());
    let name = me.as_ref().map_or("this member", MemberId::as_str);
    let Some(process) = api.server.process() else {
        return Refusal::conflict(
            format!("PostgreSQL is not running on {name}"),
            "see craton explain",
        )
        .answer();
    };
    // The files first, as the settings have them: somebody may have edited them.
    api.server.parameters.forget_written();
    match process.reload() {
        Ok(()) => {
            api.server.parameters.look_soon();
            let text = format!("{name} reads its configuration anew");
            tracing::info!(by = who(body.by), "reload");
            Json(said(text)).into_response()
        }
        Err(error) => Refusal(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("{name}: {error}"),
            "see craton explain",
        )
        .answer(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use craton_core::settings::Durability;
    use craton_core::sync::SyncSet;
    use craton_core::{Incarnation, Term, TimelineId};

    #[test]
    fn a_copy_that_commits_rest_on_is_not_thrown_away() {
        let id = |n: &str| MemberId::new(n).unwrap();
        let leadership = |k: u32, names: &[&str]| Leadership {
            term: Term(1),
            leader: Some(MemberRef {
                member: id("a"),
                incarnation: Incarnation(1),
            }),
            previous: None,
            sync: SyncSet {
                members: names.iter().map(|n| (id(n), Incarnation(1))).collect(),
                k,
            },
            durability: Durability::Quorum,
            timeline: TimelineId(1),
            open: true,
            restarted: false,
            preferred: None,
            allow_data_loss: false,
            recovered: false,
            cause: String::new(),
        };
        let ok = |k, names: &[&str], member: &str, life| {
            needed(&leadership(k, names), &id(member), Incarnation(life)).is_ok()
        };
        assert!(ok(1, &["b", "c"], "b", 1));
        assert!(!ok(1, &["b"], "b", 1), "the only one");
        assert!(!ok(2, &["b", "c"], "c", 1), "both are needed");
        assert!(ok(1, &["b"], "c", 1), "not in V");
        assert!(ok(1, &["b"], "b", 2), "another life than the one in V");
        assert!(ok(0, &[], "b", 1));
    }
}
