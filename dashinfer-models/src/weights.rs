//! The parameters of the decoder: what a checkpoint calls them, their shapes, and which of them are packed into one.
//!
//! [`Weights`] is generic over what stands for a matrix, for a vector, and for the experts of a layer. As a plan it holds names and shapes; filled by
//! the loader it holds packed weights. So no parameter can be forgotten: the types would not fit.

use dashinfer_kernels::{Backend, LatentHeads};

use crate::{Attention, ExpertMatrices, Experts, GroupedAttention, LatentAttention, ModelSpec, TensorNames};

/// The decoder's parameters, with `L` for a linear operator's weight, `V` for a vector, and `X` for the experts of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Weights<L, V, X> {
    /// `[V, E]`
    pub(crate) embed: L,
    pub(crate) layers: Vec<LayerWeights<L, V, X>>,
    /// `[E]`
    pub(crate) norm: V,
    /// `[V, E]`, or `None` where the embedding serves.
    pub(crate) head: Option<L>,
}

/// One layer's parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LayerWeights<L, V, X> {
    /// `[E]`
    pub(crate) attention_norm: V,
    pub(crate) attention: AttentionWeights<L, V>,
    /// `[E, H · D]`
    pub(crate) attention_out: L,
    /// `[E]`
    pub(crate) post_attention_norm: Option<V>,
    /// `[E]`
    pub(crate) mlp_norm: V,
    pub(crate) mlp: MlpWeights<L, V, X>,
    /// `[E]`
    pub(crate) post_mlp_norm: Option<V>,
}

/// What attention has before its output projection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AttentionWeights<L, V> {
    Grouped(GroupedWeights<L, V>),
    Latent(LatentWeights<L, V>),
}

/// Grouped-query attention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GroupedWeights<L, V> {
    /// `[(H + 2 K) · D, E]`
    pub(crate) qkv: L,
    /// `[D]` each
    pub(crate) qk_norm: Option<QkNormWeights<V>>,
    /// `[H]`
    pub(crate) sinks: Option<V>,
}

/// Latent attention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LatentWeights<L, V> {
    pub(crate) queries: LatentQueryWeights<L, V>,
    /// `[C + R, E]`
    pub(crate) kv: L,
    /// `[C]`
    pub(crate) kv_norm: V,
    pub(crate) heads: LatentHeads<L>,
}

/// The way from the hidden state to queries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LatentQueryWeights<L, V> {
    /// `[H · (N + R), E]`
    Direct(L),
    /// Through a vector of `Q` values: `[Q, E]`, `[Q]`, `[H · (N + R), Q]`.
    Compressed { down: L, norm: V, up: L },
}

/// What a layer has behind attention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MlpWeights<L, V, X> {
    Dense(GatedWeights<L>),
    Experts(ExpertWeights<L, V, X>),
}

/// A mixture of experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExpertWeights<L, V, X> {
    /// `[N, E]`
    pub(crate) router: L,
    /// `[N]`
    pub(crate) correction: Option<V>,
    pub(crate) experts: X,
    pub(crate) shared: Option<SharedWeights<L>>,
}

/// An expert of every token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SharedWeights<L> {
    pub(crate) mlp: GatedWeights<L>,
    /// `[1, E]`
    pub(crate) gate: Option<L>,
}

/// The experts of a layer, to be packed together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExpertsPlan(pub(crate) Vec<GatedWeights<LinearPlan>>);

/// A gated feed-forward layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GatedWeights<L> {
    /// `[2 F, E]`
    pub(crate) gate_up: L,
    /// `[E, F]`
    pub(crate) down: L,
}

/// The norms on q and k heads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct QkNormWeights<V> {
    pub(crate) q: V,
    pub(crate) k: V,
}

/// A matrix to be packed: tensors stacked along their rows, and whether each has a bias beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LinearPlan {
    pub(crate) parts: Vec<Part>,
    pub(crate) cols: usize,
    pub(crate) bias: bool,
    pub(crate) role: Role,
    /// Whether each row is divided by its length.
    pub(crate) unit_rows: bool,
}

