//! What a run is made of between two steps, and the file that keeps it.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

use moe_merge_checkpoint::CheckpointError;
use moe_merge_model::expert_training::optimise::{Moments, zeros};
use moe_merge_model::expert_training::{FactorPair, Factors, Part, TrainedFactors};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::FinetuneError;

/// A step that was made.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Which one, from 1.
    pub step: u64,
    /// Round through the data, from 1.
    pub epoch: u64,
    /// Loss before it, in nats per token that counts.
    pub loss: f64,
    /// Length of the gradient before it was clipped.
    pub gradient_norm: f64,
    /// Its learning rate.
    pub learning_rate: f64,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Of those that visited the expert, the share, mean over layers; 1 in a dense model.
    pub coverage: f64,
    /// Tokens per second; differs from run to run.
    pub tokens_per_second: f64,
}

/// A look at text that is not trained on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// Steps made before it.
    pub step: u64,
    /// Loss in nats per token that counts.
    pub loss: f64,
}

/// What the file says beside the numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Record {
    format: String,
    step: u64,
    round: u64,
    batch: usize,
    best_step: u64,
    scale: f32,
    pairs: Vec<PairRecord>,
    steps: Vec<StepRecord>,
    evaluations: Vec<EvaluationRecord>,
    begun: Value,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct PairRecord {
    layer: usize,
    part: Part,
    rank: usize,
    input: usize,
    output: usize,
    trained: TrainedFactors,
}

/// Name and version of the file's format.
const FORMAT: &str = "moe-merge finetune state 1";

/// All that a run needs to go on as if it had never stopped.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// Steps made.
    pub step: u64,
    /// Rounds through the data that are over.
    pub round: u64,
    /// Batches of this round that are used.
    pub batch: usize,
    /// The factors now.
    pub factors: Factors,
    /// Those with the least loss on held-out text; where none is held out, the last ones.
    pub best: Factors,
    /// The step that they are from.
    pub best_step: u64,
    /// Moving means of the gradients.
    pub first: Moments,
    /// Moving means of their squares.
    pub second: Moments,
    /// Steps made.
    pub steps: Vec<StepRecord>,
    /// Looks at held-out text.
    pub evaluations: Vec<EvaluationRecord>,
    /// What the run was begun with.
    pub begun: Value,
}

impl State {
    /// Before the first step.
    pub fn new(factors: Factors, begun: Value) -> Self {
        let (first, second) = (zeros(&factors), zeros(&factors));
        Self {
            step: 0,
            round: 0,
            batch: 0,
            best: factors.clone(),
            factors,
            best_step: 0,
            first,
            second,
            steps: Vec::new(),
            evaluations: Vec::new(),
            begun,
        }
    }

    /// Evaluations since the least loss.
    pub fn stale(&self) -> u64 {
        self.evaluations.iter().filter(|e| e.step > self.best_step).count() as u64
    }

    /// Notes a loss on held-out text, and the factors if it is the least.
    pub fn note(&mut self, loss: f64) {
        let least = self.evaluations.iter().map(|e| e.loss).fold(f64::INFINITY, f64::min);
        if loss < least {
            self.best = self.factors.clone();
            self.best_step = self.step;
        }
        self.evaluations.push(EvaluationRecord { step: self.step, loss });
    }

