//! The families, as data: what sets each one apart from plain Llama.

mod baichuan;
mod chatglm;
mod deepseek;
mod examples;
mod experts;
mod gemma;
mod glm;
mod gpt_oss;
mod llama;
mod phi;
mod qwen;
mod windows;

use crate::{ConfigError, HfConfig, ModelSpec, json::Object};

/// Reads a family's config.
pub type ToSpec = fn(&HfConfig) -> Result<ModelSpec, ConfigError>;

/// A kind of model: how to tell it, and how its config is read.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Family {
    /// The entry of `architectures` in `config.json`.
    pub architecture: &'static str,
    /// What people call it.
    pub name: &'static str,
    /// A published model of it.
    pub example: Example,
    /// Reads its config.
    pub to_spec: ToSpec,
}

/// A published model.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Example {
    /// Its name on the hub.
    pub model: &'static str,
    /// What its `config.json` says about its shape.
    pub config: &'static str,
}

/// Every decoder family. `docs/models.md` is made of it.
pub static FAMILIES: &[Family] = &[
    family("LlamaForCausalLM", "Llama 2 and 3", examples::LLAMA, llama::llama),
    family("MistralForCausalLM", "Mistral", examples::MISTRAL, llama::mistral),
    family("Qwen2ForCausalLM", "Qwen2, Qwen2.5", examples::QWEN2, qwen::qwen2),
    family("Qwen3ForCausalLM", "Qwen3", examples::QWEN3, qwen::qwen3),
    family("Gemma2ForCausalLM", "Gemma 2", examples::GEMMA2, gemma::gemma2),
    family("Gemma3ForCausalLM", "Gemma 3", examples::GEMMA3, gemma::gemma3),
    family("Gemma3ForConditionalGeneration", "Gemma 3, text only", examples::GEMMA3_TEXT, gemma::gemma3_with_images),
    family("GlmForCausalLM", "GLM-4", examples::GLM, glm::glm),
    family("Glm4ForCausalLM", "GLM-4-0414", examples::GLM4, glm::glm4),
    family("Phi3ForCausalLM", "Phi-3, Phi-4", examples::PHI3, phi::phi3),
    family("QWenLMHeadModel", "Qwen, first generation", examples::QWEN, qwen::qwen),
    family("BaiChuanForCausalLM", "Baichuan, 7B", examples::BAICHUAN, baichuan::baichuan),
    family("BaichuanForCausalLM", "Baichuan 2, 7B", examples::BAICHUAN2, baichuan::baichuan),
    family("ChatGLMModel", "ChatGLM2, ChatGLM3", examples::CHATGLM3, chatglm::chatglm),
    family("ChatGLMForConditionalGeneration", "GLM-4 in its first form", examples::CHATGLM4, chatglm::chatglm),
    family("MixtralForCausalLM", "Mixtral", examples::MIXTRAL, experts::mixtral),
    family("Qwen2MoeForCausalLM", "Qwen1.5-MoE, Qwen2-MoE", examples::QWEN2_MOE, experts::qwen2_moe),
    family("Qwen3MoeForCausalLM", "Qwen3-MoE", examples::QWEN3_MOE, experts::qwen3_moe),
    family("DeepseekV2ForCausalLM", "DeepSeek-V2", examples::DEEPSEEK_V2, deepseek::deepseek_v2),
    family("DeepseekV3ForCausalLM", "DeepSeek-V3, R1", examples::DEEPSEEK_V3, deepseek::deepseek_v3),
    family("Glm4MoeForCausalLM", "GLM-4.5, GLM-4.6", examples::GLM4_MOE, glm::glm4_moe),
    family("GptOssForCausalLM", "gpt-oss", examples::GPT_OSS, gpt_oss::gpt_oss),
];

const fn family(architecture: &'static str, name: &'static str, example: Example, to_spec: ToSpec) -> Family {
    Family { architecture, name, example, to_spec }
}

/// A value with a meaning, but one that is not implemented.
fn unsupported(field: &str, found: impl std::fmt::Display, supported: &str) -> ConfigError {
    ConfigError::Unsupported { field: field.into(), found: found.to_string(), supported: supported.into() }
}

