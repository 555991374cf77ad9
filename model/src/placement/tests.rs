use std::path::{Path, PathBuf};

use candle_core::{Device as Host, Tensor};
use moe_merge_checkpoint::Source;
use moe_merge_kernels::cuda::emulated;
use moe_merge_kernels::{Exec, ExpertLora, LoraPair};
use moe_merge_testkit::golden::{LOGITS_F32, relative_difference};

use super::*;
use crate::layer::{Changes, Gating, Layer, Wanted};
use crate::model::Tables;
use crate::perplexity::Windows;
use crate::spec::Spec;
use crate::streamed::{TokenText, Watcher, WindowRouting, perplexities};
use crate::weights::Weights;
use crate::{Cache, LogitRows, Model};

#[test]
fn the_processor_is_the_default() {
    let placement = Placement::find(DeviceChoice::default(), 3).unwrap();
    assert!(placement.device_name().is_none() && placement.experts_on_cpu(7));
    let view = MatView::new(&[0; 4], moe_merge_kernels::Dtype::F32, 1, 1).unwrap();
    assert!(placement.linear(view, None, Accuracy::Exact).unwrap().is_none());
    assert!(placement.experts(9, &[], Accuracy::Exact).unwrap().is_none());
}

#[test]
fn a_device_that_is_not_there_matters_only_to_those_who_ask_for_it() {
    let found = Placement::find(DeviceChoice::Auto, 1).unwrap();
    match Placement::find(DeviceChoice::Cuda, 1) {
        Ok(cuda) => {
            assert_eq!(found.device_name(), cuda.device_name());
            assert!(cuda.experts_on_cpu(0) && !cuda.experts_on_cpu(1));
        }
        Err(e) => {
            use moe_merge_checkpoint::{Explain, Kind};
            assert!(found.device_name().is_none());
            assert_eq!(e.kind(), Kind::Usage, "{e}");
            assert!(e.hint().unwrap().contains("--device"));
        }
    }
}

fn source(folder: &Path) -> Source {
    let name = folder.display().to_string();
    Source::open(&name.parse().unwrap(), Path::new(".")).unwrap()
}

/// One checkpoint of every architecture: of the shared ones, if they are here, and our own.
fn architectures() -> Vec<PathBuf> {
    let shared = moe_merge_testkit::shared("golden/arch").into_iter();
    let shared = shared.flat_map(|root| std::fs::read_dir(root).unwrap());
    let mut folders: Vec<_> = shared.map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    let own = ["deepseek_v2_yarn", "ernie4_5_moe", "granitemoeshared", "mixtral_fused"];
    let data = moe_merge_testkit::repository("model/tests/data");
    folders.extend(own.map(|name| data.join(name)));
    folders.sort();
    folders
}

fn close(what: &str, found: &[f32], wanted: &[f32]) {
    let wide: Vec<f64> = wanted.iter().map(|v| f64::from(*v)).collect();
    let difference = relative_difference(found, &wide);
    assert!(difference <= LOGITS_F32, "{what}: relative difference {difference:e}");
}

#[test]
fn every_architecture_gives_the_same_logits_on_a_device() {
    for (i, folder) in architectures().into_iter().enumerate() {
        let Some(device) = emulated(i % 2 == 1) else { return };
        let name = folder.display().to_string();
        let source = source(&folder);
        let on_cpu = Model::open(&source).unwrap();
        // With the experts of the first layer on either side.
        let placement = Placement::on(device, i % 3 % 2);
        let on_device = Model::open_on(&source, Exec::default(), &placement).unwrap();
        let tokens: Vec<u32> = (0..11).map(|t| (t * 7 + 3) % on_cpu.spec().vocab as u32).collect();
        let (found, wanted) =
            [&on_device, &on_cpu].map(|m| m.hidden_states(&tokens).unwrap().1).into();
        close(&name, &found, &wanted);
        let steps = [&on_device, &on_cpu].map(|model| {
            let mut cache = Cache::new(model, 16);
            let mut logits = model.forward(&tokens[..9], &mut cache, LogitRows::Last).unwrap();
            logits.extend(model.forward(&tokens[9..10], &mut cache, LogitRows::Last).unwrap());
            logits
        });
        close(&format!("{name} step by step"), &steps[0], &steps[1]);
    }
}

#[test]
fn gradients_go_through_a_device() {
    let rows = [std::ops::Range { start: 0, end: 10 }];
    let positions: Vec<u32> = (0..10).collect();
    for name in ["deepseek_v2_yarn", "granitemoeshared", "mixtral_fused"] {
        let Some(device) = emulated(false) else { return };
        let source = source(&moe_merge_testkit::repository("model/tests/data").join(name));
        let spec = Spec::of(&source).unwrap();
        let weights = Weights::new(&source, &spec).unwrap();
        let layer = spec.layers.len() - 1;
        let wave = |seed: f32| -> Vec<f32> {
            (0..10 * spec.hidden).map(|i| (i as f32 * 0.7 + seed).sin()).collect()
        };
        let tensor = |values| Tensor::from_vec(values, (10, spec.hidden), &Host::Cpu).unwrap();
        let [wanted, found] = [Placement::cpu(), Placement::on(device, 0)].map(|placement| {
            let layer = Layer::load_on(&weights, &spec, layer, &placement).unwrap();
            let mut tables = Tables::new(&positions);
            let (x, table) = (tensor(wave(1.0)), tables.of(layer.rope()));
            let changes = Changes { gating: Gating::Stored, lora: None };
            let pass = layer.forward_trail(&spec, &x, table, &rows, &changes, None);
            let (wanted, along) = (Wanted { input: true, ..Wanted::default() }, (table, &rows[..]));
            let found = layer.backward(&spec, pass.unwrap().1, along, &changes, wanted, wave(2.0));
            found.unwrap().input.unwrap()
        });
        close(name, &found, &wanted);
    }
}

