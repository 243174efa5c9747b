//! How much memory a model takes, and how much of it the KV cache gets.

use dashinfer_models::MemoryEstimate;

use crate::Error;

/// What a load takes of memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Estimate {
    /// Packed weights.
    pub weight_bytes: u64,
    /// Activations of the largest step; touched as steps grow.
    pub activation_bytes: u64,
    /// Keys and values of one token.
    pub kv_bytes_per_token: u64,
    /// Tokens that the KV cache would hold.
    pub kv_cache_tokens: usize,
    /// The KV cache; touched as it fills.
    pub kv_cache_bytes: u64,
    /// The most tokens of a prompt and its continuation together.
    pub context: usize,
}

impl Estimate {
    /// All of it.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.weight_bytes + self.activation_bytes + self.kv_cache_bytes
    }
}

/// What decides the size of the KV cache.
#[derive(Debug, Clone, Copy)]
pub(super) struct CachePlan {
    pub(super) block_size: usize,
    /// The most tokens of a sequence that the model was made for.
    pub(super) context: usize,
    /// The most that the caller wants.
    pub(super) max_context: Option<usize>,
    /// The most sequences computed at once.
    pub(super) max_batch: usize,
    /// What the caller gives the cache.
    pub(super) kv_cache_bytes: Option<u64>,
    /// What the caller gives all together.
    pub(super) memory_limit: Option<u64>,
    /// What the device has to give now, if that is known.
    pub(super) spare: Option<Spare>,
}

/// What a device has to give, and how much of it a cache takes that nobody gave a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spare {
    /// Bytes that are free.
    pub(super) available: u64,
    /// The part of what is left beside the model that the cache takes.
    pub(super) part: (u64, u64),
    /// At most so much.
    pub(super) most: u64,
}

impl Spare {
    /// Bytes for a cache beside a model of `fixed` bytes.
    fn cache_bytes(&self, fixed: u64) -> u64 {
        let (numerator, denominator) = self.part;
        (self.available.saturating_sub(fixed) / denominator).saturating_mul(numerator).min(self.most)
    }
}

/// The size of the cache, and what follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CacheSize {
    pub(super) num_blocks: usize,
    /// The most tokens of a sequence.
    pub(super) context: usize,
}

/// The most that the cache takes in the machine's memory when nobody says.
pub(super) const DEFAULT_CACHE_BYTES: u64 = 4 << 30;

/// The context that is kept when nobody says and memory is short, if the model has as much.
const LEAST_CONTEXT: usize = 512;

impl CachePlan {
    /// The size of the cache. A context that the caller asked for is kept, and so is the model's under a limit that the caller
    /// set; when nobody said anything, the context is what the default cache can hold.
    ///
    /// # Errors
    /// [`Error::MemoryLimit`] or [`Error::KvCacheTooSmall`] if one sequence of the whole context does not fit.
    pub(super) fn size(&self, model: &MemoryEstimate) -> Result<CacheSize, Error> {
        let block_bytes = (model.kv_bytes_per_token * self.block_size as u64).max(1);
        let blocks_of = |tokens: usize| tokens.div_ceil(self.block_size);
        let mut context = self.max_context.map_or(self.context, |max| max.min(self.context));
        let bytes_of_one = blocks_of(context) as u64 * block_bytes;
        let fixed = model.weight_bytes + model.activation_bytes;

        if let Some(limit) = self.memory_limit
            && limit < fixed + bytes_of_one
        {
            return Err(Error::MemoryLimit { limit, needed: fixed + bytes_of_one, fixed, context });
        }
        if let Some(found) = self.kv_cache_bytes
            && found < bytes_of_one
        {
            return Err(Error::KvCacheTooSmall { found, needed: bytes_of_one, context });
        }
        let within_limit = self.memory_limit.map(|limit| limit - fixed);
        let cache_bytes = match (within_limit, self.kv_cache_bytes) {
            (Some(left), Some(cache)) => left.min(cache),
            (Some(bytes), None) | (None, Some(bytes)) => bytes,
            (None, None) => {
                let bytes = self.spare.map_or(DEFAULT_CACHE_BYTES, |spare| spare.cache_bytes(fixed));
                if self.max_context.is_none() && bytes < bytes_of_one {
                    let tokens = (bytes / block_bytes) as usize * self.block_size;
                    context = context.min(tokens.max(LEAST_CONTEXT));
                }
                bytes
            }
        };
        let (least, most) = (blocks_of(context), blocks_of(context).saturating_mul(self.max_batch));
        // Slots are counted in 32 bits.
        let countable = u32::MAX as usize / self.block_size;
        let blocks = usize::try_from(cache_bytes / block_bytes).unwrap_or(usize::MAX);
        let num_blocks = blocks.clamp(least.max(1), most.max(1)).min(countable);
        Ok(CacheSize { num_blocks, context: context.min(num_blocks.saturating_mul(self.block_size)) })
    }
}

