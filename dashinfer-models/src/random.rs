//! Random weights in the shape of a model: for benchmarks, and for trying a shape whose checkpoint is not at hand.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    num::NonZeroUsize,
    sync::{Mutex, PoisonError},
};

use dashinfer_kernels::{DType, cpu::to_bytes};

use crate::{ModelSpec, StoredType, TensorInfo, WeightSource, weights::Plan};

/// Standard deviation of matrices and biases, and of norms around 1: that of the usual initialization.
const DEVIATION: f32 = 0.02;
/// Values in the table that weights are drawn from; a power of two, small enough for the first-level cache.
const TABLE: usize = 1 << 12;
/// Values that one thread makes in a row.
const RUN: usize = 1 << 20;

/// A source of weights which are made when they are read: normal-ish with a deviation of 0.02, norms near 1. The same seed
/// gives the same weights, rounded to the type in question. A tensor is made whole whenever it is read: beside what is packed, the largest one
/// is in memory while a model is loaded.
#[derive(Debug, Clone)]
pub struct RandomWeights {
    shapes: BTreeMap<String, Vec<usize>>,
    seed: u64,
    dtype: DType,
    /// Of tensors that are zero.
    zero: Option<String>,
}

impl RandomWeights {
    /// Weights for `spec`, in bf16.
    #[must_use]
    pub fn new(spec: &ModelSpec, seed: u64) -> Self {
        Self { shapes: Plan::new(spec).tensors().into_iter().collect(), seed, dtype: DType::BF16, zero: None }
    }

    /// The type of all weights.
    #[must_use]
    pub fn dtype(mut self, dtype: DType) -> Self {
        self.dtype = dtype;
        self
    }

    /// Routers give all experts of `spec` the same score, so that all tokens get the same experts, the first. Without it they are chosen
    /// evenly. Some engines' random weights are so small that scores are equal once they are rounded: beside these it is the same work.
    #[must_use]
    pub fn tied_experts(mut self, spec: &ModelSpec) -> Self {
        self.zero = spec.experts.map(|_| format!(".{}.weight", spec.names.experts.router));
        self
    }

    fn seed_of(&self, name: &str) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.seed, name).hash(&mut hasher);
        hasher.finish()
    }
}

impl WeightSource for RandomWeights {
    fn names(&self) -> Vec<&str> {
        self.shapes.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let shape = self.shapes.get(name)?.clone();
        Some(TensorInfo { dtype: StoredType::Float(self.dtype), shape })
    }

    fn identity(&self) -> Option<String> {
        // The second number tells hashers apart: the standard library's may change.
        let tied = if self.zero.is_some() { ", tied" } else { "" };
        Some(format!("random, version 1, seed {:x}, {:016x}{tied}", self.seed, self.seed_of("")))
    }

    fn read(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        let len = self.shapes.get(name)?.iter().product();
        if self.zero.as_ref().is_some_and(|zero| name.ends_with(zero.as_str())) {
            return Some(Cow::Owned(vec![0; len * self.dtype.size_bytes()]));
        }
        let mean = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let seed = self.seed_of(name);
        Some(Cow::Owned(match self.dtype {
            DType::F32 => values::<4>(len, mean, seed, self.dtype),
            DType::F16 | DType::BF16 => values::<2>(len, mean, seed, self.dtype),
        }))
    }
}

/// `len` values of `dtype`, which takes `SIZE` bytes.
fn values<const SIZE: usize>(len: usize, mean: f32, seed: u64, dtype: DType) -> Vec<u8> {
    let mut random = Xorshift::new(seed);
    let table: Vec<f32> = (0..TABLE)
        .map(|_| {
            // The sum of twelve uniform numbers has a deviation of 1.
            let sum: f32 = (0..12).map(|_| (random.next() >> 40) as f32 / (1u64 << 24) as f32 - 0.5).sum();
            mean + DEVIATION * sum
        })
        .collect();
    let table = to_bytes(&table, dtype);
    let table: &[[u8; SIZE]; TABLE] =
        table.as_chunks().0.try_into().expect("it was made with this length, of elements of this size");
    let mut bytes = vec![0; len * SIZE];
    // Each run of values has a seed of its own, so that it does not matter which thread makes it.
    let runs: Vec<_> = bytes.as_chunks_mut::<SIZE>().0.chunks_mut(RUN).map(|run| (run, random.next())).collect();
    let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(runs.len());
    let runs = Mutex::new(runs.into_iter());
    let next = || runs.lock().unwrap_or_else(PoisonError::into_inner).next();
    let fill = || {
        while let Some((run, seed)) = next() {
            let mut random = Xorshift::new(seed);
            // Four values per random number: so making them costs little beside packing them.
            let mut draw = || -> [[u8; SIZE]; 4] {
                let bits = random.next();
                std::array::from_fn(|i| table[(bits >> (16 * i)) as usize % TABLE])
            };
            let (fours, rest) = run.as_chunks_mut::<4>();
            fours.iter_mut().for_each(|four| *four = draw());
            rest.copy_from_slice(&draw()[..rest.len()]);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(fill);
        }
        fill();
    });
    bytes
}

