//! The parameters of the decoder: what a checkpoint calls them, their shapes, and which of them are packed into one.
//!
//! [`Weights`] is generic over what stands for a matrix and for a vector. As a plan it holds names and shapes; filled by
//! the loader it holds packed weights. So no parameter can be forgotten: the types would not fit.

use crate::ModelSpec;

/// The decoder's parameters, with `L` for a linear operator's weight and `V` for a vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Weights<L, V> {
    /// `[V, E]`
    pub(crate) embed: L,
    pub(crate) layers: Vec<LayerWeights<L, V>>,
    /// `[E]`
    pub(crate) norm: V,
    /// `[V, E]`, or `None` where the embedding serves.
    pub(crate) head: Option<L>,
}

/// One layer's parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LayerWeights<L, V> {
    /// `[E]`
    pub(crate) attention_norm: V,
    /// `[(H + 2 K) · D, E]`
    pub(crate) qkv: L,
    /// `[D]` each
    pub(crate) qk_norm: Option<QkNormWeights<V>>,
    /// `[E, H · D]`
    pub(crate) attention_out: L,
    /// `[E]`
    pub(crate) mlp_norm: V,
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
}

/// What a matrix is for, which decides how it is quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// A linear operator of a layer.
    Layer,
    /// The embedding or the head: a row for each token of the vocabulary.
    Vocabulary,
}

/// One tensor of a [`LinearPlan`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// Of the weight and its bias, up to the last dot.
    pub(crate) module: String,
    pub(crate) rows: usize,
}

/// A vector to be uploaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VectorPlan {
    pub(crate) name: String,
    pub(crate) len: usize,
}

/// Names and shapes of all parameters.
pub(crate) type Plan = Weights<LinearPlan, VectorPlan>;

impl Part {
    pub(crate) fn weight(&self) -> String {
        format!("{}.weight", self.module)
    }

    pub(crate) fn bias(&self) -> String {
        format!("{}.bias", self.module)
    }
}

impl LinearPlan {
    pub(crate) fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.rows).sum()
    }
}

/// Makes the things that a plan asks for.
pub(crate) trait Fill<L, V> {
    type Error;
    fn linear(&mut self, plan: &LinearPlan) -> Result<L, Self::Error>;
    fn vector(&mut self, plan: &VectorPlan) -> Result<V, Self::Error>;
}

impl Plan {
    /// The parameters of `spec`, by the names that the Llama, Mistral and Qwen families share.
    pub(crate) fn new(spec: &ModelSpec) -> Self {
        let hidden = spec.hidden_size;
        let attention = spec.attention;
        let (q_rows, kv_rows) = (attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim);
        let layer = |index: usize| {
            let linear = |parts: &[(&str, usize)], cols, bias| {
                let part =
                    |&(name, rows): &(&str, usize)| Part { module: format!("model.layers.{index}.{name}"), rows };
                LinearPlan { parts: parts.iter().map(part).collect(), cols, bias, role: Role::Layer }
            };
            let vector = |name, len| VectorPlan { name: format!("model.layers.{index}.{name}.weight"), len };
            let qkv = [("self_attn.q_proj", q_rows), ("self_attn.k_proj", kv_rows), ("self_attn.v_proj", kv_rows)];
            let gate_up = [("mlp.gate_proj", spec.mlp.size), ("mlp.up_proj", spec.mlp.size)];
            LayerWeights {
                attention_norm: vector("input_layernorm", hidden),
                qkv: linear(&qkv, hidden, attention.qkv_bias),
                qk_norm: attention.qk_norm.then(|| QkNormWeights {
                    q: vector("self_attn.q_norm", attention.head_dim),
                    k: vector("self_attn.k_norm", attention.head_dim),
                }),
                attention_out: linear(&[("self_attn.o_proj", hidden)], q_rows, attention.out_bias),
                mlp_norm: vector("post_attention_layernorm", hidden),
                gate_up: linear(&gate_up, hidden, spec.mlp.bias),
                down: linear(&[("mlp.down_proj", hidden)], spec.mlp.size, spec.mlp.bias),
            }
        };
        let vocab = |module: &str| LinearPlan {
            parts: vec![Part { module: module.to_owned(), rows: spec.vocab_size }],
            cols: hidden,
            bias: false,
            role: Role::Vocabulary,
        };
        Self {
            embed: vocab("model.embed_tokens"),
            layers: (0..spec.num_layers()).map(layer).collect(),
            norm: VectorPlan { name: "model.norm.weight".into(), len: hidden },
            head: (!spec.tied_embeddings).then(|| vocab(HEAD)),
        }
    }

