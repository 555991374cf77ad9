//! `evaluate RECIPE`: ways to make routers, side by side.

use moe_merge_merge::MergeError;
use moe_merge_merge::align::Survival;
use moe_merge_merge::build::RecipeText;
use moe_merge_merge::quality::{
    POSITION_GROUPS, Quality, QualityError, QualityOptions, RouterRow, Shares, measure,
};
use moe_merge_merge::recipe::{self, Recipe, RecipeErrors};

use super::build::{Bars, notes, percent, table, versioned};
use crate::args::{Common, EvaluateArgs};
use crate::exit::{self, Outcome};
use crate::render::{self, Failure, count};

/// Measures and prints. Nothing is written.
pub fn run(args: &EvaluateArgs, common: &Common) -> Result<Outcome, Failure> {
    let text = recipe::read(&args.recipe)?;
    let text = RecipeText { path: &args.recipe, text: &text };
    let recipe = match recipe::parse(text.text, text.path).map_err(MergeError::from)? {
        Recipe::Moe(recipe) => recipe,
        Recipe::Dense(recipe) => {
            let mut error = recipe.place.error("a dense recipe has no routers");
            error.expected = Some("a MoE recipe, with `experts`".into());
            return Err(MergeError::from(RecipeErrors(vec![error])).into());
        }
    };
    let names = |set: &String| set.split(',').map(|n| n.trim().to_owned()).collect();
    let options = QualityOptions {
        estimators: args.estimators.clone(),
        window: args.window,
        tokens: args.tokens.map(|n| n as usize),
        top_k: args.top_k.clone(),
        prompts: args.prompts.clone(),
        experts: args.experts.iter().map(names).collect(),
        self_text: args.self_text.map(|n| n as usize),
        no_prompts: args.no_prompts,
        generalist: args.generalist,
        interrupt: exit::interrupt().clone(),
        placement: super::device::find(common)?,
    };
    let found: Result<Quality, QualityError> = measure(&recipe, text, &options, &Bars::new(common));
    let found = found?;
    notes(&found.notes, common);
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&found))?)?,
        false => render::out(&summary(&found, args.positions))?,
    }
    Ok(Outcome::Done)
}

fn summary(found: &Quality, positions: bool) -> String {
    let labels = labels(&found.routers);
    let mut text = perplexities(found, &labels);
    if found.align.is_some() {
        text += &survival(found);
    }
    text += &shares(found, &labels);
    if positions {
        text += &by_position(found, &labels);
    }
    text
}

/// What each row is, leaving out what is the same for all.
fn labels(rows: &[RouterRow]) -> Vec<String> {
    fn differ<T: PartialEq>(rows: &[RouterRow], of: impl Fn(&RouterRow) -> T) -> bool {
        rows.windows(2).any(|pair| of(&pair[0]) != of(&pair[1]))
    }
    let experts = differ(rows, |r| r.experts.clone());
    let top_k = differ(rows, |r| r.experts_per_token);
    // Rows that read no prompts say so by their name.
    let reading: Vec<RouterRow> = rows.iter().filter(|r| r.prompts != Some(0)).cloned().collect();
    let prompts = differ(&reading, |r| r.prompts);
    let label = |row: &RouterRow| {
        let mut parts = Vec::new();
        parts.extend(experts.then(|| row.experts.join("+")));
        parts.extend(top_k.then(|| format!("top-{}", row.experts_per_token)));
        let few = row.prompts.filter(|&n| prompts && n > 0);
        parts.extend(few.map(|n| format!("{n} prompt{}", if n == 1 { "" } else { "s" })));
        parts.push(row.router.clone());
        parts.join(" / ")
    };
    rows.iter().map(label).collect()
}