/// What a matrix is for, which decides how it is quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// A linear operator of a layer.
    Layer,
    /// The embedding or the head: a row for each token of the vocabulary.
    Vocabulary,
    /// A matrix between heads and latent vectors, which is never quantized: its products are many and small.
    Latent,
    /// What decides which experts compute, and by how much: never quantized, as it is small and a near tie is not.
    Router,
}

/// One tensor of a [`LinearPlan`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// Of the weight and its bias, up to the last dot; of a stacked part, the whole name of the weight.
    pub(crate) module: String,
    pub(crate) rows: usize,
    /// Where it stands in its tensor, if that holds other parts too.
    pub(crate) stacked: Option<Stacked>,
}

/// One of `count` matrices that are stacked in a tensor `[count, cols, width]`, each transposed. The rows of the part are its columns
/// `first`, `first + step`, and so on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stacked {
    pub(crate) index: usize,
    pub(crate) count: usize,
    pub(crate) width: usize,
    pub(crate) first: usize,
    pub(crate) step: usize,
}

/// A vector to be uploaded.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct VectorPlan {
    pub(crate) name: String,
    pub(crate) len: usize,
    /// Added to what is stored.
    pub(crate) offset: f32,
}

/// Names and shapes of all parameters.
pub(crate) type Plan = Weights<LinearPlan, VectorPlan, ExpertsPlan>;

/// Parameters as a backend keeps them.
pub(crate) type Packed<B> = Weights<<B as Backend>::Linear, <B as Backend>::Vector, <B as Backend>::Experts>;

/// Names and shapes of a layer's parameters.
type LayerPlan = LayerWeights<LinearPlan, VectorPlan, ExpertsPlan>;

impl Part {
    /// All of the tensor `{module}.weight`, and of the bias beside it if there is one.
    pub(crate) fn whole(module: String, rows: usize) -> Self {
        Self { module, rows, stacked: None }
    }

    pub(crate) fn weight(&self) -> String {
        if self.stacked.is_some() { self.module.clone() } else { format!("{}.weight", self.module) }
    }

    pub(crate) fn bias(&self) -> String {
        if self.stacked.is_some() { format!("{}_bias", self.module) } else { format!("{}.bias", self.module) }
    }

    /// The shape of the tensor that holds it, a matrix of `cols` columns.
    pub(crate) fn weight_shape(&self, cols: usize) -> Vec<usize> {
        self.stacked.map_or_else(|| vec![self.rows, cols], |stacked| vec![stacked.count, cols, stacked.width])
    }

    /// The shape of the tensor that holds its bias.
    pub(crate) fn bias_shape(&self) -> Vec<usize> {
        self.stacked.map_or_else(|| vec![self.rows], |stacked| vec![stacked.count, stacked.width])
    }

    /// Whether it is the first of its tensor.
    pub(crate) fn is_first(&self) -> bool {
        self.stacked.is_none_or(|Stacked { index, first, .. }| index == 0 && first == 0)
    }

    /// Whether it is the last of its tensor.
    pub(crate) fn is_last(&self) -> bool {
        self.stacked.is_none_or(|Stacked { index, count, first, step, .. }| index + 1 == count && first + 1 == step)
    }
}

impl LinearPlan {
    pub(crate) fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.rows).sum()
    }

    /// The parts that are the first of their tensors.
    pub(crate) fn first_parts(&self) -> impl Iterator<Item = &Part> {
        self.parts.iter().filter(|part| part.is_first())
    }

    /// The parts that are the last of their tensors, which are done with them.
    pub(crate) fn last_parts(&self) -> impl Iterator<Item = &Part> {
        self.parts.iter().filter(|part| part.is_last())
    }
}

