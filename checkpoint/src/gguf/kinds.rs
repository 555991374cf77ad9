//! How GGUF stores numbers: names, block lengths and block sizes.

/// A storage type of ggml.
///
/// # Source
/// `ggml.h` (`enum ggml_type`) and `ggml-common.h` (block structures).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
#[allow(non_camel_case_types)]
pub enum TensorKind {
    F32,
    F16,
    BF16,
    F64,
    I8,
    I16,
    I32,
    I64,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q8_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_K,
    IQ1_S,
    IQ1_M,
    IQ2_XXS,
    IQ2_XS,
    IQ2_S,
    IQ3_XXS,
    IQ3_S,
    IQ4_NL,
    IQ4_XS,
    TQ1_0,
    TQ2_0,
    MXFP4,
}

impl TensorKind {
    /// The type with the number that files use; `None` for numbers never given or withdrawn.
    pub fn from_id(id: u32) -> Option<Self> {
        use TensorKind::*;
        Some(match id {
            0 => F32,
            1 => F16,
            2 => Q4_0,
            3 => Q4_1,
            6 => Q5_0,
            7 => Q5_1,
            8 => Q8_0,
            9 => Q8_1,
            10 => Q2_K,
            11 => Q3_K,
            12 => Q4_K,
            13 => Q5_K,
            14 => Q6_K,
            15 => Q8_K,
            16 => IQ2_XXS,
            17 => IQ2_XS,
            18 => IQ3_XXS,
            19 => IQ1_S,
            20 => IQ4_NL,
            21 => IQ3_S,
            22 => IQ2_S,
            23 => IQ4_XS,
            24 => I8,
            25 => I16,
            26 => I32,
            27 => I64,
            28 => F64,
            29 => IQ1_M,
            30 => BF16,
            34 => TQ1_0,
            35 => TQ2_0,
            39 => MXFP4,
            _ => return None,
        })
    }

    /// The number that files use for it.
    pub fn id(self) -> u32 {
        // Every type has a number below 40: a test goes through them.
        (0..40).find(|id| Self::from_id(*id) == Some(self)).unwrap_or(u32::MAX)
    }

    /// Values of one block, and its bytes.
    pub fn block(self) -> (usize, usize) {
        use TensorKind::*;
        match self {
            F32 | I32 => (1, 4),
            F16 | BF16 | I16 => (1, 2),
            F64 | I64 => (1, 8),
            I8 => (1, 1),
            Q4_0 | IQ4_NL => (32, 18),
            Q4_1 => (32, 20),
            Q5_0 => (32, 22),
            Q5_1 => (32, 24),
            Q8_0 => (32, 34),
            Q8_1 => (32, 36),
            MXFP4 => (32, 17),
            Q2_K => (256, 84),
            Q3_K | IQ3_S => (256, 110),
            Q4_K => (256, 144),
            Q5_K => (256, 176),
            Q6_K => (256, 210),
            Q8_K => (256, 292),
            IQ1_S => (256, 50),
            IQ1_M => (256, 56),
            IQ2_XXS | TQ2_0 => (256, 66),
            IQ2_XS => (256, 74),
            IQ2_S => (256, 82),
            IQ3_XXS => (256, 98),
            IQ4_XS => (256, 136),
            TQ1_0 => (256, 54),
        }
    }

    /// Whether it stores integers or 64-bit numbers: tables and positions, never weights.
    pub fn is_no_weight(self) -> bool {
        use TensorKind::*;
        matches!(self, F64 | I8 | I16 | I32 | I64)
    }
}

impl std::fmt::Display for TensorKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_both_ways() {
        let kinds: Vec<TensorKind> = (0..200).filter_map(TensorKind::from_id).collect();
        assert_eq!(kinds.len(), 32);
        assert!(kinds.iter().all(|kind| TensorKind::from_id(kind.id()) == Some(*kind)));
    }
}
