//! Per-layer and whole-model summaries.
