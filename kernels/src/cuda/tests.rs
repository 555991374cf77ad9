//! The kernels of `moe.cu` and the code that launches them, against the CPU path.
//!
//! Without a GPU they run in the emulator (which knows neither time nor the caches of a real device); where a device is
//! found, the same tests run on it too.

use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use super::emulator;
use super::{CudaError, CudaLinear, CudaMoe, Device, LoraFactors};
use crate::cast::{self, Dtype};
use crate::dense::Into;
use crate::dispatch::ExpertView;
use crate::error::KernelError;
use crate::routing::{RouterSpec, Routing, Score, route};
use crate::view::MatView;
use crate::{Accuracy, Activation, Exec, MoeBlock, linear_backward};

const DTYPES: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];

/// The emulator in both orders, and the GPU if there is one.
fn devices() -> Vec<Device> {
    let emulated = [false, true].into_iter().filter_map(emulator::emulated);
    emulated.chain(gpu()).collect()
}

fn gpu() -> Option<Device> {
    match Device::open() {
        Ok(device) => Some(device),
        Err(CudaError::NoDriver | CudaError::NoDevice { .. } | CudaError::TooOld { .. }) => None,
        Err(e) => panic!("{e}"),
    }
}

fn linear(
    x: &[f32],
    w: MatView<'_>,
    bias: Option<&[f32]>,
    out: &mut [f32],
) -> Result<(), KernelError> {
    crate::linear(x, w, bias, out, &Exec::default())
}

fn moe_forward(
    x: &[f32],
    routing: &Routing,
    experts: &[ExpertView<'_>],
    curve: Activation,
    out: &mut [f32],
) -> Result<(), KernelError> {
    crate::moe_forward(x, routing, experts, curve, out, &Exec::default())
}

/// Numbers between -1 and 1, not exact in 16 bits.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729) as f32 * 0.618).sin()).collect()
}

/// Numbers as stored, at an odd offset.
struct Stored {
    bytes: Vec<u8>,
    dtype: Dtype,
    rows: usize,
    cols: usize,
}

impl Stored {
    fn new(dtype: Dtype, rows: usize, cols: usize, seed: usize) -> Self {
        let mut bytes = vec![0; rows * cols * dtype.size() + 1];
        cast::narrow(&numbers(rows * cols, seed), dtype, &mut bytes[1..]);
        Self { bytes, dtype, rows, cols }
    }

    fn view(&self) -> MatView<'_> {
        MatView::new(&self.bytes[1..], self.dtype, self.rows, self.cols).unwrap()
    }
}

fn experts(dtype: Dtype, count: usize, hidden: usize, inter: usize) -> Vec<[Stored; 3]> {
    (0..count)
        .map(|e| {
            [
                Stored::new(dtype, inter, hidden, 3 * e),
                Stored::new(dtype, inter, hidden, 3 * e + 1),
                Stored::new(dtype, hidden, inter, 3 * e + 2),
            ]
        })
        .collect()
}

fn views(experts: &[[Stored; 3]]) -> Vec<ExpertView<'_>> {
    experts
        .iter()
        .map(|e| ExpertView { gate: e[0].view(), up: e[1].view(), down: e[2].view() })
        .collect()
}

/// Within `part` of the largest value.
fn near(found: &[f32], wanted: &[f32], part: f32, what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    let most = wanted.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    for (i, (f, w)) in found.iter().zip(wanted).enumerate() {
        assert!((f - w).abs() <= part * most, "{what}: number {i} is {f}, not {w}");
    }
}

/// Exact products of bf16 weights leave 2^-17 of each term; all others are f32.
const EXACT: f32 = 2e-5;

