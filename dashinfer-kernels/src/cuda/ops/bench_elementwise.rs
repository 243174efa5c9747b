//! How long the small kernels of a layer take, beside what they move.

use super::embed::{Embed, NOT_CARRIED};
use super::gate::Gate;
use super::gather_rows::GatherRows;
use super::rms_norm::RmsNorm;
use super::rope::{RopeAndCache, RopeOperands, RopeSizes};
use super::testing::*;
use crate::{Activation, DType, KernelError, RopePairs};

/// `cargo test --release -p dashinfer-kernels --features cuda bench_elementwise -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn bench_elementwise() {
    let Some(device) = test_device() else { return };
    let (dtype, hidden, ffn, vocab) = (DType::BF16, 3584, 18944, 32000);
    let (heads, kv_heads, head_dim, block_size) = (28, 4, 128, 16);
    let norm = RmsNorm::new(&device, dtype).unwrap();
    let mut gate = Gate::new(dtype);
    let rope = RopeAndCache::new(&device, dtype).unwrap();
    let embed = Embed::new(&device, dtype).unwrap();
    let gather = GatherRows::new(&device, dtype).unwrap();
    for rows in [1, 8192] {
        let report = |name: &str, values: usize, run: &mut dyn FnMut() -> Result<(), KernelError>| {
            let took = time(&device, run).as_secs_f64();
            println!(
                "{name}/bf16/{rows}   {:.2} µs   {:.0} GB/s   {}",
                took * 1e6,
                values as f64 * 2.0 / took / 1e9,
                device.name
            );
        };
        let x = Values::random(&device, dtype, rows * hidden, 1);
        let residual = Values::random(&device, dtype, rows * hidden, 2);
        let weight = Values::random(&device, DType::F32, hidden, 3);
        let out = poisoned(&device, rows * hidden * 2);
        let by = ((&weight.on_device).into(), 1e-6);
        report("rms_norm", 2 * rows * hidden, &mut || {
            norm.run(&device, (&out).into(), (&x.on_device).into(), by, [rows, hidden])
        });
        let both = [(&residual.on_device).into(), (&x.on_device).into()];
        report("add_rms_norm", 4 * rows * hidden, &mut || {
            norm.run_add(&device, (&out).into(), both, by, [rows, hidden])
        });

        let gated = Values::random(&device, dtype, rows * 2 * ffn, 4);
        let to = poisoned(&device, rows * ffn * 2);
        for activation in [Activation::Silu, Activation::GeluTanh] {
            report(&format!("gate {activation:?}"), 3 * rows * ffn, &mut || {
                gate.run(&device, activation, (&to).into(), (&gated.on_device).into(), [rows, ffn])
            });
        }

        let table = Values::random(&device, dtype, vocab * hidden, 5);
        let ids: Vec<u32> = (0..rows as u32).map(|t| t * 7919 % vocab as u32).collect();
        let (ids_on, carried) = (words(&device, &ids), words(&device, &vec![NOT_CARRIED; rows]));
        let nowhere = upload(&device, &[0; 8]);
        let small = [(&ids_on).into(), (&carried).into(), (&nowhere).into()];
        report("embed", 2 * rows * hidden, &mut || {
            embed.run(&device, (&out).into(), ((&table.on_device).into(), 1.0), small, [rows, hidden])
        });
        let picked = words(&device, &(0..rows as u32).rev().collect::<Vec<_>>());
        report("gather_rows", 2 * rows * hidden, &mut || {
            gather.run(&device, (&out).into(), (&x.on_device).into(), (&picked).into(), [rows, hidden])
        });

        let cols = (heads + 2 * kv_heads) * head_dim;
        let qkv = Values::random(&device, dtype, rows * cols, 6);
        let numbers = words(&device, &(0..rows as u32).collect::<Vec<_>>());
        let inv_freq: Vec<f32> = (0..64).map(|i| 1e6f32.powf(-(i as f32) / 64.0)).collect();
        let inv_freq = Values::of(&device, DType::F32, &inv_freq);
        let cache = [(); 2].map(|()| poisoned(&device, rows.next_multiple_of(block_size) * kv_heads * head_dim * 2));
        let operands = RopeOperands {
            qkv: (&qkv.on_device).into(),
            cache: [(&cache[0]).into(), (&cache[1]).into()],
            positions: (&numbers).into(),
            slots: (&numbers).into(),
            inv_freq: (&inv_freq.on_device).into(),
            rope_scale: 1.0,
            pairs: RopePairs::Halves,
            norms: None,
        };
        let sizes = RopeSizes {
            num_rows: rows,
            num_heads: heads,
            num_kv_heads: kv_heads,
            head_dim,
            block_size,
            rotated: head_dim,
        };
        let moved = rows * (2 * (heads + kv_heads) + 3 * kv_heads) * head_dim;
        report("rope_and_cache", moved, &mut || rope.run(&device, &operands, &sizes));
    }
}
