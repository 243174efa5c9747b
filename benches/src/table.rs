//! The summary of kernel benchmarks: time, rate, fraction of the machine's peak, and a plain baseline.

use std::fmt;

use crate::limits::{Limits, rate};

/// One kernel, measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// `op/dtype/shape`.
    pub name: String,
    /// Of one call.
    pub seconds: f64,
    /// That a call must read and write.
    pub bytes: f64,
    /// Operations of a call.
    pub flops: f64,
    /// The same by the plain baseline.
    pub naive_seconds: f64,
}

/// Kernels beside the limits of the machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    /// What the machine can do.
    pub limits: Limits,
    /// What was measured.
    pub rows: Vec<Row>,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Limits { bytes_per_second, flops_per_second, .. } = self.limits;
        let (gigabytes, gigaflops) = (bytes_per_second / 1e9, flops_per_second / 1e9);
        writeln!(f, "peak: {gigabytes:.1} GB/s read from memory, {gigaflops:.1} GFLOP/s of f32 multiply-adds")?;
        writeln!(
            f,
            "naive: a plain loop in f32 on one thread. What writes too, or is found in a cache, can exceed the read peak."
        )?;
        let width = self.rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
        for row in &self.rows {
            let limit = self.limits.of(row.bytes, row.flops);
            let percent = 100.0 * limit.seconds() / row.seconds;
            let (time, rate) = (time(row.seconds), rate(limit, row.bytes, row.flops, row.seconds));
            let times = row.naive_seconds / row.seconds;
            writeln!(f, "{:<width$} {time:>11} {rate:>16} {percent:>6.0} % of peak {times:>8.1}x naive", row.name)?;
        }
        Ok(())
    }
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.2} µs", s * 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_what_limits_it() {
        let limits = Limits { bytes_per_second: 4e9, flops_per_second: 1e11, tile_ops_per_second: None };
        let row = Row {
            name: "linear/bf16/1x896x9728".into(),
            seconds: 21.9e-6,
            bytes: 43_800.0,
            flops: 87_600.0,
            naive_seconds: 43.8e-6,
        };
        let text = Table { limits, rows: vec![row] }.to_string();
        let words: Vec<_> = text.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(words.join(" "), "linear/bf16/1x896x9728 21.90 µs 2.00 GB/s 50 % of peak 2.0x naive");
    }
}
