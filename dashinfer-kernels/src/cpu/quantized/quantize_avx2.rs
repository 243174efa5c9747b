//! Quantizing groups with AVX2: eight output features at a time, a lane each, so that no sum or maximum goes across lanes, and
//! codes are in the order of a panel as they come. Codes, scales and zero points are those of [`int8`] and [`int4`], to the
//! bit.

use std::arch::x86_64::*;

use super::matrix::{Panel, Source, panel_bytes};
use crate::dtype::widen;
use crate::quant::{Group, PANEL, SHIFT, WeightBits, int4, int8};

/// Input features of a panel that are brought to f32 at a time: a part of the L1 cache.
const STRETCH: usize = 256;

/// Output features that are treated at a time.
const LANES: usize = 8;

/// The values of a group, `[input features][8 output features]`.
type Columns = [__m256];

/// Quantizes a panel of a scheme with groups; whether all weights were finite.
///
/// # Safety
/// The machine has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn panel(
    panel: &Panel<'_>,
    group: Group,
    codes: &mut [u8],
    scales: &mut [u16],
    zeros: &mut [u8],
) -> bool {
    let Panel { scheme, cut, cols, ref source } = *panel;
    let (rows, group) = (source.rows(), group.size());
    let mut tile = vec![0.0f32; PANEL * STRETCH.min(cut.padded)];
    let mut columns = [_mm256_setzero_ps(); Group::G128.size()];
    let columns = &mut columns[..group];
    let mut largest = _mm256_setzero_si256();
    for first in (0..cut.padded).step_by(STRETCH) {
        let len = STRETCH.min(cut.padded - first);
        let tile = &mut tile[..PANEL * len];
        fill(source, first..cols.min(first + len), tile);
        tile[rows * len..].fill(0.0);
        for place in (0..len).step_by(group) {
            let from = panel_bytes(scheme, first + place);
            let codes = &mut codes[from..from + panel_bytes(scheme, group)];
            let at = (first + place) / group * PANEL;
            for lanes in [0, LANES] {
                let bits = transpose(&tile[lanes * len + place..], len, columns);
                largest = _mm256_max_epu32(largest, bits);
                let scales = &mut scales[at + lanes..][..LANES];
                match (scheme.weight_bits(), scheme.has_zero_points()) {
                    (WeightBits::Eight, _) => eight_bits(columns, bits, &mut codes[4 * lanes..], scales),
                    (WeightBits::Four, false) => four_bits(columns, &mut codes[4 * lanes..], scales),
                    (WeightBits::Four, true) => {
                        let zeros = &mut zeros[at + lanes..][..LANES];
                        four_bits_with_zero(columns, &mut codes[4 * lanes..], scales, zeros);
                    }
                }
            }
        }
    }
    // What is infinite or no number has the largest exponent.
    let finite = _mm256_cmpgt_epi32(_mm256_set1_epi32(f32::INFINITY.to_bits().cast_signed()), largest);
    _mm256_movemask_epi8(finite) == -1
}

/// The weights of input features `cols` into a tile, whose rows may be longer: what is left of them is zeros.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fill(source: &Source<'_>, cols: std::ops::Range<usize>, tile: &mut [f32]) {
    let (len, stored) = (tile.len() / PANEL, cols.len());
    match source {
        Source::Bytes(rows, dtype) => {
            let size = dtype.size_bytes();
            for (row, values) in rows.iter().zip(tile.chunks_exact_mut(len)) {
                let (values, padding) = values.split_at_mut(stored);
                widen(&row[cols.start * size..][..stored * size], *dtype, values);
                padding.fill(0.0);
            }
        }
        Source::Stored(stack, panel) => {
            let rows = source.rows();
            stack.values(panel * PANEL..panel * PANEL + rows, cols, &mut tile[..rows * stored]);
            if stored < len {
                // From the last one on, none is written over before it was moved.
                for row in (0..rows).rev() {
                    tile.copy_within(row * stored..(row + 1) * stored, row * len);
                    tile[row * len + stored..(row + 1) * len].fill(0.0);
                }
            }
        }
    }
}

