//! The scale of a group of 4-bit codes.
//!
//! For codes q in -8..=7 and a scale d, the squared error of a group is sum((w - d q)^2). For fixed
//! codes the best scale is sum(w q) / sum(q^2), and it explains sum(w q)^2 / sum(q^2) of sum(w^2).
//! Each candidate divides the extreme value of the group by one of 19 numbers around -8, rounds,
//! and refits; the one that explains most wins. On trained weights that leaves 4 to 6 % less error
//! than taking -8 alone.

use super::GROUP;
use crate::simd::{Isa, LANES};

const CANDIDATES: i32 = 9;
const STEP: f32 = 0.1;

/// Finds codes and scales of 16 groups at once, a group a lane.
///
/// w: 32 values a lane; q: their codes, -8..=7. Returns the scales, already rounded to f16.
#[inline(always)]
pub fn search<S: Isa>(s: S, w: &[[f32; LANES]; GROUP], q: &mut [[i32; LANES]; GROUP]) -> S::F {
    let zero = s.splat(0.0);
    let mut extreme = zero;
    for w in w {
        let w = s.load(w);
        extreme = s.select_gt(s.abs(w), s.abs(extreme), w, extreme);
    }
    // A group of zeros keeps scale 0 and codes 0.
    let one = s.splat(1.0);
    let nonzero = s.select_gt(s.abs(extreme), zero, extreme, one);

    let (mut best_explained, mut best_scale) = (s.splat(-1.0), zero);
    for candidate in -CANDIDATES..=CANDIDATES {
        let inverse = s.div(s.splat(-8.0 + STEP * candidate as f32), nonzero);
        let (mut wq, mut qq) = (zero, zero);
        for w in w {
            let w = s.load(w);
            let q = round(s, s.mul(w, inverse));
            wq = s.fma(w, q, wq);
            qq = s.fma(q, q, qq);
        }
        let scale = s.div(wq, s.max(qq, one));
        let explained = s.mul(wq, scale);
        best_scale = s.select_gt(explained, best_explained, scale, best_scale);
        best_explained = s.max(explained, best_explained);
    }
    // The codes are taken with the scale that will be stored.
    let mut half = [0; 2 * LANES];
    s.store_f16(best_scale, &mut half);
    let scale = s.load_f16(&half);
    let divisor = s.select_gt(s.abs(scale), zero, scale, one);
    let used = s.select_gt(s.abs(scale), zero, one, zero);
    for (w, q) in w.iter().zip(q) {
        let code = round(s, s.mul(s.div(s.load(w), divisor), used));
        s.store_i32(s.to_i32(code), q);
    }
    scale
}

/// The nearest code, as a float.
#[inline(always)]
fn round<S: Isa>(s: S, x: S::F) -> S::F {
    let x = s.max(s.min(x, s.splat(7.0)), s.splat(-8.0));
    s.to_f32(s.to_i32(x))
}
