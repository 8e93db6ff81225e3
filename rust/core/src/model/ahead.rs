//! Whether kernels ask for weights ahead of their use.
//!
//! A core that multiplies codes of a few bits with one token reads memory at its full rate only if the
//! next lines were asked for in time. Asking costs instructions, and what the hardware does by itself
//! differs: a Zen 5 decodes up to 1.5 times as fast with it, and with codes of a byte a tenth slower.
//! So the first tokens of a model go through the layers, and through the head, with and without in turn,
//! and the faster way stays, for each of both. The results have the same bits.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// Tokens that are tried. The first ones read the weights from disk; the best of each way counts.
const TRIALS: u32 = 16;

/// What trials have found so far.
pub struct Ahead {
    trials: AtomicU32,
    /// Nanoseconds of the fastest token without and with.
    fastest: [AtomicU64; 2],
}

/// A token on its way.
pub struct Trial {
    pub ahead: bool,
    start: Instant,
}

impl Default for Ahead {
    fn default() -> Ahead {
        Ahead { trials: AtomicU32::new(0), fastest: [(); 2].map(|()| AtomicU64::new(u64::MAX)) }
    }
}

impl Ahead {
    /// The way that is faster, as far as is known.
    pub fn chosen(&self) -> bool {
        let [without, with] = &self.fastest;
        with.load(Relaxed) <= without.load(Relaxed)
    }

    /// A token to be timed, as long as trials are wanted.
    pub fn trial(&self) -> Option<Trial> {
        let trial = self.trials.load(Relaxed);
        (trial < TRIALS).then(|| Trial { ahead: trial.is_multiple_of(2), start: Instant::now() })
    }

    /// The token is there.
    pub fn end(&self, trial: &Trial) {
        let time = u64::try_from(trial.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.fastest[usize::from(trial.ahead)].fetch_min(time, Relaxed);
        self.trials.fetch_add(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_faster_way_stays() {
        for slow in [false, true] {
            let ahead = Ahead::default();
            assert!(ahead.chosen());
            let mut seen = [0; 2];
            while let Some(trial) = ahead.trial() {
                if trial.ahead == slow {
                    std::thread::sleep(Duration::from_millis(2));
                }
                seen[usize::from(trial.ahead)] += 1;
                ahead.end(&trial);
            }
            assert_eq!(seen, [TRIALS / 2; 2]);
            assert_eq!(ahead.chosen(), !slow);
        }
    }
}
