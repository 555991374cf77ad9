//! Where the parts of an adapter go in its base.

use std::sync::Arc;

use crate::error::CheckpointError;
use crate::source::Source;
use crate::weight::{OwnedWeight, Update, Updated, Weight, WeightRef};

use super::config::{AdapterConfig, TokenIndices};
use super::experts::Packed;
use super::file::{AdapterFile, Full, Parts, Stored};
use super::keys::spellings;
use super::weight::{Dora, Factor, LowRank, NormAxis, Recast, ReplacedRows};

/// Families whose linear layers are stored `[in, out]`, and the names of these layers.
const CONV1D_MODELS: &[&str] = &["gpt2", "openai-gpt", "imagegpt", "decision_transformer"];
const CONV1D_LAYERS: &[&str] = &["c_attn", "q_attn", "c_proj", "c_fc"];

/// An adapter on its way onto a base.
pub(super) struct Applied<'a> {
    pub source: Source,
    pub config: &'a AdapterConfig,
    pub file: &'a AdapterFile,
    /// Keys of the adapter that found no place.
    pub leftover: Vec<String>,
    /// The input embedding, if the base has one.
    embedding: Option<String>,
    /// Whether the head is the embedding.
    tied: bool,
}

/// A pair of factors and the weight they belong to.
struct Pair<'a> {
    /// The module by its name in the adapter.
    module: &'a str,
    /// The weight by its name in the base.
    target: &'a str,
    a: &'a Stored,
    b: &'a Stored,
}

impl<'a> Applied<'a> {
    /// Starts with nothing applied.
    pub fn new(source: Source, config: &'a AdapterConfig, file: &'a AdapterFile) -> Self {
        let embedding = ["embed_tokens.weight", "wte.weight"]
            .iter()
            .find_map(|end| source.tensors.keys().find(|name| name.ends_with(end)).cloned());
        let has_head = source.tensors.contains_key("lm_head.weight");
        let tied = embedding.is_some()
            && (!has_head || source.config.bool("tie_word_embeddings") == Some(true));
        Self { source, config, file, leftover: file.unknown.clone(), embedding, tied }
    }

    /// Puts everything in the file where it belongs.
    pub fn all(&mut self) -> Result<(), CheckpointError> {
        for key in &self.config.unknown {
            self.note(format!("`{key}` of the adapter configuration is not known and was ignored"));
        }
        // Replacements first: factors of an embedding belong to the copy stored with them.
        for full in &self.file.full {
            self.replace(full)?;
        }
        let mut packed = Vec::new();
        for (module, parts) in &self.file.modules {
            let (bare, nested) = match module.strip_suffix(".base_layer") {
                Some(bare) => (bare, true),
                None => (module.as_str(), false),
            };
            match self.resolve(&format!("{bare}.weight")).filter(|_| !nested) {
                Some(target) => self.module(module, &target, parts)?,
                None => match Packed::new(self, bare, nested, parts)? {
                    Some(experts) => packed.push(experts),
                    None => self.leftover.extend(parts.keys().cloned()),
                },
            }
        }
        self.packed(packed)
    }

    /// The source, or the list of what found no place.
    pub fn finish(mut self) -> Result<Source, CheckpointError> {
        if !self.leftover.is_empty() {
            return Err(self.leftovers());
        }
        self.report_missing();
        if let Some(embedding) = self.embedding.as_ref().filter(|_| self.tied)
            && self.source.tensors.contains_key("lm_head.weight")
        {
            let shared = self.source.tensors[embedding].clone();
            self.source.tensors.insert("lm_head.weight".into(), shared);
        }
        Ok(self.source)
    }

    fn leftovers(mut self) -> CheckpointError {
        const SHOWN: usize = 8;
        self.leftover.sort();
        let mut found: Vec<String> =
            self.leftover.iter().take(SHOWN).map(|k| format!("`{k}`")).collect();
        if self.leftover.len() > SHOWN {
            found.push(format!("{} more", self.leftover.len() - SHOWN));
        }
        CheckpointError::Malformed {
            what: format!(
                "{} tensors of the adapter have no place in the base",
                self.leftover.len()
            ),
            file: self.file.path.clone(),
            tensor: self.leftover.first().cloned(),
            expected: format!("modules of `{}`", self.source.label),
            found: found.join(", "),
            hint: Some(match &self.config.base_model {
                Some(base) => format!("the adapter was trained on `{base}`"),
                None => "take the base that the adapter was trained on".into(),
            }),
        }
    }

