//! Threads that stay together through many short loops: what one token of decoding consists of.
//!
//! A token of a 1B model is about a hundred loops of 20 to 500 µs. Waking a sleeping thread takes a good part of that each
//! time, so here the pool's other threads join once and wait for the next loop by spinning. A loop's tasks are taken one by
//! one by whoever is free; the calling thread takes tasks too and waits for no thread that has not joined, so a busy pool
//! makes a crew slower and never stuck. What a task computes does not depend on who takes it.
//!
//! This file is a home of `unsafe`: a loop's closure lives on its caller's stack and is lent to threads that are running already.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// Turns of a waiting loop before the thread offers its core to others.
const SPINS: u32 = 4_096;

/// The threads of one [`with_crew`].
pub struct Crew {
    /// The loop that is being worked on, null between loops. It outlives every thread counted in `inside`.
    job: AtomicPtr<Job<'static>>,
    /// Number of loops so far.
    loops: AtomicUsize,
    /// Threads that may be looking at `job`.
    inside: AtomicUsize,
    /// Whether there will be no more loops.
    over: AtomicBool,
    /// Index in the pool of the thread that leads.
    leader: Option<usize>,
    n_threads: usize,
}

/// A loop.
struct Job<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    n_tasks: usize,
    /// The next task that nobody has taken.
    next: AtomicUsize,
}

impl Job<'_> {
    fn work(&self) {
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= self.n_tasks {
                return;
            }
            (self.task)(task);
        }
    }
}

/// Calls `lead` on this thread while the other threads of the current pool help with its loops.
pub fn with_crew<T: Send>(lead: impl FnOnce(&Crew) -> T + Send) -> T {
    let crew = Crew {
        job: AtomicPtr::default(),
        loops: AtomicUsize::new(0),
        inside: AtomicUsize::new(0),
        over: AtomicBool::new(false),
        leader: rayon::current_thread_index(),
        // Outside a pool's threads `rayon::scope` would move `lead` to one of them: there is nobody to help here.
        n_threads: rayon::current_thread_index().map_or(1, |_| rayon::current_num_threads()),
    };
    if crew.n_threads == 1 {
        return lead(&crew);
    }
    rayon::scope(|scope| {
        for _ in 1..crew.n_threads {
            scope.spawn(|_| crew.help());
        }
        let _over = Finally(|| crew.over.store(true, Ordering::Release));
        lead(&crew)
    })
}

impl Crew {
    /// Threads that take tasks, the leader among them.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Calls `task(0), task(1), ... task(n_tasks - 1)`, on all threads and in no order.
    pub fn run(&self, n_tasks: usize, task: impl Fn(usize) + Sync) {
        if n_tasks <= 1 {
            return (0..n_tasks).for_each(task);
        }
        let mut job = Job { task: &task, n_tasks, next: AtomicUsize::new(0) };
        self.job.store((&raw mut job).cast(), Ordering::SeqCst);
        self.loops.fetch_add(1, Ordering::Release);
        // Also if a task panics here: nobody may look at the job after this function.
        let _closed = Finally(|| {
            self.job.store(std::ptr::null_mut(), Ordering::SeqCst);
            wait_until(|| self.inside.load(Ordering::SeqCst) == 0);
        });
        job.work();
    }

    /// Calls `work(number, part)` for each part of `len` elements, the last one may be shorter; never for no data.
    pub fn for_chunks<T: Send>(&self, data: &mut [T], len: usize, work: impl Fn(usize, &mut [T]) + Sync) {
        if data.is_empty() {
            return;
        }
        let (total, parts) = (data.len(), Parts(data.as_mut_ptr()));
        self.run(total.div_ceil(len), |number| {
            let start = number * len;
            // SAFETY: the range lies in `data`, which is borrowed until `run` returns, and each number comes up once.
            let part = unsafe { std::slice::from_raw_parts_mut(parts.start().add(start), len.min(total - start)) };
            work(number, part);
        });
    }

