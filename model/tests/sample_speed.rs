//! How much faster many texts are written together than one after the other. Prints; run with `--ignored --nocapture`.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use moe_merge_checkpoint::Source;
use moe_merge_model::generate::{EndOfText, Generation, generate};
use moe_merge_model::{Model, Sampling, Tokenizer, sample_texts, self_text_starts};

/// Tokens of each text.
const NEW: usize = 120;

fn measure(path: &Path, texts: usize) {
    let source =
        Source::open(&path.display().to_string().parse().unwrap(), Path::new(".")).unwrap();
    let tokenizer = Tokenizer::from_source(&source).unwrap();
    let starts = self_text_starts(&[], &tokenizer, texts).unwrap();
    let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
    let model = Model::open(&source).unwrap();
    let generation = Generation { max_new_tokens: NEW, sampling, end_of_text: EndOfText::Ignore };
    let mut rates = [Vec::new(), Vec::new()];
    for _ in 0..3 {
        let clock = Instant::now();
        let out = sample_texts(&source, &starts, NEW, sampling, &[], &mut |_| Ok(())).unwrap();
        let written: usize = out.iter().map(|t| t.len() - 1).sum();
        rates[0].push(written as f64 / clock.elapsed().as_secs_f64());
        let clock = Instant::now();
        let mut on = |_: &str| ControlFlow::Continue(());
        let one = generate(&model, &tokenizer, &starts[0], generation, &mut on).unwrap();
        rates[1].push(one.tokens.len() as f64 / clock.elapsed().as_secs_f64());
    }
    let [together, alone] = rates.map(|mut r| {
        r.sort_by(f64::total_cmp);
        r[1]
    });
    let ratio = together / alone;
    println!(
        "{}: {texts} together {together:.0}/s, alone {alone:.0}/s, {ratio:.1} x",
        path.display()
    );
    assert!(ratio > 1.0, "{ratio}");
}

#[test]
#[ignore = "a measurement"]
fn together_is_faster() {
    if let Some(tiny) = moe_merge_testkit::shared("models/tiny/base") {
        [10, 40, 160].into_iter().for_each(|texts| measure(&tiny, texts));
    }
    if let Some(other) = std::env::var_os("SPEED_MODEL").map(PathBuf::from) {
        [8, 22, 44].into_iter().for_each(|texts| measure(&other, texts));
    }
}