    /// Parts that the configuration promises and the file does not have.
    fn report_missing(&mut self) {
        for saved in &self.config.modules_to_save {
            let part = format!(".{saved}.");
            if !self.file.full.iter().any(|f| format!(".{}", f.tensor).contains(&part)) {
                self.note(format!(
                    "`modules_to_save` names `{saved}`, but the adapter has no such tensor"
                ));
            }
        }
    }

    /// Adds a note once.
    pub fn note(&mut self, note: String) {
        if !self.source.notes.contains(&note) {
            self.source.notes.push(note);
        }
    }

    /// The base's name for the tensor `name`; a tied head is the embedding.
    pub fn resolve(&self, name: &str) -> Option<String> {
        let names = spellings(name);
        if self.tied && names.iter().any(|n| n == "lm_head.weight") {
            return self.embedding.clone();
        }
        names.into_iter().find(|n| self.source.tensors.contains_key(n))
    }

    fn is_vocabulary(&self, target: &str) -> bool {
        target == "lm_head.weight" || Some(target) == self.embedding.as_deref()
    }

    fn replace(&mut self, full: &'a Full) -> Result<(), CheckpointError> {
        let (key, stored) = &full.stored;
        let own_head = full.tensor == "lm_head.weight" && self.tied && !full.under_lora;
        let Some(target) = self.resolve(&full.tensor) else {
            self.leftover.push(key.clone());
            return Ok(());
        };
        let base = self.source.tensors[&target].clone();
        if base.shape() != stored.shape() {
            let vocabulary = self.is_vocabulary(&target)
                && matches!((base.shape(), stored.shape()), ([_, b], [_, s]) if b == s);
            return Err(match vocabulary {
                true => self.other_vocabulary(key, stored.shape()[0], base.shape()[0]),
                false => self.misfit(key, stored.shape(), base.shape(), &target),
            });
        }
        let new: WeightRef = match stored.dtype() == base.dtype() {
            true => stored.clone(),
            false => Arc::new(Recast { inner: stored.clone(), dtype: base.dtype() }),
        };
        if own_head {
            return self.untie(stored, new);
        }
        self.changes_tied_head(&target);
        self.source.tensors.insert(target, new);
        Ok(())
    }

    /// A head saved beside tied embeddings: the same numbers stay one tensor, others become a head of its own.
    fn untie(
        &mut self,
        stored: &Arc<crate::weight::MappedWeight>,
        new: WeightRef,
    ) -> Result<(), CheckpointError> {
        let embedding = self.file.full.iter().find(|f| {
            Some(f.tensor.as_str()) == self.embedding.as_deref()
                || self.resolve(&f.tensor) == self.embedding && f.tensor != "lm_head.weight"
        });
        if embedding.is_some_and(|f| f.stored.1.bytes() == stored.bytes()) {
            return Ok(());
        }
        self.tied = false;
        self.source.tensors.insert("lm_head.weight".into(), new);
        self.source.config.0.insert("tie_word_embeddings".into(), false.into());
        self.note("the adapter brings its own head: embeddings and head are no longer tied".into());
        Ok(())
    }

    fn changes_tied_head(&mut self, target: &str) {
        if self.tied && Some(target) == self.embedding.as_deref() {
            self.note(
                "the adapter changes the embedding, and the head with it: the two are tied, though they \
                 were not changed together in training"
                    .into(),
            );
        }
    }

    fn module(&mut self, module: &str, target: &str, parts: &Parts) -> Result<(), CheckpointError> {
        let linear = self.pair(module, target, &parts.a, &parts.b, "lora")?;
        let embedding =
            self.pair(module, target, &parts.embedding_a, &parts.embedding_b, "lora_embedding")?;
        if linear.is_none() && embedding.is_none() {
            let orphans = [&parts.magnitude, &parts.bias_b].into_iter().flatten();
            self.leftover.extend(orphans.map(|(key, _)| key.clone()));
        }
        if let Some(pair) = linear {
            self.linear(&pair, parts)?;
        }
        if let Some(pair) = embedding {
            self.leftover.extend(parts.bias_b.iter().map(|(key, _)| key.clone()));
            self.embedding_pair(&pair, parts)?;
        }
        if let Some(tokens) = &parts.tokens {
            self.tokens(module, target, tokens)?;
        }
        Ok(())
    }

