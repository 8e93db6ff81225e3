//! Matrix products y = W x for a few tokens at a time.
//!
//! For each output the order of operations is fixed: packed formats take groups of 32 columns in
//! order, with an exact integer dot product, one conversion, one multiplication and one addition
//! each, and the unit of a row, where it has one, in the end; float formats add 16 lanes in column order and then the lanes. It depends neither on the
//! number of tokens nor on how the work is cut, so prefill and decode agree to the bit.

use super::outputs::Outputs;
use super::quantize::QuantTile;
use super::{PanelProduct, Reading, ahead_in_panels, ask_ahead, load_some, planes};
use crate::quant::float::{Bf16, F16, F32, Float};
use crate::quant::two_planes::Planes;
use crate::quant::{Format, PANEL_ROWS, Packed, panel_bytes, with_packed};
use crate::simd::{Cpu, Isa, Kernel, LANES};
use std::marker::PhantomData;

/// Product of panels of a packed matrix with the tokens of a tile, which are few ([`super::FEW_TOKENS`])
/// unless the format cannot be unpacked.
///
/// panels: n panels of `cols` columns, in two planes a whole matrix; y: a row of up to 16 n for each
/// token; reading: of the panels. Panics if the lengths disagree or the tile holds too many tokens.
pub fn packed(
    cpu: Cpu,
    format: Format,
    panels: &[u8],
    cols: usize,
    x: &QuantTile,
    reading: Reading,
    y: Outputs<'_>,
) {
    let bytes = panel_bytes(format, cols);
    assert!(panels.len().is_multiple_of(bytes));
    y.check(x.tokens(), panels.len() / bytes);
    if format.is_in_planes() {
        return planes::product(cpu, Planes::new(format, panels), cols, x, reading, y);
    }
    with_packed!(format, P => {
        cpu.run(PackedProduct::<P> { panels, bytes, x, reading, y, format: PhantomData })
    });
}

struct PackedProduct<'a, P> {
    panels: &'a [u8],
    bytes: usize,
    x: &'a QuantTile,
    reading: Reading,
    y: Outputs<'a>,
    format: PhantomData<P>,
}

impl<P: Packed> PanelProduct for PackedProduct<'_, P> {
    const MANY: bool = P::LAYOUT.is_none();

    fn size(&self) -> (usize, usize) {
        (self.panels.len() / self.bytes, self.x.tokens())
    }

    fn abreast(&self) -> bool {
        self.reading.abreast
    }

    #[inline(always)]
    fn panels<S: Isa, const R: usize, const M: usize>(&mut self, s: S, first: usize, n: usize) {
        let bytes = self.bytes;
        let panels: [&[u8]; R] =
            std::array::from_fn(|r| &self.panels[(first + r.min(n - 1)) * bytes..][..bytes]);
        let blocks = panels.map(P::blocks);
        let size = size_of::<P::Block>();
        let mut acc = [[s.splat(0.0); M]; R];
        for (i, x) in self.x.groups::<M>().blocks(P::GROUPS).enumerate().take(blocks[0].len()) {
            for g in 0..P::GROUPS {
                for r in 0..n {
                    let from = ahead_in_panels(first + r, bytes, i * size, n);
                    ask_ahead(s, self.reading.ask, self.panels, from, size, (g, P::GROUPS));
                    P::add(s, &blocks[r][i], g, x.get(g), &mut acc[r]);
                }
            }
        }
        for r in 0..n {
            P::end(s, panels[r], &mut acc[r]);
            for m in 0..M {
                self.y.put(s, m, (first + r) * PANEL_ROWS, acc[r][m]);
            }
        }
    }
}

impl<P: Packed> Kernel for PackedProduct<'_, P> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        self.product(s);
    }
}

