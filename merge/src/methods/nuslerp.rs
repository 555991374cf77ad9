//! `nuslerp`: along the arc between two tensors, or two differences to a base, by weight.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use moe_merge_checkpoint::{CheckpointError, WeightRef};

use super::gram::{Gram, Weighted, subtract};
use super::slerp::arc;
use super::{Base, Combine, Group, Method, Once, Scope, flag, number, read, round, scan};

/// As `slerp` with `t = w1 / (w0 + w1)`, between two models in recipe order or between their differences to a base; over
/// the whole tensor, or along its last or first axis. In f32, rounded once.
pub(super) const METHOD: Method = Method {
    name: "nuslerp",
    summary: "spherical interpolation of two models, or of two task vectors, by weight",
    formula: "sin((1-t) a)/sin(a) x0 + sin(t a)/sin(a) x1 with t = w1/(w0 + w1), x = W or W - B, \
              then + B; (1-t) x0 + t x1 where cos a is 1 or -1",
    parameters: &[
        number("weight", Scope::Model, None, "weight of this model"),
        flag(
            "nuslerp_row_wise",
            false,
            "without `nuslerp_flatten`: one angle for each column of a matrix, not each row",
        ),
        flag("nuslerp_flatten", true, "one angle for the whole tensor"),
    ],
    base: Base::Optional,
    models: (2, 2),
    whole_tensor: true,
    activations: None,
    source: "mergekit `merge_methods/nuslerp.py`; Shoemake 1985",
    build,
};

/// Norms below this count as this.
const LEAST_NORM: f64 = 1e-7;

#[derive(Debug)]
struct NuSlerp {
    t: f64,
    along: Along,
    sum: Weighted,
    /// Coefficients of both points for each column, where angles run along the first axis.
    columns: Once<Vec<[f32; 2]>>,
    /// Whether two vectors pointed in nearly opposite directions.
    opposite: AtomicBool,
}

/// What one angle is taken over.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Along {
    Whole,
    /// Each row, along the last axis.
    Rows,
    /// Each column, along the first axis, which has this length.
    Columns(usize),
}

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    let (points, weights) = (group.others(), group.own(0));
    let [a, b] = points.as_slice() else { return Err("two models are needed".into()) };
    let total = weights[*a] + weights[*b];
    let t = if total.abs() < 1e-6 { 0.5 } else { weights[*b] / total };
    let shape = group.inputs[0].shape();
    let along = match (group.global[1] != 0.0 || shape.len() < 2, group.global[0] != 0.0) {
        (true, _) => Along::Whole,
        (false, false) => Along::Rows,
        (false, true) => Along::Columns(shape[0]),
    };
    let sum = Weighted::new(group, group.base);
    Ok(Box::new(NuSlerp {
        t,
        along,
        sum,
        columns: Once::default(),
        opposite: AtomicBool::new(false),
    }))
}

/// Cosines below this are told: next to -1 the coefficients grow beyond bounds.
const OPPOSITE: f64 = -0.9995;

/// Cosine of the angle for the sums `[x0 x0, x1 x1, x0 x1]`.
fn cosine([aa, bb, ab]: [f64; 3]) -> f64 {
    let norm = |square: f64| square.sqrt().max(LEAST_NORM);
    (ab / (norm(aa) * norm(bb))).clamp(-1.0, 1.0)
}

/// Coefficients for the cosine.
fn coefficients(t: f64, cosine: f64) -> [f64; 2] {
    if (cosine as f32).abs() == 1.0 { [1.0 - t, t] } else { arc(t, cosine) }
}

impl NuSlerp {
    /// Coefficients for the sums `[x0 x0, x1 x1, x0 x1]`.
    fn coefficients(&self, sums: [f64; 3]) -> [f64; 2] {
        let cosine = cosine(sums);
        if cosine < OPPOSITE {
            self.opposite.store(true, Ordering::Relaxed);
        }
        coefficients(self.t, cosine)
    }

    fn whole(&self, inputs: &[WeightRef]) -> Result<&[f32], CheckpointError> {
        self.sum.coefficients(inputs, |g| {
            Ok(self.coefficients([g.dot(0, 0), g.dot(1, 1), g.dot(0, 1)]).to_vec())
        })
    }

