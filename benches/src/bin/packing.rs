//! How fast weights are packed while a model is loaded; see [`USAGE`].

#![expect(clippy::print_stdout, reason = "what it measures is its output")]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use benches::arguments::{self, ArgumentError, Arguments};
use dashinfer_kernels::cpu::{CpuBackend, CpuConfig, PoolConfig, to_bytes};
use dashinfer_kernels::{BlockFormat, DType};
use dashinfer_models::{
    Decoder, Gguf, HfConfig, ModelSpec, StepLimits, StoredType, TensorInfo, WeightCache, WeightSource,
};
use serde_json::{Value, json};

const USAGE: &str = "\
usage: packing [OPTION ...]

Loads a model of one layer, whose weights are random and in memory, and prints the bytes of stored weights that a core packs in a
second: of the time that the thread was computing, best of several loads, so that others on the machine disturb little. With
--threads, what several pack together, by the clock.

  --only TEXT           those paths whose names have this in them
  --hidden N            width of the layer, a multiple of 256 (default: 2048); its inner one is four times as wide
  --repeat N            loads of each (default: 5)
  --threads N           threads that pack (default: 1)
  --digest              print a hash of all that was packed in place of the rate: what makes packing faster changes none of them
";

struct Options {
    only: Option<String>,
    hidden: usize,
    repeat: usize,
    threads: NonZeroUsize,
    digest: bool,
}

impl Options {
    fn parse(mut args: Arguments) -> Result<Self, ArgumentError> {
        let count = |found: Option<NonZeroUsize>, usual| found.map_or(usual, NonZeroUsize::get);
        let options = Self {
            only: args.value("--only")?,
            hidden: count(args.value("--hidden")?, 2048),
            repeat: count(args.value("--repeat")?, 5),
            threads: args.value("--threads")?.unwrap_or(NonZeroUsize::MIN),
            digest: args.flag("--digest"),
        };
        args.finish()?;
        if options.hidden.is_multiple_of(256) {
            return Ok(options);
        }
        Err(ArgumentError("--hidden is to be a multiple of 256".to_owned()))
    }
}

/// How the matrices of a checkpoint are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stored {
    Bf16,
    Gptq,
    Awq,
    Fp8,
    Mxfp4,
    Gguf(BlockFormat),
}

/// Each with what it is packed as, where that is not said by how it is stored.
const PATHS: [(Stored, &str); 17] = [
    (Stored::Bf16, "none"),
    (Stored::Bf16, "a16w8"),
    (Stored::Bf16, "a8w8"),
    (Stored::Bf16, "a16w8-g32"),
    (Stored::Bf16, "a16w4-g32"),
    (Stored::Bf16, "a16w4-g128"),
    (Stored::Bf16, "a16w4-g128-zp"),
    (Stored::Gptq, "stored"),
    (Stored::Awq, "stored"),
    (Stored::Fp8, "stored"),
    (Stored::Fp8, "a8w8"),
    (Stored::Mxfp4, "stored"),
    (Stored::Gguf(BlockFormat::Q4_0), "stored"),
    (Stored::Gguf(BlockFormat::Q8_0), "stored"),
    (Stored::Gguf(BlockFormat::Q4K), "stored"),
    (Stored::Gguf(BlockFormat::Q6K), "stored"),
    (Stored::Gguf(BlockFormat::Mxfp4), "stored"),
];

impl std::fmt::Display for Stored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bf16 => f.write_str("bf16"),
            Self::Gptq => f.write_str("gptq g128"),
            Self::Awq => f.write_str("awq g128"),
            Self::Fp8 => f.write_str("fp8 128x128"),
            Self::Mxfp4 => f.write_str("mxfp4"),
            Self::Gguf(format) => write!(f, "gguf {format}"),
        }
    }
}

/// The generator of Knuth's MMIX, of which the upper bits are the good ones.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 32
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(4)).flat_map(|_| (self.next() as u32).to_le_bytes()).take(len).collect()
    }

    /// About normally distributed, of the size that weights have.
    fn weights(&mut self, len: usize, dtype: DType) -> Vec<u8> {
        let part = |bits: u64, shift: u32| (bits >> shift & 255) as f32;
        let values = (0..len).map(|_| {
            let bits = self.next();
            ([0, 8, 16, 24].map(|shift| part(bits, shift)).iter().sum::<f32>() - 510.0) * 1e-4
        });
        to_bytes(&values.collect::<Vec<_>>(), dtype)
    }

    /// Between a half and three halves of `size`.
    fn scales(&mut self, len: usize, size: f32, dtype: DType) -> Vec<u8> {
        let values: Vec<f32> = (0..len).map(|_| size * (0.5 + (self.next() & 0xffff) as f32 / 65536.0)).collect();
        to_bytes(&values, dtype)
    }
}

