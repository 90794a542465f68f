"""Loads a checkpoint with transformers, in the available memory, and runs it over a text."""

from __future__ import annotations

import itertools
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from moescale.calibrate.devices import Running
from moescale.errors import (
    CheckpointError,
    MoescaleError,
    SourceError,
    UnsupportedError,
    UsageError,
    bytes_text,
    one_line,
)

LONGEST = 2_048
"""Tokens of the longest sequence; the model's context may be shorter."""

TOKENS_PER_BATCH = 4_096
"""Tokens of a batch; this bounds the memory for activations."""

OTHER_RULES = "--rule gates needs only the routers, --rule preserve no weights at all."


def read_config(folder: Path) -> Any:
    """The model's config.

    Raises:
        UnsupportedError: transformers does not know the type, or needs remote code for it.
    """
    with _quiet():
        raw, _ = transformers.PretrainedConfig.get_config_dict(folder, local_files_only=True)
    if raw.get("model_type") not in CONFIG_MAPPING:
        why = f"is not known to transformers {transformers.__version__}"
        if raw.get("auto_map"):
            why = "needs remote code, which is never run"
        raise UnsupportedError(f"model type {raw.get('model_type')!r} {why}", hint=OTHER_RULES)
    with _quiet(), _in_one_line("its config"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@contextmanager
def load_model(
    folder: Path, config: Any, how: Running
) -> Iterator[tuple[PreTrainedModel, list[str]]]:
    """Load the model in its stored dtype; also gives the names of tensors that it does not use.

    Weights that exceed the allowed main memory go to a temporary folder, removed on exit.

    Raises:
        UnsupportedError: transformers cannot load it here.
        SourceError: the disk has no room for weights that exceed the memory.
    """
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with _quiet(), tempfile.TemporaryDirectory(prefix="moescale-offload-") as offload:
        if how.max_memory is not None and size > how.max_memory:
            _check_room(Path(offload), size)
        with _in_one_line("the model"):
            model, report = _model_class(config).from_pretrained(
                folder,
                config=config,
                dtype="auto",
                device_map=_device_map(how),
                max_memory=_memory(how),
                offload_folder=offload,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                experts_implementation="eager",  # takes any size, and is not slower on a CPU
                output_loading_info=True,
            )
        _check_whole(report)
        yield model.eval(), sorted(map(str, report.get("unexpected_keys") or ()))


def _device_map(how: Running) -> Any:
    """The `device_map` of transformers.

    Raises:
        UsageError: torch does not find the device.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(how.device, True):
        raise UsageError(
            f"--device {how.device}: torch {torch.__version__} finds no such device here",
            hint="--device auto uses any device that is available.",
        )
    return "auto" if how.device == "auto" or how.max_memory is not None else {"": how.device}


def _memory(how: Running) -> dict[int | str, int] | None:
    """Memory allowed on each device; on GPUs, as much as accelerate finds free."""
    if how.max_memory is None:
        return None
    from accelerate.utils import get_max_memory

    found = {} if how.device == "cpu" else get_max_memory()
    return {**found, "cpu": how.max_memory}


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise SourceError(
            f"{folder.parent} has no room for the weights that exceed --max-memory:"
            f" {bytes_text(size)} may be needed, {bytes_text(free)} are free",
            hint="Free some space, or set TMPDIR to a folder on a larger disk.",
        )


def _model_class(config: Any) -> Any:
    """The class that the checkpoint names, else the one that transformers chooses."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    known = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if known else AutoModel


def _check_whole(report: Mapping[str, Iterable[Any]]) -> None:
    """Refuse a model with missing weights, which transformers fills with random values."""
    for what in ("missing_keys", "mismatched_keys", "error_msgs", "conversion_errors"):
        if names := sorted(map(str, report.get(what) or ())):
            raise CheckpointError(
                f"transformers cannot load the whole model: {what.replace('_', ' ')}: {names[0]}"
                f" ({len(names)} in all)",
                hint=OTHER_RULES,
            )


def text_model(model: PreTrainedModel, paths: Iterable[str]) -> nn.Module:
    """The smallest submodel with all these modules, without the output layer or other towers."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    shared = [level[0] for level in itertools.takewhile(lambda level: len({*level}) == 1, levels)]
    for length in range(len(shared), 0, -1):
        found = model.get_submodule(".".join(shared[:length]))
        if isinstance(found, PreTrainedModel):
            return found
    return model


def batches(
    tokens: tuple[int, ...], start: tuple[int, ...], context: int, at_once: int = TOKENS_PER_BATCH
) -> Iterator[Tensor]:
    """Token ids [sequences, length] of at most `at_once` tokens; the last batch may be shorter."""
    length = max(1, context - len(start))
    pieces = [tokens[i : i + length] for i in range(0, len(tokens), length)]
    whole = [piece for piece in pieces if len(piece) == length]
    rows = max(1, at_once // context)
    groups = [whole[i : i + rows] for i in range(0, len(whole), rows)]
    groups += [[piece] for piece in pieces[len(whole) :]]
    for group in groups:
        yield torch.tensor([[*start, *piece] for piece in group])


def forward(model: Any, ids: Tensor) -> Any:
    """Run a model on token ids [sequences, length]."""
    ids = ids.to(device_of(model))
    named: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if model.config.is_encoder_decoder:
        named["decoder_input_ids"] = ids
    with quiet_run("a forward pass"):
        return model(**named)


def device_of(model: nn.Module) -> torch.device:
    """The device for token ids: the embedding's, or the first GPU or the CPU if that is on disk."""
    weight = next(iter(model.parameters()))
    if weight.device.type != "meta":
        return weight.device
    return torch.device(0 if torch.cuda.is_available() else "cpu")


@contextmanager
def quiet_run(what: str) -> Iterator[None]:
    """Run transformers without progress bars, warnings or gradients; errors become one line."""
    with _quiet(), _in_one_line(what), torch.no_grad():
        yield


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Turn any exception of the library into a one-line error."""
    try:
        yield
    except MoescaleError:
        raise
    except MemoryError as error:
        raise UnsupportedError(f"{what} does not fit into memory", hint=_MAX_MEMORY_HINT) from error
    except Exception as error:  # the library runs the code of a hundred models
        if "out of memory" in str(error).lower():
            raise UnsupportedError(
                f"{what} does not fit into memory", hint=_MAX_MEMORY_HINT
            ) from error
        raise UnsupportedError(
            f"transformers {transformers.__version__} cannot handle {what}:"
            f" {type(error).__name__}: {one_line(error)}",
            hint=OTHER_RULES,
        ) from error


_logging: Any = transformers_logging

_MAX_MEMORY_HINT = "--max-memory keeps the weights that exceed it on disk."


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off the library's progress bars and warnings."""
    level, bars = _logging.get_verbosity(), _logging.is_progress_bar_enabled()
    offload = logging.getLogger("accelerate.big_modeling")
    offload_level = offload.level
    offload.setLevel(logging.ERROR)
    _logging.set_verbosity_error()
    _logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _logging.set_verbosity(level)
        offload.setLevel(offload_level)
        if bars:
            _logging.enable_progress_bar()
