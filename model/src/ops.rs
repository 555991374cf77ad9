//! Operations over weights as stored: on candle's tensors the way forward, on slices the way back.
//!
//! Weights are frozen: gradients flow to activations. candle's own graph is not used: it would keep every tensor, and add up
//! gradients in copies.

mod moe;

use std::ops::{Deref, Range};
use std::sync::Arc;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Device, Layout, Result, Shape, Storage, Tensor,
};
use moe_merge_checkpoint::WeightRef;
use moe_merge_kernels as kernels;
use moe_merge_kernels::cuda::{CudaError, CudaLinear};
use moe_merge_kernels::{
    Accuracy, Activation, AttentionSpec, Exec, KernelError, KeyValues, MatView, RopeTable,
    activation, dense,
};
use rayon::prelude::*;

use crate::cache::LayerCache;
use crate::error::ModelError;
use crate::placement::Placement;

pub(crate) use moe::{Expert, Experts, RouterLogits};

/// The numbers of a contiguous f32 argument.
pub(crate) fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let all = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&all[from..to]),
        None => candle_core::bail!("argument is not contiguous: {:?}", layout.shape()),
    }
}

pub(crate) fn refused(error: KernelError) -> candle_core::Error {
    candle_core::Error::wrap(error)
}

fn failed(error: CudaError) -> candle_core::Error {
    candle_core::Error::wrap(error)
}

/// All f32 numbers of a tensor.
pub(crate) fn to_vec(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1()
}

/// Numbers as a tensor of the shape of `like`.
pub(crate) fn tensor_like(values: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(values, like.shape(), &Device::Cpu)
}

/// The numbers of a contiguous f32 tensor, where they lie.
pub(crate) fn numbers(x: &Tensor) -> Result<impl Deref<Target = [f32]> + '_> {
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(_)), Some((from, to))) => {
            Ok(Numbers { storage, range: from..to })
        }
        _ => candle_core::bail!("not contiguous numbers in f32: {:?}", layout.shape()),
    }
}

/// Some of the numbers that a guard keeps where they are.
struct Numbers<G> {
    storage: G,
    range: Range<usize>,
}

impl<G: Deref<Target = Storage>> Deref for Numbers<G> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(all)) => &all[self.range.clone()],
            _ => &[],
        }
    }
}

/// A linear layer whose weight stays in the file: `y = x W^T + b`.
#[derive(Debug, Clone)]
pub(crate) struct FrozenLinear {
    /// `[out, in]`, with bytes of its own.
    weight: WeightRef,
    pub bias: Option<Arc<[f32]>>,
    pub exec: Exec,
    /// The same on a device, if it is placed there.
    placed: Option<Arc<CudaLinear>>,
}

impl FrozenLinear {
    /// `weight` has two axes and bytes: the loader sees to it.
    pub fn new(weight: WeightRef, bias: Option<Arc<[f32]>>, exec: Exec) -> Self {
        Self { weight, bias, exec, placed: None }
    }

    /// The same, with activations as f32 whatever it was made with.
    pub fn exact(self) -> Self {
        let exec = Exec { accuracy: Accuracy::Exact, ..self.exec };
        Self { exec, ..self }
    }

    /// Puts it where `placement` says.
    pub fn place(&mut self, placement: &Placement) -> std::result::Result<(), ModelError> {
        let accuracy = self.exec.accuracy;
        self.placed = placement.linear(self.view()?, self.bias.as_deref(), accuracy)?;
        Ok(())
    }

    /// Itself on a device, if it is placed there.
    pub fn placed(&self) -> Option<&CudaLinear> {
        self.placed.as_deref()
    }