    /// The same structure with every plan replaced by what `fill` makes of it, in the order of the forward pass.
    pub(crate) fn fill<L, V, F: Fill<L, V>>(&self, fill: &mut F) -> Result<Weights<L, V>, F::Error> {
        let embed = fill.linear(&self.embed)?;
        let layers = self.layers.iter().map(|layer| {
            Ok(LayerWeights {
                attention_norm: fill.vector(&layer.attention_norm)?,
                qkv: fill.linear(&layer.qkv)?,
                qk_norm: match &layer.qk_norm {
                    Some(norms) => Some(QkNormWeights { q: fill.vector(&norms.q)?, k: fill.vector(&norms.k)? }),
                    None => None,
                },
                attention_out: fill.linear(&layer.attention_out)?,
                mlp_norm: fill.vector(&layer.mlp_norm)?,
                gate_up: fill.linear(&layer.gate_up)?,
                down: fill.linear(&layer.down)?,
            })
        });
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
        impl Fill<(), ()> for List {
            type Error = std::convert::Infallible;

            fn linear(&mut self, plan: &LinearPlan) -> Result<(), Self::Error> {
                self.0.extend(plan.parts.iter().map(|part| (part.weight(), vec![part.rows, plan.cols])));
                if plan.bias {
                    self.0.extend(plan.parts.iter().map(|part| (part.bias(), vec![part.rows])));
                }
                Ok(())
            }

            fn vector(&mut self, plan: &VectorPlan) -> Result<(), Self::Error> {
                self.0.push((plan.name.clone(), vec![plan.len]));
                Ok(())
            }
        }
        let mut list = List(Vec::new());
        let Ok(_) = self.fill(&mut list);
        list.0
    }

    /// Whether a tensor that the plan does not ask for may be in a checkpoint all the same.
    pub(crate) fn ignores(&self, name: &str) -> bool {
        // Old exports store the rotary frequencies, which follow from the config; tied ones may store the embedding twice.
        name.ends_with(".rotary_emb.inv_freq") || (self.head.is_none() && name == HEAD_WEIGHT)
    }
}

const HEAD: &str = "lm_head";
pub(crate) const HEAD_WEIGHT: &str = "lm_head.weight";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::tests::config;

    #[test]
    fn a_plan_names_every_tensor_with_its_shape() {
        let changes = json!({"num_hidden_layers": 1, "tie_word_embeddings": true, "head_dim": 8});
        let plan = Plan::new(&config("Qwen3ForCausalLM", changes).to_spec().unwrap());
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
        assert!(plan.ignores("lm_head.weight") && plan.ignores("model.layers.0.self_attn.rotary_emb.inv_freq"));
        assert!(!plan.ignores("lm_head.bias"));
    }

    #[test]
    fn a_plan_holds_as_many_parameters_as_its_spec_says() {
        for (family, _) in crate::FAMILIES {
            for tied in [false, true] {
                let changes = json!({"tie_word_embeddings": tied, "attention_bias": true, "mlp_bias": true});
                let spec = config(family, changes).to_spec().unwrap();
                let tensors = Plan::new(&spec).tensors();
                let total: usize = tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
                assert_eq!(total as u64, spec.num_parameters(), "{family}");
            }
        }
    }
}
