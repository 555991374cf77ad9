//! Prompts as token ids, and whether all models mean the same by them.

use moe_merge_checkpoint::Source;
use moe_merge_model::Tokenizer;
use moe_merge_router::Method;

use crate::documents::{self, Cutting, DEFAULT_PROMPT_TOKENS, Encoder};
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
    /// Of the routed experts; those without prompts have none here either.
    pub experts: Vec<TokenPrompts>,
    /// Of the shared experts, if they have a gate.
    pub shared: Vec<TokenPrompts>,
    /// Whether each begins with bos.
    pub bos: bool,
    /// What was cut or left out, in words.
    pub notes: Vec<String>,
}

impl Prompts {
    /// Prompts in the recipe are used whole. Documents of files follow: whole for mergekit's modes, as many tokens as
    /// `prompt_tokens` leaves room for otherwise.
    pub fn encode(
        recipe: &MoeRecipe,
        method: Method,
        shared_gate: SharedGate,
        mut tokenizer: Tokenizers<'_>,
    ) -> Result<Self, MergeError> {
        let shared_experts = match shared_gate {
            SharedGate::Computed => recipe.shared_experts.as_slice(),
            SharedGate::Absent => &[],
        };
        let fitted_on = recipe.align.as_ref().is_some_and(|a| a.prompts);
        if matches!(method, Method::Seed(_)) && !fitted_on {
            // Only the number of experts counts.
            let none = |n| vec![TokenPrompts::default(); n];
            let (experts, shared) = (none(recipe.experts.len()), none(shared_experts.len()));
            return Ok(Self { experts, shared, bos: false, notes: Vec::new() });
        }
        let opened = tokenizer.get()?.clone();
        let encoder = Encoder::with(tokenizer.base, opened);
        let whole = matches!(method, Method::Streams(_) | Method::Embeddings(_));
        let budget = recipe.prompt_tokens.unwrap_or(DEFAULT_PROMPT_TOKENS);
        let mut notes = Vec::new();
        let mut of = |expert: &Expert| -> Result<TokenPrompts, MergeError> {
            let place = &expert.place;
            let mut positive =
                inline(&encoder, &expert.positive_prompts, place, "positive_prompts")?;
            let negative = inline(&encoder, &expert.negative_prompts, place, "negative_prompts")?;
            let bos = usize::from(encoder.tokenizer().bos().is_some());
            let used: usize = positive.iter().map(|p| p.len() - bos).sum();
            for file in &expert.prompts_files {
                notes.extend(documents::empty_note(&file.path, file.empty));
                if file.unclaimed > 0 {
                    let (path, n) = (file.path.display(), file.unclaimed);
                    notes.push(format!(
                        "{path}: {n} documents are labelled for experts that do not name the file: left out"
                    ));
                }
            }
            let files = expert.prompts_files.iter().flat_map(|f| &f.documents);
            let cutting =
                if whole { Cutting::Whole } else { Cutting::Budget(budget.saturating_sub(used)) };
            let made = encoder.pieces(&files.collect::<Vec<_>>(), cutting)?;
            let whose = format!("expert `{}`", expert.label());
            notes.extend(made.note(&whose, (budget, "prompt_tokens")));
            positive.extend(made.tokens);
            Ok(TokenPrompts { positive, negative })
        };
        let experts = recipe.experts.iter().map(&mut of).collect::<Result<_, _>>()?;
        let shared = shared_experts.iter().map(&mut of).collect::<Result<_, _>>()?;
        Ok(Self { experts, shared, bos: encoder.tokenizer().bos().is_some(), notes })
    }
}

/// Prompts of the recipe's own text, each whole.
pub(crate) fn inline(
    encoder: &Encoder<'_>,
    texts: &[String],
    place: &Place,
    which: &str,
) -> Result<Vec<Vec<u32>>, MergeError> {
    let context = encoder.context();
    let one = |(i, text): (usize, &String)| {
        let ids = encoder.text(text)?;
        if ids.len() <= context {
            return Ok(ids);
        }
        let mut error = place.error("a prompt is longer than the context of the base model");
        error.path = format!("{}.{which}[{i}]", error.path);
        error.expected = Some(format!("at most {context} tokens"));
        error.found = Some(format!("{} tokens", ids.len()));
        error.hint = Some(
            "split it into several prompts, or put it into a `prompts_file`, which is cut".into(),
        );
        Err(MergeError::from(RecipeErrors(vec![error])))
    };
    texts.iter().enumerate().map(one).collect()
}
