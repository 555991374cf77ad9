//! Gradients through the routed experts, on a device.

use crate::activation::Activation;
use crate::cuda::backend::{Arg, Use};
use crate::cuda::error::CudaError;
use crate::cuda::linear::{ROWS_OF_BLOCK, TILE};
use crate::cuda::moe::{CudaMoe, kind};
use crate::error::KernelError;
use crate::routing::Routing;

impl CudaMoe {
    /// As [`crate::MoeBlock::backward`]: the gradient with respect to `x` (overwritten; left out where it is not wanted), and,
    /// returned, to the weights of the slots, `[tokens, top_k]`.
    ///
    /// # Errors
    /// As [`CudaMoe::forward`].
    pub fn backward(
        &self,
        x: &[f32],
        routing: &Routing,
        activation: Activation,
        d_out: &[f32],
        d_x: Option<&mut [f32]>,
    ) -> Result<Vec<f32>, CudaError> {
        self.check(routing)?;
        let (tokens, k, hidden) = (routing.tokens, routing.top_k, self.hidden());
        KernelError::check("expert input", tokens * hidden, x.len())?;
        KernelError::check("gradient of expert output", tokens * hidden, d_out.len())?;
        if let Some(d_x) = &d_x {
            KernelError::check("gradient of expert input", tokens * hidden, d_x.len())?;
        }
        let pairs = tokens * k;
        let mut d_weights = vec![0.0; pairs];
        if x.is_empty() || pairs == 0 {
            d_x.into_iter().for_each(|d| d.fill(0.0));
            return Ok(d_weights);
        }
        let device = &self.device;
        let ids = device.put(&routing.ids, Use::Scratch)?;
        let weights = device.put(&routing.weights, Use::Scratch)?;
        let x = device.put_rows(x, tokens, hidden)?;
        let d_out = device.put_rows(d_out, tokens, hidden)?;
        let order = self.group(ids.arg(), pairs)?;
        let [gate, up, d_h] = [
            device.rows(pairs, self.inter())?,
            device.rows(pairs, self.inter())?,
            device.rows(pairs, self.inter())?,
        ];
        self.gate_up(&x, &order, k, &gate, up.arg(), activation)?;

        let (hidden_arg, inter) = (self.gate.cols(), self.gate.rows());
        let mut args = vec![d_out.arg(), d_out.stride()?, self.down.arg(), self.down.stride()];
        args.extend(order.args());
        args.extend([
            Arg::Int(k as i32),
            hidden_arg,
            inter,
            d_h.arg(),
            d_h.stride()?,
            device.exact(),
        ]);
        let grid = (order.most, self.inter().div_ceil(TILE));
        // SAFETY: the arguments are those of `down_backward_*`: `d_out` has `tokens` padded rows, `d_h` `pairs`.
        unsafe { device.launch_for("down_backward", self.down.dtype, grid, &args)? };

        let d_slots = device.scratch(pairs)?;
        let mut args = vec![gate.arg(), up.arg(), d_h.arg(), d_h.stride()?, order.order.arg()];
        args.extend([
            weights.arg(),
            Arg::Int(pairs as i32),
            inter,
            d_slots.arg(),
            kind(activation),
        ]);
        // SAFETY: the arguments are those of `gate_backward`: three times `pairs` rows of one stride.
        unsafe { device.launch("gate_backward", (pairs.div_ceil(ROWS_OF_BLOCK), 1), &args)? };

        if let Some(d_x) = d_x {
            let d_pairs = device.scratch(pairs * hidden)?;
            let mut args =
                vec![gate.arg(), up.arg(), gate.stride()?, self.gate.arg(), self.up.arg()];
            args.push(self.gate.stride());
            args.extend(order.args());
            args.extend([hidden_arg, inter, d_pairs.arg(), hidden_arg, device.exact()]);
            let grid = (order.most, hidden.div_ceil(TILE));
            // SAFETY: the arguments are those of `gate_up_backward_*`: `gate` and `up` have `pairs` padded rows, `d_pairs`
            // as many of `hidden`.
            unsafe { device.launch_for("gate_up_backward", self.gate.dtype, grid, &args)? };
            let out = device.scratch(tokens * hidden)?;
            self.combine(&d_pairs, Arg::Pointer(0), tokens, k, &out)?;
            device.get(&out, d_x)?;
        }
        device.get(&d_slots, &mut d_weights)?;
        Ok(d_weights)
    }
}