/// Makes the things that a plan asks for.
pub(crate) trait Fill<L, V, X> {
    type Error;
    fn linear(&mut self, plan: &LinearPlan) -> Result<L, Self::Error>;
    fn vector(&mut self, plan: &VectorPlan) -> Result<V, Self::Error>;
    /// The two matrices between heads and latent vectors, which are stored as [one tensor](StoredHeads).
    fn heads(&mut self, plan: &LatentHeads<LinearPlan>) -> Result<LatentHeads<L>, Self::Error>;
    /// Of what was made of each expert's matrices: all gates and ups, and all downs.
    fn experts(&mut self, gate_up: Vec<L>, down: Vec<L>) -> Result<X, Self::Error>;
}

/// The tensor that the matrices between heads and latent vectors are stored in: for each head the `[N, C]` that makes keys, then the
/// `[v_dim, C]` that makes values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StoredHeads<'a> {
    pub(crate) part: &'a Part,
    pub(crate) num_heads: usize,
    pub(crate) rank: usize,
    pub(crate) nope_dim: usize,
    pub(crate) v_dim: usize,
}

impl<'a> StoredHeads<'a> {
    pub(crate) fn new(plan: &'a LatentHeads<LinearPlan>) -> Self {
        let (rank, nope_dim) = (plan.values.cols, plan.queries.cols);
        let num_heads = plan.queries.rows() / rank;
        Self { part: &plan.values.parts[0], num_heads, rank, nope_dim, v_dim: plan.values.rows() / num_heads }
    }

    pub(crate) fn shape(&self) -> [usize; 2] {
        [self.num_heads * (self.nope_dim + self.v_dim), self.rank]
    }
}

impl Plan {
    /// The parameters of `spec`.
    pub(crate) fn new(spec: &ModelSpec) -> Self {
        let (hidden, names) = (spec.hidden_size, &spec.names);
        let vocab = |module: &str| LinearPlan {
            parts: vec![Part::whole(module.to_owned(), spec.vocab_size)],
            cols: hidden,
            bias: false,
            role: Role::Vocabulary,
            unit_rows: false,
        };
        let norm =
            |module: &str| VectorPlan { name: format!("{module}.weight"), len: hidden, offset: spec.norm_offset };
        Self {
            embed: vocab(names.embed),
            layers: (0..spec.num_layers()).map(|layer| LayerNames { spec, layer }.plan()).collect(),
            norm: norm(names.norm),
            head: (!spec.tied_embeddings).then(|| LinearPlan { unit_rows: spec.unit_head, ..vocab(names.head) }),
        }
    }

    /// The same structure with every plan replaced by what `fill` makes of it, in the order of the forward pass.
    pub(crate) fn fill<L, V, X, F: Fill<L, V, X>>(&self, fill: &mut F) -> Result<Weights<L, V, X>, F::Error> {
        let embed = fill.linear(&self.embed)?;
        let layers = self.layers.iter().map(|layer| layer.fill(fill));
        Ok(Weights {
            layers: layers.collect::<Result<_, _>>()?,
            norm: fill.vector(&self.norm)?,
            head: self.head.as_ref().map(|head| fill.linear(head)).transpose()?,
            embed,
        })
    }

    /// Every tensor that the plan asks for, with its shape, in the order of [`fill`](Self::fill).
    pub(crate) fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        struct List(Vec<(String, Vec<usize>)>);
        impl Fill<(), (), ()> for List {
            type Error = std::convert::Infallible;

            fn linear(&mut self, plan: &LinearPlan) -> Result<(), Self::Error> {
                self.0.extend(plan.first_parts().map(|part| (part.weight(), part.weight_shape(plan.cols))));
                if plan.bias {
                    self.0.extend(plan.first_parts().map(|part| (part.bias(), part.bias_shape())));
                }
                Ok(())
            }

            fn vector(&mut self, plan: &VectorPlan) -> Result<(), Self::Error> {
                self.0.push((plan.name.clone(), vec![plan.len]));
                Ok(())
            }

