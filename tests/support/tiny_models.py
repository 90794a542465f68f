"""The oracle: transformers makes and runs tiny random checkpoints of every MoE model type."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load as read_tensors
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import MtpModel
from transformers.models.inkling import modeling_inkling

from support import checkpoints
from support.tiny_table import CANNOT_BUILD, SIZES, TINY, Overrides, Tiny

__all__ = [
    "CANNOT_BUILD",
    "MTP_RUNS",
    "PUBLISHED",
    "TINY",
    "build",
    "experts_used",
    "generates",
    "load",
    "mtp_outputs",
    "other_outputs",
    "outputs",
    "routed_outputs",
]

TOKENS = 12
HIDDEN = SIZES["hidden_size"]

LAYER = r"(?!.*(vis|\bvit\b|audio)).*?\blayers\.\d+\."
ATTENTION = r"(self_attn|attn|self_attention|SelfAttention|mixer)(\.0)?"

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


# --- Writing ---------------------------------------------------------------------------------


def build(
    entry_id: str,
    directory: Path,
    *,
    fused: bool = False,
    seed: int = 0,
    dtype: str = "float32",
    config: Overrides | None = None,
    mtp: bool = False,
    published: bool = False,
) -> None:
    """Write a tiny random checkpoint of this type, in the layout of the Hub or the fused one.

    `config` is merged into the config of the row, section by section.
    `mtp` adds an MTP layer: a copy of the last layer under its name on the Hub.
    `published` renames and transposes the tensors as on the Hub, for types that transformers writes
    differently (`PUBLISHED`).
    """
    tiny = TINY[entry_id]
    if config:
        _save(
            _random_model(tiny, _merged(tiny.config, config), seed), directory, tiny, fused, dtype
        )
    else:
        checkpoints.write_files(directory, _made(entry_id, fused, seed, dtype))
    if published:
        _write(directory, PUBLISHED[entry_id](_read(directory)))
    if mtp:
        tensors = _read(directory)
        _write(directory, tensors, _mtp_block(tensors, tiny))


@cache
def _made(entry_id: str, fused: bool, seed: int, dtype: str) -> dict[str, bytes]:
    """The files of a checkpoint as the row describes it, made once per process."""
    tiny = TINY[entry_id]
    with tempfile.TemporaryDirectory() as folder:
        _save(_random_model(tiny, tiny.config, seed), Path(folder), tiny, fused, dtype)
        return checkpoints.tree(Path(folder))


def _save(model: PreTrainedModel, directory: Path, tiny: Tiny, fused: bool, dtype: str) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(directory, save_original_format=not fused, max_shard_size=tiny.shard)


def _random_model(tiny: Tiny, overrides: Overrides, seed: int) -> PreTrainedModel:
    """A model in which every value is random; a new model has zeros, ones and unset values."""
    config = _config(_config_class(tiny), overrides)
    with torch.random.fork_rng(), _whole_numbers():
        torch.manual_seed(seed)
        model = _class(tiny)(config).eval()
        for name, tensor in model.state_dict().items():
            if name.endswith("tid2eid"):
                tensor.copy_(torch.rand(len(tensor), config.n_routed_experts).argsort()[:, :2])
            elif tensor.ndim > 1:
                tensor.normal_(std=0.15)
            elif tensor.is_floating_point():
                tensor += 0.1 * torch.randn_like(tensor)
    return model


def _merged(base: Overrides, over: Overrides) -> Overrides:
    sections = {key for key, value in over.items() if isinstance(value, dict) and key in base}
    return {**base, **over} | {key: _merged(base[key], over[key]) for key in sections}


def _class(tiny: Tiny) -> type[PreTrainedModel]:
    return getattr(transformers, tiny.model)


def _config_class(tiny: Tiny) -> type[PreTrainedConfig]:
    return (
        getattr(transformers, tiny.config_class) if tiny.config_class else _class(tiny).config_class
    )


def _config(config_class: type[PreTrainedConfig], overrides: Overrides) -> PreTrainedConfig:
    """A config of this class with `SIZES`, and its sections likewise."""
    names = {item.name for item in dataclasses.fields(config_class)}
    values = {name: size for name, size in SIZES.items() if name in names}
    sections = {}
    for name, spec in config_class.sub_configs_defaults.items():
        section = overrides.get(name, None if spec.optional else {})
        if section is not None:
            sections[name] = _config(_section_class(spec, section), section)
    return config_class(**values | dict(overrides) | sections)


def _section_class(spec: Any, section: Overrides) -> type[PreTrainedConfig]:
    if spec.config_class is AutoConfig:
        return CONFIG_MAPPING[section.get("model_type", spec.model_type)]
    return spec.config_class


def _read(directory: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint, and remove its files."""
    tensors = {}
    for shard in sorted(directory.glob("*.safetensors*")):
        if shard.suffix == ".safetensors":
            tensors |= read_tensors(shard.read_bytes())
        shard.unlink()
    return tensors


