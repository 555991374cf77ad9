use std::path::Path;

use moe_merge_checkpoint::{Interrupt, Replace, SourceRef};

use super::*;
use crate::families::{Layout, Matrix, OUTPUTS, SharedGate};
use crate::plan::ExpertInput;

fn open(path: &Path) -> Source {
    let text = path.display().to_string();
    Source::open(&text.parse::<SourceRef>().unwrap(), Path::new("/")).unwrap()
}

fn input(source: Source, name: &str) -> ExpertInput {
    ExpertInput { source, name: name.into(), layers: None, noise_scale: 0.0, residual_scale: 1.0 }
}

/// The golden models of one kind as a MoE.
fn assembly(golden: &Path, kind: &str, family: &str, shared: usize, layout: Layout) -> Assembly {
    let model = |name: &str| open(&golden.join(kind).join(name));
    Assembly {
        base: model("base"),
        experts: ["prose", "code", "math"].map(|n| input(model(n), n)).into(),
        shared: ["base", "prose"][..shared].iter().map(|n| input(model(n), n)).collect(),
        shared_gate: if family == "qwen2_moe" { SharedGate::Computed } else { SharedGate::Absent },
        top_k: 2,
        dtype: None,
        family: *OUTPUTS.iter().find(|f| f.name() == family).unwrap(),
        layout,
        seed: 1,
    }
}

fn gates(plan: &Plan) -> Gates {
    let dims = plan.shape.dims;
    let values = |n: usize| (0..n).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<_>>();
    Gates {
        layers: vec![values(plan.shape.experts * dims.hidden); dims.layers],
        shared: Some(vec![values(dims.hidden); dims.layers]),
    }
}

fn build(assembly: &Assembly, target: &Path) -> Result<(Plan, Written), MergeError> {
    let plan = Plan::new(assembly)?;
    let staging = Staging::new(target, Replace::Never)?;
    let watch = Watch { interrupt: &Interrupt::default(), progress: &|_| {} };
    let provenance = Provenance {
        name: "test".into(),
        recipe: Some("base_model: x\n".into()),
        dialect: Dialect::MergekitMoe,
        gate_mode: Some("hidden".into()),
        ..Provenance::default()
    };
    let written = write(assembly, &plan, &gates(&plan), &provenance, &staging, watch)?;
    staging.publish()?;
    Ok((plan, written))
}

fn values(source: &Source, name: &str) -> Vec<f32> {
    source.weight(name).unwrap().to_f32().unwrap()
}

#[test]
fn every_family_holds_what_went_in() {
    let Some(golden) = moe_merge_testkit::shared("golden/moe") else { return };
    let dir = tempfile::tempdir().unwrap();
    for (kind, family, shared) in [
        ("llama", "mixtral", 0),
        ("mistral", "mixtral", 0),
        ("qwen3", "qwen3_moe", 0),
        ("qwen2", "qwen2_moe", 1),
        ("llama", "qwen2_moe", 1),
        ("llama", "deepseek", 2),
        ("llama", "ernie4_5_moe", 0),
        ("llama", "ernie4_5_moe", 2),
    ] {
        let target = dir.path().join(format!("{kind}-{family}-{shared}"));
        let assembly = assembly(&golden, kind, family, shared, Layout::Hub);
        let (plan, written) = build(&assembly, &target).unwrap();
        let out = open(&target);
        assert_eq!(out.tensors.len(), plan.tensors.len(), "{family}");
        for (e, expert) in assembly.experts.iter().enumerate() {
            for matrix in Matrix::ALL {
                let name = assembly.family.expert(2, e, matrix);
                let from = crate::families::dense_name(2, matrix);
                assert_eq!(values(&out, &name), values(&expert.source, &from), "{family} {name}");
            }
        }
        let v = "model.layers.1.self_attn.v_proj.weight";
        assert_eq!(values(&out, v), values(&assembly.base, v));
        let manifest = Manifest::load(&target).unwrap().unwrap();
        assert_eq!(manifest.check(&target, &Interrupt::default()).unwrap(), []);
        assert_eq!(manifest.files, written.files);
        assert!(written.bytes <= plan.disk_bytes, "{} > {}", written.bytes, plan.disk_bytes);
        for name in
            ["README.md", "moe-merge.yaml", "mergekit_moe_config.yml", "generation_config.json"]
        {
            assert!(target.join(name).is_file(), "{family} {name}");
        }
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            assert_eq!(
                std::fs::read(target.join(file)).unwrap(),
                std::fs::read(golden.join(kind).join("base").join(file)).unwrap()
            );
        }
        let text = std::fs::read_to_string(target.join(".moe-merge/manifest.json")).unwrap();
        assert!(!text.contains(golden.to_str().unwrap()), "a path of this machine in the manifest");
    }
}

#[test]
fn one_file_per_role_and_the_same_bytes_again() {
    let Some(golden) = moe_merge_testkit::shared("golden/moe") else { return };
    let dir = tempfile::tempdir().unwrap();
    let assembly = assembly(&golden, "llama", "mixtral", 0, Layout::Hub);
    let run = |name: &str, threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| build(&assembly, &dir.path().join(name))).unwrap().1
    };
    let one = run("one", 1);
    assert_eq!(one, run("two", 2));
    let stems: Vec<&str> = one
        .files
        .iter()
        .filter_map(|f| f.name.strip_suffix(".safetensors")?.rsplit_once('-').map(|(s, _)| s))
        .collect();
    let experts = ["model-expert-00", "model-expert-01", "model-expert-02"];
    assert_eq!(stems, [&experts[..], &["model-router", "model-shared"]].concat());
    let read =
        |n: &str| std::fs::read(dir.path().join(n).join(".moe-merge/journal.jsonl")).unwrap();
    assert_eq!(read("one"), read("two"));
}

