//! Tests of decode attention that rotates and stores on its way: to the bit what `rope_and_cache` and attention do one after the
//! other, and how long it takes.

use std::sync::Arc;

use super::attention_decode::{DecodeRope, Purpose};
use super::attention_testing::*;
use super::rope::{PreparedRope, RopeAndCache, RopeOperands, RopeSizes};
use super::testing::*;
use crate::cuda::device::Device;
use crate::cuda::memory::Buffer;
use crate::{AttentionParams, DType, RopePairs};

/// How heads are rotated, and whether they are normed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rotation {
    pub(super) rotated: usize,
    pub(super) pairs: RopePairs,
    pub(super) is_normed: bool,
}

/// What `rope_and_cache` needs beside qkv and a cache.
struct Rotator {
    kernel: RopeAndCache,
    rotation: Rotation,
    sizes: RopeSizes,
    positions: Buffer,
    slots: Buffer,
    inv_freq: Buffer,
    norms: [Buffer; 2],
}

impl Rotator {
    fn new(device: &Arc<Device>, prepared: &Prepared<'_>, rotation: Rotation) -> Self {
        let case = prepared.case;
        let AttentionParams { num_heads, num_kv_heads, head_dim, .. } = case.params;
        let (mut positions, mut slots) = (Vec::new(), own_slots(prepared));
        positions.extend(prepared.batch.sequences.iter().map(|sequence| sequence.context_len as u32 - 1));
        positions.resize(prepared.num_rows, 0);
        slots.resize(prepared.num_rows, u32::MAX);
        let frequency = |i| 10_000f32.powf(-2.0 * i as f32 / rotation.rotated as f32);
        let inv_freq: Vec<f32> = (0..rotation.rotated / 2).map(frequency).collect();
        Self {
            kernel: RopeAndCache::new(device, case.dtype).unwrap(),
            rotation,
            sizes: RopeSizes {
                num_rows: prepared.num_rows,
                num_heads,
                num_kv_heads,
                head_dim,
                block_size: case.block_size,
                rotated: rotation.rotated,
            },
            positions: words(device, &positions),
            slots: words(device, &slots),
            inv_freq: upload(device, bytemuck::cast_slice(&inv_freq)),
            norms: [13, 14].map(|seed| upload(device, bytemuck::cast_slice(&random(head_dim, seed)))),
        }
    }

    fn prepare(&self, qkv: &Buffer, cache: [&Buffer; 2]) -> PreparedRope {
        let norms = self.norms.each_ref().map(Into::into);
        let operands = RopeOperands {
            qkv: qkv.into(),
            cache: cache.map(Into::into),
            positions: (&self.positions).into(),
            slots: (&self.slots).into(),
            inv_freq: (&self.inv_freq).into(),
            rope_scale: 1.25,
            pairs: self.rotation.pairs,
            norms: self.rotation.is_normed.then_some((norms, 1e-6)),
        };
        self.kernel.prepare(&operands, &self.sizes).unwrap()
    }

    fn rotate(&self, device: &Device, prepared: &PreparedRope) {
        // SAFETY: buffers outlive the work on them.
        unsafe { self.kernel.launch(device, prepared) }.unwrap();
    }
}

/// The slot of each sequence's last position.
fn own_slots(prepared: &Prepared<'_>) -> Vec<u32> {
    let block_size = prepared.case.block_size;
    let slot = |position: usize, first_block: usize| {
        prepared.batch.block_table[first_block + position / block_size] as usize * block_size + position % block_size
    };
    let sequences = prepared.batch.sequences.iter();
    sequences.map(|sequence| slot(sequence.context_len - 1, sequence.first_block) as u32).collect()
}

/// The cache's values with NaN where this step's are to go.
fn without_own(prepared: &Prepared<'_>, values: &[f32]) -> Vec<f32> {
    let (block_size, params) = (prepared.case.block_size, &prepared.case.params);
    let mut values = values.to_vec();
    for slot in own_slots(prepared) {
        let slot = slot as usize;
        for head in 0..params.num_kv_heads {
            let row = (slot / block_size * params.num_kv_heads + head) * block_size + slot % block_size;
            values[row * params.head_dim..][..params.head_dim].fill(f32::NAN);
        }
    }
    values
}

fn bytes(buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.bytes()];
    buffer.download(0, &mut bytes).unwrap();
    bytes
}

