//! What will be written: every tensor of the output with its origin, known before anything is computed.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use moe_merge_checkpoint::weight::{OwnedWeight, Stacked};
use moe_merge_checkpoint::{CheckpointError, Dtype, Source, WeightRef};
use serde_json::{Map, Value};

use crate::compose::{Adjusted, SideBySide, rounded};
use crate::config_out::moe_config;
use crate::error::MergeError;
use crate::families::{
    Dims, Layout, Matrix, OutputFamily, Request, Shape, SharedGate, check_sources, dense_name,
    is_derived, mlp_weight, unused_tensors, warn_about_sources,
};

/// One expert as the recipe describes it.
#[derive(Debug, Clone)]
pub struct ExpertInput {
    /// Where its MLPs come from.
    pub source: Source,
    /// Its name in reports.
    pub name: String,
    /// Layers in which it is itself; elsewhere it is the base's MLP. `None`: all.
    pub layers: Option<Range<usize>>,
    /// Standard deviation of normal noise on all three matrices; 0 for none.
    pub noise_scale: f32,
    /// Factor on the down projection; 1 for none.
    pub residual_scale: f32,
}

/// Everything a MoE is made of but its routers.
#[derive(Debug, Clone)]
pub struct Assembly {
    /// Donor of embeddings, attention, norms and head.
    pub base: Source,
    /// Routed experts, index = position.
    pub experts: Vec<ExpertInput>,
    /// Experts that every token passes through.
    pub shared: Vec<ExpertInput>,
    /// Whether a gate for the shared expert will be computed.
    pub shared_gate: SharedGate,
    /// Experts per token.
    pub top_k: usize,
    /// How numbers are stored; `None`: as the base's configuration says, else as its embedding is stored.
    pub dtype: Option<Dtype>,
    /// What kind of MoE; see [`crate::families::select`].
    pub family: &'static dyn OutputFamily,
    /// How experts lie on disk.
    pub layout: Layout,
    /// Seed of the noise.
    pub seed: u64,
}

impl Assembly {
    /// The sources alone, for [`crate::families::select`] and the checks.
    pub fn request(&self) -> Request<'_> {
        Request {
            base: &self.base,
            experts: self.experts.iter().map(|e| &e.source).collect(),
            shared: self.shared.iter().map(|e| &e.source).collect(),
            shared_gate: self.shared_gate,
        }
    }

    /// Base, experts, shared experts, each with what it is there.
    pub fn sources(&self) -> Vec<(String, &Source)> {
        let mut all = vec![("base".to_owned(), &self.base)];
        all.extend(
            self.experts.iter().enumerate().map(|(i, e)| (format!("expert {i}"), &e.source)),
        );
        all.extend(self.shared.iter().enumerate().map(|(i, e)| (format!("shared {i}"), &e.source)));
        all
    }
}

impl Assembly {
    /// The same with one expert for all tokens. It is there twice, as a MoE has at least two experts, and every token visits
    /// both: their weights sum to 1, whatever the router.
    ///
    /// # Errors
    /// [`CheckpointError`] for a matrix that is missing or has the wrong shape.
    pub(crate) fn forced(&self, expert: usize) -> Result<Self, MergeError> {
        let dims = Dims::of(&self.base)?;
        let input = &self.experts[expert];
        let mut source = input.source.clone();
        for layer in 0..dims.layers {
            for matrix in Matrix::ALL {
                // Under its old number: noise is keyed by it.
                let which = format!("experts.{expert}");
                let (weight, _) = expert_weight(self, &dims, input, &which, layer, matrix)?;
                source.tensors.insert(dense_name(layer, matrix), weight);
            }
        }
        let name = input.name.clone();
        let alone =
            ExpertInput { source, name, layers: None, noise_scale: 0.0, residual_scale: 1.0 };
        Ok(Self { experts: vec![alone.clone(), alone], top_k: 2, ..self.clone() })
    }
}

/// Which file a tensor goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// What all tokens pass through: embeddings, attention, norms, shared experts.
    Shared,
    /// The MLPs of one expert.
    Expert(usize),
    /// The MLPs of all experts together (fused layout).
    Experts,
    /// The routers.
    Router,
}

