use super::*;
use crate::{
    Dtype, Isa, RouterSpec, cast, linear, linear_backward, lora_add, lora_backward, moe_forward,
    route, route_backward,
};

pub(crate) fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729) % 127) as f32 / 64.0 - 1.0).collect()
}

/// The same in bf16.
pub(crate) fn bytes(n: usize, seed: usize) -> Vec<u8> {
    let mut bytes = vec![0; 2 * n];
    cast::narrow(&numbers(n, seed), Dtype::BF16, &mut bytes);
    bytes
}

/// A linear layer with a pair beside it.
pub(crate) fn lora_linear(
    x: &[f32],
    w: MatView<'_>,
    bias: Option<&[f32]>,
    pair: &LoraPair<'_>,
    out: &mut [f32],
    exec: &Exec,
) -> Result<(), KernelError> {
    linear(x, w, bias, out, exec)?;
    lora_add(x, [w.rows(), w.cols()], pair, out, exec)
}

/// Its gradients.
pub(crate) fn lora_linear_backward(
    x: &[f32],
    w: MatView<'_>,
    pair: &LoraPair<'_>,
    dy: &[f32],
    mut dx: Option<&mut [f32]>,
    exec: &Exec,
) -> Result<LoraGradients, KernelError> {
    if let Some(dx) = &mut dx {
        linear_backward(dy, w, dx, Into::Overwrite, exec)?;
    }
    lora_backward(x, [w.rows(), w.cols()], pair, dy, dx, exec)
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

fn sets() -> Vec<Exec> {
    Isa::ALL.into_iter().filter(|isa| isa.available()).map(|isa| Exec::on(isa).unwrap()).collect()
}

/// A matrix whose numbers are exact in bf16, and its bytes.
struct Matrix {
    values: Vec<f32>,
    bytes: Vec<u8>,
    rows: usize,
    cols: usize,
}

impl Matrix {
    fn new(rows: usize, cols: usize, seed: usize) -> Self {
        let values = numbers(rows * cols, seed);
        let mut bytes = vec![0; values.len() * 2];
        cast::narrow(&values, Dtype::BF16, &mut bytes);
        Self { values, bytes, rows, cols }
    }

    fn view(&self) -> MatView<'_> {
        MatView::new(&self.bytes, Dtype::BF16, self.rows, self.cols).unwrap()
    }
}

/// A layer: matrices of the experts, logits of a router, factors of three pairs of one expert.
struct Layer {
    hidden: usize,
    inter: usize,
    tokens: usize,
    experts: Vec<[Matrix; 3]>,
    named: usize,
    ranks: [usize; 3],
    scale: f32,
    spec: RouterSpec,
}

/// What the experts give.
fn forward(block: &MoeBlock<'_>) -> Result<Vec<f32>, KernelError> {
    let mut out = vec![f32::NAN; block.x.len()];
    block.forward(&block.inner()?, &mut out)?;
    Ok(out)
}

/// All that gradients are taken of: x, logits, and a and b of gate, up and down.
type Inputs<T> = [Vec<T>; 8];

impl Layer {
    fn new(count: usize, spec: RouterSpec, (tokens, hidden, inter): (usize, usize, usize)) -> Self {
        let experts = (0..count)
            .map(|e| {
                [(inter, hidden, 1), (inter, hidden, 2), (hidden, inter, 3)]
                    .map(|(rows, cols, seed)| Matrix::new(rows, cols, 3 * e + seed))
            })
            .collect();
        let (named, ranks) = (count - 1, [2, 3, 1]);
        Self { hidden, inter, tokens, experts, named, ranks, scale: 0.75, spec }
    }

    fn inputs(&self) -> Inputs<f32> {
        let Self { hidden, inter, tokens, ranks, .. } = self;
        let sizes = [
            tokens * hidden,
            tokens * self.experts.len(),
            ranks[0] * hidden,
            inter * ranks[0],
            ranks[1] * hidden,
            inter * ranks[1],
            ranks[2] * inter,
            hidden * ranks[2],
        ];
        std::array::from_fn(|i| numbers(sizes[i], 50 + i))
    }

