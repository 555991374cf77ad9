//! What a learned estimator gets and gives.

use crate::error::RouterError;
use crate::gate::Gate;
use crate::held_out::HeldOut;

/// Whether a prompt is for its expert or against it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Sign {
    /// Its tokens should go to the expert.
    Positive,
    /// Its tokens should go anywhere else.
    Negative,
}

/// One prompt, as the router of one layer sees it.
#[derive(Debug, Clone, Copy)]
pub struct Example<'a> {
    /// Whose prompt it is.
    pub expert: usize,
    /// For or against.
    pub sign: Sign,
    /// Router inputs `z = norm(h)` of its tokens, `[tokens, hidden]` f32, without bos and padding.
    pub inputs: &'a [f32],
}

/// All prompts of one layer.
#[derive(Debug, Clone)]
pub struct Samples<'a> {
    /// Experts the gate chooses among.
    pub experts: usize,
    /// Width of the router input.
    pub hidden: usize,
    /// The prompts, in any order: the order changes nothing.
    pub examples: Vec<Example<'a>>,
}

/// How a learned estimator works. [`Options::default`] is what measured best.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Experts per token, for coverage and load.
    pub top_k: usize,
    /// L2 penalties tried, strongest first; features have unit RMS and all class weights sum to one.
    pub penalties: Vec<f64>,
    /// The penalty when no prompt can be held out.
    pub penalty_without_held_out: f64,
    /// Most groups that prompts are split into for holding out.
    pub max_folds: usize,
    /// Largest error of the final solve relative to the norm of `W`; bf16 rounds each number by up to 4e-3 of itself.
    pub tolerance: f64,
    /// Most iterations of the final solve.
    pub max_iterations: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            top_k: 2,
            penalties: vec![0.1, 0.03, 0.01, 0.003, 0.001, 0.0003],
            penalty_without_held_out: 0.03,
            max_folds: 8,
            tolerance: 1e-3,
            max_iterations: 300,
        }
    }
}

/// A gate and how much it can be trusted.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    /// The gate; its rows sum to zero.
    pub gate: Gate,
    /// Quality on prompts that the gate had not seen; none if no expert has two different prompts.
    pub held_out: Option<HeldOut>,
    /// The L2 penalty used; for `lda` the shrinkage, for `mean` 0.
    pub penalty: f64,
    /// Factor on the rows that made held-out likelihood best. Without held-out prompts 1 for `logistic`; closed forms
    /// then get what gives the logits of given tokens RMS 1.
    pub temperature: f64,
    /// RMS of the router inputs, folded back into the rows.
    pub input_rms: f64,
    /// Iterations of the final solve.
    pub iterations: usize,
    /// What the user should know.
    pub warnings: Vec<Warning>,
}

/// Something odd about the prompts of a layer, or about the solution.
#[derive(Debug, Clone, PartialEq)]
pub enum Warning {
    /// A prompt was given more than once for one expert; it counts once.
    DuplicatePrompts {
        /// The expert.
        expert: usize,
        /// Copies left out.
        dropped: usize,
    },
    /// A prompt without a token besides bos; it is left out.
    EmptyPrompts {
        /// The expert.
        expert: usize,
        /// Prompts left out.
        dropped: usize,
    },
    /// The two experts have the same prompts: their rows are equal, and the lower index wins every tie.
    SamePrompts {
        /// The lower index.
        a: usize,
        /// The higher index.
        b: usize,
    },
    /// The two experts share some prompts.
    SharedPrompts {
        /// The lower index.
        a: usize,
        /// The higher index.
        b: usize,
        /// How many.
        shared: usize,
    },
    /// The expert has one prompt only, which is never held out: nothing is known about its quality on other text.
    SinglePrompt {
        /// The expert.
        expert: usize,
    },
    /// No prompt could be held out: a cautious penalty and scale were used, and quality is unknown.
    NoHeldOut {
        /// The penalty used.
        penalty: f64,
    },
    /// The rows were scaled down so that no logit of a given token exceeds the bound.
    LogitsBounded {
        /// Largest logit before.
        largest: f64,
        /// The bound.
        bound: f64,
    },
    /// The solver stopped at its limit; the gate is usable but not the exact optimum.
    NotConverged {
        /// Iterations done.
        iterations: usize,
        /// Norm of the gradient there.
        gradient: f64,
    },
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::DuplicatePrompts { expert, dropped } => {
                write!(f, "expert {expert} has {dropped} prompts twice; each counts once")
            }
            Self::EmptyPrompts { expert, dropped } => {
                write!(f, "{dropped} prompts of expert {expert} hold no token and are left out")
            }
            Self::SamePrompts { a, b } => write!(
                f,
                "experts {a} and {b} have the same prompts: nothing tells them apart, and {a} wins every tie"
            ),
            Self::SharedPrompts { a, b, shared } => {
                write!(f, "experts {a} and {b} share {shared} prompts")
            }
            Self::SinglePrompt { expert } => write!(
                f,
                "expert {expert} has a single prompt: nothing is known about its quality on other text; give three or more"
            ),
            Self::NoHeldOut { penalty } => write!(
                f,
                "no prompt could be held out: penalty ({penalty}) and sharpness are cautious guesses and quality is unknown; give each \
                 expert two prompts or more"
            ),
            Self::LogitsBounded { largest, bound } => {
                write!(f, "router logits of up to {largest:.1} were scaled down to {bound}")
            }
            Self::NotConverged { iterations, gradient } => write!(
                f,
                "the solver stopped after {iterations} steps with a gradient of {gradient:.1e}; the gate is usable, but not \
                 the exact optimum"
            ),
        }
    }
}

