//! A model with its own weights and the vocabulary of another: rows for tokens that it has, the others made from them.

mod keys;
mod omp;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{
    CheckpointError, Replace, SideContent, SideFile, Source, Staging, WeightRef,
};
use moe_merge_model::Tokenizer;
use serde::Serialize;
use serde_json::Value;

use crate::error::MergeError;
use crate::write::{Provenance, write_dense};
use keys::{Key, Keys};

/// How rows for tokens that the model does not have are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Approximation {
    /// As the sum of few shared rows that comes nearest to the donor's row, with the model's own rows for them.
    Omp {
        /// Shared rows in a sum, at most.
        k: usize,
    },
    /// The mean of the rows of the pieces that the model's own tokenizer cuts the token's text into.
    Subword,
    /// The mean of all rows of the model.
    Mean,
    /// Zeros.
    Zero,
}

/// What is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SurgeryOptions {
    /// For tokens that the model does not have.
    pub approximation: Approximation,
    /// Whether `<0x41>` in one vocabulary is `A` in the other.
    pub byte_match: bool,
}

/// What was made.
#[derive(Debug, Clone, Serialize)]
pub struct SurgeryReport {
    /// The folder.
    pub output: PathBuf,
    /// Bytes of its files.
    pub bytes: u64,
    /// Rows of the new vocabulary.
    pub rows: usize,
    /// Tokens whose row is the model's own.
    pub shared: usize,
    /// Tokens whose row was made.
    pub made: usize,
    /// Rows without a token: the mean of all rows.
    pub padding: usize,
    /// Mean of what the sums leave of the donor's rows, as a share of their length, by tensor.
    pub left: Vec<(String, f64)>,
    /// Seconds it took.
    pub seconds: f64,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// A model that is to get another vocabulary, and where the rows come from.
#[derive(Debug)]
pub struct Surgery {
    model: Source,
    donor: Source,
    own_tokenizer: Tokenizer,
    /// For each row of the donor.
    rows: Vec<Row>,
    options: SurgeryOptions,
    started: Instant,
}

/// Where a row comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Row {
    /// The model's own row of this number.
    Own(usize),
    /// It has to be made, for this token.
    New(Key),
    /// No token.
    Padding,
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Files that belong to a tokenizer.
const TOKENIZER_FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// Ids that a configuration has for special tokens.
const TOKEN_IDS: &[&str] = &["bos_token_id", "eos_token_id", "pad_token_id"];

impl Surgery {
    /// Compares the vocabularies. No weight is read.
    ///
    /// # Errors
    /// [`MergeError::Text`] and [`MergeError::Checkpoint`] for tokenizers and embeddings that cannot be used,
    /// [`MergeError::Argument`] if the two vocabularies have nothing in common, or for a `k` of 0.
    pub fn prepare(
        model: &Source,
        donor: &Source,
        options: SurgeryOptions,
    ) -> Result<Self, MergeError> {
        if options.approximation == (Approximation::Omp { k: 0 }) {
            return Err(MergeError::Argument {
                what: "`--k` is out of range".into(),
                name: "--k".into(),
                expected: "1 or more".into(),
                found: "0".into(),
                hint: None,
            });
        }
        let rows = donor.weight(EMBEDDING)?.rows();
        let own_rows = model.weight(EMBEDDING)?.rows();
        let (own_tokenizer, tokenizer) =
            (Tokenizer::from_source(model)?, Tokenizer::from_source(donor)?);
        let own = Keys::of(model, &own_tokenizer, own_rows)?;
        let theirs = Keys::of(donor, &tokenizer, rows)?;
        let row = |id: u32| match theirs.by_id.get(&id) {
            None => Row::Padding,
            Some(key) => match own.find(key, options.byte_match) {
                Some(id) => Row::Own(id as usize),
                None => Row::New(key.clone()),
            },
        };
        let rows: Vec<Row> = (0..rows as u32).map(row).collect();
        if !rows.iter().any(|r| matches!(r, Row::Own(_))) {
            return Err(MergeError::Argument {
                what: "the two vocabularies have no token in common".into(),
                name: "MODEL DONOR".into(),
                expected: "some tokens of the same text".into(),
                found: format!("{} and {} tokens", own.by_id.len(), theirs.by_id.len()),
                hint: None,
            });
        }
        model.computable()?;
        let (model, donor) = (model.clone(), donor.clone());
        Ok(Self { model, donor, own_tokenizer, rows, options, started: Instant::now() })
    }

