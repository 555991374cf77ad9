//! The manual page of the methods, made from their table.

use super::{Base, METHODS, Method, Parameter, Scope};
use crate::recipe::ParameterKind;

/// All methods as Markdown: `docs/methods.md`.
pub fn page() -> String {
    let mut text = String::from(
        "# Merge methods\n\n\
         What `merge_method:` can be. Made from the table in `merge/src/methods/`: do not edit.\n\n\
         `W` is a tensor of a model, `B` that of `base_model`, `w` a model's `weight`; sums run over the models \
         beside the base. The methods on task vectors compute in `dtype` (or as the models are stored) and round after \
         each step, as mergekit does; the spherical ones, `linear` and `model_stock` compute in f32 and round once; \
         `compute: float32` has all of them round once. Parameters of a model stand beside it, beside its slice or in the recipe's \
         `parameters:`; parameters of the merge in the latter two. Each may be a number, a list of numbers \
         (interpolated over the layers), or a list of `{filter, value}`, of which the first whose filter is part \
         of the tensor's name decides.\n\n\
         | method | what it does | models | `base_model` |\n|---|---|---|---|\n",
    );
    for method in METHODS {
        let name = method.name;
        let (models, base) = (models(method), base(method));
        text += &format!("| [`{name}`](#{name}) | {} | {models} | {base} |\n", method.summary);
    }
    METHODS.iter().for_each(|m| text += &section(m));
    text
}

fn models(method: &Method) -> String {
    match method.models {
        (a, b) if a == b => format!("{a}"),
        (a, usize::MAX) => format!("{} or more", a.max(1)),
        (a, b) => format!("{a} to {b}"),
    }
}

fn base(method: &Method) -> &'static str {
    match method.base {
        Base::Required => "needed, not counted",
        Base::Optional => "if given, not counted",
        Base::Ordinary => "a model like the others",
    }
}

fn section(method: &Method) -> String {
    let mut text = format!(
        "\n## {}\n\n{}\n\n    {}\n\n",
        method.name,
        sentence(method.summary),
        method.formula
    );
    if !method.parameters.is_empty() {
        text += "| parameter | of | default | range | meaning |\n|---|---|---|---|---|\n";
        for p in method.parameters {
            let of = if p.scope == Scope::Model { "each model" } else { "the merge" };
            text +=
                &format!("| `{}` | {of} | {} | {} | {} |\n", p.name, default(p), range(p), p.doc);
        }
        text.push('\n');
    }
    if method.activations.is_some() {
        text += ACTIVATIONS;
    }
    text + &format!("Source: {}\n", method.source)
}

/// What is said about every method that looks at activations.
const ACTIVATIONS: &str = "Runs each model on text of its kind: `prompts` or a `prompts_file` beside it (`prompt_tokens`, 20000, of it), \
                           else 5000 tokens that it writes itself (`self_text`). Whole dense models of one vocabulary and a known \
                           family, `models` not `slices`; weights that read the same input share their parameters. Memory: a layer of \
                           each model, the hidden states of all text, and `4 in² + 24 in out` bytes for the largest weight.\n\n";

fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
    format!("{first}{}.", letters.as_str())
}

fn default(parameter: &Parameter) -> String {
    match (parameter.default, parameter.kind) {
        (None, _) => "has to be given".into(),
        (Some(v), ParameterKind::Bool) => format!("{}", v != 0.0),
        (Some(v), ParameterKind::Number) if v != 0.0 && v.abs() < 1e-3 => format!("{v:e}"),
        (Some(v), ParameterKind::Number) => format!("{v}"),
    }
}

fn range(parameter: &Parameter) -> String {
    match (parameter.kind, parameter.range) {
        (ParameterKind::Bool, _) => "true, false".into(),
        (_, (f64::NEG_INFINITY, _)) => "any number".into(),
        (_, (least, f64::INFINITY)) => format!("at least {least}"),
        (_, (least, greatest)) => format!("{least} to {greatest}"),
    }
}
