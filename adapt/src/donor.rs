//! Where a new expert comes from.

use std::path::Path;

use moe_merge_checkpoint::{CheckpointError, Source, SourceRef};
use moe_merge_merge::documents::expert_names;
use moe_merge_model::Spec;
use moe_merge_model::spec::Mlp;

use crate::error::AdaptError;
use crate::mlp::{self, Matrices};
use crate::moe;

/// A source of expert MLPs: a dense model, or one expert of a MoE.
#[derive(Debug)]
pub struct Donor {
    /// As a person wrote it.
    pub label: String,
    /// The model.
    pub source: Source,
    /// Its structure.
    pub spec: Spec,
    /// Which of its experts; none for a dense model.
    pub expert: Option<usize>,
}

impl Donor {
    /// Opens `text`: a SOURCE as in a recipe (`PATH`, `FILE.gguf`, `org/name[@revision]`, any of them `+ADAPTER`), a
    /// MoE with `#EXPERT` behind it: a name or a number. Relative paths are taken from `base_dir`.
    ///
    /// # Errors
    /// [`AdaptError::WhichExpert`] for a MoE without `#EXPERT`, [`AdaptError::NoExpert`] for one that it has not, a dense
    /// model with `#EXPERT`; what opening meets.
    pub fn open(text: &str, base_dir: &Path) -> Result<Self, AdaptError> {
        let (model, wanted) = split(text, base_dir);
        let source = Source::open(&SourceRef::parse(model, base_dir)?, base_dir)?;
        let spec = Spec::of(&source)?;
        let experts = spec.moe_layers().next().map(|(_, moe)| moe.experts);
        let expert = match (experts, wanted) {
            (None, None) => None,
            (None, Some(wanted)) => {
                return Err(AdaptError::Incompatible {
                    what: format!("a dense model has no expert `{wanted}`"),
                    model: text.to_owned(),
                    source_label: source.label.clone(),
                    expected: "a SOURCE without `#EXPERT`, or a mixture of experts".into(),
                    found: format!(
                        "a `{}` with one MLP in every layer",
                        source.config.model_type()
                    ),
                });
            }
            (Some(experts), wanted) => {
                let names = expert_names(&source.path, experts)?;
                match wanted {
                    Some(wanted) => Some(moe::find(wanted, &names, &source.label)?),
                    None => {
                        return Err(AdaptError::WhichExpert {
                            source_label: text.to_owned(),
                            known: names,
                        });
                    }
                }
            }
        };
        Ok(Self { label: text.to_owned(), source, spec, expert })
    }

    /// Its name without folders.
    pub fn short_label(&self) -> String {
        let (model, expert) = split(&self.label, Path::new(""));
        let last =
            |part: &str| part.trim_end_matches('/').rsplit('/').next().unwrap_or(part).to_owned();
        let model = model.split('+').map(last).collect::<Vec<_>>().join("+");
        expert.map_or(model.clone(), |e| format!("{model}#{e}"))
    }

    /// The matrices of a layer; none if it has no such expert there.
    ///
    /// # Errors
    /// [`AdaptError::Incompatible`] for an MLP with biases; tensors that are missing or misshapen.
    pub(crate) fn matrices(&self, layer: usize) -> Result<Option<Matrices>, AdaptError> {
        let mlp = &self.spec.layers[layer].mlp;
        let expert = match (mlp, self.expert) {
            (Mlp::Moe(_), Some(expert)) => expert,
            (Mlp::Dense(dense), None) if dense.bias => {
                return Err(AdaptError::Incompatible {
                    what: "no family has biases in its experts".into(),
                    model: "experts".into(),
                    source_label: self.label.clone(),
                    expected: "an MLP without biases".into(),
                    found: "biases on its projections (`mlp_bias`)".into(),
                });
            }
            (Mlp::Dense(_), None) => 0,
            _ => return Ok(None),
        };
        mlp::matrices(&self.source, self.spec.hidden, layer, mlp, expert)
            .map(Some)
            .map_err(|e: CheckpointError| e.into())
    }
}

/// A model and what stands behind its last `#`, unless a path of that name exists.
fn split<'a>(text: &'a str, base_dir: &Path) -> (&'a str, Option<&'a str>) {
    match text.rsplit_once('#') {
        Some((model, expert)) if !base_dir.join(text).exists() => (model, Some(expert)),
        _ => (text, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_stands_behind_a_hash_sign() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("c#")).unwrap();
        assert_eq!(split("a/moe#3", dir.path()), ("a/moe", Some("3")));
        assert_eq!(split("a/moe", dir.path()), ("a/moe", None));
        assert_eq!(split("c#", dir.path()), ("c#", None));
        assert_eq!(split("c##rust", dir.path()), ("c#", Some("rust")));
    }
}