#[test]
fn linear_equals_the_cpu() {
    for device in devices() {
        for dtype in DTYPES {
            for (tokens, rows, cols) in
                [(1, 5, 3), (8, 9, 40), (9, 1, 1), (65, 70, 33), (3, 64, 64)]
            {
                let weight = Stored::new(dtype, rows, cols, 1);
                let (x, bias) = (numbers(tokens * cols, 2), numbers(rows, 3));
                for bias in [None, Some(&bias[..])] {
                    let what = format!("{dtype} {tokens} {rows} {cols} {}", device.name());
                    let on_device = CudaLinear::upload(&device, weight.view(), bias).unwrap();
                    let [mut found, mut wanted] = [0, 1].map(|_| vec![f32::NAN; tokens * rows]);
                    on_device.forward(&x, &mut found).unwrap();
                    linear(&x, weight.view(), bias, &mut wanted).unwrap();
                    near(&found, &wanted, EXACT, &what);
                }
                let dy = numbers(tokens * rows, 4);
                let on_device = CudaLinear::upload(&device, weight.view(), None).unwrap();
                let [mut found, mut wanted] = [0, 1].map(|_| vec![f32::NAN; tokens * cols]);
                on_device.backward(&dy, &mut found).unwrap();
                linear_backward(&dy, weight.view(), &mut wanted, Into::Overwrite, &Exec::default())
                    .unwrap();
                near(&found, &wanted, EXACT, &format!("backward {dtype} {tokens} {rows} {cols}"));
            }
        }
    }
}

#[test]
fn fast_products_round_activations() {
    for device in devices() {
        let weight = Stored::new(Dtype::BF16, 20, 50, 1);
        let x = numbers(30 * 50, 2);
        let fast = device.with_accuracy(Accuracy::Fast);
        let on_device = CudaLinear::upload(&fast, weight.view(), None).unwrap();
        let [mut found, mut wanted] = [0, 1].map(|_| vec![0.0; 30 * 20]);
        on_device.forward(&x, &mut found).unwrap();
        let rounded: Vec<f32> = x.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect();
        linear(&rounded, weight.view(), None, &mut wanted).unwrap();
        near(&found, &wanted, EXACT, "rounded");
        linear(&x, weight.view(), None, &mut wanted).unwrap();
        near(&found, &wanted, 1e-2, "exact");
    }
}

/// Ragged sizes: decode and groups, tiles that are full, short, many and none.
const SHAPES: [(usize, usize, usize, usize, usize); 6] = [
    // tokens, experts, k, hidden, inter
    (1, 3, 2, 10, 7),
    (4, 2, 1, 64, 33),
    (5, 6, 3, 9, 65),
    (40, 4, 2, 66, 20),
    (150, 2, 2, 17, 8),
    (70, 40, 1, 8, 5),
];

const CURVES: [Activation; 3] = [Activation::Silu, Activation::GeluTanh, Activation::Gelu];

#[test]
fn dispatch_equals_the_cpu() {
    for device in devices() {
        for (i, (tokens, count, k, hidden, inter)) in SHAPES.into_iter().enumerate() {
            for dtype in DTYPES {
                let stored = experts(dtype, count, hidden, inter);
                let (views, curve) = (views(&stored), CURVES[i % 3]);
                let x = numbers(tokens * hidden, 5);
                let logits = numbers(tokens * count, 6);
                let routing = route(&logits, tokens, count, None, &RouterSpec::softmax(k)).unwrap();
                let what = format!("{dtype} shape {i} {}", device.name());
                let moe = CudaMoe::upload(&device, &views).unwrap();
                let [mut found, mut wanted] = [0, 1].map(|_| vec![f32::NAN; x.len()]);
                moe.forward(&x, &routing, curve, &mut found).unwrap();
                moe_forward(&x, &routing, &views, curve, &mut wanted).unwrap();
                near(&found, &wanted, 2.0 * EXACT, &what);

                let mut again = vec![0.0; x.len()];
                moe.forward(&x, &routing, curve, &mut again).unwrap();
                assert_eq!(found, again, "{what}: two calls differ");

                let (d_out, exec) = (numbers(x.len(), 7), Exec::default());
                let [mut d_x, mut d_x_wanted] = [0, 1].map(|_| vec![f32::NAN; x.len()]);
                let dw = moe.backward(&x, &routing, curve, &d_out, Some(&mut d_x)).unwrap();
                let (routing, experts) = (&routing, &views[..]);
                let block = MoeBlock {
                    x: &x,
                    routing,
                    experts,
                    activation: curve,
                    lora: None,
                    exec: &exec,
                };
                let inner = block.inner().unwrap();
                let wanted = block.backward(inner, &d_out, Some(&mut d_x_wanted)).unwrap();
                near(&dw, &wanted.weights, 4.0 * EXACT, &format!("slot weights {what}"));
                near(&d_x, &d_x_wanted, 4.0 * EXACT, &format!("input {what}"));
                assert_eq!(moe.backward(&x, routing, curve, &d_out, None).unwrap(), dw);
            }
        }
    }
}

