//! A second opinion: every operator as a plain loop over `f32`, written from the contract alone.
//!
//! It is slow and shares no code with a real backend, so that the goldens judge the decoder by itself.

use std::collections::VecDeque;

use dashinfer_kernels::{
    Activation, AttentionParams, Backend, DType, Feature, GroupScore, Issue, KernelError, KvCacheSpec, LatentHeads,
    LatentParams, MatrixView, PagedBatch, QkNorm, Rope, RopePairs, Routing, SampleRow, Sampled, Scheme, Scoring,
    StepRows, StoredMatrix, TensorUse, to_f32,
};

#[derive(Debug, Default)]
pub(crate) struct Reference {
    batch: PagedBatch,
    ids: Vec<u32>,
    logit_rows: Vec<u32>,
    ropes: Vec<Rope>,
    sampled: VecDeque<Vec<Sampled>>,
}

#[derive(Debug, Clone)]
pub(crate) struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
    bias: Option<Vec<f32>>,
}

/// A tensor that remembers how many rows it was made for: a step that needs more is the decoder's mistake.
#[derive(Debug)]
pub(crate) struct Tensor {
    max_rows: usize,
    cols: usize,
    data: Vec<f32>,
}

/// Key and value of all heads.
type Slot = (Vec<f32>, Vec<f32>);

/// `[layer][slot]`; `None` until written.
#[derive(Debug)]
pub(crate) struct Cache {
    block_size: usize,
    layers: Vec<Vec<Option<Slot>>>,
}

fn check(op: &'static str, what: &'static str, wanted: usize, found: usize) -> Result<(), KernelError> {
    if wanted == found { Ok(()) } else { Err(KernelError::Shape { op, what, wanted, found }) }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn normed(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let scale = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

impl Tensor {
    fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.cols..][..self.cols]
    }

    fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.data.chunks_exact(self.cols)
    }

    fn set<R: AsRef<[f32]>>(&mut self, op: &'static str, rows: impl Iterator<Item = R>) -> Result<(), KernelError> {
        self.data.clear();
        for row in rows {
            check(op, "columns of out", row.as_ref().len(), self.cols)?;
            self.data.extend_from_slice(row.as_ref());
        }
        if self.data.len() > self.max_rows * self.cols {
            return Err(KernelError::Shape {
                op,
                what: "rows of out, at most",
                wanted: self.max_rows,
                found: self.data.len() / self.cols,
            });
        }
        Ok(())
    }
}

fn rotate(head: &mut [f32], rope: &Rope, position: u32) {
    let half = rope.inv_freq.len();
    for (pair, freq) in rope.inv_freq.iter().enumerate() {
        let (sin, cos) = (position as f32 * freq).sin_cos();
        let (i, j) = match rope.pairs {
            RopePairs::Halves => (pair, pair + half),
            RopePairs::Interleaved => (2 * pair, 2 * pair + 1),
        };
        let (a, b) = (head[i], head[j]);
        head[i] = (a * cos - b * sin) * rope.scale;
        head[j] = (b * cos + a * sin) * rope.scale;
    }
}

/// `1 / (1 + exp(-x))`
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn gated(activation: Activation, gate: f32, up: f32) -> f32 {
    match activation {
        Activation::Silu => gate * sigmoid(gate) * up,
        Activation::GeluTanh => 0.5 * gate * (1.0 + (0.797_884_6 * (gate + 0.044_715 * gate.powi(3))).tanh()) * up,
        Activation::ClampedSwiglu { alpha, limit } => {
            let gate = gate.min(limit);
            gate * sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1.0)
        }
        other => panic!("an activation without a reference: {other:?}"),
    }
}

