//! `merge-tensors RECIPE --out FILE`: dense methods on files of tensors.

use moe_merge_checkpoint::Replace;
use moe_merge_checkpoint::write::Watch;
use moe_merge_merge::recipe::{self, Recipe};
use moe_merge_merge::{MergeError, Missing, raw, remarks, write_tensors};
use serde_json::json;

use super::build::notes;
use crate::args::{Common, MergeTensorsArgs};
use crate::exit::{self, Outcome};
use crate::progress::{Progress, Unit};
use crate::render::{self, Failure, bytes, count};

/// Writes the file.
pub fn run(args: &MergeTensorsArgs, common: &Common) -> Result<Outcome, Failure> {
    let replace = if args.force { Replace::Force } else { Replace::Never };
    let text = recipe::read(&args.recipe)?;
    let Recipe::Dense(recipe) = recipe::parse(&text, &args.recipe).map_err(MergeError::from)?
    else {
        let error = MergeError::Argument {
            what: "files of tensors have no experts".into(),
            name: "RECIPE".into(),
            expected: "a recipe with `merge_method`".into(),
            found: "a recipe with `experts`".into(),
            hint: None,
        };
        return Err(error.into());
    };
    let missing = match (args.skip_missing, args.union) {
        (true, _) => Missing::Drop,
        (_, true) => Missing::Union,
        _ => Missing::Refuse,
    };
    let folder = args.recipe.parent().unwrap_or(std::path::Path::new(""));
    let source = raw(&recipe, folder, missing)?;
    let size = source.tensors.values().map(|w| w.size_in(w.dtype())).sum();
    let progress = Progress::new(size, Unit::Bytes, common.quiet);
    let watch = Watch { interrupt: exit::interrupt(), progress: &|n| progress.advance(n) };
    let written = write_tensors(&source, &args.out, replace, watch)?;
    drop(progress);
    let mut told = source.notes.clone();
    told.extend(remarks(source.tensors.iter().map(|(name, w)| (&**name, w))));
    notes(&told, common);
    let (path, tensors) = (args.out.display().to_string(), source.tensors.len());
    match common.json {
        true => render::json(&json!({
            "version": 1, "output": path, "method": recipe.method.name, "tensors": tensors,
            "bytes": written, "warnings": told,
        }))?,
        false => render::out(&format!(
            "{path}  {} of {} tensors; {}\n",
            recipe.method.name,
            count(tensors),
            bytes(written)
        ))?,
    }
    Ok(Outcome::Done)
}