#[test]
fn experts_of_several_dtypes_become_f32() {
    for device in devices() {
        let mut stored = experts(Dtype::BF16, 2, 12, 9);
        stored[1][1] = Stored::new(Dtype::F16, 9, 12, 40);
        let views = views(&stored);
        let x = numbers(6 * 12, 5);
        let routing = route(&numbers(12, 6), 6, 2, None, &RouterSpec::softmax(1)).unwrap();
        let [mut found, mut wanted] = [0, 1].map(|_| vec![f32::NAN; x.len()]);
        let moe = CudaMoe::upload(&device, &views).unwrap();
        moe.forward(&x, &routing, Activation::Silu, &mut found).unwrap();
        moe_forward(&x, &routing, &views, Activation::Silu, &mut wanted).unwrap();
        near(&found, &wanted, EXACT, "mixed");
    }
}

/// A block with router and experts of its own; the logits are those of the CPU, so that ties can be made.
fn block(
    device: &Device,
    tokens: usize,
    count: usize,
    spec: RouterSpec,
    bias: Option<&[f32]>,
    ties: bool,
) {
    let (hidden, inter) = (11, 6);
    let stored = experts(Dtype::BF16, count, hidden, inter);
    let views = views(&stored);
    let (router, x) = (Stored::new(Dtype::F32, count, hidden, 9), numbers(tokens * hidden, 5));
    // A router of zeros: every logit is 0, every choice a tie.
    let zeros = vec![0; count * hidden * 4];
    let router =
        if ties { MatView::new(&zeros, Dtype::F32, count, hidden).unwrap() } else { router.view() };
    let moe = CudaMoe::upload(device, &views).unwrap();
    let on_device = CudaLinear::upload(device, router, None).unwrap();
    let [mut found, mut wanted] = [0, 1].map(|_| vec![f32::NAN; x.len()]);
    let told = moe.block(&x, &on_device, bias, &spec, Activation::Silu, &mut found).unwrap();
    let mut logits = vec![0.0; tokens * count];
    linear(&x, router, None, &mut logits).unwrap();
    let routing = route(&logits, tokens, count, bias, &spec).unwrap();
    near(&told.logits, &logits, 1e-5, "logits");
    assert_eq!(told.routing.ids, routing.ids, "{spec:?} {count}");
    assert_eq!((told.routing.tokens, told.routing.top_k), (tokens, spec.top_k));
    near(&told.routing.weights, &routing.weights, 1e-5, "weights");
    moe_forward(&x, &routing, &views, Activation::Silu, &mut wanted).unwrap();
    near(&found, &wanted, 4.0 * EXACT, "output");
}

#[test]
fn the_whole_block_equals_the_cpu() {
    let softmax = RouterSpec::softmax;
    for device in devices() {
        for (tokens, count, k) in [(1, 1, 1), (3, 8, 2), (70, 5, 5), (6, 100, 8)] {
            for ties in [false, true] {
                block(&device, tokens, count, softmax(k), None, ties);
                let plain = RouterSpec { renormalise: false, scale: 2.5, ..softmax(k) };
                block(&device, tokens, count, plain, None, ties);
                let sigmoid = RouterSpec { score: Score::Sigmoid, ..softmax(k) };
                let bias: Vec<f32> = numbers(count, 20).iter().map(|b| b * 3.0).collect();
                block(&device, tokens, count, sigmoid, Some(&bias), ties);
            }
        }
        for ties in [false, true] {
            let grouped = RouterSpec { groups: Some((4, 2)), ..softmax(5) };
            block(&device, 7, 12, grouped, None, ties);
            let grouped = RouterSpec { groups: Some((40, 3)), ..softmax(2) };
            block(&device, 7, 80, grouped, None, ties);
        }
    }
}