fn perplexities(found: &Quality, labels: &[String]) -> String {
    let number = |p: Option<f64>| p.map_or("-".to_owned(), |p| format!("{p:.3}"));
    let models = found.models.iter().map(|(name, each)| {
        (name.clone(), each.iter().map(|&p| number(Some(p))).collect::<Vec<_>>())
    });
    let oracle = ("oracle".to_owned(), found.domains.iter().map(|d| number(d.oracle)).collect());
    let plain = found.align.is_some().then(|| {
        let cells = found.domains.iter().map(|d| number(d.plain_oracle)).collect();
        ("oracle, MLPs as they came".to_owned(), cells)
    });
    let routers = labels.iter().zip(&found.routers).map(|(label, row)| {
        let cells = row.domains.iter().map(|d| number(d.as_ref().map(|d| d.perplexity)));
        (label.clone(), cells.collect())
    });
    let columns: Vec<&str> = found.domains.iter().map(|d| d.name.as_str()).collect();
    let tokens: usize = found.domains.iter().map(|d| d.tokens).sum();
    let head = format!(
        "perplexity of held-out text, {} tokens in windows of {}\n",
        count(tokens),
        found.window
    );
    head + &table(&columns, models.chain(plain).chain([oracle]).chain(routers))
}

/// What of each expert's gain survives behind the attention of the output.
fn survival(found: &Quality) -> String {
    let columns: Vec<&str> = found.domains.iter().map(|d| d.name.as_str()).collect();
    let cells = |of: fn(&Survival) -> f64| {
        found.domains.iter().map(|d| percent(d.survival.as_ref().map(of))).collect()
    };
    let rows = [("as they came", cells(|s| s.before)), ("fitted", cells(|s| s.after))];
    let head = "\nshare of each expert's gain over the base that its MLPs keep, for every token, whatever the router\n";
    head.to_owned() + &table(&columns, rows.into_iter().map(|(name, c)| (name.to_owned(), c)))
}

fn shares(found: &Quality, labels: &[String]) -> String {
    let mut columns: Vec<&str> = found.domains.iter().map(|d| d.name.as_str()).collect();
    columns.extend(["mean", "from 9th token", "right expert first", "in top-k", "forecast"]);
    let rows = labels.iter().zip(&found.routers).map(|(label, row)| {
        let each = row.domains.iter().map(|d| d.as_ref().and_then(|d| d.shares.recovered));
        let mean = &row.mean;
        let means = [
            mean.recovered,
            mean.recovered_from_ninth,
            mean.accuracy,
            mean.coverage,
            mean.forecast,
        ];
        (label.clone(), each.chain(means).map(percent).collect())
    });
    let head = "\nshare of the gap between base and oracle that routers recover, and tokens that find their expert\n";
    let mut text = head.to_owned() + &table(&columns, rows);
    text += "  oracle: the expert of the text's name for every token; from 9th token: of each window; forecast: tokens of prompts \
             held out\n";
    text
}

fn by_position(found: &Quality, labels: &[String]) -> String {
    let ends = POSITION_GROUPS.iter().skip(1).map(Some).chain([None]);
    let names: Vec<String> = POSITION_GROUPS
        .iter()
        .zip(ends)
        .map(|(&first, next)| match next {
            Some(&next) if next == first + 1 => first.to_string(),
            Some(&next) => format!("{first}-{}", next - 1),
            None => format!("{first}+"),
        })
        .collect();
    let columns: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut rows = Vec::new();
    for (label, row) in labels.iter().zip(&found.routers) {
        let each = found.domains.iter().zip(&row.domains);
        let known = each.filter_map(|(d, r)| Some((d.name.as_str(), &r.as_ref()?.shares)));
        for (domain, shares) in known.chain([("mean", &row.mean)]) {
            let cells = |s: &Shares| s.by_position.iter().copied().map(percent).collect();
            rows.push((format!("{label}: {domain}"), cells(shares)));
        }
    }
    let head = "\nthe same by position: text tokens of the window before the one predicted\n";
    head.to_owned() + &table(&columns, rows.into_iter())
}
