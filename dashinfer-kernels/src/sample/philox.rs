//! A random number as a function of (seed, position), with no state between tokens.
//!
//! Philox4x32-10 encrypts a counter under a key: the same request draws the same numbers whatever it was batched with,
//! preempted by, or computed on; GPUs use the same generator. <https://doi.org/10.1145/2063384.2063405>

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// The golden ratio and √3 - 1, as fractions of 2³².
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const NUM_ROUNDS: usize = 10;

/// Four random words for `counter` under `key`.
pub(super) fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..NUM_ROUNDS {
        if round > 0 {
            key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
        }
        let (high0, low0) = halves(u64::from(MULTIPLIERS[0]) * u64::from(counter[0]));
        let (high1, low1) = halves(u64::from(MULTIPLIERS[1]) * u64::from(counter[2]));
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
    }
    counter
}

/// The number in `0.0..1.0` that picks the token at `position`, a multiple of 2⁻⁵³.
///
/// The key is the seed, the counter `[position low, position high, 0, 0]`: the last two words are free for other draws
/// at the same position.
pub(crate) fn uniform(seed: u64, position: u64) -> f64 {
    let ((seed_high, seed_low), (high, low)) = (halves(seed), halves(position));
    let words = philox4x32([low, high, 0, 0], [seed_low, seed_high]);
    let bits = (u64::from(words[0]) << 32) | u64::from(words[1]);
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// The upper and the lower word.
fn halves(wide: u64) -> (u32, u32) {
    ((wide >> 32) as u32, wide as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_answers_are_met() {
        // Random123, `kat_vectors`, the lines of philox4x32 with 10 rounds.
        let check = |counter, key, expected| assert_eq!(philox4x32(counter, key), expected);
        check([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        check([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        check(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        );
    }

    #[test]
    fn uniform_numbers_fill_the_unit_interval_evenly() {
        const NUM_BINS: usize = 64;
        const NUM_DRAWS: usize = 64_000;
        for seed in [0, 1, u64::MAX] {
            let mut bins = [0usize; NUM_BINS];
            for position in 0..NUM_DRAWS as u64 {
                let u = uniform(seed, position);
                assert!((0.0..1.0).contains(&u));
                bins[(u * NUM_BINS as f64) as usize] += 1;
            }
            let expected = (NUM_DRAWS / NUM_BINS) as f64;
            let chi_square: f64 = bins.iter().map(|&n| (n as f64 - expected).powi(2) / expected).sum();
            // 63 degrees of freedom: mean 63, standard deviation 11.2.
            assert!((25.0..115.0).contains(&chi_square), "seed {seed}: chi² = {chi_square}");
        }
    }

    #[test]
    fn every_half_of_seed_and_position_counts() {
        let draws = [uniform(1, 0), uniform(1 << 32, 0), uniform(0, 1), uniform(0, 1 << 32), uniform(0, 0)];
        for (i, a) in draws.iter().enumerate() {
            assert!(draws[i + 1..].iter().all(|b| a != b));
        }
    }
}
