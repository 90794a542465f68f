#!/usr/bin/env python3
"""Trains four small MoE language models, one for each kind of router, and tries every rule on them.

The text is Python's own standard library, byte by byte, and what installed packages say of
themselves; nothing is downloaded. Needs torch and transformers (the `oracle` dependency group),
which `scripts/test.sh` installs:

    .venv-test/bin/python scripts/study.py study-output          # half an hour
    .venv-test/bin/python scripts/study.py quick-output --quick  # does it run; shows nothing

What is in the folder already, models and results, is not done again. The tables go to stdout and,
with the figure, to `study.md` and `study.svg` in the folder; `--docs docs` renews those of the
repo. Another version of Python or of the packages has other texts, and gives other numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import moescale
from moescale.report import chart

transformers.utils.logging.disable_progress_bar()

LAYERS, HIDDEN, CONTEXT, BATCH = 4, 96, 128, 16
STEPS, WARM_UP, RATE = 500, 50, 3e-3
BALANCE = 2e-3
"""Step of DeepSeek-V3's selection bias towards experts that got less than their share."""

CALIBRATED, EVALUATED = 128, 512
"""Pieces of CONTEXT bytes to calibrate with and to evaluate on."""

EQUAL = 0.0005
"""Losses that differ by less are called equal."""

WINDOW = 64
"""Bytes that no text to calibrate with or to evaluate on has in common with the one before it."""

GAP = 24
RULES = {
    "none": "config edit alone",
    "published": "published",
    "preserve": "preserve",
    "gates": "gates",
    "measured": "measured",
    "fitted": "fitted",
}
OTHERWISE = {"prose": "English prose", "own": "what the model writes"}
"""What else `fitted` is calibrated on."""

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.01}


@dataclass(frozen=True, slots=True)
class Study:
    """One kind of router.

    Attributes:
        title: what is special about it.
        config: of the model, beyond what all have in common.
        trained: experts per token in training.
        tried: experts per token to run it with.
    """

    title: str
    config: dict[str, Any]
    trained: int
    tried: tuple[int, ...]


STUDIES = {
    "mixtral": Study(
        "8 experts, trained with 2; softmax over the chosen, so weights sum to 1",
        {"num_local_experts": 8, "intermediate_size": 192, **BALANCED},
        2,
        (1, 3, 4, 5, 6, 7, 8),
    ),
    "olmoe": Study(
        "16 experts, trained with 4; softmax over all, not renormalised",
        {"num_experts": 16, "intermediate_size": 96, "norm_topk_prob": False, **BALANCED},
        4,
        (1, 2, 3, 5, 6, 8, 12, 16),
    ),
    "deepseek_v3": Study(
        "16 experts in 4 groups of which 2 are used, trained with 4; sigmoid scores with a"
        " selection bias, renormalised; one shared expert",
        {
            "n_routed_experts": 16,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 96,
            "intermediate_size": 192,
            "first_k_dense_replace": 0,
            "num_nextn_predict_layers": 0,
            "routed_scaling_factor": 1.0,
            "q_lora_rank": None,
            "kv_lora_rank": 48,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 24,
        },
        4,
        (1, 2, 3, 5, 6, 7, 8),
    ),
    "qwen2_moe": Study(
        "16 experts, trained with 4; softmax over all, not renormalised; one gated shared expert",
        {
            "num_experts": 16,
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 96,
            "intermediate_size": 192,
            "norm_topk_prob": False,
            **BALANCED,
        },
        4,
        (1, 2, 3, 5, 6, 8, 12, 16),
    ),
}


@dataclass(frozen=True, slots=True)
class Text:
    """Bytes to train on, and pieces of CONTEXT bytes, int64, (count, CONTEXT), of other files.

    Attributes:
        train: what the models learn.
        calibrate: Python, too.
        prose: English.
        evaluate: Python; it shares no `WINDOW` bytes with any of the others.
    """

    train: bytes
    calibrate: Tensor
    prose: Tensor
    evaluate: Tensor


