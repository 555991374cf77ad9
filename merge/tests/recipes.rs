//! Recipes as people write them, and every mistake they can hold.

use moe_merge_checkpoint::{Dtype, Explain, Kind};
use moe_merge_merge::documents::Content;
use moe_merge_merge::recipe::{
    self, Architecture, Attention, Choice, Expert, GateMode, MoeRecipe, Recipe, RecipeErrors,
    SourceKind,
};
use moe_merge_testkit::shared;

fn moe(text: &str) -> MoeRecipe {
    match recipe::parse(text, "moe.yaml".as_ref()) {
        Ok(Recipe::Moe(moe)) => moe,
        other => panic!("{other:?}"),
    }
}

fn errors(text: &str) -> RecipeErrors {
    recipe::parse(text, "moe.yaml".as_ref()).map(|_| ()).unwrap_err()
}

/// The one mistake of a recipe.
fn error(text: &str) -> recipe::RecipeError {
    let all = errors(text).0;
    assert_eq!(all.len(), 1, "{all:#?}");
    all.into_iter().next().unwrap()
}

const EXPERTS: &str = "base_model: base
experts:
  - source_model: a
    positive_prompts: [one]
  - source_model: b
    positive_prompts: [two]
";

#[test]
fn all_golden_moe_recipes() {
    let Some(folder) = shared("golden/moe") else { return };
    let mut count = 0;
    for entry in fs_err::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "yaml") {
            continue;
        }
        let text = fs_err::read_to_string(&path).unwrap();
        let Ok(Recipe::Moe(moe)) = recipe::parse(&text, &path) else { panic!("{path:?}") };
        assert_eq!((moe.experts.len(), moe.experts_per_token, moe.dtype), (3, 2, Some(Dtype::F32)));
        assert!(moe.experts.iter().all(|e| e.positive_prompts.len() == 4));
        assert!(!moe.architecture.is_empty(), "{path:?}");
        let name = path.file_stem().unwrap().to_str().unwrap();
        let negative = if name.ends_with("negative") { [2, 2, 0] } else { [0, 0, 0] };
        let found: Vec<_> = moe.experts.iter().map(|e| e.negative_prompts.len()).collect();
        assert_eq!(found, negative, "{name}");
        if name == "deepseek_shared" {
            assert_eq!(moe.shared_experts[0].residual_scale, 0.3);
            assert!(moe.shared_experts[0].positive_prompts.is_empty());
        }
        count += 1;
    }
    assert_eq!(count, 11);
}

