//! How much memory this process has: what the kernel of the operating system says, not what an allocator counts.

/// Bytes of this process in physical memory now, mapped files included. `None` where there is no `/proc/self/status`.
#[must_use]
pub fn current_bytes() -> Option<u64> {
    field("VmRSS:")
}

/// The most that [`current_bytes`] has been in the life of this process, or since [`reset_peak`].
#[must_use]
pub fn peak_bytes() -> Option<u64> {
    field("VmHWM:")
}

/// Sets [`peak_bytes`] back to [`current_bytes`]. Returns whether it did: the system may not let it.
pub fn reset_peak() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

fn field(name: &str) -> Option<u64> {
    parse(&std::fs::read_to_string("/proc/self/status").ok()?, name)
}

/// The value of a line like `VmRSS:     1234 kB`, in bytes.
fn parse(status: &str, name: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = value.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kilobytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_parsed_or_refused() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\nVmLib:\tmany kB\nVmPTE:\t12\n";
        let check = |name, expected| assert_eq!(parse(status, name), expected, "{name}");
        check("VmHWM:", Some(2048 * 1024));
        check("VmRSS:", Some(1024));
        check("VmLib:", None);
        check("VmPTE:", None);
        check("VmSwap:", None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn touched_memory_shows_and_stays_in_the_peak() {
        const BYTES: u64 = 64 << 20;
        let before = current_bytes().unwrap();
        let memory = std::hint::black_box(vec![1u8; BYTES as usize]);
        let during = current_bytes().unwrap();
        assert!(during >= before + BYTES / 2, "{before} before, {during} with {BYTES} more");
        drop(memory);
        assert!(peak_bytes().unwrap() >= before + BYTES / 2);
        if reset_peak() {
            assert!(peak_bytes().unwrap() < before + BYTES / 2);
        }
    }
}