    fn views(&self) -> Vec<ExpertView<'_>> {
        let views = self.experts.iter().map(|[gate, up, down]| ExpertView {
            gate: gate.view(),
            up: up.view(),
            down: down.view(),
        });
        views.collect()
    }

    fn lora<'a>(&self, inputs: &'a Inputs<f32>) -> ExpertLora<'a> {
        let pair = |i: usize| {
            let (a, b) = (&inputs[2 + 2 * i][..], &inputs[3 + 2 * i][..]);
            Some(LoraPair { a, b, rank: self.ranks[i], scale: self.scale, dropout: None })
        };
        ExpertLora { expert: self.named, gate: pair(0), up: pair(1), down: pair(2) }
    }

    fn block<'a>(
        &self,
        inputs: &'a Inputs<f32>,
        routing: &'a Routing,
        experts: &'a [ExpertView<'a>],
        lora: Option<ExpertLora<'a>>,
        exec: &'a Exec,
    ) -> MoeBlock<'a> {
        MoeBlock { x: &inputs[0], routing, experts, activation: Activation::Silu, lora, exec }
    }

    fn routing(&self, inputs: &Inputs<f32>) -> Routing {
        route(&inputs[1], self.tokens, self.experts.len(), None, &self.spec).unwrap()
    }

    /// The output by the formula, in f64, with the experts that `ids` names.
    fn formula(&self, ids: &[u32], inputs: &Inputs<f64>) -> Vec<f64> {
        let (hidden, k, count) = (self.hidden, self.spec.top_k, self.experts.len());
        let mut out = vec![0.0; self.tokens * hidden];
        for (pair, id) in ids.iter().enumerate() {
            let (token, id) = (pair / k, *id as usize);
            let raw = |e: usize| inputs[1][token * count + e].exp();
            let chosen: f64 =
                ids[token * k..(token + 1) * k].iter().map(|e| raw(*e as usize)).sum();
            let total = if self.spec.renormalise { chosen } else { (0..count).map(raw).sum() };
            let weight = raw(id) / total * f64::from(self.spec.scale);
            let times = |m: usize, x: &[f64]| -> Vec<f64> {
                let matrix = &self.experts[id][m];
                let dot = |row: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
                let values = wide(&matrix.values);
                let mut y: Vec<f64> = values.chunks_exact(matrix.cols).map(dot).collect();
                if id == self.named {
                    let low: Vec<f64> =
                        inputs[2 + 2 * m].chunks_exact(matrix.cols).map(dot).collect();
                    for (y, b) in y.iter_mut().zip(inputs[3 + 2 * m].chunks_exact(self.ranks[m])) {
                        *y += f64::from(self.scale)
                            * b.iter().zip(&low).map(|(b, l)| b * l).sum::<f64>();
                    }
                }
                y
            };
            let x = &inputs[0][token * hidden..(token + 1) * hidden];
            let (g, u) = (times(0, x), times(1, x));
            let h: Vec<f64> = g.iter().zip(&u).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            for (o, y) in out[token * hidden..].iter_mut().zip(times(2, &h)) {
                *o += weight * y;
            }
        }
        out
    }

    /// Gradients of everything.
    fn gradients(&self, inputs: &Inputs<f32>, d_out: &[f32], exec: &Exec) -> Inputs<f32> {
        let (routing, lora, views) = (self.routing(inputs), self.lora(inputs), self.views());
        let mut d_x = vec![f32::NAN; inputs[0].len()];
        let block = self.block(inputs, &routing, &views, Some(lora), exec);
        let inner = block.inner().unwrap();
        let found = block.backward(inner.clone(), d_out, Some(&mut d_x)).unwrap();
        assert_eq!(found, block.backward(inner, d_out, None).unwrap());
        let mut d_logits = vec![0.0; inputs[1].len()];
        let count = self.experts.len();
        route_backward(&inputs[1], count, &routing, &found.weights, &self.spec, &mut d_logits)
            .unwrap();
        let [gate, up, down] = [found.gate, found.up, found.down].map(Option::unwrap);
        [d_x, d_logits, gate.a, gate.b, up.a, up.b, down.a, down.b]
    }
}

