"""--rule fitted, --evaluate and tables of several plans, from the command to the bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from support import checkpoints, tiny_models
from support.command import Command

from moescale import api
from moescale.calibrate import blocks, devices, generated_text, runner
from moescale.calibrate.text import check_kept
from moescale.errors import DestinationError, UsageError
from moescale.factors import measured
from moescale.factors.samples import Fit

LENGTH = 64
"""Bytes of a sequence: as many as the model allows."""

TEXT = (Path(__file__).read_bytes() + Path(tiny_models.__file__).read_bytes())[:8192]
OTHER = (Path(__file__).parents[2] / "LICENSE").read_bytes()[:4096]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in bfloat16."""
    return built(tmp_path_factory.mktemp("fitted") / "source", "bfloat16")


def built(folder: Path, dtype: str) -> Path:
    """A tiny byte-level Mixtral whose routers clearly separate the experts."""
    torch.set_num_threads(1)
    tiny_models.build(
        "mixtral",
        folder,
        dtype=dtype,
        config={"vocab_size": 256, "max_position_embeddings": LENGTH},
    )
    for shard in folder.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(shard)
        for name in tensors:
            if name.endswith("gate.weight"):
                tensors[name] *= 40
        safetensors.torch.save_file(tensors, shard, {"format": "pt"})
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """A text to calibrate on, and another one."""
    files = tmp_path / "calibration.bin", tmp_path / "evaluation.bin"
    for file, data in zip(files, (TEXT, OTHER), strict=True):
        file.write_bytes(data)
    return files


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, as safetensors reads them."""
    found: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(shard)
    return found


def times(tensor: torch.Tensor, number: float) -> np.ndarray[Any, Any]:
    """The product by ml_dtypes: of float32 numbers, rounded once to bfloat16."""
    values = tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16).astype(np.float32)
    result: np.ndarray[Any, Any] = (values * np.float32(number)).astype(ml_dtypes.bfloat16)
    return result.view(np.uint16)


def loss(folder: Path, data: bytes, experts: int | None = None) -> float:
    """Mean cross entropy of the next byte by transformers, in sequences of `LENGTH`."""
    model = tiny_models.load(folder, "mixtral", top_k=experts)
    pieces = [data[i : i + LENGTH] for i in range(0, len(data), LENGTH)]
    total, count = 0.0, 0
    with torch.no_grad():
        for piece in pieces:
            ids = torch.tensor([list(piece)])
            found = model(input_ids=ids, labels=ids).loss
            total, count = total + float(found) * (len(piece) - 1), count + len(piece) - 1
    return total / count


def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the guard choose `fitted`: which rule wins on an untrained model is chance."""
    monkeypatch.setattr("moescale.factors.fitted.Guard.taken", "fitted")


# Fitted -------------------------------------------------------------------------------------------


