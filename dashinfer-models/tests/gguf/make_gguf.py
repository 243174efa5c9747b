"""Small GGUF files, and what is in them.

    python make_gguf.py OUT          writes the files beside this script again, the same bytes for the same versions

Made with gguf 0.19.0, numpy 2.4.6 and sentencepiece 0.2.3 (Python 3.11). The goldens are read from ../goldens.

blocks.gguf                   a tensor of random blocks in each format, and its values as `gguf.quants.dequantize` has them
llama-v5-config.bf16.gguf     the golden of that name as the usual converter writes it: rows of q and k in the order that pairs
                              neighbours, the scaling of the rotary embedding as factors, the byte-level tokenizer
qwen2-yarn.q8_0-q4_0.gguf     the golden of that name: attention and embedding in Q8_0, the rest in Q4_0
superblocks.gguf              a tiny llama of random blocks of 256 weights, of every format of them, and of blocks of 32
sentencepiece.gguf            a SentencePiece tokenizer alone, trained on a text below
sentencepiece.json            texts and their ids by SentencePiece itself
"""

import json
import struct
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, TokenType

HERE = Path(__file__).parent
GOLDENS = HERE.parent / "goldens"


# --- blocks -------------------------------------------------------------------------------------------------------------

# Where a block has its f16 numbers, and how large they are for weights of about 0.05.
HALVES = {
    Type.Q4_0: [(0, 0.01)],
    Type.Q4_1: [(0, 0.01), (2, 0.08)],
    Type.Q5_0: [(0, 0.005)],
    Type.Q5_1: [(0, 0.005), (2, 0.08)],
    Type.Q8_0: [(0, 0.0007)],
    Type.Q2_K: [(80, 0.004), (82, 0.008)],
    Type.Q3_K: [(108, 0.0015)],
    Type.Q4_K: [(0, 0.0002), (2, 0.0016)],
    Type.Q5_K: [(0, 0.0001), (2, 0.0016)],
    Type.Q6_K: [(208, 0.00004)],
    Type.IQ4_NL: [(0, 0.0007)],
    Type.IQ4_XS: [(0, 0.00004)],
    Type.MXFP4: [],
}


