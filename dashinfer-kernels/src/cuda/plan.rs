//! Who attends to what in a step: the lists that the attention kernels walk, made from the batch on the host.
//!
//! Rows of prompts go to tiles of a prefill kernel where there is one. Every other row is a list of units: ranges of its
//! positions, each read by one block of the decode kernel for one kv head. Of a row with several units, the block that is done
//! last adds all partial results. How rows are split is the whole policy here ([`Splitting`]).

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use crate::{PagedBatch, SequenceRows};

/// The most units of one row: one block adds their partial results.
pub(crate) const MAX_SPLITS: usize = 128;
/// Units begin at multiples of this.
const STEP: usize = 64;
/// What starting a unit costs, in positions: the pipeline fills, and the warps merge.
const UNIT_OVERHEAD: usize = 64;
/// Rows of a block of keys and values that are made of latent vectors for a step, and of a tile of them.
pub(crate) const EXPANDED_BLOCK: usize = 64;
pub(crate) const EXPANDED_ROWS: usize = 128;
/// Splits of a row under [`Splitting::ByContext`].
const MAX_FIXED_SPLITS: usize = 16;

/// A range of positions of one row, as the kernels read it (`attention_units.cuh`).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct DecodeUnit {
    /// Of the batch.
    pub(crate) row: u32,
    /// Where its sequence's blocks start in the block table.
    pub(crate) first_block: u32,
    /// First position, a multiple of 64.
    pub(crate) begin: u32,
    /// One past the last position. Equal to `begin`: the row's output is zeros.
    pub(crate) end: u32,
    /// The row stands at position `context_len - 1`.
    pub(crate) context_len: u32,
    /// Units of this row.
    pub(crate) num_splits: u32,
    /// Where the partial result goes, if it is one. A row's slots are consecutive.
    pub(crate) slot: u32,
    /// Which of the row's units it is.
    pub(crate) split: u32,
}

impl DecodeUnit {
    fn len(&self) -> u32 {
        self.end - self.begin
    }
}

/// Some consecutive rows of one sequence.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct PrefillTile {
    /// Of the batch.
    pub(crate) first_row: u32,
    /// At most the kernel's tile.
    pub(crate) num_rows: u32,
    /// Of the first row, in its sequence.
    pub(crate) position: u32,
    /// Where its sequence's blocks start in the block table; among the blocks of what is made of latent vectors, if keys and values are.
    pub(crate) first_block: u32,
}

/// What the splits of a row depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Splitting {
    /// On all rows of the step, so that every block of the device gets an equal share of the positions. The order in which
    /// a row's positions are added, and with it the last bits, then depends on the other rows.
    Balanced,
    /// On the row's positions alone: its result is the same to the bit in any batch.
    ByContext,
}

/// What a plan is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PlanParams {
    /// Blocks of the decode kernel in its grid.
    pub(crate) grid: usize,
    /// Kv heads, `K`: a unit is `K` blocks' work.
    pub(crate) num_kv_heads: usize,
    /// What all layers have for a window: positions before it are in no unit. `None` if one layer sees everything; layers
    /// that see less then skip what they need not.
    pub(crate) window: Option<usize>,
    /// How rows are split.
    pub(crate) splitting: Splitting,
    /// A row is not split into less, unless its splitting must not depend on the batch: adding its result costs about as much
    /// as reading so many positions.
    pub(crate) min_split: usize,
    /// Rows of the prefill kernel's tile. Without one, rows of prompts are units like all others.
    pub(crate) prefill_rows: Option<usize>,
    /// Whether tiles read keys and values that are made for the step, of all that the cache holds of their sequences.
    pub(crate) expand: bool,
    /// Partial results that there is room for; at least [`MAX_SPLITS`].
    pub(crate) max_slots: usize,
}

impl PlanParams {
    /// Units that run at once.
    fn lanes(&self) -> usize {
        (self.grid / self.num_kv_heads.max(1)).max(1)
    }

