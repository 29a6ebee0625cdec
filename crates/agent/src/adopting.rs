//! Making a data directory that was there before the cluster into the first member's
//! (docs/decisions/0006-adoption.md).

use craton_core::Term;
use craton_pg::AdoptOptions;

use crate::act::{ActError, Actor};
use crate::state::StateFile;

impl Actor {
    /// The claim is won. Whatever is cut off here is done again: the directory gets its life last.
    pub(crate) async fn adopt(&self) -> Result<(), ActError> {
        let options = AdoptOptions {
            superuser_password: self.secrets.superuser.clone(),
        };
        // Nobody may be left out of what is logged once and for all.
        if let Ok(found) = self.server.instance.inspect().await? {
            for note in found.notes {
                tracing::warn!("adopting: {note}");
            }
        }
        self.server.instance.prepare_adopted(&options).await?;
        self.reborn(Term(0)).await?;
        self.state.change(StateFile::forget_floor).await?;
        self.server.data_changed();
        Ok(())
    }
}
