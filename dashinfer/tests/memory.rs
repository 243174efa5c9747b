//! What ended has given its memory and its threads back. Alone in its binary: the figures are those of the whole process.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{FERRIS, complete, tiny, wait_until};
use dashinfer::{Engine, Request};

/// With these the allocator of glibc gives freed memory back. By default it keeps up to 32 MiB and more for each of several
/// threads, which comes and goes in no order and hides what is looked for here.
const ALLOCATOR: [(&str, &str); 2] = [("MALLOC_ARENA_MAX", "1"), ("MALLOC_MMAP_THRESHOLD_", "65536")];

fn status(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
}

fn life(folder: &Path) {
    let engine = Engine::load(folder).threads(2).max_context(256).max_batch(4).blocking().unwrap();
    let found = complete(&engine, Request::tokens([1, 2, 3]).max_tokens(4).ignore_eos());
    assert_eq!(found.tokens.len(), 4);
    engine.blocking().shutdown();
}

#[test]
fn fifty_engines_leave_nothing() {
    if ALLOCATOR.iter().any(|&(name, value)| std::env::var(name).as_deref() != Ok(value)) {
        let mut again = Command::new(std::env::current_exe().unwrap());
        assert!(again.args(["--exact", "fifty_engines_leave_nothing"]).envs(ALLOCATOR).status().unwrap().success());
        return;
    }
    let (small, larger) = (tiny(), Path::new(FERRIS));
    (0..10).for_each(|_| life(&small));
    (0..4).for_each(|_| life(larger));
    let before = status("VmRSS");
    (0..50).for_each(|_| life(&small));
    (0..5).for_each(|_| life(larger));
    let growth = status("VmRSS").saturating_sub(before);
    // An engine of the small model has more than half a MiB, of the larger more than 15: kept, they make a hundred.
    assert!(growth < 8 << 10, "the process grew by {growth} KiB");
    // The main thread and this one. Others may be on their last steps still.
    wait_until("no other thread is left", || status("Threads") == 2);
}