/// Tensors in memory.
#[derive(Default)]
struct Tensors(BTreeMap<String, (TensorInfo, Vec<u8>)>);

impl Tensors {
    fn put(&mut self, name: String, dtype: StoredType, shape: &[usize], bytes: Vec<u8>) {
        self.0.insert(name, (TensorInfo { dtype, shape: shape.to_vec() }, bytes));
    }

    fn bytes(&self) -> usize {
        self.0.values().map(|(_, bytes)| bytes.len()).sum()
    }

    /// What makes the weight of a module of `rows` by `cols`.
    fn module(&mut self, stored: Stored, module: &str, [rows, cols]: [usize; 2], random: &mut Random) {
        let other = |name: &str| StoredType::Other(name.to_owned());
        let float = StoredType::Float;
        let groups = cols / 128;
        match stored {
            Stored::Bf16 => {
                let bytes = random.weights(rows * cols, DType::BF16);
                self.put(format!("{module}.weight"), float(DType::BF16), &[rows, cols], bytes);
            }
            Stored::Gptq => {
                let mut put = |name: &str, shape: [usize; 2], bytes| {
                    self.put(format!("{module}.{name}"), other("I32"), &shape, bytes);
                };
                put("qweight", [cols / 8, rows], random.bytes(rows * cols / 2));
                put("qzeros", [groups, rows / 8], vec![0x77; groups * rows / 2]);
                let scales = random.scales(groups * rows, 0.01, DType::F16);
                self.put(format!("{module}.scales"), float(DType::F16), &[groups, rows], scales);
            }
            Stored::Awq => {
                let mut put = |name: &str, shape: [usize; 2], bytes| {
                    self.put(format!("{module}.{name}"), other("I32"), &shape, bytes);
                };
                put("qweight", [cols, rows / 8], random.bytes(rows * cols / 2));
                put("qzeros", [groups, rows / 8], random.bytes(groups * rows / 2));
                let scales = random.scales(groups * rows, 0.01, DType::F16);
                self.put(format!("{module}.scales"), float(DType::F16), &[groups, rows], scales);
            }
            Stored::Fp8 => {
                // But for what is no number.
                let bytes = random.bytes(rows * cols).into_iter().map(|byte| if byte & 127 == 127 { 0 } else { byte });
                let shape = [rows / 128, cols / 128];
                let scales = random.scales(shape[0] * shape[1], 1e-3, DType::F32);
                self.put(format!("{module}.weight"), other("F8_E4M3"), &[rows, cols], bytes.collect());
                self.put(format!("{module}.weight_scale_inv"), float(DType::F32), &shape, scales);
            }
            Stored::Mxfp4 | Stored::Gguf(_) => unreachable!("these are stored by other names"),
        }
    }
}

impl WeightSource for Tensors {
    fn names(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.0.get(name).map(|(info, _)| info.clone())
    }

    fn read(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        self.0.get(name).map(|(_, bytes)| Cow::Borrowed(&bytes[..]))
    }
}

const VOCAB: usize = 256;
const EXPERTS: usize = 32;

/// A model of one layer, its weights and their bytes.
struct Model {
    spec: ModelSpec,
    source: Box<dyn WeightSource>,
    bytes: usize,
    /// Goes with the model.
    _file: Option<File>,
}