#[test]
fn layers_noise_and_residual_scale() {
    let Some(golden) = moe_merge_testkit::shared("golden/moe") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut assembly = assembly(&golden, "llama", "mixtral", 0, Layout::Hub);
    assembly.experts[0].layers = Some(1..3);
    assembly.experts[1].residual_scale = 0.5;
    assembly.experts[2].noise_scale = 0.01;
    build(&assembly, &dir.path().join("m")).unwrap();
    let out = open(&dir.path().join("m"));
    let expert = |layer, e, m| values(&out, &assembly.family.expert(layer, e, m));
    let dense = |s: &Source, layer, m| values(s, &crate::families::dense_name(layer, m));
    assert_eq!(expert(0, 0, Matrix::Up), dense(&assembly.base, 0, Matrix::Up));
    assert_eq!(expert(1, 0, Matrix::Up), dense(&assembly.experts[0].source, 1, Matrix::Up));
    let half: Vec<f32> =
        dense(&assembly.experts[1].source, 0, Matrix::Down).iter().map(|v| v * 0.5).collect();
    assert_eq!(expert(0, 1, Matrix::Down), half);
    assert_eq!(expert(0, 1, Matrix::Up), dense(&assembly.experts[1].source, 0, Matrix::Up));
    let (noisy, plain) =
        (expert(0, 2, Matrix::Up), dense(&assembly.experts[2].source, 0, Matrix::Up));
    let rms = (noisy.iter().zip(&plain).map(|(a, b)| (a - b).powi(2)).sum::<f32>()
        / plain.len() as f32)
        .sqrt();
    assert!((rms - 0.01).abs() < 0.001, "{rms}");
}

#[test]
fn the_fused_layout_stacks_gate_above_up() {
    let Some(golden) = moe_merge_testkit::shared("golden/moe") else { return };
    let assembly = assembly(&golden, "llama", "mixtral", 0, Layout::Fused);
    let plan = Plan::new(&assembly).unwrap();
    let tensor =
        plan.tensors.iter().find(|t| t.name.ends_with("0.mlp.experts.gate_up_proj")).unwrap();
    assert_eq!(tensor.shape, [3, 80, 32]);
    let Content::Weight(weight) = &tensor.content else { panic!("a weight") };
    let all = weight.to_f32().unwrap();
    let second = &assembly.experts[1].source;
    assert_eq!(all[80 * 32..120 * 32], values(second, "model.layers.0.mlp.gate_proj.weight"));
    assert_eq!(all[120 * 32..160 * 32], values(second, "model.layers.0.mlp.up_proj.weight"));
    let deepseek = super::tests::assembly(&golden, "llama", "deepseek", 0, Layout::Fused);
    assert!(Plan::new(&deepseek).unwrap_err().to_string().contains("no fused layout"));
}

#[test]
fn bad_counts_gates_and_interruptions_leave_nothing() {
    let Some(golden) = moe_merge_testkit::shared("golden/moe") else { return };
    let mut bad = assembly(&golden, "llama", "mixtral", 0, Layout::Hub);
    bad.top_k = 4;
    assert!(Plan::new(&bad).unwrap_err().to_string().contains("experts_per_token"));
    bad.top_k = 2;
    bad.experts[0].layers = Some(2..4);
    assert!(Plan::new(&bad).unwrap_err().to_string().contains("`layers` of expert `prose`"));
    bad.experts[0].layers = None;
    let plan = Plan::new(&bad).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let attempt = |gates: &Gates, interrupt: &Interrupt| {
        let staging = Staging::new(&dir.path().join("m"), Replace::Never).unwrap();
        let watch = Watch { interrupt, progress: &|_| {} };
        write(&bad, &plan, gates, &Provenance::default(), &staging, watch).unwrap_err()
    };
    let wrong = attempt(&Gates::default(), &Interrupt::default());
    assert!(matches!(wrong, MergeError::Checkpoint(CheckpointError::Shape { .. })), "{wrong:?}");
    let interrupt = Interrupt::default();
    interrupt.trigger();
    let stopped = attempt(&gates(&plan), &interrupt);
    assert!(matches!(stopped, MergeError::Checkpoint(CheckpointError::Interrupted)), "{stopped:?}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_dense_model_comes_out_as_it_went_in() {
    let Some(golden) = moe_merge_testkit::shared("golden/moe") else { return };
    let dir = tempfile::tempdir().unwrap();
    let source = open(&golden.join("llama/base"));
    let target = dir.path().join("m");
    let staging = Staging::new(&target, Replace::Never).unwrap();
    let watch = Watch { interrupt: &Interrupt::default(), progress: &|_| {} };
    let inputs = [("model 0".to_owned(), &source)];
    write_dense(&source, &inputs, None, &Provenance::default(), &staging, watch).unwrap();
    staging.publish().unwrap();
    let out = open(&target);
    assert!(target.join("model.safetensors").is_file());
    for (name, weight) in &source.tensors {
        assert_eq!(out.tensors[name].bytes(), weight.bytes(), "{name}");
    }
    assert_eq!(out.config.str("torch_dtype"), Some("float32"));
}
