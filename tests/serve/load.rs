//! Many clients while generations change: no failed answer, no mixed one.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use moe_merge_adapt::SwapRequest;
use serde_json::{Value, json};

use crate::client::{connect, request};
use crate::host::{self, Host};
use crate::live::{admin_post, live, options, until};

const PROMPTS: [&str; 6] = [
    "The river",
    "fn main() {",
    "12 + 7 =",
    "Once upon a time",
    "let mut count = 0;\n",
    "Petra rested by the crooked workshop, and nobody in the library",
];

/// What the third expert is in even and in odd generations.
const EXPERTS: [&str; 2] = ["math", "prose"];

/// Makes the next generation, by the server or beside it in turn, and waits until it is live.
fn swap(host: &Host, folder: &Path, generation: u32) {
    let source = moe_merge_testkit::repository("recipes/quickstart");
    let source = source.join(EXPERTS[generation as usize % 2]).display().to_string();
    if generation % 4 < 2 {
        let asked = json!({"expert": 2, "with": source});
        let found = admin_post(host, "/admin/swap", &asked);
        assert_eq!(found.json()["generation"], generation, "{}", found.text());
    } else {
        let asked = SwapRequest::new(&folder.display().to_string(), "2", &source);
        assert_eq!(moe_merge_adapt::swap(&asked).unwrap().change.generation, Some(generation));
    }
    until("the generation", || live(host) == generation);
}

const TOKENS: usize = 48;

fn body(prompt: &str) -> Value {
    json!({"model": "copy", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": true,
        "ignore_eos": true})
}

/// An answer piece by piece: its generation, its text, and when each piece came.
fn ask(host: &Host, prompt: &str) -> Result<(u32, String, Vec<Instant>), String> {
    let json = ("content-type", "application/json");
    let mut stream = connect(host.address);
    let bytes = request("POST", "/v1/completions", &[json], body(prompt).to_string().as_bytes());
    stream.write_all(&bytes).map_err(|e| e.to_string())?;
    let (mut generation, mut text, mut times, mut done) = (None, String::new(), Vec::new(), false);
    for line in BufReader::new(stream).lines() {
        let line = line.map_err(|e| e.to_string())?;
        if let Some(number) = line.strip_prefix("x-moe-merge-generation: ") {
            generation = number.parse().ok();
        }
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            done = true;
            continue;
        }
        let event: Value = serde_json::from_str(data).map_err(|e| format!("{e}: {data}"))?;
        text += event["choices"][0]["text"].as_str().ok_or_else(|| data.to_owned())?;
        times.push(Instant::now());
    }
    match generation {
        Some(generation) if done => Ok((generation, text, times)),
        _ => Err(format!("no whole answer: {text}")),
    }
}

/// What happened under load.
#[derive(Default)]
struct Seen {
    /// Answers by generation.
    answers: BTreeMap<u32, usize>,
    /// From one piece to the next: begin and length.
    gaps: Vec<(Instant, Duration)>,
}

/// `clients` ask without a pause for `time`, while the model is changed every `every`.
fn load(folder: &Path, clients: usize, time: Duration, changes: u32) {
    let host = Host::of(folder, options());
    // What each generation says alone. The first change comes before the load, so that there are two.
    let mut expected: [Vec<String>; 2] = Default::default();
    for generation in [1, 2] {
        swap(&host, folder, generation);
        expected[generation as usize % 2] =
            PROMPTS.iter().map(|p| ask(&host, p).unwrap().1).collect();
    }
    assert!(expected[0] != expected[1], "the generations say different things");
    let (seen, stop) = (Mutex::new(Seen::default()), AtomicBool::new(false));
    let mut switches = Vec::new();
    std::thread::scope(|scope| {
        for client in 0..clients {
            let (host, expected, seen, stop) = (&host, &expected, &seen, &stop);
            scope.spawn(move || {
                let mut turn = client;
                while !stop.load(Relaxed) {
                    turn += 1;
                    let at = turn % PROMPTS.len();
                    let (generation, text, times) =
                        ask(host, PROMPTS[at]).expect("no failed answer");
                    let whole = &expected[generation as usize % 2][at];
                    assert_eq!(text, *whole, "generation {generation}: a mixed answer");
                    let mut seen = seen.lock().unwrap();
                    *seen.answers.entry(generation).or_default() += 1;
                    seen.gaps.extend(times.windows(2).map(|w| (w[0], w[1] - w[0])));
                }
            });
        }
        let pause = time / (changes + 1);
        for change in 1..=changes {
            std::thread::sleep(pause);
            let began = Instant::now();
            swap(&host, folder, 2 + change);
            switches.push((began, Instant::now()));
        }
        std::thread::sleep(pause);
        stop.store(true, Relaxed);
    });
    report(&seen.into_inner().unwrap(), &switches, changes);
}

fn report(seen: &Seen, switches: &[(Instant, Instant)], changes: u32) {
    let generations = seen.answers.len();
    let total: usize = seen.answers.values().sum();
    let sorted = |mut gaps: Vec<Duration>| {
        gaps.sort_unstable();
        gaps
    };
    let at = |gaps: &[Duration], share: f64| {
        gaps.get(((gaps.len() as f64 * share) as usize).min(gaps.len().saturating_sub(1)))
            .copied()
            .unwrap_or_default()
    };
    let during = |(from, length): &(Instant, Duration)| {
        switches.iter().any(|(begin, end)| *from <= *end && *from + *length >= *begin)
    };
    let (near, far): (Vec<_>, Vec<_>) = seen.gaps.iter().partition(|gap| during(gap));
    let lengths = |gaps: Vec<&(Instant, Duration)>| sorted(gaps.iter().map(|g| g.1).collect());
    let (near, far) = (lengths(near), lengths(far));
    println!(
        "{total} answers by {generations} generations, {changes} changes; between tokens: {:.1?} / {:.1?} / {:.1?} \
         (median, 99 %, most of {}), during changes {:.1?} / {:.1?} / {:.1?} (of {})",
        at(&far, 0.5),
        at(&far, 0.99),
        at(&far, 1.0),
        far.len(),
        at(&near, 0.5),
        at(&near, 0.99),
        at(&near, 1.0),
        near.len(),
    );
    assert!(generations > changes as usize / 2, "{:?}", seen.answers);
}

#[test]
fn no_answer_fails_and_none_is_mixed() {
    let temp = tempfile::tempdir().unwrap();
    load(&host::copy(temp.path()), 4, Duration::from_secs(4), 6);
}

/// The long run: `cargo test --release --test serve -- --ignored --nocapture the_long_run`.
#[test]
#[ignore = "takes half a minute"]
fn the_long_run() {
    let temp = tempfile::tempdir().unwrap();
    load(&host::copy(temp.path()), 8, Duration::from_secs(30), 20);
}