/// Refuses a config that says other than `wanted` about `key`.
fn only(config: Object<'_>, key: &str, wanted: bool) -> Result<(), ConfigError> {
    match config.flag(key)? {
        Some(found) if found != wanted => Err(unsupported(key, found, if wanted { "true" } else { "false" })),
        _ => Ok(()),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::{Value, json};

    use super::FAMILIES;
    use crate::{Attention, GroupedAttention, HfConfig, ModelSpec, config::tests::config};

    /// The example of a family, with `changes` put over it.
    pub(crate) fn example(architecture: &str, changes: Value) -> HfConfig {
        let family = FAMILIES.iter().find(|family| family.architecture == architecture).unwrap();
        let changes = changes.as_object().unwrap().iter();
        let config = HfConfig::parse(family.example.config).unwrap().with("architectures", json!([architecture]));
        changes.fold(config, |config, (key, value)| config.with(key, value.clone()))
    }

    /// What becomes of [`example`].
    pub(crate) fn spec_of(architecture: &str, changes: Value) -> ModelSpec {
        example(architecture, changes).to_spec().unwrap()
    }

    /// The attention of a family that has grouped queries.
    pub(crate) fn attention_of(spec: &ModelSpec) -> GroupedAttention {
        let Attention::Grouped(attention) = spec.attention else { panic!("not of grouped queries") };
        attention
    }

    #[test]
    fn examples_have_as_many_parameters_as_was_published() {
        let sizes: Vec<_> = FAMILIES
            .iter()
            .map(|family| (family.example.model, spec_of(family.architecture, json!({})).num_parameters()))
            .collect();
        let wanted = [
            ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
            ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552),
            ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
            ("Qwen/Qwen3-8B", 8_190_735_360),
            ("google/gemma-2-9b-it", 9_241_705_984),
            ("google/gemma-3-1b-it", 999_885_952),
            ("google/gemma-3-4b-it", 3_880_263_168), // without what sees images
            ("THUDM/glm-4-9b-chat-hf", 9_399_951_360),
            ("THUDM/GLM-4-9B-0414", 9_400_279_040),
            ("microsoft/phi-4", 14_659_507_200),
            ("Qwen/Qwen-7B-Chat", 7_721_324_544),
            ("baichuan-inc/Baichuan-7B", 7_000_559_616),
            ("baichuan-inc/Baichuan2-7B-Chat", 7_505_973_248),
            ("THUDM/chatglm3-6b", 6_243_584_000),
            ("THUDM/glm-4-9b-chat", 9_399_951_360),
            ("mistralai/Mixtral-8x7B-Instruct-v0.1", 46_702_792_704),
            ("Qwen/Qwen1.5-MoE-A2.7B-Chat", 14_315_784_192),
            ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
            ("deepseek-ai/DeepSeek-V2-Lite-Chat", 15_706_484_224),
            ("deepseek-ai/DeepSeek-V3", 671_026_419_200),
            ("zai-org/GLM-4.5-Air", 106_852_251_264),
            ("openai/gpt-oss-20b", 20_914_757_184),
        ];
        assert_eq!(sizes, wanted);
    }

    /// The window of each layer.
    pub(super) fn windows(architecture: &str, changes: Value) -> Vec<Option<usize>> {
        let spec = config(architecture, changes).to_spec().unwrap();
        spec.layers.iter().map(|layer| layer.window).collect()
    }

    #[test]
    fn families_differ_in_biases_and_norms() {
        let facts = |architecture, changes| {
            let mut spec = config(architecture, changes).to_spec().unwrap();
            let &mut GroupedAttention { qkv_bias, out_bias, qk_norm, .. } = spec.grouped();
            (qkv_bias, out_bias, qk_norm, spec.mlp.bias)
        };
        assert_eq!(facts("LlamaForCausalLM", json!({})), (false, false, false, false));
        assert_eq!(facts("LlamaForCausalLM", json!({"attention_bias": true})), (true, true, false, false));
        assert_eq!(facts("LlamaForCausalLM", json!({"mlp_bias": true})), (false, false, false, true));
        assert_eq!(facts("MistralForCausalLM", json!({"attention_bias": true})), (false, false, false, false));
        assert_eq!(facts("Qwen2ForCausalLM", json!({})), (true, false, false, false));
        assert_eq!(facts("Qwen3ForCausalLM", json!({})), (false, false, true, false));
        assert_eq!(facts("Qwen3ForCausalLM", json!({"attention_bias": true})), (true, true, true, false));
    }

    #[test]
    fn mistrals_window_is_on_every_layer() {
        assert_eq!(windows("MistralForCausalLM", json!({"sliding_window": 16})), [Some(16); 4]);
        assert_eq!(windows("MistralForCausalLM", json!({"sliding_window": null})), [None; 4]);
        assert_eq!(windows("MistralForCausalLM", json!({})), [Some(4096); 4]);
    }

    #[test]
    fn llama_has_no_window() {
        assert_eq!(windows("LlamaForCausalLM", json!({"sliding_window": 16})), [None; 4]);
    }

    #[test]
    fn qwens_window_is_on_the_layers_that_the_config_names() {
        let off = json!({"sliding_window": 8, "use_sliding_window": false, "max_window_layers": 1});
        assert_eq!(windows("Qwen2ForCausalLM", off), [None; 4]);
        let upper = json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 3});
        assert_eq!(windows("Qwen2ForCausalLM", upper), [None, None, None, Some(8)]);
        let beyond = json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 99});
        assert_eq!(windows("Qwen3ForCausalLM", beyond), [None; 4]);
        let (full, sliding) = ("full_attention", "sliding_attention");
        let named = json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 3,
            "layer_types": [sliding, full, sliding, full]});
        assert_eq!(windows("Qwen3ForCausalLM", named), [Some(8), None, Some(8), None]);
    }

    #[test]
    fn layer_types_must_fit() {
        let error = |changes| config("Qwen2ForCausalLM", changes).to_spec().unwrap_err().to_string();
        assert_eq!(
            error(json!({"layer_types": ["full_attention"]})),
            "layer_types: wanted one entry for each of 4 layers, found 1"
        );
        assert_eq!(
            error(json!({"layer_types": ["linear_attention", "a", "b", "c"]})),
            "layer_types: linear_attention is not supported; supported: full_attention, sliding_attention"
        );
        let sliding = ["sliding_attention"; 4];
        assert_eq!(
            error(json!({"layer_types": sliding, "sliding_window": 8})),
            "layer_types: wanted a sliding_window in use beside a sliding_attention layer, found none"
        );
    }
}
