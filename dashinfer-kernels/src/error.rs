//! What can go wrong in a kernel: shapes that do not fit, things a device cannot do, memory that is not there.

/// An error of an operator. Every variant names what was wanted and what was found.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// Operands whose shapes do not fit each other.
    #[error("{op}: {what} should be {wanted}, found {found}")]
    Shape {
        /// The operator.
        op: &'static str,
        /// Which operand or dimension.
        what: &'static str,
        /// What the other operands ask for.
        wanted: usize,
        /// What was given.
        found: usize,
    },
    /// Infinities, or what is not a number, where neither can be.
    #[error("{op}: {what} is not finite")]
    NotFinite {
        /// The operator.
        op: &'static str,
        /// Which value.
        what: &'static str,
    },
    /// A combination that this backend does not implement.
    #[error("{op}: {what} is not supported by the {backend} backend")]
    Unsupported {
        /// The operator.
        op: &'static str,
        /// What was asked for.
        what: String,
        /// The backend's name.
        backend: &'static str,
    },
    /// The device or the host has not this much memory to give.
    #[error("out of memory: {wanted_bytes} bytes for {what}")]
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// How much was asked for.
        wanted_bytes: usize,
    },
    /// A library of the device's maker that is not on this machine.
    #[error("cannot open {name}; looked in {looked_in}")]
    Library {
        /// The library: `libcuda.so`, ..
        name: &'static str,
        /// The folders and names that were tried.
        looked_in: String,
    },
    /// The machine has no such device.
    #[error("no device: wanted {wanted}, found {found}")]
    NoDevice {
        /// What was asked for.
        wanted: String,
        /// What there is.
        found: String,
    },
    /// A call of the device's driver or of a library failed.
    #[error("{call} failed: {error}")]
    Device {
        /// The function.
        call: &'static str,
        /// Its error, by name and in words.
        error: String,
    },
    /// An archive of compiled kernels that cannot be used.
    #[error("cannot use the kernels in {from}: {what}")]
    Images {
        /// The file, or that it is in memory.
        from: String,
        /// What is wrong with it.
        what: String,
    },
    /// A kernel does not compile for the device.
    #[error("cannot compile {unit}: {log}")]
    Compile {
        /// The source file and its options.
        unit: String,
        /// What the compiler said.
        log: String,
    },
    /// Results were asked for of which none are under way.
    #[error("there are no sampled tokens to collect")]
    NothingToCollect,
    /// The system refused to start a thread or to set its affinity.
    #[error("cannot set up the thread pool: {0}")]
    Threads(String),
}

/// Fails with [`KernelError::Shape`] unless `wanted == found`.
pub(crate) fn check(op: &'static str, what: &'static str, wanted: usize, found: usize) -> Result<(), KernelError> {
    if wanted == found { Ok(()) } else { Err(KernelError::Shape { op, what, wanted, found }) }
}