#[test]
fn bad_logits_are_named() {
    for device in devices() {
        let (stored, router) = (experts(Dtype::BF16, 3, 4, 4), Stored::new(Dtype::F32, 3, 4, 9));
        let moe = CudaMoe::upload(&device, &views(&stored)).unwrap();
        let router = CudaLinear::upload(&device, router.view(), None).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            let (mut x, mut out) = (numbers(5 * 4, 5), vec![0.0; 20]);
            x[2 * 4 + 1] = bad;
            let spec = RouterSpec::softmax(2);
            let told = moe.block(&x, &router, None, &spec, Activation::Silu, &mut out);
            let wanted = KernelError::NotFinite { token: 2, expert: 0 };
            assert_eq!(told, Err(CudaError::Kernel(wanted)));
        }
    }
}

#[test]
fn lora_gradients_equal_the_formula() {
    for device in devices() {
        for (rows, input, output, rank) in [(1, 3, 5, 1), (20, 70, 9, 4), (70, 8, 130, 3)] {
            let (x, dy) = (numbers(rows * input, 1), numbers(rows * output, 2));
            let (a, b) = (numbers(rank * input, 3), numbers(output * rank, 4));
            let factors = LoraFactors { a: &a, b: &b, scale: 0.5, rank };
            let found = device.lora_gradients(&x, &dy, rows, factors).unwrap();
            // Sums of products in f64: low = x A^T, back = dy B.
            let sum = |n: usize, f: &dyn Fn(usize) -> f64| (0..n).map(f).sum::<f64>();
            let at =
                |m: &[f32], row: usize, width: usize, col: usize| f64::from(m[row * width + col]);
            let low =
                |n: usize, r: usize| sum(input, &|i| at(&x, n, input, i) * at(&a, r, input, i));
            let back =
                |n: usize, r: usize| sum(output, &|o| at(&dy, n, output, o) * at(&b, o, rank, r));
            let table = |height: usize, width: usize, f: &dyn Fn(usize, usize) -> f64| {
                let cells = (0..height).flat_map(|i| (0..width).map(move |j| (i, j)));
                cells.map(|(i, j)| (0.5 * f(i, j)) as f32).collect::<Vec<f32>>()
            };
            let d_a = table(rank, input, &|r, i| sum(rows, &|n| back(n, r) * at(&x, n, input, i)));
            let d_b =
                table(output, rank, &|o, r| sum(rows, &|n| at(&dy, n, output, o) * low(n, r)));
            let d_x = table(rows, input, &|n, i| sum(rank, &|r| back(n, r) * at(&a, r, input, i)));
            near(&found.a, &d_a, 1e-5, "A");
            near(&found.b, &d_b, 1e-5, "B");
            near(&found.x, &d_x, 1e-5, "x");
        }
        let none = LoraFactors { a: &[1.0], b: &[1.0], scale: 1.0, rank: 1 };
        let found = device.lora_gradients(&[], &[], 0, none).unwrap();
        assert_eq!((found.a, found.b, found.x), (vec![0.0], vec![0.0], vec![]));
    }
}

