//! Which layers of which models make the layers of the result.

use std::ops::Range;

use super::models::Models;
use super::modules::Family;
use super::wrong;
use crate::error::MergeError;
use crate::methods::{Base, Method};
use crate::recipe::{
    DenseRecipe, Input, ModuleSpec, Parameters, Parts, Place, RecipeErrors, SourceSpec,
};

/// A module of the result.
pub(super) struct PlannedModule<'a> {
    /// Which of the family's it is.
    pub module: usize,
    pub slices: Vec<Planned<'a>>,
    /// Whether it is merged with all its layers.
    pub whole: bool,
}

/// An output slice whose models are opened.
pub(super) struct Planned<'a> {
    /// Which module of the family it is of.
    pub module: usize,
    pub inputs: Vec<PlannedInput<'a>>,
    /// Which input the method takes for its base.
    pub base: Option<usize>,
    pub layers: usize,
    /// Those of the slice, of the module and of the recipe.
    pub levels: [Option<&'a Parameters>; 3],
}

/// One model of a slice.
#[derive(Clone)]
pub(super) struct PlannedInput<'a> {
    pub model: usize,
    pub range: Range<usize>,
    pub parameters: Option<&'a Parameters>,
    pub place: &'a Place,
}

/// The modules of the result, all models opened.
pub(super) fn plan<'a>(
    recipe: &'a DenseRecipe,
    family: &Family,
    models: &mut Models,
) -> Result<Vec<PlannedModule<'a>>, MergeError> {
    let mut all = Vec::new();
    for spec in &recipe.modules {
        for module in family.meant(spec)? {
            let planner = Planner { recipe, family, module, spec };
            let whole = matches!(spec.parts, Parts::Models(_));
            all.push(PlannedModule { module, slices: planner.slices(models)?, whole });
        }
    }
    Ok(all)
}

/// Plans one module.
struct Planner<'a, 'f> {
    recipe: &'a DenseRecipe,
    family: &'f Family,
    module: usize,
    spec: &'a ModuleSpec,
}

impl<'a> Planner<'a, '_> {
    fn slices(&self, models: &mut Models) -> Result<Vec<Planned<'a>>, MergeError> {
        let recipe = self.recipe;
        match &self.spec.parts {
            Parts::Models(inputs) => {
                let mut planned = Vec::new();
                for input in inputs {
                    planned.push(self.input(input, models)?);
                }
                if let Some(base) = &recipe.base_model {
                    let model = models.open(base)?;
                    if planned.iter().all(|p| p.model != model) {
                        let range =
                            0..self.family.layers(self.module, &models.opened[model].source);
                        let (parameters, place) = (None, &base.place);
                        planned.push(PlannedInput { model, range, parameters, place });
                    }
                }
                let base = recipe.base_model.as_ref();
                Ok(vec![self.slice(models, planned, base, None, &self.spec.place)?])
            }
            Parts::Slices(slices) => {
                let mut all = Vec::new();
                for s in slices {
                    let mut planned = Vec::new();
                    for input in &s.sources {
                        planned.push(self.input(input, models)?);
                    }
                    let base = s.base_model.as_ref().or(recipe.base_model.as_ref());
                    all.push(self.slice(models, planned, base, Some(&s.parameters), &s.place)?);
                }
                Ok(all)
            }
        }
    }

    fn input(&self, input: &'a Input, models: &mut Models) -> Result<PlannedInput<'a>, MergeError> {
        let model = models.open(&input.source)?;
        let layers = self.family.layers(self.module, &models.opened[model].source);
        let range = input.layers.clone().unwrap_or(0..layers);
        if range.end > layers {
            let mut error =
                input.source.place.error("`layer_range` goes beyond the model's layers");
            error.expected = Some(format!("layers within [0, {layers})"));
            error.found = Some(format!("[{}, {})", range.start, range.end));
            return Err(RecipeErrors(vec![error]).into());
        }
        let parameters = Some(&input.parameters);
        Ok(PlannedInput { model, range, parameters, place: &input.source.place })
    }

    fn slice(
        &self,
        models: &mut Models,
        inputs: Vec<PlannedInput<'a>>,
        base: Option<&SourceSpec>,
        own: Option<&'a Parameters>,
        place: &Place,
    ) -> Result<Planned<'a>, MergeError> {
        let method = self.recipe.method;
        let base = match (method.base, base) {
            (Base::Ordinary, _) | (_, None) => None,
            (Base::Required | Base::Optional, Some(spec)) => {
                let model = models.open(spec)?;
                let found = inputs.iter().position(|i| i.model == model);
                if found.is_none() {
                    let mut error =
                        place.error("the base model is not among the sources of this slice");
                    error.expected = Some(format!("`{spec}` as one of the sources"));
                    return Err(RecipeErrors(vec![error]).into());
                }
                found
            }
        };
        if method.base == Base::Required && base.is_none() {
            return Err(wrong(place, format!("`{}` needs a `base_model`", method.name)).into());
        }
        check_count(method, inputs.len() - usize::from(base.is_some()), base.is_some(), place)?;
        let layers = inputs.first().map_or(0, |i| i.range.len());
        if let Some(other) = inputs.iter().find(|i| i.range.len() != layers) {
            let label = |i: &PlannedInput| models.opened[i.model].source.label.clone();
            return Err(MergeError::Incompatible {
                what: "the models have different numbers of layers".into(),
                first: label(&inputs[0]),
                second: label(other),
                expected: format!("{layers} layers"),
                found: format!("{} layers", other.range.len()),
                hint: "choose layers of equal number with `slices` and `layer_range`".into(),
                recipe: Some(other.place.to_string()),
            });
        }
        let levels = [own, Some(&self.spec.parameters), Some(&self.recipe.parameters)];
        Ok(Planned { module: self.module, inputs, base, layers, levels })
    }
}

/// `count`: models beside the base.
pub(super) fn check_count(
    method: &Method,
    count: usize,
    base: bool,
    place: &Place,
) -> Result<(), RecipeErrors> {
    let (least, most) = method.models;
    if (least..=most).contains(&count) {
        return Ok(());
    }
    let mut error = place.error(format!("`{}` got the wrong number of models", method.name));
    let beside = match (method.base, base) {
        (Base::Ordinary, _) => "; `base_model` counts as one",
        (_, true) => " beside the base",
        (_, false) => "",
    };
    error.expected = Some(match (least, most) {
        (1, 1) => format!("exactly one model{beside}"),
        (a, b) if a == b => format!("exactly {a} models{beside}"),
        (a, _) => format!("at least {a} models{beside}"),
    });
    error.found = Some(format!("{count}{}", if base { " beside the base" } else { "" }));
    Err(RecipeErrors(vec![error]))
}