#[test]
fn every_gradient_equals_differences() {
    for (count, top_k, renormalise) in
        [(3, 1, false), (3, 2, true), (3, 2, false), (3, 3, true), (3, 3, false), (1, 1, false)]
    {
        let spec = RouterSpec { renormalise, scale: 1.5, ..RouterSpec::softmax(top_k) };
        let mut layer = Layer::new(count, spec, (6, 5, 4));
        let inputs = layer.inputs();
        let d_out = numbers(inputs[0].len(), 70);
        let ids = layer.routing(&inputs).ids;
        layer.named = ids[0] as usize;
        let exact = inputs.each_ref().map(|x| wide(x));
        let value = |inputs: &Inputs<f64>| -> f64 {
            layer.formula(&ids, inputs).iter().zip(&d_out).map(|(y, d)| y * f64::from(*d)).sum()
        };
        for exec in sets() {
            let (routing, lora) = (layer.routing(&inputs), layer.lora(&inputs));
            let views = layer.views();
            let out = forward(&layer.block(&inputs, &routing, &views, Some(lora), &exec)).unwrap();
            for (found, wanted) in out.iter().zip(layer.formula(&ids, &exact)) {
                assert!((f64::from(*found) - wanted).abs() < 1e-4, "{exec:?} {found} {wanted}");
            }
            let found = layer.gradients(&inputs, &d_out, &exec);
            for (which, found) in found.iter().enumerate() {
                assert_eq!(found.len(), inputs[which].len());
                for (i, found) in found.iter().enumerate() {
                    let moved = |by: f64| {
                        let mut inputs = exact.clone();
                        inputs[which][i] += by;
                        value(&inputs)
                    };
                    let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    let near = 2e-4 * slope.abs().max(1.0);
                    assert!(
                        (f64::from(*found) - slope).abs() < near,
                        "{exec:?} {top_k} of {count}: {which} {i} {found} {slope}"
                    );
                }
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let layer = Layer::new(3, RouterSpec::softmax(2), (700, 40, 110));
    let inputs = layer.inputs();
    let d_out = numbers(inputs[0].len(), 70);
    let routing = layer.routing(&inputs);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let exec = Exec::default();
        pool.install(|| {
            let mut all = layer.gradients(&inputs, &d_out, &exec).concat();
            let (lora, views) = (layer.lora(&inputs), layer.views());
            let block = layer.block(&inputs, &routing, &views, Some(lora), &exec);
            all.extend(forward(&block).unwrap());
            all.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(3));
}

#[test]
fn pairs_that_give_nothing_change_nothing() {
    let layer = Layer::new(3, RouterSpec::softmax(2), (90, 33, 50));
    let inputs = layer.inputs();
    let (routing, x, views) = (layer.routing(&inputs), &inputs[0], layer.views());
    let exec = Exec::default();
    let mut plain = vec![0.0; x.len()];
    moe_forward(x, &routing, &views, Activation::Silu, &mut plain, &exec).unwrap();
    let full = layer.lora(&inputs);
    let zeros = vec![0.0; 1000];
    let silent = |pair: Option<LoraPair<'_>>| pair.map(|p| (p.a.to_vec(), p.b.len(), p.rank));
    let kept = full.pairs().map(silent);
    let pair = |i: usize| {
        let (a, b, rank) = kept[i].as_ref()?;
        Some(LoraPair { a, b: &zeros[..*b], rank: *rank, scale: 2.0, dropout: None })
    };
    for lora in [
        ExpertLora { expert: 1, ..ExpertLora::default() },
        ExpertLora { expert: 1, gate: pair(0), up: pair(1), down: pair(2) },
        ExpertLora { expert: 2, gate: None, up: None, down: pair(2) },
    ] {
        let with = forward(&layer.block(&inputs, &routing, &views, Some(lora), &exec)).unwrap();
        for (plain, with) in plain.iter().zip(&with) {
            assert!((plain - with).abs() <= 1e-4 * plain.abs().max(1.0), "{plain} {with}");
        }
    }
}

#[test]
fn linear_with_a_pair_equals_formula_and_differences() {
    for (tokens, rows, cols, rank) in [(1, 3, 2, 1), (5, 4, 6, 3), (130, 7, 5, 2)] {
        let w = Matrix::new(rows, cols, 1);
        let (x, dy) = (numbers(tokens * cols, 2), numbers(tokens * rows, 3));
        let (a, b, bias) = (numbers(rank * cols, 4), numbers(rows * rank, 5), numbers(rows, 6));
        let scale = 0.5;
        let formula = |x: &[f64], a: &[f64], b: &[f64]| -> Vec<f64> {
            let mut out = Vec::new();
            for x in x.chunks_exact(cols) {
                let dot = |row: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
                let low: Vec<f64> = a.chunks_exact(cols).map(dot).collect();
                for (r, row) in wide(&w.values).chunks_exact(cols).enumerate() {
                    let b = &b[r * rank..(r + 1) * rank];
                    let beside: f64 = b.iter().zip(&low).map(|(b, l)| b * l).sum();
                    out.push(dot(row) + f64::from(bias[r]) + f64::from(scale) * beside);
                }
            }
            out
        };
        let inputs = [wide(&x), wide(&a), wide(&b)];
        for exec in sets() {
            let pair = LoraPair { a: &a, b: &b, rank, scale, dropout: None };
            let mut out = vec![f32::NAN; tokens * rows];
            lora_linear(&x, w.view(), Some(&bias), &pair, &mut out, &exec).unwrap();
            for (found, wanted) in out.iter().zip(formula(&inputs[0], &inputs[1], &inputs[2])) {
                assert!((f64::from(*found) - wanted).abs() < 1e-5);
            }
            let mut dx = vec![f32::NAN; x.len()];
            let to = Some(&mut dx[..]);
            let found = lora_linear_backward(&x, w.view(), &pair, &dy, to, &exec).unwrap();
            let alone = lora_linear_backward(&x, w.view(), &pair, &dy, None, &exec).unwrap();
            assert_eq!(found, alone);
            for (which, found) in [dx, found.a, found.b].iter().enumerate() {
                for (i, found) in found.iter().enumerate() {
                    let moved = |by: f64| -> f64 {
                        let mut inputs = inputs.clone();
                        inputs[which][i] += by;
                        let y = formula(&inputs[0], &inputs[1], &inputs[2]);
                        y.iter().zip(&dy).map(|(y, d)| y * f64::from(*d)).sum()
                    };
                    let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    let near = 1e-4 * slope.abs().max(1.0);
                    assert!(
                        (f64::from(*found) - slope).abs() < near,
                        "{which} {i} {found} {slope}"
                    );
                }
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit_of_a_linear_layer() {
    let (tokens, rows, cols, rank) = (500, 200, 150, 9);
    let w = Matrix::new(rows, cols, 1);
    let (x, dy) = (numbers(tokens * cols, 2), numbers(tokens * rows, 3));
    let (a, b) = (numbers(rank * cols, 4), numbers(rows * rank, 5));
    let pair = LoraPair { a: &a, b: &b, rank, scale: 0.5, dropout: None };
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let exec = Exec::default();
        pool.install(|| {
            let (mut out, mut dx) = (vec![0.0; tokens * rows], vec![0.0; tokens * cols]);
            lora_linear(&x, w.view(), None, &pair, &mut out, &exec).unwrap();
            let to = Some(&mut dx[..]);
            let d = lora_linear_backward(&x, w.view(), &pair, &dy, to, &exec).unwrap();
            let all = [out, dx, d.a, d.b].concat();
            all.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(3));
}

#[test]
fn wrong_sizes_are_refused() {
    let layer = Layer::new(2, RouterSpec::softmax(1), (3, 4, 5));
    let inputs = layer.inputs();
    let (routing, views, good) = (layer.routing(&inputs), layer.views(), layer.lora(&inputs));
    let exec = Exec::default();
    let run = |lora: &ExpertLora<'_>| {
        forward(&layer.block(&inputs, &routing, &views, Some(*lora), &exec))
    };
    assert!(run(&good).is_ok());
    let block = layer.block(&inputs, &routing, &views, None, &exec);
    let inner = block.inner().unwrap();
    let (x, mut d_x) = (&inputs[0], vec![0.0; inputs[0].len()]);
    let short = MoeBlock { x: &x[1..], ..block };
    assert!(short.inner().is_err() && short.forward(&inner, &mut d_x).is_err());
    assert!(block.forward(&inner, &mut d_x[1..]).is_err());
    assert!(block.backward(inner.clone(), &x[1..], None).is_err());
    assert!(block.backward(inner.clone(), x, Some(&mut d_x[1..])).is_err());
    assert!(block.backward(inner, x, Some(&mut d_x)).is_ok());
    let error = run(&ExpertLora { expert: 2, ..good }).unwrap_err().to_string();
    assert!(error.contains("LoRA") && error.contains('2'), "{error}");
    let pair = good.gate.unwrap();
    for bad in [
        LoraPair { rank: 0, a: &[], b: &[], ..pair },
        LoraPair { rank: pair.rank + 1, ..pair },
        LoraPair { b: &pair.b[1..], ..pair },
    ] {
        assert!(run(&ExpertLora { gate: Some(bad), ..good }).is_err());
        let w = &layer.experts[0][0];
        let (exec, mut out) = (Exec::default(), vec![0.0; 15]);
        assert!(lora_linear(&inputs[0], w.view(), None, &bad, &mut out, &exec).is_err());
        assert!(lora_linear_backward(&inputs[0], w.view(), &bad, &out, None, &exec).is_err());
    }
}

/// Largest difference over the largest number.
pub(crate) fn apart(found: &[f32], wanted: &[f32]) -> f32 {
    let size = wanted.iter().fold(0f32, |m, v| m.max(v.abs()));
    let pairs = found.iter().zip(wanted);
    pairs.fold(0f32, |m, (f, w)| m.max((f - w).abs())) / size.max(1e-6)
}

#[test]
fn fast_experts_have_the_gradients_of_exact_ones() {
    let exec = Exec { isa: Isa::Avx512Bf16, ..Exec::fast() };
    if !exec.isa.available() {
        return;
    }
    let layer = Layer::new(2, RouterSpec::softmax(2), (150, 48, 64));
    let mut inputs = layer.inputs();
    inputs[0].iter_mut().for_each(|v| *v *= 0.3);
    inputs[2..].iter_mut().flatten().for_each(|v| *v *= 0.1);
    let (d_out, routing, views) =
        (numbers(inputs[0].len(), 6), layer.routing(&inputs), layer.views());
    let run = |exec: &Exec| {
        let lora = layer.lora(&inputs);
        let mut all = layer.gradients(&inputs, &d_out, exec).to_vec();
        all.push(forward(&layer.block(&inputs, &routing, &views, Some(lora), exec)).unwrap());
        let plain = layer.block(&inputs, &routing, &views, None, exec);
        let mut d_x = vec![0.0; inputs[0].len()];
        let found = plain.backward(plain.inner().unwrap(), &d_out, Some(&mut d_x)).unwrap();
        assert!(found.gate.is_none() && found.up.is_none() && found.down.is_none());
        all.extend([d_x, found.weights]);
        all
    };
    for (i, (fast, exact)) in run(&exec).iter().zip(run(&Exec::default())).enumerate() {
        let apart = apart(fast, &exact);
        assert!(apart < 2e-2 && apart > 0.0, "{i}: {apart}");
    }
}
