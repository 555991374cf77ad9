//! The coordinates that estimators solve in.

use crate::error::RouterError;
use crate::samples::Table;
use crate::span::Span;

/// The table's rows in the coordinates that are solved in.
pub(crate) struct Features {
    pub width: usize,
    pub x64: Vec<f64>, // [n, width]
    pub x32: Vec<f32>, // [n, width]
    /// The span and the rows it was made of, where there are few rows.
    pub span: Option<(Span, Vec<f64>)>,
}

impl Features {
    /// The span of the rows where it is at most half as wide as they are.
    pub fn new(table: &Table) -> Result<Self, RouterError> {
        // The span costs one product of rows by rows; it pays where it makes every later pass at least twice as short.
        if 2 * table.rows() > table.hidden { Ok(Self::whole(table)) } else { Self::in_span(table) }
    }

    /// The features as they are.
    pub fn whole(table: &Table) -> Self {
        let x64 = table.x.iter().map(|&v| f64::from(v)).collect();
        Self { width: table.hidden, x64, x32: table.x.clone(), span: None }
    }

    /// Coordinates in the span of the rows, `rows` of them at most.
    pub fn in_span(table: &Table) -> Result<Self, RouterError> {
        let wide: Vec<f64> = table.x.iter().map(|&v| f64::from(v)).collect();
        let span = Span::new(&wide, table.rows(), table.hidden)?;
        Ok(Self {
            width: span.rank,
            x64: span.coordinates.clone(),
            x32: span.coordinates.iter().map(|&v| v as f32).collect(),
            span: Some((span, wide)),
        })
    }

    /// Parameters `[experts, width]` as parameters `[experts, hidden]`.
    pub fn expand(&self, parameters: &[f64], hidden: usize) -> Vec<f64> {
        match &self.span {
            None => parameters.to_vec(),
            Some((span, rows)) => span.expand(parameters, rows, hidden),
        }
    }

    /// About one over the curvature of the loss: `E‖x‖² / 2` bounds it.
    pub fn first_step(&self, table: &Table) -> f64 {
        2.0 / table.hidden as f64
    }
}
