//! Dense merge methods: one file each, one row in [`METHODS`] each.
//!
//! A method makes one tensor out of the same tensor of several models. What it makes is a
//! [`Weight`](moe_merge_checkpoint::Weight) whose rows are computed when they are read; methods that need a fact about
//! the whole tensor (an angle, a threshold) find it on first use.

use std::fmt;

use moe_merge_model::side_by_side::Stream;

use crate::recipe::ParameterKind;

mod gram;
mod matrix;
mod order;
mod page;
mod scan;
mod sparsify;
mod task_vectors;
mod weight;

mod arcee_fusion;
mod breadcrumbs;
mod breadcrumbs_ties;
mod dare_linear;
mod dare_ties;
mod della;
mod della_linear;
mod iso_c;
mod karcher;
mod linear;
mod model_stock;
mod multislerp;
mod nearswap;
mod nuslerp;
mod passthrough;
mod ram;
mod ramplus_tl;
mod regmean;
mod regmean_stream;
mod sce;
mod slerp;
mod task_arithmetic;
mod ties;
mod tsv;

pub use page::page;
pub use weight::{Combine, Group, merged};

use scan::{Once, read, scan};
use weight::round;

/// A dense merge method.
pub struct Method {
    /// Its name in recipes.
    pub name: &'static str,
    /// One line about it.
    pub summary: &'static str,
    /// The result for one tensor, as a formula or in words.
    pub formula: &'static str,
    /// Its parameters.
    pub parameters: &'static [Parameter],
    /// What the base model is to it.
    pub base: Base,
    /// How many models it takes, a base that is no model like the others not counted.
    pub models: (usize, usize),
    /// Whether its arithmetic looks at a tensor as one vector: then all experts of a layer are one tensor.
    pub whole_tensor: bool,
    /// Whose hidden states it looks at, if any: then [`Method::models`] are run on texts, and the linear weights of their layers
    /// are computed from that. The other tensors are made as by every method.
    pub activations: Option<Stream>,
    /// The paper or code it comes from.
    pub source: &'static str,
    build: fn(&Group) -> Result<Box<dyn Combine>, String>,
}

impl fmt::Debug for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl PartialEq for Method {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

/// What the base model is to a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// What the others are compared with; it needs no parameters of its own.
    Required,
    /// The same, for recipes that name one.
    Optional,
    /// A model like any other.
    Ordinary,
}

/// A parameter of a method.
#[derive(Debug, Clone, Copy)]
pub struct Parameter {
    /// Its name in recipes.
    pub name: &'static str,
    /// What it does.
    pub doc: &'static str,
    /// Whether each model has its own.
    pub scope: Scope,
    /// What it holds.
    pub kind: ParameterKind,
    /// What holds without it; `None` if it has to be given.
    pub default: Option<f64>,
    /// Least and greatest value.
    pub range: (f64, f64),
}

impl Parameter {
    const fn within(mut self, least: f64, greatest: f64) -> Self {
        self.range = (least, greatest);
        self
    }
}

/// Whom a parameter belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Each model has its own.
    Model,
    /// All models together.
    Global,
}

const ANY: (f64, f64) = (f64::NEG_INFINITY, f64::INFINITY);

const fn number(
    name: &'static str,
    scope: Scope,
    default: Option<f64>,
    doc: &'static str,
) -> Parameter {
    Parameter { name, doc, scope, kind: ParameterKind::Number, default, range: ANY }
}

const fn flag(name: &'static str, default: bool, doc: &'static str) -> Parameter {
    let default = Some(if default { 1.0 } else { 0.0 });
    Parameter {
        name,
        doc,
        scope: Scope::Global,
        kind: ParameterKind::Bool,
        default,
        range: (0.0, 1.0),
    }
}

/// Every method.
pub const METHODS: &[Method] = &[
    linear::METHOD,
    slerp::METHOD,
    nuslerp::METHOD,
    multislerp::METHOD,
    karcher::METHOD,
    task_arithmetic::METHOD,
    ties::METHOD,
    dare_linear::METHOD,
    dare_ties::METHOD,
    della::METHOD,
    della_linear::METHOD,
    breadcrumbs::METHOD,
    breadcrumbs_ties::METHOD,
    sce::METHOD,
    ram::METHOD,
    ramplus_tl::METHOD,
    model_stock::METHOD,
    nearswap::METHOD,
    arcee_fusion::METHOD,
    iso_c::METHOD,
    tsv::METHOD,
    regmean::METHOD,
    regmean_stream::METHOD,
    passthrough::METHOD,
];

/// The method called `name`.
pub fn by_name(name: &str) -> Option<&'static Method> {
    METHODS.iter().find(|m| m.name == name)
}
