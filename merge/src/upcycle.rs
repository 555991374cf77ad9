//! A dense model as a mixture of copies of itself, for training: noise on each copy, or part of its neurons drawn anew.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::slice;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{CheckpointError, Dtype, Replace, Source, Staging, Weight, WeightRef};
use moe_merge_router::estimators::random;
use serde::Serialize;

use crate::compose::Normals;
use crate::error::MergeError;
use crate::families::{self, Dims, Layout, Matrix, SharedGate, dense_name};
use crate::plan::{Assembly, ExpertInput, Gates, Plan};
use crate::write::{Provenance, write};

/// What the copies look like.
#[derive(Debug, Clone)]
pub struct UpcycleOptions {
    /// How many experts, at least two.
    pub experts: usize,
    /// Experts that each token visits.
    pub top_k: usize,
    /// Standard deviation of the noise on each matrix, as a share of the matrix's own.
    pub noise: f64,
    /// Share of each expert's neurons that are drawn anew.
    pub reinit: f64,
    /// The first expert stays as it is.
    pub keep_first: bool,
    /// Standard deviation of the routers' numbers; `initializer_range` of the configuration by default.
    pub router_scale: Option<f64>,
    /// Output family, `None` for the first that fits.
    pub architecture: Option<String>,
    /// How numbers are stored; as in the base by default.
    pub dtype: Option<Dtype>,
    /// How experts lie on disk.
    pub layout: Layout,
    /// Seed of everything drawn.
    pub seed: u64,
}

/// What was made.
#[derive(Debug, Clone, Serialize)]
pub struct UpcycleReport {
    /// The folder.
    pub output: PathBuf,
    /// Bytes of its files.
    pub bytes: u64,
    /// Family of the output.
    pub family: String,
    /// Experts.
    pub experts: usize,
    /// Experts per token.
    pub experts_per_token: usize,
    /// Neurons of each expert and layer that were drawn anew.
    pub neurons_drawn: usize,
    /// Seconds it took.
    pub seconds: f64,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// `initializer_range` where a configuration is silent.
const INITIALIZER_RANGE: f64 = 0.02;

/// An upcycling, checked, before anything is computed.
#[derive(Debug)]
pub struct Upcycling {
    assembly: Assembly,
    plan: Plan,
    options: UpcycleOptions,
    neurons: usize,
}

impl Upcycling {
    /// Checks everything; no weight is read.
    ///
    /// # Errors
    /// [`MergeError::Argument`] for numbers out of range, [`MergeError::Incompatible`] for a base that no family holds.
    pub fn prepare(base: &Source, options: UpcycleOptions) -> Result<Self, MergeError> {
        check(&options)?;
        let copies = vec![base; options.experts];
        let request = families::Request {
            base,
            experts: copies,
            shared: Vec::new(),
            shared_gate: SharedGate::Absent,
        };
        let wanted: Vec<&str> = options.architecture.as_deref().into_iter().collect();
        let family = families::select(&wanted, &request)?;
        let dims = Dims::of(base)?;
        families::check_sources(&request)?;
        let neurons = (options.reinit * dims.intermediate as f64).round() as usize;
        let experts = (0..options.experts)
            .map(|expert| {
                let own = expert > 0 || !options.keep_first;
                let source = if own {
                    variant(base, &dims, expert, neurons, &options)?
                } else {
                    base.clone()
                };
                Ok(ExpertInput {
                    source,
                    name: expert.to_string(),
                    layers: None,
                    noise_scale: 0.0,
                    residual_scale: 1.0,
                })
            })
            .collect::<Result<_, MergeError>>()?;
        let assembly = Assembly {
            base: base.clone(),
            experts,
            shared: Vec::new(),
            shared_gate: SharedGate::Absent,
            top_k: options.top_k,
            dtype: options.dtype,
            family,
            layout: options.layout,
            seed: options.seed,
        };
        let plan = Plan::new(&assembly)?;
        Ok(Self { assembly, plan, options, neurons })
    }

    /// Bytes of tensors that will be written.
    pub fn bytes(&self) -> u64 {
        self.plan.tensors.iter().map(|t| t.size()).sum()
    }