    /// How activations enter its products.
    pub fn accuracy(&self) -> Accuracy {
        self.exec.accuracy
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

    /// The gradient of its input from that of its output, `dx = dy W`, or added to what is there.
    pub fn back(&self, dy: &[f32], dx: &mut [f32], into: dense::Into) -> Result<()> {
        let Some(placed) = &self.placed else {
            return kernels::linear_backward(dy, self.view()?, dx, into, &self.exec)
                .map_err(refused);
        };
        if into == dense::Into::Overwrite {
            return placed.backward(dy, dx).map_err(failed);
        }
        let mut more = vec![0.0; dx.len()];
        placed.backward(dy, &mut more).map_err(failed)?;
        dx.iter_mut().zip(more).for_each(|(d, m)| *d += m);
        Ok(())
    }

    /// As [`FrozenLinear::back`], into new numbers.
    pub fn back_new(&self, dy: &[f32]) -> Result<Vec<f32>> {
        let view = self.view()?;
        let mut dx = vec![0.0; dy.len() / view.rows().max(1) * view.cols()];
        self.back(dy, &mut dx, dense::Into::Overwrite)?;
        Ok(dx)
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
        if let Some(placed) = &self.placed {
            placed.forward_as(x, &mut out, self.exec.batching).map_err(failed)?;
            return Ok((CpuStorage::F32(out), (tokens, w.rows()).into()));
        }
        kernels::linear(x, w, self.bias.as_deref(), &mut out, &self.exec).map_err(refused)?;
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

    /// The gradient of its input `x` from that of its output, into `dx` or added to it.
    pub fn back(&self, x: &Tensor, dy: &[f32], dx: &mut [f32], into: dense::Into) -> Result<()> {
        let Self { weight, eps, offset } = self;
        kernels::rms_norm_backward(&numbers(x)?, weight, *eps, *offset, dy, dx, into)
            .map_err(refused)
    }

    /// As [`RmsNorm::back`], into new numbers.
    pub fn back_new(&self, x: &Tensor, dy: &[f32]) -> Result<Vec<f32>> {
        let mut dx = vec![0.0; dy.len()];
        self.back(x, dy, &mut dx, dense::Into::Overwrite)?;
        Ok(dx)
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
pub(crate) struct Rope {
    pub table: RopeTable,
    pub heads: usize,
    pub head_dim: usize,
    pub from: usize,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut x = values(storage, layout)?.to_vec();
        self.table.apply(&mut x, self.heads, self.head_dim, self.from).map_err(refused)?;
        Ok((CpuStorage::F32(x), layout.shape().clone()))
    }
}

/// `x` limited to `-c..=c`.
pub(crate) struct Clamp(pub f32);

impl Clamp {
    /// The gradient of what lies outside is 0.
    pub fn back(&self, x: &Tensor, d: &mut [f32]) -> Result<()> {
        let x = numbers(x)?;
        let outside = d.iter_mut().zip(&*x).filter(|(_, x)| x.abs() > self.0);
        outside.for_each(|(d, _)| *d = 0.0);
        Ok(())
    }
}

impl CustomOp1 for Clamp {
    fn name(&self) -> &'static str {
        "clamp"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let limited = |v: &f32| v.clamp(-self.0, self.0);
        let out = values(storage, layout)?.iter().map(limited).collect();
        Ok((CpuStorage::F32(out), layout.shape().clone()))
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

/// Numbers of one task of a sum.
const PART: usize = 1 << 15;

/// `x + scale y`: how attention and MLP are added to the stream.
///
/// candle's own sum of large tensors waits in a loop for a pool of threads, which takes long on a busy machine.
pub(crate) struct Residual {
    pub scale: f32,
}

impl CustomOp2 for Residual {
    fn name(&self) -> &'static str {
        "residual"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        y: &CpuStorage,
        y_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, y) = (values(x, x_layout)?, values(y, y_layout)?);
        let add = |(x, y): (&f32, &f32)| x + y * self.scale;
        let mut sum: Vec<f32>;
        if x.len() <= PART {
            sum = x.iter().zip(y).map(add).collect();
        } else {
            sum = vec![0.0; x.len()];
            let parts = x.par_chunks(PART).zip(y.par_chunks(PART));
            sum.par_chunks_mut(PART).zip(parts).for_each(|(sum, (x, y))| {
                sum.iter_mut().zip(x.iter().zip(y)).for_each(|(sum, pair)| *sum = add(pair));
            });
        }
        Ok((CpuStorage::F32(sum), x_layout.shape().clone()))
    }
}

/// Rows of `x [tokens, width]`, each times the logistic function of its `logit [tokens, 1]`.
pub(crate) struct Open;

impl Open {
    /// From `d`, the gradient of the output, to that of `x` in place; returns that of the logits.
    pub fn back(&self, x: &Tensor, logits: &Tensor, d: &mut [f32]) -> Result<Vec<f32>> {
        let width = x.dim(1)?.max(1);
        let (values, mut d_logits) = (numbers(x)?, to_vec(logits)?);
        let rows = d.chunks_exact_mut(width).zip(values.chunks_exact(width));
        for ((d, x), logit) in rows.zip(&mut d_logits) {
            let open = activation::sigmoid(*logit);
            let sum: f64 = d.iter().zip(x).map(|(d, x)| f64::from(*d) * f64::from(*x)).sum();
            *logit = open * (1.0 - open) * sum as f32;
            d.iter_mut().for_each(|v| *v *= open);
        }
        Ok(d_logits)
    }
}

impl CustomOp2 for Open {
    fn name(&self) -> &'static str {
        "open"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        logits: &CpuStorage,
        logits_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut out = values(x, x_layout)?.to_vec();
        let width = x_layout.shape().dims2()?.1.max(1);
        for (row, logit) in out.chunks_exact_mut(width).zip(values(logits, logits_layout)?) {
            let open = activation::sigmoid(*logit);
            row.iter_mut().for_each(|v| *v *= open);
        }
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }
}

/// Causal attention of whole sequences that stand one after the other: `q`, `k`, `v` `[tokens, heads * dim]`.
pub(crate) struct SelfAttention {
    pub spec: AttentionSpec,
    pub exec: Exec,
    /// Rows of each sequence.
    pub sequences: Arc<[Range<usize>]>,
}

impl SelfAttention {
    /// `[tokens, heads * v_dim]`.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        q.apply_op3_no_bwd(k, v, self)
    }

