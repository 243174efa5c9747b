use std::sync::Arc;

use super::super::activation::defined;
use super::super::linear::CudaLinear;
use super::super::testing::*;
use super::*;
use crate::random::SplitMix64;
use crate::{Chosen, ExpertGroups, GroupScore, Scoring};

const HALVES: [DType; 2] = [DType::BF16, DType::F16];

/// A GPU with kernels for experts.
fn device() -> Option<Arc<Device>> {
    test_device().filter(|device| Moe::is_supported(device, DType::BF16))
}

fn plain(num_experts: usize, top_k: usize) -> Routing {
    Routing { num_experts, top_k, scoring: Scoring::Softmax, groups: None, normalize: true, scale: 1.0 }
}

/// Logits of which no two of a token are near each other, in an order of its own.
fn logits(num_rows: usize, num_experts: usize, seed: u64) -> Vec<f32> {
    let mut random = SplitMix64(seed);
    let mut all = Vec::new();
    for _ in 0..num_rows {
        let mut row: Vec<f32> = (0..num_experts).map(|i| (i as f32 / num_experts as f32 - 0.5) * 8.0).collect();
        for i in (1..num_experts).rev() {
            row.swap(i, (random.bits() % (i as u64 + 1)) as usize);
        }
        all.extend(row);
    }
    all
}

/// Who is chosen for each token, by the definition.
fn chosen(logits: &[f32], correction: Option<&[f32]>, routing: &Routing) -> Vec<Chosen> {
    let mut scratch = vec![0.0; routing.scratch_len()];
    let of_row = |row: &[f32]| {
        let mut chosen = vec![Chosen::default(); routing.top_k];
        crate::route(&mut chosen, row, correction, routing, &mut scratch).unwrap();
        chosen
    };
    logits.chunks(routing.num_experts).flat_map(of_row).collect()
}

fn read_words(span: &CudaExpertScratch, section: Section, count: usize) -> Vec<u32> {
    let start = 4 * section_start(section, span.max_rows * span.top_k);
    let mut words = vec![0u32; count];
    span.lists.download(start, bytemuck::cast_slice_mut(&mut words)).unwrap();
    words
}

/// Everything that happened, so that one run on a GPU tells it all.
#[derive(Default)]
struct Failures(Vec<String>);

impl Failures {
    fn note(&mut self, result: Result<String, String>) {
        match result {
            Ok(line) => println!("ok    {line}"),
            Err(line) => {
                println!("WRONG {line}");
                self.0.push(line);
            }
        }
    }

    #[track_caller]
    fn finish(self) {
        assert!(self.0.is_empty(), "{} cases are wrong:\n{}", self.0.len(), self.0.join("\n"));
    }
}

