//! Small llamas in folders of their own.

use std::collections::BTreeMap;
use std::path::Path;

use moe_merge_checkpoint::{Dtype, Source};
use serde_json::{Value, json};

const HIDDEN: usize = 8;
const MLP: usize = 6;

/// A llama of a few numbers.
pub struct TinyModel {
    layers: usize,
    value: f32,
    seed: Option<u64>,
    dtype: Dtype,
    tied: bool,
    words: Vec<String>,
    special: Vec<String>,
    embedding: Option<Vec<f32>>,
}

#[allow(dead_code)] // each test file uses its part
impl TinyModel {
    pub fn new(layers: usize) -> Self {
        Self {
            layers,
            value: 0.0,
            seed: None,
            dtype: Dtype::F32,
            tied: false,
            words: Vec::new(),
            special: Vec::new(),
            embedding: None,
        }
    }

    /// All numbers are `value`.
    pub fn filled(mut self, value: f32) -> Self {
        self.value = value;
        self
    }

    /// Numbers from -1 to 1, other ones for another seed.
    pub fn drawn(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = dtype;
        self
    }

    pub fn tied(mut self, tied: bool) -> Self {
        self.tied = tied;
        self
    }

    /// Plain entries from 0 on, then special tokens.
    pub fn vocabulary(mut self, words: &[String], special: &[&str]) -> Self {
        self.words = words.to_vec();
        self.special = special.iter().map(|s| (*s).to_owned()).collect();
        self
    }

    pub fn embedding(mut self, rows: Vec<f32>) -> Self {
        self.embedding = Some(rows);
        self
    }

    pub fn write(self, folder: &Path) {
        fs_err::create_dir_all(folder).unwrap();
        let vocabulary =
            if self.words.is_empty() { 5 } else { self.words.len() + self.special.len() };
        let config = json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocabulary,
            "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": self.layers,
            "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
            "tie_word_embeddings": self.tied,
        });
        fs_err::write(folder.join("config.json"), config.to_string()).unwrap();
        if !self.words.is_empty() {
            fs_err::write(folder.join("tokenizer.json"), self.tokenizer().to_string()).unwrap();
        }
        let mut tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
        let mut drawn = self.seed.map(|seed| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut number = || match &mut drawn {
            Some(state) => {
                *state ^= *state << 13;
                *state ^= *state >> 7;
                *state ^= *state << 17;
                (*state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            }
            None => self.value,
        };
        let mut add = |name: String, shape: &[usize]| {
            let count: usize = shape.iter().product();
            tensors.insert(name, (shape.to_vec(), (0..count).map(|_| number()).collect()));
        };
        add("model.embed_tokens.weight".into(), &[vocabulary, HIDDEN]);
        if !self.tied {
            add("lm_head.weight".into(), &[vocabulary, HIDDEN]);
        }
        add("model.norm.weight".into(), &[HIDDEN]);
        for l in 0..self.layers {
            let layer = |part: &str| format!("model.layers.{l}.{part}.weight");
            for part in ["input_layernorm", "post_attention_layernorm"] {
                add(layer(part), &[HIDDEN]);
            }
            for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
                add(layer(&format!("self_attn.{part}")), &[HIDDEN, HIDDEN]);
            }
            add(layer("mlp.gate_proj"), &[MLP, HIDDEN]);
            add(layer("mlp.up_proj"), &[MLP, HIDDEN]);
            add(layer("mlp.down_proj"), &[HIDDEN, MLP]);
        }
        if let Some(rows) = self.embedding {
            tensors.get_mut("model.embed_tokens.weight").unwrap().1 = rows;
        }
        write(&folder.join("model.safetensors"), &tensors, self.dtype);
    }

    fn tokenizer(&self) -> Value {
        let vocab: serde_json::Map<String, Value> =
            self.words.iter().enumerate().map(|(i, w)| (w.clone(), i.into())).collect();
        let added: Vec<Value> = self
            .special
            .iter()
            .enumerate()
            .map(|(i, text)| {
                json!({
                    "id": self.words.len() + i, "content": text, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true,
                })
            })
            .collect();
        json!({"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": []}})
    }
}

/// A model of any family: its configuration, and tensors by name, each one row of numbers.
#[allow(dead_code)] // each test file uses its part
pub fn write_model(folder: &Path, config: &Value, tensors: &[(String, Vec<f32>)]) {
    fs_err::create_dir_all(folder).unwrap();
    fs_err::write(folder.join("config.json"), config.to_string()).unwrap();
    let tensors = tensors.iter().map(|(name, row)| (name.clone(), (vec![row.len()], row.clone())));
    write(&folder.join("model.safetensors"), &tensors.collect(), Dtype::F32);
}

/// A safetensors file: header length, header, numbers.
fn write(path: &Path, tensors: &BTreeMap<String, (Vec<usize>, Vec<f32>)>, dtype: Dtype) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (shape, values)) in tensors {
        let start = data.len();
        for v in values {
            match dtype {
                Dtype::F32 => data.extend(v.to_le_bytes()),
                Dtype::F16 => data.extend(half::f16::from_f32(*v).to_le_bytes()),
                Dtype::BF16 => data.extend(half::bf16::from_f32(*v).to_le_bytes()),
            }
        }
        let kind = match dtype {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
        };
        header.insert(
            name.clone(),
            json!({"dtype": kind, "shape": shape, "data_offsets": [start, data.len()]}),
        );
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    fs_err::write(path, bytes).unwrap();
}

/// All numbers of a tensor.
pub fn values(source: &Source, name: &str) -> Vec<f32> {
    source.tensors[name].to_f32().unwrap()
}
