//! mergekit's `hidden_last`: the same as `hidden`.

use super::{ExpertPrompts, hidden};
use crate::error::RouterError;
use crate::gate::Gate;

/// [`hidden::gate`] under mergekit's other name.
///
/// # Errors
/// As [`hidden::gate`].
///
/// # Source
/// mergekit `moe/router.py::get_gate_params`: every prompt mode but `hidden_avg` takes the last position.
pub fn gate(experts: &[ExpertPrompts<'_>], hidden: usize) -> Result<Gate, RouterError> {
    hidden::gate(experts, hidden)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_hidden() {
        let e = [ExpertPrompts { positive: vec![&[1.0, 1.0, 0.0, 2.0]], negative: vec![] }];
        assert_eq!(gate(&e, 2).unwrap(), hidden::gate(&e, 2).unwrap());
        assert_eq!(gate(&e, 2).unwrap().rows, [0.0, 1.0]);
    }
}
