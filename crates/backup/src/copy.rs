//! This daemon as a synchronous copy: what it has noted, its seals, and where the WAL that it holds ends.
//!
//! The rules are those of [`craton_core::receiver`]. They are kept here across restarts (`standing.json` in the
//! repository), and between the task that receives and those that seal.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use craton_console::Client;
use craton_core::receiver::{Known, ReceiverStatus, Report, SealAnswer, SealRequest, Standing};
use craton_core::records::Seal;
use craton_core::sync::application_name;
use craton_core::{Incarnation, Lsn, MemberId, Term, TimelineId};
use craton_repo::continuity;
use craton_repo::layout::{self, SegmentForm};
use craton_repo::segment::SegmentId;
use craton_repo::wal_end::{NewestEnd, last_record_end, newest_end};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::config::Config;
use crate::error::{BackupError, Result};
use crate::receiver::blocking;
use crate::store::{Repository, write_synced};

/// Where it is noted.
const FILE: &str = "standing.json";
/// The format of [`Noted`] that this version writes.
const FORMAT: u32 = 1;
/// Between two reports to the agents: while there is no answer, and afterwards.
const REPORT_RETRY: Duration = Duration::from_secs(1);
const REPORT_INTERVAL: Duration = Duration::from_secs(10);
/// How long one agent may take to answer.
const REPORT_MAX: Duration = Duration::from_secs(4);
/// How long the connection to the former leader may take to end.
const LEAVE_MAX: Duration = Duration::from_secs(5);

/// What is on disk.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Noted {
    format: u32,
    /// The life of the repository.
    incarnation: Incarnation,
    /// Nothing below this term may reach it any more.
    floor: Term,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Copy {
    name: MemberId,
    api: String,
    path: PathBuf,
    /// None until the cluster has heard of this life.
    standing: Mutex<Option<Standing>>,
    /// Held while something is noted, so that an older note never comes after a newer one.
    noting: tokio::sync::Mutex<()>,
    /// Grows with every change of the standing.
    moved: watch::Sender<u64>,
}

impl Copy {
    /// For a daemon that is to count as a copy.
    pub(crate) fn open(config: &Config) -> Result<Option<Arc<Self>>> {
        if !config.synchronous {
            return Ok(None);
        }
        let path = config.repository.join(FILE);
        Ok(Some(Arc::new(Self {
            name: config.copy_name()?,
            api: config.api_address(),
            standing: Mutex::new(read(&path)?),
            path,
            noting: tokio::sync::Mutex::default(),
            moved: watch::Sender::new(0),
        })))
    }

