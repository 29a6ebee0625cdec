//! The log in memory: an image, and the entries after it.

use std::collections::VecDeque;

use super::membership::Configuration;
use super::message::{Entry, Image, Index, Payload, RaftTerm};

/// The most entries in one message.
pub(super) const APPEND_ENTRIES_MAX: usize = 64;

/// The most payload in one message, in bytes (one entry may be larger on its own).
pub(super) const APPEND_BYTES_MAX: usize = 512 * 1024;

#[derive(Clone, Debug, Default)]
pub(super) struct Log {
    image: Image,
    entries: VecDeque<Entry>,
}

impl Log {
    pub(super) fn new(image: Option<Image>, entries: Vec<Entry>) -> Self {
        Self {
            image: image.unwrap_or_default(),
            entries: entries.into(),
        }
    }

    pub(super) fn image(&self) -> &Image {
        &self.image
    }

    /// The last index that is only in the image.
    pub(super) fn base(&self) -> Index {
        self.image.last_index
    }

    pub(super) fn last_index(&self) -> Index {
        self.entries
            .back()
            .map_or(self.image.last_index, |e| e.index)
    }

    pub(super) fn last_term(&self) -> RaftTerm {
        self.entries.back().map_or(self.image.last_term, |e| e.term)
    }

    fn position(&self, index: Index) -> Option<usize> {
        usize::try_from(index.checked_sub(self.base() + 1)?).ok()
    }

    pub(super) fn entry(&self, index: Index) -> Option<&Entry> {
        self.entries.get(self.position(index)?)
    }

    /// The term at an index; `None` before the image's end and after the log's.
    pub(super) fn term(&self, index: Index) -> Option<RaftTerm> {
        if index == self.base() {
            return Some(self.image.last_term);
        }
        self.entry(index).map(|e| e.term)
    }

    /// Entries from `first` on, as many as fit into a message.
    pub(super) fn from(&self, first: Index) -> Vec<Entry> {
        let Some(skip) = self.position(first) else {
            return Vec::new();
        };
        let mut bytes = 0;
        let mut out = Vec::new();
        for entry in self.entries.iter().skip(skip).take(APPEND_ENTRIES_MAX) {
            bytes += entry.payload.len();
            if !out.is_empty() && bytes > APPEND_BYTES_MAX {
                break;
            }
            out.push(entry.clone());
        }
        out
    }

    /// The last index whose term is at most `term`, not before the image.
    pub(super) fn last_index_of_term(&self, term: RaftTerm) -> Index {
        self.entries
            .iter()
            .rev()
            .find(|e| e.term <= term)
            .map_or(self.base(), |e| e.index)
    }

    /// The first index of the run of entries that have the same term as the one at `index`.
    pub(super) fn first_index_of_run(&self, index: Index) -> Index {
        let Some(term) = self.term(index) else {
            return index;
        };
        let mut first = index;
        while first > self.base() + 1 && self.term(first - 1) == Some(term) {
            first -= 1;
        }
        first
    }

    /// The newest configuration in the entries, with its index.
    pub(super) fn last_configuration(&self) -> Option<(Index, &Configuration)> {
        self.entries.iter().rev().find_map(|e| match &e.payload {
            Payload::Configure(config) => Some((e.index, config)),
            _ => None,
        })
    }

    pub(super) fn push(&mut self, entry: Entry) {
        self.entries.push_back(entry);
    }

    /// Drops `first` and everything after it.
    pub(super) fn truncate_from(&mut self, first: Index) {
        if let Some(len) = self.position(first) {
            self.entries.truncate(len);
        }
    }

    /// Takes the image in place of what it covers; everything else goes too if the log disagrees with it.
    pub(super) fn install(&mut self, image: Image) {
        if self.term(image.last_index) == Some(image.last_term) && image.last_index > self.base() {
            while self
                .entries
                .front()
                .is_some_and(|e| e.index <= image.last_index)
            {
                self.entries.pop_front();
            }
        } else {
            self.entries.clear();
        }
        self.image = image;
    }
}

impl Payload {
    /// Bytes of text in it.
    fn len(&self) -> usize {
        match self {
            Self::Command(text) => text.len(),
            Self::Noop | Self::Readmit { .. } | Self::Configure(_) => 0,
        }
    }
}
