//! What is wrong with a model's files, an engine's settings or a request is said in words; nothing panics, and requests in
//! flight go on.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Answer, complete, golden, load, tiny};
use dashinfer::{Engine, Error, KvCacheType, Load, Message, Request};
use serde_json::{Map, Value, json};

/// A copy of a checkpoint, to be broken.
struct Broken {
    folder: PathBuf,
}

impl Broken {
    fn copy_of(original: &Path) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("broken-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir_all(&folder).unwrap();
        for entry in fs::read_dir(original).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
        }
        Self { folder }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    fn edit_bytes(&self, file: &str, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.path(file)).unwrap();
        edit(&mut bytes);
        fs::write(self.path(file), bytes).unwrap();
    }

    fn edit_config(&self, edit: impl FnOnce(&mut Map<String, Value>)) {
        self.edit_bytes("config.json", |bytes| {
            let mut config: Map<_, _> = serde_json::from_slice(bytes).unwrap();
            edit(&mut config);
            *bytes = serde_json::to_vec(&config).unwrap();
        });
    }

    /// Edits header and data of the weights, and writes them as a file whose length of the header is right.
    fn edit_weights(&self, edit: impl FnOnce(&mut Map<String, Value>, &mut Vec<u8>)) {
        self.edit_bytes("model.safetensors", |bytes| {
            let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let mut data = bytes.split_off(8 + header_len);
            let mut header: Map<_, _> = serde_json::from_slice(&bytes[8..]).unwrap();
            edit(&mut header, &mut data);
            let header = serde_json::to_vec(&header).unwrap();
            *bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
        });
    }

    /// What loading says, with all its causes; this folder is called `MODEL`.
    fn complaint(&self) -> String {
        let complaint = complaint(Engine::load(&self.folder));
        complaint.replace(&self.folder.display().to_string(), "MODEL")
    }
}

