//! How much of what the tiny experts could give our routers recover: floors below what was measured, and never less than any
//! mode of mergekit.

mod common;

use std::path::PathBuf;

use moe_merge_merge::build::RecipeText;
use moe_merge_merge::quality::{Quality, QualityOptions, RouterRow, measure};
use moe_merge_merge::recipe::{self, Recipe};
use moe_merge_testkit::shared;
use serde_json::{Value, json};

const MERGEKIT: [&str; 3] = ["hidden", "hidden_avg", "cheap_embed"];

/// A recipe of the four tiny experts with their six prompts each, top-2; `None` where reference data is not here.
fn tiny() -> Option<(String, PathBuf)> {
    let models = shared("models/tiny")?.canonicalize().unwrap();
    let prompts = std::fs::read_to_string(models.join("prompts.json")).unwrap();
    let prompts: Value = serde_json::from_str(&prompts).unwrap();
    let prompts = prompts.as_object().unwrap();
    let expert = |(name, texts): (&String, &Value)| json!({"name": name, "source_model": models.join(name), "positive_prompts": texts});
    let eval: serde_json::Map<String, Value> = prompts
        .keys()
        .map(|name| (name.clone(), json!(models.join(format!("eval_{name}.txt")))))
        .collect();
    let recipe = json!({
        "base_model": models.join("base"),
        "experts": prompts.iter().map(expert).collect::<Vec<_>>(),
        "experts_per_token": 2,
        "evaluation": eval,
    });
    // JSON is YAML, too.
    Some((recipe.to_string(), models.join("recipe.yaml")))
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|&n| n.to_owned()).collect()
}

fn quality(options: &QualityOptions) -> Option<Quality> {
    let (text, path) = tiny()?;
    let Ok(Recipe::Moe(recipe)) = recipe::parse(&text, &path) else { panic!("{text}") };
    let text = RecipeText { path: &path, text: &text };
    let found = measure(&recipe, text, options, &common::Silent);
    let found = found.unwrap_or_else(|e| panic!("{e:?}"));
    for row in &found.routers {
        let percent = |s: Option<f64>| s.map_or("-".into(), |s| format!("{:.1} %", 100.0 * s));
        println!(
            "{} top-{} {}: {}, from the ninth token {}, right expert first {}, forecast {}",
            row.experts.join("+"),
            row.experts_per_token,
            row.router,
            percent(row.mean.recovered),
            percent(row.mean.recovered_from_ninth),
            percent(row.mean.accuracy),
            percent(row.mean.forecast),
        );
    }
    Some(found)
}

fn recovered(row: &RouterRow) -> f64 {
    row.mean.recovered.expect("an oracle that gains")
}

/// The numbers of `models/tiny/README.md` for base and oracle, and floors for what was measured with windows of 128 on the
/// first 2 600 tokens of each text: 76 % from six prompts, 82 % with text that experts wrote, 81 % without prompts.
#[test]
fn most_of_the_oracle_gap_is_recovered() {
    let options = QualityOptions {
        estimators: names(&["auto", MERGEKIT[0], MERGEKIT[1], MERGEKIT[2]]),
        window: Some(128),
        tokens: Some(2600),
        self_text: Some(5000),
        no_prompts: true,
        ..QualityOptions::default()
    };
    let Some(found) = quality(&options) else { return };
    let base: Vec<f64> = [3.073, 3.955, 4.179, 2.546].to_vec();
    let oracle = [2.796, 3.393, 3.431, 2.083];
    for (i, domain) in found.domains.iter().enumerate() {
        // Those are means over 6 000 tokens.
        assert!((found.models[0].1[i] / base[i] - 1.0).abs() < 0.05, "{}", found.models[0].1[i]);
        assert!((domain.oracle.unwrap() / oracle[i] - 1.0).abs() < 0.05, "{domain:?}");
    }
    never_worse_than_mergekit(&found.routers[..4]);
    let floors =
        [("auto", 0.73, 0.86), ("auto+self-text", 0.79, 0.92), ("auto (no prompts)", 0.78, 0.91)];
    let ours = found.routers.iter().filter(|r| !MERGEKIT.contains(&r.router.as_str()));
    assert_eq!(ours.clone().count(), floors.len());
    for (row, (router, all, from_ninth)) in ours.zip(floors) {
        assert_eq!(row.router, router);
        assert!(recovered(row) >= all, "{router}: {:?}", row.mean);
        assert!(row.mean.recovered_from_ninth.unwrap() >= from_ninth, "{router}: {:?}", row.mean);
        let (forecast, accuracy) = (row.mean.forecast.unwrap(), row.mean.accuracy.unwrap());
        assert!((forecast - accuracy).abs() <= 0.05, "{router}: {forecast} against {accuracy}");
    }
}

/// `auto` comes first in the rows of every MoE, then mergekit's.
fn never_worse_than_mergekit(rows: &[RouterRow]) {
    assert_eq!(rows[0].router, "auto");
    let best = rows[1..].iter().map(recovered).fold(f64::NEG_INFINITY, f64::max);
    let own = recovered(&rows[0]);
    let (experts, top_k) = (rows[0].experts.len(), rows[0].experts_per_token);
    assert!(own >= best, "{experts} experts, top-{top_k}: {own} against {best}");
}

#[test]
fn no_mode_of_mergekit_is_better_for_any_number_of_experts() {
    let options = QualityOptions {
        estimators: names(&["auto", MERGEKIT[0], MERGEKIT[1], MERGEKIT[2]]),
        window: Some(128),
        tokens: Some(635),
        top_k: vec![1, 2],
        experts: vec![names(&["prose", "code"]), names(&["prose", "math", "facts"])],
        ..QualityOptions::default()
    };
    let Some(found) = quality(&options) else { return };
    assert_eq!(found.routers.len(), 2 * 2 * 4);
    found.routers.chunks(4).for_each(never_worse_than_mergekit);
    // The other expert's text says nothing about a MoE without it.
    assert!(found.routers[0].domains[2].is_none() && found.routers[0].domains[1].is_some());
    // Top-2 of all four is among the rows of the other test.
    let options = QualityOptions { top_k: vec![1], experts: Vec::new(), ..options };
    let Some(found) = quality(&options) else { return };
    assert_eq!(found.routers.len(), 4);
    never_worse_than_mergekit(&found.routers);
}