#[test]
fn recipes_from_the_wild() {
    let commented = moe("# merge of two
base_model: mistralai/Mistral-7B-Instruct-v0.2
gate_mode: hidden # one of \"hidden\", \"cheap_embed\", or \"random\"
dtype: bfloat16 # output dtype (float32, float16, or bfloat16)
## (optional)
# experts_per_token: 2
experts:
  - source_model: teknium/OpenHermes-2.5-Mistral-7B
    positive_prompts:
      - \"Mathematics\"
      - \"Physics\"
    ## (optional)
    # negative_prompts:
    #   - \"This is a prompt expert_model_1 should not be used for\"
  - source_model: org/other@v1.2
    positive_prompts:
    - |
      def f(x):
          return x
    - >-
      folded
      text
    - !!str 12
");
    assert_eq!(Some(commented.gate_mode), GateMode::named("hidden"));
    assert_eq!(commented.dtype, Some(Dtype::BF16));
    assert_eq!(commented.experts[0].label(), "OpenHermes-2.5-Mistral-7B");
    assert_eq!(
        commented.experts[1].positive_prompts,
        ["def f(x):\n    return x\n", "folded text", "12"]
    );
    let SourceKind::Model(other) = &commented.experts[1].source.kind else { panic!("model") };
    assert_eq!((other.model.as_str(), other.revision.as_deref()), ("org/other", Some("v1.2")));

    let anchors = moe("base_model: &base {model: {path: org/base, revision: main}}
experts:
  - source_model: *base
    positive_prompts: &p [a, b]
  - source_model: {model: org/x, lora: {path: org/y, revision: r}}
    positive_prompts: [c]
    negative_prompts: *p
shared_experts:
  - source_model: *base
    positive_prompts: [d]
architecture: Qwen
");
    assert_eq!(anchors.gate_mode.name(), "auto");
    assert_eq!(anchors.experts[1].negative_prompts, ["a", "b"]);
    assert_eq!(anchors.architecture, [Architecture::Qwen2Moe, Architecture::Qwen3Moe]);
    let SourceKind::Model(with) = &anchors.experts[1].source.kind else { panic!("model") };
    assert_eq!(with.to_string(), "org/x+org/y@r");

    let random = moe(
        "base_model: b\nexperts: [{source_model: b}, {source_model: c+d}]\ngate_mode: uniform_random\n",
    );
    assert_eq!(random.gate_mode.name(), "uniform_random");
    let same =
        "base_model: b\nexperts: [{source_model: b}, {source_model: b}]\ngate_mode: random\n";
    assert!(error(same).what.contains("all experts are the same model"));
    moe(&format!("{same}allow_identical_experts: true\n"));
}

#[test]
fn our_own_keys() {
    let folder = tempfile::tempdir().unwrap();
    fs_err::write(folder.path().join("p.txt"), "one\ntwo\n\n\nthree\n").unwrap();
    fs_err::write(folder.path().join("p.jsonl"), "{\"text\": \"four\"}\n").unwrap();
    let text = "base_model: base
experts:
  - {source_model: a, name: prose, prompts_file: p.txt, layers: [0, 30]}
  - {source_model: b.yaml, prompts_file: p.jsonl, positive_prompts: [zero], noise_scale: 1e-3, residual_scale: 0.5}
  - source_model: {merge_method: linear, models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]}
    positive_prompts: [five]
experts_per_token: 3
tokenizer: base
attention: average
evaluation: {prose: p.txt, code: p.jsonl}
output: merged/x
seed: 7
generalist: false
self_text: null
";
    let Ok(Recipe::Moe(moe)) = recipe::parse(text, &folder.path().join("r.yaml")) else {
        panic!("parses")
    };
    assert_eq!(in_files(&moe.experts[0]), ["one\ntwo", "three"]);
    assert_eq!(moe.experts[0].layers, Some(0..30));
    assert_eq!(moe.experts[0].label(), "prose");
    assert_eq!(moe.experts[1].positive_prompts, ["zero"]);
    assert_eq!(in_files(&moe.experts[1]), ["four"]);
    assert_eq!((moe.generalist, moe.sequential), (Some(Choice::No), None));
    assert_eq!((moe.self_text, moe.prompt_tokens), (None, None));
    assert_eq!((moe.experts[1].noise_scale, moe.experts[1].residual_scale), (0.001, 0.5));
    assert!(matches!(moe.experts[1].source.kind, SourceKind::File(_)));
    assert!(matches!(moe.experts[2].source.kind, SourceKind::Inline(_)));
    assert_eq!((moe.experts_per_token, moe.seed, moe.base_tokenizer), (3, 7, true));
    assert_eq!(moe.evaluation[1], ("code".to_owned(), folder.path().join("p.jsonl")));
    let Attention::Merge(average) = &moe.attention else { panic!("average") };
    assert_eq!(average.method.name, "linear");
    let recipe::Parts::Models(models) = &average.modules[0].parts else { panic!("models") };
    assert_eq!(models.len(), 3);
}

/// Plain texts of an expert's files.
fn in_files(expert: &Expert) -> Vec<String> {
    let documents = expert.prompts_files.iter().flat_map(|f| &f.documents);
    let text = |d: &moe_merge_merge::documents::Document| match &d.content {
        Content::Text(text) => text.clone(),
        other => panic!("{other:?}"),
    };
    documents.map(text).collect()
}

#[test]
fn keys_of_calibration() {
    let with = |keys: &str| moe(&format!("{EXPERTS}{keys}\n"));
    assert_eq!(with("self_text: 5000").self_text, Some(5000));
    assert_eq!(with("self_text: 0").self_text, Some(0));
    assert_eq!(with("self_text: false").self_text, Some(0));
    for (text, choice) in [("true", Choice::Yes), ("off", Choice::No), ("auto", Choice::Auto)] {
        assert_eq!(with(&format!("generalist: {text}")).generalist, Some(choice));
        assert_eq!(with(&format!("sequential: {text}")).sequential, Some(choice));
    }
    assert_eq!(with("prompt_tokens: 300").prompt_tokens, Some(300));
    let mut learned = Vec::new();
    for estimator in moe_merge_router::ESTIMATORS {
        let mode = with(&format!("gate_mode: {}", estimator.name)).gate_mode;
        assert_eq!(mode.name(), estimator.name);
        learned.extend(mode.learned().then_some(mode.name()));
    }
    assert!(learned == ["auto", "match", "logistic", "ridge", "lda", "mean"], "{learned:?}");
}

#[test]
fn learned_gates_need_no_prompts() {
    let bare =
        "base_model: base\nexperts: [{source_model: a}, {source_model: b, prompts_file: null}]\n";
    assert!(moe(bare).experts.iter().all(|e| !e.has_prompts()));
    for mode in ["hidden", "hidden_avg", "hidden_last", "cheap_embed"] {
        let all = errors(&format!("{bare}gate_mode: {mode}\nself_text: 100\n")).0;
        assert!(all.len() == 2 && all[0].what.contains(mode), "{all:?}");
    }
    let all = errors(&format!("{bare}self_text: 0\n")).0;
    assert!(all.len() == 2 && all[1].what.contains("`self_text: 0` lets it write none"), "{all:?}");
    assert_eq!(all[1].path, "experts[1]");
    moe(&format!("{bare}gate_mode: random\nself_text: 0\n"));
}

#[test]
fn prompts_files_in_lists_and_with_labels() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs_err::write(folder.path().join(name), text).unwrap();
    write("a.txt", "one\n\ntwo\n");
    write(
        "all.jsonl",
        "{\"text\": \"P\", \"expert\": \"prose\"}\n{\"text\": \"C\", \"domain\": \"code\"}\n\
         {\"text\": \"N\", \"label\": 1}\n{\"text\": \"\"}\n",
    );
    write("by.json", "{\"prose\": [\"p\"], \"code\": [\"c\"]}");
    let parse = |prose: &str, code: &str| {
        let text = format!(
            "base_model: base\nexperts:\n  - {{source_model: a, name: prose, prompts_file: {prose}}}\n  \
             - {{source_model: b, name: code, prompts_file: {code}}}\n"
        );
        recipe::parse(&text, &folder.path().join("r.yaml"))
    };
    let Ok(Recipe::Moe(moe)) = parse("[a.txt, all.jsonl, by.json]", "[all.jsonl, by.json]") else {
        panic!("parses")
    };
    assert_eq!(in_files(&moe.experts[0]), ["one", "two", "P", "N", "p"]);
    assert_eq!(in_files(&moe.experts[1]), ["C", "N", "c"]);
    let file = &moe.experts[0].prompts_files[1];
    assert_eq!((file.unclaimed, file.empty), (0, 1));
    let Ok(Recipe::Moe(moe)) = parse("[a.txt, all.jsonl]", "by.json") else { panic!("parses") };
    assert_eq!(
        moe.experts[0].prompts_files[1].unclaimed, 1,
        "C is for code, which does not get it"
    );

    let refused = |prose: &str, what: &str, path: &str, found: &str| {
        let error = parse(prose, "a.txt").map(|_| ()).unwrap_err().0.remove(0);
        assert!(error.what.contains(what), "{error:?}");
        assert_eq!((error.path.as_str(), error.at.line), (path, 3), "{error:?}");
        assert!(error.found.as_ref().is_some_and(|f| f.contains(found)), "{error:?}");
    };
    let at = "experts[0].prompts_file";
    refused("[]", "does not fit", at, "a list of 0");
    refused("{a: b}", "does not fit", at, "mapping");
    refused("[a.txt, 5]", "does not fit", "experts[0].prompts_file[1]", "5");
    refused("[a.txt, b.txt]", "file not found", "experts[0].prompts_file[1]", "b.txt");
    write("bad.jsonl", "{\"text\": \"a\"}\n{\"txt\": 1}\n");
    refused(
        "bad.jsonl",
        "cannot be used",
        at,
        "bad.jsonl:2: a line is no document: an object with `txt`",
    );
    write("only.json", "{\"code\": [\"c\"]}");
    refused("only.json", "no document of the file is for this expert", at, "all labelled");
    write("stray.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b\", \"expert\": \"pros\"}\n");
    refused("stray.jsonl", "an expert that the recipe does not have", at, "`pros` at ");
    refused("r.yaml", "file not found", at, "r.yaml");
}

