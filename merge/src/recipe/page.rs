//! The manual page of the recipe language, made from its tables of keys.

use super::schema::{Availability, Key, Shape, TABLES};

/// What each table is about, in the order of the page.
const SECTIONS: &[(&str, &str)] = &[
    ("moe", "A MoE recipe: dense models become the experts of one model"),
    ("expert", "An expert, under `experts` and `shared_experts`"),
    ("align", "How experts are fitted to the attention they get, under `align`"),
    ("attention", "How the tensors outside the MLPs are merged, under `attention`"),
    ("dense", "A dense merge: models of one family become one of the same size"),
    ("model", "A model, under `models`"),
    ("slice", "An output slice, under `slices`"),
    ("slice_source", "A source of a slice, under `sources`"),
    (
        "module",
        "A part of the models with layers of its own, under `modules`: `default` in most families; `text_decoder`, \
         `multi_modal_projector` and `vision_tower` (llama4: `vision_model`) in gemma3, llama4, mistral3, qwen2_vl, qwen2_5_vl, \
         qwen3_vl and qwen3_vl_moe; `encoder` and `decoder` in t5, with `shared`, and whisper. In other families of several \
         stacks of layers what stands before the number is the name (`encoder.layers`), and `default` is the rest. A \
         module that is not named is not written",
    ),
    ("tokenizer", "The vocabulary of a dense merge, under `tokenizer`"),
    ("token", "A token, under `tokenizer.tokens`"),
    ("row", "Where the row of a token is, under `source` of a token"),
    ("source", "A model as a mapping, wherever a model is named"),
    ("path", "`model` or `lora` of that mapping as a mapping"),
];

/// All keys as Markdown: `docs/recipe.md`.
pub fn page() -> String {
    let mut text = String::from(
        "# Recipe keys\n\n\
         Every key that a recipe can have. Made from the tables in `merge/src/recipe/schema.rs`: do not edit.\n\n\
         A recipe is a YAML file. One with `experts` makes a MoE, one with `merge_method` a dense model. Recipes of \
         mergekit-moe and mergekit-yaml are read as they are. An unknown key is an error that names the nearest \
         known one. A *model* is a folder, a `.gguf` file or `org/name[@revision]` in the local Hub cache, any of them \
         `+ADAPTER`; the path of another dense recipe (`.yaml`); a mapping of the [table below](#source); or a \
         dense recipe written in place. Relative paths start from the recipe's folder, but for `output`; a model \
         that is not there is looked for in the working folder, as mergekit does. What `parameters` can hold is in [methods.md](methods.md).\n",
    );
    for (name, about) in SECTIONS {
        let keys = TABLES.iter().find(|(table, _)| table == name).map_or(&[][..], |(_, keys)| keys);
        text += &format!(
            "\n## {name}\n\n{about}.\n\n| key | value | without it | meaning |\n|---|---|---|---|\n"
        );
        keys.iter().for_each(|key| text += &row(key));
    }
    text
}

fn row(key: &Key) -> String {
    let without = match (key.required, key.default) {
        (true, _) => "has to be given",
        (false, Some(default)) => default,
        (false, None) => "",
    };
    let meaning = match key.availability {
        Availability::Now => key.doc.to_owned(),
        Availability::Later { reason, .. } => format!("{}; refused: {reason}", key.doc),
    };
    format!("| `{}` | {} | {without} | {meaning} |\n", key.name, value(&key.shape))
}

/// What a value looks like, in words.
fn value(shape: &Shape) -> String {
    let link = |name: &str| format!("[{name}](#{name})");
    let names = |names: &[&str]| {
        let quoted: Vec<String> = names.iter().map(|n| format!("`{n}`")).collect();
        quoted.join(", ")
    };
    match shape {
        Shape::Text => "text".into(),
        Shape::Bool => "`true`, `false`".into(),
        Shape::Integer(least) => format!("whole number from {least}"),
        Shape::Scale => "number from 0".into(),
        Shape::Choice => "`true`, `false`, `auto`".into(),
        Shape::Texts => "list of texts".into(),
        Shape::TextOrTexts => "text, or list of texts".into(),
        Shape::Dtype => "`float32`, `bfloat16`, `float16`".into(),
        Shape::Source => "model".into(),
        Shape::Range => "`[first, end]`, the end left out".into(),
        Shape::Name(known) => names(&known()),
        Shape::Parameters => "mapping, see [methods.md](methods.md)".into(),
        Shape::Files => "mapping of names to files".into(),
        Shape::Object(name) => link(name),
        Shape::Map(name) => format!("mapping of names to {}", link(name)),
        Shape::Objects(name) => format!("list of {}", link(name)),
        Shape::NameOr(known, name) => format!("{}, {}", names(known), link(name)),
        Shape::Any => "any".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_and_every_key_is_there() {
        let page = page();
        for (table, keys) in TABLES {
            let from = page.find(&format!("\n## {table}\n")).expect(table);
            let section = page[from + 1..].split("\n## ").next().unwrap_or_default();
            for key in *keys {
                assert!(section.contains(&format!("| `{}` |", key.name)), "{table} {}", key.name);
            }
        }
        assert_eq!(SECTIONS.len(), TABLES.len());
    }
}
