//! Where the linear weights of a layer get their inputs.

use candle_core::Tensor;
use moe_merge_kernels::RopeTable;

use super::{Feed, Layer, Past, Projections};
use crate::error::ModelError;
use crate::ops::{FrozenLinear, Gate};
use crate::side_by_side::Site;
use crate::spec::{AttentionKind, LayerSpec, Mlp, Spec};

/// Modules of a layer whose weights read the same input, in the order of their outputs; `None` where inputs are not those of
/// plain linear layers: latent attention, experts.
pub(crate) fn names(spec: &Spec, layer: &LayerSpec, site: Site) -> Option<Vec<&'static str>> {
    let fused = match (site, &spec.attention.kind, &layer.mlp) {
        (Site::Attention, AttentionKind::Projected { fused, .. }, _) => *fused,
        (Site::AttentionOut, AttentionKind::Projected { .. }, _) => false,
        (Site::Mlp | Site::MlpOut, _, Mlp::Dense(mlp)) => mlp.fused,
        _ => return None,
    };
    Some(match (site, fused) {
        (Site::Attention, true) => vec!["self_attn.qkv_proj"],
        (Site::Attention, false) => {
            vec!["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
        }
        (Site::AttentionOut, _) => vec!["self_attn.o_proj"],
        (Site::Mlp, true) => vec!["mlp.gate_up_proj"],
        (Site::Mlp, false) => vec!["mlp.gate_proj", "mlp.up_proj"],
        (Site::MlpOut, _) => vec!["mlp.down_proj"],
    })
}

/// What the linear weights at a site read, and where their outputs go.
pub(crate) struct SiteInput {
    /// `[tokens, in]`
    pub input: Tensor,
    /// The stream that attention or MLP is added to, `[tokens, hidden]`.
    pub stream: Tensor,
}

impl Layer {
    /// The linear layers at `site`, in the order of [`names`]; none where that has no names.
    pub fn linears_at(&self, site: Site) -> Vec<&FrozenLinear> {
        match (site, &self.attention, &self.mlp) {
            (Site::Attention, Projections::Plain { q, k, v, .. }, _) => vec![q, k, v],
            (Site::AttentionOut, Projections::Plain { o, .. }, _) => vec![o],
            (Site::Mlp, _, Feed::Dense(mlp)) => vec![&mlp.gate, &mlp.up],
            (Site::MlpOut, _, Feed::Dense(mlp)) => vec![&mlp.down],
            _ => Vec::new(),
        }
    }

    /// Whether what attention and MLP give goes to the stream through a norm.
    pub fn normed_after(&self) -> bool {
        self.after.is_some()
    }

    /// What comes to `site` of a stream `x` that enters the layer.
    pub fn input_at(
        &self,
        spec: &Spec,
        site: Site,
        x: &Tensor,
        table: &RopeTable,
        past: Past<'_>,
    ) -> Result<SiteInput, ModelError> {
        if site == Site::Attention {
            return Ok(SiteInput { input: self.input_norm.forward(x)?, stream: x.clone() });
        }
        if site == Site::AttentionOut {
            let input = self.mixed(spec, &self.input_norm.forward(x)?, table, past)?.mixed;
            return Ok(SiteInput { input, stream: x.clone() });
        }
        let (stream, mlp_input) = self.attended(spec, x, table, past)?;
        let input = match (site, &self.mlp) {
            (Site::MlpOut, Feed::Dense(mlp)) => {
                let (gate, up) = (mlp.gate.forward(&mlp_input)?, mlp.up.forward(&mlp_input)?);
                gate.apply_op2_no_bwd(&up, &Gate(spec.activation))?
            }
            _ => mlp_input,
        };
        Ok(SiteInput { input, stream })
    }
}