impl Drop for Broken {
    fn drop(&mut self) {
        // What is left lies in the build's own folder.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn with_causes(error: &Error) -> String {
    let first: &dyn std::error::Error = error;
    let all = std::iter::successors(Some(first), |error| error.source());
    all.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[track_caller]
fn complaint(load: Load) -> String {
    match load.threads(1).blocking() {
        Ok(_) => panic!("it was loaded"),
        Err(error) => with_causes(&error),
    }
}

/// Breaks a copy of the tiny golden, and checks how loading it fails.
#[track_caller]
fn check(wanted: &str, damage: impl FnOnce(&Broken)) {
    let broken = Broken::copy_of(&tiny());
    damage(&broken);
    assert_eq!(broken.complaint(), wanted);
}

#[test]
fn a_folder_that_is_none() {
    let missing = Path::new(env!("CARGO_TARGET_TMPDIR")).join("no-such-model");
    let missing_name = missing.display().to_string();
    assert_eq!(complaint(Engine::load(&missing)), format!("there is no model folder {missing_name}"));
    let file = tiny().join("model.safetensors");
    let wanted = format!(
        "there is no model folder {}; it is a file, and a folder with config.json and safetensors, or a .gguf file, is wanted",
        file.display()
    );
    assert_eq!(complaint(Engine::load(&file)), wanted);
    assert_eq!(Engine::estimate(&file).unwrap_err().to_string(), wanted);
    let wanted = "there is no model folder some/model; to run a model of a hub, download it and give its folder";
    assert_eq!(complaint(Engine::load("some/model")), wanted);
}

#[test]
fn files_that_are_missing_or_cut_short() {
    check("cannot read MODEL/config.json: No such file or directory (os error 2)", |broken| {
        fs::remove_file(broken.path("config.json")).unwrap()
    });
    check("MODEL/config.json is not a JSON object: EOF while parsing a value at line 6 column 22", |broken| {
        broken.edit_bytes("config.json", |bytes| bytes.truncate(100))
    });
    check("MODEL/config.json is not a JSON object: EOF while parsing a value at line 1 column 0", |broken| {
        fs::write(broken.path("config.json"), "").unwrap()
    });
    check("MODEL holds neither model.safetensors nor model.safetensors.index.json", |broken| {
        fs::remove_file(broken.path("model.safetensors")).unwrap()
    });
    check("MODEL/model.safetensors: the length of the header should take 8 bytes, found 0", |broken| {
        fs::write(broken.path("model.safetensors"), "").unwrap()
    });
    check("MODEL/model.safetensors: the tensors should take 254592 bytes, found 97832", |broken| {
        broken.edit_bytes("model.safetensors", |bytes| bytes.truncate(100_000))
    });
    check("MODEL/model.safetensors: the tensors should take 254592 bytes, found 254593", |broken| {
        broken.edit_bytes("model.safetensors", |bytes| bytes.push(0))
    });
    check("MODEL/model.safetensors: the header should take 1000000 bytes, found 256752", |broken| {
        broken.edit_bytes("model.safetensors", |bytes| bytes[..8].copy_from_slice(&1_000_000u64.to_le_bytes()));
    });
    check("MODEL/model.safetensors: the header should take 18446744073709551615 bytes, found 256752", |broken| {
        broken.edit_bytes("model.safetensors", |bytes| bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes()));
    });
    check("MODEL/model.safetensors: the safetensors header is invalid: expected value at line 1 column 1", |broken| {
        broken.edit_bytes("model.safetensors", |bytes| bytes[8] = b'x')
    });
    check(
        "MODEL/generation_config.json is not a JSON object: invalid type: sequence, expected a map at line 1 column 0",
        |broken| fs::write(broken.path("generation_config.json"), "[1]").unwrap(),
    );
}

#[test]
fn a_shard_that_is_missing() {
    let broken = Broken::copy_of(&golden("qwen2-untied"));
    fs::remove_file(broken.path("model-00002-of-00002.safetensors")).unwrap();
    assert_eq!(
        broken.complaint(),
        "MODEL/model.safetensors.index.json: shard model-00002-of-00002.safetensors is missing (it should hold model.layers.0.mlp.up_proj.weight)"
    );
}

const UP: &str = "model.layers.1.mlp.up_proj.weight";

#[test]
fn tensors_that_are_not_the_configs() {
    check("tensor model.layers.1.mlp.up_proj.weight should have the shape [112, 64], found [64, 112]", |broken| {
        broken.edit_weights(|header, _| header[UP]["shape"] = json!([64, 112]))
    });
    check(
        "MODEL/model.safetensors: the safetensors header is invalid: invalid shape, data type, or offset for tensor",
        |broken| broken.edit_weights(|header, _| header[UP]["shape"] = json!([112, 63])),
    );
    check(
        "MODEL/model.safetensors: the safetensors header is invalid: overflow computing buffer size from shape and/or element type",
        |broken| broken.edit_weights(|header, _| header[UP]["shape"] = json!([u64::MAX, u64::MAX])),
    );
    check("tensor model.layers.1.mlp.up_proj.weight is stored as I16, wanted f32, f16 or bf16", |broken| {
        broken.edit_weights(|header, _| header[UP]["dtype"] = json!("I16"))
    });
    check(
        "MODEL/model.safetensors: the safetensors header is invalid: invalid shape, data type, or offset for tensor",
        |broken| broken.edit_weights(|header, _| header[UP]["dtype"] = json!("F32")),
    );
    check(
        "MODEL/model.safetensors: the safetensors header is invalid: invalid offset for tensor `lm_head.weight`",
        |broken| broken.edit_weights(|header, _| header[UP]["data_offsets"] = json!([0, 14336])),
    );
    check("tensor model.layers.1.mlp.up_proj.weight [112, 64] is missing", |broken| {
        broken.edit_weights(|header, _| {
            let tensor = header.remove(UP).unwrap();
            header.insert("model.layers.1.mlp.wrong".into(), tensor);
        });
    });
    check("the model has no place for tensor extra.bias", |broken| {
        broken.edit_weights(|header, data| {
            let end = data.len();
            data.extend([0; 4]);
            header.insert("extra.bias".into(), json!({"dtype": "BF16", "shape": [2], "data_offsets": [end, end + 4]}));
        });
    });
    check("tensor model.layers.2.input_layernorm.weight [64] is missing (and 8 more)", |broken| {
        broken.edit_config(|config| config["num_hidden_layers"] = json!(3))
    });
    check("the model has no place for tensor model.layers.1.input_layernorm.weight (and 8 more)", |broken| {
        broken.edit_config(|config| config["num_hidden_layers"] = json!(1))
    });
    check("tensor model.embed_tokens.weight should have the shape [401, 64], found [400, 64]", |broken| {
        broken.edit_config(|config| config["vocab_size"] = json!(401))
    });
}

#[test]
fn a_config_of_no_model() {
    let check = |key: &str, value: Value, wanted: &str| {
        check(wanted, |broken| broken.edit_config(|config| drop(config.insert(key.to_owned(), value))));
    };
    check("hidden_size", json!(0), "hidden_size: wanted 1 to 1048576, found 0");
    check("hidden_size", json!(1e18), "hidden_size: wanted a whole number, found 1e+18");
    check(
        "num_attention_heads",
        json!(0),
        "num_attention_heads: wanted a divisor of hidden_size 64, as there is no head_dim, found 0",
    );
    check("num_hidden_layers", json!(-1), "num_hidden_layers: wanted a whole number, found -1");
    check("vocab_size", json!(0), "vocab_size: wanted 1 to 16777216, found 0");
    check("vocab_size", json!("many"), "vocab_size: wanted a whole number, found \"many\"");
    check("max_position_embeddings", json!(0), "max_position_embeddings: wanted 1 to 1073741824, found 0");
    check(
        "max_position_embeddings",
        json!(1e15),
        "max_position_embeddings: wanted 1 to 1073741824, found 1000000000000000",
    );
    check("rms_norm_eps", json!(-1), "rms_norm_eps: wanted above 0 and below 1, found -1");
    let known = dashinfer_models::FAMILIES.iter().map(|family| family.architecture).collect::<Vec<_>>().join(", ");
    check(
        "architectures",
        json!(["LlamaForCausaLM"]),
        &format!("architecture LlamaForCausaLM is not supported; known are {known}"),
    );
    check("architectures", json!(null), &format!("architectures: wanted one of {known}, found nothing"));
    check(
        "rope_scaling",
        json!({"rope_type": "spiral"}),
        "rope_scaling.rope_type: spiral is not supported; supported: default, linear, llama3, yarn, longrope",
    );
    check(
        "rope_scaling",
        json!({"rope_type": "linear", "factor": 0}),
        "rope_scaling.factor: wanted a finite number, 1 or more, found 0",
    );
    check("hidden_act", json!("gelu"), "hidden_act: gelu is not supported; supported: silu, gelu_pytorch_tanh");
}

#[test]
fn a_context_that_the_limit_does_not_hold() {
    let broken = Broken::copy_of(&tiny());
    broken.edit_config(|config| config["max_position_embeddings"] = json!(1 << 30));
    let found = complaint(Engine::load(&broken.folder).memory_limit(1 << 40));
    assert!(found.ends_with("for one sequence of 1073741824 tokens (a smaller context needs less)"), "{found}");
    let engine = load(Engine::load(&broken.folder).max_context(100));
    assert_eq!(engine.model().context, 100);
}

#[test]
fn a_tokenizer_that_is_none() {
    check(
        "MODEL/tokenizer.json is no tokenizer in the format of Hugging Face `tokenizers`: EOF while parsing an object at line 1 column 1",
        |broken| fs::write(broken.path("tokenizer.json"), "{").unwrap(),
    );
    check(
        "MODEL/tokenizer.json is no tokenizer in the format of Hugging Face `tokenizers`: Model missing. at line 1 column 2",
        |broken| fs::write(broken.path("tokenizer.json"), "{}").unwrap(),
    );
    check(
        "MODEL/tokenizer.json is no tokenizer in the format of Hugging Face `tokenizers`: EOF while parsing a string at line 1 column 3000",
        |broken| broken.edit_bytes("tokenizer.json", |bytes| bytes.truncate(3000)),
    );
    check("MODEL/tokenizer_config.json is no tokenizer configuration: expected ident at line 1 column 2", |broken| {
        fs::write(broken.path("tokenizer_config.json"), "nonsense").unwrap()
    });
}

#[test]
fn a_model_without_a_tokenizer_takes_token_ids() {
    let broken = Broken::copy_of(&tiny());
    fs::remove_file(broken.path("tokenizer.json")).unwrap();
    let engine = load(Engine::load(&broken.folder));
    assert!(engine.tokenizer().is_none());
    let answer = complete(&engine, Request::tokens([1, 2, 3]).max_tokens(5).ignore_eos());
    assert_eq!((answer.text.as_str(), answer.tokens.len()), ("", 5));
    check_request(&engine, "hi", "a text needs a tokenizer, and the model was loaded without one; send token ids");

    fs::write(broken.path("qwen.tiktoken"), "IQ== 0\n").unwrap();
    let engine = load(Engine::load(&broken.folder));
    check_request(
        &engine,
        "hi",
        "a text needs a tokenizer, and the checkpoint has qwen.tiktoken in place of the tokenizer.json that is read; take a \
         converted checkpoint (for GLM-4 THUDM/glm-4-9b-chat-hf), or send token ids",
    );
}

#[test]
fn a_chat_template_that_fails() {
    let complain = |template: &str, wanted: &str| {
        let broken = Broken::copy_of(&tiny());
        fs::write(broken.path("chat_template.jinja"), template).unwrap();
        let engine = load(Engine::load(&broken.folder));
        check_request(&engine, Request::chat([Message::user("hi")]), wanted);
        assert_eq!(complete(&engine, Request::text("hi").max_tokens(2).ignore_eos()).tokens.len(), 2);
    };
    complain("{{ raise_exception('nobody may speak') }}", "the chat template refused the chat: nobody may speak");
    complain(
        "{% for message in messages %}",
        "the chat template cannot be compiled: syntax error: unexpected end of input, expected end of block (in chat_template:1)",
    );
    complain(
        "{{ messages | no_such_filter }}",
        "the chat template failed: unknown filter: filter no_such_filter is unknown (in chat_template:1)",
    );
}

#[test]
fn settings_under_which_nothing_can_run() {
    let check = |settings: fn(Load) -> Load, wanted: &str| {
        let load = || settings(Engine::load(tiny()));
        assert_eq!(load().estimate().unwrap_err().to_string(), wanted);
        assert_eq!(load().blocking().unwrap_err().to_string(), wanted);
    };
    check(|load| load.threads(0), "setting `threads` is 0, wanted 1 to 1024");
    check(|load| load.threads(1_000_000), "setting `threads` is 1000000, wanted 1 to 1024");
    check(|load| load.max_batch(0), "setting `max_batch` is 0, wanted 1 to 1048576");
    let huge = usize::MAX;
    check(|load| load.max_batch(usize::MAX), &format!("setting `max_batch` is {huge}, wanted 1 to 1048576"));
    check(|load| load.max_step_tokens(0), "setting `max_step_tokens` is 0, wanted 1 to 1048576");
    check(
        |load| load.max_step_tokens(usize::MAX),
        &format!("setting `max_step_tokens` is {huge}, wanted 1 to 1048576"),
    );
    check(|load| load.stream_buffer(0), "setting `stream_buffer` is 0, wanted 1 to 1048576");
    check(|load| load.stream_buffer(usize::MAX), &format!("setting `stream_buffer` is {huge}, wanted 1 to 1048576"));
    check(|load| load.max_chunk(0), "setting `max_chunk` is 0, wanted at least 1");
    check(|load| load.max_context(0), "setting `max_context` is 0, wanted at least 1");
    for (block_size, settings) in [
        (0, (|load| load.block_size(0)) as fn(Load) -> Load),
        (24, |load| load.block_size(24)),
        (256, |load| load.block_size(256)),
    ] {
        check(settings, &format!("setting `block_size` is {block_size}, wanted 16, 32, 64 or 128"));
    }
}

#[test]
#[cfg(target_os = "linux")]
fn cores_that_are_not_there() {
    let found = complaint(Engine::load(tiny()).cores([1000]));
    assert_eq!(found, "cannot set up the thread pool: core 1000: Invalid argument (os error 22)");
    let found = complaint(Engine::load(tiny()).cores([usize::MAX]));
    let too_large = "core 18446744073709551615 is beyond what the system can name";
    assert_eq!(found, format!("cannot set up the thread pool: {too_large}"));
}

#[test]
fn a_memory_limit_too_small_to_run() {
    let estimate = Engine::estimate(tiny()).unwrap();
    let fixed = estimate.weight_bytes + estimate.activation_bytes;
    let least = fixed + 256 * estimate.kv_bytes_per_token;
    let wanted = |limit: u64| {
        format!(
            "a memory limit of {limit} bytes is too small: {least} are needed, {fixed} for weights and activations and the \
             rest for one sequence of 256 tokens (a smaller context needs less)"
        )
    };
    for limit in [0, 1, least - 1] {
        assert_eq!(complaint(Engine::load(tiny()).memory_limit(limit)), wanted(limit));
    }
    let too_small_a_cache = complaint(Engine::load(tiny()).kv_cache_bytes(1));
    let bytes_of_one = 256 * estimate.kv_bytes_per_token;
    assert_eq!(
        too_small_a_cache,
        format!(
            "a KV cache of 1 bytes is too small: one sequence of 256 tokens takes {bytes_of_one} (a smaller context needs less)"
        )
    );
    let engine = load(Engine::load(tiny()).memory_limit(least));
    assert_eq!(engine.model().kv_cache_tokens, 256);
    assert_eq!(complete(&engine, Request::tokens([1; 200]).max_tokens(56).ignore_eos()).tokens.len(), 56);
}

#[test]
fn a_cache_of_latent_vectors_is_not_quantized() {
    for (kv_cache, name) in [(KvCacheType::Int8, "int8"), (KvCacheType::Uint4, "uint4")] {
        let found = complaint(Engine::load(golden("deepseek-v2")).kv_cache(kv_cache));
        assert_eq!(found, format!("load: a KV cache of latent vectors in {name} is not supported by the cpu backend"));
    }
    for kv_cache in [KvCacheType::F16, KvCacheType::BF16] {
        let engine = load(Engine::load(golden("deepseek-v2")).kv_cache(kv_cache));
        assert_eq!(complete(&engine, Request::tokens([5; 40]).max_tokens(8).ignore_eos()).tokens.len(), 8);
    }
}

#[track_caller]
fn check_request(engine: &Engine, request: impl Into<Request>, wanted: &str) {
    let mut items = engine.blocking().generate(request);
    assert_eq!(with_causes(&items.next().unwrap().unwrap_err()), wanted);
    assert!(items.next().is_none(), "a stream ends with its error");
}

#[test]
fn bad_requests_beside_a_good_one() {
    let engine = load(Engine::load(tiny()));
    let good = || Request::tokens([5, 6, 7]).max_tokens(240).ignore_eos().logprobs(1);
    let alone = Answer::from(&complete(&engine, good()));
    let in_flight = std::thread::spawn({
        let engine = engine.clone();
        move || complete(&engine, good())
    });

    let check = |request: Request, wanted: &str| check_request(&engine, request, wanted);
    let request = || Request::tokens([1, 2, 3]);
    check(Request::tokens([]), "the prompt has no tokens; at least one is needed to go on from");
    check(
        Request::text("").add_special_tokens(false),
        "the prompt has no tokens; at least one is needed to go on from",
    );
    let too_long = "tokens does not fit: a context of 256 has room for 255 and one to generate";
    check(Request::tokens([1; 256]), &format!("prompt of 256 {too_long}"));
    check(Request::tokens([1; 100_000]), &format!("prompt of 100000 {too_long}"));
    check(Request::text("<s>".repeat(300)), &format!("prompt of 301 {too_long}"));
    let unknown = "the vocabulary has 400 tokens, numbered from 0";
    check(Request::tokens([1, 400]), &format!("prompt names token 400; {unknown}"));
    check(request().stop_token(400), &format!("stop_token names token 400; {unknown}"));
    check(request().logit_bias(u32::MAX, 1.0), &format!("logit_bias names token 4294967295; {unknown}"));
    check(request().temperature(f32::NAN), "temperature is NaN, wanted a finite number of at least 0");
    check(request().top_p(1.5), "top_p is 1.5, wanted a number in (0, 1]");
    check(request().top_p(0.0), "top_p is 0, wanted a number in (0, 1]");
    check(request().min_p(f32::NAN), "min_p is NaN, wanted a number in [0, 1]");
    check(request().repetition_penalty(0.0), "repetition_penalty is 0, wanted a finite number above 0");
    check(request().stop("x").stop(""), "stop string 1 is empty");
    check(request().max_tokens(0), "max_tokens is 0, wanted at least 1");
    check(request().max_tokens(2).min_tokens(3), "min_tokens is 3, more than the 2 tokens that may be generated");
    check(request().logprobs(21), "logprobs of 21 alternatives, wanted at most 20");
    check(Request::chat([]), "the chat has no messages; at least one is needed");

    let prompt_logits = |tokens: &[u32]| engine.blocking().prompt_logits(tokens).unwrap_err().to_string();
    assert_eq!(prompt_logits(&[]), "the prompt has no tokens; at least one is needed to go on from");
    assert_eq!(prompt_logits(&[1; 257]), "257 tokens to compute the logits of do not fit a context of 256");
    assert_eq!(prompt_logits(&[3, 400]), format!("prompt names token 400; {unknown}"));

    assert_eq!(Answer::from(&in_flight.join().unwrap()), alone);
    assert_eq!(Answer::from(&complete(&engine, good())), alone);
    assert_eq!(engine.stats().queued, 0);
}
