//! FP8 matrices: row-major codes of eight bits, and a scale for each block of 128 x 128.
//!
//! A code is e4m3 (Micikevicius et al. 2022, arXiv:2209.05433): a sign, four bits of exponent with
//! bias 7, three of the mantissa. There are subnormals and no infinities; 0x7f and 0xff are NaN. A
//! weight is what its code means times the scale of its block, a product in f32. The last blocks of
//! a row or column are smaller where 128 does not divide it.

/// Rows and columns of a block.
pub const BLOCK: usize = 128;

/// What a code means.
#[inline(always)]
pub fn value(code: u8) -> f32 {
    // The same fields in an f32, subnormals included, mean 2^120 times less: the bias there is 127.
    const UNBIAS: f32 = f32::from_bits((127 + 120) << 23);
    let (sign, rest) = (u32::from(code & 0x80), u32::from(code & 0x7f));
    if rest == 0x7f { f32::NAN } else { f32::from_bits(sign << 24 | rest << 20) * UNBIAS }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_codes() {
        for code in 0..=255u8 {
            let sign = if code < 128 { 1.0 } else { -1.0 };
            let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
            let want = match (exponent, code & 7) {
                (15, 7) => f64::NAN,
                (0, _) => sign * mantissa / 8.0 * 2f64.powi(-6),
                _ => sign * (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
            };
            let got = value(code);
            assert!(got.to_bits() == (want as f32).to_bits() || got.is_nan() && want.is_nan());
        }
        assert_eq!([0x00, 0x01, 0x38, 0x7e].map(value), [0.0, 2f32.powi(-9), 1.0, 448.0]);
    }
}
