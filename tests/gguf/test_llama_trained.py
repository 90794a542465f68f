"""The loss of trained models that llama.cpp quantised, after rescaling.

The factors come from the rule ``fitted`` on the safetensors model, as a GGUF user gets them.
``gates``, which needs no text, must meet the same bound where gate weights are renormalised. Where
they are not, it may lose more than the config edit, in F32 and on the safetensors model alike: see
docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from support import byte_models, trained_gguf
from support.llama_client import FTYPES, MISSING, Client
from support.llama_models import start

import moescale
from moescale.errors import UnsupportedError

pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")

KINDS = ("Q4_K_M", "Q6_K", "IQ4_XS", "Q2_K", "MXFP4_MOE")

CALIBRATED = HELD_BACK = 16_384
"""Bytes at the beginning of the text that are fitted on; bytes at its end for the loss."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A model, and a number of experts per token above the trained one."""

    name: str
    more: int
    renormalised: bool


MODELS = (Trained("mixtral", 3, True), Trained("olmoe", 6, False))


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """The client, in a separate process."""
    yield from start()


@torch.no_grad()
def torch_loss(folder: Path, data: bytes) -> float:
    """The loss of the safetensors model, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    batches = ids.reshape(-1, byte_models.CONTEXT).split(32)
    logits = torch.cat([model(input_ids=batch).logits[:, :-1] for batch in batches])
    targets = torch.cat([batch[:, 1:] for batch in batches])
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize("trained", MODELS, ids=lambda model: model.name)
def test_the_loss_is_at_most_that_of_the_edit(
    client: Client, tmp_path: Path, trained: Trained
) -> None:
    """Router scales and factors were fitted on the safetensors model, and used for each type.

    ``gates`` never sees a loss. It must change it as in the safetensors model, up to the error of
    the type (factors off by half change it by 0.008 to 0.05), and lower it for routers that
    renormalise, unless it raises that of the safetensors model too.
    """
    torch.set_num_threads(1)
    byte_models.train(trained.name, tmp_path)
    data = (tmp_path / "val.bin").read_bytes()
    (tmp_path / "text.bin").write_bytes(data[:CALIBRATED])
    moescale.convert(
        tmp_path / trained.name,
        tmp_path / "fitted",
        experts=trained.more,
        rule="fitted",
        calibrate=tmp_path / "text.bin",
    )
    factors = tmp_path / "fitted" / "moescale.json"
    for rule in ("none", "gates"):
        model = tmp_path / trained.name
        moescale.convert(model, tmp_path / rule, experts=trained.more, rule=rule)
    plain_edit, plain_gates = (
        torch_loss(tmp_path / rule, data[-HELD_BACK:]) for rule in ("none", "gates")
    )
    plain, source, out = (tmp_path / f"{name}.gguf" for name in ("plain", "source", "out"))
    arch = trained_gguf.write(tmp_path / trained.name, plain)

    def loss(path: Path, **overrides: int) -> float:
        found = {f"{arch}.{name}": value for name, value in overrides.items()}
        return client.loss(path, data[-HELD_BACK:], byte_models.CONTEXT, found)

    assert abs(loss(plain) - torch_loss(tmp_path / trained.name, data[-HELD_BACK:])) < 0.002
    for kind in KINDS:
        client.quantise(plain, source, FTYPES[kind])
        fold = "scale" if kind == "MXFP4_MOE" else None
        if fold and not trained.renormalised:
            with pytest.raises(UnsupportedError, match="powers of two"):
                moescale.plan(source, experts=trained.more, factors=factors)
            continue
        edit = loss(source, expert_used_count=trained.more)
        given = {"experts": trained.more, "fold": fold, "overwrite": True}
        moescale.convert(source, out, factors=factors, **given)
        fitted = loss(out)
        moescale.convert(source, out, rule="gates", **given)
        gates = loss(out)
        print(trained.name, kind, f"{edit:.4f} {fitted:.4f} {gates:.4f}")
        print(f"without quantisation {plain_edit:.4f} {plain_gates:.4f}")
        assert fitted <= edit
        assert gates <= edit or not trained.renormalised or plain_gates > plain_edit
        assert abs((gates - edit) - (plain_gates - plain_edit)) < 0.01
