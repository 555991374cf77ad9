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

/// Whether a tensor outside the layers stands after them: final norm and head.
pub(super) fn after_layers(name: &str) -> bool {
    !name.contains("embed") && (name.contains("norm") || name.contains("lm_head"))
}

/// The head, which may be the embedding.
pub(super) const HEAD: &str = "lm_head.weight";
/// The embedding.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";

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
