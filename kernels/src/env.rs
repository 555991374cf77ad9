//! Settings of other libraries that have to be made before any thread starts.

/// What candle takes the number of its own threads from.
const CANDLE_THREADS: &str = "CANDLE_NUM_THREADS";

/// Lets candle add large tensors on the thread that asks for it, unless the environment says otherwise.
///
/// Its own threads wait in a loop for such sums. There are some for every layer on the way back, and the loops take a
/// quarter of the time of a training from the threads that compute. Does nothing once the process has other threads: a
/// program calls it first.
pub fn calm_candle() {
    if std::env::var_os(CANDLE_THREADS).is_some() || !alone() {
        return;
    }
    // SAFETY: no other thread is there that could read the environment meanwhile.
    unsafe { std::env::set_var(CANDLE_THREADS, "1") };
}

/// Whether this is the only thread of the process; `false` where the system does not tell.
fn alone() -> bool {
    std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_set_beside_other_threads() {
        let before = std::env::var_os(CANDLE_THREADS);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert!(!alone());
                calm_candle();
            });
        });
        assert_eq!(std::env::var_os(CANDLE_THREADS), before);
    }
}