def texts(pieces: int) -> Text:
    """The sources of Python's standard library, and how installed packages describe themselves.

    Of the library every eighth file is held back for each purpose.
    """
    root = Path(sysconfig.get_path("stdlib"))
    packages = ("site-packages", "dist-packages", "test", "idlelib", "lib2to3")
    files = [p for p in sorted(root.rglob("*.py")) if not set(p.parts) & set(packages)]
    if len(files) < 100:
        sys.exit(f"{root} has no sources of the standard library; use a Python that has them")
    parts = [b"".join(p.read_bytes() for p in files[i::8]) for i in range(8)]
    train = b"".join(parts[:6])
    known = windows(train)
    calibrate = contexts(parts[6], CALIBRATED, known)
    prose = contexts(descriptions(), CALIBRATED, known)
    for text in (calibrate, prose):
        known = np.union1d(known, windows(bytes(text.flatten().tolist())))
    return Text(train, calibrate, prose, contexts(parts[7], pieces, known))


def descriptions() -> bytes:
    """The long descriptions of installed packages, one after the other."""
    found = {
        dist.metadata["Name"]: dist.metadata.get_payload() for dist in metadata.distributions()
    }
    return "\n".join(str(found[name]) for name in sorted(found, key=str.lower)).encode()


def windows(text: bytes) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A hash of every `WINDOW` bytes of a text, sorted, each once."""
    return np.unique(hashes(text))


def hashes(text: bytes) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A hash of the `WINDOW` bytes from each place on: a polynomial, modulo 2**64."""
    codes = np.frombuffer(text, np.uint8).astype(np.uint64)
    total = np.zeros(max(0, len(codes) - WINDOW + 1), np.uint64)
    for i in range(WINDOW):
        total *= np.uint64(0x9E3779B97F4A7C15)
        total += codes[i : i + len(total)]
    return total


def contexts(text: bytes, count: int, known: np.ndarray[Any, np.dtype[np.uint64]]) -> Tensor:
    """`count` pieces of a text, evenly spread, without those that have a window of `known`."""
    starts = range(0, len(text) - CONTEXT, CONTEXT)
    seen = np.isin(hashes(text), known)
    last = CONTEXT - WINDOW + 1
    fresh = [start for start in starts if not seen[start : start + last].any()]
    if len(fresh) < count:
        sys.exit(f"only {len(fresh)} of {count} pieces of a text are new")
    chosen = [fresh[i * len(fresh) // count] for i in range(count)]
    return torch.tensor([list(text[start : start + CONTEXT]) for start in chosen])


# --- Training --------------------------------------------------------------------------------


def train(name: str, study: Study, text: bytes, steps: int, folder: Path) -> None:
    """Train a model and save it in bf16."""
    torch.manual_seed(0)
    layers = {"num_hidden_layers": LAYERS, "num_experts_per_tok": study.trained}
    config = transformers.CONFIG_MAPPING[name](**COMMON, **layers, **study.config)
    model = AutoModelForCausalLM.from_config(config)
    optimiser = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    plan = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, steps))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    balance = balancer(model)
    for step in range(steps):
        starts = torch.randint(len(data) - CONTEXT, (BATCH,))
        tokens = torch.stack([data[s : s + CONTEXT] for s in starts]).long()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        plan.step()
        balance()
        if step % 100 == 0 or step == steps - 1:
            say(f"{name}: step {step}, training loss {loss.item():.3f}")
    part = folder.with_name(f"{folder.name}.part")  # what was cut short is not taken for done
    shutil.rmtree(part, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(part)
    part.rename(folder)


def rate(step: int, steps: int) -> float:
    """Of learning: up in a straight line, down to a tenth in half a cosine."""
    progress = max(0.0, (step - WARM_UP) / max(1, steps - WARM_UP))
    return min(1.0, (step + 1) / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * progress))


