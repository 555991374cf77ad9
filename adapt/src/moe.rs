//! The model that is to be changed.

use std::ops::Range;
use std::path::Path;

use moe_merge_checkpoint::manifest::Manifest;
use moe_merge_checkpoint::{Source, SourceRef, generation};
use moe_merge_merge::MergeError;
use moe_merge_merge::documents::expert_names;
use moe_merge_model::spec::MoeMlp;
use moe_merge_model::{ModelError, Spec};

use crate::error::AdaptError;

/// A mixture of experts in a folder that can be changed, opened.
#[derive(Debug, Clone)]
pub struct Moe {
    /// Its weights.
    pub source: Source,
    /// Its structure.
    pub spec: Spec,
    /// Names of its experts in order; numbers, where they have no names.
    pub names: Vec<String>,
    /// What its manifest says, if it has one.
    pub manifest: Option<Manifest>,
}

impl Moe {
    /// Opens the model in `folder`. A change whose process was killed is finished or undone first, where that may be.
    ///
    /// # Errors
    /// [`MergeError::NotAFolder`], [`ModelError::NoExperts`], and what opening meets.
    pub fn open(folder: &str) -> Result<Self, AdaptError> {
        let path = Path::new(folder);
        if path.is_dir() {
            let _ = generation::recover(path);
        }
        let reference: SourceRef = folder.parse()?;
        // The generation comes first: if the model is changed while it is read, the change that follows is refused.
        let manifest = Manifest::load(path)?;
        let source = Source::open(&reference, Path::new(""))?;
        if reference.lora.is_some() || !source.path.is_dir() {
            return Err(MergeError::NotAFolder { found: folder.to_owned() }.into());
        }
        let spec = Spec::of(&source)?;
        let Some(experts) = spec.moe_layers().next().map(|(_, moe)| moe.experts) else {
            let (path, family) = (source.path, spec.family);
            return Err(ModelError::NoExperts { path, family }.into());
        };
        let names = expert_names(&source.path, experts)?;
        Ok(Self { source, spec, names, manifest })
    }

    /// The generation that was read.
    pub fn generation(&self) -> u32 {
        self.manifest.as_ref().map_or(0, |m| m.generation)
    }

    /// The expert called `text`, or of that number.
    ///
    /// # Errors
    /// [`AdaptError::NoExpert`], [`AdaptError::Ambiguous`].
    pub fn expert(&self, text: &str) -> Result<usize, AdaptError> {
        find(text, &self.names, &self.source.label)
    }

    /// Layers with experts, those of `range` only; all without one.
    ///
    /// # Errors
    /// [`AdaptError::Layers`] if the range is empty, goes beyond the model, or holds no layer with experts.
    pub fn layers(&self, range: Option<&Range<usize>>) -> Result<Vec<(usize, MoeMlp)>, AdaptError> {
        let layers = self.spec.layers.len();
        let inside = |layer: usize| range.is_none_or(|r| r.contains(&layer));
        let chosen: Vec<(usize, MoeMlp)> = self
            .spec
            .moe_layers()
            .filter(|(l, _)| inside(*l))
            .map(|(l, m)| (l, m.clone()))
            .collect();
        match range {
            Some(range) if range.end > layers || chosen.is_empty() => Err(AdaptError::Layers {
                path: self.source.path.clone(),
                found: range.clone(),
                layers,
            }),
            _ => Ok(chosen),
        }
    }
}

/// The expert called `text`, or of that number, of the model `label`.
pub(crate) fn find(text: &str, names: &[String], label: &str) -> Result<usize, AdaptError> {
    let mut named = names.iter().enumerate().filter(|(_, name)| *name == text);
    match (named.next(), named.next()) {
        (Some((expert, _)), None) => Ok(expert),
        (Some(_), Some(_)) => Err(AdaptError::Ambiguous {
            path: label.to_owned(),
            wanted: text.to_owned(),
            experts: names.len(),
        }),
        (None, _) => {
            text.parse().ok().filter(|n| *n < names.len()).ok_or_else(|| AdaptError::NoExpert {
                path: label.to_owned(),
                wanted: text.to_owned(),
                known: names.to_vec(),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_have_names_and_numbers() {
        let names = ["prose", "code", "2", "code"].map(str::to_owned);
        let found = |text: &str| find(text, &names, "m");
        assert_eq!(found("prose").unwrap(), 0);
        assert_eq!(found("1").unwrap(), 1);
        assert_eq!(found("2").unwrap(), 2);
        assert!(matches!(found("code"), Err(AdaptError::Ambiguous { .. })));
        for wrong in ["4", "-1", "", "prosa"] {
            assert!(matches!(found(wrong), Err(AdaptError::NoExpert { .. })), "{wrong}");
        }
    }
}