    /// Partial results of a step of at most `rows` rows: with so much room its plan is one
    /// [chunk](AttentionPlan::chunks).
    ///
    /// Balanced: a row is split in less than `2 · len / size` if at all, and `size` is at least half of what makes three
    /// units for every lane, so there are at most 12 for each lane.
    pub(crate) fn slots_for(&self, rows: usize) -> usize {
        match self.splitting {
            Splitting::Balanced => (12 * self.lanes()).min(rows * MAX_SPLITS).max(MAX_SPLITS),
            Splitting::ByContext => (rows * MAX_FIXED_SPLITS).max(MAX_SPLITS),
        }
    }

    /// Units of a step of at most `rows` rows.
    #[cfg(test)]
    fn units_for(&self, rows: usize) -> usize {
        rows + self.slots_for(rows)
    }
}

/// The work of a step's attention. Kept from step to step for its memory.
#[derive(Debug, Default)]
pub(crate) struct AttentionPlan {
    /// Longest first in each chunk.
    pub(crate) units: Vec<DecodeUnit>,
    /// Units that run together: ranges, one after the other over all units, each with all units of its rows. They use the same
    /// room for partial results.
    pub(crate) chunks: Vec<Range<usize>>,
    /// The longest first.
    pub(crate) tiles: Vec<PrefillTile>,
    /// What is to be made of latent vectors, if anything is: rows of what is made, the position of the first, and where the sequence's
    /// blocks start in the block table.
    pub(crate) expanded: Vec<PrefillTile>,
    /// Rows of all that is made; whole blocks.
    pub(crate) expanded_rows: usize,
    rows: Vec<Row>,
}

/// A row that is to become units, and the positions that it sees: `begin..context_len`.
#[derive(Debug, Clone, Copy)]
struct Row {
    row: usize,
    first_block: usize,
    begin: usize,
    context_len: usize,
}

impl Row {
    fn len(&self) -> usize {
        self.context_len - self.begin
    }
}

impl AttentionPlan {
    /// Plans the step of `batch`. With `padded_rows`, the step is one of that many rows: rows behind the batch's get zeros, so
    /// that a graph of the step serves every batch of one-row sequences that fits.
    pub(crate) fn make(&mut self, batch: &PagedBatch, params: &PlanParams, padded_rows: Option<usize>) {
        self.rows.clear();
        self.tiles.clear();
        self.expanded.clear();
        self.expanded_rows = 0;
        let mut num_rows = 0;
        for sequence in &batch.sequences {
            num_rows = sequence.first_row + sequence.num_rows;
            let first_position = sequence.context_len - sequence.num_rows;
            match params.prefill_rows.filter(|_| sequence.num_rows > 1) {
                Some(tile) => {
                    let first_block = if params.expand { self.expand(sequence) } else { sequence.first_block };
                    self.tiles.extend((0..sequence.num_rows).step_by(tile).map(|at| PrefillTile {
                        first_row: (sequence.first_row + at) as u32,
                        num_rows: tile.min(sequence.num_rows - at) as u32,
                        position: (first_position + at) as u32,
                        first_block: first_block as u32,
                    }));
                }
                None => self.rows.extend((0..sequence.num_rows).map(|at| {
                    let context_len = first_position + at + 1;
                    let hidden = params.window.map_or(0, |window| context_len.saturating_sub(window));
                    let begin = hidden / STEP * STEP;
                    Row { row: sequence.first_row + at, first_block: sequence.first_block, begin, context_len }
                })),
            }
        }
        self.tiles.sort_by_key(|tile| std::cmp::Reverse(tile.position + tile.num_rows));
        let padding = num_rows..padded_rows.unwrap_or(num_rows);
        self.rows.extend(padding.map(|row| Row { row, first_block: 0, begin: 0, context_len: 0 }));
        self.split_rows(params);
    }