def balancer(model: PreTrainedModel) -> Callable[[], None]:
    """Moves the selection biases of DeepSeek-V3 as its authors do; other routers have a loss."""
    gates = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
    chosen: dict[nn.Module, Tensor] = {}
    for gate in gates:
        gate.register_forward_hook(lambda gate, _, output: chosen.update({gate: output[2]}))

    def balance() -> None:
        for gate in gates:
            bias = gate.e_score_correction_bias
            load = torch.bincount(chosen[gate].flatten(), minlength=len(bias)).float()
            bias += BALANCE * torch.sign(load.mean() - load)

    return balance


# --- Trying ----------------------------------------------------------------------------------


class Trial(NamedTuple):
    """A model in use.

    Attributes:
        loss: mean, in nats a byte.
        norms: mean norm of the routed experts' output, by layer, on the inputs that the original
            model has there.
    """

    loss: float
    norms: list[float]


@dataclass(frozen=True, slots=True)
class Results:
    """What came of one router: the model as trained, and a trial for every count and rule.

    Attributes:
        name: model type.
        trained: with the number of experts that it was trained with.
        trials: by number of experts and rule; `fitted` also by what else it was calibrated on.
        taken: the rule that the guard of `fitted` took.
    """

    name: str
    trained: Trial
    trials: dict[int, dict[str, Trial]]
    taken: dict[int, dict[str, str]]

    def rise(self, rule: str, m: int) -> float:
        """Of the loss, over that as trained."""
        return self.trials[m][rule].loss - self.trained.loss

    def norm(self, rule: str, m: int) -> float:
        """Relative to that as trained, mean over layers."""
        pairs = zip(self.trials[m][rule].norms, self.trained.norms, strict=True)
        return sum(new / old for new, old in pairs) / len(self.trained.norms)


