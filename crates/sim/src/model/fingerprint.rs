//! A word-wise hash with a strong finish, the same on every machine and in every run.

use std::hash::{Hash, Hasher};

use super::state::State;

/// Two of n states get the same one with a chance of n² / 2⁶⁵.
#[derive(Default, Debug)]
pub struct Fingerprint(u64, u64);

impl Fingerprint {
    /// The fingerprint of a state, never 0.
    pub fn of(state: &State) -> u64 {
        let mut hasher = Self::default();
        state.hash(&mut hasher);
        hasher.finish().max(1)
    }

    fn word(&mut self, word: u64) {
        self.0 = (self.0 ^ word)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .rotate_left(29);
        self.1 = (self.1.rotate_left(23) ^ word).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    }
}

impl Hasher for Fingerprint {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0u8; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.word(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, n: u8) {
        self.word(u64::from(n));
    }

    fn write_u32(&mut self, n: u32) {
        self.word(u64::from(n));
    }

    fn write_usize(&mut self, n: usize) {
        self.word(n as u64);
    }

    fn write_isize(&mut self, n: isize) {
        self.word(n.unsigned_abs() as u64);
    }

    fn finish(&self) -> u64 {
        let mut z = self.0 ^ self.1.rotate_left(32);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn small_differences_make_other_fingerprints() {
        let mut seen = BTreeSet::new();
        for term in 0..100 {
            for m in 0..4 {
                for floor in 0..100 {
                    let mut s = State {
                        term,
                        ..State::default()
                    };
                    s.members[m].floor = floor;
                    s.members[m].incarnation = 1;
                    seen.insert(Fingerprint::of(&s));
                }
            }
        }
        assert_eq!(seen.len(), 40_000);
    }
}
