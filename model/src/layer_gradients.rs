//! Gradients of whole layers with respect to their input, for every family, against differences.

use std::path::Path;

use candle_core::{Device, Tensor, Var};
use moe_merge_checkpoint::Source;

use crate::layer::{Layer, Past};
use crate::model::Tables;
use crate::ops::{Clamp, KnownGradient, Open, Residual, apply1, apply2, to_vec};
use crate::spec::Spec;
use crate::weights::Weights;
use crate::{Cache, Model};

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
        let variable = Var::from_tensor(&Tensor::from_slice(&x, shape, &Device::Cpu).unwrap());
        let variable = variable.unwrap();
        let d = Tensor::from_slice(&back, shape, &Device::Cpu).unwrap();
        let root = apply1(&run(&variable), KnownGradient(d)).unwrap();
        let gradient = to_vec(root.backward().unwrap().get(&variable).unwrap()).unwrap();
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
fn a_cache_has_no_gradient_and_says_so() {
    let folder = moe_merge_testkit::repository("model/tests/data").join("mixtral_fused");
    let name = folder.display().to_string();
    let source = Source::open(&name.parse().unwrap(), Path::new(".")).unwrap();
    let spec = Spec::of(&source).unwrap();
    let layer = Layer::load(&Weights::new(&source, &spec).unwrap(), &spec, 0).unwrap();
    let mut cache = Cache::new(&Model::open(&source).unwrap(), 4);
    let x = Var::zeros((2, 16), candle_core::DType::F32, &Device::Cpu).unwrap();
    let mut tables = Tables::new(&[0, 1]);
    let table = tables.of(layer.rope());
    let passed = layer.forward(&spec, &x, table, Past::Cache(&mut cache.layers[0], 0));
    let error = passed.err().expect("a refusal").to_string();
    assert!(error.contains("cache has no gradient"), "{error}");
}

#[test]
fn small_operations_by_hand() {
    let tensor = |values: &[f32], shape: (usize, usize)| {
        Var::from_tensor(&Tensor::from_slice(values, shape, &Device::Cpu).unwrap()).unwrap()
    };
    let back = |root: Tensor, d: &[f32], of: &[&Var]| -> Vec<Vec<f32>> {
        let d = Tensor::from_slice(d, root.shape(), &Device::Cpu).unwrap();
        let gradients = apply1(&root, KnownGradient(d)).unwrap().backward().unwrap();
        of.iter().map(|x| to_vec(gradients.get(x).unwrap()).unwrap()).collect()
    };
    let x = tensor(&[-3.0, 0.5, 2.0, 1.0], (2, 2));
    let clamped = apply1(&x, Clamp(1.0)).unwrap();
    assert_eq!(to_vec(&clamped).unwrap(), [-1.0, 0.5, 1.0, 1.0]);
    assert_eq!(back(clamped, &[1.0, 2.0, 3.0, 4.0], &[&x]), [[0.0, 2.0, 0.0, 4.0]]);
    let y = tensor(&[1.0, 1.0, 2.0, 2.0], (2, 2));
    let sum = apply2(&x, &y, Residual { scale: 0.5 }).unwrap();
    assert_eq!(to_vec(&sum).unwrap(), [-2.5, 1.0, 3.0, 2.0]);
    let found = back(sum, &[1.0, 2.0, 3.0, 4.0], &[&x, &y]);
    assert_eq!(found, [[1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 1.5, 2.0]]);
    // Half open, slope 1/4.
    let gate = tensor(&[0.0, 0.0], (2, 1));
    let open = apply2(&x, &gate, Open).unwrap();
    assert_eq!(to_vec(&open).unwrap(), [-1.5, 0.25, 1.0, 0.5]);
    let found = back(open, &[1.0, 2.0, 3.0, 4.0], &[&x, &gate]);
    assert_eq!(found, [vec![0.5, 1.0, 1.5, 2.0], vec![-0.5, 2.5]]);
}