def test_routers_and_experts_alone_differ_each_by_one_number_a_layer(
    source: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result equals ml_dtypes' bit for bit; all other tensors are unchanged."""
    forced(monkeypatch)
    plan = api.convert(
        source, tmp_path / "out", experts=4, rule="fitted", calibrate=texts[0], verify=True
    ).plan
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert any(scale != 1 for scale in plan.router_scales.values())
    changed = 0
    for name, tensor in before.items():
        layer = name.split(".")[2] if ".layers." in name else ""
        number = 1.0
        if name.endswith("gate.weight"):
            number = plan.router_scales[layer]
        elif name.endswith("w2.weight"):
            number = plan.factors[layer]
        changed += number != 1
        found = after[name].view(torch.uint16).numpy()
        assert np.array_equal(found, times(tensor, number)), name
    assert changed > 20
    written = json.loads((tmp_path / "out" / "moescale.json").read_text())
    assert written["router_scales"] == dict(plan.router_scales)
    assert written["calibration"]["guard"]["by"] == "loss"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The routers' weights are multiplied by a number as well." in card


def test_the_config_edit_is_kept_where_it_loses_least(
    source: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad fits lose more on the held-back text: only the config changes."""
    monkeypatch.setattr(measured, "factor", lambda sample: 50.0)
    monkeypatch.setattr(blocks, "fit", lambda sums, scalable=True: Fit(4.0, 50.0, 0.5, 0.4))
    out = tmp_path / "out"
    plan = api.convert(source, out, experts=4, rule="fitted", calibrate=texts[0]).plan
    assert plan.guard and plan.guard.taken == "none"
    trials = {trial.rule: trial.difference for trial in plan.guard.trials}
    assert trials["measured"] > 0 < trials["fitted"]
    assert set(plan.factors.values()) == {1.0} and not plan.router_scales
    assert "->  config edit alone" in plan.summary()
    before, after = tensors_of(source), tensors_of(out)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert json.loads((out / "config.json").read_text())["num_experts_per_tok"] == 4


def test_its_numbers_are_used_again_without_torch(
    source: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moescale.json of an output, passed to --factors, produces the same shards."""
    with monkeypatch.context() as patch:
        forced(patch)
        api.convert(source, tmp_path / "one", experts=4, rule="fitted", calibrate=texts[0])
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    plan = api.convert(
        source, tmp_path / "two", experts=4, factors=tmp_path / "one" / "moescale.json"
    ).plan
    assert plan.router_scales and plan.factors_rule == "fitted"
    one, two = (checkpoints.tree(tmp_path / name) for name in ("one", "two"))
    shards = [name for name in one if name.endswith(".safetensors")]
    assert shards and all(one[name] == two[name] for name in shards)


def test_a_finished_run_is_verified_without_options_and_not_fitted_again(
    source: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is stored in moescale.json, including the guard's."""
    how: Any = {"experts": 4, "rule": "fitted", "calibrate": texts[0]}
    first = api.convert(source, tmp_path / "out", **how).plan
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    again = api.convert(source, tmp_path / "out", **how)
    assert again.status == "done"
    assert again.plan.router_scales == first.router_scales
    assert again.plan.guard == first.guard is not None
    assert api.verify(source, tmp_path / "out").verified


def test_the_number_as_trained_changes_nothing(source: Path, texts: tuple[Path, Path]) -> None:
    """With m = n, the scale and the factor are 1."""
    plan = api.plan(source, experts=2, rule="fitted", calibrate=texts[0])
    assert set(plan.factors.values()) == {1.0} and not plan.router_scales
    assert plan.changes_nothing


def test_what_the_model_writes_takes_the_place_of_a_text(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is saved on request, and gives the same numbers when it is passed back."""
    for name, value in {"SEQUENCES": 64, "LENGTH": 48}.items():
        monkeypatch.setattr(generated_text, name, value)
    kept = tmp_path / "own.jsonl"
    with monkeypatch.context() as patch:
        forced(patch)
        own = api.plan(source, experts=4, rule="fitted", calibrate_out=kept)
        check_kept(kept)  # an interrupted run may write it again
        given = api.plan(source, experts=4, rule="fitted", calibrate=kept)
        assert own.guard and own.guard.by == "divergence"
        assert given.guard and given.guard.by == "loss"
    assert own.calibration["own"] is True
    assert own.factors == given.factors and own.router_scales == given.router_scales
    table = api.compare(source, experts=[4], rules=["measured", "fitted"])
    assert {p.calibration["text_sha256"] for p in table.plans} == {own.calibration["text_sha256"]}


def test_scales_of_a_file_must_cover_the_layers(source: Path) -> None:
    """The error names a layer without a scale."""
    both = {"factors": {str(i): 1.0 for i in range(3)}, "router_scales": {"0": 1.5}}
    with pytest.raises(UsageError, match="no router scale for layer 1"):
        api.plan(source, experts=4, factors=both)


def test_a_torch_that_cannot_be_imported_is_one_line(
    source: Path,
    moescale: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A missing CUDA library gives an error of one line, not a traceback."""
    real = devices.importlib.import_module

    def broken(name: str, package: str | None = None) -> Any:
        if name == "torch":
            raise OSError("libcudart.so.12: cannot open shared object file")
        return real(name, package)

    monkeypatch.setattr(devices.importlib, "import_module", broken)
    done = moescale(source, "-k4", "--rule=fitted", "--dry-run")
    assert (done.code, done.out) == (2, "")
    assert "torch, which cannot be imported: libcudart.so.12" in done.err
    assert len(done.err.splitlines()) == 2


# Losses -------------------------------------------------------------------------------------------


def test_the_loss_before_writing_is_that_of_the_output(
    texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """Hooks give what transformers computes with the rewritten checkpoint, except for rounding."""
    source = built(tmp_path / "source", "float32")
    how: Any = {"experts": 4, "factors": {"factors": FACTORS, "router_scales": SCALES}}
    before = api.plan(source, evaluate=texts[1], **how).evaluation
    after = api.convert(source, tmp_path / "out", evaluate=texts[1], **how).plan.evaluation
    assert before and after
    assert before.loss == pytest.approx(loss(source, OTHER), abs=1e-5)
    assert before.tokens == len(OTHER) - len(OTHER) // LENGTH
    edit, planned = before.runs
    assert (edit.rule, planned.rule) == ("none", "factors")
    assert edit.loss == pytest.approx(loss(source, OTHER, 4), abs=1e-5)
    assert planned.loss == pytest.approx(loss(tmp_path / "out", OTHER), abs=1e-5)
    assert planned.difference == planned.loss - edit.loss
    assert 0 < planned.standard_error < 0.1
    assert after.runs[0].loss == pytest.approx(edit.loss, abs=1e-6)
    assert after.runs[1].written
    assert after.runs[1].loss == pytest.approx(loss(tmp_path / "out", OTHER), abs=1e-5)
    again = api.convert(source, tmp_path / "out", evaluate=texts[1])
    assert again.status == "done" and again.plan.evaluation == after


FACTORS = {"0": 1.5, "1": 0.8, "2": 1.25}
SCALES = {"0": 2.0, "1": 0.5, "2": 1.25}


def test_several_numbers_and_rules_make_a_table(
    source: Path,
    texts: tuple[Path, Path],
    moescale: Command,
) -> None:
    """Each number is combined with each rule; the losses are printed as text and as JSON."""
    words = (source, "-k3,4", "--rule=none,gates,measured", "--calibrate", texts[0], "--dry-run")
    done = moescale(*words, "--evaluate", texts[1], "--json")
    content = json.loads(done.out)
    asked = [(m, rule) for m in (3, 4) for rule in ("none", "gates", "measured")]
    assert [(p["experts"]["to"], p["rule"]) for p in content["plans"]] == asked
    losses = content["evaluation"]
    assert losses["trained"]["experts"] == 2
    assert [(run["experts"], run["rule"]) for run in losses["runs"]] == asked
    assert all(run["difference"] == 0 for run in losses["runs"] if run["rule"] == "none")
    text = moescale(*words)
    assert text.code == 0
    lines = [line.split()[:4] for line in text.out.splitlines()]
    assert [["2", "->", str(m), rule] for m, rule in asked] == [x for x in lines if "->" in x]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["out", "-k", "3,4"], "Add --dry-run"),
        (["out", "-k", "3", "--rule", "none,gates"], "Add --dry-run"),
        (["out", "-k", "3,4", "--dry-run"], "has no DST"),
        (["hf://me/out", "-k", "3", "--evaluate", "a.txt"], "needs the output on this disk"),
        (["-k", "3", "--evaluate", "nowhere", "--dry-run"], "--evaluate nowhere: No such file"),
    ],
)
def test_wrong_use_is_exit_code_2(
    source: Path,
    moescale: Command,
    words: list[str],
    why: str,
) -> None:
    """The error says what to do."""
    done = moescale(source, *words)
    assert (done.code, done.out) == (2, "") and why in done.err


def test_texts_that_share_passages_are_warned_of(
    source: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """Rules fitted on a text look better on that text than on others."""
    same = tmp_path / "same.bin"
    same.write_bytes(TEXT[2048:4096] + OTHER)
    how: Any = {"experts": 3, "rule": "measured", "calibrate": texts[0]}
    for text, warned in ((same, True), (texts[1], False)):
        evaluation = api.plan(source, evaluate=text, **how).evaluation
        assert evaluation is not None
        assert any("shares passages" in w for w in evaluation.warnings) == warned
    out = tmp_path / "out"
    api.convert(source, out, **how)
    again = api.convert(source, out, evaluate=texts[0]).plan.evaluation
    assert again is not None and "shares passages" in again.warnings[0]
    with pytest.raises(
        DestinationError, match=r"\(measured, on text .{12}…\).*\(measured, on its own text\)"
    ):
        api.convert(source, out, experts=3, rule="measured")


def test_the_page_shows_what_was_tried_and_what_it_costs(
    source: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """The page shows the terminal's numbers as two tables."""
    page = tmp_path / "plan.html"
    how: Any = {"experts": 4, "rule": "fitted", "calibrate": texts[0]}
    plan = api.plan(source, evaluate=texts[1], report=page, **how)
    assert plan.guard and plan.evaluation
    shown = page.read_text()
    for title, loss in (
        ("Rules tried", plan.guard.trained),
        ("Loss", plan.evaluation.loss),
    ):
        assert f"<h2>{title}</h2>" in shown
        assert f"<td>{loss:.4f}</td>" in shown.partition(f"<h2>{title}</h2>")[2]
    assert '<title id="loss-title">Loss by number of experts</title>' in shown


def test_the_page_of_several_plans_draws_a_line_a_rule(
    source: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
    moescale: Command,
) -> None:
    """Each line runs through every number of experts, and all meet at the trained one."""
    page = tmp_path / "plans.html"
    words = (source, "-k1,3,4", "--rule=none,gates", "--dry-run", "--evaluate", texts[1])
    done = moescale(*words, "--json", "--report", page)
    assert done.code == 0
    root = ElementTree.fromstring(page.read_text().partition("\n")[2])
    (svg,) = root.iter("svg")
    groups = [group for group in svg.iter("g") if group.get("style")]
    lines = [group[0].attrib["d"].count("L") for group in groups[:3]]
    assert lines == [3, 3, 0]  # four points each, and the trained one on its own
    described = " ".join("".join(svg.itertext()).split())
    for run in json.loads(done.out)["evaluation"]["runs"]:
        name = {"none": "config edit alone"}.get(run["rule"], run["rule"])
        assert f"{name}, {run['experts']} experts: {run['loss']:.4f}." in described
    assert f"--report {source}" in moescale(*words, "--report", source / "x.html").err


def test_one_load_serves_all_plans_and_their_losses(
    source: Path, texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a large model takes minutes."""
    loads: list[Path] = []
    real = runner.load_model

    def counted(folder: Path, *more: Any) -> Any:
        loads.append(folder)
        return real(folder, *more)

    monkeypatch.setattr(runner, "load_model", counted)
    how: Any = {"calibrate": texts[0], "evaluate": texts[1]}
    table = api.compare(source, experts=[3, 4], rules=["none", "measured", "fitted"], **how)
    assert len(loads) == 1 and table.evaluation
    alone = api.plan(source, experts=4, rule="fitted", **how)
    assert len(loads) == 2 and alone.evaluation
    assert table.plans[-1].factors == alone.factors
    assert table.evaluation.runs[-1] == alone.evaluation.runs[-1]