/// The expert that learns stays on the processor, all else is on the device; in a dense model only its factors stay.
#[test]
fn factors_have_the_same_gradients_beside_a_device() {
    let rows = [0..4usize, 4..10];
    let positions: Vec<u32> = rows.iter().cloned().flat_map(|r| 0..r.len() as u32).collect();
    let wave = |n: usize, seed: f32| -> Vec<f32> {
        (0..n).map(|i| 0.3 * (i as f32 * 0.7 + seed).sin()).collect()
    };
    let data = "model/tests/data";
    for (name, expert) in [
        (format!("{data}/granitemoeshared"), 0),
        (format!("{data}/mixtral_fused"), 1),
        ("recipes/qwen3_tiny".into(), 0),
    ] {
        let Some(device) = emulated(true) else { return };
        let folder = moe_merge_testkit::repository(&name);
        let source = source(&folder);
        let spec = Spec::of(&source).unwrap();
        let weights = Weights::new(&source, &spec).unwrap();
        let layer = Layer::load(&weights, &spec, 0).unwrap();
        let inter = layer.mlp_of(&spec, expert).unwrap().0.gate.view().unwrap().rows();
        let (hidden, rank) = (spec.hidden, 2);
        let sizes = [(inter, hidden), (inter, hidden), (hidden, inter)];
        let factors = sizes
            .map(|(out, input)| [wave(rank * input, out as f32), wave(out * rank, input as f32)]);
        let [gate, up, down] = factors
            .each_ref()
            .map(|[a, b]| Some(LoraPair { a, b, rank, scale: 0.5, dropout: None }));
        let lora = Some(ExpertLora { expert, gate, up, down });
        let x = Tensor::from_vec(wave(10 * hidden, 1.0), (10, hidden), &Host::Cpu).unwrap();
        let run = |placement: &Placement| {
            let layer = Layer::load_on(&weights, &spec, 0, placement).unwrap();
            let mut tables = Tables::new(&positions);
            let table = tables.of(layer.rope());
            let changes = Changes { gating: Gating::Stored, lora };
            let pass =
                |known| layer.forward_trail(&spec, &x, table, &rows, &changes, known).unwrap();
            let (passed, trail) = pass(None);
            let wanted = Wanted { input: true, ..Wanted::default() };
            let back = |trail, wanted| {
                let d = wave(10 * hidden, 2.0);
                layer.backward(&spec, trail, (table, &rows[..]), &changes, wanted, d).unwrap()
            };
            let found = back(trail, wanted);
            // Computed again from its input, and without a gradient of that.
            let again = back(pass(passed.routed.as_ref()).1, Wanted::default());
            assert_eq!(again.factors, found.factors);
            let all = found.factors.map(|pair| pair.map(|p| [p.a, p.b].concat()).unwrap());
            let stream = crate::ops::to_vec(&passed.stream).unwrap();
            [vec![stream, found.input.unwrap()], all.to_vec()].concat()
        };
        let (wanted, found) = (run(&Placement::cpu()), run(&Placement::on(device, 0)));
        for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
            assert!(wanted.iter().any(|v| v.abs() > 1e-6), "{name}: {i}");
            close(&format!("{name}: {i}"), found, wanted);
        }
    }
}

#[test]
fn texts_are_scored_the_same_on_a_device() {
    struct Routed(Vec<u32>);
    impl Watcher for Routed {
        fn advance(&mut self, _: usize) {}
        fn routed(&mut self, window: WindowRouting<'_>) {
            self.0.extend(&window.routing.ids);
        }
        fn go_on(&mut self) -> Result<(), ModelError> {
            Ok(())
        }
    }
    let Some(device) = emulated(false) else { return };
    let source = source(&moe_merge_testkit::repository("model/tests/data").join("mixtral_fused"));
    let text = TokenText { tokens: &[1, 5, 7, 9, 2, 8, 3, 4, 6, 5, 9, 1], origin: "t" };
    let windows = Windows { window: 9, stride: None };
    let [wanted, found] = [Placement::cpu(), Placement::on(device, 0)].map(|placement| {
        let mut routed = Routed(Vec::new());
        let scored =
            perplexities(&source, &[text], Some(1), windows, &mut routed, &placement).unwrap();
        (scored[0].nats_per_token(), routed.0)
    });
    assert!((wanted.0 - found.0).abs() < 1e-5, "{} {}", wanted.0, found.0);
    assert!(!found.1.is_empty() && wanted.1 == found.1);
}