/// Product of rows of a row-major float matrix with tokens.
///
/// w: [rows, cols] in `format`, at any address; x: [tokens, cols]; y: a row of as many for each token.
pub fn float(cpu: Cpu, format: Format, w: &[u8], cols: usize, x: &[f32], y: Outputs<'_>) {
    assert!(cols > 0 && x.len().is_multiple_of(cols));
    let bytes = format.bytes(1, cols);
    assert_eq!((x.len() / cols, w.len() / bytes), (y.tokens, y.width));
    assert!(w.len().is_multiple_of(bytes));
    match format {
        Format::Bf16 => cpu.run(FloatProduct::<Bf16> { w, cols, x, y, format: PhantomData }),
        Format::F16 => cpu.run(FloatProduct::<F16> { w, cols, x, y, format: PhantomData }),
        Format::F32 => cpu.run(FloatProduct::<F32> { w, cols, x, y, format: PhantomData }),
        _ => panic!("{} is not a float format", format.name()),
    }
}

struct FloatProduct<'a, F> {
    w: &'a [u8],
    cols: usize,
    x: &'a [f32],
    y: Outputs<'a>,
    format: PhantomData<F>,
}

impl<F: Float> FloatProduct<'_, F> {
    /// R rows from `row`, M tokens from `token`.
    #[inline(always)]
    fn tile<S: Isa, const R: usize, const M: usize>(&mut self, s: S, row: usize, token: usize) {
        let row_bytes = self.cols * F::BYTES;
        let mut w: [&[u8]; R] = [&[]; R];
        for (r, w) in w.iter_mut().enumerate() {
            *w = &self.w[(row + r) * row_bytes..][..row_bytes];
        }
        let mut x: [&[f32]; M] = [&[]; M];
        for (m, x) in x.iter_mut().enumerate() {
            *x = &self.x[(token + m) * self.cols..][..self.cols];
        }
        let mut acc = [[s.splat(0.0); M]; R];
        let whole = self.cols / LANES * LANES;
        let mut k = 0;
        while k < whole {
            let mut xs = [s.splat(0.0); M];
            for m in 0..M {
                xs[m] = s.load(x[m][k..k + LANES].try_into().expect("16 elements"));
            }
            for r in 0..R {
                if (k * F::BYTES).is_multiple_of(64) {
                    // The same columns two tiles on: the hardware follows a row, and rows are too
                    // short for that to pay. One core of a Zen 5 reads bf16 rows of 2 and 5 KB at
                    // 29 and 32 GB/s with this, and at 19 without.
                    s.prefetch(self.w, (row + 2 * R + r) * row_bytes + k * F::BYTES);
                }
                let w = F::load(s, &w[r][k * F::BYTES..(k + LANES) * F::BYTES]);
                for m in 0..M {
                    acc[r][m] = s.fma(w, xs[m], acc[r][m]);
                }
            }
            k += LANES;
        }
        if whole < self.cols {
            for r in 0..R {
                let w = F::load_tail(s, &w[r][whole * F::BYTES..]);
                for m in 0..M {
                    acc[r][m] = s.fma(w, load_some(s, &x[m][whole..]), acc[r][m]);
                }
            }
        }
        for r in 0..R {
            for m in 0..M {
                let y = &mut self.y.rows[token + m][row + r];
                let before = if self.y.add { *y } else { 0.0 };
                *y = before + s.sum(acc[r][m]);
            }
        }
    }

    /// All rows for M tokens from `token`.
    #[inline(always)]
    fn rows<S: Isa, const M: usize>(&mut self, s: S, token: usize) {
        let rows = self.w.len() / (self.cols * F::BYTES);
        let mut row = 0;
        if S::FLOAT_TILE.0 >= 4 {
            while row + 4 <= rows {
                self.tile::<S, 4, M>(s, row, token);
                row += 4;
            }
        }
        while row + 2 <= rows {
            self.tile::<S, 2, M>(s, row, token);
            row += 2;
        }
        if row < rows {
            self.tile::<S, 1, M>(s, row, token);
        }
    }
}