/// Transposes eight rows, `len` apart, into columns. The largest of the values without their signs, as bits: they are in the
/// order of the values.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose(rows: &[f32], len: usize, columns: &mut Columns) -> __m256i {
    // Loops: `array::from_fn` and `map` are functions of their own, compiled for any machine unless they are inlined.
    let mut lines = [&rows[..0]; LANES];
    for (lane, line) in lines.iter_mut().enumerate() {
        *line = &rows[lane * len..][..columns.len()];
    }
    let mut largest = [_mm256_setzero_si256(); 4];
    let unsigned = _mm256_set1_epi32(i32::MAX);
    for (i, columns) in columns.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let mut quads = [_mm256_setzero_ps(); 4];
        for (j, quad) in quads.iter_mut().enumerate() {
            let [low, high] = [&lines[j][4 * i..4 * i + 4], &lines[j + 4][4 * i..4 * i + 4]];
            // SAFETY: each has four values.
            *quad = unsafe { _mm256_loadu2_m128(high.as_ptr(), low.as_ptr()) };
        }
        let [a, b] = [_mm256_unpacklo_ps(quads[0], quads[1]), _mm256_unpackhi_ps(quads[0], quads[1])];
        let [c, d] = [_mm256_unpacklo_ps(quads[2], quads[3]), _mm256_unpackhi_ps(quads[2], quads[3])];
        *columns = [
            _mm256_shuffle_ps::<0b01_00_01_00>(a, c),
            _mm256_shuffle_ps::<0b11_10_11_10>(a, c),
            _mm256_shuffle_ps::<0b01_00_01_00>(b, d),
            _mm256_shuffle_ps::<0b11_10_11_10>(b, d),
        ];
        for (largest, column) in largest.iter_mut().zip(columns) {
            *largest = _mm256_max_epu32(*largest, _mm256_and_si256(_mm256_castps_si256(*column), unsigned));
        }
    }
    let [a, b, c, d] = largest;
    _mm256_max_epu32(_mm256_max_epu32(a, b), _mm256_max_epu32(c, d))
}

/// See [`int8::quantize`]. `largest`: bits of the largest value without its sign.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn eight_bits(columns: &Columns, largest: __m256i, codes: &mut [u8], scales: &mut [u16]) {
    let scale = stored_scales(_mm256_div_ps(_mm256_castsi256_ps(largest), _mm256_set1_ps(127.0)));
    store_scales(scale, scales);
    let (inverse, limit) = (inverses(scale), _mm256_set1_ps(127.0));
    let rounding = Rounding { inverse, first: _mm256_sub_ps(_mm256_setzero_ps(), limit), last: limit };
    let zero = _mm256_set1_epi32(SHIFT_OF_BYTES.wrapping_sub(0x0101_0101_i32.wrapping_mul(i32::from(int8::ZERO))));
    for (columns, codes) in columns.as_chunks::<4>().0.iter().zip(codes.chunks_mut(4 * PANEL)) {
        let mut word = _mm256_setzero_si256();
        for i in [3, 2, 1, 0] {
            word = _mm256_add_epi32(_mm256_slli_epi32::<8>(word), rounding.shifted(columns[i]));
        }
        store_words(_mm256_sub_epi32(word, zero), codes);
    }
}

/// See [`int4::quantize`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn four_bits(columns: &Columns, codes: &mut [u8], scales: &mut [u16]) {
    let (low, high) = range(columns);
    let largest = _mm256_blendv_ps(low, high, _mm256_cmp_ps::<_CMP_GT_OQ>(high, negative(low)));
    let (first, last) = (_mm256_set1_ps(-8.0), _mm256_set1_ps(7.0));
    let mut tried = [Tried::none(); int4::STEPS.len()];
    for (tried, steps) in tried.iter_mut().zip(int4::STEPS) {
        let scale = stored_scales(_mm256_div_ps(largest, _mm256_set1_ps(steps)));
        *tried = Tried { scale, rounding: Rounding { inverse: inverses(scale), first, last } };
    }
    let best = Tried::best(&tried, columns);
    store_scales(best.scale, scales);
    let zero = SHIFT_OF_HALVES.wrapping_sub(0x1111_1111_i32.wrapping_mul(i32::from(int4::ZERO)));
    let rounding = Rounding { first, last, ..best.rounding };
    store_halves(columns, &rounding, _mm256_set1_epi32(zero), codes);
}

