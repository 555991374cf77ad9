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

impl Activation {
    /// Gradient of [`Activation::gate`]: `gate = d_out up f'(gate)` and `up = d_out f(gate)`, in place.
    ///
    /// `d_out` has the length of both.
    pub fn gate_backward(self, gate: &mut [f32], up: &mut [f32], d_out: &[f32]) {
        let chunk = |gate: &mut [f32], up: &mut [f32], d_out: &[f32]| match self {
            Activation::Silu => silu_gate_backward(gate, up, d_out),
            Activation::GeluTanh => gelu_tanh_gate_backward(gate, up, d_out),
            Activation::Gelu => {
                for ((g, u), d) in gate.iter_mut().zip(up).zip(d_out) {
                    (*g, *u) = (d * *u * gelu_slope(*g), d * gelu(*g));
                }
            }
        };
        if gate.len() <= CHUNK {
            return chunk(gate, up, d_out);
        }
        let pairs = gate.par_chunks_mut(CHUNK).zip(up.par_chunks_mut(CHUNK));
        pairs.zip(d_out.par_chunks(CHUNK)).for_each(|((g, u), d)| chunk(g, u, d));
    }
}

each_set! {
    fn silu_gate_backward(gate: &mut [f32], up: &mut [f32], d_out: &[f32]) {
        for ((g, u), d) in gate.iter_mut().zip(up).zip(d_out) {
            let s = 1.0 / (1.0 + exp(-*g));
            let slope = s * (1.0 + *g * (1.0 - s));
            (*g, *u) = (d * *u * slope, d * (*g * s));
        }
    }
}

each_set! {
    fn gelu_tanh_gate_backward(gate: &mut [f32], up: &mut [f32], d_out: &[f32]) {
        for ((g, u), d) in gate.iter_mut().zip(up).zip(d_out) {
            // f(x) = x s(2y), y = c (x + 0.044715 x^3): f' = s + x s (1 - s) 2 y'
            let x = *g;
            let s = 1.0 / (1.0 + exp(-2.0 * SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)));
            let inner = 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * x * x);
            let slope = s + x * s * (1.0 - s) * inner;
            (*g, *u) = (d * *u * slope, d * (x * s));
        }
    }
}

/// `gelu'(x) = P(x) + x p(x)`, with the distribution and density of the normal law.
fn gelu_slope(x: f32) -> f32 {
    let density = (-0.5 * f64::from(x) * f64::from(x)).exp() / (2.0 * std::f64::consts::PI).sqrt();
    // x P(x) is gelu(x); at 0 the distribution is 1/2.
    let distribution = if x == 0.0 { 0.5 } else { f64::from(gelu(x)) / f64::from(x) };
    (distribution + f64::from(x) * density) as f32
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
    fn gate_backward_equals_differences() {
        let at: Vec<f32> = (-40..=40).map(|i| i as f32 * 0.2).collect();
        let ups: Vec<f32> = at.iter().map(|x| 1.0 - x * 0.3).collect();
        let d_out: Vec<f32> = at.iter().map(|x| (x * 3.0).sin()).collect();
        for f in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
            let (mut gate, mut up) = (at.clone(), ups.clone());
            f.gate_backward(&mut gate, &mut up, &d_out);
            let wide = |x: f64| match f {
                Activation::Silu => x / (1.0 + (-x).exp()),
                Activation::GeluTanh => {
                    let c = (2.0 / std::f64::consts::PI).sqrt();
                    0.5 * x * (1.0 + (c * (x + 0.044715 * x * x * x)).tanh())
                }
                // 1 + erf(x / sqrt 2) is twice the integral of the density, here by Simpson's rule.
                Activation::Gelu => {
                    let p = |t: f64| (-0.5 * t * t).exp() / (2.0 * std::f64::consts::PI).sqrt();
                    let h = x / 400.0;
                    let sum: f64 = (0..=400)
                        .map(|i| {
                            let w = if i % 400 == 0 { 1.0 } else { 2.0 + 2.0 * (i % 2) as f64 };
                            w * p(i as f64 * h)
                        })
                        .sum();
                    x * (0.5 + sum * h / 3.0)
                }
            };
            for i in 0..at.len() {
                let x = f64::from(at[i]);
                let slope = (wide(x + 1e-5) - wide(x - 1e-5)) / 2e-5;
                let d = f64::from(d_out[i]);
                let d_gate = d * f64::from(ups[i]) * slope;
                assert!(
                    (f64::from(gate[i]) - d_gate).abs() < 2e-6,
                    "{f:?} {x} {} {d_gate}",
                    gate[i]
                );
                assert!((f64::from(up[i]) - d * wide(x)).abs() < 2e-6, "{f:?} {x}");
            }
        }
        let (mut gate, mut up) = ([200.0, -200.0], [1.0, 1.0]);
        Activation::Silu.gate_backward(&mut gate, &mut up, &[1.0, 1.0]);
        assert_eq!((gate, up), ([1.0, 0.0], [200.0, 0.0]));
    }

    #[test]
    fn gate_multiplies_up() {
        let mut gate = [1.0, -2.0, 3.0];
        Activation::Silu.gate(&mut gate, &[2.0, 1.0, 0.0]);
        assert_eq!(gate, [2.0 * silu(1.0), silu(-2.0), 0.0]);
    }
}
