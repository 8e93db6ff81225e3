//! The start of a GGUF file, version 3, as [`super::gguf`] describes it.

use crate::tensor::Dtype;

/// Tensors start at multiples of this.
pub const ALIGNMENT: usize = 32;
const VERSION: u32 = 3;

/// A value of the metadata, in the type that programs expect of its key.
#[derive(Clone, PartialEq, Debug)]
pub enum Entry {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Bools(Vec<bool>),
    I32s(Vec<i32>),
    Texts(Vec<String>),
}

/// A tensor to be written.
pub struct TensorInfo {
    pub name: String,
    pub dtype: Dtype,
    /// Slowest axis first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    pub fn bytes(&self) -> usize {
        self.dtype.bytes(self.shape.iter().product())
    }
}

/// The bytes before the data, padded to [`ALIGNMENT`]. Tensors follow in this order, each padded so.
pub fn header(entries: &[(String, Entry)], tensors: &[TensorInfo]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((entries.len() as u64).to_le_bytes());
    for (key, entry) in entries {
        put_text(&mut out, key);
        put_entry(&mut out, entry);
    }
    let mut offset = 0;
    for tensor in tensors {
        put_text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        for size in tensor.shape.iter().rev() {
            out.extend((*size as u64).to_le_bytes());
        }
        out.extend(type_id(tensor.dtype).to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset += tensor.bytes().next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    out
}

fn type_id(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Bf16 => 30,
        Dtype::Blocks(block) => block.id(),
        Dtype::Fp8 | Dtype::U8 => panic!("GGUF has no {}", dtype.name()),
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_entry(out: &mut Vec<u8>, entry: &Entry) {
    const ARRAY: u32 = 9;
    let (kind, array) = match entry {
        Entry::U32(_) => (4u32, None),
        Entry::F32(_) => (6, None),
        Entry::Bool(_) => (7, None),
        Entry::Text(_) => (8, None),
        Entry::Bools(values) => (7, Some(values.len())),
        Entry::I32s(values) => (5, Some(values.len())),
        Entry::Texts(values) => (8, Some(values.len())),
    };
    if let Some(count) = array {
        out.extend(ARRAY.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((count as u64).to_le_bytes());
    } else {
        out.extend(kind.to_le_bytes());
    }
    match entry {
        Entry::U32(x) => out.extend(x.to_le_bytes()),
        Entry::F32(x) => out.extend(x.to_le_bytes()),
        Entry::Bool(x) => out.push(u8::from(*x)),
        Entry::Text(text) => put_text(out, text),
        Entry::Bools(values) => out.extend(values.iter().map(|x| u8::from(*x))),
        Entry::I32s(values) => values.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Entry::Texts(values) => values.iter().for_each(|text| put_text(out, text)),
    }
}