            fn heads(&mut self, plan: &LatentHeads<LinearPlan>) -> Result<LatentHeads<()>, Self::Error> {
                let stored = StoredHeads::new(plan);
                self.0.push((stored.part.weight(), stored.shape().to_vec()));
                Ok(LatentHeads { queries: (), values: () })
            }

            fn experts(&mut self, _: Vec<()>, _: Vec<()>) -> Result<(), Self::Error> {
                Ok(())
            }
        }
        let mut list = List(Vec::new());
        let Ok(_) = self.fill(&mut list);
        list.0
    }

    /// Whether a tensor that the plan does not ask for may be in a checkpoint all the same.
    pub(crate) fn ignores(&self, names: &TensorNames, name: &str) -> bool {
        // Old exports store the rotary frequencies, which follow from the config; tied ones may store the embedding twice.
        let tied_head = || name.strip_suffix(".weight") == Some(names.head);
        name.ends_with(".rotary_emb.inv_freq")
            || (self.head.is_none() && tied_head())
            || names.ignored.iter().any(|start| name.starts_with(start))
    }

    /// The tensor of the output matrix, if it has one of its own.
    pub(crate) fn head_weight(&self) -> Option<String> {
        self.head.as_ref().map(|head| head.parts[0].weight())
    }
}

/// The layer `layer` of a model, to name its parameters.
struct LayerNames<'a> {
    spec: &'a ModelSpec,
    layer: usize,
}

