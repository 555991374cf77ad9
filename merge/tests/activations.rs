//! Methods that look at activations: `regmean` and `regmean_stream`.

mod models;

use std::path::Path;

use models::{TinyModel, values};
use moe_merge_checkpoint::Source;
use moe_merge_merge::MergeError;
use moe_merge_merge::recipe::{self, Recipe};
use moe_merge_model::probe;
use moe_merge_testkit::shared;

const METHODS: [&str; 2] = ["regmean", "regmean_stream"];
const LAYERS: usize = 2;

fn merge(folder: &Path, text: &str) -> Result<Source, MergeError> {
    let Recipe::Dense(recipe) = recipe::parse(text, &folder.join("recipe.yaml"))? else {
        panic!("dense")
    };
    moe_merge_merge::dense(&recipe, folder)
}

fn words() -> Vec<String> {
    ('a'..='j').map(String::from).collect()
}

/// Models `a`, `b`, `c` of random numbers that read the letters from a to j.
fn drawn(folder: &Path) {
    for (seed, name) in ["a", "b", "c"].into_iter().enumerate() {
        TinyModel::new(LAYERS)
            .drawn(seed as u64 + 1)
            .vocabulary(&words(), &[])
            .write(&folder.join(name));
    }
}

/// Texts of 40 letters each, other ones for another seed.
fn texts(seed: u32) -> Vec<String> {
    let mut state = seed;
    let mut letter = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        char::from(b'a' + (state >> 24) as u8 % 10)
    };
    (0..4).map(|_| (0..40).map(|_| letter()).collect()).collect()
}

fn names() -> Vec<String> {
    let one = |l: usize| {
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
            .into_iter()
            .chain(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"])
            .map(move |m| format!("model.layers.{l}.{m}.weight"))
    };
    (0..LAYERS).flat_map(one).collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m, (a, b)| m.max((a - b).abs()))
}

#[test]
fn copies_of_a_model_give_that_model() {
    let folder = tempfile::tempdir().unwrap();
    drawn(folder.path());
    let a = Source::open(&"a".parse().unwrap(), folder.path()).unwrap();
    for method in METHODS {
        for models in [
            format!("[{{model: a, prompts: {:?}}}]", texts(1)),
            format!(
                "[{{model: a, prompts: {:?}}}, {{model: a, prompts: {:?}, parameters: {{weight: 2}}}}]",
                texts(1),
                texts(2)
            ),
        ] {
            let made = merge(folder.path(), &format!("merge_method: {method}\nmodels: {models}\n"))
                .unwrap();
            for name in a.tensors.keys() {
                let off = largest_difference(&values(&made, name), &values(&a, name));
                assert!(off < 2e-4, "{method} {name}: {off}");
            }
        }
    }
}

/// `X` with `X A = B`, for `A [n, n]` and `B [rows, n]`, by elimination.
fn solve(mut a: Vec<Vec<f64>>, b: &[Vec<f64>]) -> Vec<Vec<f64>> {
    // A is symmetric: X A = B is A X' = B'.
    let n = a.len();
    let mut x: Vec<Vec<f64>> = (0..n).map(|i| b.iter().map(|row| row[i]).collect()).collect();
    for i in 0..n {
        let pivot = (i..n).max_by(|p, q| a[*p][i].abs().total_cmp(&a[*q][i].abs())).unwrap();
        a.swap(i, pivot);
        x.swap(i, pivot);
        for r in (0..n).filter(|r| *r != i) {
            let factor = a[r][i] / a[i][i];
            let (from, own) = (a[i].clone(), x[i].clone());
            a[r].iter_mut().zip(&from).for_each(|(v, f)| *v -= factor * f);
            x[r].iter_mut().zip(&own).for_each(|(v, f)| *v -= factor * f);
        }
    }
    (0..b.len()).map(|row| (0..n).map(|i| x[i][row] / a[i][i]).collect()).collect()
}

