//! Files of packed weights: as they come; with checksums put right around a header that comes; and whole ones, whose matrices are then
//! taken as others than they are.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use dashinfer_fuzz::{file, run};
use dashinfer_kernels::{DType, PackedShape, Scheme};
use dashinfer_models::fuzzing::{CachedItem, read_cached, sealed, whole};
use libfuzzer_sys::fuzz_target;

fn item(input: &mut Unstructured<'_>) -> arbitrary::Result<CachedItem> {
    let rows = usize::from(u8::arbitrary(input)? % 70);
    if bool::arbitrary(input)? {
        return Ok(CachedItem::Vector(rows));
    }
    let cols = usize::from(u8::arbitrary(input)?);
    let cols = if bool::arbitrary(input)? { cols * 32 % 512 } else { cols };
    let dtype = *input.choose(&[DType::F32, DType::F16, DType::BF16])?;
    let scheme = *input.choose(&Scheme::ALL)?;
    let scheme = bool::arbitrary(input)?.then_some(scheme);
    let shape =
        PackedShape { rows, cols, dtype, scheme, bias: bool::arbitrary(input)?, order: bool::arbitrary(input)? };
    Ok(CachedItem::Matrix(shape))
}

fn made(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let wanted = (0..input.int_in_range(1..=4)?).map(|_| item(input)).collect::<arbitrary::Result<Vec<_>>>()?;
    let mut stored = Vec::new();
    for item in &wanted {
        let mut sizes = item.buffer_bytes();
        // Now and then not what the item takes.
        if u8::arbitrary(input)? > 200 {
            sizes.push(usize::from(u8::arbitrary(input)?));
        }
        if u8::arbitrary(input)? > 200 {
            sizes.pop();
        }
        let mut buffers = Vec::new();
        for size in sizes {
            let size = if u8::arbitrary(input)? > 240 { usize::from(u16::arbitrary(input)?) } else { size };
            let fill = input.bytes(size.min(input.len()).min(64))?;
            buffers
                .push(fill.iter().copied().cycle().take(if fill.is_empty() { 0 } else { size }).collect::<Vec<u8>>());
        }
        stored.push((*item, buffers));
    }
    let path = file("made.weights", Some(&whole(&stored)));
    let _ = read_cached(&path, &wanted);
    Ok(())
}

fuzz_target!(|input: &[u8]| {
    run(|| match input.split_first() {
        Some((b'=', rest)) => {
            let header = rest.iter().position(|byte| *byte == b'{').unwrap_or(rest.len());
            let path = file("sealed.weights", Some(&sealed(&rest[header..], &rest[..header])));
            let _ = read_cached(&path, &[CachedItem::Vector(3)]);
        }
        Some((b'!', rest)) => {
            let _ = made(&mut Unstructured::new(rest));
        }
        _ => {
            let _ = read_cached(&file("raw.weights", Some(input)), &[CachedItem::Vector(3)]);
        }
    });
});
