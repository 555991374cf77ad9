//! A model whose every token has the same bits, whatever goes through beside it.

use moe_merge_kernels::Batching;

use crate::cache::{Cache, LayerCache};
use crate::error::ModelError;
use crate::model::{LogitRows, Model, Watch};
use crate::spec::Spec;

/// A model as a server runs it: prompts in pieces of any size, further tokens of many sequences together. What a sequence
/// gets depends on its own tokens only, to the bit: neither on the pieces nor on the other sequences.
///
/// The two views share all weights.
#[derive(Debug, Clone)]
pub struct Steady {
    prompts: Model,
    next: Model,
}

impl Steady {
    /// Over the weights of `model`.
    pub fn new(model: &Model) -> Self {
        Self { prompts: model.batched(Batching::Together), next: model.batched(Batching::Alone) }
    }

    /// The model, for caches and sizes.
    pub fn model(&self) -> &Model {
        &self.next
    }

    /// What the model is made of.
    pub fn spec(&self) -> &Spec {
        self.next.spec()
    }

    /// A piece of a prompt, whose tokens follow those in `cache`; returns what `rows` says.
    ///
    /// # Errors
    /// As [`Model::forward`]; the cache is then as before.
    pub fn prompt(
        &self,
        tokens: &[u32],
        cache: &mut Cache,
        rows: LogitRows,
        watch: Option<&mut Watch<'_>>,
    ) -> Result<Vec<f32>, ModelError> {
        self.prompts.forward_watched(tokens, cache, rows, watch)
    }

