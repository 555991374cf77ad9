//! Parts of one piece of work, handed out to threads one after another.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Calls `work` once for each of `0..tasks`, on the threads of the pool if that is worth it.
///
/// Whoever is free takes the next task, the caller too, so a thread that is busy or off its core holds up one task at
/// most; a helper that has not started when none are left is taken back instead of waited for (inside the pool; a caller
/// from outside it waits). Which thread does a task is chance: `work` must not let it show in the result.
pub(crate) fn for_each(tasks: usize, worth_sharing: bool, work: impl Fn(usize) + Sync) {
    let threads = if worth_sharing { rayon::current_num_threads().min(tasks) } else { 1 };
    if threads < 2 {
        return (0..tasks).for_each(work);
    }
    let next = AtomicUsize::new(0);
    let take = || {
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                return;
            }
            work(task);
        }
    };
    if rayon::current_thread_index().is_some() {
        spread(threads, &take);
    } else {
        // A join would put this thread to sleep and wake two others. This way costs a tenth of a region of 150 us on a busy
        // machine, where the one above costs nothing: models run inside the pool.
        rayon::in_place_scope(|scope| {
            for _ in 1..threads {
                scope.spawn(|_| take());
            }
            take();
        });
    }
}

/// Runs `take` on up to `threads` threads, at least once on this one. Joins, unlike spawned jobs, allocate nothing.
fn spread(threads: usize, take: &(impl Fn() + Sync)) {
    if threads == 1 {
        return take();
    }
    let there = threads / 2;
    rayon::join(|| spread(threads - there, take), || spread(there, take));
}

/// Numbers of which every task writes some.
pub(crate) struct Parts<'a> {
    start: *mut f32,
    len: usize,
    numbers: PhantomData<&'a mut [f32]>,
}
// SAFETY: whoever takes a range promises that no other task has any of it.
unsafe impl Sync for Parts<'_> {}

impl<'a> Parts<'a> {
    pub fn new(numbers: &'a mut [f32]) -> Self {
        Self { start: numbers.as_mut_ptr(), len: numbers.len(), numbers: PhantomData }
    }

    /// Numbers `from..from + len`.
    ///
    /// # Safety
    /// Nobody else holds any of them.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn range(&self, from: usize, len: usize) -> &mut [f32] {
        assert!(len <= self.len && from <= self.len - len, "a range behind the end");
        // SAFETY: they lie inside, and are the caller's alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_done_once() {
        for threads in 1..=3 {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for tasks in [0, 1, 2, 3, 100] {
                for worth_sharing in [false, true] {
                    let done: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    let mark = |i: usize| {
                        done[i].fetch_add(1, Ordering::Relaxed);
                    };
                    pool.install(|| for_each(tasks, worth_sharing, mark));
                    for_each(tasks, worth_sharing, mark);
                    assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 2));
                }
            }
        }
    }

    #[test]
    fn an_idle_thread_helps() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        // Both tasks wait for each other: one thread alone would never end.
        let meet = std::sync::Barrier::new(2);
        pool.install(|| {
            for_each(2, true, |_| {
                meet.wait();
            })
        });
    }
}
