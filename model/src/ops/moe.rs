//! A MoE block: router, weights of the chosen slots, experts.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use moe_merge_kernels as kernels;
use moe_merge_kernels::cuda::CudaMoe;
use moe_merge_kernels::{Activation, Exec, ExpertView, RouterSpec, Routing, dense};

use super::{FrozenLinear, failed, refused, tensor_like, to_vec, values};
use crate::error::ModelError;
use crate::placement::Placement;

/// Logits of a router whose weights are a tensor: `x [tokens, hidden]`, `w [experts, hidden]` to `[tokens, experts]`.
pub(crate) struct RouterLogits;

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

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let ((tokens, hidden), experts) = (x.dims2()?, w.dim(0)?);
        let (xs, ws, ds) = (to_vec(x)?, to_vec(w)?, to_vec(grad)?);
        let product = |a, b, len| -> Result<Vec<f32>> {
            let mut out = vec![0.0; len];
            dense::matmul(a, b, &mut out, dense::Into::Overwrite).map_err(refused)?;
            Ok(out)
        };
        let d = dense::Dense::new(&ds, tokens, experts).map_err(refused)?;
        let mut gradients = (None, None);
        if x.track_op() {
            let w = dense::Dense::new(&ws, experts, hidden).map_err(refused)?;
            gradients.0 = Some(tensor_like(product(d, w, xs.len())?, x)?);
        }
        if w.track_op() {
            let x = dense::Dense::new(&xs, tokens, hidden).map_err(refused)?;
            gradients.1 = Some(tensor_like(product(d.transposed(), x, ws.len())?, w)?);
        }
        Ok(gradients)
    }
}

/// From the logits of a router `[tokens, experts]` to the weights of the slots it chose, `[tokens, top_k]`.
///
/// The choice is made beforehand and has no gradient.
pub(crate) struct SlotWeights {
    pub routing: Arc<Routing>,
    pub spec: RouterSpec,
}

impl CustomOp1 for SlotWeights {
    fn name(&self) -> &'static str {
        "slot-weights"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = (self.routing.tokens, self.routing.top_k).into();
        Ok((CpuStorage::F32(self.routing.weights.clone()), shape))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (values, d_weights) = (to_vec(logits)?, to_vec(grad)?);
        let mut d = vec![0.0; values.len()];
        let experts = logits.dim(1)?;
        kernels::route_backward(&values, experts, &self.routing, &d_weights, &self.spec, &mut d)
            .map_err(refused)?;
        Ok(Some(tensor_like(d, logits)?))
    }
}

/// Routed experts: `x [tokens, hidden]` and the weights of the chosen slots `[tokens, top_k]`, which are those of the
/// routing.
///
/// The weights are an argument of their own because a router's gradient comes through them.
pub(crate) struct Experts {
    pub routing: Arc<Routing>,
    pub experts: Arc<[Expert]>,
    pub activation: Activation,
    /// The result, where an earlier pass has computed it.
    pub known: Option<Tensor>,
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

impl Experts {
    /// How products with them are computed.
    pub fn exec(&self) -> Exec {
        self.experts.first().map_or_else(Exec::default, |e| e.gate.exec)
    }

    /// The matrices of each.
    pub fn views(&self) -> Result<Vec<ExpertView<'_>>> {
        self.experts.iter().map(Expert::view).collect()
    }
}

impl CustomOp2 for Experts {
    fn name(&self) -> &'static str {
        "experts"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if let Some(known) = &self.known {
            return Ok((CpuStorage::F32(to_vec(known)?), known.shape().clone()));
        }
        let x = values(x, x_layout)?;
        let mut out = vec![0.0; x.len()];
        if let Some(placed) = &self.placed {
            let batching = self.exec().batching;
            placed
                .forward_as(x, &self.routing, self.activation, &mut out, batching)
                .map_err(failed)?;
            return Ok((CpuStorage::F32(out), x_layout.shape().clone()));
        }
        let (views, exec) = (self.views()?, self.exec());
        kernels::moe_forward(x, &self.routing, &views, self.activation, &mut out, &exec)
            .map_err(refused)?;
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weights: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (values, d_out) = (to_vec(x)?, to_vec(grad)?);
        let mut d_x = x.track_op().then(|| vec![0.0; values.len()]);
        let (routing, activation, d_x_out) = (&self.routing, self.activation, d_x.as_deref_mut());
        let d_weights = match &self.placed {
            Some(placed) => {
                placed.backward(&values, routing, activation, &d_out, d_x_out).map_err(failed)?
            }
            None => {
                let views = self.views()?;
                let exec = self.exec();
                kernels::moe_backward(&values, routing, &views, activation, &d_out, d_x_out, &exec)
                    .map_err(refused)?
            }
        };
        let d_weights = weights.track_op().then(|| tensor_like(d_weights, weights)).transpose()?;
        Ok((d_x.map(|d| tensor_like(d, x)).transpose()?, d_weights))
    }
}
