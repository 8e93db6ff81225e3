//! The pool under loom (`scripts/test_loom`): every order of events up to a number of preemptions,
//! every value that a relaxed load may see. Loom reports a lost wake-up as a deadlock, and accesses
//! without order, of the job's cell or of a region's own, as a race.
//!
//! Loom lets no time pass, so a thread that waits for a region looks once and parks; and its unpark
//! orders memory as the standard one does. Spurious wake-ups of `park` are not modelled.

use super::sync::{AtomicUsize, UnsafeCell, thread};
use super::*;

/// Regions with these numbers of chunks, one after another, in every order of events.
fn regions(threads: usize, chunks: &'static [usize], preemptions: usize) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(move || {
        let pool = Pool::new(threads);
        for &chunks in chunks {
            region(&pool, chunks);
        }
    });
}

/// A region whose chunks write what the caller then reads and frees.
fn region(pool: &Pool, chunks: usize) {
    let cells: Vec<_> = (0..chunks).map(|_| Shareable(UnsafeCell::new(0))).collect();
    pool.team().run(
        chunks,
        |thread| thread,
        |_, chunk| {
            // SAFETY: one thread has the chunk, which loom checks.
            cells[chunk].0.with_mut(|count| unsafe { *count += 1 });
        },
    );
    for cell in &cells {
        // SAFETY: the region is over, which loom checks.
        assert_eq!(cell.0.with(|count| unsafe { *count }), 1);
    }
}

struct Shareable(UnsafeCell<usize>);

// SAFETY: loom stops a test that accesses the cell from two threads without order.
unsafe impl Sync for Shareable {}

#[test]
fn two_threads_one_region() {
    regions(2, &[2], 4);
}

/// The shares of both regions have the same words, so a late claim of the first may succeed in the
/// second.
#[test]
fn two_threads_two_equal_regions() {
    regions(2, &[2, 2], 2);
}

#[test]
fn two_threads_two_regions() {
    regions(2, &[3, 2], 2);
}

#[test]
fn three_threads() {
    regions(3, &[2], 1);
}

#[test]
fn a_panic_ends_its_region_only() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(|| {
        let pool = Pool::new(2);
        let ran = AtomicUsize::new(0);
        let body = |_: &mut (), chunk| {
            ran.fetch_add(1, Ordering::Relaxed);
            // Not `panic!`: what the hook prints for each order would be all that is seen.
            if chunk == 1 {
                resume_unwind(Box::new("chunk 1"));
            }
        };
        // Loom's mutexes do not survive a panic, so the team does.
        let team = pool.team();
        let result = catch_unwind(AssertUnwindSafe(|| team.run(2, |_| (), body)));
        drop(team);
        let panic = result.expect_err("the panic of a chunk");
        assert_eq!(panic.downcast_ref(), Some(&"chunk 1"));
        assert_eq!(ran.load(Ordering::Relaxed), 2);
        region(&pool, 2);
    });
}

/// Callers take turns; neither sees the other's region.
#[test]
fn two_callers() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(|| {
        let pool = Arc::new(Pool::new(2));
        let other = thread::spawn({
            let pool = pool.clone();
            move || region(&pool, 2)
        });
        region(&pool, 2);
        other.join().expect("a region");
    });
}
