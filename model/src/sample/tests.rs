use std::ops::ControlFlow;
use std::path::Path;

use moe_merge_testkit::golden::{LOGITS_F32, relative_difference};
use moe_merge_testkit::{repository, shared};

use super::*;
use crate::generate::{EndOfText, Generation, generate};
use crate::{Cache, LogitRows};

/// Families with attention, experts and layouts of every kind.
const FAMILIES: &[&str] =
    &["mixtral_fused", "deepseek_v2_yarn", "granitemoeshared", "ernie4_5_moe"];

fn source(path: &Path) -> Source {
    Source::open(&path.display().to_string().parse().unwrap(), Path::new(".")).unwrap()
}

fn family(name: &str) -> Source {
    source(&repository("model/tests/data").join(name))
}

fn warm(seed: u64) -> Sampling {
    Sampling { temperature: 1.0, seed, ..Sampling::default() }
}

fn sample(source: &Source, starts: &[Vec<u32>], new: usize, sampling: Sampling) -> Vec<Vec<u32>> {
    sample_texts(source, starts, new, sampling, &[], &mut |_| Ok(())).unwrap()
}

fn starts() -> Vec<Vec<u32>> {
    vec![vec![1], vec![1, 5, 7, 11, 13], vec![1, 9], vec![1, 5, 7], vec![1], vec![1, 20, 30, 31]]
}

#[test]
fn one_greedy_sequence_is_what_generate_writes() {
    let Some(path) = shared("models/tiny/base") else { return };
    let source = source(&path);
    let (model, tokenizer) =
        (Model::open(&source).unwrap(), Tokenizer::from_source(&source).unwrap());
    for sampling in [Sampling::default(), warm(3), Sampling { top_k: 9, top_p: 0.8, ..warm(4) }] {
        let generation =
            Generation { max_new_tokens: 40, sampling, end_of_text: EndOfText::Ignore };
        let prompt = tokenizer.encode_prompt("The river").unwrap();
        let mut on = |_: &str| ControlFlow::Continue(());
        let one = generate(&model, &tokenizer, &prompt, generation, &mut on).unwrap().tokens;
        let text = sample(&source, std::slice::from_ref(&prompt), 40, sampling).remove(0);
        assert_eq!((&text[..prompt.len()], &text[prompt.len()..]), (&prompt[..], &one[..]));
    }
}

/// Rows of a product may be summed in another order than one row alone, so the logits are equal to rounding.
#[test]
fn logits_of_lanes_are_those_of_each_alone() {
    let mut folders: Vec<_> =
        FAMILIES.iter().map(|name| repository("model/tests/data").join(name)).collect();
    if let Some(golden) = shared("golden/arch") {
        let entries = std::fs::read_dir(golden).unwrap().map(|entry| entry.unwrap().path());
        folders.extend(entries.filter(|path| path.join("config.json").is_file()));
        assert!(folders.len() > 15, "{folders:?}");
    }
    for folder in folders {
        let name = folder.display();
        let model = Model::open(&source(&folder)).unwrap();
        let texts = [[1u32, 5, 7, 11], [2, 5, 9, 3], [3, 3, 3, 3], [4, 8, 2, 1], [9, 6, 4, 2]];
        let mut alone: Vec<Cache> = texts.iter().map(|_| Cache::new(&model, 4)).collect();
        let mut caches: Vec<Vec<LayerCache>> =
            model.spec().layers.iter().map(|_| Vec::new()).collect();
        for layer in &mut caches {
            layer.extend(texts.iter().map(|_| LayerCache::new(&model, 4)));
        }
        for t in 0..4 {
            let tokens: Vec<u32> = texts.iter().map(|text| text[t]).collect();
            let held = caches.iter_mut().map(|c| c.iter_mut().collect()).collect();
            // Only some of the rows, to see that they are the right ones.
            let found = model.forward_lanes(&tokens, &[t; 5], held, &[0, 2, 3], None).unwrap();
            let mut expected = Vec::new();
            for (lane, cache) in alone.iter_mut().enumerate() {
                let row = model.forward(&[tokens[lane]], cache, LogitRows::Last).unwrap();
                if [0, 2, 3].contains(&lane) {
                    expected.extend(row.into_iter().map(f64::from));
                }
            }
            let difference = relative_difference(&found, &expected);
            assert!(difference <= LOGITS_F32, "{name}, token {t}: {difference:e}");
        }
    }
}