/// Memory that the system could give now, the process's own limit (cgroup) included; `None` where that is not known.
pub(super) fn available_bytes() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let meminfo = read("/proc/meminfo")?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let system = number(line.trim().strip_suffix("kB")?)? * 1024;
    let limit = read("/sys/fs/cgroup/memory.max").and_then(|text| number(&text));
    let used = read("/sys/fs/cgroup/memory.current").and_then(|text| number(&text)).unwrap_or(0);
    Some(system.min(limit.map_or(u64::MAX, |limit| limit.saturating_sub(used))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dashinfer_kernels::cpu::packed_bytes;
    use dashinfer_models::{ModelSpec, Quantization, RandomWeights, StepLimits, shapes};

    fn model() -> (ModelSpec, MemoryEstimate) {
        let spec = shapes::named("qwen2.5-0.5b").unwrap();
        let limits = StepLimits { max_tokens: 512, max_logit_rows: 8 };
        let source = RandomWeights::new(&spec, 0);
        let dtype = dashinfer_kernels::DType::F32;
        let estimate =
            MemoryEstimate::new(&spec, &source, dtype, dtype.into(), limits, Quantization::NONE, &packed_bytes)
                .unwrap();
        (spec, estimate)
    }

    fn plan() -> CachePlan {
        CachePlan {
            block_size: 32,
            context: 1000,
            max_context: None,
            max_batch: 4,
            kv_cache_bytes: None,
            memory_limit: None,
            spare: None,
        }
    }

    #[test]
    fn a_limit_is_kept_to_the_block() {
        let (_, model) = model();
        let fixed = model.weight_bytes + model.activation_bytes;
        let block = 32 * model.kv_bytes_per_token;
        let blocks = |extra: u64| {
            CachePlan { memory_limit: Some(fixed + extra), ..plan() }.size(&model).map(|size| size.num_blocks)
        };
        assert_eq!(blocks(32 * block).unwrap(), 32);
        assert_eq!(blocks(33 * block - 1).unwrap(), 32);
        // More than all sequences can use is not taken.
        assert_eq!(blocks(1000 * block).unwrap(), 4 * 32);
    }

    #[test]
    fn a_limit_below_one_sequence_says_what_is_needed() {
        let (_, model) = model();
        let error = CachePlan { memory_limit: Some(1 << 20), ..plan() }.size(&model).unwrap_err().to_string();
        let fixed = model.weight_bytes + model.activation_bytes;
        let needed = fixed + 32 * 32 * model.kv_bytes_per_token;
        assert_eq!(
            error,
            format!(
                "a memory limit of 1048576 bytes is too small: {needed} are needed, {fixed} for weights and activations and \
                 the rest for one sequence of 1000 tokens (a smaller context needs less)"
            )
        );
    }

    #[test]
    fn a_cache_below_one_sequence_says_what_is_needed() {
        let (_, model) = model();
        let error = CachePlan { kv_cache_bytes: Some(1000), ..plan() }.size(&model).unwrap_err().to_string();
        let needed = 32 * 32 * model.kv_bytes_per_token;
        assert_eq!(
            error,
            format!(
                "a KV cache of 1000 bytes is too small: one sequence of 1000 tokens takes {needed} (a smaller context needs less)"
            )
        );
    }

    #[test]
    fn without_a_limit_half_of_what_is_left_is_taken() {
        let (_, model) = model();
        let fixed = model.weight_bytes + model.activation_bytes;
        let block = 32 * model.kv_bytes_per_token;
        let size = |blocks: u64, max_context| {
            let spare = Spare { available: fixed + 2 * blocks * block, part: (1, 2), most: DEFAULT_CACHE_BYTES };
            let plan = CachePlan { spare: Some(spare), max_context, ..plan() };
            plan.size(&model).unwrap()
        };
        assert_eq!(size(40, None), CacheSize { num_blocks: 40, context: 1000 });
        // Short of memory, the context gives way, down to a least one; a context that was asked for does not.
        assert_eq!(size(20, None), CacheSize { num_blocks: 20, context: 640 });
        assert_eq!(size(0, None), CacheSize { num_blocks: 16, context: 512 });
        assert_eq!(size(0, Some(900)), CacheSize { num_blocks: 29, context: 900 });
        assert_eq!(size(40, Some(2000)), CacheSize { num_blocks: 40, context: 1000 });
    }
}