/// The lists on the device beside those of the definition.
fn check_lists(
    device: &Arc<Device>,
    num_rows: usize,
    routing: &Routing,
    logits: &[f32],
    correction: Option<&[f32]>,
    tile_rows: usize,
) -> Result<String, String> {
    let what = format!("{num_rows} rows in tiles of {tile_rows}, {routing:?}, correction {}", correction.is_some());
    let scratch = CudaExpertScratch::new(device, DType::BF16, num_rows + 5, [8, 8], routing).unwrap();
    scratch.lists.fill(0, scratch.lists.bytes(), 0xff).unwrap();
    let section = |section| scratch.section(section).unwrap();
    let lists = route::Lists {
        experts: section(Section::Experts),
        weights: section(Section::Weights),
        row_of: section(Section::RowOf),
        token_of: section(Section::TokenOf),
        tiles: section(Section::Tiles),
        num_tiles: section(Section::NumTiles),
    };
    let on_device = Values::of(device, DType::F32, logits);
    let correction_on = correction.map(|correction| Values::of(device, DType::F32, correction));
    let operands = ((&on_device.on_device).into(), correction_on.as_ref().map(|values| (&values.on_device).into()));
    Route::new().run(device, &lists, operands, routing, [num_rows, tile_rows]).unwrap();

    let wanted = chosen(logits, correction, routing);
    let (pairs, n) = (wanted.len(), routing.num_experts);
    let experts = read_words(&scratch, Section::Experts, pairs);
    let weights: Vec<f32> = read_words(&scratch, Section::Weights, pairs).into_iter().map(f32::from_bits).collect();
    for (i, wanted) in wanted.iter().enumerate() {
        let close = (weights[i] - wanted.weight).abs() <= 1e-5 * wanted.weight.abs() + 1e-9;
        if experts[i] != wanted.expert || !(close || weights[i].is_nan() && wanted.weight.is_nan()) {
            let found = (experts[i], weights[i]);
            return Err(format!(
                "{what}: token {} choice {}: wanted {wanted:?}, found {found:?}",
                i / routing.top_k,
                i % routing.top_k
            ));
        }
    }
    // Sorted by expert, and then by token.
    let mut sorted: Vec<usize> = (0..pairs).collect();
    sorted.sort_by_key(|&pair| (wanted[pair].expert, pair));
    let (row_of, token_of) =
        (read_words(&scratch, Section::RowOf, pairs), read_words(&scratch, Section::TokenOf, pairs));
    for (row, &pair) in sorted.iter().enumerate() {
        if row_of[pair] as usize != row || token_of[row] as usize != pair / routing.top_k {
            let found = (row_of[pair], token_of[row]);
            return Err(format!(
                "{what}: pair {pair}: wanted row {row} of token {}, found {found:?}",
                pair / routing.top_k
            ));
        }
    }
    let mut tiles = Vec::new();
    for expert in 0..n {
        let first = sorted.partition_point(|&pair| (wanted[pair].expert as usize) < expert);
        let end = sorted.partition_point(|&pair| wanted[pair].expert as usize <= expert);
        tiles.extend(
            (first..end).step_by(tile_rows).map(|at| [expert as u32, at as u32, (end - at).min(tile_rows) as u32, 0]),
        );
    }
    let num_tiles = read_words(&scratch, Section::NumTiles, 1)[0] as usize;
    let found = read_words(&scratch, Section::Tiles, 4 * tiles.len());
    if num_tiles != tiles.len() || found != tiles.concat() {
        return Err(format!("{what}: {num_tiles} tiles, wanted {}", tiles.len()));
    }
    Ok(what)
}

#[test]
fn rows_are_sorted_by_the_experts_of_the_definition() {
    let Some(device) = device() else { return };
    let mut failures = Failures::default();
    let mut check = |num_rows: usize, routing: &Routing, corrected: bool| {
        let n = routing.num_experts;
        let logits = logits(num_rows, n, (num_rows * n) as u64);
        let correction: Vec<f32> = random(n, 3).iter().map(|x| x * 0.3).collect();
        let correction = corrected.then_some(&correction[..]);
        failures.note(check_lists(
            &device,
            num_rows,
            routing,
            &logits,
            correction,
            if num_rows.is_multiple_of(2) { 64 } else { 16 },
        ));
    };
    for num_rows in [1, 2, 7, 31, 32, 33, 63, 64, 65, 100, 333, 1024, 2000] {
        check(num_rows, &plain(128, 8), false);
    }
    for (n, k) in
        [(8, 1), (8, 2), (8, 8), (64, 6), (65, 4), (96, 4), (160, 6), (256, 8), (257, 3), (384, 8), (512, 10), (32, 32)]
    {
        for num_rows in [3, 200] {
            check(num_rows, &plain(n, k), false);
            check(num_rows, &Routing { normalize: false, scale: 2.5, ..plain(n, k) }, true);
            check(num_rows, &Routing { scoring: Scoring::Sigmoid, ..plain(n, k) }, true);
        }
    }
    for (n, k, num_groups, top_groups) in [(256, 8, 8, 4), (160, 6, 8, 3), (64, 4, 32, 5), (16, 2, 1, 1), (24, 6, 3, 2)]
    {
        for score in [GroupScore::Max, GroupScore::TopTwo] {
            let groups = Some(ExpertGroups { num_groups, top_groups, score });
            for scoring in [Scoring::Softmax, Scoring::Sigmoid] {
                for num_rows in [5, 130] {
                    check(
                        num_rows,
                        &Routing { groups, scoring, scale: 2.5, ..plain(n, k) },
                        scoring == Scoring::Sigmoid,
                    );
                }
            }
        }
    }
    failures.finish();
}

