//! Shapes, numbers and instruction sets that the benches share.

use memmap2::Mmap;
use moe_merge_kernels::{
    Accuracy, Activation, Dtype, Exec, ExpertView, Isa, KernelError, MatView, RouterSpec, Routing,
    linear, moe_forward, route,
};

use super::flops::{FlopLimit, bf16_limit, f32_limit};
use super::reading::file_map;

/// SmolLM2-135M: hidden size, size of an expert, experts, experts per token, layers.
pub const HIDDEN: usize = 576;
pub const INTER: usize = 1536;
pub const EXPERTS: usize = 4;
pub const TOP_K: usize = 2;
pub const LAYERS: usize = 30;

/// An instruction set with an accuracy.
#[derive(Clone, Copy)]
pub struct Variant {
    pub name: &'static str,
    pub exec: Exec,
}

impl Variant {
    /// Whether products with bf16 weights are bf16 dot products.
    pub fn dots(&self) -> bool {
        self.exec.isa == Isa::Avx512Bf16 && self.exec.accuracy == Accuracy::Fast
    }

    /// The loop that its products with bf16 weights cannot outrun.
    pub fn limit(&self) -> FlopLimit {
        if self.dots() { bf16_limit(self.exec.isa) } else { f32_limit(self.exec.isa) }
    }
}

/// What this processor can run, the fastest first.
pub fn variants() -> Vec<Variant> {
    let named = [
        ("avx512bf16, fast", Isa::Avx512Bf16, Accuracy::Fast),
        ("avx512bf16, exact", Isa::Avx512Bf16, Accuracy::Exact),
        ("avx512", Isa::Avx512, Accuracy::Exact),
        ("avx2", Isa::Avx2, Accuracy::Exact),
        ("neon", Isa::Neon, Accuracy::Exact),
        ("portable", Isa::Portable, Accuracy::Exact),
    ];
    named
        .into_iter()
        .filter_map(|(name, isa, accuracy)| {
            Some(Variant { name, exec: Exec { accuracy, ..Exec::on(isa).ok()? } })
        })
        .collect()
}

/// `n` numbers between -1 and 1.
pub fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 1009) as f32 / 504.0 - 1.0).collect()
}

/// `x · wᵀ`.
pub fn product(x: &[f32], w: MatView<'_>, out: &mut [f32], exec: &Exec) {
    linear(x, w, None, out, exec).expect("sizes fit");
}

/// A matrix at the start of `bytes`.
pub fn matrix(bytes: &[u8], dtype: Dtype, rows: usize, cols: usize) -> MatView<'_> {
    MatView::new(&bytes[..rows * cols * dtype.size()], dtype, rows, cols).expect("sizes fit")
}

/// The MoE blocks of a whole model in one file map, bf16.
pub struct Blocks {
    map: Mmap,
    router: Vec<u8>,
}

impl Blocks {
    /// `layers` layers of [`EXPERTS`] experts.
    pub fn new(layers: usize) -> Self {
        let map = file_map(layers * EXPERTS * Self::EXPERT, Dtype::BF16);
        let mut router = vec![0; EXPERTS * HIDDEN * 2];
        let rows: Vec<f32> =
            (0..EXPERTS * HIDDEN).map(|i| ((i * i * 31) % 977) as f32 / 488.0 - 1.0).collect();
        moe_merge_kernels::cast::narrow(&rows, Dtype::BF16, &mut router);
        Self { map, router }
    }

    /// Bytes of one expert.
    pub const EXPERT: usize = 3 * HIDDEN * INTER * 2;

    /// The experts of layer `layer`.
    pub fn experts(&self, layer: usize) -> Vec<ExpertView<'_>> {
        let third = Self::EXPERT / 3;
        (0..EXPERTS)
            .map(|e| {
                let at = (layer * EXPERTS + e) * Self::EXPERT;
                let part = |i: usize| &self.map[at + i * third..at + (i + 1) * third];
                ExpertView {
                    gate: matrix(part(0), Dtype::BF16, INTER, HIDDEN),
                    up: matrix(part(1), Dtype::BF16, INTER, HIDDEN),
                    down: matrix(part(2), Dtype::BF16, HIDDEN, INTER),
                }
            })
            .collect()
    }

    /// From the router's logits to the combined output, as a layer runs it.
    pub fn layer(
        &self,
        x: &[f32],
        experts: &[ExpertView<'_>],
        top_k: usize,
        out: &mut [f32],
        exec: &Exec,
    ) -> Result<(), KernelError> {
        let routing = self.routing(x, top_k, exec)?;
        moe_forward(x, &routing, experts, Activation::Silu, out, exec)
    }

    /// Which experts the tokens of `x` visit.
    pub fn routing(&self, x: &[f32], top_k: usize, exec: &Exec) -> Result<Routing, KernelError> {
        let tokens = x.len() / HIDDEN;
        let mut logits = vec![0.0; tokens * EXPERTS];
        let router = matrix(&self.router, Dtype::BF16, EXPERTS, HIDDEN);
        linear(x, router, None, &mut logits, exec)?;
        route(&logits, tokens, EXPERTS, None, &RouterSpec::softmax(top_k))
    }
}

/// Multiplications and additions of `pairs` (token, expert) pairs.
pub fn expert_flops(pairs: usize) -> f64 {
    (pairs * 3 * 2 * HIDDEN * INTER) as f64
}
