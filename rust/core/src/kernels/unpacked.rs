//! Matrix products with many tokens.
//!
//! For a few tokens a product is as fast as its weights come from memory, and takes their codes apart on the
//! way. Many tokens read the same weights again for each tile, and would take them apart each time: so a few
//! panels at once are unpacked to a byte a code and an f32 a factor, and stay in a cache while all tiles
//! pass. With AVX2 a core of a Zen 4 then multiplies prompts of 0.8B balanced in 0.72 of the time, w4 in 0.89;
//! with AVX-512 it takes as long as before.
//!
//! The operations on sums, and so the bits, are those of [`super::matmul::packed`].

use super::outputs::Outputs;
use super::quantize::QuantTile;
use super::{Ask, ahead_in_panels, ask_ahead};
use crate::quant::two_planes::{HIGH_BYTES, InPlanes, Planes};
use crate::quant::{
    BLOCK, Format, GROUP, GROUP_STEPS, Group, Layout, Lines, PANEL_ROWS, Packed, STEP,
    UnpackedGroup, add_offsets, panel_bytes, w4, with_packed, with_planes,
};
use crate::simd::{Cpu, Isa, Kernel, LANES, Starts, TILE_TOKENS, unpack};
use std::marker::PhantomData;

/// Whole panels with a byte for each code.
pub struct Unpacked {
    layout: Option<Layout>,                       // set by the first panels
    groups: usize,                                // of a panel
    codes: Vec<Lines<[[u8; STEP]; GROUP_STEPS]>>, // by panel and group
    factors: Vec<Lines<[f32; LANES]>>,            // as many for each group as the layout has
    units: Vec<[f32; LANES]>,                     // by panel
}

/// How panels of a format lie when they are unpacked; none if they cannot be.
pub fn layout(format: Format) -> Option<Layout> {
    if format.is_in_planes() {
        return Some(with_planes!(format, P => Layout::Scaled { bits: P::BITS }));
    }
    with_packed!(format, P => P::LAYOUT)
}

/// Groups that are unpacked at once, if a panel has no more: 400 KB, which lie in the second level of caches
/// beside a tile of activations.
const GROUPS: usize = 640;
/// The most factors of a row in a group.
const MOST_FACTORS: usize = 2;

/// Panels of `cols` columns to unpack at once.
pub fn panels_at_once(cols: usize) -> usize {
    (GROUPS / cols.div_ceil(GROUP)).max(1)
}

impl Default for Unpacked {
    fn default() -> Self {
        Unpacked {
            layout: None,
            groups: 0,
            codes: Vec::with_capacity(GROUPS),
            factors: Vec::with_capacity(MOST_FACTORS * GROUPS),
            units: Vec::with_capacity(GROUPS),
        }
    }
}

impl Unpacked {
    /// Bytes on the heap for panels of up to `cols` columns, as many as [`panels_at_once`].
    pub fn bytes_of(cols: usize) -> usize {
        let groups = GROUPS.max(cols.div_ceil(GROUP));
        groups * (STEP * GROUP_STEPS + 4 * LANES * MOST_FACTORS) + GROUPS * 4 * LANES
    }

    /// Takes whole panels of `cols` columns, in one plane. ask: for them, ahead of their use.
    ///
    /// Panics if the lengths disagree or the format has no layout.
    pub fn set(&mut self, cpu: Cpu, format: Format, panels: &[u8], cols: usize, ask: Ask) {
        let bytes = panel_bytes(format, cols);
        assert!(panels.len().is_multiple_of(bytes));
        with_packed!(format, P => {
            let groups = P::blocks(&panels[..bytes]).len() * P::GROUPS;
            self.resize(P::LAYOUT.expect("the format has a layout"), panels.len() / bytes, groups);
            for (units, panel) in self.units.iter_mut().zip(panels.chunks_exact(bytes)) {
                *units = std::array::from_fn(|row| P::unit(panel, row));
            }
            cpu.run(Unpack::<P> { panels, bytes, ask, out: self, format: PhantomData });
        });
    }

    /// As [`Unpacked::set`], of panels in two planes.
    pub fn set_planes(&mut self, cpu: Cpu, planes: Planes<'_>, cols: usize, ask: Ask) {
        let blocks = cols.div_ceil(BLOCK);
        assert!(planes.high.len().is_multiple_of(blocks));
        with_planes!(planes.format, P => {
            let layout = Layout::Scaled { bits: P::BITS };
            self.resize(layout, planes.high.len() / blocks, blocks * BLOCK / GROUP);
            self.units.fill([1.0; LANES]);
            cpu.run(UnpackPlanes::<P> { planes, ask, out: self, format: PhantomData });
        });
    }

    fn resize(&mut self, layout: Layout, panels: usize, groups: usize) {
        (self.layout, self.groups) = (Some(layout), groups);
        self.codes.resize(panels * groups, Lines([[0; STEP]; GROUP_STEPS]));
        self.factors.resize(panels * groups * layout.factors(), Lines([0.0; LANES]));
        self.units.resize(panels, [1.0; LANES]);
    }

