//! What a model's steps must do at least, whoever computes them: operations of a prefill, bytes and operations of a decode.
//!
//! Counted are matrix products and attention, two operations for each multiply-add. Norms, activations and sampling are
//! not; neither is the last layer's work behind attention for rows that get no logits, which nobody needs.

use dashinfer_models::{Attention, GroupedAttention, LatentAttention, ModelSpec};

/// The work of one model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    layers: f64,
    /// Weights of the q, k and v projections of a layer.
    qkv: f64,
    /// Weights that a row needs of the rest of all layers.
    behind_attention: f64,
    /// And of the last layer.
    behind_last_attention: f64,
    head: f64,
    /// Operations for each pair of a row and a position that it sees, in one layer.
    attention_pair: f64,
    /// Bytes of weights that every step reads: all but experts, and an embedding which is not the head too.
    weight_bytes: f64,
    experts: ExpertWork,
    kv_bytes_per_token: f64,
    /// The narrowest window of attention, if every layer has one.
    window: Option<usize>,
}

/// Bytes of an element on average.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ElementBytes {
    /// Of the embedding and the head.
    pub vocabulary: f64,
    /// Of the matrices of the layers.
    pub layers: f64,
}

/// What of experts a step reads.
#[derive(Debug, Clone, Copy, PartialEq)]
struct ExpertWork {
    /// Experts of all layers.
    count: f64,
    /// The part of a layer's that a row needs.
    part: f64,
    /// Bytes of one.
    bytes: f64,
}

impl ExpertWork {
    /// Bytes that a step of `rows` rows reads, if each row has as much use for one expert as for another.
    fn read_by(&self, rows: usize) -> f64 {
        self.count * self.bytes * (1.0 - (1.0 - self.part).powf(rows as f64))
    }
}

/// Weights that a row needs behind the output projection of each layer's attention.
fn behind_attention(spec: &ModelSpec) -> impl DoubleEndedIterator<Item = f64> {
    let hidden = spec.hidden_size as f64;
    let gated = move |size: usize| 3.0 * hidden * size as f64;
    let dense = gated(spec.mlp.size);
    let mixed = spec.experts.as_ref().map_or(0.0, |experts| {
        let routed = experts.routing.top_k as f64 * gated(experts.size) + experts.routing.num_experts as f64 * hidden;
        routed + experts.shared.map_or(0.0, |shared| gated(shared.size) + if shared.gated { hidden } else { 0.0 })
    });
    spec.layers.iter().map(move |layer| if layer.experts { mixed } else { dense })
}

impl ExpertWork {
    fn new(spec: &ModelSpec, element_bytes: f64) -> Self {
        let Some(experts) = &spec.experts else { return Self { count: 0.0, part: 0.0, bytes: 0.0 } };
        let layers = spec.layers.iter().filter(|layer| layer.experts).count();
        Self {
            count: (layers * experts.routing.num_experts) as f64,
            part: experts.routing.top_k as f64 / experts.routing.num_experts as f64,
            bytes: 3.0 * spec.hidden_size as f64 * experts.size as f64 * element_bytes,
        }
    }
}

impl Work {
    /// The work of `spec`, whose packed weights take `weight_bytes`, and whose cache takes `kv_bytes_per_token`.
    #[must_use]
    pub fn new(spec: &ModelSpec, weight_bytes: u64, element_bytes: ElementBytes, kv_bytes_per_token: u64) -> Self {
        let [hidden, out, vocab] =
            [spec.hidden_size, spec.attention.out_size(), spec.vocab_size].map(|size| size as f64);
        let (qkv, attention_pair) = attention_work(&spec.attention, hidden);
        let head = hidden * vocab;
        let only_gathered = if spec.tied_embeddings { 0.0 } else { head * element_bytes.vocabulary };
        let mut behind: Vec<f64> = behind_attention(spec).map(|weights| out * hidden + weights).collect();
        let behind_last_attention = behind.pop().unwrap_or(0.0);
        let experts = ExpertWork::new(spec, element_bytes.layers);
        Self {
            layers: spec.num_layers() as f64,
            qkv,
            behind_attention: behind.iter().sum::<f64>() + behind_last_attention,
            behind_last_attention,
            head,
            attention_pair,
            weight_bytes: weight_bytes as f64 - only_gathered - experts.count * experts.bytes,
            experts,
            kv_bytes_per_token: kv_bytes_per_token as f64,
            window: spec.layers.iter().map(|layer| layer.window).min().flatten(),
        }
    }

