//! What is trained: MLPs of experts, whole or by factors of low rank, and routers.

use moe_merge_kernels::{KernelError, dense};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::error::ModelError;
use crate::ops::Expert;
use crate::transplant::mlp::Mlp;

/// Which step is made, and how far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    /// From 1.
    pub number: i32,
    /// Rate of the MLPs, as a share of what is usual in a matrix.
    pub rate: f32,
    /// Rate of the routers, in units of a logit.
    pub router_rate: f32,
}

/// Moving means of a gradient and of its square (AdamW without decay, arXiv 1711.05101).
#[derive(Debug, Clone)]
struct Moments {
    means: Vec<f32>,
    squares: Vec<f32>,
}

impl Moments {
    fn new(size: usize) -> Self {
        Self { means: vec![0.0; size], squares: vec![0.0; size] }
    }

    /// Moves the numbers `w`, a part of all from `from` on, each by about `rate`.
    fn step(&mut self, from: usize, w: &mut [f32], gradient: &[f32], number: i32, rate: f32) {
        const DECAY: [f32; 2] = [0.9, 0.999];
        const LEAST: f32 = 1e-12;
        let [first, second] = DECAY.map(|d| 1.0 - d.powi(number));
        let range = from..from + w.len();
        let moments = self.means[range.clone()].iter_mut().zip(&mut self.squares[range]);
        for ((w, g), (m, v)) in w.iter_mut().zip(gradient).zip(moments) {
            *m = DECAY[0] * *m + (1.0 - DECAY[0]) * g;
            *v = DECAY[1] * *v + (1.0 - DECAY[1]) * g * g;
            *w -= rate * (*m / first) / ((*v / second).sqrt() + LEAST);
        }
    }
}

/// An expert in one layer.
#[derive(Debug, Clone)]
pub(super) struct Part {
    /// Its number; 0 in a dense layer.
    pub expert: usize,
    pub mlp: Mlp,
    /// Laid out as the numbers of the MLP; empty where nothing is trained.
    pub gradient: Vec<f32>,
    learner: Learner,
}

#[derive(Debug, Clone)]
enum Learner {
    Frozen,
    Whole {
        moments: Box<Moments>,
        /// Root mean square of each matrix at the start.
        unit: [f32; 3],
    },
    LowRank(Box<[Factors; 3]>),
}

/// How much of an expert is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trained {
    Nothing,
    Everything,
    /// A product of this rank beside each matrix, with this seed for its first values.
    Rank(usize, u64),
}

impl Part {
    pub fn new(expert: usize, mlp: Mlp, trained: Trained) -> Self {
        let size = mlp.flat.len();
        let unit = [0, 1, 2].map(|m| rms(&mlp.flat[mlp.range(m)]));
        let learner = match trained {
            Trained::Nothing => Learner::Frozen,
            Trained::Everything => Learner::Whole { moments: Box::new(Moments::new(size)), unit },
            Trained::Rank(rank, seed) => {
                let mut random = ChaCha12Rng::seed_from_u64(seed);
                let mut factors = |m| Factors::new(rank, mlp.shape(m), unit[m], &mut random);
                Learner::LowRank(Box::new([0, 1, 2].map(&mut factors)))
            }
        };
        let gradient = vec![0.0; if trained == Trained::Nothing { 0 } else { size }];
        Self { expert, mlp, gradient, learner }
    }

    pub fn learns(&self) -> bool {
        !matches!(self.learner, Learner::Frozen)
    }

    /// All numbers that make up where its training is, in a fixed order; none where nothing is trained.
    pub fn numbers(&mut self) -> Vec<&mut Vec<f32>> {
        match &mut self.learner {
            Learner::Frozen => Vec::new(),
            Learner::Whole { moments, .. } => {
                let Moments { means, squares } = moments.as_mut();
                vec![&mut self.mlp.flat, means, squares]
            }
            Learner::LowRank(all) => {
                let factors = all.iter_mut().flat_map(|f| {
                    let [a, b] = &mut f.moments;
                    let moments = [&mut a.means, &mut a.squares, &mut b.means, &mut b.squares];
                    [&mut f.a, &mut f.b].into_iter().chain(moments)
                });
                std::iter::once(&mut self.mlp.flat).chain(factors).collect()
            }
        }
    }

    /// A step down the gradient, which is then zero again.
    ///
    /// * `start`: the matrices before the first step
    pub fn update(&mut self, start: &Expert, step: Step) -> Result<(), ModelError> {
        match &mut self.learner {
            Learner::Frozen => return Ok(()),
            Learner::Whole { moments, unit } => {
                for (matrix, unit) in unit.iter().enumerate() {
                    let range = self.mlp.range(matrix);
                    let w = &mut self.mlp.flat[range.clone()];
                    let gradient = &self.gradient[range.clone()];
                    moments.step(range.start, w, gradient, step.number, step.rate * unit);
                }
            }
            Learner::LowRank(all) => {
                for (matrix, factors) in all.iter_mut().enumerate() {
                    factors.update(&self.gradient[self.mlp.range(matrix)], step)?;
                }
                self.mlp.read(start)?;
                for (matrix, factors) in all.iter().enumerate() {
                    let range = self.mlp.range(matrix);
                    factors.add_to(&mut self.mlp.flat[range])?;
                }
            }
        }
        self.gradient.fill(0.0);
        Ok(())
    }
}