#[test]
fn wrong_sizes_are_refused() {
    for device in devices() {
        let weight = Stored::new(Dtype::BF16, 2, 3, 1);
        assert!(CudaLinear::upload(&device, weight.view(), Some(&[0.0])).is_err());
        let on_device = CudaLinear::upload(&device, weight.view(), None).unwrap();
        assert!(on_device.bytes() >= 2 * 8 * 2);
        let mut out = [0.0; 2];
        assert!(on_device.forward(&[0.0; 4], &mut out).is_err());
        assert!(on_device.forward(&[0.0; 3], &mut out[..1]).is_err());
        assert!(on_device.forward(&[], &mut []).is_ok());
        assert!(on_device.backward(&[0.0; 2], &mut out).is_err());

        assert!(CudaMoe::upload(&device, &[]).is_err());
        let (stored, other) = (experts(Dtype::F32, 2, 2, 3), experts(Dtype::F32, 1, 3, 2));
        let mixed = [views(&stored), views(&other)].concat();
        assert!(CudaMoe::upload(&device, &mixed).is_err());
        let moe = CudaMoe::upload(&device, &views(&stored)).unwrap();
        let silu = Activation::Silu;
        let routing = |id| Routing { tokens: 1, top_k: 1, ids: vec![id], weights: vec![1.0] };
        assert!(moe.forward(&[0.0; 2], &routing(1), silu, &mut out).is_ok());
        assert!(moe.forward(&[0.0; 2], &routing(2), silu, &mut out).is_err());
        assert!(moe.forward(&[0.0; 1], &routing(1), silu, &mut out).is_err());
        assert!(moe.forward(&[0.0; 2], &routing(1), silu, &mut out[..1]).is_err());
        assert!(moe.backward(&[0.0; 2], &routing(1), silu, &[0.0; 1], None).is_err());
        let router = CudaLinear::upload(&device, weight.view(), None).unwrap();
        let spec = RouterSpec::softmax(1);
        assert!(moe.block(&[0.0; 2], &router, None, &spec, silu, &mut out).is_err());
        let factors = LoraFactors { a: &[0.0; 3], b: &[0.0; 2], scale: 1.0, rank: 2 };
        assert!(device.lora_gradients(&[0.0], &[0.0], 1, factors).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn any_sizes_equal_the_cpu(
        tokens in 1usize..40, count in 1usize..6, k in 1usize..6, hidden in 1usize..40, inter in 1usize..40,
        dtype in 0usize..3, reversed: bool,
    ) {
        let Some(device) = emulator::emulated(reversed) else { return Ok(()) };
        let stored = experts(DTYPES[dtype], count, hidden, inter);
        let views = views(&stored);
        let (x, logits) = (numbers(tokens * hidden, 5), numbers(tokens * count, 6));
        let spec = RouterSpec::softmax(k.min(count));
        let routing = route(&logits, tokens, count, None, &spec).unwrap();
        let [mut found, mut wanted] = [0, 1].map(|_| vec![f32::NAN; x.len()]);
        let moe = CudaMoe::upload(&device, &views).unwrap();
        moe.forward(&x, &routing, Activation::Silu, &mut found).unwrap();
        moe_forward(&x, &routing, &views, Activation::Silu, &mut wanted).unwrap();
        near(&found, &wanted, 4.0 * EXACT, "output");
    }
}

/// Compiles again, compares with the file, assembles for two generations of devices.
#[test]
fn the_ptx_assembles_without_spills() {
    let Some(python) = std::env::var_os("MOE_MERGE_CUDA_PYTHON").filter(|v| !v.is_empty()) else {
        return emulator::skipped(
            "`MOE_MERGE_CUDA_PYTHON` names no Python with the packages of kernels/cuda/build_ptx.py",
        );
    };
    let script = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/build_ptx.py"));
    let done = Command::new(python).arg(script).arg("--check").output().unwrap();
    let told = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{told}{}", String::from_utf8_lossy(&done.stderr));
    assert!(told.ends_with("spills: 0 bytes\n"), "{told}");
}

#[test]
fn without_a_device_opening_one_is_an_error_that_says_so() {
    match Device::open() {
        Ok(device) => {
            assert!(!device.name().is_empty() && device.free_memory().unwrap() > 0);
        }
        Err(e) => {
            emulator::skipped("no CUDA device is here: the kernels ran in the emulator alone");
            assert!(e.to_string().contains("CUDA"), "{e}");
        }
    }
}
