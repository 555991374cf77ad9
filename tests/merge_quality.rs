//! One dense model of four fine-tunes: how much of what each gained is left, by method, on text that no method has seen.

#[allow(dead_code)]
mod cli;

use std::path::{Path, PathBuf};

use cli::run;
use moe_merge_testkit::shared;
use serde_json::Value;

const DOMAINS: [&str; 4] = ["prose", "code", "math", "facts"];

/// Nats per token of each text.
fn nats(model: &Path, texts: &[PathBuf]) -> Vec<f64> {
    let model = model.display().to_string();
    let texts: Vec<String> = texts.iter().map(|t| t.display().to_string()).collect();
    let mut args = vec!["perplexity", &model, "--json", "--text"];
    args.extend(texts.iter().map(String::as_str));
    let found = run(&args);
    assert_eq!(found.code, 0, "{}", found.stderr);
    let report: Value = serde_json::from_str(&found.stdout).unwrap();
    let files = report["files"].as_array().unwrap();
    files.iter().map(|f| f["nats_per_token"].as_f64().unwrap()).collect()
}

#[test]
fn activations_keep_more_than_weights_alone() {
    let Some(models) = shared("models/tiny") else { return };
    let temp = tempfile::tempdir().unwrap();
    let (mut seen, mut unseen) = (Vec::new(), Vec::new());
    for domain in DOMAINS {
        let text = std::fs::read_to_string(models.join(format!("eval_{domain}.txt"))).unwrap();
        let cut = |from: usize| from + text[from..].find('\n').unwrap();
        for (texts, part) in [(&mut seen, 0..cut(9000)), (&mut unseen, cut(18_000)..text.len())] {
            let path = temp.path().join(format!("{domain}_{}.txt", part.start));
            std::fs::write(&path, &text[part]).unwrap();
            texts.push(path);
        }
    }
    let base = nats(&models.join("base"), &unseen);
    let own: Vec<f64> = DOMAINS
        .iter()
        .zip(&unseen)
        .map(|(d, t)| nats(&models.join(d), std::slice::from_ref(t))[0])
        .collect();
    // Share of the gain that is left, mean over the domains.
    let kept = |method: &str, keys: &str, text: bool| -> f64 {
        let mut recipe = format!("merge_method: {method}\n{keys}dtype: float32\nmodels:\n");
        for (domain, file) in DOMAINS.iter().zip(&seen) {
            let text =
                if text { format!(", prompts_file: {}", file.display()) } else { String::new() };
            recipe += &format!("- {{model: {}{text}}}\n", models.join(domain).display());
        }
        let (file, out) = (temp.path().join("recipe.yaml"), temp.path().join("out"));
        std::fs::write(&file, recipe).unwrap();
        let paths = [&file, &out].map(|p| p.display().to_string());
        let built = run(&[paths[0].as_str(), "--out", &paths[1], "--force"]);
        assert_eq!(built.code, 0, "{}", built.stderr);
        let merged = nats(&out, &unseen);
        let shares = merged.iter().zip(&base).zip(&own).map(|((m, b), o)| (b - m) / (b - o));
        shares.sum::<f64>() / 4.0
    };
    let linear = kept("linear", "parameters: {weight: 1}\n", false);
    let base = models.join("base").display().to_string();
    let tsv = kept("tsv", &format!("base_model: {base}\nparameters: {{lambda: 0.4}}\n"), false);
    let regmean = kept("regmean", "", true);
    let stream = kept("regmean_stream", "", true);
    eprintln!(
        "kept: linear {linear:.3}, tsv {tsv:.3}, regmean {regmean:.3}, regmean_stream {stream:.3}"
    );
    let of_weights = linear.max(tsv);
    assert!(of_weights < regmean && regmean + 0.05 < stream, "{linear} {tsv} {regmean} {stream}");
    assert!(stream > 0.4, "{stream}");
}