/// See [`int4::quantize_with_zero`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn four_bits_with_zero(columns: &Columns, codes: &mut [u8], scales: &mut [u16], zeros: &mut [u8]) {
    let (low, high) = range(columns);
    let (none, most) = (_mm256_setzero_ps(), _mm256_set1_ps(15.0));
    let mut tried = [Tried::none(); int4::SHRINK.len()];
    for (tried, (below, above)) in tried.iter_mut().zip(int4::SHRINK) {
        let (below, above) = (_mm256_set1_ps(below), _mm256_set1_ps(above));
        let size = _mm256_sub_ps(_mm256_mul_ps(high, above), _mm256_mul_ps(low, below));
        let scale = stored_scales(_mm256_div_ps(size, most));
        let inverse = inverses(scale);
        let zero = _mm256_mul_ps(_mm256_mul_ps(negative(low), below), inverse);
        let zero = nearest_whole(_mm256_min_ps(_mm256_max_ps(zero, none), most));
        let (first, last) = (_mm256_sub_ps(none, zero), _mm256_sub_ps(most, zero));
        *tried = Tried { scale, rounding: Rounding { inverse, first, last } };
    }
    let best = Tried::best(&tried, columns);
    store_scales(best.scale, scales);
    let zero = _mm256_cvtps_epi32(_mm256_sub_ps(none, best.rounding.first));
    for (to, zero) in zeros.iter_mut().zip(lanes(zero)) {
        *to = zero as u8;
    }
    let of_codes = _mm256_mullo_epi32(zero, _mm256_set1_epi32(0x1111_1111));
    let zero = _mm256_sub_epi32(_mm256_set1_epi32(SHIFT_OF_HALVES), of_codes);
    store_halves(columns, &best.rounding, zero, codes);
}

/// How values become whole numbers.
#[derive(Clone, Copy)]
struct Rounding {
    /// What they are multiplied by.
    inverse: __m256,
    first: __m256,
    last: __m256,
}

impl Rounding {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn clamped(&self, values: __m256) -> __m256 {
        _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(values, self.inverse), self.first), self.last)
    }

    /// Whole numbers, the bits of [`SHIFT`] more; see [`nearest`](crate::quant::nearest).
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn shifted(&self, values: __m256) -> __m256i {
        _mm256_castps_si256(_mm256_add_ps(self.clamped(values), _mm256_set1_ps(SHIFT)))
    }
}

/// A candidate for the scales of eight groups.
#[derive(Clone, Copy)]
struct Tried {
    scale: __m256,
    rounding: Rounding,
}

impl Tried {
    /// Of no scale.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn none() -> Self {
        let zeros = _mm256_setzero_ps();
        Self { scale: zeros, rounding: Rounding { inverse: zeros, first: zeros, last: zeros } }
    }

    /// The first with the least squared error, for each lane; zeros where all are infinite or none.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn best<const N: usize>(tried: &[Self; N], columns: &Columns) -> Self {
        let mut best = Self::none();
        let mut least = _mm256_set1_ps(f32::INFINITY);
        for (tried, error) in tried.iter().zip(Self::errors(tried, columns)) {
            let better = _mm256_cmp_ps::<_CMP_LT_OQ>(error, least);
            let choose = |so_far, now| _mm256_blendv_ps(so_far, now, better);
            least = choose(least, error);
            best.scale = choose(best.scale, tried.scale);
            best.rounding.inverse = choose(best.rounding.inverse, tried.rounding.inverse);
            best.rounding.first = choose(best.rounding.first, tried.rounding.first);
            best.rounding.last = choose(best.rounding.last, tried.rounding.last);
        }
        best
    }

    /// Squared errors of all candidates, in the order of summation of the definition: sixteen sums, and their sum.
    ///
    /// Multiply-adds change nothing: a step has 11 bits and a code 4, so that their product is exact.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn errors<const N: usize>(tried: &[Self; N], columns: &Columns) -> [__m256; N] {
        let mut totals = [_mm256_setzero_ps(); N];
        for lane in 0..int4::LANES {
            let mut sums = [_mm256_setzero_ps(); N];
            for &values in columns[lane..].iter().step_by(int4::LANES) {
                for (sum, tried) in sums.iter_mut().zip(tried) {
                    let whole = nearest_whole(tried.rounding.clamped(values));
                    let off = _mm256_fnmadd_ps(tried.scale, whole, values);
                    *sum = _mm256_add_ps(*sum, _mm256_mul_ps(off, off));
                }
            }
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total = _mm256_add_ps(*total, sum);
            }
        }
        totals
    }
}

