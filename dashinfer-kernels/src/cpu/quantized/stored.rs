//! Packing codes as they were stored: moved, or counted from another zero, but not rounded.

use std::ops::Range;

use super::super::aligned::CACHE_LINE;
use super::matrix::{panel_bytes, symmetric_zero};
use super::words;
use crate::quant::activations::Cut;
use crate::quant::stored::{IN_WORD, StoredStack};
use crate::quant::{
    CodeBits, CodeLayout, CodeWords, PANEL, Scheme, StoredMatrix, WeightBits, int4, int8, stored_scale,
};

/// Places whose codes are read at a time; whole groups of any scheme that has them.
const STRETCH: usize = 512;

/// How many panels are best filled together: those whose words share cache lines.
pub(super) fn panels_together(stack: &StoredStack<'_>, scheme: Scheme) -> usize {
    let mut together = 1;
    stack.each(0..stack.rows, |part, _, _| {
        if let Some(CodeWords::OfFeatures { .. }) = words_of(part, scheme) {
            together = CACHE_LINE * 2 / PANEL;
        }
    });
    together
}

/// The words of a part, if those of the scheme can be made of them.
fn words_of(part: &dyn StoredMatrix, scheme: Scheme) -> Option<CodeWords<'_>> {
    let four = part.layout().is_some_and(|layout| layout.bits == CodeBits::Four);
    if four && scheme.weight_bits() == WeightBits::Four { part.words() } else { None }
}

/// Fills `panels` of a matrix whose scheme [fits](StoredStack::fits) `stack`. Whether all scales were finite.
pub(super) fn pack_panels(
    stack: &StoredStack<'_>,
    panels: Range<usize>,
    scheme: Scheme,
    cut: Cut,
    codes: &mut [u8],
    scales: &mut [u16],
    zeros: &mut [u8],
) -> bool {
    let mut finite = true;
    let panel_rows = |panel: usize| panel * PANEL..stack.rows.min((panel + 1) * PANEL);
    let num_scales = cut.scale_groups * PANEL;
    let num_zeros = if scheme.has_zero_points() { num_scales } else { 0 };
    let params: Vec<_> = (panels.clone().enumerate())
        .map(|(i, panel)| {
            let scales = &mut scales[i * num_scales..][..num_scales];
            let zeros = &mut zeros[i * num_zeros..][..num_zeros];
            let params = Params::read(stack, panel_rows(panel), scheme, cut, scales, zeros);
            finite &= params.finite;
            params
        })
        .collect();
    if cut.padded == 0 {
        return finite; // without input features, panels have no codes
    }
    let mut panel_codes: Vec<&mut [u8]> = codes.chunks_mut(panel_bytes(scheme, cut.padded)).collect();
    // Runs of panels whose rows are one part's, and all there, have their words moved.
    let mut next = 0;
    while next < panels.len() {
        let rows = (panels.start + next) * PANEL..stack.rows.min(panels.end * PANEL);
        let mut moved = 0;
        stack.each(rows, |part, part_rows, places| {
            let whole = part_rows.len() / PANEL;
            let aligned = part_rows.start.is_multiple_of(IN_WORD) && part.cols().is_multiple_of(IN_WORD);
            if places.start == 0
                && whole > 0
                && aligned
                && let Some(words) = words_of(part, scheme)
            {
                let panels = &mut panel_codes[next..next + whole];
                words::place(&words, part_rows.start, part.cols(), panels);
                for panel in panels {
                    panel[int4::panel_bytes(part.cols())..].fill(int4::ZERO * 17);
                }
                moved = whole;
            }
        });
        if moved == 0 {
            pack_codes(stack, panel_rows(panels.start + next), scheme, cut, &params[next], panel_codes[next]);
            moved = 1;
        }
        next += moved;
    }
    finite
}

