//! How products are computed: instruction set and accuracy.

use std::sync::OnceLock;

use crate::error::KernelError;

/// Environment variable that names the instruction set to use.
pub const ISA_VARIABLE: &str = "MOE_MERGE_ISA";

/// Instruction sets that kernels are written for, from the plainest to the richest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust that any processor runs.
    Portable,
    /// 128-bit vectors of 64-bit Arm.
    Neon,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with the dot products of AVX512-BF16.
    Avx512Bf16,
}

impl Isa {
    /// All of them.
    pub const ALL: [Isa; 5] = [Isa::Portable, Isa::Neon, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];

    /// Its name, as [`ISA_VARIABLE`] takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
        }
    }

    /// Whether this processor has it.
    pub fn available(self) -> bool {
        match self {
            Isa::Portable => true,
            Isa::Neon => cfg!(target_arch = "aarch64"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Isa::Avx512.available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The fastest one of this processor.
    ///
    /// Its richest, but on Intel's, which do one dot product of AVX512-BF16 in the time of four multiply-adds of AVX-512:
    /// half of what those do (measured on Sapphire Rapids; AMD's do one in the time of one).
    pub fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let fast = |isa: &Isa| *isa != Isa::Avx512Bf16 || !made_by(b"GenuineIntel");
            let mut sets = Isa::ALL.into_iter().rev().filter(fast);
            sets.find(|isa| isa.available()).unwrap_or(Isa::Portable)
        })
    }

    /// The one that [`ISA_VARIABLE`] names, or the best.
    ///
    /// # Errors
    /// [`KernelError::Isa`] if the variable names none, or one that this processor does not have.
    pub fn from_environment() -> Result<Isa, KernelError> {
        static NAMED: OnceLock<Result<Isa, KernelError>> = OnceLock::new();
        let named = NAMED.get_or_init(|| match std::env::var(ISA_VARIABLE) {
            Ok(name) if !name.is_empty() => Isa::named(&name),
            _ => Ok(Isa::best()),
        });
        named.clone()
    }

    /// The one of this name.
    ///
    /// # Errors
    /// [`KernelError::Isa`] if there is none, or this processor does not have it.
    pub fn named(name: &str) -> Result<Isa, KernelError> {
        match Isa::ALL.into_iter().find(|isa| isa.name() == name) {
            Some(isa) if isa.available() => Ok(isa),
            known => Err(KernelError::Isa {
                name: name.to_owned(),
                known: known.is_some(),
                usable: Isa::ALL.into_iter().filter(|isa| isa.available()).collect(),
            }),
        }
    }
}

/// Whether the processor says that it is this vendor's.
#[cfg(target_arch = "x86_64")]
fn made_by(vendor: &[u8; 12]) -> bool {
    let found = std::arch::x86_64::__cpuid(0);
    [found.ebx, found.edx, found.ecx].map(u32::to_le_bytes).as_flattened() == vendor
}

#[cfg(not(target_arch = "x86_64"))]
fn made_by(_: &[u8; 12]) -> bool {
    false
}

/// How activations enter products with 16-bit weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Accuracy {
    /// As f32.
    #[default]
    Exact,
    /// Rounded to bf16 where the processor multiplies bf16 at once, as bf16 inference elsewhere does.
    Fast,
}

/// Which kernels the tokens of a pass go through. Each kind rounds in its own way, so the last bits of a token depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Batching {
    /// The fastest for their number: the bits of a token may depend on how many stand beside it.
    #[default]
    Fastest,
    /// The kernels of many tokens, for any number: the bits of a token do not depend on what stands beside it.
    Together,
    /// The kernels of one token, each weight still read once for all: every token has the bits that it has alone with
    /// [`Batching::Fastest`].
    Alone,
}

/// How products are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exec {
    /// Instruction set.
    pub isa: Isa,
    /// How activations enter products with 16-bit weights.
    pub accuracy: Accuracy,
    /// Which kernels the tokens of a pass go through.
    pub batching: Batching,
}

impl Default for Exec {
    /// What the environment names, or the best of this processor; exact.
    fn default() -> Self {
        Self {
            isa: Isa::from_environment().unwrap_or_else(|_| Isa::best()),
            accuracy: Accuracy::Exact,
            batching: Batching::Fastest,
        }
    }
}

impl Exec {
    /// The default, as fast as can be.
    pub fn fast() -> Self {
        Self { accuracy: Accuracy::Fast, ..Self::default() }
    }

    /// The default on another instruction set.
    ///
    /// # Errors
    /// [`KernelError::Isa`] if this processor does not have it.
    pub fn on(isa: Isa) -> Result<Self, KernelError> {
        Ok(Self { isa: Isa::named(isa.name())?, ..Self::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_sets_this_processor_has() {
        for isa in Isa::ALL {
            assert_eq!(Isa::named(isa.name()).is_ok(), isa.available());
        }
        assert!(Isa::best().available());
        let error = Isa::named("avx3").unwrap_err();
        let text = error.to_string();
        assert!(text.contains("`avx3`") && text.contains("portable"), "{text}");
    }
}
