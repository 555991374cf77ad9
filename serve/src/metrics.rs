//! What is counted, and the text of `/metrics` in the exposition format of Prometheus.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use moe_merge_model::{Spec, Visited};

use crate::live::{Generation, Live};

/// Upper bounds in seconds of the buckets of all histograms.
const BOUNDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

/// Everything that is counted over the whole life of a server.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests that were answered, by route and status.
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    /// Prompt tokens that went through the model.
    pub prompt_tokens: AtomicU64,
    /// Tokens that were written.
    pub new_tokens: AtomicU64,
    /// Answers whose client went away.
    pub cancelled: AtomicU64,
    /// Passes that the model failed in.
    pub failed: AtomicU64,
    /// Times that another generation went live.
    pub switches: AtomicU64,
    /// Times that another generation could not be opened.
    pub refused: AtomicU64,
    /// Answers that wait, and sequences that the model works on.
    pub waiting: AtomicUsize,
    pub running: AtomicUsize,
    /// Bytes of keys and values.
    pub cache_bytes: AtomicUsize,
    /// From request to first token.
    pub first_token: Histogram,
    /// From one token to the next.
    pub next_token: Histogram,
    /// From request to last token.
    pub answer: Histogram,
    /// To open another generation and make it live.
    pub switch: Histogram,
}

/// Times, sorted into buckets.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BOUNDS.len()],
    count: AtomicU64,
    micros: AtomicU64,
}

impl Histogram {
    /// One more time.
    pub fn add(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        if let Some(at) = BOUNDS.iter().position(|bound| seconds <= *bound) {
            self.buckets[at].fetch_add(1, Relaxed);
        }
        self.count.fetch_add(1, Relaxed);
        self.micros.fetch_add(time.as_micros().try_into().unwrap_or(u64::MAX), Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        head(out, name, "histogram", help);
        let mut below = 0;
        for (bound, bucket) in BOUNDS.iter().zip(&self.buckets) {
            below += bucket.load(Relaxed);
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {below}");
        }
        // A time that is counted between the two reads must not make the last bucket smaller than one before.
        let count = self.count.load(Relaxed).max(below);
        let _ = writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {count}");
        let _ = writeln!(out, "{name}_sum {}", self.micros.load(Relaxed) as f64 / 1e6);
        let _ = writeln!(out, "{name}_count {count}");
    }
}

/// Where the tokens of one generation went.
#[derive(Debug)]
pub struct Routers {
    /// The MoE layers, first to last.
    pub layers: Vec<LayerLoad>,
}

/// Where the tokens went in one layer.
#[derive(Debug)]
pub struct LayerLoad {
    /// Its number.
    pub layer: usize,
    /// Tokens that visited each expert.
    pub experts: Vec<AtomicU64>,
    /// Tokens that the router saw.
    pub tokens: AtomicU64,
    /// Sum of the entropies of what it thought, in nats: the bits of an f64, which one thread only writes.
    entropy: AtomicU64,
}

impl LayerLoad {
    /// Mean entropy of what the router thought of the experts, in nats.
    pub fn mean_entropy(&self) -> f64 {
        match self.tokens.load(Relaxed) {
            0 => 0.0,
            tokens => f64::from_bits(self.entropy.load(Relaxed)) / tokens as f64,
        }
    }
}

impl Routers {
    /// Nothing counted yet.
    pub fn of(spec: &Spec) -> Self {
        let layer = |(layer, moe): (usize, &moe_merge_model::spec::MoeMlp)| LayerLoad {
            layer,
            experts: (0..moe.experts).map(|_| AtomicU64::new(0)).collect(),
            tokens: AtomicU64::new(0),
            entropy: AtomicU64::new(0f64.to_bits()),
        };
        Self { layers: spec.moe_layers().map(layer).collect() }
    }

    /// Counts what the router of one layer did. One thread only calls it.
    pub fn add(&self, visited: &Visited<'_>) {
        let Ok(at) = self.layers.binary_search_by_key(&visited.layer, |l| l.layer) else { return };
        let load = &self.layers[at];
        for id in &visited.routing.ids {
            load.experts[*id as usize].fetch_add(1, Relaxed);
        }
        let entropy = f64::from_bits(load.entropy.load(Relaxed)) + visited.entropy();
        load.entropy.store(entropy.to_bits(), Relaxed);
        load.tokens.fetch_add(visited.routing.tokens as u64, Relaxed);
    }
}

impl Metrics {
    /// A request was answered.
    pub fn answered(&self, route: &'static str, status: u16) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        *requests.entry((route, status)).or_default() += 1;
    }