#[test]
fn attention_as_a_merge_block() {
    let block =
        moe(&format!("{EXPERTS}attention: {{merge_method: ties, parameters: {{density: 0.5}}}}\n"));
    let Attention::Merge(ties) = &block.attention else { panic!("block") };
    assert_eq!(ties.base_model.as_ref().map(|b| b.to_string()).as_deref(), Some("base"));
    assert!(ties.parameters.contains_key("weight") && ties.parameters.contains_key("density"));
    let wrong = error(&format!("{EXPERTS}attention: averge\n"));
    assert_eq!(wrong.hint.as_deref(), Some("did you mean `average`?"));
}

#[test]
fn each_mistake_has_its_message() {
    let cases: &[(&str, &str, &str)] = &[
        ("experts_per_token: 3", "does not fit the number of experts", "experts_per_token"),
        ("experts_per_token: 0", "does not fit the number of experts", "experts_per_token"),
        ("experts_per_token: two", "a value that does not fit", "experts_per_token"),
        ("gate_mode: hiden", "unknown `gate_mode`", "gate_mode"),
        ("gate_mod: hidden", "unknown key `gate_mod`", "gate_mod"),
        ("dtype: float8", "unknown `dtype`", "dtype"),
        ("architecture: mixtrl", "unknown `architecture`", "architecture"),
        ("generalist: maybe", "a value that does not fit", "generalist"),
        ("generalst: true", "unknown key `generalst`", "generalst"),
        ("sequential: [true]", "a value that does not fit", "sequential"),
        ("self_text: true", "a value that does not fit", "self_text"),
        ("self_text: -1", "a value that does not fit", "self_text"),
        ("self_text: 99999999999", "a value that does not fit", "self_text"),
        ("selftext: 5", "unknown key `selftext`", "selftext"),
        ("prompt_tokens: 0", "a value that does not fit", "prompt_tokens"),
        ("prompt_tokens: many", "a value that does not fit", "prompt_tokens"),
        ("align: refitt", "unknown `align`", "align"),
        ("align: true", "a value that does not fit", "align"),
        ("align: {method: retrain}", "unknown `method`", "align.method"),
        ("align: {tokens: 0}", "a value that does not fit", "align.tokens"),
        ("align: {token: 5}", "unknown key `token`", "align.token"),
        ("evaluation: {prose: nowhere.txt}", "file not found", "evaluation.prose"),
        ("seed: -1", "a value that does not fit", "seed"),
        ("tokenizer: union", "unknown `tokenizer`", "tokenizer"),
        ("merge_method: linear", "both `experts` and `merge_method`", ""),
        ("output: ''", "a value that does not fit", "output"),
        (
            "shared_experts: [{source_model: a, positive_prompts: [x]}, {source_model: b}]",
            "only some",
            "shared_experts",
        ),
    ];
    for (line, what, path) in cases {
        let error = error(&format!("{EXPERTS}{line}\n"));
        assert!(error.what.contains(what), "{line}: {error:?}");
        assert_eq!(error.path, *path, "{line}");
        assert_eq!(error.kind(), Kind::Usage);
        assert!(path.is_empty() || error.at.line == 7, "{line}: {error:?}");
    }
}

