//! MoE blocks and linear layers on a CUDA device, over what the device itself allows: `mma.sync` in registers, copies within its
//! memory. Times are those of a call: activations travel there and back, as they do in a model.
//!
//! `cargo bench -p moe-merge-kernels --bench cuda`

mod limits;

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, CudaStream, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use limits::shapes::{HIDDEN, INTER, matrix, numbers};
use limits::{Bar, Bench, Clock, GBS, GFLOPS, Side};
use moe_merge_kernels::cuda::{CudaError, CudaLinear, CudaMoe, Device};
use moe_merge_kernels::{Accuracy, Activation, Dtype, ExpertView, RouterSpec, cast};

/// Blocks and steps of the limits.
const BLOCKS: u32 = 1056;
const ROUNDS: u32 = 4096;

/// Multiplications and additions of one run of `spin`: eight products of 16 x 8 x 16 a step, four warps a block.
const SPIN_FLOPS: f64 = BLOCKS as f64 * 4.0 * ROUNDS as f64 * 8.0 * (2 * 16 * 8 * 16) as f64;

/// Bytes of a copy within the device, read and written.
const COPY: usize = 1 << 30;

/// `mma.sync.m16n8k16` of bf16 into eight sets of sums, which never touch memory.
fn spin_ptx() -> String {
    let mma: String = (0..8)
        .map(|i| {
            let c: Vec<String> = (0..4).map(|j| format!("%f{}", 4 * i + j)).collect();
            let c = c.join(",");
            format!(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{c}}}, {{%r1,%r2,%r3,%r4}}, {{%r5,%r6}}, {{{c}}};\n"
            )
        })
        .collect();
    let zero: String = (0..32).map(|i| format!("mov.f32 %f{i}, 0f00000000;\n")).collect();
    let sum: String = (1..32).map(|i| format!("add.f32 %f0, %f0, %f{i};\n")).collect();
    let operands: String = (1..7).map(|i| format!("mov.u32 %r{i}, %tid.x;\n")).collect();
    format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry spin(.param .u64 out, .param .u32 rounds) {{\n\
         .reg .pred %p; .reg .f32 %f<32>; .reg .b32 %r<9>; .reg .b64 %d<3>;\n\
         ld.param.u64 %d1, [out]; ld.param.u32 %r7, [rounds];\n{operands}{zero}\
         again:\n{mma}sub.u32 %r7, %r7, 1; setp.ne.u32 %p, %r7, 0;\n@%p bra again;\n{sum}\
         setp.eq.f32 %p, %f0, 0f3f800000;\n@%p st.global.f32 [%d1], %f0;\nret;\n}}\n"
    )
}

/// What the device allows.
struct Limits {
    stream: Arc<CudaStream>,
    spin: CudaFunction,
    from: cudarc::driver::CudaSlice<u8>,
    to: cudarc::driver::CudaSlice<u8>,
}

impl Limits {
    fn new() -> Self {
        let context = CudaContext::new(0).expect("a device was found");
        let module = context.load_module(Ptx::from_src(spin_ptx())).expect("the loop loads");
        let stream = context.new_stream().expect("a stream");
        let [from, to] = [0, 1].map(|_| stream.alloc_zeros::<u8>(COPY).expect("room"));
        Self { spin: module.load_function("spin").expect("it is there"), stream, from, to }
    }

    fn spin(&mut self) {
        let config =
            LaunchConfig { grid_dim: (BLOCKS, 1, 1), block_dim: (128, 1, 1), shared_mem_bytes: 0 };
        let mut launch = self.stream.launch_builder(&self.spin);
        launch.arg(&mut self.to).arg(&ROUNDS);
        // SAFETY: `to` has room for the one number that the loop might write.
        unsafe { launch.launch(config) }.expect("the loop starts");
        self.stream.synchronize().expect("the loop ends");
    }

    fn copy(&mut self) {
        self.stream.memcpy_dtod(&self.from, &mut self.to).expect("a copy");
        self.stream.synchronize().expect("the copy ends");
    }
}

/// Weights of a layer: experts of equal numbers, which costs the same.
struct Layer {
    bytes: [Vec<u8>; 3],
    router: Vec<u8>,
    hidden: usize,
    inter: usize,
    experts: usize,
}

impl Layer {
    fn new(hidden: usize, inter: usize, experts: usize) -> Self {
        let stored = |count: usize| {
            let mut bytes = vec![0; 2 * count];
            cast::narrow(&numbers(count), Dtype::BF16, &mut bytes);
            bytes
        };
        let bytes = [0, 1, 2].map(|_| stored(hidden * inter));
        let router: Vec<f32> =
            (0..experts * hidden).map(|i| ((i * i * 31) % 977) as f32 / 488.0 - 1.0).collect();
        let mut rows = vec![0; 2 * router.len()];
        cast::narrow(&router, Dtype::BF16, &mut rows);
        Self { bytes, router: rows, hidden, inter, experts }
    }

