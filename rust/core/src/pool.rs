//! Threads for regions of a few microseconds.
//!
//! A region is a number of chunks and a function of a chunk. The calling thread works too, so a
//! pool of one has no threads of its own. Each thread first takes its own contiguous share of the
//! chunks, the same rows of the same matrix in every step, and then helps the others from the end
//! of theirs. A region is over when its chunks are done, not when all threads came: a thread that
//! the system keeps off the CPU delays nobody unless it holds a chunk.
//!
//! Threads wait for the next region by spinning for [`SPIN`], then park. Nothing spins between
//! requests. (A general work-stealing pool wakes its sleepers through the system for every
//! region, which costs more than most regions of a decode step last.)
//!
//! Why it is sound: the job is written before the chunks are published (release) and read after
//! one was claimed (acquire). The last chunk that a thread claimed counts as done only after the
//! thread has left the job. So whoever is inside a job holds a chunk that is not done, and `run`
//! returns only when all are. A thread that comes late, with the word of an old share in hand, may
//! find the same word in a new region and claim a chunk: it then has a chunk of the new region,
//! and, as the exchange read what `run` stored, the new job with it. A region that ended in a panic
//! is over like any other. `loom_tests` try all of this.

mod sync;

use self::sync::{
    Arc, AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Mutex, MutexGuard, UnsafeCell, spin, thread,
};
use std::any::Any;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long a thread spins for the next region before it parks. A parked thread takes 5 to 10 us
/// to wake; regions of one step follow each other within a few.
const SPIN: Duration = Duration::from_micros(50);

/// How long the caller spins for the last chunks, which take a few microseconds, before it lets
/// others run: on a busy machine the holder of a chunk may need this very CPU.
const SPIN_FOR_CHUNKS: Duration = Duration::from_micros(20);

/// What a participant runs: its thread's number, its first chunk.
type Job<'a> = dyn Fn(usize, usize) + Sync + 'a;

#[repr(align(128))]
struct Line<T>(T);

struct Shared {
    /// Counts published regions; waiting threads watch it.
    epoch: Line<AtomicU32>,
    /// Chunks not yet claimed of each thread's share: next << 32 | end.
    shares: Box<[Line<AtomicU64>]>,
    done: Line<AtomicUsize>,
    job: UnsafeCell<Option<&'static Job<'static>>>,
    /// Whether a thread is parked, or about to be; written by that thread only.
    parked: Box<[AtomicBool]>,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is the only field that is not `Sync`; it is written by the one holder of `Team`
// while no chunk is claimed, and read only by holders of a claimed chunk (see the module text).
unsafe impl Sync for Shared {}
// SAFETY: the job is `Sync`, so a reference to it may be sent.
unsafe impl Send for Shared {}

impl Shared {
    /// A chunk for `thread`: the next of its own share, else the last of another's.
    fn claim(&self, thread: usize) -> Option<usize> {
        let n = self.shares.len();
        (0..n).find_map(|i| {
            let share = &self.shares[(thread + i) % n].0;
            let mut word = share.load(Ordering::Acquire);
            loop {
                let (next, end) = ((word >> 32) as u32, word as u32);
                if next >= end {
                    return None;
                }
                let (chunk, rest) =
                    if i == 0 { (next, word + (1 << 32)) } else { (end - 1, word - 1) };
                match share.compare_exchange_weak(word, rest, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => return Some(chunk as usize),
                    Err(now) => word = now,
                }
            }
        })
    }

    fn finish_chunk(&self) {
        self.done.0.fetch_add(1, Ordering::Release);
    }

    /// Works on the published region until no chunk is left.
    fn participate(&self, thread: usize) {
        while let Some(first) = self.claim(thread) {
            // SAFETY: a chunk is claimed and not done, so `run` has not returned: the job is
            // alive and nobody writes the cell.
            let job = self.job.with(|job| unsafe { *job }).expect("a published region has a job");
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(thread, first))) {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
            self.finish_chunk();
        }
    }

    /// Waits for an epoch other than `seen`.
    fn wait(&self, thread: usize, seen: u32) -> u32 {
        let other = |epoch| (epoch != seen).then_some(epoch);
        if let Some(epoch) = spin(SPIN, || other(self.epoch.0.load(Ordering::Acquire))) {
            return epoch;
        }
        self.parked[thread].store(true, Ordering::Relaxed);
        // Of this change of the epoch and the publisher's, one is first: either this thread sees the
        // new epoch, or the publisher, who reads this one's, also sees the flag.
        let epoch = loop {
            match other(self.epoch.0.fetch_add(0, Ordering::AcqRel)) {
                Some(epoch) => break epoch,
                None => thread::park(),
            }
        };
        self.parked[thread].store(false, Ordering::Relaxed);
        epoch
    }

    /// Makes the waiting threads look.
    fn next_epoch(&self, handles: &[thread::Thread]) {
        self.epoch.0.fetch_add(1, Ordering::AcqRel);
        for (parked, handle) in self.parked[1..].iter().zip(handles) {
            if parked.load(Ordering::Relaxed) {
                handle.unpark();
            }
        }
    }
}