impl Role {
    /// The beginning of the file's name. It starts with `model`, as llama.cpp's converter looks for no other.
    pub fn stem(self) -> String {
        match self {
            Role::Shared => "model-shared".into(),
            Role::Expert(e) => format!("model-expert-{e:02}"),
            Role::Experts => "model-experts".into(),
            Role::Router => "model-router".into(),
        }
    }
}

/// Where the numbers of an output tensor come from.
#[derive(Debug, Clone)]
pub enum Content {
    /// A weight that is there already.
    Weight(WeightRef),
    /// The router of a layer, `[experts, hidden]`.
    Router(usize),
    /// The gate of the shared expert of a layer, `[1, hidden]`.
    SharedGate(usize),
}

/// One tensor of the output.
#[derive(Debug, Clone)]
pub struct PlannedTensor {
    /// Its name.
    pub name: String,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub dtype: Dtype,
    /// Its file.
    pub role: Role,
    /// Label of the source it comes from, or what computes it.
    pub from: String,
    /// Its numbers.
    pub content: Content,
}

impl PlannedTensor {
    /// Bytes it takes on disk.
    pub fn size(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.dtype.size() as u64
    }
}

/// What will be written.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Sizes and counts.
    pub shape: Shape,
    /// How most numbers are stored.
    pub dtype: Dtype,
    /// Every tensor.
    pub tensors: Vec<PlannedTensor>,
    /// `config.json`.
    pub config: Map<String, Value>,
    /// Bytes on disk: tensors, headers and side files.
    pub disk_bytes: u64,
    /// Bytes of memory that writing takes at most, routers included; the probe's layer is not.
    pub peak_memory: u64,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// Memory of one writing thread: blocks of values and of output.
const THREAD_MEMORY: u64 = 16 << 20;

/// Bytes kept for headers, index, manifest, card.
const SMALL_FILES: u64 = 1 << 20;

impl Plan {
    /// Checks the sources of `assembly` against each other and lists the output.
    ///
    /// # Errors
    /// [`MergeError::Incompatible`] naming both sources, [`CheckpointError`] for a tensor of the base that is missing or has
    /// the wrong shape.
    pub fn new(assembly: &Assembly) -> Result<Self, MergeError> {
        let request = assembly.request();
        assembly.family.accepts(&request)?;
        let dims = check_sources(&request)?;
        check_assembly(assembly, &dims)?;
        let dtype = assembly.dtype.or(assembly.base.config.dtype()).unwrap_or(Dtype::BF16);
        let shape = Shape {
            dims,
            experts: assembly.experts.len(),
            shared: assembly.shared.len(),
            top_k: assembly.top_k,
        };
        let mut builder = Builder { assembly, shape, dtype, tensors: Vec::new() };
        let mut warnings = warn_about_sources(&request);
        warnings.extend(builder.base()?);
        for layer in 0..dims.layers {
            builder.experts(layer)?;
            builder.shared(layer)?;
            builder.routers(layer);
        }
        let mut tensors = builder.tensors;
        tensors.sort_by(|a, b| a.role.cmp(&b.role).then_with(|| a.name.cmp(&b.name)));
        let bytes: u64 = tensors.iter().map(PlannedTensor::size).sum();
        let side: u64 = assembly.base.side.iter().map(side_size).sum();
        let names: u64 = tensors.iter().map(|t| 2 * t.name.len() as u64 + 200).sum();
        let gates = 4 * (dims.layers * dims.hidden * (shape.experts + shape.shared)) as u64;
        Ok(Self {
            shape,
            dtype,
            config: moe_config(&assembly.base.config, assembly.family, &shape, dtype),
            disk_bytes: bytes + side + names + SMALL_FILES,
            peak_memory: THREAD_MEMORY * rayon::current_num_threads() as u64 + 2 * gates,
            tensors,
            warnings,
        })
    }
}

impl Plan {
    /// The model that the plan describes, as if it had been written with routers of zeros: nothing is copied, weights that are
    /// computed are computed when they are read.
    pub fn source(&self, assembly: &Assembly) -> Source {
        let tensors = self.tensors.iter().map(|tensor| {
            let weight = match &tensor.content {
                Content::Weight(weight) => weight.clone(),
                Content::Router(_) | Content::SharedGate(_) => {
                    Arc::new(OwnedWeight::zeros(&tensor.name, &tensor.shape, Dtype::F32))
                }
            };
            (tensor.name.clone(), weight)
        });
        Source {
            label: "the merged model".into(),
            config: moe_merge_checkpoint::ConfigJson(self.config.clone()),
            tensors: tensors.collect(),
            other: Vec::new(),
            files: Vec::new(),
            notes: Vec::new(),
            ..assembly.base.clone()
        }
    }
}