#[test]
fn each_mistake_of_an_expert_has_its_message() {
    let cases: &[(&str, &str, &str)] = &[
        ("positive_prompts: ['  ']", "a prompt is empty", ".positive_prompts[0]"),
        ("positive_prompts: [one]", "all experts have the same prompts", "experts"),
        ("positive_prompts: [x, 5]", "a value that does not fit", ".positive_prompts[1]"),
        ("{positive_prompts: [x], noise_scale: .nan}", "a value that does not fit", ".noise_scale"),
        (
            "{positive_prompts: [x], residual_scale: -1}",
            "a value that does not fit",
            ".residual_scale",
        ),
        ("{positive_prompts: [x], layers: [4, 4]}", "no range of layers", ".layers"),
        ("{positive_prompts: [x], layers: [9, 4]}", "no range of layers", ".layers"),
        ("{positive_prompts: [x], name: prose}", "two experts have the same name", ".name"),
        ("{positive_prompts: [x], prompts_file: nowhere.txt}", "file not found", ".prompts_file"),
        ("{positive_prompts: [x], positve_prompts: [y]}", "unknown key", ".positve_prompts"),
    ];
    for (keys, what, path) in cases {
        let keys = if keys.starts_with('{') {
            keys[1..keys.len() - 1].to_owned()
        } else {
            (*keys).to_owned()
        };
        let text = format!(
            "base_model: base\nexperts:\n  - {{source_model: a, name: prose, positive_prompts: [one]}}\n  - {{source_model: b, {}}}\n",
            if what.contains("same prompts") { format!("{keys}, name: other") } else { keys }
        );
        let error = error(&text);
        assert!(error.what.contains(what), "{text}: {error:?}");
        let path = if path.starts_with('.') || path.is_empty() {
            format!("experts[1]{path}")
        } else {
            (*path).to_owned()
        };
        assert_eq!(error.path, path, "{text}");
        assert!(error.at.line >= 3, "{error:?}");
    }
    assert!(
        error("base_model: b\nexperts: [{source_model: a, positive_prompts: [x]}]\n")
            .what
            .contains("at least two")
    );
}