    fn pair<'p>(
        &self,
        module: &'p str,
        target: &'p str,
        a: &'p Option<Stored>,
        b: &'p Option<Stored>,
        what: &str,
    ) -> Result<Option<Pair<'p>>, CheckpointError> {
        let lone = |other: &Stored, missing: char| CheckpointError::MissingTensor {
            file: self.file.path.clone(),
            tensor: format!("{module}.{what}_{missing}"),
            nearest: Some(other.0.clone()),
        };
        match (a, b) {
            (Some(a), Some(b)) => Ok(Some(Pair { module, target, a, b })),
            (Some(a), None) => Err(lone(a, 'B')),
            (None, Some(b)) => Err(lone(b, 'A')),
            (None, None) => Ok(None),
        }
    }

    /// The name under which PEFT looks a module up in the patterns: with the parameter's name where that was the target.
    fn pattern_name(&self, module: &str) -> String {
        let parameter = format!("{module}.weight");
        match self.config.target_parameters.iter().any(|p| parameter.ends_with(p.as_str())) {
            true => parameter,
            false => module.to_owned(),
        }
    }

    /// Checks the rank of `A` `[rank · experts, _]` and `B` `[_, rank · experts]`, and gives it with the scale.
    pub fn rank_and_scale(
        &self,
        name: &str,
        a: &Stored,
        b: &Stored,
        experts: usize,
    ) -> Result<(usize, f32), CheckpointError> {
        let expected = self.config.rank_of(name)?;
        for (stored, axis, form) in [(a, 0, "in"), (b, 1, "out")] {
            let shape = stored.1.shape();
            if shape.len() == 2
                && Some(shape[axis]) == expected.checked_mul(experts)
                && !shape.contains(&0)
            {
                continue;
            }
            let rank = match experts {
                1 => expected.to_string(),
                _ => format!("{expected}·{experts}"),
            };
            return Err(CheckpointError::Malformed {
                what: "rank of the adapter's tensor disagrees with its configuration".into(),
                file: self.file.path.clone(),
                tensor: Some(stored.0.clone()),
                expected: match axis {
                    0 => format!("[{rank}, {form}] (`r` or `rank_pattern` of adapter_config.json)"),
                    _ => format!("[{form}, {rank}] (`r` or `rank_pattern` of adapter_config.json)"),
                },
                found: format!("{shape:?}"),
                hint: Some("take configuration and weights from the same save".into()),
            });
        }
        Ok((expected, self.config.scale(name, expected)?))
    }

    fn linear(&mut self, pair: &Pair, parts: &Parts) -> Result<(), CheckpointError> {
        let name = self.pattern_name(pair.module);
        let (_, scale) = self.rank_and_scale(&name, pair.a, pair.b, 1)?;
        let (a, b) = (Factor::new(&pair.a.1), Factor::new(&pair.b.1));
        let (inputs, outputs) = (a.cols, b.rows);
        let base = self.source.tensors[pair.target].clone();
        let transposed = match *base.shape() {
            [rows, cols] if rows == cols => self.stored_transposed(pair),
            [rows, cols] => [rows, cols] == [inputs, outputs] && self.may_be_transposed(pair),
            _ => false,
        };
        if transposed {
            let delta = LowRank::new(a.transposed(), b.transposed(), scale);
            self.add(pair, delta, NormAxis::Column, parts)?;
        } else {
            self.add(pair, LowRank::new(b, a, scale), NormAxis::Row, parts)?;
        }
        self.lora_bias(pair, parts, scale)
    }

    fn may_be_transposed(&self, pair: &Pair) -> bool {
        self.config.fan_in_fan_out || self.is_conv1d(pair)
    }

    fn is_conv1d(&self, pair: &Pair) -> bool {
        CONV1D_MODELS.contains(&self.source.config.model_type())
            && pair.module.rsplit('.').next().is_some_and(|m| CONV1D_LAYERS.contains(&m))
    }

    /// Of a square weight the shape does not say; PEFT goes by the kind of layer, whatever the flag is.
    fn stored_transposed(&mut self, pair: &Pair) -> bool {
        let conv1d = self.is_conv1d(pair);
        if self.config.fan_in_fan_out && !conv1d {
            self.note(
                "`fan_in_fan_out` is set, but the base stores its linear layers [out, in]: ignored, as PEFT does"
                    .into(),
            );
        }
        conv1d
    }

    fn embedding_pair(&mut self, pair: &Pair, parts: &Parts) -> Result<(), CheckpointError> {
        let name = self.pattern_name(pair.module);
        let (_, scale) = self.rank_and_scale(&name, pair.a, pair.b, 1)?;
        let (a, b) = (Factor::new(&pair.a.1), Factor::new(&pair.b.1));
        let delta = LowRank::new(a.transposed(), b.transposed(), scale);
        self.add(pair, delta, NormAxis::Column, parts)
    }

    /// Puts `delta` (and the magnitudes of DoRA) on the target.
    fn add(
        &mut self,
        pair: &Pair,
        delta: LowRank,
        axis: NormAxis,
        parts: &Parts,
    ) -> Result<(), CheckpointError> {
        let base = self.source.tensors[pair.target].clone();
        if base.shape() != delta.shape() {
            return Err(self.delta_misfit(pair, &delta, base.shape()));
        }
        let magnitude =
            self.magnitude(pair, parts, delta.shape()[usize::from(axis == NormAxis::Column)])?;
        if delta.scale == 0.0 && magnitude.is_none() {
            return Ok(());
        }
        self.changes_tied_head(pair.target);
        let sum = Updated::new(base, 0, delta);
        let weight: WeightRef = match magnitude {
            Some(magnitude) => Arc::new(Dora::new(sum, magnitude, axis)),
            None => Arc::new(sum),
        };
        self.source.tensors.insert(pair.target.to_owned(), weight);
        Ok(())
    }

    fn magnitude(
        &self,
        pair: &Pair,
        parts: &Parts,
        length: usize,
    ) -> Result<Option<Vec<f32>>, CheckpointError> {
        match (&parts.magnitude, self.config.dora) {
            (None, false) => Ok(None),
            (None, true) => Err(CheckpointError::MissingTensor {
                file: self.file.path.clone(),
                tensor: format!("{}.lora_magnitude_vector", pair.module),
                nearest: Some(pair.a.0.clone()),
            }),
            (Some((key, _)), false) => Err(CheckpointError::Malformed {
                what: "adapter has a DoRA magnitude, but its configuration does not say `use_dora`"
                    .into(),
                file: self.file.path.clone(),
                tensor: Some(key.clone()),
                expected: "no magnitude vector".into(),
                found: "a magnitude vector".into(),
                hint: Some("take configuration and weights from the same save".into()),
            }),
            (Some((key, stored)), true) => {
                // PEFT before 0.9 wrote it with one axis more for some layers.
                let weight: &dyn Weight = stored.as_ref();
                match weight.len() == length {
                    true => Ok(Some(weight.to_f32()?)),
                    false => Err(self.misfit(key, stored.shape(), &[length], pair.target)),
                }
            }
        }
    }

    fn lora_bias(&mut self, pair: &Pair, parts: &Parts, scale: f32) -> Result<(), CheckpointError> {
        let Some((key, stored)) = &parts.bias_b else { return Ok(()) };
        if !self.config.lora_bias {
            self.leftover.push(key.clone());
            return Ok(());
        }
        let name = match pair.target.strip_suffix(".weight") {
            Some(module) => format!("{module}.bias"),
            None => format!("{}.bias", pair.target),
        };
        let Some(base) = self.source.tensors.get(&name) else {
            return Err(CheckpointError::Unsupported {
                what: format!("adapter changes the bias `{name}`, which the base does not have"),
                file: self.file.path.clone(),
                hint: "train the adapter with `lora_bias: false`, or take a base with biases"
                    .into(),
            });
        };
        if base.shape() != stored.shape() {
            return Err(self.misfit(key, stored.shape(), base.shape(), &name));
        }
        if scale != 0.0 {
            let mut values = base.to_f32()?;
            let added = (stored.as_ref() as &dyn Weight).to_f32()?;
            values.iter_mut().zip(&added).for_each(|(v, b)| *v += scale * b);
            let bias = OwnedWeight::from_f32(&name, &values, base.shape(), base.dtype());
            self.source.tensors.insert(name, Arc::new(bias));
        }
        Ok(())
    }

    fn tokens(
        &mut self,
        module: &str,
        target: &str,
        tokens: &Stored,
    ) -> Result<(), CheckpointError> {
        let (key, stored) = tokens;
        let indices = match &self.config.token_indices {
            Some(TokenIndices::Embedding(list)) if Some(target) == self.embedding.as_deref() => {
                Some(list)
            }
            Some(TokenIndices::ByModule(map)) => map
                .iter()
                .find(|(name, _)| module == *name || module.ends_with(&format!(".{name}")))
                .map(|(_, list)| list),
            _ => None,
        };
        let malformed = |expected: String, found: String| CheckpointError::Malformed {
            what: "trained tokens and `trainable_token_indices` do not fit".into(),
            file: self.file.path.clone(),
            tensor: Some(key.clone()),
            expected,
            found,
            hint: Some("take configuration and weights from the same save".into()),
        };
        let Some(indices) = indices else {
            let expected = format!("token ids for `{module}` in adapter_config.json");
            return Err(malformed(expected, "none".into()));
        };
        let base = self.source.tensors[target].clone();
        let (vocabulary, width) = (base.rows(), base.cols());
        if stored.shape() != [indices.len(), width] {
            let expected = format!("[{}, {width}] (token ids, width of `{target}`)", indices.len());
            return Err(malformed(expected, format!("{:?}", stored.shape())));
        }
        let mut rows: Vec<(usize, usize)> =
            indices.iter().enumerate().map(|(from, row)| (*row, from)).collect();
        rows.sort_unstable();
        if let Some((row, _)) = rows.iter().find(|(row, _)| *row >= vocabulary) {
            return Err(malformed(format!("token ids below {vocabulary}"), format!("{row}")));
        }
        if let Some(pair) = rows.windows(2).find(|w| w[0].0 == w[1].0) {
            return Err(malformed("each token id once".into(), format!("{} twice", pair[0].0)));
        }
        self.changes_tied_head(target);
        let replaced = ReplacedRows { base, rows, values: Factor::new(stored) };
        self.source.tensors.insert(target.to_owned(), Arc::new(replaced));
        Ok(())
    }

    /// The pair's product has another shape than the weight.
    fn delta_misfit(&self, pair: &Pair, delta: &LowRank, base: &[usize]) -> CheckpointError {
        let found = delta.shape();
        if self.is_vocabulary(pair.target) && base.len() == 2 && base[1] == found[1] {
            let (key, _) = if pair.a.1.shape()[1] == found[0] { pair.a } else { pair.b };
            return self.other_vocabulary(key, found[0], base[0]);
        }
        CheckpointError::Malformed {
            what: "adapter does not fit the base".into(),
            file: self.file.path.clone(),
            tensor: Some(pair.a.0.clone()),
            expected: format!("factors of {base:?}, the shape of `{}`", pair.target),
            found: format!(
                "factors of {found:?}: A {:?}, B {:?}",
                pair.a.1.shape(),
                pair.b.1.shape()
            ),
            hint: self.base_hint(),
        }
    }

    pub fn misfit(
        &self,
        key: &str,
        found: &[usize],
        expected: &[usize],
        target: &str,
    ) -> CheckpointError {
        CheckpointError::Shape {
            file: self.file.path.clone(),
            tensor: key.to_owned(),
            expected: format!("{expected:?} (as `{target}` of the base needs it)"),
            found: found.to_vec(),
        }
    }

    fn other_vocabulary(&self, key: &str, found: usize, base: usize) -> CheckpointError {
        CheckpointError::Malformed {
            what: "adapter belongs to another vocabulary than the base".into(),
            file: self.file.path.clone(),
            tensor: Some(key.to_owned()),
            expected: format!("{base} tokens, as in the base"),
            found: format!("{found} tokens"),
            hint: self.base_hint(),
        }
    }

    pub fn base_hint(&self) -> Option<String> {
        self.config.base_model.as_ref().map(|base| format!("the adapter was trained on `{base}`"))
    }
}