/// Equals, one expert for all, values that are no numbers.
#[test]
fn of_equals_the_first_is_taken_and_of_nothing_as_many() {
    let Some(device) = device() else { return };
    let mut failures = Failures::default();
    let mut check = |num_rows: usize, routing: &Routing, logit: &dyn Fn(usize, usize) -> f32| {
        let n = routing.num_experts;
        let logits: Vec<f32> = (0..num_rows * n).map(|i| logit(i / n, i % n)).collect();
        failures.note(check_lists(&device, num_rows, routing, &logits, None, 64));
    };
    for num_rows in [1, 70, 700] {
        check(num_rows, &plain(128, 8), &|_, _| 0.0);
        check(num_rows, &plain(128, 8), &|_, expert| if expert % 3 == 0 { 1.0 } else { 0.0 });
        check(num_rows, &plain(128, 1), &|_, expert| if expert == 77 { 5.0 } else { 0.0 });
        check(num_rows, &plain(128, 2), &|row, expert| {
            if expert == row % 2 * 100 { 5.0 } else { expert as f32 / 128.0 }
        });
        check(num_rows, &plain(64, 6), &|_, expert| if expert % 2 == 0 { -0.0 } else { 0.0 });
        let sigmoid = Routing { scoring: Scoring::Sigmoid, normalize: false, ..plain(16, 4) };
        check(num_rows, &sigmoid, &|_, expert| if expert < 13 { f32::NAN } else { -1.0 });
        check(num_rows, &sigmoid, &|row, expert| if row % 3 == 0 { f32::NAN } else { expert as f32 });
        let groups = Some(ExpertGroups { num_groups: 4, top_groups: 2, score: GroupScore::TopTwo });
        check(num_rows, &Routing { groups, ..plain(32, 3) }, &|_, expert| (expert % 8) as f32);
    }
    failures.finish();
}

/// A layer of experts, and the values that its weights have on the device.
struct Layer {
    experts: CudaExperts,
    routing: Routing,
    gate_up: Vec<Vec<f32>>,
    down: Vec<Vec<f32>>,
    /// Of gate and up, and of down, of each.
    biases: Option<[Vec<Vec<f32>>; 2]>,
}

impl Layer {
    fn new(device: &Arc<Device>, dtype: DType, [hidden, inner]: [usize; 2], routing: Routing, has_bias: bool) -> Self {
        let matrices = |rows: usize, cols: usize, seed: usize| {
            let mut values = Vec::new();
            let mut biases = Vec::new();
            let mut linears = Vec::new();
            for expert in 0..routing.num_experts {
                let seed = (seed + 31 * expert + rows + 7 * cols) as u64;
                let factor = (3.0 / cols as f32).sqrt();
                let scaled: Vec<f32> = random(rows * cols, seed).iter().map(|x| x * factor).collect();
                let weight = Values::of(device, dtype, &scaled);
                let bias = random(rows, !seed);
                linears.push(CudaLinear {
                    weight: weight.on_device,
                    bias_f32: has_bias.then(|| upload(device, bytemuck::cast_slice(&bias))),
                    bias_t: None,
                    rows,
                    cols,
                    dtype,
                });
                values.push(weight.values);
                biases.push(bias);
            }
            (linears, values, biases)
        };
        let (gate_up_on, gate_up, first) = matrices(2 * inner, hidden, 1);
        let (down_on, down, second) = matrices(hidden, inner, 2);
        let experts = CudaExperts::new(device, dtype, gate_up_on, down_on).unwrap();
        Self { experts, routing, gate_up, down, biases: has_bias.then_some([first, second]) }
    }

