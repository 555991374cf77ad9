//! Prompts as token ids, and whether all models mean the same by them.

use moe_merge_checkpoint::Source;
use moe_merge_model::Tokenizer;
use moe_merge_router::Method;

use crate::error::MergeError;
use crate::families::SharedGate;
use crate::gates::TokenPrompts;
use crate::plan::ExpertInput;
use crate::recipe::{Expert, MoeRecipe, Place, RecipeErrors};

/// The base's tokenizer, opened when it is first needed.
pub(crate) struct Tokenizers<'a> {
    pub base: &'a Source,
    pub opened: Option<Tokenizer>,
}

impl Tokenizers<'_> {
    fn get(&mut self) -> Result<&Tokenizer, MergeError> {
        if self.opened.is_none() {
            self.opened = Some(Tokenizer::from_source(self.base)?);
        }
        Ok(self.opened.as_ref().expect("just opened"))
    }
}

/// Refuses experts whose token ids mean something else than the base's: they would read another text.
pub(crate) fn check_tokenizers(
    recipe: &MoeRecipe,
    base: &Source,
    experts: &[ExpertInput],
) -> Result<(), MergeError> {
    let Some(own) = base.side_file("tokenizer.json") else { return Ok(()) };
    let own = own.read()?;
    let mut tokenizer = Tokenizers { base, opened: None };
    for (expert, described) in experts.iter().zip(&recipe.experts) {
        let Some(file) = expert.source.side_file("tokenizer.json") else { continue };
        if file.read()? == own {
            continue;
        }
        let other = Tokenizer::from_source(&expert.source)?;
        if let Some(difference) = tokenizer.get()?.differences(&other) {
            return Err(MergeError::Incompatible {
                what: "base and expert have different vocabularies".into(),
                first: base.label.clone(),
                second: expert.source.label.clone(),
                expected: "the same text for every token id".into(),
                found: difference.to_string(),
                hint: "`tokenizer: base` in the recipe says that the base's vocabulary serves all: right when the \
                       expert was trained with the base's token ids"
                    .into(),
                recipe: Some(described.source.place.to_string()),
            });
        }
    }
    Ok(())
}

/// The prompts of a recipe as token ids.
pub(crate) struct Prompts {
    /// Of the routed experts.
    pub experts: Vec<TokenPrompts>,
    /// Of the shared experts, if they have a gate.
    pub shared: Vec<TokenPrompts>,
    /// Whether each begins with bos.
    pub bos: bool,
}

impl Prompts {
    pub fn encode(
        recipe: &MoeRecipe,
        method: Method,
        shared_gate: SharedGate,
        mut tokenizer: Tokenizers<'_>,
    ) -> Result<Self, MergeError> {
        if matches!(method, Method::Seed(_)) {
            // Only the number of experts counts.
            let none = |n| vec![TokenPrompts::default(); n];
            let shared =
                if shared_gate == SharedGate::Computed { recipe.shared_experts.len() } else { 0 };
            return Ok(Self {
                experts: none(recipe.experts.len()),
                shared: none(shared),
                bos: false,
            });
        }
        let context = tokenizer.base.config.usize("max_position_embeddings").unwrap_or(usize::MAX);
        let tokenizer = tokenizer.get()?;
        let bos = tokenizer.bos();
        let tokens = |text: &String, place: &Place, which: &str, i: usize| {
            let ids: Vec<u32> = bos.into_iter().chain(tokenizer.encode(text)?).collect();
            if ids.len() <= context {
                return Ok(ids);
            }
            let mut error = place.error("a prompt is longer than the context of the base model");
            error.path = format!("{}.{which}[{i}]", error.path);
            error.expected = Some(format!("at most {context} tokens"));
            error.found = Some(format!("{} tokens", ids.len()));
            error.hint = Some("split it into several prompts".into());
            Err(MergeError::from(RecipeErrors(vec![error])))
        };
        let all = |texts: &[String], place: &Place, which: &str| {
            let numbered = texts.iter().enumerate();
            numbered.map(|(i, t)| tokens(t, place, which, i)).collect::<Result<Vec<_>, _>>()
        };
        let of = |expert: &Expert| {
            Ok(TokenPrompts {
                positive: all(&expert.positive_prompts, &expert.place, "positive_prompts")?,
                negative: all(&expert.negative_prompts, &expert.place, "negative_prompts")?,
            })
        };
        let experts = recipe.experts.iter().map(of).collect::<Result<_, MergeError>>()?;
        let shared = match shared_gate {
            SharedGate::Computed => {
                recipe.shared_experts.iter().map(of).collect::<Result<_, MergeError>>()?
            }
            SharedGate::Absent => Vec::new(),
        };
        Ok(Self { experts, shared, bos: bos.is_some() })
    }
}