    fn count(&self, wanted: fn(&Row) -> bool) -> usize {
        self.rows.iter().filter(|r| wanted(r)).count()
    }

    /// Rows that have to be made, in all tensors: what the progress of [`Surgery::run`] counts first.
    pub fn made(&self) -> u64 {
        let tensors = if self.has_head() { 2 } else { 1 };
        tensors * self.count(|r| matches!(r, Row::New(_))) as u64
    }

    fn has_head(&self) -> bool {
        self.model.tensors.contains_key(HEAD)
            && self.model.config.bool("tie_word_embeddings") != Some(true)
    }

    /// Makes the rows and writes the model to `out`.
    ///
    /// # Errors
    /// [`MergeError`]; then there is no output.
    pub fn run(
        self,
        out: &Path,
        replace: Replace,
        made: &(dyn Fn(u64) + Sync),
        watch: Watch<'_>,
    ) -> Result<SurgeryReport, MergeError> {
        let staging = Staging::new(out, replace)?;
        let making = Watch { progress: made, ..watch };
        let mut left = Vec::new();
        let mut source = self.model.clone();
        let names: &[&str] = if self.has_head() { &[EMBEDDING, HEAD] } else { &[EMBEDDING] };
        for name in names {
            let own = self.model.weight(name)?.clone();
            let donor =
                self.donor.tensors.get(*name).map_or_else(|| self.donor.weight(EMBEDDING), Ok)?;
            let expected = [self.rows.len(), donor.cols()];
            donor.expect_shape(&expected, "one row for each row of the donor's embedding")?;
            let (weight, rest) = self.rows_of(name, &own, donor, making)?;
            left.extend(rest.map(|r| ((*name).to_owned(), r)));
            source.tensors.insert((*name).to_owned(), weight);
        }
        if !self.has_head() {
            source.tensors.remove(HEAD);
        }
        self.configure(&mut source)?;
        let provenance = Provenance {
            name: out.file_name().map_or("model".into(), |n| n.to_string_lossy().into_owned()),
            title: Some("model with the vocabulary of another".into()),
            ..Provenance::default()
        };
        let inputs = [("model".to_owned(), &self.model), ("vocabulary".to_owned(), &self.donor)];
        let written = write_dense(&source, &inputs, None, &provenance, &staging, watch)?;
        staging.publish()?;
        Ok(SurgeryReport {
            output: out.to_owned(),
            bytes: written.bytes,
            rows: self.rows.len(),
            shared: self.count(|r| matches!(r, Row::Own(_))),
            made: self.count(|r| matches!(r, Row::New(_))),
            padding: self.count(|r| matches!(r, Row::Padding)),
            left,
            seconds: self.started.elapsed().as_secs_f64(),
            warnings: source.notes,
        })
    }

    /// The new matrix of embedding or head, `[donor's rows, width]`, and what sums leave of the donor's rows.
    fn rows_of(
        &self,
        name: &str,
        own: &WeightRef,
        donor: &WeightRef,
        watch: Watch<'_>,
    ) -> Result<(WeightRef, Option<f64>), MergeError> {
        let width = own.cols();
        let values = own.to_f32()?;
        let row = |i: usize| &values[i * width..(i + 1) * width];
        let mean = mean((0..own.rows()).map(row), width);
        let mut out = vec![0f32; self.rows.len() * width];
        for (to, from) in out.chunks_exact_mut(width.max(1)).zip(&self.rows) {
            match from {
                Row::Own(id) => to.copy_from_slice(row(*id)),
                Row::Padding => to.copy_from_slice(&mean),
                Row::New(_) => {}
            }
        }
        let mut left = None;
        match self.options.approximation {
            Approximation::Omp { k } => {
                left = self.sums(&mut out, &values, donor, width, k, watch)?;
            }
            Approximation::Zero => {}
            other => {
                for (to, from) in out.chunks_exact_mut(width.max(1)).zip(&self.rows) {
                    let Row::New(key) = from else { continue };
                    let pieces = match other {
                        Approximation::Subword => self.pieces(key)?,
                        _ => Vec::new(),
                    };
                    let pieces: Vec<usize> =
                        pieces.into_iter().filter(|p| *p < own.rows()).collect();
                    match pieces.is_empty() {
                        true => to.copy_from_slice(&mean),
                        false => {
                            to.copy_from_slice(&self::mean(pieces.into_iter().map(row), width));
                        }
                    }
                    (watch.progress)(1);
                }
            }
        }
        let shape = [self.rows.len(), width];
        let weight = OwnedWeight::from_f32(name, &out, &shape, own.dtype());
        Ok((Arc::new(weight), left))
    }

