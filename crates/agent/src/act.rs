//! Carries out the long tasks of a decision. Each can be repeated after a crash in the middle.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use craton_console::Client;
use craton_coordinator::api::PresenceMap;
use craton_core::decide::{StopHow, Task};
use craton_core::promise::{Answer, Ask, Book, Facts};
use craton_core::records::{At, MemberRecord, Seal};
use craton_core::slots::Notes;
use craton_core::sync::{SyncSet, application_name};
use craton_core::{BootTime, Incarnation, Lsn, MemberId, Term, TimelineId};
use craton_pg::{
    CloneProgress, InitArgs, InitOptions, PgError, RelationNames, RolePasswords, StartMode,
    StopMode, SyncNames, Upstream,
};
use tokio::sync::watch;

use crate::clock;
use crate::config::{CloneConfig, Secrets};
use crate::fencing::Fencing;
use crate::promises::Told;
use crate::receivers::Receivers;
use crate::server::{LocalServer, end_is_exact, sync_names};
use crate::state::{MemberState, StateFile, StateKeeper};
use crate::{parameters, slots};

/// A clean stop that takes longer is ended by force.
const STOP_FAST_MAX: Duration = Duration::from_secs(20);
/// Processes that survive SIGKILL for longer hang in the kernel.
const KILL_MAX: Duration = Duration::from_secs(5);
/// At an agent's start, the tools of a former one have so long to die.
const STRAYS_MAX: Duration = Duration::from_secs(1);
/// A promotion that takes longer is reported as failed (and looked at again).
const PROMOTE_MAX: Duration = Duration::from_secs(30);
/// How long a seal waits for PostgreSQL to have read its own WAL.
const SEAL_MAX: Duration = Duration::from_secs(30);
/// How long missing WAL is waited for before the next member may try.
const CATCH_UP_MAX: Duration = Duration::from_secs(12);
/// The end of a promise is looked for no more often than this.
const PROMISE_LOOK: Duration = Duration::from_millis(5);
/// How long one attempt to prove a sync set may take.
const SYNC_MAX: Duration = Duration::from_secs(5);
/// After a promotion the standbys' arrival is looked for this long, so that no commit waits for it.
const LIVELY: Duration = Duration::from_secs(4);
/// A query of the agent's own.
pub(crate) const QUERY_MAX: Duration = Duration::from_secs(10);
/// Until a started server answers.
const READY_MAX: Duration = Duration::from_secs(60);
/// Until a started standby answers. One that needs more (a rewound one needs WAL from the leader) is left
/// running and looked at again.
const READY_STANDBY_MAX: Duration = Duration::from_secs(10);

