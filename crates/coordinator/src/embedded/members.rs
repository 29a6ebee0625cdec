//! Members that come and go: asking for a change, seeing it through, and being told of one's own removal.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use craton_core::MemberId;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use super::wire::{Call, CallTold};
use super::{Embedded, RETRY_INTERVAL, Shared, Try};
use crate::api::{CALL_TIMEOUT, CoordinatorError, MembersError, Membership};
use crate::raft::{Change, Configuration};

/// How long a change may take, all its steps and tries together.
pub const CHANGE_MAX: Duration = Duration::from_secs(20);

/// Without a leader for this long, a member asks the others whether it still is one.
const LONELY_AFTER: Duration = Duration::from_secs(3);

/// How often it asks, and how often a member sees to it that its address is known.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Who takes part: as committed, and by the newest entry.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Members {
    /// As committed.
    pub settled: Configuration,
    /// By the newest entry of the log here.
    pub latest: Configuration,
}

impl Membership for Embedded {
    fn members(&self) -> Configuration {
        self.shared.view.members.borrow().settled.clone()
    }

    fn change(
        &self,
        change: Change,
    ) -> Pin<Box<dyn Future<Output = Result<(), MembersError>> + Send + '_>> {
        Box::pin(async move {
            let due = Instant::now() + CHANGE_MAX;
            self.shared.change(change, due).await?;
            self.shared.settled(due).await
        })
    }

    fn address_of(&self, member: &MemberId) -> Option<String> {
        if *member == self.shared.me {
            return self.shared.address.clone();
        }
        self.shared.links.address(member)
    }

    fn removed(&self) -> watch::Receiver<bool> {
        self.shared.removed.subscribe()
    }
}

impl Shared {
    async fn change(&self, change: Change, due: Instant) -> Result<(), MembersError> {
        loop {
            self.check_running()?;
            // Rule 4 of the promises: not before the last change is through.
            self.settled(due).await?;
            let epoch = self.view.members.borrow().settled.epoch;
            let call = Call::Change {
                change: change.clone(),
                epoch,
            };
            let last = match self
                .try_call(call, due.min(Instant::now() + CALL_TIMEOUT))
                .await
            {
                Try::Told(CallTold::Changed) => return Ok(()),
                Try::Told(CallTold::Refused(why)) => return Err(MembersError::Refused(why)),
                Try::Told(told) => format!("not now: {told:?}"),
                // It may be done: then the next try finds that it is so already.
                Try::Nothing(why) | Try::Doubt(why) => why,
            };
            if Instant::now() + RETRY_INTERVAL >= due {
                return Err(CoordinatorError::Unknown(last).into());
            }
            sleep(RETRY_INTERVAL).await;
        }
    }

    /// Waits until a majority of the voters has settled in the newest epoch that is known here.
    async fn settled(&self, due: Instant) -> Result<(), MembersError> {
        loop {
            let config = self.view.members.borrow().settled.clone();
            let settled = self.lease.settled_in(config.epoch).await;
            if settled >= config.majority() {
                return Ok(());
            }
            if Instant::now() + RETRY_INTERVAL >= due {
                return Err(CoordinatorError::Unavailable(format!(
                    "of the {} voters, {settled} have taken up the last change of the voters, {} are needed",
                    config.voters.len(),
                    config.majority()
                ))
                .into());
            }
            sleep(RETRY_INTERVAL).await;
        }
    }

    /// Looks after this member's own place for as long as it runs.
    pub(super) async fn keep_place(self: Arc<Self>) {
        let mut lonely_since: Option<Instant> = None;
        loop {
            sleep(LOOK_INTERVAL).await;
            let leader = self.view.status.borrow().leader.clone();
            if leader.is_some() {
                lonely_since = None;
                self.register_address().await;
                continue;
            }
            let since = *lonely_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= LONELY_AFTER && self.is_removed().await {
                tracing::error!("this member was removed from the cluster");
                self.removed.send_replace(true);
                return;
            }
        }
    }

    /// The settings file may have another address than the log.
    async fn register_address(&self) {
        let Some(address) = self.address.clone() else {
            return;
        };
        let members = self.view.members.borrow().clone();
        let config = &members.settled;
        let written = config.addresses.get(&self.me);
        let seeded = self.seeds.get(&self.me);
        if !config.holds(&self.me) || written.or(seeded) == Some(&address) {
            return;
        }
        let change = Change::Admit {
            member: self.me.clone(),
            address,
        };
        let due = Instant::now() + CALL_TIMEOUT;
        if let Err(error) = self.change(change, due).await {
            tracing::debug!(%error, "the new address is not registered yet");
        }
    }

    /// Whether anybody says so.
    async fn is_removed(&self) -> bool {
        let due = Instant::now() + CALL_TIMEOUT;
        let mut asked = Vec::new();
        for peer in self.links.peers() {
            let asker = self.links.call(&peer);
            asked.extend(asker.and_then(|a| a.ask(Call::AmIMember).ok()));
        }
        for answer in asked {
            if let Ok(Ok(CallTold::Removed)) = timeout_at(due, answer).await {
                return true;
            }
        }
        false
    }
}
