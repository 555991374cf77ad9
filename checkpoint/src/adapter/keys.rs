//! Names inside an adapter file: which module, and which part of its adapter.

/// What a tensor of an adapter file is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// `lora_A.weight [r, in]`.
    A,
    /// `lora_B.weight [out, r]`.
    B,
    /// `lora_B.bias [out]`.
    BiasB,
    /// `lora_embedding_A [r, vocab]`.
    EmbeddingA,
    /// `lora_embedding_B [hidden, r]`.
    EmbeddingB,
    /// `lora_magnitude_vector [out]`.
    Magnitude,
    /// `token_adapter.trainable_tokens_delta [tokens, hidden]`.
    Tokens,
    /// A weight or bias that replaces that of the base.
    Full,
    /// The same, stored because its module carries a LoRA too (`….base_layer.weight`).
    FullBase,
}

/// A key taken apart. For the two full roles `module` is the tensor's plain name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    pub module: String,
    pub role: Role,
}

/// Takes a key apart; `None` if it looks like a LoRA tensor but is none of the known forms.
///
/// Known with and without the adapter's name in the middle (`lora_A.default.weight`).
pub(super) fn parse(name: &str) -> Option<Key> {
    let plain = name.strip_prefix("base_model.model.").unwrap_or(name);
    let parts: Vec<&str> = plain.split('.').collect();
    let marker =
        parts.iter().position(|p| p.starts_with("lora_") || *p == "trainable_tokens_delta");
    let Some(at) = marker else { return Some(full(&parts)) };
    let (module, rest) = (&parts[..at], &parts[at + 1..]);
    // At most the adapter's name and the parameter's.
    let (last, named) = match rest {
        [] => (None, false),
        [last] => (Some(*last), false),
        [_, last] => (Some(*last), true),
        _ => return None,
    };
    let role = match (parts[at], last) {
        ("lora_A", Some("weight")) => Role::A,
        ("lora_B", Some("weight")) => Role::B,
        ("lora_B", Some("bias")) => Role::BiasB,
        ("lora_embedding_A", _) if !named => Role::EmbeddingA,
        ("lora_embedding_B", _) if !named => Role::EmbeddingB,
        ("lora_magnitude_vector", Some("weight")) => Role::Magnitude,
        ("lora_magnitude_vector", _) if !named => Role::Magnitude,
        ("trainable_tokens_delta", _) if !named => Role::Tokens,
        _ => return None,
    };
    let module = match role {
        Role::Tokens => module.strip_suffix(&["token_adapter"]).unwrap_or(module),
        _ => module,
    };
    (!module.is_empty()).then(|| Key { module: module.join("."), role })
}

fn full(parts: &[&str]) -> Key {
    let mut out: Vec<&str> = Vec::with_capacity(parts.len());
    let mut role = Role::Full;
    let mut i = 0;
    while i < parts.len() {
        match parts[i] {
            "base_layer" => role = Role::FullBase,
            // `X.modules_to_save.default.weight`: the adapter's name goes as well.
            "modules_to_save" if i + 2 < parts.len() => i += 1,
            "modules_to_save" => {}
            part => out.push(part),
        }
        i += 1;
    }
    Key { module: out.join("."), role }
}

/// Every way in which checkpoints spell the tensor `name`, the given one first.
///
/// Adapters trained on the bare model lack the leading `model.`; MoE blocks are `mlp` or `block_sparse_moe`, their
/// projections `gate_proj`, `up_proj`, `down_proj` or `w1`, `w3`, `w2`.
pub(super) fn spellings(name: &str) -> Vec<String> {
    let mut all = vec![name.to_owned()];
    for (from, to) in [(".mlp.", ".block_sparse_moe."), (".block_sparse_moe.", ".mlp.")] {
        if name.contains(from) {
            all.push(name.replace(from, to));
        }
    }
    for i in 0..all.len() {
        let pairs = [("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")];
        for (long, short) in pairs {
            for (from, to) in [(long, short), (short, long)] {
                let (from, to) = (format!(".{from}."), format!(".{to}."));
                if all[i].contains(".experts.") && all[i].contains(&from) {
                    all.push(all[i].replace(&from, &to));
                }
            }
        }
    }
    for i in 0..all.len() {
        all.push(format!("model.{}", all[i]));
        if let Some(bare) = all[i].strip_prefix("model.") {
            all.push(bare.to_owned());
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(name: &str) -> Option<(String, Role)> {
        parse(name).map(|k| (k.module, k.role))
    }

    #[test]
    fn keys_with_and_without_the_adapter_name() {
        for (key, module, role) in [
            ("base_model.model.a.q.lora_A.weight", "a.q", Role::A),
            ("base_model.model.a.q.lora_A.default.weight", "a.q", Role::A),
            ("base_model.model.a.q.lora_B.bias", "a.q", Role::BiasB),
            ("base_model.model.e.lora_embedding_A", "e", Role::EmbeddingA),
            ("base_model.model.e.lora_embedding_B.default", "e", Role::EmbeddingB),
            ("a.q.lora_magnitude_vector", "a.q", Role::Magnitude),
            ("a.q.lora_magnitude_vector.default.weight", "a.q", Role::Magnitude),
            ("a.q.lora_magnitude_vector.weight", "a.q", Role::Magnitude),
            ("e.token_adapter.trainable_tokens_delta", "e", Role::Tokens),
            ("a.experts.base_layer.lora_A.weight", "a.experts.base_layer", Role::A),
            ("base_model.model.lm_head.weight", "lm_head.weight", Role::Full),
            ("a.q.base_layer.bias", "a.q.bias", Role::FullBase),
            ("lm_head.modules_to_save.default.weight", "lm_head.weight", Role::Full),
            ("lm_head.modules_to_save.weight", "lm_head.weight", Role::Full),
        ] {
            assert_eq!(parsed(key), Some((module.to_owned(), role)), "{key}");
        }
        for key in ["a.q.lora_A", "a.q.lora_A.x.y.weight", "a.lora_diag", "lora_A.weight"] {
            assert_eq!(parsed(key), None, "{key}");
        }
    }

    #[test]
    fn both_names_of_experts() {
        let found = spellings("model.layers.0.mlp.experts.3.gate_proj.weight");
        assert!(found.contains(&"model.layers.0.block_sparse_moe.experts.3.w1.weight".to_owned()));
        // Dense projections keep their names.
        let dense = spellings("model.layers.0.mlp.gate_proj.weight");
        assert!(dense.iter().all(|n| !n.contains("w1")));
    }
}
