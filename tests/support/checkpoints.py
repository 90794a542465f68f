"""Makes tiny checkpoints, and computes the bytes that a rescaled one must have.

Nothing here uses moescale: shards are written and read with `json` and `struct`, and the expected
output is computed over whole files, with the arithmetic of `rounding`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from support import rounding

DATA = bytes(range(256)) * 100
"""The bytes of ``data.bin`` in the fixture `folder`."""

Raw = tuple[str, tuple[int, ...], bytes]
"""A tensor: dtype, shape, bytes."""

SPECIAL = {
    "BF16": (0x0000, 0x8000, 0x0001, 0x8001, 0x7F80, 0xFF80, 0x7FC1, 0xFF81),
    "F16": (0x0000, 0x8000, 0x0001, 0x8001, 0x7C00, 0xFC00, 0x7E01, 0xFC01),
    "F32": (0, 1 << 31, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFF800001),
    "F64": (0, 1 << 63, 1, (1 << 63) + 1, 0x7FF << 52, 0xFFF << 52, (0x7FF << 52) + 1),
}
"""Zeros, subnormals, infinities and NaNs of both signs."""


def values(dtype: str, shape: tuple[int, ...], seed: int = 0, special: bool = True) -> Raw:
    """A tensor of moderate random values, with the special ones at its start."""
    form = rounding.FORMATS[dtype]
    rng = np.random.default_rng(seed)
    codes = rng.standard_normal(int(np.prod(shape, dtype=int)))
    if dtype == "F64":
        bits = codes.view("<u8")
    elif dtype == "F16":
        bits = codes.astype("<f2").view("<u2")
    else:
        bits = (codes.astype("<f4").view("<u4") >> (32 - form.bits)).astype(form.codes)
    if special:
        first = np.array(SPECIAL[dtype], form.codes)[: len(bits)]
        bits[: len(first)] = first
    return dtype, shape, bits.tobytes()


def header(entries: Mapping[str, Any]) -> bytes:
    """A header with its length before it, padded with spaces to eight bytes as safetensors does."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def shard(tensors: Mapping[str, Raw], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a shard, its tensors in the given order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        stop = position + len(data)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    return header(entries) + b"".join(data for _, _, data in tensors.values())


def spans(data: bytes) -> dict[str, tuple[str, int, int]]:
    """Dtype, start and end of every tensor in a shard."""
    (length,) = struct.unpack_from("<Q", data)
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__", None)
    start = 8 + length
    return {
        name: (e["dtype"], start + e["data_offsets"][0], start + e["data_offsets"][1])
        for name, e in entries.items()
    }


def rescaled(data: bytes, factors: Mapping[str, float]) -> bytes:
    """The expected output: a whole shard with the named tensors multiplied."""
    result = bytearray(data)
    for name, (dtype, start, stop) in spans(data).items():
        if name in factors:
            result[start:stop] = rounding.scaled(dtype, data[start:stop], factors[name])
    return bytes(result)


def write_shards(folder: Path, tensors: Mapping[str, Raw], shards: int) -> None:
    """Write tensors into `shards` shards with an index, or into one ``model.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(shard(tensors))
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(np.array_split(np.arange(len(names)), shards), start=1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        chosen = {names[i]: tensors[names[i]] for i in part}
        (folder / file).write_bytes(shard(chosen))
        weight_map |= dict.fromkeys(chosen, file)
    size = sum(len(data) for _, _, data in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


CARD = """---
license: apache-2.0   # as upstream
language:
- en
- fr
library_name: transformers
pipeline_tag: text-generation
tags: [moe, "a: b"]
model-index:
- name: Tiny
  results:
  - task: {type: text-generation}
    metrics: [{type: acc, value: 0.5}]
base_model: someone/older
---
# Tiny

