//! One vocabulary for models that have several: which tokens there are, and where the rows of each come from.

use std::collections::HashMap;
use std::sync::Arc;

use moe_merge_checkpoint::{Source, WeightRef};

use crate::error::MergeError;
use crate::recipe::{RecipeErrors, RowSpec, TokenizerSpec, VocabularySource};

mod chat;
mod file;
mod rows;

pub(crate) use chat::with_template;
use file::TokenizerFile;
use rows::{Fill, Mapped};

/// The vocabulary of a merge: for each output row its row in every model.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    /// Rows of the output, padding included.
    pub rows: usize,
    /// Rows of the vocabulary of each opened model.
    rows_of: Vec<usize>,
    /// Output rows that stand for a token.
    tokens: usize,
    /// Per opened model: row of each token, if it has one; `None` for a model that takes no part.
    own: Vec<Option<Arc<Vec<Option<u32>>>>>,
    /// Where a model that lacks a token gets its row.
    fill: Arc<Vec<Fill>>,
    /// Tokens whose rows all models get from `fill`.
    force: Arc<Vec<bool>>,
    /// The model whose tokenizer files are written.
    pub donor: usize,
    /// `tokenizer.json` and what goes with it, where the donor's files no longer fit.
    pub files: Vec<(String, Vec<u8>)>,
}

/// Models of a merge, as [`Vocabulary::new`] needs them.
pub(crate) struct Members<'a> {
    /// Every opened model; those beyond `count` only lend rows.
    pub sources: &'a [&'a Source],
    /// How many take part, in recipe order.
    pub count: usize,
    /// The base among them.
    pub base: Option<usize>,
    /// The opened model that a reference of the recipe means.
    pub find: &'a dyn Fn(&crate::recipe::SourceSpec) -> Option<usize>,
}

impl Vocabulary {
    /// Makes the vocabulary that `spec` asks for. Rules: mergekit's, but models in recipe order and tokens by number, so
    /// that the same recipe gives the same vocabulary.
    ///
    /// # Errors
    /// [`MergeError::Recipe`] for a token that its source lacks, [`MergeError::Incompatible`] or
    /// [`MergeError::Checkpoint`] for a tokenizer that cannot be read.
    pub fn new(spec: &TokenizerSpec, members: &Members) -> Result<Self, MergeError> {
        let base = members.base.unwrap_or(0);
        let donor = match &spec.source {
            VocabularySource::Union | VocabularySource::Base => base,
            VocabularySource::Model(model) => (members.find)(model).unwrap_or(base),
        };
        let mut files = Vec::new();
        for source in members.sources {
            files.push(TokenizerFile::read(source)?);
        }
        // A model without a tokenizer counts as having the base's.
        let of_base = files[base].clone();
        let files: Vec<TokenizerFile> = files
            .into_iter()
            .zip(members.sources)
            .map(|(f, source)| f.or_else(|| of_base.clone().map(|b| b.with_rows_of(source))))
            .collect::<Option<_>>()
            .ok_or_else(|| no_tokenizer(spec, members.sources[base]))?;
        let mut output = files[donor].clone();
        if let VocabularySource::Base = spec.source {
            output.strip();
        }
        if let VocabularySource::Union = spec.source {
            let others = || (0..members.count).filter(|m| *m != donor).map(|m| &files[m]);
            others().for_each(|f| output.add_plain(f));
            others().for_each(|f| output.add_added(f));
        }
        for token in &spec.tokens {
            output.add_text(&token.text);
        }
        let texts = output.texts();
        let own: Vec<Vec<Option<u32>>> = files
            .iter()
            .map(|f| texts.iter().map(|t| t.as_deref().and_then(|t| f.row(t))).collect())
            .collect();
        let tokens = texts.len();
        let rows = spec.pad_to_multiple_of.map_or(tokens, |m| tokens.next_multiple_of(m));
        let mut fill: Vec<Fill> =
            (0..tokens).map(|j| by_rule(j, &own[..members.count], members.base)).collect();
        let mut force = vec![false; tokens];
        let by_text: HashMap<&str, usize> =
            texts.iter().enumerate().filter_map(|(j, t)| Some((t.as_deref()?, j))).collect();
        for token in &spec.tokens {
            let Some(&j) = by_text.get(token.text.as_str()) else { continue };
            force[j] = token.force;
            if let Some(row) = &token.source {
                fill[j] =
                    lent(row, &token.text, members, &files).map_err(|(expected, found)| {
                        let mut error = token.place.error("the source of the token cannot be used");
                        error.expected = Some(expected);
                        error.found = Some(found);
                        RecipeErrors(vec![error])
                    })?;
            }
        }
        let takes_part = |m: usize| m < members.count;
        Ok(Self {
            rows,
            rows_of: files.iter().map(TokenizerFile::rows).collect(),
            tokens,
            own: own
                .into_iter()
                .enumerate()
                .map(|(m, own)| takes_part(m).then(|| Arc::new(own)))
                .collect(),
            fill: Arc::new(fill),
            force: Arc::new(force),
            donor,
            files: if output.changed() {
                output.files(members.sources[donor])?
            } else {
                Vec::new()
            },
        })
    }

