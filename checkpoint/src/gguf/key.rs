//! Metadata keys: those of an architecture are written `ARCHITECTURE.KEY`.
//!
//! # Source
//! llama.cpp `gguf-py/gguf/constants.py`.
#![allow(missing_docs)]

pub const ARCHITECTURE: &str = "general.architecture";
pub const FILE_TYPE: &str = "general.file_type";

pub const VOCAB_SIZE: &str = "vocab_size";
pub const CONTEXT_LENGTH: &str = "context_length";
pub const EMBEDDING_LENGTH: &str = "embedding_length";
pub const BLOCK_COUNT: &str = "block_count";
pub const FEED_FORWARD_LENGTH: &str = "feed_forward_length";
pub const HEADS: &str = "attention.head_count";
pub const KV_HEADS: &str = "attention.head_count_kv";
pub const KEY_LENGTH: &str = "attention.key_length";
pub const VALUE_LENGTH: &str = "attention.value_length";
pub const RMS_EPS: &str = "attention.layer_norm_rms_epsilon";
pub const SLIDING_WINDOW: &str = "attention.sliding_window";
pub const SLIDING_PATTERN: &str = "attention.sliding_window_pattern";
pub const CLAMP_KQV: &str = "attention.clamp_kqv";
pub const ATTENTION_SCALE: &str = "attention.scale";
pub const Q_LORA_RANK: &str = "attention.q_lora_rank";
pub const KV_LORA_RANK: &str = "attention.kv_lora_rank";
pub const ATTENTION_SOFTCAP: &str = "attn_logit_softcapping";
pub const FINAL_SOFTCAP: &str = "final_logit_softcapping";
pub const EMBEDDING_SCALE: &str = "embedding_scale";
pub const RESIDUAL_SCALE: &str = "residual_scale";
pub const LOGIT_SCALE: &str = "logit_scale";
pub const ROPE_DIM: &str = "rope.dimension_count";
pub const ROPE_BASE: &str = "rope.freq_base";
pub const ROPE_BASE_LOCAL: &str = "rope.freq_base_swa";
pub const ROPE_SCALING_TYPE: &str = "rope.scaling.type";
pub const ROPE_SCALING_FACTOR: &str = "rope.scaling.factor";
pub const ROPE_SCALING_ORIGINAL: &str = "rope.scaling.original_context_length";
pub const ROPE_SCALING_ATTENTION: &str = "rope.scaling.attn_factor";
pub const ROPE_YARN_BETA_FAST: &str = "rope.scaling.yarn_beta_fast";
pub const ROPE_YARN_BETA_SLOW: &str = "rope.scaling.yarn_beta_slow";
pub const ROPE_YARN_LOG: &str = "rope.scaling.yarn_log_multiplier";
pub const EXPERTS: &str = "expert_count";
pub const EXPERTS_USED: &str = "expert_used_count";
pub const EXPERT_LENGTH: &str = "expert_feed_forward_length";
pub const EXPERTS_SHARED: &str = "expert_shared_count";
pub const SHARED_LENGTH: &str = "expert_shared_feed_forward_length";
pub const EXPERT_WEIGHTS_SCALE: &str = "expert_weights_scale";
pub const EXPERT_WEIGHTS_NORM: &str = "expert_weights_norm";
pub const EXPERT_GATING: &str = "expert_gating_func";
pub const EXPERT_GROUPS: &str = "expert_group_count";
pub const LEADING_DENSE: &str = "leading_dense_block_count";
pub const MOE_STEP: &str = "interleave_moe_layer_step";

pub const TOKENIZER: &str = "tokenizer.ggml.model";
pub const PRE: &str = "tokenizer.ggml.pre";
pub const TOKENS: &str = "tokenizer.ggml.tokens";
pub const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";
pub const SCORES: &str = "tokenizer.ggml.scores";
pub const MERGES: &str = "tokenizer.ggml.merges";
pub const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
pub const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
pub const ADD_SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
pub const CHAT_TEMPLATE: &str = "tokenizer.chat_template";
pub const CHAT_TEMPLATES: &str = "tokenizer.chat_templates";
