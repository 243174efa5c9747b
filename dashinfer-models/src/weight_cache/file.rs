//! The file's form.
//!
//! ```text
//! file   = prefix, buffers, header
//! prefix = magic "DASHPACK", version u32, byte order u32, bytes of the file u64, where the header begins u64,
//!          bytes of the header u64, checksum of the header u64, 0 u64, checksum of the prefix up to here u64
//! header = JSON: the key, and each matrix and vector in the order of the forward pass, with its buffers
//! ```
//!
//! Numbers of the prefix are little endian, but for the byte order, which is that of the machine: buffers are mapped, so they
//! are good only for machines like the one that wrote them. Each buffer starts on a cache line, large ones on a page. The header
//! stands at the end because buffers are written as they are packed.

use serde::{Deserialize, Serialize};

use super::{CacheFault, xxh64};

pub(super) const PREFIX_BYTES: usize = 64;
const MAGIC: &[u8; 8] = b"DASHPACK";
/// Of what this page describes; what packing makes of weights has a version of its own, in the key.
const VERSION: u32 = 1;
const BYTE_ORDER: u32 = 0x0102_0304;

/// What the file holds, and of what.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Header {
    pub(super) key: String,
    pub(super) items: Vec<Item>,
}

/// A matrix or a vector.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Item {
    pub(super) what: What,
    pub(super) buffers: Vec<Extent>,
}

/// What an item is: enough to tell whether it is the one that a model wants.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct What {
    /// The type of a dense matrix, the scheme of a quantized one, or `vector`.
    pub(super) form: String,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) bias: bool,
}

/// A buffer's place in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Extent {
    pub(super) at: u64,
    pub(super) bytes: u64,
    pub(super) checksum: u64,
}

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { form, rows, cols, bias } = self;
        write!(f, "{form} [{rows}, {cols}]{}", if *bias { " with a bias" } else { "" })
    }
}

/// Where a buffer of `bytes` begins that is written behind `end` bytes.
pub(super) fn place(end: u64, bytes: usize) -> u64 {
    const CACHE_LINE: u64 = 64;
    const PAGE: u64 = 4096;
    end.next_multiple_of(if bytes as u64 >= 16 * PAGE { PAGE } else { CACHE_LINE })
}

/// The prefix of a file whose buffers end at `header_at`.
pub(super) fn prefix(header_at: u64, header: &[u8]) -> [u8; PREFIX_BYTES] {
    let header_bytes = header.len() as u64;
    let mut prefix = Vec::with_capacity(PREFIX_BYTES);
    prefix.extend_from_slice(MAGIC);
    prefix.extend_from_slice(&VERSION.to_le_bytes());
    prefix.extend_from_slice(&BYTE_ORDER.to_ne_bytes());
    for number in [header_at + header_bytes, header_at, header_bytes, xxh64(header), 0] {
        prefix.extend_from_slice(&number.to_le_bytes());
    }
    prefix.extend_from_slice(&xxh64(&prefix).to_le_bytes());
    prefix.try_into().expect("8 + 4 + 4 + 6 · 8 bytes")
}

