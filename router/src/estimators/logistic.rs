//! Multinomial logistic regression on true router inputs.

use moe_merge_kernels::dense::Real;

use crate::error::RouterError;
use crate::features::Features;
use crate::finish::finish;
use crate::folds::Folds;
use crate::held_out::{HeldOut, Logits};
use crate::lbfgs::{Lbfgs, Stop};
use crate::objective::{Data, Problem};
use crate::samples::{Fit, Options, Samples, Table, Target, Warning};

pub use crate::finish::LOGIT_BOUND;

/// When a fit that only serves to choose the penalty is good enough: held-out likelihood has long settled by then.
const SEARCH: Stop = Stop { gradient: 1e-4, relative: 0.0, decrease: 3e-4, iterations: 60 };

/// Gate rows by class-balanced multinomial logistic regression without bias.
///
/// `W = argmin Σ_i weight_i · loss_i + penalty · ‖W‖²`, `loss_i = -ln softmax(W x_i)[y_i]`, for a token of a negative
/// prompt `-ln (1 - softmax(W x_i)[y_i])`; `x = z / rms(z)`.
///
/// * every expert weighs `1 / experts`, shared evenly by its tokens; its negative prompts weigh as much again
/// * penalty and temperature: lowest loss on held-out prompts (see [`HeldOut`]), one prompt of every expert at a time;
///   features in f32 and sums in f64 for this search, f64 throughout for the final solve
/// * rows sum to zero (softmax and top-k do not change), scale and temperature are folded in, and no logit of a given
///   token exceeds [`LOGIT_BOUND`]
/// * the result depends neither on the order of the prompts nor on the number of threads
///
/// # Errors
/// Fewer than two experts, an expert without tokens, features that are not finite or all zero, wrong sizes.
///
/// # Source
/// Our own; the solver is L-BFGS (Liu and Nocedal 1989).
pub fn fit(samples: &Samples<'_>, options: &Options) -> Result<Fit, RouterError> {
    let mut table = Table::new(samples)?;
    let targets: Vec<Target> =
        table.prompts.iter().flat_map(|p| std::iter::repeat_n(p.target, p.rows.len())).collect();
    let features = Features::new(&table)?;
    let folds = Folds::new(&table, options.max_folds);
    let search = if folds.count > 0 && !options.penalties.is_empty() {
        Some(search(&table, &targets, &features, &folds, options)?)
    } else {
        let penalty = options.penalty_without_held_out;
        table.warnings.push(Warning::NoHeldOut { penalty });
        None
    };
    let penalty = search.as_ref().map_or(options.penalty_without_held_out, |s| s.penalty);
    let temperature = search.as_ref().map_or(1.0, |s| s.temperature);
    let start = search
        .as_ref()
        .map_or_else(|| vec![0.0; table.experts * features.width], |s| s.parameters.clone());
    let solver =
        solve(&table, &targets, &features, &folds.weights(&table, None), start, penalty, options)?;
    if solver.iterations() >= options.max_iterations {
        table.warnings.push(Warning::NotConverged {
            iterations: solver.iterations(),
            gradient: solver.gradient_norm(),
        });
    }
    let gate = finish(&features, solver.point(), temperature, &mut table);
    Ok(Fit {
        gate,
        held_out: search.map(|s| s.held_out),
        penalty,
        temperature,
        input_rms: table.rms,
        iterations: solver.iterations(),
        warnings: table.warnings,
    })
}

/// What held-out prompts say.
struct Search {
    penalty: f64,
    temperature: f64,
    held_out: HeldOut,
    /// Mean over the folds, a start for the final solve: `[experts, width]`.
    parameters: Vec<f64>,
    value: f64,
}

/// Follows the fits of all folds from the strongest penalty to weaker ones until held-out loss no longer
/// falls: the weak end of the path is where solving takes longest.
fn search(
    table: &Table,
    targets: &[Target],
    features: &Features,
    folds: &Folds,
    options: &Options,
) -> Result<Search, RouterError> {
    let width = features.width;
    let data = Data { experts: table.experts, width, x: &features.x32, targets };
    let weights: Vec<_> = (0..folds.count).map(|f| folds.weights(table, Some(f))).collect();
    let mut solvers: Vec<_> = (0..folds.count)
        .map(|_| Lbfgs::new(vec![0.0; table.experts * width], features.first_step(table), SEARCH))
        .collect();
    let mut best: Option<Search> = None;
    for (i, &penalty) in options.penalties.iter().enumerate() {
        if i > 0 {
            let change = penalty - options.penalties[i - 1];
            solvers.iter_mut().for_each(|s| s.change_penalty(change));
        }
        run(&data, &mut solvers, &weights, penalty)?;
        let points: Vec<&[f64]> = solvers.iter().map(Lbfgs::point).collect();
        let logits = Logits::new(table, folds, &features.x32, width, &points);
        let (temperature, value) = logits.best_temperature();
        if best.as_ref().is_none_or(|b| value < b.value) {
            let held_out = logits.figures(temperature, folds.count, options.top_k);
            let parameters = mean(&points);
            best = Some(Search { penalty, temperature, held_out, parameters, value });
        } else {
            break;
        }
    }
    best.ok_or(RouterError::AllZero)
}

/// Runs all solvers side by side, one pass over the rows for all that are not done.
fn run<T: Real>(
    data: &Data<'_, T>,
    solvers: &mut [Lbfgs],
    weights: &[Vec<f64>],
    penalty: f64,
) -> Result<(), RouterError> {
    loop {
        let open: Vec<usize> = (0..solvers.len()).filter(|&i| !solvers[i].done()).collect();
        if open.is_empty() {
            return Ok(());
        }
        let problems: Vec<_> =
            open.iter().map(|&i| Problem { w: solvers[i].trial(), weights: &weights[i] }).collect();
        let results = data.evaluate(&problems, penalty)?;
        for (i, (value, gradient)) in open.into_iter().zip(results) {
            solvers[i].feed(value, gradient);
        }
    }
}

/// The solve with every prompt, in f64.
fn solve(
    table: &Table,
    targets: &[Target],
    features: &Features,
    weights: &[f64],
    start: Vec<f64>,
    penalty: f64,
    options: &Options,
) -> Result<Lbfgs, RouterError> {
    // The objective curves by at least twice the penalty, so this gradient means W is at most `tolerance · ‖W‖` away.
    let stop = Stop {
        gradient: 1e-12,
        relative: 2.0 * penalty * options.tolerance,
        decrease: 0.0,
        iterations: options.max_iterations,
    };
    let data = Data { experts: table.experts, width: features.width, x: &features.x64, targets };
    let mut solvers = [Lbfgs::new(start, features.first_step(table), stop)];
    run(&data, &mut solvers, &[weights.to_vec()], penalty)?;
    let [solver] = solvers;
    Ok(solver)
}

fn mean(points: &[&[f64]]) -> Vec<f64> {
    let factor = 1.0 / points.len() as f64;
    (0..points[0].len()).map(|k| points.iter().map(|p| p[k]).sum::<f64>() * factor).collect()
}

#[cfg(test)]
mod tests;
