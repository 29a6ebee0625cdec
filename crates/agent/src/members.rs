//! Members that come and go: joining, getting a say, and being taken out in the order that loses nothing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use craton_console::Client;
use craton_console::server::{Visitor, failure};
use craton_console::views::{
    JoinRequest, JoinView, MemberRequest, MembersView, PlaceView, WitnessView,
};
use craton_coordinator::api::{
    Coordinator, CoordinatorError, MembersError, Membership, Txn, TxnOutcome,
};
use craton_coordinator::raft::{Change as MembersChange, Configuration};
use craton_core::MemberId;
use craton_core::records::{At, Change, ClusterView, Event, Key, MemberRecord, Record};
use craton_trust::Role;

use crate::clock;
use crate::config::VoterWish;
use crate::{receivers, store};

/// How long one member that is asked to take another in may take.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Between two rounds of asking.
const JOIN_PAUSE: Duration = Duration::from_secs(1);

/// How long a member that is being removed may take to leave the sync set.
const LEAVE_MAX: Duration = Duration::from_secs(30);

/// A witness that was not heard for so long is silent; it says that it is there twice a second.
const WITNESS_SILENT: Duration = Duration::from_secs(3);

/// The history's word for a member that was taken out.
const REMOVED: &str = "removed";

/// How often a member without a say looks whether it should have one.
const SAY_INTERVAL: Duration = Duration::from_secs(2);

/// A lost race with another writer is tried again this often.
const TRIES_MAX: usize = 20;

/// Asks the members at these addresses, one after the other and for as long as it takes, to take this one in.
/// Returns the others' coordinators. Only another cluster's name ends it.
pub async fn join(
    at: &[String],
    client: Client,
    request: &JoinRequest,
    cluster: &str,
) -> Result<Vec<(MemberId, String)>, String> {
    let client = client.with_timeout(JOIN_TIMEOUT);
    let mut last = String::new();
    loop {
        for address in at {
            let answer = client
                .post_json::<_, JoinView>(address, "/v1/members/join", request)
                .await;
            match answer {
                Ok(view) if view.cluster != cluster => {
                    return Err(format!(
                        "{address} belongs to cluster \"{}\", this member to \"{cluster}\"",
                        view.cluster
                    ));
                }
                Ok(view) => {
                    let place = |p: PlaceView| Some((p.member, p.address?));
                    let others = view.peers.into_iter().filter_map(place);
                    return Ok(others.filter(|(m, _)| *m != request.member).collect());
                }
                Err(error) if error.to_string() != last => {
                    last = error.to_string();
                    tracing::warn!(address, error = last, "not taken in yet; asking on");
                }
                Err(_) => {}
            }
        }
        tokio::time::sleep(JOIN_PAUSE).await;
    }
}

/// Sees to it that a member that joined gets its say, where it should have one.
pub async fn keep_say(coordinator: Arc<dyn Coordinator>, me: MemberId, wish: VoterWish) {
    loop {
        tokio::time::sleep(SAY_INTERVAL).await;
        let Some(members) = coordinator.membership() else {
            return;
        };
        forget_removed(&coordinator).await;
        let config = members.members();
        if !should_vote(&config, &me, wish) {
            continue;
        }
        let promote = MembersChange::Promote {
            member: me.clone(),
            below: (wish == VoterWish::Auto).then(|| enough(&config)),
        };
        match members.change(promote).await {
            Ok(()) => tracing::info!("this member is a voter of the coordinator now"),
            Err(error) => tracing::debug!(%error, "this member is no voter yet"),
        }
    }
}

/// Those that an operator took out, and that are not back. Such a member cannot change the members' own store any
/// more, but an etcd: for the seconds until its agent hears of it, it may register itself there anew.
fn taken_out(coordinator: &dyn Coordinator, view: &ClusterView) -> BTreeSet<MemberId> {
    let (Some(members), Some(history)) = (coordinator.membership(), &view.history) else {
        return BTreeSet::new();
    };
    // Who was lost, and given up by `craton recover`, has no such line: what is known of it is still of use.
    let asked = history.value.0.iter().filter(|e| e.kind == REMOVED);
    let asked: BTreeSet<&MemberId> = asked.map(|e| &e.member).collect();
    let mut removed = members.members().removed;
    removed.retain(|m| asked.contains(m));
    removed
}

/// Takes those out of a view that were removed, whatever they have written since.
pub fn leave_out_removed(coordinator: &dyn Coordinator, view: &mut ClusterView) {
    let removed = taken_out(coordinator, view);
    view.members.retain(|member, _| !removed.contains(member));
}

