//! Reads the assembler's report on the kernels of a file (`--ptxas-options=-v`).

/// What a kernel uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) kernel: String,
    pub(crate) registers: u32,
    /// Bytes of local memory for arrays and calls, spilled registers included.
    pub(crate) stack_bytes: u32,
    /// Bytes of registers stored to and loaded from local memory, by the text of the program.
    pub(crate) spilled_bytes: u32,
}

/// The kernels in a log, and the lines that are no report: warnings.
pub(crate) fn read(log: &str) -> (Vec<Usage>, Vec<&str>) {
    let (mut kernels, mut others) = (Vec::<Usage>::new(), Vec::new());
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_string();
            kernels.push(Usage { kernel, registers: 0, stack_bytes: 0, spilled_bytes: 0 });
        } else if line.contains("bytes stack frame") {
            // `16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads`, also of functions that a kernel calls.
            if let Some(last) = kernels.last_mut() {
                last.stack_bytes = last.stack_bytes.max(number_before(line, " bytes stack frame"));
                last.spilled_bytes +=
                    number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads");
            }
        } else if let Some((_, rest)) = line.split_once("Used ") {
            if let Some(last) = kernels.last_mut() {
                last.registers = number_before(rest, " registers");
            }
        } else if !line.starts_with("ptxas info") && !line.trim().is_empty() {
            others.push(line);
        }
    }
    (kernels, others)
}

/// The number right before `what`; 0 if there is none.
fn number_before(line: &str, what: &str) -> u32 {
    let before = line.split_once(what).map_or("", |(before, _)| before);
    let digits = before.len() - before.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    before[before.len() - digits..].parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_and_spills_are_read_for_each_kernel() {
        let log = "\
a.cu(3): warning #177-D: variable \"x\" was declared but never referenced
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first_bf16' for 'sm_80'
ptxas info    : Function properties for first_bf16
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 360 bytes cmem[0]
ptxas info    : Compile time = 9.203 ms
ptxas info    : Compiling entry function 'second_bf16' for 'sm_80'
ptxas info    : Function properties for second_bf16
    144 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 392 bytes cmem[0]
";
        let (kernels, others) = read(log);
        let usage = |kernel: &str, registers, stack_bytes, spilled_bytes| Usage {
            kernel: kernel.to_string(),
            registers,
            stack_bytes,
            spilled_bytes,
        };
        assert_eq!(kernels, [usage("first_bf16", 40, 0, 0), usage("second_bf16", 255, 144, 40)]);
        assert_eq!(others, ["a.cu(3): warning #177-D: variable \"x\" was declared but never referenced"]);
    }
}
