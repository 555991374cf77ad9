//! L-BFGS that is fed evaluations, so that several problems can share one pass over the data.

use std::collections::VecDeque;

/// Pairs of steps and gradient changes remembered.
const MEMORY: usize = 12;
/// Fewest of them, whatever they take.
const LEAST_MEMORY: usize = 4;
/// Numbers that all of them may take otherwise.
const NUMBERS: usize = 32 << 20;
/// Share of the promised decrease that a step must bring (Armijo).
const DECREASE: f64 = 1e-4;
/// Step halvings before a search is given up: the objective is then flat to rounding.
const SEARCHES: usize = 30;

/// When to stop.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stop {
    /// Norm of the gradient.
    pub gradient: f64,
    /// Norm of the gradient, relative to the norm of the point.
    pub relative: f64,
    /// Decrease of the objective in one step, relative to the objective.
    pub decrease: f64,
    /// Accepted steps.
    pub iterations: usize,
}

struct Pair {
    s: Vec<f64>,
    y: Vec<f64>,
}

/// Pairs remembered of points of so many numbers.
fn memory(numbers: usize) -> usize {
    (NUMBERS / (2 * numbers).max(1)).clamp(LEAST_MEMORY, MEMORY)
}

/// One minimisation. Evaluate at [`Lbfgs::trial`], hand value and gradient to [`Lbfgs::feed`], until [`Lbfgs::done`].
///
/// Source: Liu and Nocedal 1989, two-loop recursion; backtracking with quadratic interpolation.
pub(crate) struct Lbfgs {
    stop: Stop,
    first_step: f64,
    point: Vec<f64>,
    value: f64,
    gradient: Vec<f64>,
    pairs: VecDeque<Pair>,
    direction: Vec<f64>,
    slope: f64,
    step: f64,
    searches: usize,
    trial: Vec<f64>,
    started: bool,
    done: bool,
    iterations: usize,
}

impl Lbfgs {
    /// Starts at `point`; `first_step` is about one over the curvature.
    pub fn new(point: Vec<f64>, first_step: f64, stop: Stop) -> Self {
        Self {
            stop,
            first_step,
            value: f64::INFINITY,
            gradient: Vec::new(),
            pairs: VecDeque::new(),
            direction: Vec::new(),
            slope: 0.0,
            step: 1.0,
            searches: 0,
            trial: point.clone(),
            point,
            started: false,
            done: false,
            iterations: 0,
        }
    }

    pub fn trial(&self) -> &[f64] {
        &self.trial
    }

    pub fn point(&self) -> &[f64] {
        &self.point
    }

    pub fn done(&self) -> bool {
        self.done
    }

    pub fn iterations(&self) -> usize {
        self.iterations
    }

    pub fn gradient_norm(&self) -> f64 {
        norm(&self.gradient)
    }

    fn flat(&self) -> bool {
        let limit = self.stop.relative * norm(&self.point);
        norm(&self.gradient) <= self.stop.gradient.max(limit)
    }

    /// Takes value and gradient at the trial point and chooses the next one.
    pub fn feed(&mut self, value: f64, gradient: Vec<f64>) {
        if !self.started {
            self.started = true;
            self.value = value;
            self.gradient = gradient;
            self.done = self.flat();
            self.aim();
            return;
        }
        if value.is_nan() || value > self.value + DECREASE * self.step * self.slope {
            self.shorten(value);
            return;
        }
        let s: Vec<f64> = self.trial.iter().zip(&self.point).map(|(a, b)| a - b).collect();
        let y: Vec<f64> = gradient.iter().zip(&self.gradient).map(|(a, b)| a - b).collect();
        if dot(&s, &y) > 1e-12 * norm(&s) * norm(&y) {
            if self.pairs.len() == memory(self.point.len()) {
                self.pairs.pop_front();
            }
            self.pairs.push_back(Pair { s, y });
        }
        let decrease = self.value - value;
        std::mem::swap(&mut self.point, &mut self.trial);
        self.value = value;
        self.gradient = gradient;
        self.iterations += 1;
        self.done = self.flat()
            || decrease <= self.stop.decrease * value.abs()
            || self.iterations >= self.stop.iterations;
        self.aim();
    }

    /// Goes on with the objective plus `change · ‖w‖²`, keeping what is known about its curvature.
    pub fn change_penalty(&mut self, change: f64) {
        self.value += change * dot(&self.point, &self.point);
        for (g, w) in self.gradient.iter_mut().zip(&self.point) {
            *g += 2.0 * change * w;
        }
        for pair in &mut self.pairs {
            for (y, s) in pair.y.iter_mut().zip(&pair.s) {
                *y += 2.0 * change * s;
            }
        }
        self.pairs.retain(|p| dot(&p.s, &p.y) > 1e-12 * norm(&p.s) * norm(&p.y));
        self.iterations = 0;
        self.done = self.flat();
        self.aim();
    }

