//! The parts of a decoder layer, each over any number of tokens.
//!
//! A layer is a handful of regions (see [`crate::pool`]): all projections of a mixer as one row
//! range, the mixer itself, the output projection with the residual, gate and up with SwiGLU, down
//! with the residual. Norms and the quantisation of a few rows are done by the caller between
//! regions, where they cost less than a region's start.

pub mod attention;
pub mod block;
pub mod gated_delta_net;
pub mod head;
pub mod linear;
pub mod mlp;

use crate::kernels::unpacked::Unpacked;
use crate::kernels::{Ask, Reading};
use crate::pool::{Team, Tile};
use crate::profile::{Part, Profile};
use crate::simd::Cpu;
use crate::state::lock;
use crate::trace::Trace;
use std::sync::{Mutex, MutexGuard};

/// What every layer needs to work.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    pub cpu: Cpu,
    pub team: &'a Team<'a>,
    /// Where intermediate values are recorded, if anybody wants them.
    pub trace: Option<&'a Trace>,
    /// Where times are counted, if anybody wants them.
    pub profile: Option<&'a Profile>,
    /// What the work belongs to.
    pub part: Part,
    /// How products with a few tokens read weights.
    pub reading: Reading,
    /// Work space of each thread for what many tokens read; none where they are few.
    pub unpacking: &'a [Mutex<[Unpacked; 2]>],
}

impl<'a> Context<'a> {
    /// Records nothing and counts no time.
    pub fn new(cpu: Cpu, team: &'a Team<'a>) -> Context<'a> {
        let reading = Reading { ask: Ask::ToL1, abreast: true };
        Context {
            cpu,
            team,
            trace: None,
            profile: None,
            part: Part::Other,
            reading,
            unpacking: &[],
        }
    }

    /// The same for work that belongs to `part`.
    pub fn under(self, part: Part) -> Context<'a> {
        Context { part, ..self }
    }

    /// The work space of a thread, if there is any.
    fn unpacking_of(self, thread: usize) -> Option<MutexGuard<'a, [Unpacked; 2]>> {
        self.unpacking.get(thread).map(lock)
    }

    /// [`Team::run_tiles`], its time counted.
    pub fn run_tiles<S>(
        self,
        matrix: &mut [f32],
        width: usize,
        tile: (usize, usize),
        init: impl Fn(usize) -> S + Sync,
        body: impl Fn(&mut S, Tile<'_>) + Sync,
    ) {
        let _region = self.profile.map(Profile::region);
        let init = |thread| (init(thread), self.profile.map(|p| p.busy(self.part)));
        self.team.run_tiles(matrix, width, tile, init, |(state, _), tile| body(state, tile));
    }

    /// [`Team::run_each`], its time counted.
    pub fn run_each<T: Send, S>(
        self,
        items: &mut [T],
        init: impl Fn(usize) -> S + Sync,
        body: impl Fn(&mut S, usize, &mut T) + Sync,
    ) {
        let _region = self.profile.map(Profile::region);
        let init = |thread| (init(thread), self.profile.map(|p| p.busy(self.part)));
        self.team.run_each(items, init, |(state, _), index, item| body(state, index, item));
    }

    /// Work of the caller between regions, its time counted.
    pub fn alone<T>(self, work: impl FnOnce() -> T) -> T {
        let _clock = self.profile.map(|p| p.alone(self.part));
        work()
    }
}

/// Work space of each of a team's threads.
pub fn per_thread<T: Default>(threads: usize) -> Vec<Mutex<T>> {
    (0..threads).map(|_| Mutex::default()).collect()
}

/// Tokens that go through the layers together, at most.
pub const PIECE: usize = 512;