    fn standing(&self) -> MutexGuard<'_, Option<Standing>> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.moved.send_modify(|n| *n += 1);
    }

    /// Waits until `met` says so of the standing.
    async fn wait(&self, met: impl Fn(&Standing) -> bool) {
        let mut moved = self.moved.subscribe();
        loop {
            moved.borrow_and_update();
            if self.standing().as_ref().is_some_and(&met) {
                return;
            }
            if moved.changed().await.is_err() {
                return;
            }
        }
    }

    /// Waits until the cluster has heard of this life.
    pub(crate) async fn wait_known(&self) {
        self.wait(|_| true).await;
    }

    /// The name in `pg_stat_replication` and in `synchronous_standby_names`.
    pub(crate) fn application_name(&self) -> Option<String> {
        let incarnation = self.standing().as_ref()?.incarnation();
        Some(application_name(&self.name, incarnation))
    }

    /// The lowest term whose leader may be followed.
    pub(crate) fn floor(&self) -> Term {
        self.standing().as_ref().map_or(Term(0), Standing::floor)
    }

    async fn note(&self, incarnation: Incarnation, floor: Term) -> Result<()> {
        let noted = Noted {
            format: FORMAT,
            incarnation,
            floor,
        };
        let (path, text) = (self.path.clone(), serde_json::to_vec(&noted));
        let text = text.map_err(|e| BackupError::Config(e.to_string()))?;
        blocking(move || write_synced(&path, &text)).await
    }

    /// Before anything is received from the leader of `term`. False where that is not allowed any more.
    pub(crate) async fn follow(&self, term: Term) -> Result<bool> {
        let _noting = self.noting.lock().await;
        let Some(mut next) = self.standing().clone() else {
            return Ok(false);
        };
        let before = next.floor();
        if !next.follow(term) {
            return Ok(false);
        }
        if next.floor() > before {
            self.note(next.incarnation(), next.floor()).await?;
        }
        *self.standing() = Some(next);
        self.changed();
        Ok(true)
    }

    /// The connection is gone.
    pub(crate) fn left(&self) {
        if let Some(standing) = self.standing().as_mut() {
            standing.left();
        }
        self.changed();
    }

    /// Returns when this daemon was sealed for a term above `term`: nothing more may be received from its leader.
    pub(crate) async fn superseded(&self, term: Term) {
        self.wait(|s| s.floor() > term).await;
    }

    /// Notes the floor, sees that nothing is received, and says what is held.
    pub(crate) async fn seal(
        &self,
        request: &SealRequest,
        repository: Repository,
    ) -> Result<SealAnswer> {
        {
            let _noting = self.noting.lock().await;
            let Some(mut next) = self.standing().clone() else {
                return Err(BackupError::Refused(
                    "the cluster does not know this copy yet".into(),
                ));
            };
            next.begin_seal(request).map_err(BackupError::Refused)?;
            self.note(next.incarnation(), next.floor()).await?;
            // What it follows may have ended meanwhile.
            if let Some(standing) = self.standing().as_mut() {
                standing.begin_seal(request).map_err(BackupError::Refused)?;
            }
            self.changed();
        }
        let term = request.term;
        let left = tokio::time::timeout(LEAVE_MAX, self.wait(|s| s.is_sealed(term))).await;
        if left.is_err() {
            return Err(BackupError::Interrupted(format!(
                "the connection to the former leader did not end within {LEAVE_MAX:?}"
            )));
        }
        let (timeline, lsn) = blocking(move || end_of_wal(&repository)).await?;
        tracing::info!(%term, %timeline, %lsn, "sealed");
        Ok(Seal {
            term,
            incarnation: request.incarnation,
            timeline,
            lsn,
        })
    }

    /// WAL is missing in the middle: whoever counted on this copy must not any more. The cluster hears of another one.
    pub(crate) async fn reborn(&self) -> Result<()> {
        let _noting = self.noting.lock().await;
        let path = self.path.clone();
        blocking(move || match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(BackupError::io("remove", &path)(e))
            }
            _ => Ok(()),
        })
        .await?;
        *self.standing() = None;
        self.changed();
        Ok(())
    }

    /// Tells the agents of this copy, for as long as the daemon runs.
    pub(crate) async fn report(self: Arc<Self>, client: Client, agents: Vec<String>) {
        let client = client.with_timeout(REPORT_MAX);
        let mut last = String::new();
        loop {
            let known = self.standing().as_ref().map(Standing::incarnation);
            let incarnation = known.unwrap_or_else(|| Incarnation(rand::random()));
            let report = Report {
                name: self.name.clone(),
                incarnation,
                api: self.api.clone(),
            };
            let mut pause = REPORT_RETRY;
            match tell(&client, &agents, &report).await {
                Ok(answer) if known.is_none() => match self.born(incarnation, answer).await {
                    Ok(()) => pause = REPORT_INTERVAL,
                    Err(error) => tracing::error!(%error, "the life of this copy cannot be noted"),
                },
                Ok(_) => pause = REPORT_INTERVAL,
                Err(error) if error != last => {
                    tracing::warn!(error, "no agent knows of this copy yet; telling on");
                    last = error;
                }
                Err(_) => {}
            }
            // A life that ended is followed by another at once, also one that ended while the answer came.
            let mut moved = self.moved.subscribe();
            let ended = async {
                loop {
                    if self.standing().is_none() {
                        return;
                    }
                    if moved.changed().await.is_err() {
                        std::future::pending::<()>().await;
                    }
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = ended, if known.is_some() => {}
            }
        }
    }

    /// The cluster knows of this life: its floor is the term that it was told.
    async fn born(&self, incarnation: Incarnation, known: Known) -> Result<()> {
        let _noting = self.noting.lock().await;
        self.note(incarnation, known.term).await?;
        *self.standing() = Some(Standing::new(incarnation, known.term));
        self.changed();
        Ok(())
    }

    /// What is said of it.
    pub(crate) fn status(
        &self,
        (timeline, lsn): (TimelineId, Lsn),
        streams_from: Option<MemberId>,
    ) -> Option<ReceiverStatus> {
        let standing = self.standing();
        let standing = standing.as_ref()?;
        Some(ReceiverStatus {
            name: self.name.clone(),
            incarnation: standing.incarnation(),
            floor: standing.floor(),
            timeline,
            lsn,
            streams_from,
        })
    }
}