    /// Operations that read `batch` prompts of `length` tokens, with logits for the last row of each.
    #[must_use]
    pub fn prefill_flops(&self, batch: usize, length: usize) -> f64 {
        let (sequences, rows) = (batch as f64, (batch * length) as f64);
        let every_row = self.layers * self.qkv + self.behind_attention - self.behind_last_attention;
        let last_rows = self.behind_last_attention + self.head;
        // Row `p` sees `p + 1` positions; with a window, at most so many.
        let inside = length.min(self.window.unwrap_or(length)) as f64;
        let pairs = inside * (inside + 1.0) / 2.0 + (length as f64 - inside) * inside;
        let attention = (self.layers - 1.0) * pairs + self.seen(length as f64);
        2.0 * (rows * every_row + sequences * last_rows) + sequences * attention * self.attention_pair
    }

    /// Operations of a step that decodes `batch` sequences of `context` tokens.
    #[must_use]
    pub fn decode_flops(&self, batch: usize, context: f64) -> f64 {
        let matrices = self.layers * self.qkv + self.behind_attention + self.head;
        batch as f64 * (2.0 * matrices + self.layers * self.seen(context) * self.attention_pair)
    }

    /// Bytes of weights and cache that a step reads which decodes `batch` sequences of `context` tokens.
    #[must_use]
    pub fn decode_bytes(&self, batch: usize, context: f64) -> f64 {
        self.step_bytes(batch) + self.cache_bytes(batch, context)
    }

    /// Bytes of weights that a step of `rows` rows reads. Of experts, those that are some row's, on average.
    #[must_use]
    pub fn step_bytes(&self, rows: usize) -> f64 {
        self.weight_bytes + self.experts.read_by(rows)
    }

    /// Bytes of weights that every step reads: all but experts.
    #[must_use]
    pub fn dense_bytes(&self) -> f64 {
        self.weight_bytes
    }

    /// Bytes of the cache that a step reads which decodes `batch` sequences of `context` tokens.
    #[must_use]
    pub fn cache_bytes(&self, batch: usize, context: f64) -> f64 {
        batch as f64 * self.seen(context) * self.kv_bytes_per_token
    }

    fn seen(&self, context: f64) -> f64 {
        self.window.map_or(context, |window| context.min(window as f64))
    }
}