/// Reads the header of a file, and proves that the buffers which it names lie in the file, between prefix and header.
pub(super) fn header(file: &[u8]) -> Result<Header, CacheFault> {
    let value = |what, wanted: u64, found: u64| {
        if wanted == found { Ok(()) } else { Err(CacheFault::Value { what, wanted, found }) }
    };
    let file_bytes = file.len() as u64;
    let Some(prefix) = file.first_chunk::<PREFIX_BYTES>() else {
        return Err(CacheFault::Value { what: "bytes of the prefix", wanted: PREFIX_BYTES as u64, found: file_bytes });
    };
    let u32_at = |at: usize| [prefix[at], prefix[at + 1], prefix[at + 2], prefix[at + 3]];
    let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| prefix[at + i]));
    // In this order: a file of another kind or version, or of another machine, is called that, and not damaged.
    value("magic number", u64::from_le_bytes(*MAGIC), u64_at(0))?;
    value("version", VERSION.into(), u32::from_le_bytes(u32_at(8)).into())?;
    value("byte order", BYTE_ORDER.into(), u32::from_ne_bytes(u32_at(12)).into())?;
    value("checksum of the prefix", xxh64(&prefix[..56]), u64_at(56))?;
    value("bytes of the file", u64_at(16), file_bytes)?;
    let (header_at, header_bytes) = (u64_at(24), u64_at(32));
    value("end of the header", file_bytes, header_at.saturating_add(header_bytes))?;
    value("zeros", 0, u64_at(48))?;
    // It fits a `usize`: it is no larger than the file, which is in memory.
    let header = &file[header_at as usize..];
    value("checksum of the header", u64_at(40), xxh64(header))?;
    let header: Header = serde_json::from_slice(header).map_err(|error| CacheFault::Header(error.to_string()))?;
    let mut end = PREFIX_BYTES as u64;
    for extent in header.items.iter().flat_map(|item| &item.buffers) {
        let bytes = usize::try_from(extent.bytes).unwrap_or(usize::MAX);
        value("start of a buffer", place(end, bytes), extent.at)?;
        end = extent.at.saturating_add(extent.bytes);
        if end > header_at {
            return Err(CacheFault::Value { what: "end of the buffers", wanted: header_at, found: end });
        }
    }
    value("end of the buffers", header_at, end)?;
    Ok(header)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file() -> Vec<u8> {
        let extent = |at, bytes| Extent { at, bytes, checksum: 0 };
        let what = What { form: "vector".into(), rows: 3, cols: 1, bias: false };
        let item = Item { what, buffers: vec![extent(64, 12), extent(128, 0)] };
        let header = serde_json::to_vec(&Header { key: "a key".into(), items: vec![item] }).unwrap();
        let mut file = prefix(128, &header).to_vec();
        file.resize(128, 0);
        file.extend_from_slice(&header);
        file
    }

    #[test]
    fn a_whole_file_is_read() {
        let header = header(&file()).unwrap();
        assert_eq!(header.items[0].buffers[0].bytes, 12);
        assert_eq!(header.items[0].what.to_string(), "vector [3, 1]");
    }

    #[test]
    fn every_length_but_the_whole_is_refused() {
        let file = file();
        for len in 0..file.len() {
            assert!(header(&file[..len]).is_err(), "{len}");
        }
        assert!(header(&[&file[..], &[0]].concat()).is_err());
    }

    #[test]
    fn every_byte_of_prefix_and_header_counts() {
        let file = file();
        for at in (0..64).chain(128..file.len()) {
            for flip in [1, 0x80] {
                let mut file = file.clone();
                file[at] ^= flip;
                assert!(header(&file).is_err(), "byte {at}");
            }
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let check = |change: &dyn Fn(&mut [u8]), wanted: &str| {
            let mut file = file();
            change(&mut file);
            // As a program of another version would have written it.
            let sum = xxh64(&file[..56]).to_le_bytes();
            file[56..64].copy_from_slice(&sum);
            assert_eq!(header(&file).unwrap_err().to_string(), wanted);
        };
        check(&|file| file[0] = b'd', "magic number should be 0x4b43415048534144, found 0x4b43415048534164");
        check(&|file| file[8] = 2, "version should be 0x1, found 0x2");
        check(&|file| file[12..16].reverse(), "byte order should be 0x1020304, found 0x4030201");
        check(
            &|file| file[16] ^= 1,
            &format!("bytes of the file should be {:#x}, found {:#x}", file().len() ^ 1, file().len()),
        );
        check(
            &|file| file[24..32].fill(0xff),
            &format!("end of the header should be {:#x}, found {:#x}", file().len(), u64::MAX),
        );
        check(&|file| file[48] = 1, "zeros should be 0x0, found 0x1");
    }

    /// Headers whose checksums are right, and which promise what is not there.
    #[test]
    fn buffers_lie_in_the_file_in_order() {
        let check = |extents: &[(u64, u64)], wanted: &str| {
            let buffers = extents.iter().map(|&(at, bytes)| Extent { at, bytes, checksum: 0 }).collect();
            let what = What { form: "vector".into(), rows: 3, cols: 1, bias: false };
            let text = serde_json::to_vec(&Header { key: String::new(), items: vec![Item { what, buffers }] }).unwrap();
            let mut file = prefix(256, &text).to_vec();
            file.resize(256, 0);
            file.extend_from_slice(&text);
            assert_eq!(header(&file).unwrap_err().to_string(), wanted);
        };
        check(&[(0, 64)], "start of a buffer should be 0x40, found 0x0");
        check(&[(64, 12), (76, 4)], "start of a buffer should be 0x80, found 0x4c");
        check(&[(64, 12), (64, 12)], "start of a buffer should be 0x80, found 0x40");
        check(&[(64, 193)], "end of the buffers should be 0x100, found 0x101");
        check(&[(4096, u64::MAX)], &format!("end of the buffers should be 0x100, found {:#x}", u64::MAX));
        check(&[(64, 100)], "end of the buffers should be 0x100, found 0xa4");
        let text = b"{}";
        let mut file = prefix(64, text).to_vec();
        file.extend_from_slice(text);
        assert!(header(&file).unwrap_err().to_string().starts_with("its header is invalid: missing field"));
    }

    proptest! {
        /// With the checksums put right, as somebody who means harm would.
        #[test]
        fn no_bytes_make_it_panic(numbers: [u64; 3], text in ".{0,80}", near in 0usize..200) {
            let mut whole = file();
            let len = whole.len() as u64;
            let wild = [numbers[0], numbers[1], numbers[2], near as u64, len - (near as u64).min(len)];
            for (i, &number) in wild.iter().enumerate() {
                for at in [16, 24, 32] {
                    let mut file = whole.clone();
                    file[at..at + 8].copy_from_slice(&number.to_le_bytes());
                    let other = if at == 24 { 32 } else { 24 };
                    file[other..other + 8].copy_from_slice(&len.wrapping_sub(wild[(i + 1) % 5]).to_le_bytes());
                    let sum = xxh64(&file[..56]).to_le_bytes();
                    file[56..64].copy_from_slice(&sum);
                    let _ = header(&file);
                }
            }
            whole.truncate(128);
            whole[..64].copy_from_slice(&prefix(128, text.as_bytes()));
            whole.extend_from_slice(text.as_bytes());
            prop_assert!(header(&whole).is_err());
        }
    }
}