/// Why a task failed.
#[derive(Debug, thiserror::Error)]
pub enum ActError {
    /// PostgreSQL, or a file of it.
    #[error(transparent)]
    Pg(#[from] PgError),
    /// The agent's own file.
    #[error("cannot write the member's state: {0}")]
    State(#[from] std::io::Error),
    /// Nothing would stop PostgreSQL if this member lost its lease.
    #[error("not writable here: {0}")]
    Unguarded(String),
    /// The observation was out of date.
    #[error("{0}")]
    Stale(String),
}

/// What the tasks work with.
pub struct Actor {
    /// This member.
    pub me: MemberId,
    /// PostgreSQL.
    pub server: Arc<LocalServer>,
    /// Passwords of the roles that are created.
    pub secrets: Secrets,
    /// Incarnation and floor.
    pub state: StateKeeper,
    /// Promises to the leader.
    pub book: Mutex<Book>,
    /// Held while what was promised is noted, so that an older note never comes after a newer one.
    pub noting: Arc<tokio::sync::Mutex<()>>,
    /// The fence.
    pub fencing: Arc<Fencing>,
    /// Backup receivers, which give WAL.
    pub receivers: Arc<Receivers>,
    /// Set once no tool of a former agent is left.
    pub strays_ended: tokio::sync::OnceCell<()>,
    /// Progress of a clone.
    pub progress: watch::Sender<CloneProgress>,
    /// What the members say of themselves.
    pub presence: watch::Receiver<PresenceMap>,
    /// A client for the other members' control APIs.
    pub others: Client,
    /// How a data directory is filled.
    pub clone: CloneConfig,
    /// What a new cluster begins with.
    pub initial_data: Option<PathBuf>,
    /// What a new cluster is made with.
    pub initdb_args: InitArgs,
    /// The program that restores out of the repository, and that PostgreSQL calls for WAL.
    pub program: PathBuf,
}

/// Members by name, as the coordinator has them.
pub type Members = std::collections::BTreeMap<MemberId, At<MemberRecord>>;

impl Actor {
    /// A copy of the durable state.
    pub fn state(&self) -> MemberState {
        self.state.get()
    }

    async fn raise_floor(&self, term: Term) -> Result<(), ActError> {
        Ok(self
            .state
            .change(move |file| file.raise_floor(term))
            .await?)
    }

    /// A new life of the data directory; its floor is the term at its birth.
    pub(crate) async fn reborn(&self, floor: Term) -> Result<(), ActError> {
        let incarnation = Incarnation(rand::random());
        let change = move |file: &mut StateFile| {
            let floor = floor.max(file.get().floor);
            file.set(MemberState {
                version: 1,
                incarnation: Some(incarnation),
                floor,
                slots: Notes::default().following(file.get().slots.followed),
                ..file.get().clone()
            })
        };
        Ok(self.state.change(change).await?)
    }

    /// A data directory whose agent forgot its state (the file was lost) promised nothing that is known: it
    /// begins a new life, so that it neither seals nor acknowledges for the old one.
    async fn ensure_incarnation(&self, term: Term) -> Result<Incarnation, ActError> {
        if let Some(incarnation) = self.state().incarnation {
            return Ok(incarnation);
        }
        tracing::warn!("the member's state is lost: the data directory is a new incarnation");
        self.reborn(term).await?;
        Ok(self.state().incarnation.unwrap_or_default())
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn note_promises(&self, longest: Duration) -> Result<(), std::io::Error> {
        let promised_ms = u64::try_from(longest.as_millis()).unwrap_or(u64::MAX);
        let change = move |file: &mut StateFile| {
            file.set(MemberState {
                promised_ms,
                ..file.get().clone()
            })
        };
        self.state.change(change).await
    }

    fn ask_book(&self, ask: &Ask, known_term: Term) -> Answer {
        let mut book = self.book();
        let state = self.state();
        let facts = Facts {
            floor: state.floor,
            incarnation: state.incarnation,
            streams_from: self.server.streams_from(),
            known_term,
        };
        book.ask(clock::now(), ask, &facts)
    }

    /// The leader asks for a promise (2.7). Waits for the disk the first time.
    pub async fn promise(&self, ask: &Ask, known_term: Term) -> Told {
        let no = |why: String| Told {
            promised: false,
            why,
        };
        let answer = match self.ask_book(ask, known_term) {
            Answer::AfterNote(longest) => {
                let _noting = self.noting.lock().await;
                if let Err(error) = self.note_promises(longest).await {
                    return no(format!("the promise cannot be noted: {error}"));
                }
                self.book().noted(longest);
                // It counts from now, not from before the disk; and a seal may have begun meanwhile.
                self.ask_book(ask, known_term)
            }
            answer => answer,
        };
        match answer {
            Answer::Yes => Told {
                promised: true,
                why: String::new(),
            },
            Answer::AfterNote(_) => no("the promise could not be noted".into()),
            Answer::No(why) => no(why),
        }
    }

    /// Until when this member seals for nobody; what has run out is forgotten on disk in the background.
    pub fn promised_until(self: &Arc<Self>) -> Option<BootTime> {
        let now = clock::now();
        if self.book().is_idle(now)
            && let Ok(noting) = Arc::clone(&self.noting).try_lock_owned()
        {
            let this = Arc::clone(self);
            tokio::spawn(async move {
                let _noting = noting;
                {
                    let mut book = this.book();
                    if !book.is_idle(clock::now()) {
                        return;
                    }
                    // From here on the next promise is noted anew, and that waits for this note.
                    book.noted(Duration::ZERO);
                }
                if let Err(error) = this.note_promises(Duration::ZERO).await {
                    // Costs a wait after the next start, nothing else.
                    tracing::debug!(%error, "the end of a promise cannot be noted");
                }
            });
        }
        self.book().held_until(now)
    }

    /// A promise and a seal exclude each other: waits for the end of one that runs.
    async fn begin_seal(&self, term: Term) {
        loop {
            let held = self.book().begin_seal(clock::now(), term);
            let Err(until) = held else { return };
            tracing::info!(%term, "the seal waits for the end of a promise to the former leader");
            tokio::time::sleep(until.since(clock::now()).max(PROMISE_LOOK)).await;
        }
    }

    /// Every process of PostgreSQL ends now. False if some hang in the kernel and are still there after
    /// `limit`: the signal is theirs, so they do nothing more, but they are not gone.
    pub async fn kill(&self, limit: Duration) -> bool {
        self.server.expect_end();
        let result = if let Some(process) = self.server.process() {
            process.kill_all(limit).await
        } else {
            let killed = self.server.instance.kill_leftovers(limit).await;
            killed.map(|_| ())
        };
        match result {
            Ok(()) => {
                self.server.gone();
                true
            }
            Err(error) => {
                tracing::error!(%error, "PostgreSQL does not die; trying again");
                false
            }
        }
    }

    /// Tools of an agent that was killed may still write here: nothing is done before they are gone.
    pub async fn end_strays(&self, limit: Duration) -> Result<(), ActError> {
        let end = || async {
            let killed = self.server.instance.kill_stray_tools(limit).await?;
            if killed > 0 {
                tracing::warn!(killed, "ended what a former agent's tools were still at");
                self.server.data_changed();
            }
            Ok::<_, ActError>(())
        };
        self.strays_ended.get_or_try_init(end).await?;
        Ok(())
    }

    /// At the agent's start: a stray loads others. What does not end in time every task waits for.
    pub async fn end_strays_soon(&self) {
        if let Err(error) = self.end_strays(STRAYS_MAX).await {
            tracing::warn!(%error, "a former agent's tools do not end; every task waits for that");
        }
    }

    /// Runs a task to its end.
    pub async fn run(&self, task: Task, members: &Members) -> Result<(), ActError> {
        self.end_strays(KILL_MAX).await?;
        match task {
            Task::InitDb => self.init_db().await,
            Task::Adopt => self.adopt().await,
            Task::StartStandby => self.start_standby().await,
            Task::StartPrimary { sync } => self.start_primary(sync).await,
            Task::Stop { how, why } => self.stop(how, &why).await,
            Task::Follow { from, term } => self.follow(&from, term, members).await,
            Task::Seal { term } => self.seal(term).await,
            Task::Promote {
                term,
                timeline,
                sync,
            } => self.promote(term, timeline, sync, members).await,
            Task::Bootstrap => self.bootstrap().await,
            Task::Clone {
                from,
                repository,
                term,
            } => {
                if repository {
                    self.clone_from_repository(term).await
                } else {
                    self.clone_from(&from, term, members).await
                }
            }
            Task::Rewind { from, fork, term } => self.rewind(&from, fork, term, members).await,
            Task::CatchUp {
                from,
                receiver,
                term,
                timeline,
                lsn,
            } => match receiver {
                Some(api) => self.catch_up_by_files(&api, term, (timeline, lsn)).await,
                None => self.catch_up(&from, term, (timeline, lsn), members).await,
            },
            Task::TakeSlots { from, term } => self.take_slots(&from, term, members).await,
            Task::SetSync(set) => self.set_sync(set).await,
            Task::Admit => self.admit().await,
            Task::Checkpoint => Ok(self.prepare_handover().await?),
            Task::Configure => self.configure().await,
            Task::Reinit { incarnation, term } => self.reinit(incarnation, term).await,
        }
    }

    pub(crate) fn upstream(
        &self,
        of: &MemberId,
        members: &Members,
        user: &str,
    ) -> Result<Upstream, ActError> {
        let record = members.get(of).map(|m| &m.value).ok_or_else(|| {
            ActError::Stale(format!("the coordinator has no address of {of} yet"))
        })?;
        let incarnation = self.state().incarnation.unwrap_or_default();
        Ok(Upstream {
            host: record.host.clone(),
            port: record.port,
            user: user.to_owned(),
            passfile: self.server.passfile.clone(),
            application_name: application_name(&self.me, incarnation),
            slot: Some(self.me.slot_name()),
            tls: self.server.tls.clone(),
        })
    }

    async fn init_db(&self) -> Result<(), ActError> {
        let options = InitOptions {
            superuser_password: self.secrets.superuser.clone(),
            args: self.initdb_args.clone(),
        };
        // Before there is data: a database without an incarnation could not be recorded.
        self.reborn(Term(0)).await?;
        // And nothing that was promised in another cluster's terms counts for this one.
        self.state.change(StateFile::forget_floor).await?;
        match &self.initial_data {
            Some(made) => {
                tracing::info!(from = %made.display(), "the cluster begins with this database");
                self.server.instance.take_data_dir(made.clone()).await?;
            }
            None => {
                self.server.instance.initdb(&options).await?;
            }
        }
        self.server.data_changed();
        Ok(())
    }

    /// Starts as a standby without an upstream, so that nothing is added to its WAL before its end is known.
    pub(crate) async fn start_standby(&self) -> Result<(), ActError> {
        // Of a catch-up that was cut off.
        self.server.instance.forget_fetched().await?;
        self.start_following(None).await
    }

    /// WAL of whichever leader was last may come: what was known of copies of logical slots holds no more.
    pub(crate) async fn note_foreign_wal(&self, election: Term) -> Result<(), ActError> {
        let last = Term(election.0.saturating_sub(1));
        let change = move |file: &mut StateFile| {
            let slots = file.get().slots.following(last);
            file.set(MemberState {
                slots,
                ..file.get().clone()
            })
        };
        Ok(self.state.change(change).await?)
    }

    pub(crate) async fn start_following(
        &self,
        upstream: Option<(Upstream, MemberId, Term)>,
    ) -> Result<(), ActError> {
        let whom = upstream.as_ref().map(|(_, m, t)| (m.clone(), *t));
        self.server.set_closed(false);
        let mut config = self
            .server
            .managed(upstream.map(|(u, _, _)| u), SyncNames::Nobody);
        if let Some((from, term)) = whom.clone() {
            self.state.change(move |file| file.follow(term)).await?;
            self.make_way_for_copies(&from).await?;
        }
        if !config.decodes() {
            for slot in self.server.instance.discard_logical_slots().await? {
                tracing::warn!(
                    slot,
                    "wal_level is not logical: the copy of a logical slot is dropped, or PostgreSQL would not start"
                );
            }
        }
        let needs = self.server.instance.control_data().await?.standby_needs;
        if parameters::raise_to(&mut config.settings, &needs) {
            // The settings themselves go into the file once it runs, and are then marked as waiting for a restart.
            self.server.parameters.forget_written();
        }
        self.server.instance.write_config(&config).await?;
        self.server.data_changed();
        // Known before the server runs: a decision in between must see the right upstream.
        self.fencing.rest();
        let process = self.server.instance.start(StartMode::Standby).await?;
        self.server.hold(process.clone(), false);
        self.server.set_upstream(whom);
        self.server
            .instance
            .wait_ready(&process, READY_STANDBY_MAX)
            .await?;
        self.server.poke();
        Ok(())
    }

    /// The operator's settings, into the file and into the server.
    async fn configure(&self) -> Result<(), ActError> {
        let Some(process) = self.server.process() else {
            return Err(ActError::Stale("PostgreSQL is not running".into()));
        };
        let settings = self.server.parameters.to_write();
        let written = self.server.instance.write_settings(&settings).await;
        if let Err(error) = written {
            self.server.parameters.forget_written();
            return Err(error.into());
        }
        process.reload()?;
        self.server.parameters.look_soon();
        Ok(())
    }

    /// The directory goes before its life is declared over: cut off in between, this is done once more.
    async fn reinit(&self, incarnation: Option<Incarnation>, term: Term) -> Result<(), ActError> {
        if self.state().incarnation != incarnation {
            return Ok(());
        }
        tracing::warn!("throwing the data directory away, as the operator asked");
        self.stop(StopHow::Fast, "the data directory is thrown away")
            .await?;
        while !self.kill(KILL_MAX).await {}
        self.server.instance.discard_data_dir().await?;
        self.reborn(term).await?;
        self.server.data_changed();
        Ok(())
    }

    async fn start_primary(&self, sync: SyncSet) -> Result<(), ActError> {
        // Until what it recovers is safe.
        self.server.set_closed(true);
        let config = self.server.managed(None, sync_names(&sync));
        self.server.instance.write_config(&config).await?;
        self.server.data_changed();
        self.check_deadline("PostgreSQL was started as the primary")?;
        let process = self.server.instance.start(StartMode::Primary).await?;
        // From here on the fence looks at the deadline.
        self.fencing.guard(&process);
        self.server.hold(process.clone(), true);
        self.server.set_in_force(Some(sync));
        if let Err(why) = self.fencing.wait_armed().await {
            while !self.kill(KILL_MAX).await {}
            return Err(ActError::Unguarded(why));
        }
        self.server.instance.wait_ready(&process, READY_MAX).await?;
        self.server.poke();
        Ok(())
    }

    /// Lets clients in.
    async fn admit(&self) -> Result<(), ActError> {
        let Some(process) = self.server.process() else {
            return Err(ActError::Stale("PostgreSQL is not running".into()));
        };
        let config = self.server.with_clients(false);
        self.server
            .instance
            .admit(&process, &self.server.control, &config, SYNC_MAX)
            .await?;
        self.server.set_closed(false);
        Ok(())
    }

    /// What came before may have taken long, on a slow disk: somebody else may lead by now.
    fn check_deadline(&self, before: &str) -> Result<(), ActError> {
        if self.fencing.is_before_deadline() {
            return Ok(());
        }
        Err(ActError::Stale(format!(
            "the lease ran out before {before}"
        )))
    }

    pub(crate) async fn stop(&self, how: StopHow, why: &str) -> Result<(), ActError> {
        tracing::info!(?how, why, "stopping PostgreSQL");
        let Some(process) = self.server.process() else {
            return Ok(());
        };
        self.server.expect_end();
        if how == StopHow::Fast && process.stop(StopMode::Fast, STOP_FAST_MAX).await.is_ok() {
            return Ok(());
        }
        while !self.kill(KILL_MAX).await {}
        Ok(())
    }

    async fn follow(&self, from: &MemberId, term: Term, members: &Members) -> Result<(), ActError> {
        let Some(process) = self.server.process() else {
            return Err(ActError::Stale("PostgreSQL is not running".into()));
        };
        self.ensure_incarnation(term).await?;
        let upstream = self.upstream(from, members, "craton_replication")?;
        // Never again a lower term: durable before the first byte can come from this one.
        self.state.change(move |file| file.follow(term)).await?;
        let config = self.server.managed(Some(upstream), SyncNames::Nobody);
        self.server.instance.write_config(&config).await?;
        process.reload()?;
        self.server.set_upstream(Some((from.clone(), term)));
        Ok(())
    }

    /// Rule 3.1.2: note the floor, drop the receiver, *see* that it is gone, then say what is here.
    pub(crate) async fn seal(&self, term: Term) -> Result<(), ActError> {
        let Some(process) = self.server.process() else {
            return Err(ActError::Stale("PostgreSQL is not running".into()));
        };
        let incarnation = self.ensure_incarnation(term).await?;
        self.begin_seal(term).await;
        self.raise_floor(term).await?;
        let config = self.server.managed(None, SyncNames::Nobody);
        self.server.set_upstream(None);
        self.server
            .instance
            .cut_upstream(&process, &config, SEAL_MAX)
            .await?;
        let deadline = clock::now().after(SEAL_MAX);
        loop {
            let sample = self.server.control.sample(Duration::from_secs(1)).await?;
            if !sample.in_recovery {
                return Err(ActError::Stale("PostgreSQL is not a standby".into()));
            }
            if end_is_exact(&sample) {
                let seal = Seal {
                    term,
                    incarnation,
                    timeline: sample.timeline,
                    lsn: sample.end_of_wal(),
                };
                tracing::info!(%term, timeline = %seal.timeline, lsn = %seal.lsn, "sealed");
                self.server.set_sealed(Some(seal));
                return Ok(());
            }
            if clock::now() > deadline {
                return Err(ActError::Stale(format!(
                    "the reading of local WAL did not end within {SEAL_MAX:?}"
                )));
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }

    /// 3.1.4: while sealed for `term`, streams what a sealed member holds beyond this one's end. Whatever comes of
    /// it, the upstream is cut and a new seal made.
    async fn catch_up(
        &self,
        from: &MemberId,
        term: Term,
        end: (TimelineId, Lsn),
        members: &Members,
    ) -> Result<(), ActError> {
        let Some(process) = self.server.process() else {
            return Err(ActError::Stale("PostgreSQL is not running".into()));
        };
        if self.state().floor > term {
            return Err(ActError::Stale("sealed for a later term".into()));
        }
        self.note_foreign_wal(term).await?;
        // Until it is sealed again it holds more than it said.
        self.server.set_sealed(None);
        let mut upstream = self.upstream(from, members, "craton_replication")?;
        // A standby's copy of the slot may stand behind what it has removed since.
        upstream.slot = None;
        let config = self.server.managed(Some(upstream), SyncNames::Nobody);
        self.server.instance.write_config(&config).await?;
        process.reload()?;
        tracing::info!(%from, timeline = %end.0, lsn = %end.1, "getting the missing WAL");
        let got = self.reaches(end, CATCH_UP_MAX).await;
        self.seal(term).await?;
        got
    }

    /// Waits until PostgreSQL has flushed WAL up to there.
    async fn reaches(&self, end: (TimelineId, Lsn), limit: Duration) -> Result<(), ActError> {
        let deadline = clock::now().after(limit);
        loop {
            let sample = self.server.control.sample(Duration::from_secs(1)).await?;
            if sample.end_of_wal() >= end.1 {
                return Ok(());
            }
            if clock::now() > deadline {
                return Err(ActError::Stale(format!(
                    "the missing WAL did not come within {limit:?}: it ends at {} and {} is wanted",
                    sample.end_of_wal(),
                    end.1
                )));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn promote(
        &self,
        term: Term,
        timeline: TimelineId,
        sync: SyncSet,
        members: &Members,
    ) -> Result<(), ActError> {
        let Some(process) = self.server.process() else {
            return Err(ActError::Stale("PostgreSQL is not running".into()));
        };
        // 3.1.5: in force before the first write. As a standby it waited for nobody that exists, so no
        // commit can have been acknowledged under anything else.
        let config = self.server.managed(None, sync_names(&sync));
        self.server.instance.write_config(&config).await?;
        process.reload()?;
        let sealed = self.server.sealed().map(|s| s.timeline);
        let own = sealed.or_else(|| self.server.sample().map(|s| s.timeline));
        let own = own.ok_or_else(|| ActError::Stale("PostgreSQL does not answer".into()))?;
        self.server
            .instance
            .reserve_timelines_below(own, timeline)
            .await?;
        self.drop_broken_slots().await;
        self.server.set_maybe_primary();
        self.server.look_often_for(LIVELY);
        self.fencing.guard(&process);
        self.fencing
            .wait_armed()
            .await
            .map_err(ActError::Unguarded)?;
        self.check_deadline("the promotion")?;
        let got = self.server.control.promote(PROMOTE_MAX).await?;
        tracing::info!(%term, timeline = %got, "promoted");
        self.leave_room_for_consumers().await;
        self.checkpoint_soon();
        // The others stream only from a server that has their slots; on a young cluster they may be missing.
        let slots: Vec<String> = slots::of_others(&self.me, members.keys());
        if let Err(error) = self.server.control.ensure_slots(&slots, QUERY_MAX).await {
            tracing::warn!(%error, "replication slots are missing; they are made within seconds");
        }
        // A look that began before the end of recovery must not be taken for a fall back into it.
        self.server.forget_sample();
        self.server.set_in_force(Some(sync));
        self.server
            .instance
            .remove_reserved_history_files(got)
            .await?;
        Ok(())
    }

    async fn bootstrap(&self) -> Result<(), ActError> {
        let passwords = RolePasswords {
            replication: self.secrets.replication.clone(),
            proxy: self.secrets.proxy.clone(),
            rewind: self.secrets.rewind.clone(),
        };
        Ok(self
            .server
            .control
            .bootstrap_roles(&passwords, QUERY_MAX)
            .await?)
    }

    /// Keeps what the cluster does not have, then rewinds; where that cannot work, clones.
    async fn rewind(
        &self,
        from: &MemberId,
        fork: Option<(TimelineId, Lsn)>,
        term: Term,
        members: &Members,
    ) -> Result<(), ActError> {
        let control = self.server.instance.control_data().await?;
        // A relation that was made after the fork is soon known to nobody.
        let names = match self.server.process() {
            Some(_) => self.server.control.relation_names(QUERY_MAX).await,
            None => Ok(RelationNames::new()),
        };
        let names = names.unwrap_or_else(|error| {
            tracing::info!(%error, "the relations in the divergent WAL are listed by number");
            RelationNames::new()
        });
        self.stop(StopHow::Fast, "its WAL is not the cluster's")
            .await?;
        let (timeline, at) = fork.unwrap_or((control.timeline, control.redo_lsn));
        let id = format!(
            "term-{term}-timeline-{timeline}-{}",
            at.to_string().replace('/', "-")
        );
        let kept = self
            .server
            .instance
            .keep_divergent_wal(&id, timeline, at, names)
            .await?;
        tracing::warn!(
            id = kept.id,
            transactions = kept.commits,
            bytes = kept.bytes,
            "kept the WAL that the cluster does not have; see craton divergence show"
        );
        self.reborn(term).await?;
        let source = self.upstream(from, members, "craton_rewind")?;
        self.server.data_changed();
        let why = if self.clone.over_rewind {
            Some("node.clone.over_rewind asks for a clone".to_owned())
        } else {
            self.rewind_from(&source, fork.is_some()).await?
        };
        if let Some(why) = why {
            tracing::warn!(
                why,
                "this member is not brought back by pg_rewind: cloning it anew"
            );
            // Others may be doing the same: until one copy is complete, the leader's would be the only one.
            if let Some(former) = self.server.instance.set_aside_data_dir().await? {
                tracing::info!(former = %former.display(), "what was here is kept until the clone is complete");
            }
            return self.clone_from(from, term, members).await;
        }
        let upstream = self.upstream(from, members, "craton_replication")?;
        self.raise_floor(term).await?;
        self.start_following(Some((upstream, from.clone(), term)))
            .await
    }

    /// Why a clone is needed after all, if it is.
    async fn rewind_from(
        &self,
        source: &Upstream,
        parted: bool,
    ) -> Result<Option<String>, ActError> {
        Ok(match self.server.instance.rewind_from(source).await {
            Ok(true) => None,
            // The histories parted by nothing but a part of a record.
            Ok(false) if parted => None,
            Ok(false) => {
                Some("pg_rewind sees nothing to do, and yet it does not stream".to_owned())
            }
            Err(PgError::Rewind { kind, output }) if kind.worth_retrying() => {
                return Err(PgError::Rewind { kind, output }.into());
            }
            Err(PgError::Rewind { kind, output }) => Some(format!("{kind}: {output}")),
            // A full disk, a time-out: no reason to throw the data away.
            Err(error) => return Err(error.into()),
        })
    }

    async fn set_sync(&self, set: SyncSet) -> Result<(), ActError> {
        let Some(process) = self.server.process() else {
            return Err(ActError::Stale("PostgreSQL is not running".into()));
        };
        let config = self.server.managed(None, sync_names(&set));
        self.server.set_in_force(None);
        self.server
            .instance
            .enforce_sync(&process, &self.server.control, &config, SYNC_MAX)
            .await?;
        self.server.look_again().await?;
        self.server.nudge().await;
        self.server.set_in_force(Some(set));
        Ok(())
    }
}