fn read(path: &Path) -> Result<Option<Standing>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(BackupError::io("read", path)(e)),
    };
    let noted: Noted = serde_json::from_slice(&bytes)
        .ok()
        .filter(|n: &Noted| n.format == FORMAT)
        .ok_or_else(|| {
            BackupError::Config(format!(
                "{} cannot be read by this version; remove it, and this copy begins a new life",
                path.display()
            ))
        })?;
    Ok(Some(Standing::new(noted.incarnation, noted.floor)))
}

/// The first agent that answers counts.
async fn tell(
    client: &Client,
    agents: &[String],
    report: &Report,
) -> std::result::Result<Known, String> {
    let mut last = "no agents are named".to_owned();
    for agent in agents {
        match client.post_json(agent, "/v1/receivers", report).await {
            Ok(known) => return Ok(known),
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}

/// Where the WAL in the repository ends: on the newest timeline that has been received beyond its beginning, at the
/// end of the last whole record. Everything up to there is on stable storage when this returns.
pub(crate) fn end_of_wal(repository: &Repository) -> Result<(TimelineId, Lsn)> {
    let size = repository.segment_size();
    let inventory = repository.inventory()?;
    for id in continuity::newest_of_each(&inventory) {
        sync_partial(repository, id)?;
        let history = repository.history(id.timeline)?;
        let fork = history.ancestors.last().map(|a| a.end);
        let wal = bytes(repository, id)?.unwrap_or_default();
        let mut end = last_record_end(&wal, id.start(size).0, size);
        if end.is_none()
            && let Some(number) = id.number.checked_sub(1)
        {
            // No record ends in it: the last one began in the segment before.
            let timeline = history.timeline_of(number, size);
            let before = SegmentId { timeline, number };
            if let Some(mut longer) = repository.whole_segment(before)? {
                longer.extend(wal);
                end = last_record_end(&longer, before.start(size).0, size);
            }
        }
        let end = end.map(Lsn);
        match newest_end(fork, end) {
            NewestEnd::Here(end) => return Ok((id.timeline, end)),
            NewestEnd::Before => {}
            NewestEnd::Nowhere => break,
        }
    }
    Err(BackupError::Refused(
        "no whole record of WAL has been received yet".into(),
    ))
}

/// A segment's bytes, as far as they came.
pub(crate) fn bytes(repository: &Repository, id: SegmentId) -> Result<Option<Vec<u8>>> {
    // A segment changes its form while the daemon works; the second look finds it in the next one.
    for _ in 0..2 {
        if let Some(whole) = repository.whole_segment(id)? {
            return Ok(Some(whole));
        }
        if let Some(partial) = repository.partial_segment(id)? {
            return Ok(Some(partial));
        }
    }
    Ok(None)
}

/// A daemon that died may have written what it had not synced.
fn sync_partial(repository: &Repository, id: SegmentId) -> Result<()> {
    let name = layout::segment(id, SegmentForm::Partial, repository.segment_size());
    let path = repository.path(&name);
    match File::open(&path) {
        Ok(file) => file.sync_all().map_err(BackupError::io("sync", &path)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(BackupError::io("open", &path)(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;
    const PAGE: u32 = 8192;

    /// One page with one record of 32 bytes, at the beginning of a segment; the record ends at 72.
    fn page(at: u64, timeline: u32) -> Vec<u8> {
        let mut page = 0xD110_u16.to_le_bytes().to_vec();
        page.extend_from_slice(&2_u16.to_le_bytes());
        page.extend_from_slice(&timeline.to_le_bytes());
        page.extend_from_slice(&at.to_le_bytes());
        page.extend_from_slice(&[0; 8]);
        page.extend_from_slice(&7_u64.to_le_bytes());
        page.extend_from_slice(&u32::try_from(SIZE).unwrap().to_le_bytes());
        page.extend_from_slice(&PAGE.to_le_bytes());
        let mut header = 32_u32.to_le_bytes().to_vec();
        header.extend_from_slice(&[0; 12]);
        header.extend_from_slice(&[0, 1, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&[9; 8]), &header);
        page.extend(header);
        page.extend_from_slice(&crc.to_le_bytes());
        page.extend_from_slice(&[9; 8]);
        page
    }

    fn receive(repository: &Repository, timeline: u32, at: u64, bytes: &[u8]) {
        let start = Lsn(at);
        let mut sink =
            crate::wal_sink::WalSink::new(repository.clone(), TimelineId(timeline), start);
        sink.write(start, bytes).unwrap();
        sink.flush().unwrap();
    }

    #[test]
    fn the_end_is_that_of_the_last_whole_record_of_the_newest_timeline_that_has_begun() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::open_or_create(dir.path(), 1, SIZE).unwrap();
        assert!(end_of_wal(&repository).is_err(), "nothing was received");
        let at = 3 * SIZE;
        let mut wal = page(at, 1);
        wal.extend_from_slice(&[1, 2, 3]);
        receive(&repository, 1, at, &wal);
        let held = (TimelineId(1), Lsn(at + 72));
        assert_eq!(end_of_wal(&repository).unwrap(), held);
        // A new timeline forked where the old one ended; of its segment only the beginning has come again.
        let fork = format!("1\t{}\tno reason\n", Lsn(at + 72));
        repository.put_history(TimelineId(2), &fork).unwrap();
        receive(&repository, 2, at, &page(at, 2)[..60]);
        assert_eq!(end_of_wal(&repository).unwrap(), held);
        let mut more = page(at, 2);
        more.extend_from_slice(&page(at, 2)[40..]);
        receive(&repository, 2, at, &more);
        assert_eq!(
            end_of_wal(&repository).unwrap(),
            (TimelineId(2), Lsn(at + 104))
        );
    }

    fn copy(dir: &Path) -> Copy {
        Copy {
            name: MemberId::new("backup").unwrap(),
            api: "h:1".into(),
            path: dir.join(FILE),
            standing: Mutex::new(read(&dir.join(FILE)).unwrap()),
            noting: tokio::sync::Mutex::default(),
            moved: watch::Sender::new(0),
        }
    }

    #[tokio::test]
    async fn what_was_promised_survives_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::open_or_create(&dir.path().join("r"), 1, SIZE).unwrap();
        receive(&repository, 1, SIZE, &page(SIZE, 1));
        let first = copy(dir.path());
        assert!(
            !first.follow(Term(1)).await.unwrap(),
            "nobody knows of it yet"
        );
        let life = Incarnation(7);
        first.born(life, Known { term: Term(2) }).await.unwrap();
        assert!(!first.follow(Term(1)).await.unwrap(), "below its birth");
        assert!(first.follow(Term(2)).await.unwrap());
        // The seal waits for the end of the connection.
        let request = SealRequest {
            term: Term(3),
            incarnation: life,
        };
        let (seal, ()) = tokio::join!(first.seal(&request, repository.clone()), async {
            first.superseded(Term(2)).await;
            first.left();
        });
        let seal = seal.unwrap();
        assert_eq!((seal.term, seal.lsn), (Term(3), Lsn(SIZE + 72)));
        let second = copy(dir.path());
        assert_eq!(second.application_name(), first.application_name());
        assert!(!second.follow(Term(2)).await.unwrap(), "it was sealed");
        assert!(second.follow(Term(3)).await.unwrap());
        second.reborn().await.unwrap();
        assert!(
            !copy(dir.path()).follow(Term(3)).await.unwrap(),
            "that life is over"
        );
    }
}
