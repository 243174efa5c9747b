//! XXH64, against damage and not against an adversary: a changed bit goes unseen once in 2⁶⁴ times.
//! <https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>

use std::sync::atomic::{AtomicU64, Ordering};

use dashinfer_kernels::Backend;

const PRIMES: [u64; 5] =
    [0x9e37_79b1_85eb_ca87, 0xc2b2_ae3d_27d4_eb4f, 0x1656_67b1_9e37_79f9, 0x85eb_ca77_c2b2_ae63, 0x27d4_eb2f_1656_67c5];

/// Bytes that one thread sums at a time.
const PIECE: usize = 1 << 20;

/// The checksum of each buffer: XXH64 of the XXH64 of its pieces of a MiB, so that all threads can sum a large one.
pub(super) fn checksums<B: Backend>(backend: &B, buffers: &[&[u8]]) -> Vec<u64> {
    let pieces: Vec<&[u8]> = buffers.iter().flat_map(|buffer| buffer.chunks(PIECE)).collect();
    let sums: Vec<AtomicU64> = pieces.iter().map(|_| AtomicU64::new(0)).collect();
    // Relaxed: the loop's end orders all of its writes before what follows.
    backend.for_each(pieces.len(), &|i| sums[i].store(xxh64(pieces[i]), Ordering::Relaxed));
    let mut sums = sums.into_iter().map(|sum| sum.into_inner().to_le_bytes());
    let of_buffer = |buffer: &&[u8]| {
        let of_pieces: Vec<u8> = sums.by_ref().take(buffer.len().div_ceil(PIECE)).flatten().collect();
        xxh64(&of_pieces)
    };
    buffers.iter().map(of_buffer).collect()
}

/// XXH64 with seed 0.
pub(crate) fn xxh64(bytes: &[u8]) -> u64 {
    let [prime1, prime2, prime3, prime4, prime5] = PRIMES;
    let (stripes, rest) = bytes.as_chunks::<32>();
    let mut hash = if stripes.is_empty() {
        prime5
    } else {
        let mut lanes = [prime1.wrapping_add(prime2), prime2, 0, prime1.wrapping_neg()];
        for stripe in stripes {
            for (lane, word) in lanes.iter_mut().zip(stripe.as_chunks().0) {
                *lane = round(*lane, u64::from_le_bytes(*word));
            }
        }
        let turned = lanes.iter().zip([1, 7, 12, 18]).map(|(lane, bits)| lane.rotate_left(bits));
        lanes.iter().fold(turned.fold(0, u64::wrapping_add), |hash, &lane| {
            (hash ^ round(0, lane)).wrapping_mul(prime1).wrapping_add(prime4)
        })
    };
    hash = hash.wrapping_add(bytes.len() as u64);
    let (words, rest) = rest.as_chunks();
    for word in words {
        hash = (hash ^ round(0, u64::from_le_bytes(*word))).rotate_left(27).wrapping_mul(prime1).wrapping_add(prime4);
    }
    let (words, rest) = rest.as_chunks();
    for word in words {
        let word = u64::from(u32::from_le_bytes(*word));
        hash = (hash ^ word.wrapping_mul(prime1)).rotate_left(23).wrapping_mul(prime2).wrapping_add(prime3);
    }
    for &byte in rest {
        hash = (hash ^ u64::from(byte).wrapping_mul(prime5)).rotate_left(11).wrapping_mul(prime1);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(prime2);
    hash = (hash ^ (hash >> 29)).wrapping_mul(prime3);
    hash ^ (hash >> 32)
}

#[inline(always)]
fn round(lane: u64, word: u64) -> u64 {
    lane.wrapping_add(word.wrapping_mul(PRIMES[1])).rotate_left(31).wrapping_mul(PRIMES[0])
}

#[cfg(test)]
mod tests {
    use dashinfer_kernels::cpu::{CpuBackend, CpuConfig};

    use super::*;

    #[test]
    fn hashes_are_those_of_xxhash() {
        assert_eq!(xxh64(b""), 0xef46_db37_51d8_e999);
        assert_eq!(xxh64(b"abc"), 0x44bc_2cf5_ad77_0999);
        assert_eq!(xxh64(b"Nobody inspects the spammish repetition"), 0xfbce_a83c_8a37_8bf1);
        let bytes: Vec<u8> = (0..101).collect();
        assert_eq!(xxh64(&bytes), 0xe990_3849_5f85_381e);
    }

    #[test]
    fn every_bit_of_every_piece_counts() {
        let backend = CpuBackend::new(&CpuConfig::default()).unwrap();
        let mut buffers = [vec![7; 2 * PIECE + 3], vec![], vec![7; PIECE], vec![7; 5]];
        let sums = |buffers: &[Vec<u8>; 4]| checksums(&backend, &buffers.each_ref().map(Vec::as_slice));
        let whole = sums(&buffers);
        for (buffer, at) in [(0, 0), (0, PIECE - 1), (0, PIECE), (0, 2 * PIECE + 2), (2, 77), (3, 4)] {
            for bit in [0, 7] {
                buffers[buffer][at] ^= 1 << bit;
                let changed = sums(&buffers);
                let differ: Vec<_> = (0..4).filter(|&i| changed[i] != whole[i]).collect();
                assert_eq!(differ, [buffer], "byte {at}");
                buffers[buffer][at] ^= 1 << bit;
            }
        }
        buffers[1].push(0);
        assert_ne!(sums(&buffers)[1], whole[1]);
    }
}