    /// All positions of a sequence are to be made keys and values of; returns their first block.
    fn expand(&mut self, sequence: &SequenceRows) -> usize {
        let start = self.expanded_rows;
        self.expanded.extend((0..sequence.context_len).step_by(EXPANDED_ROWS).map(|position| PrefillTile {
            first_row: (start + position) as u32,
            num_rows: EXPANDED_ROWS.min(sequence.context_len - position) as u32,
            position: position as u32,
            first_block: sequence.first_block as u32,
        }));
        self.expanded_rows = (start + sequence.context_len).next_multiple_of(EXPANDED_BLOCK);
        start / EXPANDED_BLOCK
    }

    fn split_rows(&mut self, params: &PlanParams) {
        self.units.clear();
        self.chunks.clear();
        let balanced = balanced_size(&self.rows, params);
        let (mut first_unit, mut slot) = (0, 0);
        for row in &self.rows {
            let size = match params.splitting {
                Splitting::Balanced => split_evenly(row.len(), balanced, params.min_split),
                Splitting::ByContext => fixed_size(row.len()),
            };
            let num_splits = row.len().div_ceil(size).max(1);
            if num_splits > 1 && slot + num_splits > params.max_slots && slot > 0 {
                self.chunks.push(first_unit..self.units.len());
                (first_unit, slot) = (self.units.len(), 0);
            }
            self.units.extend((0..num_splits).map(|split| {
                let begin = row.begin + split * size;
                DecodeUnit {
                    row: row.row as u32,
                    first_block: row.first_block as u32,
                    begin: begin as u32,
                    end: (begin + size).min(row.context_len) as u32,
                    context_len: row.context_len as u32,
                    num_splits: num_splits as u32,
                    slot: (slot + split) as u32,
                    split: split as u32,
                }
            }));
            slot += if num_splits > 1 { num_splits } else { 0 };
        }
        if !self.rows.is_empty() {
            self.chunks.push(first_unit..self.units.len());
        }
        for chunk in &self.chunks {
            self.units[chunk.clone()].sort_by_key(|unit| std::cmp::Reverse(unit.len()));
        }
    }
}

/// Positions of a unit under [`Splitting::ByContext`].
fn fixed_size(len: usize) -> usize {
    512.max(len.div_ceil(MAX_FIXED_SPLITS).next_multiple_of(STEP))
}

/// Positions of each unit of a row of `len`, about equal and at most `size`, or less than twice `min_split`.
fn split_evenly(len: usize, size: usize, min_split: usize) -> usize {
    let num_splits = len.div_ceil(size).min(len / min_split).max(1);
    len.div_ceil(num_splits).next_multiple_of(STEP).max(STEP)
}

/// The size that is expected to be done first, among those which give every lane about one, two or three units.
fn balanced_size(rows: &[Row], params: &PlanParams) -> usize {
    let total: usize = rows.iter().map(Row::len).sum();
    let longest = rows.iter().map(Row::len).max().unwrap_or(0);
    let lanes = params.lanes();
    let most = (longest / params.min_split).clamp(1, MAX_SPLITS.min(params.max_slots));
    let mut best = (usize::MAX, STEP);
    for per_lane in 1..=3 {
        let share = total.div_ceil(lanes * per_lane).max(1);
        for num_splits in [longest / share, longest / share + 1] {
            let size = longest.div_ceil(num_splits.clamp(1, most)).next_multiple_of(STEP).max(STEP);
            let time = expected_time(rows, size, params);
            if time < best.0 || time == best.0 && size > best.1 {
                best = (time, size);
            }
        }
    }
    best.1
}