    /// Takes part in loops until there are no more.
    fn help(&self) {
        // The leader comes here if it waits for something else in the pool, or when all is over.
        if rayon::current_thread_index() == self.leader {
            return;
        }
        let mut seen = 0;
        loop {
            wait_until(|| self.loops.load(Ordering::Acquire) != seen || self.over.load(Ordering::Acquire));
            if self.over.load(Ordering::Acquire) {
                return;
            }
            seen = self.loops.load(Ordering::Acquire);
            self.inside.fetch_add(1, Ordering::SeqCst);
            let _left = Finally(|| {
                self.inside.fetch_sub(1, Ordering::SeqCst);
            });
            // SAFETY: a job that is still published after this thread was counted in `inside` is not gone before the thread
            // is counted out again: its owner takes the pointer away first and looks at `inside` then, all in one order.
            if let Some(job) = unsafe { self.job.load(Ordering::SeqCst).as_ref() } {
                job.work();
            }
        }
    }
}

/// Where the parts of a slice begin.
struct Parts<T>(*mut T);

impl<T> Parts<T> {
    fn start(&self) -> *mut T {
        self.0
    }
}

// SAFETY: the pointer stands for a `&mut [T]` whose parts go to one thread each.
unsafe impl<T: Send> Sync for Parts<T> {}

/// Calls its function when it goes out of scope, however that happens.
struct Finally<F: FnMut()>(F);

impl<F: FnMut()> Drop for Finally<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

fn wait_until(condition: impl Fn() -> bool) {
    let mut spins = 0;
    while !condition() {
        spins += 1;
        if spins < SPINS {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::panic::AssertUnwindSafe;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn every_task_of_every_loop_runs_once() {
        for threads in [1, 2, 3, 8] {
            let sums = pool(threads).install(|| {
                with_crew(|crew| {
                    let mut data = vec![0u64; 1003];
                    for round in 1..=200 {
                        crew.for_chunks(&mut data, 10, |number, part| {
                            for (i, x) in part.iter_mut().enumerate() {
                                *x += round * (number * 10 + i) as u64;
                            }
                        });
                        crew.run(0, |_| unreachable!());
                        crew.for_chunks(&mut [0; 0], 0, |_, _| unreachable!());
                    }
                    data
                })
            });
            for (i, sum) in sums.iter().enumerate() {
                assert_eq!(*sum, 200 * 201 / 2 * i as u64, "{threads} threads");
            }
        }
    }

    #[test]
    fn more_than_one_thread_takes_part() {
        let seen = std::sync::Mutex::new(std::collections::HashSet::new());
        pool(2).install(|| {
            with_crew(|crew| {
                // Tasks that wait for each other can only end on two threads.
                let both = std::sync::Barrier::new(2);
                crew.run(2, |_| {
                    both.wait();
                    seen.lock().unwrap().insert(std::thread::current().id());
                });
            });
        });
        assert_eq!(seen.lock().unwrap().len(), 2);
    }

    #[test]
    fn crews_side_by_side_and_rayon_inside_do_not_block_each_other() {
        let pool = pool(2);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    pool.install(|| {
                        for _ in 0..50 {
                            let total = with_crew(|crew| {
                                let mut data = vec![1u64; 64];
                                crew.for_chunks(&mut data, 1, |_, part| part[0] += 1);
                                let (a, b) =
                                    rayon::join(|| data[..32].iter().sum::<u64>(), || data[32..].iter().sum::<u64>());
                                a + b
                            });
                            assert_eq!(total, 128);
                        }
                    });
                });
            }
        });
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_goes_on() {
        let pool = pool(2);
        for bad in [0, 7, 63] {
            let result = std::panic::catch_unwind(AssertUnwindSafe(|| {
                pool.install(|| with_crew(|crew| crew.run(64, |task| assert_ne!(task, bad))));
            }));
            assert!(result.is_err());
        }
        pool.install(|| with_crew(|crew| crew.run(64, |_| {})));
    }

    #[test]
    fn outside_a_pool_the_caller_works_alone() {
        let mut data = [0; 5];
        with_crew(|crew| crew.for_chunks(&mut data, 2, |number, part| part.fill(number)));
        assert_eq!(data, [0, 0, 1, 1, 2]);
    }
}
