//! Which of a failing seed's faults matter: the others are left out, one group after the other, for as long as
//! the run still fails (delta debugging, Zeller and Hildebrandt 2002).

use std::collections::BTreeSet;

use crate::{Options, Outcome, run};

/// What is left of a failing run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shrunk {
    /// The failing run with the fewest faults that was found.
    pub outcome: Outcome,
    /// The faults that were left out, by number.
    pub skip: BTreeSet<usize>,
    /// Runs that it took.
    pub runs: usize,
}

impl Shrunk {
    /// The faults that strike, in words.
    pub fn faults(&self) -> impl Iterator<Item = &String> {
        let faults = self.outcome.faults.iter().enumerate();
        faults
            .filter(|(number, _)| !self.skip.contains(number))
            .map(|(_, fault)| fault)
    }
}

/// Leaves out all faults that the failure does not need; none if the seed does not fail. A run without a
/// fault draws other chances afterwards, so what is left need not fail for the same reason: its violations say.
pub fn shrink(seed: u64, options: &Options, runs_max: usize) -> Option<Shrunk> {
    let mut best = Shrunk {
        outcome: run(seed, options),
        skip: options.skip.clone(),
        runs: 1,
    };
    if best.outcome.violations.is_empty() {
        return None;
    }
    let mut group = best.outcome.faults.len().div_ceil(2).max(1);
    loop {
        let mut shorter = false;
        let mut from = 0;
        while from < best.outcome.faults.len() && best.runs < runs_max {
            let mut skip = best.skip.clone();
            skip.extend(from..(from + group).min(best.outcome.faults.len()));
            from += group;
            if skip == best.skip {
                continue;
            }
            let fewer = Options {
                skip: skip.clone(),
                ..options.clone()
            };
            best.runs += 1;
            let outcome = run(seed, &fewer);
            if !outcome.violations.is_empty() {
                (best.outcome, best.skip) = (outcome, skip);
                shorter = true;
            }
        }
        if best.runs >= runs_max || (group == 1 && !shorter) {
            return Some(best);
        }
        if !shorter {
            group = group.div_ceil(2).max(1);
        }
    }
}
