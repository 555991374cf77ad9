//! Measures taken in turn, and what they say about the bars.

use std::time::Duration;

use criterion::{Criterion, SamplingMode};

use super::clock::Clock;

/// A limit that varies by more than this between the tenth and the ninetieth percentile is no measure of a ratio.
const STEADY: f64 = 0.15;

/// What a ratio has to reach.
#[derive(Clone, Copy)]
pub enum Bar {
    /// At least (bar, stretch).
    AtLeast(f64, f64),
    /// At most (bar, stretch).
    AtMost(f64, f64),
    /// Shown only.
    None,
}

/// What is counted per second.
#[derive(Clone, Copy)]
pub struct Unit {
    name: &'static str,
    scale: f64,
}

impl Unit {
    /// What it is called.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// So much work per second in this unit.
    pub fn of(self, per_second: f64) -> f64 {
        self.scale * per_second
    }
}

/// Multiplications and additions.
pub const GFLOPS: Unit = Unit { name: "GFLOP/s", scale: 1e-9 };
/// Bytes.
pub const GBS: Unit = Unit { name: "GB/s", scale: 1e-9 };
/// Tokens.
pub const TOKENS: Unit = Unit { name: "tokens/s", scale: 1.0 };

/// One of the things that take turns.
pub struct Side<'a> {
    /// Work of one run, in the unit of the measure.
    pub work: f64,
    /// Does it once.
    pub run: Box<dyn FnMut() + 'a>,
}

impl<'a> Side<'a> {
    /// `work` done by each call of `run`.
    pub fn new(work: f64, run: impl FnMut() + 'a) -> Self {
        Self { work, run: Box::new(run) }
    }
}

/// Seconds of every side, a vector of rounds each.
pub struct Rounds {
    seconds: Vec<Vec<f64>>,
    work: Vec<f64>,
}

impl Rounds {
    /// Work per second of a side, median.
    pub fn speed(&self, side: usize) -> f64 {
        self.work[side] / quantile(&self.seconds[side], 0.5)
    }

    /// Speed of `a` over speed of `b` in each round, median.
    pub fn ratio(&self, a: usize, b: usize) -> f64 {
        let ratios: Vec<f64> = (self.seconds[a].iter().zip(&self.seconds[b]))
            .map(|(x, y)| self.work[a] / x / (self.work[b] / y))
            .collect();
        quantile(&ratios, 0.5)
    }

    /// How far a side's times lie apart, as a share of their median.
    pub fn spread(&self, side: usize) -> f64 {
        let times = &self.seconds[side];
        (quantile(times, 0.9) - quantile(times, 0.1)) / quantile(times, 0.5)
    }
}

fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = ((sorted.len().saturating_sub(1)) as f64 * q).round() as usize;
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

/// Criterion, and the lines for the end.
pub struct Bench {
    criterion: Criterion,
    lines: Vec<String>,
}

impl Default for Bench {
    fn default() -> Self {
        let criterion = Criterion::default()
            .sample_size(15)
            .warm_up_time(Duration::from_millis(200))
            .measurement_time(Duration::from_millis(2000))
            .without_plots()
            .configure_from_args();
        Self { criterion, lines: Vec::new() }
    }
}

impl Bench {
    /// Runs the sides in turn; criterion is given the times of the first one.
    ///
    /// Nothing comes back if the command line asked for other benches.
    pub fn in_turn(
        &mut self,
        (group, name): (&str, &str),
        clock: Clock,
        sides: &mut [Side<'_>],
    ) -> Option<Rounds> {
        let mut seconds = vec![Vec::new(); sides.len()];
        let mut group = self.criterion.benchmark_group(group);
        group.sampling_mode(SamplingMode::Flat);
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|rounds| {
                let mut total = Duration::ZERO;
                for _ in 0..rounds {
                    for (at, (side, seconds)) in sides.iter_mut().zip(&mut seconds).enumerate() {
                        let taken = clock.time(&mut side.run);
                        seconds.push(taken.as_secs_f64());
                        total += if at == 0 { taken } else { Duration::ZERO };
                    }
                }
                total
            });
        });
        group.finish();
        let work = sides.iter().map(|s| s.work).collect();
        (!seconds[0].is_empty()).then_some(Rounds { seconds, work })
    }

    /// `name`, on so many threads, against its limit: one line with both speeds, their ratio and the bar.
    pub fn against(
        &mut self,
        (group, name): (&str, &str),
        threads: usize,
        (unit, limit): (Unit, &str),
        bar: Bar,
        mut sides: [Side<'_>; 2],
    ) {
        let Some(rounds) = self.in_turn((group, name), Clock::of(threads), &mut sides) else {
            return;
        };
        let (speed, peak) = (unit.of(rounds.speed(0)), unit.of(rounds.speed(1)));
        let ratio = rounds.ratio(0, 1);
        let what = format!("{group} {name}: {speed:.1} of {peak:.1} {} ({limit})", unit.name);
        self.line(&what, ratio, bar, rounds.spread(1));
    }

    /// One line of the report; `spread` is that of the limit.
    pub fn line(&mut self, what: &str, ratio: f64, bar: Bar, spread: f64) {
        let verdict = match bar {
            Bar::AtLeast(bar, stretch) => {
                format!(", bar {bar} {}", said(ratio >= bar, ratio >= stretch, stretch))
            }
            Bar::AtMost(bar, stretch) => {
                format!(", bar at most {bar} {}", said(ratio <= bar, ratio <= stretch, stretch))
            }
            Bar::None => String::new(),
        };
        let unstable = if spread > STEADY {
            format!("; the limit is unstable: its times spread over {:.0} %", 100.0 * spread)
        } else {
            String::new()
        };
        self.lines.push(format!("{what}, ratio {ratio:.2}{verdict}{unstable}"));
    }

    /// A line without a ratio.
    pub fn note(&mut self, line: String) {
        self.lines.push(line);
    }

    /// Prints the report.
    pub fn finish(self) {
        println!(
            "\nlimits of this machine, measured in the same process, in turn; medians of ratios"
        );
        self.lines.iter().for_each(|line| println!("  {line}"));
    }
}

fn said(bar: bool, stretch: bool, goal: f64) -> String {
    match (bar, stretch) {
        (false, _) => "missed".into(),
        (true, true) => format!("reached, stretch {goal} reached"),
        (true, false) => format!("reached, stretch {goal} missed"),
    }
}