/// A product beside a matrix `[output, input]`: `w + b a` (arXiv 2106.09685, with a scale of 1).
#[derive(Debug, Clone)]
struct Factors {
    rank: usize,
    output: usize,
    input: usize,
    /// `[rank, input]`.
    a: Vec<f32>,
    /// `[output, rank]`.
    b: Vec<f32>,
    moments: [Moments; 2],
    /// What a step at rate 1 moves `a` and `b` by: of `a` its own size; of `b` so much that the product moves by about the root
    /// mean square of the matrix.
    units: [f32; 2],
}

impl Factors {
    fn new(rank: usize, [output, input]: [usize; 2], unit: f32, random: &mut ChaCha12Rng) -> Self {
        // As PEFT begins: `a` uniform, `b` 0.
        let bound = 1.0 / (input as f32).sqrt();
        let mut number = || {
            let share = (random.next_u32() >> 8) as f32 / (1 << 24) as f32;
            (2.0 * share - 1.0) * bound
        };
        let a: Vec<f32> = (0..rank * input).map(|_| number()).collect();
        let size = bound / 3f32.sqrt();
        Self {
            rank,
            output,
            input,
            moments: [Moments::new(a.len()), Moments::new(output * rank)],
            units: [size, unit / (size * (rank as f32).sqrt())],
            b: vec![0.0; output * rank],
            a,
        }
    }

    /// A step, from the gradient of the whole matrix.
    fn update(&mut self, gradient: &[f32], step: Step) -> Result<(), KernelError> {
        let g = dense::Dense::new(gradient, self.output, self.input)?;
        let a = dense::Dense::new(&self.a, self.rank, self.input)?;
        let b = dense::Dense::new(&self.b, self.output, self.rank)?;
        let (mut d_a, mut d_b) = (vec![0.0; self.a.len()], vec![0.0; self.b.len()]);
        dense::matmul(b.transposed(), g, &mut d_a, dense::Into::Overwrite)?;
        dense::matmul(g, a.transposed(), &mut d_b, dense::Into::Overwrite)?;
        let [of_a, of_b] = &mut self.moments;
        of_a.step(0, &mut self.a, &d_a, step.number, step.rate * self.units[0]);
        of_b.step(0, &mut self.b, &d_b, step.number, step.rate * self.units[1]);
        Ok(())
    }

    fn add_to(&self, matrix: &mut [f32]) -> Result<(), KernelError> {
        let a = dense::Dense::new(&self.a, self.rank, self.input)?;
        let b = dense::Dense::new(&self.b, self.output, self.rank)?;
        dense::matmul(b, a, matrix, dense::Into::Add)
    }
}

/// A router in one layer.
#[derive(Debug, Clone)]
pub(super) struct Gate {
    /// `[experts, hidden]`.
    pub rows: Vec<f32>,
    pub gradient: Vec<f32>,
    moments: Moments,
    hidden: usize,
    /// Root mean square of what it sees in the first batch; empty before.
    input: Vec<f32>,
}

impl Gate {
    pub fn new(rows: Vec<f32>, hidden: usize) -> Self {
        let size = rows.len();
        Self {
            rows,
            gradient: vec![0.0; size],
            moments: Moments::new(size),
            hidden,
            input: Vec::new(),
        }
    }

    /// As [`Part::numbers`].
    pub fn numbers(&mut self) -> Vec<&mut Vec<f32>> {
        let Moments { means, squares } = &mut self.moments;
        vec![&mut self.rows, means, squares, &mut self.input]
    }

    /// Learns how large its input is: a step at rate 1 moves a typical logit by at most about 1.
    pub fn see(&mut self, input: &[f32]) {
        if self.input.is_empty() {
            self.input.push(rms(input));
        }
    }

    /// A step down the gradient, which is then zero again.
    pub fn update(&mut self, step: Step) {
        let input = self.input.first().copied().unwrap_or(1.0);
        let unit = 1.0 / (self.hidden as f32 * input.max(f32::MIN_POSITIVE));
        let rate = step.router_rate * unit;
        self.moments.step(0, &mut self.rows, &self.gradient, step.number, rate);
        self.gradient.fill(0.0);
    }
}

fn rms(values: &[f32]) -> f32 {
    let sum: f64 = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
    (sum / values.len().max(1) as f64).sqrt() as f32
}