/// A file that is removed when it is done with.
struct File(PathBuf);

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Model {
    fn new(stored: Stored, hidden: usize) -> Result<Self, Box<dyn Error>> {
        match stored {
            Stored::Gguf(format) => Self::gguf(format, hidden),
            Stored::Mxfp4 => Self::gpt_oss(hidden),
            _ => Self::llama(stored, hidden),
        }
    }

    fn of(config: &Value, tensors: Tensors) -> Result<Self, Box<dyn Error>> {
        let (spec, bytes) = (HfConfig::parse(&config.to_string())?.to_spec()?, tensors.bytes());
        Ok(Self { spec, source: Box::new(tensors), bytes, _file: None })
    }

    fn llama(stored: Stored, hidden: usize) -> Result<Self, Box<dyn Error>> {
        let (inner, mut tensors, mut random) = (4 * hidden, Tensors::default(), Random(1));
        let mut config = config("LlamaForCausalLM", hidden, inner);
        match stored {
            Stored::Gptq => {
                config["quantization_config"] = json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": true,
                    "desc_act": false});
            }
            Stored::Awq => {
                config["quantization_config"] = json!({"quant_method": "awq", "bits": 4, "group_size": 128,
                    "zero_point": true, "version": "gemm"});
            }
            Stored::Fp8 => {
                config["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
            }
            _ => {}
        }
        for (module, shape) in [
            ("self_attn.q_proj", [hidden, hidden]),
            ("self_attn.k_proj", [hidden, hidden]),
            ("self_attn.v_proj", [hidden, hidden]),
            ("self_attn.o_proj", [hidden, hidden]),
            ("mlp.gate_proj", [inner, hidden]),
            ("mlp.up_proj", [inner, hidden]),
            ("mlp.down_proj", [hidden, inner]),
        ] {
            tensors.module(stored, &format!("model.layers.0.{module}"), shape, &mut random);
        }
        put_small(&mut tensors, hidden, &mut random);
        Self::of(&config, tensors)
    }

    fn gpt_oss(hidden: usize) -> Result<Self, Box<dyn Error>> {
        let (mut tensors, mut random) = (Tensors::default(), Random(1));
        let mut config = config("GptOssForCausalLM", hidden, hidden);
        for (key, value) in [
            ("quantization_config", json!({"quant_method": "mxfp4"})),
            ("rope_scaling", json!({"rope_type": "default"})),
            ("num_local_experts", json!(EXPERTS)),
            ("num_experts_per_tok", json!(2)),
            ("attention_bias", json!(false)),
            ("sliding_window", json!(128)),
        ] {
            config[key] = value;
        }
        for module in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            let module = format!("model.layers.0.self_attn.{module}");
            tensors.module(Stored::Bf16, &module, [hidden, hidden], &mut random);
        }
        let bf16 = || StoredType::Float(DType::BF16);
        let mut vector = |name: &str, shape: &[usize]| {
            let bytes = random.weights(shape.iter().product(), DType::BF16);
            tensors.put(format!("model.layers.0.{name}"), bf16(), shape, bytes);
        };
        vector("self_attn.sinks", &[hidden / 128]);
        vector("mlp.router.weight", &[EXPERTS, hidden]);
        vector("mlp.router.bias", &[EXPERTS]);
        vector("mlp.experts.gate_up_proj_bias", &[EXPERTS, 2 * hidden]);
        vector("mlp.experts.down_proj_bias", &[EXPERTS, hidden]);
        for (name, rows) in [("gate_up_proj", 2 * hidden), ("down_proj", hidden)] {
            let (name, blocks) = (format!("model.layers.0.mlp.experts.{name}"), [EXPERTS, rows, hidden / 32]);
            let count = blocks.iter().product::<usize>();
            let u8 = || StoredType::Other("U8".to_owned());
            let shape = [blocks[0], blocks[1], blocks[2], 16];
            tensors.put(format!("{name}_blocks"), u8(), &shape, random.bytes(16 * count));
            let exponents = random.bytes(count).into_iter().map(|byte| 118 + byte % 4).collect();
            tensors.put(format!("{name}_scales"), u8(), &blocks, exponents);
        }
        put_small(&mut tensors, hidden, &mut random);
        Self::of(&config, tensors)
    }

    fn gguf(format: BlockFormat, hidden: usize) -> Result<Self, Box<dyn Error>> {
        let (inner, mut random) = (4 * hidden, Random(1));
        let number = format.type_number();
        let path = std::env::temp_dir().join(format!("dashinfer-packing-{}-{number}.gguf", std::process::id()));
        let file = File(path);
        let mut tensors: Vec<(&str, Vec<usize>, u32, Vec<u8>)> = vec![
            ("token_embd.weight", vec![VOCAB, hidden], 30, random.weights(VOCAB * hidden, DType::BF16)),
            ("output_norm.weight", vec![hidden], 0, to_bytes(&vec![1.0; hidden], DType::F32)),
            ("blk.0.attn_norm.weight", vec![hidden], 0, to_bytes(&vec![1.0; hidden], DType::F32)),
            ("blk.0.ffn_norm.weight", vec![hidden], 0, to_bytes(&vec![1.0; hidden], DType::F32)),
        ];
        for (name, [rows, cols]) in [
            ("blk.0.attn_q.weight", [hidden, hidden]),
            ("blk.0.attn_k.weight", [hidden, hidden]),
            ("blk.0.attn_v.weight", [hidden, hidden]),
            ("blk.0.attn_output.weight", [hidden, hidden]),
            ("blk.0.ffn_gate.weight", [inner, hidden]),
            ("blk.0.ffn_up.weight", [inner, hidden]),
            ("blk.0.ffn_down.weight", [hidden, inner]),
        ] {
            let bytes = blocks(format, rows * cols / format.block_len(), &mut random);
            tensors.push((name, vec![rows, cols], number, bytes));
        }
        // Of Qwen2, whose files have the rows of q and k as they are multiplied with.
        let numbers = [
            ("context_length", 512),
            ("embedding_length", hidden),
            ("block_count", 1),
            ("feed_forward_length", inner),
            ("attention.head_count", hidden / 128),
        ];
        for name in ["blk.0.attn_q.bias", "blk.0.attn_k.bias", "blk.0.attn_v.bias"] {
            tensors.push((name, vec![hidden], 0, vec![0; 4 * hidden]));
        }
        std::fs::write(&file.0, gguf_bytes(&numbers, &tensors))?;
        let gguf = Gguf::open(&file.0)?;
        let spec = gguf.spec()?;
        let weights = gguf.into_weights(&spec);
        let bytes = weights.data_bytes() as usize;
        Ok(Self { spec, source: Box::new(weights), bytes, _file: Some(file) })
    }
}

