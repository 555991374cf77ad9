//! One table says everything about the methods: its page, its tests, its schema.

use moe_merge_merge::methods::{METHODS, page};
use moe_merge_merge::recipe::{self, json_schema};
use moe_merge_testkit::repository;

#[test]
fn the_pages_are_up_to_date() {
    for (name, expected) in [("docs/methods.md", page()), ("docs/recipe.md", recipe::page())] {
        up_to_date(name, &expected);
    }
}

fn up_to_date(name: &str, expected: &str) {
    let path = repository(name);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(&path, expected).unwrap();
    }
    let found = fs_err::read_to_string(&path).unwrap_or_default();
    assert!(found == expected, "{name} is out of date; UPDATE_DOCS=1 cargo test writes it");
}

#[test]
fn every_row_is_complete_and_has_a_golden_result() {
    let golden = moe_merge_testkit::shared("golden/dense").map(|folder| {
        let files = fs_err::read_dir(folder).unwrap().map(|e| e.unwrap().path());
        let recipes = files.filter(|p| p.extension().is_some_and(|e| e == "yaml"));
        recipes.map(|p| fs_err::read_to_string(p).unwrap()).collect::<Vec<_>>()
    });
    for method in METHODS {
        assert!(
            !method.summary.is_empty() && !method.source.is_empty() && !method.formula.is_empty()
        );
        assert_eq!(METHODS.iter().filter(|m| m.name == method.name).count(), 1);
        let model_first = method.parameters.iter().map(|p| p.scope as u8).is_sorted();
        assert!(model_first, "`{}` lists parameters of models first", method.name);
        if let Some(golden) = &golden {
            let line = format!("merge_method: {}\n", method.name);
            // Ours alone, or without a golden recipe: these have tests of their own.
            let alone = ["della_linear", "iso_c", "tsv", "regmean", "regmean_stream"];
            let found = golden.iter().any(|g| g.contains(&line)) || alone.contains(&method.name);
            assert!(found, "`{}` has no golden recipe", method.name);
        }
    }
}

#[test]
fn misspelt_names_and_values_out_of_range() {
    let one = |text: &str| {
        let errors = recipe::parse(text, "r.yaml".as_ref()).map(|_| ()).unwrap_err().0;
        assert_eq!(errors.len(), 1, "{errors:#?}");
        errors.into_iter().next().unwrap()
    };
    let models = "base_model: b\nmodels: [{model: a}, {model: c}]\n";
    for (typed, meant) in [
        ("dare_tie", "dare_ties"),
        ("model-stock", "model_stock"),
        ("karchre", "karcher"),
        ("nu_slerp", "nuslerp"),
        ("ramplus", "ramplus_tl"),
    ] {
        let error = one(&format!("merge_method: {typed}\n{models}"));
        assert_eq!(error.hint, Some(format!("did you mean `{meant}`?")));
    }
    let ties = |parameters: &str| {
        one(&format!("merge_method: breadcrumbs\n{models}parameters: {parameters}\n"))
    };
    assert_eq!(ties("{density: 1.5}").expected.as_deref(), Some("a number from 0 to 1"));
    assert_eq!(ties("{densty: 0.5}").hint.as_deref(), Some("did you mean `density`?"));
    assert_eq!(ties("{gamma: [0.1, -1]}").path, "parameters.gamma[1]");
}

#[test]
fn the_schema_knows_every_parameter() {
    let schema = json_schema();
    let known = &schema["$defs"]["parameters"]["properties"];
    for method in METHODS {
        for p in method.parameters {
            let doc = known[p.name]["description"].as_str().expect(p.name);
            assert!(doc.contains(method.name), "{} {}", method.name, p.name);
        }
    }
    let names =
        schema["$defs"]["dense"]["properties"]["merge_method"]["examples"].as_array().unwrap();
    assert_eq!(names.len(), METHODS.len());
}