/// The bits of [`SHIFT`] in each byte of a word, carried into the bytes above.
const SHIFT_OF_BYTES: i32 = (SHIFT.to_bits().cast_signed()).wrapping_mul(0x0101_0101);
/// In each half byte.
const SHIFT_OF_HALVES: i32 = (SHIFT.to_bits().cast_signed()).wrapping_mul(0x1111_1111);

/// Whole numbers of 4 bits in their places; `zero` is what they have too much.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store_halves(columns: &Columns, rounding: &Rounding, zero: __m256i, codes: &mut [u8]) {
    for (columns, codes) in columns.as_chunks::<8>().0.iter().zip(codes.chunks_mut(4 * PANEL)) {
        let mut word = _mm256_setzero_si256();
        for i in [7, 3, 6, 2, 5, 1, 4, 0] {
            word = _mm256_add_epi32(_mm256_slli_epi32::<4>(word), rounding.shifted(columns[i]));
        }
        store_words(_mm256_sub_epi32(word, zero), codes);
    }
}

/// A word for each output feature.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store_words(words: __m256i, codes: &mut [u8]) {
    let codes = &mut codes[..4 * LANES];
    // SAFETY: there is room for eight words.
    unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), words) };
}

/// The smallest and the largest of each lane, 0 among them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn range(columns: &Columns) -> (__m256, __m256) {
    let (mut low, mut high) = ([_mm256_setzero_ps(); 4], [_mm256_setzero_ps(); 4]);
    for columns in columns.as_chunks::<4>().0 {
        for i in 0..4 {
            low[i] = _mm256_min_ps(columns[i], low[i]);
            high[i] = _mm256_max_ps(columns[i], high[i]);
        }
    }
    let [a, b, c, d] = low;
    let low = _mm256_min_ps(_mm256_min_ps(a, b), _mm256_min_ps(c, d));
    let [a, b, c, d] = high;
    (low, _mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d)))
}

/// See [`stored_scale`](crate::quant::stored_scale).
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn stored_scales(scales: __m256) -> __m256 {
    let largest = _mm256_set1_ps(65504.0);
    let clamped = _mm256_min_ps(_mm256_max_ps(scales, negative(largest)), largest);
    let stored = _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(clamped));
    let zero = _mm256_setzero_ps();
    let lost = _mm256_and_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(stored, zero), _mm256_cmp_ps::<_CMP_NEQ_OQ>(scales, zero));
    let signs = _mm256_and_ps(scales, _mm256_set1_ps(-0.0));
    let smallest = _mm256_or_ps(signs, _mm256_set1_ps(half::f16::MIN_POSITIVE_SUBNORMAL.to_f32_const()));
    _mm256_blendv_ps(stored, smallest, lost)
}

/// See [`inverse`](crate::quant::inverse).
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn inverses(scales: __m256) -> __m256 {
    let zero = _mm256_setzero_ps();
    let inverses = _mm256_div_ps(_mm256_set1_ps(1.0), scales);
    _mm256_and_ps(inverses, _mm256_cmp_ps::<_CMP_NEQ_OQ>(scales, zero))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store_scales(scales: __m256, to: &mut [u16]) {
    let to = &mut to[..LANES];
    // SAFETY: there is room for eight.
    unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(scales)) };
}

