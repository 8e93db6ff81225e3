//! Norms over the last axis. All interior arithmetic is f32.

use super::{activation::silu, dot, load_some, store_some};
use crate::simd::{Cpu, Isa, Kernel, LANES};

/// Root-mean-square normalisation of each row: y = x / sqrt(mean(x^2) + eps) w.
///
/// x, y: [rows, w.len()]. Zero-centred weights must come as 1 + w. Panics if the lengths disagree.
pub fn rms_norm(cpu: Cpu, x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    assert!(x.len() == y.len() && x.len().is_multiple_of(w.len()));
    cpu.run(RmsNorm { x, w, eps, y });
}

struct RmsNorm<'a> {
    x: &'a [f32],
    w: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let n = self.w.len();
        for (x, y) in self.x.chunks_exact(n).zip(self.y.chunks_exact_mut(n)) {
            let scale = s.splat(1.0 / (dot(s, x, x) / n as f32 + self.eps).sqrt());
            let mut i = 0;
            while i < n {
                let x = s.mul(load_some(s, &x[i..]), scale);
                store_some(s, s.mul(x, load_some(s, &self.w[i..])), &mut y[i..]);
                i += LANES;
            }
        }
    }
}

/// Gated RMS norm in place: y = y / sqrt(mean(y^2) + eps) w silu(z).
///
/// y, z, w: one head, [d_v]; w is not zero-centred.
#[inline(always)]
pub fn gated_rms_norm_isa<S: Isa>(s: S, z: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    let n = w.len();
    let scale = s.splat(1.0 / (dot(s, y, y) / n as f32 + eps).sqrt());
    let mut i = 0;
    while i < n {
        let normed = s.mul(s.mul(load_some(s, &y[i..]), scale), load_some(s, &w[i..]));
        store_some(s, s.mul(normed, silu(s, load_some(s, &z[i..n]))), &mut y[i..n]);
        i += LANES;
    }
}

/// L2 normalisation in place, times `scale`: x = scale x / sqrt(sum(x^2) + 1e-6).
#[inline(always)]
pub fn l2_norm_isa<S: Isa>(s: S, scale: f32, x: &mut [f32]) {
    const EPS: f32 = 1e-6;
    let factor = s.splat(scale / (dot(s, x, x) + EPS).sqrt());
    let mut i = 0;
    while i < x.len() {
        let v = s.mul(load_some(s, &x[i..]), factor);
        store_some(s, v, &mut x[i..]);
        i += LANES;
    }
}