    fn views(&self) -> Vec<ExpertView<'_>> {
        let Self { hidden, inter, .. } = *self;
        let [gate, up, down] = &self.bytes;
        let one = ExpertView {
            gate: matrix(gate, Dtype::BF16, inter, hidden),
            up: matrix(up, Dtype::BF16, inter, hidden),
            down: matrix(down, Dtype::BF16, hidden, inter),
        };
        vec![one; self.experts]
    }
}

const TOP_K: usize = 2;

fn block(bench: &mut Bench, limits: &mut Limits, device: &Device, layer: &Layer, tokens: usize) {
    let Layer { hidden, inter, experts, .. } = *layer;
    let moe = CudaMoe::upload(device, &layer.views()).expect("room for one layer");
    let router = matrix(&layer.router, Dtype::BF16, experts, hidden);
    let router = CudaLinear::upload(device, router, None).expect("room");
    let (x, mut out) = (numbers(tokens * hidden), vec![0.0; tokens * hidden]);
    let spec = RouterSpec::softmax(TOP_K);
    let name = format!("moe {hidden} x {inter}, top-{TOP_K} of {experts}, {tokens} tokens");
    let run = || {
        moe.block(&x, &router, None, &spec, Activation::Silu, &mut out).expect("sizes fit");
    };
    measure(bench, limits, &name, (tokens * TOP_K) as f64, (3 * hidden * inter) as f64, run);
}

/// Against arithmetic for many pairs, else against memory: `weights` numbers are multiplied with each of `pairs` vectors.
fn measure(
    bench: &mut Bench,
    limits: &mut Limits,
    name: &str,
    pairs: f64,
    weights: f64,
    run: impl FnMut(),
) {
    // A weight is two bytes where it is read once for each pair, and a multiplication and an addition: two of either.
    let (few, work) = (pairs <= 8.0, pairs * 2.0 * weights);
    let (unit, limit, peak) = match few {
        true => (GBS, "copy within the device", (2 * COPY) as f64),
        false => (GFLOPS, "mma.sync in registers", SPIN_FLOPS),
    };
    let limit_run = || if few { limits.copy() } else { limits.spin() };
    let mut sides = [Side::new(work, run), Side::new(peak, limit_run)];
    let Some(rounds) = bench.in_turn(("cuda", name), Clock::Wall, &mut sides) else { return };
    let speeds = [0, 1].map(|side| unit.of(rounds.speed(side)));
    let what = format!("{name}: {:.1} of {:.1} {} ({limit})", speeds[0], speeds[1], unit.name());
    bench.line(&what, rounds.ratio(0, 1), Bar::None, rounds.spread(1));
}

fn linear(bench: &mut Bench, limits: &mut Limits, device: &Device, size: usize, tokens: usize) {
    let mut bytes = vec![0; 2 * size * size];
    cast::narrow(&numbers(size * size), Dtype::BF16, &mut bytes);
    let weight = matrix(&bytes, Dtype::BF16, size, size);
    let weight = CudaLinear::upload(device, weight, None).expect("room");
    let (x, mut out) = (numbers(tokens * size), vec![0.0; tokens * size]);
    let name = format!("linear {size} x {size}, {tokens} tokens");
    let run = || weight.forward(&x, &mut out).expect("sizes fit");
    measure(bench, limits, &name, tokens as f64, (size * size) as f64, run);
}

fn main() {
    let device = match Device::open() {
        Ok(device) => device,
        Err(e @ (CudaError::NoDriver | CudaError::NoDevice { .. } | CudaError::TooOld { .. })) => {
            println!("skipped: {e}");
            return;
        }
        Err(e) => panic!("{e}"),
    };
    let (mut bench, mut limits) = (Bench::default(), Limits::new());
    bench.note(format!("on {}", device.name()));
    let (small, large) = (Layer::new(HIDDEN, INTER, 4), Layer::new(4096, 14_336, 8));
    for accuracy in [Accuracy::Fast, Accuracy::Exact] {
        let device = device.clone().with_accuracy(accuracy);
        bench.note(format!("products {accuracy:?}"));
        for tokens in [1, 512, 8192] {
            block(&mut bench, &mut limits, &device, &small, tokens);
        }
        for tokens in [1, 512, 8192] {
            block(&mut bench, &mut limits, &device, &large, tokens);
        }
        for tokens in [1, 4096] {
            linear(&mut bench, &mut limits, &device, 4096, tokens);
        }
    }
    bench.finish();
}