    /// Sums over the first axis for each place on the others, then their coefficients.
    fn columns(&self, inputs: &[WeightRef], height: usize) -> Result<&[[f32; 2]], CheckpointError> {
        let found = self.columns.get(|| {
            let width = inputs[0].len() / height.max(1);
            let points = self.sum.points.iter().chain(&self.sum.base).map(|&m| &inputs[m]);
            let parts = scan(
                &points.collect::<Vec<_>>(),
                |_| vec![[0f64; 3]; width],
                |sums, first, blocks| {
                    for i in 0..blocks[0].len() {
                        let b = blocks.get(2).map_or(0.0, |b| b[i]);
                        let x = round(blocks[0][i] - b, self.sum.dtype) as f64;
                        let y = round(blocks[1][i] - b, self.sum.dtype) as f64;
                        let sum = &mut sums[(first + i) % width];
                        *sum = [sum[0] + x * x, sum[1] + y * y, sum[2] + x * y];
                    }
                },
            )?;
            let column = |c: usize| {
                let add = |s: [f64; 3], p: &Vec<[f64; 3]>| {
                    [s[0] + p[c][0], s[1] + p[c][1], s[2] + p[c][2]]
                };
                self.coefficients(parts.iter().fold([0.0; 3], add)).map(|v| v as f32)
            };
            Ok((0..width).map(column).collect())
        })?;
        Ok(found)
    }

    /// Rows with coefficients that change from number to number: `of(flat index, x0 and x1 of the row)`.
    fn rows_with<'a>(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
        of: impl Fn(usize, usize, &[Vec<f32>; 2]) -> [f32; 2] + 'a,
    ) -> Result<(), CheckpointError> {
        let cols = inputs[0].cols();
        for (row, out) in rows.zip(out.chunks_exact_mut(cols.max(1))) {
            let base = self.sum.base.map(|b| read(&inputs[b], row..row + 1)).transpose()?;
            let point = |m: usize| -> Result<Vec<f32>, CheckpointError> {
                let values = read(&inputs[self.sum.points[m]], row..row + 1)?;
                let Some(base) = &base else { return Ok(values.into_vec()) };
                let mut difference = Vec::new();
                subtract(&values, base, self.sum.dtype, &mut difference);
                Ok(difference)
            };
            let points = [point(0)?, point(1)?];
            let mut c = [0.0; 2];
            for (i, o) in out.iter_mut().enumerate() {
                if i == 0 || matches!(self.along, Along::Columns(_)) {
                    c = of(row * cols + i, i, &points);
                }
                let b = base.as_ref().map_or(0.0, |b| b[i]);
                *o = round(c[0] * points[0][i] + c[1] * points[1][i] + b, self.sum.dtype);
            }
        }
        Ok(())
    }
}

impl Combine for NuSlerp {
    fn remark(&self) -> Option<String> {
        let told = "nuslerp between nearly opposite directions (cosine below -0.9995): numbers may be very large";
        self.opposite.load(Ordering::Relaxed).then(|| told.to_owned())
    }

    fn prepare(&self, inputs: &[WeightRef]) -> Result<(), CheckpointError> {
        match self.along {
            Along::Whole => self.whole(inputs).map(|_| ()),
            Along::Rows => Ok(()),
            Along::Columns(height) => self.columns(inputs, height).map(|_| ()),
        }
    }

    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        match self.along {
            Along::Whole => self.sum.rows(self.whole(inputs)?, inputs, rows, out),
            Along::Rows => self.rows_with(inputs, rows, out, |_, _, points| {
                let g = Gram::of_vectors(points);
                self.coefficients([g.dot(0, 0), g.dot(1, 1), g.dot(0, 1)]).map(|v| v as f32)
            }),
            Along::Columns(height) => {
                let columns = self.columns(inputs, height)?;
                self.rows_with(inputs, rows, out, |flat, _, _| columns[flat % columns.len()])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_parallel_or_opposite_is_straight() {
        let of = |t, sums| coefficients(t, cosine(sums));
        assert_eq!(of(0.25, [4.0, 1.0, 2.0]), [0.75, 0.25]);
        assert_eq!(of(0.25, [4.0, 1.0, -2.0]), [0.75, 0.25]);
        let [a, b] = of(0.5, [1.0, 1.0, 0.0]);
        assert!((a - b).abs() < 1e-12 && (a - 0.5f64.sqrt()).abs() < 1e-12);
        assert!(of(0.5, [0.0, 0.0, 0.0]).iter().all(|c| c.is_finite()));
    }
}
