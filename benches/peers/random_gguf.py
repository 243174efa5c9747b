#!/usr/bin/env python3
"""Writes a GGUF with random weights in a published shape, so that llama.cpp can be timed without a download.

usage: random_gguf.py SHAPE TYPE OUT

  SHAPE   qwen2.5-0.5b, qwen2.5-1.5b or qwen2.5-7b, as in `throughput --shape`
  TYPE    f16, bf16, q8_0 or q4_0, of all matrices
  OUT     the file

Needs numpy and gguf (`pip install numpy gguf`, or the `gguf-py` folder of the llama.cpp in question in PYTHONPATH).
Takes about a second for 100 MB. The same arguments give the same file.
"""

import sys

import gguf
import numpy as np

# Hidden size, layers, query heads, key/value heads, MLP size, vocabulary, tied; from the models' pages on the hub.
SHAPES = {
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151936, True),
    "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, 151936, True),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064, False),
}

# Of a block of 32 quantized weights: bytes, and the scale in front. Scales are of the size that a trained model has.
BLOCKS = {"q8_0": (34, 0.0003), "q4_0": (18, 0.004)}

TYPES = {
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}


def matrix(random, dtype, rows, cols):
    """Random weights `[rows, cols]`, in the bytes of the type."""
    if dtype in BLOCKS:
        size, scale = BLOCKS[dtype]
        blocks = random.integers(0, 256, (rows * cols // 32, size), dtype=np.uint8)
        blocks[:, :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        return blocks.reshape(rows, -1)
    values = random.standard_normal((rows, cols), dtype=np.float32) * np.float32(0.02)
    if dtype == "f16":
        return values.astype(np.float16)
    return np.ascontiguousarray((values.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8)


def write(shape, dtype, path):
    """Writes the file."""
    hidden, layers, heads, kv_heads, mlp, vocab, tied = SHAPES[shape]
    head_dim = hidden // heads
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(32768)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    # A tokenizer that can be loaded is all that is wanted of it.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"<t{i}>" for i in range(vocab)])
    writer.add_token_types([1] * vocab)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def weight(name, rows, cols):
        writer.add_tensor(f"{name}.weight", matrix(random, dtype, rows, cols), raw_dtype=TYPES[dtype])

    def norm(name):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))

    def biased(name, rows):
        weight(name, rows, hidden)
        writer.add_tensor(f"{name}.bias", (random.standard_normal(rows) * 0.01).astype(np.float32))

    weight("token_embd", vocab, hidden)
    norm("output_norm")
    if not tied:
        weight("output", vocab, hidden)
    for layer in range(layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
        biased(f"{block}.attn_q", heads * head_dim)
        biased(f"{block}.attn_k", kv_heads * head_dim)
        biased(f"{block}.attn_v", kv_heads * head_dim)
        weight(f"{block}.attn_output", hidden, heads * head_dim)
        weight(f"{block}.ffn_gate", mlp, hidden)
        weight(f"{block}.ffn_up", mlp, hidden)
        weight(f"{block}.ffn_down", hidden, mlp)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    if len(sys.argv) != 4 or sys.argv[1] not in SHAPES or sys.argv[2] not in TYPES:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    write(*sys.argv[1:])


if __name__ == "__main__":
    main()
