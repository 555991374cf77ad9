//! The routed experts of a layer on a device.

use crate::activation::Activation;
use crate::cuda::backend::{Arg, Use};
use crate::cuda::device::{Buffer, Device, Rows};
use crate::cuda::error::CudaError;
use crate::cuda::linear::{CudaLinear, ROWS_OF_BLOCK, TILE};
use crate::cuda::matrix::{Stack, one_dtype};
use crate::dispatch::ExpertView;
use crate::error::KernelError;
use crate::exec::Batching;
use crate::routing::{Precision, RouterSpec, Routing, Score};

/// Up to so many tokens, pairs are not grouped by expert: every pair reads its expert row by row.
const DECODE_TOKENS: usize = 4;

/// A constant of `moe.cu`.
const MOST_EXPERTS: usize = 1024;

/// Experts with their weights on the device.
#[derive(Debug)]
pub struct CudaMoe {
    pub(super) device: Device,
    pub(super) gate: Stack,
    pub(super) up: Stack,
    pub(super) down: Stack,
    experts: usize,
}

/// What [`CudaMoe::block`] found out beside its output.
#[derive(Debug, Clone, PartialEq)]
pub struct Block {
    /// Where the tokens went.
    pub routing: Routing,
    /// What they were routed by, `[tokens, experts]`.
    pub logits: Vec<f32>,
}

/// Pairs in the order of their experts, on the device.
pub(super) struct Order {
    pub order: Buffer,
    pub tiles: Buffer,
    pub tile_count: Buffer,
    /// The most tiles there can be.
    pub most: usize,
}

