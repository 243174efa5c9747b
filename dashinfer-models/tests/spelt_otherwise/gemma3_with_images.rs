use serde_json::json;

use super::*;

#[test]
fn the_decoder_within_gemma3_is_found_and_the_encoder_ignored() {
    let case = case("gemma3-text-norm-eps");
    let mut text = config_of(&case);
    text.as_object_mut().unwrap().remove("architectures");
    text["torch_dtype"] = json!("float32");
    let config = json!({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text,
        "vision_config": {"hidden_size": 16}, "torch_dtype": "bfloat16"});
    let mut tensors = Tensors::of_folder(&case.folder).rename(|name| format!("language_model.{name}"));
    tensors.add("vision_tower.vision_model.embeddings.patch_embedding.bias", &[16]);
    tensors.add("multi_modal_projector.mm_input_projection_weight", &[16, 32]);
    check(&case, &spec(&config), &tensors, |_| ());

    tensors.add("language_model.model.norm.bias", &[32]);
    let mut source = tensors;
    let limits = StepLimits { max_tokens: 16, max_logit_rows: 1 };
    let error =
        Decoder::load(Reference::default(), spec(&config), &mut source, limits, Quantization::NONE, &mut |_| ());
    assert!(error.unwrap_err().to_string().contains("language_model.model.norm.bias"));
}