    /// Writes the MoE to `out`.
    ///
    /// # Errors
    /// [`MergeError`]; then there is no output.
    pub fn run(
        self,
        out: &Path,
        replace: Replace,
        watch: Watch<'_>,
    ) -> Result<UpcycleReport, MergeError> {
        let clock = Instant::now();
        let staging = Staging::new(out, replace)?;
        let dims = self.plan.shape.dims;
        let options = &self.options;
        let own = self.assembly.base.config.f64("initializer_range");
        let scale = options.router_scale.or(own).unwrap_or(INITIALIZER_RANGE) as f32;
        let layers = (0..dims.layers as u64).map(|layer| {
            let gate = random::gate(options.experts, dims.hidden, options.seed, layer);
            gate.rows.into_iter().map(|v| scale * v).collect()
        });
        let gates = Gates { layers: layers.collect(), shared: None };
        let provenance = Provenance {
            name: out.file_name().map_or("moe".into(), |n| n.to_string_lossy().into_owned()),
            seed: options.seed,
            report: vec![format!(
                "Upcycled from a dense model: noise {} of each matrix's standard deviation, {} of {} neurons of each \
                 expert drawn anew, routers drawn with standard deviation {scale}. It is meant to be trained.",
                options.noise, self.neurons, dims.intermediate
            )],
            ..Provenance::default()
        };
        let written = write(&self.assembly, &self.plan, &gates, &provenance, &staging, watch)?;
        staging.publish()?;
        Ok(UpcycleReport {
            output: out.to_owned(),
            bytes: written.bytes,
            family: self.assembly.family.name().into(),
            experts: options.experts,
            experts_per_token: options.top_k,
            neurons_drawn: self.neurons,
            seconds: clock.elapsed().as_secs_f64(),
            warnings: self.plan.warnings,
        })
    }
}

fn check(options: &UpcycleOptions) -> Result<(), MergeError> {
    let wrong = |name: &str, expected: String, found: String| {
        Err(MergeError::Argument {
            what: format!("`{name}` is out of range"),
            name: name.into(),
            expected,
            found,
            hint: None,
        })
    };
    let scale = |v: f64| v.is_finite() && v >= 0.0;
    match options {
        o if o.experts < 2 => wrong("--experts", "2 or more".into(), o.experts.to_string()),
        o if o.top_k == 0 || o.top_k > o.experts => {
            wrong("--top-k", format!("1 to {}", o.experts), o.top_k.to_string())
        }
        o if !scale(o.noise) => wrong("--noise", "a number from 0".into(), o.noise.to_string()),
        o if !(0.0..=1.0).contains(&o.reinit) => {
            wrong("--reinit", "a share from 0 to 1".into(), o.reinit.to_string())
        }
        o if o.router_scale.is_some_and(|s| !scale(s)) => {
            let found = o.router_scale.unwrap_or_default().to_string();
            wrong("--router-scale", "a number from 0".into(), found)
        }
        _ => Ok(()),
    }
}

/// The base with the MLPs of one expert.
fn variant(
    base: &Source,
    dims: &Dims,
    expert: usize,
    neurons: usize,
    options: &UpcycleOptions,
) -> Result<Source, MergeError> {
    let mut source = base.clone();
    if options.noise == 0.0 && neurons == 0 {
        return Ok(source);
    }
    for layer in 0..dims.layers {
        let key = format!("upcycle.{expert}.layers.{layer}");
        let drawn = Arc::new(drawn(options.seed, &key, dims.intermediate, neurons));
        for matrix in Matrix::ALL {
            let name = dense_name(layer, matrix);
            let weight = Variant {
                inner: base.weight(&name)?.clone(),
                normals: Normals::new(options.seed, &format!("{key}.{}", matrix.name())),
                noise: options.noise,
                drawn: drawn.clone(),
                axis: if matrix == Matrix::Down { Axis::Columns } else { Axis::Rows },
                facts: OnceLock::new(),
                finding: Mutex::new(()),
            };
            source.tensors.insert(name, Arc::new(weight));
        }
    }
    Ok(source)
}

/// Which of `count` neurons are drawn anew: `wanted` of them, chosen without preference.
fn drawn(seed: u64, key: &str, count: usize, wanted: usize) -> Vec<bool> {
    let mut numbers = vec![0.0; count];
    Normals::new(seed, &format!("{key}.neurons")).add(0, 1.0, &mut numbers);
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|&a, &b| numbers[a].total_cmp(&numbers[b]).then(a.cmp(&b)));
    let mut drawn = vec![false; count];
    order[..wanted.min(count)].iter().for_each(|&i| drawn[i] = true);
    drawn
}