def _write(directory: Path, *parts: dict[str, Tensor]) -> None:
    """Write one shard per part, and the index."""
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(part, directory / file, metadata={"format": "pt"})
        index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in part.values())
        index["weight_map"] |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _mtp_block(tensors: dict[str, Tensor], tiny: Tiny) -> dict[str, Tensor]:
    """The tensors of an MTP layer: a copy of the last layer, and what joins it to the model."""
    layers = {match[0] for name in tensors if (match := re.match(LAYER, name))}
    last = max(layers, key=lambda layer: int(layer.split(".")[-2]))
    block = {
        f"{tiny.mtp}.{name.removeprefix(last)}": tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(last)
    }
    for name in ("enorm", "hnorm", "shared_head.norm"):
        block[f"{tiny.mtp}.{name}.weight"] = torch.ones(HIDDEN)
    block[f"{tiny.mtp}.eh_proj.weight"] = torch.ones(HIDDEN, 2 * HIDDEN)
    return block


# How the files on the Hub differ from what transformers writes, by model type.


def _renamed(old: str, new: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(old, new, name): tensor for name, tensor in tensors.items()}


def _turned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacked experts with transposed matrices."""
    return {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in tensors.items()
    }


def _stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts of a layer in one tensor, transposed, under NeMo's names."""
    stacks: dict[str, list[Tensor]] = {}
    for name in sorted(name for name in tensors if ".experts." in name):
        stack = re.sub(r"\.\d+\.down_proj\.weight$", ".down_projs", name)
        stack = re.sub(r"\.\d+\.up_proj\.weight$", ".gate_and_up_projs", stack)
        stacks.setdefault(stack, []).append(tensors.pop(name).T)
    return tensors | {name: torch.stack(experts) for name, experts in stacks.items()}


PUBLISHED: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "deepseek_v4": partial(_renamed, r"^model\.", ""),
    "kimi_k25": partial(_renamed, r"^(language_model\.model)\.blocks", r"\1.layers"),
    "nemo_speechlm": _stacked,
    "qwen3_vl_moe": _turned,
}


@contextmanager
def _whole_numbers() -> Iterator[None]:
    """Pass ints for sizes of layers: Inkling's vision tower passes tensors, which torch refuses."""
    original = modeling_inkling.plan_out_scales
    modeling_inkling.plan_out_scales = lambda *sizes: original(*sizes).tolist()
    try:
        yield
    finally:
        modeling_inkling.plan_out_scales = original


# --- Reading ---------------------------------------------------------------------------------


def load(directory: Path, entry_id: str, *, top_k: int | None = None) -> PreTrainedModel:
    """Load the model in float32; raise if the checkpoint lacks a tensor or has an extra one."""
    tiny = TINY[entry_id]
    config, _ = _config_class(tiny).get_config_dict(directory)
    if top_k is not None:
        _set_count(config, tiny, top_k)
    with _whole_numbers():
        model, report = _class(tiny).from_pretrained(
            directory,
            config=_config_class(tiny).from_dict(config),
            dtype=torch.float32,
            output_loading_info=True,
        )
    _check_whole(tiny, report)
    # The alignment of mapped files is random, and the last bit of a sum depends on it.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def _check_whole(tiny: Tiny, report: dict[str, set[str]]) -> None:
    """Raise if a name is missing or left over, except in an MTP layer that the model ignores."""
    mtp = ".".join((tiny.mtp or "none").split(".")[-2:])
    problems = {
        f"{what}: {name}"
        for what, names in report.items()
        for name in names
        if mtp not in str(name)
    }
    if problems:
        raise ValueError(f"{tiny.model} does not load whole: {sorted(problems)[:4]}")


def _set_count(config: dict[str, Any], tiny: Tiny, top_k: int) -> None:
    if tiny.fixed:
        raise ValueError(f"{tiny.model} takes no other number of experts: {tiny.fixed}")
    *path, key = tiny.count.split(".")
    for name in path:
        config = config[name]
    config[key] = top_k
    for layer in (config.get("per_layer_config") or {}).values():
        layer[key] = top_k


# --- Running ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MoE:
    """One MoE block: the module that takes inputs, and the one whose output is the routed sum."""

    path: str
    block: nn.Module
    routed: nn.Module


@torch.no_grad()
def routed_outputs(
    directory: Path, entry_id: str, *, top_k: int | None = None, inputs_seed: int = 0
) -> dict[str, Tensor]:
    """The routed experts' output of each MoE block for fixed inputs, by path.

    `top_k` overrides the number of experts per token in the config.
    """
    tiny = TINY[entry_id]
    return _routed(load(directory, entry_id, top_k=top_k), tiny, inputs_seed)


