//! Parts of a build that are of use without it.

use moe_merge_checkpoint::Source;
use moe_merge_router::Gate;

use crate::build::{Observer, Prepared};
use crate::error::MergeError;
use crate::evaluate::Domain;
use crate::gates::{Routers, TokenPrompts};
use crate::plan::{Assembly, Content, Gates, Plan};

impl Prepared {
    /// Routers as the build makes them, and the tokens that experts wrote for them: texts first, then gates, then whether a
    /// generalist pays.
    pub(crate) fn routers(
        &mut self,
        observer: &dyn Observer,
    ) -> Result<(Routers, usize), MergeError> {
        let written = self.write_texts(observer).map_err(|e| self.origins.locate(e))?;
        let routers = self.gates(observer).map_err(|e| self.origins.locate(e))?;
        Ok((self.with_or_without_generalist(routers, observer)?, written))
    }

    /// The model that would be written with `routers`; no weight is copied.
    pub(crate) fn merged(&self, routers: &Routers) -> Result<Source, MergeError> {
        self.plan.source_with(&self.assembly, &gates(&routers.layers, &routers.shared))
    }

    /// The model with the MLPs of one expert for every token, under the output's attention.
    ///
    /// * `shared`: gates of the shared expert, where [`Prepared::gated_shared`]
    pub(crate) fn oracle(&self, expert: usize, shared: &[Gate]) -> Result<Source, MergeError> {
        self.oracle_of(&self.assembly, expert, shared)
    }

    /// The same of another assembly.
    pub(crate) fn oracle_of(
        &self,
        assembly: &Assembly,
        expert: usize,
        shared: &[Gate],
    ) -> Result<Source, MergeError> {
        let forced = assembly.forced(expert)?;
        let plan = Plan::new(&forced)?;
        let dims = plan.shape.dims;
        let zeros = Gate { experts: 2, hidden: dims.hidden, rows: vec![0.0; 2 * dims.hidden] };
        plan.source_with(&forced, &gates(&vec![zeros; dims.layers], shared))
    }

    /// Whether there is a shared expert whose gate has to be made before the model can run.
    pub(crate) fn gated_shared(&self) -> bool {
        self.plan.tensors.iter().any(|t| matches!(t.content, Content::SharedGate(_)))
    }

    /// What the result is measured against: the base, then every expert; `None` for one that is the base itself.
    pub(crate) fn references(&self) -> Vec<(String, Option<&Source>)> {
        let base = self.plain_base.as_ref().unwrap_or(&self.assembly.base);
        let mut models = vec![("base".to_owned(), Some(base))];
        for (e, (expert, &same)) in self.assembly.experts.iter().zip(&self.same_as_base).enumerate()
        {
            let source = self.originals.get(e).unwrap_or(&expert.source);
            models.push((expert.name.clone(), (!same).then_some(source)));
        }
        models
    }

    /// Evaluation text.
    pub(crate) fn domains(&self) -> &[Domain] {
        &self.domains
    }

    /// Names of the experts, a generalist included.
    pub(crate) fn expert_names(&self) -> Vec<String> {
        self.names()
    }

    /// What was cut or left out of the prompts, and what else a person should know.
    pub(crate) fn all_notes(&self) -> Vec<String> {
        self.plan.warnings.iter().chain(&self.notes).cloned().collect()
    }

    /// Prompts of the experts, with what they wrote themselves once [`Prepared::routers`] was called.
    pub(crate) fn texts(&self) -> &[TokenPrompts] {
        &self.experts
    }

    /// Takes texts that are complete: the experts write none.
    pub(crate) fn take_texts(&mut self, texts: Vec<TokenPrompts>) {
        self.experts = texts;
        self.self_text.fill(0);
    }
}

/// Gates as the writer takes them.
pub(super) fn gates(layers: &[Gate], shared: &[Gate]) -> Gates {
    let rows = |gates: &[Gate]| gates.iter().map(|g| g.rows.clone()).collect();
    Gates { layers: rows(layers), shared: (!shared.is_empty()).then(|| rows(shared)) }
}
