//! Rotary position embedding on the first dimensions of a head (Su et al. 2021, arXiv:2104.09864),
//! pairs (i, i + rotary_dim / 2).
//!
//! The angle is the f32 product of the position and an f32 frequency, as the reference forms it;
//! its sine and cosine are taken in f64, which needs no care at far positions.

/// Frequencies theta^(-2i / rotary_dim), i = 0 .. rotary_dim / 2, in f32.
pub fn frequencies(theta: f64, rotary_dim: usize) -> Vec<f32> {
    (0..rotary_dim / 2).map(|i| (1.0 / theta.powf(2.0 * i as f64 / rotary_dim as f64)) as f32).collect()
}

/// Appends the cosines and sines of a token at `position` to `table`: [rotary_dim / 2, 2].
pub fn angles(frequencies: &[f32], position: usize, table: &mut Vec<[f32; 2]>) {
    table.extend(frequencies.iter().map(|f| {
        let (sin, cos) = f64::from(position as f32 * f).sin_cos();
        [cos as f32, sin as f32]
    }));
}

/// Rotates one head in place. angles: [rotary_dim / 2] cosines and sines.
pub fn rotate(angles: &[[f32; 2]], x: &mut [f32]) {
    let (first, second) = x[..2 * angles.len()].split_at_mut(angles.len());
    for ((a, b), [cos, sin]) in first.iter_mut().zip(second).zip(angles) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}
