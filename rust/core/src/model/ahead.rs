//! How kernels read weights.
//!
//! A core that multiplies codes of a few bits with one token reads memory at its full rate only if the
//! next lines were asked for in time, of several streams on some hardware. Which way is best is the
//! hardware's: a Zen 5 decodes up to 1.5 times as fast with asking, and 1.03 times that if lines get no
//! place in the larger caches; a Granite Rapids then half as fast, and 1.07 times as fast with four panels
//! side by side; a Zen 4 at 0.7 with asking into the first level, and without any now at 1.1 and now at 0.8 of
//! its steady rate with the second. So the first tokens of a model go through the layers, and through the
//! head, in each way, and the one that is typically fastest stays, for each of both. The results have the same
//! bits.

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
const ROUNDS: u32 = 3;
const ROUND: u32 = WAYS.len() as u32 * IN_A_ROW;
/// Tokens that may read the weights from disk, and do not count.
const COLD: u32 = 1;
/// Tokens that are tried at most.
const TRIALS: u32 = COLD + ROUNDS * ROUND;
/// A way that took this many quarters of the fastest one's time is not tried again.
const FAR_QUARTERS: u64 = 5;

/// What trials have found so far.
#[derive(Default)]
pub struct Ahead {
    trials: AtomicU32,
    times: [Times; WAYS.len()],
}

/// Of the tokens that went one way, in nanoseconds.
#[derive(Default)]
struct Times {
    tokens: AtomicU64,
    total: AtomicU64,
    slowest: AtomicU64,
}

/// Tokens on their way.
pub struct Trial {
    pub reading: Reading,
    /// Which of the ways it is, and since when, if it is timed.
    timed: Option<(usize, Instant)>,
}

impl Times {
    fn add(&self, time: u64) {
        self.tokens.fetch_add(1, Relaxed);
        self.total.fetch_add(time, Relaxed);
        self.slowest.fetch_max(time, Relaxed);
    }

    /// The mean of all but the slowest token, which may have waited for something else. The fastest one says
    /// little: where nothing is asked for, hardware is now faster than any asking and now much slower.
    fn typical(&self) -> u64 {
        let others = self.tokens.load(Relaxed).saturating_sub(1);
        let time = self.total.load(Relaxed).saturating_sub(self.slowest.load(Relaxed));
        time.checked_div(others).unwrap_or(u64::MAX)
    }
}

impl Ahead {
    /// The way that is fastest, as far as is known.
    pub fn chosen(&self) -> Reading {
        let times = WAYS.iter().zip(&self.times);
        times.min_by_key(|(_, times)| times.typical()).map_or(WAYS[0], |(way, _)| *way)
    }

    /// How `tokens` tokens are to read. Single ones are timed, as long as trials are wanted.
    pub fn begin(&self, tokens: usize) -> Trial {
        let way = if tokens == 1 { self.to_try() } else { None };
        let reading = way.map_or_else(|| self.chosen(), |way| WAYS[way]);
        Trial { reading, timed: way.map(|way| (way, Instant::now())) }
    }

    /// Whether the way is chosen for good.
    pub fn is_settled(&self) -> bool {
        self.to_try().is_none()
    }

    /// The way that the next single token is to go.
    fn to_try(&self) -> Option<usize> {
        let times = self.times.each_ref().map(Times::typical);
        let far = times.into_iter().min()?.saturating_mul(FAR_QUARTERS) / 4;
        loop {
            let trial = self.trials.load(Relaxed);
            if trial >= TRIALS {
                return None;
            }
            let Some(trial) = trial.checked_sub(COLD) else { return Some(0) };
            let way = (trial / IN_A_ROW) as usize % WAYS.len();
            if trial < ROUND || times[way] <= far {
                return Some(way);
            }
            self.trials.fetch_add(1, Relaxed);
        }
    }

    /// The tokens are there.
    pub fn end(&self, trial: &Trial) {
        if let Some((way, start)) = trial.timed {
            self.record(way, u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
        }
    }

    fn record(&self, way: usize, time: u64) {
        if self.trials.fetch_add(1, Relaxed) >= COLD {
            self.times[way].add(time);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What trials find, and how many tokens go each way, if token n of a way takes `time(way, n)`.
    fn tried(time: impl Fn(usize, u32) -> u64) -> (Reading, [u32; WAYS.len()]) {
        let ahead = Ahead::default();
        assert_eq!(ahead.chosen(), WAYS[0]);
        let mut seen = [0; WAYS.len()];
        loop {
            assert!(ahead.begin(2).timed.is_none(), "only single tokens are timed");
            let trial = ahead.begin(1);
            assert_eq!(ahead.is_settled(), trial.timed.is_none());
            let Some((way, _)) = trial.timed else {
                assert_eq!(trial.reading, ahead.chosen());
                return (trial.reading, seen);
            };
            assert_eq!(trial.reading, WAYS[way]);
            ahead.record(way, time(way, seen[way]));
            seen[way] += 1;
        }
    }

    #[test]
    fn the_fastest_way_stays() {
        for fast in 0..WAYS.len() {
            let (reading, seen) = tried(|way, _| if way == fast { 10 } else { 13 });
            assert_eq!(reading, WAYS[fast]);
            let mut wanted = [IN_A_ROW; WAYS.len()];
            wanted[fast] = IN_A_ROW * ROUNDS;
            wanted[0] += COLD;
            assert_eq!(seen, wanted, "slow ways are tried once");
        }
    }

    #[test]
    fn no_single_token_decides() {
        // One way is once the fastest of all, another waits once, and the first begins from disk.
        for (lucky, steady) in [(1, 2), (5, 0), (0, 5)] {
            let (reading, seen) = tried(|way, token| match (way, token) {
                (0, 0) => 9000,
                _ if way == lucky && token == 1 => 90,
                _ if way == steady && token == 3 => 5000,
                _ if way == steady => 100,
                _ => 110,
            });
            assert_eq!(reading, WAYS[steady]);
            assert_eq!(seen[lucky].min(seen[steady]), IN_A_ROW * ROUNDS);
        }
    }
}