#[test]
fn mistakes_of_dense_recipes() {
    let cases: &[(&str, &str, &str)] = &[
        (
            "merge_method: tie\nbase_model: a\nmodels: [{model: b}]",
            "unknown `merge_method`",
            "merge_method",
        ),
        (
            "merge_method: linear\nmodels: [{model: b}]\nparameters: {weight: {filter: a}}",
            "is missing",
            "parameters.weight.value",
        ),
        ("merge_method: linear", "neither `models` nor `slices`", ""),
        ("merge_method: ties\nmodels: [{model: b}]", "needs a `base_model`", "base_model"),
        (
            "merge_method: linear\nmodels: [{model: b, parameters: {wieght: 1}}]",
            "no parameter `wieght`",
            "models[0].parameters.wieght",
        ),
        (
            "merge_method: linear\nmodels: [{model: b, parameters: {normalize: true}}]",
            "holds for all models",
            "models[0].parameters.normalize",
        ),
        (
            "merge_method: linear\nmodels: [{model: b, parameters: {weight: [1, x]}}]",
            "does not fit",
            "models[0].parameters.weight[1]",
        ),
        (
            "merge_method: linear\nmodels: [{model: b}]\nparameters: {normalize: 0.5}",
            "does not fit",
            "parameters.normalize",
        ),
        (
            "merge_method: linear\nmodels: [{model: b}]\nparameters: {weight: [{filtr: a, value: 1}]}",
            "unknown key",
            "parameters.weight[0].filtr",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a}]}]",
            "is missing",
            "slices[0].sources[0].layer_range",
        ),
        (
            "merge_method: slerp\nbase_model: a\nslices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]}]",
            "different numbers of layers",
            "slices[0]",
        ),
        ("merge_method: linear\nmodels: []", "does not fit", "models"),
        (
            "merge_method: linear\nmodels: [{model: {model: {pth: a}}}]",
            "",
            "models[0].model.model.pth",
        ),
        ("models: [{model: b}]", "is missing", "merge_method"),
        (
            "merge_method: linear\nmodels: [{model: b}]\ntokenizer: {source: union}\ntokenizer_source: base",
            "both `tokenizer` and `tokenizer_source`",
            "tokenizer_source",
        ),
        (
            "merge_method: linear\nmodels: [{model: b}]\ntokenizer: {tokens: {x: {source: {kind: zer}}}}",
            "unknown `kind`",
            "tokenizer.tokens.x.source.kind",
        ),
        (
            "merge_method: linear\nmodels: [{model: b}]\ntokenizer: {tokens: {x: {source: {model: m, token: a, token_id: 3}}}}",
            "both `token` and `token_id`",
            "tokenizer.tokens.x.source",
        ),
        (
            "merge_method: linear\nmodels: [{model: b}]\ntokenizer: {pad_to_multiple_of: 0}",
            "does not fit",
            "tokenizer.pad_to_multiple_of",
        ),
        (
            "merge_method: linear\nmodels: [{model: b}]\nchat_template: chatmll",
            "unknown `chat_template`",
            "chat_template",
        ),
    ];
    for (text, what, path) in cases {
        let all = errors(text).0;
        let error = all.iter().find(|e| e.path == *path);
        let error = error.unwrap_or_else(|| panic!("{text}: {all:#?}"));
        assert!(error.what.contains(what), "{text}: {error:?}");
    }
}

#[test]
fn what_is_no_recipe() {
    for text in
        ["", "null", "[]", "5", "a: b", "hello", "\u{0}", "a: [", "- a\n-b: c", "? [a]\n: b\n"]
    {
        let all = errors(text);
        assert_eq!(all.0.len(), 1, "{text:?}: {all:?}");
        assert!(!all.to_string().is_empty());
    }
}

#[test]
fn ten_mistakes_at_once() {
    let text = "base_model: base
gate_mode: hiden
experts_per_token: 5
dtype: bfloat
experts:
  - source_model: a
    name: prose
    positve_prompts: [one]
    positive_prompts: ['']
  - source_model: [b]
    name: prose
    positive_prompts: [two]
    noise_scale: -0.1
  - name: prose
    positive_prompts: [two]
    layers: [7, 3]
  - source_model: c
    prompts_file: nowhere.txt
arhcitecture: mixtral
align: {method: refti}
";
    let all = errors(text);
    assert!(all.0.len() >= 10, "{all:?}");
    let shown: Vec<_> = all.0.iter().map(|e| e.to_text()).collect();
    insta::assert_snapshot!(format!("{all}\n\n{}\n", shown.join("\n")));
}
