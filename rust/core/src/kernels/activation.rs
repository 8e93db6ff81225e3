//! Exponentials and what is made of them.

use super::{load_some, store_some};
use crate::simd::{Cpu, Isa, Kernel, LANES};

/// e^x, to 2 units in the last place; 1.2e-38 below -87.3, and 1.7e38 or more above 88.
///
/// e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2, and the Taylor series of e^r up to
/// r^7 / 7!, whose remainder is below 6e-9. ln 2 is split so that n times its high part is exact
/// (Cody and Waite 1980).
#[inline(always)]
pub fn exp<S: Isa>(s: S, x: S::F) -> S::F {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = s.max(s.min(x, s.splat(88.0)), s.splat(-87.3));
    let n = s.to_i32(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let nf = s.to_f32(n);
    let r = s.fma(nf, s.splat(-LN2_HIGH), x);
    let r = s.fma(nf, s.splat(-LN2_LOW), r);
    let mut p = s.splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = s.fma(p, r, s.splat(c));
    }
    s.mul(p, s.exp2i(n))
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid<S: Isa>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

/// x sigmoid(x).
#[inline(always)]
pub fn silu<S: Isa>(s: S, x: S::F) -> S::F {
    s.div(x, s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), x))))
}

/// SwiGLU in place: y = silu(gate) y (Shazeer 2020, arXiv:2002.05202).
pub fn swiglu(cpu: Cpu, gate: &[f32], y: &mut [f32]) {
    assert_eq!(gate.len(), y.len());
    cpu.run(Swiglu { gate, y });
}

struct Swiglu<'a> {
    gate: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for Swiglu<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let mut i = 0;
        while i < self.y.len() {
            let gate = silu(s, load_some(s, &self.gate[i..]));
            store_some(s, s.mul(gate, load_some(s, &self.y[i..])), &mut self.y[i..]);
            i += LANES;
        }
    }
}

/// The gates of the delta rule for one value head and token.
///
/// a, b: outputs of `in_proj_a`, `in_proj_b`; rate, dt_bias: the head's weights, rate = -exp(A_log).
/// Returns (g, beta): g = rate softplus(a + dt_bias), beta = sigmoid(b).
pub fn gates(a: f32, b: f32, rate: f32, dt_bias: f32) -> (f32, f32) {
    let x = a + dt_bias;
    // Above 20 softplus(x) is x to f32 precision.
    let softplus = if x > 20.0 { x } else { x.exp().ln_1p() };
    (rate * softplus, 1.0 / (1.0 + (-b).exp()))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Map<'a>(&'a [f32], &'a mut [f32]);

    impl Kernel for Map<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Isa>(self, s: S) {
            for (x, y) in self.0.as_chunks().0.iter().zip(self.1.as_chunks_mut().0) {
                s.store(exp(s, s.load(x)), y);
            }
        }
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let x: Vec<f32> = (0..16 * 1024).map(|i| -87.0 + i as f32 * 174.0 / 16384.0).collect();
        for cpu in Cpu::all() {
            let mut y = vec![0.0; x.len()];
            cpu.run(Map(&x, &mut y));
            for (&x, &y) in x.iter().zip(&y) {
                let want = f64::from(x).exp();
                let error = (f64::from(y) - want).abs() / want;
                assert!(error < 2.5e-7, "{cpu:?}: exp({x}) = {y}, expected {want}");
            }
        }
    }

    #[test]
    fn swiglu_of_extreme_values_is_finite() {
        let gate = [-1e30, -1000.0, -88.0, -1.0, 0.0, 1.0, 88.0, 1000.0, 1e30];
        for cpu in Cpu::all() {
            let mut y = [1.0; 9];
            swiglu(cpu, &gate, &mut y);
            for (gate, y) in gate.iter().zip(y) {
                let x = f64::from(*gate);
                let want = x / (1.0 + (-x).exp());
                let bound = 1e-6 * want.abs() + 2e-8;
                // Below -88 the result is too small for an accurate f32, and tiny.
                assert!(
                    (f64::from(y) - want).abs() <= bound || *gate < -87.0 && y.abs() < 1e-6,
                    "{cpu:?} {gate} {y}"
                );
            }
        }
    }

    #[test]
    fn gates_match_their_definition() {
        for (a, b, a_log, dt_bias) in
            [(0.3, -0.2, 1.1, 0.4), (25.0, 40.0, 2.7, 1.0), (-90.0, -90.0, -3.0, 0.0)]
        {
            let (g, beta) = gates(a, b, -f32::exp(a_log), dt_bias);
            let x = f64::from(a + dt_bias);
            let want = -f64::from(a_log).exp() * x.exp().ln_1p();
            assert!((f64::from(g) - want).abs() <= 1e-6 * want.abs() + 1e-37);
            assert!((f64::from(beta) - 1.0 / (1.0 + (-f64::from(b)).exp())).abs() < 1e-6);
        }
    }
}
