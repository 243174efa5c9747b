//! An idle engine uses no CPU. Alone in its binary: the figures are those of the whole process.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::fs;
use std::time::Duration;

use common::{FERRIS, complete, wait_until};
use dashinfer::{Engine, Request};

/// User and system time of the process, in ticks of 10 ms.
fn cpu_ticks() -> u64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    // The name, in parentheses, may hold spaces; `utime` and `stime` are the 14th and 15th field of all.
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

fn ticks_of_half_a_second() -> u64 {
    // Threads spin for a moment before they sleep.
    std::thread::sleep(Duration::from_millis(100));
    let before = cpu_ticks();
    std::thread::sleep(Duration::from_millis(500));
    cpu_ticks() - before
}

#[test]
fn an_idle_engine_uses_no_cpu() {
    let engine = Engine::load(FERRIS).threads(2).blocking().unwrap();
    let mut stream = engine.blocking().generate(Request::text("a").max_tokens(200).ignore_eos());
    // Idle in both ways: with a reader who does not read, and with nothing to do.
    stream.next().unwrap().unwrap();
    wait_until("the request is paused", || engine.stats().paused == 1);
    let paused = ticks_of_half_a_second();
    drop(stream);
    wait_until("nothing is paused", || engine.stats().paused == 0);
    let idle = ticks_of_half_a_second();
    // One tick is what the test itself may take; a thread that spins takes fifty.
    assert!(paused <= 1 && idle <= 1, "{paused} ticks while paused, {idle} while idle");
    assert_eq!(complete(&engine, Request::text("a").max_tokens(5).ignore_eos()).tokens.len(), 5, "it can be woken");
}
