//! Low-rank adaptation of frozen weights: linear layers and routed experts with trained factors beside them.
//!
//! `y = W x + scale B (A x)`. Gradients flow to activations, to the weights of the chosen slots and to the factors; `W` stays
//! where it is, in its file.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use moe_merge_checkpoint::WeightRef;
use moe_merge_kernels as kernels;
use moe_merge_kernels::{Activation, Dropout, Exec, ExpertLora, LoraGradients, LoraPair, Routing};

use crate::error::ModelError;
use crate::ops::{Expert, Experts, FrozenLinear, refused, tensor_like, to_vec, values};

/// Trained factors beside one weight `[out, in]`.
#[derive(Debug, Clone)]
pub struct LoraFactors {
    /// `[rank, in]`.
    pub a: Tensor,
    /// `[out, rank]`.
    pub b: Tensor,
    /// Factor on their product; `alpha / rank`.
    pub scale: f32,
    /// What is left out of the input of `a`, in training.
    pub dropout: Option<Dropout>,
}

/// Trained factors of one expert of a layer.
#[derive(Debug, Clone)]
pub struct ExpertFactors {
    /// Which expert.
    pub expert: usize,
    /// Beside its gate, `[inter, hidden]`.
    pub gate: Option<LoraFactors>,
    /// Beside its up, `[inter, hidden]`.
    pub up: Option<LoraFactors>,
    /// Beside its down, `[hidden, inter]`.
    pub down: Option<LoraFactors>,
}

/// A frozen linear layer with factors beside it: `y = W x + bias + scale B (A x)`.
///
/// * `x`: `[tokens, in]`; returns `[tokens, out]`
///
/// # Errors
/// If the weight has no bytes, or `x` or factors do not fit it.
pub fn lora_linear(
    x: &Tensor,
    weight: &WeightRef,
    bias: Option<Arc<[f32]>>,
    factors: &LoraFactors,
    exec: &Exec,
) -> std::result::Result<Tensor, ModelError> {
    Ok(FrozenLinear::new(weight.clone(), bias, *exec).with_lora(x, factors)?)
}

/// Routed experts, one of which has factors.
///
/// * `x`: `[tokens, hidden]`; `slot_weights`: `[tokens, top_k]`, those of `routing`; returns `[tokens, hidden]`
/// * `experts`: gate, up and down of each
///
/// # Errors
/// If a weight has no bytes, or routing, experts, factors and `x` do not fit each other.
pub fn lora_experts(
    x: &Tensor,
    slot_weights: &Tensor,
    routing: Arc<Routing>,
    experts: &[[WeightRef; 3]],
    activation: Activation,
    factors: &ExpertFactors,
    exec: &Exec,
) -> std::result::Result<Tensor, ModelError> {
    let frozen = |weight: &WeightRef| FrozenLinear::new(weight.clone(), None, *exec);
    let experts = experts
        .iter()
        .map(|[gate, up, down]| Expert { gate: frozen(gate), up: frozen(up), down: frozen(down) })
        .collect();
    let experts = Experts { routing, experts, activation, known: None, placed: None };
    Ok(experts.with_lora(x, slot_weights, factors)?)
}

impl FrozenLinear {
    /// The layer with factors beside it.
    pub(crate) fn with_lora(self, x: &Tensor, factors: &LoraFactors) -> Result<Tensor> {
        let (a, b) = (factors.a.contiguous()?, factors.b.contiguous()?);
        let op = LoraLinear { linear: self, scale: factors.scale, dropout: factors.dropout };
        if x.track_op() || a.track_op() || b.track_op() {
            return x.apply_op3(&a, &b, op);
        }
        x.apply_op3_no_bwd(&a, &b, &op)
    }
}

/// [`FrozenLinear`] with factors: `x [tokens, in]`, `a [rank, in]`, `b [out, rank]`.
struct LoraLinear {
    linear: FrozenLinear,
    scale: f32,
    dropout: Option<Dropout>,
}