/// The threads of a model.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<thread::JoinHandle<()>>,
    handles: Vec<thread::Thread>,
    team: Mutex<()>,
}

impl Pool {
    /// A pool of `threads` threads, the caller's included. Panics if `threads` is 0.
    pub fn new(threads: usize) -> Pool {
        assert!(threads > 0, "a pool has at least the caller's thread");
        let shared = Arc::new(Shared {
            epoch: Line(AtomicU32::new(0)),
            shares: (0..threads).map(|_| Line(AtomicU64::new(0))).collect(),
            done: Line(AtomicUsize::new(0)),
            job: UnsafeCell::new(None),
            parked: (0..threads).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let workers: Vec<_> = (1..threads)
            .map_while(|thread| {
                let shared = shared.clone();
                thread::Builder::new()
                    .name(format!("qdelta-{thread}"))
                    .spawn(move || {
                        let mut epoch = 0;
                        while !shared.stop.load(Ordering::Relaxed) {
                            shared.participate(thread);
                            epoch = shared.wait(thread, epoch);
                        }
                    })
                    // A system that gives no more threads leaves the rest of the shares to others.
                    .ok()
            })
            .collect();
        let handles = workers.iter().map(|w| w.thread().clone()).collect();
        Pool { shared, workers, handles, team: Mutex::new(()) }
    }

    /// Number of threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.shared.shares.len()
    }

    /// The exclusive use of the threads, for as long as the result lives.
    pub fn team(&self) -> Team<'_> {
        let guard = self.team.lock().unwrap_or_else(PoisonError::into_inner);
        Team { pool: self, _guard: guard, busy: AtomicBool::new(false) }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.next_epoch(&self.handles);
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its jobs, so it ends normally.
            let _ = worker.join();
        }
    }
}

/// All threads of a pool, at the disposal of one caller.
pub struct Team<'a> {
    pool: &'a Pool,
    _guard: MutexGuard<'a, ()>,
    /// A region is under way.
    busy: AtomicBool,
}

impl Team<'_> {
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Runs `body` once for each chunk. A thread that takes part calls `init` first, with its
    /// number, and hands the result to each of its chunks.
    ///
    /// A panic in a chunk is raised again here, when the other chunks are done. Panics if the team
    /// is in a region of several chunks already.
    pub fn run<S>(
        &self,
        chunks: usize,
        init: impl Fn(usize) -> S + Sync,
        body: impl Fn(&mut S, usize) + Sync,
    ) {
        let shared = &*self.pool.shared;
        let threads = self.threads();
        if threads == 1 || chunks == 1 {
            let mut state = init(0);
            (0..chunks).for_each(|chunk| body(&mut state, chunk));
            return;
        }
        if chunks == 0 {
            return;
        }
        assert!(chunks <= u32::MAX as usize);
        assert!(!self.busy.swap(true, Ordering::Acquire), "a region inside a region");
        let job = |thread: usize, first: usize| {
            let mut state = init(thread);
            body(&mut state, first);
            while let Some(chunk) = shared.claim(thread) {
                shared.finish_chunk();
                body(&mut state, chunk);
            }
        };
        let job: &Job<'_> = &job;
        // SAFETY: the team is this caller's (`busy`) and the pool the team's, and no chunk is
        // claimed (the previous region is over, this one not yet published),
        // so nobody reads the cell; the lifetime is extended only for threads that hold a chunk of
        // this region, and this function waits for all chunks.
        shared.job.with_mut(|cell| unsafe {
            *cell = Some(std::mem::transmute::<&Job<'_>, &'static Job<'static>>(job));
        });
        shared.done.0.store(0, Ordering::Relaxed);
        for (t, share) in shared.shares.iter().enumerate() {
            let (next, end) = (chunks * t / threads, chunks * (t + 1) / threads);
            share.0.store((next as u64) << 32 | end as u64, Ordering::Release);
        }
        shared.next_epoch(&self.pool.handles);
        shared.participate(0);
        let over = || (shared.done.0.load(Ordering::Acquire) == chunks).then_some(());
        while spin(SPIN_FOR_CHUNKS, over).is_none() {
            thread::yield_now();
        }
        self.busy.store(false, Ordering::Release);
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Cuts a row-major matrix into tiles and runs `body` once for each.
    ///
    /// matrix: [rows, width]; tile: its rows and columns, the last ones smaller.
    pub fn run_tiles<S>(
        &self,
        matrix: &mut [f32],
        width: usize,
        (tile_rows, tile_cols): (usize, usize),
        init: impl Fn(usize) -> S + Sync,
        body: impl Fn(&mut S, Tile<'_>) + Sync,
    ) {
        assert!(width > 0 && tile_rows > 0 && tile_cols > 0 && matrix.len().is_multiple_of(width));
        let rows = matrix.len() / width;
        let base = Base(matrix.as_mut_ptr());
        let across = width.div_ceil(tile_cols);
        self.run(across * rows.div_ceil(tile_rows), init, |state, chunk| {
            let (down, right) = (chunk / across * tile_rows, chunk % across * tile_cols);
            let tile = Tile {
                base: base.pointer(),
                width,
                rows: down..(down + tile_rows).min(rows),
                cols: right..(right + tile_cols).min(width),
                matrix: PhantomData,
            };
            body(state, tile);
        });
    }

    /// Runs `body` once for each item, with its index.
    pub fn run_each<T: Send, S>(
        &self,
        items: &mut [T],
        init: impl Fn(usize) -> S + Sync,
        body: impl Fn(&mut S, usize, &mut T) + Sync,
    ) {
        let base = Base(items.as_mut_ptr());
        self.run(items.len(), init, |state, index| {
            // SAFETY: `run` hands out each index below `items.len()` once, so no two threads hold
            // the same item, and `items` is borrowed mutably until `run` returns.
            let item = unsafe { &mut *base.pointer().add(index) };
            body(state, index, item);
        });
    }
}

/// The start of a slice whose parts go to different threads.
struct Base<T>(*mut T);

// SAFETY: the pointer is used for disjoint parts only, and the items may change threads.
unsafe impl<T: Send> Sync for Base<T> {}

impl<T> Base<T> {
    fn pointer(&self) -> *mut T {
        self.0
    }
}

/// A rectangle of a row-major matrix that one thread may write.
pub struct Tile<'a> {
    base: *mut f32,
    width: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    matrix: PhantomData<&'a mut [f32]>,
}

impl Tile<'_> {
    /// The rows of the matrix that the tile covers.
    pub fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// The columns of the matrix that the tile covers.
    pub fn cols(&self) -> Range<usize> {
        self.cols.clone()
    }

    /// The part of matrix row `row` that lies in the tile. Panics if the row is not the tile's.
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        self.some_rows(row..row + 1).next().expect("a row")
    }

    /// As [`Tile::row`], for several rows.
    pub fn some_rows(&mut self, rows: Range<usize>) -> impl Iterator<Item = &mut [f32]> {
        assert!(self.rows.start <= rows.start && rows.end <= self.rows.end);
        let (base, width, cols) = (self.base, self.width, self.cols.clone());
        // SAFETY: rows and columns lie inside the matrix that `run_tiles` borrowed mutably; tiles
        // of one region do not overlap, each row is given out once, and `&mut self` keeps two
        // calls from giving out the same.
        rows.map(move |row| unsafe {
            std::slice::from_raw_parts_mut(base.add(row * width + cols.start), cols.len())
        })
    }
}