impl Plan {
    /// [`Plan::source`] with routers, every number rounded as it will be in the folder.
    ///
    /// # Errors
    /// As [`Gates::check`].
    pub fn source_with(&self, assembly: &Assembly, gates: &Gates) -> Result<Source, MergeError> {
        gates.check(self)?;
        let mut source = self.source(assembly);
        source.tensors = self
            .tensors
            .iter()
            .map(|t| (t.name.clone(), rounded(crate::write::numbers(t, gates), t.dtype)))
            .collect();
        Ok(source)
    }
}

fn side_size(file: &moe_merge_checkpoint::SideFile) -> u64 {
    match &file.content {
        moe_merge_checkpoint::SideContent::File(path) => {
            std::fs::metadata(path).map_or(0, |m| m.len())
        }
        moe_merge_checkpoint::SideContent::Bytes(bytes) => bytes.len() as u64,
    }
}

/// Counts, layer ranges and the layout.
fn check_assembly(assembly: &Assembly, dims: &Dims) -> Result<(), MergeError> {
    let family = assembly.family.name();
    let fail = |what: String, second: &str, expected: String, found: String, hint: &str| {
        Err(MergeError::Incompatible {
            what,
            first: assembly.base.label.clone(),
            second: second.into(),
            expected,
            found,
            hint: hint.into(),
            recipe: None,
        })
    };
    let count = assembly.experts.len();
    if count < 2 {
        let hint = "list at least two under `experts`";
        return fail(
            "a MoE needs experts".into(),
            family,
            "2 or more".into(),
            count.to_string(),
            hint,
        );
    }
    if assembly.top_k == 0 || assembly.top_k > count {
        return fail(
            "`experts_per_token` does not fit the number of experts".into(),
            family,
            format!("1 to {count}"),
            assembly.top_k.to_string(),
            "lower `experts_per_token`, or add experts",
        );
    }
    if assembly.layout == Layout::Fused && !assembly.family.has_fused() {
        return fail(
            format!("`{family}` has no fused layout"),
            family,
            "`--layout hub`".into(),
            "`--layout fused`".into(),
            "leave `--layout` out",
        );
    }
    for expert in assembly.experts.iter().chain(&assembly.shared) {
        if let Some(range) = &expert.layers
            && (range.start >= range.end || range.end > dims.layers)
        {
            return fail(
                format!("`layers` of expert `{}` is no range of layers", expert.name),
                &expert.source.label,
                format!("[a, b] with 0 <= a < b <= {}", dims.layers),
                format!("[{}, {}]", range.start, range.end),
                "the second number is one above the last layer",
            );
        }
    }
    Ok(())
}

struct Builder<'a> {
    assembly: &'a Assembly,
    shape: Shape,
    dtype: Dtype,
    tensors: Vec<PlannedTensor>,
}