#[test]
fn regmean_is_the_formula_of_its_paper() {
    let folder = tempfile::tempdir().unwrap();
    drawn(folder.path());
    let recipe = format!(
        "merge_method: regmean\nparameters: {{alpha: 0.8}}\nmodels:\n\
         - {{model: a, prompts: {:?}}}\n- {{model: b, prompts: {:?}, parameters: {{weight: 3}}}}\n",
        texts(1),
        texts(2)
    );
    let made = merge(folder.path(), &recipe).unwrap();
    let letters = |text: &String| text.bytes().map(|b| u32::from(b - b'a')).collect::<Vec<u32>>();
    // Gram matrix of the input of gate and up, times the model's weight, by layer; from the model's own hidden states.
    let hidden = 8;
    let mut grams = vec![vec![vec![vec![0f64; hidden]; hidden]; 2]; LAYERS];
    let sources = ["a", "b"].map(|n| Source::open(&n.parse().unwrap(), folder.path()).unwrap());
    for (m, (source, share)) in sources.iter().zip([1.0, 3.0]).enumerate() {
        let prompts: Vec<Vec<u32>> = texts(m as u32 + 1).iter().map(letters).collect();
        let tokens = prompts.iter().map(Vec::len).sum::<usize>() as f64;
        probe(source, &prompts, &mut |seen| {
            for x in seen.router_input.iter().flat_map(|p| p.chunks_exact(hidden)) {
                for i in 0..hidden {
                    for j in 0..hidden {
                        let alpha = if i == j { 1.0 } else { 0.8 };
                        grams[seen.layer][m][i][j] +=
                            alpha * share / tokens * f64::from(x[i]) * f64::from(x[j]);
                    }
                }
            }
            Ok(())
        })
        .unwrap();
    }
    for (layer, grams) in grams.iter().enumerate() {
        let mut sum: Vec<Vec<f64>> = (0..hidden)
            .map(|i| (0..hidden).map(|j| grams[0][i][j] + grams[1][i][j]).collect())
            .collect();
        // The pull towards the mean, for what no text shows.
        let pull = 1e-5 * (0..hidden).map(|i| sum[i][i]).sum::<f64>() / hidden as f64;
        (0..hidden).for_each(|i| sum[i][i] += pull);
        for part in ["gate_proj", "up_proj"] {
            let name = format!("model.layers.{layer}.mlp.{part}.weight");
            let [a, b] = [values(&sources[0], &name), values(&sources[1], &name)];
            let mean = a.iter().zip(&b).map(|(a, b)| pull * f64::from(a + 3.0 * b) / 4.0);
            let mean: Vec<f64> = mean.collect();
            let mut right: Vec<Vec<f64>> = mean.chunks_exact(hidden).map(<[f64]>::to_vec).collect();
            for (source, gram) in sources.iter().zip(grams) {
                for (row, w) in right.iter_mut().zip(values(source, &name).chunks_exact(hidden)) {
                    for (j, r) in row.iter_mut().enumerate() {
                        *r += (0..hidden).map(|i| f64::from(w[i]) * gram[i][j]).sum::<f64>();
                    }
                }
            }
            let expected: Vec<f32> =
                solve(sum.clone(), &right).into_iter().flatten().map(|v| v as f32).collect();
            let off = largest_difference(&values(&made, &name), &expected);
            assert!(off < 2e-3, "{name}: {off}");
        }
    }
    // What is no linear weight of a layer is the weighted mean.
    for name in
        ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"]
    {
        let [a, b] = [values(&sources[0], name), values(&sources[1], name)];
        let mean: Vec<f32> = a.iter().zip(&b).map(|(a, b)| (a + 3.0 * b) / 4.0).collect();
        assert!(largest_difference(&values(&made, name), &mean) < 1e-6, "{name}");
    }
}

#[test]
fn a_model_of_no_weight_changes_nothing_and_threads_neither() {
    let folder = tempfile::tempdir().unwrap();
    drawn(folder.path());
    for method in METHODS {
        let two = format!(
            "{{model: a, prompts: {0:?}}}, {{model: b, prompts: {1:?}}}",
            texts(1),
            texts(2)
        );
        let recipe = |more: &str| format!("merge_method: {method}\nmodels: [{two}{more}]\n");
        let run = |more: &str, threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let made = pool.install(|| merge(folder.path(), &recipe(more))).unwrap();
            names().iter().flat_map(|n| values(&made, n)).map(f32::to_bits).collect::<Vec<_>>()
        };
        let plain = run("", 1);
        let third = format!(", {{model: c, prompts: {:?}, parameters: {{weight: 0}}}}", texts(3));
        assert_eq!(run("", 3), plain, "{method}");
        assert_eq!(run(&third, 2), plain, "{method}");
    }
}

#[test]
fn what_cannot_be_done_says_so() {
    let folder = tempfile::tempdir().unwrap();
    drawn(folder.path());
    let other: Vec<String> = ('k'..='t').map(String::from).collect();
    TinyModel::new(LAYERS).drawn(9).vocabulary(&other, &[]).write(&folder.path().join("other"));
    let prompts = format!("prompts: {:?}", texts(1));
    let told = |text: &str| {
        use moe_merge_checkpoint::Explain;
        let error = merge(folder.path(), text).unwrap_err();
        let fields: Vec<String> = error.fields().into_iter().map(|(_, v)| v).collect();
        format!("{error} {} {}", fields.join(" "), error.hint().unwrap_or_default())
    };
    let a = format!("{{model: a, {prompts}}}");
    for (recipe, expected) in [
        (
            format!("merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{a}]"),
            "looks at no text",
        ),
        (
            "merge_method: linear\nparameters: {weight: 1}\nself_text: 5\nmodels: [{model: a}]"
                .into(),
            "`regmean`, `regmean_stream`",
        ),
        (
            format!("merge_method: regmean\nself_text: 0\nmodels: [{a}, {{model: b}}]"),
            "lets it write none",
        ),
        (
            format!("merge_method: regmean\nmodels: [{a}, {{model: b}}]"),
            "from which it could write its own",
        ),
        (
            format!("merge_method: regmean\nmodels: [{a}, {{model: other, {prompts}}}]"),
            "the same text for every token id",
        ),
        (
            "merge_method: regmean\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]".into(),
            "runs whole models",
        ),
        (
            format!("merge_method: regmean\ntokenizer: {{source: base}}\nmodels: [{a}]"),
            "one vocabulary",
        ),
        (
            format!("merge_method: regmean\nparameters: {{alpha: 1.5}}\nmodels: [{a}]"),
            "from 0 to 1",
        ),
        (
            format!("merge_method: regmean\nparameters: {{alhpa: 1}}\nmodels: [{a}]"),
            "did you mean `alpha`?",
        ),
        (format!("merge_method: regmaen\nmodels: [{a}]"), "did you mean `regmean`?"),
        (
            format!(
                "merge_method: regmean\nparameters: {{weight: [{{filter: q_proj, value: 1}}, {{value: 2}}]}}\nmodels: [{a}]"
            ),
            "read the same input",
        ),
    ] {
        let text = told(&recipe);
        assert!(text.contains(expected), "{recipe}\n{text}");
    }
}

#[test]
fn experts_are_not_followed() {
    let Some(moe) = shared("golden/arch/mixtral") else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = moe.display();
    let error = merge(
        folder.path(),
        &format!("merge_method: regmean\nmodels: [{{model: {path}, prompts: [a]}}]\n"),
    );
    let text = error.unwrap_err().to_string();
    assert!(text.contains("does not follow the inputs of `model.layers.0."), "{text}");
}