    /// Where the groups go, in their order.
    fn places(&mut self) -> impl Iterator<Item = UnpackedGroup<'_>> {
        let factors = self.layout.map_or(1, Layout::factors);
        let factors = self.factors.chunks_exact_mut(factors);
        self.codes
            .iter_mut()
            .zip(factors)
            .map(|(codes, factors)| UnpackedGroup { codes: &mut codes.0, factors })
    }
}

struct Unpack<'a, P> {
    panels: &'a [u8],
    bytes: usize,
    ask: Ask,
    out: &'a mut Unpacked,
    format: PhantomData<P>,
}

impl<P: Packed> Kernel for Unpack<'_, P> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let size = size_of::<P::Block>();
        let mut places = self.out.places();
        for (p, panel) in self.panels.chunks_exact(self.bytes).enumerate() {
            for (i, block) in P::blocks(panel).iter().enumerate() {
                let from = ahead_in_panels(p, self.bytes, i * size, 1);
                for g in 0..P::GROUPS {
                    ask_ahead(s, self.ask, self.panels, from, size, (g, P::GROUPS));
                    P::unpack(s, block, g, places.next().expect("a place for each group"));
                }
            }
        }
    }
}

struct UnpackPlanes<'a, P> {
    planes: Planes<'a>,
    ask: Ask,
    out: &'a mut Unpacked,
    format: PhantomData<P>,
}

impl<P: InPlanes> Kernel for UnpackPlanes<'_, P> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let Planes { high, low, .. } = self.planes;
        let mut places = self.out.places();
        for (i, (block, low_block)) in high.iter().zip(low.chunks_exact(P::LOW_BYTES)).enumerate() {
            for g in 0..BLOCK / GROUP {
                let ask = |plane: &[u8], size: usize| {
                    let from = ahead_in_panels(i, size, 0, 1);
                    ask_ahead(s, self.ask, plane, from, size, (g, BLOCK / GROUP));
                };
                ask(high.as_flattened(), HIGH_BYTES);
                ask(low, P::LOW_BYTES);
                let place = places.next().expect("a place for each group");
                let codes = unpack(s, P::codes((block, low_block), g));
                place.put(s, codes, [w4::scales(s, block, g)]);
            }
        }
    }
}

/// Product of unpacked panels with the tokens of a tile.
///
/// y: a row of up to 16 for each panel, for each token. Panics if the lengths disagree.
pub fn product(cpu: Cpu, panels: &Unpacked, x: &QuantTile, y: Outputs<'_>) {
    y.check(x.tokens(), panels.units.len());
    macro_rules! run {
        ($layout:ty) => {
            cpu.run(Product::<$layout> { panels, x, y, layout: PhantomData })
        };
    }
    match panels.layout.expect("panels were unpacked") {
        Layout::Scaled { bits: 4 } => run!(Scaled<4>),
        Layout::Scaled { bits: 5 } => run!(Scaled<5>),
        Layout::Scaled { bits: 6 } => run!(Scaled<6>),
        Layout::Scaled { .. } => run!(Scaled<8>),
        Layout::ScaledHalves => run!(ScaledHalves),
        Layout::Affine { bits: 4 } => run!(Affine<4>),
        Layout::Affine { .. } => run!(Affine<5>),
    }
}

/// A [`Layout`] as the products see it.
trait Terms {
    const FACTORS: usize;

    /// acc += the products of a group with M tokens.
    fn add<S: Isa, const M: usize>(
        s: S,
        codes: &[[u8; STEP]; GROUP_STEPS],
        factors: &[Lines<[f32; LANES]>],
        x: Group<'_, M>,
        acc: &mut [S::F; M],
    );
}

struct Scaled<const BITS: u32>;
struct ScaledHalves;
struct Affine<const BITS: u32>;

impl<const BITS: u32> Terms for Scaled<BITS> {
    const FACTORS: usize = 1;

    #[inline(always)]
    fn add<S: Isa, const M: usize>(
        s: S,
        codes: &[[u8; STEP]; GROUP_STEPS],
        factors: &[Lines<[f32; LANES]>],
        x: Group<'_, M>,
        acc: &mut [S::F; M],
    ) {
        let scales = (s.load(&factors[0].0), x.scales);
        s.add_codes::<BITS, _, M>(codes, x.codes, x.starts_at_zero_of(BITS), scales, acc);
    }
}

impl Terms for ScaledHalves {
    const FACTORS: usize = 2;

    #[inline(always)]
    fn add<S: Isa, const M: usize>(
        s: S,
        codes: &[[u8; STEP]; GROUP_STEPS],
        factors: &[Lines<[f32; LANES]>],
        x: Group<'_, M>,
        acc: &mut [S::F; M],
    ) {
        const HALF: usize = GROUP_STEPS / 2;
        let (codes, x_codes) = (codes.as_chunks::<HALF>().0, x.codes.as_chunks().0);
        for half in 0..2 {
            let scales = (s.load(&factors[half].0), x.scales);
            let starts = x.starts_of_half(half);
            s.add_codes::<6, HALF, M>(&codes[half], &x_codes[half], starts, scales, acc);
        }
    }
}