/// See [`nearest_whole`](crate::quant::nearest_whole); zeros may have a sign.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nearest_whole(values: __m256) -> __m256 {
    _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(values)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn negative(values: __m256) -> __m256 {
    _mm256_xor_ps(values, _mm256_set1_ps(-0.0))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn lanes(values: __m256i) -> [i32; LANES] {
    let mut lanes = [0; LANES];
    // SAFETY: eight values are one vector.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), values) };
    lanes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::matrix::quantize_panel;
    use super::*;
    use crate::DType;
    use crate::cpu::Isa;
    use crate::cpu::linear::to_bytes;
    use crate::quant::Scheme;
    use crate::quant::activations::Cut;
    use crate::random::{SplitMix64, noise};

    /// Whether this machine can run what is tested here.
    fn has_vectors() -> bool {
        let has = Isa::Avx2.is_available();
        if !has {
            println!("skipped: no AVX2 on this machine");
        }
        has
    }

    /// Schemes with groups.
    fn grouped() -> impl Strategy<Value = (Scheme, Group)> {
        let schemes = Scheme::ALL.into_iter().filter_map(|scheme| Some((scheme, scheme.group()?)));
        prop::sample::select(schemes.collect::<Vec<_>>())
    }

    struct Packed {
        codes: Vec<u8>,
        scales: Vec<u16>,
        zeros: Vec<u8>,
        finite: bool,
    }

    fn packed(panel: &Panel<'_>, group: Option<Group>) -> Packed {
        let params = panel.cut.scale_groups * PANEL;
        let (mut codes, mut scales) = (vec![170; panel_bytes(panel.scheme, panel.cut.padded)], vec![1; params]);
        let mut zeros = vec![170; if panel.scheme.has_zero_points() { params } else { 0 }];
        let finite = match group {
            None => quantize_panel(panel, &mut codes, &mut scales, &mut zeros),
            // SAFETY: the caller has asked for the instruction set.
            Some(group) => unsafe { super::panel(panel, group, &mut codes, &mut scales, &mut zeros) },
        };
        Packed { codes, scales, zeros, finite }
    }

    /// Rows of sizes far from each other, some weights of which are zeros, far from the others, or halfway between two.
    fn weights(rows: usize, cols: usize, exponents: std::ops::Range<i32>, seed: u64) -> Vec<f32> {
        let mut random = SplitMix64(seed);
        let mut values = noise(rows * cols, seed);
        for values in values.chunks_mut(32) {
            let bits = random.bits();
            let exponent = exponents.start + (bits >> 32) as i32 % exponents.len().max(1) as i32;
            for value in values.iter_mut() {
                let value_of_size_1 = match (bits % 6, random.bits() % 16) {
                    (0, _) => 0.0,
                    (1, _) => value.abs(),
                    (2, _) => (*value * 8.0).round() / 16.0,
                    (3, 0) => 16.0 * *value,
                    (_, 1) => -0.0,
                    _ => *value,
                };
                // In f64, which has room for the powers that are below the normal numbers of f32.
                *value = (f64::from(value_of_size_1) * 2f64.powi(exponent)) as f32;
            }
        }
        values
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(192))]

        #[test]
        fn every_bit_is_that_of_the_definition(
            rows in 1usize..=16, cols in 1usize..600, (scheme, group) in grouped(), size in -40i32..20, span in 1i32..8, seed: u64,
        ) {
            if !has_vectors() {
                return Ok(());
            }
            // Far beyond what scales of 16 bits reach, to both sides, and down to the smallest numbers of f32.
            let size = match seed % 16 {
                0 => 100,
                1 | 2 => -150 + (seed / 16 % 16) as i32,
                _ => size,
            };
            let bytes = to_bytes(&weights(rows, cols, size..size + span, seed), DType::F32);
            let lines: Vec<&[u8]> = bytes.chunks(4 * cols).collect();
            let source = Source::Bytes(&lines, DType::F32);
            let panel = Panel { scheme, cut: Cut::new(scheme, cols), cols, source };
            let (found, wanted) = (packed(&panel, Some(group)), packed(&panel, None));
            prop_assert!(found.finite && wanted.finite);
            prop_assert!(found.codes == wanted.codes, "{}", scheme);
            prop_assert_eq!(found.scales, wanted.scales, "{}", scheme);
            prop_assert_eq!(found.zeros, wanted.zeros, "{}", scheme);
        }

        #[test]
        fn what_is_not_finite_is_seen(
            rows in 1usize..=16, cols in 1usize..600, (scheme, group) in grouped(), bad in 0usize..3, seed: u64,
        ) {
            if !has_vectors() {
                return Ok(());
            }
            let mut values = noise(rows * cols, seed);
            values[seed as usize % (rows * cols)] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][bad];
            let bytes = to_bytes(&values, DType::F32);
            let lines: Vec<&[u8]> = bytes.chunks(4 * cols).collect();
            let panel = Panel { scheme, cut: Cut::new(scheme, cols), cols, source: Source::Bytes(&lines, DType::F32) };
            prop_assert!(!packed(&panel, Some(group)).finite && !packed(&panel, None).finite);
        }
    }
}