#[cfg(all(test, loom))]
mod loom_tests;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_runs_once() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            let team = pool.team();
            for chunks in [0, 1, 2, 3, 7, 64, 1000] {
                let counts: Vec<_> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
                team.run(
                    chunks,
                    |_| (),
                    |(), chunk| {
                        counts[chunk].fetch_add(1, Ordering::Relaxed);
                    },
                );
                assert!(
                    counts.iter().all(|c| c.load(Ordering::Relaxed) == 1),
                    "{threads} {chunks}"
                );
            }
        }
    }

    #[test]
    fn many_short_regions_and_pauses() {
        let pool = Pool::new(4);
        let sum = AtomicUsize::new(0);
        for round in 0..2000 {
            if round % 500 == 0 {
                // Long enough for the workers to park.
                thread::sleep(SPIN * 10);
            }
            pool.team().run(
                5,
                |_| (),
                |(), chunk| {
                    sum.fetch_add(chunk, Ordering::Relaxed);
                },
            );
        }
        assert_eq!(sum.into_inner(), 2000 * 10);
    }

    #[test]
    fn tiles_cover_the_matrix_once() {
        let pool = Pool::new(3);
        for (rows, width, tile) in
            [(1, 1, (1, 1)), (5, 7, (2, 3)), (4, 33, (9, 16)), (3, 64, (1, 64))]
        {
            let mut matrix = vec![0.0; rows * width];
            pool.team().run_tiles(
                &mut matrix,
                width,
                tile,
                |_| (),
                |(), mut tile| {
                    for row in tile.rows() {
                        let first = tile.cols().start;
                        for (i, y) in tile.row(row).iter_mut().enumerate() {
                            *y += (row * width + first + i) as f32 + 1.0;
                        }
                    }
                },
            );
            let want: Vec<f32> = (1..=rows * width).map(|i| i as f32).collect();
            assert_eq!(matrix, want);
        }
    }

    #[test]
    fn a_region_inside_a_region_is_refused() {
        let pool = Pool::new(2);
        let team = pool.team();
        let result = catch_unwind(AssertUnwindSafe(|| {
            team.run(2, |_| (), |(), _| team.run(2, |_| (), |(), _| ()));
        }));
        assert!(result.is_err());
        team.run(2, |_| (), |(), _| ());
    }

    #[test]
    fn a_panic_in_a_chunk_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        for panicking in 0..20 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.team().run(20, |_| (), |(), chunk| assert_ne!(chunk, panicking));
            }));
            assert!(result.is_err());
        }
        let ran = AtomicUsize::new(0);
        pool.team().run(
            20,
            |_| (),
            |(), _| {
                ran.fetch_add(1, Ordering::Relaxed);
            },
        );
        assert_eq!(ran.into_inner(), 20);
    }
}