    /// The whole text.
    pub fn text(&self, live: &Live) -> String {
        let mut out = String::new();
        head(&mut out, "moe_merge_requests_total", "counter", "Requests answered.");
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for ((route, status), count) in requests {
            let labels = format!("route=\"{route}\",status=\"{status}\"");
            let _ = writeln!(out, "moe_merge_requests_total{{{labels}}} {count}");
        }
        let all: [(&str, &str, &str, u64); 10] = [
            (
                "moe_merge_prompt_tokens_total",
                "counter",
                "Prompt tokens through the model.",
                self.prompt_tokens.load(Relaxed),
            ),
            (
                "moe_merge_new_tokens_total",
                "counter",
                "Tokens written.",
                self.new_tokens.load(Relaxed),
            ),
            (
                "moe_merge_cancelled_total",
                "counter",
                "Answers whose client went away.",
                self.cancelled.load(Relaxed),
            ),
            (
                "moe_merge_failed_total",
                "counter",
                "Answers that the model failed in.",
                self.failed.load(Relaxed),
            ),
            (
                "moe_merge_switches_total",
                "counter",
                "Generations that went live after the first.",
                self.switches.load(Relaxed),
            ),
            (
                "moe_merge_switches_refused_total",
                "counter",
                "Generations that could not be opened.",
                self.refused.load(Relaxed),
            ),
            (
                "moe_merge_waiting",
                "gauge",
                "Answers that wait for their turn.",
                self.waiting.load(Relaxed) as u64,
            ),
            (
                "moe_merge_running",
                "gauge",
                "Sequences that the model works on.",
                self.running.load(Relaxed) as u64,
            ),
            (
                "moe_merge_cache_bytes",
                "gauge",
                "Bytes of keys and values.",
                self.cache_bytes.load(Relaxed) as u64,
            ),
            ("moe_merge_generation", "gauge", "The live generation.", live.now().number.into()),
        ];
        for (name, kind, help, value) in all {
            head(&mut out, name, kind, help);
            let _ = writeln!(out, "{name} {value}");
        }
        for (histogram, name, help) in [
            (&self.first_token, "moe_merge_first_token_seconds", "From request to first token."),
            (&self.next_token, "moe_merge_next_token_seconds", "From one token to the next."),
            (&self.answer, "moe_merge_answer_seconds", "From request to last token."),
            (
                &self.switch,
                "moe_merge_switch_seconds",
                "To open another generation and make it live.",
            ),
        ] {
            histogram.write(&mut out, name, help);
        }
        routers(&mut out, live);
        out
    }
}

/// Loads and entropies of the generations in memory.
fn routers(out: &mut String, live: &Live) {
    let generations = live.in_memory();
    head(out, "moe_merge_generations_in_memory", "gauge", "Generations that requests work with.");
    let _ = writeln!(out, "moe_merge_generations_in_memory {}", generations.len());
    let mut each =
        |name: &str, help: &str, write: &dyn Fn(&mut String, &Generation, &LayerLoad)| {
            head(out, name, "counter", help);
            for generation in &generations {
                generation.routers.layers.iter().for_each(|load| write(out, generation, load));
            }
        };
    each("moe_merge_expert_tokens_total", "Tokens that visited an expert.", &|out, g, load| {
        for (expert, count) in load.experts.iter().enumerate() {
            let (name, count) = (escaped(&g.experts, expert), count.load(Relaxed));
            let _ = writeln!(
                out,
                "moe_merge_expert_tokens_total{{generation=\"{}\",layer=\"{}\",expert=\"{expert}\",name=\"{name}\"}} {count}",
                g.number, load.layer
            );
        }
    });
    each("moe_merge_router_tokens_total", "Tokens that a router saw.", &|out, g, load| {
        let count = load.tokens.load(Relaxed);
        let labels = format!("generation=\"{}\",layer=\"{}\"", g.number, load.layer);
        let _ = writeln!(out, "moe_merge_router_tokens_total{{{labels}}} {count}");
    });
    let help = "Sum over tokens of the entropy of a router's probabilities.";
    each("moe_merge_router_entropy_nats_total", help, &|out, g, load| {
        let sum = f64::from_bits(load.entropy.load(Relaxed));
        let labels = format!("generation=\"{}\",layer=\"{}\"", g.number, load.layer);
        let _ = writeln!(out, "moe_merge_router_entropy_nats_total{{{labels}}} {sum}");
    });
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// A name as a label's value.
fn escaped(names: &[String], expert: usize) -> String {
    let name = names.get(expert).map_or("", String::as_str);
    name.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_count_upwards() {
        let histogram = Histogram::default();
        for millis in [0, 2, 2, 30, 100_000] {
            histogram.add(Duration::from_millis(millis));
        }
        let mut text = String::new();
        histogram.write(&mut text, "x", "Help.");
        for line in [
            "# TYPE x histogram",
            "x_bucket{le=\"0.001\"} 1",
            "x_bucket{le=\"0.0025\"} 3",
            "x_bucket{le=\"0.05\"} 4",
            "x_bucket{le=\"60\"} 4",
            "x_bucket{le=\"+Inf\"} 5",
            "x_sum 100.034",
            "x_count 5",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn names_are_escaped() {
        assert_eq!(escaped(&["a\"b\\\n".into()], 0), "a\\\"b\\\\\\n");
        assert_eq!(escaped(&[], 3), "");
    }
}
