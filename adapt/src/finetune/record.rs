//! What a run leaves to look at: a line of JSON for each step, and a picture of the losses.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use moe_merge_checkpoint::{CheckpointError, Explain};
use serde_json::{Value, json};

use super::state::{EvaluationRecord, State, StepRecord};
use super::train::{Progress, Watcher};

/// A log that grows by a line with each step.
pub struct Log {
    file: Option<(PathBuf, BufWriter<File>)>,
    failed: Option<CheckpointError>,
}

impl Log {
    /// Begins a log with what was done in earlier runs.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn open(path: Option<&Path>, state: &State) -> Result<Self, CheckpointError> {
        let Some(path) = path else { return Ok(Self { file: None, failed: None }) };
        let file = File::create(path).map_err(|e| CheckpointError::io("writing", path, e))?;
        let mut log = Self { file: Some((path.to_owned(), BufWriter::new(file))), failed: None };
        let mut looks = state.evaluations.iter().peekable();
        for step in &state.steps {
            while let Some(look) = looks.next_if(|e| e.step < step.step) {
                log.line(&evaluation(look));
            }
            log.line(&json!(step));
        }
        // The last look comes again with the first word of the run that goes on.
        log.failed.take().map_or(Ok(log), Err)
    }

    fn line(&mut self, value: &Value) {
        let Some((path, file)) = &mut self.file else { return };
        if let Err(e) = writeln!(file, "{value}").and_then(|()| file.flush()) {
            self.failed = Some(CheckpointError::io("writing", path, e));
            self.file = None;
        }
    }

    /// Why it ends before the training does, if it does: a log is no reason to lose what was learnt.
    pub fn note(&self) -> Option<String> {
        let failed = self.failed.as_ref()?;
        let fields = failed.fields().into_iter().map(|(key, value)| format!("{key} {value}"));
        let fields = fields.collect::<Vec<_>>().join(", ");
        Some(format!("the log is not whole: {failed} ({fields})"))
    }
}

fn evaluation(look: &EvaluationRecord) -> Value {
    json!({"step": look.step, "validation_loss": look.loss})
}

/// Writes the log, and passes on what it is told.
pub struct Recorder<'a> {
    pub log: &'a mut Log,
    pub watcher: &'a mut dyn Watcher,
}

impl Watcher for Recorder<'_> {
    fn stage(&mut self, what: &str) {
        self.watcher.stage(what);
    }

    fn progress(&mut self, progress: &Progress<'_>) {
        if let Some(step) = progress.step {
            self.log.line(&json!(step));
        }
        if let Some(look) = progress.evaluation {
            self.log.line(&evaluation(look));
        }
        self.watcher.progress(progress);
    }
}

/// Width and height of a picture, and the margin around its curves.
const SIZE: (f64, f64, f64) = (720.0, 360.0, 48.0);

/// Writes the losses as an SVG picture.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn plot(path: &Path, state: &State) -> Result<(), CheckpointError> {
    let picture = svg(&state.steps, &state.evaluations);
    std::fs::write(path, picture).map_err(|e| CheckpointError::io("writing", path, e))
}

fn svg(steps: &[StepRecord], looks: &[EvaluationRecord]) -> String {
    let train: Vec<(f64, f64)> = steps.iter().map(|s| (s.step as f64, s.loss)).collect();
    let held: Vec<(f64, f64)> = looks.iter().map(|e| (e.step as f64, e.loss)).collect();
    let all = || train.iter().chain(&held);
    let last = all().map(|p| p.0).fold(1.0, f64::max);
    let low = all().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let high = all().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
    let (low, high) = if low.is_finite() && high > low { (low, high) } else { (0.0, 1.0) };
    let (width, height, margin) = SIZE;
    let place = |(x, y): (f64, f64)| {
        let x = margin + x / last * (width - 2.0 * margin);
        let y = height - margin - (y - low) / (high - low) * (height - 2.0 * margin);
        format!("{x:.1},{y:.1}")
    };
    let curve = |points: &[(f64, f64)], class: &str| {
        let points: Vec<String> = points.iter().map(|p| place(*p)).collect();
        format!("<polyline class=\"{class}\" points=\"{}\"/>\n", points.join(" "))
    };
    let (bottom, right) = (height - margin, width - margin);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<style>polyline{{fill:none;stroke-width:1.5}}.train{{stroke:#8aa}}\
         .held{{stroke:#c40;stroke-width:2}}path{{stroke:#888;fill:none}}</style>\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n\
         <path d=\"M{margin} {margin}V{bottom}H{right}\"/>\n"
    );
    text += &curve(&train, "train");
    text += &curve(&held, "held");
    for (x, y, anchor, label) in [
        (margin - 6.0, margin + 4.0, "end", format!("{high:.3}")),
        (margin - 6.0, bottom, "end", format!("{low:.3}")),
        (right, bottom + 18.0, "end", format!("step {last:.0}")),
        (right, margin - 8.0, "end", "nats per token: training (grey), held-out text (red)".into()),
    ] {
        text += &format!("<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{label}</text>\n");
    }
    text + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_fill_the_picture() {
        let step = |step, loss| StepRecord {
            step,
            epoch: 1,
            loss,
            gradient_norm: 1.0,
            learning_rate: 0.1,
            tokens: 10,
            coverage: 1.0,
            tokens_per_second: 5.0,
        };
        let look = EvaluationRecord { step: 0, loss: 3.0 };
        let text = svg(&[step(1, 2.0), step(2, 1.0)], &[look]);
        assert!(text.contains("class=\"train\" points=\"360.0,180.0 672.0,312.0\""), "{text}");
        assert!(text.contains("class=\"held\" points=\"48.0,48.0\""), "{text}");
        assert!(text.ends_with("</svg>\n"));
    }
}