    fn bias(&self, of: usize, expert: usize, row: usize) -> f64 {
        self.biases.as_ref().map_or(0.0, |biases| f64::from(biases[of][expert][row]))
    }

    /// What the pair's gated row should be, and how far it may be off beside rounding.
    fn gated(&self, x: &[f32], expert: usize, activation: Activation) -> Vec<(f64, f64)> {
        let inner = self.experts.inner;
        let dot = |row: usize| {
            let weights = &self.gate_up[expert][row * x.len()..][..x.len()];
            let products = || x.iter().zip(weights).map(|(&x, &w)| f64::from(x) * f64::from(w));
            (
                products().sum::<f64>() + self.bias(0, expert, row),
                products().map(f64::abs).sum::<f64>() * 2f64.powi(-20),
            )
        };
        (0..inner)
            .map(|i| {
                let ((gate, off_gate), (up, off_up)) = (dot(i), dot(inner + i));
                // A product of two factors; no slope of the first is above 1.14.
                let (one, of_up) = match activation {
                    Activation::ClampedSwiglu { limit, .. } => (0.0, up.clamp(-f64::from(limit), limit.into()) + 1.0),
                    _ => (1.0, up),
                };
                let (want, of_gate) = (defined(activation, gate, up), defined(activation, gate, one));
                (want, off_gate * 1.14 * of_up.abs() + off_up * of_gate.abs() + 6e-6 * want.abs())
            })
            .collect()
    }

    /// What down makes of a gated row, as it is on the device.
    fn result(&self, gated: &[f32], expert: usize) -> Vec<(f64, f64)> {
        (0..self.experts.hidden)
            .map(|row| {
                let weights = &self.down[expert][row * gated.len()..][..gated.len()];
                let products = || gated.iter().zip(weights).map(|(&x, &w)| f64::from(x) * f64::from(w));
                (
                    products().sum::<f64>() + self.bias(1, expert, row),
                    products().map(f64::abs).sum::<f64>() * 2f64.powi(-20),
                )
            })
            .collect()
    }
}

/// Compares rows with what they should be, each value rounded once.
fn compare(what: &str, dtype: DType, found: &[f32], wanted: &[(f64, f64)], cols: usize) -> Result<(), String> {
    assert_eq!(found.len(), wanted.len(), "{what}");
    let is_off = |i: &usize| {
        let (want, off) = wanted[*i];
        // The least value of f16 that is not rounded to a multiple of 2^-24.
        let bound = step(dtype) * want.abs() + off + 2f64.powi(-24);
        found[*i].is_nan() || (f64::from(found[*i]) - want).abs() > bound
    };
    let off: Vec<usize> = (0..found.len()).filter(is_off).collect();
    let Some(&first) = off.first() else { return Ok(()) };
    let few: Vec<String> = off
        .iter()
        .take(6)
        .map(|&i| format!("[{}, {}] is {}, should be {}", i / cols, i % cols, found[i], wanted[i].0))
        .collect();
    let (last, rows) =
        (off[off.len() - 1], off.iter().map(|i| i / cols).collect::<std::collections::BTreeSet<_>>().len());
    Err(format!(
        "{what}: {} of {} values are off, rows {}..={} ({rows}), columns from {}: {}",
        off.len(),
        found.len(),
        first / cols,
        last / cols,
        off.iter().map(|i| i % cols).min().unwrap_or(0),
        few.join("; ")
    ))
}