#[test]
fn a_batch_writes_what_each_writes_alone() {
    let mut sources: Vec<Source> = FAMILIES.iter().map(|name| family(name)).collect();
    sources.extend(shared("models/tiny/base").map(|path| source(&path)));
    for source in sources {
        let model = Model::open(&source).unwrap();
        let starts = starts();
        let together = sample(&source, &starts, 12, warm(5));
        let go = |starts: &[Vec<u32>], most: usize| {
            run(&model, starts, 12, warm(5), &[], (most, 17), &mut |_| Ok(())).unwrap()
        };
        // Two at a time: a lane that ends gives its caches to the next.
        assert_eq!(go(&starts, 2), together, "{}", source.label);
        assert_eq!(go(&starts, 1), together, "{}", source.label);
        for (start, text) in starts.iter().zip(&together) {
            assert_eq!((text.len(), &text[..start.len()]), (start.len() + 12, &start[..]));
        }
        assert_ne!(together[0], together[4], "equal starts have streams of their own");
    }
}

#[test]
fn threads_and_repetition_change_nothing_but_seeds_do() {
    let source = family("mixtral_fused");
    let run = |threads, seed| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| sample(&source, &starts(), 20, warm(seed)))
    };
    let once = run(1, 7);
    assert_eq!(run(4, 7), once);
    assert_eq!(run(3, 7), once);
    assert_ne!(run(1, 8), once);
}

/// Pearson's statistic of 6000 first tokens against the softmax: its mean is the number of degrees of freedom, its
/// standard deviation the root of twice that; five of them are hardly ever exceeded by chance.
#[test]
fn first_tokens_follow_the_softmax() {
    const COUNT: usize = 6000;
    let source = family("mixtral_fused");
    let model = Model::open(&source).unwrap();
    let mut cache = Cache::new(&model, 2);
    let logits = model.forward(&[1, 5], &mut cache, LogitRows::Last).unwrap();
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|l| ((l - best) as f64).exp()).collect();
    let total: f64 = weights.iter().sum();
    let texts = sample(&source, &vec![vec![1, 5]; COUNT], 1, warm(11));
    let mut counts = vec![0usize; logits.len()];
    texts.iter().for_each(|t| counts[t[2] as usize] += 1);
    // Tokens that are expected less than ten times count together.
    let (mut cells, mut rest) = (Vec::new(), (0.0, 0));
    for (weight, count) in weights.iter().zip(counts) {
        let expected = COUNT as f64 * weight / total;
        if expected >= 10.0 {
            cells.push((expected, count));
        } else {
            rest = (rest.0 + expected, rest.1 + count);
        }
    }
    if rest.0 >= 10.0 {
        cells.push(rest);
    }
    assert!(cells.len() > 20, "{} cells", cells.len());
    let statistic: f64 = cells.iter().map(|(e, n)| (*n as f64 - e).powi(2) / e).sum();
    let freedom = (cells.len() - 1) as f64;
    assert!((statistic - freedom).abs() < 5.0 * (2.0 * freedom).sqrt(), "{statistic} of {freedom}");
}