/// <https://www.jstatsoft.org/article/view/v008i14>, with the shifts 13, 7, 17.
struct Xorshift(u64);

impl Xorshift {
    fn new(seed: u64) -> Self {
        Self(seed | 1) // it would stay at 0
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[cfg(test)]
mod tests {
    use dashinfer_kernels::to_f32;

    use super::*;
    use crate::shapes;

    fn moments(bytes: &[u8]) -> (f32, f32) {
        moments_of(&to_f32(bytes, DType::BF16))
    }

    fn moments_of(values: &[f32]) -> (f32, f32) {
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / values.len() as f32;
        (mean, variance.sqrt())
    }

    #[test]
    fn weights_are_normal_ish_and_norms_are_near_one() {
        let weights = RandomWeights::new(&shapes::named("qwen2.5-0.5b").unwrap(), 7);
        let (mean, deviation) = moments(&weights.read("model.layers.3.mlp.up_proj.weight").unwrap());
        assert!(mean.abs() < 1e-3 && (0.018..0.022).contains(&deviation), "{mean} {deviation}");
        let (mean, deviation) = moments(&weights.read("model.norm.weight").unwrap());
        assert!((0.99..1.01).contains(&mean) && deviation < 0.03, "{mean} {deviation}");
    }

    #[test]
    fn the_type_changes_no_more_than_rounding() {
        let weights = RandomWeights::new(&shapes::named("qwen2.5-0.5b").unwrap(), 7);
        let name = "model.layers.3.self_attn.v_proj.weight";
        let read = |dtype| to_f32(&weights.clone().dtype(dtype).read(name).unwrap(), dtype);
        let exact = read(DType::F32);
        let (mean, deviation) = moments_of(&exact);
        assert!(mean.abs() < 1e-3 && (0.018..0.022).contains(&deviation), "{mean} {deviation}");
        for (dtype, bound) in [(DType::F16, 1e-4), (DType::BF16, 1e-3)] {
            let info = weights.clone().dtype(dtype).info(name).unwrap();
            assert_eq!(info.dtype, StoredType::Float(dtype));
            let rounded = read(dtype);
            assert_eq!(rounded.len(), exact.len());
            assert!(exact.iter().zip(&rounded).all(|(a, b)| (a - b).abs() < bound), "{dtype}");
        }
    }

    #[test]
    fn the_seed_and_the_name_decide() {
        let spec = shapes::named("qwen2.5-0.5b").unwrap();
        let read = |seed, name| RandomWeights::new(&spec, seed).read(name).unwrap().into_owned();
        let (one, two) = ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.weight");
        assert!(read(1, one) == read(1, one));
        assert!(read(1, one) != read(2, one));
        assert!(read(1, one) != read(1, two));
        assert_eq!(RandomWeights::new(&spec, 1).read("lm_head.weight"), None, "tied");
    }

    #[test]
    fn tied_experts_have_routers_of_zeros_and_else_the_same_weights() {
        let spec = shapes::named("deepseek-v2-lite").unwrap();
        let (some, tied) = (RandomWeights::new(&spec, 1), RandomWeights::new(&spec, 1).tied_experts(&spec));
        let router = "model.layers.1.mlp.gate.weight";
        assert!(tied.read(router).unwrap().iter().all(|&byte| byte == 0) && some.read(router) != tied.read(router));
        assert!(some.read("model.norm.weight") == tied.read("model.norm.weight"));
        assert!(some.identity() != tied.identity());
    }
}
