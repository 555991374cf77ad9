//! Gradients of whole layers with respect to their input, for every family, against differences.

use std::path::Path;

use candle_core::{Device, Tensor};
use moe_merge_checkpoint::Source;

use crate::layer::{Changes, Gating, Layer, Past, Wanted};
use crate::model::Tables;
use crate::ops::{Clamp, Open, to_vec};
use crate::spec::Spec;
use crate::weights::Weights;

fn wave(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn unit(v: &[f32]) -> Vec<f32> {
    let norm = dot(v, v).sqrt() as f32;
    v.iter().map(|v| v / norm).collect()
}

/// Slopes of `sum(weights . stream)` along some directions against the gradient.
fn check(folder: &Path) {
    let name = folder.display();
    let source = Source::open(&name.to_string().parse().unwrap(), Path::new(".")).unwrap();
    let spec = Spec::of(&source).unwrap();
    let weights = Weights::new(&source, &spec).unwrap();
    // Two sequences, one after the other.
    let rows = [0..5, 5..9];
    let positions = [0, 1, 2, 3, 4, 0, 1, 2, 3];
    let shape = (9, spec.hidden);
    for l in 0..spec.layers.len() {
        let layer = Layer::load(&weights, &spec, l).unwrap();
        let mut tables = Tables::new(&positions);
        let table = tables.of(layer.rope());
        let run = |x: &Tensor| layer.forward(&spec, x, table, Past::None(&rows)).unwrap().stream;
        let x = wave(9 * spec.hidden, l + 1);
        let back = unit(&wave(9 * spec.hidden, l + 50));
        let changes = Changes { gating: Gating::Stored, lora: None };
        let stream = Tensor::from_slice(&x, shape, &Device::Cpu).unwrap();
        let pass = layer.forward_trail(&spec, &stream, table, &rows, &changes, None);
        let (passed, trail) = pass.unwrap();
        let plain = to_vec(&run(&stream)).unwrap();
        let apart = plain.iter().zip(to_vec(&passed.stream).unwrap()).map(|(a, b)| (a - b).abs());
        assert!(apart.fold(0.0, f32::max) < 1e-5, "{name} layer {l}: the pass that leaves a trail");
        let wanted = Wanted { input: true, ..Wanted::default() };
        let along = (table, &rows[..]);
        let found = layer.backward(&spec, trail, along, &changes, wanted, back.clone()).unwrap();
        let gradient = found.input.unwrap();
        let norm = dot(&gradient, &gradient).sqrt();
        assert!(norm > 1e-2, "{name} layer {l}: a gradient to compare");
        for seed in 0..4 {
            let direction =
                unit(&if seed == 0 { gradient.clone() } else { wave(x.len(), 70 + seed) });
            let value = |by: f32| {
                let x: Vec<f32> = x.iter().zip(&direction).map(|(x, d)| x + by * d).collect();
                let x = Tensor::from_vec(x, shape, &Device::Cpu).unwrap();
                dot(&to_vec(&run(&x)).unwrap(), &back)
            };
            let product = dot(&gradient, &direction);
            // A step that makes a router choose otherwise says nothing: then a smaller one has to do.
            let error = |by: f32| {
                let slope = (value(by) - value(-by)) / (2.0 * f64::from(by));
                (product - slope).abs() / norm
            };
            let least = [1e-2, 3e-3, 1e-3].into_iter().map(error).fold(f64::INFINITY, f64::min);
            assert!(least < 4e-3, "{name} layer {l} direction {seed}: {product} by {least:e}");
        }
    }
}

#[test]
fn every_shared_architecture() {
    let Some(root) = moe_merge_testkit::shared("golden/arch") else { return };
    let mut folders: Vec<_> = std::fs::read_dir(root)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.is_dir())
        .collect();
    folders.sort();
    assert_eq!(folders.len(), 17);
    folders.iter().for_each(|f| check(f));
}

#[test]
fn every_architecture_of_our_own() {
    for name in ["deepseek_v2_yarn", "ernie4_5_moe", "granitemoeshared", "mixtral_fused"] {
        check(&moe_merge_testkit::repository("model/tests/data").join(name));
    }
}

#[test]
fn small_operations_by_hand() {
    let tensor = |values: &[f32], shape: (usize, usize)| {
        Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
    };
    let x = tensor(&[-3.0, 0.5, 2.0, 1.0], (2, 2));
    let clamped = x.apply_op1_no_bwd(&Clamp(1.0)).unwrap();
    assert_eq!(to_vec(&clamped).unwrap(), [-1.0, 0.5, 1.0, 1.0]);
    let mut d = [1.0, 2.0, 3.0, 4.0];
    Clamp(1.0).back(&x, &mut d).unwrap();
    assert_eq!(d, [0.0, 2.0, 0.0, 4.0]);
    // Half open, slope 1/4.
    let gate = tensor(&[0.0, 0.0], (2, 1));
    let open = x.apply_op2_no_bwd(&gate, &Open).unwrap();
    assert_eq!(to_vec(&open).unwrap(), [-1.5, 0.25, 1.0, 0.5]);
    let mut d = [1.0, 2.0, 3.0, 4.0];
    assert_eq!(Open.back(&x, &gate, &mut d).unwrap(), [-0.5, 2.5]);
    assert_eq!(d, [0.5, 1.0, 1.5, 2.0]);
}
