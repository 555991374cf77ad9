//! A MoE block: router, weights of the chosen slots, experts.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use moe_merge_kernels as kernels;
use moe_merge_kernels::cuda::CudaMoe;
use moe_merge_kernels::{Activation, Exec, ExpertView, Routing, dense};

use super::{FrozenLinear, failed, numbers, refused, values};
use crate::error::ModelError;
use crate::placement::Placement;

/// Logits of a router whose weights are a tensor: `x [tokens, hidden]`, `w [experts, hidden]` to `[tokens, experts]`.
pub(crate) struct RouterLogits;

impl RouterLogits {
    /// From the gradient `d` of the logits: adds to that of `x`, and returns that of the router where it is wanted.
    pub fn back(
        &self,
        x: &[f32],
        w: &Tensor,
        d: &[f32],
        d_x: Option<&mut [f32]>,
        wanted: bool,
    ) -> Result<Option<Vec<f32>>> {
        let (experts, hidden) = w.dims2()?;
        let tokens = x.len().checked_div(hidden).unwrap_or(0);
        let d = dense::Dense::new(d, tokens, experts).map_err(refused)?;
        if let Some(d_x) = d_x {
            let w = numbers(w)?;
            let w = dense::Dense::new(&w, experts, hidden).map_err(refused)?;
            dense::matmul(d, w, d_x, dense::Into::Add).map_err(refused)?;
        }
        if !wanted {
            return Ok(None);
        }
        let x = dense::Dense::new(x, tokens, hidden).map_err(refused)?;
        let mut d_w = vec![0.0; experts * hidden];
        dense::matmul(d.transposed(), x, &mut d_w, dense::Into::Overwrite).map_err(refused)?;
        Ok(Some(d_w))
    }
}

impl CustomOp2 for RouterLogits {
    fn name(&self) -> &'static str {
        "router-logits"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, hidden) = x_layout.shape().dims2()?;
        let (experts, cols) = w_layout.shape().dims2()?;
        let x = dense::Dense::new(values(x, x_layout)?, tokens, hidden).map_err(refused)?;
        let w = dense::Dense::new(values(w, w_layout)?, experts, cols).map_err(refused)?;
        let mut out = vec![0.0; tokens * experts];
        dense::matmul(x, w.transposed(), &mut out, dense::Into::Overwrite).map_err(refused)?;
        Ok((CpuStorage::F32(out), (tokens, experts).into()))
    }
}

/// Routed experts of `x [tokens, hidden]`.
pub(crate) struct Experts {
    pub routing: Arc<Routing>,
    pub experts: Arc<[Expert]>,
    pub activation: Activation,
    /// The experts on a device, if they are placed there.
    pub placed: Option<Arc<CudaMoe>>,
}

/// The three matrices of an expert.
#[derive(Debug, Clone)]
pub(crate) struct Expert {
    pub gate: FrozenLinear,
    pub up: FrozenLinear,
    pub down: FrozenLinear,
}

impl Expert {
    /// Its matrices.
    pub fn view(&self) -> Result<ExpertView<'_>> {
        let Expert { gate, up, down } = self;
        Ok(ExpertView { gate: gate.view()?, up: up.view()?, down: down.view()? })
    }

    /// Which kernels the tokens of a pass go through from now on.
    pub fn set_batching(&mut self, batching: kernels::Batching) {
        [&mut self.gate, &mut self.up, &mut self.down]
            .into_iter()
            .for_each(|l| l.exec.batching = batching);
    }

    /// Puts its layers where `placement` says.
    pub fn place(&mut self, placement: &Placement) -> std::result::Result<(), ModelError> {
        [&mut self.gate, &mut self.up, &mut self.down]
            .into_iter()
            .try_for_each(|l| l.place(placement))
    }
}

impl CustomOp1 for Experts {
    fn name(&self) -> &'static str {
        "experts"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(x, layout)?;
        let mut out = vec![0.0; x.len()];
        let exec = self.experts.first().map_or_else(Exec::default, |e| e.gate.exec);
        if let Some(placed) = &self.placed {
            placed
                .forward_as(x, &self.routing, self.activation, &mut out, exec.batching)
                .map_err(failed)?;
            return Ok((CpuStorage::F32(out), layout.shape().clone()));
        }
        let views = self.experts.iter().map(Expert::view).collect::<Result<Vec<_>>>()?;
        kernels::moe_forward(x, &self.routing, &views, self.activation, &mut out, &exec)
            .map_err(refused)?;
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}