def _routed(model: PreTrainedModel, tiny: Tiny, inputs_seed: int) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    for number, moe in enumerate(_blocks(model, tiny)):
        hidden, token_ids = _inputs(model, inputs_seed + number)
        for name in tiny.silenced:
            moe.routed.get_parameter(name).zero_()
        with _watch({moe.path: moe.routed}, outputs):
            FEEDS[tiny.feed](moe.block, hidden, token_ids)
        # The experts of Llama 4 each return a block of tokens, before the sum.
        output = outputs[moe.path]
        outputs[moe.path] = output.reshape(-1, TOKENS, output.shape[-1]).sum(0)
    return outputs


@torch.no_grad()
def mtp_outputs(
    directory: Path, entry_id: str, *, top_k: int | None = None, inputs_seed: int = 0
) -> dict[str, Tensor]:
    """Like `routed_outputs`, for the MTP layer (types in `MTP_RUNS`)."""
    tiny = TINY[entry_id]
    model = load(directory, entry_id, top_k=top_k)
    if not tiny.mtp.startswith("mtp"):
        # transformers recognises the MTP layer by the number of layers of the published model.
        model._keys_to_ignore_on_load_unexpected = [re.escape(tiny.mtp)]
    return _routed(MtpModel.from_pretrained(model), tiny, inputs_seed)


@torch.no_grad()
def other_outputs(directory: Path, entry_id: str, *, inputs_seed: int = 0) -> dict[str, Tensor]:
    """The outputs of all shared experts and of one attention module for fixed inputs, by path."""
    return _others(load(directory, entry_id), TINY[entry_id], inputs_seed)


def _others(model: PreTrainedModel, tiny: Tiny, inputs_seed: int) -> dict[str, Tensor]:
    hidden, token_ids = _inputs(model, inputs_seed)
    outputs: dict[str, Tensor] = {}
    for moe in _blocks(model, tiny):
        shared = _shared(model, moe, tiny)
        with _watch(shared, outputs):
            FEEDS[tiny.feed](moe.block, hidden, token_ids)
        outputs |= {path: shared[path](hidden) for path in shared.keys() - outputs.keys()}
    attention = _first_attention(model, tiny)
    with _watch(attention, outputs), _given(attention, inputs_seed):
        RUNS[tiny.run](model, hidden, token_ids)
    return outputs


def generates(directory: Path, entry_id: str) -> int:
    """Generate four tokens greedily; return the number of experts that a token passed.

    A class that cannot generate runs once instead.
    """
    (count,) = set(experts_used(directory, entry_id).values())
    return count


@torch.no_grad()
def experts_used(directory: Path, entry_id: str) -> dict[str, int]:
    """Like `generates`, by the path of each MoE block that such a run reaches."""
    return _used(load(directory, entry_id), TINY[entry_id])


