//! The largest entries of a row of logits.

use super::load_some;
use crate::simd::{Cpu, Isa, Kernel, LANES};
use std::cmp::Ordering;

/// The `k` largest entries of `row`, largest first, ties by smaller index; NaN counts as smallest.
///
/// Returns indices and values, fewer than `k` if the row is shorter.
pub fn largest(cpu: Cpu, row: &[f32], k: usize) -> (Vec<i32>, Vec<f32>) {
    let mut found = cpu.run(Largest { row, k: k.min(row.len()) });
    found.sort_unstable_by(order);
    found.truncate(k);
    found.into_iter().map(|(index, value)| (index as i32, value)).unzip()
}

/// Largest value first, then smallest index.
fn order(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    // Adding zero makes -0.0 equal to 0.0.
    let key = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x + 0.0 };
    key(b.1).total_cmp(&key(a.1)).then(a.0.cmp(&b.0))
}

struct Largest<'a> {
    row: &'a [f32],
    k: usize,
}

impl Kernel for Largest<'_> {
    type Output = Vec<(u32, f32)>;

    /// A superset of the `k` largest: entries that reach a threshold, which rises to the k-th best
    /// so far whenever twice as many have gathered. Almost every vector is passed over at the cost
    /// of one comparison.
    #[inline(always)]
    fn run<S: Isa>(self, s: S) -> Self::Output {
        let k = self.k;
        let mut found: Vec<(u32, f32)> = Vec::with_capacity(2 * k + LANES);
        if k == 0 {
            return found;
        }
        let mut threshold = f32::NEG_INFINITY;
        for (i, part) in self.row.chunks(LANES).enumerate() {
            let full = part.len() == LANES && found.len() >= k;
            if full && s.largest(load_some(s, part)) <= threshold {
                continue;
            }
            for (j, &value) in part.iter().enumerate() {
                let value = if value.is_nan() { f32::NEG_INFINITY } else { value };
                if found.len() < k || value > threshold {
                    found.push(((i * LANES + j) as u32, value));
                }
            }
            if found.len() >= 2 * k || (found.len() >= k && threshold == f32::NEG_INFINITY) {
                found.select_nth_unstable_by(k - 1, order);
                found.truncate(k);
                // A later entry equal to the k-th loses against it: its index is larger.
                threshold = found[k - 1].1;
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::random;

    #[test]
    fn agrees_with_a_full_sort() {
        for cpu in Cpu::all() {
            for n in [1, 15, 16, 17, 100, 5000] {
                for k in [0, 1, 2, 20, 64, 6000] {
                    let mut row = random(n, (n + k) as u64);
                    // Many ties, and values no comparison likes.
                    row.iter_mut().for_each(|x| *x = (*x * 50.0).round());
                    row[n / 2] = f32::NAN;
                    row[n / 3] = f32::NEG_INFINITY;
                    let mut want: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
                    want.sort_by(order);
                    want.truncate(k);
                    let (ids, values) = largest(cpu, &row, k);
                    let ids_want: Vec<i32> = want.iter().map(|w| w.0 as i32).collect();
                    assert_eq!(ids, ids_want, "{cpu:?} {n} {k}");
                    assert_eq!(values.len(), ids.len());
                }
            }
        }
    }
}