Text with a table.
"""

EXTRAS: Mapping[str, bytes] = {
    "README.md": CARD.encode(),
    "LICENSE": b"A licence.\n",
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"chat_template": "{{ x }}"}\r\n',
    "generation_config.json": b'{"eos_token_id": 2}',
    "chat_template.jinja": b"{% for m in messages %}{{ m }}{% endfor %}",
    "modeling_tiny.py": b"raise SystemExit('remote code was run')\n",
    "extra/deep/notes.txt": b"notes\n",
    "empty.txt": b"",
}
"""The other files of a repo; the card is edited, the others stay."""

LEFT_OUT: Mapping[str, bytes] = {
    "pytorch_model-00001-of-00001.bin": b"an old twin",
    "pytorch_model.bin.index.json": b"{}",
    "consolidated.00.pth": b"another twin",
    "original/params.json": b"{}",
    "tiny.gguf": b"GGUF",
    "original/consolidated.00.pth": b"a third twin",
    "onnx/model.onnx": b"onnx",
}
"""Weights in other formats under their usual names, and the files that belong to them."""

NO_CHECKPOINT: Mapping[str, bytes] = {
    ".git/HEAD": b"ref: refs/heads/main\n",
    ".cache/huggingface/x.lock": b"",
}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write small files, with their folders."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def tree(folder: Path) -> dict[str, bytes]:
    """The contents of every file below a folder, by relative path with forward slashes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Families -----------------------------------------------------------------------------------------

HIDDEN, INNER = 8, 6


def _matrices(
    names: Iterable[str], dtype: str, experts: int, special: bool = True
) -> dict[str, Raw]:
    return {
        name: values(dtype, _shape(name, experts), seed=i, special=special)
        for i, name in enumerate(names)
    }


def _shape(name: str, experts: int) -> tuple[int, ...]:
    """The shape of a router, its bias, a shared expert's gate, or a matrix of an expert."""
    if name.endswith("correction_bias"):
        return (experts,)
    if name.endswith("shared_expert_gate.weight"):
        return (1, HIDDEN)
    if name.endswith(".gate.weight"):
        return (experts, HIDDEN)
    return (HIDDEN, INNER) if name.endswith(("w2.weight", "down_proj.weight")) else (INNER, HIDDEN)


