//! Reading the head of a GGUF file from front to back. Every length in it is compared with what is left of the file before anything is
//! allocated or added by it.

use std::ops::Range;

use super::GgufFault;

/// What is left of a file, and where it starts in it.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    file: &'a [u8],
    at: usize,
    /// What is being read, for errors.
    what: String,
}

impl<'a> Reader<'a> {
    pub(super) fn new(file: &'a [u8]) -> Self {
        Self { file, at: 0, what: "the header".to_owned() }
    }

    /// Names what is read next.
    pub(super) fn now(&mut self, what: impl Into<String>) {
        self.what = what.into();
    }

    /// Where the next byte is in the file.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// What is being read is not what it should be.
    pub(super) fn fault(&self, wanted: impl Into<String>, found: impl std::fmt::Display) -> GgufFault {
        GgufFault::Value { what: self.what.clone(), wanted: wanted.into(), found: found.to_string() }
    }

    /// That `count` things of at least `size` bytes each may follow.
    pub(super) fn room_for(&self, count: u64, size: u64) -> Result<(), GgufFault> {
        let left = (self.file.len() - self.at) as u64;
        match count.checked_mul(size) {
            Some(wanted) if wanted <= left => Ok(()),
            wanted => Err(GgufFault::Ends {
                what: self.what.clone(),
                at: self.at as u64,
                wanted: wanted.unwrap_or(u64::MAX),
                found: left,
            }),
        }
    }

    /// Passes over `count` things of `size` bytes.
    pub(super) fn skip(&mut self, count: u64, size: u64) -> Result<Range<usize>, GgufFault> {
        self.room_for(count, size)?;
        let start = self.at;
        self.at += (count * size) as usize;
        Ok(start..self.at)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufFault> {
        let range = self.skip(1, N as u64)?;
        Ok(self.file[range].try_into().expect("the range has this length"))
    }

    pub(super) fn u32(&mut self) -> Result<u32, GgufFault> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, GgufFault> {
        self.array().map(u64::from_le_bytes)
    }

    /// The bytes of a string.
    pub(super) fn string(&mut self) -> Result<&'a [u8], GgufFault> {
        let len = self.u64()?;
        let range = self.skip(len, 1)?;
        Ok(&self.file[range])
    }

    /// A string.
    pub(super) fn text(&mut self) -> Result<&'a str, GgufFault> {
        let bytes = self.string()?;
        std::str::from_utf8(bytes).map_err(|error| self.fault("text in UTF-8", error))
    }
}