/// Multiply-adds of a row before attention (and, of latent vectors, behind it, between heads and latent vectors), and operations for each
/// pair of a row and a position.
fn attention_work(attention: &Attention, hidden: f64) -> (f64, f64) {
    match attention {
        Attention::Grouped(GroupedAttention { num_heads, num_kv_heads, head_dim, .. }) => {
            let [q, kv] = [num_heads * head_dim, num_kv_heads * head_dim].map(|size| size as f64);
            (hidden * (q + 2.0 * kv), 4.0 * q)
        }
        Attention::Latent(LatentAttention { num_heads, q_rank, kv_rank, nope_dim, rope_dim, v_dim, .. }) => {
            let [heads, rank, nope, rope, v] =
                [*num_heads, *kv_rank, *nope_dim, *rope_dim, *v_dim].map(|size| size as f64);
            let q = heads * (nope + rope);
            let queries = q_rank.map_or(hidden * q, |q_rank| (hidden + q) * q_rank as f64);
            let between = heads * (nope + v) * rank;
            (queries + hidden * (rank + rope) + between, 2.0 * heads * (2.0 * rank + rope))
        }
        other => panic!("an attention whose work nobody has counted: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use dashinfer_kernels::CacheType;
    use dashinfer_models::shapes;

    use super::*;

    fn work(shape: &str) -> Work {
        let spec = shapes::named(shape).unwrap();
        let kv_bytes = spec.kv_cache(1, 1, CacheType::BF16).block_bytes();
        Work::new(&spec, 2 * spec.num_parameters(), ElementBytes { vocabulary: 2.0, layers: 2.0 }, kv_bytes as u64)
    }

    #[test]
    fn a_decode_reads_every_weight_and_its_context() {
        let work = work("qwen2.5-0.5b");
        assert_eq!(work.decode_bytes(1, 0.0), 2.0 * 494_032_768.0);
        assert_eq!(work.decode_bytes(8, 100.0) - work.decode_bytes(8, 0.0), 800.0 * 24.0 * 2.0 * 128.0 * 2.0);
    }

    #[test]
    fn an_embedding_that_is_not_the_head_is_not_read() {
        let spec = shapes::named("qwen2.5-7b").unwrap();
        let embedding = (spec.vocab_size * spec.hidden_size) as f64;
        assert_eq!(work("qwen2.5-7b").decode_bytes(1, 0.0), 2.0 * (spec.num_parameters() as f64 - embedding));
    }

    #[test]
    fn a_decode_is_two_operations_for_each_matrix_element() {
        let spec = shapes::named("qwen2.5-0.5b").unwrap();
        let vectors = 24 * (2 * 896 + 896 + 2 * 128) + 896;
        let matrices = (spec.num_parameters() - vectors) as f64;
        let work = work("qwen2.5-0.5b");
        assert_eq!(work.decode_flops(1, 0.0), 2.0 * matrices);
        assert_eq!(work.decode_flops(3, 10.0), 3.0 * (2.0 * matrices + 24.0 * 10.0 * 4.0 * 896.0));
    }

    #[test]
    fn a_token_reads_its_experts_and_many_tokens_read_all() {
        let spec = shapes::named("qwen3-30b-a3b").unwrap();
        let work = work("qwen3-30b-a3b");
        let all = 2.0 * (spec.num_parameters() as f64 - 151_936.0 * 2048.0);
        let expert = 2.0 * 3.0 * 2048.0 * 768.0;
        // 8 of 128 experts in each of 48 layers: 3 of 30 billion parameters.
        assert_eq!(work.decode_bytes(1, 0.0), all - 48.0 * 120.0 * expert);
        assert_eq!(work.decode_flops(1, 0.0).round(), 2.0 * 3_041_656_832.0);
        let pair = 48.0 * (128.0 - 120.0 * 120.0 / 128.0) * expert;
        assert!((work.decode_bytes(2, 0.0) - (all - 48.0 * 128.0 * expert + pair)).abs() < 1.0);
        assert!((work.step_bytes(10_000) - all).abs() < 1.0);
    }

    #[test]
    fn a_prompt_of_one_token_is_a_decode() {
        for shape in ["qwen2.5-1.5b", "qwen1.5-moe-a2.7b"] {
            let work = work(shape);
            assert_eq!(work.prefill_flops(5, 1), work.decode_flops(5, 1.0));
        }
    }

    #[test]
    fn a_prompt_is_the_sum_of_its_rows_without_the_last_layer_and_the_head_of_all_but_one() {
        for window in [None, Some(3)] {
            let work = Work { window, ..work("qwen2.5-0.5b") };
            let decodes: f64 = (1..=7).map(|context| work.decode_flops(1, f64::from(context))).sum();
            let seen: f64 = (1..7).map(|context| work.seen(f64::from(context))).sum();
            let unneeded = 6.0 * 2.0 * (work.behind_last_attention + work.head) + seen * work.attention_pair;
            assert_eq!(work.prefill_flops(2, 7), 2.0 * (decodes - unneeded));
        }
    }
}
