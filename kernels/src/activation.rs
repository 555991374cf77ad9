//! Activation functions of gated MLPs.

use rayon::prelude::*;

use crate::simd::{each_set, exp};

/// Numbers of one task: small ones are not worth another thread.
const CHUNK: usize = 1 << 15;

const SQRT_2_OVER_PI: f32 = 0.797_884_6;

/// Which function a gated MLP applies to its gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + exp(-x))`.
    Silu,
    /// `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `x/2 (1 + erf(x / sqrt(2)))`.
    Gelu,
}

impl Activation {
    /// The name that `config.json` uses, or `None` if it is not one of ours.
    pub fn from_config_name(name: &str) -> Option<Self> {
        match name {
            "silu" | "swish" => Some(Activation::Silu),
            "gelu_pytorch_tanh" | "gelu_new" => Some(Activation::GeluTanh),
            "gelu" => Some(Activation::Gelu),
            _ => None,
        }
    }

    /// The function at `x`.
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Activation::Silu => silu(x),
            Activation::GeluTanh => gelu_tanh(x),
            Activation::Gelu => gelu(x),
        }
    }

    /// `gate[i] = f(gate[i]) * up[i]`.
    pub fn gate(self, gate: &mut [f32], up: &[f32]) {
        let chunk = |gate: &mut [f32], up: &[f32]| match self {
            Activation::Silu => silu_gate(gate, up),
            Activation::GeluTanh => gelu_tanh_gate(gate, up),
            Activation::Gelu => gate.iter_mut().zip(up).for_each(|(g, u)| *g = gelu(*g) * u),
        };
        if gate.len() <= CHUNK {
            return chunk(gate, up);
        }
        gate.par_chunks_mut(CHUNK).zip(up.par_chunks(CHUNK)).for_each(|(g, u)| chunk(g, u));
    }
}

each_set! {
    fn silu_gate(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = *g / (1.0 + exp(-*g)) * u;
        }
    }
}

each_set! {
    fn gelu_tanh_gate(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            // x/2 (1 + tanh y) = x / (1 + exp(-2y))
            let x = *g;
            let y = SQRT_2_OVER_PI * (x + 0.044715 * x * x * x);
            *g = x / (1.0 + exp(-2.0 * y)) * u;
        }
    }
}

/// `x / (1 + exp(-x))`.
pub fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// `1 / (1 + exp(-x))`.
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// GELU with the tanh approximation that `gelu_pytorch_tanh` names.
pub fn gelu_tanh(x: f32) -> f32 {
    0.5 * x * (1.0 + (SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)).tanh())
}

/// GELU through the error function, `erf` to 1.5e-7 (Abramowitz and Stegun 7.1.26).
pub fn gelu(x: f32) -> f32 {
    let z = (x as f64 * std::f64::consts::FRAC_1_SQRT_2).abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let poly = ((((1.061_405_429 * t - 1.453_152_027) * t + 1.421_413_741) * t - 0.284_496_736)
        * t
        + 0.254_829_592)
        * t;
    let erf = (1.0 - poly * (-z * z).exp()).copysign(x as f64);
    (0.5 * x as f64 * (1.0 + erf)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        assert!((silu(1.0) - 0.731_058_6).abs() < 1e-6);
        assert!((gelu(1.0) - 0.841_344_7).abs() < 1e-6);
        assert!((gelu(-1.0) + 0.158_655_3).abs() < 1e-6);
        assert!((gelu_tanh(1.0) - 0.841_192).abs() < 1e-6);
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(sigmoid(0.0), 0.5);
    }

    #[test]
    fn far_from_zero_nothing_overflows() {
        for f in [silu, gelu, gelu_tanh] {
            assert_eq!(f(100.0), 100.0);
            assert_eq!(f(-100.0), 0.0);
        }
    }

    #[test]
    fn gate_multiplies_up() {
        let mut gate = [1.0, -2.0, 3.0];
        Activation::Silu.gate(&mut gate, &[2.0, 1.0, 0.0]);
        assert_eq!(gate, [2.0 * silu(1.0), silu(-2.0), 0.0]);
    }
}
