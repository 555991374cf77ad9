//! Pictures of routing: in the terminal, as SVG, as one page. They show figures, they compute none.

mod charts;
mod colour;
pub mod glyph;
pub mod html;
pub mod svg;
pub mod terminal;

use moe_merge_router::traffic::{TextTraffic, Verdict};

/// Everything that is shown about a few texts on one model.
#[derive(Debug)]
pub struct Routes {
    /// The model, as it was named.
    pub model: String,
    /// Its family.
    pub family: &'static str,
    /// Names of its experts.
    pub experts: Vec<String>,
    /// Whether these are real names, not numbers.
    pub named: bool,
    /// Experts per token.
    pub top_k: usize,
    /// Whether every token visits a shared expert besides.
    pub shared: bool,
    /// Tokens the model saw at once.
    pub window: usize,
    /// The texts.
    pub texts: Vec<TextRoutes>,
    /// What labels say; none without labels.
    pub verdict: Option<Verdict>,
}

/// One text.
#[derive(Debug)]
pub struct TextRoutes {
    /// File, or `prompt 1`.
    pub origin: String,
    /// The expert that it belongs to.
    pub label: Option<Label>,
    /// Windows it was cut into.
    pub windows: usize,
    /// The figures.
    pub traffic: TextTraffic,
    /// Its first tokens.
    pub tokens: Vec<TokenRoutes>,
}

/// The expert that a text belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label {
    /// The expert.
    pub expert: usize,
    /// How it is known.
    pub from: LabelFrom,
}

/// How a label is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LabelFrom {
    /// The user said it.
    Option,
    /// The file is called like the expert.
    FileName,
}

impl LabelFrom {
    /// For people and documents.
    pub fn name(self) -> &'static str {
        match self {
            Self::Option => "--labels",
            Self::FileName => "file name",
        }
    }
}

/// One token.
#[derive(Debug)]
pub struct TokenRoutes {
    /// Its id.
    pub id: u32,
    /// Its text, not yet made visible.
    pub text: String,
    /// The expert with the largest mean weight over layers.
    pub expert: usize,
    /// That mean weight, 0 to 1.
    pub weight: f64,
    /// Per MoE layer the experts visited and their weights, best first.
    pub layers: Vec<Vec<(u32, f32)>>,
}

impl Routes {
    /// A short sign for an expert: a letter, or its number where there are more experts than letters.
    pub fn mark(&self, expert: usize) -> String {
        if self.experts.len() > 26 {
            return expert.to_string();
        }
        char::from(b'A' + expert as u8).to_string()
    }

    /// Whether names say more than signs.
    fn has_names(&self) -> bool {
        self.named || self.experts.len() <= 26
    }

    /// `mixtral, 4 experts, top-2`.
    pub fn summary(&self) -> String {
        let shared = if self.shared { " and a shared one" } else { "" };
        let count = self.experts.len();
        format!("{}, {count} experts{shared}, top-{}", self.family, self.top_k)
    }

    /// Layers in which first choices agree with labels no better than chance.
    pub fn chance_layers(&self) -> Vec<usize> {
        let layers = self.verdict.iter().flat_map(|v| &v.layers);
        layers.filter(|l| !l.better_than_chance).map(|l| l.layer).collect()
    }
}

/// A share in percent without a sign.
fn percent(share: f64) -> String {
    format!("{:.0}", 100.0 * share)
}

/// `3`, or `4-7`.
fn range(from: usize, to: usize) -> String {
    if from == to { from.to_string() } else { format!("{from}-{to}") }
}

/// Ascending numbers, neighbours together: `0-2, 5`.
fn ranges(numbers: &[usize]) -> String {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b);
    let runs: Vec<String> = runs.map(|r| range(r[0], r[r.len() - 1])).collect();
    runs.join(", ")
}

#[cfg(test)]
mod tests;
