//! Clients of others, unchanged.

use std::path::PathBuf;
use std::process::Command;

use moe_merge_serve::Options;
use serde_json::{Value, json};

use crate::client::post;
use crate::host::{self, Host};
use crate::live::{TOKEN, options, replace};

#[test]
fn the_official_python_client_works() {
    let Some(python) = moe_merge_testkit::python("MOE_MERGE_PYTHON_OPENAI") else { return };
    let host = Host::of(host::model(), Options::default());
    let script = moe_merge_testkit::repository("tests/python/check_openai.py");
    let address = format!("http://{}", host.address);
    let output = Command::new(&python).arg(script).args([&address, "tiny-moe"]).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let body =
        json!({"model": "tiny-moe", "prompt": "The river", "max_tokens": 20, "temperature": 0});
    let ours = post(host.address, "/v1/completions", &body).json();
    assert_eq!(found["text"], ours["choices"][0]["text"]);
}

/// `MOE_MERGE_CHROMIUM` names a browser, `MOE_MERGE_SCREENSHOT` where its picture goes.
#[test]
fn the_page_is_used_by_keyboard_in_a_browser() {
    let Some(python) = moe_merge_testkit::python("MOE_MERGE_PYTHON_OPENAI") else { return };
    let Some(browser) = moe_merge_testkit::program("MOE_MERGE_CHROMIUM", "Chromium") else {
        return;
    };
    let temp = tempfile::tempdir().unwrap();
    let folder = host::copy(temp.path());
    replace(&folder, 3);
    let host = Host::of(&folder, options());
    let script = moe_merge_testkit::repository("tests/python/check_page.py");
    let picture = std::env::var_os("MOE_MERGE_SCREENSHOT").map(PathBuf::from);
    let picture = picture.unwrap_or_else(|| temp.path().join("page.png"));
    let address = format!("http://{}", host.address);
    let mut command = Command::new(&python);
    command.arg(script).arg(browser).args([&address, TOKEN]).arg(picture);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
