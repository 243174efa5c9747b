//! What can be wrong with a GGUF file.

/// Why a file is no GGUF file that can be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GgufFault {
    /// It starts otherwise.
    #[error("wanted a GGUF file, which starts with \"GGUF\", found {:?}", String::from_utf8_lossy(found))]
    Magic {
        /// Its first bytes.
        found: [u8; 4],
    },
    /// A version that is not read, or another order of bytes.
    #[error("wanted version 2 or 3 of GGUF, little-endian, found {}", version(*found))]
    Version {
        /// The number in the file, read as little-endian.
        found: u32,
    },
    /// The file is too short for what it says it holds.
    #[error("{what} should take {wanted} bytes from byte {at} on, found {found}")]
    Ends {
        /// What is being read.
        what: String,
        /// Where it starts.
        at: u64,
        /// What it takes.
        wanted: u64,
        /// What is there.
        found: u64,
    },
    /// Something that no such file can have.
    #[error("{what}: wanted {wanted}, found {found}")]
    Value {
        /// Which key or tensor.
        what: String,
        /// What would do.
        wanted: String,
        /// What is there.
        found: String,
    },
    /// One file of several that is not the first, or whose others are not there or do not fit.
    #[error("file {number} of {count}: wanted {wanted}, found {found}")]
    Split {
        /// Which of the files, from 1.
        number: u64,
        /// How many there are.
        count: u64,
        /// What would do.
        wanted: String,
        /// What is there.
        found: String,
    },
}

fn version(found: u32) -> String {
    if found.swap_bytes() <= 3 {
        format!("version {}, big-endian", found.swap_bytes())
    } else {
        format!("version {found}")
    }
}
