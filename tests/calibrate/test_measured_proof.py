"""The proof of the rules ``measured`` and ``fitted``: trained models, rescaled, run again.

The two small models are trained here. With ``MOESCALE_TRAINED_MODELS`` every checkpoint folder
below that directory is tested too. The text is its ``val.bin``, as bytes, in sequences of
``MOESCALE_TRAINED_CONTEXT`` bytes (default 256): the length used in training, which configs need
not state.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from support import byte_models, teacher_forcing, tiny_models
from torch import Tensor

from moescale import api
from moescale.calibrate import runner

CALIBRATED = HELD_BACK = 16_384
"""Bytes at the beginning of the text to measure on; bytes at its end for the loss."""

MOST, OVER_ALL = 0.45, 0.25
"""The fraction of the config edit's loss that `fitted` may leave, per model and over all models."""

ELSEWHERE = os.environ.get("MOESCALE_TRAINED_MODELS")


pytestmark = pytest.mark.usefixtures("one_thread")


def token_ids(data: bytes, context: int) -> Tensor:
    """Bytes as token ids [sequences, context]."""
    whole = len(data) // context * context
    return torch.frombuffer(bytearray(data[:whole]), dtype=torch.uint8).long().reshape(-1, context)


@torch.no_grad()
def loss(directory: Path, entry: str, ids: Tensor) -> float:
    """Mean cross-entropy of the next byte, in nats."""
    model = tiny_models.load(directory, entry)
    total = 0.0
    for batch in ids.split(32):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        targets = batch[:, 1:].flatten()
        total += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
        )
    return total / ids[:, 1:].numel()


def prove(source: Path, text: Path, context: int, work: Path) -> None:
    """At half and twice the number of experts the norms are restored and the loss rises less.

    The two losses are summed: a small model sometimes does better unscaled at one number.
    """
    config = json.loads((source / "config.json").read_text())
    entry, n = config["model_type"], config["num_experts_per_tok"]
    data = text.read_bytes()
    work.mkdir(exist_ok=True)
    calibration = work / "calibration.bin"
    calibration.write_bytes(data[:CALIBRATED])
    held_back = token_ids(data[-HELD_BACK:], context)
    losses: dict[str, list[float]] = {"none": [], "measured": []}
    for m in (n // 2, 2 * n):
        edited, measured = work / f"none-{m}", work / f"measured-{m}"
        api.convert(source, edited, experts=m, rule="none")
        plan = api.convert(source, measured, experts=m, rule="measured", calibrate=calibration).plan
        ids = token_ids(data[:CALIBRATED], context)
        norms = teacher_forcing.norms(source, measured, entry, ids)
        ratios = [after / before for before, after in norms.values()]
        losses["none"].append(loss(edited, entry, held_back))
        losses["measured"].append(loss(measured, entry, held_back))
        print(source.name, m, dict(plan.factors), ratios, losses)
        assert len(ratios) == len(plan.factors)
        assert all(abs(ratio - 1) < 0.01 for ratio in ratios), ratios
    assert sum(losses["measured"]) <= sum(losses["none"]), losses


def prove_fitted(source: Path, text: Path, work: Path, numbers: list[int]) -> tuple[float, float]:
    """`fitted` never loses more than the config edit, and much less above n.

    Above n, at most `MOST` of the edit's rise over the trained loss may remain, summed over the
    numbers. The output of one number is written, and its loss is the one predicted. Returns the
    sums of `fitted` and of the edit.
    """
    n = json.loads((source / "config.json").read_text())["num_experts_per_tok"]
    work.mkdir(exist_ok=True)
    data = text.read_bytes()
    calibration, evaluation = work / "calibration.bin", work / "evaluation.bin"
    calibration.write_bytes(data[:CALIBRATED])
    evaluation.write_bytes(data[-HELD_BACK:])
    found = api.compare(
        source, experts=numbers, rules=["fitted"], calibrate=calibration, evaluate=evaluation
    ).evaluation
    assert found is not None
    losses = {(run.experts, run.rule): run.loss for run in found.runs}
    print(source.name, found.loss, losses)
    for m in numbers:
        assert losses[m, "fitted"] <= losses[m, "none"] + (0.0005 if m > n else 0.003), losses
    fitted, edit = (
        sum(losses[m, rule] - found.loss for m in numbers if m > n) for rule in ("fitted", "none")
    )
    assert fitted <= MOST * edit, losses
    m = numbers[-1]
    written = api.convert(
        source,
        work / "out",
        experts=m,
        rule="fitted",
        calibrate=calibration,
        evaluate=evaluation,
    ).plan.evaluation
    assert written is not None
    assert written.runs[-1].loss == pytest.approx(losses[m, "fitted"], abs=5e-4)
    return fitted, edit


@pytest.mark.skipif(ELSEWHERE is None, reason="MOESCALE_TRAINED_MODELS names no directory")
def test_fitted_wins_back_the_loss_of_models_trained_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of experts are a half, three quarters, one and a half times and twice n."""
    folder = Path(ELSEWHERE or "")
    context = int(os.environ.get("MOESCALE_TRAINED_CONTEXT", "256"))
    monkeypatch.setattr(runner, "LONGEST", context)
    rises = []
    for source in sorted(path.parent for path in folder.glob("*/config.json")):
        n = json.loads((source / "config.json").read_text())["num_experts_per_tok"]
        numbers = sorted({max(1, n // 2), max(1, 3 * n // 4), 3 * n // 2, 2 * n} - {n})
        rises.append(prove_fitted(source, folder / "val.bin", tmp_path / source.name, numbers))
    check_over_all(rises)


def test_the_norm_comes_back_and_the_loss_is_no_higher(tmp_path: Path) -> None:
    """After `measured`, each layer's norm is the original's within 1 %, at half and twice n.

    `fitted` never loses more than the config edit, and recovers most of what that loses.
    """
    rises = []
    for name, n in (("mixtral", 2), ("olmoe", 4)):
        byte_models.train(name, tmp_path, steps=1000)
        source, text = tmp_path / name, tmp_path / "val.bin"
        prove(source, text, byte_models.CONTEXT, tmp_path / f"{name}-measured")
        numbers = [n // 2, n + 1, 2 * n, 4 * n]
        rises.append(prove_fitted(source, text, tmp_path / f"{name}-fitted", numbers))
    check_over_all(rises)


def check_over_all(rises: list[tuple[float, float]]) -> None:
    """Above n, over all models, at most `OVER_ALL` of the config edit's loss remains."""
    fitted, edit = (sum(column) for column in zip(*rises, strict=True))
    assert fitted <= OVER_ALL * edit, rises


@pytest.mark.skipif(ELSEWHERE is None, reason="MOESCALE_TRAINED_MODELS names no directory")
def test_models_trained_elsewhere_are_held_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every checkpoint folder below that directory passes the same tests."""
    folder = Path(ELSEWHERE or "")
    sources = sorted(path.parent for path in folder.glob("*/config.json"))
    assert sources, f"{folder} has no checkpoint folders"
    context = int(os.environ.get("MOESCALE_TRAINED_CONTEXT", "256"))
    monkeypatch.setattr(runner, "LONGEST", context)
    for source in sources:
        prove(source, folder / "val.bin", context, tmp_path / source.name)