    /// Fills the rows that have to be made with sums of own rows.
    fn sums(
        &self,
        out: &mut [f32],
        own: &[f32],
        donor: &WeightRef,
        width: usize,
        k: usize,
        watch: Watch<'_>,
    ) -> Result<Option<f64>, MergeError> {
        let size = donor.cols();
        let theirs = donor.to_f32()?;
        let row = |i: usize| theirs[i * size..(i + 1) * size].to_vec();
        let shared: Vec<(usize, usize)> = self
            .rows
            .iter()
            .enumerate()
            .filter_map(|(i, r)| if let Row::Own(id) = r { Some((i, *id)) } else { None })
            .collect();
        let new: Vec<usize> =
            (0..self.rows.len()).filter(|i| matches!(self.rows[*i], Row::New(_))).collect();
        let dictionary: Vec<f32> = shared.iter().flat_map(|(i, _)| row(*i)).collect();
        let targets: Vec<f32> = new.iter().flat_map(|i| row(*i)).collect();
        drop(theirs);
        let stop = || watch.interrupt.check().is_err();
        let found = omp::pursue(&targets, &dictionary, size, k, &stop, watch.progress);
        watch.interrupt.check()?;
        let mut sum = 0.0;
        for (&i, (combination, left)) in new.iter().zip(&found) {
            let to = &mut out[i * width..(i + 1) * width];
            for &(at, c) in combination {
                let id = shared[at].1;
                let from = &own[id * width..(id + 1) * width];
                to.iter_mut().zip(from).for_each(|(t, f)| *t += c * f);
            }
            sum += left;
        }
        Ok((!new.is_empty()).then(|| sum / new.len() as f64))
    }

    /// Ids of the own tokens that a token's text is cut into.
    fn pieces(&self, key: &Key) -> Result<Vec<usize>, MergeError> {
        let text = match key {
            Key::Text(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            Key::Byte(byte) => char::from(*byte).to_string(),
            Key::Role(_) | Key::Special(_) => return Ok(Vec::new()),
        };
        Ok(self.own_tokenizer.encode(&text)?.into_iter().map(|id| id as usize).collect())
    }

    /// Tokenizer files and the ids of special tokens are the donor's.
    fn configure(&self, source: &mut Source) -> Result<(), MergeError> {
        source.config.0.insert("vocab_size".into(), self.rows.len().into());
        let of_donor = |key: &str| self.donor.config.get(key).cloned().unwrap_or(Value::Null);
        for key in TOKEN_IDS {
            source.config.0.insert((*key).into(), of_donor(key));
        }
        source.side.retain(|f| !TOKENIZER_FILES.contains(&f.name.as_str()));
        let tokenizer =
            self.donor.side.iter().filter(|f| TOKENIZER_FILES.contains(&f.name.as_str()));
        source.side.extend(tokenizer.cloned());
        let Some(file) = source.side.iter_mut().find(|f| f.name == "generation_config.json") else {
            return Ok(());
        };
        let donor = self.donor.side_file(&file.name).map(SideFile::read).transpose()?;
        let donor: Option<Value> = donor.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let malformed = |found: String| CheckpointError::Malformed {
            what: "generation settings are no JSON object".into(),
            file: self.model.path.join("generation_config.json"),
            tensor: None,
            expected: "a JSON object".into(),
            found,
            hint: None,
        };
        let mut settings = match serde_json::from_slice(&file.read()?) {
            Ok(Value::Object(map)) => map,
            Ok(_) => return Err(malformed("another kind of value".into()).into()),
            Err(e) => return Err(malformed(e.to_string()).into()),
        };
        for key in TOKEN_IDS {
            let value = donor.as_ref().and_then(|d| d.get(*key)).cloned().unwrap_or(of_donor(key));
            match value {
                Value::Null => settings.shift_remove(*key),
                id => settings.insert((*key).into(), id),
            };
        }
        let text = serde_json::to_string_pretty(&settings).unwrap_or_default() + "\n";
        file.content = SideContent::Bytes(text.into_bytes().into());
        Ok(())
    }
}

fn mean<'r>(rows: impl Iterator<Item = &'r [f32]>, width: usize) -> Vec<f32> {
    let (mut sum, mut count) = (vec![0f64; width], 0usize);
    for row in rows {
        sum.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(*v));
        count += 1;
    }
    sum.into_iter().map(|s| (s / count.max(1) as f64) as f32).collect()
}