/// What a row of features is labelled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    pub expert: usize,
    pub sign: Sign,
}

/// A prompt's place among the rows.
#[derive(Debug, Clone)]
pub(crate) struct Prompt {
    pub target: Target,
    pub rows: std::ops::Range<usize>,
}

/// The samples in one block: checked, without copies, in an order that depends on content alone.
#[derive(Debug)]
pub(crate) struct Table {
    pub experts: usize,
    pub hidden: usize,
    /// `[n, hidden]`, divided by `rms`.
    pub x: Vec<f32>,
    pub rms: f64,
    pub prompts: Vec<Prompt>,
    pub warnings: Vec<Warning>,
}

impl Table {
    pub fn rows(&self) -> usize {
        self.prompts.last().map_or(0, |p| p.rows.end)
    }

    pub fn inputs(&self, prompt: usize) -> &[f32] {
        let rows = &self.prompts[prompt].rows;
        &self.x[rows.start * self.hidden..rows.end * self.hidden]
    }

    /// Prompts of one expert and sign.
    pub fn of(&self, expert: usize, sign: Sign) -> impl Iterator<Item = usize> + '_ {
        let target = Target { expert, sign };
        (0..self.prompts.len()).filter(move |&p| self.prompts[p].target == target)
    }

    /// Checks `samples` and puts them in order.
    pub fn new(samples: &Samples<'_>) -> Result<Self, RouterError> {
        let (experts, hidden) = (samples.experts, samples.hidden);
        if experts < 2 {
            return Err(RouterError::TooFewExperts { experts });
        }
        check(samples)?;
        let mut table = Self {
            experts,
            hidden,
            x: Vec::new(),
            rms: 0.0,
            prompts: Vec::new(),
            warnings: Vec::new(),
        };
        for expert in 0..experts {
            for sign in [Sign::Positive, Sign::Negative] {
                table.push_group(samples, Target { expert, sign })?;
            }
        }
        let squares: f64 = table.x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        table.rms = (squares / table.x.len() as f64).sqrt();
        if table.rms == 0.0 {
            return Err(RouterError::AllZero);
        }
        let factor = 1.0 / table.rms;
        table.x.iter_mut().for_each(|v| *v = (f64::from(*v) * factor) as f32);
        table.warn_shared();
        Ok(table)
    }

    fn push_group(&mut self, samples: &Samples<'_>, target: Target) -> Result<(), RouterError> {
        let expert = target.expert;
        let given = samples.examples.iter().filter(|e| e.expert == expert && e.sign == target.sign);
        let mut group: Vec<&[f32]> = given.map(|e| e.inputs).collect();
        let positive = target.sign == Sign::Positive;
        if positive && group.is_empty() {
            return Err(RouterError::NoPrompts { expert });
        }
        let all = group.len();
        group.retain(|inputs| !inputs.is_empty());
        let filled = group.len();
        if positive && filled == 0 {
            return Err(RouterError::NoTokens { expert });
        }
        let bits =
            |inputs: &[f32]| (inputs.len(), inputs.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
        group.sort_by_cached_key(|inputs| bits(inputs));
        group.dedup();
        if all > filled {
            self.warnings.push(Warning::EmptyPrompts { expert, dropped: all - filled });
        }
        if filled > group.len() {
            let dropped = filled - group.len();
            self.warnings.push(Warning::DuplicatePrompts { expert, dropped });
        }
        if positive && group.len() == 1 {
            self.warnings.push(Warning::SinglePrompt { expert });
        }
        for inputs in group {
            let start = self.rows();
            let rows = start..start + inputs.len() / self.hidden;
            self.prompts.push(Prompt { target, rows });
            self.x.extend_from_slice(inputs);
        }
        Ok(())
    }

    fn warn_shared(&mut self) {
        for a in 0..self.experts {
            for b in a + 1..self.experts {
                let count = |e| self.of(e, Sign::Positive).count();
                let shared = self
                    .of(a, Sign::Positive)
                    .filter(|&p| {
                        self.of(b, Sign::Positive).any(|q| self.inputs(p) == self.inputs(q))
                    })
                    .count();
                let same = shared == count(a) && shared == count(b);
                if same {
                    self.warnings.push(Warning::SamePrompts { a, b });
                } else if shared > 0 {
                    self.warnings.push(Warning::SharedPrompts { a, b, shared });
                }
            }
        }
    }
}

fn check(samples: &Samples<'_>) -> Result<(), RouterError> {
    let (experts, hidden) = (samples.experts, samples.hidden);
    let mut seen = std::collections::BTreeMap::new();
    for example in &samples.examples {
        let expert = example.expert;
        if expert >= experts {
            return Err(RouterError::NoSuchExpert { expert, experts });
        }
        let prompt: &mut usize = seen.entry((expert, example.sign)).or_default();
        if hidden == 0 || example.inputs.len() % hidden != 0 {
            return Err(RouterError::Shape {
                what: "a prompt's router inputs",
                expected: example.inputs.len().next_multiple_of(hidden.max(1)),
                found: example.inputs.len(),
            });
        }
        if let Some(at) = example.inputs.iter().position(|v| !v.is_finite()) {
            return Err(RouterError::NotFinite { expert, prompt: *prompt, token: at / hidden });
        }
        *prompt += 1;
    }
    Ok(())
}
