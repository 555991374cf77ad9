//! Servers for tests.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread::JoinHandle;

use moe_merge_checkpoint::Interrupt;
use moe_merge_kernels::Exec;
use moe_merge_merge::families::Layout;
use moe_merge_model::Model;
use moe_merge_serve::{Options, Server};

use crate::common;

/// Answers with the messages, one a line.
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
    {% if add_generation_prompt %}assistant:{% endif %}";

/// A Mixtral of two tiny experts with a chat template.
pub fn model() -> &'static Path {
    static MODEL: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = MODEL.get_or_init(|| {
        let temp = tempfile::tempdir().unwrap();
        let sources = moe_merge_testkit::repository("recipes/quickstart");
        let source = |name: &str| format!("\"{}/{name}\"", sources.display());
        let text = format!(
            "base_model: {}\ngate_mode: random\nexperts_per_token: 2\nexperts:\n\
             - {{source_model: {}, name: prose, positive_prompts: [a]}}\n\
             - {{source_model: {}, name: code, positive_prompts: [b]}}\n\
             - {{source_model: {}, name: math, positive_prompts: [c]}}\n",
            source("base"),
            source("prose"),
            source("code"),
            source("math")
        );
        let out = temp.path().join("tiny-moe");
        common::build_text(&text, &temp.path().join("x.yaml"), &out, Layout::Hub);
        std::fs::write(out.join("chat_template.jinja"), TEMPLATE).unwrap();
        (temp, out)
    });
    path
}

/// A copy of it that can be changed.
pub fn copy(temp: &Path) -> PathBuf {
    let to = temp.join("copy");
    copy_folder(model(), &to);
    to
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for file in std::fs::read_dir(from).unwrap().flatten() {
        let (from, to) = (file.path(), to.join(file.file_name()));
        match from.is_dir() {
            true => copy_folder(&from, &to),
            false => drop(std::fs::copy(from, to).unwrap()),
        }
    }
}

/// A server that runs until this is dropped.
pub struct Host {
    pub address: SocketAddr,
    pub interrupt: Interrupt,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    pub fn of(folder: &Path, mut options: Options) -> Self {
        options.address.set_port(0);
        let reference = folder.display().to_string().parse().unwrap();
        let opener = Box::new(|source: &_| Model::open_with(source, Exec::fast()));
        let server = Server::open(&reference, Path::new("."), opener, options).unwrap();
        let (address, interrupt) = (server.address(), Interrupt::default());
        let seen = interrupt.clone();
        let thread = std::thread::spawn(move || server.run(&seen));
        Self { address, interrupt, thread: Some(thread) }
    }

    /// Stops it and waits for its end.
    pub fn stop(&mut self) {
        self.interrupt.trigger();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server does not panic");
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.interrupt.trigger();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the server panicked");
        }
    }
}