impl CustomOp3 for LoraLinear {
    fn name(&self) -> &'static str {
        "lora-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (values(x, x_layout)?, self.linear.view()?);
        let (tokens, rank) = (x_layout.shape().dims2()?.0, a_layout.shape().dims2()?.0);
        let (a, b) = (values(a, a_layout)?, values(b, b_layout)?);
        let pair = LoraPair { a, b, rank, scale: self.scale, dropout: self.dropout };
        let mut out = vec![0.0; tokens * w.rows()];
        let (bias, exec) = (self.linear.bias.as_deref(), &self.linear.exec);
        kernels::lora_linear(x, w, bias, &pair, &mut out, exec).map_err(refused)?;
        Ok((CpuStorage::F32(out), (tokens, w.rows()).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (inputs, dy, w) = (to_vec(x)?, to_vec(grad)?, self.linear.view()?);
        let (a_values, b_values) = (to_vec(a)?, to_vec(b)?);
        let (rank, scale, dropout) = (a.dim(0)?, self.scale, self.dropout);
        let pair = LoraPair { a: &a_values, b: &b_values, rank, scale, dropout };
        let mut dx = x.track_op().then(|| vec![0.0; inputs.len()]);
        let exec = &self.linear.exec;
        let found = kernels::lora_linear_backward(&inputs, w, &pair, &dy, dx.as_deref_mut(), exec)
            .map_err(refused)?;
        let dx = dx.map(|dx| tensor_like(dx, x)).transpose()?;
        Ok((dx, Some(tensor_like(found.a, a)?), Some(tensor_like(found.b, b)?)))
    }
}

impl Experts {
    /// The experts, one of them with factors.
    pub(crate) fn with_lora(
        self,
        x: &Tensor,
        slot_weights: &Tensor,
        factors: &ExpertFactors,
    ) -> Result<Tensor> {
        let all = [&factors.gate, &factors.up, &factors.down];
        let mut flat = Vec::new();
        for LoraFactors { a, b, .. } in all.into_iter().flatten() {
            flat.push(a.flatten_all()?);
            flat.push(b.flatten_all()?);
        }
        // candle passes three arguments at most; joined, gradients of the parts come by themselves.
        let packed = if flat.is_empty() {
            Tensor::zeros(0, candle_core::DType::F32, x.device())?
        } else {
            Tensor::cat(&flat, 0)?
        };
        let size = |pair: &LoraFactors| -> Result<Packed> {
            let ((rank, input), out) = (pair.a.dims2()?, pair.b.dim(0)?);
            let (scale, dropout) = (pair.scale, pair.dropout);
            Ok(Packed { rank, a: rank * input, b: out * rank, scale, dropout })
        };
        let mut pairs = [None; 3];
        for (pair, factors) in pairs.iter_mut().zip(all) {
            *pair = factors.as_ref().map(size).transpose()?;
        }
        let op = LoraExperts { experts: self, expert: factors.expert, pairs };
        if x.track_op() || slot_weights.track_op() || packed.track_op() {
            return x.apply_op3(slot_weights, &packed, op);
        }
        x.apply_op3_no_bwd(slot_weights, &packed, &op)
    }
}

/// How two factors lie among packed ones, one after the other.
#[derive(Debug, Clone, Copy)]
struct Packed {
    rank: usize,
    /// Numbers of `a`, and of `b` behind it.
    a: usize,
    b: usize,
    scale: f32,
    dropout: Option<Dropout>,
}

/// [`Experts`] with factors: `x [tokens, hidden]`, slot weights `[tokens, top_k]`, all factors one after another.
struct LoraExperts {
    experts: Experts,
    expert: usize,
    pairs: [Option<Packed>; 3],
}

impl LoraExperts {
    fn lora<'a>(&self, packed: &'a [f32]) -> Result<ExpertLora<'a>> {
        let needed: usize = self.pairs.iter().flatten().map(|p| p.a + p.b).sum();
        if needed != packed.len() {
            candle_core::bail!("{} numbers of factors, {needed} are needed", packed.len());
        }
        let mut rest = packed;
        let [gate, up, down] = self.pairs.map(|pair| {
            let Packed { rank, a, b, scale, dropout } = pair?;
            let (own, others) = rest.split_at(a + b);
            rest = others;
            Some(LoraPair { a: &own[..a], b: &own[a..], rank, scale, dropout })
        });
        Ok(ExpertLora { expert: self.expert, gate, up, down })
    }
}