#[test]
fn ends_at_end_tokens_and_at_the_end_of_the_context() {
    let source = family("mixtral_fused");
    let starts = starts();
    let free = sample(&source, &starts, 12, warm(5));
    // Any token serves as end: the fourth one of the second text.
    let end = free[1][starts[1].len() + 3];
    let ended = sample_texts(&source, &starts, 12, warm(5), &[end], &mut |_| Ok(())).unwrap();
    assert!(ended[1].len() <= starts[1].len() + 3);
    for ((text, whole), start) in ended.iter().zip(&free).zip(&starts) {
        let stop = whole[start.len()..].iter().position(|t| *t == end);
        let len = stop.map_or(whole.len(), |at| start.len() + at);
        assert_eq!(text, &whole[..len]);
    }
    let context = Model::open(&source).unwrap().spec().max_positions;
    let near = vec![vec![1; context - 2], vec![1; context]];
    let lens: Vec<_> = sample(&source, &near, 12, warm(0)).iter().map(Vec::len).collect();
    assert_eq!(lens, [context, context]);
    assert_eq!(sample(&source, &starts, 0, warm(0)), starts);
    assert!(sample(&source, &[], 5, warm(0)).is_empty());
}

#[test]
fn progress_counts_new_tokens_and_can_stop() {
    let source = family("mixtral_fused");
    let mut written = 0;
    let mut count = |n| {
        written += n;
        Ok(())
    };
    sample_texts(&source, &starts(), 7, warm(0), &[], &mut count).unwrap();
    assert_eq!(written, 6 * 7);
    let mut stop = |_| Err(ModelError::Stopped("enough".into()));
    let error = sample_texts(&source, &starts(), 7, warm(0), &[], &mut stop).unwrap_err();
    assert!(matches!(error, TextError::Model(ModelError::Stopped(_))), "{error:?}");
}

#[test]
fn starts_that_cannot_be_continued_are_refused() {
    let source = family("mixtral_fused");
    let context = Model::open(&source).unwrap().spec().max_positions;
    let refused = |starts: &[Vec<u32>], sampling| {
        sample_texts(&source, starts, 3, sampling, &[], &mut |_| Ok(())).unwrap_err()
    };
    assert!(matches!(refused(&[vec![1], vec![]], warm(0)), TextError::EmptyText { .. }));
    let long = refused(&[vec![1; context + 1]], warm(0));
    assert!(matches!(long, TextError::TooLong { .. }), "{long:?}");
    let unknown = refused(&[vec![u32::MAX]], warm(0));
    assert!(matches!(unknown, TextError::Model(ModelError::Token { .. })), "{unknown:?}");
    let cold = Sampling { temperature: -1.0, ..warm(0) };
    assert!(matches!(refused(&[vec![1]], cold), TextError::Parameter { .. }));
}

#[test]
fn caches_are_bounded() {
    let model = Model::open(&family("mixtral_fused")).unwrap();
    let spec = model.spec();
    let a = &spec.attention;
    let token = 4 * a.kv_heads * (a.qk_dim() + a.v_dim()) * spec.layers.len();
    let starts = vec![vec![1; 5]; 40];
    assert_eq!(lanes(spec, &starts, 15, 10 * 20 * token).unwrap(), (10, 20));
    assert_eq!(lanes(spec, &starts, 15, 0).unwrap().0, 1);
    assert_eq!(lanes(spec, &starts, 15, usize::MAX).unwrap().0, 40);
}

#[test]
fn starts_come_from_prompts_or_from_bos_alone() {
    let Some(path) = shared("models/tiny/base") else { return };
    let tokenizer = Tokenizer::from_source(&source(&path)).unwrap();
    let prompts = [vec![1, 5, 6, 7, 8, 9], vec![10, 11], vec![1]];
    let found = self_text_starts(&prompts, &tokenizer, 3).unwrap();
    assert_eq!(found, [vec![1, 5, 6, 7, 8], vec![1, 10, 11], vec![1, 5, 6, 7, 8]]);
    assert_eq!(self_text_starts(&[], &tokenizer, 2).unwrap(), [[1], [1]]);
    let json = br#"{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","unk_token":"?","vocab":{"?":0}}}"#;
    let mut bare = Tokenizer::from_json(json, Path::new("tokenizer.json")).unwrap();
    assert_eq!(self_text_starts(&[], &bare, 2), None);
    assert_eq!(self_text_starts(&[vec![3, 4]], &bare, 1).unwrap(), [[3, 4]]);
    bare.set_eos_ids(vec![8, 9]);
    assert_eq!(self_text_starts(&[], &bare, 1).unwrap(), [[8]]);
}