/// Where a matrix has its neurons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Axis {
    Rows,
    Columns,
}

/// What has to be known about a whole matrix.
#[derive(Debug, Clone, Copy, Default)]
struct Facts {
    /// Standard deviation of all numbers.
    deviation: f64,
    /// Mean and standard deviation of the neurons that are drawn anew.
    drawn: (f64, f64),
}

/// A matrix with noise, and with some of its neurons drawn anew from a normal distribution that has the mean and the standard
/// deviation of what they replace.
///
/// # Source
/// Komatsuzaki et al. 2023, Sparse upcycling, arXiv:2212.05055 (noise); Nakamura et al. 2025, Drop-Upcycling,
/// arXiv:2502.19261 (neurons).
#[derive(Debug)]
struct Variant {
    inner: WeightRef,
    normals: Normals,
    noise: f64,
    drawn: Arc<Vec<bool>>,
    axis: Axis,
    facts: OnceLock<Facts>,
    finding: Mutex<()>,
}

/// Rows that are looked at together when the facts are found.
const ROWS: usize = 64;

/// Count, sum and sum of squares.
type Sums = [f64; 3];

fn deviation([count, sum, squares]: Sums) -> (f64, f64) {
    if count == 0.0 {
        return (0.0, 0.0);
    }
    let mean = sum / count;
    (mean, (squares / count - mean * mean).max(0.0).sqrt())
}

impl Variant {
    /// The facts, found once: by whoever comes first, in an order that does not depend on the threads.
    fn facts(&self) -> Result<Facts, CheckpointError> {
        if let Some(facts) = self.facts.get() {
            return Ok(*facts);
        }
        let _finding = self.finding.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(facts) = self.facts.get() {
            return Ok(*facts);
        }
        let (rows, cols) = (self.inner.rows(), self.inner.cols());
        let mut totals = [[0.0; 3]; 2];
        for from in (0..rows).step_by(ROWS) {
            let sums = self.sums(from..rows.min(from + ROWS), cols)?;
            for (total, sum) in totals.iter_mut().flatten().zip(sums.iter().flatten()) {
                *total += sum;
            }
        }
        let facts = Facts { deviation: deviation(totals[0]).1, drawn: deviation(totals[1]) };
        Ok(*self.facts.get_or_init(|| facts))
    }

    /// Of all numbers, and of those that are drawn anew.
    fn sums(&self, rows: Range<usize>, cols: usize) -> Result<[Sums; 2], CheckpointError> {
        let mut values = vec![0.0; rows.len() * cols];
        self.inner.read_rows(rows.clone(), &mut values)?;
        let mut sums = [[0.0; 3]; 2];
        for (row, line) in rows.zip(values.chunks_exact(cols.max(1))) {
            for (col, v) in line.iter().enumerate() {
                let v = f64::from(*v);
                let also = usize::from(self.is_drawn(row, col));
                for sum in &mut sums[..=also] {
                    *sum = [sum[0] + 1.0, sum[1] + v, sum[2] + v * v];
                }
            }
        }
        Ok(sums)
    }

    fn is_drawn(&self, row: usize, col: usize) -> bool {
        let neuron = if self.axis == Axis::Rows { row } else { col };
        self.drawn.get(neuron).copied().unwrap_or(false)
    }
}

impl Weight for Variant {
    fn shape(&self) -> &[usize] {
        self.inner.shape()
    }

    fn dtype(&self) -> Dtype {
        self.inner.dtype()
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        let facts = self.facts()?;
        let cols = self.inner.cols().max(1);
        self.inner.read_rows(rows.clone(), out)?;
        let mut normals = vec![0.0; out.len()];
        self.normals.add(rows.start * cols, 1.0, &mut normals);
        let noise = (self.noise * facts.deviation) as f32;
        let (mean, spread) = (facts.drawn.0 as f32, facts.drawn.1 as f32);
        let lines = out.chunks_exact_mut(cols).zip(normals.chunks_exact(cols));
        for (row, (line, normals)) in rows.zip(lines) {
            for (col, (v, z)) in line.iter_mut().zip(normals).enumerate() {
                *v = if self.is_drawn(row, col) { mean + spread * z } else { *v + noise * z };
            }
        }
        Ok(())
    }