def random_blocks(rng, kind, rows, cols):
    """Random bytes with sensible f16 numbers: a smallest weight is negative where it is added, positive where it is taken off."""
    length, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * cols // length, size), dtype=np.uint8)
    for number, (at, typical) in enumerate(HALVES[kind]):
        values = typical * rng.uniform(0.5, 1.5, len(blocks))
        if number == 1 and kind in (Type.Q4_1, Type.Q5_1):
            values = -values
        elif number == 0:
            values = values * rng.choice([-1, 1], len(blocks), p=[0.25, 0.75])
        blocks[:, at : at + 2] = values.astype(np.float16).view(np.uint8).reshape(-1, 2)
    if kind == Type.MXFP4:
        blocks[:, 0] = [120, 0, 1]  # the exponents, two of them of numbers below the normal ones
    return blocks.reshape(rows, cols // length * size)


def write_blocks(out):
    rng = np.random.default_rng(1)
    writer = GGUFWriter(out / "blocks.gguf", "blocks")
    for kind in HALVES:
        length, _ = gguf.GGML_QUANT_SIZES[kind]
        blocks = random_blocks(rng, kind, 1, max(length * 2, 96))
        writer.add_tensor(f"{kind.name}.blocks", blocks, raw_dtype=kind)
        writer.add_tensor(f"{kind.name}.values", gguf.quants.dequantize(blocks, kind).astype(np.float32))
    finish(writer)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- goldens ------------------------------------------------------------------------------------------------------------


def read_safetensors(path):
    """Tensors of bf16 as f32."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, data = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        assert info["dtype"] == "BF16", info
        start, end = info["data_offsets"]
        halves = np.frombuffer(data[start:end], dtype=np.uint16).astype(np.uint32) << 16
        tensors[name] = halves.view(np.float32).reshape(info["shape"])
    return tensors


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def paired(weight, heads):
    """Row `i` and `i + D / 2` of each head, side by side."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def llama3_factors(config):
    rope = config.get("rope_parameters") or config["rope_scaling"]
    theta = rope.get("rope_theta") or config["rope_theta"]
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    factors = []
    for freq in 1.0 / theta ** (np.arange(0, dim, 2) / dim):
        turns = rope["original_max_position_embeddings"] * freq / (2 * np.pi)
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(factor)
        else:
            keep = (turns - low) / (high - low)
            factors.append(1.0 / ((1 - keep) / factor + keep))
    return np.array(factors, dtype=np.float32)


def add_model(writer, arch, config):
    rope = config.get("rope_parameters") or {}
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_name("a golden")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(rope.get("rope_theta") or config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    scaling = config.get("rope_scaling")
    if scaling and scaling.get("type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if arch == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head_dim)


def add_byte_level_tokenizer(writer, folder, pre, vocab_size):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    ids = dict(tokenizer["model"]["vocab"])
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    ids.update({token["content"]: token["id"] for token in added.values()})
    by_id = {id: token for token, id in ids.items()}
    tokens, types = [], []
    for id in range(vocab_size):
        if id not in by_id:
            tokens.append(f"[PAD{id}]")
            types.append(TokenType.UNUSED)
            continue
        tokens.append(by_id[id])
        special = id in added and added[id]["special"]
        types.append(TokenType.CONTROL if special else TokenType.USER_DEFINED if id in added else TokenType.NORMAL)
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    config = json.loads((folder / "config.json").read_text())
    eos = config["eos_token_id"]
    writer.add_eos_token_id(eos[-1] if isinstance(eos, list) else eos)
    if config.get("bos_token_id") is not None:
        writer.add_bos_token_id(config["bos_token_id"])
    if config.get("pad_token_id") is not None:
        writer.add_pad_token_id(config["pad_token_id"])
    template = folder / "chat_template.jinja"
    writer.add_chat_template(template.read_text() if template.exists() else settings["chat_template"])


def write_golden(out, case, arch, pre, suffix, kind_of):
    folder = GOLDENS / case
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(out / f"{case}.{suffix}.gguf", arch)
    add_model(writer, arch, config)
    add_byte_level_tokenizer(writer, folder, pre, config["vocab_size"])
    if arch == "llama":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    for name, weight in read_safetensors(folder / "model.safetensors").items():
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            weight = paired(weight, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        kind = Type.F32 if weight.ndim == 1 else kind_of(name)
        data = gguf.quants.quantize(np.ascontiguousarray(weight), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    finish(writer)


# --- superblocks --------------------------------------------------------------------------------------------------------


def write_superblocks(out):
    rng = np.random.default_rng(2)
    config = {
        "max_position_embeddings": 64, "hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
        "vocab_size": 48,
    }
    writer = GGUFWriter(out / "superblocks.gguf", "llama")
    writer.add_custom_alignment(64)
    add_model(writer, "llama", config)
    writer.add_tokenizer_model("none")
    kinds = [
        {"attn_q": Type.Q4_K, "attn_k": Type.Q4_K, "attn_v": Type.Q6_K, "attn_output": Type.Q5_1, "ffn_gate": Type.Q2_K,
         "ffn_up": Type.Q3_K, "ffn_down": Type.Q5_0},
        {"attn_q": Type.Q3_K, "attn_k": Type.Q3_K, "attn_v": Type.Q5_K, "attn_output": Type.Q4_1, "ffn_gate": Type.IQ4_XS,
         "ffn_up": Type.IQ4_XS, "ffn_down": Type.IQ4_NL},
    ]
    sizes = {
        "attn_q": (64, 256), "attn_k": (32, 256), "attn_v": (32, 256), "attn_output": (256, 64), "ffn_gate": (32, 256),
        "ffn_up": (32, 256), "ffn_down": (256, 32),
    }
    writer.add_tensor("token_embd.weight", random_blocks(rng, Type.Q6_K, 48, 256), raw_dtype=Type.Q6_K)
    writer.add_tensor("output_norm.weight", np.ones(256, dtype=np.float32))
    for layer in range(2):
        for part, kind in kinds[layer].items():
            blocks = random_blocks(rng, kind, *sizes[part])
            writer.add_tensor(f"blk.{layer}.{part}.weight", blocks, raw_dtype=kind)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", rng.uniform(0.5, 1.5, 256).astype(np.float32))
    finish(writer)


# --- sentencepiece ------------------------------------------------------------------------------------------------------

TEXTS = [
    "", "Hello, world!", "Hello,  world!", " leading", "trailing ", "  two  spaces  ", "a\nb\n\nc\t d", "the quick brown fox",
    "THE QUICK BROWN FOX", "naïve café, 你好, こんにちは 🦀", "1234567 + 89 = 1234656", "it's we'll they're", "aaaaaaaaaaaaa",
    "fn main() { println!(\"{}\", 1 << 7); }", "<s> is spelt out", "weights of the model are mapped and the model is small",
]


# Texts of one kind have more to merge than such as these; but these stay what they are.
CORPUS = """
The weights of a model are mapped into memory, and the pages that a step reads stay there. A smaller model is read faster.
When the light of the lamp falls on the table, the table throws a shadow; when the lamp is moved, the shadow moves with it.
In the morning the boats come back to the harbour with their nets, and the gulls follow them over the quay and the market.
A sequence of tokens is continued one token at a time. The model gives a number to each token that may come next.
fn main() {
    let numbers: Vec<u32> = (0..100).filter(|number| number % 3 == 0).collect();
    println!("{} numbers, the last of them {:?}", numbers.len(), numbers.last());
}
def scale(values, factor=2.0):
    return [value * factor for value in values]
The quick brown fox jumps over the lazy dog. The lazy dog sleeps on; the quick brown fox is over the hill by then.
There are 1024 rows and 2048 columns, 12 layers, 16 heads of 64, and a context of 4096 tokens: 805306368 bytes in all.
It's said that we'll know them by what they're doing, not by what they'd like to have done. That isn't always so.
Le café du coin est fermé le lundi; on y va mardi. Über den Dächern der Stadt liegt Schnee. El niño corrió hasta la esquina.
"""


def write_sentencepiece(out):
    corpus = CORPUS.strip().splitlines()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "corpus.txt"
        text.write_text("\n".join(corpus))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=f"{folder}/model", model_type="bpe", vocab_size=480, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True, num_threads=1,
            character_coverage=0.995, allow_whitespace_only_pieces=True, split_digits=True, minloglevel=2,
        )
        model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/model.model")
    tokens, scores, types = [], [], []
    for id in range(model.vocab_size()):
        tokens.append(model.id_to_piece(id))
        scores.append(model.get_score(id))
        types.append(
            TokenType.UNKNOWN if model.is_unknown(id)
            else TokenType.CONTROL if model.is_control(id)
            else TokenType.BYTE if model.is_byte(id)
            else TokenType.NORMAL
        )
    writer = GGUFWriter(out / "sentencepiece.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}")
    finish(writer)
    expected = [{"text": text, "ids": model.encode(text)} for text in TEXTS]
    (out / "sentencepiece.json").write_text(json.dumps(expected, ensure_ascii=False, indent=0) + "\n")


def main():
    out = Path(sys.argv[1])
    write_blocks(out)
    write_golden(out, "llama-v5-config", "llama", "llama-bpe", "bf16", lambda name: Type.BF16)
    wide = ("self_attn", "embed_tokens")
    eight = lambda name: Type.Q8_0 if any(part in name for part in wide) else Type.Q4_0
    write_golden(out, "qwen2-yarn", "qwen2", "qwen2", "q8_0-q4_0", eight)
    write_superblocks(out)
    write_sentencepiece(out)


if __name__ == "__main__":
    main()