fn config(architecture: &str, hidden: usize, inner: usize) -> Value {
    json!({"architectures": [architecture], "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 1,
        "num_attention_heads": hidden / 128, "num_key_value_heads": hidden / 128, "head_dim": 128, "vocab_size": VOCAB,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": true})
}

/// The embedding and the norms.
fn put_small(tensors: &mut Tensors, hidden: usize, random: &mut Random) {
    let bf16 = || StoredType::Float(DType::BF16);
    tensors.put(
        "model.embed_tokens.weight".to_owned(),
        bf16(),
        &[VOCAB, hidden],
        random.weights(VOCAB * hidden, DType::BF16),
    );
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    for name in ["model.norm.weight".to_owned(), layer("input_layernorm"), layer("post_attention_layernorm")] {
        tensors.put(name, bf16(), &[hidden], to_bytes(&vec![1.0; hidden], DType::BF16));
    }
}

/// Random blocks, with scales that weights have.
fn blocks(format: BlockFormat, count: usize, random: &mut Random) -> Vec<u8> {
    let size = format.block_bytes();
    let mut bytes = random.bytes(count * size);
    let (halves, typical): (&[usize], f32) = match format {
        BlockFormat::Q4K => (&[0, 2], 2e-4),
        BlockFormat::Q6K => (&[208], 4e-5),
        BlockFormat::Mxfp4 => (&[], 0.0),
        _ => (&[0], 2e-3),
    };
    for block in bytes.chunks_exact_mut(size) {
        for at in halves {
            block[*at..at + 2].copy_from_slice(&random.scales(1, typical, DType::F16));
        }
        if format == BlockFormat::Mxfp4 {
            block[0] = 118 + block[0] % 4;
        }
    }
    bytes
}

/// A file of the format, version 3: `numbers` behind the architecture's name, and tensors of a name, a shape, the number of a type and bytes.
fn gguf_bytes(numbers: &[(&str, usize)], tensors: &[(&str, Vec<usize>, u32, Vec<u8>)]) -> Vec<u8> {
    const ALIGNMENT: usize = 32;
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((numbers.len() as u64 + 1).to_le_bytes());
    text(&mut out, "general.architecture");
    out.extend(8u32.to_le_bytes());
    text(&mut out, "qwen2");
    for (key, value) in numbers {
        text(&mut out, &format!("qwen2.{key}"));
        out.extend(4u32.to_le_bytes());
        out.extend((*value as u32).to_le_bytes());
    }
    let mut offset = 0;
    for (name, shape, number, bytes) in tensors {
        text(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|size| out.extend((*size as u64).to_le_bytes()));
        out.extend(number.to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset = (offset + bytes.len()).next_multiple_of(ALIGNMENT);
    }
    for (_, _, _, bytes) in tensors {
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out.extend(bytes);
    }
    out
}

/// A source under a name that does not change, so that what is packed of it may be stored.
struct Named<'a>(&'a mut dyn WeightSource);

impl WeightSource for Named<'_> {
    fn names(&self) -> Vec<&str> {
        self.0.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.0.info(name)
    }

    fn read(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        self.0.read(name)
    }

    fn identity(&self) -> Option<String> {
        Some("random weights".to_owned())
    }

    fn done_with_rows(&self, name: &str, rows: Range<usize>) {
        self.0.done_with_rows(name, rows);
    }

    fn release(&mut self, name: &str) {
        self.0.release(name);
    }
}

/// A folder that is removed when it is done with.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// How long this thread has been computing; where the system does not tell, the time.
fn busy_time(start: Instant) -> Duration {
    // The system counts at its ticks, milliseconds apart, and when a thread stops.
    std::thread::sleep(Duration::from_micros(1));
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = told.and_then(|told| told.split(' ').next()?.parse().ok());
    nanoseconds.map_or_else(|| start.elapsed(), Duration::from_nanos)
}

/// Loads `model`.
fn load(
    model: &mut Model,
    quantization: &str,
    threads: NonZeroUsize,
    cache: Option<&WeightCache>,
) -> Result<Decoder<CpuBackend>, Box<dyn Error>> {
    let pool = PoolConfig { threads: Some(threads), cores: Vec::new() };
    let backend = CpuBackend::new(&CpuConfig { pool, ..CpuConfig::default() })?;
    let (spec, limits) = (model.spec.clone(), StepLimits { max_tokens: 1, max_logit_rows: 1 });
    let (asked, mut source) = (quantization.parse()?, Named(&mut *model.source));
    Ok(Decoder::load_with_cache(backend, spec, &mut source, limits, asked, cache, &mut |_| ())?)
}

/// FNV-1a of the file of all packed buffers, and what was packed.
fn digest(model: &mut Model, quantization: &str) -> Result<(u64, Decoder<CpuBackend>), Box<dyn Error>> {
    let folder = Folder(std::env::temp_dir().join(format!("dashinfer-packing-{}", std::process::id())));
    let decoder = load(model, quantization, NonZeroUsize::MIN, Some(&WeightCache::new(&folder.0)))?;
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for entry in std::fs::read_dir(&folder.0)? {
        let bytes = std::fs::read(entry?.path())?;
        hash = bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    }
    Ok((hash, decoder))
}

fn becomes(decoder: &Decoder<CpuBackend>, quantization: &str) -> String {
    let conversions: Vec<_> = decoder.conversions().iter().map(ToString::to_string).collect();
    if conversions.is_empty() {
        (if quantization == "none" { "as stored" } else { quantization }).to_owned()
    } else {
        conversions.join("; ")
    }
}

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let one_thread = options.threads == NonZeroUsize::MIN;
    let time = || if one_thread { busy_time(start) } else { start.elapsed() };
    let last = match (options.digest, options.threads.get()) {
        (true, _) => "digest".to_owned(),
        (false, 1) => "a core".to_owned(),
        (false, threads) => format!("{threads} threads"),
    };
    println!("{:<14} {:<14} {:<40} {:>9} {:>16}", "stored", "asked for", "becomes", "MB", last);
    for (stored, quantization) in PATHS {
        let name = format!("{stored} {quantization}");
        if options.only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
            continue;
        }
        let mut model = Model::new(stored, options.hidden)?;
        let (found, form) = if options.digest {
            let (hash, decoder) = digest(&mut model, quantization)?;
            (format!("{hash:016x}"), becomes(&decoder, quantization))
        } else {
            let (mut best, mut form) = (Duration::MAX, String::new());
            for _ in 0..options.repeat {
                let before = time();
                let decoder = load(&mut model, quantization, options.threads, None)?;
                best = best.min(time() - before);
                form = becomes(&decoder, quantization);
            }
            (format!("{:.2} GB/s", model.bytes as f64 / best.as_secs_f64() / 1e9), form)
        };
        println!(
            "{:<14} {quantization:<14} {form:<40} {:>9.1} {found:>16}",
            stored.to_string(),
            model.bytes as f64 / 1e6
        );
    }
    Ok(())
}

fn main() -> ExitCode {
    arguments::main("packing", USAGE, Options::parse, |options| {
        run(&options)?;
        Ok(ExitCode::SUCCESS)
    })
}