    /// One more token for each of several sequences.
    ///
    /// * `tokens`, `caches`: one of each for every sequence
    /// * returns `[sequences, vocab]`
    ///
    /// # Errors
    /// As [`Model::forward`]; all caches are then as before.
    pub fn next(
        &self,
        tokens: &[u32],
        caches: &mut [&mut Cache],
        watch: Option<&mut Watch<'_>>,
    ) -> Result<Vec<f32>, ModelError> {
        if tokens.is_empty() {
            return Ok(Vec::new());
        }
        caches.iter().try_for_each(|cache| cache.check(1))?;
        let lens: Vec<usize> = caches.iter().map(|cache| cache.len()).collect();
        let mut layers: Vec<Vec<&mut LayerCache>> =
            self.spec().layers.iter().map(|_| Vec::new()).collect();
        for cache in caches.iter_mut() {
            for (layer, kept) in layers.iter_mut().zip(&mut cache.layers) {
                layer.push(kept);
            }
        }
        let rows: Vec<u32> = (0..tokens.len() as u32).collect();
        let logits = self.next.forward_lanes(tokens, &lens, layers, &rows, watch)?;
        caches.iter_mut().for_each(|cache| cache.advance(1));
        Ok(logits)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use moe_merge_checkpoint::Source;
    use moe_merge_kernels::Exec;

    use super::*;
    use crate::model::Visited;
    use crate::placement::Placement;

    const FAMILIES: &[&str] =
        &["mixtral_fused", "deepseek_v2_yarn", "granitemoeshared", "ernie4_5_moe"];

    fn source(name: &str) -> Source {
        let folder = moe_merge_testkit::repository("model/tests/data").join(name);
        Source::open(&folder.display().to_string().parse().unwrap(), Path::new(".")).unwrap()
    }

    fn open(name: &str, exec: Exec) -> Steady {
        Steady::new(&Model::open_with(&source(name), exec).unwrap())
    }

    fn text(seed: u32, tokens: u32) -> Vec<u32> {
        (0..tokens).map(|i| (i * 7 + seed * 13 + 3) % 30).collect()
    }

    /// Logits after the prompt, taken in pieces of `piece` tokens, and after each of `next`.
    fn alone(model: &Steady, prompt: &[u32], piece: usize, next: &[u32]) -> Vec<Vec<f32>> {
        let mut cache = Cache::new(model.model(), prompt.len() + next.len());
        let mut logits = Vec::new();
        for piece in prompt.chunks(piece) {
            logits = model.prompt(piece, &mut cache, LogitRows::Last, None).unwrap();
        }
        let mut all = vec![logits];
        for &token in next {
            all.push(model.next(&[token], &mut [&mut cache], None).unwrap());
        }
        all
    }

    /// Prompts of lengths around the block sizes of the kernels, in pieces and with others beside them.
    fn stays_the_same(model: &Steady, what: &str, lengths: &[u32]) {
        let prompts: Vec<Vec<u32>> = lengths.iter().map(|&n| text(n, n)).collect();
        let next: Vec<Vec<u32>> = (0..lengths.len() as u32).map(|i| text(50 + i, 6)).collect();
        let wanted: Vec<Vec<Vec<f32>>> =
            prompts.iter().zip(&next).map(|(p, n)| alone(model, p, 1000, n)).collect();
        for piece in [1, 7, 32] {
            for (prompt, wanted) in prompts.iter().zip(&wanted) {
                let found = alone(model, prompt, piece, &[]);
                assert_eq!(found[0], wanted[0], "{what}: {} in {piece}", prompt.len());
            }
        }
        let mut caches: Vec<Cache> = Vec::new();
        for prompt in &prompts {
            let mut cache = Cache::new(model.model(), prompt.len() + 6);
            model.prompt(prompt, &mut cache, LogitRows::Skip, None).unwrap();
            caches.push(cache);
        }
        for step in 0..6 {
            let tokens: Vec<u32> = next.iter().map(|n| n[step]).collect();
            let mut lanes: Vec<&mut Cache> = caches.iter_mut().collect();
            let logits = model.next(&tokens, &mut lanes, None).unwrap();
            for (i, row) in logits.chunks_exact(model.spec().vocab).enumerate() {
                assert_eq!(row, wanted[i][step + 1], "{what}: {i}, token {step}");
            }
        }
    }

    #[test]
    fn neither_pieces_nor_neighbours_change_a_bit() {
        for name in FAMILIES {
            for exec in [Exec::default(), Exec::fast()] {
                let model = open(name, exec);
                stays_the_same(&model, &format!("{name} {exec:?}"), &[1, 2, 3, 4, 5, 33, 100]);
            }
        }
    }

    #[test]
    fn nor_do_they_on_a_device() {
        let Some(device) = moe_merge_kernels::cuda::emulated(false) else { return };
        let placement = Placement::on(device, 0);
        let source = source("mixtral_fused");
        let model = Model::open_on(&source, Exec::default(), &placement).unwrap();
        // The kernels for few tokens take eight, those of experts four.
        stays_the_same(&Steady::new(&model), "on a device", &[1, 2, 3, 5, 9, 17, 4, 8, 6, 7]);
    }

    #[test]
    fn watchers_see_every_layer_and_token() {
        let model = open("mixtral_fused", Exec::default());
        let mut cache = Cache::new(model.model(), 9);
        let mut seen = Vec::new();
        let mut watch = |v: Visited<'_>| {
            assert!(v.entropy() > 0.0 && v.entropy() <= 8.0 * (v.moe.experts as f64).ln() + 1e-9);
            seen.push((v.layer, v.routing.tokens, v.logits.len() / v.moe.experts));
        };
        model.prompt(&text(1, 8), &mut cache, LogitRows::Skip, Some(&mut watch)).unwrap();
        model.next(&[1], &mut [&mut cache], Some(&mut watch)).unwrap();
        let layers = model.spec().layers.len();
        let expected: Vec<_> =
            (0..layers).map(|l| (l, 8, 8)).chain((0..layers).map(|l| (l, 1, 1))).collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_full_cache_refuses_the_batch_and_changes_nothing() {
        let model = open("mixtral_fused", Exec::default());
        let (mut one, mut two) = (Cache::new(model.model(), 3), Cache::new(model.model(), 2));
        for cache in [&mut one, &mut two] {
            model.prompt(&[1, 5], cache, LogitRows::Skip, None).unwrap();
        }
        assert!(model.next(&[1, 1], &mut [&mut one, &mut two], None).is_err());
        assert_eq!((one.len(), two.len()), (2, 2));
    }
}
