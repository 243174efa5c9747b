//! Models in GGUF files, through the SDK.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Answer, complete, golden, load, tiny};
use dashinfer::{Device, Engine, Error, Load, Message, Quantization, Request, Source, WeightsFrom};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../dashinfer-models/tests/gguf").join(name)
}

const LLAMA: &str = "llama-v5-config.bf16.gguf";
const QWEN: &str = "qwen2-yarn.q8_0-q4_0.gguf";

fn on_cpu(source: impl Into<Source>) -> Load {
    Engine::load(source).device(Device::Cpu).threads(1)
}

#[test]
fn a_file_answers_as_the_checkpoint_that_it_was_made_from() {
    let from_file = load(Engine::load(file(LLAMA)));
    let from_folder = load(Engine::load(golden("llama-v5-config")));
    assert_eq!(from_file.model().architecture, "LlamaForCausalLM");
    assert_eq!(from_file.model().num_parameters, from_folder.model().num_parameters);
    let requests = [
        Request::text("Once upon a time").max_tokens(24).temperature(0.0),
        Request::chat([Message::system("Be brief."), Message::user("Why is the sky blue?")])
            .max_tokens(24)
            .temperature(0.0),
    ];
    for request in requests {
        let [found, wanted] = [&from_file, &from_folder].map(|engine| complete(engine, request.clone().ignore_eos()));
        assert_eq!((found.text, found.tokens), (wanted.text, wanted.tokens));
        assert_eq!(found.finish.usage.prompt_tokens, wanted.finish.usage.prompt_tokens);
    }
}

#[test]
fn a_quantized_file_is_estimated_and_taken_as_it_is() {
    let estimate = on_cpu(file(QWEN)).estimate().unwrap();
    let engine = on_cpu(file(QWEN)).blocking().unwrap();
    assert_eq!(estimate.weight_bytes, engine.model().weight_bytes);
    let dense = on_cpu(file(QWEN)).quantize(Quantization::NONE).estimate().unwrap();
    assert!(estimate.weight_bytes * 3 < dense.weight_bytes, "{estimate:?} {dense:?}");
    let answer = complete(&engine, Request::text("The quick brown fox").max_tokens(16));
    assert!(!answer.tokens.is_empty());
}

/// The file names one end, `<|endoftext|>`; that of a turn is known by its spelling.
#[test]
fn a_continuation_ends_where_the_file_says() {
    let engine = on_cpu(file(QWEN)).blocking().unwrap();
    let tokenizer = engine.tokenizer().unwrap();
    for end in ["<|endoftext|>", "<|im_end|>"] {
        let id = tokenizer.token_id(end).unwrap();
        let request = Request::tokens([5, 6, 7]).max_tokens(8).logit_bias(id, 100.0);
        let answer = complete(&engine, request);
        assert_eq!(answer.tokens.iter().filter(|token| **token != id).count(), 0, "{end}");
        assert!(answer.tokens.len() <= 1, "{end}: {:?}", answer.tokens);
    }
}

#[test]
fn packed_weights_of_a_file_are_kept() {
    let folder = std::env::temp_dir().join(format!("dashinfer-gguf-cache-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let engine = || on_cpu(file(QWEN)).weight_cache(folder.join("cache")).blocking().unwrap();
    let (first, second) = (engine(), engine());
    assert!(matches!(first.model().weights_from, WeightsFrom::Stored { replaced: None, .. }));
    assert_eq!(second.model().weights_from, WeightsFrom::Cache);
    let answer = |engine: &Engine| {
        Answer::from(&complete(engine, Request::tokens([1, 2, 3]).max_tokens(16).logprobs(3).ignore_eos()))
    };
    assert_eq!(answer(&first), answer(&second));
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn what_is_no_model_is_told() {
    let complaint = |path: &Path| match on_cpu(path).blocking() {
        Err(error) => {
            assert_eq!(on_cpu(path).estimate().unwrap_err().to_string(), error.to_string());
            error
        }
        Ok(_) => panic!("{} was loaded", path.display()),
    };
    let error = complaint(Path::new("nowhere/model.gguf"));
    assert!(matches!(error, Error::Checkpoint(_)) && error.to_string() == "cannot read nowhere/model.gguf", "{error}");

    let folder = std::env::temp_dir().join(format!("dashinfer-gguf-broken-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join("model.GGUF");
    let whole = fs::read(file(QWEN)).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let error = complaint(&path).to_string();
    assert!(error.contains("model.GGUF: tensor ") && error.contains("bytes from byte"), "{error}");
    fs::copy(tiny().join("model.safetensors"), &path).unwrap();
    let error = complaint(&path).to_string();
    assert!(error.contains("wanted a GGUF file, which starts with \"GGUF\""), "{error}");
    fs::remove_dir_all(&folder).unwrap();

    // A tokenizer alone is no model, and says what is missing.
    let error = complaint(&file("sentencepiece.gguf"));
    assert_eq!(error.to_string(), "llama.embedding_length: wanted a whole number, found nothing");
}
