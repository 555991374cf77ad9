//! Candle operations over weights as stored. Forward only; each has the arguments its gradient will need.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use moe_merge_checkpoint::WeightRef;
use moe_merge_kernels as kernels;
use moe_merge_kernels::{
    Activation, AttentionSpec, ExpertView, KernelError, KeyValues, MatView, RopeTable, Routing,
};

/// The numbers of a contiguous f32 argument.
fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let all = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&all[from..to]),
        None => candle_core::bail!("argument is not contiguous: {:?}", layout.shape()),
    }
}

fn refused(error: KernelError) -> candle_core::Error {
    candle_core::Error::wrap(error)
}

/// All f32 numbers of a tensor.
pub(crate) fn to_vec(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1()
}

/// A linear layer whose weight stays in the file: `y = x W^T + b`.
#[derive(Debug, Clone)]
pub(crate) struct FrozenLinear {
    /// `[out, in]`, with bytes of its own.
    weight: WeightRef,
    bias: Option<Arc<[f32]>>,
}

impl FrozenLinear {
    /// `weight` has two axes and bytes: the loader sees to it.
    pub fn new(weight: WeightRef, bias: Option<Arc<[f32]>>) -> Self {
        Self { weight, bias }
    }

    /// The weight as a matrix.
    pub fn view(&self) -> Result<MatView<'_>> {
        let Some(bytes) = self.weight.bytes() else {
            candle_core::bail!("weight `{}` has no bytes", self.weight.origin().1)
        };
        let (rows, cols) = (self.weight.rows(), self.weight.cols());
        MatView::new(bytes, self.weight.dtype(), rows, cols).map_err(refused)
    }

    /// `x [tokens, in]` to `[tokens, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (values(storage, layout)?, self.view()?);
        let tokens = layout.shape().dims2()?.0;
        let mut out = vec![0.0; tokens * w.rows()];
        kernels::linear(x, w, self.bias.as_deref(), &mut out).map_err(refused)?;
        Ok((CpuStorage::F32(out), (tokens, w.rows()).into()))
    }
}

/// Root mean square norm of rows as long as its weight; a row of the tensor may hold several (heads).
#[derive(Debug, Clone)]
pub(crate) struct RmsNorm {
    pub weight: Arc<[f32]>,
    pub eps: f32,
    pub offset: f32,
}

impl RmsNorm {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let mut out = vec![0.0; x.len()];
        kernels::rms_norm(x, &self.weight, self.eps, self.offset, &mut out).map_err(refused)?;
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

/// Rotary embedding of the dimensions from `from` on, in every head.
pub(crate) struct Rope<'a> {
    pub table: &'a RopeTable,
    pub heads: usize,
    pub head_dim: usize,
    pub from: usize,
}

impl CustomOp1 for Rope<'_> {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut x = values(storage, layout)?.to_vec();
        self.table.apply(&mut x, self.heads, self.head_dim, self.from).map_err(refused)?;
        Ok((CpuStorage::F32(x), layout.shape().clone()))
    }
}

/// `f(gate) * up`.
pub(crate) struct Gate(pub Activation);

impl CustomOp2 for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut out = values(gate, gate_layout)?.to_vec();
        self.0.gate(&mut out, values(up, up_layout)?);
        Ok((CpuStorage::F32(out), gate_layout.shape().clone()))
    }
}

/// Causal attention of whole sequences that stand one after the other: `q`, `k`, `v` `[tokens, heads * dim]`.
pub(crate) struct SelfAttention<'a> {
    pub spec: AttentionSpec,
    /// Rows of each sequence.
    pub sequences: &'a [Range<usize>],
}

impl CustomOp3 for SelfAttention<'_> {
    fn name(&self) -> &'static str {
        "self-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let s = &self.spec;
        let (q, k, v) = (values(q, q_layout)?, values(k, k_layout)?, values(v, v_layout)?);
        let tokens = q_layout.shape().dims2()?.0;
        let (q_width, out_width) = (s.heads * s.qk_dim, s.heads * s.v_dim);
        let (k_width, v_width) = (s.kv_heads * s.qk_dim, s.kv_heads * s.v_dim);
        let mut out = vec![0.0; tokens * out_width];
        for rows in self.sequences {
            let part = |width: usize| rows.start * width..rows.end * width;
            let kv = KeyValues {
                keys: &k[part(k_width)],
                values: &v[part(v_width)],
                count: rows.len(),
                key_strides: (k_width, s.qk_dim),
                value_strides: (v_width, s.v_dim),
            };
            kernels::attention(&q[part(q_width)], kv, s, &mut out[part(out_width)])
                .map_err(refused)?;
        }
        Ok((CpuStorage::F32(out), (tokens, out_width).into()))
    }
}

/// Attention of new tokens to a cache that holds them already.
pub(crate) struct CachedAttention<'a> {
    pub spec: AttentionSpec,
    pub kv: KeyValues<'a>,
}

impl CustomOp1 for CachedAttention<'_> {
    fn name(&self) -> &'static str {
        "cached-attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let q = values(storage, layout)?;
        let tokens = layout.shape().dims2()?.0;
        let width = self.spec.heads * self.spec.v_dim;
        let mut out = vec![0.0; tokens * width];
        kernels::attention(q, self.kv, &self.spec, &mut out).map_err(refused)?;
        Ok((CpuStorage::F32(out), (tokens, width).into()))
    }
}

/// Routed experts: `x [tokens, hidden]` and the weights of the chosen slots `[tokens, top_k]`.
///
/// The weights are an argument of their own because a router's gradient comes through them.
pub(crate) struct Experts<'a> {
    pub ids: &'a [u32],
    pub experts: &'a [Expert],
    pub activation: Activation,
}

/// The three matrices of an expert.
#[derive(Debug, Clone)]
pub(crate) struct Expert {
    pub gate: FrozenLinear,
    pub up: FrozenLinear,
    pub down: FrozenLinear,
}

impl CustomOp2 for Experts<'_> {
    fn name(&self) -> &'static str {
        "experts"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weights: &CpuStorage,
        weights_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, top_k) = weights_layout.shape().dims2()?;
        let routing = Routing {
            tokens,
            top_k,
            ids: self.ids.to_vec(),
            weights: values(weights, weights_layout)?.to_vec(),
        };
        let views: Vec<ExpertView<'_>> = self
            .experts
            .iter()
            .map(|e| {
                Ok(ExpertView { gate: e.gate.view()?, up: e.up.view()?, down: e.down.view()? })
            })
            .collect::<Result<_>>()?;
        let x = values(x, x_layout)?;
        let mut out = vec![0.0; x.len()];
        kernels::moe_forward(x, &routing, &views, self.activation, &mut out).map_err(refused)?;
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }
}