impl CustomOp3 for LoraExperts {
    fn name(&self) -> &'static str {
        "lora-experts"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
        packed: &CpuStorage,
        packed_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let Experts { routing, activation, known, .. } = &self.experts;
        if let Some(known) = known {
            return Ok((CpuStorage::F32(to_vec(known)?), known.shape().clone()));
        }
        let (x, lora) = (values(x, x_layout)?, self.lora(values(packed, packed_layout)?)?);
        let (views, exec) = (self.experts.views()?, self.experts.exec());
        let mut out = vec![0.0; x.len()];
        kernels::moe_forward_lora(x, routing, &views, *activation, &lora, &mut out, &exec)
            .map_err(refused)?;
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        slot_weights: &Tensor,
        packed: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (inputs, d_out, factors) = (to_vec(x)?, to_vec(grad)?, to_vec(packed)?);
        let mut d_x = x.track_op().then(|| vec![0.0; inputs.len()]);
        let found = kernels::moe_backward_lora(
            &inputs,
            &self.experts.routing,
            &self.experts.views()?,
            self.experts.activation,
            &self.lora(&factors)?,
            &d_out,
            d_x.as_deref_mut(),
            &self.experts.exec(),
        )
        .map_err(refused)?;
        let parts = [found.gate, found.up, found.down].into_iter().flatten();
        let d_factors = parts.flat_map(|LoraGradients { a, b }| [a, b]).flatten().collect();
        let d_x = d_x.map(|d| tensor_like(d, x)).transpose()?;
        let d_weights = tensor_like(found.weights, slot_weights)?;
        Ok((d_x, Some(d_weights), Some(tensor_like(d_factors, packed)?)))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use moe_merge_checkpoint::weight::OwnedWeight;
    use moe_merge_kernels::{Dtype, RouterSpec, route};

