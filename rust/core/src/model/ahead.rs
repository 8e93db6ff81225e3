//! How kernels read weights.
//!
//! A core that multiplies codes of a few bits with one token reads memory at its full rate only if the
//! next lines were asked for in time, of several streams on some hardware. Which way is best is the
//! hardware's: a Zen 5 decodes up to 1.5 times as fast with asking, and 1.03 times that if lines get no
//! place in the larger caches; a Granite Rapids then half as fast, and 1.07 times as fast with four panels
//! side by side; a Zen 4 best without asking, and at 0.7 of that with asking into the first level. So the
//! first tokens of a model go through the layers, and through the head, in each way, and the fastest stays,
//! for each of both. The results have the same bits.

use crate::kernels::{Ask, Reading};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// The first is the one to take until tokens have been timed.
const WAYS: [Reading; 6] = [
    Reading { ask: Ask::ToL2, abreast: true },
    Reading { ask: Ask::ToL2, abreast: false },
    Reading { ask: Ask::Once, abreast: true },
    Reading { ask: Ask::Once, abreast: false },
    Reading { ask: Ask::ToL1, abreast: true },
    Reading { ask: Ask::No, abreast: false },
];
/// Tokens that go one way one after another: what the first leaves in the caches is the second's.
const IN_A_ROW: u32 = 2;
const ROUNDS: u32 = 2;
/// Tokens that are tried at most. The first ones read the weights from disk; the best of each way counts.
const TRIALS: u32 = WAYS.len() as u32 * IN_A_ROW * ROUNDS;
/// A way that took this many quarters of the fastest one's time is not tried again.
const FAR_QUARTERS: u64 = 5;

/// What trials have found so far.
pub struct Ahead {
    trials: AtomicU32,
    /// Nanoseconds of the fastest token of each way.
    fastest: [AtomicU64; WAYS.len()],
}

/// Tokens on their way.
pub struct Trial {
    pub reading: Reading,
    /// Which of the ways it is, and since when, if it counts.
    timed: Option<(usize, Instant)>,
}

impl Default for Ahead {
    fn default() -> Ahead {
        Ahead {
            trials: AtomicU32::new(0),
            fastest: [(); WAYS.len()].map(|()| AtomicU64::new(u64::MAX)),
        }
    }
}

impl Ahead {
    /// The way that is fastest, as far as is known.
    pub fn chosen(&self) -> Reading {
        let times = WAYS.iter().zip(&self.fastest);
        times.min_by_key(|(_, time)| time.load(Relaxed)).map_or(WAYS[0], |(way, _)| *way)
    }

    /// How `tokens` tokens are to read. Single ones are timed, as long as trials are wanted.
    pub fn begin(&self, tokens: usize) -> Trial {
        let way = if tokens == 1 { self.to_try() } else { None };
        let reading = way.map_or_else(|| self.chosen(), |way| WAYS[way]);
        Trial { reading, timed: way.map(|way| (way, Instant::now())) }
    }

    /// The way that the next single token is to go.
    fn to_try(&self) -> Option<usize> {
        let times: [u64; WAYS.len()] = std::array::from_fn(|way| self.fastest[way].load(Relaxed));
        let far = times.into_iter().min()?.saturating_mul(FAR_QUARTERS) / 4;
        loop {
            let trial = self.trials.load(Relaxed);
            let way = (trial / IN_A_ROW) as usize % WAYS.len();
            let first_round = trial < WAYS.len() as u32 * IN_A_ROW;
            if trial >= TRIALS {
                return None;
            }
            if first_round || times[way] <= far {
                return Some(way);
            }
            self.trials.fetch_add(1, Relaxed);
        }
    }

    /// The tokens are there.
    pub fn end(&self, trial: &Trial) {
        if let Some((way, start)) = trial.timed {
            let time = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.fastest[way].fetch_min(time, Relaxed);
            self.trials.fetch_add(1, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_fastest_way_stays() {
        for fast in WAYS {
            let ahead = Ahead::default();
            assert_eq!(ahead.chosen(), WAYS[0]);
            let mut seen = [0; WAYS.len()];
            loop {
                assert!(ahead.begin(2).timed.is_none(), "only single tokens are timed");
                let trial = ahead.begin(1);
                if trial.timed.is_none() {
                    break;
                }
                let way =
                    WAYS.iter().position(|way| *way == trial.reading).expect("one of the ways");
                seen[way] += 1;
                if trial.reading != fast {
                    std::thread::sleep(Duration::from_millis(2));
                }
                ahead.end(&trial);
            }
            let tried = WAYS.map(|way| if way == fast { IN_A_ROW * ROUNDS } else { IN_A_ROW });
            assert_eq!(seen, tried, "slow ways are tried once");
            assert_eq!((ahead.chosen(), ahead.begin(1).reading), (fast, fast));
        }
    }
}
