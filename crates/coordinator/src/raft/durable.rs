//! What is on disk, and how one write changes it. The file store and the simulated disk share this.

use super::message::{Entry, HardState, Image, Index};

/// One change of what is on disk. Changes reach the disk in the order given, all of one before the next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Write {
    /// Replaces the hard state.
    Hard(HardState),
    /// Puts entries, which are consecutive, and drops everything that was at the first one's index or after.
    Append(Vec<Entry>),
    /// Replaces the image and drops the entries it covers; all entries if the log disagrees with it.
    Snapshot(Image),
}

/// Everything that is on disk.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Durable {
    /// The hard state.
    pub hard: HardState,
    /// The image that the log begins after.
    pub image: Option<Image>,
    /// The log after the image, consecutive.
    pub entries: Vec<Entry>,
}

impl Durable {
    /// Does one write. The text says what is wrong with one that does not fit.
    pub fn apply(&mut self, write: Write) -> Result<(), String> {
        match write {
            Write::Hard(hard) => self.hard = hard,
            Write::Append(entries) => self.append(entries)?,
            Write::Snapshot(image) => {
                let agrees = self
                    .entries
                    .iter()
                    .any(|e| e.index == image.last_index && e.term == image.last_term);
                if agrees {
                    self.entries.retain(|e| e.index > image.last_index);
                } else {
                    self.entries.clear();
                }
                self.image = Some(image);
            }
        }
        Ok(())
    }

    fn append(&mut self, entries: Vec<Entry>) -> Result<(), String> {
        let Some(first) = entries.first().map(|e| e.index) else {
            return Ok(());
        };
        let base = self.image.as_ref().map_or(0, |i| i.last_index);
        let end: Index = self.entries.last().map_or(base, |e| e.index);
        if first <= base || first > end + 1 {
            return Err(format!(
                "entry {first} does not follow a log of {base}..={end}"
            ));
        }
        if entries
            .iter()
            .zip(first..)
            .any(|(e, index)| e.index != index)
        {
            return Err(format!("the entries from {first} on are not consecutive"));
        }
        self.entries.retain(|e| e.index < first);
        self.entries.extend(entries);
        Ok(())
    }
}
