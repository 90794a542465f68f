#!/usr/bin/env python3
"""Feeds bytes to the readers of untrusted files, guided by coverage, until you stop it.

    .venv-test/bin/pip install --group fuzz              # atheris, for CPython on Linux
    .venv-test/bin/python scripts/fuzz.py all -max_total_time=600  # or one of the targets below
    .venv-test/bin/python scripts/fuzz.py header crash-0123        # what one input does

`scripts/test.sh` makes `.venv-test`; in another environment `--group` needs pip 25.1 or newer.

What must hold is in ``tests/support/properties.py``, which the tests use too: only our own errors,
in one line; what safetensors rejects is refused; what is taken means the same to other readers.
More arguments go to libFuzzer. An input that takes 2 seconds or 300 MiB is a finding.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

with atheris.instrument_imports(include=["moescale"]):
    from support import properties

    from moescale.families import architectures

MODELS = [(row, properties.small_model(row)) for row in architectures.ROWS]
OPTIONS = ({"experts": 3}, {"factor": 2.0}, {"experts": 1, "fold": "config"}, {"experts": 4})
LIMITS = ("-max_len=4096", "-timeout=2", "-rss_limit_mb=300", "-print_final_stats=1")
WORDS = (
    *('{"__metadata__":{"format":"pt"},', '"weight_map":{', '{"factors":{"0":1.5}}', '"files":['),
    *('"dtype":"BF16"', '"F4"', '"F6_E2M3"', '"shape":[', '"data_offsets":[0,', "[[[[", '{"a":'),
    *("18446744073709551615", "4611686018427387904", "-0", "1e309", "NaN", "Infinity", "true"),
    *("\\ud800", "\\u0000", "\ufeff", "null", "[]", "{}", "&a ", "*a", "<<: ", "!!int ", "---\n"),
    *("num_experts_per_tok", "num_local_experts", "quantization_config", "mlp_only_layers"),
)


def header(data: bytes) -> None:
    """The first byte is the length of the data after the header; 0xff: the rest is a whole file."""
    size, text = data[:1] or b"\0", data[1:]
    properties.header_holds(
        text if size == b"\xff" else properties.with_header(text, bytes(size[0]))
    )


def config(data: bytes) -> None:
    """The first two bytes choose a model and options; the rest is the model's config."""
    chosen = data[:2].ljust(2, b"\0")
    _, files = MODELS[chosen[0] % len(MODELS)]
    options = OPTIONS[chosen[1] % len(OPTIONS)]
    properties.spans_hold(data[2:])
    properties.plan_holds({**files, "config.json": data[2:]}, **options)


def card(data: bytes) -> None:
    """The input is the text of a card, from its metadata on."""
    properties.plan_holds({**MODELS[0][1], "README.md": b"---\n" + data}, experts=3)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "index": properties.index_holds,
    "gguf": properties.gguf_holds,
    "config": config,
    "factors": properties.factors_hold,
    "provenance": properties.provenance_holds,
    "card": card,
}


def everything(data: bytes) -> None:
    """The first byte chooses the target."""
    targets = list(TARGETS.values())
    targets[(data[:1] or b"\0")[0] % len(targets)](data[1:])


def seeds() -> Iterator[tuple[str, bytes]]:
    """Valid inputs of each target."""
    for number, (_, files) in enumerate(MODELS):
        shard = files["model.safetensors"]
        length = int.from_bytes(shard[:8], "little")
        if number % 8 == 0 and len(shard) - 8 - length < 255:
            yield "header", bytes([len(shard) - 8 - length]) + shard[8 : 8 + length]
        yield "config", bytes([number, 0]) + files["config.json"]
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    yield "header", b"\x08" + json.dumps({"a": entry, "__metadata__": {"format": "pt"}}).encode()
    yield "header", b"\xff" + properties.with_header(json.dumps({"a": entry}), bytes(8))
    yield "gguf", properties.small_gguf()
    yield "index", b'{"metadata": {"total_size": 8}, "weight_map": {"a": "model.safetensors"}}'
    yield "factors", b'{"factors": {"0": 1.5, "1": 2}}'
    yield "provenance", b'{"moescale": "1", "files": [{"name": "a", "size": 1, "sha256": null}]}'
    yield "card", b"license: mit\ntags: [a, b]\nmodel-index:\n- name: x\n---\n# Title\n"


def quoted(word: str) -> str:
    """A line of a libFuzzer dictionary."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in word.encode()) + '"\n'


def main() -> None:
    """Write the seeds, then hand over to libFuzzer, which ends the process."""
    names = ["all", *TARGETS]
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        sys.exit(f"{__doc__}\nTargets: {', '.join(names)}")
    name, rest = sys.argv[1], sys.argv[2:]
    folder = Path(tempfile.mkdtemp(prefix=f"moescale-fuzz-{name}-"))
    (folder / "seeds").mkdir()
    for number, (target, data) in enumerate(seeds()):
        if name in ("all", target):
            first = bytes([list(TARGETS).index(target)]) if name == "all" else b""
            (folder / "seeds" / f"{number:03}").write_bytes(first + data)
    (folder / "words").write_text("".join(map(quoted, WORDS)))
    print(f"Seeds and findings: {folder}", file=sys.stderr)
    single = any(Path(argument).is_file() for argument in rest)
    places = [] if single else [str(folder / "seeds")]
    options = [*LIMITS, f"-dict={folder / 'words'}", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *options, *rest, *places], TARGETS.get(name, everything))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