/// Fills the codes of a panel.
fn pack_codes(
    stack: &StoredStack<'_>,
    rows: Range<usize>,
    scheme: Scheme,
    cut: Cut,
    params: &Params,
    codes: &mut [u8],
) {
    let middle = symmetric_zero(scheme);
    let mut tile = [0u8; PANEL * STRETCH];
    let mut row_codes = [0u8; STRETCH];
    for first in (0..cut.padded).step_by(STRETCH) {
        let len = STRETCH.min(cut.padded - first);
        let places = first.min(stack.cols)..stack.cols.min(first + len);
        stack.each(rows.clone(), |part, part_rows, lanes| {
            let stored = &mut tile[lanes.start * places.len()..lanes.end * places.len()];
            part.codes(part_rows, places.clone(), stored);
        });
        let quads = &mut codes[panel_bytes(scheme, first)..panel_bytes(scheme, first + len)];
        if scheme.weight_bits() == WeightBits::Four && rows.len() == PANEL && places.len() == len {
            int4::place_all(quads, &tile[..PANEL * len]);
            continue;
        }
        for lane in 0..PANEL {
            let stored = if lane < rows.len() { &mut tile[lane * places.len()..][..places.len()] } else { &mut [] };
            params.centre(lane, first, stored);
            let lane_codes = if stored.len() == len {
                &*stored
            } else {
                // What pads a row or a panel is 0, or meets activations that are.
                let (of_row, padding) = row_codes[..len].split_at_mut(stored.len());
                of_row.copy_from_slice(stored);
                padding.fill(middle);
                &row_codes[..len]
            };
            match scheme.weight_bits() {
                WeightBits::Four => int4::place(quads, lane, lane_codes),
                WeightBits::Eight => int8::place(quads, lane, lane_codes),
            }
        }
    }
}

/// What becomes of the codes of a panel.
struct Params {
    finite: bool,
    /// What is to be added to the 4-bit codes of each group and lane, `[groups][16]`, if 8-bit codes are wanted.
    shifts: Vec<u8>,
    /// Places of a group.
    group: usize,
}

impl Params {
    /// Reads the scales and zero points of `rows` and writes them as the scheme has them.
    fn read(
        stack: &StoredStack<'_>,
        rows: Range<usize>,
        scheme: Scheme,
        cut: Cut,
        scales: &mut [u16],
        zeros: &mut [u8],
    ) -> Self {
        let group = scheme.group().map_or(cut.padded.max(1), |group| group.size());
        let mut finite = true;
        let mut shifts = Vec::new();
        for index in 0..cut.scale_groups {
            let (mut group_scales, mut group_zeros) = ([0.0f32; PANEL], [0u8; PANEL]);
            let mut moved = None;
            stack.each(rows.clone(), |part, part_rows, lanes| {
                let Some(layout) = part.layout() else { return }; // `fits` has seen one
                let scales = &mut group_scales[lanes.clone()];
                let zeros = &mut group_zeros[lanes.clone()];
                zeros.fill(layout.bits.middle());
                stored_params(part, layout, part_rows, index * group, scales, zeros);
                if scheme.weight_bits() == WeightBits::Eight && layout.bits == CodeBits::Four {
                    let moved = moved.get_or_insert([0u8; PANEL]);
                    for (moved, zero) in moved[lanes].iter_mut().zip(zeros) {
                        *moved = int8::ZERO.wrapping_sub(*zero);
                    }
                }
            });
            if let Some(moved) = moved {
                shifts.resize(index * PANEL, 0);
                shifts.extend(moved);
            }
            finite &= group_scales.iter().all(|scale| scale.is_finite());
            for (to, scale) in scales[index * PANEL..][..PANEL].iter_mut().zip(group_scales) {
                *to = stored_scale(scale).to_bits();
            }
            if scheme.has_zero_points() {
                zeros[index * PANEL..][..PANEL].copy_from_slice(&group_zeros);
            }
        }
        Self { finite, shifts, group }
    }

    /// Makes 8-bit codes of 4-bit ones, where those are wanted; `first` is the place of the first.
    fn centre(&self, lane: usize, first: usize, codes: &mut [u8]) {
        if self.shifts.is_empty() {
            return;
        }
        let mut at = first;
        for part in codes.chunks_mut(self.group) {
            let shift = self.shifts.get(at / self.group * PANEL + lane).copied().unwrap_or(0);
            part.iter_mut().for_each(|code| *code = code.wrapping_add(shift));
            at += self.group;
        }
    }
}

