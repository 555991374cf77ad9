//! Text of the domains that a model knows: what it is held to, and what it is looked at with.

use std::collections::BTreeMap;

use moe_merge_kernels::Exec;
use moe_merge_merge::documents::Encoder;
use moe_merge_merge::expert_texts;
use moe_merge_merge::gates::TokenPrompts;
use moe_merge_model::expert_training::{Damping, Drawn, Factors, Lesson, Part, Route, Trainee};

use super::Finetune;
use super::domains::{self, Domain, DomainReport};
use super::error::FinetuneError;
use super::options::KEEP;
use super::train::{Kept, Penalty};

/// Tokens of each domain on which a model is to stay as it was.
const KEPT: usize = 20_000;

/// Tokens of such text that go into a step: with fewer the pull back is too noisy, which costs more of what is learnt than
/// the time it saves. Small batches take twice their own size.
const ENOUGH: usize = 2048;

impl Finetune {
    /// Weight of what holds the model to what it said before.
    pub(super) fn keep(&self) -> f64 {
        let default = if self.expert().is_some() { KEEP } else { 0.0 };
        self.options.keep.unwrap_or(default)
    }

    /// The model as it was, and text on which it is to stay so.
    pub(super) fn kept(
        &self,
        encoder: &Encoder<'_>,
        notes: &mut Vec<String>,
    ) -> Result<Option<Kept>, FinetuneError> {
        let o = &self.options;
        if self.keep() == 0.0 {
            return Ok(None);
        }
        let known = match o.keep_data.is_empty() {
            true => self.remembered(encoder)?,
            false => self.named(encoder)?,
        };
        if known.is_empty() && o.keep.is_none() {
            notes.push(
                "nothing holds other domains where they are: no prompts in the model's folder, and no expert that can write some; `--keep-data FILE...` names text"
                    .into(),
            );
            return Ok(None);
        }
        if known.is_empty() {
            return Err(FinetuneError::Option {
                name: "--keep",
                expected: "text of the domains that the model knows".into(),
                found: "no prompts in the model's folder, and no expert that can write some".into(),
                hint: Some("name files with `--keep-data FILE...`".into()),
            });
        }
        let tokens = o.training.batch_tokens;
        let batches = domains::mixed(&known, tokens.max(ENOUGH.min(2 * tokens)));
        let model = self.open(&self.source, self.number(), Route::Natural, o.exec, notes)?;
        let sample: Vec<&Lesson> = batches.iter().take(1).flatten().collect();
        let interrupted = &mut || o.interrupt.check().is_err();
        let damping = Damping::new(&model, self.plan.layers.clone(), &sample, interrupted)?;
        Ok(Some(Kept { model, batches, weight: self.keep(), damping, said: BTreeMap::new() }))
    }

    /// What keeps the expert's rows of the routers from drawing tokens of other domains: their text is that of `--keep-data`,
    /// or else the prompts that the MoE was built with, without the expert's own.
    pub(super) fn penalty(
        &self,
        encoder: &Encoder<'_>,
        trainee: &Trainee,
        factors: &Factors,
    ) -> Result<Option<Penalty>, FinetuneError> {
        let o = &self.options;
        if o.router_penalty == 0.0 || !o.parts.contains(&Part::Router) {
            return Ok(None);
        }
        let mut others = match o.keep_data.is_empty() {
            true => domains::stored(&self.source.path, encoder, &self.names, KEPT).0,
            false => self.named(encoder)?,
        };
        others.retain(|domain| Some(domain.name.as_str()) != self.expert());
        if others.is_empty() {
            return Err(FinetuneError::Option {
                name: "--train-router",
                expected: "text of other domains, whose tokens the expert is not to draw".into(),
                found: "no prompts of other experts in the model's folder".into(),
                hint: Some(
                    "name files with `--keep-data FILE...`, or go without: `--router-penalty 0`"
                        .into(),
                ),
            });
        }
        let batches = domains::mixed(&others, o.training.batch_tokens);
        let interrupted = &mut || o.interrupt.check().is_err();
        let drawn = Drawn::new(trainee, factors, &batches, interrupted)?;
        Ok(Some(Penalty { drawn, weight: o.router_penalty }))
    }

    /// The text of `--keep-data`.
    fn named(&self, encoder: &Encoder<'_>) -> Result<Vec<Domain>, FinetuneError> {
        let o = &self.options;
        let named = o.keep_data.iter().map(|f| (f.display().to_string(), f.clone()));
        let files: Vec<_> = named.collect();
        domains::from_files(&files, encoder, self.window, KEPT, &o.interrupt)
    }

    /// The prompts that the MoE was built with, and what its experts write themselves.
    fn remembered(&self, encoder: &Encoder<'_>) -> Result<Vec<Domain>, FinetuneError> {
        let o = &self.options;
        let (stored, _) = domains::prompts(&self.source.path, encoder, &self.names, KEPT);
        let lead = usize::from(encoder.tokenizer().bos().is_some());
        let mut texts: Vec<(String, Vec<Vec<u32>>)> =
            stored.iter().map(|(name, p)| (name.clone(), p.positive.clone())).collect();
        let prompts: Vec<TokenPrompts> = stored.into_iter().map(|(_, p)| p).collect();
        if o.keep_text > 0 {
            let (tokenizer, amount) = (encoder.tokenizer(), (o.keep_text, o.training.seed));
            let written = expert_texts(&self.source, &prompts, tokenizer, amount, &o.interrupt)?;
            texts.resize(self.names.len(), Default::default());
            for ((_, known), more) in texts.iter_mut().zip(written.unwrap_or_default()) {
                known.extend(more);
            }
        }
        Ok(domains::of_texts(texts, lead, KEPT))
    }

    pub(super) fn domains(
        &self,
        encoder: &Encoder<'_>,
        factors: &Factors,
        notes: &mut Vec<String>,
    ) -> Result<Vec<DomainReport>, FinetuneError> {
        let interrupt = &self.options.interrupt;
        let tokens = self.options.evaluation_tokens;
        let (domains, note) = match self.options.evaluation.is_empty() {
            true => domains::stored(&self.source.path, encoder, &self.names, tokens),
            false => {
                let files = &self.options.evaluation;
                (domains::from_files(files, encoder, self.window, tokens, interrupt)?, None)
            }
        };
        notes.extend(note);
        if domains.is_empty() {
            return Ok(Vec::new());
        }
        // Exact products: a change of a percent is to be seen.
        let exec = Exec::default();
        let model = self.open(&self.source, self.number(), Route::Natural, exec, notes)?;
        domains::compare(&model, factors, &domains, interrupt)
    }
}