/// Each stage beside its definition, on what the stage before left on the device.
fn check_layer(
    device: &Arc<Device>,
    dtype: DType,
    layer: &Layer,
    num_rows: usize,
    tile: Tile,
    logits: &[f32],
    activation: Activation,
) -> Result<String, String> {
    let (routing, hidden, inner) = (&layer.routing, layer.experts.hidden, layer.experts.inner);
    let what = format!(
        "{dtype} {num_rows} rows of {} of {} experts {inner}x{hidden} bias {} {activation:?} {tile:?}",
        routing.top_k,
        routing.num_experts,
        layer.biases.is_some()
    );
    let moe = Moe::new(device, dtype, false);
    let mut scratch = CudaExpertScratch::new(device, dtype, num_rows + 3, [hidden, inner], routing).unwrap();
    for buffer in [&scratch.lists, &scratch.gated, &scratch.results] {
        buffer.fill(0, buffer.bytes(), 0xff).unwrap();
    }
    let x = Values::random(device, dtype, num_rows * hidden, 11);
    let on_device = Values::of(device, DType::F32, logits);
    let out = poisoned(device, (num_rows + 1) * hidden * 2);
    let operands = Operands {
        out: (&out).into(),
        x: (&x.on_device).into(),
        logits: (&on_device.on_device).into(),
        correction: None,
        activation,
        num_rows,
    };
    moe.run_with(&operands, &layer.experts, routing, &mut scratch, tile).unwrap();

    let chosen = chosen(logits, None, routing);
    let pairs = chosen.len();
    let row_of: Vec<usize> = read_words(&scratch, Section::RowOf, pairs).iter().map(|&row| row as usize).collect();
    if row_of.iter().any(|&row| row >= pairs) {
        return Err(format!("{what}: no rows"));
    }
    let gated = read(&scratch.gated, dtype);
    let results = read(&scratch.results, dtype);
    let (mut want_gated, mut want_results) = (vec![(0.0, 0.0); pairs * inner], vec![(0.0, 0.0); pairs * hidden]);
    let mut want_out = vec![(0.0, 0.0); num_rows * hidden];
    for (pair, of) in chosen.iter().enumerate() {
        let (row, token, expert) = (row_of[pair], pair / routing.top_k, of.expert as usize);
        want_gated[row * inner..][..inner].copy_from_slice(&layer.gated(
            &x.values[token * hidden..][..hidden],
            expert,
            activation,
        ));
        want_results[row * hidden..][..hidden].copy_from_slice(&layer.result(&gated[row * inner..][..inner], expert));
        for i in 0..hidden {
            let part = f64::from(of.weight) * f64::from(results[row * hidden + i]);
            let (want, off) = &mut want_out[token * hidden + i];
            *want += part;
            *off += part.abs() * 4e-6;
        }
    }
    compare(&format!("{what}, gated"), dtype, &gated[..pairs * inner], &want_gated, inner)?;
    compare(&format!("{what}, results"), dtype, &results[..pairs * hidden], &want_results, hidden)?;
    let out = read(&out, dtype);
    compare(&format!("{what}, sum"), dtype, &out[..num_rows * hidden], &want_out, hidden)?;
    let untouched = |values: &[f32]| values.iter().all(|value| value.is_nan());
    if !untouched(&gated[pairs * inner..])
        || !untouched(&results[pairs * hidden..])
        || !untouched(&out[num_rows * hidden..])
    {
        return Err(format!("{what}: rows beyond the last were written"));
    }
    Ok(what)
}

/// Every tile that some device of this kind may have.
fn all_tiles(device: &Device) -> Vec<Tile> {
    let sm90: &[Tile] = if device.arch.number() == 90 { &tiles::SM90_TILES } else { &[] };
    tiles::SM80_TILES.iter().chain(sm90).copied().collect()
}