/// Deletes what removed members have written since.
async fn forget_removed(coordinator: &Arc<dyn Coordinator>) {
    let snapshot = Arc::clone(&coordinator.watch().borrow());
    let Ok(seen) = store::view(&snapshot) else {
        return;
    };
    let removed = taken_out(coordinator.as_ref(), &seen);
    for member in removed.iter().filter(|m| seen.members.contains_key(*m)) {
        let key = Key::Member(member.clone());
        let deleted = update(coordinator, |view| {
            let revision = view.revision_of(&key);
            (revision > 0).then(|| Change {
                expect: vec![(key.clone(), revision)],
                puts: vec![],
                deletes: vec![key.clone()],
            })
        });
        match deleted.await {
            Ok(()) => {
                tracing::info!(%member, "what a removed member had written anew is deleted");
            }
            Err(Refusal(_, why, _)) => tracing::debug!(%member, why, "its record stays for now"),
        }
    }
}

/// How many voters are enough: an even number survives no more losses than one less, and needs one more for a
/// majority.
fn enough(config: &Configuration) -> usize {
    let all = config.voters.len() + config.learners.len();
    if all.is_multiple_of(2) { all - 1 } else { all }
}

/// Whether a member asks for a say.
pub fn should_vote(config: &Configuration, me: &MemberId, wish: VoterWish) -> bool {
    if !config.learners.contains(me) {
        return false;
    }
    match wish {
        VoterWish::Never => false,
        VoterWish::Always => true,
        VoterWish::Auto => config.voters.len() < enough(config),
    }
}

type Api = Arc<dyn Coordinator>;

/// The routes under `/v1/members`.
pub fn routes(coordinator: Arc<dyn Coordinator>) -> Router {
    Router::new()
        .route("/v1/members", get(list))
        .route("/v1/members/join", post(take_in))
        .route("/v1/members/remove", post(remove))
        .route("/v1/members/promote", post(promote))
        .route("/v1/members/demote", post(demote))
        .with_state(coordinator)
}

pub(crate) struct Refusal(StatusCode, String, String);

impl Refusal {
    /// The reason.
    pub(crate) fn why(&self) -> &str {
        &self.1
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        failure(self.0, &self.1, Some(&self.2))
    }
}

pub(crate) fn refused(what: impl Into<String>, hint: impl Into<String>) -> Refusal {
    Refusal(StatusCode::CONFLICT, what.into(), hint.into())
}

fn unavailable(error: &dyn std::fmt::Display) -> Refusal {
    Refusal(
        StatusCode::SERVICE_UNAVAILABLE,
        error.to_string(),
        "a majority of the voters must run; see craton member list".into(),
    )
}

/// What was not written, or of which nobody knows: only the first may be asked of another agent.
fn not_written(error: &CoordinatorError) -> Refusal {
    match error {
        CoordinatorError::Unknown(_) => Refusal(
            StatusCode::GATEWAY_TIMEOUT,
            error.to_string(),
            "it may be done all the same; see craton member list".into(),
        ),
        other => unavailable(other),
    }
}

fn not_changed(error: &MembersError) -> Refusal {
    match error {
        MembersError::Coordinator(error) => not_written(error),
        MembersError::Refused(why) => refused(why.clone(), "see craton member list"),
    }
}

fn membership(api: &Api) -> Result<&dyn Membership, Refusal> {
    api.membership().ok_or_else(|| {
        refused(
            "the members of this coordinator are not Craton's to change",
            "use its own commands",
        )
    })
}

pub(crate) async fn view(api: &Api) -> Result<ClusterView, Refusal> {
    let snapshot = api.read().await.map_err(|e| unavailable(&e))?;
    store::view(&snapshot).map_err(|e| unavailable(&e))
}

fn places(api: &Api, members: &dyn Membership, view: &ClusterView) -> MembersView {
    let config = members.members();
    let presence = Arc::clone(&api.presence().borrow());
    let now = clock::now();
    let mut places: Vec<PlaceView> = config
        .members()
        .map(|m| PlaceView {
            member: m.clone(),
            address: members
                .address_of(m)
                .or_else(|| config.addresses.get(m).cloned()),
            voter: config.voters.contains_key(m),
            data: view.members.contains_key(m),
            heard_ms_ago: presence
                .get(m)
                .map(|p| u64::try_from(now.since(p.heard_at).as_millis()).unwrap_or(u64::MAX)),
        })
        .collect();
    places.sort_by(|a, b| a.member.cmp(&b.member));
    let cluster = view.cluster.as_ref().map(|c| c.value.name.clone());
    MembersView {
        cluster: cluster.unwrap_or_default(),
        epoch: config.epoch,
        majority: config.majority(),
        members: places,
        removed: config.removed.into_iter().collect(),
    }
}

