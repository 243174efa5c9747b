//! The threads of an engine: [`ThreadPool`].

use std::cell::UnsafeCell;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::KernelError;

/// How many threads a pool has, and where they run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PoolConfig {
    /// Threads that work in a loop, the caller's included. Default: one for each core that the process may use.
    pub threads: Option<NonZeroUsize>,
    /// With `[c0, c1, ..]`, worker `i` is bound to core `c[i % len]`; worker 0 is the thread that creates the pool.
    /// Default (empty): the system places them. Linux only.
    pub cores: Vec<usize>,
}

/// A parallel loop: `(task, worker)`.
type Job = dyn Fn(usize, usize) + Sync;

/// Spins before a waiting worker yields, then sleeps: about 50 µs, longer than the gaps between the loops of a step.
const SPINS: u32 = 2_000;
const YIELDS: u32 = 20;

struct Shared {
    /// Counts the loops; a worker that sees it change takes part in the loop.
    epoch: AtomicUsize,
    job: UnsafeCell<Option<*const Job>>,
    num_tasks: AtomicUsize,
    next_task: AtomicUsize,
    /// Workers that have not finished the present loop.
    busy: AtomicUsize,
    panicked: AtomicBool,
    closed: AtomicBool,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is written only by the caller of `run`, which holds the pool's lock, while no worker is in a loop; workers
// read it after an acquiring load of `epoch`. The closure behind it is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is not tied to a thread.
unsafe impl Send for Shared {}

/// Threads that one engine owns: parallel loops with a barrier of a few microseconds, asleep when idle. Dropping it ends them.
///
/// The thread that calls [`run`](Self::run) works too. Workers wait for the next loop by spinning for some tens of microseconds,
/// so that the loops of one forward pass follow each other closely, and then sleep.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    one_at_a_time: Mutex<()>,
}

impl std::fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ThreadPool").field("num_threads", &self.num_threads()).finish_non_exhaustive()
    }
}

