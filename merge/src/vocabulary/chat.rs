//! Chat templates by name, and putting one into a model's files.

use std::collections::HashMap;

use moe_merge_checkpoint::{CheckpointError, SideContent, SideFile, Source};
use serde_json::{Map, Value};

/// Jinja text of the named templates: the formats that models of these families were trained with.
const NAMED: &[(&str, &str)] = &[
    (
        "alpaca",
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}\
         {% elif m['role'] == 'user' %}{{ '### Instruction:\\n' + m['content'] + '\\n\\n' }}\
         {% else %}{{ '### Response:\\n' + m['content'] + eos_token + '\\n\\n' }}{% endif %}{% endfor %}\
         {% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
    ),
    (
        "chatml",
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    (
        "exaone",
        "{% for m in messages %}{{ '[|' + m['role'] + '|]' + m['content'] }}\
         {% if m['role'] != 'user' %}{{ '[|endofturn|]' }}{% endif %}{{ '\\n' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}",
    ),
    (
        "llama3",
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' \
         + m['content'] | trim + '<|eot_id|>' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ),
    (
        "mistral",
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}\
         {% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}",
    ),
];

/// Where a model keeps its template, newest place first.
const PLACES: &[&str] = &["chat_template.jinja", "chat_template.json", "tokenizer_config.json"];

/// Puts a chat template into `side`: by name, `auto` for the most frequent one of `models`, or as Jinja text.
pub(crate) fn with_template(
    wanted: &str,
    models: &[&Source],
    side: &mut Vec<SideFile>,
) -> Result<(), CheckpointError> {
    let text = match NAMED.iter().find(|(name, _)| *name == wanted) {
        Some((_, text)) => (*text).to_owned(),
        None if wanted == "auto" => match most_frequent(models)? {
            Some(text) => text,
            None => return Ok(()),
        },
        None => wanted.to_owned(),
    };
    side.retain(|f| f.name != "chat_template.jinja" && f.name != "chat_template.json");
    let mut config = match side.iter().find(|f| f.name == "tokenizer_config.json") {
        Some(file) => object(file)?,
        None => Map::new(),
    };
    config.insert("chat_template".into(), text.into());
    let mut bytes = serde_json::to_vec_pretty(&config).unwrap_or_default();
    bytes.push(b'\n');
    side.retain(|f| f.name != "tokenizer_config.json");
    let content = SideContent::Bytes(bytes.into());
    side.push(SideFile { name: "tokenizer_config.json".into(), content });
    Ok(())
}

/// The template that most models have; of equally frequent ones that of the first model.
fn most_frequent(models: &[&Source]) -> Result<Option<String>, CheckpointError> {
    let mut counts: HashMap<String, (usize, usize)> = HashMap::new();
    for (i, model) in models.iter().enumerate() {
        if let Some(text) = template(model)? {
            counts.entry(text.trim().to_owned()).or_insert((0, i)).0 += 1;
        }
    }
    let best = counts.into_iter().max_by_key(|(_, (count, first))| (*count, usize::MAX - first));
    Ok(best.map(|(text, _)| text))
}

fn template(model: &Source) -> Result<Option<String>, CheckpointError> {
    for name in PLACES {
        let Some(file) = model.side_file(name) else { continue };
        if name.ends_with(".jinja") {
            return Ok(Some(String::from_utf8_lossy(&file.read()?).into_owned()));
        }
        match object(file)?.get("chat_template") {
            Some(Value::String(text)) => return Ok(Some(text.clone())),
            // A set of templates counts by its default.
            Some(Value::Array(set)) => {
                let default = set.iter().find(|t| t["name"] == "default");
                if let Some(text) = default.and_then(|t| t["template"].as_str()) {
                    return Ok(Some(text.to_owned()));
                }
            }
            _ => {}
        }
    }
    Ok(None)
}

fn object(file: &SideFile) -> Result<Map<String, Value>, CheckpointError> {
    serde_json::from_slice(&file.read()?).map_err(|e| CheckpointError::Malformed {
        what: format!("`{}` cannot be read", file.name),
        file: match &file.content {
            SideContent::File(path) => path.clone(),
            SideContent::Bytes(_) => file.name.clone().into(),
        },
        tensor: None,
        expected: "a JSON object".into(),
        found: e.to_string(),
        hint: None,
    })
}
