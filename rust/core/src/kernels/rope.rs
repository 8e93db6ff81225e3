//! Rotary position embedding on the first dimensions of a head (Su et al. 2021, arXiv:2104.09864),
//! pairs (i, i + rotary_dim / 2), with a position for each of time, height and width.
//!
//! The frequencies take turns (interleaved M-RoPE): frequency i follows the height if i mod 3 = 1
//! and i < 3 section[1], the width if i mod 3 = 2 and i < 3 section[2], and time otherwise. Text has
//! three equal positions, which is plain RoPE.
//!
//! The angle is the f32 product of the position and an f32 frequency, as the reference forms it;
//! its sine and cosine are taken in f64 and rounded once, which needs no care at far positions.
//! There is no table: a token's angles are computed when it is fed, for all heads and layers.

use std::f64::consts::PI;

/// YaRN (Peng et al. 2023, arXiv:2309.00071): a context `factor` times longer.
///
/// Frequencies that turn more than `beta_fast` times within the original context stay, those that
/// turn less than `beta_slow` times are divided by `factor`, the ones between are blended. Cosines
/// and sines are multiplied by `attention_factor`, so that scores grow by its square.
#[derive(Clone, PartialEq, Debug)]
pub struct Yarn {
    /// At least 1.
    pub factor: f64,
    pub original_max_position_embeddings: usize,
    pub beta_fast: f64,
    pub beta_slow: f64,
    pub attention_factor: f64,
}

impl Yarn {
    /// The paper's choice of everything but the factor.
    pub fn new(factor: f64, original_max_position_embeddings: usize) -> Yarn {
        Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: Yarn::scale(factor, 1.0),
        }
    }

    /// The paper's attention factor, its logarithm weighted by `mscale`.
    pub fn scale(factor: f64, mscale: f64) -> f64 {
        0.1 * mscale * factor.ln() + 1.0
    }

    /// Positions of the extended context.
    pub fn context(&self) -> usize {
        (self.original_max_position_embeddings as f64 * self.factor) as usize
    }

    /// The indices of frequencies between which the blend lies.
    fn ramp(&self, theta: f64, rotary_dim: usize) -> (f64, f64) {
        let dim = rotary_dim as f64;
        let index = |turns: f64| {
            let original = self.original_max_position_embeddings as f64;
            dim * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln())
        };
        let low = index(self.beta_fast).floor().max(0.0);
        let high = index(self.beta_slow).ceil().min(dim - 1.0);
        (low, if low == high { high + 0.001 } else { high })
    }
}

/// Frequencies and the axis that each follows.
pub struct Rope {
    frequencies: Vec<(f32, usize)>, // [rotary_dim / 2]
    /// What cosines and sines are multiplied by.
    scale: f64,
}

