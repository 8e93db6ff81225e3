//! Where the time of forward passes goes.
//!
//! Every region of a step (see [`crate::pool`]) and the caller's work between regions belongs to
//! one [`Part`]. A part takes the caller's work, and of a region the time that its threads spent
//! on chunks, divided by the number of threads. What is left of a region's wall time is
//! synchronisation: starting, uneven ends, and threads for which there was no chunk. So the times
//! of all parts, of synchronisation and of the rest add up to the wall time of the calls.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What a region, or the caller's work between two regions, does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// The matrices of the layers.
    Matrices,
    /// Convolution, L2 norms, gated delta rule and gated norm of a head.
    DeltaRule,
    /// Query and key norms, rotation, the cache and the attention over it.
    Attention,
    /// Final norm and lm_head.
    Head,
    /// RMS norms and the quantisation of activations.
    Norms,
    /// Embedding, rotary angles, and all that has no part of its own.
    Other,
}

impl Part {
    pub const ALL: [Part; 6] =
        [Part::Matrices, Part::DeltaRule, Part::Attention, Part::Head, Part::Norms, Part::Other];

    pub fn name(self) -> &'static str {
        match self {
            Part::Matrices => "matrices",
            Part::DeltaRule => "delta_rule",
            Part::Attention => "attention",
            Part::Head => "head",
            Part::Norms => "norms",
            Part::Other => "other",
        }
    }
}

/// Name of what regions took beyond the work in them.
pub const SYNCHRONISATION: &str = "synchronisation";

/// Times of calls on one team of threads, in nanoseconds.
pub struct Profile {
    threads: u64,
    alone: [AtomicU64; Part::ALL.len()], // the caller's work between regions, by part
    busy: [AtomicU64; Part::ALL.len()],  // in chunks, summed over threads, by part
    regions: AtomicU64,                  // wall time of regions
    calls: AtomicU64,                    // wall time of everything
}

/// Adds the time until it is dropped to a counter.
pub struct Clock<'a> {
    start: Instant,
    counter: &'a AtomicU64,
}

impl<'a> Clock<'a> {
    fn new(counter: &'a AtomicU64) -> Clock<'a> {
        Clock { start: Instant::now(), counter }
    }
}

impl Drop for Clock<'_> {
    fn drop(&mut self) {
        self.counter.fetch_add(self.start.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }
}

impl Profile {
    pub fn new(threads: usize) -> Profile {
        Profile {
            threads: threads as u64,
            alone: Default::default(),
            busy: Default::default(),
            regions: AtomicU64::new(0),
            calls: AtomicU64::new(0),
        }
    }

    /// Times a whole call.
    pub fn call(&self) -> Clock<'_> {
        Clock::new(&self.calls)
    }

    /// Times a region as its caller sees it.
    pub fn region(&self) -> Clock<'_> {
        Clock::new(&self.regions)
    }

    /// Times what one thread does in a region.
    pub fn busy(&self, part: Part) -> Clock<'_> {
        Clock::new(&self.busy[part as usize])
    }

    /// Times what the caller does between regions.
    pub fn alone(&self, part: Part) -> Clock<'_> {
        Clock::new(&self.alone[part as usize])
    }

    /// Seconds by name: those of [`Part::ALL`], then [`SYNCHRONISATION`]. They add up to the wall
    /// time of the calls.
    pub fn seconds(&self) -> Vec<(&'static str, f64)> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64 / 1e9;
        let threads = self.threads as f64;
        let mut synchronisation = get(&self.regions);
        let mut rest = get(&self.calls) - get(&self.regions);
        let mut times = Vec::new();
        for part in Part::ALL {
            let (alone, busy) = (get(&self.alone[part as usize]), get(&self.busy[part as usize]));
            synchronisation -= busy / threads;
            rest -= alone;
            times.push((part.name(), alone + busy / threads));
        }
        times[Part::Other as usize].1 += rest;
        times.push((SYNCHRONISATION, synchronisation));
        times
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::Context;
    use crate::pool::Pool;
    use crate::simd::Cpu;
    use std::thread;
    use std::time::Duration;

    const NAP: Duration = Duration::from_millis(4);

    /// Naps of known number: a part gets at least their time over the threads, and all times
    /// together are the call's.
    #[test]
    fn times_go_where_the_work_was_and_add_up() {
        for threads in [1, 2, 3] {
            let pool = Pool::new(threads);
            let (team, profile) = (pool.team(), Profile::new(threads));
            let ctx = Context { profile: Some(&profile), ..Context::new(Cpu::best(), &team) };
            let start = Instant::now();
            {
                let _call = profile.call();
                let init = |_| ();
                let ctx = ctx.under(Part::Attention);
                ctx.run_tiles(&mut [0.0; 5], 1, (1, 1), init, |(), _| thread::sleep(NAP));
                // One chunk: the other threads have nothing to do.
                let ctx = ctx.under(Part::DeltaRule);
                ctx.run_each(&mut [()], init, |(), _, _| thread::sleep(NAP));
                ctx.under(Part::Norms).alone(|| thread::sleep(NAP));
                thread::sleep(NAP);
            }
            let (wall, nap) = (start.elapsed().as_secs_f64(), NAP.as_secs_f64());
            let times = profile.seconds();
            let get = |name| times.iter().find(|(n, _)| *n == name).expect(name).1;
            assert_eq!(times.len(), Part::ALL.len() + 1);
            let n = threads as f64;
            assert!(get("attention") >= 5.0 * nap / n);
            assert!(get("delta_rule") >= nap / n);
            assert!(get("norms") >= nap && get("other") >= nap);
            assert_eq!((get("matrices"), get("head")), (0.0, 0.0));
            assert!(get(SYNCHRONISATION) >= (n - 1.0) / n * nap, "{threads} threads: {times:?}");
            let sum: f64 = times.iter().map(|(_, seconds)| seconds).sum();
            let call = profile.calls.load(Ordering::Relaxed) as f64 / 1e9;
            assert!((sum - call).abs() < 1e-12 * times.len() as f64, "{sum} {call}");
            assert!(call <= wall);
        }
    }
}
