//! Merges of single tensors that are made in the test.

use std::sync::Arc;

use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::{Dtype, WeightRef};
use moe_merge_merge::methods::{self, Group, Method, Scope};

/// `n` normal numbers from a stream of their own.
pub fn normal(seed: u64, stream: u64, n: usize) -> Vec<f32> {
    let mut state = seed ^ stream.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1;
    let mut word = || {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..n)
        .map(|_| {
            let (a, b) = (word(), word());
            ((-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
        })
        .collect()
}

/// One merge of one tensor.
#[derive(Clone)]
pub struct Case {
    method: &'static Method,
    inputs: Vec<WeightRef>,
    base: Option<usize>,
    own: Vec<Vec<(&'static str, f64)>>,
    global: Vec<(&'static str, f64)>,
    seed: u64,
    name: String,
    dtype: Dtype,
}

#[allow(dead_code)] // each test file uses its part
impl Case {
    pub fn new(method: &str, shape: &[usize], models: &[&[f32]]) -> Self {
        let weight = |v: &&[f32]| -> WeightRef {
            Arc::new(OwnedWeight::from_f32("w", v, shape, Dtype::F32))
        };
        Self {
            method: methods::by_name(method).unwrap(),
            inputs: models.iter().map(weight).collect(),
            base: None,
            own: vec![Vec::new(); models.len()],
            global: Vec::new(),
            seed: 0,
            name: "w".into(),
            dtype: Dtype::F32,
        }
    }

    pub fn base(mut self, base: usize) -> Self {
        self.base = Some(base);
        self
    }

    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    pub fn name(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }

    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = dtype;
        self
    }

    fn has(&self, name: &str) -> bool {
        self.method.parameters.iter().any(|p| p.name == name)
    }

    pub fn own(mut self, model: usize, name: &'static str, value: f64) -> Self {
        assert!(self.has(name), "{name}");
        self.own[model].push((name, value));
        self
    }

    pub fn global(mut self, name: &'static str, value: f64) -> Self {
        assert!(self.has(name), "{name}");
        self.global.push((name, value));
        self
    }

    /// As [`Case::own`], for a method that has the parameter, and a model that is there.
    pub fn own_if(self, model: usize, name: &'static str, value: f64) -> Self {
        let own = model < self.own.len()
            && self.method.parameters.iter().any(|p| p.name == name && p.scope == Scope::Model);
        if own { self.own(model, name, value) } else { self }
    }

    /// As [`Case::global`], for a method that has the parameter.
    pub fn global_if(self, name: &'static str, value: f64) -> Self {
        let global =
            self.method.parameters.iter().any(|p| p.name == name && p.scope == Scope::Global);
        if global { self.global(name, value) } else { self }
    }

    /// The result as a weight.
    pub fn weight(&self) -> Result<WeightRef, String> {
        let values = |scope: Scope, given: &[(&str, f64)]| -> Vec<f64> {
            let table = self.method.parameters.iter().filter(|p| p.scope == scope);
            table
                .map(|p| {
                    let last = given.iter().rev().find(|(name, _)| *name == p.name);
                    last.map(|(_, v)| *v).or(p.default).unwrap_or(f64::NAN)
                })
                .collect()
        };
        let group = Group {
            own: self.own.iter().map(|own| values(Scope::Model, own)).collect(),
            global: values(Scope::Global, &self.global),
            inputs: self.inputs.clone(),
            base: self.base,
            dtype: self.dtype,
            out_dtype: self.dtype,
            name: self.name.clone(),
            recipe: "test.yaml".into(),
            seed: self.seed,
        };
        methods::merged(self.method, group)
    }

    pub fn try_run(&self) -> Result<Vec<f32>, String> {
        self.weight()?.to_f32().map_err(|e| e.to_string())
    }

    pub fn run(&self) -> Vec<f32> {
        self.try_run().unwrap()
    }
}
