//! Work in parallel, told as it is done.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

/// Computes `work` of each job on `num_threads` threads (default: one for each core), and hands the results to `done` on this
/// thread, in the order in which they come.
pub(crate) fn run<J: Sync, R: Send>(
    jobs: &[J],
    num_threads: Option<usize>,
    work: impl Fn(&J) -> R + Sync,
    mut done: impl FnMut(usize, R),
) {
    let cores = || thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let num_threads = num_threads.unwrap_or_else(cores).clamp(1, jobs.len().max(1));
    let next = AtomicUsize::new(0);
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..num_threads {
            let (sender, next, work) = (sender.clone(), &next, &work);
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(index) else { return };
                    if sender.send((index, work(job))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for (index, result) in receiver {
            done(index, result);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_job_is_done_once() {
        let jobs: Vec<usize> = (0..100).collect();
        for num_threads in [None, Some(1), Some(7)] {
            let mut squares = vec![0; jobs.len()];
            run(&jobs, num_threads, |job| job * job, |index, square| squares[index] += square);
            assert_eq!(squares, jobs.iter().map(|job| job * job).collect::<Vec<_>>());
        }
        run(&[] as &[u8], None, |_| (), |_, ()| unreachable!("there are no jobs"));
    }
}