impl<const BITS: u32> Terms for Affine<BITS> {
    const FACTORS: usize = 2;

    #[inline(always)]
    fn add<S: Isa, const M: usize>(
        s: S,
        codes: &[[u8; STEP]; GROUP_STEPS],
        factors: &[Lines<[f32; LANES]>],
        x: Group<'_, M>,
        acc: &mut [S::F; M],
    ) {
        let scales = (s.load(&factors[0].0), x.scales);
        s.add_codes::<BITS, _, M>(codes, x.codes, Starts::ZERO, scales, acc);
        add_offsets(s, s.load(&factors[1].0), x.totals, acc);
    }
}

struct Product<'a, L> {
    panels: &'a Unpacked,
    x: &'a QuantTile,
    y: Outputs<'a>,
    layout: PhantomData<L>,
}

impl<L: Terms> Product<'_, L> {
    /// For M tokens, which are all.
    #[inline(always)]
    fn tokens<S: Isa, const M: usize>(&mut self, s: S) {
        let Unpacked { groups, codes, factors, units, .. } = self.panels;
        let panels = codes.chunks_exact(*groups).zip(factors.chunks_exact(groups * L::FACTORS));
        for (p, ((codes, factors), units)) in panels.zip(units).enumerate() {
            let mut acc = [s.splat(0.0); M];
            let groups = codes.iter().zip(factors.chunks_exact(L::FACTORS));
            for ((codes, factors), x) in groups.zip(self.x.groups::<M>().blocks(1)) {
                L::add(s, &codes.0, factors, x.get(0), &mut acc);
            }
            let units = s.load(units);
            for m in 0..M {
                self.y.put(s, m, p * PANEL_ROWS, s.mul(acc[m], units));
            }
        }
    }
}

impl<L: Terms> Kernel for Product<'_, L> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(mut self, s: S) {
        macro_rules! tokens {
            ($($m:literal)*) => {
                match self.x.tokens() {
                    0 => {}
                    $($m => self.tokens::<S, $m>(s),)*
                    m => panic!("a tile of {m} tokens, the limit is {TILE_TOKENS}"),
                }
            };
        }
        tokens!(1 2 3 4 5 6 7 8 9 10 11 12);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{Made, Panels, random, unpack};
    use crate::kernels::{FEW_TOKENS, Reading, matmul};

    #[test]
    fn unpacked_products_have_the_bits_of_packed_ones() {
        for cpu in Cpu::all() {
            for made in Made::all().filter(|made| layout(made.format()).is_some()) {
                for (rows, cols) in [(1, 1), (40, 256), (33, 1000)] {
                    let cols = made.cols(cols);
                    let Panels { format, bytes, .. } = made.matrix(cpu, rows, cols, 5);
                    let unpacked = unpack(cpu, format, &bytes, cols, Ask::ToL2);
                    for tokens in 1..=FEW_TOKENS {
                        let mut tile = QuantTile::default();
                        tile.quantize(cpu, &random(tokens * cols, 6), cols);
                        // Products are added to what is there, or replace it.
                        for add in [false, true] {
                            let width = rows.next_multiple_of(PANEL_ROWS);
                            let mut y = [(); 2].map(|()| random(tokens * width, 7));
                            let [want, got] =
                                y.each_mut().map(|y| Outputs::new(y.chunks_exact_mut(width), add));
                            matmul::packed(cpu, format, &bytes, cols, &tile, Reading::PLAIN, want);
                            product(cpu, &unpacked, &tile, got);
                            assert_eq!(y[0], y[1], "{cpu:?} {made:?} {rows}x{cols}, {tokens}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn work_space_of_one_matrix_serves_the_next() {
        let cpu = Cpu::best();
        let mut unpacked = Unpacked::default();
        for (format, rows, cols) in
            [(Format::W5K, 48, 512), (Format::W4R, 16, 256), (Format::W6K, 32, 256)]
        {
            let made = Made::Encoded(format);
            let Panels { bytes, .. } = made.matrix(cpu, rows, cols, 8);
            let mut tile = QuantTile::default();
            tile.quantize(cpu, &random(3 * cols, 9), cols);
            let mut y = [(); 2].map(|()| vec![f32::NAN; 3 * rows]);
            let [want, got] = y.each_mut().map(|y| Outputs::of(y, rows));
            matmul::packed(cpu, format, &bytes, cols, &tile, Reading::PLAIN, want);
            unpacked.set(cpu, format, &bytes, cols, Ask::No);
            product(cpu, &unpacked, &tile, got);
            assert_eq!(y[0], y[1], "{format:?}");
        }
    }
}
