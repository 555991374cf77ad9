//! `perplexity PATH --text FILE...`: how well a model predicts texts.

use serde_json::json;

use moe_merge_model::Tokenizer;
use moe_merge_model::perplexity::{DEFAULT_WINDOW, Windows, perplexity};

use crate::args::{Common, PerplexityArgs};
use crate::exit::Outcome;
use crate::progress::{Progress, Unit};
use crate::render::{self, Failure};

/// Measures each text.
pub fn run(args: &PerplexityArgs, common: &Common) -> Result<Outcome, Failure> {
    // All texts first: a wrong path should not be told after minutes of work.
    let texts: Vec<String> =
        args.text.iter().map(|p| super::read_text(p)).collect::<Result<_, _>>()?;
    let source = super::open(&args.path, common)?;
    let tokenizer = Tokenizer::from_source(&source)?;
    let model =
        super::device::open_model(&source, args.accuracy.exec(), args.experts_per_token, common)?;
    let window = args.window.unwrap_or(DEFAULT_WINDOW.min(model.spec().max_positions));
    let windows = Windows { window, stride: args.stride };
    let (mut rows, mut computed, mut seconds) = (Vec::new(), 0, 0.0);
    for (path, text) in args.text.iter().zip(&texts) {
        let name = path.display().to_string();
        let progress = Progress::new(0, Unit::Tokens, common.quiet);
        progress.doing(&name);
        let mut advance = |done, total| progress.set(done as u64, total as u64);
        let found = perplexity(&model, &tokenizer, text, &name, windows, &mut advance)?;
        computed += found.computed;
        seconds += found.time.as_secs_f64();
        rows.push((name, found));
    }
    let speed = computed as f64 / f64::max(seconds, f64::MIN_POSITIVE);
    if common.json {
        let files: Vec<_> = rows
            .iter()
            .map(|(path, p)| {
                json!({
                    "path": path,
                    "tokens": p.tokens,
                    "nats_per_token": p.nats_per_token(),
                    "perplexity": p.perplexity(),
                })
            })
            .collect();
        render::json(&json!({"version": 1, "files": files, "tokens_per_second": speed}))?;
    } else {
        let width = rows.iter().map(|(path, _)| path.chars().count()).max().unwrap_or(0).max(4);
        let mut text =
            format!("{:width$}  {:>8}  {:>10}  perplexity\n", "text", "tokens", "nats/token");
        for (path, p) in &rows {
            let (nats, ppl) = (p.nats_per_token(), p.perplexity());
            text += &format!("{path:width$}  {:>8}  {nats:>10.4}  {ppl:>10.4}\n", p.tokens);
        }
        text += &format!("windows of {window} tokens, {speed:.0} tokens/s\n");
        render::out(&text)?;
    }
    Ok(Outcome::Done)
}