fn check_products(pick: impl Fn(&Tile) -> bool) {
    let Some(device) = device() else { return };
    let mut failures = Failures::default();
    let mut activation = Activation::Silu;
    let mut check = |dtype: DType, sizes: [usize; 2], [n, k]: [usize; 2], has_bias: bool, rows: &[usize]| {
        let layer = Layer::new(&device, dtype, sizes, plain(n, k), has_bias);
        // Each in its turn; the clamped one with a limit that many values are beyond.
        activation = match activation {
            Activation::Silu => Activation::ClampedSwiglu { alpha: 1.702, limit: 0.5 },
            Activation::ClampedSwiglu { .. } => Activation::GeluTanh,
            _ => Activation::Silu,
        };
        for &num_rows in rows {
            let logits = logits(num_rows, n, num_rows as u64);
            for tile in all_tiles(&device).into_iter().filter(&pick) {
                failures.note(check_layer(&device, dtype, &layer, num_rows, tile, &logits, activation));
            }
        }
    };
    // Tails of weight blocks (64 features of gate and up, 128 of down), of steps (64), of tiles; more experts than rows, and fewer.
    let few = [1, 3, 16, 50];
    check(DType::BF16, [64, 64], [8, 2], false, &[1, 3, 16, 50, 257]);
    check(DType::BF16, [128, 64], [8, 1], true, &few);
    check(DType::BF16, [72, 40], [5, 3], true, &[1, 50, 257]);
    check(DType::BF16, [8, 8], [4, 4], false, &few);
    check(DType::BF16, [1032, 328], [8, 2], true, &[1, 50]);
    check(DType::BF16, [200, 776], [128, 8], false, &[1, 16]);
    check(DType::F16, [256, 192], [16, 4], false, &few);
    check(DType::F16, [72, 200], [8, 3], true, &[7, 130]);
    check(DType::BF16, [72, 200], [8, 4], true, &[1, 16, 257]);
    check(DType::BF16, [128, 192], [8, 2], true, &few);
    failures.finish();
}

#[test]
fn products_of_sm80_agree_with_the_sums() {
    check_products(|tile| matches!(tile, Tile::Sm80 { .. }));
}

#[test]
fn products_of_sm90_agree_with_the_sums() {
    check_products(|tile| matches!(tile, Tile::Sm90 { groups: 1, .. }));
}

/// A test of its own, since it is the one that would hang if their barriers were wrong.
#[test]
fn products_of_two_warpgroups_agree_with_the_sums() {
    check_products(|tile| matches!(tile, Tile::Sm90 { groups: 2, .. }));
}

/// An expert with all rows beside experts with none; tiles that are full, and one row more.
#[test]
fn one_expert_may_have_all_rows() {
    let Some(device) = device() else { return };
    let mut failures = Failures::default();
    let layer = Layer::new(&device, DType::BF16, [136, 72], plain(16, 1), false);
    for num_rows in [1, 15, 16, 17, 32, 33, 64, 65, 128, 129, 300, 2000] {
        let logits: Vec<f32> = (0..num_rows * 16).map(|i| if i % 16 == 9 { 3.0 } else { 0.0 }).collect();
        for tile in all_tiles(&device) {
            failures.note(check_layer(&device, DType::BF16, &layer, num_rows, tile, &logits, Activation::Silu));
        }
    }
    failures.finish();
}