def _frame(blocks: Mapping[str, Raw], layers: int, dtype: str) -> dict[str, Raw]:
    """Add embedding, attention and norms to the tensors of the MoE blocks, layer by layer."""
    tensors = {"model.embed_tokens.weight": values(dtype, (10, HIDDEN), 1)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        tensors[at + "input_layernorm.weight"] = values("F32", (HIDDEN,), 2)
        tensors[at + "self_attn.o_proj.weight"] = values(dtype, (HIDDEN, HIDDEN), 3)
        tensors |= {name: raw for name, raw in blocks.items() if name.startswith(at)}
    tensors |= {name: raw for name, raw in blocks.items() if name not in tensors}
    tensors["model.norm.weight"] = values("F32", (HIDDEN,), 4)
    tensors["lm_head.weight"] = values(dtype, (10, HIDDEN), 5)
    return tensors


def _projections(at: str) -> list[str]:
    return [f"{at}{p}_proj.weight" for p in ("gate", "up", "down")]


def mixtral_names(layers: int, experts: int) -> list[str]:
    """The routers and experts of a Mixtral, in the layout of the Hub."""
    names = []
    for layer in range(layers):
        at = f"model.layers.{layer}.block_sparse_moe."
        names.append(at + "gate.weight")
        names += [at + f"experts.{e}.w{w}.weight" for e in range(experts) for w in (1, 2, 3)]
    return names


def mixtral_tensors(layers: int = 2, experts: int = 4, dtype: str = "BF16") -> dict[str, Raw]:
    """The tensors of a small Mixtral, in the layout of the Hub."""
    return _frame(_matrices(mixtral_names(layers, experts), dtype, experts), layers, dtype)


def fused_mixtral_tensors(layers: int = 2, experts: int = 4, dtype: str = "BF16") -> dict[str, Raw]:
    """The tensors of a small Mixtral, the experts of a layer in one tensor."""
    blocks: dict[str, Raw] = {}
    for layer in range(layers):
        at = f"model.layers.{layer}.mlp."
        blocks[at + "gate.weight"] = values(dtype, (experts, HIDDEN), layer)
        blocks[at + "experts.gate_up_proj"] = values(dtype, (experts, 2 * INNER, HIDDEN), layer)
        blocks[at + "experts.down_proj"] = values(dtype, (experts, HIDDEN, INNER), layer + 9)
    return _frame(blocks, layers, dtype)


def qwen2_tensors(layers: int = 3, experts: int = 4, dtype: str = "BF16") -> dict[str, Raw]:
    """The tensors of a small Qwen2-MoE: layer 0 is dense, the others have a gated shared expert."""
    names = _projections("model.layers.0.mlp.")
    for layer in range(1, layers):
        at = f"model.layers.{layer}.mlp."
        names += [at + "gate.weight", at + "shared_expert_gate.weight"]
        names += _projections(at + "shared_expert.")
        for expert in range(experts):
            names += _projections(f"{at}experts.{expert}.")
    return _frame(_matrices(names, dtype, experts), layers, dtype)


def deepseek_tensors(layers: int = 3, experts: int = 4, dtype: str = "BF16") -> dict[str, Raw]:
    """The tensors of a small DeepSeek-V3: layer 0 is dense; an MTP layer follows the last one."""
    names = _projections("model.layers.0.mlp.")
    for layer in range(1, layers + 1):
        at = f"model.layers.{layer}.mlp."
        names += [at + "gate.weight", at + "gate.e_score_correction_bias"]
        names += _projections(at + "shared_experts.")
        for expert in range(experts):
            names += _projections(f"{at}experts.{expert}.")
    return _frame(_matrices(names, dtype, experts), layers, dtype)


def routed(tensors: Iterable[str]) -> list[str]:
    """The routed down-projections among tensor names, found without moescale."""
    ends = ("w2.weight", "down_proj.weight", "experts.down_proj")
    return [name for name in tensors if ".experts." in name and name.endswith(ends)]


MIXTRAL_CONFIG = """{ "num_hidden_layers":2,\r
\t"model_type" : "mixtral", "architectures": ["MixtralForCausalLM"],
   "num_experts_per_tok"  :\t2 , "num_local_experts": 4,
  "rope_theta": 1e6, "rms_norm_eps": 1.0e-05, "hidden_size": 8, "note": "caf\u00e9 \\u00e9" }
 """
"""A config with a layout that no JSON writer would reproduce."""

QWEN2_CONFIG: Mapping[str, Any] = {
    "model_type": "qwen2_moe",
    "num_hidden_layers": 3,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
}

DEEPSEEK_CONFIG: Mapping[str, Any] = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


def mixtral(folder: Path, *, shards: int = 3, dtype: str = "BF16", extras: bool = True) -> Path:
    """Write a small but complete Mixtral repo: 2 layers, 4 experts, 2 per token."""
    write_shards(folder, mixtral_tensors(dtype=dtype), shards)
    (folder / "config.json").write_bytes(MIXTRAL_CONFIG.encode())
    if extras:
        write_files(folder, {**EXTRAS, **NO_CHECKPOINT})
    return folder


def fused_mixtral(folder: Path) -> Path:
    """Write a small Mixtral with fused experts in a single shard."""
    write_shards(folder, fused_mixtral_tensors(), 1)
    (folder / "config.json").write_bytes(MIXTRAL_CONFIG.encode())
    return folder


def qwen2(folder: Path) -> Path:
    """Write a small Qwen2-MoE, whose router does not renormalise."""
    write_shards(folder, qwen2_tensors(), 2)
    (folder / "config.json").write_text(json.dumps(QWEN2_CONFIG))
    return folder


def deepseek(folder: Path, **config: Any) -> Path:
    """Write a small DeepSeek-V3 with shared experts, a dense layer and an MTP block."""
    write_shards(folder, deepseek_tensors(), 2)
    (folder / "config.json").write_text(json.dumps({**DEEPSEEK_CONFIG, **config}, indent=4))
    return folder
