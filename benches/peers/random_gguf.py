#!/usr/bin/env python3
"""Writes a GGUF with random weights in a published shape, so that llama.cpp can be timed without a download.

The weights are normal, of deviation 0.02, rounded to their type as llama.cpp rounds them. Four million of them are made and
repeated from another start in each matrix: kernels do not take longer or shorter for that, and 7b takes seconds. The
same arguments give the same file. Needs numpy.
"""

import argparse
import struct

import numpy as np

# Hidden size, layers, query heads, key/value heads, MLP size, vocabulary, tied; from the models' pages on the hub.
SHAPES = {
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151936, True),
    "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, 151936, True),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064, False),
}

BLOCK = 32  # weights that share a scale
NUM_BLOCKS = 131071  # that are made of a type: a prime, so that few rows begin alike
F32 = 0  # of the types of GGUF
ALIGNMENT = 32  # of tensors in a file


def f16(weights):
    return weights.astype(np.float16)


def bf16(weights):
    return (weights.view(np.uint32) >> 16).astype(np.uint16)


def q8_0(weights):
    """A scale in f16 and 32 signed bytes: the largest magnitude becomes 127."""
    scale = np.abs(weights).max(axis=1, keepdims=True) / np.float32(127)
    values = np.rint(weights / scale).astype(np.int8)
    return np.hstack([scale.astype(np.float16).view(np.uint8), values.view(np.uint8)])


def q4_0(weights):
    """A scale in f16 and 32 times four bits less 8, the first 16 in the lower halves: the largest magnitude becomes -8."""
    largest = np.take_along_axis(weights, np.abs(weights).argmax(axis=1, keepdims=True), axis=1)
    scale = largest / np.float32(-8)
    values = np.minimum(15, weights / scale + np.float32(8.5)).astype(np.uint8)
    return np.hstack([scale.astype(np.float16).view(np.uint8), values[:, :16] | values[:, 16:] << 4])


# Number of the type of a tensor, and of a file that is mostly of that type, in GGUF; how its blocks are made.
TYPES = {"f16": (1, 1, f16), "bf16": (30, 32, bf16), "q8_0": (8, 7, q8_0), "q4_0": (2, 2, q4_0)}


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def value(item):
    """A typed value of the metadata: u32, f32, a string, or an array of strings or of i32."""
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if isinstance(item[0], str):
        return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(string, item))
    return struct.pack("<IIQ", 9, 5, len(item)) + np.array(item, "<i4").tobytes()


def padding(num_bytes):
    return bytes(-num_bytes % ALIGNMENT)


class Weights:
    """Random weights in blocks of one type."""

    def __init__(self, dtype, random):
        self.number, self.file_number, pack = TYPES[dtype]
        weights = random.standard_normal((NUM_BLOCKS, BLOCK), dtype=np.float32) * np.float32(0.02)
        packed = np.ascontiguousarray(pack(weights)).view(np.uint8)
        self.block_bytes = packed.size // NUM_BLOCKS
        self.bytes = memoryview(packed.reshape(-1))

    def size(self, shape):
        return shape[0] * shape[1] // BLOCK * self.block_bytes

    def write(self, out, shape, random):
        left = self.size(shape)
        start = int(random.integers(NUM_BLOCKS)) * self.block_bytes
        while left > 0:
            left -= out.write(self.bytes[start : start + left])
            start = 0


class Vector:
    """Values in f32 about a mean."""

    number = F32

    def __init__(self, mean, deviation):
        self.mean, self.deviation = mean, deviation

    def size(self, shape):
        return 4 * shape[0]

    def write(self, out, shape, random):
        values = self.mean + self.deviation * random.standard_normal(shape[0], dtype=np.float32)
        out.write(values.astype("<f4").tobytes())


def tensors(shape, weights, vocabulary):
    """Name, shape (rows first) and contents of all tensors."""
    hidden, layers, heads, kv_heads, mlp, vocab, tied = SHAPES[shape]
    head_dim = hidden // heads
    ones, biases = Vector(1, 0), Vector(0, 0.01)
    yield "token_embd.weight", (vocab, hidden), vocabulary
    yield "output_norm.weight", (hidden,), ones
    if not tied:
        yield "output.weight", (vocab, hidden), vocabulary
    for layer in range(layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (hidden,), ones
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield f"{block}.attn_{name}.weight", (rows * head_dim, hidden), weights
            yield f"{block}.attn_{name}.bias", (rows * head_dim,), biases
        yield f"{block}.attn_output.weight", (hidden, heads * head_dim), weights
        yield f"{block}.ffn_norm.weight", (hidden,), ones
        yield f"{block}.ffn_gate.weight", (mlp, hidden), weights
        yield f"{block}.ffn_up.weight", (mlp, hidden), weights
        yield f"{block}.ffn_down.weight", (hidden, mlp), weights


def metadata(shape, file_number):
    hidden, layers, heads, kv_heads, mlp, vocab, _ = SHAPES[shape]
    return {
        "general.architecture": "qwen2",
        "general.name": f"random {shape}",
        "general.file_type": file_number,
        "qwen2.context_length": 32768,
        "qwen2.embedding_length": hidden,
        "qwen2.block_count": layers,
        "qwen2.feed_forward_length": mlp,
        "qwen2.attention.head_count": heads,
        "qwen2.attention.head_count_kv": kv_heads,
        "qwen2.rope.freq_base": 1e6,
        "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
        # A tokenizer that can be loaded is all that is wanted of it.
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [f"<t{i}>" for i in range(vocab)],
        "tokenizer.ggml.token_type": [1] * vocab,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def write(shape, dtype, vocabulary_type, path):
    """Writes the file. <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>"""
    random = np.random.default_rng(0)
    weights = Weights(dtype, random)
    vocabulary = weights if vocabulary_type == dtype else Weights(vocabulary_type, random)
    pairs = metadata(shape, weights.file_number)
    all_tensors = list(tensors(shape, weights, vocabulary))

    head = [b"GGUF", struct.pack("<IQQ", 3, len(all_tensors), len(pairs))]
    head += [string(key) + value(item) for key, item in pairs.items()]
    offset = 0
    for name, dims, contents in all_tensors:
        head.append(string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *reversed(dims)))
        head.append(struct.pack("<IQ", contents.number, offset))
        offset += contents.size(dims)
        offset += len(padding(offset))
    head = b"".join(head)

    with open(path, "wb", buffering=0) as out:
        out.write(head + padding(len(head)))
        for _, dims, contents in all_tensors:
            contents.write(out, dims, random)
            out.write(padding(contents.size(dims)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("shape", choices=SHAPES, help="as in `throughput --shape`")
    parser.add_argument("type", choices=TYPES, help="of all matrices")
    parser.add_argument("out", help="the file")
    parser.add_argument("--vocabulary", choices=TYPES, help="type of the embedding and the head instead")
    args = parser.parse_args()
    write(args.shape, args.type, args.vocabulary or args.type, args.out)


if __name__ == "__main__":
    main()