/// The parameters of the stored group in which `place` is.
fn stored_params(
    part: &dyn StoredMatrix,
    layout: CodeLayout,
    rows: Range<usize>,
    place: usize,
    scales: &mut [f32],
    zeros: &mut [u8],
) {
    if place < part.cols() {
        part.params(rows, layout.group.map_or(0, |group| place / group), scales, zeros);
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::ops::Range;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    use super::super::tests::MODEL;
    use super::super::words::PLACES;
    use super::super::{Activations, Product, QuantizedMatrix, VARIANTS, best, run};
    use crate::cpu::isa::supported;
    use crate::cpu::linear::{PackedMatrix, to_bytes};
    use crate::cpu::pool::{PoolConfig, ThreadPool};
    use crate::cpu::{CpuBackend, CpuConfig, CpuLinear, Isa};
    use crate::quant::{PANEL, stored_scale};
    use crate::random::{SplitMix64, noise};
    use crate::{
        Backend, CodeBits, CodeLayout, CodeWords, DType, Group, GroupedCodes, KernelError, MatrixView, PackedShape,
        Scheme, SharedBytes, StoredMatrix,
    };

    /// Random codes in memory, with scales that f16 holds.
    struct Codes {
        shape: [usize; 2],
        layout: CodeLayout,
        codes: Vec<u8>,
        scales: Vec<f32>,
        zeros: Vec<u8>,
        order: Option<Vec<u32>>,
    }

    impl Codes {
        fn new(shape: [usize; 2], layout: CodeLayout, reordered: bool, seed: u64) -> Self {
            let [rows, cols] = shape;
            let mut random = SplitMix64(seed);
            let mut bytes = |len| -> Vec<u8> { (0..len).map(|_| random.bits() as u8 & layout.bits.max()).collect() };
            let params = rows * layout.groups(cols);
            let (codes, zeros) = (bytes(rows * cols), bytes(if layout.zero_points { params } else { 0 }));
            let scales = noise(params, seed).iter().map(|scale| stored_scale(scale / 64.0).to_f32()).collect();
            let mut order: Vec<u32> = (0..cols as u32).collect();
            for i in (1..cols).rev() {
                order.swap(i, random.bits() as usize % (i + 1));
            }
            Self { shape, layout, codes, scales, zeros, order: reordered.then_some(order) }
        }

        fn matrix(&self) -> GroupedCodes<'_> {
            let new = GroupedCodes::new(self.shape, self.layout, &self.codes, &self.scales, &self.zeros).unwrap();
            self.order.as_deref().map_or(new, |order| new.with_order(order))
        }

        /// By definition.
        fn weights(&self) -> Vec<f32> {
            let [rows, cols] = self.shape;
            let (groups, size) = (self.layout.groups(cols), self.layout.group.unwrap_or(cols));
            let mut weights = vec![f32::NAN; rows * cols];
            for row in 0..rows {
                for place in 0..cols {
                    let group = row * groups + place / size;
                    let zero = if self.layout.zero_points { self.zeros[group] } else { self.layout.bits.middle() };
                    let col = self.order.as_ref().map_or(place, |order| order[place] as usize);
                    let steps = i32::from(self.codes[row * cols + place]) - i32::from(zero);
                    weights[row * cols + col] = self.scales[group] * steps as f32;
                }
            }
            weights
        }
    }

    /// The same codes, which say that they stand in words.
    struct InWords<'a> {
        codes: GroupedCodes<'a>,
        bytes: Vec<u8>,
        of_features: bool,
        /// Codes that were asked for one by one.
        asked: AtomicUsize,
    }

    impl<'a> InWords<'a> {
        fn new(codes: &'a Codes, of_features: bool) -> Self {
            let [rows, cols] = codes.shape;
            let mut words = vec![0u32; rows * cols / 8];
            for (i, code) in codes.codes.iter().enumerate() {
                let (row, col, code) = (i / cols, i % cols, u32::from(*code));
                if of_features {
                    words[col * (rows / 8) + row / 8] |= code << (4 * PLACES[row % 8]);
                } else {
                    words[col / 8 * rows + row] |= code << (4 * (col % 8));
                }
            }
            let bytes = words.into_iter().flat_map(u32::to_le_bytes).collect();
            Self { codes: codes.matrix(), bytes, of_features, asked: AtomicUsize::new(0) }
        }
    }

    impl StoredMatrix for InWords<'_> {
        fn rows(&self) -> usize {
            self.codes.rows()
        }

        fn cols(&self) -> usize {
            self.codes.cols()
        }

        fn layout(&self) -> Option<CodeLayout> {
            self.codes.layout()
        }

        fn values(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
            self.codes.values(rows, cols, out);
        }

        fn codes(&self, rows: Range<usize>, places: Range<usize>, out: &mut [u8]) {
            self.asked.fetch_add(out.len(), Ordering::Relaxed);
            self.codes.codes(rows, places, out);
        }

        fn words(&self) -> Option<CodeWords<'_>> {
            let (bytes, rows) = (&self.bytes[..], self.rows());
            Some(if self.of_features {
                CodeWords::OfFeatures { bytes, col: rows / 8 }
            } else {
                CodeWords::OfPlaces { bytes, octet: rows, row: 1 }
            })
        }

        fn params(&self, rows: Range<usize>, group: usize, scales: &mut [f32], zeros: &mut [u8]) {
            self.codes.params(rows, group, scales, zeros);
        }
    }

    fn pool() -> ThreadPool {
        ThreadPool::new(&PoolConfig { threads: NonZeroUsize::new(2), cores: Vec::new() }).unwrap()
    }

    fn rows_of(matrix: &QuantizedMatrix) -> Vec<f32> {
        let mut rows = vec![f32::NAN; matrix.rows() * matrix.cols()];
        rows.chunks_mut(matrix.cols()).enumerate().for_each(|(row, out)| matrix.read_row(row, out));
        rows
    }

    fn product(variant: Product, x: &[f32], weight: &QuantizedMatrix, pool: &ThreadPool) -> Vec<f32> {
        let mut out = vec![f32::NAN; x.len() / weight.cols() * weight.rows()];
        run(variant, &mut out, x, weight, &mut Activations::default(), pool).unwrap();
        out
    }

    fn any_layout() -> impl Strategy<Value = CodeLayout> {
        let groups = prop::sample::select(&[None, Some(32), Some(64), Some(96), Some(128), Some(256)][..]);
        let bits = prop_oneof![Just(CodeBits::Four), Just(CodeBits::Eight)];
        (bits, groups, any::<bool>()).prop_map(|(bits, group, zero_points)| CodeLayout { bits, group, zero_points })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Two matrices side by side: each weight is what its code says, and a product what the rows say, on every instruction set.
        #[test]
        fn codes_are_packed_as_they_are(
            layouts in [any_layout(), any_layout()], rows in [1usize..40, 1usize..40], cols in 1usize..700, t in 1usize..5,
            reordered: bool, other in 0..Scheme::ALL.len(), seed: u64,
        ) {
            let mut parts: Vec<_> =
                (0..2).map(|i| Codes::new([rows[i], cols], layouts[i], reordered, seed ^ i as u64)).collect();
            parts[1].order = parts[0].order.clone();
            let matrices: Vec<_> = parts.iter().map(Codes::matrix).collect();
            let matrices: Vec<&dyn StoredMatrix> = matrices.iter().map(|matrix| matrix as _).collect();
            let (pool, bias) = (pool(), noise(rows[0] + rows[1], seed));
            // What holds them, and any scheme that happens to.
            let other = Scheme::ALL[other];
            let fits = |scheme: &Scheme| {
                layouts.iter().all(|layout| layout.fits(*scheme)) && (scheme.group().is_some() || !reordered)
            };
            for scheme in Scheme::holding(&layouts).into_iter().chain([other]).filter(fits) {
                let packed = QuantizedMatrix::pack_stored(&matrices, Some(&bias), scheme, &pool).unwrap();
                let weights = parts.iter().map(Codes::weights).collect::<Vec<_>>().concat();
                prop_assert_eq!(rows_of(&packed), weights.clone(), "{}", scheme);
                let x = noise(t * cols, !seed);
                let found = product(best(Isa::Scalar), &x, &packed, &pool);
                for v in supported(VARIANTS) {
                    prop_assert_eq!(&product(v.run, &x, &packed, &pool), &found, "{:?} {}", v.isa, scheme);
                }
                let step = if scheme.to_string().starts_with("a8") { 1.0 / 127.0 } else { 1.0 / 32512.0 };
                for (i, found) in found.iter().enumerate() {
                    let (row, col) = (i / bias.len(), i % bias.len());
                    let terms = x[row * cols..][..cols].iter().zip(&weights[col * cols..][..cols]);
                    let exact = terms.clone().map(|(x, w)| f64::from(x * w)).sum::<f64>() + f64::from(bias[col]);
                    let size = terms.map(|(_, w)| w.abs()).sum::<f32>() + 1.0;
                    prop_assert!((f64::from(*found) - exact).abs() <= f64::from(size * step), "{} {}", found, exact);
                }
            }
        }

        /// Panels of one part and panels of several, one at a time and together.
        #[test]
        fn words_make_the_panels_that_codes_make(
            octets in [1usize..60, 1usize..4, 1usize..60], cols in 1usize..40, of_features: [bool; 3], zero_points: bool,
            group in prop::sample::select(&[Group::G32, Group::G64, Group::G128][..]), seed: u64,
        ) {
            let (cols, layout) = (8 * cols, CodeLayout { bits: CodeBits::Four, group: Some(128), zero_points });
            let parts: Vec<_> =
                (0..3).map(|i| Codes::new([8 * octets[i], cols], layout, false, seed ^ i as u64)).collect();
            let plain: Vec<_> = parts.iter().map(Codes::matrix).collect();
            let words: Vec<_> = parts.iter().zip(of_features).map(|(codes, of)| InWords::new(codes, of)).collect();
            let scheme = Scheme::A16W4 { group, zero_point: zero_points };
            let one = ThreadPool::new(&PoolConfig { threads: NonZeroUsize::new(1), cores: Vec::new() }).unwrap();
            let wanted: Vec<&dyn StoredMatrix> = plain.iter().map(|matrix| matrix as _).collect();
            let found: Vec<&dyn StoredMatrix> = words.iter().map(|matrix| matrix as _).collect();
            let wanted = QuantizedMatrix::pack_stored(&wanted, None, scheme, &one).unwrap();
            let found = QuantizedMatrix::pack_stored(&found, None, scheme, &one).unwrap();
            prop_assert!(found.buffers() == wanted.buffers());
            // Codes are read only where a panel has rows of several parts, or is not full.
            let ends = parts.iter().scan(0, |end, part| {
                *end += part.shape[0];
                Some(*end)
            });
            let mut cut: Vec<_> = ends.filter(|end| !end.is_multiple_of(PANEL)).map(|end| end / PANEL).collect();
            cut.dedup();
            let rows = 8 * octets.iter().sum::<usize>();
            let cut_rows: usize = cut.iter().map(|panel| PANEL.min(rows - panel * PANEL)).sum();
            let asked: usize = words.iter().map(|matrix| matrix.asked.load(Ordering::Relaxed)).sum();
            prop_assert_eq!(asked, cut_rows * cols);
        }

        /// As those of the same values in f32.
        #[test]
        fn what_no_scheme_holds_is_quantized_anew(
            layout in any_layout(), rows in 1usize..40, cols in 1usize..700, reordered: bool, scheme in 0..Scheme::ALL.len(),
            seed: u64,
        ) {
            let (codes, scheme, pool) = (Codes::new([rows, cols], layout, reordered, seed), Scheme::ALL[scheme], pool());
            prop_assume!(!layout.fits(scheme) || (reordered && scheme.group().is_none()));
            let packed = QuantizedMatrix::pack_stored(&[&codes.matrix()], None, scheme, &pool).unwrap();
            let bytes = to_bytes(&codes.weights(), DType::F32);
            let view = MatrixView { bytes: &bytes, dtype: DType::F32, rows, cols };
            let wanted = QuantizedMatrix::pack(&[view], None, scheme, &pool).unwrap();
            prop_assert!(packed.buffers() == wanted.buffers(), "{}", scheme);
        }

        #[test]
        fn what_shall_be_dense_is_as_in_f32(
            layout in any_layout(), rows in 1usize..40, cols in 1usize..700, reordered: bool, seed: u64,
        ) {
            let (codes, pool) = (Codes::new([rows, cols], layout, reordered, seed), pool());
            let (bytes, bias) = (to_bytes(&codes.weights(), DType::F32), noise(rows + 1, seed));
            let view = MatrixView { bytes: &bytes, dtype: DType::F32, rows, cols };
            // Beside weights that were not quantized.
            let one = MatrixView { bytes: &bytes[..4 * cols], dtype: DType::F32, rows: 1, cols };
            let packed = PackedMatrix::pack_stored(&[&codes.matrix(), &one], Some(&bias), &pool).unwrap();
            let wanted = PackedMatrix::pack(&[view, one], Some(&bias), &pool).unwrap();
            prop_assert!(packed.buffers() == wanted.buffers());
        }
    }

    /// 8-bit codes of formats reach 0, which ours do not: −128 steps.
    #[test]
    fn the_smallest_code_is_no_exception() {
        let (pool, cols) = (pool(), 4096);
        let layout = CodeLayout { bits: CodeBits::Eight, group: Some(128), zero_points: false };
        for code in [0, 255] {
            let (codes, scales) = (vec![code; 17 * cols], vec![1.0; 17 * cols / 128]);
            let codes = GroupedCodes::new([17, cols], layout, &codes, &scales, &[]).unwrap();
            let scheme = Scheme::holding(&[layout]).unwrap();
            let packed = QuantizedMatrix::pack_stored(&[&codes], None, scheme, &pool).unwrap();
            // Enough rows for tiles.
            let x: Vec<f32> = (0..17 * cols).map(|i| if (i / cols).is_multiple_of(2) { 1.0 } else { -1.0 }).collect();
            let exact = (f32::from(code) - 128.0) * cols as f32;
            let check = |variant: Product, name: &str| {
                for (i, found) in product(variant, &x, &packed, &pool).into_iter().enumerate() {
                    let exact = if (i / 17).is_multiple_of(2) { exact } else { -exact };
                    assert!((found / exact - 1.0).abs() < 1e-4, "{name} {found} {exact}");
                }
            };
            for v in supported(VARIANTS) {
                check(v.run, &format!("{:?}", v.isa));
            }
            #[cfg(all(feature = "x86", target_arch = "x86_64"))]
            check(MODEL, "the model of AMX");
        }
    }

    /// As with values: no codes at all, and zeros for what scales there are.
    #[test]
    fn without_input_features_there_are_no_codes() {
        let pool = pool();
        for scheme in Scheme::ALL {
            for (rows, group, zero_points) in [(1, Some(128), false), (16, None, false), (40, Some(32), true)] {
                let layout = CodeLayout { bits: CodeBits::Four, group, zero_points };
                let codes = Codes::new([rows, 0], layout, false, 1);
                let bias = noise(rows, 1);
                let packed = QuantizedMatrix::pack_stored(&[&codes.matrix()], Some(&bias), scheme, &pool).unwrap();
                let view = MatrixView { bytes: &[], dtype: DType::F32, rows, cols: 0 };
                let wanted = QuantizedMatrix::pack(&[view], Some(&bias), scheme, &pool).unwrap();
                let bytes = packed.buffers().iter().map(|buffer| buffer.len()).collect::<Vec<_>>();
                assert_eq!(bytes, wanted.buffers().iter().map(|buffer| buffer.len()).collect::<Vec<_>>(), "{scheme}");
                assert!(packed.buffers()[0].is_empty(), "{scheme}");
            }
        }
    }

    /// A matrix that says that its codes stand in words, and has fewer of them than it says, or none at all where it says.
    #[test]
    fn words_that_are_not_there_are_refused() {
        struct Lying<'a>(GroupedCodes<'a>, CodeWords<'a>);
        impl StoredMatrix for Lying<'_> {
            fn rows(&self) -> usize {
                self.0.rows()
            }

            fn cols(&self) -> usize {
                self.0.cols()
            }

            fn layout(&self) -> Option<CodeLayout> {
                self.0.layout()
            }

            fn values(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
                self.0.values(rows, cols, out);
            }

            fn codes(&self, rows: Range<usize>, places: Range<usize>, out: &mut [u8]) {
                self.0.codes(rows, places, out);
            }

            fn words(&self) -> Option<CodeWords<'_>> {
                Some(self.1)
            }

            fn params(&self, rows: Range<usize>, group: usize, scales: &mut [f32], zeros: &mut [u8]) {
                self.0.params(rows, group, scales, zeros);
            }
        }
        let layout = CodeLayout { bits: CodeBits::Four, group: Some(32), zero_points: false };
        let scheme = Scheme::holding(&[layout]).unwrap();
        let pack = |[rows, cols]: [usize; 2], words: CodeWords<'_>| {
            let codes = Codes::new([rows, cols], layout, false, 1);
            let matrix = Lying(codes.matrix(), words);
            let packed = QuantizedMatrix::pack_stored(&[&matrix], None, scheme, &pool());
            packed.map(|_| ()).map_err(|error| error.to_string())
        };
        let bytes = &[0; 1024][..];
        let all = |bytes| CodeWords::OfFeatures { bytes, col: 2 };
        assert_eq!(pack([16, 16], all(&bytes[..128])), Ok(()));
        let few = |wanted, found| {
            Err(format!("pack: bytes of the words of codes, at least should be {wanted}, found {found}"))
        };
        assert_eq!(pack([16, 16], all(&bytes[..127])), few(128, 127));
        assert_eq!(pack([16, 16], all(&[])), few(128, 0));
        // Counted with bits that `usize` has not, they would be few.
        for col in [0x1111_1111_1111_1111, usize::MAX / 15, usize::MAX] {
            assert_eq!(pack([16, 16], CodeWords::OfFeatures { bytes, col }), few(usize::MAX, 1024), "{col:#x}");
        }
        for (octet, row) in [(16, 1), (1, 2), (1, 10), (2, 1)] {
            let last = octet + 15 * row;
            let words = |bytes| CodeWords::OfPlaces { bytes, octet, row };
            assert_eq!(pack([16, 16], words(&bytes[..4 * (last + 1)])), Ok(()));
            assert_eq!(pack([16, 16], words(&bytes[..4 * last + 3])), few(4 * (last + 1), 4 * last + 3));
        }
        for (octet, row) in [(usize::MAX, 1), (1, usize::MAX), (usize::MAX - 15, 1), (usize::MAX / 4, 1)] {
            assert_eq!(pack([16, 16], CodeWords::OfPlaces { bytes, octet, row }), few(usize::MAX, 1024));
        }
        // Nothing is asked of words where there are no codes.
        assert_eq!(pack([0, 16], all(&[])), Ok(()));
        assert_eq!(pack([16, 0], all(&[])), Ok(()));
    }

    #[test]
    fn parts_must_agree_in_their_order_to_be_packed_as_they_are() {
        let layout = CodeLayout { bits: CodeBits::Four, group: Some(32), zero_points: false };
        let [a, b] = [1, 2].map(|seed| Codes::new([3, 64], layout, true, seed));
        let scheme = Scheme::holding(&[layout; 2]).unwrap();
        let packed = QuantizedMatrix::pack_stored(&[&a.matrix(), &b.matrix()], None, scheme, &pool()).unwrap();
        assert_eq!(packed.order(), None);
        let weights = [a.weights(), b.weights()].concat();
        for (found, wanted) in rows_of(&packed).iter().zip(weights) {
            assert!((found - wanted).abs() < 0.05, "{found} {wanted}");
        }
    }

    #[test]
    fn an_order_is_stored_with_its_matrix() {
        let backend = CpuBackend::new(&CpuConfig::default()).unwrap();
        let layout = CodeLayout { bits: CodeBits::Four, group: Some(32), zero_points: true };
        let codes = Codes::new([21, 96], layout, true, 1);
        let scheme = Scheme::holding(&[layout]);
        let CpuLinear::Quantized(matrix) = backend.pack_stored(&[&codes.matrix()], None, scheme).unwrap() else {
            panic!("it is quantized");
        };
        let shape = PackedShape { rows: 21, cols: 96, dtype: DType::F32, scheme, bias: false, order: true };
        let stored = |bytes: &[u8]| {
            #[repr(align(64))]
            struct Lines([u8; 4096]);
            struct Stored(Box<Lines>, usize);
            impl AsRef<[u8]> for Stored {
                fn as_ref(&self) -> &[u8] {
                    &self.0.0[..self.1]
                }
            }
            let mut lines = Box::new(Lines([0; 4096]));
            lines.0[..bytes.len()].copy_from_slice(bytes);
            SharedBytes::new(Stored(lines, bytes.len()))
        };
        let mut buffers: Vec<_> = matrix.buffers().into_iter().map(stored).collect();
        let again = QuantizedMatrix::from_buffers(&shape, scheme.unwrap(), &buffers).unwrap();
        assert_eq!((again.buffers(), again.bytes()), (matrix.buffers(), matrix.bytes()));
        assert_eq!(rows_of(&again), codes.weights());
        let refused = |shape: &PackedShape, buffers: &[SharedBytes]| {
            let error = QuantizedMatrix::from_buffers(shape, scheme.unwrap(), buffers).unwrap_err();
            assert!(matches!(error, KernelError::Shape { .. }), "{error}");
        };
        refused(&PackedShape { order: false, ..shape }, &buffers);
        refused(&shape, &buffers[..4]);
        buffers[4] = stored(&[7; 96 * 4]);
        refused(&shape, &buffers);
        buffers[4] = stored(&[0; 95 * 4]);
        refused(&shape, &buffers);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let pool = pool();
        let layout = CodeLayout { bits: CodeBits::Four, group: Some(32), zero_points: false };
        let scheme = Scheme::holding(&[layout]).unwrap();
        let new = |shape| Codes::new(shape, layout, false, 1);
        let pack = |parts: &[&dyn StoredMatrix], bias| {
            QuantizedMatrix::pack_stored(parts, bias, scheme, &pool).unwrap_err().to_string()
        };
        assert_eq!(pack(&[], None), "pack: number of parts should be 1, found 0");
        let (a, b) = (new([2, 32]), new([2, 64]));
        assert_eq!(pack(&[&a.matrix(), &b.matrix()], None), "pack: columns of a part should be 32, found 64");
        assert_eq!(pack(&[&a.matrix()], Some(&[0.0])), "pack: length of the bias should be 2, found 1");
        let view = MatrixView { bytes: &[0; 127], dtype: DType::F32, rows: 1, cols: 32 };
        assert_eq!(pack(&[&view], None), "pack: bytes of a part should be 128, found 127");
        let mut bad = new([2, 32]);
        bad.order = Some(vec![3; 32]);
        let text = "pack: input feature of an order, each once and less than their number should be 32, found 3";
        assert_eq!(pack(&[&bad.matrix()], None), text);
        for scale in [f32::NAN, f32::INFINITY] {
            let mut bad = new([2, 32]);
            bad.scales[1] = scale;
            assert_eq!(pack(&[&bad.matrix()], None), "pack: a weight that is to be quantized is not finite");
        }
    }
}
