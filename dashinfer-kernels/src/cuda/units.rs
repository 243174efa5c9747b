//! Every source file of device code, with the variants that can be asked for.

/// A source file of device code.
#[derive(Debug)]
pub(crate) struct Unit {
    /// The file in `cuda/`.
    pub(crate) name: &'static str,
    /// Its text.
    pub(crate) source: &'static str,
}

/// The headers that units include, by name.
pub(crate) static HEADERS: &[(&str, &str)] = &[
    ("attention_units.cuh", include_str!("../../cuda/attention_units.cuh")),
    ("common.cuh", include_str!("../../cuda/common.cuh")),
    ("hopper.cuh", include_str!("../../cuda/hopper.cuh")),
    ("mma.cuh", include_str!("../../cuda/mma.cuh")),
];