    fn shorten(&mut self, value: f64) {
        self.searches += 1;
        if self.searches >= SEARCHES {
            self.done = true;
            return;
        }
        let rise = value - self.value - self.step * self.slope;
        let best = -self.slope * self.step * self.step / (2.0 * rise);
        let bounds = (0.1 * self.step, 0.5 * self.step);
        self.step = if best.is_finite() { best.clamp(bounds.0, bounds.1) } else { bounds.0 };
        self.place();
    }

    /// Direction from the remembered pairs, then the full step along it.
    fn aim(&mut self) {
        let mut d: Vec<f64> = self.gradient.iter().map(|g| -g).collect();
        let mut alphas = Vec::with_capacity(self.pairs.len());
        for p in self.pairs.iter().rev() {
            let alpha = dot(&p.s, &d) / dot(&p.s, &p.y);
            add(&mut d, -alpha, &p.y);
            alphas.push(alpha);
        }
        let scale =
            self.pairs.back().map_or(self.first_step, |p| dot(&p.s, &p.y) / dot(&p.y, &p.y));
        d.iter_mut().for_each(|v| *v *= scale);
        for (p, alpha) in self.pairs.iter().zip(alphas.iter().rev()) {
            let beta = dot(&p.y, &d) / dot(&p.s, &p.y);
            add(&mut d, alpha - beta, &p.s);
        }
        self.slope = dot(&d, &self.gradient);
        self.direction = d;
        self.step = 1.0;
        self.searches = 0;
        self.place();
    }

    fn place(&mut self) {
        self.trial.clear();
        let step = self.step;
        self.trial.extend(self.point.iter().zip(&self.direction).map(|(w, d)| w + step * d));
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Four sums: one alone would wait for each addition.
    let mut sums = [0.0; 4];
    let (mut ca, mut cb) = (a.chunks_exact(4), b.chunks_exact(4));
    for (x, y) in ca.by_ref().zip(cb.by_ref()) {
        for lane in 0..4 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    let rest: f64 = ca.remainder().iter().zip(cb.remainder()).map(|(x, y)| x * y).sum();
    (sums[0] + sums[1]) + (sums[2] + sums[3]) + rest
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

fn add(a: &mut [f64], factor: f64, b: &[f64]) {
    for (x, y) in a.iter_mut().zip(b) {
        *x += factor * y;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXACT: Stop = Stop { gradient: 1e-10, relative: 0.0, decrease: 0.0, iterations: 500 };

    fn run(solver: &mut Lbfgs, f: impl Fn(&[f64]) -> (f64, Vec<f64>)) {
        while !solver.done() {
            let (value, gradient) = f(solver.trial());
            solver.feed(value, gradient);
        }
    }

    #[test]
    fn quadratic_and_changed_penalty() {
        // (x - 1)² + 100 (y + 2)², then + 3 (x² + y²): x = 1/4, y = -200/103.
        let f = |c: f64| {
            move |w: &[f64]| {
                let (x, y) = (w[0], w[1]);
                let value = (x - 1.0).powi(2) + 100.0 * (y + 2.0).powi(2) + c * (x * x + y * y);
                (value, vec![2.0 * (x - 1.0) + 2.0 * c * x, 200.0 * (y + 2.0) + 2.0 * c * y])
            }
        };
        let mut solver = Lbfgs::new(vec![5.0, 5.0], 0.01, EXACT);
        run(&mut solver, f(0.0));
        assert!((solver.point()[0] - 1.0).abs() < 1e-9 && (solver.point()[1] + 2.0).abs() < 1e-9);
        solver.change_penalty(3.0);
        run(&mut solver, f(3.0));
        assert!((solver.point()[0] - 0.25).abs() < 1e-9);
        assert!((solver.point()[1] + 200.0 / 103.0).abs() < 1e-9);
    }

    #[test]
    fn rosenbrock() {
        let f = |w: &[f64]| {
            let (x, y) = (w[0], w[1]);
            let (a, b) = (1.0 - x, y - x * x);
            (a * a + 100.0 * b * b, vec![-2.0 * a - 400.0 * x * b, 200.0 * b])
        };
        let mut solver = Lbfgs::new(vec![-1.2, 1.0], 1e-3, EXACT);
        run(&mut solver, f);
        assert!((solver.point()[0] - 1.0).abs() < 1e-8 && (solver.point()[1] - 1.0).abs() < 1e-8);
    }
}