/// Runs a case of decodes in both ways and compares; the wide kernel, which sums in another order, with the definition.
#[track_caller]
pub(super) fn check_fused(device: &Arc<Device>, case: &Case, rotation: Rotation, seed: u64) {
    let (dtype, head_dim) = (case.dtype, case.params.head_dim);
    let what = format!("{} {rotation:?}", case.what());
    let is_capped = case.params.soft_cap.is_some();
    let cached = Kernels::decode_for(device, dtype, head_dim, Purpose::Cached, is_capped).unwrap();
    let mut prepared = Prepared::new(device, &cached, case, seed);
    let rotator = Rotator::new(device, &prepared, rotation);
    let raw = bytes(&prepared.qkv.on_device);
    let [k, v] = [&prepared.k, &prepared.v].map(|half| to_bytes(&without_own(&prepared, &half.values), dtype));

    let qkv = upload(device, &raw);
    let cache = [upload(device, &k), upload(device, &v)];
    let [k_on, v_on] = &cache;
    rotator.rotate(device, &rotator.prepare(&qkv, [k_on, v_on]));
    prepared.run_on(device, &cached, &qkv, [k_on, v_on], None).unwrap();
    let (want_out, want_cache) = (bytes(&prepared.out), cache.each_ref().map(bytes));
    prepared.qkv.values = read(&qkv, dtype);
    prepared.k.values = read(k_on, dtype);
    prepared.v.values = read(v_on, dtype);
    let want = prepared.want();
    let tolerance = step(dtype).max(5e-5);
    assert_close(&prepared.output(), &want, tolerance, tolerance, &what);

    for purpose in [Purpose::Fused, Purpose::FusedWide] {
        let Some(kernel) = Kernels::decode_for(device, dtype, head_dim, purpose, is_capped) else {
            eprintln!("skipped: {purpose:?} for heads of {head_dim}");
            continue;
        };
        let what = format!("{what} {purpose:?}");
        let qkv = upload(device, &raw);
        let cache = [upload(device, &k), upload(device, &v)];
        let [k_on, v_on] = &cache;
        let rope: DecodeRope = rotator.prepare(&qkv, [k_on, v_on]).within_decode().unwrap();
        let mut first = None;
        for _ in 0..3 {
            prepared.out.fill(0, prepared.out.bytes(), 0xff).unwrap();
            prepared.run_on(device, &kernel, &qkv, [k_on, v_on], Some(&rope)).unwrap();
            let out = bytes(&prepared.out);
            assert!(*first.get_or_insert_with(|| out.clone()) == out, "{what}: another result the second time");
            assert!(prepared.has_no_tickets(), "{what}");
        }
        assert_close(&prepared.output(), &want, tolerance, tolerance, &what);
        assert!(purpose != Purpose::Fused || first == Some(want_out.clone()), "{what}: not to the bit");
        assert!(cache.each_ref().map(bytes) == want_cache, "{what}: another cache");
        assert!(bytes(&qkv) == raw, "{what}: rows were written");
    }
}

/// Prints times of `rope_and_cache` and attention, and of both in one, at several ways to split: after another batch, and of
/// runs in a row, whose starts overlap as in a recorded step.
pub(super) fn bench_fused(device: &Arc<Device>, heads: [usize; 3], context_len: usize, num_rows: usize) {
    let [num_heads, num_kv_heads, head_dim] = heads;
    let case = Case::decodes(heads, context_len, num_rows);
    let cached = Kernels::decode(device, DType::BF16, head_dim);
    let mut prepared = Prepared::new(device, &cached, &case, 200);
    let rotation = Rotation { rotated: head_dim, pairs: RopePairs::Halves, is_normed: false };
    let rotator = Rotator::new(device, &prepared, rotation);
    let report = |what: &str, prepared: &Prepared<'_>, run: &mut dyn FnMut()| {
        let mut run = || {
            run();
            Ok(())
        };
        let alone = time_after_others(device, heads, &mut run).as_secs_f64() * 1e6;
        let in_a_row = time(device, &mut run).as_secs_f64() * 1e6;
        let speed = prepared.bytes_read() as f64 / alone / 1e3;
        println!(
            "rope+attention_decode/bf16/{num_heads}/{num_kv_heads}x{head_dim} context {context_len} rows {num_rows}   \
             {what:<22} {alone:8.1} us   {speed:6.0} GB/s   in a row {in_a_row:8.2} us   {} units",
            prepared.plan.units.len(),
        );
    };
    let rope = rotator.prepare(&prepared.qkv.on_device, [&prepared.k.on_device, &prepared.v.on_device]);
    report("apart", &prepared, &mut || {
        rotator.rotate(device, &rope);
        prepared.run(device, &cached).unwrap();
    });
    let rope = rope.within_decode().unwrap();
    for purpose in [Purpose::Fused, Purpose::FusedWide] {
        let Some(kernel) = Kernels::decode_for(device, DType::BF16, head_dim, purpose, false) else { continue };
        let mut last = None;
        for min_split in [64, 128, 256, 384] {
            prepared.plan_for(device, &kernel, min_split);
            // The plan is the one before.
            if last.replace(prepared.plan.units.clone()) == Some(prepared.plan.units.clone()) {
                continue;
            }
            report(&format!("{purpose:?} {min_split}"), &prepared, &mut || {
                let cache = [&prepared.k.on_device, &prepared.v.on_device];
                prepared.run_on(device, &kernel, &prepared.qkv.on_device, cache, Some(&rope)).unwrap();
            });
        }
    }
}
