"""Runs the real llama.cpp 0.5.0, by ctypes, in a separate process, since a failed assert ends it.

The package is pinned, since its structures belong to one release (``include/llama.h``).
``scripts/llama.sh`` fetches it; without it, the tests that need it are skipped, and say so.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parents[2] / ".llama-client" / "package" / "bins" / "linux-x64"
LIBRARY = "libllama.v0.5.0.so"

MISSING = (
    None
    if (FOLDER / LIBRARY).exists()
    else "llama.cpp 0.5.0 is not here: scripts/llama.sh fetches it (Linux x86_64, npm)"
)
"""The reason why the client cannot run, if any."""

FTYPES = {"Q8_0": 7, "Q2_K": 10, "Q4_K_M": 15, "Q6_K": 18, "IQ4_XS": 30, "MXFP4_MOE": 38}
"""``llama_ftype`` in ``include/llama.h``."""

Array = np.ndarray[Any, Any]


class DiedError(RuntimeError):
    """The client ended its process, by a GGML_ASSERT."""


class MissingError(RuntimeError):
    """The client cannot run on this machine, for instance because its C library is too old."""


class RefusedError(RuntimeError):
    """The client did not load a file; the message is its own."""


class Client:
    """A process that loads models and evaluates tokens."""

    def __init__(self) -> None:
        """Start it.

        Raises:
            MissingError: it cannot run here.
        """
        self._start()

    def _start(self) -> None:
        command = [sys.executable, __file__]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        assert self._child.stdout is not None
        why = json.loads(self._child.stdout.readline())
        if why is not None:
            self.close()
            raise MissingError(f"llama.cpp 0.5.0 cannot be run here: {why}")

    def logits(
        self,
        path: Path,
        tokens: Sequence[int],
        overrides: Mapping[str, float] | None = None,
        exact: bool = True,
    ) -> Array:
        """The logits, float32, ``[tokens, vocabulary]``; `overrides` work like ``--override-kv``.

        With `exact` the cache is F32 and flash attention is off, since their rounding would hide
        differences.
        """
        given = {"windows": [list(tokens)], "overrides": dict(overrides or {}), "exact": exact}
        answer = self._ask(path=str(path), **given)
        return np.array(answer, np.float32).reshape(len(tokens), -1)

    def loss(
        self, path: Path, data: bytes, context: int, overrides: Mapping[str, float] | None = None
    ) -> float:
        """Mean cross-entropy of the next byte in nats, in sequences of `context` bytes.

        It runs like `llama-perplexity`, with the default cache and attention.
        """
        whole = len(data) // context * context
        windows = [list(data[start : start + context]) for start in range(0, whole, context)]
        given = {"windows": windows, "overrides": dict(overrides or {}), "exact": False}
        found: float = self._ask(path=str(path), loss=True, **given)
        return found

    def gates(
        self, path: Path, tokens: Sequence[int], overrides: Mapping[str, float] | None = None
    ) -> dict[int, tuple[Array, Array]]:
        """By block: the router's inputs ``[tokens, hidden]``, and the weights of chosen experts.

        The weights, ``[tokens, experts per token]``, are those before a constant factor.
        """
        given = {"windows": [list(tokens)], "overrides": dict(overrides or {}), "exact": True}
        found = self._ask(path=str(path), watch=True, **given)
        return {
            int(block): (np.array(inputs, np.float64), np.array(weights, np.float64))
            for block, (inputs, weights) in found.items()
        }

    def quantise(self, source: Path, output: Path, kind: int) -> None:
        """Quantise a file like ``llama-quantize``; `kind` is a number of ``llama_ftype``."""
        self._ask(source=str(source), output=str(output), kind=kind)

    def reads(self, path: Path) -> bool:
        """Whether its reader accepts the header of a file; if it aborts, it does not."""
        try:
            return bool(self._ask(header=str(path)))
        except DiedError:
            return False

    def _ask(self, **task: Any) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(json.dumps(task), file=self._child.stdin, flush=True)
        line = self._child.stdout.readline()
        if not line:
            code = self._child.wait()
            self.close()
            self._start()
            raise DiedError(f"ended with {code}")
        answer = json.loads(line)
        if "refused" in answer:
            raise RefusedError(answer["refused"])
        return answer["done"]

    def close(self) -> None:
        """End the process."""
        for stream in (self._child.stdin, self._child.stdout):
            assert stream is not None
            stream.close()
        self._child.wait()


# In the process -----------------------------------------------------------------------------


class _Override(ctypes.Structure):
    _fields_ = (
        ("tag", ctypes.c_int),
        ("key", ctypes.c_char * 128),
        ("value", ctypes.c_int64),
        ("rest", ctypes.c_char * 120),
    )


class _ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("buffer_types", ctypes.c_void_p),
        ("gpu_layers", ctypes.c_int32),
        ("modes", ctypes.c_int * 3),
        ("main_gpu", ctypes.c_int32),
        ("pointers", ctypes.c_void_p * 3),
        ("overrides", ctypes.POINTER(_Override)),
        ("vocab_only", ctypes.c_bool),
        ("check_tensors", ctypes.c_bool),
        ("others", ctypes.c_bool * 4),
    )


class _ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("counts", ctypes.c_uint32 * 4),
        ("threads", ctypes.c_int32 * 2),
        ("kinds", ctypes.c_int * 4),
        ("flash_attention", ctypes.c_int),
        ("floats", ctypes.c_int32 * 8),
        ("callback", ctypes.c_void_p * 2),
        ("type_k", ctypes.c_int),
        ("type_v", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("size", ctypes.c_int64 * 4),
        ("strides", ctypes.c_size_t * 4),
        ("operation", ctypes.c_int),
        ("parameters", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
    )


_WEIGHTS = ("ffn_moe_weights", "ffn_moe_weights_softmax", "ffn_moe_weights_norm")
"""Names of the weights from step to step; the last one that exists counts."""


class _HeaderParams(ctypes.Structure):
    _fields_ = (("no_data", ctypes.c_bool), ("context", ctypes.c_void_p))


class _QuantiseParams(ctypes.Structure):
    _fields_ = (
        ("threads", ctypes.c_int32),
        ("kind", ctypes.c_int),
        ("kinds", ctypes.c_int * 2),
        ("switches", ctypes.c_bool * 6),
        ("pointers", ctypes.c_void_p * 4),
        ("buffer", ctypes.c_size_t),
    )


class _Library:
    """llama.cpp in this process."""

    def __init__(self) -> None:
        self.log: list[str] = []
        shared = ctypes.RTLD_GLOBAL
        self.base = ctypes.CDLL(str(FOLDER / "libggml-base.so"), shared)
        self.inputs: dict[str, Array] = {}
        self.weights: dict[str, Array] = {}
        self._watcher = ctypes.CFUNCTYPE(
            ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p
        )(self._see)
        self.base.gguf_init_from_file.restype = ctypes.c_void_p
        self.base.gguf_init_from_file.argtypes = [ctypes.c_char_p, _HeaderParams]
        self.base.gguf_free.argtypes = [ctypes.c_void_p]
        self.base.ggml_get_name.restype = ctypes.c_char_p
        self.base.ggml_get_name.argtypes = [ctypes.c_void_p]
        self.base.ggml_backend_tensor_get.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
        ]
        ggml = ctypes.CDLL(str(FOLDER / "libggml.v0.5.0.so"), shared)
        self.llama = llama = ctypes.CDLL(str(FOLDER / LIBRARY), shared)
        form = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._logger = form(lambda level, text, _: self.log.append(text.decode(errors="replace")))
        llama.llama_log_set(self._logger, None)
        ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
        ggml.ggml_backend_load_all_from_path(str(FOLDER).encode())
        pointer = ctypes.c_void_p
        for name, result, arguments in (
            ("llama_model_default_params", _ModelParams, []),
            ("llama_context_default_params", _ContextParams, []),
            ("llama_model_quantize_default_params", _QuantiseParams, []),
            ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _ModelParams]),
            ("llama_init_from_model", pointer, [pointer, _ContextParams]),
            ("llama_batch_init", _Batch, [ctypes.c_int32] * 3),
            ("llama_batch_free", None, [_Batch]),
            ("llama_decode", ctypes.c_int32, [pointer, _Batch]),
            ("llama_get_memory", pointer, [pointer]),
            ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
            ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [pointer]),
            ("llama_model_get_vocab", pointer, [pointer]),
            ("llama_vocab_n_tokens", ctypes.c_int32, [pointer]),
            ("llama_model_free", None, [pointer]),
            ("llama_free", None, [pointer]),
        ):
            function = getattr(llama, name)
            function.restype, function.argtypes = result, arguments
        llama.llama_backend_init()

    def words(self) -> str:
        """Its last messages."""
        return "".join(line for line in self.log[-6:] if "error" in line) or "".join(self.log[-3:])

    def run(
        self,
        path: str,
        windows: list[list[int]],
        overrides: dict[str, float],
        exact: bool,
        loss: bool = False,
        watch: bool = False,
    ) -> Any:
        """Compute the logits of a sequence, the loss of several, or the gates."""
        params = self.llama.llama_model_default_params()
        params.gpu_layers, params.check_tensors = 0, True
        values = (_Override * (len(overrides) + 1))()
        for entry, (key, value) in zip(values, overrides.items(), strict=False):
            entry.key, entry.tag = key.encode(), int(isinstance(value, float))
            bits = np.float64(value).view(np.int64) if isinstance(value, float) else value
            entry.value = int(bits)
        params.overrides = values if overrides else None
        self.log.clear()
        model = self.llama.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise RefusedError(self.words())
        context = self._context(model, exact, watch)
        try:
            words = self.llama.llama_vocab_n_tokens(self.llama.llama_model_get_vocab(model))
            found = [self._logits(context, tokens, words) for tokens in windows]
        finally:
            self.llama.llama_free(context)
            self.llama.llama_model_free(model)
        if watch:
            return {
                block: (self.inputs[block].tolist(), self.weights[block].tolist())
                for block in self.inputs
            }
        return _loss(found, windows) if loss else found[0].ravel().tolist()

    def _see(self, tensor: int, ask: bool, _: Any) -> bool:
        """Keep the inputs and weights of each router."""
        kind, _, block = self.base.ggml_get_name(tensor).decode().rpartition("-")
        if kind not in ("ffn_moe_logits", *_WEIGHTS) or not block.isdigit():
            return not ask
        if not ask and kind == "ffn_moe_logits":
            source = _Tensor.from_address(tensor).src[1]
            self.inputs[block] = self._values(source)
        elif not ask:
            tokens = len(self.inputs[block])
            self.weights[block] = self._values(tensor).reshape(tokens, -1)
        return True

    def _values(self, tensor: int) -> Array:
        """The values of an F32 tensor, as rows of its first dimension."""
        size = _Tensor.from_address(tensor).size
        values = np.empty(tuple(reversed(size)), np.float32)
        pointer = values.ctypes.data_as(ctypes.c_void_p)
        self.base.ggml_backend_tensor_get(tensor, pointer, 0, values.nbytes)
        return values.reshape(-1, size[0])

    def _context(self, model: Any, exact: bool, watch: bool) -> Any:
        params = self.llama.llama_context_default_params()
        assert params.type_k == params.type_v == 1, "the structure is that of another release"
        params.n_ctx = params.n_batch = params.n_ubatch = 64
        params.threads[:] = (1, 1)
        if exact:
            params.type_k = params.type_v = params.flash_attention = 0
        if watch:
            self.inputs, self.weights = {}, {}
            params.callback[0] = ctypes.cast(self._watcher, ctypes.c_void_p)
        context = self.llama.llama_init_from_model(model, params)
        if not context:
            self.llama.llama_model_free(model)
            raise RefusedError(self.words())
        return context

    def _logits(self, context: Any, tokens: list[int], words: int) -> Array:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(context), True)
        batch = self.llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        failed = self.llama.llama_decode(context, batch)
        self.llama.llama_batch_free(batch)
        if failed:
            raise RefusedError(self.words())
        found = self.llama.llama_get_logits(context)
        return np.ctypeslib.as_array(found, (len(tokens), words)).copy()

    def reads(self, header: str) -> bool:
        """Whether the reader of GGUF accepts a header."""
        found = self.base.gguf_init_from_file(header.encode(), _HeaderParams(True, None))
        if found:
            self.base.gguf_free(found)
        return bool(found)

    def quantise(self, source: str, output: str, kind: int) -> None:
        """Quantise a file like ``llama-quantize``."""
        params = self.llama.llama_model_quantize_default_params()
        params.kind, params.threads = kind, 1
        self.log.clear()
        if self.llama.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(params)):
            raise RefusedError(self.words())


def _loss(logits: Sequence[Array], windows: Sequence[Sequence[int]]) -> float:
    """Mean cross-entropy of the next token."""
    losses = []
    for found, tokens in zip(logits, windows, strict=True):
        numbers = found[:-1].astype(np.float64)
        numbers -= numbers.max(1, keepdims=True)
        sums = np.log(np.exp(numbers).sum(1))
        losses.append(sums - numbers[np.arange(len(tokens) - 1), tokens[1:]])
    return float(np.mean(losses))


def _serve() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library prints to stdout too
    try:
        library = _Library()
    except OSError as error:
        print(json.dumps(str(error)), file=out, flush=True)
        return
    print(json.dumps(None), file=out, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        try:
            do = library.quantise if "kind" in task else library.run
            done = (library.reads if "header" in task else do)(**task)
            answer = {"done": done}
        except RefusedError as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    _serve()
