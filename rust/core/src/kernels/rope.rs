//! Rotary position embedding on the first dimensions of a head (Su et al. 2021, arXiv:2104.09864),
//! pairs (i, i + rotary_dim / 2), with a position for each of time, height and width.
//!
//! The frequencies take turns (interleaved M-RoPE): frequency i follows the height if i mod 3 = 1
//! and i < 3 section[1], the width if i mod 3 = 2 and i < 3 section[2], and time otherwise. Text has
//! three equal positions, which is plain RoPE.
//!
//! The angle is the f32 product of the position and an f32 frequency, as the reference forms it;
//! its sine and cosine are taken in f64, which needs no care at far positions.

/// Frequencies and the axis that each follows.
pub struct Rope {
    frequencies: Vec<(f32, usize)>, // [rotary_dim / 2]
}

impl Rope {
    /// Frequencies theta^(-2i / rotary_dim). section: how many follow time, height and width.
    pub fn new(theta: f64, rotary_dim: usize, section: [usize; 3]) -> Rope {
        let frequency = |i: usize| {
            // Each step in f32, as the reference computes it: far positions show the last bit.
            let exponent = (2 * i) as f32 / rotary_dim as f32;
            1.0 / theta.powf(f64::from(exponent)) as f32
        };
        let axis = |i: usize| match i % 3 {
            axis @ (1 | 2) if i < 3 * section[axis] => axis,
            _ => 0,
        };
        Rope { frequencies: (0..rotary_dim / 2).map(|i| (frequency(i), axis(i))).collect() }
    }

    /// Number of frequencies: rotary_dim / 2.
    pub fn len(&self) -> usize {
        self.frequencies.len()
    }

    pub fn is_empty(&self) -> bool {
        self.frequencies.is_empty()
    }

    /// The frequencies.
    pub fn frequencies(&self) -> impl Iterator<Item = f32> {
        self.frequencies.iter().map(|f| f.0)
    }

    /// Appends cosine and sine of each frequency for a token at (time, height, width).
    pub fn angles(&self, position: [usize; 3], table: &mut Vec<[f32; 2]>) {
        table.extend(self.frequencies.iter().map(|(frequency, axis)| {
            let (sin, cos) = f64::from(position[*axis] as f32 * frequency).sin_cos();
            [cos as f32, sin as f32]
        }));
    }
}

/// Rotates one head in place. angles: [rotary_dim / 2] cosines and sines.
pub fn rotate(angles: &[[f32; 2]], x: &mut [f32]) {
    let (first, second) = x[..2 * angles.len()].split_at_mut(angles.len());
    for ((a, b), [cos, sin]) in first.iter_mut().zip(second).zip(angles) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}