impl Rope {
    /// Frequencies theta^(-2i / rotary_dim), stretched by `yarn` if given, for which theta is above
    /// 1. section: how many follow time, height and width.
    pub fn new(theta: f64, rotary_dim: usize, section: [usize; 3], yarn: Option<&Yarn>) -> Rope {
        let stretch = yarn.map(|yarn| (yarn.factor as f32, yarn.ramp(theta, rotary_dim)));
        let frequency = |i: usize| {
            // Each step in f32, as the reference computes it: far positions show the last bit.
            let exponent = (2 * i) as f32 / rotary_dim as f32;
            let power = theta.powf(f64::from(exponent)) as f32;
            let Some((factor, (low, high))) = stretch else { return 1.0 / power };
            let ramp = (i as f32 - low as f32) / (high - low) as f32;
            let kept = 1.0 - ramp.clamp(0.0, 1.0);
            1.0 / (factor * power) * (1.0 - kept) + 1.0 / power * kept
        };
        let axis = |i: usize| match i % 3 {
            axis @ (1 | 2) if i < 3 * section[axis] => axis,
            _ => 0,
        };
        Rope {
            frequencies: (0..rotary_dim / 2).map(|i| (frequency(i), axis(i))).collect(),
            scale: yarn.map_or(1.0, |yarn| yarn.attention_factor),
        }
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

    /// Appends cosine and sine of each frequency for a token at (time, height, width), positions
    /// that f32 holds exactly.
    pub fn angles(&self, position: [usize; 3], table: &mut Vec<[f32; 2]>) {
        table.extend(self.frequencies.iter().map(|(frequency, axis)| {
            let (sin, cos) = f64::from(position[*axis] as f32 * frequency).sin_cos();
            [(self.scale * cos) as f32, (self.scale * sin) as f32]
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the released models.
    const SECTION: [usize; 3] = [11, 11, 10];
    const POSITIONS: [usize; 8] = [0, 1, 1000, 32_768, 131_071, 262_143, 1_010_000, (1 << 20) - 1];

    fn rope(yarn: Option<&Yarn>) -> Rope {
        Rope::new(1e7, 64, SECTION, yarn)
    }

    /// Frequencies in f64 throughout, by the text of the paper.
    fn exact_frequencies(yarn: Option<&Yarn>) -> Vec<f64> {
        (0..32)
            .map(|i| {
                let frequency = 1e7f64.powf(-f64::from(i) / 32.0);
                let Some(yarn) = yarn else { return frequency };
                // 14 and 22 are the indices of the released models, for 32 turns and 1.
                let ramp = ((f64::from(i) - 14.0) / 8.0).clamp(0.0, 1.0);
                frequency * (1.0 - ramp) + frequency / yarn.factor * ramp
            })
            .collect()
    }

    #[test]
    fn angles_are_exact_at_every_position() {
        for yarn in [None, Some(Yarn::new(2.0, 1 << 18)), Some(Yarn::new(4.0, 1 << 18))] {
            let (rope, exact) = (rope(yarn.as_ref()), exact_frequencies(yarn.as_ref()));
            let (scale, roundings) = yarn.map_or((1.0, 3.0), |yarn| (yarn.attention_factor, 6.0));
            for position in POSITIONS {
                let mut angles = Vec::new();
                rope.angles([position; 3], &mut angles);
                for (i, (frequency, [cos, sin])) in rope.frequencies().zip(&angles).enumerate() {
                    // Of the f32 angle, the best f32 values; one step is left for the last bit of
                    // the f64 functions.
                    let angle = f64::from(position as f32 * frequency);
                    for (got, want) in [(cos, angle.cos()), (sin, angle.sin())] {
                        let off = (f64::from(*got) - scale * want).abs();
                        let bound = f64::from(f32::EPSILON) * (scale * want).abs();
                        assert!(off <= bound, "{position} {i}: {got}, expected {want}");
                    }
                    // The f32 angle itself: the power, its reciprocal and the product are rounded
                    // (2i / 64 is exact), and a blend by two more products and a sum.
                    let true_angle = position as f64 * exact[i];
                    let bound = true_angle * roundings * f64::from(f32::EPSILON) / 2.0;
                    assert!((angle - true_angle).abs() <= bound, "{position} {i}: {angle}");
                }
            }
        }
    }

    #[test]
    fn frequencies_of_yarn() {
        let yarn = Yarn::new(4.0, 262_144);
        assert_eq!(yarn.ramp(1e7, 64), (14.0, 22.0));
        assert_eq!(yarn.context(), 1_048_576);
        assert!((yarn.attention_factor - 1.138_629_436).abs() < 1e-9);
        assert!((Yarn::new(2.0, 262_144).attention_factor - 1.069_314_718).abs() < 1e-9);
        let frequencies: Vec<f32> = rope(Some(&yarn)).frequencies().collect();
        for (i, want) in [
            (0, 1.0),
            (14, 8.659_643_4e-4),
            (15, 4.742_398_2e-4),
            (16, 2.569_350_8e-4),
            (18, 7.217_387_6e-5),
            (20, 1.844_922_4e-5),
            (31, 4.137_042_7e-8),
        ] {
            assert!((frequencies[i] / want - 1.0).abs() <= f32::EPSILON, "{i}: {}", frequencies[i]);
        }
    }

    #[test]
    fn a_factor_of_one_changes_nothing() {
        let (plain, yarn) = (rope(None), rope(Some(&Yarn::new(1.0, 262_144))));
        for position in POSITIONS {
            let (mut a, mut b) = (Vec::new(), Vec::new());
            plain.angles([position; 3], &mut a);
            yarn.angles([position; 3], &mut b);
            for ([a_cos, a_sin], [b_cos, b_sin]) in a.iter().zip(&b) {
                // A blend of two equal frequencies may round.
                let near = 3.0 * position as f32 * f32::EPSILON;
                assert!((a_cos - b_cos).abs() <= near && (a_sin - b_sin).abs() <= near);
            }
        }
    }

    #[test]
    fn each_axis_moves_its_frequencies() {
        let mut angles = Vec::new();
        rope(Some(&Yarn::new(4.0, 262_144))).angles([0, 300_000, 0], &mut angles);
        let scale = Yarn::scale(4.0, 1.0) as f32;
        for (i, angle) in angles.iter().enumerate() {
            assert_eq!(*angle != [scale, 0.0], i % 3 == 1, "{i}");
        }
    }
}