    /// Rows of the vocabulary of an opened model.
    pub fn rows_of(&self, model: usize) -> usize {
        self.rows_of[model]
    }

    /// `weight`, whose first axis are the rows of the vocabulary of `model`, with the rows of this vocabulary.
    ///
    /// * `lenders`: the same tensor of every opened model, for rows that `model` lacks
    pub fn map(
        &self,
        model: usize,
        weight: WeightRef,
        lenders: Arc<Vec<Option<WeightRef>>>,
    ) -> WeightRef {
        let Some(own) = self.own.get(model).cloned().flatten() else { return weight };
        Arc::new(Mapped::new(
            weight,
            own,
            self.fill.clone(),
            self.force.clone(),
            lenders,
            [self.tokens, self.rows],
        ))
    }
}

/// The source of token `j` without a word in the recipe: the only model that has it, zeros where none has it, the base, or
/// the mean.
fn by_rule(j: usize, own: &[Vec<Option<u32>>], base: Option<usize>) -> Fill {
    let having: Vec<(usize, u32)> =
        own.iter().enumerate().filter_map(|(m, rows)| Some((m, rows[j]?))).collect();
    match having.as_slice() {
        [] => Fill::Zero,
        [(m, row)] => Fill::Row(*m, *row),
        many => match many.iter().find(|(m, _)| Some(*m) == base) {
            Some((m, row)) => Fill::Row(*m, *row),
            None => Fill::Mean(having),
        },
    }
}

/// The row that the recipe names, or what was expected and found.
fn lent(
    row: &RowSpec,
    text: &str,
    members: &Members,
    files: &[TokenizerFile],
) -> Result<Fill, (String, String)> {
    let (spec, wanted) = match row {
        RowSpec::Zero => return Ok(Fill::Zero),
        RowSpec::Model(spec) => (spec, Ok(text)),
        RowSpec::Token(spec, token) => (spec, Ok(token.as_str())),
        RowSpec::Id(spec, id) => (spec, Err(*id)),
    };
    let unknown = || (format!("`{spec}` to be a model"), "a model that was not opened".to_owned());
    let model = (members.find)(spec).ok_or_else(unknown)?;
    let file = &files[model];
    match wanted {
        Ok(token) => file.row(token).map(|r| Fill::Row(model, r)).ok_or_else(|| {
            (format!("a token of `{spec}`"), format!("`{token}`, which its vocabulary lacks"))
        }),
        Err(id) if id < file.rows() => Ok(Fill::Row(model, id as u32)),
        Err(id) => Err((format!("a number below {}", file.rows()), format!("{id}"))),
    }
}

fn no_tokenizer(spec: &TokenizerSpec, base: &Source) -> MergeError {
    let mut error = spec.place.error("there is no tokenizer to start from");
    error.expected = Some("a `tokenizer.json` in the base model".into());
    error.found = Some(format!("none in `{}`", base.label));
    RecipeErrors(vec![error]).into()
}

/// Whether the first axis of a tensor counts tokens.
pub(crate) fn has_vocabulary_axis(name: &str, shape: &[usize], rows: usize) -> bool {
    const PARTS: &[&str] = &[
        "embed_tokens",
        "lm_head",
        "proj_out",
        "shared",
        "wte",
        "word_embeddings",
        "embed_in",
        "embed_out",
        "tok_embeddings",
    ];
    shape.first() == Some(&rows) && PARTS.iter().any(|p| name.split('.').any(|part| part == *p))
}
