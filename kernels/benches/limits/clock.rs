//! Two ways to tell the time.

use std::time::{Duration, Instant};

/// How a measure is timed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// Time that this process was given, of all its threads: for work on one thread.
    Processor,
    /// Time of the world: for work on several.
    Wall,
}

impl Clock {
    /// The one for work on so many threads.
    pub fn of(threads: usize) -> Self {
        if threads == 1 { Clock::Processor } else { Clock::Wall }
    }

    /// Time that `work` takes.
    pub fn time(self, work: &mut dyn FnMut()) -> Duration {
        #[cfg(unix)]
        if self == Clock::Processor {
            let start = processor_time();
            work();
            return processor_time().saturating_sub(start);
        }
        let start = Instant::now();
        work();
        start.elapsed()
    }
}

#[cfg(unix)]
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
