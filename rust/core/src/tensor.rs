//! Dtypes, shapes, and bytes that keep their owner alive.

use crate::error::{Error, Result, short};
use crate::quant::{BlockType, Format, fp8};
use half::{bf16, f16};
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

/// Type of a tensor's elements in a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dtype {
    Bf16,
    F16,
    F32,
    /// With scales beside it, see [`fp8`].
    Fp8,
    U8,
    /// Blocks of a GGUF file.
    Blocks(BlockType),
}

impl Dtype {
    /// Bytes of `elements` elements; of blocks there must be a whole number.
    pub fn bytes(self, elements: usize) -> usize {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2 * elements,
            Dtype::F32 => 4 * elements,
            Dtype::Fp8 | Dtype::U8 => elements,
            Dtype::Blocks(block) => block.row_bytes(elements),
        }
    }

    /// As safetensors or GGUF tools spell it.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::Bf16 => "BF16",
            Dtype::F16 => "F16",
            Dtype::F32 => "F32",
            Dtype::Fp8 => "F8_E4M3",
            Dtype::U8 => "U8",
            Dtype::Blocks(block) => block.name(),
        }
    }

    /// The float type that config.json calls `name`.
    pub fn float(name: &str) -> Result<Dtype> {
        match name {
            "bfloat16" => Ok(Dtype::Bf16),
            "float16" => Ok(Dtype::F16),
            "float32" => Ok(Dtype::F32),
            _ => Err(Error::Unsupported(format!(
                "config.json: `dtype` is \"{}\", expected bfloat16, float16 or float32",
                short(name)
            ))),
        }
    }

    pub fn is_float(self) -> bool {
        matches!(self, Dtype::Bf16 | Dtype::F16 | Dtype::F32 | Dtype::Fp8)
    }

    /// The matrix format of these elements, if they are numbers.
    pub fn format(self) -> Option<Format> {
        match self {
            Dtype::Bf16 => Some(Format::Bf16),
            Dtype::F16 => Some(Format::F16),
            Dtype::F32 => Some(Format::F32),
            Dtype::Fp8 => Some(Format::Fp8),
            Dtype::U8 => None,
            Dtype::Blocks(block) => Some(Format::Blocks(block)),
        }
    }
}

/// Read-only bytes of a mapping or of the heap. A clone shares them.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl Bytes {
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Bytes {
        let range = 0..(*owner).as_ref().len();
        Bytes { owner, range }
    }

    /// A part of these bytes. Panics if it lies outside.
    pub fn slice(&self, range: Range<usize>) -> Bytes {
        assert!(range.start <= range.end && range.end <= self.range.len());
        let start = self.range.start;
        Bytes { owner: self.owner.clone(), range: start + range.start..start + range.end }
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Bytes {
        Bytes::new(Arc::new(bytes))
    }
}

impl From<AlignedBuf> for Bytes {
    fn from(bytes: AlignedBuf) -> Bytes {
        Bytes::new(Arc::new(bytes))
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Heap bytes that start at a cache line.
#[derive(Default)]
pub struct AlignedBuf {
    lines: Vec<Line>,
    len: usize,
}

impl AlignedBuf {
    /// `len` zeros.
    pub fn new(len: usize) -> AlignedBuf {
        AlignedBuf { lines: vec![Line([0; 64]); len.div_ceil(64)], len }
    }

    /// `len` zeros, or an error if there is no memory for them.
    pub fn try_new(len: usize) -> Result<AlignedBuf> {
        Ok(AlignedBuf { lines: filled(Line([0; 64]), len.div_ceil(64))?, len })
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: a `Line` is 64 bytes without padding, and `len` is at most 64 a line.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and the lines are borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// An array of a file.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Bytes,
    /// Of the blocks of an FP8 matrix: floats [rows / 128, cols / 128], rounded up.
    pub scales: Option<Arc<Tensor>>,
}

impl Tensor {
    /// Number of elements. The shape was checked against the bytes when the tensor was made.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The elements as f32. Panics if they are no floats.
    pub fn to_f32(&self) -> Vec<f32> {
        let cols = self.shape.last().copied().unwrap_or(1);
        let mut out = vec![0.0; self.elements()];
        self.widen_rows(cols, 0, &mut out);
        out
    }

    /// Some rows of `cols` columns as f32, from `first`. Panics if the elements are no numbers.
    pub fn widen_rows(&self, cols: usize, first: usize, out: &mut [f32]) {
        let format = self.dtype.format().expect("a tensor of numbers");
        widen_rows(format, &self.bytes, self.scales.as_deref(), cols, first, out);
    }
}

/// `n` copies of a value, or an error if there is no memory for them.
pub(crate) fn filled<T: Clone>(value: T, n: usize) -> Result<Vec<T>> {
    let mut filled = Vec::new();
    filled.try_reserve_exact(n).map_err(|_| Error::Memory { bytes: n * size_of::<T>() })?;
    filled.resize(n, value);
    Ok(filled)
}

/// Changes the length of a buffer without room to spare, as its plan counts it. New elements are zero.
pub(crate) fn resize(buffer: &mut Vec<f32>, n: usize) {
    buffer.reserve_exact(n.saturating_sub(buffer.len()));
    buffer.resize(n, 0.0);
}

/// Some rows of a matrix as f32: those of `cols` columns, from `first`, that fill `out`.
pub fn widen_rows(
    format: Format,
    bytes: &[u8],
    scales: Option<&Tensor>,
    cols: usize,
    first: usize,
    out: &mut [f32],
) {
    assert!(cols > 0 && out.len().is_multiple_of(cols));
    let row_bytes = format.bytes(1, cols);
    widen(format, &bytes[first * row_bytes..][..out.len() / cols * row_bytes], out);
    let Some(scales) = scales else { return };
    let blocks = cols.div_ceil(fp8::BLOCK);
    let mut of_row = vec![0.0; blocks];
    for (row, out) in out.chunks_exact_mut(cols).enumerate() {
        scales.widen_rows(blocks, (first + row) / fp8::BLOCK, &mut of_row);
        for (out, scale) in out.chunks_mut(fp8::BLOCK).zip(&of_row) {
            out.iter_mut().for_each(|x| *x *= scale);
        }
    }
}

/// Converts little-endian floats, codes of FP8 without their scales, or blocks of a GGUF file, to
/// f32. bytes: as many elements as `out` has.
pub fn widen(format: Format, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), format.bytes(1, out.len()));
    match format {
        Format::Bf16 => {
            for (out, x) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = bf16::from_le_bytes(*x).to_f32();
            }
        }
        Format::F16 => {
            for (out, x) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f16::from_le_bytes(*x).to_f32();
            }
        }
        Format::F32 => {
            for (out, x) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_le_bytes(*x);
            }
        }
        Format::Fp8 => {
            for (out, code) in out.iter_mut().zip(bytes) {
                *out = fp8::value(*code);
            }
        }
        Format::Blocks(block) => block.decode(bytes, out),
        _ => panic!("{} has no elements to widen", format.name()),
    }
}