    fn inputs(&self) -> &[WeightRef] {
        slice::from_ref(&self.inner)
    }

    fn prepare(&self) -> Result<(), CheckpointError> {
        self.inner.prepare()?;
        self.facts().map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use moe_merge_checkpoint::weight::OwnedWeight;

    use super::*;

    fn copy_of(
        values: &[f32],
        shape: [usize; 2],
        drawn: &[usize],
        noise: f64,
        axis: Axis,
    ) -> Variant {
        let neurons = if axis == Axis::Rows { shape[0] } else { shape[1] };
        Variant {
            inner: Arc::new(OwnedWeight::from_f32("w", values, &shape, Dtype::F32)),
            normals: Normals::new(5, "w"),
            noise,
            drawn: Arc::new((0..neurons).map(|i| drawn.contains(&i)).collect()),
            axis,
            facts: OnceLock::new(),
            finding: Mutex::new(()),
        }
    }

    fn all(copy: &Variant) -> Vec<f32> {
        (copy as &dyn Weight).to_f32().unwrap()
    }

    #[test]
    fn drawn_neurons_look_like_those_they_replace() {
        let (rows, cols) = (200, 50);
        // Every second row: 3 and 5 in turn, mean 4 and deviation 1; the others are 0.
        let values: Vec<f32> = (0..rows * cols)
            .map(|i| if (i / cols) % 2 == 1 { [3.0, 5.0][i % 2] } else { 0.0 })
            .collect();
        let drawn: Vec<usize> = (0..rows).filter(|r| r % 2 == 1).collect();
        let found = all(&copy_of(&values, [rows, cols], &drawn, 0.0, Axis::Rows));
        let (new, old): (Vec<_>, Vec<_>) =
            found.chunks(cols).enumerate().partition(|(r, _)| r % 2 == 1);
        assert!(old.iter().all(|(_, line)| line.iter().all(|v| *v == 0.0)));
        let new: Vec<f64> = new.iter().flat_map(|(_, l)| l.iter().map(|v| f64::from(*v))).collect();
        let n = new.len() as f64;
        let sums = [n, new.iter().sum(), new.iter().map(|v| v * v).sum()];
        let (mean, spread) = deviation(sums);
        assert!((mean - 4.0).abs() < 5.0 / n.sqrt() && (spread - 1.0).abs() < 5.0 / n.sqrt());
        // Of a down projection, columns.
        let turned = copy_of(&values, [rows, cols], &[7], 0.0, Axis::Columns);
        let changed = all(&turned)
            .iter()
            .zip(&values)
            .enumerate()
            .filter(|(_, (a, b))| a != b)
            .map(|(i, _)| i % cols)
            .collect::<std::collections::BTreeSet<_>>();
        assert_eq!(changed.into_iter().collect::<Vec<_>>(), [7]);
    }

    #[test]
    fn noise_is_a_share_of_the_deviation_and_rows_can_be_had_alone() {
        let (rows, cols) = (100, 100);
        let values: Vec<f32> =
            (0..rows * cols).map(|i| if i % 2 == 0 { 2.0 } else { -2.0 }).collect();
        let copy = copy_of(&values, [rows, cols], &[], 0.1, Axis::Rows);
        let found = all(&copy);
        let noise: Vec<f64> = found.iter().zip(&values).map(|(a, b)| f64::from(a - b)).collect();
        let n = noise.len() as f64;
        let (mean, spread) = deviation([n, noise.iter().sum(), noise.iter().map(|v| v * v).sum()]);
        assert!(mean.abs() < 0.01 && (spread - 0.2).abs() < 0.01, "{mean} {spread}");
        let mut part = vec![0.0; 3 * cols];
        copy.read_rows(41..44, &mut part).unwrap();
        assert_eq!(part, found[41 * cols..44 * cols]);
    }

    #[test]
    fn as_many_neurons_as_wanted() {
        let count = |d: &[bool]| d.iter().filter(|d| **d).count();
        for wanted in [0, 1, 50, 100] {
            assert_eq!(count(&drawn(1, "a", 100, wanted)), wanted);
        }
        assert_eq!(drawn(1, "a", 100, 50), drawn(1, "a", 100, 50));
        assert_ne!(drawn(1, "a", 100, 50), drawn(2, "a", 100, 50));
        assert_ne!(drawn(1, "a", 100, 50), drawn(1, "b", 100, 50));
    }
}
