"""Losses on the user's text, by number of experts and rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moescale.factors.samples import rounded


@dataclass(frozen=True, slots=True)
class Run:
    """The model with one number of experts and one rule.

    Attributes:
        experts: experts per token, or those of each layer.
        rule: ``none`` is the config edit alone.
        loss: cross entropy, in nats per token.
        difference: `loss` minus that of the config edit with the same number of experts.
        standard_error: of `difference`, over the sequences of the text, which are the same for
            both.
        written: whether a finished output was loaded; else nothing was written.
    """

    experts: int | tuple[int, ...]
    rule: str
    loss: float
    difference: float
    standard_error: float
    written: bool = False

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Losses on one text: the model as trained, with the config edit, and with rules.

    Attributes:
        text: the file's name as the user gave it.
        sha256: digest of the file.
        tokens: number of predicted tokens.
        cut: whether the file is longer than the part that was used.
        experts: experts per token, as trained.
        loss: cross entropy of the model as trained, in nats per token.
        runs: all other runs; for each number of experts, the config edit comes first.
        warnings: for the user.
    """

    text: str
    sha256: str
    tokens: int
    cut: bool
    experts: int | tuple[int, ...]
    loss: float
    runs: tuple[Run, ...]
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """As ``--json`` prints it, to `samples.DIGITS` significant digits."""
        return {
            "text": self.text,
            "text_sha256": self.sha256,
            "tokens": self.tokens,
            **({"cut": True} if self.cut else {}),
            "trained": {
                "experts": self.experts,
                "loss": rounded(self.loss),
                "perplexity": rounded(math.exp(self.loss)),
            },
            "runs": [_run(run) for run in self.runs],
            **({"warnings": list(self.warnings)} if self.warnings else {}),
        }


def _run(run: Run) -> Mapping[str, Any]:
    numbers = ("loss", "perplexity", "difference", "standard_error")
    return {
        "experts": run.experts,
        "rule": run.rule,
        **{name: rounded(getattr(run, name)) for name in numbers},
        **({"written": True} if run.written else {}),
    }
