//! What the tests of kernels share.

/// Random values in -1..1, the same for the same seed.
pub fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            // xorshift64* (Marsaglia 2003, Vigna 2016).
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            let bits = state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40;
            bits as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Panics, naming position, value and bound, unless every |got - want| <= bound.
pub fn assert_close(got: &[f32], want: &[f64], bound: impl Fn(usize) -> f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let bound = bound(i);
        assert!(
            (f64::from(got) - want).abs() <= bound,
            "{what}: position {i}: got {got}, expected {want}, bound {bound:e}"
        );
    }
}