impl LayerNames<'_> {
    fn plan(&self) -> LayerPlan {
        let spec = self.spec;
        let (hidden, names) = (spec.hidden_size, &spec.names);
        let norm = |name| self.norm(name, hidden);
        LayerWeights {
            attention_norm: norm(names.attention_norm),
            attention: match &spec.attention {
                Attention::Grouped(attention) => AttentionWeights::Grouped(self.grouped(attention)),
                Attention::Latent(attention) => AttentionWeights::Latent(self.latent(attention)),
            },
            attention_out: match &spec.attention {
                Attention::Grouped(GroupedAttention { num_heads, head_dim, out_bias, .. }) => {
                    self.linear(&[names.attention_out], &[hidden], num_heads * head_dim, *out_bias)
                }
                Attention::Latent(LatentAttention { num_heads, v_dim, bias, .. }) => {
                    self.linear(&[names.attention_out], &[hidden], num_heads * v_dim, *bias)
                }
            },
            post_attention_norm: spec.post_norms.then(|| norm(names.post_attention_norm)),
            mlp_norm: norm(names.mlp_norm),
            mlp: match &spec.experts {
                Some(experts) if spec.layers[self.layer].experts => MlpWeights::Experts(self.experts(experts)),
                _ => MlpWeights::Dense(self.gated(names.gate_up, names.down, spec.mlp.size, spec.mlp.bias)),
            },
            post_mlp_norm: spec.post_norms.then(|| norm(names.post_mlp_norm)),
        }
    }

    fn grouped(&self, attention: &GroupedAttention) -> GroupedWeights<LinearPlan, VectorPlan> {
        let names = &self.spec.names;
        let [q_rows, kv_rows] = [attention.num_heads, attention.num_kv_heads].map(|heads| heads * attention.head_dim);
        let hidden = self.spec.hidden_size;
        GroupedWeights {
            qkv: self.linear(names.qkv, &[q_rows, kv_rows, kv_rows], hidden, attention.qkv_bias),
            qk_norm: attention.qk_norm.then(|| {
                let [q, k] = names.qk_norm.map(|name| self.norm(name, attention.head_dim));
                QkNormWeights { q, k }
            }),
            sinks: attention.sinks.then(|| VectorPlan {
                name: self.name(names.sinks),
                len: attention.num_heads,
                offset: 0.0,
            }),
        }
    }

    fn latent(&self, attention: &LatentAttention) -> LatentWeights<LinearPlan, VectorPlan> {
        let &LatentAttention { num_heads, q_rank, kv_rank, nope_dim, rope_dim, v_dim, bias, .. } = attention;
        let (hidden, names) = (self.spec.hidden_size, &self.spec.names.latent);
        let q_rows = num_heads * (nope_dim + rope_dim);
        let heads = |rows, cols| LinearPlan {
            parts: vec![Part::whole(self.name(names.kv_b), rows)],
            cols,
            bias: false,
            role: Role::Latent,
            unit_rows: false,
        };
        LatentWeights {
            queries: match q_rank {
                None => LatentQueryWeights::Direct(self.linear(&[names.q], &[q_rows], hidden, false)),
                Some(q_rank) => LatentQueryWeights::Compressed {
                    down: self.linear(&[names.q_a], &[q_rank], hidden, bias),
                    norm: self.norm(names.q_a_norm, q_rank),
                    up: self.linear(&[names.q_b], &[q_rows], q_rank, false),
                },
            },
            kv: self.linear(&[names.kv_a], &[kv_rank + rope_dim], hidden, bias),
            kv_norm: self.norm(names.kv_a_norm, kv_rank),
            heads: LatentHeads {
                queries: heads(num_heads * kv_rank, nope_dim),
                values: heads(num_heads * v_dim, kv_rank),
            },
        }
    }

    fn gated(&self, gate_up: &[&str], down: &str, size: usize, bias: bool) -> GatedWeights<LinearPlan> {
        let hidden = self.spec.hidden_size;
        GatedWeights {
            gate_up: self.linear(gate_up, &[size; 2], hidden, bias),
            down: self.linear(&[down], &[hidden], size, bias),
        }
    }

    fn experts(&self, experts: &Experts) -> ExpertWeights<LinearPlan, VectorPlan, ExpertsPlan> {
        let (hidden, names) = (self.spec.hidden_size, &self.spec.names.experts);
        let num_experts = experts.routing.num_experts;
        let router =
            |name, rows, bias| LinearPlan { role: Role::Router, ..self.linear(&[name], &[rows], hidden, bias) };
        let expert = |index: usize| match names.matrices {
            ExpertMatrices::Each { experts: each, gate_up, down } => {
                let name = |module| format!("{each}.{index}.{module}");
                let [gate, up] = gate_up.map(name);
                self.gated(&[&gate, &up], &name(down), experts.size, experts.bias)
            }
            ExpertMatrices::Numbered { gate_up, down } => {
                let name = |module| format!("{module}.{index}");
                let [gate, up] = gate_up.map(name);
                self.gated(&[&gate, &up], &name(down), experts.size, experts.bias)
            }
            ExpertMatrices::Stacked { gate_up, down } => GatedWeights {
                gate_up: self.stacked(gate_up, [num_experts, index], [hidden, 2 * experts.size], 2, experts.bias),
                down: self.stacked(down, [num_experts, index], [experts.size, hidden], 1, experts.bias),
            },
        };
        ExpertWeights {
            router: router(names.router, num_experts, experts.router_bias),
            correction: experts.correction.then(|| VectorPlan {
                name: self.name(names.correction),
                len: num_experts,
                offset: 0.0,
            }),
            experts: ExpertsPlan((0..num_experts).map(expert).collect()),
            shared: experts.shared.map(|shared| SharedWeights {
                mlp: self.gated(&names.shared_gate_up, names.shared_down, shared.size, false),
                gate: shared.gated.then(|| router(names.shared_gate, 1, false)),
            }),
        }
    }

    /// Matrix `index` of `count` in the tensor `[count, cols, width]` of this name: `parts` parts, whose columns take turns.
    fn stacked(
        &self,
        name: &str,
        [count, index]: [usize; 2],
        [cols, width]: [usize; 2],
        parts: usize,
        bias: bool,
    ) -> LinearPlan {
        let part = |first| Part {
            module: self.name(name),
            rows: width / parts,
            stacked: Some(Stacked { index, count, width, first, step: parts }),
        };
        LinearPlan { parts: (0..parts).map(part).collect(), cols, bias, role: Role::Layer, unit_rows: false }
    }

    fn name(&self, name: &str) -> String {
        format!("{}.{}.{name}", self.spec.names.layers, self.layer)
    }

    fn norm(&self, name: &str, len: usize) -> VectorPlan {
        VectorPlan { name: format!("{}.weight", self.name(name)), len, offset: self.spec.norm_offset }
    }

    /// A matrix of parts of `rows` rows, each a module of its own or all in one.
    fn linear(&self, modules: &[&str], rows: &[usize], cols: usize, bias: bool) -> LinearPlan {
        let parts = match modules {
            [all] => vec![Part::whole(self.name(all), rows.iter().sum())],
            _ => {
                debug_assert_eq!(modules.len(), rows.len(), "one module for each part, or one for all");
                let parts = modules.iter().zip(rows);
                parts.map(|(module, rows)| Part::whole(self.name(module), *rows)).collect()
            }
        };
        LinearPlan { parts, cols, bias, role: Role::Layer, unit_rows: false }
    }
}