/// The chosen rows of a batch by themselves, to the bit; and whether tiles agree, which is not promised.
#[test]
fn a_row_alone_has_the_bits_that_it_has_among_others() {
    let Some(device) = device() else { return };
    let (dtype, hidden, inner, num_rows, routing) = (DType::BF16, 512, 328, 300, plain(32, 4));
    let layer = Layer::new(&device, dtype, [hidden, inner], routing, true);
    let (x, logits) = (random(num_rows * hidden, 4), logits(num_rows, 32, 5));
    let mut scratch = CudaExpertScratch::new(&device, dtype, num_rows, [hidden, inner], &routing).unwrap();
    let mut run = |moe: &Moe, first: usize, count: usize, tile: Option<Tile>| {
        let x = Values::of(&device, dtype, &x[first * hidden..][..count * hidden]);
        let logits = Values::of(&device, DType::F32, &logits[first * 32..][..count * 32]);
        let out = poisoned(&device, count * hidden * 2);
        let operands = Operands {
            out: (&out).into(),
            x: (&x.on_device).into(),
            logits: (&logits.on_device).into(),
            correction: None,
            activation: Activation::Silu,
            num_rows: count,
        };
        match tile {
            Some(tile) => moe.run_with(&operands, &layer.experts, &routing, &mut scratch, tile).unwrap(),
            None => moe.run(&operands, &layer.experts, &routing, &mut scratch).unwrap(),
        }
        read(&out, dtype)
    };
    for tile in all_tiles(&device) {
        let moe = Moe::new(&device, dtype, false);
        let all = run(&moe, 0, num_rows, Some(tile));
        let same = (0..num_rows).step_by(23).all(|row| run(&moe, row, 1, Some(tile)) == all[row * hidden..][..hidden]);
        assert!(same, "{tile:?}");
        let others = all_tiles(&device).into_iter().filter(|&other| run(&moe, 0, num_rows, Some(other)) == all).count();
        println!("{tile:?}: {others} of {} tiles have the same bits", all_tiles(&device).len());
    }
    let alone = Moe::new(&device, dtype, true);
    let all = run(&alone, 0, num_rows, None);
    for (first, count) in [(0, 1), (17, 1), (299, 1), (40, 8), (100, 64), (3, 200)] {
        assert!(run(&alone, first, count, None) == all[first * hidden..][..count * hidden], "{first} {count}");
    }
    // As a recorded step.
    let fast = Moe::new(&device, dtype, false);
    let plain = run(&fast, 0, 60, None);
    let (x, logits) =
        (Values::of(&device, dtype, &x[..60 * hidden]), Values::of(&device, DType::F32, &logits[..60 * 32]));
    let out = poisoned(&device, 60 * hidden * 2);
    let operands = Operands {
        out: (&out).into(),
        x: (&x.on_device).into(),
        logits: (&logits.on_device).into(),
        correction: None,
        activation: Activation::Silu,
        num_rows: 60,
    };
    time(&device, || fast.run(&operands, &layer.experts, &routing, &mut scratch));
    assert!(read(&out, dtype) == plain, "recorded");
}

/// Layers behind each other, each with other tokens, whose lists of tiles would do harm if they were read too early.
#[test]
fn weights_may_come_before_the_rows() {
    let Some(device) = device() else { return };
    let (dtype, hidden, inner, most, routing) = (DType::BF16, 512, 1032, 96, plain(32, 4));
    let layer = Layer::new(&device, dtype, [hidden, inner], routing, false);
    let mut scratch = CudaExpertScratch::new(&device, dtype, most, [hidden, inner], &routing).unwrap();
    let x = Values::random(&device, dtype, most * hidden, 4);
    let counts = [96, 1, 40, 2, 64, 8, 96, 3];
    let all: Vec<Values> =
        (0..counts.len()).map(|i| Values::of(&device, DType::F32, &logits(most, 32, i as u64 + 50))).collect();
    let mut run = |early: bool| {
        let mut moe = Moe::new(&device, dtype, false);
        moe.early = early;
        let outs: Vec<Buffer> = counts.iter().map(|count| poisoned(&device, count * hidden * 2)).collect();
        let mut layers = || {
            for ((&num_rows, logits), out) in counts.iter().zip(&all).zip(&outs) {
                let logits = (&logits.on_device).into();
                let operands = Operands {
                    out: out.into(),
                    x: (&x.on_device).into(),
                    logits,
                    correction: None,
                    activation: Activation::Silu,
                    num_rows,
                };
                moe.run(&operands, &layer.experts, &routing, &mut scratch)?;
            }
            Ok(())
        };
        if early {
            time(&device, layers);
        } else {
            layers().unwrap();
        }
        outs.iter().map(|out| read(out, dtype)).collect::<Vec<_>>()
    };
    let late = run(false);
    assert!(late.iter().flatten().all(|value| value.is_finite()));
    assert!(run(true) == late);
}