impl Builder<'_> {
    fn push(&mut self, name: String, role: Role, dtype: Dtype, from: String, weight: WeightRef) {
        let shape = weight.shape().to_vec();
        let content = Content::Weight(weight);
        self.tensors.push(PlannedTensor { name, shape, dtype, role, from, content });
    }

    /// Everything of the base but its MLPs; returns a warning for what is left over.
    fn base(&mut self) -> Result<Vec<String>, MergeError> {
        let (assembly, dims) = (self.assembly, self.shape.dims);
        let base = &assembly.base;
        let tied = base.config.bool("tie_word_embeddings").unwrap_or(false);
        let mut used: BTreeSet<String> = BTreeSet::new();
        for (name, shape) in base_tensors(&dims, base, tied) {
            let weight = base.weight(&name)?;
            weight.expect_shape(&shape, "from the sizes in config.json")?;
            let weight = assembly.family.attention(&name, weight.clone(), &dims);
            used.insert(name.clone());
            self.push(name, Role::Shared, self.dtype, base.label.clone(), weight);
        }
        for layer in 0..dims.layers {
            used.extend(Matrix::ALL.map(|m| dense_name(layer, m)));
            for addition in assembly.family.additions(layer, &self.shape, base, self.dtype) {
                let from = "zeros".to_owned();
                self.push(addition.name, Role::Shared, addition.dtype, from, addition.weight);
            }
        }
        let left: Vec<&String> = base
            .tensors
            .keys()
            .chain(base.other.iter().map(|o| &o.name))
            .filter(|name| !used.contains(*name) && !is_derived(name))
            .collect();
        Ok(unused_tensors(&base.label, &left).into_iter().collect())
    }

    fn experts(&mut self, layer: usize) -> Result<(), MergeError> {
        let (assembly, dims) = (self.assembly, self.shape.dims);
        let stacked = assembly.family.stacked(layer, assembly.layout);
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for (e, input) in assembly.experts.iter().enumerate() {
            for matrix in Matrix::ALL {
                let (weight, from) =
                    expert_weight(assembly, &dims, input, &format!("experts.{e}"), layer, matrix)?;
                match (&stacked, matrix) {
                    (None, _) => {
                        let name = assembly.family.expert(layer, e, matrix);
                        self.push(name, Role::Expert(e), self.dtype, from, weight);
                    }
                    (Some(_), Matrix::Down) => down.push(weight),
                    (Some(_), _) => gate_up.push(weight),
                }
            }
        }
        if let Some([gate_up_name, down_name]) = stacked {
            let (count, inner, hidden) = (self.shape.experts, dims.intermediate, dims.hidden);
            for (name, parts, shape) in [
                (gate_up_name, gate_up, vec![count, 2 * inner, hidden]),
                (down_name, down, vec![count, hidden, inner]),
            ] {
                let weight = Arc::new(Stacked::new(parts, shape));
                self.push(name, Role::Experts, self.dtype, "all experts".into(), weight);
            }
        }
        Ok(())
    }

    fn shared(&mut self, layer: usize) -> Result<(), MergeError> {
        let assembly = self.assembly;
        if assembly.shared.is_empty() {
            return Ok(());
        }
        let dims = self.shape.dims;
        let (hidden, inner) = (dims.hidden, dims.intermediate);
        let rows = assembly.shared.len() * inner;
        let stacked = assembly.family.stacked_shared(layer);
        let mut gate = None;
        for matrix in Matrix::ALL {
            let mut parts = Vec::new();
            let mut labels = Vec::new();
            for (i, input) in assembly.shared.iter().enumerate() {
                let (weight, from) =
                    expert_weight(assembly, &dims, input, &format!("shared.{i}"), layer, matrix)?;
                parts.push(weight);
                labels.push(from);
            }
            let weight = match (parts.len(), matrix) {
                (1, _) => parts.remove(0),
                (_, Matrix::Down) => Arc::new(SideBySide::new(parts)),
                _ => Arc::new(Stacked::new(parts, vec![rows, hidden])) as WeightRef,
            };
            let (name, weight) = match (&stacked, matrix) {
                (None, _) => match assembly.family.shared(layer, matrix) {
                    Some(name) => (name, weight),
                    None => continue,
                },
                (Some(_), Matrix::Gate) => {
                    gate = Some(weight);
                    continue;
                }
                (Some([gate_up, _]), Matrix::Up) => {
                    let parts = gate.take().into_iter().chain([weight]).collect();
                    let both = Arc::new(Stacked::new(parts, vec![2 * rows, hidden]));
                    (gate_up.clone(), both as WeightRef)
                }
                (Some([_, down]), Matrix::Down) => (down.clone(), weight),
            };
            self.push(name, Role::Shared, self.dtype, labels.join(" + "), weight);
        }
        Ok(())
    }

    fn routers(&mut self, layer: usize) {
        let (assembly, hidden) = (self.assembly, self.shape.dims.hidden);
        let dtype = assembly.family.router_dtype().unwrap_or(self.dtype);
        self.tensors.push(PlannedTensor {
            name: assembly.family.router(layer, assembly.layout),
            shape: vec![self.shape.experts, hidden],
            dtype,
            role: Role::Router,
            from: "router".into(),
            content: Content::Router(layer),
        });
        if let Some(name) = assembly.family.shared_gate(layer) {
            self.tensors.push(PlannedTensor {
                name,
                shape: vec![1, hidden],
                dtype,
                role: Role::Router,
                from: "router".into(),
                content: Content::SharedGate(layer),
            });
        }
    }
}