impl LayerPlan {
    fn fill<L, V, X, F: Fill<L, V, X>>(&self, fill: &mut F) -> Result<LayerWeights<L, V, X>, F::Error> {
        Ok(LayerWeights {
            attention_norm: fill.vector(&self.attention_norm)?,
            attention: match &self.attention {
                AttentionWeights::Grouped(attention) => AttentionWeights::Grouped(attention.fill(fill)?),
                AttentionWeights::Latent(attention) => AttentionWeights::Latent(attention.fill(fill)?),
            },
            attention_out: fill.linear(&self.attention_out)?,
            post_attention_norm: optional(fill, self.post_attention_norm.as_ref())?,
            mlp_norm: fill.vector(&self.mlp_norm)?,
            mlp: match &self.mlp {
                MlpWeights::Dense(mlp) => MlpWeights::Dense(mlp.fill(fill)?),
                MlpWeights::Experts(experts) => MlpWeights::Experts(experts.fill(fill)?),
            },
            post_mlp_norm: optional(fill, self.post_mlp_norm.as_ref())?,
        })
    }
}

impl GroupedWeights<LinearPlan, VectorPlan> {
    fn fill<L, V, X, F: Fill<L, V, X>>(&self, fill: &mut F) -> Result<GroupedWeights<L, V>, F::Error> {
        Ok(GroupedWeights {
            qkv: fill.linear(&self.qkv)?,
            qk_norm: match &self.qk_norm {
                Some(norms) => Some(QkNormWeights { q: fill.vector(&norms.q)?, k: fill.vector(&norms.k)? }),
                None => None,
            },
            sinks: optional(fill, self.sinks.as_ref())?,
        })
    }
}

impl LatentWeights<LinearPlan, VectorPlan> {
    fn fill<L, V, X, F: Fill<L, V, X>>(&self, fill: &mut F) -> Result<LatentWeights<L, V>, F::Error> {
        Ok(LatentWeights {
            queries: match &self.queries {
                LatentQueryWeights::Direct(q) => LatentQueryWeights::Direct(fill.linear(q)?),
                LatentQueryWeights::Compressed { down, norm, up } => LatentQueryWeights::Compressed {
                    down: fill.linear(down)?,
                    norm: fill.vector(norm)?,
                    up: fill.linear(up)?,
                },
            },
            kv: fill.linear(&self.kv)?,
            kv_norm: fill.vector(&self.kv_norm)?,
            heads: fill.heads(&self.heads)?,
        })
    }
}

impl GatedWeights<LinearPlan> {
    fn fill<L, V, X, F: Fill<L, V, X>>(&self, fill: &mut F) -> Result<GatedWeights<L>, F::Error> {
        Ok(GatedWeights { gate_up: fill.linear(&self.gate_up)?, down: fill.linear(&self.down)? })
    }
}