fn lock(mutex: &Mutex<()>) -> MutexGuard<'_, ()> {
    // The mutexes guard no data, so a panic while one was held has broken nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ThreadPool {
    /// Starts the threads.
    ///
    /// # Errors
    /// [`KernelError::Threads`] if the system refuses a thread or a core.
    pub fn new(config: &PoolConfig) -> Result<Self, KernelError> {
        let threads = match config.threads {
            Some(n) => n.get(),
            None => std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
        };
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            num_tasks: AtomicUsize::new(0),
            next_task: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut pool = Self { shared, workers: Vec::new(), one_at_a_time: Mutex::new(()) };
        let core_of = |worker: usize| config.cores.get(worker % config.cores.len().max(1)).copied();
        if let Some(core) = core_of(0) {
            bind_to_core(core)?;
        }
        let (report, bound) = std::sync::mpsc::channel();
        for worker in 1..threads {
            let (shared, core, report) = (Arc::clone(&pool.shared), core_of(worker), report.clone());
            let thread = std::thread::Builder::new()
                .name(format!("dashinfer-{worker}"))
                .spawn(move || {
                    let result = core.map_or(Ok(()), bind_to_core);
                    let bound = result.is_ok();
                    // The receiver waits for one message of each worker.
                    let _ = report.send(result);
                    drop(report);
                    if bound {
                        work(&shared, worker);
                    }
                })
                .map_err(|e| KernelError::Threads(format!("thread {worker} of {threads}: {e}")))?;
            pool.workers.push(thread);
        }
        drop(report);
        for result in bound {
            result?;
        }
        Ok(pool)
    }

    /// How many threads work in a loop.
    #[must_use]
    pub fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job(task, worker)` once for each task in `0..num_tasks`, on all threads, and returns when all are done.
    /// Threads take the next task when they have finished one, in order, so unequal tasks balance. `worker` is less than
    /// [`num_threads`](Self::num_threads), and no two calls with the same worker run at once.
    ///
    /// # Panics
    /// If `job` panics on any thread, after all have stopped. A job must not call `run` on its own pool.
    pub fn run(&self, num_tasks: usize, job: &(dyn Fn(usize, usize) + Sync)) {
        if self.workers.is_empty() || num_tasks <= 1 {
            (0..num_tasks).for_each(|task| job(task, 0));
            return;
        }
        let _turn = lock(&self.one_at_a_time);
        let shared = &*self.shared;
        let job: *const (dyn Fn(usize, usize) + Sync + '_) = job;
        // SAFETY: only the lifetime changes. Workers use the pointer between the store to `epoch` and their decrement of
        // `busy`, and this function returns only after `busy` has come back to zero.
        let job: *const Job = unsafe { std::mem::transmute(job) };
        // SAFETY: the lock makes this the only caller, and all workers have left the loop before.
        unsafe { *shared.job.get() = Some(job) };
        shared.num_tasks.store(num_tasks, Ordering::Relaxed);
        shared.next_task.store(0, Ordering::Relaxed);
        shared.busy.store(self.workers.len(), Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        // A worker first counts itself as a sleeper, then looks at the epoch; both are sequentially consistent, so either
        // it sees the new epoch or this load sees the sleeper.
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.sleep));
            shared.wake.notify_all();
        }
        take_tasks(shared, 0);
        let mut waited = 0;
        while shared.busy.load(Ordering::Acquire) > 0 {
            waited += 1;
            if waited < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        if shared.panicked.swap(false, Ordering::Relaxed) {
            resume_unwind(Box::new("a task of a parallel loop panicked"));
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        drop(lock(&self.shared.sleep));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches its tasks' panics, so it ends well.
            let _ = worker.join();
        }
    }
}

/// The life of a worker: wait for a loop, take part in it, until the pool closes.
fn work(shared: &Shared, worker: usize) {
    let mut seen = 0;
    loop {
        seen = wait_for_loop(shared, seen);
        if shared.closed.load(Ordering::SeqCst) {
            return;
        }
        take_tasks(shared, worker);
        shared.busy.fetch_sub(1, Ordering::Release);
    }
}

fn wait_for_loop(shared: &Shared, seen: usize) -> usize {
    for spin in 0..SPINS + YIELDS {
        let epoch = shared.epoch.load(Ordering::Acquire);
        if epoch != seen {
            return epoch;
        }
        if spin < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
    }
    let mut guard = lock(&shared.sleep);
    shared.sleepers.fetch_add(1, Ordering::SeqCst);
    let epoch = loop {
        let epoch = shared.epoch.load(Ordering::SeqCst);
        if epoch != seen {
            break epoch;
        }
        guard = shared.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
    };
    shared.sleepers.fetch_sub(1, Ordering::SeqCst);
    epoch
}

fn take_tasks(shared: &Shared, worker: usize) {
    // SAFETY: called between the store of the job and this thread's decrement of `busy` (or, on the caller's thread, within
    // `run`), so the pointer is set and the closure is alive.
    let job: &Job = unsafe { &*(*shared.job.get()).expect("a loop has a job") };
    let num_tasks = shared.num_tasks.load(Ordering::Relaxed);
    let all = catch_unwind(AssertUnwindSafe(|| {
        loop {
            let task = shared.next_task.fetch_add(1, Ordering::Relaxed);
            if task >= num_tasks {
                break;
            }
            job(task, worker);
        }
    }));
    if all.is_err() {
        shared.panicked.store(true, Ordering::Relaxed);
        shared.next_task.store(num_tasks, Ordering::Relaxed);
    }
}

#[cfg(target_os = "linux")]
fn bind_to_core(core: usize) -> Result<(), KernelError> {
    // SAFETY: a zeroed `cpu_set_t` is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if core >= 8 * size_of::<libc::cpu_set_t>() {
        return Err(KernelError::Threads(format!("core {core} is beyond what the system can name")));
    }
    // SAFETY: `core` was checked to lie within the set.
    unsafe { libc::CPU_SET(core, &mut set) };
    // SAFETY: the set is valid and its size is given; 0 names the calling thread.
    if unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) } == 0 {
        return Ok(());
    }
    Err(KernelError::Threads(format!("core {core}: {}", std::io::Error::last_os_error())))
}

#[cfg(not(target_os = "linux"))]
fn bind_to_core(core: usize) -> Result<(), KernelError> {
    Err(KernelError::Threads(format!("core {core}: binding threads to cores is supported on Linux only")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use std::time::Duration;

    fn pool(threads: usize) -> ThreadPool {
        ThreadPool::new(&PoolConfig { threads: NonZeroUsize::new(threads), cores: Vec::new() }).unwrap()
    }

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads_and_tasks() {
        for threads in [1, 2, 3, 5] {
            let pool = pool(threads);
            for num_tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicU32> = (0..num_tasks).map(|_| AtomicU32::new(0)).collect();
                pool.run(num_tasks, &|task, worker| {
                    assert!(worker < threads);
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn loops_that_come_after_the_workers_fell_asleep_run_too() {
        let pool = pool(3);
        let done = AtomicU32::new(0);
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(20));
            for _ in 0..50 {
                pool.run(4, &|_, _| {
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }
        }
        assert_eq!(done.load(Ordering::Relaxed), 5 * 50 * 4);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = pool(2);
        let result = catch_unwind(AssertUnwindSafe(|| pool.run(64, &|task, _| assert!(task != 40))));
        assert!(result.is_err());
        let done = AtomicU32::new(0);
        pool.run(64, &|_, _| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.load(Ordering::Relaxed), 64);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_absurd_core_is_refused_with_its_number() {
        let config = PoolConfig { threads: NonZeroUsize::new(2), cores: vec![0, 100_000] };
        let error = std::thread::spawn(move || ThreadPool::new(&config).unwrap_err()).join().unwrap();
        assert!(error.to_string().contains("core 100000"), "{error}");
    }
}