/// The experts of a row and their weights, by sorting all of them.
fn routed(logits: &[f32], correction: Option<&Vec<f32>>, routing: &Routing) -> Vec<(usize, f32)> {
    let total: f32 = logits.iter().map(|x| x.exp()).sum();
    let score = |x: f32| match routing.scoring {
        Scoring::Softmax => x.exp() / total,
        Scoring::Sigmoid => sigmoid(x),
    };
    let scores: Vec<f32> = logits.iter().map(|x| score(*x)).collect();
    let keys: Vec<f32> =
        scores.iter().enumerate().map(|(i, s)| s + correction.map_or(0.0, |correction| correction[i])).collect();
    let mut open: Vec<usize> = (0..keys.len()).collect();
    if let Some(groups) = routing.groups {
        let size = keys.len() / groups.num_groups;
        let of_group = |group: usize| -> f32 {
            let mut keys = keys[group * size..][..size].to_vec();
            keys.sort_by(f32::total_cmp);
            match groups.score {
                GroupScore::Max => keys[size - 1],
                GroupScore::TopTwo => keys[size - 1] + keys[size - 2],
            }
        };
        let mut best: Vec<usize> = (0..groups.num_groups).collect();
        best.sort_by(|a, b| of_group(*b).total_cmp(&of_group(*a)));
        open.retain(|expert| best[..groups.top_groups].contains(&(expert / size)));
    }
    open.sort_by(|a, b| keys[*b].total_cmp(&keys[*a]));
    open.truncate(routing.top_k);
    let total: f32 = if routing.normalize { open.iter().map(|expert| scores[*expert]).sum() } else { 1.0 };
    open.iter().map(|expert| (*expert, scores[*expert] / total * routing.scale)).collect()
}

impl Matrix {
    fn times(&self, x: &[f32]) -> Vec<f32> {
        let bias = |n: usize| self.bias.as_ref().map_or(0.0, |bias| bias[n]);
        (0..self.rows).map(|n| dot(x, &self.data[n * self.cols..][..self.cols]) + bias(n)).collect()
    }
}

impl Backend for Reference {
    type Tensor = Tensor;
    type Vector = Vec<f32>;
    type Linear = Matrix;
    type KvCache = Cache;
    /// Gate and up, and down, of each.
    type Experts = Vec<(Matrix, Matrix)>;
    type ExpertScratch = ();