/// Who takes part without a database: nobody has heard of any data of theirs.
pub fn witnesses(coordinator: &dyn Coordinator, view: &ClusterView) -> Vec<WitnessView> {
    let Some(members) = coordinator.membership() else {
        return Vec::new();
    };
    let config = members.members();
    let presence = Arc::clone(&coordinator.presence().borrow());
    let now = clock::now();
    let mut found: Vec<WitnessView> = config
        .members()
        .filter(|m| !view.members.contains_key(*m))
        .map(|m| {
            let heard = presence.get(m).map(|p| now.since(p.heard_at));
            WitnessView {
                name: m.clone(),
                address: members
                    .address_of(m)
                    .or_else(|| config.addresses.get(m).cloned()),
                voter: config.voters.contains_key(m),
                alive: heard.is_some_and(|age| age < WITNESS_SILENT),
                heard_ms_ago: heard.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
            }
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// Who has a say; nobody where the coordinator is not the embedded one.
pub(crate) fn voters(api: &Api) -> Vec<MemberId> {
    let config = api.membership().map(Membership::members);
    config.map_or_else(Vec::new, |c| c.voters.keys().cloned().collect())
}

async fn list(State(api): State<Api>) -> Result<Response, Refusal> {
    let members = membership(&api)?;
    let view = view(&api).await?;
    Ok(Json(places(&api, members, &view)).into_response())
}

async fn take_in(
    State(api): State<Api>,
    visitor: Option<Extension<Visitor>>,
    Json(request): Json<JoinRequest>,
) -> Result<Response, Refusal> {
    let asks = visitor.and_then(|v| v.0.identity);
    let witness = asks.filter(|i| i.role == Role::Witness);
    if let Some(other) = witness.filter(|i| i.name != request.member.as_str()) {
        return Err(refused(
            format!(
                "the witness {} asks in the name of {}",
                other.name, request.member
            ),
            "witness.name must be the name in its certificate",
        ));
    }
    let members = membership(&api)?;
    let seen = view(&api).await?;
    if seen.leadership.is_none() {
        return Err(refused(
            "the cluster is still being made",
            "wait for its first leader",
        ));
    }
    if seen
        .members
        .get(&request.member)
        .is_some_and(|m| m.value.leaving)
    {
        return Err(refused(
            format!("{} is being removed", request.member),
            "finish that first: craton member remove",
        ));
    }
    let change = MembersChange::Admit {
        member: request.member.clone(),
        address: request.address,
    };
    members.change(change).await.map_err(|e| not_changed(&e))?;
    tracing::info!(member = %request.member, "took a member in");
    let now = places(&api, members, &seen);
    let peers = now.members;
    Ok(Json(JoinView {
        cluster: now.cluster,
        peers,
    })
    .into_response())
}

async fn promote(
    State(api): State<Api>,
    Json(MemberRequest { member }): Json<MemberRequest>,
) -> Result<Response, Refusal> {
    let members = membership(&api)?;
    let change = members.change(MembersChange::Promote {
        member,
        below: None,
    });
    change.await.map_err(|e| not_changed(&e))?;
    list(State(Arc::clone(&api))).await
}

async fn demote(
    State(api): State<Api>,
    Json(MemberRequest { member }): Json<MemberRequest>,
) -> Result<Response, Refusal> {
    let members = membership(&api)?;
    let change = members.change(MembersChange::Demote { member });
    change.await.map_err(|e| not_changed(&e))?;
    list(State(Arc::clone(&api))).await
}

async fn remove(
    State(api): State<Api>,
    Json(MemberRequest { member }): Json<MemberRequest>,
) -> Result<Response, Refusal> {
    let ours = Arc::clone(&api);
    // Not cut off by an operator who hangs up: what stops in the middle stays in the middle.
    let done = tokio::spawn(async move { take_out(&ours, &member).await }).await;
    done.map_err(|error| {
        let hint = "see craton member list, and ask again".into();
        Refusal(StatusCode::INTERNAL_SERVER_ERROR, error.to_string(), hint)
    })??;
    list(State(api)).await
}

/// Out of the sync set, out of the voters, out of the records: in this order, and again from wherever an
/// earlier try stopped.
async fn take_out(api: &Api, member: &MemberId) -> Result<(), Refusal> {
    let members = membership(api)?;
    let seen = view(api).await?;
    if seen.receivers.contains_key(member) {
        receivers::take_out(api, member).await?;
        tracing::info!(%member, "removed a backup receiver");
        return Ok(());
    }
    let config = members.members();
    if !config.holds(member) && !seen.members.contains_key(member) {
        // An earlier try whose answer was lost.
        if config.removed.contains(member) {
            return Ok(());
        }
        return Err(Refusal(
            StatusCode::NOT_FOUND,
            format!("there is no member {member}"),
            "see craton member list".into(),
        ));
    }
    let mut mark = Mark::None;
    if let Err(why) = leave_sync_set(api, member, &mut mark).await {
        take_back(api, member, &mark).await;
        return Err(why);
    }
    if config.holds(member) {
        let member = member.clone();
        let change = members.change(MembersChange::Remove {
            member: member.clone(),
        });
        if let Err(error) = change.await {
            // Of anything else it is not known that it was not done.
            if matches!(error, MembersError::Refused(_)) {
                take_back(api, &member, &mark).await;
            }
            return Err(not_changed(&error));
        }
    }
    update(api, |view| {
        let deletes = [
            Key::Member(member.clone()),
            Key::Seal(member.clone()),
            // Whatever it was asked to do, it never will: others wait for the end of every order.
            Key::Order(member.clone()),
        ];
        let deletes: Vec<Key> = deletes
            .into_iter()
            .filter(|k| view.revision_of(k) > 0)
            .collect();
        (!deletes.is_empty()).then(|| {
            let expect = deletes.iter().map(|k| (k.clone(), view.revision_of(k)));
            Change {
                expect: expect.collect(),
                puts: vec![removed_event(view, member)],
                deletes,
            }
        })
    })
    .await?;
    tracing::info!(%member, "removed a member");
    Ok(())
}

fn removed_event(view: &ClusterView, member: &MemberId) -> Record {
    let history = view.history.as_ref().map(|h| h.value.clone());
    let term = view.leadership.as_ref().map(|l| l.value.term);
    Record::History(history.unwrap_or_default().with(Event {
        at_ms: clock::wall_ms(),
        term: term.unwrap_or_default(),
        member: member.clone(),
        kind: REMOVED.into(),
        text: format!("{member} was removed from the cluster"),
    }))
}

/// A removal's own mark on a member's record.
enum Mark {
    None,
    /// It was written, or not: no answer came.
    Unsure,
    /// The record with the mark, as it was written or found since.
    Made(At<MemberRecord>),
}

impl Mark {
    /// Whether the mark on the record is this removal's still. The member's own agent may have written another address or
    /// another life into the record, and keeps the mark; another removal writes the same record once more.
    fn is_on(&self, now: &At<MemberRecord>) -> bool {
        match self {
            Self::Made(At { revision, value }) => {
                now.revision == *revision || (now.value.leaving && now.value != *value)
            }
            Self::None | Self::Unsure => false,
        }
    }
}

/// Marks the member as leaving, and waits until no commit waits for it.
async fn leave_sync_set(api: &Api, member: &MemberId, mark: &mut Mark) -> Result<(), Refusal> {
    let mut changed = api.watch();
    let deadline = clock::now().after(LEAVE_MAX);
    loop {
        let seen = view(api).await?;
        let Some(l) = seen.leadership.as_ref().map(|l| &l.value) else {
            return Err(refused(
                "the cluster is still being made",
                "wait for its first leader",
            ));
        };
        if l.leader.as_ref().is_some_and(|l| l.member == *member) {
            return Err(refused(
                format!("{member} is the leader"),
                "hand over first: craton switchover",
            ));
        }
        let holds = |r: &craton_core::records::MemberRef| r.member == *member;
        let counts = l.sync.members.contains_key(member);
        if l.leader.is_none() && (counts || l.previous.as_ref().is_some_and(holds)) {
            return Err(refused(
                format!("an election is open, and {member} may hold commits that it needs"),
                "wait for a leader: see craton explain",
            ));
        }
        match (seen.members.get(member), &*mark) {
            (Some(record), Mark::None) => {
                *mark = Mark::Unsure;
                let made = updated(api, |view| marked(view, member, true)).await?;
                *mark = made.map_or(Mark::None, |revision| {
                    let mut value = record.value.clone();
                    value.leaving = true;
                    Mark::Made(At { revision, value })
                });
                continue;
            }
            (Some(record), own) if !own.is_on(record) => {
                return Err(refused(
                    format!("another removal of {member} is in progress"),
                    "see craton member list, and remove it again if it is there still",
                ));
            }
            (Some(record), _) => *mark = Mark::Made(record.clone()),
            (None, _) => {}
        }
        if !counts {
            return Ok(());
        }
        let left = deadline.since(clock::now());
        if left.is_zero() {
            return Err(Refusal(
                StatusCode::GATEWAY_TIMEOUT,
                format!("commits wait for {member} still, after {} s", LEAVE_MAX.as_secs()),
                "the leader must run and reach a standby that stays; see craton status, then remove it again".into(),
            ));
        }
        let _ = tokio::time::timeout(left.min(Duration::from_millis(500)), changed.changed()).await;
    }
}

/// It stays, and counts for commits again, unless another removal goes on.
async fn take_back(api: &Api, member: &MemberId, mark: &Mark) {
    let undo = |view: &ClusterView| {
        let ours = match mark {
            Mark::None => false,
            // Also where there is none yet: one that comes late finds the record changed.
            Mark::Unsure => true,
            own @ Mark::Made(_) => view.members.get(member).is_some_and(|m| own.is_on(m)),
        };
        ours.then(|| marked(view, member, false)).flatten()
    };
    if let Err(Refusal(_, error, _)) = update(api, undo).await {
        tracing::warn!(%member, error, "its mark as leaving could not be taken back");
    }
}

/// Marks the member as leaving, or takes that back.
fn marked(view: &ClusterView, member: &MemberId, leaving: bool) -> Option<Change> {
    let mut record = view.members.get(member)?.value.clone();
    record.leaving = leaving;
    with_leadership(view, Record::Member(member.clone(), record))
}

/// Writes a record, and the leadership with it, unchanged: a sync set that the leader decided without knowing of the record
/// must not be written after it.
pub(crate) fn with_leadership(view: &ClusterView, record: Record) -> Option<Change> {
    let leadership = view.leadership.as_ref()?;
    let key = record.key();
    let revision = view.revision_of(&key);
    Some(Change {
        expect: vec![(key, revision), (Key::Leadership, leadership.revision)],
        puts: vec![record, Record::Leadership(leadership.value.clone())],
        deletes: vec![],
    })
}

/// Makes a change that rests on what is there, again if that changed meanwhile.
pub(crate) async fn update(
    api: &Api,
    make: impl Fn(&ClusterView) -> Option<Change>,
) -> Result<(), Refusal> {
    updated(api, make).await.map(drop)
}

/// As [`update`]; the revision that was made, if there was anything to change.
async fn updated(
    api: &Api,
    make: impl Fn(&ClusterView) -> Option<Change>,
) -> Result<Option<u64>, Refusal> {
    for _ in 0..TRIES_MAX {
        let view = view(api).await?;
        let Some(change) = make(&view) else {
            return Ok(None);
        };
        let txn: Txn = store::txn(&change.keeping_history(&view)).map_err(|e| unavailable(&e))?;
        match api.txn(txn).await.map_err(|e| not_written(&e))? {
            TxnOutcome::Committed(revision) => return Ok(Some(revision)),
            TxnOutcome::Conflict => {}
        }
    }
    Err(refused("others change the same all the time", "try again"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> MemberId {
        MemberId::new(text).unwrap()
    }

    #[test]
    fn voters_stay_an_odd_number_where_that_can_be() {
        let config = |voters: usize, learners: usize| Configuration {
            voters: (0..voters).map(|i| (name(&format!("v{i}")), 1)).collect(),
            learners: (0..learners).map(|i| name(&format!("l{i}"))).collect(),
            ..Configuration::default()
        };
        let asks =
            |voters, learners| should_vote(&config(voters, learners), &name("l0"), VoterWish::Auto);
        assert!(!asks(1, 1), "two voters survive nothing");
        assert!(asks(1, 2) && asks(2, 1), "on the way to three");
        assert!(!asks(3, 1), "four survive no more than three");
        assert!(asks(3, 2) && asks(4, 1), "on the way to five");
        let one = config(3, 1);
        assert!(should_vote(&one, &name("l0"), VoterWish::Always));
        assert!(!should_vote(&config(2, 1), &name("l0"), VoterWish::Never));
        assert!(
            !should_vote(&one, &name("v0"), VoterWish::Always),
            "it is one"
        );
    }
}
