//! `joint`: all experts of a MoE and its routers, trained together.
//!
//! An expert that is fitted with every token sent to it is fitted to a stream that it never sees behind a router, which mixes in
//! others and errs. Here tokens go where routers send them, and the text of each expert has to come out as its dense model
//! would have it.

use std::collections::BTreeMap;
use std::ops::Range;

use moe_merge_checkpoint::Source;
use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_model::Tokenizer;
use moe_merge_model::transplant::{Distillation, Pupil, Visits, distil};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha12Rng;
use serde::Serialize;
use serde_json::json;

use super::state::{Keeper, kept};
use super::texts::split;
use super::{Fitted, Store};
use crate::build::{Observer, Stage};
use crate::error::MergeError;
use crate::recipe::{Align, AlignMethod};

/// An expert, its dense model and its text.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub expert: usize,
    pub name: String,
    pub teacher: Source,
    pub texts: Vec<Vec<u32>>,
    /// Layers in which it is trained; none for one that is the base itself.
    pub layers: Range<usize>,
}

/// What training all experts and routers together did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JointReport {
    /// Steps made.
    pub steps: usize,
    /// The step that everything is from.
    pub best_step: usize,
    /// By expert.
    pub experts: Vec<JointExpert>,
}

/// The text of one expert in the whole MoE.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JointExpert {
    /// Its name.
    pub name: String,
    /// How far the MoE's predictions are from those of its dense model, on text of its own that was held out, in nats per token,
    /// before and after.
    pub divergence: [f64; 2],
}

/// New matrices by expert, routers by layer, and how it went; nothing new where it made nothing better.
pub(crate) struct Joined {
    pub fitted: Vec<(usize, Fitted)>,
    /// `[experts, hidden]` each.
    pub gates: BTreeMap<usize, Vec<f32>>,
    pub report: JointReport,
}

/// Trains the experts of `members` and the routers of `moe`.
///
/// # Errors
/// As [`distil`]; interruption; a disk that is full.
pub(crate) fn join(
    moe: &Source,
    members: &[Member],
    (align, seed): (&Align, u64),
    store: &Store,
    interrupt: &Interrupt,
    observer: &dyn Observer,
) -> Result<Joined, MergeError> {
    let bos = Tokenizer::from_source(moe)?.bos();
    let text = |m: &Member| split(&begun_anywhere(&m.texts, bos, seed ^ m.expert as u64));
    let texts: Vec<_> = members.iter().map(text).collect();
    let mut pupils = Vec::new();
    for (member, (texts, held_out)) in members.iter().zip(&texts) {
        pupils.push(Pupil {
            expert: member.expert,
            teacher: &member.teacher,
            texts,
            held_out,
            layers: member.layers.clone(),
        });
    }
    observer.stage(Stage::Distil, align.steps as u64);
    let begun = json!({
        "experts": members.iter().map(|m| (&m.name, &m.teacher.label)).collect::<Vec<_>>(),
        "steps": align.steps, "rank": align.rank, "stream": align.stream, "seed": seed,
    });
    let all: Vec<&[Vec<u32>]> = members.iter().map(|m| m.texts.as_slice()).collect();
    let mut keeper = store.kept().map(|f| Keeper::new(f, "joint.distil", begun, &all));
    let options = options(align, seed);
    let made = kept(&mut keeper, interrupt, &mut || observer.advance(1), &mut |state, told| {
        distil(moe, &pupils, Visits::Routed, &options, state, told)
    })?;
    let mut fitted: BTreeMap<usize, Fitted> = BTreeMap::new();
    let (matrices, gates) = match made.best_step {
        0 => Default::default(),
        _ => (made.matrices, made.gates),
    };
    for m in matrices {
        let place = (m.expert, m.layer);
        let new = store.put(AlignMethod::Joint, place, m.sizes, &m.weights, interrupt)?;
        fitted.entry(m.expert).or_default().push((m.layer, new));
    }
    let told = |(m, nats): (&Member, &Option<[f64; 2]>)| {
        nats.map(|divergence| JointExpert { name: m.name.clone(), divergence })
    };
    let experts = members.iter().zip(&made.held_out).filter_map(told).collect();
    let report = JointReport { steps: made.steps, best_step: made.best_step, experts };
    Ok(Joined { fitted: fitted.into_iter().collect(), gates, report })
}

/// Shortest part of a text that is cut.
const SHORT: usize = 8;

/// The texts, every other one as two that begin at its start and somewhere within it: behind a router, where a text begins in the
/// middle of something, nobody knows yet whose it is.
///
/// * `bos`: stands before each, where texts begin with it
fn begun_anywhere(texts: &[Vec<u32>], bos: Option<u32>, seed: u64) -> Vec<Vec<u32>> {
    let mut random = ChaCha12Rng::seed_from_u64(seed);
    let mut all = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        if i % 2 == 0 || text.len() < 2 * SHORT + 1 {
            all.push(text.clone());
            continue;
        }
        let cut = random.random_range(SHORT..text.len() - SHORT);
        let bos = bos.filter(|b| text.first() == Some(b));
        all.push(text[..cut].to_vec());
        all.push(bos.into_iter().chain(text[cut..].iter().copied()).collect());
    }
    all
}

/// How to train what `align` asks for.
pub(super) fn options(align: &Align, seed: u64) -> Distillation {
    Distillation {
        steps: align.steps,
        rank: align.rank,
        stream: align.stream as f32,
        evaluate_every: (align.steps / 10).max(1),
        seed,
        ..Distillation::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_lost_where_texts_are_cut() {
        let text = |seed: u32| [1].into_iter().chain((0..40).map(|i| 2 + (i * 7 + seed) % 90));
        let texts: Vec<Vec<u32>> = (0..6).map(|s| text(s).collect()).collect();
        let cut = begun_anywhere(&texts, Some(1), 3);
        assert_eq!((cut.len(), &cut[0], &cut[3]), (9, &texts[0], &texts[2]));
        assert!(cut.iter().all(|t| t[0] == 1 && t.len() >= SHORT));
        let both: Vec<u32> = cut[1].iter().chain(&cut[2][1..]).copied().collect();
        assert_eq!(both, texts[1]);
        assert_eq!(begun_anywhere(&texts[..1], Some(1), 3), texts[..1]);
    }
}