def _used(model: PreTrainedModel, tiny: Tiny) -> dict[str, int]:
    name, width = WIDTHS[tiny.width]
    used: dict[str, int] = {}

    def note(path: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        used[path] = width(args, output)

    for moe in _blocks(model, tiny):
        moe.block.get_submodule(name).register_forward_hook(partial(note, moe.path))
    RUNS[tiny.run](model, *_inputs(model, 0))
    return used


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The results of `routed_outputs`, `other_outputs` and `experts_used` for one loaded model."""

    routed: dict[str, Tensor]
    other: dict[str, Tensor]
    used: dict[str, int]


@torch.no_grad()
def outputs(directory: Path, entry_id: str, *, top_k: int | None = None) -> Outputs:
    """Run a checkpoint in every way; the routed outputs come last, since they zero parameters."""
    tiny, model = TINY[entry_id], load(directory, entry_id, top_k=top_k)
    other, used = _others(model, tiny, 0), _used(model, tiny)
    return Outputs(_routed(model, tiny, 0), other, used)


def _blocks(model: PreTrainedModel, tiny: Tiny) -> Iterator[MoE]:
    """The MoE blocks in the order of layers; an `experts` module gets inputs through its parent."""
    for path, module in model.named_modules():
        if re.fullmatch(rf"{tiny.part}.*\.{tiny.routed}", path):
            block = path.removesuffix(".experts")
            yield MoE(block, model.get_submodule(block), module)


def _inputs(model: PreTrainedModel, seed: int) -> tuple[Tensor, Tensor]:
    """Hidden states [1, tokens, hidden] and token ids [1, tokens]."""
    text = model.config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, TOKENS, text.hidden_size, generator=generator)
    return hidden, torch.randint(3, text.vocab_size, (1, TOKENS), generator=generator)


def _shared(model: PreTrainedModel, moe: MoE, tiny: Tiny) -> dict[str, nn.Module]:
    """The shared experts in the layer of this block, by path."""
    layer = re.match(r".*\.\d+(?=\.|$)", moe.path)[0]
    modules = model.get_submodule(layer).named_modules(prefix=layer)
    return {path: module for path, module in modules if re.search(rf"\.({tiny.shared})$", path)}


def _first_attention(model: PreTrainedModel, tiny: Tiny) -> dict[str, nn.Module]:
    """The first attention module of the stack that holds the MoE blocks, by path."""
    stack = re.match(r"(.*?\.)?(layers|blocks?)\.", next(_blocks(model, tiny)).path)[0]
    return next(
        {path: module}
        for path, module in model.named_modules()
        if path.startswith(stack)
        and re.search(rf"\.{ATTENTION}$", path)
        and not isinstance(module, nn.ModuleList)
    )


@contextmanager
def _watch(modules: dict[str, nn.Module], outputs: dict[str, Tensor]) -> Iterator[None]:
    """Record the first output of each module, by path."""

    def note(path: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        outputs.setdefault(path, first.clone())

    with ExitStack() as hooks:
        for path, module in modules.items():
            hooks.callback(module.register_forward_hook(partial(note, path)).remove)
        yield


@contextmanager
def _given(modules: dict[str, nn.Module], seed: int) -> Iterator[None]:
    """Replace the inputs of these modules by fixed hidden states."""

    def replace(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        draw = torch.Generator().manual_seed(seed)
        if args:
            return (torch.randn(args[0].shape, generator=draw), *args[1:]), named
        hidden = torch.randn(named["hidden_states"].shape, generator=draw)
        return args, {**named, "hidden_states": hidden}

    with ExitStack() as hooks:
        for module in modules.values():
            handle = module.register_forward_pre_hook(replace, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


# How an MoE block takes its inputs, by name.


def _feed_router(layer: nn.Module, hidden: Tensor) -> None:
    """Gemma calls router and experts from the decoder layer."""
    flat = hidden.flatten(0, 1)
    _, weights, chosen = layer.router(flat)
    layer.experts(flat, chosen, weights)


FEEDS: dict[str, Callable[[nn.Module, Tensor, Tensor], object]] = {
    "block": lambda block, hidden, token_ids: block(hidden),
    "ids": lambda block, hidden, token_ids: block(hidden, input_ids=token_ids),
    "router": lambda block, hidden, token_ids: _feed_router(block, hidden),
}

# How a whole model runs, by name.


def _generate(model: PreTrainedModel, hidden: Tensor, token_ids: Tensor) -> None:
    with warnings.catch_warnings():
        # from torch, when DiffusionGemma imports its compiler
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        model.generate(input_ids=token_ids, max_new_tokens=4, do_sample=False)


RUNS: dict[str, Callable[[PreTrainedModel, Tensor, Tensor], object]] = {
    "generate": _generate,
    "forward": lambda model, hidden, token_ids: model(input_ids=token_ids),
    "thinker": lambda model, hidden, token_ids: _generate(model.thinker, hidden, token_ids),
    "talker": lambda model, hidden, token_ids: model.talker.model(inputs_embeds=hidden),
    "vision": lambda model, hidden, token_ids: model.model.vision_tower(
        torch.ones(16, 3 * 4 * 4), grid_thw=torch.tensor([[1, 4, 4]])
    ),
}

# Where the number of experts that a token passes can be counted, by name.


def _width_of_index(args: tuple[Any, ...], output: Any) -> int:
    return next(arg for arg in args if not arg.is_floating_point()).shape[-1]


def _width_of_weights(args: tuple[Any, ...], output: Any) -> int:
    return int((args[2] != 0).sum(-1).max())


def _width_of_scores(args: tuple[Any, ...], output: Any) -> int:
    return int((output[0] != 0).sum(-1).max())


def _width_of_gating(args: tuple[Any, ...], output: Any) -> int:
    return len(output[1]) // len(args[0])


def _width_of_embedding(args: tuple[Any, ...], output: Any) -> int:
    return args[0].shape[-1]


# The types whose MTP layer transformers can run.
MTP_RUNS = ("deepseek_v3", "glm4_moe", "mellum")

WIDTHS: dict[str, tuple[str, Callable[[tuple[Any, ...], Any], int]]] = {
    "index": ("experts", _width_of_index),
    "weights": ("experts", _width_of_weights),
    "scores": ("router", _width_of_scores),
    "gating": ("router", _width_of_gating),
    "embedding": ("up_embed", _width_of_embedding),
}
