//! One MoE among those that are compared, as a recipe of its own.

use moe_merge_router::{Estimator, Method};

use crate::recipe::{Choice, Expert, GateMode, MoeRecipe};

/// Which text the routers learn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Text {
    /// What the recipe says.
    Recipe,
    /// That, and so many tokens that each expert writes.
    Also(usize),
    /// Only what the experts write: so many tokens, or as many as experts without prompts do.
    Only(Option<usize>),
}

/// One MoE.
#[derive(Debug, Clone)]
pub struct Build {
    /// Its experts by their number in the recipe.
    pub set: Vec<usize>,
    /// Most prompts of each; `None` for all.
    pub prompts: Option<usize>,
    pub top_k: usize,
    pub estimator: &'static Estimator,
    pub text: Text,
    pub generalist: Option<Choice>,
    /// Whether the generalist was asked for beside the recipe.
    pub extra: bool,
}

impl Build {
    pub fn with_generalist(self) -> Self {
        Self { generalist: Some(Choice::Yes), extra: true, ..self }
    }

    /// Its name in the table.
    pub fn router(&self) -> String {
        let name = self.estimator.name;
        let text = match self.text {
            Text::Recipe => "",
            Text::Also(_) => "+self-text",
            Text::Only(_) => " (no prompts)",
        };
        let generalist = if self.extra { "+generalist" } else { "" };
        format!("{name}{generalist}{text}")
    }

    /// Whether its routers depend on prompts.
    pub fn reads_prompts(&self) -> bool {
        !matches!(self.estimator.method, Method::Seed(_)) && !matches!(self.text, Text::Only(_))
    }

    /// Why it cannot be built from `recipe`, if so.
    pub fn refusal(&self, recipe: &MoeRecipe) -> Option<String> {
        let count = self.set.len();
        if self.top_k == 0 || self.top_k > count {
            return Some(format!("top-{} of {count} experts cannot be", self.top_k));
        }
        let mode = GateMode::named(self.estimator.name)?;
        let has_prompts = |e: usize| recipe.experts[e].has_prompts() && self.prompts != Some(0);
        let without = self.set.iter().find(|&&e| !has_prompts(e));
        if mode.needs_prompts()
            && let Some(&e) = without
        {
            let label = recipe.experts[e].label();
            return Some(format!("`{}` needs prompts, and expert `{label}` has none", mode.name()));
        }
        if self.extra && recipe.sequential == Some(Choice::No) {
            return Some("a generalist needs `sequential` left out, or true".into());
        }
        let silent = recipe.self_text == Some(0) && self.text == Text::Recipe;
        (mode.learned() && silent && without.is_some())
            .then(|| format!("`{}` has no text: `self_text` is 0", mode.name()))
    }

    /// The recipe that makes it. Evaluation text is left out, and vocabularies are not compared again.
    pub fn recipe(&self, recipe: &MoeRecipe) -> MoeRecipe {
        let mode = GateMode::named(self.estimator.name).unwrap_or(recipe.gate_mode);
        let matches = matches!(self.estimator.method, Method::Matching(_));
        let own = || {
            self.set.iter().map(|&e| {
                let mut expert = recipe.experts[e].clone();
                if let Some(most) = self.prompts {
                    keep(&mut expert, most);
                }
                expert
            })
        };
        MoeRecipe {
            experts: own().collect(),
            gate_mode: mode,
            experts_per_token: self.top_k,
            generalist: self.generalist.filter(|_| matches),
            self_text: match self.text {
                Text::Recipe => recipe.self_text,
                Text::Also(tokens) => Some(tokens),
                Text::Only(tokens) => tokens,
            },
            evaluation: Vec::new(),
            base_tokenizer: true,
            ..recipe.clone()
        }
    }

    /// Names the text that its experts write, if they do: the same for all estimators that learn and whatever top-k.
    pub fn text_key(&self) -> Option<String> {
        let learned = GateMode::named(self.estimator.name)?.learned();
        learned.then(|| format!("{:?} {:?} {:?}", self.set, self.prompts, self.text))
    }
}

/// Leaves an expert its first `most` prompts, those in the recipe before those in files; without any, it has no negative
/// ones either.
fn keep(expert: &mut Expert, most: usize) {
    expert.positive_prompts.truncate(most);
    let mut left = most - expert.positive_prompts.len();
    for file in &mut expert.prompts_files {
        file.documents.truncate(left);
        left -= file.documents.len();
    }
    expert.prompts_files.retain(|f| !f.documents.is_empty());
    if most == 0 {
        expert.negative_prompts.clear();
    }
}
