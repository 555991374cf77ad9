//! Names of tensors: layers, experts, and what stands outside of them.

/// Layer number in a tensor name, with the text before and after it.
pub(super) fn split(name: &str) -> Option<(usize, &str, &str)> {
    let mut start = 0;
    for part in name.split('.') {
        if !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) {
            let end = start + part.len();
            return Some((part.parse().ok()?, &name[..start], &name[end..]));
        }
        start += part.len() + 1;
    }
    None
}

/// Whether a tensor outside the layers stands after them: final norm and head, what a vision tower gives its output to.
pub(super) fn after_layers(name: &str) -> bool {
    let after = ["norm", "lm_head", "vision_adapter"].iter().any(|part| name.contains(part));
    after && !name.contains("embed") && !name.contains("norm_pre")
}

/// Heads, as far as they may be the embedding.
pub(super) const HEADS: &[&str] = &["lm_head.weight", "language_model.lm_head.weight"];

/// The tensors that one may be the same as, and that stand for it where it is not stored.
pub(super) fn tied(name: &str) -> &'static [&'static str] {
    match name {
        "lm_head.weight" => &[
            "model.embed_tokens.weight",
            "model.language_model.embed_tokens.weight",
            "shared.weight",
        ],
        "language_model.lm_head.weight" => &["language_model.model.embed_tokens.weight"],
        "proj_out.weight" => &["model.decoder.embed_tokens.weight"],
        "encoder.embed_tokens.weight" | "decoder.embed_tokens.weight" => &["shared.weight"],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_split_at_the_layer() {
        assert_eq!(split("model.layers.12.mlp.w"), Some((12, "model.layers.", ".mlp.w")));
        assert_eq!(split("h.3"), Some((3, "h.", "")));
        assert_eq!(split("a.layers.0.experts.7.w1"), Some((0, "a.layers.", ".experts.7.w1")));
        assert_eq!(split("model.norm.weight"), None);
        assert_eq!(split(""), None);
    }
}
