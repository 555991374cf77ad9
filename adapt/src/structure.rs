//! A model with another number of experts: which tensors come, which go, what `config.json` says then.

use std::sync::Arc;

use moe_merge_checkpoint::manifest::SourceRecord;
use moe_merge_checkpoint::weight::{OwnedWeight, Retyped, Stacked};
use moe_merge_checkpoint::{Change, CheckpointError, Dtype, NewTensors, WeightRef};
use moe_merge_model::spec::{Mlp, MoeMlp};
use serde_json::{Map, Value, json};

use crate::error::AdaptError;
use crate::mlp::{self, Matrices};
use crate::moe::Moe;

/// Who stands at a place among the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    /// The expert that had this number.
    Kept(usize),
    /// One that is new.
    New,
}

/// The new expert's matrices in a layer.
pub(crate) type NewMatrices<'a> = &'a dyn Fn(usize) -> Result<Matrices, AdaptError>;

/// What a change of the number of experts is made of.
#[derive(Debug, Default)]
pub(crate) struct Restructured {
    pub tensors: Vec<NewTensors>,
    pub remove: Vec<String>,
    pub config: Map<String, Value>,
    /// What a person should know.
    pub notes: Vec<String>,
}

impl Restructured {
    /// The model with its experts as `slots` says.
    ///
    /// An expert keeps its tensors where its number stays, unless all experts of a layer are one tensor in the hub layout's
    /// place: then all of them get tensors of their own. The gate row of a new expert is the mean of the others.
    pub fn of(moe: &Moe, slots: &[Slot], new: NewMatrices<'_>) -> Result<Self, AdaptError> {
        let mut experts: Vec<Vec<(String, WeightRef)>> = vec![Vec::new(); slots.len()];
        let (mut stacks, mut routers) = (Vec::new(), Vec::new());
        let (config, notes) = config(moe, slots.len())?;
        let mut all = Self { config, notes, ..Self::default() };
        let mut separated = 0;
        for (layer, mlp) in moe.spec.moe_layers() {
            let matrices = |slot: Slot| match slot {
                Slot::Kept(expert) => {
                    let mlp = Mlp::Moe(mlp.clone());
                    Ok(mlp::matrices(&moe.source, moe.spec.hidden, layer, &mlp, expert)?)
                }
                Slot::New => new(layer),
            };
            match mlp.names.expert(0) {
                Some(_) => {
                    let fused = is_fused(moe, layer, mlp)?;
                    separated += usize::from(fused);
                    for (place, slot) in slots.iter().enumerate() {
                        if fused || *slot != Slot::Kept(place) {
                            let names = mlp.names.expert(place).into_iter().flatten();
                            let names = names.map(|below| name(layer, &below));
                            experts[place].extend(names.zip(matrices(*slot)?));
                        }
                    }
                    let moved = (0..mlp.experts)
                        .filter(|e| fused || slots.get(*e) != Some(&Slot::Kept(*e)));
                    let gone = moved.filter_map(|e| mlp.names.expert(e)).flatten();
                    all.remove.extend(gone.map(|below| name(layer, &below)));
                }
                None => stacks.extend(stacked(layer, mlp, moe.spec.hidden, slots, &matrices)?),
            }
            all.routers(moe, layer, mlp, slots, &mut routers)?;
        }
        all.tensors.push(NewTensors { role: "router".into(), tensors: routers });
        all.tensors.push(NewTensors { role: "experts".into(), tensors: stacks });
        for (place, tensors) in experts.into_iter().enumerate() {
            all.tensors.push(NewTensors { role: format!("expert-{place:02}"), tensors });
        }
        all.tensors.retain(|group| !group.tensors.is_empty());
        if separated > 0 {
            all.notes.push(format!(
                "in {separated} layers all experts were one tensor: they get tensors of their own, the layout that every \
                 program loads"
            ));
        }
        Ok(all)
    }

    /// The router of a layer with a row for each expert, and what is added to its scores.
    fn routers(
        &mut self,
        moe: &Moe,
        layer: usize,
        mlp: &MoeMlp,
        slots: &[Slot],
        routers: &mut Vec<(String, WeightRef)>,
    ) -> Result<(), CheckpointError> {
        let gate = name(layer, mlp.names.router());
        let old = moe.source.weight(&gate)?;
        let (values, hidden) = (old.to_f32()?, moe.spec.hidden);
        old.expect_shape(&[mlp.experts, hidden], "experts and hidden_size")?;
        let rows = arranged(&values, hidden, slots);
        let weight = OwnedWeight::from_f32(&gate, &rows, &[slots.len(), hidden], Dtype::F32);
        if old.origin().1 != gate {
            // It has the name of another layout, which goes with it.
            self.remove.push(gate.clone());
        }
        routers.push((gate, Retyped::of(Arc::new(weight), old.dtype())));
        let Some(bias) = mlp.selection_bias.map(|below| name(layer, below)) else { return Ok(()) };
        let Some(old) = moe.source.tensors.get(&bias) else { return Ok(()) };
        let mut shape = old.shape().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = slots.len();
        }
        let values = arranged(&old.to_f32()?, 1, slots);
        let weight = OwnedWeight::from_f32(&bias, &values, &shape, Dtype::F32);
        if old.origin().1 != bias {
            self.remove.push(bias.clone());
        }
        routers.push((bias, Retyped::of(Arc::new(weight), old.dtype())));
        Ok(())
    }

    /// The change, for [`moe_merge_checkpoint::generation::commit`].
    pub fn change<'a>(&self, action: &'a str, moe: &Moe) -> Change<'a> {
        Change {
            action,
            tensors: self.tensors.clone(),
            remove: self.remove.clone(),
            config: Some(self.config.clone()),
            parent: Some(moe.generation()),
            ..Change::default()
        }
    }
}

