//! WAL that only a backup receiver has: fetched as files, while sealed, before somebody leads (failover protocol, 3.1.4).

use craton_core::decide::StopHow;
use craton_core::receiver::WAL_PART_MAX;
use craton_core::{Lsn, Term, TimelineId};
use craton_pg::{history, history_name, segment_name};

use crate::act::{ActError, Actor};

impl Actor {
    /// Fetches what the receiver at `api` holds beyond this member's seal, up to `end`; then PostgreSQL is started anew,
    /// reads it, and is sealed again. Until all of it is here nothing changes.
    pub(crate) async fn catch_up_by_files(
        &self,
        api: &str,
        term: Term,
        end: (TimelineId, Lsn),
    ) -> Result<(), ActError> {
        let own = self.server.sealed().filter(|s| s.term == term);
        let Some(own) = own.filter(|_| self.state().floor <= term) else {
            return Err(ActError::Stale("not sealed for that term".into()));
        };
        self.note_foreign_wal(term).await?;
        let instance = &self.server.instance;
        let size = instance.control_data().await?.segment_size.max(1);
        tracing::info!(api, timeline = %end.0, lsn = %end.1, "getting the missing WAL out of the backup");
        instance.forget_fetched().await?;
        let lineage = self.lineage(api, own.timeline, end.0).await?;
        let (first, last) = (own.lsn.0 / size, end.1.0.saturating_sub(1) / size);
        for number in first..=last {
            let name = self.fetch_segment(api, &lineage, number, size).await?;
            let fits = number != first || instance.fits(&name, own.timeline, own.lsn, size).await?;
            if !fits {
                return Err(ActError::Stale(format!(
                    "segment {name} of the backup is not what this member has up to {}",
                    own.lsn
                )));
            }
        }
        // From here on it holds more than it said.
        self.server.set_sealed(None);
        self.stop(StopHow::Fast, "WAL that it lacks is put beside its own")
            .await?;
        instance.place_fetched(size).await?;
        // PostgreSQL looks for the newest timeline number by number.
        instance.reserve_timelines_below(end.0, end.0).await?;
        self.start_standby().await?;
        self.seal(term).await?;
        match self.server.sealed() {
            Some(seal) if seal.lsn >= end.1 => Ok(()),
            _ => Err(ActError::Stale(format!(
                "the WAL out of the backup does not reach {}",
                end.1
            ))),
        }
    }

    /// The timelines in which the missing WAL may be, the newest first; its history file is fetched with it.
    async fn lineage(
        &self,
        api: &str,
        own: TimelineId,
        newest: TimelineId,
    ) -> Result<Vec<TimelineId>, ActError> {
        if own == newest {
            return Ok(vec![own]);
        }
        let name = history_name(newest);
        let missing = || ActError::Stale(format!("the backup has no {name}"));
        let text = self.part(api, &name, 0).await?.ok_or_else(missing)?;
        let entries = history::parse(&String::from_utf8_lossy(&text))?;
        self.server.instance.add_fetched(&name, text).await?;
        let mut lineage: Vec<TimelineId> = entries
            .iter()
            .map(|e| e.timeline)
            .filter(|t| *t >= own)
            .collect();
        lineage.push(newest);
        lineage.reverse();
        Ok(lineage)
    }

    /// The segment of the newest timeline that has it, as recovery reads it.
    async fn fetch_segment(
        &self,
        api: &str,
        lineage: &[TimelineId],
        number: u64,
        size: u64,
    ) -> Result<String, ActError> {
        for timeline in lineage {
            let name = segment_name(*timeline, number, size);
            let mut offset = 0;
            while let Some(part) = self.part(api, &name, offset).await? {
                let length = part.len();
                self.server.instance.add_fetched(&name, part).await?;
                offset += length;
                if length < WAL_PART_MAX {
                    return Ok(name);
                }
            }
        }
        Err(ActError::Stale(format!(
            "the backup has no segment {number} of these timelines: {lineage:?}"
        )))
    }

    async fn part(
        &self,
        api: &str,
        name: &str,
        offset: usize,
    ) -> Result<Option<Vec<u8>>, ActError> {
        let part = self.receivers.wal(api, name, offset).await;
        part.map_err(|e| ActError::Stale(format!("WAL cannot be had from the backup: {e}")))
    }
}