    /// Gradients of queries, keys and values from that of `out`, which they gave.
    pub fn back(&self, [q, k, v]: [&Tensor; 3], out: &Tensor, d: &[f32]) -> Result<[Vec<f32>; 3]> {
        let s = &self.spec;
        let out_width = s.heads * s.v_dim;
        let widths =
            [s.heads * s.qk_dim, s.kv_heads * s.qk_dim, s.kv_heads * s.v_dim, out_width, out_width];
        let (q, k, v, out) = (numbers(q)?, numbers(k)?, numbers(v)?, numbers(out)?);
        let all: [&[f32]; 5] = [&q, &k, &v, &out, d];
        let parts: Vec<kernels::AttentionGradients> = self
            .sequences
            .par_iter()
            .map(|rows| {
                let part = |i: usize| &all[i][rows.start * widths[i]..rows.end * widths[i]];
                let [q, k, v, out, d] = [0, 1, 2, 3, 4].map(part);
                kernels::attention_backward([q, k, v], out, d, s, &self.exec)
            })
            .collect::<std::result::Result<_, _>>()
            .map_err(refused)?;
        let [mut dq, mut dk, mut dv] = [0, 1, 2].map(|i| Vec::with_capacity(all[i].len()));
        for part in parts {
            dq.extend(part.q);
            dk.extend(part.k);
            dv.extend(part.v);
        }
        Ok([dq, dk, dv])
    }
}

impl CustomOp3 for SelfAttention {
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
        for rows in self.sequences.iter() {
            let part = |width: usize| rows.start * width..rows.end * width;
            let kv = KeyValues {
                keys: &k[part(k_width)],
                values: &v[part(v_width)],
                count: rows.len(),
                key_strides: (k_width, s.qk_dim),
                value_strides: (v_width, s.v_dim),
            };
            kernels::attention(&q[part(q_width)], kv, s, &mut out[part(out_width)], &self.exec)
                .map_err(refused)?;
        }
        Ok((CpuStorage::F32(out), (tokens, out_width).into()))
    }
}

/// Attention of new tokens to a cache that holds them already. It has no gradient: a cache keeps numbers only.
pub(crate) struct CachedAttention<'a> {
    pub spec: AttentionSpec,
    pub exec: Exec,
    pub cache: &'a LayerCache,
    /// Positions of the cache, the new ones last.
    pub count: usize,
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
        match self.cache {
            LayerCache::F32(kept) => {
                kernels::attention(q, kept.view(self.count), &self.spec, &mut out, &self.exec)
            }
            LayerCache::F16(kept) => {
                kernels::attention(q, kept.view(self.count), &self.spec, &mut out, &self.exec)
            }
        }
        .map_err(refused)?;
        Ok((CpuStorage::F32(out), (tokens, width).into()))
    }
}