/// Positions until the last lane is done, when rows are split by `size`: the smaller of two bounds. Either as many turns as
/// there are, each as long as the longest unit; or an equal share for each lane, and the longest unit after it.
fn expected_time(rows: &[Row], size: usize, params: &PlanParams) -> usize {
    let lanes = params.lanes();
    let (mut num_units, mut positions, mut longest) = (0, 0, 0);
    for row in rows {
        let of_row = split_evenly(row.len(), size, params.min_split);
        num_units += row.len().div_ceil(of_row).max(1);
        positions += row.len();
        longest = longest.max(of_row.min(row.len()));
    }
    let longest = longest + UNIT_OVERHEAD;
    let in_turns = num_units.div_ceil(lanes) * longest;
    in_turns.min((positions + num_units * UNIT_OVERHEAD) / lanes + longest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const H200: PlanParams = PlanParams {
        grid: 264,
        num_kv_heads: 4,
        window: None,
        splitting: Splitting::Balanced,
        min_split: 256,
        prefill_rows: Some(64),
        expand: false,
        max_slots: 12 * 66,
    };

    /// Sequences of `(num_rows, context_len)`, with blocks of 16.
    fn batch(sequences: &[(usize, usize)]) -> PagedBatch {
        let (mut first_row, mut first_block) = (0, 0);
        let sequences = sequences.iter().map(|&(num_rows, context_len)| {
            let num_blocks = context_len.div_ceil(16);
            let sequence = SequenceRows { first_row, num_rows, context_len, first_block, num_blocks };
            first_row += num_rows;
            first_block += num_blocks;
            sequence
        });
        PagedBatch { sequences: sequences.collect(), ..PagedBatch::default() }
    }

    fn plan(sequences: &[(usize, usize)], params: &PlanParams, padded_rows: Option<usize>) -> AttentionPlan {
        let mut plan = AttentionPlan::default();
        plan.make(&batch(sequences), params, padded_rows);
        plan
    }

    fn lens(plan: &AttentionPlan) -> Vec<u32> {
        plan.units.iter().map(DecodeUnit::len).collect()
    }

    #[test]
    fn long_rows_share_the_device_in_one_turn() {
        let plan = plan(&[(1, 8192); 32], &H200, None);
        assert_eq!(lens(&plan), [4096; 64]); // times four heads, on 264 blocks
        let of_row: Vec<_> = plan.units.iter().filter(|unit| unit.row == 1).collect();
        assert_eq!(
            of_row.iter().map(|unit| (unit.slot, unit.split, unit.num_splits)).collect::<Vec<_>>(),
            [(2, 0, 2), (3, 1, 2)]
        );
    }

    #[test]
    fn short_rows_stay_whole() {
        let plan = plan(&[(1, 256), (1, 300), (1, 511)], &H200, None);
        assert_eq!(lens(&plan), [511, 300, 256]);
        assert!(plan.units.iter().all(|unit| unit.num_splits == 1));
    }

    #[test]
    fn where_it_pays_short_rows_are_split_too() {
        let plan = plan(&[(1, 256)], &PlanParams { min_split: 64, ..H200 }, None);
        assert_eq!(lens(&plan), [64; 4]);
    }

    #[test]
    fn a_single_long_row_is_spread_over_the_device() {
        let plan = plan(&[(1, 100_000)], &H200, None);
        assert!((60..=66).contains(&plan.units.len()), "{}", plan.units.len());
    }

    #[test]
    fn one_long_row_among_short_ones_does_not_keep_them_waiting() {
        let mut rows = [(1, 512); 64];
        rows[7].1 = 131_072;
        let longest = lens(&plan(&rows, &H200, None))[0];
        assert!(longest <= 2560, "{longest}");
    }

    #[test]
    fn without_a_prefill_kernel_each_row_of_a_prompt_is_a_unit() {
        let params = PlanParams { prefill_rows: None, ..H200 };
        let plan = plan(&[(3, 10), (1, 5)], &params, None);
        let mut rows: Vec<_> = plan.units.iter().map(|unit| (unit.row, unit.context_len, unit.first_block)).collect();
        rows.sort_unstable();
        assert_eq!(rows, [(0, 8, 0), (1, 9, 0), (2, 10, 0), (3, 5, 1)]);
        assert!(plan.tiles.is_empty());
    }

    #[test]
    fn prompts_become_tiles_longest_first_beside_decodes() {
        let plan = plan(&[(70, 70), (1, 33), (130, 200)], &H200, None);
        let tiles: Vec<_> =
            plan.tiles.iter().map(|tile| (tile.first_row, tile.num_rows, tile.position, tile.first_block)).collect();
        assert_eq!(tiles, [(199, 2, 198, 8), (135, 64, 134, 8), (71, 64, 70, 8), (64, 6, 64, 0), (0, 64, 0, 0)]);
        assert_eq!(plan.units.len(), 1);
        assert_eq!((plan.units[0].row, plan.units[0].end), (70, 33));
    }

    #[test]
    fn what_tiles_read_is_made_of_all_that_their_sequences_have() {
        let params = PlanParams { expand: true, ..H200 };
        let plan = plan(&[(70, 70), (1, 33), (130, 200)], &params, None);
        let of = |tile: &PrefillTile| (tile.first_row, tile.num_rows, tile.position, tile.first_block);
        assert_eq!(
            plan.expanded.iter().map(of).collect::<Vec<_>>(),
            [(0, 70, 0, 0), (128, 128, 0, 8), (256, 72, 128, 8)]
        );
        assert_eq!(plan.expanded_rows, 384);
        let tiles: Vec<_> = plan.tiles.iter().map(of).collect();
        assert_eq!(tiles, [(199, 2, 198, 2), (135, 64, 134, 2), (71, 64, 70, 2), (64, 6, 64, 0), (0, 64, 0, 0)]);
    }

    #[test]
    fn a_padded_step_has_the_shape_of_its_bucket() {
        let plan = plan(&[(1, 100), (1, 1000)], &H200, Some(4));
        assert!(plan.units.iter().all(|unit| (unit.num_splits > 1) == (unit.row == 1)));
        let padding: Vec<_> = plan.units.iter().filter(|unit| unit.begin == unit.end).collect();
        assert_eq!(padding.iter().map(|unit| unit.row).collect::<Vec<_>>(), [2, 3]);
        assert!(padding.iter().all(|unit| unit.num_splits == 1 && unit.context_len == 0));
        assert_eq!(plan.chunks, vec![0..plan.units.len()]);
    }

    #[test]
    fn a_window_hides_what_is_before_it() {
        let params = PlanParams { window: Some(100), ..H200 };
        let plan = plan(&[(1, 1000)], &params, None);
        assert_eq!((plan.units[0].begin, plan.units[0].end, plan.units.len()), (896, 1000, 1));
    }

    #[test]
    fn a_step_without_decodes_has_no_units() {
        let plan = plan(&[(5, 5)], &H200, None);
        assert!(plan.units.is_empty() && plan.chunks.is_empty());
    }

    fn any_params() -> impl Strategy<Value = PlanParams> {
        let sizes = (1usize..600, 1usize..9, 1usize..7);
        (sizes, proptest::option::of(1usize..5000), any::<bool>(), any::<bool>()).prop_map(
            |((grid, num_kv_heads, min_split), window, by_context, prefill)| PlanParams {
                grid,
                num_kv_heads,
                window,
                min_split: 64 * min_split,
                splitting: if by_context { Splitting::ByContext } else { Splitting::Balanced },
                prefill_rows: prefill.then_some(64),
                expand: false,
                max_slots: MAX_SPLITS,
            },
        )
    }

    proptest! {
        /// Every visible position of every row is in one unit; slots are a row's own within its chunk, and in order.
        #[test]
        fn units_cover_each_row_once(
            sequences in proptest::collection::vec((1usize..4, 0usize..20_000), 1..40),
            params in any_params(),
        ) {
            let sequences: Vec<_> = sequences.iter().map(|&(rows, before)| (rows, before + rows)).collect();
            let plan = plan(&sequences, &params, None);
            let mut seen: Vec<_> = batch(&sequences).sequences.iter().flat_map(|sequence| {
                (0..sequence.num_rows).map(|at| (sequence.num_rows > 1 && params.prefill_rows.is_some(), sequence.context_len - sequence.num_rows + at + 1))
            }).collect::<Vec<_>>();
            for tile in &plan.tiles {
                for at in 0..tile.num_rows {
                    let (in_tile, context_len) = &mut seen[(tile.first_row + at) as usize];
                    prop_assert!(*in_tile && *context_len == (tile.position + at + 1) as usize);
                    *context_len = usize::MAX;
                }
            }
            let mut next_unit = 0;
            for chunk in &plan.chunks {
                prop_assert_eq!(chunk.start, next_unit);
                next_unit = chunk.end;
                let mut slots = vec![false; params.max_slots];
                let mut units = plan.units[chunk.clone()].to_vec();
                prop_assert!(units.is_sorted_by_key(|unit| std::cmp::Reverse(unit.len())));
                units.sort_by_key(|unit| (unit.row, unit.begin));
                for of_row in units.chunk_by(|a, b| a.row == b.row) {
                    let (in_tile, context_len) = &mut seen[of_row[0].row as usize];
                    prop_assert!(!*in_tile);
                    let hidden = params.window.map_or(0, |window| context_len.saturating_sub(window));
                    prop_assert_eq!(of_row[0].begin as usize, hidden / 64 * 64);
                    prop_assert_eq!(of_row[of_row.len() - 1].end as usize, *context_len);
                    prop_assert!(of_row.windows(2).all(|two| two[0].end == two[1].begin && two[1].slot == two[0].slot + 1));
                    for (split, unit) in of_row.iter().enumerate() {
                        prop_assert_eq!(unit.split as usize, split);
                        prop_assert!(unit.begin % 64 == 0 && unit.begin < unit.end);
                        prop_assert_eq!(unit.num_splits as usize, of_row.len());
                        prop_assert_eq!(unit.context_len as usize, *context_len);
                        if unit.num_splits > 1 {
                            prop_assert!(!std::mem::replace(&mut slots[unit.slot as usize], true));
                        }
                    }
                    *context_len = usize::MAX;
                }
            }
            prop_assert_eq!(next_unit, plan.units.len());
            prop_assert!(seen.iter().all(|&(_, context_len)| context_len == usize::MAX));
        }

        #[test]
        fn a_step_has_no_more_than_is_said(
            contexts in proptest::collection::vec(1usize..200_000, 1..300),
            params in any_params(),
        ) {
            let params = PlanParams { max_slots: params.slots_for(contexts.len()), ..params };
            let sequences: Vec<_> = contexts.iter().map(|&context_len| (1, context_len)).collect();
            let plan = plan(&sequences, &params, None);
            prop_assert_eq!(plan.chunks.len(), 1);
            prop_assert!(plan.units.len() <= params.units_for(contexts.len()));
            if params.splitting == Splitting::Balanced {
                prop_assert!(plan.units.iter().all(|unit| unit.num_splits == 1 || unit.len() >= 64 || unit.end == unit.context_len));
            }
        }

        #[test]
        fn by_context_a_row_is_split_the_same_in_any_batch(
            others in proptest::collection::vec(1usize..50_000, 0..20),
            context_len in 1usize..200_000,
            window in proptest::option::of(1usize..50_000),
        ) {
            let params = PlanParams { splitting: Splitting::ByContext, window, ..H200 };
            let mut sequences = vec![(1, context_len)];
            let ranges = |plan: &AttentionPlan| {
                let mut ranges: Vec<_> =
                    plan.units.iter().filter(|unit| unit.row == 0).map(|unit| (unit.begin, unit.end)).collect();
                ranges.sort_unstable();
                ranges
            };
            let alone = ranges(&plan(&sequences, &params, None));
            prop_assert!(alone.len() <= 16);
            sequences.extend(others.iter().map(|&other| (1, other)));
            prop_assert_eq!(alone, ranges(&plan(&sequences, &params, None)));
        }
    }
}
