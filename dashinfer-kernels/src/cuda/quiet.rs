//! Calls of the driver that no recording may be under way for.
//!
//! Some calls wait for everything in the process's context, whoever's it is: destroying a handle of cuBLASLt does, and loading
//! code may. They void what other threads are recording, and the driver (580) has been seen to crash in one. A context is the
//! whole process's, so this lock is too. Recordings take milliseconds, and these calls are made when an engine comes or goes.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::{Condvar, Mutex, PoisonError};

static NUM_RECORDINGS: Mutex<usize> = Mutex::new(0);
static NONE_LEFT: Condvar = Condvar::new();

thread_local! {
    static IS_RECORDING: Cell<bool> = const { Cell::new(false) };
}

/// As long as it lives, [`quietly`] waits on other threads. Recordings end on the thread that began them.
#[derive(Debug)]
pub(super) struct Noise(PhantomData<()>);

impl Noise {
    /// Announces a recording on this thread.
    pub(super) fn begin() -> Self {
        *NUM_RECORDINGS.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        IS_RECORDING.set(true);
        Self(PhantomData)
    }
}

impl Drop for Noise {
    fn drop(&mut self) {
        IS_RECORDING.set(false);
        let mut count = NUM_RECORDINGS.lock().unwrap_or_else(PoisonError::into_inner);
        *count -= 1;
        if *count == 0 {
            NONE_LEFT.notify_all();
        }
    }
}

/// Calls `call` while no recording is under way, and none begins before it is over. A thread that records itself does not wait:
/// its recording is void then, which is no error (`Backend::end_step`).
pub(super) fn quietly<R>(call: impl FnOnce() -> R) -> R {
    if IS_RECORDING.get() {
        return call();
    }
    let mut count = NUM_RECORDINGS.lock().unwrap_or_else(PoisonError::into_inner);
    while *count > 0 {
        count = NONE_LEFT.wait(count).unwrap_or_else(PoisonError::into_inner);
    }
    let result = call();
    drop(count);
    result
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_quiet_call_waits_for_the_recordings_of_others() {
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let noise = Noise::begin();
            // On the thread that records nothing waits.
            assert_eq!(quietly(|| 5), 5);
            let other = scope.spawn(|| quietly(|| is_over.load(Ordering::SeqCst)));
            std::thread::sleep(Duration::from_millis(20));
            is_over.store(true, Ordering::SeqCst);
            drop(noise);
            assert!(other.join().unwrap(), "it was called beside a recording");
        });
        assert_eq!(quietly(|| 6), 6);
    }
}