def try_rules(name: str, counts: Sequence[int], text: Text, folder: Path) -> Results:
    """Rewrite a model by every rule for every count, through moescale, and use what comes out."""
    files = {"fitted": folder / "calibrate.txt", "prose": folder / "prose.txt"}
    for file, pieces in zip(files.values(), (text.calibrate, text.prose), strict=True):
        file.write_bytes(bytes(pieces.flatten().tolist()))
    files["measured"] = files["fitted"]
    model = load(folder / name)
    inputs = block_inputs(model, text.evaluate[: len(text.evaluate) // 4])
    results = Results(name, trial(model, text.evaluate, inputs), {}, {})
    for m in counts:
        notes = folder / f"{name}-{m}.json"
        if not notes.exists():
            found = try_them(rewrite(folder / name, m, files), text.evaluate, inputs)
            part = notes.with_suffix(".part")
            part.write_text(json.dumps(found))
            part.rename(notes)
            say(f"{name}: {m} experts tried")
        trials, results.taken[m] = json.loads(notes.read_text())
        results.trials[m] = {rule: Trial(*found) for rule, found in trials.items()}
    return results


def rewrite(
    source: Path, m: int, texts: Mapping[str, Path]
) -> Iterator[tuple[str, moescale.Plan, Path]]:
    """A model with `m` experts per token, by each rule; each is gone when the next one comes."""
    for name in (*RULES, *OTHERWISE):
        output = source.with_name(f"{source.name}-{m}-{name}")
        shutil.rmtree(output, ignore_errors=True)
        rule, given = "fitted" if name in OTHERWISE else name, {}
        if name in texts:
            given["calibrate"] = texts[name]
        yield name, moescale.convert(source, output, experts=m, rule=rule, **given).plan, output
        shutil.rmtree(output)


def try_them(
    rewritten: Iterable[tuple[str, moescale.Plan, Path]], text: Tensor, inputs: Sequence[Tensor]
) -> tuple[dict[str, Trial], dict[str, str]]:
    """A trial for each rule, and what guards took; rules with the same numbers share one."""
    trials: dict[str, Trial] = {}
    taken: dict[str, str] = {}
    known: dict[tuple[float, ...], Trial] = {}
    for name, plan, output in rewritten:
        numbers = (*plan.factors.values(), *plan.router_scales.values())
        if numbers not in known:
            known[numbers] = trial(load(output), text, inputs)
        trials[name] = known[numbers]
        if plan.guard is not None:
            taken[name] = plan.guard.taken
    return trials, taken


def load(folder: Path) -> PreTrainedModel:
    """A model in float32, for use."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def block_inputs(model: PreTrainedModel, text: Tensor) -> list[Tensor]:
    """What each MoE block gets to see: float32, (tokens, hidden)."""
    seen: list[Tensor] = []
    layers = model.model.layers
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        for layer in layers
    ]
    model(input_ids=text)
    for hook in hooks:
        hook.remove()
    return [hidden.flatten(0, 1) for hidden in seen]


@torch.no_grad()
def trial(model: PreTrainedModel, text: Tensor, inputs: Sequence[Tensor]) -> Trial:
    """Loss on the text, and norms on the inputs of the blocks."""
    losses = []
    for part in text.split(64):
        logits = model(input_ids=part).logits[:, :-1]
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()))
    norms: list[float] = []
    for layer, hidden in zip(model.model.layers, inputs, strict=True):
        hook = layer.mlp.experts.register_forward_hook(
            lambda _, __, output: norms.append(float(output.norm(dim=-1).mean()))
        )
        layer.mlp(hidden[None])
        hook.remove()
    return Trial(float(torch.stack(losses).mean()), norms)


def say(text: str) -> None:
    """Progress, for people."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# --- Showing ---------------------------------------------------------------------------------


def page(everything: Sequence[Results], steps: int, pieces: int) -> str:
    """All tables, as a page of Markdown."""
    version = ".".join(map(str, sys.version_info[:2]))
    intro = f"""# What each rule does to a trained model

Made by `scripts/study.py`.
Four language models of {LAYERS} MoE layers, one for each kind of router, are trained for {steps}
steps of {BATCH * CONTEXT:,} bytes on the sources of Python {version}'s standard library.
Then moescale gives each another number of experts per token, by every rule, and transformers runs
what it wrote.

{in_short(everything)}
Four small models are no proof for a large one: `--evaluate` shows what yours loses, on your text.

All figures are rises of the loss over that as trained, in nats a byte, on
{pieces * CONTEXT:,} bytes of files that were held back; lower is better.
No {WINDOW} bytes of them stand in what the models were trained on or a rule was calibrated on.
`measured` and `fitted` were calibrated on {CALIBRATED * CONTEXT:,} bytes of other files, which
share no {WINDOW} bytes with what the models were trained on either.

## All together

{together(everything)}
Better and worse than the config edit are by more than {EQUAL}.

![The same as a figure](study.svg)

In the figure {outside(everything)}.

## Router by router

What is at most {EQUAL} above the best is bold.
In brackets is the norm of the routed experts' output relative to that as trained, on the same
inputs, mean over layers.
"""
    return "\n".join([intro, *map(table, everything), otherwise(everything)])


def in_short(everything: Sequence[Results]) -> str:
    """What a reader wants to know first; every number is counted here."""
    more = [(r, m) for r in everything for m in r.trials if m > STUDIES[r.name].trained]
    fewer = [(r, m) for r in everything for m in r.trials if m < STUDIES[r.name].trained]
    won = [(r, m, rule) for r, m in more for rule in RULES if r.rise(rule, m) < -EQUAL]
    lines = [
        f"- With more experts than trained ({len(more)} settings), `fitted` leaves"
        f" {share(more):.0%} of what the config edit loses; with fewer ({len(fewer)}),"
        f" {share(fewer):.0%}.",
        f"- It loses more than the config edit, by more than {EQUAL}, at"
        f" {sum(r.rise('fitted', m) > r.rise('none', m) + EQUAL for r, m in more + fewer)} of"
        f" {len(more) + len(fewer)} settings.",
    ]
    if not won:
        lines.append(
            "- **At no setting with more experts than trained did any rule beat the trained"
            " number.** Rescaling makes another number cost less; it does not make more experts"
            " better."
        )
    else:
        places = ", ".join(f"{r.name} with {m} by {rule}" for r, m, rule in won)
        lines.append(f"- Below the loss as trained: {places}.")
    return "\n".join(lines) + "\n"


def share(cases: Sequence[tuple[Results, int]]) -> float:
    """The part of what the config edit loses that `fitted` leaves."""
    return sum(r.rise("fitted", m) for r, m in cases) / sum(r.rise("none", m) for r, m in cases)


def otherwise(everything: Sequence[Results]) -> str:
    """What `fitted` does when it is calibrated on something else, and what its guard took."""
    lines = [
        "## Another text, or none",
        "",
        "`fitted` calibrated on Python, on English (how installed packages describe themselves),"
        " and on what the model writes by itself; in brackets the rule that its guard took, where"
        " that is another.",
        "",
        "| | k | config edit alone | Python | " + " | ".join(OTHERWISE.values()) + " |",
        "|---" * (4 + len(OTHERWISE)) + "|",
    ]
    for results in everything:
        for m, taken in results.taken.items():
            cells = [
                f"{results.rise(name, m):.4f}{guarded(taken[name])}"
                for name in ("fitted", *OTHERWISE)
            ]
            edit = f"{results.rise('none', m):.4f}"
            lines.append(f"| {' | '.join((f'`{results.name}`', str(m), edit, *cells))} |")
    return "\n".join(lines) + "\n"


def guarded(taken: str) -> str:
    """What the guard took, where it is not the rule that was asked for."""
    return "" if taken == "fitted" else f" ({RULES[taken]})"


def outside(everything: Sequence[Results]) -> str:
    """Where `published` leaves the frame of its panel, in words."""
    names = [
        f"`{r.name}`"
        for r in everything
        if max(r.rise("published", m) for m in r.trials) > height(r).high
    ]
    return f"`published` runs out of the frame for {' and '.join(names) or 'no router'}"


def table(results: Results) -> str:
    """Rise of the loss and, in brackets, the norm, for every rule and count."""
    title = STUDIES[results.name].title
    lines = [
        f"**`{results.name}`**: {title}. Loss as trained: {results.trained.loss:.4f}.",
        "",
        "| k | " + " | ".join(RULES.values()) + " |",
        "|---" * (len(RULES) + 1) + "|",
    ]
    for m in results.trials:
        best = min(results.rise(rule, m) for rule in RULES)
        cells = [str(m)]
        for rule in RULES:
            rise, norm = results.rise(rule, m), results.norm(rule, m)
            mark = "**" if rise <= best + EQUAL else ""
            cells.append(f"{mark}{rise:.4f}{mark} ({norm:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def together(everything: Sequence[Results]) -> str:
    """How often each rule beats the config edit alone, and where it loses most against it."""
    cases = [(results, m) for results in everything for m in results.trials]
    lines = [
        "| rule | mean rise, more experts | fewer | better than the config edit | worse | most lost"
        " against it |",
        "|---|---|---|---|---|---|",
    ]
    for rule, heading in RULES.items():
        gains = {f"{r.name}, k={m}": r.rise("none", m) - r.rise(rule, m) for r, m in cases}
        where = min(gains, key=gains.__getitem__)
        lost = f"{-gains[where]:.4f} ({where})" if gains[where] < -EQUAL else "nothing"
        better = sum(gain > EQUAL for gain in gains.values())
        worse = sum(gain < -EQUAL for gain in gains.values())
        means = [
            mean([r.rise(rule, m) for r, m in cases if (m > STUDIES[r.name].trained) == more])
            for more in (True, False)
        ]
        cells = [heading, *means, f"{better} of {len(cases)}", str(worse), lost]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean(values: Sequence[float]) -> str:
    """Of some rises; nothing of none."""
    return f"{sum(values) / len(values):.4f}" if values else ""


def figure(everything: Sequence[Results]) -> str:
    """A panel a router, on one sheet with a light background of its own."""
    panels = [panel(results) for results in everything]
    sizes = [re.findall(r'viewBox="0 0 (\d+) (\d+)"', svg)[0] for svg in panels]
    width, height = chart.WIDTH + GAP, max(int(high) for _, high in sizes) + GAP
    placed = [
        svg.replace(
            "<svg ",
            f'<svg x="{GAP + i % 2 * width}" y="{GAP + i // 2 * height}" width="{chart.WIDTH}"'
            f' height="{high}" ',
            1,
        )
        for i, (svg, (_, high)) in enumerate(zip(panels, sizes, strict=True))
    ]
    across, down = 2 * width + GAP, -(-len(panels) // 2) * height + GAP
    whole = f'width="{across}" height="{down}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {down}" {whole}>',
            "<title>What the factor does to four small trained models</title>",
            f"<style>svg {{ {chart.variables(chart.LIGHT)} }}{chart.STYLE}</style>",
            f'<rect {whole} rx="8" fill="var(--paper)"/>',
            *placed,
            "</svg>\n",
        ]
    )


def panel(results: Results) -> str:
    """The rise of the loss over experts per token; what is far above the others is cut off."""
    counts = sorted({*results.trials, STUDIES[results.name].trained})
    lines = {
        rule: [results.rise(rule, k) if k in results.trials else 0.0 for k in counts]
        for rule in RULES
    }
    names: dict[tuple[float, ...], list[str]] = {}
    for rule in ("preserve", *RULES):  # what coincides with it is drawn as it
        names.setdefault(tuple(lines[rule]), []).append(rule)
    series = [
        chart.Series(
            ", ".join(dict.fromkeys(RULES[rule] for rule in rules)),
            chart.LOOKS[rules[0]],
            list(enumerate(line)),
        )
        for line, rules in names.items()
    ]
    described = " ".join(
        f"{RULES[rule]}: {', '.join(f'{rise:.3f}' for rise in line)}."
        for rule, line in lines.items()
    )
    return chart.chart(
        results.name,
        f"{results.name}: rise of the loss by experts per token",
        described,
        chart.name_axis("experts per token", [(i, str(k)) for i, k in enumerate(counts)]),
        height(results),
        series,
    )


def height(results: Results) -> chart.Axis:
    """The axis of a panel; it holds every rule but `published`."""
    shown = [results.rise(r, m) for r in RULES if r != "published" for m in results.trials]
    return chart.number_axis(f"{results.name}: rise of the loss, nats a byte", [0, *shown])


def main() -> None:
    """Train what is missing, try every rule, show what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="a smoke test of about a minute")
    parser.add_argument("--docs", type=Path, help="where study.md and study.svg go, if elsewhere")
    arguments = parser.parse_args()
    quick = arguments.quick
    steps, pieces = (20, 16) if quick else (STEPS, EVALUATED)
    folder = arguments.folder / f"{steps}-steps"  # models of another length are others
    folder.mkdir(parents=True, exist_ok=True)
    text = texts(pieces)
    everything = []
    for name, study in STUDIES.items():
        if not (folder / name).exists():
            train(name, study, text.train, steps, folder / name)
        counts = study.tried[-1:] if quick else study.tried
        everything.append(try_rules(name, counts, text, folder))
    tables = page(everything, steps, pieces)
    print(tables)
    docs = arguments.docs or arguments.folder
    (docs / "study.md").write_text(tables, encoding="utf-8")
    (docs / "study.svg").write_text(figure(everything), encoding="utf-8")


if __name__ == "__main__":
    main()
