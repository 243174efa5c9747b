#!/usr/bin/env python3
"""Writes a checkpoint of a published shape with random bf16 weights: to time loading from files.

    random_checkpoint.py qwen2.5-7b FOLDER

Wants torch and safetensors; made on the GPU if there is one. Shards of about 4 GB, with an index, as models are published.
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

# hidden, layers, query heads, key/value heads, MLP, vocabulary, tied
SHAPES = {
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151936, True),
    "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, 151936, True),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064, False),
}
SHARD_BYTES = 4 << 30


def tensors(shape):
    hidden, layers, heads, kv_heads, mlp, vocab, tied = shape
    head = hidden // heads
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(layers):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (hidden,)
        for name, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
            yield at + f"self_attn.{name}_proj.weight", (rows, hidden)
            yield at + f"self_attn.{name}_proj.bias", (rows,)
        yield at + "self_attn.o_proj.weight", (hidden, heads * head)
        yield at + "post_attention_layernorm.weight", (hidden,)
        yield at + "mlp.gate_proj.weight", (mlp, hidden)
        yield at + "mlp.up_proj.weight", (mlp, hidden)
        yield at + "mlp.down_proj.weight", (hidden, mlp)
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (vocab, hidden)


def main():
    name, folder = sys.argv[1], Path(sys.argv[2])
    shape = SHAPES[name]
    hidden, layers, heads, kv_heads, mlp, vocab, tied = shape
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": vocab,
        "tie_word_embeddings": tied, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16", "model_type": "qwen2",
    }
    (folder / "config.json").write_text(json.dumps(config))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shards, size, total = [{}], 0, 0
    for tensor, dims in tensors(shape):
        value = torch.randn(dims, device=device, dtype=torch.bfloat16) * 0.02
        value = (value + 1 if tensor.endswith("norm.weight") else value).cpu()
        if size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][tensor] = value
        size += value.nbytes
        total += value.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": {}}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file)
        index["weight_map"].update(dict.fromkeys(shard, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"{total / 1e9:.1f} GB in {len(shards)} files")


main()
