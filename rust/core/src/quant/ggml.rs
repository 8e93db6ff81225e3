//! The block types of GGUF files, as ggml defines them.
//!
//! A row is cut into blocks of 32 or 256 columns, stored one after the other; a matrix is its rows.
//! Blocks have any address: fields are read byte by byte.

/// How the numbers of a block are coded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
    Mxfp4,
}

impl BlockType {
    pub const ALL: [BlockType; 13] = [
        BlockType::Q4_0,
        BlockType::Q4_1,
        BlockType::Q5_0,
        BlockType::Q5_1,
        BlockType::Q8_0,
        BlockType::Q2K,
        BlockType::Q3K,
        BlockType::Q4K,
        BlockType::Q5K,
        BlockType::Q6K,
        BlockType::Iq4Nl,
        BlockType::Iq4Xs,
        BlockType::Mxfp4,
    ];

    /// Name as GGUF tools spell it, the same in small letters, id in a file, columns and bytes of a
    /// block.
    const fn facts(self) -> (&'static str, &'static str, u32, usize, usize) {
        match self {
            BlockType::Q4_0 => ("Q4_0", "q4_0", 2, 32, 18),
            BlockType::Q4_1 => ("Q4_1", "q4_1", 3, 32, 20),
            BlockType::Q5_0 => ("Q5_0", "q5_0", 6, 32, 22),
            BlockType::Q5_1 => ("Q5_1", "q5_1", 7, 32, 24),
            BlockType::Q8_0 => ("Q8_0", "q8_0", 8, 32, 34),
            BlockType::Q2K => ("Q2_K", "q2_k", 10, 256, 84),
            BlockType::Q3K => ("Q3_K", "q3_k", 11, 256, 110),
            BlockType::Q4K => ("Q4_K", "q4_k", 12, 256, 144),
            BlockType::Q5K => ("Q5_K", "q5_k", 13, 256, 176),
            BlockType::Q6K => ("Q6_K", "q6_k", 14, 256, 210),
            BlockType::Iq4Nl => ("IQ4_NL", "iq4_nl", 20, 32, 18),
            BlockType::Iq4Xs => ("IQ4_XS", "iq4_xs", 23, 256, 136),
            BlockType::Mxfp4 => ("MXFP4", "mxfp4", 39, 32, 17),
        }
    }

    /// As GGUF tools spell it, like `Q4_K`.
    pub const fn name(self) -> &'static str {
        self.facts().0
    }

    /// The name in small letters, as a matrix format of this program.
    pub const fn format_name(self) -> &'static str {
        self.facts().1
    }

    /// In the tensor table of a GGUF file.
    pub const fn id(self) -> u32 {
        self.facts().2
    }

    /// Columns of a block.
    pub const fn cols(self) -> usize {
        self.facts().3
    }

    /// Bytes of a block.
    pub const fn bytes(self) -> usize {
        self.facts().4
    }

    /// Bytes of a row of `cols` columns, a multiple of [`BlockType::cols`].
    pub fn row_bytes(self, cols: usize) -> usize {
        debug_assert!(cols.is_multiple_of(self.cols()));
        cols / self.cols() * self.bytes()
    }
}