fn name(layer: usize, below: &str) -> String {
    format!("model.layers.{layer}.{below}")
}

/// Whether the experts of a layer are parts of one tensor.
fn is_fused(moe: &Moe, layer: usize, mlp: &MoeMlp) -> Result<bool, CheckpointError> {
    let first = mlp.names.expert(0).map(|[gate, _, _]| name(layer, &gate)).unwrap_or_default();
    Ok(moe.source.weight(&first)?.part().is_some())
}

/// Rows of `width` numbers in a new order; a new one is the mean of the old ones.
fn arranged(values: &[f32], width: usize, slots: &[Slot]) -> Vec<f32> {
    let count = values.len() / width.max(1);
    let mean = || {
        let column = |c: usize| {
            let sum: f64 = (0..count).map(|r| f64::from(values[r * width + c])).sum();
            (sum / count.max(1) as f64) as f32
        };
        (0..width).map(column).collect::<Vec<f32>>()
    };
    let row = |slot: &Slot| match slot {
        Slot::Kept(old) => values[old * width..(old + 1) * width].to_vec(),
        Slot::New => mean(),
    };
    slots.iter().flat_map(row).collect()
}

/// The two tensors that hold all experts of a layer, anew.
fn stacked(
    layer: usize,
    mlp: &MoeMlp,
    hidden: usize,
    slots: &[Slot],
    matrices: &dyn Fn(Slot) -> Result<Matrices, AdaptError>,
) -> Result<Vec<(String, WeightRef)>, AdaptError> {
    let (mut both, mut down) = (Vec::new(), Vec::new());
    for slot in slots {
        let [gate, up, below] = matrices(*slot)?;
        both.extend([gate, up]);
        down.push(below);
    }
    let shapes = [[slots.len(), 2 * mlp.inter, hidden], [slots.len(), hidden, mlp.inter]];
    let all = mlp::STACKED.iter().zip([both, down]).zip(shapes);
    Ok(all
        .map(|((below, parts), shape)| {
            let weight = Stacked::new(parts, shape.to_vec());
            (name(layer, below), Arc::new(weight) as WeightRef)
        })
        .collect())
}

/// Keys of `config.json` that count experts.
const COUNTS: [&str; 4] =
    ["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"];

/// Keys that count those which a token visits.
const PER_TOKEN: [&str; 2] = ["num_experts_per_tok", "moe_k"];

/// The configuration for `experts` experts.
fn config(moe: &Moe, experts: usize) -> Result<(Map<String, Value>, Vec<String>), AdaptError> {
    let mut config = moe.source.config.0.clone();
    let groups = moe.spec.moe_layers().find_map(|(_, m)| m.router.groups).filter(|(n, _)| *n > 1);
    if let Some((groups, _)) = groups {
        return Err(AdaptError::Incompatible {
            what: "experts of this model stand in groups, whose sizes would differ".into(),
            model: moe.source.label.clone(),
            source_label: format!("{experts} experts"),
            expected: "a model without `n_group`".into(),
            found: format!("n_group {groups}"),
        });
    }
    for key in COUNTS {
        if let Some(count) = config.get_mut(key).filter(|v| v.is_u64()) {
            *count = json!(experts);
        }
    }
    let mut notes = Vec::new();
    for key in PER_TOKEN {
        if let Some(value) = config.get_mut(key)
            && value.as_u64().is_some_and(|k| k > experts as u64)
        {
            notes.push(format!("`{key}` is {experts} now, it was {value}: there are no more"));
            *value = json!(experts);
        }
    }
    Ok((config, notes))
}

/// What the model is made of, with its experts as `slots` says; `new` for the one that is new.
pub(crate) fn sources(moe: &Moe, slots: &[Slot], new: &str) -> Option<Vec<SourceRecord>> {
    let old = &moe.manifest.as_ref()?.sources;
    let number = |role: &str| {
        let (number, rest) = match role.strip_prefix("expert ")?.split_once(',') {
            Some((number, rest)) => (number, format!(",{rest}")),
            None => (&role["expert ".len()..], String::new()),
        };
        Some((number.parse::<usize>().ok()?, rest))
    };
    let mut sources: Vec<SourceRecord> =
        old.iter().filter(|s| number(&s.role).is_none()).cloned().collect();
    for (place, slot) in slots.iter().enumerate() {
        match slot {
            Slot::New => sources.push(SourceRecord {
                role: format!("expert {place}"),
                label: new.to_owned(),
                files: Vec::new(),
            }),
            Slot::Kept(old_place) => sources.extend(old.iter().filter_map(|s| {
                let (expert, rest) = number(&s.role)?;
                let role = format!("expert {place}{rest}");
                (expert == *old_place).then(|| SourceRecord { role, ..s.clone() })
            })),
        }
    }
    Some(sources)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_move_and_a_new_one_is_their_mean() {
        let values = [1.0, 2.0, 3.0, 6.0];
        let slots = [Slot::Kept(1), Slot::New, Slot::Kept(0)];
        assert_eq!(arranged(&values, 2, &slots), [3.0, 6.0, 2.0, 4.0, 1.0, 2.0]);
    }
}