impl<F: Float> Kernel for FloatProduct<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(mut self, s: S) {
        let tokens = self.x.len() / self.cols;
        let mut token = 0;
        while token < tokens {
            let m = (tokens - token).min(S::FLOAT_TILE.1);
            macro_rules! tiles {
                ($($m:literal)*) => {
                    match m {
                        $($m if $m <= S::FLOAT_TILE.1 => self.rows::<S, $m>(s, token),)*
                        _ => unreachable!("float tiles have at most four tokens"),
                    }
                };
            }
            tiles!(1 2 3 4);
            token += m;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::ABREAST;
    use crate::kernels::testing::{Made, Panels, assert_close, multiply, pack, random};
    use crate::quant::w4::SCALE_BYTES;
    use crate::quant::{BLOCK, GROUP, decode_row};
    use crate::simd::TILE_TOKENS;
    use half::{bf16, f16};

    #[test]
    fn packed_products_match_the_decoded_matrix() {
        for cpu in Cpu::all() {
            for made in Made::all() {
                for (rows, cols) in [(1, 1), (16, 64), (17, 160), (40, 256), (33, 1000)] {
                    let cols = made.cols(cols);
                    let Panels { format, bytes, decoded } = made.matrix(cpu, rows, cols, 5);
                    for tokens in 1..=TILE_TOKENS {
                        let x = random(tokens * cols, 6);
                        let mut tile = QuantTile::default();
                        tile.quantize(cpu, &x, cols);
                        let width = rows.next_multiple_of(PANEL_ROWS);
                        let mut y = vec![f32::NAN; tokens * width];
                        multiply(
                            cpu,
                            format,
                            &bytes,
                            cols,
                            &tile,
                            Reading::PLAIN,
                            Outputs::of(&mut y, width),
                        );
                        for t in 0..tokens {
                            let want: Vec<f64> = decoded
                                .chunks_exact(cols)
                                .map(|w| {
                                    let x = &x[t * cols..][..cols];
                                    w.iter()
                                        .zip(x)
                                        .map(|(w, x)| f64::from(*w) * f64::from(*x))
                                        .sum()
                                })
                                .collect();
                            // Each activation is off by at most half a step of absmax / 127
                            // <= 1 / 127. Scales and offsets of a weight, which may be larger than
                            // the weight, are added in f32.
                            let bound = |i: usize| {
                                let w = &decoded[i * cols..][..cols];
                                let total: f64 = w.iter().map(|w| f64::from(w.abs())).sum();
                                let largest =
                                    decoded.iter().fold(0.0f64, |m, w| m.max(f64::from(w.abs())));
                                total * (0.51 / 127.0 + 1e-6) + largest * cols as f64 * 1e-6
                            };
                            let what = format!("{cpu:?} {made:?} {rows}x{cols} token {t}");
                            assert_close(&y[t * width..][..rows], &want, bound, &what);
                            assert!(y[t * width + rows..(t + 1) * width].iter().all(|y| *y == 0.0));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn packed_products_have_the_same_bits_for_any_number_of_tokens_reading_and_fused_isa() {
        for made in Made::all() {
            // Twice as many panels as are read side by side, and one that is left over.
            let (rows, cols) = ((2 * ABREAST + 1) * PANEL_ROWS, made.cols(320));
            let Panels { format, bytes, .. } = made.matrix(Cpu::best(), rows, cols, 7);
            let mut first: Option<Vec<f32>> = None;
            for cpu in Cpu::all() {
                let tokens = TILE_TOKENS;
                let x = random(14 * cols, 8);
                let x = &x[..tokens * cols];
                let mut tile = QuantTile::default();
                tile.quantize(cpu, x, cols);
                let mut together = vec![0.0; tokens * rows];
                let out = Outputs::of(&mut together, rows);
                multiply(cpu, format, &bytes, cols, &tile, Reading::PLAIN, out);
                for few in 1..=tokens.min(5) {
                    tile.quantize(cpu, &x[..few * cols], cols);
                    for reading in Reading::all() {
                        let mut y = vec![0.0; few * rows];
                        let out = Outputs::of(&mut y, rows);
                        multiply(cpu, format, &bytes, cols, &tile, reading, out);
                        let what = format!("{cpu:?} {made:?} {few} tokens, {reading:?}");
                        assert_eq!(y, together[..few * rows], "{what}");
                    }
                }
                for (x, together) in x.chunks_exact(cols).zip(together.chunks_exact(rows)) {
                    tile.quantize(cpu, x, cols);
                    let mut alone = vec![0.0; rows];
                    let out = Outputs::of(&mut alone, rows);
                    multiply(cpu, format, &bytes, cols, &tile, Reading::PLAIN, out);
                    assert_eq!(alone, together, "{cpu:?} {made:?}");
                }
                // Where multiply-add is one rounding the bits do not depend on the CPU either.
                if cpu.name() != "portable" {
                    let first = first.get_or_insert_with(|| together[..rows].to_vec());
                    assert_eq!(first[..], together[..rows], "{cpu:?} {made:?}");
                }
            }
        }
    }

    /// A matrix of W5Planes as W8: eight times the codes, an eighth of the scales.
    fn five_bits_as_w8(planes: &[u8], cols: usize) -> Vec<u8> {
        let planes = Planes::new(Format::W5Planes, planes);
        let mut out = Vec::new();
        for (b, high) in planes.high.iter().enumerate() {
            let (scales, _) = high[..SCALE_BYTES].as_chunks();
            let scales: Vec<_> = scales.iter().map(|s| f16::from_le_bytes(*s).to_f32()).collect();
            out.extend(scales.iter().flat_map(|scale| f16::from_f32(scale / 8.0).to_le_bytes()));
            let (panel, block) = (b / cols.div_ceil(BLOCK), b % cols.div_ceil(BLOCK));
            let panel = planes.panels(panel..panel + 1, cols);
            for i in 0..BLOCK * PANEL_ROWS {
                let (row, col) = (i / 4 % PANEL_ROWS, i / 4 / PANEL_ROWS * 4 + i % 4);
                let scale = scales[col / GROUP * PANEL_ROWS + row];
                let number = if scale == 0.0 { 0.0 } else { panel.decode(block, row, col) / scale };
                assert!(number.fract() == 0.0 && (-16.0..16.0).contains(&number), "{number}");
                out.push((128 + 8 * number as i32) as u8);
            }
        }
        out
    }

    #[test]
    fn two_planes_have_the_bits_of_w8() {
        for (cpu, format) in Cpu::all()
            .into_iter()
            .flat_map(|cpu| [Format::W8Planes, Format::W5Planes].map(|format| (cpu, format)))
        {
            for (rows, cols) in [(1, 1), (16, 64), (33, 200), (80, 1024)] {
                let w = random(rows * cols, 12);
                let planes = pack(cpu, format, &w, cols);
                let whole = match format {
                    Format::W8Planes => pack(cpu, Format::W8, &w, cols),
                    _ => five_bits_as_w8(&planes, cols),
                };
                for tokens in 1..=TILE_TOKENS {
                    // All signs of the largest code, and values in between.
                    let mut x = random(tokens * cols, 13);
                    x[..cols.min(64)].fill(1.0);
                    x[tokens * cols - 1] = -1.0;
                    let mut tile = QuantTile::default();
                    tile.quantize(cpu, &x, cols);
                    let mut y = [(); 2].map(|_| vec![0.0; tokens * rows.next_multiple_of(16)]);
                    let [first, second] =
                        y.each_mut().map(|y| Outputs::of(y, rows.next_multiple_of(16)));
                    multiply(cpu, Format::W8, &whole, cols, &tile, Reading::PLAIN, first);
                    multiply(cpu, format, &planes, cols, &tile, Reading::PLAIN, second);
                    let what = format!("{cpu:?} {format:?} {rows}x{cols}, {tokens} tokens");
                    assert_eq!(y[0], y[1], "{what}");
                }
            }
        }
    }

    #[test]
    fn codes_reconstruct_weights_within_a_step_or_so() {
        for cpu in Cpu::all() {
            for (format, steps) in [(Format::W4, 7.0), (Format::W8, 127.0)] {
                let (rows, cols) = (16, 96);
                let mut w = random(rows * cols, 9);
                w[..32].fill(0.0);
                w[96..128].fill(1e-9);
                w[192] = 1000.0;
                let matrix = pack(cpu, format, &w, cols);
                for (row, w) in w.chunks_exact(cols).enumerate() {
                    let mut out = vec![0.0; cols];
                    decode_row(format, &matrix, cols, row, &mut out);
                    for (w, out) in w.chunks(32).zip(out.chunks(32)) {
                        let largest = w.iter().fold(0.0f32, |m, w| m.max(w.abs()));
                        let step = largest / steps;
                        if format == Format::W8 {
                            // The search explains at least what the scale largest / 127 does, which
                            // is off by half a step at most.
                            let squares = w.iter().zip(out).map(|(w, out)| (w - out).powi(2));
                            let off = (squares.sum::<f32>() / w.len() as f32).sqrt();
                            assert!(off <= (0.51 * step).max(1e-8), "{cpu:?} {off} of {step}");
                        }
                        // Half a step, and a little where cutting an extreme pays.
                        let bound = step * if format == Format::W4 { 1.2 } else { 0.6 };
                        for (w, out) in w.iter().zip(out) {
                            assert!(
                                (w - out).abs() <= bound.max(1e-8),
                                "{cpu:?} {format:?} {w} {out}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn float_products_match_f64() {
        for cpu in Cpu::all() {
            for format in [Format::Bf16, Format::F16, Format::F32] {
                for (rows, cols, tokens) in
                    [(1, 1, 1), (3, 15, 2), (5, 16, 7), (9, 100, 13), (4, 257, 6)]
                {
                    let values = random(rows * cols, 10);
                    // An odd first byte: the file promises no alignment.
                    let mut w = vec![0u8];
                    let mut stored = Vec::new();
                    for v in &values {
                        match format {
                            Format::Bf16 => {
                                let v = bf16::from_f32(*v);
                                w.extend(v.to_le_bytes());
                                stored.push(v.to_f32());
                            }
                            Format::F16 => {
                                let v = f16::from_f32(*v);
                                w.extend(v.to_le_bytes());
                                stored.push(v.to_f32());
                            }
                            _ => {
                                w.extend(v.to_le_bytes());
                                stored.push(*v);
                            }
                        }
                    }
                    let x = random(tokens * cols, 11);
                    let mut y = vec![f32::NAN; tokens * rows];
                    float(cpu, format, &w[1..], cols, &x, Outputs::of(&mut y, rows));
                    for (t, x) in x.chunks_exact(cols).enumerate() {
                        let terms = |r: usize| stored[r * cols..][..cols].iter().zip(x);
                        let want: Vec<f64> = (0..rows)
                            .map(|r| terms(r).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum())
                            .collect();
                        let bound = |r: usize| {
                            let size: f64 = terms(r).map(|(w, x)| f64::from((w * x).abs())).sum();
                            size * cols as f64 * f64::from(f32::EPSILON) + 1e-12
                        };
                        let what = format!("{cpu:?} {format:?} {rows}x{cols} token {t}");
                        assert_close(&y[t * rows..][..rows], &want, bound, &what);
                    }
                    let mut alone = vec![0.0; rows];
                    float(cpu, format, &w[1..], cols, &x[..cols], Outputs::of(&mut alone, rows));
                    assert_eq!(alone, y[..rows], "{cpu:?}: one token has the bits of many");
                }
            }
        }
    }
}