    use super::*;
    use crate::ops::{KnownGradient, apply1};

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) % 127) as f32 / 64.0 - 1.0).collect()
    }

    fn variable(shape: (usize, usize), seed: usize) -> Var {
        let numbers = numbers(shape.0 * shape.1, seed);
        Var::from_tensor(&Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()).unwrap()
    }

    fn weight(rows: usize, cols: usize, seed: usize) -> WeightRef {
        let values = numbers(rows * cols, seed);
        Arc::new(OwnedWeight::from_f32("w", &values, &[rows, cols], Dtype::BF16))
    }

    /// Gradients of `sum(d . run())` for some variables against slopes along each of their numbers.
    fn check(variables: &[&Var], d: &Tensor, run: &dyn Fn() -> Tensor) {
        let back = to_vec(d).unwrap();
        let root = apply1(&run(), KnownGradient(d.clone())).unwrap();
        let gradients = root.backward().unwrap();
        for (which, variable) in variables.iter().enumerate() {
            let gradient = to_vec(gradients.get(variable).expect("a gradient")).unwrap();
            let before = to_vec(variable).unwrap();
            for (i, gradient) in gradient.iter().enumerate() {
                let value = |by: f32| -> f64 {
                    let mut moved = before.clone();
                    moved[i] += by;
                    variable.set(&tensor_like(moved, variable).unwrap()).unwrap();
                    let y = to_vec(&run()).unwrap();
                    y.iter().zip(&back).map(|(y, d)| f64::from(*y) * f64::from(*d)).sum()
                };
                let slope = (value(1e-2) - value(-1e-2)) / 2e-2;
                let error = (f64::from(*gradient) - slope).abs() / slope.abs().max(1.0);
                assert!(error < 5e-3, "{which} {i}: {gradient} {slope}");
            }
            variable.set(&tensor_like(before, variable).unwrap()).unwrap();
        }
    }

    #[test]
    fn a_linear_layer_passes_gradients_to_input_and_factors() {
        let (x, a, b) = (variable((5, 6), 1), variable((2, 6), 2), variable((4, 2), 3));
        let d = variable((5, 4), 4).as_detached_tensor();
        let w = weight(4, 6, 5);
        let factors = LoraFactors {
            a: a.as_tensor().clone(),
            b: b.as_tensor().clone(),
            scale: 0.5,
            dropout: None,
        };
        let exec = Exec::default();
        let bias: Arc<[f32]> = numbers(4, 6).into();
        let run = || lora_linear(&x, &w, Some(bias.clone()), &factors, &exec).unwrap();
        check(&[&x, &a, &b], &d, &run);
        let short = LoraFactors { a: variable((2, 5), 1).as_tensor().clone(), ..factors.clone() };
        let error = lora_linear(&x, &w, None, &short, &exec).unwrap_err().to_string();
        assert!(error.contains("LoRA"), "{error}");
    }

    #[test]
    fn experts_pass_gradients_to_input_slot_weights_and_factors() {
        let (tokens, hidden, inter) = (5, 4, 3);
        let (x, d) = (variable((tokens, hidden), 1), variable((tokens, hidden), 2));
        let routing = route(&numbers(tokens * 3, 3), tokens, 3, None, &RouterSpec::softmax(2));
        let routing = Arc::new(routing.unwrap());
        let shape = (tokens, 2);
        let slots = Tensor::from_slice(&routing.weights, shape, &Device::Cpu).unwrap();
        let slots = Var::from_tensor(&slots).unwrap();
        let experts: Vec<[WeightRef; 3]> = (0..3)
            .map(|e| {
                [(inter, hidden, 1), (inter, hidden, 2), (hidden, inter, 3)]
                    .map(|(rows, cols, seed)| weight(rows, cols, 10 * e + seed))
            })
            .collect();
        let pair = |out: usize, input: usize, rank: usize, seed: usize| {
            (variable((rank, input), seed), variable((out, rank), seed + 1))
        };
        let pairs =
            [pair(inter, hidden, 2, 20), pair(inter, hidden, 1, 22), pair(hidden, inter, 3, 24)];
        let [gate, up, down] = pairs.each_ref().map(|(a, b)| {
            let (a, b) = (a.as_tensor().clone(), b.as_tensor().clone());
            Some(LoraFactors { a, b, scale: 0.5, dropout: None })
        });
        let factors = ExpertFactors { expert: routing.ids[0] as usize, gate, up, down };
        let run_with = |factors: &ExpertFactors, weights: &[f32]| {
            // The kernel reads the weights of the routing.
            let routing = Arc::new(Routing { weights: weights.to_vec(), ..(*routing).clone() });
            let silu = Activation::Silu;
            lora_experts(&x, &slots, routing, &experts, silu, factors, &Exec::default()).unwrap()
        };
        let run = |factors: &ExpertFactors| run_with(factors, &to_vec(&slots).unwrap());
        let d = d.as_detached_tensor();
        let [(ga, gb), (ua, ub), (da, db)] = &pairs;
        check(&[&x, &slots, ga, gb, ua, ub, da, db], &d, &|| run(&factors));
        let only_down = ExpertFactors { gate: None, up: None, ..factors.clone() };
        check(&[&x, &slots, da, db], &d, &|| run(&only_down));
        let none = ExpertFactors { down: None, ..only_down };
        check(&[&x, &slots], &d, &|| run(&none));
    }
}
