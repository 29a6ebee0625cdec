//! Backup receivers as members of V: they report here, are looked at, asked for their seals, and give WAL.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::routing::post;
use axum::{Json, Router};
use craton_console::{Client, ClientError};
use craton_coordinator::api::Coordinator;
use craton_core::MemberId;
use craton_core::decide::AskSeal;
use craton_core::observe::ReceiverView;
use craton_core::receiver::{self, Known, ReceiverStatus, Report, SealAnswer, SealRequest};
use craton_core::records::{At, Change, ClusterView, Key, ReceiverRecord, Record};
use craton_core::{BootTime, Term};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::agent::Seen;
use crate::clock;
use crate::members::{Refusal, refused, update, view, with_leadership};
use crate::server::LocalServer;

/// How long a look may take.
const LOOK_MAX: Duration = Duration::from_millis(700);

/// How long a receiver may take to seal: it ends its connection, and reads its newest WAL.
const SEAL_MAX: Duration = Duration::from_secs(6);

/// After a seal was refused, or could not be asked for.
const SEAL_PAUSE: Duration = Duration::from_millis(200);

/// How long a part of a file may take.
const WAL_MAX: Duration = Duration::from_secs(10);

/// Receivers that are taken in at most.
const RECEIVERS_MAX: usize = 8;

/// How long a receiver that is taken out may take to leave V.
const LEAVE_MAX: Duration = Duration::from_secs(30);