impl CudaMoe {
    /// Uploads experts of equal sizes. Where gates and ups, or downs, are stored in several dtypes, these become f32.
    ///
    /// # Errors
    /// [`KernelError::Length`] if the sizes are not equal or there are no experts; [`CudaError::NoRoom`], or what the
    /// driver says.
    pub fn upload(device: &Device, experts: &[ExpertView<'_>]) -> Result<Self, CudaError> {
        let Some(first) = experts.first() else {
            return Err(KernelError::Length { what: "experts", expected: 1, found: 0 }.into());
        };
        let (inter, hidden) = (first.gate.rows(), first.gate.cols());
        KernelError::check("rows of an expert's `up`", inter, first.up.rows())?;
        KernelError::check("columns of an expert's `up`", hidden, first.up.cols())?;
        KernelError::check("rows of an expert's `down`", hidden, first.down.rows())?;
        KernelError::check("columns of an expert's `down`", inter, first.down.cols())?;
        let gates: Vec<_> = experts.iter().map(|e| e.gate).collect();
        let ups: Vec<_> = experts.iter().map(|e| e.up).collect();
        let downs: Vec<_> = experts.iter().map(|e| e.down).collect();
        let dtype = one_dtype(gates.iter().chain(&ups));
        Ok(Self {
            device: device.clone(),
            gate: Stack::upload(device, &gates, dtype)?,
            up: Stack::upload(device, &ups, dtype)?,
            down: Stack::upload(device, &downs, one_dtype(&downs))?,
            experts: experts.len(),
        })
    }

    /// Whether [`CudaMoe::block`] takes so many experts, and computes this rule: in f32.
    pub fn can_route(&self, spec: &RouterSpec) -> bool {
        self.experts <= MOST_EXPERTS && spec.precision == Precision::F32
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        [&self.gate, &self.up, &self.down].iter().map(|s| s.buffer.bytes()).sum()
    }

    pub(super) fn hidden(&self) -> usize {
        self.gate.cols
    }

    pub(super) fn inter(&self) -> usize {
        self.gate.rows
    }

    /// As [`crate::moe_forward`].
    ///
    /// * `x`, `out`: `[tokens, hidden]`
    ///
    /// # Errors
    /// [`KernelError::Length`] or [`KernelError::TopK`] if routing, experts and slices do not fit each other;
    /// [`CudaError::NoRoom`], or what the driver says.
    pub fn forward(
        &self,
        x: &[f32],
        routing: &Routing,
        activation: Activation,
        out: &mut [f32],
    ) -> Result<(), CudaError> {
        self.forward_as(x, routing, activation, out, Batching::Fastest)
    }

    /// As [`CudaMoe::forward`], in the kernels that `batching` says.
    ///
    /// # Errors
    /// As [`CudaMoe::forward`].
    pub fn forward_as(
        &self,
        x: &[f32],
        routing: &Routing,
        activation: Activation,
        out: &mut [f32],
        batching: Batching,
    ) -> Result<(), CudaError> {
        self.check(routing)?;
        let (tokens, k) = (routing.tokens, routing.top_k);
        KernelError::check("expert input", tokens * self.hidden(), x.len())?;
        KernelError::check("expert output", tokens * self.hidden(), out.len())?;
        if out.is_empty() {
            return Ok(());
        }
        let x = self.device.put_rows(x, tokens, self.hidden())?;
        let ids = self.device.put(&routing.ids, Use::Scratch)?;
        let weights = self.device.put(&routing.weights, Use::Scratch)?;
        let few = match batching {
            Batching::Fastest => tokens <= DECODE_TOKENS,
            Batching::Together => false,
            Batching::Alone => true,
        };
        let y = self.enqueue(&x, (tokens, few), k, ids.arg(), weights.arg(), activation)?;
        self.device.get(&y, out)
    }

    /// The whole block: logits, choice of experts, grouping, products and sum, all on the device.
    ///
    /// * `router`: `[experts, hidden]`, without a bias of its own; `bias`: `[experts]`, for the choice only
    /// * `x`, `out`: `[tokens, hidden]`
    ///
    /// # Errors
    /// As [`CudaMoe::forward`] and [`crate::route`]; [`CudaError::TooMany`] for more than 1024 experts.
    pub fn block(
        &self,
        x: &[f32],
        router: &CudaLinear,
        bias: Option<&[f32]>,
        spec: &RouterSpec,
        activation: Activation,
        out: &mut [f32],
    ) -> Result<Block, CudaError> {
        let (hidden, experts, k) = (self.hidden(), self.experts, spec.top_k);
        spec.check(experts)?;
        if !self.can_route(spec) {
            return Err(CudaError::TooMany {
                what: "experts",
                count: experts,
                limit: MOST_EXPERTS,
            });
        }
        KernelError::check("rows of the router", experts, router.shape().0)?;
        KernelError::check("columns of the router", hidden, router.shape().1)?;
        if let Some(bias) = bias {
            KernelError::check("router bias", experts, bias.len())?;
        }
        let tokens = x.len().checked_div(hidden).unwrap_or(0);
        KernelError::check("expert input", tokens * hidden, x.len())?;
        KernelError::check("expert output", tokens * hidden, out.len())?;
        if tokens == 0 {
            let routing = Routing { tokens, top_k: k, ids: Vec::new(), weights: Vec::new() };
            return Ok(Block { routing, logits: Vec::new() });
        }
        let x = self.device.put_rows(x, tokens, hidden)?;
        let told = self.route(&x, tokens, router, bias, spec)?;
        let (ids, weights) = (told.ids(), told.weights());
        let few = tokens <= DECODE_TOKENS;
        let y = self.enqueue(&x, (tokens, few), k, ids, weights, activation)?;
        self.device.get(&y, out)?;
        told.read(&self.device)
    }

    /// Enqueues the choice of experts. What it tells lies in one buffer, so that one copy brings it back.
    fn route(
        &self,
        x: &Rows,
        tokens: usize,
        router: &CudaLinear,
        bias: Option<&[f32]>,
        spec: &RouterSpec,
    ) -> Result<Told, CudaError> {
        let (experts, k) = (self.experts, spec.top_k);
        CudaError::int("router logits", tokens * experts)?;
        let count = tokens * (experts + 2 * k) + 1;
        let told = Told { buffer: self.device.scratch(count)?, tokens, experts, k };
        router.enqueue(x, tokens, &told.buffer, experts, Batching::Fastest)?;
        self.device.put_into(&[u32::MAX], &told.buffer, count - 1)?;
        let bias = bias.map(|b| self.device.put(b, Use::Scratch)).transpose()?;
        let (groups, kept) = spec.groups.unwrap_or((0, 0));
        let args = [
            told.buffer.arg(),
            Arg::Int(tokens as i32),
            Arg::Int(experts as i32),
            bias.as_ref().map_or(Arg::Pointer(0), Buffer::arg),
            Arg::Int(k as i32),
            Arg::Int(i32::from(spec.score == Score::Sigmoid)),
            Arg::Int(i32::from(spec.renormalise)),
            Arg::Float(spec.scale),
            Arg::Int(groups as i32),
            Arg::Int(kept as i32),
            told.ids(),
            told.weights(),
            told.buffer.arg_from(count - 1),
        ];
        // SAFETY: the arguments are those of `route`; logits, ids and weights have room for `tokens` rows, the bias for all
        // experts, of which there are no more than the kernel has room for; `k` and the groups have been checked.
        unsafe { self.device.launch("route", (tokens.div_ceil(ROWS_OF_BLOCK), 1), &args)? };
        Ok(told)
    }

    pub(super) fn check(&self, routing: &Routing) -> Result<(), CudaError> {
        let pairs = routing.tokens * routing.top_k;
        KernelError::check("routing ids", pairs, routing.ids.len())?;
        KernelError::check("routing weights", pairs, routing.weights.len())?;
        let experts = self.experts;
        match routing.ids.iter().find(|id| **id as usize >= experts) {
            Some(&id) => Err(KernelError::TopK { top_k: id as usize + 1, experts }.into()),
            None => Ok(()),
        }
    }

    /// Enqueues products and sum, in the kernels for few tokens or in those for many; returns `[tokens, hidden]`. Ids are
    /// below the number of experts.
    fn enqueue(
        &self,
        x: &Rows,
        (tokens, few): (usize, bool),
        k: usize,
        ids: Arg,
        weights: Arg,
        activation: Activation,
    ) -> Result<Buffer, CudaError> {
        let device = &self.device;
        let (hidden, inter, pairs) = (self.hidden(), self.inter(), tokens * k);
        CudaError::int("pairs of tokens and experts", pairs)?;
        let out = device.scratch(tokens * hidden)?;
        let h = device.rows(pairs, inter)?;
        let (top_k, sizes) = (Arg::Int(k as i32), [self.gate.cols(), self.gate.rows()]);
        if few {
            let (gate, up, down) = (&self.gate, &self.up, &self.down);
            let mut args = vec![x.arg(), x.stride()?, gate.arg(), up.arg(), gate.stride(), ids];
            args.extend([top_k, sizes[0], sizes[1], h.arg(), h.stride()?, kind(activation)]);
            let grid = (h.stride.div_ceil(ROWS_OF_BLOCK), pairs);
            // SAFETY: the arguments are those of `decode_gate_up_*`: `x` has `tokens` padded rows, `h` `pairs`.
            unsafe { device.launch_for("decode_gate_up", gate.dtype, grid, &args)? };
            let mut args = vec![h.arg(), h.stride()?, down.arg(), down.stride(), ids, weights];
            args.extend([top_k, sizes[0], sizes[1], out.arg()]);
            let grid = (hidden.div_ceil(ROWS_OF_BLOCK), tokens);
            // SAFETY: the arguments are those of `decode_down_*`: `h` has `pairs` padded rows, `out` `tokens` of `hidden`.
            unsafe { device.launch_for("decode_down", down.dtype, grid, &args)? };
            return Ok(out);
        }
        let order = self.group(ids, pairs)?;
        self.gate_up(x, &order, k, &h, Arg::Pointer(0), activation)?;
        let y = device.scratch(pairs * hidden)?;
        let mut args = vec![h.arg(), h.stride()?, self.down.arg(), self.down.stride()];
        args.extend(order.args());
        args.extend([sizes[0], sizes[1], y.arg(), sizes[0], device.exact()]);
        let grid = (order.most, hidden.div_ceil(TILE));
        // SAFETY: the arguments are those of `down_*`: `h` has `pairs` padded rows, `y` `pairs` rows of `hidden`.
        unsafe { device.launch_for("down", self.down.dtype, grid, &args)? };
        self.combine(&y, weights, tokens, k, &out)?;
        Ok(out)
    }

    /// Enqueues `h = f(x gate^T) x up^T` in the order of the pairs, or, with `up` not null, the two products alone.
    pub(super) fn gate_up(
        &self,
        x: &Rows,
        order: &Order,
        k: usize,
        h: &Rows,
        up: Arg,
        activation: Activation,
    ) -> Result<(), CudaError> {
        let mut args =
            vec![x.arg(), x.stride()?, self.gate.arg(), self.up.arg(), self.gate.stride()];
        args.extend(order.args());
        args.extend([Arg::Int(k as i32), self.gate.cols(), self.gate.rows(), h.arg(), up]);
        args.extend([h.stride()?, kind(activation), self.device.exact()]);
        let grid = (order.most, self.inter().div_ceil(TILE));
        // SAFETY: the arguments are those of `gate_up_*`: `x` has as many padded rows as there are tokens, `h` and `up`
        // as there are pairs, in rows of the same stride.
        unsafe { self.device.launch_for("gate_up", self.gate.dtype, grid, &args) }
    }

    /// Enqueues the grouping of `pairs` by expert.
    pub(super) fn group(&self, ids: Arg, pairs: usize) -> Result<Order, CudaError> {
        let (device, experts) = (&self.device, self.experts);
        let most = pairs / TILE + experts;
        let counts = device.scratch(experts)?;
        let order = Order {
            order: device.scratch(pairs)?,
            tiles: device.scratch(4 * most)?,
            tile_count: device.scratch(1)?,
            most,
        };
        let grid = (experts.div_ceil(ROWS_OF_BLOCK), 1);
        let sizes = [
            Arg::Int(CudaError::int("pairs of tokens and experts", pairs)?),
            Arg::Int(CudaError::int("experts", experts)?),
        ];
        // SAFETY: the arguments are those of `count`: `pairs` ids, room for a count of each expert.
        unsafe { device.launch("count", grid, &[ids, sizes[0], sizes[1], counts.arg()])? };
        let mut args = vec![ids, counts.arg(), sizes[0], sizes[1]];
        args.extend(order.args());
        // SAFETY: the arguments are those of `place`: every pair has a place in `order`, and an expert of n pairs has
        // ceil(n / 64) tiles, together no more than `most`.
        unsafe { device.launch("place", grid, &args)? };
        Ok(order)
    }

    /// Enqueues the sum over the slots of each token, with weights or (null) without.
    pub(super) fn combine(
        &self,
        y: &Buffer,
        weights: Arg,
        tokens: usize,
        k: usize,
        out: &Buffer,
    ) -> Result<(), CudaError> {
        let hidden = self.gate.cols();
        let args = [y.arg(), hidden, weights, Arg::Int(k as i32), hidden, out.arg()];
        // SAFETY: the arguments are those of `combine`: `y` has `tokens * k` rows of `hidden`, `out` `tokens`.
        unsafe { self.device.launch("combine", (tokens, 1), &args) }
    }
}

impl Order {
    /// As the kernels take it.
    pub fn args(&self) -> [Arg; 3] {
        [self.order.arg(), self.tiles.arg(), self.tile_count.arg()]
    }
}

/// Logits `[tokens, experts]`, weights and ids `[tokens, k]`, and the smallest index of a bad logit, on the device.
struct Told {
    buffer: Buffer,
    tokens: usize,
    experts: usize,
    k: usize,
}

impl Told {
    fn weights(&self) -> Arg {
        self.buffer.arg_from(self.tokens * self.experts)
    }

    fn ids(&self) -> Arg {
        self.buffer.arg_from(self.tokens * (self.experts + self.k))
    }

    fn read(self, device: &Device) -> Result<Block, CudaError> {
        let (tokens, experts, pairs) = (self.tokens, self.experts, self.tokens * self.k);
        let mut words = vec![0u32; tokens * experts + 2 * pairs + 1];
        device.get(&self.buffer, &mut words)?;
        if let Some(bad) = words.pop().filter(|bad| *bad != u32::MAX) {
            let bad = bad as usize;
            let (token, expert) = (bad / experts, bad % experts);
            return Err(KernelError::NotFinite { token, expert }.into());
        }
        let ids = words.split_off(tokens * experts + pairs);
        let mut logits: Vec<f32> = words.into_iter().map(f32::from_bits).collect();
        let weights = logits.split_off(tokens * experts);
        Ok(Block { routing: Routing { tokens, top_k: self.k, ids, weights }, logits })
    }
}

/// As the kernels number them.
pub(super) fn kind(activation: Activation) -> Arg {
    Arg::Int(match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
    })
}