impl ExpertWeights<LinearPlan, VectorPlan, ExpertsPlan> {
    fn fill<L, V, X, F: Fill<L, V, X>>(&self, fill: &mut F) -> Result<ExpertWeights<L, V, X>, F::Error> {
        Ok(ExpertWeights {
            router: fill.linear(&self.router)?,
            correction: optional(fill, self.correction.as_ref())?,
            experts: self.experts.fill(fill)?,
            shared: match &self.shared {
                Some(shared) => Some(SharedWeights {
                    mlp: shared.mlp.fill(fill)?,
                    gate: shared.gate.as_ref().map(|gate| fill.linear(gate)).transpose()?,
                }),
                None => None,
            },
        })
    }
}

impl ExpertsPlan {
    fn fill<L, V, X, F: Fill<L, V, X>>(&self, fill: &mut F) -> Result<X, F::Error> {
        let (mut gate_up, mut down) = (Vec::with_capacity(self.0.len()), Vec::with_capacity(self.0.len()));
        for expert in &self.0 {
            let GatedWeights { gate_up: both, down: back } = expert.fill(fill)?;
            gate_up.push(both);
            down.push(back);
        }
        fill.experts(gate_up, down)
    }
}

fn optional<L, V, X, F: Fill<L, V, X>>(fill: &mut F, vector: Option<&VectorPlan>) -> Result<Option<V>, F::Error> {
    vector.map(|vector| fill.vector(vector)).transpose()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{config::tests::config, families::tests::example};

    #[test]
    fn a_plan_names_every_tensor_with_its_shape() {
        let changes = json!({"num_hidden_layers": 1, "tie_word_embeddings": true, "head_dim": 8});
        let mut spec = config("Qwen3ForCausalLM", changes).to_spec().unwrap();
        let plan = Plan::new(&spec);
        let found: Vec<_> = plan.tensors().into_iter().map(|(name, shape)| format!("{name} {shape:?}")).collect();
        let wanted = [
            "model.embed_tokens.weight [100, 64]",
            "model.layers.0.input_layernorm.weight [64]",
            "model.layers.0.self_attn.q_proj.weight [32, 64]",
            "model.layers.0.self_attn.k_proj.weight [16, 64]",
            "model.layers.0.self_attn.v_proj.weight [16, 64]",
            "model.layers.0.self_attn.q_norm.weight [8]",
            "model.layers.0.self_attn.k_norm.weight [8]",
            "model.layers.0.self_attn.o_proj.weight [64, 32]",
            "model.layers.0.post_attention_layernorm.weight [64]",
            "model.layers.0.mlp.gate_proj.weight [96, 64]",
            "model.layers.0.mlp.up_proj.weight [96, 64]",
            "model.layers.0.mlp.down_proj.weight [64, 96]",
            "model.norm.weight [64]",
        ];
        assert_eq!(found, wanted);
        assert!(plan.ignores(&spec.names, "lm_head.weight"));
        assert!(plan.ignores(&spec.names, "model.layers.0.self_attn.rotary_emb.inv_freq"));
        assert!(!plan.ignores(&spec.names, "lm_head.bias") && !plan.ignores(&spec.names, "vision.norm.weight"));
        spec.names.ignored = &["vision."];
        assert!(plan.ignores(&spec.names, "vision.norm.weight") && !plan.ignores(&spec.names, "a.vision.norm.weight"));
    }

    #[test]
    fn a_plan_holds_as_many_parameters_as_its_spec_says() {
        for family in crate::FAMILIES {
            for tied in [false, true] {
                let changes = json!({"attention_bias": true, "mlp_bias": true});
                let mut spec = example(family.architecture, changes).to_spec().unwrap();
                spec.tied_embeddings = tied;
                let tensors = Plan::new(&spec).tensors();
                let total: usize = tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
                assert_eq!(total as u64, spec.num_parameters(), "{}", family.architecture);
            }
        }
    }
}