    fn name(&self) -> &'static str {
        "reference"
    }

    fn tensor(&self, max_rows: usize, cols: usize, _: TensorUse) -> Result<Tensor, KernelError> {
        Ok(Tensor { max_rows, cols, data: Vec::new() })
    }

    fn vector(&self, values: &[f32]) -> Result<Vec<f32>, KernelError> {
        Ok(values.to_vec())
    }

    fn pack(&self, parts: &[MatrixView<'_>], bias: Option<&[f32]>, _: Option<Scheme>) -> Result<Matrix, KernelError> {
        let (cols, dtype) = (parts[0].cols, parts[0].dtype);
        let mut matrix = Matrix { rows: 0, cols, data: Vec::new(), bias: bias.map(<[f32]>::to_vec) };
        for part in parts {
            check("pack", "columns", cols, part.cols)?;
            check("pack", "bytes of an element", dtype.size_bytes(), part.dtype.size_bytes())?;
            check("pack", "bytes", part.rows * cols * dtype.size_bytes(), part.bytes.len())?;
            matrix.rows += part.rows;
            matrix.data.extend(to_f32(part.bytes, part.dtype));
        }
        check("pack", "bias", matrix.rows, bias.map_or(matrix.rows, <[f32]>::len))?;
        Ok(matrix)
    }

    fn pack_stored(
        &self,
        parts: &[&dyn StoredMatrix],
        bias: Option<&[f32]>,
        _: Option<Scheme>,
    ) -> Result<Matrix, KernelError> {
        let cols = parts[0].cols();
        let mut matrix = Matrix { rows: 0, cols, data: Vec::new(), bias: bias.map(<[f32]>::to_vec) };
        for part in parts {
            check("pack", "columns", cols, part.cols())?;
            let mut data = vec![f32::NAN; part.rows() * cols];
            part.values(0..part.rows(), 0..cols, &mut data);
            matrix.rows += part.rows();
            matrix.data.extend(data);
        }
        check("pack", "bias", matrix.rows, bias.map_or(matrix.rows, <[f32]>::len))?;
        Ok(matrix)
    }

    fn packed_bytes(&self, rows: usize, cols: usize, _: DType, _: Option<Scheme>) -> usize {
        rows * cols * size_of::<f32>()
    }

    fn kv_cache(&self, spec: &KvCacheSpec) -> Result<Cache, KernelError> {
        let slots = vec![None; spec.num_blocks * spec.block_size];
        Ok(Cache { block_size: spec.block_size, layers: vec![slots; spec.num_layers] })
    }

    fn begin_step(&mut self, step: &StepRows<'_>, ropes: &[Rope], _: &mut Cache) -> Result<Issue, KernelError> {
        assert!(step.carried.is_empty(), "a backend of depth 0 knows every token");
        self.batch = step.paged.clone();
        self.ids = step.ids.to_vec();
        self.logit_rows = step.logit_rows.to_vec();
        self.ropes = ropes.to_vec();
        Ok(Issue::Operators)
    }

    fn supports(&self, _: Feature) -> bool {
        true
    }

    fn embed(&mut self, out: &mut Tensor, table: &Matrix, scale: f32) -> Result<(), KernelError> {
        let row = |id: &u32| table.data[*id as usize * table.cols..][..table.cols].iter().map(|x| x * scale).collect();
        out.set("embed", self.ids.iter().map(|id| -> Vec<f32> { row(id) }))
    }

    fn rms_norm(&mut self, out: &mut Tensor, x: &Tensor, weight: &Vec<f32>, eps: f32) -> Result<(), KernelError> {
        check("rms_norm", "weight", x.cols, weight.len())?;
        out.set("rms_norm", x.rows().map(|row| normed(row, weight, eps)))
    }

    fn add_rms_norm(
        &mut self,
        out: &mut Tensor,
        residual: &mut Tensor,
        x: &Tensor,
        weight: &Vec<f32>,
        eps: f32,
    ) -> Result<(), KernelError> {
        check("add_rms_norm", "values of x", residual.data.len(), x.data.len())?;
        residual.data.iter_mut().zip(&x.data).for_each(|(r, x)| *r += x);
        self.rms_norm(out, residual, weight, eps)
    }

    fn linear(&mut self, out: &mut Tensor, x: &Tensor, weight: &Matrix) -> Result<(), KernelError> {
        check("linear", "columns of x", weight.cols, x.cols)?;
        check("linear", "columns of out", weight.rows, out.cols)?;
        out.set("linear", x.rows().map(|x| weight.times(x)))
    }

    fn rope_and_cache(
        &mut self,
        qkv: &mut Tensor,
        cache: &mut Cache,
        layer: usize,
        params: &AttentionParams,
        rope: usize,
        qk_norm: Option<QkNorm<'_, Vec<f32>>>,
    ) -> Result<(), KernelError> {
        let AttentionParams { num_heads, num_kv_heads, head_dim, .. } = *params;
        check("rope_and_cache", "columns", (num_heads + 2 * num_kv_heads) * head_dim, qkv.cols)?;
        check("rope_and_cache", "rows", self.batch.positions.len() * qkv.cols, qkv.data.len())?;
        for (row, values) in qkv.data.chunks_exact_mut(qkv.cols).enumerate() {
            for (index, head) in values.chunks_exact_mut(head_dim).take(num_heads + num_kv_heads).enumerate() {
                if let Some(norm) = &qk_norm {
                    let weight = if index < num_heads { norm.q } else { norm.k };
                    head.copy_from_slice(&normed(head, weight, norm.eps));
                }
                rotate(head, &self.ropes[rope], self.batch.positions[row]);
            }
            let (key, value) = values[num_heads * head_dim..].split_at(num_kv_heads * head_dim);
            cache.layers[layer][self.batch.slots[row] as usize] = Some((key.to_vec(), value.to_vec()));
        }
        Ok(())
    }

    fn attention(
        &mut self,
        out: &mut Tensor,
        qkv: &Tensor,
        cache: &Cache,
        layer: usize,
        params: &AttentionParams,
        sinks: Option<&Vec<f32>>,
    ) -> Result<(), KernelError> {
        let AttentionParams { num_heads, num_kv_heads, head_dim, scale, window, soft_cap } = *params;
        let mut rows = Vec::new();
        for sequence in &self.batch.sequences {
            let blocks = &self.batch.block_table[sequence.first_block..][..sequence.num_blocks];
            let cached = |position: usize| {
                let slot =
                    blocks[position / cache.block_size] as usize * cache.block_size + position % cache.block_size;
                cache.layers[layer][slot].as_ref().expect("every position of the context was written")
            };
            for i in 0..sequence.num_rows {
                let position = sequence.context_len - sequence.num_rows + i;
                let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
                let mut row = vec![0.0; num_heads * head_dim];
                for (head, out) in row.chunks_exact_mut(head_dim).enumerate() {
                    let q = &qkv.row(sequence.first_row + i)[head * head_dim..][..head_dim];
                    let at = head / (num_heads / num_kv_heads) * head_dim..;
                    let scores = (first..=position).map(|p| scale * dot(q, &cached(p).0[at.clone()][..head_dim]));
                    let scores: Vec<f32> = scores.map(|s| soft_cap.map_or(s, |cap| cap * (s / cap).tanh())).collect();
                    let sink = sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[head]);
                    let max = scores.iter().copied().fold(sink, f32::max);
                    let total: f32 = scores.iter().map(|score| (score - max).exp()).sum::<f32>() + (sink - max).exp();
                    for (p, score) in (first..=position).zip(&scores) {
                        let share = (score - max).exp() / total;
                        out.iter_mut().zip(&cached(p).1[at.clone()]).for_each(|(out, v)| *out += share * v);
                    }
                }
                rows.push(row);
            }
        }
        out.set("attention", rows.iter())
    }

    fn latent_rope_and_cache(
        &mut self,
        q: &mut Tensor,
        kv: &mut Tensor,
        cache: &mut Cache,
        layer: usize,
        params: &LatentParams,
        rope: usize,
        (norm, eps): (&Vec<f32>, f32),
    ) -> Result<(), KernelError> {
        let q_dim = params.nope_dim + params.rope_dim;
        check("latent_rope_and_cache", "columns of q", params.num_heads * q_dim, q.cols)?;
        check("latent_rope_and_cache", "columns of kv", params.rank + params.rope_dim, kv.cols)?;
        check("latent_rope_and_cache", "rows", self.batch.positions.len() * kv.cols, kv.data.len())?;
        for (row, kv) in kv.data.chunks_exact(kv.cols).enumerate() {
            let (position, rope) = (self.batch.positions[row], &self.ropes[rope]);
            for head in q.data[row * q.cols..][..q.cols].chunks_exact_mut(q_dim) {
                rotate(&mut head[params.nope_dim..], rope, position);
            }
            let (latent, rotated) = kv.split_at(params.rank);
            let mut rotated = rotated.to_vec();
            rotate(&mut rotated, rope, position);
            cache.layers[layer][self.batch.slots[row] as usize] = Some((rotated, normed(latent, norm, eps)));
        }
        Ok(())
    }

    /// With the keys and values of each head made of the latent vectors, as the paper defines it.
    fn latent_attention(
        &mut self,
        out: &mut Tensor,
        q: &Tensor,
        cache: &Cache,
        layer: usize,
        params: &LatentParams,
        heads: &LatentHeads<Matrix>,
    ) -> Result<(), KernelError> {
        let LatentParams { num_heads, rank, nope_dim, v_dim, scale, .. } = *params;
        check("latent_attention", "rows to queries", num_heads * rank, heads.queries.rows)?;
        check("latent_attention", "columns to queries", nope_dim, heads.queries.cols)?;
        check("latent_attention", "rows to values", num_heads * v_dim, heads.values.rows)?;
        check("latent_attention", "columns to values", rank, heads.values.cols)?;
        let mut rows = Vec::new();
        for sequence in &self.batch.sequences {
            let blocks = &self.batch.block_table[sequence.first_block..][..sequence.num_blocks];
            let cached = |position: usize| {
                let slot =
                    blocks[position / cache.block_size] as usize * cache.block_size + position % cache.block_size;
                cache.layers[layer][slot].as_ref().expect("every position of the context was written")
            };
            // `[head][position]`: keys without their rotated part, and values.
            let made: Vec<Vec<Slot>> = (0..num_heads)
                .map(|head| {
                    let to_key = &heads.queries.data[head * rank * nope_dim..][..rank * nope_dim];
                    let to_value = &heads.values.data[head * v_dim * rank..][..v_dim * rank];
                    let make = |position: usize| {
                        let latent = &cached(position).1;
                        let mut key = vec![0.0; nope_dim];
                        for (row, c) in to_key.chunks_exact(nope_dim).zip(latent) {
                            key.iter_mut().zip(row).for_each(|(key, w)| *key += w * c);
                        }
                        (key, to_value.chunks_exact(rank).map(|row| dot(row, latent)).collect())
                    };
                    (0..sequence.context_len).map(make).collect()
                })
                .collect();
            for i in 0..sequence.num_rows {
                let position = sequence.context_len - sequence.num_rows + i;
                let mut row = vec![0.0; num_heads * v_dim];
                let q = q.row(sequence.first_row + i).chunks_exact(nope_dim + params.rope_dim);
                for ((q, made), out) in q.zip(&made).zip(row.chunks_exact_mut(v_dim)) {
                    let (plain, rotated) = q.split_at(nope_dim);
                    let score = |p: usize| scale * (dot(plain, &made[p].0) + dot(rotated, &cached(p).0));
                    let scores: Vec<f32> = (0..=position).map(score).collect();
                    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let total: f32 = scores.iter().map(|score| (score - max).exp()).sum();
                    for ((_, value), score) in made.iter().zip(&scores) {
                        let share = (score - max).exp() / total;
                        out.iter_mut().zip(value).for_each(|(out, v)| *out += share * v);
                    }
                }
                rows.push(row);
            }
        }
        out.set("latent_attention", rows.iter())
    }

    fn gate(&mut self, out: &mut Tensor, x: &Tensor, activation: Activation) -> Result<(), KernelError> {
        let rows = x.rows().map(|row| -> Vec<f32> {
            let (gate, up) = row.split_at(row.len() / 2);
            gate.iter().zip(up).map(|(g, u)| gated(activation, *g, *u)).collect()
        });
        out.set("gate", rows)
    }

    fn pack_experts(&self, gate_up: Vec<Matrix>, down: Vec<Matrix>) -> Result<Self::Experts, KernelError> {
        check("pack_experts", "down matrices", gate_up.len(), down.len())?;
        Ok(gate_up.into_iter().zip(down).collect())
    }

    fn expert_scratch(&self, _: usize, _: usize, _: usize, _: &Routing) -> Result<(), KernelError> {
        Ok(())
    }

    fn experts(
        &mut self,
        out: &mut Tensor,
        x: &Tensor,
        logits: &Tensor,
        correction: Option<&Vec<f32>>,
        experts: &Self::Experts,
        routing: &Routing,
        activation: Activation,
        (): &mut (),
    ) -> Result<(), KernelError> {
        check("experts", "experts", routing.num_experts, experts.len())?;
        check("experts", "columns of logits", routing.num_experts, logits.cols)?;
        check("experts", "rows of logits", x.rows().len(), logits.rows().len())?;
        let row = |(x, logits): (&[f32], &[f32])| -> Vec<f32> {
            let mut sum = vec![0.0; out.cols];
            for (expert, weight) in routed(logits, correction, routing) {
                let (gate_up, down) = &experts[expert];
                let gate_up = gate_up.times(x);
                let (gate, up) = gate_up.split_at(gate_up.len() / 2);
                let inner: Vec<f32> = gate.iter().zip(up).map(|(g, u)| gated(activation, *g, *u)).collect();
                sum.iter_mut().zip(down.times(&inner)).for_each(|(sum, made)| *sum += weight * made);
            }
            sum
        };
        let rows: Vec<_> = x.rows().zip(logits.rows()).map(row).collect();
        out.set("experts", rows.iter())
    }

    fn add_gated(&mut self, out: &mut Tensor, x: &Tensor, gate: Option<&Tensor>) -> Result<(), KernelError> {
        check("add_gated", "values of x", out.data.len(), x.data.len())?;
        let cols = out.cols;
        for (row, (out, x)) in out.data.chunks_exact_mut(cols).zip(x.rows()).enumerate() {
            let weight = gate.map_or(1.0, |gate| sigmoid(gate.row(row)[0]));
            out.iter_mut().zip(x).for_each(|(out, x)| *out += weight * x);
        }
        Ok(())
    }

    fn soft_cap(&mut self, logits: &mut Tensor, cap: f32) -> Result<(), KernelError> {
        logits.data.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
        Ok(())
    }

    fn gather_logit_rows(&mut self, out: &mut Tensor, x: &Tensor) -> Result<(), KernelError> {
        out.set("gather_logit_rows", self.logit_rows.iter().map(|row| x.row(*row as usize)))
    }

    fn sample(&mut self, logits: &mut Tensor, rows: &[SampleRow<'_>]) -> Result<(), KernelError> {
        let pick = |row: &SampleRow<'_>| {
            let row = logits.row(row.logits_row);
            let best = (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).expect("a vocabulary is not empty");
            Sampled { id: best as u32, ..Sampled::default() }
        };
        self.sampled.push_back(rows.iter().map(pick).collect());
        Ok(())
    }

    fn collect_sampled(&mut self) -> Result<Vec<Sampled>, KernelError> {
        self.sampled.pop_front().ok_or(KernelError::NothingToCollect)
    }

    fn read_row(&self, x: &Tensor, row: usize) -> Result<Vec<f32>, KernelError> {
        Ok(x.row(row).to_vec())
    }
}