/// One matrix of one expert, with its noise and scale, and the label of its source.
fn expert_weight(
    assembly: &Assembly,
    dims: &Dims,
    input: &ExpertInput,
    which: &str,
    layer: usize,
    matrix: Matrix,
) -> Result<(WeightRef, String), MergeError> {
    let base = &assembly.base;
    if input.layers.as_ref().is_some_and(|r| !r.contains(&layer)) {
        let weight = mlp_weight(base, base, dims, layer, matrix)?;
        return Ok((weight, base.label.clone()));
    }
    let weight = mlp_weight(base, &input.source, dims, layer, matrix)?;
    let scale = if matrix == Matrix::Down { input.residual_scale } else { 1.0 };
    let label = input.source.label.clone();
    if input.noise_scale == 0.0 && scale == 1.0 {
        return Ok((weight, label));
    }
    let key = format!("{which}.layers.{layer}.{}", matrix.name());
    Ok((Arc::new(Adjusted::new(weight, assembly.seed, &key, input.noise_scale, scale)), label))
}

/// Names and shapes of what a llama-like model has outside its MLPs. Biases and head norms are there if the first layer has
/// them; a layer that then lacks one is an error.
fn base_tensors(dims: &Dims, base: &Source, tied: bool) -> Vec<(String, Vec<usize>)> {
    let (q, kv) = (dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim);
    let mut all = vec![
        ("model.embed_tokens.weight".to_owned(), vec![dims.vocab, dims.hidden]),
        ("model.norm.weight".to_owned(), vec![dims.hidden]),
    ];
    if !tied {
        all.push(("lm_head.weight".to_owned(), vec![dims.vocab, dims.hidden]));
    }
    let always = [
        ("input_layernorm.weight", vec![dims.hidden]),
        ("post_attention_layernorm.weight", vec![dims.hidden]),
        ("self_attn.q_proj.weight", vec![q, dims.hidden]),
        ("self_attn.k_proj.weight", vec![kv, dims.hidden]),
        ("self_attn.v_proj.weight", vec![kv, dims.hidden]),
        ("self_attn.o_proj.weight", vec![dims.hidden, q]),
    ];
    let optional = [
        ("self_attn.q_proj.bias", vec![q]),
        ("self_attn.k_proj.bias", vec![kv]),
        ("self_attn.v_proj.bias", vec![kv]),
        ("self_attn.q_norm.weight", vec![dims.head_dim]),
        ("self_attn.k_norm.weight", vec![dims.head_dim]),
    ];
    let there = optional
        .into_iter()
        .filter(|(name, _)| base.tensors.contains_key(&format!("model.layers.0.{name}")));
    let per_layer: Vec<(&str, Vec<usize>)> = always.into_iter().chain(there).collect();
    for layer in 0..dims.layers {
        let named = per_layer.iter().map(|(n, s)| (format!("model.layers.{layer}.{n}"), s.clone()));
        all.extend(named);
    }
    all
}

/// The routers of a MoE.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Gates {
    /// Per layer `[experts, hidden]`.
    pub layers: Vec<Vec<f32>>,
    /// Per layer `[1, hidden]`, if the shared expert has a gate.
    pub shared: Option<Vec<Vec<f32>>>,
}

impl Gates {
    /// Checks the lengths against a plan.
    ///
    /// # Errors
    /// [`CheckpointError::Shape`] naming the tensor whose numbers do not fit.
    pub fn check(&self, plan: &Plan) -> Result<(), MergeError> {
        for tensor in &plan.tensors {
            let values = match tensor.content {
                Content::Weight(_) => continue,
                Content::Router(layer) => self.layers.get(layer),
                Content::SharedGate(layer) => self.shared.as_ref().and_then(|s| s.get(layer)),
            };
            let found = values.map_or(0, Vec::len);
            if found != tensor.shape.iter().product::<usize>() {
                return Err(MergeError::Checkpoint(CheckpointError::Shape {
                    file: "(computed)".into(),
                    tensor: tensor.name.clone(),
                    expected: format!("{:?} (experts, hidden_size)", tensor.shape),
                    found: vec![found],
                }));
            }
        }
        Ok(())
    }
}
