#!/usr/bin/env python3
"""Writes the seeds of every fuzz target, from the goldens and from plain statements of the formats: seeds.py FOLDER.

Nothing of it is tracked: the goldens are, and the rest is some lines of this file. Needs the standard library alone.
"""

import json
import pathlib
import struct
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "dashinfer-models/tests/goldens"
GGUF = ROOT / "dashinfer-models/tests/gguf"
# Between the files of an input, see `parts` in src/lib.rs.
CUT = b"\xff"


def safetensors(tensors):
    """A file of (name, type, shape, bytes)."""
    header, data = {}, b""
    for name, dtype, shape, values in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    return b"=" + json.dumps(header).encode() + data


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(value):
    """A value of a GGUF file's metadata, with its type."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    kind = {int: (4, "<I"), float: (6, "<f"), str: (8, None)}[type(value[0])]
    items = b"".join(text(item) if kind[1] is None else struct.pack(kind[1], item) for item in value)
    return struct.pack("<IIQ", 9, kind[0], len(value)) + items


# Numbers of types, weights and bytes of a block.
F32, F16, Q4_0, Q8_0 = (0, 1, 4), (1, 1, 2), (2, 32, 18), (8, 32, 34)


def gguf(metadata, tensors=()):
    """A file of these keys and of tensors (name, shape, type), the outermost dimension first."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, item in metadata.items():
        out += text(key) + value(item)
    data = b""
    for name, shape, (number, block_len, block_bytes) in tensors:
        size = block_bytes
        for dim in shape:
            size *= dim
        size //= block_len
        out += text(name) + struct.pack("<I", len(shape))
        out += b"".join(struct.pack("<Q", dim) for dim in reversed(shape)) + struct.pack("<IQ", number, len(data))
        # Small positive numbers in every type.
        data += bytes(48 if i % 2 else 0 for i in range(size))
        data += bytes(-len(data) % 32)
    return out + (bytes(-len(out) % 32) + data if tensors else b"")


def model(architecture):
    """A whole model of one layer, in a few kilobytes."""
    key = lambda name: f"{architecture}.{name}"
    metadata = {
        "general.architecture": architecture,
        key("embedding_length"): 32, key("block_count"): 1, key("feed_forward_length"): 32,
        key("attention.head_count"): 2, key("attention.head_count_kv"): 1, key("context_length"): 64,
        key("attention.key_length"): 16, key("attention.layer_norm_rms_epsilon"): 1e-6, key("rope.freq_base"): 1e4,
        key("attention.sliding_window"): 16,
    }
    if architecture in ("qwen2", "qwen3", "glm4"):
        del metadata[key("attention.sliding_window")]
    matrices = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
                "ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32)}
    vectors = {"attn_norm": 32, "ffn_norm": 32}
    if architecture == "glm4":
        del matrices["ffn_gate"]
        matrices["ffn_up"] = (64, 32)
    if architecture in ("qwen3", "gemma3"):
        vectors |= {"attn_q_norm": 16, "attn_k_norm": 16}
    if architecture in ("gemma2", "gemma3", "glm4"):
        vectors |= {"post_attention_norm": 32, "post_ffw_norm": 32}
    tensors = [("token_embd.weight", (8, 32), F16), ("output_norm.weight", (32,), F32)]
    tensors += [(f"blk.0.{name}.weight", shape, Q8_0 if i % 2 else Q4_0) for i, (name, shape) in enumerate(matrices.items())]
    tensors += [(f"blk.0.{name}.weight", (size,), F32) for name, size in vectors.items()]
    if architecture == "qwen2":
        tensors += [(f"blk.0.attn_{name}.bias", (size,), F32) for name, size in (("q", 32), ("k", 16), ("v", 16))]
    return gguf(metadata, tensors)