    /// Replaces `path` in one step.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], [`CheckpointError::NoRoom`] with the file.
    pub fn save(&self, path: &Path) -> Result<(), CheckpointError> {
        let failed = |e| CheckpointError::io("writing", path, e);
        let mut tensors: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut put = |name: String, values: &[f32]| {
            tensors.insert(name, values.iter().flat_map(|v| v.to_le_bytes()).collect());
        };
        for (at, pair) in &self.factors.pairs {
            let best = &self.best.pairs[at];
            let (first, second) = (&self.first[at], &self.second[at]);
            for (i, values) in [&pair.a, &pair.b].into_iter().enumerate() {
                put(key("factor", *at, i), values);
                put(key("best", *at, i), if i == 0 { &best.a } else { &best.b });
                put(key("first", *at, i), &first[i]);
                put(key("second", *at, i), &second[i]);
            }
        }
        let record = serde_json::to_string(&self.record()).map_err(|e| failed(e.into()))?;
        let views = tensors.iter().map(|(name, bytes)| {
            let view = TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes);
            // Four bytes a number, by construction.
            (name, view.expect("bytes fill their shape"))
        });
        let metadata = HashMap::from([("state".to_owned(), record)]);
        let bytes = safetensors::serialize(views, Some(metadata))
            .map_err(|e| failed(std::io::Error::other(e.to_string())))?;
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        file.write_all(&bytes).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
        file.persist(path).map_err(|e| failed(e.error))?;
        Ok(())
    }

    fn record(&self) -> Record {
        let pair = |(at, p): (&(usize, Part), &FactorPair)| PairRecord {
            layer: at.0,
            part: at.1,
            rank: p.rank,
            input: p.input,
            output: p.output,
            trained: p.trained,
        };
        Record {
            format: FORMAT.into(),
            step: self.step,
            round: self.round,
            batch: self.batch,
            best_step: self.best_step,
            scale: self.factors.scale,
            pairs: self.factors.pairs.iter().map(pair).collect(),
            steps: self.steps.clone(),
            evaluations: self.evaluations.clone(),
            begun: self.begun.clone(),
        }
    }

    /// Reads a state, which has to be one of a run that was begun as `begun` says.
    ///
    /// # Errors
    /// [`FinetuneError`]: a file that is none, or that of another run.
    pub fn load(path: &Path, begun: &Value) -> Result<Self, FinetuneError> {
        let bytes = std::fs::read(path).map_err(|e| CheckpointError::io("reading", path, e))?;
        let malformed = |found: String| CheckpointError::Malformed {
            what: "this is no state of a fine-tuning".into(),
            file: path.to_owned(),
            tensor: None,
            expected: "what `finetune` keeps while it runs".into(),
            found,
            hint: Some("delete it to begin anew, or name another one with `--state`".into()),
        };
        let (_, metadata) =
            SafeTensors::read_metadata(&bytes).map_err(|e| malformed(e.to_string()))?;
        let all = SafeTensors::deserialize(&bytes).map_err(|e| malformed(e.to_string()))?;
        let text = metadata.metadata().as_ref().and_then(|m| m.get("state"));
        let text = text.ok_or_else(|| malformed("a file of tensors without `state`".into()))?;
        let record: Record = serde_json::from_str(text).map_err(|e| malformed(e.to_string()))?;
        if record.format != FORMAT {
            return Err(malformed(format!("format `{}`", record.format)).into());
        }
        same(path, begun, &record.begun)?;
        let values = |name: String, len: usize| -> Result<Vec<f32>, CheckpointError> {
            let view = all.tensor(&name).map_err(|e| malformed(e.to_string()))?;
            if view.dtype() != Dtype::F32 || view.data().len() != 4 * len {
                return Err(malformed(format!("`{name}` of shape {:?}", view.shape())));
            }
            let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            Ok(view.data().chunks_exact(4).map(number).collect())
        };
        let (mut factors, mut best) = (BTreeMap::new(), BTreeMap::new());
        for p in &record.pairs {
            let at = (p.layer, p.part);
            let size = p.rank.checked_mul(p.input).zip(p.rank.checked_mul(p.output));
            let (a, b) = size.ok_or_else(|| malformed("sizes beyond any memory".into()))?;
            let read = |kind: &str| -> Result<FactorPair, CheckpointError> {
                let PairRecord { rank, input, output, trained, .. } = *p;
                let (a, b) = (values(key(kind, at, 0), a)?, values(key(kind, at, 1), b)?);
                Ok(FactorPair { rank, input, output, a, b, trained })
            };
            factors.insert(at, read("factor")?);
            best.insert(at, read("best")?);
        }
        let scale = record.scale;
        let mut state = Self::new(Factors { scale, pairs: factors, dropout: None }, record.begun);
        for (kind, moments) in [("first", &mut state.first), ("second", &mut state.second)] {
            for (at, pair) in moments {
                for (i, own) in pair.iter_mut().enumerate() {
                    *own = values(key(kind, *at, i), own.len())?;
                }
            }
        }
        state.best = Factors { scale, pairs: best, dropout: None };
        (state.step, state.round, state.batch) = (record.step, record.round, record.batch);
        (state.best_step, state.steps) = (record.best_step, record.steps);
        state.evaluations = record.evaluations;
        Ok(state)
    }
}

fn key(kind: &str, (layer, part): (usize, Part), factor: usize) -> String {
    format!("{kind}.{layer}.{}.{}", part.name(), ["a", "b"][factor])
}

/// Whether two runs were begun alike.
fn same(path: &Path, wanted: &Value, found: &Value) -> Result<(), FinetuneError> {
    if wanted == found {
        return Ok(());
    }
    let differs = |key: &&String| wanted.get(key.as_str()) != found.get(key.as_str());
    let keys = wanted.as_object().into_iter().flat_map(|o| o.keys());
    let what = keys.into_iter().find(differs).cloned().unwrap_or_else(|| "format".into());
    let shown = |v: &Value| v.get(&what).map_or("absent".into(), Value::to_string);
    Err(FinetuneError::OtherRun {
        file: path.to_owned(),
        expected: shown(wanted),
        found: shown(found),
        what,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn state() -> State {
        let pair = FactorPair {
            rank: 1,
            input: 2,
            output: 3,
            a: vec![f32::MIN_POSITIVE / 3.0, -0.0],
            b: vec![1.0 / 3.0, f32::MAX, 0.0],
            trained: TrainedFactors::Both,
        };
        let factors =
            Factors { scale: 2.0, pairs: [((4, Part::Down), pair)].into(), dropout: None };
        let mut state = State::new(factors, json!({"seed": 3, "steps": 9}));
        state.note(1.0 / 3.0);
        state.step = 7;
        state.factors.pairs.get_mut(&(4, Part::Down)).unwrap().b[2] = 5.0;
        state.first.get_mut(&(4, Part::Down)).unwrap()[1][0] = 1e-30;
        state.note(0.5);
        state
    }

    #[test]
    fn a_state_comes_back_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let state = state();
        state.save(&path).unwrap();
        assert_eq!(State::load(&path, &state.begun).unwrap(), state);
        assert_eq!((state.best_step, state.stale()), (0, 1));
        let bytes = std::fs::read(&path).unwrap();
        state.save(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn other_runs_and_other_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let state = state();
        state.save(&path).unwrap();
        let error = State::load(&path, &json!({"seed": 4, "steps": 9})).unwrap_err();
        assert!(
            matches!(&error, FinetuneError::OtherRun { what, expected, found, .. }
                if what == "seed" && expected == "4" && found == "3"),
            "{error:?}"
        );
        let bytes = std::fs::read(&path).unwrap();
        for broken in [&bytes[..40], b"", b"no state at all", &bytes[..bytes.len() - 3]] {
            std::fs::write(&path, broken).unwrap();
            let error = State::load(&path, &state.begun).unwrap_err().to_string();
            assert_eq!(error, "this is no state of a fine-tuning");
        }
    }
}