/// What is known of them here.
pub struct Receivers {
    client: Client,
    seen: Mutex<BTreeMap<MemberId, ReceiverView>>,
    asking: Mutex<BTreeSet<(MemberId, Term)>>,
    server: Arc<LocalServer>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Receivers {
    /// `client` talks to holders of the role `backup`; whoever waits for changes of `server` hears of news.
    pub fn new(client: Client, server: Arc<LocalServer>) -> Arc<Self> {
        Arc::new(Self {
            client,
            seen: Mutex::default(),
            asking: Mutex::default(),
            server,
        })
    }

    /// As last heard.
    pub fn view(&self) -> BTreeMap<MemberId, ReceiverView> {
        locked(&self.seen).clone()
    }

    /// Looks at those on record, as often as the heartbeat.
    pub async fn keep(self: Arc<Self>, seen: watch::Receiver<Option<Seen>>) {
        loop {
            let newest = seen.borrow().clone();
            let view = newest.as_ref().and_then(|s| s.0.view.as_ref());
            let records: BTreeMap<MemberId, At<ReceiverRecord>> =
                view.map(|v| v.receivers.clone()).unwrap_or_default();
            locked(&self.seen).retain(|name, _| records.contains_key(name));
            let mut looks = JoinSet::new();
            for (name, record) in records {
                let this = Arc::clone(&self);
                looks.spawn(async move { this.look(&name, &record.value.api).await });
            }
            while looks.join_next().await.is_some() {}
            let heartbeat = view.map_or(LOOK_MAX, |v| v.settings().heartbeat());
            tokio::time::sleep(heartbeat).await;
        }
    }

    async fn look(&self, name: &MemberId, api: &str) {
        let asked_at = clock::now();
        let client = self.client.clone().with_timeout(LOOK_MAX);
        match client.get_json::<ReceiverStatus>(api, "/v1/receiver").await {
            Ok(status) if status.name == *name => self.heard(asked_at, status),
            Ok(status) => {
                tracing::debug!(%name, api, other = %status.name, "another receiver answers there");
            }
            Err(error) => tracing::debug!(%name, %error, "a backup receiver does not answer"),
        }
    }

    fn heard(&self, at: BootTime, status: ReceiverStatus) {
        let mut seen = locked(&self.seen);
        let former = seen.remove(&status.name);
        let view = receiver::seen(at, &status, former);
        seen.insert(status.name, view);
    }

    /// A part of a file out of the receiver at `api`; none where it has no such file.
    pub async fn wal(
        &self,
        api: &str,
        name: &str,
        offset: usize,
    ) -> Result<Option<Vec<u8>>, ClientError> {
        let path = format!("/v1/receiver/wal/{name}?offset={offset}");
        let client = self.client.clone().with_timeout(WAL_MAX);
        match client.get_bytes(api, &path).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(ClientError::Refused { status: 404, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Asks for a seal, unless that is being done.
    pub fn ask_seal(self: &Arc<Self>, ask: &AskSeal) {
        let key = (ask.receiver.clone(), ask.term);
        if !locked(&self.asking).insert(key.clone()) {
            return;
        }
        let (this, ask) = (Arc::clone(self), ask.clone());
        tokio::spawn(async move {
            if let Err(error) = this.seal(&ask).await {
                tracing::warn!(receiver = %ask.receiver, term = %ask.term, error, "a backup receiver has not sealed");
                tokio::time::sleep(SEAL_PAUSE).await;
            }
            locked(&this.asking).remove(&key);
            this.server.changed.notify_one();
        });
    }

    async fn seal(&self, ask: &AskSeal) -> Result<(), String> {
        let request = SealRequest {
            term: ask.term,
            incarnation: ask.record.incarnation,
        };
        let client = self.client.clone().with_timeout(SEAL_MAX);
        let seal: SealAnswer = client
            .post_json(&ask.record.api, "/v1/receiver/seal", &request)
            .await
            .map_err(|e| e.to_string())?;
        if seal.term != ask.term || seal.incarnation != ask.record.incarnation {
            return Err("it sealed for another election".into());
        }
        tracing::info!(receiver = %ask.receiver, term = %seal.term, timeline = %seal.timeline, lsn = %seal.lsn, "a backup receiver sealed");
        let view = receiver::seen_sealed(clock::now(), seal);
        locked(&self.seen).insert(ask.receiver.clone(), view);
        Ok(())
    }
}

type Api = Arc<dyn Coordinator>;

/// `POST /v1/receivers`: a backup daemon reports as a synchronous copy.
pub fn routes(coordinator: Arc<dyn Coordinator>) -> Router {
    Router::new()
        .route("/v1/receivers", post(report))
        .with_state(coordinator)
}

async fn report(
    State(api): State<Api>,
    Json(report): Json<Report>,
) -> Result<Json<Known>, Refusal> {
    let seen = view(&api).await?;
    let Some(leadership) = &seen.leadership else {
        return Err(refused(
            "the cluster is still being made",
            "wait for its first leader",
        ));
    };
    let takes_part = api
        .membership()
        .is_some_and(|m| m.members().holds(&report.name));
    if takes_part || seen.members.contains_key(&report.name) {
        return Err(refused(
            format!("{} is the name of a member", report.name),
            "give the backup daemon another one: backup.name",
        ));
    }
    let others = seen.receivers.keys().filter(|m| **m != report.name);
    if others.count() >= RECEIVERS_MAX {
        return Err(refused(
            format!("there are {RECEIVERS_MAX} receivers already"),
            "take one out: craton member remove",
        ));
    }
    let term = leadership.value.term;
    update(&api, |view| receiver::on_record(view, &report)).await?;
    Ok(Json(Known { term }))
}

/// Takes a receiver out: no commit waits for it any more, then it is forgotten. If that fails it counts again.
pub(crate) async fn take_out(api: &Api, name: &MemberId) -> Result<(), Refusal> {
    let done = leave(api, name).await;
    if done.is_err()
        && let Err(refusal) = update(api, |view| staying(view, name)).await
    {
        let error = refusal.why();
        tracing::warn!(%name, error, "its mark as leaving could not be taken back");
    }
    done
}

async fn leave(api: &Api, name: &MemberId) -> Result<(), Refusal> {
    let deadline = clock::now().after(LEAVE_MAX);
    let mut changed = api.watch();
    loop {
        let seen = view(api).await?;
        let Some(l) = seen.leadership.as_ref().map(|l| &l.value) else {
            return Ok(());
        };
        let counts = l.sync.members.contains_key(name);
        if counts && l.leader.is_none() {
            return Err(refused(
                format!("an election is open, and {name} may hold commits that it needs"),
                "wait for a leader: see craton explain",
            ));
        }
        let leaves = seen.receivers.get(name).is_none_or(|r| r.value.leaving);
        if !counts && leaves {
            return update(api, |view| forgotten(view, name)).await;
        }
        update(api, |view| leaving(view, name)).await?;
        let left = deadline.since(clock::now());
        if left.is_zero() {
            return Err(refused(
                format!(
                    "commits wait for {name} still, after {} s",
                    LEAVE_MAX.as_secs()
                ),
                "the leader must run and reach a standby that stays; see craton status, then remove it again",
            ));
        }
        let _ = tokio::time::timeout(left.min(Duration::from_millis(500)), changed.changed()).await;
    }
}

fn leaving(view: &ClusterView, name: &MemberId) -> Option<Change> {
    let is_marked = view.receivers.get(name)?.value.leaving;
    (!is_marked).then(|| marked(view, name, true)).flatten()
}

fn staying(view: &ClusterView, name: &MemberId) -> Option<Change> {
    let is_marked = view.receivers.get(name)?.value.leaving;
    is_marked.then(|| marked(view, name, false)).flatten()
}

fn marked(view: &ClusterView, name: &MemberId, leaving: bool) -> Option<Change> {
    let mut record = view.receivers.get(name)?.value.clone();
    record.leaving = leaving;
    with_leadership(view, Record::Receiver(name.clone(), record))
}

fn forgotten(view: &ClusterView, name: &MemberId) -> Option<Change> {
    let keys = [Key::Receiver(name.clone()), Key::Seal(name.clone())];
    let deletes: Vec<Key> = keys
        .into_iter()
        .filter(|k| view.revision_of(k) > 0)
        .collect();
    (!deletes.is_empty()).then(|| Change {
        expect: deletes
            .iter()
            .map(|k| (k.clone(), view.revision_of(k)))
            .collect(),
        puts: vec![],
        deletes,
    })
}