def vocabulary(kind):
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab", "<think>", "<0x0A>", "Ġ", "Ġa"]
    facts = {
        "tokenizer.ggml.model": kind, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 5 + [4, 6, 1, 1],
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.chat_template": "{% for m in messages %}{{ bos_token }}[{{ m.role }}] {{ m.content }}{% endfor %}",
    }
    if kind == "gpt2":
        facts |= {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.merges": ["a b", "Ġ a"]}
    return gguf({"general.architecture": "llama", **facts})


TEMPLATES = [
    "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + loop.index0 %}{% endfor %}{{ ns.n }}",
    "{%- macro show(c, depth=0) -%}{{ c | tojson(indent=2) }}{%- endmacro -%}{{ show(messages) }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') | upper }}",
    "{{ strftime_now('%d %B %Y %H:%M') }}{{ raise_exception('no') if messages|length > 9 else '' }}",
    "{% generation %}{{ '%s-%05d' | format('a', 3) }}{{ '{:>9} {}'.format(1, 'b') }}{% endgeneration %}",
    "{{ 'a,b'.split(',') + ['c'] * 3 }}{{ {'a': (1, 2.5, none)}.items() | list }}{{ 'ab'.replace('a', 'cc').title() }}",
    "{% for a in range(9) recursive %}{% if a is divisibleby 2 %}{% continue %}{% endif %}{{ a ** 2 // 3 % 5 }}{% endfor %}",
    "{{ messages | dictsort if false else messages[0].content.split('</think>')[-1].lstrip('\\n') ~ (1 < 2 and not 3) }}",
    "{% filter indent(4) %}{% raw %}{{ x }}{% endraw %}{# no #}{% endfilter %}{% with x = [[], {}] %}{{ x | string }}{% endwith %}",
    "{{ [3, 1, 2] | sort | unique | batch(2) | list }}{{ [1, 2] | sum }}{{ 'x' in messages[0] }}{{ messages | groupby('role') }}",
]


def seeds():
    """(target, name, bytes)"""
    for folder in sorted(path for path in GOLDENS.iterdir() if path.is_dir()):
        read = lambda name: (folder / name).read_bytes() if (folder / name).exists() else b""
        yield "config", folder.name, read("config.json") + CUT + read("generation_config.json")
        yield "tokenizer", folder.name, read("tokenizer.json") + CUT + read("tokenizer_config.json")
        template = json.loads(read("tokenizer_config.json") or b"{}").get("chat_template")
        if isinstance(template, str):
            yield "chat_template", folder.name, template.encode()
    for number, template in enumerate(TEMPLATES):
        yield "chat_template", f"{number}", template.encode()

    one = safetensors([("a", "BF16", [1, 2], b"\1\2\3\4"), ("b", "I8", [1], b"\5")])
    two = safetensors([("c", "F32", [2, 1], bytes(8)), ("d", "F8_E4M3", [], b"\1"), ("e", "U8", [0, 3], b"")])
    index = {"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors",
                                            "d": "2.safetensors", "e": "2.safetensors"}}
    yield "checkpoint", "single", CUT + one
    yield "checkpoint", "shards", json.dumps(index).encode() + CUT + one + CUT + two
    yield "checkpoint", "raw", CUT + struct.pack("<Q", 2) + b"{}"

    for architecture in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "glm4"):
        yield "gguf", architecture, model(architecture)
    yield "gguf", "blocks", (GGUF / "blocks.gguf").read_bytes()
    for kind in ("llama", "gpt2"):
        yield "gguf", f"tokenizer-{kind}", vocabulary(kind)
        yield "tokenizer", f"gguf-{kind}", vocabulary(kind)

    item = {"what": {"form": "vector", "rows": 3, "cols": 1, "bias": False},
            "buffers": [{"at": 64, "bytes": 12, "checksum": 0}]}
    yield "weight_cache", "sealed", b"=" + bytes(64) + json.dumps({"key": "a key", "items": [item]}).encode()
    yield "weight_cache", "made", b"!" + bytes(range(256)) * 2
    yield "weight_cache", "zeros", b"!" + bytes(600)
    yield "weight_cache", "raw", b"DASHPACK" + struct.pack("<II6QQ", 1, 0x01020304, 66, 64, 2, 0, 0, 0, 0)[:56] + b"{}"


def main():
    out = pathlib.Path(sys.argv[1])
    for target, name, content in seeds():
        (out / target).mkdir(parents=True, exist_ok=True)
        (out / target / f"seed-{name}").write_bytes(content)


main()