#[test]
fn a_shared_expert_is_added() {
    let Some(device) = device() else { return };
    for dtype in HALVES {
        let moe = Moe::new(&device, dtype, false);
        for (num_rows, cols) in [(1, 8), (3, 2048), (65, 2056)] {
            let (out, x) = (random(num_rows * cols, 1), Values::random(&device, dtype, num_rows * cols, 2));
            let gate: Vec<f32> = random(num_rows, 3).iter().map(|x| 5.0 * x).collect();
            let gate = Values::of(&device, DType::F32, &gate);
            for gated in [true, false] {
                let to = Values::of(&device, dtype, &out);
                let by = gated.then(|| (&gate.on_device).into());
                moe.add_gated((&to.on_device).into(), (&x.on_device).into(), by, [num_rows, cols]).unwrap();
                let factor = |row: usize| if gated { 1.0 / (1.0 + (-f64::from(gate.values[row])).exp()) } else { 1.0 };
                let want: Vec<f64> = (0..num_rows * cols)
                    .map(|i| f64::from(to.values[i]) + factor(i / cols) * f64::from(x.values[i]))
                    .collect();
                assert_close(
                    &read(&to.on_device, dtype),
                    &want,
                    step(dtype),
                    1e-6,
                    &format!("{dtype} {num_rows}x{cols}"),
                );
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(device) = device() else { return };
    let dtype = DType::BF16;
    let linear = |rows: usize, cols: usize| CudaLinear {
        weight: device.alloc("a test", rows * cols * 2).unwrap(),
        bias_f32: None,
        bias_t: None,
        rows,
        cols,
        dtype,
    };
    let pack = |gate_up: &[[usize; 2]], down: &[[usize; 2]]| {
        let of = |shapes: &[[usize; 2]]| shapes.iter().map(|&[rows, cols]| linear(rows, cols)).collect();
        CudaExperts::new(&device, dtype, of(gate_up), of(down)).map(|_| ()).unwrap_err().to_string()
    };
    assert_eq!(pack(&[], &[]), "pack_experts: experts should be 1, found 0");
    assert_eq!(pack(&[[16, 8]], &[]), "pack_experts: matrices of down should be 1, found 0");
    assert_eq!(pack(&[[16, 8]], &[[8, 16]]), "pack_experts: rows of gate and up should be 32, found 16");
    assert_eq!(
        pack(&[[16, 8], [16, 16]], &[[8, 8], [8, 8]]),
        "pack_experts: columns of an expert's matrix should be 8, found 16"
    );
    assert!(pack(&[[24, 8]], &[[8, 12]]).contains("not in whole eights"));
    assert!(CudaExpertScratch::new(&device, dtype, 4, [8, 8], &plain(513, 2)).is_err());
    let layer = Layer::new(&device, dtype, [8, 8], plain(4, 2), false);
    let moe = Moe::new(&device, dtype, false);
    let mut scratch = CudaExpertScratch::new(&device, dtype, 4, [8, 8], &layer.routing).unwrap();
    let (x, logits) = (poisoned(&device, 5 * 16), poisoned(&device, 5 * 16));
    let mut run = |num_rows: usize, routing: &Routing| {
        let operands = Operands {
            out: (&x).into(),
            x: (&x).into(),
            logits: (&logits).into(),
            correction: None,
            activation: Activation::Silu,
            num_rows,
        };
        moe.run(&operands, &layer.experts, routing, &mut scratch)
    };
    assert_eq!(run(0, &layer.routing), Ok(()));
    assert_eq!(
        run(5, &layer.routing).unwrap_err().to_string(),
        "experts: rows that the scratch is for should be 5, found 4"
    );
    assert_eq!(run(1, &plain(8, 2)).unwrap_err().to_string(), "experts: experts of the layer should be 8, found 4");
}
